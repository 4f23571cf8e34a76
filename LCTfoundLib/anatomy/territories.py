"""Lobes at full resolution, and the segments as territories of the labeled bronchi within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.segmentation import watershed

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import (
    CORNERS,
    FACES,
    Box,
    Probabilities,
    bounding_box,
    coarse_grid,
    component_sizes,
    crop,
    resample,
)
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Lobe, segments_of_lobe
from LCTfoundLib.volume import Volume

__all__ = [
    "Territories",
    "TerritoryRule",
    "connect_labels",
    "lobe_probabilities",
    "smooth_lobes",
    "territories",
]

_FLOOR = 1e-3
#: Farther than anything in a chest.
_FAR_MM = 1e4


@dataclass(frozen=True)
class TerritoryRule:
    """How the tree and the network share the decision.

    Attributes:
        grid_mm: costs are computed on this grid and interpolated.
        scale_mm: distance that weighs as much as a factor e in probability.
        most_tree: weight of the tree where it reaches everywhere; the rest is the network's.
        near_mm, far_mm: mean distance of a lobe's voxels to the labeled tree at which the tree has its full weight, and
            none any more.
        vein: veins run between segments: the way to a branch counts longer by this factor times the mean share of vein
            along it. 0 = off.
        vein_sigma_mm: how far a vein is smeared.
    """

    grid_mm: float = 2.5
    scale_mm: float = 6.0
    most_tree: float = 0.75
    near_mm: float = 9.0
    far_mm: float = 30.0
    vein: float = 10.0
    vein_sigma_mm: float = 3.0


@dataclass
class Territories:
    """The 18 segments.

    Attributes:
        segments: uint8 codes on the lobes' grid; tile the lobes exactly, each one face-connected component as far as
            its lobe is one.
        tree_weight: lobe -> weight the tree had against the network.
        missing: codes of segments that got no voxel although their lobe is there.
    """

    segments: np.ndarray
    tree_weight: dict[Lobe, float] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)


# -- lobes -----------------------------------------------------------------------------------------------------------


def lobe_probabilities(regions: Probabilities) -> Probabilities:
    """Lobe probabilities (6 channels, index = ``Lobe`` code, 0 outside the lungs) from those of the segments.

    Args:
        regions: at least 19 channels, index = segment code, 0 background; more channels count as outside.
    """
    values = np.zeros((len(Lobe) + 1, *regions.values.shape[1:]), dtype=np.float32)
    for code, share in enumerate(regions.values):
        values[LOBE_OF_SEGMENT[code] if code < len(LOBE_OF_SEGMENT) else 0] += share
    return Probabilities(regions.grid, values)


def smooth_lobes(
    probability: Probabilities,
    lungs: Volume,
    fissure: Volume | None = None,
    smooth_mm: float = 2.0,
    smallest_ml: float = 2.0,
) -> np.ndarray:
    """Lobe map at the lungs' resolution from coarse lobe probabilities.

    Log-probabilities are smoothed and interpolated, so borders are smooth surfaces and not the coarse grid's steps;
    then each lobe keeps its largest component and the rest goes to the lobe it touches.

    Args:
        probability: of the lobes (index = ``Lobe`` code, 0 outside) on any canonical grid, coarse or fine.
        lungs: bool, canonical.
        fissure: probability of a fissure on any canonical grid; within 8 mm of a border between lobes, the border moves
            to where it is highest (a watershed).
        smooth_mm: sigma of the smoothing.
        smallest_ml: islands of the lungs smaller than this are dropped, larger ones keep the lobe they look like.

    Returns:
        uint8 ``Lobe`` codes [k, j, i] on the lungs' grid; the lungs are from now on where it is not 0.
    """
    result = np.zeros(lungs.array.shape, dtype=np.uint8)
    box = bounding_box(lungs.array)
    if box is None:
        return result
    part = crop(lungs, box)
    lobes = _most_likely(probability, part, smooth_mm)
    lobes = connect_labels(lobes, part.array, _biggest_parts(part, smallest_ml))
    if fissure is not None:
        lobes = connect_labels(_to_fissures(lobes, part, fissure), lobes > 0)
    result[box] = lobes
    return result


def _most_likely(probability: Probabilities, lungs: Volume, smooth_mm: float) -> np.ndarray:
    """The likeliest lobe of each lung voxel, by interpolated log-probabilities."""
    best = np.full(lungs.array.shape, -np.inf, dtype=np.float32)
    lobes = np.zeros(lungs.array.shape, dtype=np.uint8)
    sigma = smooth_mm / np.array(probability.grid.spacing[::-1])
    for lobe in Lobe:
        box = bounding_box(probability.values[lobe] > 0.02, probability.grid.spacing, 10.0)
        if box is None:
            continue
        grid = crop(probability.grid.with_array(probability.values[lobe]), box)
        score = ndimage.gaussian_filter(
            np.log(np.maximum(grid.array.astype(np.float32), _FLOOR)), sigma, mode="nearest"
        )
        target = _covered(lungs, grid)
        values = resample(grid.with_array(score), crop(lungs, target))
        better = (values > best[target]) & lungs.array[target]
        best[target][better] = values[better]
        lobes[target][better] = lobe
    return lobes


def _covered(volume: Volume, grid: Volume) -> Box:
    """The voxels of a volume whose centers lie within another canonical grid's voxels."""
    slices = []
    for axis in range(3):
        x = 2 - axis
        low = grid.origin[x] - grid.spacing[x] / 2
        high = low + grid.spacing[x] * grid.array.shape[axis]
        start = int(np.ceil((low - volume.origin[x]) / volume.spacing[x]))
        stop = int(np.floor((high - volume.origin[x]) / volume.spacing[x])) + 1
        slices.append(slice(max(0, min(start, volume.array.shape[axis])), max(0, min(stop, volume.array.shape[axis]))))
    return slices[0], slices[1], slices[2]


def _biggest_parts(lungs: Volume, smallest_ml: float) -> np.ndarray:
    """The lungs without small islands."""
    labels, count = ndimage.label(lungs.array, FACES)
    if count < 2:
        return lungs.array
    sizes = component_sizes(labels)
    keep = sizes * float(np.prod(lungs.spacing)) / 1000 >= min(smallest_ml, sizes.max() * np.prod(lungs.spacing) / 1000)
    keep[0] = False
    return keep[labels]


def _to_fissures(lobes: np.ndarray, grid: Volume, fissure: Volume, band_mm: float = 8.0) -> np.ndarray:
    """Move borders between lobes to the fissure: flood from both sides of a band, over its probability."""
    border = np.zeros(lobes.shape, dtype=bool)
    for axis in range(3):
        near, far = _shifted(axis)
        differ = (lobes[near] != lobes[far]) & (lobes[near] > 0) & (lobes[far] > 0)
        border[near] |= differ
        border[far] |= differ
    if not border.any():
        return lobes
    distance = ndimage.distance_transform_edt(~border, sampling=grid.spacing[::-1])
    band = (distance <= band_mm) & (lobes > 0)
    rim = (distance <= band_mm + 2 * max(grid.spacing)) & (lobes > 0) & ~band
    height = ndimage.gaussian_filter(resample(fissure, grid), 0.7)
    # Away from any visible fissure the old border is the ridge.
    height = height + 0.15 * np.exp(-((distance / (0.5 * band_mm)) ** 2)).astype(np.float32)
    flooded = watershed(height, np.where(rim, lobes, 0).astype(np.int32), mask=band | rim)
    return np.where(band & (flooded > 0), flooded, lobes).astype(np.uint8)


def _shifted(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    near, far = [slice(None)] * 3, [slice(None)] * 3
    near[axis], far[axis] = slice(None, -1), slice(1, None)
    return tuple(near), tuple(far)


def connect_labels(labels: np.ndarray, within: np.ndarray, keep_all: np.ndarray | None = None) -> np.ndarray:
    """Make each label one face-connected component and fill ``within``: all else goes to the label it touches.

    Args:
        labels: uint8 codes; 0 within ``within`` is to be filled.
        within: bool, what is to be tiled; outside becomes 0.
        keep_all: bool; islands of ``within`` that no label reaches keep their commonest label where this holds, and
            become 0 elsewhere. None: they all keep it (or take the nearest one).
    """
    result = np.where(within, labels, 0).astype(np.uint8)
    kept = np.zeros(result.shape, dtype=bool)
    for code, box in enumerate(ndimage.find_objects(result), start=1):
        if box is not None:
            parts, _ = ndimage.label(result[box] == code, FACES)
            kept[box] |= parts == int(component_sizes(parts).argmax()) if parts.max() else False
    loose = within & ~kept
    if not loose.any():
        return result
    return _flood(result, loose, within, keep_all)


def _flood(labels: np.ndarray, loose: np.ndarray, within: np.ndarray, keep_all: np.ndarray | None) -> np.ndarray:
    """Give loose voxels to the kept label that reaches them first over faces."""
    box = bounding_box(loose, (1.0, 1.0, 1.0), 1.0)
    if box is None:
        return labels
    near = ndimage.binary_dilation(loose[box], FACES) & within[box]
    markers = np.where(near & ~loose[box], labels[box], 0).astype(np.int32)
    flooded = watershed(np.zeros(markers.shape, np.uint8), markers, mask=near).astype(np.uint8)
    result = labels.copy()
    part = result[box]
    reached = loose[box] & (flooded > 0)
    part[reached] = flooded[reached]
    alone = loose[box] & (flooded == 0)
    if alone.any():
        if keep_all is not None:
            part[alone & ~keep_all[box]] = 0
            alone &= keep_all[box]
        _one_label_per_island(part, alone)
        _fill_unlabeled(result, box, alone & (part == 0), labels)
    return result


def _one_label_per_island(part: np.ndarray, alone: np.ndarray) -> None:
    """Give islands that no kept label reaches their commonest label, in place."""
    islands, _ = ndimage.label(alone, FACES)
    for island, box in enumerate(ndimage.find_objects(islands), start=1):
        inside = islands[box] == island
        votes = np.bincount(part[box][inside])
        votes[0] = 0
        part[box][inside] = votes.argmax()


def _fill_unlabeled(result: np.ndarray, box: Box, empty: np.ndarray, labels: np.ndarray) -> None:
    """Islands without any label take the nearest one's, however far."""
    if empty.any() and labels.any():
        place = np.argwhere(labels)
        index = np.argwhere(empty) + np.array([s.start for s in box])
        nearest = place[cKDTree(place).query(index)[1]]
        result[tuple(index.T)] = labels[tuple(nearest.T)]


# -- segments --------------------------------------------------------------------------------------------------------


def territories(
    lobes: Volume,
    trees: Sequence[TreeGraph],
    prior: Probabilities | None = None,
    veins: Volume | None = None,
    rule: TerritoryRule | None = None,
) -> Territories:
    """The segments as territories of labeled branches within each lobe, fused with the network's own segments.

    A voxel goes to the segment of least a * distance / scale + (1 - a) * -log(probability), where a falls from
    ``most_tree`` to 0 as the labeled tree reaches less of the lobe (thick slices: the network alone).

    Args:
        lobes: uint8 ``Lobe`` codes, canonical, each lobe one face-connected component.
        trees: labeled airway, and artery too where there is one.
        prior: probabilities of the segments (codes 1-18) on any canonical grid. None: the tree alone.
        veins: bool mask of the veins on any canonical grid; optional.
        rule: weights.

    Returns:
        ``Territories``. A lobe without labeled branches and without prior gets its first segment's code throughout.
    """
    rule = rule or TerritoryRule()
    result = Territories(np.zeros(lobes.array.shape, dtype=np.uint8))
    points, codes = _labeled_points(trees)
    density = _vein_density(lobes, veins, rule) if veins is not None and rule.vein > 0 else None
    for lobe in Lobe:
        inside = lobes.array == lobe
        box = bounding_box(inside)
        if box is None:
            continue
        part = crop(lobes.with_array(inside), box)
        segments = np.array([s.code for s in segments_of_lobe(lobe)])
        mine = np.isin(codes, segments)
        labels, weight = _divide(part, segments, points[mine], codes[mine], prior, density, rule)
        result.tree_weight[lobe] = weight
        connected = connect_labels(labels, part.array)
        result.segments[box][part.array] = connected[part.array]
        result.missing += [int(code) for code in segments if not (connected == code).any()]
    return result


def _labeled_points(trees: Sequence[TreeGraph]) -> tuple[np.ndarray, np.ndarray]:
    points = [tree.points[tree.segment > 0] for tree in trees]
    codes = [tree.segment[tree.segment > 0] for tree in trees]
    return np.concatenate([np.zeros((0, 3)), *points]), np.concatenate([np.zeros(0, int), *codes])


def _divide(
    lobe: Volume,
    segments: np.ndarray,
    points: np.ndarray,
    codes: np.ndarray,
    prior: Probabilities | None,
    veins: Volume | None,
    rule: TerritoryRule,
) -> tuple[np.ndarray, float]:
    """Labels (uint8) of one lobe's box, and the weight of the tree."""
    labels = np.zeros(lobe.array.shape, dtype=np.uint8)
    if not len(points) and prior is None:
        labels[lobe.array] = segments[0]
        return labels, 0.0
    grid = coarse_grid(lobe, rule.grid_mm)
    share = resample(lobe.with_array(lobe.array.astype(np.float32)), grid)
    where = ndimage.binary_dilation(share > 0, CORNERS)  # all that interpolation in the lobe looks at
    distance, weight = _distances(grid, where, share, segments, (points, codes), veins, prior is not None, rule)
    if prior is None:
        weight = 1.0
    cost = weight * distance / rule.scale_mm
    if prior is not None:
        cost += (1 - weight) * _prior_cost(grid, where, segments, prior)
    best = np.full(lobe.array.shape, np.inf, dtype=np.float32)
    for place, code in enumerate(segments):
        volume = np.full(grid.array.shape, 1e3, dtype=np.float32)
        volume[where] = cost[place]
        values = resample(grid.with_array(volume), lobe)
        better = lobe.array & (values < best)
        best[better] = values[better]
        labels[better] = code
    return labels, float(weight)


def _distances(
    grid: Volume,
    where: np.ndarray,
    share: np.ndarray,
    segments: np.ndarray,
    branches: tuple[np.ndarray, np.ndarray],
    veins: Volume | None,
    known_elsewhere: bool,
    rule: TerritoryRule,
) -> tuple[np.ndarray, float]:
    """(S, M) mm to each segment's branches from the voxels ``where``, and the weight that the tree deserves.

    A segment without branches is as far as the nearest one where the network knows it (it decides between them), else
    infinitely far.
    """
    points, codes = branches
    index = np.argwhere(where)
    result = np.full((len(segments), len(index)), _FAR_MM, dtype=np.float32)
    if not len(points):
        return result * 0, 0.0
    places = grid.world_from_index(index)
    density = resample(veins, grid) if veins is not None else None
    nearest = np.full(len(index), _FAR_MM, dtype=np.float32)
    for place, code in enumerate(segments):
        mine = points[codes == code]
        if len(mine):
            distance, node = cKDTree(mine).query(places)
            nearest = np.minimum(nearest, distance)
            result[place] = distance
            if density is not None:
                target = grid.index_from_world(mine[node])
                result[place] += rule.vein * distance * _mean_between(density, index, target)
    if known_elsewhere:
        result = np.where(result < _FAR_MM, result, result.min(axis=0))
    reach = float(np.average(nearest, weights=np.maximum(share[where], 1e-6)))
    weight = rule.most_tree * float(np.clip((rule.far_mm - reach) / (rule.far_mm - rule.near_mm), 0.0, 1.0))
    return result, weight


def _vein_density(lobes: Volume, veins: Volume, rule: TerritoryRule) -> Volume:
    """Share of vein voxels nearby: intersegmental veins mark a plane, which lies between and around them."""
    grid = coarse_grid(lobes, rule.grid_mm)
    share = resample(veins.with_array(veins.array.astype(np.float32)), grid)
    return grid.with_array(ndimage.gaussian_filter(share, rule.vein_sigma_mm / np.array(grid.spacing[::-1])))


def _mean_between(density: np.ndarray, start: np.ndarray, end: np.ndarray, samples: int = 5) -> np.ndarray:
    """(M,) mean of an array along the straight ways between (M, 3) voxel indices."""
    total = np.zeros(len(start), dtype=np.float32)
    for fraction in (np.arange(samples) + 0.5) / samples:
        at = np.rint(start + fraction * (end - start)).astype(np.int32)
        total += density[tuple(np.clip(at, 0, np.array(density.shape) - 1).T)]
    return total / samples


def _prior_cost(grid: Volume, where: np.ndarray, segments: np.ndarray, prior: Probabilities) -> np.ndarray:
    """(S, M) -log of each segment's share among its lobe's segments."""
    shares = np.stack([resample(prior.channel(code), grid)[where] for code in segments])
    shares = (shares + _FLOOR) / (shares.sum(axis=0) + len(segments) * _FLOOR)
    return -np.log(shares)
