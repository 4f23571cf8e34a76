"""Low-rank adapters of the backbone itself (LoRA, Hu et al., ICLR 2022), through peft, as small weights with cards.

Several can be resident on one backbone; at most one works at a time, and none leaves the backbone as it was. They are
loaded as every adapter is, by ``load_adapter`` of ``adapters.py``. peft is an optional part of the installation and
imported where it is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LCTfoundLib.errors import LCTfoundError, WeightError
from LCTfoundLib.networks.adapter_base import BackboneShape, fingerprint
from LCTfoundLib.weights.registry import Card, save_weight

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "ATTENTION",
    "CONVOLUTIONS",
    "LORA_ARCHITECTURE",
    "active_lora",
    "add_lora",
    "put_lora",
    "remove_lora",
    "save_lora",
    "use_lora",
    "working_lora",
]

#: In cards.
LORA_ARCHITECTURE = "LoRA"
#: Layers to adapt: the projections of all attention layers.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: Layers to adapt: the convolutions of the residual blocks, where a backbone with little attention keeps its knowledge.
CONVOLUTIONS = ("conv1", "conv2")


def add_lora(network: UNet2DConditionModel, name: str, rank: int = 8, targets: Sequence[str] = ATTENTION) -> None:
    """Put a new low-rank adapter into a backbone and use it; it starts as the identity.

    Afterwards only the adapter's values are trainable.

    Args:
        network: changed in place.
        name: not one that is resident already.
        rank: of the added matrices.
        targets: ends of the names of the layers to adapt.

    Raises:
        LCTfoundError: peft is not installed.
        ValueError: the name is taken, or no layer has such a name.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise LCTfoundError("Low-rank adapters need the package peft; install it.") from None
    with warnings.catch_warnings():
        # Several adapters on one backbone are meant to be.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), _key(name))


def save_lora(network: UNet2DConditionModel, name: str, card: Card, folder: Path | str) -> Card:
    """Write a resident low-rank adapter as a weight.

    Args:
        network: that holds it.
        name: of the adapter.
        card: its architecture and parameters are filled in, its checksum by the registry.
        folder: made if missing.

    Returns:
        The card as written.
    """
    config = network.peft_config[_key(name)]
    shape = BackboneShape.of(network)
    parameters = {
        "needs": {"widths": list(shape.widths), "layers": shape.layers},
        "arguments": {"rank": int(config.r), "targets": sorted(config.target_modules)},
        "backbone": fingerprint(network),
    }
    filled = replace(card, architecture=LORA_ARCHITECTURE, architecture_parameters=parameters)
    return save_weight(_state(network, name), filled, folder)


def put_lora(network: UNet2DConditionModel, name: str, card: Card, state: Mapping[str, Any]) -> None:
    """Put a low-rank adapter from a weight into a backbone; nothing is trainable, and what worked goes on working.

    Args:
        network: changed in place; left as it was when the adapter does not fit.
        name: of the adapter.
        card: of its weight.
        state: its tensors.

    Raises:
        WeightError: its card is not one of a low-rank adapter, or it is one of another backbone.
        LCTfoundError: peft is not installed.
        ValueError: an adapter of this name is resident already.
    """
    arguments, before = card.architecture_parameters.get("arguments"), active_lora(network)
    rank, targets = (arguments.get("rank"), arguments.get("targets")) if isinstance(arguments, dict) else (None, None)
    if not isinstance(rank, int) or rank < 1 or not isinstance(targets, list) or not targets:
        raise WeightError(f"The card of '{name}' names no rank and targets; get the weight and its card again.")
    if card.architecture_parameters.get("backbone") != fingerprint(network):
        raise WeightError(f"The adapter '{name}' was trained on another backbone; load the backbone its card names.")
    try:
        add_lora(network, name, rank, targets)
    except ValueError as error:
        if _key(name) in getattr(network, "peft_config", {}):
            raise
        raise WeightError(f"The adapter '{name}' does not fit this backbone ({error}); get it again.") from error
    expected = {key: tensor.shape for key, tensor in _state(network, name).items()}
    if expected != {key: tensor.shape for key, tensor in state.items()}:
        use_lora(network, before)
        remove_lora(network, name)
        use_lora(network, before)  # none, if there was none: peft switches on what is left
        raise WeightError(f"The adapter '{name}' is not what its card describes; get it again.")
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(network, dict(state), _key(name))
    network.requires_grad_(False)
    use_lora(network, before)


@contextmanager
def working_lora(network: UNet2DConditionModel, name: str | None) -> Iterator[None]:
    """Let one resident adapter work, or none, for the length of a ``with`` block."""
    before = active_lora(network)
    use_lora(network, name)
    try:
        yield
    finally:
        use_lora(network, before)


def use_lora(network: UNet2DConditionModel, name: str | None) -> None:
    """Let one resident adapter work, or none: the backbone as it was."""
    if name is not None:
        network.enable_adapters()
        network.set_adapter(_key(name))
    elif active_lora(network) is not None:
        network.disable_adapters()


def remove_lora(network: UNet2DConditionModel, name: str) -> None:
    """Take a resident adapter out."""
    network.delete_adapters(_key(name))


def active_lora(network: UNet2DConditionModel) -> str | None:
    """The adapter that works now; None for the backbone as it was."""
    for module in network.modules():
        if hasattr(module, "lora_A") and not module.disable_adapters:
            # Two adapters need not have the same layers; a layer without the active one counts for nothing.
            working = [key for key in module.active_adapters if key in module.lora_A]
            if working:
                return _name(working[0])
    return None


def _state(network: UNet2DConditionModel, name: str) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(network, adapter_name=_key(name)))


#: peft makes the name an attribute of modules: it must not be one they have, and a dot would step into a submodule.
_PREFIX, _DOT = "lora:", "%2E"


def _key(name: str) -> str:
    return _PREFIX + name.replace(".", _DOT)


def _name(key: str) -> str:
    return key.removeprefix(_PREFIX).replace(_DOT, ".")
