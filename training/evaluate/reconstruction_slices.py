"""The slices that reconstructions are trained, tuned and tested on, split by patient and frozen.

``reconstruction_slices.json`` says which. Test patients are those that pretraining keeps out
(``training.pretraining_data.is_held_out``) and the real test cases of ``split_manifest.json``; a slice of any other
patient may train. TotalSegmentator's example is no source (its picture cuts the body), nor is pyradiomics' (it comes
from LUNG1, whose licence forbids it and whose patients are tests).

Slices are square, of 512 pixels as scanned, or of 256 as means of 2 x 2 of them; air is -1000 HU at least, since no
attenuation is negative, and -1000 is what lies beyond the scanner's field of view.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from LCTfoundLib.demo import cache_folder, fetch_case
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.volume import Volume
from training.evaluate.cases import DEFAULT_DATA, manifest, read_canonical
from training.evaluate.image_metrics import body_mask
from training.pretraining_data import is_held_out

__all__ = [
    "AIR_HU",
    "SPLIT",
    "ReconstructionSlice",
    "SliceWithMetal",
    "SliceChoice",
    "at_size",
    "is_test_patient",
    "read_slices",
    "read_stacks",
    "training_slices",
]

SPLIT = Path(__file__).parent / "reconstruction_slices.json"
AIR_HU = -1000.0

_TCGA = "tcga_luad"
_TCGA_FILE = "tcga_luad_100slices.npz"
_PUBLIC = "LIDC-IDRI-0001"


class SliceChoice(StrEnum):
    """Which of the frozen slices."""

    #: Of every test patient.
    TEST = "test"
    #: Of them, for methods of minutes a slice.
    TWELVE = "twelve"
    #: Of these, for methods of hours.
    EIGHT = "eight"
    #: Of training patients, to choose parameters on.
    TUNING = "tuning"


@dataclass(frozen=True)
class ReconstructionSlice:
    """A slice of a real CT.

    Attributes:
        name: of the slice, unique.
        patient: whose.
        hu: float32 (S, S), -1000 at least.
        pixel_mm: side of a pixel.
    """

    name: str
    patient: str
    hu: np.ndarray
    pixel_mm: float

    @cached_property
    def body(self) -> np.ndarray:
        """bool (S, S), where metrics look."""
        return body_mask(self.hu, self.pixel_mm)


@dataclass(frozen=True)
class SliceWithMetal(ReconstructionSlice):
    """The same with a screw in the middle of the body, seen from its end; metrics leave its neighborhood out.

    Attributes:
        metal_mm: radius of the screw.
    """

    metal_mm: float = 3.0

    @classmethod
    def of(cls, piece: ReconstructionSlice, metal_mm: float, hu: float = 12_000.0) -> SliceWithMetal:
        """Titanium at the energies of a CT has about 12,000 HU."""
        with_metal = np.where(_from_middle(piece) <= metal_mm, np.float32(hu), piece.hu)
        return cls(piece.name, piece.patient, with_metal.astype(np.float32), piece.pixel_mm, metal_mm)

    @cached_property
    def body(self) -> np.ndarray:
        plain = ReconstructionSlice(self.name, self.patient, np.minimum(self.hu, 1000), self.pixel_mm)
        return plain.body & (_from_middle(plain) > 2 * self.metal_mm)


def _from_middle(piece: ReconstructionSlice) -> np.ndarray:
    """Distance of each pixel from the middle of the body, mm."""
    rows, columns = np.nonzero(piece.body)
    row, column = np.indices(piece.hu.shape)
    return np.hypot(row - round(rows.mean()), column - round(columns.mean())) * piece.pixel_mm


def is_test_patient(patient: str) -> bool:
    """Whether nothing may ever train on this patient."""
    return is_held_out(patient) or patient in manifest()["real"]["test"]


def read_slices(
    choice: SliceChoice, size: int, data: Path = DEFAULT_DATA, cache: Path | None = None
) -> tuple[list[ReconstructionSlice], list[str]]:
    """The frozen slices of a choice, and what is missing with the reason.

    Args:
        choice: which.
        size: pixels of a side, 512 or a part of it.
        data: folder of the real data.
        cache: of the public case; the demo's if None. It is downloaded where it is not yet there.

    Raises:
        ValueError: the frozen list names a training patient as a test, or a test patient for tuning.
    """
    found: list[ReconstructionSlice] = []
    missing: list[str] = []
    for source, levels in _chosen(choice).items():
        try:
            found += _tcga(data, levels, size) if source == _TCGA else _of_volume(source, data, cache, levels, size)
        except LCTfoundError as error:
            missing.append(f"{source}: {error}")
    wrong = sorted({s.patient for s in found if is_test_patient(s.patient) == (choice is SliceChoice.TUNING)})
    if wrong:
        raise ValueError(f"{SPLIT.name} puts {', '.join(wrong)} on the wrong side of the split")
    return found, missing


def read_stacks(
    choice: SliceChoice, size: int, count: int, data: Path = DEFAULT_DATA, cache: Path | None = None
) -> tuple[list[tuple[list[ReconstructionSlice], float]], list[str]]:
    """Around each frozen slice of a volume so many neighbors, from the feet up, and their distance (mm).

    Args:
        choice, size, data, cache: as in ``read_slices``.
        count: of the slices of a stack; the frozen one is in its middle, as far as the volume reaches.

    Returns:
        The stacks, and what is missing with the reason: single slices have no neighbors.
    """
    found: list[tuple[list[ReconstructionSlice], float]] = []
    missing: list[str] = []
    for source, levels in _chosen(choice).items():
        if source == _TCGA:
            continue
        try:
            ct = _volume(source, data, cache)
            if len(ct.array) < count:
                raise LCTfoundError(f"it has {len(ct.array)} slices and a stack {count}.")
        except LCTfoundError as error:
            missing.append(f"{source}: {error}")
            continue
        for level in levels:
            first = min(max(level - count // 2, 0), len(ct.array) - count)
            found.append((_levels(ct, source, range(first, first + count), size), float(ct.spacing[2])))
    return found, missing


def training_slices(
    size: int, data: Path = DEFAULT_DATA, every: int = 1
) -> tuple[list[ReconstructionSlice], list[str]]:
    """All slices that may train, and what is missing with the reason.

    Args:
        size: pixels of a side, 512 or a part of it.
        data: folder of the real data.
        every: of a volume's slices, each ``every``-th.
    """
    found: list[ReconstructionSlice] = []
    missing: list[str] = []
    for source in (_TCGA, *_split()["train_volumes"]):
        try:
            if source == _TCGA:
                found += [s for s in _tcga(data, None, size) if not is_test_patient(s.patient)]
            else:
                found += _of_volume(source, data, None, None, size)[::every]
        except LCTfoundError as error:
            missing.append(f"{source}: {error}")
    return found, missing


def at_size(hu: np.ndarray, pixel_mm: float, size: int) -> tuple[np.ndarray, float]:
    """A slice as a square of ``size`` pixels: air at -1000 HU, padded with air to a square, means over whole pixels.

    Args:
        hu: (H, W).
        pixel_mm: side of a pixel.
        size: a whole part of the longer side.

    Returns:
        float32 (size, size) and the side of its pixels.

    Raises:
        LCTfoundError: the longer side is no multiple of ``size``.
    """
    side = max(hu.shape)
    if size < 1 or side % size:
        raise LCTfoundError(f"A slice of {side} pixels has no {size} x {size} version; choose a whole part of {side}.")
    square = np.full((side, side), AIR_HU, np.float32)
    top, left = ((side - count) // 2 for count in hu.shape)
    square[top : top + hu.shape[0], left : left + hu.shape[1]] = np.maximum(hu, AIR_HU)
    step = side // size
    means = F.avg_pool2d(torch.from_numpy(square)[None], step)[0].numpy() if step > 1 else square
    return means, pixel_mm * step


def _split() -> dict[str, Any]:
    return json.loads(SPLIT.read_text(encoding="utf-8"))


def _chosen(choice: SliceChoice) -> Mapping[str, list[int]]:
    return {source: levels for source, levels in _split()[choice].items() if source != "about"}


# -- sources ---------------------------------------------------------------------------------------------------------


def _tcga(data: Path, rows: Sequence[int] | None, size: int) -> list[ReconstructionSlice]:
    """Rows of the file, all of them if None; of slices that are stored twice the first."""
    path = data / "slices" / _TCGA_FILE
    if not path.is_file():
        raise LCTfoundError(f"{path.name} is not in the data folder; name the folder with --data.")
    with np.load(path, allow_pickle=False) as stored:
        hu, patients, spacing = stored["hu"], stored["patient"].tolist(), stored["spacing"]
    rows = list(_first_of_each(hu)) if rows is None else rows
    return [_slice(f"{patients[n]} row {n}", patients[n], hu[n], spacing[n], size) for n in rows]


def _first_of_each(planes: np.ndarray) -> Iterator[int]:
    seen = set()
    for n, plane in enumerate(planes):
        content = plane.tobytes()
        if content not in seen:
            seen.add(content)
            yield n


def _of_volume(
    name: str, data: Path, cache: Path | None, levels: Sequence[int] | None, size: int
) -> list[ReconstructionSlice]:
    """Levels of a volume, all of them if None."""
    ct = _volume(name, data, cache)
    return _levels(ct, name, range(len(ct.array)) if levels is None else levels, size)


def _levels(ct: Volume, name: str, levels: Iterable[int], size: int) -> list[ReconstructionSlice]:
    return [_slice(f"{name} level {k}", name, np.asarray(ct.array[k]), ct.spacing[:2], size) for k in levels]


def _volume(name: str, data: Path, cache: Path | None) -> Volume:
    if name == _PUBLIC:
        return read_canonical(fetch_case(cache or cache_folder()).ct)
    path = data / "ct" / f"{name}_ct.nii.gz"
    if not path.is_file():
        raise LCTfoundError(f"{path.name} is not in the data folder; name the folder with --data.")
    return read_canonical(path)


def _slice(name: str, patient: str, hu: np.ndarray, spacing: Sequence[float], size: int) -> ReconstructionSlice:
    if abs(spacing[0] - spacing[1]) > 1e-3 * spacing[0]:
        raise LCTfoundError(f"{name} has pixels of {spacing[0]:g} x {spacing[1]:g} mm; take one with square pixels.")
    return ReconstructionSlice(name, patient, *at_size(hu, float(spacing[0]), size))
