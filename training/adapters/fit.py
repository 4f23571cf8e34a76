"""Fit an adapter on a frozen or a tuned backbone: one loop, one loss per kind, the published settings as they are.

    network = load_foundation().network
    adapter = ColdRestorer(BackboneShape.of(network))
    fit(adapter, network, batches, restoration_loss, LOW_DOSE)
    save_adapter(adapter, network, card, folder)

A full fine-tune is the same with ``adapter.tune(network)`` before it. The resident backbone is never written to: it is
frozen, and what is tuned are the adapter's own tensors in its place.

Source of the settings: the published model, Nature Communications 2025 ("A lung CT vision foundation model facilitating
disease diagnosis and medical imaging") and its public code; where it gives none, the comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LCTfoundLib.networks.adapter_base import Adapter, with_tensors
from LCTfoundLib.networks.cold_diffusion import ColdRestorer
from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.image_condition import ImageCondition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "LOW_DOSE",
    "MEDIASTINAL_TUMOR",
    "MPR",
    "PAP",
    "PROGNOSIS",
    "VIRTUAL_CTA",
    "WHOLE_LUNG",
    "Batch",
    "Loss",
    "Method",
    "Settings",
    "binary_loss",
    "classification_loss",
    "fit",
    "generation_loss",
    "pixel_loss",
    "restoration_loss",
]

#: What a loss needs, by name; see each. ``embedding`` (of the condition, (N or 1, 1, 768)) is in all.
Batch = Mapping[str, Tensor]
#: Of an adapter on a backbone for a batch, with random numbers from the generator; a scalar.
Loss = Callable[[Adapter, "UNet2DConditionModel", Batch, torch.Generator], Tensor]


class Method(StrEnum):
    """Optimizer."""

    ADAM = "adam"
    ADAMW = "adamw"
    SGD = "sgd"


@dataclass(frozen=True)
class Settings:
    """How an adapter is fitted.

    Attributes:
        method: optimizer.
        rate: learning rate.
        weight_decay: as the optimizer has it.
        epochs: passes over the batches.
        steps: in place of epochs; 0 for epochs.
        cosine: the rate falls to 0 along half a cosine.
        tenths: epochs after which the rate is a tenth of what it was.
        warmup: steps in which the rate rises from 0.
        clip: norm that gradients are cut to.
    """

    method: Method
    rate: float
    weight_decay: float = 0.0
    epochs: int = 0
    steps: int = 0
    cosine: bool = False
    tenths: tuple[int, ...] = ()
    warmup: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if (self.epochs > 0) == (self.steps > 0):
            raise ValueError("give either epochs or steps")

    def factor(self, step: int, epoch: int, total: int) -> float:
        """Of the learning rate at a step of ``total``, in an epoch."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / total)) if self.cosine else 1.0
        return rise * fall * 0.1 ** sum(epoch >= begin for begin in self.tenths)


#: Pixel head on the frozen backbone.
MEDIASTINAL_TUMOR = Settings(Method.ADAMW, 1e-3, 1e-2, epochs=20, cosine=True, warmup=100)
#: Full fine-tune with a replaced output layer.
WHOLE_LUNG = Settings(Method.ADAMW, 1e-4, 1e-2, epochs=40)
#: Slice head on the frozen backbone.
PAP = Settings(Method.SGD, 1e-3, 1e-3, epochs=10, tenths=(7,))
#: The same, both windows.
MPR = Settings(Method.ADAMW, 1e-3, 1e-3, epochs=100, tenths=(40, 80))
#: Full fine-tune of a classifier, with label smoothing.
PROGNOSIS = Settings(Method.SGD, 2e-3, 1e-3, epochs=4)
#: Adjust sub-network on the frozen backbone.
LOW_DOSE = Settings(Method.ADAM, 2e-4, steps=15_000)
#: Not published; the rate of the pretraining, as many steps as the low-dose task.
VIRTUAL_CTA = Settings(Method.ADAMW, 1e-4, 1e-2, steps=15_000, warmup=500)

#: Of the published focal term.
_FOCAL_ALPHA, _FOCAL_GAMMA = 0.25, 2.0
#: SGD's momentum and the amount of smoothing are not published; these are the customary ones.
_MOMENTUM, _SMOOTHING = 0.9, 0.1


def fit(
    adapter: Adapter,
    network: UNet2DConditionModel,
    batches: Iterable[Batch],
    loss: Loss,
    settings: Settings,
    *,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train an adapter on a resident backbone, which stays as it was.

    Args:
        adapter: trained in place, on the backbone's device; left in evaluation mode. With :meth:`Adapter.tune` before,
            the backbone's weights are trained with it, in the adapter.
        network: the backbone; frozen here.
        batches: gone through anew in every epoch.
        loss: of a batch.
        settings: how.
        seed: of the random numbers of the losses; the order of the batches is theirs.
        report: is told step and loss.

    Returns:
        The loss of every step.

    Raises:
        ValueError: there are no batches.
        FloatingPointError: the loss is not finite.
    """
    device = next(network.parameters()).device
    network.requires_grad_(False).eval()
    adapter.to(device).requires_grad_(True).train()
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = _optimizer(adapter, settings)
    losses: list[float] = []
    for step, (epoch, batch, total) in enumerate(_rounds(batches, settings)):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * settings.factor(step, epoch, total)
        losses.append(_step(adapter, network, {k: v.to(device) for k, v in batch.items()}, loss, optimizer, generator))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step} is {losses[-1]}; try a smaller learning rate")
        nn.utils.clip_grad_norm_(adapter.parameters(), settings.clip)
        optimizer.step()
        if report is not None:
            report(step, losses[-1])
    adapter.eval()
    return losses


def _step(
    adapter: Adapter,
    network: UNet2DConditionModel,
    batch: Batch,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    """Gradients of a batch; bfloat16 on a GPU."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=generator.device.type == "cuda"):
        value = loss(adapter, network, batch, generator)
    value.backward()
    return float(value.detach())


def _optimizer(adapter: Adapter, settings: Settings) -> torch.optim.Optimizer:
    values = list(adapter.parameters())
    if settings.method is Method.SGD:
        return torch.optim.SGD(values, settings.rate, momentum=_MOMENTUM, weight_decay=settings.weight_decay)
    kind = torch.optim.AdamW if settings.method is Method.ADAMW else torch.optim.Adam
    return kind(values, settings.rate, weight_decay=settings.weight_decay)


def _rounds(batches: Iterable[Batch], settings: Settings) -> Iterator[tuple[int, Batch, int]]:
    """Epoch, batch, and number of all steps."""
    step = epoch = 0
    total = settings.steps or settings.epochs * sum(1 for _ in batches)
    while step < total:
        begin = step
        for batch in batches:
            if step == total:
                return
            yield epoch, batch, total
            step += 1
        if step == begin:
            break
        epoch += 1
    if not step:
        raise ValueError("there are no batches to train on")


def _noise_like(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device)


def _answer(adapter: Adapter, network: UNet2DConditionModel, batch: Batch, generator: torch.Generator) -> Tensor:
    images = batch["images"]
    return adapter.run(network, images, batch["embedding"], _noise_like(images, generator)).float()


def pixel_loss(adapter: Adapter, network: UNet2DConditionModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """Cross entropy and focal loss of each pixel, as published: ``images`` (N, 3, H, W), ``target`` (N, H, W) int64."""
    entropy = F.cross_entropy(_answer(adapter, network, batch, generator), batch["target"], reduction="none")
    focal = _FOCAL_ALPHA * (1 - torch.exp(-entropy)) ** _FOCAL_GAMMA * entropy
    return (entropy + focal).mean()


def classification_loss(
    adapter: Adapter, network: UNet2DConditionModel, batch: Batch, generator: torch.Generator
) -> Tensor:
    """Cross entropy of each slice with label smoothing: ``images`` (N, 3, H, W), ``target`` (N,) int64.

    Another input, as the published tumor location, goes into one of the three channels.
    """
    logits = _answer(adapter, network, batch, generator)
    return F.cross_entropy(logits, batch["target"], label_smoothing=_SMOOTHING)


def binary_loss(adapter: Adapter, network: UNet2DConditionModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """Binary cross entropy of each output: ``images`` (N, 3, H, W), ``target`` (N, outputs), 0..1."""
    logits = _answer(adapter, network, batch, generator)
    return F.binary_cross_entropy_with_logits(logits, batch["target"].to(logits.dtype))


def restoration_loss(
    adapter: Adapter, network: UNet2DConditionModel, batch: Batch, generator: torch.Generator
) -> Tensor:
    """Squared error of two estimates, one step apart: ``low`` (N, 3, H, W), ``clean`` (N, 1, H, W), both -1..1.

    The second starts from what the first makes of its state, as on the way back, so that errors that would add up there
    are trained against (CoreDiff). The first is told its own state as the last estimate, never the truth, which maps
    could simply hand through.
    """
    if not isinstance(adapter, ColdRestorer):
        raise TypeError(f"a {type(adapter).__name__} restores nothing")
    return with_tensors(network, adapter.tensors(), _two_estimates, adapter, batch, generator)


def _two_estimates(
    network: UNet2DConditionModel, adapter: ColdRestorer, batch: Batch, generator: torch.Generator
) -> Tensor:
    low, clean, process = batch["low"], batch["clean"], adapter.diffusion
    embedding = batch["embedding"].expand(len(low), -1, -1)
    steps = torch.randint(1, process.steps + 1, (len(low),), generator=generator, device=low.device)
    state = process.degrade(clean, low[:, 1:2], steps)
    first = adapter.estimate(network, state, steps, state, low, embedding)
    below = (steps - 1).clamp(min=1)  # a slice at the last step takes it again
    again = process.degrade(first, low[:, 1:2], below)
    second = adapter.estimate(network, again, below, first, low, embedding)
    return 0.5 * (F.mse_loss(first.float(), clean) + F.mse_loss(second.float(), clean))


def generation_loss(
    adapter: Adapter, network: UNet2DConditionModel, batch: Batch, generator: torch.Generator
) -> Tensor:
    """Squared error of the predicted noise or v: ``condition`` and ``wanted``, both (N, 3, H, W), -1..1."""
    if not isinstance(adapter, ImageCondition):
        raise TypeError(f"a {type(adapter).__name__} generates nothing")
    condition, wanted = batch["condition"], batch["wanted"]
    noise = _noise_like(wanted, generator)
    timesteps = torch.randint(0, NoiseSchedule.steps, (len(wanted),), generator=generator, device=wanted.device)
    noisy = adapter.schedule.add_noise(wanted, noise, timesteps)
    embedding = batch["embedding"].expand(len(wanted), -1, -1)
    predicted = with_tensors(network, adapter.tensors(), adapter.predict, noisy, timesteps, embedding, condition)
    return F.mse_loss(predicted.float(), adapter.schedule.target(wanted, noise, timesteps, adapter.prediction))
