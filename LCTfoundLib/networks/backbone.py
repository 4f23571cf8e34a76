"""The foundation model's backbone: a conditional 2D diffusion U-Net in three presets, and the official folder layout.

The network is diffusers' ``UNet2DConditionModel``, so that the official checkpoint loads as it is. Everything here
takes (N, 3, H, W) images in -1..1, a timestep and a condition embedding (N, 1, 768), and predicts the noise.

diffusers takes some seconds to import and is therefore imported where a network is built.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from LCTfoundLib.errors import WeightError
from LCTfoundLib.runtime.files import atomic_path
from LCTfoundLib.weights.registry import Card, load_weight

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "ARCHITECTURE",
    "EMBEDDING_SIZE",
    "CHANNELS",
    "ENCODER_PREFIX",
    "INPUT_KEY",
    "PREDICTION_KEY",
    "LoadedBackbone",
    "Preset",
    "backbone_config",
    "build_backbone",
    "decoder_channels",
    "load_backbone",
    "load_official",
    "official_weight",
    "parameter_count",
    "save_official",
]

#: Name of the network class, in cards and in official configurations.
ARCHITECTURE = "UNet2DConditionModel"
#: Length of a condition's vector: a BERT base model's CLS vector.
EMBEDDING_SIZE = 768
#: Channels in and out: one slice three times (``paper``, ``lite``), or three neighboring slices (``student``).
CHANNELS = 3

#: In a weight of the registry: tensors of the condition encoder that was trained with the network, beside its own.
ENCODER_PREFIX = "condition_encoder."
#: In such a weight's card: what the network's channels are, beside the network's arguments.
INPUT_KEY = "input"
#: In such a weight's card: what the network's answer is.
PREDICTION_KEY = "prediction"

_UNET_FOLDER = "unet"
_CONFIG_FILE = "config.json"
_WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
_PICKLED_FILES = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.pt", "pytorch_model.bin")
_MAX_CONFIG_BYTES = 1_000_000
#: What an averaging of weights (EMA) leaves in a configuration; without meaning for the network.
_EMA_KEYS = frozenset(
    {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
)

_log = logging.getLogger(__name__)


class Preset(StrEnum):
    """Size of the backbone."""

    #: The published one, 290.0 M parameters.
    PAPER = "paper"
    #: Without attention on maps larger than 32x32: 37 % of the published one's work (510 of 1390 GFLOP a slice).
    LITE = "lite"
    #: The shipped one: below 8 M parameters, three neighboring slices as channels.
    STUDENT = "student"


_PAPER: dict[str, Any] = {
    "sample_size": 256,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "layers_per_block": 2,
    "block_out_channels": (64, 128, 256, 512, 1024),
    "down_block_types": (
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "up_block_types": (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "UpBlock2D",
    ),
    "norm_num_groups": 32,
    "encoder_hid_dim_type": "text_proj",
    "encoder_hid_dim": EMBEDDING_SIZE,
}

#: The blocks of a 256x256 slice work on maps of 256, 128, 64, 32 and 16: only the fourth keeps its attention.
_ATTENTION_UP_TO_32: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
}

# The student's shape, by measurement (one 256x256 slice, float32, channels-last, CPU seconds of one thread; to be
# 0.45 s on two cores at most; GFLOP without the attention's own). With it the student has 45 GFLOP, the published one
# 1390, 31 times as much.
#   channels                 attention at   parameters   GFLOP   seconds
#   32-48-64-128-192         32, 8 heads    8.68 M       32.7    .49
#   32-48-96-160-160         16, 4 heads    7.41 M       36.6    .46
#   32-48-64-128-160         32, 4 heads    7.16 M       31.7    .46
#   32-64-96-128-160         32, 4 heads    7.86 M       43.3    .58   <- chosen
#   32-64-128-192 (4 levels) 32, 8 heads    9.72 M       59.1    .77
# - Wide at 128 and 64, where lesions and vessels of some millimeters live; the deepest level narrow, since its
#   parameters grow with the square of its width and its map is smallest.
# - One residual layer per block: the maps at 256 and 128 are 60 % of the time, and a second layer doubles them.
# - Four heads, not eight: softmax exponentials at 32x32 are per head, 10 ms against 7 ms a layer.
# - 128 numbers for the condition: one window and some disease terms need no 1280.
_STUDENT: dict[str, Any] = {
    **_PAPER,
    **_ATTENTION_UP_TO_32,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 96, 128, 160),
    "norm_num_groups": 16,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,  # diffusers' name for the number of heads
}

_PRESETS: dict[Preset, dict[str, Any]] = {
    Preset.PAPER: _PAPER,
    Preset.LITE: {**_PAPER, **_ATTENTION_UP_TO_32},
    Preset.STUDENT: _STUDENT,
}


@dataclass
class LoadedBackbone:
    """A backbone ready for inference.

    Attributes:
        network: in evaluation mode, float32, on the CPU.
        config: what it was built from.
        card: of a weight from the registry; None for an official folder, which has none.
        encoder_state: tensors of the condition encoder that came with it; empty for an official folder.
    """

    network: UNet2DConditionModel
    config: dict[str, Any]
    card: Card | None = None
    encoder_state: dict[str, torch.Tensor] = field(default_factory=dict)


def backbone_config(preset: Preset | str, **changes: Any) -> dict[str, Any]:
    """Arguments of ``UNet2DConditionModel`` for a preset; what is not named is diffusers' default, as published.

    Args:
        preset: ``paper``, ``lite`` or ``student``.
        changes: arguments to replace, for example ``block_out_channels`` for a narrow copy in a test.
    """
    return {**_PRESETS[Preset(preset)], **changes}


def build_backbone(
    config: Preset | str | Mapping[str, Any], device: torch.device | str | None = None
) -> UNet2DConditionModel:
    """A backbone with fresh random weights.

    Args:
        config: a preset, or arguments as :func:`backbone_config` gives them.
        device: where its tensors are made; ``meta`` makes shapes without memory.

    Returns:
        The network, in training mode as torch builds it.
    """
    from diffusers import UNet2DConditionModel

    arguments = backbone_config(config) if isinstance(config, str) else dict(config)
    with torch.device(device if device is not None else "cpu"):
        return UNet2DConditionModel(**arguments)


def decoder_channels(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels of each up block's output, deepest first; the adapters use all but the first (``paper``: 960)."""
    return tuple(int(width) for width in reversed(config["block_out_channels"]))


def parameter_count(network: torch.nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in network.parameters())


def load_backbone(source: str | Path, folder: Path | str | None = None) -> LoadedBackbone:
    """A backbone by the name of its weight, or from an official folder.

    Args:
        source: name in the registry such as ``backbone_student``, or a path to a folder that holds ``unet/``.
        folder: looked into for the named weight before the other places.

    Raises:
        WeightError: missing, damaged, or of another network.
    """
    if isinstance(source, Path) or Path(source).is_dir():
        return load_official(source)
    card, state = load_weight(source, folder)
    if card.architecture != ARCHITECTURE:
        raise WeightError(f"The weight '{source}' is a {card.architecture}, no backbone; give the name of a backbone.")
    where = f"The weight '{source}'"
    beside = (INPUT_KEY, PREDICTION_KEY)
    config = {key: value for key, value in card.architecture_parameters.items() if key not in beside}
    encoder = {key: state.pop(key) for key in list(state) if key.startswith(ENCODER_PREFIX)}
    network = _on_meta(config, where)
    _compare(network, {key: tuple(tensor.shape) for key, tensor in state.items()}, where)
    named = {key.removeprefix(ENCODER_PREFIX): tensor for key, tensor in encoder.items()}
    return LoadedBackbone(_filled(network, state), _arguments_of(config, where), card, named)


def load_official(folder: Path | str) -> LoadedBackbone:
    """The backbone of a checkpoint in diffusers' layout, as the authors publish it.

    Shapes are compared with the file's header before any memory is taken for the weights.

    Args:
        folder: holds ``unet/config.json`` and ``unet/diffusion_pytorch_model.safetensors``, or is that ``unet``.

    Raises:
        WeightError: files missing, damaged, pickled, or their shapes are not those of the configuration.
    """
    from safetensors import SafetensorError, safe_open

    unet = _unet_folder(Path(folder))
    config = _read_config(unet / _CONFIG_FILE)
    path = official_weight(folder)
    network = _on_meta(config, f"The configuration {unet / _CONFIG_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _compare(network, {key: tuple(file.get_slice(key).get_shape()) for key in keys}, f"The weight {path}")
            # A copy: what stays mapped into memory would change with the file.
            state = {key: file.get_tensor(key).to(torch.float32, copy=True) for key in keys}
    except (SafetensorError, ValueError) as error:
        raise WeightError(
            f"The weight {path} is no whole safetensors file ({error}): cut off, damaged or of another format; "
            "get it again."
        ) from error
    except OSError as error:
        raise WeightError(f"The weight {path} cannot be read ({error}); check its permissions.") from error
    _log.info("backbone from %s", path)
    return LoadedBackbone(_filled(network, state), _arguments_of(config, str(unet)))


def save_official(network: UNet2DConditionModel, folder: Path | str) -> Path:
    """Write a backbone in the official layout, so that plain diffusers loads it too.

    Args:
        network: any precision; written as it is.
        folder: ``unet`` is made in it.

    Returns:
        The ``unet`` folder.

    Raises:
        OutputError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    unet = Path(folder) / _UNET_FOLDER
    state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in network.state_dict().items()}
    with atomic_path(unet / _WEIGHT_FILE) as weight_file, atomic_path(unet / _CONFIG_FILE) as config_file:
        save_file(state, weight_file, {"format": "pt"})
        config_file.write_text(network.to_json_string(), encoding="utf-8")
    return unet


def _unet_folder(folder: Path) -> Path:
    for candidate in (folder / _UNET_FOLDER, folder):
        if (candidate / _CONFIG_FILE).is_file():
            return candidate
    raise WeightError(
        f"There is no {_UNET_FOLDER}/{_CONFIG_FILE} in {folder}; give the folder of the official checkpoint, "
        f"which holds '{_UNET_FOLDER}'."
    )


def official_weight(folder: Path | str) -> Path:
    """The weight file in an official folder, or in its ``unet``.

    Raises:
        WeightError: it is missing or pickled.
    """
    unet = _unet_folder(Path(folder))
    path = unet / _WEIGHT_FILE
    if path.is_file():
        return path
    for name in _PICKLED_FILES:
        if (unet / name).is_file():
            raise WeightError(f"{unet / name} may run code when opened; convert it to {_WEIGHT_FILE}.")
    raise WeightError(f"The weight {path} is missing; put it beside {_CONFIG_FILE}.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise WeightError(f"The configuration {path} is larger than one can be; get the checkpoint again.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"The configuration {path} cannot be read ({error}); get the checkpoint again.") from error
    if not isinstance(config, dict):
        raise WeightError(f"The configuration {path} is no JSON object; get the checkpoint again.")
    if config.get("_class_name", ARCHITECTURE) != ARCHITECTURE:
        raise WeightError(
            f"The configuration {path} is that of a {config['_class_name']}; give a checkpoint of a {ARCHITECTURE}."
        )
    return config


def _arguments_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of the network; JSON's lists become tuples.

    Raises:
        WeightError: the configuration asks for something this diffusers does not know.
    """
    from diffusers import UNet2DConditionModel

    known = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    named = {k: v for k, v in config.items() if not k.startswith("_") and k not in _EMA_KEYS}
    # Options of later versions that are switched off do no harm.
    unknown = sorted(key for key in named.keys() - known if named[key] not in (None, False))
    if unknown:
        raise WeightError(f"{where} has options unknown here ({', '.join(unknown)}); update diffusers.")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in named.items() if key in known}


#: Options with which the network would need inputs that a backbone is not given, or compute them in another way.
_FOREIGN_OPTIONS = ("addition_embed_type", "center_input_sample", "class_embed_type", "time_embedding_act_fn")


def _check_kind(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse other diffusion models, which would load and fail later."""
    needed = {"in_channels": CHANNELS, "encoder_hid_dim": EMBEDDING_SIZE, "encoder_hid_dim_type": "text_proj"}
    differs = sorted(key for key, value in needed.items() if arguments.get(key) != value)
    differs += [key for key in _FOREIGN_OPTIONS if arguments.get(key)]
    if differs:
        raise WeightError(
            f"{where} is of another diffusion model ({', '.join(f'{k}: {arguments.get(k)}' for k in differs)}); "
            "give a backbone of LCTfound."
        )


def _on_meta(config: Mapping[str, Any], where: str) -> UNet2DConditionModel:
    """The network of a configuration, without memory."""
    arguments = _arguments_of(config, where)
    _check_kind(arguments, where)
    try:
        return build_backbone(arguments, "meta")
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, RuntimeError, NotImplementedError) as error:
        raise WeightError(f"{where} describes no network ({error}); get the checkpoint again.") from error


def _compare(network: torch.nn.Module, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that are missing, unexpected or of another shape, before they are loaded."""
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    parts = [f"{len(missing)} tensors missing (first {missing[0]})"] if missing else []
    parts += [f"{len(unexpected)} unexpected (first {unexpected[0]})"] if unexpected else []
    parts += (
        [f"{len(wrong)} of another shape (first {wrong[0]}: {found[wrong[0]]} instead of {expected[wrong[0]]})"]
        if wrong
        else []
    )
    if parts:
        raise WeightError(
            f"{where} is not of the network its configuration describes: {', '.join(parts)}; "
            "get configuration and weight from the same checkpoint."
        )


def _filled(network: UNet2DConditionModel, state: Mapping[str, torch.Tensor]) -> UNet2DConditionModel:
    """The network with its tensors in place of the memoryless ones."""
    network.load_state_dict(state, assign=True)
    return network.eval()
