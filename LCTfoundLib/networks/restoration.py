"""A 2D residual U-Net that restores images, told in numbers how they were spoiled.

Choices and why: no normalization (HU are absolute, and a layer that divides by the image's own deviation forgets them);
pixels are folded 2 x 2 into channels first, since at full resolution most of the time would go into a few channels;
numbers (views, dose, noise, iteration) scale and shift every block (FiLM; Perez et al., AAAI 2018); the output starts
at zero, so that before any training nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.errors import WeightError
from LCTfoundLib.weights.registry import Card, load_weight

__all__ = ["RestorationConfig", "RestorationNet", "as_numbers", "load_restorer"]

_Network = TypeVar("_Network", bound=nn.Module)

#: Side of the squares of pixels that become channels.
_FOLD = 2
#: A block adds little at first; not nothing, since the output starts at zero, and behind two zeros nothing learns.
_BRANCH = 0.3


@dataclass(frozen=True)
class RestorationConfig:
    """Shape of a ``RestorationNet``.

    Attributes:
        in_channels, out_channels: of the images.
        numbers: that tell how the images were spoiled.
        channels: per level, finest (half resolution) first.
        blocks: residual blocks per level, on the way down; one less on the way up, but at least one.
    """

    in_channels: int
    out_channels: int
    numbers: int
    channels: tuple[int, ...] = (48, 96, 144)
    blocks: tuple[int, ...] = (2, 2, 3)

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.blocks) or not self.channels or min(self.channels + self.blocks) < 1:
            raise ValueError(f"{len(self.channels)} levels of channels, {len(self.blocks)} of blocks")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RestorationConfig:
        """From a card's JSON, where tuples are lists."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    @property
    def divisor(self) -> int:
        """Every side of the input is a multiple of this; ``forward`` pads what is not."""
        return _FOLD * 2 ** (len(self.channels) - 1)


class _Block(nn.Module):
    def __init__(self, channels: int, told: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.told = nn.Linear(told, 2 * channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)
        with torch.no_grad():
            self.second.weight *= _BRANCH

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told)[:, :, None, None].chunk(2, dim=1)
        return x + self.second(F.silu(self.first(x) * (1 + scale) + shift))


class _Level(nn.ModuleList):
    def __init__(self, count: int, channels: int, told: int) -> None:
        super().__init__(_Block(channels, told) for _ in range(count))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        for block in self:
            x = block(x, told)
        return x


class RestorationNet(nn.Module):
    """The network of a ``RestorationConfig``."""

    def __init__(self, config: RestorationConfig) -> None:
        super().__init__()
        self.config = config
        channels, blocks = config.channels, config.blocks
        told = 4 * channels[0]
        self.told = nn.Sequential(nn.Linear(config.numbers, told), nn.SiLU(), nn.Linear(told, told), nn.SiLU())
        self.inwards = nn.Conv2d(config.in_channels * _FOLD**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList(_Level(count, width, told) for count, width in zip(blocks, channels, strict=True))
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.coarser = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.finer = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(
            _Level(max(count - 1, 1), width, told) for count, width in zip(blocks[:-1], channels[:-1], strict=True)
        )
        self.outwards = nn.Conv2d(channels[0], config.out_channels * _FOLD**2, 3, padding=1)
        nn.init.zeros_(self.outwards.weight)
        nn.init.zeros_(self.outwards.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, numbers: Tensor) -> Tensor:
        """What to add to the image, and whatever else was trained.

        Args:
            images: (N, in_channels, H, W), any size.
            numbers: (N or 1, numbers), each of the order of 1.

        Returns:
            (N, out_channels, H, W).
        """
        height, width = images.shape[-2:]
        divisor = self.config.divisor
        # Replicated: a dark seam at the border of a picture that fills it would spoil what lies beside.
        padded = F.pad(images, (0, -width % divisor, 0, -height % divisor), mode="replicate")
        told = self.told(numbers).expand(len(images), -1)
        x, kept = self.inwards(F.pixel_unshuffle(padded, _FOLD)), []
        for number, level in enumerate(self.down):
            x = level(x, told)
            if number < len(self.coarser):
                kept.append(x)
                x = self.coarser[number](x)
        for number in reversed(range(len(self.up))):
            x = self.up[number](self.finer[number](x) + kept[number], told)
        return F.pixel_shuffle(self.outwards(x), _FOLD)[..., :height, :width]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def load_restorer(
    name: str, folder: Path | None, build: Callable[[Mapping[str, Any]], _Network]
) -> tuple[_Network, Card]:
    """A trained network, in evaluation mode, and its card.

    Args:
        name: of the weight.
        folder: looked into before the other places.
        build: the network from its card's parameters.

    Raises:
        WeightError: missing or damaged weight, or of another network.
    """
    card, state = load_weight(name, folder)
    try:
        network = build(card.architecture_parameters)
        network.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightError(f"The weight '{name}' is not what its card describes ({reason}); get it again.") from error
    return network.requires_grad_(False).eval(), card


def as_numbers(*values: float, like: Tensor) -> Tensor:
    """One row for ``RestorationNet``, (1, len(values))."""
    return torch.tensor([values], dtype=like.dtype, device=like.device)
