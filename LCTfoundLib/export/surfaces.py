"""Label maps to closed surfaces: watertight, smooth, of the label's volume, outward normals, LPS millimeters.

One structure goes through five steps, each chosen by measurement on real lungs and real trees:

1. *Close*: crop to the bounding box and pad with background, so a label that touches the image border is closed too.
   Trees get a voxel where two of theirs meet at a corner only: a printed branch must hold together.
2. *Extract* with flying edges on the complement: two voxels that share only an edge stay one piece (on the mask itself
   they fall apart), and the surface is a manifold without boundary.
3. *Smooth* with a windowed sinc filter (Taubin et al., Optimal surface smoothing as filter design, 1996). Its weights
   know no spacing, so the tall steps of thick slices smooth as well as flat ones.
4. *Decimate* under the link condition (``decimation.py``).
5. *Correct the volume*: marching through the middle between voxels takes corners off, 10 % of a tree with branches one
   voxel wide; the points are moved along their normals until the enclosed volume equals the label's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import vtk
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from vtk.util import numpy_support

from LCTfoundLib.export.decimation import decimate
from LCTfoundLib.export.options import TRIANGLES
from LCTfoundLib.export.parts import STRUCTURE_PARTS, Box, Part, part_boxes
from LCTfoundLib.volume import Volume

__all__ = ["Mesh", "MeshReport", "SurfaceSettings", "label_surface", "lung_surfaces", "mesh_report", "point_normals"]

#: mm3; enclosed cavities up to this size are filled.
_LARGEST_BUBBLE = 100.0
#: Points; smaller pieces are not smoothed, meshes of fewer triangles than twice that not decimated.
_LEAST_SMOOTHED = 60


@dataclass
class Mesh:
    """A triangle mesh.

    Attributes:
        points: (n, 3) float64, LPS mm.
        faces: (m, 3) int64, counter-clockwise seen from outside.
        label_volume: mm3 of the label it was made of; 0 if unknown.
    """

    points: np.ndarray
    faces: np.ndarray
    label_volume: float = 0.0


@dataclass(frozen=True)
class MeshReport:
    """What to check before a mesh is printed or used for navigation; lengths in mm."""

    points: int
    triangles: int
    boundary_edges: int
    non_manifold_edges: int
    components: int
    volume: float
    area: float
    volume_error: float

    @property
    def watertight(self) -> bool:
        """True for a closed manifold: every edge belongs to exactly two triangles."""
        return self.triangles > 0 and self.boundary_edges == 0 and self.non_manifold_edges == 0


@dataclass(frozen=True)
class SurfaceSettings:
    """How surfaces are made.

    Attributes:
        triangle_budget: triangles of all structures together.
        segment_smoothing, tree_smoothing: iterations and pass band (0-2, smaller is smoother) of the smoothing filter.
            Segments of 2.5 mm slices keep terraces at (20, 0.02) and lose their edges at (80, 0.001).
        segment_voxel: mm; segments on a finer grid are averaged to about this size first, trees never are.
        tree_weight: triangles a tree may keep, relative to a segment of as many.
        most_kept: share of its triangles that any surface keeps at most.
        threads: structures worked on at once; 0 means one per core, at most four.
    """

    triangle_budget: int = TRIANGLES
    segment_smoothing: tuple[int, float] = (40, 0.004)
    tree_smoothing: tuple[int, float] = (20, 0.08)
    segment_voxel: float = 0.9
    tree_weight: float = 2.0
    most_kept: float = 0.5
    threads: int = 0


def lung_surfaces(
    segments: Volume,
    trees: Volume,
    settings: SurfaceSettings | None = None,
    progress: Callable[[float, str], None] | None = None,
    parts: Sequence[Part] = STRUCTURE_PARTS,
) -> dict[str, Mesh]:
    """Surfaces of the parts that have voxels, by key, within the triangle budget.

    Args:
        segments: uint8 label map, codes 1-18.
        trees: uint8 label map, codes 1 airway, 2 artery, 3 vein.
        settings: defaults if None.
        progress: called with the share done (0-1) and a sentence; may raise to stop.
        parts: what to make surfaces of.
    """
    settings = settings or SurfaceSettings()
    report = progress or (lambda share, text: None)
    boxes = part_boxes(parts, segments.array, trees.array)
    todo = [part for part in parts if part.key in boxes]

    def smooth(part: Part) -> Mesh:
        return _smooth_surface(part, trees if part.is_tree else segments, boxes[part.key], settings)

    raw: dict[str, Mesh] = {}
    meshes: dict[str, Mesh] = {}
    with _pool(settings.threads or min(4, os.cpu_count() or 1)) as pool:
        for part, mesh in zip(todo, pool.map(smooth, todo), strict=True):
            raw[part.key] = mesh
            report(0.4 * len(raw) / len(todo), f"Surface of {part.name}")
        targets = _share_budget(raw, todo, settings)
        for part, mesh in zip(todo, pool.map(lambda p: _finish(raw[p.key], targets[p.key]), todo), strict=True):
            meshes[part.key] = mesh
            report(0.4 + 0.6 * len(meshes) / len(todo), f"Surface of {part.name}")
    return meshes


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop what is still waiting when the user stops."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def label_surface(
    mask: Volume, *, thin: bool = False, triangles: int | None = None, settings: SurfaceSettings | None = None
) -> Mesh:
    """Closed surface of one binary mask.

    Args:
        mask: nonzero inside; any orientation, also oblique or mirrored.
        thin: treat as a tree: keep branches one voxel wide, smooth less.
        triangles: target number; None keeps half.
        settings: smoothing; defaults if None.
    """
    inside = mask.array != 0
    boxes = ndimage.find_objects(inside.astype(np.uint8))
    if not boxes:
        return Mesh(np.empty((0, 3)), np.empty((0, 3), np.int64))
    raw = _mask_surface(inside[boxes[0]], boxes[0], mask, thin, settings or SurfaceSettings())
    return _finish(raw, triangles or len(raw.faces) // 2)


def _smooth_surface(part: Part, labels: Volume, box: Box, settings: SurfaceSettings) -> Mesh:
    """Smooth surface of one part within its bounding box, not yet decimated."""
    return _mask_surface(part.table[labels.array[box]], box, labels, part.is_tree, settings)


def _mask_surface(inside: np.ndarray, box: Box, grid: Volume, thin: bool, settings: SurfaceSettings) -> Mesh:
    """Smooth surface of a cropped mask in the LPS frame of its grid."""
    label_volume = 1000 * grid.voxel_ml * int(np.count_nonzero(inside))
    if thin:
        counts, factors = _bridge_corners(np.pad(inside, 1)).astype(np.uint8), np.ones(3, int)
        first = np.array([s.start for s in box], float) - 1
    else:
        counts, factors = _averaged(inside, grid.spacing, settings.segment_voxel)
        first = np.array([s.start for s in box], float) - factors + (factors - 1) / 2
    points, faces = _extract(counts, int(np.prod(factors)), settings, thin)
    lps = grid.world_from_index(first + points[:, ::-1] * factors)
    if _signed_volume(lps, faces) < 0:
        faces = faces[:, ::-1].copy()
    return Mesh(lps, faces, label_volume)


def _bridge_corners(mask: np.ndarray) -> np.ndarray:
    """Add a voxel wherever two voxels of a padded mask touch at a corner only."""
    result = mask.copy()
    for flips in ((), (1,), (2,), (1, 2)):
        source, target = np.flip(mask, flips), np.flip(result, flips)
        corner = source[:-1, :-1, :-1] & source[1:, 1:, 1:]
        for at in ((0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0)):
            corner &= ~source[tuple(slice(start, start - 1 or None) for start in at)]
        target[:-1, :-1, 1:] |= corner
    return result


def _averaged(inside: np.ndarray, spacing: tuple[float, ...], voxel: float) -> tuple[np.ndarray, np.ndarray]:
    """Count a mask's voxels in blocks of about ``voxel`` mm, padded by one block; returns counts and block sizes.

    Block sizes are (k, j, i); 1 where the grid is coarse enough or the structure is too small to average.
    """
    # Six in each direction at most: the counts must fit a byte.
    factors = np.clip(np.round(voxel / np.array(spacing[::-1])), 1, 6).astype(int)
    if np.any(np.array(inside.shape) < 8 * factors):
        factors = np.ones(3, int)
    widths = [(f, f + (-n) % f) for n, f in zip(inside.shape, factors, strict=True)]
    padded = np.pad(inside, widths).astype(np.uint8)
    for axis, factor in enumerate(factors):
        if factor > 1:
            shape = padded.shape[:axis] + (padded.shape[axis] // factor, factor) + padded.shape[axis + 1 :]
            padded = padded.reshape(shape).sum(axis=axis + 1, dtype=np.uint8)
    return padded, factors


def _extract(counts: np.ndarray, full: int, settings: SurfaceSettings, thin: bool) -> tuple[np.ndarray, np.ndarray]:
    """Flying edges and smoothing; points (n, 3) in (i, j, k) of ``counts``, faces (m, 3)."""
    image = vtk.vtkImageData()
    image.SetDimensions(counts.shape[::-1])
    complement = (np.uint8(full) - counts).ravel()
    image.GetPointData().SetScalars(numpy_support.numpy_to_vtk(complement))
    edges = vtk.vtkFlyingEdges3D()
    edges.SetInputData(image)
    # Counts are whole numbers: a level between them never meets a voxel exactly, so no triangle degenerates.
    edges.SetValue(0, full / 2 + (0.25 if full > 1 else 0.0))
    edges.ComputeNormalsOff()
    edges.ComputeGradientsOff()
    edges.ComputeScalarsOff()
    edges.Update()
    points, faces = _arrays(edges.GetOutput())
    smooth, _ = _arrays(
        _smoothed(edges.GetOutput(), *(settings.tree_smoothing if thin else settings.segment_smoothing))
    )
    # The filter pulls a piece of a few voxels to a point; it keeps its corners.
    count, piece = _pieces(faces, len(points))
    small = np.bincount(piece, minlength=count)[piece] < _LEAST_SMOOTHED
    return np.where(small[:, None], points, smooth), faces


def _smoothed(surface: vtk.vtkPolyData, iterations: int, pass_band: float) -> vtk.vtkPolyData:
    smoother = vtk.vtkWindowedSincPolyDataFilter()
    smoother.SetInputData(surface)
    smoother.SetNumberOfIterations(iterations)
    smoother.SetPassBand(pass_band)
    smoother.NormalizeCoordinatesOn()
    smoother.BoundarySmoothingOff()
    smoother.FeatureEdgeSmoothingOff()
    smoother.Update()
    return smoother.GetOutput()


def _arrays(surface: vtk.vtkPolyData) -> tuple[np.ndarray, np.ndarray]:
    points = numpy_support.vtk_to_numpy(surface.GetPoints().GetData()).astype(np.float64)
    faces = numpy_support.vtk_to_numpy(surface.GetPolys().GetConnectivityArray()).reshape(-1, 3).astype(np.int64)
    return points, faces


def _share_budget(raw: Mapping[str, Mesh], parts: Sequence[Part], settings: SurfaceSettings) -> dict[str, int]:
    """Triangles each part may keep: at most a share of what it has, and the budget in all."""
    weights = {p.key: len(raw[p.key].faces) * (settings.tree_weight if p.is_tree else 1.0) for p in parts}
    total = max(sum(weights.values()), 1.0)
    most, budget = settings.most_kept, settings.triangle_budget
    return {k: int(min(most * len(m.faces), budget * weights[k] / total)) for k, m in raw.items()}


def _finish(raw: Mesh, triangles: int) -> Mesh:
    """Decimate and give back the label's volume."""
    points, faces = raw.points, _without_bubbles(raw)
    if len(faces) > max(triangles, 2 * _LEAST_SMOOTHED):
        points, faces = decimate(points, faces, max(triangles, 2 * _LEAST_SMOOTHED))
    return Mesh(_with_volume(points, faces, raw.label_volume), faces, raw.label_volume)


def _without_bubbles(mesh: Mesh) -> np.ndarray:
    """Faces without small closed cavities: pinholes in a mask would be bubbles in a print."""
    count, piece = _pieces(mesh.faces, len(mesh.points))
    corners = (mesh.points - mesh.points.mean(axis=0))[mesh.faces]
    parts = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6
    volume = np.bincount(piece[mesh.faces[:, 0]], parts, minlength=count)
    bubble = (volume < 0) & (volume > -_LARGEST_BUBBLE)
    return mesh.faces[~bubble[piece[mesh.faces[:, 0]]]]


def _with_volume(points: np.ndarray, faces: np.ndarray, volume: float, tolerance: float = 1e-3) -> np.ndarray:
    """Points moved along their normals until the mesh encloses ``volume`` (mm3) to a relative tolerance."""
    size = np.cbrt(volume)
    for _ in range(20):
        difference = volume - _signed_volume(points, faces)
        if abs(difference) <= tolerance * volume:
            break
        normals = point_normals(points, faces)
        # Newton's step, held short: in a thin branch the volume grows faster than the first derivative tells.
        step = difference / max(_volume_growth(points, faces, normals), 1e-9)
        points = points + normals * np.clip(step, -0.1 * size, 0.1 * size)
    return points


def _volume_growth(points: np.ndarray, faces: np.ndarray, normals: np.ndarray) -> float:
    """Derivative of the enclosed volume (mm3 per mm) when the points move along ``normals``."""
    corners = points[faces]
    area_vectors = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return float(np.einsum("ij,ij->", area_vectors, normals[faces].sum(axis=1)) / 6)


def point_normals(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit normals (n, 3) at the points, faces weighted by area."""
    corners = points[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    flat = faces.ravel()
    normals = np.column_stack(
        [np.bincount(flat, np.repeat(face_normals[:, c], 3), minlength=len(points)) for c in range(3)]
    )
    return normals / np.maximum(np.linalg.norm(normals, axis=1), 1e-12)[:, None]


def _signed_volume(points: np.ndarray, faces: np.ndarray) -> float:
    """Enclosed volume, positive if the faces look outward."""
    if not len(faces):
        return 0.0
    a, b, c = np.moveaxis((points - points.mean(axis=0))[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def mesh_report(mesh: Mesh) -> MeshReport:
    """Count open and crossed edges and pieces, and measure volume and area."""
    ends = np.sort(np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1)
    _, uses = np.unique(ends[:, 0] * max(len(mesh.points), 1) + ends[:, 1], return_counts=True)
    corners = mesh.points[mesh.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    volume = _signed_volume(mesh.points, mesh.faces)
    return MeshReport(
        points=len(mesh.points),
        triangles=len(mesh.faces),
        boundary_edges=int((uses == 1).sum()),
        non_manifold_edges=int((uses > 2).sum()),
        components=_pieces(mesh.faces, len(mesh.points))[0],
        volume=volume,
        area=float(area),
        volume_error=volume / mesh.label_volume - 1 if mesh.label_volume else 0.0,
    )


def _pieces(faces: np.ndarray, points: int) -> tuple[int, np.ndarray]:
    """Number of connected pieces and the piece of each point."""
    if not points:
        return 0, np.empty(0, int)
    rows, columns = faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel()
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(points, points))
    count, piece = connected_components(graph, directed=False)
    return int(count), piece
