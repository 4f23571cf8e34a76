"""Starts Slicer's libraries: one scene, one application logic, the logics of the core modules. Needs no Qt."""

from __future__ import annotations

import colorsys
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# VTK reads it when it makes its first window: EGL draws without a display.
os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")

import slicer  # noqa: E402
import vtk  # noqa: E402

#: Module -> class of its logic. The colors come first: others ask for their tables.
LOGIC_CLASSES = {
    "Colors": "vtkSlicerColorLogic",
    "Units": "vtkSlicerUnitsLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Terminologies": "vtkSlicerTerminologiesModuleLogic",
    "Volumes": "vtkSlicerVolumesLogic",
    "Models": "vtkSlicerModelsLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Tables": "vtkSlicerTablesLogic",
    "Texts": "vtkSlicerTextsLogic",
    "Plots": "vtkSlicerPlotsLogic",
    "Transforms": "vtkSlicerTransformLogic",
    "Sequences": "vtkSlicerSequencesLogic",
    "Cameras": "vtkSlicerCamerasModuleLogic",
    "CropVolume": "vtkSlicerCropVolumeLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "VolumeRendering": "vtkSlicerVolumeRenderingLogic",
}
_GENERIC_COLORS_ID = "vtkMRMLColorTableNodeFileGenericColors.txt"


@dataclass
class Mrml:
    """What runs below the application."""

    scene: Any
    applicationLogic: Any
    logics: dict[str, Any]
    #: Folder of Slicer's data files (presets, terminologies); None where they are not installed.
    share: Path | None
    _kept: list[Any] = field(default_factory=list)


def shareFolder() -> Path | None:
    """Slicer's data files as trame-slicer ships them; the package itself is not imported."""
    found = importlib.util.find_spec("trame_slicer")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "resources"
    return folder if folder.is_dir() else None


def boot(temporaryFolder: Path) -> Mrml:
    """Make the scene and everything that observes it.

    Args:
        temporaryFolder: where scenes are packed and unpacked.
    """
    vtk.vtkSMPTools.SetBackend("STDThread")
    scene, application = slicer.vtkMRMLScene(), slicer.vtkSlicerApplicationLogic()
    mrml = Mrml(scene, application, {}, shareFolder())
    if mrml.share is None:
        logging.info("No trame-slicer: volume display and rendering presets and terminologies are missing.")
    application.SetTemporaryPath(str(temporaryFolder))
    application.SetHomeDirectory(str(mrml.share or temporaryFolder))
    _allowBundles(mrml, temporaryFolder)
    application.SetMRMLScene(scene)
    _addCrosshair(scene)
    with _quiet(mrml.share is None):
        for name, className in LOGIC_CLASSES.items():
            mrml.logics[name] = _logic(mrml, name, className)
    _addGenericColors(mrml)
    return mrml


def _allowBundles(mrml: Mrml, temporaryFolder: Path) -> None:
    """Reading an .mrb needs the machinery for remote files."""
    cache = slicer.vtkCacheManager()
    cache.SetRemoteCacheDirectory(str(temporaryFolder / "cache"))
    (temporaryFolder / "cache").mkdir(parents=True, exist_ok=True)
    mrml.scene.SetCacheManager(cache)
    remote, data = slicer.vtkMRMLRemoteIOLogic(), slicer.vtkDataIOManagerLogic()
    remote.SetMRMLApplicationLogic(mrml.applicationLogic)
    data.SetMRMLApplicationLogic(mrml.applicationLogic)
    data.SetAndObserveDataIOManager(remote.GetDataIOManager())
    mrml.applicationLogic.SetMRMLSceneDataIO(mrml.scene, remote, data)
    mrml._kept += [cache, remote, data]


def _addCrosshair(scene: Any) -> None:
    crosshair = slicer.vtkMRMLCrosshairNode()
    crosshair.SetSingletonTag("default")
    crosshair.SetCrosshairName("default")
    scene.AddNode(crosshair)


def _logic(mrml: Mrml, name: str, className: str) -> Any:
    logic = getattr(slicer, className)()
    if mrml.share is not None and hasattr(logic, "SetModuleShareDirectory"):
        terminologies = name == "Terminologies"
        logic.SetModuleShareDirectory(str(mrml.share / "terminologies" if terminologies else mrml.share))
    logic.SetMRMLApplicationLogic(mrml.applicationLogic)
    mrml.applicationLogic.SetModuleLogic(name, logic)
    logic.SetMRMLScene(mrml.scene)
    if name == "Colors":
        mrml.applicationLogic.SetColorLogic(logic)
    return logic


@contextmanager
def _quiet(isQuiet: bool) -> Iterator[None]:
    """Without data files each logic complains once; that was said in one sentence."""
    shown = vtk.vtkObject.GetGlobalWarningDisplay()
    vtk.vtkObject.SetGlobalWarningDisplay(shown and not isQuiet)
    try:
        yield
    finally:
        vtk.vtkObject.SetGlobalWarningDisplay(shown)


def _addGenericColors(mrml: Mrml) -> None:
    """Slicer's file of label colors is not in the wheel; without a table, labels get the names of another one."""
    if mrml.scene.GetNodeByID(_GENERIC_COLORS_ID) is not None:
        return
    table = slicer.vtkMRMLColorTableNode()
    table.SetTypeToUser()
    table.SetNumberOfColors(256)
    table.SetColor(0, "background", 0.0, 0.0, 0.0, 0.0)
    for label in range(1, 256):
        red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.6, 0.9)
        table.SetColor(label, f"Label_{label}", red, green, blue, 1.0)
    table.SetName("GenericColors")
    table.SetSingletonTag("FileGenericColors.txt")
    table.SetHideFromEditors(False)
    table.SetSaveWithScene(False)
    mrml.scene.AddNode(table)
