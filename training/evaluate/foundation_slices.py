"""Slices for the evaluation of the foundation model, all alike: 256 x 256 pixels of 1.5 mm, three neighbors, HU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.conditions import WINDOWS, Window
from LCTfoundLib.runtime.files import atomic_path
from LCTfoundLib.volume import Volume
from training.evaluate.cases import held_out_scan, lidc_0001, lung1_001, read_canonical
from training.pretraining_data import is_held_out

__all__ = [
    "IGNORE",
    "PIXEL_MM",
    "SIDE",
    "TRAIN_SEED",
    "Labels",
    "SliceSet",
    "joined",
    "kept",
    "labeled_phantom",
    "labeled_real",
    "placed",
    "read_samples",
    "slices_of_volumes",
    "tcga_slices",
]

#: Pixels of a side and their size: a whole chest, at what pretraining sees.
SIDE, PIXEL_MM = 256, 1.5
#: Value of labels that no score looks at.
IGNORE = 255
#: First phantom whose labels train a probe; neither pretraining's patients nor anybody's test.
TRAIN_SEED = 710_000

_AIR, _BRIGHTEST = -1024, 3071


class Labels(StrEnum):
    """What labels tell apart."""

    #: ``Lobe`` codes, 0 outside.
    LOBES = "lobes"
    #: 1 in the lungs, 0 outside.
    LUNGS = "lungs"


@dataclass(frozen=True)
class SliceSet:
    """N slices.

    Attributes:
        hu: int16 (N, 3, 256, 256): the slice below, the slice itself, the one above; a lone slice three times.
        patients: (N,) whose.
        contrast: bool (N,), whether contrast medium was given; None where it is not asked.
        labels: uint8 (N, 256, 256) of the middle slices, ``IGNORE`` where nobody knows; None without.
        kind: of the labels.
    """

    hu: np.ndarray
    patients: np.ndarray
    contrast: np.ndarray | None = None
    labels: np.ndarray | None = None
    kind: Labels = Labels.LOBES

    def __len__(self) -> int:
        return len(self.hu)

    @property
    def middle(self) -> np.ndarray:
        """The slices themselves, (N, 256, 256)."""
        return self.hu[:, 1]

    @property
    def held_out(self) -> np.ndarray:
        """bool (N,): of patients that pretraining never saw (its own rule)."""
        return np.array([is_held_out(str(name)) for name in self.patients], bool)

    def of(self, chosen: np.ndarray) -> SliceSet:
        """Some of the slices."""
        contrast = None if self.contrast is None else self.contrast[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, hu=self.hu[chosen], patients=self.patients[chosen], contrast=contrast, labels=labels)


def joined(sets: Sequence[SliceSet]) -> SliceSet:
    """Several sets of one kind, one after the other; of contrast nothing is kept."""
    labels = None if sets[0].labels is None else np.concatenate([part.labels for part in sets])
    return SliceSet(
        np.concatenate([part.hu for part in sets]),
        np.concatenate([part.patients for part in sets]),
        labels=labels,
        kind=sets[0].kind,
    )


def placed(planes: np.ndarray, spacing: Sequence[float], nearest: bool = False) -> np.ndarray:
    """Planes (C, H, W) on 256 x 256 pixels of 1.5 mm around the middle; what lies beyond is cut or air.

    Args:
        planes: HU, or labels with ``nearest``.
        spacing: mm between rows and between columns.
        nearest: keep values as they are; else mean over what a new pixel covers.

    Returns:
        int16, or uint8 with ``nearest``.
    """
    size = [max(1, round(count * step / PIXEL_MM)) for count, step in zip(planes.shape[1:], spacing, strict=True)]
    stack = torch.from_numpy(np.ascontiguousarray(planes, np.float32))[None]
    if nearest:
        return _centered(F.interpolate(stack, size, mode="nearest-exact")[0].numpy(), 0).astype(np.uint8)
    smooth = F.interpolate(stack.clamp(_AIR, _BRIGHTEST), size, mode="bilinear", antialias=True)[0].numpy()
    return np.rint(_centered(smooth, _AIR)).astype(np.int16)


def _centered(planes: np.ndarray, outside: float) -> np.ndarray:
    result = np.full((len(planes), SIDE, SIDE), outside, planes.dtype)
    here, there = zip(*(_overlap(count) for count in planes.shape[1:]), strict=True)
    result[:, *there] = planes[:, *here]
    return result


def _overlap(count: int) -> tuple[slice, slice]:
    """Where a row of ``count`` pixels lies in one of ``SIDE``, centers together: what is taken, where it goes."""
    size = min(count, SIDE)
    start, goal = (count - size) // 2, (SIDE - size) // 2
    return slice(start, start + size), slice(goal, goal + size)


# -- sets ------------------------------------------------------------------------------------------------------------


def tcga_slices(path: Path) -> SliceSet:
    """The TCGA-LUAD slices with their contrast flags; each is its own neighbor, as in pretraining."""
    with np.load(path, allow_pickle=False) as data:
        hu, patients, spacing, contrast = (data[key] for key in ("hu", "patient", "spacing", "contrast"))
    planes = [placed(plane[None], step)[0] for plane, step in zip(hu, spacing, strict=True)]
    return SliceSet(np.repeat(np.stack(planes)[:, None], 3, axis=1), patients, contrast.astype(bool))


def labeled_phantom(seed: int, count: int) -> tuple[SliceSet, SliceSet]:
    """A synthetic patient scanned as in pretraining: labeled slices through the lungs, and slices of any level.

    Args:
        seed: of the patient; its scan is that of the test sets, on 1.5 mm pixels, slices 2.5 mm apart.
        count: of either.

    Returns:
        Slices evenly spaced in the lungs with their lobes, and slices evenly spaced in the scan without.
    """
    from training.phantom.render import make_patient, render

    scan = replace(held_out_scan(seed, shifted=False), spacing=(PIXEL_MM, PIXEL_MM, 2.5))
    rendered = render(make_patient(seed, spacing=2.0), scan, seed)
    name = f"phantom {seed}"
    ct, lobes = rendered.ct, rendered.lobes.array
    return _labeled(name, ct, lobes, Labels.LOBES, count), _cut(name, ct, _evenly(0, len(ct.array) - 1, count))


def labeled_real(data: Path, count: int) -> tuple[list[SliceSet], list[str]]:
    """LIDC-IDRI-0001 with machine labels of lobes and LUNG1-001 with human lung contours; what is missing, and why."""
    found, missing = [], []
    try:
        case = lidc_0001()
        assert case.truth.lobes is not None
        found.append(_labeled(case.name, case.ct, case.truth.lobes, Labels.LOBES, count))
    except LCTfoundError as error:
        missing.append(f"LIDC-IDRI-0001: {error}")
    if not (data / "ct" / "LUNG1-001_ct.nii.gz").is_file():
        return found, [*missing, "LUNG1-001: not in the data folder"]
    case = lung1_001(data / "ct")
    assert case.truth.sides is not None and case.truth.ignore is not None
    lungs = np.where(case.truth.ignore, IGNORE, case.truth.sides > 0).astype(np.uint8)
    return [*found, _labeled(case.name, case.ct, lungs, Labels.LUNGS, count)], missing


def slices_of_volumes(folder: Path, count: int) -> SliceSet | None:
    """Slices of every CT (``*_ct.nii.gz``) of a folder, evenly spaced; None without any."""
    paths = sorted(folder.glob("*_ct.nii.gz"))
    if not paths:
        return None
    volumes = ((path.name.removesuffix("_ct.nii.gz"), read_canonical(path)) for path in paths)
    return joined([_cut(name, ct, _evenly(0, len(ct.array) - 1, count)) for name, ct in volumes])


def read_samples(folder: Path) -> dict[str, SliceSet]:
    """Generated slices (``python -m LCTfoundLib generate --format npz``) of a folder and those in it, by window.

    Raises:
        LCTfoundError: there are none, or one is of another size or window.
    """
    paths = sorted(folder.rglob("*.npz"))
    if not paths:
        raise LCTfoundError(f"There is no generated slice (.npz) in {folder}; make some with 'generate --format npz'.")
    found: dict[str, list[np.ndarray]] = {}
    for path in paths:
        name, hu = _sample(path)
        found.setdefault(name, []).append(hu)
    return {name: SliceSet(np.stack(rows), np.array([folder.name] * len(rows))) for name, rows in found.items()}


def _sample(path: Path) -> tuple[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as data:
            hu, told = data["hu"], json.loads(str(data["provenance"]))
        window = Window(float(told["window"]["width"]), float(told["window"]["level"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LCTfoundError(
            f"{path} is no generated slice ({error}); make it with 'generate --format npz', or take it away."
        ) from error
    names = [name for name, known in WINDOWS.items() if known == window]
    if not names or hu.shape[-2:] != (SIDE, SIDE):
        raise LCTfoundError(
            f"{path} has {hu.shape[-1]} pixels and the window {window.width:g}, {window.level:g}; generate slices of "
            f"{SIDE} pixels in the window {' or '.join(WINDOWS)}."
        )
    return names[0], np.rint(np.broadcast_to(hu, (3, SIDE, SIDE))).astype(np.int16)


def _labeled(name: str, ct: Volume, labels: np.ndarray, kind: Labels, count: int) -> SliceSet:
    inside = np.flatnonzero(((labels > 0) & (labels != IGNORE)).any(axis=(1, 2)))
    levels = _evenly(int(inside[0]), int(inside[-1]), count)
    planes = np.stack([placed(labels[k][None], ct.spacing[1::-1], nearest=True)[0] for k in levels])
    return replace(_cut(name, ct, levels), labels=planes, kind=kind)


def _cut(name: str, ct: Volume, levels: Sequence[int]) -> SliceSet:
    last = len(ct.array) - 1
    around = [[min(max(k + step, 0), last) for step in (-1, 0, 1)] for k in levels]
    planes = [placed(np.asarray(ct.array[rows], np.float32), ct.spacing[1::-1]) for rows in around]
    return SliceSet(np.stack(planes), np.array([name] * len(levels)))


def _evenly(first: int, last: int, count: int) -> list[int]:
    """Levels in the middle of ``count`` equal parts, so that no slice lies at an end."""
    return [first + int((n + 0.5) / count * (last - first)) for n in range(count)]


# -- kept ------------------------------------------------------------------------------------------------------------


def kept(path: Path, make: Callable[[], Sequence[SliceSet]]) -> list[SliceSet]:
    """Sets from a file, which is made the first time: phantoms take 5 s each."""
    if not path.is_file():
        sets = make()
        arrays = {f"{n}_{key}": value for n, part in enumerate(sets) for key, value in _arrays(part).items()}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    with np.load(path, allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files}
    numbers = sorted({key.split("_", 1)[0] for key in arrays})
    return [_restored({k[len(n) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{n}_")}) for n in numbers]


def _arrays(part: SliceSet) -> dict[str, np.ndarray]:
    arrays = {"hu": part.hu, "patients": part.patients, "kind": np.array(str(part.kind))}
    return arrays if part.labels is None else arrays | {"labels": part.labels}


def _restored(arrays: dict[str, np.ndarray]) -> SliceSet:
    return SliceSet(arrays["hu"], arrays["patients"], labels=arrays.get("labels"), kind=Labels(str(arrays["kind"])))
