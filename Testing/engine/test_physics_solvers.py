"""Solvers against formulas, SciPy, scikit-image and long runs of another method in double precision."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import lsqr
from skimage.restoration import denoise_tv_chambolle

from LCTfoundLib.errors import Cancelled, UnsuitableProjections
from LCTfoundLib.physics.geometry import Detector, FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import (
    RampFilter,
    _gradient,
    _gradient_adjoint,
    conjugate_gradient,
    filtered_back_projection,
    poisson_weights,
    relative_residual,
    sirt,
    total_variation,
    total_variation_objective,
    total_variation_reconstruction,
)
from LCTfoundLib.runtime.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

WATER = 0.0192  # per mm
GRID = ImageGrid(64, 64, 4.0)
BEAMS = {
    "parallel": ParallelBeam((0.0,), 140, 2.0, 0.2).sparse(120),
    "arc": FanBeam.siemens(160),
    "shifted arc": FanBeam.ge(160),
    "flat": FanBeam((0.0,), 300, 2.0, 0.25, 595.0, 1085.6, Detector.FLAT).sparse(160),
}


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


class Blobs:
    """A smooth phantom: Gaussian blobs of water, whose line integrals a formula gives."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.places = [(0.0, 0.0, 45.0, 1.0)]
        self.places += [(*rng.uniform(-60, 60, 2), rng.uniform(10, 18), rng.choice([-0.3, 0.3])) for _ in range(4)]

    def image(self, grid: ImageGrid) -> torch.Tensor:
        x, y = np.meshgrid(grid.x_mm, grid.y_mm)
        return torch.from_numpy(
            sum(WATER * a * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2 / s**2) for cx, cy, s, a in self.places)
        )

    def sinogram(self, beam) -> torch.Tensor:
        normals, distances = beam.rays()
        return torch.from_numpy(
            sum(
                WATER * a * s * math.sqrt(2 * math.pi)
                * np.exp(-((distances - cx * np.cos(normals) - cy * np.sin(normals)) ** 2) / 2 / s**2)
                for cx, cy, s, a in self.places
            )
        )  # fmt: skip


def rms_hu(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Inside the circle, HU."""
    x, y = np.meshgrid(GRID.x_mm, GRID.y_mm)
    inside = torch.from_numpy(np.hypot(x, y) < 0.95 * GRID.circle_mm)
    return float((found - expected)[..., inside].square().mean().sqrt()) / WATER * 1000


class TestFilteredBackProjection:
    @pytest.mark.parametrize("beam", BEAMS)
    def test_a_smooth_phantom_comes_back_within_one_hu(self, rng, beam):
        blobs, projector = Blobs(rng), Projector(GRID, BEAMS[beam])
        found = filtered_back_projection(projector, blobs.sinogram(projector.beam).float())
        assert rms_hu(found, blobs.image(GRID)) < 1

    @pytest.mark.parametrize("beam", BEAMS)
    def test_a_disk_has_its_value(self, rng, beam):
        """Through the projector; its rim of three pixels aside, which the window blurs."""
        projector = Projector(GRID, BEAMS[beam])
        x, y = np.meshgrid(GRID.x_mm, GRID.y_mm)
        apart = np.hypot(x - rng.uniform(-30, 30), y - rng.uniform(-30, 30))
        disk = torch.from_numpy(np.clip((80 - apart) / 12, 0, 1) * WATER)
        error = filtered_back_projection(projector, projector.forward(disk), RampFilter.HANN) - disk
        plateau = torch.from_numpy(apart < 60)
        outside = torch.from_numpy((apart > 90) & (np.hypot(x, y) < GRID.circle_mm))
        assert abs(float(error[plateau].mean())) < 0.001 * WATER
        assert all(float(error[part].square().mean().sqrt()) < 0.005 * WATER for part in (plateau, outside))

    def test_the_order_of_views_and_a_whole_turn_change_nothing(self, rng):
        blobs, beam = Blobs(rng), ParallelBeam.around(GRID, 60)
        order = rng.permutation(60)
        turned = replace(beam.subset(order), angles=[beam.angles[view] + 2 * math.pi * (view % 2) for view in order])
        straight, shuffled = (
            filtered_back_projection(Projector(GRID, one), blobs.sinogram(one)) for one in (beam, turned)
        )
        torch.testing.assert_close(straight, shuffled, rtol=0, atol=1e-9)

    def test_parallel_views_from_behind_are_the_same_rays(self, rng):
        blobs, beam = Blobs(rng), BEAMS["parallel"].sparse(48)
        behind = replace(beam, angles=[angle + math.pi for angle in beam.angles], offset=-beam.offset)
        images = [filtered_back_projection(Projector(GRID, one), blobs.sinogram(one)) for one in (beam, behind)]
        torch.testing.assert_close(*images, rtol=0, atol=1e-9)

    def test_a_missing_view_is_made_up_for(self, rng):
        blobs, beam = Blobs(rng), FanBeam.siemens(90)
        missing = beam.subset([view for view in range(90) if view != 40])
        projector = Projector(GRID, missing)
        found = filtered_back_projection(projector, blobs.sinogram(missing))
        assert rms_hu(found, blobs.image(GRID)) < 6
        assert float(found.mean()) == pytest.approx(float(blobs.image(GRID).mean()), rel=2e-3)

    @pytest.mark.parametrize("degrees", [240, 270, 312, 340])
    @pytest.mark.parametrize("beam", ["arc", "shifted arc", "flat"])
    def test_a_short_scan_shows_what_a_full_turn_shows(self, rng, beam, degrees):
        """In any order, from any side."""
        blobs, full = Blobs(rng), BEAMS[beam].sparse(360)
        first, order = int(rng.integers(360)), rng.permutation(degrees)
        short = full.subset([(first + view) % 360 for view in order])
        found = filtered_back_projection(Projector(GRID, short), blobs.sinogram(short).float())
        assert rms_hu(found, blobs.image(GRID)) < 2

    def test_soft_windows_have_less_noise(self):
        projector = Projector(GRID, ParallelBeam.around(GRID, 60))
        noise = torch.randn(projector.sinogram_shape)
        spread = [float(filtered_back_projection(projector, noise, ramp).std()) for ramp in RampFilter]
        assert spread == sorted(spread, reverse=True) and spread[-1] < 0.6 * spread[0]
        assert float(filtered_back_projection(projector, noise, cutoff=0.5).std()) < 0.5 * spread[0]

    def test_it_is_linear_and_differentiable(self):
        projector = Projector(ImageGrid(8, 8, 1.0), ParallelBeam.around(ImageGrid(8, 8, 1.0), 4))
        y = torch.randn(2, *projector.sinogram_shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda y: filtered_back_projection(projector, y, RampFilter.HANN), (y,))

    def test_gaps_that_it_cannot_bridge_are_told(self):
        full, half = FanBeam.siemens(36), FanBeam.siemens(36).subset(range(20))
        holed = FanBeam.siemens(360).subset([view for view in range(270) if not 100 < view < 160])
        for beam in (half, holed, full.sparse(1), ParallelBeam.around(GRID, 36).subset(range(20))):
            projector = Projector(GRID, beam)
            with pytest.raises(UnsuitableProjections, match="gap of .* total variation"):
                filtered_back_projection(projector, torch.rand(projector.sinogram_shape))
        for views in (2, 3, 8):
            filtered_back_projection(Projector(GRID, full.sparse(views)), torch.rand(views, 736))


@pytest.fixture
def small() -> Projector:
    """More rays than pixels, so that the least squares have one answer."""
    grid = ImageGrid(7, 9, 2.0)
    return Projector(grid, ParallelBeam.around(grid, 13))


@pytest.fixture
def measured(small) -> torch.Tensor:
    """Sinograms of three slices with noise, so that no image explains them; float64."""
    images = torch.rand(3, *small.image_shape, dtype=torch.float64)
    exact = small.forward(images)
    return exact + 0.3 * torch.randn_like(exact)


def scipy_answer(projector, sinogram, weights=None, strength=0.0, prior=None) -> np.ndarray:
    """lsqr of the stacked problem [sqrt(W) A; sqrt(strength) I] x = [sqrt(W) y; sqrt(strength) prior]."""
    root = np.ones(sinogram.shape) if weights is None else np.sqrt(weights.numpy())
    pull, shape = math.sqrt(strength), projector.image_shape
    pixels = shape[0] * shape[1]

    def forward(x):
        image = torch.from_numpy(np.asarray(x).reshape(shape))
        return np.concatenate([(root * projector.forward(image).numpy()).ravel(), pull * x.ravel()])

    def back(y):
        rays = torch.from_numpy(y[:-pixels].reshape(sinogram.shape) * root)
        return projector.adjoint(rays).numpy().ravel() + pull * y[-pixels:]

    stacked = ScipyOperator((root.size + pixels, pixels), forward, back, dtype=np.float64)
    target = np.zeros(pixels) if prior is None else prior.numpy().ravel()
    right = np.concatenate([(root * sinogram.numpy()).ravel(), pull * target])
    return lsqr(stacked, right, atol=1e-14, btol=1e-14, iter_lim=5000)[0].reshape(shape)


class TestConjugateGradient:
    def test_it_finds_what_lsqr_finds(self, small, measured):
        found = conjugate_gradient(small, measured, iterations=1000, tolerance=1e-12)
        for slice_, sinogram in zip(found, measured, strict=True):
            np.testing.assert_allclose(slice_, scipy_answer(small, sinogram), rtol=0, atol=1e-8)

    def test_with_weights_and_prior_too(self, small, measured):
        weights, prior = torch.rand_like(measured), torch.rand(3, *small.image_shape, dtype=torch.float64)
        found = conjugate_gradient(
            small, measured, iterations=1000, tolerance=1e-13, prior=prior, strength=4.0, weights=weights
        )
        for index in range(3):
            expected = scipy_answer(small, measured[index], weights[index], 4.0, prior[index])
            np.testing.assert_allclose(found[index], expected, rtol=0, atol=1e-8)

    def test_slices_have_their_own_steps_and_stop_on_their_own(self, small, measured):
        measured[1] *= 1e-3
        measured[2] = 0
        together = conjugate_gradient(small, measured, iterations=60, tolerance=1e-5)
        for found, sinogram in zip(together, measured, strict=True):
            alone = conjugate_gradient(small, sinogram, iterations=60, tolerance=1e-5)
            torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
        assert torch.equal(together[2], torch.zeros(small.image_shape, dtype=torch.float64))

    def test_a_strong_prior_is_the_answer(self, small, measured):
        prior = torch.rand(3, *small.image_shape, dtype=torch.float64)
        found = conjugate_gradient(small, measured, prior=prior, strength=1e9)
        torch.testing.assert_close(found, prior, rtol=0, atol=1e-4)

    def test_few_steps_go_from_the_start_toward_the_rays(self, small, measured):
        start = torch.rand(3, *small.image_shape, dtype=torch.float64)
        residuals = [
            relative_residual(small, conjugate_gradient(small, measured, start, iterations=count), measured)
            for count in range(6)
        ]
        assert torch.equal(conjugate_gradient(small, measured, start, iterations=0), start)
        assert bool((torch.stack(residuals).diff(dim=0) < 0).all())

    def test_it_is_differentiable(self):
        grid = ImageGrid(4, 4, 1.0)
        projector = Projector(grid, ParallelBeam.around(grid, 3))
        y = torch.randn(projector.sinogram_shape, dtype=torch.float64, requires_grad=True)
        prior = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

        def solve(y, prior):
            return conjugate_gradient(projector, y, iterations=3, prior=prior, strength=0.5)

        assert torch.autograd.gradcheck(solve, (y, prior))


class TestSirt:
    def test_the_weighted_residual_falls_every_time(self, small, measured):
        rows = small.forward(torch.ones(small.image_shape, dtype=torch.float64))
        inverse = torch.where(rows > 0, 1 / rows.clamp(min=1e-12), 0)
        for relaxation in (0.5, 1.0, 1.9):
            norms, x = [], torch.zeros(3, *small.image_shape, dtype=torch.float64)
            for _ in range(30):
                norms.append(((small.forward(x) - measured).square() * inverse).sum(dim=(-2, -1)))
                x = sirt(small, measured, x, iterations=1, relaxation=relaxation, non_negative=False)
            assert bool((torch.stack(norms).diff(dim=0) < 0).all())

    def test_one_iteration_is_its_formula(self, small, measured):
        matrix = small.forward(torch.eye(63, dtype=torch.float64).reshape(63, 7, 9)).reshape(63, -1).t()
        start = torch.rand(63, dtype=torch.float64)
        y = measured[0].flatten()
        rows, columns = matrix.sum(1), matrix.sum(0)
        error = torch.where(rows > 0, (y - matrix @ start) / rows.clamp(min=1e-12), 0)
        expected = start + 0.7 * (matrix.t() @ error) / columns
        found = sirt(small, measured[0], start.reshape(7, 9), 1, relaxation=0.7, non_negative=False)
        torch.testing.assert_close(found.flatten(), expected)

    def test_consistent_rays_are_explained(self, small):
        images = torch.rand(2, *small.image_shape)
        sinograms = small.forward(images)
        assert float(relative_residual(small, sirt(small, sinograms, iterations=300), sinograms).max()) < 0.01

    def test_nothing_falls_below_zero(self, small, measured):
        assert float(sirt(small, -measured, iterations=3).min()) == 0
        assert float(sirt(small, -measured, iterations=3, non_negative=False).min()) < 0


class Identity:
    """Each pixel a ray of its own: reconstruction becomes denoising."""

    @staticmethod
    def forward(images: torch.Tensor, /) -> torch.Tensor:
        return images

    @staticmethod
    def adjoint(sinograms: torch.Tensor, /) -> torch.Tensor:
        return sinograms


def alternating_directions(projector, sinogram, strength, weights, iterations=2000) -> np.ndarray:
    """Reference: ADMM with dense matrices in float64, x split from its gradient and from its non-negative copy."""
    shape = projector.image_shape
    pixels = shape[0] * shape[1]
    basis = torch.eye(pixels, dtype=torch.float64).reshape(pixels, *shape)
    matrix = projector.forward(basis).reshape(pixels, -1).t().numpy()
    slope = np.stack([difference.numpy().ravel() for difference in _gradient_by_loops(basis)], axis=1)
    penalty = strength * 10
    heavy = matrix.T @ (weights.numpy().ravel()[:, None] * matrix)
    inverse = np.linalg.inv(heavy + penalty * (slope.T @ slope + np.eye(pixels)))
    right = matrix.T @ (weights * sinogram).numpy().ravel()
    z, u, p, q = (np.zeros(size) for size in (len(slope), len(slope), pixels, pixels))
    for _ in range(iterations):
        x = inverse @ (right + penalty * (slope.T @ (z - u) + p - q))
        vectors = (slope @ x + u).reshape(pixels, 2)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        z = (vectors * np.maximum(1 - strength / penalty / np.maximum(lengths, 1e-300), 0)).ravel()
        p = np.maximum(x + q, 0)
        u += slope @ x - z
        q += x - p
    return p.reshape(shape)


def _gradient_by_loops(images: torch.Tensor) -> list[torch.Tensor]:
    """Of each image: (rows, columns, 2) differences to the next row and column."""
    found = []
    for image in images:
        out = torch.zeros(*image.shape, 2, dtype=image.dtype)
        for i in range(image.shape[0]):
            for j in range(image.shape[1]):
                if i + 1 < image.shape[0]:
                    out[i, j, 0] = image[i + 1, j] - image[i, j]
                if j + 1 < image.shape[1]:
                    out[i, j, 1] = image[i, j + 1] - image[i, j]
        found.append(out)
    return found


class TestTotalVariation:
    def test_the_gradient_and_its_adjoint(self):
        x, q = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(2, 3, 5, 7, dtype=torch.float64)
        assert torch.equal(_gradient(x).movedim(0, -1), torch.stack(_gradient_by_loops(x)))
        torch.testing.assert_close((_gradient(x) * q).sum(), (x * _gradient_adjoint(q)).sum(), rtol=1e-12, atol=1e-12)

    def test_of_a_rectangle_it_is_its_outline(self):
        image = torch.zeros(9, 9)
        image[3:7, 2:5] = 2.0
        # Differences look ahead, so that one corner of the outline is cut: sqrt(2) for two sides.
        assert float(total_variation(image)) == pytest.approx(2 * (2 * (4 + 3) - 2 + math.sqrt(2)))

    def test_denoising_agrees_with_scikit_image(self, rng, monkeypatch):
        # The optimum is the same for any step; without rays to weigh against, long ones get there sooner.
        monkeypatch.setattr("LCTfoundLib.physics.solvers._GRADIENT_SCALE", 10.0)
        image = torch.from_numpy(np.pad(np.ones((12, 10)), 8) + 0.2 * rng.standard_normal((28, 26)))
        strength = float(rng.uniform(0.1, 0.3))
        found = total_variation_reconstruction(Identity(), image, strength, iterations=600, non_negative=False)
        expected = torch.from_numpy(denoise_tv_chambolle(image.numpy(), strength, eps=1e-10, max_num_iter=10000))
        ours, theirs = (float(total_variation_objective(Identity(), x, image, strength)) for x in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-4)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)

    def test_it_finds_the_optimum_that_alternating_directions_find(self, small, measured):
        strength, weights = 0.5, 0.2 + torch.rand_like(measured[0])
        found = total_variation_reconstruction(small, measured[0], strength, iterations=3000, weights=weights)
        expected = torch.from_numpy(alternating_directions(small, measured[0], strength, weights))
        best = float(total_variation_objective(small, expected, measured[0], strength, weights))
        assert float(total_variation_objective(small, found, measured[0], strength, weights)) <= best * (1 + 1e-6)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)

    def test_the_objective_falls(self, small, measured):
        values = [
            total_variation_objective(
                small, total_variation_reconstruction(small, measured, 0.5, iterations=count), measured, 0.5
            )
            for count in (0, 20, 80, 320)
        ]
        assert bool((torch.stack(values).diff(dim=0) < 0).all())

    def test_a_piecewise_constant_image_comes_back_from_few_views(self, rng):
        """Sidky's classic: 20 views, exact; filtered back-projection and SIRT leave streaks."""
        grid = ImageGrid(32, 32, 2.0)
        image = torch.zeros(32, 32)
        for _ in range(3):
            i, j = (int(start) for start in rng.integers(6, 16, 2))
            image[i : i + 8, j : j + 9] += WATER
        projector = Projector(grid, ParallelBeam.around(grid, 10))
        sinogram = projector.forward(image)
        found = total_variation_reconstruction(projector, sinogram, 1e-3, iterations=800)
        others = filtered_back_projection(projector, sinogram), sirt(projector, sinogram, iterations=200)
        error = float((found - image).norm() / image.norm())
        assert error < 0.05 and all(error < 0.4 * float((x - image).norm() / image.norm()) for x in others)

    def test_a_ray_without_weight_does_not_count(self, small, measured):
        weights = torch.ones_like(measured)
        weights[:, 3] = 0
        spoiled = measured.clone()
        spoiled[:, 3] = 1e3
        images = [
            total_variation_reconstruction(small, y, 0.5, iterations=30, weights=weights) for y in (measured, spoiled)
        ]
        torch.testing.assert_close(*images)


class TestAroundThem:
    def test_the_residual_is_that_of_each_slice(self, small):
        images = torch.rand(2, *small.image_shape)
        sinograms = small.forward(images)
        assert float(relative_residual(small, images, sinograms).max()) < 1e-6
        halves = relative_residual(small, torch.stack([images[0] / 2, images[1] * 0]), sinograms)
        torch.testing.assert_close(halves, torch.tensor([0.5, 1.0]))
        assert relative_residual(small, images[0] * 0, sinograms[0] * 0) == 0

    def test_poisson_weights_are_the_inverse_variance(self, rng):
        photons, electronic, integrals = 2000.0, 20.0, np.array([0.5, 2.0, 3.5])
        counts = rng.poisson(photons * np.exp(-integrals), (40000, 3)) + electronic * rng.standard_normal((40000, 3))
        variance = np.var(-np.log(np.maximum(counts, 1) / photons), axis=0)
        weights = poisson_weights(torch.from_numpy(integrals)[None], photons, electronic)[0].numpy()
        # The formula is the first order; at 60 counts of noise 21 the logarithm bends.
        assert weights[:2] * variance[:2] == pytest.approx(1, rel=0.04)
        assert weights[0] > weights[1] > weights[2]

    @pytest.mark.parametrize(
        "solve",
        [
            conjugate_gradient,
            sirt,
            lambda *arguments, **options: total_variation_reconstruction(*arguments, strength=0.1, **options),
        ],
    )
    def test_progress_is_told_and_may_cancel(self, small, measured, solve):
        told: list[float] = []
        solve(small, measured, iterations=4, progress=told.append)
        assert told == [0.25, 0.5, 0.75, 1.0]
        progress = Progress()

        def cancel_at_half(fraction: float) -> None:
            told.append(fraction)
            if fraction == 0.5:
                progress.cancel_token.cancel()
            progress(fraction)

        with pytest.raises(Cancelled):
            solve(small, measured, iterations=4, progress=cancel_at_half)
        assert told[4:] == [0.25, 0.5]

    def test_sinograms_that_cannot_be_used_are_told(self, small, measured):
        broken = measured.clone()
        broken[0, 2, 3] = math.nan
        for solve in (filtered_back_projection, conjugate_gradient, sirt):
            with pytest.raises(UnsuitableProjections, match="no numbers; leave their views out"):
                solve(small, broken)
            with pytest.raises(UnsuitableProjections, match="measured with"):
                solve(small, measured[:, 1:])
        with pytest.raises(ValueError, match="diverge"):
            sirt(small, measured, relaxation=2.0)
        with pytest.raises(ValueError, match="cutoff"):
            filtered_back_projection(small, measured, cutoff=0.0)
        with pytest.raises(ValueError, match="negative"):
            total_variation_reconstruction(small, measured, -1.0)
