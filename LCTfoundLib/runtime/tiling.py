"""A network over a whole volume, tile by tile: blended, batched, within memory, to be stopped at any tile.

MONAI's sliding window keeps all output channels of the whole volume, cannot be stopped and ends at the first
out-of-memory; hence this one. Only the slab of planes under the current row of tiles is kept in full; finished planes
are handed to ``reduce`` (softmax, argmax, ...) and leave as what the caller wants to keep.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor, nn

from LCTfoundLib.errors import OutOfMemory
from LCTfoundLib.runtime.device import DeviceChoice, choose_device, free_memory
from LCTfoundLib.runtime.progress import Progress

__all__ = ["Blend", "is_out_of_memory", "release_memory", "sliding_window", "tile_starts", "tile_weights"]

_log = logging.getLogger(__name__)

#: Tiles are not made smaller than this: the networks' context would be gone.
_MIN_TILE = 32
#: Width of the gaussian, as a share of the tile (Isensee et al., nnU-Net, Nature Methods 2021; MONAI's default).
_SIGMA = 0.125
_OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
)

Size = tuple[int, int, int]


class Blend(StrEnum):
    """How much each voxel of a tile counts where tiles overlap."""

    GAUSSIAN = "gaussian"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclass(frozen=True)
class _Plan:
    """One way to run: it changes when memory runs out."""

    choice: DeviceChoice
    tile: Size
    batch: int


@dataclass(frozen=True)
class _Work:
    """What stays the same whatever the plan."""

    network: Callable[[Tensor], Tensor]
    image: Tensor
    out_channels: int
    overlap: float
    blend: Blend
    multiple: int
    prepare: Callable[[Tensor, Size], Tensor] | None
    reduce: Callable[[Tensor], Tensor] | None
    mask: Tensor | None
    accumulate: torch.dtype

    @property
    def size(self) -> Size:
        k, j, i = self.image.shape[1:]
        return k, j, i


def sliding_window(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    tile: Sequence[int],
    out_channels: int,
    *,
    overlap: float = 0.25,
    batch: int = 1,
    device: DeviceChoice | None = None,
    progress: Progress | None = None,
    prepare: Callable[[Tensor, Size], Tensor] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | np.ndarray | None = None,
    blend: Blend = Blend.GAUSSIAN,
    multiple: int = 1,
    accumulate: torch.dtype = torch.float32,
) -> Tensor:
    """Apply ``network`` to ``image`` in overlapping tiles.

    The overlapping answers are averaged incrementally, so that equal answers stay exactly equal. When memory runs out:
    smaller batches, then smaller tiles, then the CPU with the tiles asked for, then with smaller ones.

    Args:
        network: (N, C', k, j, i) -> (N, out_channels, k, j, i); a module is moved to the device in use.
        image: (C, k, j, i) of any dtype, on the CPU (int16 HU keeps a large CT small; see ``prepare``).
        tile: size (k, j, i) of a tile; shrunk to the image where that is smaller.
        out_channels: channels of the network's answer.
        overlap: share of a tile that at least overlaps with the next one, 0 to below 1.
        batch: tiles per call of the network.
        device: where and in which precision; default: :func:`~LCTfoundLib.runtime.device.choose_device`.
        progress: told after each batch; its cancel token is looked at before each.
        prepare: ((C, k, j, i) tile on the device, its start (k, j, i)) -> float input (C', k, j, i); default: float.
            The start may be followed by voxels beyond the image, filled with copies of its border.
        reduce: (out_channels, n, j, i) averaged planes -> (..., n, j, i) to keep; works per voxel.
        mask: boolean (k, j, i), where the answer is needed. Tiles wholly outside are skipped, and outside of the mask
            ``reduce`` sees zeros.
        blend: weight of a tile's voxels.
        multiple: tile sizes are multiples of this (the network's divisor).
        accumulate: dtype of the average; float16 halves the memory, at 3 digits.

    Returns:
        (..., k, j, i) on the CPU: what ``reduce`` gives, or the average of dtype ``accumulate``.

    Raises:
        Cancelled: the user stopped.
        OutOfMemory: even the smallest tiles on the CPU do not fit.
    """
    work = _Work(
        network, image, out_channels, overlap, blend, multiple, prepare, reduce, _as_mask(mask, image), accumulate
    )
    _check(work, tile, batch)
    progress = Progress.of(progress)
    first = plan = _Plan(device or choose_device(), _fit_tile(tile, work.size, multiple), batch)
    while True:
        try:
            return _run(work, plan, progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("%s with %s", type(error).__name__, plan)
        # Outside of the handler, where its traceback no longer holds the failed run's tensors.
        release_memory()
        plan = _next_plan(plan, first, multiple)
        if plan.choice.device.type == "cpu" and first.choice.device.type != "cpu":
            progress.warn("The GPU's memory does not suffice; the computation goes on on the CPU and takes longer.")


def tile_starts(size: int, tile: int, overlap: float) -> list[int]:
    """Starts of the fewest tiles that cover ``size`` with at least ``overlap``, evenly spread."""
    if size <= tile:
        return [0]
    step = max(1, int(tile * (1.0 - overlap)))
    count = math.ceil((size - tile) / step) + 1
    return [round(n * (size - tile) / (count - 1)) for n in range(count)]


def tile_weights(tile: Size, blend: Blend) -> Tensor:
    """Positive float32 (k, j, i): how much each voxel of a tile counts, 1 at most."""
    weight = torch.ones(1)
    for count in tile:
        position = torch.arange(count, dtype=torch.float32)
        if blend is Blend.GAUSSIAN:
            axis = torch.exp(-0.5 * ((position - (count - 1) / 2) / (_SIGMA * count)) ** 2)
        elif blend is Blend.LINEAR:
            axis = torch.minimum(position + 1, count - position) / ((count + 1) / 2)
        else:
            axis = torch.ones(count)
        weight = weight[..., None] * axis
    # Never 0: in a corner that only one tile covers, its answer counts in full.
    return weight[0].clamp(min=1e-3)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)


def _as_mask(mask: Tensor | np.ndarray | None, image: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = torch.as_tensor(mask).bool()
    if mask.shape != image.shape[1:]:
        raise ValueError(f"mask is {tuple(mask.shape)}, the image {tuple(image.shape[1:])}")
    return mask


def _check(work: _Work, tile: Sequence[int], batch: int) -> None:
    if work.image.ndim != 4 or not work.image.numel():
        raise ValueError(f"image must be (C, k, j, i) and not empty, it is {tuple(work.image.shape)}")
    if len(tile) != 3 or min(tile) < 1 or batch < 1 or not 0.0 <= work.overlap < 1.0:
        raise ValueError(f"bad tile {tile}, batch {batch} or overlap {work.overlap}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _fit_tile(tile: Sequence[int], size: Size, multiple: int) -> Size:
    """No larger than the image needs: voxels beyond it cost time for nothing."""
    k, j, i = (_round_up(min(wanted, there), multiple) for wanted, there in zip(tile, size, strict=True))
    return k, j, i


def _next_plan(plan: _Plan, first: _Plan, multiple: int) -> _Plan:
    """The next cheaper way after ``plan`` ran out of memory."""
    if plan.batch > 1:
        return replace(plan, batch=plan.batch // 2)
    smaller = _smaller_tile(plan.tile, multiple)
    if smaller is not None:
        return replace(plan, tile=smaller)
    if plan.choice.device.type != "cpu":
        return _Plan(plan.choice.cpu_fallback(), first.tile, 1)
    raise OutOfMemory("The computation does not fit into memory; close other programs or choose a lower quality.")


def _smaller_tile(tile: Size, multiple: int) -> Size | None:
    """Halve the longest side; None when all are small."""
    longest = max(range(3), key=lambda axis: tile[axis])
    half = max(_round_up(tile[longest] // 2, multiple), _round_up(_MIN_TILE, multiple))
    if half >= tile[longest]:
        return None
    k, j, i = (half if axis == longest else side for axis, side in enumerate(tile))
    return k, j, i


def release_memory() -> None:
    """Give back what a failed run held, before less is tried."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _run(work: _Work, plan: _Plan, progress: Progress) -> Tensor:
    """One pass over all tiles."""
    device = plan.choice.device
    network = work.network.to(device) if isinstance(work.network, nn.Module) else work.network
    starts = _needed_tiles(work, plan.tile)
    slab = _Slab(work, plan.tile, _accumulation_device(work, plan))
    done = 0
    with torch.inference_mode(), _precision(plan.choice):
        for group in _groups(starts, plan.batch):
            progress.update(done / len(starts))
            inputs = torch.stack([_tile_input(work, plan, start) for start in group])
            answers = network(inputs.contiguous(memory_format=torch.channels_last_3d))
            _check_answer(answers, inputs, work.out_channels)
            for start, answer in zip(group, answers, strict=True):
                slab.add(answer, start)
            done += len(group)
        result = slab.finish()
    progress.done()
    return result


def _precision(choice: DeviceChoice) -> AbstractContextManager[object]:
    if choice.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(choice.device.type, choice.dtype)


def _groups(items: list[Size], count: int) -> Iterator[list[Size]]:
    for first in range(0, len(items), count):
        yield items[first : first + count]


def _needed_tiles(work: _Work, tile: Size) -> list[Size]:
    """Starts of the tiles that touch the mask, in the order of k."""
    axes = [tile_starts(size, side, work.overlap) for size, side in zip(work.size, tile, strict=True)]
    starts = [(k, j, i) for k in axes[0] for j in axes[1] for i in axes[2]]
    if work.mask is None:
        return starts
    mask = work.mask
    return [s for s in starts if mask[tuple(slice(a, a + n) for a, n in zip(s, tile, strict=True))].any()]


def _accumulation_device(work: _Work, plan: _Plan) -> torch.device:
    """The slab lies on the GPU where it takes little of it: answers need not travel then."""
    device = plan.choice.device
    if device.type != "cuda":
        return torch.device("cpu")
    voxels = plan.tile[0] * work.size[1] * work.size[2]
    need = voxels * (work.out_channels * work.accumulate.itemsize * 2 + 8)
    return device if need < free_memory(device) // 4 else torch.device("cpu")


def _tile_input(work: _Work, plan: _Plan, start: Size) -> Tensor:
    """The network's input (C', k, j, i) for the tile at ``start``."""
    region = tuple(slice(a, a + n) for a, n in zip(start, plan.tile, strict=True))
    part = work.image[(slice(None), *region)].to(plan.choice.device)
    for axis, side in enumerate(plan.tile, start=1):
        if part.shape[axis] < side:  # clamped indices = copies of the border, for any dtype
            index = torch.arange(side, device=part.device).clamp(max=part.shape[axis] - 1)
            part = part.index_select(axis, index)
    return part.float() if work.prepare is None else work.prepare(part, start)


def _check_answer(answers: Tensor, inputs: Tensor, out_channels: int) -> None:
    expected = (inputs.shape[0], out_channels, *inputs.shape[2:])
    if tuple(answers.shape) != expected:
        raise ValueError(f"the network answered {tuple(answers.shape)} instead of {expected}")


class _Slab:
    """The running average of the planes that the current row of tiles covers, and the finished result."""

    def __init__(self, work: _Work, tile: Size, device: torch.device) -> None:
        self.work = work
        self.first = 0
        height = min(tile[0], work.size[0])
        self.mean = torch.zeros((work.out_channels, height, *work.size[1:]), dtype=work.accumulate, device=device)
        self.weight = torch.zeros((height, *work.size[1:]), device=device)
        self.tile_weight = tile_weights(tile, work.blend).to(device)
        self.result: Tensor | None = None

    def add(self, answer: Tensor, start: Size) -> None:
        """Average the answer (out_channels, k, j, i) of the tile at ``start`` in."""
        self._advance(start[0])
        counts = [min(n, size - a) for n, size, a in zip(answer.shape[1:], self.work.size, start, strict=True)]
        inner = tuple(slice(0, n) for n in counts)
        region = (inner[0], *(slice(a, a + n) for a, n in zip(start[1:], counts[1:], strict=True)))
        weight = self.tile_weight[inner]
        total = self.weight[region].add_(weight)
        share = (weight / total).to(self.mean.dtype)
        # lerp rather than a weighted sum: equal answers stay exactly equal.
        self.mean[(slice(None), *region)].lerp_(answer[(slice(None), *inner)].to(self.mean), share)

    def finish(self) -> Tensor:
        self._advance(self.work.size[0])
        assert self.result is not None
        return self.result

    def _advance(self, first: int) -> None:
        """Let the slab begin at plane ``first``; the planes before it are finished."""
        while self.first < first:
            count = min(first - self.first, self.mean.shape[1])
            self._store(self.mean[:, :count])
            for planes, axis in ((self.mean, 1), (self.weight, 0)):
                kept = planes.narrow(axis, count, planes.shape[axis] - count).clone()
                planes.narrow(axis, 0, kept.shape[axis]).copy_(kept)
                planes.narrow(axis, kept.shape[axis], count).zero_()
            self.first += count

    def _store(self, planes: Tensor) -> None:
        count = planes.shape[1]
        region = slice(self.first, self.first + count)
        if self.work.mask is not None:
            planes.mul_(self.work.mask[region].to(planes.device))
        kept = planes if self.work.reduce is None else self.work.reduce(planes)
        if self.result is None:
            self.result = torch.empty((*kept.shape[:-3], *self.work.size), dtype=kept.dtype)
        self.result[..., region, :, :] = kept.to("cpu")
