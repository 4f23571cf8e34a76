"""Loads the .ui file of a panel with Qt's own loader, and refuses what Slicer would pass over in silence.

Checked before anything is made: every widget class, every property, every signal and slot of the connections.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PySide6.QtUiTools import QUiLoader

from host.ctk_widgets import CLASSES as CTK_CLASSES
from host.mrml_widgets import CLASSES as MRML_CLASSES
from host.qt_compat import QtCore, QtGui, QtWidgets, normalized, properties, signals

__all__ = ["UiFile", "UnknownConnection", "UnknownProperty", "UnknownWidget", "load_ui", "widget_class"]

_Element = ElementTree.Element


class UnknownWidget(LookupError):
    """A widget class of the .ui file that neither Qt nor the host has. Add a stand-in for it, or correct the name."""


class UnknownProperty(AttributeError):
    """A property of the .ui file that its widget does not have, or cannot set. Correct the name."""


class UnknownConnection(AttributeError):
    """A connection of the .ui file whose sender, signal, receiver or slot does not exist."""


_classes: dict[str, type] = {**CTK_CLASSES, **MRML_CLASSES}
#: Dynamic properties that Slicer knows; any other is taken for a mistake.
_DYNAMIC = {"SlicerParameterName"}
#: What Qt Designer writes of a layout besides its properties.
_OF_LAYOUTS = {"leftMargin", "topMargin", "rightMargin", "bottomMargin", "horizontalSpacing", "verticalSpacing"}
#: What it writes as attributes: of pages and groups, and of the headers of tables and trees.
_ATTRIBUTES = re.compile(
    "title|label|icon|toolTip|whatsThis|buttonGroup|(horizontalH|verticalH|h)eader(Visible|CascadingSectionResizes|"
    "DefaultSectionSize|HighlightSections|MinimumSectionSize|ShowSortIndicator|StretchLastSection)"
)


def widget_class(name: str) -> type:
    """The class of that name: a stand-in or Qt's; UnknownWidget when there is none."""
    if name == "Line":  # Designer's name for a QFrame that is a line
        return QtWidgets.QFrame
    found = _classes.get(name) or getattr(QtWidgets, name, None) or getattr(QtGui, name, None)
    if not (isinstance(found, type) and issubclass(found, QtCore.QObject)):
        raise UnknownWidget(f"there is no widget class {name} here")
    return found


@dataclass
class _Connection:
    sender: str
    signal: str
    receiver: str
    slot: str


@dataclass
class UiFile:
    """What a .ui file says; made by `read`, which checks it."""

    path: Path
    tree: ElementTree.ElementTree
    classes: dict[str, type] = field(default_factory=dict)  # object name -> class
    connections: list[_Connection] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> UiFile:
        """Read and check; raises UnknownWidget, UnknownProperty or UnknownConnection, with the name of the file."""
        ui = cls(Path(path), ElementTree.parse(path))
        for element in ui._elements("widget", "layout", "action", "actiongroup"):
            ui._check_element(element)
        for element in ui.tree.iter("connection"):
            texts = [element.findtext(part, "") for part in ("sender", "signal", "receiver", "slot")]
            ui.connections.append(ui._checked_connection(_Connection(*texts)))
        return ui

    def _elements(self, *tags: str) -> Iterator[_Element]:
        for tag in tags:
            for element in self.tree.iter(tag):
                if tag in ("widget", "layout") and "class" not in element.attrib:
                    continue
                yield element

    def _check_element(self, element: _Element) -> None:
        name = element.get("name", "")
        cls_name = {"action": "QAction", "actiongroup": "QActionGroup"}.get(element.tag, element.get("class", ""))
        where = f"{self.path.name}: {name or 'an object without a name'}"
        try:
            cls = widget_class(cls_name)
        except UnknownWidget as error:
            raise UnknownWidget(f"{where}: {error}") from None
        if name and name in self.classes:
            raise UnknownWidget(f"{where}: two objects have this name")
        if name:
            self.classes[name] = cls
        for entry in element.findall("property"):
            self._check_property(where, cls, entry, element)
        for entry in element.findall("attribute"):
            if not _ATTRIBUTES.fullmatch(entry.get("name", "")):
                raise UnknownProperty(f"{where}: there is no attribute {entry.get('name')}")

    def _check_property(self, where: str, cls: type, entry: _Element, element: _Element) -> None:
        name = entry.get("name", "")
        known = properties(cls)
        if known.get(name):
            return
        if name in known:
            raise UnknownProperty(f"{where}: the property {name} of {cls.__name__} is read-only")
        isDynamic = entry.get("stdset") == "0" and name in _DYNAMIC
        isOfLayout = element.tag == "layout" and name in _OF_LAYOUTS
        isOfLine = element.get("class") == "Line" and name == "orientation"
        if not (isDynamic or isOfLayout or isOfLine):
            raise UnknownProperty(f"{where}: {cls.__name__} has no property {name}")

    def _checked_connection(self, connection: _Connection) -> _Connection:
        where = f"{self.path.name}: connection {connection.sender}.{connection.signal}"
        for name in (connection.sender, connection.receiver):
            if name not in self.classes:
                raise UnknownConnection(f"{where}: there is no object {name}")
        if normalized(connection.signal) not in signals(self.classes[connection.sender]):
            raise UnknownConnection(f"{where}: {self.classes[connection.sender].__name__} has no such signal")
        slot = connection.slot.split("(")[0]
        if not callable(getattr(self.classes[connection.receiver], slot, None)):
            raise UnknownConnection(f"{where}: {self.classes[connection.receiver].__name__} has no slot {slot}")
        return connection

    def without_connections(self) -> bytes:
        """The file for Qt's loader, which cannot connect the signals of stand-ins."""
        root = ElementTree.fromstring(ElementTree.tostring(self.tree.getroot()))
        for connections in root.findall("connections"):
            root.remove(connections)
        return ElementTree.tostring(root)


class _Loader(QUiLoader):
    """Makes the stand-ins where the file names them, and holds what it made until the loading is over."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[Any] = []
        self._root: Any = None

    def createWidget(self, className: str, parent: Any = None, name: str = "") -> Any:  # noqa: N802
        cls = _classes.get(className)
        widget = cls(parent) if cls is not None else super().createWidget(className, parent, name)
        widget.setObjectName(name)
        self._made.append(widget)
        return widget


def load_ui(path: str | Path) -> QtWidgets.QWidget:
    """The widget of a .ui file with its connections made. Raises what UiFile.read raises."""
    ui = UiFile.read(path)
    buffer = QtCore.QBuffer()
    buffer.setData(ui.without_connections())
    buffer.open(QtCore.QIODevice.OpenModeFlag.ReadOnly)
    loader = _Loader()
    loader.setWorkingDirectory(QtCore.QDir(str(ui.path.parent)))
    root = loader.load(buffer)
    if root is None:
        raise UnknownWidget(f"{ui.path.name}: {loader.errorString()}")
    root._host_parts = loader._made  # Python keeps the stand-ins alive as long as their window
    objects = {name: root if root.objectName == name else root.findChild(QtCore.QObject, name) for name in ui.classes}
    _set_enums(ui, objects)
    for connection in ui.connections:
        objects[connection.sender].connect(
            connection.signal, getattr(objects[connection.receiver], connection.slot.split("(")[0])
        )
    return root


def _set_enums(ui: UiFile, objects: dict[str, Any]) -> None:
    """Enum values of stand-ins, which Qt's loader cannot know: their properties are ints here."""
    for element in ui._elements("widget"):
        if element.get("class", "") not in _classes:
            continue
        for entry in element.findall("property"):
            value = entry.find("enum") if entry.find("enum") is not None else entry.find("set")
            if value is not None and value.text:
                cls = ui.classes[element.get("name", "")]
                setattr(objects[element.get("name", "")], entry.get("name", ""), _enum_value(cls, value.text))


def _enum_value(cls: type, text: str) -> int:
    """`ctkPathLineEdit::Dirs|ctkPathLineEdit::Executable` or `Qt::AlignLeft` as a number."""
    total = 0
    for part in text.split("|"):
        scope, *_, name = part.strip().split("::") if "::" in part else (cls.__name__, part.strip())
        holder = QtCore.Qt if scope == "Qt" else widget_class(scope)
        if not hasattr(holder, name):
            raise UnknownProperty(f"{scope} has no enum value {name}")
        total |= int(getattr(holder, name))
    return total
