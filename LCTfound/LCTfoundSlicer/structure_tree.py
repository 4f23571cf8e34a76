"""The tree of structures beside a result: airways, vessels, lungs, lobes, segments; shown, measured, jumped to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from LCTfoundLib.anatomy.structures import STRUCTURES, Lobe, Side, Structure, segments_of_lobe
from LCTfoundSlicer.lung_result import LungCase, labelVolumes

__all__ = ["ColorBy", "StructureTree", "applyColors"]

#: Columns.
_NAME, _VOLUME, _CONFIDENCE = range(3)
#: Below this a structure should be looked at before it is used.
_DOUBTFUL = 0.5
#: Lobes in the colors of their most typical segment.
_LOBE_COLORS = {lobe: segments_of_lobe(lobe)[1].color for lobe in Lobe}


class ColorBy(Enum):
    """What colors tell apart."""

    SEGMENT = "segment"
    LOBE = "lobe"


def applyColors(case: LungCase, colorBy: ColorBy) -> None:
    """Color the segments one by one or lobe by lobe."""
    segmentation = case.node.GetSegmentation()
    for structure in STRUCTURES:
        segment = segmentation.GetSegment(structure.key)
        if segment is not None:
            byLobe = colorBy is ColorBy.LOBE and structure.lobe is not None
            color = _LOBE_COLORS[structure.lobe] if byLobe and structure.lobe else structure.color
            segment.SetColor(*(channel / 255 for channel in color))


class StructureTree:
    """Fills a QTreeWidget with a result and keeps both alike.

    Args:
        widget: the QTreeWidget.
        onSelected: called with the keys of the selected structures.
    """

    def __init__(self, widget: Any, onSelected: Callable[[list[str]], None] | None = None) -> None:
        self.widget = widget
        self.onSelected = onSelected
        self.case: LungCase | None = None
        self._items: dict[str, Any] = {}
        self._groups: dict[str, tuple[Any, list[str]]] = {}
        self._filling = False
        widget.setColumnCount(3)
        widget.setHeaderLabels([_("Structure"), _("mL"), _("Confidence")])
        widget.setSelectionMode(qt.QAbstractItemView.ExtendedSelection)
        header = widget.header()
        header.setStretchLastSection(False)
        header.setSectionResizeMode(_NAME, qt.QHeaderView.Stretch)
        for column in (_VOLUME, _CONFIDENCE):
            header.setSectionResizeMode(column, qt.QHeaderView.ResizeToContents)
        widget.connect("itemChanged(QTreeWidgetItem*,int)", self._itemChanged)
        widget.connect("itemClicked(QTreeWidgetItem*,int)", self._itemClicked)
        widget.connect("itemSelectionChanged()", self._selectionChanged)

    def setCase(self, case: LungCase | None) -> None:
        """Show a result, or nothing."""
        self.case = case if case is not None and case.node is not None else None
        with self._fill():
            self.widget.clear()
            self._items, self._groups = {}, {}
            if self.case is not None:
                self._addAll(self.case)

    def refreshVolumes(self) -> None:
        """Count the volumes again, after an edit."""
        if self.case is not None:
            with self._fill():
                self._showVolumes(labelVolumes(self.case.node))

    def refreshVisibility(self) -> None:
        """Take over what is shown from the display node (which others change, too)."""
        if self.case is None or self.case.node.GetDisplayNode() is None:
            return
        display = self.case.node.GetDisplayNode()
        with self._fill():
            for key, item in self._items.items():
                item.setCheckState(_NAME, _check(display.GetSegmentVisibility(key)))
            for item, keys in self._groups.values():
                shown = [display.GetSegmentVisibility(key) for key in keys]
                state = qt.Qt.Checked if all(shown) else qt.Qt.PartiallyChecked if any(shown) else qt.Qt.Unchecked
                item.setCheckState(_NAME, state)

    def refreshColors(self) -> None:
        """Take over the colors of the segments."""
        if self.case is not None:
            with self._fill():
                for key, item in self._items.items():
                    segment = self.case.node.GetSegmentation().GetSegment(key)
                    if segment is not None:
                        item.setIcon(_NAME, _colorIcon(segment.GetColor()))

    def selectedKeys(self) -> list[str]:
        """Keys of the selected structures; a selected group stands for its members."""
        chosen: list[str] = []
        for item in self.widget.selectedItems():
            chosen += self._keysOf(item)
        return list(dict.fromkeys(chosen))

    def checkedKeys(self) -> list[str]:
        """Keys of the structures that are shown."""
        return [key for key, item in self._items.items() if item.checkState(_NAME) == qt.Qt.Checked]

    # -- filling ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _fill(self) -> Iterator[None]:
        """While the tree is filled, its changes are not the user's."""
        before, self._filling = self._filling, True
        try:
            yield
        finally:
            self._filling = before

    def _addAll(self, case: LungCase) -> None:
        self._structures([self._group("airways", _("Airways"))], STRUCTURES[18:19])
        self._structures([self._group("vessels", _("Vessels"))], STRUCTURES[19:])
        for side, name in ((Side.RIGHT, _("Right lung")), (Side.LEFT, _("Left lung"))):
            lung = self._group(side.value, name)
            for lobe in (lobe for lobe in Lobe if lobe.side is side):
                group = self._group(lobe.name, lobe.label, lung)
                self._structures([group, lung], segments_of_lobe(lobe))
        self._dropEmpty()
        self.widget.expandAll()
        self._showVolumes(labelVolumes(case.node))
        self._showConfidence(case.result.get("confidence", {}))
        self.refreshColors()
        self.refreshVisibility()

    def _item(self, parent: Any, key: str, name: str) -> Any:
        item = qt.QTreeWidgetItem(parent)
        item.setText(_NAME, name)
        item.setData(_NAME, qt.Qt.UserRole, key)
        return item

    def _group(self, key: str, name: str, parent: str | None = None) -> str:
        item = self._item(self._groups[parent][0] if parent else self.widget, key, name)
        self._groups[key] = (item, [])
        return key

    def _structures(self, groups: Sequence[str], structures: Sequence[Structure]) -> None:
        """Add those of the structures that the result has, below the first group; all groups stand for them."""
        assert self.case is not None
        for structure in structures:
            if self.case.node.GetSegmentation().GetSegment(structure.key) is not None:
                parent = self._groups[groups[0]][0]
                self._items[structure.key] = self._item(parent, structure.key, structure.name)
                for group in groups:
                    self._groups[group][1].append(structure.key)

    def _dropEmpty(self) -> None:
        for item, keys in self._groups.values():
            item.setHidden(not keys)

    def _showVolumes(self, volumes: Mapping[str, float]) -> None:
        for key, item in self._items.items():
            item.setText(_VOLUME, f"{volumes.get(key, 0.0):.0f}" if key in volumes else "")
        for item, keys in self._groups.values():
            item.setText(_VOLUME, f"{sum(volumes.get(key, 0.0) for key in keys):.0f}")

    def _showConfidence(self, confidence: Mapping[str, Any]) -> None:
        for key, item in self._items.items():
            value = confidence.get(key)
            if not isinstance(value, (int, float)):
                continue
            doubtful = value < _DOUBTFUL
            item.setText(_CONFIDENCE, f"{100 * value:.0f} %" + (_("  look!") if doubtful else ""))
            item.setIcon(_CONFIDENCE, _barIcon(value))
            if doubtful:
                item.setToolTip(_CONFIDENCE, _("The networks and the anatomy agree little here: check it on the CT."))

    # -- the user --------------------------------------------------------------------------------------------------

    def _keysOf(self, item: Any) -> list[str]:
        # By what it holds: two wrappers of one item need not be the same Python object.
        key = item.data(_NAME, qt.Qt.UserRole)
        return self._groups[key][1] if key in self._groups else [key]

    def _itemChanged(self, item: Any, column: int) -> None:
        if self._filling or self.case is None or column != _NAME:
            return
        if item.checkState(_NAME) == qt.Qt.PartiallyChecked:
            return
        display = self.case.node.GetDisplayNode()
        modifying = display.StartModify()
        for key in self._keysOf(item):
            display.SetSegmentVisibility(key, item.checkState(_NAME) == qt.Qt.Checked)
        display.EndModify(modifying)
        self.refreshVisibility()

    def _itemClicked(self, item: Any, column: int) -> None:
        key = item.data(_NAME, qt.Qt.UserRole)
        if self.case is not None and key in self._items:
            jumpTo(self.case, key)

    def _selectionChanged(self) -> None:
        if self.onSelected is not None:
            self.onSelected(self.selectedKeys())


def jumpTo(case: LungCase, key: str) -> None:
    """All slice views to the middle of a structure."""
    center = case.node.GetSegmentCenterRAS(key)
    if center is not None:
        slicer.vtkMRMLSliceNode.JumpAllSlices(slicer.mrmlScene, *center)


def _check(shown: bool) -> Any:
    return qt.Qt.Checked if shown else qt.Qt.Unchecked


def _colorIcon(color: Any) -> Any:
    pixmap = qt.QPixmap(14, 14)
    pixmap.fill(qt.QColor(*(round(255 * channel) for channel in color)))
    return qt.QIcon(pixmap)


def _barIcon(value: float) -> Any:
    """A small bar as long as the confidence; its length tells, not only its color."""
    width, height = 40, 10
    pixmap = qt.QPixmap(width, height)
    pixmap.fill(qt.QColor(128, 128, 128, 90))
    painter = qt.QPainter(pixmap)
    color = qt.QColor(200, 80, 60) if value < _DOUBTFUL else qt.QColor(70, 150, 90)
    painter.fillRect(0, 0, round(width * min(max(value, 0.0), 1.0)), height, color)
    painter.end()
    return qt.QIcon(pixmap)
