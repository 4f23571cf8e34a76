"""Training samples of the segmentation nets: made by generator processes, kept in a pool folder, read by the trainer.

A pool is a folder of ``.npz`` files that generators add to and prune while trainers draw from it, so that generation
(CPU) and training (CPU or GPU) run at their own pace, on one machine or several with a shared folder.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from LCTfoundLib.networks.inputs import LungBox, network_input
from training.losses import IGNORE

__all__ = ["Pool", "Sample", "SampleDataset", "load_sample", "save_sample"]


@dataclass
class Sample:
    """One training volume on a canonical grid.

    Attributes:
        ct: int16 HU [k, j, i].
        regions: uint8 codes of the first head: 0, segments 1-18 (and ``Context`` codes).
        lobes: uint8 ``Lobe`` codes.
        trees: uint8 ``Tree`` codes, ``IGNORE`` where the scan cannot show the branch.
        skeleton: uint8 ``Tree`` codes on dilated centerlines of visible branches.
        spacing, origin: mm, of the grid.
        box: the lungs' bounding box.
    """

    ct: np.ndarray
    regions: np.ndarray
    lobes: np.ndarray
    trees: np.ndarray
    skeleton: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    box: LungBox


def save_sample(sample: Sample, path: Path) -> None:
    """Write a sample so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            ct=sample.ct.astype(np.int16),
            regions=sample.regions.astype(np.uint8),
            lobes=sample.lobes.astype(np.uint8),
            trees=sample.trees.astype(np.uint8),
            skeleton=sample.skeleton.astype(np.uint8),
            geometry=np.array([sample.spacing, sample.origin, sample.box.low, sample.box.high]),
        )
    temporary.replace(path)


def load_sample(path: Path) -> Sample:
    """Read what ``save_sample`` wrote."""
    with np.load(path) as data:
        spacing, origin, low, high = (tuple(float(v) for v in row) for row in data["geometry"])
        return Sample(
            data["ct"],
            data["regions"],
            data["lobes"],
            data["trees"],
            data["skeleton"],
            spacing,
            origin,
            LungBox(low, high),
        )


class Pool:
    """The samples of a folder; generators keep it at no more than ``capacity`` files (the oldest go)."""

    def __init__(self, folder: Path, capacity: int = 1000) -> None:
        self.folder = folder
        self.capacity = capacity
        folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.npz") if not path.name.startswith("."))

    def add(self, sample: Sample, name: str) -> None:
        save_sample(sample, self.folder / f"{name}.npz")
        files = sorted(self.files(), key=lambda path: path.stat().st_mtime)
        for path in files[: max(0, len(files) - self.capacity)]:
            path.unlink(missing_ok=True)

    def draw(self, rng: random.Random, wait_seconds: float = 900.0) -> Sample:
        """A random sample; waits for the generators while the pool is empty."""
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline:
            files = self.files()
            if files:
                try:
                    return load_sample(rng.choice(files))
                except FileNotFoundError:  # pruned between listing and reading
                    continue
            time.sleep(1.0)
        raise TimeoutError(f"no training sample appeared in {self.folder}; start `python -m training.generate` first")


class SampleDataset(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Endless stream of network inputs and targets, with crop and intensity augmentation.

    Args:
        pool: where the samples come from.
        patch: (k, j, i) size of a crop.
        seed: of the stream; each worker and each resumed run derives its own.
        augment: False for validation (centered crop, no intensity change).
    """

    def __init__(self, pool: Pool, patch: tuple[int, int, int], seed: int, augment: bool = True) -> None:
        self.pool, self.patch, self.seed, self.augment = pool, patch, seed, augment

    def __iter__(self):  # type: ignore[no-untyped-def]
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1009 + (worker.id if worker else 0))
        while True:
            yield self.item(self.pool.draw(rng), rng)

    def item(self, sample: Sample, rng: random.Random) -> dict[str, Tensor]:
        """Network input (C, k, j, i) and targets of one crop."""
        start = [self._start(size, want, rng) for size, want in zip(sample.ct.shape, self.patch, strict=True)]
        ct = self._crop(sample.ct, start, -1024)
        origin = tuple(sample.origin[a] + sample.spacing[a] * start[2 - a] for a in range(3))
        hu = torch.from_numpy(ct.astype(np.float32))
        if self.augment:
            hu = _augment_intensity(hu, rng)
        box = _jitter_box(sample.box, rng) if self.augment else sample.box
        inside = self._crop(np.ones(sample.ct.shape, np.uint8), start, 0)
        result = {"input": network_input(hu, sample.spacing, origin, box)}  # type: ignore[arg-type]
        for key in ("regions", "lobes", "trees", "skeleton"):
            labels = self._crop(getattr(sample, key), start, 0)
            if key != "skeleton":
                labels[inside == 0] = IGNORE
            result[key] = torch.from_numpy(labels)
        return result

    def _start(self, size: int, want: int, rng: random.Random) -> int:
        slack = size - want
        if not self.augment:
            return slack // 2
        return rng.randint(min(slack, 0), max(slack, 0))

    def _crop(self, array: np.ndarray, start: list[int], fill: int) -> np.ndarray:
        """A crop that may reach outside the array, where it is filled."""
        out = np.full(self.patch, fill, dtype=array.dtype)
        source, target = [], []
        for s, want, size in zip(start, self.patch, array.shape, strict=True):
            low, high = max(s, 0), min(s + want, size)
            source.append(slice(low, high))
            target.append(slice(low - s, high - s))
        out[tuple(target)] = array[tuple(source)]
        return out


def _augment_intensity(hu: Tensor, rng: random.Random) -> Tensor:
    """Calibration and contrast differences between scanners, on top of what the renderer varied."""
    if rng.random() < 0.5:
        hu = (hu + 1000.0) * rng.uniform(0.95, 1.05) - 1000.0 + rng.uniform(-20, 20)
    if rng.random() < 0.3:
        hu = hu + torch.randn_like(hu) * rng.uniform(5, 40)
    return hu


def _jitter_box(box: LungBox, rng: random.Random) -> LungBox:
    """At inference the box comes from a threshold mask, which misses effusions or takes in bowel gas."""
    low, high = list(box.low), list(box.high)
    for axis in range(3):
        extent = box.high[axis] - box.low[axis]
        spread = 0.03 if rng.random() < 0.8 else 0.10
        low[axis] += rng.uniform(-spread, spread) * extent
        high[axis] += rng.uniform(-spread, spread) * extent
    return LungBox((low[0], low[1], low[2]), (high[0], high[1], high[2]))
