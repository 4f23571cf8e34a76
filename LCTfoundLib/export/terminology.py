"""SNOMED CT terms of the structures, as Slicer and DICOM SEG write them.

Only codes that a standard lists for exactly this structure are used: DICOM CID 6124/6127 (three of the segments), the
HL7 FHIR approach site codes (right S6), CID 7151 (lobes and lungs) and Slicer's own lists (trees). Every other segment
is a "Segment of lung" of its side, and its number stands in the segment's name; no code is made up.
"""

from __future__ import annotations

from dataclasses import dataclass

from LCTfoundLib.anatomy.structures import Lobe, Side, Structure, Tree

__all__ = ["Code", "Term", "term_of", "term_of_lobe", "term_of_lungs"]


@dataclass(frozen=True)
class Code:
    """A coded concept."""

    value: str = ""
    meaning: str = ""
    scheme: str = "SCT"

    def __str__(self) -> str:
        return f"{self.scheme}^{self.value}^{self.meaning}" if self.value else "^^"


@dataclass(frozen=True)
class Term:
    """Category, type and optional type modifier of a structure."""

    type: Code
    modifier: Code = Code()
    category: Code = Code("123037004", "Anatomical Structure")

    def slicer_entry(self) -> str:
        """Slicer's terminology entry: context~category~type~modifier~region context~region~region modifier."""
        context = "Segmentation category and type - 3D Slicer General Anatomy list"
        region = "Anatomic codes - DICOM master list"
        return f"{context}~{self.category}~{self.type}~{self.modifier}~{region}~^^~^^"


_SIDES = {Side.RIGHT: Code("24028007", "Right"), Side.LEFT: Code("7771000", "Left")}
_SEGMENT_OF_LUNG = Code("72674008", "Segment of lung")
#: The segments that have a verified code of their own, by structure key; the side is part of the meaning.
_SEGMENTS = {
    "right_s02": Code("3236000", "Posterior segment of right upper lobe"),
    "right_s03": Code("39743006", "Anterior segment of right upper lobe"),
    "right_s06": Code("3788008", "Superior segment of right lower lobe of lung"),
    "left_s03": Code("22270008", "Anterior segment of left upper lobe"),
}
_TREES = {
    Tree.AIRWAY: Code("110726009", "Trachea and bronchus"),
    Tree.ARTERY: Code("81040000", "Pulmonary artery"),
    Tree.VEIN: Code("122972007", "Pulmonary vein"),
}
_UPPER_LOBE = Code("45653009", "Upper lobe of lung")
_LOWER_LOBE = Code("90572001", "Lower lobe of lung")
_LOBES = {
    Lobe.RIGHT_UPPER: _UPPER_LOBE,
    Lobe.RIGHT_MIDDLE: Code("72481006", "Middle lobe of right lung"),
    Lobe.RIGHT_LOWER: _LOWER_LOBE,
    Lobe.LEFT_UPPER: _UPPER_LOBE,
    Lobe.LEFT_LOWER: _LOWER_LOBE,
}
_LUNG = Code("39607008", "Lung")
_BOTH_SIDES = Code("51440002", "Bilateral")


def term_of(structure: Structure) -> Term:
    """The term of one of the 21 structures."""
    if structure.tree is not None:
        return Term(_TREES[structure.tree])
    if structure.key in _SEGMENTS:
        return Term(_SEGMENTS[structure.key])
    return Term(_SEGMENT_OF_LUNG, _SIDES[structure.side] if structure.side else Code())


def term_of_lobe(lobe: Lobe) -> Term:
    """The term of a lobe; the middle lobe's code holds its side already."""
    return Term(_LOBES[lobe], Code() if lobe is Lobe.RIGHT_MIDDLE else _SIDES[lobe.side])


def term_of_lungs(side: Side | None) -> Term:
    """The term of one lung, of both for None."""
    return Term(_LUNG, _BOTH_SIDES if side is None else _SIDES[side])
