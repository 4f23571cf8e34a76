"""What can be exported on its own: the 21 structures, and the lobes and lungs that their segments make up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import ndimage

from LCTfoundLib.anatomy.structures import SEGMENTS, STRUCTURES, Lobe, Side, Structure, segments_of_lobe
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.export.terminology import Term, term_of, term_of_lobe, term_of_lungs

__all__ = ["PARTS", "STRUCTURE_PARTS", "Box", "LabelLayer", "Layer", "Part", "choose_parts", "layers_of", "part_boxes"]

#: Slices (k, j, i) of a bounding box.
Box = tuple[slice, ...]

_LUNG_COLOR = (205, 170, 155)


class Layer(Enum):
    """Label maps; parts of the same layer never overlap, parts of different ones may."""

    SEGMENTS = "segments"
    TREES = "trees"
    LOBES = "lobes"
    SIDES = "sides"
    LUNGS = "lungs"


@dataclass(frozen=True)
class Part:
    """Something that can be exported on its own.

    Attributes:
        key: as in the volumes table (``right_s01``, ``airway``, ``right_upper_lobe``, ``left_lung``, ``lungs``).
        name: readable.
        color: sRGB, 0-255.
        term: what it is in SNOMED CT.
        layer: the label map it belongs to.
        value: its value in that label map.
        codes: values in the segments' map, or for a tree in the trees' map, that make it up.
    """

    key: str
    name: str
    color: tuple[int, int, int]
    term: Term
    layer: Layer
    value: int
    codes: tuple[int, ...]

    @property
    def is_tree(self) -> bool:
        return self.layer is Layer.TREES

    @property
    def code(self) -> int | None:
        """1-21 for a structure, None for a lobe or a lung."""
        return {Layer.SEGMENTS: self.value, Layer.TREES: self.value + 18}.get(self.layer)

    @property
    def table(self) -> np.ndarray:
        """Whether a code belongs to it: bool (19,), to be indexed with its source label map."""
        table = np.zeros(19, bool)
        table[list(self.codes)] = True
        return table


def _of_structure(structure: Structure) -> Part:
    layer = Layer.SEGMENTS if structure.tree is None else Layer.TREES
    value = structure.code if structure.tree is None else int(structure.tree)
    return Part(structure.key, structure.name, structure.color, term_of(structure), layer, value, (value,))


def _of_lobe(lobe: Lobe) -> Part:
    segments = segments_of_lobe(lobe)
    red, green, blue = np.mean([s.color for s in segments], axis=0).round().astype(int).tolist()
    codes = tuple(s.code for s in segments)
    key = f"{lobe.name.lower()}_lobe"
    return Part(key, lobe.label, (red, green, blue), term_of_lobe(lobe), Layer.LOBES, int(lobe), codes)


def _of_side(side: Side, value: int) -> Part:
    codes = tuple(s.code for s in SEGMENTS if s.side is side)
    name = f"{side.value.capitalize()} lung"
    return Part(f"{side.value}_lung", name, _LUNG_COLOR, term_of_lungs(side), Layer.SIDES, value, codes)


#: The 21 structures as parts, in the order of ``STRUCTURES``.
STRUCTURE_PARTS: tuple[Part, ...] = tuple(_of_structure(s) for s in STRUCTURES)
#: All there is to choose from.
PARTS: tuple[Part, ...] = (
    *STRUCTURE_PARTS,
    *(_of_lobe(lobe) for lobe in Lobe),
    *(_of_side(side, value) for value, side in enumerate(Side, start=1)),
    Part("lungs", "Both lungs", _LUNG_COLOR, term_of_lungs(None), Layer.LUNGS, 1, tuple(range(1, 19))),
)


def choose_parts(keys: Iterable[str] | None) -> tuple[Part, ...]:
    """The parts of these keys in the order of ``PARTS``; the 21 structures for None.

    Raises:
        LCTfoundError: a key is unknown, or there is none.
    """
    if keys is None:
        return STRUCTURE_PARTS
    wanted = {key.strip().lower() for key in keys}
    unknown = sorted(wanted - {part.key for part in PARTS})
    if unknown or not wanted:
        problem = f"There is no structure '{unknown[0]}'" if unknown else "No structure is chosen"
        raise LCTfoundError(f"{problem}; choose from {', '.join(part.key for part in PARTS)}.")
    return tuple(part for part in PARTS if part.key in wanted)


@dataclass(frozen=True)
class LabelLayer:
    """A label map of some parts of one layer, made plane by plane: a whole one takes as much memory as the CT.

    Attributes:
        layer: which label map.
        parts: what it holds.
        source: the segments' or the trees' label map (k, j, i).
        values: value of each code of the source, 0 where it is no part: uint8 (19,).
    """

    layer: Layer
    parts: tuple[Part, ...]
    source: np.ndarray
    values: np.ndarray

    def plane(self, k: int) -> np.ndarray:
        """uint8 (j, i)."""
        return self.values[self.source[k]]

    def whole(self) -> np.ndarray:
        """uint8 (k, j, i)."""
        return self.values[self.source]


def layers_of(
    parts: Sequence[Part], segments: np.ndarray, trees: np.ndarray, values: Mapping[str, int] | None = None
) -> list[LabelLayer]:
    """The label maps that hold the parts, in the order of ``Layer``.

    Args:
        parts: what to hold.
        segments, trees: the label maps (k, j, i).
        values: value by key; default: the parts' own.
    """
    layers = []
    for layer in Layer:
        held = tuple(part for part in parts if part.layer is layer)
        if held:
            table = np.zeros(19, np.uint8)
            for part in held:
                table[list(part.codes)] = part.value if values is None else values[part.key]
            layers.append(LabelLayer(layer, held, trees if layer is Layer.TREES else segments, table))
    return layers


def part_boxes(parts: Sequence[Part], segments: np.ndarray, trees: np.ndarray) -> dict[str, Box]:
    """Bounding boxes, by key, of the parts that have voxels."""
    found = {
        is_tree: dict(enumerate(ndimage.find_objects(array, max_label=18), start=1))
        for is_tree, array in ((False, segments), (True, trees))
    }
    boxes = {}
    for part in parts:
        pieces = [box for code in part.codes if (box := found[part.is_tree][code]) is not None]
        if pieces:
            boxes[part.key] = tuple(
                slice(min(s.start for s in along), max(s.stop for s in along)) for along in zip(*pieces, strict=True)
            )
    return boxes
