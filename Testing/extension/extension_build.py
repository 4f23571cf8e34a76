"""The extension as CMake builds and installs it, and the sources it is made from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).resolve().parent / "cmake"
MODULES_FOLDER = Path("lib/Slicer-5.12/qt-scripted-modules")

#: Folders that become packages beside the modules.
PACKAGES = (REPOSITORY / "LCTfoundLib", REPOSITORY / "LCTfound" / "LCTfoundSlicer")
#: Folders of modules: the file of a folder's name is the module.
MODULES = tuple(
    folder
    for folder in sorted((REPOSITORY / "LCTfound").iterdir())
    if folder not in PACKAGES and (folder / "CMakeLists.txt").is_file()
)

#: The oldest CMake that the extension may be configured with.
_OLDEST = (3, 28)
_SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Built:
    """Folders of scripted modules: in the build tree and in the install tree."""

    build: Path
    modules_when_built: Path
    modules: Path


def cmake_program() -> str:
    """CMake, or a skipped test."""
    for program in (shutil.which("cmake", path=str(_SCRIPTS)), shutil.which("cmake")):
        if program and _version(program) >= _OLDEST:
            return program
    pytest.skip("CMake 3.28 or later is not installed (pip install cmake ninja)")


def configure(source: Path, build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configure against the stand-in of Slicer. No compiler is needed: scripted modules have nothing to compile."""
    cmake = cmake_program()
    ninja = shutil.which("ninja", path=str(_SCRIPTS)) or shutil.which("ninja")
    if ninja is None:
        pytest.skip("Ninja is not installed (pip install cmake ninja)")
    compilers = [f"-DCMAKE_{language}_COMPILER={cmake}" for language in ("C", "CXX")]
    forced = [f"-DCMAKE_{language}_COMPILER_FORCED=ON" for language in ("C", "CXX")]
    command = [cmake, "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *compilers, *forced]
    return _run([*map(str, command), f"-DSlicer_DIR={STAND_IN}", *options])


def build_and_install(folder: Path) -> Built:
    """Configure, build and install this repository; names with blanks, as a user's folders have."""
    build, prefix = folder / "build tree", folder / "Slicer 5.12" / "LCTfound"
    steps = (
        configure(REPOSITORY, build, "-DBUILD_TESTING=ON", f"-DCMAKE_INSTALL_PREFIX={prefix}"),
        _run([cmake_program(), "--build", str(build)]),
        _run([cmake_program(), "--install", str(build), "--component", "RuntimeLibraries"]),
    )
    for step in steps:
        assert step.returncode == 0, step.stdout + step.stderr
    return Built(build, build / MODULES_FOLDER, prefix / MODULES_FOLDER)


def source_files(folder: Path) -> set[str]:
    """All files of a module's or package's folder, as paths below it, but for the build file."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "CMakeLists.txt" and not _is_cache(path.relative_to(folder))
    }


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _is_cache(path: Path) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts)


def _version(program: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", _run([program, "--version"]).stdout)
    return tuple(map(int, found.groups())) if found else (0,)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
