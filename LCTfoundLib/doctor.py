"""The doctor: what hardware and weights there are, what will run where, and what is wrong, each with its remedy."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from LCTfoundLib.case import read_record
from LCTfoundLib.demo import OUTPUT
from LCTfoundLib.networks.lung import COARSE, FINE
from LCTfoundLib.runtime.device import describe, free_memory
from LCTfoundLib.weights.registry import WeightEntry, list_weights, search_folders, user_folder, verify

__all__ = ["Check", "Verdict", "checks_table", "examine", "weights_table"]

#: Memory and disk a standard run needs, in GB; with less the doctor warns.
NEEDED_MEMORY_GB = 8.0
NEEDED_DISK_GB = 1.0


class Verdict(Enum):
    """How a check ended."""

    FINE = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, what was found, and for a problem the remedy in ``value``."""

    what: str
    value: str
    verdict: Verdict = Verdict.FINE


def examine(place: Path, weights_folder: Path | None = None) -> list[Check]:
    """All checks.

    Args:
        place: folder whose disk the results will go to.
        weights_folder: other place of the weights.
    """
    checks = [Check(what, value) for what, value in describe()]
    checks += [_memory(), _disk(place)]
    checks += _weights(weights_folder)
    return [*checks, _time(place / OUTPUT)]


def _memory() -> Check:
    free = free_memory() / 1e9
    if free < NEEDED_MEMORY_GB:
        value = f"{free:.1f} GB; {NEEDED_MEMORY_GB:.0f} GB are safe: close other programs or use --quality fast"
        return Check("Memory for a run", value, Verdict.WARNING)
    return Check("Memory for a run", f"{free:.1f} GB free, enough")


def _disk(place: Path) -> Check:
    try:
        free = shutil.disk_usage(place).free / 1e9
    except OSError as error:
        return Check("Free disk", f"{place} cannot be looked at ({error.strerror})", Verdict.PROBLEM)
    if free < NEEDED_DISK_GB:
        return Check("Free disk", f"{free:.1f} GB at {place.resolve()}; a result needs up to 1 GB", Verdict.WARNING)
    return Check("Free disk", f"{free:.0f} GB at {place.resolve()}")


def _time(demo: Path) -> Check:
    """The demo's time on this machine, once it ran: the only estimate that knows this machine."""
    record = read_record(demo)
    if record is None:
        return Check("Time of a run", "not measured here yet; run the demo once")
    seconds, quality = record.seconds, record.options["quality"]
    value = (
        f"the demo's CT took {seconds['total']:.0f} s here ({seconds['segment']:.0f} s to segment, quality {quality})"
    )
    return Check("Time of a run", f"{value} and {record.peak_memory_mb / 1000:.1f} GB")


def _weights(folder: Path | None) -> list[Check]:
    """The networks of lung segmentation must be there; whatever else is there must be whole."""
    entries = {entry.name: entry for entry in list_weights(search_folders(folder))}
    checks = []
    for name in dict.fromkeys((COARSE, FINE, *entries)):
        if name not in entries:
            value = f"missing; put {name}.safetensors and {name}.json into {user_folder()}"
            checks.append(Check(f"Weight {name}", value, Verdict.PROBLEM))
            continue
        problem = verify(entries[name])
        value = problem or f"{_size(entries[name])}, checksum right, {entries[name].path.parent}"
        checks.append(Check(f"Weight {name}", value, Verdict.PROBLEM if problem else Verdict.FINE))
    return checks


def checks_table(checks: list[Check]) -> str:
    """The checks as text for a terminal; what needs attention is marked."""
    marks = {Verdict.FINE: " ", Verdict.WARNING: "!", Verdict.PROBLEM: "X"}
    width = max(len(check.what) for check in checks)
    return "\n".join(f"{marks[check.verdict]} {check.what:<{width}}  {check.value}" for check in checks)


def weights_table(entries: list[WeightEntry]) -> str:
    """The weights found, as text for a terminal."""
    lines = [f"{'Name':<20}{'Version':<10}{'Size':>9}  {'License':<14}Task"]
    for entry in entries:
        card = entry.card
        if card is None:
            lines.append(f"{entry.name:<20}{entry.problem}")
        else:
            lines.append(f"{card.name:<20}{card.version:<10}{_size(entry):>9}  {card.license:<14}{card.task}")
    return "\n".join(lines)


def _size(entry: WeightEntry) -> str:
    return f"{entry.path.stat().st_size / 1e6:.1f} MB"
