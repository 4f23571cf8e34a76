"""Adapters: small files that turn the resident backbone into a task, swapped without loading the backbone again.

An adapter is a weight of the registry (safetensors and card, checked like any other). Its card's ``architecture`` names
the class, and its ``architecture_parameters`` hold three things, the same for every kind: what the adapter needs of the
backbone (``needs``), what it is built from (``arguments``), and the fingerprint of the backbone it was trained on
(``backbone``), so that an adapter of another backbone is refused instead of answering nonsense.

====================  ==================================================  ==========================================
class                 published recipe                                    file
====================  ==================================================  ==========================================
``PixelMLP``          mediastinal segmentation                            head
``DeepClassifier``    PAP, MPR; tuned: prognosis                          head; tuned: and the backbone's difference
``LinearProbe``       what the features alone know                        head
``OutputLayer``       whole lung, 21 structures (tuned)                   output layer and the backbone's difference
``ColdRestorer``      low dose                                            side branch and output layer
``ImageCondition``    virtual CTA                                         side branch
LoRA (``lora.py``)    none; what a full fine-tune would be today          low-rank matrices
====================  ==================================================  ==========================================

Every kind works on the frozen backbone, or on one that was tuned with it (:meth:`Adapter.tune`). A tuned backbone is
stored as its difference to the one it began as, in float16. That is as large as the weights themselves would be, but
fine-tuning moves them by a hundredth or less: their own float16 rounding, 1/2048 of the weight, would be several
percent of what was learned, and the difference's is 1/2048 of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.adapter_base import Adapter, fingerprint, plain_parameters
from LCTfoundLib.networks.cold_diffusion import ColdRestorer
from LCTfoundLib.networks.features import DEEP, FeatureExtractor, Features, NoiseSchedule, block_maps
from LCTfoundLib.networks.image_condition import ImageCondition
from LCTfoundLib.networks.lora import LORA_ARCHITECTURE, put_lora, remove_lora, use_lora, working_lora
from LCTfoundLib.networks.tuned import OutputLayer
from LCTfoundLib.weights.registry import Card, load_weight, save_weight

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "Adapter",
    "AdapterHost",
    "ColdRestorer",
    "DeepClassifier",
    "FeatureRecipe",
    "Head",
    "ImageCondition",
    "LinearProbe",
    "LoadedAdapter",
    "OutputLayer",
    "PixelMLP",
    "load_adapter",
    "save_adapter",
    "traced_features",
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureRecipe:
        """From a card.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        recipe = cls(*(tuple(map(int, values[key])) for key in ("blocks", "timesteps", "widths")))
        if not len(recipe.blocks) == len(recipe.widths) > 0 or not recipe.timesteps:
            raise ValueError("blocks and widths differ in number, or there are none")
        return recipe

    def matches(self, network: UNet2DConditionModel) -> bool:
        if not all(DEEP <= block < len(network.up_blocks) for block in self.blocks):
            return False
        return self == FeatureRecipe.of(network, self.blocks, self.timesteps)

    def __str__(self) -> str:
        return f"maps of {', '.join(map(str, self.widths))} channels in blocks {', '.join(map(str, self.blocks))}"

    @property
    def channels(self) -> int:
        """Of all maps together."""
        return sum(self.widths) * len(self.timesteps)


class Head(Adapter):
    """Features in, logits out."""

    recipe: FeatureRecipe

    @property
    def needs(self) -> FeatureRecipe:
        return self.recipe

    @classmethod
    def from_card(cls, needs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Head:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        return cls(FeatureRecipe.from_dict(needs), **given)  # type: ignore[call-arg]

    def answer(self, network: UNet2DConditionModel, images: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        """Logits, (N, classes, H, W) or (N, classes); gradients reach a tuned backbone."""
        features = traced_features(network, self.recipe, images, embedding, noise)
        return self(features, tuple(images.shape[-2:]))


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


def traced_features(
    network: UNet2DConditionModel, recipe: FeatureRecipe, images: Tensor, embedding: Tensor, noise: Tensor
) -> Features:
    """As :class:`FeatureExtractor`'s answer, in one pass and with gradients, to tune the backbone through it.

    Args:
        network: the backbone.
        recipe: blocks and timesteps.
        images: (N, 3, H, W), -1..1.
        embedding: (N, 1, 768).
        noise: (N, 3, H, W); serves all timesteps.
    """
    count, steps = len(images), len(recipe.timesteps)
    rows = torch.arange(count, device=images.device).repeat_interleave(steps)
    times = torch.tensor(recipe.timesteps, device=images.device).repeat(count)
    noisy = NoiseSchedule().add_noise(images[rows], noise[rows], times)
    maps = block_maps(network, noisy, times, embedding[rows], recipe.blocks)
    return Features(recipe.timesteps, {block: maps[block].unflatten(0, (count, steps)) for block in recipe.blocks})


_KINDS: dict[str, type[Adapter]] = {
    kind.__name__: kind for kind in (PixelMLP, DeepClassifier, LinearProbe, OutputLayer, ColdRestorer, ImageCondition)
}
#: In a file: tensors that are the difference of a tuned backbone to the one it began as.
_TUNED = "tuned."


@dataclass
class LoadedAdapter:
    """An adapter ready to use.

    Attributes:
        adapter: None for a low-rank adapter, which lives in the backbone.
        card: of its weight; None for one that was made here and not saved.
    """

    adapter: Adapter | None
    card: Card | None = None


def save_adapter(adapter: Adapter, network: UNet2DConditionModel, card: Card, folder: Path | str) -> Card:
    """Write an adapter as a weight, in half precision.

    Args:
        adapter: to write.
        network: the backbone it was trained on, as it was before.
        card: its architecture and parameters are filled in, its checksum by the registry.
        folder: made if missing.

    Returns:
        The card as written.

    Raises:
        OutputError: the folder cannot be written.
    """
    parameters = adapter.described() | {"backbone": fingerprint(network)}
    filled = replace(card, architecture=type(adapter).__name__, architecture_parameters=parameters)
    begun = plain_parameters(network)
    state = {
        key: tensor - begun[_backbone_name(key)].to(tensor.device) if key.startswith(_TUNED) else tensor
        for key, tensor in adapter.state_dict().items()
    }
    return save_weight(state, filled, folder)


def load_adapter(name: str, network: UNet2DConditionModel, folder: Path | str | None = None) -> LoadedAdapter:
    """An adapter of any kind by the name of its weight, for a backbone.

    It comes in evaluation mode, on the backbone's device. The backbone's values stay as they are; a low-rank adapter is
    put beside them and works when it is asked for (``lora`` of :meth:`AdapterHost.run`).

    Args:
        name: of the weight.
        network: the resident backbone.
        folder: looked into before the other places.

    Raises:
        WeightError: missing, damaged, of no adapter, of another backbone, or not what its card describes.
        LCTfoundError: a low-rank adapter, and peft is not installed.
        ValueError: a low-rank adapter of this name is resident already.
    """
    card, state = load_weight(name, folder)
    if card.architecture == LORA_ARCHITECTURE:
        put_lora(network, name, card, state)
        return LoadedAdapter(None, card)
    kind = _KINDS.get(card.architecture)
    if kind is None:
        raise WeightError(
            f"The weight '{name}' is a {card.architecture}, no adapter; give the name of one "
            f"({', '.join((*_KINDS, LORA_ARCHITECTURE))})."
        )
    try:
        given = card.architecture_parameters
        adapter = kind.from_card(given["needs"], given["arguments"])
        _check_backbone(name, adapter, card, network, fingerprint(network))
        _fill(adapter, state, network)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightError(f"The adapter '{name}' is not what its card describes ({reason}); get it again.") from error
    adapter.requires_grad_(False).eval().to(next(network.parameters()).device)
    return LoadedAdapter(adapter, card)


def _backbone_name(key: str) -> str:
    return key.removeprefix(_TUNED).replace("/", ".")


def _check_backbone(
    name: str, adapter: Adapter, card: Card | None, network: UNet2DConditionModel, identity: str
) -> None:
    """Refuse another backbone: one of another shape, or one of the same shape with other weights."""
    if not adapter.needs.matches(network):
        raise WeightError(
            f"The adapter '{name}' needs a backbone with {adapter.needs}; load the backbone its card names."
        )
    if card is not None and card.architecture_parameters.get("backbone") != identity:
        raise WeightError(
            f"The adapter '{name}' was trained on another backbone of the same shape; load the backbone its card names."
        )


def _fill(adapter: Adapter, state: Mapping[str, Tensor], network: UNet2DConditionModel) -> None:
    """The file's values into a fresh adapter; differences are added to what the backbone has."""
    begun, state = plain_parameters(network), dict(state)
    for key in [key for key in state if key.startswith(_TUNED)]:
        base = begun[_backbone_name(key)].detach()
        if base.shape != state[key].shape:
            raise ValueError(f"{key}: {tuple(state[key].shape)} instead of {tuple(base.shape)}")
        state[key] = base + state[key].to(base.device)
        adapter.tuned[key.removeprefix(_TUNED)] = nn.Parameter(torch.empty_like(base))
    adapter.load_state_dict(state)


class AdapterHost:
    """One resident backbone and the adapters that were asked for; changing between them costs nothing.

    The backbone is never written to: an adapter's own tensors stand in its place for the length of a call. Features are
    kept for the last slices: heads of the same blocks and timesteps share one run of the frozen backbone.
    """

    def __init__(self, network: UNet2DConditionModel, *, batch: int = 4, dtype: torch.dtype = torch.float32) -> None:
        """Set up.

        Args:
            network: on its device; put into evaluation mode, frozen, and its convolutions laid out channels-last.
            batch: slices per pass.
            dtype: of the arithmetic.
        """
        self.network = network.eval().to(memory_format=torch.channels_last)
        # torch computes a linear layer in another way where a gradient could be asked for; the answer, in its last
        # bits, shall not depend on what was done with the backbone before.
        for tensor in plain_parameters(network).values():
            tensor.requires_grad_(False)
        self._batch, self._dtype = batch, dtype
        self._identity = fingerprint(network)
        self._adapters: dict[str, LoadedAdapter] = {}
        self._last: tuple[tuple[Any, ...], Features] | None = None

    @property
    def names(self) -> list[str]:
        """Of the adapters that are loaded."""
        return sorted(self._adapters)

    def card(self, name: str) -> Card | None:
        """Of an adapter that is loaded.

        Raises:
            KeyError: no such adapter is loaded.
        """
        return self._adapters[name].card

    def add(self, name: str, loaded: LoadedAdapter) -> None:
        """Take an adapter in, in place of one of the same name; it is put into evaluation mode and frozen.

        Raises:
            WeightError: it was trained on another backbone.
        """
        if loaded.adapter is not None:
            _check_backbone(name, loaded.adapter, loaded.card, self.network, self._identity)
            device = next(self.network.parameters()).device
            loaded.adapter.requires_grad_(False).eval()
            loaded.adapter.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._adapters[name] = loaded

    def load(self, name: str, folder: Path | str | None = None) -> None:
        """:func:`load_adapter` and :meth:`add`, unless it is loaded already.

        Raises:
            WeightError: as these two.
            LCTfoundError: a low-rank adapter, and peft is not installed.
        """
        if name not in self._adapters:
            self.add(name, load_adapter(name, self.network, folder))

    def remove(self, name: str) -> None:
        """Forget an adapter; nothing happens when it is not there."""
        loaded = self._adapters.pop(name, None)
        if loaded is not None and loaded.adapter is None:
            remove_lora(self.network, name)
            use_lora(self.network, None)

    @torch.no_grad()
    def run(self, name: str, images: Tensor, embedding: Tensor, seed: int = 0, lora: str | None = None) -> Tensor:
        """The answer of an adapter that was loaded.

        Args:
            name: of the adapter.
            images: (N, 3, H, W), -1..1; H and W multiples of 16.
            embedding: of the condition, (1, 1, 768) or (N, 1, 768).
            seed: of the noise; the same seed gives the same answer.
            lora: name of a low-rank adapter that the backbone works with meanwhile.

        Returns:
            float32: logits (N, classes, H, W) or (N, classes), or images (N, 1 or 3, H, W), -1..1.

        Raises:
            KeyError: no such adapter is loaded.
            WeightError: it is a low-rank adapter, which has no answer of its own.
        """
        adapter = self._adapters[name].adapter
        if adapter is None:
            raise WeightError(
                f"The low-rank adapter '{name}' has no answer of its own; give the name of another adapter, and this "
                "one as what the backbone works with meanwhile."
            )
        if lora is not None and self._adapters[lora].adapter is not None:
            raise WeightError(f"The adapter '{lora}' is no low-rank one; run it by itself.")
        device = next(self.network.parameters()).device
        # Made at once on the CPU: the answer depends on the seed, not on batch or device.
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        images, embedding = images.to(device), embedding.to(device)
        with working_lora(self.network, lora):
            if isinstance(adapter, Head) and not adapter.tuned:
                features = self._features(adapter.recipe, images, embedding, noise, (seed, lora))
                return adapter(features, tuple(images.shape[-2:])).float()
            return self._in_batches(adapter, images, embedding.expand(len(images), -1, -1), noise)

    def _in_batches(self, adapter: Adapter, images: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(images), self._batch):
            rows = slice(start, start + self._batch)
            with torch.autocast(images.device.type, self._dtype, enabled=self._dtype != torch.float32):
                parts.append(adapter.run(self.network, images[rows], embedding[rows], noise[rows]).float())
        return torch.cat(parts)

    def _features(
        self, recipe: FeatureRecipe, images: Tensor, embedding: Tensor, noise: Tensor, source: tuple[int, str | None]
    ) -> Features:
        key = (recipe.blocks, recipe.timesteps, source)
        if self._last is not None:
            (known, known_images, known_embedding), features = self._last
            if known == key and torch.equal(known_images, images) and torch.equal(known_embedding, embedding):
                return features
        extractor = FeatureExtractor(self.network, recipe.blocks, batch=self._batch, dtype=self._dtype)
        features = extractor(images, embedding, recipe.timesteps, noise=noise)
        # Copies: the caller may fill the same tensor with the next slice.
        self._last = ((key, images.clone(), embedding.clone()), features)
        return features
