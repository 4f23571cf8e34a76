"""Sparse-view reconstruction: posterior sampling against closed forms, the tiers, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from LCTfoundLib.errors import Cancelled, LCTfoundError, UnsuitableImage, UnsuitableProjections
from LCTfoundLib.networks.conditions import BuiltInEncoder, Scaling
from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.foundation import FoundationModel, InputRecipe, Slices
from LCTfoundLib.networks.posterior import PosteriorSettings, sample_posterior
from LCTfoundLib.networks.restoration import RestorationConfig
from LCTfoundLib.networks.unrolled import UnrolledConfig, UnrolledInput, UnrolledNet
from LCTfoundLib.physics.geometry import FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM, attenuation_of
from LCTfoundLib.physics.noise import Dose
from LCTfoundLib.physics.projection_files import Projections
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.tasks.slice_predictor import SlicePredictor
from LCTfoundLib.tasks.sparse_view import (
    INTERVAL_FACTOR,
    SparseViewRequest,
    Tier,
    reconstruct_sparse_view,
    scan_of_volume,
)
from LCTfoundLib.volume import Volume
from LCTfoundLib.weights.registry import Card
from Testing.engine.toy_backbones import two_levels

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = UnrolledConfig(2, 3, RestorationConfig(3, 2, 4, (8,), (1,)))


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


def a_card(**numbers: float) -> Card:
    return Card(
        name="toy", version="1", task="", architecture="UnrolledNet", architecture_parameters=SMALL.to_dict(),
        spacing=(1.0, 1.0, 1.0), classes=(), data=(), license="Apache-2.0", seed=0, commit="", numbers=numbers,
        intended_use="", limits="",
    )  # fmt: skip


@pytest.fixture
def ct(rng) -> Volume:
    """Three slices of a body with lungs, 28 rows and 32 columns."""
    y, x = np.mgrid[-14:14, -16:16] + 0.5
    body = np.where((x / 14) ** 2 + (y / 11) ** 2 < 1, 40.0, -1024.0)
    body[((np.abs(x) - 6) / 4) ** 2 + (y / 6) ** 2 < 1] = -800
    return Volume(
        np.stack([body + step for step in (0, 10, 20)]).astype(np.int16), (3.0, 3.0, 5.0), (-40.0, -30.0, 7.0)
    )


def nets(factor: float = 1.0):
    torch.manual_seed(0)
    network = UnrolledNet(SMALL).eval()
    return lambda folder: (network, a_card(**{INTERVAL_FACTOR: factor}))


def backbone(folder: object = None) -> FoundationModel:
    recipe = InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW)
    torch.manual_seed(1)
    return FoundationModel(two_levels(), BuiltInEncoder().eval(), recipe)


def reconstruct(scan, grid, **options):
    request = SparseViewRequest(**({"device": "cpu", "precision": "fp32"} | options))
    return reconstruct_sparse_view(scan, grid, request, load_net=nets(), load_backbone=backbone)


class TestPosterior:
    def case(self, size: int = 16, views: int = 8):
        grid = ImageGrid(size, size, 2.0)
        projector = Projector(grid, ParallelBeam.around(grid, views))
        image = torch.rand(2, size, size) * 0.4 + 0.8
        return image, UnrolledInput.of(projector.forward(image * WATER_PER_MM), projector), projector

    def test_with_a_perfect_prediction_the_image_comes_back(self):
        image, scan, projector = self.case()
        schedule = NoiseSchedule()

        def perfect(noisy: torch.Tensor, step: int) -> torch.Tensor:
            return (noisy - schedule.signal[step] * (image - 1)) / schedule.noise[step]

        found = sample_posterior(perfect, scan, projector, scan.start, PosteriorSettings(6, 300))
        torch.testing.assert_close(found, image, atol=2e-3, rtol=0)

    def test_a_gaussian_prior_has_a_known_posterior_mean(self):
        """N(m, s^2) pixels, measured with little trust in the prior: draws scatter around what both allow."""
        image, scan, projector = self.case(12, 40)  # as many rays as it takes: the measurements tell the image
        mean, deviation = 0.0, 0.3

        def predict(noisy: torch.Tensor, step: int) -> torch.Tensor:
            kept = float(NoiseSchedule().signal[step]) ** 2
            return (1 - kept) ** 0.5 * (noisy - kept**0.5 * mean) / (kept * deviation**2 + 1 - kept)

        settings = PosteriorSettings(12, 400, trust=1e-3, consistency=30)
        draws = torch.stack([sample_posterior(predict, scan, projector, scan.start, settings, 3, n) for n in range(4)])
        assert (draws.mean(dim=0) - image).abs().mean() < 0.25 * (scan.start - image).abs().mean() + 0.02
        left = projector.forward(draws.mean(dim=0)) - scan.sinograms
        assert left.norm() < 0.02 * scan.sinograms.norm()

    def test_draws_differ_and_repeat(self):
        _, scan, projector = self.case(16, 3)

        def wobbly(noisy: torch.Tensor, step: int) -> torch.Tensor:
            return 0.9 * noisy

        one, same, other = (
            sample_posterior(wobbly, scan, projector, scan.start, seed=5, number=number) for number in (0, 0, 1)
        )
        assert torch.equal(one, same) and (one - other).abs().mean() > 1e-3
        told: list[int] = []
        sample_posterior(wobbly, scan, projector, scan.start, PosteriorSettings(5), told=told.append)
        assert told == list(range(5))

    def test_measurements_pull_what_the_prior_says(self):
        image, scan, projector = self.case(16, 12)
        errors = []
        for settings in (PosteriorSettings(trust=0.01), PosteriorSettings(trust=1), PosteriorSettings(consistency=0)):
            found = sample_posterior(lambda noisy, step: 0.9 * noisy, scan, projector, scan.start, settings)
            errors.append(float((projector.forward(found) - scan.sinograms).norm()))
        assert errors == sorted(errors) and errors[0] < 0.3 * errors[2]

    @pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 300}, {"trust": 0.0}, {"fresh": 1.1}, {"first": 1000}])
    def test_settings_that_make_no_sense(self, wrong):
        with pytest.raises(ValueError):
            PosteriorSettings(**wrong)


class TestScan:
    def test_it_is_the_projection_of_the_padded_slices(self, ct):
        scan, grid, slices = scan_of_volume(ct, 5)
        assert slices.shape == (3, 32, 32) and grid == ImageGrid(32, 32, 3.0)
        assert slices.min() == -1000 and (slices[:, :2] == -1000).all()
        np.testing.assert_array_equal(slices[:, 2:30], np.maximum(ct.array, -1000))
        wanted = Projector(grid, scan.beam).forward(torch.from_numpy((slices + 1000) / 1000) * WATER_PER_MM)
        torch.testing.assert_close(scan.sinogram, wanted, atol=1e-5, rtol=1e-4)
        assert scan.photons is None and scan.heights_mm == (7.0, 12.0, 17.0)

    def test_half_size_and_noise(self, ct):
        clean, grid, slices = scan_of_volume(ct, 5, size=16)
        noisy, *_ = scan_of_volume(ct, 5, Dose(1e4), size=16, seed=1)
        again, *_ = scan_of_volume(ct, 5, Dose(1e4), size=16, seed=1)
        assert noisy.electronic_noise == Dose(1e4).electronic_noise and clean.electronic_noise == 0
        assert grid == ImageGrid(16, 16, 6.0) and slices.shape == (3, 16, 16)
        assert torch.equal(noisy.sinogram, again.sinogram)
        assert 0.003 < (noisy.sinogram - clean.sinogram).std() < 0.3 and float(noisy.photons.max()) == 1e4

    def test_what_cannot_be_scanned(self, ct):
        with pytest.raises(UnsuitableImage, match="square pixels"):
            scan_of_volume(replace(ct, spacing=(1.0, 1.5, 2.0)), 5)
        with pytest.raises(UnsuitableImage, match="whole part of 32"):
            scan_of_volume(ct, 5, size=20)
        with pytest.raises(UnsuitableProjections, match="views"):
            scan_of_volume(ct, 0)


class TestTiers:
    @pytest.mark.parametrize("tier", Tier)
    def test_the_more_views_the_nearer(self, ct, tier):
        # The toy backbone knows nothing of chests: it is hardly trusted.
        options = {"tier": tier, "samples": 2, "posterior": PosteriorSettings(3, 20, 1e-3, 20)}
        errors = []
        for views in (4, 60):
            scan, grid, slices = scan_of_volume(ct, views)
            found = reconstruct(scan, grid, **options)
            errors.append(float(np.abs(found.hu - slices).mean()))
        print(f"{tier}: {errors[0]:.1f} HU from 4 views, {errors[1]:.1f} from 60")
        assert errors[1] < 70 and errors[1] < 0.6 * errors[0]
        assert found.hu.shape == (3, 32, 32) and found.hu.dtype == np.float32
        assert found.residual.shape == (3,) and found.residual.max() < 0.05

    def test_what_each_tells(self, ct):
        scan, grid, _ = scan_of_volume(ct, 8)
        preview, fast, best = (
            reconstruct(scan, grid, tier=tier, samples=2, posterior=PosteriorSettings(3, 50)) for tier in Tier
        )
        assert preview.interval_hu is None and preview.evaluations == 0
        assert fast.evaluations == 2 and best.evaluations == 2 + 3 * 2
        assert (best.interval_hu >= fast.interval_hu).all() and (best.interval_hu > fast.interval_hu).any()
        for result in (preview, fast, best):
            assert "8 views" in result.warnings[0] and "Research use" in result.warnings[0]
        assert "made up" in fast.warnings[0] and "made up" not in preview.warnings[0]
        assert fast.interval_hu.shape == fast.hu.shape and (fast.interval_hu > 0).all()
        told = json.loads(json.dumps(best.provenance))
        assert told["tier"] == "best" and told["views"] == 8 and told["posterior"]["steps"] == 3

    def test_the_interval_is_the_scale_times_the_cards_factor(self, ct):
        scan, grid, _ = scan_of_volume(ct, 8)
        request = SparseViewRequest(device="cpu", precision="fp32")
        one, two = (reconstruct_sparse_view(scan, grid, request, load_net=nets(factor)) for factor in (1.0, 1.7))
        np.testing.assert_allclose(two.interval_hu, 1.7 * one.interval_hu, rtol=1e-4)
        projector = Projector(grid, scan.beam)
        network, _ = nets()(None)
        scale = network(UnrolledInput.of(scan.sinogram, projector), projector).scale.detach().numpy()
        np.testing.assert_allclose(one.interval_hu, 1000 * np.log(10) * scale, rtol=1e-3)

    def test_a_slice_does_not_depend_on_how_many_there_are(self, ct):
        scan, grid, _ = scan_of_volume(ct, 8)
        alone = replace(scan, sinogram=scan.sinogram[1:2], heights_mm=())
        for tier in (Tier.PREVIEW, Tier.FAST):
            whole, one = (reconstruct(each, grid, tier=tier).hu for each in (scan, alone))
            np.testing.assert_allclose(one[0], whole[1], atol=0.5)

    def test_the_backbone_sees_neighbors(self, ct):
        predict = SlicePredictor(backbone(), choose_device("cpu", "fp32"))
        noisy = torch.randn(6, 20, 24)
        with torch.no_grad():
            found = predict(noisy, 100)
            changed = noisy.clone()
            changed[5] += 1
            moved = (predict(changed, 100) - found).abs().amax(dim=(1, 2))
        assert found.shape == (6, 20, 24)
        assert (moved[:4] == 0).all() and (moved[4:] > 1e-5).all()

    def test_progress_and_cancel(self, ct):
        scan, grid, _ = scan_of_volume(ct, 8)
        for tier in Tier:
            reports = []
            request = SparseViewRequest(tier, samples=2, device="cpu", precision="fp32")
            reconstruct_sparse_view(
                scan, grid, request, Progress(reports.append), load_net=nets(), load_backbone=backbone
            )
            assert reports[-1].fraction == 1.0 and len(reports) > 1
            token = CancelToken()
            token.cancel()
            with pytest.raises(Cancelled):
                reconstruct_sparse_view(
                    scan, grid, request, Progress(cancel=token), load_net=nets(), load_backbone=backbone
                )

    @pytest.mark.parametrize(("views", "told"), [(16, False), (32, True)])
    def test_fans_are_told_of_where_the_preview_is_nearer(self, ct, views, told):
        _, grid, slices = scan_of_volume(ct, 5)
        beam = FanBeam((0.0,), 200, 2.0, 0.25).sparse(views)
        rays = Projector(grid, beam).forward(attenuation_of(torch.from_numpy(slices)))
        scan = Projections(rays, beam, WATER_PER_MM)
        for tier in (Tier.PREVIEW, Tier.FAST):
            texts = reconstruct(scan, grid, tier=tier).warnings
            assert any("few fan beams" in text for text in texts) is (told and tier is Tier.FAST)

    def test_metal_is_told_of_and_where_it_is(self, ct):
        hu = ct.array.astype(np.float32)
        hu[1, 14:17, 14:17] = 12000
        scan, grid, _ = scan_of_volume(ct.with_array(hu), 60)
        for tier in (Tier.PREVIEW, Tier.FAST):
            told = [text for text in reconstruct(scan, grid, tier=tier).warnings if "metal" in text]
            assert len(told) == 1 and "slice 2 of 3" in told[0]
        bone = ct.array.astype(np.float32)
        bone[:, 12:20, 12:20] = 1500
        scan, grid, _ = scan_of_volume(ct.with_array(bone), 60)
        assert not any("metal" in text for text in reconstruct(scan, grid, tier=Tier.PREVIEW).warnings)

    def test_refused(self, ct):
        scan, grid, _ = scan_of_volume(ct, 8)
        with pytest.raises(LCTfoundError, match="0 samples"):
            SparseViewRequest(samples=0)
        with pytest.raises(UnsuitableProjections, match="detector"):
            reconstruct(scan, ImageGrid(64, 64, 3.0))
        wider = reconstruct(scan, ImageGrid(64, 64, 3.0), truncated=True)
        assert any("not to be trusted" in text for text in wider.warnings)
        broken = scan.sinogram.clone()
        broken[0, 0, 0] = float("nan")
        with pytest.raises(UnsuitableProjections, match="no numbers"):
            replace(scan, sinogram=broken)
