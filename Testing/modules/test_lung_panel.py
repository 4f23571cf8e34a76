"""The lung panel with the real engine on a synthetic patient: run, cancel, crash, correct, export, save, reopen."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed: pip install -e '.[host]'")
import vtk  # noqa: E402

pytestmark = [pytest.mark.alone, pytest.mark.end_to_end, pytest.mark.timeout(400)]

_MODULE = Path(__file__).parents[2] / "LCTfound" / "LCTfoundLungSegmentation" / "LCTfoundLungSegmentation.py"
#: Seconds a run on the synthetic patient may take on a busy machine of two cores.
_LONG = 180


@pytest.fixture
def panel(host, shipped_weights):
    """The panel's widget, opened."""
    host.load_module(_MODULE)
    widget = slicer.modules.lctfoundlungsegmentation.widgetRepresentation().self()
    widget.enter()
    yield widget
    widget.display.cancel()
    _spin(lambda: not widget.display.isRunning, 10)
    widget.exit()


def _spin(until, timeout: float) -> float:
    """Let the window live until something is so; the seconds it took."""
    start = time.monotonic()
    _gaps(until, timeout)
    return time.monotonic() - start


def _gaps(until, timeout: float) -> list[float]:
    """The same; the seconds between the turns of the event loop."""
    start = last = time.monotonic()
    gaps = [0.0]
    while not until():
        slicer.app.processEvents()
        now = time.monotonic()
        gaps.append(now - last)
        last = now
        time.sleep(0.002)
        assert now - start < timeout, "waited too long"
    return gaps


def _load(ct, name: str = "Patient"):
    """A CT of the engine as a volume node."""
    node = slicer.util.addVolumeFromArray(ct.array.astype(np.int16), name=name)
    ras = np.diag([-1, -1, 1, 1]) @ ct.affine
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy(ras.ravel().tolist())
    node.SetIJKToRASMatrix(matrix)
    return node


@pytest.fixture(scope="session")
def one_lung(phantom_case):
    """16 cm around the right lung: a run takes a quarter of the time, where it does not matter what is seen."""
    middle = np.argwhere(np.isin(phantom_case.segments.array, range(1, 11))).mean(axis=0).astype(int)
    return phantom_case.ct.crop(middle - 32, middle + 32)


@pytest.fixture(scope="session")
def finished_scene(host, phantom_case, shipped_weights, tmp_path_factory) -> Path:
    """A scene with a CT and its result, saved once; tests open it."""
    slicer.mrmlScene.Clear(0)
    host.load_module(_MODULE)
    logic = slicer.modules.lctfoundlungsegmentation.widgetRepresentation().self().logic
    logic.process(_load(phantom_case.ct), quality="fast", device="cpu")
    path = tmp_path_factory.mktemp("scene") / "finished.mrb"
    assert slicer.util.saveScene(str(path))
    return path


@pytest.fixture
def finished(finished_scene, panel):
    """The panel with a reopened result: (panel, segmentation, CT)."""
    assert slicer.util.loadScene(str(finished_scene))
    panel.enter()
    segmentation = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    panel._parameterNode.outputSegmentation = segmentation
    panel._parameterNode.inputVolume = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    return panel, segmentation, panel._parameterNode.inputVolume


def _arrays(logic_result, volume) -> tuple[np.ndarray, np.ndarray]:
    from LCTfoundSlicer.lung_result import collectLabels

    shape = slicer.util.arrayFromVolume(volume).shape
    segments, trees = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    list(collectLabels(logic_result, volume, segments, trees))
    return segments, trees


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / max(float(a.sum() + b.sum()), 1.0)


# -- running ---------------------------------------------------------------------------------------------------------


def test_the_panel_opens_quickly_and_asks_for_a_ct(host, panel) -> None:
    assert not panel.ui.applyButton.enabled
    node = slicer.util.addVolumeFromArray(np.zeros((4, 4, 4), np.int16), name="CT")
    panel._parameterNode.inputVolume = node
    assert panel.ui.applyButton.enabled
    assert panel.ui.inputSelector.currentNode() is node


def test_apply_segments_the_patient(host, panel, phantom_case) -> None:
    """A click on Apply; progress at once; 21 structures where the patient's are, on the CT's grid and in its study.

    From the click to the shown result the window is never blocked.
    """
    volume = _load(phantom_case.ct)
    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    study = hierarchy.CreateStudyItem(hierarchy.GetSceneItemID(), "Study")
    hierarchy.SetItemParent(hierarchy.GetItemByDataNode(volume), study)
    panel._parameterNode.inputVolume = volume
    panel._parameterNode.quality = "fast"
    panel._parameterNode.device = "cpu"
    assert panel.ui.qualityComboBox.currentData == "fast"
    panel.ui.applyButton.click()
    assert panel.ui.applyButton.text == "Cancel" and not panel.ui.progressBar.isHidden()
    gaps = _gaps(lambda: not panel.display.isRunning, _LONG)
    assert np.percentile(gaps, 99) < 0.1
    assert max(gaps) < 0.3
    result = panel._parameterNode.outputSegmentation
    assert result is not None and panel.ui.applyButton.text == "Apply"
    assert hierarchy.GetItemParent(hierarchy.GetItemByDataNode(result)) == study
    segmentation = result.GetSegmentation()
    assert segmentation.GetNumberOfSegments() >= 19
    assert result.GetNodeReference(result.GetReferenceImageGeometryReferenceRole()) is volume
    segments, trees = _arrays(result, volume)
    truth, true_trees = phantom_case.segments.array, phantom_case.trees.array
    assert _dice(segments > 0, truth > 0) > 0.9
    right = np.isin(segments, range(1, 11))
    assert _dice(right, np.isin(truth, range(1, 11))) > 0.9  # left is left
    assert _dice(trees == 1, true_trees == 1) > 0.4
    for key in segmentation.GetSegmentIDs():
        segment = segmentation.GetSegment(key)
        tag = vtk.reference("")
        assert segment.GetTag(segment.GetTerminologyEntryTagName(), tag) and "SCT^" in str(tag)
        surface = segment.GetRepresentation("Closed surface")
        assert surface is not None and surface.GetNumberOfCells() > 50
        bounds = np.array(surface.GetBounds()).reshape(3, 2)
        center = np.array(result.GetSegmentCenterRAS(key))
        assert (bounds[:, 0] - 5 < center).all() and (center < bounds[:, 1] + 5).all()


def test_the_tree_shows_groups_volumes_and_confidence(finished) -> None:
    panel, segmentation, volume = finished
    tree = panel.ui.structureTree
    tops = [tree.topLevelItem(n).text(0) for n in range(tree.topLevelItemCount)]
    assert tops == ["Airways", "Vessels", "Right lung", "Left lung"]
    right = tree.topLevelItem(2)
    assert [right.child(n).text(0) for n in range(right.childCount())] == [
        "Right upper lobe",
        "Right middle lobe",
        "Right lower lobe",
    ]
    segments, _ = _arrays(segmentation, volume)
    voxel = float(np.prod(volume.GetSpacing())) / 1000
    assert float(right.text(1)) == pytest.approx(np.isin(segments, range(1, 11)).sum() * voxel, abs=1)
    item = right.child(0).child(0)
    assert item.text(0).startswith("Right S") and item.text(2).split()[0].isdigit()


def test_checking_a_lobe_hides_its_segments_and_a_click_jumps(finished) -> None:
    import qt

    panel, segmentation, _ = finished
    lobe = panel.ui.structureTree.topLevelItem(3).child(1)
    assert lobe.text(0) == "Left lower lobe"
    lobe.setCheckState(0, qt.Qt.Unchecked)
    display = segmentation.GetDisplayNode()
    assert not display.GetSegmentVisibility("left_s10") and display.GetSegmentVisibility("left_s03")
    assert panel.ui.structureTree.topLevelItem(3).checkState(0) == qt.Qt.PartiallyChecked
    display.SetSegmentVisibility("left_s10", True)  # someone else shows it again
    assert lobe.checkState(0) == qt.Qt.PartiallyChecked
    slice_node = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSliceNode")
    if slice_node is None:
        slice_node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceNode")
        slice_node.SetLayoutName("Red")
        slice_node.SetOrientationToAxial()
    panel.tree._itemClicked(panel.ui.structureTree.topLevelItem(2).child(0).child(0), 0)
    center = segmentation.GetSegmentCenterRAS("right_s01")
    assert slice_node.GetSliceToRAS().GetElement(2, 3) == pytest.approx(center[2], abs=1.0)


def test_colors_follow_lobe_or_segment(finished) -> None:
    panel, segmentation, _ = finished
    content = segmentation.GetSegmentation()

    def colors() -> set:
        return {content.GetSegment(key).GetColor() for key in ("right_s01", "right_s02", "right_s03")}

    panel.ui.colorComboBox.setCurrentIndex(panel.ui.colorComboBox.findData("lobe"))
    assert len(colors()) == 1
    panel.ui.colorComboBox.setCurrentIndex(panel.ui.colorComboBox.findData("segment"))
    assert len(colors()) == 3


def test_findings_are_told_in_words(finished) -> None:
    panel, segmentation, _ = finished
    findings = json.loads(segmentation.GetAttribute("LCTfound.Result"))["findings"]
    for finding in findings:
        assert finding["sentence"] in panel.ui.findingsText.plainText
    assert any("vessels" in finding["sentence"] for finding in findings)  # these weights exchange arteries and veins


# -- stopping and failing --------------------------------------------------------------------------------------------


def _start(panel, phantom_case, until="worker"):
    panel._parameterNode.inputVolume = _load(phantom_case.ct)
    panel._parameterNode.quality = "standard"
    panel._parameterNode.device = "cpu"
    nodes = _nodes()
    panel.ui.applyButton.click()
    _spin(lambda: panel.ui.progressBar.value > 120, _LONG)
    return nodes


def _nodes() -> set[str]:
    return {node.GetID() for node in slicer.util.getNodes("*").values() if node.GetID()}


def test_cancel_stops_within_a_second_and_leaves_the_scene_as_it_was(host, panel, phantom_case) -> None:
    nodes = _start(panel, phantom_case)
    panel.ui.applyButton.click()
    assert _spin(lambda: not panel.display.isRunning, 5) < 1.0
    assert _nodes() == nodes and panel._parameterNode.outputSegmentation is None
    assert "Stopped" in panel.ui.statusLabel.text


def test_closing_the_scene_while_running_stops_the_run(host, panel, phantom_case) -> None:
    _start(panel, phantom_case)
    slicer.mrmlScene.Clear(0)
    _spin(lambda: not panel.display.isRunning, 5)
    assert slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode") is None


def test_a_worker_that_dies_costs_no_scene_and_the_next_run_works(host, panel, phantom_case) -> None:
    from LCTfoundSlicer.run import RunFailed, sharedRunner

    nodes = _start(panel, phantom_case)
    os.kill(sharedRunner().workerPid, signal.SIGKILL)
    _spin(lambda: not panel.display.isRunning, 5)
    assert _nodes() == nodes
    assert panel.ui.statusLabel.text  # one sentence
    small = _load(phantom_case.ct.crop((0, 0, 0), (20, 20, 20)), "Corner")
    with pytest.raises(RunFailed):  # no lungs there, and the fresh worker says so
        panel.logic.process(small, quality="fast", device="cpu")


def test_a_result_is_not_applied_to_a_ct_that_changed_meanwhile(host, panel, one_lung) -> None:
    from LCTfoundSlicer.run import RunFailed

    volume = _load(one_lung)
    run = panel.logic.process(volume, quality="fast", device="cpu", waitForCompletion=False)
    volume.SetSpacing(1, 1, 1)
    with pytest.raises(RunFailed, match="changed"):
        run.wait(_LONG)
    assert slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode") is None


def test_a_result_that_comes_while_another_module_is_open_is_there_on_return(panel) -> None:
    panel.exit()
    assert panel._parameterNode is None
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Late")
    panel._segmented(node)
    panel.enter()
    assert panel._parameterNode.outputSegmentation is node and panel.tree.case.node is node


def test_two_runs_at_once_follow_each_other(host, panel, one_lung) -> None:
    volume = _load(one_lung)
    runs = [panel.logic.process(volume, quality="fast", device="cpu", waitForCompletion=False) for _ in range(2)]
    results = [run.wait(_LONG) for run in runs]
    assert results[0] is not results[1]
    for a, b in zip(_arrays(results[0], volume), _arrays(results[1], volume), strict=True):
        np.testing.assert_array_equal(a, b)


# -- correcting ------------------------------------------------------------------------------------------------------


def _largestBranch(segmentation, code: int):
    """First node of the largest airway branch of a segment, and a point in it (RAS)."""
    from LCTfoundSlicer.branches import BranchPicker

    picker = BranchPicker.of(segmentation)
    graph = picker._graphs["airway"]
    nodes = np.flatnonzero(graph.segment == code)
    point = picker._worldFromEngine @ np.array([*graph.points[nodes[len(nodes) // 2]], 1])
    return picker.at(point[:3])


def test_a_renamed_branch_moves_its_territory_and_undo_brings_it_back(finished) -> None:
    panel, segmentation, volume = finished
    before, trees_before = _arrays(segmentation, volume)
    source = next(code for code in (1, 2, 3) if (before == code).any() and _hasAirway(segmentation, code))
    target = next(code for code in (1, 2, 3) if code != source)
    picked = _largestBranch(segmentation, source)
    assert picked.tree == "airway" and picked.segment == source
    assert {code for code, _ in picked.choices} == {1, 2, 3, 0}
    start = time.monotonic()
    panel.logic.renameBranch(segmentation, picked.tree, picked.branch, target)
    assert time.monotonic() - start < 30
    after, trees_after = _arrays(segmentation, volume)
    upper = np.isin(before, (1, 2, 3))
    np.testing.assert_array_equal(after[~upper], before[~upper])  # other lobes stay as they are
    np.testing.assert_array_equal(trees_after, trees_before)
    assert np.isin(after[upper], (1, 2, 3)).all()
    assert (after == target).sum() > (before == target).sum()
    panel.logic.undoRename(segmentation)
    np.testing.assert_array_equal(_arrays(segmentation, volume)[0], before)
    panel.logic.redoRename(segmentation)
    np.testing.assert_array_equal(_arrays(segmentation, volume)[0], after)


def _hasAirway(segmentation, code: int) -> bool:
    from LCTfoundSlicer.branches import BranchPicker

    return bool((BranchPicker.of(segmentation)._graphs["airway"].segment == code).any())


def test_a_branch_is_picked_in_the_view_and_renamed_in_the_panel(finished) -> None:
    panel, segmentation, volume = finished
    before, _ = _arrays(segmentation, volume)
    source = next(code for code in (1, 2, 3) if _hasAirway(segmentation, code))
    picked = _largestBranch(segmentation, source)
    panel.ui.pickButton.click()
    assert panel._pickNode is not None
    center = np.array(picked.line.GetPoint(0))
    panel._pickNode.AddControlPoint(vtk.vtkVector3d(*center))  # a click places the point
    _spin(lambda: panel._picked is not None, 5)
    assert not panel.ui.pickButton.checked and panel._picked.tree in ("airway", "artery")
    assert slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLMarkupsFiducialNode") is None
    other = next(code for code, _ in panel._picked.choices if code not in (0, panel._picked.segment))
    panel.ui.branchSegmentComboBox.setCurrentIndex(panel.ui.branchSegmentComboBox.findData(other))
    panel.ui.relabelButton.click()
    _spin(lambda: not panel.display.isRunning, 60)
    assert panel.ui.undoButton.enabled
    panel.ui.undoButton.click()
    _spin(lambda: not panel.display.isRunning, 60)
    np.testing.assert_array_equal(_arrays(segmentation, volume)[0], before)
    assert panel.ui.redoButton.enabled and not panel.ui.undoButton.enabled


def test_editing_is_done_in_a_copy(finished) -> None:
    panel, segmentation, volume = finished
    before, _ = _arrays(segmentation, volume)
    panel.ui.editButton.click()
    copy = panel._parameterNode.outputSegmentation
    assert copy is not segmentation and "edited" in copy.GetName()
    array = slicer.util.arrayFromSegmentBinaryLabelmap(copy, "right_s01", volume)
    array[:] = 0
    array[2:6, 2:6, 2:6] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(array, copy, "right_s01", volume)
    np.testing.assert_array_equal(_arrays(segmentation, volume)[0], before)
    edited, _ = _arrays(copy, volume)
    assert (edited[2:6, 2:6, 2:6] == 1).all() and (edited == 1).sum() == 64
    assert "Edited" in panel.ui.findingsText.plainText


# -- taking along ----------------------------------------------------------------------------------------------------


def test_every_format_is_exported_and_read_back(finished, tmp_path) -> None:
    panel, segmentation, volume = finished
    formats = ["stl", "obj", "ply", "glb", "seg.nrrd", "nifti", "csv", "report"]
    folder = panel.logic.exportModels(segmentation, tmp_path / "out", formats)
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {entry["path"] for entry in manifest["files"]}
    assert {"segmentation.seg.nrrd", "volumes.csv", "report.html"} <= names
    bounds = segmentation.GetSegmentation().GetSegment("left_s03").GetRepresentation("Closed surface").GetBounds()
    for kind in ("stl", "obj", "ply"):
        model = slicer.util.loadModel(str(folder / "models" / kind / f"left_s03.{kind}"))
        np.testing.assert_allclose(model.GetPolyData().GetBounds(), bounds, atol=3.0)  # Slicer turns LPS into RAS
    again = slicer.util.loadSegmentation(str(folder / "segmentation.seg.nrrd"))
    for a, b in zip(_arrays(again, volume), _arrays(segmentation, volume), strict=True):
        np.testing.assert_array_equal(a, b)
    with (folder / "volumes.csv").open() as file:
        assert {row["key"] for row in csv.DictReader(file)} >= {"right_upper_lobe", "airway"}


def test_a_ct_from_dicom_is_exported_as_dicom_seg(host, panel, one_lung, tmp_path) -> None:
    """Loaded from DICOM files as Slicer does; the file refers to them, and each segment lies where the scene has it."""
    import highdicom
    import pydicom

    from LCTfoundLib.anatomy.structures import STRUCTURES
    from Testing.engine.dicom_series import write_series

    files = sorted(write_series(one_lung, tmp_path / "series", np.random.default_rng()).iterdir())
    volume = host.load_dicom_folder(tmp_path / "series")[0]
    segmentation = panel.logic.process(volume, quality="fast", device="cpu")
    folder = panel.logic.exportModels(segmentation, tmp_path / "out", ["dicom-seg"])
    written = highdicom.seg.segread(next(folder.glob("*.dcm")))
    source = pydicom.dcmread(files[0], stop_before_pixels=True)
    assert written.StudyInstanceUID == source.StudyInstanceUID and written.PatientID == source.PatientID
    assert "research" in written.SeriesDescription.lower()
    segments, trees = _arrays(segmentation, volume)
    numbers = {item.SegmentLabel: int(item.SegmentNumber) for item in written.SegmentSequence}
    array = written.get_volume(combine_segments=False).array
    for s in STRUCTURES:
        count = int((segments == s.code).sum() if s.tree is None else (trees == s.tree).sum())
        assert (s.name in numbers) == (count > 0)
        if count:
            assert (array[..., numbers[s.name] - 1] > 0).sum() == count


def test_a_selection_is_exported_to_one_file_in_ras(finished, tmp_path) -> None:
    panel, segmentation, _ = finished
    panel.ui.exportPathLineEdit.currentPath = str(tmp_path / "chosen")
    for name, box in {"stl": panel.ui.stlCheckBox, "csv": panel.ui.csvCheckBox, "r": panel.ui.reportCheckBox}.items():
        box.checked = name == "stl"
    panel.ui.singleFileCheckBox.checked = True
    panel.ui.frameComboBox.setCurrentIndex(panel.ui.frameComboBox.findData("RAS"))
    for n in (0, 1, 3):
        import qt

        panel.ui.structureTree.topLevelItem(n).setCheckState(0, qt.Qt.Unchecked)
    panel.ui.selectionComboBox.setCurrentIndex(panel.ui.selectionComboBox.findData("shown"))
    panel.ui.exportButton.click()
    _spin(lambda: not panel.display.isRunning, 60)
    models = list((tmp_path / "chosen" / "models").rglob("*.stl"))
    assert len(models) == 1
    bounds = slicer.util.loadModel(str(models[0])).GetPolyData().GetBounds()
    assert bounds[0] > -15  # only the right lung: positive x in RAS


def test_an_export_into_a_folder_of_others_is_refused(finished, tmp_path) -> None:
    from LCTfoundSlicer.run import RunFailed

    panel, segmentation, _ = finished
    target = tmp_path / "file"
    target.write_text("not a folder")
    with pytest.raises(RunFailed):
        panel.logic.exportModels(segmentation, target, ["csv"])
    assert target.read_text() == "not a folder"


def test_volumes_go_to_a_table(finished) -> None:
    panel, segmentation, _ = finished
    panel.ui.tableButton.click()
    table = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLTableNode")
    assert table.GetNumberOfRows() == segmentation.GetSegmentation().GetNumberOfSegments()
    assert table.GetCellText(0, 0) and float(table.GetCellText(0, 1)) > 0


# -- scene -----------------------------------------------------------------------------------------------------------


def test_a_saved_scene_reopens_with_the_panels_state_and_result(host, panel, finished_scene, tmp_path) -> None:
    assert slicer.util.loadScene(str(finished_scene))
    panel.enter()
    segmentation = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSegmentationNode")
    panel._parameterNode.outputSegmentation = segmentation
    panel._parameterNode.quality = "full"
    panel._parameterNode.triangles = 123_000
    panel._parameterNode.singleFile = True
    segmentation.GetDisplayNode().SetSegmentVisibility("left_s03", False)
    name = segmentation.GetName()
    path = tmp_path / "again.mrb"
    assert slicer.util.saveScene(str(path))
    slicer.mrmlScene.Clear(0)
    assert panel.tree.case is None
    assert slicer.util.loadScene(str(path))
    panel.enter()
    node = panel._parameterNode
    assert node.quality == "full" and node.triangles == 123_000 and node.singleFile
    assert panel.ui.qualityComboBox.currentData == "full" and panel.ui.trianglesSpinBox.value == 123_000
    assert node.outputSegmentation.GetName() == name
    assert panel.tree.case is not None and "left_s03" not in panel.tree.checkedKeys()
    assert panel.ui.pickButton.enabled  # the state for renaming came along
    assert _largestBranch(node.outputSegmentation, _anyNamed(node.outputSegmentation)) is not None


def _anyNamed(segmentation) -> int:
    return next(code for code in range(1, 19) if _hasAirway(segmentation, code))


def test_a_transformed_ct_gets_a_result_in_the_same_place(host, panel, phantom_case, one_lung) -> None:
    """A rigid parent transform that stands the patient on the head: computed upright in the world, shown on the CT."""
    ct = one_lung
    upside = ct.with_array(np.ascontiguousarray(ct.array[::-1, ::-1]))  # turned about x by half a turn
    volume = _load(upside)
    i, j, k = np.array(ct.shape[::-1]) - 1
    ras = np.diag([-1, -1, 1, 1]) @ ct.affine
    flip = np.array([[1, 0, 0, 0], [0, -1, 0, j], [0, 0, -1, k], [0, 0, 0, 1.0]])
    world = ras @ flip @ np.linalg.inv(ras)
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "Upright")
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy(world.ravel().tolist())
    transform.SetMatrixTransformToParent(matrix)
    volume.SetAndObserveTransformNodeID(transform.GetID())
    result = panel.logic.process(volume, quality="fast", device="cpu")
    assert result.GetTransformNodeID() == transform.GetID()
    segments, _ = _arrays(result, volume)
    first = np.rint(phantom_case.ct.index_from_world(ct.world_from_index(np.zeros(3)))).astype(int)
    k, j, i = (slice(start, start + count) for start, count in zip(first, ct.shape, strict=True))
    truth = phantom_case.segments.array[k, j, i][::-1, ::-1]
    right = np.isin(truth, range(1, 11))
    assert _dice(segments > 0, truth > 0) > 0.8
    assert _dice(np.isin(segments, range(1, 11)), right) > 0.8


def test_the_modules_own_tests_pass(host, shipped_weights) -> None:
    host.load_module(_MODULE)
    import sys

    module = sys.modules["LCTfoundLungSegmentation"]
    module.LCTfoundLungSegmentationTest().runTest()
