"""What the backbone is told about a slice (window, diseases), and how a slice in HU becomes its input.

A condition becomes a vector of 768 numbers in one of two ways with one interface: through the published sentence and
the CLS vector of a BERT model that the user provides, as the official checkpoint was trained; or through a built-in
encoder that needs no language model.

Source of sentence, windows and dropping: the published model, Nature Communications 2025 ("A lung CT vision foundation
model facilitating disease diagnosis and medical imaging") and its public code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from LCTfoundLib.errors import LCTfoundError, WeightError
from LCTfoundLib.networks.backbone import CHANNELS, EMBEDDING_SIZE

__all__ = [
    "FREEDOM",
    "LUNG",
    "MEDIASTINUM",
    "WIDE",
    "WINDOWS",
    "BertEncoder",
    "BuiltInEncoder",
    "Condition",
    "ConditionEncoder",
    "ConditionError",
    "Disease",
    "Language",
    "Scaling",
    "Window",
    "drop_condition",
    "neighboring_slices",
    "slice_input",
]


class ConditionError(LCTfoundError):
    """A condition cannot be encoded: the sentence is too long, or its language model cannot run here."""


class Language(StrEnum):
    """Language of the disease terms in a sentence."""

    ENGLISH = "english"
    CHINESE = "chinese"


class Disease(StrEnum):
    """The 14 findings of the pretraining data, by their English terms."""

    DPLD = "diffuse parenchymal lung disease"
    CALCIFICATION = "pulmonary calcification"
    BULLAE = "bullae"
    LYMPH_NODE_ENLARGEMENT = "lymph node enlargement"
    FIBROSIS = "fibrosis"
    BRONCHIECTASIS = "bronchiectasis"
    EMPHYSEMA = "emphysema"
    PLEURAL_EFFUSION = "pleural effusion"
    CAVITY = "cavity"
    ATELECTASIS = "atelectasis"
    PNEUMOTHORAX = "pneumothorax"
    TRACHEAL_MASS = "tracheal mass"
    MEDIASTINAL_MASS = "mediastinal mass"
    RIB_FRACTURE = "rib fracture"

    def term(self, language: Language) -> str:
        """The term in a language."""
        return self.value if language is Language.ENGLISH else _CHINESE[self]


#: Terms of radiology reports; that of the mediastinal mass stands in the authors' code, their other terms are not
#: published.
_CHINESE: dict[Disease, str] = {
    Disease.DPLD: "弥漫性实质性肺疾病",
    Disease.CALCIFICATION: "肺钙化",
    Disease.BULLAE: "肺大疱",
    Disease.LYMPH_NODE_ENLARGEMENT: "淋巴结肿大",
    Disease.FIBROSIS: "纤维化",
    Disease.BRONCHIECTASIS: "支气管扩张",
    Disease.EMPHYSEMA: "肺气肿",
    Disease.PLEURAL_EFFUSION: "胸腔积液",
    Disease.CAVITY: "空洞",
    Disease.ATELECTASIS: "肺不张",
    Disease.PNEUMOTHORAX: "气胸",
    Disease.TRACHEAL_MASS: "气管肿物",
    Disease.MEDIASTINAL_MASS: "纵隔肿瘤",
    Disease.RIB_FRACTURE: "肋骨骨折",
}


@dataclass(frozen=True)
class Window:
    """A display window, HU.

    Attributes:
        width: from black to white, above 0.
        level: middle.
    """

    width: float
    level: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.width) and math.isfinite(self.level) and self.width > 0):
            raise ConditionError(f"A window of width {self.width} and level {self.level} is none; give HU, width > 0.")

    def apply(self, hu: Tensor) -> Tensor:
        """HU to 0..1, float32, any shape; black and white beyond the window's ends."""
        low = self.level - self.width / 2
        return ((hu.float() - low) / self.width).clamp(0.0, 1.0)


LUNG = Window(1500, -500)
MEDIASTINUM = Window(400, 0)
#: The windows of the pretraining, by the name a user gives them.
WINDOWS = {"lung": LUNG, "mediastinal": MEDIASTINUM}
#: From air to bone, for images that are measured rather than looked at: the prior of reconstructions.
WIDE = Window(width=2000.0, level=0.0)


@dataclass(frozen=True)
class Condition:
    """What the backbone is told.

    Attributes:
        window: the slice is shown in; None tells nothing at all.
        diseases: of the scan; empty for none or unknown.
    """

    window: Window | None
    diseases: tuple[Disease, ...] = ()

    def __post_init__(self) -> None:
        if self.window is None and self.diseases:
            raise ConditionError("A condition with diseases needs a window too; give one.")

    def sentence(self, language: Language = Language.CHINESE) -> str:
        """The published sentence; its parts follow each other without a space, as in training."""
        if self.window is None:
            return "freedom."
        text = f"window width and window level is {_number(self.window.width)} and {_number(self.window.level)}."
        if self.diseases:
            text += "this image may related to " + ",".join(disease.term(language) for disease in self.diseases)
        return text


#: The condition that tells nothing, for generation without guidance.
FREEDOM = Condition(None)

#: Share of the training in which nothing is told; share of the rest in which the diseases are not.
_FREEDOM_SHARE, _DISEASE_DROP_SHARE = 0.05, 0.5


def drop_condition(condition: Condition, generator: torch.Generator) -> Condition:
    """Forget a part at random, as in the published training: all in 5 %, of the rest the diseases in half.

    The backbone so learns to work without a condition too. Always draws two numbers, so that what follows in the
    generator does not depend on the outcome.
    """
    everything, diseases = torch.rand(2, generator=generator, device=generator.device).tolist()
    if everything < _FREEDOM_SHARE:
        return FREEDOM
    return replace(condition, diseases=()) if diseases < _DISEASE_DROP_SHARE else condition


class Scaling(StrEnum):
    """How a windowed slice fills 0..1."""

    #: Each slice stretched from its darkest to its brightest pixel, as published (there also rounded down to 8 bits).
    SLICE = "slice"
    #: The window's ends, so that a gray value means the same HU in every slice.
    WINDOW = "window"


def slice_input(hu: Tensor, window: Window, scaling: Scaling = Scaling.SLICE) -> Tensor:
    """The backbone's input: every slice three times, -1..1.

    Args:
        hu: (N, H, W), any dtype.
        window: to show it in.
        scaling: ``SLICE`` for the official checkpoint.

    Returns:
        float32 (N, 3, H, W). A slice of one value is black with ``SLICE``.
    """
    return _scaled(hu[:, None].expand(-1, CHANNELS, -1, -1), window, scaling)


def neighboring_slices(hu: Tensor, window: Window, scaling: Scaling = Scaling.WINDOW) -> Tensor:
    """The student's input: every slice with the one below and the one above as channels, -1..1.

    Args:
        hu: (K, H, W), consecutive slices; the first and the last are their own missing neighbors.
        window: to show them in.
        scaling: over the three channels together.

    Returns:
        float32 (K, 3, H, W): slices k - 1, k, k + 1.
    """
    index = torch.arange(len(hu), device=hu.device)
    around = torch.stack([(index + step).clamp(0, len(hu) - 1) for step in (-1, 0, 1)], dim=1)
    return _scaled(hu[around], window, scaling)


class ConditionEncoder(Protocol):
    """From conditions to what the backbone attends to."""

    def encode(self, conditions: Sequence[Condition]) -> Tensor:
        """float32 (N, 1, 768)."""
        ...


class BuiltInEncoder(nn.Module):
    """Conditions as numbers, without a language model: a third of the vector each for width, level and diseases.

    Width and level are sines and cosines of 128 periods from 8 to 32768 HU: neighboring windows have close vectors, so
    that windows never seen in training work too. Diseases are rows of a trained table, averaged; what tells nothing
    has a trained vector of its own. 4,608 parameters; the mixing is left to the backbone's own projection of the
    condition.
    """

    def __init__(self) -> None:
        super().__init__()
        part = EMBEDDING_SIZE // 3
        #: Row 0 stands for no (known) disease, the others for ``Disease`` in its order.
        self.diseases = nn.Embedding(1 + len(Disease), part)
        self.freedom = nn.Parameter(torch.randn(EMBEDDING_SIZE))
        periods = torch.logspace(3, 15, part // 2, base=2.0, dtype=torch.float64)
        self.register_buffer("frequencies", (2 * math.pi / periods).float(), persistent=False)

    def encode(self, conditions: Sequence[Condition]) -> Tensor:
        """float32 (N, 1, 768)."""
        return torch.stack([self._vector(condition) for condition in conditions])[:, None]

    def forward(self, conditions: Sequence[Condition]) -> Tensor:
        return self.encode(conditions)

    def _vector(self, condition: Condition) -> Tensor:
        if condition.window is None:
            return self.freedom
        rows = [_DISEASE_ROWS[disease] for disease in condition.diseases] or [0]
        disease = self.diseases(torch.tensor(rows, device=self.freedom.device)).mean(dim=0)
        return torch.cat([self._waves(condition.window.width), self._waves(condition.window.level), disease])

    def _waves(self, value: float) -> Tensor:
        phases = value * self.get_buffer("frequencies")
        return torch.cat([phases.sin(), phases.cos()])


_DISEASE_ROWS = {disease: row for row, disease in enumerate(Disease, start=1)}


class BertEncoder:
    """Conditions through the published sentence and the CLS vector of a BERT model, which runs once per sentence.

    Nothing is downloaded: the folder is the user's.
    """

    def __init__(
        self,
        folder: Path | str,
        language: Language = Language.CHINESE,
        device: torch.device | str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            folder: of a BERT base model in transformers' layout: ``config.json``, ``vocab.txt`` or
                ``tokenizer.json``, ``model.safetensors``.
            language: of the disease terms; the official checkpoint's sentences had Chinese ones.
            device: where the model runs.

        Raises:
            WeightError: missing, damaged, pickled, or not a model with vectors of 768 numbers.
            ConditionError: transformers is not installed.
        """
        self.language = language
        self._tokenizer, self._model = _load_bert(Path(folder))
        self._model.to(device).requires_grad_(False).eval()
        self._known: dict[str, Tensor] = {}

    def encode(self, conditions: Sequence[Condition]) -> Tensor:
        """float32 (N, 1, 768) on the model's device.

        Raises:
            ConditionError: a sentence is longer than the model reads.
        """
        return self.encode_sentences([condition.sentence(self.language) for condition in conditions])

    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """As :meth:`encode`, for sentences of the user's own.

        Raises:
            ConditionError: a sentence is longer than the model reads.
        """
        for sentence in sentences:
            if sentence not in self._known:
                self._known[sentence] = self._cls_vector(sentence)
        return torch.stack([self._known[sentence] for sentence in sentences])[:, None]

    @torch.no_grad()
    def _cls_vector(self, sentence: str) -> Tensor:
        tokens = self._tokenizer(sentence, return_tensors="pt")
        count, limit = tokens["input_ids"].shape[1], int(self._model.config.max_position_embeddings)
        if count > limit:
            # The published code cuts silently; a disease would be lost without a word.
            raise ConditionError(
                f"The condition '{sentence[:40]}...' has {count} tokens, the language model reads {limit}; shorten it."
            )
        output = self._model(**tokens.to(self._model.device))
        return output.last_hidden_state[0, 0].float().clone()


def _scaled(channels: Tensor, window: Window, scaling: Scaling) -> Tensor:
    shown = window.apply(channels)
    if scaling is Scaling.SLICE:
        low, high = shown.amin(dim=(1, 2, 3), keepdim=True), shown.amax(dim=(1, 2, 3), keepdim=True)
        shown = (shown - low) / (high - low + 1e-8)  # 1e-8: a slice of one value
    return (shown - 0.5) / 0.5


def _number(value: float) -> str:
    """As in the sentences of the training: whole numbers without a point."""
    return str(int(value)) if float(value).is_integer() else str(value)


def _load_bert(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a local folder."""
    _check_bert_folder(folder)
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise ConditionError(
            "A language model needs the package transformers; install it, or use the built-in encoder."
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # the library's errors for a damaged folder are of many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise WeightError(f"The language model in {folder} cannot be loaded ({reason}); get it again.") from error
    # Without this a model of another kind would quietly keep random weights. The pooler is not used.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        first = missing[0] if missing else sorted(report["mismatched_keys"])[0]
        raise WeightError(f"The language model in {folder} is not whole ({first} is missing or wrong); get it again.")
    if model.config.hidden_size != EMBEDDING_SIZE:
        raise WeightError(
            f"The language model in {folder} has vectors of {model.config.hidden_size} numbers; "
            f"use a BERT base model, which has {EMBEDDING_SIZE}."
        )
    return tokenizer, model


def _check_bert_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise WeightError(
            f"There is no language model folder {folder}; give the folder of a BERT base model, "
            "or use the built-in encoder."
        )
    if not (folder / "config.json").is_file():
        raise WeightError(f"{folder} holds no config.json; give the folder of a BERT base model.")
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise WeightError(f"{folder} holds neither vocab.txt nor tokenizer.json; get the language model again.")
    if not (folder / "model.safetensors").is_file():
        if (folder / "pytorch_model.bin").is_file():
            raise WeightError(
                f"{folder / 'pytorch_model.bin'} may run code when opened; convert it to model.safetensors."
            )
        raise WeightError(f"{folder} holds no model.safetensors; get the language model again.")
