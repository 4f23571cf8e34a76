"""Helical scans become slices of parallel views: each ray where the manual's coordinates put it, every photon used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import Detector, ImageGrid
from LCTfoundLib.physics.helical import ConeRows, FocalSpot, Rebinned, ViewPlace, rebin
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import RampFilter, filtered_back_projection

pytestmark = pytest.mark.usefixtures("one_thread")

DETECTOR = ConeRows(12, 120, 2.2, 3.9, 6.5, 60.75, 595.0, 1085.6)
A_TURN = 180
SPOTS = {
    "none": [FocalSpot()],
    "along the patient": [FocalSpot(height_mm=0.6), FocalSpot(height_mm=-0.6)],
    "in the plane": [FocalSpot(0.003, 0.0, 1.5), FocalSpot(-0.003, 0.0, -1.0)],
    "both": [FocalSpot(a, h) for a in (0.003, -0.003) for h in (0.5, -0.5)],
}


def places_of(turns: float, feed_mm: float, spots: list[FocalSpot], first: float = 0.7, a_turn: int = A_TURN):
    """Views of a table that moves by ``feed_mm`` a turn; a negative number of turns is a gantry that runs backwards."""
    count = round(abs(turns) * a_turn)
    step = math.copysign(2 * math.pi / a_turn, turns)
    return [
        ViewPlace((first + n * step) % (2 * math.pi), -40.0 + feed_mm * n / a_turn, spots[n % len(spots)])
        for n in range(count)
    ]


def ends_of(detector: ConeRows, place: ViewPlace) -> tuple[np.ndarray, np.ndarray]:
    """Source (3,) and detector elements (rows, columns, 3), mm, by the words of the data set's manual."""
    phi = place.angle
    around = np.array([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]])
    center = np.array([0.0, detector.source_isocenter_mm])
    along = (np.arange(1, detector.columns + 1) - detector.central_column) * detector.column_mm
    if detector.form is Detector.ARC:
        turned = along / detector.source_detector_mm
        plane = center + detector.source_detector_mm * np.stack([np.sin(turned), -np.cos(turned)], -1)
    else:
        plane = center + np.stack([along, np.full_like(along, -detector.source_detector_mm)], -1)
    heights = place.height_mm + (detector.central_row - np.arange(1, detector.rows + 1)) * detector.row_mm
    elements = np.empty((detector.rows, detector.columns, 3))
    elements[..., :2], elements[..., 2] = plane @ around.T, heights[:, None]
    spot = place.spot
    turned_by = np.array([[math.cos(spot.angle), -math.sin(spot.angle)], [math.sin(spot.angle), math.cos(spot.angle)]])
    source = around @ turned_by @ (center * (1 + spot.distance_mm / detector.source_isocenter_mm))
    return np.array([*source, place.height_mm + spot.height_mm]), elements


def through_balls(balls: list[tuple[np.ndarray, float]], scale: np.ndarray) -> Callable[..., np.ndarray]:
    """Paths through balls, squeezed along the axes by ``scale`` (0: endless along z), mm."""

    def paths(source: np.ndarray, elements: np.ndarray) -> np.ndarray:
        ray = elements - source
        length = np.linalg.norm(ray, axis=-1)
        total = np.zeros(elements.shape[:-1])
        for center, radius in balls:
            direction, from_center = ray * scale, (source - center) * scale
            a, b = (direction**2).sum(-1), (direction * from_center).sum(-1)
            c = (from_center**2).sum(-1) - radius**2
            total += 2 * np.sqrt(np.maximum(b**2 - a * c, 0)) / a * length
        return total

    return paths


def scanned(detector: ConeRows, places: list[ViewPlace], paths: Callable[..., np.ndarray], **options) -> Rebinned:
    asked: Counter[int] = Counter()

    def read(index: int) -> np.ndarray:
        asked[index] += 1
        return paths(*ends_of(detector, places[index])).astype(np.float32)

    found = rebin(detector, places, read, A_TURN, **options)
    assert max(asked.values()) == 1 and len(asked) >= len(places) - 6
    return found


def chords(found: Rebinned, center: np.ndarray, radius: float) -> np.ndarray:
    """Of parallel rays through a disk, mm (views, channels)."""
    angles, place = np.asarray(found.beam.angles)[:, None], found.beam.channels_mm
    apart = place - center[0] * np.cos(angles) - center[1] * np.sin(angles)
    return 2 * np.sqrt(np.maximum(radius**2 - apart**2, 0))


@pytest.mark.parametrize("form", list(Detector))
@pytest.mark.parametrize("spots", SPOTS.values(), ids=SPOTS)
@pytest.mark.parametrize(("turns", "feed"), [(1.6, 12.0), (-1.6, -12.0), (1.3, 0.0)], ids=["up", "down", "at rest"])
def test_rays_of_what_is_alike_in_all_slices(rng, form, spots, turns, feed):
    center = np.array([*rng.uniform(-60, 60, 2), 0.0])
    paths = through_balls([(center, 45.0)], np.array([1.0, 1.0, 0.0]))
    found = scanned(replace(DETECTOR, form=form), places_of(turns, feed, spots, a_turn=180 * len(spots)), paths)
    assert found.sinogram.dtype == np.float32 and found.sinogram.shape == (len(found.heights_mm), *found.beam.shape)
    error = np.abs(found.sinogram - chords(found, center, 45.0))
    # Between channels and views the edge is rounded.
    inside = chords(found, center, 38.0) > 0
    outside = chords(found, center, 50.0) == 0
    assert error[:, inside].max() < 0.8 and error[:, inside].mean() < 0.1 and error[:, outside].max() < 1e-3
    np.testing.assert_allclose(np.diff(found.heights_mm), found.heights_mm[1] - found.heights_mm[0], rtol=1e-9)


def test_balls_are_where_they_were(rng):
    balls = [(np.array([rng.uniform(-70, -20), rng.uniform(-60, 60), rng.uniform(-25, -8)]), 11.0),
             (np.array([rng.uniform(20, 70), rng.uniform(-60, 60), rng.uniform(0, 15)]), 9.0)]  # fmt: skip
    places = places_of(5.0, 13.0, SPOTS["along the patient"], a_turn=360)
    found = scanned(DETECTOR, places, through_balls(balls, np.ones(3)))
    grid = ImageGrid(96, 96, 2.2)
    images = filtered_back_projection(Projector(grid, found.beam), torch.from_numpy(found.sinogram)).numpy()
    for center, radius in balls:
        near = np.hypot(grid.x_mm - center[0], grid.y_mm[:, None] - center[1]) < radius + 6
        part = np.where(near, images, 0).clip(min=0.15)
        part = np.where(near, part - 0.15, 0)
        mass = part.sum()
        z = (part.sum(axis=(1, 2)) * found.heights_mm).sum() / mass
        x = (part.sum(axis=(0, 1)) * grid.x_mm).sum() / mass
        y = (part.sum(axis=(0, 2)) * grid.y_mm).sum() / mass
        assert np.abs(np.array([x, y, z]) - center).max() < 0.6
        volume = np.where(near, images, 0).sum() * grid.pixel_mm**2 * np.diff(found.heights_mm)[0]
        assert volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.06)
        middle = images[np.abs(found.heights_mm - center[2]).argmin()]
        core = np.hypot(grid.x_mm - center[0], grid.y_mm[:, None] - center[1]) < radius / 2
        assert middle[core].mean() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("spots", ["none", "both"])
@pytest.mark.parametrize(("feed", "slice_mm"), [(6.0, 1.3), (12.0, 1.3), (6.0, 4.0)])
def test_no_photon_is_thrown_away(rng, spots, feed, slice_mm):
    """White noise becomes weaker as the rows that count say, and more by what interpolation smooths."""
    places = places_of(5.0, feed, SPOTS[spots])
    found = rebin(DETECTOR, places, lambda n: rng.normal(0, 1, (12, 120)), A_TURN, slice_mm)
    # Half turns that see a slice, times its thickness in rows, times the views that a parallel one is made of.
    assert found.beam.views == (90 if spots == "none" else 45)
    assert found.averaged == pytest.approx(2 * 12 * slice_mm / feed * 90 / found.beam.views, rel=0.12)
    # In the image, since neighboring rays have noise in common.
    projector = Projector(ImageGrid(24, 24, 8.0), found.beam)
    rays = torch.from_numpy(found.sinogram[2:-2])
    alone = torch.from_numpy(rng.normal(0, found.averaged**-0.5, rays.shape)).float()
    noise = [float(filtered_back_projection(projector, part, RampFilter.HANN, 0.5).var()) for part in (rays, alone)]
    assert 0.3 < noise[0] / noise[1] < 1.2


def test_channels_fall_on_the_columns_that_saw_them():
    found = scanned(DETECTOR, places_of(2.0, 6.0, SPOTS["none"]), through_balls([], np.ones(3)))
    angle = (found.columns + 1 - DETECTOR.central_column) * DETECTOR.column_mm / DETECTOR.source_detector_mm
    np.testing.assert_allclose(DETECTOR.source_isocenter_mm * np.sin(angle), found.beam.channels_mm, atol=0.01)


def test_progress_and_cancel():
    places, told = places_of(2.0, 6.0, SPOTS["none"]), []
    rebin(DETECTOR, places, lambda n: np.zeros((12, 120)), A_TURN, progress=told.append)
    assert told == sorted(told) and 0.9 < told[-1] <= 1

    def stop(share: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        rebin(DETECTOR, places, lambda n: np.zeros((12, 120)), A_TURN, progress=stop)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (places_of(0.3, 4.0, SPOTS["none"]), "shorter than half a turn"),
        (places_of(4.0, 80.0, SPOTS["none"]), "table (moved|outran)"),
        (places_of(3.0, 6.0, SPOTS["none"])[:180] + places_of(3.0, 6.0, SPOTS["none"])[220:], "many of them are miss"),
        (places_of(3.0, 6.0, SPOTS["none"])[::2] + places_of(3.0, 6.0, SPOTS["none"])[1::2], "in their order"),
        ([ViewPlace(0.0, 0.0)], "turn evenly"),
    ],
)
def test_refused(places, words):
    with pytest.raises(UnsuitableProjections, match=words):
        rebin(DETECTOR, places, lambda n: np.zeros((12, 120)), A_TURN)


@pytest.mark.parametrize(("most", "words"), [(100_000, "at most 100,000 rays.*fewer slices"), (1000, "mm long")])
def test_too_many_rays_are_refused_before_any_is_read(most, words):
    with pytest.raises(UnsuitableProjections, match=words):
        rebin(DETECTOR, places_of(3.0, 6.0, SPOTS["none"]), lambda n: 1 / 0, A_TURN, most_rays=most)


def test_chosen_slices_are_those_of_all_and_only_views_that_see_them_are_read(rng):
    places, asked = places_of(6.0, 9.0, SPOTS["along the patient"]), set()
    rays = [rng.normal(1, 0.1, (12, 120)).astype(np.float32) for _ in places]

    def read(index: int) -> np.ndarray:
        asked.add(index)
        return rays[index]

    whole = rebin(DETECTOR, places, lambda n: rays[n], A_TURN)
    assert list(whole.chosen) == list(range(len(whole.heights_mm)))
    some = rebin(DETECTOR, places, read, A_TURN, choose=lambda count: range(count // 2, count // 2 + 6, 2))
    np.testing.assert_array_equal(some.heights_mm, whole.heights_mm[list(some.chosen)])
    np.testing.assert_array_equal(some.sinogram, whole.sinogram[list(some.chosen)])
    assert len(some.heights_mm) == 3 and 0 < len(asked) < 0.7 * len(places)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_mm": 0.0}, "no detector"),
        ({"row_mm": -1.0}, "no detector"),
        ({"rows": 0}, "no detector"),
        ({"source_detector_mm": 0.0}, "isocenter lies between"),
        ({"source_isocenter_mm": 1200.0}, "isocenter lies between"),
        ({"central_column": 400.0}, "beside the detector"),
        ({"central_row": 200.0}, "row 200.0 of 12"),
    ],
)
def test_detectors_that_are_none(change, words):
    with pytest.raises(UnsuitableProjections, match=words):
        replace(DETECTOR, **change)


def test_a_slow_helix_is_no_table_that_moves_between_turns():
    """6 mm a turn of 720 views: less from view to view than a table at rest may tremble."""
    places = places_of(1.5, 6.0, SPOTS["none"], a_turn=720)
    found = rebin(DETECTOR, places, lambda n: np.ones((12, 120), np.float32), A_TURN)
    assert len(found.heights_mm) > 3 and found.sinogram.max() <= 1


def test_a_table_that_moves_between_turns_is_told():
    places = [
        replace(place, height_mm=20.0 * (n // A_TURN)) for n, place in enumerate(places_of(3.0, 0.0, [FocalSpot()]))
    ]
    with pytest.raises(UnsuitableProjections, match="moves between turns, by 20.0 mm"):
        rebin(DETECTOR, places, lambda n: np.zeros((12, 120)), A_TURN)


def test_a_few_missing_views_do_not_matter(rng):
    center = np.array([20.0, -30.0, 0.0])
    paths = through_balls([(center, 45.0)], np.array([1.0, 1.0, 0.0]))
    places = [place for n, place in enumerate(places_of(3.0, 8.0, SPOTS["none"])) if n % 50 not in (3, 4)]
    found = scanned(DETECTOR, places, paths)
    assert np.abs(found.sinogram - chords(found, center, 45.0))[:, chords(found, center, 40.0) > 0].max() < 1.5
