"""What all adapters share: what they need of the backbone, tensors that take the place of its own, and its fingerprint.

An adapter is a small network around the resident backbone. It may also bring tensors of its own for the backbone (all
of them after a full fine-tune, the output layer alone after a replacement): they are handed to the backbone for the
length of a call and never written into it, so that it stays what it was, bit for bit, and the next adapter finds it so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "Adapter",
    "BackboneShape",
    "Needs",
    "embedded_time",
    "fingerprint",
    "plain_parameters",
    "repeated",
    "with_tensors",
]

_Answer = TypeVar("_Answer")

#: Values of each tensor that tell one backbone from another.
_SAMPLED_VALUES = 64
#: peft puts a layer that it adapts into a wrapper, under this name.
_WRAPPED, _LOW_RANK = ".base_layer.", ".lora_"


def plain_parameters(network: nn.Module) -> dict[str, Tensor]:
    """A backbone's parameters by the names they have without low-rank adapters, whose own are left out."""
    return {_plain(name): tensor for name, tensor in network.named_parameters() if _LOW_RANK not in name}


def fingerprint(network: nn.Module) -> str:
    """What tells a backbone from others of the same shape: 16 hexadecimal digits.

    From names, shapes and the first values of every tensor in half precision, so that it is the same for a float32
    backbone and for its float16 file, on every device and with low-rank adapters in it. 10 ms for ``paper``, whose
    1.2 GB are not read whole: training moves every tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_parameters(network).items()):
        first = tensor.detach()[0] if tensor.dim() > 1 else tensor.detach()
        values = first.flatten()[:_SAMPLED_VALUES].cpu().half().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.astype("<f2").tobytes())
    return digest.hexdigest()[:16]


def with_tensors(
    network: UNet2DConditionModel, tensors: Mapping[str, Tensor], function: Callable[..., _Answer], *arguments: Any
) -> _Answer:
    """``function(network, *arguments)`` while tensors stand in the place of the backbone's own.

    Nothing is copied and the backbone's memory is not touched; gradients reach the tensors. All tensors of
    ``student`` take 3 ms. Not to be called for one backbone by two threads at once.

    Args:
        network: the resident backbone.
        tensors: by their plain names (:func:`plain_parameters`); another shape than the backbone's own will do where
            the layer can compute with it, as an output layer of another number of channels.
        function: of the backbone and the arguments.
    """
    if not tensors:
        return function(network, *arguments)
    names = {_plain(name): name for name, _ in network.named_parameters() if _LOW_RANK not in name}
    replaced = {f"network.{names[name]}": tensor for name, tensor in tensors.items()}
    return functional_call(_Resident(network), replaced, (function, *arguments))


class _Resident(nn.Module):
    """Gives torch's functional call a module whose ``forward`` is any function of the backbone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[..., _Answer], *arguments: Any) -> _Answer:
        return function(self.network, *arguments)


def _plain(name: str) -> str:
    return name.replace(_WRAPPED, ".")


class Needs(Protocol):
    """What an adapter needs of a backbone; a dataclass that goes into its card."""

    def matches(self, network: UNet2DConditionModel) -> bool:
        """Whether the adapter's tensors fit this backbone."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class BackboneShape:
    """The shape of a backbone, for adapters that work on its whole way.

    Attributes:
        widths: channels of its levels, finest first.
        layers: residual layers per down block.
    """

    widths: tuple[int, ...]
    layers: int

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.layers < 1:
            raise ValueError(f"a backbone of widths {self.widths} and {self.layers} layers is none")

    @classmethod
    def of(cls, network: UNet2DConditionModel) -> BackboneShape:
        """That of a backbone."""
        config = network.config
        return cls(tuple(int(width) for width in config["block_out_channels"]), int(config["layers_per_block"]))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackboneShape:
        """From a card.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        return cls(tuple(map(int, values["widths"])), int(values["layers"]))

    def matches(self, network: UNet2DConditionModel) -> bool:
        return self == BackboneShape.of(network)

    def __str__(self) -> str:
        return f"levels of {', '.join(map(str, self.widths))} channels, {self.layers} layers each"

    @property
    def skips(self) -> list[tuple[int, int]]:
        """(level, channels) of each map that goes from the encoder to the decoder, in the encoder's order."""
        found = [(0, self.widths[0])]
        for level, width in enumerate(self.widths):
            found += [(level, width)] * self.layers
            if level + 1 < len(self.widths):
                found.append((level + 1, width))
        return found

    @property
    def time_channels(self) -> int:
        """Of the embedded timestep."""
        return 4 * self.widths[0]


class Adapter(nn.Module):
    """A small network around the backbone, and the backbone's tuned tensors if it has any.

    Attributes:
        tuned: parameters in the place of the backbone's, by their plain names with ``/`` for the dots; empty on a
            frozen backbone. They are whole in memory, and a difference to the backbone in the file
            (:func:`LCTfoundLib.networks.adapters.save_adapter`).
    """

    tuned: nn.ParameterDict

    def __init__(self) -> None:
        super().__init__()
        self.tuned = nn.ParameterDict()

    @property
    def needs(self) -> Needs:
        """Of the backbone."""
        raise NotImplementedError

    @property
    def arguments(self) -> dict[str, Any]:
        """What the adapter is built from beside :attr:`needs`, for its card."""
        raise NotImplementedError

    @classmethod
    def from_card(cls, needs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Adapter:
        """With fresh values.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: the card describes none.
        """
        raise NotImplementedError

    def answer(self, network: UNet2DConditionModel, images: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        """What the adapter is for, on a backbone that already has the adapter's tensors.

        Args:
            network: the backbone.
            images: (N, 3, H, W), -1..1.
            embedding: of the condition, (N, 1, 768).
            noise: (N, 3, H, W), standard normal, for those that need some.
        """
        raise NotImplementedError

    def replaced(self) -> dict[str, Tensor]:
        """Layers of the backbone that the adapter has of its own, by plain names."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """All that stands in the backbone's place while the adapter works."""
        return {key.replace("/", "."): tensor for key, tensor in self.tuned.items()} | self.replaced()

    def tune(self, network: UNet2DConditionModel) -> None:
        """Make all weights of the backbone the adapter's own to train; they start as the backbone's."""
        own = self.replaced()
        for name, tensor in plain_parameters(network).items():
            if name not in own:
                self.tuned[name.replace(".", "/")] = nn.Parameter(tensor.detach().clone())

    def described(self) -> dict[str, Any]:
        """For the card: needs and arguments, as JSON has them."""
        return {"needs": _listed(asdict(self.needs)), "arguments": _listed(self.arguments)}  # type: ignore[call-overload]

    def run(self, network: UNet2DConditionModel, images: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        """:meth:`answer` with the adapter's tensors; what training and use both call."""
        return with_tensors(network, self.tensors(), self.answer, images, embedding.expand(len(images), -1, -1), noise)


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def embedded_time(network: UNet2DConditionModel, timesteps: Tensor, like: Tensor) -> Tensor:
    """The backbone's own embedding of timesteps (N,), (N, 4 x first width), in the type of ``like``."""
    return network.time_embedding(network.time_proj(timesteps).to(like.dtype))


def repeated(value: int, images: Tensor) -> Tensor:
    """One timestep for every image, (N,)."""
    return torch.full((len(images),), value, dtype=torch.long, device=images.device)
