"""A CT from a folder of DICOM files: the right series, sorted, checked, in HU, straightened after gantry tilt.

What comes from outside is not trusted: headers may lie, be broken or belong to other things than a CT.
"""

from __future__ import annotations

import logging
import math
import os
import warnings as python_warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from LCTfoundLib.errors import Cancelled, UnsuitableImage
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume import AIR, Volume

__all__ = ["MAX_VOXELS", "SourceSeries", "is_dicom_file", "read_dicom", "source_files", "source_series"]

#: Larger images are refused before memory is asked for (int16: 3 GB).
MAX_VOXELS = 1_500_000_000
#: A gap up to this is closed by interpolation (with a warning), a wider one hides too much.
_MAX_GAP_MM = 6.0
#: Slices off their regular place by less than this share of the spacing are taken to lie there.
_REGULAR = 0.1
#: Slices nearer than this lie at the same place.
_SAME_PLACE_MM = 0.01
#: In-plane drift from the first to the last slice below this many pixels is left as it is.
_STRAIGHT_PIXELS = 0.5
_MAX_FILES = 200_000
_MAX_SIDE = 8192
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_CHEST_WORDS = ("chest", "thorax", "thorac", "lung", "pulmo")
_OTHER_WORDS = ("abdomen", "pelvis", "head", "brain", "neck", "knee", "foot", "hand", "wrist", "ankle", "sinus")

_HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "ImageType", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription",
    "ProtocolName", "BodyPartExamined", "FrameOfReferenceUID", "AcquisitionNumber", "TemporalPositionIdentifier",
    "ConvolutionKernel", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "RescaleSlope", "RescaleIntercept", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "PixelRepresentation", "SliceThickness", "Manufacturer", "KVP", "ContrastBolusAgent",
    "PatientPosition", "PatientName", "PatientID", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_METADATA_TAGS = [
    "Modality", "SeriesNumber", "SeriesDescription", "BodyPartExamined", "PatientPosition", "SliceThickness",
    "ConvolutionKernel", "Manufacturer", "KVP", "ContrastBolusAgent",
]  # fmt: skip

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Slice:
    """One image, or one frame of a multi-frame image, as its header describes it."""

    path: Path
    frame: int | None
    header: Dataset
    position: np.ndarray
    orientation: np.ndarray  # 2x3: direction of increasing column index, of increasing row index
    spacing: tuple[float, float]  # mm between columns, between rows
    slope: float
    intercept: float

    @property
    def series(self) -> str:
        return str(self.header.get("SeriesInstanceUID", ""))

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.orientation[0], self.orientation[1])

    @property
    def height(self) -> float:
        """mm along the normal."""
        return float(self.position @ self.normal)

    @property
    def size(self) -> tuple[int, int]:
        return int(self.header.Rows), int(self.header.Columns)

    @property
    def is_localizer(self) -> bool:
        return "LOCALIZER" in _image_type(self.header)

    def same_kind(self, other: _Slice) -> bool:
        """Whether both can be slices of one volume."""
        frames = self.header.get("FrameOfReferenceUID", ""), other.header.get("FrameOfReferenceUID", "")
        return (
            self.series == other.series
            and frames[0] == frames[1]
            and self.size == other.size
            and np.allclose(self.spacing, other.spacing, rtol=1e-3)
            and np.allclose(self.orientation, other.orientation, atol=1e-3)
        )


def is_dicom_file(path: Path) -> bool:
    """Whether the file has DICOM's mark."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom(path: Path, progress: Progress | None = None) -> Volume:
    """The chest CT in a folder (searched with all its subfolders), or in one multi-frame file, in HU as int16.

    Of several series the largest axial one is taken, those that say chest before those that do not. Which one, and
    what had to be mended, stands in ``metadata`` (``Series``, ``OtherSeries``, ``warnings``); nothing in it tells the
    patient.

    Raises:
        UnsuitableImage: no CT, one slice, slices missing, different slices at one place, mixed geometry, unreadable.
        Cancelled: the user stopped.
    """
    scanning, reading = Progress.of(progress).split({"Looking through the files": 1, "Reading the slices": 2})
    warnings: list[str] = []
    slices, groups = _chosen_slices([path], warnings, scanning)
    return _Stack(slices, warnings).volume(_metadata(slices, groups), reading)


@dataclass(frozen=True)
class SourceSeries:
    """The images whose pixels are a volume's planes.

    Attributes:
        images: for each plane k its file, and the number of its frame from 0 (None in a file of one image).
        grid: the grid of the volume, without values.
    """

    images: tuple[tuple[Path, int | None], ...]
    grid: Volume


def source_series(places: Sequence[Path]) -> SourceSeries:
    """Where the planes of the volume come from that :func:`read_dicom` makes of these files and folders.

    Raises:
        UnsuitableImage: as ``read_dicom``, or its planes were interpolated or straightened and are no images' pixels.
    """
    slices, _ = _chosen_slices(places, [], Progress())
    stack = _Stack(slices, [])
    if not stack.is_untouched:
        raise UnsuitableImage(
            "The slices of the DICOM series had to be straightened or interpolated, so no label lies on them exactly; "
            "export another format than DICOM SEG."
        )
    return SourceSeries(tuple((item.path, item.frame) for item in slices), stack.grid())


def source_files(places: Sequence[Path]) -> list[Path]:
    """The files of the slices that :func:`read_dicom` takes, each once, sorted along their normal.

    Raises:
        UnsuitableImage: as ``read_dicom``.
    """
    slices, _ = _chosen_slices(places, [], Progress())
    return list(dict.fromkeys(item.path for item in slices))


def _chosen_slices(
    places: Sequence[Path], warnings: list[str], progress: Progress
) -> tuple[list[_Slice], list[list[_Slice]]]:
    """The sorted slices of the chest CT, and all groups of slices found."""
    where = str(places[0]) if len(places) == 1 else f"The {len(places)} files"
    groups = _groups(_only_ct(_scan(places, where, progress), where))
    chosen = max(groups, key=_preference)
    slices = _one_image_per_place(_with_series_whole(chosen, groups, warnings), warnings)
    if len(slices) < 2:
        raise UnsuitableImage(f"{where} holds a single slice; give the folder with all slices of the chest CT.")
    return slices, groups


def _scan(places: Sequence[Path], where: str, progress: Progress) -> list[_Slice]:
    """All images with a place in space."""
    files = [file for place in places for file in ([place] if place.is_file() else _files(place))]
    found, images = [], 0
    for file in progress.track(files):
        for item in _slices_of(file):
            images += 1
            if item is not None:
                found.append(item)
    if not images:
        raise UnsuitableImage(f"There are no DICOM images in {where}; name the folder that holds the CT's slices.")
    if not found:
        raise UnsuitableImage(f"The images in {where} have no position in space; export the original CT series again.")
    return found


def _files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place) / name for name in sorted(names) if not name.startswith(".") and name != "DICOMDIR"]
        if len(files) > _MAX_FILES:
            raise UnsuitableImage(f"There are more than {_MAX_FILES} files in {folder}; name the folder of one study.")
    return files


def _slices_of(path: Path) -> Iterator[_Slice | None]:
    """The slices in a file; None for an image without a place; nothing for other things."""
    header = _header(path)
    if header is None or not _is_gray_image(header):
        return
    try:
        frames = _frame_groups(header)
    except Exception:
        _log.info("%s: broken functional groups", path.name, exc_info=True)
        frames = [None]
    for number, groups in enumerate(frames):
        try:
            yield _slice(path, header, number if len(frames) > 1 or groups is not None else None, groups)
        except Exception:  # pydicom raises whatever a broken value makes it raise
            _log.info("%s has no usable geometry", path.name, exc_info=True)
            yield None


def _header(path: Path) -> Dataset | None:
    """The header of a DICOM file; None for everything else."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
        marked = start[128:132] == b"DICM"
        # Old files have no mark; their names end in a number, or in nothing.
        may_be = path.suffix.lower() in ("", ".dcm", ".ima") or path.suffix[1:].isdecimal()
        if (not marked and not may_be) or _DEFLATED in start:  # deflated: a small file may blow up
            return None
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True, force=not marked, specific_tags=list(_HEADER_TAGS))
            _drop_unreadable(header)
            return header if "SOPClassUID" in header or "Modality" in header else None
    except Exception:
        _log.info("%s is no readable DICOM file", path.name)
        return None


def _drop_unreadable(header: Dataset) -> None:
    """Values are decoded when they are first asked for; do that now, where it may fail."""
    for tag in list(header.keys()):
        try:
            header[tag]
        except Exception:
            del header[tag]


def _image_type(header: Dataset) -> list[str]:
    value = header.get("ImageType") or []
    return [str(part).upper() for part in ([value] if isinstance(value, str) else value)]


def _is_gray_image(header: Dataset) -> bool:
    try:
        rows, columns = int(header.get("Rows", 0)), int(header.get("Columns", 0))
        return 1 < rows <= _MAX_SIDE and 1 < columns <= _MAX_SIDE and int(header.get("SamplesPerPixel", 1)) == 1
    except (TypeError, ValueError):
        return False


def _frame_groups(header: Dataset) -> list[tuple[Dataset, Dataset] | None]:
    """For an enhanced image the (own, shared) functional groups of each frame; else a single None."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        return [None]
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
    return [(own, shared[0]) for own in per_frame]


def _slice(path: Path, header: Dataset, frame: int | None, groups: tuple[Dataset, Dataset] | None) -> _Slice:
    """Raises whatever a missing or broken value raises."""

    def value(keyword: str, macro: str, default: Any = None) -> Any:
        for group in groups or ():
            if group.get(macro):
                found = group[macro].value[0].get(keyword)
                if found is not None:
                    return found
        return header.get(keyword, default)

    position = np.array(value("ImagePositionPatient", "PlanePositionSequence"), dtype=np.float64)
    axes = np.array(value("ImageOrientationPatient", "PlaneOrientationSequence"), dtype=np.float64).reshape(2, 3)
    between_rows, between_columns = (float(x) for x in value("PixelSpacing", "PixelMeasuresSequence"))
    slope = float(value("RescaleSlope", "PixelValueTransformationSequence", 1.0))
    intercept = float(value("RescaleIntercept", "PixelValueTransformationSequence", 0.0))
    numbers = [*position, *axes.ravel(), between_rows, between_columns, slope, intercept]
    if position.shape != (3,) or not np.isfinite(numbers).all() or min(between_rows, between_columns) <= 0 or not slope:
        raise ValueError("geometry or rescale values are not usable")
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
        raise ValueError("row and column directions are not at right angles")
    row = axes[0] / np.linalg.norm(axes[0])
    column = axes[1] - (axes[1] @ row) * row
    orientation = np.stack([row, column / np.linalg.norm(column)])
    return _Slice(path, frame, header, position, orientation, (between_columns, between_rows), slope, intercept)


def _only_ct(slices: list[_Slice], where: str) -> list[_Slice]:
    modalities = sorted({str(item.header.get("Modality", "unknown")) for item in slices})
    ct = [item for item in slices if item.header.get("Modality") == "CT"]
    if not ct:
        raise UnsuitableImage(f"{where} holds {', '.join(modalities)} images but no CT; name the folder of a chest CT.")
    pictures = [item for item in ct if not item.is_localizer]
    if not pictures:
        raise UnsuitableImage(f"{where} holds only the scout views of a CT; export its axial slices as well.")
    return pictures


def _groups(slices: list[_Slice]) -> list[list[_Slice]]:
    """Slices that can make up one volume each; all of a group get the very same orientation."""
    groups: list[list[_Slice]] = []
    for item in slices:
        for group in groups:
            if group[0].same_kind(item):
                group.append(replace(item, orientation=group[0].orientation))
                break
        else:
            groups.append([item])
    return groups


def _preference(group: list[_Slice]) -> tuple[bool, int, bool, int]:
    """What makes a series the chest CT: axial, said to be chest, not derived, many slices."""
    header = group[0].header
    axial = abs(group[0].normal[2]) > 0.8
    said = " ".join(str(header.get(key, "")) for key in ("BodyPartExamined", "SeriesDescription", "ProtocolName"))
    chest = any(word in said.lower() for word in _CHEST_WORDS)
    other = any(word in said.lower() for word in _OTHER_WORDS)
    original = "DERIVED" not in _image_type(header)
    enough = len(group) >= 10  # a few images of a marked finding are no scan
    return axial and enough, int(chest) - int(other and not chest), original, len(group)


def _with_series_whole(chosen: list[_Slice], groups: list[list[_Slice]], warnings: list[str]) -> list[_Slice]:
    """The chosen group, unless its series has too many other images to be one volume."""
    others = [item for group in groups if group is not chosen for item in group if item.series == chosen[0].series]
    if len(others) > 0.05 * len(chosen):
        what = _difference(chosen[0], others[0])
        raise UnsuitableImage(
            f"The series mixes images of different {what} ({len(chosen)} and {len(others)}); "
            "put those that belong together into a folder of their own."
        )
    if others:
        warnings.append(f"{len(others)} images of the series differ in {_difference(chosen[0], others[0])}: left out.")
    return chosen


def _difference(a: _Slice, b: _Slice) -> str:
    if a.size != b.size:
        return "size"
    if not np.allclose(a.orientation, b.orientation, atol=1e-3):
        return "orientation"
    if not np.allclose(a.spacing, b.spacing, rtol=1e-3):
        return "pixel spacing"
    return "frame of reference"


def _one_image_per_place(slices: list[_Slice], warnings: list[str]) -> list[_Slice]:
    """Sorted along the normal, without copies."""
    slices = sorted(slices, key=lambda item: item.height)
    if not _has_duplicates(slices):
        return slices
    for keyword in ("AcquisitionNumber", "TemporalPositionIdentifier", "ConvolutionKernel", "ImageType"):
        parts: dict[str, list[_Slice]] = {}
        for item in slices:
            parts.setdefault(str(item.header.get(keyword, "")), []).append(item)
        if len(parts) > 1 and not any(_has_duplicates(part) for part in parts.values()):
            warnings.append(f"The series holds {len(parts)} scans of the same place; the largest one is used.")
            return max(parts.values(), key=len)
    return _without_copies(slices, warnings)


def _has_duplicates(slices: Sequence[_Slice]) -> bool:
    return any(b.height - a.height < _SAME_PLACE_MM for a, b in zip(slices, slices[1:], strict=False))


def _without_copies(slices: list[_Slice], warnings: list[str]) -> list[_Slice]:
    kept = [slices[0]]
    load = _PixelReader()
    for item in slices[1:]:
        if item.height - kept[-1].height >= _SAME_PLACE_MM:
            kept.append(item)
        elif not np.array_equal(load(kept[-1]), load(item)):
            raise UnsuitableImage(
                f"{kept[-1].path.name} and {item.path.name} show different images at the same place; "
                "remove those that do not belong to the scan."
            )
    warnings.append(f"{len(slices) - len(kept)} slices were there twice; the copies are left out.")
    return kept


def _metadata(slices: list[_Slice], groups: list[list[_Slice]]) -> dict[str, str]:
    """What is known of the source and does not tell the patient."""
    header = slices[0].header
    series = {item.series for group in groups for item in group}
    metadata = {"SourceFormat": "DICOM", "Slices": str(len(slices)), "OtherSeries": str(len(series) - 1)}
    secrets = _secrets(header)
    for keyword in _METADATA_TAGS:
        text = _clean_text(header.get(keyword))
        if text and not any(secret in text.lower() for secret in secrets):
            metadata[keyword] = text
    described = [metadata.get("SeriesNumber", ""), metadata.get("SeriesDescription", "")]
    metadata["Series"] = " ".join(part for part in described if part) or "without number"
    return metadata


def _secrets(header: Dataset) -> list[str]:
    """Lower-case pieces of the patient's name and number, which some scanners copy into free text."""
    parts = str(header.get("PatientName", "")).replace("^", " ").replace("=", " ").split()
    parts += [str(header.get("PatientID", ""))]
    return [part.lower() for part in parts if len(part) >= 3]


def _clean_text(value: Any) -> str:
    if value is None:
        return ""
    return "".join(letter for letter in str(value) if letter.isprintable()).strip()[:100]


class _PixelReader:
    """HU of slices, as int16; keeps the last multi-frame file open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._frames: np.ndarray | None = None

    def __call__(self, item: _Slice) -> np.ndarray:
        """int16 (rows, columns).

        Raises:
            UnsuitableImage: the pixels cannot be read.
        """
        if item.frame is None:
            raw, is_hu = _raw_pixels(item.path)
        else:
            if self._path != item.path:
                self._frames, is_hu = _raw_pixels(item.path)
                self._path = item.path
                if is_hu:
                    raise UnsuitableImage(f"The compression of {item.path.name} is not known; decompress the file.")
            assert self._frames is not None
            frames = self._frames if self._frames.ndim == 3 else self._frames[None]
            raw, is_hu = frames[min(item.frame, len(frames) - 1)], False
        if raw.shape != item.size:
            raise UnsuitableImage(f"{item.path.name} does not hold one image; export the CT series again.")
        return _clip(raw) if is_hu else _to_hu(raw, item)


def _raw_pixels(path: Path) -> tuple[np.ndarray, bool]:
    """Stored values, or HU (True) where only SimpleITK knows the compression."""
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            if int(dataset.get("NumberOfFrames", 1) or 1) * int(dataset.Rows) * int(dataset.Columns) > MAX_VOXELS:
                raise UnsuitableImage(f"{path.name} is too large; crop it to the chest.")
            if "TransferSyntaxUID" not in dataset.file_meta:  # old files without preamble
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            return dataset.pixel_array, False
    except (UnsuitableImage, Cancelled, MemoryError):
        raise
    except Exception:
        _log.info("pydicom cannot read the pixels of %s", path.name, exc_info=True)
    return _pixels_by_sitk(path), True


def _pixels_by_sitk(path: Path) -> np.ndarray:
    """HU by SimpleITK, which brings the common decoders."""
    import SimpleITK as sitk

    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    except RuntimeError as error:
        raise UnsuitableImage(
            f"The image in {path.name} is damaged or compressed in an unknown way; export the CT series again."
        ) from error
    return array[0] if array.ndim == 3 and array.shape[0] == 1 else array


def _to_hu(raw: np.ndarray, item: _Slice) -> np.ndarray:
    # float32 holds every product of 16 bits with a whole slope exactly.
    hu = raw.astype(np.float32) * np.float32(item.slope) + np.float32(item.intercept)
    padding = _padding(raw, item.header)
    if padding is not None:
        hu[padding] = AIR
    return _clip(hu)


def _padding(raw: np.ndarray, header: Dataset) -> np.ndarray | None:
    """Where the image is padded: beyond the round field of view.

    Only believed when a corner is padded: a wrong value in the header must not erase tissue.
    """
    try:
        low = int(header.PixelPaddingValue)
        high = int(header.get("PixelPaddingRangeLimit", low))
    except (AttributeError, TypeError, ValueError):
        return None
    if raw.dtype.kind == "i":  # some files store the signed value as unsigned
        low, high = (value - 65536 if value > 32767 else value for value in (low, high))
    padded = (raw >= min(low, high)) & (raw <= max(low, high))
    return padded if padded[[0, 0, -1, -1], [0, -1, 0, -1]].any() else None


def _clip(hu: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(hu.astype(np.float32)), -32768, 32767).astype(np.int16)


class _Stack:
    """Sorted slices of one kind and how they lie."""

    def __init__(self, slices: list[_Slice], warnings: list[str]) -> None:
        self.slices = slices
        self.warnings = warnings
        first = slices[0]
        self.heights = np.array([item.height for item in slices]) - first.height
        self.steps = np.diff(self.heights)
        offsets = np.array([item.position for item in slices]) - first.position
        #: mm along columns and rows by which each slice is shifted against the first one
        self.drift = offsets @ first.orientation.T
        rows, columns = first.size
        if len(slices) * rows * columns > MAX_VOXELS:
            raise UnsuitableImage(f"The series has {columns}x{rows}x{len(slices)} voxels; crop it to the chest.")

    def volume(self, metadata: dict[str, str], progress: Progress) -> Volume:
        """The slices as a right-angled, regular volume."""
        step, is_regular = self._step()
        place, size, shift = self._placing()
        load = _PixelReader()
        array = np.empty((len(self.slices), *size), np.int16)
        for k, item in enumerate(progress.track(self.slices)):
            array[k] = place(load(item), k)
        if not is_regular:
            array = _regular(array, self.heights, step)
        metadata = metadata | ({"warnings": "\n".join(self.warnings)} if self.warnings else {})
        return self._volume(array, step, shift, metadata)

    def grid(self) -> Volume:
        """The grid of untouched slices: their volume without its values."""
        shape = (len(self.slices), *self.slices[0].size)
        return self._volume(np.broadcast_to(np.int16(0), shape), self._step()[0], (0, 0), {})

    @property
    def is_untouched(self) -> bool:
        """Whether each slice's pixels are a plane of the volume: nothing is to be straightened or interpolated."""
        return self._step()[1] and self._placing()[1:] == (self.slices[0].size, (0, 0))

    def _volume(self, array: np.ndarray, step: float, shift: tuple[int, int], metadata: dict[str, str]) -> Volume:
        """An array on the grid that begins ``shift`` (i, j) pixels from the first slice's corner."""
        first = self.slices[0]
        columns, rows = first.spacing
        row, column = first.orientation
        x, y, z = first.position + shift[0] * columns * row + shift[1] * rows * column
        direction = np.stack([row, column, first.normal], axis=1)
        return Volume(array, (columns, rows, step), (x, y, z), direction, metadata)

    def _step(self) -> tuple[float, bool]:
        """Spacing of the slices, and whether it is the same everywhere."""
        count = len(self.slices)
        even = float(self.heights[-1]) / (count - 1)
        if np.abs(self.heights - even * np.arange(count)).max() <= _REGULAR * even:
            return even, True
        usual = float(np.median(self.steps))
        widest = int(np.argmax(self.steps))
        gap = float(self.steps[widest])
        if gap > _MAX_GAP_MM + 0.01 and gap > 1.5 * usual:
            z = [self.slices[n].position[2] for n in (widest, widest + 1)]
            raise UnsuitableImage(
                f"About {max(1, round(gap / usual) - 1)} slices are missing between z = {z[0]:.1f} and {z[1]:.1f} mm; "
                "load the complete series."
            )
        self.warnings.append(
            f"The slices are {self.steps.min():.2f} to {gap:.2f} mm apart; they were interpolated to {usual:.2f} mm."
        )
        return usual, False

    def _placing(self) -> tuple[Callable[[np.ndarray, int], np.ndarray], tuple[int, int], tuple[int, int]]:
        """How to place a slice (image, number) on the common grid; the grid's size; its (i, j) shift in pixels."""
        pixels = self.drift / self.slices[0].spacing
        if np.abs(pixels).max() < _STRAIGHT_PIXELS:
            return (lambda image, k: image), self.slices[0].size, (0, 0)
        self._check_tilt()
        low, high = np.floor(pixels.min(axis=0)).astype(int), np.ceil(pixels.max(axis=0)).astype(int)
        rows, columns = self.slices[0].size
        size = (rows + int(high[1] - low[1]), columns + int(high[0] - low[0]))

        def place(image: np.ndarray, k: int) -> np.ndarray:
            return _shifted(image, size, pixels[k, 1] - low[1], pixels[k, 0] - low[0])

        return place, size, (int(low[0]), int(low[1]))

    def _check_tilt(self) -> None:
        """A tilted gantry shifts each slice by the same amount; anything else is not one scan."""
        slope = self.drift[-1] / self.heights[-1]
        if np.abs(self.drift - self.heights[:, None] * slope).max() > 1.0:
            raise UnsuitableImage("The slices are shifted against each other irregularly; export one scan on its own.")
        angle = math.degrees(math.atan(float(np.linalg.norm(slope))))
        self.warnings.append(f"The gantry was tilted by {angle:.1f} degrees; the volume was straightened.")


def _shifted(image: np.ndarray, size: tuple[int, int], down: float, right: float) -> np.ndarray:
    """The image moved by non-negative fractional pixels into a larger one of air, linearly interpolated."""
    rows, columns = image.shape
    result = np.zeros(size, np.float32)
    covered = np.zeros(size, np.float32)
    for j, weight_j in ((int(down), 1 - down % 1), (int(down) + 1, down % 1)):
        for i, weight_i in ((int(right), 1 - right % 1), (int(right) + 1, right % 1)):
            weight = np.float32(weight_j * weight_i)
            if weight > 1e-6:
                result[j : j + rows, i : i + columns] += weight * image
                covered[j : j + rows, i : i + columns] += weight
    return np.rint(result + (1 - covered) * AIR).astype(np.int16)


def _regular(array: np.ndarray, heights: np.ndarray, step: float) -> np.ndarray:
    """Slices at any heights, interpolated to every ``step`` mm from the first one."""
    count = int(heights[-1] / step + 1e-3) + 1
    result = np.empty((count, *array.shape[1:]), np.int16)
    for k in range(count):
        above = int(np.clip(np.searchsorted(heights, k * step, side="right"), 1, len(heights) - 1))
        share = (k * step - heights[above - 1]) / (heights[above] - heights[above - 1])
        share = np.float32(np.clip(share, 0, 1))
        result[k] = np.rint(array[above - 1] * (1 - share) + array[above] * share)
    return result
