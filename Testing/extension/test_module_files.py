"""What Slicer and the extensions index ask of module files, read from their source."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from Testing.extension.extension_build import MODULES, PACKAGES, REPOSITORY

ENGINE, SHARED = PACKAGES
_SLICER = {"slicer", "qt", "ctk", "vtk", "numpy", "scipy", "SimpleITK"}
#: Bundled with Slicer 5.12 beside those.
_BUNDLED = {"packaging", "pydicom", "PIL", "requests"}
_OURS = {"LCTfoundLib", "LCTfoundSlicer"}
#: Not in Slicer until the set-up has brought them, or too heavy for its process.
_WORKER_ONLY = {"torch", "torchvision", "safetensors", "skimage", "psutil", "monai", "numba", "diffusers"}

_MODULE_FILES = [module / f"{module.name}.py" for module in MODULES]
_SLICER_FACING = [*_MODULE_FILES, *sorted(SHARED.rglob("*.py"))]
#: Runs in the worker's Python, where it looks whether the packages work.
_RUNS_IN_THE_WORKER = {SHARED / "probe.py"}


def _name(path: Path) -> str:
    return path.stem


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# -- imports ---------------------------------------------------------------------------------------------------------


def _at_file_scope(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the file is imported, but for those for type checkers."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        statement = todo.pop(0)
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            todo += [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]
            todo += [line for handler in getattr(statement, "handlers", []) for line in handler.body]


def _imported(statements: Iterator[ast.AST]) -> set[str]:
    """Dotted names of imported modules; ``from a import b`` gives both a and a.b, of which b may be a module."""
    names: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, "imports are absolute"
            names.add(str(statement.module))
            names |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return names


def _roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def _file_of(name: str) -> Path | None:
    """The file of one of our modules."""
    base = {"LCTfoundLib": REPOSITORY, "LCTfoundSlicer": REPOSITORY / "LCTfound"}.get(name.split(".")[0])
    if base is None:
        return None
    path = base.joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _reached(names: set[str], everywhere: bool = False) -> dict[str, str]:
    """Third-party packages that importing brings in, through our own files too, and the file that asks for each.

    ``everywhere``: also what functions import when they are called.
    """
    found: dict[str, str] = {}
    todo = {name.rsplit(".", n)[0] for name in names for n in range(name.count(".") + 1)}
    seen: set[Path] = set()
    while todo:
        file = _file_of(todo.pop())
        if file is None or file in seen:
            continue
        seen.add(file)
        tree = _tree(file)
        inner = _imported(ast.walk(tree) if everywhere else _at_file_scope(tree))
        found |= {root: file.relative_to(REPOSITORY).as_posix() for root in _roots(inner) - _OURS}
        todo |= {name.rsplit(".", n)[0] for name in inner for n in range(name.count(".") + 1)}
    return found


@pytest.mark.parametrize("path", _MODULE_FILES, ids=_name)
def test_module_files_import_at_file_scope_what_slicer_has(path: Path) -> None:
    """Nothing of ours either: its place may not be on the path yet."""
    assert _roots(_imported(_at_file_scope(_tree(path)))) <= _SLICER


@pytest.mark.parametrize("path", _SLICER_FACING, ids=_name)
def test_importing_for_a_panel_needs_nothing_that_slicer_lacks(path: Path) -> None:
    reached = _reached(_imported(_at_file_scope(_tree(path))))
    assert set(reached) <= _SLICER | _BUNDLED, reached


@pytest.mark.parametrize("path", sorted(set(_SLICER_FACING) - _RUNS_IN_THE_WORKER), ids=_name)
def test_panels_never_bring_the_network_libraries_into_slicer(path: Path) -> None:
    """Also not by an import within a function."""
    everywhere = _imported(ast.walk(_tree(path)))
    assert not _roots(everywhere) & _WORKER_ONLY
    reached = _reached(everywhere)
    assert not set(reached) & _WORKER_ONLY, reached


@pytest.mark.parametrize("path", _MODULE_FILES, ids=_name)
def test_module_files_do_nothing_when_they_are_imported(path: Path) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    for statement in _tree(path).body[1:]:  # the first is the docstring
        assert isinstance(statement, allowed), f"line {statement.lineno}: {ast.unparse(statement)[:60]}"


def test_only_the_set_up_installs_and_only_by_the_doors_of_slicer() -> None:
    doors = SHARED / "slicer_doors.py"
    for path in _SLICER_FACING:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"urlretrieve|urlopen|os\.system\(|shell=True|slicer\.util\.pip_", text), path.name
        assert path == doors or not re.search(r"packaging\.pip_|PyTorchUtilsLogic", text), path.name


# -- what a module says of itself ------------------------------------------------------------------------------------


def _class(path: Path, name: str) -> ast.ClassDef:
    found = [node for node in _tree(path).body if isinstance(node, ast.ClassDef) and node.name == name]
    assert found, f"{path.name} has no class {name}"
    return found[0]


def _said(path: Path) -> dict[str, ast.expr]:
    """What the module class tells its parent: attribute -> value."""
    said = {}
    for node in ast.walk(_class(path, path.stem)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            if ast.unparse(node.targets[0].value) in ("parent", "self.parent"):
                said[node.targets[0].attr] = node.value
    return said


@pytest.mark.parametrize("path", _MODULE_FILES, ids=_name)
def test_a_module_has_the_classes_that_slicer_looks_for(path: Path) -> None:
    for suffix, base in (("", ""), ("Widget", "Widget"), ("Logic", "Logic"), ("Test", "Test")):
        bases = [ast.unparse(base) for base in _class(path, path.stem + suffix).bases]
        assert f"ScriptedLoadableModule{base}" in bases
    methods = [node.name for node in _class(path, f"{path.stem}Test").body if isinstance(node, ast.FunctionDef)]
    assert "runTest" in methods and any(name.startswith("test_") for name in methods)


@pytest.mark.parametrize("path", _MODULE_FILES, ids=_name)
def test_each_test_of_a_module_is_run(path: Path) -> None:
    test = _class(path, f"{path.stem}Test")
    methods = {node.name: node for node in test.body if isinstance(node, ast.FunctionDef)}
    run = {node.attr for node in ast.walk(methods["runTest"]) if isinstance(node, ast.Attribute)}
    listed = "getattr" in ast.unparse(methods["runTest"])  # by name, so all of them
    assert listed or {name for name in methods if name.startswith("test_")} <= run


@pytest.mark.parametrize("path", _MODULE_FILES, ids=_name)
def test_a_module_says_what_it_is_for_who_made_it_and_where_it_belongs(path: Path) -> None:
    said = _said(path)
    texts = {key: ast.unparse(said[key]) for key in said}
    assert {"title", "categories", "dependencies", "contributors", "helpText", "acknowledgementText"} <= set(said)
    categories = r"translate\('qSlicerAbstractCoreModule', '(Segmentation|Filtering)'\)"
    assert re.search(categories, texts["categories"]), "Slicer's own category, translated"
    assert ast.literal_eval(said["contributors"])
    for key in ("title", "helpText", "acknowledgementText"):
        assert texts[key].startswith("_("), f"{key} is for people: translate it"
    assert len(texts["helpText"]) > 150 and "not a medical device" in texts["helpText"]
    assert "Nature Communications" in texts["acknowledgementText"]


def test_the_set_up_asks_for_all_that_the_worker_imports() -> None:
    lines = (REPOSITORY / "LCTfound/LCTfound/Resources/requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = {re.split("[<>=!~ ]", line)[0].lower() for line in lines if line and not line.startswith("#")}
    reached = _reached({"LCTfoundLib.worker", "LCTfoundLib.worker_jobs"}, everywhere=True)
    packages = {"PIL": "pillow", "skimage": "scikit-image"}
    needed = {packages.get(root, root).lower() for root in reached} - {"vtk", "vtkmodules"}  # Slicer is built on them
    assert {"torch", "scipy", "scikit-image"} <= needed, "the walk over the imports lost its way"
    assert needed - _optional() <= asked, reached


def _optional() -> set[str]:
    """Packages that the engine does without, with a sentence where one is needed after all."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    return {re.split("[<>=!~ ]", line)[0].lower() for name in ("cone", "language", "lora") for line in extras[name]}


# -- translation -----------------------------------------------------------------------------------------------------

_SETTERS = {
    "setText", "setToolTip", "setWindowTitle", "setPlaceholderText", "setStatusTip", "setTitle", "setWhatsThis",
    "setHeaderLabels", "setHorizontalHeaderLabels", "setFormat", "setSpecialValueText", "addAction", "addTab",
    "showStatusMessage", "errorDisplay", "warningDisplay", "infoDisplay", "messageBox", "delayDisplay",
    "confirmOkCancelDisplay", "confirmYesNoDisplay", "confirmRetryCloseDisplay", "tryWithErrorDisplay",
    "QLabel", "QPushButton", "QCheckBox", "QRadioButton", "QGroupBox", "QAction",
}  # fmt: skip
_PROPERTIES = {"text", "toolTip", "title", "windowTitle", "placeholderText", "statusTip", "whatsThis"}
_TRANSLATORS = {"_", "tr", "translate"}


def _is_bare_text(node: ast.expr) -> bool:
    """Words that a program shows in one language only: a literal outside of _(), also put together or formatted."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and bool(re.search(r"[A-Za-z]{2}", re.sub(r"<[^>]*>|&\w+;", "", node.value)))
    if isinstance(node, ast.JoinedStr):
        return any(_is_bare_text(part) for part in node.values if isinstance(part, ast.Constant))
    if isinstance(node, ast.BinOp):
        return _is_bare_text(node.left) or _is_bare_text(node.right)
    if isinstance(node, ast.IfExp):
        return _is_bare_text(node.body) or _is_bare_text(node.orelse)
    if isinstance(node, ast.List | ast.Tuple):
        return any(_is_bare_text(part) for part in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join"):
        return _is_bare_text(node.func.value)
    return False


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _untranslated(tree: ast.Module) -> list[str]:
    """Places where text for people is set without translation."""
    found = []
    for node in ast.walk(tree):
        texts: list[ast.expr] = []
        if isinstance(node, ast.Call) and _called(node) in _SETTERS:
            texts = [
                *node.args,
                *(keyword.value for keyword in node.keywords if keyword.arg in ("text", "windowTitle")),
            ]
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Attribute) and target.attr in _PROPERTIES for target in node.targets
        ):
            texts = [node.value]
        found += [f"line {node.lineno}: {ast.unparse(text)[:80]}" for text in texts if _is_bare_text(text)]
    return found


@pytest.mark.parametrize("path", _SLICER_FACING, ids=_name)
def test_text_for_people_is_translated(path: Path) -> None:
    assert not _untranslated(_tree(path))


@pytest.mark.parametrize("path", _SLICER_FACING, ids=_name)
def test_what_is_translated_is_written_out(path: Path) -> None:
    """Translators get the literal texts of the source; one that is put together is in no dictionary."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _TRANSLATORS:
            texts = [argument for argument in node.args if not isinstance(argument, ast.Constant)]
            assert not texts, f"line {node.lineno}: {ast.unparse(node)[:80]}"
            assert node.args and all(isinstance(argument.value, str) for argument in node.args)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("label.setText('Some words')", True),
        ("label.text = f'Some {number} words'", True),
        ("label.text = 'Words: ' + name", True),
        ("label.text = 'Words {x}'.format(x=1)", True),
        ("label.toolTip = _('A') if b else 'Some words'", True),
        ("label.text = _('Some {x} words').format(x=1)", False),
        ("label.text = f'{number} / {total}'", False),
        ("label.text = f'<b>{_(\"Some words\")}</b>'", False),
        ("node.SetName('Some words')", False),
    ],
)
def test_untranslated_text_is_found(source: str, is_found: bool) -> None:
    assert bool(_untranslated(ast.parse(source))) is is_found
