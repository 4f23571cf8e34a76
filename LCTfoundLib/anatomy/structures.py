"""The 21 structures of the lung: codes, names, lobes, colors and terminology.

Two label layers describe a lung, because a vessel lies *inside* a segment:

* the **territory layer** (``SEGMENTS``, codes 1-18): the bronchopulmonary segments tile the lungs exactly,
  vessels and airways inside them included; the lobes are unions of segments;
* the **tree layer** (``Tree``, codes 1-3): airway lumen, pulmonary artery, pulmonary vein.

``STRUCTURES`` lists all 21 with one code each (1-18 segments, 19-21 trees), the order of the published model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np

__all__ = [
    "LOBE_OF_SEGMENT",
    "SEGMENTS",
    "STRUCTURES",
    "Context",
    "Lobe",
    "Side",
    "Structure",
    "Tree",
    "lobes_from_segments",
    "segment_by_code",
    "segments_of_lobe",
]


class Side(StrEnum):
    """Patient side."""

    RIGHT = "right"
    LEFT = "left"


class Lobe(IntEnum):
    """Lobe codes of a lobe label map."""

    RIGHT_UPPER = 1
    RIGHT_MIDDLE = 2
    RIGHT_LOWER = 3
    LEFT_UPPER = 4
    LEFT_LOWER = 5

    @property
    def side(self) -> Side:
        return Side.RIGHT if self <= Lobe.RIGHT_LOWER else Side.LEFT

    @property
    def label(self) -> str:
        """Readable name, for example ``Right middle lobe``."""
        return self.name.replace("_", " ").capitalize() + " lobe"


class Tree(IntEnum):
    """Codes of the tree layer."""

    AIRWAY = 1
    ARTERY = 2
    VEIN = 3


class Context(IntEnum):
    """Neighboring organs that the coarse network also names, coded after the 18 segments in its first head."""

    HEART = 19
    AORTA = 20
    VENA_CAVA = 21
    ESOPHAGUS = 22
    BONE = 23
    UPPER_ABDOMEN_RIGHT = 24  # liver
    UPPER_ABDOMEN_LEFT = 25  # stomach and spleen


@dataclass(frozen=True)
class Structure:
    """One of the 21 structures.

    Attributes:
        code: 1-18 segments, 19 airway, 20 artery, 21 vein.
        key: ASCII identifier, used in file names (``right_s01``).
        name: the field's name (``Right S1 apical``).
        short: label for a picture or a table (``RS1``).
        color: sRGB, 0-255.
        lobe: the lobe of a segment; None for a tree.
        side: patient side of a segment; None for a tree.
    """

    code: int
    key: str
    name: str
    short: str
    color: tuple[int, int, int]
    lobe: Lobe | None = None
    side: Side | None = None

    @property
    def tree(self) -> Tree | None:
        """The tree-layer code of a tree, None for a segment."""
        return Tree(self.code - 18) if self.code > 18 else None


def _segment(code: int, lobe: Lobe, number: str, anatomy: str, color: tuple[int, int, int]) -> Structure:
    side = lobe.side
    key = f"{side.value}_s{'_'.join(f'{int(part):02d}' for part in number.split('+'))}"
    return Structure(
        code,
        key,
        f"{side.value.capitalize()} S{number} {anatomy}",
        f"{side.value[0].upper()}S{number}",
        color,
        lobe,
        side,
    )


#: The 18 bronchopulmonary segments; a lobe's segments share a hue family, neighbors differ in lightness.
SEGMENTS: tuple[Structure, ...] = (
    _segment(1, Lobe.RIGHT_UPPER, "1", "apical", (255, 224, 130)),
    _segment(2, Lobe.RIGHT_UPPER, "2", "posterior", (255, 167, 38)),
    _segment(3, Lobe.RIGHT_UPPER, "3", "anterior", (230, 115, 0)),
    _segment(4, Lobe.RIGHT_MIDDLE, "4", "lateral", (174, 213, 129)),
    _segment(5, Lobe.RIGHT_MIDDLE, "5", "medial", (85, 139, 47)),
    _segment(6, Lobe.RIGHT_LOWER, "6", "superior", (129, 212, 250)),
    _segment(7, Lobe.RIGHT_LOWER, "7", "medial basal", (2, 119, 189)),
    _segment(8, Lobe.RIGHT_LOWER, "8", "anterior basal", (77, 182, 172)),
    _segment(9, Lobe.RIGHT_LOWER, "9", "lateral basal", (38, 166, 218)),
    _segment(10, Lobe.RIGHT_LOWER, "10", "posterior basal", (0, 105, 122)),
    _segment(11, Lobe.LEFT_UPPER, "1+2", "apicoposterior", (248, 187, 208)),
    _segment(12, Lobe.LEFT_UPPER, "3", "anterior", (240, 98, 146)),
    _segment(13, Lobe.LEFT_UPPER, "4", "superior lingular", (206, 147, 216)),
    _segment(14, Lobe.LEFT_UPPER, "5", "inferior lingular", (156, 39, 176)),
    _segment(15, Lobe.LEFT_LOWER, "6", "superior", (197, 202, 233)),
    _segment(16, Lobe.LEFT_LOWER, "7+8", "anteromedial basal", (121, 134, 203)),
    _segment(17, Lobe.LEFT_LOWER, "9", "lateral basal", (149, 117, 205)),
    _segment(18, Lobe.LEFT_LOWER, "10", "posterior basal", (69, 39, 160)),
)

#: All 21 structures in the published order of codes used here: segments, then airway, artery, vein.
STRUCTURES: tuple[Structure, ...] = (
    *SEGMENTS,
    Structure(19, "airway", "Airway", "Airway", (175, 216, 244)),
    Structure(20, "pulmonary_artery", "Pulmonary artery", "Artery", (0, 122, 171)),
    Structure(21, "pulmonary_vein", "Pulmonary vein", "Vein", (186, 77, 64)),
)

#: Lookup table: segment code (index, 0 = background) -> lobe code. Shape (19,), uint8.
LOBE_OF_SEGMENT: np.ndarray = np.array([0, *(int(s.lobe) for s in SEGMENTS if s.lobe)], dtype=np.uint8)
LOBE_OF_SEGMENT.setflags(write=False)


def segment_by_code(code: int) -> Structure:
    """The structure of a code, 1-21."""
    return STRUCTURES[code - 1]


def segments_of_lobe(lobe: Lobe) -> tuple[Structure, ...]:
    """The segments of a lobe, in code order."""
    return tuple(s for s in SEGMENTS if s.lobe == lobe)


def lobes_from_segments(segments: np.ndarray) -> np.ndarray:
    """Lobe label map (uint8, ``Lobe`` codes) of a segment label map with codes 0-18."""
    return LOBE_OF_SEGMENT[segments]
