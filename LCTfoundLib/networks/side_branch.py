"""A small convolutional branch that tells a frozen backbone about a second image.

It runs beside the backbone's encoder, and adds a map to each of the maps that go from encoder to decoder and to the
deepest one, through 1x1 convolutions that start at zero: before any training the backbone answers as if it were not
there. After ControlNet (Zhang et al., ICCV 2023, arXiv 2302.05543), which copies the whole encoder for it, and
T2I-Adapter (Mou et al., AAAI 2024, arXiv 2302.08453), which shows that a few convolutions will do. Unlike
T2I-Adapter's it knows the timestep, through the backbone's own embedding: how much of the second image helps depends on
how much of the first is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.networks.adapter_base import BackboneShape, embedded_time

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["SideBranch", "predict_beside"]

#: A level is at most this many times as wide as the first.
_WIDEST = 4


class SideBranch(nn.Module):
    """From an image to what is added to the backbone's maps."""

    def __init__(self, shape: BackboneShape, channels: int, width: int = 32) -> None:
        """Fresh values; the answer is zero.

        Args:
            shape: of the backbone.
            channels: of the image.
            width: of the finest level; coarser ones have up to four times as many.
        """
        super().__init__()
        self.skips = shape.skips
        widths = [width * min(2**level, _WIDEST) for level in range(len(shape.widths))]
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.time = nn.ModuleList(nn.Linear(shape.time_channels, 2 * each) for each in widths)
        self.mix = nn.ModuleList(nn.Conv2d(each, each, 3, padding=1) for each in widths)
        self.down = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
            for fine, coarse in zip(widths[:-1], widths[1:], strict=True)
        )
        self.out = nn.ModuleList(_zero(nn.Conv2d(widths[level], wide, 1)) for level, wide in self.skips)
        self.out_deep = _zero(nn.Conv2d(widths[-1], shape.widths[-1], 1))
        for linear in self.time:
            _zero(linear)

    def forward(self, image: Tensor, time: Tensor) -> tuple[list[Tensor], Tensor]:
        """What to add.

        Args:
            image: (N, channels, H, W), H and W multiples of 16.
            time: the backbone's embedding of the timestep, (N, time channels).

        Returns:
            For each map from encoder to decoder (N, C, h, w), and for the deepest.
        """
        told, x, levels = F.silu(time), self.stem(image), []
        for level, (modulate, mix) in enumerate(zip(self.time, self.mix, strict=True)):
            if level:
                x = self.down[level - 1](F.silu(x))
            scale, shift = modulate(told)[:, :, None, None].chunk(2, dim=1)
            x = x + mix(F.silu(x * (1 + scale) + shift))
            levels.append(F.silu(x))
        added = [out(levels[level]) for out, (level, _) in zip(self.out, self.skips, strict=True)]
        return added, self.out_deep(levels[-1])


def predict_beside(
    network: UNet2DConditionModel,
    branch: SideBranch,
    images: Tensor,
    timesteps: Tensor,
    embedding: Tensor,
    second: Tensor,
) -> Tensor:
    """The backbone's output with a branch beside it.

    Args:
        network: the backbone.
        branch: beside it.
        images: the backbone's input (N, 3, H, W).
        timesteps: (N,).
        embedding: of the condition, (N, 1, 768).
        second: the branch's image (N, channels, H, W).

    Returns:
        (N, channels of the output layer, H, W).
    """
    added, deep = branch(second, embedded_time(network, timesteps, second))
    return network(
        images,
        timesteps,
        encoder_hidden_states=embedding,
        down_block_additional_residuals=added,
        mid_block_additional_residual=deep,
    ).sample


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
