"""The evaluation command on a toy thorax: what is perfect scores 1, what is wrong is seen, the baseline works."""

from __future__ import annotations

import copy
import csv
import json
import math

import numpy as np
import pytest
import SimpleITK as sitk

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import SEGMENTS, Lobe, Side, Tree, lobes_from_segments
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.volume import Volume
from training.evaluate import cases, classical, lung_segmentation, vessel_points
from training.evaluate.cases import CaseSource, TestSet
from training.evaluate.report import SetResult, comparison_table, write_report
from training.evaluate.scoring import Case, Prediction, Truth, score_case
from training.evaluate.vessel_points import VesselPoint, score_swaps

SHAPE = (100, 100, 140)
SPACING = (2.0, 2.0, 2.0)


def ellipsoid(center: tuple[float, float, float], axes: tuple[float, float, float]) -> np.ndarray:
    grid = np.indices(SHAPE).astype(np.float32)
    return sum(((g - c) / a) ** 2 for g, c, a in zip(grid, center, axes, strict=True)) <= 1


def tube(start: tuple[float, ...], end: tuple[float, ...], radius: float) -> np.ndarray:
    """Voxels within ``radius`` (voxels) of a line."""
    a, b = np.array(start, float), np.array(end, float)
    points = np.moveaxis(np.indices(SHAPE), 0, -1) - a
    along = np.clip(points @ (b - a) / ((b - a) @ (b - a)), 0, 1)
    return np.linalg.norm(points - along[..., None] * (b - a), axis=-1) <= radius


def toy_segments(lungs: dict[Side, np.ndarray]) -> np.ndarray:
    """Each lung cut into slabs along k, one per segment."""
    result = np.zeros(SHAPE, np.uint8)
    for side, lung in lungs.items():
        codes = [s.code for s in SEGMENTS if s.side is side]
        used = np.flatnonzero(lung.any(axis=(1, 2)))
        slab = (np.arange(SHAPE[0]) - used[0]) * len(codes) // (used[-1] + 1 - used[0])
        table = np.array(codes)[np.clip(slab, 0, len(codes) - 1)]
        result[lung] = np.broadcast_to(table[:, None, None], SHAPE)[lung]
    return result


def toy_case(seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-2, 2, 3)
    body = ellipsoid((50, 50, 70), (200, 44, 62))
    lungs = {
        side: ellipsoid((48 + shift[0], 50 + shift[1], x + shift[2]), (38, 32, 23))
        for side, x in ((Side.RIGHT, 42), (Side.LEFT, 98))
    }
    airway = tube((99, 50, 70), (52, 50, 70), 4) | tube((52, 50, 52), (52, 50, 88), 3)
    artery = tube((48, 58, 50), (30, 58, 34), 1.5) | tube((48, 58, 90), (30, 58, 106), 1.5)
    vein = tube((44, 40, 52), (60, 40, 34), 1.5) | tube((44, 40, 88), (60, 40, 106), 1.5)
    inside = lungs[Side.RIGHT] | lungs[Side.LEFT]
    wall = (tube((99, 50, 70), (52, 50, 70), 5.5) | tube((52, 50, 51), (52, 50, 89), 4.5)) & ~airway
    hu = np.full(SHAPE, -1000.0)
    for mask, value in ((body, 40), (inside, -850), (wall, 30), (airway, -990), ((artery | vein) & inside, 150)):
        hu[mask] = value
    hu += rng.normal(0, 15, SHAPE)
    trees = np.zeros(SHAPE, np.uint8)
    trees[artery & inside], trees[vein & inside], trees[airway] = Tree.ARTERY, Tree.VEIN, Tree.AIRWAY
    segments = toy_segments(lungs)
    points = np.array([[70, 50, 99], [70, 50, 52], [52, 50, 52], [88, 50, 52]], float) * 2
    graph = TreeGraph(
        points, np.array([8.0, 8, 6, 6]), np.array([-1, 0, 1, 1]), np.array([0, 0, 6, 15]), np.array([0, 0, 1, 1])
    )
    truth = Truth(
        segments=segments,
        lobes=lobes_from_segments(segments),
        trees=trees,
        graphs={Tree.AIRWAY: graph},
        trachea=trees == Tree.AIRWAY,
    )
    return Case(f"toy {seed}", Volume(hu.astype(np.float32), SPACING), truth)


@pytest.fixture(scope="module")
def toy() -> Case:
    return toy_case()


def perfect(case: Case) -> Prediction:
    return Prediction(case.truth.segments.copy(), case.truth.trees.copy(), case.truth.graphs)


# -- scores of a case ------------------------------------------------------------------------------------------------


def test_the_truth_itself_scores_perfectly(toy):
    scores = score_case(toy, perfect(toy))
    for (structure, measure), value in scores.items():
        if measure in {"Dice", "NSD 1 mm", "clDice", "TD", "BD", "precision", "trachea recall"}:
            assert value == 1.0 or math.isnan(value), (structure, measure)
        if measure in {"MSD mm", "HD95 mm", "intrusions", "leaks", "in pieces"}:
            assert value == 0.0 or math.isnan(value), (structure, measure)
    assert scores["Airway", "components"] == 1
    assert scores["Segments, mean", "present"] == 18
    assert scores["Airway", "lobes reached"] == 2


def test_swapped_neighbors_cost_these_two_segments_and_their_lobes_only(toy):
    wrong = perfect(toy)
    first, second = toy.truth.segments == 5, toy.truth.segments == 6  # the middle lobe's last, the lower lobe's first
    wrong.segments[first], wrong.segments[second] = 6, 5
    scores = score_case(toy, wrong)
    assert scores["RS5", "Dice"] == scores["RS6", "Dice"] == 0
    assert scores["RS4", "Dice"] == 1
    assert scores["Segments, mean", "Dice"] == pytest.approx(16 / 18)
    assert scores["Right upper lobe", "Dice"] == 1 and scores["Right lower lobe", "Dice"] < 1
    assert scores["Airway", "intrusions"] >= 1
    assert scores["Lungs", "Dice"] == 1


def test_an_invisible_branch_counts_neither_way(toy):
    hidden = toy.truth.trees == Tree.ARTERY
    hidden[:, :, 70:] = False
    truth = Truth(trees=toy.truth.trees, visible=~hidden)
    missed = toy.truth.trees.copy()
    missed[hidden] = 0
    case = Case("hidden", toy.ct, truth)
    for trees in (missed, toy.truth.trees):
        scores = score_case(case, Prediction(toy.truth.segments, trees))
        assert scores["Artery", "Dice"] == scores["Artery", "TD"] == scores["Artery", "precision"] == 1


def test_voxels_to_ignore_do_not_count(toy):
    ignore = np.zeros(SHAPE, bool)
    ignore[:, :, :50] = True
    sides = np.where(np.arange(SHAPE[2]) < 70, 1, 2) * (toy.truth.segments > 0)
    case = Case("ignore", toy.ct, Truth(sides=sides.astype(np.uint8), ignore=ignore))
    wrong = perfect(toy)
    wrong.segments[:, :, :50] = 0
    scores = score_case(case, wrong)
    assert scores["Right lung", "Dice"] == 1 and scores["Right lung", "HD95 mm"] == 0


# -- vessel points ---------------------------------------------------------------------------------------------------


def test_swaps_and_misses_are_counted_apart():
    trees = np.zeros((20, 20, 20), np.uint8)
    trees[10, 10, 5], trees[10, 10, 15] = Tree.ARTERY, Tree.VEIN
    volume = Volume(trees, (1.0, 1.0, 1.0), (-5.0, 0.0, 0.0))

    def point(label: Tree, i: float, j: float = 10.0) -> VesselPoint:
        return VesselPoint("p", label, (i - 5.0, j, 10.0), "", "", "")

    points = [point(Tree.ARTERY, 5), point(Tree.ARTERY, 17.5), point(Tree.VEIN, 15, 12.9), point(Tree.VEIN, 15, 13.5)]
    score = score_swaps(points, volume)
    assert (score.right, score.swapped, score.missed) == (2, 1, 1)
    assert score.swap_rate == 0.25 and score.swap_rate_of_found == pytest.approx(1 / 3)
    outside = score_swaps([point(Tree.VEIN, -500), point(Tree.VEIN, 500)], volume)
    assert outside.missed == 2
    assert math.isnan(score_swaps([], volume).swap_rate)


@pytest.mark.parametrize("path", sorted(vessel_points.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_labeled_points_are_complete(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    points = vessel_points.read_points(path)
    assert len({p.name for p in points}) == len(points)
    assert {p.label for p in points} == {Tree.ARTERY, Tree.VEIN}
    assert all(p.evidence for p in points)
    assert "not radiologists" in data["annotator"] and data["license"] == "CC BY 3.0"
    spacing, origin = np.array(data["spacing_mm"]), np.array(data["origin_lps_mm"])
    for row in data["points"]:
        np.testing.assert_allclose(np.array(row["voxel_ijk"]) * spacing + origin, row["lps_mm"], atol=0.06)


# -- the baseline ----------------------------------------------------------------------------------------------------


def test_the_baseline_finds_lungs_trachea_and_vessels_of_a_toy_thorax():
    case = toy_case(int(np.random.default_rng().integers(1, 1000)))
    atlas = classical.build_atlas([toy_case(seed).truth.segments for seed in (2001, 2002)])
    result = classical.segment_classically(case.ct, atlas)
    scores = score_case(case, Prediction(result.segments.array, result.trees.array))
    assert scores["Lungs", "Dice"] > 0.95
    assert scores["Airway", "Dice"] > 0.85 and scores["Airway", "trachea recall"] > 0.85
    assert scores["Segments, mean", "Dice"] > 0.8
    vessels = np.isin(case.truth.trees, [Tree.ARTERY, Tree.VEIN])
    assert (vessels & np.isin(result.trees.array, [Tree.ARTERY, Tree.VEIN])).sum() > 0.6 * vessels.sum()


def test_the_baseline_names_the_remedy_when_there_are_no_lungs():
    with pytest.raises(UnsuitableImage, match="chest CT"):
        atlas = classical.SegmentAtlas(np.ones((2, 2, 2), np.uint8), np.full((2, 2, 2), 11, np.uint8))
        classical.segment_classically(Volume(np.zeros((30, 40, 40), np.float32), SPACING), atlas)


def test_a_line_answers_and_a_plane_does_not():
    hu = np.full((40, 40, 40), -850.0, np.float32)
    line = hu.copy()
    line[:, 19:22, 19:22] = 0
    plane = hu.copy()
    plane[:, :, 19:22] = 0
    middle = (20, 20, 20)
    assert classical.line_response(line, (1, 1, 1), (1.6,))[middle] > 200
    assert classical.line_response(plane, (1, 1, 1), (1.6,))[middle] < 20


def test_closed_form_eigenvalues_equal_lapack():
    rng = np.random.default_rng()
    matrices = rng.normal(0, 10, (500, 3, 3))
    matrices = matrices + matrices.transpose(0, 2, 1)
    parts = [matrices[:, a, b] for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
    middle, smallest = classical._two_smallest_eigenvalues(parts)
    reference = np.linalg.eigvalsh(matrices)
    np.testing.assert_allclose(smallest, reference[:, 0], atol=1e-8)
    np.testing.assert_allclose(middle, reference[:, 1], atol=1e-8)


def test_the_atlas_survives_saving(tmp_path):
    atlas = classical.build_atlas([toy_case().truth.segments])
    atlas.save(tmp_path / "deep" / "atlas.npz")
    again = classical.SegmentAtlas.load(tmp_path / "deep" / "atlas.npz")
    np.testing.assert_array_equal(atlas.right, again.right)
    assert set(np.unique(again.left)) <= set(range(11, 19)) and set(np.unique(again.right)) <= set(range(1, 11))


# -- sets and the split ----------------------------------------------------------------------------------------------


def test_the_split_keeps_test_apart_from_training_and_validation():
    split = cases.manifest()
    ranges = [set(cases.seeds(key)) for key in split["phantom_seeds"] if key != "train"]
    train = cases.seeds("train")
    assert not any(seed in train for group in ranges for seed in group)
    assert len(set().union(*ranges)) == sum(map(len, ranges))
    tune, test = set(split["lobe_maps"]["tune"]), set(split["lobe_maps"]["test"])
    assert len(tune) == len(test) == 13 and not tune & test and max(tune) < min(test)
    assert not set(split["real"]["test"]) & set(split["real"]["vessel_points"])


def test_lobe_maps_are_recoded_and_borders_join_their_lobe(tmp_path):
    raw = np.zeros((4, 5, 6), np.int16)
    for place, value in enumerate((4, 5, 6, 7, 8, 516, 520, 3, 512, 515)):
        raw.flat[place] = value
    sitk.WriteImage(sitk.GetImageFromArray(raw), str(tmp_path / "map.nrrd"))
    lobes = cases.load_lobe_map(tmp_path / "map.nrrd").array
    assert lobes.flat[:10].tolist() == [1, 2, 3, 4, 5, Lobe.RIGHT_UPPER, Lobe.LEFT_LOWER, 0, 0, 0]


def test_absent_data_is_skipped_with_a_reason(tmp_path):
    result = lung_segmentation.evaluate_set(
        TestSet.SHAPES, cases.sources(TestSet.SHAPES, tmp_path), {"nothing": []}, lambda line: None
    )
    assert len(result.skipped) == 13 and "not in the data folder" in result.skipped[0]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_methods() -> SetResult:
    toys = [toy_case(seed) for seed in (1, 2, 3)]
    by_name = {id(toy.ct.array): toy for toy in toys}

    def good(ct: Volume) -> Prediction:
        return perfect(by_name[id(ct.array)])

    def bad(ct: Volume) -> Prediction:
        prediction = good(ct)
        prediction.trees[prediction.trees == Tree.VEIN] = Tree.ARTERY
        return prediction

    def refusing(ct: Volume) -> Prediction:
        raise UnsuitableImage("no")

    sources = [CaseSource(toy.name, lambda toy=toy: toy) for toy in toys]
    methods = {"good": [good], "bad": [bad, good], "refusing": [refusing]}
    return lung_segmentation.evaluate_set(TestSet.SYNTHETIC, sources, methods, lambda line: None)


def test_seeds_are_averaged_and_a_refused_case_scores_zero(three_methods):
    assert three_methods.intervals("good")["Vein", "Dice"].mean == 1
    assert three_methods.intervals("bad")["Vein", "Dice"].mean == 0.5
    refused = three_methods.intervals("refusing")
    assert refused["Segments, mean", "Dice"].mean == 0 and refused["Lungs", "Dice"].cases == 3


def test_the_report_is_written_in_three_forms(tmp_path, three_methods):
    text = write_report(tmp_path, [three_methods], [("bad", "good")], {"quality": "fast"})
    assert text == (tmp_path / "scores.md").read_text(encoding="utf-8")
    assert "| RS1 " in text and "[" in text and "good against bad" in text
    data = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert data["sets"][0]["methods"]["good"]["mean"]["Vein"]["Dice"]["mean"] == 1
    with (tmp_path / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    vein = [r for r in rows if (r["method"], r["structure"], r["measure"]) == ("good", "Vein", "Dice")]
    assert [float(r["value"]) for r in vein] == [1, 1, 1]


def test_real_cases_get_a_table_each(tmp_path, three_methods):
    apart = SetResult("real", three_methods.scores, apart=True)
    text = write_report(tmp_path, [apart], [], {})
    assert text.count("### real toy") == 9 and "3 cases" not in text


def test_the_comparison_pairs_cases_by_name(three_methods):
    result = copy.deepcopy(three_methods)
    del result.scores["bad"]["toy 2"]
    assert "| 2 " in comparison_table(result, "bad", "good")


def test_an_unknown_set_is_refused(capsys):
    with pytest.raises(SystemExit):
        lung_segmentation.main(["--sets", "moon"])
    assert "synthetic" in capsys.readouterr().err


def test_shifted_scans_use_kernels_that_training_never_sees():
    for seed in range(30):
        scan, shifted = cases.held_out_scan(seed, False), cases.held_out_scan(seed, True)
        assert cases.held_out_scan(seed, True) == shifted
        assert 0.4 <= scan.blur <= 0.85 and scan.edge <= 0.71
        assert not 0.4 <= shifted.blur <= 0.85 and not 0.22 <= shifted.nps_peak <= 0.55
        assert scan.coverage == (0.0, 1.0) and min(scan.spacing) >= 0.8 and scan.spacing[2] >= 1.0
