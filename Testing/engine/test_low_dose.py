"""Noise reduction of low-dose CT: the net's units, the tiers, what is told of the noise, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from LCTfoundLib.errors import Cancelled, LCTfoundError, UnsuitableImage, WeightError
from LCTfoundLib.networks.adapter_base import BackboneShape
from LCTfoundLib.networks.adapters import LoadedAdapter
from LCTfoundLib.networks.cold_diffusion import ColdRestorer
from LCTfoundLib.networks.conditions import WIDE, BuiltInEncoder, Condition, Scaling, neighboring_slices
from LCTfoundLib.networks.foundation import FoundationModel, InputRecipe, Slices
from LCTfoundLib.networks.low_dose import LowDoseNet, noise_fineness
from LCTfoundLib.networks.restoration import RestorationConfig
from LCTfoundLib.physics.image_quality import NoiseCurve, Tissue, noise_power_spectrum
from LCTfoundLib.physics.noise import SHARP, SOFT, Dose, Kernel, colored_noise, expected_noise_hu
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.tasks.low_dose import LowDoseRequest, LowDoseTier, NoiseReport, load_cold, reduce_noise, standard_curve
from LCTfoundLib.tasks.sparse_view import INTERVAL_FACTOR
from LCTfoundLib.volume import Volume
from LCTfoundLib.weights import registry
from LCTfoundLib.weights.registry import Card
from Testing.engine.toy_backbones import two_levels

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = RestorationConfig(3, 2, 2, (8,), (1,))
SIGMA = 40.0


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


def a_card(**numbers: float) -> Card:
    return Card(
        name="toy", version="1", task="", architecture="LowDoseNet", architecture_parameters=SMALL.to_dict(),
        spacing=(1.0, 1.0, 1.0), classes=(), data=(), license="Apache-2.0", seed=0, commit="", numbers=numbers,
        intended_use="", limits="",
    )  # fmt: skip


def body(slices: int = 5) -> np.ndarray:
    """HU of a chest of 90 rows and 102 columns, the same in all slices."""
    y, x = np.mgrid[-45:45, -51:51] + 0.5
    hu = np.where((x / 48) ** 2 + (y / 42) ** 2 < 1, 40.0, -1000.0)
    hu[((np.abs(x) - 24) / 10) ** 2 + (y / 20) ** 2 < 1] = -850
    return np.repeat(hu[None], slices, axis=0)


def noisy_chest(kernel: Kernel = SOFT) -> Volume:
    noise = colored_noise((5, 90, 102), 1.2, kernel, pitch_mm=1.2).numpy()
    array = np.rint(body() + SIGMA * noise).clip(-1024)
    array[:, 0] = -2000  # padding
    return Volume(array.astype(np.int16), (1.2, 1.2, 2.5), (-40.0, -30.0, 7.0), metadata={"Modality": "CT"})


@pytest.fixture
def ct() -> Volume:
    return noisy_chest()


@pytest.fixture(scope="module")
def model() -> FoundationModel:
    return FoundationModel(two_levels(), BuiltInEncoder().eval(), InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW))


class Blur(LowDoseNet):
    """A net by hand: it answers the mean of 3 x 3 x 3 pixels, and the noise it was told as the scale."""

    def __init__(self) -> None:
        super().__init__(SMALL)
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, slices, sigma_hu, fineness):
        self.seen.append((slices, sigma_hu, fineness))
        answer = super().forward(slices, sigma_hu, fineness)
        padded = torch.nn.functional.pad(slices, (1, 1, 1, 1), mode="replicate").mean(dim=1, keepdim=True)
        answer.images = torch.nn.functional.avg_pool2d(padded, 3, 1)[:, 0]
        answer.scale = torch.full_like(answer.images, float(sigma_hu[0]) / 1000)
        return answer


def run(ct: Volume, network: LowDoseNet | None = None, factor: float = 1.0, **options):
    """With noise of any size removed, unless the options say otherwise."""
    request = LowDoseRequest(**({"device": "cpu", "precision": "fp32", "kept_mm": 0.0} | options))
    return reduce_noise(ct, request, load_net=lambda folder: (network or Blur(), a_card(**{INTERVAL_FACTOR: factor})))


class TestNet:
    def test_untrained_it_changes_nothing(self, rng):
        slices = torch.rand(2, 3, 13, 18)
        answer = LowDoseNet(SMALL)(slices, torch.tensor([30.0, 5.0]), torch.tensor([0.4]).expand(2))
        assert torch.equal(answer.images, slices[:, 1])
        assert answer.scale.shape == (2, 13, 18) and (answer.scale[0] > 3 * answer.scale[1]).all()

    def test_correction_and_scale_are_in_units_of_the_noise(self):
        """With the same numbers told, twice the noise moves the image twice as far."""
        network = LowDoseNet(SMALL)
        torch.nn.init.normal_(network.restorer.outwards.weight, std=0.1)
        slices, fineness = torch.rand(1, 3, 16, 16), torch.tensor([0.4])
        raw = network.restorer(slices, torch.tensor([[float(np.log(2)), (0.4 - 0.45) / 0.15]]))
        answer = network(slices, torch.tensor([60.0]), fineness)
        torch.testing.assert_close(answer.images - slices[:, 1], 0.06 * raw[:, 0], atol=1e-5, rtol=1e-4)
        wanted = 0.06 * torch.nn.functional.softplus(raw[:, 1] - 1) + 1e-3
        torch.testing.assert_close(answer.scale, wanted, atol=1e-5, rtol=1e-4)

    def test_another_shape_is_no_low_dose_net(self):
        with pytest.raises(ValueError, match="three slices"):
            LowDoseNet(RestorationConfig(3, 2, 3, (8,), (1,)))

    @pytest.mark.parametrize("kernel", [SOFT, SHARP, Kernel("cosine", 0.8)], ids=["soft", "sharp", "cosine"])
    def test_fineness_is_what_the_noise_of_a_kernel_shows(self, rng, kernel):
        pixel = float(rng.uniform(0.5, 1.5))
        noise = colored_noise((8, 160, 160), pixel, kernel, pitch_mm=pixel)
        measured = 2 * pixel * noise_power_spectrum(noise, pixel, 16).mean_frequency
        assert noise_fineness(kernel, pixel, pixel) == pytest.approx(measured, abs=0.04)

    def test_sharper_is_finer(self):
        found = [noise_fineness(Kernel("hann", cutoff), 1, 1) for cutoff in (0.5, 0.7, 1.0)] + [
            noise_fineness(SHARP, 1, 1)
        ]
        assert found == sorted(found) and found[0] < 0.25 and found[-1] > 0.5


class TestFast:
    def test_the_result_lies_in_the_geometry_of_the_input(self, ct):
        before = ct.array.copy()
        result = run(ct)
        assert result.ct.same_grid(ct) and result.ct.array.dtype == np.int16
        assert np.array_equal(ct.array, before)
        assert (result.ct.array[:, 0] == -2000).all()
        assert result.interval_hu is not None and result.interval_hu.shape == ct.shape
        floating = run(ct.with_array(ct.array.astype(np.float64)))
        assert floating.ct.array.dtype == np.float32
        np.testing.assert_allclose(floating.ct.array, result.ct.array, atol=0.501)

    def test_every_slice_is_seen_between_its_neighbors(self, ct):
        """Against the same mean by scipy, slices beyond the ends being those at the ends."""
        held = np.maximum(ct.array, -1024).astype(float)
        wanted = ndimage.uniform_filter(held, 3, mode="nearest")
        result = run(ct.with_array(ct.array.astype(np.float32)))
        np.testing.assert_allclose(result.ct.array[:, 1:], wanted[:, 1:], atol=0.02)

    def test_strength_goes_from_the_input_to_the_answer(self, ct):
        ct = ct.with_array(ct.array.astype(np.float32))
        none, some, all_of_it = (run(ct, strength=strength) for strength in (0.0, 0.3, 1.0))
        np.testing.assert_array_equal(none.ct.array, ct.array)
        np.testing.assert_allclose(some.ct.array, 0.7 * ct.array + 0.3 * all_of_it.ct.array, atol=0.02)
        assert not none.warnings and any("Compare with the CT" in text for text in some.warnings)
        # What is left of the noise on purpose is part of the error.
        moved = np.abs(all_of_it.ct.array - ct.array)
        np.testing.assert_allclose(none.interval_hu[:, 1:], (all_of_it.interval_hu + moved)[:, 1:], atol=0.05)

    def test_only_what_is_fine_is_taken_away(self, ct, rng):
        """What is left beside the answer is the Gaussian of what it would have taken, and widens the interval."""
        width = float(rng.uniform(4, 9))
        ct = ct.with_array(np.maximum(ct.array.astype(np.float32), -1000))
        all_sizes, fine = run(ct), run(ct, kept_mm=width)
        taken = all_sizes.ct.array - ct.array
        deviation = width / (2 * np.sqrt(2 * np.log(2))) / ct.spacing[0]
        coarse = ndimage.gaussian_filter(taken, (0, deviation, deviation))
        np.testing.assert_allclose(fine.ct.array, all_sizes.ct.array - coarse, atol=0.01)
        np.testing.assert_allclose(fine.interval_hu, all_sizes.interval_hu + np.abs(coarse), atol=0.01)
        assert fine.provenance["kept from, mm"] == width

    def test_the_interval_is_the_scale_times_the_cards_factor(self, ct):
        one, two = (run(ct, factor=factor) for factor in (1.0, 1.6))
        np.testing.assert_allclose(two.interval_hu, 1.6 * one.interval_hu, rtol=1e-5)
        np.testing.assert_allclose(one.interval_hu, np.log(10) * one.sigma_hu, rtol=1e-4)

    def test_a_slice_does_not_depend_on_how_many_there_are(self, ct):
        whole = run(ct, sigma_hu=30.0).ct.array
        part = run(ct.with_array(ct.array[1:4]), sigma_hu=30.0).ct.array
        np.testing.assert_array_equal(part[1], whole[2])

    def test_progress_and_cancel(self, ct):
        reports, token = [], CancelToken()
        load = {"load_net": lambda folder: (Blur(), a_card())}
        reduce_noise(ct, LowDoseRequest(device="cpu"), Progress(reports.append), **load)
        assert reports[-1].fraction == 1.0 and len(reports) >= 3
        token.cancel()
        with pytest.raises(Cancelled):
            reduce_noise(ct, LowDoseRequest(device="cpu"), Progress(cancel=token), **load)


class TestWhatIsTold:
    def test_noise_and_texture_are_told_by_the_image(self, ct):
        network = Blur()
        result = run(ct, network)
        assert result.sigma_hu == pytest.approx(SIGMA, rel=0.25)
        assert result.dose is not None and result.dose.noise.tissue is Tissue.SOFT_TISSUE
        _, sigma, fineness = network.seen[0]
        assert float(sigma) == pytest.approx(result.sigma_hu)
        assert float(fineness) == pytest.approx(noise_fineness(SOFT, 1.2, 1.2), abs=0.08)

    def test_what_is_known_goes_before_what_is_told(self, ct):
        curve = NoiseCurve(400.0, 20.0)
        assert run(ct, sigma_hu=55.0).sigma_hu == 55.0
        known = run(ct, dose=0.1, curve=curve)
        assert known.sigma_hu == pytest.approx(np.sqrt(400 / 0.1 + 20 / 0.01))
        assert known.provenance["noise"]["known"] and not run(ct).provenance["noise"]["known"]
        # The curve tells the dose, the other way around.
        assert curve.sigma_hu(known.dose.fraction) == pytest.approx(known.dose.noise.sigma_hu)

    def test_the_standard_curve_is_the_closed_form_and_loses_dose_as_noise_grows(self):
        curve = standard_curve(1.4)
        for share in (0.03, 0.2, 1.0):
            wanted = expected_noise_hu(Dose(1e5, share, 10.0), 230.0, 360, 1.4)
            assert curve.sigma_hu(share) == pytest.approx(wanted, rel=0.02)
        assert standard_curve(1.4, SHARP).sigma_hu(0.1) > 2 * curve.sigma_hu(0.1)

    def test_spectra_before_and_after_are_those_of_the_noise(self, ct):
        """Blur by hand: its transfer is known, so that each frequency's share of the power that stays is, too."""
        result = run(ct.with_array(ct.array.astype(np.float32)))
        report = result.noise
        assert report.tissue is Tissue.SOFT_TISSUE and report.regions >= 8
        assert report.sigma_before_hu == pytest.approx(SIGMA, rel=0.3)
        assert report.sigma_after_hu < 0.7 * report.sigma_before_hu
        low = slice(2, 4)
        kept = np.array(report.after)[low] / np.array(report.before)[low]
        angle = 2 * np.pi * np.array(report.frequency)[low] * 1.2
        # One direction of the 3 x 3 mean; three independent slices leave a third.
        expected = ((1 + 2 * np.cos(angle)) / 3) ** 2 / 3
        np.testing.assert_allclose(kept, expected, atol=0.15)
        assert report.mean_after < report.mean_before
        told = json.loads(json.dumps(report.to_dict()))
        assert len(told["frequency"]) == len(told["removed"]) == len(told["before"])

    def test_blotchy_noise_is_warned_of(self):
        ct = noisy_chest(SHARP)

        class Smear(Blur):
            def forward(self, slices, sigma_hu, fineness):
                answer = super().forward(slices, sigma_hu, fineness)
                smeared = ndimage.gaussian_filter(slices[:, 1].numpy(), (0, 3, 3))
                answer.images = torch.from_numpy(smeared)
                return answer

        smeared = run(ct, Smear())
        print(smeared.noise)
        assert any("coarser" in text for text in smeared.warnings)
        assert not any("coarser" in text for text in run(ct, LowDoseNet(SMALL)).warnings)
        flat = NoiseReport((0.1,), (1.0,), (0.0,), (1.0,), 1.0, 0.0, 0.3, 0.0, Tissue.LUNG, 8)
        assert flat.is_blotchy

    def test_little_noise_is_said(self, ct):
        quiet = ct.with_array((body() + np.random.default_rng().normal(0, 3, ct.shape)).astype(np.float32))
        assert any("little noise" in text for text in run(quiet).warnings)

    def test_provenance(self, ct):
        told = json.loads(json.dumps(run(ct, strength=0.5).provenance))
        assert told["tier"] == "fast" and told["strength"] == 0.5 and "toy" in told["weights"]
        assert told["dose"]["from"] < told["dose"]["share"] < told["dose"]["to"]


class TestBest:
    def adapter(self, model: FoundationModel) -> LoadedAdapter:
        adapter = ColdRestorer(BackboneShape.of(model.network), width=8, timesteps=(0, 1, 2))
        torch.nn.init.normal_(adapter.conv_out.weight, std=0.02)
        return LoadedAdapter(adapter.eval())

    def best(self, ct: Volume, loaded: tuple[FoundationModel, LoadedAdapter], **options):
        request = LowDoseRequest(LowDoseTier.BEST, kept_mm=0.0, device="cpu", precision="fp32", **options)
        return reduce_noise(ct, request, load_best=lambda folder: loaded)

    def test_it_is_the_adapters_answer_in_hu(self, ct, model):
        ct = ct.with_array(ct.array[:3, 5:69, 5:69].astype(np.float32))
        loaded = model, self.adapter(model)
        result = self.best(ct, loaded)
        shown = neighboring_slices(torch.from_numpy(ct.array), WIDE, Scaling.WINDOW)
        with torch.no_grad():
            embedding = model.encoder.encode([Condition(WIDE)])
            answer = loaded[1].adapter.run(model.network, shown, embedding, torch.zeros_like(shown))
        np.testing.assert_allclose(result.ct.array, ct.array + 1000 * (answer[:, 0] - shown[:, 1]).numpy(), atol=0.2)
        assert result.interval_hu is None and result.evaluations == 3 and np.abs(result.ct.array - ct.array).max() > 1

    def test_sizes_that_the_backbone_does_not_take_and_bright_metal(self, ct, model):
        bright = ct.with_array(ct.array[:2].copy())
        bright.array[:, 40, 40] = 3000
        result = self.best(bright, (model, self.adapter(model)))
        assert result.ct.array.shape == bright.shape and (result.ct.array[:, 40, 40] > 1500).all()

    def test_without_its_weight_it_says_what_to_do(self, ct, tmp_path, monkeypatch):
        monkeypatch.setattr(registry, "shipped_folders", list)
        monkeypatch.setattr(registry, "user_folder", lambda: tmp_path / "user")
        monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
        with pytest.raises(WeightError, match="low_dose_cold.*choose the fast tier"):
            load_cold(tmp_path)
        with pytest.raises(WeightError, match="choose the fast tier"):
            reduce_noise(ct, LowDoseRequest(LowDoseTier.BEST, device="cpu", weights_folder=tmp_path))


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"strength": 1.2}, "strength"),
            ({"strength": float("nan")}, "strength"),
            ({"kept_mm": -1.0}, "Structures from -1.0 mm"),
            ({"sigma_hu": 0.0}, "above 0"),
            ({"dose": 5.0}, "share of the full dose"),
            ({"sigma_hu": 20.0, "dose": 0.1}, "give one of them"),
        ],
    )
    def test_requests(self, options, told):
        with pytest.raises(LCTfoundError, match=told):
            LowDoseRequest(**options)

    def test_images(self, ct):
        with pytest.raises(UnsuitableImage, match="square"):
            run(replace(ct, spacing=(1.0, 1.5, 2.0)))
        broken = ct.array.astype(np.float32)
        broken[2, 3, 4] = np.nan
        with pytest.raises(UnsuitableImage, match="no numbers"):
            run(ct.with_array(broken))
        steep = np.mgrid[0:5, 0:40, 0:40][1] * 60.0 - 1000
        with pytest.raises(UnsuitableImage, match="state the noise"):
            run(ct.with_array(steep.astype(np.float32)[:, 3:9]))
        stated = run(ct.with_array(steep.astype(np.float32)[:, 3:9]), sigma_hu=20.0)
        assert stated.noise is None and stated.dose is None
        assert any("soft kernel is assumed" in text for text in stated.warnings)
