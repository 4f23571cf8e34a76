"""The build files name every file, and say what the extensions index asks for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from Testing.extension.extension_build import (
    MODULES,
    PACKAGES,
    REPOSITORY,
    Built,
    cmake_program,
    configure,
    files_below,
    source_files,
)

ROOT_FILE = (REPOSITORY / "CMakeLists.txt").read_text(encoding="utf-8")
INDEX_ENTRY = REPOSITORY / "Resources" / "ExtensionsIndex" / "LCTfound.json"
WEIGHTS = REPOSITORY / "Resources" / "Weights"
_RAW = "https://raw.githubusercontent.com/LCTfound/SlicerLCTfound/main/"
_TEXT = {".py", ".ui", ".svg", ".txt", ".json", ".cmake", ".md"}
#: As the extensions index reads a value: one line, in quotes.
_SETTING = r'^set\(EXTENSION_{}\s+"([^"\n]+)"\)$'


def _setting(name: str) -> str:
    found = re.findall(_SETTING.format(name), ROOT_FILE, re.MULTILINE)
    assert len(found) == 1, f"EXTENSION_{name} must be set once, in quotes, on one line"
    assert "$" not in found[0], f"EXTENSION_{name} must not need a variable"
    return found[0]


# -- every file is listed --------------------------------------------------------------------------------------------


def test_every_file_of_a_package_is_installed(built: Built) -> None:
    for package in PACKAGES:
        expected = source_files(package)
        if package.name == "LCTfoundLib":
            expected |= {f"Resources/Weights/{name}" for name in source_files(WEIGHTS)}
        for place in (built.modules, built.modules_when_built):
            assert files_below(place / package.name) == expected, f"compare the list in {package.name}/CMakeLists.txt"


def test_every_file_of_a_module_is_installed(built: Built) -> None:
    packages = {package.name for package in PACKAGES}
    expected = set().union(*(source_files(module) for module in MODULES))
    assert len(expected) == sum(len(source_files(module)) for module in MODULES), "modules share one folder in Slicer"
    for place in (built.modules, built.modules_when_built):
        found = {name for name in files_below(place) if name.split("/")[0] not in packages}
        assert found == expected, "compare the lists in LCTfound/*/CMakeLists.txt"


def test_slicer_meets_no_other_module_file(built: Built) -> None:
    """Slicer tries each Python file of the folder as a module."""
    assert {path.stem for path in built.modules.glob("*.py")} == {module.name for module in MODULES}
    for module in MODULES:
        assert (built.modules / "Resources" / "Icons" / f"{module.name}.svg").is_file()
        assert (built.modules / "Resources" / "UI" / f"{module.name}.ui").is_file()


def test_every_folder_with_a_build_file_belongs_to_the_extension() -> None:
    named = set(re.findall(r"^add_subdirectory\(([^)]+)\)$", ROOT_FILE, re.MULTILINE))
    assert named == {folder.relative_to(REPOSITORY).as_posix() for folder in (*PACKAGES, *MODULES)}
    python = {path.parent for path in (REPOSITORY / "LCTfound").glob("*/*.py")}
    assert python <= {*PACKAGES, *MODULES}, "a folder of Python files without a build file"


def test_a_listed_file_that_is_missing_stops_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "there.py").touch()
    for listed, passes in (("there.py", True), ("there.py gone.py", False)):
        (tmp_path / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.28)\nproject(X)\nfind_package(Slicer REQUIRED)\n"
            f"include(${{Slicer_USE_FILE}})\nslicerMacroBuildScriptedModule(NAME X SCRIPTS {listed})\n"
        )
        result = configure(tmp_path, tmp_path / "build")
        assert (result.returncode == 0) is passes, result.stderr
        assert passes or "gone.py" in result.stderr


def test_slicer_runs_the_test_of_each_module_with_and_without_a_window(built: Built) -> None:
    ctest = str(Path(cmake_program()).with_name("ctest"))
    listing = subprocess.run([ctest, "-N"], cwd=built.build, capture_output=True, text=True, timeout=60, check=True)
    found = set(re.findall(r"Test +#\d+: (\S+)", listing.stdout))
    expected = {f"py_{module.name}" for module in MODULES}
    assert found == expected | {f"py_nomainwindow_qSlicer{module.name}ModuleGenericTest" for module in MODULES}


# -- weights ---------------------------------------------------------------------------------------------------------


#: Bytes that a weight may have, so that the repository with its history stays small.
BUDGETS = {
    "backbone_student": 16e6, "low_dose": 4e6, "lung_coarse": 8e6, "lung_fine": 12e6, "sparse_view": 8e6,
}  # fmt: skip


def test_weights_are_installed_whole_and_small_enough_for_git(built: Built) -> None:
    weights = sorted(WEIGHTS.glob("*.safetensors"))
    assert {weight.stem for weight in weights} == BUDGETS.keys()
    for weight in weights:
        assert weight.stat().st_size <= BUDGETS[weight.stem], weight.name
        for path in (weight, weight.with_suffix(".json")):
            assert (built.modules / "LCTfoundLib/Resources/Weights" / path.name).read_bytes() == path.read_bytes()


# -- what the extensions index reads ---------------------------------------------------------------------------------


def test_the_index_finds_the_name_and_what_it_depends_on() -> None:
    assert re.findall(r"project\s*\(\s*([^\s)]+)", ROOT_FILE, re.IGNORECASE)[0] == INDEX_ENTRY.stem
    entry = json.loads(INDEX_ENTRY.read_text(encoding="utf-8"))
    assert entry["build_dependencies"] == _setting("DEPENDS").split() == ["PyTorch"]
    assert entry["scm_url"] == _setting("HOMEPAGE")
    assert re.search(r"^cmake_minimum_required\(VERSION 3\.28\.0\.\.\.3\.28\.0 FATAL_ERROR\)$", ROOT_FILE, re.MULTILINE)


def test_the_index_entry_is_valid() -> None:
    text = INDEX_ENTRY.read_bytes()
    assert b"\r" not in text and text.endswith(b"}\n")
    entry = json.loads(text)
    optional = {"scm_revision", "scm_type", "build_dependencies", "dicom_support_rule", "build_subdirectory", "enabled"}
    assert {"$schema", "category", "scm_url"} <= set(entry) <= {"$schema", "category", "scm_url", "tier", *optional}
    assert re.fullmatch(r"https://raw\.githubusercontent\.com/Slicer/.*-entry-schema-v1\.0\.2\.json#", entry["$schema"])
    assert entry["category"] == "Segmentation"
    assert entry["scm_url"].rsplit("/", 1)[1] == "SlicerLCTfound", "a repository's name begins with Slicer"
    assert entry["tier"] in (1, 3, 5)


def test_the_description_is_one_or_two_sentences() -> None:
    description = _setting("DESCRIPTION")
    assert 1 <= len(re.findall(r"[.](?: |$)", description)) <= 2 and len(description) < 300
    assert "not a medical device" in description
    assert _setting("CONTRIBUTORS")


def test_pictures_that_the_index_shows_are_pictures_of_this_repository() -> None:
    icon, pictures = _setting("ICONURL"), _setting("SCREENSHOTURLS").split()
    assert pictures
    for url in (icon, *pictures):
        assert url.startswith(_RAW)
        with Image.open(REPOSITORY / url.removeprefix(_RAW)) as image:
            assert image.format in ("PNG", "JPEG"), "the index refuses SVG"
            assert image.size == (128, 128) if url == icon else min(image.size) >= 400


def test_a_license_and_a_readme_lie_where_the_packager_looks() -> None:
    assert (REPOSITORY / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert "LCTfound" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


# -- files -----------------------------------------------------------------------------------------------------------


def _extension_files() -> list[Path]:
    folders = [folder / name for folder in (*PACKAGES, *MODULES) for name in source_files(folder)]
    builds = [folder / "CMakeLists.txt" for folder in (REPOSITORY, *PACKAGES, *MODULES)]
    return [path for path in (*folders, *builds, INDEX_ENTRY) if path.suffix in _TEXT]


def test_text_files_end_their_lines_the_same_way_everywhere() -> None:
    for path in _extension_files():
        content = path.read_bytes()
        assert b"\r" not in content, path
        content.decode("utf-8")


def test_icons_are_square_and_use_only_what_slicer_draws() -> None:
    """Qt 5 draws SVG Tiny 1.2: no clipping, filters, masks or style sheets."""
    drawn = {"svg", "title", "g", "path", "rect", "circle"}
    for module in MODULES:
        root = ElementTree.parse(module / "Resources" / "Icons" / f"{module.name}.svg").getroot()
        assert root.get("width") == root.get("height") and root.get("viewBox")
        names = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
        assert names <= drawn, names - drawn


def test_icons_show_segments_in_their_colors() -> None:
    from LCTfoundLib.anatomy.structures import STRUCTURES

    colors = {"#{:02x}{:02x}{:02x}".format(*structure.color): structure.key for structure in STRUCTURES}
    for module in MODULES:
        text = (module / "Resources" / "Icons" / f"{module.name}.svg").read_text(encoding="utf-8")
        shown = {colors[color] for color in re.findall(r"#[0-9a-f]{6}", text) if color in colors}
        assert {"airway", "left_s03", "left_s05"} <= shown


def test_the_index_icon_is_the_picture_of_the_home_module() -> None:
    """Colors of the SVG at places of the PNG, so that a change of one is not forgotten in the other."""
    text = (REPOSITORY / "LCTfound/LCTfound/Resources/Icons/LCTfound.svg").read_text(encoding="utf-8")
    with Image.open(REPOSITORY / "Resources" / "Icons" / "LCTfound.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in set(re.findall(r'fill="#([0-9a-f]{6})"', text)):
        same = (pixels == list(bytes.fromhex(color))).all(axis=1).sum()
        assert same > 30, color


@pytest.mark.parametrize("module", MODULES, ids=lambda folder: folder.name)
def test_panels_are_well_formed(module: Path) -> None:
    root = ElementTree.parse(module / "Resources" / "UI" / f"{module.name}.ui").getroot()
    top = root.find("widget")
    assert top is not None and top.get("class") == "qMRMLWidget"
    declared = {entry.findtext("class") for entry in root.iter("customwidget")}
    used = {widget.get("class", "") for widget in root.iter("widget")}
    assert {name for name in used if name.startswith(("qMRML", "ctk", "qSlicer"))} <= declared
