"""The reconstruction panel with the real engine on a small chest: each task, refusals, cancel, maps, DICOM, scene."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from vtk.util.numpy_support import vtk_to_numpy

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed: pip install -e '.[host]'")

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(200)]

_MODULE = Path(__file__).parents[2] / "LCTfound" / "LCTfoundReconstruction" / "LCTfoundReconstruction.py"
#: Seconds a run on the small chest may take on a busy machine.
_LONG = 120


@pytest.fixture
def panel(host):
    host.load_module(_MODULE)
    widget = slicer.modules.lctfoundreconstruction.widgetRepresentation().self()
    widget.enter()
    yield widget
    widget.display.cancel()
    _spin(lambda: not widget.display.isRunning, 10)
    widget.exit()


@pytest.fixture
def chest(panel):
    """A CT of 60 x 44 pixels of 6 mm, in a window of its own."""
    volume = sys.modules["LCTfoundReconstruction"]._smallChest()
    volume.GetDisplayNode().AutoWindowLevelOff()
    volume.GetDisplayNode().SetWindowLevel(1234, -432)
    panel._parameterNode.inputVolume = volume
    panel._parameterNode.device = "cpu"
    panel._parameterNode.sliceCount = 2
    return volume


@pytest.fixture
def toy_weight(tmp_path):
    """A folder with an unrolled net as new as they come, chosen as the user's folder of weights."""
    from LCTfoundLib.networks.restoration import RestorationConfig
    from LCTfoundLib.networks.unrolled import UNROLLED_WEIGHT, UnrolledConfig, UnrolledNet
    from LCTfoundLib.weights.registry import Card, DataSource, save_weight
    from LCTfoundSlicer.slicer_doors import applicationSettings
    from LCTfoundSlicer.weights import Weights

    config = UnrolledConfig(2, 2, RestorationConfig(3, 2, 4, (8,), (1,)))
    card = Card(
        name=UNROLLED_WEIGHT, version="7", task="", architecture="UnrolledNet",
        architecture_parameters=config.to_dict(), spacing=(1.0, 1.0, 1.0), classes=(),
        data=(DataSource("none", "CC0-1.0"),), license="CC0-1.0", seed=0, commit="", numbers={}, intended_use="",
        limits="",
    )  # fmt: skip
    save_weight(UnrolledNet(config).state_dict(), card, tmp_path)
    weights = Weights(applicationSettings())
    weights.chooseFolder(tmp_path)
    yield tmp_path
    weights.chooseFolder(None)


def _spin(until, timeout: float) -> float:
    """Let the window live until something is so; the seconds it took."""
    start = time.monotonic()
    while not until():
        slicer.app.processEvents()
        time.sleep(0.002)
        assert time.monotonic() - start < timeout, "waited too long"
    return time.monotonic() - start


def _run(panel):
    """Press Run, wait, and return the result as a case."""
    panel.ui.runButton.click()
    _spin(lambda: not panel.display.isRunning, _LONG)
    assert panel.case.isResult, panel.ui.statusLabel.text
    return panel.case


def _interpolate(panel, slices: int) -> None:
    """Choose the quickest task there is: thick slices are made of some of the CT's, and made thin again."""
    chosen = panel._parameterNode
    chosen.task, chosen.mode, chosen.method, chosen.sliceMm = "super_resolution", "slices", "cubic", 12.0
    chosen.sliceCount = slices


def _nodes() -> set[str]:
    return {node.GetID() for node in slicer.util.getNodes("*").values() if node.GetID()}


def _cells(table) -> dict[str, list[str]]:
    rows = [[table.item(row, column).text() for column in range(3)] for row in range(table.rowCount)]
    return {first: rest for first, *rest in rows}


def _array(node) -> np.ndarray:
    return slicer.util.arrayFromVolume(node)


def _ijkToRAS(node) -> np.ndarray:
    return slicer.util.arrayFromVTKMatrix(_matrix(node))


def _matrix(node):
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrix


def test_few_views_become_a_marked_volume_beside_what_there_was(host, panel, chest) -> None:
    """Preview: names, attributes, window, geometry, maps, numbers with lights; the CT as it was; a saved scene."""
    before, names = _array(chest).copy(), chest.GetName()
    panel._parameterNode.tier = "preview"
    case = _run(panel)
    assert (_array(chest) == before).all() and chest.GetName() == names and case.node is not chest
    assert case.node.GetName() == "Small chest sparse view 16 (derived, simulated scan)"
    assert case.node.GetAttribute("LCTfound.Synthetic") == "YES" and case.node.GetAttribute("LCTfound.Derived") == "YES"
    display = case.node.GetDisplayNode()
    assert (display.GetWindow(), display.GetLevel()) == (1234, -432)
    # The slices are squares padded with air: the CT lies in their middle rows.
    image = _array(case.node)
    assert image.shape == (2, 60, 60)
    corner = np.linalg.inv(_ijkToRAS(case.node)) @ _ijkToRAS(chest) @ [0, 0, 0, 1]
    np.testing.assert_allclose(corner[:2], [0, 8], atol=1e-3)
    first = -round(float(corner[2]))
    error = np.abs(image[:, 8:52].astype(float) - before[first : first + 2])
    assert error.mean() < 25
    np.testing.assert_array_equal(_array(case.difference)[:, 8:52], image[:, 8:52] - before[first : first + 2])
    assert case.uncertainty is None and "Filtered" in case.before.GetName() and case.before is not chest
    assert [chart.GetNumberOfPlotSeriesNodes() for chart in case.charts] == [2]
    assert "16 views" in panel.ui.warningsText.plainText and "SIMULATED SCAN" in panel.ui.warningsText.plainText
    cells = _cells(panel.ui.qualityTable)
    assert float(cells["PSNR, dB"][1]) > float(cells["PSNR, dB"][0])
    assert not panel.ui.qualityTable.item(0, 0).icon().isNull()
    panel.ui.mapComboBox.setCurrentIndex(panel.ui.mapComboBox.findData("difference"))
    assert not panel.ui.legendLabel.isHidden()
    assert case.told["residual"] and all(0 <= share < 0.1 for share in case.told["residual"])


def test_the_fast_tier_tells_its_interval_and_is_exported_as_a_derived_series(panel, chest, toy_weight, tmp_path):
    import pydicom

    panel._parameterNode.views = 24
    case = _run(panel)
    assert "synthetic detail" in case.node.GetName() and "sparse view 24" in case.node.GetName()
    assert case.uncertainty is not None and _array(case.uncertainty).min() >= 0
    assert "Truth within the 90 % interval" in _cells(panel.ui.qualityTable)
    assert case.told["provenance"]["weights"]["sparse_view"]["version"] == "7"
    assert panel.logic.exportDicom(case.node, tmp_path / "out") == tmp_path / "out"
    files = sorted((tmp_path / "out" / "dicom").iterdir())
    images = [pydicom.dcmread(file) for file in files]
    assert len(images) == 2 and all("DERIVED" in image.ImageType for image in images)
    assert images[0].DerivationDescription and images[0].SyntheticData == "YES"
    np.testing.assert_array_equal(images[0].pixel_array, _array(case.node)[0])
    lps = np.diag([-1, -1, 1, 1]) @ _ijkToRAS(case.node) @ [0, 0, 0, 1]
    np.testing.assert_allclose([float(x) for x in images[0].ImagePositionPatient], lps[:3], atol=1e-3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["synthetic"] and len(manifest["files"]) == 2


def test_slices_become_thin_and_a_moved_ct_keeps_its_place(panel, chest) -> None:
    """Thick slices of 12 mm are simulated of those of 6 mm; interpolation needs no weight and agrees exactly."""
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    import vtk

    matrix = vtk.vtkMatrix4x4()
    matrix.SetElement(0, 3, 50.0)
    transform.SetMatrixTransformToParent(matrix)
    chest.SetAndObserveTransformNodeID(transform.GetID())
    result = panel.logic.superResolution(chest, None, 12.0, "cubic", slices=((50, 0, 0), 3), device="cpu")
    panel._parameterNode.result = result
    case = panel.case
    assert _array(result).shape == (4, 44, 60) and result.GetTransformNodeID() == transform.GetID()
    shift = np.linalg.inv(_ijkToRAS(chest)) @ _ijkToRAS(result)
    np.testing.assert_allclose(shift[:2, 3], 0, atol=1e-4)
    assert abs(shift[2, 3] - 18) <= 2  # around the middle slice
    assert float(_cells(panel.ui.qualityTable)["Residual, HU"][1]) < 0.1
    assert "thin slices" in result.GetName() and case.told["provenance"]["factor"] == 2


def test_two_linked_views_show_both_at_the_place_that_was_looked_at(host, panel, chest) -> None:
    """With a window: left what there was, right the result with a map over it; the user's own views stay."""
    host.open_window()
    panel.ui.mapComboBox.setCurrentIndex(panel.ui.mapComboBox.findData("none"))
    try:
        slicer.util.setSliceViewerLayers(background=chest, fit=True)
        red = host.layoutManager.sliceWidget("Red").mrmlSliceNode()
        red.SetSliceOffset(39.0)
        _interpolate(panel, 4)
        case = _run(panel)
        widgets = [host.layoutManager.sliceWidget(f"LCTfound{name}") for name in ("Before", "After")]
        left, right = (widget.mrmlSliceCompositeNode() for widget in widgets)
        assert left.GetBackgroundVolumeID() == case.before.GetID()
        assert right.GetBackgroundVolumeID() == case.node.GetID() and right.GetForegroundVolumeID() is None
        assert left.GetLinkedControl() and right.GetLinkedControl()
        groups = [widget.mrmlSliceNode().GetViewGroup() for widget in widgets]
        assert groups[0] == groups[1] != red.GetViewGroup()
        offsets = [widget.mrmlSliceNode().GetSliceOffset() for widget in widgets]
        np.testing.assert_allclose(offsets, 39.0, atol=3.1)
        panel.ui.mapComboBox.setCurrentIndex(panel.ui.mapComboBox.findData("difference"))
        panel.ui.leftComboBox.setCurrentIndex(panel.ui.leftComboBox.findData("ct"))
        assert right.GetForegroundVolumeID() == case.difference.GetID()
        assert left.GetBackgroundVolumeID() == chest.GetID()
        red_layers = host.layoutManager.sliceWidget("Red").mrmlSliceCompositeNode()
        assert red_layers.GetBackgroundVolumeID() == chest.GetID() and red.GetSliceOffset() == 39.0
    finally:
        host.close_window()


def _scanOfABall(folder: Path) -> Path:
    """Seven slices, 5 mm apart from 100 mm up, of a ball of water with a dense rod 60 mm to the patient's left."""
    from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam

    beam = ParallelBeam.around(ImageGrid(64, 64, 5.0), 24)
    angles, place = np.asarray(beam.angles)[:, None], beam.channels_mm
    body = 2 * np.sqrt(np.maximum(130**2 - place**2, 0))
    rod = 2 * np.sqrt(np.maximum(12**2 - (place - 60 * np.cos(angles)) ** 2, 0))
    sinogram = 0.0192 * np.stack([body + (2.0 if k == 3 else 0.5) * rod for k in range(7)])
    path = folder / "ball.npz"
    heights = 100.0 + 5 * np.arange(7)
    np.savez(path, sinogram=sinogram.astype(np.float32), geometry="parallel", angles_rad=np.asarray(beam.angles),
             pitch_mm=beam.pitch_mm, heights_mm=heights, water_per_mm=0.0192)  # fmt: skip
    return path


def test_projections_need_no_ct_and_lie_where_they_were_measured(panel, tmp_path) -> None:
    chosen, ui = panel._parameterNode, panel.ui
    assert not ui.runButton.enabled
    ui.projectionsPathLineEdit.currentPath = str(_scanOfABall(tmp_path))
    assert chosen.projections.endswith("ball.npz") and ui.runButton.enabled
    assert not ui.inputSelector.enabled and not ui.viewsSpinBox.enabled
    chosen.tier, chosen.sliceCount, chosen.device = "preview", 3, "cpu"
    case = _run(panel)
    assert case.node.GetName() == "ball from projections (derived)" and case.volumeNode is None
    assert case.node.GetAttribute("LCTfound.Derived") == "YES"
    image = _array(case.node)
    assert len(image) == 3 and "Filtered" in case.before.GetName() and _array(case.before).shape == image.shape
    row, column = np.argwhere(image[1] > 1500).mean(axis=0)
    world = _ijkToRAS(case.node) @ [column, row, 1, 1]
    np.testing.assert_allclose(world[:3], [-60, 0, 115], atol=4)
    assert np.median(image[1][image[1] > 1500]) == pytest.approx(2000, abs=250) and len(case.charts) == 1
    cells = _cells(ui.qualityTable)
    assert cells["Agreement with the truth"][1] == "not known" and any("Residual" in name for name in cells)
    export = panel.logic.exportDicom(case.node, tmp_path / "export")
    assert len(list((export / "dicom").iterdir())) == 3
    ui.projectionsPathLineEdit.currentPath = str(tmp_path / "nowhere.npz")
    ui.runButton.click()
    _spin(lambda: not panel.display.isRunning, _LONG)
    assert "nowhere.npz" in ui.statusLabel.text
    ui.projectionsPathLineEdit.currentPath = ""
    assert ui.inputSelector.enabled and ui.viewsSpinBox.enabled


def test_the_noise_spectra_are_a_plot_of_their_own(host, panel, rng) -> None:
    """With the shipped net: what became of the noise of each frequency, beside the error of each slice."""
    row, column = np.mgrid[-80:80, -100:100]
    hu = np.where((column / 92) ** 2 + (row / 70) ** 2 < 1, 40, -1000).astype(np.int16)
    hu[np.hypot(np.abs(column) - 50, row) < 25] = -860
    hu = hu + rng.normal(0, 5, (40, *hu.shape)).astype(np.int16)
    volume = slicer.util.addVolumeFromArray(hu, name="Noisy", nodeClassName="vtkMRMLScalarVolumeNode")
    volume.SetSpacing(1.8, 1.8, 6.0)
    result = panel.logic.lowDose(volume, simulate=0.1, keptMm=0.0, slices=((180, 144, 120), 2), device="cpu")
    panel._parameterNode.result = result
    combo, case = panel.ui.plotComboBox, panel.case
    assert [combo.itemText(n) for n in range(combo.count)] == ["by slice", "noise spectrum"]
    assert panel.ui.plotButton.enabled and combo.enabled
    chart = case.charts[1]
    series = [chart.GetNthPlotSeriesNode(n) for n in range(chart.GetNumberOfPlotSeriesNodes())]
    assert [one.GetYColumnName() for one in series] == ["before", "after", "removed"]
    table = series[0].GetTableNode().GetTable()
    power = {name: vtk_to_numpy(table.GetColumnByName(name)) for name in ("1/mm", "before", "after", "removed")}
    assert (np.diff(power["1/mm"]) > 0).all() and power["after"].sum() < 0.8 * power["before"].sum()
    told = case.told["curves"][0]
    np.testing.assert_allclose(power["removed"], told["values"]["removed"])
    try:
        host.open_window()
        combo.setCurrentIndex(1)
        panel.ui.plotButton.click()
        view = slicer.mrmlScene.GetSingletonNode("LCTfoundPlot", "vtkMRMLPlotViewNode")
        assert view is None or view.GetPlotChartNodeID() == chart.GetID()
        assert slicer.app.applicationLogic().GetSelectionNode().GetActivePlotChartID() == chart.GetID()
    finally:
        host.close_window()


def test_what_is_missing_is_told_with_its_remedy(panel, chest) -> None:
    """Weights that are not there, numbers out of range: one sentence, and nothing new in the scene."""
    from LCTfoundSlicer.run import RunFailed

    count = slicer.mrmlScene.GetNumberOfNodes()
    panel._parameterNode.task = "low_dose"
    panel._parameterNode.lowDoseTier = "best"
    panel._parameterNode.strength = 40.0
    assert panel.ui.lowDoseWidget.isVisibleTo(panel.uiWidget) and not panel.ui.sparseViewWidget.isVisibleTo(
        panel.uiWidget
    )
    panel.ui.runButton.click()
    _spin(lambda: not panel.display.isRunning, _LONG)
    assert "low_dose_cold" in panel.ui.statusLabel.text and "fast tier" in panel.ui.statusLabel.text
    panel.ui.keptSpinBox.setValue(12.5)
    assert panel._parameterNode.keptMm == 12.5
    with pytest.raises(RunFailed, match="from 60.0 mm on"):
        panel.logic.lowDose(chest, keptMm=60.0, slices=((0, 0, 0), 1), device="cpu")
    with pytest.raises(RunFailed, match="0.75 to 3 mm"):
        panel.logic.superResolution(chest, None, 5.0, "cubic", simulate=False, device="cpu")
    assert slicer.mrmlScene.GetNumberOfNodes() == count


@pytest.mark.alone
def test_cancel_stops_within_a_second_and_leaves_the_scene_as_it_was(panel, chest) -> None:
    count = slicer.mrmlScene.GetNumberOfNodes()
    panel._parameterNode.tier = "preview"
    panel._parameterNode.slices = "all"
    panel.ui.runButton.click()
    assert panel.ui.runButton.text == "Cancel"
    _spin(lambda: "Reconstructing" in panel.ui.statusLabel.text, _LONG)
    panel.ui.runButton.click()
    assert _spin(lambda: not panel.display.isRunning, 10) < 1.5  # a second, and what a busy machine adds
    assert slicer.mrmlScene.GetNumberOfNodes() == count and "Stopped" in panel.ui.statusLabel.text


def test_what_was_half_shown_when_cancelled_is_taken_away(panel, chest) -> None:
    from LCTfoundSlicer.run import Listener, RunState

    there, asked = _nodes(), []

    def cancel(stage) -> None:
        if stage.fraction > 0.99:  # result, maps and their displays are in the scene
            asked.append(len(_nodes() - there))
            run.cancel()

    slices = ((0, 0, 0), 4)
    run = panel.logic.superResolution(
        chest, None, 12.0, "cubic", slices=slices, device="cpu", waitForCompletion=False, listener=Listener(cancel)
    )
    assert run.wait(_LONG) is None and run.state is RunState.CANCELLED
    assert asked and asked[0] >= 6 and _nodes() == there
    assert not run.folder.exists()


def test_a_result_waits_for_who_left_and_comes_back_with_a_saved_scene(panel, chest, tmp_path) -> None:
    """Another module is open when the run ends; later the scene is saved and reopened, and the result removed."""
    _interpolate(panel, 4)
    panel.ui.runButton.click()
    panel.exit()
    _spin(lambda: not panel.display.isRunning, _LONG)
    assert "Done" in panel.ui.statusLabel.text
    panel.enter()
    assert panel.case.isResult and panel.ui.exportButton.enabled
    name = panel.case.node.GetName()
    assert slicer.util.saveScene(str(tmp_path / "scene.mrb"))
    slicer.mrmlScene.Clear(0)
    assert not panel.case.isResult
    assert slicer.util.loadScene(str(tmp_path / "scene.mrb"))
    panel.enter()
    assert panel._parameterNode.result.GetName() == name
    assert panel.case.before is not None and panel.case.difference is not None and panel.case.volumeNode is not None
    assert "RMSE, HU" in _cells(panel.ui.qualityTable)
    slicer.mrmlScene.RemoveNode(panel.case.node)
    assert not panel.case.isResult and not panel.ui.exportButton.enabled
    assert panel.ui.qualityTable.rowCount == 0
