"""Archives to try curation on: DICOM studies of any volume, and reports to go with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from LCTfoundLib.volume import Volume

__all__ = ["write_study"]


def write_study(folder: Path, ct: Volume, report: str | None = None, **header: object) -> str:
    """Write an upright CT as DICOM slices into ``folder``, and the report beside them; its StudyInstanceUID.

    Args:
        ct: canonical, HU.
        report: becomes ``report.txt``, in UTF-8.
        header: DICOM keywords and values that all slices get.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study = str(header.pop("StudyInstanceUID", generate_uid()))
    series, frame = generate_uid(), generate_uid()
    for k, plane in enumerate(ct.array):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, series, frame
        data.Modality, data.PatientID, data.PatientName = "CT", "unknown", "unknown"
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.InstanceNumber, data.SeriesNumber, data.SliceThickness = k + 1, 2, ct.spacing[2]
        data.Rows, data.Columns = plane.shape
        data.PixelSpacing = [ct.spacing[1], ct.spacing[0]]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [ct.origin[0], ct.origin[1], ct.origin[2] + k * ct.spacing[2]]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        for keyword, value in header.items():
            setattr(data, keyword, value)
        data.PixelData = np.ascontiguousarray(plane, dtype="<i2").tobytes()
        pydicom.dcmwrite(folder / f"IM{k:04d}.dcm", data, enforce_file_format=True)
    if report is not None:
        (folder / "report.txt").write_text(report, encoding="utf-8")
    return study
