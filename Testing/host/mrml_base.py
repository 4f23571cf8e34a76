"""What the stand-ins for Slicer's MRML widgets share: VTK observers that end with their widget, and the scene."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import shiboken6
import vtk

from host.qt_compat import QtCore, QtWidgets

__all__ = ["NODE", "Observations", "qMRMLWidget", "qSlicerWidget"]

Signal = QtCore.Signal
#: What PySide6 calls a VTK object in the signature of a signal.
NODE = "PyObject"


class Observations:
    """The VTK observers of one widget. They do not keep it alive, and end with it."""

    def __init__(self, widget: QtWidgets.QWidget) -> None:
        self._widget = weakref.ref(widget)
        self._tags: dict[str, list[tuple[Any, int]]] = {}
        tags = self._tags
        widget.destroyed.connect(lambda: _remove_observers(tags))

    def watch(self, group: str, watched: Any, events: Iterable[Any], method: str) -> None:
        """Call the widget's method (without arguments) at each of the events; `group` names them for `leave`."""
        widget = self._widget

        def call(*_: Any) -> None:
            living = widget()
            if living is not None and shiboken6.isValid(living):
                getattr(living, method)()

        for event in events:
            self._tags.setdefault(group, []).append((watched, watched.AddObserver(event, call)))

    def watch_node(self, group: str, scene: Any, event: Any, method: str) -> None:
        """Call the widget's method with the node of a scene event."""
        widget = self._widget

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def call(_scene: Any, _event: Any, node: Any) -> None:
            living = widget()
            if living is not None and shiboken6.isValid(living):
                getattr(living, method)(node)

        self._tags.setdefault(group, []).append((scene, scene.AddObserver(event, call)))

    def leave(self, group: str) -> None:
        _remove_observers({group: self._tags.pop(group, [])})


def _remove_observers(tags: dict[str, list[tuple[Any, int]]]) -> None:
    for watched, tag in [item for group in tags.values() for item in group]:
        watched.RemoveObserver(tag)
    tags.clear()


class qMRMLWidget(QtWidgets.QWidget):
    """A widget that knows the scene and tells its children of it (by connections of the .ui file)."""

    mrmlSceneChanged = Signal(object)
    signal_signatures = {"mrmlSceneChanged(vtkMRMLScene*)": f"mrmlSceneChanged({NODE})"}

    def __init__(self, parent: Any = None, *flags: Any) -> None:
        super().__init__(parent, *flags)
        self._scene: Any = None
        self._observations = Observations(self)

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, newScene: Any) -> None:
        if newScene is not self._scene:
            self._scene = newScene
            self._sceneChanged()
            self.mrmlSceneChanged.emit(newScene)

    def _sceneChanged(self) -> None:
        """For the classes below."""


class qSlicerWidget(qMRMLWidget):
    """The same in the application's library."""
