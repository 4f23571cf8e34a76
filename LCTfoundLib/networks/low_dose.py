"""Low-dose CT made quiet in one step: a restoring net that is told how much noise there is and how fine it is.

It sees a slice between the ones below and above it, whose noise is independent of its own, and answers the correction
of the slice and, as the unrolled reconstruction does, how far that may be off: the scale of a Laplace distribution of
each pixel's error. Both answers are in units of the noise, so that one net serves all doses: what it has learned at one
holds, scaled, at another.

Slices are in units of water (HU / 1000 + 1): where nothing is, nothing has to be learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.networks.restoration import RestorationConfig, RestorationNet, load_restorer
from LCTfoundLib.physics.noise import Kernel, noise_transfer
from LCTfoundLib.weights.registry import Card

__all__ = [
    "LOW_DOSE_SHAPE",
    "LOW_DOSE_WEIGHT",
    "REGION",
    "LowDoseAnswer",
    "LowDoseNet",
    "load_low_dose",
    "noise_fineness",
]

#: Name of the shipped weight.
LOW_DOSE_WEIGHT = "low_dose"
#: The slice between its neighbors; correction and scale; logarithm of the noise, fineness. 1.28 M parameters.
LOW_DOSE_SHAPE = RestorationConfig(3, 2, 2, channels=(40, 72, 104), blocks=(2, 2, 3))

#: HU of noise whose logarithm counts as 0, and a fineness that does, with the half of what it varies by.
_REFERENCE_HU, _REFERENCE_FINENESS, _FINENESS_RANGE = 30.0, 0.45, 0.15
#: Pixels of the regions that tell an image's fineness: flat tissue is seldom wider.
REGION = 16
#: Less noise than this, HU, is told as this: no CT has less.
_LEAST_NOISE_HU = 1.0
#: Smallest scale of the error, in units of water: 1 HU.
_LEAST_SCALE = 1e-3
#: Of the answer 0, before ``softplus``: a scale of a third of the noise.
_FIRST_SCALE = -1.0


@dataclass
class LowDoseAnswer:
    """Answer of a ``LowDoseNet``.

    Attributes:
        images: the slices without their noise, in units of water, (N, H, W).
        scale: of a Laplace distribution of the error of each pixel, in the same units, (N, H, W).
    """

    images: Tensor
    scale: Tensor


class LowDoseNet(nn.Module):
    """The network of a ``RestorationConfig``.

    Raises:
        ValueError: it does not see three slices and two numbers, or does not answer with two images.
    """

    def __init__(self, config: RestorationConfig = LOW_DOSE_SHAPE) -> None:
        super().__init__()
        wanted = LOW_DOSE_SHAPE.in_channels, LOW_DOSE_SHAPE.out_channels, LOW_DOSE_SHAPE.numbers
        if (config.in_channels, config.out_channels, config.numbers) != wanted:
            raise ValueError("the net sees three slices and two numbers and answers with two images")
        self.config = config
        self.restorer = RestorationNet(config)

    def forward(self, slices: Tensor, sigma_hu: Tensor, fineness: Tensor) -> LowDoseAnswer:
        """Take the noise out of slices of any size.

        Args:
            slices: each between the ones below and above it, in units of water, (N, 3, H, W).
            sigma_hu: standard deviation of the noise in soft tissue, HU, (N,) or (1,).
            fineness: of the noise, see ``noise_fineness``, (N,) or (1,).
        """
        sigma_hu = sigma_hu.clamp(min=_LEAST_NOISE_HU)
        numbers = [(sigma_hu / _REFERENCE_HU).log(), (fineness - _REFERENCE_FINENESS) / _FINENESS_RANGE]
        seen = slices.contiguous(memory_format=torch.channels_last)
        correction, scale = self.restorer(seen, torch.stack(numbers, dim=1)).float().unbind(dim=1)
        sigma = sigma_hu[:, None, None] / 1000
        return LowDoseAnswer(slices[:, 1] + sigma * correction, sigma * F.softplus(scale + _FIRST_SCALE) + _LEAST_SCALE)

    @property
    def parameter_count(self) -> int:
        return self.restorer.parameter_count


def noise_fineness(kernel: Kernel, pitch_mm: float, pixel_mm: float) -> float:
    """Mean frequency of the noise that a kernel leaves, as a share of the highest that the pixels carry.

    Soft kernels have about 0.3, sharp ones 0.6. It is what ``NoisePowerSpectrum.mean_frequency`` tells of regions of
    ``REGION`` pixels: the mean over their rings, of which the first loses half of its power to the region's trend
    (measured; the two agree to 0.02).

    Args:
        kernel: of the reconstruction.
        pitch_mm: between channels at the isocenter.
        pixel_mm: edge of a pixel.
    """
    share = torch.arange(1, REGION // 2 + 1, dtype=torch.float64) / (REGION // 2)
    power = noise_transfer(share / (2 * pixel_mm), kernel, pitch_mm).square()
    power[0] /= 2
    return float((share * power).sum() / power.sum())


def load_low_dose(name: str = LOW_DOSE_WEIGHT, folder: Path | None = None) -> tuple[LowDoseNet, Card]:
    """A trained net, in evaluation mode, and its card.

    Raises:
        WeightError: missing or damaged weight, or of another network.
    """
    return load_restorer(name, folder, lambda shape: LowDoseNet(RestorationConfig.from_dict(shape)))
