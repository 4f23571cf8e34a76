"""Interlobar fissures: measured height functions, lobe labels, distances and incomplete pieces.

Coordinates are relative to the box of one lung: X from medial (0) to lateral (1), Y from the front (0) to the back (1),
Z from the base (0) to the apex (1).

* oblique fissure: ``(Z - Y) / sqrt(2) = c . (1, x, q, x^2, x q, q^2, q^3)`` with ``x = X - 0.5`` and
  ``q = (Y + Z) / sqrt(2) - 0.7``, a height over the diagonal plane from the lower front to the upper back;
* horizontal fissure: ``Z = c . (1, x, y, x^2, x y, y^2)`` with ``y = Y - 0.4``, above the oblique one.

Both describe real fissures to 1-3 mm (root mean square over the 13 lobe maps named in ``shape_statistics``); what
remains is drawn as smooth noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from training.phantom.grid import Grid, SmoothNoise, upsample

__all__ = ["Fissures", "LungBoxes", "draw_fissures", "label_lobes"]

#: Means and standard deviations of the coefficients, 12 real maps (LUNA16 lobe maps, see ``shape_statistics``).
OBLIQUE_MEAN = np.array(
    [[-0.029, -0.017, -0.085, -0.052, -0.179, -0.191, -0.36], [-0.052, 0.007, 0.088, 0.059, -0.397, -0.200, -0.042]]
)
OBLIQUE_SD = np.array(
    [[0.048, 0.107, 0.151, 0.122, 0.111, 0.128, 0.308], [0.052, 0.095, 0.137, 0.148, 0.173, 0.143, 0.230]]
)
HORIZONTAL_MEAN = np.array([0.539, 0.006, 0.109, -0.080, -0.132, -0.170])
HORIZONTAL_SD = np.array([0.066, 0.151, 0.117, 0.152, 0.178, 0.224])
#: Larger correlations between coefficients (first index, second index, value); coefficients in the order right oblique
#: (0-6), left oblique (7-13), horizontal (14-19).
PAIRS = (
    (1, 3, -0.8), (2, 6, -0.5), (7, 9, -0.65), (8, 11, -0.6), (10, 12, 0.6), (15, 17, -0.55), (17, 18, 0.6),
    (14, 15, 0.5), (0, 14, 0.82), (0, 15, 0.6), (1, 17, 0.65), (3, 17, -0.6), (0, 7, 0.65), (0, 4, 0.3), (7, 14, 0.5),
)  # fmt: skip
#: Frequency and reach of incomplete fissures (right oblique, left oblique, right horizontal); the reach is the share
#: of the lung's width, counted from the hilum, over which the lobes are fused. Frequencies after anatomical and CT
#: series (horizontal 60-70 %, oblique 30-50 %).
INCOMPLETE_RATE = (0.45, 0.40, 0.65)
INCOMPLETE_REACH = ((0.35, 0.75), (0.35, 0.75), (0.4, 1.3))


@dataclass(frozen=True)
class LungBoxes:
    """Boxes of the right and the left lung: LPS corners of shape (2, 3), low and high."""

    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(lungs: np.ndarray, grid: Grid) -> LungBoxes:
        """Boxes of a lung map [k, j, i], 1 right, 2 left."""
        lows, highs = [], []
        for part in (lungs == 1, lungs == 2):
            index = [np.flatnonzero(part.any(axis=a)) for a in ((1, 2), (0, 2), (0, 1))]
            lows.append(grid.to_point(np.array([n[0] - 0.5 for n in index])))
            highs.append(grid.to_point(np.array([n[-1] + 0.5 for n in index])))
        return LungBoxes(np.array(lows), np.array(highs))


@dataclass(frozen=True)
class Fissures:
    """Drawn fissures.

    Attributes:
        oblique: (2, 7) coefficients, right and left.
        horizontal: (6,) coefficients.
        reach: share of the lung's width over which each is fused (right oblique, left oblique, horizontal); 0 complete.
        waves: amplitude (mm) and wavelength (mm) of the smooth noise.
        bend: amplitude and wave numbers (relative) of an added sine, used by the shifted generator only.
    """

    oblique: np.ndarray
    horizontal: np.ndarray
    reach: np.ndarray
    waves: tuple[tuple[float, float], ...]
    bend: tuple[float, float, float] = (0.0, 0.0, 0.0)


def _correlated(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Oblique (2, 7) and horizontal (6,) coefficients from their joint normal distribution, cut at two deviations."""
    matrix = np.eye(20)
    for a, b, value in PAIRS:
        matrix[a, b] = matrix[b, a] = value
    values, vectors = np.linalg.eigh(matrix)
    root = vectors * np.sqrt(np.clip(values, 0.01, None))
    root /= np.linalg.norm(root, axis=1, keepdims=True)
    normal = np.clip(root @ rng.standard_normal(20), -2, 2)
    oblique = OBLIQUE_MEAN + OBLIQUE_SD * normal[:14].reshape(2, 7)
    return oblique, HORIZONTAL_MEAN + HORIZONTAL_SD * normal[14:]


def draw_fissures(rng: np.random.Generator, shifted: bool = False) -> Fissures:
    """Random fissures as in real lungs; ``shifted``: planes with a sine instead of the measured polynomials."""
    oblique, horizontal = _correlated(rng)
    reach = np.array(
        [rng.uniform(*span) if rng.random() < rate else 0.0 for rate, span in zip(INCOMPLETE_RATE, INCOMPLETE_REACH)]
    )
    waves: tuple[tuple[float, float], ...] = ((float(rng.uniform(0.8, 2.2)), 60.0), (float(rng.uniform(0.2, 0.8)), 22.0))
    if not shifted:
        return Fissures(oblique, horizontal, reach, waves)
    oblique[:, 3:] = 0
    oblique[:, 2] += rng.uniform(-0.1, 0.1, 2)
    horizontal[3:] = 0
    bend = (float(rng.uniform(0.01, 0.03)), float(rng.uniform(0.4, 0.9)), float(rng.uniform(0.5, 1.1)))
    return Fissures(oblique, horizontal, reach, ((float(rng.uniform(1, 3)), 40.0),), bend)


@njit(cache=True, fastmath=True)
def _label(lungs, lobes, distance, complete, origin, spacing, low, high, oblique, horizontal, bend, hilum, reach, noise):  # type: ignore[no-untyped-def] # noqa: E501
    nk, nj, ni = lungs.shape
    root = np.float32(0.70710678)
    for k in range(nk):
        for j in range(nj):
            for i in range(ni):
                side = lungs[k, j, i] - 1
                if side < 0:
                    continue
                px, py, pz = origin[0] + spacing * i, origin[1] + spacing * j, origin[2] + spacing * k
                w, d, h = high[side, 0] - low[side, 0], high[side, 1] - low[side, 1], high[side, 2] - low[side, 2]
                gx = (px - low[side, 0]) / w
                if side == 0:
                    gx = 1 - gx
                gy, gz = (py - low[side, 1]) / d, (pz - low[side, 2]) / h
                x = gx - np.float32(0.5)
                q = min(max((gy + gz) * root - np.float32(0.7), np.float32(-0.52)), np.float32(0.56))
                c = oblique[side]
                phase = bend[1] * gx * 6.2832 + bend[2] * (gy + gz) * 3.1416
                value = (gz - gy) * root - bend[0] * np.sin(phase)
                value -= c[0] + x * (c[1] + c[3] * x + c[4] * q) + q * (c[2] + q * (c[5] + c[6] * q))
                sx = (c[1] + 2 * c[3] * x + c[4] * q) / w
                sq = (c[2] + c[4] * x + q * (2 * c[5] + 3 * c[6] * q)) * root
                sy, sz = (root + sq) / d, (root - sq) / h
                a = value / np.sqrt(sx * sx + sy * sy + sz * sz) + noise[0, k, j, i]
                dx, dy, dz = px - hilum[side, 0], py - hilum[side, 1], pz - hilum[side, 2]
                far = np.sqrt(dx * dx + dy * dy + dz * dz) / (w * np.float32(1.1)) + noise[2, k, j, i]
                best, whole = abs(a), far >= reach[side]
                if a < 0:
                    code = 3 if side == 0 else 5
                elif side == 1:
                    code = 4
                else:
                    code = 1
                if side == 0:
                    y = gy - np.float32(0.4)
                    t = horizontal
                    value = gz - bend[0] * np.sin(phase + 1)
                    value -= t[0] + x * (t[1] + t[3] * x + t[4] * y) + y * (t[2] + t[5] * y)
                    sx = (t[1] + 2 * t[3] * x + t[4] * y) / w
                    sy, sz = (t[2] + t[4] * x + 2 * t[5] * y) / d, 1 / h
                    b = value / np.sqrt(sx * sx + sy * sy + sz * sz) + noise[1, k, j, i]
                    if a >= 0 and b < 0:
                        code = 2
                    if a > -2:
                        # beyond the oblique fissure the horizontal one ends: distance to its edge
                        e = abs(b) if a >= 0 else np.sqrt(b * b + a * a)
                        if e < best:
                            best, whole = e, far >= reach[2]
                lobes[k, j, i] = code
                distance[k, j, i] = min(best, np.float32(12))
                complete[k, j, i] = 1 if whole else 0


def label_lobes(
    lungs: np.ndarray, grid: Grid, boxes: LungBoxes, fissures: Fissures, hila: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide lungs into lobes.

    Args:
        lungs: uint8 [k, j, i], 1 right, 2 left, 0 outside.
        grid: its grid.
        boxes: boxes of both lungs.
        fissures: coefficients.
        hila: (2, 3) LPS points of the right and the left hilum.
        rng: source of the smooth noise.

    Returns:
        lobes (uint8, ``Lobe`` codes), distance to the nearest fissure (float32, mm, at most 12), complete (uint8).
    """
    low, high = boxes.low.min(0), boxes.high.max(0)
    coarse = grid.coarse(4.0)
    noise = np.zeros((3, *coarse.shape), np.float32)
    for amplitude, wavelength in fissures.waves:
        for n in range(2):
            noise[n] += amplitude * SmoothNoise(rng, low, high, wavelength).on(coarse)
    noise[2] = 0.12 * SmoothNoise(rng, low, high, 40.0).on(coarse)
    fine = np.stack([upsample(n, coarse, grid) for n in noise])
    lobes, complete = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    distance = np.full(grid.shape, 12, np.float32)
    numbers = (np.array(grid.origin), grid.spacing, boxes.low, boxes.high, fissures.oblique, fissures.horizontal)
    arrays = [np.asarray(n, np.float32) for n in (*numbers, fissures.bend, hila, fissures.reach)]
    _label(lungs.astype(np.int8), lobes, distance, complete, arrays[0], np.float32(grid.spacing), *arrays[2:], fine)
    return lobes, distance, complete
