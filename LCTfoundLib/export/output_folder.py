"""A folder that changes all at once: results appear whole or not at all, and nothing of others is touched.

What belongs to us is what the folder's manifest lists with its checksum. An earlier result of ours is replaced; a file
that somebody changed since is kept under another name; a file of others in our way stops the export before it writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from LCTfoundLib.errors import OutputError
from LCTfoundLib.runtime.files import output_errors

__all__ = ["MANIFEST", "check_output_folder", "file_entries", "output_folder"]

MANIFEST = "manifest.json"
_PRODUCT = "LCTfound"
_STAGE = ".lctfound-unfinished-"


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder; when the block ends well its files become the content of ``folder``.

    The scratch folder must hold a ``manifest.json`` by then (``product``, ``files`` from ``file_entries``). After an
    error, a full disk or a cancel it is removed and ``folder`` is as before.

    Raises:
        OutputError: the place is read-only, full, not a folder, or a file of others is in the way.
    """
    fresh = not folder.exists()
    with output_errors(folder):
        if not fresh and not folder.is_dir():
            raise OutputError(f"{folder} is a file; choose a folder for the results.")
        place = folder.parent if fresh else folder
        place.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(place)
        stage = place / f"{_STAGE}{os.getpid()}-{folder.name if fresh else 'update'}"
        stage.mkdir()
        try:
            yield stage
            if fresh and not folder.exists():
                stage.rename(folder)
            else:
                _update(folder, stage)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def check_output_folder(target: Path, overwrite: bool = False) -> None:
    """Refuse before the long work what would fail after it.

    Args:
        target: must not exist, or be empty, or with ``overwrite`` hold an earlier result.
        overwrite: replace an earlier result.

    Raises:
        OutputError: the folder is in use or cannot be written.
    """
    with output_errors(target):
        if target.is_dir() and any(target.iterdir()):
            if not (target / MANIFEST).is_file():
                raise OutputError(f"{target} holds other files; name an empty or a new folder for the result.")
            if not overwrite:
                raise OutputError(f"{target} already holds a result; name another folder or add --overwrite.")
        place = target
        while not os.path.lexists(place):
            place = place.parent
        tempfile.TemporaryDirectory(dir=place).cleanup()


def file_entries(folder: Path) -> list[dict[str, Any]]:
    """Path, sha256 and size of all files below a folder but the manifest, in order of their path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return [{"path": p.relative_to(folder).as_posix(), "sha256": _sha256(p), "bytes": p.stat().st_size} for p in paths]


def _remove_left_overs(place: Path) -> None:
    """Remove scratch folders of runs that died."""
    for path in place.glob(f"{_STAGE}*"):
        pid = path.name.removeprefix(_STAGE).split("-")[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _update(folder: Path, stage: Path) -> None:
    """Move the files of ``stage`` into an existing folder.

    The manifest goes first, listing old and new files, and last as it shall be: an interrupted update is recognized as
    ours and ``"complete"`` tells a reader whether the files belong together.
    """
    old = _known_files(folder)
    manifest = json.loads((stage / MANIFEST).read_text(encoding="utf-8"))
    new = [entry["path"] for entry in manifest["files"]]
    _refuse_foreign(folder, [*new, MANIFEST], old)
    for path, hashes in old.items():
        if (folder / path).is_file() and _sha256(folder / path) not in hashes:
            _keep_edited(folder / path)
    union = [{"path": path, "sha256": value} for path, hashes in old.items() for value in hashes]
    interim = {"product": _PRODUCT, "complete": False, "files": union + manifest["files"]}
    _replace_text(folder / MANIFEST, stage / "manifest.interim", json.dumps(interim))
    for path in new:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / path, folder / path)
    for path in set(old) - set(new):
        (folder / path).unlink(missing_ok=True)
        _remove_empty_parents(folder, path)
    os.replace(stage / MANIFEST, folder / MANIFEST)


def _known_files(folder: Path) -> dict[str, set[str]]:
    """Checksums by path of the files an earlier export wrote; empty where there is no manifest of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["files"] if manifest.get("product") == _PRODUCT else []
        known: dict[str, set[str]] = {}
        for entry in entries:
            if _stays_inside(entry["path"]):
                known.setdefault(entry["path"], set()).add(entry["sha256"])
        return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _stays_inside(path: str) -> bool:
    """A manifest that was tampered with must not lead us to files elsewhere."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and "\\" not in path and ":" not in path


def _refuse_foreign(folder: Path, paths: list[str], old: Mapping[str, set[str]]) -> None:
    for path in paths:
        ours = path in old or (path == MANIFEST and old)
        if (folder / path).exists() and not ours:
            raise OutputError(f"{folder / path} was not written by {_PRODUCT}; move it away or choose another folder.")


def _keep_edited(path: Path) -> None:
    """Move a file that was changed by hand out of the way: ``report.html`` becomes ``report (edited).html``."""
    stem, dot, suffix = path.name.partition(".")
    for number in range(1, 10_000):
        kept = path.with_name(f"{stem} (edited{'' if number == 1 else f' {number}'}){dot}{suffix}")
        if not kept.exists():
            path.rename(kept)
            return


def _replace_text(path: Path, scratch: Path, text: str) -> None:
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _remove_empty_parents(folder: Path, path: str) -> None:
    for parent in (folder / path).parents:
        if parent == folder or (parent.exists() and any(parent.iterdir())):
            return
        if parent.exists():
            parent.rmdir()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
