"""A smooth random displacement of space that bends the regular shapes of the phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.phantom.grid import Grid, SmoothNoise, sample_at

__all__ = ["Warp"]


@dataclass
class Warp:
    """Shapes at p are looked up at p + u(p).

    Attributes:
        grid: coarse grid.
        u: (3, k, j, i) float32 displacement in x, y, z, mm.
    """

    grid: Grid
    u: np.ndarray

    @staticmethod
    def draw(rng: np.random.Generator, grid: Grid, waves: tuple[tuple[float, float], ...]) -> Warp:
        """A random warp from (amplitude mm, wavelength mm) pairs; none gives the identity."""
        low, high = np.array([-220.0, -80, -60]), np.array([220.0, 320, 460])
        u = np.zeros((3, *grid.shape), np.float32)
        for amplitude, wavelength in waves:
            for axis in range(3):
                u[axis] += np.float32(amplitude) * SmoothNoise(rng, low, high, wavelength).on(grid)
        return Warp(grid, u)

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions in the shape's frame of the grid's voxels."""
        x, y, z = self.grid.points()
        return x + self.u[0], y + self.u[1], z + self.u[2]

    def back(self, points: np.ndarray) -> np.ndarray:
        """Real positions (n, 3) of points (n, 3) of the shape's frame, by fixed-point iteration."""
        points = np.atleast_2d(points).astype(np.float64)
        q = points.copy()
        for _ in range(8):
            q = points - np.stack([sample_at(self.u[a], self.grid, q) for a in range(3)], axis=1)
        return q
