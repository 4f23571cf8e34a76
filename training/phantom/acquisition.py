"""What the scanner does to the anatomy: contrast phase, kernel, slice profile, dose noise, streaks, motion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numba import njit
from scipy import fft, ndimage

from training.phantom.render_grid import Frame

__all__ = [
    "Contrast",
    "Phase",
    "Regime",
    "Scan",
    "add_noise",
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
        values[3] = min(values[3], 900.0)
        return cls(*(float(value) for value in values))


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

    @classmethod
    def sample(cls, rng: np.random.Generator, regime: Regime | None = None) -> Scan:
        """A clinical scan (70 %) or, with ``Regime.RANDOM``, one with random intensities."""
        if regime is None:
            regime = Regime.PHYSICS if rng.random() < 0.7 else Regime.RANDOM
        thickness = float(rng.choice([0.6, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 5.0], p=[0.07, 0.2, 0.2, 0.1, 0.1, 0.17, 0.1, 0.06]))
        gap = thickness * float(rng.choice([0.7, 1.0], p=[0.35, 0.65]))
        phase = rng.choice(list(Phase), p=[0.4, 0.14, 0.2, 0.13, 0.13])
        plane = float(rng.uniform(0.6, 0.95))
        scan = cls(
            spacing=(plane, plane, gap),
            thickness=thickness,
            interval=gap,
            noise=float(np.exp(rng.uniform(np.log(6), np.log(60)))),
            contrast=Contrast.of_phase(phase, rng),
            motion=float(rng.exponential(1.2)) if rng.random() < 0.5 else 0.0,
            streaks=float(rng.uniform(0, 1)) if rng.random() < 0.4 else 0.0,
            regime=regime,
        )
        return scan.with_kernel(float(rng.random()))

    def with_kernel(self, sharpness: float) -> Scan:
        """Kernel from soft (0) to sharp (1): resolution, edge enhancement and noise texture go together."""
        sharp = float(np.clip(sharpness, 0, 1))
        return replace(self, blur=0.85 - 0.45 * sharp, edge=1.3 * max(0.0, sharp - 0.4) ** 1.2, nps_peak=0.22 + 0.33 * sharp)

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
    sharp = _gaussian(hu, (0.0, sigma[1], sigma[0]))
    if scan.edge <= 0:
        return sharp
    wide = _gaussian(sharp, (0.0, 1.0 / frame.step[1], 1.0 / frame.step[0]))
    return sharp + np.float32(scan.edge) * (sharp - wide)


def _gaussian(array: np.ndarray, sigma: tuple[float, float, float]) -> np.ndarray:
    for axis, width in enumerate(sigma):
        if width > 0.15:
            array = _convolve(array, _kernel(width), axis)
    return array


def _kernel(sigma: float) -> np.ndarray:
    """Gaussian integrated over voxels, odd length, float32."""
    reach = max(1, int(np.ceil(3 * sigma)))
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (x / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _convolve(array: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    out = np.empty_like(array)
    (_convolve_k, _convolve_j, _convolve_i)[axis](np.ascontiguousarray(array), kernel, out)
    return out


@njit(cache=True, fastmath=True)
def _convolve_k(array, kernel, out):  # type: ignore[no-untyped-def]
    reach = len(kernel) // 2
    last = array.shape[0] - 1
    for k in range(array.shape[0]):
        for j in range(array.shape[1]):
            out[k, j] = 0
            for m in range(len(kernel)):
                source = min(max(k + m - reach, 0), last)
                for i in range(array.shape[2]):
                    out[k, j, i] += kernel[m] * array[source, j, i]


@njit(cache=True, fastmath=True)
def _convolve_j(array, kernel, out):  # type: ignore[no-untyped-def]
    reach = len(kernel) // 2
    last = array.shape[1] - 1
    for k in range(array.shape[0]):
        for j in range(array.shape[1]):
            out[k, j] = 0
            for m in range(len(kernel)):
                source = min(max(j + m - reach, 0), last)
                for i in range(array.shape[2]):
                    out[k, j, i] += kernel[m] * array[k, source, i]


@njit(cache=True, fastmath=True)
def _convolve_i(array, kernel, out):  # type: ignore[no-untyped-def]
    reach = len(kernel) // 2
    size = array.shape[2]
    padded = np.empty(size + 2 * reach, np.float32)
    for k in range(array.shape[0]):
        for j in range(array.shape[1]):
            padded[:reach] = array[k, j, 0]
            padded[reach : reach + size] = array[k, j]
            padded[reach + size :] = array[k, j, size - 1]
            out[k, j] = 0
            for m in range(len(kernel)):
                for i in range(size):
                    out[k, j, i] += kernel[m] * padded[i + m]


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


def noise_tile(rng: np.random.Generator, step: tuple[float, float, float], peak: float, thickness: float, size: int = 96) -> np.ndarray:
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
    fx, fy = (np.fft.fftfreq(size, d) for d in step[:2])
    fz = fx_half = np.fft.fftfreq(size, step[2])
    fx_half = np.fft.rfftfreq(size, step[0])
    plane = np.hypot(fy[:, None], fx_half[None])
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


def path_noise(attenuation: np.ndarray, step: float, angles: int = 12, modulation: float = 0.55) -> np.ndarray:
    """Local noise level from the attenuation along all rays through a point.

    Args:
        attenuation: float32 [k, j, i], per mm, on a coarse grid.
        step: mm of the grid, in plane.
        angles: directions over a half turn.
        modulation: exponent below 1: the tube current follows the patient's size.

    Returns:
        float32 [k, j, i], 1 in the middle of 300 mm of water.
    """
    reference = 0.0192 * 300
    out = np.empty(attenuation.shape, np.float32)
    directions = np.pi * (np.arange(angles) + 0.5) / angles
    _path_noise(attenuation.astype(np.float32), step, np.cos(directions), np.sin(directions), modulation, reference, out)
    return out


@njit(cache=True, fastmath=True)
def _path_noise(mu, step, cosines, sines, modulation, reference, out):  # type: ignore[no-untyped-def]
    nk, nj, ni = mu.shape
    bins = int(np.hypot(nj, ni)) + 4
    paths = np.zeros((len(cosines), bins), np.float32)
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
        for j in range(nj):
            for i in range(ni):
                total = 0.0
                for a in range(len(cosines)):
                    s = (i - ni / 2) * cosines[a] + (j - nj / 2) * sines[a] + bins / 2
                    total += np.exp(modulation * (paths[a, int(s + 0.5)] - reference))
                out[k, j, i] = np.sqrt(total / len(cosines))


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
