"""A panel's parameter node in its widgets: bound while the panel is open, let go when its scene is closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import qt
import slicer
import vtk

from LCTfoundSlicer.translation import tr as _

__all__ = ["Choice", "PanelParameters", "deviceChoices", "fill"]

#: Value of a parameter, and what the user reads.
Choice = tuple[Any, str]


def deviceChoices() -> Sequence[Choice]:
    """What a network may run on."""
    return (
        ("auto", _("The fastest there is")),
        ("cuda", _("NVIDIA GPU")),
        ("mps", _("Apple GPU")),
        ("cpu", _("CPU")),
    )


class PanelParameters:
    """The parameter node of a panel, and the widgets that Slicer's own connectors do not know.

    The panel calls ``show`` when it is set up and entered, ``hide`` when it is left and before its scene is closed.

    Args:
        widget: the panel: a ScriptedLoadableModuleWidget and VTKObservationMixin with ``logic`` and ``ui``.
        choices: combo boxes by the parameter that they set, with what they offer.
        paths: path line edits by the parameter that they set.
        changed: told after each change of a parameter; of None when the panel is left.
        chosen: told the name of a parameter that the user chose in a box.
    """

    def __init__(
        self,
        widget: Any,
        choices: Mapping[str, tuple[Any, Sequence[Choice]]],
        paths: Mapping[str, Any],
        changed: Callable[[Any], None],
        chosen: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.node: Any = None
        self._widget, self._paths, self._changed, self._chosen = widget, dict(paths), changed, chosen
        self._boxes = {name: box for name, (box, _items) in choices.items()}
        self._tag: Any = None
        for name, (box, items) in choices.items():
            fill(box, items)
            box.connect("currentIndexChanged(int)", lambda index, name=name: self._choiceMade(name))
        for name, edit in self._paths.items():
            edit.connect("currentPathChanged(QString)", lambda path, name=name: self._set(name, path))
        for event in (slicer.mrmlScene.EndCloseEvent, slicer.mrmlScene.EndImportEvent):
            widget.addObserver(slicer.mrmlScene, event, self._sceneRenewed)

    def show(self) -> None:
        """Bind the scene's node, beginning with its first CT if none is chosen."""
        self._bind(self._widget.logic.getParameterNode())
        if self.node.inputVolume is None:
            first = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
            if first is not None and not first.IsA("vtkMRMLLabelMapVolumeNode"):
                self.node.inputVolume = first

    def hide(self) -> None:
        """Let the node go."""
        self._bind(None)

    def warmUp(self) -> None:
        """Load libraries and networks while the user still chooses, if all is set up."""
        qt.QTimer.singleShot(0, _warmUp)

    def _bind(self, node: Any) -> None:
        if self.node is not None:
            self.node.disconnectGui(self._tag)
            self._widget.removeObserver(self.node, vtk.vtkCommand.ModifiedEvent, self._modified)
        self.node = node
        if node is not None:
            self._tag = node.connectGui(self._widget.ui)
            self._widget.addObserver(node, vtk.vtkCommand.ModifiedEvent, self._modified)
        self._modified()

    def _modified(self, caller: Any = None, event: Any = None) -> None:
        if self.node is not None:
            for name, box in self._boxes.items():
                index = box.findData(getattr(self.node, name))
                if index >= 0 and index != box.currentIndex:
                    box.setCurrentIndex(index)
            for name, edit in self._paths.items():
                if edit.currentPath != getattr(self.node, name):
                    edit.currentPath = getattr(self.node, name)
        self._changed(self.node)

    def _choiceMade(self, name: str) -> None:
        if self.node is not None:
            self._set(name, self._boxes[name].currentData)
            self._chosen(name)

    def _set(self, name: str, value: Any) -> None:
        if self.node is not None:
            setattr(self.node, name, value)

    def _sceneRenewed(self, caller: Any, event: Any) -> None:
        """A scene was closed or read: its parameters are shown (selectors lose their choice meanwhile)."""
        if self._widget.parent.isEntered:
            self.hide()
            self.show()


def fill(box: Any, items: Sequence[Choice]) -> None:
    """Offer choices in a combo box."""
    for value, text in items:
        box.addItem(text, value)


def _warmUp() -> None:
    from LCTfoundSlicer.run import sharedRunner
    from LCTfoundSlicer.slicer_doors import slicerSetup

    if not slicerSetup().state().needsInstall:
        sharedRunner().warmUp()
