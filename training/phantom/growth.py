"""Airway, artery, vein and the 18 segments of a thorax: ``grow_trees``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.graph import TreeGraph
from training.phantom.airway import Frame, central_airway, fill_segments, grow_stems, split_clouds
from training.phantom.branching import (
    Branches,
    FillRule,
    Nodes,
    VoxelMap,
    accumulate,
    branch_flow,
    generations,
    smooth_nodes,
    to_nodes,
)
from training.phantom.segments import nearest_branch_segments, partition
from training.phantom.vessels import (
    Tree,
    artery_tree,
    lattice,
    push_apart,
    side_branches,
    subtree_codes,
    vein_tree,
)

if TYPE_CHECKING:
    from training.phantom.thorax import Thorax

__all__ = ["LungTrees", "grow_trees"]


@dataclass
class LungTrees:
    """The trees and segments of one patient.

    Attributes:
        airway, artery, vein: LPS mm; segment codes 1-18 per piece, 0 central.
        airway_wall: (N,) wall thickness in mm at each airway node.
        segments: uint8 [k, j, i] on the thorax's grid; tiles its lobes exactly, one component each.
        variants: names of the anatomical variants of this patient.
    """

    airway: TreeGraph
    artery: TreeGraph
    vein: TreeGraph
    airway_wall: np.ndarray
    segments: np.ndarray
    variants: list[str]


@dataclass(frozen=True)
class Habit:
    """What varies from patient to patient.

    Attributes:
        trachea: lumen radius in mm.
        airway_exponent, vessel_exponent: Murray exponents.
        ratio: artery radius over airway radius at a segmental bronchus.
        shortest: mm, lumen radius at which the airway ends (spread per branch).
        unit_volume: mm3 of lung per terminal branch.
        trunk: mm, radius of the main pulmonary artery.
        terminal: mm, radius of the last vessels.
    """

    trachea: float
    airway_exponent: float
    ratio: float
    shortest: float
    unit_volume: float
    trunk: float
    terminal: float

    @staticmethod
    def sample(rng: np.random.Generator, scale: float, detail: float) -> Habit:
        volume = 4.5e6 * scale**3
        return Habit(
            trachea=scale * rng.normal(8.6, 0.7),
            airway_exponent=rng.uniform(2.35, 2.6),
            ratio=rng.uniform(1.0, 1.3),
            shortest=rng.uniform(0.6, 0.85),
            unit_volume=volume**0.8 * 4.5e6**0.2 / (1300.0 * detail),
            trunk=scale * rng.normal(13.0, 1.0),
            terminal=rng.uniform(0.4, 0.5),
        )


def grow_trees(thorax: Thorax, seed: int, shifted: bool = False, detail: float = 1.0) -> LungTrees:
    """Grow the three trees into the lobes of a thorax.

    Args:
        thorax: organs, lobes and landmarks.
        seed: same seed, same result.
        shifted: another growth rule and another definition of the segments, for held-out tests.
        detail: density of small branches, 1 for a usual training case.
    """
    rng = np.random.default_rng([seed, 18, int(shifted)])
    lobes = VoxelMap(
        np.ascontiguousarray(thorax.lobes, dtype=np.uint8), thorax.grid.spacing, np.array(thorax.grid.origin, float)
    )
    frame = _frame(thorax, lobes)
    habit = Habit.sample(rng, frame.scale, detail)
    central = central_airway(frame, rng)
    planes = VoxelMap(partition(lobes, central.gate, central.position, rng), lobes.spacing, lobes.origin)
    clouds = _clouds(planes, habit.unit_volume, rng, pleura=1.6)
    clouds = split_clouds(central, clouds)
    stems = grow_stems(central, clouds, planes, frame, rng)
    fill_segments(central.branches, stems, clouds, planes, lobes, _rule(shifted), rng)
    bundle = _bundle(central.branches, habit, frame, rng)
    segments = planes if shifted else _segments(planes, lobes, bundle)
    artery = _artery(bundle, segments, frame, habit, rng)
    vein = _vein(bundle, artery, segments, stems, frame, habit, rng)
    airway, wall = _visible_airway(bundle, habit, rng)
    return LungTrees(airway, artery, vein, wall, segments.array, central.variants)


def _frame(thorax: Thorax, lobes: VoxelMap) -> Frame:
    core, trees = {}, {}
    step = max(1, round(3.0 / lobes.spacing))
    coarse = lobes.array[::step, ::step, ::step]
    for lobe in range(1, 6):
        inside = coarse == lobe
        if not inside.any():
            continue
        deep = inside.copy()
        for axis in range(3):
            for shift in (-1, 1):
                deep &= np.roll(inside, shift, axis)
        points = lobes.world(np.argwhere(deep if deep.any() else inside) * step)
        core[lobe], trees[lobe] = points, cKDTree(points)
    volume = float((coarse > 0).sum()) * (step * lobes.spacing) ** 3
    marks = {name: np.asarray(point, dtype=np.float64) for name, point in thorax.landmarks.items()}
    return Frame(marks, lobes, core, trees, float(np.clip((volume / 4.5e6) ** (1 / 3), 0.6, 1.3)))


def _rule(shifted: bool) -> FillRule:
    return FillRule(reach=0.9, constructive=True) if shifted else FillRule()


def _segments(planes: VoxelMap, lobes: VoxelMap, bundle: Bundle) -> VoxelMap:
    """The final segments: nearest labelled branch."""
    points = bundle.nodes.points
    codes = np.array(bundle.branches.segment)[bundle.nodes.branch]
    home = planes.at(points) == codes  # a bronchus that crosses a neighbor on its way supplies nothing there
    points, codes = points[home], codes[home]
    for code in np.setdiff1d(np.unique(planes.array), [0, *codes]):  # too small for a branch of its own
        points = np.concatenate([points, _middle(planes, int(code))])
        codes = np.append(codes, code)
    array = nearest_branch_segments(planes, lobes.array, points, codes, tolerance=4.0)
    return VoxelMap(array, planes.spacing, planes.origin)


def _clouds(
    planes: VoxelMap, unit_volume: float, rng: np.random.Generator, pleura: float = 1.0
) -> dict[int, np.ndarray]:
    """Random points in each segment, one per ``unit_volume`` mm3, and ``pleura`` times as many near the pleura."""
    array = planes.array
    chosen = np.flatnonzero(array)
    chosen = chosen[rng.random(len(chosen)) < pleura * planes.spacing**3 / unit_volume]
    index = np.stack(np.unravel_index(chosen, array.shape), axis=1)
    if pleura > 1.0:
        shell = _near_pleura(array, index, max(1, round(8.0 / planes.spacing)))
        keep = shell | (rng.random(len(index)) < 1.0 / pleura)
        index = index[keep]
    points = planes.world(index) + rng.uniform(-0.5, 0.5, index.shape) * planes.spacing
    codes = array[tuple(index.T)]
    clouds = {code: points[codes == code] for code in range(1, 19)}
    for code, size in enumerate(np.bincount(array.ravel(), minlength=19)[1:19], start=1):
        if size and not len(clouds[code]):
            clouds[code] = _middle(planes, code)
    return clouds


def _middle(planes: VoxelMap, code: int) -> np.ndarray:
    """(1, 3) the point of a (tiny) segment that is nearest to its center."""
    points = planes.world(np.argwhere(planes.array == code))
    return points[[np.argmin(np.linalg.norm(points - points.mean(0), axis=1))]]


def _near_pleura(array: np.ndarray, index: np.ndarray, reach: int) -> np.ndarray:
    """Whether one of the six voxels at a distance of ``reach`` lies outside the lungs."""
    near = np.zeros(len(index), dtype=bool)
    for axis in range(3):
        for step in (-reach, reach):
            beside = index.copy()
            beside[:, axis] = np.clip(beside[:, axis] + step, 0, array.shape[axis] - 1)
            near |= array[tuple(beside.T)] == 0
    return near


@dataclass
class Bundle:
    """The bronchovascular tree: all branches with their airway lumen.

    Attributes:
        branches, nodes: the tree.
        radius: (N,) airway lumen radius per node in mm, also where the airway is no longer visible.
        branch_radius: (B,) same per branch.
        wall: (N,) wall thickness in mm.
        segmental: mean lumen radius of the segmental bronchi in mm.
    """

    branches: Branches
    nodes: Nodes
    radius: np.ndarray
    branch_radius: np.ndarray
    wall: np.ndarray
    segmental: float


def _bundle(branches: Branches, habit: Habit, frame: Frame, rng: np.random.Generator) -> Bundle:
    parent = np.array(branches.parent)
    flow = branch_flow(parent)
    share = (flow / flow[0]) ** (1 / habit.airway_exponent)
    own = habit.trachea * share * np.exp(rng.normal(0, 0.04, len(parent)))
    own = np.minimum(own, np.where(parent >= 0, own[parent], np.inf))
    nodes = to_nodes(branches, 4.0, rng, bow=0.08)
    nodes.points = smooth_nodes(nodes.points, nodes.parent, 2, np.zeros(len(nodes.points), bool))
    radius = own[nodes.branch] * (1.05 - 0.1 * nodes.along)
    wall = np.minimum(0.2 + 0.22 * radius, 0.35 + 0.16 * radius)
    segmental = float(np.mean([own[b] for b, name in enumerate(branches.name) if name.startswith("B")] or [3.0]))
    return Bundle(branches, nodes, radius, own, np.minimum(wall, 1.8), segmental)


def _artery(bundle: Bundle, segments: VoxelMap, frame: Frame, habit: Habit, rng: np.random.Generator) -> TreeGraph:
    nodes = bundle.nodes
    clearance = bundle.radius * (1 + habit.ratio) + bundle.wall + rng.uniform(0.3, 0.7)
    tree = artery_tree(bundle.branches, nodes, clearance, frame, rng)
    tree.split(4.5)
    tree.points = smooth_nodes(tree.points, tree.parent, 2, np.zeros(len(tree), bool))
    segmental = habit.ratio * bundle.segmental
    radius = _vessel_radius(tree, habit, segmental)
    cloud = _any_points(segments, 3.5 * habit.unit_volume, rng)
    eligible = ~tree.central & (radius > 0.7) & (radius < 3.0)
    side_branches(tree, eligible, cloud, segments, frame.lobes, FillRule(reach=0.9), rng, 3)
    radius = _vessel_radius(tree, habit, segmental)
    visible = bundle.radius > 0.5
    push_apart(tree, radius, nodes.points[visible], (bundle.radius + bundle.wall)[visible], frame.lobes, gap=0.2)
    tree.split(5.0)
    radius = _vessel_radius(tree, habit, segmental)
    return TreeGraph(tree.points, radius, tree.parent, tree.segment, generations(tree.parent))


def _any_points(segments: VoxelMap, unit_volume: float, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate(list(_clouds(segments, unit_volume, rng, pleura=1.8).values()))


def _vessel_radius(tree: Tree, habit: Habit, segmental: float) -> np.ndarray:
    """Murray radii of a vessel tree.

    The last vessels and those of a mean segment have given radii, which fixes the exponent (about 2.4, as Nakamura and
    Awa 2014 find for elastic arteries); above a segment the radius grows up to that of the trunk.

    Args:
        segmental: mm, radius of a vessel that supplies an 18th of the lungs.
    """
    children = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
    flow = accumulate(tree.parent, (children == 0).astype(np.float64))
    total = flow[tree.parent < 0].sum()
    part = max(total / 18, 2.0)
    lower = habit.terminal * flow ** (np.log(segmental / habit.terminal) / np.log(part))
    upper = segmental * (flow / part) ** (np.log(habit.trunk / segmental) / np.log(total / part))
    return np.where(flow < part, lower, upper)


def _vein(
    bundle: Bundle,
    artery: TreeGraph,
    segments: VoxelMap,
    stems: dict[int, int],
    frame: Frame,
    habit: Habit,
    rng: np.random.Generator,
) -> TreeGraph:
    labels = _labels(bundle.branches, stems)[bundle.nodes.branch]
    use = labels[:, 0] > 0
    grid = lattice(segments, bundle.nodes.points[use], labels[use], bundle.radius[use], 3.6)
    tree = vein_tree(bundle.branches, grid, frame, rng)
    tree.split(4.5)
    tree.points = smooth_nodes(tree.points, tree.parent, 6, np.zeros(len(tree), bool))
    cloud = _any_points(segments, 1.1 * habit.unit_volume, rng)
    cloud = cloud[cKDTree(bundle.nodes.points).query(cloud)[0] > 2.5]
    side_branches(tree, ~tree.central, cloud, frame.lobes, frame.lobes, FillRule(fraction=0.45, reach=0.9), rng, 16)
    radius = _vessel_radius(tree, habit, habit.ratio * bundle.segmental)
    visible = bundle.radius > 0.5
    others = np.concatenate([bundle.nodes.points[visible], artery.points])
    sizes = np.concatenate([(bundle.radius + bundle.wall)[visible], artery.radius])
    push_apart(tree, radius, others, sizes, frame.lobes, rounds=5)
    tree.split(5.0)
    radius = _vessel_radius(tree, habit, habit.ratio * bundle.segmental)
    children = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
    codes = segments.at(tree.points).astype(np.int64)
    codes_below = subtree_codes(tree.parent, np.where(children == 0, codes, 0))
    return TreeGraph(tree.points, radius, tree.parent, codes_below, generations(tree.parent))


def _labels(branches: Branches, stems: dict[int, int]) -> np.ndarray:
    """(B, 2) subsegment and sub-subsegment (branch numbers) of each branch; 0 for central ones."""
    result = np.zeros((len(branches), 2), dtype=np.int64)
    depth = np.full(len(branches), -1)
    roots = set(stems.values())
    for branch, parent in enumerate(branches.parent):
        if branch in roots:
            depth[branch], result[branch] = 0, branch
        elif parent >= 0 and depth[parent] >= 0:
            depth[branch] = depth[parent] + 1
            result[branch] = result[parent]
            result[branch, : 2 if depth[branch] <= 1 else 0] = branch
            if depth[branch] <= 3:
                result[branch, 1] = branch
    return result


def _visible_airway(bundle: Bundle, habit: Habit, rng: np.random.Generator) -> tuple[TreeGraph, np.ndarray]:
    """The branches with a lumen above the patient's limit (and all their ancestors)."""
    parent = np.array(bundle.branches.parent)
    keep = bundle.branch_radius > habit.shortest * np.exp(rng.normal(0, 0.15, len(parent)))
    keep |= np.array([bool(name) for name in bundle.branches.name])
    for branch in range(len(parent)):  # parents come first: a branch needs its parent
        if parent[branch] >= 0 and not keep[parent[branch]]:
            keep[branch] = False
    nodes = bundle.nodes
    take = keep[nodes.branch]
    number = np.cumsum(take) - 1
    up = nodes.parent[take]
    up = np.where(up >= 0, number[np.maximum(up, 0)], -1)
    segment = np.array(bundle.branches.segment)[nodes.branch][take]
    graph = TreeGraph(nodes.points[take], bundle.radius[take], up, segment, generations(up))
    return graph, bundle.wall[take]
