"""Writing without half-written results: everything is made beside its place and moved there when it is whole."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from LCTfoundLib.errors import OutputError

__all__ = ["atomic_folder", "atomic_path", "output_errors"]

_FULL = {errno.ENOSPC, errno.EDQUOT if hasattr(errno, "EDQUOT") else errno.ENOSPC, errno.EFBIG}


@contextmanager
def output_errors(target: Path | str) -> Iterator[None]:
    """Turn the system's errors of writing into an ``OutputError`` with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(f"The disk of {target} is full; free some space and run again.") from error
        reason = error.strerror or type(error).__name__
        raise OutputError(f"{target} cannot be written ({reason}); name another output place.") from error


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """A new path in the folder of ``target``, with its suffixes; the file written there takes the place of ``target``.

    When the block fails, the new file is removed and an old ``target`` stays as it was. The folder is made if missing.

    Raises:
        OutputError: the place cannot be written or is full (also for an ``OSError`` within the block).
    """
    target = Path(target)
    # Hidden, and the suffixes at the end: writers choose the format by them.
    staging = target.with_name(f".{secrets.token_hex(4)}-{target.name}")
    with output_errors(target):
        if target.is_dir():
            raise OutputError(f"{target} is a folder; name a file for the output.")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staging
            os.replace(staging, target)
        finally:
            with suppress(OSError):
                staging.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends well, and else is removed.

    Args:
        target: must not exist, or be an empty folder, or anything that is a folder with ``overwrite``.
        overwrite: replace an old folder; it goes only when the new one stands.

    Raises:
        OutputError: ``target`` is in use, or the place cannot be written or is full.
    """
    target = Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise OutputError(f"{target} is already there; name another output folder.")
    staging = target.with_name(f".{secrets.token_hex(4)}-{target.name}")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        try:
            yield staging
            _take_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _take_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    old = staging.with_name(staging.name + "-old")
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
