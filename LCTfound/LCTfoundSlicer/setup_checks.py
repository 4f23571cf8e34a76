"""The set-up check: one line per thing that must be right, each with a light, what was found, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from LCTfoundSlicer.environment import (
    Gpu,
    ProbeReport,
    PythonEnvironment,
    System,
    TorchFiles,
    TorchState,
    importName,
)
from LCTfoundSlicer.translation import tr as _

__all__ = [
    "BUNDLED",
    "Check",
    "Light",
    "PackageState",
    "SetupState",
    "Topic",
    "checkDisk",
    "checkGpu",
    "checkMemory",
    "checkNumpy",
    "checkPackage",
    "checkPath",
    "checkSystem",
    "checkTorch",
    "packageState",
    "torchLimit",
    "torchState",
]

#: What Slicer 5.12 brings: looked at, never installed or replaced.
BUNDLED = frozenset({"highdicom", "numpy", "pillow", "pydicom", "scipy", "simpleitk"})
#: Memory of a standard run on a CT of 512 x 512 x 300.
NEEDED_MEMORY_GB = 8.0
#: Windows' limit of a path, without the final NUL. PythonSlicer.exe does not declare that it knows longer ones.
_WINDOWS_PATH = 259
#: Longest path inside torch's wheels for Windows, with 6 letters for a build such as "+cu130". Measured on 2.12.0,
#: 2.12.1, 2.13.0, 2.14.0 and 2.14.1: only 2.13 has its licenses in deep folders.
_LONGEST_IN_TORCH = 127
_LONGEST_IN_TORCH_2_13 = 173
_SHORT_TORCH = "!=2.13.*"
#: CUDA's major version -> oldest driver that runs programs built with it (NVIDIA's compatibility table).
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


class Light(IntEnum):
    """The traffic light of a check; the larger, the worse."""

    GOOD = 0
    UNKNOWN = 1
    WARNING = 2
    PROBLEM = 3


class Topic(Enum):
    """What a check is about."""

    SYSTEM = "system"
    PATH = "path"
    TORCH = "torch"
    PACKAGE = "package"
    NUMPY = "numpy"
    GPU = "gpu"
    DISK = "disk"
    MEMORY = "memory"


class PackageState(Enum):
    """What is with a package that is needed."""

    WHOLE = "whole"
    MISSING = "missing"
    TOO_OLD = "too old"
    #: Its files are there only in part.
    INCOMPLETE = "incomplete"
    #: Its import fails.
    BROKEN = "broken"


@dataclass(frozen=True)
class Check:
    """One line of the set-up check.

    Attributes:
        topic: what it is about.
        title: to show.
        finding: what was found.
        light: how it ended.
        remedy: what the user can do; empty when there is nothing to do.
    """

    topic: Topic
    title: str
    finding: str
    light: Light = Light.GOOD
    remedy: str = ""


@dataclass(frozen=True)
class SetupState:
    """All checks, and the package states they rest on.

    Attributes:
        checks: in the order to show.
        packages: canonical name -> state; torch among them.
        torchReason: why torch is incomplete or broken; empty otherwise.
        hasGpu: whether there is an NVIDIA GPU, as far as is known.
        hardware: (what, value) lines of the engine; empty until the packages were really imported.
        isVerified: whether the packages were really imported, in a process of their own.
    """

    checks: tuple[Check, ...]
    packages: Mapping[str, PackageState]
    torchReason: str = ""
    hasGpu: bool = False
    hardware: tuple[tuple[str, str], ...] = ()
    isVerified: bool = False

    @property
    def light(self) -> Light:
        return max(check.light for check in self.checks)

    @property
    def isReady(self) -> bool:
        """Whether the worker can run, as far as is known."""
        return all(check.light is not Light.PROBLEM for check in self.checks)

    @property
    def needsRepair(self) -> bool:
        """Whether something is there only in part or cannot be imported."""
        broken = (PackageState.INCOMPLETE, PackageState.BROKEN)
        return any(state in broken for name, state in self.packages.items() if name not in BUNDLED)

    @property
    def needsInstall(self) -> bool:
        """Whether a package is missing, too old or damaged that an install would bring."""
        return any(state is not PackageState.WHOLE for name, state in self.packages.items() if name not in BUNDLED)

    def installProblems(self) -> list[Check]:
        """Those of the problems that an install is to solve."""
        topics = (Topic.SYSTEM, Topic.TORCH, Topic.PACKAGE, Topic.NUMPY)
        return [check for check in self.problems() if check.topic in topics]

    def problems(self) -> list[Check]:
        """The checks that keep the worker from running."""
        return [check for check in self.checks if check.light is Light.PROBLEM]

    def sentence(self) -> str:
        """The state in one sentence."""
        if self.needsRepair:
            return _("Packages are damaged. Press 'Repair'.")
        if self.needsInstall:
            return _("Packages are missing. Press 'Install'.")
        if problems := self.problems():
            return problems[0].remedy or problems[0].finding
        if not self.isVerified:
            return _("The packages are there; whether they work is being checked.")
        return _("All is set up.")


def packageState(requirement: Requirement, installed: Mapping[str, str], report: ProbeReport | None) -> PackageState:
    """State of a package other than torch."""
    version = installed.get(canonicalize_name(requirement.name))
    if report is not None and report.errorOf(importName(requirement.name)):
        return PackageState.MISSING if version is None else PackageState.BROKEN
    if version is None:
        return PackageState.MISSING
    return PackageState.WHOLE if requirement.specifier.contains(version, prereleases=True) else PackageState.TOO_OLD


def torchState(requirement: Requirement, files: TorchFiles, report: ProbeReport | None) -> tuple[PackageState, str]:
    """State of torch, and the reason when it is incomplete or broken."""
    if files.state is TorchState.ABSENT:
        return PackageState.MISSING, ""
    if files.state is TorchState.INCOMPLETE:
        return PackageState.INCOMPLETE, files.reason
    if report is not None and (error := report.errorOf("torch") or report.bridge):
        return PackageState.BROKEN, error
    if not requirement.specifier.contains(files.version, prereleases=True):
        return PackageState.TOO_OLD, ""
    return PackageState.WHOLE, ""


def checkSystem(environment: PythonEnvironment) -> Check:
    """Whether there is a torch for this Python and system at all."""
    title, version = _("Python"), ".".join(map(str, environment.pythonVersion))
    finding = f"{version}, {environment.system.value}, {environment.machine}"
    if environment.pythonVersion < (3, 11):
        return Check(Topic.SYSTEM, title, finding, Light.PROBLEM, _("Use Slicer 5.12 or later."))
    if environment.system is System.MACOS and environment.machine == "x86_64":
        remedy = _(
            "There is no recent torch for Intel builds on macOS; use a Slicer built for Apple silicon, or run LCTfound "
            "on a Linux or Windows computer."
        )
        return Check(Topic.SYSTEM, title, finding, Light.PROBLEM, remedy)
    return Check(Topic.SYSTEM, title, finding)


def checkPath(environment: PythonEnvironment, torchIsThere: bool) -> Check:
    """Windows only: letters and length of Slicer's path."""
    title, path = _("Slicer's folder"), str(environment.sitePackages)
    if environment.system is not System.WINDOWS:
        return Check(Topic.PATH, title, path)
    if not path.isascii():
        remedy = _("Install Slicer into a folder whose path has only English letters, such as C:\\Slicer.")
        return Check(Topic.PATH, title, path, Light.PROBLEM, remedy)
    if not _fits(path, _LONGEST_IN_TORCH) and not torchIsThere:
        remedy = _(
            "The path is too long for the files of torch: at most {letters} letters. Install Slicer into a short "
            "folder, such as C:\\Slicer."
        ).format(letters=_WINDOWS_PATH - 1 - _LONGEST_IN_TORCH)
        return Check(Topic.PATH, title, path, Light.PROBLEM, remedy)
    return Check(Topic.PATH, title, path)


def torchLimit(environment: PythonEnvironment) -> str:
    """What torch's version must be for its files to fit Windows' paths here; empty when any does."""
    if environment.system is not System.WINDOWS:
        return ""
    return "" if _fits(str(environment.sitePackages), _LONGEST_IN_TORCH_2_13) else _SHORT_TORCH


def _fits(folder: str, longest: int) -> bool:
    return len(folder) + 1 + longest <= _WINDOWS_PATH


def checkTorch(requirement: Requirement, files: TorchFiles, report: ProbeReport | None) -> Check:
    """torch, the only package that Slicer's PyTorch extension installs."""
    state, reason = torchState(requirement, files, report)
    remedies = {
        PackageState.MISSING: _("Press 'Install'."),
        PackageState.TOO_OLD: _("Press 'Install'; {version} or later is needed.").format(version=_oldest(requirement)),
        PackageState.INCOMPLETE: _("Press 'Repair': its remains are removed and it is installed anew."),
        PackageState.BROKEN: _importRemedy(reason),
    }
    return _packageCheck(Topic.TORCH, "torch", state, files.version, reason, remedies, report is not None)


def checkPackage(requirement: Requirement, installed: Mapping[str, str], report: ProbeReport | None) -> Check:
    """A package other than torch."""
    state = packageState(requirement, installed, report)
    name = canonicalize_name(requirement.name)
    reason = report.errorOf(importName(name)) if report is not None and state is PackageState.BROKEN else ""
    if name in BUNDLED:
        remedy = _("It comes with Slicer: use Slicer 5.12 or later, freshly installed.")
        remedies = dict.fromkeys(PackageState, remedy)
    else:
        remedies = {
            PackageState.MISSING: _("Press 'Install'."),
            PackageState.TOO_OLD: _("Press 'Install'; {version} or later is needed.").format(
                version=_oldest(requirement)
            ),
            PackageState.BROKEN: _importRemedy(reason),
        }
    return _packageCheck(
        Topic.PACKAGE, requirement.name, state, installed.get(name, ""), reason, remedies, report is not None
    )


def _packageCheck(
    topic: Topic,
    name: str,
    state: PackageState,
    version: str,
    reason: str,
    remedies: Mapping[PackageState, str],
    isVerified: bool,
) -> Check:
    findings = {
        PackageState.WHOLE: _("{version}, works").format(version=version) if isVerified else version,
        PackageState.MISSING: _("not installed"),
        PackageState.TOO_OLD: _("{version}, too old").format(version=version),
        PackageState.INCOMPLETE: _("half installed: {reason}").format(reason=reason),
        PackageState.BROKEN: _("{version}, cannot be imported: {reason}").format(version=version, reason=reason),
    }
    if state is PackageState.WHOLE:
        return Check(topic, name, findings[state], Light.GOOD if isVerified else Light.UNKNOWN)
    return Check(topic, name, findings[state], Light.PROBLEM, remedies[state])


def _importRemedy(reason: str) -> str:
    if "DLL load failed" in reason:
        return _(
            "Install the Microsoft Visual C++ Redistributable and restart Slicer; if that is no help, press 'Repair'."
        )
    return _("Press 'Repair': it is installed anew.")


def _oldest(requirement: Requirement) -> str:
    return next((spec.version for spec in requirement.specifier if spec.operator == ">="), str(requirement.specifier))


def checkNumpy(report: ProbeReport | None) -> Check:
    """Whether the compiled packages fit the numpy that is there."""
    title = _("numpy + torch")
    if report is None or (report.bridge is None and not report.packages):
        return Check(Topic.NUMPY, title, _("not checked yet"), Light.UNKNOWN)
    clashes = [name for name, result in report.packages.items() if _isNumpyClash(result.error)]
    clashes += ["torch"] if report.bridge and "torch" not in clashes else []
    if clashes:
        reason = report.bridge or report.errorOf(clashes[0])
        remedy = _("{names}: built for another numpy than Slicer's; press 'Repair'.").format(names=", ".join(clashes))
        return Check(Topic.NUMPY, title, reason, Light.PROBLEM, remedy)
    if report.bridge is None:
        return Check(Topic.NUMPY, title, _("not checked without torch"), Light.UNKNOWN)
    return Check(Topic.NUMPY, title, _("exchange arrays"))


def _isNumpyClash(error: str) -> bool:
    signs = ("numpy is not available", "numpy.dtype size changed", "numpy 1.x cannot be run", "numpy.core.multiarray")
    return any(sign in error.lower() for sign in signs)


def checkGpu(report: ProbeReport | None) -> Check:
    """Whether the NVIDIA GPU, if there is one, is used by this torch; without one the CPU does the work."""
    title = _("NVIDIA GPU")
    if report is None:
        return Check(Topic.GPU, title, _("not checked yet"), Light.UNKNOWN)
    if not report.gpus:
        return Check(Topic.GPU, title, _("none; the CPU is used, which takes minutes instead of seconds"))
    finding = "; ".join(
        _("{name}, {memory:.0f} GB, driver {driver}").format(name=gpu.name, memory=gpu.memoryGb, driver=gpu.driver)
        for gpu in report.gpus
    )
    if "cuda" not in report.torch:
        return Check(Topic.GPU, title, finding, Light.UNKNOWN)
    remedy = _gpuRemedy(report.gpus[0], report.torch)
    return Check(Topic.GPU, title, finding, Light.WARNING if remedy else Light.GOOD, remedy)


def _gpuRemedy(gpu: Gpu, torch: Mapping[str, object]) -> str:
    """Why torch does not use the GPU, with the remedy; empty when it does."""
    cuda = str(torch["cuda"])
    if not cuda:
        return _(
            "This torch is built for the CPU only. To use the GPU, uninstall torch in the module 'PyTorch Utils', "
            "restart Slicer and press 'Install'."
        )
    needed = _OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if _major(gpu.driver) < needed:
        return _("torch uses CUDA {cuda}, which needs driver {needed} or later: update the driver.").format(
            cuda=cuda, needed=needed
        )
    if not torch.get("cudaUsable"):
        return _("torch finds no usable GPU: update the driver and restart the computer.")
    if not _knowsArchitecture(torch):
        return _("This torch is not built for this GPU: uninstall it in 'PyTorch Utils' and press 'Install'.")
    return ""


def _knowsArchitecture(torch: Mapping[str, object]) -> bool:
    """Whether torch has code for the GPU's generation: of the same major version, or such as is compiled at start."""
    capability, architectures = torch.get("capability"), torch.get("architectures")
    if not isinstance(capability, list) or not isinstance(architectures, list) or not capability or not architectures:
        return True
    return any(str(name).split("_")[-1].rstrip("abcdef")[:-1] == str(capability[0]) for name in architectures) or any(
        str(name).startswith("compute_") for name in architectures
    )


def _major(version: str) -> int:
    try:
        return Version(version).major
    except InvalidVersion:
        return 0


def checkDisk(free: int | None, neededMb: float, folder: Path) -> Check:
    """Whether what is still to be installed, and one result, fits the disk."""
    title = _("Free disk space")
    if free is None:
        return Check(Topic.DISK, title, _("{folder} cannot be looked at").format(folder=folder), Light.UNKNOWN)
    finding = _("{free:.0f} GB at {folder}").format(free=free / 1e9, folder=folder)
    if free < neededMb * 1e6:
        remedy = _("{needed:.1f} GB are needed: free some space.").format(needed=neededMb / 1e3)
        return Check(Topic.DISK, title, finding, Light.PROBLEM, remedy)
    return Check(Topic.DISK, title, finding)


def checkMemory(total: int | None) -> Check:
    """Whether a standard run fits the memory."""
    title = _("Memory")
    if total is None:
        return Check(Topic.MEMORY, title, _("unknown"), Light.UNKNOWN)
    finding = _("{total:.0f} GB").format(total=total / 1e9)
    if total < NEEDED_MEMORY_GB * 0.95e9:  # a machine of 8 GB reports a little less
        remedy = _("{needed:.0f} GB are safe; use the quality 'fast'.").format(needed=NEEDED_MEMORY_GB)
        return Check(Topic.MEMORY, title, finding, Light.WARNING, remedy)
    return Check(Topic.MEMORY, title, finding)
