"""The unrolled reconstruction's training: chests scanned with few views, with and without quantum noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LCTfoundLib.networks.restoration import RestorationConfig
from LCTfoundLib.networks.unrolled import UNROLLED_WEIGHT, UnrolledConfig, UnrolledInput, UnrolledNet, UnrolledResult
from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.noise import Dose, measure
from LCTfoundLib.physics.projector import Projector
from training.restoration import ImageSampler
from training.shard_stream import Augmentation, Mixture

__all__ = ["SparseViewTask"]

#: Weight of an iteration's error against the next one's.
_EARLIER = 0.6
#: Weight of the scale's likelihood: the trunk belongs to the image.
_SCALE_WEIGHT = 0.01
#: Error below which the loss is square, in units of water: 20 HU.
_SOFT = 0.02
#: Range that images are judged in, in units of water: -1000 to 1000 HU.
_BRIGHTEST = 2.0
_TEXTS = {
    "task": "sparse-view reconstruction",
    "intended_use": "Reconstruction of chest CT slices from few X-ray views, for research.",
    "limits": (
        "Research use, no medical device. What few views do not show is filled in from what chests look like, and may "
        "be wrong without looking so; the predicted error is trained on the same kind of images. Trained for a short "
        "time on a CPU, on parallel beams."
    ),
}


@dataclass(frozen=True)
class _Grid:
    """Images of one size, ``batch`` of them a step, in a share of the steps. Small ones cost little and teach most."""

    size: int
    field_mm: float
    share: float
    batch: int


@dataclass
class _Scan:
    """A batch: the slices in units of water (N, H, W), and what a scanner measured of them."""

    wanted: Tensor
    measured: UnrolledInput
    projector: Projector


class SparseViewTask:
    """Training and scores of an ``UnrolledNet``.

    Args:
        config: the parsed TOML file.
        mixture, held_out: of shards.
    """

    name = UNROLLED_WEIGHT
    architecture = "UnrolledNet"
    texts = _TEXTS

    def __init__(self, config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> None:
        shape, data = config["network"], config["data"]
        defaults = UnrolledConfig()
        prior = RestorationConfig.from_dict(defaults.prior.to_dict() | shape.get("prior", {}))
        self.shape = UnrolledConfig(shape["iterations"], shape["steps"], prior)
        self.network = UnrolledNet(self.shape)
        self.seed = int(config.get("seed", 0))
        self.grids = [_Grid(**values) for values in data["grids"]]
        self.scored = next(grid for grid in self.grids if grid.size == int(data["scored"]))
        self.views, self.noisy = [int(n) for n in data["views"]], float(data["noisy"])
        self.photons = tuple(float(n) for n in data["photons"])
        sizes = {grid.size: Augmentation(grid.size, grid.size) for grid in self.grids}
        self._train = {size: ImageSampler(mixture, each, self.seed) for size, each in sizes.items()}
        whole = sizes[self.scored.size]
        self._held_out = ImageSampler(held_out, whole, 9_999_999) if held_out else None

    @property
    def parameters(self) -> dict[str, Any]:
        return self.shape.to_dict()

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step, 2])
        views = self.views[int(rng.integers(len(self.views)))]
        noisy = rng.random() < self.noisy
        dose = Dose(float(np.exp(rng.uniform(*np.log(self.photons))))) if noisy else None
        shares = np.array([grid.share for grid in self.grids])
        grid = self.grids[int(rng.choice(len(self.grids), p=shares / shares.sum()))]
        first = step * max(grid.batch for grid in self.grids)
        scan = self._scan(self._train[grid.size], range(first, first + grid.batch), grid, views, dose)
        result = self._run(scan)
        count = len(result.iterates)
        weights = [_EARLIER ** (count - 1 - n) for n in range(count)]
        loss = sum(
            weight * _error(image, scan.wanted) for weight, image in zip(weights, result.iterates, strict=True)
        ) / sum(weights)
        missed = (result.images - scan.wanted).detach().abs()
        return loss + _SCALE_WEIGHT * (result.scale.log() + missed / result.scale).mean()

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """PSNR (2,000 HU) on held-out chests with each number of views, without noise, over whole images."""
        if self._held_out is None:
            return {}
        found = {}
        for views in sorted(set(self.views)):
            scan = self._scan(self._held_out, range(8), self.scored, views, None)
            wanted = scan.wanted.clamp(max=_BRIGHTEST)
            for name, images in (("start", scan.measured.start), ("psnr", self._run(scan).images)):
                square = (images.clamp(0, _BRIGHTEST) - wanted).square().mean(dim=(1, 2))
                found[f"{name} {views}"] = float((10 * torch.log10(_BRIGHTEST**2 / square)).mean())
        return found

    def _run(self, scan: _Scan) -> UnrolledResult:
        with torch.autocast(scan.wanted.device.type, torch.bfloat16):
            return self.network(scan.measured, scan.projector)

    def _scan(self, sampler: ImageSampler, numbers: range, on: _Grid, views: int, dose: Dose | None) -> _Scan:
        device = next(self.network.parameters()).device
        wanted = torch.cat([sampler(number) for number in numbers]).to(device) / 1000 + 1
        grid = ImageGrid(on.size, on.size, on.field_mm / on.size)
        projector = Projector(grid, ParallelBeam.around(grid, views))
        rays = projector.forward(wanted * WATER_PER_MM)
        if dose is None:
            return _Scan(wanted, UnrolledInput.of(rays, projector), projector)
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + numbers.start)
        noisy = measure(rays, dose, generator)
        told = UnrolledInput.of(noisy, projector, dose.unattenuated(noisy), dose.electronic_noise)
        return _Scan(wanted, told, projector)


def _error(image: Tensor, wanted: Tensor) -> Tensor:
    """Charbonnier: square for small errors, which PSNR counts, straight for large ones."""
    return ((image - wanted).square() + _SOFT**2).sqrt().mean() - _SOFT + 2.0 * (image - wanted).square().mean()
