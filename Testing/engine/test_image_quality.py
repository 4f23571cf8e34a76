"""Noise spectra, noise and dose of an image, edges and lesions: against closed forms and known input.

Margins of random comparisons are set at 5 standard errors or more (one false alarm in a million, each).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage

from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.physics.image_quality import (
    STANDARD_LESIONS,
    Lesion,
    LesionKind,
    LesionShape,
    NoiseCurve,
    Tissue,
    contrast_recovery,
    edge_width,
    estimate_dose,
    estimate_noise,
    insert_lesion,
    lesion_coverage,
    lesion_places,
    noise_power_spectrum,
)
from LCTfoundLib.physics.noise import SHARP, SOFT, add_image_noise, colored_noise, noise_transfer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def generator(rng) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


def disk(size: int, pixel: float, radius: float, center: tuple[float, float], inside: float, blur: float) -> np.ndarray:
    """A disk under a Gaussian blur (mm), from a grid four times as fine."""
    axis = (np.arange(4 * size) + 0.5) / 4 - 0.5
    rows, columns = (axis[:, None] - center[0]) * pixel, (axis[None] - center[1]) * pixel
    fine = np.where(np.hypot(rows, columns) < radius, inside, 0.0)
    return ndimage.gaussian_filter(fine, 4 * blur / pixel).reshape(size, 4, size, 4).mean((1, 3))


@cache
def chest(slices: int = 2, size: int = 256, pixel: float = 1.2) -> torch.Tensor:
    """Slices of ellipses, HU: air, soft tissue, lungs with vessels, a spine; as far from uniform as a chest is."""
    rows, columns = np.indices((size, size))
    y, x = (rows - size / 2) * pixel, (columns - size / 2) * pixel
    hu = np.full((size, size), -1000.0)
    hu[(x / 145) ** 2 + (y / 105) ** 2 < 1] = -90.0
    hu[(x / 132) ** 2 + (y / 92) ** 2 < 1] = 45.0
    for side in (-1, 1):
        lung = ((x - side * 72) / 45) ** 2 + ((y + 8) / 65) ** 2 < 1
        hu[lung] = -860.0
        for angle in np.linspace(0, 2 * np.pi, 17):
            vessel = np.hypot(x - side * 72 - 25 * np.cos(angle), y + 8 - 40 * np.sin(3 * angle)) < 2
            hu[vessel & lung] = 30.0
    hu[np.hypot(x, y - 65) < 14] = 350.0
    image = ndimage.gaussian_filter(hu, 0.6 / pixel)
    return torch.from_numpy(np.repeat(image[None], slices, 0).astype(np.float32))


class TestNoisePowerSpectrum:
    @pytest.mark.parametrize(("size", "order"), [(32, 2), (21, 1), (16, 0)])
    def test_integral_is_the_variance(self, generator, size, order):
        noise = 17 * colored_noise((4, 70, 90), 0.7, SHARP, generator) + 40
        spectrum = noise_power_spectrum(noise, 0.7, size, order=order)
        assert spectrum.integral == pytest.approx(spectrum.variance, rel=1e-9)
        assert spectrum.power.shape == (size, size) and spectrum.regions > 4
        assert spectrum.step == pytest.approx(1 / (size * 0.7))

    def test_white_noise_is_flat_at_variance_times_pixel_area(self, generator):
        sigma, pixel = 10.0, 0.8
        noise = sigma * torch.randn((40, 64, 64), generator=generator)
        spectrum = noise_power_spectrum(noise, pixel, 32, order=0)
        expected = sigma**2 * pixel**2
        # Regions overlap by half: 40 x 4 independent ones at least, of which rings hold several frequencies.
        np.testing.assert_allclose(spectrum.radial_power[2:], expected, rtol=0.2)
        assert spectrum.variance == pytest.approx(sigma**2, rel=0.03)
        assert spectrum.radial_power[0] < 0.3 * expected  # the mean was taken out

    def test_colored_noise_has_the_spectrum_it_was_made_with(self, generator):
        pixel, pitch = 0.6, 0.8
        noise = 12 * colored_noise((120, 64, 64), pixel, SOFT, generator, pitch)
        spectrum = noise_power_spectrum(noise, pixel, 32)
        # Regions of 19 mm smear the spectrum, so that of the same size is compared, with its own integral.
        axis = torch.from_numpy(spectrum.frequency)
        frequency = torch.hypot(axis[:, None], axis[None])
        expected = noise_transfer(frequency, SOFT, pitch).square().numpy()
        expected *= 12**2 / (expected.sum() * spectrum.step**2)
        ring = np.rint(frequency.numpy() / spectrum.step).astype(int)
        wanted = np.bincount(ring.ravel(), expected.ravel()) / np.bincount(ring.ravel())
        strong = np.flatnonzero(wanted[: len(spectrum.radial_power)] > 0.2 * wanted.max())
        strong = strong[strong >= 3]
        np.testing.assert_allclose(spectrum.radial_power[strong], wanted[strong], rtol=0.25)
        assert abs(spectrum.peak_frequency - spectrum.radial_frequency[wanted.argmax()]) <= 2.1 * spectrum.step

    def test_blur_lowers_the_mean_frequency(self, generator):
        noise = colored_noise((20, 64, 64), 0.7, SHARP, generator)
        smooth = torch.from_numpy(ndimage.gaussian_filter(noise.numpy(), (0, 1.2, 1.2)))
        sharp, soft = (noise_power_spectrum(images, 0.7).mean_frequency for images in (noise, smooth))
        assert soft < 0.75 * sharp

    def test_trends_do_not_count_and_the_mask_holds(self, generator):
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
        noise = 5 * torch.randn((3, 96, 96), generator=generator)
        trend = 300 * rows - 200 * columns * rows + 150 * columns**2
        plain, tilted = (noise_power_spectrum(images, 1.0) for images in (noise, noise + trend))
        np.testing.assert_allclose(tilted.power, plain.power, rtol=1e-3, atol=1e-3)
        mask = torch.zeros(96, 96, dtype=torch.bool)
        mask[:, :48] = True
        half = noise.clone()
        half[..., 48:] += 1000 * torch.randn((3, 96, 48), generator=generator)
        masked = noise_power_spectrum(half, 1.0, mask=mask)
        assert masked.variance == pytest.approx(25, rel=0.15) and masked.regions == 3 * 5 * 2

    def test_no_region(self):
        for images, mask in ((torch.zeros(2, 20, 40), None), (torch.zeros(64, 64), torch.eye(64, dtype=torch.bool))):
            with pytest.raises(UnsuitableImage, match="smaller regions"):
                noise_power_spectrum(images, 1.0, mask=mask)


class TestNoiseEstimate:
    @pytest.mark.parametrize("kernel", [SOFT, SHARP], ids=["soft", "sharp"])
    @pytest.mark.parametrize("pixel", [0.6, 1.0])
    def test_known_noise_in_flat_tissue(self, generator, rng, kernel, pixel):
        sigma = float(rng.uniform(8, 40))
        found = estimate_noise(40 + sigma * colored_noise((2, 160, 160), pixel, kernel, generator), pixel)
        assert found.tissue is Tissue.SOFT_TISSUE and found.is_sure
        assert found.sigma_hu == pytest.approx(sigma, rel=0.16)

    def test_anatomy_does_not_count_as_noise(self, generator, rng):
        sigma = float(rng.uniform(10, 35))
        images = add_image_noise(chest(), sigma, 1.2, SHARP, generator)
        found = estimate_noise(images, 1.2)
        assert found.is_sure and set(found.by_tissue) == set(Tissue)
        for noise in found.by_tissue.values():
            assert noise.sigma_hu == pytest.approx(sigma, rel=0.15)
        # As a plain standard deviation of the soft tissue would take it for.
        assert images[chest() > 0].std().item() > 1.5 * sigma

    def test_clipped_air_is_no_evidence(self, generator):
        images = add_image_noise(chest(), 30.0, 1.2, SHARP, generator).clamp(min=-1010)
        assert Tissue.AIR not in estimate_noise(images, 1.2).by_tissue

    def test_it_says_when_it_is_not_sure(self, generator, rng):
        # Structure of all strengths everywhere: no patch is flat.
        strength = torch.from_numpy(rng.uniform(0, 1, (2, 24, 24)) ** 4).float().mul(400)
        strength = torch.nn.functional.interpolate(strength[None], scale_factor=6, mode="bilinear")[0]
        images = 40 + strength * colored_noise((2, 144, 144), 1.0, SOFT, generator)
        assert not estimate_noise(images, 1.0).is_sure

    @pytest.mark.parametrize("images", [torch.zeros(4, 4), torch.full((64, 64), 1500.0)])
    def test_nothing_flat(self, images):
        with pytest.raises(UnsuitableImage, match="state the dose"):
            estimate_noise(images, 1.0)


class TestDose:
    def test_curve_there_and_back(self, rng):
        curve = NoiseCurve(float(rng.uniform(20, 400)), float(rng.uniform(0, 5)))
        for fraction in (0.01, 0.05, 0.3, 1.0):
            assert curve.fraction(curve.sigma_hu(fraction)) == pytest.approx(fraction, rel=1e-6)
        doses = np.array([0.05, 0.1, 0.25, 0.5, 1.0])
        fitted = NoiseCurve.fit(doses, [curve.sigma_hu(dose) for dose in doses])
        assert (fitted.quantum, fitted.electronic) == pytest.approx((curve.quantum, curve.electronic), rel=1e-5)
        with pytest.raises(ValueError):
            NoiseCurve(0.0, 0.0)

    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.7])
    def test_dose_of_an_image(self, generator, fraction):
        truth = NoiseCurve(quantum=100.0, electronic=0.5)
        doses = (0.04, 0.1, 0.3, 1.0)

        def scan(dose: float) -> torch.Tensor:
            return add_image_noise(chest(), truth.sigma_hu(dose), 1.2, SHARP, generator)

        curve = NoiseCurve.fit(doses, [estimate_noise(scan(dose), 1.2).sigma_hu for dose in doses])
        found = estimate_dose(scan(fraction), 1.2, curve)
        assert found.is_sure and found.low < fraction < found.high
        assert found.fraction == pytest.approx(fraction, rel=0.25)


class TestEdgeWidth:
    @pytest.mark.parametrize("inside", [-850.0, 400.0])
    def test_gaussian_blur(self, rng, inside):
        blur, pixel, radius = float(rng.uniform(0.6, 1.4)), 0.6, 15.0
        center = tuple(47.5 + rng.uniform(-2, 2, 2))
        image = torch.from_numpy(disk(96, pixel, radius, center, inside, blur))
        # Pixels and the profile's bins blur too.
        wide = math.sqrt(blur**2 + pixel**2 / 12 + (pixel / 4) ** 2 / 12)
        assert edge_width(image, pixel, center, radius) == pytest.approx(2.563 * wide, rel=0.06)

    def test_many_noisy_images(self, generator):
        image = torch.from_numpy(disk(96, 0.6, 15.0, (47.5, 47.5), 400.0, 1.0)).float()
        noisy = image + 40 * torch.randn((50, 96, 96), generator=generator)
        assert edge_width(noisy, 0.6, (47.5, 47.5), 15.0) == pytest.approx(
            edge_width(image, 0.6, (47.5, 47.5), 15.0), rel=0.15
        )

    def test_no_edge(self):
        for image in (torch.zeros(40, 40), torch.arange(1600.0).view(40, 40)):
            with pytest.raises(UnsuitableImage, match="no clear edge"):
                edge_width(image, 1.0, (20, 20), 8.0)


class TestLesions:
    @pytest.mark.parametrize("diameter", [4.0, 8.0, 15.0])
    def test_volume_of_a_sphere_and_area_of_a_disk(self, rng, diameter):
        spacing, shape = (1.5, 0.7, 0.8), (16, 40, 40)
        center = np.array([8, 20, 20]) + rng.uniform(-0.5, 0.5, 3)
        sphere = lesion_coverage(shape, spacing, Lesion(diameter, 20), center)
        volume = float(sphere.double().sum()) * math.prod(spacing)
        assert volume == pytest.approx(math.pi / 6 * diameter**3, rel=0.05)
        flat = lesion_coverage(shape, spacing, Lesion(diameter, 20, shape=LesionShape.DISK), center)
        areas = flat.double().sum((1, 2)) * 0.7 * 0.8
        np.testing.assert_allclose(areas, math.pi / 4 * diameter**2, rtol=0.05)
        for coverage in (sphere, flat):
            assert coverage.min() == 0 and coverage.max() <= 1 and ((coverage > 0) & (coverage < 1)).any()

    def test_center_of_gravity_is_the_center(self, rng):
        center = np.array([5.0, 12.0, 15.0]) + rng.uniform(-0.5, 0.5, 3)
        coverage = lesion_coverage((11, 26, 30), (2.0, 0.8, 0.8), Lesion(8, 1), center).numpy()
        np.testing.assert_allclose(ndimage.center_of_mass(coverage), center, atol=0.1)

    def test_outside_of_the_image_nothing_is_added(self):
        assert not lesion_coverage((5, 20, 20), (1, 1, 1), Lesion(4, 20), (2, 60, 10)).any()
        with pytest.raises(UnsuitableImage, match="inside of the image"):
            contrast_recovery(torch.zeros(2), torch.zeros(2), torch.zeros(2))

    def test_ground_glass_spares_vessels(self):
        images = torch.full((5, 30, 30), -850.0)
        images[:, :, 15] = 40.0
        lesion = Lesion(12, 200, LesionKind.GROUND_GLASS)
        found, added = insert_lesion(images, (2, 1, 1), lesion, (2, 15, 15))
        assert found[2, 15, 12].item() == pytest.approx(-650) and found[2, 15, 15].item() == pytest.approx(40)
        torch.testing.assert_close(found, images + added)
        solid, added = insert_lesion(images, (2, 1, 1), Lesion(12, 20), (2, 15, 15))
        assert solid[2, 15, 15].item() == pytest.approx(60) and added.max() <= 20

    @pytest.mark.parametrize("lesion", STANDARD_LESIONS[::2], ids=lambda lesion: f"{lesion.diameter_mm:.0f} mm")
    def test_places_hold_the_lesion_and_nothing_else(self, generator, lesion):
        images, spacing = chest(slices=12), (2.5, 1.2, 1.2)
        places = lesion_places(images, spacing, lesion, 4, generator)
        assert len(places) == 4 and len(set(places)) == 4
        low, high = (-940, -700) if lesion.kind is LesionKind.GROUND_GLASS else (0, 90)
        for index, place in enumerate(places):
            covered = images[lesion_coverage(tuple(images.shape), spacing, lesion, place) > 0]
            assert low < covered.min() and covered.max() < high
            for other in places[:index]:
                apart = np.linalg.norm((np.array(place) - other) * spacing)
                assert apart >= lesion.diameter_mm

    def test_disks_may_lie_in_the_first_slice_and_where_there_is_no_room_there_is_no_place(self, generator):
        disk_lesion = Lesion(8, 20, shape=LesionShape.DISK)
        assert len(lesion_places(chest(slices=1), (1.0, 1.2, 1.2), disk_lesion, 3, generator)) == 3
        assert lesion_places(chest(slices=1), (1.0, 1.2, 1.2), Lesion(8, 20), 3, generator) == []
        assert lesion_places(torch.full((9, 60, 60), 300.0), (1, 1, 1), Lesion(8, 20), 3, generator) == []


class TestContrastRecovery:
    @pytest.fixture
    def pair(self, generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = add_image_noise(chest(slices=9), 40.0, 1.2, SHARP, generator)
        place = lesion_places(chest(slices=9), (2.0, 1.2, 1.2), Lesion(8, 50), 1, generator)[0]
        with_lesion, added = insert_lesion(images, (2.0, 1.2, 1.2), Lesion(8, 50), place)
        return with_lesion, images, added

    def test_all_half_and_none(self, pair):
        with_lesion, without, added = pair
        assert contrast_recovery(with_lesion, without, added) == pytest.approx(1, abs=1e-4)
        assert contrast_recovery(with_lesion / 2, without / 2, added) == pytest.approx(0.5, abs=1e-4)
        assert contrast_recovery(without, without, added) == 0

    def test_blur_costs_small_lesions_more(self, generator):
        def kept(diameter: float) -> float:
            lesion, images = Lesion(diameter, 50), torch.zeros(1, 64, 64)
            with_lesion, added = insert_lesion(images, (1e3, 0.7, 0.7), lesion, (0, 32, 32))
            blurred = torch.from_numpy(ndimage.gaussian_filter(with_lesion.numpy(), (0, 2, 2)))
            return contrast_recovery(blurred, images, added)

        assert kept(4) < kept(8) < kept(15) < 0.97 and kept(4) < 0.7

    def test_a_method_that_takes_small_lesions_for_noise_is_caught(self, pair):
        with_lesion, without, added = pair
        k, j, i = (int(index) for index in torch.nonzero(added)[0])
        near = (slice(k, k + 1), slice(max(0, j - 12), j + 20), slice(max(0, i - 20), i + 20))

        def heavy(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(ndimage.median_filter(images[near].numpy(), (1, 13, 13)))

        noise = (heavy(without) - chest(slices=9)[near])[chest(slices=9)[near] == 45.0].std().item()
        assert noise < 20  # it looks good
        assert contrast_recovery(heavy(with_lesion), heavy(without), added[near]) < 0.6
