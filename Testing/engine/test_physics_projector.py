"""Geometry and projector against a loop over single rays, integrals by formula, and scikit-image."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.transform import radon

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import Detector, FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.projector import _KEPT, Projector, forget_matrices

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def grid(rng) -> ImageGrid:
    rows, columns = (int(size) for size in rng.integers(9, 24, 2))
    return ImageGrid(rows, columns, float(rng.uniform(0.5, 3)))


def random_angles(rng, views: int) -> tuple[float, ...]:
    """Any, and the ones at which the steps change direction."""
    return (*rng.uniform(-7, 7, views), 0.0, math.pi / 4, math.pi / 2, 3 * math.pi / 4, math.pi)


def random_parallel(rng, grid: ImageGrid) -> ParallelBeam:
    pitch = grid.pixel_mm * float(rng.uniform(0.4, 1.6))
    channels = math.ceil(2 * grid.corner_mm / pitch) + int(rng.integers(1, 4))
    return ParallelBeam(random_angles(rng, 4), channels, pitch, float(rng.uniform(-0.5, 0.5)))


def random_fan(rng, grid: ImageGrid, detector: Detector) -> FanBeam:
    near = grid.corner_mm * float(rng.uniform(1.5, 3))
    far = near + grid.corner_mm * float(rng.uniform(1.1, 2))
    channels = int(rng.integers(20, 40))
    half = far * 0.8 if detector is Detector.ARC else far * 1.2
    return FanBeam(
        random_angles(rng, 4), channels, 2 * half / channels, float(rng.uniform(-0.5, 0.5)), near, far, detector
    )


BEAMS = {
    "parallel": random_parallel,
    "arc": lambda rng, grid: random_fan(rng, grid, Detector.ARC),
    "flat": lambda rng, grid: random_fan(rng, grid, Detector.FLAT),
}


@pytest.fixture(params=BEAMS)
def projector(request, rng, grid) -> Projector:
    return Projector(grid, BEAMS[request.param](rng, grid), truncated=True)


def endpoints(beam, view: int, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """Two points of a ray, built from source and detector as they stand in the room; x right, y up."""
    angle = beam.angles[view]
    across = np.array([math.cos(angle), math.sin(angle)])
    along = np.array([math.sin(angle), -math.cos(angle)])
    place = (channel - (beam.detectors - 1) / 2 - beam.offset) * beam.pitch_mm
    if isinstance(beam, ParallelBeam):
        return place * across, place * across + along
    source = -beam.source_isocenter_mm * along
    if beam.detector is Detector.FLAT:
        return source, source + beam.source_detector_mm * along + place * across
    fan = place / beam.source_detector_mm
    return source, source + beam.source_detector_mm * (math.cos(fan) * along + math.sin(fan) * across)


def integral_along(image: np.ndarray, grid: ImageGrid, start: np.ndarray, end: np.ndarray) -> float:
    """Joseph's integral of one ray, pixel by pixel, in double precision."""
    direction = (end - start) / np.linalg.norm(end - start)
    by_rows = abs(direction[1]) >= abs(direction[0])
    lines, total = (grid.y_mm if by_rows else grid.x_mm), 0.0
    axis = 1 if by_rows else 0
    for step, line in enumerate(lines):
        point = start + direction * (line - start[axis]) / direction[axis]
        if by_rows:
            place = point[0] / grid.pixel_mm + (grid.columns - 1) / 2
            values = image[step]
        else:
            place = (grid.rows - 1) / 2 - point[1] / grid.pixel_mm
            values = image[:, step]
        low = math.floor(place)
        for pixel, share in ((low, low + 1 - place), (low + 1, place - low)):
            if 0 <= pixel < len(values):
                total += share * values[pixel] * grid.pixel_mm / abs(direction[axis])
    return total


class TestProjector:
    def test_it_is_the_integral_of_each_ray(self, rng, projector):
        image = rng.standard_normal(projector.image_shape)
        found = projector.forward(torch.from_numpy(image)).numpy()
        # Rays at exactly 45 degrees may step either way; their two integrals differ.
        normals, _ = projector.beam.rays()
        steep = np.abs(np.abs(np.cos(normals)) - np.abs(np.sin(normals))) > 1e-9
        expected = np.zeros_like(found)
        for view, channel in np.ndindex(*found.shape):
            ends = endpoints(projector.beam, view, channel)
            expected[view, channel] = integral_along(image, projector.grid, *ends)
        np.testing.assert_allclose(found[steep], expected[steep], rtol=0, atol=1e-9)
        assert steep.mean() > 0.6 and np.abs(expected[steep]).max() > 1

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
    def test_the_adjoint_is_exact(self, rng, projector, dtype, tolerance):
        torch.manual_seed(int(rng.integers(2**31)))
        x, y = torch.randn(3, *projector.image_shape), torch.randn(3, *projector.sinogram_shape)
        forward, back = projector.forward(x.to(dtype)).double(), projector.adjoint(y.to(dtype)).double()
        gap = abs(float((forward * y).sum() - (x * back).sum()))
        assert gap <= tolerance * float(forward.norm() * y.norm())

    def test_the_gradient_is_the_adjoint(self, projector):
        x = torch.randn(projector.image_shape, dtype=torch.float64, requires_grad=True)
        y = torch.randn(projector.sinogram_shape, dtype=torch.float64, requires_grad=True)
        (projector.forward(x) * y.detach()).sum().backward()
        (projector.adjoint(y) * x.detach()).sum().backward()
        torch.testing.assert_close(x.grad, projector.adjoint(y.detach()))
        torch.testing.assert_close(y.grad, projector.forward(x.detach()))

    def test_gradients_agree_with_finite_differences(self, rng):
        grid = ImageGrid(3, 4, 1.0)
        projector = Projector(grid, ParallelBeam(tuple(rng.uniform(0, 3, 2)), 5, 1.0))
        x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: projector.forward(x) ** 2, (x,))
        assert torch.autograd.gradgradcheck(lambda x: projector.forward(x) ** 2, (x,))

    def test_slices_do_not_mix_and_keep_their_axes(self, projector):
        images = torch.rand(2, 11, *projector.image_shape)
        sinograms = projector.forward(images)
        assert sinograms.shape == (2, 11, *projector.sinogram_shape)
        torch.testing.assert_close(sinograms[1, 9], projector.forward(images[1, 9]))
        torch.testing.assert_close(projector.adjoint(sinograms)[0, 3], projector.adjoint(sinograms[0, 3]))
        assert projector.forward(images[:0]).shape == (0, 11, *projector.sinogram_shape)

    def test_without_room_for_the_matrices_the_numbers_are_the_same(self, monkeypatch, projector):
        x, y = torch.rand(2, *projector.image_shape), torch.rand(2, *projector.sinogram_shape)
        kept = projector.forward(x), projector.adjoint(y)
        forget_matrices()
        module = "LCTfoundLib.physics.projector."
        monkeypatch.setattr(module + "_BLOCK_SAMPLES", 2 * projector.beam.detectors * max(projector.image_shape))
        monkeypatch.setattr(module + "_BUILD_SAMPLES", 100)
        bounded = Projector(projector.grid, projector.beam, budget_bytes=0, truncated=True)
        torch.testing.assert_close(bounded.forward(x), kept[0], rtol=0, atol=0)
        # Blocks add up in another order.
        torch.testing.assert_close(bounded.adjoint(y), kept[1], rtol=1e-6, atol=1e-6)
        assert kept_bytes() == 0

    def test_half_precision_is_computed_in_single(self, projector):
        image = torch.rand(projector.image_shape).bfloat16()
        expected = projector.forward(image.float()).bfloat16()
        assert torch.equal(projector.forward(image), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert projector.forward(image.float()).dtype == torch.float32

    def test_a_disk_has_the_chords_of_a_disk(self, rng):
        grid = ImageGrid(128, 128, 2.0)
        radius, (x, y) = float(rng.uniform(40, 60)), rng.uniform(-40, 40, 2)
        fine = (np.arange(1024) - 511.5) / 4
        inside = (fine - x) ** 2 + (-fine[:, None] - y) ** 2 <= radius**2
        disk = torch.from_numpy(inside.reshape(128, 8, 128, 8).mean(axis=(1, 3)))
        for beam in (ParallelBeam.around(grid, 12), FanBeam.siemens(12), replace(FanBeam.ge(12), detector="flat")):
            normals, distances = beam.rays()
            apart = np.abs(distances - x * np.cos(normals) - y * np.sin(normals))
            chords = 2 * np.sqrt(np.maximum(radius**2 - apart**2, 0))
            error = Projector(grid, beam).forward(disk).numpy() - chords
            # Pixels blur the rim; elsewhere a chord is met to a pixel's fraction.
            assert np.abs(error[np.abs(apart - radius) > 4]).max() < 3
            assert np.sqrt((error**2).mean()) < 0.02 * 2 * radius

    def test_it_agrees_with_scikit_image(self, rng):
        size, views = 129, 9
        x, y = np.meshgrid(np.arange(size) - 64, np.arange(size) - 64)
        image = np.exp(-((x - rng.uniform(-20, 20)) ** 2 + (y - rng.uniform(-20, 20)) ** 2) / 2 / 9**2)
        image *= np.hypot(x, y) < 64
        grid = ImageGrid(size, size, 1.0)
        beam = ParallelBeam((0.0,), size, 1.0).sparse(views)
        found = Projector(grid, beam).forward(torch.from_numpy(image)).numpy()
        expected = radon(image, np.degrees(beam.angles), circle=True).T
        # scikit-image turns the image by bilinear interpolation, which blurs it a little.
        assert np.abs(found - expected).max() < 0.005 * expected.max()

    def test_a_far_source_is_a_parallel_beam(self, rng):
        grid = ImageGrid(31, 31, 1.0)
        parallel = ParallelBeam(tuple(rng.uniform(0, 6, 5)), 41, 1.0, 0.25)
        for detector in Detector:
            fan = FanBeam(parallel.angles, 41, 1.0, 0.25, 1e8, 1e8 + 100, detector)
            image = torch.rand(31, 31, dtype=torch.float64)
            near, far = Projector(grid, parallel).forward(image), Projector(grid, fan).forward(image)
            torch.testing.assert_close(near, far, rtol=0, atol=1e-3)

    def test_some_views_are_those_of_the_whole_scan(self, rng, grid):
        beam = ParallelBeam.around(grid, 24)
        image = torch.rand(grid.rows, grid.columns)
        chosen = [int(view) for view in rng.permutation(24)[:5]]
        whole, some = Projector(grid, beam).forward(image), Projector(grid, beam.subset(chosen)).forward(image)
        assert torch.equal(whole[chosen], some)


def kept_bytes() -> int:
    return sum(block.bytes for blocks in _KEPT._blocks.values() for block in blocks)


class TestMemory:
    def test_the_estimate_is_near_and_not_below(self, projector):
        forget_matrices()
        projector.forward(torch.rand(projector.image_shape))
        grid = ImageGrid(120, 100, 1.0)
        larger = Projector(grid, ParallelBeam.around(grid, 7))
        assert kept_bytes() <= projector.matrix_bytes()
        forget_matrices()
        larger.forward(torch.rand(grid.rows, grid.columns))
        assert 0.97 * larger.matrix_bytes() < kept_bytes() <= larger.matrix_bytes()

    def test_equal_geometries_share_matrices_and_the_oldest_go_first(self, grid):
        forget_matrices()
        image = torch.rand(grid.rows, grid.columns)
        beams = [ParallelBeam.around(grid, views) for views in (5, 6, 7)]
        budget = sum(Projector(grid, beam).matrix_bytes() for beam in beams[1:])
        for beam in (*beams[:2], ParallelBeam.around(grid, 5)):
            Projector(grid, beam, budget).forward(image)
        assert [key[1].views for key in _KEPT._blocks] == [6, 5]
        Projector(grid, beams[2], budget).forward(image)
        assert [key[1].views for key in _KEPT._blocks] == [5, 7]
        assert 0 < kept_bytes() <= budget


class TestGeometry:
    @pytest.mark.parametrize("views", [1, 8, 16, 33])
    def test_sparse_views_share_the_turn(self, views):
        for beam in (ParallelBeam((0.3,), 64, 1.0), FanBeam.siemens(), FanBeam.ge()):
            sparse = beam.sparse(views)
            assert np.allclose(np.diff(sparse.angles), beam.turn / views) and sparse.angles[0] == 0
            assert replace(sparse, angles=beam.angles) == beam
            assert np.allclose(sparse.view_weights, beam.turn / views)

    def test_view_weights_make_up_for_missing_and_doubled_views(self, rng):
        for beam in (ParallelBeam((0.0,), 8, 1.0), FanBeam.siemens()):
            angles = [*beam.sparse(12).angles[:11], 0.0]
            angles[3] += 5 * beam.turn
            order = rng.permutation(12)
            weights = replace(beam, angles=[angles[view] for view in order]).view_weights[np.argsort(order)]
            even = beam.turn / 12
            np.testing.assert_allclose(weights[1:10], even, atol=1e-9)
            assert weights[[0, 11]].sum() == pytest.approx(1.5 * even) and weights[10] == pytest.approx(1.5 * even)

    def test_scanners_have_their_field_of_view(self):
        assert 2 * FanBeam.siemens().field_mm == pytest.approx(500, abs=5)
        assert 2 * FanBeam.ge().field_mm == pytest.approx(500, abs=5)
        assert FanBeam.siemens().covers(ImageGrid(512, 512, 500 / 512))

    def test_the_detector_covers_what_it_sees(self, rng):
        pixel, size = float(rng.uniform(0.3, 2)), int(rng.integers(10, 600))
        grid = ImageGrid(size, size + 5, pixel)
        exact = ParallelBeam((0.0,), size, pixel)
        assert exact.covers(grid) and ParallelBeam.around(grid, 4).covers(grid)
        for short in (replace(exact, detectors=size - 1), replace(exact, offset=0.25)):
            assert not short.covers(grid)
            with pytest.raises(UnsuitableProjections, match="wider detector"):
                Projector(grid, short)
            Projector(grid, short, truncated=True)

    @pytest.mark.parametrize("angles", [(), (0.0, math.nan), (math.inf,), None, ("left",)])
    def test_angles_that_are_none_are_told(self, angles):
        with pytest.raises(UnsuitableProjections, match="in radians for each view"):
            ParallelBeam(angles, 8, 1.0)

    def test_degrees_are_told(self):
        with pytest.raises(UnsuitableProjections, match="look like degrees"):
            ParallelBeam(tuple(range(0, 180, 11)), 8, 1.0)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: ImageGrid(0, 5, 1.0),
            lambda: ImageGrid(5, 5, math.nan),
            lambda: ParallelBeam((0.0,), 0, 1.0),
            lambda: ParallelBeam((0.0,), 5, -1.0),
            lambda: ParallelBeam((0.0,), 5, 1.0, 3.0),
            lambda: ParallelBeam((0.0,), 5, 1.0).sparse(0),
            lambda: ParallelBeam((0.0,), 5, 1.0).subset([1]),
            lambda: replace(FanBeam.siemens(), source_isocenter_mm=1200.0),
            lambda: replace(FanBeam.siemens(), pitch_mm=12.0),
            lambda: Projector(ImageGrid(512, 512, 1.5), FanBeam.siemens()),
        ],
    )
    def test_a_scan_that_cannot_be_is_told_with_the_remedy(self, make):
        with pytest.raises(UnsuitableProjections) as told:
            make()
        assert str(told.value).endswith(".") and any(mark in str(told.value) for mark in (";", "between"))

    def test_shapes_that_do_not_match_are_told(self, projector):
        rows, columns = projector.image_shape
        with pytest.raises(UnsuitableProjections, match="same rows and columns"):
            projector.forward(torch.rand(2, rows + 1, columns))
        with pytest.raises(UnsuitableProjections, match="measured with"):
            projector.adjoint(torch.rand(projector.sinogram_shape[0] + 1, projector.sinogram_shape[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_computes_the_same(projector):
    x, y = torch.rand(2, *projector.image_shape), torch.rand(2, *projector.sinogram_shape)
    torch.testing.assert_close(projector.forward(x.cuda()).cpu(), projector.forward(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projector.adjoint(y.cuda()).cpu(), projector.adjoint(y), rtol=1e-5, atol=1e-5)
