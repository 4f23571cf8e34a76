"""``Volume``: an array with its geometry in LPS millimeters, turned, cropped and resampled without losing either."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from scipy import sparse

__all__ = ["AIR", "Interpolation", "Volume"]

#: HU of what lies outside of the field of view.
AIR = -1024

#: Directions that differ from a right angle by less than this (0.006 degrees; 0.05 mm over half a meter) are rounding.
_ALIGNED = 1e-4
#: Grids whose voxels differ by less than this share of a voxel are the same.
_SAME_PLACE = 1e-2
#: Voxels that are computed at a time: they fit the cache, and a large CT is not copied as a whole.
_CHUNK_VOXELS = 2**21


class Interpolation(Enum):
    """How values between the voxels come about: NEAREST for label maps, LINEAR for images and probabilities."""

    NEAREST = "nearest"
    LINEAR = "linear"


@dataclass
class Volume:
    """A 3D image with geometry, in SimpleITK's convention.

    Attributes:
        array: values indexed ``[k, j, i]`` (slice, row, column): HU for a CT, codes for a label map.
        spacing: mm along ``(i, j, k)``.
        origin: LPS mm of voxel ``(0, 0, 0)``.
        direction: 3x3; its columns are the LPS directions of i, j and k.
        metadata: what is known of the source (modality, patient position, ...), for provenance.

    A *canonical* volume has the identity as direction: i runs to the patient's left, j to posterior, k to superior.

    Raises:
        ValueError: the array is not 3D, or the geometry is not finite, positive and orthonormal.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: np.ndarray = field(default_factory=lambda: np.eye(3))
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.array.ndim != 3:
            raise ValueError(f"a volume has 3 dimensions, not {self.array.ndim}")
        self.spacing = _three(self.spacing, "spacing")
        self.origin = _three(self.origin, "origin")
        self.direction = np.array(self.direction, dtype=np.float64).reshape(3, 3)
        if min(self.spacing) <= 0:
            raise ValueError(f"spacing must be positive, it is {self.spacing}")
        if not np.allclose(self.direction.T @ self.direction, np.eye(3), atol=1e-3):
            raise ValueError(f"direction must be orthonormal, it is {self.direction.tolist()}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Array shape ``(k, j, i)``."""
        k, j, i = self.array.shape
        return k, j, i

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in mL."""
        return float(np.prod(self.spacing)) / 1000.0

    @property
    def affine(self) -> np.ndarray:
        """4x4 from ``(i, j, k, 1)`` to LPS mm."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.direction * self.spacing
        matrix[:3, 3] = self.origin
        return matrix

    @property
    def is_canonical(self) -> bool:
        """Whether the direction is the identity."""
        return bool(np.allclose(self.direction, np.eye(3), atol=_ALIGNED))

    def with_array(self, array: np.ndarray) -> Volume:
        """Another array on the same grid."""
        return Volume(array, self.spacing, self.origin, self.direction, dict(self.metadata))

    def world_from_index(self, index: np.ndarray) -> np.ndarray:
        """LPS mm ``(..., x y z)`` of (fractional) indices ``(..., k j i)``."""
        ijk = np.asarray(index, dtype=np.float64)[..., ::-1]
        return ijk @ self.affine[:3, :3].T + self.origin

    def index_from_world(self, points: np.ndarray) -> np.ndarray:
        """Fractional indices ``(..., k j i)`` of points ``(..., x y z)`` in LPS mm."""
        offset = np.asarray(points, dtype=np.float64) - self.origin
        return (offset @ np.linalg.inv(self.affine[:3, :3]).T)[..., ::-1]

    def same_grid(self, other: Volume) -> bool:
        """Whether the voxels of both lie at the same places (to a hundredth of a voxel)."""
        if self.shape != other.shape:
            return False
        corners = np.array(list(itertools.product(*((0, n - 1) for n in self.shape))))
        away = np.abs(other.index_from_world(self.world_from_index(corners)) - corners)
        return bool((away < _SAME_PLACE).all())

    def crop(self, start: Sequence[int], stop: Sequence[int]) -> Volume:
        """The box ``start`` to ``stop`` (exclusive) in indices ``(k, j, i)``, cut to the volume; a view, not a copy."""
        low = [min(max(int(a), 0), n) for a, n in zip(start, self.shape, strict=True)]
        high = [min(max(int(b), 0), n) for b, n in zip(stop, self.shape, strict=True)]
        if any(b <= a for a, b in zip(low, high, strict=True)):
            raise ValueError(f"nothing of the volume {self.shape} lies between {tuple(start)} and {tuple(stop)}")
        region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        x, y, z = self.world_from_index(np.array(low))
        return Volume(self.array[region], self.spacing, (x, y, z), self.direction, dict(self.metadata))

    def to_canonical(self) -> Volume:
        """Axes permuted and flipped so that the direction comes nearest to the identity; no value changes.

        Axis-aligned volumes become canonical exactly. Oblique ones keep their (now small) rotation in ``direction``;
        :meth:`resample_canonical` takes it out. The array may share memory with this one.
        """
        grid, order, signs = _turned_grid(self)
        return grid.with_array(np.ascontiguousarray(_turn(self.array, order, signs)))

    def resample_canonical(
        self, interpolation: Interpolation = Interpolation.LINEAR, pad: float = AIR, spacing: float | None = None
    ) -> Volume:
        """An oblique volume on the upright grid that encloses it; an axis-aligned one as :meth:`to_canonical`.

        Args:
            interpolation: for values between voxels.
            pad: value where the volume does not reach.
            spacing: mm, isotropic; default: that of the nearest own axes.
        """
        near = self.to_canonical()
        if near.is_canonical:
            return near if spacing is None else near.resample((spacing,) * 3, interpolation, pad)
        steps = np.array((spacing,) * 3 if spacing is not None else near.spacing)
        corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in self.shape))))
        world = self.world_from_index(corners)
        low, high = world.min(axis=0), world.max(axis=0)
        size = np.ceil((high - low) / steps - 1e-3).astype(int)
        x, y, z = (low + high) / 2 - steps * (size - 1) / 2
        grid = Volume(_no_array(size[::-1]), (steps[0], steps[1], steps[2]), (x, y, z))
        return near.resample(grid, interpolation, pad)

    def like(self, reference: Volume, interpolation: Interpolation = Interpolation.LINEAR, pad: float = 0) -> Volume:
        """These values on the grid of ``reference``; this volume itself where that is its grid already."""
        return self if self.same_grid(reference) else self.resample(reference, interpolation, pad)

    def restore_to(
        self, reference: Volume, interpolation: Interpolation = Interpolation.NEAREST, pad: float = 0
    ) -> Volume:
        """What was computed on a canonical grid, on the grid of the input ``reference`` it was made from.

        When this grid is that of ``reference.to_canonical()``, axes are turned back and no value changes. From any
        other grid (crop, other spacing, upright grid of an oblique input) it is resampled.

        Args:
            reference: the volume as it was read.
            interpolation: NEAREST for label maps.
            pad: value where this volume does not reach.
        """
        grid, order, signs = _turned_grid(reference)
        if self.same_grid(grid):
            array = np.ascontiguousarray(_turn_back(self.array, order, signs))
        else:
            array = self.resample(reference, interpolation, pad).array
        return Volume(array, reference.spacing, reference.origin, reference.direction, dict(self.metadata))

    def resample(
        self,
        target: Volume | Sequence[float],
        interpolation: Interpolation = Interpolation.LINEAR,
        pad: float = 0,
    ) -> Volume:
        """The values at other places, of the same dtype (integers are rounded).

        Where the target is coarser, LINEAR averages over a triangle as wide as two target voxels, so that noise and
        thin structures do not alias; where it is finer, it is plain trilinear interpolation. Grids whose axes are
        parallel are done axis by axis; only oblique ones need SimpleITK.

        Args:
            target: a volume whose grid is meant, or a spacing ``(i, j, k)`` in mm (the same extent, to half a voxel).
            interpolation: NEAREST for label maps.
            pad: value outside of this volume.
        """
        grid = target if isinstance(target, Volume) else self._grid_with_spacing(_three(target, "spacing"))
        relative = self.direction.T @ grid.direction
        order, signs = _nearest_axes(relative)
        if np.allclose(relative, np.rint(relative), atol=_ALIGNED):
            array = _resample_parallel(self, grid, order, signs, interpolation, pad)
        else:
            array = _resample_oblique(self, grid, interpolation, pad)
        return Volume(array, grid.spacing, grid.origin, grid.direction, dict(self.metadata))

    def _grid_with_spacing(self, spacing: tuple[float, float, float]) -> Volume:
        """A grid of another spacing around the same center."""
        steps, count = np.array(spacing), np.array(self.shape[::-1])
        size = np.maximum(1, np.round(count * self.spacing / steps)).astype(int)
        first = (count - 1) / 2 * np.array(self.spacing) - (size - 1) / 2 * steps
        x, y, z = self.direction @ first + self.origin
        return Volume(_no_array(size[::-1]), spacing, (x, y, z), self.direction)


def _three(values: Sequence[float], what: str) -> tuple[float, float, float]:
    numbers = [float(value) for value in values]
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise ValueError(f"{what} must be 3 finite numbers, it is {values}")
    return numbers[0], numbers[1], numbers[2]


def _no_array(shape: Sequence[int] | np.ndarray) -> np.ndarray:
    """An array of a shape that takes no memory, for grids without values."""
    return np.broadcast_to(np.uint8(0), tuple(int(n) for n in shape))


def _nearest_axes(direction: np.ndarray) -> tuple[list[int], np.ndarray]:
    """For each row axis of ``direction`` the column axis that is nearest to it, each once, and its sign."""
    orders = [list(order) for order in itertools.permutations(range(3))]
    best = max(orders, key=lambda order: sum(abs(direction[row, order[row]]) for row in range(3)))
    signs = np.array([1.0 if direction[row, best[row]] >= 0 else -1.0 for row in range(3)])
    return best, signs


def _turn(array: np.ndarray, order: list[int], signs: np.ndarray) -> np.ndarray:
    """View whose axes (x, y, z) are the axes ``order`` of (i, j, k), reversed where the sign is negative."""
    turned = array.transpose([2 - order[2], 2 - order[1], 2 - order[0]])
    return turned[tuple(slice(None, None, int(sign)) for sign in signs[::-1])]


def _turn_back(array: np.ndarray, order: list[int], signs: np.ndarray) -> np.ndarray:
    """Undo :func:`_turn`."""
    unflipped = array[tuple(slice(None, None, int(sign)) for sign in signs[::-1])]
    return unflipped.transpose(np.argsort([2 - order[2], 2 - order[1], 2 - order[0]]))


def _turned_grid(volume: Volume) -> tuple[Volume, list[int], np.ndarray]:
    """``volume.to_canonical()`` without the values, and how they have to be turned."""
    order, signs = _nearest_axes(volume.direction)
    direction = volume.direction[:, order] * signs
    if np.allclose(direction, np.eye(3), atol=_ALIGNED):
        direction = np.eye(3)
    sizes = np.array(volume.shape[::-1])[order]
    first = np.zeros(3)
    first[order] = np.where(signs > 0, 0, sizes - 1)  # reversed axes begin at their last voxel
    x, y, z = volume.world_from_index(first[::-1])
    a, b, c = (volume.spacing[axis] for axis in order)
    grid = Volume(_no_array(sizes[::-1]), (a, b, c), (x, y, z), direction, dict(volume.metadata))
    return grid, order, signs


def _resample_parallel(
    source: Volume, grid: Volume, order: list[int], signs: np.ndarray, interpolation: Interpolation, pad: float
) -> np.ndarray:
    """Resample between grids whose axes are parallel (permuted, reversed, scaled, shifted)."""
    # Rows of the relative direction are the source's axes; order[row] is the target's axis that runs along it.
    first = source.index_from_world(np.array(grid.origin))[::-1]
    positions = []
    for axis in range(3):
        along = order[axis]
        step = signs[axis] * grid.spacing[along] / source.spacing[axis]
        positions.append(first[axis] + step * np.arange(grid.shape[2 - along]))
    by_index = positions[::-1]  # k, j, i of the source
    if interpolation is Interpolation.NEAREST:
        values = _pick(source.array, by_index, pad)
    else:
        values = _weigh(source.array, by_index, pad)
    # Source axis order -> target axis order; the direction of each was taken care of by its step.
    return np.ascontiguousarray(_turn_back(values, order, np.ones(3)))


def _pick(array: np.ndarray, positions: list[np.ndarray], pad: float) -> np.ndarray:
    """Nearest values at the product of three lists of fractional indices."""
    nearest = [np.floor(p + 0.5).astype(np.int64) for p in positions]
    inside = [(n >= 0) & (n < size) for n, size in zip(nearest, array.shape, strict=True)]
    within = [n[each] for n, each in zip(nearest, inside, strict=True)]
    values = np.full([len(n) for n in nearest], pad, dtype=array.dtype)
    region = np.ix_(inside[1], inside[2])
    whole = inside[1].all() and inside[2].all()
    source, plane = -1, np.empty(0, array.dtype)
    for k in np.flatnonzero(inside[0]):
        if nearest[0][k] != source:  # finer planes repeat
            source = int(nearest[0][k])
            plane = array[source].take(within[1], axis=0).take(within[2], axis=1)
        values[k][... if whole else region] = plane
    return values


def _weigh(array: np.ndarray, positions: list[np.ndarray], pad: float) -> np.ndarray:
    """Linear (where coarser: triangle-averaged) values at the product of three lists of fractional indices."""
    inside = [(p >= -0.5 - 1e-6) & (p <= n - 0.5 + 1e-6) for p, n in zip(positions, array.shape, strict=True)]
    values = np.full([len(p) for p in positions], pad, dtype=array.dtype)
    if not all(each.any() for each in inside):
        return values
    weights = [_axis_weights(p[each], n) for p, each, n in zip(positions, inside, array.shape, strict=True)]
    block = _along_k(_in_planes(array, weights[1], weights[2]), weights[0], array.dtype)
    if all(each.all() for each in inside):
        return block
    values[np.ix_(*inside)] = block
    return values


def _axis_weights(positions: np.ndarray, size: int) -> sparse.csr_array | None:
    """float32 (len(positions), size) of the triangle's weights, rows adding up to 1; None for the identity."""
    if len(positions) == size and np.allclose(positions, np.arange(size), atol=1e-4):
        return None
    step = abs(positions[1] - positions[0]) if len(positions) > 1 else 1.0
    width = max(1.0, step)
    # Beyond the outermost voxel centers the outermost values go on.
    centers = positions if step > 1.0 else np.clip(positions, 0, size - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(centers[:, None] - np.arange(size)) / width)
    return sparse.csr_array((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def _in_planes(array: np.ndarray, weights_j: sparse.csr_array | None, weights_i: sparse.csr_array | None) -> np.ndarray:
    """Resample j and i, a plane at a time, which stays in the cache; float32, or the array itself if both are None."""
    if weights_j is None and weights_i is None:
        return array
    rows = array.shape[1] if weights_j is None else weights_j.shape[0]
    columns = array.shape[2] if weights_i is None else weights_i.shape[0]
    result = np.empty((array.shape[0], rows, columns), np.float32)
    for k, plane in enumerate(array):
        values = plane.astype(np.float32)
        if weights_j is not None:
            values = weights_j @ values
        if weights_i is not None:
            values = (weights_i @ np.ascontiguousarray(values.T)).T
        result[k] = values
    return result


def _along_k(planes: np.ndarray, weights: sparse.csr_array | None, dtype: np.dtype) -> np.ndarray:
    """Resample k, some rows at a time, and cast."""
    count, rows, columns = planes.shape
    result = np.empty((count if weights is None else weights.shape[0], rows, columns), dtype)
    step = max(1, _CHUNK_VOXELS // (max(count, len(result)) * columns))
    for first in range(0, rows, step):
        block = planes[:, first : first + step].astype(np.float32)
        if weights is not None:
            block = (weights @ block.reshape(count, -1)).reshape(len(result), -1, columns)
        result[:, first : first + step] = _cast(block, dtype)
    return result


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round and clip for integers (in place)."""
    if dtype == np.bool_:
        return values >= 0.5
    if not np.issubdtype(dtype, np.integer) or values.dtype == dtype:
        return values.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    np.rint(values, out=values)
    return np.clip(values, limits.min, limits.max, out=values).astype(dtype)


def _resample_oblique(source: Volume, grid: Volume, interpolation: Interpolation, pad: float) -> np.ndarray:
    """Resample between grids that are turned against each other, with SimpleITK."""
    import SimpleITK as sitk  # here: only oblique volumes need it, and it takes a second to load

    linear = interpolation is Interpolation.LINEAR
    if linear:
        source = _smoothed_for(source, grid)
    dtype = source.array.dtype
    known = {np.dtype(bool): np.uint8, np.dtype(np.float16): np.float32}
    image = sitk.GetImageFromArray(source.array.astype(known.get(dtype, dtype), copy=False))
    image.SetSpacing(source.spacing)
    image.SetOrigin(source.origin)
    image.SetDirection(source.direction.ravel().tolist())
    resample = sitk.ResampleImageFilter()
    resample.SetSize([int(n) for n in grid.shape[::-1]])
    resample.SetOutputSpacing(grid.spacing)
    resample.SetOutputOrigin(grid.origin)
    resample.SetOutputDirection(grid.direction.ravel().tolist())
    resample.SetInterpolator(sitk.sitkLinear if linear else sitk.sitkNearestNeighbor)
    if linear:
        resample.SetOutputPixelType(sitk.sitkFloat32)  # SimpleITK would cut the fraction off, not round
    resample.SetDefaultPixelValue(float(pad))
    return _cast(sitk.GetArrayFromImage(resample.Execute(image)), dtype)


def _smoothed_for(source: Volume, grid: Volume) -> Volume:
    """The source at about the target's spacing where that is coarser, against aliasing."""
    order, _ = _nearest_axes(source.direction.T @ grid.direction)
    coarser = [max(source.spacing[axis], grid.spacing[order[axis]]) for axis in range(3)]
    if np.allclose(coarser, source.spacing):
        return source
    return source.resample(coarser, Interpolation.LINEAR)
