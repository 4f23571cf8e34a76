"""Where the organs of a chest lie: heart, great vessels, esophagus, spine, ribs and the upper abdomen.

All positions are derived from the shape of the chest (``ChestShape``, ``Wall``); fractions are of its half width, depth
and height. They were set by eye on CTs and hold for a supine adult.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from training.phantom.shape import POSTERIOR, ChestShape, Wall
from training.phantom.solids import Ellipsoid, Tube, spline

__all__ = ["Bone", "Heart", "Mediastinum", "Spine", "place_bones", "place_mediastinum", "place_spine"]


@dataclass
class Spine:
    """The vertebral column: z of the thoracic levels 1-12 and the center line of the bodies."""

    levels: np.ndarray
    heights: np.ndarray
    y: np.ndarray
    radius: float

    def center(self, z: np.ndarray | float) -> np.ndarray:
        """y of the vertebral bodies' centers at height z."""
        return np.interp(z, self.heights, self.y)

    def radius_at(self, z: np.ndarray | float) -> np.ndarray:
        """Half width of the vertebral bodies at height z, growing downward."""
        return self.radius * np.interp(z, self.levels[[11, 6, 0]], [1.12, 1.0, 0.82])


@dataclass
class Heart:
    """The chambers as ellipsoids, the outer wall of the ventricles included where named so.

    ``frame``: rows are the unit axes: along the long axis to the apex, across, and perpendicular to both.
    """

    center: np.ndarray
    frame: np.ndarray
    left_ventricle: Ellipsoid
    left_wall: Ellipsoid
    right_ventricle: Ellipsoid
    right_wall: Ellipsoid
    left_atrium: Ellipsoid
    right_atrium: Ellipsoid

    @property
    def parts(self) -> list[Ellipsoid]:
        return [self.left_wall, self.right_wall, self.left_atrium, self.right_atrium]


@dataclass
class Mediastinum:
    """Organs between the lungs, and the space that the lungs leave free.

    Attributes:
        heart: chambers.
        tubes: (organ name, tube) in painting order.
        space: (solid, gap mm) that the lungs stay out of; holds also the room of windpipe, bronchi and lung roots.
        landmarks: LPS points.
    """

    heart: Heart
    tubes: list[tuple[str, Tube]] = field(default_factory=list)
    space: list[tuple[Tube | Ellipsoid, float]] = field(default_factory=list)
    landmarks: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Bone:
    """A tube of bone.

    Attributes:
        tube: its place.
        cortex: thickness of its cortex, mm.
        cartilage: it is cartilage, without a cortex.
        around: radius (mm) of the limb around it, 0 for bones of the trunk.
    """

    tube: Tube
    cortex: float
    cartilage: bool = False
    around: float = 0.0


def place_spine(rng: np.random.Generator, shape: ChestShape) -> Spine:
    """The column behind the mediastinum, following the back of the lungs."""
    width, depth, height = shape.size
    z = np.linspace(-0.4, 1.5, 96) * height
    inside = np.clip(z, 0.15 * height, 0.85 * height)
    back = np.array([np.mean([shape.section(side, v)[POSTERIOR] for side in range(2)]) for v in inside])
    y = back - 0.125 * depth
    slope = (back[np.searchsorted(z, 0.84 * height)] - back[np.searchsorted(z, 0.68 * height)]) / (0.16 * height)
    y += np.clip(slope, -0.5, -0.15) * np.clip(z - 0.85 * height, 0, 0.35 * height)
    y -= 0.12 * np.clip(0.15 * height - z, 0, None)
    kernel = np.ones(13) / 13
    y = np.convolve(np.pad(y, 6, mode="edge"), kernel, mode="valid")
    step = height * rng.normal(1.0, 0.03) / 11.3
    levels = height * rng.normal(0.985, 0.015) - step * np.arange(12)
    return Spine(levels, z, y, float(rng.uniform(16, 18.5) * (width / 296) ** 0.5))


#: Volume (mL) between the lungs at the height of a heart of size 1, as ``lobe_map.Measured.heart_room`` measures it.
HEART_ROOM = 800.0


def _heart(rng: np.random.Generator, shape: ChestShape, room: tuple[np.ndarray, float] | None = None) -> Heart:
    """The heart over the diaphragm; ``room``: center (3,) and volume (mL) of a given space for it."""
    width, depth, height = shape.size
    size = (width * depth * height / (296 * 202 * 274)) ** (1 / 4) * float(np.clip(rng.normal(1.07, 0.08), 0.9, 1.28))
    bottom = min(d.top for d in shape.domes) - 0.03 * height
    center = np.array([rng.normal(22, 5) * size, 0.345 * depth + rng.normal(0, 4), bottom + 42 * size])
    if room is not None:
        size = float(np.clip((room[1] / HEART_ROOM) ** (1 / 3), 0.8, 1.3))
        # offsets of the chambers' center from the centroid of the space, measured on drawn chests
        level = 0.5 * (bottom + 42 * size) + 0.5 * (room[0][2] + 11)
        center = np.array([room[0][0] + 12.5, room[0][1] - 2.5, level])
    tilt = np.radians(rng.normal(38, 6))
    dip = np.radians(rng.normal(30, 6))
    along = np.array([np.cos(dip) * np.cos(tilt), -np.cos(dip) * np.sin(tilt), -np.sin(dip)])
    across = np.cross([0, 0, 1], along)
    across /= np.linalg.norm(across)
    frame = np.stack([along, across, np.cross(along, across)])
    upright = np.eye(3)

    def at(a: float, b: float, c: float) -> np.ndarray:
        return center + size * (a * frame[0] + b * frame[1] + c * frame[2])

    left, right = at(22, 14, -2), at(14, -17, -4)
    wall = rng.uniform(8, 11)
    return Heart(
        center,
        frame,
        Ellipsoid(left, size * np.array([40, 22, 23]), frame),
        Ellipsoid(left, size * np.array([40, 22, 23]) + wall, frame),
        Ellipsoid(right, size * np.array([42, 24, 28]), frame),
        Ellipsoid(right, size * np.array([42, 24, 28]) + 4, frame),
        Ellipsoid(center + size * np.array([-12, 41, 14]), size * np.array([36, 21, 25]), upright),
        Ellipsoid(center + size * np.array([-42, 9, 6]), size * np.array([21, 25, 31]), upright),
    )


def place_mediastinum(
    rng: np.random.Generator,
    shape: ChestShape,
    spine: Spine,
    hila: np.ndarray | None = None,
    room: tuple[np.ndarray, float] | None = None,
) -> Mediastinum:
    """Heart, vessels, esophagus and landmarks.

    Args:
        rng: source of chance.
        shape: the chest.
        spine: its spine.
        hila: (2, 3) given hilum points, right and left; else they are drawn.
        room: center and volume (mL) of a given space for the heart.
    """
    heart = _heart(rng, shape, room)
    media = Mediastinum(heart)
    _windpipe(rng, shape, spine, media, hila)
    _arteries(rng, shape, spine, media)
    _veins(rng, shape, spine, media)
    _esophagus(rng, shape, spine, media)
    _pulmonary_roots(shape, media)
    _leave_room(rng, shape, spine, media)
    return media


def _windpipe(
    rng: np.random.Generator, shape: ChestShape, spine: Spine, media: Mediastinum, hila: np.ndarray | None
) -> None:
    width, depth, height = shape.size
    z = height * rng.normal(0.635, 0.02)
    if hila is not None:
        z = float(hila[:, 2].mean()) + 0.075 * height
    z = max(z, media.heart.center[2] + 55)
    carina = np.array([rng.normal(-1, 3), spine.center(z) - spine.radius - rng.uniform(19, 25), z])
    top = height + 30.0
    media.landmarks["carina"] = carina
    media.landmarks["trachea_top"] = np.array([rng.normal(0, 3), spine.center(top) - spine.radius - 24, top])
    if hila is None:
        drop = height * 0.001
        right = carina + [-0.25 * width / 2 + rng.normal(0, 3), 4 + rng.normal(0, 3), -80 * drop + rng.normal(0, 4)]
        left = carina + [0.31 * width / 2 + rng.normal(0, 3), 9 + rng.normal(0, 3), -88 * drop + rng.normal(0, 4)]
        hila = np.stack([right, left])
    media.landmarks["hilum_right"], media.landmarks["hilum_left"] = hila[0], hila[1]


def _aorta(shape: ChestShape, spine: Spine, media: Mediastinum, radius: float) -> Tube:
    width, depth, height = shape.size
    carina, heart = media.landmarks["carina"], media.heart.center
    top = carina[2] + 0.075 * height
    down = [
        (21 + spine.radius * q, spine.center(z) - spine.radius * 0.85 - radius * 0.35, z)
        for q, z in ((0.35, carina[2] - 8), (0.2, 0.48 * height), (0.1, 0.33 * height))
    ]
    low = [
        (x, spine.center(z) - spine.radius - radius - 1, z)
        for x, z in ((15, 0.17 * height), (7, 0.02 * height), (3, -50))
    ]
    front = carina[1] - 42
    points = [
        heart + [2, 6, 18],
        (-10, front - 4, heart[2] + 38),
        (-16, front, carina[2] + 2),
        (-8, front + 10, top - 4),
        (8, carina[1] - 12, top),
        (24, carina[1] + 12, top - 6),
        *down,
        *low,
    ]
    scale = np.array([1.12, 1.15, 1.15, 1.05, 1.0, 0.95, 0.88, 0.84, 0.8, 0.78, 0.75, 0.72])
    return spline(np.array(points), radius * scale)


def _arteries(rng: np.random.Generator, shape: ChestShape, spine: Spine, media: Mediastinum) -> None:
    width, depth, height = shape.size
    aorta = _aorta(shape, spine, media, float(rng.normal(14.0, 1.2)))
    media.tubes.append(("AORTA", aorta))
    highest = aorta.points[np.argmax(aorta.points[:, 2])]
    media.landmarks["aortic_arch"] = highest
    y, z = highest[1], highest[2]
    over = height + 6
    neck = media.landmarks["trachea_top"]
    fork = np.array([-15, y - 6, 0.45 * z + 0.55 * height])
    half = width / 2
    branches = [
        ([(-5, y - 10, z - 2), (-11, y - 9, z + 12), fork], 6.5),
        ([fork, (-24, neck[1] + 4, height + 10), (-27, neck[1], height + 70)], 4.0),
        ([fork, (-0.22 * half, y, over - 8), (-0.42 * half, y - 4, over), (-0.8 * half, y, over - 10)], 4.5),
        ([(6, y, z), (14, y - 2, z + 20), (24, neck[1] + 4, height + 10), (27, neck[1], height + 70)], 4.0),
        (
            [
                (14, y + 8, z - 2),
                (20, y + 8, z + 20),
                (0.22 * half, y + 2, over - 8),
                (0.42 * half, y - 2, over),
                (0.8 * half, y, over - 10),
            ],
            4.8,
        ),
    ]
    for points, radius in branches:
        media.tubes.append(("GREAT_VESSEL", spline(np.array(points), radius * rng.uniform(0.9, 1.15))))


def _veins(rng: np.random.Generator, shape: ChestShape, spine: Spine, media: Mediastinum) -> None:
    width, depth, height = shape.size
    atrium, carina = media.heart.right_atrium.center, media.landmarks["carina"]
    join = np.array([-23 + rng.normal(0, 2), carina[1] - 45, carina[2] + 0.085 * height])
    upper = [atrium + [8, 2, 18], (-24, carina[1] - 32, carina[2] - 12), join]
    media.tubes.append(("VENA_CAVA", spline(np.array(upper), rng.uniform(8.5, 10.5))))
    over, half = height, width / 2
    right = [
        join,
        (-28, join[1] + 2, join[2] + 26),
        (-0.26 * half, join[1] + 14, over - 10),
        (-0.5 * half, join[1] + 8, over - 8),
    ]
    left = [join, (0, join[1] - 9, join[2] + 9), (24, join[1] - 2, join[2] + 25), (0.28 * half, join[1] + 13, over - 8),
            (0.5 * half, join[1] + 9, over - 8)]  # fmt: skip
    for points in (right, left):
        media.tubes.append(("BRACHIOCEPHALIC_VEIN", spline(np.array(points), rng.uniform(5.5, 7.5))))
    lower = [
        atrium + [4, 4, -16],
        (-24, atrium[1] + 12, atrium[2] - 45),
        (-22, atrium[1] + 22, -0.02 * height),
        (-20, atrium[1] + 26, -60),
    ]
    media.tubes.append(("VENA_CAVA", spline(np.array(lower), rng.uniform(10, 13))))
    azygos = [(6, -spine.radius - 3, z) for z in (-30, 0.15 * height, 0.4 * height, carina[2] - 6)]
    points = [(-x, spine.center(z) + dy, z) for x, dy, z in azygos]
    points += [
        (-18, carina[1] + 8, carina[2] + 14),
        (-23, carina[1] - 14, carina[2] + 16),
        (-23, carina[1] - 34, carina[2] + 8),
    ]
    media.tubes.append(("VENA_CAVA", spline(np.array(points, float), rng.uniform(3, 4.5))))


def _esophagus(rng: np.random.Generator, shape: ChestShape, spine: Spine, media: Mediastinum) -> None:
    height = shape.size[2]
    carina = media.landmarks["carina"]
    heights = np.array(
        [height + 60, height, carina[2] + 30, carina[2], 0.45 * height, 0.28 * height, 0.12 * height, -20]
    )
    offset = np.array([6, 6, 6, 7, 9, 10, 16, 26])
    x = np.array([2, 3, 4, 5, 3, 6, 12, 30]) + rng.normal(0, 1.5)
    tube = spline(np.stack([x, spine.center(heights) - spine.radius - offset, heights], 1), rng.uniform(6, 8))
    media.tubes.append(("ESOPHAGUS", tube))


def _pulmonary_roots(shape: ChestShape, media: Mediastinum) -> None:
    heart, carina = media.heart, media.landmarks["carina"]
    root = heart.right_ventricle.center + [2, 6, 24]
    root[2] = min(max(root[2], heart.center[2] + 18), carina[2] - 38)
    media.landmarks["pulmonary_trunk"] = root
    atrium = heart.left_atrium
    x, y, z = atrium.radii
    for name, offset in {
        "superior_right": (-0.88 * x, -0.1 * y, 0.42 * z),
        "inferior_right": (-0.82 * x, 0.35 * y, -0.40 * z),
        "superior_left": (0.90 * x, -0.1 * y, 0.46 * z),
        "inferior_left": (0.82 * x, 0.40 * y, -0.36 * z),
    }.items():
        media.landmarks[f"left_atrium_{name}"] = atrium.center + np.array(offset)


def _leave_room(rng: np.random.Generator, shape: ChestShape, spine: Spine, media: Mediastinum) -> None:
    """The space that the lungs stay out of."""
    height = shape.size[2]
    marks, heart = media.landmarks, media.heart
    fat = float(np.clip(rng.normal(2.5, 1.2) + 0.06 * shape.traits["fat"], 1, 7))
    media.space += [(part, 3 + 0.6 * fat) for part in heart.parts]
    for name, tube in media.tubes:
        media.space.append((tube, 1.5 if name in ("AORTA", "ESOPHAGUS") else fat))
    carina = marks["carina"]
    media.space.append((spline(np.array([marks["trachea_top"], carina + [0, -2, 20], carina]), 9.5), 2.0))
    trunk = np.array([marks["pulmonary_trunk"], carina + [15, -36, -21], carina + [20, -20, -13]])
    media.space.append((spline(trunk, 15.0), fat))
    for side, hilum in ((-1, marks["hilum_right"]), (1, marks["hilum_left"])):
        middle = (carina + hilum) / 2
        media.space.append((spline(np.array([carina, middle + [0, -6, -2], hilum]), np.array([14, 15, 11.0])), 1.0))
        root = hilum + [-side * 8, 0, -7]
        media.space.append((Ellipsoid(root, np.array([13, 13, 17.0]) * height / 274, np.eye(3)), 0.0))
    for side in (-1, 1):  # fat in the corners between heart and diaphragm
        pad = heart.center + np.array([side * 46 + 4, -34, -28]) + rng.normal(0, 5, 3)
        media.space.append((Ellipsoid(pad, np.full(3, 9 + 2.5 * fat) * rng.uniform(0.7, 1.3, 3), np.eye(3)), 0.0))
    z = np.linspace(-60, height + 60, 40)
    line = np.stack([np.zeros_like(z), spine.center(z) + 2, z], 1)
    media.space.append((Tube(line, spine.radius_at(z) + 1.5), 2.0))
    media.space.append((Tube(line + [0, 22, 0], np.full(len(z), 13.0)), 1.0))


def place_bones(rng: np.random.Generator, shape: ChestShape, wall: Wall, spine: Spine) -> list[Bone]:
    """Ribs with their cartilages and the clavicles."""
    bones: list[Bone] = []
    slope = rng.normal(1.0, 0.12)
    for n in range(12):
        for side in (-1, 1):
            bones += _rib(rng, n, side, shape, wall, spine, slope)
    for side in (-1, 1):
        bones.append(_clavicle(rng, side, shape, wall))
        bones += _scapula(rng, side, shape, wall)
        bones.append(_humerus(rng, side, shape))
    return bones


#: Fall in mm (at a height of 274 mm) of rib 1-12 from the spine to its front end, the angle of that end and of its
#: bony part as a fraction of the way to the midline in front, and the rise of the cartilage (mm).
RIB_FALL = np.array([34, 52, 68, 80, 90, 98, 102, 100, 92, 80, 52, 28])
RIB_END = np.array([0.90, 0.94, 0.95, 0.95, 0.95, 0.93, 0.90, 0.86, 0.80, 0.74, 0.52, 0.36])
RIB_BONE = np.array([0.74, 0.78, 0.79, 0.79, 0.77, 0.74, 0.70, 0.66, 0.62, 0.60, 0.52, 0.36])
CARTILAGE_RISE = np.array([2, 0, 4, 12, 24, 40, 52, 52, 44, 36, 0, 0])


def _rib(
    rng: np.random.Generator, n: int, side: int, shape: ChestShape, wall: Wall, spine: Spine, slope: float
) -> list[Bone]:
    scale = shape.size[2] / 274
    level = spine.levels[n] + rng.normal(0, 0.8)
    t = np.linspace(0.07, RIB_END[n], 60)
    bone = np.clip(t / RIB_BONE[n], 0, 1)
    fall = RIB_FALL[n] * scale * slope * bone**1.25
    rise = CARTILAGE_RISE[n] * scale * slope * np.clip((t - RIB_BONE[n]) / max(RIB_END[n] - RIB_BONE[n], 0.02), 0, 1)
    z = level + 3 - fall + rise
    angle = t * np.pi * side
    points = wall.point(angle, z, 6.5)
    head = np.array([side * (spine.radius + 2), spine.center(level) + 8, level])
    neck = np.array([side * (spine.radius + 14), spine.center(level) + 17, level + 2])
    radial = np.hypot(points[:, 0], points[:, 1] - wall.center)
    start = int(np.argmax(np.abs(points[:, 0]) > abs(neck[0]) + 6)) if (radial > 0).all() else 0
    split = max(int(np.searchsorted(t, RIB_BONE[n])), start + 4)
    path = np.concatenate([[head, neck], points[start:split]])
    thick = 3.3 if n else 4.0
    parts = [Bone(spline(path + [0, 0, h], thick, 5.0), 1.1) for h in (-2.2, 2.2)]
    if split < len(t) - 2:
        parts.append(Bone(spline(points[split - 1 :], 4.6, 5.0), 0.0, cartilage=True))
    return parts


def _clavicle(rng: np.random.Generator, side: int, shape: ChestShape, wall: Wall) -> Bone:
    width, depth, height = shape.size
    start = wall.point(np.array([np.pi * 0.9 * side]), np.array([0.84 * height]), 12)[0]
    lift = 30 if shape.traits["arms_up"] else 12
    end = np.array([side * (width / 2 + 2), 0.5 * depth, 0.93 * height + lift])
    points = [start, start * 0.66 + end * 0.34 + [0, -10, 6], start * 0.33 + end * 0.67 + [0, -2, 10], end]
    return Bone(spline(np.array(points), rng.uniform(5.5, 7)), 1.6)


def _shoulder(side: int, shape: ChestShape) -> np.ndarray:
    """Center of the head of the humerus."""
    width, depth, height = shape.size
    lift = 0.97 if shape.traits["arms_up"] else 0.90
    return np.array([side * (width / 2 + 6), 0.52 * depth, lift * height])


def _scapula(rng: np.random.Generator, side: int, shape: ChestShape, wall: Wall) -> list[Bone]:
    """Blade, spine and lateral border; raised arms turn the lower corner outward."""
    height = shape.size[2]
    turn = rng.uniform(0.09, 0.15) if shape.traits["arms_up"] else rng.uniform(0, 0.03)
    corner = (0.23 + turn, rng.uniform(0.50, 0.58))
    upper = (0.17 + 0.3 * turn, rng.uniform(0.90, 0.96))
    neck = (0.40 + 0.2 * turn, rng.uniform(0.84, 0.90))

    def line(a: tuple[float, float], b: tuple[float, float], out: float, bow: float) -> np.ndarray:
        t = np.linspace(0, 1, 14)
        angle = side * np.pi * (a[0] + (b[0] - a[0]) * t)
        z = np.minimum(height * (a[1] + (b[1] - a[1]) * t), 0.92 * height)
        lift = np.clip(height * (a[1] + (b[1] - a[1]) * t) - z, 0, None)
        points = wall.point(angle, z, out + bow * np.sin(np.pi * t))
        points[:, 2] += lift
        return points

    bones = [
        Bone(
            Tube(
                line(corner, (upper[0] + (neck[0] - upper[0]) * t, upper[1] + (neck[1] - upper[1]) * t), 17, 3),
                np.full(14, 1.9),
            ),
            1.2,
        )
        for t in np.linspace(0, 1, 28)
    ]
    bones.append(Bone(Tube(line(corner, neck, 17, 3), np.linspace(3.2, 5.0, 14)), 1.3))
    bones.append(Bone(Tube(line(corner, upper, 17, 3), np.full(14, 2.8)), 1.3))
    ridge = line((upper[0] + 0.02, upper[1] - 0.07), neck, 22, 8)
    tip = _shoulder(side, shape) + [0, 10, 22]
    bones.append(Bone(spline(np.concatenate([ridge[::3], tip[None]]), 3.6), 1.3))
    socket = line(upper, neck, 17, 3)[-1]
    joint = _shoulder(side, shape)
    bones.append(Bone(Tube(np.stack([socket, socket + 0.55 * (joint - socket)]), np.array([6.0, 12.0])), 1.5))
    return bones


def _humerus(rng: np.random.Generator, side: int, shape: ChestShape) -> Bone:
    """Head and shaft in the arm, up beside the head or down beside the trunk."""
    head = _shoulder(side, shape)
    if shape.traits["arms_up"]:
        path = [head, head + [side * 22, -8, 26], head + [side * 48, -22, 90], head + [side * 70, -34, 190]]
    else:
        path = [head, head + [side * 26, 0, -16], head + [side * 42, 6, -80], head + [side * 46, 10, -420]]
    tube = spline(np.array(path), 11.0, 6.0)
    tube.radii[:2] = [22.0, 19.0]
    return Bone(tube, 2.5, around=float(rng.uniform(40, 50)))
