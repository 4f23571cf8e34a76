"""The chest as a geometric shape: cross-sections of the lungs, diaphragm, inner wall and body outline.

Frame of the shape (mm): x = 0 in the midline, to the left; y = 0 at the front of the lungs, to posterior; z = 0 at the
lowest point of the lungs, to superior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from scipy import ndimage
from scipy.interpolate import PchipInterpolator
from scipy.spatial import ConvexHull

from training.phantom.shape_statistics import (
    BOX_CORRELATION,
    BOX_MEAN,
    BOX_SD,
    PROFILE_MEAN,
    PROFILE_SD,
    PROFILE_Z,
)

__all__ = ["ChestShape", "Wall", "draw_chest", "lung_fields", "make_wall", "wall_fields"]

#: Entries of a dense profile table, uniform in sqrt(1 - Z) from 0 (apex) to TABLE_END (below the base).
TABLE_SIZE = 256
TABLE_END = 1.12
ANGLES = 96
#: Fall of the diaphragm from its top to the lateral, medial, anterior and posterior wall: exponent of the relative
#: distance, from the lower surfaces of the 13 lobe maps named in ``shape_statistics``.
DOME_POWER = np.array([4.2, 2.6, 3.0, 2.2])
LATERAL, MEDIAL, ANTERIOR, POSTERIOR, LATERAL_Y, ANTERIOR_X, POSTERIOR_X = range(7)


@dataclass
class Dome:
    """One half of the diaphragm: height over the floor of the chest.

    Attributes:
        center: x (from the midline, mm) and y (mm) of the top.
        extent: distances (mm) from the top to the lateral, medial, anterior and posterior wall.
        top: z of the top, mm.
        rim: z at the lateral, medial, anterior and posterior wall, mm.
        power: steepness of the fall from the top to the lateral, medial, anterior and posterior wall.
    """

    center: tuple[float, float]
    extent: tuple[float, float, float, float]
    top: float
    rim: tuple[float, float, float, float]
    power: tuple[float, float, float, float]

    def as_array(self) -> np.ndarray:
        return np.array([*self.center, *self.extent, self.top, *self.rim, *self.power], np.float32)


@dataclass
class ChestShape:
    """The inner shape of a chest.

    Attributes:
        size: width, depth, height (mm) of the box around both lungs.
        tables: (2, TABLE_SIZE, 7) float32 cross-section profiles in mm, right and left; columns as in
            ``shape_statistics.PROFILE_COLUMNS``, x as distance from the midline.
        domes: right and left half of the diaphragm.
        traits: sex, fat, posture and the like.
        exponents: of the superellipse in the lateral, the medial front and the medial back quarter of a section.
    """

    size: tuple[float, float, float]
    tables: np.ndarray
    domes: tuple[Dome, Dome]
    traits: dict[str, float] = field(default_factory=dict)
    exponents: tuple[float, float, float] = (2.0, 2.6, 2.0)

    def section(self, side: int, z: float) -> np.ndarray:
        """Profile row (7 values, mm) of a side (0 right, 1 left) at height z."""
        s = np.sqrt(max(1 - z / self.size[2], 0.0)) / TABLE_END * (TABLE_SIZE - 1)
        a = int(min(s, TABLE_SIZE - 2))
        w = min(s - a, 1.0)
        return self.tables[side, a] * (1 - w) + self.tables[side, a + 1] * w

    def outline(self, side: int, z: float, count: int = 64) -> np.ndarray:
        """Closed outline (count, 2) of the cavity of one lung at height z, in x and y (mm)."""
        row = self.section(side, z)
        t = np.linspace(0, 2 * np.pi, count, endpoint=False)
        c, s = np.cos(t), np.sin(t)
        lateral, front, back = self.exponents
        p = np.where(c > 0, lateral, np.where(s < 0, front, back))
        center = np.where(s < 0, row[ANTERIOR_X], row[POSTERIOR_X])
        a = np.where(c > 0, row[LATERAL] - center, center - row[MEDIAL])
        b = np.where(s < 0, row[LATERAL_Y] - row[ANTERIOR], row[POSTERIOR] - row[LATERAL_Y])
        x = center + a * np.sign(c) * np.abs(c) ** (2 / p)
        y = row[LATERAL_Y] + b * np.sign(s) * np.abs(s) ** (2 / p)
        return np.stack([x if side else -x, y], axis=1)

    def point(self, x: float, y: float, z: float) -> np.ndarray:
        """LPS-like point (mm) of relative coordinates: x in half widths, y in depths, z in heights."""
        return np.array([x * self.size[0] / 2, y * self.size[1], z * self.size[2]])


def draw_chest(rng: np.random.Generator, shifted: bool = False) -> ChestShape:
    """A random chest with the proportions of real ones (``shifted``: bodies from outside that distribution)."""
    normal = np.linalg.cholesky(BOX_CORRELATION) @ rng.standard_normal(3)
    male = bool(rng.random() < 0.55)
    normal = np.clip(normal, -2.2, 2.2) + (0.35 if male else -0.35)
    size = BOX_MEAN * np.exp(normal * BOX_SD / BOX_MEAN)
    if shifted:
        size *= rng.uniform([0.88, 0.86, 0.84], [1.08, 1.16, 1.1])
    tables = _draw_tables(rng, size, 1.5 if shifted else 1.0)
    breath = float(np.clip(rng.normal(), -2, 2)) + (rng.uniform(-1.2, 0.6) if shifted else 0.0)
    domes = _draw_domes(rng, size, tables, breath)
    traits = {
        "male": float(male),
        "breath": breath,
        "fat": float(np.clip(rng.lognormal(np.log(14 if male else 18), 0.5), 4, 55)),
        "muscle": float(rng.uniform(0.8, 1.25)),
        "arms_up": float(rng.random() < 0.85),
        "breast": 0.0 if male else float(np.clip(rng.normal(20, 12), 0, 48)),
    }
    # sections of real lungs: 1.9-2.1 in both lateral quarters; the medial ones are reshaped by the mediastinum
    lateral = rng.uniform(2.15, 2.5) if shifted else rng.normal(2.0, 0.06)
    exponents = (float(lateral), float(rng.uniform(2.3, 3.0)), float(rng.uniform(1.85, 2.2)))
    return ChestShape((float(size[0]), float(size[1]), float(size[2])), tables, domes, traits, exponents)


def _draw_tables(rng: np.random.Generator, size: np.ndarray, strength: float) -> np.ndarray:
    """Dense profile tables of both sides: mean + correlated deviations, in mm."""
    knots = np.array([1.0, 0.5, 0.0])
    common = rng.standard_normal((3, 7))
    tables = np.empty((2, TABLE_SIZE, 7), np.float32)
    for side in range(2):
        own = rng.standard_normal((3, 7))
        normal = np.clip(0.75 * common + 0.66 * own, -2, 2)
        normal[1] = 0.6 * normal[1] + 0.4 * (normal[0] + normal[2])
        t = np.sqrt(1 - PROFILE_Z)
        deviation = np.stack([np.interp(t / t[0], knots[::-1], (normal * PROFILE_SD)[::-1, c]) for c in range(7)], 1)
        tables[side] = dense_table(PROFILE_Z, PROFILE_MEAN[side] + strength * 0.8 * deviation, size)
    return tables


def dense_table(heights: np.ndarray, rows: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Dense table in mm of profile rows (relative coordinates) at rising relative heights; closed at the apex."""
    rows = _ordered(rows)
    apex = rows[-1].copy()
    x, y = (rows[-1, LATERAL] + rows[-1, MEDIAL]) / 2, rows[-1, LATERAL_Y]
    apex[[LATERAL, MEDIAL, ANTERIOR_X, POSTERIOR_X]] = x
    apex[[ANTERIOR, POSTERIOR]] = y
    t = np.concatenate([[0.0], np.sqrt(1 - heights[::-1]), [TABLE_END]])
    values = np.concatenate([apex[None], rows[::-1], rows[:1]])
    dense = PchipInterpolator(t, values)(np.linspace(0, TABLE_END, TABLE_SIZE))
    scale = np.array([size[0] / 2, size[0] / 2, size[1], size[1], size[1], size[0] / 2, size[0] / 2])
    return (dense * scale).astype(np.float32)


def _ordered(rows: np.ndarray) -> np.ndarray:
    """Rows whose extremes stand in their order with a margin, so every cross-section is a simple closed curve."""
    rows = rows.copy()
    rows[:, LATERAL] = np.maximum(rows[:, LATERAL], rows[:, MEDIAL] + 0.12)
    rows[:, POSTERIOR] = np.maximum(rows[:, POSTERIOR], rows[:, ANTERIOR] + 0.10)
    height = rows[:, POSTERIOR] - rows[:, ANTERIOR]
    low, high = rows[:, ANTERIOR] + 0.3 * height, rows[:, POSTERIOR] - 0.3 * height
    rows[:, LATERAL_Y] = np.clip(rows[:, LATERAL_Y], low, high)
    width = rows[:, LATERAL] - rows[:, MEDIAL]
    for column in (ANTERIOR_X, POSTERIOR_X):
        rows[:, column] = np.clip(rows[:, column], rows[:, MEDIAL] + 0.2 * width, rows[:, LATERAL] - 0.3 * width)
    return rows


def _draw_domes(rng: np.random.Generator, size: np.ndarray, tables: np.ndarray, breath: float) -> tuple[Dome, Dome]:
    """Right and left half of the diaphragm; a deep breath (positive) flattens and lowers both."""
    domes = []
    right_top = 0.28 - 0.035 * breath + rng.normal(0, 0.02)
    rims = np.array([0.06, 0.19, 0.14, -0.005]) + rng.normal(0, 1, 4) * [0.03, 0.02, 0.04, 0.012]
    powers = DOME_POWER * np.exp(rng.normal(0, 0.15, 4))
    for side in range(2):
        top = right_top - (0.025 + rng.normal(0, 0.025) if side else 0.0)
        top = float(np.clip(top, 0.14, 0.42))
        rim = np.minimum(rims + rng.normal(0, 0.012, 4), top - np.array([0.06, 0.04, 0.03, 0.12]))
        row = tables[side, int(0.9 / TABLE_END * (TABLE_SIZE - 1))]
        x = float(row[LATERAL] * rng.uniform(0.44, 0.56))
        y = float(row[ANTERIOR] + (row[POSTERIOR] - row[ANTERIOR]) * rng.uniform(0.36, 0.46))
        extent = (float(row[LATERAL]) - x, x, y - float(row[ANTERIOR]), float(row[POSTERIOR]) - y)
        z = (rim * size[2]).tolist()
        p = (powers * np.exp(rng.normal(0, 0.08, 4))).tolist()
        domes.append(Dome((x, y), extent, top * float(size[2]), (z[0], z[1], z[2], z[3]), (p[0], p[1], p[2], p[3])))
    return domes[0], domes[1]


@njit(cache=True, fastmath=True)
def _dome_height(dome, x, y):  # type: ignore[no-untyped-def]
    dx = x - dome[0]
    dy = y - dome[1]
    u = dx / (dome[2] if dx > 0 else dome[3])
    v = dy / (dome[5] if dy > 0 else dome[4])
    square = u * u + v * v
    if square < 1e-6:
        return dome[6]
    side_rim = dome[7] if dx > 0 else dome[8]
    front_rim = dome[10] if dy > 0 else dome[9]
    rim = (u * u * side_rim + v * v * front_rim) / square
    power = (u * u * (dome[11] if dx > 0 else dome[12]) + v * v * (dome[14] if dy > 0 else dome[13])) / square
    # past the wall the recess ends, and in the middle the heart rests on the central tendon
    e = min(square, np.float32(1.12) if dx > 0 else np.float32(1.0)) ** (power / 2)
    return dome[6] - (dome[6] - rim) * e


@njit(cache=True, fastmath=True)
def _lung_fields(x, y, z, tables, height, domes, exponents, cavity, floor):  # type: ignore[no-untyped-def]
    n = tables.shape[1]
    for v in range(x.size):
        px, py, pz = x[v], y[v], z[v]
        side = 1 if px >= 0 else 0
        ax = abs(px)
        # the two halves of the diaphragm pass into each other over the middle 56 mm
        w = min(max((px + 28) / 56, np.float32(0)), np.float32(1))
        w = w * w * (3 - 2 * w)
        low = np.float32(0)
        if w < 1:
            low += (1 - w) * _dome_height(domes[0], -px, py)
        if w > 0:
            low += w * _dome_height(domes[1], px, py)
        floor[v] = pz - low
        rest = 1 - pz / height
        if rest <= 0:
            cavity[v] = max(rest * height - 2, np.float32(-50))
            continue
        s = min(np.sqrt(rest) / np.float32(TABLE_END), np.float32(0.9999)) * (n - 1)
        a = int(s)
        f = s - a
        t0, t1 = tables[side, a], tables[side, a + 1]
        y_side = t0[4] + f * (t1[4] - t0[4])
        c = 5 if py < y_side else 6
        e = 2 if py < y_side else 3
        xc = t0[c] + f * (t1[c] - t0[c])
        lateral = ax > xc
        d = 0 if lateral else 1
        ra = abs(t0[d] + f * (t1[d] - t0[d]) - xc) + np.float32(1e-3)
        rb = abs(t0[e] + f * (t1[e] - t0[e]) - y_side) + np.float32(1e-3)
        dx, dy = abs(ax - xc), abs(py - y_side)
        u, q = dx / ra, dy / rb
        p = exponents[0] if lateral else (exponents[1] if py < y_side else exponents[2])
        g = (u**p + q**p) ** (1 / p)
        r = np.sqrt(dx * dx + dy * dy)
        cavity[v] = r * (1 / g - 1) if g > 0.3 else (1 - g) * min(ra, rb)


def lung_fields(x: np.ndarray, y: np.ndarray, z: np.ndarray, shape: ChestShape) -> tuple[np.ndarray, np.ndarray]:
    """Two fields (mm) at points of the shape's frame: depth inside the cavities and height over the diaphragm."""
    cavity, floor = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    domes = np.stack([d.as_array() for d in shape.domes])
    height = np.float32(shape.size[2])
    exponents = np.array(shape.exponents, np.float32)
    flat = (x.ravel(), y.ravel(), z.ravel())
    _lung_fields(*flat, shape.tables, height, domes, exponents, cavity.ravel(), floor.ravel())
    return cavity, floor


@dataclass
class Wall:
    """The walls of the trunk as radii around the axis (x = 0, y = center).

    Attributes:
        center: y of the axis, mm.
        heights: z of the rows, mm, rising evenly.
        inner, muscle, body: (rows, ANGLES) radii in mm; the angle 0 points to the back and rises over the left side.
    """

    center: float
    heights: np.ndarray
    inner: np.ndarray
    muscle: np.ndarray
    body: np.ndarray

    def inner_radius(self, angle: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Bilinear inner radius at angles (radians) and heights."""
        a = np.mod(np.asarray(angle) / (2 * np.pi) * ANGLES, ANGLES)
        step = self.heights[1] - self.heights[0]
        r = np.clip((np.asarray(z) - self.heights[0]) / step, 0, len(self.heights) - 1.001)
        i, j = r.astype(int), a.astype(int) % ANGLES
        f, g, k = r - i, a - np.floor(a), (j + 1) % ANGLES
        low = self.inner[i, j] * (1 - g) + self.inner[i, k] * g
        high = self.inner[i + 1, j] * (1 - g) + self.inner[i + 1, k] * g
        return low * (1 - f) + high * f

    def point(self, angle: np.ndarray, z: np.ndarray, outward: np.ndarray | float = 0.0) -> np.ndarray:
        """Points (n, 3) on the inner wall, moved outward by some mm."""
        r = self.inner_radius(angle, z) + outward
        return np.stack([r * np.sin(angle), self.center + r * np.cos(angle), np.broadcast_to(z, r.shape)], axis=-1)


def make_wall(
    shape: ChestShape, below: float, above: float, outline: Callable[[float], np.ndarray] | None = None
) -> Wall:
    """Walls around the cavities from ``below`` mm under the base to ``above`` mm over the apex.

    ``outline``: gives the points (n, 2) to enclose at a height instead of the shape's own sections.
    """
    height = shape.size[2]
    rows = int((height + below + above) / 4) + 1
    heights = np.linspace(-below, height + above, rows)
    center = shape.size[1] * 0.52
    inner = np.stack([_inner_row(shape, z, center, outline) for z in heights])
    if outline is not None:
        inner = ndimage.gaussian_filter(inner, (1.5, 1.0), mode=("nearest", "wrap"))
    muscle, body = _outer_rows(shape, heights, inner)
    return Wall(center, heights, inner.astype(np.float32), muscle, body)


def _inner_row(shape: ChestShape, z: float, center: float, outline: Callable[[float], np.ndarray] | None) -> np.ndarray:
    height = shape.size[2]
    level = min(z, 0.94 * height)
    points = outline(level) if outline else np.concatenate([shape.outline(side, level) for side in range(2)])
    radius = _hull_radius(points - [0, center])
    if z > level:  # the root of the neck: the wall closes in on windpipe, spine and vessels
        t = min((z - level) / (0.06 * height + 60), 1.0)
        radius = radius * (1 - t) + 45 * t
    return radius


def _hull_radius(points: np.ndarray) -> np.ndarray:
    """Radius of the convex hull of points around the origin at ANGLES angles."""
    equations = ConvexHull(points).equations
    angle = 2 * np.pi * np.arange(ANGLES) / ANGLES
    direction = np.stack([np.sin(angle), np.cos(angle)])
    along = equations[:, :2] @ direction
    distance = np.where(along > 1e-6, -equations[:, 2:] / np.maximum(along, 1e-6), np.inf)
    return np.maximum(distance.min(axis=0), 20.0)


def _outer_rows(shape: ChestShape, heights: np.ndarray, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Radii of the muscle surface and of the skin."""
    angle = 2 * np.pi * np.arange(ANGLES) / ANGLES
    turn = np.minimum(angle, 2 * np.pi - angle)[None]  # 0 at the back, pi in front
    back, side, front = np.clip(np.cos(turn), 0, 1), np.abs(np.sin(turn)), np.clip(-np.cos(turn), 0, 1)
    traits, z = shape.traits, (heights / shape.size[2])[:, None]
    # beside the spine the erector muscles, at the side latissimus and serratus, in front (upper half) the pectorals
    erector = 24 * np.exp(-((turn / 0.42) ** 2)) - 6 * np.exp(-((turn / 0.12) ** 2))
    pectoral = 13 * np.exp(-(((z - 0.70) / 0.16) ** 2)) * np.exp(-(((turn - 2.35) / 0.42) ** 2))
    flank = (5 + 9 * np.clip((z - 0.15) / 0.5, 0, 1)) * np.exp(-(((turn - 1.25) / 0.6) ** 2))
    muscle = _smooth_circle(inner, 4) + 13 + traits["muscle"] * (erector + pectoral + flank)
    rise = _smoothstep((z - 0.5) / 0.45)
    muscle = muscle * (1 - rise) + np.maximum(muscle, _shoulder_radius(shape, turn, z)) * rise
    neck = _smoothstep((z * shape.size[2] - shape.size[2] - 8) / 80)
    muscle = muscle * (1 - neck) + 62 * neck
    fat = traits["fat"] * (0.45 + 0.3 * side + 0.3 * front + 0.2 * back) * (1.15 - 0.5 * np.clip(z, 0, 1))
    breast = traits["breast"] * np.exp(
        -(((turn - np.pi + 0.58) / 0.30) ** 2) - (((heights[:, None] - 0.47 * shape.size[2]) / 42) ** 2)
    )
    return muscle.astype(np.float32), (muscle + np.maximum(fat, 2.5) + breast).astype(np.float32)


def _shoulder_radius(shape: ChestShape, turn: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Radius of the shoulder girdle."""
    width, depth, _ = shape.size
    a = width / 2 + 24
    b = depth / 2 * (0.98 - 0.28 * np.clip((z - 0.75) / 0.35, 0, 1))
    return 1 / ((np.abs(np.sin(turn)) / a) ** 2.4 + (np.abs(np.cos(turn)) / b) ** 2.4) ** (1 / 2.4)


def _smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _smooth_circle(rows: np.ndarray, half: int) -> np.ndarray:
    """Moving average over the angle."""
    padded = np.concatenate([rows[:, -half:], rows, rows[:, :half]], axis=1)
    total = np.cumsum(np.pad(padded, ((0, 0), (1, 0))), axis=1)
    return (total[:, 2 * half + 1 :] - total[:, : -2 * half - 1]) / (2 * half + 1)


@njit(cache=True, fastmath=True)
def _wall_fields(x, y, z, center, start, step, tables, inner, muscle, body):  # type: ignore[no-untyped-def]
    rows, angles = tables.shape[1:]
    for v in range(x.size):
        px, py = x[v], y[v] - center
        r = np.sqrt(px * px + py * py)
        a = np.arctan2(px, py) * np.float32(angles / (2 * np.pi))
        if a < 0:
            a += angles
        j = min(int(a), angles - 1)
        g = a - j
        m = (j + 1) % angles
        t = min(max((z[v] - start) / step, np.float32(0)), np.float32(rows - 1.001))
        i = int(t)
        f = t - i
        w00, w01, w10, w11 = (1 - f) * (1 - g), (1 - f) * g, f * (1 - g), f * g
        for n in range(3):
            q = tables[n]
            value = w00 * q[i, j] + w01 * q[i, m] + w10 * q[i + 1, j] + w11 * q[i + 1, m] - r
            if n == 0:
                inner[v] = value
            elif n == 1:
                muscle[v] = value
            else:
                body[v] = value


def wall_fields(x: np.ndarray, y: np.ndarray, z: np.ndarray, wall: Wall) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth (mm, positive inside) under the inner wall, the muscle surface and the skin at points of the frame."""
    fields = [np.empty(x.shape, np.float32) for _ in range(3)]
    tables = np.stack([wall.inner, wall.muscle, wall.body]).astype(np.float32)
    step = np.float32(wall.heights[1] - wall.heights[0])
    start, center = np.float32(wall.heights[0]), np.float32(wall.center)
    _wall_fields(x.ravel(), y.ravel(), z.ravel(), center, start, step, tables, *(f.ravel() for f in fields))
    return fields[0], fields[1], fields[2]
