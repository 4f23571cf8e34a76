"""DICOM series to volumes, named and filed as Slicer's DICOM module does; and a database of the files just loaded."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import slicer
import vtk

_HEADER = (
    "PatientName PatientID PatientSex PatientBirthDate StudyInstanceUID StudyID StudyDate StudyTime StudyDescription "
    "SeriesInstanceUID SeriesNumber SeriesDescription Modality SOPInstanceUID ImagePositionPatient "
    "ImageOrientationPatient InstanceNumber FrameOfReferenceUID Rows"
).split()


class NoImages(RuntimeError):
    """The folder has no DICOM image; the message names it."""


@dataclass
class Instance:
    path: Path
    header: pydicom.Dataset

    def text(self, keyword: str) -> str:
        return str(self.header.get(keyword, ""))

    @property
    def place(self) -> float:
        """Position along the normal of the slices, mm; the number in the series where there is no position."""
        if "ImagePositionPatient" not in self.header or "ImageOrientationPatient" not in self.header:
            return float(self.header.get("InstanceNumber", 0) or 0)
        along, down = np.reshape(np.asarray(self.header.ImageOrientationPatient, float), (2, 3))
        return float(np.cross(along, down) @ np.asarray(self.header.ImagePositionPatient, float))


class DicomDatabase:
    """`slicer.dicomDatabase` for the instances that were loaded in this session."""

    def __init__(self) -> None:
        self._instances: dict[str, Instance] = {}
        self.isOpen = True

    def add(self, instances: Iterable[Instance]) -> None:
        self._instances |= {instance.text("SOPInstanceUID"): instance for instance in instances}

    def fileForInstance(self, sopInstanceUID: str) -> str:
        """Path of an instance; "" if it is unknown."""
        found = self._instances.get(sopInstanceUID)
        return str(found.path) if found else ""

    def filesForSeries(self, seriesUID: str) -> list[str]:
        return [str(item.path) for item in self._of("SeriesInstanceUID", seriesUID)]

    def instancesForSeries(self, seriesUID: str) -> list[str]:
        return [item.text("SOPInstanceUID") for item in self._of("SeriesInstanceUID", seriesUID)]

    def seriesForFile(self, path: str) -> str:
        found = next((item for item in self._instances.values() if item.path == Path(path)), None)
        return found.text("SeriesInstanceUID") if found else ""

    def fileValue(self, path: str, tag: str) -> str:
        """Value of a tag "gggg,eeee" of a file; "" if it is not there."""
        header = pydicom.dcmread(path, stop_before_pixels=True)
        group, element = (int(part, 16) for part in tag.split(","))
        return str(header[group, element].value) if (group, element) in header else ""

    def instanceValue(self, sopInstanceUID: str, tag: str) -> str:
        path = self.fileForInstance(sopInstanceUID)
        return self.fileValue(path, tag) if path else ""

    def _of(self, keyword: str, value: str) -> list[Instance]:
        return [item for item in self._instances.values() if item.text(keyword) == value]


def loadFolder(folder: str | Path, logic: Any, database: DicomDatabase) -> list[Any]:
    """Load every image series of a folder and its subfolders as a scalar volume.

    Args:
        logic: the vtkSlicerVolumesLogic.

    Raises:
        NoImages: there is none.
    """
    series: dict[str, list[Instance]] = defaultdict(list)
    for instance in _images(Path(folder)):
        series[instance.text("SeriesInstanceUID")].append(instance)
    if not series:
        raise NoImages(f"{folder} has no DICOM images. Choose the folder that holds the files of the series.")
    nodes = []
    for instances in series.values():
        instances.sort(key=lambda instance: instance.place)
        database.add(instances)
        nodes.append(_loadSeries(instances, logic))
    return nodes


def _images(folder: Path) -> Iterable[Instance]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)
        except (pydicom.errors.InvalidDicomError, OSError) as problem:
            logging.debug("%s is skipped: %s", path, problem)
            continue
        if "Rows" in header:
            yield Instance(path, header)


def _loadSeries(instances: list[Instance], logic: Any) -> Any:
    """`instances` in the order of their slices: without the list, the reader's own order can be wrong."""
    first = instances[0]
    files = vtk.vtkStringArray()
    for instance in instances:
        files.InsertNextValue(str(instance.path))
    name = f"{first.text('SeriesNumber')}: {first.text('SeriesDescription') or 'Unnamed Series'}".removeprefix(": ")
    node = logic.AddArchetypeVolume(str(first.path), name, logic.AutoWindowLevel, files)
    if node is None:
        raise RuntimeError(f"Slicer's reader could not load the series of {first.path}.")
    node.SetAttribute("DICOM.instanceUIDs", " ".join(instance.text("SOPInstanceUID") for instance in instances))
    _file(node, first)
    return node


def _file(node: Any, instance: Instance) -> None:
    """Patient, study and series items of the subject hierarchy."""
    names = slicer.vtkMRMLSubjectHierarchyConstants
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(node.GetScene())
    uid = names.GetDICOMUIDName()
    seriesUID, studyUID = instance.text("SeriesInstanceUID"), instance.text("StudyInstanceUID")
    patientUID = instance.text("PatientID") or instance.text("PatientName") or studyUID
    series = hierarchy.GetItemByDataNode(node)
    hierarchy.SetItemUID(series, uid, seriesUID)
    hierarchy.SetItemAttribute(series, names.GetDICOMSeriesModalityAttributeName(), instance.text("Modality"))
    hierarchy.SetItemAttribute(series, names.GetDICOMSeriesNumberAttributeName(), instance.text("SeriesNumber"))
    slicer.vtkSlicerSubjectHierarchyModuleLogic.InsertDicomSeriesInHierarchy(hierarchy, patientUID, studyUID, seriesUID)
    patient, study = hierarchy.GetItemByUID(uid, patientUID), hierarchy.GetItemByUID(uid, studyUID)
    hierarchy.SetItemName(patient, f"{instance.text('PatientName') or 'No name'} ({instance.text('PatientID')})")
    date, text = instance.text("StudyDate") or "No study date", instance.text("StudyDescription")
    hierarchy.SetItemName(study, f"{text} ({date})" if text else date)
    for item, keywords in (
        (patient, ("PatientName", "PatientID", "PatientSex", "PatientBirthDate")),
        (study, ("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "StudyDescription")),
    ):
        for keyword in keywords:
            attribute = getattr(names, f"GetDICOM{keyword}AttributeName")()
            hierarchy.SetItemAttribute(item, attribute, instance.text(keyword))
