"""How good is the report classifier? On annotated reports, against TF-IDF with logistic regression.

    python -m training.curation.evaluate_reports REPORTS.csv [--test 200] [--seed 0] [--rounds]

The CSV has an id, the report and a column of 0 and 1 for each label. Nothing learned is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from LCTfoundLib.errors import LCTfoundError
from training.curation.__main__ import read_annotated
from training.curation.errors import MissingPackage, UnsuitableAnnotation
from training.curation.reports.entities import DISEASES, FINDINGS
from training.curation.reports.heads import LearnedClassifier, RuleClassifier, confidence
from training.curation.reports.learning import annotation_rounds

__all__ = ["FINDING_OF_LABEL", "Scores", "baseline", "findings_of", "main", "scores"]

#: Labels of other vocabularies -> findings of the extractor, where they mean the same.
FINDING_OF_LABEL = {
    "medical material": "medical material",
    "arterial wall calcification": "arterial calcification",
    "coronary artery wall calcification": "coronary calcification",
    "mosaic attenuation pattern": "mosaic attenuation",
}


def findings_of(labels: Sequence[str]) -> dict[str, str]:
    """The finding of each label that has one."""
    names = {label: FINDING_OF_LABEL.get(label.lower(), label.lower()) for label in labels}
    return {label: name for label, name in names.items() if name in FINDINGS}


@dataclass(frozen=True)
class Scores:
    """Of reports that were not learned from.

    Attributes:
        auroc: (labels,); NaN for a label that all or none of the reports have.
        accuracy: share of labels decided right, at 0.5.
        coverage, accuracy_there: labels with p or 1-p above the gate: their share, and how many of them are right.
        report_coverage, report_accuracy: reports with all labels above the gate: their share, and the share of their
            labels that are right.
        calibration: expected calibration error of p, in ten bins.
    """

    auroc: np.ndarray
    accuracy: float
    coverage: float
    accuracy_there: float
    report_coverage: float
    report_accuracy: float
    calibration: float

    def __str__(self) -> str:
        return (
            f"mean AUROC {np.nanmean(self.auroc):.4f}, accuracy {self.accuracy:.4f}, above the gate "
            f"{self.coverage:.3f} of labels ({self.accuracy_there:.4f} right) and {self.report_coverage:.3f} of "
            f"reports ({self.report_accuracy:.4f} of their labels right), calibration error {self.calibration:.4f}"
        )


def scores(probabilities: np.ndarray, truth: np.ndarray, gate: float = 0.9) -> Scores:
    """Scores of (reports, labels)."""
    right = (probabilities > 0.5) == truth
    sure = np.maximum(probabilities, 1 - probabilities) > gate
    reports = confidence(probabilities) > gate
    bins = np.minimum((probabilities * 10).astype(int), 9)
    gaps = [abs((probabilities - truth)[bins == b].sum()) for b in range(10)]
    return Scores(
        np.array([_auroc(p, y) for p, y in zip(probabilities.T, truth.T, strict=True)]),
        float(right.mean()),
        float(sure.mean()),
        float(right[sure].mean()) if sure.any() else float("nan"),
        float(reports.mean()),
        float(right[reports].mean()) if reports.any() else float("nan"),
        float(sum(gaps) / truth.size),
    )


def _auroc(values: np.ndarray, truth: np.ndarray) -> float:
    """Share of pairs in the right order; ties count half."""
    from scipy.stats import rankdata

    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    return float((rankdata(values)[truth == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def baseline(texts: Sequence[str], truth: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """TF-IDF of words and pairs of words with logistic regression, as scikit-learn has it."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MissingPackage("The baseline needs scikit-learn; install the extra 'training'.") from error
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    known, new = words.fit_transform(texts), words.transform(test)
    with threadpool_limits(1):
        heads = [LogisticRegression(C=10, max_iter=1000).fit(known, column) for column in truth.T]
        return np.stack([head.predict_proba(new)[:, 1] for head in heads], axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("reports", type=Path)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", action="store_true", help="also three rounds of annotation, least sure and random")
    options = parser.parse_args(arguments)
    try:
        _evaluate(options)
    except LCTfoundError as error:
        print(f"evaluate_reports: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    texts, labels = read_annotated(options.reports)
    if not 0 < options.test < len(texts):
        raise UnsuitableAnnotation(f"There are {len(texts)} reports; keep fewer than that for --test.")
    order = np.random.default_rng(options.seed).permutation(len(texts))
    pool, held = order[options.test :].tolist(), order[: options.test].tolist()
    names = list(labels[0])
    truth = np.array([[report[name] for name in names] for report in labels])
    pool_texts, held_texts = [texts[n] for n in pool], [texts[n] for n in held]
    findings = findings_of(names)

    plain = scores(baseline(pool_texts, truth[pool], held_texts), truth[held])
    print(f"TF-IDF + logistic regression, {len(pool)} reports: {plain}", flush=True)
    ruled = [name for name in names if findings.get(name) in DISEASES]
    told = RuleClassifier()(held_texts)
    table = np.array([[report.probabilities[findings[name]] for name in ruled] for report in told])
    columns = [names.index(name) for name in ruled]
    if ruled:
        print(f"rules alone, {', '.join(ruled)}: {scores(table, truth[held][:, columns])}", flush=True)
    classifier = LearnedClassifier.learn(pool_texts, [labels[n] for n in pool], findings)
    ours = scores(classifier.probabilities(held_texts), truth[held])
    print(f"three modules, {len(pool)} reports: {ours}", flush=True)
    for name, a, b in zip(names, plain.auroc, ours.auroc, strict=True):
        print(f"  {name:<40}{a:7.3f}{b:7.3f}")
    if options.rounds:
        _rounds(pool, pool_texts, labels, findings, held_texts, truth[held], options.seed)


def _rounds(
    pool: Sequence[int],
    texts: Sequence[str],
    labels: Sequence[Mapping[str, int]],
    findings: Mapping[str, str],
    held: Sequence[str],
    truth: np.ndarray,
    seed: int,
) -> None:
    step = len(pool) // 5  # so that something is left to choose from in the last round
    for at_random in (False, True):
        print("reports drawn at random:" if at_random else "the least sure reports annotated:")
        rounds = annotation_rounds(
            texts, lambda places: [labels[pool[n]] for n in places], step, step, 3, findings, seed, at_random
        )
        for number, item in enumerate(rounds, 1):
            found = scores(item.classifier.probabilities(held), truth)
            print(f"  round {number}, {len(item.annotated)} reports: {found}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
