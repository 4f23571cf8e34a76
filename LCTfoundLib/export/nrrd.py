"""NRRD files that tell of themselves: an image with its geometry, and key/value pairs of how it was made.

Written by hand, so that a full disk is an error of the system and not of a library that keeps the reason to itself.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from LCTfoundLib.volume import Volume

__all__ = ["write_nrrd"]

_TYPES = {np.dtype(np.float32): "float", np.dtype(np.int16): "short", np.dtype(np.uint8): "uchar"}


def write_nrrd(array: np.ndarray, pairs: Mapping[str, str], path: Path, grid: Volume | None = None) -> None:
    """Write an image.

    Args:
        array: (slices, rows, columns), float32, int16 or uint8.
        pairs: what to tell of it.
        path: of the file, whose folder exists.
        grid: where its voxels lie; None for an image that lies nowhere.

    Raises:
        OSError: the place cannot be written or is full.
        ValueError: an array of another type or shape.
    """
    if array.ndim != 3 or array.dtype not in _TYPES:
        raise ValueError(f"{array.dtype} of shape {array.shape}")
    lines = ["NRRD0004", "# Complete NRRD file format specification at:"]
    lines += ["# http://teem.sourceforge.net/nrrd/format.html", f"type: {_TYPES[array.dtype]}", "dimension: 3"]
    lines += [f"sizes: {' '.join(map(str, array.shape[::-1]))}", "endian: little", "encoding: gzip"]
    if grid is not None:
        steps = (grid.direction * grid.spacing).T.tolist()
        lines += ["space: left-posterior-superior", f"space directions: {' '.join(map(_vector, steps))}"]
        lines += ["kinds: domain domain domain", f"space origin: {_vector(grid.origin)}"]
    lines += [f"{key}:={_one_line(value)}" for key, value in pairs.items()]
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    content = gzip.compress(little.tobytes(), compresslevel=6, mtime=0)
    path.write_bytes(("\n".join(lines) + "\n\n").encode("utf-8") + content)


def _vector(values: list[float] | tuple[float, ...]) -> str:
    return f"({','.join(repr(float(value)) for value in values)})"


def _one_line(text: str) -> str:
    """A value as NRRD's key/value pairs want it: backslashes and line ends escaped."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")
