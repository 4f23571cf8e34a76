"""Traffic lights as painted signs: each has a shape of its own and a word beside it, color never tells alone."""

from __future__ import annotations

from typing import Any

import qt

from LCTfoundSlicer.setup_checks import Light
from LCTfoundSlicer.translation import tr as _

__all__ = ["lightIcon", "lightPixmap", "lightWord"]

#: Okabe and Ito's colors, which people with any color vision tell apart.
_COLORS = {Light.GOOD: "#009E73", Light.UNKNOWN: "#808080", Light.WARNING: "#E69F00", Light.PROBLEM: "#D55E00"}
#: Lines of each sign in a square of 16: check mark, dash, exclamation mark, cross.
_SIGNS = {
    Light.GOOD: ((4.5, 8.5, 7, 11), (7, 11, 11.5, 5.5)),
    Light.UNKNOWN: ((5, 8, 11, 8),),
    Light.WARNING: ((8, 4, 8, 9), (8, 11.8, 8, 12)),
    Light.PROBLEM: ((5.2, 5.2, 10.8, 10.8), (5.2, 10.8, 10.8, 5.2)),
}


def lightWord(light: Light) -> str:
    """The light in a word."""
    return {
        Light.GOOD: _("good"),
        Light.UNKNOWN: _("not checked"),
        Light.WARNING: _("attention"),
        Light.PROBLEM: _("problem"),
    }[light]


def lightPixmap(light: Light, size: int = 16) -> Any:
    """A circle with the sign of the light, ``size`` pixels wide."""
    pixmap = qt.QPixmap(size, size)
    pixmap.fill(qt.QColor(0, 0, 0, 0))
    painter = qt.QPainter(pixmap)
    painter.setRenderHint(qt.QPainter.Antialiasing, True)
    painter.scale(size / 16, size / 16)
    painter.setPen(qt.QPen(qt.QColor(_COLORS[light])))
    painter.setBrush(qt.QBrush(qt.QColor(_COLORS[light])))
    painter.drawEllipse(1, 1, 14, 14)
    pen = qt.QPen(qt.QColor("#ffffff"))
    pen.setWidthF(2.0)
    pen.setCapStyle(qt.Qt.RoundCap)
    painter.setPen(pen)
    for x0, y0, x1, y1 in _SIGNS[light]:
        painter.drawLine(qt.QPointF(x0, y0), qt.QPointF(x1, y1))
    painter.end()
    return pixmap


def lightIcon(light: Light) -> Any:
    """The same as an icon."""
    return qt.QIcon(lightPixmap(light, 32))
