"""Chests scanned with few views, with and without quantum noise: what sparse-view reconstruction is trained on.

The nets that are compared see the same samples: a step's slices, views, noise and size are a function of the seed and
the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from LCTfoundLib.networks.unrolled import UnrolledInput
from LCTfoundLib.physics.geometry import FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.noise import Dose, measure
from LCTfoundLib.physics.projector import Projector
from training.restoration import ImageSampler, slice_psnr
from training.shard_stream import Augmentation, Mixture

__all__ = ["Scan", "ScanGrid", "ScanTask", "SparseScans", "soft_error"]

#: Error below which the loss is square, in units of water: 20 HU.
_SOFT = 0.02


@dataclass(frozen=True)
class ScanGrid:
    """Images of one size, ``batch`` of them a step, in a share of the steps. Small ones cost little and teach most."""

    size: int
    field_mm: float
    share: float
    batch: int

    @property
    def image(self) -> ImageGrid:
        return ImageGrid(self.size, self.size, self.field_mm / self.size)


def a_fan(grid: ImageGrid, views: int) -> FanBeam:
    """Over a full turn; channels of a pixel's width at the isocenter, with the quarter shift.

    One geometry for a grid and a number of views, so that its matrices are kept.
    """
    near, far = FanBeam.source_isocenter_mm, FanBeam.source_detector_mm
    channels = 2 * math.ceil(near * math.asin(grid.circle_mm / near) / grid.pixel_mm) + 4
    return FanBeam((0.0,), channels, grid.pixel_mm * far / near, 0.25, near, far).sparse(views)


@dataclass
class Scan:
    """A batch: the slices in units of water (N, H, W), and what a scanner measured of them."""

    wanted: Tensor
    measured: UnrolledInput
    projector: Projector


class SparseScans:
    """Batches of scans.

    Args:
        config: the parsed TOML file.
        mixture, held_out: of shards.
    """

    def __init__(self, config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> None:
        data = config["data"]
        self.seed = int(config.get("seed", 0))
        self.grids = [ScanGrid(**values) for values in data["grids"]]
        self.scored = next(grid for grid in self.grids if grid.size == int(data["scored"]))
        self.views, self.noisy = [int(n) for n in data["views"]], float(data["noisy"])
        self.photons = tuple(float(n) for n in data["photons"])
        self.fans = float(data.get("fans", 0.0))
        sizes = {grid.size: Augmentation(grid.size, grid.size) for grid in self.grids}
        self._train = {size: ImageSampler(mixture, each, self.seed) for size, each in sizes.items()}
        whole = sizes[self.scored.size]
        self._held_out = ImageSampler(held_out, whole, 9_999_999) if held_out else None

    def of_step(self, step: int, device: torch.device) -> Scan:
        """The batch of a step of the training."""
        rng = np.random.default_rng([self.seed, step, 2])
        views = self.views[int(rng.integers(len(self.views)))]
        noisy = rng.random() < self.noisy
        dose = Dose(float(np.exp(rng.uniform(*np.log(self.photons))))) if noisy else None
        shares = np.array([grid.share for grid in self.grids])
        grid = self.grids[int(rng.choice(len(self.grids), p=shares / shares.sum()))]
        first = step * max(grid.batch for grid in self.grids)
        image = grid.image
        beam = a_fan(image, views) if rng.random() < self.fans else ParallelBeam.around(image, views)
        numbers = range(first, first + grid.batch)
        return self._scan(self._train[grid.size], numbers, Projector(image, beam), dose, device)

    def held_out(self, count: int, views: int, dose: Dose | None, device: torch.device) -> Scan | None:
        """The first slices that nothing is trained on; None without any."""
        if self._held_out is None:
            return None
        image = self.scored.image
        projector = Projector(image, ParallelBeam.around(image, views))
        return self._scan(self._held_out, range(count), projector, dose, device)

    def scores(self, reconstruct: Callable[[Scan], Tensor], device: torch.device) -> dict[str, float]:
        """PSNR (2,000 HU) on held-out chests with each number of views, without noise, over whole images."""
        found = {}
        for views in sorted(set(self.views)):
            scan = self.held_out(8, views, None, device)
            if scan is None:
                return {}
            for name, images in (("start", scan.measured.start), ("psnr", reconstruct(scan))):
                found[f"{name} {views}"] = slice_psnr(images, scan.wanted)
        return found

    def _scan(
        self,
        sampler: ImageSampler,
        numbers: range,
        projector: Projector,
        dose: Dose | None,
        device: torch.device,
    ) -> Scan:
        wanted = torch.cat([sampler(number) for number in numbers]).to(device) / 1000 + 1
        rays = projector.forward(wanted * WATER_PER_MM)
        if dose is None:
            return Scan(wanted, UnrolledInput.of(rays, projector), projector)
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + numbers.start)
        noisy = measure(rays, dose, generator)
        told = UnrolledInput.of(noisy, projector, dose.unattenuated(noisy), dose.electronic_noise)
        return Scan(wanted, told, projector)


class ScanTask:
    """What the trainings of networks on such scans share.

    Args:
        network: trained; called with what was measured and the projector.
        scans: that it is trained on.
    """

    def __init__(self, network: nn.Module, scans: SparseScans) -> None:
        self.network, self.scans = network, scans

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def run(self, scan: Scan) -> Any:
        """What the network answers."""
        with torch.autocast(scan.wanted.device.type, torch.bfloat16):
            return self.network(scan.measured, scan.projector)

    def images(self, scan: Scan) -> Tensor:
        """Of the answer, in units of water, (N, H, W)."""
        return self.run(scan)

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """See ``SparseScans.scores``."""
        return self.scans.scores(self.images, self.device)


def soft_error(image: Tensor, wanted: Tensor) -> Tensor:
    """Charbonnier: square for small errors, which PSNR counts, straight for large ones."""
    return ((image - wanted).square() + _SOFT**2).sqrt().mean() - _SOFT + 2.0 * (image - wanted).square().mean()
