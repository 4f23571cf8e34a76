"""Artery/vein swaps, measured at vessel points that were labeled by eye.

No mask here tells artery from vein, and a swap is the dangerous error of a surgical plan. ``vessel_points/*.json``
holds points on the axes of vessels of real scans, each followed slice by slice to its bronchus or to the heart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from LCTfoundLib.anatomy.structures import Tree
from LCTfoundLib.volume import Volume

__all__ = ["FOLDER", "SwapScore", "VesselPoint", "read_points", "score_swaps"]

FOLDER = Path(__file__).parent / "vessel_points"
#: A predicted vessel voxel this near to a point answers for it.
SEARCH_MM = 3.0


@dataclass(frozen=True)
class VesselPoint:
    """One labeled point.

    Attributes:
        name: unique within the scan.
        label: ``Tree.ARTERY`` or ``Tree.VEIN``.
        position: LPS mm, on the vessel's axis.
        lobe: lobe or ``central``.
        size: ``central``, ``segmental`` or ``subsegmental``.
        evidence: what was seen, in a few words.
    """

    name: str
    label: Tree
    position: tuple[float, float, float]
    lobe: str
    size: str
    evidence: str


def read_points(path: Path) -> list[VesselPoint]:
    """The points of one scan's file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [
        VesselPoint(
            row["name"], Tree[row["label"].upper()], tuple(row["lps_mm"]), row["lobe"], row["size"], row["evidence"]
        )
        for row in data["points"]
    ]


@dataclass(frozen=True)
class SwapScore:
    """Counts over the points of a scan.

    Attributes:
        right: predicted as labeled.
        swapped: predicted as the other class.
        missed: no predicted artery or vein within ``SEARCH_MM``.
    """

    right: int
    swapped: int
    missed: int

    @property
    def swap_rate(self) -> float:
        """Swapped points among all labeled ones; ``nan`` without points."""
        total = self.right + self.swapped + self.missed
        return self.swapped / total if total else float("nan")

    @property
    def swap_rate_of_found(self) -> float:
        """Swapped points among those that were found, which a method cannot lower by finding less."""
        found = self.right + self.swapped
        return self.swapped / found if found else float("nan")

    @property
    def miss_rate(self) -> float:
        total = self.right + self.swapped + self.missed
        return self.missed / total if total else float("nan")


def score_swaps(points: list[VesselPoint], trees: Volume, search_mm: float = SEARCH_MM) -> SwapScore:
    """Compare labeled points with a tree layer on a canonical grid: the nearest artery or vein voxel answers."""
    counts = {"right": 0, "swapped": 0, "missed": 0}
    for point in points:
        answer = _nearest_vessel(point, trees, search_mm)
        counts["missed" if answer is None else "right" if answer == point.label else "swapped"] += 1
    return SwapScore(**counts)


def _nearest_vessel(point: VesselPoint, trees: Volume, search_mm: float) -> int | None:
    spacing = np.array(trees.spacing)
    center = (np.array(point.position) - np.array(trees.origin)) / spacing
    reach = np.ceil(search_mm / spacing).astype(int)
    low = np.maximum(np.rint(center).astype(int) - reach, 0)
    high = np.rint(center).astype(int) + reach + 1
    box = trees.array[low[2] : max(high[2], 0), low[1] : max(high[1], 0), low[0] : max(high[0], 0)]
    index = np.argwhere((box == Tree.ARTERY) | (box == Tree.VEIN))
    if not len(index):
        return None
    distance = np.linalg.norm((index[:, ::-1] + low - center) * spacing, axis=1)
    nearest = int(distance.argmin())
    return int(box[tuple(index[nearest])]) if distance[nearest] <= search_mm else None
