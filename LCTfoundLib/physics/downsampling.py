"""What a coarser scan keeps of a finer one: means over blocks of pixels, and over the thickness of a slice.

Each operator A has its exact pseudo-inverse A+, so that any image can be made to agree with what was measured without
touching what was not: x + A+ (y - A x), the null-space correction of DDNM (Wang et al., ICLR 2023, arXiv 2212.00490).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from LCTfoundLib.errors import UnsuitableImage

__all__ = ["AreaMeans", "Downsampling", "ThickSlices"]

#: Slices that overlap more are told apart only by multiplying their noise.
_MOST_AMPLIFICATION = 5.0


class Downsampling(ABC):
    """A linear operator from fine to coarse slices; values of any unit."""

    @abstractmethod
    def forward(self, fine: Tensor) -> Tensor:
        """A x: coarse slices of fine ones, floating point.

        Raises:
            UnsuitableImage: their sizes are none of this operator.
        """

    @abstractmethod
    def inverse(self, coarse: Tensor) -> Tensor:
        """A+ y: the fine slices of the least norm that give the coarse ones."""

    def consistent(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """The fine slices nearest to the given ones of which A makes exactly the coarse ones: x + A+ (y - A x)."""
        return fine + self.inverse(coarse - self.forward(fine))


class AreaMeans(Downsampling):
    """In plane: a coarse pixel is the mean of a block of fine ones. A+ repeats it."""

    def __init__(self, factor: int) -> None:
        """Set up.

        Args:
            factor: fine pixels along a side of a coarse one, 1 at least.

        Raises:
            ValueError: it is less.
        """
        if factor < 1:
            raise ValueError(f"blocks of {factor} pixels")
        self.factor = factor

    def forward(self, fine: Tensor) -> Tensor:
        """(..., H, W) to (..., H / factor, W / factor).

        Raises:
            UnsuitableImage: a side is no multiple of the factor.
        """
        rows, columns = fine.shape[-2:]
        if rows % self.factor or columns % self.factor:
            raise UnsuitableImage(
                f"A slice of {rows} x {columns} pixels is no whole number of blocks of {self.factor}; crop it to "
                f"{rows - rows % self.factor} x {columns - columns % self.factor}."
            )
        blocks = fine.unflatten(-1, (-1, self.factor)).unflatten(-3, (-1, self.factor))
        return blocks.mean(dim=(-3, -1))

    def inverse(self, coarse: Tensor) -> Tensor:
        """(..., h, w) to (..., h * factor, w * factor)."""
        return coarse.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)


class ThickSlices(Downsampling):
    """Along z: a thick slice is the mean of the thin ones that it covers, in part those at its faces.

    Thick slices may touch each other, overlap or leave gaps; the outermost ones are means of what there is of them. The
    profile is a box: a helical scanner's has round shoulders, so that measured slices are met as exactly as others, but
    the thin ones are a little too smooth.
    """

    def __init__(self, count: int, factor: int, thickness: float | None = None) -> None:
        """Set up.

        Args:
            count: of thick slices.
            factor: thin slices from one thick slice's middle to the next one's, 1 at least.
            thickness: of a thick slice, in thin ones; None where they touch.

        Raises:
            ValueError: a number is not above 0.
            UnsuitableImage: the slices overlap so much that they cannot be told apart.
        """
        if count < 1 or factor < 1 or not (thickness is None or thickness > 0):
            raise ValueError(f"{count} slices of {factor} thin ones, {thickness} thick")
        #: (count, count * factor), rows adding up to 1, and its pseudo-inverse.
        self.matrix = _overlaps(count, factor, float(factor if thickness is None else thickness))
        gram = self.matrix @ self.matrix.T
        strengths = torch.linalg.eigvalsh(gram)
        if float(strengths[-1]) > _MOST_AMPLIFICATION**2 * float(strengths[0]):
            raise UnsuitableImage(
                "The slices overlap so much that thin ones cannot be told from them; leave out every second slice."
            )
        self.pseudo_inverse = torch.linalg.solve(gram, self.matrix).T.contiguous()

    def forward(self, fine: Tensor) -> Tensor:
        """(count * factor, ...) to (count, ...).

        Raises:
            UnsuitableImage: another number of slices.
        """
        if len(fine) != self.matrix.shape[1]:
            raise UnsuitableImage(
                f"{len(fine)} thin slices do not make {len(self.matrix)} thick ones; give {self.matrix.shape[1]}."
            )
        return _combined(self.matrix, fine)

    def inverse(self, coarse: Tensor) -> Tensor:
        """(count, ...) to (count * factor, ...)."""
        return _combined(self.pseudo_inverse, coarse)


def _overlaps(count: int, factor: int, thickness: float) -> Tensor:
    """float64 (count, count * factor): the share of each thin slice in each thick one."""
    middle = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) * factor
    below = torch.arange(count * factor, dtype=torch.float64)
    shares = (torch.minimum(middle + thickness / 2, below + 1) - torch.maximum(middle - thickness / 2, below)).clamp(0)
    return shares / shares.sum(dim=1, keepdim=True)


def _combined(weights: Tensor, slices: Tensor) -> Tensor:
    return torch.tensordot(weights.to(slices), slices, dims=1)
