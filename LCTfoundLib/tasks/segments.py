"""From named trees to the 18 segments on the input's grid: what a whole run and a relabeling share.

Both go through the same steps lobe by lobe, so that a lobe none of whose branches got another name stays as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.airway_labels import LabeledTree, airway_findings
from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import Probabilities, bounding_box, crop, resample
from LCTfoundLib.anatomy.quality import Finding, check_agreement, check_segments, region_confidence
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, SEGMENTS, Lobe, Tree, segment_by_code, segments_of_lobe
from LCTfoundLib.anatomy.territories import connect_labels, territories
from LCTfoundLib.volume import Volume

__all__ = [
    "divide",
    "judge",
    "lobes_of",
    "only_lobes",
    "overrule",
    "rounded_prior",
    "spread",
    "tile_lobes",
    "variants",
]

#: Steps of a probability that a state keeps.
_LEVELS = 255
#: Up to this distance an artery runs along a bronchus.
_BUNDLE_MM = 10.0
#: A branch that was named by hand decides about what lies no farther than this; beyond, trees decide little.
_REACH_MM = 30.0


def rounded_prior(prior: Probabilities) -> Probabilities:
    """The segments' probabilities (float32, 19 channels) in steps of 1/255, as a state keeps them.

    Territories from them differ from those of the exact ones in less than 0.01 % of the voxels.
    """
    values = np.rint(np.clip(prior.values[: len(LOBE_OF_SEGMENT)], 0.0, 1.0) * _LEVELS).astype(np.uint8)
    return spread(prior.grid, values)


def spread(grid: Volume, levels: np.ndarray) -> Probabilities:
    """Probabilities from their steps of 1/255 (uint8)."""
    return Probabilities(grid, levels.astype(np.float32) / np.float32(_LEVELS))


def lobes_of(segments: Volume) -> Volume:
    """The lobes that segments tile, uint8 ``Lobe`` codes."""
    return segments.with_array(LOBE_OF_SEGMENT[segments.array])


def only_lobes(segments: np.ndarray, lobes: Collection[Lobe]) -> np.ndarray:
    """The segments of some lobes, 0 elsewhere."""
    keep = np.isin(LOBE_OF_SEGMENT, [int(lobe) for lobe in lobes])
    return (np.arange(len(LOBE_OF_SEGMENT), dtype=np.uint8) * keep)[segments]


def divide(lobes: Volume, graphs: Mapping[Tree, TreeGraph], prior: Probabilities) -> np.ndarray:
    """Segments (uint8) of the lobes by the named airway and artery; each lobe for itself."""
    return territories(lobes, [graphs[Tree.AIRWAY], graphs[Tree.ARTERY]], prior).segments


# -- names given by hand ---------------------------------------------------------------------------------------------


def overrule(
    graphs: Mapping[Tree, TreeGraph], given: Mapping[Tree, np.ndarray], prior: Probabilities
) -> tuple[dict[Tree, TreeGraph], Probabilities]:
    """What territories are made from when a person named branches otherwise than the engine.

    Arteries that run with a renamed bronchus follow it, and near a renamed branch the network has no say: it is often
    the network whose opinion was wrong. Without such branches everything stays as it is.

    Args:
        graphs: with the names that count.
        given: (N,) segments by tree, as the engine named the nodes of airway and artery.
        prior: the network's segments.
    """
    artery = _following(graphs[Tree.AIRWAY], graphs[Tree.ARTERY], given)
    followed = {**graphs, Tree.ARTERY: artery}
    return followed, _overruled([(followed[tree], given[tree]) for tree in (Tree.AIRWAY, Tree.ARTERY)], prior)


def _following(airway: TreeGraph, artery: TreeGraph, given: Mapping[Tree, np.ndarray]) -> TreeGraph:
    """The artery with the new names of the bronchi it runs with, where nobody named it itself."""
    before = given[Tree.AIRWAY]
    renamed = _by_hand(airway.segment, before)
    if not renamed.any() or not len(artery):
        return artery
    nodes = np.flatnonzero((airway.segment > 0) | (before > 0))
    distance, place = cKDTree(airway.points[nodes]).query(artery.points)
    beside = nodes[place]
    new = airway.segment[beside]
    untouched = (artery.segment > 0) & (artery.segment == given[Tree.ARTERY])
    together = (artery.segment == before[beside]) | (distance < _BUNDLE_MM)
    same_lobe = LOBE_OF_SEGMENT[artery.segment] == LOBE_OF_SEGMENT[new]
    follows = renamed[beside] & untouched & together & same_lobe
    return replace(artery, segment=np.where(follows, new, artery.segment))


def _overruled(trees: Sequence[tuple[TreeGraph, np.ndarray]], prior: Probabilities) -> Probabilities:
    """The network's segments, where the nearest branch was renamed all in favor of its new name."""
    points = np.concatenate([graph.points for graph, _ in trees])
    codes = np.concatenate([graph.segment for graph, _ in trees])
    by_hand = np.concatenate([_by_hand(graph.segment, before) for graph, before in trees])
    if not by_hand.any():
        return prior
    values = prior.values.copy()
    for lobe in {Lobe(code) for code in LOBE_OF_SEGMENT[codes[by_hand]]}:
        own = np.flatnonzero(LOBE_OF_SEGMENT == lobe)
        mass = values[own].sum(axis=0)
        mine = np.isin(codes, own)
        index = np.argwhere(mass > 0)
        distance, node = cKDTree(points[mine]).query(prior.grid.world_from_index(index))
        decided = by_hand[mine][node] & (distance <= _REACH_MM)
        where = tuple(index[decided].T)
        for code in own:
            values[code][where] = np.where(codes[mine][node[decided]] == code, mass[where], 0.0)
    return Probabilities(prior.grid, values)


def _by_hand(segment: np.ndarray, given: np.ndarray) -> np.ndarray:
    return (segment > 0) & (segment != given)


# -- the input's grid ------------------------------------------------------------------------------------------------


def tile_lobes(segments: np.ndarray, lobes: np.ndarray, wanted: Collection[Lobe] = tuple(Lobe)) -> np.ndarray:
    """Segments that tile their lobes exactly, each in one piece as far as its lobe is; other lobes are left empty.

    Args:
        segments: uint8 codes; those of another lobe count for nothing.
        lobes: uint8 ``Lobe`` codes on the same grid.
        wanted: lobes to tile.
    """
    result = np.zeros(segments.shape, dtype=np.uint8)
    boxes = ndimage.find_objects(lobes, max_label=len(Lobe))
    for lobe in wanted:
        box = boxes[lobe - 1]
        if box is None:
            continue
        inside = lobes[box] == lobe
        tiled = connect_labels(only_lobes(segments[box], [lobe]), inside)
        result[box][inside] = tiled[inside]
    return result


# -- how good they are -----------------------------------------------------------------------------------------------


def judge(
    segments: Volume, prior: Probabilities, wanted: Collection[Lobe] = tuple(Lobe)
) -> tuple[list[Finding], dict[str, float]]:
    """Findings on the segments of some lobes, and their confidence by structure key.

    Args:
        segments: uint8 codes on the working grid.
        prior: the network's segments.
        wanted: lobes whose segments are looked at.
    """
    mine = segments.with_array(only_lobes(segments.array, wanted))
    keys = {segment.key for lobe in wanted for segment in segments_of_lobe(lobe)}
    disagree, agreement = check_agreement(mine.array, _by_network(mine, prior))
    pieces = [finding for finding in check_segments(mine.array, mine.spacing) if finding.structure in keys]
    confidence = region_confidence(mine, prior, agreement)
    return pieces + disagree, {segment_by_code(code).key: value for code, value in confidence.items()}


def _by_network(segments: Volume, prior: Probabilities) -> np.ndarray:
    """The coarse net's own segments (uint8) within the lobes of ``segments``, on their grid."""
    lobes = lobes_of(segments).array
    best = np.full(lobes.shape, -1.0, dtype=np.float32)
    codes = np.zeros(lobes.shape, dtype=np.uint8)
    for code in range(1, len(LOBE_OF_SEGMENT)):
        box = bounding_box(lobes == LOBE_OF_SEGMENT[code])
        if box is None:
            continue
        values = resample(prior.channel(code), crop(segments, box))
        better = (values > best[box]) & (lobes[box] == LOBE_OF_SEGMENT[code])
        best[box][better] = values[better]
        codes[box][better] = code
    return codes


def variants(airway: TreeGraph) -> list[Finding]:
    """Segmental bronchi that are missing, and variants, by the names in a graph."""
    stems = {s.code: int(np.argmax(airway.segment == s.code)) for s in SEGMENTS if (airway.segment == s.code).any()}
    return airway_findings(LabeledTree(airway, {}, stems))
