"""A DICOM CT series for tests, written with pydicom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from LCTfoundLib.volume import Volume

PATIENT = "Mustermann^Erika"


def slice_header(ct: Volume, k: int, series: str) -> FileDataset:
    """Plane ``k`` as a CT image of the usual kind, without its pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = PATIENT, "4711", "19600229", "F"
    image.StudyInstanceUID, image.SeriesInstanceUID = generate_uid(entropy_srcs=[series, "study"]), series
    image.FrameOfReferenceUID, image.PositionReferenceIndicator = generate_uid(entropy_srcs=[series, "frame"]), ""
    image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "20240131", "101112", "7", "A1"
    image.ReferringPhysicianName = "Arzt^Anna"
    image.Modality, image.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.SeriesNumber, image.InstanceNumber, image.SliceThickness = 3, k + 1, ct.spacing[2]
    image.ImageOrientationPatient = np.round(ct.direction[:, :2].T.ravel(), 9).tolist()
    image.ImagePositionPatient = np.round(ct.world_from_index(np.array([k, 0, 0])), 6).tolist()
    image.PixelSpacing = [ct.spacing[1], ct.spacing[0]]
    image.Rows, image.Columns = ct.shape[1:]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 1
    image.RescaleSlope, image.RescaleIntercept = 1, 0
    return image


def write_series(
    ct: Volume,
    folder: Path,
    rng: np.random.Generator | None = None,
    change: Callable[[Dataset, int], None] | None = None,
) -> Path:
    """A CT series in files whose names do not tell their order."""
    folder.mkdir(parents=True, exist_ok=True)
    series, start = generate_uid(), len(list(folder.iterdir()))
    names = np.arange(ct.shape[0]) if rng is None else rng.permutation(ct.shape[0])
    for k, name in enumerate(names):
        image = slice_header(ct, k, series)
        image.PixelData = ct.array[k].astype("<i2").tobytes()
        if change:
            change(image, k)
        image.save_as(folder / f"IM{start + name:04d}", enforce_file_format=True)
    return folder
