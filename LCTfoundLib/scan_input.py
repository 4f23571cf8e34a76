"""A scan as input: told from images, cut to a part of its slices and views, and given a place for its images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import FanBeam, ImageGrid
from LCTfoundLib.physics.projection_files import Projections
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_dicom import is_dicom_file

__all__ = [
    "dicom_files",
    "grid_of_scan",
    "hint_of_geometry",
    "holds_projections",
    "volume_of_scan",
    "with_views",
]

#: Sides of the images of a scan: the larger one where the detector is fine enough to fill it.
_SIDES, _FINE = (256, 512), 384
#: Slices whose distances differ by less than this share are evenly spaced.
_EVEN = 0.02
_NO_HEIGHTS = "The scan does not tell where its slices lie: they are put 1 mm apart, from 0."
_NO_POSITION = (
    "The projections do not tell how the patient lay: head first and on the back is assumed; left and right may be "
    "exchanged."
)
#: Private tag of DICOM-CT-PD: the angle of a view.
_VIEW_ANGLE = 0x7031_1001
#: Files of a folder that are looked at to tell projections from images.
_LOOKED_AT = 20


def holds_projections(source: Path) -> bool:
    """Whether the input is a sinogram rather than a CT.

    NumPy files are; an NRRD file with a geometry beside it is; a folder is by its first DICOM files.
    """
    if source.is_dir():
        return any(_is_view(file) for file in dicom_files(source))
    suffix = source.suffix.lower()
    if suffix == ".nrrd":
        return _tells_geometry(source.with_suffix(".json"))
    return suffix in (".npy", ".npz") or (is_dicom_file(source) and _is_view(source))


def hint_of_geometry(source: Path) -> str:
    """An NRRD file that is no CT may be a sinogram."""
    if source.suffix.lower() != ".nrrd" or not source.exists():
        return ""
    return f" If it is a sinogram, write its geometry to {source.with_suffix('.json').name} beside it."


def _tells_geometry(side: Path) -> bool:
    try:
        return "geometry" in json.loads(side.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def dicom_files(folder: Path) -> list[Path]:
    """The first DICOM files of a folder; none of a file."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file())[:_LOOKED_AT]
    return [path for path in files if is_dicom_file(path)]


def _is_view(file: Path) -> bool:
    try:
        return _VIEW_ANGLE in pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[_VIEW_ANGLE])
    except Exception:  # pydicom raises whatever a broken file makes it raise
        return False


def with_views(scan: Projections, views: int | None) -> Projections:
    """The scan with so many of its views, spread evenly over its angles."""
    total = scan.beam.views
    if views is None or views == total:
        return scan
    if views > total:
        raise UnsuitableProjections(f"The scan has {total} views; give --views {total} or fewer.")
    order = np.argsort(np.mod(scan.beam.angles, scan.beam.turn), kind="stable")
    chosen = sorted(int(order[view * total // views]) for view in range(views))
    photons = scan.photons
    if photons is not None and photons.ndim == 2 and photons.shape[0] == total:
        photons = photons[chosen]
    return replace(scan, sinogram=scan.sinogram[:, chosen], beam=scan.beam.subset(chosen), photons=photons)


def grid_of_scan(
    scan: Projections, size: int | None = None, pixel_mm: float | None = None, field_mm: float | None = None
) -> ImageGrid:
    """The images' grid: as asked for, else the largest square whose circle the detector covers.

    Args:
        scan: what was measured.
        size: pixels of a side.
        pixel_mm, field_mm: side of a pixel, or of the image.
    """
    beam = scan.beam
    covered_mm = 2 * beam.field_mm
    near = beam.source_isocenter_mm / beam.source_detector_mm if isinstance(beam, FanBeam) else 1.0
    fine = covered_mm / (beam.pitch_mm * near) >= _FINE
    size = size or _SIDES[fine]
    return ImageGrid(size, size, pixel_mm or (field_mm or covered_mm) / size)


def volume_of_scan(scan: Projections, grid: ImageGrid) -> tuple[Volume, list[str]]:
    """Where the slices lie, in LPS mm around the isocenter, and what was assumed of it."""
    step, first, notes = 1.0, 0.0, [_NO_HEIGHTS, _NO_POSITION]
    if scan.heights_mm:
        heights = np.asarray(scan.heights_mm)
        steps = np.diff(heights)
        step, first = (float(np.mean(steps)) if steps.size else 1.0), float(heights[0])
        if steps.size and (step <= 0 or np.abs(steps - step).max() > _EVEN * step):
            raise UnsuitableProjections(
                "The slices do not rise evenly; choose those that do with --slices, or correct heights_mm."
            )
        notes = [_NO_POSITION]
    array = np.broadcast_to(np.float32(0), (len(scan.sinogram), grid.rows, grid.columns))
    place = (float(grid.x_mm[0]), float(-grid.y_mm[0]), first)
    return Volume(array, (grid.pixel_mm, grid.pixel_mm, step), place, metadata={"Modality": "CT"}), notes
