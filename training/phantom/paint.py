"""Painting the organs of a placed chest into a label map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from training.phantom.grid import Grid, SmoothNoise, upsample
from training.phantom.organ import Organ
from training.phantom.organs import Bone, Mediastinum, Spine
from training.phantom.shape import ChestShape, Wall
from training.phantom.solids import Ellipsoid, Tube, paint_tube, spline
from training.phantom.warp import Warp

__all__ = ["Scene", "paint_organs"]

SOFT = (Organ.FAT, Organ.MUSCLE, Organ.MEDIASTINAL_FAT)


@dataclass
class Scene:
    """All that is painted: the shape's frame is bent to real positions by ``warp``; tubes and solids are real already.

    Attributes:
        fields: coarse fields in mm: ``floor``, ``inner``, ``muscle``, ``body``.
    """

    shape: ChestShape
    wall: Wall
    spine: Spine
    media: Mediastinum
    bones: list[Bone]
    warp: Warp
    fields: dict[str, np.ndarray]

    def noise(self, rng: np.random.Generator, wavelength: float) -> np.ndarray:
        """A smooth random field of unit deviation on the coarse grid."""
        return SmoothNoise.around(rng, self.warp.grid, wavelength).on(self.warp.grid)


def _allow(*codes: int) -> np.ndarray:
    mask = np.zeros(256, bool)
    mask[list(codes)] = True
    return mask


def _put(
    organs: np.ndarray, box: tuple[slice, slice, slice], inside: np.ndarray, code: int, allowed: np.ndarray
) -> None:
    part = organs[box]
    part[inside & allowed[part]] = code


def _put_solid(organs: np.ndarray, grid: Grid, solid: Ellipsoid, code: int, allowed: np.ndarray) -> None:
    box = grid.box(*solid.bounds(1))
    part = grid.part(box)
    if min(part.shape) > 0:
        _put(organs, box, solid.distance(part, 1) < 0, code, allowed)


def paint_organs(rng: np.random.Generator, grid: Grid, lobes: np.ndarray, scene: Scene) -> np.ndarray:
    """The organ layer (uint8 [k, j, i]); lung exactly where ``lobes`` > 0."""
    organs = _base_tissue(rng, grid, lobes, scene)
    _abdomen(rng, organs, grid, scene)
    _heart(organs, grid, scene.media)
    _vessels(organs, grid, scene.media)
    _small_organs(rng, organs, grid, scene)
    _spine(organs, grid, scene)
    _bones(organs, grid, scene.bones)
    _sternum(organs, grid, scene)
    _table(organs, grid)
    return organs


@njit(cache=True)
def _tissue(lobes, floor, inner, muscle, body, plane, rim, width, organs):  # type: ignore[no-untyped-def]
    """Base tissue of every voxel by its depth under the surfaces; ``plane`` shifts the fat between the muscles."""
    nk, nj, ni = lobes.shape
    for k in range(nk):
        for j in range(nj):
            for i in range(ni):
                code, depth, out = 0, body[k, j, i], -inner[k, j, i]
                if lobes[k, j, i] > 0:
                    code = 6
                elif depth <= 0:
                    code = 0
                elif depth < 1.8:
                    code = 21
                elif muscle[k, j, i] <= 0:
                    code = 1
                elif out >= 0:
                    shift = plane[k, j, i]
                    near = min(abs(out - 11.5 - 1.5 * shift), abs(out - 23 - 4 * shift), abs(out - 38 + 5 * shift))
                    code = 1 if near < width * (0.5 + 0.5 * shift) and out > 8 else 2
                elif floor[k, j, i] > 0:
                    code = 2 if -out < rim[k] else 7
                else:
                    code = 2 if floor[k, j, i] > -2.5 or -out < 3 else 1
                organs[k, j, i] = code


def _base_tissue(rng: np.random.Generator, grid: Grid, lobes: np.ndarray, scene: Scene) -> np.ndarray:
    coarse, height = scene.warp.grid, scene.shape.size[2]
    floor, inner, muscle, body = (
        upsample(scene.fields[name], coarse, grid) for name in ("floor", "inner", "muscle", "body")
    )
    plane = upsample(scene.noise(rng, 50.0), coarse, grid)
    # the root of the neck is filled with muscle, the mediastinum with fat
    t = np.clip((grid.axes()[2] / height - 0.9) / 0.14, 0, 1)
    rim = (2 + 16 * t * t * (3 - 2 * t)).astype(np.float32)
    organs = np.empty(grid.shape, np.uint8)
    width = np.float32(1.0 + 0.05 * scene.shape.traits["fat"])
    _tissue(lobes, floor, inner, muscle, body, plane, rim, width, organs)
    return organs


def _heart(organs: np.ndarray, grid: Grid, media: Mediastinum) -> None:
    heart = media.heart
    soft = _allow(*SOFT)
    over = _allow(*SOFT, Organ.MYOCARDIUM)
    for solid, code, allowed in (
        (heart.left_wall, Organ.MYOCARDIUM, soft),
        (heart.left_ventricle, Organ.LEFT_VENTRICLE, over),
        (heart.right_ventricle, Organ.RIGHT_VENTRICLE, soft),
        (heart.right_wall, Organ.MYOCARDIUM, soft),
        (heart.left_atrium, Organ.LEFT_ATRIUM, soft),
        (heart.right_atrium, Organ.RIGHT_ATRIUM, soft),
    ):
        _put_solid(organs, grid, solid, code, allowed)


def _vessels(organs: np.ndarray, grid: Grid, media: Mediastinum) -> None:
    soft = _allow(*SOFT, Organ.MYOCARDIUM, Organ.LIVER)
    for name, tube in media.tubes:
        paint_tube(organs, grid, tube, Organ[name], Organ[name], soft)


def _abdomen(rng: np.random.Generator, organs: np.ndarray, grid: Grid, scene: Scene) -> None:
    """Liver, stomach with gas, spleen, sometimes the left colon, and deeper down loops of bowel."""
    shape, coarse = scene.shape, scene.warp.grid
    (width, depth, _), fields = shape.size, scene.fields
    x, y, z = coarse.points()
    inside = np.minimum(-fields["floor"] - 3, fields["inner"] - 4)
    top = shape.domes[1].top
    stop = min(int((max(d.top for d in shape.domes) + 20 - grid.origin[2]) / grid.spacing), grid.shape[0])
    lower = (slice(0, stop), slice(0, grid.shape[1]), slice(0, grid.shape[2]))
    solids = [
        (Organ.LIVER, _liver(rng, shape, x, y, fields["floor"] + 0 * z)),
        (Organ.STOMACH, _round(rng, [0.36 * width / 2, 0.40 * depth, top - 38], [42, 46, 36])),
        (Organ.SPLEEN, _round(rng, [0.64 * width / 2, 0.72 * depth, top - 46], [30, 38, 46])),
    ]
    gas_line = 0.40 * depth - rng.uniform(-12, 30)
    for code, solid in solids:
        value = -solid.distance(coarse, 0) if isinstance(solid, Ellipsoid) else solid
        value = upsample(np.minimum(inside, value), coarse, grid, lower)
        _put(organs, lower, value > 0, code, _allow(Organ.FAT))
        if code == Organ.STOMACH:
            gas = (value > 3) & (grid.points()[1] < gas_line)
            _put(organs, lower, gas, Organ.BOWEL_GAS, _allow(Organ.STOMACH))
    _colon(rng, organs, grid, scene)
    bowel = np.minimum(inside - 8, 12 * (scene.noise(rng, 45.0) - 0.2))
    deep = fields["floor"] + rng.uniform(55, 80) + 0 * z
    bowel = upsample(np.minimum(bowel, -deep), coarse, grid, lower)
    _put(organs, lower, bowel > 0, Organ.STOMACH, _allow(Organ.FAT))
    if rng.random() < 0.3:
        _put(organs, lower, bowel > 9, Organ.BOWEL_GAS, _allow(Organ.STOMACH))


def _round(rng: np.random.Generator, center: list[float], radii: list[float]) -> Ellipsoid:
    """An upright ellipsoid near a place, its size and place a little random."""
    return Ellipsoid(np.array(center) + rng.normal(0, 5, 3), np.array(radii) * rng.uniform(0.8, 1.15, 3), np.eye(3))


def _liver(rng: np.random.Generator, shape: ChestShape, x: np.ndarray, y: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Depth inside the liver: a wedge under the diaphragm, thick on the right, ending left of the midline."""
    depth = shape.size[1]
    end = rng.uniform(50, 105)
    taper = 1 - (np.clip(x + 50, 0, None) / (end + 50)) ** 2
    back = 1 - np.clip((y - 0.45 * depth) / (0.38 * depth), 0, None) ** 2 * np.clip(x / 60 + 0.8, 0, 1)
    thickness = rng.uniform(110, 150) * np.minimum(taper, 1) * np.minimum(back, 1)
    return (floor + thickness).astype(np.float32)


def _colon(rng: np.random.Generator, organs: np.ndarray, grid: Grid, scene: Scene) -> None:
    """The left flexure of the colon, filled with gas, in some."""
    if rng.random() > 0.4:
        return
    width, depth, _ = scene.shape.size
    z = scene.shape.domes[1].top - rng.uniform(45, 75)
    points = [
        [0.35 * width / 2, 0.2 * depth, z - 20],
        [0.6 * width / 2, 0.3 * depth, z],
        [0.72 * width / 2, 0.45 * depth, z - 25],
    ]
    tube = spline(np.array(points), rng.uniform(12, 20))
    paint_tube(organs, grid, tube, Organ.STOMACH, Organ.BOWEL_GAS, _allow(Organ.FAT, Organ.STOMACH), 2.0)


def _small_organs(rng: np.random.Generator, organs: np.ndarray, grid: Grid, scene: Scene) -> None:
    """Thyroid, lymph nodes and breasts."""
    shape, marks = scene.shape, scene.media.landmarks
    height = shape.size[2]
    top, carina = marks["trachea_top"], marks["carina"]
    soft = _allow(*SOFT)
    way = (top - carina) / (top - carina)[2]
    for side in (-1, 1):
        center = carina + way * (height + rng.uniform(14, 26) - carina[2]) + [side * 15, -2, 0]
        _put_solid(organs, grid, _round(rng, center.tolist(), [9, 11, 21]), Organ.THYROID, soft)
    fat = _allow(Organ.MEDIASTINAL_FAT)
    for _ in range(int(rng.integers(4, 14))):
        at = carina + way * rng.uniform(-45, 70) + rng.normal(0, 1, 3) * [16, 14, 6]
        radii = rng.uniform(2.0, 4.5) * rng.uniform([0.8, 0.8, 1.0], [1.3, 1.3, 1.7])
        _put_solid(organs, grid, Ellipsoid(at, radii, np.eye(3)), Organ.LYMPH_NODE, fat)
    if shape.traits["breast"] > 4:
        _breasts(rng, organs, grid, scene)


def _breasts(rng: np.random.Generator, organs: np.ndarray, grid: Grid, scene: Scene) -> None:
    """Glandular tissue in the fat of the breasts."""
    size, coarse = scene.shape.traits["breast"], scene.warp.grid
    gland = scene.noise(rng, 24.0)
    for side in (-1, 1):
        angle = side * (np.pi - 0.58)
        z = np.array([0.47 * scene.shape.size[2]])
        skin = float(
            np.interp(z[0], scene.wall.heights, scene.wall.body[:, int(round((np.pi - 0.58) / (2 * np.pi) * 96))])
        )
        center = scene.wall.point(np.array([angle]), z)[0]
        radius = np.hypot(center[0], center[1] - scene.wall.center)
        direction = np.array([np.sin(angle), np.cos(angle), 0])
        center = center + direction * (skin - radius - 0.5 * size - 4)
        solid = Ellipsoid(scene.warp.back(center)[0], np.array([42, 0.6 * size + 6, 40]), _axes(direction))
        box = grid.box(*solid.bounds(1))
        part = grid.part(box)
        inside = (solid.distance(part, 1) < 0) & (upsample(gland, coarse, grid, box) > rng.uniform(-0.6, 0.8))
        _put(organs, box, inside, Organ.BREAST, _allow(Organ.FAT))


def _axes(direction: np.ndarray) -> np.ndarray:
    """Frame with the horizontal ``direction`` as second axis and z as third."""
    return np.array([[direction[1], -direction[0], 0], direction, [0, 0, 1.0]])


def _spine(organs: np.ndarray, grid: Grid, scene: Scene) -> None:
    """Vertebral bodies with discs, canal, arches and processes."""
    spine, warp = scene.spine, scene.warp
    soft = _allow(*SOFT)
    bone = _allow(*SOFT, Organ.BONE_CORTEX, Organ.BONE_MARROW)
    z = np.arange(grid.origin[2] - 4, grid.to_point(np.array(grid.shape))[2] + 4, 2.0)
    step = spine.levels[0] - spine.levels[1]
    phase = np.abs(np.mod((z - spine.levels[0]) / step + 0.5, 1.0) - 0.5) * 2
    body = warp.back(np.stack([0 * z, spine.center(z), z], 1))
    radius = spine.radius_at(z)
    waist = radius * (0.88 + 0.12 * phase**2)
    for s in (-0.24, 0.24):
        tube = Tube(body + np.stack([s * radius, 0 * z, 0 * z], 1), waist * 0.84)
        paint_tube(organs, grid, tube, Organ.BONE_CORTEX, Organ.BONE_MARROW, soft, 1.3)
    behind = np.stack([0 * z, radius, 0 * z], 1)
    arch = Tube(body + behind + [0, 8, 0], np.full(len(z), 12.0))
    paint_tube(organs, grid, arch, Organ.BONE_CORTEX, Organ.BONE_MARROW, soft, 1.5)
    for level in np.concatenate(
        [spine.levels[0] + step * np.arange(4, 0, -1), spine.levels, spine.levels[-1] - step * np.arange(1, 4)]
    ):
        _vertebral_processes(organs, grid, scene, level, soft)
    canal = Tube(body + behind + [0, 6, 0], np.full(len(z), 8.0))
    paint_tube(organs, grid, canal, Organ.SPINAL_CANAL, Organ.SPINAL_CANAL, bone)
    for level in spine.levels[0] + step * (np.arange(-16, 8) + 0.5):
        n = int(np.argmin(np.abs(z - level)))
        reach = np.array([radius[n] + 3, radius[n] - 1, 2.4])
        box = grid.box(body[n] - reach, body[n] + reach)
        marrow = _allow(Organ.BONE_CORTEX, Organ.BONE_MARROW)
        _put(organs, box, np.ones(organs[box].shape, bool), Organ.CARTILAGE, marrow)


def _vertebral_processes(organs: np.ndarray, grid: Grid, scene: Scene, level: float, soft: np.ndarray) -> None:
    spine = scene.spine
    r = float(spine.radius_at(level))
    c = scene.warp.back(np.array([0, spine.center(level), level]))[0]
    ends = np.stack([c + [0, r + 14, -4], c + [0, r + 42, -20]])
    lines = [Tube(ends, np.array([4.0, 3.2]))]
    for side in (-1, 1):
        lines.append(Tube(np.stack([c + [side * 8, r + 7, 0], c + [side * (r + 17), r + 14, 3]]), np.array([5.0, 4.2])))
        lines.append(Tube(np.stack([c + [side * 11, r + 10, 10], c + [side * 11, r + 10, -10]]), np.array([4.5, 4.5])))
    for tube in lines:
        paint_tube(organs, grid, tube, Organ.BONE_CORTEX, Organ.BONE_MARROW, soft, 1.3)


def _bones(organs: np.ndarray, grid: Grid, bones: list[Bone]) -> None:
    soft, air = _allow(*SOFT), _allow(Organ.AIR)
    for bone in bones:
        if bone.around > 0:  # an arm: its skin, fat and muscle outside of the trunk
            for wider, code in ((0.0, Organ.SKIN), (-2.0, Organ.FAT), (-9.0, Organ.MUSCLE)):
                allowed = air if code == Organ.SKIN else _allow(Organ.SKIN if code == Organ.FAT else Organ.FAT)
                tube = Tube(bone.tube.points, np.full(len(bone.tube.points), bone.around + wider))
                paint_tube(organs, grid, tube, code, code, allowed)
    for bone in bones:
        if bone.cartilage:
            paint_tube(organs, grid, bone.tube, Organ.CARTILAGE, Organ.CARTILAGE, soft)
        else:
            paint_tube(organs, grid, bone.tube, Organ.BONE_CORTEX, Organ.BONE_MARROW, soft, bone.cortex)


def _sternum(organs: np.ndarray, grid: Grid, scene: Scene) -> None:
    """Manubrium and body of the breastbone: flat tubes side by side in front of the inner wall."""
    height = scene.shape.size[2]
    z = np.linspace(0.36, 0.86, 24) * height
    half = np.interp(z / height, [0.36, 0.42, 0.66, 0.70, 0.78, 0.86], [7, 14, 11, 15, 24, 22])
    soft = _allow(*SOFT, Organ.CARTILAGE)
    front = scene.wall.point(np.full(len(z), np.pi), z, 7.0)
    for s in np.linspace(-1, 1, 9):
        points = front + np.stack([s * half, 1.5 * np.full(len(z), s * s), np.zeros(len(z))], 1)
        tube = Tube(scene.warp.back(points), np.full(len(z), 5.5))
        paint_tube(organs, grid, tube, Organ.BONE_CORTEX, Organ.BONE_MARROW, soft, 1.3)


def _table(organs: np.ndarray, grid: Grid) -> None:
    """The scanner's table under the back."""
    x, y, _ = grid.points()
    body = np.flatnonzero((organs > 0).any(axis=(0, 2)))
    bottom = float(grid.origin[1] + grid.spacing * body[-1]) if len(body) else 0.0
    surface = bottom - 3 - 28 * (x / 210) ** 2
    table = np.broadcast_to((y > surface + 3) & (y < surface + 6), organs.shape)
    organs[table & (organs == 0)] = Organ.TABLE
