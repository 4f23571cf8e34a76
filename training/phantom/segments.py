"""The 18 segments: partition of each lobe before growth, and the final map from the grown tree.

A segment is a wedge from the hilum to the pleura: the lobe is cut by (wavy) planes between the directions in which the
segments lie as seen from where their bronchus divides. Offsets of the planes are tuned so that the volume shares match
a random draw around literature values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT
from training.phantom.branching import VoxelMap, unit

__all__ = ["Cut", "CUTS", "connect", "nearest_branch_segments", "partition"]

Position = tuple[float, float, float]

#: Position of each segment in its lobe: lateral (0 medial - 1 lateral), posterior, superior, each 0-1.
POSITION: dict[int, Position] = {
    1: (0.45, 0.55, 0.95),
    2: (0.65, 0.95, 0.45),
    3: (0.55, 0.10, 0.30),
    4: (0.95, 0.60, 0.50),
    5: (0.30, 0.15, 0.40),
    6: (0.55, 0.85, 0.85),
    7: (0.05, 0.35, 0.20),
    8: (0.65, 0.08, 0.25),
    9: (0.98, 0.50, 0.15),
    10: (0.40, 0.95, 0.10),
    11: (0.50, 0.75, 0.95),
    12: (0.60, 0.10, 0.60),
    13: (0.75, 0.25, 0.35),
    14: (0.50, 0.20, 0.02),
    15: (0.55, 0.85, 0.85),
    16: (0.45, 0.10, 0.25),
    17: (0.98, 0.50, 0.15),
    18: (0.40, 0.95, 0.10),
}

#: Share of each segment in its lobe: plausible means (no published table of all 18 was found), varied by 18 %.
SHARE: dict[int, float] = {
    1: 0.32, 2: 0.31, 3: 0.37, 4: 0.45, 5: 0.55, 6: 0.25, 7: 0.12, 8: 0.21, 9: 0.19, 10: 0.23,
    11: 0.42, 12: 0.30, 13: 0.14, 14: 0.14, 15: 0.27, 16: 0.28, 17: 0.20, 18: 0.25,
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """One cut of a region into groups of segments by planes that meet at a gate.

    Attributes:
        gate: name of the bronchus whose end is the apex.
        groups: the groups of segment codes that are told apart here.
    """

    gate: str
    groups: tuple[tuple[int, ...], ...]


CUTS: dict[int, tuple[Cut, ...]] = {
    1: (Cut("right upper", ((1,), (2,), (3,))),),
    2: (Cut("middle", ((4,), (5,))),),
    3: (Cut("right lower", ((6,), (7, 8, 9, 10))), Cut("right basal", ((7,), (8,), (9,), (10,)))),
    4: (
        Cut("left upper", ((11, 12), (13, 14))),
        Cut("upper division", ((11,), (12,))),
        Cut("lingula", ((13,), (14,))),
    ),
    5: (Cut("left lower", ((15,), (16, 17, 18))), Cut("left basal", ((16,), (17,), (18,)))),
}


def partition(
    lobes: VoxelMap, gates: dict[str, np.ndarray], position: dict[int, Position], rng: np.random.Generator
) -> np.ndarray:
    """Segment map (uint8, shape of ``lobes``) that tiles the lobes, one component each.

    Args:
        gates: apex of each cut, LPS mm.
        position: places of segments that differ from ``POSITION``.
    """
    place = POSITION | position
    segments = np.zeros(lobes.array.size, dtype=np.uint8)
    inside = np.flatnonzero(lobes.array)
    lobe_of = lobes.array.ravel()[inside]
    for lobe, cuts in CUTS.items():
        index = inside[lobe_of == lobe]
        if len(index):
            points = lobes.world(np.stack(np.unravel_index(index, lobes.array.shape), axis=1))
            segments[index] = _partition_lobe(points, lobe, cuts, gates, place, rng)
    return connect(segments.reshape(lobes.array.shape), lobes.array)


def _partition_lobe(
    points: np.ndarray,
    lobe: int,
    cuts: tuple[Cut, ...],
    gates: dict[str, np.ndarray],
    place: dict[int, Position],
    rng: np.random.Generator,
) -> np.ndarray:
    low, high = np.percentile(points[:: max(1, len(points) // 4000)], [2, 98], axis=0)
    seeds = {code: _seed(place[code], low, high, lobe, rng) for cut in cuts for group in cut.groups for code in group}
    shares = {code: SHARE[code] * float(np.exp(rng.normal(0, 0.18))) for code in seeds}
    codes = np.zeros(len(points), dtype=np.uint8)
    pending = {0: np.arange(len(points))}
    for cut in cuts:
        members = [code for group in cut.groups for code in group]
        select = pending.pop(min(members) if min(members) in pending else 0)
        choice = _cut(points[select], gates[cut.gate], cut, seeds, shares, rng)
        for number, group in enumerate(cut.groups):
            part = select[choice == number]
            if len(group) == 1:
                codes[part] = group[0]
            else:
                pending[min(group)] = part
    return codes


def _seed(place: Position, low: np.ndarray, high: np.ndarray, lobe: int, rng: np.random.Generator) -> np.ndarray:
    lateral, posterior, superior = np.array(place) + rng.normal(0, 0.06, 3)
    across = 1 - lateral if lobe <= 3 else lateral  # the right lung's lateral side is at small x
    return low + (high - low) * np.array([across, posterior, superior])


def _cut(
    points: np.ndarray,
    gate: np.ndarray,
    cut: Cut,
    seeds: dict[int, np.ndarray],
    shares: dict[int, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Group number of each point."""
    weight = np.array([sum(shares[code] for code in group) for group in cut.groups])
    centers = [np.average([seeds[c] for c in g], axis=0, weights=[shares[c] for c in g]) for g in cut.groups]
    directions = unit(np.array(centers) - gate)
    waves = rng.normal(size=(4, 3)) * (2 * np.pi / 90.0)
    phases = rng.uniform(0, 2 * np.pi, 4)
    shifts = rng.normal(size=(4, 3)) * rng.uniform(0.8, 1.8)
    offset = np.zeros(len(cut.groups))
    sample = np.ascontiguousarray(points[:: max(1, len(points) // 2000)])
    target = weight / weight.sum()
    apart = min(np.linalg.norm(a - b) for n, a in enumerate(directions) for b in directions[:n])
    for step in range(30):
        share = np.bincount(_assign(sample, gate, directions, offset, waves, phases, shifts), minlength=len(offset))
        # a plane moves by the offset over the distance of the directions, and should move by the error times the width
        offset += max(apart, 0.1) * 50.0 / (1 + 0.1 * step) * (target - share / len(sample))
        offset -= offset.mean()
    return _assign(np.ascontiguousarray(points), gate, directions, offset, waves, phases, shifts)


@njit(cache=True)
def _assign(points, gate, directions, offset, waves, phases, shifts):  # type: ignore[no-untyped-def]
    """Group whose plane value is highest, at points that smooth waves displace."""
    result = np.zeros(len(points), np.int64)
    for n in range(len(points)):
        x, y, z = points[n, 0], points[n, 1], points[n, 2]
        dx, dy, dz = x - gate[0], y - gate[1], z - gate[2]
        for w in range(len(waves)):
            wave = np.cos(x * waves[w, 0] + y * waves[w, 1] + z * waves[w, 2] + phases[w])
            dx += wave * shifts[w, 0]
            dy += wave * shifts[w, 1]
            dz += wave * shifts[w, 2]
        best = -1e30
        for g in range(len(directions)):
            value = offset[g] + dx * directions[g, 0] + dy * directions[g, 1] + dz * directions[g, 2]
            if value > best:
                best = value
                result[n] = g
    return result


def connect(segments: np.ndarray, lobes: np.ndarray) -> np.ndarray:
    """Give all but the largest 6-connected component of each segment to neighbors in the same lobe.

    Args:
        segments: uint8 codes; voxels of a lobe with code 0 are given away too.
        lobes: lobe codes of the same shape.
    """
    result = segments.copy()
    _keep_largest(result)
    _spread(result, lobes, True)
    if ((result == 0) & (lobes > 0)).any():
        _spread(result, lobes, False)
        _isolated(result, lobes)
    return result


@njit(cache=True)
def _keep_largest(segments):  # type: ignore[no-untyped-def]
    """Set all but the largest 6-connected component of each code to 0."""
    depth, height, width = segments.shape
    flat = segments.ravel()
    component = np.zeros(flat.size, np.int32)
    sizes = [0]
    codes = [0]
    queue = np.empty(flat.size, np.int32)
    plane = height * width
    count = 0
    for seed in range(flat.size):
        code = flat[seed]
        if code == 0 or component[seed] != 0:
            continue
        count += 1
        component[seed] = count
        queue[0] = seed
        head, tail = 0, 1
        while head < tail:
            here = queue[head]
            head += 1
            k, rest = here // plane, here % plane
            j, i = rest // width, rest % width
            for side in range(6):
                if side == 0 and k > 0:
                    there = here - plane
                elif side == 1 and k < depth - 1:
                    there = here + plane
                elif side == 2 and j > 0:
                    there = here - width
                elif side == 3 and j < height - 1:
                    there = here + width
                elif side == 4 and i > 0:
                    there = here - 1
                elif side == 5 and i < width - 1:
                    there = here + 1
                else:
                    continue
                if flat[there] == code and component[there] == 0:
                    component[there] = count
                    queue[tail] = there
                    tail += 1
        sizes.append(tail)
        codes.append(code)
    best = np.zeros(256, np.int64)
    for number in range(1, count + 1):
        code = codes[number]
        if best[code] == 0 or sizes[number] > sizes[best[code]]:
            best[code] = number
    for voxel in range(flat.size):
        if flat[voxel] != 0 and component[voxel] != best[flat[voxel]]:
            flat[voxel] = 0


@njit(cache=True)
def _spread(segments, lobes, faces_only):  # type: ignore[no-untyped-def]
    """Breadth-first growth of the segments into voxels of their lobe that have none."""
    depth, height, width = segments.shape
    queue = []
    for k in range(depth):
        for j in range(height):
            for i in range(width):
                if segments[k, j, i] == 0 and lobes[k, j, i] != 0:
                    queue.append((k, j, i))
    changed = True
    while changed and len(queue) > 0:
        changed = False
        rest = []
        found = []
        for k, j, i in queue:
            code = 0
            for dk in range(-1, 2):
                for dj in range(-1, 2):
                    for di in range(-1, 2):
                        if faces_only and abs(dk) + abs(dj) + abs(di) != 1:
                            continue
                        a, b, c = k + dk, j + dj, i + di
                        if a < 0 or b < 0 or c < 0 or a >= depth or b >= height or c >= width:
                            continue
                        if segments[a, b, c] != 0 and lobes[a, b, c] == lobes[k, j, i]:
                            code = segments[a, b, c]
            if code != 0:
                found.append((k, j, i, code))
                changed = True
            else:
                rest.append((k, j, i))
        for k, j, i, value in found:
            segments[k, j, i] = value
        queue = rest


def _isolated(segments: np.ndarray, lobes: np.ndarray) -> None:
    """Voxels of a lobe without any path to its segments take the nearest segment of the lobe."""
    rest = np.argwhere((segments == 0) & (lobes > 0))
    for lobe in np.unique(lobes[tuple(rest.T)]) if len(rest) else ():
        mine = rest[lobes[tuple(rest.T)] == lobe]
        known = np.argwhere((segments > 0) & (lobes == lobe))
        if len(known):
            nearest = known[cKDTree(known).query(mine)[1]]
            segments[tuple(mine.T)] = segments[tuple(nearest.T)]


def nearest_branch_segments(
    planes: VoxelMap, lobes: np.ndarray, points: np.ndarray, codes: np.ndarray, tolerance: float, coarse: int = 3
) -> np.ndarray:
    """Segment of the nearest labelled branch within the lobe, one component each.

    Args:
        planes: segment map from which the tree was grown; it decides where the nearest branch of its segment is not
            more than ``tolerance`` mm farther away than the nearest of any, which keeps the interfaces smooth.
        lobes: lobe codes.
        points: (N, 3) nodes of the tree with segment ``codes`` (0 is left out).
        coarse: stride at which all voxels are asked; between equal answers the answer is copied.
    """
    segments = np.zeros(lobes.shape, dtype=np.uint8)
    for lobe in range(1, 6):
        mine = (LOBE_OF_SEGMENT[codes] == lobe) & (codes > 0)
        if mine.any():
            _nearest_in_lobe(segments, planes, lobes == lobe, points[mine], codes[mine], tolerance, coarse)
    return connect(segments, lobes)


def _nearest_in_lobe(
    segments: np.ndarray,
    planes: VoxelMap,
    inside: np.ndarray,
    points: np.ndarray,
    codes: np.ndarray,
    tolerance: float,
    coarse: int,
) -> None:
    if not inside.any():
        return
    box = tuple(
        slice(int(hit[0]), int(hit[-1]) + 1)
        for hit in (np.flatnonzero(inside.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1)))
    )
    start = np.array([s.start for s in box])
    size = np.array([s.stop - s.start for s in box])
    steps = [np.arange(-(-int(n - 1) // coarse) + 2) * coarse for n in size]
    lattice = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
    tree = cKDTree(points)
    near = codes[tree.query(planes.world(lattice + start))[1]].reshape([len(s) for s in steps])
    guess = _agree(near)[np.ix_(*(np.arange(n) // coarse for n in size))]
    part, mask = segments[box], inside[box]
    part[mask] = guess[mask]
    open_ = np.argwhere(mask & ((guess == 0) | (guess != planes.array[box])))
    if len(open_):
        place = planes.world(open_ + start)
        part[tuple(open_.T)] = _tolerant(place, planes.array[box][tuple(open_.T)], tree, points, codes, tolerance)


def _tolerant(
    place: np.ndarray, preferred: np.ndarray, tree: cKDTree, points: np.ndarray, codes: np.ndarray, tolerance: float
) -> np.ndarray:
    """Code of the nearest point, or the preferred one if its nearest point is not much farther away."""
    distance, near = tree.query(place)
    result = codes[near].astype(np.uint8)
    for code in np.unique(preferred):
        other = np.flatnonzero((preferred == code) & (result != code))
        own = codes == code
        if len(other) and own.any():
            limit = distance[other] + tolerance
            close = cKDTree(points[own]).query(place[other], distance_upper_bound=float(limit.max()))[0] <= limit
            result[other[close]] = code
    return result


def _agree(near: np.ndarray) -> np.ndarray:
    """Value of each lattice cell whose 8 corners agree, else 0."""
    cell = near[:-1, :-1, :-1].copy()
    for dk in (0, 1):
        for dj in (0, 1):
            for di in (0, 1):
                shifted = near[dk : near.shape[0] - 1 + dk, dj : near.shape[1] - 1 + dj, di : near.shape[2] - 1 + di]
                cell[shifted != near[:-1, :-1, :-1]] = 0
    return cell
