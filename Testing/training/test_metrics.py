"""Scores against brute force, other libraries and shapes whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import SurfaceDiceMetric
from scipy import stats
from scipy.spatial.distance import cdist
from skimage import measure

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import Lobe
from LCTfoundLib.volume import Volume
from training.evaluate import metrics
from training.evaluate.statistics import bootstrap, compare_paired, mean_over_seeds


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def blob(rng: np.random.Generator, shape: tuple[int, int, int] = (14, 16, 18)) -> np.ndarray:
    """A random ellipsoid away from the array's edge."""
    center = np.array(shape) / 2 + rng.uniform(-1.5, 1.5, 3)
    axes = rng.uniform(2.5, 4.5, 3)
    grid = np.indices(shape).astype(float)
    return sum(((g - c) / a) ** 2 for g, c, a in zip(grid, center, axes, strict=True)) <= 1


def brute_force_surface(mask: np.ndarray) -> np.ndarray:
    points = []
    padded = np.pad(mask, 1)
    for k, j, i in np.argwhere(mask):
        faces = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
        if not all(padded[k + 1 + a, j + 1 + b, i + 1 + c] for a, b, c in faces):
            points.append((k, j, i))
    return np.array(points, dtype=float)


# -- overlap ---------------------------------------------------------------------------------------------------------


def test_dice_is_counted_over_all_voxels(rng):
    truth, prediction = rng.random((5, 6, 7)) < 0.4, rng.random((5, 6, 7)) < 0.4
    common = sum(bool(a and b) for a, b in zip(truth.flat, prediction.flat, strict=True))
    assert metrics.dice(truth, prediction) == pytest.approx(2 * common / (truth.sum() + prediction.sum()))


def test_dice_of_two_empty_masks_is_undefined_and_of_one_empty_mask_is_zero():
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    assert np.isnan(metrics.dice(empty, empty))
    assert metrics.dice(empty, full) == 0


def test_dice_per_label_equals_dice_of_each_mask(rng):
    truth, prediction = (rng.integers(0, 5, (6, 7, 8)).astype(np.uint8) for _ in range(2))
    scores = metrics.dice_per_label(truth, prediction, range(1, 7))
    for label in range(1, 5):
        assert scores[label] == pytest.approx(metrics.dice(truth == label, prediction == label))
    assert np.isnan(scores[5]) and np.isnan(scores[6])


def test_components_touching_at_a_corner_are_one_over_corners_and_two_over_faces():
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert metrics.component_count(mask) == 2
    assert metrics.component_count(mask, connectivity=6) == 3
    assert metrics.largest_component(mask).sum() == 2
    assert metrics.component_count(np.zeros((3, 3, 3), bool)) == 0


# -- surfaces --------------------------------------------------------------------------------------------------------


def test_surface_distances_equal_brute_force(rng):
    spacing = (0.7, 0.9, 2.5)
    truth, prediction = blob(rng), blob(rng)
    distances = metrics.surface_distances(truth, prediction, spacing)
    scale = np.array(spacing[::-1])
    matrix = cdist(brute_force_surface(truth) * scale, brute_force_surface(prediction) * scale)
    np.testing.assert_allclose(np.sort(distances.from_truth), np.sort(matrix.min(axis=1)), atol=1e-6)
    np.testing.assert_allclose(np.sort(distances.from_prediction), np.sort(matrix.min(axis=0)), atol=1e-6)
    both = np.concatenate([matrix.min(axis=0), matrix.min(axis=1)])
    assert distances.mean() == pytest.approx(both.mean())
    assert distances.normalized_dice(1.0) == pytest.approx((both <= 1.0).mean())
    assert distances.hausdorff(95) == pytest.approx(
        max(np.percentile(matrix.min(axis=0), 95), np.percentile(matrix.min(axis=1), 95))
    )


def test_normalized_surface_dice_equals_monai(rng):
    spacing = (0.8, 0.8, 1.5)
    truth, prediction = blob(rng), blob(rng)
    metric = SurfaceDiceMetric(class_thresholds=[1.0], include_background=True)
    reference = metric(
        torch.from_numpy(prediction[None, None].astype(np.float32)),
        torch.from_numpy(truth[None, None].astype(np.float32)),
        spacing=spacing[::-1],
    )
    assert metrics.surface_distances(truth, prediction, spacing).normalized_dice(1.0) == pytest.approx(
        float(reference), abs=1e-6
    )


def test_a_missing_structure_is_infinitely_far_and_scores_zero(rng):
    truth = blob(rng)
    distances = metrics.surface_distances(truth, np.zeros_like(truth), (1, 1, 1))
    assert distances.normalized_dice() == 0
    assert distances.hausdorff() == np.inf
    nothing = metrics.surface_distances(np.zeros_like(truth), np.zeros_like(truth), (1, 1, 1))
    assert np.isnan(nothing.normalized_dice()) and np.isnan(nothing.mean()) and np.isnan(nothing.hausdorff())


def test_fissure_distance_is_the_shift_of_the_plane():
    truth = np.zeros((20, 10, 10), np.uint8)
    truth[:12], truth[12:] = Lobe.LEFT_LOWER, Lobe.LEFT_UPPER
    shifted = np.zeros_like(truth)
    shifted[:14], shifted[14:] = Lobe.LEFT_LOWER, Lobe.LEFT_UPPER
    distance = metrics.fissure_distance(truth, shifted, (1, 1, 1.5))
    assert distance["left oblique"] == pytest.approx(3.0)
    assert np.isnan(distance["right oblique"])


def test_pleural_reach_counts_the_outer_surface_only():
    lobes = np.zeros((12, 12, 42), np.uint8)
    lobes[1:11, 1:11, 1:21], lobes[1:11, 1:11, 21:41] = Lobe.LEFT_UPPER, Lobe.LEFT_LOWER
    vessels = np.zeros(lobes.shape, bool)
    vessels[5, 5, 1:21] = True
    reach = metrics.pleural_reach(lobes, vessels, (1, 1, 1), within_mm=10)
    assert reach[Lobe.LEFT_UPPER] == 1.0
    lower = np.argwhere(metrics.surface_voxels(lobes > 0) & (lobes == Lobe.LEFT_LOWER))
    near = cdist(lower, np.argwhere(vessels)).min(axis=1) <= 10
    assert reach[Lobe.LEFT_LOWER] == pytest.approx(near.mean())
    assert np.isnan(reach[Lobe.RIGHT_UPPER])


# -- trees -----------------------------------------------------------------------------------------------------------


def y_tree() -> np.ndarray:
    """A trunk along k that splits into two branches in the j plane; three voxels thick."""
    mask = np.zeros((60, 60, 15), bool)
    mask[2:30, 29:32, 6:9] = True
    for step in range(26):
        mask[29 + step, 30 + step - 1 : 30 + step + 2, 6:9] = True
        mask[29 + step, 30 - step - 1 : 30 - step + 2, 6:9] = True
    return mask


def test_the_centerline_of_a_y_has_three_branches_of_the_right_length():
    centerline = metrics.centerline_of_mask(y_tree(), (1, 1, 1))
    lengths = np.bincount(centerline.branch, weights=centerline.length)
    assert len(lengths) == 3
    np.testing.assert_allclose(np.sort(lengths), [27, 26 * 2**0.5, 26 * 2**0.5], atol=4)


def test_the_length_of_a_straight_line_uses_the_spacing():
    mask = np.zeros((30, 5, 5), bool)
    mask[5:25, 2, 2] = True
    assert metrics.centerline_of_mask(mask, (1, 1, 2.5)).length.sum() == pytest.approx(19 * 2.5)


def test_a_missing_branch_costs_its_length_and_its_count():
    truth = y_tree()
    prediction = truth.copy()
    prediction[33:, 30:, :] = False
    centerline = metrics.centerline_of_mask(truth, (1, 1, 1))
    score = metrics.tree_score(centerline, truth, prediction)
    expected = 1 - centerline.length[centerline.look_up(~prediction)].sum() / centerline.length.sum()
    assert score.length_detected == pytest.approx(expected)
    assert score.branches_detected == pytest.approx(2 / 3)
    assert score.precision == 1.0
    assert 0.5 < score.length_detected < 0.85


def test_a_branch_counts_from_four_fifths_of_its_length():
    index = np.array([[k, 0, 0] for k in range(10)])
    line = metrics.Centerline(index, np.zeros(10, int), np.ones(10), np.zeros(10, int))
    truth = np.ones((10, 1, 1), bool)
    for found, detected in ((8, 1.0), (7, 0.0)):
        prediction = np.zeros_like(truth)
        prediction[:found] = True
        assert metrics.tree_score(line, truth, prediction).branches_detected == detected


def test_only_the_largest_component_counts_for_the_airway():
    truth = y_tree()
    prediction = truth.copy()
    prediction[20:23] = False
    centerline = metrics.centerline_of_mask(truth, (1, 1, 1))
    whole = metrics.tree_score(centerline, truth, prediction)
    largest = metrics.tree_score(centerline, truth, prediction, largest_only=True)
    assert largest.length_detected < whole.length_detected - 0.15


def test_false_voxels_cost_precision_only():
    truth = y_tree()
    prediction = truth.copy()
    prediction[:, :10, :] = True
    score = metrics.tree_score(metrics.centerline_of_mask(truth, (1, 1, 1)), truth, prediction)
    assert score.length_detected == 1.0
    assert score.precision == pytest.approx(truth.sum() / prediction.sum())


def test_centerline_dice_sees_a_gap_that_dice_hardly_sees():
    truth = y_tree()
    thick = np.zeros_like(truth)
    thick[2:30, 25:36, 2:13] = True
    truth |= thick
    broken = truth.copy()
    broken[35:] = False
    assert metrics.centerline_dice(truth, truth) == 1.0
    assert metrics.centerline_dice(truth, broken) < metrics.dice(truth, broken) - 0.05
    assert metrics.centerline_dice(truth, np.zeros_like(truth)) == 0.0


def small_graph(radii: tuple[float, ...] = (5, 5, 4, 4, 3, 3)) -> TreeGraph:
    """Trunk of two pieces, then two branches: nodes 3 (one piece) and 4-5 (two pieces)."""
    points = np.array([[0, 0, 0], [0, 0, 10], [0, 0, 20], [10, 0, 20], [0, 10, 20], [0, 20, 20]], float)
    parent = np.array([-1, 0, 1, 2, 2, 4])
    segment = np.array([0, 0, 0, 1, 2, 2])
    return TreeGraph(points, np.array(radii, float), parent, segment, np.array([0, 0, 0, 1, 1, 1]))


def test_graph_branches_run_between_bifurcations():
    assert metrics.branches_of_graph(small_graph()).tolist() == [0, 0, 0, 1, 2, 2]


def test_the_graph_centerline_keeps_lengths_and_places():
    grid = Volume(np.zeros((30, 30, 30), np.uint8), (1.0, 1.0, 1.0), (-2.0, -2.0, -2.0))
    line = metrics.centerline_of_graph(small_graph(), grid)
    np.testing.assert_allclose(np.bincount(line.branch, weights=line.length), [20, 10, 20])
    assert line.index[line.branch == 1].tolist()[5][:2] == [22, 2]
    half = np.zeros(grid.shape, bool)
    half[:13] = True
    assert line.within(half).length.sum() == pytest.approx(10.5, abs=0.6)


def test_graph_points_outside_the_grid_are_left_out():
    grid = Volume(np.zeros((5, 5, 5), np.uint8))
    assert metrics.centerline_of_graph(small_graph(), grid).index.max() <= 4


def test_a_branch_that_crosses_into_a_foreign_segment_is_one_intrusion():
    grid = Volume(np.zeros((30, 30, 30), np.uint8))
    line = metrics.centerline_of_graph(small_graph(), grid)
    segments = np.full(grid.shape, 1, np.uint8)
    segments[:, 5:] = 2  # branch 2 supplies segment 2 and lies there from y = 5: 4.5 mm of it are in segment 1
    assert metrics.intrusions(line, segments) == 1
    segments[:, 2:] = 2  # now 1.5 mm: less than a border's voxel steps
    assert metrics.intrusions(line, segments) == 0
    segments[:] = 2  # branch 1 supplies segment 1 and lies wholly in 2
    assert metrics.intrusions(line, segments) == 1
    assert metrics.intrusions(line, segments, truth=segments) == 0  # the truth has the branch there as well
    assert metrics.intrusions(line, segments, truth=np.full_like(segments, 1)) == 1
    segments[:] = 0
    assert metrics.intrusions(line, segments) == 0


def test_a_branch_wider_than_its_parent_is_a_leak():
    assert metrics.airway_leaks(small_graph()) == []
    assert metrics.airway_leaks(small_graph((5, 5, 5, 5.9, 3, 3))) == []
    assert metrics.airway_leaks(small_graph((5, 5, 5, 6.1, 3, 3))) == [1]
    assert metrics.airway_leaks(small_graph((5, 5, 5, 6.1, 9, 9))) == [1, 2]


# -- meshes ----------------------------------------------------------------------------------------------------------


def sphere_mesh(radius: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    grid = np.indices((24, 24, 24)) - 11.5
    field = radius - np.sqrt((grid**2).sum(axis=0))
    points, triangles, _, _ = measure.marching_cubes(field, 0.0)
    return points.astype(float), triangles


def test_a_sphere_is_closed_and_has_its_volume():
    check = metrics.check_mesh(*sphere_mesh())
    assert check.watertight and check.non_manifold_edges == 0 and check.inconsistent_edges == 0 and check.shells == 1
    assert abs(check.volume_mm3) == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.01)


def test_a_missing_triangle_opens_three_edges():
    points, triangles = sphere_mesh()
    check = metrics.check_mesh(points, triangles[1:])
    assert check.boundary_edges == 3 and not check.watertight


def test_a_flipped_triangle_and_a_second_shell_are_seen():
    points, triangles = sphere_mesh()
    flipped = triangles.copy()
    flipped[0] = flipped[0, ::-1]
    assert metrics.check_mesh(points, flipped).inconsistent_edges == 3
    two = np.concatenate([triangles, triangles + len(points)])
    assert metrics.check_mesh(np.concatenate([points, points + 50]), two).shells == 2


# -- statistics ------------------------------------------------------------------------------------------------------


def test_the_bootstrap_interval_equals_scipys(rng):
    values = rng.normal(0.8, 0.1, 30)
    interval = bootstrap(values.tolist(), resamples=4000)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(reference.confidence_interval.low, abs=0.006)
    assert interval.high == pytest.approx(reference.confidence_interval.high, abs=0.006)


def test_undefined_cases_are_left_out_and_counted():
    interval = bootstrap([0.5, float("nan"), 0.7])
    assert interval.cases == 2 and interval.mean == pytest.approx(0.6)
    assert str(bootstrap([float("nan")])) == "-"


def test_wilcoxon_sees_a_steady_gain_and_no_gain(rng):
    first = rng.normal(0.8, 0.05, 20)
    gain = compare_paired(first.tolist(), (first + rng.uniform(0.01, 0.03, 20)).tolist())
    assert gain.p_value < 0.001 and gain.difference.low > 0
    same = compare_paired(first.tolist(), first.tolist())
    assert np.isnan(same.p_value) and same.difference.mean == 0


def test_seeds_are_averaged_per_case():
    nan = float("nan")
    np.testing.assert_allclose(mean_over_seeds([[1, 2, nan], [3, nan, nan]]), [2, 2, nan])
