"""Shards: tar files in WebDataset's layout, one sample a slice.

``<study>_<k>.npz`` holds ``hu`` (int16, rows x columns); ``<study>_<k>.json`` holds the study's allowed facts and
``slice`` (k, counted from the feet up). The slices of a study follow one another in one shard, so neighbours come from
a short buffer. The same study gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from LCTfoundLib.errors import OutputError
from LCTfoundLib.runtime.files import output_errors
from training.curation.ledger import PackedShard

__all__ = ["ShardWriter", "check_end", "decode_slice", "read_shard"]

#: Real slices of 512 x 512: level 1 makes 273 kB of 524 kB in 6 ms, level 6 makes 267 kB in 28 ms.
_COMPRESSION = 1
#: What a tar file ends with.
_END = bytes(2 * tarfile.BLOCKSIZE)


class ShardWriter:
    """Writes one shard under a hidden name in ``folder``.

    :meth:`close` makes it whole; leaving the block without it removes the file.

    Raises (all methods):
        OutputError: the disk is full or read-only; nothing is left behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = secrets.token_hex(8)
        self._name, self._staging = f"shard-{token}.tar", f".{token}.tar"
        self._studies = self._slices = 0
        self._closed = False
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / self._staging).open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            self._discard()

    def _discard(self) -> None:
        self._closed = True
        with suppress(OSError):  # closing flushes, which may fail again
            self._file.close()
        with suppress(OSError):
            (self.folder / self._staging).unlink(missing_ok=True)

    @property
    def studies(self) -> int:
        """Studies written so far."""
        return self._studies

    def add(self, array: np.ndarray, facts: dict[str, Any]) -> None:
        """Append a study: int16 HU ``(slices, rows, columns)`` and its allowed facts."""
        if array.dtype != np.int16 or array.ndim != 3:
            raise ValueError(f"a study is int16 in 3 dimensions, not {array.dtype} in {array.ndim}")
        with output_errors(self.folder):
            try:
                for k, plane in enumerate(array):
                    key = f"{facts['study']}_{k:04d}"
                    self._append(f"{key}.npz", _npz(plane))
                    self._append(f"{key}.json", json.dumps(facts | {"slice": k}, sort_keys=True).encode())
            except OSError:
                self._discard()
                raise
        self._studies += 1
        self._slices += len(array)

    def _append(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)  # with no time, user or group
        entry.size = len(data)
        self._tar.addfile(entry, io.BytesIO(data))

    def close(self) -> PackedShard | None:
        """The whole shard, on the disk for good; None (and no file) if no study was added."""
        if self._studies == 0:
            self._discard()
            return None
        path = self.folder / self._staging
        with output_errors(self.folder):
            try:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = path.stat().st_size
            except OSError:
                self._discard()
                raise
        self._closed = True
        return PackedShard(self._name, self._staging, self._studies, self._slices, size, digest)


def _npz(plane: np.ndarray) -> bytes:
    """As ``np.savez_compressed(hu=plane)``, at the chosen level and without a time."""
    array = io.BytesIO()
    np.lib.format.write_array(array, np.ascontiguousarray(plane), allow_pickle=False)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("hu.npy")
        entry.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(entry, array.getvalue(), compresslevel=_COMPRESSION)
    return buffer.getvalue()


def read_shard(path: Path) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Slices of a shard in order: int16 HU (rows, columns), and facts.

    Raises:
        OutputError: the file is no whole shard.
    """
    try:
        check_end(path)
        with tarfile.open(path, "r|") as archive:
            plane: np.ndarray | None = None
            for entry in archive:
                data = archive.extractfile(entry)
                if data is None:
                    continue
                if entry.name.endswith(".npz"):
                    plane = decode_slice(data.read())
                elif plane is not None:
                    yield plane, json.loads(data.read())
                    plane = None
    except (tarfile.TarError, OSError, ValueError, KeyError) as error:
        raise OutputError(f"{path} is no whole shard ({error}); copy it again, or curate its studies again.") from error


def check_end(path: Path) -> None:
    """Refuse a shard that was cut off: between two entries, tarfile takes that for its end and slices go unnoticed.

    Raises:
        ValueError: the end is missing.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(_END), 0))
        if file.read() != _END:
            raise ValueError("its end is missing")


def decode_slice(data: bytes) -> np.ndarray:
    """int16 HU (rows, columns) of a slice's ``.npz``.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return file["hu"]
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"no slice: {error}") from error
