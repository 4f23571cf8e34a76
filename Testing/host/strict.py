"""Reads the source of a panel for names that Slicer would only miss when the line runs.

Checked, without running anything: names of `qt`, `ctk`, `vtk`, `slicer.vtk*`, `slicer.q*` and `slicer.util`; widgets of
the .ui file; and the properties, methods and signals that are used on widgets whose class is known, be it from the .ui
file or from an assignment like `self.button = qt.QPushButton()`.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from host.mrml_widgets import CLASSES as WIDGETS
from host.qt_compat import QtCore, normalized, properties, signals
from host.ui_loader import UiFile

__all__ = ["unknown_names_in_source"]

_MODULES = ("qt", "ctk", "vtk", "slicer")
#: What PythonQt gives to every object, and what the patched classes of the host answer besides their own attributes.
_OF_EVERY_OBJECT = {"connect", "disconnect", "className", "delete", "name"}


def unknown_names_in_source(source: str | Path, uiFiles: Iterable[str | Path] = ()) -> list[str]:
    """What in a source file names nothing: "file:line: what". Empty: nothing was found.

    With .ui files, `ui.NAME` (`self.ui.NAME`, `panel.ui.NAME`) must be in one of them.
    """
    path = Path(source)
    check = _Check(path.name, _widgets_of(uiFiles))
    check.visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return check.found


def _widgets_of(uiFiles: Iterable[str | Path]) -> dict[str, list[type]] | None:
    """Name of a widget -> its classes in the files; None without files."""
    widgets: dict[str, list[type]] = {}
    for file in (files := list(uiFiles)):
        for name, cls in UiFile.read(file).classes.items():
            widgets.setdefault(name, []).append(cls)
    return widgets if files else None


def _dotted(node: ast.expr) -> list[str]:
    """`self.ui.button` -> its three names; empty for anything that is not only names."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def _module_item(names: list[str]) -> Any:
    """What `qt.QLabel` or `slicer.vtkMRMLNode` is; None when the names are not of that kind."""
    if len(names) != 2 or names[0] not in _MODULES:
        return None
    return getattr(importlib.import_module(names[0]), names[1], None) or WIDGETS.get(names[1])


class _Check(ast.NodeVisitor):
    def __init__(self, file: str, widgets: dict[str, list[type]] | None) -> None:
        self.file, self.widgets = file, widgets
        self.found: list[str] = []
        self.scopes: list[dict[str, list[type]]] = [{}]

    def _report(self, node: ast.expr, what: str) -> None:
        self.found.append(f"{self.file}:{node.lineno}: {what}")

    # scopes: which variables hold a widget of a known class

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._in_scope(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._in_scope(node)

    def visit_Module(self, node: ast.Module) -> None:
        self._in_scope(node)

    def _in_scope(self, node: Any) -> None:
        self.scopes.append({**self.scopes[-1], **_assigned_widgets(node)})
        self.generic_visit(node)
        self.scopes.pop()

    # what is used

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._check_attribute(node, isStored=isinstance(node.ctx, ast.Store))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            self._check_call(node, node.func)
        self.generic_visit(node)

    def _classes_of(self, node: ast.expr) -> list[type]:
        """The possible classes of the widget that an expression is; empty when that is not known."""
        names = _dotted(node)
        if len(names) >= 2 and names[-2] == "ui" and self.widgets is not None:
            return self.widgets.get(names[-1], [])
        return self.scopes[-1].get(".".join(names), []) if names else []

    def _check_attribute(self, node: ast.Attribute, isStored: bool) -> None:
        names = _dotted(node)
        if names and names[0] in _MODULES:
            self._check_module_name(node, names)
        elif len(names) >= 2 and names[-2] == "ui" and self.widgets is not None:
            if names[-1] not in self.widgets:
                self._report(node, f"no .ui file has a widget {names[-1]}")
        classes = self._classes_of(node.value)
        if classes and not any(_has(cls, node.attr, isStored) for cls in classes):
            verb = "has no property to set called" if isStored else "has no"
            self._report(node, f"{classes[0].__name__} {verb} {node.attr}")

    def _check_module_name(self, node: ast.expr, names: list[str]) -> None:
        module = importlib.import_module(names[0])
        if names[0] == "slicer" and names[1:2] == ["util"]:
            names, module = names[1:], module.util
        elif names[0] == "slicer" and not names[1].startswith(("vtk", "q")):
            return  # made when the application starts
        if len(names) == 1:
            return
        item = getattr(module, names[1], None) or WIDGETS.get(names[1])
        if item is None and len(names) == 2 and not hasattr(module, names[1]):
            self._report(node, f"{names[0]} has no {names[1]}")
        if len(names) == 3 and isinstance(item, type) and not hasattr(item, names[2]):
            self._report(node, f"{names[0]}.{names[1]} has no {names[2]}")
        scope = getattr(item, names[2], None) if len(names) == 4 else None
        if inspect.isclass(scope) and issubclass(scope, enum.Enum):
            self._report(node, f"PythonQt knows the value as {names[0]}.{names[1]}.{names[3]} only")

    def _check_call(self, node: ast.Call, method: ast.Attribute) -> None:
        classes = [cls for cls in self._classes_of(method.value) if issubclass(cls, QtCore.QObject)]
        if not classes:
            return
        if all(method.attr in properties(cls) for cls in classes):
            self._report(node, f"{method.attr} of {classes[0].__name__} is a property, not a method")
        signature = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if method.attr in ("connect", "disconnect") and isinstance(signature, str):
            if not any(normalized(signature) in signals(cls) for cls in classes):
                self._report(node, f"{classes[0].__name__} has no signal {signature}")


def _has(cls: type, name: str, isStored: bool) -> bool:
    if not issubclass(cls, QtCore.QObject):
        return not isStored and hasattr(cls, name)
    if isStored:
        return properties(cls).get(name, False) or name == "name"
    return name in _OF_EVERY_OBJECT or name in properties(cls) or (hasattr(cls, name) and not name.startswith("_"))


def _assigned_widgets(scope: ast.AST) -> dict[str, list[type]]:
    """Variables of a scope that are only ever assigned a widget: `button = qt.QPushButton()`, `self.tree = ...`;
    with an empty list those that may be anything.

    Names of a class (`self.x`) count for all its methods, others for the function itself.
    """
    assigned: dict[str, list[type | None]] = {}
    wanted = "self." if isinstance(scope, ast.ClassDef) else ""
    for target, value in _assignments(scope):
        name = ".".join(_dotted(target))
        if name and name.startswith(wanted) and (wanted or "." not in name):
            assigned.setdefault(name, []).append(_constructed(value))
    return {name: kinds[:1] if _same_class(kinds) else [] for name, kinds in assigned.items()}  # type: ignore[misc]


def _same_class(kinds: list[type | None]) -> bool:
    return kinds[0] is not None and all(kind is kinds[0] for kind in kinds)


def _assignments(scope: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """(target, value) of everything that binds a name in a scope; value None: something that is no widget for sure."""
    for node in _nodes_of(scope):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _unpacked(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            yield node.target, node.value
        elif isinstance(node, ast.For | ast.comprehension):
            yield from ((name, None) for name in ast.walk(node.target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            yield node.optional_vars, None
        elif isinstance(node, ast.arg):
            yield ast.Name(node.arg, ast.Store()), None


def _nodes_of(scope: ast.AST) -> Iterator[ast.AST]:
    """All below a scope; below a function not what its inner functions bind."""
    whole = isinstance(scope, ast.ClassDef)
    for child in ast.iter_child_nodes(scope):
        yield child
        inner = isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda)
        if whole or not inner:
            yield from _all_below(child) if whole else _nodes_of(child)


def _all_below(node: ast.AST) -> Iterator[ast.AST]:
    return (found for found in ast.walk(node) if found is not node)


def _unpacked(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr | None]]:
    if not isinstance(target, ast.Tuple):
        return [(target, value)]
    values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
    return [(part, values[n] if values else None) for n, part in enumerate(target.elts)]


def _constructed(value: ast.expr | None) -> type | None:
    """The class of `qt.QLabel(...)`."""
    item = _module_item(_dotted(value.func)) if isinstance(value, ast.Call) else None
    return item if isinstance(item, type) and not item.__name__.startswith("vtk") else None
