"""What the backbone is pretrained to do: predict noise, and fill in what was masked.

Every pretext shares one network and one output of three channels. Where the input is noisy, the target is the noise,
as published, or v. Where it is masked (0, and no noise, so that the network can tell), the target is minus the clean
image: that is v's where nothing of the image is left, and continues the noise's sign (what to subtract from the input
to come to the image). Masked denoising after MDM (Pan et al., arXiv 2308.05695); the MAE that pretraining is compared
with (He et al., CVPR 2022) is the same without noise, scored under the mask only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.networks.features import NoiseSchedule, Prediction

__all__ = ["Kind", "Pretext", "PretextSample", "masked_input", "pretext_loss"]


class Kind(IntEnum):
    """Of a sample's task."""

    NOISE = 0
    MASKED = 1
    SLICE = 2
    MAE = 3


@dataclass(frozen=True)
class Pretext:
    """Shares of the tasks among the samples; what is left is noise prediction.

    Attributes:
        masked: blocks of all channels are masked, the rest is noisy.
        slice: one of the three channels is masked; with neighboring slices, the others tell it.
        mae: blocks are masked and nothing is noisy.
        block: side of a masked block, pixels.
        cover: share of blocks masked.
        most_noise: timesteps below this for ``masked`` and ``slice``; under full noise nothing is left to fill in from.
    """

    masked: float = 0.0
    slice: float = 0.0
    mae: float = 0.0
    block: int = 16
    cover: float = 0.6
    most_noise: int = 400

    def __post_init__(self) -> None:
        shares = (self.masked, self.slice, self.mae)
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(f"the shares of the pretexts ({shares}) must be at least 0 and together at most 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Pretext:
        """Of a configuration's table."""
        return cls(**values)

    def kind(self, rng: np.random.Generator) -> Kind:
        """Draw a task."""
        ends = np.cumsum([self.masked, self.slice, self.mae])
        return (Kind.MASKED, Kind.SLICE, Kind.MAE, Kind.NOISE)[int(np.searchsorted(ends, rng.random(), side="right"))]

    def draw(
        self, shape: tuple[int, int, int], seed: tuple[int, int], most_noise: int = NoiseSchedule.steps
    ) -> PretextSample:
        """Noise, timestep and mask of a sample, from its own seed.

        Args:
            shape: of the image.
            seed: of the run, and the sample's number.
            most_noise: timesteps below this, whatever the task.
        """
        rng = np.random.default_rng([*seed, 1])
        kind = self.kind(rng)
        steps = NoiseSchedule.steps if kind is Kind.NOISE else self.most_noise
        timestep = 0 if kind is Kind.MAE else int(rng.integers(min(steps, most_noise)))
        noise = torch.from_numpy(rng.standard_normal(shape, np.float32))
        return PretextSample(kind, timestep, noise, self._mask(kind, shape, rng))

    def _mask(self, kind: Kind, shape: tuple[int, int, int], rng: np.random.Generator) -> Tensor:
        mask = torch.zeros(shape, dtype=torch.bool)
        if kind is Kind.SLICE:
            mask[int(rng.integers(shape[0]))] = True
        elif kind is not Kind.NOISE:
            rows, columns = (math.ceil(size / self.block) for size in shape[1:])
            chosen = np.zeros(rows * columns, bool)
            chosen[rng.permutation(rows * columns)[: round(self.cover * rows * columns)]] = True
            blocks = torch.from_numpy(chosen.reshape(1, rows, columns).repeat(self.block, 1).repeat(self.block, 2))
            mask |= blocks[:, : shape[1], : shape[2]]
        return mask


@dataclass
class PretextSample:
    """What is done to an image.

    Attributes:
        kind: the task.
        timestep: of the noise.
        noise: float32 (3, H, W), standard normal.
        mask: bool (3, H, W).
    """

    kind: Kind
    timestep: int
    noise: Tensor
    mask: Tensor


def masked_input(
    images: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    mask: Tensor,
    kinds: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction = Prediction.EPSILON,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the network sees, what it shall answer, and where that counts.

    Args:
        images, noise: (N, 3, H, W).
        timesteps, kinds: (N,).
        mask: bool (N, 3, H, W).
        schedule: of the noise.
        prediction: what the network answers where nothing is masked.

    Returns:
        Input, target and weight, (N, 3, H, W); an MAE sample counts under its mask only, all others everywhere.
    """
    clean = (kinds == Kind.MAE).view(-1, 1, 1, 1)
    noisy = torch.where(clean, images, schedule.add_noise(images, noise, timesteps))
    target = torch.where(mask, -images, schedule.target(images, noise, timesteps, prediction))
    weight = torch.where(clean, mask.to(images.dtype), torch.ones((), dtype=images.dtype, device=images.device))
    return torch.where(mask, torch.zeros_like(noisy), noisy), target, weight


def pretext_loss(answer: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of each sample over what counts, (N,) float32."""
    error = F.mse_loss(answer.float(), target, reduction="none") * weight
    return error.sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1)
