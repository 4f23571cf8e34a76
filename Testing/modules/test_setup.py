"""The set-up: real pip on a Python of its own; what is missing, half installed, broken, offline, cut off or declined.

The packages are tiny wheels made here under the real names, so that pip, its records and the imports are the real
thing and yet take no network. The last test installs the real ones.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from LCTfoundSlicer import environment as environment_code
from LCTfoundSlicer import setup as setup_code
from LCTfoundSlicer.environment import (
    Gpu,
    ImportResult,
    ProbeReport,
    PythonEnvironment,
    System,
    TorchState,
    loadRequirements,
    totalMemory,
)
from LCTfoundSlicer.probe import parseGpus
from LCTfoundSlicer.setup import (
    Doors,
    PendingInstall,
    PipRequest,
    Setup,
    Step,
    constraintLines,
    forgetBrokenModule,
    removeFrom,
    requirementsFile,
)
from LCTfoundSlicer.setup_checks import BUNDLED, Light, PackageState, Topic, checkGpu, checkPath, torchLimit
from LCTfoundSlicer.setup_errors import (
    ConsentDeclined,
    DiskTooSmall,
    FilesInUse,
    InstallFailed,
    NetworkBlocked,
    PackageBroken,
    PathUnsuitable,
    PyTorchExtensionMissing,
    SetupError,
    SystemUnsuitable,
    VersionConflict,
    WheelsMissing,
    errorFromLog,
)
from LCTfoundSlicer.setup_plan import missingWheels

_LCTFOUND = Path(__file__).resolve().parents[2] / "LCTfound"

_NUMPY = "__version__ = '{version}'\ndef arange(stop):\n    return [float(i) for i in range(int(stop))]\n"
_TORCH = """
import numpy
__version__ = "{version}"
class Tensor(list):
    def __add__(self, other): return Tensor(x + other for x in self)
    def numpy(self): return self
    def tolist(self): return list(self)
def from_numpy(array): return Tensor(array)
class version: cuda = None
class cuda:
    is_available = staticmethod(lambda: False)
"""
_REQUIREMENTS = "torch>=2.6\npsutil>=5.9\nscikit-image>=0.25\nnumpy>=2.0\n"


def wheel(folder: Path, name: str, version: str, code: str = "", needs: Sequence[str] = (), module: str = "") -> Path:
    """A real wheel with one package."""
    module, stem = module or name.replace("-", "_"), f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}/__init__.py": code or f"__version__ = '{version}'\n",
        f"{stem}.dist-info/METADATA": metadata + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    files[f"{stem}.dist-info/RECORD"] = record + f"{stem}.dist-info/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    target = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return target


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """A folder of wheels that stands for the package index."""
    folder = tmp_path_factory.mktemp("index")
    for version in ("2.2.0", "2.6.0", "2.13.0"):
        wheel(folder, "torch", version, _TORCH.format(version=version), ["numpy"])
    for version in ("1.26.0", "2.4.6", "2.5.0"):
        wheel(folder, "numpy", version, _NUMPY.format(version=version))
    wheel(folder, "psutil", "7.2.2")
    wheel(folder, "networkx", "3.6")
    wheel(folder, "scikit-image", "0.20.0", module="skimage")
    wheel(folder, "scikit-image", "0.26.0", needs=["numpy>=2", "networkx>=3.0"], module="skimage")
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, index) -> Path:
    """An environment like Slicer's: it has numpy, and nothing of ours."""
    folder = tmp_path_factory.mktemp("pristine") / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    pip(folder / "bin" / "python", ["--no-index", "--find-links", str(index), "numpy==2.4.6"])
    return folder


def pip(python: Path, arguments: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Real pip of this Python, working on another one; its words."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--disable-pip-version-check"]
    answer = subprocess.run(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env={**os.environ, **(environment or {})},
    )
    if answer.returncode:
        raise errorFromLog(answer.stdout)
    return answer.stdout


class MemorySettings(dict):
    """As QSettings answers."""

    def value(self, key):
        return self.get(key)

    def setValue(self, key, value):
        self[key] = value

    def remove(self, key):
        self.pop(key, None)


@dataclass
class RealPip:
    """pip for both doors, with a folder in place of the package index."""

    python: Path
    index: Path | None
    available: bool = True
    log: list[str] = field(default_factory=list)

    def isAvailable(self) -> bool:
        return self.available

    def pip(self, arguments: Sequence[str], constraints: Path) -> None:
        self.log.append(" ".join(arguments))
        fromIndex = {} if self.index is None else {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}
        pip(self.python, [*arguments, "-c", str(constraints)], fromIndex)


class TorchDoor(RealPip):
    def install(self, versions: str, cpuOnly: bool, constraints: Path) -> None:
        self.pip([f"torch{versions}"], constraints)


class PackageDoor(RealPip):
    def install(self, request: PipRequest) -> None:
        self.pip(request.arguments(), request.constraints)


@pytest.fixture(scope="module")
def complete(pristine, index, tmp_path_factory) -> Path:
    """An environment where all is installed."""
    folder = tmp_path_factory.mktemp("complete") / "python"
    shutil.copytree(pristine, folder, symlinks=True)
    everything = ["torch", "psutil", "scikit-image", "numpy==2.4.6"]
    pip(folder / "bin" / "python", ["--no-index", "--find-links", str(index), *everything])
    return folder


@dataclass
class Bench:
    """A set-up on a fresh copy of the pristine environment."""

    setup: Setup
    torch: TorchDoor
    packages: PackageDoor
    settings: MemorySettings

    @property
    def site(self) -> Path:
        return self.setup.environment.sitePackages

    def run(self, consent=lambda plan: True, **options):
        return self.setup.install(self.setup.plan(self.setup.examine(), **options), consent)

    def put(self, *requirements: str) -> None:
        pip(self.torch.python, ["--no-index", "--find-links", str(self.torch.index), *requirements])

    def with_(self, **changes) -> Bench:
        """The same with another environment."""
        self.setup.environment = replace(self.setup.environment, **changes)
        return self


def bench_on(python: Path, index: Path | None, requirements: Path, **doors) -> Bench:
    torch, packages, settings = TorchDoor(python, index), PackageDoor(python, index), MemorySettings()
    allDoors = Doors(torch, packages, settings, **doors)
    return Bench(Setup(requirements, allDoors, PythonEnvironment.of(str(python))), torch, packages, settings)


def bench_in(folder: Path, template: Path, index: Path) -> Bench:
    shutil.copytree(template, folder / "python", symlinks=True)
    (folder / "requirements.txt").write_text(f"# a comment\n\n{_REQUIREMENTS}")
    return bench_on(folder / "python" / "bin" / "python", index, folder / "requirements.txt")


@pytest.fixture
def bench(pristine, index, tmp_path) -> Bench:
    """A fresh Slicer."""
    return bench_in(tmp_path, pristine, index)


@pytest.fixture
def whole(complete, index, tmp_path) -> Bench:
    """A Slicer where all is installed."""
    return bench_in(tmp_path, complete, index)


def snapshot(folder: Path) -> dict[str, int]:
    """All files with their time of change; what the interpreter compiles does not count."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


class TestState:
    def test_a_fresh_slicer_lacks_torch_and_packages_and_is_told_to_install(self, bench):
        state = bench.setup.examine()
        assert not state.isReady and state.needsInstall and not state.needsRepair
        assert state.packages == {
            "torch": PackageState.MISSING,
            "psutil": PackageState.MISSING,
            "scikit-image": PackageState.MISSING,
            "numpy": PackageState.WHOLE,
        }
        torch = next(check for check in state.checks if check.topic is Topic.TORCH)
        assert torch.light is Light.PROBLEM and "Install" in torch.remedy and "Install" in state.sentence()

    def test_a_whole_one_is_ready_and_verified(self, whole):
        quick = whole.setup.state()
        assert quick.isReady and not quick.isVerified and quick.light is Light.UNKNOWN
        state = whole.setup.examine()
        assert state.isReady and state.isVerified and state.light is Light.GOOD, state.checks
        assert state.sentence() == "All is set up."

    def test_old_versions_are_told(self, bench):
        bench.put("torch==2.2.0", "psutil", "scikit-image==0.20.0")
        state = bench.setup.examine()
        assert state.packages["torch"] is state.packages["scikit-image"] is PackageState.TOO_OLD
        assert any("2.6" in check.remedy for check in state.problems())

    def test_an_old_package_of_slicers_own_is_told_but_never_planned(self, bench):
        bench.put("numpy==1.26.0")
        state = bench.setup.examine()
        (check,) = [check for check in state.problems() if check.title == "numpy"]
        assert "comes with Slicer" in check.remedy
        assert "numpy" not in {package.name for package in bench.setup.plan(state).packages}

    def test_a_package_that_cannot_be_imported_is_told_with_the_reason(self, whole):
        (whole.site / "psutil" / "__init__.py").write_text("import no_such_library_at_all")
        state = whole.setup.examine()
        assert state.packages["psutil"] is PackageState.BROKEN and state.needsRepair
        assert any("no_such_library_at_all" in check.finding for check in state.problems())

    def test_an_import_that_kills_its_process_spoils_no_other_answer(self, whole):
        (whole.site / "psutil" / "__init__.py").write_text("import os; os.kill(os.getpid(), 9)")
        state = whole.setup.examine()
        assert state.packages["psutil"] is PackageState.BROKEN
        assert state.packages["torch"] is state.packages["scikit-image"] is PackageState.WHOLE
        assert any("signal 9" in check.finding for check in state.problems())

    def test_what_a_package_prints_does_not_confuse_the_answer(self, whole):
        (whole.site / "psutil" / "__init__.py").write_text("import os; print('{\"done\"'); os.write(1, b'noise\\n')")
        assert whole.setup.examine().isReady

    def test_a_torch_built_for_another_numpy_is_told_and_repaired(self, whole):
        code = (whole.site / "torch" / "__init__.py").read_text()
        clash = code.replace("return Tensor(array)", "raise RuntimeError('Numpy is not available')")
        (whole.site / "torch" / "__init__.py").write_text(clash)
        state = whole.setup.examine()
        (check,) = [check for check in state.checks if check.topic is Topic.NUMPY]
        assert check.light is Light.PROBLEM and "another numpy" in check.remedy and state.needsRepair
        assert whole.run().state.isReady

    def test_a_python_that_cannot_be_run_is_told(self, bench, tmp_path):
        state = bench.with_(executable=str(tmp_path / "none")).setup.examine()
        assert state.light is Light.PROBLEM and "cannot be run" in state.problems()[0].finding

    def test_a_probe_does_not_wait_and_can_be_stopped(self, whole):
        (whole.site / "psutil" / "__init__.py").write_text("import time; time.sleep(60)")
        probe = whole.setup.startProbe()
        assert not probe.poll()
        probe.stop()
        assert probe.poll()

    def test_a_probe_that_hangs_ends_in_time(self, bench):
        bench.put("psutil")
        (bench.site / "psutil" / "__init__.py").write_text("import time; time.sleep(60)")
        report = bench.setup.environment.probe(["psutil"], timeout=1)
        assert "did not answer" in report.problem


class TestInstall:
    def test_one_consent_then_all_is_there(self, bench):
        asked = []
        outcome = bench.run(consent=lambda plan: asked.append(plan.text()) or True)
        assert outcome.state.isReady and outcome.state.isVerified
        assert len(asked) == 1
        for word in ("torch>=2.6", "psutil>=5.9", "scikit-image>=0.25", "to download", "on disk", str(bench.site)):
            assert word in asked[0]
        assert bench.torch.log == ["torch>=2.6"] and all("torch" not in line for line in bench.packages.log)
        assert bench.setup.environment.distributions()["torch"] == "2.13.0"

    def test_declining_leaves_everything_untouched(self, bench):
        before = snapshot(bench.site)
        with pytest.raises(ConsentDeclined, match="Nothing was changed"):
            bench.run(consent=lambda plan: False)
        assert snapshot(bench.site) == before and not bench.settings and not bench.torch.log

    def test_nothing_of_slicers_is_replaced(self, bench):
        """scikit-image would be glad of numpy 2.5.0, which the index has."""
        assert bench.run().replaced == {}
        assert bench.setup.environment.distributions()["numpy"] == "2.4.6"

    def test_a_package_that_needs_another_numpy_is_refused_instead(self, bench, index, tmp_path):
        greedy = tmp_path / "greedy"
        shutil.copytree(index, greedy)
        for path in greedy.glob("scikit_image*"):
            path.unlink()
        wheel(greedy, "scikit-image", "0.26.0", needs=["numpy>=2.5"], module="skimage")
        bench.packages.index = greedy
        with pytest.raises(VersionConflict, match="left as they are"):
            bench.run()
        assert bench.setup.environment.distributions()["numpy"] == "2.4.6"

    def test_an_old_torch_is_replaced_with_what_it_brought(self, bench):
        bench.put("torch==2.2.0", "psutil", "scikit-image")
        assert bench.run().state.packages["torch"] is PackageState.WHOLE

    def test_where_all_is_there_nothing_is_asked_or_changed(self, whole):
        before = snapshot(whole.site)
        outcome = whole.run(consent=lambda plan: pytest.fail("asked for nothing"))
        assert outcome.state.isReady and snapshot(whole.site) == before

    def test_an_existing_torch_is_not_touched(self, bench):
        bench.put("torch==2.6.0")
        bench.torch.available = False
        assert bench.run().state.isReady
        assert bench.setup.environment.distributions()["torch"] == "2.6.0" and not bench.torch.log

    def test_without_the_pytorch_extension_the_user_is_told_how_to_get_it(self, bench):
        bench.torch.available = False
        with pytest.raises(PyTorchExtensionMissing, match="Extensions Manager"):
            bench.run(consent=lambda plan: pytest.fail("asked for what cannot be done"))

    def test_a_broken_package_is_installed_anew_alone(self, whole):
        (whole.site / "psutil" / "__init__.py").unlink()
        assert whole.run().state.isReady
        (line,) = whole.packages.log
        assert "--force-reinstall" in line and "--no-deps" in line and line.endswith("psutil>=5.9")

    def test_what_was_installed_but_does_not_import_is_no_success(self, bench, index, tmp_path):
        bad = tmp_path / "bad"
        shutil.copytree(index, bad)
        wheel(bad, "psutil", "8.0.0", "raise ImportError('DLL load failed while importing x')")
        bench.packages.index = bad
        with pytest.raises(PackageBroken, match="psutil.*DLL load failed.*Visual C"):
            bench.run()

    def test_steps_are_told_in_order(self, bench):
        steps = []
        plan = bench.setup.plan(bench.setup.examine())
        bench.setup.install(plan, lambda plan: True, steps.append)
        assert steps == [Step.TORCH, Step.PACKAGES, Step.VERIFY] and all(step.text for step in Step)

    def test_packages_that_this_process_holds_in_an_old_version_ask_for_a_restart(self, bench, monkeypatch):
        bench.put("torch==2.2.0", "psutil", "scikit-image")
        monkeypatch.setitem(sys.modules, "torch", sys)
        assert bench.run().restart == ("torch",)

    def test_small_and_large_torch_are_told_apart(self, bench):
        state = replace(bench.setup.examine(), hasGpu=True)
        large, small = bench.setup.plan(state), bench.setup.plan(state, cpuOnly=True)
        assert large.downloadMb > 2000 > 400 > small.downloadMb and "GB" in large.text()


class TestRepair:
    def damage_namespace(self, site: Path) -> None:
        """What WinError 206 leaves behind: folders without a program, no record."""
        shutil.rmtree(site / "torch")
        (site / "torch" / "lib").mkdir(parents=True)
        shutil.rmtree(next(site.glob("torch-*.dist-info")))

    def damage_record(self, site: Path) -> None:
        """Makes PyTorchUtils.torchInstalled() raise TypeError."""
        (next(site.glob("torch-*.dist-info")) / "RECORD").unlink()

    def damage_killed(self, site: Path) -> None:
        """pip was killed while it moved the old version aside."""
        (site / "torch").rename(site / "~orch")

    def damage_two(self, site: Path) -> None:
        shutil.copytree(next(site.glob("torch-*.dist-info")), site / "torch-2.6.0.dist-info")

    def damage_import(self, site: Path) -> None:
        (site / "torch" / "__init__.py").write_text("from torch import _C")

    @pytest.mark.parametrize("damage", ["namespace", "record", "killed", "two", "import"])
    def test_a_half_installed_torch_is_told_removed_and_installed_anew(self, whole, damage):
        getattr(self, f"damage_{damage}")(whole.site)
        state = whole.setup.examine()
        assert state.packages["torch"] in (PackageState.INCOMPLETE, PackageState.BROKEN)
        assert state.needsRepair and "Repair" in state.sentence() and state.torchReason
        plan = whole.setup.plan(state)
        assert plan.removals and "Removed first" in plan.text()
        outcome = whole.setup.install(plan, lambda plan: True)
        assert outcome.state.isReady
        assert not list(whole.site.glob("~*")) and not list(whole.site.glob(".lctfound*"))
        assert len(list(whole.site.glob("torch-*.dist-info"))) == 1

    def test_the_remains_are_seen_before_anything_is_imported(self, whole):
        self.damage_namespace(whole.site)
        assert whole.setup.environment.torchFiles().state is TorchState.INCOMPLETE
        assert whole.setup.state().packages["torch"] is PackageState.INCOMPLETE

    def test_what_slicers_own_check_stumbles_over_is_the_case_that_is_repaired(self, whole):
        """The failure of the field: metadata is there, its list of files is not."""
        self.damage_record(whole.site)
        code = "import importlib.metadata as m; [p for p in m.files('torch') if 'METADATA' in str(p)][0]"
        answer = subprocess.run([whole.setup.environment.executable, "-c", code], capture_output=True, text=True)
        assert "TypeError" in answer.stderr

    def test_without_consent_the_remains_stay(self, whole):
        self.damage_namespace(whole.site)
        before = snapshot(whole.site)
        with pytest.raises(ConsentDeclined):
            whole.run(consent=lambda plan: False)
        assert snapshot(whole.site) == before

    def test_leftovers_beside_a_whole_torch_do_no_harm(self, whole):
        """Windows leaves them when a loaded library was replaced; pip itself calls them safe."""
        (whole.site / "~orch").mkdir()
        assert whole.setup.examine().isReady

    def test_only_folders_of_site_packages_are_removed(self, tmp_path):
        site, other = tmp_path / "site", tmp_path / "precious"
        for folder in (site, other):
            (folder / "torch").mkdir(parents=True)
        for path in (other / "torch", site / "torch" / "lib", site):
            with pytest.raises(ValueError):
                removeFrom(site, [path])
        assert (other / "torch").is_dir() and (site / "torch").is_dir()

    def test_a_link_is_removed_not_followed(self, tmp_path):
        site, precious = tmp_path / "site", tmp_path / "precious"
        site.mkdir()
        precious.mkdir()
        (precious / "data").write_text("keep")
        (site / "torch").symlink_to(precious)
        removeFrom(site, [site / "torch"])
        assert not (site / "torch").exists() and (precious / "data").read_text() == "keep"

    def test_a_file_in_use_keeps_everything_and_the_install_goes_on_after_the_restart(self, whole, monkeypatch):
        self.damage_import(whole.site)
        before = snapshot(whole.site)
        move = os.replace

        def refuse(source, target):  # as Windows does with a loaded library
            if Path(source).name.endswith(".dist-info"):
                raise PermissionError(13, "Access is denied", str(source))
            move(source, target)

        monkeypatch.setattr(setup_code.os, "replace", refuse)
        with pytest.raises(FilesInUse, match="Restart Slicer.*Continue"):
            whole.run()
        assert snapshot(whole.site) == before
        monkeypatch.undo()
        assert whole.setup.pending().step is Step.REMOVE
        assert whole.run().state.isReady and whole.setup.pending() is None

    def test_the_empty_module_that_was_imported_is_forgotten(self, tmp_path, monkeypatch):
        (tmp_path / "lctfound_remains" / "inner").mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path))
        import lctfound_remains.inner  # noqa: F401

        (tmp_path / "lctfound_remains" / "__init__.py").write_text("value = 5")
        forgetBrokenModule("lctfound_remains")
        import lctfound_remains

        assert lctfound_remains.value == 5
        forgetBrokenModule("lctfound_remains")
        assert sys.modules["lctfound_remains"] is lctfound_remains, "a whole one is kept"


class TestResume:
    def test_an_install_that_was_killed_is_known_and_goes_on(self, bench):
        class Killed(BaseException):
            """Stands for the end of the process: nothing after it runs in the real case."""

        def die(versions, cpuOnly, constraints):
            raise Killed

        install, bench.torch.install = bench.torch.install, die
        with pytest.raises(Killed):
            bench.run(cpuOnly=True)
        pending = Setup(requirementsFile(), bench.setup._doors, bench.setup.environment).pending()
        assert pending == PendingInstall(Step.TORCH, "", True, pending.started) and pending.started
        bench.torch.install = install
        assert bench.run(cpuOnly=pending.cpuOnly).state.isReady
        assert bench.setup.pending() is None

    def test_an_install_that_failed_with_a_word_to_the_user_is_not_pending(self, bench, tmp_path):
        bench.torch.index = tmp_path
        with pytest.raises(SetupError):
            bench.run()
        assert bench.setup.pending() is None

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": "dance"}', None, 5])
    def test_damaged_settings_do_no_harm(self, bench, text):
        bench.settings.setValue("LCTfound/PendingInstall", text)
        assert bench.setup.pending() is None

    def test_it_can_be_forgotten(self, bench):
        bench.settings.setValue("LCTfound/PendingInstall", PendingInstall(Step.VERIFY).toText())
        assert bench.setup.pending() is not None
        bench.setup.forgetPending()
        assert bench.setup.pending() is None


class TestOffline:
    def test_all_comes_from_the_folder(self, bench, index):
        bench.torch.available = False
        outcome = bench.run(offlineFolder=index)
        assert outcome.state.isReady and not bench.torch.log
        assert all(f"--no-index --find-links {index}" in line for line in bench.packages.log)

    def test_the_question_says_that_nothing_is_downloaded(self, bench, index):
        plan = bench.setup.plan(bench.setup.examine(), offlineFolder=index)
        assert plan.downloadMb == 0 and "Nothing is downloaded" in plan.text()

    def test_all_that_is_missing_is_named_before_anything_happens(self, bench, index, tmp_path):
        folder = tmp_path / "wheels"
        shutil.copytree(index, folder)
        for name in ("networkx-3.6-py3-none-any.whl", "psutil-7.2.2-py3-none-any.whl"):
            (folder / name).unlink()
        before = snapshot(bench.site)
        with pytest.raises(WheelsMissing) as caught:
            bench.run(offlineFolder=folder, consent=lambda plan: pytest.fail("asked too early"))
        assert "psutil>=5.9" in str(caught.value) and "networkx>=3.0 (for scikit-image" in str(caught.value)
        assert "numpy" not in str(caught.value), "Slicer has it"
        assert snapshot(bench.site) == before

    def test_damaged_and_foreign_wheels_count_as_missing(self, tmp_path):
        (tmp_path / "psutil-7.2.2-py3-none-any.whl").write_bytes(b"PK\x03\x04 cut off")
        (tmp_path / "torch-2.13.0-cp39-cp39-win_arm64.whl").write_bytes(b"")
        (tmp_path / "no wheel name.whl").write_bytes(b"")
        missing = missingWheels(tmp_path, ["psutil>=5.9", "torch>=2.6"], {})
        assert "damaged" in missing[0] and missing[1].startswith("torch>=2.6")

    def test_extras_and_markers_count(self, tmp_path):
        wheel(tmp_path, "a", "1", needs=["b[fast]>=1", 'never; sys_platform == "amiga"'])
        wheel(tmp_path, "b", "2", needs=['c; extra == "fast"', 'd; extra == "slow"', "a"])
        (missing,) = missingWheels(tmp_path, ["a"], {})
        assert missing.startswith("c")

    def test_a_folder_that_is_not_there_is_told(self, bench, tmp_path):
        with pytest.raises(WheelsMissing, match="There is no folder"):
            bench.run(offlineFolder=tmp_path / "none")


class TestBeforeTheDownload:
    def test_a_full_disk_is_told(self, bench):
        bench.setup._doors = replace(bench.setup._doors, freeDisk=lambda folder: 500_000_000)
        with pytest.raises(DiskTooSmall, match="free some space"):
            bench.run()
        assert not bench.torch.log and bench.setup.examine().light is Light.PROBLEM

    @pytest.mark.parametrize(
        ("letters", "problem", "limit"),
        [(85, False, ""), (86, False, "!=2.13.*"), (131, False, "!=2.13.*"), (132, True, "!=2.13.*")],
    )
    def test_windows_paths(self, bench, letters, problem, limit):
        """C:/Users/.../3D Slicer 5.12.2/lib/Python/Lib/site-packages of a usual install has 94 letters."""
        site = _FakeWindowsPath("C:/" + "x" * (letters - 3))
        environment = replace(bench.setup.environment, system=System.WINDOWS, sitePackages=site)
        assert torchLimit(environment) == limit
        assert (checkPath(environment, False).light is Light.PROBLEM) is problem
        assert checkPath(environment, True).light is Light.GOOD, "what is installed need not fit any more"

    def test_a_long_windows_path_asks_for_a_torch_with_shorter_paths(self, bench):
        site = _FakeWindowsPath("C:/" + "x" * 97)
        plan_ = bench.with_(system=System.WINDOWS, sitePackages=site).setup.plan(bench.setup.state())
        assert "2.13.0" not in Requirement(plan_.torch.requirement).specifier

    def test_a_windows_path_with_other_letters_is_refused(self, bench):
        bench.with_(system=System.WINDOWS, sitePackages=_FakeWindowsPath("C:/Users/Jürgen/Slicer"))
        with pytest.raises(PathUnsuitable, match="English letters"):
            bench.setup.install(bench.setup.plan(bench.setup.state()), lambda plan: pytest.fail("asked"))

    def test_an_intel_mac_is_told_that_there_is_no_torch(self, bench):
        bench.with_(system=System.MACOS, machine="x86_64")
        with pytest.raises(SystemUnsuitable, match="Apple silicon"):
            bench.run()

    def test_an_old_slicer_is_told(self, bench):
        with pytest.raises(SystemUnsuitable, match="5.12"):
            bench.with_(pythonVersion=(3, 9)).run()


class _FakeWindowsPath(type(Path())):
    """A path of this system under a Windows name; nothing is there."""


class TestGpu:
    def report(self, driver="580.65", **torch) -> ProbeReport:
        facts = {"cuda": "13.0", "cudaUsable": True, "architectures": ["sm_80", "sm_90"], "capability": [9, 0], **torch}
        return ProbeReport({"torch": ImportResult("2.13")}, "", facts, (Gpu("NVIDIA H100", driver, 80.0),))

    def test_a_used_gpu_is_good(self):
        check = checkGpu(self.report())
        assert check.light is Light.GOOD and "H100, 80 GB, driver 580.65" in check.finding

    @pytest.mark.parametrize(
        ("facts", "remedy"),
        [
            ({"cuda": ""}, "CPU only"),
            ({"driver": "535.104", "cudaUsable": False}, "driver 580 or later"),
            ({"cudaUsable": False}, "no usable GPU"),
            ({"capability": [12, 0]}, "not built for this GPU"),
        ],
    )
    def test_why_it_is_not_used_is_told_with_the_remedy(self, facts, remedy):
        check = checkGpu(self.report(**facts))
        assert check.light is Light.WARNING and remedy in check.remedy

    def test_a_newer_card_of_the_same_generation_and_code_compiled_at_start_will_do(self):
        assert checkGpu(self.report(capability=[8, 9])).light is Light.GOOD
        assert checkGpu(self.report(capability=[12, 0], architectures=["sm_120a"])).light is Light.GOOD
        assert checkGpu(self.report(capability=[15, 0], architectures=["sm_90", "compute_90"])).light is Light.GOOD

    def test_no_gpu_is_no_fault(self):
        assert checkGpu(ProbeReport()).light is Light.GOOD

    def test_the_drivers_words_are_read(self):
        text = "NVIDIA H100 80GB HBM3, 580.65.06, 81559\nNVIDIA-SMI has failed, because\nx, y, [N/A]\n"
        assert parseGpus(text) == [["NVIDIA H100 80GB HBM3", "580.65.06", 81559]]


class TestLog:
    @pytest.mark.parametrize(
        ("log", "kind", "remedy"),
        [
            ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", NetworkBlocked, "PIP_CERT"),
            ("ProxyError('Cannot connect to proxy.', OSError('407 Proxy Auth", NetworkBlocked, "HTTPS_PROXY"),
            ("NewConnectionError: [Errno -3] Temporary failure in name resolution", NetworkBlocked, "Offline install"),
            ("OSError: [Errno 28] No space left on device", DiskTooSmall, "free some space"),
            ("OSError: [WinError 206] The filename or extension is too long: 'C:\\", PathUnsuitable, "short folder"),
            ("PermissionError: [WinError 5] Access is denied: 'c:\\torch\\lib\\asmjit.dll'", FilesInUse, "restart"),
            ("ERROR: ResolutionImpossible: for help visit", VersionConflict, "another extension"),
            ("ERROR: No matching distribution found for torch>=2.6", VersionConflict, "newest version"),
            ("Collecting x\nERROR: something nobody knows\n\n", InstallFailed, "something nobody knows"),
            ("", InstallFailed, "no reason"),
        ],
    )
    def test_pips_words_become_a_sentence_with_the_remedy(self, log, kind, remedy):
        error = errorFromLog(log)
        assert type(error) is kind and remedy in str(error) and error.log == log and str(error).endswith(".")

    def ask(self, bench, *options: str) -> None:
        """Real pip, asked for a package at an address of this machine where no index is."""
        quick = ["--isolated", "--no-cache-dir", "--retries", "1", "--timeout", "2"]
        pip(bench.torch.python, [*quick, *options, "lctfound-nothing"], {"NO_PROXY": "", "no_proxy": ""})

    def test_a_real_unreachable_index(self, bench):
        with pytest.raises(NetworkBlocked, match="cannot be reached"):
            self.ask(bench, "--index-url", "https://127.0.0.1:9/simple")

    def test_a_real_proxy_that_wants_a_password(self, bench):
        class Proxy(BaseHTTPRequestHandler):
            def do_CONNECT(self):
                self.send_error(407, "Proxy Authentication Required")

            def log_message(self, *arguments):
                pass

        server = HTTPServer(("127.0.0.1", 0), Proxy)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(NetworkBlocked, match="proxy refused.*HTTPS_PROXY"):
                address = f"http://127.0.0.1:{server.server_port}"
                self.ask(bench, "--index-url", "https://index.invalid/simple", "--proxy", address)
        finally:
            server.shutdown()
            server.server_close()


class TestRequirements:
    #: Slicer has a VTK of its own; the foundation model's tasks, which need diffusers, have no panel yet.
    NOT_FOR_SLICER = ("vtk", "diffusers")

    def test_they_agree_with_the_engines(self):
        """Two lists of the same: pyproject.toml for pip, requirements.txt for Slicer."""
        import tomllib

        project = tomllib.loads((_LCTFOUND.parent / "pyproject.toml").read_text("utf-8"))["project"]
        engine = {r.name.lower(): str(r.specifier) for r in map(Requirement, project["dependencies"])}
        ours = {r.name.lower(): str(r.specifier) for r in loadRequirements(requirementsFile())}
        for name in self.NOT_FOR_SLICER:
            engine.pop(name, None)
        assert {name: ours.get(name) for name in engine} == engine

    def test_they_pin_nothing_and_slicers_own_are_known(self):
        ours = loadRequirements(requirementsFile())
        assert all(spec.operator == ">=" for requirement in ours for spec in requirement.specifier)
        assert BUNDLED < {requirement.name.lower() for requirement in ours}

    def test_pins_leave_out_what_changes(self, bench):
        plan = bench.setup.plan(bench.setup.examine())
        changing = {"torch": "2.2", "triton": "3", "nvidia-nccl-cu13": "2", "psutil": "5"}
        assert constraintLines({"numpy": "2.4.6", "vtk": "9", **changing}, plan) == ["numpy==2.4.6", "vtk==9"]

    def test_memory_is_known_without_psutil(self):
        psutil = pytest.importorskip("psutil")
        assert totalMemory() == psutil.virtual_memory().total


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("LCTFOUND_LONG_TESTS"), reason="installs for a minute; set LCTFOUND_LONG_TESTS=1 to run it"
)
def test_the_real_packages_install_and_the_engine_imports(tmp_path):
    """The list of requirements is complete: all modules of the engine import with nothing but it and Slicer's own.

    torch is taken in the version that runs this test: its newest build with CUDA would take 6 GB.
    """
    running = importlib.metadata.version("torch")
    venv = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    python = venv / "bin" / "python"
    try:
        pip(python, [str(r) for r in loadRequirements(requirementsFile()) if r.name.lower() in BUNDLED] + ["vtk>=9.3"])
    except NetworkBlocked as error:
        pytest.skip(f"no package index: {error}")
    bench = bench_on(python, None, requirementsFile())
    bench.torch.install = lambda versions, cpuOnly, constraints: bench.torch.pip(["torch==" + running], constraints)
    outcome = bench.run(cpuOnly=True)
    assert outcome.state.isReady and outcome.replaced == {}
    assert any(what == "Device used" for what, value in outcome.state.hardware)
    modules = [
        ".".join(path.relative_to(_LCTFOUND.parent).with_suffix("").parts)
        for path in (_LCTFOUND.parent / "LCTfoundLib").rglob("*.py")
        if path.name != "__main__.py"
    ]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    answer = subprocess.run([python, "-c", code], cwd=_LCTFOUND.parent, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    shutil.rmtree(venv)


def test_slicers_console_python_runs_the_worker_where_there_is_one(monkeypatch, tmp_path):
    assert environment_code.workerPython() == sys.executable
    program = tmp_path / "PythonSlicer"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment_code.workerPython() == str(program)
