"""Two-way bindings between a widget and a parameter, by the table of the developer guide."""

from __future__ import annotations

import logging
import math
import pathlib
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import Any

import ctk
import qt
import slicer

from .annotations import Annotations, split
from .packs import FloatRange
from .storage import PATH_TYPES


class GuiConnector(ABC):
    """Reads and writes one widget, and tells of its changes."""

    #: Signal of the widget; None: the widget only shows.
    signal: str | None = None

    def __init__(self, widget: Any, kind: Any, annotations: Annotations) -> None:
        self.widget, self._kind, self._annotations = widget, kind, annotations
        self._callback: Callable[[], None] | None = None
        self._prepare()

    def _prepare(self) -> None:  # noqa: B027 - most widgets need no preparation
        """Give the widget its range, steps or choices."""

    @abstractmethod
    def read(self) -> Any: ...

    @abstractmethod
    def write(self, value: Any) -> None: ...

    def onChanged(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` at each change from now on; None ends it."""
        if self.signal is not None and self._callback is not None:
            self.widget.disconnect(self.signal, self._changed)
        self._callback = callback
        if self.signal is not None and callback is not None:
            self.widget.connect(self.signal, self._changed)

    def _changed(self, *_arguments: Any) -> None:
        if self._callback is not None:
            self._callback()


class CheckedConnector(GuiConnector):
    signal = "toggled(bool)"

    def _prepare(self) -> None:
        if not self.widget.checkable:
            logging.warning("The button %s is made checkable, as it is bound to a bool.", self.widget.objectName)
            self.widget.checkable = True

    def read(self) -> bool:
        return bool(self.widget.checked)

    def write(self, value: bool) -> None:
        self.widget.checked = value


class NumberConnector(GuiConnector):
    """The range of the widget becomes that of the parameter, whatever the .ui file says."""

    widest: tuple[float, float] = (-math.inf, math.inf)
    #: Widgets that cannot show a number without limits.
    limited: tuple[type, ...] = ()

    def _prepare(self) -> None:
        hints = self._annotations
        if isinstance(self.widget, self.limited) and None in (hints.minimum, hints.maximum):
            raise RuntimeError(f"{self.widget.className()} {self.widget.objectName} needs a parameter with both limits")
        if hints.decimals is not None:
            self.widget.decimals = hints.decimals
        self.widget.minimum = self._number(self.widest[0] if hints.minimum is None else hints.minimum)
        self.widget.maximum = self._number(self.widest[1] if hints.maximum is None else hints.maximum)
        if hints.singleStep is not None:
            self.widget.singleStep = self._number(hints.singleStep)

    def _number(self, value: float) -> float:
        return value

    def read(self) -> float:
        return self._number(self.widget.value)

    def write(self, value: float) -> None:
        if self.widget.value != value:
            self.widget.value = value


class IntConnector(NumberConnector):
    signal = "valueChanged(int)"
    widest = (-(2**31), 2**31 - 1)
    limited = (qt.QSlider,)

    def _number(self, value: float) -> int:
        return int(value)


class FloatConnector(NumberConnector):
    signal = "valueChanged(double)"
    limited = (ctk.ctkSliderWidget,)


class RangeConnector(GuiConnector):
    signal = "valuesChanged(double,double)"

    def _prepare(self) -> None:
        hints = self._annotations
        if None in (hints.minimum, hints.maximum):
            raise RuntimeError(f"{self.widget.className()} {self.widget.objectName} needs a range with RangeBounds")
        self.widget.setRange(hints.minimum, hints.maximum)
        for name, value in (("decimals", hints.decimals), ("singleStep", hints.singleStep)):
            if value is not None:
                setattr(self.widget, name, value)

    def read(self) -> FloatRange:
        return FloatRange(self.widget.minimumValue, self.widget.maximumValue)

    def write(self, value: FloatRange) -> None:
        self.widget.setValues(value.minimum, value.maximum)


class ChoiceConnector(GuiConnector):
    signal = "currentIndexChanged(int)"

    def _prepare(self) -> None:
        if isinstance(self._kind, type) and issubclass(self._kind, Enum):
            self._values = list(self._kind)
            texts = [value.label() if hasattr(value, "label") else value.name for value in self._values]
        elif self._annotations.choice is not None:
            self._values = list(self._annotations.choice.choices)
            texts = [str(value) for value in self._values]
        else:
            raise RuntimeError(f"The combo box {self.widget.objectName} needs a parameter with a Choice, or an Enum")
        self.widget.clear()
        self.widget.addItems(texts)

    def read(self) -> Any:
        return self._values[self.widget.currentIndex]

    def write(self, value: Any) -> None:
        self.widget.currentIndex = self._values.index(value)


class TextConnector(GuiConnector):
    signal = "textChanged(QString)"

    def read(self) -> str:
        return str(self.widget.text)

    def write(self, value: str) -> None:
        if self.widget.text != value:
            self.widget.text = value


class LongTextConnector(GuiConnector):
    signal = "textChanged()"

    def read(self) -> str:
        return str(self.widget.plainText)

    def write(self, value: str) -> None:
        if self.widget.plainText != value:
            self.widget.plainText = value


class LabelConnector(TextConnector):
    signal = None


class PathConnector(GuiConnector):
    signal = "currentPathChanged(QString)"

    def read(self) -> pathlib.PurePath:
        return self._kind(self.widget.currentPath)

    def write(self, value: pathlib.PurePath) -> None:
        if self.read() != value:
            self.widget.currentPath = str(value)


class DirectoryConnector(GuiConnector):
    signal = "directoryChanged(QString)"

    def read(self) -> pathlib.PurePath:
        return self._kind(self.widget.directory)

    def write(self, value: pathlib.PurePath) -> None:
        if self.read() != value:
            self.widget.directory = str(value)


class NodeConnector(GuiConnector):
    signal = "currentNodeChanged(vtkMRMLNode*)"

    def _prepare(self) -> None:
        """Only nodes that the parameter takes are offered, whatever the .ui file says."""
        isUnion = typing.get_origin(self._kind) in (typing.Union, types.UnionType)
        kinds = typing.get_args(self._kind) if isUnion else (self._kind,)
        self.widget.nodeTypes = [kind.__name__ for kind in kinds if kind is not type(None)]

    def read(self) -> Any:
        return self.widget.currentNode()

    def write(self, value: Any) -> None:
        if self.widget.currentNode() is not value:
            self.widget.setCurrentNode(value)


def createGuiConnector(widget: Any, annotated: Any) -> GuiConnector:
    """The connector of a widget and a (possibly annotated) type.

    Raises:
        RuntimeError: Slicer has no connection between the two.
    """
    kind, annotations = split(annotated)
    for classes, takes, connector in _connections():
        if isinstance(widget, classes) and takes(kind):
            return connector(widget, kind, annotations)
    raise RuntimeError(
        f"No connection between the widget {widget.objectName} ({widget.className()}) and the type {kind}"
    )


def _connections() -> list[tuple[tuple[type, ...], Callable[[Any], bool], type[GuiConnector]]]:
    """(widget classes, does it take the type?, connector); the first that fits is taken."""
    numbers = _named(ctk, "ctkSliderWidget", "ctkDoubleSlider", "ctkDoubleSpinBox")
    numbers += _named(slicer, "qMRMLSliderWidget", "qMRMLSpinBox")
    return [
        ((qt.QCheckBox, qt.QPushButton, *_named(ctk, "ctkCheckBox")), _is(bool), CheckedConnector),
        ((qt.QSlider, qt.QSpinBox), _is(int), IntConnector),
        ((qt.QDoubleSpinBox, *numbers), _is(float), FloatConnector),
        (_named(ctk, "ctkRangeWidget", "ctkDoubleRangeSlider"), _is(FloatRange), RangeConnector),
        ((qt.QComboBox, *_named(ctk, "ctkComboBox")), _isChoice, ChoiceConnector),
        ((qt.QLineEdit,), _is(str), TextConnector),
        ((qt.QTextEdit, qt.QPlainTextEdit), _is(str), LongTextConnector),
        ((qt.QLabel,), _is(str), LabelConnector),
        (_named(ctk, "ctkPathLineEdit"), _is(*PATH_TYPES), PathConnector),
        (_named(ctk, "ctkDirectoryButton"), _is(*PATH_TYPES), DirectoryConnector),
        (_named(slicer, "qMRMLNodeComboBox", "qMRMLSubjectHierarchyTreeView"), _isNode, NodeConnector),
    ]


def _named(module: Any, *names: str) -> tuple[type, ...]:
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda kind: kind in kinds


def _isChoice(kind: Any) -> bool:
    return kind in (int, float, str, bool) or (isinstance(kind, type) and issubclass(kind, Enum))


def _isNode(kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return all(option is type(None) or _isNode(option) for option in typing.get_args(kind))
    return isinstance(kind, type) and issubclass(kind, slicer.vtkMRMLNode)
