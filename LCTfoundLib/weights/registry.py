"""Trained weights: a safetensors file and a JSON card each; found, checked and loaded.

Only safetensors are read: a pickled file can run code when it is opened. A file whose checksum differs from its card's
is refused.

Listing and checking need nothing but Python, so that a program whose torch is not installed yet can show its weights;
torch and safetensors are imported where tensors are read or written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LCTfoundLib.errors import WeightError
from LCTfoundLib.runtime.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Card",
    "DataSource",
    "WeightEntry",
    "list_weights",
    "load_card",
    "load_weight",
    "save_weight",
    "search_folders",
    "shipped_folders",
    "user_folder",
    "verify",
    "verify_in_steps",
]

#: More folders to look into, separated like PATH.
ENVIRONMENT_VARIABLE = "LCTFOUND_WEIGHTS"

_SUFFIX = ".safetensors"
_PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_MAX_CARD_BYTES = 1_000_000
_MAX_WEIGHT_BYTES = 4 * 2**30
#: Read at once while a checksum is computed: some 10 ms, so that a window that checks step by step stays alive.
_STEP_BYTES = 16 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSource:
    """Data a weight was trained on, and the license of it."""

    name: str
    license: str


@dataclass(frozen=True)
class Card:
    """What is known of a weight.

    Attributes:
        name: file name without suffix.
        version: of the weight.
        task: what it does, for a person.
        architecture: name of the network class.
        architecture_parameters: what the network is built from.
        spacing: mm along (i, j, k) that the network expects.
        classes: names of the outputs, in order; for several heads, head after head.
        data: what it was trained on.
        license: of the weight: the strictest of its data's.
        seed: of the training.
        commit: of the training code.
        numbers: measured results, ``{"dataset": {"measure": value}}`` or flat.
        intended_use: what it is for.
        limits: what it is not for, and where it is known to fail.
        training: how it was trained (steps, hardware, time), for reproduction.
        sha256: of the weight file; filled in by :func:`save_weight`.
        bytes: size of the weight file; filled in by :func:`save_weight`.
    """

    name: str
    version: str
    task: str
    architecture: str
    architecture_parameters: dict[str, Any]
    spacing: tuple[float, float, float]
    classes: tuple[str, ...]
    data: tuple[DataSource, ...]
    license: str
    seed: int
    commit: str
    numbers: dict[str, Any]
    intended_use: str
    limits: str
    training: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    bytes: int = 0

    def to_json(self) -> str:
        """The content of the card file."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class WeightEntry:
    """A weight that was found.

    Attributes:
        path: of the weight file.
        card: its card; None when that cannot be used.
        problem: what is wrong with it, empty when nothing is (the checksum is not looked at here; see ``verify``).
    """

    path: Path
    card: Card | None
    problem: str = ""

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(_SUFFIX)


def user_folder() -> Path:
    """Where a user keeps own or downloaded weights on this platform (it need not exist)."""
    home = Path.home()
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = home / "Library" / "Application Support"
    else:
        root = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return root / "LCTfound" / "Weights"


def shipped_folders() -> list[Path]:
    """Where weights that came with the program lie; nobody but an update of the program changes them."""
    package = Path(__file__).resolve().parent.parent
    return [package / "Resources" / "Weights", package.parent / "Resources" / "Weights"]


def search_folders(folder: Path | str | None = None) -> list[Path]:
    """Existing folders in the order they are looked into.

    An explicit folder, then those of the environment variable ``LCTFOUND_WEIGHTS``, the user's folder, and what came
    with the program: in the package when it is installed, beside it in a clone and in Slicer's module folder.
    """
    candidates = [Path(folder)] if folder is not None else []
    candidates += [Path(part) for part in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep) if part]
    candidates += [user_folder(), *shipped_folders()]
    return list(dict.fromkeys(path for path in candidates if path.is_dir()))


def list_weights(folders: Sequence[Path | str] | None = None) -> list[WeightEntry]:
    """All weights, by name; of several of one name the one that would be loaded.

    Args:
        folders: where to look; default: :func:`search_folders`.
    """
    found: dict[str, WeightEntry] = {}
    for folder in search_folders() if folders is None else [Path(folder) for folder in folders]:
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            if path.name.startswith(".") or path.name.removesuffix(_SUFFIX) in found:
                continue
            found[path.name.removesuffix(_SUFFIX)] = _entry(path)
    return [found[name] for name in sorted(found)]


def load_card(path: Path | str) -> Card:
    """Read and validate a card file.

    Raises:
        WeightError: missing, too large, no JSON, or a field is missing or of another type.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_CARD_BYTES:
            raise WeightError(f"The card {path} is larger than a card can be; get the weight and its card again.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightError(f"The card {path} is missing; put it beside its weight file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(f"The card {path} cannot be read ({error}); get the weight and its card again.") from error
    try:
        return _card_from(values)
    except ValueError as error:
        raise WeightError(f"The card {path} is not valid ({error}); get the weight and its card again.") from error


def load_weight(name: str, folder: Path | str | None = None) -> tuple[Card, dict[str, Tensor]]:
    """Load a weight by name.

    Args:
        name: such as ``lung_coarse``.
        folder: looked into before the other places.

    Returns:
        The card, and the tensors on the CPU (half precision comes back as float32).

    Raises:
        WeightError: missing, damaged, or not what its card says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = _find(name, folder)
    card = load_card(_card_path(path))
    if card.name != name:
        raise WeightError(f"The card of {path} is that of '{card.name}'; get the weight and its card again.")
    content = _checked_content(path, card)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightError(f"The weight {path} is no safetensors file ({error}); get it again.") from error
    _log.info("weight %s %s from %s", card.name, card.version, path)
    return card, {key: _single(tensor) for key, tensor in tensors.items()}


def verify(entry: WeightEntry) -> str:
    """What is wrong with a weight that was found, its checksum included; empty when nothing is."""
    steps = verify_in_steps(entry)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def verify_in_steps(entry: WeightEntry) -> Generator[float, None, str]:
    """:func:`verify` piece by piece, for a window that must not stand still.

    Yields:
        The fraction done, 0 to 1; the generator's return value is what is wrong, empty when nothing is.
    """
    if entry.card is None or entry.problem:
        return entry.problem
    try:
        _check_size(entry.path, entry.card)
        digest, done = hashlib.sha256(), 0
        with _readable(entry.path), entry.path.open("rb") as file:
            while piece := file.read(_STEP_BYTES):
                digest.update(piece)
                done += len(piece)
                yield done / entry.card.bytes
        _check_digest(entry.path, entry.card, digest.hexdigest())
    except WeightError as error:
        return str(error)
    return ""


def save_weight(state_dict: Mapping[str, Tensor], card: Card, folder: Path | str) -> Card:
    """Write a weight in half precision, and its card; both appear whole or not at all.

    Args:
        state_dict: tensors; floating point ones are stored as float16, others as they are.
        card: its ``sha256`` and ``bytes`` are filled in.
        folder: made if missing.

    Returns:
        The card as written.

    Raises:
        ValueError: the name cannot be a file name, or a value does not fit float16 or is not finite.
        OutputError: the folder cannot be written.
    """
    from safetensors.torch import save

    if not _NAME.fullmatch(card.name):
        raise ValueError(f"'{card.name}' cannot be the name of a weight")
    content = save({key: _half(key, tensor) for key, tensor in state_dict.items()}, {"format": "pt"})
    written = replace(card, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    _card_from(json.loads(written.to_json()))  # what cannot be read back must not be written
    path = Path(folder) / f"{card.name}{_SUFFIX}"
    with atomic_path(path) as weight_file, atomic_path(_card_path(path)) as card_file:
        weight_file.write_bytes(content)
        card_file.write_text(written.to_json(), encoding="utf-8")
    return written


def _card_path(weight: Path) -> Path:
    return weight.with_name(weight.name.removesuffix(_SUFFIX) + ".json")


def _entry(path: Path) -> WeightEntry:
    try:
        return WeightEntry(path, load_card(_card_path(path)))
    except WeightError as error:
        return WeightEntry(path, None, str(error))


def _find(name: str, folder: Path | str | None) -> Path:
    if not _NAME.fullmatch(name):
        raise WeightError(f"'{name}' is no name of a weight; give the name of one that 'weights' lists.")
    if folder is not None and not Path(folder).is_dir():
        raise WeightError(f"There is no folder {folder} for weights; check the path.")
    folders = search_folders(folder)
    for place in folders:
        path = place / f"{name}{_SUFFIX}"
        if path.is_file():
            return path
        pickled = [place / f"{name}{suffix}" for suffix in _PICKLED if (place / f"{name}{suffix}").is_file()]
        if pickled:
            raise WeightError(f"{pickled[0]} may run code when opened; convert it to safetensors, with a card.")
    places = ", ".join(str(place) for place in folders) or "no folder"
    raise WeightError(
        f"There is no weight '{name}' (looked into {places}); put {name}{_SUFFIX} and {name}.json into {user_folder()}."
    )


def _checked_content(path: Path, card: Card) -> bytes:
    """The file's bytes, read once, so that what was checked is what is loaded."""
    _check_size(path, card)
    with _readable(path):
        content = path.read_bytes()
    _check_digest(path, card, hashlib.sha256(content).hexdigest())
    return content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the system's errors of reading into a ``WeightError`` with the remedy."""
    try:
        yield
    except OSError as error:
        raise WeightError(f"The weight {path} cannot be read ({error.strerror}); check its permissions.") from error


def _check_size(path: Path, card: Card) -> None:
    with _readable(path):
        size = path.stat().st_size
    if size > _MAX_WEIGHT_BYTES:
        raise WeightError(f"The weight {path} is larger than 4 GB; get it again.")
    if size != card.bytes:
        raise WeightError(f"The weight {path} has {size} bytes instead of {card.bytes}: damaged; get it again.")


def _check_digest(path: Path, card: Card, digest: str) -> None:
    if digest != card.sha256:
        raise WeightError(f"The weight {path} does not match its card's checksum: damaged or changed; get it again.")


def _single(tensor: Tensor) -> Tensor:
    import torch

    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _half(key: str, tensor: Tensor) -> Tensor:
    import torch

    tensor = tensor.detach().to("cpu").contiguous().clone()  # safetensors refuses tensors that share memory
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not torch.isfinite(half).all():
        raise ValueError(f"'{key}' has values that float16 cannot hold")
    return half


def _card_from(values: Any) -> Card:
    """A card from parsed JSON; fields of later versions are left out.

    Raises:
        ValueError: naming the field that is wrong.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    known = {key: values[key] for key in (item.name for item in fields(Card)) if key in values}
    known.setdefault("training", {})
    missing = [item.name for item in fields(Card) if item.name not in known]
    if missing:
        raise ValueError(f"without {', '.join(missing)}")
    _check_types(known)
    known["spacing"] = tuple(float(step) for step in known["spacing"])
    known["classes"] = tuple(known["classes"])
    known["data"] = tuple(DataSource(item["name"], item["license"]) for item in known["data"])
    return Card(**known)


def _check_types(values: Mapping[str, Any]) -> None:
    for key in ("name", "version", "task", "architecture", "license", "commit", "intended_use", "limits", "sha256"):
        _require(isinstance(values[key], str), key, "text")
    for key in ("architecture_parameters", "numbers", "training"):
        _require(isinstance(values[key], dict), key, "an object")
    for key in ("seed", "bytes"):
        _require(isinstance(values[key], int) and not isinstance(values[key], bool), key, "a whole number")
    spacing, data = values["spacing"], values["data"]
    _require(_is_list_of(values["classes"], str), "classes", "a list of texts")
    _require(_is_list_of(spacing, (int, float)) and len(spacing) == 3, "spacing", "3 numbers")
    _require(all(math.isfinite(step) and 0 < step < 100 for step in spacing), "spacing", "in mm")
    named = _is_list_of(data, dict) and all(_is_list_of([d.get("name"), d.get("license")], str) for d in data)
    _require(named, "data", "a list of names with licenses")
    _require(_NAME.fullmatch(values["name"]) is not None, "name", "a file name")
    _require(_SHA256.fullmatch(values["sha256"]) is not None, "sha256", "64 hexadecimal digits")


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _require(condition: bool, key: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"'{key}' must be {expected}")
