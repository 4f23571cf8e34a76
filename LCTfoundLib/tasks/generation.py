"""Generation: synthetic CT images of a window and of disease terms from the diffusion backbone.

Noise of each image's own -> a sampler that follows the backbone's predictions from the noisiest timestep to the
cleanest one -> HU of the window. What comes out shows no patient, and its provenance says so.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import LCTfoundLib
from LCTfoundLib.errors import LCTfoundError, OutOfMemory, WeightError
from LCTfoundLib.networks.backbone import CHANNELS, official_weight
from LCTfoundLib.networks.conditions import (
    FREEDOM,
    LUNG,
    WINDOWS,
    Condition,
    ConditionEncoder,
    ConditionError,
    Disease,
    Language,
    Scaling,
    Window,
)
from LCTfoundLib.networks.features import NoiseSchedule, noise_of
from LCTfoundLib.networks.foundation import STUDENT_WEIGHT, FoundationModel, Slices, load_foundation
from LCTfoundLib.networks.sampling import Sampler, denoise, timesteps
from LCTfoundLib.runtime.device import DeviceChoice, choose_device, free_memory
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.runtime.tiling import is_out_of_memory, release_memory

__all__ = [
    "GenerationRequest",
    "GenerationResult",
    "NoisePredictor",
    "Stage",
    "diseases_of",
    "generate_images",
    "sampler_of",
    "stages",
    "window_of",
]

#: Image sides are multiples of this: the backbone halves them four times.
_MULTIPLE = 16
_MOST_STEPS = NoiseSchedule.steps
#: Timestep that an enlarged image's new detail begins at: half of it noise, which hides what enlarging blurred.
_DETAIL_FROM = 250
#: What a user says to name no disease.
_NO_DISEASE = "no disease"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked for.

    Attributes:
        window: the images are made in.
        diseases: they may show; empty names none.
        count: of images.
        size: pixels of a side, a multiple of 16. An image larger than the whole slices that the backbone was trained
            with is made at half the size, enlarged, and given its detail by some steps more: at once it would be a
            patchwork of chests.
        sampler: see ``Sampler``.
        steps: of the sampler, 1 to 1000.
        guidance: 1 follows the condition as learned, more exaggerates it at twice the time, 0 ignores it.
        seed: of the noise; image n of a seed is the same whatever the count and the batch.
        backbone: name of a weight, or an official folder with ``unet``.
        weights_folder: other place of the weights.
        language_model: folder of a BERT base model, which an official folder needs.
        language: of the disease terms told to it.
        device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
        precision: ``fp32``, ``fp16`` or ``bf16``; None takes the fastest that is safe.
        batch: images at a time; made smaller when memory runs out.

    Raises:
        LCTfoundError: a number is out of its range.
    """

    window: Window = LUNG
    diseases: tuple[Disease, ...] = ()
    count: int = 1
    size: int = 256
    sampler: Sampler = Sampler.DPM_SOLVER
    steps: int = 20
    guidance: float = 1.0
    seed: int = 0
    backbone: str | Path = STUDENT_WEIGHT
    weights_folder: Path | None = None
    language_model: Path | None = None
    language: Language = Language.CHINESE
    device: str = "auto"
    precision: str | None = None
    batch: int = 4

    def __post_init__(self) -> None:
        if self.size < _MULTIPLE or self.size % _MULTIPLE:
            near = max(_MULTIPLE, round(self.size / _MULTIPLE) * _MULTIPLE)
            raise LCTfoundError(f"A size of {self.size} is no multiple of {_MULTIPLE}; take {near}.")
        if not 1 <= self.steps <= _MOST_STEPS:
            raise LCTfoundError(f"{self.steps} steps cannot be sampled; take 1 to {_MOST_STEPS}, for example 20.")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise LCTfoundError(f"A guidance of {self.guidance} is none; take 0 or more, 1 switches it off.")
        if self.count < 1 or self.batch < 1:
            raise LCTfoundError(f"{min(self.count, self.batch)} images cannot be made; ask for 1 at least.")
        if not 0 <= self.seed < 2**63:
            raise LCTfoundError(f"{self.seed} cannot be a seed; take a whole number from 0.")

    @property
    def condition(self) -> Condition:
        """What the backbone is told."""
        return Condition(self.window, self.diseases)


@dataclass
class GenerationResult:
    """Synthetic images.

    Attributes:
        hu: float32 (N, C, H, W), HU within the window. C is 3 for a backbone of neighboring slices (below, image,
            above), 1 for one of single slices.
        window: of the images.
        absolute: whether the gray values mean HU as in training; a backbone that saw every slice stretched from its
            darkest to its brightest pixel knows them only roughly.
        provenance: weight, condition, sampler, seed, versions, seconds.
    """

    hu: np.ndarray
    window: Window
    absolute: bool
    provenance: dict[str, Any] = field(default_factory=dict)


def generate_images(
    request: GenerationRequest | None = None,
    progress: Progress | None = None,
    load: Callable[[str | Path, Path | None, Path | None, Language], FoundationModel] = load_foundation,
) -> GenerationResult:
    """Make synthetic CT images.

    Args:
        request: what to show and how to make it.
        progress: told after each step of the sampler; stops the run when cancelled.
        load: gives the foundation model by name or folder, weights folder, language model and its language.

    Raises:
        WeightError: the weight or the language model is missing, damaged or of another network.
        ConditionError: the condition cannot be encoded.
        LCTfoundError: the device cannot be used, or the numbers ran out of the precision's range.
        OutOfMemory: not even one image at a time on the CPU fits.
        Cancelled: the user stopped.
    """
    request = request or GenerationRequest()
    start = time.monotonic()
    loading, making = Progress.of(progress).split({"Loading": 1, "Generating": 2 * request.count})
    loading.update(0.0)
    _check_memory(request)
    choice = choose_device(request.device, request.precision)
    model = load(request.backbone, request.weights_folder, request.language_model, request.language)
    absolute = model.recipe.scaling is Scaling.WINDOW
    if not absolute:
        making.warn(
            "This backbone was trained on slices stretched from their darkest to their brightest pixel: "
            "the HU of its images are approximate."
        )
    weight = _weight(request, model)
    loading.done()
    images = _Generator(request, model, choice, making).all()
    channels = images if model.recipe.slices is Slices.NEIGHBORS else images.mean(dim=1, keepdim=True)
    hu = request.window.level + request.window.width / 2 * channels
    provenance = _provenance(request, model, choice, weight) | {"seconds": round(time.monotonic() - start, 1)}
    making.done()
    return GenerationResult(hu.numpy(), request.window, absolute, provenance)


# -- what a user writes ----------------------------------------------------------------------------------------------


def window_of(text: str) -> Window:
    """A window by its name (``lung``, ``mediastinal``) or as ``WIDTH,LEVEL`` in HU.

    Raises:
        ConditionError: it is neither.
    """
    known = WINDOWS.get(text.strip().lower())
    if known is not None:
        return known
    try:
        width, level = (float(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(WINDOWS)
        raise ConditionError(f"There is no window '{text}'; give {names} or WIDTH,LEVEL such as 400,40.") from None
    return Window(width, level)


def diseases_of(terms: Sequence[str]) -> tuple[Disease, ...]:
    """Diseases by their English or Chinese terms, each once, in the order given; ``no disease`` names none.

    Raises:
        ConditionError: a term is unknown, or ``no disease`` stands beside one.
    """
    known = {disease.term(language).lower(): disease for disease in Disease for language in Language}
    asked = [" ".join(term.lower().split()) for term in terms]
    for term in asked:
        if term != _NO_DISEASE and term not in known:
            raise ConditionError(f"There is no condition '{term}'; choose of: {', '.join(Disease)}, {_NO_DISEASE}.")
    if _NO_DISEASE in asked and len(set(asked)) > 1:
        raise ConditionError(f"'{_NO_DISEASE}' cannot stand beside another condition; leave one of them out.")
    return tuple(dict.fromkeys(known[term] for term in asked if term != _NO_DISEASE))


def sampler_of(name: str) -> Sampler:
    """A sampler by its name.

    Raises:
        LCTfoundError: there is none.
    """
    try:
        return Sampler(name.lower())
    except ValueError:
        raise LCTfoundError(f"There is no sampler '{name}'; choose of: {', '.join(Sampler)}.") from None


# -- sampling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Of the making of an image.

    Attributes:
        side: pixels.
        first: timestep it begins at.
        steps: of the sampler.
    """

    side: int
    first: int
    steps: int


def stages(request: GenerationRequest, whole: int) -> list[Stage]:
    """A whole image of a size that the backbone knows, then doubled and detailed up to the size asked for.

    Args:
        request: its size and steps.
        whole: pixels of a side of the whole slices the backbone was trained with.
    """
    sides = [request.size]
    while sides[0] > whole and sides[0] % (2 * _MULTIPLE) == 0:
        sides.insert(0, sides[0] // 2)
    # As many steps as the sampler has for that range of noise.
    later = sum(step <= _DETAIL_FROM for step in timesteps(request.steps))
    detail = [Stage(side, _DETAIL_FROM, min(max(later, 1), _DETAIL_FROM + 1)) for side in sides[1:]]
    return [Stage(sides[0], _MOST_STEPS - 1, request.steps), *detail]


class NoisePredictor:
    """The backbone's prediction for one condition, guided against telling nothing (Ho and Salimans, 2022).

    ``untold + guidance * (told - untold)``, where untold is the condition that was dropped in training ("freedom.").
    """

    def __init__(self, model: FoundationModel, condition: Condition, guidance: float, choice: DeviceChoice) -> None:
        """Encode the condition, once.

        Args:
            model: on the device of ``choice``.
            condition: to tell.
            guidance: 1 asks the network once, with the condition; 0 once, without; else twice in one batch.
            choice: device and precision of the network; the answer is float32.

        Raises:
            ConditionError: the condition cannot be encoded.
        """
        self.network, self.guidance, self.choice = model.network, guidance, choice
        self.prediction, self._schedule = model.prediction, NoiseSchedule()
        conditions = {1.0: [condition], 0.0: [FREEDOM]}.get(guidance, [condition, FREEDOM])
        self.embeddings = _encoded(model.encoder, conditions).to(choice.device)

    def __call__(self, images: Tensor, timestep: int) -> Tensor:
        """Noise in (N, 3, H, W) at a timestep, float32."""
        count, kinds = len(images), len(self.embeddings)
        inputs = images.repeat(kinds, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        half = self.choice.dtype != torch.float32
        with torch.autocast(self.choice.device.type, self.choice.dtype) if half else nullcontext():
            answer = self.network(inputs, timestep, self.embeddings.repeat_interleave(count, dim=0)).sample.float()
        if kinds > 1:
            told, untold = answer.chunk(2)
            answer = untold + self.guidance * (told - untold)
        times = torch.full((count,), timestep, device=images.device)
        return self._schedule.noise_in(images, answer, times, self.prediction)


def _encoded(encoder: ConditionEncoder, conditions: Sequence[Condition]) -> Tensor:
    with torch.inference_mode():
        return encoder.encode(conditions)


class _Generator:
    """All images of a request, group by group, with less at a time when memory runs out."""

    def __init__(
        self, request: GenerationRequest, model: FoundationModel, choice: DeviceChoice, progress: Progress
    ) -> None:
        self.request, self.model, self.choice, self.progress = request, model, choice, progress
        self.batch = min(request.batch, request.count)
        self.stages = stages(request, model.recipe.side)
        self.images = torch.empty(request.count, CHANNELS, request.size, request.size)

    def all(self) -> Tensor:
        """float32 (N, 3, H, W), -1..1, on the CPU."""
        done = 0
        while done < self.request.count:
            group = range(done, min(done + self.batch, self.request.count))
            try:
                self.images[group.start : group.stop] = self._group(group).cpu()
                done = group.stop
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                _log.warning("%s with %d images on %s", type(error).__name__, len(group), self.choice.device)
            # Outside of the handler, where its traceback no longer holds the failed run's tensors.
            self._take_less()
        return self.images

    @torch.inference_mode()
    def _group(self, group: range) -> Tensor:
        request, device = self.request, self.choice.device
        self.model.to(device).network.to(memory_format=torch.channels_last)
        predict = NoisePredictor(self.model, request.condition, request.guidance, self.choice)
        found: Tensor | None = None
        for draw, stage in enumerate(self.stages):
            shape = (CHANNELS, stage.side, stage.side)
            noise = torch.stack([noise_of(request.seed, number, shape, draw) for number in group]).to(device)
            if found is not None:
                found = F.interpolate(found, size=shape[1:], mode="bicubic", align_corners=False).clamp(-1.0, 1.0)

            def tell(done: int, draw: int = draw) -> None:
                self._tell(group, draw, done)

            found = denoise(predict, noise, request.sampler, stage.steps, tell, found, stage.first)
        assert found is not None
        if not torch.isfinite(found).all():
            raise LCTfoundError(
                f"The backbone's numbers ran out of the range of {self.choice.precision.value}; choose precision fp32, "
                "and if it happens there too, get the weight again."
            )
        return found

    def _tell(self, group: range, draw: int, steps: int) -> None:
        count = self.request.count
        which = f"{group.start + 1}" + (f"-{group.stop}" if len(group) > 1 else "")
        work = [stage.steps * stage.side**2 for stage in self.stages]
        done = (sum(work[:draw]) + steps * self.stages[draw].side ** 2) / sum(work)
        self.progress.update((group.start + len(group) * done) / count, f"Generating image {which} of {count}")

    def _take_less(self) -> None:
        """A smaller batch, then the CPU.

        Raises:
            OutOfMemory: nothing less is left.
        """
        release_memory()
        if self.batch > 1:
            self.batch //= 2
        elif self.choice.device.type != "cpu":
            self.choice = self.choice.cpu_fallback()
            self.progress.warn(
                "The GPU's memory does not suffice; the computation goes on on the CPU and takes longer."
            )
        else:
            raise OutOfMemory(
                f"An image of {self.request.size} pixels does not fit into memory; close other programs or choose a "
                "smaller size."
            )


def _check_memory(request: GenerationRequest) -> None:
    """Refuse before the long work a result that could not be held (as it is made, and in HU)."""
    one = 2 * 4 * CHANNELS * request.size**2
    fit = int(free_memory()) // one
    if request.count > fit:
        raise OutOfMemory(f"{request.count} images do not fit into memory; make {fit} at most at a time.")


# -- provenance ------------------------------------------------------------------------------------------------------


def _weight(request: GenerationRequest, model: FoundationModel) -> dict[str, Any]:
    card = model.card
    if card is not None:
        return {"name": card.name, "version": card.version, "sha256": card.sha256, "license": card.license}
    return {
        "name": Path(request.backbone).resolve().name,
        "version": "official checkpoint",
        "sha256": _official_checksum(Path(request.backbone)),
        "license": "as its authors gave it",
    }


def _official_checksum(folder: Path) -> str | None:
    """Of the weight file in an official folder; None if it went away since it was loaded."""
    try:
        with official_weight(folder).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, WeightError):
        return None


def _provenance(
    request: GenerationRequest, model: FoundationModel, choice: DeviceChoice, weight: dict[str, Any]
) -> dict[str, Any]:
    window = request.window
    language_model = None if request.language_model is None else request.language_model.resolve().name
    return {
        "product": f"LCTfound {LCTfoundLib.__version__}",
        "task": "synthetic CT images",
        "weight": weight,
        "window": {"width": window.width, "level": window.level},
        "diseases": [disease.value for disease in request.diseases],
        "sentence": request.condition.sentence(request.language if language_model else Language.ENGLISH),
        "language model": language_model,
        "count": request.count,
        "size": request.size,
        "sampler": request.sampler.value,
        "steps": request.steps,
        "stages": [
            {"size": stage.side, "timesteps": timesteps(stage.steps, stage.first)}
            for stage in stages(request, model.recipe.side)
        ],
        "guidance": request.guidance,
        "seed": request.seed,
        "channels": model.recipe.slices.value,
        "gray values": "HU" if model.recipe.scaling is Scaling.WINDOW else "HU, approximate",
        "device": f"{choice.device} ({choice.name}), {choice.precision.value}",
        "versions": {name: version(name) for name in ("diffusers", "numpy", "torch")},
    }
