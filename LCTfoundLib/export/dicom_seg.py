"""DICOM Segmentation: what a PACS keeps beside the CT, with names, colors and codes that other programs understand.

Parts overlap (vessels run inside segments), so the type is BINARY: one frame of bits for each part and slice in which
it has voxels. No lossless compression is defined for single bits but JPEG 2000, so the frames are stored packed, eight
voxels a byte, which every reader knows.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, TM

from LCTfoundLib import __version__
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.export.parts import STRUCTURE_PARTS, LabelLayer, Part, layers_of, part_boxes
from LCTfoundLib.export.terminology import Code
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_dicom import SourceSeries, source_series

if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription

__all__ = ["Making", "check_source", "write_dicom_seg"]

_ALGORITHM = "LCTfound lung segmentation"
_SERIES_DESCRIPTION = "LCTfound lung segmentation (research use only)"
_CONTENT_DESCRIPTION = "Structures of the lungs. Research use only."
#: Grids whose corners differ by less than this many voxels are the same: Slicer and others round spacing and origin.
_SAME_PLACE = 0.1
_OTHER_FORMATS = "export .seg.nrrd or NIfTI instead"
#: Without these nothing can refer to the CT.
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
#: What a CT should have and some anonymizers take away; it may be empty, not absent.
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """How the labels came about.

    Attributes:
        provenance: with ``weights``: name -> sha256 and so on.
        edited: whether somebody changed them by hand.
    """

    provenance: Mapping[str, Any] = field(default_factory=dict)
    edited: bool = False


def check_source(labels: Volume, places: Sequence[Path]) -> SourceSeries:
    """The series whose images the labels lie on.

    Args:
        labels: a volume on the grid of the labels.
        places: files or folders of the series.

    Raises:
        UnsuitableImage: there is none, or it lies elsewhere.
    """
    if not places:
        raise UnsuitableImage(f"DICOM SEG needs the DICOM series that the CT was read from; {_OTHER_FORMATS}.")
    series = source_series(places)
    if not _lie_together(labels, series.grid):
        raise UnsuitableImage(
            "The labels do not lie on the voxels of the DICOM series (was the CT cropped, resampled or moved?); "
            f"segment the series as it is, or {_OTHER_FORMATS}."
        )
    return series


def write_dicom_seg(
    segments: Volume,
    trees: Volume,
    places: Sequence[Path],
    path: Path,
    parts: Sequence[Part] = STRUCTURE_PARTS,
    making: Making | None = None,
) -> list[str]:
    """Write the parts that have voxels as one DICOM Segmentation.

    Args:
        segments: uint8, codes 1-18, on the grid of the series; axes may be reversed or exchanged.
        trees: uint8, codes 1-3, on the same grid.
        places: files or folders of the CT series, in any order.
        path: file to write, usually ending in ``.dcm``.
        parts: what to write.
        making: how the labels came about.

    Returns:
        Keys of the parts written, in order of their segment numbers from 1.

    Raises:
        UnsuitableImage: no DICOM series, another grid, a header without what a segmentation needs, nothing to write.
    """
    series = check_source(segments, places)
    present = _present(parts, segments.array, trees.array)
    on_series = [labels.to_canonical().restore_to(series.grid).array for labels in (segments, trees)]
    numbers = {part.key: number for number, part in enumerate(present, start=1)}
    layers = layers_of(present, on_series[0], on_series[1], numbers)
    source = _Source.of(series)
    descriptions = [_description(part, numbers[part.key], source.images[0], making or Making()) for part in present]
    whole = _joined([_segmentation(layer, source, descriptions) for layer in layers], _overlap(layers))
    whole.save_as(path)
    return [part.key for part in present]


def _lie_together(labels: Volume, grid: Volume) -> bool:
    """Whether both have the same voxels, however their axes are ordered."""
    mine, theirs = labels.to_canonical(), grid.to_canonical()
    if mine.shape != theirs.shape:
        return False
    corners = np.array(list(itertools.product(*((0, n - 1) for n in mine.shape))))
    away = theirs.index_from_world(mine.world_from_index(corners)) - corners
    return bool(np.abs(away).max() < _SAME_PLACE)


def _present(parts: Sequence[Part], segments: np.ndarray, trees: np.ndarray) -> list[Part]:
    boxes = part_boxes(parts, segments, trees)
    present = [part for part in parts if part.key in boxes]
    if not present:
        raise UnsuitableImage("None of the structures has a voxel, and DICOM knows no empty segmentation.")
    return present


# -- the source ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """The CT's headers, made fit to be copied from.

    Attributes:
        images: in the order of their first planes.
        plane_order: the plane of each image, or of each frame of the one image, in its order: so highdicom wants them.
        charset: of the patient's name, which highdicom 0.27 does not copy and 0.28 does not always understand.
    """

    images: list[Dataset]
    plane_order: np.ndarray
    charset: Any

    @classmethod
    def of(cls, series: SourceSeries) -> _Source:
        files = dict.fromkeys(file for file, _ in series.images)
        images: list[Dataset] = [pydicom.dcmread(file, stop_before_pixels=True, force=True) for file in files]
        for image in images:
            missing = [keyword for keyword in _NEEDED if not image.get(keyword)]
            if missing:
                raise UnsuitableImage(f"The files of the DICOM series have no {', '.join(missing)}; {_OTHER_FORMATS}.")
            # Scanners round the same direction differently from slice to slice; a segmentation has one for all.
            if "ImageOrientationPatient" in image:
                image.ImageOrientationPatient = images[0].ImageOrientationPatient
        first = images[0]
        first.decode()
        charset = first.pop("SpecificCharacterSet", None)
        _mend(first, series.grid.spacing[2])
        return cls(images, _plane_order(series, images), charset.value if charset else None)


def _plane_order(series: SourceSeries, images: Sequence[Dataset]) -> np.ndarray:
    if len(images) == len(series.images):
        return np.arange(len(images))
    frames = [frame for _, frame in series.images if frame is not None]
    if len(images) > 1 or len(frames) != int(images[0].get("NumberOfFrames", 1)):
        raise UnsuitableImage(
            f"The CT is only a part of a multi-frame DICOM file, or lies in several; {_OTHER_FORMATS}."
        )
    return np.argsort(frames)


def _mend(image: Dataset, thickness: float) -> None:
    """Patient, study and thickness (mm) as a new object may have them: nothing missing, no value that is none."""
    for keyword in _MAY_BE_EMPTY:
        if keyword not in image:
            setattr(image, keyword, "")
    if image.PatientSex not in ("M", "F", "O"):
        image.PatientSex = ""
    for keyword, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            kind(image[keyword].value)
        except (TypeError, ValueError):
            setattr(image, keyword, "")
    if not image.get("SliceThickness"):
        image.SliceThickness = f"{thickness:.10g}"


# -- the segmentation ------------------------------------------------------------------------------------------------


def _segmentation(layer: LabelLayer, source: _Source, descriptions: Sequence[SegmentDescription]) -> Segmentation:
    """A DICOM Segmentation that describes all parts and holds the frames of one layer, which do not overlap."""
    import highdicom as hd

    try:
        segmentation = hd.seg.Segmentation(
            source_images=source.images,
            pixel_array=layer.whole()[source.plane_order],
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=hd.UID(),
            series_number=_series_number(source.images[0]),
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="LCTfound",
            manufacturer_model_name=_ALGORITHM,
            software_versions=__version__,
            device_serial_number=__version__,
            content_label="LCTFOUND",
            content_description=_CONTENT_DESCRIPTION,
            series_description=_SERIES_DESCRIPTION,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # what highdicom raises for broken headers
        raise UnsuitableImage(
            f"The headers of the DICOM series lack what a DICOM segmentation needs ({error}); {_OTHER_FORMATS}."
        ) from error
    if source.charset is not None:
        segmentation.SpecificCharacterSet = source.charset
    return segmentation


def _series_number(image: Dataset) -> int:
    """A number that the scanner is unlikely to have given, next to that of the CT."""
    number = image.get("SeriesNumber")
    return 1000 + max(0, int(number)) if number is not None and abs(int(number)) < 10**8 else 1000


def _overlap(layers: Sequence[LabelLayer]) -> bool:
    """Whether a voxel belongs to parts of two layers."""
    pairs = list(itertools.combinations(layers, 2))
    return any(np.logical_and(a.plane(k), b.plane(k)).any() for a, b in pairs for k in range(len(a.source)))


def _joined(layers: Sequence[Segmentation], overlap: bool) -> Segmentation:
    """The frames of all layers in the first one.

    highdicom takes overlapping segments only as a stack of full volumes, 1.6 GB for 300 slices; layer by layer it needs
    no more than the CT. All layers describe the same segments, so only their frames have to be put together.
    """
    whole = layers[0]
    frames = [frame for layer in layers for frame in layer.PerFrameFunctionalGroupsSequence]
    if len(layers) > 1:
        whole.PixelData = _joined_bits(layers)
        whole.PerFrameFunctionalGroupsSequence = frames
        whole.NumberOfFrames = len(frames)
        whole.SegmentsOverlap = "YES" if overlap else "NO"
        _number_planes(whole)
    return whole


def _joined_bits(layers: Sequence[Segmentation]) -> bytes:
    """Pixel data of all layers one after another; frames begin within a byte where they have no multiple of 8 bits."""
    counts = [layer.NumberOfFrames * layer.Rows * layer.Columns for layer in layers]
    if all(count % 8 == 0 for count in counts):
        content = b"".join(layer.PixelData[: count // 8] for layer, count in zip(layers, counts, strict=True))
    else:
        bits = [
            np.unpackbits(np.frombuffer(layer.PixelData, np.uint8), count=count, bitorder="little")
            for layer, count in zip(layers, counts, strict=True)
        ]
        content = np.packbits(np.concatenate(bits), bitorder="little").tobytes()
    return content + b"\0" * (len(content) % 2)


def _number_planes(segmentation: Segmentation) -> None:
    """Set the frames' index of position, which counts the planes that have a frame, from 1 in the frames' direction."""
    frames = segmentation.PerFrameFunctionalGroupsSequence
    axes = segmentation.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    normal = np.cross(np.array(axes[:3], float), np.array(axes[3:], float))
    positions = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames]
    heights = np.round(np.array(positions, float) @ normal, 3)
    segments = [frame.FrameContentSequence[0].DimensionIndexValues[0] for frame in frames]
    falling = np.diff(heights)[np.diff(segments) == 0].sum() < 0
    numbers = np.unique(-heights if falling else heights, return_inverse=True)[1] + 1
    for frame, segment, number in zip(frames, segments, numbers.tolist(), strict=True):
        frame.FrameContentSequence[0].DimensionIndexValues = [segment, number]


# -- the segments ----------------------------------------------------------------------------------------------------


def _description(part: Part, number: int, image: Dataset, making: Making) -> SegmentDescription:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    kind = hd.seg.SegmentAlgorithmTypeValues
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=part.name,
        segmented_property_category=_concept(part.term.category),
        segmented_property_type=_concept(part.term.type),
        algorithm_type=kind.SEMIAUTOMATIC if making.edited else kind.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            _ALGORITHM, codes.DCM.ArtificialIntelligence, __version__, "LCTfound", _weights(making.provenance) or None
        ),
        tracking_uid=_tracking_uid(part, image),
        tracking_id=f"LCTfound {part.key}",
        display_color=hd.color.CIELabColor.from_rgb(*part.color),
    )
    if part.term.modifier.value:
        property_type = description.SegmentedPropertyTypeCodeSequence[0]
        property_type.SegmentedPropertyTypeModifierCodeSequence = [_concept(part.term.modifier)]
    return description


def _concept(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)


def _weights(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Name and checksum of the weights."""
    weights = provenance.get("weights")
    cards = weights.items() if isinstance(weights, Mapping) else ()
    return {str(name): str(card["sha256"]) for name, card in cards if isinstance(card, Mapping) and "sha256" in card}


def _tracking_uid(part: Part, image: Dataset) -> str:
    """The same for a structure of a series however often it is exported."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{image.SeriesInstanceUID}/LCTfound/{part.key}').int}"
