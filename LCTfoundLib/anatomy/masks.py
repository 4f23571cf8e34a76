"""Small tools on label maps: boxes, components, balls, and the ways between voxels, millimeters and other grids.

Arrays are indexed ``[k, j, i]``; spacings are in ``Volume`` order (mm along i, j, k); grids are canonical.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from LCTfoundLib.volume import Volume

__all__ = [
    "CORNERS",
    "FACES",
    "Box",
    "Probabilities",
    "Spacing",
    "bounding_box",
    "close_ball",
    "component_containing",
    "component_sizes",
    "coarse_grid",
    "crop",
    "dilate_ball",
    "fill_holes",
    "largest_component",
    "paint_tube",
    "resample",
    "sample",
    "signed_distance",
]

Spacing = tuple[float, float, float]
Box = tuple[slice, slice, slice]


@dataclass
class Probabilities:
    """Probabilities of several structures on one canonical grid.

    Attributes:
        grid: the grid; its array is not used.
        values: float (C, k, j, i), index = code.
    """

    grid: Volume
    values: np.ndarray

    def channel(self, code: int) -> Volume:
        """The probability of one code, float32."""
        return self.grid.with_array(self.values[code].astype(np.float32, copy=False))


#: Neighborhoods: voxels that share a face (6) or at least a corner (26).
FACES: np.ndarray = ndimage.generate_binary_structure(3, 1)
CORNERS: np.ndarray = ndimage.generate_binary_structure(3, 3)


# -- boxes and components --------------------------------------------------------------------------------------------


def bounding_box(mask: np.ndarray, spacing: Spacing = (1.0, 1.0, 1.0), margin_mm: float = 0.0) -> Box | None:
    """Slices of the box around a mask's non-zero voxels, widened by ``margin_mm``; None for an empty mask."""
    result = []
    for axis, step in enumerate(spacing[::-1]):
        used = np.flatnonzero(np.any(mask, axis=tuple(a for a in range(3) if a != axis)))
        if not used.size:
            return None
        margin = int(np.ceil(margin_mm / step))
        result.append(slice(max(0, int(used[0]) - margin), min(mask.shape[axis], int(used[-1]) + 1 + margin)))
    return result[0], result[1], result[2]


def crop(volume: Volume, box: Box) -> Volume:
    """The part of a volume in a box (a view), with its origin."""
    return volume.crop([side.start for side in box], [side.stop for side in box])


def component_sizes(labels: np.ndarray) -> np.ndarray:
    """Voxels per label, with 0 for the background."""
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return sizes


def largest_component(mask: np.ndarray, structure: np.ndarray = CORNERS) -> np.ndarray:
    """The largest connected component of a mask (bool); empty for an empty mask."""
    labels, count = ndimage.label(mask, structure)
    if count == 0:
        return np.zeros(mask.shape, dtype=bool)
    return labels == int(component_sizes(labels).argmax())


def component_containing(mask: np.ndarray, seeds: np.ndarray, structure: np.ndarray = CORNERS) -> np.ndarray:
    """The components of a mask that have a voxel of ``seeds`` (bool)."""
    labels, count = ndimage.label(mask, structure)
    keep = np.zeros(count + 1, dtype=bool)
    keep[np.unique(labels[seeds])] = True
    keep[0] = False
    return keep[labels]


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask with its cavities; by components, which is far faster than a reconstruction on large arrays."""
    outside, count = ndimage.label(~np.pad(mask, 1), FACES)
    if count < 2:
        return mask
    return outside[1:-1, 1:-1, 1:-1] != outside[0, 0, 0]


# -- balls -----------------------------------------------------------------------------------------------------------


def dilate_ball(mask: np.ndarray, radius_mm: float, spacing: Spacing) -> np.ndarray:
    """Dilation with a ball, by a distance transform in the mask's neighborhood."""
    box = bounding_box(mask, spacing, radius_mm)
    result = np.zeros(mask.shape, dtype=bool)
    if box is not None:
        result[box] = ndimage.distance_transform_edt(~mask[box], sampling=spacing[::-1]) <= radius_mm
    return result


def close_ball(mask: np.ndarray, radius_mm: float, spacing: Spacing) -> np.ndarray:
    """Closing with a ball; outside the image counts as background."""
    pad = [int(np.ceil(radius_mm / step)) + 1 for step in spacing[::-1]]
    box = bounding_box(mask)
    result = np.array(mask, dtype=bool)
    if box is not None:
        padded = np.pad(mask[box], [(p, p) for p in pad])
        grown = ndimage.distance_transform_edt(~padded, sampling=spacing[::-1]) <= radius_mm
        closed = ndimage.distance_transform_edt(grown, sampling=spacing[::-1]) > radius_mm
        result[box] |= closed[tuple(slice(p, -p) for p in pad)]
    return result


def signed_distance(mask: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Distance to the mask's border in mm (float32): positive inside, negative outside, zero halfway between voxels."""
    half = min(spacing) / 2
    inside = ndimage.distance_transform_edt(mask, sampling=spacing[::-1]).astype(np.float32)
    inside[mask] -= half
    if not mask.all():
        outside = ~mask
        inside[outside] = half - ndimage.distance_transform_edt(outside, sampling=spacing[::-1])[outside]
    return inside


# -- voxels and millimeters ------------------------------------------------------------------------------------------


def sample(volume: Volume, points: np.ndarray, order: int = 1, outside: float = 0.0) -> np.ndarray:
    """Values (N,) of a canonical volume at LPS mm points (N, 3)."""
    array = volume.array
    if order == 0:
        index = np.rint(volume.index_from_world(points)).astype(int)
        inside = ((index >= 0) & (index < np.array(array.shape))).all(axis=1)
        result = np.full(len(index), outside, dtype=np.result_type(array.dtype, type(outside)))
        result[inside] = array[tuple(index[inside].T)]
        return result
    return ndimage.map_coordinates(array, volume.index_from_world(points).T, order=order, mode="constant", cval=outside)


# -- other grids -----------------------------------------------------------------------------------------------------


def coarse_grid(volume: Volume, spacing_mm: float) -> Volume:
    """An array-less canonical grid over the same region, no finer than the volume along any axis.

    Its array is an empty view, only there for its shape.
    """
    steps, sizes, origin = [], [], []
    for size, step, start in zip(volume.shape[::-1], volume.spacing, volume.origin, strict=True):
        count = max(1, round(size * step / max(step, spacing_mm)))
        wide = size * step / count
        steps.append(wide)
        sizes.append(count)
        origin.append(start + (wide - step) / 2)
    shape = (sizes[2], sizes[1], sizes[0])
    spacing, begin = (steps[0], steps[1], steps[2]), (origin[0], origin[1], origin[2])
    return Volume(np.broadcast_to(np.uint8(0), shape), spacing, begin)


def resample(volume: Volume, grid: Volume, order: int = 1) -> np.ndarray:
    """Values of a canonical volume on another canonical grid; beyond its edge the edge value.

    Linear interpolation (order 1, float32) axis by axis, which costs a fraction of a general transform; where the new
    grid is more than 1.5 times coarser, the mean over its voxel is taken first. Order 0: nearest value.
    """
    array = volume.array
    for axis in range(3):
        step, start = volume.spacing[2 - axis], volume.origin[2 - axis]
        at = (grid.origin[2 - axis] + grid.spacing[2 - axis] * np.arange(grid.array.shape[axis]) - start) / step
        if order == 0:
            array = array.take(np.clip(np.rint(at), 0, array.shape[axis] - 1).astype(int), axis=axis)
            continue
        width = round(grid.spacing[2 - axis] / step)
        if width > 1:
            array = ndimage.uniform_filter1d(array.astype(np.float32, copy=False), width, axis=axis, mode="nearest")
            at = at + (0.5 if width % 2 == 0 else 0.0)  # an even window's mean lies half a voxel before its index
        array = _interpolate(array, at, axis)
    return array


def _interpolate(array: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    at = np.clip(at, 0, array.shape[axis] - 1)
    low = np.minimum(at.astype(int), max(array.shape[axis] - 2, 0))
    high = np.minimum(low + 1, array.shape[axis] - 1)
    weight = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    first = array.take(low, axis=axis).astype(np.float32, copy=False)
    second = array.take(high, axis=axis).astype(np.float32, copy=False)
    second = second - first
    second *= weight
    second += first
    return second


def paint_tube(mask: np.ndarray, points: np.ndarray, radius: np.ndarray, grid: Volume) -> None:
    """Set the voxels of a polyline of balls in a mask, in place; never thinner than a 26-connected line of voxels.

    Args:
        mask: bool [k, j, i] on ``grid``.
        points: (N, 3) LPS mm.
        radius: (N,) mm.
    """
    points, radius = _densify(points, radius, min(grid.spacing) / 2)
    index = grid.index_from_world(points)
    step = np.array(grid.spacing[::-1])
    shape = np.array(mask.shape)
    line = np.rint(index).astype(int)
    line = line[((line >= 0) & (line < shape)).all(axis=1)]
    mask[tuple(line.T)] = True
    for center, reach in zip(index, radius, strict=True):
        low = np.maximum(np.ceil(center - reach / step), 0).astype(int)
        high = np.minimum(np.floor(center + reach / step) + 1, shape).astype(int)
        if (high <= low).any():
            continue
        k, j, i = np.ogrid[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        offsets = ((k - center[0]) * step[0]) ** 2 + ((j - center[1]) * step[1]) ** 2 + ((i - center[2]) * step[2]) ** 2
        mask[low[0] : high[0], low[1] : high[1], low[2] : high[2]] |= offsets <= reach**2


def _densify(points: np.ndarray, radius: np.ndarray, step_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """The polyline and its radii sampled at least every ``step_mm``."""
    points, radius = np.asarray(points, dtype=float), np.asarray(radius, dtype=float)
    if len(points) < 2:
        return points, radius
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    at = np.linspace(0.0, along[-1], max(2, int(np.ceil(along[-1] / step_mm)) + 1))
    dense = np.stack([np.interp(at, along, points[:, axis]) for axis in range(3)], axis=1)
    return dense, np.interp(at, along, radius)
