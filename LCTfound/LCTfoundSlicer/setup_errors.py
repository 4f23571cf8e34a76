"""What can go wrong with the set-up: one class per thing the user can mend, and the reading of pip's log for it."""

from __future__ import annotations

import re

from LCTfoundLib.errors import LCTfoundError
from LCTfoundSlicer.translation import tr as _

__all__ = [
    "ConsentDeclined",
    "DiskTooSmall",
    "FilesInUse",
    "InstallFailed",
    "NetworkBlocked",
    "PackageBroken",
    "PathUnsuitable",
    "PyTorchExtensionMissing",
    "SetupError",
    "SystemUnsuitable",
    "VersionConflict",
    "WheelsMissing",
    "errorFromLog",
]


class SetupError(LCTfoundError):
    """Base of what can go wrong with the set-up; ``log`` holds pip's words, if there are any."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class ConsentDeclined(SetupError):
    """The user did not want the install; nothing was changed."""


class SystemUnsuitable(SetupError):
    """This Slicer cannot run the engine: too old, or a system without a recent torch."""


class PyTorchExtensionMissing(SetupError):
    """Slicer's PyTorch extension, the only way torch is installed online, is not there."""


class DiskTooSmall(SetupError):
    """The packages do not fit the disk."""


class PathUnsuitable(SetupError):
    """Slicer's folder has too long a path or letters that Windows' Python cannot handle."""


class NetworkBlocked(SetupError):
    """The package index cannot be reached: no network, a proxy, or a proxy's certificate."""


class WheelsMissing(SetupError):
    """The folder of wheels lacks some that are needed."""


class VersionConflict(SetupError):
    """What is needed does not go with what Slicer or another extension has installed."""


class FilesInUse(SetupError):
    """Files to be replaced are loaded by a running program, or the folder may not be written."""


class InstallFailed(SetupError):
    """pip failed for a reason that none of the other classes knows."""


class PackageBroken(SetupError):
    """A package is installed but cannot be imported."""


def errorFromLog(log: str) -> SetupError:
    """The error that pip's log tells of, with its remedy. The first cause that fits is told."""
    for pattern, kind, message in _CAUSES():
        if re.search(pattern, log, re.IGNORECASE):
            return kind(message, log)
    return InstallFailed(
        _("The packages could not be installed: {reason}. Press 'Check again', then 'Install'.").format(
            reason=_lastWords(log)
        ),
        log,
    )


def _CAUSES() -> list[tuple[str, type[SetupError], str]]:
    """Pattern in pip's log, class and sentence; translated when asked for."""
    return [
        (
            r"No space left on device|Errno 28\b|WinError 112\b|not enough space on the disk|Disk quota exceeded",
            DiskTooSmall,
            _("The disk is full; free some space, then press 'Install' again."),
        ),
        (
            r"WinError 206\b|filename or extension is too long|Errno 36\b|file name too long",
            PathUnsuitable,
            _(
                "The path of Slicer's folder is too long for the files of torch; install Slicer into a short folder "
                "such as C:\\Slicer, then press 'Install' again."
            ),
        ),
        (
            r"WinError (5|32)\b|Access is denied|being used by another process|Permission denied|Errno 13\b",
            FilesInUse,
            _(
                "Files of a package are in use or may not be written; restart Slicer and press 'Install' before "
                "anything else. If it fails again, Slicer's folder needs the right to be written."
            ),
        ),
        (
            r"CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerificationError|certificate verify failed",
            NetworkBlocked,
            _(
                "The package index was reached, but its certificate is not trusted: a proxy of your network probably "
                "replaces it. Set PIP_CERT to the file of your organization's root certificate and restart Slicer, or "
                "use 'Offline install'."
            ),
        ),
        (
            r"ProxyError|407 Proxy Authentication|Cannot connect to proxy|Tunnel connection failed",
            NetworkBlocked,
            _(
                "The proxy refused the connection. Set HTTPS_PROXY to http://user:password@host:port and restart "
                "Slicer, or use 'Offline install'."
            ),
        ),
        (
            r"NewConnectionError|Temporary failure in name resolution|getaddrinfo failed|ConnectTimeout|ReadTimeout|"
            r"Failed to establish a new connection|Network is unreachable|NameResolutionError|ConnectionResetError|"
            r"Connection aborted",
            NetworkBlocked,
            _(
                "The package index cannot be reached. Check the network; behind a proxy set HTTPS_PROXY and restart "
                "Slicer; without internet use 'Offline install'."
            ),
        ),
        (
            r"ResolutionImpossible|conflicting dependencies|has requirement .* but you have",
            VersionConflict,
            _(
                "The packages do not go with those of Slicer or of another extension, which are left as they are; "
                "use a fresh Slicer of the newest version without that extension."
            ),
        ),
        (
            r"No matching distribution found for (?P<name>\S+)",
            VersionConflict,
            _(
                "There is no package for this Slicer's Python that goes with what is installed; update Slicer to its "
                "newest version. The log names the package."
            ),
        ),
    ]


def _lastWords(log: str) -> str:
    """The last line of the log that tells something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|\w*Error)\b", line)]
    return (errors or lines or [_("pip gave no reason")])[-1][:200].rstrip(".")
