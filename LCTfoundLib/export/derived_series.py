"""An image computed from a scan as a DICOM series: CT Images that say in every file that they are derived, and how.

Classic CT Images, a file a slice, because every program reads them, Slicer among them; Enhanced CT has room for more
than is known here and fewer readers. Unlike generated images, which are no CT of anybody (see ``synthetic``), these
show a patient's anatomy at its place, with detail that may be made up: they stay in the patient's study, in a series of
their own whose every image is marked DERIVED, and SYNTHETIC where a network or a simulation took part.
"""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.config import RAISE
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import validate_value

from LCTfoundLib import __version__
from LCTfoundLib.export.marking import PRODUCT, USE, Nature, plain_ascii
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_dicom import source_files

__all__ = ["DicomSource", "Marks", "write_derived_series"]

#: Patient, study and scan that a derived image keeps, all of type 2 or 3: what is missing or invalid is left empty.
_KEPT = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientIdentityRemoved",
    "DeidentificationMethod", "StudyDate", "StudyTime", "StudyID", "StudyDescription", "AccessionNumber",
    "ReferringPhysicianName", "PositionReferenceIndicator", "PatientPosition", "BodyPartExamined", "KVP",
)  # fmt: skip
#: Of these an image must have the attribute, empty if need be.
_MUST_BE_THERE = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator", "PatientPosition", "KVP",
)  # fmt: skip
_UIDS = ("StudyInstanceUID", "FrameOfReferenceUID")
_HEADER = [
    *_KEPT, *_UIDS, "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber",
    "ImagePositionPatient", "ImageOrientationPatient",
]  # fmt: skip
#: A slice lies on one of the source's when it is nearer to its plane than this.
_SAME_PLANE_MM = 0.01
#: Lung and mediastinum: centers, widths, names.
_WINDOWS = (["-500", "40"], ["1600", "400"], ["LUNG", "MEDIASTINUM"])


@dataclass(frozen=True)
class Marks:
    """What each image says of itself.

    Attributes:
        title: of the series, 64 letters at most are kept.
        derivation: how it was made.
        nature: what it is.
        model: what made it.
    """

    title: str
    derivation: str
    nature: Nature
    model: str = "LCTfound reconstruction"


@dataclass(frozen=True, eq=False)
class DicomSource:
    """The DICOM files that an image was computed from; without any, the image is of nobody.

    Attributes:
        header: of the first image: patient, study, frame of reference. None: anonymous.
        images: of each slice its class, instance, and the place of its plane along ``normal``, mm (NaN if not told).
        normal: of the slices, LPS.
    """

    header: Dataset | None = None
    images: tuple[tuple[str, str, float], ...] = ()
    normal: np.ndarray = field(default_factory=lambda: np.array([0.0, 0.0, 1.0]))

    @classmethod
    def of_ct(cls, path: Path) -> DicomSource:
        """The series that ``read_dicom`` takes of a file or folder.

        Raises:
            UnsuitableImage: as ``read_dicom``.
        """
        return cls.of_files(source_files([path]))

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> DicomSource:
        """Of all these files; of none it is nobody's."""
        if not files:
            return cls()
        headers = [_header(file) for file in files]
        normal = _normal(headers[0])
        images = tuple(
            (str(header.get("SOPClassUID", "")), str(header.get("SOPInstanceUID", "")), _height(header, normal))
            for header in headers
        )
        return cls(headers[0], images, normal)

    def near(self, place: np.ndarray) -> list[tuple[str, str]]:
        """Class and instance of the image whose plane holds a point (LPS mm): one, or none."""
        height = float(place @ self.normal)
        known = [(abs(h - height), kind, name) for kind, name, h in self.images if kind and name and np.isfinite(h)]
        away, kind, name = min(known, default=(np.inf, "", ""))
        return [(kind, name)] if away < _SAME_PLANE_MM else []


def write_derived_series(
    image: Volume,
    folder: Path,
    marks: Marks,
    source: DicomSource | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a volume as CT Images, a file a slice: ``slice_0001.dcm``, ...

    Patient, study and frame of reference are the source's; series and images get identifiers of their own.

    Args:
        image: HU; rounded to whole ones. Its third axis counts the slices.
        folder: which exists.
        marks: what it is.
        source: what it was computed from.
        progress: told after each file.

    Raises:
        OSError: the folder cannot be written or is full.
        Cancelled: the user stopped.
    """
    source = source or DicomSource()
    common, series = _common(source, image), _series(source, marks)
    for k in Progress.of(progress).track(range(len(image.array))):
        slice_ = Dataset()
        slice_.update(common)
        slice_.update(series)
        _place(slice_, image, k)
        _refer(slice_, source, image, k)
        slice_.save_as(folder / f"slice_{k + 1:04d}.dcm", enforce_file_format=True)


def _header(file: Path) -> Dataset:
    """Texts decoded, whatever letters they were written in."""
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_HEADER))
        header.decode()
    return header


def _normal(header: Dataset) -> np.ndarray:
    try:
        axes = np.array(header.ImageOrientationPatient, np.float64).reshape(2, 3)
        return np.cross(axes[0], axes[1])
    except (AttributeError, TypeError, ValueError):
        return np.array([0.0, 0.0, 1.0])


def _height(header: Dataset, normal: np.ndarray) -> float:
    try:
        return float(np.array(header.ImagePositionPatient, np.float64) @ normal)
    except (AttributeError, TypeError, ValueError):
        return float("nan")


def _common(source: DicomSource, image: Volume) -> Dataset:
    """Patient and study."""
    common = Dataset()
    common.SpecificCharacterSet = "ISO_IR 192"
    if source.header is None:
        common.PatientName, common.PatientID = "ANONYMOUS^LCTFOUND", f"ANONYMOUS-{generate_uid(None)[-8:]}"
    else:
        for keyword in _KEPT:
            value = _valid(source.header, keyword)
            if value is not None:
                setattr(common, keyword, value)
        if common.get("PatientSex") not in ("M", "F", "O"):
            common.PatientSex = ""
    for keyword in _UIDS:
        known = None if source.header is None else _valid(source.header, keyword)
        setattr(common, keyword, known or generate_uid(None))
    for keyword in _MUST_BE_THERE:
        if keyword not in common:
            setattr(common, keyword, None)
    common.SliceThickness = _thickness(image)
    return common


def _thickness(image: Volume) -> str:
    """As its metadata tell it, else as if the slices touched."""
    try:
        told = float(image.metadata.get("SliceThickness", ""))
    except ValueError:
        told = image.spacing[2]
    return f"{told if 0 < told < 1000 else image.spacing[2]:.10g}"


def _valid(header: Dataset, keyword: str) -> Any:
    """A value as DICOM allows it; None for any other."""
    element = header.get(keyword)
    if element in (None, ""):
        return None
    try:
        validate_value(header[keyword].VR, str(element), RAISE)
    except ValueError:
        return None
    return element


def _series(source: DicomSource, marks: Marks) -> Dataset:
    """What all images of the new series share."""
    now = datetime.now()
    day, moment = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    series = Dataset()
    series.SOPClassUID, series.Modality = CTImageStorage, "CT"
    series.SeriesInstanceUID = generate_uid(None)
    series.SeriesDescription = plain_ascii(marks.title)[:64]
    series.SeriesNumber, series.AcquisitionNumber = _number(source.header), None
    series.SeriesDate = series.ContentDate = series.InstanceCreationDate = day
    series.SeriesTime = series.ContentTime = series.InstanceCreationTime = moment
    series.Manufacturer, series.ManufacturerModelName, series.SoftwareVersions = PRODUCT, marks.model, __version__
    series.ImageType = ["DERIVED", "SECONDARY", "AXIAL", *(["SYNTHETIC"] if marks.nature.synthetic else [])]
    series.SyntheticData = "YES" if marks.nature.synthetic else "NO"
    series.ContentQualification = "RESEARCH"
    series.DerivationDescription = plain_ascii(marks.derivation)[:1024]
    series.ImageComments = f"{marks.nature.capitalize()}. {USE}"
    series.BurnedInAnnotation, series.LossyImageCompression = "NO", "00"
    return series


def _number(header: Dataset | None) -> int:
    """A number that the scanner is unlikely to have given, next to that of the source."""
    try:
        number = abs(int(header.SeriesNumber)) if header is not None else 0
    except (AttributeError, TypeError, ValueError):
        number = 0
    return 1000 + number if number < 10**8 else 1000


def _place(slice_: Dataset, image: Volume, k: int) -> None:
    """Pixels, and where they lie."""
    stored = np.clip(np.rint(image.array[k]), -32768, 32767).astype("<i2")
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.SOPInstanceUID = generate_uid(None)
    slice_.InstanceNumber = k + 1
    slice_.ImagePositionPatient = _decimals(image.world_from_index(np.array([k, 0, 0])))
    slice_.ImageOrientationPatient = _decimals(image.direction[:, :2].T.ravel())
    slice_.PixelSpacing = _decimals(np.array([image.spacing[1], image.spacing[0]]))
    slice_.Rows, slice_.Columns = stored.shape
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
    slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = "1", "0", "HU"
    slice_.WindowCenter, slice_.WindowWidth, slice_.WindowCenterWidthExplanation = _WINDOWS
    slice_.PixelData = stored.tobytes()


def _refer(slice_: Dataset, source: DicomSource, image: Volume, k: int) -> None:
    """Name the image that was the source of this one, where there is one in its plane."""
    sources = []
    for kind, name in source.near(image.world_from_index(np.array([k, 0, 0]))):
        item, purpose = Dataset(), Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = kind, name
        purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
        purpose.CodeMeaning = "Source image for image processing operation"
        item.PurposeOfReferenceCodeSequence = [purpose]
        sources.append(item)
    if sources:
        slice_.SourceImageSequence = sources


def _decimals(values: np.ndarray) -> list[str]:
    """In the 16 letters that DICOM has for a number; no minus before a zero."""
    return [f"{value:.9g}" if abs(value) > 1e-7 else "0" for value in values.tolist()]
