"""Finding studies and their reports: DICOM files in any folders; reports as CSV, JSON, JSON lines or text."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pydicom

from training.curation.deidentify import header_facts
from training.curation.errors import UnreadableReport
from training.curation.ledger import FoundStudy

__all__ = ["Reports", "decode", "find_studies", "read_reports", "report_columns", "report_text"]

_TAGS = [
    "SOPClassUID", "StudyInstanceUID", "AccessionNumber", "PatientID", "PatientSex", "PatientAge", "StudyDate",
    "Modality", "BurnedInAnnotation", "RecognizableVisualFeatures", "ImagePositionPatient", "ImageType",
]  # fmt: skip
_IDS = ("studyinstanceuid", "study_instance_uid", "studyuid", "study", "accessionnumber", "accessionno", "accession",
        "accession_number", "id")  # fmt: skip
_TEXTS = ("report_text", "report", "text", "reporttext", "报告", "报告内容")
_PARTS = ("findings", "impression", "影像所见", "影像诊断", "检查所见", "诊断意见")
_REPORT_SUFFIXES = (".csv", ".json", ".jsonl", ".txt")


@dataclass
class _Part:
    """What one folder holds of one study. Names stand in one string: an archive has 10^8 files."""

    folder: str
    names: list[str] = field(default_factory=list)
    lines: str = ""  # name and size of each file
    accession: str = ""
    patient: str = ""
    facts: dict[str, Any] | None = None  # None until a header was read
    unreadable: int = 0
    burned_in: int = 0
    reports: list[Path] = field(default_factory=list)


def find_studies(
    archive: Path, reports: Reports | None = None, encoding: str | None = None, processes: int = 1
) -> Iterator[FoundStudy]:
    """All studies below ``archive``, each with the report that belongs to it.

    Files are put together by their StudyInstanceUID, wherever they lie. A DICOM file with an unreadable header counts
    to the study that most of its folder belongs to; a folder with none but such files is a study of its own, so that
    nothing goes unseen. A text file in a study's own folder is its report unless ``reports`` has one.

    Args:
        archive: folder; links to folders are not followed.
        reports: by StudyInstanceUID or accession number.
        encoding: of text files that lie beside the images; default: see :func:`decode`.
        processes: that read headers.
    """
    groups: dict[str, list[_Part]] = {}
    read = partial(_read_folder, archive)
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for found in pool.imap(read, _folders(archive), chunksize=4):
                _merge(groups, found)
    else:
        for found in map(read, _folders(archive)):
            _merge(groups, found)
    for key in sorted(groups):
        parts = groups.pop(key)
        texts = [path for part in parts for path in part.reports]
        yield _with_report(_found(key, parts), reports, texts, encoding)


def _merge(groups: dict[str, list[_Part]], found: dict[str, _Part]) -> None:
    for key, part in found.items():
        groups.setdefault(key, []).append(part)


def _folders(archive: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder with files, and their names."""
    for place, folders, names in os.walk(archive):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith(".") and name != "DICOMDIR")
        if names:
            yield place, names


def _read_folder(archive: Path, folder: tuple[str, list[str]]) -> dict[str, _Part]:
    """By study, what a folder holds."""
    place = Path(folder[0])
    inside = place.relative_to(archive).as_posix()
    found: dict[str, _Part] = {}
    broken: list[str] = []
    texts: list[Path] = []
    for name in folder[1]:
        path = place / name
        if path.suffix.lower() in _REPORT_SUFFIXES:
            texts += [path] * (path.suffix.lower() == ".txt")
            continue
        header, is_dicom = _header(path)
        if header is not None:
            _take(found.setdefault(str(header.StudyInstanceUID), _Part(inside)), name, header)
        elif is_dicom:
            broken.append(name)
    if broken:
        owner = max(found, key=lambda key: len(found[key].names), default=f"folder:{inside}")
        part = found.setdefault(owner, _Part(inside))
        part.names += broken
        part.unreadable = len(broken)
    if len(found) == 1:
        next(iter(found.values())).reports = texts
    for part in found.values():
        part.lines = "\n".join(f"{name}\t{_size(place / name)}" for name in part.names)
        part.names = []
    return found


def _take(part: _Part, name: str, header: pydicom.Dataset) -> None:
    part.names.append(name)
    part.burned_in += _is_burned_in(header)
    if part.facts is None:
        part.facts = header_facts(header)
        part.accession, part.patient = (str(_value(header, tag) or "") for tag in ("AccessionNumber", "PatientID"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _header(path: Path) -> tuple[pydicom.Dataset | None, bool]:
    """The header if it names its study; and whether the file is (or was) DICOM."""
    try:
        with path.open("rb") as file:
            marked = file.read(132)[128:] == b"DICM"
    except OSError:
        return None, path.suffix.lower() in (".dcm", ".ima")
    likely = marked or path.suffix.lower() in (".dcm", ".ima")
    # Old files have no mark; their names end in a number, or in nothing.
    may_be = likely or not path.suffix or path.suffix[1:].isdecimal()
    if not may_be:
        return None, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True, force=not marked, specific_tags=list(_TAGS))
            usable = bool(str(header.get("StudyInstanceUID", "") or "").strip())
    except Exception:  # pydicom raises whatever a broken value makes it raise
        return None, likely
    return (header, True) if usable else (None, likely)


def _value(header: pydicom.Dataset, keyword: str) -> Any:
    try:
        return header.get(keyword)
    except Exception:
        return None


def _is_burned_in(header: pydicom.Dataset) -> bool:
    """Whether an image with a place in space (a slice, no dose sheet) is said to show writing or a face."""
    flags = (str(_value(header, key) or "").upper() for key in ("BurnedInAnnotation", "RecognizableVisualFeatures"))
    return "YES" in flags and _value(header, "ImagePositionPatient") is not None


def _found(key: str, parts: list[_Part]) -> FoundStudy:
    entries = [
        (part.folder, *line.rsplit("\t", 1)) for part in parts for line in part.lines.split("\n")
    ]  # folder, name, size
    files = tuple(name if folder == "." else f"{folder}/{name}" for folder, name, _ in entries)
    sizes = "\n".join(f"{file}\t{size}" for file, (_, _, size) in zip(files, entries, strict=True))
    digest = hashlib.sha256(sizes.encode(errors="surrogateescape")).hexdigest()
    read = next((part for part in parts if part.facts is not None), parts[0])
    counts = {"unreadable": sum(p.unreadable for p in parts), "burned_in": sum(p.burned_in for p in parts)}
    return FoundStudy(key, read.accession, read.patient or key, files, digest, (read.facts or {}) | counts)


def _with_report(study: FoundStudy, reports: Reports | None, texts: list[Path], encoding: str | None) -> FoundStudy:
    if reports is not None:
        for name in (study.key, study.accession):
            if name and name in reports.texts:
                return replace(study, report=reports.texts[name])
            if name and name in reports.problems:
                return replace(study, report_problem=reports.problems[name])
    if not texts:
        return study
    if len(texts) > 1:
        return replace(study, report_problem="there are several text files with its images; leave the report alone")
    try:
        return replace(study, report=decode(texts[0].read_bytes(), texts[0].name, encoding).strip() or None)
    except UnreadableReport as error:
        return replace(study, report_problem=str(error))
    except OSError as error:
        return replace(study, report_problem=f"{texts[0].name} cannot be read ({error.strerror}); run again")


@dataclass(frozen=True)
class Reports:
    """Reports by StudyInstanceUID or accession number, and what is wrong with those that cannot be read."""

    texts: dict[str, str]
    problems: dict[str, str] = field(default_factory=dict)


def read_reports(path: Path, encoding: str | None = None) -> Reports:
    """Reports from a CSV, a JSON file (list of objects, or id -> text), JSON lines, or a folder of ``ID.txt`` files.

    The columns are found by name: an id (``StudyInstanceUID``, ``AccessionNumber``, ``AccessionNo``, ``id``, ...) and
    ``report``, ``report_text``, ``text``, or ``findings`` with ``impression`` (English or Chinese).

    Raises:
        UnreadableReport: missing, in an unknown encoding or layout. In a folder only the file's own study is affected.
    """
    try:
        if path.is_dir():
            return _read_text_folder(path, encoding)
        text = decode(path.read_bytes(), path.name, encoding)
    except OSError as error:
        raise UnreadableReport(f"{path} cannot be read ({error.strerror}); name the file of the reports.") from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows: Any = list(csv.DictReader(io.StringIO(text, newline="")))
    elif suffix in (".json", ".jsonl"):
        rows = _read_json(text, path.name, lines=suffix == ".jsonl")
    else:
        raise UnreadableReport(f"{path.name} is no CSV, JSON or JSON lines file; export the reports as one of them.")
    return Reports(_by_id(rows, path.name))


def _read_text_folder(folder: Path, encoding: str | None) -> Reports:
    texts, problems = {}, {}
    for path in sorted(folder.glob("*.txt")):
        try:
            texts[path.stem] = decode(path.read_bytes(), path.name, encoding)
        except UnreadableReport as error:
            problems[path.stem] = str(error)
    return Reports(texts, problems)


def _read_json(text: str, name: str, lines: bool) -> Any:
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except ValueError as error:
        raise UnreadableReport(f"{name} is no valid JSON ({error}); export the reports again.") from error


def report_columns(names: Iterable[str], file: str) -> tuple[str, list[str]]:
    """The column of the ids, and the one or two of the reports.

    Raises:
        UnreadableReport: there are none.
    """
    columns = {str(column).strip().lower(): column for column in names}
    key = next((columns[wanted] for wanted in _IDS if wanted in columns), None)
    parts = [columns[wanted] for wanted in _TEXTS if wanted in columns][:1]
    parts = parts or [columns[wanted] for wanted in _PARTS if wanted in columns]
    if key is None or not parts:
        raise UnreadableReport(
            f"{file} has the columns {', '.join(map(str, columns)) or 'none'}; it needs an id (StudyInstanceUID or "
            "AccessionNumber) and a report (report, or findings and impression)."
        )
    return key, parts


def report_text(row: Mapping[str, Any], parts: Iterable[str]) -> str:
    """The report that stands in these columns."""
    return "\n".join(str(row.get(part) or "").strip() for part in parts).strip()


def _by_id(rows: Any, name: str) -> dict[str, str]:
    if isinstance(rows, dict):
        rows = [{"id": key, "text": value} for key, value in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UnreadableReport(f"{name} holds no list of reports; give objects with an id and a report each.")
    if not rows:
        raise UnreadableReport(f"{name} holds no report; export the reports again.")
    key, parts = report_columns(rows[0], name)
    result: dict[str, str] = {}
    for row in rows:
        text = report_text(row, parts)
        number = str(row.get(key) or "").strip()
        if number and text:  # a report with an addendum stands in two rows
            result[number] = f"{result[number]}\n{text}" if number in result and result[number] != text else text
    return result


def decode(data: bytes, name: str, encoding: str | None = None) -> str:
    """Text in UTF-8 or UTF-16 (with its mark), or mainly Chinese text in GB 18030; anything else is not guessed at.

    Raises:
        UnreadableReport: with the way out.
    """
    try:
        if encoding is not None:
            return data.decode(encoding)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        if b"\0" not in data:
            return data.decode("utf-8-sig")
    except (LookupError, UnicodeDecodeError) as error:
        if encoding is not None:
            raise UnreadableReport(f"{name} is not in the encoding {encoding}; give another --encoding.") from error
    text = _chinese(data)
    if text is None:
        raise UnreadableReport(f"{name} is in an unknown encoding; save it as UTF-8, or name its --encoding.")
    return text


def _chinese(data: bytes) -> str | None:
    """GB 18030 decodes nearly any bytes, so what comes out must look like Chinese: mostly everyday characters."""
    try:
        text = data.decode("gb18030")
        "".join(letter for letter in text if ord(letter) > 127).encode("gbk")
    except UnicodeError:
        return None
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in text)
    latin = sum(letter.isascii() and letter.isalpha() for letter in text)
    return text if chinese > latin and "\0" not in text else None
