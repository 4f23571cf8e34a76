"""Class heads: from the assertions of a report (and its words) to calibrated probabilities of labels."""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from LCTfoundLib.runtime.files import atomic_path
from training.curation.errors import MissingPackage, UnsuitableAnnotation
from training.curation.reports.entities import DISEASES, FINDINGS, NO_DISEASE, clauses
from training.curation.reports.relations import Assertion, RelationModel, assertions, links_from_labels
from training.curation.stages import ReportLabels

__all__ = ["LearnedClassifier", "RuleClassifier", "confidence"]

_WORDS = re.compile(r"[a-z]+|\d+|[\u4e00-\u9fff?]", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:no|not|without|normal|natural|open)\b|未|无|正常", re.IGNORECASE)
_PER_FINDING = 4
_FORMAT = 1


def confidence(probabilities: np.ndarray) -> np.ndarray:
    """(reports,) how sure it is that the least sure label is decided right, of (reports, labels)."""
    return np.maximum(probabilities, 1 - probabilities).min(axis=1)


class RuleClassifier:
    """The paper's 14 diseases and *no disease* by rules alone, for a site without annotated reports.

    A finding that is affirmed in one place counts as there, one in doubt leaves the report unsure. The probabilities
    are those of the rules' certainty, not calibrated.
    """

    labels: tuple[str, ...] = (*DISEASES, NO_DISEASE)

    def __init__(self, relations: RelationModel | None = None) -> None:
        self.relations = relations or RelationModel()

    def __call__(self, texts: Sequence[str]) -> list[ReportLabels]:
        return [self._of(text) for text in texts]

    def _of(self, text: str) -> ReportLabels:
        found = assertions(text, self.relations)
        values = {name: _affirmed(found, name) for name in DISEASES}
        values[NO_DISEASE] = float(np.prod([1 - value for value in values.values()])) if found else 0.5
        return ReportLabels(values, float(confidence(np.array([list(values.values())]))[0]))


def _affirmed(found: Sequence[Assertion], name: str) -> float:
    """P(some mention is meant): 0.005 if never named, about a half if only in doubt, up to 0.995."""
    chances = [0.995 * (1 - item.absent) * (1 - 0.5 * item.uncertain) for item in found if item.finding == name]
    return max([0.005, *(1 if p > 0.995 else p for p in chances)])


@dataclass
class LearnedClassifier:
    """Heads learned from annotated reports: logistic on assertions and on words that know whether they are denied.

    Calibrated by Platt's method on predictions that cross-validation makes for reports it did not learn from. Learning
    needs scikit-learn, using does not.

    Attributes:
        labels: names.
        vocabulary: n-gram -> column.
        idf: (words,).
        weights: (labels, words + assertion features).
        bias: (labels,).
        scale, shift: (labels,) Platt's, of the log-odds.
    """

    labels: tuple[str, ...]
    relations: RelationModel
    vocabulary: dict[str, int]
    idf: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    shift: np.ndarray

    def __call__(self, texts: Sequence[str]) -> list[ReportLabels]:
        table = self.probabilities(texts)
        return [
            ReportLabels(dict(zip(self.labels, row.tolist(), strict=True)), float(sure))
            for row, sure in zip(table, confidence(table), strict=True)
        ]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(reports, labels)."""
        if not texts:
            return np.empty((0, len(self.labels)))
        odds = _features(texts, self.vocabulary, self.idf, self.relations) @ self.weights.T + self.bias
        return 1 / (1 + np.exp(-np.clip(odds * self.scale + self.shift, -30, 30)))

    @classmethod
    def learn(
        cls,
        texts: Sequence[str],
        labels: Sequence[Mapping[str, int]],
        findings: Mapping[str, str] | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> LearnedClassifier:
        """Learn from annotated reports.

        Args:
            texts: reports.
            labels: for each report, 0 or 1 by label.
            findings: label -> finding of the extractor, to learn the relation model from the labels too; default:
                labels that have a finding's name.

        Raises:
            UnsuitableAnnotation: too few reports, or a label with fewer than two of a kind.
            MissingPackage: scikit-learn.
        """
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import StratifiedKFold
            from threadpoolctl import threadpool_limits
        except ImportError as error:
            raise MissingPackage("Learning needs scikit-learn; install the extra 'training'.") from error
        names, truth = _truth(texts, labels)
        findings = findings or {name: name for name in names if name in FINDINGS}
        with threadpool_limits(1):
            relations = RelationModel.fitted(*links_from_labels(texts, labels, findings))
        vocabulary, idf = _vocabulary(texts)
        features = _features(texts, vocabulary, idf, relations)
        weights, bias, scale, shift = (np.zeros((len(names), features.shape[1])), *np.zeros((3, len(names))))
        with threadpool_limits(1):  # on a busy machine the threads of such small products wait for one another
            for n in range(len(names)):
                head = LogisticRegression(C=_STRENGTH, solver="liblinear", max_iter=1000, random_state=seed)
                parts = min(folds, int(truth[:, n].sum()), int((1 - truth[:, n]).sum()))
                split = StratifiedKFold(parts, shuffle=True, random_state=seed).split(features, truth[:, n])
                odds = np.zeros(len(texts))
                for learned, held in split:
                    head.fit(features[learned], truth[learned, n])
                    odds[held] = head.decision_function(features[held])
                scale[n], shift[n] = _platt(odds, truth[:, n])
                head.fit(features, truth[:, n])
                weights[n], bias[n] = head.coef_[0], head.intercept_[0]
        return cls(names, relations, vocabulary, idf, weights, bias, scale, shift)

    def save(self, path: Path) -> None:
        """One ``.npz`` without pickles.

        Raises:
            OutputError: it cannot be written.
        """
        about = {"format": _FORMAT, "labels": self.labels, "words": list(self.vocabulary), "findings": list(FINDINGS)}
        with atomic_path(path) as staging, staging.open("wb") as file:
            np.savez_compressed(
                file, about=np.array(json.dumps(about)), relations=self.relations.weights, idf=self.idf,
                weights=self.weights.astype(np.float32), bias=self.bias, scale=self.scale, shift=self.shift,
            )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> LearnedClassifier:
        """As :meth:`save` wrote it.

        Raises:
            UnsuitableAnnotation: no classifier, or one of another version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                arrays = [file[name] for name in ("idf", "weights", "bias", "scale", "shift")]
                relations = RelationModel(file["relations"])
            if about["format"] != _FORMAT or about["findings"] != list(FINDINGS):
                raise ValueError("another version")
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UnsuitableAnnotation(
                f"{path} is no report classifier of this version ({error}); learn it again with 'learn'."
            ) from error
        words = {word: n for n, word in enumerate(about["words"])}
        return cls(tuple(about["labels"]), relations, words, *arrays)


#: Inverse strength of the ridge; 1 and 3 differ by .001 in the cross-validated AUROC of real reports.
_STRENGTH = 3.0
#: How much the assertions weigh against the words (whose vectors have length 1).
_ASSERTION_SCALE = 0.4


def _truth(texts: Sequence[str], labels: Sequence[Mapping[str, int]]) -> tuple[tuple[str, ...], np.ndarray]:
    if len(texts) != len(labels) or not texts:
        raise UnsuitableAnnotation("There must be labels for each report; correct the annotation.")
    names = tuple(labels[0])
    try:
        truth = np.array([[int(report[name]) for name in names] for report in labels])
    except (KeyError, ValueError) as error:
        raise UnsuitableAnnotation("Each report needs 0 or 1 for each label; correct the annotation.") from error
    rare = [name for name, n in zip(names, truth.sum(axis=0), strict=True) if n < 2 or len(texts) - n < 2]
    if rare or not np.isin(truth, (0, 1)).all():
        raise UnsuitableAnnotation(
            f"Too few reports (0 or 1) of {', '.join(rare) or 'each label'}; annotate two with and two without."
        )
    return names, truth


def _tokens(text: str) -> list[str]:
    """Words and runs of up to three, clause by clause; those of clauses with a denial are marked."""
    found = []
    for start, end in clauses(text):
        clause = text[start:end]
        mark = "~" if _DENIED.search(clause) else ""
        words = [word.lower() if not word.isdigit() else "0" for word in _WORDS.findall(clause)]
        for size in (1, 2, 3):
            found += [mark + " ".join(words[k : k + size]) for k in range(len(words) - size + 1)]
    return found


def _vocabulary(texts: Sequence[str], least: int = 2) -> tuple[dict[str, int], np.ndarray]:
    """N-grams of at least ``least`` reports, and their inverse document frequency (smoothed)."""
    counts = Counter(token for text in texts for token in set(_tokens(text)))
    kept = sorted(token for token, n in counts.items() if n >= least)
    idf = np.log((1 + len(texts)) / (1 + np.array([counts[token] for token in kept]))) + 1
    return {token: k for k, token in enumerate(kept)}, idf


def _features(
    texts: Sequence[str], vocabulary: Mapping[str, int], idf: np.ndarray, relations: RelationModel
) -> sparse.csr_matrix:
    """(reports, words + findings x 4)."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        counts = Counter(vocabulary[token] for token in _tokens(text) if token in vocabulary)
        keys = np.fromiter(counts.keys(), np.int64, len(counts))
        weights = (1 + np.log(np.fromiter(counts.values(), np.float64, len(counts)))) * idf[keys]
        rows += [row] * len(keys)
        columns += keys.tolist()
        values += (weights / (np.linalg.norm(weights) or 1)).tolist()
    words = sparse.csr_matrix((values, (rows, columns)), shape=(len(texts), len(vocabulary)))
    said = np.stack([_said(assertions(text, relations)) for text in texts])
    return sparse.hstack([words, sparse.csr_matrix(_ASSERTION_SCALE * said)], format="csr")


def _said(found: Sequence[Assertion]) -> np.ndarray:
    """For each finding: strongest affirmation, number affirmed (log), strongest denial, strongest doubt."""
    table = np.zeros((len(FINDINGS), _PER_FINDING))
    index = {name: n for n, name in enumerate(FINDINGS)}
    for item in found:
        row = table[index[item.finding]]
        affirmed = 1 - item.absent
        row[0] = max(row[0], affirmed)
        row[1] += affirmed
        row[2] = max(row[2], item.absent)
        row[3] = max(row[3], item.uncertain * affirmed)
    table[:, 1] = np.log1p(table[:, 1])
    return table.ravel()


def _platt(odds: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Scale and shift of log-odds by maximum likelihood, with Platt's softened targets against overconfidence."""
    from scipy.optimize import minimize

    positive = truth.sum()
    target = np.where(truth == 1, (positive + 1) / (positive + 2), 1 / (len(truth) - positive + 2))

    def loss(x: np.ndarray) -> float:
        z = np.clip(x[0] * odds + x[1], -30, 30)
        return float((np.logaddexp(0, z) - target * z).sum())

    scale, shift = minimize(loss, np.array([1.0, 0.0]), method="BFGS").x
    return float(scale), float(shift)
