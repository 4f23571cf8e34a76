"""Slices of many shards in a random order that is a pure function of the seed: nothing to save, nothing to replay.

Sample number ``i`` of a run is the same slice with the same augmentation on every machine, with any number of
processes and workers; a resumed run goes on with the next number. A shard is a tar of curation
(``training/curation/shards.py``) whose slices are read where they lie, three neighbors at a time.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.conditions import WIDE, WINDOWS, Condition, Disease, drop_condition
from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.foundation import InputRecipe, Slices
from training.curation.shards import check_end, decode_slice

__all__ = [
    "Augmentation",
    "Mixture",
    "ShardError",
    "ShardIndex",
    "Sample",
    "SliceSampler",
    "SmallSlices",
    "Source",
    "Study",
]

_AIR = -1024
#: A label with a higher probability is told to the backbone; what is packed has passed the gate of 0.9.
_LABEL_THRESHOLD = 0.5
_WINDOWS = WINDOWS | {"wide": WIDE}
_TERMS = {disease.value: disease for disease in Disease}


class ShardError(LCTfoundError):
    """Shards are missing or damaged."""


@dataclass(frozen=True)
class Study:
    """What the samples need to know of a study.

    Attributes:
        name: de-identified.
        diseases: known of it.
        source, license: of the data; empty for what a hospital curated itself.
    """

    name: str
    diseases: tuple[Disease, ...]
    source: str = ""
    license: str = ""


class ShardIndex:
    """Where each slice lies.

    Attributes:
        paths: of the shards, sorted by name.
        shard, offset, size: (n,) number of the shard, and place and length in it, of each slice.
        study: (n,) number of its study.
        studies: by that number; the slices of a study follow one another.
        starts: (shards + 1,) first slice of each shard.
    """

    def __init__(self, folder: Path) -> None:
        """Scan the headers of a folder's shards, 20 ms for a study of 120 slices.

        Raises:
            ShardError: no shard, or one that is not whole.
        """
        self.paths = sorted(folder.glob("*.tar"))
        if not self.paths:
            raise ShardError(f"There is no shard (.tar) in {folder}; curate studies or make phantoms into it first.")
        self.studies: list[Study] = []
        rows: list[tuple[int, int, int, int]] = []
        starts = [0]
        for number, path in enumerate(self.paths):
            rows += [(number, *place) for place in self._scan(path)]
            starts.append(len(rows))
        table = np.array(rows, np.int64).reshape(-1, 4)
        self.shard, self.offset, self.size, self.study = table.T
        self.starts = np.array(starts)

    def __len__(self) -> int:
        return len(self.shard)

    def _scan(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """Place, length and study of each slice of a shard."""
        known: dict[str, int] = {}
        try:
            check_end(path)
            with tarfile.open(path, "r:") as archive:
                plane: tarfile.TarInfo | None = None
                for entry in archive:
                    if entry.name.endswith(".npz"):
                        plane = entry
                    elif plane is not None:
                        study = entry.name.rsplit("_", 1)[0]
                        if study not in known:
                            data = archive.extractfile(entry)
                            assert data is not None
                            known[study] = len(self.studies)
                            self.studies.append(_study(json.loads(data.read())))
                        yield plane.offset_data, plane.size, known[study]
                        plane = None
        except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path} is no whole shard ({error}); copy it again, or make it again.") from error

    def neighbors(self, number: int) -> list[int]:
        """The slices below, at and above a slice; a missing one is the slice itself."""
        last = len(self) - 1
        around = [max(number - 1, 0), number, min(number + 1, last)]
        return [n if self.study[n] == self.study[number] else number for n in around]

    def read(self, number: int) -> np.ndarray:
        """int16 HU (rows, columns).

        Raises:
            ShardError: the slice is damaged.
        """
        path = self.paths[self.shard[number]]
        try:
            with path.open("rb") as file:
                file.seek(self.offset[number])
                return decode_slice(file.read(self.size[number]))
        except (OSError, ValueError) as error:
            raise ShardError(f"A slice of {path} is damaged ({error}); copy the shard again.") from error


def _study(facts: dict[str, object]) -> Study:
    labels = facts.get("labels") or {}
    assert isinstance(labels, dict)
    told = tuple(_TERMS[name] for name in sorted(labels) if name in _TERMS and labels[name] > _LABEL_THRESHOLD)
    return Study(str(facts["study"]), told, str(facts.get("source", "")), str(facts.get("license", "")))


class SliceOrder:
    """A random order of an index for each epoch: shards shuffled, then slices within groups of shards.

    A group's shards stay in the file system's cache while its slices are drawn: on a network disk reading stays
    nearly sequential.
    """

    def __init__(self, index: ShardIndex, seed: int, group: int = 32) -> None:
        self._index, self._seed, self._group = index, seed, group
        self._known: tuple[int, int, np.ndarray] | None = None
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __call__(self, position: int) -> int:
        """The slice at a position, which may go on beyond the first epoch."""
        epoch, place = divmod(position, len(self._index))
        order, ends = self._shards(epoch)
        group = int(np.searchsorted(ends, place, side="right"))
        if self._known is None or self._known[:2] != (epoch, group):
            shards = order[group * self._group : (group + 1) * self._group]
            starts = self._index.starts
            slices = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
            np.random.default_rng([self._seed, epoch, group]).shuffle(slices)
            self._known = (epoch, group, slices)
        return int(self._known[2][place - (ends[group - 1] if group else 0)])

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the position where each group ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._index.paths))
            sizes = np.diff(self._index.starts)[order]
            groups = np.add.reduceat(sizes, np.arange(0, len(sizes), self._group))
            self._epoch = (epoch, order, np.cumsum(groups))
        return self._epoch[1], self._epoch[2]


@dataclass(frozen=True)
class Source:
    """A folder of shards and its share of the samples."""

    folder: Path
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """``FOLDER`` or ``FOLDER:SHARE``."""
        folder, colon, share = text.rpartition(":")
        try:
            return cls(Path(folder), float(share)) if colon else cls(Path(text))
        except ValueError:
            return cls(Path(text))


class Mixture:
    """Samples of several sources in fixed shares: in each cycle of 100 samples each source has its number of places."""

    _CYCLE = 100

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        """Index the sources.

        Raises:
            ShardError: no shard in one of them, or a share that is none.
        """
        total = sum(source.share for source in sources)
        if not sources or total <= 0 or min(source.share for source in sources) < 0:
            raise ShardError("The shares of the shard folders must be above 0; write FOLDER:SHARE.")
        self.indexes = [ShardIndex(source.folder) for source in sources]
        self._orders = [SliceOrder(index, seed * 1000 + n) for n, index in enumerate(self.indexes)]
        ends = np.round(np.cumsum([source.share / total for source in sources]) * self._CYCLE).astype(int)
        cycle = np.searchsorted(ends, np.arange(self._CYCLE), side="right")
        np.random.default_rng([seed, 7]).shuffle(cycle)
        self._cycle, self._counts = cycle, np.bincount(cycle, minlength=len(sources))

    def __call__(self, number: int) -> tuple[ShardIndex, int]:
        """Index and slice of a sample."""
        turn, place = divmod(number, self._CYCLE)
        source = int(self._cycle[place])
        before = int(np.count_nonzero(self._cycle[:place] == source))
        return self.indexes[source], self._orders[source](turn * int(self._counts[source]) + before)

    @property
    def data(self) -> list[tuple[str, str]]:
        """Names and licenses of what is drawn from, for the card."""
        return sorted({(study.source, study.license) for index in self.indexes for study in index.studies})


@dataclass(frozen=True)
class Augmentation:
    """The published augmentation, and how a slice is brought to the network's size.

    Attributes:
        size: pixels of a sample's side.
        canvas: pixels of a whole slice's side; where it is larger than ``size``, a sample is a random part of it.
        whole: share of samples that show the whole slice all the same, with coarser pixels.
        scale: range of the random scaling.
        flip: chance, for rows and for columns; (0, 0) with ``turn`` 0 keeps a chest upright, the heart on its side.
        turn: chance of a turn by 90, 180 or 270 degrees.
        gamma: range of the exponent, with the chance ``gamma_share``.
    """

    size: int = 256
    canvas: int = 256
    whole: float = 0.0
    scale: tuple[float, float] = (0.9, 1.1)
    flip: tuple[float, float] = (0.5, 0.5)
    turn: float = 0.3
    gamma: tuple[float, float] = (0.97, 1.03)
    gamma_share: float = 0.1

    def place(self, hu: Tensor, rng: np.random.Generator) -> Tensor:
        """HU (C, H, W) to (C, size, size): scaled, cropped, flipped and turned; float32."""
        square = _square(hu.float())
        view = self.canvas / float(rng.uniform(*self.scale))  # canvas pixels that the sample's side covers, if whole
        if self.size < self.canvas and rng.random() >= self.whole:
            view *= self.size / self.canvas
        reach = max(self.canvas - view, 0.0) / self.canvas
        shift = rng.uniform(-reach, reach, 2) if view < self.canvas else rng.uniform(-0.05, 0.05, 2)
        placed = _resampled(square, self.size, view / self.canvas, shift)
        for axis, chance in zip((1, 2), self.flip, strict=True):
            if rng.random() < chance:
                placed = placed.flip(axis)
        if rng.random() < self.turn:
            placed = placed.rot90(int(rng.integers(1, 4)), (1, 2))
        return placed

    def shade(self, shown: Tensor, rng: np.random.Generator) -> Tensor:
        """Gamma of an image in -1..1."""
        if rng.random() >= self.gamma_share:
            return shown
        return ((shown + 1) / 2).clamp(0, 1) ** float(rng.uniform(*self.gamma)) * 2 - 1


def _square(hu: Tensor) -> Tensor:
    """Padded with air to a square."""
    height, width = hu.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(hu, (left, side - width - left, top, side - height - top), value=_AIR)


def _resampled(square: Tensor, size: int, view: float, shift: np.ndarray) -> Tensor:
    """The part of a square image that is ``view`` of its side wide and ``shift`` (-1..1) off its center."""
    while square.shape[-1] * view >= 2 * size:  # a mean of whole blocks first: interpolation alone would alias
        square = F.avg_pool2d(square[None], 2, ceil_mode=True)[0]
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    rows, columns = axis * view + float(shift[0]), axis * view + float(shift[1])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)[None]
    # Moved so that air is 0, which is what lies beyond the image.
    return F.grid_sample((square - _AIR)[None], grid, align_corners=False)[0] + _AIR


@dataclass(frozen=True)
class SmallSlices:
    """Whole slices of few pixels, which some batches have in place of the augmentation's.

    A short training learns what a chest looks like from many small pictures sooner than from few large ones. Generation
    begins with such a picture, and gives it detail as it grows, so that larger ones need to be known under little noise
    only.

    Attributes:
        size: pixels of a side.
        share: of the batches.
        most_noise: timesteps below this for the other batches.
        batch: samples that lie in one batch, whose sizes have to agree.
    """

    size: int
    share: float
    most_noise: int
    batch: int

    def take(self, seed: int, number: int) -> bool:
        """Whether a sample's batch is one of them."""
        return bool(np.random.default_rng([seed, number // self.batch, 9]).random() < self.share)


@dataclass
class Sample:
    """A slice as the backbone sees it.

    Attributes:
        image: float32 (3, size, size), -1..1.
        condition: with the paper's random dropping.
        number: of the sample in the run.
        most_noise: timesteps below this.
    """

    image: Tensor
    condition: Condition
    number: int
    most_noise: int = NoiseSchedule.steps


class SliceSampler:
    """Samples by their number."""

    def __init__(
        self,
        mixture: Mixture,
        augmentation: Augmentation,
        recipe: InputRecipe,
        seed: int,
        drop: bool = True,
        windows: Mapping[str, float] | None = None,
        small: SmallSlices | None = None,
    ) -> None:
        """Set up.

        Args:
            drop: forget conditions at random, as in training.
            windows: share of each by its name, ``wide`` among them; the published two in halves if not given.
            small: for some of the batches.

        Raises:
            ShardError: a window's name is unknown, or a share is none.
        """
        self.mixture, self.augmentation, self.recipe, self.seed, self._drop = mixture, augmentation, recipe, seed, drop
        self.small = small
        shares = dict(windows or {"lung": 0.5, "mediastinal": 0.5})
        if not shares.keys() <= _WINDOWS.keys() or min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ShardError(f"The windows {shares} must be of {', '.join(_WINDOWS)}, with shares above 0.")
        self._windows = [_WINDOWS[name] for name in shares]
        self._window_ends = np.cumsum(list(shares.values())) / sum(shares.values())

    def __call__(self, number: int) -> Sample:
        """The sample of a number: window drawn, slices read, augmented.

        Raises:
            ShardError: a slice is damaged.
        """
        rng = np.random.default_rng([self.seed, number])
        index, place = self.mixture(number)
        window = self._windows[int(np.searchsorted(self._window_ends, rng.random(), side="right"))]
        around = index.neighbors(place) if self.recipe.slices is Slices.NEIGHBORS else [place]
        hu = torch.from_numpy(np.stack([index.read(n) for n in around]))
        small = self.small if self.small is not None and self.small.take(self.seed, number) else None
        shown = replace(self.augmentation, size=small.size, whole=1.0) if small else self.augmentation
        placed = shown.place(hu, rng)
        image = self.augmentation.shade(self.recipe(placed, window)[len(around) // 2], rng)
        condition = Condition(window, index.studies[index.study[place]].diseases)
        if self._drop:
            condition = drop_condition(condition, torch.Generator().manual_seed(int(rng.integers(2**62))))
        most_noise = self.small.most_noise if self.small is not None and small is None else NoiseSchedule.steps
        return Sample(image, condition, number, most_noise)
