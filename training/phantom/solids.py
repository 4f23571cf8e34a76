"""Tubes and ellipsoids: signed distances on a grid, smooth unions and direct painting into a label map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.interpolate import CubicSpline

from training.phantom.grid import Grid

__all__ = ["Ellipsoid", "Tube", "paint_tube", "smooth_union", "spline"]


@dataclass
class Tube:
    """A polyline with a radius at each point.

    Attributes:
        points: (n, 3) LPS mm.
        radii: (n,) mm.
    """

    points: np.ndarray
    radii: np.ndarray

    def bounds(self, margin: float) -> tuple[np.ndarray, np.ndarray]:
        reach = self.radii.max() + margin
        return self.points.min(0) - reach, self.points.max(0) + reach

    def distance(self, grid: Grid, margin: float) -> np.ndarray:
        """Signed distance (mm, negative inside) on a grid within ``margin`` mm, a large value farther away.

        Exact for a constant radius, first order in its taper.
        """
        out = np.full(grid.shape, margin + 50, np.float32)
        _tube_distance(out, np.array(grid.origin), grid.spacing, self.points, self.radii, margin)
        return out


@dataclass
class Ellipsoid:
    """A rotated ellipsoid: center (3,), radii (3,) in mm, axes (3, 3) with the unit axes as rows."""

    center: np.ndarray
    radii: np.ndarray
    axes: np.ndarray

    def bounds(self, margin: float) -> tuple[np.ndarray, np.ndarray]:
        reach = np.sqrt(((self.axes * self.radii[:, None]) ** 2).sum(0)) + margin
        return self.center - reach, self.center + reach

    def distance(self, grid: Grid, margin: float) -> np.ndarray:
        """Signed distance (mm, negative inside), first order."""
        x, y, z = grid.points()
        x, y, z = x - np.float32(self.center[0]), y - np.float32(self.center[1]), z - np.float32(self.center[2])
        near, slope = np.float32(0), np.float32(0)
        for axis, radius in zip(self.axes.astype(np.float32), self.radii, strict=True):
            t = (axis[0] * x + axis[1] * y + axis[2] * z) / np.float32(radius)
            near, slope = near + t * t, slope + (t / np.float32(radius)) ** 2
        k = np.sqrt(near)
        # k / slope tends to a radius in the very center
        radius = np.where(k > 1e-3, k / np.maximum(np.sqrt(slope), 1e-9), self.radii.min())
        return ((k - 1) * radius).astype(np.float32)


def spline(points: np.ndarray, radii: np.ndarray | float, step: float = 4.0) -> Tube:
    """A smooth tube through control points (n, 3), resampled about every ``step`` mm."""
    points = np.asarray(points, np.float64)
    radii = np.broadcast_to(np.asarray(radii, np.float64), len(points))
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    t = np.linspace(0, length[-1], max(int(length[-1] / step) + 1, 3))
    if len(points) < 3:
        return Tube(np.stack([np.interp(t, length, points[:, a]) for a in range(3)], 1), np.interp(t, length, radii))
    return Tube(CubicSpline(length, points, bc_type="natural")(t), np.interp(t, length, radii))


def smooth_union(total: np.ndarray, grid: Grid, solid: Tube | Ellipsoid, gap: float, blend: float) -> None:
    """Join a solid, widened by ``gap`` mm, into a distance field in place, rounding the junction over ``blend`` mm."""
    low, high = solid.bounds(gap + 2 * blend)
    box = grid.box(low, high)
    part = grid.part(box)
    if min(part.shape) == 0:
        return
    d = solid.distance(part, gap + 2 * blend) - np.float32(gap)
    old = total[box]
    h = np.clip(blend - np.abs(old - d), 0, None) / np.float32(blend)
    total[box] = np.minimum(old, d) - h * h * np.float32(blend / 4)


@njit(cache=True, fastmath=True)
def _tube_distance(out, origin, spacing, points, radii, margin):  # type: ignore[no-untyped-def]
    nk, nj, ni = out.shape
    for s in range(len(points) - 1):
        ax, ay, az = points[s]
        vx, vy, vz = points[s + 1, 0] - ax, points[s + 1, 1] - ay, points[s + 1, 2] - az
        length = vx * vx + vy * vy + vz * vz + 1e-9
        reach = max(radii[s], radii[s + 1]) + margin
        i0 = max(int((min(ax, ax + vx) - reach - origin[0]) / spacing), 0)
        i1 = min(int((max(ax, ax + vx) + reach - origin[0]) / spacing) + 2, ni)
        j0 = max(int((min(ay, ay + vy) - reach - origin[1]) / spacing), 0)
        j1 = min(int((max(ay, ay + vy) + reach - origin[1]) / spacing) + 2, nj)
        k0 = max(int((min(az, az + vz) - reach - origin[2]) / spacing), 0)
        k1 = min(int((max(az, az + vz) + reach - origin[2]) / spacing) + 2, nk)
        for k in range(k0, k1):
            pz = origin[2] + spacing * k - az
            for j in range(j0, j1):
                py = origin[1] + spacing * j - ay
                for i in range(i0, i1):
                    px = origin[0] + spacing * i - ax
                    t = min(max((px * vx + py * vy + pz * vz) / length, 0.0), 1.0)
                    dx, dy, dz = px - t * vx, py - t * vy, pz - t * vz
                    d = np.sqrt(dx * dx + dy * dy + dz * dz) - radii[s] - t * (radii[s + 1] - radii[s])
                    if d < out[k, j, i]:
                        out[k, j, i] = d


@njit(cache=True, fastmath=True)
def _paint_tube(labels, origin, spacing, points, radii, shell, outer, core, allowed):  # type: ignore[no-untyped-def]
    nk, nj, ni = labels.shape
    for s in range(len(points) - 1):
        ax, ay, az = points[s]
        vx, vy, vz = points[s + 1, 0] - ax, points[s + 1, 1] - ay, points[s + 1, 2] - az
        length = vx * vx + vy * vy + vz * vz + 1e-9
        reach = max(radii[s], radii[s + 1])
        i0 = max(int((min(ax, ax + vx) - reach - origin[0]) / spacing), 0)
        i1 = min(int((max(ax, ax + vx) + reach - origin[0]) / spacing) + 2, ni)
        j0 = max(int((min(ay, ay + vy) - reach - origin[1]) / spacing), 0)
        j1 = min(int((max(ay, ay + vy) + reach - origin[1]) / spacing) + 2, nj)
        k0 = max(int((min(az, az + vz) - reach - origin[2]) / spacing), 0)
        k1 = min(int((max(az, az + vz) + reach - origin[2]) / spacing) + 2, nk)
        for k in range(k0, k1):
            pz = origin[2] + spacing * k - az
            for j in range(j0, j1):
                py = origin[1] + spacing * j - ay
                for i in range(i0, i1):
                    old = labels[k, j, i]
                    if old == core or not allowed[old]:
                        continue
                    px = origin[0] + spacing * i - ax
                    t = min(max((px * vx + py * vy + pz * vz) / length, 0.0), 1.0)
                    dx, dy, dz = px - t * vx, py - t * vy, pz - t * vz
                    d = np.sqrt(dx * dx + dy * dy + dz * dz) - radii[s] - t * (radii[s + 1] - radii[s])
                    if d < -shell:
                        labels[k, j, i] = core
                    elif d < 0:
                        labels[k, j, i] = outer


def paint_tube(
    labels: np.ndarray, grid: Grid, tube: Tube, outer: int, core: int, allowed: np.ndarray, shell: float = 0.0
) -> None:
    """Paint a tube into a uint8 label map where ``allowed[label]`` (bool, 256): ``core`` deeper than ``shell`` mm."""
    mask = allowed.copy()
    mask[outer] = True
    points, radii = np.ascontiguousarray(tube.points), np.ascontiguousarray(tube.radii)
    _paint_tube(labels, np.array(grid.origin), grid.spacing, points, radii, shell, outer, core, mask)
