"""The set-up's doors in Slicer: the PyTorch extension, slicer.packaging, the application's settings."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, TextIO

import slicer

from LCTfoundSlicer.setup import Doors, PipRequest, Setup, requirementsFile
from LCTfoundSlicer.setup_errors import errorFromLog

__all__ = ["PyTorchExtension", "SlicerPackages", "applicationSettings", "installationSettings", "slicerSetup"]

_REQUESTER = "LCTfound"


class PyTorchExtension:
    """Installs torch by Slicer's PyTorch extension, which finds the build for this computer's GPU."""

    def isAvailable(self) -> bool:
        return importlib.util.find_spec("PyTorchUtils") is not None

    def install(self, versions: str, cpuOnly: bool, constraints: Path) -> None:
        """The extension asks nothing: the user has consented to the whole plan. It takes no constraints, pip does."""
        from PyTorchUtils import PyTorchUtilsLogic

        with _pipsWords() as log, _environmentVariables(PIP_CONSTRAINT=str(constraints)):
            try:
                PyTorchUtilsLogic().installTorch(
                    askConfirmation=False,
                    forceComputationBackend="cpu" if cpuOnly else None,
                    torchVersionRequirement=versions,
                )
            except (CalledProcessError, ImportError, OSError, RuntimeError, ValueError) as error:
                raise errorFromLog(f"{log.getvalue()}\n{type(error).__name__}: {error}") from error


class SlicerPackages:
    """Installs the rest by slicer.packaging, which shows pip's progress in a window of its own."""

    def install(self, request: PipRequest) -> None:
        with _pipsWords() as log, _environmentVariables(PIP_ONLY_BINARY=":all:"):
            try:
                self._install(request)
            except (CalledProcessError, RuntimeError, OSError) as error:
                raise errorFromLog(f"{log.getvalue()}\n{type(error).__name__}: {error}") from error

    def _install(self, request: PipRequest) -> None:
        import slicer.packaging

        if request.isPlain:
            slicer.packaging.pip_ensure(
                list(request.requirements),
                constraints=request.constraints,
                prompt_install=False,  # asked already, once for the whole plan
                prompt_restart=False,  # told at the end of the install
                requester=_REQUESTER,
            )
        else:
            slicer.packaging.pip_install(request.arguments(), constraints=request.constraints, requester=_REQUESTER)


def slicerSetup() -> Setup:
    """The set-up of this Slicer."""
    doors = Doors(PyTorchExtension(), SlicerPackages(), installationSettings(), whileWaiting=slicer.app.processEvents)
    return Setup(requirementsFile(), doors)


def applicationSettings() -> Any:
    """Settings of the user, for all versions of Slicer."""
    return slicer.app.userSettings()


def installationSettings() -> Any:
    """Settings of this installation of Slicer: an install that was cut off in it is no other one's affair."""
    return slicer.app.revisionUserSettings()


class _Tee(io.TextIOBase):
    """Writes to a stream and keeps a copy."""

    def __init__(self, stream: TextIO | None, copy: io.StringIO) -> None:
        self._stream, self._copy = stream, copy

    def write(self, text: str) -> int:
        if self._stream is not None:
            self._stream.write(text)
        return self._copy.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()


@contextlib.contextmanager
def _pipsWords() -> Iterator[io.StringIO]:
    """Keep what Slicer prints of pip's output: the exception that it raises does not hold it."""
    copy = io.StringIO()
    with contextlib.redirect_stdout(_Tee(sys.stdout, copy)):
        yield copy


@contextlib.contextmanager
def _environmentVariables(**variables: str) -> Iterator[None]:
    """Set variables for the programs started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
