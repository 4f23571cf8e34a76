"""De-identification by allow-list: what leaves the hospital are numbers, dates moved in time and words of closed lists.

No text of a header or report is ever copied, so none can carry a name. Identifiers become keyed hashes (HMAC-SHA256
with a key that stays at the site), the same for the same patient and study in every run of that site.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import re
import secrets
from dataclasses import dataclass
from datetime import date, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from LCTfoundLib.errors import OutputError
from LCTfoundLib.volume import Volume
from training.curation.ledger import Study

__all__ = ["DatePolicy", "Deidentifier", "allowed_facts", "header_facts", "site_key"]

_VENDORS = ("ge", "siemens", "philips", "toshiba", "canon", "united imaging", "neusoft", "hitachi", "shimadzu")
_MAX_SHIFT_DAYS = 365
#: Ages above are rare enough to tell a person (HIPAA's safe harbour).
_MAX_AGE = 89


class DatePolicy(StrEnum):
    """What becomes of the study's date."""

    DROP = "drop"
    SHIFT = "shift"  # by days that are the patient's own, so that intervals between a patient's studies stay


def header_facts(header: Any) -> dict[str, Any]:
    """What may be told of a header, or is needed to tell it: sex (F, M, O), age in years (at most 89), date."""

    def text(keyword: str) -> str:
        try:
            return str(header.get(keyword) or "").strip().upper()
        except Exception:  # pydicom raises whatever a broken value makes it raise
            return ""

    facts: dict[str, Any] = {}
    if text("PatientSex") in ("F", "M", "O"):
        facts["sex"] = text("PatientSex")
    age = re.fullmatch(r"(\d{1,3})([DWMY])", text("PatientAge"))
    if age:
        years = int(age[1]) * {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1}[age[2]]
        facts["age"] = min(int(years), _MAX_AGE)
    if re.fullmatch(r"\d{8}", text("StudyDate")):
        facts["date"] = text("StudyDate")
    return facts


@dataclass(frozen=True)
class Deidentifier:
    """Names and dates of a site's patients as its shards give them."""

    key: bytes
    dates: DatePolicy = DatePolicy.DROP

    def name(self, kind: str, identifier: str) -> str:
        """32 hex digits for a ``kind`` of identifier."""
        return hmac.new(self.key, f"{kind}\0{identifier}".encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[
            :32
        ]

    def date(self, patient: str, day: str) -> str | None:
        """ISO date moved by up to a year, never by 0 days; None if dropped or no date (YYYYMMDD)."""
        if self.dates is DatePolicy.DROP:
            return None
        try:
            original = date(int(day[:4]), int(day[4:6]), int(day[6:8]))
            number = int(self.name("shift", patient), 16)
            days = 1 + number // 2 % _MAX_SHIFT_DAYS
            return (original + timedelta(days=days if number % 2 else -days)).isoformat()
        except (ValueError, OverflowError):
            return None


def site_key(path: Path) -> bytes:
    """The site's key; made at the first call.

    Raises:
        OutputError: it cannot be written, or what lies there is no key.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            pass
        key = path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); name another OUT folder.") from error
    if len(key) != 32:
        raise OutputError(f"{path} is no site key of 32 bytes; bring it back, or curate into a new OUT folder.")
    return key


def allowed_facts(study: Study, ct: Volume, deidentifier: Deidentifier) -> dict[str, Any]:
    """All that the shards tell of a study besides its pixels; a fact that is not known is absent."""
    facts: dict[str, Any] = {
        "study": deidentifier.name("study", study.key),
        "patient": deidentifier.name("patient", study.patient),
        "slices": ct.shape[0],
        "spacing": [round(float(step), 4) for step in ct.spacing],
        "contrast": "ContrastBolusAgent" in ct.metadata,
        "vendor": _vendor(ct.metadata.get("Manufacturer", "")),
        "labels": {name: round(float(value), 4) for name, value in study.labels.items()},
        "confidence": round(float(study.confidence), 4),
    }
    for name, tag in (("kvp", "KVP"), ("thickness", "SliceThickness")):
        number = _number(ct.metadata.get(tag, ""))
        if number is not None:
            facts[name] = number
    for name in ("sex", "age"):
        if name in study.facts:
            facts[name] = study.facts[name]
    day = deidentifier.date(study.patient, study.facts.get("date", ""))
    return facts | ({"date": day} if day else {})


def _vendor(text: str) -> str:
    words = text.lower()
    return next((name for name in _VENDORS if re.search(rf"\b{name}\b", words)), "other")


def _number(text: str) -> float | None:
    """A plain positive number of at most four digits: nothing longer can be a number of a person."""
    try:
        value = round(float(text), 2)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 < value < 1000 else None
