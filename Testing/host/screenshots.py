"""Pictures of the panels with a real result, for README, guide and extensions index: `python -m host screenshots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slicer

from host.__main__ import demo_ct, moduleFiles

__all__ = ["take"]


def take(host: Any, folder: Path) -> int:
    """Use each panel on the demo's CT and take a picture of it into a folder."""
    for path in moduleFiles():
        host.load_module(path)
    host.open_window(1500, 950)
    _home(host, folder)
    volume = slicer.util.loadVolume(str(demo_ct()))
    volume.SetName("LIDC-IDRI-0001")
    volume.GetDisplayNode().AutoWindowLevelOff()
    volume.GetDisplayNode().SetWindowLevel(1500, -500)
    _lungs(host, volume, folder)
    _reconstruction(host, volume, folder)
    host.close()
    return 0


def _home(host: Any, folder: Path) -> None:
    host.select_module("LCTfound")
    home = slicer.modules.lctfound.widgetRepresentation().self()
    host.wait_for(lambda: not home.setupSection.isChecking, 60)
    print(host.grab(folder / "LCTfound.png"))


def _lungs(host: Any, volume: Any, folder: Path) -> None:
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    host.select_module("LCTfoundLungSegmentation")
    panel = slicer.modules.lctfoundlungsegmentation.widgetRepresentation().self()
    panel._parameterNode.inputVolume = volume
    panel.ui.applyButton.click()
    host.wait_for(lambda: not panel.display.isRunning, 1200)
    view = host.layoutManager.threeDWidget(0).mrmlViewNode()
    view.SetBoxVisible(False)
    view.SetAxisLabelsVisible(False)
    host.layoutManager.resetThreeDViews()
    slicer.vtkMRMLSliceNode.JumpAllSlices(
        slicer.mrmlScene, *panel._parameterNode.outputSegmentation.GetSegmentCenterRAS("right_s03")
    )
    print(host.grab(folder / "LCTfoundLungSegmentation.png"))


def _reconstruction(host: Any, volume: Any, folder: Path) -> None:
    """Three slices at the carina's height from 32 views, with the difference to the CT over them."""
    host.select_module("LCTfoundReconstruction")
    panel = slicer.modules.lctfoundreconstruction.widgetRepresentation().self()
    chosen = panel._parameterNode
    chosen.inputVolume, chosen.views, chosen.tier, chosen.sliceCount = volume, 32, "fast", 3
    panel.ui.runButton.click()
    host.wait_for(lambda: not panel.display.isRunning, 600)
    panel.ui.mapComboBox.setCurrentIndex(panel.ui.mapComboBox.findData("difference"))
    panel.ui.opacitySlider.value = 35
    print(host.grab(folder / "LCTfoundReconstruction.png"))
