"""Random trees and box lungs for the anatomy tests: exact graphs, rasterized by brute force."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import Probabilities
from LCTfoundLib.volume import Volume


@dataclass
class TreeSpec:
    """How a random binary tree grows; lengths in mm."""

    depth: int = 4
    trunk_mm: float = 30.0
    trunk_radius: float = 5.0
    shrink: float = 0.8
    angle_degrees: tuple[float, float] = (25.0, 50.0)
    step_mm: float = 1.0


def blank(shape: tuple[int, int, int], spacing: float | tuple[float, float, float] = 1.0) -> Volume:
    """An empty canonical bool volume centered at the origin."""
    steps = (spacing,) * 3 if isinstance(spacing, float | int) else spacing
    origin = tuple(-step * (size - 1) / 2 for step, size in zip(steps, shape[::-1], strict=True))
    return Volume(np.zeros(shape, bool), steps, origin)  # type: ignore[arg-type]


def random_tree(rng: np.random.Generator, spec: TreeSpec, start: np.ndarray, direction: np.ndarray) -> TreeGraph:
    """A random binary tree with straight branches of shrinking radius."""
    points, radius, parent = [np.asarray(start, float)], [spec.trunk_radius], [-1]
    normal = rng.normal(size=3)
    todo = [(0, np.asarray(direction, float) / np.linalg.norm(direction), spec.trunk_mm, spec.trunk_radius, 0, normal)]
    while todo:
        node, heading, length, thick, level, plane = todo.pop()
        steps = max(2, round(length / spec.step_mm))
        for _ in range(steps):
            points.append(points[node] + heading * length / steps)
            radius.append(thick)
            parent.append(node)
            node = len(points) - 1
        if level + 1 >= spec.depth:
            continue
        side = np.cross(heading, plane)
        side /= np.linalg.norm(side)
        for sign in (-1, 1):
            angle = np.radians(rng.uniform(*spec.angle_degrees))
            turned = np.cos(angle) * heading + sign * np.sin(angle) * side
            grown = length * spec.shrink * rng.uniform(0.85, 1.15)
            todo.append((node, turned, grown, thick * spec.shrink, level + 1, side))
    return TreeGraph.from_parents(np.array(points), np.array(radius), np.array(parent))


def rasterize(graph: TreeGraph, grid: Volume, only: np.ndarray | None = None) -> np.ndarray:
    """Bool mask of the voxels within the radius of a piece (capsules), piece by piece by brute force."""
    mask = np.zeros(grid.array.shape, bool)
    for node in range(len(graph)) if only is None else np.flatnonzero(only):
        above = graph.parent[node]
        a, b = graph.points[above if above >= 0 else node], graph.points[node]
        _capsule(mask, grid, a, b, graph.radius[node])
    return mask


def _capsule(mask: np.ndarray, grid: Volume, a: np.ndarray, b: np.ndarray, radius: float) -> None:
    spacing, origin = np.array(grid.spacing), np.array(grid.origin)
    low = np.maximum(np.floor((np.minimum(a, b) - radius - origin) / spacing), 0).astype(int)
    high = np.minimum(np.ceil((np.maximum(a, b) + radius - origin) / spacing) + 1, mask.shape[::-1]).astype(int)
    if (high <= low).any():
        return
    x, y, z = (origin[n] + spacing[n] * np.arange(low[n], high[n]) for n in range(3))
    points = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1], axis=-1)
    along = np.clip(((points - a) @ (b - a)) / max((b - a) @ (b - a), 1e-12), 0, 1)
    near = np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1) <= radius
    mask[low[2] : high[2], low[1] : high[1], low[0] : high[0]] |= near


# -- a box thorax with all 18 segments -------------------------------------------------------------------------------


@dataclass
class BoxLungs:
    """Box lungs whose segments are nearest-seed regions, with an airway that supplies them.

    Attributes:
        lobes, segments: uint8 codes on one canonical grid.
        airway: the true tree with segments.
        prior: float32 (19, k, j, i), soft segment probabilities on a coarser grid.
    """

    lobes: Volume
    segments: Volume
    airway: TreeGraph
    prior: Probabilities


#: Lateral (0 medial - 1 lateral), posterior, superior place of each segment's seed in its lobe.
SEEDS: dict[int, tuple[float, float, float]] = {
    1: (0.5, 0.5, 0.8), 2: (0.6, 0.85, 0.4), 3: (0.5, 0.15, 0.35), 4: (0.8, 0.5, 0.5), 5: (0.2, 0.4, 0.5),
    6: (0.5, 0.7, 0.85), 7: (0.15, 0.5, 0.3), 8: (0.55, 0.15, 0.3), 9: (0.85, 0.5, 0.2), 10: (0.5, 0.85, 0.2),
    11: (0.5, 0.7, 0.8), 12: (0.5, 0.25, 0.65), 13: (0.7, 0.4, 0.35), 14: (0.45, 0.3, 0.1),
    15: (0.5, 0.7, 0.85), 16: (0.4, 0.2, 0.3), 17: (0.85, 0.5, 0.2), 18: (0.45, 0.85, 0.2),
}  # fmt: skip


def box_lungs(rng: np.random.Generator, spacing: float = 2.5, drop: tuple[int, ...] = ()) -> BoxLungs:
    """Random box lungs; segments in ``drop`` have territory but no bronchus."""
    from scipy import ndimage

    shape = (round(240 / spacing), round(160 / spacing), round(260 / spacing))
    grid = blank(shape, spacing)
    lobes = _box_lobes(grid, rng)
    segments, seeds = _nearest_seeds(lobes, rng)
    airway = _supply(lobes, segments, seeds, rng, drop)
    soft = np.stack([segments == code for code in range(19)]).astype(np.float32)[:, ::2, ::2, ::2]
    soft = np.stack([ndimage.gaussian_filter(part, 1.5) for part in soft])
    soft /= soft.sum(axis=0)
    coarse = Probabilities(Volume(soft[0], (2 * spacing,) * 3, grid.origin), soft)
    return BoxLungs(grid.with_array(lobes), grid.with_array(segments), airway, coarse)


def _box_lobes(grid: Volume, rng: np.random.Generator) -> np.ndarray:
    x, y, z = _world(grid)
    lobes = np.zeros(grid.array.shape, np.uint8)
    inside = (np.abs(y) < 70) & (np.abs(z) < 110)
    oblique = z + 0.9 * y < rng.uniform(-15, 15)
    right, left = inside & (x > -120) & (x < -20), inside & (x < 120) & (x > 20)
    horizontal = z > rng.uniform(5, 25)
    lobes[right] = np.where(oblique[right], 2, np.where(horizontal[right], 1, 2))
    lobes[right & (z - 0.9 * y < rng.uniform(-25, -5))] = 3
    lobes[left] = np.where((z - 0.9 * y < rng.uniform(-15, 15))[left], 5, 4)
    return lobes


def _world(grid: Volume) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k, j, i = np.indices(grid.array.shape, dtype=np.float32)
    x, y, z = (o + s * n for o, s, n in zip(grid.origin, grid.spacing, (i, j, k), strict=True))
    return x, y, z


def _nearest_seeds(lobes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Segments of nearest seeds (voxel indices k, j, i), and the seeds."""
    from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT

    segments, seeds = np.zeros_like(lobes), {}
    for lobe in range(1, 6):
        index = np.argwhere(lobes == lobe)
        low, high = index.min(axis=0), index.max(axis=0)
        codes = [code for code in SEEDS if LOBE_OF_SEGMENT[code] == lobe]
        for code in codes:
            lateral, posterior, superior = np.array(SEEDS[code]) + rng.normal(0, 0.04, 3)
            place = np.array([superior, posterior, 1 - lateral if lobe <= 3 else lateral])
            wanted = low + place * (high - low)
            seeds[code] = index[np.linalg.norm(index - wanted, axis=1).argmin()]
        distance = np.stack([np.linalg.norm(index - seeds[code], axis=1) for code in codes])
        segments[tuple(index.T)] = np.array(codes)[distance.argmin(axis=0)]
    return segments, seeds


def _supply(
    lobes: np.ndarray,
    segments: np.ndarray,
    seeds: dict[int, np.ndarray],
    rng: np.random.Generator,
    drop: tuple[int, ...],
) -> TreeGraph:
    """Trachea, main and lobar bronchi, a bronchus to each seed and four branches into its segment."""
    from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT

    shape = np.array(lobes.shape)
    spacing = 240 / shape[0]
    world = lambda index: (np.asarray(index, float) - (shape - 1) / 2)[::-1] * spacing  # noqa: E731
    points, radius, parent, codes = [np.array([0.0, 0.0, 110.0])], [8.0], [-1], [0]

    def grow(start: int, end: np.ndarray, thick: float, code: int) -> int:
        steps = max(2, round(float(np.linalg.norm(end - points[start])) / 2.0))
        begin, node = points[start], start
        for step in range(1, steps + 1):
            points.append(begin + (end - begin) * step / steps)
            radius.append(thick)
            parent.append(node)
            codes.append(code)
            node = len(points) - 1
        return node

    carina = grow(0, np.array([0.0, 0.0, 40.0]), 8.0, 0)
    for side, members in ((-1, (1, 2, 3)), (1, (4, 5))):
        main = grow(carina, np.array([side * 22.0, 0.0, 20.0]), 6.0, 0)
        for lobe in members:
            middle = world(np.argwhere(lobes == lobe).mean(axis=0))
            hilum = grow(main, points[main] + 0.25 * (middle - points[main]), 4.0, 0)
            for code in (c for c in SEEDS if LOBE_OF_SEGMENT[c] == lobe and c not in drop):
                stem = grow(hilum, world(seeds[code]), 2.5, code)
                inside = np.argwhere(segments == code)
                for place in rng.choice(len(inside), 4, replace=False):
                    end = world(inside[place])
                    grow(stem, points[stem] + 0.7 * (end - points[stem]), 1.5, code)
    graph = TreeGraph.from_parents(np.array(points), np.array(radius), np.array(parent))
    graph.segment = np.array(codes)
    return graph
