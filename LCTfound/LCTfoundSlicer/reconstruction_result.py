"""A reconstruction in the scene: new volumes that say what they are, numbers with lights, and a plot over the slices.

The input is never touched. All that a reopened scene needs travels with the result's node: what the engine told as an
attribute; the CT, what there was without the method, maps and plot as node references.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer
from vtk.util import numpy_support

from LCTfoundSlicer.mrml import (
    EngineGeometry,
    InputChanged,
    InputSignature,
    engineGeometry,
    patientGeometry,
    placeUnderStudyOf,
)
from LCTfoundSlicer.setup_checks import Light
from LCTfoundSlicer.translation import tr as _

__all__ = ["QualityRow", "ReconstructionCase", "Source", "applyReconstruction", "qualityRows"]

_CT = "LCTfound.CT"
_BEFORE = "LCTfound.Before"
_DIFFERENCE = "LCTfound.Difference"
_UNCERTAINTY = "LCTfound.Uncertainty"
_CHART = "LCTfound.Chart"
#: Of a chart: what it shows, for a menu.
_SHORT = "LCTfound.ChartShows"
_RESULT = "LCTfound.Reconstruction"
_USE = "Research use only; not a medical device."
#: Maps are shown up to this many HU, as in the shell's report.
_MOST_HU = 200
#: Window and level for lungs, HU.
_LUNG = (1600, -500)
#: Name of the engine for the result in its tables.
_AFTER = "Reconstruction"


class ReconstructionCase:
    """A volume node as a result of a reconstruction.

    Args:
        node: a vtkMRMLScalarVolumeNode; any one will do, what is missing reads as empty.
    """

    def __init__(self, node: Any) -> None:
        self.node = node

    @property
    def isResult(self) -> bool:
        """Whether the node holds a result of ours."""
        return bool(self.node and self.node.GetAttribute(_RESULT))

    @property
    def told(self) -> dict[str, Any]:
        """The worker's ``result.json``; empty where the attribute is none."""
        try:
            value = json.loads(self.node.GetAttribute(_RESULT) or "{}") if self.node else {}
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def volumeNode(self) -> Any:
        """The CT that it was made from; None when that is gone, or of measured projections."""
        return self._reference(_CT)

    @property
    def before(self) -> Any:
        """What there was without the method; the CT itself where nothing was simulated."""
        return self._reference(_BEFORE)

    @property
    def difference(self) -> Any:
        """Result minus reference, or, without one, minus the CT."""
        return self._reference(_DIFFERENCE)

    @property
    def uncertainty(self) -> Any:
        """Half of the width of the 90 % interval; None where the method does not tell."""
        return self._reference(_UNCERTAINTY)

    @property
    def charts(self) -> list[Any]:
        """Plots: over the slices, and what else the method told in curves."""
        if not self.node:
            return []
        found = [self.node.GetNthNodeReference(_CHART, n) for n in range(self.node.GetNumberOfNodeReferences(_CHART))]
        return [chart for chart in found if chart is not None]

    @staticmethod
    def shownBy(chart: Any) -> str:
        """What a chart shows, for a menu."""
        return chart.GetAttribute(_SHORT) or chart.GetName()

    @property
    def isSimulated(self) -> bool:
        """Whether the CT is the truth that the result is compared with."""
        return self.told.get("reference_name") is not None

    def _reference(self, role: str) -> Any:
        return self.node.GetNodeReference(role) if self.node else None


# -- from the worker into the scene ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A CT that was sent off: its volume node, as it was then, and the geometry that it was sent with."""

    volumeNode: Any
    signature: InputSignature
    geometry: EngineGeometry

    @classmethod
    def of(cls, volumeNode: Any) -> Source:
        return cls(volumeNode, InputSignature.of(volumeNode), engineGeometry(volumeNode))


def applyReconstruction(folder: Path, name: str, source: Source | None) -> Iterator[float]:
    """Make the nodes of a result, in steps short enough for the window; none stays if anything fails.

    Args:
        folder: the worker's output.
        name: what was done, such as "sparse view 16".
        source: the CT that it was made from; None of measured projections.

    Yields:
        The share done, 0-1.

    Returns:
        The result's volume node.

    Raises:
        InputChanged: the input is gone or another one now.
    """
    told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    arrays = {kind: np.load(folder / f"{kind}.npy", allow_pickle=False) for kind in told["files"]}
    yield 0.2
    if source is not None and not source.signature.isCurrent:
        raise InputChanged(_("The CT was removed or changed while it was computed; run again."))
    maker = _Maker(told, name, source)
    try:
        node = maker.image(arrays["image"])
        yield 0.4
        maker.before(arrays["before"])
        yield 0.55
        truth = arrays.get("reference", arrays["before"])
        maker.difference(np.subtract(arrays["image"], truth, dtype=np.int32).clip(-32768, 32767).astype(np.int16))
        yield 0.7
        if "interval" in arrays:
            maker.uncertainty(arrays["interval"])
        yield 0.85
        maker.plots()
        yield 0.95
    except BaseException:
        maker.undo()
        raise
    return node


class _Maker:
    """Makes the nodes of one result, and takes them away again."""

    def __init__(self, told: Mapping[str, Any], name: str, source: Source | None) -> None:
        self._told, self._name = told, name
        self._volumeNode = None if source is None else source.volumeNode
        self._ijkToRAS = (patientGeometry() if source is None else source.geometry).ijkToRAS(told["grid"])
        self._made: list[Any] = []
        self._result: Any = None

    def image(self, array: np.ndarray) -> Any:
        """The result: its name says that it is derived, and its attributes say all that is known."""
        nature, told = self._told["nature"], {_RESULT: json.dumps(self._told)}
        node = self._result = self._volume(self._named(_nature(nature)), array, nature, told)
        self._showAsInput(node)
        node.SetDescription(self._told["notice"])
        if self._volumeNode is not None:
            node.SetNodeReferenceID(_CT, self._volumeNode.GetID())
        return node

    def before(self, array: np.ndarray) -> None:
        """What was simulated, or made of projections, as a volume of its own; a CT that was measured is the input."""
        node, name = self._volumeNode, self._told["before_name"]
        if self._told["reference_name"] is not None:
            node = self._volume(self._named(f"{name}, {_('simulated')}"), array, "simulated scan")
            self._showAsInput(node)
        elif node is None:
            node = self._volume(self._named(name), array, "derived")
            self._showAsInput(node)
        self._refer(_BEFORE, node)

    def difference(self, array: np.ndarray) -> None:
        simulated = self._told["reference_name"] is not None
        node = self._volume(self._named(_("difference to the CT") if simulated else _("what changed")), array)
        self._showAsMap(node, _differenceColors(self._made), -_MOST_HU, _("Difference, HU"))
        self._refer(_DIFFERENCE, node)

    def uncertainty(self, array: np.ndarray) -> None:
        node = self._volume(self._named(_("expected error")), array)
        self._showAsMap(node, _uncertaintyColors(self._made), 0, _("Expected error (90 %), HU"))
        self._refer(_UNCERTAINTY, node)

    def plots(self) -> None:
        """Error of each slice where there is a reference, else what each leaves of the measurements unexplained.

        Then what else the engine tells in curves, such as the noise's spectra.
        """
        curves, unit = _curves(self._told)
        count = max((len(values) for values in curves.values()), default=0)
        if count > 1:
            numbers = list(self._told["slices"] or range(1, count + 1))
            self._plot(_("by slice"), unit, (_("Slice"), numbers), curves)
        for told in self._told.get("curves", []):
            what = {"noise spectrum": _("noise spectrum")}.get(told["title"], told["title"])
            names = {"before": _("before"), "after": _("after"), "removed": _("removed")}
            curves = {names.get(name, name): values for name, values in told["values"].items()}
            self._plot(what, _("Noise power, HU^2 mm^2"), (told["axis"], told["x"]), curves, marked=False)

    def _plot(
        self,
        what: str,
        title: str,
        axis: tuple[str, Sequence[float]],
        curves: Mapping[str, Sequence[float | None]],
        marked: bool = True,
    ) -> None:
        """A chart with its table and series."""
        below, places = axis
        table = self._add("vtkMRMLTableNode", self._named(what))
        for name, values in {below: places, **curves}.items():
            plain = np.array([np.nan if value is None else float(value) for value in values])
            column = numpy_support.numpy_to_vtk(plain, deep=True)
            column.SetName(name)
            table.AddColumn(column)
        table.SetUseColumnTitleAsColumnHeader(True)
        chart = self._add("vtkMRMLPlotChartNode", self._named(f"{what}, {_('plot')}"), {_SHORT: what})
        chart.SetTitle(self._named(title))
        chart.SetXAxisTitle(below)
        chart.SetYAxisTitle(title)
        style = slicer.vtkMRMLPlotSeriesNode
        for name, color in zip(curves, _CURVES, strict=False):
            series = self._add("vtkMRMLPlotSeriesNode", name)
            series.SetAndObserveTableNodeID(table.GetID())
            series.SetXColumnName(below)
            series.SetYColumnName(name)
            series.SetPlotType(style.PlotTypeScatter)
            series.SetMarkerStyle(style.MarkerStyleCircle if marked else style.MarkerStyleNone)
            series.SetColor(*color)
            chart.AddAndObservePlotSeriesNodeID(series.GetID())
        self._result.AddNodeReferenceID(_CHART, chart.GetID())

    def undo(self) -> None:
        """With the volumes goes what shows them, which the scene would keep."""
        for node in reversed(self._made):
            if node.IsA("vtkMRMLDisplayableNode"):
                for display in [node.GetNthDisplayNode(n) for n in range(node.GetNumberOfDisplayNodes())]:
                    slicer.mrmlScene.RemoveNode(display)
            slicer.mrmlScene.RemoveNode(node)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _named(self, what: str) -> str:
        whose = self._told["case"] if self._volumeNode is None else self._volumeNode.GetName()
        return f"{whose} {self._name} ({what})"

    def _add(self, kind: str, name: str, attributes: Mapping[str, str] | None = None) -> Any:
        """A node that has its attributes when it enters the scene: selectors look at them then."""
        node = slicer.mrmlScene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetName(slicer.mrmlScene.GenerateUniqueName(name))
        for key, value in {"LCTfound.IntendedUse": _USE, **(attributes or {})}.items():
            node.SetAttribute(key, value)
        slicer.mrmlScene.AddNode(node)
        self._made.append(node)
        if kind != "vtkMRMLPlotSeriesNode" and self._volumeNode is not None:
            placeUnderStudyOf(node, self._volumeNode)
        return node

    def _volume(
        self,
        name: str,
        array: np.ndarray,
        nature: str = "map of a reconstruction",
        attributes: Mapping[str, str] | None = None,
    ) -> Any:
        marks = {"LCTfound.Nature": nature, "LCTfound.Derived": "YES"}
        marks["LCTfound.Synthetic"] = "YES" if self._told["synthetic"] else "NO"
        node = self._add("vtkMRMLScalarVolumeNode", name, marks | dict(attributes or {}))
        slicer.util.updateVolumeFromArray(node, array)
        node.SetIJKToRASMatrix(self._ijkToRAS)
        if self._volumeNode is not None:
            node.SetAndObserveTransformNodeID(self._volumeNode.GetTransformNodeID())
        node.CreateDefaultDisplayNodes()
        return node

    def _refer(self, role: str, node: Any) -> None:
        self._result.SetNodeReferenceID(role, node.GetID())

    def _showAsInput(self, node: Any) -> None:
        """In the input's window, as it is now, so that both can be compared; in a lung window without an input."""
        display, like = node.GetDisplayNode(), self._volumeNode.GetDisplayNode() if self._volumeNode else None
        if like is None:
            display.SetAutoWindowLevel(False)
            display.SetWindowLevel(*_LUNG)
            return
        display.SetAndObserveColorNodeID(like.GetColorNodeID())
        display.SetAutoWindowLevel(False)
        display.SetWindowLevel(like.GetWindow(), like.GetLevel())
        display.SetInterpolate(like.GetInterpolate())

    def _showAsMap(self, node: Any, colors: Any, low: float, title: str) -> None:
        display = node.GetDisplayNode()
        display.SetAndObserveColorNodeID(colors.GetID())
        display.SetAutoWindowLevel(False)
        display.SetWindowLevelMinMax(low, _MOST_HU)
        legend = slicer.modules.colors.logic().AddDefaultColorLegendDisplayNode(node)
        legend.SetAndObserveColorNodeID(colors.GetID())
        legend.SetTitleText(title)
        legend.SetNumberOfLabels(5)
        legend.SetLabelFormat("%.0f")
        legend.SetVisibility(True)


def _nature(nature: str) -> str:
    """Nothing that comes out of here is as a scanner made it."""
    words = {"simulated scan": _("derived, simulated scan"), "synthetic detail": _("derived, synthetic detail")}
    return words.get(nature, _("derived"))


#: Of the curves of a plot: before, after, removed (Okabe and Ito).
_CURVES = ((0.835, 0.369, 0.0), (0.0, 0.447, 0.698), (0.4, 0.4, 0.4))


def _curves(told: Mapping[str, Any]) -> tuple[dict[str, Sequence[float | None]], str]:
    """Values of each slice, by name, and what they are."""
    if told.get("errors"):
        return dict(told["errors"]), _("Error inside the body (RMSE), HU")
    if told.get("residual"):
        return {_("Residual"): [100 * share for share in told["residual"]]}, _("Residual, % of the measurements")
    return {}, ""


# -- colors of the maps ----------------------------------------------------------------------------------------------


def _differenceColors(made: list[Any]) -> Any:
    """Blue below, red above, black where there is no difference, as in the shell's report."""
    return _colorTable(
        made, "LCTfound difference", ((0.55, 0.8, 1.0), (0.0, 0.35, 0.9), (0, 0, 0), (0.9, 0.2, 0.0), (1, 0.8, 0.4))
    )


def _uncertaintyColors(made: list[Any]) -> Any:
    """Black where the result is sure; dark red to bright yellow where it is not."""
    return _colorTable(
        made, "LCTfound expected error", ((0, 0, 0), (0.45, 0.1, 0.3), (0.85, 0.3, 0.1), (1.0, 0.95, 0.45))
    )


def _colorTable(made: list[Any], name: str, stops: Sequence[Sequence[float]]) -> Any:
    """The scene's color table of that name; where there is none, a new one, even steps between colors (RGB, 0-1).

    A new one is added to ``made``.
    """
    table = slicer.mrmlScene.GetFirstNodeByName(name)
    if table is not None and table.IsA("vtkMRMLColorTableNode"):
        return table
    table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLColorTableNode", name)
    made.append(table)
    table.SetTypeToUser()
    table.SetNumberOfColors(256)
    places = np.linspace(0, 255, len(stops))
    channels = [np.interp(np.arange(256), places, values) for values in np.transpose(stops)]
    for index, (red, green, blue) in enumerate(np.transpose(channels).tolist()):
        table.SetColor(index, str(index), red, green, blue, 1.0)
    table.GetLookupTable().SetTableRange(0, 255)
    table.SetAttribute("Category", "LCTfound")
    return table


# -- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QualityRow:
    """A line of the panel's table.

    Attributes:
        what: is measured.
        before, after: without and with the method, as text.
        light: of ``after``.
        hint: why the light is what it is.
    """

    what: str
    before: str
    after: str
    light: Light
    hint: str


@dataclass(frozen=True)
class _Measure:
    """A number of the agreement with the reference, and what this project aims at for it."""

    key: str
    target: float
    more: bool
    form: str


_MEASURES = (
    _Measure("psnr", 36.0, True, "{:.1f}"),
    _Measure("ssim", 0.93, True, "{:.3f}"),
    _Measure("rmse_hu", 35.0, False, "{:.0f}"),
)
#: Shares of pixels within the 90 % interval that are as told, and that are still near it.
_AS_TOLD, _NEARLY = (0.85, 0.95), (0.75, 0.99)
#: Shares of the measurements left unexplained that are little, and that are not yet much.
_LITTLE, _SOME = 0.01, 0.03
#: HU by which a finer CT may miss the coarse one: what rounding to whole HU leaves.
_EXACT = 0.51


def qualityRows(case: ReconstructionCase) -> list[QualityRow]:
    """What is known of a result's quality; without a reference that is little, and a line says so."""
    told = case.told
    return [*_agreementRows(told), *_coverageRow(told), *_residualRow(told), *_exactRow(told)]


def _agreementRows(told: Mapping[str, Any]) -> list[QualityRow]:
    agreement = told.get("agreement") or {}
    before, after = agreement.get(told.get("before_name"), {}), agreement.get(_AFTER, {})
    if not after:
        hint = _("Nothing to compare with: how near this image is to the truth is not known.")
        return [QualityRow(_("Agreement with the truth"), "", _("not known"), Light.UNKNOWN, hint)]
    titles = {"psnr": _("PSNR, dB"), "ssim": _("SSIM"), "rmse_hu": _("RMSE, HU")}
    return [_agreementRow(titles[measure.key], measure, before, after) for measure in _MEASURES]


def _agreementRow(title: str, measure: _Measure, before: Mapping[str, Any], after: Mapping[str, Any]) -> QualityRow:
    values = [found.get(measure.key) for found in (before, after)]
    texts = [_text(measure, value) for value in values]
    old = _better(measure, values[0]) if before else None
    new = _better(measure, values[1])
    if new is None:
        light, hint = Light.UNKNOWN, _("Not measured.")
    elif old is not None and new <= old:
        light, hint = Light.PROBLEM, _("Not better than without the method.")
    elif new < _better(measure, measure.target):
        light, hint = Light.WARNING, _("Better than without the method; the aim of {target} is not reached.")
    else:
        light, hint = Light.GOOD, _("Better than without the method; the aim of {target} is reached.")
    return QualityRow(title, *texts, light, hint.format(target=measure.form.format(measure.target)))


def _better(measure: _Measure, value: float | None) -> float | None:
    """The number turned so that more is better; the same image has no PSNR, as it would be infinite."""
    if value is None:
        return float("inf") if measure.key == "psnr" else None
    return value if measure.more else -value


def _text(measure: _Measure, value: float | None) -> str:
    if value is None:
        return _("same") if measure.key == "psnr" else ""
    return measure.form.format(value)


def _coverageRow(told: Mapping[str, Any]) -> list[QualityRow]:
    covered = (told.get("agreement") or {}).get(_AFTER, {}).get("covered")
    if covered is None:
        return []
    light = Light.PROBLEM
    for bounds, better in ((_NEARLY, Light.WARNING), (_AS_TOLD, Light.GOOD)):
        light = better if bounds[0] <= covered <= bounds[1] else light
    hint = _("Share of the body's pixels whose true value lies in the interval; it should be 90 %.")
    return [QualityRow(_("Truth within the 90 % interval"), "", f"{100 * covered:.0f} %", light, hint)]


def _residualRow(told: Mapping[str, Any]) -> list[QualityRow]:
    residual = told.get("residual")
    if not residual:
        return []
    mean, worst = float(np.mean(residual)), float(np.max(residual))
    light = Light.GOOD if worst <= _LITTLE else Light.WARNING if worst <= _SOME else Light.PROBLEM
    hint = _(
        "||Ax - y|| / ||y||: what the image leaves of the measurements unexplained, at most {worst} in a slice. A "
        "small value says that it fits them, not that it is right: many images fit few views."
    )
    text = f"{100 * mean:.2g} %"
    return [QualityRow(_("Residual"), "", text, light, hint.format(worst=f"{100 * worst:.2g} %"))]


def _exactRow(told: Mapping[str, Any]) -> list[QualityRow]:
    away = (told.get("provenance") or {}).get("largest residual HU")
    if away is None:
        return []
    light = Light.GOOD if away <= _EXACT else Light.PROBLEM
    hint = _("Largest difference between the coarse CT and the means of the finer one over its voxels.")
    return [QualityRow(_("Residual, HU"), "", f"{away:.2g}", light, hint)]
