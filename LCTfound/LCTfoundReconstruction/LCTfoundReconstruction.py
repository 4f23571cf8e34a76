"""Reconstruction panel: a CT from few views, with less noise, or with finer voxels; beside what there was before."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import qt
import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin


def _findLibraries() -> None:
    """In a source checkout the libraries lie beside this module's folder; installed, they lie in it."""
    here = Path(__file__).resolve().parent
    if not (here / "LCTfoundSlicer").is_dir():
        sys.path += [str(place) for place in (here.parent, here.parent.parent) if str(place) not in sys.path]


class LCTfoundReconstruction(ScriptedLoadableModule):
    """The module as Slicer lists it."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        _findLibraries()
        parent.title = _("LCTfound Reconstruction")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Filtering")]
        parent.dependencies = []
        parent.contributors = ["LCTfound contributors"]
        parent.helpText = _(
            "Reconstructs a chest CT from few views, reduces the noise of a low-dose CT, or makes pixels finer and "
            "slices thinner; shows the result beside what there was, with difference, expected error and residual. "
            "Results are new volumes marked as derived; the input stays as it is. Research use only; not a medical "
            "device."
        )
        parent.acknowledgementText = _(
            "After: A lung CT vision foundation model facilitating disease diagnosis and medical imaging. "
            "Nature Communications (2025)."
        )
        slicer.app.connect("startupCompleted()", self._onStartupCompleted)

    def _onStartupCompleted(self) -> None:
        from LCTfoundSlicer.comparison_views import registerLayouts

        registerLayouts()


@parameterNodeWrapper
class LCTfoundReconstructionParameterNode:
    """What the panel shows, kept in the scene."""

    inputVolume: vtkMRMLScalarVolumeNode
    result: vtkMRMLScalarVolumeNode
    task: str = "sparse_view"
    projections: str = ""
    views: Annotated[int, WithinRange(1, 2000)] = 16
    tier: str = "fast"
    samples: Annotated[int, WithinRange(1, 32)] = 4
    strength: Annotated[float, WithinRange(0, 100)] = 100.0
    keptMm: Annotated[float, WithinRange(0, 50)] = 5.0
    lowDoseTier: str = "fast"
    simulateDose: bool = False
    dosePercent: Annotated[float, WithinRange(1, 100)] = 10.0
    mode: str = "pixels4"
    sliceMm: Annotated[float, WithinRange(0.2, 40)] = 1.0
    method: str = "null-space"
    draws: Annotated[int, WithinRange(1, 32)] = 4
    simulateCoarse: bool = True
    slices: str = "around"
    sliceCount: Annotated[int, WithinRange(1, 2000)] = 5
    device: str = "auto"
    exportFolder: str = ""


class LCTfoundReconstructionLogic(ScriptedLoadableModuleLogic):
    """Everything the panel does, for scripts too: no method needs the panel, or a main window.

    The three tasks share these arguments:

    * ``inputVolume``: vtkMRMLScalarVolumeNode, HU; stays as it is.
    * ``slices``: a place (RAS mm of the world) and how many slices around it; None: all.
    * ``device``: ``auto``, ``cuda``, ``mps`` or ``cpu``.
    * ``waitForCompletion``: False returns the ``PanelRun`` at once; the result comes to ``listener.onDone``.
    * ``listener``: a ``LCTfoundSlicer.run.Listener``.

    They return the result's new volume node (None if cancelled), see ``LCTfoundSlicer.reconstruction_result``, and
    raise ``RunFailed`` (no result; the message tells the remedy) or ``UnusableVolume``.
    """

    def getParameterNode(self) -> LCTfoundReconstructionParameterNode:
        return LCTfoundReconstructionParameterNode(super().getParameterNode())

    def sparseView(
        self,
        inputVolume: Any,
        views: int = 16,
        tier: str = "fast",
        samples: int = 4,
        slices: tuple[Sequence[float], int] | None = None,
        device: str = "auto",
        waitForCompletion: bool = True,
        listener: Any = None,
    ) -> Any:
        """Scan a CT with few views and reconstruct it.

        Args:
            views: evenly over half a turn.
            tier: ``preview`` (no network), ``fast`` or ``best``.
            samples: draws of the best tier.
        """
        options = {"views": views, "tier": tier, "samples": samples, "device": device}
        name = _("sparse view {views}").format(views=views)
        return self._start("sparse_view", name, inputVolume, options, slices, waitForCompletion, listener)

    def reconstructProjections(
        self,
        projections: str | Path,
        tier: str = "fast",
        samples: int = 4,
        views: int | None = None,
        sliceCount: int | None = None,
        device: str = "auto",
        waitForCompletion: bool = True,
        listener: Any = None,
    ) -> Any:
        """Reconstruct what a scanner measured.

        Args:
            projections: a file (.npy, .npz, .nrrd with its geometry), or a folder of DICOM-CT-PD or a file in it.
            tier, samples: as in ``sparseView``.
            views: of them, spread evenly; None: all.
            sliceCount: around the middle; None: all.
            device, waitForCompletion, listener: as in the tasks.
        """
        from LCTfoundSlicer.reconstruction_result import applyReconstruction
        from LCTfoundSlicer.run import PanelRun, scratchFolder
        from LCTfoundSlicer.weights import weightsFolder

        path = Path(projections).absolute()
        path = path.parent if path.suffix.lower() in (".dcm", ".ima") else path
        folder = scratchFolder("reconstruct")

        def payload() -> dict[str, Any]:
            options = {"views": views, "tier": tier, "samples": samples, "device": device}
            return {
                "projections": str(path),
                "options": {**options, "weights_folder": weightsFolder()},
                "slices": None if sliceCount is None else {"count": sliceCount},
                "output": str(folder / "result"),
            }

        def show(result: dict[str, Any]) -> Generator[float, None, Any]:
            return (yield from applyReconstruction(Path(result["folder"]), _("from projections"), None))

        stages = (_("Sending the request"), _("Showing the result"))
        run = PanelRun("sparse_view", _nothing(), payload, show, folder, listener, stages).start()
        return run.wait() if waitForCompletion else run

    def lowDose(
        self,
        inputVolume: Any,
        strength: float = 1.0,
        tier: str = "fast",
        simulate: float | None = None,
        keptMm: float | None = None,
        slices: tuple[Sequence[float], int] | None = None,
        device: str = "auto",
        waitForCompletion: bool = True,
        listener: Any = None,
    ) -> Any:
        """Take the noise out of a CT.

        Args:
            strength: 0 (as it is) to 1.
            tier: ``fast`` or ``best``.
            simulate: add noise first, as of this share of the full dose; the result is compared with the CT.
            keptMm: only what is finer than this (mm) is taken away; 0 takes noise of any size, None what is usual.
        """
        options = {"strength": strength, "kept_mm": keptMm, "tier": tier, "simulate": simulate, "device": device}
        name = _("noise reduced {percent} %").format(percent=round(100 * strength))
        return self._start("low_dose", name, inputVolume, options, slices, waitForCompletion, listener)

    def superResolution(
        self,
        inputVolume: Any,
        factor: int | None = 4,
        sliceMm: float | None = None,
        method: str = "null-space",
        simulate: bool = True,
        samples: int = 4,
        slices: tuple[Sequence[float], int] | None = None,
        device: str = "auto",
        waitForCompletion: bool = True,
        listener: Any = None,
    ) -> Any:
        """Make pixels finer, or slices thinner.

        Args:
            factor: how many times finer the pixels become; None: slices become thinner.
            sliceMm: thickness of the slices that are wanted, or with ``simulate`` of the thick ones made first, mm.
            method: ``null-space`` (a network makes up likely detail) or ``cubic`` (interpolation).
            simulate: make the CT coarse first; the result is compared with the CT.
            samples: draws of the network.
        """
        options = {"method": method, "simulate": simulate, "samples": samples, "device": device}
        if factor is None:
            options |= {"direction": "slices", "slice_mm": sliceMm}
            name = _("thin slices")
        else:
            options |= {"direction": "in-plane", "factor": factor}
            name = _("pixels {factor} times finer").format(factor=factor)
        return self._start("super_resolution", name, inputVolume, options, slices, waitForCompletion, listener)

    def _start(
        self,
        task: str,
        name: str,
        inputVolume: Any,
        options: dict[str, Any],
        slices: tuple[Sequence[float], int] | None,
        waitForCompletion: bool,
        listener: Any,
    ) -> Any:
        from LCTfoundSlicer.mrml import dicomFilesOf, engineFromWorld, writeArray
        from LCTfoundSlicer.reconstruction_result import Source, applyReconstruction
        from LCTfoundSlicer.run import PanelRun, scratchFolder
        from LCTfoundSlicer.weights import weightsFolder

        source = Source.of(inputVolume)
        folder = scratchFolder("reconstruct")
        array = folder / "ct.npy"
        around = None
        if slices is not None:
            place, count = slices
            around = {"center": engineFromWorld(inputVolume, source.geometry, place), "count": count}

        def payload() -> dict[str, Any]:
            return {
                "input": source.geometry.request(array, {"name": inputVolume.GetName()}),
                "options": {**options, "weights_folder": weightsFolder()},
                "slices": around,
                "source_dicom": dicomFilesOf(inputVolume),
                "output": str(folder / "result"),
            }

        def show(result: dict[str, Any]) -> Generator[float, None, Any]:
            return (yield from applyReconstruction(Path(result["folder"]), name, source))

        run = PanelRun(task, writeArray(inputVolume, array), payload, show, folder, listener).start()
        return run.wait() if waitForCompletion else run

    def exportDicom(self, result: Any, folder: str | Path, waitForCompletion: bool = True, listener: Any = None) -> Any:
        """Write a result, as it is now, as a DICOM series of its CT's study; each image says that it is derived.

        Args:
            result: of one of the tasks.
            folder: empty, new, or with an earlier export; the images go to ``dicom`` in it.
            waitForCompletion, listener: as in the tasks; what comes back is the folder.
        """
        from LCTfoundSlicer.mrml import dicomFilesOf, engineGeometry, writeArray
        from LCTfoundSlicer.reconstruction_result import ReconstructionCase
        from LCTfoundSlicer.run import PanelRun, RunFailed, scratchFolder

        case = ReconstructionCase(result)
        told = case.told
        if not case.isResult or "marks" not in told:
            raise RunFailed(_("This volume is no reconstruction of LCTfound; choose one, or run first."))
        geometry, scratch = engineGeometry(result, inWorld=False), scratchFolder("series")
        files = [file for file in told.get("source_files", []) if Path(file).is_file()]
        source = dicomFilesOf(case.volumeNode) if case.volumeNode is not None else files

        def payload() -> dict[str, Any]:
            return {
                "input": geometry.request(scratch / "image.npy", {"name": result.GetName()}),
                "marks": {**told["marks"], "nature": told["nature"]},
                "source_dicom": source,
                "told": told,
                "folder": str(Path(folder).absolute()),
            }

        def show(answer: dict[str, Any]) -> Generator[float, None, Any]:
            yield 1.0
            return Path(folder)

        stages = (_("Reading the volume"), _("Finished"))
        sending = writeArray(result, scratch / "image.npy")
        run = PanelRun("export_series", sending, payload, show, scratch, listener, stages).start()
        return run.wait() if waitForCompletion else run


class LCTfoundReconstructionWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel. It only shows and asks; the logic does."""

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: LCTfoundReconstructionLogic | None = None
        self.parameters: Any = None
        self._shown: Any = None

    @property
    def _parameterNode(self) -> LCTfoundReconstructionParameterNode | None:
        """None while another module is open."""
        return self.parameters.node if self.parameters is not None else None

    # -- life ------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        from LCTfoundSlicer.panel_parameters import PanelParameters
        from LCTfoundSlicer.run_display import RunDisplay

        self.uiWidget = slicer.util.loadUI(self.resourcePath("UI/LCTfoundReconstruction.ui"))
        self.layout.addWidget(self.uiWidget)
        self.ui = slicer.util.childWidgetVariables(self.uiWidget)
        self.uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = LCTfoundReconstructionLogic()
        self.display = RunDisplay(self.ui.progressBar, self.ui.statusLabel, self.ui.logText, self._updateButtons)
        self.ui.resultSelector.addAttribute("vtkMRMLScalarVolumeNode", "LCTfound.Reconstruction")
        paths = {"exportFolder": self.ui.exportPathLineEdit, "projections": self.ui.projectionsPathLineEdit}
        self.parameters = PanelParameters(self, self._choices(), paths, self._parametersChanged)
        self._setUpTable()
        self._connect()
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.parameters.show()

    def _choices(self) -> dict[str, Any]:
        """Boxes and what they offer, by parameter; those that set none are filled here."""
        from LCTfoundSlicer.panel_parameters import deviceChoices, fill

        fill(self.ui.leftComboBox, (("before", _("Without the method")), ("ct", _("The CT"))))
        maps = (("none", _("None")), ("difference", _("Difference")), ("uncertainty", _("Expected error")))
        fill(self.ui.mapComboBox, maps)
        fill(self.ui.viewsComboBox, [*((views, str(views)) for views in (8, 16, 32, 64)), (0, _("any"))])
        return {
            "task": (
                self.ui.taskComboBox,
                (
                    ("sparse_view", _("Few views")),
                    ("low_dose", _("Low dose: less noise")),
                    ("super_resolution", _("Super-resolution: finer voxels")),
                ),
            ),
            "tier": (
                self.ui.tierComboBox,
                (
                    ("preview", _("Preview (no network)")),
                    ("fast", _("Fast")),
                    ("best", _("Best (draws samples; a GPU helps)")),
                ),
            ),
            "lowDoseTier": (
                self.ui.lowDoseTierComboBox,
                (("fast", _("Fast")), ("best", _("Best (cold diffusion; needs its weight)"))),
            ),
            "mode": (
                self.ui.modeComboBox,
                (
                    ("pixels4", _("Pixels, 4 times")),
                    ("pixels8", _("Pixels, 8 times")),
                    ("slices", _("Thick slices become thin")),
                ),
            ),
            "method": (
                self.ui.methodComboBox,
                (
                    ("null-space", _("Network (synthetic detail)")),
                    ("cubic", _("Interpolation (nothing made up)")),
                ),
            ),
            "slices": (self.ui.slicesComboBox, (("around", _("Around the one shown:")), ("all", _("All")))),
            "device": (self.ui.deviceComboBox, deviceChoices()),
        }

    def _setUpTable(self) -> None:
        table = self.ui.qualityTable
        table.setColumnCount(3)
        table.setHorizontalHeaderLabels([_("Quality"), _("Before"), _("Result")])
        table.verticalHeader().visible = False
        table.setEditTriggers(qt.QAbstractItemView.NoEditTriggers)
        table.setSelectionMode(qt.QAbstractItemView.NoSelection)
        table.horizontalHeader().setStretchLastSection(True)
        table.setColumnWidth(0, 190)

    def _connect(self) -> None:
        self.ui.viewsComboBox.connect("currentIndexChanged(int)", self._viewsChosen)
        self.ui.runButton.connect("clicked(bool)", self.onRunButton)
        self.ui.sideBySideButton.connect("clicked(bool)", lambda *_: self.showSideBySide())
        self.ui.plotButton.connect("clicked(bool)", lambda *_: self.showSideBySide(withPlot=True))
        self.ui.plotComboBox.connect("activated(int)", lambda *_: self.showSideBySide(withPlot=True))
        self.ui.leftComboBox.connect("currentIndexChanged(int)", lambda *_: self._showVolumes())
        self.ui.mapComboBox.connect("currentIndexChanged(int)", lambda *_: self._showMap())
        self.ui.opacitySlider.connect("valueChanged(int)", lambda *_: self._showMap())
        self.ui.exportButton.connect("clicked(bool)", self.onExportButton)

    def cleanup(self) -> None:
        self.display.cancel()
        self.removeObservers()

    def enter(self) -> None:
        self.parameters.show()
        self.parameters.warmUp()

    def exit(self) -> None:
        self.parameters.hide()

    def onSceneStartClose(self, caller: Any, event: Any) -> None:
        self.display.cancel()
        self.parameters.hide()

    # -- parameters ------------------------------------------------------------------------------------------------

    def _viewsChosen(self, index: int) -> None:
        views = self.ui.viewsComboBox.currentData
        if views and self._parameterNode is not None:
            self._parameterNode.views = views

    @property
    def _isMeasured(self) -> bool:
        """Whether projections are reconstructed, and no CT is needed."""
        node = self._parameterNode
        return node is not None and node.task == "sparse_view" and bool(node.projections.strip())

    def _parametersChanged(self, node: LCTfoundReconstructionParameterNode | None) -> None:
        if node is None:
            self._showResult(None)
            return
        usual = max(self.ui.viewsComboBox.findData(node.views), 0)
        if self.ui.viewsComboBox.itemData(usual) != node.views:
            usual = self.ui.viewsComboBox.count - 1
        self.ui.viewsComboBox.setCurrentIndex(usual)
        self._updateOptions()
        if node.result is not self._shown:
            self._showResult(node.result)
        self._updateButtons()

    def _updateOptions(self) -> None:
        """Show what the task asks for, and nothing else."""
        node, ui = self._parameterNode, self.ui
        pages = {
            "sparse_view": ui.sparseViewWidget,
            "low_dose": ui.lowDoseWidget,
            "super_resolution": ui.superResolutionWidget,
        }
        for task, page in pages.items():
            page.visible = node.task == task
        ui.samplesSpinBox.enabled = node.tier == "best"
        for widget in (ui.viewsLabel, ui.viewsSpinBox, ui.viewsComboBox):
            widget.enabled = not self._isMeasured
        ui.doseSpinBox.enabled = node.simulateDose
        thin = node.mode == "slices"
        for widget in (ui.sliceThicknessLabel, ui.sliceThicknessSpinBox):
            widget.visible = thin
        ui.sliceThicknessLabel.text = _("Thick slices of:") if node.simulateCoarse else _("Thin slices of:")
        ui.drawsSpinBox.enabled = node.method == "null-space"
        ui.sliceCountSpinBox.enabled = node.slices == "around"

    def _updateButtons(self) -> None:
        node, running, case = self._parameterNode, self.display.isRunning, self.case
        ui, result = self.ui, self.case.isResult
        ui.runButton.text = _("Cancel") if running else _("Run")
        ui.runButton.enabled = running or self._isMeasured or bool(node and node.inputVolume)
        pages = (ui.sparseViewWidget, ui.lowDoseWidget, ui.superResolutionWidget)
        for widget in (ui.inputSelector, ui.taskComboBox, *pages, ui.slicesComboBox, ui.deviceComboBox):
            widget.enabled = not running
        ui.inputSelector.enabled = not running and not self._isMeasured
        ui.sideBySideButton.enabled = result
        ui.plotButton.enabled = ui.plotComboBox.enabled = bool(result and case.charts)
        ui.leftComboBox.enabled = result and case.isSimulated
        ui.mapComboBox.enabled = ui.opacitySlider.enabled = result
        ui.exportButton.enabled = result and not running

    # -- running ---------------------------------------------------------------------------------------------------

    def onRunButton(self) -> None:
        if self.display.isRunning:
            self.display.cancel()
            return
        from LCTfoundSlicer.setup_widget import ensureReady

        with slicer.util.tryWithErrorDisplay(_("The reconstruction could not be started.")):
            self.display.say("")
            try:
                if ensureReady():
                    self.display.start(self._begin, self._reconstructed)
            except Exception as error:
                self.display.say(str(error))
                raise

    def _begin(self, listener: Any) -> Any:
        node, logic = self._parameterNode, self.logic
        if self._isMeasured:
            count = node.sliceCount if node.slices == "around" else None
            return logic.reconstructProjections(
                node.projections.strip(), node.tier, node.samples, None, count, node.device, False, listener
            )
        slices = None
        if node.slices == "around":
            slices = (_placeIn(node.inputVolume), node.sliceCount)
        common = {"slices": slices, "device": node.device, "waitForCompletion": False, "listener": listener}
        if node.task == "sparse_view":
            return logic.sparseView(node.inputVolume, node.views, node.tier, node.samples, **common)
        if node.task == "low_dose":
            simulate = node.dosePercent / 100 if node.simulateDose else None
            return logic.lowDose(
                node.inputVolume, node.strength / 100, node.lowDoseTier, simulate, node.keptMm, **common
            )
        factor = {"pixels4": 4, "pixels8": 8}.get(node.mode)
        return logic.superResolution(
            node.inputVolume, factor, node.sliceMm, node.method, node.simulateCoarse, node.draws, **common
        )

    def _reconstructed(self, node: Any) -> None:
        from LCTfoundSlicer.reconstruction_result import ReconstructionCase
        from LCTfoundSlicer.run_display import duration

        if self._parameterNode is not None:
            self._parameterNode.result = node
            self.showSideBySide()
        else:  # another module is open by now: it is there on return, and the views stay as they are
            self.logic.getParameterNode().result = node
        seconds = ReconstructionCase(node).told.get("provenance", {}).get("seconds", 0)
        self.display.say(_("Done in {time}: {name}").format(time=duration(seconds), name=node.GetName()))

    # -- the result ------------------------------------------------------------------------------------------------

    @property
    def case(self) -> Any:
        """The result that is shown; one that is none reads as empty."""
        from LCTfoundSlicer.reconstruction_result import ReconstructionCase

        return ReconstructionCase(self._shown)

    def _showResult(self, node: Any) -> None:
        self._shown = node
        case = self.case
        self.ui.warningsText.html = _warnings(case.told) if case.isResult else ""
        self.ui.factsLabel.text = _facts(case.told) if case.isResult else ""
        self.ui.plotComboBox.clear()
        for chart in case.charts:
            self.ui.plotComboBox.addItem(case.shownBy(chart))
        self._showQuality()
        self._showMap()
        self._updateButtons()

    def _showQuality(self) -> None:
        from LCTfoundSlicer.lights import lightIcon, lightWord
        from LCTfoundSlicer.reconstruction_result import qualityRows

        table, rows = self.ui.qualityTable, qualityRows(self.case) if self.case.isResult else []
        table.setRowCount(len(rows))
        for number, row in enumerate(rows):
            for column, text in enumerate((row.what, row.before, row.after)):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(f"{lightWord(row.light)}: {row.hint}")
                if column == 0:
                    item.setIcon(lightIcon(row.light))
                table.setItem(number, column, item)

    def showSideBySide(self, withPlot: bool = False) -> None:
        """Without the method on the left, the result on the right."""
        from LCTfoundSlicer.comparison_views import showSideBySide

        case = self.case
        if case.isResult:
            showSideBySide(self._left(), case.node, self._chart() if withPlot else None)
            self._showMap()

    def _chart(self) -> Any:
        """The plot that is chosen; None where the result has none."""
        charts = self.case.charts
        return charts[min(max(self.ui.plotComboBox.currentIndex, 0), len(charts) - 1)] if charts else None

    def _left(self) -> Any:
        case = self.case
        wanted = case.volumeNode if self.ui.leftComboBox.currentData == "ct" else case.before
        return wanted or case.before or case.volumeNode

    def _showVolumes(self) -> None:
        from LCTfoundSlicer.comparison_views import isShown, showVolumes

        if self.case.isResult and isShown():
            showVolumes(self._left(), self.case.node)
            self._showMap()

    def _showMap(self) -> None:
        from LCTfoundSlicer.comparison_views import isShown, legendPixmap, setOverlay

        case, choice = self.case, self.ui.mapComboBox.currentData
        volume = {"difference": case.difference, "uncertainty": case.uncertainty}.get(choice)
        self.ui.legendLabel.visible = volume is not None
        if volume is not None:
            self.ui.legendLabel.setPixmap(legendPixmap(volume))
        if case.isResult and isShown():
            setOverlay(volume, self.ui.opacitySlider.value / 100)
        if case.isResult and volume is None and choice == "uncertainty":
            self.display.say(_("This method does not tell how sure it is."))

    # -- taking along ----------------------------------------------------------------------------------------------

    def onExportButton(self) -> None:
        folder = self._parameterNode.exportFolder
        if not folder:
            slicer.util.warningDisplay(_("Choose a folder for the DICOM series."))
            return
        with slicer.util.tryWithErrorDisplay(_("The export could not be started.")):
            self.display.start(
                lambda listener: self.logic.exportDicom(self.case.node, folder, False, listener),
                lambda path: self.display.say(_("Exported to {folder}").format(folder=path)),
            )


def _nothing() -> Generator[float, None, None]:
    """Of a run that sends nothing but its request."""
    yield 1.0


def _placeIn(volume: Any) -> list[float]:
    """What is looked at, if that is at the volume's height, else its middle; RAS mm of the world."""
    from LCTfoundSlicer.comparison_views import currentPlace

    bounds, place = [0.0] * 6, currentPlace()
    volume.GetRASBounds(bounds)
    if place is not None and bounds[4] <= place[2] <= bounds[5]:
        return place
    return [(bounds[2 * axis] + bounds[2 * axis + 1]) / 2 for axis in range(3)]


def _warnings(told: dict[str, Any]) -> str:
    """What the result is, what to be careful about, and what was assumed; signs tell how serious it is."""
    from html import escape

    lines = [f"<b>{escape(told['notice'])}</b>"]
    lines += [f"&#9888; {escape(text)}" for text in told.get("warnings", [])]
    lines += [f"&#8226; {escape(text)}" for text in told.get("notes", [])]
    return "<br>".join(lines)


def _facts(told: dict[str, Any]) -> str:
    facts = told.get("facts") or {}
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


class LCTfoundReconstructionTest(ScriptedLoadableModuleTest):
    """Runs in Slicer as ``py_LCTfoundReconstruction`` and on the project's host."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        self.setUp()
        self.test_a_chest_from_few_views()
        self.setUp()
        self.test_an_image_without_lungs_is_refused()

    def test_a_chest_from_few_views(self) -> None:
        """The real engine on a small chest: a new volume that is nearer to the CT than what there was before."""
        from LCTfoundSlicer.reconstruction_result import ReconstructionCase

        volume = _smallChest()
        before = slicer.util.arrayFromVolume(volume).copy()
        result = LCTfoundReconstructionLogic().sparseView(volume, 32, "preview", slices=((0, 0, 0), 2), device="cpu")
        case = ReconstructionCase(result)
        self.assertIn("derived", result.GetName())
        self.assertTrue((slicer.util.arrayFromVolume(volume) == before).all())
        agreement = case.told["agreement"]
        self.assertLess(agreement["Reconstruction"]["rmse_hu"], agreement[case.told["before_name"]]["rmse_hu"])

    def test_an_image_without_lungs_is_refused(self) -> None:
        """Nothing is added to the scene, and the sentence says what to do."""
        from LCTfoundSlicer.run import RunFailed

        volume = _smallChest()
        slicer.util.arrayFromVolume(volume)[:] = 40
        slicer.util.arrayFromVolumeModified(volume)
        count = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode")
        with self.assertRaises(RunFailed):
            LCTfoundReconstructionLogic().sparseView(volume, 16, "preview", device="cpu")
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode"), count)


def _smallChest() -> Any:
    """A CT of ellipsoids, 6 mm: body and lungs."""
    shape, spacing = (40, 44, 60), 6.0
    k, j, i = np.indices(shape, dtype=np.float32)
    x, y, z = (i - 29.5) * spacing, (j - 21.5) * spacing, (k - 19.5) * spacing
    hu = np.full(shape, -1000, np.int16)
    hu[(x / 170) ** 2 + (y / 120) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - side * 75) / 55) ** 2 + (y / 80) ** 2 + (z / 105) ** 2 < 1] = -850
    volume = slicer.util.addVolumeFromArray(hu, name="Small chest", nodeClassName="vtkMRMLScalarVolumeNode")
    matrix = vtk.vtkMatrix4x4()
    for axis, (sign, origin) in enumerate(((-1, 177.0), (-1, 129.0), (1, -117.0))):
        matrix.SetElement(axis, axis, sign * spacing)
        matrix.SetElement(axis, 3, origin)
    volume.SetIJKToRASMatrix(matrix)
    return volume
