"""What is asked of the worker: the fields of a request, each by name and kind, and the images that it names."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.errors import LCTfoundError, UnsuitableImage
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_checks import check_ct, warnings_of

__all__ = ["SCRATCH_VARIABLE", "BadRequest", "Fields", "array_of", "ct_of", "labels_of", "volume_of"]

#: Environment variable with the folder that outputs must lie in.
SCRATCH_VARIABLE = "LCTFOUND_SCRATCH"

_MOST_VOXELS = 1_500_000_000


class BadRequest(LCTfoundError):
    """A request that cannot be understood: a field is missing or of another kind, or a file is not there."""


@dataclass(frozen=True)
class Fields:
    """The fields of a JSON object, each asked for by name and kind."""

    values: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        return self._get(name, str, "a text", default)

    def number(self, name: str, default: int | None = None) -> int:
        return self._get(name, int, "a whole number", default)

    def decimal(self, name: str) -> float | None:
        """A finite number; None where it is missing."""
        if not self.has(name):
            return None
        if not _all_finite([self.values[name]]):
            raise BadRequest(f"'{name}' must be a finite number.")
        return float(self.values[name])

    def flag(self, name: str) -> bool:
        """Yes or no; no where it is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise BadRequest(f"'{name}' must be true or false.")
        return bool(value)

    def group(self, name: str) -> Fields:
        """An object; empty where it is missing."""
        return Fields(self._get(name, dict, "an object", {}))

    def items(self, name: str) -> list[Any]:
        """A list; empty where it is missing."""
        return self._get(name, list, "a list", [])

    def numbers(self, name: str, count: int) -> list[float]:
        values = self.items(name)
        if len(values) != count or not _all_finite(values):
            raise BadRequest(f"'{name}' must be {count} finite numbers.")
        return [float(value) for value in values]

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is missing."""
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise BadRequest(f"'{name}' must hold texts.")
        return values

    def path(self, name: str) -> Path:
        """An absolute path: the worker's own folder means nothing to who asks."""
        path = Path(self.text(name))
        if not path.is_absolute() or "\0" in str(path):
            raise BadRequest(f"'{name}' must be an absolute path, it is '{path}'.")
        return path

    def file(self, name: str) -> Path:
        """A file that is there."""
        path = self.path(name)
        if not path.is_file():
            raise BadRequest(f"There is no file {path}; '{name}' must name one.")
        return path

    def output(self) -> Path:
        """A new folder, within the scratch folder where one is set."""
        path, scratch = self.path("output"), os.environ.get(SCRATCH_VARIABLE)
        if scratch and not path.resolve().is_relative_to(Path(scratch).resolve()):
            raise BadRequest(f"The output {path} lies outside of the session's folder {scratch}; put it there.")
        return path

    def _get(self, name: str, kind: type, what: str, default: Any) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BadRequest(f"'{name}' must be {what}.")
        return value


def _all_finite(values: list[Any]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def ct_of(fields: Fields, progress: Progress) -> Volume:
    """A checked CT; what had to be mended is told as warnings."""
    volume = volume_of(fields, array_of(fields.file("array")))
    if volume.array.size > _MOST_VOXELS:
        raise UnsuitableImage(f"The image has {volume.array.size} voxels; crop it to the chest.")
    ct = check_ct(volume)
    for text in warnings_of(ct):
        progress.warn(text)
    return ct


def volume_of(fields: Fields, array: np.ndarray) -> Volume:
    (a, b, c), (x, y, z) = fields.numbers("spacing", 3), fields.numbers("origin", 3)
    direction = np.array(fields.numbers("direction", 9)).reshape(3, 3)
    metadata = {str(key): str(value) for key, value in fields.group("metadata").values.items()}
    if array.ndim != 3:
        raise UnsuitableImage(f"The image has {array.ndim} dimensions; give one volume.")
    try:
        return Volume(array, (a, b, c), (x, y, z), direction, metadata)
    except ValueError as error:
        raise UnsuitableImage(f"The image's geometry cannot be used ({error}); resample it to right angles.") from error


def array_of(path: Path) -> np.ndarray:
    """An array file, mapped; nothing in it is run."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadRequest(f"{path} is damaged or no array file ({error}); write it again.") from error
    except OSError as error:
        raise BadRequest(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def labels_of(path: Path, ct: Volume, most: int) -> Volume:
    """A label map on the CT's grid."""
    array = array_of(path)
    if array.shape != ct.shape or array.dtype != np.uint8 or array.max(initial=0) > most:
        raise BadRequest(f"{path} must be a label map of codes 0-{most} (uint8) with the CT's size; write it again.")
    return ct.with_array(np.ascontiguousarray(array))
