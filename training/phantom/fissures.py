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
#: Larger correlations between coefficients, measured and rounded (first index, second index, value); coefficients in
#: the order right oblique (0-6), left oblique (7-13), horizontal (14-19).
PAIRS = (
    (1, 3, -0.8), (2, 6, -0.5), (7, 9, -0.65), (8, 11, -0.6), (10, 12, 0.6), (15, 17, -0.55), (17, 18, 0.6),
    (14, 15, 0.5), (0, 14, 0.82), (0, 15, 0.6), (1, 17, 0.65), (3, 17, -0.6), (0, 7, 0.65), (0, 4, 0.3), (7, 14, 0.6),
)  # fmt: skip
#: Frequency and reach of incomplete fissures (right oblique, left oblique, right horizontal); the reach is the share
#: of the lung's width, counted from the hilum, over which the lobes are fused. Frequencies after anatomical and CT
#: series (horizontal 60-70 %, oblique 30-50 %).
INCOMPLETE_RATE = (0.45, 0.40, 0.65)
#: Accessory fissures in the right lower, left upper and left lower lobe.
ACCESSORY_RATE = (0.06, 0.05, 0.05)
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
        accessory: a visible fissure inside a lobe: lobe code (0 none), three coefficients, reach as above.
    """

    oblique: np.ndarray
    horizontal: np.ndarray
    reach: np.ndarray
    waves: tuple[tuple[float, float], ...]
    bend: tuple[float, float, float] = (0.0, 0.0, 0.0)
    accessory: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)


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
        [
            rng.uniform(*span) if rng.random() < rate else 0.0
            for rate, span in zip(INCOMPLETE_RATE, INCOMPLETE_REACH, strict=True)
        ]
    )
    accessory = _accessory(rng)
    if not shifted:
        waves = ((float(rng.uniform(0.8, 2.2)), 60.0), (float(rng.uniform(0.2, 0.8)), 22.0))
        return Fissures(oblique, horizontal, reach, waves, accessory=accessory)
    oblique[:, 3:] = 0
    oblique[:, 2] += rng.uniform(-0.1, 0.1, 2)
    horizontal[3:] = 0
    bend = (float(rng.uniform(0.01, 0.03)), float(rng.uniform(0.4, 0.9)), float(rng.uniform(0.5, 1.1)))
    return Fissures(oblique, horizontal, reach, ((float(rng.uniform(1, 3)), 40.0),), bend, accessory)


def _accessory(rng: np.random.Generator) -> tuple[float, float, float, float, float]:
    """A left horizontal or an inferior accessory fissure, in the outer part of its lobe; none in most."""
    lobe = float(rng.choice([0, 3, 4, 5], p=[1 - sum(ACCESSORY_RATE), *ACCESSORY_RATE]))
    reach = float(rng.uniform(0.35, 0.7))
    if lobe == 4:
        return (lobe, float(rng.normal(0.52, 0.05)), float(rng.normal(0, 0.1)), float(rng.normal(0.1, 0.1)), reach)
    return (lobe, float(rng.uniform(0.25, 0.5)), float(rng.normal(0.1, 0.25)), float(rng.uniform(0.25, 0.45)), reach)


@njit(cache=True, fastmath=True)
def _oblique_distance(c, bend, gx, gy, gz, size):  # type: ignore[no-untyped-def]
    """Signed distance (mm, positive above) to an oblique fissure, first order."""
    root = np.float32(0.70710678)
    x = gx - np.float32(0.5)
    q = min(max((gy + gz) * root - np.float32(0.7), np.float32(-0.52)), np.float32(0.56))
    value = (gz - gy) * root - bend[0] * np.sin(bend[1] * gx * 6.2832 + bend[2] * (gy + gz) * 3.1416)
    value -= c[0] + x * (c[1] + c[3] * x + c[4] * q) + q * (c[2] + q * (c[5] + c[6] * q))
    along = (c[2] + c[4] * x + q * (2 * c[5] + 3 * c[6] * q)) * root
    sx, sy, sz = (c[1] + 2 * c[3] * x + c[4] * q) / size[0], (root + along) / size[1], (root - along) / size[2]
    return value / np.sqrt(sx * sx + sy * sy + sz * sz)


@njit(cache=True, fastmath=True)
def _horizontal_distance(c, bend, gx, gy, gz, size):  # type: ignore[no-untyped-def]
    """Signed distance (mm, positive above) to a horizontal fissure, first order."""
    x, y = gx - np.float32(0.5), gy - np.float32(0.4)
    value = gz - bend[0] * np.sin(bend[1] * gx * 6.2832 + bend[2] * (gy + gz) * 3.1416 + 1)
    value -= c[0] + x * (c[1] + c[3] * x + c[4] * y) + y * (c[2] + c[5] * y)
    sx, sy, sz = (c[1] + 2 * c[3] * x + c[4] * y) / size[0], (c[2] + c[4] * x + 2 * c[5] * y) / size[1], 1 / size[2]
    return value / np.sqrt(sx * sx + sy * sy + sz * sz)


@njit(cache=True, fastmath=True)
def _lobe(side, a, b):  # type: ignore[no-untyped-def]
    """``Lobe`` code by side and signed distances to the oblique and the horizontal fissure."""
    if side == 1:
        return 5 if a < 0 else 4
    if a < 0:
        return 3
    return 2 if b < 0 else 1


@njit(cache=True, fastmath=True)
def _nearest(side, a, b, far, extra, reach):  # type: ignore[no-untyped-def]
    """Distance to the nearest fissure and whether that piece is there."""
    best, whole = abs(a), far >= reach[side]
    if side == 0 and a > -2:
        # behind the oblique fissure the horizontal one ends: distance to its edge
        e = abs(b) if a >= 0 else np.sqrt(b * b + a * a)
        if e < best:
            best, whole = e, far >= reach[2]
    if extra < best:
        best, whole = extra, True
    return min(best, np.float32(12)), whole


@njit(cache=True, fastmath=True)
def _accessory_distance(accessory, code, gx, gy, gz, far, size):  # type: ignore[no-untyped-def]
    """Distance (mm) to the accessory fissure of a lobe, a large value where there is none."""
    if code != accessory[0] or far < accessory[4]:
        return np.float32(1e3)
    if code == 4:
        return abs(gz - accessory[1] - accessory[2] * (gx - 0.5) - accessory[3] * (gy - 0.4)) * size[2]
    if gz > accessory[3]:
        return np.float32(1e3)
    return abs(gx - accessory[1] - accessory[2] * (gy - 0.6)) * size[0] * np.float32(0.94)


@njit(cache=True, fastmath=True)
def _label(
    lungs, grid, low, size, oblique, horizontal, bend, accessory, hilum, reach, noise, lobes, distance, complete
):  # type: ignore[no-untyped-def] # noqa: E501
    """Fill lobes, distance and complete; ``grid``: origin (3) and spacing; ``noise``: (3, k, j, i)."""
    for k in range(lungs.shape[0]):
        for j in range(lungs.shape[1]):
            for i in range(lungs.shape[2]):
                side = lungs[k, j, i] - 1
                if side < 0:
                    continue
                px, py, pz = grid[0] + grid[3] * i, grid[1] + grid[3] * j, grid[2] + grid[3] * k
                box = size[side]
                gx, gy, gz = (px - low[side, 0]) / box[0], (py - low[side, 1]) / box[1], (pz - low[side, 2]) / box[2]
                if side == 0:
                    gx = 1 - gx
                a = _oblique_distance(oblique[side], bend, gx, gy, gz, box) + noise[0, k, j, i]
                b = np.float32(1e3)
                if side == 0:
                    b = _horizontal_distance(horizontal, bend, gx, gy, gz, box) + noise[1, k, j, i]
                dx, dy, dz = px - hilum[side, 0], py - hilum[side, 1], pz - hilum[side, 2]
                far = np.sqrt(dx * dx + dy * dy + dz * dz) / (box[0] * np.float32(1.1)) + noise[2, k, j, i]
                code = _lobe(side, a, b)
                extra = _accessory_distance(accessory, code, gx, gy, gz, far, box)
                nearest, whole = _nearest(side, a, b, far, extra, reach)
                lobes[k, j, i], distance[k, j, i], complete[k, j, i] = code, nearest, whole


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
    coarse = grid.coarse(4.0)
    noise = np.zeros((3, *coarse.shape), np.float32)
    for amplitude, wavelength in fissures.waves:
        for n in range(2):
            noise[n] += amplitude * SmoothNoise.around(rng, grid, wavelength).on(coarse)
    noise[2] = 0.12 * SmoothNoise.around(rng, grid, 40.0).on(coarse)
    fine = np.stack([upsample(n, coarse, grid) for n in noise])
    lobes, complete = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.uint8)
    distance = np.full(grid.shape, 12, np.float32)
    frame = np.array([*grid.origin, grid.spacing], np.float32)
    numbers = (boxes.low, boxes.high - boxes.low, fissures.oblique, fissures.horizontal, fissures.bend)
    arrays = [np.asarray(n, np.float32) for n in (*numbers, fissures.accessory, hila, fissures.reach)]
    _label(lungs.astype(np.int8), frame, *arrays, fine, lobes, distance, complete)
    return lobes, distance, complete
