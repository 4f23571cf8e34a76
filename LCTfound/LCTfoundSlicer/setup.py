"""The set-up of LCTfound: what is missing, one plan to consent to, the install in steps, its verification and repair.

Qt-free: what touches Slicer stands behind doors (``TorchInstaller``, ``PackageInstaller``, ``Settings``), so that tests
run it with real pip on a Python of their own. In Slicer ``slicerSetup()`` puts it together.

The rules: torch comes only through Slicer's PyTorch extension (offline: from the folder of wheels that the user gives);
everything that is installed is pinned meanwhile, so nothing of Slicer's is replaced; what was installed counts only
when a fresh process has imported it; an install that was cut off is remembered and goes on at the next start.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from LCTfoundSlicer.environment import (
    ProbeReport,
    PythonEnvironment,
    RunningProbe,
    importName,
    loadRequirements,
    totalMemory,
)
from LCTfoundSlicer.setup_checks import (
    BUNDLED,
    Check,
    Light,
    PackageState,
    SetupState,
    Topic,
    checkDisk,
    checkGpu,
    checkMemory,
    checkNumpy,
    checkPackage,
    checkPath,
    checkSystem,
    checkTorch,
    packageState,
    torchLimit,
    torchState,
)
from LCTfoundSlicer.setup_errors import (
    ConsentDeclined,
    DiskTooSmall,
    FilesInUse,
    PackageBroken,
    PathUnsuitable,
    PyTorchExtensionMissing,
    SystemUnsuitable,
    WheelsMissing,
)
from LCTfoundSlicer.setup_plan import InstallPlan, PlannedPackage, Source, missingWheels, sizeOf, torchSize
from LCTfoundSlicer.translation import tr as _

__all__ = [
    "Doors",
    "Outcome",
    "PackageInstaller",
    "PendingInstall",
    "PipRequest",
    "Settings",
    "Setup",
    "Step",
    "TorchInstaller",
    "constraintLines",
    "requirementsFile",
]

_PENDING_KEY = "LCTfound/PendingInstall"
#: What one result needs on disk beside the packages, in MB.
_RESULT_MB = 1000
#: Packages that torch brings in a version of its own; they are free to change when torch does.
_BROUGHT_BY_TORCH = ("torch", "torchvision", "torchaudio", "triton")
_BROUGHT_BY_TORCH_PREFIXES = ("nvidia-", "cuda-")
_TRASH = ".lctfound-removed-"


class TorchInstaller(Protocol):
    """The door to whatever installs torch online."""

    def isAvailable(self) -> bool:
        """Whether there is such a thing."""

    def install(self, versions: str, cpuOnly: bool, constraints: Path) -> None:
        """Install torch (``versions`` such as ">=2.6"); raises SetupError."""


@dataclass(frozen=True)
class PipRequest:
    """What pip shall install.

    Attributes:
        requirements: as pip takes them.
        constraints: file of pins of what must stay as it is.
        offlineFolder: of wheels; None: the package index.
        reinstall: the packages are there but broken: they, and only they, are installed anew.
    """

    requirements: tuple[str, ...]
    constraints: Path
    offlineFolder: Path | None = None
    reinstall: bool = False

    @property
    def isPlain(self) -> bool:
        """Whether pip needs no options for it."""
        return self.offlineFolder is None and not self.reinstall

    def arguments(self) -> list[str]:
        """Options and requirements of ``pip install``, but for the constraints. Only wheels: nothing is compiled."""
        options = ["--only-binary", ":all:"]
        if self.offlineFolder is not None:
            options += ["--no-index", "--find-links", str(self.offlineFolder)]
        if self.reinstall:
            options += ["--force-reinstall", "--no-deps", "--no-cache-dir"]
        return [*options, *self.requirements]


class PackageInstaller(Protocol):
    """The door to pip."""

    def install(self, request: PipRequest) -> None:
        """Raises SetupError."""


class Settings(Protocol):
    """Where a few texts survive a restart; QSettings is one."""

    def value(self, key: str) -> Any: ...

    def setValue(self, key: str, value: Any) -> None: ...

    def remove(self, key: str) -> None: ...


@dataclass(frozen=True)
class Doors:
    """What the set-up needs from outside.

    Attributes:
        torch: installs torch.
        packages: installs the rest.
        settings: of this installation of Slicer.
        memory: bytes of memory of the machine; None if unknown.
        whileWaiting: called often while the packages are tried, so that a window stays alive.
        freeDisk: bytes free on the disk of a folder.
    """

    torch: TorchInstaller
    packages: PackageInstaller
    settings: Settings
    memory: Callable[[], int | None] = totalMemory
    whileWaiting: Callable[[], None] = lambda: None
    freeDisk: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free


class Step(Enum):
    """What an install is doing."""

    REMOVE = "remove"
    TORCH = "torch"
    PACKAGES = "packages"
    VERIFY = "verify"

    @property
    def text(self) -> str:
        return {
            Step.REMOVE: _("Removing the remains of torch"),
            Step.TORCH: _("Installing torch"),
            Step.PACKAGES: _("Installing packages"),
            Step.VERIFY: _("Checking that everything works"),
        }[self]


@dataclass(frozen=True)
class PendingInstall:
    """An install that has begun; found at the start of Slicer it was cut off.

    Attributes:
        step: what it was doing.
        offlineFolder: its folder of wheels; empty when it downloaded.
        cpuOnly: whether it was to bring the small torch.
        started: when, ISO 8601.
    """

    step: Step
    offlineFolder: str = ""
    cpuOnly: bool = False
    started: str = ""

    def toText(self) -> str:
        return json.dumps({**asdict(self), "step": self.step.value})

    @classmethod
    def fromText(cls, text: str) -> PendingInstall | None:
        """None where the text is not one of ours."""
        try:
            values = json.loads(text)
            return cls(
                Step(values["step"]),
                str(values["offlineFolder"]),
                bool(values["cpuOnly"]),
                str(values["started"]),
            )
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Outcome:
    """How an install ended.

    Attributes:
        state: of the set-up, verified by real imports.
        restart: packages that this process still holds in their old version: Slicer should be restarted.
        replaced: packages outside the plan whose version changed, name -> (old, new); none when pip obeyed.
    """

    state: SetupState
    restart: tuple[str, ...] = ()
    replaced: Mapping[str, tuple[str, str]] | None = None


class Setup:
    """Looks at the set-up and mends it.

    Args:
        requirements: file of requirements, torch among them.
        doors: to the outside.
        environment: the Python that is looked at; default: that of this process.
    """

    def __init__(self, requirements: Path, doors: Doors, environment: PythonEnvironment | None = None) -> None:
        self._doors = doors
        self.environment = environment or PythonEnvironment.current()
        found = loadRequirements(requirements)
        self._torch = next(requirement for requirement in found if requirement.name == "torch")
        self._others = [requirement for requirement in found if requirement is not self._torch]

    def state(self, report: ProbeReport | None = None) -> SetupState:
        """All checks. Without the report of a probe nothing is imported: quick, but what is broken looks whole."""
        environment, files = self.environment, self.environment.torchFiles()
        installed = environment.distributions()
        torch, reason = torchState(self._torch, files, report)
        packages: dict[str, PackageState] = {
            canonicalize_name(requirement.name): packageState(requirement, installed, report)
            for requirement in self._others
        }
        hasGpu = report is not None and bool(report.gpus)
        missing = self._packagesToInstall(torch, packages, "", hasGpu, None, installed)
        checks = [
            checkSystem(environment),
            checkPath(environment, torch is PackageState.WHOLE),
            checkTorch(self._torch, files, report),
            *(checkPackage(requirement, installed, report) for requirement in self._others),
            checkNumpy(report),
            checkGpu(report),
            self._checkDisk(_neededMb(missing)),
            checkMemory(self._doors.memory()),
        ]
        if report is not None and report.problem:
            checks.insert(0, _probeCheck(report.problem))
        hardware = report.hardware if report is not None else ()
        return SetupState(tuple(checks), {"torch": torch, **packages}, reason, hasGpu, hardware, report is not None)

    def startProbe(self) -> RunningProbe:
        """Import everything in a process of its own, in the background; its result is for :meth:`state`."""
        return self.environment.startProbe(self._importNames())

    def examine(self) -> SetupState:
        """The verified state; waits some seconds for the imports."""
        return self.state(self.startProbe().result(whileWaiting=self._doors.whileWaiting))

    def plan(self, state: SetupState, offlineFolder: Path | None = None, cpuOnly: bool = False) -> InstallPlan:
        """What an install would do about a state."""
        files, torch = self.environment.torchFiles(), state.packages["torch"]
        damaged = torch in (PackageState.INCOMPLETE, PackageState.BROKEN)
        packages = self._packagesToInstall(
            torch,
            state.packages,
            state.torchReason,
            state.hasGpu and not cpuOnly,
            offlineFolder,
            self.environment.distributions(),
        )
        return InstallPlan(
            packages, files.paths if damaged else (), self.environment.sitePackages, offlineFolder, cpuOnly
        )

    def install(
        self,
        plan: InstallPlan,
        consent: Callable[[InstallPlan], bool],
        onStep: Callable[[Step], None] = lambda step: None,
    ) -> Outcome:
        """Carry a plan out: check that it can go well, ask once, remove, install, verify.

        Args:
            plan: of :meth:`plan`.
            consent: asked once, before anything is changed.
            onStep: told before each step.

        Raises:
            ConsentDeclined: nothing was changed.
            SetupError: with the remedy.
        """
        self._checkBefore(plan)
        if not plan.isEmpty and not consent(plan):
            raise ConsentDeclined(_("The packages were not installed: you did not agree. Nothing was changed."))
        before = self.environment.distributions()
        loaded = {name for name in before if importName(name) in sys.modules}
        try:
            self._carryOut(plan, onStep)
            state = self._verify(plan, onStep)
        except FilesInUse:
            raise  # the install goes on after the restart
        except Exception:
            self._doors.settings.remove(_PENDING_KEY)
            raise
        self._doors.settings.remove(_PENDING_KEY)
        changed = _changes(before, self.environment.distributions())
        planned = {package.name for package in plan.packages}
        return Outcome(
            state,
            tuple(name for name in changed if name in loaded),
            {name: versions for name, versions in changed.items() if name not in planned and not _broughtByTorch(name)},
        )

    def pending(self) -> PendingInstall | None:
        """An install that was cut off by the end of Slicer; None if there is none."""
        text = self._doors.settings.value(_PENDING_KEY)
        return PendingInstall.fromText(text) if isinstance(text, str) and text else None

    def forgetPending(self) -> None:
        """The user does not want to go on with it."""
        self._doors.settings.remove(_PENDING_KEY)

    def _importNames(self) -> list[str]:
        # numpy first: a clash shows in those that are built on it
        names = [importName(requirement.name) for requirement in self._others]
        return ["numpy", *(name for name in names if name != "numpy"), "torch"]

    def _checkDisk(self, neededMb: float) -> Check:
        folder = self.environment.sitePackages
        try:
            free = self._doors.freeDisk(folder)
        except OSError:
            free = None
        return checkDisk(free, neededMb, folder)

    def _packagesToInstall(
        self,
        torch: PackageState,
        packages: Mapping[str, PackageState],
        torchReason: str,
        cuda: bool,
        offlineFolder: Path | None,
        installed: Mapping[str, str],
    ) -> tuple[PlannedPackage, ...]:
        source = Source.FOLDER if offlineFolder else Source.PACKAGE_INDEX
        planned = []
        if torch is not PackageState.WHOLE:
            size = torchSize(self.environment.system, cuda)
            torchSource = Source.FOLDER if offlineFolder else Source.PYTORCH_EXTENSION
            why = torchReason or _why(torch, self.environment.torchFiles().version)
            planned.append(PlannedPackage(self._torchRequirement(), why, size, torchSource))
        for requirement in self._others:
            name = canonicalize_name(requirement.name)
            state = packages[name]
            if name in BUNDLED or state is PackageState.WHOLE:
                continue
            reinstall = state is PackageState.BROKEN
            why = _why(state, installed.get(name, ""))
            planned.append(PlannedPackage(str(requirement), why, sizeOf(name), source, reinstall))
        return tuple(planned)

    def _torchRequirement(self) -> str:
        limit = torchLimit(self.environment)
        return f"{self._torch},{limit}" if limit else str(self._torch)

    def _checkBefore(self, plan: InstallPlan) -> None:
        """All that can be known before something is downloaded or removed."""
        for check, error in (
            (checkSystem(self.environment), SystemUnsuitable),
            (checkPath(self.environment, plan.torch is None), PathUnsuitable),
            (self._checkDisk(_neededMb(plan.packages)), DiskTooSmall),
        ):
            if check.light is Light.PROBLEM and not plan.isEmpty:
                raise error(f"{check.finding}. {check.remedy}")
        if plan.offlineFolder is not None:
            self._checkWheels(plan, plan.offlineFolder)
        elif plan.torch is not None and not self._doors.torch.isAvailable():
            raise PyTorchExtensionMissing(
                _(
                    "Slicer's PyTorch extension is missing. Open the Extensions Manager (menu View), install "
                    "'PyTorch', restart Slicer, then press 'Install'. Without internet use 'Offline install'."
                )
            )

    def _checkWheels(self, plan: InstallPlan, folder: Path) -> None:
        if not folder.is_dir():
            raise WheelsMissing(_("There is no folder {folder}; choose another.").format(folder=folder))
        installed = self.environment.distributions()
        for package in plan.packages:
            installed.pop(package.name, None)
        missing = missingWheels(folder, [package.requirement for package in plan.packages], installed)
        if missing:
            raise WheelsMissing(
                _("The folder {folder} lacks wheels: {missing}. Fetch them on a computer with internet.").format(
                    folder=folder, missing=", ".join(missing)
                )
            )

    def _carryOut(self, plan: InstallPlan, onStep: Callable[[Step], None]) -> None:
        if plan.removals:
            self._begin(Step.REMOVE, plan, onStep)
            removeFrom(self.environment.sitePackages, plan.removals)
            forgetBrokenModule("torch")
        with self._constraints(plan) as constraints:
            if plan.torch is not None:
                self._begin(Step.TORCH, plan, onStep)
                self._installTorch(plan, plan.torch, constraints)
            if plan.others:
                self._begin(Step.PACKAGES, plan, onStep)
                for again in (False, True):
                    if chosen := tuple(package.requirement for package in plan.others if package.reinstall is again):
                        self._doors.packages.install(PipRequest(chosen, constraints, plan.offlineFolder, again))

    def _installTorch(self, plan: InstallPlan, torch: PlannedPackage, constraints: Path) -> None:
        if plan.offlineFolder is not None:
            self._doors.packages.install(PipRequest((torch.requirement,), constraints, plan.offlineFolder))
        else:
            versions = str(Requirement(torch.requirement).specifier)
            self._doors.torch.install(versions, plan.cpuOnly, constraints)

    def _verify(self, plan: InstallPlan, onStep: Callable[[Step], None]) -> SetupState:
        self._begin(Step.VERIFY, plan, onStep)
        state = self.examine()
        if problems := state.installProblems():
            text = " ".join(f"{check.title}: {check.finding}. {check.remedy}" for check in problems)
            raise PackageBroken(_("The install does not work yet. {problems}").format(problems=text))
        return state

    def _begin(self, step: Step, plan: InstallPlan, onStep: Callable[[Step], None]) -> None:
        """Remember the step, so that the next start of Slicer knows of it if this one is cut off."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        pending = PendingInstall(step, str(plan.offlineFolder or ""), plan.cpuOnly, started)
        self._doors.settings.setValue(_PENDING_KEY, pending.toText())
        onStep(step)

    @contextlib.contextmanager
    def _constraints(self, plan: InstallPlan) -> Iterator[Path]:
        """A file that pins all that is installed and not to be changed."""
        lines = constraintLines(self.environment.distributions(), plan)
        with tempfile.TemporaryDirectory(prefix="lctfound-") as folder:
            path = Path(folder) / "constraints.txt"
            path.write_text("\n".join(lines) + "\n", "utf-8")
            yield path


def requirementsFile() -> Path:
    """The requirements of the worker, beside the home module: installed, or in a source checkout."""
    package = Path(__file__).resolve().parent
    places = (package.parent / "Resources", package.parent / "LCTfound" / "Resources")
    return next(path for place in places if (path := place / "requirements.txt").is_file())


def constraintLines(installed: Mapping[str, str], plan: InstallPlan) -> list[str]:
    """Pins of what is installed, but for what the plan changes."""
    free = {package.name for package in plan.packages}
    return [
        f"{name}=={version}"
        for name, version in sorted(installed.items())
        if name not in free and not (plan.torch is not None and _broughtByTorch(name))
    ]


def removeFrom(sitePackages: Path, paths: Sequence[Path]) -> None:
    """Remove files and folders directly below ``site-packages``: all or, while one is in use, none.

    They are moved aside first, which Windows refuses for a folder with a loaded library before it has changed anything.

    Raises:
        ValueError: a path lies elsewhere.
        FilesInUse: one cannot be moved; the others are back in their place.
    """
    if any(path.parent != sitePackages for path in paths):
        raise ValueError(f"not directly below {sitePackages}: {paths}")
    for old in sitePackages.glob(f"{_TRASH}*"):
        shutil.rmtree(old, ignore_errors=True)
    trash = sitePackages / f"{_TRASH}{secrets.token_hex(4)}"
    moved: list[Path] = []
    try:
        trash.mkdir()
        for path in paths:
            os.replace(path, trash / path.name)
            moved.append(path)
    except OSError as error:
        for path in moved:
            os.replace(trash / path.name, path)
        with contextlib.suppress(OSError):
            trash.rmdir()
        raise FilesInUse(
            _(
                "{path} cannot be removed ({reason}). Restart Slicer, open LCTfound before any other module and press "
                "'Continue'. If it fails again, Slicer's folder needs the right to be written."
            ).format(path=error.filename, reason=error.strerror)
        ) from error
    shutil.rmtree(trash, ignore_errors=True)


def forgetBrokenModule(name: str) -> None:
    """Let this process import a package anew that it knows only as the empty folder it was."""
    module = sys.modules.get(name)
    if module is not None and getattr(module, "__file__", None) is None:
        for known in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[known]
    importlib.invalidate_caches()


def _probeCheck(problem: str) -> Check:
    finding = _("could not be asked: {problem}").format(problem=problem)
    return Check(Topic.SYSTEM, _("Worker's Python"), finding, Light.PROBLEM, _("Restart Slicer, or install it anew."))


def _why(state: PackageState, version: str) -> str:
    return {
        PackageState.MISSING: _("missing"),
        PackageState.TOO_OLD: _("version {version} is too old").format(version=version),
        PackageState.INCOMPLETE: _("half installed"),
        PackageState.BROKEN: _("cannot be imported"),
        PackageState.WHOLE: "",
    }[state]


def _neededMb(packages: Sequence[PlannedPackage]) -> float:
    """Disk for packages, their downloads and one result."""
    return sum(package.size.downloadMb + package.size.diskMb for package in packages) + _RESULT_MB


def _broughtByTorch(name: str) -> bool:
    return name in _BROUGHT_BY_TORCH or name.startswith(_BROUGHT_BY_TORCH_PREFIXES)


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Packages whose version is another one now; new ones are no change."""
    return {name: (version, after.get(name, "")) for name, version in before.items() if after.get(name, "") != version}
