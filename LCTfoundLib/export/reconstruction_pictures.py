"""Pictures of a reconstruction: each slice as it was, as it is now, what differs, and how sure the method is.

Differences and expected errors have one fixed scale of 200 HU: colors of two reports can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from LCTfoundLib.anatomy.body import body_mask
from LCTfoundLib.export.slices import Picture, Plane, annotate, draw_text
from LCTfoundLib.volume import Volume

__all__ = [
    "LUNG",
    "SOFT_TISSUE",
    "Curves",
    "ReconstructionPainter",
    "Window",
    "residual_plot",
    "side_by_side",
]

#: HU shown in full color.
_COLOR_HU = 200.0
#: Colors of the differences from -1 to 1, black where there is none, and of the expected errors from 0 to 1.
_DIFFERENCE = np.array([(120, 210, 255), (40, 110, 235), (0, 0, 0), (225, 70, 40), (255, 210, 110)], np.float32)
_ERROR = np.array([(0, 0, 0), (80, 18, 110), (190, 50, 85), (245, 130, 30), (250, 240, 150)], np.float32)
#: Of the curves of a plot.
_CURVES = ((11, 93, 122), (200, 80, 20), (120, 120, 120))
_MARGIN_MM = 10.0
_BAR_HEIGHT = 12


@dataclass(frozen=True)
class Window:
    """Which HU are shown black and white."""

    low: float
    high: float
    name: str


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves over a common axis, from zero up, for reports and for the panel's own plots.

    Attributes:
        title: what they are, in a word or two.
        caption: the same in a sentence.
        x: rising, (N,).
        values: of at least 0, (N,), by name; an empty name is not shown.
        axis: name of the axis.
        unit: of the values, for the axis.
    """

    title: str
    caption: str
    x: Sequence[float]
    values: Mapping[str, Sequence[float] | np.ndarray]
    axis: str
    unit: str = ""

    @property
    def picture(self) -> Picture:
        return Picture(_line_plot(self), self.caption)

    def told(self) -> dict[str, Any]:
        """For JSON."""
        values = {name: [float(value) for value in curve] for name, curve in self.values.items()}
        kept = {"title": self.title, "caption": self.caption, "axis": self.axis, "unit": self.unit}
        return kept | {"x": [float(place) for place in self.x], "values": values}


LUNG = Window(-1300.0, 300.0, "lung window")
SOFT_TISSUE = Window(-160.0, 240.0, "soft-tissue window")


class ReconstructionPainter:
    """Paints slices of volumes on one grid.

    Args:
        image: the reconstruction, HU.
        mark: drawn into each of its pictures.
        size: longer side of a picture in pixels.
    """

    def __init__(self, image: Volume, mark: str, size: int = 420) -> None:
        self._image, self._mark = image, mark
        self._spacing = image.spacing[:2]
        rows, columns = self._box()
        self._rows, self._columns = rows, columns
        width = (columns.stop - columns.start) * self._spacing[0]
        height = (rows.stop - rows.start) * self._spacing[1]
        self._scale = size / max(width, height)
        self._shape = max(1, round(width * self._scale)), max(1, round(height * self._scale))

    def levels(self, count: int = 3) -> list[int]:
        """Indices of slices spread over the stack, from the top down."""
        total = len(self._image.array)
        spread = (np.arange(count) + 0.5) / count if total >= count else (np.arange(total) + 0.5) / total
        return sorted({int(share * total) for share in spread}, reverse=True)

    def position(self, k: int) -> str:
        """Where a slice lies."""
        middle = [(n - 1) / 2 for n in self._image.shape[1:]]
        return f"z = {self._image.world_from_index(np.array([k, *middle]))[2]:.1f} mm"

    def gray(self, volume: Volume, k: int, window: Window, caption: str, marked: bool = False) -> Picture:
        """A slice in a window, with the patient's sides and a scale."""
        shown = (self._cut(volume, k) - window.low) / (window.high - window.low)
        picture = self._enlarged(np.repeat((255 * shown.clip(0, 1))[..., None], 3, axis=-1))
        annotate(picture, Plane.AXIAL, self._scale)
        if marked:
            self._write_mark(picture)
        return Picture(picture, caption)

    def difference(self, volume: Volume, other: Volume, k: int, caption: str) -> Picture:
        """Reconstruction minus the other in two colors."""
        apart = (self._cut(volume, k) - self._cut(other, k)) / _COLOR_HU
        picture = self._enlarged(_colored(apart / 2 + 0.5, _DIFFERENCE))
        _color_bar(picture, _DIFFERENCE, f"-{_COLOR_HU:.0f}", f"+{_COLOR_HU:.0f} HU")
        return Picture(picture, caption)

    def expected_error(self, volume: Volume, k: int, caption: str) -> Picture:
        """Half of the width of the interval of each pixel."""
        picture = self._enlarged(_colored(self._cut(volume, k) / _COLOR_HU, _ERROR))
        _color_bar(picture, _ERROR, "0", f"{_COLOR_HU:.0f} HU")
        self._write_mark(picture)
        return Picture(picture, caption)

    def _box(self) -> tuple[slice, slice]:
        """Rows and columns with the body in some slices, and a margin; all of them where there is no body."""
        array = self._image.array
        some = array[:: max(1, len(array) // 9)]
        seen = np.any([body_mask(np.asarray(image), self._spacing[0]) for image in some], axis=0)
        box = []
        for axis, step in ((1, self._spacing[1]), (0, self._spacing[0])):
            hit = np.flatnonzero(seen.any(axis=axis))
            first, last = (int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, seen.shape[1 - axis])
            margin = round(_MARGIN_MM / step)
            box.append(slice(max(0, first - margin), min(seen.shape[1 - axis], last + margin)))
        return box[0], box[1]

    def _cut(self, volume: Volume, k: int) -> np.ndarray:
        return np.asarray(volume.array[k, self._rows, self._columns], np.float32)

    def _enlarged(self, colors: np.ndarray) -> Image.Image:
        picture = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8))
        return picture.resize(self._shape, Image.Resampling.BICUBIC)

    def _write_mark(self, picture: Image.Image) -> None:
        draw_text(picture, (8, 8), self._mark, max(10, picture.width // 21), "lt", (255, 220, 120))


def _colored(shares: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Colors of shares 0..1 of a table, linearly between its entries."""
    place = shares.clip(0, 1) * (len(table) - 1)
    return np.stack([np.interp(place, np.arange(len(table)), table[:, channel]) for channel in range(3)], axis=-1)


def _color_bar(picture: Image.Image, table: np.ndarray, low: str, high: str) -> None:
    """In the lower right corner, where a picture of the CT has its scale."""
    width, right, bottom = picture.width * 2 // 5, picture.width - 10, picture.height - 10
    bar = _colored(np.linspace(0, 1, width)[None].repeat(_BAR_HEIGHT, axis=0), table)
    corner = right - width, bottom - _BAR_HEIGHT
    picture.paste(Image.fromarray(bar.astype(np.uint8)), corner)
    ImageDraw.Draw(picture).rectangle((*corner, right - 1, bottom - 1), outline=(200, 200, 200))
    draw_text(picture, (corner[0], corner[1] - 4), low, 14, "lb")
    draw_text(picture, (right, corner[1] - 4), high, 14, "rb")


def side_by_side(rows: Mapping[str, Sequence[Picture]], heading: Iterable[str]) -> Image.Image:
    """All pictures with their captions under some lines of text: one picture to look at."""
    lines, gap, line = list(heading), 8, 20
    pictures = [picture for row in rows.values() for picture in row]
    width, height = pictures[0].image.size
    across = max(len(row) for row in rows.values())
    top = gap + line * len(lines)
    sheet = Image.new("RGB", (gap + across * (width + gap), top + len(rows) * (height + 2 * line + gap) + gap))
    for number, text in enumerate(lines):
        draw_text(sheet, (gap, gap + number * line), text, 14, "lt", (255, 220, 120))
    for down, (name, row) in enumerate(rows.items()):
        y = top + gap + down * (height + 2 * line + gap)
        draw_text(sheet, (gap, y), name, 15, "lt")
        for number, picture in enumerate(row):
            x = gap + number * (width + gap)
            sheet.paste(picture.image, (x, y + line))
            draw_text(sheet, (x, y + line + height + 3), picture.caption, 13, "lt")
    return sheet


def residual_plot(residual: np.ndarray, slices: Sequence[int]) -> Image.Image:
    """The share of the measurements that each slice leaves unexplained.

    Args:
        residual: shares, (N,).
        slices: their numbers.
    """
    return _line_plot(Curves("", "", slices, {"": 100 * residual}, "slice", " %"))


def _line_plot(shown: Curves) -> Image.Image:
    x, curves = shown.x, shown.values
    plot = Image.new("RGB", (1040, 240), (255, 255, 255))
    draw = ImageDraw.Draw(plot)
    left, right, top, bottom = 90, 1020, 16, 190
    highest = _round_up(max(float(np.max(values)) for values in curves.values()))
    first, last = min(x), max(x)

    def place(number: float, value: float) -> tuple[float, float]:
        across = (left + right) / 2 if first == last else left + (number - first) / (last - first) * (right - left)
        return across, bottom - value / highest * (bottom - top)

    for share in (0.0, 0.5, 1.0):
        y = place(first, share * highest)[1]
        draw.line((left, y, right, y), fill=(223, 228, 234))
        _label(plot, (left - 8, int(y)), f"{share * highest:g}{shown.unit}", "rm")
    for number in dict.fromkeys((first, (first + last) / 2, last)):
        _label(plot, (int(place(number, 0)[0]), bottom + 8), f"{number:.3g}", "mt")
    _label(plot, ((left + right) // 2, 238), shown.axis, "mb")
    for place_of_name, (name, values) in enumerate(curves.items()):
        color = _CURVES[place_of_name % len(_CURVES)]
        points = [place(number, float(value)) for number, value in zip(x, values, strict=True)]
        if len(points) > 1:
            draw.line(points, fill=color, width=2)
        if len(points) <= 60:
            for across, y in points:
                draw.ellipse((across - 3, y - 3, across + 3, y + 3), fill=color)
        _label(plot, (right - 10, top + 4 + 18 * place_of_name), name, "rt", color)
    return plot


def _round_up(value: float) -> float:
    """The next of 1, 2 and 5 and their tens; of nothing a thousandth."""
    ladder = [step * 10.0**power for power in range(-3, 9) for step in (1, 2, 5)]
    return next((step for step in ladder if step >= value), value)


def _label(
    plot: Image.Image, at: tuple[int, int], text: str, anchor: str, color: tuple[int, int, int] = (60, 72, 88)
) -> None:
    draw_text(plot, at, text, 14, anchor, color, (255, 255, 255))
