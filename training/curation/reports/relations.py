"""Relation model: does this status, or this position, belong to that finding?

Logistic on a few features of the pair. Its weights come from rules, or from pairs with known links
(:meth:`RelationModel.fitted`); where only whole reports are annotated, their labels tell links too
(:func:`links_from_labels`): in a report without a finding every mention of it must be denied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from training.curation.errors import UnsuitableAnnotation
from training.curation.reports.entities import Entity, Kind, Status, extract

__all__ = ["Assertion", "RelationModel", "assertions", "links_from_labels", "pair_features"]

_CONTRAST = re.compile(r"\b(?:but|however|except|although|apart from|while|other than)\b|但|除|而")
_NAMES = ("bias", "distance", "before", "overlap", "findings between", "commas", "contrast", "present between",
          "absent", "uncertain", "present", "normal", "position", "chinese")  # fmt: skip
#: Rules as weights: linked in the same clause, less so with distance, commas and findings between; a contrast ends it.
_BY_RULE = np.array([2.5, -0.4, 0.3, 0.0, -0.1, -0.3, -3.0, -2.5, 0.5, 0.3, 0.5, -1.5, 0.5, 0.5])


def pair_features(text: str, finding: Entity, other: Entity, clause: Sequence[Entity]) -> np.ndarray:
    """``_NAMES`` as numbers for a finding and a status or position of the same clause."""
    low, high = min(finding.end, other.end), max(finding.start, other.start)
    between = text[low:high]
    inside = [item for item in clause if item.start >= low and item.end <= high]
    return np.array([
        1.0,
        np.log1p(max(0, high - low)) / 2,
        other.start < finding.start,
        low > high,
        len({item.name for item in inside if item.kind is Kind.FINDING}),
        between.count(",") + between.count("，"),
        bool(_CONTRAST.search(between)),
        any(item.kind is Kind.STATUS and item.name == Status.PRESENT for item in inside),
        *(other.kind is Kind.STATUS and other.name == status for status in Status),
        other.kind is Kind.POSITION,
        bool(re.search("[\u4e00-\u9fff]", text[finding.start : finding.end])),
    ], dtype=np.float64)  # fmt: skip


@dataclass(frozen=True)
class RelationModel:
    """P(linked) of pairs. ``weights`` belong to the features of :func:`pair_features`."""

    weights: np.ndarray = field(default_factory=_BY_RULE.copy)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(features @ self.weights, -30, 30)))

    @classmethod
    def fitted(cls, features: np.ndarray, linked: np.ndarray, prior: float = 1.0) -> RelationModel:
        """Learned from pairs, shrunk towards the rules: with few pairs they are the rules.

        Args:
            features: (pairs, features).
            linked: (pairs,) of 0 and 1.
            prior: strength of the rules.
        """
        from scipy.optimize import minimize

        if len(features) != len(linked) or not np.isin(linked, (0, 1)).all():
            raise UnsuitableAnnotation("Each pair needs one link, 0 or 1; correct the annotation.")
        sign = 2.0 * linked - 1

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            margin = np.clip(sign * (features @ weights), -30, 30)
            away = weights - _BY_RULE
            gradient = -(features.T @ (sign / (1 + np.exp(margin)))) + prior * away
            return float(np.log1p(np.exp(-margin)).sum() + prior / 2 * away @ away), gradient

        return cls(minimize(loss, _BY_RULE, jac=True, method="L-BFGS-B").x)


@dataclass(frozen=True)
class Assertion:
    """What a report says of one mention of a finding: probabilities that it is denied, or put in doubt."""

    finding: str
    absent: float
    uncertain: float
    positions: tuple[str, ...]


def assertions(text: str, model: RelationModel) -> list[Assertion]:
    """All mentions of findings with the statuses and positions linked to them."""
    found = []
    for _, group in groupby(extract(text), key=lambda item: item.clause):
        clause = list(group)
        others = [item for item in clause if item.kind is not Kind.FINDING]
        for finding in (item for item in clause if item.kind is Kind.FINDING):
            links = _links(text, finding, others, clause, model)
            positions = tuple(sorted({item.name for item, p in links if item.kind is Kind.POSITION and p > 0.5}))
            found.append(Assertion(finding.name, *_statuses(links), positions))
    return found


def _links(
    text: str, finding: Entity, others: Sequence[Entity], clause: Sequence[Entity], model: RelationModel
) -> list[tuple[Entity, float]]:
    if not others:
        return []
    chances = model(np.stack([pair_features(text, finding, other, clause) for other in others]))
    return list(zip(others, chances.tolist(), strict=True))


def _statuses(links: Sequence[tuple[Entity, float]]) -> tuple[float, float]:
    def strongest(*statuses: Status) -> float:
        return max((p for item, p in links if item.kind is Kind.STATUS and item.name in statuses), default=0.0)

    return strongest(Status.ABSENT, Status.NORMAL), strongest(Status.UNCERTAIN)


def links_from_labels(
    texts: Sequence[str], labels: Sequence[Mapping[str, int]], findings: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a finding and an ABSENT status with the link that the report's label implies.

    Label 0: all mentions are denied, so a clause's only ABSENT status is linked. Label 1 and a single mention: it is
    not denied, so no ABSENT status of its clause is linked. Anything else tells nothing.

    Args:
        findings: label -> finding of the extractor.

    Returns:
        Features (pairs, features) and links (pairs,).
    """
    features: list[np.ndarray] = []
    linked: list[int] = []
    for text, report in zip(texts, labels, strict=True):
        entities = extract(text)
        for label, name in findings.items():
            mentions = [item for item in entities if item.kind is Kind.FINDING and item.name == name]
            if report[label] and len(mentions) != 1:
                continue
            for mention in mentions:
                clause = [item for item in entities if item.clause == mention.clause]
                absent = [item for item in clause if item.kind is Kind.STATUS and item.name == Status.ABSENT]
                if len(absent) == 1:
                    features.append(pair_features(text, mention, absent[0], clause))
                    linked.append(int(not report[label]))
    if not features:
        return np.empty((0, len(_NAMES))), np.empty(0)
    return np.stack(features), np.array(linked, dtype=np.float64)
