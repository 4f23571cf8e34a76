"""Full fine-tune with a replaced output layer: the published recipe of whole-lung segmentation.

All weights are tuned, ``conv_out`` becomes a layer of one channel per class, and the slice is seen as it is, at
timestep 0 only. :class:`OutputLayer` on a backbone that is not tuned is the same with the output layer alone: some
kilobytes. A full fine-tune of a classifier (published: prognosis) is any head of ``adapters.py`` after
:meth:`Adapter.tune`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from LCTfoundLib.networks.adapter_base import Adapter, BackboneShape, repeated

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["OutputLayer"]


class OutputLayer(Adapter):
    """Classes of each pixel in place of the predicted noise."""

    def __init__(self, needs: BackboneShape, classes: int) -> None:
        """Fresh values, as torch starts a convolution.

        Args:
            needs: shape of the backbone.
            classes: at least 1.
        """
        super().__init__()
        if classes < 1:
            raise ValueError(f"{classes} classes")
        self.shape, self.classes = needs, classes
        self.conv_out = nn.Conv2d(needs.widths[0], classes, 3, padding=1)

    @property
    def needs(self) -> BackboneShape:
        return self.shape

    @property
    def arguments(self) -> dict[str, Any]:
        return {"classes": self.classes}

    @classmethod
    def from_card(cls, needs: Mapping[str, Any], arguments: Mapping[str, Any]) -> OutputLayer:
        return cls(BackboneShape.from_dict(needs), **arguments)

    def replaced(self) -> dict[str, Tensor]:
        return {f"conv_out.{name}": tensor for name, tensor in self.conv_out.named_parameters()}

    def answer(self, network: UNet2DConditionModel, images: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        """Logits (N, classes, H, W); ``noise`` is of no use here."""
        return network(images, repeated(0, images), encoder_hidden_states=embedding).sample
