"""Adapters: small files that turn the resident backbone into a task, swapped without loading the backbone again.

An adapter is a weight of the registry (safetensors and card, checked like any other). Its card's ``architecture`` names
the class here, its ``architecture_parameters`` hold the arguments and what the features must be: blocks, timesteps, and
the backbone's decoder widths, so that an adapter of another backbone is refused instead of answering nonsense.

The published recipes are :class:`PixelMLP` (mediastinal segmentation) and :class:`DeepClassifier` (PAP, MPR);
:class:`LinearProbe` tells what the features alone know. Low-rank adapters of the backbone itself are in ``lora.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.features import DEEP, FeatureExtractor, Features
from LCTfoundLib.networks.lora import active_lora
from LCTfoundLib.weights.registry import Card, load_weight, save_weight

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "AdapterHost",
    "DeepClassifier",
    "FeatureRecipe",
    "Head",
    "LinearProbe",
    "LoadedAdapter",
    "PixelMLP",
    "load_adapter",
    "save_adapter",
]


@dataclass(frozen=True)
class FeatureRecipe:
    """What features an adapter was trained on.

    Attributes:
        blocks: numbers of up blocks, or ``DEEP``.
        timesteps: of the noise.
        widths: channels of the backbone's maps, one per block.
    """

    blocks: tuple[int, ...]
    timesteps: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, network: UNet2DConditionModel, blocks: Sequence[int], timesteps: Sequence[int]) -> FeatureRecipe:
        """For a backbone."""
        widths = tuple(reversed(network.config["block_out_channels"]))
        return cls(tuple(blocks), tuple(timesteps), tuple(int(widths[max(block, 0)]) for block in blocks))

    @property
    def channels(self) -> int:
        """Of all maps together."""
        return sum(self.widths) * len(self.timesteps)


class Head(nn.Module):
    """What every adapter is: features in, logits out."""

    recipe: FeatureRecipe

    @property
    def arguments(self) -> dict[str, Any]:
        """What the head is built from, for its card."""
        raise NotImplementedError


class PixelMLP(Head):
    """Classes of each pixel from all maps interpolated to its grid (published: 3840 channels, then a MLP).

    The first layer is linear, and so is interpolation: each map goes through its part of the layer on its own coarse
    grid and is interpolated after it. The values are those of the concatenation; 256x256 pixels of 3840 channels, 1 GB
    a slice, are never made.
    """

    def __init__(self, recipe: FeatureRecipe, classes: int, hidden: tuple[int, ...] = (128, 32)) -> None:
        super().__init__()
        self.recipe, self.classes, self.hidden = recipe, classes, tuple(hidden)
        self.first = nn.Conv2d(recipe.channels, self.hidden[0], 1)
        widths = [*self.hidden, classes]
        layers: list[nn.Module] = []
        for inwards, outwards in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.BatchNorm2d(inwards), nn.ReLU(inplace=True), nn.Conv2d(inwards, outwards, 1)]
        self.rest = nn.Sequential(*layers)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"classes": self.classes, "hidden": list(self.hidden)}

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Logits (N, classes, H, W) on the grid of ``size``."""
        parts = self.first.weight.split(list(self.recipe.widths) * len(self.recipe.timesteps), dim=1)
        per_block: dict[int, Tensor] = {}
        for number, weight in enumerate(parts):  # timesteps outermost, as Features.concatenated
            step, place = divmod(number, len(self.recipe.blocks))
            block = self.recipe.blocks[place]
            mixed = F.conv2d(features.maps[block][:, step].to(weight.dtype), weight)
            per_block[block] = per_block[block] + mixed if block in per_block else mixed
        hidden: Tensor = self.first.bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
        for mixed in per_block.values():
            hidden = hidden + F.interpolate(mixed, size, mode="bilinear", align_corners=False)
        return self.rest(hidden)


class DeepClassifier(Head):
    """Classes of a slice from its deep maps: per timestep a convolution to 256 channels, mean, unit length; then a MLP.

    The published classifier of PAP and MPR.
    """

    def __init__(self, recipe: FeatureRecipe, classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.recipe, self.classes, self.hidden = recipe, classes, hidden
        self.reduce = nn.ModuleList(nn.Conv2d(recipe.widths[0], hidden, 3, padding=1) for _ in recipe.timesteps)
        self.mlp = nn.Sequential(
            nn.Linear(hidden * len(recipe.timesteps), hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes)
        )

    @property
    def arguments(self) -> dict[str, Any]:
        return {"classes": self.classes, "hidden": self.hidden}

    def forward(self, features: Features, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (N, classes); ``size`` is of no use here."""
        maps = features.maps[self.recipe.blocks[0]].to(self.mlp[0].weight.dtype)  # type: ignore[arg-type]
        vectors = [
            F.normalize(reduce(maps[:, step]).mean(dim=(2, 3)), dim=1) for step, reduce in enumerate(self.reduce)
        ]
        return self.mlp(torch.cat(vectors, dim=1))


class LinearProbe(Head):
    """Classes of a slice by one linear layer over the means of all maps.

    The published prognosis takes the deep maps whole (a million inputs for ``paper``); their means are enough to
    compare backbones, and do not overfit some hundred patients.
    """

    def __init__(self, recipe: FeatureRecipe, classes: int) -> None:
        super().__init__()
        self.recipe, self.classes = recipe, classes
        self.linear = nn.Linear(recipe.channels, classes)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def forward(self, features: Features, size: tuple[int, int] | None = None) -> Tensor:
        """Logits (N, classes); ``size`` is of no use here."""
        vectors = [features.maps[block].float().mean(dim=(3, 4)).flatten(1) for block in self.recipe.blocks]
        return self.linear(torch.cat(vectors, dim=1).to(self.linear.weight.dtype))


_HEADS: dict[str, type[PixelMLP] | type[DeepClassifier] | type[LinearProbe]] = {
    kind.__name__: kind for kind in (PixelMLP, DeepClassifier, LinearProbe)
}


@dataclass
class LoadedAdapter:
    """An adapter ready to use: its head, and the card of its weight."""

    head: Head
    card: Card


def save_adapter(head: Head, card: Card, folder: Path | str) -> Card:
    """Write a head as a weight.

    Args:
        head: to write, in half precision.
        card: its architecture and parameters are filled in from the head, its checksum by the registry.
        folder: made if missing.

    Returns:
        The card as written.

    Raises:
        OutputError: the folder cannot be written.
    """
    features = {key: list(value) for key, value in asdict(head.recipe).items()}
    parameters = {"head": head.arguments, "features": features}
    filled = replace(card, architecture=type(head).__name__, architecture_parameters=parameters)
    return save_weight(head.state_dict(), filled, folder)


def load_adapter(name: str, folder: Path | str | None = None) -> LoadedAdapter:
    """A head by the name of its weight, in evaluation mode on the CPU.

    Raises:
        WeightError: missing, damaged, of no adapter, or not what its card describes.
    """
    card, state = load_weight(name, folder)
    kind = _HEADS.get(card.architecture)
    if kind is None:
        raise WeightError(
            f"The weight '{name}' is a {card.architecture}, no adapter; give the name of one ({', '.join(_HEADS)})."
        )
    try:
        given = card.architecture_parameters
        recipe = FeatureRecipe(**{key: tuple(map(int, value)) for key, value in given["features"].items()})
        if not len(recipe.blocks) == len(recipe.widths) > 0 or not recipe.timesteps:
            raise ValueError("blocks and widths differ in number, or there are none")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["head"].items()}
        head = kind(recipe, **arguments)
        head.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightError(f"The adapter '{name}' is not what its card describes ({reason}); get it again.") from error
    return LoadedAdapter(head.eval(), card)


class AdapterHost:
    """One resident backbone and the adapters that were asked for; changing between them costs nothing.

    Features are kept for the last slices: adapters of the same blocks and timesteps share one run of the backbone.
    """

    def __init__(self, network: UNet2DConditionModel, *, batch: int = 4, dtype: torch.dtype = torch.float32) -> None:
        """Set up.

        Args:
            network: in evaluation mode, on its device.
            batch: noisy slices per pass.
            dtype: of the backbone's arithmetic.
        """
        self.network = network
        self._batch, self._dtype = batch, dtype
        self._adapters: dict[str, LoadedAdapter] = {}
        self._last: tuple[tuple[Any, ...], Features] | None = None

    @property
    def names(self) -> list[str]:
        """Of the adapters that are loaded."""
        return sorted(self._adapters)

    def add(self, name: str, adapter: LoadedAdapter) -> None:
        """Take an adapter in, in place of one of the same name.

        Raises:
            WeightError: it was trained on another backbone's features.
        """
        recipe = adapter.head.recipe
        try:
            here = FeatureRecipe.of(self.network, recipe.blocks, recipe.timesteps)
        except IndexError:
            here = None
        if here != recipe or not all(DEEP <= block < len(self.network.up_blocks) for block in recipe.blocks):
            raise WeightError(
                f"The adapter '{name}' needs a backbone with maps of {', '.join(map(str, recipe.widths))} channels in "
                f"blocks {', '.join(map(str, recipe.blocks))}; load the backbone its card names."
            )
        adapter.head.to(next(self.network.parameters()).device)
        self._adapters[name] = adapter

    def load(self, name: str, folder: Path | str | None = None) -> None:
        """:func:`load_adapter` and :meth:`add`, unless it is loaded already.

        Raises:
            WeightError: as these two.
        """
        if name not in self._adapters:
            self.add(name, load_adapter(name, folder))

    def remove(self, name: str) -> None:
        """Forget an adapter; nothing happens when it is not there."""
        self._adapters.pop(name, None)

    @torch.no_grad()
    def run(self, name: str, images: Tensor, embedding: Tensor, seed: int = 0) -> Tensor:
        """Logits of an adapter that was loaded.

        Args:
            name: of the adapter.
            images: (N, 3, H, W), -1..1; H and W multiples of 16.
            embedding: of the condition, (1, 1, 768) or (N, 1, 768).
            seed: of the noise; the same seed gives the same answer.

        Returns:
            (N, classes, H, W) or (N, classes).

        Raises:
            KeyError: no such adapter is loaded.
        """
        head = self._adapters[name].head
        features = self._features(head.recipe, images, embedding, seed)
        return head(features, tuple(images.shape[-2:]))

    def _features(self, recipe: FeatureRecipe, images: Tensor, embedding: Tensor, seed: int) -> Features:
        key = (recipe.blocks, recipe.timesteps, seed, active_lora(self.network))
        if self._last is not None:
            (known, known_images, known_embedding), features = self._last
            if known == key and torch.equal(known_images, images) and torch.equal(known_embedding, embedding):
                return features
        extractor = FeatureExtractor(self.network, recipe.blocks, batch=self._batch, dtype=self._dtype)
        features = extractor(images, embedding, recipe.timesteps, torch.Generator().manual_seed(seed))
        # Copies: the caller may fill the same tensor with the next slice.
        self._last = ((key, images.clone(), embedding.clone()), features)
        return features
