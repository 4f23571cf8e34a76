"""What the scanner does to the anatomy: contrast phase, kernel, slice profile, dose noise, streaks, motion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numba import njit
from scipy import fft, ndimage

from training.phantom.render_grid import Frame, gaussian

__all__ = [
    "Contrast",
    "Phase",
    "Regime",
    "Scan",
    "add_contrast_streaks",
    "add_noise",
    "add_shoulder_streaks",
    "blur_in_plane",
    "blur_motion",
    "noise_tile",
    "path_noise",
    "slice_profile",
]


class Regime(Enum):
    """How intensities are made: like a scanner, or at random so that a net learns shape alone."""

    PHYSICS = "physics"
    RANDOM = "random"


class Phase(Enum):
    """Contrast phase of the vessels."""

    NONE = "none"
    PULMONARY = "pulmonary"
    MIXED = "mixed"
    SYSTEMIC = "systemic"
    LATE = "late"


#: Clinical slice thicknesses, mm, and how often each occurs.
_THICKNESS = {0.6: 0.07, 1.0: 0.2, 1.25: 0.2, 1.5: 0.1, 2.0: 0.1, 2.5: 0.17, 3.0: 0.1, 5.0: 0.06}


@dataclass(frozen=True)
class Contrast:
    """Enhancement over unenhanced blood, HU, of each vascular bed."""

    pulmonary_artery: float = 0.0
    pulmonary_vein: float = 0.0
    left_heart: float = 0.0
    vena_cava: float = 0.0
    right_atrium: float = 0.0
    organs: float = 0.0

    @classmethod
    def of_phase(cls, phase: Phase, rng: np.random.Generator) -> Contrast:
        """A draw of a phase: the dye passes vena cava, right heart, lungs, left heart, organs in turn."""
        if phase is Phase.NONE:
            return cls()
        peak = rng.uniform(120, 400)
        shares = {
            Phase.PULMONARY: ((0.8, 1.2), (0.2, 0.75), (0.05, 0.5), (1.0, 3.0), (0.8, 1.6), (0.0, 0.1)),
            Phase.MIXED: ((0.7, 1.0), (0.7, 1.0), (0.6, 1.0), (0.7, 2.5), (0.7, 1.3), (0.1, 0.3)),
            Phase.SYSTEMIC: ((0.3, 0.7), (0.6, 1.0), (0.8, 1.1), (0.3, 1.5), (0.3, 0.8), (0.2, 0.5)),
            Phase.LATE: ((0.35, 0.45), (0.35, 0.45), (0.35, 0.45), (0.3, 0.45), (0.35, 0.45), (0.4, 0.8)),
        }[phase]
        values = [peak * rng.uniform(*share) for share in shares]
        return cls(*(float(min(value, 900.0 if vessel == 3 else 400.0)) for vessel, value in enumerate(values)))


@dataclass(frozen=True)
class Scan:
    """Acquisition settings.

    Attributes:
        spacing: mm of the output along i, j, k.
        thickness: mm, width of the slice profile (box).
        interval: mm between the acquired slices; where it exceeds the output's k spacing, the output is interpolated
            linearly between them, as when a thick-sliced CT is resampled. 0: slices lie where the output's lie.
        blur: in-plane sigma of the kernel, mm.
        edge: edge enhancement of the kernel, 0 none to about 1.2 sharp.
        noise: sigma in HU of a 1 mm slice in the middle of a 300 mm water cylinder.
        nps_peak: in-plane frequency of most noise power, cycles per mm.
        contrast: enhancement per vascular bed.
        motion: mm, displacement near heart and diaphragm during the exposure.
        streaks: 0 none to 1 strong, at dense contrast and along the shoulders.
        regime: ``Regime``.
        coverage: (low, high) fractions of the anatomy's height in the field of view.
        field_margin: mm by which the circular field of view exceeds the lungs; beyond it the image is -1024.
    """

    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)
    thickness: float = 1.5
    interval: float = 0.0
    blur: float = 0.6
    edge: float = 0.0
    noise: float = 20.0
    nps_peak: float = 0.3
    contrast: Contrast = Contrast()
    motion: float = 0.0
    streaks: float = 0.0
    regime: Regime = Regime.PHYSICS
    coverage: tuple[float, float] = (0.0, 1.0)
    field_margin: float = float("inf")

    @classmethod
    def sample(cls, rng: np.random.Generator, regime: Regime | None = None) -> Scan:
        """A clinical scan (70 %) or, with ``Regime.RANDOM``, one with random intensities."""
        if regime is None:
            regime = Regime.PHYSICS if rng.random() < 0.7 else Regime.RANDOM
        thickness = float(rng.choice(list(_THICKNESS), p=list(_THICKNESS.values())))
        gap = thickness * float(rng.choice([0.7, 1.0], p=[0.35, 0.65]))
        phase = list(Phase)[int(rng.choice(len(Phase), p=[0.4, 0.14, 0.2, 0.13, 0.13]))]
        plane, sharp = float(rng.uniform(0.6, 0.95)), float(rng.random())
        scan = cls(
            spacing=(plane, plane, gap),
            thickness=thickness,
            interval=gap,
            noise=float(np.exp(rng.uniform(np.log(6), np.log(45)) + 0.8 * sharp)),
            contrast=Contrast.of_phase(phase, rng),
            motion=float(rng.exponential(1.2)) if rng.random() < 0.5 else 0.0,
            streaks=float(rng.uniform(0, 1)) if rng.random() < 0.4 else 0.0,
            regime=regime,
            coverage=(float(rng.uniform(0, 0.4)), float(rng.uniform(0.6, 1))) if rng.random() < 0.12 else (0.0, 1.0),
            field_margin=float(rng.uniform(3, 40)) if rng.random() < 0.3 else float("inf"),
        )
        return scan.with_kernel(sharp)

    def with_kernel(self, sharpness: float) -> Scan:
        """Kernel from soft (0) to sharp (1): resolution, edge enhancement and noise texture go together."""
        sharp = float(np.clip(sharpness, 0, 1))
        edge = 1.3 * max(0.0, sharp - 0.4) ** 1.2
        return replace(self, blur=0.85 - 0.45 * sharp, edge=edge, nps_peak=0.22 + 0.33 * sharp)

    def without_contrast(self) -> Scan:
        """The same scan before the dye."""
        return replace(self, contrast=Contrast())

    def at_dose(self, share: float) -> Scan:
        """The same scan at a share of its dose: noise grows with the inverse root."""
        return replace(self, noise=self.noise / float(np.sqrt(share)))


def blur_in_plane(hu: np.ndarray, frame: Frame, scan: Scan) -> np.ndarray:
    """The kernel's blur and edge enhancement, per slice, [k, j, i] float32."""
    # Partial volume of the grid itself already blurs by a box of one voxel.
    grid = np.array(frame.step[:2]) ** 2 / 12
    sigma = np.sqrt(np.maximum(scan.blur**2 - grid, 0)) / frame.step[:2]
    sharp = gaussian(hu, (0.0, sigma[1], sigma[0]))
    if scan.edge <= 0:
        return sharp
    wide = gaussian(sharp, (0.0, 1.0 / frame.step[1], 1.0 / frame.step[0]))
    return sharp + np.float32(scan.edge) * (sharp - wide)


def slice_profile(hu: np.ndarray, fine: Frame, coarse: Frame, thickness: float) -> np.ndarray:
    """Average thin slices into the acquired ones with a box of ``thickness`` mm.

    Args:
        hu: float32 [k, j, i] on ``fine``, a z split of a frame that contains ``coarse``'s slices.
        coarse: the acquired slices.
    """
    z_fine, z = fine.axis(2), coarse.axis(2)
    half = max(thickness, fine.step[2] * 1e-3) / 2
    edge = fine.step[2] / 2
    overlap = np.minimum(z_fine + edge, (z + half)[:, None]) - np.maximum(z_fine - edge, (z - half)[:, None])
    weights = np.maximum(overlap, 0).astype(np.float32)
    out = np.empty((len(z), *hu.shape[1:]), np.float32)
    for index, row in enumerate(weights):
        used = np.flatnonzero(row)
        if not len(used):
            used = np.array([int(np.argmin(np.abs(z_fine - z[index])))])
            row[used] = 1
        if len(used) == 1:
            out[index] = hu[used[0]]
        else:
            share = row[used] / row[used].sum()
            np.einsum("k,kji->ji", share, hu[used[0] : used[-1] + 1], out=out[index])
    return out


def noise_tile(
    rng: np.random.Generator, step: tuple[float, float, float], peak: float, thickness: float, size: int = 96
) -> np.ndarray:
    """Periodic noise with the power spectrum of filtered back-projection on a grid.

    In plane the power rises like a ramp and falls like a Gaussian, with its maximum at ``peak`` cycles per mm; along z
    it is white noise averaged over the slice. Frequencies the grid cannot carry are averaged out, so the variance is
    1 on a fine grid and smaller on a coarse one.

    Args:
        step: (x, y, z) mm of the grid.
        thickness: mm.
        size: edge of the tile, voxels.

    Returns:
        float32 (size, size, size) [k, j, i], with the variance of a unit-variance scan seen on this grid.
    """
    fx, fy, fz = np.fft.rfftfreq(size, step[0]), np.fft.fftfreq(size, step[1]), np.fft.fftfreq(size, step[2])
    plane = np.hypot(fy[:, None], fx[None])
    plane_power = plane * np.exp(-0.5 * (plane / peak) ** 2)
    plane_total = 2 * np.pi * peak**3 * np.sqrt(np.pi / 2)
    fall = (np.pi * thickness) ** 2 / 3
    axial_power, axial_total = np.exp(-fall * fz**2), np.sqrt(np.pi / fall)
    seen_plane = _power(plane_power, size) / (size * step[0] * size * step[1]) / plane_total
    seen_axial = axial_power.sum() / (size * step[2]) / axial_total
    amplitude = np.sqrt(axial_power[:, None, None] * plane_power[None]).astype(np.float32)
    white = rng.standard_normal((size,) * 3, dtype=np.float32)
    tile = fft.irfftn(fft.rfftn(white) * amplitude, s=white.shape)
    return (tile * np.sqrt(seen_plane * seen_axial) / tile.std()).astype(np.float32)


def _power(half: np.ndarray, size: int) -> float:
    """Sum over the whole plane of frequencies from its half."""
    double = half[:, 1 : (size + 1) // 2].sum()
    return float(half.sum() + double)


def path_noise(attenuation: np.ndarray, step: float, angles: int = 12, modulation: float = 0.5) -> np.ndarray:
    """Local noise level from the attenuation along all rays through a point.

    The variance is the mean of the rays' exp(attenuation); the tube current follows each view's densest ray in part;
    a share is alike everywhere (electronics, scatter, the reconstruction's spread), fitted to a real scan's air.

    Args:
        attenuation: float32 [k, j, i], per mm, on a coarse grid.
        step: mm of the grid, in plane.
        angles: directions over a half turn.
        modulation: 0-1, how far the tube current makes up for a view's densest ray.

    Returns:
        float32 [k, j, i], 1 in the middle of 300 mm of water.
    """
    reference = 0.0192 * 300
    out = np.empty(attenuation.shape, np.float32)
    directions = np.pi * (np.arange(angles) + 0.5) / angles
    rays = np.cos(directions), np.sin(directions)
    _path_noise(attenuation.astype(np.float32), step, *rays, modulation, reference, out)
    return out


@njit(cache=True, fastmath=True)
def _path_noise(mu, step, cosines, sines, modulation, reference, out):  # type: ignore[no-untyped-def]
    nk, nj, ni = mu.shape
    bins = int(np.hypot(nj, ni)) + 4
    paths = np.zeros((len(cosines), bins), np.float32)
    current = np.zeros(len(cosines), np.float32)
    for k in range(nk):
        paths[:] = 0
        for j in range(nj):
            for i in range(ni):
                if mu[k, j, i] > 0:
                    for a in range(len(cosines)):
                        s = (i - ni / 2) * cosines[a] + (j - nj / 2) * sines[a] + bins / 2
                        low = int(s)
                        paths[a, low] += mu[k, j, i] * step * (1 - (s - low))
                        paths[a, low + 1] += mu[k, j, i] * step * (s - low)
        for a in range(len(cosines)):
            current[a] = modulation * (paths[a].max() - reference)
        for j in range(nj):
            for i in range(ni):
                total = 0.0
                for a in range(len(cosines)):
                    s = (i - ni / 2) * cosines[a] + (j - nj / 2) * sines[a] + bins / 2
                    total += np.exp(paths[a, int(s + 0.5)] - reference - current[a])
                out[k, j, i] = np.sqrt(0.97 * total / len(cosines) + 0.03)


def add_noise(
    hu: np.ndarray, frame: Frame, scan: Scan, level: np.ndarray, rng: np.random.Generator, size: int = 96
) -> None:
    """Add dose noise in place.

    Args:
        hu: float32 [k, j, i] on ``frame``.
        level: float32 [k, j, i], local noise of ``path_noise`` on a grid of any shape over the same extent.
    """
    if scan.noise <= 0:
        return
    sigma = scan.noise / np.sqrt(max(scan.thickness, 0.3))
    tile = noise_tile(rng, frame.step, scan.nps_peak, scan.thickness, size)
    shift = rng.integers(0, size, 3)
    _add_tile(hu, tile, np.float32(sigma), level, shift)


@njit(cache=True, fastmath=True)
def _add_tile(hu, tile, sigma, level, shift):  # type: ignore[no-untyped-def]
    nk, nj, ni = hu.shape
    size = tile.shape[0]
    mk, mj, mi = level.shape
    for k in range(nk):
        kk = (k + shift[0]) % size
        z = min(k * mk // nk, mk - 1)
        for j in range(nj):
            jj = (j + shift[1]) % size
            v = max(0.0, min((j + 0.5) * mj / nj - 0.5, mj - 1.001))
            j0 = int(v)
            v -= j0
            j1 = min(j0 + 1, mj - 1)
            for i in range(ni):
                u = max(0.0, min((i + 0.5) * mi / ni - 0.5, mi - 1.001))
                i0 = int(u)
                u -= i0
                i1 = min(i0 + 1, mi - 1)
                local = (level[z, j0, i0] * (1 - u) + level[z, j0, i1] * u) * (1 - v)
                local += (level[z, j1, i0] * (1 - u) + level[z, j1, i1] * u) * v
                hu[k, j, i] += sigma * np.float32(local) * tile[kk, jj, (i + shift[2]) % size]


def blur_motion(hu: np.ndarray, weight: np.ndarray, frame: Frame, motion: float) -> np.ndarray:
    """Blend with a copy displaced along z and y where ``weight`` (0-1, any grid over the same extent) says it moves."""
    shift = [motion / frame.step[2], 0.5 * motion / frame.step[1]]
    moved = ndimage.uniform_filter1d(hu, max(1, round(2 * shift[0]) | 1), axis=0)
    moved = ndimage.uniform_filter1d(moved, max(1, round(2 * shift[1]) | 1), axis=1)
    zoom = [n / m for n, m in zip(hu.shape, weight.shape, strict=True)]
    local = ndimage.zoom(weight.astype(np.float32), zoom, order=1, grid_mode=True, mode="nearest")
    return hu + local * (moved - hu)


def lateral_excess(attenuation: np.ndarray, step: float) -> np.ndarray:
    """How much more noise the left-right rays of each row carry than the rays across, 0 where none.

    Args:
        attenuation: float32 [k, j, i], per mm, on a coarse grid of ``step`` mm.

    Returns:
        float32 [k, j, 1].
    """
    lateral = attenuation.sum(axis=2, keepdims=True) * step
    across = np.percentile(attenuation.sum(axis=1) * step, 80, axis=1)[:, None, None]
    return np.clip(np.exp(0.55 * (lateral - np.maximum(across, 3.0))) - 1, 0, 8).astype(np.float32)


def add_shoulder_streaks(
    hu: np.ndarray, frame: Frame, scan: Scan, excess: np.ndarray, rng: np.random.Generator
) -> None:
    """Left-right streaks and a dark band where the shoulders starve the detector of photons, in place.

    Args:
        excess: float32 of ``lateral_excess`` on a grid of any shape over the same extent; one column.
    """
    size = 64
    lengths = (0.6 * scan.thickness / frame.step[2], 0.8, 30 / frame.step[0])
    tile = ndimage.gaussian_filter(rng.standard_normal((size, size, 2 * size), dtype=np.float32), lengths, mode="wrap")
    tile *= np.float32(0.15 * (0.3 + scan.streaks) * scan.noise / np.sqrt(max(scan.thickness, 0.3)) / tile.std())
    zoom = [n / m for n, m in zip(hu.shape[:2], excess.shape[:2], strict=True)]
    rows = ndimage.zoom(excess[:, :, 0], zoom, order=1, grid_mode=True, mode="nearest")
    _add_rows(hu, tile, rows.astype(np.float32), np.float32(4.0 * scan.streaks))


@njit(cache=True, fastmath=True)
def _add_rows(hu, tile, rows, shade):  # type: ignore[no-untyped-def]
    nk, nj, ni = tile.shape
    for k in range(hu.shape[0]):
        for j in range(hu.shape[1]):
            level = rows[k, j]
            if level < 0.02:
                continue
            for i in range(hu.shape[2]):
                hu[k, j, i] += level * tile[k % nk, j % nj, i % ni]
                if hu[k, j, i] > -300:
                    hu[k, j, i] -= shade * level


def add_contrast_streaks(
    hu: np.ndarray, frame: Frame, sources: np.ndarray, strength: float, rng: np.random.Generator
) -> None:
    """Bright and dark rays around a vein full of dense contrast, in place.

    Args:
        sources: (M, 4) float: x, y, z LPS mm and radius mm of the vein in its slices, by rising z.
        strength: HU at the vein's edge.
    """
    if strength <= 0 or not len(sources):
        return
    order = np.arange(3, 22)
    phases = rng.uniform(0, 2 * np.pi, (2, len(order)))
    weight = rng.normal(0, 1, len(order)) / np.sqrt(len(order))
    turns = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    z = frame.axis(2)
    inside = (z >= sources[0, 2] - 4) & (z <= sources[-1, 2] + 4)
    for k in np.flatnonzero(inside):
        x, y, radius = (np.interp(z[k], sources[:, 2], sources[:, column]) for column in (0, 1, 3))
        drift = phases[0] + z[k] / 9.0 * np.cos(phases[1])
        rays = (weight[None] * np.cos(turns[:, None] * order + drift)).sum(axis=1).astype(np.float32)
        place = (x - frame.origin[0]) / frame.step[0], (y - frame.origin[1]) / frame.step[1]
        _add_rays(hu[k], rays, *place, frame.step[0], frame.step[1], radius, np.float32(strength))


@njit(cache=True, fastmath=True)
def _add_rays(plane, rays, x, y, dx, dy, radius, strength):  # type: ignore[no-untyped-def]
    reach = 90.0
    turn = len(rays) / (2 * np.pi)
    for j in range(max(0, int(y - reach / dy)), min(plane.shape[0], int(y + reach / dy) + 1)):
        for i in range(max(0, int(x - reach / dx)), min(plane.shape[1], int(x + reach / dx) + 1)):
            u, v = (i - x) * dx, (j - y) * dy
            r = np.sqrt(u * u + v * v)
            if r > reach:
                continue
            ray = rays[int((np.arctan2(v, u) + 2 * np.pi) * turn) % len(rays)]
            fall = np.exp(-(r - radius) / 22.0) if r > radius else r / radius
            plane[j, i] += strength * ray * fall
