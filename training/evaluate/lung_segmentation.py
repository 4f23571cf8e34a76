"""Measure lung segmentation on the frozen test sets.

    python -m training.evaluate.lung_segmentation                                # shipped weights, all sets
    python -m training.evaluate.lung_segmentation --baseline                     # with the classical baseline beside
    python -m training.evaluate.lung_segmentation --sets real --quality full
    python -m training.evaluate.lung_segmentation --weights runs/a0 runs/a1 runs/a2 --compare runs/b0 runs/b1 runs/b2

Several folders after ``--weights`` or ``--compare`` are trainings of one recipe with different seeds: their scores are
averaged per case before intervals and tests, because cases, not trainings, are what the sets sample.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import LCTfoundLib
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.volume import Volume
from training.evaluate.cases import DEFAULT_DATA, MANIFEST, CaseSource, TestSet, seeds, sources
from training.evaluate.classical import SegmentAtlas, build_atlas, segment_classically
from training.evaluate.command import Log
from training.evaluate.report import SetResult, write_report
from training.evaluate.scoring import Case, Prediction, Scores, score_case
from training.evaluate.statistics import mean_over_seeds

__all__ = ["evaluate_set", "main"]

Predictor = Callable[[Volume], Prediction]

ATLAS_PHANTOMS = 16
BASELINE, WEIGHTS, COMPARED = "classical baseline", "weights", "compared weights"


def classical_predictor(atlas_file: Path, log: Log) -> Predictor:
    """The baseline; its atlas is made from training phantoms the first time and kept in ``atlas_file``."""
    if atlas_file.is_file():
        atlas = SegmentAtlas.load(atlas_file)
    else:
        from training.evaluate.cases import phantom_territories

        log(f"making the atlas of {ATLAS_PHANTOMS} training phantoms")
        atlas = build_atlas(phantom_territories(seed) for seed in seeds("train")[:ATLAS_PHANTOMS])
        atlas.save(atlas_file)

    def predict(ct: Volume) -> Prediction:
        result = segment_classically(ct, atlas)
        return Prediction(result.segments.array, result.trees.array)

    return predict


def net_predictor(weights: Path | None, quality: str, device: str) -> Predictor:
    """The engine with the weights of a folder; None means the shipped ones."""
    from LCTfoundLib.tasks.lung_segmentation import LungRequest, Quality, segment_lungs

    request = LungRequest(quality=Quality(quality), device=device, weights_folder=weights)

    def predict(ct: Volume) -> Prediction:
        result = segment_lungs(ct, request)
        return Prediction(result.segments.array, result.trees.array, result.graphs)

    return predict


def evaluate_set(
    test_set: TestSet, cases: Iterable[CaseSource], methods: dict[str, list[Predictor]], log: Log
) -> SetResult:
    """Score every method on every case; a method with several predictors gets their mean per case."""
    result = SetResult(test_set.value, {name: {} for name in methods}, apart=test_set is TestSet.REAL)
    for source in cases:
        if source.missing:
            result.skipped.append(f"{source.name}: {source.missing}")
            continue
        try:
            case = source.load()
        except LCTfoundError as error:
            result.skipped.append(f"{source.name}: {error}")
            continue
        for name, predictors in methods.items():
            runs = [_run(case, predictor) for predictor in predictors]
            result.scores[name][case.name] = _mean_scores(runs)
            log(f"{test_set.value} {case.name} {name}: {runs[0]['Run', 'seconds']:.0f} s")
    return result


def _run(case: Case, predictor: Predictor) -> Scores:
    """Scores of one prediction. A method that refuses a case found nothing in it: that must not raise its mean."""
    begin = time.monotonic()
    try:
        prediction = predictor(case.ct)
    except LCTfoundError:
        nothing = np.zeros(case.ct.shape, dtype=np.uint8)
        prediction = Prediction(nothing, nothing)
    prediction.seconds = time.monotonic() - begin
    return score_case(case, prediction)


def _mean_scores(runs: Sequence[Scores]) -> Scores:
    keys = list(dict.fromkeys(key for run in runs for key in run))
    means = mean_over_seeds([[run.get(key, float("nan")) for key in keys] for run in runs])
    return dict(zip(keys, means, strict=True))


def _methods(options: argparse.Namespace, log: Log) -> tuple[dict[str, list[Predictor]], list[tuple[str, str]]]:
    """Predictors by name, and the pairs of names to test against each other."""
    methods: dict[str, list[Predictor]] = {}
    pairs: list[tuple[str, str]] = []
    if options.baseline or options.baseline_only:
        methods[BASELINE] = [classical_predictor(options.out / "atlas.npz", log)]
    if not options.baseline_only:
        folders = options.weights or [None]
        methods[WEIGHTS] = [net_predictor(folder, options.quality, options.device) for folder in folders]
    if options.compare:
        methods[COMPARED] = [net_predictor(folder, options.quality, options.device) for folder in options.compare]
        pairs.append((COMPARED, WEIGHTS))
    if BASELINE in methods and WEIGHTS in methods:
        pairs.append((BASELINE, WEIGHTS))
    return methods, pairs


def _provenance(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "version": LCTfoundLib.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "split_manifest_sha256": hashlib.sha256(MANIFEST.read_bytes()).hexdigest(),
        "weights": [str(folder) for folder in options.weights or ["shipped"]],
        "compare": [str(folder) for folder in options.compare or []],
        "quality": options.quality,
        "device": options.device,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure lung segmentation on the frozen test sets.")
    parser.add_argument("--sets", default=",".join(s.value for s in TestSet), help="comma-separated")
    parser.add_argument("--cases", type=int, help="no more than this many of each set")
    parser.add_argument(
        "--weights", type=Path, nargs="+", help="weight folders (seeds of one recipe); default: shipped"
    )
    parser.add_argument("--compare", type=Path, nargs="+", help="weight folders to compare with")
    parser.add_argument("--baseline", action="store_true", help="also run the classical baseline")
    parser.add_argument("--baseline-only", action="store_true", help="run nothing but the classical baseline")
    parser.add_argument("--quality", default="standard", choices=["fast", "standard", "full"])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("output/evaluation"))
    options = parser.parse_args(arguments)
    try:
        options.sets = [TestSet(name) for name in options.sets.split(",")]
    except ValueError as error:
        parser.error(f"{error}; the sets are {', '.join(s.value for s in TestSet)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)

    def log(line: str) -> None:
        print(line, flush=True)

    methods, pairs = _methods(options, log)
    results = [
        evaluate_set(test_set, list(sources(test_set, options.data))[: options.cases], methods, log)
        for test_set in options.sets
    ]
    print(write_report(options.out, results, pairs, _provenance(options)))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
