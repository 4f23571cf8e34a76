"""Helical scans, and scans with a flying focal spot, as parallel beams of slices.

Single-slice rebinning (Noo, Defrise & Clackdoyle, Phys. Med. Biol. 44 (1999) 561): a ray that climbs counts for the
slice that it crosses where it is nearest to the axis, shortened to its path in the plane. All rays of that path, of
either direction and any turn, whose detector rows see the slice's thickness are averaged, so that no photon is thrown
away; each place of the focal spot is a scan of its own. The half-turn of parallel views that results needs no
short-scan weights and is what the networks were trained on.

What is lost: off the axis a ray meets a slice at another height, by up to the half cone angle times the distance; and
the denser sampling that a focal spot's jumps are made for is averaged, not interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import Detector, ParallelBeam

__all__ = ["ConeRows", "FocalSpot", "Rebinned", "ViewPlace", "rebin"]

#: Thinnest slice unless the detector's rows are thicker, mm.
_THINNEST_MM = 1.0
#: Share of a slice's thickness that must be seen along each of its rays, all directions and turns together.
_LEAST_SEEN = 0.5
#: Views between two neighbors of the same focal spot that are missing at most.
_MOST_MISSING = 3
#: A table at rest may tremble by so much.
_SAME_PLACE_MM = 0.1
_Hook = Callable[[float], object]


@dataclass(frozen=True)
class FocalSpot:
    """Where the focal spot is beside where the detector's center points to."""

    angle: float = 0.0
    height_mm: float = 0.0
    distance_mm: float = 0.0


@dataclass(frozen=True)
class ViewPlace:
    """Of a view: the angle (radians) and height (mm) that the detector's center points from, and the focal spot."""

    angle: float
    height_mm: float
    spot: FocalSpot = FocalSpot()


@dataclass(frozen=True)
class ConeRows:
    """A detector with rows, in the convention of ``FanBeam``; row 1 is the highest.

    Attributes:
        rows, columns: of it.
        row_mm, column_mm: from one to the next, on the detector.
        central_row, central_column: that the central ray falls on, counted from 1, in fractions.
        source_isocenter_mm, source_detector_mm: along the central ray.
        form: of the detector.
    """

    rows: int
    columns: int
    row_mm: float
    column_mm: float
    central_row: float
    central_column: float
    source_isocenter_mm: float
    source_detector_mm: float
    form: Detector = Detector.ARC

    @property
    def row_at_isocenter_mm(self) -> float:
        return self.row_mm * self.source_isocenter_mm / self.source_detector_mm


class _Rays:
    """The rays from one place of the focal spot to the detector's columns, in a view from angle 0 and height 0.

    Attributes:
        normal: angle of each, radians, float64 (columns,).
        distance_mm: from the axis, rising with the columns, (columns,).
        nearest: share of the way to the detector at which each is nearest to the axis, (columns,).
        in_plane: length in the plane as a share of the whole, (columns, rows).
    """

    def __init__(self, detector: ConeRows, spot: FocalSpot) -> None:
        near, far = detector.source_isocenter_mm, detector.source_detector_mm
        along = (np.arange(1, detector.columns + 1) - detector.central_column) * detector.column_mm
        # Seen from the detector's own center above the isocenter; columns rise to the right.
        if detector.form is Detector.ARC:
            x, y = far * np.sin(along / far), near - far * np.cos(along / far)
        else:
            x, y = along, np.full_like(along, near - far)
        away = near + spot.distance_mm
        from_x, from_y = -away * math.sin(spot.angle), away * math.cos(spot.angle)
        to_x, to_y = x - from_x, y - from_y
        length = np.hypot(to_x, to_y)
        self.normal = np.arctan2(to_x, -to_y)
        self.distance_mm = from_x * np.cos(self.normal) + from_y * np.sin(self.normal)
        self.nearest = -(from_x * to_x + from_y * to_y) / length**2
        climb = (detector.central_row - np.arange(1, detector.rows + 1)) * detector.row_mm - spot.height_mm
        self.in_plane = (length[:, None] / np.hypot(length[:, None], climb)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Rebinned:
    """Slices of parallel views.

    Attributes:
        sinogram: line integrals, float32 (slices, views, channels).
        beam: over a half turn.
        heights_mm: of the slices, rising.
        averaged: detector rows that count for a ray on the average.
        columns: of the detector, in fractions from 0, that the channels fall on at the first place of the focal spot.
    """

    sinogram: np.ndarray
    beam: ParallelBeam
    heights_mm: np.ndarray
    averaged: float
    columns: np.ndarray


def rebin(
    detector: ConeRows,
    places: Sequence[ViewPlace],
    read: Callable[[int], np.ndarray],
    views_a_turn: int,
    slice_mm: float | None = None,
    most_rays: int | None = None,
    progress: _Hook | None = None,
) -> Rebinned:
    """Sort the rays of a scan into slices of parallel views.

    Args:
        detector: its geometry.
        places: of the views, in the order they were taken.
        read: a view's line integrals by its index, (rows, columns); each is asked for once at most.
        views_a_turn: half of them, at most, are handed out over a half turn.
        slice_mm: thickness and distance of the slices; None takes 1 mm, or a detector row where that is more.
        most_rays: refuse to make more.
        progress: told the share done, 0-1; what it raises stops the work.

    Raises:
        UnsuitableProjections: the views do not cover a slice, or are no turning scan.
    """
    slice_mm = slice_mm or max(_THINNEST_MM, detector.row_at_isocenter_mm)
    spots = list(dict.fromkeys(place.spot for place in places))
    tracks = [_Track(detector, spot, places) for spot in spots]
    half = max(track.half_width_mm for track in tracks)
    channel_mm = detector.column_mm * detector.source_isocenter_mm / detector.source_detector_mm
    channels = 2 * math.floor(min(track.covered_mm for track in tracks) / channel_mm)
    beam = ParallelBeam((0.0,), channels, channel_mm).sparse(max(views_a_turn // 2, 1))
    bottom = min(place.height_mm for place in places) - half
    top = max(place.height_mm for place in places) + half
    # On whole multiples, so that the same patient scanned twice gets the same slices.
    heights = np.arange(math.ceil(bottom / slice_mm), math.floor(top / slice_mm) + 1) * slice_mm
    if most_rays is not None and len(heights) * beam.views * channels > most_rays:
        raise UnsuitableProjections(
            f"The scan makes {len(heights)} slices of {beam.views} x {channels} rays, and at most {most_rays:,} rays "
            "are possible; give the views of a part of it."
        )
    slices = _Slices(heights, slice_mm, beam)
    total, done = sum(track.steps(beam) for track in tracks), 0
    for track in tracks:
        for _ in track.into(slices, detector, read):
            done += 1
            if progress and done % 16 == 0:
                progress(done / total)
    # Between the views of one place of the focal spot, which lie farther apart, rays are interpolated, not measured.
    measured = float(np.mean([min(1.0, beam.turn / beam.views / track.step) for track in tracks]))
    return slices.finished(tracks[0].columns_of(beam.channels_mm), measured)


class _Track:
    """The views of one place of the focal spot, by rising angle."""

    def __init__(self, detector: ConeRows, spot: FocalSpot, places: Sequence[ViewPlace]) -> None:
        self.rays, self.rows, self.spot = _Rays(detector, spot), detector.rows, spot
        if not (np.diff(self.rays.distance_mm) > 0).all():
            raise UnsuitableProjections("The detector reaches around the source; check its columns and distances.")
        angles = np.unwrap([place.angle for place in places])
        mine = np.array([index for index, place in enumerate(places) if place.spot == spot])
        if len(mine) > 1 and angles[mine[-1]] < angles[mine[0]]:
            mine = mine[::-1]
        self.views = mine
        self.angles = angles[mine]
        self.heights = np.array([places[index].height_mm for index in mine])
        gaps = np.diff(self.angles)
        if len(mine) < 2 or gaps.min() <= 0 or _jumps(gaps, 0.0) or _jumps(np.diff(self.heights), _SAME_PLACE_MM):
            raise UnsuitableProjections(
                "The views do not turn evenly around the patient, or many of them are missing; give all views of the "
                "scan in their order."
            )
        ends = (np.array([0.5, detector.rows + 0.5]) - detector.central_row) * detector.row_mm
        self.half_width_mm = float(np.abs(ends).max() * self.rays.nearest.max() + abs(spot.height_mm))

    @property
    def step(self) -> float:
        """Angle from view to view."""
        return float(np.median(np.diff(self.angles)))

    @property
    def covered_mm(self) -> float:
        """Radius of the circle whose rays are all seen."""
        return float(min(-self.rays.distance_mm[0], self.rays.distance_mm[-1]))

    def columns_of(self, distance_mm: np.ndarray) -> np.ndarray:
        """Column, in fractions from 0, of the rays at these distances."""
        return np.interp(distance_mm, self.rays.distance_mm, np.arange(len(self.rays.distance_mm)))

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """Lowest and highest angle of a ray's normal."""
        return self.angles[0] + self.rays.normal.min(), self.angles[-1] + self.rays.normal.max()

    def _numbers(self, beam: ParallelBeam) -> range:
        """Of the parallel views, counted on over all half turns."""
        step = beam.turn / beam.views
        return range(math.ceil(self._reach[0] / step), math.floor(self._reach[1] / step) + 1)

    def steps(self, beam: ParallelBeam) -> int:
        return len(self._numbers(beam))

    def into(self, slices: _Slices, detector: ConeRows, read: Callable[[int], np.ndarray]) -> Iterator[None]:
        """Add all rays to the slices, a parallel view a step."""
        beam = slices.beam
        window = _Window(self, detector, read)
        aims = [_Aim(self, sign * beam.channels_mm) for sign in (1, -1)]
        for number in self._numbers(beam):
            half_turn, view = divmod(number, beam.views)
            aim = aims[half_turn % 2]
            place = np.interp(
                number * beam.turn / beam.views - aim.normal, self.angles, np.arange(len(self.views)), -1.0, -1.0
            )
            seen = np.flatnonzero(place >= 0)
            if seen.size:
                values = window.at(place[seen], aim.columns[seen])
                source = np.interp(place[seen], np.arange(len(self.views)), self.heights) + self.spot.height_mm
                # Row that sees the height 0 along the axis, counted from the upper edge of row 1, and rows a mm.
                rows_a_mm = 1 / (aim.nearest[seen] * detector.row_mm)
                zero = detector.central_row - 0.5 - self.spot.height_mm / detector.row_mm + source * rows_a_mm
                slices.add(view, seen, values, zero, rows_a_mm)
            yield


def _jumps(steps: np.ndarray, tolerance: float) -> bool:
    """Whether some are much longer than most, or of the other direction."""
    usual = float(np.median(steps))
    return bool((np.abs(steps - usual) > (_MOST_MISSING + 0.5) * abs(usual) + tolerance).any())


class _Aim:
    """What the rays at some distances from the axis are, between the columns."""

    def __init__(self, track: _Track, distance_mm: np.ndarray) -> None:
        rays = track.rays
        self.columns = track.columns_of(distance_mm)
        self.normal = np.interp(distance_mm, rays.distance_mm, rays.normal)
        self.nearest = np.interp(distance_mm, rays.distance_mm, rays.nearest)


class _Window:
    """The views that a parallel view is made of: those within the fan's angle, read once each."""

    def __init__(self, track: _Track, detector: ConeRows, read: Callable[[int], np.ndarray]) -> None:
        self._track, self._read = track, read
        fan = np.ptp(track.rays.normal)
        kept = math.ceil(1.5 * fan / track.step) + 8
        self._kept = min(kept, len(track.views))
        self._store = np.empty((self._kept, detector.columns, detector.rows), np.float32)
        self._next = 0

    def at(self, place: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Rays between views and columns, all rows, float32 (rays, rows)."""
        first = np.minimum(place.astype(int), len(self._track.views) - 2)
        left = np.minimum(columns.astype(int), self._store.shape[1] - 2)
        if self._next < first.min():
            self._next = int(first.min())
        while self._next <= first.max() + 1:
            view = self._read(int(self._track.views[self._next]))
            self._store[self._next % self._kept] = view.T * self._track.rays.in_plane
            self._next += 1
        if self._next - first.min() > self._kept:
            raise UnsuitableProjections("The views do not turn evenly around the patient; give them in their order.")
        later, right = (place - first).astype(np.float32)[:, None], (columns - left).astype(np.float32)[:, None]
        slots = first % self._kept, (first + 1) % self._kept
        sides = [self._store[slot, left] * (1 - right) + self._store[slot, left + 1] * right for slot in slots]
        return sides[0] * (1 - later) + sides[1] * later


class _Slices:
    """Sums of what was seen of each ray of each slice."""

    def __init__(self, heights_mm: np.ndarray, slice_mm: float, beam: ParallelBeam) -> None:
        self.heights_mm, self.slice_mm, self.beam = heights_mm, slice_mm, beam
        shape = len(heights_mm), *beam.shape
        self._sums, self._seen = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._thickness = 1.0

    def add(self, view: int, channels: np.ndarray, values: np.ndarray, zero: np.ndarray, rows_a_mm: np.ndarray) -> None:
        """Rays of a view.

        Args:
            view: index.
            channels: of the rays.
            values: of the detector's rows, (rays, rows).
            zero: row coordinate of each ray at height 0, from the upper edge of the first row.
            rows_a_mm: that the coordinate falls by, a mm higher.
        """
        rows = values.shape[1]
        # Rows that see a slice's thickness; a row that is thicker cannot be divided, and is interpolated.
        thickness = np.maximum(self.slice_mm * rows_a_mm, 1.0)
        highest, lowest = (zero + thickness / 2) / rows_a_mm, (zero - thickness / 2 - rows) / rows_a_mm
        first = np.searchsorted(self.heights_mm, lowest.min())
        last = np.searchsorted(self.heights_mm, highest.max())
        if first >= last:
            return
        # From the upper edge: what lies between two coordinates is a difference.
        integral = np.zeros((len(values), rows + 1))
        np.cumsum(values, axis=1, out=integral[:, 1:])
        middle = zero - self.heights_mm[first:last, None] * rows_a_mm
        upper, lower = np.clip(middle - thickness / 2, 0, rows), np.clip(middle + thickness / 2, 0, rows)
        here = slice(first, last), view, channels
        self._sums[here] += (_interpolated(integral, lower) - _interpolated(integral, upper)) / thickness
        self._seen[here] += (lower - upper) / thickness
        self._thickness = float(thickness.mean())

    def finished(self, columns: np.ndarray, measured: float) -> Rebinned:
        """The slices of which all rays were seen; ``measured``: share of the views that are not interpolated."""
        whole = np.flatnonzero(self._seen.min(axis=(1, 2), initial=math.inf) >= _LEAST_SEEN)
        if not whole.size:
            raise UnsuitableProjections(
                "No slice was seen from all sides: the scan is shorter than half a turn, or the table moved by more "
                "than the detector sees in one; give all views of the scan."
            )
        if whole[-1] - whole[0] + 1 > whole.size:
            raise UnsuitableProjections(
                "Between the slices are some that were not seen from all sides: views are missing, or the table "
                "outran the detector; give all views of the scan."
            )
        part = slice(whole[0], whole[-1] + 1)
        sums, seen = self._sums[part], self._seen[part]
        averaged = float(np.median(seen[len(seen) // 2])) * self._thickness * measured
        return Rebinned(sums / seen, self.beam, self.heights_mm[part], averaged, columns)


def _interpolated(table: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Of each ray's row of the table (rays, n + 1) at its places (slices, rays), 0 to n."""
    low = np.minimum(place.astype(int), table.shape[1] - 2)
    flat, start = table.reshape(-1), np.arange(len(table)) * table.shape[1]
    below = flat[start + low]
    return below + (place - low) * (flat[start + low + 1] - below)
