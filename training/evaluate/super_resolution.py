"""Super-resolution, measured: real slices made coarse by area means, and made fine again by every method.

    python -m training.evaluate.super_resolution --factor 4 --slices eight --out output/super_resolution
    python -m training.evaluate.super_resolution --direction slices --factor 2 --out output/thin_slices

The coarse slice is exactly the operator's that the methods know, as in the zero-shot literature: a scanner's own coarse
reconstruction has another kernel and noise. In plane the slices are single ones, so that the backbone's channels of
neighbors hold the slice itself. Thick slices are means of touching thin ones of a volume; of five thick ones the thin
ones of the middle one are scored.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.export.slices import draw_text
from LCTfoundLib.networks.foundation import FoundationModel, load_foundation
from LCTfoundLib.networks.null_space import NullSpaceSettings
from LCTfoundLib.runtime.files import output_errors
from LCTfoundLib.tasks.super_resolution import (
    FACTORS,
    Direction,
    Method,
    SuperResolutionRequest,
    coarse_volume,
    interpolated,
    super_resolve,
)
from LCTfoundLib.volume import Volume
from training.evaluate.cases import DEFAULT_DATA
from training.evaluate.command import command
from training.evaluate.image_metrics import METRICS, RANGE, Metric, score_slice
from training.evaluate.reconstruction_slices import (
    ReconstructionSlice,
    SliceChoice,
    read_slices,
    read_stacks,
)
from training.evaluate.statistics import compare_paired

__all__ = ["MEASURES", "METHODS", "Answer", "Row", "Stack", "evaluate", "main", "table"]

#: Columns of the table.
MEASURES: dict[str, Metric] = {key: m for key, m in METRICS.items() if m.measure is not None} | {
    "residual": Metric("RMS of Ax - y (HU)", 4, False, None),
    "covered": Metric("share inside its interval", 3, True, None),
}

#: Thick slices of a stack, of which the middle one is scored.
_THICK = 5
_TILE = 384
#: HU shown black and white.
_WINDOW = (-1000.0, 400.0)


@dataclass(frozen=True)
class Stack:
    """Neighboring slices of a real CT, which are made coarse together.

    Attributes:
        planes: references, from the feet up.
        slice_mm: their distance.
        scored: those that are compared.
    """

    planes: Sequence[ReconstructionSlice]
    slice_mm: float
    scored: range

    @classmethod
    def single(cls, piece: ReconstructionSlice) -> Stack:
        return cls([piece], 1.0, range(1))

    @classmethod
    def thin(cls, planes: Sequence[ReconstructionSlice], slice_mm: float, factor: int) -> Stack:
        """The middle thick slice's thin ones are scored."""
        middle = len(planes) // factor // 2 * factor
        return cls(planes, slice_mm, range(middle, middle + factor))

    @property
    def shown(self) -> ReconstructionSlice:
        """The one that names the stack and is drawn."""
        return self.planes[self.scored[len(self.scored) // 2]]

    @property
    def volume(self) -> Volume:
        pixel = self.planes[0].pixel_mm
        return Volume(np.stack([piece.hu for piece in self.planes]), (pixel, pixel, self.slice_mm))


@dataclass(frozen=True)
class Answer:
    """What a method makes of a coarse stack.

    Attributes:
        hu: (N, H, W), fine.
        interval_hu: of the same size, half of the width that should hold 9 of 10 values; None if it does not say.
        evaluations: of a network.
        provenance: of the method.
    """

    hu: np.ndarray
    interval_hu: np.ndarray | None = None
    evaluations: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One slice by one method; ``scores`` by the keys of ``MEASURES``."""

    slice: str
    patient: str
    method: str
    scores: Mapping[str, float]
    evaluations: int
    seconds: float


#: A method: coarse slices as a volume, and the request that says how a network is used.
Resolver = Callable[[Volume, SuperResolutionRequest, Callable[[Path | None], FoundationModel]], Answer]


def _cubic(coarse: Volume, request: SuperResolutionRequest, load: Any) -> Answer:
    """As the literature's baseline: not made consistent."""
    return Answer(interpolated(torch.from_numpy(coarse.array), request.direction, request.factor).numpy())


def _by_task(method: Method) -> Resolver:
    def resolve(coarse: Volume, request: SuperResolutionRequest, load: Any) -> Answer:
        options = {**vars(request), "method": method}
        found = super_resolve(coarse, SuperResolutionRequest(**options), load=load)
        interval = None if found.interval_hu is None else found.interval_hu.array
        return Answer(found.ct.array, interval, found.evaluations, found.provenance)

    return resolve


METHODS: dict[str, tuple[str, Resolver]] = {
    "cubic": ("cubic", _cubic),
    "consistent": ("cubic, made consistent", _by_task(Method.CUBIC)),
    "null_space": ("null space, backbone", _by_task(Method.NULL_SPACE)),
}


def evaluate(
    stacks: Sequence[Stack],
    methods: Sequence[str],
    request: SuperResolutionRequest,
    load: Callable[[Path | None], FoundationModel] = lambda folder: load_foundation(folder=folder),
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], dict[str, dict[str, Answer]]]:
    """All methods on the same coarse slices.

    Args:
        stacks: references.
        methods: names.
        request: direction, factor, samples, seed, device; the method is set by each.
        load: gives the backbone.
        log: told after each stack.

    Returns:
        A row for each stack and method, and the answers: name of the stack's shown slice -> method -> answer.

    Raises:
        LCTfoundError: a method is not known, or a stack is no multiple of the factor.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise LCTfoundError(f"There is no method {', '.join(unknown)}; choose among {', '.join(METHODS)}.")
    rows: list[Row] = []
    answers: dict[str, dict[str, Answer]] = {}
    for stack in stacks:
        coarse = coarse_volume(stack.volume, request.direction, request.factor)
        shown = stack.shown
        answers[shown.name] = {}
        for name in methods:
            begin = time.perf_counter()
            answer = METHODS[name][1](coarse, request, load)
            seconds = (time.perf_counter() - begin) / len(stack.planes)
            scores = _scores(stack, coarse, answer, request)
            rows.append(Row(shown.name, shown.patient, name, scores, answer.evaluations, seconds))
            answers[shown.name][name] = answer
        told = ", ".join(f"{row.method} {row.scores['psnr']:.2f} dB" for row in rows[-len(methods) :])
        log(f"{shown.name}: {told}")
    return rows, answers


def _scores(stack: Stack, coarse: Volume, answer: Answer, request: SuperResolutionRequest) -> dict[str, float]:
    """Means over the scored slices."""
    found = []
    for index in stack.scored:
        piece = stack.planes[index]
        scores = score_slice(piece.hu, answer.hu[index], piece.body, piece.pixel_mm)
        if answer.interval_hu is not None:
            inside = np.abs(answer.hu[index] - piece.hu) <= answer.interval_hu[index]
            scores["covered"] = float(inside[piece.body].mean())
        found.append(scores)
    again = coarse_volume(stack.volume.with_array(answer.hu), request.direction, request.factor)
    residual = float(np.sqrt(np.mean((again.array - coarse.array) ** 2)))
    return {key: float(np.mean([scores[key] for scores in found])) for key in found[0]} | {"residual": residual}


# -- what is told ----------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean and deviation over slices; below, each method against the first over patients' means."""
    names = list(dict.fromkeys(row.method for row in rows))
    keys = [key for key in MEASURES if any(key in row.scores for row in rows)]
    lines = [["method", *(MEASURES[key].name for key in keys), "network evaluations", "s a slice (median)"]]
    for name in names:
        mine = [row for row in rows if row.method == name]
        cells = [_spread([row.scores[key] for row in mine if key in row.scores], MEASURES[key].digits) for key in keys]
        lines.append(
            [METHODS[name][0], *cells, str(mine[0].evaluations), f"{np.median([row.seconds for row in mine]):.2f}"]
        )
    parts = [_markdown(lines)]
    for name in names[1:]:
        pair = compare_paired(_per_patient(rows, names[0]), _per_patient(rows, name))
        parts.append(
            f"{METHODS[name][0]} minus {METHODS[names[0]][0]}: PSNR {pair.difference} dB over {pair.cases} patients "
            f"(Wilcoxon p = {pair.p_value:.2g})\n"
        )
    return "\n".join(parts)


def _per_patient(rows: Sequence[Row], method: str) -> list[float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.method == method:
            found.setdefault(row.patient, []).append(row.scores["psnr"])
    return [float(np.mean(values)) for values in found.values()]


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values else "-"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _sheet(stacks: Sequence[Stack], rows: Sequence[Row], answers: Mapping[str, Mapping[str, Answer]]) -> Image.Image:
    """The reference and every method's image, a row for each stack's middle slice."""
    names = list(dict.fromkeys(row.method for row in rows))
    scores = {(row.slice, row.method): row.scores for row in rows}
    sheet = Image.new("RGB", ((1 + len(names)) * _TILE, len(stacks) * _TILE))
    for n, stack in enumerate(stacks):
        piece = stack.shown
        sheet.paste(_gray(piece.hu), (0, n * _TILE))
        draw_text(sheet, (6, n * _TILE + 6), f"reference, {piece.name}", 15, "lt")
        for column, name in enumerate(names, start=1):
            score = scores[piece.name, name]
            level = stack.planes.index(piece)
            sheet.paste(_gray(answers[piece.name][name].hu[level]), (column * _TILE, n * _TILE))
            told = f"{METHODS[name][0]}: {score['psnr']:.1f} dB, SSIM {score['ssim']:.3f}"
            draw_text(sheet, (column * _TILE + 6, n * _TILE + 6), told, 15, "lt")
    return sheet


def _gray(hu: np.ndarray) -> Image.Image:
    low, high = _WINDOW
    picture = Image.fromarray(np.rint(255 * ((hu - low) / (high - low)).clip(0, 1)).astype(np.uint8))
    return picture.resize((_TILE, _TILE), Image.Resampling.NEAREST)


def _write(
    folder: Path,
    text: str,
    stacks: Sequence[Stack],
    rows: Sequence[Row],
    answers: Mapping[str, Mapping[str, Answer]],
) -> None:
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.md").write_text(text, encoding="utf-8")
        with (folder / "slices.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["slice", "patient", "method", *MEASURES, "evaluations", "seconds"])
            for row in rows:
                scores = [row.scores.get(key, "") for key in MEASURES]
                writer.writerow([row.slice, row.patient, row.method, *scores, row.evaluations, row.seconds])
        told = {name: answer.provenance for name, answer in answers[stacks[0].shown.name].items()}
        (folder / "provenance.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        _sheet(stacks[:4], rows, answers).save(folder / "sheet.png")


# -- the command -----------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Super-resolution, measured on real slices.")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--direction", type=Direction, choices=list(Direction), default=Direction.IN_PLANE)
    parser.add_argument("--factor", type=int, default=4, choices=list(FACTORS))
    parser.add_argument("--size", type=int, default=256, help="pixels of a side of the fine slices")
    parser.add_argument("--slices", type=SliceChoice, choices=list(SliceChoice), default=SliceChoice.TEST)
    parser.add_argument("--only", type=int, help="that many slices, evenly picked, for a quick look")
    parser.add_argument("--samples", type=int, default=SuperResolutionRequest.samples)
    parser.add_argument("--steps", type=int, default=NullSpaceSettings.steps)
    parser.add_argument("--first", type=int, default=NullSpaceSettings.first, help="timestep to begin at")
    parser.add_argument("--fresh", type=float, default=NullSpaceSettings.fresh, help="share of noise drawn anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--weights", type=Path, help="other folder of the weights")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("output/super_resolution"))
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, log: Callable[[str], None]) -> str:
    request = SuperResolutionRequest(
        direction=options.direction,
        factor=options.factor,
        samples=options.samples,
        sampling=NullSpaceSettings(options.steps, options.first, options.fresh),
        seed=options.seed,
        device=options.device,
        weights_folder=options.weights,
    )
    stacks, missing = _stacks(options)
    for reason in missing:
        log(f"left out: {reason}")
    if options.only is not None:
        picked = np.linspace(0, len(stacks) - 1, min(options.only, len(stacks))).round().astype(int)
        stacks = [stacks[n] for n in picked]
    if not stacks:
        raise LCTfoundError(f"There is no slice to work on ({'; '.join(missing)}).")
    rows, answers = evaluate(stacks, options.methods.split(","), request, log=log)
    where = "in plane"
    if options.direction is Direction.SLICES:
        thin = sorted({stack.slice_mm for stack in stacks})
        where = f"along the patient (to slices of {', '.join(f'{step:.3g}' for step in thin)} mm)"
    text = (
        f"Super-resolution x{options.factor} {where}, {len(stacks)} places ({options.slices}) of {options.size} "
        f"pixels, patients that no weight was trained on unless the slices are those for tuning. HU inside the body, "
        f"clipped to {RANGE.low:g}..{RANGE.high:g}.\n\n{table(rows)}"
        + "".join(f"\nLeft out: {reason}\n" for reason in missing)
    )
    _write(options.out, text, stacks, rows, answers)
    return text


def _stacks(options: argparse.Namespace) -> tuple[list[Stack], list[str]]:
    if options.direction is Direction.IN_PLANE:
        slices, missing = read_slices(options.slices, options.size, options.data)
        return [Stack.single(piece) for piece in slices], missing
    found, missing = read_stacks(options.slices, options.size, _THICK * options.factor, options.data)
    return [Stack.thin(planes, slice_mm, options.factor) for planes, slice_mm in found], missing


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with command() as log:
        print(_run(options, log))
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
