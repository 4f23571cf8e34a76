"""Airway: hand-specified central bronchi with their common variants, then volume filling of each segment.

The tree that is grown here is the whole bronchovascular tree; the airway shows its thicker part, the artery
(``vessels``) follows all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.spatial import cKDTree

from training.phantom.branching import Branches, FillRule, VoxelMap, fill_cloud, unit

__all__ = ["Central", "Frame", "central_airway", "fill_segments", "grow_stems", "split_clouds"]

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
        position: segment code -> position in its lobe where it is not the usual one.
    """

    branches: Branches
    stem: dict[str, Nest]
    gate: dict[str, np.ndarray]
    variants: list[str]
    position: dict[int, tuple[float, float, float]] = field(default_factory=dict)


def _choose(rng: np.random.Generator, table: list[tuple[float, Nest, str]], variants: list[str]) -> Nest:
    """Draw a branching pattern; a pattern with a name is noted as a variant."""
    weights = np.array([row[0] for row in table])
    _, nest, name = table[rng.choice(len(table), p=weights / weights.sum())]
    if name:
        variants.append(name)
    return nest


# Branching patterns with their frequency in percent; "" is the usual one. 100 + code and 200 + code are the two parts
# of a segment that has two bronchi (see ``SPLITS``). Sources: right, Huang 2019 and Wang 2018 (238 CTs); left upper,
# 10,000 CTs (2023) and Zhao 2009 (216 CTs); left lower, 540 CTs (2024); double B6, Atwell 1966 (1200 bronchograms).
# The full references are in ``literature``.
RIGHT_UPPER: list[tuple[float, Nest, str]] = [
    (58.8, (1, 2, 3), ""),
    (18.5, ((1, 2), 3), "right B1+2 common trunk"),
    (11.8, ((101, 2), (201, 3)), "right B1 divided between B2 and B3"),
    (9.2, (1, (2, 3)), "right B2+3 common trunk"),
    (1.7, ((1, 3), 2), "right B1+3 common trunk"),
]
RIGHT_MIDDLE: list[tuple[float, Nest, str]] = [
    (96.2, (4, 5), ""),
    (3.8, (104, 204, 5), "right middle lobe trifurcation"),
]
RIGHT_BASAL: list[tuple[float, Nest, str]] = [
    (57.0, (7, (8, (9, 10))), ""),
    (17.6, (7, ((8, 209), (109, 10))), "right B9 divided between B8 and B10"),
    (10.5, (7, ((8, 9), 10)), "right B8+9 common trunk"),
    (8.8, (7, (8, 9, 10)), "right B8-9-10 trifurcation"),
    (3.8, ((7, 8), (9, 10)), "right B7+8 common trunk"),
]
LEFT_DIVISION: list[tuple[float, Nest, str]] = [
    (76.1, (11, 12), ""),
    (17.3, (111, 211, 12), "left B1, B2, B3 trifurcation"),
    (5.7, (111, (211, 12)), "left B1+3 common trunk"),
]
LEFT_BASAL: list[tuple[float, Nest, str]] = [
    (70.0, (16, (17, 18)), ""),
    (18.7, (16, 17, 18), "left basal trifurcation"),
    (10.4, ((16, 17), 18), "left B8+9 common trunk"),
]
#: How a segment with two bronchi is divided: axis of the point (x, y, z), share of the first part (the higher values).
SPLITS: dict[int, tuple[int, float]] = {
    1: (1, 0.5),
    4: (2, 0.5),
    6: (2, 0.6),
    9: (1, 0.5),
    10: (2, 0.25),
    11: (1, 0.5),
    15: (2, 0.6),
    18: (2, 0.25),
}
#: S4 above S5 instead of beside it, as in the lingula (how often is not known; 8 % are drawn).
STACKED: dict[int, tuple[float, float, float]] = {4: (0.75, 0.45, 0.95), 5: (0.5, 0.25, 0.05)}


def central_airway(frame: Frame, rng: np.random.Generator) -> Central:
    """Trachea, main and lobar bronchi placed by the landmarks and the lobes."""
    marks = frame.landmarks
    central = Central(Branches(np.asarray(marks["trachea_top"], dtype=np.float64)), {}, {}, [])
    carina = np.asarray(marks["carina"], dtype=np.float64)
    trachea = _trachea(central, frame, rng, carina)
    _right(central, frame, rng, trachea, carina)
    _left(central, frame, rng, trachea, carina)
    return central


def _trachea(central: Central, frame: Frame, rng: np.random.Generator, carina: np.ndarray) -> int:
    """The trachea; in 0.7 % of patients with a tracheal bronchus (Ghaye 2001: 0.1-2 %)."""
    branches = central.branches
    if rng.random() >= 0.007:
        return branches.add(-1, carina, "trachea")
    central.variants.append("tracheal bronchus")
    high = carina + rng.uniform(0.1, 0.25) * (branches.root - carina)
    upper = branches.add(-1, high, "trachea")
    goal = frame.reach(1, high + frame.scale * np.array([-32.0, 4.0, 8.0]))
    branches.add(upper, high + 0.8 * (goal - high), "tracheal bronchus")
    return branches.add(upper, carina, "lower trachea", generation=0)


def _aim(rng: np.random.Generator, direction: tuple[float, float, float], spread: float = 0.08) -> np.ndarray:
    return unit(np.array(direction) + rng.normal(0, spread, 3))


def _right(central: Central, frame: Frame, rng: np.random.Generator, trachea: int, carina: np.ndarray) -> None:
    branches, scale = central.branches, frame.scale
    hilum = np.asarray(frame.landmarks["hilum_right"])
    main_end = _right_main_end(frame, rng, carina)
    main = branches.add(trachea, main_end, "right main")
    upper_end = frame.reach(1, main_end + scale * rng.normal(14, 1.5) * _aim(rng, (-0.88, 0.05, 0.25)))
    branches.add(main, _toward(main_end, upper_end, 22 * scale), "right upper")
    central.stem["right upper"] = _right_upper(central, rng)
    down = unit(hilum + scale * np.array([3.0, 5.0, -22.0]) - main_end)
    inter_end = main_end + scale * rng.normal(24, 2.5) * unit(down + _aim(rng, (-0.3, 0.15, -0.94)))
    middle_gate = frame.reach(2, inter_end + scale * np.array([-8.0, -12.0, -7.0]))
    inter_end[2] = np.clip(middle_gate[2] + 5 * scale, inter_end[2] - 10 * scale, main_end[2] - 12 * scale)
    inter = branches.add(main, inter_end, "intermedius")
    middle_end = frame.reach(2, inter_end + scale * rng.normal(17, 2) * _aim(rng, (-0.5, -0.72, -0.42)))
    branches.add(inter, _toward(inter_end, middle_end, 28 * scale), "middle")
    central.stem["middle"] = _choose(rng, RIGHT_MIDDLE, central.variants)
    if rng.random() < 0.08:
        central.variants.append("right S4 above S5")
        central.position |= STACKED
    lower_end = frame.reach(3, inter_end + scale * rng.normal(9, 1.5) * _aim(rng, (-0.3, 0.3, -0.9)))
    lower = branches.add(inter, _toward(inter_end, lower_end, 20 * scale), "right lower")
    trunk_end = frame.reach(3, branches.end[lower] + scale * rng.normal(14, 2) * _aim(rng, (-0.35, 0.3, -0.88)))
    branches.add(lower, trunk_end, "right basal")
    basal = _choose(rng, RIGHT_BASAL, central.variants)
    central.stem |= _lower_stems(central, rng, "right", basal, 6, 10, 0.04)
    for gate, name in (("right upper",) * 2, ("middle", "intermedius"), ("right lower",) * 2, ("right basal",) * 2):
        central.gate[gate] = branches.end[branches.index(name)]


def _right_main_end(frame: Frame, rng: np.random.Generator, carina: np.ndarray) -> np.ndarray:
    """Mi 2015 (2107 CTs): 13.6 +- 4.3 mm long, 34.9 degrees; and toward where the upper lobe lies."""
    scale, hilum = frame.scale, np.asarray(frame.landmarks["hilum_right"])
    free = scale * rng.normal(16, 3) * _lean(-1, rng.normal(35, 5), 0.2)
    goal = frame.reach(1, hilum + scale * np.array([-4.0, 2.0, 14.0])) + scale * np.array([14.0, 0.0, -4.0]) - carina
    return carina + _within(_steep(0.75 * free + 0.25 * goal, 24, 44), 12 * scale, 26 * scale)


def _lean(side: int, degrees: float, back: float) -> np.ndarray:
    """Direction that leaves the vertical by an angle in the coronal plane, to a side (-1 right), and backward."""
    angle = np.deg2rad(degrees)
    return np.array([side * np.sin(angle), back, -np.cos(angle)])


def _steep(way: np.ndarray, low: float, high: float) -> np.ndarray:
    """The same length with its angle to the vertical, in the coronal plane, within limits in degrees."""
    angle = np.degrees(np.arctan2(abs(way[0]), -way[2]))
    back = float(np.clip(way[1] / max(float(np.hypot(way[0], way[2])), 1e-6), -0.5, 0.5))
    lean = _lean(-1 if way[0] < 0 else 1, float(np.clip(angle, low, high)), back)
    return float(np.linalg.norm(way)) * unit(lean)


def _right_upper(central: Central, rng: np.random.Generator) -> Nest:
    if "tracheal bronchus" in central.variants:
        central.stem["tracheal bronchus"] = 1
        return (2, 3)
    return _choose(rng, RIGHT_UPPER, central.variants)


def _lower_stems(
    central: Central, rng: np.random.Generator, side: str, basal: Nest, superior: int, posterior: int, double: float
) -> dict[str, Nest]:
    """Patterns of B6 and of the basal trunk, with a second B6 or a subsuperior bronchus in some patients."""
    upper: Nest = superior
    draw = rng.random()
    if draw < double:
        central.variants.append(f"{side} B6 double")
        upper, basal = 100 + superior, (200 + superior, basal)
    elif draw < double + 0.2 and all(leaf < 100 for leaf in _leaves(basal)):
        central.variants.append(f"{side} subsuperior bronchus")
        basal = (100 + posterior, _swap(basal, posterior, 200 + posterior))
    return {f"{side} lower": upper, f"{side} basal": basal}


def _swap(nest: Nest, old: int, new: int) -> Nest:
    if isinstance(nest, int):
        return new if nest == old else nest
    return tuple(_swap(part, old, new) for part in nest)


def _left(central: Central, frame: Frame, rng: np.random.Generator, trachea: int, carina: np.ndarray) -> None:
    branches, scale = central.branches, frame.scale
    hilum = np.asarray(frame.landmarks["hilum_left"])
    # Mi 2015: 48.3 +- 6.5 mm long, 42.5 degrees
    free = scale * rng.normal(46, 4) * _lean(1, rng.normal(43, 5), 0.25)
    goal = hilum + scale * np.array([-8.0, 2.0, 0.0]) - carina
    main_end = carina + _within(_steep(0.5 * (free + goal), 32, 52), 34 * scale, 58 * scale)
    main = branches.add(trachea, main_end, "left main")
    upper_end = frame.reach(4, main_end + scale * rng.normal(11, 1.5) * _aim(rng, (0.85, -0.5, 0.05)))
    upper = branches.add(main, _toward(main_end, upper_end, 22 * scale), "left upper")
    length = scale * rng.normal(10, 1.5)
    if rng.random() < 0.04:  # B1+2, B3 and lingula from one point
        central.variants.append("left upper trifurcation")
        length = 2.5 * scale
    division_end = frame.reach(4, branches.end[upper] + length * _aim(rng, (0.3, -0.1, 0.95)))
    lingula_end = frame.reach(4, branches.end[upper] + scale * rng.normal(15, 2) * _aim(rng, (0.4, -0.7, -0.6)))
    branches.add(upper, division_end, "upper division")
    branches.add(upper, lingula_end, "lingula")
    central.stem["upper division"] = _choose(rng, LEFT_DIVISION, central.variants)
    central.stem["lingula"] = (13, 14)
    lower_end = frame.reach(5, main_end + scale * rng.normal(11, 1.5) * _aim(rng, (0.3, 0.45, -0.84)))
    lower = branches.add(main, _toward(main_end, lower_end, 22 * scale), "left lower")
    trunk_end = frame.reach(5, branches.end[lower] + scale * rng.normal(16, 2) * _aim(rng, (0.3, 0.25, -0.92)))
    branches.add(lower, trunk_end, "left basal")
    basal = _choose(rng, LEFT_BASAL, central.variants)
    central.stem |= _lower_stems(central, rng, "left", basal, 15, 18, 0.03)
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


def split_clouds(central: Central, clouds: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Clouds per leaf of the branching patterns: those of segments with two bronchi are divided (see ``SPLITS``)."""
    result = dict(clouds)
    for leaf in _leaves(tuple(central.stem.values())):
        code, cloud = leaf % 100, clouds[leaf % 100]
        if leaf > 200 and len(cloud):
            axis, share = SPLITS[code]
            high = cloud[:, axis] >= np.quantile(cloud[:, axis], 1 - share)
            result[100 + code], result[200 + code] = cloud[high], cloud[~high]
        elif leaf > 200:
            result[100 + code] = result[200 + code] = cloud
    return result


def grow_stems(
    central: Central, clouds: dict[int, np.ndarray], inside: VoxelMap, frame: Frame, rng: np.random.Generator
) -> dict[int, int]:
    """Segmental bronchi from the lobar ones; returns leaf of the pattern -> branch of its segmental bronchus.

    Args:
        clouds: points per leaf, see ``split_clouds``.
        inside: segment codes.
    """
    stems: dict[int, int] = {}
    for name, nest in central.stem.items():
        tip = central.branches.index(name)
        for part in (nest,) if isinstance(nest, int) else nest:
            _nested(central, tip, part, clouds, inside, frame.scale, rng, stems)
    return stems


def _leaves(nest: Nest) -> list[int]:
    return [nest] if isinstance(nest, int) else [leaf for part in nest for leaf in _leaves(part)]


def _nested(
    central: Central,
    tip: int,
    nest: Nest,
    clouds: dict[int, np.ndarray],
    inside: VoxelMap,
    scale: float,
    rng: np.random.Generator,
    stems: dict[int, int],
) -> None:
    branches = central.branches
    leaves = [leaf for leaf in _leaves(nest) if len(clouds[leaf])]
    if not leaves:
        return
    start = branches.end[tip]
    goal = np.mean([clouds[leaf].mean(0) for leaf in leaves], axis=0)
    if len(leaves) == 1:
        leaf = leaves[0]
        end = start + _within(rng.uniform(0.28, 0.38) * (goal - start), 7 * scale, 20 * scale)
        stems[leaf] = branches.add(tip, _settle(end, leaf, clouds[leaf], inside), f"B{leaf}", leaf % 100)
        return
    way = unit(0.5 * branches.direction(tip) + unit(goal - start))
    trunk = branches.add(tip, start + scale * rng.uniform(5, 9) * way, "trunk")
    for part in nest if not isinstance(nest, int) else (nest,):
        _nested(central, trunk, part, clouds, inside, scale, rng, stems)


def _settle(end: np.ndarray, leaf: int, cloud: np.ndarray, inside: VoxelMap) -> np.ndarray:
    """The end of a segmental bronchus inside its segment."""
    if inside.at(end[None])[0] == leaf % 100:
        return end
    near = cloud[np.argsort(np.linalg.norm(cloud - end, axis=1))[:4]]
    middle = near.mean(0)
    return middle if inside.at(middle[None])[0] == leaf % 100 else near[0]


def fill_segments(
    branches: Branches,
    stems: dict[int, int],
    clouds: dict[int, np.ndarray],
    territory: VoxelMap,
    lobes: VoxelMap,
    rule: FillRule,
    rng: np.random.Generator,
) -> None:
    """Volume-fill each segment from the end of its segmental bronchus (or bronchi)."""
    for leaf, tip in stems.items():
        seed, code = int(rng.integers(2**31)), leaf % 100
        ends, parents = fill_cloud(
            clouds[leaf], branches.end[tip], branches.direction(tip), territory, lobes, code, rule, seed
        )
        branches.extend(tip, ends, parents, code)
