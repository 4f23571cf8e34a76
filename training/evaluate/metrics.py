"""Scores of segmentations: overlap, surfaces, tree topology, anatomy and meshes.

All functions take numpy arrays indexed ``[k, j, i]`` and spacings in ``Volume`` order (mm along i, j, k). A score that
has no meaning for a case (structure absent in truth and prediction) is ``nan`` and is left out of averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import Lobe
from LCTfoundLib.volume import Volume

__all__ = [
    "BRANCH_DETECTED_SHARE",
    "FISSURES",
    "Centerline",
    "MeshCheck",
    "SurfaceDistances",
    "TreeScore",
    "airway_leaks",
    "branches_of_graph",
    "centerline_dice",
    "centerline_of_graph",
    "centerline_of_mask",
    "check_mesh",
    "component_count",
    "crop_around",
    "dice",
    "dice_per_label",
    "fissure_distance",
    "intrusions",
    "largest_component",
    "pleural_reach",
    "recall",
    "surface_distances",
    "surface_voxels",
    "tree_score",
]

Spacing = tuple[float, float, float]

#: A branch counts as detected when this share of its centerline is (ATM'22).
BRANCH_DETECTED_SHARE = 0.8
#: A branch must run this far inside a foreign segment to count as an intrusion, so that voxel steps at a border do not.
INTRUSION_MM = 3.0
#: Airways become thinner on their way; more than this ratio to the parent branch means the mask leaked.
LEAK_RATIO = 1.2

FACES = ndimage.generate_binary_structure(3, 1)
CORNERS = ndimage.generate_binary_structure(3, 3)

#: Lobes that meet at each fissure.
FISSURES: dict[str, tuple[tuple[Lobe, Lobe], ...]] = {
    "right oblique": ((Lobe.RIGHT_UPPER, Lobe.RIGHT_LOWER), (Lobe.RIGHT_MIDDLE, Lobe.RIGHT_LOWER)),
    "right horizontal": ((Lobe.RIGHT_UPPER, Lobe.RIGHT_MIDDLE),),
    "left oblique": ((Lobe.LEFT_UPPER, Lobe.LEFT_LOWER),),
}


# -- overlap ---------------------------------------------------------------------------------------------------------


def crop_around(*masks: np.ndarray, margin: int = 1) -> tuple[slice, slice, slice]:
    """Slices of the common bounding box of the masks' non-zero voxels, widened by ``margin`` voxels.

    Of empty masks it is one voxel at the start, so that later steps work on something.
    """
    used = [_used_range(masks, axis) for axis in range(3)]
    if any(bounds is None for bounds in used):
        return slice(0, 1), slice(0, 1), slice(0, 1)
    k, j, i = (
        slice(max(0, bounds[0] - margin), min(size, bounds[1] + 1 + margin))
        for bounds, size in zip(used, masks[0].shape, strict=True)
        if bounds is not None
    )
    return k, j, i


def _used_range(masks: Sequence[np.ndarray], axis: int) -> tuple[int, int] | None:
    others = tuple(a for a in range(3) if a != axis)
    used = np.flatnonzero(np.logical_or.reduce([np.any(mask, axis=others) for mask in masks]))
    return (int(used[0]), int(used[-1])) if used.size else None


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Dice coefficient of two masks; ``nan`` when both are empty."""
    total = int(np.count_nonzero(truth)) + int(np.count_nonzero(prediction))
    if total == 0:
        return float("nan")
    return 2.0 * int(np.count_nonzero(np.logical_and(truth, prediction))) / total


def dice_per_label(truth: np.ndarray, prediction: np.ndarray, labels: Iterable[int]) -> dict[int, float]:
    """Dice of each label of two label maps, in one pass over them; ``nan`` where both lack the label."""
    count = 256
    sizes_truth = np.bincount(truth.ravel(), minlength=count)
    sizes_prediction = np.bincount(prediction.ravel(), minlength=count)
    common = np.bincount(truth[truth == prediction], minlength=count)
    result = {}
    for label in labels:
        total = sizes_truth[label] + sizes_prediction[label]
        result[label] = float(2 * common[label] / total) if total else float("nan")
    return result


def recall(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Share of the truth's voxels that the prediction has; ``nan`` for an empty truth."""
    size = int(np.count_nonzero(truth))
    return float("nan") if size == 0 else int(np.count_nonzero(np.logical_and(truth, prediction))) / size


def component_count(mask: np.ndarray, connectivity: int = 26) -> int:
    """Number of connected components (26: over corners, 6: over faces)."""
    inside = mask[crop_around(mask)]
    return int(ndimage.label(inside, CORNERS if connectivity == 26 else FACES)[1])


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 26-connected component, as a boolean mask."""
    result = np.zeros(mask.shape, dtype=bool)
    box = crop_around(mask)
    labels, count = ndimage.label(mask[box], CORNERS)
    if count:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        result[box] = labels == int(sizes.argmax())
    return result


# -- surfaces --------------------------------------------------------------------------------------------------------


def surface_voxels(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a face neighbor outside it (the array's edge counts as outside)."""
    inside = np.asarray(mask, dtype=bool)
    core = np.pad(inside, 1)
    return inside & ~(
        core[2:, 1:-1, 1:-1] & core[:-2, 1:-1, 1:-1]
        & core[1:-1, 2:, 1:-1] & core[1:-1, :-2, 1:-1]
        & core[1:-1, 1:-1, 2:] & core[1:-1, 1:-1, :-2]
    )  # fmt: skip


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm between the surface voxels of two masks.

    Attributes:
        from_truth: for each surface voxel of the truth, the distance to the prediction's surface.
        from_prediction: for each surface voxel of the prediction, the distance to the truth's surface.
            Distances to an empty mask are infinite.
    """

    from_truth: np.ndarray
    from_prediction: np.ndarray

    def normalized_dice(self, tolerance_mm: float = 1.0) -> float:
        """Normalized surface Dice (Nikolov et al., 1809.04430, on surface voxels): share of both surfaces within the
        tolerance of the other one."""
        total = len(self.from_truth) + len(self.from_prediction)
        if total == 0:
            return float("nan")
        near = np.count_nonzero(self.from_truth <= tolerance_mm) + np.count_nonzero(
            self.from_prediction <= tolerance_mm
        )
        return float(near / total)

    def mean(self) -> float:
        """Mean symmetric surface distance, mm."""
        both = np.concatenate([self.from_truth, self.from_prediction])
        return float(both.mean()) if both.size else float("nan")

    def hausdorff(self, percent: float = 95.0) -> float:
        """Hausdorff distance in mm at a percentile: the larger one of the two directions."""
        sides = [side for side in (self.from_truth, self.from_prediction) if side.size]
        if not sides:
            return float("nan")
        if any(np.isinf(side).any() for side in sides):
            return float("inf")
        return max(float(np.percentile(side, percent)) for side in sides)


def surface_distances(truth: np.ndarray, prediction: np.ndarray, spacing: Spacing) -> SurfaceDistances:
    """Distances between the surfaces of two masks on a grid of ``spacing``.

    A mask that touches the array's edge has a surface there, in the truth as in the prediction.
    """
    box = crop_around(truth, prediction)
    return _point_set_distances(surface_voxels(truth[box]), surface_voxels(prediction[box]), spacing)


def _point_set_distances(first: np.ndarray, second: np.ndarray, spacing: Spacing) -> SurfaceDistances:
    """Distances between two sets of voxels."""
    return SurfaceDistances(_distances_to(second, first, spacing), _distances_to(first, second, spacing))


def _distances_to(
    target: np.ndarray, source: np.ndarray, spacing: Spacing, limit_mm: float = float("inf")
) -> np.ndarray:
    """Distance of each ``source`` voxel to the nearest ``target`` voxel; infinite beyond ``limit_mm``.

    Surfaces are thin, so a tree of their points is several times faster than a distance map of the whole chest.
    """
    step = np.array(spacing[::-1])
    points = np.argwhere(source) * step
    if not len(points) or not target.any():
        return np.full(len(points), np.inf)
    return cKDTree(np.argwhere(target) * step).query(points, distance_upper_bound=limit_mm)[0]


def fissure_distance(truth: np.ndarray, prediction: np.ndarray, spacing: Spacing) -> dict[str, float]:
    """Mean symmetric distance in mm between true and predicted fissures.

    Args:
        truth, prediction: lobe label maps (``Lobe`` codes).

    Returns:
        One value per fissure of ``FISSURES``; ``nan`` where neither map has it, ``inf`` where just one has.
    """
    box = crop_around(truth, prediction)
    return {
        name: _point_set_distances(
            _meeting_voxels(truth[box], pairs), _meeting_voxels(prediction[box], pairs), spacing
        ).mean()
        for name, pairs in FISSURES.items()
    }


def _meeting_voxels(lobes: np.ndarray, pairs: tuple[tuple[Lobe, Lobe], ...]) -> np.ndarray:
    """Voxels of the first lobe of each pair that touch the second one over a face."""
    result = np.zeros(lobes.shape, dtype=bool)
    for axis in range(3):
        low, high = (tuple(s if a == axis else slice(None) for a in range(3)) for s in (slice(-1), slice(1, None)))
        for first, second in pairs:
            result[low] |= (lobes[low] == first) & (lobes[high] == second)
            result[high] |= (lobes[high] == first) & (lobes[low] == second)
    return result


def pleural_reach(
    lobes: np.ndarray, vessels: np.ndarray, spacing: Spacing, within_mm: float = 10.0
) -> dict[Lobe, float]:
    """Share of each lobe's pleural surface that has an artery or vein voxel within ``within_mm``.

    The pleural surface of a lobe is its voxels with a face neighbor outside both lungs (fissures do not count).
    """
    box = crop_around(lobes, margin=int(np.ceil(within_mm / min(spacing))))
    lobes, vessels = lobes[box], np.asarray(vessels[box], dtype=bool)
    outer = surface_voxels(lobes > 0)
    # The limit of the search is exclusive.
    near = np.isfinite(_distances_to(surface_voxels(vessels), outer, spacing, np.nextafter(within_mm, np.inf)))
    owner = lobes[outer]
    return {lobe: float(near[owner == lobe].mean()) if (owner == lobe).any() else float("nan") for lobe in Lobe}


# -- trees -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Centerline:
    """The centerline of a true tree as voxels, each with its branch and the length it stands for.

    Attributes:
        index: (N, 3) int voxel indices (k, j, i).
        branch: (N,) int, 0-based id of the branch.
        length: (N,) float, mm of tree that the voxel stands for.
        segment: (N,) int, segment code the branch supplies, 0 where central or unknown.
    """

    index: np.ndarray
    branch: np.ndarray
    length: np.ndarray
    segment: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def within(self, mask: np.ndarray) -> Centerline:
        """The part that lies in a mask; branches without a voxel there disappear."""
        keep = self.look_up(mask) > 0
        _, branch = np.unique(self.branch[keep], return_inverse=True)
        return Centerline(self.index[keep], branch, self.length[keep], self.segment[keep])

    def look_up(self, array: np.ndarray) -> np.ndarray:
        """The array's values at the centerline voxels."""
        k, j, i = self.index.T
        return array[k, j, i]


def centerline_of_mask(mask: np.ndarray, spacing: Spacing) -> Centerline:
    """Centerline of a mask by 3D thinning (Lee 1994), split into branches at its junctions as ATM'22 parses trees.

    Every voxel stands for half the way to each of its skeleton neighbors.
    """
    box = crop_around(mask)
    skeleton = skeletonize(np.ascontiguousarray(mask[box] > 0)) > 0
    neighbors = ndimage.convolve(skeleton.astype(np.uint8), CORNERS.astype(np.uint8), mode="constant") - skeleton
    parts, _ = ndimage.label(skeleton & (neighbors <= 2), CORNERS)
    index = np.argwhere(skeleton)
    branch = parts[skeleton]
    if len(index) and (branch == 0).any():
        branch = _spread_labels(skeleton, parts)[skeleton]
    _, branch = np.unique(branch, return_inverse=True)
    offset = np.array([s.start for s in box])
    return Centerline(
        index + offset, branch, _half_link_lengths(skeleton, spacing)[skeleton], np.zeros(len(index), dtype=int)
    )


def _spread_labels(skeleton: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Give junction voxels to the branch nearest to them; a lone clump of junction voxels becomes its own branch."""
    if not parts.any():
        return skeleton.astype(parts.dtype)
    nearest = ndimage.distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    return np.where(skeleton, parts[tuple(nearest)], 0)


def _half_link_lengths(skeleton: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Per skeleton voxel, half the summed length of its links to skeleton neighbors (at least half a voxel)."""
    steps = np.argwhere(np.ones((3, 3, 3))) - 1
    weights = np.linalg.norm(steps * np.array(spacing[::-1]), axis=1).reshape(3, 3, 3) / 2
    lengths = ndimage.convolve(skeleton.astype(np.float64), weights, mode="constant")
    return np.where(skeleton, np.maximum(lengths, min(spacing) / 2), 0.0)


def branches_of_graph(graph: TreeGraph) -> np.ndarray:
    """(N,) id of the branch each node's piece belongs to: a branch runs from one bifurcation (or root) to the next."""
    children = np.bincount(graph.parent[graph.parent >= 0], minlength=len(graph))
    branch = np.full(len(graph), -1)
    count = 0
    for node, parent in enumerate(graph.parent):
        if parent >= 0 and children[parent] == 1:
            branch[node] = branch[parent]
        else:
            branch[node] = count
            count += 1
    return branch


def centerline_of_graph(graph: TreeGraph, grid: Volume) -> Centerline:
    """An exact tree graph as voxels of a canonical grid, sampled every half voxel; points outside are left out.

    A voxel that a branch crosses with several samples gets their summed length; two branches can share a voxel.
    """
    points, pieces, lengths = _sample_pieces(graph, min(grid.spacing) / 2)
    index = np.rint((points - np.array(grid.origin)) / np.array(grid.spacing)).astype(int)[:, ::-1]
    inside = ((index >= 0) & (index < np.array(grid.shape))).all(axis=1)
    index, pieces, lengths = index[inside], pieces[inside], lengths[inside]
    branch = branches_of_graph(graph)[pieces]
    segment = np.asarray(graph.segment)[pieces]
    keys = np.column_stack([branch, segment, index])
    unique, place = np.unique(keys, axis=0, return_inverse=True)
    summed = np.bincount(place.ravel(), weights=lengths, minlength=len(unique))
    return Centerline(unique[:, 2:], unique[:, 0], summed, unique[:, 1])


def _sample_pieces(graph: TreeGraph, step_mm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (M, 3) along every parent-child piece, with the child node and the length each one stands for."""
    nodes = np.flatnonzero(np.asarray(graph.parent) >= 0)
    start, end = graph.points[np.asarray(graph.parent)[nodes]], graph.points[nodes]
    length = np.linalg.norm(end - start, axis=1)
    counts = np.maximum(1, np.ceil(length / step_mm).astype(int))
    piece = np.repeat(np.arange(len(nodes)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    fraction = (np.arange(counts.sum()) - first + 0.5) / counts[piece]
    points = start[piece] + fraction[:, None] * (end - start)[piece]
    return points, nodes[piece], (length / counts)[piece]


@dataclass(frozen=True)
class TreeScore:
    """How well a tree is found, after ATM'22.

    Attributes:
        length_detected: TD, share of the true centerline's length inside the prediction.
        branches_detected: BD, share of true branches of which at least 80 % is inside the prediction.
        precision: share of the predicted voxels that are true.
    """

    length_detected: float
    branches_detected: float
    precision: float


def tree_score(
    centerline: Centerline, truth: np.ndarray, prediction: np.ndarray, largest_only: bool = False
) -> TreeScore:
    """TD, BD and precision of a predicted tree.

    Args:
        centerline: of the truth, already limited to what should be found.
        truth: mask of the truth, for the precision.
        prediction: mask to score.
        largest_only: score the largest component alone, as ATM'22 does for the airway: pieces off the tree are of no
            use to a bronchoscopist. Arteries and veins may reach the lung in several pieces and are scored whole.
    """
    found_mask = largest_component(prediction) if largest_only else np.asarray(prediction, dtype=bool)
    size = int(np.count_nonzero(found_mask))
    precision = int(np.count_nonzero(found_mask & (truth > 0))) / size if size else float("nan")
    if len(centerline) == 0:
        return TreeScore(float("nan"), float("nan"), precision)
    found = centerline.look_up(found_mask) * centerline.length
    per_branch = np.bincount(centerline.branch, weights=found) / np.bincount(
        centerline.branch, weights=centerline.length
    )
    return TreeScore(
        float(found.sum() / centerline.length.sum()),
        float((per_branch >= BRANCH_DETECTED_SHARE - 1e-9).mean()),
        precision,
    )


def centerline_dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """clDice (Shit et al., CVPR 2021): harmonic mean of the share of each skeleton inside the other mask."""
    if not truth.any() and not prediction.any():
        return float("nan")
    if not truth.any() or not prediction.any():
        return 0.0
    box = crop_around(truth, prediction)
    truth, prediction = np.ascontiguousarray(truth[box] > 0), np.ascontiguousarray(prediction[box] > 0)
    precision = float(truth[skeletonize(prediction) > 0].mean())
    sensitivity = float(prediction[skeletonize(truth) > 0].mean())
    return 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0.0


def intrusions(
    centerline: Centerline, segments: np.ndarray, truth: np.ndarray | None = None, minimum_mm: float = INTRUSION_MM
) -> int:
    """Number of intrusions (after ImPulSe+, 2505.08919): true branches of one segment that run in a foreign one.

    A branch counts once for each foreign segment in which it has at least ``minimum_mm`` of centerline. Central
    branches and points outside the lungs do not count. Made for airways and arteries; veins run between segments.

    Args:
        segments: territory layer to score.
        truth: territory layer of the truth; where a branch leaves its segment there as well, the prediction is not
            to blame.
    """
    codes = centerline.look_up(segments).astype(int)
    foreign = (centerline.segment > 0) & (codes > 0) & (codes != centerline.segment)
    if truth is not None:
        foreign &= centerline.look_up(truth) == centerline.segment
    if not foreign.any():
        return 0
    pairs = centerline.branch[foreign] * 256 + codes[foreign]
    _, place = np.unique(pairs, return_inverse=True)
    return int(np.count_nonzero(np.bincount(place.ravel(), weights=centerline.length[foreign]) >= minimum_mm))


def airway_leaks(graph: TreeGraph, ratio: float = LEAK_RATIO) -> list[int]:
    """Branches (ids of ``branches_of_graph``) whose median radius is more than ``ratio`` times their parent branch's.

    Medians, because the radius at a bifurcation belongs to both branches.
    """
    branch = branches_of_graph(graph)
    if not len(branch):
        return []
    count = int(branch.max()) + 1
    order = np.argsort(branch, kind="stable")
    groups = np.split(np.asarray(graph.radius)[order], np.cumsum(np.bincount(branch, minlength=count))[:-1])
    median = np.array([np.median(group) for group in groups])
    parent_of = np.full(count, -1)
    for node, parent in enumerate(graph.parent):
        if parent >= 0 and branch[parent] != branch[node]:
            parent_of[branch[node]] = branch[parent]
    return [b for b in range(count) if parent_of[b] >= 0 and median[b] > ratio * median[parent_of[b]]]


# -- meshes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshCheck:
    """What is wrong with a triangle mesh.

    Attributes:
        boundary_edges: edges of one triangle only; 0 in a closed mesh.
        non_manifold_edges: edges of more than two triangles.
        inconsistent_edges: edges that two triangles pass in the same direction (one of them is flipped).
        volume_mm3: enclosed volume, by the divergence theorem; negative when the normals point inward.
        shells: number of connected surfaces.
    """

    boundary_edges: int
    non_manifold_edges: int
    inconsistent_edges: int
    volume_mm3: float
    shells: int

    @property
    def watertight(self) -> bool:
        return self.boundary_edges == 0


def check_mesh(points: np.ndarray, triangles: np.ndarray) -> MeshCheck:
    """Check a mesh of points (N, 3) in mm and triangles (M, 3) of point indices; each point must be listed once."""
    directed = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]).astype(np.int64)
    _, edge_uses = np.unique(np.sort(directed, axis=1), axis=0, return_counts=True)
    _, direction_uses = np.unique(directed, axis=0, return_counts=True)
    a, b, c = (points[triangles[:, corner]] - points.mean(axis=0) for corner in range(3))
    return MeshCheck(
        int((edge_uses == 1).sum()),
        int((edge_uses > 2).sum()),
        int((direction_uses > 1).sum()),
        float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6),
        _shell_count(len(points), triangles),
    )


def _shell_count(points: int, triangles: np.ndarray) -> int:
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(points, points))
    _, shell = connected_components(graph, directed=False)
    return len(np.unique(shell[triangles[:, 0]]))
