"""Line integrals of images and their exact adjoint, differentiable, on CPU and GPU.

The projector is a sparse matrix by Joseph's method (IEEE T-MI 1 (1982) 192): a ray steps from row to row, or from
column to column where it is flatter than 45 degrees, and interpolates between the two pixels beside it. The matrix and
its transpose are built in blocks of views and kept for all projectors of the same geometry; what does not fit the
budget is built anew at each use, with the same numbers.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import Beam, ImageGrid

__all__ = ["Projector", "forget_matrices"]

#: Bytes of matrices kept on the CPU: 400 views of 512 x 512 (both matrices), of the 8 GB that every task may count on.
_CPU_BUDGET = 3 * 2**30
#: Of a GPU's memory.
_GPU_SHARE = 0.25
#: Rays times steps of a block: 270 MB of matrix, within 32-bit indices by far.
_BLOCK_SAMPLES = 2**25
#: Rays times steps built at once: what one pass over the arrays needs stays at some tens of MB.
_BUILD_SAMPLES = 2**19
#: Slices multiplied at once. More of them leave the processor's cache: 512 x 512 with 64 views, a slice, takes 7 ms in
#: eights and 14 ms in thirty-twos.
_SLICES = 8
#: An index (int32) beside each value.
_INDEX_BYTES = 4


class Projector:
    """Sinograms of images of a grid under a beam, and back.

    Building takes 0.5 s for 64 views of 256 x 256, once; then eight slices take 10 ms on two cores. 360 views of
    512 x 512 take 11 s of one core and 2.7 GB. For some of the views make a projector of ``beam.subset(...)`` or
    ``beam.sparse(...)``: it costs as much less.

    Args:
        grid: of the images.
        beam: of the sinograms.
        budget_bytes: of the matrices kept; beyond it they are built at each use. Default: 3 GiB on the CPU, a quarter
            of a GPU's memory.
        truncated: let a detector pass that does not cover the image's circle.

    Raises:
        UnsuitableProjections: the beam cannot scan the grid.
    """

    def __init__(self, grid: ImageGrid, beam: Beam, budget_bytes: int | None = None, truncated: bool = False) -> None:
        beam.check(grid, truncated)
        self.grid, self.beam = grid, beam
        self._budget = budget_bytes

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.grid.rows, self.grid.columns

    @property
    def sinogram_shape(self) -> tuple[int, int]:
        return self.beam.shape

    def forward(self, images: Tensor) -> Tensor:
        """Line integrals: (..., rows, columns), per mm, to (..., views, detectors) without unit.

        Differentiable; the gradient is the adjoint. Half precision is computed in float32.

        Raises:
            UnsuitableProjections: the images are not of the grid.
        """
        if tuple(images.shape[-2:]) != self.image_shape:
            raise UnsuitableProjections(
                f"The images are {tuple(images.shape[-2:])} and the projector's grid is {self.image_shape}; give both "
                "the same rows and columns."
            )
        return _Multiplied.apply(images, self, False)

    def adjoint(self, sinograms: Tensor) -> Tensor:
        """The transpose of :meth:`forward`: (..., views, detectors) to (..., rows, columns).

        Raises:
            UnsuitableProjections: the sinograms are not of the beam.
        """
        self.check_shape(sinograms)
        return _Multiplied.apply(sinograms, self, True)

    def check_shape(self, sinograms: Tensor) -> None:
        """Raise ``UnsuitableProjections`` if sinograms are not of the beam."""
        if tuple(sinograms.shape[-2:]) != self.sinogram_shape:
            raise UnsuitableProjections(
                f"The sinogram has {tuple(sinograms.shape[-2:])} views and channels and the geometry "
                f"{self.sinogram_shape}; give the angles and the detector that it was measured with."
            )

    def matrix_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Memory of both matrices, estimated from above by less than 3 %."""
        starts = self.grid.pixels + self.beam.views * self.beam.detectors
        return 2 * self._entries * (dtype.itemsize + _INDEX_BYTES) + starts * _INDEX_BYTES

    @cached_property
    def _entries(self) -> int:
        normals, distances = self.beam.rays()
        rays = _Rays.of(normals.ravel(), distances.ravel(), self.grid)
        return 2 * int(rays.steps_inside(self.grid).sum())

    def _multiply(self, values: Tensor, transposed: bool) -> Tensor:
        shape = self.image_shape if transposed else self.sinogram_shape
        dtype = values.dtype if values.dtype == torch.float64 else torch.float32
        # Apple's GPU has no sparse matrices; its memory is the processor's.
        device = values.device if values.device.type == "cuda" else torch.device("cpu")
        flat = values.reshape(-1, values.shape[-2] * values.shape[-1]).to(device, dtype)
        out = flat.new_zeros(len(flat), shape[0] * shape[1])
        for block in self._blocks(dtype, device, transposed):
            rows, matrix = block.rows, block.matrices[transposed]
            for some in range(0, len(flat), _SLICES):
                slices = slice(some, some + _SLICES)
                if transposed:
                    out[slices] += (matrix @ flat[slices, rows].t().contiguous()).t()
                else:
                    out[slices, rows] = (matrix @ flat[slices].t().contiguous()).t()
        return out.reshape(*values.shape[:-2], *shape).to(values.device, values.dtype)

    def _blocks(self, dtype: torch.dtype, device: torch.device, transposed: bool) -> Iterator[_Block]:
        """The matrices, block by block of views: those kept, or the one that is needed, built as it is asked for."""
        budget = self._budget if self._budget is not None else _budget_of(device)
        if self.matrix_bytes(dtype) > budget:
            yield from self._build(dtype, device, (transposed,))
        else:
            key = self.grid, self.beam, dtype, device
            yield from _KEPT.get(key, budget, lambda: [*self._build(dtype, device, (False, True))])

    def _build(self, dtype: torch.dtype, device: torch.device, ways: tuple[bool, ...]) -> Iterator[_Block]:
        views, detectors = self.sinogram_shape
        steps = max(self.image_shape)
        size = max(1, _BLOCK_SAMPLES // (detectors * steps))
        for first in range(0, views, size):
            some = slice(first, min(first + size, views))
            matrix = _joseph(self.grid, self.beam, some, dtype)
            matrices = {way: _csr(matrix.tocsc() if way else matrix, device) for way in ways}
            yield _Block(slice(some.start * detectors, some.stop * detectors), matrices)


class _Multiplied(torch.autograd.Function):
    """The matrix or its transpose times a tensor; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, projector: Projector, transposed: bool) -> Tensor:
        ctx.projector, ctx.transposed = projector, transposed
        # Autocast would multiply in half precision, which is too coarse for attenuation.
        with torch.autocast(values.device.type, enabled=False):
            return projector._multiply(values, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Multiplied.apply(gradients[0], ctx.projector, not ctx.transposed), None, None


@dataclass(frozen=True)
class _Block:
    """The matrix of some views, its transpose, or both.

    Attributes:
        rows: of the whole matrix: the rays of the views.
        matrices: CSR with int32 indices, by whether it is the transpose: (rays, pixels) or (pixels, rays).
    """

    rows: slice
    matrices: dict[bool, Tensor]

    @property
    def bytes(self) -> int:
        return sum(
            part.numel() * part.element_size()
            for matrix in self.matrices.values()
            for part in (matrix.crow_indices(), matrix.col_indices(), matrix.values())
        )


def _csr(matrix: sparse.csr_array | sparse.csc_array, device: torch.device) -> Tensor:
    """In torch, without a copy on the CPU; a CSC matrix becomes its transpose."""
    shape = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    parts = matrix.indptr, matrix.indices, matrix.data
    starts, indices, values = (torch.from_numpy(part).to(device) for part in parts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state.*")
        return torch.sparse_csr_tensor(starts, indices, values, size=shape, check_invariants=False)


def _joseph(grid: ImageGrid, beam: Beam, views: slice, dtype: torch.dtype) -> sparse.csr_array:
    """Joseph's matrix of some views, (rays, pixels), int32 indices; computed in float64 and rounded once."""
    normals, distances = (part.ravel() for part in beam.rays(views))
    size = max(1, _BUILD_SAMPLES // max(grid.rows, grid.columns))
    pieces = [
        _Rays.of(normals[first : first + size], distances[first : first + size], grid).entries(grid, dtype)
        for first in range(0, len(normals), size)
    ]
    counts, columns, values = (torch.cat(parts).numpy() for parts in zip(*pieces, strict=True))
    starts = np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
    return sparse.csr_array((values, columns, starts), shape=(len(normals), grid.pixels))


@dataclass(frozen=True)
class _Rays:
    """Rays as Joseph steps along them, each (rays,), in torch, which uses all cores.

    At step k (a row, or a column of a flat ray) the ray is at ``start + slope * k`` across the steps, in pixels.

    Attributes:
        steep: whether the steps are rows.
        start, slope: float64.
        length: mm of the ray between two steps, float64.
    """

    steep: Tensor
    start: Tensor
    slope: Tensor
    length: Tensor

    @classmethod
    def of(cls, normals: np.ndarray, distances: np.ndarray, grid: ImageGrid) -> _Rays:
        cos, sin = torch.from_numpy(np.cos(normals)), torch.from_numpy(np.sin(normals))
        distance = torch.from_numpy(distances / grid.pixel_mm)
        steep = cos.abs() >= sin.abs()
        middle_row, middle_column = (grid.rows - 1) / 2, (grid.columns - 1) / 2
        along, across = torch.where(steep, cos, sin), torch.where(steep, sin, cos)
        # x cos + y sin = distance with x = column - middle and y = middle - row, solved for what the step is not.
        slope = across / along
        start = torch.where(
            steep,
            middle_column + distance / along - slope * middle_row,
            middle_row - distance / along - slope * middle_column,
        )
        return cls(steep, start, slope, grid.pixel_mm / along.abs())

    def steps_inside(self, grid: ImageGrid) -> Tensor:
        """Number of steps at which a pixel of the image is beside the ray, (rays,)."""
        steps, width = self._extent(grid)
        # Rays along a row or column keep their place: all steps or none.
        slope = torch.where(self.slope.abs() < 1e-9, 1e-9, self.slope)
        ends = torch.stack([(-1 - self.start) / slope, (width - self.start) / slope])
        before, after = ends.amin(0).clamp(min=-1).floor(), torch.minimum(ends.amax(0), steps).ceil()
        return (after - before - 1).clamp(min=0).long()

    def _extent(self, grid: ImageGrid) -> tuple[Tensor, Tensor]:
        """Number of steps, and of pixels across, (rays,)."""
        rows, columns = torch.tensor(grid.rows), torch.tensor(grid.columns)
        return torch.where(self.steep, rows, columns), torch.where(self.steep, columns, rows)

    def entries(self, grid: ImageGrid, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of each ray int32 (rays,), and all of them in order: pixel int32 and value."""
        steps, width = (extent.to(torch.int32)[:, None] for extent in self._extent(grid))
        step = torch.arange(max(grid.rows, grid.columns), dtype=torch.int32)
        place = torch.addcmul(self.start[:, None], self.slope[:, None], step.to(torch.float64))
        low = place.floor()
        length = self.length.to(dtype)[:, None]
        high_value = (place - low).to(dtype) * length
        # Far outside of the image the place may exceed 32 bits.
        low = low.clamp_(-2, max(grid.rows, grid.columns)).to(torch.int32)
        to_next_step = torch.where(self.steep, grid.columns, 1).to(torch.int32)[:, None]
        to_next_across = torch.where(self.steep, 1, grid.columns).to(torch.int32)[:, None]
        pixel = step * to_next_step + low * to_next_across
        within = step < steps
        inside = torch.stack([(low >= 0) & (low < width), (low >= -1) & (low < width - 1)], -1) & within[..., None]
        pixels = torch.stack([pixel, pixel + to_next_across], -1)
        values = torch.stack([length - high_value, high_value], -1)
        return inside.flatten(1).sum(1, dtype=torch.int32), pixels[inside], values[inside]


class _Kept:
    """Matrices by geometry, type and device, the least recently used forgotten beyond the budget."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[Any, ...], list[_Block]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...], budget: int, build: Callable[[], list[_Block]]) -> list[_Block]:
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = build()
            self._blocks.move_to_end(key)
            self._forget_beyond(budget, key)
            return self._blocks[key]

    def _forget_beyond(self, budget: int, latest: tuple[Any, ...]) -> None:
        beside = [key for key in self._blocks if key[-1] == latest[-1]]
        left = budget
        for key in reversed(beside):
            left -= sum(block.bytes for block in self._blocks[key])
            if left < 0 and key != latest:
                del self._blocks[key]

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()


_KEPT = _Kept()


def forget_matrices() -> None:
    """Give the memory of all kept matrices back."""
    _KEPT.clear()


def _budget_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return _CPU_BUDGET
