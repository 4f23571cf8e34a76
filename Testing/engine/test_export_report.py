"""Table, pictures and report: right numbers, right sides, nothing from outside, everything escaped."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from LCTfoundLib.anatomy.structures import SEGMENTS, STRUCTURES, Lobe
from LCTfoundLib.export import rendering
from LCTfoundLib.export.rendering import STANDARD_VIEWS, Renderer, View, available_renderer, render_views
from LCTfoundLib.export.report import ReportContent, render_report
from LCTfoundLib.export.slices import Picture, Plane, SlicePainter
from LCTfoundLib.export.surfaces import Mesh, label_surface, lung_surfaces
from LCTfoundLib.export.tables import volume_rows, write_volumes
from LCTfoundLib.volume import Volume
from Testing.engine.export_shapes import lung_volumes, oblique


@pytest.fixture(scope="module")
def meshes() -> dict[str, Mesh]:
    _, segments, trees = lung_volumes()
    return lung_surfaces(segments, trees)


def test_volumes_add_up_and_match_a_count(rng: np.random.Generator, tmp_path: Path) -> None:
    ct, segments, trees = lung_volumes()
    ct.array[...] = rng.integers(-1000, 400, ct.shape)
    rows = {r.key: r for r in volume_rows(segments, trees, ct, {"left_s03": 0.5})}
    assert len(rows) == 18 + 5 + 3 + 3
    for structure in STRUCTURES:
        label = trees.array == structure.code - 18 if structure.tree else segments.array == structure.code
        assert rows[structure.key].volume == pytest.approx(label.sum() * 36 / 1000)
        assert rows[structure.key].mean_hu == pytest.approx(ct.array[label].mean())
    assert rows["lungs"].volume == pytest.approx((segments.array > 0).sum() * 0.036)
    assert sum(rows[s.key].share or 0 for s in SEGMENTS) == pytest.approx(1)
    assert sum(rows[f"{lobe.name.lower()}_lobe"].volume for lobe in Lobe) == pytest.approx(rows["lungs"].volume)
    assert rows["right_lung"].volume + rows["left_lung"].volume == pytest.approx(rows["lungs"].volume)
    assert rows["left_s03"].confidence == 0.5 and rows["left_s04"].confidence is None
    write_volumes(rows.values(), tmp_path / "v.csv")
    table = {r["key"]: r for r in csv.DictReader((tmp_path / "v.csv").open(encoding="utf-8"))}
    assert float(table["left_s03"]["volume_ml"]) == pytest.approx(rows["left_s03"].volume, abs=1e-3)
    assert table["left_s03"]["confidence"] == "0.500" and table["airway"]["share_of_lungs_percent"] == ""
    assert table["right_s04"]["lobe"] == "Right middle lobe"


def test_missing_structures_have_zero_volume_and_no_mean() -> None:
    empty = Volume(np.zeros((4, 5, 6), np.uint8))
    rows = volume_rows(empty, empty, empty)
    assert all(r.volume == 0 and r.mean_hu is None for r in rows)


def test_volumes_do_not_depend_on_direction(rng: np.random.Generator) -> None:
    plain = [r.volume for r in volume_rows(*reversed_order(lung_volumes()))]
    turned = lung_volumes(direction=oblique(tuple(rng.uniform(-30, 30, 3)), (-1, 1, 1)))
    assert [r.volume for r in volume_rows(*reversed_order(turned))] == pytest.approx(plain)


def reversed_order(volumes: tuple[Volume, Volume, Volume]) -> tuple[Volume, Volume, Volume]:
    ct, segments, trees = volumes
    return segments, trees, ct


def tint_at(image: Image.Image, code: int) -> np.ndarray:
    """Mean column and row, as shares of the picture, of pixels drawn in the border color of a segment."""
    color = np.array(SEGMENTS[code - 1].color)
    seen = (np.abs(np.asarray(image, int) - color).max(axis=2) <= 2).nonzero()
    assert len(seen[0]) > 3
    return np.array([seen[1].mean() / image.width, seen[0].mean() / image.height])


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, -1)])
def test_slices_show_the_patients_right_on_the_left_however_stored(flips: tuple[int, int, int]) -> None:
    ct, segments, trees = lung_volumes()
    flipped = tuple(slice(None, None, f) for f in reversed(flips))
    first = np.array([0 if f > 0 else n - 1 for f, n in zip(reversed(flips), ct.shape, strict=True)])
    origin = tuple(ct.world_from_index(first))
    stored = [
        Volume(v.array[flipped], v.spacing, origin, np.diag(np.array(flips, float))) for v in (ct, segments, trees)
    ]
    expected, painter = SlicePainter(ct, segments, trees), SlicePainter(*stored)
    for plane in Plane:
        level = expected.levels(plane, 3)[1]
        picture, same = expected.paint(plane, level), painter.paint(plane, level)
        assert picture.caption == same.caption
        assert (np.asarray(picture.image) == np.asarray(same.image)).all()
    axial = expected.paint(Plane.AXIAL, expected.levels(Plane.AXIAL, 5)[3]).image
    assert tint_at(axial, 1)[0] < 0.5 < tint_at(axial, 12)[0]  # S1 is right, left S3 is left
    coronal = expected.paint(Plane.CORONAL, expected.levels(Plane.CORONAL, 3)[1]).image
    assert tint_at(coronal, 2)[1] < tint_at(coronal, 8)[1]  # the upper lobe is above


def test_slices_are_isotropic_and_name_their_position() -> None:
    ct, segments, trees = lung_volumes(spacing=(3.0, 3.0, 4.0))
    painter = SlicePainter(ct, segments, trees, size=400)
    picture = painter.paint(Plane.CORONAL, 20)
    assert max(picture.image.size) <= 402
    assert picture.caption == f"Coronal, y = {-80 + 20 * 3} mm"
    assert len(painter.sagittal_levels(2)) == 4
    tall, wide = (b.stop - b.start for b in (painter._box[0], painter._box[2]))
    ratio = picture.image.height / picture.image.width
    assert ratio == pytest.approx(min(tall * 4 + 24, 44 * 4) / min(wide * 3 + 24, 80 * 3), rel=0.05)


def test_slices_of_an_empty_result_show_the_ct() -> None:
    ct, segments, _ = lung_volumes()
    empty = segments.with_array(np.zeros_like(segments.array))
    painter = SlicePainter(ct, empty, empty)
    assert painter.paint(Plane.AXIAL, painter.levels(Plane.AXIAL, 1)[0]).image.width > 100
    assert painter.sagittal_levels(2) == []


@pytest.mark.parametrize("renderer", list(Renderer))
def test_renderings_show_the_sides_where_they_belong(meshes: dict[str, Mesh], renderer: Renderer) -> None:
    if renderer is Renderer.VTK and available_renderer() is not Renderer.VTK:
        pytest.skip("no OpenGL here")
    view = View("front", (0, 1, 0), tuple(meshes), size=(300, 260))
    image = np.asarray(render_views(meshes, (view,), renderer)[0].image, float)
    assert (image.min(axis=2) < 250).mean() > 0.25  # something is drawn
    red_minus_blue = image[:, :, 0] - image[:, :, 2]
    right, left = red_minus_blue[:100, 20:140], red_minus_blue[:100, 160:280]
    assert right.max() > 100 and left.max() < 100  # the right upper lobe is yellow to orange, the left one pink


def test_both_renderers_agree(meshes: dict[str, Mesh]) -> None:
    if available_renderer() is not Renderer.VTK:
        pytest.skip("no OpenGL here")
    views = tuple(replace(v, labels=False, size=(280, 240)) for v in STANDARD_VIEWS[1:5])
    ours, theirs = (render_views(meshes, views, r) for r in Renderer)
    for a, b in zip(ours, theirs, strict=True):
        difference = np.abs(np.asarray(a.image, float) - np.asarray(b.image, float)).max(axis=2)
        assert (difference > 60).mean() < 0.06


def test_the_nearer_of_two_balls_hides_the_farther() -> None:
    k, j, i = np.indices((40, 60, 40))
    balls = {}
    for key, y in (("right_s01", 15), ("left_s10", 45)):
        ball = ((k - 20) ** 2 + (j - y) ** 2 + (i - 20) ** 2 < 100).astype(np.uint8)
        balls[key] = label_surface(Volume(ball))
    for renderer in Renderer:
        if renderer is Renderer.VTK and available_renderer() is not Renderer.VTK:
            continue
        front, back = (View(n, (0, d, 0), tuple(balls), size=(120, 120)) for n, d in (("f", 1), ("b", -1)))
        colors = [np.asarray(p.image)[60, 60].astype(int) for p in render_views(balls, (front, back), renderer)]
        assert colors[0][0] > colors[0][2] and colors[1][2] > colors[1][0]  # yellow in front, violet behind


def test_the_software_renderer_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    available_renderer.cache_clear()
    monkeypatch.setenv("LCTFOUND_RENDERER", "software")
    assert available_renderer() is Renderer.SOFTWARE
    available_renderer.cache_clear()


def test_a_crash_of_the_graphics_driver_means_software(monkeypatch: pytest.MonkeyPatch) -> None:
    available_renderer.cache_clear()
    monkeypatch.setattr(rendering, "_PROBE", "import os; os.abort()")
    assert available_renderer() is Renderer.SOFTWARE
    available_renderer.cache_clear()


def test_nothing_to_render_gives_no_picture() -> None:
    assert render_views({}) == []


class Links(HTMLParser):
    """Collects what a browser would load, and the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def content(**changes: object) -> ReportContent:
    ct, segments, trees = lung_volumes()
    parts: dict[str, object] = {
        "case": "Case",
        "rows": volume_rows(segments, trees, ct, {"right_s01": 0.9}),
        "renderings": [Picture(Image.new("RGB", (8, 8)), "front")],
        "slices": {"Axial": [Picture(Image.new("RGB", (8, 8)), "z = 1 mm")]},
    }
    return ReportContent(**(parts | changes))  # type: ignore[arg-type]


def test_the_report_loads_nothing_from_elsewhere() -> None:
    html = render_report(content())
    page = Links()
    page.feed(html)
    assert page.loaded and all(link.startswith("data:image/") for link in page.loaded)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags


def test_the_report_escapes_every_text_from_outside() -> None:
    evil = "<script>alert('x')</script>\"&"
    finding = SimpleNamespace(severity="warning", structure=evil, sentence=evil)
    html = render_report(
        content(
            case=evil,
            findings=[finding],
            provenance={evil: {evil: evil}, "list": [evil]},
            image={evil: evil},
            renderer=evil,
            renderings=[Picture(Image.new("RGB", (8, 8)), evil)],
            slices={evil: [Picture(Image.new("RGB", (8, 8)), evil)]},
        )
    )
    page = Links()
    page.feed(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert "".join(page.text).count("<script>alert('x')</script>\"&") >= 10
    assert "$" not in render_report(content(case="plain"))


def test_the_report_says_what_it_is_and_shows_flags_by_severity() -> None:
    findings = [
        SimpleNamespace(severity="error", structure="left_s04", sentence="not found."),
        SimpleNamespace(severity="warning", structure="pulmonary_vein", sentence="in pieces."),
        SimpleNamespace(severity="info", structure=None, sentence="thick slices."),
    ]
    html = render_report(content(findings=findings))
    assert "Research use only. Not a medical device" in html
    assert '<li class="bad"><b>Problem &middot; Left S4 superior lingular</b> not found.</li>' in html
    assert '<li class="warn"><b>Check &middot; Pulmonary vein</b> in pieces.</li>' in html
    assert '<li class="note"><b>Note</b> thick slices.</li>' in html
    assert "No quality flag" not in html and "No quality flag" in render_report(content())


def test_the_report_lists_all_structures_and_marks_missing_ones() -> None:
    ct, segments, trees = lung_volumes()
    segments.array[segments.array == 7] = 6
    html = render_report(content(rows=volume_rows(segments, trees, ct, {"right_s01": 0.875})))
    for structure in STRUCTURES:
        assert structure.name in html
    assert html.count("not found") == 1 and "Right S7 medial basal <em>not found</em>" in html
    assert "88 %" in html
