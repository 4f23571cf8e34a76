"""Before and after side by side: two linked axial views of their own, so that the user's others stay as they are."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

import qt
import slicer

from LCTfoundSlicer.translation import tr as _

__all__ = [
    "AFTER_VIEW",
    "BEFORE_VIEW",
    "currentPlace",
    "fit",
    "isShown",
    "legendPixmap",
    "registerLayouts",
    "setOverlay",
    "showSideBySide",
    "showVolumes",
]

BEFORE_VIEW, AFTER_VIEW = "LCTfoundBefore", "LCTfoundAfter"
#: Layouts of Slicer's own and of other extensions have other numbers.
_ALONE, _WITH_PLOT = 5261, 5262
#: Linked views move together within their group only: the user's own views are in group 0.
_GROUP = 5261
_LEGEND_HEIGHT = 36

_VIEW = """<item><view class="vtkMRMLSliceNode" singletontag="{name}">
 <property name="orientation" action="default">Axial</property>
 <property name="viewlabel" action="default">{label}</property>
 <property name="viewcolor" action="default">{color}</property>
 <property name="viewgroup" action="default">{group}</property>
</view></item>"""
_PLOT = '<item splitSize="300"><view class="vtkMRMLPlotViewNode" singletontag="LCTfoundPlot"/></item>'


def _layouts() -> dict[int, str]:
    """Descriptions by number."""
    views = [
        _VIEW.format(name=BEFORE_VIEW, label=escape(_("B")), color="#D55E00", group=_GROUP),
        _VIEW.format(name=AFTER_VIEW, label=escape(_("A")), color="#0072B2", group=_GROUP),
    ]
    alone = f'<layout type="horizontal" split="true">{"".join(views)}</layout>'
    with_plot = f'<layout type="vertical" split="true"><item splitSize="700">{alone}</item>{_PLOT}</layout>'
    return {_ALONE: alone, _WITH_PLOT: with_plot}


def registerLayouts() -> None:
    """Tell Slicer the layouts, which a scene that was saved with one of them asks for."""
    manager = slicer.app.layoutManager()
    if manager is None:
        return
    layouts = manager.layoutLogic().GetLayoutNode()
    for number, description in _layouts().items():
        if not layouts.IsLayoutDescription(number):
            layouts.AddLayoutDescription(number, description)


def isShown() -> bool:
    """Whether the two views are there."""
    manager = slicer.app.layoutManager()
    return manager is not None and manager.layout in (_ALONE, _WITH_PLOT)


def showSideBySide(before: Any, after: Any, chart: Any = None) -> None:
    """Show two volumes, at the place that was looked at; nothing happens without a window.

    Args:
        before, after: volume nodes.
        chart: a vtkMRMLPlotChartNode to show below them; None: without.
    """
    manager = slicer.app.layoutManager()
    if manager is None:
        return
    place = currentPlace()
    registerLayouts()
    manager.setLayout(_ALONE if chart is None else _WITH_PLOT)
    if chart is not None:
        slicer.app.applicationLogic().GetSelectionNode().SetActivePlotChartID(chart.GetID())
        view = slicer.mrmlScene.GetSingletonNode("LCTfoundPlot", "vtkMRMLPlotViewNode")
        if view is not None:
            view.SetPlotChartNodeID(chart.GetID())
    showVolumes(before, after)
    for name in (BEFORE_VIEW, AFTER_VIEW):
        composite = manager.sliceWidget(name).mrmlSliceCompositeNode()
        composite.SetLinkedControl(True)
        composite.SetHotLinkedControl(True)
    fit()  # which also goes to the middle of the volume
    _goTo(place, after)


def fit() -> None:
    """Both images as large as their views allow, which get their size only now if they are new."""
    manager = slicer.app.layoutManager()
    slicer.app.processEvents(qt.QEventLoop.ExcludeUserInputEvents)
    for name in (BEFORE_VIEW, AFTER_VIEW):
        widget = manager.sliceWidget(name) if manager is not None else None
        if widget is not None:
            widget.sliceView().forceRender()
            widget.fitSliceToBackground()


def showVolumes(before: Any, after: Any) -> None:
    """Put volumes into the two views, without maps over them."""
    for name, volume in ((BEFORE_VIEW, before), (AFTER_VIEW, after)):
        composite = _composite(name)
        if composite is not None:
            composite.SetBackgroundVolumeID(volume.GetID() if volume is not None else None)
            composite.SetForegroundVolumeID(None)
            composite.SetLabelVolumeID(None)


def setOverlay(volume: Any, opacity: float) -> None:
    """Lay a map over the view on the right.

    Args:
        volume: volume node; None: no map.
        opacity: 0-1.
    """
    composite = _composite(AFTER_VIEW)
    if composite is not None:
        composite.SetForegroundVolumeID(volume.GetID() if volume is not None else None)
        composite.SetForegroundOpacity(opacity)


def legendPixmap(volume: Any, width: int = 260) -> Any:
    """The colors of a map with their HU, for the panel; the views have Slicer's own color legend beside."""
    display = volume.GetDisplayNode()
    low, high = display.GetWindowLevelMin(), display.GetWindowLevelMax()
    table = display.GetColorNode().GetLookupTable()
    pixmap = qt.QPixmap(width, _LEGEND_HEIGHT)
    pixmap.fill(qt.QColor(0, 0, 0, 0))
    painter = qt.QPainter(pixmap)
    for x in range(width):
        red, green, blue, _alpha = table.GetTableValue(round(255 * x / (width - 1)))
        painter.fillRect(x, 0, 1, _LEGEND_HEIGHT // 2, qt.QColor.fromRgbF(red, green, blue))
    painter.setPen(qt.QPen(qt.QApplication.palette().windowText().color()))
    for share, side in ((0.0, qt.Qt.AlignLeft), (0.5, qt.Qt.AlignHCenter), (1.0, qt.Qt.AlignRight)):
        text = f"{low + share * (high - low):.0f} HU"
        painter.drawText(qt.QRect(0, _LEGEND_HEIGHT // 2, width, _LEGEND_HEIGHT // 2), side, text)
    painter.end()
    return pixmap


def currentPlace() -> list[float] | None:
    """The middle of what is looked at: of the views here, else of Slicer's red one. RAS mm; None without any."""
    names = (AFTER_VIEW, "Red") if isShown() else ("Red",)
    nodes = [_sliceNode(name) for name in names]
    matrices = [node.GetSliceToRAS() for node in nodes if node is not None]
    return [matrices[0].GetElement(row, 3) for row in range(3)] if matrices else None


def _sliceNode(name: str) -> Any:
    return slicer.mrmlScene.GetSingletonNode(name, "vtkMRMLSliceNode")


def _composite(name: str) -> Any:
    manager = slicer.app.layoutManager()
    widget = manager.sliceWidget(name) if manager is not None else None
    return widget.mrmlSliceCompositeNode() if widget is not None else None


def _goTo(place: list[float] | None, volume: Any) -> None:
    """Both views to a height within the volume: the one looked at, else the middle."""
    bounds = [0.0] * 6
    volume.GetRASBounds(bounds)
    low, high = bounds[4:]
    inside = place is not None and low <= place[2] <= high
    height = place[2] if inside else (low + high) / 2
    for name in (BEFORE_VIEW, AFTER_VIEW):
        node = _sliceNode(name)
        if node is not None:
            node.SetSliceOffset(height)
