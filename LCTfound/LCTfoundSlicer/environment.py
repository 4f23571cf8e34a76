"""The Python that the worker runs in: what is installed there, what really imports, what torch left over."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import LCTfoundLib
from LCTfoundSlicer.background import BackgroundProcess

__all__ = [
    "Gpu",
    "ImportResult",
    "ProbeReport",
    "PythonEnvironment",
    "RunningProbe",
    "System",
    "TorchFiles",
    "TorchState",
    "importName",
    "loadRequirements",
    "totalMemory",
    "workerPython",
]

#: Distributions whose import name is not their own.
_IMPORT_NAMES = {"scikit-image": "skimage", "pillow": "PIL", "simpleitk": "SimpleITK"}
#: Names of torch's folders while pip replaces them ("~orch"); they stay when pip is killed.
_PIP_LEFTOVER = re.compile(r"~(orch|[-~.=%0-9]rch|[-~.=%0-9]{2}ch|unctorch)(gen)?(-.+\.dist-info)?")
#: Top-level folders of the torch package.
_TORCH_FOLDERS = ("torch", "torchgen", "functorch")
_PROBE = Path(__file__).with_name("probe.py")
#: Importing torch for the first time from a slow disk takes up to a minute.
_PROBE_SECONDS = 240.0
_PULSE_SECONDS = 0.03


def workerPython() -> str:
    """The program that runs the worker: Slicer's console Python, elsewhere this Python."""
    return shutil.which("PythonSlicer") or sys.executable


def importName(distribution: str) -> str:
    """The module to import for a distribution."""
    name = canonicalize_name(distribution)
    return _IMPORT_NAMES.get(name, name.replace("-", "_"))


def loadRequirements(path: Path) -> list[Requirement]:
    """The requirements of a file, without comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


class System(Enum):
    """The operating system, as far as the set-up makes a difference."""

    WINDOWS = "Windows"
    MACOS = "macOS"
    LINUX = "Linux"

    @classmethod
    def current(cls) -> System:
        return {"win32": cls.WINDOWS, "darwin": cls.MACOS}.get(sys.platform, cls.LINUX)


class TorchState(Enum):
    """What the files of torch look like, before anything is imported."""

    ABSENT = "absent"
    WHOLE = "whole"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class TorchFiles:
    """The files of torch.

    Attributes:
        state: judged by the files alone.
        version: of the installed torch; empty if unknown.
        reason: why it is incomplete; empty otherwise.
        paths: all that belongs to it directly below ``site-packages``, leftovers of pip included.
    """

    state: TorchState
    version: str = ""
    reason: str = ""
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ImportResult:
    """How the import of one package ended in a process of its own; ``error`` is empty when it went well."""

    version: str = ""
    error: str = ""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver tells it; memory in GB."""

    name: str
    driver: str
    memoryGb: float


@dataclass(frozen=True)
class ProbeReport:
    """What the worker's Python said.

    Attributes:
        packages: import name -> how its import ended.
        bridge: why torch and numpy cannot exchange arrays; empty when they can; None when it was not tried.
        torch: version, CUDA version of the build, whether CUDA is usable, architectures.
        gpus: as NVIDIA's driver tells them.
        hardware: (what, value) lines of the engine.
        problem: why the probe itself could not be run; empty otherwise.
    """

    packages: dict[str, ImportResult] = field(default_factory=dict)
    bridge: str | None = None
    torch: dict[str, Any] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    hardware: tuple[tuple[str, str], ...] = ()
    problem: str = ""

    def errorOf(self, name: str) -> str:
        """The import error of a package; empty when it imports or was not tried."""
        result = self.packages.get(name)
        return result.error if result else ""


@dataclass(frozen=True)
class PythonEnvironment:
    """A Python and its packages.

    Attributes:
        executable: runs it.
        sitePackages: where pip installs into.
        searchPath: all folders with packages, ``sitePackages`` among them.
        pythonVersion: (major, minor).
        system: operating system.
        machine: as ``platform.machine()`` says.
    """

    executable: str
    sitePackages: Path
    searchPath: tuple[str, ...]
    pythonVersion: tuple[int, int] = (sys.version_info.major, sys.version_info.minor)
    system: System = field(default_factory=System.current)
    machine: str = field(default_factory=platform.machine)

    @classmethod
    def current(cls) -> PythonEnvironment:
        """That of this process: in Slicer, application and worker share their packages."""
        sitePackages = Path(sysconfig.get_paths()["purelib"])
        return cls(workerPython(), sitePackages, tuple(dict.fromkeys((str(sitePackages), *sys.path))))

    @classmethod
    def of(cls, executable: str) -> PythonEnvironment:
        """That of another Python, which is asked for it."""
        code = (
            "import sys, sysconfig, json\n"
            "print(json.dumps([sysconfig.get_paths()['purelib'], sys.path[1:], sys.version_info[:2]]))"
        )
        answer = subprocess.run([executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
        sitePackages, searchPath, version = json.loads(answer.stdout)
        return cls(executable, Path(sitePackages), tuple(searchPath), (version[0], version[1]))

    def distributions(self) -> dict[str, str]:
        """Canonical name -> version of what is installed; what has no readable version is left out."""
        importlib.invalidate_caches()
        found: dict[str, str] = {}
        for distribution in importlib.metadata.distributions(path=list(self.searchPath)):
            name, version = _nameAndVersion(distribution)
            if name and version:
                found.setdefault(name, version)
        return found

    def torchFiles(self) -> TorchFiles:
        """What is there of torch, judged by its files; nothing is imported."""
        folder = self.sitePackages / "torch"
        records = sorted(self.sitePackages.glob("torch-*.dist-info"))
        leftovers = sorted(path for path in _children(self.sitePackages) if _PIP_LEFTOVER.fullmatch(path.name))
        folders = [path for name in _TORCH_FOLDERS if (path := self.sitePackages / name).exists()]
        paths = (*folders, *records, *leftovers)
        if not paths:
            return TorchFiles(TorchState.ABSENT)
        version = records[0].name.removesuffix(".dist-info").partition("-")[2] if len(records) == 1 else ""
        reason = _whyIncomplete(folder, records, leftovers)
        return TorchFiles(TorchState.INCOMPLETE if reason else TorchState.WHOLE, version, reason, paths)

    def startProbe(self, packages: Iterable[str]) -> RunningProbe:
        """Import packages (import names) in a process of this Python, in the background."""
        return RunningProbe(self.executable, list(packages))

    def probe(self, packages: Iterable[str], timeout: float = _PROBE_SECONDS) -> ProbeReport:
        """:meth:`startProbe` and wait for it."""
        return self.startProbe(packages).result(timeout)


class RunningProbe:
    """A probe in the background: ask ``poll`` until it is True, then take ``result``.

    An import that kills the process (a library for another processor does) is told as that package's error, and the
    probe goes on with the packages after it.
    """

    def __init__(self, executable: str, packages: Sequence[str]) -> None:
        self._executable = executable
        self._remaining = list(packages)
        self._lines: list[dict[str, Any]] = []
        self._problem = ""
        self._process: BackgroundProcess | None = None
        self._start()

    def poll(self) -> bool:
        """Whether all is known; returns at once."""
        if self._process is None or not self._process.poll():
            return self._process is None
        self._collect(self._process)
        return self._process is None

    def result(self, timeout: float = _PROBE_SECONDS, whileWaiting: Callable[[], None] = lambda: None) -> ProbeReport:
        """The report; waits for it if need be, calling ``whileWaiting`` often."""
        end = time.monotonic() + timeout
        while not self.poll():
            if time.monotonic() > end:
                self.stop()
                self._problem = f"it did not answer within {timeout:.0f} s"
                break
            whileWaiting()
            if self._process is not None:
                self._process.wait(_PULSE_SECONDS)
        return self._report()

    def stop(self) -> None:
        """End it; what was found so far stays in the report."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _start(self) -> None:
        request = {"packages": self._remaining, "engine": str(Path(LCTfoundLib.__file__).parent.parent)}
        try:
            self._process = BackgroundProcess([self._executable, "-P", str(_PROBE), json.dumps(request)])
        except OSError as error:
            self._process, self._problem = None, f"{self._executable} cannot be run ({error.strerror})"

    def _collect(self, process: BackgroundProcess) -> None:
        lines = _jsonLines(process.output())
        self._lines += lines
        self._process = None
        finished, crashed = any("done" in line for line in lines), _lastImport(lines)
        if not finished and crashed in self._remaining:
            self._lines.append({"package": crashed, "error": _deathOf(process)})
            self._remaining = self._remaining[self._remaining.index(crashed) + 1 :]
            process.close()
            self._start()
            return
        if not finished and not lines:
            self._problem = (process.errors().strip().splitlines() or [_deathOf(process)])[-1][:300]
        process.close()

    def _report(self) -> ProbeReport:
        def last(key: str, default: Any) -> Any:
            return next((line[key] for line in reversed(self._lines) if key in line), default)

        packages = {
            line["package"]: ImportResult(line.get("version", ""), line.get("error", ""))
            for line in self._lines
            if "package" in line
        }
        hardware = tuple((what, value) for what, value in last("hardware", []))
        gpus = tuple(Gpu(name, driver, mebibytes * 2**20 / 1e9) for name, driver, mebibytes in last("gpus", []))
        return ProbeReport(packages, last("bridge", None), last("torch", {}), gpus, hardware, self._problem)


def totalMemory() -> int | None:
    """Bytes of memory of this machine; psutil may not be installed yet. None where the system does not tell."""
    if sys.platform == "win32":
        return _windowsMemory()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _windowsMemory() -> int | None:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong), ("total", ctypes.c_ulonglong)] + [
            (f"rest{index}", ctypes.c_ulonglong) for index in range(6)
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    found = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total) if found else None


def _nameAndVersion(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    """Both empty where the record of what was installed is damaged."""
    try:
        name, version = distribution.metadata["Name"], distribution.version
        return (canonicalize_name(name), str(Version(version))) if name and version else ("", "")
    except (InvalidVersion, KeyError, OSError, TypeError, ValueError):
        return "", ""


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _whyIncomplete(folder: Path, records: list[Path], leftovers: list[Path]) -> str:
    """Empty when the files speak for a whole torch."""
    if not folder.exists() and leftovers:
        return "an install was interrupted while it replaced torch"
    if not (folder / "__init__.py").is_file():
        return "the folder of torch holds no program"
    if not records:
        return "the record of its install is missing"
    if len(records) > 1:
        return "two versions of it were installed over each other"
    if not all((records[0] / name).is_file() for name in ("METADATA", "RECORD")):
        return "the record of its install is incomplete"
    return ""


def _jsonLines(text: str) -> list[dict[str, Any]]:
    """The lines of a probe; one that was cut off when the process died is left out."""
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def _lastImport(lines: list[dict[str, Any]]) -> str:
    return next((line["importing"] for line in reversed(lines) if "importing" in line), "")


def _deathOf(process: BackgroundProcess) -> str:
    code = process.exitCode or 0
    return f"its import ended the process ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
