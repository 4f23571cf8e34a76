"""Stand-ins for the widgets that place and list the points of markups."""

from __future__ import annotations

from typing import Any

import slicer

from host.ctk_widgets import ctkColorPickerButton
from host.mrml_base import qSlicerWidget
from host.mrml_node_widgets import qMRMLNodeComboBox
from host.qt_compat import QtCore, QtGui, QtWidgets
from host.standin import computed, flags, stored

Signal = QtCore.Signal

_POINT_EVENTS = ("PointAddedEvent", "PointRemovedEvent", "PointModifiedEvent", "PointPositionDefinedEvent")
_POINT_EVENTS += ("PointPositionUndefinedEvent",)


def _markups_or_none(node: Any) -> Any:
    return node if node is not None and node.IsA("vtkMRMLMarkupsNode") else None


@flags(ShowPlaceMultipleMarkupsOption=0, HidePlaceMultipleMarkupsOption=1)
@flags(ForcePlaceSingleMarkup=2, ForcePlaceMultipleMarkups=3)
class qSlicerMarkupsPlaceWidget(qSlicerWidget):
    """Buttons to place the points of a markups node; they set the mode in the scene's interaction node."""

    activeMarkupsPlaceModeChanged = Signal(bool)
    activeMarkupsFiducialPlaceModeChanged = Signal(bool)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._wasPlacing = False
        self._placeButton, self._deleteButton = QtWidgets.QToolButton(), QtWidgets.QToolButton()
        self._colorButton = ctkColorPickerButton()
        self._colorButton.displayColorName = False
        self._placeButton.setText("Place")
        self._placeButton.setCheckable(True)
        self._deleteButton.setText("Delete")
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for button in (self._colorButton, self._placeButton, self._deleteButton):
            layout.addWidget(button)
        self._placeButton.toggled.connect(lambda checked: self.setPlaceModeEnabled(checked))
        self._deleteButton.clicked.connect(lambda _checked: self.deleteLastPoint())
        self._colorButton.colorChanged.connect(self.setNodeColor)
        self._follow()

    buttonsVisible = stored(bool, "buttonsVisible", True, "_showButtons")
    deleteAllControlPointsOptionVisible = stored(bool, "deleteAllControlPointsOptionVisible", True)
    unsetLastControlPointOptionVisible = stored(bool, "unsetLastControlPointOptionVisible", False)
    unsetAllControlPointsOptionVisible = stored(bool, "unsetAllControlPointsOptionVisible", False)
    placeMultipleMarkups = stored(int, "placeMultipleMarkups", 0)
    nodeColor = computed(QtGui.QColor, "_colorButton.color", "setNodeColor")
    defaultNodeColor = stored(QtGui.QColor, "defaultNodeColor", QtGui.QColor(0, 0, 0))
    currentNodeActive = computed(bool, lambda self: self._isActive(), "setCurrentNodeActive")
    placeModeEnabled = computed(bool, lambda self: self._isPlacing(), "setPlaceModeEnabled")
    placeModePersistency = computed(
        bool,
        lambda self: bool(self._usable() and self.interactionNode().GetPlaceModePersistence()),
        "setPlaceModePersistency",
    )

    def _singleton(self, name: str) -> Any:
        return self._scene.GetNodeByID(f"vtkMRML{name}NodeSingleton") if self._scene is not None else None

    def interactionNode(self) -> Any:
        return self._singleton("Interaction")

    def selectionNode(self) -> Any:
        return self._singleton("Selection")

    def _usable(self) -> bool:
        return self.interactionNode() is not None and self.selectionNode() is not None

    def _sceneChanged(self) -> None:
        self._observations.leave("modes")
        if self._usable():
            interaction, selection = self.interactionNode(), self.selectionNode()
            modes = [interaction.InteractionModeChangedEvent, interaction.InteractionModePersistenceChangedEvent]
            self._observations.watch("modes", interaction, modes, "_follow")
            self._observations.watch("modes", selection, ["ModifiedEvent"], "_follow")
        self._follow()

    def currentNode(self) -> Any:
        return self._node

    currentMarkupsNode = currentNode

    def setCurrentNode(self, currentNode: Any) -> None:
        if _markups_or_none(currentNode) is self._node:
            return
        self._observations.leave("node")
        self._node = _markups_or_none(currentNode)
        if self._node is not None:
            events = [getattr(self._node, name) for name in _POINT_EVENTS]
            self._observations.watch("node", self._node, [*events, "ModifiedEvent"], "_follow")
        self._follow()

    def _isActive(self) -> bool:
        if self._node is None or not self._usable():
            return False
        selection = self.selectionNode()
        sameClass = selection.GetActivePlaceNodeClassName() == self._node.GetClassName()
        return sameClass and selection.GetActivePlaceNodeID() == self._node.GetID()

    def _isPlacing(self) -> bool:
        return self._isActive() and self.interactionNode().GetCurrentInteractionMode() == self.interactionNode().Place

    def setCurrentNodeActive(self, active: bool) -> None:
        if not self._usable() or active == self._isActive():
            return
        if active and self._node is not None:
            self.selectionNode().SetReferenceActivePlaceNodeClassName(self._node.GetClassName())
            self.selectionNode().SetActivePlaceNodeID(self._node.GetID())
        else:
            self.selectionNode().SetActivePlaceNodeID(None)
            self.interactionNode().SetCurrentInteractionMode(self.interactionNode().ViewTransform)

    def setPlaceModeEnabled(self, enable: bool) -> None:
        if not self._usable() or self._node is None:
            return
        interaction = self.interactionNode()
        if not enable:
            interaction.SetCurrentInteractionMode(interaction.ViewTransform)
            return
        self.setCurrentNodeActive(True)
        if self.placeMultipleMarkups in (self.ForcePlaceSingleMarkup, self.ForcePlaceMultipleMarkups):
            interaction.SetPlaceModePersistence(self.placeMultipleMarkups == self.ForcePlaceMultipleMarkups)
        interaction.SetCurrentInteractionMode(interaction.Place)

    def setPlaceModePersistency(self, persistent: bool) -> None:
        self.interactionNode().SetPlaceModePersistence(persistent)

    def setPlaceMultipleMarkups(self, option: int) -> None:
        self.placeMultipleMarkups = int(option)

    def setButtonsVisible(self, visible: bool) -> None:
        self.buttonsVisible = visible

    def _showButtons(self) -> None:
        for button in (self._colorButton, self._placeButton, self._deleteButton):
            button.setVisible(self.buttonsVisible)

    def placeButton(self) -> QtWidgets.QToolButton:
        return self._placeButton

    def deleteButton(self) -> QtWidgets.QToolButton:
        return self._deleteButton

    def setNodeColor(self, color: QtGui.QColor) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if display is not None:
            display.SetSelectedColor(color.redF(), color.greenF(), color.blueF())

    def setDefaultNodeColor(self, color: QtGui.QColor) -> None:
        self.defaultNodeColor = color

    def deleteLastPoint(self) -> None:
        if self._node is not None and self._node.GetNumberOfControlPoints() > 0:
            self._node.RemoveNthControlPoint(self._node.GetNumberOfControlPoints() - 1)

    def deleteAllPoints(self) -> None:
        if self._node is not None:
            self._node.RemoveAllControlPoints()

    def unsetLastDefinedPoint(self) -> None:
        node = self._node
        for n in reversed(range(node.GetNumberOfControlPoints() if node is not None else 0)):
            if node.GetNthControlPointPositionStatus(n) == node.PositionDefined:
                node.UnsetNthControlPointPosition(n)
                return

    def unsetAllPoints(self) -> None:
        if self._node is not None:
            self._node.UnsetAllControlPoints()

    def _follow(self) -> None:
        usable = self._node is not None and self._usable()
        self._colorButton.setEnabled(usable)
        self._placeButton.setEnabled(usable and not self._node.GetControlPointPlacementComplete())
        self._deleteButton.setEnabled(usable and self._node.GetNumberOfControlPoints() > 0)
        blocked = [(button, button.blockSignals(True)) for button in (self._placeButton, self._colorButton)]
        self._placeButton.setChecked(usable and self._isPlacing())
        display = self._node.GetDisplayNode() if usable else None
        color = QtGui.QColor.fromRgbF(*display.GetSelectedColor()) if display is not None else self.defaultNodeColor
        self._colorButton.setColor(color)
        for button, before in blocked:
            button.blockSignals(before)
        placing = usable and self._isPlacing()
        if placing != self._wasPlacing:
            self._wasPlacing = placing
            self.activeMarkupsFiducialPlaceModeChanged.emit(placing)
            self.activeMarkupsPlaceModeChanged.emit(placing)


class qSlicerSimpleMarkupsWidget(qSlicerWidget):
    """A markups node, its place buttons and the table of its points."""

    markupsNodeChanged = Signal()
    markupsFiducialNodeChanged = Signal()
    currentMarkupsControlPointSelectionChanged = Signal(int)
    currentMarkupsFiducialSelectionChanged = Signal(int)
    activeMarkupsPlaceModeChanged = Signal(bool)
    activeMarkupsFiducialPlaceModeChanged = Signal(bool)
    updateFinished = Signal()

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._nodes = qMRMLNodeComboBox()
        self._nodes.nodeTypes = ["vtkMRMLMarkupsFiducialNode"]
        self._nodes.noneEnabled = self._nodes.renameEnabled = True
        self._place = qSlicerMarkupsPlaceWidget()
        self._table = QtWidgets.QTableWidget(0, 4)
        self._table.setSelectionBehavior(QtWidgets.QTableView.SelectionBehavior.SelectRows)
        self._table.setHorizontalHeaderLabels(["Label", "R", "A", "S"])
        self._table.horizontalHeader().setSectionResizeMode(QtWidgets.QHeaderView.ResizeMode.Stretch)
        layout, row = QtWidgets.QVBoxLayout(self), QtWidgets.QHBoxLayout()
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        row.addWidget(self._nodes, 1)
        row.addWidget(self._place)
        layout.addWidget(self._table)
        self._nodes.currentNodeChanged[object].connect(self._nodeChosen)
        self._place.activeMarkupsPlaceModeChanged.connect(self.activeMarkupsPlaceModeChanged.emit)
        self._place.activeMarkupsFiducialPlaceModeChanged.connect(self.activeMarkupsFiducialPlaceModeChanged.emit)
        self._table.cellChanged.connect(self._edited)
        self._table.currentCellChanged.connect(lambda row, *_: self._pointChosen(row))

    enterPlaceModeOnNodeChange = stored(bool, "enterPlaceModeOnNodeChange", True)
    jumpToSliceEnabled = stored(bool, "jumpToSliceEnabled", False)
    nodeSelectorVisible = computed(bool, lambda self: not self._nodes.isHidden(), "setNodeSelectorVisible")
    optionsVisible = computed(bool, lambda self: not self._place.isHidden(), "setOptionsVisible")
    nodeColor = computed(QtGui.QColor, "_place.nodeColor", "setNodeColor")
    defaultNodeColor = computed(QtGui.QColor, "_place.defaultNodeColor", "setDefaultNodeColor")
    viewGroup = stored(int, "viewGroup", -1)

    def _sceneChanged(self) -> None:
        self._place.setMRMLScene(self._scene)
        self._nodes.setMRMLScene(self._scene)

    def currentNode(self) -> Any:
        return self._node

    getCurrentNode = currentNode

    def interactionNode(self) -> Any:
        return self._place.interactionNode()

    def tableWidget(self) -> QtWidgets.QTableWidget:
        return self._table

    def markupsPlaceWidget(self) -> qSlicerMarkupsPlaceWidget:
        return self._place

    def markupsSelectorComboBox(self) -> qMRMLNodeComboBox:
        return self._nodes

    def setNodeBaseName(self, newNodeBaseName: str) -> None:
        self._nodes.baseName = newNodeBaseName

    def setNodeSelectorVisible(self, visible: bool) -> None:
        self._nodes.setVisible(visible)

    def setOptionsVisible(self, visible: bool) -> None:
        self._place.setVisible(visible)

    def setEnterPlaceModeOnNodeChange(self, enable: bool) -> None:
        self.enterPlaceModeOnNodeChange = enable

    def setJumpToSliceEnabled(self, enable: bool) -> None:
        self.jumpToSliceEnabled = enable

    def setNodeColor(self, color: QtGui.QColor) -> None:
        self._place.setNodeColor(color)

    def setDefaultNodeColor(self, color: QtGui.QColor) -> None:
        self._place.setDefaultNodeColor(color)

    def _nodeChosen(self, node: Any) -> None:
        self.setCurrentNode(node)
        if self.enterPlaceModeOnNodeChange:
            self._place.setPlaceModeEnabled(node is not None)

    def setCurrentNode(self, currentNode: Any) -> None:
        if _markups_or_none(currentNode) is self._node:
            return
        self._node = _markups_or_none(currentNode)
        blocked = self._nodes.blockSignals(True)
        self._nodes.setCurrentNode(self._node)
        self._nodes.blockSignals(blocked)
        self._place.setCurrentNode(self._node)
        self._observations.leave("node")
        if self._node is not None:
            events = [getattr(self._node, name) for name in _POINT_EVENTS]
            self._observations.watch("node", self._node, [*events, "ModifiedEvent"], "_showPoints")
        self._showPoints()
        self.markupsNodeChanged.emit()
        self.markupsFiducialNodeChanged.emit()

    def _showPoints(self) -> None:
        count = self._node.GetNumberOfControlPoints() if self._node is not None else 0
        blocked = self._table.blockSignals(True)
        self._table.setRowCount(count)
        for row in range(count):
            defined = self._node.GetNthControlPointPositionStatus(row) == self._node.PositionDefined
            position = self._node.GetNthControlPointPosition(row)
            numbers = [f"{value:.3f}" if defined else "" for value in position]
            for column, text in enumerate((self._node.GetNthControlPointLabel(row), *numbers)):
                item = self._table.item(row, column)
                if item is None:
                    item = QtWidgets.QTableWidgetItem()
                    self._table.setItem(row, column, item)
                item.setText(text)
        self._table.blockSignals(blocked)
        self.updateFinished.emit()

    def _edited(self, row: int, column: int) -> None:
        text = self._table.item(row, column).text()
        if column == 0:
            self._node.SetNthControlPointLabel(row, text)
            return
        position = list(self._node.GetNthControlPointPosition(row))
        position[column - 1] = float(text)
        self._node.SetNthControlPointPosition(row, *position)

    def _pointChosen(self, row: int) -> None:
        self.currentMarkupsControlPointSelectionChanged.emit(row)
        self.currentMarkupsFiducialSelectionChanged.emit(row)
        if self.jumpToSliceEnabled and row >= 0:
            slicer.vtkMRMLSliceNode.JumpAllSlices(self._scene, *self._node.GetNthControlPointPosition(row))

    def highlightNthControlPoint(self, n: int) -> None:
        if 0 <= n < self._table.rowCount:
            self._table.selectRow(n)
        else:
            self._table.clearSelection()

    def activate(self) -> None:
        self._place.setCurrentNodeActive(True)

    def placeActive(self, place: bool) -> None:
        self._place.setPlaceModeEnabled(place)
