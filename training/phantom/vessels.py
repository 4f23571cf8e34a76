"""Pulmonary arteries beside the airways, and pulmonary veins between the segments.

Artery: the whole bronchovascular tree, shifted aside by both radii, the wall and a gap, the side turning slowly toward
the normal of the next bifurcation so that the two trees do not cross; plus supernumerary side branches.

Vein: trunks are shortest paths from the left atrium over a lattice in which the interfaces between segments are fast,
those between subsegments slower, and the surroundings of a bronchovascular bundle slow; small veins then fill the rest.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy import ndimage
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT
from training.phantom.airway import Frame
from training.phantom.branching import (
    Branches,
    FillRule,
    Nodes,
    VoxelMap,
    expand,
    fill_cloud,
    smooth_nodes,
    tangents,
    to_nodes,
    unit,
)

__all__ = ["Lattice", "Tree", "artery_tree", "lattice", "push_apart", "side_branches", "subtree_codes", "vein_tree"]


@dataclass
class Tree:
    """Nodes of a vessel tree; parents come first.

    Attributes:
        points: (N, 3) LPS mm.
        parent: (N,) node index, -1 at a root.
        segment: (N,) segment code, 0 central.
        central: (N,) bool, hand-specified part outside the lungs.
    """

    points: np.ndarray
    parent: np.ndarray
    segment: np.ndarray
    central: np.ndarray

    def __len__(self) -> int:
        return len(self.points)

    def append(self, points: np.ndarray, parent: np.ndarray, segment: np.ndarray, central: bool = False) -> None:
        """Add nodes whose ``parent`` already counts from the start of this tree."""
        self.points = np.concatenate([self.points, points])
        self.parent = np.concatenate([self.parent, parent])
        self.segment = np.concatenate([self.segment, segment])
        self.central = np.concatenate([self.central, np.full(len(points), central)])

    def split(self, longest: float) -> None:
        """Put nodes into pieces longer than ``longest`` mm."""
        above = np.maximum(self.parent, 0)
        length = np.where(self.parent >= 0, np.linalg.norm(self.points - self.points[above], axis=1), 0.0)
        count = np.maximum(np.ceil(length / longest).astype(int), 1)
        owner = np.repeat(np.arange(len(self)), count)
        last = np.cumsum(count) - 1
        share = ((np.arange(len(owner)) - (last - count)[owner]) / count[owner])[:, None]
        points = self.points[above[owner]] * (1 - share) + self.points[owner] * share
        points[last] = self.points
        parent = np.arange(len(owner)) - 1
        parent[last - count + 1] = np.where(self.parent >= 0, last[above], -1)
        self.points, self.parent = points, parent
        self.segment, self.central = self.segment[owner], self.central[owner]


def _tree(nodes: Nodes) -> Tree:
    size = len(nodes.points)
    return Tree(nodes.points, nodes.parent, np.zeros(size, int), np.ones(size, bool))


# --- artery ----------------------------------------------------------------------------------------------------------

#: Airway branch from whose end on the artery follows -> side of the airway on which it lies there (x left, y back,
#: z up).
FOLLOWED: dict[str, tuple[float, float, float]] = {
    "right upper": (0.35, -0.8, 0.45),
    "tracheal bronchus": (0.1, -0.9, -0.4),
    "middle": (-0.45, 0.0, 0.9),
    "right lower": (-0.95, -0.05, 0.25),
    "upper division": (-0.1, 0.5, 0.7),
    "lingula": (0.85, 0.45, 0.3),
    "left lower": (0.95, 0.2, 0.2),
}


def artery_tree(airway: Branches, nodes: Nodes, clearance: np.ndarray, frame: Frame, rng: np.random.Generator) -> Tree:
    """Central arteries, then the followed part of the bronchovascular tree.

    Args:
        airway: all branches of the bronchovascular tree.
        nodes: its nodes.
        clearance: (N,) distance in mm between both centerlines at each node.
    """
    roots = {airway.index(name): unit(np.array(side)) for name, side in FOLLOWED.items() if name in airway.name}
    normals = _sides(airway, roots)
    attach = {}
    for branch, side in roots.items():
        node = nodes.last[branch]
        attach[airway.name[branch]] = nodes.points[node] + clearance[node] * side
    tree, tips = _central_artery(airway, attach, frame, rng)
    _follow(tree, tips, airway, nodes, normals, clearance)
    fixed = tree.central.copy()
    tree.points = smooth_nodes(tree.points, tree.parent, 2, fixed)
    return tree


def _central_artery(
    airway: Branches, attach: dict[str, np.ndarray], frame: Frame, rng: np.random.Generator
) -> tuple[Tree, dict[str, int]]:
    """Hand-specified arteries from the trunk to each attachment; returns the node of each."""
    carina, scale = np.asarray(frame.landmarks["carina"]), frame.scale
    root = np.asarray(frame.landmarks["pulmonary_trunk"], dtype=np.float64)

    def at(base: np.ndarray, x: float, y: float, z: float) -> np.ndarray:
        return base + scale * (np.array([x, y, z]) + rng.normal(0, 0.7, 3))

    end = {name: airway.end[airway.index(name)] for name in ("right main", "intermedius", "left main")}
    tree = Branches(root)
    fork = at(carina, 15, -25, -21)
    if np.linalg.norm(fork - root) < 8:
        fork = root + scale * np.array([-2.0, 4.0, 6.0])
    trunk = tree.add(-1, fork, "trunk")
    right = tree.add(trunk, at(carina, 0, -20, -24), "right artery")
    right = tree.add(right, at(end["right main"], 4, -16, -9), "right artery")
    truncus = tree.add(right, at(end["right main"], -4, -14, 1), "truncus anterior")
    tips = {"right upper": tree.add(truncus, attach["right upper"])}
    if "tracheal bronchus" in attach:
        tips["tracheal bronchus"] = tree.add(truncus, attach["tracheal bronchus"])
    half = 0.5 * (end["right main"] + end["intermedius"])
    inter = tree.add(right, at(half, -9, -11, 0), "interlobar")
    inter = tree.add(inter, at(end["intermedius"], -12, -3, 3), "interlobar")
    tips["middle"] = tree.add(inter, attach["middle"])
    tips["right lower"] = tree.add(inter, attach["right lower"])
    left = tree.add(trunk, at(0.5 * (carina + end["left main"]), 6, -14, 4), "left artery")
    arch = tree.add(left, at(end["left main"], -2, -3, 17), "left arch")
    tips["upper division"] = tree.add(arch, attach["upper division"])
    down = tree.add(arch, at(end["left main"], 8, 12, 9), "left descending")
    down = tree.add(down, 0.6 * attach["left lower"] + 0.4 * tree.end[down] + scale * np.array([2.0, 2.0, 0]), "left")
    tips["lingula"] = tree.add(down, attach["lingula"])
    tips["left lower"] = tree.add(down, attach["left lower"])
    nodes = to_nodes(tree, 4.0, rng, bow=0.0)
    result = _tree(nodes)
    result.points = smooth_nodes(result.points, result.parent, 8, np.zeros(len(result), bool))
    return result, {name: int(nodes.last[branch]) for name, branch in tips.items()}


def _sides(airway: Branches, roots: dict[int, np.ndarray]) -> np.ndarray:
    """(B, 2, 3) side of the artery at start and end of each followed branch; NaN where none follows."""
    parent = np.array(airway.parent)
    direction = np.array([airway.direction(b) for b in range(len(airway))])
    pair = np.full((len(airway), 2), -1)
    for branch, above in enumerate(parent):
        if above >= 0:
            slot = 0 if pair[above, 0] < 0 else 1
            pair[above, slot] = branch
    sides = np.full((len(airway), 2, 3), np.nan)
    for branch, side in roots.items():
        sides[branch, 1] = side
    _transport(parent, direction, pair, sides)
    return sides


@njit(cache=True)
def _transport(parent, direction, pair, sides):  # type: ignore[no-untyped-def]
    """Fill ``sides`` from the roots down: carried along, turned toward the normal of the branch's own bifurcation."""
    for b in range(len(parent)):
        p = parent[b]
        if p < 0 or np.isnan(sides[p, 1, 0]) or not np.isnan(sides[b, 1, 0]):
            continue
        start = _across(sides[p, 1], direction[b])
        sides[b, 0] = start
        goal = start
        if pair[b, 1] >= 0:
            goal = np.cross(direction[pair[b, 0]], direction[pair[b, 1]])
            if (goal * start).sum() < 0:
                goal = -goal
            goal = _across(goal + 0.3 * start, direction[b])
        sides[b, 1] = goal


@njit(cache=True)
def _across(side, direction):  # type: ignore[no-untyped-def]
    """The part of ``side`` across ``direction``, as a unit vector."""
    result = side - (side * direction).sum() * direction
    norm = np.sqrt((result * result).sum())
    if norm < 1e-3:
        result = np.array([direction[1], -direction[0], 0.1])
        result = result - (result * direction).sum() * direction
        norm = np.sqrt((result * result).sum())
    return result / norm


def _follow(
    tree: Tree, tips: dict[str, int], airway: Branches, nodes: Nodes, sides: np.ndarray, clearance: np.ndarray
) -> None:
    """Append the shifted copy of all followed branches (those below a tip)."""
    followed = ~np.isnan(sides[:, 0, 0])
    take = followed[nodes.branch]
    take[0] = False
    index = np.flatnonzero(take)
    branch, t = nodes.branch[index], nodes.along[index, None]
    side = (1 - t) * sides[branch, 0] + t * sides[branch, 1]
    along = tangents(nodes.points, nodes.parent)[index]
    side = unit(side - (side * along).sum(1, keepdims=True) * along)
    number = np.full(len(nodes.points), -1)
    number[index] = len(tree) + np.arange(len(index))
    for name, node in tips.items():
        number[nodes.last[airway.index(name)]] = node
    segment = np.array(airway.segment)[branch]
    tree.append(nodes.points[index] + side * clearance[index, None], number[nodes.parent[index]], segment)


def side_branches(
    tree: Tree,
    eligible: np.ndarray,
    cloud: np.ndarray,
    territory: VoxelMap,
    lobes: VoxelMap,
    rule: FillRule,
    rng: np.random.Generator,
    largest: int = 12,
) -> None:
    """Grow small branches from eligible nodes to the (N, 3) points of ``cloud``, each from the nearest in its lobe.

    Args:
        territory: codes; a branch stays in the code of its point.
        lobes: lobe codes.
        largest: most points that one node gets; the others are dropped.
    """
    anchors = _anchors(tree, eligible, 6.0)
    home, goal = lobes.at(tree.points[anchors]), lobes.at(cloud)
    # a branch leaves before the point that is nearest to its goal, so that it points forward
    ahead = tree.points + 4.0 * tangents(tree.points, tree.parent)
    twigs = _Twigs()
    for lobe in range(1, 6):
        nodes, points = anchors[home == lobe], cloud[goal == lobe]
        if not len(nodes) or not len(points):
            continue
        distance, nearest = cKDTree(ahead[nodes]).query(points)
        codes = territory.at(points)
        order = np.lexsort((distance, codes, nearest))
        cuts = np.flatnonzero(np.diff(nearest[order] * 64 + codes[order])) + 1
        for group in np.split(order, cuts):
            node, code = int(nodes[nearest[group[0]]]), int(codes[group[0]])
            seed, chosen = int(rng.integers(2**31)), points[group[:largest]]
            start = tree.points[node]
            grown = fill_cloud(chosen, start, np.zeros(3), territory, lobes, code, rule, seed)
            twigs.add(node, start, *grown)
    twigs.attach(tree, territory, rng)


class _Twigs:
    """Small trees gathered before they are attached to a tree at once."""

    def __init__(self) -> None:
        self.start: list[np.ndarray] = []
        self.end: list[np.ndarray] = []
        self.parent: list[np.ndarray] = []
        self.owner: list[np.ndarray] = []
        self.count = 0

    def add(self, node: int, point: np.ndarray, ends: np.ndarray, parents: np.ndarray) -> None:
        """What ``fill_cloud`` grew from a node at ``point``."""
        self.start.append(np.where(parents[:, None] < 0, point, ends[parents]) if len(ends) else ends)
        self.end.append(ends)
        self.parent.append(np.where(parents < 0, -1, parents + self.count))
        self.owner.append(np.full(len(ends), node))
        self.count += len(ends)

    def attach(self, tree: Tree, territory: VoxelMap, rng: np.random.Generator) -> None:
        if not self.count:
            return
        end, owner = np.concatenate(self.end), np.concatenate(self.owner)
        nodes = expand(np.concatenate(self.parent), np.concatenate(self.start), end, 4.0, rng)
        up = np.where(nodes.parent >= 0, nodes.parent + len(tree), owner[nodes.branch])
        tree.append(nodes.points, up, territory.at(end)[nodes.branch].astype(np.int64))


def _anchors(tree: Tree, eligible: np.ndarray, spacing: float) -> np.ndarray:
    """Eligible nodes about ``spacing`` mm apart along the tree, and its eligible tips."""
    step = np.linalg.norm(tree.points - tree.points[np.maximum(tree.parent, 0)], axis=1)
    way = np.zeros(len(tree))
    _walk(tree.parent, step, spacing, way)
    children = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
    return np.flatnonzero(eligible & ((way == 0) | (children == 0)))


@njit(cache=True)
def _walk(parent, step, spacing, way):  # type: ignore[no-untyped-def]
    """Distance since the last anchor; 0 at an anchor."""
    for n in range(len(parent)):
        if parent[n] >= 0:
            way[n] = way[parent[n]] + step[n]
            if way[n] >= spacing:
                way[n] = 0.0


# --- vein ------------------------------------------------------------------------------------------------------------


@dataclass
class Lattice:
    """A coarse grid of the lungs for shortest paths.

    Attributes:
        lobes: lobe codes.
        cost: cost per mm.
        strength: 0 inside a small territory .. 3 on an interface between segments.
        depth: mm to the pleura.
        gap: mm to the nearest bronchovascular centerline.
    """

    lobes: VoxelMap
    cost: np.ndarray
    strength: np.ndarray
    depth: np.ndarray
    gap: np.ndarray


def lattice(segments: VoxelMap, points: np.ndarray, labels: np.ndarray, radius: np.ndarray, spacing: float) -> Lattice:
    """The lattice of cost for veins.

    Args:
        segments: segment codes on the fine grid.
        points: (N, 3) bronchovascular nodes.
        labels: (N, 2) subsegment and sub-subsegment that each node belongs to.
        radius: (N,) radius of the bundle at each node in mm.
        spacing: mm of the lattice.
    """
    step = max(1, round(spacing / segments.spacing))
    codes = segments.array[::step, ::step, ::step]
    coarse = VoxelMap(LOBE_OF_SEGMENT[codes], segments.spacing * step, segments.origin)
    inside = coarse.array > 0
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1, 1:-1] * coarse.spacing
    gap, near = cKDTree(points).query(coarse.world(np.argwhere(inside)))
    label = np.full((3, *inside.shape), -1)
    label[0][inside] = codes[inside]
    for level in range(2):
        label[level + 1][inside] = labels[near, level]
    strength = _strength(label)
    distance = np.zeros(inside.shape)
    distance[inside] = gap - radius[near]
    cost = np.array([1.6, 0.9, 0.6, 0.4])[strength]
    cost *= 1 + 2.5 * np.exp(-np.maximum(distance, 0) / 2.0)
    cost *= 1 + 3.0 * np.exp(-depth / 4.0)
    wide = np.zeros(inside.shape)
    wide[inside] = gap
    return Lattice(coarse, cost, strength, depth, wide)


def _strength(label: np.ndarray) -> np.ndarray:
    """3 where the segment differs from a neighbor's, 2 the subsegment, 1 the sub-subsegment, else 0."""
    result = np.zeros(label.shape[1:], dtype=np.int64)
    for axis in range(3):
        low = [slice(None)] * 3
        high = [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        for level, value in ((2, 1), (1, 2), (0, 3)):
            a, b = label[level][tuple(low)], label[level][tuple(high)]
            differ = (a != b) & (a >= 0) & (b >= 0)
            for side in (low, high):
                view = result[tuple(side)]
                view[differ] = np.maximum(view[differ], value)
    return result


def vein_tree(
    airway: Branches,
    grid: Lattice,
    frame: Frame,
    rng: np.random.Generator,
    trunk_volume: tuple[float, float] = (60e3, 7e3),
) -> Tree:
    """Central veins, and trunks along the interfaces.

    Args:
        trunk_volume: mm3 per target of the first and the second round of paths.
    """
    tree, entries = _central_vein(airway, frame, rng)
    for lobes, gates in entries:
        allowed = np.isin(grid.lobes.array, lobes)
        if allowed.any():
            _paths(tree, grid, allowed, gates, trunk_volume, rng)
    return tree


def _central_vein(
    airway: Branches, frame: Frame, rng: np.random.Generator
) -> tuple[Tree, list[tuple[tuple[int, ...], list[int]]]]:
    """Veins from the left atrium into the lobes; per venous territory its lobes and the nodes at which it enters."""
    marks, scale = frame.landmarks, frame.scale
    end = {name: airway.end[airway.index(name)] for name in airway.name if name}

    def entry(lobe: int, name: str, x: float, y: float, z: float) -> np.ndarray:
        return frame.reach(lobe, end[name] + scale * (np.array([x, y, z]) + rng.normal(0, 1.0, 3)))

    tree = Tree(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int), np.zeros(0, bool))
    entries = []
    for lobes, mark, doors in (
        ((1, 2), "left_atrium_superior_right", [entry(1, "right upper", 2, -16, -14), entry(2, "middle", 6, 2, -9)]),
        ((3,), "left_atrium_inferior_right", [entry(3, "right basal", 9, 3, 0)]),
        ((4,), "left_atrium_superior_left", [entry(4, "left upper", 2, -14, 0)]),
        ((5,), "left_atrium_inferior_left", [entry(5, "left basal", -9, 3, 0)]),
    ):
        ostium = np.asarray(marks[mark], dtype=np.float64)
        branches = Branches(ostium)
        meet = ostium + 0.45 * (np.mean(doors, axis=0) - ostium)
        common = branches.add(-1, meet)
        tips = [branches.add(common, door) for door in doors]
        nodes = to_nodes(branches, 4.0, rng, bow=0.0)
        base = len(tree)
        tree.append(
            nodes.points, np.where(nodes.parent < 0, -1, nodes.parent + base), np.zeros(len(nodes.points), int), True
        )
        entries.append((lobes, [base + int(nodes.last[tip]) for tip in tips]))
    return tree, entries


def _paths(
    tree: Tree,
    grid: Lattice,
    allowed: np.ndarray,
    gates: list[int],
    trunk_volume: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Two rounds of shortest paths from targets on the interfaces to the tree grown so far."""
    shape = np.array(allowed.shape)
    node_of = np.full(allowed.size, -1)
    reach = np.full(allowed.size, np.inf)
    cost = np.where(allowed, grid.cost, np.inf).ravel()
    spacing, volume = grid.lobes.spacing, allowed.sum() * grid.lobes.spacing**3
    inside = np.argwhere(allowed)
    finder = cKDTree(grid.lobes.world(inside))
    for gate in gates:
        voxel = np.ravel_multi_index(tuple(inside[finder.query(tree.points[gate])[1]]), tuple(shape))
        node_of[voxel], reach[voxel] = gate, 0.0
    good = allowed & (grid.strength >= 2) & (grid.depth > 7) & (grid.gap > 3)
    for share in trunk_volume:
        pool = np.flatnonzero(good.ravel() & (node_of < 0))
        targets = rng.choice(pool, min(len(pool), max(3, int(volume / share))), replace=False)
        total, back = _dijkstra(cost, reach, *(int(s) for s in shape), spacing)
        order = targets[np.argsort(-total[targets])]
        voxels, parents = _trace(order, total, back, node_of, reach, cost, len(tree), spacing)
        points = grid.lobes.world(np.stack(np.unravel_index(voxels, tuple(shape)), axis=1))
        points = points + rng.normal(0, 0.15 * spacing, points.shape)
        tree.append(points, parents, np.zeros(len(points), int))


@njit(cache=True)
def _dijkstra(cost, reach, depth, height, width, spacing):  # type: ignore[no-untyped-def]
    """Cheapest way to each voxel from all voxels with a finite ``reach`` (which is their start value)."""
    total = reach.copy()
    back = np.full(cost.size, -1, np.int64)
    done = np.zeros(cost.size, np.bool_)
    heap = [(0.0, np.int64(-1))]
    heap.pop()
    for voxel in range(cost.size):
        if np.isfinite(reach[voxel]):
            heapq.heappush(heap, (reach[voxel], np.int64(voxel)))
    plane = height * width
    while len(heap) > 0:
        value, here = heapq.heappop(heap)
        if done[here]:
            continue
        done[here] = True
        k, rest = here // plane, here % plane
        j, i = rest // width, rest % width
        for dk in range(-1, 2):
            for dj in range(-1, 2):
                for di in range(-1, 2):
                    a, b, c = k + dk, j + dj, i + di
                    if a < 0 or b < 0 or c < 0 or a >= depth or b >= height or c >= width:
                        continue
                    there = (a * height + b) * width + c
                    if done[there] or not np.isfinite(cost[there]):
                        continue
                    way = spacing * np.sqrt(float(dk * dk + dj * dj + di * di))
                    new = value + way * 0.5 * (cost[here] + cost[there])
                    if new < total[there]:
                        total[there] = new
                        back[there] = here
                        heapq.heappush(heap, (new, np.int64(there)))
    return total, back


@njit(cache=True)
def _trace(targets, total, back, node_of, reach, cost, base, spacing):  # type: ignore[no-untyped-def]
    """Walk back from each target to the tree; marks the new voxels in ``node_of`` and ``reach``."""
    voxels = []
    parents = []
    path = []
    for target in targets:
        if not np.isfinite(total[target]):
            continue
        path.clear()
        here = target
        while here >= 0 and node_of[here] < 0:
            path.append(here)
            here = back[here]
        if here < 0:
            continue
        node = node_of[here]
        for step in range(len(path) - 1, -1, -1):
            voxel = path[step]
            # the next round may start anywhere on the tree, at a third of what the way through the tree costs
            reach[voxel] = 0.35 * total[voxel]
            voxels.append(voxel)
            parents.append(node)
            node = base + len(voxels) - 1
            node_of[voxel] = node
    return np.array(voxels, dtype=np.int64), np.array(parents, dtype=np.int64)


# --- both ------------------------------------------------------------------------------------------------------------


@njit(cache=True)
def subtree_codes(parent, leaf_code):  # type: ignore[no-untyped-def]
    """Code of each node: that of all leaves below it, 0 where they differ."""
    code = leaf_code.copy()
    seen = np.zeros(len(parent), np.bool_)
    for n in range(len(parent)):
        if parent[n] >= 0:
            seen[parent[n]] = True
    set_ = ~seen
    for n in range(len(parent) - 1, -1, -1):
        p = parent[n]
        if p < 0:
            continue
        if not set_[p]:
            code[p] = code[n]
            set_[p] = True
        elif code[p] != code[n]:
            code[p] = 0
    return code


def push_apart(
    tree: Tree,
    radius: np.ndarray,
    others: np.ndarray,
    other_radius: np.ndarray,
    lobes: VoxelMap,
    gap: float = 0.4,
    rounds: int = 4,
    strength: float = 0.7,
) -> None:
    """Move nodes out of the capsules of another tree, not out of their lobe, and smooth a little.

    Args:
        others: (M, 3) nodes of the other trees, dense enough to stand for their pieces.
        gap: mm of tissue left between.
    """
    finder = cKDTree(others)
    home = lobes.at(tree.points)
    fixed = tree.parent < 0
    for number in range(rounds):
        distance, near = finder.query(tree.points, k=6)
        overlap = radius[:, None] + other_radius[near] + gap - distance
        away = (tree.points[:, None] - others[near]) / np.maximum(distance, 0.05)[..., None]
        push = (away * np.maximum(overlap, 0)[..., None]).sum(1)
        size = np.linalg.norm(push, axis=1)
        hit = (size > 0.02) & ~fixed
        if not hit.any():
            break
        limit = np.maximum(overlap.max(1), 0) / np.maximum(size, 1e-6)
        move = strength * push * limit[:, None] * hit[:, None]
        move *= np.minimum(1.0, 2.0 / np.maximum(np.linalg.norm(move, axis=1, keepdims=True), 1e-6))
        moved = tree.points + move
        if number < rounds - 1:
            moved = smooth_nodes(moved, tree.parent, 1, fixed, weight=0.3)
        leaves = (home > 0) & (lobes.at(moved) != home)
        tree.points = np.where(leaves[:, None], tree.points, moved)
    # what is pushed from several sides gets knots, which show on thick vessels
    tree.points = smooth_nodes(tree.points, tree.parent, 4, fixed | (radius < 2.5))
