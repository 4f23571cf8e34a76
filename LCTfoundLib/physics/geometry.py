"""Where the rays of a scan run: the image's grid, and parallel and fan beams around its middle.

The middle of the grid is the isocenter; x runs to the right and y upwards, as the image is seen (row 0 at the top).
A ray is the line of all points with ``x cos(normal) + y sin(normal) = distance``; its direction is (sin, -cos), so that
the rays of angle 0 run down the columns. That is the convention of scikit-image's ``radon``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Self

import numpy as np

from LCTfoundLib.errors import UnsuitableProjections

__all__ = ["Beam", "Detector", "FanBeam", "ImageGrid", "ParallelBeam"]

#: No list of angles in radians goes this far; one in degrees soon does.
_FARTHEST_ANGLE = 20 * math.pi
#: A detector that ends a hair before the image's circle covers it (share of the radius).
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ImageGrid:
    """The pixels of a slice, square, around the isocenter.

    Attributes:
        rows, columns: of the image.
        pixel_mm: edge of a pixel.

    Raises:
        UnsuitableProjections: no such grid.
    """

    rows: int
    columns: int
    pixel_mm: float

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1 or not _is_length(self.pixel_mm):
            raise UnsuitableProjections(
                f"{self.rows} x {self.columns} pixels of {self.pixel_mm} mm are no image; give rows, columns and the "
                "pixel size in mm, all above 0."
            )

    @property
    def pixels(self) -> int:
        return self.rows * self.columns

    @property
    def circle_mm(self) -> float:
        """Radius of the largest circle in the image: what a CT shows."""
        return min(self.rows, self.columns) * self.pixel_mm / 2

    @property
    def corner_mm(self) -> float:
        """Distance of the image's corners from the isocenter."""
        return math.hypot(self.rows, self.columns) * self.pixel_mm / 2

    @property
    def x_mm(self) -> np.ndarray:
        """Of the columns' middles, float64 (columns,)."""
        return (np.arange(self.columns) - (self.columns - 1) / 2) * self.pixel_mm

    @property
    def y_mm(self) -> np.ndarray:
        """Of the rows' middles, float64 (rows,), falling."""
        return ((self.rows - 1) / 2 - np.arange(self.rows)) * self.pixel_mm


@dataclass(frozen=True)
class Beam:
    """What parallel and fan beams share: views, each of equally spaced detector channels.

    Attributes:
        angles: of the views, radians, counterclockwise; any sequence.
        detectors: channels.
        pitch_mm: from channel to channel, on the detector.
        offset: the central ray falls on channel ``(detectors - 1) / 2 + offset``; 0.25 is the quarter shift that
            makes opposite views interleave.

    Raises:
        UnsuitableProjections: no such beam.
    """

    angles: tuple[float, ...]
    detectors: int
    pitch_mm: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "angles", _checked_angles(self.angles))
        if self.detectors < 1 or not _is_length(self.pitch_mm):
            raise UnsuitableProjections(
                f"{self.detectors} channels {self.pitch_mm} mm apart are no detector; give both above 0."
            )
        if not abs(self.offset) < self.detectors / 2:
            raise UnsuitableProjections(
                f"A detector offset of {self.offset} channels puts the central ray beside the detector; give it in "
                f"channels, less than half of the {self.detectors}."
            )

    @property
    def views(self) -> int:
        return len(self.angles)

    @property
    def shape(self) -> tuple[int, int]:
        """(views, detectors), of a sinogram."""
        return self.views, self.detectors

    @property
    def turn(self) -> float:
        """The angle after which the rays repeat: pi for parallel beams, 2 pi for fans."""
        raise NotImplementedError

    @property
    def channels_mm(self) -> np.ndarray:
        """Places of the channels on the detector from where the central ray falls, float64 (detectors,)."""
        return (np.arange(self.detectors) - (self.detectors - 1) / 2 - self.offset) * self.pitch_mm

    @property
    def field_mm(self) -> float:
        """Radius of the circle that every view sees whole."""
        half = (self.detectors / 2 - abs(self.offset)) * self.pitch_mm
        return self._distance(half)

    def rays(self, views: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Normal's angle (radians) and distance from the isocenter (mm) of the rays, float64 (views, detectors)."""
        raise NotImplementedError

    def _distance(self, channel_mm: float) -> float:
        """From the isocenter to the ray that falls there on the detector, mm."""
        raise NotImplementedError

    def sparse(self, views: int) -> Self:
        """The same beam with ``views`` evenly spaced ones, from angle 0 over a half (parallel) or full turn (fan)."""
        if views < 1:
            raise UnsuitableProjections(f"{views} views are no scan; ask for at least one.")
        return replace(self, angles=tuple(self.turn * view / views for view in range(views)))

    def subset(self, views: Iterable[int]) -> Self:
        """The same beam with some of its views, by index; take those of the sinogram too."""
        chosen = list(views)
        if not chosen or not all(0 <= view < self.views for view in chosen):
            raise UnsuitableProjections(f"The chosen views are not among the {self.views} of the scan; check them.")
        return replace(self, angles=tuple(self.angles[view] for view in chosen))

    def covers(self, grid: ImageGrid) -> bool:
        """Whether the detector sees the image's circle whole in every view."""
        return self.field_mm >= grid.circle_mm * (1 - _TOLERANCE)

    def check(self, grid: ImageGrid, truncated: bool = False) -> None:
        """Check that the beam can scan the image.

        Args:
            truncated: let a detector pass that does not cover the image's circle.

        Raises:
            UnsuitableProjections: it cannot.
        """
        if not truncated and not self.covers(grid):
            raise UnsuitableProjections(
                f"The detector sees a circle of {2 * self.field_mm:.0f} mm and the image's measures "
                f"{2 * grid.circle_mm:.0f} mm; use a smaller image or a wider detector, or allow truncation if the "
                "patient lies inside of the smaller circle."
            )

    @cached_property
    def view_weights(self) -> np.ndarray:
        """The angle that each view stands for: half of the gaps to its neighbors, float64 (views,); the turn in all.

        Missing views and uneven angles are made up for so far as their neighbors can.
        """
        order, gaps = self.gaps()
        weights = np.empty(self.views)
        weights[order] = (gaps + np.roll(gaps, 1)) / 2
        return weights

    @property
    def widest_gap(self) -> float:
        """The widest angle between neighboring views, radians; the turn for a single one."""
        return float(self.gaps()[1].max())

    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """Order of the views by angle within a turn, and the gap after each of them."""
        within = np.mod(np.asarray(self.angles), self.turn)
        # A rounding error below a whole turn is a whole turn, not the other end of it.
        within[self.turn - within < 1e-9] = 0.0
        order = np.argsort(within, kind="stable")
        return order, np.diff(within[order], append=within[order[0]] + self.turn)


@dataclass(frozen=True)
class ParallelBeam(Beam):
    """Parallel rays: what most simulations use, and what a fan is rebinned to."""

    @classmethod
    def around(cls, grid: ImageGrid, views: int) -> ParallelBeam:
        """Channels of a pixel's width over the image's diagonal, ``views`` evenly spaced angles over a half turn."""
        channels = math.ceil(2 * grid.corner_mm / grid.pixel_mm)
        return cls((0.0,), channels, grid.pixel_mm).sparse(views)

    @property
    def turn(self) -> float:
        return math.pi

    def rays(self, views: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        angles = np.asarray(self.angles)[views, None]
        normals, distances = np.broadcast_arrays(angles, self.channels_mm)
        return normals, distances

    def _distance(self, channel_mm: float) -> float:
        return channel_mm


class Detector(StrEnum):
    """The form of a fan's detector."""

    ARC = "arc"  # around the source; channels at equal angles
    FLAT = "flat"


@dataclass(frozen=True)
class FanBeam(Beam):
    """Rays from a source that circles the isocenter; at angle 0 it is above the image.

    Attributes:
        source_isocenter_mm, source_detector_mm: distances along the central ray.
        detector: its form; the pitch is along it.
    """

    source_isocenter_mm: float = 595.0
    source_detector_mm: float = 1085.6
    detector: Detector = Detector.ARC

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "detector", Detector(self.detector))
        near, far = self.source_isocenter_mm, self.source_detector_mm
        if not (_is_length(near) and _is_length(far) and near < far):
            raise UnsuitableProjections(
                f"The source cannot be {near} mm from the isocenter and {far} mm from the detector; the isocenter lies "
                "between them."
            )
        if not np.abs(self.fan_angles).max() < math.pi / 2:
            raise UnsuitableProjections(
                "The detector reaches around the source; check its channels, pitch and distance."
            )

    @classmethod
    def siemens(cls, views: int = 1152) -> FanBeam:
        """Somatom Definition AS+: 736 channels of 1.2858 mm on an arc, a field of 502 mm.

        The fan of the public low-dose data set (Moen et al., Med. Phys. 48 (2021) 902), one focal spot, 1152 views.
        """
        return cls((0.0,), 736, 1.2858, source_isocenter_mm=595.0, source_detector_mm=1085.6).sparse(views)

    @classmethod
    def ge(cls, views: int = 984) -> FanBeam:
        """LightSpeed: 888 channels of 1.0239 mm on an arc with a shift of 1.25, 984 views, a field of 497 mm.

        Wang et al., IEEE T-MI 25 (2006) 1272.
        """
        return cls((0.0,), 888, 1.0239, 1.25, source_isocenter_mm=541.0, source_detector_mm=949.075).sparse(views)

    @property
    def turn(self) -> float:
        return 2 * math.pi

    @property
    def fan_angles(self) -> np.ndarray:
        """Of the channels from the central ray, radians, float64 (detectors,)."""
        along = self.channels_mm / self.source_detector_mm
        return along if self.detector is Detector.ARC else np.arctan(along)

    def rays(self, views: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        fan = self.fan_angles
        normals = np.asarray(self.angles)[views, None] + fan
        return normals, np.broadcast_to(self.source_isocenter_mm * np.sin(fan), normals.shape)

    def check(self, grid: ImageGrid, truncated: bool = False) -> None:
        gantry = min(self.source_isocenter_mm, self.source_detector_mm - self.source_isocenter_mm)
        if grid.corner_mm >= gantry:
            raise UnsuitableProjections(
                f"The image reaches {grid.corner_mm:.0f} mm from the isocenter and the gantry begins at {gantry:.0f} "
                "mm; use a smaller image, or give the scanner's distances in mm."
            )
        super().check(grid, truncated)

    def _distance(self, channel_mm: float) -> float:
        along = channel_mm / self.source_detector_mm
        return self.source_isocenter_mm * math.sin(along if self.detector is Detector.ARC else math.atan(along))


def _checked_angles(angles: Sequence[float]) -> tuple[float, ...]:
    try:
        found = tuple(float(angle) for angle in angles)
    except (TypeError, ValueError):
        found = ()
    if not found:
        raise UnsuitableProjections("The scan has no angles; give one in radians for each view.")
    if not all(map(math.isfinite, found)):
        raise UnsuitableProjections("Some angles are no numbers; give one in radians for each view.")
    if max(map(abs, found)) > _FARTHEST_ANGLE:
        raise UnsuitableProjections(
            f"Angles up to {max(found, key=abs):.0f} look like degrees; give them in radians (numpy.radians)."
        )
    return found


def _is_length(value: float) -> bool:
    return math.isfinite(value) and value > 0
