"""Intervals and tests over cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["Comparison", "Interval", "bootstrap", "compare_paired", "holm", "mean_over_seeds"]


@dataclass(frozen=True)
class Interval:
    """A mean over cases with its bootstrap interval.

    Attributes:
        mean: over the cases that have the value; ``nan`` without cases.
        low, high: percentile interval of the resampled mean; equal to the mean for a single case.
        cases: number of cases that have the value.
    """

    mean: float
    low: float
    high: float
    cases: int

    def __str__(self) -> str:
        if self.cases == 0:
            return "-"
        if self.cases == 1:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: Sequence[float], level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Interval:
    """Mean of one value per case with a percentile bootstrap interval over cases (Efron 1979).

    ``nan`` values (structure absent in the case) are left out. With few cases the interval is too narrow; the number
    of cases stands beside it for that reason.
    """
    known = np.asarray([v for v in values if not np.isnan(v)], dtype=float)
    if known.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(known.mean())
    if known.size == 1 or np.isinf(known).any():
        return Interval(mean, mean, mean, int(known.size))
    picks = np.random.default_rng(seed).integers(0, known.size, (resamples, known.size))
    tail = 50 * (1 - level)
    low, high = np.percentile(known[picks].mean(axis=1), [tail, 100 - tail])
    return Interval(mean, float(low), float(high), int(known.size))


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same cases.

    Attributes:
        difference: mean of (second - first), with its bootstrap interval.
        p_value: two-sided Wilcoxon signed-rank test; ``nan`` when it cannot be computed (no difference, one case).
        cases: number of cases both methods have.
    """

    difference: Interval
    p_value: float
    cases: int


def compare_paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Wilcoxon signed-rank test of two methods over cases given in the same order."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if np.isfinite(a) and np.isfinite(b)]
    differences = np.array([b - a for a, b in pairs])
    interval = bootstrap(differences.tolist(), seed=seed)
    if len(pairs) < 2 or not differences.any():
        return Comparison(interval, float("nan"), len(pairs))
    return Comparison(interval, float(stats.wilcoxon(differences).pvalue), len(pairs))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's step-down procedure (Scand. J. Statist. 6 (1979) 65).

    ``nan`` (a test that could not be made) stays and counts for nothing.
    """
    values = np.asarray(p_values, dtype=float)
    adjusted = np.full(values.shape, np.nan)
    order = [n for n in np.argsort(values) if not np.isnan(values[n])]
    largest = 0.0
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * float(values[n])))
        adjusted[n] = largest
    return adjusted.tolist()


def mean_over_seeds(values: Sequence[Sequence[float]]) -> list[float]:
    """Per case the mean over trainings that differ in their seed: (seeds, cases) -> (cases).

    Cases are the unit of the test; three trainings of one recipe are no three cases. ``nan`` only where all are.
    """
    table = np.asarray(values, dtype=float)
    known = ~np.isnan(table)
    counts = known.sum(axis=0)
    sums = np.where(known, table, 0.0).sum(axis=0)
    return [float(s / c) if c else float("nan") for s, c in zip(sums, counts, strict=True)]
