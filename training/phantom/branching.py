"""Branch-level construction of trees: a list of branches, volume filling of point clouds, smooth centerlines, radii.

Volume filling follows Tawhai et al. 2004 (J Appl Physiol 97:2310): the point cloud that a tip supplies is cut in two
through its centroid, a branch grows 40 % of the way to the centroid of each half, under an angle limit, until a cloud
is used up. Differences: a cut is across the cloud's widest extent (which turns the branching plane by itself) and its
share is random, which gives the asymmetry of real airways (Raabe 1976).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit

__all__ = [
    "Branches",
    "FillRule",
    "Nodes",
    "VoxelMap",
    "accumulate",
    "branch_flow",
    "expand",
    "fill_cloud",
    "generations",
    "lookup",
    "smooth_nodes",
    "tangents",
    "to_nodes",
    "unit",
]


def unit(vector: np.ndarray) -> np.ndarray:
    """Unit vectors along the last axis; zero stays zero."""
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-9)


@dataclass(frozen=True)
class VoxelMap:
    """A label array [k, j, i] with its world frame (isotropic, identity direction).

    Attributes:
        array: labels or booleans.
        spacing: mm.
        origin: (x, y, z) LPS mm of voxel 0.
    """

    array: np.ndarray
    spacing: float
    origin: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """Values at (N, 3) world points, 0 outside the array."""
        return lookup(self.array, np.ascontiguousarray(points, dtype=np.float64), self.spacing, self.origin)

    def world(self, indices: np.ndarray) -> np.ndarray:
        """World points of (N, 3) voxel indices (k, j, i)."""
        return self.origin + self.spacing * indices[:, ::-1]


@njit(cache=True)
def _value(array, x, y, z, spacing, origin):  # type: ignore[no-untyped-def]
    i = int(np.floor((x - origin[0]) / spacing + 0.5))
    j = int(np.floor((y - origin[1]) / spacing + 0.5))
    k = int(np.floor((z - origin[2]) / spacing + 0.5))
    if i < 0 or j < 0 or k < 0 or k >= array.shape[0] or j >= array.shape[1] or i >= array.shape[2]:
        return array.dtype.type(0)
    return array[k, j, i]


@njit(cache=True)
def lookup(array, points, spacing, origin):  # type: ignore[no-untyped-def]
    """Nearest-voxel values of ``array`` [k, j, i] at (N, 3) world points; 0 outside."""
    result = np.zeros(len(points), array.dtype)
    for n in range(len(points)):
        result[n] = _value(array, points[n, 0], points[n, 1], points[n, 2], spacing, origin)
    return result


@dataclass(frozen=True)
class FillRule:
    """Parameters of volume filling.

    Attributes:
        fraction: branch length as a share of the distance from the tip to the centroid of its cloud.
        max_angle: degrees between parent and child.
        min_length: mm; a shorter branch is made this long if its cloud allows.
        split: smallest share of the cloud that the minor child gets.
        reach: how far a terminal branch goes to its last point, 0-1.
        constructive: another rule instead: points are joined one by one, each to the branch where it costs least
            (as in constrained constructive optimization, Schreiner 1993); only ``reach`` applies to it.
    """

    fraction: float = 0.4
    max_angle: float = 60.0
    min_length: float = 2.0
    split: float = 0.3
    reach: float = 0.92
    constructive: bool = False


def fill_cloud(
    cloud: np.ndarray,
    tip: np.ndarray,
    direction: np.ndarray,
    territory: VoxelMap,
    outer: VoxelMap,
    code: int,
    rule: FillRule,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Grow a tree from ``tip`` into the (N, 3) points of ``cloud``, staying where ``territory`` is ``code``.

    Where it cannot, it stays in one code of ``outer`` (on the same grid).

    Returns:
        (ends (M, 3), parents (M,)): branch ends and the index of each parent branch, -1 for the tip itself;
        parents come first.
    """
    if rule.constructive:
        return _construct_tree(
            np.asarray(cloud, float), np.asarray(tip, float), territory, outer, code, rule.reach, seed
        )
    ends, parents = _fill(
        np.ascontiguousarray(cloud, dtype=np.float64),
        np.asarray(tip, dtype=np.float64),
        np.asarray(direction, dtype=np.float64),
        territory.array,
        outer.array,
        territory.spacing,
        territory.origin,
        code,
        rule.fraction,
        np.cos(np.deg2rad(rule.max_angle)),
        rule.min_length,
        rule.split,
        rule.reach,
        seed,
    )
    return ends, parents


@njit(cache=True)
def _fill(
    cloud, tip, direction, territory, outer, spacing, origin, code, fraction, cos_limit, min_length, split, reach, seed
):  # type: ignore[no-untyped-def]
    np.random.seed(seed)
    size = len(cloud)
    ends = np.empty((4 * size + 8, 3))
    parents = np.empty(4 * size + 8, np.int64)
    count = 0
    stack = [(0, size, -1)]
    directions = np.empty((4 * size + 8, 3))
    while len(stack) > 0:
        low, high, parent = stack.pop()
        start = tip if parent < 0 else ends[parent]
        heading = direction if parent < 0 else directions[parent]
        middle = _split(cloud, low, high, start, split)
        for part in range(2):
            a, b = (low, middle) if part == 0 else (middle, high)
            if b <= a:
                continue
            end, ok = _branch(
                cloud,
                a,
                b,
                start,
                heading,
                territory,
                outer,
                spacing,
                origin,
                code,
                fraction,
                cos_limit,
                min_length,
                reach,
            )
            if not ok:
                continue
            ends[count] = end
            step = end - start
            directions[count] = step / np.sqrt((step * step).sum())
            parents[count] = parent
            if b - a > 1:
                stack.append((a, b, count))
            count += 1
    return ends[:count].copy(), parents[:count].copy()


@njit(cache=True)
def _split(cloud, low, high, start, split):  # type: ignore[no-untyped-def]
    """Order cloud[low:high] so that a cut across its widest extent (seen from ``start``) lies at the returned index."""
    size = high - low
    if size < 2:
        return high
    center = np.zeros(3)
    for n in range(low, high):
        center += cloud[n]
    center /= size
    axis = center - start
    length = np.sqrt((axis * axis).sum()) + 1e-9
    axis /= length
    covariance = np.zeros((3, 3))
    for n in range(low, high):
        offset = cloud[n] - center
        offset -= (offset * axis).sum() * axis
        for p in range(3):
            for q in range(3):
                covariance[p, q] += offset[p] * offset[q]
    normal = np.random.normal(0.0, 1.0, 3)
    normal -= (normal * axis).sum() * axis
    for _ in range(6):  # power iteration; a few rounds leave the random tilt that real planes have
        normal = covariance @ normal
        normal /= np.sqrt((normal * normal).sum()) + 1e-12
    projection = np.empty(size)
    for n in range(size):
        projection[n] = ((cloud[low + n] - center) * normal).sum()
    order = np.argsort(projection)
    ordered = cloud[low:high][order].copy()
    cloud[low:high] = ordered
    share = np.random.uniform(split, 1.0 - split)
    return low + min(max(int(np.round(share * size)), 1), size - 1)


@njit(cache=True)
def _free(start, end, territory, outer, spacing, origin, code):  # type: ignore[no-untyped-def]
    """How good a straight branch is: 2 inside its territory, 1 inside the same outer region, 0 neither."""
    home = _value(outer, end[0], end[1], end[2], spacing, origin)
    if home == 0:
        return 0
    result = 2 if _value(territory, end[0], end[1], end[2], spacing, origin) == code else 1
    entered = _value(outer, start[0], start[1], start[2], spacing, origin) == home
    steps = int(np.sqrt(((end - start) ** 2).sum()) / (1.5 * spacing)) + 2
    for step in range(1, steps):
        point = start + (step / steps) * (end - start)
        here = _value(outer, point[0], point[1], point[2], spacing, origin)
        if here == home:
            entered = True
        elif entered:  # a branch may come in from the hilum but not leave again
            return 0
    return result


@njit(cache=True)
def _branch(
    cloud, low, high, start, heading, territory, outer, spacing, origin, code, fraction, cos_limit, min_length, reach
):  # type: ignore[no-untyped-def]
    """End of the branch from ``start`` toward the centroid of cloud[low:high], and whether there is one.

    Where the straight way leaves the territory (concave shapes, thin recesses) it is tried toward points of the cloud,
    and at last through the rest of the lobe.
    """
    center = np.zeros(3)
    for n in range(low, high):
        center += cloud[n]
    center /= high - low
    share = reach if high - low == 1 else fraction * np.random.uniform(0.75, 1.25)
    spare = start.copy()
    for attempt in range(8):
        goal = center if attempt == 0 else cloud[np.random.randint(low, high)]
        way = goal - start
        distance = np.sqrt((way * way).sum())
        if distance < 1.0:
            continue
        way /= distance
        along = (way * heading).sum()
        if along < cos_limit and (heading * heading).sum() > 0.5 and attempt < 4:
            aside = way - along * heading
            norm = np.sqrt((aside * aside).sum())
            if norm > 1e-6:
                aside /= norm
                way = cos_limit * heading + np.sqrt(1.0 - cos_limit * cos_limit) * aside
        length = max(distance * share, min(min_length, 0.9 * distance))
        for _ in range(3):
            end = start + length * way
            quality = _free(start, end, territory, outer, spacing, origin, code)
            if quality == 2:
                return end, True
            if quality == 1 and (spare == start).all():
                spare = end
            length *= 0.7
    return spare, not (spare == start).all()


def _construct_tree(
    cloud: np.ndarray, tip: np.ndarray, territory: VoxelMap, outer: VoxelMap, code: int, reach: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """``fill_cloud`` by ``_construct``, branches sorted so that parents come first."""
    order = np.random.default_rng(seed).permutation(len(cloud))
    ends, parents = _construct(
        np.ascontiguousarray(cloud[order]),
        tip,
        territory.array,
        outer.array,
        territory.spacing,
        territory.origin,
        code,
        reach,
    )
    depth = _depth(parents)
    rank = np.argsort(depth, kind="stable")
    number = np.empty(len(rank), dtype=np.int64)
    number[rank] = np.arange(len(rank))
    up = parents[rank]
    return ends[rank], np.where(up >= 0, number[np.maximum(up, 0)], -1)


@njit(cache=True)
def _depth(parents):  # type: ignore[no-untyped-def]
    """Number of branches above each; parents in any order."""
    depth = np.zeros(len(parents), np.int64)
    for n in range(len(parents)):
        here = parents[n]
        while here >= 0:
            depth[n] += 1
            here = parents[here]
    return depth


@njit(cache=True)
def _construct(cloud, tip, territory, outer, spacing, origin, code, reach):  # type: ignore[no-untyped-def]
    """Join each point to the branch where the new length, and a share of the way from the root, is least."""
    size = 2 * len(cloud) + 2
    ends = np.empty((size, 3))
    starts = np.empty((size, 3))
    parents = np.empty(size, np.int64)
    way = np.empty(size)  # from the root to the start of the branch
    count = 0
    for n in range(len(cloud)):
        best, best_cost, best_meet = -1, 1e30, tip
        for b in range(count):
            axis = ends[b] - starts[b]
            length = np.sqrt((axis * axis).sum())
            for share in (0.3, 0.6, 0.9):
                foot = starts[b] + share * axis
                meet = foot + 0.2 * (cloud[n] - foot)
                first = np.sqrt(((meet - starts[b]) ** 2).sum())
                last = np.sqrt(((ends[b] - meet) ** 2).sum())
                side = np.sqrt(((cloud[n] - meet) ** 2).sum())
                cost = first + last + side - length + 0.25 * (way[b] + first + side)
                if cost < best_cost and _free(meet, cloud[n], territory, outer, spacing, origin, code) > 0:
                    best, best_cost, best_meet = b, cost, meet
        goal = cloud[n]
        if best < 0:
            if _free(tip, goal, territory, outer, spacing, origin, code) == 0:
                continue
            starts[count], ends[count], parents[count], way[count] = tip, tip + reach * (goal - tip), -1, 0.0
            count += 1
            continue
        middle = count  # the lower half of the branch becomes a new one, so that the upper keeps its number
        starts[middle], ends[middle], parents[middle] = best_meet, ends[best], best
        for b in range(count):
            if parents[b] == best:
                parents[b] = middle
        ends[best] = best_meet
        way[middle] = way[best] + np.sqrt(((best_meet - starts[best]) ** 2).sum())
        starts[middle + 1], parents[middle + 1], way[middle + 1] = best_meet, best, way[middle]
        ends[middle + 1] = best_meet + reach * (goal - best_meet)
        count += 2
    return ends[:count].copy(), parents[:count].copy()


@dataclass
class Branches:
    """A tree under construction, one entry per branch; parents come first.

    Attributes:
        root: (3,) start of the first branch.
        end: branch ends.
        parent: parent branch, -1 at the root.
        segment: segment code, 0 central.
        generation: 0 at the root.
        name: anatomical name of a central or segmental branch, else "".
    """

    root: np.ndarray
    end: list[np.ndarray] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    generation: list[int] = field(default_factory=list)
    name: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.end)

    def add(self, parent: int, end: np.ndarray, name: str = "", segment: int = 0, generation: int | None = None) -> int:
        """Append a branch and return its index."""
        if generation is None:
            generation = 0 if parent < 0 else self.generation[parent] + 1
        self.end.append(np.asarray(end, dtype=np.float64))
        self.parent.append(parent)
        self.segment.append(segment)
        self.generation.append(generation)
        self.name.append(name)
        return len(self.end) - 1

    def extend(self, tip: int, ends: np.ndarray, parents: np.ndarray, segment: int) -> None:
        """Append what ``fill_cloud`` grew from branch ``tip``."""
        base = len(self)
        for end, parent in zip(ends, parents, strict=True):
            self.add(tip if parent < 0 else base + int(parent), end, "", segment)

    def start_of(self, branch: int) -> np.ndarray:
        return self.root if self.parent[branch] < 0 else self.end[self.parent[branch]]

    def direction(self, branch: int) -> np.ndarray:
        return unit(self.end[branch] - self.start_of(branch))

    def index(self, name: str) -> int:
        """Index of the branch of a name; ValueError if there is none."""
        return self.name.index(name)


def branch_flow(parent: np.ndarray, volume: np.ndarray | None = None) -> np.ndarray:
    """Number (or volume) of terminals that each branch supplies."""
    leaf = np.ones(len(parent), dtype=bool)
    leaf[parent[parent >= 0]] = False
    own = leaf.astype(np.float64) if volume is None else volume.astype(np.float64)
    return accumulate(parent, own)


@njit(cache=True)
def accumulate(parent, own):  # type: ignore[no-untyped-def]
    """Sum of ``own`` over each node's subtree (parents come first)."""
    total = own.copy()
    for n in range(len(parent) - 1, -1, -1):
        if parent[n] >= 0:
            total[parent[n]] += total[n]
    return total


@dataclass
class Nodes:
    """Centerline nodes of ``Branches``.

    Attributes:
        points: (N, 3) LPS mm; node 0 is the root.
        parent: (N,) node index, -1 at the root.
        branch: (N,) branch of each node; the root node has branch 0.
        along: (N,) position along its branch, 0-1.
        last: (B,) last node of each branch.
    """

    points: np.ndarray
    parent: np.ndarray
    branch: np.ndarray
    along: np.ndarray
    last: np.ndarray


def expand(
    parent: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    max_piece: float,
    rng: np.random.Generator,
    bow: float = 0.05,
) -> Nodes:
    """Smooth centerlines: Hermite curves that leave the parent half in its direction, slightly bowed.

    Args:
        parent: (B,) parent branch, -1 at a root; parents come first.
        start, end: (B, 3) ends of the branches.
        max_piece: longest piece in mm.
        bow: sideways excursion as a share of the branch length.

    Returns:
        Nodes without root nodes; a branch's first node has parent -1 where the branch is a root.
    """
    length = np.linalg.norm(end - start, axis=1)
    own = unit(end - start)
    before = np.where(parent[:, None] >= 0, own[parent], own)
    leave = unit(own + 0.6 * before)
    side = unit(np.cross(own, rng.normal(size=own.shape))) * (bow * length * rng.normal(size=len(own)))[:, None]
    count = np.maximum(np.ceil(length / max_piece).astype(int), 1)
    branch = np.repeat(np.arange(len(parent)), count)
    first = np.concatenate([[0], np.cumsum(count)[:-1]]).astype(int)
    step = np.arange(len(branch)) - first[branch] + 1
    t = (step / count[branch])[:, None]
    p0, p1, m0, m1 = (
        start[branch],
        end[branch],
        leave[branch] * length[branch, None],
        own[branch] * length[branch, None],
    )
    points = (2 * t**3 - 3 * t**2 + 1) * p0 + (t**3 - 2 * t**2 + t) * m0
    points += (3 * t**2 - 2 * t**3) * p1 + (t**3 - t**2) * m1 + np.sin(np.pi * t) ** 2 * side[branch]
    last = first + count - 1
    node_parent = np.arange(len(branch)) - 1
    starts = step == 1
    node_parent[starts] = np.where(parent >= 0, last[parent], -1)
    return Nodes(points, node_parent, branch, t[:, 0], last)


def to_nodes(branches: Branches, max_piece: float, rng: np.random.Generator, bow: float = 0.05) -> Nodes:
    """Nodes of ``branches``; node 0 is the root, see ``expand``."""
    parent, end = np.array(branches.parent), np.array(branches.end)
    start = np.where(parent[:, None] >= 0, end[parent], branches.root)
    nodes = expand(parent, start, end, max_piece, rng, bow)
    return Nodes(
        np.concatenate([branches.root[None], nodes.points]),
        np.concatenate([[-1], nodes.parent + 1]),
        np.concatenate([[0], nodes.branch]),
        np.concatenate([[0.0], nodes.along]),
        nodes.last + 1,
    )


def smooth_nodes(
    points: np.ndarray, parent: np.ndarray, rounds: int, fixed: np.ndarray, weight: float = 0.5
) -> np.ndarray:
    """Laplacian smoothing along a tree: each node moves toward the mean of its parent and its children's mean.

    Args:
        fixed: (N,) bool, nodes that stay; roots and leaves stay anyway.
    """
    points = points.copy()
    has = parent >= 0
    children = np.bincount(parent[has], minlength=len(points))
    free = has & (children > 0) & ~fixed
    for _ in range(rounds):
        total = np.stack([np.bincount(parent[has], points[has, d], minlength=len(points)) for d in range(3)], axis=1)
        mean = total / np.maximum(children, 1)[:, None]
        goal = 0.5 * (points[parent] + mean)
        points[free] += weight * (goal - points)[free]
    return points


def tangents(points: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """(N, 3) unit direction of the piece that ends at each node; a root takes that of its first child."""
    step = points - points[np.maximum(parent, 0)]
    for root in np.flatnonzero(parent < 0):
        child = np.flatnonzero(parent == root)
        step[root] = points[child[0]] - points[root] if len(child) else (0, 0, 1)
    return unit(step)


@njit(cache=True)
def generations(parent):  # type: ignore[no-untyped-def]
    """0 at a root, +1 after each node with more than one child."""
    children = np.zeros(len(parent), np.int64)
    for p in parent:
        if p >= 0:
            children[p] += 1
    result = np.zeros(len(parent), np.int64)
    for n in range(len(parent)):
        if parent[n] >= 0:
            result[n] = result[parent[n]] + (1 if children[parent[n]] > 1 else 0)
    return result
