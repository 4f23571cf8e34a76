"""Canonical grids of the phantom: coordinates, smooth random fields and fast resampling.

Arrays are indexed ``[k, j, i]``: k to superior, j to posterior, i to the patient's left (identity direction in LPS).
Smooth shapes are evaluated on a coarse grid and resampled to the fine one where they are compared with zero; this
makes the cost of a shape nearly independent of the voxel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

__all__ = ["Grid", "SmoothNoise", "sample_at", "upsample"]


@dataclass(frozen=True)
class Grid:
    """An isotropic canonical LPS grid.

    Attributes:
        spacing: edge of a voxel in mm.
        shape: voxels along (k, j, i).
        origin: LPS position (x, y, z) in mm of the center of voxel 0.
    """

    spacing: float
    shape: tuple[int, int, int]
    origin: tuple[float, float, float]

    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The x, y and z coordinates of the voxel centers along i, j and k, float32, mm."""
        counts = self.shape[::-1]
        x, y, z = (o + self.spacing * np.arange(n) for o, n in zip(self.origin, counts, strict=True))
        return x.astype(np.float32), y.astype(np.float32), z.astype(np.float32)

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Broadcastable float32 coordinates x (1, 1, i), y (1, j, 1), z (k, 1, 1) in LPS mm."""
        x, y, z = self.axes()
        return x[None, None, :], y[None, :, None], z[:, None, None]

    def to_index(self, points: np.ndarray) -> np.ndarray:
        """Continuous indices (k, j, i) of LPS points (x, y, z); both of shape (..., 3)."""
        return ((np.asarray(points, np.float64) - self.origin) / self.spacing)[..., ::-1]

    def to_point(self, indices: np.ndarray) -> np.ndarray:
        """LPS points (x, y, z) of indices (k, j, i); both of shape (..., 3)."""
        return np.asarray(indices, np.float64)[..., ::-1] * self.spacing + self.origin

    def coarse(self, spacing: float) -> Grid:
        """The grid of the given spacing with the same voxel 0 that covers this one (itself if it is as coarse)."""
        if self.spacing >= spacing:
            return self
        shape = tuple(int(np.ceil((n - 1) * self.spacing / spacing)) + 2 for n in self.shape)
        return Grid(spacing, (shape[0], shape[1], shape[2]), self.origin)

    def box(self, low: np.ndarray, high: np.ndarray) -> tuple[slice, slice, slice]:
        """Index slices (k, j, i) of the voxels between two LPS corners, cut to the grid (possibly empty)."""
        a = np.ceil(self.to_index(np.asarray(low))).astype(int)
        b = np.floor(self.to_index(np.asarray(high))).astype(int) + 1
        slices = [
            slice(int(max(p, 0)), int(max(min(q, n), max(p, 0)))) for p, q, n in zip(a, b, self.shape, strict=True)
        ]
        return slices[0], slices[1], slices[2]

    def part(self, box: tuple[slice, slice, slice]) -> Grid:
        """The grid of a box of this grid."""
        shape = tuple(s.stop - s.start for s in box)
        origin = self.to_point(np.array([s.start for s in box]))
        return Grid(
            self.spacing, (shape[0], shape[1], shape[2]), (float(origin[0]), float(origin[1]), float(origin[2]))
        )


class SmoothNoise:
    """A smooth random scalar field of space: a cubic B-spline with normal coefficients on a coarse lattice.

    The field belongs to space, not to a grid: the same seed gives the same field at every voxel size.
    """

    def __init__(self, rng: np.random.Generator, low: np.ndarray, high: np.ndarray, wavelength: float) -> None:
        """A field of unit standard deviation between two LPS corners, varying over ``wavelength`` mm."""
        self.step = wavelength / 2
        self.low = np.asarray(low, np.float64) - self.step
        counts = np.ceil((np.asarray(high) - self.low) / self.step).astype(int) + 4
        # 0.33 is the root mean square of the tensor product of three cubic B-spline bases (0.69 per axis).
        self.nodes = (rng.standard_normal(counts[::-1]) / 0.33).astype(np.float32)

    @staticmethod
    def around(rng: np.random.Generator, grid: Grid, wavelength: float) -> SmoothNoise:
        """A field over a box of fixed size at a grid's corner, so the draw does not depend on the grid's spacing."""
        low = np.array(grid.origin)
        return SmoothNoise(rng, low, low + [450.0, 420.0, 560.0], wavelength)

    def _basis(self, coordinates: np.ndarray, axis: int) -> np.ndarray:
        count = self.nodes.shape[2 - axis]
        t = (np.asarray(coordinates, np.float64) - self.low[axis]) / self.step
        d = np.abs(np.clip(t, 0, count - 3)[:, None] + 1 - np.arange(count)[None, :])
        near, far = 2 / 3 - d**2 + d**3 / 2, np.clip(2 - d, 0, None) ** 3 / 6
        return np.where(d < 1, near, far).astype(np.float32)

    def on(self, grid: Grid) -> np.ndarray:
        """The field at the voxels of a grid, float32 [k, j, i]."""
        x, y, z = grid.axes()
        field = np.tensordot(self._basis(z, 2), self.nodes, axes=(1, 0))
        field = np.einsum("jb,kbc->kjc", self._basis(y, 1), field, optimize=True)
        return np.matmul(field, self._basis(x, 0).T)

    def at(self, points: np.ndarray) -> np.ndarray:
        """The field at LPS points of shape (n, 3)."""
        points = np.atleast_2d(points)
        bx, by, bz = (self._basis(points[:, a], a) for a in range(3))
        return np.einsum("na,nb,nc,abc->n", bz, by, bx, self.nodes, optimize=True)


@njit(cache=True)
def _upsample(field, ratio, start, out):  # type: ignore[no-untyped-def]
    nk, nj, ni = out.shape
    ck, cj, ci = field.shape
    left = np.empty(ni, np.int64)
    weight = np.empty(ni, np.float32)
    for i in range(ni):
        t = (i + start[2]) * ratio
        left[i] = min(max(int(t), 0), ci - 2)
        weight[i] = t - left[i]
    row = np.empty(ci, np.float32)
    plane = np.empty((cj, ci), np.float32)
    for k in range(nk):
        t = (k + start[0]) * ratio
        a = min(max(int(t), 0), ck - 2)
        w = np.float32(t - a)
        for j in range(cj):
            for i in range(ci):
                plane[j, i] = field[a, j, i] * (np.float32(1) - w) + field[a + 1, j, i] * w
        for j in range(nj):
            t = (j + start[1]) * ratio
            b = min(max(int(t), 0), cj - 2)
            w2 = np.float32(t - b)
            for i in range(ci):
                row[i] = plane[b, i] * (np.float32(1) - w2) + plane[b + 1, i] * w2
            for i in range(ni):
                p = left[i]
                out[k, j, i] = row[p] + weight[i] * (row[p + 1] - row[p])


def upsample(field: np.ndarray, coarse: Grid, fine: Grid, box: tuple[slice, slice, slice] | None = None) -> np.ndarray:
    """Trilinear values of a coarse field at the voxels of a fine grid that shares voxel 0, or of a box of it."""
    shape = tuple(s.stop - s.start for s in box) if box else fine.shape
    start = np.array([s.start for s in box] if box else (0, 0, 0), np.int64)
    field = np.ascontiguousarray(field, np.float32)
    if coarse == fine:
        return field[box] if box else field
    out = np.empty(shape, np.float32)
    _upsample(field, np.float64(fine.spacing / coarse.spacing), start, out)
    return out


def sample_at(field: np.ndarray, grid: Grid, points: np.ndarray) -> np.ndarray:
    """Trilinear values of a field at LPS points (n, 3), the border value outside."""
    t = np.clip(grid.to_index(np.atleast_2d(points)), 0, np.array(grid.shape) - 1.001)
    base = t.astype(int)
    w = t - base
    value = np.zeros(len(t))
    for corner in np.ndindex(2, 2, 2):
        at = base + corner
        weight = np.prod(np.where(corner, w, 1 - w), axis=1)
        value += weight * field[at[:, 0], at[:, 1], at[:, 2]]
    return value
