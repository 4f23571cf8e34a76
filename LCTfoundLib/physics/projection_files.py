"""Sinograms from files: NumPy, NRRD and the DICOM projections of the public low-dose CT data set, with their geometry.

What comes from outside is not trusted: sizes are checked before memory is asked for, nothing in a file is executed or
followed to other files, and what cannot be reconstructed is refused with a sentence that names the remedy.

Geometry
    A ``.npz`` holds it beside its array ``sinogram``; a ``.npy`` or ``.nrrd`` has it in a JSON file of the same name.

    ========================= =============================================================================
    ``geometry``              "parallel" or "fan"
    ``angles_rad``            of the views, or ``angles_deg``; as in :mod:`LCTfoundLib.physics.geometry`
    ``pitch_mm``              from channel to channel, on the detector
    ``offset``                the central ray's, channels; 0
    ``source_isocenter_mm``   fan only
    ``source_detector_mm``    fan only
    ``detector``              fan only: "arc" or "flat"
    ``quantity``              "line integrals" (default), or "counts", which need ``photons``
    ``photons``               of the rays in air: a number, one a channel, or (views, channels)
    ``electronic_noise``      of the counts, photons; 0
    ``water_per_mm``          attenuation of water at the scan's energy, 1/mm
    ``heights_mm``            of the slices along the patient
    ========================= =============================================================================

    The sinogram is (slices, views, channels) or (views, channels); in NRRD's own order, channels first.

DICOM-CT-PD
    One file a view: Chen et al., Med. Phys. 42 (2015) 6964; private tags of Moen et al., Med. Phys. 48 (2021) 902,
    table IV, and the data set's user manual, version 3. Seen from the table, its angle 0 is at 12 o'clock and rises
    counterclockwise, and with the detector at 6 o'clock column 1 is at the left and row 1 the farthest: our own
    convention. Rows of an axial scan are fans; a helical scan, or one with a flying focal spot, becomes slices of
    parallel views (:mod:`LCTfoundLib.physics.helical`).
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings as python_warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydicom
import SimpleITK as sitk
import torch
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from torch import Tensor

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import Beam, Detector, FanBeam, ParallelBeam
from LCTfoundLib.physics.helical import ConeRows, FocalSpot, Rebinned, ViewPlace, rebin
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.noise import check_line_integrals, line_integrals

__all__ = ["MAX_RAYS", "Projections", "read_projections"]

#: Larger sinograms are refused before memory is asked for (float32: 2 GB).
MAX_RAYS = 500_000_000
#: The same of rebinned slices, which need eight bytes a ray while they are made.
_MAX_REBINNED = 250_000_000
_MAX_FILES = 100_000
_MAX_TEXT_BYTES = 16 * 2**20
_MAX_VIEW_BYTES = 64 * 2**20
_PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
_KNOWN = "a NumPy file (.npy, .npz), NRRD (.nrrd), or a folder of DICOM projections (DICOM-CT-PD)"
#: Water between 150 keV and 40 keV.
_WATER = (0.014, 0.028)
#: Places of a flying focal spot: two in the plane times two along the patient.
_MOST_SPOTS = 4
#: Views whose table or focal spot moved by less have not moved.
_SAME_PLACE_MM = 0.1
#: Off its plane by more, at this distance from the isocenter, a row is no flat fan.
_FLAT_MM, _FLAT_AT_MM = 0.5, 150.0

_REQUIRED = {"geometry", "pitch_mm"}
_FAN = {"source_isocenter_mm", "source_detector_mm", "detector"}
_OPTIONAL = {"offset", "quantity", "photons", "electronic_noise", "water_per_mm", "heights_mm"}
_ANGLES = {"angles_rad", "angles_deg"}


@dataclass(frozen=True, eq=False)
class Projections:
    """A measured scan.

    Attributes:
        sinogram: line integrals, float32 (slices, views, channels).
        beam: its geometry.
        water_per_mm: attenuation of water that its HU refer to, 1/mm.
        photons: of the rays in air, float32, (views, channels) or what broadcasts to it; None if not told.
        electronic_noise: of the counts, standard deviation in photons.
        heights_mm: of the slices, if told.
        warnings: what was assumed or is missing; sentences for the user.
        chosen: indices of the slices among those of the file or folder; empty: all.

    Raises:
        UnsuitableProjections: sinogram and geometry do not match, or the values are no line integrals.
    """

    sinogram: Tensor
    beam: Beam
    water_per_mm: float = WATER_PER_MM
    photons: Tensor | None = None
    heights_mm: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()
    electronic_noise: float = 0.0
    chosen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.sinogram.shape)
        if len(shape) != 3 or shape[1:] != self.beam.shape or not shape[0]:
            exchanged = len(shape) == 3 and shape[2] == self.beam.views != shape[1]
            hint = " (its axes seem to be exchanged)" if exchanged else ""
            raise UnsuitableProjections(
                f"The sinogram is {_times(shape)} and the geometry tells of {self.beam.views} views with "
                f"{self.beam.detectors} channels each{hint}; give slices x views x channels and an angle for each view."
            )
        if self.heights_mm and len(self.heights_mm) != shape[0]:
            raise UnsuitableProjections(
                f"The sinogram has {shape[0]} slices and {len(self.heights_mm)} heights are given; give one for each."
            )
        if not _WATER[0] <= self.water_per_mm <= _WATER[1]:
            raise UnsuitableProjections(
                f"Water attenuates {self.water_per_mm:.4g} per mm at no energy of a CT; give it in 1/mm, about "
                f"{WATER_PER_MM}."
            )
        if not (math.isfinite(self.electronic_noise) and self.electronic_noise >= 0):
            raise UnsuitableProjections(
                f"Electronic noise of {self.electronic_noise:g} photons is no deviation; give 0 or more."
            )
        check_line_integrals(self.sinogram)


def read_projections(
    path: Path,
    progress: Callable[[float], object] | None = None,
    choose: Callable[[int], range] | None = None,
) -> Projections:
    """The scan in a file or folder; see the module for the formats.

    Args:
        path: ``.npy``, ``.npz``, ``.nrrd``, or the folder of one DICOM-CT-PD series.
        progress: told the share done, 0-1; what it raises stops the reading.
        choose: of so many slices, which to take, by index from the first or lowest; None: all.

    Raises:
        UnsuitableProjections: not such a file, damaged, too large, or a scan that cannot be reconstructed.
    """
    if path.is_dir():
        return _read_dicom(path, progress, choose)
    if not path.is_file():
        raise UnsuitableProjections(f"There is no file {path}; give {_KNOWN}.")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".nrrd": _read_nrrd}
    suffix = path.suffix.lower()
    if suffix in {".dcm", ".ima"}:
        raise UnsuitableProjections(f"{path.name} is one view of a scan; give the folder with all of them.")
    if suffix not in readers:
        raise UnsuitableProjections(f"{path.name} is of no known format; give {_KNOWN}.")
    try:
        return _chosen(readers[suffix](path), choose)
    except OSError as error:
        raise UnsuitableProjections(
            f"{path.name} cannot be read ({error.strerror or error}); check its permissions."
        ) from error


def _chosen(scan: Projections, choose: Callable[[int], range] | None) -> Projections:
    """Some of its slices."""
    if choose is None:
        return scan
    indices = tuple(choose(len(scan.sinogram)))
    heights = tuple(scan.heights_mm[k] for k in indices) if scan.heights_mm else ()
    return replace(scan, sinogram=scan.sinogram[list(indices)], heights_mm=heights, chosen=indices)


# --- NumPy and NRRD ---


def _read_npy(path: Path) -> Projections:
    with path.open("rb") as file:
        sinogram = _array(file, path.stat().st_size, path.name)
    return _projections(sinogram, _beside(path), path.name)


def _read_npz(path: Path) -> Projections:
    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            if sum(entry.file_size for entry in entries) > 8 * MAX_RAYS or len(entries) > 100:
                raise UnsuitableProjections(f"{path.name} is too large; split it into fewer slices.")
            for entry in entries:
                with archive.open(entry) as file:
                    arrays[entry.filename.removesuffix(".npy")] = _array(file, entry.file_size, path.name)
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise UnsuitableProjections(f"{path.name} is damaged; save it again with numpy.savez.") from error
    if "sinogram" not in arrays:
        raise UnsuitableProjections(f"{path.name} has no array named sinogram; save it under that name.")
    sinogram = arrays.pop("sinogram")
    # Geometry within the file, or beside it as for the others.
    settings = {name: value.tolist() for name, value in arrays.items()} or _beside(path)
    return _projections(sinogram, settings, path.name)


def _array(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """An array in NumPy's format whose header is checked against the file's size before memory is asked for."""
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, kind = header(file)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python and raises whatever its parser does
        raise UnsuitableProjections(f"{name} is no NumPy file or damaged; save it again with numpy.save.") from error
    if kind.hasobject or kind.kind not in "iufbU":
        raise UnsuitableProjections(f"{name} holds objects or complex values; save plain numbers instead.")
    number = math.prod(shape)
    if number > MAX_RAYS:
        raise UnsuitableProjections(f"{name} holds {_times(shape)} values; split it into fewer slices.")
    # A billion values of no size would cost nothing in the file.
    wanted = number * kind.itemsize
    if wanted > size or not kind.itemsize or min(shape, default=0) < 0:
        raise UnsuitableProjections(f"{name} is cut off; copy or save it again.")
    data = file.read(wanted)
    if len(data) < wanted:
        raise UnsuitableProjections(f"{name} is cut off; copy or save it again.")
    return np.frombuffer(data, kind).reshape(shape, order="F" if by_columns else "C")


def _read_nrrd(path: Path) -> Projections:
    _check_attached(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size = reader.GetSize()
        if reader.GetNumberOfComponents() != 1 or math.prod(size) > MAX_RAYS:
            raise UnsuitableProjections(
                f"{path.name} holds {_times(size)} values of {reader.GetNumberOfComponents()} parts; give one number a "
                f"ray and at most {MAX_RAYS:,} rays."
            )
        sinogram = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise UnsuitableProjections(f"{path.name} is damaged or no NRRD file; export it again.") from error
    return _projections(sinogram, _beside(path), path.name)


def _check_attached(path: Path) -> None:
    """Refuse headers that send the reader to other files."""
    with path.open("rb") as file:
        head = file.read(2**16).split(b"\n\n")[0].split(b"\r\n\r\n")[0]
    lines = [line.strip().lower().replace(b" ", b"") for line in head.splitlines()]
    if any(line.startswith(b"datafile:") for line in lines):
        raise UnsuitableProjections(
            f"{path.name} is a header whose data lie in another file; save both in one .nrrd file."
        )


def _beside(path: Path) -> dict[str, Any]:
    """The settings in the JSON file of the same name."""
    side = path.with_suffix(".json")
    if not side.is_file():
        raise UnsuitableProjections(
            f"The geometry of {path.name} is missing; write it to {side.name} beside it (angles_deg, pitch_mm, ...)."
        )
    if side.stat().st_size > _MAX_TEXT_BYTES:
        raise UnsuitableProjections(f"{side.name} is too large for a scan's geometry; keep the settings alone.")
    try:
        settings = json.loads(side.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsuitableProjections(f"{side.name} is no valid JSON; check its commas and brackets.") from error
    if not isinstance(settings, dict):
        raise UnsuitableProjections(f"{side.name} must hold names with values, {{...}}; write it so.")
    return settings


def _projections(sinogram: np.ndarray, settings: Mapping[str, Any], name: str) -> Projections:
    if sinogram.ndim not in (2, 3) or not sinogram.size or sinogram.dtype.kind not in "iuf":
        raise UnsuitableProjections(
            f"The sinogram of {name} is {_times(sinogram.shape)} of {sinogram.dtype}; give numbers, slices x views x "
            "channels."
        )
    _check_names(settings, name)
    beam = _beam(settings, sinogram.shape[-1], name)
    values = torch.from_numpy(sinogram.astype(np.float32).reshape(-1, *sinogram.shape[-2:]))
    photons = _photons(settings, beam.shape, name)
    electronic = _number(settings, "electronic_noise", name, 0.0)
    quantity = settings.get("quantity", "line integrals")
    if quantity == "counts":
        if photons is None:
            raise UnsuitableProjections(f"{name} holds counts but not those of air; add photons to its geometry.")
        values = line_integrals(values, photons, electronic)
    elif quantity != "line integrals":
        raise UnsuitableProjections(f'The quantity of {name} is unknown; say "line integrals" or "counts".')
    water = _number(settings, "water_per_mm", name, WATER_PER_MM)
    heights = tuple(_numbers(settings, "heights_mm", name).ravel().tolist()) if "heights_mm" in settings else ()
    return Projections(values, beam, water, photons, heights, electronic_noise=electronic)


def _check_names(settings: Mapping[str, Any], name: str) -> None:
    """A misspelled setting would fall back to its default and bend the image."""
    fan = _FAN if settings.get("geometry") == "fan" else set()
    unknown = set(settings) - _REQUIRED - _OPTIONAL - _ANGLES - fan
    missing = (_REQUIRED | fan) - set(settings)
    if len(_ANGLES & set(settings)) != 1:
        missing.add("angles_rad or angles_deg")
    if unknown or missing:
        problems = [f"{kind}: {', '.join(sorted(names))}" for kind, names in
                    (("missing", missing), ("unknown", unknown)) if names]  # fmt: skip
        raise UnsuitableProjections(f"The geometry of {name} is incomplete ({'; '.join(problems)}); correct these.")


def _beam(settings: Mapping[str, Any], channels: int, name: str) -> Beam:
    angles = _numbers(settings, "angles_rad" if "angles_rad" in settings else "angles_deg", name).ravel()
    if "angles_deg" in settings:
        angles = np.radians(angles)
    pitch, offset = _number(settings, "pitch_mm", name), _number(settings, "offset", name, 0.0)
    kind = settings["geometry"]
    if kind == "parallel":
        return ParallelBeam(tuple(angles), channels, pitch, offset)
    if kind != "fan" or settings["detector"] not in list(Detector):
        raise UnsuitableProjections(
            f'The geometry of {name} is unknown; say "parallel", or "fan" with a detector "arc" or "flat".'
        )
    near, far = (_number(settings, key, name) for key in ("source_isocenter_mm", "source_detector_mm"))
    return FanBeam(tuple(angles), channels, pitch, offset, near, far, Detector(settings["detector"]))


def _photons(settings: Mapping[str, Any], shape: tuple[int, int], name: str) -> Tensor | None:
    if "photons" not in settings:
        return None
    photons = _numbers(settings, "photons", name)
    try:
        np.broadcast_to(photons, shape)
    except ValueError:
        photons = np.zeros(0)
    if not photons.size or not (photons > 0).all():
        raise UnsuitableProjections(
            f"The photons of {name} do not fit {shape[0]} views of {shape[1]} channels; give a number above 0, one for "
            "each channel, or one for each ray."
        )
    return torch.from_numpy(photons.astype(np.float32))


def _number(settings: Mapping[str, Any], key: str, name: str, otherwise: float | None = None) -> float:
    if key not in settings and otherwise is not None:
        return otherwise
    values = _numbers(settings, key, name)
    if values.size != 1:
        raise UnsuitableProjections(f"{key} of {name} is no single number; correct it.")
    return float(values.item())


def _numbers(settings: Mapping[str, Any], key: str, name: str) -> np.ndarray:
    try:
        values = np.asarray(settings[key], np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.full(1, np.nan)
    if not values.size or not np.isfinite(values).all():
        raise UnsuitableProjections(f"{key} of {name} holds no numbers; correct it.")
    return values


# --- DICOM-CT-PD ---


class _Tag:
    """Private tags of DICOM-CT-PD."""

    ROWS = 0x7029_1010
    COLUMNS = 0x7029_1011
    COLUMN_MM = 0x7029_1002
    ROW_MM = 0x7029_1006
    SHAPE = 0x7029_100B
    ANGLE = 0x7031_1001
    HEIGHT = 0x7031_1002
    SOURCE_ISOCENTER = 0x7031_1003
    SOURCE_DETECTOR = 0x7031_1031
    CENTRAL_ELEMENT = 0x7031_1033
    ANGLE_SHIFT = 0x7033_100B
    HEIGHT_SHIFT = 0x7033_100C
    DISTANCE_SHIFT = 0x7033_100D
    VIEWS_A_TURN = 0x7033_1013
    SPECTRUM = 0x7033_1063
    PHOTONS = 0x7033_1065
    LOG = 0x7039_1009
    WATER = 0x7041_1001


_SHAPES = {"CYLINDRICAL": Detector.ARC, "SPHERICAL": Detector.ARC, "FLAT": Detector.FLAT}


class _Broken(Exception):
    """A view's header cannot be used; says what is wrong with it."""


@dataclass(frozen=True)
class _Scan:
    """What all views of a scan have in common."""

    rows: int
    columns: int
    column_mm: float
    row_mm: float
    shape: str
    source_isocenter_mm: float
    source_detector_mm: float
    central_column: float  # counted from 1
    central_row: float
    spectrum: int
    water_per_mm: float
    views_a_turn: int
    series: str

    @classmethod
    def of(cls, header: Dataset) -> _Scan:
        central = _values(header, _Tag.CENTRAL_ELEMENT, 2)
        return cls(
            rows=_whole(header, _Tag.ROWS),
            columns=_whole(header, _Tag.COLUMNS),
            column_mm=_values(header, _Tag.COLUMN_MM)[0],
            row_mm=_values(header, _Tag.ROW_MM)[0],
            shape=_text(header, _Tag.SHAPE),
            source_isocenter_mm=_values(header, _Tag.SOURCE_ISOCENTER)[0],
            source_detector_mm=_values(header, _Tag.SOURCE_DETECTOR)[0],
            central_column=central[0],
            central_row=central[1],
            spectrum=_whole(header, _Tag.SPECTRUM) if _Tag.SPECTRUM in header else 0,
            water_per_mm=float(_text(header, _Tag.WATER)) if _Tag.WATER in header else WATER_PER_MM,
            views_a_turn=_whole(header, _Tag.VIEWS_A_TURN) if _is_told(header, _Tag.VIEWS_A_TURN) else 0,
            series=str(header.get("SeriesInstanceUID", "") or ""),
        )

    @property
    def heights_mm(self) -> np.ndarray:
        """Of the rows at the isocenter over the middle of the detector, row 1 first (the farthest from the table)."""
        row = np.arange(1, self.rows + 1)
        return (self.central_row - row) * self.row_mm * self.source_isocenter_mm / self.source_detector_mm

    def beam(self, angles: Sequence[float]) -> FanBeam:
        return FanBeam(
            tuple(angles),
            self.columns,
            self.column_mm,
            self.central_column - (self.columns + 1) / 2,
            self.source_isocenter_mm,
            self.source_detector_mm,
            _SHAPES[self.shape],
        )


@dataclass(frozen=True, eq=False)
class _View:
    path: Path
    number: int
    scan: _Scan
    place: ViewPlace
    photons: np.ndarray | None


def _read_dicom(
    folder: Path, progress: Callable[[float], object] | None, choose: Callable[[int], range] | None
) -> Projections:
    views = _views(folder, progress)
    scan = views[0].scan
    _check_scan(views, folder)
    if _is_helical(views) or any(view.place.spot != FocalSpot() for view in views):
        return _rebinned(views, progress, choose)
    if scan.rows * scan.columns * len(views) > MAX_RAYS:
        raise UnsuitableProjections(
            f"{folder.name} holds {len(views)} views of {scan.rows} x {scan.columns} rays; give at most {MAX_RAYS:,} "
            "rays."
        )
    angles = [view.place.angle for view in views]
    beam = scan.beam(angles)
    sinogram = np.empty((scan.rows, len(views), scan.columns), np.float32)
    for index, view in enumerate(views):
        sinogram[:, index] = _rays(view)
        if progress:
            progress((1 + (index + 1) / len(views)) / 2)
    photons = [view.photons for view in views if view.photons is not None]
    # By rising height.
    heights = views[0].place.height_mm + scan.heights_mm[::-1]
    whole = Projections(
        torch.from_numpy(sinogram[::-1].copy()),
        beam,
        scan.water_per_mm,
        torch.from_numpy(np.stack(photons)) if len(photons) == len(views) else None,
        tuple(heights.tolist()),
        tuple(_warnings(scan, len(views))),
    )
    return _chosen(whole, choose)


def _rebinned(
    views: Sequence[_View], progress: Callable[[float], object] | None, choose: Callable[[int], range] | None
) -> Projections:
    """Slices of parallel views."""
    scan = views[0].scan
    detector = ConeRows(
        scan.rows,
        scan.columns,
        scan.row_mm,
        scan.column_mm,
        scan.central_row,
        scan.central_column,
        scan.source_isocenter_mm,
        scan.source_detector_mm,
        _SHAPES[scan.shape],
    )
    measured = _views_a_turn(views)
    # Some count the places of a flying focal spot as views and some do not; a wrong number would cost the image.
    believed = scan.views_a_turn and measured / 4 <= scan.views_a_turn <= 4 * measured
    found = rebin(
        detector,
        [view.place for view in views],
        lambda index: _rays(views[index]),
        scan.views_a_turn if believed else measured,
        choose=choose,
        most_rays=_MAX_REBINNED,
        progress=None if progress is None else lambda share: progress((1 + share) / 2),
    )
    shown = f"{found.heights_mm[1] - found.heights_mm[0]:.3g} mm" if len(found.heights_mm) > 1 else "one height"
    note = (
        f"The scan was rebinned to {len(found.sinogram)} slices ({shown}) of {found.beam.views} parallel views each; "
        "far from the axis its cone blurs them along the patient."
    )
    return Projections(
        torch.from_numpy(found.sinogram),
        found.beam,
        scan.water_per_mm,
        _rebinned_photons(views, found),
        tuple(found.heights_mm.tolist()),
        (note,),
        chosen=tuple(found.chosen) if choose else (),
    )


def _rebinned_photons(views: Sequence[_View], found: Rebinned) -> Tensor | None:
    """Of the rays in air, (views, channels): what averages to their noise, over all turns of a direction.

    The variance of a mean of rays goes with the mean of the inverse photons, which tube-current modulation changes from
    direction to direction. What interpolation smooths is not counted.
    """
    photons = [view.photons for view in views]
    if any(one is None for one in photons):
        return None
    count = found.beam.views
    angles = np.array([view.place.angle for view in views])
    direction = np.rint(np.mod(angles, math.pi) / math.pi * count).astype(int) % count
    inverse, number = np.zeros((count, views[0].scan.columns)), np.zeros(count)
    for one, place in zip(photons, direction, strict=True):
        inverse[place] += 1 / np.asarray(one, np.float64)
        number[place] += 1
    known = np.flatnonzero(number)
    mean = found.averaged * number[known, None] / inverse[known]
    nearest = known[np.abs(np.arange(count)[:, None] - known).argmin(axis=1)]
    by_view = mean[np.searchsorted(known, nearest)]
    columns = np.arange(by_view.shape[1])
    return torch.from_numpy(np.stack([np.interp(found.columns, columns, row) for row in by_view]).astype(np.float32))


def _views_a_turn(views: Sequence[_View]) -> int:
    """By the angles between the views."""
    steps = np.abs(np.diff(np.unwrap([view.place.angle for view in views])))
    return round(2 * math.pi / max(float(np.median(steps)), 1e-4))


def _is_helical(views: Sequence[_View]) -> bool:
    heights = [view.place.height_mm for view in views]
    return max(heights) - min(heights) > _SAME_PLACE_MM


def _views(folder: Path, progress: Callable[[float], object] | None) -> list[_View]:
    """All views in a folder, in the order they were taken."""
    files = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and entry.name[0] != ".")
    if len(files) > _MAX_FILES:
        raise UnsuitableProjections(f"{folder} holds more than {_MAX_FILES} files; give the folder of one scan.")
    views, problem = [], ""
    for index, file in enumerate(files):
        try:
            views.append(_view(file))
        except _Broken as error:
            problem = problem or f"{file.name} {error}"
        if progress:
            progress((index + 1) / len(files) / 2)
    if not views:
        raise UnsuitableProjections(
            f"{folder.name} holds no DICOM projections{f' ({problem})' if problem else ''}; give {_KNOWN}."
        )
    if problem:
        raise UnsuitableProjections(f"{problem}; copy it again, or take it out of {folder.name} if it is no view.")
    return sorted(views, key=lambda view: (view.number, view.path.name))


def _view(path: Path) -> _View:
    try:
        # Deflated files could grow without bounds, and compressed pixels are not part of the format.
        if str(pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID) not in _PLAIN:
            raise _Broken("is compressed")
        if path.stat().st_size > _MAX_VIEW_BYTES:
            raise _Broken("is too large for a view")
        header = _dataset(path, stop_before_pixels=True)
        scan = _Scan.of(header)
        log = _text(header, _Tag.LOG)
        shift = [_values(header, tag)[0] if _is_told(header, tag) else 0.0 for tag in
                 (_Tag.ANGLE_SHIFT, _Tag.HEIGHT_SHIFT, _Tag.DISTANCE_SHIFT)]  # fmt: skip
        photons = np.asarray(_values(header, _Tag.PHOTONS, scan.columns)) if _is_told(header, _Tag.PHOTONS) else None
        view = _View(
            path,
            int(header.get("InstanceNumber", 0) or 0),
            scan,
            ViewPlace(_values(header, _Tag.ANGLE)[0], _values(header, _Tag.HEIGHT)[0], _spot(shift, scan)),
            None if photons is None or not (photons > 0).all() else photons.astype(np.float32),
        )
    except _Broken:
        raise
    except Exception as error:  # pydicom raises whatever a broken value makes it raise
        raise _Broken("is no DICOM projection") from error
    if log == "NO":
        raise _Broken("holds intensities, not their logarithm")
    return view


def _spot(shift: Sequence[float], scan: _Scan) -> FocalSpot:
    """The focal spot's place; one that hardly moved has not moved, and equal ones are equal."""
    if max(abs(shift[0]) * scan.source_isocenter_mm, abs(shift[1]), abs(shift[2])) <= _SAME_PLACE_MM:
        return FocalSpot()
    return FocalSpot(round(shift[0], 4), round(shift[1], 2), round(shift[2], 2))


def _dataset(path: Path, stop_before_pixels: bool = False) -> Dataset:
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)


def _is_told(header: Dataset, tag: int) -> bool:
    """Whether a tag is there and not empty."""
    return tag in header and header[tag].value not in (None, "", b"") and np.size(header[tag].value) > 0


def _values(header: Dataset, tag: int, number: int = 1) -> list[float]:
    """Numbers of a private tag, also where its type was lost (as in files of implicit type)."""
    if tag not in header:
        raise _Broken(f"has no {pydicom.tag.Tag(tag)}")
    value = header[tag].value
    if isinstance(value, bytes):
        value = np.frombuffer(value, "<f4")
    values = [float(item) for item in np.atleast_1d(np.asarray(value, np.float64))]
    if len(values) != number or not all(map(math.isfinite, values)):
        raise _Broken(f"has {len(values)} numbers in {pydicom.tag.Tag(tag)} instead of {number}")
    return values


def _whole(header: Dataset, tag: int) -> int:
    if tag not in header:
        raise _Broken(f"has no {pydicom.tag.Tag(tag)}")
    value = header[tag].value
    return int(np.frombuffer(value, "<u2")[0]) if isinstance(value, bytes) else int(value)


def _text(header: Dataset, tag: int) -> str:
    value = header[tag].value if tag in header else ""
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)).strip(" \0").upper()


def _check_scan(views: Sequence[_View], folder: Path) -> None:
    scan, name = views[0].scan, folder.name
    other = next((view for view in views if view.scan != scan), None)
    if other is not None:
        raise UnsuitableProjections(
            f"{other.path.name} is of another scan, spectrum or detector than {views[0].path.name}; give a folder with "
            "the views of one."
        )
    if len({view.place.spot for view in views}) > _MOST_SPOTS:
        raise UnsuitableProjections(
            f"The focal spot of {name} moves to more than {_MOST_SPOTS} places; give a scan with fewer, or rebin it to "
            "fan-beam slices and give them as .npz."
        )
    if scan.shape not in _SHAPES:
        raise UnsuitableProjections(f"The detector of {name} is of unknown form ({scan.shape}); give another scan.")
    if len(views) < 2:
        raise UnsuitableProjections(f"{name} holds a single view; give all views of the scan.")


def _rays(view: _View) -> np.ndarray:
    """Line integrals of a view, float32 (rows, columns), row 1 first."""
    name, scan = view.path.name, view.scan
    try:
        dataset = _dataset(view.path)
        size = int(dataset.Rows), int(dataset.Columns)
        plain = int(dataset.BitsAllocated) == 16 and int(dataset.get("PixelRepresentation", 0)) == 0
        data = bytes(dataset.PixelData)
        slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    except Exception as error:
        raise UnsuitableProjections(f"The values of {name} cannot be read; copy the file again.") from error
    wanted = scan.rows, scan.columns
    if size not in (wanted, wanted[::-1]) or len(data) < 2 * math.prod(size) or not plain:
        raise UnsuitableProjections(
            f"{name} does not hold the {scan.rows} x {scan.columns} plain 16-bit values that its header tells of; copy "
            "it again from the original data set."
        )
    raw = np.frombuffer(data, "<u2", math.prod(size)).reshape(size)
    # The manual lets rows follow each other; the public data set's files are transposed. A square detector cannot be
    # told, and does not exist.
    if size != wanted:
        raw = raw.T
    elif scan.rows == scan.columns > 1:
        raise UnsuitableProjections(f"{name} has as many rows as columns, so that their order cannot be told.")
    return raw.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _warnings(scan: _Scan, views: int) -> list[str]:
    found = []
    if 0 < views < scan.views_a_turn:
        found.append(f"{scan.views_a_turn - views} of the {scan.views_a_turn} views of a turn are missing.")
    tilt = float(np.abs(scan.heights_mm).max()) * _FLAT_AT_MM / scan.source_isocenter_mm
    if tilt > _FLAT_MM:
        found.append(
            f"Each detector row is taken for a flat fan; {_FLAT_AT_MM:.0f} mm from the isocenter the outermost ones "
            f"are {tilt:.1f} mm off their plane."
        )
    return found


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single value"
