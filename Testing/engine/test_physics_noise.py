"""Noise of measurements and images, and Hounsfield units: against closed forms and against direct simulation.

Margins of random comparisons are set at 5 standard errors or more (one false alarm in a million, each).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM, attenuation_of, hu_of
from LCTfoundLib.physics.noise import (
    SHARP,
    SOFT,
    Dose,
    Kernel,
    add_image_noise,
    bow_tie,
    check_line_integrals,
    colored_noise,
    count_photons,
    expected_noise_hu,
    insert_noise,
    line_integrals,
    measure,
    noise_transfer,
    statistical_weights,
    tube_current,
)
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import RampFilter, filtered_back_projection

pytestmark = pytest.mark.usefixtures("one_thread")

#: Two samples of the same distribution differ by this p-value or less once in a hundred million runs.
RARE = 1e-8


@pytest.fixture
def generator(rng) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """p-value that two samples are of the same distribution (Kolmogorov and Smirnov)."""
    return float(stats.ks_2samp(first.flatten().numpy(), second.flatten().numpy(), method="asymp").pvalue)


class TestHounsfield:
    def test_definition(self):
        assert attenuation_of(0.0) == pytest.approx(WATER_PER_MM) and attenuation_of(-1000.0) == 0.0
        assert hu_of(2 * 0.02, water_per_mm=0.02) == pytest.approx(1000.0)

    def test_there_and_back_for_tensors_and_arrays(self, rng):
        hu = rng.uniform(-1024, 3000, (3, 4)).astype(np.float32)
        np.testing.assert_allclose(hu_of(attenuation_of(hu)), hu, atol=1e-3)
        tensor = torch.from_numpy(hu)
        torch.testing.assert_close(hu_of(attenuation_of(tensor)), tensor, atol=1e-3, rtol=0)
        np.testing.assert_allclose(attenuation_of(tensor).numpy(), attenuation_of(hu), rtol=1e-6)
        whole = np.array([-1000, 0, 40], np.int16)
        np.testing.assert_allclose(attenuation_of(whole), [0, WATER_PER_MM, 1.04 * WATER_PER_MM])


class TestCounts:
    @pytest.mark.parametrize("line", [0.0, 2.0, 5.8])
    def test_mean_and_variance(self, generator, rng, line):
        dose = Dose(photons=float(rng.uniform(2e4, 2e5)), fraction=float(rng.uniform(0.05, 1)), electronic_noise=10)
        counts = count_photons(torch.full((4, 250, 200), line), dose, generator).double()
        expected = dose.photons * dose.fraction * math.exp(-line)
        variance = expected + 10**2
        assert counts.mean().item() == pytest.approx(expected, abs=5 * math.sqrt(variance / counts.numel()) + 1e-6)
        assert counts.var().item() == pytest.approx(variance, rel=5 * math.sqrt(3 / counts.numel()) + 1e-3)

    def test_logarithm_has_the_variance_of_the_weights(self, generator):
        dose, line = Dose(fraction=0.2), torch.full((4, 250, 200), 3.0)
        measured = measure(line, dose, generator).double()
        variance = 1 / statistical_weights(line, dose)[0, 0, 0].item()
        counts = 2e4 * math.exp(-3)
        assert variance == pytest.approx((counts + 100) / counts**2, rel=1e-5)
        # The logarithm is curved: its mean is off by half of the variance, its variance by about 2 shares of it.
        assert measured.mean().item() == pytest.approx(3 + variance / 2, abs=5 * math.sqrt(variance / 2e5) + 1e-5)
        assert measured.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / 2e5) + 3 * variance)

    def test_same_generator_same_noise(self):
        line, dose = torch.rand(2, 5, 30), Dose(fraction=0.1)
        first, second, third = (measure(line, dose, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, second) and not torch.equal(first, third)

    def test_bow_tie_and_current_shape_the_photons(self, generator, rng):
        beam = FanBeam.siemens(views=3)
        profile = bow_tie(beam)
        middle = np.argmax(profile)
        assert abs(middle - (beam.detectors - 1) / 2) <= 1 and profile[middle] == pytest.approx(1, abs=1e-4)
        assert all(np.diff(profile[: middle + 1]) >= 0) and 0 < profile[0] < 0.2
        assert bow_tie(beam, strength=0.0) == (1.0,) * beam.detectors
        # The ideal filter makes a cylinder of water look alike everywhere.
        _, distances = beam.rays(slice(0, 1))
        paths = 2 * np.sqrt(np.maximum(160**2 - distances[0] ** 2, 0))
        np.testing.assert_allclose(
            bow_tie(beam, strength=1.0) * np.exp(-WATER_PER_MM * paths), np.exp(-WATER_PER_MM * 320), rtol=1e-5
        )
        current = torch.from_numpy(rng.uniform(0.5, 2, (2, 3)).astype(np.float32))
        dose = Dose(photons=1e6, fraction=0.5, electronic_noise=0, bow_tie=profile)
        air = dose.unattenuated(torch.zeros(2, *beam.shape), current)
        torch.testing.assert_close(air, 5e5 * current[..., None] * torch.tensor(profile))
        counts = count_photons(torch.zeros(2, *beam.shape), dose, generator, current)
        assert ((counts - air).abs() < 7 * air.sqrt()).all()

    def test_current_follows_the_width_at_the_same_dose(self):
        line = torch.zeros(2, 3, 8)
        line[:, :, 4] = torch.tensor([2.0, 4.0, 6.0])
        current = tube_current(line)
        torch.testing.assert_close(current.mean(-1), torch.ones(2))
        torch.testing.assert_close(current[:, 1:] / current[:, :-1], torch.full((2, 2), math.e))
        torch.testing.assert_close(tube_current(line, strength=0.0), torch.ones(2, 3))

    def test_current_of_gies_gives_the_least_variance_in_the_middle(self):
        line = torch.tensor([[[2.0], [6.0]]])
        best = tube_current(line)

        def variance(factor: torch.Tensor) -> float:
            return float((torch.exp(line[..., 0]) / factor).sum())

        for share in (0.8, 1.25):
            other = best * torch.tensor([share, 1.0])
            assert variance(best) < variance(other / other.mean())

    def test_noise_free_counts_come_back_exactly(self, rng):
        line = torch.from_numpy(rng.uniform(0, 6, (2, 9, 40)).astype(np.float32))
        air = Dose(bow_tie=tuple(rng.uniform(0.2, 1, 40))).unattenuated(line)
        torch.testing.assert_close(line_integrals(air * torch.exp(-line), air, 10.0), line, atol=1e-5, rtol=1e-5)


class TestStarvation:
    def test_no_ray_is_lost_and_the_bias_is_smaller_than_with_a_floor(self, generator):
        expected = 16.0
        dose = Dose(photons=1e5, electronic_noise=10)
        line = torch.full((1, 400, 500), math.log(1e5 / expected))
        counts = count_photons(line, dose, generator)
        assert (counts <= 0).double().mean() > 0.04
        error = line_integrals(counts, 1e5, 10.0) - line
        floored = -torch.log(counts.clamp(min=1) / 1e5) - line
        assert error.isfinite().all()
        assert abs(error.mean().item()) < 0.15 < 0.25 < floored.mean().item()
        assert error.std().item() < 0.45 < 0.9 < floored.std().item()

    def test_only_starved_rays_change(self, rng):
        counts = torch.from_numpy(rng.uniform(50, 1000, (1, 3, 30)).astype(np.float32))
        counts[0, 1, 10], counts[0, 2, 20:] = -20.0, 0.0
        found = line_integrals(counts, 1e4, 10.0)
        plain = -torch.log(counts / 1e4)
        fine = counts >= 10
        torch.testing.assert_close(found[fine], plain[fine])
        mean = (counts[0, 1, 9:12].sum() / 3).item()
        assert found[0, 1, 10].item() == pytest.approx(-math.log(mean / 1e4), rel=1e-5)
        # Where no neighbor has photons, one photon is the densest that can be told.
        assert found[0, 2, -1].item() == pytest.approx(math.log(1e4), rel=1e-5)

    def test_neighbors_are_compared_behind_the_same_filter(self):
        air = torch.tensor([1e5, 1e5, 1e4, 1e4, 1e4]).view(1, 1, 5)
        counts = air * math.exp(-2.0)
        counts[..., 2] = 0.0
        found = line_integrals(counts, air, 10.0)[0, 0, 2].item()
        assert found == pytest.approx(2.0 - math.log(2 / 3), rel=1e-5)


class TestInsertion:
    @pytest.mark.parametrize(("line", "high", "low"), [(1.0, 1.0, 0.05), (3.5, 1.0, 0.25), (5.0, 0.5, 0.1)])
    def test_same_statistics_as_direct_simulation(self, generator, line, high, low):
        lines = torch.full((1, 100, 200), line)
        full = measure(lines, Dose().at(high), generator)
        inserted = insert_noise(full, Dose().at(high), low, generator)
        direct = measure(lines, Dose().at(low), generator)
        assert distance(inserted, direct) > RARE
        assert inserted.var().item() == pytest.approx(direct.var().item(), rel=0.12)
        # The test would notice: a quarter more noise is another distribution.
        worse = measure(lines, Dose().at(low * 0.6), generator)
        assert distance(worse, direct) < RARE

    def test_noise_of_the_high_dose_stays_in_it(self, generator):
        lines = torch.full((1, 100, 200), 2.0)
        full = measure(lines, Dose(), generator)
        inserted = insert_noise(full, Dose(), 0.25, generator)
        # Of the low dose's variance a quarter, less the electronics', was there before.
        expected = math.sqrt(full.var().item() / inserted.var().item())
        found = np.corrcoef(full.flatten().numpy(), inserted.flatten().numpy())[0, 1]
        assert found == pytest.approx(expected, abs=5 / math.sqrt(full.numel()))

    def test_with_bow_tie_and_current(self, generator, rng):
        dose = Dose(bow_tie=tuple(rng.uniform(0.2, 1, 100)))
        current = torch.from_numpy(rng.uniform(0.3, 2, 200).astype(np.float32))
        lines = torch.full((1, 200, 100), 3.0)
        inserted = insert_noise(measure(lines, dose, generator, current), dose, 0.1, generator, current)
        wanted = statistical_weights(lines, dose.at(0.1), current).sqrt()
        # The few rays with about a hundred photons are a little skewed.
        normal = (inserted - lines) * wanted
        assert normal.var().item() == pytest.approx(1.0, rel=0.12)

    def test_same_dose_changes_nothing_and_a_higher_one_is_refused(self, generator):
        lines = torch.rand(1, 4, 8)
        assert torch.equal(insert_noise(lines, Dose().at(0.5), 0.5, generator), lines)
        with pytest.raises(ValueError, match="not taken away"):
            insert_noise(lines, Dose().at(0.5), 0.6, generator)


class TestRefusals:
    @pytest.mark.parametrize(
        ("counts", "words"),
        [
            (math.nan, "no numbers.*leave their views out"),
            (-500.0, "below what electronic noise.*dark signal"),
            (2e5, "exceed those of air.*air scan"),
        ],
    )
    def test_counts(self, counts, words):
        measured = torch.full((1, 3, 10), 1e4)
        measured[0, 1, 4] = counts
        with pytest.raises(UnsuitableProjections, match=words):
            line_integrals(measured, 1e5, 10.0)

    def test_saturated_counts(self):
        counts = torch.full((1, 4, 25), 1000.0)
        counts[0, 0, :3] = 4095.0
        with pytest.raises(UnsuitableProjections, match=r"3\.00% of the counts reach the detector's ceiling of 4095"):
            line_integrals(counts, 5000.0, 10.0, saturation=4095)
        assert line_integrals(counts, 5000.0, 10.0, saturation=5000).isfinite().all()

    def test_air_without_photons(self):
        with pytest.raises(UnsuitableProjections, match="without photons"):
            line_integrals(torch.ones(1, 2, 3), torch.tensor([1.0, 0.0, 1.0]))

    @pytest.mark.parametrize(("value", "words"), [(math.inf, "no numbers"), (1e4, "log"), (-40.0, "log")])
    def test_what_is_no_line_integral(self, value, words):
        lines = torch.zeros(1, 2, 3)
        lines[0, 0, 0] = value
        for refusing in (check_line_integrals, lambda x: measure(x, Dose()), lambda x: insert_noise(x, Dose(), 0.5)):
            with pytest.raises(UnsuitableProjections, match=words):
                refusing(lines)

    def test_filter_and_current_of_another_scan(self):
        with pytest.raises(UnsuitableProjections, match="bow-tie filter is given for 4 channels"):
            measure(torch.zeros(1, 2, 3), Dose(bow_tie=(1.0,) * 4))
        for current in (torch.ones(4), torch.tensor([1.0, 0.0])):
            with pytest.raises(UnsuitableProjections, match="tube current"):
                measure(torch.zeros(1, 2, 3), Dose(), current=current)

    @pytest.mark.parametrize(
        "wrong", [{"fraction": 0}, {"photons": math.inf}, {"electronic_noise": -1}, {"bow_tie": (1.0, 0.0)}]
    )
    def test_no_such_dose(self, wrong):
        with pytest.raises(ValueError):
            Dose(**wrong)


KERNELS = [SOFT, SHARP, Kernel(RampFilter.SHEPP_LOGAN)]


class TestImageNoise:
    @pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.ramp.value)
    def test_closed_form_and_texture_are_those_of_a_reconstruction(self, generator, kernel):
        size, pixel, pitch, views, line = 96, 0.5, 0.7, 90, 3.0
        projector = Projector(ImageGrid(size, size, pixel), ParallelBeam((0.0,), 180, pitch).sparse(views))
        dose = Dose(fraction=0.3, kernel=kernel)
        lines = torch.full((24, views, 180), line)
        noise = measure(lines, dose, generator) - lines
        images = filtered_back_projection(projector, noise, kernel.ramp, kernel.cutoff)
        inner = hu_of(images[:, 32:64, 32:64]) + 1000
        expected = expected_noise_hu(dose, line / WATER_PER_MM, views, pitch)
        assert inner.std().item() == pytest.approx(expected, rel=0.1)
        stand_in = expected * colored_noise((100, 32, 32), pixel, kernel, generator, pitch)
        # Up to where the pixels begin to fold frequencies over.
        found, wanted = (_bands(sample - sample.mean((-2, -1), keepdim=True), pixel) for sample in (inner, stand_in))
        np.testing.assert_allclose(found, wanted, rtol=0.35)

    @pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.ramp.value)
    def test_power_spectrum_is_the_transfer_squared(self, generator, kernel):
        noise = colored_noise((60, 64, 64), 0.6, kernel, generator, pitch_mm=0.8)
        assert noise.var().item() == pytest.approx(1.0, rel=0.045) and abs(noise.mean().item()) < 0.02
        frequency = torch.linspace(0, 0.6, 7)
        expected = noise_transfer(frequency, kernel, 0.8)
        assert expected[0] == 0 and expected.argmax() not in (0, 6)
        # Neighbors correlate as the transform of the power spectrum says.
        axis = torch.fft.fftfreq(512, 0.6)
        power = noise_transfer(torch.hypot(axis[:, None], axis), kernel, 0.8).square()
        correlation = torch.fft.ifft2(power).real
        for lag in (1, 2, 4):
            found = (noise[..., lag:] * noise[..., :-lag]).mean().item()
            assert found == pytest.approx((correlation[0, lag] / correlation[0, 0]).item(), abs=0.04)

    def test_soft_kernels_give_coarser_noise(self, generator):
        def neighbors(kernel: Kernel) -> float:
            noise = colored_noise((20, 64, 64), 0.7, kernel, generator)
            return (noise[..., 1:] * noise[..., :-1]).mean().item()

        assert neighbors(SOFT) > neighbors(SHARP) + 0.2

    def test_local_strength(self, generator):
        sigma = torch.ones(200, 100)
        sigma[:, 50:] = 5.0
        noisy = add_image_noise(torch.full((8, 200, 100), -850.0), 12 * sigma, 0.7, SHARP, generator)
        assert noisy[..., :50].std().item() == pytest.approx(12, rel=0.06)
        assert noisy[..., 50:].std().item() == pytest.approx(60, rel=0.06)
        assert noisy.mean().item() == pytest.approx(-850, abs=1)

    def test_closed_form_falls_with_the_dose_as_photons_do(self):
        quantum = Dose(electronic_noise=0)
        ratio = expected_noise_hu(quantum.at(0.05), 200, 720, 0.7) / expected_noise_hu(quantum, 200, 720, 0.7)
        assert ratio == pytest.approx(math.sqrt(20), rel=1e-6)
        assert expected_noise_hu(Dose(), 200, 720, 0.7) > expected_noise_hu(quantum, 200, 720, 0.7)


def _bands(images: torch.Tensor, pixel: float) -> np.ndarray:
    """Noise power in rings of 0.2 per mm, (3,)."""
    power = torch.fft.fft2(images).abs().square().mean(0) / images[0].numel()
    axis = torch.fft.fftfreq(images.shape[-1], pixel)
    ring = (torch.hypot(axis[:, None], axis) / 0.2).long().flatten()
    sums, number = torch.bincount(ring, power.flatten()), torch.bincount(ring)
    return (sums / number)[:3].numpy()
