"""Sparse-view reconstruction by an unrolled network: a learned image prior and the measurements take turns.

Each of a few iterations restores the image (``RestorationNet``, one for all iterations, told which one it is) and then
brings it near to the sinogram by some steps of conjugate gradients on

    |A x - y|^2 + rho |A|^2 |x - restored|^2,

begun at the restored image, with a trained rho per iteration that the noise and the number of views may change. That is
MoDL (Aggarwal et al., IEEE T-MI 38 (2019) 394) with the starting image beside the current one as in LEARN (Chen et al.,
T-MI 37 (2018) 1333). The net's second channel tells how far the answer may be off: the scale of a Laplace distribution
of each pixel's error.

Images are in units of water (0 in air, 1 in water): where nothing is, nothing has to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.networks.restoration import RestorationConfig, RestorationNet
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import conjugate_gradient

__all__ = ["UnrolledConfig", "UnrolledNet", "UnrolledResult", "operator_norm"]

#: What the net is told: iteration, logarithm of the views, noise.
_NUMBERS = 3
#: The image now, before the measurements corrected it, and the one it began with.
_SEEN = 3
#: Views that count as "one" on the logarithmic scale.
_REFERENCE_VIEWS = 16
#: Deviation of the noise in a line integral that counts as "one".
_REFERENCE_NOISE = 0.02
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

    iterations: int = 6
    steps: int = 4
    prior: RestorationConfig = field(default_factory=lambda: RestorationConfig(_SEEN, 2, _NUMBERS))

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.steps < 1:
            raise ValueError(f"{self.iterations} iterations of {self.steps} steps")
        if (self.prior.in_channels, self.prior.out_channels, self.prior.numbers) != (_SEEN, 2, _NUMBERS):
            raise ValueError("the prior sees three images and three numbers and answers with two")

    def to_dict(self) -> dict[str, Any]:
        return {"iterations": self.iterations, "steps": self.steps, "prior": self.prior.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnrolledConfig:
        """From a card."""
        return cls(int(values["iterations"]), int(values["steps"]), RestorationConfig.from_dict(values["prior"]))


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
        #: Logarithm of rho per iteration: constant, per doubling of the views, per unit of noise.
        self.trust = nn.Parameter(torch.tensor([[math.log(0.05), 0.0, 0.5]]).repeat(config.iterations, 1))

    def forward(self, sinograms: Tensor, start: Tensor, projector: Projector, noise: float = 0.0) -> UnrolledResult:
        """Reconstruct.

        Args:
            sinograms: line integrals in units of water (mm of water), (N, views, detectors).
            start: an image to begin with, (N, H, W), in units of water, such as a filtered backprojection.
            projector: of the sinograms.
            noise: standard deviation of the noise in a line integral (without unit: before it is told in mm of water).
        """
        views = math.log2(projector.beam.views / _REFERENCE_VIEWS)
        told = start.new_tensor([views, noise / _REFERENCE_NOISE])
        square = operator_norm(projector) ** 2
        x = before = start
        scale, iterates = torch.zeros_like(start), []
        for number in range(self.config.iterations):
            numbers = torch.cat([start.new_tensor([number / max(self.config.iterations - 1, 1)]), told])
            seen = torch.stack([x, before, start], dim=1).contiguous(memory_format=torch.channels_last)
            change, scale = self.prior(seen, numbers[None]).float().unbind(dim=1)
            before = x + change
            rho = (self.trust[number] * torch.cat([told.new_ones(1), told])).sum().exp()
            x = conjugate_gradient(
                projector, sinograms, iterations=self.config.steps, prior=before, strength=square * rho
            )
            iterates.append(x)
        return UnrolledResult(x, F.softplus(scale + _FIRST_SCALE) + _LEAST_SCALE, iterates)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


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
