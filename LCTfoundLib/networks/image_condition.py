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

from torch import Tensor

from LCTfoundLib.networks.adapter_base import Adapter, BackboneShape, repeated
from LCTfoundLib.networks.backbone import CHANNELS
from LCTfoundLib.networks.features import NoiseSchedule, Prediction
from LCTfoundLib.networks.sampling import Sampler, denoise
from LCTfoundLib.networks.side_branch import SideBranch, predict_beside

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["ImageCondition"]


class ImageCondition(Adapter):
    """Generates the slice that belongs to a slice."""

    def __init__(
        self,
        needs: BackboneShape,
        width: int = 32,
        steps: int = 25,
        prediction: Prediction | str = Prediction.EPSILON,
    ) -> None:
        """Fresh values: the answer is the backbone's own, whatever the condition.

        Args:
            needs: shape of the backbone.
            width: of the branch's finest level.
            steps: of the sampling, 1 to 1000 (DDIM).
            prediction: what the backbone answers.
        """
        super().__init__()
        if not 1 <= steps <= NoiseSchedule.steps:
            raise ValueError(f"{steps} steps")
        self.shape, self.width, self.steps = needs, width, steps
        self.branch = SideBranch(needs, CHANNELS, width)
        self.schedule, self.prediction = NoiseSchedule(), Prediction(prediction)

    @property
    def needs(self) -> BackboneShape:
        return self.shape

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, "steps": self.steps, "prediction": str(self.prediction)}

    @classmethod
    def from_card(cls, needs: Mapping[str, Any], arguments: Mapping[str, Any]) -> ImageCondition:
        return cls(BackboneShape.from_dict(needs), **arguments)

    def predict(
        self, network: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, embedding: Tensor, condition: Tensor
    ) -> Tensor:
        """What the guided backbone answers: the noise in the wanted slice, or v.

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

        Deterministic for a given noise.
        """

        def noise_in(noisy: Tensor, step: int) -> Tensor:
            timesteps = repeated(step, noisy)
            answer = self.predict(network, noisy, timesteps, embedding, images)
            return self.schedule.noise_in(noisy, answer, timesteps, self.prediction)

        return denoise(noise_in, noise, Sampler.DDIM, self.steps)
