"""The weights of this Slicer: found, shown, checked, brought in, deleted; and licenses that must be acknowledged.

Qt-free, and free of torch: the engine's registry reads cards and checksums with nothing but Python. What takes long
(reading gigabytes) comes in steps, for a timer to drive.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from LCTfoundLib.errors import OutputError, WeightError
from LCTfoundLib.runtime.files import atomic_path, output_errors
from LCTfoundLib.weights.registry import (
    Card,
    WeightEntry,
    list_weights,
    load_card,
    search_folders,
    shipped_folders,
    user_folder,
    verify_in_steps,
)
from LCTfoundSlicer.translation import tr as _

__all__ = [
    "CheckResult",
    "Origin",
    "Settings",
    "Weight",
    "WeightImport",
    "Weights",
    "cardLines",
    "isPermissive",
    "licenseText",
    "needsAcknowledgement",
    "weightsFolder",
]

_FOLDER_KEY = "LCTfound/WeightsFolder"
_ACKNOWLEDGED_KEY = "LCTfound/AcknowledgedLicenses"
_SUFFIX = ".safetensors"
#: Copied at once: some 20 ms.
_STEP_BYTES = 16 * 2**20
#: Licenses that ask for no more than naming the author. Names as of SPDX, and as people write them.
_PERMISSIVE = re.compile(
    r"apache-2\.0|mit|mit-0|isc|bsd|0bsd|bsd-[234]-clause(-clear)?|cc0(-1\.0)?|cc-by-[1-4]\.[05]|unlicense|zlib"
)


class Settings(Protocol):
    """Where a few texts are kept; QSettings is one."""

    def value(self, key: str) -> Any: ...

    def setValue(self, key: str, value: Any) -> None: ...

    def remove(self, key: str) -> None: ...


class Origin(Enum):
    """Where a weight comes from."""

    SHIPPED = "shipped"
    USER = "user"
    #: The folder that the user chose.
    CHOSEN = "chosen"
    #: A folder that the environment variable names: an administrator's.
    ENVIRONMENT = "environment"

    @property
    def text(self) -> str:
        """To show."""
        return {
            Origin.SHIPPED: _("came with LCTfound"),
            Origin.USER: _("brought in by you"),
            Origin.CHOSEN: _("the folder you chose"),
            Origin.ENVIRONMENT: _("provided by your administrator"),
        }[self]


class CheckResult(Enum):
    """What is known of a weight's checksum."""

    UNCHECKED = "unchecked"
    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class Weight:
    """A weight that was found.

    Attributes:
        entry: of the engine's registry.
        origin: where it comes from.
        result: of the check of its checksum.
        problem: what is wrong with it; empty otherwise.
    """

    entry: WeightEntry
    origin: Origin
    result: CheckResult = CheckResult.UNCHECKED
    problem: str = ""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def card(self) -> Card | None:
        return self.entry.card

    @property
    def megabytes(self) -> float:
        """Size of the file; 0 if it is gone."""
        with suppress(OSError):
            return self.entry.path.stat().st_size / 1e6
        return 0.0

    @property
    def canBeDeleted(self) -> bool:
        """Only what the user brought in: what was shipped, and what an administrator provides, stays."""
        return self.origin in (Origin.USER, Origin.CHOSEN)

    def resultText(self) -> str:
        """The state of the check, to show."""
        if self.problem:
            return _("damaged")
        return {
            CheckResult.UNCHECKED: _("not checked yet"),
            CheckResult.GOOD: _("checksum right"),
            CheckResult.BAD: _("damaged"),
        }[self.result]


@dataclass(frozen=True)
class WeightImport:
    """How an import ended.

    Attributes:
        imported: names of weights that are there now.
        problems: one sentence for each that was refused.
    """

    imported: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class Weights:
    """The weights of this Slicer.

    Args:
        settings: of the user.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._results: dict[tuple[Path, int, int], str] = {}

    @property
    def folder(self) -> Path | None:
        """The folder that the user chose, also when it is not there (a network drive may come back)."""
        text = self._settings.value(_FOLDER_KEY)
        return Path(text) if isinstance(text, str) and text else None

    def chooseFolder(self, folder: Path | None) -> None:
        """Look into a folder before all others, from now on; None: no longer.

        Raises:
            WeightError: there is no such folder.
        """
        if folder is None:
            self._settings.remove(_FOLDER_KEY)
            return
        if not folder.is_dir():
            raise WeightError(_("There is no folder {folder} for weights; choose another.").format(folder=folder))
        self._settings.setValue(_FOLDER_KEY, str(folder.resolve()))

    def usableFolder(self) -> str | None:
        """The chosen folder for a request to the worker; None where none was chosen or it is not there now."""
        folder = self.folder
        return str(folder) if folder is not None and folder.is_dir() else None

    def importFolder(self) -> Path:
        """Where weights are brought in."""
        folder = self.folder
        return folder if folder is not None and not _isShipped(folder) else user_folder()

    def all(self) -> list[Weight]:
        """The weights that would be used, by name, with what is known of their checksums."""
        return [self._weight(entry) for entry in list_weights(search_folders(self.folder))]

    def find(self, name: str) -> Weight | None:
        """A weight by name."""
        return next((weight for weight in self.all() if weight.name == name), None)

    def check(self, weight: Weight) -> Generator[float, None, str]:
        """Compare a weight's checksum with its card's, in steps.

        Yields:
            The fraction done; the return value is the problem, empty if there is none. The result is remembered until
            the file changes.
        """
        problem = yield from verify_in_steps(weight.entry)
        self._results[_identity(weight.entry.path)] = problem
        return problem

    def importFrom(self, source: Path) -> Generator[float, None, WeightImport]:
        """Bring in all weights of a folder, each with its card, in steps; what its card does not vouch for is refused.

        Yields:
            The fraction of bytes copied; the return value tells what was brought in.
        """
        paths = sorted(path for path in source.glob(f"*{_SUFFIX}") if path.is_file() and path.name[0] != ".")
        if not paths:
            problem = _("There is no weight ({suffix}) in {folder}.").format(suffix=f"*{_SUFFIX}", folder=source)
            return WeightImport(problems=(problem,))
        total = max(1, sum(path.stat().st_size for path in paths))
        imported, problems, done = [], [], 0
        for path in paths:
            try:
                for copied in self._importOne(path):
                    yield min(1.0, (done + copied) / total)
                imported.append(path.name.removesuffix(_SUFFIX))
            except (WeightError, OutputError) as error:
                problems.append(str(error))
            done += path.stat().st_size
        return WeightImport(tuple(imported), tuple(problems))

    def delete(self, weight: Weight) -> None:
        """Delete a weight that the user brought in, and its card.

        Raises:
            WeightError: it is not the user's, or cannot be deleted.
        """
        current = self.find(weight.name)
        if current is None or current.entry.path != weight.entry.path or not current.canBeDeleted:
            raise WeightError(
                _("The weight '{name}' belongs to LCTfound or to an administrator and stays.").format(name=weight.name)
            )
        try:
            weight.entry.path.unlink()
            _cardPath(weight.entry.path).unlink(missing_ok=True)
        except OSError as error:
            raise WeightError(
                _("{path} cannot be deleted ({reason}); close what uses it, or check its permissions.").format(
                    path=weight.entry.path, reason=error.strerror
                )
            ) from error

    def unacknowledged(self, names: Iterable[str]) -> list[Card]:
        """Cards whose license must be acknowledged before the weights of these names are used for the first time."""
        wanted = set(names)
        cards = [weight.card for weight in self.all() if weight.name in wanted and weight.card is not None]
        return [card for card in cards if needsAcknowledgement(card) and _acknowledgement(card) not in self._known()]

    def acknowledge(self, card: Card) -> None:
        """The user has acknowledged the license of this weight in this version."""
        known = self._known() | {_acknowledgement(card)}
        self._settings.setValue(_ACKNOWLEDGED_KEY, "\n".join(sorted(known)))

    def _known(self) -> set[str]:
        text = self._settings.value(_ACKNOWLEDGED_KEY)
        return set(text.splitlines()) if isinstance(text, str) else set()

    def _weight(self, entry: WeightEntry) -> Weight:
        origin = self._origin(entry.path.parent)
        if entry.problem:
            return Weight(entry, origin, CheckResult.BAD, entry.problem)
        problem = self._results.get(_identity(entry.path))
        if problem is None:
            return Weight(entry, origin)
        return Weight(entry, origin, CheckResult.BAD if problem else CheckResult.GOOD, problem)

    def _origin(self, folder: Path) -> Origin:
        if _isShipped(folder):
            return Origin.SHIPPED
        if _isSame(folder, user_folder()):
            return Origin.USER
        return Origin.CHOSEN if self.folder is not None and _isSame(folder, self.folder) else Origin.ENVIRONMENT

    def _importOne(self, path: Path) -> Iterator[int]:
        """Copy one weight and its card; both appear whole and checked, or not at all. Yields the bytes copied."""
        card, target = load_card(_cardPath(path)), self.importFolder() / path.name
        if card.name != path.name.removesuffix(_SUFFIX):
            raise WeightError(
                _("The card of {path} is that of '{name}'; get the weight and its card again.").format(
                    path=path, name=card.name
                )
            )
        if target.exists() and _isSame(target.parent, path.parent):
            raise WeightError(_("{path} is already in the folder of weights.").format(path=path))
        with output_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as copy:
                yield from _copyChecked(path, copy, card)
            with atomic_path(_cardPath(target)) as copy:
                shutil.copyfile(_cardPath(path), copy)


def weightsFolder() -> str | None:
    """The folder of weights that the user of this Slicer chose, for a request to the worker; None: the usual places."""
    from LCTfoundSlicer.slicer_doors import applicationSettings

    return Weights(applicationSettings()).usableFolder()


def isPermissive(license: str) -> bool:
    """Whether a license asks for no more than naming the author; of several joined by AND all must, by OR one."""
    text = license.strip().replace("(", " ").replace(")", " ")
    alternatives = re.split(r"\s+or\s+", text, flags=re.IGNORECASE)
    return any(_allPermissive(alternative) for alternative in alternatives)


def _allPermissive(text: str) -> bool:
    parts = [part.strip().lower().replace(" ", "-") for part in re.split(r"\s+and\s+|[,;&]", text, flags=re.IGNORECASE)]
    return all(_PERMISSIVE.fullmatch(part) is not None for part in parts)


def needsAcknowledgement(card: Card) -> bool:
    """Whether a weight's license, or one of the data it was trained on, restricts what may be done with it."""
    return not all(isPermissive(license) for license in (card.license, *(source.license for source in card.data)))


def licenseText(card: Card) -> str:
    """What the user acknowledges."""
    lines = [
        _("The weight '{name}' (version {version}) has the license {license}.").format(
            name=card.name, version=card.version, license=card.license or _("(none stated)")
        )
    ]
    lines += [
        _("It was trained on {data} (license: {license}).").format(
            data=source.name, license=source.license or _("none stated")
        )
        for source in card.data
    ]
    lines.append(
        _("Such a license may forbid some uses, for example commercial ones. Intended use: {use}").format(
            use=card.intended_use
        )
    )
    return "\n".join(lines)


def cardLines(weight: Weight) -> list[tuple[str, str]]:
    """(what, value) lines of a weight's card, to show."""
    card = weight.card
    if card is None:
        return [(_("Weight"), weight.name), (_("Problem"), weight.problem), (_("File"), str(weight.entry.path))]
    lines = [
        (_("Weight"), _("{name}, version {version}").format(name=card.name, version=card.version)),
        (_("Task"), card.task),
        (_("Intended use"), card.intended_use),
        (_("Limits"), card.limits),
        (_("License"), card.license),
        (_("Trained on"), "; ".join(f"{source.name} ({source.license})" for source in card.data)),
        *((_("Measured"), line) for line in _measured(card.numbers)),
        (
            _("Network"),
            _("{architecture}, {classes} outputs").format(architecture=card.architecture, classes=len(card.classes)),
        ),
        (_("Spacing"), " x ".join(f"{step:g}" for step in card.spacing) + " mm"),
        (_("From"), weight.origin.text),
        (_("File"), f"{weight.entry.path} ({weight.megabytes:.1f} MB)"),
        (_("SHA-256"), f"{card.sha256} ({weight.resultText()})"),
        (_("Code"), card.commit),
    ]
    if weight.problem:
        lines.insert(0, (_("Problem"), weight.problem))
    return lines


def _measured(numbers: dict[str, Any]) -> Iterator[str]:
    """Measured results, one line for each dataset; flat ones on one line."""
    flat = {key: value for key, value in numbers.items() if not isinstance(value, dict)}
    if flat:
        yield _values(flat)
    for dataset, values in numbers.items():
        if isinstance(values, dict):
            yield f"{dataset}: {_values(values)}"


def _values(values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"({_values(value)})"
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{str(key).replace('_', ' ')} {text(value)}" for key, value in values.items())


def _copyChecked(source: Path, target: Path, card: Card) -> Iterator[int]:
    digest, copied = hashlib.sha256(), 0
    try:
        with source.open("rb") as read, target.open("wb") as write:
            while piece := read.read(_STEP_BYTES):
                digest.update(piece)
                write.write(piece)
                copied += len(piece)
                yield copied
    except PermissionError as error:
        if error.filename != str(source):
            raise
        raise WeightError(_("{path} cannot be read; check its permissions.").format(path=source)) from error
    if copied != card.bytes or digest.hexdigest() != card.sha256:
        raise WeightError(
            _("The weight {path} does not match its card's checksum: damaged or changed; get it again.").format(
                path=source
            )
        )


def _cardPath(weight: Path) -> Path:
    return weight.with_name(weight.name.removesuffix(_SUFFIX) + ".json")


def _acknowledgement(card: Card) -> str:
    """Another version or another license is another thing to acknowledge."""
    licenses = [card.license, *(source.license for source in card.data)]
    return " | ".join(" ".join(part.split()) for part in (card.name, card.version, *licenses))


def _identity(path: Path) -> tuple[Path, int, int]:
    """A file that changed is another one: nothing is known of it."""
    try:
        status = path.stat()
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def _isShipped(folder: Path) -> bool:
    return any(_isSame(folder, shipped) for shipped in shipped_folders())


def _isSame(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
