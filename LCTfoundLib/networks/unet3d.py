"""A small residual 3D U-Net with several softmax heads, built for fast CPU inference.

Choices and why: BatchNorm (folds into the convolution at inference; an instance norm would make a tile's answer depend
on what else lies in the tile), strided convolutions down and 2x2x2 transposed convolutions up (the only resampling
operations with a fast channels-last bfloat16 path on CPUs), most channels at low resolution where context is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UNet3D", "UNet3DConfig", "fuse_batch_norm"]


@dataclass(frozen=True)
class UNet3DConfig:
    """Shape of a ``UNet3D``.

    Attributes:
        in_channels: input channels.
        heads: classes per softmax head; the outputs of all heads are concatenated along channels.
        channels: features per level, finest first.
        blocks: residual blocks per encoder level.
        auxiliary: decoder levels (1 = half resolution, ...) that also predict in training (deep supervision).
    """

    in_channels: int
    heads: tuple[int, ...]
    channels: tuple[int, ...] = (16, 32, 64, 96, 128)
    blocks: tuple[int, ...] = (1, 1, 2, 2, 2)
    auxiliary: tuple[int, ...] = (1, 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNet3DConfig:
        """From a card's JSON, where tuples are lists."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    @property
    def divisor(self) -> int:
        """Every spatial size of the input is a multiple of this."""
        return 2 ** (len(self.channels) - 1)

    @property
    def out_channels(self) -> int:
        return sum(self.heads)


class _ConvNormAct(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False),
            nn.BatchNorm3d(outputs),
            nn.LeakyReLU(0.01, inplace=True),
        )


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _ConvNormAct(channels, channels)
        self.second = nn.Sequential(nn.Conv3d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm3d(channels))
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.first(x)) + x)


class UNet3D(nn.Module):
    """The network of ``UNet3DConfig``.

    ``forward`` takes (N, in_channels, K, J, I) and returns logits (N, sum(heads), K, J, I); in training mode with
    auxiliary levels it returns a list, full resolution first.
    """

    def __init__(self, config: UNet3DConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        # The finest level costs most and sees least: one plain convolution instead of a residual block when blocks = 0.
        self.stem = _ConvNormAct(config.in_channels, channels[0])
        self.encoders = nn.ModuleList(
            nn.Sequential(*(_ResidualBlock(width) for _ in range(count)))
            for width, count in zip(channels, config.blocks, strict=True)
        )
        self.downs = nn.ModuleList(
            _ConvNormAct(fine, coarse, 3, 2) for fine, coarse in zip(channels[:-1], channels[1:], strict=True)
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(coarse, fine, 2, 2) for fine, coarse in zip(channels[:-1], channels[1:], strict=True)
        )
        self.decoders = nn.ModuleList(_ConvNormAct(2 * width, width) for width in channels[:-1])
        self.head = nn.Conv3d(channels[0], config.out_channels, 1)
        self.auxiliary_heads = nn.ModuleDict(
            {str(level): nn.Conv3d(channels[level], config.out_channels, 1) for level in config.auxiliary}
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips: list[Tensor] = []
        x = self.stem(x)
        for level, encoder in enumerate(self.encoders):
            x = encoder(x)
            if level < len(self.downs):
                skips.append(x)
                x = self.downs[level](x)
        auxiliary: list[Tensor] = []
        for level in reversed(range(len(self.downs))):
            x = self.decoders[level](torch.cat([self.ups[level](x), skips[level]], dim=1))
            if self.training and str(level) in self.auxiliary_heads:
                auxiliary.append(self.auxiliary_heads[str(level)](x))
        logits = self.head(x)
        return [logits, *reversed(auxiliary)] if auxiliary else logits

    def split(self, logits: Tensor) -> Sequence[Tensor]:
        """The heads' logits, each (N, classes, ...)."""
        return torch.split(logits, list(self.config.heads), dim=1)

    def inference_state_dict(self) -> dict[str, Tensor]:
        """The weights without the auxiliary heads, which serve training only."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("auxiliary_heads.")}


def fuse_batch_norm(network: UNet3D) -> UNet3D:
    """Fold every BatchNorm that follows a convolution into it (in place, for inference; the same function)."""
    network.eval()
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential) and len(module) >= 2:
            convolution, norm = module[0], module[1]
            if isinstance(convolution, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
                module[0] = nn.utils.fusion.fuse_conv_bn_eval(convolution, norm)
                module[1] = nn.Identity()
    return network
