"""Linear probes on frozen features, split by patient, and paired intervals of their differences.

A probe asks what a linear model can read from features that nobody tunes for the task. Its only choice, the strength
of the regularization, is made by inner folds over the training patients.

Intervals are percentile bootstraps over patients (Efron, 1979): all slices of a patient are drawn together, and both
methods on the same draws. They tell how far other patients might change the difference; that other training patients
would give other probes is not in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from training.evaluate.statistics import Interval

__all__ = [
    "DRAWS",
    "ClassifierScores",
    "Difference",
    "PixelProbe",
    "Weighted",
    "auroc",
    "cross_validated",
    "paired_difference",
    "paired_means",
    "patient_folds",
    "score_classifier",
]

DRAWS = 10_000
#: With fewer patients even differences that all point one way come by chance more often than 1 in 20 (2 / 2^5).
_FEWEST_PATIENTS = 6

#: Inverse regularization strengths on standardized features whose kernel has a mean diagonal of 1.
_SLICE_STRENGTHS = tuple(10.0**power for power in range(-3, 5))
#: The same for pixels, on standardized features. With one training patient the best lung Dice of gray values needs 100
#: (0.91; 0.77 at 0.01); above that nothing changes any more.
_PIXEL_STRENGTHS = tuple(10.0**power for power in range(-3, 3))


# -- differences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """First method minus second, on the same patients.

    Attributes:
        interval: mean and 95 % interval.
    """

    interval: Interval

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; never with fewer than 6 patients, of whom no interval can tell."""
        return self.interval.cases >= _FEWEST_PATIENTS and (self.interval.low > 0 or self.interval.high < 0)

    @property
    def verdict(self) -> str:
        """In words."""
        if self.interval.cases < _FEWEST_PATIENTS:
            return "too few patients to tell"
        if not self.excludes_zero:
            return "includes 0"
        return "excludes 0, better" if self.interval.low > 0 else "excludes 0, worse"


def paired_means(first: Sequence[float], second: Sequence[float], draws: int = DRAWS, seed: int = 0) -> Difference:
    """Difference of means over patients, one value each, given in the same order; ``nan`` in either leaves one out."""
    gaps = np.asarray(first, float) - np.asarray(second, float)
    gaps = gaps[np.isfinite(gaps)]
    if len(gaps) == 0:
        return Difference(Interval(float("nan"), float("nan"), float("nan"), 0))
    rng = np.random.default_rng(seed)
    means = gaps[rng.integers(0, len(gaps), (draws, len(gaps)))].mean(axis=1)
    return Difference(_interval(float(gaps.mean()), means, len(gaps)))


class Weighted:
    """AUROC and accuracy of predictions for any weights of the slices; a bootstrap needs them 10,000 times."""

    def __init__(self, probabilities: np.ndarray, labels: np.ndarray) -> None:
        """Set up.

        Args:
            probabilities: (N,) of the positive class.
            labels: bool (N,).
        """
        self._labels = labels
        self._right = (probabilities >= 0.5) == labels
        above = probabilities[labels][:, None] - probabilities[~labels][None]
        self._wins = (above > 0) + 0.5 * (above == 0)

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """(D, N) to (D,): weighted share of pairs in the right order, ties half; ``nan`` for one class."""
        positive, negative = weights[:, self._labels], weights[:, ~self._labels]
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        wins = ((positive @ self._wins) * negative).sum(axis=1)
        return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

    def accuracy(self, weights: np.ndarray) -> np.ndarray:
        """(D, N) to (D,): weighted share of right answers at 0.5."""
        return weights @ self._right / weights.sum(axis=1)


def auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; ``nan`` with one class only."""
    return float(Weighted(probabilities, labels).auroc(np.ones((1, len(labels))))[0])


@dataclass(frozen=True)
class ClassifierScores:
    """A classifier's scores for the slices as they are (row 0) and for each bootstrap draw of patients after it.

    Attributes:
        auroc, accuracy: (1 + draws,), the mean over the members of a method (seeds).
        members: (auroc, accuracy) of each member, for the slices as they are.
        patients, slices: how many.
    """

    auroc: np.ndarray
    accuracy: np.ndarray
    members: tuple[tuple[float, float], ...]
    patients: int
    slices: int


def score_classifier(
    probabilities: Sequence[np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> ClassifierScores:
    """Scores with bootstrap draws.

    Args:
        probabilities: (N,) of each member of a method.
        labels: bool (N,).
        patients: (N,) names; with the same names, draws and seed, the same patients are drawn for every method.
    """
    weights = np.concatenate([np.ones((1, len(labels))), _patient_draws(patients, draws, seed)])
    tables = [Weighted(row, labels) for row in probabilities]
    areas = np.stack([table.auroc(weights) for table in tables])
    shares = np.stack([table.accuracy(weights) for table in tables])
    members = tuple(zip(areas[:, 0].tolist(), shares[:, 0].tolist(), strict=True))
    return ClassifierScores(areas.mean(axis=0), shares.mean(axis=0), members, len(set(patients)), len(labels))


def _patient_draws(patients: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws, N): how often the patient of each slice was drawn."""
    names, member = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, member].astype(float)


def paired_difference(first: np.ndarray, second: np.ndarray, patients: int) -> Difference:
    """From scores of the same draws, (1 + draws,) each, with that of the slices as they are first."""
    gaps = first - second
    return Difference(_interval(float(gaps[0]), gaps[1:], patients))


def _interval(value: float, draws: np.ndarray, cases: int) -> Interval:
    known = draws[np.isfinite(draws)]
    if cases < 2 or len(known) == 0:
        return Interval(value, value, value, cases)
    low, high = np.percentile(known, [2.5, 97.5])
    return Interval(value, float(low), float(high), cases)


# -- a slice: one of two classes -------------------------------------------------------------------------------------


def patient_folds(
    labels: np.ndarray, patients: np.ndarray, folds: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices to train on and to predict, no patient in both, both classes in each as evenly as that allows."""
    count = min(folds, len(set(patients)))
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    yield from splitter.split(np.zeros(len(labels)), labels, patients)


def cross_validated(
    features: np.ndarray, labels: np.ndarray, patients: np.ndarray, folds: int = 10, repeats: int = 3, seed: int = 0
) -> np.ndarray:
    """Probabilities of a logistic regression that never saw the patient.

    Args:
        features: (N, D).
        labels: bool (N,).
        patients: (N,) names.
        folds: over patients; the inner ones for the regularization are 5.
        repeats: with other folds; their probabilities are averaged, so that the luck of one split counts less.

    Returns:
        (N,).
    """
    runs = np.zeros((repeats, len(labels)))
    for repeat in range(repeats):
        for train, test in patient_folds(labels, patients, folds, seed + repeat):
            rows, others = _span(features[train], features[test])
            strength = _slice_strength(rows, labels[train], patients[train], seed)
            runs[repeat, test] = _logistic(rows, labels[train], strength).predict_proba(others)[:, 1]
    return runs.mean(axis=0)


def _span(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardized features on the axes that the training rows span.

    A logistic regression with a penalty on squared weights has none outside of them: the answer is the same with 100
    columns as with 10,000.
    """
    mean, sd = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    used = sd > 1e-9 * np.abs(mean).clip(min=1.0)
    rows, others = (((part - mean) / np.where(used, sd, 1.0))[:, used] for part in (train, test))
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    scale = max(float(used.sum()), 1.0) ** -0.5
    return rows @ axes.T * scale, others @ axes.T * scale


def _slice_strength(rows: np.ndarray, labels: np.ndarray, patients: np.ndarray, seed: int) -> float:
    """The one with the least log loss for patients left out."""
    losses = np.zeros(len(_SLICE_STRENGTHS))
    for train, test in patient_folds(labels, patients, 5, seed):
        for n, strength in enumerate(_SLICE_STRENGTHS):
            found = _logistic(rows[train], labels[train], strength).predict_proba(rows[test])[:, 1]
            losses[n] -= np.log(np.where(labels[test], found, 1 - found).clip(1e-12)).sum()
    return _SLICE_STRENGTHS[int(losses.argmin())]


def _logistic(rows: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000).fit(rows, labels)


# -- a pixel: one of several classes ---------------------------------------------------------------------------------


class PixelProbe:
    """Multinomial logistic regression of a pixel's class on its features."""

    def __init__(self, classes: int) -> None:
        """Set up.

        Args:
            classes: codes 0 to ``classes`` - 1.
        """
        self.classes = classes
        self.strength = float("nan")

    def fit(self, features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> PixelProbe:
        """Train.

        Args:
            features: (N, D).
            labels: (N,) codes.
            groups: (N,) of the inner folds: patients, or slices where one patient is all there is.
        """
        rows = features.astype(np.float32)
        self._mean, self._sd = rows.mean(axis=0), rows.std(axis=0).clip(min=1e-6)
        rows = (rows - self._mean) / self._sd
        self.strength = self._chosen(rows, labels, groups)
        self._model = self._trained(rows, labels, self.strength)
        return self

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, D) to (N, classes); 0 for a class that training did not have."""
        found = self._model.predict_proba((features.astype(np.float32) - self._mean) / self._sd)
        result = np.zeros((len(found), self.classes))
        result[:, self._model.classes_.astype(int)] = found
        return result

    def _chosen(self, rows: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
        losses = np.zeros(len(_PIXEL_STRENGTHS))
        for train, test in GroupKFold(min(3, len(set(groups)))).split(rows, labels, groups):
            for n, strength in enumerate(_PIXEL_STRENGTHS):
                model = self._trained(rows[train], labels[train], strength)
                found = model.predict_proba(rows[test])
                place = np.searchsorted(model.classes_, labels[test]).clip(max=len(model.classes_) - 1)
                known = model.classes_[place] == labels[test]
                right = np.where(known, found[np.arange(len(test)), place], 0.0)
                losses[n] -= np.log(right.clip(1e-6)).sum()
        return _PIXEL_STRENGTHS[int(losses.argmin())]

    def _trained(self, rows: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=500).fit(rows, labels)
