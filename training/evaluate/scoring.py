"""All scores of one prediction for one case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, SEGMENTS, Lobe, Side, Tree, lobes_from_segments
from LCTfoundLib.volume import Volume
from training.evaluate import metrics
from training.evaluate.vessel_points import VesselPoint, score_swaps

__all__ = ["HEADLINES", "Case", "Prediction", "Scores", "Truth", "score_case"]

#: (structure, measure) -> value.
Scores = dict[tuple[str, str], float]

#: Rows that two methods are compared on; testing every segment would only multiply chance findings.
HEADLINES: tuple[tuple[str, str], ...] = (
    ("Lungs", "Dice"),
    ("Lobes, mean", "Dice"),
    ("Segments, mean", "Dice"),
    ("Segments, mean", "NSD 1 mm"),
    ("Segments, mean", "intrusions"),
    *((tree.name.capitalize(), measure) for tree in Tree for measure in ("Dice", "clDice", "TD", "BD", "precision")),
)

NEAR_PLEURA_MM = 10.0


@dataclass
class Truth:
    """What is known of a case; what is not known stays None. All arrays lie on the CT's grid.

    Attributes:
        segments: territory codes 1-18.
        lobes: ``Lobe`` codes.
        sides: 1 right lung, 2 left lung.
        trees: ``Tree`` codes.
        visible: where the scan can show the tree; a true branch elsewhere counts neither way.
        graphs: exact centerlines of the trees.
        trachea: mask.
        ignore: voxels that no score looks at (a tumor that a contour may or may not include).
        points: vessel points labeled by eye.
        lobes_by: who made the lobes, for the report.
    """

    segments: np.ndarray | None = None
    lobes: np.ndarray | None = None
    sides: np.ndarray | None = None
    trees: np.ndarray | None = None
    visible: np.ndarray | None = None
    graphs: Mapping[Tree, TreeGraph] = field(default_factory=dict)
    trachea: np.ndarray | None = None
    ignore: np.ndarray | None = None
    points: list[VesselPoint] = field(default_factory=list)


@dataclass
class Case:
    """A canonical CT and what is known of it."""

    name: str
    ct: Volume
    truth: Truth


@dataclass
class Prediction:
    """A method's answer on the CT's grid.

    Attributes:
        segments: territory codes 0-18, uint8.
        trees: ``Tree`` codes, uint8.
        graphs: centerlines, where the method makes them.
        seconds: wall time.
    """

    segments: np.ndarray
    trees: np.ndarray
    graphs: Mapping[Tree, TreeGraph] = field(default_factory=dict)
    seconds: float = float("nan")


def score_case(case: Case, prediction: Prediction) -> Scores:
    """Every score the case's truth allows."""
    truth, spacing = case.truth, case.ct.spacing
    segments = _without(prediction.segments, truth.ignore)
    lobes = lobes_from_segments(segments)
    scores: Scores = {("Run", "seconds"): prediction.seconds}
    scores |= _lung_scores(truth, lobes, spacing)
    if truth.lobes is not None:
        scores |= _lobe_scores(_without(truth.lobes, truth.ignore), lobes, spacing)
    if truth.segments is not None:
        scores |= _segment_scores(_without(truth.segments, truth.ignore), segments, spacing)
        scores |= _intrusion_scores(case, segments)
    if truth.trees is not None:
        scores |= _tree_scores(case, prediction.trees)
    if truth.trachea is not None:
        scores["Airway", "trachea recall"] = metrics.recall(truth.trachea, prediction.trees == Tree.AIRWAY)
    if truth.points:
        scores |= _swap_scores(case, prediction)
    scores |= _anatomy_scores(prediction, spacing)
    return scores


def _without(labels: np.ndarray, ignore: np.ndarray | None) -> np.ndarray:
    return labels if ignore is None else np.where(ignore, 0, labels).astype(labels.dtype)


# -- territories -----------------------------------------------------------------------------------------------------


def _lung_scores(truth: Truth, lobes: np.ndarray, spacing: metrics.Spacing) -> Scores:
    scores: Scores = {}
    if truth.sides is not None:
        sides = _without(truth.sides, truth.ignore)
        for code, side in ((1, Side.RIGHT), (2, Side.LEFT)):
            ours = np.isin(lobes, [lobe for lobe in Lobe if lobe.side is side])
            scores |= _region(f"{side.value.capitalize()} lung", sides == code, ours, spacing, hausdorff=True)
        scores |= _region("Lungs", sides > 0, lobes > 0, spacing, hausdorff=True)
    elif truth.lobes is not None:
        scores |= _region("Lungs", _without(truth.lobes, truth.ignore) > 0, lobes > 0, spacing, hausdorff=True)
    return scores


def _region(
    name: str, truth: np.ndarray, ours: np.ndarray, spacing: metrics.Spacing, hausdorff: bool = False
) -> Scores:
    distances = metrics.surface_distances(truth, ours, spacing)
    scores: Scores = {
        (name, "Dice"): metrics.dice(truth, ours),
        (name, "NSD 1 mm"): distances.normalized_dice(1.0),
        (name, "MSD mm"): distances.mean(),
    }
    if hausdorff:
        scores[name, "HD95 mm"] = distances.hausdorff(95)
    return scores


def _lobe_scores(truth: np.ndarray, ours: np.ndarray, spacing: metrics.Spacing) -> Scores:
    scores: Scores = {}
    for lobe in Lobe:
        scores |= _region(lobe.label, truth == lobe, ours == lobe, spacing, hausdorff=True)
    scores |= _means("Lobes, mean", scores, [lobe.label for lobe in Lobe])
    for name, distance in metrics.fissure_distance(truth, ours, spacing).items():
        scores[f"{name.capitalize()} fissure", "MSD mm"] = distance
    return scores


def _segment_scores(truth: np.ndarray, ours: np.ndarray, spacing: metrics.Spacing) -> Scores:
    scores: Scores = {}
    for segment in SEGMENTS:
        scores |= _region(segment.short, truth == segment.code, ours == segment.code, spacing)
    return scores | _means("Segments, mean", scores, [segment.short for segment in SEGMENTS])


def _means(name: str, scores: Scores, rows: list[str]) -> Scores:
    """Averages over structures, of the measures all of them have; absent structures are left out."""
    result: Scores = {}
    for measure in dict.fromkeys(measure for _, measure in scores):
        values = [scores[row, measure] for row in rows if not np.isnan(scores[row, measure])]
        result[name, measure] = float(np.mean(values)) if values else float("nan")
    return result


def _intrusion_scores(case: Case, segments: np.ndarray) -> Scores:
    """Intrusions of true bronchi and arteries into wrong predicted segments (veins run between segments)."""
    scores: Scores = {}
    for tree in (Tree.AIRWAY, Tree.ARTERY):
        if tree in case.truth.graphs:
            centerline = metrics.centerline_of_graph(case.truth.graphs[tree], case.ct)
            scores[tree.name.capitalize(), "intrusions"] = float(
                metrics.intrusions(centerline, segments, case.truth.segments)
            )
    if scores:
        scores["Segments, mean", "intrusions"] = float(sum(scores.values()))
    return scores


# -- trees -----------------------------------------------------------------------------------------------------------


def _tree_scores(case: Case, ours: np.ndarray) -> Scores:
    scores: Scores = {}
    truth = case.truth
    assert truth.trees is not None
    hidden = np.zeros(truth.trees.shape, bool) if truth.visible is None else (truth.trees > 0) & ~truth.visible
    if truth.ignore is not None:
        hidden |= truth.ignore
    shown, known = np.where(hidden, 0, truth.trees), np.where(hidden, 0, ours)
    for tree in Tree:
        scores |= _one_tree(tree, shown == tree, known == tree, ours == tree, case)
    return scores


def _one_tree(tree: Tree, truth: np.ndarray, ours: np.ndarray, whole: np.ndarray, case: Case) -> Scores:
    """Scores of a tree.

    Args:
        truth: visible truth.
        ours: prediction without the hidden voxels.
        whole: the prediction as it is, for its connectedness: what runs through hidden voxels is not broken there.
    """
    name = tree.name.capitalize()
    if tree in case.truth.graphs:
        centerline = metrics.centerline_of_graph(case.truth.graphs[tree], case.ct).within(truth)
    else:
        centerline = metrics.centerline_of_mask(truth, case.ct.spacing)
    counted = metrics.largest_component(whole) & ours if tree is Tree.AIRWAY else ours
    score = metrics.tree_score(centerline, truth, counted)
    distances = metrics.surface_distances(truth, ours, case.ct.spacing)
    return {
        (name, "Dice"): metrics.dice(truth, ours),
        (name, "NSD 1 mm"): distances.normalized_dice(1.0),
        (name, "clDice"): metrics.centerline_dice(truth, ours),
        (name, "TD"): score.length_detected,
        (name, "BD"): score.branches_detected,
        (name, "precision"): score.precision,
    }


def _swap_scores(case: Case, prediction: Prediction) -> Scores:
    score = score_swaps(case.truth.points, case.ct.with_array(prediction.trees))
    return {
        ("Artery/vein points", "points"): float(len(case.truth.points)),
        ("Artery/vein points", "swapped"): score.swap_rate,
        ("Artery/vein points", "swapped of found"): score.swap_rate_of_found,
        ("Artery/vein points", "missed"): score.miss_rate,
    }


# -- anatomy that needs no truth -------------------------------------------------------------------------------------


def _anatomy_scores(prediction: Prediction, spacing: metrics.Spacing) -> Scores:
    lobes = lobes_from_segments(prediction.segments)
    vessels = (prediction.trees == Tree.ARTERY) | (prediction.trees == Tree.VEIN)
    scores: Scores = {
        (lobe.label, "pleura within 10 mm"): share
        for lobe, share in metrics.pleural_reach(lobes, vessels, spacing, NEAR_PLEURA_MM).items()
    }
    for tree in Tree:
        scores[tree.name.capitalize(), "components"] = float(metrics.component_count(prediction.trees == tree))
    present = [s.code for s in SEGMENTS if (prediction.segments == s.code).any()]
    broken = sum(metrics.component_count(prediction.segments == code) > 1 for code in present)
    scores["Segments, mean", "present"] = float(len(present))
    scores["Segments, mean", "in pieces"] = float(broken)
    if (airway := prediction.graphs.get(Tree.AIRWAY)) is not None:
        reached = np.unique(LOBE_OF_SEGMENT[np.asarray(airway.segment, dtype=int)])
        scores["Airway", "lobes reached"] = float(np.count_nonzero(reached))
        scores["Airway", "leaks"] = float(len(metrics.airway_leaks(airway)))
    return scores
