"""Super-resolution: operators against their definition, draws against closed forms, exact agreement with the input."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from LCTfoundLib.errors import Cancelled, LCTfoundError, OutOfMemory, UnsuitableImage
from LCTfoundLib.networks.conditions import BuiltInEncoder, Scaling
from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.foundation import FoundationModel, InputRecipe, Slices
from LCTfoundLib.networks.null_space import NullSpaceSettings, sample_null_space
from LCTfoundLib.physics.downsampling import AreaMeans, Downsampling, ThickSlices
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.tasks import super_resolution
from LCTfoundLib.tasks.slice_predictor import SlicePredictor
from LCTfoundLib.tasks.super_resolution import (
    Direction,
    Method,
    SuperResolutionRequest,
    coarse_volume,
    interpolated,
    super_resolve,
)
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_checks import warnings_of
from LCTfoundLib.weights.registry import Card
from Testing.engine.toy_backbones import two_levels

pytestmark = pytest.mark.usefixtures("one_thread")

TURNED = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


@pytest.fixture
def ct(rng) -> Volume:
    """Four thick slices of a noisy body with metal and the padding of a scanner."""
    y, x = np.mgrid[-6:6, -8:8] + 0.5
    body = np.where((x / 7) ** 2 + (y / 5) ** 2 < 1, 40.0, -1000.0)
    hu = np.stack([body + step for step in (0, 10, 20, 30)]) + rng.normal(0, 30, (4, 12, 16))
    hu[1:3, 5:7, 4:6] = 3000 + rng.normal(0, 100, (2, 2, 2))
    hu[:, 0, 0] = -2048
    return Volume(hu.astype(np.float32), (3.0, 2.0, 5.0), (-40.0, -30.0, 7.0), metadata={"Modality": "CT"})


def a_card(spacing: tuple[float, float, float]) -> Card:
    return Card(
        name="toy", version="1", task="", architecture="UNet2DConditionModel", architecture_parameters={},
        spacing=spacing, classes=(), data=(), license="Apache-2.0", seed=0, commit="", numbers={},
        intended_use="", limits="",
    )  # fmt: skip


def backbone(slices: Slices = Slices.NEIGHBORS, spacing: tuple[float, float, float] = (1.5, 1.5, 2.5)):
    torch.manual_seed(1)
    model = FoundationModel(two_levels(), BuiltInEncoder().eval(), InputRecipe(slices, Scaling.WINDOW), a_card(spacing))
    return lambda folder: model


FEW = NullSpaceSettings(3, 300)


def finer(ct: Volume, load=None, progress: Progress | None = None, **options):
    told = {"device": "cpu", "precision": "fp32", "samples": 2, "sampling": FEW} | options
    return super_resolve(ct, SuperResolutionRequest(**told), progress, load or backbone())


def operators() -> list[Downsampling]:
    return [AreaMeans(3), ThickSlices(5, 3), ThickSlices(5, 3, 2.0), ThickSlices(5, 3, 4.4), ThickSlices(5, 4, 0.5)]


def matrix_of(operator: Downsampling, shape: tuple[int, int, int]) -> torch.Tensor:
    """The operator's matrix, column by column."""
    units = torch.eye(int(np.prod(shape)), dtype=torch.float64).unflatten(0, (-1,)).reshape(-1, *shape)
    return torch.stack([operator.forward(unit).flatten() for unit in units], dim=1)


class TestOperators:
    @pytest.mark.parametrize("which", range(5))
    def test_the_inverse_is_moore_and_penroses(self, which):
        operator = operators()[which]
        shape = (1, 6, 9) if which == 0 else (20 if which == 4 else 15, 1, 2)
        matrix = matrix_of(operator, shape)
        coarse = operator.forward(torch.zeros(shape, dtype=torch.float64)).shape
        units = torch.eye(matrix.shape[0], dtype=torch.float64).reshape(-1, *coarse)
        inverse = torch.stack([operator.inverse(unit).flatten() for unit in units], dim=1)
        torch.testing.assert_close(inverse, torch.linalg.pinv(matrix), atol=1e-12, rtol=0)
        torch.testing.assert_close(matrix @ inverse, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("which", range(5))
    def test_consistency_is_exact_and_leaves_what_is_not_measured(self, which, rng):
        operator = operators()[which]
        fine = torch.from_numpy(rng.normal(0, 500, (20 if which == 4 else 15, 6, 9)))
        measured = torch.from_numpy(rng.normal(0, 500, operator.forward(fine).shape))
        found = operator.consistent(fine, measured)
        torch.testing.assert_close(operator.forward(found), measured, atol=1e-9, rtol=0)
        # (I - A+ A) of both is the same: nothing but the measured part has changed.
        kept, before = (each - operator.inverse(operator.forward(each)) for each in (found, fine))
        torch.testing.assert_close(kept, before, atol=1e-9, rtol=0)

    def test_means_of_blocks_and_of_slices(self, rng):
        fine = rng.normal(0, 1, (6, 8, 12))
        wanted = fine.reshape(6, 2, 4, 3, 4).mean(axis=(2, 4))
        np.testing.assert_allclose(AreaMeans(4).forward(torch.from_numpy(fine)).numpy(), wanted, atol=1e-12)
        stacked = ThickSlices(2, 3).forward(torch.from_numpy(fine)).numpy()
        np.testing.assert_allclose(stacked, fine.reshape(2, 3, 8, 12).mean(axis=1), atol=1e-12)

    def test_thickness(self):
        """4 thin slices of 1, thick ones of 3 around 1 and 3: the first reaches half a slice beyond the face."""
        wanted = torch.tensor([[1, 1, 0.5, 0], [0, 0.5, 1, 1]], dtype=torch.float64) / 2.5
        torch.testing.assert_close(ThickSlices(2, 2, 3.0).matrix, wanted)
        gaps = ThickSlices(2, 3, 1.0).matrix
        assert gaps[0].tolist() == [0, 1, 0, 0, 0, 0] and gaps[1].tolist() == [0, 0, 0, 0, 1, 0]

    def test_refused(self):
        with pytest.raises(UnsuitableImage, match="crop it to 8 x 12"):
            AreaMeans(4).forward(torch.zeros(1, 10, 13))
        with pytest.raises(UnsuitableImage, match="give 6"):
            ThickSlices(2, 3).forward(torch.zeros(5, 4, 4))
        with pytest.raises(UnsuitableImage, match="every second slice"):
            ThickSlices(40, 4, 8.0)
        for wrong in (lambda: AreaMeans(0), lambda: ThickSlices(0, 2), lambda: ThickSlices(2, 2, 0.0)):
            with pytest.raises(ValueError):
                wrong()


def unchanged(fine: torch.Tensor) -> torch.Tensor:
    return fine


class TestSampling:
    @pytest.mark.parametrize(("fresh", "expected"), [(0.0, 0.93), (0.85, 0.84)])
    def test_a_gaussian_prior_has_a_known_posterior(self, rng, fresh, expected):
        """N(m, s^2) pixels, block means measured: these are met, and sqrt(1 - 1 / f^2) s is left around them.

        Steps that are finite leave a little less, and noise that is always drawn anew less again; these shares of the
        deviation were computed apart, for other images.
        """
        mean, deviation, operator = 0.1, 0.2, AreaMeans(2)
        measured = torch.from_numpy(rng.normal(mean, deviation / 2, (1, 24, 24)))

        def predict(noisy: torch.Tensor, step: int) -> torch.Tensor:
            kept = float(NoiseSchedule().signal[step]) ** 2
            return (1 - kept) ** 0.5 * (noisy - kept**0.5 * mean) / (kept * deviation**2 + 1 - kept)

        def consistent(fine: torch.Tensor) -> torch.Tensor:
            return operator.consistent(fine, measured)

        middle, settings = operator.inverse(measured), NullSpaceSettings(50, 600, fresh)
        draws = torch.stack([sample_null_space(predict, consistent, middle, settings, 3, n) for n in range(16)])
        torch.testing.assert_close(operator.forward(draws), measured.expand(16, 1, 24, 24), atol=1e-9, rtol=0)
        assert (draws.mean(dim=0) - middle).abs().mean() < 0.05
        left = float((draws - middle).square().mean().sqrt()) / (0.75**0.5 * deviation)
        print(f"{left:.3f} of the deviation, {expected} expected")
        assert left == pytest.approx(expected, abs=0.05)

    def test_a_prior_that_knows_the_images_finds_the_right_one(self, rng):
        """Of eight images whose block means nearly agree the one that was measured comes back, not the mean of all."""
        operator = AreaMeans(4)
        base = rng.uniform(-0.5, 0.5, (1, 4, 4)) + rng.normal(0, 0.01, (8, 4, 4))
        texture = torch.from_numpy(rng.uniform(-0.4, 0.4, (8, 16, 16)))
        known = operator.consistent(texture, torch.from_numpy(base)).float()
        truth = known[int(rng.integers(8))][None]
        measured = operator.forward(truth)

        def predict(noisy: torch.Tensor, step: int) -> torch.Tensor:
            signal, share = float(NoiseSchedule().signal[step]), float(NoiseSchedule().noise[step])
            apart = ((noisy - signal * known) ** 2).sum(dim=(1, 2)) / (2 * share**2)
            clean = (torch.softmax(-apart, dim=0)[:, None, None] * known).sum(dim=0, keepdim=True)
            return (noisy - signal * clean) / share

        def consistent(fine: torch.Tensor) -> torch.Tensor:
            return operator.consistent(fine, measured)

        cubic = interpolated(measured, Direction.IN_PLANE, 4)
        draws = torch.cat(
            [sample_null_space(predict, consistent, cubic, NullSpaceSettings(30, 999), n) for n in range(8)]
        )
        # Each draw is one of the images, made to agree; it cannot tell which where the means hardly differ.
        apart = (draws[:, None] - consistent(known)).abs().amax(dim=(2, 3))
        assert (apart.amin(dim=1) < 0.01).all()
        assert float((cubic - truth).abs().mean()) > 0.1

    def test_draws_repeat_and_differ(self, rng):
        start = torch.from_numpy(rng.uniform(-1, 1, (2, 8, 8))).float()

        def draw(seed: int, number: int) -> torch.Tensor:
            return sample_null_space(lambda noisy, step: 0.9 * noisy, unchanged, start, None, seed, number)

        assert torch.equal(draw(5, 0), draw(5, 0))
        assert (draw(5, 0) - draw(5, 1)).abs().mean() > 1e-3 and (draw(5, 0) - draw(6, 0)).abs().mean() > 1e-3
        told: list[int] = []
        sample_null_space(lambda noisy, step: noisy, unchanged, start, NullSpaceSettings(5), told=told.append)
        assert told == list(range(5))

    @pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 102}, {"first": 1000}, {"fresh": -0.1}])
    def test_settings_that_make_no_sense(self, wrong):
        with pytest.raises(ValueError):
            NullSpaceSettings(**wrong)


class TestPredictor:
    @pytest.mark.parametrize("slices", Slices)
    def test_when_memory_runs_out_fewer_slices_give_the_same(self, slices, monkeypatch):
        model = backbone(slices)(None)
        noisy = torch.randn(5, 20, 24)
        with torch.inference_mode():
            whole = SlicePredictor(model, choose_device("cpu", "fp32"))(noisy, 100)
            network, sizes = model.network.forward, []

            def small(images: torch.Tensor, *told: object):
                sizes.append(len(images))
                if len(images) > 1:
                    raise RuntimeError("out of memory")
                return network(images, *told)

            monkeypatch.setattr(model.network, "forward", small)
            shares: list[float] = []
            found = SlicePredictor(model, choose_device("cpu", "fp32"), shares.append)(noisy, 100)
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
        assert sizes == [4, 2, 1, 1, 1, 1, 1] and shares[-1] == 0.8

    def test_not_even_one_slice(self, monkeypatch):
        model = backbone()(None)

        def never(*told: object):
            raise MemoryError

        monkeypatch.setattr(model.network, "forward", never)
        with pytest.raises(OutOfMemory, match="crop"), torch.inference_mode():
            SlicePredictor(model, choose_device("cpu", "fp32"))(torch.zeros(2, 16, 16), 10)


class TestConsistency:
    @pytest.mark.parametrize("method", Method)
    @pytest.mark.parametrize("factor", [3, 4, 8])
    def test_in_plane(self, ct, factor, method):
        part = ct.crop((1, 2, 0), (3, 8, 7))
        found = finer(part, factor=factor, method=method)
        means = found.ct.array.astype(np.float64).reshape(2, 6, factor, 7, factor).mean(axis=(2, 4))
        np.testing.assert_allclose(means, part.array, atol=1e-3)
        assert found.ct.array.dtype == np.float32 and found.residual_hu < 2e-3

    @pytest.mark.parametrize("method", Method)
    @pytest.mark.parametrize("thickness", [None, 3.0, 7.0])
    def test_slices(self, ct, method, thickness):
        found = finer(ct, direction=Direction.SLICES, factor=5, method=method, thickness_mm=thickness)
        operator = ThickSlices(4, 5, thickness)
        measured = operator.forward(torch.from_numpy(found.ct.array.astype(np.float64)))
        np.testing.assert_allclose(measured.numpy(), ct.array, atol=1e-2)
        if thickness is None:
            np.testing.assert_allclose(found.ct.array.reshape(4, 5, 12, 16).mean(axis=1), ct.array, atol=2e-3)

    def test_what_is_beyond_the_window_stays_where_it_was(self, ct):
        """A block of metal keeps its mean and brightness everywhere in it, as does the padding."""
        found = finer(ct, factor=4, samples=1).ct.array
        metal = found[1:3, 20:28, 16:24]
        assert metal.mean() == pytest.approx(ct.array[1:3, 5:7, 4:6].mean(), abs=0.01) and metal.min() > 1000
        assert found[:, :4, :4].mean() == pytest.approx(-2048, abs=0.01)

    def test_cubic_is_interpolation_made_consistent(self, ct):
        found = finer(ct, factor=4, method=Method.CUBIC)
        measured = torch.from_numpy(ct.array)
        plain = interpolated(measured, Direction.IN_PLANE, 4)
        wanted = AreaMeans(4).consistent(plain, measured)
        np.testing.assert_allclose(found.ct.array, wanted.numpy(), atol=1e-2)
        assert found.interval_hu is None and found.evaluations == 0 and not found.warnings
        assert found.provenance["synthetic detail"] is False and found.provenance["weights"] == {}


class TestGeometry:
    @pytest.mark.parametrize("direction", Direction)
    @pytest.mark.parametrize("axes", [np.eye(3), TURNED])
    def test_a_ramp_in_the_world_stays_one(self, rng, direction, axes):
        slope, factor = rng.uniform(-2, 2, 3), 4
        grid = Volume(np.zeros((16, 16, 16), np.float32), (0.7, 0.9, 1.1), (-20.0, 5.0, 100.0), axes)

        def ramp(volume: Volume) -> np.ndarray:
            return volume.world_from_index(np.stack(np.indices(volume.shape), axis=-1)) @ slope

        fine = grid.with_array(ramp(grid).astype(np.float32)).to_canonical()
        coarse = coarse_volume(fine, direction, factor)
        np.testing.assert_allclose(coarse.array, ramp(coarse), atol=1e-3)
        again = finer(coarse, direction=direction, factor=factor, method=Method.CUBIC).ct
        assert again.same_grid(fine) and again.shape == fine.shape
        # Cubic interpolation knows ramps; at the faces it goes on with the outermost values.
        inner = (slice(None), *[slice(8, -8)] * 2) if direction is Direction.IN_PLANE else slice(8, -8)
        np.testing.assert_allclose(again.array[inner], ramp(fine)[inner], atol=1e-3)

    def test_any_orientation(self, ct):
        turned = Volume(ct.array, ct.spacing, ct.origin, TURNED)
        found = finer(turned, factor=2)
        assert found.ct.is_canonical
        canonical = turned.to_canonical()
        means = found.ct.array.reshape(found.ct.shape[0], canonical.shape[1], 2, canonical.shape[2], 2)
        np.testing.assert_allclose(means.mean(axis=(2, 4)), canonical.array, atol=2e-3)

    def test_the_faces_stay(self, ct):
        for direction, wanted in ((Direction.IN_PLANE, (0.75, 0.5, 5.0)), (Direction.SLICES, (3.0, 2.0, 1.25))):
            fine = finer(ct, direction=direction, factor=4, method=Method.CUBIC).ct
            assert fine.spacing == pytest.approx(wanted)
            for corner in (-0.5, 1.0):
                first, second = (
                    v.world_from_index(np.full(3, -0.5) if corner < 0 else np.array(v.shape) - 0.5) for v in (ct, fine)
                )
                np.testing.assert_allclose(first, second, atol=1e-9)

    def test_the_header_tells_the_thickness(self, ct):
        thick = replace(ct, metadata={"SliceThickness": "6"})
        options = {"direction": Direction.SLICES, "factor": 2, "method": Method.CUBIC}
        found = finer(thick, **options)
        assert found.provenance["slice thickness mm"] == 6.0
        np.testing.assert_array_equal(found.ct.array, finer(ct, thickness_mm=6.0, **options).ct.array)
        assert found.ct.metadata["SliceThickness"] == "2.5"
        assert coarse_volume(ct, Direction.SLICES, 2).metadata["SliceThickness"] == "10"
        for useless in ("", "thick", "-1", "nan"):
            told = finer(replace(ct, metadata={"SliceThickness": useless}), **options).provenance
            assert told["slice thickness mm"] == 5.0


class TestTask:
    def test_what_it_tells(self, ct):
        found = finer(ct.crop((0, 0, 0), (2, 8, 8)), factor=4)
        assert found.interval_hu.same_grid(found.ct) and (found.interval_hu.array >= 0).all()
        assert found.interval_hu.array.mean() > 1 and found.evaluations == 6
        assert "synthetic" in found.warnings[0] and "not for diagnosis" in found.warnings[0]
        assert found.warnings == warnings_of(found.ct) and not ct.metadata.get("warnings")
        told = json.loads(json.dumps(found.provenance))
        assert told["factor"] == 4 and told["sampling"]["steps"] == 3 and told["weights"]["toy"]["version"] == "1"

    def test_the_interval_is_what_the_draws_differ_in(self, ct):
        """A single draw has none; two of them differ by sqrt(2) deviations. It is widened by the factor."""
        both, one = finer(ct, factor=2), finer(ct, factor=2, samples=1)
        assert one.interval_hu is None
        second = 2 * both.ct.array - one.ct.array
        wanted = (0.55 + 0.44 * 2) * 1.6449 * np.abs(second - one.ct.array) / 2**0.5
        np.testing.assert_allclose(both.interval_hu.array, wanted, atol=0.05)

    def test_seeds(self, ct):
        same, again, other = (finer(ct, factor=2, samples=1, seed=seed).ct.array for seed in (4, 4, 5))
        np.testing.assert_array_equal(same, again)
        assert np.abs(same - other).mean() > 1

    @pytest.mark.parametrize("slices", Slices)
    def test_thin_slices_see_each_other(self, rng, slices):
        """Through the network, where its channels are neighbors: what is measured above changes a slice's detail."""
        measured = torch.from_numpy(rng.uniform(-0.5, 0.5, (4, 16, 16))).float()
        operator, predict = ThickSlices(4, 2), SlicePredictor(backbone(slices)(None), choose_device("cpu", "fp32"))

        def draw(changed: torch.Tensor) -> torch.Tensor:
            start, settings = operator.inverse(changed), NullSpaceSettings(2, 100)
            return sample_null_space(predict, lambda fine: operator.consistent(fine, changed), start, settings)

        changed = measured.clone()
        changed[3] += 0.2
        with torch.inference_mode():
            moved = (draw(changed) - draw(measured)).abs().amax(dim=(1, 2))
        # Each step reaches the next thin slice, and the others of its thick one, whose mean must stay.
        assert (moved[:2] == 0).all() and (moved[6:] > 0.05).all()
        assert (moved[2:6] > 1e-6).all() if slices is Slices.NEIGHBORS else (moved[2:6] == 0).all()

    def test_a_backbone_of_single_slices_is_told(self, ct):
        options = {"direction": Direction.SLICES, "factor": 2, "samples": 1}
        for slices in Slices:
            warnings = finer(ct, backbone(slices), **options).warnings
            assert any("one slice at a time" in text for text in warnings) is (slices is Slices.REPEAT)

    def test_finer_than_the_backbone_ever_saw(self, ct):
        assert len(finer(ct.crop((0, 0, 0), (1, 8, 8)), factor=2, samples=1).warnings) == 1
        told = finer(ct.crop((0, 0, 0), (1, 4, 4)), backbone(spacing=(1.5, 1.5, 2.5)), factor=5, samples=1).warnings
        assert len(told) == 2 and "pixels of 1.5 mm" in told[1] and "0.6 mm" in told[1]

    @pytest.mark.parametrize("method", Method)
    def test_progress_and_cancel(self, ct, method):
        reports = []
        finer(ct, factor=2, method=method, progress=Progress(reports.append))
        assert reports[-1].fraction == 1.0 and len(reports) > 1
        token = CancelToken()
        token.cancel()
        with pytest.raises(Cancelled):
            finer(ct, factor=2, method=method, progress=Progress(cancel=token))

    def test_a_run_is_stopped_between_slices(self, ct, monkeypatch):
        token, model = CancelToken(), backbone()(None)
        network, calls = model.network.forward, []

        def stopping(*told: object):
            calls.append(1)
            token.cancel()
            return network(*told)

        monkeypatch.setattr(model.network, "forward", stopping)
        with pytest.raises(Cancelled):
            finer(ct, lambda folder: model, Progress(cancel=token), factor=2, direction=Direction.SLICES)
        assert len(calls) == 1

    def test_refused(self, ct, monkeypatch):
        for wrong, told in (
            ({"factor": 1}, "from 2 to 8"),
            ({"factor": 9}, "from 2 to 8"),
            ({"samples": 0}, "1 at least"),
            ({"thickness_mm": 0.0}, "above 0 mm"),
        ):
            with pytest.raises(LCTfoundError, match=told):
                SuperResolutionRequest(**wrong)
        slices = {"direction": Direction.SLICES, "method": Method.CUBIC}
        with pytest.raises(UnsuitableImage, match="single slice"):
            finer(ct.with_array(ct.array[:1]), **slices)
        with pytest.raises(UnsuitableImage, match="every second slice"):
            finer(ct.with_array(np.tile(ct.array, (10, 1, 1))), thickness_mm=10.0, **slices)
        with pytest.raises(UnsuitableImage, match="no numbers"):
            finer(ct.with_array(np.where(ct.array > 1000, np.nan, ct.array)))
        with pytest.raises(UnsuitableImage, match="no voxels"):
            finer(ct.with_array(ct.array[:, :0]))
        with pytest.raises(UnsuitableImage, match="crop the CT to 3"):
            coarse_volume(ct, Direction.SLICES, 3)
        with pytest.raises(UnsuitableImage, match="crop it to 10 x 15"):
            coarse_volume(ct, Direction.IN_PLANE, 5)
        monkeypatch.setattr(super_resolution, "free_memory", lambda *device: 10_000)
        with pytest.raises(OutOfMemory, match="smaller factor"):
            finer(ct)

    def test_numbers_that_ran_away(self, ct, monkeypatch):
        model = backbone()(None)
        with torch.no_grad():
            next(iter(model.network.conv_out.parameters())).fill_(float("nan"))
        with pytest.raises(LCTfoundError, match="precision fp32"):
            finer(ct, lambda folder: model, factor=2)
