"""Many studies, one after the other: finished ones are skipped, a failed one does not stop the rest."""

from __future__ import annotations

import csv
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from LCTfoundLib.anatomy.structures import STRUCTURES, Lobe
from LCTfoundLib.case import (
    CaseOptions,
    CaseRecord,
    Engine,
    case_name,
    fingerprint,
    read_record,
    run_case,
)
from LCTfoundLib.errors import Cancelled, LCTfoundError, UnsuitableImage
from LCTfoundLib.runtime.files import atomic_path, output_errors

if TYPE_CHECKING:
    from LCTfoundLib.runtime.progress import Progress

__all__ = ["LOGS", "SUMMARY", "CaseOutcome", "Status", "Study", "find_studies", "run_batch"]

SUMMARY = "summary.csv"
LOGS = "logs"

_IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
_LABEL_SUFFIXES = (".seg.nrrd",)
#: So many files without a DICOM mark tell that a folder holds something else.
_DICOM_TRIES = 16

_log = logging.getLogger(__name__)


class Status(Enum):
    """What became of a study."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True)
class Study:
    """A CT to segment: an image file, or a folder of DICOM files; ``name`` is unique in a batch."""

    name: str
    source: Path


@dataclass(frozen=True)
class CaseOutcome:
    """One line of the summary."""

    study: Study
    status: Status
    message: str
    record: CaseRecord | None
    seconds: float


def find_studies(root: Path, output: Path) -> list[Study]:
    """All studies below ``root``, without hidden places and without ``output``.

    Folders side by side that hold series of one DICOM study count as one: reading then takes its best chest series.

    Raises:
        UnsuitableImage: ``root`` is no folder, or there is none.
    """
    if not root.is_dir():
        raise UnsuitableImage(f"{root} is no folder; --batch wants a folder of studies.")
    ours = output.resolve()
    sources: list[Path] = []
    series: list[Path] = []
    for place, folders, files in os.walk(root):
        folder = Path(place)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and (folder / n).resolve() != ours)
        visible = sorted(name for name in files if not name.startswith("."))
        sources += [folder / name for name in visible if _is_image(name)]
        if _holds_dicom(folder, visible):
            series.append(folder)
    sources += _merge_series(series, root)
    if not sources:
        raise UnsuitableImage(f"There is no CT in {root}; put DICOM folders, NIfTI, NRRD or MHA files there.")
    return _named(sorted(sources), root)


def run_batch(
    studies: Sequence[Study],
    output: Path,
    options: CaseOptions,
    engine: Engine,
    progress_of: Callable[[int, Study], Progress | None] = lambda number, study: None,
    overwrite: bool = False,
) -> Iterator[CaseOutcome]:
    """Segment the studies one by one, each into ``output/<name>``, with a log each and a summary table.

    The summary is written anew after each study, so that an interrupted batch leaves a correct one.

    Args:
        studies: what to segment.
        output: folder of all results.
        options: the same for all.
        engine: the steps.
        progress_of: progress for a study, given its number from 1.
        overwrite: also do finished studies again.

    Yields:
        The outcome of each study as soon as it is known.

    Raises:
        Cancelled: the user stopped; finished studies stay.
        OutputError: ``output`` itself cannot be written.
    """
    outcomes: list[CaseOutcome] = []
    with output_errors(output):
        (output / LOGS).mkdir(parents=True, exist_ok=True)
    for number, study in enumerate(studies, start=1):
        outcome = _skipped(study, output, options, engine) if not overwrite else None
        if outcome is None:
            outcome = _attempt(study, output, options, engine, progress_of(number, study))
        outcomes.append(outcome)
        _write_summary(output / SUMMARY, outcomes)
        yield outcome


def _is_image(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(_IMAGE_SUFFIXES) and not lower.endswith(_LABEL_SUFFIXES)


def _holds_dicom(folder: Path, names: Sequence[str]) -> bool:
    """Whether one of the first files that are no images has DICOM's mark, or its suffix."""
    others = [name for name in names if not _is_image(name)]
    return any(name.lower().endswith(".dcm") for name in others) or any(
        _has_dicom_mark(folder / name) for name in others[:_DICOM_TRIES]
    )


def _has_dicom_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _merge_series(folders: Sequence[Path], root: Path) -> list[Path]:
    """The folders, but one parent for those beneath it when they are all series of one study."""
    by_parent: dict[Path, list[Path]] = {}
    for folder in folders:
        by_parent.setdefault(folder.parent if folder != root else folder, []).append(folder)
    merged: list[Path] = []
    for parent, children in by_parent.items():
        studies = {_study_of(child) for child in children}
        one_study = len(children) > 1 and len(studies) == 1 and None not in studies
        merged += [parent] if one_study else children
    return merged


def _study_of(folder: Path) -> str | None:
    """The study's identifier in the first DICOM file of a folder; None where it has none."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.suffix.lower() == ".dcm" or _has_dicom_mark(path)):
            try:
                header = dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"], force=True)
                return str(header.get("StudyInstanceUID", "")) or None
            except (OSError, InvalidDicomError, ValueError):
                return None
    return None


def _named(sources: Sequence[Path], root: Path) -> list[Study]:
    """Names from the relative paths; where two files differ in the suffix only, the suffix stays in."""
    short = ["__".join((*path.relative_to(root).parent.parts, case_name(path))) for path in sources]
    full = ["__".join(path.relative_to(root).parts) or root.resolve().name for path in sources]
    count = Counter(short)
    names = [few if count[few] == 1 else many for few, many in zip(short, full, strict=True)]
    return [Study(name, source) for name, source in zip(names, sources, strict=True)]


def _skipped(study: Study, output: Path, options: CaseOptions, engine: Engine) -> CaseOutcome | None:
    """The outcome of a study that an earlier run finished with the same input, options and weights."""
    record = read_record(output / study.name)
    if record is None or record.fingerprint != fingerprint(study.source, options, engine):
        return None
    return CaseOutcome(study, Status.SKIPPED, "finished earlier", record, 0.0)


def _attempt(
    study: Study, output: Path, options: CaseOptions, engine: Engine, progress: Progress | None
) -> CaseOutcome:
    """Run one study; whatever goes wrong becomes its outcome, but for the user's stop."""
    start = time.monotonic()
    log_file = output / LOGS / f"{study.name}.log"
    with _log_to(log_file):
        try:
            target = output / study.name
            record, _ = run_case(study.source, target, options, engine, progress, overwrite=True, name=study.name)
        except Cancelled:
            _log.warning("%s: stopped by the user", study.name)
            raise
        except LCTfoundError as error:
            _log.error("%s: %s", study.name, error, exc_info=error)
            message = str(error)
        except Exception as error:
            _log.exception("%s: unexpected error", study.name)
            message = f"unexpected {type(error).__name__}: {error}; the log {log_file} tells more"
        else:
            return CaseOutcome(study, Status.DONE, "", record, record.seconds["total"])
    return CaseOutcome(study, Status.FAILED, message, None, round(time.monotonic() - start, 2))


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Everything the engine logs goes to ``path`` as well (anew for each run of the study)."""
    with output_errors(path):
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("LCTfoundLib")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


_VOLUME_KEYS = ("lungs", *(f"{lobe.name.lower()}_lobe" for lobe in Lobe), *(s.key for s in STRUCTURES))


def _write_summary(path: Path, outcomes: Sequence[CaseOutcome]) -> None:
    """The table of all outcomes, replaced in one step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    volume_columns = [f"{key}_ml" for key in _VOLUME_KEYS]
    writer.writerow(["case", "source", "status", "seconds", "peak_memory_mb", *volume_columns, "findings", "message"])
    for outcome in outcomes:
        study, record = outcome.study, outcome.record
        volumes = [record.volumes_ml.get(key, "") if record else "" for key in _VOLUME_KEYS]
        memory, findings = (record.peak_memory_mb, "; ".join(record.findings)) if record else ("", "")
        start = [study.name, study.source, outcome.status.value, outcome.seconds, memory]
        writer.writerow([*start, *volumes, findings, outcome.message])
    with atomic_path(path) as staging:
        staging.write_text(text.getvalue(), encoding="utf-8")
