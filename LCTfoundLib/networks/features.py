"""What the backbone sees in a slice: decoder and deep features at several timesteps, and the same from a single pass.

The published adapters add noise of some timesteps (0, 50, 100, 150) to a slice, run the backbone on each, and take the
outputs of its up blocks 1 to 4 (960 channels for ``paper``, 3840 over four timesteps) for dense tasks, or of its deep
block for a whole slice. :class:`FeatureExtractor` does that; :class:`SinglePassExtractor` replaces the noisy passes by
one over the clean slice, after the idea of CleanDIFT (Stracke et al., CVPR 2025, arXiv 2412.03439).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "DEEP",
    "PUBLISHED_TIMESTEPS",
    "PUBLISHED_UP_BLOCKS",
    "FeatureExtractor",
    "Features",
    "NoiseSchedule",
    "Prediction",
    "SinglePassExtractor",
    "block_maps",
    "distillation_loss",
    "distillation_step",
    "noise_of",
]

#: Timesteps of the published dense adapters.
PUBLISHED_TIMESTEPS = (0, 50, 100, 150)
#: Up blocks of the published dense adapters, deepest first; block 0 is left out.
PUBLISHED_UP_BLOCKS = (1, 2, 3, 4)
#: The deep (middle) block's place among up blocks' numbers.
DEEP = -1


class Prediction(StrEnum):
    """What the backbone's three output channels are."""

    #: The noise, as published.
    EPSILON = "epsilon"
    #: signal * noise - share * image (Salimans and Ho, ICLR 2022): where little of the image is left, it tells the
    #: image itself. Predicted noise would have to be exact to a thousandth there, which a short training is not.
    V = "v"


class NoiseSchedule:
    """The forward diffusion of DDPM: linear betas from 1e-4 to 0.02 in 1000 steps (Ho et al., NeurIPS 2020)."""

    steps = 1000

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float32)
        kept = torch.cumprod(1.0 - betas, dim=0)
        self.signal, self.noise = kept.sqrt(), (1.0 - kept).sqrt()

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(N, C, H, W) at timesteps (N,), 0 to 999; timestep 0 already holds 1 % of noise, as published."""
        signal, share = self._at(timesteps, images)
        return signal * images + share * noise

    def target(self, images: Tensor, noise: Tensor, timesteps: Tensor, prediction: Prediction) -> Tensor:
        """What the backbone shall answer, (N, C, H, W)."""
        if prediction is Prediction.EPSILON:
            return noise
        signal, share = self._at(timesteps, images)
        return signal * noise - share * images

    def noise_in(self, noisy: Tensor, answer: Tensor, timesteps: Tensor, prediction: Prediction) -> Tensor:
        """The noise that the backbone's answer tells, (N, C, H, W)."""
        if prediction is Prediction.EPSILON:
            return answer
        signal, share = self._at(timesteps, noisy)
        return share * noisy + signal * answer

    def _at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of image and noise, (N, 1, 1, 1)."""
        signal, noise = (
            table.to(like.device)[timesteps].view(-1, 1, 1, 1).to(like.dtype) for table in (self.signal, self.noise)
        )
        return signal, noise


def noise_of(seed: int, number: int, shape: Sequence[int], draw: int = 0) -> Tensor:
    """Standard normal noise of one of many images, on the CPU: the same there for every device and batch.

    Seed and number are mixed, so that image 1 of seed 5 is not image 0 of seed 6. ``draw`` counts an image's draws.
    """
    key = (number, draw) if draw else (number,)
    own = int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
    return torch.randn(*shape, generator=torch.Generator().manual_seed(own))


@dataclass
class Features:
    """Features of N slices at T timesteps.

    Attributes:
        timesteps: T numbers.
        maps: per block, in the order asked for: (N, T, C, h, w), float32 or the precision asked for. Keys are numbers
            of up blocks, or ``DEEP``.
    """

    timesteps: tuple[int, ...]
    maps: dict[int, Tensor]

    @property
    def deep(self) -> Tensor:
        """Of the deep block, (N, T, C, h, w)."""
        return self.maps[DEEP]

    @property
    def channels(self) -> int:
        """Of :meth:`concatenated`."""
        return sum(maps.shape[1] * maps.shape[2] for maps in self.maps.values())

    def concatenated(self, size: tuple[int, int], index: slice = slice(None)) -> Tensor:
        """All maps on one grid, in the published order: timestep after timestep, in each block after block.

        A 256x256 slice of ``paper`` at four timesteps takes 1 GB here; a head whose first layer is linear gets the
        same from :attr:`maps` for a fraction of it.

        Args:
            size: H, W to interpolate to (bilinear).
            index: of the slices.

        Returns:
            (N, channels, H, W), timesteps outermost.
        """
        parts = [
            F.interpolate(maps[index, step], size, mode="bilinear", align_corners=False)
            for step in range(len(self.timesteps))
            for maps in self.maps.values()
        ]
        return torch.cat(parts, dim=1)


class FeatureExtractor:
    """Features of noisy slices from a resident backbone, which is left as it is.

    The backbone's own blocks are called one after the other, so that there are no hooks to forget, only the asked maps
    are kept, and what comes after the last of them is not computed (the deep block alone: half of the work).
    """

    def __init__(
        self,
        network: UNet2DConditionModel,
        blocks: Sequence[int] = PUBLISHED_UP_BLOCKS,
        *,
        batch: int = 4,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ) -> None:
        """Set up.

        Args:
            network: in evaluation mode, on its device.
            blocks: numbers of up blocks (0 is the deepest), or ``DEEP``, in the order of the answer.
            batch: noisy slices per pass; memory grows with it.
            dtype: of the arithmetic (autocast) and of the features; bfloat16 pays on a GPU and on CPUs that compute it
                natively.
            channels_last: memory layout of the network's convolutions, 1.9 times faster for ``paper`` on a CPU; the
                values stay the same.

        Raises:
            ValueError: a block that the network does not have, or none.
        """
        count = len(network.up_blocks)
        if not blocks or len(set(blocks)) != len(blocks) or not all(DEEP <= block < count for block in blocks):
            raise ValueError(f"blocks {tuple(blocks)} must be different numbers of -1 (deep) to {count - 1}")
        self.network = network
        self.blocks = tuple(blocks)
        self.batch = batch
        self.dtype = dtype
        self.schedule = NoiseSchedule()
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            network.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        embedding: Tensor,
        timesteps: Sequence[int] = PUBLISHED_TIMESTEPS,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Features:
        """Features of slices at timesteps.

        Args:
            images: (N, 3, H, W), -1..1; H and W multiples of 16.
            embedding: of the condition, (1, 1, 768) for all slices or (N, 1, 768); computed once, used in every pass.
            timesteps: 0 to 999.
            generator: of the noise; the same noise serves all timesteps, as published, so that the answer depends
                neither on the batch nor on which other timesteps are asked for.
            noise: (N, 3, H, W), in place of a generator.

        Raises:
            ValueError: a timestep out of range.
        """
        steps = tuple(int(step) for step in timesteps)
        if not steps or not all(0 <= step < self.schedule.steps for step in steps):
            raise ValueError(f"timesteps {steps} must be between 0 and {self.schedule.steps - 1}")
        device = next(self.network.parameters()).device
        if noise is None:
            source = device if generator is None else generator.device
            noise = torch.randn(images.shape, generator=generator, device=source)
        images, noise = images.to(device), noise.to(device)
        count = len(images)
        embedding = embedding.to(device).expand(count, -1, -1)
        slices = torch.arange(count, device=device).repeat_interleave(len(steps))
        times = torch.tensor(steps, device=device).repeat(count)
        store: dict[int, Tensor] = {}
        for start in range(0, len(slices), self.batch):
            rows, now = slices[start : start + self.batch], times[start : start + self.batch]
            noisy = self.schedule.add_noise(images[rows], noise[rows], now)
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                found = block_maps(
                    self.network, noisy.contiguous(memory_format=self._format), now, embedding[rows], self.blocks
                )
            for block, maps in found.items():
                if block not in store:  # filled in place: no second copy of all maps at the end
                    store[block] = maps.new_empty((len(slices), *maps.shape[1:]), dtype=self.dtype)
                store[block][start : start + len(rows)] = maps
        return Features(steps, {block: store[block].unflatten(0, (count, len(steps))) for block in self.blocks})


def block_maps(
    network: UNet2DConditionModel, images: Tensor, timesteps: Tensor, embedding: Tensor, blocks: Sequence[int]
) -> dict[int, Tensor]:
    """Outputs of blocks, computed no further than the last of them.

    The same as ``network(images, timesteps, embedding)`` up to there, for the options the presets use. Gradients go
    through, where :class:`FeatureExtractor` cuts them off: a backbone that is tuned needs them.
    """
    time = network.time_embedding(network.time_proj(timesteps).to(images.dtype))
    told = network.encoder_hid_proj(embedding)
    x = network.conv_in(images)
    skips = [x]
    for block in network.down_blocks:
        x, residuals = block(x, time, **_attended(block, told))
        skips.extend(residuals)
    x = network.mid_block(x, time, **_attended(network.mid_block, told))
    found = {DEEP: x} if DEEP in blocks else {}
    for number in range(max(blocks) + 1):
        block = network.up_blocks[number]
        used = len(block.resnets)
        residuals, skips = tuple(skips[-used:]), skips[:-used]
        x = block(hidden_states=x, temb=time, res_hidden_states_tuple=residuals, **_attended(block, told))
        if number in blocks:
            found[number] = x
    return found


def _attended(block: nn.Module, told: Tensor) -> dict[str, Tensor]:
    """The condition, for the blocks that attend to it."""
    return {"encoder_hidden_states": told} if getattr(block, "has_cross_attention", False) else {}


class _TimestepHead(nn.Module):
    """Turns a clean map into what the noisy backbone would show at one timestep; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 4, 8)
        self.inwards, self.outwards = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.outwards.weight)
        nn.init.zeros_(self.outwards.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.outwards(F.silu(self.inwards(maps)))


class SinglePassExtractor(nn.Module):
    """Features of clean slices in one pass, in place of one noisy pass per timestep.

    A copy of the backbone sees the clean slice (at timestep 0) and is trained so that a small head per timestep and
    block can turn its maps into those of the noisy backbone. The answer is deterministic, and has two uses:
    :meth:`forward` stands in for :class:`FeatureExtractor` (all timesteps, so that adapters trained on noisy features
    go on working), :meth:`clean` gives the copy's own maps, a T-th of the size, for new adapters.
    """

    def __init__(
        self,
        network: UNet2DConditionModel,
        blocks: Sequence[int] = PUBLISHED_UP_BLOCKS,
        timesteps: Sequence[int] = PUBLISHED_TIMESTEPS,
    ) -> None:
        """Copy the backbone (weights too); before any training the answer is that of the clean slice.

        Args:
            network: to copy; stays as it is.
            blocks: numbers of up blocks, or ``DEEP``.
            timesteps: to stand in for.
        """
        super().__init__()
        self.network = copy.deepcopy(network)
        self.blocks, self.timesteps = tuple(blocks), tuple(timesteps)
        widths = list(reversed(network.config["block_out_channels"]))
        self.heads = nn.ModuleDict(
            {
                f"{'deep' if block == DEEP else block}_{step}": _TimestepHead(widths[max(block, 0)])
                for block in self.blocks
                for step in self.timesteps
            }
        )

    def clean(self, images: Tensor, embedding: Tensor) -> Features:
        """The copy's own maps, (N, 1, C, h, w) each.

        Args:
            images: (N, 3, H, W), -1..1, without noise; H and W multiples of 16.
            embedding: (1, 1, 768) or (N, 1, 768).
        """
        count = len(images)
        times = torch.zeros(count, dtype=torch.long, device=images.device)
        maps = block_maps(self.network, images, times, embedding.expand(count, -1, -1), self.blocks)
        return Features((0,), {block: maps[block][:, None] for block in self.blocks})

    def forward(self, images: Tensor, embedding: Tensor) -> Features:
        """As :class:`FeatureExtractor`'s answer: per block (N, T, C, h, w)."""
        clean = self.clean(images, embedding).maps
        return Features(
            self.timesteps,
            {
                block: torch.stack([self._head(block, step)(maps[:, 0]) for step in self.timesteps], dim=1)
                for block, maps in clean.items()
            },
        )

    def _head(self, block: int, step: int) -> nn.Module:
        return self.heads[f"{'deep' if block == DEEP else block}_{step}"]


def distillation_loss(found: Features, wanted: Features) -> tuple[Tensor, dict[int, float]]:
    """One minus the cosine between maps, over channels at each place, averaged over blocks.

    Args:
        found: of :class:`SinglePassExtractor`.
        wanted: of :class:`FeatureExtractor`, same slices, blocks and timesteps.

    Returns:
        The loss, and the mean cosine per block, to report.
    """
    cosines = {
        block: F.cosine_similarity(found.maps[block].float(), maps.float(), dim=2).mean()
        for block, maps in wanted.maps.items()
    }
    loss = 1.0 - torch.stack(list(cosines.values())).mean()
    return loss, {block: float(cosine.detach()) for block, cosine in cosines.items()}


def distillation_step(
    student: SinglePassExtractor,
    teacher: FeatureExtractor,
    images: Tensor,
    embedding: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator | None = None,
) -> Mapping[int, float]:
    """One step of training: fresh noise for the teacher, the clean slices for the student.

    Args:
        student: in training mode, on the device of the slices.
        teacher: of the same blocks; its network is not changed.
        images: (N, 3, H, W), -1..1.
        embedding: (1, 1, 768) or (N, 1, 768).
        optimizer: of the student's parameters.
        generator: of the noise.

    Returns:
        Mean cosine per block before the step.
    """
    wanted = teacher(images, embedding, student.timesteps, generator)
    loss, cosines = distillation_loss(student(images, embedding), wanted)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return cosines
