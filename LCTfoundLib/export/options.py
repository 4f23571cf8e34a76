"""What to export, and how, as a shell, a panel or a program chooses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.export.parts import Part, choose_parts

__all__ = ["MESH_FORMATS", "TRIANGLES", "ExportOptions", "Format", "Frame"]

#: Triangles of all surfaces together, unless chosen otherwise.
TRIANGLES = 600_000
_LEAST_TRIANGLES = 1_000


class Format(StrEnum):
    """What can be written."""

    SEG_NRRD = "seg.nrrd"
    NIFTI = "nifti"
    STL = "stl"
    OBJ = "obj"
    PLY = "ply"
    GLB = "glb"
    CSV = "csv"
    REPORT = "report"
    DICOM_SEG = "dicom-seg"

    @classmethod
    def parse(cls, names: Iterable[str]) -> tuple[Format, ...]:
        """Formats of their names, all for no name.

        Raises:
            LCTfoundError: if a name is unknown.
        """
        chosen = []
        for name in names:
            text = name.strip().lower().lstrip(".")
            text = _OTHER_NAMES.get(text, text)
            if text not in {f.value for f in cls}:
                raise LCTfoundError(f"There is no format '{name}'; choose from {', '.join(f.value for f in cls)}.")
            chosen.append(cls(text))
        return tuple(dict.fromkeys(chosen)) or tuple(cls)


_OTHER_NAMES = {
    "seg": "seg.nrrd",
    "nii": "nifti",
    "nii.gz": "nifti",
    "gltf": "glb",
    "html": "report",
    "table": "csv",
    "dicom": "dicom-seg",
    "dcm": "dicom-seg",
}
MESH_FORMATS = (Format.STL, Format.OBJ, Format.PLY, Format.GLB)


class Frame(StrEnum):
    """Axes of the numbers in STL, OBJ and PLY; glTF has axes of its own, and images carry their frame.

    x runs to the patient's left (L) or right (R), y to the back (P) or to the front (A), z to the head (S).
    """

    LPS = "LPS"
    RAS = "RAS"

    def from_lps(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 3) given in LPS, in this frame; a rotation by half a turn, so faces still look outward."""
        return points if self is Frame.LPS else points * (-1.0, -1.0, 1.0)


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        formats: empty for all.
        structures: keys of what models, segmentations and label maps hold: structures, lobes (``right_upper_lobe``)
            and lungs (``right_lung``, ``lungs``); None for the 21 structures. Table and report show the whole case.
        triangles: of all models together.
        frame: of the models.
        single_file: one STL, OBJ or PLY file with all models instead of one for each.
        glb_each: a GLB file for each model instead of one with all; not with ``single_file``.
        source_dicom: files or folders of the DICOM series that the CT was read from, for DICOM SEG.

    Raises:
        LCTfoundError: a structure is unknown, or there are too few triangles.
    """

    formats: tuple[Format, ...] = ()
    structures: tuple[str, ...] | None = None
    triangles: int = TRIANGLES
    frame: Frame = Frame.LPS
    single_file: bool = False
    glb_each: bool = False
    source_dicom: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        choose_parts(self.structures)
        if self.triangles < _LEAST_TRIANGLES:
            raise LCTfoundError(f"{self.triangles} triangles are too few; choose at least {_LEAST_TRIANGLES}.")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ExportOptions:
        """Options of plain values by name, such as a JSON request holds; None and what is missing is the default.

        Raises:
            LCTfoundError: an option, a format, a structure or a frame is unknown, or a value is of the wrong kind.
        """
        given = {name: value for name, value in values.items() if value is not None}
        for name in given:
            if name not in _PARSERS:
                raise LCTfoundError(f"There is no export option '{name}'; choose from {', '.join(_PARSERS)}.")
        try:
            return cls(**{name: _PARSERS[name](value) for name, value in given.items()})
        except (TypeError, ValueError) as error:
            raise LCTfoundError(f"The export options {given} are not understood ({error}); correct them.") from error

    @property
    def wanted(self) -> tuple[Format, ...]:
        """The formats to write; :meth:`requires` tells whether it is an error when one cannot be."""
        return self.formats or tuple(Format)

    def requires(self, format: Format) -> bool:
        """Whether this format was asked for by name."""
        return format in self.formats

    @property
    def parts(self) -> tuple[Part, ...]:
        """What models, segmentations and label maps hold."""
        return choose_parts(self.structures)


def _formats(values: Iterable[str]) -> tuple[Format, ...]:
    names = tuple(_names(values))
    return Format.parse(names) if names else ()


def _names(values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise TypeError(f"'{values}' is no list")
    return tuple(str(value) for value in values)


def _frame(value: str) -> Frame:
    if str(value).upper() not in set(Frame):
        raise LCTfoundError(f"There is no frame '{value}'; choose from {', '.join(Frame)}.")
    return Frame(str(value).upper())


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"'{value}' is neither true nor false")
    return value


_PARSERS: dict[str, Any] = {
    "formats": _formats,
    "structures": _names,
    "triangles": int,
    "frame": _frame,
    "single_file": _flag,
    "glb_each": _flag,
    "source_dicom": lambda values: tuple(Path(value) for value in _names(values)),
}
