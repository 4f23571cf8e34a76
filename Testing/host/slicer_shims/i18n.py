"""`slicer.i18n`: the host speaks English, so a text is its own translation."""

from __future__ import annotations

from pathlib import Path

__all__ = ["getContext", "tr", "translate"]


def getContext(sourceFile: str) -> str:
    """Name under which the texts of a Python file are found: the file's name without its ending."""
    return Path(sourceFile).stem


def tr(text: str) -> str:
    return text


def translate(context: str, text: str) -> str:
    """`context` names the class or file that a text belongs to, such as "qSlicerAbstractCoreModule"."""
    return text
