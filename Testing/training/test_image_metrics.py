"""Image metrics: closed forms, scikit-image, slow programs written from the papers, what holds for any image."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from LCTfoundLib.runtime.device import choose_device
from training.evaluate.image_metrics import (
    METRICS,
    RANGE,
    FeatureDistance,
    HURange,
    body_mask,
    fsim,
    mae,
    phase_congruency,
    psnr,
    rmse,
    rmse_unclipped,
    score_slice,
    ssim,
    vif,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def chest(side: int, rng: np.random.Generator) -> np.ndarray:
    """Tissue with lungs, a bone and texture, in air; HU."""
    y, x = (np.indices((side, side)) + 0.5) / side * 2 - 1
    hu = np.full((side, side), -1000.0)
    hu[(x / 0.9) ** 2 + (y / 0.7) ** 2 < 1] = 40
    for center in (-0.4, 0.4):
        hu[((x - center) / 0.3) ** 2 + (y / 0.45) ** 2 < 1] = -850
    hu[x**2 + (y - 0.5) ** 2 < 0.01] = 600
    texture = ndimage.gaussian_filter(rng.normal(size=(side, side)), 1.5)
    return hu + np.where(hu > -999, 30 * texture / texture.std(), 0)


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return chest(64, rng)


@pytest.fixture
def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(0, 60, image.shape)


@pytest.fixture
def mask(image: np.ndarray) -> np.ndarray:
    return body_mask(image, 5.0)


FULL = [(name, m.measure) for name, m in METRICS.items() if m.measure is not None]
BEST = {"psnr": math.inf, "ssim": 1, "vif": 1, "fsim": 1, "rmse": 0, "mae": 0, "rmse_unclipped": 0}


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "measure"), FULL)
def test_nothing_is_better_than_the_reference_itself(name, measure, image, mask):
    assert measure(image, image.copy(), mask) == pytest.approx(BEST[name], abs=1e-9)


@pytest.mark.parametrize(("name", "measure"), FULL)
def test_more_noise_is_worse(name, measure, image, mask, rng):
    noise = rng.normal(size=image.shape)
    scores = [measure(image, image + level * noise, mask) for level in (0, 10, 30, 90, 270)]
    worse = np.diff(scores) < 0 if METRICS[name].higher_is_better else np.diff(scores) > 0
    assert worse.all(), scores


@pytest.mark.parametrize(("name", "measure"), FULL)
def test_blur_is_worse(name, measure, image, mask):
    scores = [measure(image, ndimage.gaussian_filter(image, s) if s else image, mask) for s in (0, 0.7, 1.5, 3)]
    worse = np.diff(scores) < 0 if METRICS[name].higher_is_better else np.diff(scores) > 0
    assert worse.all(), scores


@pytest.mark.parametrize(("name", "measure"), FULL)
def test_what_lies_far_outside_the_body_does_not_count(name, measure, rng):
    image = chest(128, rng)
    noisy = image + rng.normal(0, 40, image.shape)
    inside = np.zeros(image.shape, bool)
    inside[30:60, 30:60] = True
    other = noisy.copy()
    other[110:] += rng.normal(0, 80, other[110:].shape)
    # The spectrum of phase congruency is the whole image's, and so is its estimate of the noise.
    assert measure(image, other, inside) == pytest.approx(
        measure(image, noisy, inside), rel=3e-2 if name == "fsim" else 1e-9
    )
    assert measure(image, other, ~inside) != pytest.approx(measure(image, noisy, ~inside), rel=1e-6)


@pytest.mark.parametrize(("name", "measure"), FULL)
def test_an_image_that_cannot_be_scored_is_refused(name, measure, image, mask):
    hole = image.copy()
    hole[3, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        measure(image, hole, mask)
    with pytest.raises(ValueError, match="not empty"):
        measure(image, image, np.zeros_like(mask))
    with pytest.raises(ValueError, match="both must be"):
        measure(image, image[:-1], mask)


def test_all_scores_come_together(image, noisy, mask):
    scores = score_slice(image, noisy, mask, 1.0)
    assert list(scores) == [name for name, _ in FULL]
    assert scores["rmse"] == rmse(image, noisy, mask) and scores["vif"] == vif(image, noisy, mask)


# -- pixel by pixel --------------------------------------------------------------------------------------------------


def test_an_offset_has_closed_forms(image, mask, rng):
    image = image.clip(-900, 800)
    offset = float(rng.uniform(1, 90))
    assert rmse(image, image + offset, mask) == pytest.approx(offset)
    assert mae(image, image - offset, mask) == pytest.approx(offset)
    assert psnr(image, image + offset, mask) == pytest.approx(20 * math.log10(2000 / offset))


def test_beyond_the_span_only_its_end_counts(image, mask):
    metal, answer = image.copy(), image.copy()
    metal[30:34, 30:34], answer[30:34, 30:34] = 3000, 1500
    assert rmse(metal, answer, mask) == 0 and psnr(metal, answer, mask) == math.inf
    assert rmse_unclipped(metal, answer, mask) == pytest.approx(1500 * math.sqrt(16 / mask.sum()))
    assert RANGE.width == 2000


def test_psnr_is_that_of_scikit_image(image, noisy):
    a, b = RANGE.clipped(image), RANGE.clipped(noisy)
    assert psnr(image, noisy) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2000), rel=1e-12)


def test_ssim_is_that_of_scikit_image(image, noisy, mask):
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2000}
    _, theirs = structural_similarity(RANGE.clipped(image), RANGE.clipped(noisy), full=True, **options)
    assert ssim(image, noisy, mask) == pytest.approx(theirs[mask].mean(), rel=1e-9)


def test_another_span_is_another_psnr(image, noisy):
    soft = HURange(-160, 240)
    expected = 20 * math.log10(400 / np.sqrt(np.mean((noisy.clip(-160, 240) - image.clip(-160, 240)) ** 2)))
    assert psnr(image, noisy, span=soft) == pytest.approx(expected)


# -- visual information ----------------------------------------------------------------------------------------------


def slow_vif(reference: np.ndarray, image: np.ndarray, mask: np.ndarray) -> float:
    """From the paper, window by window."""
    x, y = ((np.clip(v, -1000, 1000) + 1000) * 255 / 2000 for v in (reference, image))
    inside = mask.astype(float)

    def kernel(n: int) -> np.ndarray:
        g = [
            [math.exp(-((i - n // 2) ** 2 + (j - n // 2) ** 2) / (2 * (n / 5) ** 2)) for j in range(n)]
            for i in range(n)
        ]
        return np.array(g) / np.sum(g)

    def means(v: np.ndarray, g: np.ndarray) -> np.ndarray:
        n = len(g)
        rows, columns = v.shape[0] - n + 1, v.shape[1] - n + 1
        return np.array([[(v[i : i + n, j : j + n] * g).sum() for j in range(columns)] for i in range(rows)])

    numerator = denominator = 0.0
    for n in (17, 9, 5, 3):
        g = kernel(n)
        if n < 17:
            x, y, inside = means(x, g)[::2, ::2], means(y, g)[::2, ::2], means(inside, g)[::2, ::2]
        for i in range(x.shape[0] - n + 1):
            for j in range(x.shape[1] - n + 1):
                a, b = x[i : i + n, j : j + n], y[i : i + n, j : j + n]
                ma, mb = (a * g).sum(), (b * g).sum()
                va, vb, vab = ((a - ma) ** 2 * g).sum(), ((b - mb) ** 2 * g).sum(), ((a - ma) * (b - mb) * g).sum()
                gain = vab / va if va > 1e-10 else 0.0
                rest = vb - gain * vab
                if gain < 0:
                    gain, rest = 0.0, vb
                weight = (inside[i : i + n, j : j + n] * g).sum()
                numerator += weight * math.log10(1 + gain**2 * va / (max(rest, 1e-10) + 2.0))
                denominator += weight * math.log10(1 + va / 2.0)
    return numerator / denominator


def test_vif_is_that_of_a_slow_program(rng):
    image = chest(47, rng)
    noisy = image + rng.normal(0, 50, image.shape)
    mask = np.zeros(image.shape, bool)
    mask[5:38, 8:44] = True
    assert vif(image, noisy, mask) == pytest.approx(slow_vif(image, noisy, mask), rel=1e-6)


def test_vif_knows_contrast_and_chance(image, mask, rng):
    gentle = image.clip(-300, 300)
    assert vif(gentle, 1.5 * gentle, mask) > 1
    assert vif(gentle, 0.5 * gentle, mask) < 1
    assert vif(image, rng.permutation(image.ravel()).reshape(image.shape), mask) < 0.1


def test_vif_needs_pixels_and_something_to_see(image, noisy):
    with pytest.raises(ValueError, match="too few"):
        vif(image[:40, :40], noisy[:40, :40])
    assert 0 < vif(image[:41, :41], noisy[:41, :41]) < 1
    with pytest.raises(ValueError, match="flat"):
        vif(np.zeros((64, 64)), noisy)


# -- features --------------------------------------------------------------------------------------------------------


def slow_phase_congruency(image: np.ndarray) -> np.ndarray:
    """From the papers of Kovesi and Zhang, with the Fourier transform as a matrix and filters pixel by pixel."""
    rows, columns = image.shape

    def transform(n: int) -> np.ndarray:
        return np.array([[cmath.exp(-2j * math.pi * a * b / n) for b in range(n)] for a in range(n)])

    forward_rows, forward_columns = transform(rows), transform(columns)

    def inverse(values: np.ndarray) -> np.ndarray:
        return forward_rows.conj() @ values @ forward_columns.conj() / (rows * columns)

    spectrum = forward_rows @ image @ forward_columns
    energies = np.zeros(image.shape)
    amplitudes = np.zeros(image.shape)
    for turn in range(4):
        angle = turn * math.pi / 4
        filters = []
        for scale in range(4):
            center = 1 / (6 * 2**scale)
            filter_ = np.zeros(image.shape)
            for i in range(rows):
                for j in range(columns):
                    v, u = ((k if k < (n + 1) // 2 else k - n) / n for k, n in ((i, rows), (j, columns)))
                    radius = math.hypot(u, v)
                    if radius == 0:
                        continue
                    sine = math.sin(math.atan2(-v, u)) * math.cos(angle) - math.cos(math.atan2(-v, u)) * math.sin(angle)
                    cosine = math.cos(math.atan2(-v, u)) * math.cos(angle) + math.sin(math.atan2(-v, u)) * math.sin(
                        angle
                    )
                    apart = abs(math.atan2(sine, cosine))
                    low_pass = 1 / (1 + (radius / 0.45) ** 30)
                    gabor = math.exp(-(math.log(radius / center) ** 2) / (2 * math.log(0.55) ** 2)) * low_pass
                    filter_[i, j] = gabor * math.exp(-(apart**2) / (2 * (math.pi / 4 / 1.2) ** 2))
            filters.append(filter_)
        answers = [inverse(spectrum * f) for f in filters]
        even, odd = sum(a.real for a in answers), sum(a.imag for a in answers)
        size = np.sqrt(even**2 + odd**2) + 1e-4
        energy = np.zeros(image.shape)
        for a in answers:
            energy += a.real * even / size + a.imag * odd / size - np.abs(a.real * odd / size - a.imag * even / size)
        power = -np.median(np.abs(answers[0]) ** 2) / math.log(0.5) / (filters[0] ** 2).sum()
        kernels = [inverse(f).real * math.sqrt(rows * columns) for f in filters]
        own = sum((k**2).sum() for k in kernels)
        mixed = sum((kernels[s] * kernels[t]).sum() for s in range(4) for t in range(s + 1, 4))
        tau = math.sqrt((2 * power * own + 4 * power * mixed) / 2)
        threshold = (tau * math.sqrt(math.pi / 2) + 2 * math.sqrt((2 - math.pi / 2) * tau**2)) / 1.7
        energies += np.maximum(energy - threshold, 0)
        amplitudes += sum(np.abs(a) for a in answers)
    return energies / amplitudes


def slow_fsim(reference: np.ndarray, image: np.ndarray, mask: np.ndarray) -> float:
    x, y = ((np.clip(v, -1000, 1000) + 1000) * 255 / 2000 for v in (reference, image))
    cx, cy = slow_phase_congruency(x), slow_phase_congruency(y)

    def gradient(v: np.ndarray) -> np.ndarray:
        p = np.pad(v, 1, mode="symmetric")
        down = (3 * (p[2:, :-2] - p[:-2, :-2]) + 10 * (p[2:, 1:-1] - p[:-2, 1:-1]) + 3 * (p[2:, 2:] - p[:-2, 2:])) / 16
        right = (3 * (p[:-2, 2:] - p[:-2, :-2]) + 10 * (p[1:-1, 2:] - p[1:-1, :-2]) + 3 * (p[2:, 2:] - p[2:, :-2])) / 16
        return np.sqrt(down**2 + right**2)

    gx, gy = gradient(x), gradient(y)
    total = weights = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        pc = (2 * cx[i, j] * cy[i, j] + 0.85) / (cx[i, j] ** 2 + cy[i, j] ** 2 + 0.85)
        gm = (2 * gx[i, j] * gy[i, j] + 160) / (gx[i, j] ** 2 + gy[i, j] ** 2 + 160)
        weight = max(cx[i, j], cy[i, j])
        total, weights = total + pc * gm * weight, weights + weight
    return total / weights


def test_fsim_is_that_of_a_slow_program(rng):
    image = chest(30, rng)[:, :27]
    noisy = image + rng.normal(0, 60, image.shape)
    mask = np.zeros(image.shape, bool)
    mask[4:25, 3:22] = True
    assert phase_congruency(RANGE.as_bytes(image)) == pytest.approx(
        slow_phase_congruency(RANGE.as_bytes(image)), abs=1e-8
    )
    assert fsim(image, noisy, mask) == pytest.approx(slow_fsim(image, noisy, mask), rel=1e-6)


def test_phase_congruency_finds_an_edge_whatever_its_contrast(rng):
    column = int(rng.integers(24, 40))
    step = np.zeros((64, 64))
    step[:, column:] = 1
    faint, strong = phase_congruency(100 + 10 * step), phase_congruency(20 + 200 * step)
    inner = strong[32, 8:56]  # the transform sees another edge where the picture's ends meet
    assert abs(int(inner.argmax()) + 8 - column + 0.5) <= 1
    assert faint == pytest.approx(strong, abs=1e-2)
    assert strong.min() >= 0 and strong.max() <= 1 + 1e-9


def test_of_large_images_fsim_sees_the_means(rng):
    """512 pixels are compared as 256, so that both have about the same score."""
    small, noise = chest(256, rng), rng.normal(0, 80, (256, 256))
    twice = [np.kron(v, np.ones((2, 2))) for v in (small, small + noise)]
    assert fsim(*twice) == pytest.approx(fsim(small, small + noise), abs=1e-6)


def test_without_any_feature_there_is_no_fsim():
    with pytest.raises(ValueError, match="feature"):
        fsim(np.zeros((32, 32)), np.zeros((32, 32)))


# -- the body --------------------------------------------------------------------------------------------------------


def test_the_body_has_its_lungs_and_not_the_table(image):
    x = np.full((128, 128), -1000.0)
    x[8:72, 32:96] = image
    x[80:82] = 100  # a thin table
    body = body_mask(x, 3.0)
    inner = np.zeros(x.shape, bool)
    inner[8:72, 32:96] = image > -999
    assert (body & inner).sum() > 0.99 * inner.sum() and (body & ~inner).sum() < 0.02 * inner.sum()


def test_a_small_field_of_view_cuts_neither_body_nor_lung(rng):
    image = chest(128, rng)
    cut = image[36:92, 20:108]  # tissue at all sides
    cut_lung = image[40:88, 26:102]
    cut_lung[:, :6] = -850  # a lung at the rim
    assert body_mask(cut, 2.0).all() and body_mask(cut_lung, 2.0).all()


def test_couch_foam_is_not_the_body(image):
    x = image.copy()
    x[56:] = np.where(x[56:] < -999, -905, x[56:])
    assert np.array_equal(body_mask(x, 2.0), body_mask(image, 2.0))


def test_air_has_no_body():
    assert not body_mask(np.full((40, 40), -1000.0), 1.0).any()


# -- a net of ours ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def feature_distance(shipped_weights) -> FeatureDistance:
    return FeatureDistance(choose_device("cpu", "fp32"))


def test_the_feature_distance_grows_with_noise_and_with_blur(feature_distance, rng):
    image = chest(96, rng)
    mask, noise = body_mask(image, 1.5), rng.normal(size=image.shape)
    noisy = [feature_distance(image, image + level * noise, mask, 1.5) for level in (0, 20, 100, 400)]
    blurred = [feature_distance(image, ndimage.gaussian_filter(image, s), mask, 1.5) for s in (1, 3)]
    assert noisy[0] == 0 and (np.diff(noisy) > 0).all() and 0 < blurred[0] < blurred[1]


def test_the_feature_distance_takes_any_pixel_size(feature_distance, rng):
    """Up to interpolation: of 12 chests 10 differ by 5 % at most, two by 13 and 22 %."""
    image = chest(96, rng)
    noise = ndimage.gaussian_filter(rng.normal(size=image.shape), 3) * 400
    fine = [np.kron(v, np.ones((2, 2))) for v in (image, image + noise)]
    coarse = feature_distance(image, image + noise, None, 1.5)
    assert feature_distance(*fine, None, 0.75) == pytest.approx(coarse, rel=0.35)


def test_two_chests_are_farther_apart_than_a_chest_and_its_noise(feature_distance, rng):
    one, two = chest(96, rng), np.roll(chest(96, rng), 17, axis=1)
    mask = body_mask(one, 1.5)
    assert feature_distance(one, two, mask, 1.5) > 2 * feature_distance(
        one, one + rng.normal(0, 20, one.shape), mask, 1.5
    )
