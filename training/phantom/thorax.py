"""A synthetic thorax: every voxel's organ, the five lobes and the fissures, exactly known.

``make_thorax`` draws one; ``thorax_from_lobes`` builds one around a given lobe map. The frame is canonical LPS.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from training.phantom.fissures import LungBoxes, draw_fissures, label_lobes
from training.phantom.grid import Grid, upsample
from training.phantom.lobe_map import fissures_of_lobes, measure, read_lobe_map
from training.phantom.organ import Organ
from training.phantom.organs import Bone, Mediastinum, place_bones, place_mediastinum, place_spine
from training.phantom.paint import Scene, paint_organs
from training.phantom.shape import ChestShape, Wall, draw_chest, lung_fields, make_wall, wall_fields
from training.phantom.solids import Ellipsoid, Tube, smooth_union
from training.phantom.warp import Warp

__all__ = ["Organ", "Thorax", "make_thorax", "thorax_from_lobes"]

#: Smooth shapes are evaluated at this spacing (mm).
COARSE = 3.5
BELOW, ABOVE = 36.0, 36.0


@dataclass
class Thorax:
    """A thorax with exact labels.

    Attributes:
        grid: the canonical grid of all arrays [k, j, i].
        organs: uint8 ``Organ`` codes. Windpipe, bronchi and pulmonary vessels are not in it, room is left for them.
        lobes: uint8 ``Lobe`` codes 1-5, 0 outside the lungs; ``organs == LUNG`` exactly where lobes > 0.
        fissure_distance: float16, mm to the nearest interlobar fissure inside the lungs (at most 12), 12 outside.
        fissure_complete: uint8, 1 where the nearest piece of fissure is really there, 0 where the lobes are fused.
        landmarks: LPS points (x, y, z) in mm.
        parameters: what was drawn.
    """

    grid: Grid
    organs: np.ndarray
    lobes: np.ndarray
    fissure_distance: np.ndarray
    fissure_complete: np.ndarray
    landmarks: dict[str, np.ndarray]
    parameters: dict[str, float | str] = field(default_factory=dict)


def make_thorax(seed: int, spacing: float = 1.5, shifted: bool = False) -> Thorax:
    """Draw a thorax.

    Args:
        seed: the same seed gives the same anatomy, at every spacing.
        spacing: isotropic voxel size, mm.
        shifted: use the held-out generator (other fissure functions, proportions and noise).
    """
    rng = np.random.default_rng([seed, int(shifted), 7])
    shape = draw_chest(rng, shifted)
    wall = make_wall(shape, BELOW + 8, ABOVE + 8)
    spine = place_spine(rng, shape)
    media = place_mediastinum(rng, shape, spine)
    bones = place_bones(rng, shape, wall, spine)
    fissures = draw_fissures(rng, shifted)
    grid = _grid(shape, wall, spacing)
    waves = ((6.0, 110.0), (1.2, 45.0)) if shifted else ((4.0, 170.0), (1.3, 60.0))
    warp = Warp.draw(rng, grid.coarse(COARSE), waves)
    _unwarp(warp, media, bones)
    scene = Scene(shape, wall, spine, media, bones, warp, {})
    scene.fields.update(_fields(rng, scene))
    lungs = _lungs(grid, warp.grid, scene.fields)
    hila = np.stack([media.landmarks["hilum_right"], media.landmarks["hilum_left"]])
    lobes, distance, complete = label_lobes(lungs, grid, LungBoxes.of(lungs, grid), fissures, hila, rng)
    organs = paint_organs(rng, grid, lobes, scene)
    parameters = _parameters(shape, fissures.reach, "shifted" if shifted else "standard")
    parameters["accessory_lobe"] = fissures.accessory[0]
    return Thorax(grid, organs, lobes, distance.astype(np.float16), complete, media.landmarks, parameters)


def thorax_from_lobes(
    lobes: np.ndarray,
    lobe_spacing: tuple[float, float, float],
    lobe_origin: tuple[float, float, float],
    seed: int,
    spacing: float = 1.5,
) -> Thorax:
    """Build a thorax around the lungs of a real lobe map; grid and landmarks stay in the map's LPS coordinates.

    Args:
        lobes: canonical lobe map [k, j, i], LUNA16 codes (4-8, + 512 on borders) or ``Lobe`` codes (1-5).
        lobe_spacing: its spacing in mm along (i, j, k).
        lobe_origin: LPS mm of its voxel 0.
        seed: chance of all that the map does not tell.
        spacing: isotropic voxel size of the thorax, mm.

    Raises:
        ValueError: the map lacks a lung.
    """
    rng = np.random.default_rng([seed, 2, 7])
    lobe_map = read_lobe_map(lobes, lobe_spacing, lobe_origin)
    traits = draw_chest(rng).traits
    measured = measure(lobe_map, traits)
    shape = measured.shape
    wall = make_wall(shape, BELOW + 8, ABOVE + 8, measured.outline)
    spine = place_spine(rng, shape)
    media = place_mediastinum(rng, shape, spine, measured.hila(), measured.heart_room())
    bones = place_bones(rng, shape, wall, spine)
    reach = draw_fissures(rng).reach
    grid = _grid(shape, wall, spacing)
    warp = Warp.draw(rng, grid.coarse(COARSE), ())
    scene = Scene(shape, wall, spine, media, bones, warp, {})
    scene.fields.update(_fields(rng, scene))
    scene.fields["floor"] = measured.floor(warp.grid)
    codes = lobe_map.on(grid, 1.2)
    hila = np.stack([media.landmarks["hilum_right"], media.landmarks["hilum_left"]])
    distance, complete = fissures_of_lobes(codes, grid, hila, reach, rng)
    organs = paint_organs(rng, grid, codes, scene)
    landmarks = {name: point + lobe_map.offset for name, point in media.landmarks.items()}
    corner = np.array(grid.origin) + lobe_map.offset
    there = Grid(spacing, grid.shape, (float(corner[0]), float(corner[1]), float(corner[2])))
    parameters = _parameters(shape, reach, "lobe map")
    return Thorax(there, organs, codes, distance.astype(np.float16), complete, landmarks, parameters)


def _parameters(shape: ChestShape, reach: np.ndarray, generator: str) -> dict[str, float | str]:
    names = ("fused_right_oblique", "fused_left_oblique", "fused_horizontal")
    return {
        **shape.traits,
        **dict(zip(("width", "depth", "height"), shape.size, strict=True)),
        **{name: float(value) for name, value in zip(names, reach, strict=True)},
        "generator": generator,
    }


def _grid(shape: ChestShape, wall: Wall, spacing: float) -> Grid:
    """The grid around the body, its corner a multiple of 12 mm from the frame's zero."""
    high = wall.heights <= shape.size[2] + 4
    angle = 2 * np.pi * np.arange(wall.body.shape[1]) / wall.body.shape[1]
    body = wall.body[high]
    half = min(float((body * np.abs(np.sin(angle))).max()) + 6, 208.0)
    front = wall.center + float((body * np.cos(angle)).min()) - 10
    back = wall.center + float((body * np.cos(angle)).max()) + 16
    low = np.array([-half, front, -BELOW])
    size = np.array([half, back, shape.size[2] + ABOVE]) - low
    count = np.ceil(size / spacing).astype(int) + 1
    return Grid(spacing, (int(count[2]), int(count[1]), int(count[0])), (float(low[0]), float(low[1]), float(low[2])))


def _unwarp(warp: Warp, media: Mediastinum, bones: list[Bone]) -> None:
    """Move everything that is placed by points from the shape's frame to real positions, in place."""
    tubes = [tube for _, tube in media.tubes] + [bone.tube for bone in bones]
    tubes += [solid for solid, _ in media.space if isinstance(solid, Tube) and not any(solid is t for t in tubes)]
    cuts = np.cumsum([len(t.points) for t in tubes])[:-1]
    moved = warp.back(np.concatenate([t.points for t in tubes]))
    for tube, points in zip(tubes, np.split(moved, cuts), strict=True):
        tube.points = points
    heart = media.heart
    solids: list[Ellipsoid] = [heart.left_ventricle, heart.left_wall, heart.right_ventricle, heart.right_wall]
    solids += [heart.left_atrium, heart.right_atrium]
    solids += [s for s, _ in media.space if isinstance(s, Ellipsoid) and not any(s is h for h in solids)]
    shift = warp.back(heart.center)[0] - heart.center
    for solid in solids:
        inside = any(solid is h for h in (*heart.parts, heart.left_ventricle, heart.right_ventricle))
        solid.center = solid.center + shift if inside else warp.back(solid.center)[0]
    for name, point in media.landmarks.items():
        bound = name.startswith("left_atrium") or name == "pulmonary_trunk"
        media.landmarks[name] = point + shift if bound else warp.back(point)[0]


def _fields(rng: np.random.Generator, scene: Scene) -> dict[str, np.ndarray]:
    """The smooth fields (mm) on the coarse grid: cavity, floor, inner, muscle, body, free (of organs), left."""
    x, y, z = scene.warp.points()
    cavity, floor = lung_fields(x, y, z, scene.shape)
    inner, muscle, body = wall_fields(x, y, z, scene.wall)
    free = np.abs(x) - np.float32(rng.uniform(1.3, 2.2) + 0.07 * scene.shape.traits["fat"])
    for solid, gap in scene.media.space:
        smooth_union(free, scene.warp.grid, solid, gap, 9.0)
    rough = np.float32(0.7) * scene.noise(rng, 26.0)
    names = ("cavity", "floor", "inner", "muscle", "body", "free", "left")
    return dict(zip(names, (cavity + rough, floor, inner, muscle, body, free - rough, x), strict=True))


def _lungs(grid: Grid, coarse: Grid, fields: dict[str, np.ndarray]) -> np.ndarray:
    """uint8: 1 right, 2 left lung; the largest connected part of each side."""
    room = np.minimum(np.minimum(fields["cavity"], fields["inner"] - 1.5), fields["free"])
    keep = np.full(coarse.shape, -1, np.float32)
    rough = np.minimum(room, fields["floor"] - 1) > -0.7
    for side in (fields["left"] < 0, fields["left"] >= 0):
        labels, count = ndimage.label(rough & side)
        if count:
            size = np.bincount(labels.ravel())
            size[0] = 0
            keep[ndimage.binary_dilation(labels == size.argmax())] = 1
    room = np.where(keep > 0, room, np.minimum(room, -1))
    fine = np.minimum(upsample(room, coarse, grid), upsample(fields["floor"], coarse, grid) - 1.5)
    left = upsample(fields["left"], coarse, grid) >= 0
    return np.where(fine > 0, left.astype(np.uint8) + 1, 0).astype(np.uint8)
