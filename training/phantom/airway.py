"""Airway: hand-specified central bronchi with their common variants, then volume filling of each segment.

The tree that is grown here is the whole bronchovascular tree; the airway shows its thicker part, the artery
(``vessels``) follows all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from training.phantom.branching import Branches, FillRule, VoxelMap, fill_cloud, unit

__all__ = ["Central", "Frame", "central_airway", "fill_segments", "grow_stems"]

Nest = int | tuple["Nest", ...]


@dataclass
class Frame:
    """What the trees are placed by.

    Attributes:
        landmarks: LPS mm points of the thorax.
        lobes: lobe codes.
        core: for each lobe, (N, 3) points at least some mm inside of it.
        trees: a KD tree of each ``core``.
        scale: size of the lungs relative to an adult with 4.5 L.
    """

    landmarks: dict[str, np.ndarray]
    lobes: VoxelMap
    core: dict[int, np.ndarray]
    trees: dict[int, cKDTree]
    scale: float

    def reach(self, lobe: int, point: np.ndarray) -> np.ndarray:
        """The point itself if inside the lobe, else the nearest point well inside."""
        if lobe not in self.trees or self.lobes.at(point[None])[0] == lobe:
            return point
        return self.core[lobe][self.trees[lobe].query(point)[1]]


@dataclass
class Central:
    """Central bronchi and the branching pattern of each lobe.

    Attributes:
        branches: trachea to the lobar bronchi.
        stem: name of the lobar branch -> pattern of segmental bronchi that grow from its end.
        gate: lobe or division -> (3,) point where its bronchus divides.
        variants: names of the variants.
    """

    branches: Branches
    stem: dict[str, Nest]
    gate: dict[str, np.ndarray]
    variants: list[str]


def _choose(rng: np.random.Generator, table: list[tuple[float, Nest, str]], variants: list[str]) -> Nest:
    """Draw a branching pattern; a pattern with a name is noted as a variant."""
    weights = np.array([row[0] for row in table])
    _, nest, name = table[rng.choice(len(table), p=weights / weights.sum())]
    if name:
        variants.append(name)
    return nest


# Frequencies in percent; sources in ``literature``.
RIGHT_UPPER: list[tuple[float, Nest, str]] = [
    (50, (1, 2, 3), "RUL trifurcation"),
    (18, ((1, 2), 3), "RUL B1+2 common trunk"),
    (20, ((1, 3), 2), "RUL B1+3 common trunk"),
    (12, (1, (2, 3)), "RUL B2+3 common trunk"),
]
RIGHT_BASAL: list[tuple[float, Nest, str]] = [
    (60, (7, (8, (9, 10))), ""),
    (15, (7, (8, 9, 10)), "RLL basal trifurcation"),
    (15, (7, ((8, 9), 10)), "RLL B8+9 common trunk"),
    (10, ((7, 8), (9, 10)), "RLL B7 with B8"),
]
LEFT_BASAL: list[tuple[float, Nest, str]] = [
    (70, (16, (17, 18)), ""),
    (15, (16, 17, 18), "LLL basal trifurcation"),
    (15, ((16, 17), 18), "LLL B8+9 common trunk"),
]


def central_airway(frame: Frame, rng: np.random.Generator) -> Central:
    """Trachea, main and lobar bronchi placed by the landmarks and the lobes."""
    marks = frame.landmarks
    central = Central(Branches(np.asarray(marks["trachea_top"], dtype=np.float64)), {}, {}, [])
    carina = np.asarray(marks["carina"], dtype=np.float64)
    trachea = central.branches.add(-1, carina, "trachea")
    _right(central, frame, rng, trachea, carina)
    _left(central, frame, rng, trachea, carina)
    return central


def _aim(rng: np.random.Generator, direction: tuple[float, float, float], spread: float = 0.08) -> np.ndarray:
    return unit(np.array(direction) + rng.normal(0, spread, 3))


def _right(central: Central, frame: Frame, rng: np.random.Generator, trachea: int, carina: np.ndarray) -> None:
    branches, scale = central.branches, frame.scale
    hilum = np.asarray(frame.landmarks["hilum_right"])
    angle = np.deg2rad(rng.normal(32, 5))
    free = carina + scale * rng.normal(22, 2.5) * np.array([-np.sin(angle), 0.15, -np.cos(angle)])
    # the lungs say where the bronchus has to go: the upper bronchus leaves above the middle of the hilum
    goal = hilum + scale * np.array([9.0, 2.0, 10.0])
    main_end = carina + _within(0.5 * (free + goal) - carina, 16 * scale, 32 * scale)
    main = branches.add(trachea, main_end, "right main")
    upper_end = frame.reach(1, main_end + scale * rng.normal(13, 1.5) * _aim(rng, (-0.85, 0.05, 0.35)))
    upper = branches.add(main, _toward(main_end, upper_end, 22 * scale), "right upper")
    central.stem["right upper"] = _choose(rng, RIGHT_UPPER, central.variants)
    down = unit(hilum + scale * np.array([3.0, 5.0, -22.0]) - main_end)
    inter_end = main_end + scale * rng.normal(23, 2.5) * unit(down + _aim(rng, (-0.15, 0.15, -0.97)))
    inter = branches.add(main, inter_end, "intermedius")
    middle_end = frame.reach(2, inter_end + scale * rng.normal(17, 2) * _aim(rng, (-0.5, -0.72, -0.42)))
    branches.add(inter, _toward(inter_end, middle_end, 28 * scale), "middle")
    central.stem["middle"] = (4, 5)
    if rng.random() < 0.1:
        central.variants.append("RML B4-5 stacked")
    lower_end = frame.reach(3, inter_end + scale * rng.normal(9, 1.5) * _aim(rng, (-0.3, 0.3, -0.9)))
    lower = branches.add(inter, _toward(inter_end, lower_end, 20 * scale), "right lower")
    central.stem["right lower"] = 6
    trunk_end = frame.reach(3, branches.end[lower] + scale * rng.normal(14, 2) * _aim(rng, (-0.35, 0.3, -0.88)))
    basal = branches.add(lower, trunk_end, "right basal")
    central.stem["right basal"] = _choose(rng, RIGHT_BASAL, central.variants)
    for name, index in (("right upper", upper), ("middle", inter), ("right lower", lower), ("right basal", basal)):
        central.gate[name] = branches.end[index]


def _left(central: Central, frame: Frame, rng: np.random.Generator, trachea: int, carina: np.ndarray) -> None:
    branches, scale = central.branches, frame.scale
    hilum = np.asarray(frame.landmarks["hilum_left"])
    angle = np.deg2rad(rng.normal(45, 5))
    free = carina + scale * rng.normal(46, 4) * np.array([np.sin(angle), 0.25, -np.cos(angle)])
    goal = hilum + scale * np.array([-8.0, 2.0, 0.0])
    main_end = carina + _within(0.5 * (free + goal) - carina, 32 * scale, 58 * scale)
    main = branches.add(trachea, main_end, "left main")
    upper_end = frame.reach(4, main_end + scale * rng.normal(11, 1.5) * _aim(rng, (0.85, -0.5, 0.05)))
    upper = branches.add(main, _toward(main_end, upper_end, 22 * scale), "left upper")
    division_end = frame.reach(4, branches.end[upper] + scale * rng.normal(10, 1.5) * _aim(rng, (0.3, -0.1, 0.95)))
    lingula_end = frame.reach(4, branches.end[upper] + scale * rng.normal(15, 2) * _aim(rng, (0.4, -0.7, -0.6)))
    branches.add(upper, division_end, "upper division")
    branches.add(upper, lingula_end, "lingula")
    central.stem["upper division"] = (11, 12)
    central.stem["lingula"] = (13, 14)
    lower_end = frame.reach(5, main_end + scale * rng.normal(11, 1.5) * _aim(rng, (0.3, 0.45, -0.84)))
    lower = branches.add(main, _toward(main_end, lower_end, 22 * scale), "left lower")
    central.stem["left lower"] = 15
    trunk_end = frame.reach(5, branches.end[lower] + scale * rng.normal(16, 2) * _aim(rng, (0.3, 0.25, -0.92)))
    branches.add(lower, trunk_end, "left basal")
    central.stem["left basal"] = _choose(rng, LEFT_BASAL, central.variants)
    for name, branch in (
        ("left upper", "left upper"),
        ("upper division", "left upper"),
        ("lingula", "left upper"),
        ("left lower", "left lower"),
        ("left basal", "left basal"),
    ):
        central.gate[name] = branches.end[branches.index(branch)]


def _within(vector: np.ndarray, low: float, high: float) -> np.ndarray:
    """The vector with its length clipped."""
    length = float(np.linalg.norm(vector))
    return vector * (np.clip(length, low, high) / max(length, 1e-6))


def _toward(start: np.ndarray, goal: np.ndarray, limit: float) -> np.ndarray:
    """A lobar bronchus goes to its goal, however far, but not much less than usual."""
    return start + _within(goal - start, 0.35 * limit, 3 * limit)


def grow_stems(
    central: Central, centroids: dict[int, np.ndarray], inside: VoxelMap, frame: Frame, rng: np.random.Generator
) -> dict[int, int]:
    """Segmental bronchi from the lobar ones; returns segment code -> branch of its segmental bronchus."""
    stems: dict[int, int] = {}
    for name, nest in central.stem.items():
        tip = central.branches.index(name)
        parts = (nest,) if isinstance(nest, int) else nest
        for part in parts:
            _nested(central, tip, part, centroids, inside, frame.scale, rng, stems)
    return stems


def _leaves(nest: Nest) -> list[int]:
    return [nest] if isinstance(nest, int) else [leaf for part in nest for leaf in _leaves(part)]


def _nested(
    central: Central,
    tip: int,
    nest: Nest,
    centroids: dict[int, np.ndarray],
    inside: VoxelMap,
    scale: float,
    rng: np.random.Generator,
    stems: dict[int, int],
) -> None:
    branches = central.branches
    codes = [code for code in _leaves(nest) if code in centroids]
    if not codes:
        return
    start = branches.end[tip]
    goal = np.mean([centroids[code] for code in codes], axis=0)
    if len(codes) == 1:
        share = rng.uniform(0.28, 0.38)
        end = start + _within(share * (goal - start), 7 * scale, 20 * scale)
        stems[codes[0]] = branches.add(tip, end, f"B{codes[0]}", codes[0])
        return
    way = unit(0.5 * branches.direction(tip) + unit(goal - start))
    trunk = branches.add(tip, start + scale * rng.uniform(6, 11) * way, "")
    for part in nest if not isinstance(nest, int) else (nest,):
        _nested(central, trunk, part, centroids, inside, scale, rng, stems)


def fill_segments(
    branches: Branches,
    stems: dict[int, int],
    clouds: dict[int, np.ndarray],
    territory: VoxelMap,
    rule: FillRule,
    rng: np.random.Generator,
) -> None:
    """Volume-fill each segment from the end of its segmental bronchus."""
    for code, tip in stems.items():
        if not len(clouds[code]):
            continue
        seed = int(rng.integers(2**31))
        ends, parents = fill_cloud(
            clouds[code], branches.end[tip], branches.direction(tip), territory, code, rule, seed
        )
        branches.extend(tip, ends, parents, code)
