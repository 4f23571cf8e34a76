"""What every file says that no scanner made: what it is, by what, what for, and how it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from LCTfoundLib import __version__

__all__ = ["PRODUCT", "USE", "Nature", "marked", "plain_ascii"]

PRODUCT = "LCTfound"
USE = "Research use only; not a medical device, not for diagnosis."


class Nature(StrEnum):
    """What an image is that was computed from a patient's scan."""

    #: Of measured values alone.
    DERIVED = "derived image"
    #: Of a scan that was computed, not measured.
    SIMULATED = "simulated scan"
    #: With detail that a network may have made up.
    SYNTHETIC_DETAIL = "synthetic detail"

    @property
    def synthetic(self) -> bool:
        """Whether some or all of it is no representation of what was measured, as DICOM puts it."""
        return self is not Nature.DERIVED


def marked(notice: str, summary: str, told: Mapping[str, Any], synthetic: bool = True) -> dict[str, str]:
    """Short pairs for a person, and everything as JSON for a program; ASCII, as tEXt chunks of PNG want it.

    Args:
        notice: what the file is.
        summary: how it was made, in a line.
        told: everything, as JSON can hold it.
        synthetic: whether some or all of it was made up rather than measured.
    """
    pairs = {
        "Synthetic": "YES" if synthetic else "NO",
        "Description": notice,
        "Comment": f"{USE} {summary}",
        "Software": f"{PRODUCT} {__version__}",
        "Provenance": json.dumps(told),
    }
    return {key: plain_ascii(value) for key, value in pairs.items()}


def plain_ascii(text: str) -> str:
    """The text with a question mark for every other letter."""
    return text.encode("ascii", "replace").decode("ascii")
