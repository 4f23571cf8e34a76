"""Repair of tree masks: gaps linked, islands dropped, leaks cut off.

Gap proposals come from the skeleton's free ends and are judged by geometry and by the probability along the way, the
idea of RepAir (arXiv 2511.14649) with a hand-made cost instead of a learned classifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.graph import MCP_Geometric

from LCTfoundLib.anatomy.graph import Branches, TreeGraph
from LCTfoundLib.anatomy.masks import (
    CORNERS,
    Spacing,
    component_sizes,
    paint_tube,
)
from LCTfoundLib.anatomy.skeleton import SkeletonRule, airway_root, nearest_nodes, skeleton_graph
from LCTfoundLib.volume import Volume

__all__ = [
    "AirwayTree",
    "Leak",
    "Link",
    "LinkRule",
    "cap_radii",
    "drop_islands",
    "hysteresis",
    "link_gaps",
    "remove_leaks",
    "repair_airway",
]

#: A ball inscribed in a bifurcation may be wider than its branches by this factor.
_BIFURCATION = 1.35
#: Probabilities below this tell no more about a gap.
_FLOOR = 0.02


#: Branches that begin this near to the root belong to the trachea.
_TRACHEA_TOP_MM = 40.0
#: Share of the airway that must remain after leaks are removed.
_MOST_LEAK = 0.6


@dataclass(frozen=True)
class LinkRule:
    """When two pieces of a tree belong together; the cost is a sum of terms that are each about 0..1.

    Attributes:
        reach_mm: longest gap.
        direction_mm: how much of a branch tells its direction.
        gap, angle, ratio, evidence, side: weights of gap / reach, of 1 - cosine at each end, of the logarithm of the
            radius ratio, of missing probability along the way, and of joining a branch from the side.
        most: largest accepted cost.
    """

    reach_mm: float = 15.0
    direction_mm: float = 8.0
    gap: float = 0.45
    angle: float = 0.5
    ratio: float = 0.25
    evidence: float = 0.45
    side: float = 0.1
    most: float = 0.8


@dataclass(frozen=True)
class Link:
    """A repaired gap: the painted way from a free end to another piece.

    Attributes:
        points: (P, 3) LPS mm.
        radius: (P,) mm.
        cost: see ``LinkRule``; lower is safer.
        probability: mean probability along the gap.
    """

    points: np.ndarray
    radius: np.ndarray
    cost: float
    probability: float


@dataclass(frozen=True)
class Leak:
    """A place where the mask left the airway.

    Attributes:
        point: LPS mm.
        radius, parent_radius: mm, the widest before the repair, and the parent's.
        removed_ml: what was cut off.
    """

    point: np.ndarray
    radius: float
    parent_radius: float
    removed_ml: float


@dataclass
class AirwayTree:
    """A repaired airway: one component that begins at the trachea.

    Attributes:
        mask: bool lumen.
        graph: its centerline tree, radii without jumps, unlabeled; confidence = probability along each branch.
        links, leaks: what was repaired.
        dropped_ml: volume of islands left out.
    """

    mask: Volume
    graph: TreeGraph
    links: list[Link] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    dropped_ml: float = 0.0


# -- masks -----------------------------------------------------------------------------------------------------------


def hysteresis(probability: np.ndarray, low: float, high: float, smallest: int = 1) -> np.ndarray:
    """Voxels above ``low`` in components (26) of at least ``smallest`` voxels that somewhere reach ``high``."""
    weak = probability > low
    labels, count = ndimage.label(weak, CORNERS)
    keep = np.zeros(count + 1, dtype=bool)
    keep[labels[probability > high]] = True
    keep &= component_sizes(labels) >= smallest
    keep[0] = False
    return keep[labels]


def drop_islands(
    mask: np.ndarray, spacing: Spacing, large_ml: float = 0.3, tiny_ml: float = 0.01, near_mm: float = 10.0
) -> np.ndarray:
    """Remove components smaller than ``tiny_ml``, and those smaller than ``large_ml`` far from every large one.

    The largest component always stays.
    """
    labels, count = ndimage.label(mask, CORNERS)
    if count < 2:
        return np.array(mask, dtype=bool)
    ml = component_sizes(labels) * float(np.prod(spacing)) / 1000
    large = ml >= min(large_ml, ml.max())
    index = np.argwhere(labels)
    points, owner = index * np.array(spacing[::-1]), labels[tuple(index.T)]
    others = ~large[owner]
    distance, _ = cKDTree(points[~others]).query(points[others], distance_upper_bound=near_mm)
    near = np.zeros(count + 1, dtype=bool)
    near[owner[others][np.isfinite(distance)]] = True
    keep = large | (near & (ml >= tiny_ml))
    keep[0] = False
    return keep[labels]


# -- the airway ------------------------------------------------------------------------------------------------------


def repair_airway(
    probability: Volume, low: float = 0.35, high: float = 0.6, link_rule: LinkRule | None = None
) -> AirwayTree:
    """From airway probabilities to one clean tree: hysteresis, linked gaps, trachea's component, no leaks.

    Args:
        probability: float 0..1 on a canonical grid.
        low, high: hysteresis thresholds.
        link_rule: which gaps to close.

    Returns:
        An ``AirwayTree``; empty where nothing reaches ``high``.
    """
    probability = probability.with_array(probability.array.astype(np.float32, copy=False))
    found = probability.with_array(hysteresis(probability.array, low, high))
    if not found.array.any():
        return AirwayTree(found, TreeGraph.empty())
    joined, links = link_gaps(found, probability.array, link_rule)
    root = airway_root(probability.with_array(joined))
    assert root is not None  # the mask is not empty
    tree, dropped = _component_at(joined, root, probability)
    cleaned, leaks = remove_leaks(probability.with_array(tree), root)
    if cleaned.sum() < _MOST_LEAK * tree.sum():
        # So much is no leak but a misread tree; it stays, and the quality checks speak of it.
        cleaned, leaks = tree, []
    tree = cleaned
    mask = probability.with_array(_component_at(tree, root, probability)[0])
    graph = cap_radii(skeleton_graph(mask, root))
    graph.confidence = branch_means(graph, probability)
    kept = [link for link in links if _holds(mask, link.points)]
    return AirwayTree(mask, graph, kept, leaks, dropped * probability.voxel_ml)


def _component_at(mask: np.ndarray, root: np.ndarray, grid: Volume) -> tuple[np.ndarray, int]:
    """The component nearest to the root, and how many voxels lie in others."""
    labels, count = ndimage.label(mask, CORNERS)
    if count < 2:
        return mask, 0
    index = np.argwhere(labels)
    nearest = index[np.linalg.norm(grid.world_from_index(index) - root, axis=1).argmin()]
    tree = labels == labels[tuple(nearest)]
    return tree, int(np.count_nonzero(mask) - np.count_nonzero(tree))


def _holds(mask: Volume, points: np.ndarray) -> bool:
    index = np.rint(mask.index_from_world(points)).astype(int)
    return bool(mask.array[tuple(np.clip(index, 0, np.array(mask.array.shape) - 1).T)].mean() > 0.5)


def branch_means(graph: TreeGraph, probability: Volume) -> np.ndarray:
    """(N,) mean of a volume along the branch of each node."""
    if not len(graph):
        return np.zeros(0)
    of_node = graph.branches().of_node
    values = ndimage.map_coordinates(
        probability.array, probability.index_from_world(graph.points).T, order=1, mode="nearest"
    )
    return (np.bincount(of_node, weights=values) / np.bincount(of_node))[of_node]


# -- gaps ------------------------------------------------------------------------------------------------------------


@dataclass
class _Ends:
    """Free ends of a forest: node, outward unit direction (0 where unknown), radius, component."""

    node: np.ndarray
    direction: np.ndarray
    radius: np.ndarray
    component: np.ndarray


@dataclass(frozen=True)
class _Proposal:
    cost: float
    end: int
    node: int
    first: int
    second: int


def link_gaps(
    mask: Volume,
    probability: np.ndarray | None = None,
    rule: LinkRule | None = None,
    root: np.ndarray | None = None,
) -> tuple[np.ndarray, list[Link]]:
    """Join the pieces of a tree mask over plausible gaps.

    Free ends look for another piece in reach; a proposal costs by gap, direction, radius and the probability along the
    minimum-cost way, and the cheapest proposals join pieces first (no loops arise).

    Args:
        mask: bool on a canonical grid.
        probability: [k, j, i] of the same tree; None: geometry alone decides.
        rule: weights and limits.
        root: LPS mm where the main tree begins.

    Returns:
        The joined mask (bool, a copy) and the links.
    """
    rule = rule or LinkRule()
    joined = np.array(mask.array, dtype=bool)
    graph = skeleton_graph(mask, root, SkeletonRule(spur_voxels=1.0))
    if not len(graph) or (graph.parent < 0).sum() < 2:
        return joined, []
    component = np.unique(graph.roots(), return_inverse=True)[1]
    ends = _free_ends(graph, component, rule.direction_mm)
    links: list[Link] = []
    group = np.arange(int(component.max()) + 1)
    for proposal in sorted(_proposals(graph, component, ends, rule, mask, probability), key=lambda p: p.cost):
        first, second = group[proposal.first], group[proposal.second]
        if first == second:
            continue
        link = _way(graph, ends, proposal, mask, probability)
        paint_tube(joined, link.points, np.maximum(link.radius, 0.5 * min(mask.spacing)), mask)
        links.append(link)
        group[group == second] = first
    return joined, links


def _free_ends(graph: TreeGraph, component: np.ndarray, direction_mm: float) -> _Ends:
    counts = graph.child_counts()
    leaf = np.flatnonzero(counts == 0)
    start = np.flatnonzero((graph.parent < 0) & (counts == 1))
    children = graph.children()
    nodes, directions, radii = [], [], []
    for node, step in [*((n, "up") for n in leaf), *((n, "down") for n in start)]:
        chain = [int(node)]
        while np.linalg.norm(graph.points[chain[-1]] - graph.points[node]) < direction_mm:
            if step == "up":
                following = int(graph.parent[chain[-1]])
            else:
                following = children[chain[-1]][0] if counts[chain[-1]] == 1 else -1
            if following < 0:
                break
            chain.append(following)
        away = graph.points[node] - graph.points[chain[-1]]
        length = float(np.linalg.norm(away))
        radius = float(np.median(graph.radius[chain]))
        nodes.append(int(node))
        directions.append(away / length if length > 1.5 * radius else np.zeros(3))
        radii.append(radius)
    found = np.array(nodes, dtype=int)
    return _Ends(found, np.array(directions).reshape(-1, 3), np.array(radii), component[found])


def _proposals(
    graph: TreeGraph,
    component: np.ndarray,
    ends: _Ends,
    rule: LinkRule,
    mask: Volume,
    probability: np.ndarray | None,
) -> Iterator[_Proposal]:
    """Accepted proposals with their full cost."""
    search = cKDTree(graph.points)
    end_of_node = np.full(len(graph), -1)
    end_of_node[ends.node] = np.arange(len(ends.node))
    for end, node in enumerate(ends.node):
        near = np.array(search.query_ball_point(graph.points[node], rule.reach_mm + 3 * ends.radius[end]), dtype=int)
        near = near[component[near] != component[node]]
        if not len(near):
            continue
        cost, gap = _geometric_cost(graph, ends, end, near, end_of_node, rule)
        for other in _best_per_component(component[near], cost, rule.most):
            proposal = _Proposal(cost[other], end, int(near[other]), int(component[node]), int(component[near[other]]))
            evidence = _missing_evidence(graph, ends, proposal, mask, probability)
            full = cost[other] + rule.evidence * evidence * gap[other] / (gap[other] + 3.0)
            if full <= rule.most:
                yield _Proposal(float(full), end, proposal.node, proposal.first, proposal.second)


def _geometric_cost(
    graph: TreeGraph, ends: _Ends, end: int, near: np.ndarray, end_of_node: np.ndarray, rule: LinkRule
) -> tuple[np.ndarray, np.ndarray]:
    """Cost without evidence, and gap in mm, from one free end to each of some nodes."""
    node, radius = ends.node[end], ends.radius[end]
    away = graph.points[near] - graph.points[node]
    distance = np.linalg.norm(away, axis=1)
    unit = away / np.maximum(distance, 1e-9)[:, None]
    facing = end_of_node[near]
    other_radius = np.where(facing >= 0, ends.radius[facing], graph.radius[near])
    # Free ends lie at the end of their tube; a side is reached at its surface.
    gap = np.maximum(distance - np.where(facing >= 0, 0.0, other_radius), 0.0)
    known = np.abs(ends.direction[end]).sum() > 0
    first = 1 - unit @ ends.direction[end] if known else np.full(len(near), 0.5)
    opposite = -(unit * ends.direction[facing]).sum(axis=1)
    other_known = (facing >= 0) & (np.abs(ends.direction[facing]).sum(axis=1) > 0)
    second = np.where(other_known, 1 - opposite, 0.3)
    ratio = np.abs(np.log(radius / other_radius))
    # A thick parent may carry a thin branch at its side.
    ratio = np.where((facing < 0) & (other_radius > radius), 0.0, ratio)
    weight = gap / (gap + 2.0)  # directions say little over a gap of a voxel or two
    cost = rule.gap * gap / rule.reach_mm + rule.angle * weight * (first + second) + rule.ratio * ratio
    cost = cost + np.where(facing < 0, rule.side, 0.0)
    return np.where(gap <= rule.reach_mm, cost, np.inf), gap


def _best_per_component(component: np.ndarray, cost: np.ndarray, most: float, count: int = 2) -> list[int]:
    """Places of the cheapest nodes, at most ``count`` of each component."""
    chosen: list[int] = []
    taken: dict[int, int] = {}
    for place in np.argsort(cost):
        if cost[place] > most:
            break
        key = int(component[place])
        if taken.get(key, 0) < count:
            taken[key] = taken.get(key, 0) + 1
            chosen.append(int(place))
    return chosen


def _missing_evidence(
    graph: TreeGraph, ends: _Ends, proposal: _Proposal, mask: Volume, probability: np.ndarray | None
) -> float:
    """0 where the way has probability 1, 1 where it has none; 0.5 when no probability is known."""
    if probability is None:
        return 0.5
    value = _way(graph, ends, proposal, mask, probability).probability
    return float(np.log(max(value, _FLOOR)) / np.log(_FLOOR))


def _way(graph: TreeGraph, ends: _Ends, proposal: _Proposal, mask: Volume, probability: np.ndarray | None) -> Link:
    """The minimum-cost way from a free end to a node, through -log probability."""
    start, end = graph.points[ends.node[proposal.end]], graph.points[proposal.node]
    corners = np.rint(mask.index_from_world(np.array([start, end]))).astype(int)
    corners = np.clip(corners, 0, np.array(mask.array.shape) - 1)
    low = np.maximum(corners.min(axis=0) - 4, 0)
    box = tuple(slice(a, b) for a, b in zip(low, corners.max(axis=0) + 5, strict=True))
    inside = mask.array[box] > 0
    values = np.where(inside, 1.0, probability[box] if probability is not None else 0.5)
    search = MCP_Geometric(0.3 - np.log(np.maximum(values, _FLOOR)), sampling=mask.spacing[::-1])
    search.find_costs([tuple(corners[0] - low)], [tuple(corners[1] - low)])
    voxels = np.array(search.traceback(tuple(corners[1] - low)))
    outside = ~inside[tuple(voxels.T)]
    mean = float(values[tuple(voxels.T)][outside].mean()) if outside.any() else 1.0
    points = mask.world_from_index(voxels + low)
    points[0], points[-1] = start, end
    if len(points) > 4:
        points[1:-1] = ndimage.gaussian_filter1d(points, 1.5, axis=0, mode="nearest")[1:-1]
    first, last = ends.radius[proposal.end], graph.radius[proposal.node]
    radius = np.linspace(first, min(last, 1.2 * first), len(points))
    return Link(points, radius, proposal.cost, mean)


# -- leaks -----------------------------------------------------------------------------------------------------------


def remove_leaks(
    mask: Volume, root: np.ndarray | None = None, ratio: float = 1.2, tolerance_voxels: float = 0.4
) -> tuple[np.ndarray, list[Leak]]:
    """Cut off what swells: an airway branch is no wider than its parent.

    A branch that over a stretch is wider than ``ratio`` x its parent leaks into the parenchyma; what lies farther from
    its centerline than the parent's radius is removed. Where more than half of the branch and what hangs on it would
    go, all of it goes.

    Args:
        mask: bool airway, one component.
        root: LPS mm of the top of the trachea.
        ratio: widest accepted ratio.
        tolerance_voxels: excess a thin branch may have because of its voxels.

    Returns:
        The cut mask (bool, a copy) and the leaks.
    """
    result = np.array(mask.array, dtype=bool)
    graph = skeleton_graph(mask, root)
    if not len(graph):
        return result, []
    branches = graph.branches()
    swollen = _swollen(graph, branches, ratio, tolerance_voxels * min(mask.spacing))
    if not swollen:
        return result, []
    index = np.argwhere(result)
    points = mask.world_from_index(index)
    owner = branches.of_node[nearest_nodes(graph, points)]
    leaks = []
    for branch, allowed in swollen.items():
        gone = _leaked(graph, branches, branch, allowed, ratio, points, owner)
        removed = float(result[tuple(index[gone].T)].sum() * np.prod(mask.spacing) / 1000)
        result[tuple(index[gone].T)] = False
        nodes = branches.descendants(branch)[branches.of_node]
        widest = int(np.flatnonzero(nodes)[graph.radius[nodes].argmax()])
        leaks.append(Leak(graph.points[widest], float(graph.radius[widest]), float(allowed), removed))
    return result, leaks


def _leaked(
    graph: TreeGraph,
    branches: Branches,
    branch: int,
    allowed: float,
    ratio: float,
    points: np.ndarray,
    owner: np.ndarray,
) -> np.ndarray:
    """(M,) bool: voxels to cut off for one swollen branch."""
    below = branches.descendants(branch)
    own = below[owner]
    # The blob also swells the end of the parent, where it hides the bifurcation.
    family = (below | (np.arange(len(branches)) == branches.parent[branch]))[branches.of_node]
    blown = np.flatnonzero(family & (graph.radius > ratio * allowed))
    affected = own.copy()
    if len(blown):
        distance, node = cKDTree(graph.points[blown]).query(points, distance_upper_bound=graph.radius[blown].max() + 2)
        radius = np.append(graph.radius[blown], 0.0)[node]
        affected |= distance <= radius + 1.0
    tubes = np.full(len(branches), np.inf)
    tubes[below] = allowed
    gone = affected.copy()
    gone[affected] = _outside_tubes(graph, branches, tubes, points[affected])
    return gone | own if (gone & own).sum() > 0.5 * own.sum() else gone


def _outside_tubes(graph: TreeGraph, branches: Branches, most: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(M,) bool: points outside the tubes that the branches would be without the leak.

    A branch's own radius shows in its thinner part (lower quartile); none is wider than ``most`` (B,).
    """
    own = [1.2 * float(np.percentile(graph.radius[chain], 25)) for chain in branches.nodes()]
    radius = np.minimum(np.array(own), most)[branches.of_node]
    distance, node = cKDTree(graph.points).query(points, k=min(8, len(graph)))
    node = node.reshape(len(points), -1)
    return (distance.reshape(node.shape) - radius[node]).min(axis=1) > 0


def _swollen(graph: TreeGraph, branches: Branches, ratio: float, tolerance_mm: float) -> dict[int, float]:
    """Swollen branches (the first one on each way down) and the radius allowed to them."""
    widest = _widest_stretch(graph, branches)
    result: dict[int, float] = {}
    allowed = branches.radius.copy()
    # A spur at the cut top of the trachea may be the first branch; it must not make a leak of the trachea itself.
    starts = graph.points[[nodes[0] for nodes in branches.nodes()]]
    near_root = np.linalg.norm(starts - graph.points[0], axis=1) < _TRACHEA_TOP_MM
    allowed[branches.parent < 0] = np.maximum(allowed[branches.parent < 0], branches.radius[near_root].max(initial=0.0))
    inside = np.zeros(len(branches), dtype=bool)
    for branch, parent in enumerate(branches.parent):
        if parent < 0:
            continue
        if inside[parent]:
            inside[branch] = True
            continue
        limit = allowed[parent]
        if widest[branch] > ratio * limit + tolerance_mm:
            result[branch] = float(limit)
            inside[branch] = True
        else:
            # A short noisy branch between two others must not lower what is allowed further down too much.
            allowed[branch] = min(limit, max(branches.radius[branch], 0.7 * limit))
    return result


def _widest_stretch(graph: TreeGraph, branches: Branches, stretch_mm: float = 4.0) -> np.ndarray:
    """(B,) largest of: median radius; what a branch exceeds over ``stretch_mm`` away from its bifurcations; its
    widest ball, less what a bifurcation explains."""
    ends = np.bincount(branches.parent[branches.parent >= 0], minlength=len(branches)) == 0
    lengths = graph.lengths()
    result = branches.radius.copy()
    for branch, nodes in enumerate(branches.nodes()):
        clear = np.ones(len(nodes), dtype=bool)
        above = graph.parent[nodes[0]]
        usual = branches.radius[branch]
        if above >= 0:
            usual = min(usual, branches.radius[branches.parent[branch]])
            near = 1.2 * usual
            clear &= np.linalg.norm(graph.points[nodes] - graph.points[above], axis=1) > near
        if not ends[branch]:
            near = 1.2 * usual
            clear &= np.linalg.norm(graph.points[nodes] - graph.points[nodes[-1]], axis=1) > near
        inner = nodes[clear][np.argsort(-graph.radius[nodes[clear]])]
        over = np.flatnonzero(np.cumsum(lengths[inner]) >= stretch_mm)
        if len(over):
            result[branch] = max(result[branch], graph.radius[inner[over[0]]])
        result[branch] = max(result[branch], graph.radius[nodes].max() / _BIFURCATION)
    return result


def cap_radii(graph: TreeGraph, ratio: float = 1.2) -> TreeGraph:
    """Scale down branches wider (by their median) than ``ratio`` x their parent: the voxel noise of thin ones."""
    if not len(graph):
        return graph
    branches = graph.branches()
    radius = branches.radius.copy()
    for branch, parent in enumerate(branches.parent):
        if parent >= 0:
            radius[branch] = min(radius[branch], 0.999 * ratio * radius[parent])
    scale = radius / np.maximum(branches.radius, 1e-9)
    graph.radius = graph.radius * scale[branches.of_node]
    return graph
