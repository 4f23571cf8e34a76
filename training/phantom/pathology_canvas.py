"""What a disease paints on, and the fields it is made of: noise and distances fixed in the patient's space."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit
from scipy import ndimage

from training.phantom.render_grid import LUNG_CODE, Frame
from training.phantom.render_tissue import _lookup, texture_tile

__all__ = ["Canvas", "DepthMap", "Patch", "noise_field"]


@dataclass
class Canvas:
    """What a disease may change, all [k, j, i] on ``frame``.

    Attributes:
        labels: uint8 joint codes.
        hu: float32 HU before vessels and airways are drawn; None where labels alone are made.
        erased: bool, where no vessel or airway is left.
        dense: bool, soft tissue in which a vessel without contrast cannot be told.
        enhancement: of perfused tissue, HU.
        masks: bool mask of each disease by name.
    """

    frame: Frame
    labels: np.ndarray
    hu: np.ndarray | None
    enhancement: float = 0.0
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.erased = np.zeros(self.frame.shape, np.bool_)
        self.dense = np.zeros(self.frame.shape, np.bool_)

    def patch(self, center: np.ndarray, reach: float) -> Patch | None:
        """The part within ``reach`` mm of a point along each axis; None where it is out of the frame."""
        slices = []
        for axis in (2, 1, 0):
            position = (center[axis] - self.frame.origin[axis]) / self.frame.step[axis]
            width = reach / self.frame.step[axis]
            low = max(0, int(np.ceil(position - width)))
            high = min(self.frame.shape[2 - axis], int(np.floor(position + width)) + 1)
            if low >= high:
                return None
            slices.append(slice(low, high))
        return Patch(self, (slices[0], slices[1], slices[2]))

    def whole(self) -> Patch:
        """All of it."""
        k, j, i = self.frame.shape
        return Patch(self, (slice(0, k), slice(0, j), slice(0, i)))


@dataclass
class Patch:
    """A block of a canvas."""

    canvas: Canvas
    slices: tuple[slice, slice, slice]

    @property
    def frame(self) -> Frame:
        frame = self.canvas.frame
        x, y, z = (o + s.start * d for o, s, d in zip(frame.origin, self.slices[::-1], frame.step, strict=True))
        k, j, i = (s.stop - s.start for s in self.slices)
        return Frame((x, y, z), frame.step, (k, j, i))

    @property
    def labels(self) -> np.ndarray:
        return self.canvas.labels[self.slices]

    @property
    def lung(self) -> np.ndarray:
        """Bool: lung voxels."""
        return self.labels >= LUNG_CODE

    @property
    def extent(self) -> float:
        """Width of a soft edge, mm: a voxel."""
        return self.frame.voxel

    def offsets(self, center: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(x, y, z) mm from a point, open grids that broadcast to the patch."""
        frame = self.frame
        x, y, z = ((frame.axis(axis) - center[axis]).astype(np.float32) for axis in range(3))
        return x[None, None, :], y[None, :, None], z[:, None, None]

    def noise(self, seed: int, grain: float) -> np.ndarray:
        """Smooth noise of unit variance and a grain in mm."""
        return noise_field(seed, grain, self.frame)

    def soft(self, level: np.ndarray) -> np.ndarray:
        """Coverage 0-1 from a signed distance (mm, negative inside)."""
        return np.clip(0.5 - level / self.extent, 0, 1)

    def blend(self, alpha: np.ndarray, value: np.ndarray | float) -> None:
        """Mix HU towards a value."""
        if self.canvas.hu is not None:
            hu = self.canvas.hu[self.slices]
            hu += alpha.astype(np.float32) * (np.asarray(value, np.float32) - hu)

    def brighten(self, amount: np.ndarray, ceiling: float = 40.0) -> None:
        """Add HU, but not beyond soft tissue."""
        if self.canvas.hu is not None:
            hu = self.canvas.hu[self.slices]
            np.copyto(hu, np.minimum(hu + amount, np.maximum(hu, ceiling)), casting="same_kind")

    def mark(self, name: str, inside: np.ndarray, dense: bool = False, erased: bool = False) -> None:
        """Record where a disease lies and what it does to the trees."""
        mask = self.canvas.masks.setdefault(name, np.zeros(self.canvas.frame.shape, np.bool_))
        mask[self.slices] |= inside
        if dense:
            self.canvas.dense[self.slices] |= inside
        if erased:
            self.canvas.erased[self.slices] |= inside


def noise_field(seed: int, grain: float, frame: Frame) -> np.ndarray:
    """Smooth noise of unit variance at a frame's voxels, float32 [k, j, i]; the same in space on any grid."""
    out = np.empty(frame.shape, np.float32)
    _fill(texture_tile(seed % 64 + 100), np.asarray(frame.origin), np.asarray(frame.step), 1.0 / grain, seed, out)
    return out


@njit(cache=True, fastmath=True)
def _fill(tile, origin, step, inverse, seed, out):  # type: ignore[no-untyped-def]
    shift = 7.31 * (seed % 1000)
    for k in range(out.shape[0]):
        z = (origin[2] + k * step[2]) * inverse + shift
        for j in range(out.shape[1]):
            y = (origin[1] + j * step[1]) * inverse + 1.7 * shift
            for i in range(out.shape[2]):
                x = (origin[0] + i * step[0]) * inverse + 2.9 * shift
                out[k, j, i] = _lookup(tile, x, y, z)


@dataclass(frozen=True)
class DepthMap:
    """Distance to the lung surface inside the lungs.

    Attributes:
        depth: float32 [k, j, i] mm, 0 outside the lung.
        frame: its grid.
    """

    depth: np.ndarray
    frame: Frame

    @classmethod
    def of_lung(cls, lung: np.ndarray, frame: Frame, stride: int = 2) -> DepthMap:
        """Of a bool lung mask [k, j, i]; every ``stride``-th voxel is enough."""
        small = lung[::stride, ::stride, ::stride]
        x, y, z = (step * stride for step in frame.step)
        depth = ndimage.distance_transform_edt(small, sampling=(z, y, x)).astype(np.float32)
        depth = ndimage.gaussian_filter(depth, 0.8)
        k, j, i = small.shape
        return cls(depth, Frame(frame.origin, (x, y, z), (k, j, i)))

    def at(self, frame: Frame) -> np.ndarray:
        """Depth on another grid, float32 [k, j, i]."""
        out = np.zeros(frame.shape, np.float32)
        target, own = (np.asarray([f.origin, f.step]) for f in (frame, self.frame))
        _trilinear(self.depth, target[0], target[1], own[0], own[1], out)
        return out


@njit(cache=True, fastmath=True)
def _trilinear(values, origin, step, source, spacing, out):  # type: ignore[no-untyped-def]
    nk, nj, ni = values.shape
    for k in range(out.shape[0]):
        z = min(max((origin[2] + k * step[2] - source[2]) / spacing[2], 0.0), nk - 1.001)
        a = int(z)
        w = z - a
        for j in range(out.shape[1]):
            y = min(max((origin[1] + j * step[1] - source[1]) / spacing[1], 0.0), nj - 1.001)
            b = int(y)
            v = y - b
            for i in range(out.shape[2]):
                x = min(max((origin[0] + i * step[0] - source[0]) / spacing[0], 0.0), ni - 1.001)
                c = int(x)
                u = x - c
                low = (values[a, b, c] * (1 - u) + values[a, b, c + 1] * u) * (1 - v)
                low += (values[a, b + 1, c] * (1 - u) + values[a, b + 1, c + 1] * u) * v
                high = (values[a + 1, b, c] * (1 - u) + values[a + 1, b, c + 1] * u) * (1 - v)
                high += (values[a + 1, b + 1, c] * (1 - u) + values[a + 1, b + 1, c + 1] * u) * v
                out[k, j, i] = low * (1 - w) + high * w
