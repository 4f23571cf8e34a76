"""Quality findings: each is raised by what it is about, and not by a normal case."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import Probabilities
from LCTfoundLib.anatomy.quality import (
    LOBE_SHARES,
    RIGHT_LUNG_SHARE,
    Finding,
    Severity,
    check_agreement,
    check_image,
    check_laterality,
    check_lobe_volumes,
    check_segments,
    check_trees,
    check_truncation,
    region_confidence,
    tree_confidence,
)
from LCTfoundLib.anatomy.structures import Context, Lobe, Side, Tree
from LCTfoundLib.volume import Volume
from Testing.engine.synthetic_trees import box_lungs


def _keys(findings: list[Finding]) -> set[str]:
    for finding in findings:
        assert str(finding)[0].isupper() and str(finding).endswith(".")
    return {finding.structure for finding in findings}


def _usual_lobes() -> np.ndarray:
    """A label map whose volumes are the usual shares."""
    sides = {Side.RIGHT: RIGHT_LUNG_SHARE[0], Side.LEFT: 1 - RIGHT_LUNG_SHARE[0]}
    counts = [round(20000 * LOBE_SHARES[lobe][0] * sides[lobe.side]) for lobe in Lobe]
    return np.repeat(np.arange(1, 6, dtype=np.uint8), counts).reshape(1, 1, -1)


def test_lobe_volumes() -> None:
    assert check_lobe_volumes(_usual_lobes()) == []
    tiny = _usual_lobes()
    tiny[tiny == Lobe.LEFT_UPPER] = np.where(np.arange((tiny == Lobe.LEFT_UPPER).sum()) % 10 == 0, 4, 5)
    assert "left_upper" in _keys(check_lobe_volumes(tiny))
    gone = np.where(_usual_lobes() == Lobe.RIGHT_MIDDLE, 0, _usual_lobes())
    assert "right_middle" in _keys(check_lobe_volumes(gone))
    assert _keys(check_lobe_volumes(np.zeros((2, 2, 2), np.uint8))) >= {"lungs"}


def test_truncation_names_the_side() -> None:
    lungs = np.zeros((40, 40, 40), bool)
    lungs[5:35, 5:35, 5:35] = True
    spacing = (2.0, 2.0, 2.0)
    assert check_truncation(lungs, spacing) == []
    for slices, word in (((slice(20, None),), "bottom"), ((slice(None, 20),), "top")):
        (finding,) = check_truncation(lungs[slices], spacing)
        assert word in str(finding) and finding.severity is Severity.SERIOUS
    (finding,) = check_truncation(lungs[:, :, 20:], spacing)
    assert "right side" in str(finding)


def test_image_quality(rng: np.random.Generator) -> None:
    lungs = np.zeros((20, 40, 40), bool)
    lungs[2:18, 5:35, 5:35] = True
    clean = np.where(lungs, -850, 40).astype(np.float32)
    noisy = Volume((clean + rng.normal(0, 150, clean.shape)).astype(np.int16), (1.0, 1.0, 1.0))
    plain = Volume((clean + rng.normal(0, 20, clean.shape)).astype(np.int16), (1.0, 1.0, 1.0))
    thick = Volume(plain.array, (1.0, 1.0, 5.0))
    assert check_image(plain, lungs) == []
    assert "noisy" in str(check_image(noisy, lungs)[0])
    assert "5.0 mm" in str(check_image(thick, lungs)[0])
    dense = Volume(np.where(lungs, -250, 40).astype(np.int16), (1.0, 1.0, 1.0))
    assert "lungs" in _keys(check_image(dense, lungs))


def test_swapped_sides_are_noticed(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng, spacing=5.0)
    context = np.zeros(lungs.lobes.shape, np.uint8)
    depth, height, width = context.shape
    context[:20, 10:22, width // 2 - 2 : width // 2 + 9] = Context.HEART
    context[:6, 10:30, 2:20] = Context.UPPER_ABDOMEN_RIGHT
    context[:6, 10:30, -14:-2] = Context.UPPER_ABDOMEN_LEFT
    grid = lungs.lobes
    assert check_laterality(grid, grid.with_array(context)) == []
    assert check_laterality(grid, None) == []
    (mirror,) = check_laterality(grid, grid.with_array(context[:, :, ::-1]))
    assert mirror.severity is Severity.SERIOUS and "swapped" in str(mirror)
    (wrong,) = check_laterality(grid.with_array(grid.array[:, :, ::-1]), grid.with_array(context))
    assert "left side" in str(wrong)


def _in_one_piece(segments: np.ndarray) -> np.ndarray:
    """Each segment's largest piece: a lobe of the box lungs is not convex, so a nearest seed may own two."""
    whole = np.zeros_like(segments)
    for code in range(1, int(segments.max()) + 1):
        pieces, _ = ndimage.label(segments == code)
        whole[pieces == np.bincount(pieces.ravel())[1:].argmax() + 1] = code
    return whole


def test_segments_missing_tiny_or_broken(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng, spacing=5.0)
    segments = _in_one_piece(lungs.segments.array)
    assert check_segments(segments, lungs.segments.spacing) == []
    assert _keys(check_segments(np.where(segments == 6, 7, segments), lungs.segments.spacing)) == {"right_s06"}
    broken = segments.copy()
    place = np.argwhere(segments == 9)
    broken[tuple(place[np.abs(place - place.mean(axis=0)).argmin(axis=0)[0]])] = 10
    broken[0, 0, 0] = 9
    assert "right_s09" in _keys(check_segments(broken, lungs.segments.spacing))


def test_disagreement_is_measured_by_dice(rng: np.random.Generator) -> None:
    first = rng.integers(0, 19, (20, 20, 20)).astype(np.uint8)
    second = np.where(rng.random(first.shape) < 0.3, rng.integers(1, 19, first.shape), first).astype(np.uint8)
    findings, dice = check_agreement(first, second, least=0.8)
    both = (first > 0) & (second > 0)
    for code, value in dice.items():
        a, b = (first == code) & both, (second == code) & both
        assert value == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert len(findings) == sum(value < 0.8 for value in dice.values()) > 0
    assert check_agreement(first, first)[0] == []


def test_trees_in_pieces_or_absent() -> None:
    trees = np.zeros((30, 30, 90), np.uint8)
    lobes = np.full(trees.shape, Lobe.LEFT_LOWER, np.uint8)
    trees[5, 5, 2:80], trees[15, 15, 2:80], trees[25, 25, 2:80] = Tree.AIRWAY, Tree.ARTERY, Tree.VEIN
    assert check_trees(trees, (1.0, 1.0, 1.0), lobes) == []
    trees[5, 5, 40:44] = 0
    trees[25] = 0
    lobes[:, :, 85:] = Lobe.LEFT_UPPER
    findings = check_trees(trees, (1.0, 1.0, 1.0), lobes)
    text = " ".join(str(f) for f in findings)
    assert "The airway is in 2 pieces" in text
    assert "No pulmonary vein was found" in text
    assert "artery does not reach the left upper lobe" in text


def test_confidence_follows_the_probabilities(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng, spacing=5.0)
    sure = region_confidence(lungs.segments, lungs.prior)
    flat = Probabilities(lungs.prior.grid, np.full_like(lungs.prior.values, 1 / 19))
    unsure = region_confidence(lungs.segments, flat)
    assert set(sure) == set(range(1, 19))
    assert all(0.3 < sure[c] <= 1 and unsure[c] == pytest.approx(1 / 18, abs=0.01) for c in sure)
    against = region_confidence(lungs.segments, lungs.prior, {c: 0.25 for c in sure})
    assert all(against[c] < sure[c] for c in sure)


def test_tree_confidence_is_weighted_by_length() -> None:
    points = np.array([[0.0, 0, 0], [1, 0, 0], [10, 0, 0]])
    graph = TreeGraph.from_parents(points, np.ones(3), np.array([-1, 0, 1]))
    graph.confidence = np.array([0.0, 0.0, 1.0])
    assert tree_confidence(graph) == pytest.approx(0.9, abs=1e-3)
    assert tree_confidence(TreeGraph.empty()) == 0.0
    assert ndimage.label(np.ones(3))[1] == 1
