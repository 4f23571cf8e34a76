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
from LCTfoundLib.physics.geometry import Detector, FanBeam, ParallelBeam

__all__ = ["ConeRows", "FocalSpot", "Rebinned", "ViewPlace", "rebin"]

#: Thinnest slice unless the detector's rows are thicker, mm.
_THINNEST_MM = 1.0
#: Share of a slice's thickness that must be seen along each of its rays, all directions and turns together.
_LEAST_SEEN = 0.5
#: Channels that tell which slices are seen.
_FEW_CHANNELS = 24
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

    def __post_init__(self) -> None:
        # The same of a fan, whose sentences these are.
        FanBeam(
            (0.0,), self.columns, self.column_mm, self.central_column - (self.columns + 1) / 2,
            self.source_isocenter_mm, self.source_detector_mm, self.form,
        )  # fmt: skip
        if self.rows < 1 or not (math.isfinite(self.row_mm) and self.row_mm > 0):
            raise UnsuitableProjections(f"{self.rows} rows {self.row_mm} mm apart are no detector; give both above 0.")
        if not 0.5 <= self.central_row <= self.rows + 0.5:
            raise UnsuitableProjections(
                f"The central ray falls on row {self.central_row} of {self.rows}; it must be one of the detector's."
            )

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
        chosen: indices of the slices among all that the scan could make, from the feet up.
    """

    sinogram: np.ndarray
    beam: ParallelBeam
    heights_mm: np.ndarray
    averaged: float
    columns: np.ndarray
    chosen: range


def rebin(
    detector: ConeRows,
    places: Sequence[ViewPlace],
    read: Callable[[int], np.ndarray],
    views_a_turn: int,
    slice_mm: float | None = None,
    choose: Callable[[int], range] | None = None,
    most_rays: int | None = None,
    progress: _Hook | None = None,
) -> Rebinned:
    """Sort the rays of a scan into slices of parallel views.

    Args:
        detector: its geometry.
        places: of the views, in the order they were taken.
        read: a view's line integrals by its index, (rows, columns); each is asked for once at most.
        views_a_turn: half of them are handed out over a half turn; of a focal spot that moves a quarter, since between
            the views of each of its places the others would be interpolated.
        slice_mm: thickness and distance of the slices; None takes 1 mm, or a detector row where that is more.
        choose: of so many slices from the feet up, which to make; None: all. Only views that see them are asked for.
        most_rays: refuse to make more.
        progress: told the share done, 0-1; what it raises stops the work.

    Raises:
        UnsuitableProjections: the views do not cover a slice, or are no turning scan.
    """
    slice_mm = slice_mm or max(_THINNEST_MM, detector.row_at_isocenter_mm)
    spots = list(dict.fromkeys(place.spot for place in places))
    tracks = [_Track(detector, spot, places) for spot in spots]
    channel_mm = detector.column_mm * detector.source_isocenter_mm / detector.source_detector_mm
    channels = 2 * math.floor(min(track.covered_mm for track in tracks) / channel_mm)
    beam = ParallelBeam((0.0,), channels, channel_mm).sparse(max(views_a_turn // (2 if len(spots) == 1 else 4), 1))
    seen = _seen_heights(tracks, beam, slice_mm, most_rays)
    chosen = range(len(seen)) if choose is None else choose(len(seen))
    heights = seen[chosen.start : chosen.stop : chosen.step]
    if most_rays is not None and len(heights) * beam.views * channels > most_rays:
        raise UnsuitableProjections(
            f"The scan makes {len(heights)} slices of {beam.views} x {channels} rays, and at most {most_rays:,} rays "
            "are possible; choose fewer slices."
        )
    slices = _Slices(heights, slice_mm, beam)
    total, done = sum(track.steps(beam) for track in tracks), 0
    for track in tracks:
        for _ in track.into(slices, read):
            done += 1
            if progress and done % 16 == 0:
                progress(done / total)
    # Between the views of one place of the focal spot, which lie farther apart, rays are interpolated, not measured.
    measured = float(np.mean([min(1.0, beam.turn / beam.views / track.step) for track in tracks]))
    return slices.finished(tracks[0].columns_of(beam.channels_mm), measured, chosen)


def _seen_heights(tracks: Sequence[_Track], beam: ParallelBeam, slice_mm: float, most_rays: int | None) -> np.ndarray:
    """Of the slices of which all rays are seen, rising; found with a few channels, before any view is read.

    They lie on whole multiples of their distance, so that the same patient scanned twice gets the same slices.
    """
    ends = [height + side * track.half_width_mm for track in tracks for side in (-1, 1) for height in track.ends_mm]
    first, last = math.ceil(min(ends) / slice_mm), math.floor(max(ends) / slice_mm)
    few = np.unique(np.linspace(0, beam.detectors - 1, min(beam.detectors, _FEW_CHANNELS)).round().astype(int))
    if most_rays is not None and (last - first + 1) * beam.views * len(few) > most_rays:
        raise UnsuitableProjections(
            f"The scan is {(last - first) * slice_mm:,.0f} mm long; give the views of one patient."
        )
    slices = _Slices(np.arange(first, last + 1) * slice_mm, slice_mm, beam, few)
    for track in tracks:
        for _ in track.into(slices, None):
            pass
    return slices.whole()


class _Track:
    """The views of one place of the focal spot, by rising angle."""

    def __init__(self, detector: ConeRows, spot: FocalSpot, places: Sequence[ViewPlace]) -> None:
        self.detector, self.rays, self.spot = detector, _Rays(detector, spot), spot
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
        moves = np.diff(self.heights)
        farthest = float(np.abs(moves).max(initial=0.0))
        # Of a slow helix no view is far from the next, however far the table goes.
        if farthest > _SAME_PLACE_MM and abs(float(np.median(moves))) <= _SAME_PLACE_MM / 10:
            raise UnsuitableProjections(
                f"The table moves between turns, by {farthest:.1f} mm; give the views of one position."
            )
        if len(mine) < 2 or gaps.min() <= 0 or _jumps(gaps, 0.0) or _jumps(moves, _SAME_PLACE_MM):
            raise UnsuitableProjections(
                "The views do not turn evenly around the patient, or many of them are missing; give all views of the "
                "scan in their order."
            )
        ends = (np.array([0.5, detector.rows + 0.5]) - detector.central_row) * detector.row_mm
        self.half_width_mm = float(np.abs(ends).max() * self.rays.nearest.max() + abs(spot.height_mm))

    @property
    def ends_mm(self) -> tuple[float, float]:
        """Lowest and highest place of the table."""
        return float(self.heights.min()), float(self.heights.max())

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

    def into(self, slices: _Slices, read: Callable[[int], np.ndarray] | None) -> Iterator[None]:
        """Add all rays to the slices, a parallel view a step; without ``read`` only that they were seen."""
        beam, detector, count = slices.beam, self.detector, np.arange(len(self.views))
        window = None if read is None else _Window(self, read)
        aims = [_Aim(self, sign * beam.channels_mm[slices.channels]) for sign in (1, -1)]
        for number in self._numbers(beam):
            half_turn, view = divmod(number, beam.views)
            aim = aims[half_turn % 2]
            place = np.interp(number * beam.turn / beam.views - aim.normal, self.angles, count, -1.0, -1.0)
            inside = np.flatnonzero(place >= 0)
            if inside.size:
                source = np.interp(place[inside], count, self.heights) + self.spot.height_mm
                # Row that sees the height 0 along the axis, counted from the upper edge of row 1, and rows a mm.
                rows_a_mm = 1 / (aim.nearest[inside] * detector.row_mm)
                zero = detector.central_row - 0.5 - self.spot.height_mm / detector.row_mm + source * rows_a_mm
                seen = slices.seen_by(zero, rows_a_mm, detector.rows)
                if seen is not None:
                    values = None if window is None else window.at(place[inside], aim.columns[inside])
                    slices.add(view, inside, values, seen)
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

    def __init__(self, track: _Track, read: Callable[[int], np.ndarray]) -> None:
        self._track, self._read, detector = track, read, track.detector
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


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a parallel view's rays see of some slices.

    Attributes:
        slices: which.
        upper, lower: row coordinates that bound what is seen, (slices, rays).
        thickness: of a slice, in rows, (rays,).
    """

    slices: slice
    upper: np.ndarray
    lower: np.ndarray
    thickness: np.ndarray


class _Slices:
    """Sums of what was seen of each ray of each slice.

    Args:
        heights_mm: of the slices, rising.
        slice_mm: their thickness.
        beam: of the parallel views.
        channels: indices of those that count; None: all, and their values are summed.
    """

    def __init__(
        self, heights_mm: np.ndarray, slice_mm: float, beam: ParallelBeam, channels: np.ndarray | None = None
    ) -> None:
        self.heights_mm, self.slice_mm, self.beam = heights_mm, slice_mm, beam
        self.channels = np.arange(beam.detectors) if channels is None else channels
        shape = len(heights_mm), beam.views, len(self.channels)
        self._shares = np.zeros(shape, np.float32)
        self._sums = np.zeros(shape, np.float32) if channels is None else None
        self._thickness = 1.0

    def seen_by(self, zero: np.ndarray, rows_a_mm: np.ndarray, rows: int) -> _Seen | None:
        """What rays see; None if nothing.

        Args:
            zero: row coordinate of each ray at height 0, from the upper edge of the first row.
            rows_a_mm: that the coordinate falls by, a mm higher.
            rows: of the detector.
        """
        # Rows that see a slice's thickness; a row that is thicker cannot be divided, and is interpolated.
        thickness = np.maximum(self.slice_mm * rows_a_mm, 1.0)
        highest, lowest = (zero + thickness / 2) / rows_a_mm, (zero - thickness / 2 - rows) / rows_a_mm
        first = int(np.searchsorted(self.heights_mm, lowest.min()))
        last = int(np.searchsorted(self.heights_mm, highest.max()))
        if first >= last:
            return None
        middle = zero - self.heights_mm[first:last, None] * rows_a_mm
        upper, lower = np.clip(middle - thickness / 2, 0, rows), np.clip(middle + thickness / 2, 0, rows)
        return _Seen(slice(first, last), upper, lower, thickness)

    def add(self, view: int, channels: np.ndarray, values: np.ndarray | None, seen: _Seen) -> None:
        """Rays of a view; ``values`` of all detector rows, (rays, rows)."""
        here = seen.slices, view, channels
        self._shares[here] += (seen.lower - seen.upper) / seen.thickness
        if values is None or self._sums is None:
            return
        self._thickness = float(seen.thickness.mean())
        # From the upper edge: what lies between two coordinates is a difference.
        integral = np.zeros((values.shape[0], values.shape[1] + 1))
        np.cumsum(values, axis=1, out=integral[:, 1:])
        between = _interpolated(integral, seen.lower) - _interpolated(integral, seen.upper)
        self._sums[here] += between / seen.thickness

    def whole(self) -> np.ndarray:
        """Heights of the slices of which all rays were seen, one beside the other."""
        whole = np.flatnonzero(self._shares.min(axis=(1, 2), initial=math.inf) >= _LEAST_SEEN)
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
        return self.heights_mm[whole]

    def finished(self, columns: np.ndarray, measured: float, chosen: range) -> Rebinned:
        """The slices; ``measured``: share of the views that are not interpolated."""
        assert self._sums is not None
        averaged = float(np.median(self._shares[len(self._shares) // 2])) * self._thickness * measured
        # A channel between those that told what is seen may have seen next to nothing.
        np.divide(self._sums, np.maximum(self._shares, 1e-3), out=self._sums)
        return Rebinned(self._sums, self.beam, self.heights_mm, averaged, columns, chosen)


def _interpolated(table: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Of each ray's row of the table (rays, n + 1) at its places (slices, rays), 0 to n."""
    low = np.minimum(place.astype(int), table.shape[1] - 2)
    flat, start = table.reshape(-1), np.arange(len(table)) * table.shape[1]
    below = flat[start + low]
    return below + (place - low) * (flat[start + low + 1] - below)
