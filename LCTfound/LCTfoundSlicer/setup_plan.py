"""What an install would do: packages, sizes, what is removed; and what a folder of wheels lacks for it."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from enum import Enum
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from LCTfoundSlicer.environment import System
from LCTfoundSlicer.translation import tr as _

__all__ = ["InstallPlan", "PackageSize", "PlannedPackage", "Source", "missingWheels", "sizeOf", "torchSize"]


class Source(Enum):
    """Where a package comes from."""

    PYTORCH_EXTENSION = "PyTorch extension"
    PACKAGE_INDEX = "package index"
    FOLDER = "folder of wheels"


@dataclass(frozen=True)
class PackageSize:
    """Megabytes (10^6 bytes) to download and on disk, with what the package brings along."""

    downloadMb: float
    diskMb: float


#: Measured on the wheels for Python 3.12 (torch 2.13.0 with torchvision 0.28.0, scikit-image 0.26.0, safetensors
#: 0.8.0, psutil 7.2.2; diffusers 0.42.1 with its eleven) and, for torch with CUDA on Linux, on an install of 2.14.1; on
#: disk with the bytecode that pip adds. Torch with CUDA on Windows could not be measured: it is the sum of the
#: libraries it shares with that for Linux.
_SIZES = {
    "diffusers": PackageSize(14, 100),
    "safetensors": PackageSize(1, 2),
    "scikit-image": PackageSize(17, 50),
    "psutil": PackageSize(1, 1),
    "highdicom": PackageSize(7, 60),
}
_TORCH_SIZES = {
    (System.LINUX, False): PackageSize(210, 810),
    (System.LINUX, True): PackageSize(3000, 5700),
    (System.WINDOWS, False): PackageSize(140, 580),
    (System.WINDOWS, True): PackageSize(2300, 3900),
    (System.MACOS, False): PackageSize(130, 580),
    (System.MACOS, True): PackageSize(130, 580),
}
_UNKNOWN = PackageSize(20, 80)


def sizeOf(distribution: str) -> PackageSize:
    """Size of a package other than torch."""
    return _SIZES.get(canonicalize_name(distribution), _UNKNOWN)


def torchSize(system: System, cuda: bool) -> PackageSize:
    """Size of torch and torchvision with all that they bring along."""
    return _TORCH_SIZES[system, cuda]


@dataclass(frozen=True)
class PlannedPackage:
    """A package to be installed.

    Attributes:
        requirement: as pip takes it.
        why: what is wrong now, for the user.
        size: to download and on disk.
        source: where it comes from.
        reinstall: it is there, but broken: it is installed anew.
    """

    requirement: str
    why: str
    size: PackageSize
    source: Source
    reinstall: bool = False

    @property
    def name(self) -> str:
        """Canonical name."""
        return canonicalize_name(Requirement(self.requirement).name)


@dataclass(frozen=True)
class InstallPlan:
    """All that an install would do; what the user consents to.

    Attributes:
        packages: torch first.
        removals: remains of a half-installed torch that are removed.
        sitePackages: where the packages go.
        offlineFolder: of wheels; None when the packages are downloaded.
        cpuOnly: the small torch without CUDA.
    """

    packages: tuple[PlannedPackage, ...]
    removals: tuple[Path, ...]
    sitePackages: Path
    offlineFolder: Path | None = None
    cpuOnly: bool = False

    @property
    def isEmpty(self) -> bool:
        return not self.packages and not self.removals

    @property
    def torch(self) -> PlannedPackage | None:
        return next((package for package in self.packages if package.name == "torch"), None)

    @property
    def others(self) -> tuple[PlannedPackage, ...]:
        return tuple(package for package in self.packages if package.name != "torch")

    @property
    def downloadMb(self) -> float:
        return 0 if self.offlineFolder else sum(package.size.downloadMb for package in self.packages)

    @property
    def diskMb(self) -> float:
        return sum(package.size.diskMb for package in self.packages)

    def text(self) -> str:
        """For the one question whether it may be done."""
        lines = [_("LCTfound needs Python packages that Slicer does not bring:"), ""]
        lines += [self._line(package) for package in self.packages]
        lines += ["", self._total()]
        if self.removals:
            names = ", ".join(path.name for path in self.removals)
            lines.append(_("Removed first: the remains of a half-installed torch ({names}).").format(names=names))
        lines.append(_("They are added to {folder}.").format(folder=self.sitePackages))
        lines.append(_("Nothing of Slicer itself is replaced. No data of yours is sent anywhere."))
        return "\n".join(lines)

    def _line(self, package: PlannedPackage) -> str:
        sources = {
            Source.PYTORCH_EXTENSION: _("by the PyTorch extension"),
            Source.PACKAGE_INDEX: _("by pip"),
            Source.FOLDER: _("from the folder of wheels"),
        }
        return _("- {requirement}: {why}; {size}, {source}").format(
            requirement=package.requirement,
            why=package.why,
            size=_megabytes(package.size.diskMb),
            source=sources[package.source],
        )

    def _total(self) -> str:
        disk = _megabytes(self.diskMb)
        if self.offlineFolder:
            return _("Nothing is downloaded; about {disk} on disk, from {folder}.").format(
                disk=disk, folder=self.offlineFolder
            )
        return _("About {download} to download, {disk} on disk.").format(
            download=_megabytes(self.downloadMb), disk=disk
        )


def _megabytes(megabytes: float) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def missingWheels(folder: Path, requirements: Sequence[str], installed: dict[str, str]) -> list[str]:
    """What a folder of wheels lacks for requirements and all that these need; empty when it has everything.

    Args:
        folder: of ``.whl`` files.
        requirements: that shall be installed from it.
        installed: canonical name -> version of what need not be in the folder.
    """
    wheels = _Wheels(folder)
    missing: dict[str, None] = {}
    queue: list[tuple[Requirement, str]] = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement, neededBy = queue.pop(0)
        name = canonicalize_name(requirement.name)
        if (name, neededBy) in seen:
            continue
        seen.add((name, neededBy))
        if neededBy and name in installed and requirement.specifier.contains(installed[name], prereleases=True):
            continue
        wheel = wheels.best(requirement)
        if wheel is None:
            missing.setdefault(f"{requirement.name}{requirement.specifier}{_becauseOf(neededBy)}")
            continue
        needs = _needsOf(wheel)
        if needs is None:
            missing.setdefault(_("{name} (damaged)").format(name=wheel.name))
            continue
        queue += [(need, requirement.name) for need in needs if _applies(need, requirement.extras)]
    return list(missing)


class _Wheels:
    """The wheels of a folder that fit this Python, newest first."""

    def __init__(self, folder: Path) -> None:
        tags = set(sys_tags())
        self._wheels: dict[str, list[tuple[Version, Path]]] = {}
        for path in sorted(folder.glob("*.whl")):
            try:
                name, version, _build, wheelTags = parse_wheel_filename(path.name)
            except InvalidWheelFilename:
                continue
            if not wheelTags.isdisjoint(tags):
                self._wheels.setdefault(name, []).append((version, path))

    def best(self, requirement: Requirement) -> Path | None:
        fitting = [
            (version, path)
            for version, path in self._wheels.get(canonicalize_name(requirement.name), [])
            if requirement.specifier.contains(version, prereleases=True)
        ]
        return max(fitting)[1] if fitting else None


def _applies(need: Requirement, extras: Iterable[str]) -> bool:
    """Whether a package's need counts here, given the extras that were asked of the package."""
    return need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _needsOf(wheel: Path) -> Iterable[Requirement] | None:
    """The requirements in a wheel's metadata; None when the file is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            headers = HeaderParser().parsestr(archive.read(metadata).decode("utf-8", "replace"))
    except (zipfile.BadZipFile, OSError, StopIteration, EOFError):
        return None
    return [Requirement(text) for text in headers.get_all("Requires-Dist", [])]


def _becauseOf(neededBy: str) -> str:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    text = _(" (for {package}, {python})") if neededBy else _(" ({python})")
    return text.format(package=neededBy, python=python)
