"""The volumes table: one row per segment, lobe, lung and tree."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, SEGMENTS, STRUCTURES, Lobe, Side
from LCTfoundLib.volume import Volume

__all__ = ["VolumeRow", "volume_rows", "write_volumes"]

_COLUMNS = ("structure", "key", "kind", "code", "side", "lobe", "volume_ml", "share_of_lungs_percent", "mean_hu")


@dataclass(frozen=True)
class VolumeRow:
    """Size of one structure.

    Attributes:
        name, key: of the structure; lobes and lungs have keys such as ``right_upper_lobe``, ``left_lung``, ``lungs``.
        kind: ``segment``, ``lobe``, ``lung`` or ``tree``.
        code: value in its label map; 0 for the lungs.
        side, lobe: readable, empty where they do not apply.
        volume: mL.
        share: of both lungs, 0-1; None for trees.
        mean_hu: mean CT value inside; None if the structure is empty.
        confidence: 0-1; None if unknown.
    """

    name: str
    key: str
    kind: str
    code: int
    side: str
    lobe: str
    volume: float
    share: float | None
    mean_hu: float | None
    confidence: float | None


def volume_rows(
    segments: Volume, trees: Volume, ct: Volume, confidence: Mapping[str, float] | None = None
) -> list[VolumeRow]:
    """Rows of the volumes table: 18 segments, 5 lobes, right, left and both lungs, 3 trees.

    Args:
        segments, trees: label maps on the grid of ``ct``.
        ct: HU.
        confidence: 0-1 by key.
    """
    counts, sums = _label_sums(segments.array, ct.array, 19)
    tree_counts, tree_sums = _label_sums(trees.array, ct.array, 4)
    lungs = max(int(counts[1:].sum()), 1)

    def row(name: str, key: str, kind: str, code: int, side: str, lobe: str, n: int, hu: float) -> VolumeRow:
        share = None if kind == "tree" else n / lungs
        mean = hu / n if n else None
        return VolumeRow(name, key, kind, code, side, lobe, n * ct.voxel_ml, share, mean, (confidence or {}).get(key))

    def total(name: str, key: str, kind: str, code: int, side: str, codes: np.ndarray) -> VolumeRow:
        lobe = name if kind == "lobe" else ""
        return row(name, key, kind, code, side, lobe, int(counts[codes].sum()), float(sums[codes].sum()))

    rows = [
        row(s.name, s.key, "segment", s.code, s.side.value, s.lobe.label, int(counts[s.code]), float(sums[s.code]))
        for s in SEGMENTS
        if s.side is not None and s.lobe is not None
    ]
    for lobe in Lobe:
        codes = np.flatnonzero(LOBE_OF_SEGMENT == lobe)
        rows.append(total(lobe.label, f"{lobe.name.lower()}_lobe", "lobe", int(lobe), lobe.side.value, codes))
    for side in Side:
        codes = np.array([s.code for s in SEGMENTS if s.side is side])
        rows.append(total(f"{side.value.capitalize()} lung", f"{side.value}_lung", "lung", 0, side.value, codes))
    rows.append(total("Both lungs", "lungs", "lung", 0, "", np.arange(1, 19)))
    rows += [
        row(s.name, s.key, "tree", s.code - 18, "", "", int(tree_counts[s.code - 18]), float(tree_sums[s.code - 18]))
        for s in STRUCTURES[18:]
    ]
    return rows


def _label_sums(labels: np.ndarray, ct: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxel count and HU sum per label, slice by slice: a large CT must not be copied in double precision."""
    counts, sums = np.zeros(size, np.int64), np.zeros(size)
    for plane, hu in zip(labels, ct, strict=True):
        inside = plane > 0
        codes = plane[inside]
        counts += np.bincount(codes, minlength=size)
        sums += np.bincount(codes, hu[inside], minlength=size)
    return counts, sums


def write_volumes(rows: Iterable[VolumeRow], path: Path) -> None:
    """Write the table as CSV, UTF-8; numbers with a point, empty where unknown."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS, "confidence"])
        for r in rows:
            share = None if r.share is None else 100 * r.share
            writer.writerow(
                [r.name, r.key, r.kind, r.code, r.side, r.lobe]
                + [_number(r.volume, 3), _number(share, 2), _number(r.mean_hu, 1), _number(r.confidence, 3)]
            )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"
