"""From a mask of tubes to a ``TreeGraph``: 3D thinning, a spanning tree, radii, pruned spurs, smooth centerlines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.graph import Branches, TreeGraph
from LCTfoundLib.anatomy.masks import FACES, bounding_box, coarse_grid, crop, largest_component, resample
from LCTfoundLib.anatomy.thinning import thin
from LCTfoundLib.volume import Volume

__all__ = ["SkeletonRule", "airway_root", "nearest_nodes", "prune_spurs", "skeleton_graph", "smooth_points"]

#: The 13 of the 26 neighbors that come later in scan order, so that each pair is found once.
_HALF_NEIGHBORS = np.argwhere(np.ones((3, 3, 3)))[14:] - 1


#: A skeleton lies about this many voxels off the axis, so the inscribed radius is that much too small
#: (measured on rasterized cylinders).
_OFF_AXIS = 0.25

#: A short terminal branch this much wider than where it begins (voxel steps aside) is no spur.
_WIDENS = 1.2


@dataclass(frozen=True)
class SkeletonRule:
    """How a skeleton becomes a tree.

    Attributes:
        spur_radii: a terminal branch shorter than this many radii of where it leaves its parent ...
        spur_voxels: ... plus this many voxels (of their longest side) is a spur of the thinning, not a branch.
        smooth_mm: how far the centerline is smoothed, as the sigma of a Gaussian along it; 0 leaves voxel centers.
    """

    spur_radii: float = 1.0
    spur_voxels: float = 1.5
    smooth_mm: float = 1.2


def skeleton_graph(mask: Volume, root: np.ndarray | None = None, rule: SkeletonRule | None = None) -> TreeGraph:
    """The centerline tree of each connected component of a mask.

    Loops (vessels that touch) are cut at their thinnest, longest place by a minimum
    spanning tree whose edges cost length / radius.

    Args:
        mask: bool on a canonical grid.
        root: LPS mm point where the tree of its component begins (the free end nearest to it, where one is near); the
            other components, and all when it is None, begin at their thickest free end.
        rule: pruning and smoothing.

    Returns:
        A forest, unlabeled; empty for an empty mask. The tree of ``root`` (or the largest) comes first, and node 0 is
        its root. Points are smoothed, so they are not at voxel centers.
    """
    rule = rule or SkeletonRule()
    box = bounding_box(mask.array, mask.spacing, 2 * max(mask.spacing))
    if box is None:
        return TreeGraph.empty()
    part = crop(mask, box)
    inside = np.ascontiguousarray(part.array > 0)
    index = np.argwhere(thin(inside))
    points = part.world_from_index(index)
    border = _border_tree(inside, part)
    radius = border.query(points)[0]
    edges = _spanning_edges(index, inside.shape, points, radius)
    graph = _rooted(points, radius, edges, root)
    # A spur is a few voxels in any direction, so a voxel's longest side is what counts: with the shortest one, spurs
    # across thick slices stayed (at 0.7 x 0.7 x 2.5 mm 12 false branches in a tree of 15, with the longest 0.6).
    graph = prune_spurs(graph, rule.spur_radii, rule.spur_voxels * max(mask.spacing))
    if rule.smooth_mm > 0:
        graph.points = smooth_points(graph, rule.smooth_mm)
    graph, like = _extended_to_the_ends(graph, part)
    graph.radius = _radii(graph, border, inside, part)[like]
    return graph


def airway_root(mask: Volume) -> np.ndarray | None:
    """LPS mm of the top of the trachea: the thickest free end in the upper half of the largest component.

    Not simply the highest point: where the scan begins below the apex, that is a bronchus. Works on a 2 mm grid.

    Returns:
        (3,) point; None for an empty mask.
    """
    box = bounding_box(mask.array, mask.spacing, 3.0)
    if box is None:
        return None
    part = crop(mask, box)
    grid = coarse_grid(part, 2.0)
    small = resample(part.with_array((part.array > 0).astype(np.float32)), grid) > 0.5
    graph = skeleton_graph(grid.with_array(largest_component(small if small.any() else resample(part, grid, 0) > 0)))
    if not len(graph):
        return part.world_from_index(np.argwhere(part.array)[-1])
    counts = graph.child_counts()
    ends = np.flatnonzero((counts == 0) | ((graph.parent < 0) & (counts <= 1)))
    heights = graph.points[:, 2]
    ends = ends[heights[ends] >= (heights.min() + heights.max()) / 2]
    _, near = cKDTree(graph.points).query(graph.points[ends], k=min(8, len(graph)))
    return graph.points[ends[np.median(graph.radius[near.reshape(len(ends), -1)], axis=1).argmax()]]


# -- from voxels to a rooted forest ----------------------------------------------------------------------------------


def _border_tree(mask: np.ndarray, grid: Volume) -> cKDTree:
    """The background voxels that touch the mask: their distance is the radius, at far less cost than a distance map."""
    outside = ndimage.binary_dilation(mask, FACES) & ~mask
    # At the image's edge the tube goes on; its radius there is that of its sides.
    return cKDTree(grid.world_from_index(np.argwhere(outside)) if outside.any() else np.full((1, 3), np.inf))


def _spanning_edges(
    index: np.ndarray, shape: tuple[int, ...], points: np.ndarray, radius: np.ndarray
) -> sparse.csr_matrix:
    """Symmetric adjacency of the minimum spanning forest of the skeleton voxels; values are lengths / radius."""
    flat = np.ravel_multi_index(tuple(index.T), shape)  # sorted, because argwhere scans in order
    starts, ends = [], []
    for offset in _HALF_NEIGHBORS:
        neighbor = index + offset
        valid = np.flatnonzero(((neighbor >= 0) & (neighbor < np.array(shape))).all(axis=1))
        wanted = np.ravel_multi_index(tuple(neighbor[valid].T), shape)
        place = np.minimum(np.searchsorted(flat, wanted), len(flat) - 1)
        hit = flat[place] == wanted
        starts.append(valid[hit])
        ends.append(place[hit])
    start, end = np.concatenate(starts), np.concatenate(ends)
    cost = np.linalg.norm(points[start] - points[end], axis=1) / np.maximum((radius[start] + radius[end]) / 2, 1e-3)
    tree = minimum_spanning_tree(sparse.csr_matrix((cost, (start, end)), shape=(len(index),) * 2))
    return (tree + tree.T).tocsr()


def _rooted(points: np.ndarray, radius: np.ndarray, edges: sparse.csr_matrix, root: np.ndarray | None) -> TreeGraph:
    """Order a spanning forest from its roots."""
    count, component = connected_components(edges, directed=False)
    degree = np.diff(edges.indptr)
    roots = _thick_ends(edges, radius, degree, component, count)
    if root is not None:
        start = _root_near(np.asarray(root, float), points, radius, degree, component)
        roots[component[start]] = start
    # One node above all roots lets a single traversal order the whole forest.
    above = len(points)
    links = sparse.csr_matrix((np.ones(count), (np.full(count, above), roots)), shape=(above + 1, above + 1))
    padded = sparse.csr_matrix((edges.data, edges.indices, np.append(edges.indptr, edges.nnz)), shape=links.shape)
    order, before = breadth_first_order(padded + links + links.T, above, directed=False)
    order = order[1:]
    main = component[start] if root is not None else int(np.bincount(component).argmax())
    order = order[np.argsort(component[order] != main, kind="stable")]
    place = np.full(above + 1, -1)
    place[order] = np.arange(len(order))
    return TreeGraph.from_parents(points[order], radius[order], place[before[order]])


def _thick_ends(
    edges: sparse.csr_matrix, radius: np.ndarray, degree: np.ndarray, component: np.ndarray, count: int
) -> np.ndarray:
    """(components,) the free end with the thickest surroundings; the thickest node of a ring or a lone voxel."""
    smooth = radius.copy()
    for _ in range(6):
        smooth = (smooth + edges.astype(bool) @ smooth) / (1 + degree)
    smooth[degree <= 1] += 1e6
    order = np.argsort(smooth, kind="stable")
    result = np.zeros(count, dtype=int)
    result[component[order]] = order
    return result


def _root_near(
    root: np.ndarray, points: np.ndarray, radius: np.ndarray, degree: np.ndarray, component: np.ndarray
) -> int:
    """The skeleton node where the tree begins: a free end close to the wanted point, else the nearest node."""
    distance = np.linalg.norm(points - root, axis=1)
    nearest = int(distance.argmin())
    ends = np.flatnonzero((degree <= 1) & (component == component[nearest]))
    end = int(ends[distance[ends].argmin()]) if len(ends) else nearest
    return end if distance[end] <= distance[nearest] + 2.0 * radius[nearest] + 2.0 else nearest


# -- pruning ---------------------------------------------------------------------------------------------------------


def prune_spurs(graph: TreeGraph, radii: float, extra_mm: float) -> TreeGraph:
    """Remove terminal branches shorter than ``radii`` x the radius where they begin + ``extra_mm``.

    Where all branches of a bifurcation are that short, the longest stays; repeated until nothing changes, because a
    pruned spur can join two pieces into one branch.
    """
    for _ in range(10):
        branches = graph.branches()
        spurs = _spurs(graph, branches, radii, extra_mm)
        if not spurs.any():
            break
        graph = graph.subset(~spurs[branches.of_node])
        graph = TreeGraph.from_parents(graph.points, graph.radius, graph.parent)
    return graph


def _spurs(graph: TreeGraph, branches: Branches, radii: float, extra_mm: float) -> np.ndarray:
    """(B,) bool: terminal branches to prune now."""
    begins_at = graph.parent[branches.first]
    terminal = np.bincount(branches.parent[branches.parent >= 0], minlength=len(branches)) == 0
    at_radius = np.where(begins_at >= 0, graph.radius[begins_at], 0.0)
    short = terminal & (begins_at >= 0) & (branches.length < radii * at_radius + extra_mm)
    # A spur runs toward the border and gets thinner; one that widens leads to the middle of a ball, such as a leak.
    widest = np.zeros(len(branches))
    np.maximum.at(widest, branches.of_node, graph.radius)
    short &= widest < _WIDENS * at_radius + extra_mm / 3
    for siblings in branches.children():
        if siblings and short[siblings].all():
            short[siblings[int(branches.length[siblings].argmax())]] = False
    return short


# -- free ends -------------------------------------------------------------------------------------------------------


def _extended_to_the_ends(graph: TreeGraph, mask: Volume) -> tuple[TreeGraph, np.ndarray]:
    """Continue free ends straight to where the mask ends: thinning eats a tube from its end by about its radius.

    Also returns, for each node, the node whose radius it has: new nodes have that of the end they continue.
    """
    step = min(mask.spacing)
    counts = graph.child_counts()
    before: list[tuple[np.ndarray, int]] = []  # new points from the outermost inward, and the root they lead to
    after: list[tuple[np.ndarray, int]] = []  # new points outward from a leaf
    for leaf in np.flatnonzero((counts == 0) & (graph.parent >= 0)):
        after.append((_onward(graph, graph.parent, int(leaf), mask, step), int(leaf)))
    child = np.full(len(graph), -1)
    child[graph.parent[graph.parent >= 0]] = np.flatnonzero(graph.parent >= 0)
    for root in np.flatnonzero((graph.parent < 0) & (counts == 1)):
        before.append((_onward(graph, np.where(counts == 1, child, -1), int(root), mask, step)[::-1], int(root)))
    return _joined(graph, before, after)


def _onward(graph: TreeGraph, back: np.ndarray, end: int, mask: Volume, step: float) -> np.ndarray:
    """(P, 3) points beyond a free end; ``back`` leads from it into the tube."""
    reach = max(4.0, 1.5 * graph.radius[end])
    node = end
    while back[node] >= 0 and np.linalg.norm(graph.points[node] - graph.points[end]) < reach:
        node = int(back[node])
    way = graph.points[end] - graph.points[node]
    length = float(np.linalg.norm(way))
    if length < 1e-6:
        return np.zeros((0, 3))
    count = int((3.0 * graph.radius[end] + 2.0 * max(mask.spacing)) / step)
    points = graph.points[end] + np.outer(np.arange(1, count + 1) * step / length, way)
    index = np.rint(mask.index_from_world(points)).astype(int)
    inside = ((index >= 0) & (index < np.array(mask.array.shape))).all(axis=1)
    inside[inside] = mask.array[tuple(index[inside].T)] > 0
    return points[: len(points) if inside.all() else int(inside.argmin())]


def _joined(
    graph: TreeGraph, before: list[tuple[np.ndarray, int]], after: list[tuple[np.ndarray, int]]
) -> tuple[TreeGraph, np.ndarray]:
    """The graph with chains of new points before its roots and behind its leaves, and whose radius each node has."""
    shift = sum(len(points) for points, _ in before)
    old_parent = np.where(graph.parent >= 0, graph.parent + shift, -1)
    front, back, like = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0, int)]
    count = 0
    for chain, root in before:
        front.append(np.r_[-1, np.arange(count, count + len(chain) - 1)][: len(chain)])
        like.append(np.full(len(chain), root))
        count += len(chain)
        old_parent[root] = count - 1 if len(chain) else -1
    like.append(np.arange(len(graph)))
    count += len(graph)
    for chain, leaf in after:
        back.append(np.r_[leaf + shift, np.arange(count, count + len(chain) - 1)][: len(chain)])
        like.append(np.full(len(chain), leaf))
        count += len(chain)
    points = np.concatenate([*(chain for chain, _ in before), graph.points, *(chain for chain, _ in after)])
    source = np.concatenate(like)
    parent = np.concatenate([*front, old_parent, *back]).astype(int)
    return TreeGraph.from_parents(points, graph.radius[source], parent), source + shift


# -- points and radii ------------------------------------------------------------------------------------------------


def smooth_points(graph: TreeGraph, sigma_mm: float) -> np.ndarray:
    """Points (N, 3) smoothed along the tree with about a Gaussian of ``sigma_mm``; free ends stay where they are."""
    return _diffuse(graph, graph.points, sigma_mm, fix_ends=True)


def _diffuse(graph: TreeGraph, values: np.ndarray, sigma_mm: float, fix_ends: bool) -> np.ndarray:
    """Heat flow along the tree: n steps of weight 1/4 to each of two neighbors have a variance of n / 2 steps^2."""
    if len(graph) < 3:
        return values.copy()
    child = np.flatnonzero(graph.parent >= 0)
    if not len(child):
        return values.copy()
    above = graph.parent[child]
    size = len(graph)
    ones = np.ones(2 * len(child))
    links = sparse.csr_matrix((ones, (np.r_[child, above], np.r_[above, child])), shape=(size, size))
    degree = np.diff(links.indptr)
    step = float(np.median(graph.lengths()[child]))
    rounds = int(np.clip(np.ceil(2 * (sigma_mm / max(step, 1e-6)) ** 2), 1, 200))
    moves = (degree > 1) if fix_ends else (degree > 0)
    weight = np.where(moves, 0.5 / np.maximum(degree, 1), 0.0)
    flow = sparse.diags(weight) @ links + sparse.diags(np.where(moves, 0.5, 1.0))
    for _ in range(rounds):
        values = flow @ values
    return values


def _radii(graph: TreeGraph, border: cKDTree, mask: np.ndarray, grid: Volume) -> np.ndarray:
    """Lumen radii (N,) in mm, smoothed along the tree.

    The distance to the nearest background voxel overestimates thin tubes (one voxel wide: a radius of one voxel); there
    the root of (volume / length / pi) is used where it is smaller.
    """
    inscribed = border.query(graph.points)[0]
    inscribed = np.where(np.isfinite(inscribed), inscribed, min(grid.spacing)) + _OFF_AXIS * min(grid.spacing)
    voxels = grid.world_from_index(np.argwhere(mask))
    owner = cKDTree(graph.points).query(voxels)[1]
    volume = np.bincount(owner, minlength=len(graph)) * float(np.prod(grid.spacing))
    lengths = graph.lengths()
    own = lengths / 2
    np.add.at(own, graph.parent[graph.parent >= 0], lengths[graph.parent >= 0] / 2)
    sigma = 2.0 * min(grid.spacing)
    volume, own = _diffuse(graph, np.column_stack([volume, own]), sigma, fix_ends=False).T
    from_volume = np.sqrt(volume / np.maximum(own, 0.3 * min(grid.spacing)) / np.pi)
    thin_tube = inscribed < 3.0 * min(grid.spacing)
    radius = np.where(thin_tube, np.minimum(inscribed, from_volume), inscribed)
    return np.maximum(_diffuse(graph, radius, sigma, fix_ends=False), 0.3 * min(grid.spacing))


def nearest_nodes(graph: TreeGraph, points: np.ndarray, neighbors: int = 6) -> np.ndarray:
    """(M,) for each point the node whose ball is nearest (distance - radius), so that a thick tube wins inside itself.

    The first nodes of a branch that still lie inside its parent's ball stand for the parent.
    """
    distance, node = cKDTree(graph.points).query(points, k=min(neighbors, len(graph)))
    if node.ndim == 1:
        distance, node = distance[:, None], node[:, None]
    best = (distance - graph.radius[node]).argmin(axis=1)
    return _node_for_voxels(graph)[node[np.arange(len(points)), best]]


def _node_for_voxels(graph: TreeGraph) -> np.ndarray:
    """(N,) the node that owns what is nearest to each node: the bifurcation for nodes inside its ball, else itself."""
    branches = graph.branches()
    begins_at = graph.parent[branches.first][branches.of_node]
    safe = np.maximum(begins_at, 0)
    distance = np.linalg.norm(graph.points - graph.points[safe], axis=1)
    covered = (begins_at >= 0) & (distance < graph.radius[safe])
    covered[branches.last] = False  # every branch keeps something
    return np.where(covered, safe, np.arange(len(graph)))
