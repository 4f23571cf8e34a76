"""Image-conditioned generation: a slice guides the diffusion of another, as the non-contrast one does a virtual CTA.

The condition enters through a :class:`~LCTfoundLib.networks.side_branch.SideBranch`. The alternative, more input
channels on ``conv_in`` that start at zero, is smaller (864 values for ``student``) but can do little on a frozen
backbone, whose encoder has never looked at them, and so means a full fine-tune, as large as the backbone. The branch
has 0.6 % of the values of ``paper`` (14 % of ``student``), leaves the resident backbone to the other adapters, and
cannot forget what the backbone knows; the published recipe, a fine-tuned model, is the same class after
:meth:`Adapter.tune`. The published window of virtual CTA, -200 to 200 HU, is the mediastinal one, in which the backbone
was pretrained.

What comes out is synthetic: it shows what contrast might look like, not what it would have shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from LCTfoundLib.networks.adapter_base import Adapter, BackboneShape, repeated
from LCTfoundLib.networks.backbone import CHANNELS
from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.side_branch import SideBranch, predict_beside

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["ImageCondition"]


class ImageCondition(Adapter):
    """Generates the slice that belongs to a slice."""

    def __init__(self, needs: BackboneShape, width: int = 32, steps: int = 25) -> None:
        """Fresh values: the answer is the backbone's own, whatever the condition.

        Args:
            needs: shape of the backbone.
            width: of the branch's finest level.
            steps: of the sampling, 1 to 1000 (DDIM; Song et al., ICLR 2021).
        """
        super().__init__()
        if not 1 <= steps <= NoiseSchedule.steps:
            raise ValueError(f"{steps} steps")
        self.shape, self.width, self.steps = needs, width, steps
        self.branch = SideBranch(needs, CHANNELS, width)
        self.schedule = NoiseSchedule()

    @property
    def needs(self) -> BackboneShape:
        return self.shape

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, "steps": self.steps}

    @classmethod
    def from_card(cls, needs: Mapping[str, Any], arguments: Mapping[str, Any]) -> ImageCondition:
        return cls(BackboneShape.from_dict(needs), **arguments)

    def noise_in(
        self, network: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, embedding: Tensor, condition: Tensor
    ) -> Tensor:
        """The noise in the wanted slice, predicted.

        Args:
            network: the backbone, with the adapter's tensors.
            noisy: the wanted slice with noise, (N, 3, H, W).
            timesteps: of the noise, (N,).
            embedding: of the wanted slice's condition (its window), (N, 1, 768).
            condition: the given slice, (N, 3, H, W), -1..1.
        """
        return predict_beside(network, self.branch, noisy, timesteps, embedding, condition)

    def answer(self, network: UNet2DConditionModel, images: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        """The slices that belong to ``images``, from ``noise``: (N, 3, H, W), -1..1.

        Deterministic for a given noise. The estimate of the clean slice is kept within -1..1 at every step, which is
        where slices are.
        """
        spaced = torch.linspace(NoiseSchedule.steps - 1, 0, self.steps).round().long().tolist()
        x = noise
        for place, step in enumerate(spaced):
            predicted = self.noise_in(network, x, repeated(step, images), embedding, images)
            clean = ((x - self.schedule.noise[step] * predicted) / self.schedule.signal[step]).clamp(-1.0, 1.0)
            if place + 1 == len(spaced):
                return clean
            predicted = (x - self.schedule.signal[step] * clean) / self.schedule.noise[step]
            below = spaced[place + 1]
            x = self.schedule.signal[below] * clean + self.schedule.noise[below] * predicted
        raise AssertionError("at least one step")  # the constructor checks
