"""Slice pictures: the CT in a lung window with the segments tinted, their borders drawn and the trees filled."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from LCTfoundLib.anatomy.structures import SEGMENTS, STRUCTURES
from LCTfoundLib.volume import Volume

__all__ = ["Picture", "Plane", "SlicePainter", "annotate", "draw_text"]

#: HU shown black and white: the usual lung window, level -500, width 1600.
_WINDOW = (-1300.0, 300.0)
_TINT, _TREE_TINT = 0.34, 0.85
_MARGIN = 12.0
_BAR = 50.0

#: sRGB of segment codes 0-18 and of tree codes 0-3.
_SEGMENT_COLORS = np.array([(0, 0, 0), *(s.color for s in SEGMENTS)], np.float32)
_TREE_COLORS = np.array([(0, 0, 0), (120, 220, 255), (40, 120, 235), (235, 60, 60)], np.float32)
assert len(STRUCTURES) == len(_SEGMENT_COLORS) + len(_TREE_COLORS) - 2


class Plane(Enum):
    """Anatomical planes; the value is the array axis that is cut."""

    AXIAL = 0
    CORONAL = 1
    SAGITTAL = 2


@dataclass(frozen=True)
class Picture:
    """An image with its caption."""

    image: Image.Image
    caption: str


class SlicePainter:
    """Paints slices of one case.

    Args:
        ct: HU.
        segments: codes 1-18, same grid.
        trees: codes 1-3, same grid.
        size: longer side of a picture in pixels.

    A grid that is not canonical is turned to the nearest anatomical axes first; an oblique rest remains.
    """

    def __init__(self, ct: Volume, segments: Volume, trees: Volume, size: int = 620) -> None:
        self._grid = ct.to_canonical()
        self._ct, self._segments, self._trees = (
            self._grid.array,
            segments.to_canonical().array,
            trees.to_canonical().array,
        )
        self._spacing = np.array(self._grid.spacing[::-1])
        self._size = size
        found = ndimage.find_objects((self._segments > 0).view(np.uint8))
        self._box = found[0] if found else tuple(slice(0, n) for n in self._segments.shape)

    def levels(self, plane: Plane, count: int) -> list[int]:
        """Indices of ``count`` slices spread over the lungs, the outermost 12 % left out."""
        box = self._box[plane.value]
        shares = np.linspace(0.12, 0.88, count) if count > 1 else np.array([0.5])
        return [int(round(box.start + s * (box.stop - 1 - box.start))) for s in shares]

    def sagittal_levels(self, count: int) -> list[int]:
        """Sagittal indices, ``count`` spread over the right lung and then over the left, of the lungs present."""
        levels = []
        for low, high in ((1, 10), (11, 18)):
            columns = np.flatnonzero(((self._segments >= low) & (self._segments <= high)).any(axis=(0, 1)))
            if len(columns):
                shares = (np.arange(count) + 1) / (count + 1)
                levels += [int(round(columns[0] + s * (columns[-1] - columns[0]))) for s in shares]
        return levels

    def paint(self, plane: Plane, index: int, overlay: bool = True) -> Picture:
        """One slice, cropped to the lungs, at equal scale in both directions."""
        rows, columns = (axis for axis in range(3) if axis != plane.value)
        margins = {axis: int(np.ceil(_MARGIN / self._spacing[axis])) for axis in (rows, columns)}
        at: list[Any] = [slice(None)] * 3
        at[plane.value] = index
        for axis in (rows, columns):
            box = self._box[axis]
            at[axis] = slice(max(0, box.start - margins[axis]), box.stop + margins[axis])
        gray, segments, trees = (np.asarray(a[tuple(at)]) for a in (self._ct, self._segments, self._trees))
        if plane is not Plane.AXIAL:  # superior belongs at the top
            gray, segments, trees = gray[::-1], segments[::-1], trees[::-1]
        millimeters = np.array(gray.shape) * self._spacing[[rows, columns]]
        scale = self._size / max(self._extent().max(), 1.0)
        shape = np.maximum(np.round(millimeters * scale).astype(int), 1)
        image = _blend(gray, segments, trees, shape, overlay)
        if overlay:
            _name_segments(image, _enlarge(segments, shape))
        annotate(image, plane, scale)
        return Picture(image, f"{plane.name.capitalize()}, {self._position(plane, index)}")

    def _extent(self) -> np.ndarray:
        """Size of the lungs with margin in mm along the three axes."""
        sizes = np.array([b.stop - b.start for b in self._box])
        return sizes * self._spacing + 2 * _MARGIN

    def _position(self, plane: Plane, index: int) -> str:
        """LPS coordinate of the slice's middle across the plane."""
        place = [(n - 1) / 2 for n in self._ct.shape]
        place[plane.value] = index
        lps = self._grid.world_from_index(np.array(place))
        axis = 2 - plane.value
        return f"{'xyz'[axis]} = {lps[axis]:.0f} mm"


def _blend(gray: np.ndarray, segments: np.ndarray, trees: np.ndarray, shape: np.ndarray, overlay: bool) -> Image.Image:
    """Slice at display size; labels are enlarged without interpolation, so what is shown is what was segmented."""
    low, high = _WINDOW
    shown = np.clip((gray.astype(np.float32) - low) / (high - low), 0, 1)
    base = Image.fromarray((255 * shown).astype(np.uint8)).resize(
        (int(shape[1]), int(shape[0])), Image.Resampling.BICUBIC
    )
    color = np.repeat(np.asarray(base, np.float32)[:, :, None], 3, axis=2)
    if overlay:
        label, tree = (_enlarge(a, shape) for a in (segments, trees))
        inside = label > 0
        color[inside] += _TINT * (_SEGMENT_COLORS[label[inside]] - color[inside])
        border = inside & _borders(label)
        color[border] = _SEGMENT_COLORS[label[border]]
        in_tree = tree > 0
        color[in_tree] += _TREE_TINT * (_TREE_COLORS[tree[in_tree]] - color[in_tree])
    return Image.fromarray(np.clip(color, 0, 255).astype(np.uint8))


def _enlarge(labels: np.ndarray, shape: np.ndarray) -> np.ndarray:
    rows = np.minimum((np.arange(shape[0]) + 0.5) * labels.shape[0] / shape[0], labels.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(shape[1]) + 0.5) * labels.shape[1] / shape[1], labels.shape[1] - 1).astype(int)
    return labels[rows[:, None], columns[None, :]]


def _borders(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbor has another label, and the outer rim."""
    border = np.zeros(labels.shape, bool)
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    border[:-1] |= labels[:-1] != labels[1:]
    border[:, 1:] |= (labels[:, 1:] != labels[:, :-1]) & (labels[:, :-1] == 0)
    border[1:] |= (labels[1:] != labels[:-1]) & (labels[:-1] == 0)
    return border


def _name_segments(image: Image.Image, labels: np.ndarray) -> None:
    """Short names at the innermost pixel of the regions that have room for one."""
    for segment in SEGMENTS:
        seen = labels == segment.code
        if seen.sum() < 900:
            continue
        depth = ndimage.distance_transform_edt(np.pad(seen, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        if depth[y, x] >= 15:
            draw_text(image, (int(x), int(y)), segment.short, 19, "mm")


def annotate(image: Image.Image, plane: Plane, scale: float) -> None:
    """Patient sides at the edges and a 50 mm bar."""
    width, height = image.size
    left, right = ("A", "P") if plane is Plane.SAGITTAL else ("R", "L")
    draw_text(image, (8, height // 2), left, 30, "lm")
    draw_text(image, (width - 8, height // 2), right, 30, "rm")
    draw = ImageDraw.Draw(image)
    end, y = width - 14, height - 12
    start = end - int(round(_BAR * scale))
    draw.rectangle((start - 1, y - 2, end + 1, y + 2), fill=(0, 0, 0))
    draw.rectangle((start, y - 1, end, y + 1), fill=(255, 255, 255))
    draw_text(image, ((start + end) // 2, y - 6), "50 mm", 19, "mb")


def draw_text(
    image: Image.Image,
    at: tuple[int, int],
    text: str,
    size: int,
    anchor: str,
    color: tuple[int, int, int] = (255, 255, 255),
    outline: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Outlined text that is readable on light and dark."""
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text(at, text, fill=color, font=font, anchor=anchor, stroke_width=2, stroke_fill=outline)
