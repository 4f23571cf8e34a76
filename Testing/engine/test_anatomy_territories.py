"""Segment names on trees, lobes and territories, on box lungs with all 18 segments."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from LCTfoundLib.anatomy.airway_labels import LabeledTree, airway_findings, carina_node, label_airway, label_artery
from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import FACES, Probabilities, coarse_grid, resample
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Lobe
from LCTfoundLib.anatomy.territories import (
    TerritoryRule,
    connect_labels,
    lobe_probabilities,
    smooth_lobes,
    territories,
)
from Testing.engine.synthetic_trees import BoxLungs, box_lungs


def _dice(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    codes = np.unique(truth[truth > 0])
    return np.array(
        [2 * ((found == c) & (truth == c)).sum() / ((found == c).sum() + (truth == c).sum()) for c in codes]
    )


def _correct(tree: LabeledTree, lungs: BoxLungs) -> float:
    length = tree.graph.lengths()
    return float(length[tree.graph.segment == lungs.airway.segment].sum() / length.sum())


def _check_tiling(segments: np.ndarray, lobes: np.ndarray) -> None:
    assert ((segments > 0) == (lobes > 0)).all()
    assert (LOBE_OF_SEGMENT[segments] == lobes).all(), "no segment crosses a lobe"
    for code in np.unique(segments[segments > 0]):
        assert ndimage.label(segments == code, FACES)[1] == 1


# -- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("with_prior", "least"), [(True, 0.98), (False, 0.9)])
def test_segmental_bronchi_get_their_names(rng: np.random.Generator, with_prior: bool, least: float) -> None:
    lungs = box_lungs(rng)
    tree = label_airway(lungs.airway, lungs.lobes, lungs.prior if with_prior else None)
    assert _correct(tree, lungs) >= least
    assert not (lungs.airway.segment == tree.graph.segment).all() or tree.missing == []
    # A named piece hands its name down.
    named = tree.graph.segment[np.maximum(tree.graph.parent, 0)]
    assert (tree.graph.segment == named)[(named > 0) & (tree.graph.parent >= 0)].all()


def test_labels_match_brute_force_on_small_trees(rng: np.random.Generator) -> None:
    """The dynamic program against all ways to cut a tree."""
    from LCTfoundLib.anatomy.airway_labels import LabelRule, _cut_subtrees, _tip_weights

    for _ in range(20):
        graph = _random_topology(rng)
        branches = graph.branches()
        tips = np.bincount(branches.parent[branches.parent >= 0], minlength=len(branches)) == 0
        score = np.where(tips[:, None], np.log(rng.dirichlet(np.ones(19) * 0.3, len(branches)) + 1e-3), 0.0)
        rule = LabelRule()
        weighted = score * _tip_weights(branches, tips)[:, None]

        def value(named: np.ndarray, branches=branches, tips=tips, weighted=weighted, rule=rule) -> float:  # type: ignore[no-untyped-def]
            total = 0.0
            for branch, parent in enumerate(branches.parent):
                if named[branch] > 0 and (parent < 0 or named[parent] != named[branch]):
                    total -= rule.cut
                if tips[branch]:
                    total += weighted[branch, named[branch]] if named[branch] > 0 else -rule.central
            return total

        best = _best_by_enumeration(branches, tips, value)
        assert value(_cut_subtrees(branches, tips, score, rule)) == pytest.approx(best)


def _random_topology(rng: np.random.Generator) -> TreeGraph:
    """A straight piece that parts into two, which part again or not."""
    points, parent = [np.zeros(3)], [-1]

    def grow(start: int) -> int:
        way = rng.normal(size=3) * 3
        for step in (1, 2):
            points.append(points[start] + way * step)
            parent.append(start if step == 1 else len(points) - 2)
        return len(points) - 1

    for end in [grow(grow(0)) if False else grow(0)]:
        for child in (grow(end), grow(end)):
            if rng.random() < 0.7:
                grow(child), grow(child)
    return TreeGraph.from_parents(np.array(points), np.ones(len(points)), np.array(parent))


def _best_by_enumeration(branches, tips, value) -> float:  # type: ignore[no-untyped-def]
    """Best value over all sets of branches where names begin; each named subtree takes its best name."""
    best = -np.inf
    count = len(branches)
    for choice in range(2**count):
        heads = [b for b in range(count) if choice >> b & 1]
        covered = [branches.descendants(b) for b in heads]
        if any(covered[m][heads[n]] for m in range(len(heads)) for n in range(len(heads)) if m != n):
            continue
        named = np.zeros(count, int)
        for inside in covered:
            # Each subtree's best name is independent of the others.
            options = []
            for code in range(1, 19):
                trial = np.where(inside, code, 0)
                options.append((value(trial), code))
            named[inside] = max(options)[1]
        best = max(best, value(named))
    return best


def test_a_missing_bronchus_is_named(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng, drop=(7,))
    tree = label_airway(lungs.airway, lungs.lobes, lungs.prior)
    assert tree.missing == [7]
    sentences = [str(finding) for finding in airway_findings(tree, lungs.lobes, lungs.prior)]
    assert any("S7" in sentence for sentence in sentences)
    gone = Probabilities(lungs.prior.grid, lungs.prior.values.copy())
    gone.values[7] = 0
    assert any("fused" in str(finding) for finding in airway_findings(tree, lungs.lobes, gone))


def test_variants_are_named(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng)
    graph = lungs.airway
    tree = label_airway(graph, lungs.lobes, lungs.prior)
    assert carina_node(tree) is not None
    plain = [str(f) for f in airway_findings(tree)]
    assert not any("tracheal" in s or "trunk" in s for s in plain)
    # Move the bronchus of S1 to the trachea.
    stem = tree.stem[1]
    trachea = int(np.flatnonzero((graph.points[:, 2] > 70) & (graph.generation == 0))[-1])
    parent = tree.graph.parent.copy()
    parent[stem] = trachea
    moved = TreeGraph(graph.points, graph.radius, parent, tree.graph.segment, graph.generation)
    assert any("tracheal bronchus" in str(f) for f in airway_findings(LabeledTree(moved, {}, tree.stem)))


def test_an_artery_follows_the_labels_of_its_airway(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng)
    airway = label_airway(lungs.airway, lungs.lobes, lungs.prior).graph
    beside = TreeGraph.from_parents(lungs.airway.points + [3.0, 2.0, 0.0], lungs.airway.radius, lungs.airway.parent)
    artery = label_artery(beside, airway, lungs.lobes, lungs.prior)
    assert (artery.graph.segment == lungs.airway.segment).mean() > 0.95


def test_an_empty_tree_has_no_labels(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng)
    tree = label_airway(TreeGraph.empty(), lungs.lobes, lungs.prior)
    assert len(tree.missing) == 18 and len(tree.graph) == 0
    assert carina_node(tree) is None


# -- territories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tree", [True, False])
def test_territories_tile_the_lungs(rng: np.random.Generator, with_tree: bool) -> None:
    lungs = box_lungs(rng)
    trees = [lungs.airway] if with_tree else []
    result = territories(lungs.lobes, trees, lungs.prior)
    _check_tiling(result.segments, lungs.lobes.array)
    assert result.missing == []
    assert _dice(result.segments, lungs.segments.array).mean() > 0.93
    assert all(0 <= w <= TerritoryRule().most_tree for w in result.tree_weight.values())
    assert with_tree == (max(result.tree_weight.values()) > 0)


def test_the_tree_corrects_a_wrong_prior(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng)
    values = lungs.prior.values
    noise = np.stack([ndimage.gaussian_filter(rng.normal(size=v.shape), 4) for v in values])
    blurred = np.log(np.stack([ndimage.gaussian_filter(v, 3) for v in values]) + 1e-3) + 1.5 * noise / noise.std()
    blurred = np.exp(blurred - blurred.max(axis=0))
    bad = Probabilities(lungs.prior.grid, (blurred / blurred.sum(axis=0)).astype(np.float32))
    alone = territories(lungs.lobes, [], bad).segments
    fused = territories(lungs.lobes, [lungs.airway], bad, rule=TerritoryRule(far_mm=60.0)).segments
    truth = lungs.segments.array
    assert _dice(fused, truth).mean() > _dice(alone, truth).mean() + 0.02


def test_the_tree_alone_is_nearest_branch(rng: np.random.Generator) -> None:
    """Without prior and veins: brute-force nearest labeled node in the lobe, up to the working grid's steps."""
    lungs = box_lungs(rng, spacing=4.0)
    result = territories(lungs.lobes, [lungs.airway], rule=TerritoryRule(grid_mm=4.0))
    named = lungs.airway.segment > 0
    points, codes = lungs.airway.points[named], lungs.airway.segment[named]
    index = np.argwhere(lungs.lobes.array > 0)[::37]
    world = lungs.lobes.world_from_index(index)
    expected = []
    for voxel, place in zip(index, world, strict=True):
        mine = LOBE_OF_SEGMENT[codes] == lungs.lobes.array[tuple(voxel)]
        expected.append(codes[mine][np.linalg.norm(points[mine] - place, axis=1).argmin()])
    assert (result.segments[tuple(index.T)] == expected).mean() > 0.95


def test_veins_hold_territories_back() -> None:
    from LCTfoundLib.volume import Volume

    grid = Volume(np.zeros((20, 20, 60), np.uint8), (2.0, 2.0, 2.0))
    lobes = grid.with_array(np.full(grid.shape, Lobe.RIGHT_MIDDLE, np.uint8))
    z = np.linspace(4, 36, 9)
    points = np.concatenate([np.stack([np.full(9, x), np.full(9, 20.0), z], 1) for x in (20.0, 100.0)])
    tree = TreeGraph(
        points, np.ones(18), np.r_[-1, np.arange(8), -1, np.arange(9, 17)], np.repeat([4, 5], 9), np.zeros(18, int)
    )
    veins = np.zeros(grid.shape, bool)
    veins[:, 2::6, 35:37] = True  # a sheet of veins 10 mm beyond the middle
    plain = territories(lobes, [tree], veins=None).segments
    held = territories(lobes, [tree], veins=grid.with_array(veins), rule=TerritoryRule(vein=30.0)).segments
    border = [int((part == 4).sum(axis=2).mean()) for part in (plain, held)]
    assert abs(border[0] - 30) <= 1 and border[1] > border[0] + 1


def test_a_lobe_without_anything_still_gets_a_code(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng, spacing=5.0)
    result = territories(lungs.lobes, [])
    _check_tiling(result.segments, lungs.lobes.array)
    assert len(result.missing) == 13


# -- lobes -----------------------------------------------------------------------------------------------------------


def test_lobes_are_smooth_and_whole(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng)
    coarse = lobe_probabilities(lungs.prior)
    assert coarse.values.shape[0] == 6
    np.testing.assert_allclose(coarse.values.sum(axis=0), 1.0, atol=1e-4)
    coarse.values[5, 2:4, 2:4, 2:4] += 5  # an island of another lobe
    mask = lungs.lobes.with_array(lungs.lobes.array > 0)
    mask.array[1, 1, 1] = True  # and one of the lungs
    lobes = smooth_lobes(coarse, mask)
    assert _dice(lobes, lungs.lobes.array).min() > 0.95
    for lobe in Lobe:
        assert ndimage.label(lobes == lobe, FACES)[1] == 1
    assert lobes[1, 1, 1] == 0


def test_borders_move_to_the_fissure(rng: np.random.Generator) -> None:
    lungs = box_lungs(rng, spacing=3.0)
    truth = lungs.lobes.array
    right = (truth > 0) & (truth <= 3)
    shifted = np.roll(truth, 2, axis=0)  # 6 mm too high
    shifted = np.where(right & (shifted > 0), shifted, np.where(right, 3, 0))
    grid = coarse_grid(lungs.lobes, 3.0)
    values = np.stack([ndimage.gaussian_filter((shifted == c).astype(np.float32), 0.7) for c in range(6)])
    probability = Probabilities(lungs.lobes, values)
    fissure = np.zeros(truth.shape, np.float32)
    for axis in range(3):
        differ = np.diff(truth.astype(int), axis=axis) != 0
        both = (
            np.take(truth, range(1, truth.shape[axis]), axis) * np.take(truth, range(truth.shape[axis] - 1), axis) > 0
        )
        place = [slice(None)] * 3
        place[axis] = slice(1, None)
        fissure[tuple(place)] = np.maximum(fissure[tuple(place)], differ & both)
    lung = lungs.lobes.with_array(right)
    before = smooth_lobes(probability, lung, smooth_mm=1.0)
    after = smooth_lobes(probability, lung, lungs.lobes.with_array(fissure), smooth_mm=1.0)
    expected = np.where(right, truth, 0)
    assert _dice(after, expected).mean() > _dice(before, expected).mean() + 0.01
    assert grid.shape and resample(lungs.lobes, grid, 0).shape == grid.shape


def test_connecting_labels_keeps_the_tiling(rng: np.random.Generator) -> None:
    for _ in range(5):
        within = ndimage.binary_opening(ndimage.gaussian_filter(rng.normal(size=(24, 24, 24)), 2) > -0.02)
        labels = rng.integers(1, 5, within.shape).astype(np.uint8)
        labels = np.where(ndimage.gaussian_filter(rng.normal(size=within.shape), 3) > 0, 1, labels)
        labels = ndimage.median_filter(labels, 3).astype(np.uint8)
        labels[::5] = 0
        result = connect_labels(labels, within)
        assert ((result > 0) == within).all()
        parts, count = ndimage.label(within, FACES)
        main = parts == np.bincount(parts.ravel())[1:].argmax() + 1
        for code in np.unique(result[main]):
            pieces = ndimage.label((result == code), FACES)[1]
            assert pieces <= count, "no label is in more pieces than the mask"
