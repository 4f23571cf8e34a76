"""Three rounds of annotation: after each, the reports that the classifier is least sure of are annotated next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.curation.reports.heads import LearnedClassifier, confidence

__all__ = ["Round", "annotation_rounds", "least_confident"]


@dataclass(frozen=True)
class Round:
    """A classifier, and the places of the reports (in the pool) it learned from."""

    classifier: LearnedClassifier
    annotated: tuple[int, ...]


def least_confident(classifier: LearnedClassifier, texts: Sequence[str], count: int) -> list[int]:
    """Places of the ``count`` reports whose least sure label is the least sure."""
    return np.argsort(confidence(classifier.probabilities(texts)), kind="stable")[:count].tolist()


def annotation_rounds(
    texts: Sequence[str],
    annotate: Callable[[Sequence[int]], Sequence[Mapping[str, int]]],
    first: int,
    added: int,
    rounds: int = 3,
    findings: Mapping[str, str] | None = None,
    seed: int = 0,
    at_random: bool = False,
) -> Iterator[Round]:
    """The paper's loop (1,000 reports, then twice 2,000 more), at any scale.

    Args:
        texts: the pool of reports.
        annotate: labels of the reports at these places: a person, or known labels that stand in for one.
        first: reports annotated for the first round, drawn at random.
        added: for each later round.
        findings: see :meth:`LearnedClassifier.learn`.
        at_random: draw the later ones at random too, to compare with.
    """
    rng = np.random.default_rng(seed)
    chosen: list[int] = rng.permutation(len(texts))[:first].tolist()
    labels = list(annotate(chosen))
    classifier: LearnedClassifier | None = None
    for _ in range(rounds):
        if classifier is not None:
            rest = sorted(set(range(len(texts))) - set(chosen))
            if at_random:
                places = rng.permutation(len(rest))[:added].tolist()
            else:
                places = least_confident(classifier, [texts[n] for n in rest], added)
            new = [rest[n] for n in places]
            labels += annotate(new)
            chosen += new
        classifier = LearnedClassifier.learn([texts[n] for n in chosen], labels, findings, seed=seed)
        yield Round(classifier, tuple(chosen))
