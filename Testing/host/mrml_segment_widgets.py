"""Stand-ins for the widgets that show a segmentation."""

from __future__ import annotations

from typing import Any

import slicer

from host.ctk_widgets import ctkCheckableComboBox, ctkMenuButton
from host.mrml_base import NODE, Observations, qMRMLWidget
from host.mrml_node_widgets import qMRMLNodeComboBox
from host.qt_compat import QtCore, QtGui, QtWidgets
from host.standin import computed, forwarded, stored

Qt, Signal = QtCore.Qt, QtCore.Signal

_SEGMENT_EVENTS = ("SegmentAdded", "SegmentRemoved", "SegmentModified", "SegmentsOrderModified")


def _segment_ids(segmentationNode: Any) -> tuple[str, ...]:
    return tuple(segmentationNode.GetSegmentation().GetSegmentIDs()) if segmentationNode is not None else ()


def _segmentation_or_none(node: Any) -> Any:
    return node if node is not None and node.IsA("vtkMRMLSegmentationNode") else None


class qMRMLSegmentationShow3DButton(ctkMenuButton):
    """Makes the surfaces of a segmentation, and removes them."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__("Show 3D", parent)
        self._node: Any = None
        self._observations = Observations(self)
        self.setCheckable(True)
        self.setMenu(self._makeMenu())
        self.toggled.connect(self._onToggled)
        self._follow()

    locked = stored(bool, "locked", False, "_follow")

    def setLocked(self, locked: bool) -> None:
        self.locked = locked

    def _makeMenu(self) -> QtWidgets.QMenu:
        menu = QtWidgets.QMenu(self)
        self._smoothing = menu.addAction("Surface smoothing")
        self._smoothing.setCheckable(True)
        self._smoothing.triggered.connect(self._onSmoothing)
        return menu

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        self._observations.leave("node")
        self._node = _segmentation_or_none(node)
        if self._node is not None:
            segmentation = slicer.vtkSegmentation
            events = [getattr(segmentation, name) for name in _SEGMENT_EVENTS]
            events += [segmentation.ContainedRepresentationNamesModified, segmentation.SourceRepresentationModified]
            self._observations.watch("node", self._node, events, "_follow")
        self._follow()

    def _follow(self) -> None:
        segmentation = self._node.GetSegmentation() if self._node is not None else None
        surface = slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()
        if segmentation is None:
            self.setEnabled(False)
            return
        can = segmentation.GetNumberOfSegments() > 0 and segmentation.GetSourceRepresentationName() != surface
        self.setEnabled(can and not self.locked)
        blocked = self.blockSignals(True)
        self.setChecked(segmentation.ContainsRepresentation(surface))
        self.blockSignals(blocked)
        self._smoothing.setChecked(float(segmentation.GetConversionParameter("Smoothing factor") or 0.5) >= 0)

    def _onToggled(self, on: bool) -> None:
        if self._node is None:
            return
        segmentation, converter = self._node.GetSegmentation(), slicer.vtkSegmentationConverter
        surface = converter.GetSegmentationClosedSurfaceRepresentationName()
        labelmap = converter.GetSegmentationBinaryLabelmapRepresentationName()
        if not on:
            if segmentation.GetSourceRepresentationName() != surface:
                segmentation.RemoveRepresentation(surface)
            return
        display = self._node.GetDisplayNode()
        if segmentation.CreateRepresentation(surface) and display is not None:
            display.SetPreferredDisplayRepresentationName3D(surface)
            if segmentation.ContainsRepresentation(labelmap):
                display.SetPreferredDisplayRepresentationName2D(labelmap)

    def _onSmoothing(self, on: bool) -> None:
        if self._node is None:
            return
        segmentation = self._node.GetSegmentation()
        segmentation.SetConversionParameter("Smoothing factor", "0.5" if on else "-0.5")
        if self.checked:
            self._onToggled(False)
            self._onToggled(True)


#: Columns of the table of segments.
_VISIBILITY, _COLOR, _OPACITY, _NAME, _LAYER, _STATUS = range(6)
_SEGMENT_ID = int(Qt.ItemDataRole.UserRole) + 1


class qMRMLSegmentsTableView(qMRMLWidget):
    """The table of a segmentation's segments. (The filter bar and the terminology selector are not imitated.)"""

    selectionChanged = Signal(QtCore.QItemSelection, QtCore.QItemSelection)
    segmentAboutToBeModified = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._hidden: list[str] = []
        self._filling = False
        self._model = QtGui.QStandardItemModel(0, 6, self)
        self._model.setHorizontalHeaderLabels(["", "", "Opacity", "Name", "Layer", "Status"])
        self._table = QtWidgets.QTableView(self)
        self._table.setObjectName("SegmentsTable")
        self._table.setModel(self._model)
        self._table.setSelectionBehavior(QtWidgets.QTableView.SelectionBehavior.SelectRows)
        self._table.setSelectionMode(QtWidgets.QTableView.SelectionMode.ExtendedSelection)
        self._table.verticalHeader().hide()
        header = self._table.horizontalHeader()
        header.setSectionResizeMode(QtWidgets.QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(_NAME, QtWidgets.QHeaderView.ResizeMode.Stretch)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._table)
        self._model.itemChanged.connect(self._edited)
        self._table.doubleClicked.connect(self._doubleClicked)
        self._table.selectionModel().selectionChanged.connect(self._selected)
        self._table.setColumnHidden(_LAYER, True)

    def _column(column: int) -> Any:  # noqa: N805
        return computed(
            bool,
            lambda self: not self._table.isColumnHidden(column),
            lambda self, value: self._table.setColumnHidden(column, not value),
        )

    visibilityColumnVisible, colorColumnVisible = _column(_VISIBILITY), _column(_COLOR)
    opacityColumnVisible, statusColumnVisible, layerColumnVisible = _column(_OPACITY), _column(_STATUS), _column(_LAYER)
    del _column
    selectionMode = computed(int, "_table.selectionMode", "setSelectionMode")
    headerVisible = computed(bool, lambda self: not self._table.horizontalHeader().isHidden(), "setHeaderVisible")
    readOnly = computed(bool, lambda self: int(self._table.editTriggers) == 0, "setReadOnly")
    filterBarVisible = stored(bool, "filterBarVisible", False)
    textFilter = stored(str, "textFilter", "", "_refill")
    jumpToSelectedSegmentEnabled = stored(bool, "jumpToSelectedSegmentEnabled", False)
    segmentCount = computed(int, lambda self: self._model.rowCount())
    useTerminologySelector = stored(bool, "useTerminologySelector", True)

    # content

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        if _segmentation_or_none(node) is self._node:
            return
        self._observations.leave("node")
        self._node = _segmentation_or_none(node)
        if self._node is not None:
            events = [getattr(slicer.vtkSegmentation, name) for name in _SEGMENT_EVENTS]
            self._observations.watch("node", self._node, [*events, self._node.DisplayModifiedEvent], "_refill")
        self._refill()

    def tableWidget(self) -> QtWidgets.QTableView:
        return self._table

    def model(self) -> QtCore.QAbstractItemModel:
        return self._model

    def displayedSegmentIDs(self) -> tuple[str, ...]:
        wanted = self.textFilter.lower()
        names = {key: self._node.GetSegmentation().GetSegment(key).GetName() for key in _segment_ids(self._node)}
        return tuple(key for key, name in names.items() if key not in self._hidden and wanted in name.lower())

    def setHideSegments(self, segmentIDs: list[str]) -> None:
        self._hidden = list(segmentIDs)
        self._refill()

    def hideSegments(self) -> tuple[str, ...]:
        return tuple(self._hidden)

    def _refill(self) -> None:
        """Show the segments as they are; keep the selection and, where the rows are the same, the items."""
        if self._filling:
            return
        self._filling = True
        keys, chosen = self.displayedSegmentIDs(), self.selectedSegmentIDs()
        if keys != tuple(self.segmentIDForRow(row) for row in range(self._model.rowCount())):
            self._model.setRowCount(0)
            for key in keys:
                self._model.appendRow([self._item(key, column) for column in range(6)])
            self.setSelectedSegmentIDs([key for key in chosen if key in keys])
        for row, key in enumerate(keys):
            self._showSegment(row, key)
        self._filling = False

    def _item(self, segmentID: str, column: int) -> QtGui.QStandardItem:
        item = QtGui.QStandardItem()
        item.setData(segmentID, _SEGMENT_ID)
        item.setCheckable(column == _VISIBILITY)
        item.setEditable(column in (_NAME, _OPACITY))
        return item

    def _showSegment(self, row: int, segmentID: str) -> None:
        segment, display = self._node.GetSegmentation().GetSegment(segmentID), self._node.GetDisplayNode()
        self._model.item(row, _NAME).setText(segment.GetName())
        color = QtGui.QPixmap(14, 14)
        color.fill(QtGui.QColor.fromRgbF(*segment.GetColor()))
        self._model.item(row, _COLOR).setIcon(QtGui.QIcon(color))
        visible = display is not None and display.GetSegmentVisibility(segmentID)
        self._model.item(row, _VISIBILITY).setCheckState(Qt.CheckState.Checked if visible else Qt.CheckState.Unchecked)
        opacity = display.GetSegmentOpacity3D(segmentID) if display is not None else 1.0
        self._model.item(row, _OPACITY).setText(f"{opacity:.2f}")
        self._model.item(row, _LAYER).setText(str(self._node.GetSegmentation().GetLayerIndex(segmentID)))
        status = slicer.vtkSlicerSegmentationsModuleLogic.GetSegmentStatus(segment)
        name = slicer.vtkSlicerSegmentationsModuleLogic.GetSegmentStatusAsHumanReadableString(status)
        self._model.item(row, _STATUS).setText(name)

    # what the user does

    def _edited(self, item: QtGui.QStandardItem) -> None:
        if self._filling or self._node is None:
            return
        segmentID, display = item.data(_SEGMENT_ID), self._node.GetDisplayNode()
        self.segmentAboutToBeModified.emit(segmentID)
        if item.column() == _VISIBILITY and display is not None:
            display.SetSegmentVisibility(segmentID, item.checkState() == Qt.CheckState.Checked)
        elif item.column() == _NAME:
            self._node.GetSegmentation().GetSegment(segmentID).SetName(item.text())
        elif item.column() == _OPACITY and display is not None:
            display.SetSegmentOpacity(segmentID, float(item.text()))

    def _doubleClicked(self, index: QtCore.QModelIndex) -> None:
        if index.column() != _COLOR or self.readOnly:
            return
        segmentID = self.segmentIDForRow(index.row())
        segment = self._node.GetSegmentation().GetSegment(segmentID)
        color = QtWidgets.QColorDialog.getColor(QtGui.QColor.fromRgbF(*segment.GetColor()), self)
        if color.isValid():
            self.segmentAboutToBeModified.emit(segmentID)
            segment.SetColor(color.redF(), color.greenF(), color.blueF())

    def _selected(self, selected: QtCore.QItemSelection, deselected: QtCore.QItemSelection) -> None:
        self.selectionChanged.emit(selected, deselected)
        if self.jumpToSelectedSegmentEnabled:
            self.jumpSlices()

    # selection

    def rowForSegmentID(self, segmentID: str) -> int:
        rows = [row for row in range(self._model.rowCount()) if self.segmentIDForRow(row) == segmentID]
        return rows[0] if rows else -1

    def segmentIDForRow(self, row: int) -> str:
        item = self._model.item(row, _NAME)
        return item.data(_SEGMENT_ID) if item is not None else ""

    def selectedSegmentIDs(self) -> tuple[str, ...]:
        rows = sorted({index.row() for index in self._table.selectionModel().selectedIndexes})
        return tuple(self.segmentIDForRow(row) for row in rows)

    def setSelectedSegmentIDs(self, segmentIDs: list[str]) -> None:
        selection = QtCore.QItemSelection()
        for row in (self.rowForSegmentID(key) for key in segmentIDs):
            if row >= 0:
                selection.select(self._model.index(row, 0), self._model.index(row, self._model.columnCount() - 1))
        self._table.selectionModel().select(selection, QtCore.QItemSelectionModel.SelectionFlag.ClearAndSelect)

    def clearSelection(self) -> None:
        self._table.clearSelection()

    def showOnlySelectedSegments(self) -> None:
        chosen = self.selectedSegmentIDs()
        for key in self.displayedSegmentIDs() if chosen else []:
            self._node.GetDisplayNode().SetSegmentVisibility(key, key in chosen)

    def toggleSelectedSegmentsVisibility(self) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        for key in self.selectedSegmentIDs() if display is not None else []:
            display.SetSegmentVisibility(key, not display.GetSegmentVisibility(key))

    def jumpSlices(self) -> None:
        chosen = self.selectedSegmentIDs()
        center = self._node.GetSegmentCenterRAS(chosen[0]) if chosen else None
        if center is not None:
            slicer.vtkMRMLSliceNode.JumpAllSlices(self._scene or self._node.GetScene(), *center)

    # looks

    def setSelectionMode(self, mode: int) -> None:
        self._table.setSelectionMode(QtWidgets.QTableView.SelectionMode(mode))

    def setHeaderVisible(self, visible: bool) -> None:
        self._table.horizontalHeader().setVisible(visible)

    def setReadOnly(self, readOnly: bool) -> None:
        triggers = QtWidgets.QTableView.EditTrigger
        edit = triggers.DoubleClicked | triggers.EditKeyPressed
        self._table.setEditTriggers(triggers.NoEditTriggers if readOnly else edit)

    def setVisibilityColumnVisible(self, visible: bool) -> None:
        self.visibilityColumnVisible = visible

    def setColorColumnVisible(self, visible: bool) -> None:
        self.colorColumnVisible = visible

    def setOpacityColumnVisible(self, visible: bool) -> None:
        self.opacityColumnVisible = visible

    def setStatusColumnVisible(self, visible: bool) -> None:
        self.statusColumnVisible = visible

    def setLayerColumnVisible(self, visible: bool) -> None:
        self.layerColumnVisible = visible

    def setTextFilter(self, textFilter: str) -> None:
        self.textFilter = textFilter

    def setJumpToSelectedSegmentEnabled(self, enable: bool) -> None:
        self.jumpToSelectedSegmentEnabled = enable


class qMRMLSegmentSelectorWidget(qMRMLWidget):
    """A segmentation and one (or some) of its segments."""

    currentNodeChanged = Signal((object,), (bool,))
    currentSegmentChanged = Signal(str)
    segmentSelectionChanged = Signal("QStringList")
    nodeAboutToBeEdited = Signal(object)
    signal_signatures = {
        f"{name}(vtkMRMLNode*)": f"{name}({NODE})" for name in ("currentNodeChanged", "nodeAboutToBeEdited")
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._segmentID, self._chosen = "", []
        self._nodes = qMRMLNodeComboBox(self)
        self._nodes.nodeTypes = ["vtkMRMLSegmentationNode"]
        self._nodes.addEnabled = self._nodes.removeEnabled = False
        self._one, self._many = QtWidgets.QComboBox(), ctkCheckableComboBox()
        self._layout = QtWidgets.QBoxLayout(QtWidgets.QBoxLayout.Direction.TopToBottom, self)
        self._layout.setContentsMargins(0, 0, 0, 0)
        for widget in (self._nodes, self._one, self._many):
            self._layout.addWidget(widget)
        self._nodes.currentNodeChanged[object].connect(self._nodeChanged)
        self._nodes.nodeAboutToBeEdited.connect(self.nodeAboutToBeEdited.emit)
        self._one.currentIndexChanged.connect(self._segmentChosen)
        self._many.checkedIndexesChanged.connect(self._segmentsChecked)
        self._refill()

    noneEnabled = stored(bool, "noneEnabled", False, "_refill")
    editEnabled = forwarded(bool, "_nodes.editEnabled")
    segmentationNodeSelectorVisible = computed(
        bool, lambda self: not self._nodes.isHidden(), lambda self, v: self._nodes.setVisible(v)
    )
    multiSelection = stored(bool, "multiSelection", False, "_refill")
    horizontalLayout = stored(bool, "horizontalLayout", False, "_arrange")
    selectNodeUponCreation = forwarded(bool, "_nodes.selectNodeUponCreation")

    def _sceneChanged(self) -> None:
        self._nodes.setMRMLScene(self._scene)

    def _arrange(self) -> None:
        direction = QtWidgets.QBoxLayout.Direction
        self._layout.setDirection(direction.LeftToRight if self.horizontalLayout else direction.TopToBottom)

    def _nodeChanged(self, node: Any) -> None:
        self._observations.leave("node")
        if node is not None:
            events = [getattr(slicer.vtkSegmentation, name) for name in _SEGMENT_EVENTS]
            self._observations.watch("node", node, events, "_refill")
        self._refill()
        self.currentNodeChanged[object].emit(node)
        self.currentNodeChanged[bool].emit(node is not None)

    def _refill(self) -> None:
        keys = self.segmentIDs()
        segmentation = self.currentNode().GetSegmentation() if keys else None
        for combo in (self._one, self._many):
            blocked = combo.blockSignals(True)
            combo.clear()
            if combo is self._one and self.noneEnabled:
                combo.addItem("None", "")
            for key in keys:
                combo.addItem(segmentation.GetSegment(key).GetName(), key)
            combo.blockSignals(blocked)
        self._one.setVisible(not self.multiSelection and bool(keys))
        self._many.setVisible(self.multiSelection and bool(keys))
        self._restore(keys)

    def _restore(self, keys: tuple[str, ...]) -> None:
        if self.multiSelection:
            self._check([key for key in self._chosen if key in keys])
            return
        wanted = self._segmentID
        if wanted not in keys and not (self.noneEnabled and not wanted):
            wanted = keys[0] if keys else ""
        blocked = self._one.blockSignals(True)
        self._one.setCurrentIndex(self._one.findData(wanted) if keys else -1)
        self._one.blockSignals(blocked)
        if keys and wanted != self._segmentID:
            self._segmentID = wanted
            self.currentSegmentChanged.emit(wanted)

    def _segmentChosen(self, row: int) -> None:
        self._segmentID = self._one.itemData(row) or ""
        self.currentSegmentChanged.emit(self._segmentID)

    def _check(self, keys: list[str]) -> None:
        blocked = self._many.blockSignals(True)
        for row in range(self._many.count):
            state = Qt.CheckState.Checked if self._many.itemData(row) in keys else Qt.CheckState.Unchecked
            self._many.setCheckState(self._many.model().index(row, 0), state)
        self._many.blockSignals(blocked)
        self._chosen = keys

    def _segmentsChecked(self) -> None:
        self._chosen = [self._many.itemData(index.row()) for index in self._many.checkedIndexes()]
        self.segmentSelectionChanged.emit(self._chosen)

    def currentNode(self) -> Any:
        return self._nodes.currentNode()

    def currentNodeID(self) -> str:
        return self._nodes.currentNodeID

    def currentSegmentID(self) -> str:
        return "" if self.multiSelection else self._segmentID

    def selectedSegmentIDs(self) -> tuple[str, ...]:
        return tuple(self._chosen)

    def segmentIDs(self) -> tuple[str, ...]:
        return _segment_ids(self.currentNode())

    def setCurrentNode(self, node: Any) -> None:
        self._nodes.setCurrentNode(node)

    def setCurrentNodeID(self, nodeID: str) -> None:
        self._nodes.setCurrentNodeID(nodeID)

    def setCurrentSegmentID(self, segmentID: str) -> None:
        row = self._one.findData(segmentID)
        if row >= 0 and not self.multiSelection:
            self._one.setCurrentIndex(row)

    def setSelectedSegmentIDs(self, segmentIDList: list[str]) -> None:
        before = self._chosen
        self._check([key for key in segmentIDList if key in self.segmentIDs()])
        if self._chosen != before:
            self.segmentSelectionChanged.emit(self._chosen)
