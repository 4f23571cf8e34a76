"""The stages of a study as plain functions; local processes and cluster workers run the same ones.

Order of the gates, as in the paper: report -> confident -> intact -> clean; then de-identified and packed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from LCTfoundLib.errors import OutputError, UnsuitableImage
from training.curation.deidentify import DatePolicy, Deidentifier, allowed_facts
from training.curation.ledger import Gate, Ledger, Outcome, PackedShard, State, Study
from training.curation.quality import EdgeGate, load_study
from training.curation.shards import ShardWriter

__all__ = ["Packed", "ReportLabels", "Settings", "TextClassifier", "classify_reports", "pack", "site_folders"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportLabels:
    """Calibrated probabilities by label, and how sure it is that all of them are decided right."""

    probabilities: dict[str, float]
    confidence: float


class TextClassifier(Protocol):
    """What the pipeline asks of a report classifier."""

    def __call__(self, texts: Sequence[str]) -> list[ReportLabels]: ...


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know, besides its studies.

    Attributes:
        archive: root of the DICOM tree.
        shards: folder of the shards.
        key: the site's key (:func:`training.curation.deidentify.site_key`).
    """

    archive: Path
    shards: Path
    key: bytes = field(repr=False)
    dates: DatePolicy = DatePolicy.DROP
    edges: EdgeGate = EdgeGate()


@dataclass(frozen=True)
class Packed:
    """What a worker brings back: an outcome for each study, and the whole shard if there is one."""

    outcomes: tuple[Outcome, ...]
    shard: PackedShard | None


def site_folders(out: Path) -> tuple[Path, Path, Path]:
    """The ledger, the site's key (both stay in the hospital) and the folder of the shards."""
    return out / "private" / "ledger.sqlite", out / "private" / "site.key", out / "shards"


def classify_reports(ledger: Ledger, classifier: TextClassifier, threshold: float = 0.9, count: int = 500) -> int:
    """Classify the reports of all studies that wait for it; a transaction each ``count``. Returns how many.

    Unreadable reports go to review, studies without one are excluded, and so are those the classifier is not more
    than ``threshold`` sure of.
    """
    done = 0
    while waiting := ledger.unlabelled(count):
        texts = [report for _, report, _, _ in waiting if report]
        labels = iter(classifier(texts) if texts else [])
        entries = []
        for study, report, problem, waived in waiting:
            found = next(labels) if report else ReportLabels({}, 0.0)
            outcome = _of_report(study, report, problem, found, waived, threshold)
            entries.append((outcome, found.probabilities, found.confidence))
        ledger.label(entries)
        done += len(entries)
    return done


def _of_report(
    study: int, report: str | None, problem: str | None, found: ReportLabels, waived: frozenset[Gate], threshold: float
) -> Outcome:
    if not report and Gate.REPORT not in waived:
        if problem:
            return Outcome(study, State.REVIEW, Gate.FOUND, f"report: {problem}")
        return Outcome(study, State.EXCLUDED, Gate.FOUND, "no report")
    if found.confidence <= threshold and Gate.CONFIDENT not in waived and Gate.REPORT not in waived:
        return Outcome(study, State.EXCLUDED, Gate.REPORT, "report classifier not confident")
    return Outcome(study, State.READY, Gate.CONFIDENT)


def pack(studies: Sequence[Study], settings: Settings) -> Packed:
    """Check, de-identify and write studies into one shard.

    A study that fails unexpectedly fails alone. May run more than once for the same studies: what counts is what the
    ledger commits.

    Raises:
        OutputError: the shard cannot be written; nothing is left of it.
    """
    deidentifier = Deidentifier(settings.key, settings.dates)
    with ShardWriter(settings.shards) as writer:
        outcomes = [_one(study, settings, deidentifier, writer) for study in studies]
        return Packed(tuple(outcomes), writer.close())


def _one(study: Study, settings: Settings, deidentifier: Deidentifier, writer: ShardWriter) -> Outcome:
    measures: dict[str, float] = {}
    passed = Gate.CONFIDENT
    try:
        ct = load_study(settings.archive, study.files, study.facts.get("unreadable", 0))
        passed = Gate.INTACT
        measures = settings.edges.measure(ct)
        doubt = _doubt(study.facts, settings.edges, measures)
        if doubt and Gate.CLEAN not in study.waived:
            return Outcome(study.id, State.REVIEW, passed, doubt, measures)
        passed = Gate.CLEAN
        writer.add(ct.array, allowed_facts(study, ct, deidentifier))
        return Outcome(study.id, State.PACKED, Gate.PACKED, measures=measures)
    except UnsuitableImage as error:
        return Outcome(study.id, State.EXCLUDED, passed, str(error), measures)
    except OutputError:
        raise
    except OSError as error:
        reason = f"the archive does not answer ({error.strerror or type(error).__name__})"
        return Outcome(study.id, State.FAILED, passed, reason, measures)
    except Exception as error:
        _log.warning("study %d failed", study.id, exc_info=True)
        return Outcome(study.id, State.FAILED, passed, f"unexpected {type(error).__name__}", measures)


def _doubt(facts: dict[str, Any], gate: EdgeGate, measures: dict[str, float]) -> str:
    """Why a person has to look at the images; empty if nobody has to."""
    if facts.get("burned_in"):
        return "burned-in writing or a recognizable face in the slices, says the header"
    if not gate.is_clean(measures):
        return f"noisy: more edges than {gate.threshold:g} of the pixels"
    return ""
