"""Tables and pictures of the evaluation of the foundation model; every verdict is computed from its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from LCTfoundLib.anatomy.structures import Lobe
from LCTfoundLib.export.slices import draw_text
from LCTfoundLib.networks.conditions import WINDOWS
from LCTfoundLib.runtime.files import output_errors
from training.evaluate.foundation_slices import IGNORE, SIDE, SliceSet
from training.evaluate.kernel_distance import KernelDistance, Level
from training.evaluate.probes import ClassifierScores, Difference, paired_difference, paired_means

__all__ = ["Compared", "ContrastResult", "KernelRow", "PixelPicture", "PixelResult", "comparisons", "write_report"]

_COLORS = {
    Lobe.RIGHT_UPPER: (230, 85, 80),
    Lobe.RIGHT_MIDDLE: (240, 180, 60),
    Lobe.RIGHT_LOWER: (120, 190, 80),
    Lobe.LEFT_UPPER: (80, 150, 235),
    Lobe.LEFT_LOWER: (170, 110, 220),
}
_ACROSS = 8
_NOTES = """\
- Kernel distance: unbiased (it may fall below 0), in the features of the shipped fine lung net, standardized by the
  real slices; comparable within this table only. Real slices are of TCGA-LUAD; their levels are those of the
  collection, not those of phantoms or generated slices. The deviation is over subsets, for halves over splits of the
  patients too.
- Intervals: 95 %, percentile bootstrap over patients, both methods on the same draws. That other training patients or
  another pretraining run would give other numbers is not in them.
- Phantoms are synthetic; labels of LIDC-IDRI-0001 are another program's; LUNG1-001 has human contours of the lungs.
"""


@dataclass(frozen=True)
class KernelRow:
    """A kernel distance: in which window and features, of which slices, to which real ones."""

    window: str
    level: Level
    name: str
    reference: str
    distance: KernelDistance


@dataclass
class ContrastResult:
    """Patients ("held-out" of pretraining, "all") -> method -> scores."""

    scores: dict[str, dict[str, ClassifierScores]] = field(default_factory=dict)


@dataclass
class PixelResult:
    """Dice of pixel probes.

    Attributes:
        test: name of the test set.
        patients: labeled training patients.
        scores: method -> patient -> score -> value.
    """

    test: str
    patients: int
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def column(self, method: str, score: str) -> list[float]:
        """One value per patient, in the order of the test set."""
        return [values.get(score, math.nan) for values in self.scores[method].values()]

    @property
    def measured(self) -> list[str]:
        """Names of the scores."""
        return list(next(iter(next(iter(self.scores.values())).values())))


@dataclass(frozen=True)
class PixelPicture:
    """A test slice (256, 256) in HU, its labels, and a method's answer on its lattice."""

    method: str
    test: str
    hu: np.ndarray
    labels: np.ndarray
    found: np.ndarray


@dataclass(frozen=True)
class Compared:
    """Two methods in one score of one task."""

    task: str
    score: str
    first: str
    second: str
    difference: Difference


def comparisons(
    methods: Sequence[str], contrast: ContrastResult | None, pixels: Sequence[PixelResult], draws: int, seed: int
) -> list[Compared]:
    """The first method against each other one, and the others against each that comes after them."""
    pairs = [(first, second) for n, first in enumerate(methods) for second in methods[n + 1 :]]
    found: list[Compared] = []
    for kind, scores in (contrast.scores if contrast else {}).items():
        task = f"contrast, {kind} patients"
        for score, label in (("auroc", "AUROC"), ("accuracy", "accuracy")):
            for first, second in pairs:
                columns = (getattr(scores[name], score) for name in (first, second))
                difference = paired_difference(*columns, scores[first].patients)
                found.append(Compared(task, label, first, second, difference))
    for result in pixels:
        task = f"pixels of {result.test}, {result.patients} labeled"
        for score in result.measured:
            for first, second in pairs:
                difference = paired_means(result.column(first, score), result.column(second, score), draws, seed)
                found.append(Compared(task, score, first, second, difference))
    return found


def write_report(
    folder: Path,
    kernel: Sequence[KernelRow],
    contrast: ContrastResult | None,
    pixels: Sequence[PixelResult],
    provenance: Mapping[str, Any],
    missing: Sequence[str],
    shown: Mapping[str, Mapping[str, SliceSet]],
    pictures: Sequence[PixelPicture],
    draws: int,
) -> str:
    """Write ``results.json``, ``results.md`` and the pictures; the Markdown text.

    Raises:
        OutputError: the folder cannot be written.
    """
    differences = comparisons(provenance["methods"], contrast, pixels, draws, int(provenance["seed"]))
    parts = ["# The foundation model's pretraining, measured\n", _settings(provenance), _NOTES]
    parts += [_kernel_table(kernel)] if kernel else []
    parts += [_contrast_table(contrast)] if contrast else []
    parts += [_pixel_table(pixels), _difference_table(differences)]
    parts += [f"Left out: {reason}\n" for reason in missing]
    text = "\n".join(parts)
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.md").write_text(text, encoding="utf-8")
        content = _as_json(kernel, contrast, pixels, differences) | {"missing": list(missing)}
        (folder / "results.json").write_text(
            json.dumps({"provenance": dict(provenance)} | content, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        for window, sets in shown.items():
            _sheet(sets, window).save(folder / f"slices_{window}.png")
        _lobe_sheet(pictures).save(folder / "lobes.png")
        _chart(differences, provenance["methods"][0]).save(folder / "differences.png")
    return text


# -- tables ----------------------------------------------------------------------------------------------------------


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _settings(provenance: Mapping[str, Any]) -> str:
    keys = ("device", "timesteps", "pixel timesteps", "side", "random seeds", "test phantoms", "draws", "seed")
    return "Settings: " + "; ".join(f"{key} {provenance[key]}" for key in keys) + "\n"


def _kernel_table(rows: Sequence[KernelRow]) -> str:
    cells = [
        [
            row.window,
            row.level,
            row.name,
            row.reference,
            str(row.distance),
            f"{row.distance.subsets} x {row.distance.subset}",
        ]
        for row in rows
    ]
    head = ["window", "features", "slices", "real TCGA-LUAD slices", "kernel distance ± s.d.", "subsets"]
    return "## Kernel distance to real slices\n\n" + _markdown([head, *cells])


def _contrast_table(result: ContrastResult) -> str:
    rows = [["patients", "features", "AUROC [95 %]", "accuracy [95 %]", "each seed: AUROC", "patients / slices"]]
    for kind, methods in result.scores.items():
        for name, scores in methods.items():
            spans = (_span(scores.auroc), _span(scores.accuracy))
            seeds = ", ".join(f"{area:.3f}" for area, _ in scores.members) if len(scores.members) > 1 else ""
            rows.append([kind, name, *spans, seeds, f"{scores.patients} / {scores.slices}"])
    return "## Linear probe: contrast medium or not\n\n" + _markdown(rows)


def _span(values: np.ndarray) -> str:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.3f} [{low:.3f}, {high:.3f}]"


def _pixel_table(results: Sequence[PixelResult]) -> str:
    rows = [["test", "labeled patients", "features", "score", "mean over patients", "patients"]]
    for result in results:
        for name in result.scores:
            for score in result.measured:
                column = result.column(name, score)
                mean = f"{np.nanmean(column):.3f}"
                rows.append([result.test, str(result.patients), name, score, mean, str(len(column))])
    return "## Linear probe: lobe of each pixel\n\n" + _markdown(rows)


def _difference_table(differences: Sequence[Compared]) -> str:
    rows = [["task", "score", "first minus second", "difference [95 %]", "0"]]
    for row in differences:
        interval = f"{row.difference.interval.mean:+.3f}"
        if row.difference.interval.cases > 1:
            interval += f" [{row.difference.interval.low:+.3f}, {row.difference.interval.high:+.3f}]"
        rows.append([row.task, row.score, f"{row.first} - {row.second}", interval, row.difference.verdict])
    return "## Paired differences\n\n" + _markdown(rows)


def _as_json(
    kernel: Sequence[KernelRow],
    contrast: ContrastResult | None,
    pixels: Sequence[PixelResult],
    differences: Sequence[Compared],
) -> dict[str, Any]:
    return {
        "kernel_distance": [asdict(row) for row in kernel],
        "contrast": {
            kind: {name: _scores_as_json(scores) for name, scores in methods.items()}
            for kind, methods in (contrast.scores if contrast else {}).items()
        },
        "pixels": [
            {"test": result.test, "labeled_patients": result.patients, "dice": _finite(result.scores)}
            for result in pixels
        ],
        "differences": [
            {
                "task": row.task,
                "score": row.score,
                "first": row.first,
                "second": row.second,
                **_finite(asdict(row.difference.interval)),
                "excludes_zero": row.difference.excludes_zero,
                "verdict": row.difference.verdict,
            }
            for row in differences
        ],
    }


def _scores_as_json(scores: ClassifierScores) -> dict[str, Any]:
    found: dict[str, Any] = {"patients": scores.patients, "slices": scores.slices}
    for name in ("auroc", "accuracy"):
        values = getattr(scores, name)
        low, high = np.nanpercentile(values[1:], [2.5, 97.5])
        found[name] = _finite({"value": float(values[0]), "low": float(low), "high": float(high)})
    return found | {"members": _finite([list(member) for member in scores.members])}


def _finite(value: Any) -> Any:
    """JSON knows no nan: what has no value is null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- pictures --------------------------------------------------------------------------------------------------------


def _gray(hu: np.ndarray, window: str) -> np.ndarray:
    shown = (hu.astype(np.float32) - WINDOWS[window].level) / WINDOWS[window].width + 0.5
    return np.rint(255 * shown.clip(0, 1)).astype(np.uint8)


def _sheet(sets: Mapping[str, SliceSet], window: str) -> Image.Image:
    """A row per set, slices evenly picked."""
    sheet = Image.new("RGB", (_ACROSS * SIDE, len(sets) * SIDE))
    for row, (name, slices) in enumerate(sets.items()):
        for column, number in enumerate(np.linspace(0, len(slices) - 1, _ACROSS).astype(int)):
            sheet.paste(Image.fromarray(_gray(slices.middle[number], window)), (column * SIDE, row * SIDE))
        synthetic = "" if name.startswith("real") else "SYNTHETIC, "
        draw_text(sheet, (8, row * SIDE + 8), f"{synthetic}{name}", 22, "lt")
    return sheet


def _lobe_sheet(pictures: Sequence[PixelPicture]) -> Image.Image:
    """A row per test, the truth first."""
    tests = list(dict.fromkeys(picture.test for picture in pictures))
    across = 1 + max(sum(picture.test == test for picture in pictures) for test in tests)
    sheet = Image.new("RGB", (across * SIDE, len(tests) * SIDE))
    for row, test in enumerate(tests):
        mine = [picture for picture in pictures if picture.test == test]
        panels = [("labels", mine[0].labels)] + [(picture.method, picture.found) for picture in mine]
        for column, (name, labels) in enumerate(panels):
            sheet.paste(_overlay(mine[0].hu, labels), (column * SIDE, row * SIDE))
            draw_text(sheet, (column * SIDE + 6, row * SIDE + 6), f"{test}: {name}", 13, "lt")
    return sheet


def _overlay(hu: np.ndarray, labels: np.ndarray) -> Image.Image:
    step = SIDE // len(labels)
    full = np.kron(labels, np.ones((step, step), np.uint8)) if step > 1 else labels
    picture = np.repeat(_gray(hu, "lung")[..., None], 3, axis=2).astype(np.float32)
    for code in Lobe:
        mine = full == code
        picture[mine] = 0.5 * picture[mine] + 0.5 * np.array(_COLORS[code], np.float32)
    picture[full == IGNORE] *= 0.5
    return Image.fromarray(picture.astype(np.uint8))


def _chart(differences: Sequence[Compared], first: str) -> Image.Image:
    """Differences of the first method to the others, with their intervals."""
    rows = [row for row in differences if row.first == first and row.difference.interval.cases > 1]
    left, width, line = 760, 520, 24
    chart = Image.new("RGB", (left + width + 40, line * (len(rows) + 3)), (255, 255, 255))
    draw = ImageDraw.Draw(chart)
    ends = [abs(end) for row in rows for end in (row.difference.interval.low, row.difference.interval.high)]
    reach = max([*ends, 0.05]) * 1.05

    def x(value: float) -> float:
        return left + (value / reach + 1) / 2 * width

    draw.line((x(0), line, x(0), line * (len(rows) + 2)), fill=(150, 150, 150))
    for tick in (-reach, 0.0, reach):
        _write(chart, (int(x(tick)), line // 2), f"{tick:+.2f}" if tick else "0", "mm")
    for n, row in enumerate(rows):
        y, interval = line * (n + 2), row.difference.interval
        color = (30, 100, 180) if row.difference.excludes_zero else (130, 130, 130)
        _write(chart, (left - 12, y), f"{row.task}, {row.score}: {first} - {row.second}", "rm")
        draw.line((x(interval.low), y, x(interval.high), y), fill=color, width=3)
        draw.ellipse((x(interval.mean) - 5, y - 5, x(interval.mean) + 5, y + 5), fill=color)
    return chart


def _write(chart: Image.Image, at: tuple[int, int], text: str, anchor: str) -> None:
    draw_text(chart, at, text, 14, anchor, (0, 0, 0), (255, 255, 255))
