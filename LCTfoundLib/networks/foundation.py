"""The foundation model as one piece: backbone, condition encoder, and what its input channels are.

The shipped student brings its own condition encoder and sees three neighboring slices; an official checkpoint takes its
conditions from a BERT model that the user provides, and sees one slice three times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.backbone import ARCHITECTURE, ENCODER_PREFIX, INPUT_KEY, PREDICTION_KEY, load_backbone
from LCTfoundLib.networks.conditions import (
    BertEncoder,
    BuiltInEncoder,
    ConditionEncoder,
    Language,
    Scaling,
    Window,
    neighboring_slices,
    slice_input,
)
from LCTfoundLib.networks.features import Prediction
from LCTfoundLib.weights.registry import Card, save_weight

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["STUDENT_WEIGHT", "FoundationModel", "InputRecipe", "Slices", "load_foundation", "save_foundation"]

#: Name of the shipped backbone.
STUDENT_WEIGHT = "backbone_student"


class Slices(StrEnum):
    """What the three input channels are."""

    #: One slice three times, as published.
    REPEAT = "repeat"
    #: The slice with the ones below and above it.
    NEIGHBORS = "neighbors"


@dataclass(frozen=True)
class InputRecipe:
    """How slices in HU become the backbone's input. The defaults are the official checkpoint's.

    Attributes:
        slices: what the channels are.
        scaling: of HU to -1..1.
        side: pixels of a side of the whole slices it was trained with.
    """

    slices: Slices = Slices.REPEAT
    scaling: Scaling = Scaling.SLICE
    side: int = 256

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputRecipe:
        """From a card.

        Raises:
            ValueError: a value is unknown.
        """
        side = int(values.get("side", cls.side))
        if side < 1:
            raise ValueError(f"a side of {side} pixels")
        return cls(Slices(values["slices"]), Scaling(values["scaling"]), side)

    def __call__(self, hu: Tensor, window: Window) -> Tensor:
        """Consecutive slices (K, H, W) to the backbone's input (K, 3, H, W), -1..1."""
        if self.slices is Slices.NEIGHBORS:
            return neighboring_slices(hu, window, self.scaling)
        return slice_input(hu, window, self.scaling)


@dataclass
class FoundationModel:
    """A backbone with all it needs.

    Attributes:
        network: in evaluation mode.
        encoder: of conditions.
        recipe: of the input.
        card: None for an official checkpoint.
        prediction: what the network's answer is.
    """

    network: UNet2DConditionModel
    encoder: ConditionEncoder
    recipe: InputRecipe
    card: Card | None = None
    prediction: Prediction = Prediction.EPSILON

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> FoundationModel:
        """Move the network; conditions are encoded where the encoder is, and moved by whoever uses them."""
        self.network.to(device)
        return self


def load_foundation(
    source: str | Path = STUDENT_WEIGHT,
    folder: Path | str | None = None,
    language_model: Path | str | None = None,
    language: Language = Language.CHINESE,
) -> FoundationModel:
    """The foundation model by the name of its weight, or from an official folder with a language model.

    Args:
        source: name in the registry, or a folder that holds ``unet/``.
        folder: looked into for the named weight before the other places.
        language_model: folder of a BERT base model; used in place of the built-in encoder when given.
        language: of its disease terms.

    Raises:
        WeightError: missing, damaged, of another network, or a language model is needed and was not given.
        ConditionError: the language model cannot run here.
    """
    loaded = load_backbone(source, folder)
    if language_model is None and not loaded.encoder_state:
        raise WeightError(
            f"The backbone {source} takes its conditions from a language model; give the folder of the BERT base "
            "model it was trained with."
        )
    recipe, prediction = InputRecipe(), Prediction.EPSILON
    told = loaded.card.architecture_parameters if loaded.card is not None else {}
    encoder: ConditionEncoder
    try:
        if INPUT_KEY in told:
            recipe = InputRecipe.from_dict(told[INPUT_KEY])
        prediction = Prediction(told.get(PREDICTION_KEY, prediction))
        if language_model is None:
            encoder = BuiltInEncoder()
            encoder.load_state_dict(loaded.encoder_state)
            encoder.requires_grad_(False).eval()
        else:
            encoder = BertEncoder(language_model, language)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightError(f"The weight '{source}' is not what its card describes ({reason}); get it again.") from error
    return FoundationModel(loaded.network, encoder, recipe, loaded.card, prediction)


def save_foundation(
    network: Mapping[str, Tensor],
    encoder: Mapping[str, Tensor],
    config: Mapping[str, Any],
    recipe: InputRecipe,
    card: Card,
    folder: Path | str,
    prediction: Prediction = Prediction.EPSILON,
) -> Card:
    """Write a backbone and its built-in condition encoder as one weight.

    Args:
        network: the network's tensors.
        encoder: those of its :class:`BuiltInEncoder`.
        config: the network's arguments.
        recipe: of its input.
        card: architecture and parameters are filled in.
        folder: made if missing.
        prediction: what its answer is.

    Returns:
        The card as written.

    Raises:
        OutputError: the folder cannot be written.
    """
    parameters = {**config, INPUT_KEY: {key: str(value) for key, value in asdict(recipe).items()}}
    parameters[PREDICTION_KEY] = str(prediction)
    filled = replace(card, architecture=ARCHITECTURE, architecture_parameters=parameters)
    return save_weight(dict(network) | {ENCODER_PREFIX + key: t for key, t in encoder.items()}, filled, folder)
