"""Drawing tree graphs into voxel grids with exact partial volume, at any spacing.

A branch is a chain of cones. A voxel's coverage is a ramp of (radius - distance) over the voxel's extent, with the
radius corrected so that the integral over a cross section is the cone's own area (checked against analytic volumes);
a branch thinner than the voxel keeps its area by a lower peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import Tree
from training.phantom.render_grid import Frame

__all__ = ["Cover", "TreeLabels", "coverage", "label_trees", "skeleton_voxels", "visible_pieces"]

_FULL = 255.0


@dataclass
class Cover:
    """Coverage of voxels by one tree, uint8 (255 = wholly inside), [k, j, i].

    Attributes:
        lumen: the airway's or vessel's inside.
        outer: wall included; the same array as ``lumen`` for a vessel.
        shown: bool, touched by a branch that the acquisition can show.
    """

    lumen: np.ndarray
    outer: np.ndarray
    shown: np.ndarray


@dataclass
class TreeLabels:
    """The tree layers of a grid, uint8 ``Tree`` codes.

    Attributes:
        trees: every branch; one thinner than the voxel by its centerline voxels.
        visible: the part the acquisition can show; the rest is to be ignored.
        skeleton: centerline voxels of visible branches, dilated by one voxel inside the branch.
    """

    trees: np.ndarray
    visible: np.ndarray
    skeleton: np.ndarray


def visible_pieces(graph: TreeGraph, smallest_diameter: float) -> np.ndarray:
    """Bool (N,): pieces at least ``smallest_diameter`` mm wide."""
    return 2 * np.asarray(graph.radius) >= smallest_diameter


def coverage(graph: TreeGraph, frame: Frame, shown: np.ndarray, wall: np.ndarray | None = None) -> Cover:
    """Coverage of a grid by a tree.

    Args:
        graph: the tree.
        shown: bool (N,), pieces the acquisition can show.
        wall: (N,) mm, wall thickness outside the lumen of an airway.
    """
    lumen = np.zeros(frame.shape, np.uint8)
    outer = np.zeros(frame.shape, np.uint8) if wall is not None else lumen
    touched = np.zeros(frame.shape, np.bool_)
    if len(graph):
        points, radius, parent, start = _pieces(graph)
        thick = np.zeros(len(graph)) if wall is None else np.asarray(wall, np.float64)
        grid = np.asarray(frame.origin), np.asarray(frame.step)
        walled = wall is not None
        _paint(points, radius, start, parent, thick, np.asarray(shown), *grid, lumen, outer, touched, walled)
    return Cover(lumen, outer, touched)


def _pieces(graph: TreeGraph) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points, end radius, parent and start radius of each piece; a side branch does not flare to its stem's width."""
    points = np.ascontiguousarray(graph.points, np.float64)
    radius = np.ascontiguousarray(graph.radius, np.float64)
    parent = np.ascontiguousarray(graph.parent, np.int64)
    children = np.bincount(parent[parent >= 0], minlength=len(parent))
    stem = np.where(parent >= 0, radius[parent], radius)
    forks = (parent >= 0) & (children[parent] > 1)
    return points, radius, parent, np.where(forks, np.minimum(stem, 1.1 * radius), stem)


@njit(cache=True, fastmath=True)
def _ramp(radius, distance, extent):  # type: ignore[no-untyped-def]
    """Coverage 0-1 of a voxel of an extent at a distance from the axis; its disk integral is pi radius^2."""
    corrected = radius * radius - extent * extent / 12.0
    least = extent * extent / 4.0
    if corrected >= least:
        value = 0.5 + (np.sqrt(corrected) - distance) / extent
        return min(1.0, max(0.0, value))
    value = 1.0 - distance / extent
    return max(0.0, value) * radius * radius / (extent * extent / 3.0)


@njit(cache=True, fastmath=True)
def _range(start, end, reach, step, size):  # type: ignore[no-untyped-def]
    """First and last voxel that a piece's coverage can touch along an axis."""
    low = int(np.ceil((min(start, end) - reach) / step - 1))
    high = int(np.floor((max(start, end) + reach) / step + 1))
    return max(0, low), min(size - 1, high)


@njit(cache=True, fastmath=True)
def _paint(points, radius, start, parent, wall, shown, origin, step, lumen, outer, touched, walled):  # type: ignore[no-untyped-def]
    nk, nj, ni = lumen.shape
    sx, sy, sz, mean = step[0], step[1], step[2], step.mean()
    for n in range(len(points)):
        p = parent[n] if parent[n] >= 0 else n
        ax, ay, az = points[p, 0] - origin[0], points[p, 1] - origin[1], points[p, 2] - origin[2]
        dx, dy, dz = points[n, 0] - points[p, 0], points[n, 1] - points[p, 1], points[n, 2] - points[p, 2]
        r0, r1 = start[n], radius[n]
        reach = max(r0, r1) + wall[n]
        i0, i1 = _range(ax, ax + dx, reach, sx, ni)
        j0, j1 = _range(ay, ay + dy, reach, sy, nj)
        k0, k1 = _range(az, az + dz, reach, sz, nk)
        length2 = dx * dx + dy * dy + dz * dz
        inverse = 1.0 / length2 if length2 > 0 else 0.0
        for k in range(k0, k1 + 1):
            pz = k * sz - az
            for j in range(j0, j1 + 1):
                py = j * sy - ay
                for i in range(i0, i1 + 1):
                    px = i * sx - ax
                    t = min(1.0, max(0.0, (px * dx + py * dy + pz * dz) * inverse))
                    qx, qy, qz = px - t * dx, py - t * dy, pz - t * dz
                    d2 = qx * qx + qy * qy + qz * qz
                    r = r0 + t * (r1 - r0)
                    d = np.sqrt(d2)
                    if d > r + wall[n] + 2.0 * mean:
                        continue
                    if d2 > 1e-8:
                        extent = np.sqrt((qx * qx * sx * sx + qy * qy * sy * sy + qz * qz * sz * sz) / d2)
                    else:
                        extent = mean
                    value = np.uint8(_FULL * _ramp(r, d, extent) + 0.5)
                    if value > lumen[k, j, i]:
                        lumen[k, j, i] = value
                    if walled:
                        full = np.uint8(_FULL * _ramp(r + wall[n], d, extent) + 0.5)
                        if full > outer[k, j, i]:
                            outer[k, j, i] = full
                    if shown[n] and value >= 64:
                        touched[k, j, i] = True


def label_trees(
    graphs: dict[Tree, TreeGraph], covers: dict[Tree, Cover], shown: dict[Tree, np.ndarray], frame: Frame
) -> TreeLabels:
    """Tree layers from the coverage: half a voxel or more is the tree; airway before artery before vein."""
    trees = np.zeros(frame.shape, np.uint8)
    visible = np.zeros(frame.shape, np.uint8)
    for tree in (Tree.VEIN, Tree.ARTERY, Tree.AIRWAY):
        inside = covers[tree].lumen >= 128
        trees[inside] = tree
        visible[inside] = np.where(covers[tree].shown[inside], np.uint8(tree), np.uint8(0))
    skeleton = np.zeros(frame.shape, np.uint8)
    for tree in (Tree.AIRWAY, Tree.ARTERY, Tree.VEIN):
        voxels, piece = skeleton_voxels(graphs[tree], frame)
        seen = shown[tree][piece]
        _mark_centerlines(voxels, seen, int(tree), trees, visible, skeleton)
    return TreeLabels(trees, visible, _dilated(skeleton, visible))


def skeleton_voxels(graph: TreeGraph, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (M, 3) k, j, i along the centerline inside the grid, and the piece (M,) each belongs to."""
    if not len(graph):
        return np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    points, _, parent, _ = _pieces(graph)
    voxels = (points - np.asarray(frame.origin)) / np.asarray(frame.step)
    return _walk(voxels[:, ::-1].copy(), parent, np.asarray(frame.shape))


@njit(cache=True)
def _walk(voxels, parent, shape):  # type: ignore[no-untyped-def]
    capacity = 1024
    out = np.empty((capacity, 3), np.int64)
    piece = np.empty(capacity, np.int64)
    count = 0
    for n in range(len(voxels)):
        p = parent[n] if parent[n] >= 0 else n
        steps = 1 + int(2.5 * np.max(np.abs(voxels[n] - voxels[p])))
        for s in range(steps + 1):
            t = s / steps
            k = int(np.floor(voxels[p, 0] + t * (voxels[n, 0] - voxels[p, 0]) + 0.5))
            j = int(np.floor(voxels[p, 1] + t * (voxels[n, 1] - voxels[p, 1]) + 0.5))
            i = int(np.floor(voxels[p, 2] + t * (voxels[n, 2] - voxels[p, 2]) + 0.5))
            if k < 0 or j < 0 or i < 0 or k >= shape[0] or j >= shape[1] or i >= shape[2]:
                continue
            if count == capacity:
                capacity *= 2
                out = np.concatenate((out, np.empty((count, 3), np.int64)))
                piece = np.concatenate((piece, np.empty(count, np.int64)))
            out[count, 0], out[count, 1], out[count, 2] = k, j, i
            piece[count] = n
            count += 1
    return out[:count], piece[:count]


@njit(cache=True)
def _mark_centerlines(voxels, seen, code, trees, visible, skeleton):  # type: ignore[no-untyped-def]
    """A branch too thin for the coverage rule is its centerline, where nothing else lies."""
    for m in range(len(voxels)):
        k, j, i = voxels[m, 0], voxels[m, 1], voxels[m, 2]
        if trees[k, j, i] == 0:
            trees[k, j, i] = code
        if seen[m] and trees[k, j, i] == code:
            visible[k, j, i] = code
            skeleton[k, j, i] = code


@njit(cache=True)
def _dilated(skeleton, visible):  # type: ignore[no-untyped-def]
    """One voxel wider (26 neighbors) where the visible branch reaches."""
    out = skeleton.copy()
    nk, nj, ni = skeleton.shape
    for k in range(nk):
        for j in range(nj):
            for i in range(ni):
                code = skeleton[k, j, i]
                if code == 0:
                    continue
                for z in range(max(k - 1, 0), min(k + 2, nk)):
                    for y in range(max(j - 1, 0), min(j + 2, nj)):
                        for x in range(max(i - 1, 0), min(i + 2, ni)):
                            if visible[z, y, x] == code:
                                out[z, y, x] = code
    return out
