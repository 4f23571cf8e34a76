"""A lung segmentation in the scene: the worker's result as a segmentation node, and what the panel reads back from it.

Everything a reopened scene needs travels with the segmentation node: numbers and findings as attributes, the state for
relabeling in a hidden text node. The input CT stays a node reference.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, STRUCTURES, Lobe, Structure
from LCTfoundLib.export.terminology import term_of
from LCTfoundSlicer.mrml import (
    BINARY_LABELMAP,
    CLOSED_SURFACE,
    EngineGeometry,
    InputChanged,
    InputSignature,
    labelLayer,
    matrixToArray,
    placeUnderStudyOf,
    polyDataFromMesh,
    segmentationGrid,
)

__all__ = [
    "BranchChange",
    "LungCase",
    "applyRelabeled",
    "applyResult",
    "collectLabels",
    "labelVolumes",
    "volumesTable",
]

_CT = "LCTfound.CT"
_STATE = "LCTfound.State"
_RESULT = "LCTfound.Result"
_CHANGES = "LCTfound.Changes"
_UNDONE = "LCTfound.UndoneChanges"
_EDITED = "LCTfound.Edited"
_CONFIDENCE_TAG = "LCTfound.Confidence"

#: The lungs are seen through, the trees stand in them.
_SEGMENT_OPACITY_3D = 0.35
_SEGMENT_OPACITY_2D = 0.35


@dataclass(frozen=True)
class BranchChange:
    """A branch that got another name: tree, its first node in the tree's graph, and the segment code."""

    tree: str
    branch: int
    segment: int


class LungCase:
    """A segmentation node as a result of the engine.

    Args:
        node: a vtkMRMLSegmentationNode; any one will do, what is missing reads as empty.
    """

    def __init__(self, node: Any) -> None:
        self.node = node

    @property
    def isResult(self) -> bool:
        """Whether the node holds (or was copied from) a result of ours."""
        return bool(self.node and self.node.GetAttribute(_RESULT))

    @property
    def volumeNode(self) -> Any:
        """The CT it was computed from; None when that is gone."""
        return self.node.GetNodeReference(_CT) if self.node else None

    @property
    def result(self) -> dict[str, Any]:
        """The worker's ``result.json``: confidence, findings, provenance, volumes."""
        return _parsed(self.node.GetAttribute(_RESULT), {}) if self.node else {}

    @property
    def changes(self) -> list[BranchChange]:
        """The branches renamed so far, in order."""
        return _changes(self.node.GetAttribute(_CHANGES)) if self.node else []

    @property
    def undoneChanges(self) -> list[BranchChange]:
        """Changes that were taken back, the next to be done again last."""
        return _changes(self.node.GetAttribute(_UNDONE)) if self.node else []

    def setChanges(self, changes: Sequence[BranchChange], undone: Sequence[BranchChange]) -> None:
        self.node.SetAttribute(_CHANGES, json.dumps([asdict(change) for change in changes]))
        self.node.SetAttribute(_UNDONE, json.dumps([asdict(change) for change in undone]))

    @property
    def isEdited(self) -> bool:
        """Whether boundaries may have been changed by hand."""
        return bool(self.node and self.node.GetAttribute(_EDITED))

    @property
    def hasState(self) -> bool:
        """Whether branches can be renamed."""
        return bool(self.node and self.node.GetNodeReference(_STATE))

    @property
    def stateText(self) -> str:
        """The state for relabeling, base64; only where ``hasState``."""
        return self.node.GetNodeReference(_STATE).GetText()

    def writeState(self, path: Path) -> Path:
        """The state for relabeling as the file the worker reads."""
        path.write_bytes(base64.b64decode(self.stateText))
        return path

    def _setState(self, content: bytes) -> None:
        text = self.node.GetNodeReference(_STATE)
        if text is None:
            text = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode", f"{self.node.GetName()} state")
            text.SetHideFromEditors(True)
            self.node.SetNodeReferenceID(_STATE, text.GetID())
        text.SetText(base64.b64encode(content).decode("ascii"))

    def copyForEditing(self) -> LungCase:
        """A copy whose boundaries may be changed; this result stays as it is."""
        copy = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{self.node.GetName()} (edited)")
        copy.GetSegmentation().DeepCopy(self.node.GetSegmentation())
        copy.CreateDefaultDisplayNodes()
        copy.GetDisplayNode().CopyContent(self.node.GetDisplayNode())
        copy.SetAndObserveTransformNodeID(self.node.GetTransformNodeID())
        for name in (_RESULT, _CHANGES, _UNDONE):
            if self.node.GetAttribute(name):
                copy.SetAttribute(name, self.node.GetAttribute(name))
        copy.SetAttribute(_EDITED, "1")
        case = LungCase(copy)
        volumeNode = self.volumeNode
        if volumeNode:
            copy.SetNodeReferenceID(_CT, volumeNode.GetID())
            copy.SetReferenceImageGeometryParameterFromVolumeNode(volumeNode)
            placeUnderStudyOf(copy, volumeNode)
        if self.hasState:
            case._setState(base64.b64decode(self.stateText))
        return case


def _parsed(text: str | None, otherwise: Any) -> Any:
    """JSON of an attribute; a scene from elsewhere may hold anything."""
    try:
        value = json.loads(text) if text else otherwise
    except ValueError:
        return otherwise
    return value if isinstance(value, type(otherwise)) else otherwise


def _changes(text: str | None) -> list[BranchChange]:
    found = []
    for item in _parsed(text, []):
        if isinstance(item, dict) and item.get("tree") in ("airway", "artery"):
            found.append(BranchChange(item["tree"], int(item.get("branch", -1)), int(item.get("segment", 0))))
    return found


# -- from the worker into the scene ----------------------------------------------------------------------------------


def applyResult(
    folder: Path, node: Any, volumeNode: Any, signature: InputSignature, geometry: EngineGeometry
) -> Iterator[float]:
    """Put a result of the worker into a segmentation node, in steps short enough for the window.

    Everything is built before the node is touched; then it changes at once.

    Args:
        folder: the worker's output.
        node: gets the result; its earlier segments are replaced.
        volumeNode: the input.
        signature: of the input when it was sent off.
        geometry: that the input was sent with.

    Yields:
        The share done, 0-1.

    Raises:
        InputChanged: the input is gone or another one now.
    """
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    layers = []
    for name in ("segments", "trees"):
        layers.append(labelLayer(volumeNode, np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)))
        yield 0.2 * len(layers)
    segments = []
    with np.load(folder / "meshes.npz", allow_pickle=False) as meshes:
        for structure in STRUCTURES:
            image = layers[0 if structure.tree is None else 1]
            if image is not None and f"{structure.key}.points" in meshes:
                surface = _surface(meshes, structure.key, geometry)
                segments.append((structure, _segment(structure, image, surface, result["confidence"])))
                yield 0.4 + 0.5 * structure.code / len(STRUCTURES)
    if not signature.isCurrent or slicer.mrmlScene.GetNodeByID(node.GetID() or "") is None:
        raise InputChanged("The CT or the output was removed or changed while it was computed; apply again.")
    _fill(node, volumeNode, segments)
    yield 0.95
    state = folder / "state.npz"
    if state.is_file():
        LungCase(node)._setState(state.read_bytes())
    _writeFacts(node, volumeNode, result)
    yield 1.0


def _surface(meshes: Mapping[str, np.ndarray], key: str, geometry: EngineGeometry) -> Any:
    normals = meshes[f"{key}.normals"] if f"{key}.normals" in meshes else None
    return polyDataFromMesh(meshes[f"{key}.points"], meshes[f"{key}.faces"], normals, geometry.localFromEngine)


def _segment(structure: Structure, image: Any, surface: Any, confidence: Mapping[str, Any]) -> Any:
    segment = slicer.vtkSegment()
    segment.SetName(structure.name)
    segment.SetColor(*(channel / 255 for channel in structure.color))
    segment.SetLabelValue(structure.code if structure.tree is None else int(structure.tree))
    segment.SetTag(segment.GetTerminologyEntryTagName(), term_of(structure).slicer_entry())
    if structure.key in confidence:
        segment.SetTag(_CONFIDENCE_TAG, f"{confidence[structure.key]:.3f}")
    segment.AddRepresentation(BINARY_LABELMAP, image)
    if surface is not None:
        segment.AddRepresentation(CLOSED_SURFACE, surface)
    return segment


def _fill(node: Any, volumeNode: Any, segments: Sequence[tuple[Structure, Any]]) -> None:
    """Make the segments, and only them, the node's content."""
    modifying = node.StartModify()
    try:
        _replaceSegments(node, [(structure.key, segment) for structure, segment in segments])
        node.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
        node.SetReferenceImageGeometryParameterFromVolumeNode(volumeNode)
        node.SetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole(), volumeNode.GetID())
        node.SetNodeReferenceID(_CT, volumeNode.GetID())
        _setDisplay(node.GetDisplayNode(), [structure for structure, _ in segments])
        placeUnderStudyOf(node, volumeNode)
    finally:
        node.EndModify(modifying)


def _replaceSegments(node: Any, segments: Sequence[tuple[str, Any]]) -> None:
    """Exchange all segments; what is set for the display of those that stay is kept."""
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    forgets = display.GetRemoveUnusedDisplayProperties()
    display.SetRemoveUnusedDisplayProperties(False)
    segmentation = node.GetSegmentation()
    segmentation.RemoveAllSegments()
    segmentation.SetSourceRepresentationName(BINARY_LABELMAP)
    for key, segment in segments:
        segmentation.AddSegment(segment, key)
    display.SetRemoveUnusedDisplayProperties(forgets)


def _setDisplay(display: Any, structures: Sequence[Structure]) -> None:
    modifying = display.StartModify()
    display.SetPreferredDisplayRepresentationName2D(BINARY_LABELMAP)
    display.SetPreferredDisplayRepresentationName3D(CLOSED_SURFACE)
    for structure in structures:
        whole = structure.tree is not None
        display.SetSegmentVisibility(structure.key, True)
        display.SetSegmentOpacity3D(structure.key, 1.0 if whole else _SEGMENT_OPACITY_3D)
        display.SetSegmentOpacity2DFill(structure.key, 0.8 if whole else _SEGMENT_OPACITY_2D)
        display.SetSegmentOpacity2DOutline(structure.key, 1.0)
    display.EndModify(modifying)


def _writeFacts(node: Any, volumeNode: Any, result: Mapping[str, Any]) -> None:
    kept = {key: result.get(key) for key in ("confidence", "findings", "provenance", "volumes")}
    kept["case"] = volumeNode.GetName()
    node.SetAttribute(_RESULT, json.dumps(kept))
    node.SetAttribute("LCTfound.IntendedUse", "Research use only; not a medical device.")


def applyRelabeled(
    folder: Path,
    node: Any,
    volumeNode: Any,
    geometry: EngineGeometry,
    history: tuple[Sequence[BranchChange], Sequence[BranchChange]],
    lobes: Sequence[Lobe],
) -> Iterator[float]:
    """Put recomputed territories into a result: only voxels of the lobes concerned change, edits elsewhere stay.

    Args:
        folder: the worker's output of ``relabel``.
        node: the result.
        volumeNode: its CT.
        geometry: as sent.
        history: what the lists of changes, made and undone, are to be from now on.
        lobes: that hold a branch that was renamed or renamed back.

    Yields:
        The share done, 0-1.
    """
    current = np.zeros(_gridShape(volumeNode), dtype=np.uint8)
    yield from (0.3 * share for share in collectLabels(node, volumeNode, current, np.zeros_like(current)))
    renamed = np.load(folder / "segments.npy", mmap_mode="r", allow_pickle=False)
    concerned = np.isin(np.arange(len(LOBE_OF_SEGMENT)), [s.code for s in STRUCTURES if s.lobe in lobes])
    labels = np.where(concerned[current] & concerned[renamed], renamed, current)
    yield 0.5
    image = labelLayer(volumeNode, labels)
    present = np.bincount(labels.ravel(), minlength=len(LOBE_OF_SEGMENT)) > 0
    yield 0.7
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    segmentation = node.GetSegmentation()
    kept = {key: segmentation.GetSegment(key) for key in segmentation.GetSegmentIDs()}
    with np.load(folder / "meshes.npz", allow_pickle=False) as meshes:
        for structure in STRUCTURES[:18]:
            if not present[structure.code]:
                kept.pop(structure.key, None)
                continue
            surface = None
            if structure.lobe in lobes and f"{structure.key}.points" in meshes:
                surface = _surface(meshes, structure.key, geometry)
            kept[structure.key] = _renewed(kept.get(structure.key), structure, image, surface, result["confidence"])
    yield 0.9
    order = [s.key for s in STRUCTURES if s.key in kept] + [key for key in kept if key not in _KEYS]
    _replaceSegments(node, [(key, kept[key]) for key in order])
    case = LungCase(node)
    _writeFacts(node, volumeNode, result | {"provenance": case.result.get("provenance", {})})
    case.setChanges(*history)
    yield 1.0


def _renewed(old: Any, structure: Structure, image: Any, surface: Any, confidence: Mapping[str, Any]) -> Any:
    """A segment on the new label map, with the old one's color and, if it has no new one, surface."""
    if surface is None and old is not None:
        surface = old.GetRepresentation(CLOSED_SURFACE)
    segment = _segment(structure, image, surface, confidence)
    if old is not None:
        segment.SetColor(*old.GetColor())
    return segment


# -- from the scene --------------------------------------------------------------------------------------------------

#: Slices read between two looks at the event loop.
_SLAB = 40
_KEYS = {structure.key: structure for structure in STRUCTURES}


def _gridShape(volumeNode: Any) -> tuple[int, int, int]:
    i, j, k = volumeNode.GetImageData().GetDimensions()
    return k, j, i


def collectLabels(node: Any, volumeNode: Any, segments: np.ndarray, trees: np.ndarray) -> Iterator[float]:
    """Read a segmentation, as it is now, into label maps on the volume's grid.

    Args:
        node: with segments whose IDs are structure keys; others are left out.
        volumeNode: its CT.
        segments: uint8 [k, j, i] zeros; gets the codes 1-18.
        trees: uint8 [k, j, i] zeros; gets the ``Tree`` codes.

    Yields:
        The share done, 0-1.
    """
    segmentation = node.GetSegmentation()
    layers = segmentation.GetNumberOfLayers(BINARY_LABELMAP)
    for layer in range(layers):
        image = _onGridOf(volumeNode, segmentation.GetLayerDataObject(layer, BINARY_LABELMAP))
        territory, tree = np.zeros(256, np.uint8), np.zeros(256, np.uint8)
        for key in segmentation.GetSegmentIDsForLayer(layer, BINARY_LABELMAP):
            structure = _KEYS.get(key)
            if structure is not None:
                value = segmentation.GetSegment(key).GetLabelValue()
                (territory if structure.tree is None else tree)[value] = structure.tree or structure.code
        labels, box = _labelsOf(image, segments.shape)
        for start in range(0, len(labels), _SLAB):
            part = labels[start : start + _SLAB]
            for target, table in ((segments, territory), (trees, tree)):
                if table.any():
                    codes = table[part]
                    np.copyto(target[box][start : start + _SLAB], codes, where=codes > 0)
            yield (layer + (start + len(part)) / len(labels)) / layers


def _onGridOf(volumeNode: Any, image: Any) -> Any:
    """A label map on the volume's voxels; itself where it lies on them already, as it does unless it was edited."""
    i, j, k = volumeNode.GetImageData().GetDimensions()
    reference = segmentationGrid(volumeNode, (0, 0, 0), (k, j, i))
    matrices = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(matrices[0])
    reference.GetImageToWorldMatrix(matrices[1])
    if np.abs(matrixToArray(matrices[0]) - matrixToArray(matrices[1])).max() < 1e-4:
        return image
    resampled = slicer.vtkOrientedImageData()
    slicer.vtkOrientedImageDataResample.ResampleOrientedImageToReferenceOrientedImage(image, reference, resampled)
    return resampled


def _labelsOf(image: Any, shape: Sequence[int]) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Labels within the grid (uint8 view where possible), and where in the grid they lie."""
    nothing = np.zeros((0, 0, 0), np.uint8), (slice(0), slice(0), slice(0))
    extent = image.GetExtent()
    scalars = image.GetPointData().GetScalars()
    if scalars is None or extent[1] < extent[0]:
        return nothing
    sizes = [extent[2 * axis + 1] - extent[2 * axis] + 1 for axis in (2, 1, 0)]
    array = numpy_support.vtk_to_numpy(scalars).reshape(sizes)
    first = [extent[2 * axis] for axis in (2, 1, 0)]
    inner = tuple(
        slice(max(0, -start), min(size, n - start)) for start, size, n in zip(first, sizes, shape, strict=True)
    )
    outer = tuple(slice(start + s.start, start + s.stop) for start, s in zip(first, inner, strict=True))
    if any(s.stop <= s.start for s in inner):
        return nothing
    return array[inner].astype(np.uint8, copy=False), outer


def labelVolumes(node: Any) -> dict[str, float]:
    """mL of each segment by ID, counted in its label map as it is now (after an edit, too)."""
    segmentation = node.GetSegmentation()
    volumes: dict[str, float] = {}
    for layer in range(segmentation.GetNumberOfLayers(BINARY_LABELMAP)):
        image = segmentation.GetLayerDataObject(layer, BINARY_LABELMAP)
        scalars = image.GetPointData().GetScalars()
        counts = np.zeros(256, int)
        if scalars is not None:
            counts = np.bincount(numpy_support.vtk_to_numpy(scalars), minlength=256)
        voxel = float(np.prod(image.GetSpacing())) / 1000
        for key in segmentation.GetSegmentIDsForLayer(layer, BINARY_LABELMAP):
            volumes[key] = float(counts[segmentation.GetSegment(key).GetLabelValue()]) * voxel
    return volumes


def volumesTable(node: Any) -> Any:
    """A new vtkMRMLTableNode: each structure's name, mL now, mL as computed, and confidence."""
    case, now = LungCase(node), labelVolumes(node)
    computed = {row["key"]: row["volume"] for row in case.result.get("volumes") or [] if isinstance(row, dict)}
    confidence = case.result.get("confidence") or {}
    table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", f"{node.GetName()} volumes")
    modifying = table.StartModify()
    names, rows = vtk.vtkStringArray(), [s for s in STRUCTURES if s.key in now]
    names.SetName("Structure")
    for structure in rows:
        names.InsertNextValue(structure.name)
    table.AddColumn(names)
    columns = {"Volume (mL)": now, "Volume as computed (mL)": computed, "Confidence": confidence}
    for title, values in columns.items():
        column = numpy_support.numpy_to_vtk(np.array([float(values.get(s.key, np.nan)) for s in rows]), deep=True)
        column.SetName(title)
        table.AddColumn(column)
    table.SetUseColumnTitleAsColumnHeader(True)
    table.SetAttribute("LCTfound.IntendedUse", "Research use only; not a medical device.")
    table.EndModify(modifying)
    if case.volumeNode:
        placeUnderStudyOf(table, case.volumeNode)
    return table
