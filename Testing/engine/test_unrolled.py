"""The restoring net and the unrolled reconstruction: against dense linear algebra, and learning on disks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from LCTfoundLib.networks.restoration import RestorationConfig, RestorationNet, as_numbers
from LCTfoundLib.networks.unrolled import UnrolledConfig, UnrolledInput, UnrolledNet, operator_norm
from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.projector import Projector

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = RestorationConfig(3, 2, 4, (8, 12), (1, 1))


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


def a_projector(size: int = 20, views: int = 7) -> Projector:
    grid = ImageGrid(size, size, 1.5)
    return Projector(grid, ParallelBeam.around(grid, views))


def dense(projector: Projector) -> np.ndarray:
    """The projector's matrix, float64 (rays, pixels)."""
    pixels = math.prod(projector.image_shape)
    images = torch.eye(pixels, dtype=torch.float64).reshape(pixels, *projector.image_shape)
    return projector.forward(images).reshape(pixels, -1).T.numpy()


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """With values as after a training."""
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


class TestRestorationNet:
    def test_before_any_training_nothing_is_changed(self):
        network = RestorationNet(SMALL)
        assert not network(torch.randn(2, 3, 16, 24), as_numbers(1, 2, 3, 4, like=torch.ones(1))).any()

    @pytest.mark.parametrize("shape", [(16, 16), (13, 7), (5, 30)])
    def test_any_size(self, shape):
        found = shaken(RestorationNet(SMALL))(torch.randn(2, 3, *shape), torch.randn(2, 4))
        assert found.shape == (2, 2, *shape) and found.isfinite().all()

    def test_padding_does_not_change_what_lies_far_from_it(self):
        network, images, told = shaken(RestorationNet(SMALL)), torch.randn(1, 3, 62, 62), torch.randn(1, 4)
        whole = network(images, told)
        wider = network(torch.nn.functional.pad(images, (0, 2, 0, 2), mode="replicate"), told)
        torch.testing.assert_close(whole, wider[..., :62, :62], atol=1e-5, rtol=1e-4)

    def test_images_do_not_see_each_other_and_each_number_counts(self):
        network, images, told = shaken(RestorationNet(SMALL)), torch.randn(2, 3, 16, 16), torch.randn(2, 4)
        both = network(images, told)
        torch.testing.assert_close(both[1:], network(images[1:], told[1:]), atol=1e-5, rtol=1e-4)
        for number in range(4):
            other = told.clone()
            other[:, number] += 1
            assert (network(images, other) - both).abs().max() > 1e-4

    def test_a_card_brings_it_back(self):
        assert RestorationConfig.from_dict({**SMALL.to_dict(), "channels": [8, 12], "blocks": [1, 1]}) == SMALL
        for channels, blocks in (((8,), (1, 1)), ((), ()), ((8, 0), (1, 1))):
            with pytest.raises(ValueError, match="levels"):
                RestorationConfig(3, 2, 4, channels, blocks)


class TestNorm:
    def test_it_is_the_largest_singular_value(self, rng):
        projector = a_projector(int(rng.integers(10, 24)), int(rng.integers(3, 12)))
        wanted = np.linalg.norm(dense(projector), 2)
        assert operator_norm(projector) == pytest.approx(wanted, rel=2e-3)


def disks(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random bright disks in a large one, all with the same stripes, in units of water (N, size, size).

    Without the stripes the image of total variation, which the net begins at, would leave nothing to learn.
    """
    axis = torch.linspace(-1, 1, size)
    distance = (axis[:, None] ** 2 + axis**2).sqrt()
    images = (distance < 0.8).float().repeat(count, 1, 1) * 0.5
    for image in images:
        for _ in range(4):
            x, y, r, value = (torch.rand(4, generator=generator) * torch.tensor([1, 1, 0.2, 0.8])).tolist()
            image[((axis[:, None] - y + 0.5) ** 2 + (axis - x + 0.5) ** 2).sqrt() < 0.05 + r] += value - 0.4
    return images * (1 + 0.4 * torch.cos(6 * torch.pi * axis))


class TestUnrolledNet:
    CONFIG = UnrolledConfig(3, 3, SMALL)

    def case(self, projector: Projector, count: int, seed: int) -> tuple[torch.Tensor, UnrolledInput]:
        images = disks(count, projector.grid.rows, torch.Generator().manual_seed(seed))
        return images, UnrolledInput.of(projector.forward(images * WATER_PER_MM), projector)

    def test_untrained_it_comes_nearer_to_the_measurements_with_each_iteration(self):
        projector = a_projector()
        images, scan = self.case(projector, 2, 0)
        with torch.no_grad():
            result = UnrolledNet(self.CONFIG)(scan, projector)
        left = [float((projector.forward(x) - scan.sinograms).norm()) for x in [scan.start, *result.iterates]]
        assert all(after < before for before, after in zip(left, left[1:], strict=False))
        assert torch.equal(result.images, result.iterates[-1]) and result.images.shape == images.shape
        assert len(result.iterates) == 3 and (result.scale >= 1e-3).all()

    def test_views_noise_and_pixel_are_told(self):
        network = shaken(UnrolledNet(self.CONFIG))
        seen: list[torch.Tensor] = []
        network.prior.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
        projector = a_projector(20, 32)
        _, scan = self.case(projector, 1, 1)
        with torch.no_grad():
            plain = network(scan, projector).images
            noisy = network(replace(scan, noise=torch.tensor([0.05])), projector).images
        assert not torch.allclose(plain, noisy, atol=1e-4)
        pixel = np.log2(projector.grid.pixel_mm / 1.5)
        np.testing.assert_allclose(
            torch.cat(seen[3:]).numpy(), [[place, 1, np.log(3.5), pixel] for place in (0, 0.5, 1)], rtol=1e-5
        )

    def test_noise_and_weights_of_a_scan(self, rng):
        """The median ray's deviation, against many draws of its Poisson counts."""
        projector, photons = a_projector(), float(10 ** rng.uniform(3.5, 5))
        images, scan = self.case(projector, 2, 2)
        rays = scan.sinograms * WATER_PER_MM
        noisy = UnrolledInput.of(rays, projector, photons)
        torch.testing.assert_close(noisy.weights.mean(dim=(1, 2)), torch.ones(2))
        middle = rays.flatten(1).median(dim=1).values.numpy()
        counts = rng.poisson(photons * np.exp(-middle), (20_000, 2))
        np.testing.assert_allclose(noisy.noise.numpy(), np.log(counts / photons).std(axis=0), rtol=0.05)

    def test_it_learns_what_disks_look_like_and_where_it_errs(self):
        projector, network = a_projector(24, 6), UnrolledNet(self.CONFIG)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for step in range(120):
            images, scan = self.case(projector, 4, step)
            result = network(scan, projector)
            error = (result.images - images).abs()
            loss = error.mean() + 0.05 * (result.scale.log() + error.detach() / result.scale).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        images, scan = self.case(projector, 16, 10_000)
        with torch.no_grad():
            result = network(scan, projector)
            untrained = UnrolledNet(self.CONFIG)(scan, projector).images
        error = (result.images - images).abs()
        before = (untrained - images).abs()
        print(f"mean error {float(error.mean()):.4f}, untrained {float(before.mean()):.4f}")
        assert error.mean() < 0.7 * before.mean()
        ranked = torch.stack([result.scale.flatten(), error.flatten()]).argsort(dim=1).argsort(dim=1).double()
        assert float(torch.corrcoef(ranked)[0, 1]) > 0.12

    def test_a_card_brings_it_back(self):
        assert UnrolledConfig.from_dict(self.CONFIG.to_dict()) == self.CONFIG
        with pytest.raises(ValueError, match="iterations"):
            UnrolledConfig(0)
        with pytest.raises(ValueError, match="three images"):
            UnrolledConfig(prior=RestorationConfig(1, 1, 3))
