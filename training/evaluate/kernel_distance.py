"""Kernel distance (KID) between sets of slices, in the features of a fixed net of ours.

The estimate is that of Binkowski et al., "Demystifying MMD GANs", ICLR 2018: the unbiased squared maximum mean
discrepancy with the kernel (x.y / d + 1)^3, its mean and standard deviation over random subsets. Their features are of
a net for photographs; ours are of the shipped fine lung net, which has seen chests (synthetic ones) and knows vessels,
airways and lobes. Numbers are therefore comparable with each other here, not with published ones.

The features are standardized by the mean and standard deviation of the real slices. As they come, most of each is an
offset that all slices share (mediastinal window: 0.69 with a deviation of 0.003), and the kernel is blind to the rest:
phantoms were then as near to real slices as real ones are (-0.012 and -0.013), standardized far from them (1.3 and
-0.4; lung window, 20 slices each).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from LCTfoundLib.networks.conditions import Window
from LCTfoundLib.networks.inputs import LungBox, network_input
from LCTfoundLib.networks.lung import FINE, load_net
from LCTfoundLib.runtime.device import DeviceChoice
from training.evaluate.foundation_slices import PIXEL_MM

__all__ = [
    "FixedNet",
    "KernelDistance",
    "Level",
    "between_halves",
    "kernel_distance",
    "squared_discrepancy",
    "standardized",
]

#: The lungs of an adult in the middle of the picture; one box for all slices, so that position tells nothing of a set.
_BOX = LungBox((-140.0, -100.0, -120.0), (140.0, 100.0, 120.0))


class Level(StrEnum):
    """Which maps of the fixed net are compared."""

    #: What is where.
    DEEPEST = "deepest level"
    #: With the finer maps, which see noise, edges and texture.
    ALL = "all levels"


@dataclass(frozen=True)
class KernelDistance:
    """A distance over random subsets.

    Attributes:
        mean, sd: over the subsets; the mean may fall below 0 where the sets are alike, since it is unbiased.
        subset: slices of each set in a subset.
        subsets: their number.
    """

    mean: float
    sd: float
    subset: int
    subsets: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.sd:.4f}"


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of features (m, d) and (n, d) with the kernel (x.y / d + 1)^3.

    Raises:
        ValueError: a set has less than 2 rows, of which no unbiased estimate exists.
    """
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"sets of {m} and {n} slices have no distance; 2 of each are needed")
    within_x, within_y, across = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    np.fill_diagonal(within_x, 0.0)
    np.fill_diagonal(within_y, 0.0)
    return float(within_x.sum() / (m * (m - 1)) + within_y.sum() / (n * (n - 1)) - 2 * across.mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1.0) ** 3


def kernel_distance(
    x: np.ndarray, y: np.ndarray, subset: int, subsets: int, rng: np.random.Generator
) -> KernelDistance:
    """The distance of two sets of features.

    Args:
        x, y: (m, d) and (n, d).
        subset: rows drawn of each without replacement; less where a set is smaller.
        subsets: draws.
    """
    size = min(subset, len(x), len(y))
    values = [squared_discrepancy(_drawn(x, size, rng), _drawn(y, size, rng)) for _ in range(subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)), size, subsets)


def between_halves(
    features: np.ndarray, patients: Sequence[str], subset: int, subsets: int, rng: np.random.Generator
) -> KernelDistance:
    """The distance of a set to itself: each draw splits the patients in two halves, so that none is in both.

    Args:
        features: (n, d).
        patients: whose slice each row is.
        subset, subsets: as for :func:`kernel_distance`; a half may hold fewer rows than its share.
    """
    splits = [_halves(patients, rng) for _ in range(subsets)]
    size = min(subset, *(int(min(half.sum(), (~half).sum())) for half in splits))
    values = [
        squared_discrepancy(_drawn(features[half], size, rng), _drawn(features[~half], size, rng)) for half in splits
    ]
    return KernelDistance(float(np.mean(values)), float(np.std(values)), size, subsets)


def _halves(patients: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    names = np.unique(patients)
    chosen = rng.permutation(names)[: len(names) // 2]
    return np.isin(patients, chosen)


def _drawn(rows: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    return rows[rng.choice(len(rows), size, replace=False)]


def standardized(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(N, d) with the mean of the reference (M, d) at 0 and its standard deviation at 1."""
    sd = reference.std(axis=0, dtype=np.float64)
    return (features - reference.mean(axis=0, dtype=np.float64)) / np.where(sd > 0, sd, 1.0)


class FixedNet:
    """Features of slices: the fine lung net's encoder maps, averaged over space, finest first.

    bfloat16 is seven times as fast on a CPU that has it. Its rounding is 1 % of what features vary by between slices,
    but in the deepest level of the mediastinal window, where they vary little, 14 to 30 %, the same for all sets.
    """

    def __init__(self, choice: DeviceChoice, folder: Path | None = None) -> None:
        """Load the net.

        Args:
            choice: device and precision.
            folder: of another weight; the shipped one if None.

        Raises:
            WeightError: missing or damaged weight.
        """
        loaded = load_net(FINE, folder)
        self.choice, self.sha256 = choice, loaded.card.sha256
        self.network = loaded.network.to(choice.device)

    @torch.inference_mode()
    def __call__(self, hu: np.ndarray, window: Window) -> np.ndarray:
        """Features of single slices.

        Args:
            hu: (N, H, W) of 1.5 mm pixels, H and W multiples of 16.
            window: the slices are clipped to, so that what lies beyond it (generated slices have nothing there) does
                not count.

        Returns:
            float32 (N, 336), of which :meth:`columns` are a level's.
        """
        low, high = window.level - window.width / 2, window.level + window.width / 2
        clipped = torch.from_numpy(np.clip(hu.astype(np.float32), low, high))
        return torch.cat([self._encoded(plane) for plane in clipped]).numpy()

    def columns(self, level: Level) -> slice:
        """Of the features."""
        widths = self.network.config.channels
        return slice(sum(widths[:-1]) if level is Level.DEEPEST else 0, sum(widths))

    @torch.inference_mode()
    def maps(self, plane: Tensor) -> list[Tensor]:
        """Encoder maps of one slice, finest first.

        Args:
            plane: HU (H, W) of 1.5 mm pixels, H and W multiples of 16.

        Returns:
            float32 (C, H / 2^level, W / 2^level) on the CPU: the middle plane of the slab of like slices that a 3D net
            needs.
        """
        return [found[0, :, found.shape[2] // 2].cpu() for found in self._levels(plane)]

    def _encoded(self, plane: Tensor) -> Tensor:
        return torch.cat([found.mean(dim=(2, 3, 4)) for found in self._levels(plane)], dim=1).cpu()

    def _levels(self, plane: Tensor) -> list[Tensor]:
        """Of each encoder, float32 (1, C, D, H, W)."""
        depth = self.network.config.divisor
        slab = plane.to(self.choice.device).expand(depth, -1, -1)
        origin = tuple(-step * (count - 1) / 2 for step, count in zip((PIXEL_MM,) * 3, slab.shape[::-1], strict=True))
        x = network_input(slab, (PIXEL_MM,) * 3, origin, _BOX)[None].contiguous(memory_format=torch.channels_last_3d)
        half = self.choice.dtype != torch.float32
        found = []
        with torch.autocast(self.choice.device.type, self.choice.dtype, enabled=half):
            x = self.network.stem(x)
            for level, encoder in enumerate(self.network.encoders):
                x = encoder(x)
                found.append(x.float())
                if level < len(self.network.downs):
                    x = self.network.downs[level](x)
        return found
