"""Cone beams against the fan beams of the engine in the source's plane, their adjoint, and what is reconstructed."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from LCTfoundLib.errors import Cancelled, LCTfoundError, UnsuitableProjections
from LCTfoundLib.physics.cone_beam import ConeBeam, ConeProjector, cone_least_squares, feldkamp
from LCTfoundLib.physics.geometry import Detector, FanBeam, ImageGrid
from LCTfoundLib.physics.projector import Projector

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="diffct is a development package on Linux only"),
]


def a_beam(views: int, channels: int = 48, rows: int = 24, offset: float = 0.0) -> ConeBeam:
    fan = FanBeam((0.0,), channels, 2.0, offset, 200.0, 350.0, Detector.FLAT).sparse(views)
    return ConeBeam(fan, rows, 2.5)


def a_projector(views: int, size: int = 20, slices: int = 8, **options: float) -> ConeProjector:
    return ConeProjector(ImageGrid(size, size, 2.0), slices, 3.0, a_beam(views, **options))


def blobs(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Smooth, and nothing at the border."""
    values = ndimage.gaussian_filter(rng.uniform(0, 1, shape), 1.5)
    rim = np.ones(shape) * (np.hypot(*np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[-2:]], indexing="ij")) < 0.8)
    return torch.from_numpy(values * rim).float()


def test_the_adjoint_is_exact(rng):
    projector = a_projector(int(rng.integers(3, 7)), offset=0.25)
    x = torch.from_numpy(rng.normal(size=projector.volume_shape)).float()
    y = torch.from_numpy(rng.normal(size=projector.beam.shape)).float()
    left, right = float((projector.forward(x) * y).sum()), float((x * projector.adjoint(y)).sum())
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4 * float(projector.forward(x).norm() * y.norm()))


def test_in_the_plane_of_the_source_it_is_the_fan(rng):
    """An odd number of rows has one in the plane; a volume that is the same in all slices has nothing else to see."""
    beam = a_beam(9, rows=3, offset=float(rng.uniform(-3, 3)))
    grid = ImageGrid(30, 30, 1.3)
    image = blobs(rng, 30, 30)
    rays = ConeProjector(grid, 5, 3.0, beam).forward(image.expand(5, -1, -1))[:, 1]
    wanted = Projector(grid, beam.fan).forward(image[None])[0]
    assert float((rays - wanted).norm() / wanted.norm()) < 0.03  # Siddon's against Joseph's weights


def test_high_slices_are_seen_by_high_rows(rng):
    projector = a_projector(4, rows=25)
    volume = torch.zeros(projector.volume_shape)
    volume[6] = blobs(rng, 20, 20)
    seen = projector.forward(volume).sum(dim=(0, 2))
    middle = float((seen * torch.arange(25)).sum() / seen.sum())
    assert middle == pytest.approx(12 + 2.5 * 3.0 * 350 / 200 / 2.5, abs=0.6)  # slice 6 lies 2.5 slices above


def test_feldkamp_finds_a_ball(rng):
    grid, value = ImageGrid(32, 32, 2.0), float(rng.uniform(0.01, 0.03))
    projector = ConeProjector(grid, 12, 2.0, a_beam(60, channels=64, rows=32))
    z, y, x = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * 2 for n in (12, 32, 32)], indexing="ij")
    ball = torch.from_numpy(value * ((x - 6) ** 2 + (y - 8) ** 2 + z**2 < 9**2)).float()
    rays = projector.forward(ball)
    found = feldkamp(projector, rays)
    inside = ball > 0
    core = torch.from_numpy(ndimage.binary_erosion(inside.numpy(), iterations=1))
    assert float(found[core].mean()) == pytest.approx(value, rel=0.1)
    weight = found.clamp(min=value / 2) - value / 2
    for coordinate, middle in ((x, 6), (y, 8), (z, 0)):
        assert float((weight * torch.from_numpy(coordinate)).sum() / weight.sum()) == pytest.approx(middle, abs=1.0)


def test_least_squares_come_nearer_and_can_be_cancelled(rng):
    projector = a_projector(6)
    volume = blobs(rng, *projector.volume_shape)
    rays = projector.forward(volume)
    told: list[float] = []
    found = [cone_least_squares(projector, rays, iterations=n, progress=told.append) for n in (1, 4)]
    left = [float((projector.forward(image) - rays).norm()) for image in found]
    assert left[1] < left[0] < float(rays.norm()) and told == pytest.approx([1, 0.25, 0.5, 0.75, 1])
    again = cone_least_squares(projector, rays, start=volume, iterations=1)
    torch.testing.assert_close(again, volume, atol=1e-4, rtol=1e-3)

    def stop(share: float) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        cone_least_squares(projector, rays, progress=stop)


def test_what_cannot_be_scanned():
    arc = replace(a_beam(3).fan, detector=Detector.ARC)
    with pytest.raises(UnsuitableProjections, match="flat panel"):
        ConeBeam(arc, 3, 1.0)
    with pytest.raises(UnsuitableProjections, match="no panel"):
        ConeBeam(a_beam(3).fan, 0, 1.0)
    with pytest.raises(UnsuitableProjections, match="no volume"):
        ConeProjector(ImageGrid(8, 8, 1.0), 0, 1.0, a_beam(3))
    with pytest.raises(UnsuitableProjections, match="detector sees a circle"):
        ConeProjector(ImageGrid(64, 64, 2.0), 4, 1.0, a_beam(3))
    projector = a_projector(3)
    with pytest.raises(UnsuitableProjections, match="24 x 3 x 48 and the geometry tells of 3 x 24 x 48"):
        feldkamp(projector, torch.zeros(24, 3, 48))
    with pytest.raises(UnsuitableProjections, match="no numbers"):
        projector.forward(torch.full(projector.volume_shape, math.nan))
    assert a_beam(3).height_mm == pytest.approx(24 * 2.5 * 200 / 350)


def test_without_diffct_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffct", None)
    with pytest.raises(LCTfoundError, match="pip install diffct"):
        a_projector(3)
