"""Slicer's translations where there is a Slicer, else the text itself: the set-up's logic also runs without one."""

from __future__ import annotations

__all__ = ["tr"]

try:
    from slicer.i18n import tr
except ImportError:

    def tr(text: str) -> str:
        """The text as it is."""
        return text
