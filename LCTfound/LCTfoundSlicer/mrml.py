"""MRML <-> engine: a volume's array and geometry for the worker; label maps and meshes back into a segmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from LCTfoundSlicer.translation import tr as _

__all__ = [
    "BINARY_LABELMAP",
    "CLOSED_SURFACE",
    "EngineGeometry",
    "InputChanged",
    "InputSignature",
    "UnusableVolume",
    "dicomFilesOf",
    "engineFromWorld",
    "engineGeometry",
    "labelLayer",
    "matrixToArray",
    "patientGeometry",
    "placeUnderStudyOf",
    "polyDataFromMesh",
    "segmentationGrid",
    "writeArray",
]

BINARY_LABELMAP = "Binary labelmap"
CLOSED_SURFACE = "Closed surface"

#: RAS <-> LPS, its own inverse.
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
#: Slices written between two looks at the event loop: 15 MB of a 512 x 512 CT, some 10 ms.
_SLAB_BYTES = 16_000_000
#: Axes that deviate from right angles by more than this are no scanner's rounding.
_SHEAR = 1e-3


class InputChanged(RuntimeError):
    """The input of a finished run is gone or was changed meanwhile, so the result would not fit it."""


class UnusableVolume(RuntimeError):
    """The volume node cannot be given to the engine; the message tells the remedy."""


@dataclass(frozen=True)
class EngineGeometry:
    """Where the engine believes the voxels to be.

    Attributes:
        spacing: mm along i, j, k.
        origin: LPS mm of the first voxel.
        direction: 9 numbers, row-major; columns are the LPS directions of i, j, k.
        localFromEngine: 4x4 from the engine's LPS to the volume node's own RAS (without its parent transform).
    """

    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]
    localFromEngine: np.ndarray

    def request(self, arrayPath: Path, metadata: dict[str, str]) -> dict[str, Any]:
        """The ``input`` of a worker's request."""
        return {
            "array": str(arrayPath),
            "spacing": list(self.spacing),
            "origin": list(self.origin),
            "direction": list(self.direction),
            "metadata": metadata,
        }

    def ijkToRAS(self, grid: Mapping[str, Sequence[float]]) -> Any:
        """vtkMatrix4x4 of a result's grid (``spacing``, ``origin``, ``direction``) in the volume node's own RAS."""
        lps = np.eye(4)
        lps[:3, :3] = np.reshape(grid["direction"], (3, 3)) * np.asarray(grid["spacing"])
        lps[:3, 3] = grid["origin"]
        return _arrayToMatrix(self.localFromEngine @ lps)

    @property
    def engineFromLocal(self) -> np.ndarray:
        """4x4 from the volume node's own RAS to the engine's LPS."""
        return np.linalg.inv(self.localFromEngine)


@dataclass(frozen=True)
class InputSignature:
    """What tells whether a volume is still the one that was sent off: its voxels, geometry and transform."""

    nodeID: str
    imageTime: int
    geometry: tuple[float, ...]

    @classmethod
    def of(cls, volumeNode: Any) -> InputSignature:
        image = volumeNode.GetImageData()
        scalars = image.GetPointData().GetScalars() if image else None
        time = scalars.GetMTime() if scalars else 0
        matrices = np.concatenate([_ijkToRAS(volumeNode).ravel(), _worldFromLocal(volumeNode)[0].ravel()])
        return cls(volumeNode.GetID() or "", time, tuple(float(value) for value in matrices))

    @property
    def isCurrent(self) -> bool:
        """Whether the volume still exists in the scene and is unchanged."""
        node = slicer.mrmlScene.GetNodeByID(self.nodeID) if self.nodeID else None
        return node is not None and InputSignature.of(node) == self


def matrixToArray(matrix: Any) -> np.ndarray:
    """4x4 float64 of a vtkMatrix4x4."""
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def _arrayToMatrix(array: np.ndarray) -> Any:
    matrix = vtk.vtkMatrix4x4()
    for row in range(4):
        for column in range(4):
            matrix.SetElement(row, column, float(array[row, column]))
    return matrix


def _ijkToRAS(volumeNode: Any) -> np.ndarray:
    matrix = vtk.vtkMatrix4x4()
    volumeNode.GetIJKToRASMatrix(matrix)
    return matrixToArray(matrix)


def _worldFromLocal(node: Any) -> tuple[np.ndarray, bool]:
    """4x4 of the parent transform to the world, and whether it could be had (a warp has none)."""
    parent = node.GetParentTransformNode()
    if parent is None:
        return np.eye(4), True
    matrix = vtk.vtkMatrix4x4()
    if not parent.IsTransformToWorldLinear() or not parent.GetMatrixTransformToWorld(matrix):
        return np.eye(4), False
    return matrixToArray(matrix), True


def patientGeometry() -> EngineGeometry:
    """Of a result that is made of no volume: the engine's LPS are the patient's, and so is the world."""
    return EngineGeometry((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), tuple(np.eye(3).ravel().tolist()), _FLIP)


def engineGeometry(volumeNode: Any, inWorld: bool = True) -> EngineGeometry:
    """The geometry to compute in: the world where a rigid parent transform leads to it, else the volume's own frame.

    A transform that turns the patient upright must count, since left and right follow from it; one that stretches or
    warps must not, since the networks know sizes. Results are put back under the same parent transform either way.

    Args:
        volumeNode: the volume.
        inWorld: False takes the volume's own frame in any case, such as that of the DICOM files it was read from.

    Raises:
        UnusableVolume: no image, or axes that are not at right angles.
    """
    if volumeNode is None or volumeNode.GetImageData() is None:
        raise UnusableVolume(_("The volume holds no image; load a chest CT and choose it as input."))
    ijkToRAS = _ijkToRAS(volumeNode)
    world, linear = _worldFromLocal(volumeNode)
    candidates = [world, np.eye(4)] if linear and inWorld else [np.eye(4)]
    for frame in candidates:
        lps = _FLIP @ frame @ ijkToRAS
        steps = np.linalg.norm(lps[:3, :3], axis=0)
        if steps.min() <= 0 or not np.isfinite(lps).all():
            continue
        direction = lps[:3, :3] / steps
        rigid = np.allclose(frame[:3, :3].T @ frame[:3, :3], np.eye(3), atol=_SHEAR)
        if rigid and np.allclose(direction.T @ direction, np.eye(3), atol=_SHEAR):
            return EngineGeometry(
                tuple(map(float, steps)),
                tuple(map(float, lps[:3, 3])),
                tuple(map(float, direction.ravel())),
                np.linalg.inv(frame) @ _FLIP,
            )
    raise UnusableVolume(
        _(
            "The axes of the volume are not at right angles (a tilted gantry or a shear); resample it to a straight "
            "grid, for example with Resample Scalar Volume, and use the result."
        )
    )


def writeArray(volumeNode: Any, path: Path) -> Iterator[float]:
    """Write the voxels as ``.npy`` [k, j, i], some slices at a time, so that the window stays alive between them.

    Yields:
        The share done, 0-1.

    Raises:
        UnusableVolume: the volume has several components (a color image).
    """
    array = slicer.util.arrayFromVolume(volumeNode)
    if array.ndim != 3:
        raise UnusableVolume(_("The volume is a color or vector image; choose a CT in Hounsfield units."))
    target = np.lib.format.open_memmap(path, mode="w+", dtype=array.dtype, shape=array.shape)
    slab = max(1, _SLAB_BYTES // max(1, array[0].nbytes))
    for start in range(0, len(array), slab):
        target[start : start + slab] = array[start : start + slab]
        yield min(1.0, (start + slab) / len(array))
    target.flush()


def segmentationGrid(volumeNode: Any, low: Sequence[int], high: Sequence[int]) -> Any:
    """An empty vtkOrientedImageData on the volume's voxels ``low`` to ``high`` (k, j, i; exclusive)."""
    image = slicer.vtkOrientedImageData()
    image.SetExtent(low[2], high[2] - 1, low[1], high[1] - 1, low[0], high[0] - 1)
    image.SetGeometryFromImageToWorldMatrix(_arrayToMatrix(_ijkToRAS(volumeNode)))
    return image


def labelLayer(volumeNode: Any, labels: np.ndarray) -> Any:
    """A label map [k, j, i] on the volume's grid as the image that segments share, cropped to what is not 0.

    Returns:
        vtkOrientedImageData in the volume's own RAS; None where no voxel is labeled.
    """
    box = _boundingBox(labels)
    if box is None:
        return None
    low, high = box
    part = np.ascontiguousarray(labels[low[0] : high[0], low[1] : high[1], low[2] : high[2]], dtype=np.uint8)
    image = segmentationGrid(volumeNode, low, high)
    scalars = numpy_support.numpy_to_vtk(part.ravel(), deep=True, array_type=vtk.VTK_UNSIGNED_CHAR)
    scalars.SetName("ImageScalars")
    image.GetPointData().SetScalars(scalars)
    return image


def _boundingBox(labels: np.ndarray) -> tuple[list[int], list[int]] | None:
    """First and last + 1 index of what is not 0 along each axis."""
    planes = np.flatnonzero(labels.any(axis=(1, 2)))
    if not len(planes):
        return None
    part = labels[planes[0] : planes[-1] + 1]
    flat = part.any(axis=0)
    rows, columns = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    return (
        [int(planes[0]), int(rows[0]), int(columns[0])],
        [int(planes[-1]) + 1, int(rows[-1]) + 1, int(columns[-1]) + 1],
    )


def polyDataFromMesh(
    points: np.ndarray, faces: np.ndarray, normals: np.ndarray | None, localFromEngine: np.ndarray
) -> Any:
    """A mesh in the engine's LPS as vtkPolyData in the volume's own RAS; no triangle is looped over.

    Args:
        points: (n, 3) mm.
        faces: (m, 3) point indices.
        normals: (n, 3), or None.
        localFromEngine: 4x4, see ``EngineGeometry``.
    """
    rotation, offset = localFromEngine[:3, :3], localFromEngine[:3, 3]
    mesh = vtk.vtkPolyData()
    vertices = vtk.vtkPoints()
    moved = (points @ rotation.T + offset).astype(np.float32)
    vertices.SetData(numpy_support.numpy_to_vtk(moved, deep=True))
    mesh.SetPoints(vertices)
    if np.linalg.det(rotation) < 0:  # a mirror turns the faces inside out
        faces = faces[:, ::-1]
    cells = vtk.vtkCellArray()
    connectivity = np.ascontiguousarray(faces, dtype=np.int64).ravel()
    offsets = np.arange(0, len(connectivity) + 1, 3, dtype=np.int64)
    cells.SetData(
        numpy_support.numpy_to_vtkIdTypeArray(offsets, deep=True),
        numpy_support.numpy_to_vtkIdTypeArray(connectivity, deep=True),
    )
    mesh.SetPolys(cells)
    if normals is not None:
        array = numpy_support.numpy_to_vtk((normals @ rotation.T).astype(np.float32), deep=True)
        array.SetName("Normals")
        mesh.GetPointData().SetNormals(array)
    return mesh


def engineFromWorld(volumeNode: Any, geometry: EngineGeometry, point: Sequence[float]) -> list[float]:
    """Where a point of the world (RAS mm) lies for the engine (LPS mm)."""
    local = np.linalg.inv(_worldFromLocal(volumeNode)[0]) @ [*point, 1.0]
    return [float(value) for value in (geometry.engineFromLocal @ local)[:3]]


def placeUnderStudyOf(node: Any, volumeNode: Any) -> None:
    """Put a node beside the volume in the subject hierarchy, so under the same patient and study."""
    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    item, beside = hierarchy.GetItemByDataNode(node), hierarchy.GetItemByDataNode(volumeNode)
    if item and beside:
        hierarchy.SetItemParent(item, hierarchy.GetItemParent(beside))


def dicomFilesOf(volumeNode: Any) -> list[str]:
    """The files a volume was loaded from, where it came from DICOM and they are all still there; else none."""
    uids = (volumeNode.GetAttribute("DICOM.instanceUIDs") or "").split()
    database = getattr(slicer, "dicomDatabase", None)
    files = [database.fileForInstance(uid) for uid in uids] if database else []
    return files if all(name and Path(name).is_file() for name in files) else []
