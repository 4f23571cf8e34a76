"""Tables and pictures of the evaluation of reconstruction."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from LCTfoundLib.export.slices import draw_text
from LCTfoundLib.runtime.files import output_errors
from training.evaluate.image_metrics import METRICS, RANGE, Metric
from training.evaluate.reconstruction_methods import Method
from training.evaluate.reconstruction_slices import ReconstructionSlice
from training.evaluate.statistics import Interval, bootstrap, compare_paired, holm

__all__ = ["MEASURES", "Paired", "Row", "Shown", "comparisons", "per_patient", "write_report"]

#: Columns of the tables: the image metrics, and how well the answer explains the measurement.
MEASURES: dict[str, Metric] = METRICS | {"residual": Metric("||Ax-y|| / ||y||", 4, False, None)}

_NOTES = f"""\
- Real CT slices of patients that no weight was trained on; their projections are simulated (see the settings) by the
  projector that the methods use too. Not measured on a scanner.
- All metrics in HU inside the body (mask of the reference), clipped to {RANGE.low:g}..{RANGE.high:g} HU: PSNR and SSIM
  with a range of {RANGE.width:g} HU, VIF and FSIM on that range as 0..255. The feature distance is that of the shipped
  fine lung net, not LPIPS.
- Slices of one patient resemble each other: intervals (95 %, percentile bootstrap) and the first p are over patients'
  means; the p over slices stands beside. Wilcoxon signed-rank, two-sided, Holm's correction over all pairs of methods
  within a metric and a number of views.
- In the 90 % interval: share of the body's pixels whose true HU lie in the interval that the method tells, where it
  tells one; 90 % is right, more is too careful, less too bold.
- Seconds are of one slice at a time, without loading a network and without building the projector's matrix.
"""

#: HU shown black and white, and the difference (HU) shown in full color.
_WINDOW = (-1000.0, 400.0)
_DIFFERENCE_HU = 200.0
_TILE = 256


@dataclass(frozen=True)
class Row:
    """One slice by one method.

    Attributes:
        slice, patient: which, whose.
        views: projections.
        method: by its name.
        scores: by the keys of ``MEASURES``.
        evaluations: of a network.
        seconds: taken.
        inside: share of the body's pixels whose true value lies in the interval that the method told; None where it
            told none.
    """

    slice: str
    patient: str
    views: int
    method: str
    scores: Mapping[str, float]
    evaluations: int
    seconds: float
    inside: float | None = None


@dataclass(frozen=True)
class Shown:
    """A slice for the pictures, and each method's image of it (HU)."""

    piece: ReconstructionSlice
    images: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Paired:
    """Two methods in one metric at one number of views.

    Attributes:
        difference: second minus first, mean over patients with its interval.
        p_patients, p_slices: Wilcoxon's, after Holm; ``nan`` where no test could be made.
    """

    views: int
    measure: str
    first: str
    second: str
    difference: Interval
    p_patients: float
    p_slices: float


def per_patient(rows: Sequence[Row], measure: str) -> dict[str, float]:
    """Patient -> mean over the patient's slices, in the order of the slices."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.patient, []).append(row.scores.get(measure, math.nan))
    return {patient: float(np.mean(values)) for patient, values in found.items()}


def comparisons(rows: Sequence[Row]) -> list[Paired]:
    """Every pair of methods in every metric, at each number of views."""
    found: list[Paired] = []
    for views in dict.fromkeys(row.views for row in rows):
        for measure in _measured(rows):
            found += _pairs([row for row in rows if row.views == views], views, measure)
    return found


def _pairs(rows: Sequence[Row], views: int, measure: str) -> list[Paired]:
    """Of one family: all pairs in a metric at a number of views."""
    methods = {name: [row for row in rows if row.method == name] for name in dict.fromkeys(row.method for row in rows)}
    pairs = list(itertools.combinations(methods, 2))
    slices = {name: [row.scores[measure] for row in mine] for name, mine in methods.items()}
    patients = {name: list(per_patient(mine, measure).values()) for name, mine in methods.items()}
    by_patient = [compare_paired(patients[a], patients[b]) for a, b in pairs]
    by_slice = holm([compare_paired(slices[a], slices[b]).p_value for a, b in pairs])
    corrected = holm([pair.p_value for pair in by_patient])
    return [
        Paired(views, measure, a, b, pair.difference, p, q)
        for (a, b), pair, p, q in zip(pairs, by_patient, corrected, by_slice, strict=True)
    ]


def _measured(rows: Sequence[Row]) -> list[str]:
    """Keys of the metrics that there are."""
    return [key for key in MEASURES if all(key in row.scores for row in rows)]


def write_report(
    folder: Path,
    rows: Sequence[Row],
    methods: Sequence[Method],
    shown: Mapping[int, Sequence[Shown]],
    provenance: Mapping[str, Any],
    missing: Sequence[str] = (),
) -> str:
    """Write tables (``results.md``, ``results.json``, ``slices.csv``, ``comparisons.csv``) and pictures into a folder.

    Args:
        folder: made if missing.
        rows: all of them, every method on the same slices.
        methods: in the order of the tables, the one in question first.
        shown: views -> slices for the picture sheet.
        provenance: settings and versions.
        missing: what was left out, with the reason.

    Returns:
        The Markdown text.

    Raises:
        OutputError: the folder cannot be written.
    """
    titles = {method.name: method.title for method in methods}
    paired = comparisons(rows)
    text = _text(rows, titles, paired, provenance, missing)
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.md").write_text(text, encoding="utf-8")
        content = _as_json(rows, paired) | {"missing": list(missing), "provenance": dict(provenance)}
        (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _write_slices(folder / "slices.csv", rows)
        _write_comparisons(folder / "comparisons.csv", paired)
        for views in dict.fromkeys(row.views for row in rows):
            mine = [row for row in rows if row.views == views]
            _boxes(mine, titles, f"{views} views").save(folder / f"boxes_{views}.png")
            if shown.get(views):
                _sheet(shown[views], mine, titles, views).save(folder / f"sheet_{views}.png")
    return text


# -- tables ----------------------------------------------------------------------------------------------------------


def _text(
    rows: Sequence[Row],
    titles: Mapping[str, str],
    paired: Sequence[Paired],
    provenance: Mapping[str, Any],
    missing: Sequence[str],
) -> str:
    settings = "; ".join(
        f"{key} {provenance[key]}"
        for key in ("slices", "size", "noise", "geometry", "device")
        if provenance.get(key) is not None
    )
    parts = ["# Reconstruction\n", _NOTES, f"Settings: {settings}\n"]
    for views in dict.fromkeys(row.views for row in rows):
        mine = [row for row in rows if row.views == views]
        slices, patients = {row.slice for row in mine}, {row.patient for row in mine}
        parts.append(f"## {views} views: {len(slices)} slices of {len(patients)} patients\n")
        parts += ["Mean over slices ± standard deviation\n", _slice_table(mine, titles)]
        parts += ["Mean over patients [95 %]\n", _patient_table(mine, titles)]
        first = mine[0].method
        if len(titles) > 1:
            against = [pair for pair in paired if pair.views == views and pair.first == first]
            parts += [f"{titles[first]} against the others\n", _comparison_table(against, titles)]
    parts += [f"Left out: {reason}\n" for reason in missing]
    return "\n".join(parts)


def _slice_table(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    keys = _measured(rows)
    told_interval = any(row.inside is not None for row in rows)
    table = [["method", *(MEASURES[key].name for key in keys), "network evaluations", "s a slice (median)"]]
    table[0] += ["in the 90 % interval (%)"] if told_interval else []
    for name, title in titles.items():
        mine = [row for row in rows if row.method == name]
        cells = [_spread([row.scores[key] for row in mine], MEASURES[key].digits) for key in keys]
        evaluations = sorted({row.evaluations for row in mine})
        told = str(evaluations[0]) if len(evaluations) == 1 else f"{evaluations[0]}-{evaluations[-1]}"
        table.append([title, *cells, told, f"{np.median([row.seconds for row in mine]):.2f}"])
        table[-1] += [_inside(mine)] if told_interval else []
    return _markdown(table)


def _inside(rows: Sequence[Row]) -> str:
    shares = [100 * row.inside for row in rows if row.inside is not None]
    return _spread(shares, 1) if shares else "-"


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = f"{np.std(values):.{digits}f}" if np.isfinite(values).all() else "-"
    return f"{np.mean(values):.{digits}f} ± {deviation}"


def _patient_table(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    keys = _measured(rows)
    table = [["method", *(MEASURES[key].name for key in keys)]]
    for name, title in titles.items():
        mine = [row for row in rows if row.method == name]
        intervals = [bootstrap(list(per_patient(mine, key).values())) for key in keys]
        table.append([title, *(_span(i, MEASURES[key].digits) for key, i in zip(keys, intervals, strict=True))])
    return _markdown(table)


def _comparison_table(pairs: Sequence[Paired], titles: Mapping[str, str]) -> str:
    table = [["measure", "minus", "difference [95 %]", "better", "p (patients)", "p (slices)"]]
    for pair in pairs:
        measure = MEASURES[pair.measure]
        gain = Interval(-pair.difference.mean, -pair.difference.high, -pair.difference.low, pair.difference.cases)
        table.append(
            [
                measure.name,
                titles[pair.second],
                _span(gain, measure.digits, "+"),
                _better(gain, measure, titles[pair.first], titles[pair.second]),
                _p(pair.p_patients),
                _p(pair.p_slices),
            ]
        )
    return _markdown(table)


def _better(gain: Interval, measure: Metric, first: str, second: str) -> str:
    """Who is better, if the interval says so."""
    if gain.cases < 2 or gain.low <= 0 <= gain.high:
        return "-"
    return first if (gain.low > 0) is measure.higher_is_better else second


def _span(interval: Interval, digits: int, sign: str = "") -> str:
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]" if interval.cases > 1 else mean


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _write_slices(path: Path, rows: Sequence[Row]) -> None:
    keys = _measured(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["views", "slice", "patient", "method", *keys, "evaluations", "seconds", "inside"])
        for row in rows:
            scores = [row.scores[key] for key in keys]
            told = [row.evaluations, row.seconds, "" if row.inside is None else row.inside]
            writer.writerow([row.views, row.slice, row.patient, row.method, *scores, *told])


def _write_comparisons(path: Path, paired: Sequence[Paired]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "views",
                "measure",
                "first",
                "second",
                "second - first",
                "low",
                "high",
                "patients",
                "p_patients",
                "p_slices",
            ]
        )
        for pair in paired:
            d = pair.difference
            cells = [d.mean, d.low, d.high, d.cases, pair.p_patients, pair.p_slices]
            writer.writerow([pair.views, pair.measure, pair.first, pair.second, *cells])


def _as_json(rows: Sequence[Row], paired: Sequence[Paired]) -> dict[str, Any]:
    return {
        "slices": [_finite(asdict(row)) for row in rows],
        "patients": [
            {"views": views, "method": method, "measure": key, "values": _finite(per_patient(mine, key))}
            for views, method in dict.fromkeys((row.views, row.method) for row in rows)
            for mine in [[row for row in rows if (row.views, row.method) == (views, method)]]
            for key in _measured(rows)
        ],
        "comparisons": [_finite(asdict(pair)) for pair in paired],
    }


def _finite(value: Any) -> Any:
    """JSON knows neither nan nor infinity: what has no value is null."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- pictures --------------------------------------------------------------------------------------------------------

_PANEL_WIDTH, _LINE, _LABEL = 460, 30, 150
_ACROSS = 3


def _boxes(rows: Sequence[Row], titles: Mapping[str, str], title: str) -> Image.Image:
    """Box plots, a panel for each metric: quartiles, whiskers to the last value within 1.5 boxes, every slice a dot."""
    keys = _measured(rows)
    height = _LINE * (len(titles) + 2) + 20
    down = math.ceil(len(keys) / _ACROSS)
    chart = Image.new("RGB", (_ACROSS * _PANEL_WIDTH, down * height + 30), (255, 255, 255))
    _write(chart, (chart.width // 2, 18), f"{title}, {len({row.slice for row in rows})} slices", 18, "mm")
    for n, key in enumerate(keys):
        values = {titles[name]: [row.scores[key] for row in rows if row.method == name] for name in titles}
        _panel(chart, (n % _ACROSS * _PANEL_WIDTH, 30 + n // _ACROSS * height), MEASURES[key], values)
    return chart


def _panel(chart: Image.Image, corner: tuple[int, int], measure: Metric, values: Mapping[str, Sequence[float]]) -> None:
    draw = ImageDraw.Draw(chart)
    left, width = corner[0] + _LABEL, _PANEL_WIDTH - _LABEL - 30
    finite = [v for column in values.values() for v in column if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.5

    def x(value: float) -> float:
        return left + (value - low + room) / (high - low + 2 * room) * width

    arrow = "higher is better" if measure.higher_is_better else "lower is better"
    _write(chart, (left + width // 2, corner[1] + 16), f"{measure.name}, {arrow}", 15, "mm")
    for n, (name, column) in enumerate(values.items()):
        y = corner[1] + _LINE * n + 48
        _write(chart, (left - 8, y), name, 14, "rm")
        known = [v for v in column if math.isfinite(v)]
        if known:
            _box(draw, known, x, y)
    base = corner[1] + _LINE * len(values) + 38
    draw.line((left, base, left + width, base), fill=(120, 120, 120))
    for tick in (low, high):
        _write(chart, (int(x(tick)), base + 12), f"{tick:.{measure.digits}f}", 12, "mm")


def _box(draw: ImageDraw.ImageDraw, values: Sequence[float], x: Any, y: int) -> None:
    first, median, third = np.percentile(values, [25, 50, 75])
    reach = 1.5 * (third - first)
    begin, end = min(v for v in values if v >= first - reach), max(v for v in values if v <= third + reach)
    draw.line((x(begin), y, x(end), y), fill=(60, 60, 60))
    draw.rectangle((x(first), y - 9, x(third), y + 9), fill=(190, 212, 240), outline=(60, 60, 60))
    draw.line((x(median), y - 9, x(median), y + 9), fill=(180, 40, 40), width=2)
    for value in values:
        draw.ellipse((x(value) - 2, y - 2, x(value) + 2, y + 2), fill=(30, 60, 120))


def _write(chart: Image.Image, at: tuple[int, int], text: str, size: int, anchor: str) -> None:
    draw_text(chart, at, text, size, anchor, (0, 0, 0), (255, 255, 255))


def _sheet(shown: Sequence[Shown], rows: Sequence[Row], titles: Mapping[str, str], views: int) -> Image.Image:
    """Two rows for each slice: the reference and every method's image, below them what differs from the reference."""
    sheet = Image.new("RGB", ((1 + len(titles)) * _TILE, 2 * len(shown) * _TILE))
    scores = {(row.slice, row.method): row.scores for row in rows}
    for n, one in enumerate(shown):
        top = 2 * n * _TILE
        sheet.paste(_gray(one.piece.hu), (0, top))
        draw_text(sheet, (6, top + 6), "reference, full CT", 15, "lt")
        legend = [
            one.piece.name,
            f"{views} views, simulated",
            f"below: difference ±{_DIFFERENCE_HU:g} HU",
            "red: too bright",
        ]
        for line, text in enumerate(legend):
            draw_text(sheet, (10, top + _TILE + 80 + 24 * line), text, 15, "lt")
        for column, (name, title) in enumerate(titles.items(), start=1):
            found, score = one.images[name], scores[one.piece.name, name]
            sheet.paste(_gray(found), (column * _TILE, top))
            sheet.paste(_colored(found - one.piece.hu), (column * _TILE, top + _TILE))
            draw_text(sheet, (column * _TILE + 6, top + 6), title, 15, "lt")
            told = f"{score['psnr']:.1f} dB, SSIM {score['ssim']:.3f}, {score['rmse']:.0f} HU"
            draw_text(sheet, (column * _TILE + 6, top + _TILE - 6), told, 14, "lb")
    return sheet


def _tile(picture: Image.Image) -> Image.Image:
    return picture.resize((_TILE, _TILE), Image.Resampling.BOX)


def _gray(hu: np.ndarray) -> Image.Image:
    low, high = _WINDOW
    return _tile(Image.fromarray(np.rint(255 * ((hu - low) / (high - low)).clip(0, 1)).astype(np.uint8)))


def _colored(difference: np.ndarray) -> Image.Image:
    """White where nothing differs, red where the image is too bright, blue where it is too dark."""
    share = (difference / _DIFFERENCE_HU).clip(-1, 1)
    fade = 1 - np.abs(share)
    red, blue = np.where(share > 0, 1.0, fade), np.where(share < 0, 1.0, fade)
    return _tile(Image.fromarray(np.rint(255 * np.stack([red, fade, blue], axis=-1)).astype(np.uint8)))
