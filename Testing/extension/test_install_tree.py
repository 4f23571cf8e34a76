"""The install tree alone, as Slicer lays it out: it imports, its worker starts, its weights are found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from Testing.extension.extension_build import MODULES, REPOSITORY, Built

_WORKER_SECONDS = 120


@dataclass(frozen=True)
class Elsewhere:
    """A Python that has this one's packages but not the repository, in a folder of its own."""

    python: Path
    folder: Path

    def run(self, script: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script without the source checkout, the user's weights or PYTHONPATH."""
        file = self.folder / "script.py"
        file.write_text(script, encoding="utf-8")
        # -I leaves out the script's folder, the user's packages and all PYTHON* variables.
        command = [str(self.python), "-I", str(file), *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=self._environment() | variables, capture_output=True, text=True, timeout=240
        )

    def answer(self, script: str, *arguments: str | Path, **variables: str) -> Any:
        """What a script prints as JSON on its last line."""
        result = self.run(script, *arguments, **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    def _environment(self) -> dict[str, str]:
        home = {name: str(self.folder) for name in ("HOME", "LOCALAPPDATA", "XDG_DATA_HOME", "XDG_CACHE_HOME")}
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LCTFOUND"))}
        return kept | home


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    windows = os.name == "nt"
    python = environment / ("Scripts/python.exe" if windows else "bin/python")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / ("Lib/site-packages" if windows else f"lib/{version}/site-packages")
    # A path line brings the packages, but not the .pth files among them, such as that of an editable install.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "packages.pth").write_text("\n".join(sorted(paths)) + "\n", encoding="utf-8")
    found = Elsewhere(python, folder)
    lost = found.run("import LCTfoundLib")
    assert "ModuleNotFoundError" in lost.stderr, "the source checkout must be out of reach"
    return found


_IMPORT_ALL = """
import importlib, json, pkgutil, sys
from pathlib import Path

root = sys.argv[1]
sys.path.insert(0, root)
ours, without_slicer, missing = {}, [], {}
for package in ("LCTfoundLib", "LCTfoundSlicer"):
    names = [package, *(m.name for m in pkgutil.walk_packages([f"{root}/{package}"], f"{package}."))]
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
            without_slicer.append(name)
        except ModuleNotFoundError as error:
            missing[name] = error.name.split(".")[0]
for name, module in sys.modules.items():
    if name.split(".")[0] in ("LCTfoundLib", "LCTfoundSlicer"):
        ours[name] = module.__file__
print(json.dumps({"files": ours, "imported": without_slicer, "missing": missing, "path": sys.path}))
"""


def test_the_packages_import_from_the_install_tree_alone(built: Built, elsewhere: Elsewhere) -> None:
    found = elsewhere.answer(_IMPORT_ALL, built.modules)
    assert str(REPOSITORY) not in found["path"]
    assert all(Path(file).is_relative_to(built.modules) for file in found["files"].values())
    engine = {path for path in (built.modules / "LCTfoundLib").rglob("*.py") if path.name != "__main__.py"}
    assert sum(name.startswith("LCTfoundLib") for name in found["imported"]) == len(engine)
    assert {"LCTfoundSlicer", "LCTfoundSlicer.jobs", "LCTfoundSlicer.setup"} <= set(found["imported"])
    # What else could not be imported needs Slicer itself, and nothing of ours.
    assert set(found["missing"].values()) <= {"slicer", "qt", "ctk"}, found["missing"]


_DOCTOR = """
import json, sys, time

sys.path.insert(0, sys.argv[1])
from LCTfoundSlicer.jobs import JobRunner

runner = JobRunner()
try:
    runner.warmUp()
    job = runner.submit("doctor", {"folder": sys.argv[2]})
    runner.wait(job, float(sys.argv[3]))
    end = time.monotonic() + float(sys.argv[3])
    while not runner.isWarm and time.monotonic() < end:
        runner.poll()
        time.sleep(0.02)
    print(json.dumps({
        "state": job.state.value, "error": str(job.error), "checks": (job.result or {}).get("checks"),
        "pid": runner.workerPid, "device": runner.device,
    }))
finally:
    runner.shutdown()
"""


def test_the_worker_of_the_install_tree_gets_warm_and_finds_the_weights_there(
    built: Built, elsewhere: Elsewhere
) -> None:
    found = elsewhere.answer(_DOCTOR, built.modules, elsewhere.folder, str(_WORKER_SECONDS))
    assert found["state"] == "done", found["error"]
    assert found["pid"] and found["device"]["device"], "it says hello, and ready"
    weights = {check["what"]: check for check in found["checks"] if check["what"].startswith("Weight ")}
    assert set(weights) == {f"Weight {path.stem}" for path in (REPOSITORY / "Resources/Weights").glob("*.safetensors")}
    for check in weights.values():
        assert check["verdict"] == "ok"
        assert str(built.modules / "LCTfoundLib" / "Resources" / "Weights") in check["value"]


def test_the_set_up_finds_its_requirements_in_the_install_tree(built: Built, elsewhere: Elsewhere) -> None:
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
from LCTfoundSlicer.setup import requirementsFile
print(json.dumps(str(requirementsFile())))
"""
    assert Path(elsewhere.answer(script, built.modules)) == built.modules / "Resources" / "requirements.txt"


_LOAD_MODULES = """
import json, sys

modules, testing, names = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.path.append(testing)  # the host, beside which there is no engine
from host.application import Host

host = Host()
found = {}
for name in names:
    module = host.load_module(f"{modules}/{name}.py")
    panel = module.widgetRepresentation().self()
    shown = {"title": module.title, "help": module.helpText, "icon": not module.icon.isNull(), "panel": bool(panel)}
    found[name] = shown
ours = {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0].startswith("LCTfound")}
host.close()
print(json.dumps({"modules": found, "files": ours}))
"""


def test_the_modules_load_from_the_install_tree_without_a_main_window(built: Built, elsewhere: Elsewhere) -> None:
    missing = [name for name in ("slicer_core", "PySide6") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install -e '.[host]'")
    names = [module.name for module in MODULES]
    found = elsewhere.answer(_LOAD_MODULES, built.modules, REPOSITORY / "Testing", *names, QT_QPA_PLATFORM="offscreen")
    assert set(found["modules"]) == set(names)
    for name, module in found["modules"].items():
        assert module["title"] and module["help"] and module["icon"] and module["panel"], name
    assert all(Path(file).is_relative_to(built.modules) for file in found["files"].values()), found["files"]
