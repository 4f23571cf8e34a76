"""The foundation model's evaluation: distances and intervals against references, probes that cannot cheat."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from LCTfoundLib.anatomy.structures import Lobe
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.export.synthetic import ImageFormat, SyntheticImages, write_synthetic
from LCTfoundLib.networks.backbone import backbone_config, build_backbone
from LCTfoundLib.networks.conditions import LUNG, MEDIASTINUM, BuiltInEncoder, Condition, Scaling
from LCTfoundLib.networks.features import DEEP, PUBLISHED_UP_BLOCKS, FeatureExtractor, SinglePassExtractor
from LCTfoundLib.networks.foundation import FoundationModel, InputRecipe, Slices, save_foundation
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.volume import Volume
from LCTfoundLib.weights.registry import Card
from training.distill_features import load_distilled
from training.evaluate import foundation
from training.evaluate.cases import seeds
from training.evaluate.foundation import LOBES, LUNGS, RANDOM, Method, contrast_probe, pixel_probe, training_groups
from training.evaluate.foundation_features import (
    BackboneFeatures,
    FeatureSettings,
    GrayFeatures,
    OnePassFeatures,
    cached,
    lattice,
    random_model,
)
from training.evaluate.foundation_slices import (
    IGNORE,
    PIXEL_MM,
    SIDE,
    TRAIN_SEED,
    Labels,
    SliceSet,
    _labeled,
    kept,
    placed,
    read_samples,
)
from training.evaluate.kernel_distance import (
    FixedNet,
    Level,
    between_halves,
    kernel_distance,
    squared_discrepancy,
    standardized,
)
from training.evaluate.probes import (
    Difference,
    PixelProbe,
    Weighted,
    auroc,
    cross_validated,
    paired_difference,
    paired_means,
    patient_folds,
    score_classifier,
)
from training.evaluate.statistics import Interval
from training.pretraining_data import FIRST_SEED, is_held_out

pytestmark = pytest.mark.usefixtures("one_thread")

TOY = {
    "block_out_channels": (16, 16, 32, 32, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}


@pytest.fixture(scope="module")
def toy_model() -> FoundationModel:
    torch.manual_seed(3)
    network = build_backbone(backbone_config("student", **TOY)).requires_grad_(False).eval()
    return FoundationModel(
        network, BuiltInEncoder().requires_grad_(False).eval(), InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW)
    )


def names(count: int, slices: int) -> np.ndarray:
    return np.repeat([f"patient {n}" for n in range(count)], slices)


def random_slices(rng: np.random.Generator, patients: np.ndarray, side: int = SIDE) -> np.ndarray:
    return rng.integers(-1000, 300, (len(patients), 3, side, side)).astype(np.int16)


# -- kernel distance -------------------------------------------------------------------------------------------------


def test_the_discrepancy_is_the_double_loop(rng):
    x, y = rng.normal(size=(7, 5)), rng.normal(0.3, 1.2, size=(9, 5))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    within_x = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    within_y = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    across = [kernel(a, b) for a in x for b in y]
    expected = np.mean(within_x) + np.mean(within_y) - 2 * np.mean(across)
    assert squared_discrepancy(x, y) == pytest.approx(expected, rel=1e-10)


def test_the_discrepancy_is_unbiased(rng):
    values = [squared_discrepancy(rng.normal(size=(12, 6)), rng.normal(size=(15, 6))) for _ in range(600)]
    assert abs(np.mean(values)) < 5 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0  # which a biased estimate never is


def test_the_distance_grows_with_the_shift(rng):
    x = rng.normal(size=(200, 8))
    found = [kernel_distance(x, rng.normal(shift, 1, (200, 8)), 60, 30, rng) for shift in (0.0, 0.5, 1.0)]
    assert found[0].mean < found[1].mean < found[2].mean
    assert abs(found[0].mean) < 0.1 * found[1].mean
    assert found[0].subset == 60 and found[0].subsets == 30 and found[0].sd > 0


def test_a_smaller_set_gives_smaller_subsets(rng):
    assert kernel_distance(rng.normal(size=(9, 4)), rng.normal(size=(50, 4)), 40, 5, rng).subset == 9


def test_one_slice_has_no_distance(rng):
    with pytest.raises(ValueError, match="2 of each"):
        squared_discrepancy(rng.normal(size=(1, 4)), rng.normal(size=(5, 4)))


def test_halves_share_no_patient(rng):
    # Slices of a patient are alike and patients differ: with a patient in both halves these would seem close.
    patients = names(8, 10)
    features = np.repeat(rng.normal(0, 3, (8, 6)), 10, axis=0) + rng.normal(0, 0.01, (80, 6))
    by_patient = between_halves(features, patients.tolist(), 30, 40, rng)
    by_slice = between_halves(features, [str(n) for n in range(80)], 30, 40, rng)
    assert by_patient.mean > 5 * abs(by_slice.mean)


def test_an_offset_that_all_slices_share_hides_nothing(rng):
    """Features far from 0 that hardly vary: the kernel alone is blind to a set that differs by a deviation."""
    real, twin, other = (100 + 0.01 * rng.normal(shift, 1, (60, 8)) for shift in (0, 0, 1))
    near, far = (squared_discrepancy(standardized(x, real), standardized(real, real)) for x in (twin, other))
    assert far > 10 * abs(near)
    np.testing.assert_allclose(standardized(real, real).std(axis=0), 1)
    constant = standardized(np.ones((3, 2)), np.ones((5, 2)))
    assert not constant.any()


def test_distances_stand_beside_those_of_real_patients(rng):
    patients = np.array([f"TCGA-{n:02d}-{rng.integers(1e6)}" for n in range(60)])
    real = SliceSet(np.zeros((60, 3, 1, 1), np.int16), patients)
    features = {"real": rng.normal(5, 2, (60, 6)), "alike": rng.normal(5, 2, (40, 6)), "far": rng.normal(9, 2, (40, 6))}
    rows = foundation.kernel_rows(features, real, "lung", Level.ALL, 15, 20, 0)
    found = {(row.name, row.reference): row.distance.mean for row in rows}
    assert len(found) == 6
    for reference in ("held-out", "of pretraining"):
        assert found["far", reference] > 5 * abs(found["alike", reference])
        assert found["far", reference] > 5 * abs(found["real, random half of the patients", "the other half"])


def test_the_fixed_net_sees_nothing_beyond_the_window(shipped_weights, rng):
    net = FixedNet(choose_device("cpu", "fp32"))
    hu = rng.integers(-150, 150, (2, 32, 32))
    hu[0, :8], hu[0, 8:16] = -400, 600
    clipped = hu.clip(-200, 200)
    features = net(hu, MEDIASTINUM)
    assert features.shape == (2, 336) and np.isfinite(features).all()
    assert features[:, net.columns(Level.DEEPEST)].shape == (2, 128) and net.columns(Level.ALL) == slice(0, 336)
    np.testing.assert_array_equal(features, net(clipped, MEDIASTINUM))
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert np.abs(net(hu, LUNG)[0] - net(clipped, LUNG)[0]).max() > 1e-3


# -- intervals -------------------------------------------------------------------------------------------------------


def test_the_bootstrap_agrees_with_the_normal_interval(rng):
    first, second = rng.normal(0.7, 0.1, 400), rng.normal(0.65, 0.1, 400)
    found = paired_means(first, second).interval
    half = 1.96 * (first - second).std(ddof=1) / np.sqrt(400)
    assert found.mean == pytest.approx((first - second).mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)
    assert (found.high + found.low) / 2 == pytest.approx(found.mean, abs=0.1 * half)


def test_all_slices_of_a_patient_are_drawn_together(rng):
    """200 patients of 4 equal slices have the accuracy's interval of 200 cases, not of 800."""
    labels = np.repeat(rng.random(200) < 0.5, 4)
    right = np.repeat(rng.random(200) < 0.8, 4)
    probabilities = np.where(labels == right, 0.9, 0.1)
    scores = score_classifier([probabilities], labels, names(200, 4))
    low, high = np.percentile(scores.accuracy[1:], [2.5, 97.5])
    share = right.mean()
    assert scores.accuracy[0] == pytest.approx(share)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 200), rel=0.1)
    assert (scores.patients, scores.slices) == (200, 800)


def test_weighted_scores_are_those_of_repeated_slices(rng):
    labels = np.arange(30) % 2 == 0
    probabilities = rng.random(30).round(1)  # with ties
    weights = rng.integers(0, 4, (5, 30))
    weights[:, :2] = 1
    table = Weighted(probabilities, labels)
    for row, area, share in zip(weights, table.auroc(weights.astype(float)), table.accuracy(weights), strict=True):
        p, y = np.repeat(probabilities, row), np.repeat(labels, row)
        assert area == pytest.approx(roc_auc_score(y, p))
        assert share == pytest.approx(np.mean((p >= 0.5) == y))


def test_a_draw_of_one_class_has_no_auroc():
    table = Weighted(np.array([0.2, 0.8]), np.array([False, True]))
    assert np.isnan(table.auroc(np.array([[1.0, 0.0]]))[0])
    assert np.isnan(auroc(np.array([0.2, 0.8]), np.array([True, True])))


def test_a_method_against_itself_differs_by_nothing(rng):
    labels = rng.random(60) < 0.5
    scores = [score_classifier([rng.random(60)], labels, names(20, 3)) for _ in range(1)] * 2
    difference = paired_difference(scores[0].auroc, scores[1].auroc, 20)
    assert (difference.interval.mean, difference.interval.low, difference.interval.high) == (0, 0, 0)
    assert not difference.excludes_zero and difference.verdict == "includes 0"


def test_pairs_cancel_what_both_methods_share(rng):
    """Patients differ by far more than methods do: only paired draws see the difference."""
    hard = rng.random(40)
    difference = paired_means(hard + 0.05 + rng.normal(0, 0.01, 40), hard)
    assert difference.excludes_zero and difference.verdict == "excludes 0, better"
    assert paired_means(hard, hard + 0.05 + rng.normal(0, 0.01, 40)).verdict == "excludes 0, worse"


@pytest.mark.parametrize(
    ("low", "high", "cases", "excludes"),
    [
        (0.01, 0.2, 9, True),
        (-0.2, -0.01, 9, True),
        (-0.01, 0.2, 9, False),
        (0.0, 0.2, 9, False),
        (0.1, 0.1, 1, False),
        (0.1, 0.2, 5, False),
    ],
)
def test_the_verdict_follows_from_the_interval(low, high, cases, excludes):
    assert Difference(Interval((low + high) / 2, low, high, cases)).excludes_zero is excludes


# -- a slice's probe -------------------------------------------------------------------------------------------------


def test_folds_share_no_patient_and_predict_each_slice_once(rng):
    patients = rng.permutation(names(23, 3))
    labels = rng.random(len(patients)) < 0.5
    predicted = []
    for train, test in patient_folds(labels, patients, 6, int(rng.integers(1000))):
        assert not set(patients[train]) & set(patients[test])
        predicted += test.tolist()
    assert sorted(predicted) == list(range(len(patients)))


def test_a_planted_signal_is_found_among_many_columns(rng):
    patients = names(40, 2)
    labels = rng.random(80) < 0.5
    features = rng.normal(size=(80, 600)).astype(np.float32)
    features[:, :40] += labels[:, None] * 1.0
    assert auroc(cross_validated(features, labels, patients, 5, 1), labels) > 0.9


def test_noise_stays_near_chance(rng):
    labels = rng.random(120) < 0.5
    found = cross_validated(rng.normal(size=(120, 300)), labels, names(60, 2), 5, 1)
    assert 0.25 < auroc(found, labels) < 0.75


def test_who_the_patient_is_helps_nothing(rng):
    """Slices of a patient share a code and a label: a split by slices would read the label from the code."""
    patients = names(40, 3)
    labels = np.repeat(rng.random(40) < 0.5, 3)
    features = np.repeat(rng.normal(size=(40, 200)), 3, axis=0) + rng.normal(0, 0.05, (120, 200))
    by_slice = cross_validated(features, labels, np.arange(120).astype(str), 5, 1)
    by_patient = cross_validated(features, labels, patients, 5, 1)
    assert auroc(by_slice, labels) > 0.95
    assert auroc(by_patient, labels) < 0.8


def test_the_spanned_axes_lose_nothing(rng):
    from training.evaluate.probes import _logistic, _span

    train, test = rng.normal(2, 3, (20, 90)), rng.normal(2, 3, (8, 90))
    labels = np.arange(20) % 2 == 0
    rows, others = _span(train, test)
    whole, rest = ((part - train.mean(axis=0)) / train.std(axis=0) / np.sqrt(90) for part in (train, test))
    expected = LogisticRegression(C=10.0, max_iter=1000, tol=1e-8).fit(whole, labels).predict_proba(rest)
    assert rows.shape == (20, 20)
    np.testing.assert_allclose(_logistic(rows, labels, 10.0).predict_proba(others), expected, atol=2e-3)


def test_constant_columns_are_left_out(rng):
    features = np.concatenate([rng.normal(size=(40, 3)), np.full((40, 2), 7.0)], axis=1)
    labels = features[:, 0] > 0
    assert np.isfinite(cross_validated(features, labels, names(20, 2), 4, 1)).all()


def test_only_patients_that_pretraining_never_saw_are_scored(rng):
    patients = np.repeat([f"TCGA-{n:02d}-{rng.integers(1e6)}" for n in range(50)], 2)
    kept_out = np.array([is_held_out(name) for name in patients])
    contrast = rng.random(100) < 0.5
    # The features tell the truth for held-out patients and lie for the others.
    signal = np.where(contrast == kept_out, 1.0, -1.0)[:, None] + rng.normal(0, 0.1, (100, 1))
    told = np.concatenate([signal, kept_out[:, None], signal * kept_out[:, None]], axis=1)
    slices = SliceSet(np.zeros((100, 3, 1, 1), np.int16), patients, contrast)
    method = Method("toy", (GrayFeatures(FeatureSettings()),))
    result = contrast_probe([method], slices, lambda member, which: told, 5, 1, draws=50)
    scores = result.scores["held-out"]["toy"]
    assert scores.slices == kept_out.sum() and scores.patients == len(set(patients[kept_out]))
    assert result.scores["all"]["toy"].slices == 100
    answers = cross_validated(told, contrast, patients, 5, 1)
    assert scores.auroc[0] == pytest.approx(roc_auc_score(contrast[kept_out], answers[kept_out]))
    assert result.scores["all"]["toy"].auroc[0] == pytest.approx(roc_auc_score(contrast, answers))


def test_seeds_of_a_method_count_as_one(rng):
    labels = rng.random(40) < 0.5
    runs = [rng.random(40) for _ in range(3)]
    scores = score_classifier(runs, labels, names(20, 2), draws=20)
    areas = [roc_auc_score(labels, run) for run in runs]
    assert scores.auroc[0] == pytest.approx(np.mean(areas))
    assert [area for area, _ in scores.members] == pytest.approx(areas)


# -- a pixel's probe -------------------------------------------------------------------------------------------------


def toy_labels(rng: np.random.Generator, count: int) -> np.ndarray:
    """Five vertical bands with a border, moved at random."""
    labels = np.zeros((count, SIDE, SIDE), np.uint8)
    for plane in labels:
        top, left = rng.integers(20, 60, 2)
        for code in Lobe:
            plane[top : top + 150, left + 30 * (code - 1) : left + 30 * code] = code
    return labels


def planted(slices: SliceSet, stride: int, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Features that hold the label of each place."""
    rows, columns = lattice(stride).T
    here = np.eye(6)[slices.labels[:, rows, columns] % 6]
    return (here + rng.normal(0, noise, here.shape)).astype(np.float16)


def labeled(rng: np.random.Generator, patients: np.ndarray) -> SliceSet:
    return SliceSet(random_slices(rng, patients), patients, labels=toy_labels(rng, len(patients)))


def test_pixel_probes_find_planted_lobes_and_nothing_in_noise(rng):
    train, test = labeled(rng, names(3, 2)), labeled(rng, np.repeat(["a", "b"], 2))
    methods = [Method(name, (replace(GrayFeatures(FeatureSettings()), name=name),)) for name in ("planted", "noise")]

    def vectors(member: GrayFeatures, slices: SliceSet) -> np.ndarray:
        if member.name == "planted":
            return planted(slices, 16, 0.1, rng)
        return rng.normal(size=(len(slices), len(lattice(16)), 6)).astype(np.float16)

    results, pictures = pixel_probe(methods, train, {"toy": test}, vectors, (1, 3), 16)
    assert [(result.test, result.patients) for result in results] == [("toy", 1), ("toy", 3)]
    for result in results:
        assert list(result.scores["planted"]) == ["a", "b"]
        assert min(result.column("planted", LOBES)) > 0.98 and min(result.column("planted", LUNGS)) > 0.98
        assert max(result.column("noise", LOBES)) < 0.4
    assert [picture.method for picture in pictures] == ["planted", "noise"]


def test_a_patient_in_training_and_test_is_refused(rng):
    train, test = labeled(rng, names(2, 1)), labeled(rng, np.array(["patient 1"]))
    with pytest.raises(ValueError, match="both in training and in a test: patient 1"):
        pixel_probe([], train, {"toy": test}, lambda member, slices: None, (1,), 16)


def test_training_groups_are_disjoint():
    patients = [f"p{n}" for n in range(7)]
    assert training_groups(patients, 1) == [["p0"], ["p1"], ["p2"]]
    assert training_groups(patients, 3) == [["p0", "p1", "p2"], ["p3", "p4", "p5"]]
    assert training_groups(patients, 7) == [patients]


def test_phantoms_of_probes_and_of_pretraining_are_others():
    assert TRAIN_SEED >= FIRST_SEED + 10_000
    assert not set(range(TRAIN_SEED, TRAIN_SEED + 100)) & set(seeds("synthetic_test"))


def test_ignored_pixels_and_unlabeled_lobes_do_not_count(rng):
    from training.evaluate.foundation import _dice

    truth = np.array([[0, 1, 1, 2, IGNORE, IGNORE]], np.uint8)
    answer = np.eye(6)[[[0, 1, 2, 2, 5, 0]]]
    lobes = SliceSet(np.zeros((1, 3, 1, 1), np.int16), np.array(["a"]))
    # Lobe 1: 2 * 1 / (2 + 1); lobe 2: 2 * 1 / (1 + 2); the others are in no label.
    assert _dice(answer, truth, lobes)["a"] == pytest.approx({LUNGS: 1.0, LOBES: 2 / 3})
    lungs = replace(lobes, kind=Labels.LUNGS)
    assert _dice(answer, (truth > 0) * truth, lungs)["a"] == pytest.approx({LUNGS: 1.0})


def test_a_class_that_training_lacked_is_never_predicted(rng):
    features, labels = rng.normal(size=(90, 4)), np.repeat([0, 2, 4], 30)
    features[np.arange(90), labels // 2] += 4
    probe = PixelProbe(6).fit(features, labels, np.tile(["a", "b", "c"], 30))
    found = probe.probabilities(features)
    assert found.shape == (90, 6) and not found[:, [1, 3, 5]].any()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert np.mean(found.argmax(axis=1) == labels) > 0.9


# -- features --------------------------------------------------------------------------------------------------------


def toy_features(model: FoundationModel, **settings) -> BackboneFeatures:
    return BackboneFeatures("toy", "toy", model, FeatureSettings(**settings), choose_device("cpu", "fp32"))


def test_a_slices_vector_holds_means_and_deviations_of_each_map(toy_model, rng):
    hu = random_slices(rng, names(1, 1), 256)
    found = toy_features(toy_model, timesteps=(0, 100), side=32).of_slices(hu)
    middle = torch.from_numpy(hu[0, :, 112:144, 112:144]).float()
    expected = []
    for window in (LUNG, MEDIASTINUM):
        image = toy_model.recipe(middle, window)[1:2]
        own = int(np.random.SeedSequence(0, spawn_key=(0,)).generate_state(1, np.uint64)[0])
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(own))
        told = toy_model.encoder.encode([Condition(window)])
        maps = FeatureExtractor(toy_model.network, (DEEP, *PUBLISHED_UP_BLOCKS))(
            image, told, (0, 100), noise=noise
        ).maps
        for block in (DEEP, *PUBLISHED_UP_BLOCKS):
            flat = maps[block][0].flatten(2).numpy()
            expected += [flat.mean(axis=2).ravel(), flat.std(axis=2, ddof=1).ravel()]
    np.testing.assert_allclose(found[0], np.concatenate(expected), rtol=1e-3, atol=1e-4)


def test_one_pass_sees_the_clean_slice_with_the_distilled_copy(toy_model, rng, tmp_path):
    trained = SinglePassExtractor(toy_model.network)
    for parameter in trained.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, tmp_path / "d.safetensors")
    network = load_distilled(tmp_path / "d.safetensors", toy_model).network
    settings, choice = FeatureSettings(side=32), choose_device("cpu", "fp32")
    hu = random_slices(rng, names(2, 1), 256)
    found = OnePassFeatures("toy", "toy", toy_model, settings, choice, network=network).of_slices(hu)
    images = torch.cat([toy_model.recipe(torch.from_numpy(s[:, 112:144, 112:144]).float(), LUNG)[1:2] for s in hu])
    with torch.no_grad():
        maps = trained.clean(images, toy_model.encoder.encode([Condition(LUNG)])).maps[1]
    flat = maps.flatten(3).numpy()
    deep = 2 * toy_model.network.config["block_out_channels"][-1]
    width = flat.shape[2]
    np.testing.assert_allclose(found[:, deep : deep + width], flat.mean(axis=3)[:, 0], rtol=1e-3, atol=1e-4)
    again = OnePassFeatures("toy", "toy", toy_model, replace(settings, seed=9), choice, network=network)
    np.testing.assert_array_equal(again.of_slices(hu), found)  # there is no noise in it
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    with pytest.raises(LCTfoundError, match="no single-pass extractor"):
        load_distilled(tmp_path / "d.safetensors", toy_model)


def test_vectors_do_not_depend_on_the_batch(toy_model, rng):
    hu = random_slices(rng, names(3, 1))
    one, three = (toy_features(toy_model, side=32, timesteps=(50,), batch=n).of_slices(hu) for n in (1, 3))
    np.testing.assert_allclose(one, three, rtol=1e-3, atol=1e-4)


def test_a_pixels_vector_is_the_interpolated_maps(toy_model, rng):
    hu = random_slices(rng, names(1, 1))
    features = toy_features(toy_model, stride=32, pixel_timesteps=(0, 50))
    found = features.of_pixels(hu)
    batch = next(iter(features._batches(hu, LUNG, (0, 50), PUBLISHED_UP_BLOCKS)))
    whole = [F.interpolate(maps.flatten(1, 2), (SIDE, SIDE), mode="bilinear") for maps in batch.maps.values()]
    rows, columns = lattice(32).T
    expected = torch.cat([maps[0][:, rows, columns] for maps in whole]).T.numpy()
    assert found.shape == (1, 64, batch.channels) and found.dtype == np.float16
    np.testing.assert_allclose(found[0].astype(np.float32), expected, atol=0.02, rtol=2e-3)


def test_random_models_are_of_the_same_shape_and_repeatable(toy_model):
    before = {key: tensor.clone() for key, tensor in toy_model.network.state_dict().items()}
    first, again, other = (random_model(toy_model, seed).network.state_dict() for seed in (1, 1, 2))
    assert {k: t.shape for k, t in first.items()} == {k: t.shape for k, t in before.items()}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert any(not torch.equal(first[key], before[key]) for key in first)
    assert all(torch.equal(tensor, before[key]) for key, tensor in toy_model.network.state_dict().items())


def test_the_cache_computes_once_and_again_for_other_slices_or_models(tmp_path, rng):
    calls = []

    def make(hu: np.ndarray) -> np.ndarray:
        calls.append(1)
        return hu.mean(axis=(1, 2))

    first, second = rng.integers(0, 9, (2, 4, 3, 3)).astype(np.int16)
    second[0, 0, 0] = first[0, 0, 0] + 1
    for hu, identity in ((first, "a"), (first, "a"), (second, "a"), (first, "b")):
        np.testing.assert_allclose(cached(tmp_path, "toy", identity, hu, make), hu.mean(axis=(1, 2)))
    assert len(calls) == 3


def test_gray_values_are_a_histogram_in_each_window(rng):
    hu = np.full((1, 3, SIDE, SIDE), -1300, np.int16)
    hu[0, 1, :, : SIDE // 2] = 500
    found = GrayFeatures(FeatureSettings(side=256)).of_slices(hu)[0]
    np.testing.assert_allclose(found[[0, 31, 32, 63]], 0.5)
    assert found.sum() == pytest.approx(2)


# -- slices ----------------------------------------------------------------------------------------------------------


def test_slices_and_labels_are_placed_alike_on_pixels_of_a_fixed_size(rng):
    spacing = (float(rng.uniform(0.6, 0.95)), float(rng.uniform(0.6, 0.95)))
    shape = (int(rng.integers(300, 520)), int(rng.integers(300, 520)))
    y, x = (np.arange(n) - (n - 1) / 2 for n in shape)
    inside = ((y[:, None] * spacing[0] - 20) ** 2 + (x[None] * spacing[1] + 30) ** 2) < 60**2
    labels = placed(inside[None].astype(np.uint8), spacing, nearest=True)[0]
    hu = placed(np.where(inside, 40, -1000)[None], spacing)[0]
    assert labels.shape == hu.shape == (SIDE, SIDE)
    assert labels.sum() * PIXEL_MM**2 == pytest.approx(np.pi * 60**2, rel=0.02)
    assert np.mean((hu > -480) == (labels > 0)) > 0.995
    center = np.argwhere(labels).mean(axis=0) - (SIDE - 1) / 2
    np.testing.assert_allclose(center * PIXEL_MM, [20, -30], atol=2.5)


def test_a_narrow_picture_gets_air_around_it_and_a_wide_one_is_cut():
    narrow, wide = placed(np.full((1, 100, 100), 50), (1.5, 1.5))[0], placed(np.full((1, 300, 300), 50), (1.5, 1.5))[0]
    assert (narrow == 50).sum() == 100 * 100 and narrow[0, 0] == -1024 and narrow[128, 128] == 50
    assert (wide == 50).all()


def test_labeled_slices_lie_in_the_lungs_with_their_neighbors(rng):
    array = np.broadcast_to(np.arange(40, dtype=np.int16)[:, None, None] * 10, (40, 256, 256))
    labels = np.zeros((40, 256, 256), np.uint8)
    labels[10:30, 100:150, 100:150] = 3
    found = _labeled("a", Volume(np.array(array), (1.5, 1.5, 3.0)), labels, Labels.LOBES, 4)
    levels = found.hu[:, 1, 0, 0] // 10
    assert len(set(levels)) == 4 and levels.min() >= 10 and levels.max() < 30
    np.testing.assert_array_equal(found.hu[:, 0, 0, 0], (levels - 1) * 10)
    np.testing.assert_array_equal(found.hu[:, 2, 0, 0], (levels + 1) * 10)
    assert (found.labels == 3).sum() == 4 * 50 * 50


def test_kept_slices_come_back_as_they_were(tmp_path, rng):
    made = [labeled(rng, names(1, 2)), SliceSet(random_slices(rng, names(1, 1)), names(1, 1))]
    path = tmp_path / "kept.npz"
    kept(path, lambda: made)
    for before, after in zip(made, kept(path, pytest.fail), strict=True):
        np.testing.assert_array_equal(before.hu, after.hu)
        assert before.patients.tolist() == after.patients.tolist() and before.kind is after.kind
        assert (before.labels is None) == (after.labels is None)
        assert before.labels is None or (before.labels == after.labels).all()


def written_samples(folder: Path, rng: np.random.Generator, size: int = SIDE, channels: int = 3) -> np.ndarray:
    hu = rng.uniform(-200, 200, (2, channels, size, size)).astype(np.float32)
    told = {"window": {"width": 400.0, "level": 0.0}}
    write_synthetic(SyntheticImages(hu, 400.0, 0.0, provenance=told), folder, (ImageFormat.NPZ,))
    return hu


@pytest.mark.parametrize("channels", [1, 3])
def test_generated_slices_are_read_by_window(tmp_path, rng, channels):
    hu = written_samples(tmp_path / "m", rng, channels=channels)
    found = read_samples(tmp_path)
    assert list(found) == ["mediastinal"]
    np.testing.assert_allclose(found["mediastinal"].middle, hu[:, channels // 2], atol=0.51)


def test_what_is_no_generated_slice_is_refused_with_the_remedy(tmp_path, rng):
    with pytest.raises(LCTfoundError, match="make some with"):
        read_samples(tmp_path)
    written_samples(tmp_path / "small", rng, size=64)
    with pytest.raises(LCTfoundError, match="generate slices of 256 pixels"):
        read_samples(tmp_path)
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(LCTfoundError, match="no generated slice"):
        read_samples(tmp_path)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_measures_what_is_there_and_says_what_is_not(tmp_path, toy_model, rng, monkeypatch):
    """Toy weights, toy patients in place of phantoms, no real data."""
    out, weights = tmp_path / "out", tmp_path / "weights"
    config = backbone_config("student", **TOY)
    for number, name in enumerate(("backbone_toy", "mae_toy")):
        torch.manual_seed(number)
        card = Card(name, "1", "test", "", {}, (1.5, 1.5, 2.5), (), (), "none", 0, "", {}, "test", "test")
        save_foundation(
            build_backbone(config).state_dict(), BuiltInEncoder().state_dict(), config, toy_model.recipe, card, weights
        )
    for seed in (TRAIN_SEED, *seeds("synthetic_test")[:2]):
        path = out / "cache" / f"phantom-{seed}-{8 if seed == TRAIN_SEED else 3}.npz"
        patients = np.array([f"phantom {seed}"] * 2)
        kept(path, lambda patients=patients: [labeled(rng, patients), SliceSet(random_slices(rng, patients), patients)])
    monkeypatch.setattr(foundation, "labeled_real", lambda data, count: ([], ["LIDC-IDRI-0001: not asked for"]))
    foundation.main(
        f"--weights {weights} --models backbone_toy,mae_toy --data {tmp_path / 'none'} --out {out} --phantoms 2 "
        "--labeled 1 --stride 32 --random-seeds 1 --device cpu --precision fp32 --draws 200".split()
    )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    text = (out / "results.md").read_text(encoding="utf-8")
    assert results["missing"][0].startswith("contrast and kernel distance") and "LIDC-IDRI-0001" in text
    assert results["kernel_distance"] == [] and results["contrast"] == {}
    (pixels,) = results["pixels"]
    assert list(pixels["dice"]) == ["backbone_toy", "mae_toy", RANDOM, "gray values"]
    row = next(r for r in results["differences"] if (r["first"], r["second"]) == ("backbone_toy", RANDOM))
    dice = {name: [scores[row["score"]] for scores in pixels["dice"][name].values()] for name in pixels["dice"]}
    assert row["mean"] == pytest.approx(np.mean(dice["backbone_toy"]) - np.mean(dice[RANDOM]))
    assert row["verdict"] == "too few patients to tell" and not row["excludes_zero"]
    assert {path.name for path in out.glob("*.png")} == {"lobes.png", "differences.png"}
