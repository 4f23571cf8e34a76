"""Lung panel: a chest CT into airways, vessels and the 18 bronchopulmonary segments, corrected and exported."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
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


class LCTfoundLungSegmentation(ScriptedLoadableModule):
    """The module as Slicer lists it."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        _findLibraries()
        parent.title = _("LCTfound Lung Segmentation")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = []
        parent.contributors = ["LCTfound contributors"]
        parent.helpText = _(
            "Segments a chest CT into airways, pulmonary artery, pulmonary vein and the 18 bronchopulmonary segments; "
            "shows how sure each structure is, lets a wrongly named branch be corrected, and exports models. "
            "Research use only; not a medical device."
        )
        parent.acknowledgementText = _(
            "After: A lung CT vision foundation model facilitating disease diagnosis and medical imaging. "
            "Nature Communications (2025). The weights were trained on synthetic anatomy."
        )


@parameterNodeWrapper
class LCTfoundLungSegmentationParameterNode:
    """What the panel shows, kept in the scene."""

    inputVolume: vtkMRMLScalarVolumeNode
    outputSegmentation: vtkMRMLSegmentationNode
    quality: str = "standard"
    device: str = "auto"
    colorBy: str = "segment"
    exportFolder: str = ""
    frame: str = "LPS"
    triangles: Annotated[int, WithinRange(10_000, 5_000_000)] = 600_000
    singleFile: bool = False


class LCTfoundLungSegmentationLogic(ScriptedLoadableModuleLogic):
    """Everything the panel does, for scripts too: no method needs the panel, or a main window."""

    def getParameterNode(self) -> LCTfoundLungSegmentationParameterNode:
        return LCTfoundLungSegmentationParameterNode(super().getParameterNode())

    def process(
        self,
        inputVolume: Any,
        outputSegmentation: Any = None,
        quality: str = "standard",
        device: str = "auto",
        waitForCompletion: bool = True,
        listener: Any = None,
    ) -> Any:
        """Segment a CT.

        Args:
            inputVolume: vtkMRMLScalarVolumeNode, HU.
            outputSegmentation: gets the result; None: a new one is made when the result is there.
            quality: ``fast``, ``standard`` or ``full``.
            device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
            waitForCompletion: False returns at once; the result comes to ``listener.onDone``.
            listener: a ``LCTfoundSlicer.run.Listener``.

        Returns:
            The segmentation node (None if cancelled); the ``PanelRun`` where nothing is waited for.

        Raises:
            UnusableVolume: the volume cannot be used as it is.
            RunFailed: no result; the message tells the remedy.
        """
        from LCTfoundSlicer.lung_result import applyResult
        from LCTfoundSlicer.mrml import InputSignature, engineGeometry, writeArray
        from LCTfoundSlicer.run import PanelRun, scratchFolder
        from LCTfoundSlicer.weights import weightsFolder

        geometry, signature = engineGeometry(inputVolume), InputSignature.of(inputVolume)
        folder = scratchFolder("segment")
        array = folder / "ct.npy"

        def payload() -> dict[str, Any]:
            options = {"quality": quality, "device": device, "weights_folder": weightsFolder()}
            source = geometry.request(array, {"name": inputVolume.GetName()})
            return {"input": source, "options": options, "output": str(folder / "result")}

        def show(result: dict[str, Any]) -> Iterator[float]:
            node, made = outputSegmentation, False
            if node is None:
                node, made = _newSegmentation(inputVolume), True
            try:
                yield from applyResult(Path(result["folder"]), node, inputVolume, signature, geometry)
            except BaseException:
                if made:
                    slicer.mrmlScene.RemoveNode(node)
                raise
            return node

        run = PanelRun("segment_lungs", writeArray(inputVolume, array), payload, show, folder, listener).start()
        return run.wait() if waitForCompletion else run

    # -- correcting ------------------------------------------------------------------------------------------------

    def branchAt(self, segmentation: Any, point: Sequence[float]) -> Any:
        """The labeled branch of airway or artery nearest to a point.

        Args:
            segmentation: a result.
            point: RAS mm of the world.

        Returns:
            ``LCTfoundSlicer.branches.PickedBranch``; None farther than 15 mm from any.
        """
        from LCTfoundSlicer.branches import BranchPicker

        return BranchPicker.of(segmentation).at(point)

    def renameBranch(
        self,
        segmentation: Any,
        tree: str,
        branch: int,
        segment: int,
        waitForCompletion: bool = True,
        listener: Any = None,
    ) -> Any:
        """Give a branch and all that comes from it another segment; the territories of its lobe follow.

        Args:
            segmentation: a result.
            tree: ``airway`` or ``artery``.
            branch: its first node, as ``branchAt`` gives it.
            segment: code 1-18 of the same lobe; 0: none.
            waitForCompletion, listener: as in ``process``.
        """
        from LCTfoundSlicer.lung_result import BranchChange, LungCase

        changes = [*LungCase(segmentation).changes, BranchChange(tree, branch, segment)]
        return self._relabel(segmentation, changes, [], waitForCompletion, listener)

    def undoRename(self, segmentation: Any, waitForCompletion: bool = True, listener: Any = None) -> Any:
        """Take the last renaming back."""
        from LCTfoundSlicer.lung_result import LungCase

        case = LungCase(segmentation)
        *changes, last = case.changes
        return self._relabel(segmentation, changes, [*case.undoneChanges, last], waitForCompletion, listener)

    def redoRename(self, segmentation: Any, waitForCompletion: bool = True, listener: Any = None) -> Any:
        """Do again what was taken back last."""
        from LCTfoundSlicer.lung_result import LungCase

        case = LungCase(segmentation)
        *undone, last = case.undoneChanges
        return self._relabel(segmentation, [*case.changes, last], undone, waitForCompletion, listener)

    def _relabel(
        self, segmentation: Any, changes: Sequence[Any], undone: Sequence[Any], waitForCompletion: bool, listener: Any
    ) -> Any:
        from LCTfoundSlicer.branches import BranchPicker
        from LCTfoundSlicer.lung_result import LungCase, applyRelabeled
        from LCTfoundSlicer.mrml import engineGeometry
        from LCTfoundSlicer.run import PanelRun, RunFailed, scratchFolder

        case = LungCase(segmentation)
        volume = case.volumeNode
        if volume is None or not case.hasState:
            raise RunFailed(_("The CT of this result is not in the scene any more; load it, or segment it again."))
        geometry, folder = engineGeometry(volume), scratchFolder("relabel")
        concerned = {*changes, *case.changes} - ({*changes} & {*case.changes})
        lobes = BranchPicker.of(segmentation).lobesOf(concerned)

        def payload() -> dict[str, Any]:
            return {
                "state": str(case.writeState(folder / "state.npz")),
                "changes": [{"tree": c.tree, "branch": c.branch, "segment": c.segment} for c in changes],
                "lobes": [int(lobe) for lobe in lobes],
                "output": str(folder / "result"),
            }

        def show(result: dict[str, Any]) -> Iterator[float]:
            history = (changes, undone)
            yield from applyRelabeled(Path(result["folder"]), segmentation, volume, geometry, history, lobes)
            return segmentation

        nothing: Generator[float, None, None] = (share for share in ())  # the state holds all that is needed
        run = PanelRun("relabel", nothing, payload, show, folder, listener).start()
        return run.wait() if waitForCompletion else run

    def copyForEditing(self, segmentation: Any) -> Any:
        """A copy for the Segment Editor; the result stays as it is."""
        from LCTfoundSlicer.lung_result import LungCase

        return LungCase(segmentation).copyForEditing().node

    # -- taking along ----------------------------------------------------------------------------------------------

    def exportModels(
        self,
        segmentation: Any,
        folder: str | Path,
        formats: Sequence[str] = ("stl", "csv", "report"),
        structures: Sequence[str] | None = None,
        triangles: int = 600_000,
        frame: str = "LPS",
        singleFile: bool = False,
        waitForCompletion: bool = True,
        listener: Any = None,
    ) -> Any:
        """Write a result, as it is now, with a manifest.

        Args:
            segmentation: a result, edited or not.
            folder: empty, new, or with an earlier export.
            formats: of ``stl obj ply glb seg.nrrd nifti csv report dicom-seg``.
            structures: keys; None: all.
            triangles: of all models together.
            frame: ``LPS`` or ``RAS``, of STL, OBJ and PLY.
            singleFile: one file with all models instead of one each.
            waitForCompletion, listener: as in ``process``; what comes back is the folder.
        """
        from LCTfoundSlicer.lung_result import LungCase, collectLabels
        from LCTfoundSlicer.mrml import dicomFilesOf, engineGeometry, writeArray
        from LCTfoundSlicer.run import PanelRun, RunFailed, scratchFolder

        case = LungCase(segmentation)
        volume = case.volumeNode
        if volume is None:
            raise RunFailed(_("The CT of this result is not in the scene any more; load it, or segment it again."))
        geometry, scratch = engineGeometry(volume), scratchFolder("export")
        result = case.result

        def send() -> Iterator[float]:
            i, j, k = volume.GetImageData().GetDimensions()
            labels = {name: np.zeros((k, j, i), np.uint8) for name in ("segments", "trees")}
            yield from (0.4 * share for share in collectLabels(segmentation, volume, **labels))
            for name, array in labels.items():
                np.save(scratch / f"{name}.npy", array)
                yield 0.5
            yield from (0.5 + 0.5 * share for share in writeArray(volume, scratch / "ct.npy"))

        def payload() -> dict[str, Any]:
            provenance = dict(result.get("provenance", {}))
            if case.changes:
                provenance["renamed branches"] = json.loads(segmentation.GetAttribute("LCTfound.Changes"))
            return {
                "input": geometry.request(scratch / "ct.npy", {"name": volume.GetName()}),
                "segments": str(scratch / "segments.npy"),
                "trees": str(scratch / "trees.npy"),
                "confidence": result.get("confidence", {}),
                "findings": result.get("findings", []),
                "provenance": provenance,
                "options": {
                    "formats": list(formats),
                    "structures": None if structures is None else list(structures),
                    "triangles": triangles,
                    "frame": frame,
                    "single_file": singleFile,
                    "source_dicom": dicomFilesOf(volume) or None,
                },
                "edited": case.isEdited,
                "case": volume.GetName(),
                "folder": str(Path(folder).absolute()),
            }

        def show(result: dict[str, Any]) -> Iterator[float]:
            yield 1.0
            return Path(folder)

        stages = (_("Reading the segmentation"), _("Finished"))
        run = PanelRun("export", send(), payload, show, scratch, listener, stages).start()
        return run.wait() if waitForCompletion else run

    def volumesTable(self, segmentation: Any) -> Any:
        """The volumes as a new vtkMRMLTableNode: structure, mL now, mL as computed, confidence."""
        from LCTfoundSlicer.lung_result import volumesTable

        return volumesTable(segmentation)


def _newSegmentation(volume: Any) -> Any:
    name = slicer.mrmlScene.GenerateUniqueName(_("{volume} lungs").format(volume=volume.GetName()))
    return slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)


class LCTfoundLungSegmentationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel. It only shows and asks; the logic does."""

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: LCTfoundLungSegmentationLogic | None = None
        self.parameters: Any = None
        self._pickNode: Any = None
        self._picked: Any = None

    @property
    def _parameterNode(self) -> LCTfoundLungSegmentationParameterNode | None:
        """None while another module is open."""
        return self.parameters.node if self.parameters is not None else None

    # -- life ------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        from LCTfoundSlicer.panel_parameters import PanelParameters
        from LCTfoundSlicer.run_display import RunDisplay
        from LCTfoundSlicer.structure_tree import StructureTree

        self.uiWidget = slicer.util.loadUI(self.resourcePath("UI/LCTfoundLungSegmentation.ui"))
        self.layout.addWidget(self.uiWidget)
        self.ui = slicer.util.childWidgetVariables(self.uiWidget)
        self.uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = LCTfoundLungSegmentationLogic()
        self.tree = StructureTree(self.ui.structureTree, self._structuresSelected)
        self.display = RunDisplay(self.ui.progressBar, self.ui.statusLabel, self.ui.logText, self._updateButtons)
        paths = {"exportFolder": self.ui.exportPathLineEdit}
        self.parameters = PanelParameters(
            self, self._choices(), paths, self._parametersChanged, lambda name: name == "colorBy" and self._recolor()
        )
        self._connect()
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.parameters.show()

    def _choices(self) -> dict[str, Any]:
        """Boxes and what they offer, by parameter; that which sets none is filled here."""
        from LCTfoundSlicer.panel_parameters import deviceChoices, fill

        selections = (
            ("all", _("All")),
            ("shown", _("Those that are shown")),
            ("selected", _("Those that are selected")),
        )
        fill(self.ui.selectionComboBox, selections)
        qualities = (
            ("fast", _("Fast (1.5 mm)")),
            ("standard", _("Standard (1 mm)")),
            ("full", _("Full (0.8 mm; a GPU helps)")),
        )
        return {
            "quality": (self.ui.qualityComboBox, qualities),
            "device": (self.ui.deviceComboBox, deviceChoices()),
            "colorBy": (self.ui.colorComboBox, (("segment", _("segment")), ("lobe", _("lobe")))),
            "frame": (self.ui.frameComboBox, (("LPS", _("LPS (DICOM)")), ("RAS", _("RAS (Slicer)")))),
        }

    def _connect(self) -> None:
        self.ui.applyButton.connect("clicked(bool)", self.onApplyButton)
        self.ui.opacitySlider.connect("valueChanged(int)", self.onOpacityChanged)
        self.ui.pickButton.connect("toggled(bool)", self.onPickToggled)
        self.ui.relabelButton.connect("clicked(bool)", self.onRelabelButton)
        self.ui.undoButton.connect("clicked(bool)", self.onUndoButton)
        self.ui.redoButton.connect("clicked(bool)", self.onRedoButton)
        self.ui.editButton.connect("clicked(bool)", self.onEditButton)
        self.ui.exportButton.connect("clicked(bool)", self.onExportButton)
        self.ui.tableButton.connect("clicked(bool)", self.onTableButton)

    def cleanup(self) -> None:
        self.display.cancel()
        self._stopPicking()
        self._observeResult(None)
        self.removeObservers()

    def enter(self) -> None:
        self.parameters.show()
        self.parameters.warmUp()

    def exit(self) -> None:
        self._stopPicking()
        self.parameters.hide()

    def onSceneStartClose(self, caller: Any, event: Any) -> None:
        self.display.cancel()
        self._stopPicking()
        self.tree.setCase(None)
        self._observeResult(None)
        self.parameters.hide()

    # -- parameters ------------------------------------------------------------------------------------------------

    def _parametersChanged(self, node: LCTfoundLungSegmentationParameterNode | None) -> None:
        if node is None:
            return
        shown = self.tree.case.node if self.tree.case else None
        if node.outputSegmentation is not shown:
            self._showResult(node.outputSegmentation)
        self._updateButtons()

    def _updateButtons(self) -> None:
        node, running = self._parameterNode, self.display.isRunning
        case = self.tree.case
        result = case is not None and case.isResult
        self.ui.applyButton.text = _("Cancel") if running else _("Apply")
        self.ui.applyButton.enabled = running or bool(node and node.inputVolume)
        for widget in (self.ui.inputSelector, self.ui.outputSelector, self.ui.qualityComboBox, self.ui.deviceComboBox):
            widget.enabled = not running
        for widget in (self.ui.editButton, self.ui.exportButton, self.ui.tableButton):
            widget.enabled = result and not running
        correctable = result and case.hasState and case.volumeNode is not None and not running
        self.ui.pickButton.enabled = correctable
        self.ui.relabelButton.enabled = correctable and self._picked is not None
        self.ui.undoButton.enabled = correctable and bool(case.changes)
        self.ui.redoButton.enabled = correctable and bool(case.undoneChanges)

    # -- running ---------------------------------------------------------------------------------------------------

    def onApplyButton(self) -> None:
        if self.display.isRunning:
            self.display.cancel()
            return
        from LCTfoundSlicer.setup_widget import ensureReady

        with slicer.util.tryWithErrorDisplay(_("The segmentation could not be started.")):
            if ensureReady(("lung_coarse", "lung_fine")):
                node = self._parameterNode
                self.display.start(
                    lambda listener: self.logic.process(
                        node.inputVolume, node.outputSegmentation, node.quality, node.device, False, listener
                    ),
                    self._segmented,
                )

    def _segmented(self, node: Any) -> None:
        from LCTfoundSlicer.run_display import duration

        if node is None:
            return
        if self._parameterNode is None:  # another module is open by now: it is there on return
            self.logic.getParameterNode().outputSegmentation = node
            return
        shown = self.tree.case is not None and self.tree.case.node is node
        self._parameterNode.outputSegmentation = node  # shows it, unless it was chosen before
        if shown:
            self._showResult(node)
        self._recolor()
        seconds = self.tree.case.result.get("provenance", {}).get("seconds", {})
        self.display.say(_("Done in {time}.").format(time=duration(sum(seconds.values()))))

    # -- the result ------------------------------------------------------------------------------------------------

    def _showResult(self, node: Any) -> None:
        from LCTfoundSlicer.lung_result import LungCase

        self._stopPicking()
        case = LungCase(node) if node is not None else None
        self.tree.setCase(case)
        self._observeResult(node)
        self.ui.show3DButton.setSegmentationNode(node)
        self.ui.findingsText.html = _findingsText(case) if case is not None and case.isResult else ""

    def _observeResult(self, node: Any) -> None:
        """Follow what others (the Segment Editor, the Segmentations module) do to the result."""
        for observed, event, method in list(getattr(self, "_resultObservers", [])):
            if self.hasObserver(observed, event, method):
                self.removeObserver(observed, event, method)
        self._resultObservers = []
        if node is None:
            return
        segmentation = node.GetSegmentation()
        wanted = [(segmentation, segmentation.SourceRepresentationModified, self._boundariesChanged)]
        wanted += [(node, node.DisplayModifiedEvent, self._displayChanged)]
        for observed, event, method in wanted:
            self.addObserver(observed, event, method)
            self._resultObservers.append((observed, event, method))

    def _boundariesChanged(self, caller: Any, event: Any) -> None:
        if not self.display.isRunning:
            self.tree.refreshVolumes()

    def _displayChanged(self, caller: Any, event: Any) -> None:
        self.tree.refreshVisibility()

    def _recolor(self) -> None:
        from LCTfoundSlicer.structure_tree import ColorBy, applyColors

        if self.tree.case is not None and self.tree.case.isResult:
            applyColors(self.tree.case, ColorBy(self._parameterNode.colorBy))
            self.tree.refreshColors()

    def _structuresSelected(self, keys: Sequence[str]) -> None:
        if len(keys) == 1 and self.tree.case is not None:
            opacity = self.tree.case.node.GetDisplayNode().GetSegmentOpacity3D(keys[0])
            blocked = self.ui.opacitySlider.blockSignals(True)
            self.ui.opacitySlider.setValue(round(100 * opacity))
            self.ui.opacitySlider.blockSignals(blocked)

    def onOpacityChanged(self, value: int) -> None:
        case = self.tree.case
        if case is None or case.node.GetDisplayNode() is None:
            return
        display = case.node.GetDisplayNode()
        modifying = display.StartModify()
        for key in self.tree.selectedKeys() or case.node.GetSegmentation().GetSegmentIDs():
            display.SetSegmentOpacity3D(key, value / 100)
            display.SetSegmentOpacity2DFill(key, value / 100)
        display.EndModify(modifying)

    # -- correcting ------------------------------------------------------------------------------------------------

    def onPickToggled(self, picking: bool) -> None:
        if not picking:
            self._stopPicking()
            return
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", _("Branch"))
        node.CreateDefaultDisplayNodes()
        node.SetSaveWithScene(False)
        self._pickNode = node
        self.addObserver(node, node.PointPositionDefinedEvent, self._pointPlaced)
        logic = slicer.modules.markups.logic()
        logic.SetActiveListID(node)
        logic.StartPlaceMode(False)
        self.ui.branchLabel.text = _("Click a bronchus or an artery in a slice or in 3D.")

    def _pointPlaced(self, caller: Any, event: Any) -> None:
        point = [0.0, 0.0, 0.0]
        caller.GetNthControlPointPositionWorld(0, point)
        self.pickBranchAt(point)

    def pickBranchAt(self, point: Sequence[float]) -> None:
        """Choose the branch nearest to a point (RAS mm) and show it."""
        picked = self.logic.branchAt(self.tree.case.node, point)
        self._stopPicking()
        self._picked = picked
        self.ui.branchSegmentComboBox.clear()
        if picked is None:
            self.ui.branchLabel.text = _("There is no bronchus or artery near that point; pick another.")
        else:
            self.ui.branchLabel.text = picked.sentence
            for code, name in picked.choices:
                self.ui.branchSegmentComboBox.addItem(name, code)
            index = self.ui.branchSegmentComboBox.findData(picked.segment)
            self.ui.branchSegmentComboBox.setCurrentIndex(max(0, index))
            picked.show()
        self._updateButtons()

    def _stopPicking(self) -> None:
        if self._picked is not None:
            self._picked.hide()
            self._picked = None
        node, self._pickNode = self._pickNode, None
        if node is not None:
            self.removeObserver(node, node.PointPositionDefinedEvent, self._pointPlaced)
            slicer.mrmlScene.RemoveNode(node)
            interaction = slicer.app.applicationLogic().GetInteractionNode()
            if interaction is not None:
                interaction.SwitchToViewTransformMode()
        if self.ui.pickButton.checked:
            blocked = self.ui.pickButton.blockSignals(True)
            self.ui.pickButton.checked = False
            self.ui.pickButton.blockSignals(blocked)

    def onRelabelButton(self) -> None:
        picked, code = self._picked, self.ui.branchSegmentComboBox.currentData
        node = self.tree.case.node
        self._correct(lambda listener: self.logic.renameBranch(node, picked.tree, picked.branch, code, False, listener))

    def onUndoButton(self) -> None:
        self._correct(lambda listener: self.logic.undoRename(self.tree.case.node, False, listener))

    def onRedoButton(self) -> None:
        self._correct(lambda listener: self.logic.redoRename(self.tree.case.node, False, listener))

    def _correct(self, start: Any) -> None:
        with slicer.util.tryWithErrorDisplay(_("The branch could not be renamed.")):
            self._stopPicking()
            self.display.start(start, self._corrected)

    def _corrected(self, node: Any) -> None:
        self._showResult(node)
        self._recolor()
        self.display.say(_("The territories follow the new names."))

    def onEditButton(self) -> None:
        copy = self.logic.copyForEditing(self.tree.case.node)
        self._parameterNode.outputSegmentation = copy
        _openSegmentEditor(copy)

    # -- taking along ----------------------------------------------------------------------------------------------

    def onExportButton(self) -> None:
        node, boxes = self._parameterNode, _formatBoxes(self.ui)
        formats = [name for name, box in boxes.items() if box.checked]
        choice = self.ui.selectionComboBox.currentData
        structures = {"shown": self.tree.checkedKeys, "selected": self.tree.selectedKeys}.get(choice, lambda: None)()
        if not node.exportFolder or not formats or structures == []:
            slicer.util.warningDisplay(_("Choose a folder, at least one format, and at least one structure."))
            return
        with slicer.util.tryWithErrorDisplay(_("The export could not be started.")):
            self.display.start(
                lambda listener: self.logic.exportModels(
                    self.tree.case.node,
                    node.exportFolder,
                    formats,
                    structures,
                    node.triangles,
                    node.frame,
                    node.singleFile,
                    False,
                    listener,
                ),
                lambda folder: self.display.say(_("Exported to {folder}").format(folder=folder)),
            )

    def onTableButton(self) -> None:
        table = self.logic.volumesTable(self.tree.case.node)
        self.display.say(_("Table '{name}' is in the scene.").format(name=table.GetName()))
        slicer.app.applicationLogic().GetSelectionNode().SetActiveTableID(table.GetID())
        slicer.app.applicationLogic().PropagateTableSelection()


def _formatBoxes(ui: Any) -> dict[str, Any]:
    return {
        "stl": ui.stlCheckBox,
        "obj": ui.objCheckBox,
        "ply": ui.plyCheckBox,
        "glb": ui.glbCheckBox,
        "seg.nrrd": ui.segNrrdCheckBox,
        "dicom-seg": ui.dicomSegCheckBox,
        "csv": ui.csvCheckBox,
        "report": ui.reportCheckBox,
    }


def _findingsText(case: Any) -> str:
    """The quality findings in words, the most severe first; a sign tells the severity, not only a color."""
    from html import escape

    signs = {"serious": "&#9888;", "warning": "&#9651;", "note": "&#8226;"}
    findings = [item for item in case.result.get("findings") or [] if isinstance(item, dict)]
    lines = [
        f"{signs.get(item.get('name', ''), '&#8226;')} {escape(str(item.get('sentence', '')))}" for item in findings
    ]
    if case.isEdited:
        lines.insert(0, escape(_("Edited copy: findings and confidence are those of the computed result.")))
    return "<br>".join(lines) or escape(_("No quality problem was found."))


def _openSegmentEditor(segmentation: Any) -> None:
    """Edit in Slicer's Segment Editor, where it is; painting into a neighbor moves the border, the trees are kept."""
    if not hasattr(slicer.modules, "segmenteditor"):
        return
    display = segmentation.GetDisplayNode()
    for key in ("airway", "pulmonary_artery", "pulmonary_vein"):
        display.SetSegmentVisibility(key, False)  # only what is visible is overwritten
    slicer.util.selectModule("SegmentEditor")
    editor = slicer.modules.segmenteditor.widgetRepresentation().self().editor
    editor.setSegmentationNode(segmentation)
    editor.mrmlSegmentEditorNode().SetOverwriteMode(slicer.vtkMRMLSegmentEditorNode.OverwriteVisibleSegments)


class LCTfoundLungSegmentationTest(ScriptedLoadableModuleTest):
    """Runs in Slicer as ``py_LCTfoundLungSegmentation`` and on the project's host."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        self.setUp()
        self.test_a_chest_gets_its_structures()
        self.setUp()
        self.test_an_image_without_lungs_is_refused()

    def test_a_chest_gets_its_structures(self) -> None:
        """The real engine on a small chest made of ellipsoids: a segmentation on the CT's grid, both lungs found."""
        volume = _smallChest()
        logic = LCTfoundLungSegmentationLogic()
        segmentation = logic.process(volume, quality="fast", device="cpu")
        ids = segmentation.GetSegmentation().GetSegmentIDs()
        self.assertTrue(any(key.startswith("right_") for key in ids) and any(key.startswith("left_") for key in ids))
        right, left = (
            np.mean([segmentation.GetSegmentCenterRAS(key)[0] for key in ids if key.startswith(side)])
            for side in ("right_", "left_")
        )
        self.assertGreater(right, left)  # RAS: the patient's right is positive

    def test_an_image_without_lungs_is_refused(self) -> None:
        """Nothing is added to the scene, and the sentence says what to do."""
        from LCTfoundSlicer.run import RunFailed

        volume = _smallChest()
        slicer.util.arrayFromVolume(volume)[:] = 40
        slicer.util.arrayFromVolumeModified(volume)
        before = slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode")
        with self.assertRaises(RunFailed):
            LCTfoundLungSegmentationLogic().process(volume, quality="fast", device="cpu")
        self.assertEqual(slicer.mrmlScene.GetNumberOfNodesByClass("vtkMRMLSegmentationNode"), before)


def _smallChest() -> Any:
    """A CT of ellipsoids, 4 mm: body, lungs, trachea."""
    shape, spacing = (60, 64, 88), 4.0
    k, j, i = np.indices(shape, dtype=np.float32)
    x, y, z = (i - 43.5) * spacing, (j - 31.5) * spacing, (k - 29.5) * spacing
    hu = np.full(shape, -1000, np.int16)
    hu[(x / 170) ** 2 + (y / 120) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - side * 75) / 55) ** 2 + (y / 80) ** 2 + (z / 105) ** 2 < 1] = -850
    hu[(x**2 + (y + 20) ** 2 < 9**2) & (z > 10)] = -990
    noise = np.random.default_rng(0).normal(0, 15, shape)
    volume = slicer.util.addVolumeFromArray(
        (hu + noise).astype(np.int16), name="Small chest", nodeClassName="vtkMRMLScalarVolumeNode"
    )
    matrix = vtk.vtkMatrix4x4()
    for axis, (sign, origin) in enumerate(((-1, 174.0), (-1, 126.0), (1, -118.0))):
        matrix.SetElement(axis, axis, sign * spacing)
        matrix.SetElement(axis, 3, origin)
    volume.SetIJKToRASMatrix(matrix)
    return volume
