"""Generation: samplers against closed forms and our own loops, seeds, guidance, and no file passes as a patient's."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from LCTfoundLib import cli
from LCTfoundLib.errors import Cancelled, LCTfoundError, OutOfMemory, OutputError, WeightError
from LCTfoundLib.export import synthetic
from LCTfoundLib.export.synthetic import NOTICE, RECORD, ImageFormat, SyntheticImages, check_target, write_synthetic
from LCTfoundLib.networks.backbone import backbone_config, build_backbone, load_official, save_official
from LCTfoundLib.networks.conditions import (
    FREEDOM,
    LUNG,
    MEDIASTINUM,
    BuiltInEncoder,
    Condition,
    ConditionError,
    Disease,
    Language,
    Scaling,
    Window,
)
from LCTfoundLib.networks.features import Prediction
from LCTfoundLib.networks.foundation import FoundationModel, InputRecipe, Slices, load_foundation, save_foundation
from LCTfoundLib.networks.sampling import Sampler, denoise, timesteps
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.tasks.generation import (
    GenerationRequest,
    NoisePredictor,
    diseases_of,
    generate_images,
    sampler_of,
    stages,
    window_of,
)
from LCTfoundLib.weights.registry import Card, DataSource

pytestmark = pytest.mark.usefixtures("one_thread")

#: Share of the image that is left at each timestep, in double precision and by the definition.
KEPT = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
CONFIG = backbone_config(
    "student", block_out_channels=(16, 16, 32, 32, 32), norm_num_groups=8, cross_attention_dim=16, layers_per_block=1
)
TOY = "toy_backbone"


def toy_card() -> Card:
    data = (DataSource("phantom", "Apache-2.0"),)
    size = (1.0, 1.0, 1.0)
    return Card(TOY, "3", "test", "", {}, size, (), data, "Apache-2.0", 0, "c", {}, "tests", "all else")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder with a backbone of fresh random numbers that sees neighboring slices."""
    folder = tmp_path_factory.mktemp("weights")
    recipe = InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW)
    encoder = BuiltInEncoder().state_dict()
    save_foundation(build_backbone(CONFIG).state_dict(), encoder, CONFIG, recipe, toy_card(), folder)
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """The same kind of network in the official layout, without conditions of its own."""
    folder = tmp_path_factory.mktemp("official")
    save_official(build_backbone(CONFIG), folder)
    return folder


@pytest.fixture
def request_(weights) -> GenerationRequest:
    return GenerationRequest(
        MEDIASTINUM, (Disease.MEDIASTINAL_MASS,), 3, 32, steps=3, backbone=TOY, weights_folder=weights, device="cpu",
        precision="fp32",
    )  # fmt: skip


def told_nothing(folder: Path, scaling: Scaling = Scaling.SLICE) -> FoundationModel:
    """An official backbone of repeated slices, with a built-in encoder: images need no language model."""
    return FoundationModel(load_official(folder).network, BuiltInEncoder().eval(), InputRecipe(scaling=scaling))


class TestTimesteps:
    def test_a_thousand_steps_visit_all(self):
        assert timesteps(1000) == list(range(999, -1, -1))

    @pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 30, 333, 600, 950, 999])
    def test_they_fall_from_pure_noise_to_the_cleanest(self, steps):
        times = timesteps(steps)
        assert len(times) == steps and times[0] == 999 and all(a > b for a, b in zip(times, times[1:], strict=False))
        assert times[-1] == 0 or steps == 1

    def test_they_are_even_in_log_signal_to_noise(self):
        kept = KEPT[timesteps(10)]
        gaps = np.diff(np.log(kept / (1 - kept)))
        assert np.ptp(gaps) < 0.35 * gaps.mean()  # timesteps are whole numbers: near 0 they cannot be more even

    @pytest.mark.parametrize(("first", "steps"), [(250, 1), (250, 9), (250, 251), (0, 1), (400, 20)])
    def test_a_later_beginning(self, first, steps):
        times = timesteps(steps, first)
        assert len(times) == steps and times[0] == first and all(a > b for a, b in zip(times, times[1:], strict=False))
        assert times[-1] == 0 or steps == 1


def gaussian(mean: float, deviation: float):
    """The best possible prediction of the noise in images whose pixels are N(mean, deviation^2).

    x = sqrt(a) image + sqrt(1 - a) noise, so that E[noise | x] = sqrt(1 - a) (x - sqrt(a) mean) / var(x).
    """

    def predict(images: torch.Tensor, step: int) -> torch.Tensor:
        kept = KEPT[step]
        variance = kept * deviation**2 + 1 - kept
        return ((1 - kept) ** 0.5 * (images.double() - kept**0.5 * mean) / variance).float()

    return predict


class TestSamplers:
    @pytest.mark.parametrize("sampler", Sampler)
    def test_gaussian_data_keep_mean_and_deviation(self, sampler, rng):
        mean, deviation = rng.uniform(-0.3, 0.3), rng.uniform(0.08, 0.15)
        noise = torch.from_numpy(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
        steps = 400 if sampler is Sampler.DDIM else 100
        images = denoise(gaussian(mean, deviation), noise, sampler, steps)
        assert float(images.mean()) == pytest.approx(mean, abs=4 * deviation / noise.numel() ** 0.5 + 0.003)
        assert float(images.std() / noise.std()) == pytest.approx(deviation, rel=0.04)

    @pytest.mark.parametrize(("sampler", "most"), [(Sampler.DPM_SOLVER, 0.025), (Sampler.UNIPC, 0.025)])
    def test_twenty_steps_of_second_order_keep_fine_detail(self, sampler, most, rng):
        deviation = rng.uniform(0.05, 0.3)
        noise = torch.from_numpy(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
        found = denoise(gaussian(0.0, deviation), noise, sampler, 20).std()
        assert float(found / noise.std()) == pytest.approx(deviation, rel=most)
        assert float(denoise(gaussian(0.0, deviation), noise, Sampler.DDIM, 20).std()) < 0.93 * float(found)

    @pytest.mark.parametrize("sampler", Sampler)
    def test_enlarged_images_get_the_detail_of_the_data_and_keep_what_they_show(self, sampler, rng):
        """Fine detail N(0, 0.1^2) on a base that is known: begun at 250, the base stays and the detail comes anew."""
        base = torch.from_numpy(rng.uniform(-0.6, 0.6, (2, 3, 1, 1)).astype(np.float32)).expand(-1, -1, 48, 48)
        noise = torch.from_numpy(rng.standard_normal(base.shape).astype(np.float32))

        def predict(images: torch.Tensor, step: int) -> torch.Tensor:
            shown = KEPT[step] ** 0.5 * base
            return gaussian(0.0, 0.1)(images - shown, step)

        found = denoise(predict, noise, sampler, 60, start=base, first=250)
        assert (found.mean(dim=(2, 3)) - base.mean(dim=(2, 3))).abs().max() < 0.03
        assert float((found - base).std()) == pytest.approx(0.1, rel=0.15 if sampler is Sampler.DDIM else 0.08)

    @pytest.mark.parametrize("steps", [1000, 30, 7])
    def test_ddim_is_the_textbooks_loop(self, steps, rng):
        noise, predict = self.case(rng)
        x = noise.double()
        times = timesteps(steps)
        for step, following in zip(times, [*times[1:], None], strict=True):
            kept, then = KEPT[step], 1.0 if following is None else KEPT[following]
            clean = ((x - (1 - kept) ** 0.5 * predict(x, step)) / kept**0.5).clamp(-1, 1)
            direction = (x - kept**0.5 * clean) / (1 - kept) ** 0.5
            x = then**0.5 * clean + (1 - then) ** 0.5 * direction
        found = denoise(predict, noise, Sampler.DDIM, steps)
        torch.testing.assert_close(found.double(), x, atol=2e-3, rtol=0)
        assert found.std() > 0.1  # there is something to compare

    @pytest.mark.parametrize("steps", [30, 5])
    def test_dpm_solver_is_the_papers_second_order_multistep(self, steps, rng):
        """Algorithm 2 of arXiv 2211.01095, the last step to the clean image of first order."""
        noise, predict = self.case(rng)
        times = timesteps(steps)
        signal, share = KEPT**0.5, (1 - KEPT) ** 0.5
        ratio = np.log(signal / share)
        x, before, gap_before = noise.double(), None, 0.0
        for number, step in enumerate(times):
            clean = ((x - share[step] * predict(x, step)) / signal[step]).clamp(-1, 1)
            if number == steps - 1:
                x = clean
                break
            following = times[number + 1]
            gap = ratio[following] - ratio[step]
            drift = clean if before is None else clean + (clean - before) * gap / gap_before / 2
            x = share[following] / share[step] * x - signal[following] * np.expm1(-gap) * drift
            before, gap_before = clean, gap
        found = denoise(predict, noise, Sampler.DPM_SOLVER, steps)
        torch.testing.assert_close(found.double(), x.clamp(-1, 1), atol=2e-3, rtol=0)

    def test_unipc_comes_to_the_same_images_as_many_steps_of_ddim(self, rng):
        noise, predict = self.case(rng)
        exact = denoise(predict, noise, Sampler.DDIM, 1000)
        near, far = (denoise(predict, noise, Sampler.UNIPC, steps) for steps in (100, 5))
        assert (near - exact).abs().mean() < 0.01 < (far - exact).abs().mean()

    def case(self, rng):
        """Noise, and a smooth prediction that is far from linear: the best one for two kinds of pixels.

        A mixture of N(a, s^2) and N(b, s^2) in equal parts.
        """
        noise = torch.from_numpy(rng.standard_normal((2, 3, 16, 16)).astype(np.float32))
        a, b, s = rng.uniform(-0.8, -0.4), rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.2)

        def predict(images: torch.Tensor, step: int) -> torch.Tensor:
            x, kept = images.double(), KEPT[step]
            variance = kept * s**2 + 1 - kept
            lean = torch.sigmoid(((x - kept**0.5 * a) ** 2 - (x - kept**0.5 * b) ** 2) / (2 * variance))
            center = kept**0.5 * (a + (b - a) * lean)
            return ((1 - kept) ** 0.5 * (x - center) / variance).to(images.dtype)

        return noise, predict

    @pytest.mark.parametrize("sampler", Sampler)
    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_a_prediction_far_off_stays_within_the_window(self, sampler, steps, rng):
        noise = torch.from_numpy(rng.standard_normal((1, 3, 16, 16)).astype(np.float32))
        images = denoise(lambda x, step: -3 * x, noise, sampler, steps)
        assert images.shape == noise.shape and images.isfinite().all() and images.abs().max() <= 1


class TestGuidance:
    @pytest.fixture
    def model(self, weights) -> FoundationModel:
        return load_foundation(TOY, weights)

    CONDITION = Condition(LUNG, (Disease.EMPHYSEMA,))

    def both(self, model, images, step) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                model.network(images, step, model.encoder.encode([c]).expand(len(images), -1, -1)).sample
                for c in (self.CONDITION, FREEDOM)
            ]

    def predictor(self, model, guidance: float) -> NoisePredictor:
        return NoisePredictor(model, self.CONDITION, guidance, choose_device("cpu", "fp32"))

    def test_it_is_the_formula(self, model, rng):
        images = torch.from_numpy(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
        step, guidance = int(rng.integers(1000)), float(rng.uniform(1.5, 8))
        told, untold = self.both(model, images, step)
        assert (told - untold).abs().max() > 1e-3  # the condition matters
        with torch.no_grad():
            found = self.predictor(model, guidance)(images, step)
        torch.testing.assert_close(found, untold + guidance * (told - untold), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(("guidance", "which"), [(1.0, 0), (0.0, 1)])
    def test_one_and_none_ask_the_network_once(self, model, rng, guidance, which):
        images = torch.from_numpy(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
        rows = []
        model.network.conv_in.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        with torch.no_grad():
            found = self.predictor(model, guidance)(images, 500)
        assert rows == [2]
        torch.testing.assert_close(found, self.both(model, images, 500)[which], atol=1e-5, rtol=1e-5)

    def test_a_backbone_of_v_tells_the_noise_too(self, model, rng):
        images = torch.from_numpy(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
        step = int(rng.integers(1000))
        answer = self.both(model, images, step)[0]
        model.prediction = Prediction.V
        with torch.no_grad():
            found = self.predictor(model, 1.0)(images, step)
        kept = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: step + 1]))
        torch.testing.assert_close(found, (1 - kept) ** 0.5 * images + kept**0.5 * answer, atol=1e-4, rtol=1e-4)


class TestImages:
    def test_three_neighboring_slices_in_hu_of_the_window(self, request_):
        result = generate_images(request_)
        assert result.hu.shape == (3, 3, 32, 32) and result.hu.dtype == np.float32
        assert result.absolute and result.window == MEDIASTINUM
        assert -200 <= result.hu.min() < -50 and 50 < result.hu.max() <= 200

    @pytest.mark.parametrize(
        ("size", "whole", "sides"),
        [
            (32, 32, [32]),
            (32, 64, [32]),
            (64, 32, [32, 64]),
            (128, 32, [32, 64, 128]),
            (48, 32, [48]),
            (96, 32, [48, 96]),
        ],
    )
    def test_an_image_larger_than_whole_slices_were_grows(self, request_, size, whole, sides):
        found = stages(replace(request_, size=size, steps=20), whole)
        assert [stage.side for stage in found] == sides
        assert [stage.first for stage in found] == [999] + [250] * (len(sides) - 1)
        assert found[0].steps == 20 and all(5 < stage.steps < 15 for stage in found[1:])

    def test_the_large_image_is_begun_small(self, request_, weights):
        model = load_foundation(TOY, weights)
        model.recipe = replace(model.recipe, side=32)
        shapes = []
        model.network.conv_in.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[-1]))
        large = generate_images(replace(request_, size=64, steps=6), load=lambda *place: model)
        assert large.hu.shape[-1] == 64 and shapes == sorted(shapes) and set(shapes) == {32, 64}
        told = [(stage["size"], stage["timesteps"][0]) for stage in large.provenance["stages"]]
        assert told == [(32, 999), (64, 250)]

    def test_channels_of_one_slice_are_averaged(self, request_, official):
        model = told_nothing(official)
        warnings: list[str] = []
        request = replace(request_, backbone=official)
        result = generate_images(request, Progress(warn=warnings.append), lambda *place: model)
        model.recipe = InputRecipe(Slices.NEIGHBORS)
        apart = generate_images(request, load=lambda *place: model)
        assert result.hu.shape == (3, 1, 32, 32) and not result.absolute
        np.testing.assert_allclose(result.hu[:, 0], apart.hu.mean(axis=1), atol=0.1)
        assert "HU of its images are approximate" in warnings[0]
        weight = result.provenance["weight"]
        file = official / "unet" / "diffusion_pytorch_model.safetensors"
        assert weight["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()

    @pytest.mark.parametrize("sampler", Sampler)
    def test_an_image_depends_on_its_seed_and_number_alone(self, request_, sampler):
        request = replace(request_, sampler=sampler)
        all_at_once = generate_images(request).hu
        one_by_one = generate_images(replace(request, batch=1)).hu
        fewer = generate_images(replace(request, count=2)).hu
        np.testing.assert_allclose(one_by_one, all_at_once, atol=0.2)  # of 400 HU; sums in another order
        np.testing.assert_allclose(fewer, all_at_once[:2], atol=0.2)
        assert np.abs(all_at_once[0] - all_at_once[1]).mean() > 5
        np.testing.assert_array_equal(generate_images(request).hu, all_at_once)

    def test_image_1_of_a_seed_is_not_image_0_of_the_next(self, request_):
        one, two = (generate_images(replace(request_, seed=seed)).hu for seed in (5, 6))
        assert min(np.abs(a - b).mean() for a in one for b in two) > 5

    def test_condition_and_guidance_change_the_image(self, request_):
        plain = generate_images(request_).hu
        others = [
            replace(request_, diseases=()),
            replace(request_, window=Window(400, 1)),
            replace(request_, guidance=4),
        ]
        assert all(not np.allclose(generate_images(other).hu, plain, atol=0.5) for other in others)

    def test_provenance_repeats_the_run(self, request_):
        told = json.loads(json.dumps(generate_images(replace(request_, seed=7, guidance=2.5)).provenance))
        assert told["weight"] | {"sha256": ""} == {"name": TOY, "version": "3", "sha256": "", "license": "Apache-2.0"}
        assert (told["seed"], told["guidance"], told["sampler"], told["steps"]) == (7, 2.5, "dpm-solver++", 3)
        assert told["sentence"].endswith("400 and 0.this image may related to mediastinal mass")
        assert set(told["versions"]) == {"diffusers", "numpy", "torch"}

    def test_progress_rises_to_the_end_and_names_the_image(self, request_):
        reports = []
        generate_images(replace(request_, batch=2), Progress(reports.append))
        assert [r.fraction for r in reports] == sorted(r.fraction for r in reports)
        assert reports[-1].fraction == 1.0
        assert {"Generating image 1-2 of 3", "Generating image 3 of 3"} <= {r.stage for r in reports}

    def test_it_stops_between_two_steps(self, request_, weights):
        token, model, calls = CancelToken(), load_foundation(TOY, weights), []

        def count(*_: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                token.cancel()

        model.network.register_forward_pre_hook(count)
        with pytest.raises(Cancelled):
            generate_images(replace(request_, steps=50), Progress(cancel=token), lambda *place: model)
        assert len(calls) == 2


class TestMemory:
    def limited(self, weights, most: int) -> tuple[FoundationModel, list[int]]:
        """A backbone that runs out of memory above a number of images, and the batches it was asked for."""
        model, asked = load_foundation(TOY, weights), []

        def allocate(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            asked.append(len(inputs[0]))
            if asked[-1] > most:
                torch.empty(2**60)  # the allocator's own error

        model.network.conv_in.register_forward_pre_hook(allocate)
        return model, asked

    def test_smaller_batches_give_the_same_images(self, request_, weights):
        model, asked = self.limited(weights, 1)
        found = generate_images(request_, load=lambda *place: model).hu
        assert asked == [3] + [1] * 9
        np.testing.assert_allclose(found, generate_images(request_).hu, atol=0.2)

    def test_not_even_one_fits(self, request_, weights):
        model, asked = self.limited(weights, 0)
        with pytest.raises(OutOfMemory, match="32 pixels does not fit into memory; close .* smaller size"):
            generate_images(request_, load=lambda *place: model)
        assert asked == [3, 1]

    def test_a_result_that_cannot_be_held_is_refused_before_the_work(self, request_):
        with pytest.raises(OutOfMemory, match=r"do not fit into memory; make \d+ at most"):
            generate_images(replace(request_, count=10**12), load=lambda *place: pytest.fail("loaded"))

    def test_other_errors_are_not_hidden(self, request_, weights):
        model = load_foundation(TOY, weights)
        model.network.conv_in = torch.nn.Conv2d(5, 16, 3)
        with pytest.raises(RuntimeError, match="channels"):
            generate_images(request_, load=lambda *place: model)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": 250}, "250 is no multiple of 16; take 256"),
            ({"size": 0}, "take 16"),
            ({"steps": 0}, "take 1 to 1000"),
            ({"steps": 1001}, "take 1 to 1000"),
            ({"guidance": -1.0}, "take 0 or more"),
            ({"guidance": float("nan")}, "guidance of nan is none"),
            ({"guidance": float("inf")}, "guidance of inf is none"),
            ({"count": 0}, "ask for 1"),
            ({"seed": -1}, "take a whole number from 0"),
        ],
    )
    def test_numbers_out_of_range(self, change, message):
        with pytest.raises(LCTfoundError, match=message) as caught:
            GenerationRequest(**change)
        assert "\n" not in str(caught.value)

    def test_windows(self):
        assert window_of("Lung") == LUNG and window_of("mediastinal") == MEDIASTINUM
        assert window_of("350, -25.5") == Window(350, -25.5)
        for text in ("bone", "400", "400,40,1", "a,b", ""):
            with pytest.raises(ConditionError, match="give lung, mediastinal or WIDTH,LEVEL"):
                window_of(text)
        with pytest.raises(ConditionError, match="width > 0"):
            window_of("-5,0")

    def test_diseases(self):
        assert diseases_of([]) == diseases_of(["No  disease"]) == ()
        asked = ["Mediastinal mass", "肺气肿", "mediastinal mass"]
        assert diseases_of(asked) == (Disease.MEDIASTINAL_MASS, Disease.EMPHYSEMA)
        with pytest.raises(ConditionError, match="no condition 'flu'; choose of: .*rib fracture, no disease") as caught:
            diseases_of(["flu"])
        assert all(disease.value in str(caught.value) for disease in Disease)
        with pytest.raises(ConditionError, match="cannot stand beside"):
            diseases_of(["no disease", "cavity"])

    def test_samplers(self):
        assert [sampler_of(name) for name in ("DDIM", "dpm-solver++", "unipc")] == list(Sampler)
        with pytest.raises(LCTfoundError, match="no sampler 'euler'; choose of: ddim, dpm-solver"):
            sampler_of("euler")

    def test_an_official_checkpoint_needs_its_language_model(self, request_, official):
        with pytest.raises(WeightError, match="language model; give the folder"):
            generate_images(replace(request_, backbone=official))

    def test_a_weight_that_yields_no_numbers(self, request_, weights):
        model = load_foundation(TOY, weights)
        with torch.no_grad():
            model.network.conv_out.weight.fill_(float("nan"))
        with pytest.raises(LCTfoundError, match="out of the range of fp32; choose precision fp32"):
            generate_images(request_, load=lambda *place: model)


@pytest.fixture
def images(rng) -> SyntheticImages:
    provenance = {"weight": {"name": "näme", "version": "1", "sha256": "ab" * 32}, "sampler": "ddim", "steps": 5,
                  "guidance": 1.0, "seed": 3, "window": {"width": 400.0, "level": 0.0}, "diseases": ["cavity"],
                  "sentence": "纵隔肿瘤"}  # fmt: skip
    hu = rng.uniform(-200, 200, (2, 3, 48, 64)).astype(np.float32)
    return SyntheticImages(hu, 400.0, 0.0, provenance=provenance)


@pytest.fixture
def strict(monkeypatch) -> None:
    """pydicom raises for every value that the standard does not allow, in reading and writing."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.RAISE)


@pytest.mark.usefixtures("strict")
class TestDicom:
    @pytest.fixture
    def written(self, images, tmp_path) -> list[pydicom.Dataset]:
        write_synthetic(images, tmp_path / "out")
        files = sorted((tmp_path / "out").glob("*.dcm"))
        return [pydicom.dcmread(file) for file in files]

    def test_it_cannot_be_taken_for_a_patients(self, written):
        assert len(written) == 2
        for image in written:
            assert image["SyntheticData"].tag == 0x0008001C and image.SyntheticData == "YES"
            assert image.ContentQualification == "RESEARCH"
            assert list(image.ImageType) == ["DERIVED", "SECONDARY", "SYNTHETIC"]
            assert image.SOPClassUID.name == "Secondary Capture Image Storage"
            assert (image.Modality, image.ConversionType) == ("OT", "SYN")
            assert str(image.PatientName).startswith("SYNTHETIC^") and image.PatientID.startswith("SYNTHETIC-")
            for keyword in ("SeriesDescription", "StudyDescription", "ImageComments", "DerivationDescription"):
                assert "SYNTHETIC - generated by LCTfound, not a patient" in image[keyword].value
            assert "ddim, 5 steps, guidance 1.0, seed 3" in image.DerivationDescription
            assert "PixelSpacing" not in image and "ImagePositionPatient" not in image

    def test_values_are_hu(self, written, images):
        step = images.width / (2**16 - 1)
        for image, hu in zip(written, images.middle, strict=True):
            np.testing.assert_allclose(pydicom.pixels.apply_rescale(image.pixel_array, image), hu, atol=0.51 * step)
            assert image.RescaleType == "HU"
            assert (image.WindowWidth, image.WindowCenter) == (400, 0)

    def test_others_read_the_same(self, written, images, tmp_path):
        found = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "out" / "synthetic_0002.dcm"))
        np.testing.assert_allclose(found[0], images.middle[1], atol=0.01)

    def test_values_that_only_resemble_hu_are_not_called_so(self, images, tmp_path):
        write_synthetic(replace(images, absolute=False), tmp_path / "out")
        assert pydicom.dcmread(tmp_path / "out" / "synthetic_0001.dcm").RescaleType == "US"

    def test_each_image_is_one_of_a_series(self, written, images, tmp_path):
        assert len({image.SOPInstanceUID for image in written}) == 2
        assert [image.InstanceNumber for image in written] == [1, 2]
        assert len({image.SeriesInstanceUID for image in written}) == 1
        write_synthetic(images, tmp_path / "again")
        other = pydicom.dcmread(tmp_path / "again" / "synthetic_0001.dcm")
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"):
            assert other[keyword].value != written[0][keyword].value

    def test_it_has_all_that_a_secondary_capture_must_have(self, written):
        """By the standard's own tables, as highdicom brings them: type 1 with a value, type 2 at least empty."""
        import highdicom

        tables = Path(highdicom.__file__).parent / "_standard"
        modules = json.loads((tables / "iod_module_map.json").read_text())["secondary-capture-image"]
        attributes = json.loads((tables / "module_attribute_map.json").read_text())
        wanted = {
            entry["keyword"]: entry["type"]
            for module in modules
            if module["usage"] == "M"
            for entry in attributes[module["key"]]
            if not entry["path"] and entry["type"] in ("1", "2")
        }
        assert len(wanted) > 20
        for image in written:
            assert [keyword for keyword in wanted if keyword not in image] == []
            assert [k for k, kind in wanted.items() if kind == "1" and image[k].is_empty] == []

    @pytest.mark.parametrize("window", [(1500, -500), (1234.567, -0.1), (1.5, 1e-7), (3e5, 2e4)])
    def test_any_window_survives(self, window, rng, tmp_path):
        width, level = window
        hu = (level + width * rng.uniform(-0.5, 0.5, (1, 1, 16, 16))).astype(np.float32)
        write_synthetic(SyntheticImages(hu, width, level), tmp_path / "out")
        image = pydicom.dcmread(tmp_path / "out" / "synthetic_0001.dcm")
        found = pydicom.pixels.apply_rescale(image.pixel_array, image)
        np.testing.assert_allclose(found, hu[0, 0], atol=width / 1e5)


class TestOtherFormats:
    @pytest.fixture
    def out(self, images, tmp_path) -> Path:
        write_synthetic(images, tmp_path / "out", list(ImageFormat))
        return tmp_path / "out"

    def test_nrrd(self, out, images):
        image = sitk.ReadImage(out / "synthetic_0002.nrrd")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image)[0], images.middle[1])
        assert image.GetMetaData("Synthetic") == "YES"
        assert image.GetMetaData("Description") == NOTICE
        assert b"Description:=SYNTHETIC" in (out / "synthetic_0002.nrrd").read_bytes()

    def test_png_says_it_in_chunks_and_in_the_picture(self, out, images):
        picture = Image.open(out / "synthetic_0001.png")
        assert picture.text["Synthetic"] == "YES" and picture.text["Description"] == NOTICE
        told = json.loads(picture.text["Provenance"])
        assert told["sentence"] == "纵隔肿瘤" and told["image"] == 1
        pixels = np.asarray(picture).astype(int)
        expected = np.rint((images.middle[0] + 200) / 400 * 255).astype(int)
        assert pixels.shape == expected.shape
        np.testing.assert_array_equal(pixels[:30], expected[:30])
        assert (pixels[30:, :60] != expected[30:, :60]).mean() > 0.15

    def test_npz_holds_all_channels(self, out, images):
        with np.load(out / "synthetic_0001.npz", allow_pickle=False) as content:
            np.testing.assert_array_equal(content["hu"], images.hu[0])
            assert str(content["synthetic"]) == NOTICE
            told = json.loads(str(content["provenance"]))
        assert told["notice"] == NOTICE and told["synthetic"] is True and told["seed"] == 3

    def test_the_record_lists_everything(self, out):
        told = json.loads((out / RECORD).read_text("utf-8"))
        assert told["notice"] == NOTICE and told["synthetic"] is True and told["weight"]["sha256"] == "ab" * 32
        assert {entry["path"] for entry in told["files"]} == {path.name for path in out.iterdir()} - {RECORD}
        for entry in told["files"]:
            assert hashlib.sha256((out / entry["path"]).read_bytes()).hexdigest() == entry["sha256"]

    def test_the_sheet_shows_all_under_the_notice(self, out, images):
        sheet = Image.open(out / "sheet.png")
        assert sheet.text["Synthetic"] == "YES"
        top = sheet.height - 192
        assert sheet.width == 2 * 192 and top >= 18
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
        assert (pixels[:top] == (255, 220, 120)).all(axis=2).sum() > 200  # the words
        for number, gray in enumerate(images.gray()):
            tile = pixels[top : top + 120, number * 192 : (number + 1) * 192, 0]
            expected = np.asarray(Image.fromarray(gray).resize((192, 192)))[:120].astype(int)
            assert np.corrcoef(tile.ravel(), expected.ravel())[0, 1] > 0.99


class TestFolder:
    def test_images_of_before_are_replaced_only_when_asked(self, images, tmp_path):
        out = tmp_path / "out"
        write_synthetic(images, out, [ImageFormat.NPZ])
        with pytest.raises(OutputError, match="already holds images; name another folder or add --overwrite"):
            write_synthetic(images, out)
        write_synthetic(images, out, [ImageFormat.PNG], overwrite=True)
        assert sorted(os.listdir(out)) == [RECORD, "sheet.png", "synthetic_0001.png", "synthetic_0002.png"]

    def test_files_of_others_are_never_touched(self, images, tmp_path):
        out = tmp_path / "out"
        write_synthetic(images, out)
        (out / "notes.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="holds other files"):
                check_target(out, overwrite)
        with pytest.raises(OutputError, match="is a file"):
            check_target(out / "notes.txt")
        assert (out / "notes.txt").read_text() == "mine"

    def test_a_full_disk_leaves_nothing(self, images, tmp_path):
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            for format in ImageFormat:
                with pytest.raises(OutputError, match="full; free some space"):
                    write_synthetic(images, tmp_path / "out", [format])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(tmp_path) == []

    def test_stopping_leaves_the_earlier_images(self, images, tmp_path):
        write_synthetic(images, tmp_path / "out", [ImageFormat.NPZ])
        before = sorted(os.listdir(tmp_path / "out"))
        token = CancelToken()
        stopping = Progress(lambda report: token.cancel() if report.fraction > 0 else None, cancel=token)
        with pytest.raises(Cancelled):
            write_synthetic(images, tmp_path / "out", overwrite=True, progress=stopping)
        assert sorted(os.listdir(tmp_path / "out")) == before and os.listdir(tmp_path) == ["out"]

    def test_formats(self):
        assert synthetic.formats_of(["PNG", "dicom", "png"]) == (ImageFormat.PNG, ImageFormat.DICOM)
        with pytest.raises(LCTfoundError, match="no image format 'jpg'; choose of: dicom, nrrd, png, npz"):
            synthetic.formats_of(["jpg"])


class TestShell:
    def run(self, weights: Path, *arguments: object) -> int:
        fixed = ["--backbone", TOY, "--weights-folder", weights, "--size", 32, "--steps", 2, "--device", "cpu"]
        return cli.main([str(argument) for argument in ("generate", *fixed, *arguments)])

    def test_from_words_to_marked_files(self, weights, tmp_path, capsys):
        out = tmp_path / "out"
        words = ["--window", "mediastinal", "--condition", "mediastinal mass", "--count", 2, "--format", "dicom,npz"]
        assert self.run(weights, out, *words, "--sampler", "unipc", "--guidance", 3, "--seed", 11) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{out}\n"
        assert "2 synthetic images" in captured.err and "not of any patient" in captured.err
        told = json.loads((out / RECORD).read_text("utf-8"))
        assert told["weight"]["sha256"] == hashlib.sha256((weights / f"{TOY}.safetensors").read_bytes()).hexdigest()
        assert (told["sampler"], told["guidance"], told["seed"], told["count"]) == ("unipc", 3.0, 11, 2)
        assert told["diseases"] == ["mediastinal mass"] and told["window"] == {"width": 400, "level": 0}
        with np.load(out / "synthetic_0002.npz") as content:
            hu = content["hu"]
        image = pydicom.dcmread(out / "synthetic_0002.dcm")
        np.testing.assert_allclose(pydicom.pixels.apply_rescale(image.pixel_array, image), hu[1], atol=0.01)
        expected = generate_images(
            GenerationRequest(
                MEDIASTINUM, (Disease.MEDIASTINAL_MASS,), 2, 32, Sampler.UNIPC, 2, 3.0, 11, TOY, weights, device="cpu"
            )
        )
        np.testing.assert_array_equal(hu, expected.hu[1])

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--size", 40], "no multiple of 16"),
            (["--steps", 0], "take 1 to 1000"),
            (["--guidance", "nan"], "guidance of nan"),
            (["--sampler", "euler"], "no sampler 'euler'"),
            (["--window", "bone"], "no window 'bone'"),
            (["--condition", "flu"], "no condition 'flu'"),
            (["--format", "jpg"], "no image format 'jpg'"),
            (["--format", ","], "No image format"),
            (["--device", "tpu"], "no device 'tpu'"),
            (["--precision", "fp8"], "no precision 'fp8'"),
            (["--backbone", "nowhere"], "no weight 'nowhere'"),
            (["--language-model", "nowhere"], "no language model folder"),
        ],
    )
    def test_bad_words_are_one_sentence_and_leave_nothing(self, weights, tmp_path, capsys, words, message):
        assert self.run(weights, tmp_path / "out", *words) == 2
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert sentence.startswith("lctfound: ") and message in sentence and sentence.endswith(".")
        assert os.listdir(tmp_path) == []

    def test_an_occupied_folder_is_refused_before_anything_is_loaded(self, weights, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert self.run(weights, tmp_path, "--backbone", "nowhere") == 2
        assert "holds other files" in capsys.readouterr().err

    def test_a_sentence_the_language_model_cannot_read(self, weights, tmp_path, capsys):
        bert = toy_bert(tmp_path / "bert")
        words = [word for disease in Disease for word in ("--condition", disease.value)]
        assert self.run(weights, tmp_path / "out", "--language-model", bert, *words) == 2
        assert "the language model reads 24; shorten it." in capsys.readouterr().err
        assert self.run(weights, tmp_path / "out", "--language-model", bert, "--language", "english") == 0
        assert json.loads((tmp_path / "out" / RECORD).read_text())["language model"] == "bert"


def toy_bert(folder: Path) -> Path:
    """A BERT of one small layer that reads 24 tokens."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    words = "window width and level is this image may related to . - , 1500 500".split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=8,
        max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_the_languages_of_the_shell_are_the_librarys():
    parser = cli._parser()
    for language in Language:
        assert parser.parse_args(["generate", "out", "--language", language.value]).language == language.value
