"""Tables of scores: Markdown for the reader, CSV and JSON for the machine."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.evaluate.scoring import HEADLINES, Scores
from training.evaluate.statistics import Interval, bootstrap, compare_paired

__all__ = ["SetResult", "comparison_table", "score_table", "write_report"]


@dataclass
class SetResult:
    """Scores of several methods on the cases of one test set.

    Attributes:
        name: of the set.
        scores: method -> case -> scores.
        skipped: what was left out, with the reason.
        apart: the cases are of different kinds, with different truths; they get a table each and no average.
    """

    name: str
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    apart: bool = False

    def parts(self) -> list[SetResult]:
        """Itself, or one result per case where cases stand apart."""
        if not self.apart:
            return [self]
        names = dict.fromkeys(case for cases in self.scores.values() for case in cases)
        return [
            SetResult(
                f"{self.name} {name}",
                {method: {name: cases[name]} for method, cases in self.scores.items() if name in cases},
            )
            for name in names
        ]

    def intervals(self, method: str) -> dict[tuple[str, str], Interval]:
        """Each score's mean with its bootstrap interval over cases."""
        cases = self.scores[method].values()
        keys = dict.fromkeys(key for scores in cases for key in scores)
        return {key: bootstrap([scores.get(key, math.nan) for scores in cases]) for key in keys}


def score_table(result: SetResult, method: str) -> str:
    """Markdown table of a method on a set: a row per structure, a column per measure."""
    intervals = {key: interval for key, interval in result.intervals(method).items() if interval.cases}
    measures = list(dict.fromkeys(measure for _, measure in intervals))
    structures = list(dict.fromkeys(structure for structure, _ in intervals))
    rows = [["structure", *measures]]
    for structure in structures:
        cells = [intervals.get((structure, measure)) for measure in measures]
        rows.append([structure, *("" if cell is None else str(cell) for cell in cells)])
    title = f"### {result.name}: {method}, {len(result.scores[method])} cases\n\n"
    return title + _markdown(rows)


def comparison_table(result: SetResult, first: str, second: str) -> str:
    """Markdown table of the headline scores of two methods with Wilcoxon's p over the common cases."""
    common = [case for case in result.scores[first] if case in result.scores[second]]
    rows = [["structure", "measure", first, second, "difference", "p (Wilcoxon)", "cases"]]
    for key in HEADLINES:
        columns = [[result.scores[m][case].get(key, math.nan) for case in common] for m in (first, second)]
        comparison = compare_paired(*columns)
        if comparison.cases:
            p = "-" if math.isnan(comparison.p_value) else f"{comparison.p_value:.3g}"
            means = [f"{bootstrap(column).mean:.3f}" for column in columns]
            rows.append([*key, *means, str(comparison.difference), p, str(comparison.cases)])
    return f"### {result.name}: {second} against {first}\n\n" + _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as an aligned Markdown table; the first one is the header."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def write_report(
    folder: Path, results: Sequence[SetResult], pairs: Sequence[tuple[str, str]], provenance: Mapping[str, Any]
) -> str:
    """Write ``scores.json``, ``scores.csv`` and ``scores.md`` into a folder; returns the Markdown text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _text(results, pairs)
    (folder / "scores.md").write_text(text, encoding="utf-8")
    (folder / "scores.json").write_text(
        json.dumps({"provenance": dict(provenance), "sets": [_as_json(r) for r in results]}, indent=1), encoding="utf-8"
    )
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "method", "case", "structure", "measure", "value"])
        for result in results:
            for method, cases in result.scores.items():
                for case, scores in cases.items():
                    writer.writerows([result.name, method, case, *key, value] for key, value in scores.items())
    return text


def _text(results: Sequence[SetResult], pairs: Sequence[tuple[str, str]]) -> str:
    parts = ["Mean over cases [95 % bootstrap interval over cases].\n"]
    for result in results:
        for part in result.parts():
            parts += [score_table(part, method) for method, cases in part.scores.items() if cases]
            parts += [
                comparison_table(part, first, second)
                for first, second in pairs
                if part.scores.get(first) and part.scores.get(second)
            ]
        parts += [f"{result.name}: left out {reason}\n" for reason in result.skipped]
    return "\n".join(parts)


def _as_json(result: SetResult) -> dict[str, Any]:
    """JSON knows no nan: what has no value is null."""
    return {
        "name": result.name,
        "skipped": result.skipped,
        "methods": {
            method: {
                "cases": {case: _nested(scores) for case, scores in cases.items()},
                "mean": _nested({key: asdict(value) for key, value in result.intervals(method).items()}),
            }
            for method, cases in result.scores.items()
        },
    }


def _nested(scores: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for (structure, measure), value in scores.items():
        table.setdefault(structure, {})[measure] = _clean(value)
    return table


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
