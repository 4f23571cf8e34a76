"""Tissues in HU: means per organ, texture fixed in the patient's space, gravity, fissures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numba import njit
from scipy import ndimage

from training.phantom.render_grid import LUNG_CODE, Frame
from training.phantom.thorax import Organ

__all__ = ["Tissue", "add_fissures", "add_texture", "texture_tile"]

_TILE = 64

#: HU mean, its spread between patients, texture amplitude (HU) and texture grain (mm) of each organ.
_ORGANS: dict[Organ, tuple[float, float, float, float]] = {
    Organ.AIR: (-1000, 0, 0, 1),
    Organ.FAT: (-104, 8, 6, 3),
    Organ.MUSCLE: (52, 8, 9, 2.5),
    Organ.BONE_CORTEX: (620, 160, 120, 2),
    Organ.BONE_MARROW: (190, 70, 60, 1.5),
    Organ.CARTILAGE: (110, 40, 40, 2.5),
    Organ.MEDIASTINAL_FAT: (-98, 10, 9, 3),
    Organ.MYOCARDIUM: (46, 5, 5, 3),
    Organ.ESOPHAGUS: (34, 8, 10, 3),
    Organ.LIVER: (56, 9, 5, 3),
    Organ.SPLEEN: (48, 5, 4, 3),
    Organ.STOMACH: (25, 20, 18, 5),
    Organ.BREAST: (-60, 35, 40, 5),
    Organ.SPINAL_CANAL: (22, 8, 6, 3),
    Organ.SKIN: (10, 25, 15, 3),
    Organ.TABLE: (-420, 250, 30, 4),
    Organ.THYROID: (110, 25, 10, 3),
    Organ.BOWEL_GAS: (-920, 60, 15, 4),
    Organ.LYMPH_NODE: (38, 10, 6, 2),
    Organ.EFFUSION: (10, 8, 4, 3),
}

#: Organs filled with blood, and the vessel of the scan's contrast that fills them.
_BLOOD: dict[Organ, str] = {
    Organ.LEFT_VENTRICLE: "left_heart",
    Organ.LEFT_ATRIUM: "pulmonary_vein",
    Organ.RIGHT_VENTRICLE: "pulmonary_artery",
    Organ.RIGHT_ATRIUM: "right_atrium",
    Organ.AORTA: "left_heart",
    Organ.GREAT_VESSEL: "left_heart",
    Organ.VENA_CAVA: "vena_cava",
    Organ.BRACHIOCEPHALIC_VEIN: "vena_cava",
}

#: Share of the systemic enhancement that perfused organs reach.
_PERFUSION: dict[Organ, float] = {
    Organ.MYOCARDIUM: 0.28,
    Organ.SPLEEN: 0.40,
    Organ.LIVER: 0.22,
    Organ.MUSCLE: 0.05,
    Organ.THYROID: 0.35,
    Organ.LYMPH_NODE: 0.15,
    Organ.ESOPHAGUS: 0.12,
    Organ.STOMACH: 0.06,
}

_BLOOD_HU = 42.0


@dataclass(frozen=True)
class Tissue:
    """What one patient's tissues look like at one breath; the scan adds contrast.

    Attributes:
        means: (64,) HU per joint code (``LUNG_CODE`` + segment for lung) without contrast.
        texture: (64,) amplitude, HU.
        grain: (64,) texture grain, mm.
        lung: mean HU of aerated lung.
        patchy: HU, unevenness of the aeration over centimeters.
        vessels: HU at the middle of the vessels too small to be in the trees.
        gravity: HU per mm from anterior to posterior.
        fissure: thickness of a fissure, mm.
        wall: HU of the airway wall.
        blood: HU of unenhanced blood.
        seed: of the texture.
    """

    means: np.ndarray
    texture: np.ndarray
    grain: np.ndarray
    lung: float
    patchy: float
    vessels: float
    gravity: float
    fissure: float
    wall: float
    blood: float
    seed: int

    @classmethod
    def sample(cls, seed: int) -> Tissue:
        rng = np.random.default_rng([seed, 11])
        means, texture, grain = np.zeros(64), np.zeros(64), np.ones(64)
        for organ, (mean, spread, amplitude, size) in _ORGANS.items():
            means[organ] = mean + spread * np.clip(rng.normal(), -2, 2)
            texture[organ], grain[organ] = amplitude * rng.uniform(0.6, 1.4), size
        blood = _BLOOD_HU + 5 * float(np.clip(rng.normal(), -2, 2))  # anemia lowers it
        for organ in _BLOOD:
            means[organ], texture[organ], grain[organ] = blood, 2.0, 3.0
        lung = float(np.clip(rng.normal(-872, 28), -930, -780))
        means[LUNG_CODE:], texture[LUNG_CODE:], grain[LUNG_CODE:] = lung, rng.uniform(12, 28), rng.uniform(0.8, 1.3)
        # The fissure's 0.12-0.42 mm: a real one carries 200 HU mm, the density of 0.22 mm of pleura.
        look = rng.uniform([6, 60, 0.0, 0.12, -10], [22, 220, 0.5, 0.42, 60])
        patchy, vessels, gravity, fissure, wall = (float(value) for value in look)
        return cls(means, texture, grain, lung, patchy, vessels, gravity, fissure, wall, blood, seed)

    def randomized(self, rng: np.random.Generator) -> Tissue:
        """Random intensities that keep only the order air < lung < soft tissue < bone, mostly."""
        means, texture, grain = self.means.copy(), self.texture.copy(), self.grain.copy()
        soft = means < 100
        means[soft] = rng.uniform(-160, 160, int(soft.sum()))
        means[~soft] = rng.uniform(100, 1000, int((~soft).sum()))
        texture[:] = rng.gamma(2.0, 8.0, len(texture))
        grain[:] = np.exp(rng.uniform(np.log(0.8), np.log(6), len(grain)))
        for organ in (Organ.AIR, Organ.BOWEL_GAS):
            means[organ], texture[organ] = rng.uniform(-1024, -960), 0.0
        means[Organ.TABLE] = rng.uniform(-900, 100)
        lung = float(rng.uniform(-940, -600))
        means[LUNG_CODE:] = lung
        texture[LUNG_CODE:], grain[LUNG_CODE:] = rng.uniform(5, 60), np.exp(rng.uniform(np.log(0.7), np.log(4)))
        blood = float(rng.uniform(-100, 250))
        return replace(
            self,
            means=means,
            texture=texture,
            grain=grain,
            lung=lung,
            patchy=float(rng.uniform(0, 50)),
            vessels=float(rng.uniform(0, 300)),
            gravity=float(rng.uniform(-0.3, 1.2)),
            fissure=float(rng.uniform(0.1, 0.9)),
            wall=float(rng.uniform(-200, 200)),
            blood=blood,
        )

    def enhanced(self, contrast: object) -> np.ndarray:
        """(64,) float32 HU per joint code with a scan's contrast (see ``acquisition.Contrast``)."""
        means = self.means.copy()
        for organ, vessel in _BLOOD.items():
            means[organ] += getattr(contrast, vessel)
        for organ, share in _PERFUSION.items():
            means[organ] += share * contrast.organs  # type: ignore[attr-defined]
        return means.astype(np.float32)


@lru_cache(maxsize=8)
def texture_tile(seed: int) -> np.ndarray:
    """Periodic smooth noise, (64, 64, 64) float32 of zero mean and unit variance, grain one cell."""
    white = np.random.default_rng([seed, 12]).standard_normal((_TILE,) * 3, dtype=np.float32)
    tile = ndimage.gaussian_filter(white, 0.85, mode="wrap")
    return (tile / tile.std()).astype(np.float32)


@njit(cache=True, fastmath=True, inline="always")
def _lookup(tile, x, y, z):  # type: ignore[no-untyped-def]
    """Trilinear value of the periodic tile at a position in cells."""
    fx, fy, fz = np.floor(x), np.floor(y), np.floor(z)
    i, j, k = int(fx) & 63, int(fy) & 63, int(fz) & 63
    u, v, w = np.float32(x - fx), np.float32(y - fy), np.float32(z - fz)
    i1, j1, k1 = (i + 1) & 63, (j + 1) & 63, (k + 1) & 63
    a = tile[k, j, i] * (1 - u) + tile[k, j, i1] * u
    b = tile[k, j1, i] * (1 - u) + tile[k, j1, i1] * u
    c = tile[k1, j, i] * (1 - u) + tile[k1, j, i1] * u
    d = tile[k1, j1, i] * (1 - u) + tile[k1, j1, i1] * u
    return (a * (1 - v) + b * v) * (1 - w) + (c * (1 - v) + d * v) * w


def add_texture(hu: np.ndarray, labels: np.ndarray, frame: Frame, tissue: Tissue, middle: float) -> None:
    """Add grain to every organ, and gravity and patchiness to the lungs, in place.

    Args:
        hu: float32 [k, j, i].
        labels: joint codes [k, j, i].
        middle: LPS y of the lungs' middle, mm, where gravity adds nothing.
    """
    # A voxel larger than the grain averages it out.
    shrink = (1.0 + (frame.voxel / (2.5 * tissue.grain)) ** 2) ** -0.75
    amplitude = (tissue.texture * shrink).astype(np.float32)
    place = np.asarray(frame.origin, np.float32), np.asarray(frame.step, np.float32)
    tile, inverse = texture_tile(tissue.seed), (1.0 / tissue.grain).astype(np.float32)
    look = np.array([tissue.gravity, middle, tissue.patchy, tissue.vessels * shrink[LUNG_CODE]], np.float32)
    _texture(hu, labels, tile, amplitude, inverse, *place, look)


@njit(cache=True, fastmath=True)
def _texture(hu, labels, tile, amplitude, inverse, origin, step, look):  # type: ignore[no-untyped-def]
    gravity, middle, patchy, vessels = look[0], look[1], look[2], look[3]
    wide, thin = np.float32(0.07), np.float32(0.22)
    for k in range(hu.shape[0]):
        z = origin[2] + k * step[2]
        for j in range(hu.shape[1]):
            y = origin[1] + j * step[1]
            for i in range(hu.shape[2]):
                code = labels[k, j, i]
                scale = amplitude[code]
                if scale == 0:
                    continue
                x = origin[0] + i * step[0]
                g = inverse[code]
                value = _lookup(tile, x * g, y * g, z * g)
                if code < LUNG_CODE:
                    hu[k, j, i] += scale * value
                else:
                    # Aeration is patchy over centimeters; the smallest vessels are the lines where two fields vanish.
                    patch = _lookup(tile, x * wide, y * wide, z * wide)
                    a = _lookup(tile, y * thin + 17, z * thin, x * thin)
                    b = _lookup(tile, z * thin, x * thin + 31, y * thin)
                    line = vessels * max(np.float32(0), 1 - np.float32(8) * (a * a + b * b))
                    hu[k, j, i] += scale * value + line + patchy * patch + gravity * (y - middle)


def add_fissures(
    hu: np.ndarray,
    labels: np.ndarray,
    frame: Frame,
    distance: np.ndarray,
    complete: np.ndarray,
    source: Frame,
    thickness: float,
) -> None:
    """Draw the interlobar fissures as thin sheets of soft tissue, in place.

    Args:
        labels: joint codes [k, j, i] on ``frame``.
        distance: uint8 [k, j, i] on ``source``: distance to the nearest fissure in 1/20 mm.
        complete: uint8 [k, j, i] on ``source``: lobe code, plus 128 where the fissure is complete.
        thickness: mm.
    """
    place = np.asarray(frame.origin), np.asarray(frame.step), np.asarray(source.origin), source.step[0]
    _fissures(hu, labels, distance, complete, *place, np.float32(thickness))


@njit(cache=True, fastmath=True)
def _fissures(hu, labels, distance, complete, origin, step, source, spacing, thickness):  # type: ignore[no-untyped-def]
    nk, nj, ni = distance.shape
    extent = np.cbrt(step[0] * step[1] * step[2])
    limit = 20.0 * min(12.0, thickness + 0.5 * extent + 1.8 * spacing)
    for k in range(hu.shape[0]):
        z = (origin[2] + k * step[2] - source[2]) / spacing
        kc = int(np.floor(z))
        if kc < 0 or kc >= nk - 1:
            continue
        for j in range(hu.shape[1]):
            y = (origin[1] + j * step[1] - source[1]) / spacing
            jc = int(np.floor(y))
            if jc < 0 or jc >= nj - 1:
                continue
            for i in range(hu.shape[2]):
                if labels[k, j, i] < LUNG_CODE:
                    continue
                x = (origin[0] + i * step[0] - source[0]) / spacing
                ic = int(np.floor(x))
                if ic < 0 or ic >= ni - 1 or distance[kc, jc, ic] > limit:
                    continue
                d0 = _sheet_distance(distance, complete, kc, jc, ic, z - kc, y - jc, x - ic)
                cover = min(d0 + thickness / 2, extent / 2) - max(d0 - thickness / 2, -extent / 2)
                if cover > 0:
                    hu[k, j, i] += (cover / extent) * (20.0 - hu[k, j, i])


@njit(cache=True, fastmath=True)
def _sheet_distance(distance, complete, k, j, i, w, v, u):  # type: ignore[no-untyped-def]
    """Distance to the fissure in mm inside a cell, signed across it by the lobes so that it passes through zero."""
    near = complete[k + int(w + 0.5), j + int(v + 0.5), i + int(u + 0.5)]
    if near < 128:
        return 1e3
    total, value = 0.0, 0.0
    for corner in range(8):
        a, b, c = corner >> 2, (corner >> 1) & 1, corner & 1
        lobe = complete[k + a, j + b, i + c] & 127
        if lobe == 0:
            continue
        weight = (w if a else 1 - w) * (v if b else 1 - v) * (u if c else 1 - u)
        sign = 1.0 if lobe == (near & 127) else -1.0
        value += weight * sign * distance[k + a, j + b, i + c]
        total += weight
    return abs(value / total) / 20.0 if total > 0 else 1e3
