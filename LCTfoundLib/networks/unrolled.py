"""Sparse-view reconstruction by an unrolled network: a learned image prior and the measurements take turns.

It begins at the image of total variation, which costs no training. Each of a few iterations restores the image
(``RestorationNet``, one for all iterations, told which one it is) and then brings it near to the sinogram by some steps
of conjugate gradients on

    |A x - y|^2 + rho |A|^2 |x - restored|^2,

begun at the restored image, with a trained rho per iteration that the noise and the number of views may change. That is
MoDL (Aggarwal et al., IEEE T-MI 38 (2019) 394) with the filtered back-projection beside the current image as in LEARN
(Chen et al., T-MI 37 (2018) 1333). The net's second channel tells how far the answer may be off: the scale of a Laplace
distribution of each pixel's error.

Images are in units of water (0 in air, 1 in water): where nothing is, nothing has to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.networks.restoration import RestorationConfig, RestorationNet, load_restorer
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import (
    conjugate_gradient,
    filtered_back_projection,
    poisson_weights,
    total_variation_reconstruction,
)
from LCTfoundLib.weights.registry import Card

__all__ = [
    "UNROLLED_WEIGHT",
    "UnrolledConfig",
    "UnrolledInput",
    "UnrolledNet",
    "UnrolledResult",
    "load_unrolled",
    "operator_norm",
]

#: Name of the shipped weight.
UNROLLED_WEIGHT = "sparse_view"

#: What the net is told: iteration, logarithms of the views, of the noise and of the pixel.
_NUMBERS = 4
#: The image now, before the measurements corrected it, and the filtered back-projection.
_SEEN = 3
#: Views that count as "one" on the logarithmic scale.
_REFERENCE_VIEWS = 16
#: Edge of the pixel that counts as "one", mm: a chest on 256 pixels.
_REFERENCE_PIXEL_MM = 1.5
#: Deviation of the noise in a line integral at which it begins to count.
_REFERENCE_NOISE = 0.02
#: Strength of total variation, of a pixel's edge, for rays without noise; iterations of the image to begin with. At 8
#: to 64 views of real chests .1 and .6 are worse; twice as many iterations gain another 7 to 11 %.
_TV_STRENGTH, _TV_ITERATIONS = 0.3, 60
#: Smallest scale of the error, in units of water: 1 HU.
_LEAST_SCALE = 1e-3
#: Of the answer 0, before ``softplus``: a scale of 50 HU.
_FIRST_SCALE = -3.0


@dataclass(frozen=True)
class UnrolledConfig:
    """Shape of an ``UnrolledNet``.

    Attributes:
        iterations: of prior and measurements.
        steps: of conjugate gradients in each.
        prior: the restoring net's channels and blocks.
    """

    iterations: int = 5
    steps: int = 4
    prior: RestorationConfig = field(default_factory=lambda: RestorationConfig(_SEEN, 2, _NUMBERS))

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.steps < 1:
            raise ValueError(f"{self.iterations} iterations of {self.steps} steps")
        if (self.prior.in_channels, self.prior.out_channels, self.prior.numbers) != (_SEEN, 2, _NUMBERS):
            raise ValueError("the prior sees three images and four numbers and answers with two")

    def to_dict(self) -> dict[str, Any]:
        return {"iterations": self.iterations, "steps": self.steps, "prior": self.prior.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnrolledConfig:
        """From a card."""
        return cls(int(values["iterations"]), int(values["steps"]), RestorationConfig.from_dict(values["prior"]))


@dataclass
class UnrolledInput:
    """What an ``UnrolledNet`` needs of a scan of N slices.

    Attributes:
        sinograms: line integrals in units of water (mm of water), (N, views, detectors).
        start: their filtered back-projection, in units of water, (N, H, W).
        noise: standard deviation of the noise in a line integral (without unit: before it is told in mm of water), of
            the median ray of each slice, (N,).
        weights: of the rays, as ``poisson_weights``, 1 in the mean of a slice; None without noise.
    """

    sinograms: Tensor
    start: Tensor
    noise: Tensor
    weights: Tensor | None

    @classmethod
    def of(
        cls,
        line_integrals: Tensor,
        projector: Projector,
        photons: Tensor | float | None = None,
        electronic_noise: float = 0.0,
        water_per_mm: float = WATER_PER_MM,
    ) -> UnrolledInput:
        """Of measured line integrals.

        Args:
            line_integrals: (N, views, detectors), without unit.
            projector: of their geometry.
            photons: of the rays in air, a number or what broadcasts to the rays; None for rays without noise.
            electronic_noise: standard deviation, in photons.
            water_per_mm: attenuation of water, 1/mm.

        Raises:
            UnsuitableProjections: they do not match, or hold no numbers.
        """
        sinograms = line_integrals / water_per_mm
        start = filtered_back_projection(projector, sinograms)
        if photons is None:
            return cls(sinograms, start, torch.zeros_like(start[:, 0, 0]), None)
        weights = poisson_weights(line_integrals, photons, electronic_noise)
        noise = weights.flatten(1).median(dim=1).values.rsqrt()
        return cls(sinograms, start, noise, weights / weights.mean(dim=(1, 2), keepdim=True))

    @property
    def relative_noise(self) -> Tensor:
        """In units of the deviation at which it begins to count, (N,)."""
        return self.noise / _REFERENCE_NOISE

    def smooth(
        self,
        projector: Projector,
        iterations: int = _TV_ITERATIONS,
        begin: Tensor | None = None,
        share: float = 1.0,
        progress: Callable[[float], object] | None = None,
    ) -> Tensor:
        """The image of little total variation, in units of water, (N, H, W).

        Args:
            projector: of the scan.
            iterations: few of them stay near to where they begin.
            begin: image to begin at; default: the filtered back-projection.
            share: of the usual strength.
            progress: told the share done.
        """
        beam, pixel_mm = projector.beam, projector.grid.pixel_mm
        # Channels closer than pixels weigh the measurements more, in sum, and not because they tell more.
        density = pixel_mm * beam.detectors / (2 * beam.field_mm)
        strength = share * _TV_STRENGTH * density * pixel_mm * (1.0 + self.relative_noise)[:, None, None]
        image = (self.start if begin is None else begin).clamp(min=0)
        return total_variation_reconstruction(
            projector, self.sinograms, strength, image, iterations, self.weights, progress=progress
        )


@dataclass
class UnrolledResult:
    """Answer of an ``UnrolledNet``.

    Attributes:
        images: in units of water, (N, H, W).
        scale: of a Laplace distribution of the error of each pixel, in the same units, (N, H, W).
        iterates: the image after each iteration, the last one being ``images``.
    """

    images: Tensor
    scale: Tensor
    iterates: list[Tensor]


class UnrolledNet(nn.Module):
    """The network of an ``UnrolledConfig``, for any projector."""

    def __init__(self, config: UnrolledConfig) -> None:
        super().__init__()
        self.config = config
        self.prior = RestorationNet(config.prior)
        #: Logarithm of rho per iteration: constant, per doubling of the views, per unit of the noise's logarithm.
        self.trust = nn.Parameter(torch.tensor([[math.log(0.05), 0.0, 1.0]]).repeat(config.iterations, 1))

    def forward(self, scan: UnrolledInput, projector: Projector) -> UnrolledResult:
        """Reconstruct the slices of a scan, whose geometry is the projector's."""
        start = scan.start
        count = len(start)
        views = start.new_full((count,), math.log2(projector.beam.views / _REFERENCE_VIEWS))
        told = torch.stack([torch.ones_like(views), views, torch.log1p(scan.relative_noise)], dim=1)
        pixel = told.new_full((count, 1), math.log2(projector.grid.pixel_mm / _REFERENCE_PIXEL_MM))
        square = operator_norm(projector) ** 2
        with torch.no_grad():
            x = before = scan.smooth(projector)
        scale, iterates = torch.zeros_like(start), []
        for number in range(self.config.iterations):
            place = told.new_full((count, 1), number / max(self.config.iterations - 1, 1))
            numbers = torch.cat([place, told[:, 1:], pixel], dim=1)
            seen = torch.stack([x, before, start], dim=1).contiguous(memory_format=torch.channels_last)
            change, scale = self.prior(seen, numbers).float().unbind(dim=1)
            before = x + change
            strength = square * (told @ self.trust[number]).exp()[:, None, None]
            x = conjugate_gradient(
                projector,
                scan.sinograms,
                iterations=self.config.steps,
                prior=before,
                strength=strength,
                weights=scan.weights,
            )
            iterates.append(x)
        return UnrolledResult(x, F.softplus(scale + _FIRST_SCALE) + _LEAST_SCALE, iterates)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def load_unrolled(name: str = UNROLLED_WEIGHT, folder: Path | None = None) -> tuple[UnrolledNet, Card]:
    """A trained net, in evaluation mode, and its card.

    Raises:
        WeightError: missing or damaged weight, or of another network.
    """
    return load_restorer(name, folder, lambda shape: UnrolledNet(UnrolledConfig.from_dict(shape)))


def operator_norm(projector: Projector, iterations: int = 12) -> float:
    """Largest singular value of the projector, by the power method from a flat image; kept with the projector.

    A projector has only values above 0, so that a flat image is not orthogonal to what is sought (Perron, Frobenius).
    """
    known = projector.__dict__.get("_norm")
    if known is None:
        with torch.no_grad():
            image = torch.ones(1, *projector.image_shape)
            for _ in range(iterations):
                image = projector.adjoint(projector.forward(image))
                size = float(image.norm())
                image = image / size
        known = projector.__dict__["_norm"] = math.sqrt(size)
    return known
