"""Random trees and box lungs for the anatomy tests: exact graphs, rasterized by brute force."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from LCTfoundLib.anatomy.graph import TreeGraph
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


def random_tree(
    rng: np.random.Generator, spec: TreeSpec, start: np.ndarray, direction: np.ndarray
) -> TreeGraph:
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
