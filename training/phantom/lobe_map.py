"""A given lobe map as the shape of a chest: what ``thorax_from_lobes`` measures before it adds the other organs.

Everything is returned in the frame of ``shape``: x = 0 in the midline, y = 0 at the front and z = 0 at the base of the
lungs; ``LobeMap.offset`` leads back to the map's own LPS coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from training.phantom.grid import Grid, SmoothNoise, upsample
from training.phantom.organs import HEART_ROOM
from training.phantom.shape import DOME_POWER, ChestShape, Dome, dense_table, lung_fields
from training.phantom.shape_statistics import PROFILE_MEAN, PROFILE_Z

__all__ = ["LobeMap", "Measured", "fissures_of_lobes", "measure", "read_lobe_map"]

#: LUNA16 lobe maps: code -> ``Lobe`` code; the same + 512 marks a voxel on a border.
LUNA_CODES = {4: 1, 5: 2, 6: 3, 7: 4, 8: 5}
#: Spacing (mm) at which a map is measured.
ROUGH = 3.0


@dataclass
class LobeMap:
    """A lobe map in the frame of the shape.

    Attributes:
        codes: uint8 ``Lobe`` codes [k, j, i] on the map's own voxels, cropped to the lungs.
        spacing: mm along (i, j, k).
        corner: position (x, y, z) of its voxel 0 in the frame.
        offset: LPS position of the frame's zero.
        size: width, depth, height (mm) of the box around both lungs.
    """

    codes: np.ndarray
    spacing: np.ndarray
    corner: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def on(self, grid: Grid, smooth: float) -> np.ndarray:
        """uint8 lobe codes on a grid: lobes interpolated linearly, rounded over ``smooth`` mm; the strongest wins."""
        best, inside = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.float32)
        codes = np.zeros(grid.shape, np.uint8)
        for lobe in range(1, 6):
            box, share = self._share(lobe, grid, 3 * smooth)
            share = ndimage.gaussian_filter(share, smooth / grid.spacing, mode="constant", truncate=2.5)
            inside[box] += share
            better = share > best[box]
            best[box][better] = share[better]
            codes[box][better] = lobe
        # the lungs end where all lobes together fall under one half
        codes[inside < 0.5] = 0
        return codes

    def _share(self, lobe: int, grid: Grid, margin: float) -> tuple[tuple[slice, slice, slice], np.ndarray]:
        """A lobe's mask, linearly interpolated, in the box of the grid that holds it with a margin (mm)."""
        mask = self.codes == lobe
        bounds = [np.flatnonzero(mask.any(axis=a)) for a in ((1, 2), (0, 2), (0, 1))]
        if not bounds[0].size:
            return (slice(0, 0), slice(0, 0), slice(0, 0)), np.zeros((0, 0, 0), np.float32)
        values = mask[tuple(slice(b[0], b[-1] + 1) for b in bounds)]
        values = np.pad(values, 1).astype(np.float32)
        low = self.corner + self.spacing * np.array([b[0] - 1 for b in bounds[::-1]])
        high = low + self.spacing * (np.array(values.shape[::-1]) - 1)
        box = grid.box(low - margin, high + margin)
        for axis, coordinates in zip((2, 1, 0), grid.part(box).axes(), strict=True):
            t = (coordinates - low[2 - axis]) / self.spacing[2 - axis]
            n = values.shape[axis]
            t = np.clip(t, 0, n - 1)
            left = np.minimum(t.astype(int), n - 2)
            w = (t - left).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            values = np.take(values, left, axis) * (1 - w) + np.take(values, left + 1, axis) * w
        return box, values


def read_lobe_map(
    array: np.ndarray, spacing: tuple[float, float, float], origin: tuple[float, float, float]
) -> LobeMap:
    """Decode a lobe map.

    Args:
        array: codes [k, j, i] of a canonical map, LUNA16 (4-8, + 512 on borders) or ``Lobe`` codes (1-5).
        spacing: mm along (i, j, k).
        origin: LPS mm of voxel 0.

    Raises:
        ValueError: a lung is missing.
    """
    table = np.zeros(1024, np.uint8)
    values = np.clip(array, 0, 1023).astype(np.uint16)
    luna = bool(np.bincount(values.ravel(), minlength=1024)[6:9].any())
    for code, lobe in LUNA_CODES.items() if luna else ((n, n) for n in range(1, 6)):
        table[code] = lobe
        table[code + 512] = lobe
    codes = table[values]
    if not ((codes > 0) & (codes < 4)).any() or not (codes > 3).any():
        raise ValueError("the lobe map lacks a lung: it needs codes of right and left lobes")
    bounds = [np.flatnonzero((codes > 0).any(axis=a)) for a in ((1, 2), (0, 2), (0, 1))]
    crop = codes[tuple(slice(b[0], b[-1] + 1) for b in bounds)]
    step = np.array(spacing, np.float64)
    low = np.array(origin, np.float64) + step * [b[0] for b in bounds[::-1]]
    size = step * crop.shape[::-1]
    middle = _midline(crop) * step[0] + low[0]
    offset = np.array([middle, low[1] - step[1] / 2, low[2] - step[2] / 2])
    half = max(middle - low[0], low[0] + size[0] - middle)
    return LobeMap(crop, step, low - offset, offset, np.array([2 * half, size[1], size[2]]))


def _midline(codes: np.ndarray) -> float:
    """Column index of the plane between the lungs: the middle of the gap, in the middle third of the height."""
    third = codes[len(codes) // 2 : 5 * len(codes) // 6]
    right = ((third > 0) & (third < 4)).any(axis=0)
    left = (third > 3).any(axis=0)
    columns = np.arange(codes.shape[2])
    last_right = np.where(right.any(1), (right * columns).max(1), 0)
    first_left = np.where(left.any(1), np.where(left, columns, 10**6).min(1), 0)
    both = right.any(1) & left.any(1)
    return float(np.median((last_right + first_left)[both]) / 2) if both.any() else codes.shape[2] / 2


@dataclass
class Measured:
    """What is read off a lobe map: the shape, outlines per height, hilum points and the floor of the chest."""

    shape: ChestShape
    rough: Grid
    codes: np.ndarray

    def outline(self, z: float) -> np.ndarray:
        """Points (n, 2) of both lungs' outlines at height z; under the dome the wall goes on as above it."""
        height = self.shape.size[2]
        levels = [np.clip(z, 0.05 * height, 0.94 * height)]
        levels += [v * height for v in (0.2, 0.25, 0.3) if z < v * height]
        points = []
        for level in levels:
            k = int(np.clip(round((level - self.rough.origin[2]) / ROUGH), 0, len(self.codes) - 1))
            j, i = np.nonzero(self.codes[k])
            points.append(np.stack([i, j], 1) * ROUGH + np.array(self.rough.origin[:2]))
        return np.concatenate(points)

    def hila(self) -> np.ndarray:
        """(2, 3) points where the main bronchi enter: the deepest bay of each medial surface near the usual place."""
        x, y, z = self.rough.points()
        depth, height = self.shape.size[1:]
        found = []
        for side, low, high in ((-1, 1, 3), (1, 4, 5)):
            lung = (self.codes >= low) & (self.codes <= high)
            medial = np.where(lung, np.abs(x), 90.0).min(axis=2)
            bay = ndimage.gaussian_filter(np.minimum(medial, 70.0), 2.5)
            prior = ((y[..., 0] / depth - 0.595) / 0.06) ** 2 + ((z[..., 0] / height - 0.545) / 0.06) ** 2
            k, j = np.unravel_index(np.argmax(bay * np.exp(-prior / 2)), bay.shape)
            # the bay itself reaches farther than its smoothed surface
            deepest = ndimage.maximum_filter(np.minimum(medial, 62.0), (7, 7))[k, j]
            away = float(np.clip(0.6 * deepest + 0.4 * bay[k, j], 24, 58))
            found.append([side * away, y[0, j, 0], z[k, 0, 0]])
        return np.array(found, np.float64)

    def floor(self, coarse: Grid) -> np.ndarray:
        """Height (mm) over the floor of the chest on a coarse grid: the lungs' own base, the fitted domes elsewhere."""
        x, y, z = (np.ascontiguousarray(np.broadcast_to(p, coarse.shape)) for p in coarse.points())
        model = z - lung_fields(x, y, z, self.shape)[1]
        lowest, found = self._base()
        near = ndimage.distance_transform_edt(~found, return_indices=True)
        base = lowest[tuple(near[1])]
        j = np.clip(np.round((coarse.axes()[1] - self.rough.origin[1]) / ROUGH).astype(int), 0, base.shape[0] - 1)
        i = np.clip(np.round((coarse.axes()[0] - self.rough.origin[0]) / ROUGH).astype(int), 0, base.shape[1] - 1)
        own = base[np.ix_(j, i)][None]
        trust = np.exp(-near[0][np.ix_(j, i)][None] * ROUGH / 8)
        trust = trust * (np.abs(own - model) < 30)
        return (z - (trust * own + (1 - trust) * model)).astype(np.float32)

    def _base(self) -> tuple[np.ndarray, np.ndarray]:
        """Height of the lowest lung voxel of each column (j, i), and where there is one."""
        lung = self.codes > 0
        found = lung.any(axis=0)
        lowest = self.rough.origin[2] + ROUGH * (lung.argmax(axis=0) - 0.5)
        return np.where(found, lowest, 0.0), found

    def heart_room(self) -> tuple[np.ndarray, float]:
        """Center (3,) and volume (mL) of the space between the lungs where the heart lies."""
        x, y, z = self.rough.points()
        width, depth, height = self.shape.size
        top = min(d.top for d in self.shape.domes)
        lung = self.codes > 0
        between = (
            np.maximum.accumulate(lung, axis=2) & np.maximum.accumulate(lung[:, :, ::-1], axis=2)[:, :, ::-1] & ~lung
        )
        room = between & (y < 0.68 * depth) & (z > top) & (z < top + 0.30 * height)
        # roots and great vessels lie near the midline: what bulges beside it is heart
        bulge = between & (y < 0.68 * depth) & (np.abs(x) > 25) & (z > top - 10) & (z < 0.6 * height)
        if not room.any() or not bulge.any():
            return np.array([22.0, 0.345 * depth, top + 40]), HEART_ROOM
        k, j, i = (float(v.mean()) for v in np.nonzero(room))
        center = self.rough.to_point(np.array([k, j, i]))
        center[2] = self.rough.to_point(np.array([np.nonzero(bulge)[0].mean(), 0, 0]))[2]
        return center, float(room.sum() * ROUGH**3 / 1000)


def measure(lobe_map: LobeMap, traits: dict[str, float]) -> Measured:
    """Read the shape of the chest off a lobe map."""
    width, depth, height = lobe_map.size
    count = np.ceil(np.array([height, depth, width]) / ROUGH).astype(int) + 4
    corner = (-width / 2 - ROUGH, -ROUGH, -ROUGH)
    rough = Grid(ROUGH, (int(count[0]), int(count[1]), int(count[2])), corner)
    codes = lobe_map.on(rough, ROUGH / 2)
    tables, domes = [], []
    for side, low, high in ((0, 1, 3), (1, 4, 5)):
        lung = (codes >= low) & (codes <= high)
        tables.append(dense_table(PROFILE_Z, _profile(lung, rough, side, lobe_map.size), lobe_map.size))
        domes.append(_dome(lung, rough, tables[-1], lobe_map.size))
    shape = ChestShape((float(width), float(depth), float(height)), np.stack(tables), (domes[0], domes[1]), traits)
    return Measured(shape, rough, codes)


def _profile(lung: np.ndarray, rough: Grid, side: int, size: np.ndarray) -> np.ndarray:
    """Profile rows (relative coordinates) of one lung; the mean of real lungs where it has no section."""
    x, y, z = rough.axes()
    rows = PROFILE_MEAN[side].copy()
    top = z[np.flatnonzero(lung.any(axis=(1, 2)))[-1]] / size[2]
    for n, height in enumerate(PROFILE_Z):
        k = int(np.argmin(np.abs(z - height * top * size[2])))
        j, i = np.nonzero(lung[k])
        if len(j) < 12:
            continue
        px, py = np.abs(x[i]) / (size[0] / 2), y[j] / size[1]
        edge = 1.5 * ROUGH / size[1]
        rows[n] = [
            px.max(), min(px.min(), 0.1), py.min(), py.max(), py[px > px.max() - 0.03].mean(),
            px[py < py.min() + edge].mean(), px[py > py.max() - edge].mean(),
        ]  # fmt: skip
    return rows


def _dome(lung: np.ndarray, rough: Grid, table: np.ndarray, size: np.ndarray) -> Dome:
    """Half a diaphragm fitted to the base of one lung."""
    row = table[int(0.9 / 1.12 * (len(table) - 1))]
    cx, cy = 0.5 * float(row[0]), float(row[2] + 0.42 * (row[3] - row[2]))
    extent = (float(row[0]) - cx, cx, cy - float(row[2]), float(row[3]) - cy)
    x, y, _ = rough.axes()
    found = lung.any(axis=0)
    lowest = rough.origin[2] + ROUGH * (lung.argmax(axis=0) - 0.5)
    dx, dy = np.abs(x)[None, :] - cx, y[:, None] - cy
    u, v = dx / np.where(dx > 0, extent[0], extent[1]), dy / np.where(dy > 0, extent[3], extent[2])
    e = np.hypot(u, v)

    def level(where: np.ndarray, share: float, other: float) -> float:
        values = lowest[where & found]
        return float(np.quantile(values, share)) if values.size > 5 else other

    top = level((e < 0.5) & (u > -0.2), 0.5, 0.27 * size[2])
    lateral = level((u > 0.85) & (np.abs(v) < 0.4), 0.3, 0.055 * size[2])
    front = level((v < -0.8) & (u > 0), 0.3, 0.15 * size[2])
    back = level((v > 0.8) & (np.abs(u) < 0.5), 0.2, 0.0)
    rim = (min(lateral, top - 8), top - 0.09 * size[2], min(front, top - 6), min(back, top - 15))
    p = DOME_POWER.tolist()
    return Dome((cx, cy), extent, top, rim, (p[0], p[1], p[2], p[3]))


def fissures_of_lobes(
    lobes: np.ndarray, grid: Grid, hila: np.ndarray, reach: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (float32, mm, at most 12) to the border between lobes and completeness (uint8) of a lobe map.

    Arguments as in ``fissures.label_lobes``; ``reach`` as in ``fissures.Fissures``.
    """
    kind = _borders(lobes)
    distance = np.full(lobes.shape, 12, np.float32)
    complete = np.zeros(lobes.shape, np.uint8)
    coarse = grid.coarse(4.0)
    noise = upsample(0.12 * SmoothNoise.around(rng, grid, 40.0).on(coarse), coarse, grid)
    x, y, z = grid.points()
    for side, first, last in ((0, 1, 3), (1, 4, 5)):
        lung = (lobes >= first) & (lobes <= last)
        box = tuple(
            slice(n[0], n[-1] + 1) for n in (np.flatnonzero(lung.any(axis=a)) for a in ((1, 2), (0, 2), (0, 1)))
        )
        part, inside = kind[box], lung[box]
        if not part[inside].any():
            continue
        away, nearest = ndimage.distance_transform_edt((part == 0) | ~inside, grid.spacing, return_indices=True)
        reached = np.where(part[tuple(nearest)] == 2, reach[2], reach[side])
        d2 = (
            (x[..., box[2]] - hila[side, 0]) ** 2
            + (y[:, box[1]] - hila[side, 1]) ** 2
            + (z[box[0]] - hila[side, 2]) ** 2
        )
        width = (box[2].stop - box[2].start) * grid.spacing * 1.1
        whole = np.sqrt(d2) / width + noise[box] >= reached
        distance[box][inside] = np.minimum(away[inside] + grid.spacing / 2, 12)
        complete[box][inside] = whole[inside]
    return distance, complete


def _borders(lobes: np.ndarray) -> np.ndarray:
    """uint8: voxels beside another lobe of the same lung, 1 on an oblique, 2 on the horizontal fissure."""
    kind = np.zeros(lobes.shape, np.uint8)
    for axis in range(3):
        a, b = np.moveaxis(lobes, axis, 0)[:-1], np.moveaxis(lobes, axis, 0)[1:]
        view = np.moveaxis(kind, axis, 0)
        same = (a > 0) & (b > 0) & (a != b) & ((a > 3) == (b > 3))
        value = np.where((a < 3) & (b < 3), 2, 1).astype(np.uint8)
        for part in (view[:-1], view[1:]):
            part[same] = np.maximum(part[same], value[same])
    return kind
