"""DICOM SEG: read back by highdicom, bit by bit by hand and, where it is installed, by dcmqi; always by position."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from LCTfoundLib import __version__, cli
from LCTfoundLib.anatomy.structures import STRUCTURES, Side
from LCTfoundLib.case import real_engine
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.export.bundle import ExportOptions, LungExport, export_all
from LCTfoundLib.export.dicom_seg import Making, write_dicom_seg
from LCTfoundLib.export.parts import PARTS, STRUCTURE_PARTS, Part, choose_parts
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_io import read_volume, to_sitk
from Testing.engine.dicom_series import slice_header, write_series
from Testing.engine.export_shapes import lung_volumes, oblique
from Testing.engine.toy_engine import ToyEngine

#: Planes, rows and columns; a frame of the second shape ends within a byte.
EVEN, ODD = (22, 32, 40), (21, 27, 41)


def small_lungs(shape: tuple[int, int, int] = EVEN, direction: np.ndarray | None = None) -> tuple[Volume, ...]:
    """CT, segments and trees."""
    return lung_volumes(shape, (6.0, 5.5, 8.0), direction=direction)


@dataclass(frozen=True)
class Written:
    """A segmentation, what it was made of, and its file."""

    segments: Volume
    trees: Volume
    path: Path
    keys: list[str]
    series: Path

    def mask(self, part: Part) -> np.ndarray:
        labels = self.trees if part.is_tree else self.segments
        return np.isin(labels.array, part.codes)

    @property
    def dataset(self) -> Dataset:
        return pydicom.dcmread(self.path)


def written(
    volumes: tuple[Volume, ...], tmp_path: Path, rng: np.random.Generator | None = None, **options: object
) -> Written:
    ct, segments, trees = volumes
    series, path = write_series(ct, tmp_path / "CT", rng), tmp_path / "segmentation.dcm"
    keys = write_dicom_seg(segments, trees, [series], path, **options)  # type: ignore[arg-type]
    return Written(segments, trees, path, keys, series)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(small_lungs(), tmp_path_factory.mktemp("seg"))


def masks_by_hand(dataset: Dataset, grid: Volume) -> dict[int, np.ndarray]:
    """Mask on ``grid`` by segment number, from the packed bits and the frames' places in space alone."""
    count, rows, columns = dataset.NumberOfFrames, dataset.Rows, dataset.Columns
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    frames = bits[: count * rows * columns].reshape(count, rows, columns)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    along_columns, along_rows = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(
        2, 3
    )
    between_rows, between_columns = (float(x) for x in shared.PixelMeasuresSequence[0].PixelSpacing)
    masks = {int(s.SegmentNumber): np.zeros(grid.shape, bool) for s in dataset.SegmentSequence}
    for frame, groups in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        assert frame.any(), "an empty frame"
        own = groups if "SegmentIdentificationSequence" in groups else shared
        number = int(own.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        row, column = np.nonzero(frame)
        points = corner + np.outer(column, along_columns * between_columns) + np.outer(row, along_rows * between_rows)
        index = grid.index_from_world(points)
        assert index == pytest.approx(np.rint(index), abs=0.01)
        k, j, i = np.rint(index).astype(int).T
        assert not masks[number][k, j, i].any(), "a voxel twice"
        masks[number][k, j, i] = True
    return masks


def assert_masks(result: Written, parts: Iterable[Part]) -> None:
    masks = masks_by_hand(result.dataset, result.segments)
    for number, part in enumerate(parts, start=1):
        assert (masks.pop(number) == result.mask(part)).all(), part.key
    assert not masks


DIRECTIONS = {
    "axial": np.eye(3),
    "from head to feet": np.diag([1.0, 1.0, -1.0]),
    "mirrored": np.diag([-1.0, 1.0, 1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
}


class TestVoxels:
    @pytest.mark.parametrize("shape", [EVEN, ODD])
    @pytest.mark.parametrize("name", [*DIRECTIONS, "oblique", "oblique and mirrored"])
    def test_lie_where_the_labels_are(
        self, name: str, shape: tuple[int, int, int], tmp_path: Path, rng: np.random.Generator
    ) -> None:
        angles = tuple(rng.uniform(-25, 25, 3))
        flips = (-1, 1, 1) if "mirrored" in name else (1, 1, 1)
        direction = DIRECTIONS[name] if name in DIRECTIONS else oblique(angles, flips)
        result = written(small_lungs(shape, direction), tmp_path, rng)
        assert result.keys == [p.key for p in STRUCTURE_PARTS]
        assert_masks(result, STRUCTURE_PARTS)

    def test_are_those_of_a_volume_with_turned_axes(self, tmp_path: Path, rng: np.random.Generator) -> None:
        """As another program may hold the CT: reversed, with other axes first."""
        ct, segments, trees = small_lungs(direction=oblique(tuple(rng.uniform(-10, 10, 3)), (-1, 1, -1)))
        series = write_series(ct, tmp_path / "CT", rng)
        near = [volume.to_canonical() for volume in (segments, trees)]
        assert not near[0].same_grid(segments)
        write_dicom_seg(*near, [series], tmp_path / "a.dcm")
        assert_masks(Written(segments, trees, tmp_path / "a.dcm", [], series), STRUCTURE_PARTS)

    def test_as_highdicom_reads_them(self, tmp_path: Path, rng: np.random.Generator) -> None:
        result = written(small_lungs(direction=oblique(tuple(rng.uniform(-25, 25, 3)))), tmp_path, rng)
        seg = hd.seg.segread(result.path)
        assert seg.number_of_segments == 21 and seg.segmentation_type is hd.seg.SegmentationTypeValues.BINARY
        for number, part in enumerate(STRUCTURE_PARTS, start=1):
            volume = seg.get_volume(segment_numbers=[number], combine_segments=True, allow_missing_positions=True)
            index = np.argwhere(volume.array == number)
            points = volume.map_indices_to_reference(index)
            mask = np.zeros(result.segments.shape, bool)
            mask[tuple(np.rint(result.segments.index_from_world(points)).astype(int).T)] = True
            assert (mask == result.mask(part)).all(), part.key
        for instance, k in (self.image_at(result, k) for k in (8, 12)):
            pixels = seg.get_pixels_by_source_instance([instance], segment_numbers=[19], ignore_spatial_locations=False)
            assert (pixels[0, ..., 0] == (result.trees.array[k] == 1)).all()

    @staticmethod
    def image_at(result: Written, k: int) -> tuple[str, int]:
        """SOP instance UID of the CT image of plane k."""
        place = result.segments.world_from_index(np.array([k, 0, 0]))
        images = [pydicom.dcmread(path) for path in result.series.iterdir()]
        return next(x.SOPInstanceUID for x in images if np.allclose(x.ImagePositionPatient, place, atol=1e-3)), k

    def test_as_dcmqi_reads_them(self, tmp_path: Path, rng: np.random.Generator) -> None:
        tool = shutil.which("segimage2itkimage")
        if tool is None:
            pytest.skip("dcmqi is not installed (pip install dcmqi)")
        result = written(small_lungs(direction=oblique(tuple(rng.uniform(-25, 25, 3)))), tmp_path, rng)
        out = tmp_path / "out"
        out.mkdir()
        command = [tool, "-t", "nrrd", "--inputDICOM", str(result.path), "--outputDirectory", str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        for number, part in enumerate(STRUCTURE_PARTS, start=1):
            image = sitk.ReadImage(str(out / f"{number}.nrrd"))
            resampled = sitk.Resample(image, to_sitk(result.segments), sitk.Transform(), sitk.sitkNearestNeighbor)
            assert ((sitk.GetArrayFromImage(resampled) > 0) == result.mask(part)).all(), part.key
        segments = json.loads((out / "meta.json").read_text())["segmentAttributes"]
        for (entry,), part in zip(segments, STRUCTURE_PARTS, strict=True):
            assert entry["SegmentLabel"] == part.name
            assert entry["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == part.term.type.value
            modifier = entry.get("SegmentedPropertyTypeModifierCodeSequence", {}).get("CodeValue", "")
            assert modifier == part.term.modifier.value
            assert entry["recommendedDisplayRGBValue"] == pytest.approx(part.color, abs=2)

    def test_of_lobes_and_lungs_are_unions(self, tmp_path: Path) -> None:
        keys = ["lungs", "right_upper_lobe", "left_s03", "airway", "left_lung", "right_lung", "left_lower_lobe"]
        parts = choose_parts(keys)
        result = written(small_lungs(ODD), tmp_path, parts=parts)
        assert result.keys == [p.key for p in parts] and set(result.keys) == set(keys)
        assert_masks(result, parts)

    @pytest.mark.parametrize("key", ["airway", "right_middle_lobe"])
    def test_of_a_single_structure(self, key: str, tmp_path: Path) -> None:
        result = written(small_lungs(ODD), tmp_path, parts=choose_parts([key]))
        assert_masks(result, choose_parts([key]))
        assert result.dataset.SegmentsOverlap == "NO"

    def test_of_structures_that_are_absent_take_no_number(self, tmp_path: Path) -> None:
        ct, segments, trees = small_lungs()
        segments.array[segments.array == 4] = 0
        trees.array[trees.array == 3] = 0
        result = written((ct, segments, trees), tmp_path)
        there = [p for p in STRUCTURE_PARTS if p.key not in ("right_s04", "pulmonary_vein")]
        assert result.keys == [p.key for p in there]
        assert_masks(result, there)

    def test_nothing_to_write_is_refused(self, tmp_path: Path) -> None:
        ct, segments, trees = small_lungs()
        empty = segments.with_array(np.zeros_like(segments.array))
        with pytest.raises(UnsuitableImage, match="no empty segmentation"):
            write_dicom_seg(empty, empty, [write_series(ct, tmp_path / "CT")], tmp_path / "a.dcm")


class TestHeader:
    def test_frames_are_numbered_by_segment_and_place(self, usual: Written) -> None:
        frames = usual.dataset.PerFrameFunctionalGroupsSequence
        indices = [tuple(frame.FrameContentSequence[0].DimensionIndexValues) for frame in frames]
        assert indices == sorted(set(indices))
        heights: dict[int, set[float]] = {}
        for (_, place), frame in zip(indices, frames, strict=True):
            heights.setdefault(place, set()).add(float(frame.PlanePositionSequence[0].ImagePositionPatient[2]))
        levels = [height for place in range(1, len(heights) + 1) for height in heights[place]]
        assert len(levels) == len(heights)  # one height for each index
        assert levels in (sorted(levels), sorted(levels, reverse=True))
        assert usual.dataset.NumberOfFrames == len(frames)
        assert usual.dataset.SegmentsOverlap == "YES"

    def test_segments_have_names_codes_sides_colors_and_their_maker(self, usual: Written) -> None:
        for part, item in zip(STRUCTURE_PARTS, usual.dataset.SegmentSequence, strict=True):
            assert item.SegmentLabel == part.name
            kind = item.SegmentedPropertyTypeCodeSequence[0]
            assert (kind.CodeValue, kind.CodingSchemeDesignator) == (part.term.type.value, "SCT")
            assert item.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "123037004"
            sides = [m.CodeValue for m in kind.get("SegmentedPropertyTypeModifierCodeSequence", [])]
            structure = STRUCTURES[int(item.SegmentNumber) - 1]
            expected = {Side.RIGHT: "24028007", Side.LEFT: "7771000", None: ""}[structure.side]
            # A code that holds the side has no modifier; every other segment has that of its side.
            named = "right" in kind.CodeMeaning or "left" in kind.CodeMeaning
            assert sides == ([] if named or not expected else [expected]), part.key
            color = hd.color.CIELabColor.from_dicom_value(item.RecommendedDisplayCIELabValue).to_rgb()
            assert color == pytest.approx(part.color, abs=1)
            assert item.SegmentAlgorithmType == "AUTOMATIC"
            maker = item.SegmentationAlgorithmIdentificationSequence[0]
            assert (maker.AlgorithmName, maker.AlgorithmVersion) == ("LCTfound lung segmentation", __version__)

    def test_lobes_have_their_sides(self, tmp_path: Path) -> None:
        parts = [p for p in PARTS if p.code is None]
        result = written(small_lungs(), tmp_path, parts=parts)
        kinds = [item.SegmentedPropertyTypeCodeSequence[0] for item in result.dataset.SegmentSequence]
        found = {
            key: (kind.CodeValue, *(m.CodeValue for m in kind.get("SegmentedPropertyTypeModifierCodeSequence", [])))
            for key, kind in zip(result.keys, kinds, strict=True)
        }
        assert found == {
            "right_upper_lobe": ("45653009", "24028007"),
            "right_middle_lobe": ("72481006",),
            "right_lower_lobe": ("90572001", "24028007"),
            "left_upper_lobe": ("45653009", "7771000"),
            "left_lower_lobe": ("90572001", "7771000"),
            "right_lung": ("39607008", "24028007"),
            "left_lung": ("39607008", "7771000"),
            "lungs": ("39607008", "51440002"),
        }

    def test_patient_study_and_place_are_those_of_the_ct(self, usual: Written) -> None:
        images = {image.SOPInstanceUID: image for image in map(pydicom.dcmread, usual.series.iterdir())}
        source, seg = next(iter(images.values())), usual.dataset
        same = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"]
        same += ["StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID"]
        for keyword in [*same, "Rows", "Columns"]:
            assert seg[keyword].value == source[keyword].value, keyword
        assert seg.SeriesInstanceUID != source.SeriesInstanceUID and seg.SeriesNumber == 1003
        (series,) = seg.ReferencedSeriesSequence
        assert series.SeriesInstanceUID == source.SeriesInstanceUID
        assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == set(images)
        for frame in seg.PerFrameFunctionalGroupsSequence:
            (origin,) = frame.DerivationImageSequence[0].SourceImageSequence
            place = images[origin.ReferencedSOPInstanceUID].ImagePositionPatient
            assert frame.PlanePositionSequence[0].ImagePositionPatient == place

    def test_it_says_what_it_is_and_that_it_is_for_research(self, usual: Written) -> None:
        seg = usual.dataset
        assert (seg.Modality, seg.SOPClassUID.name) == ("SEG", "Segmentation Storage")
        assert (seg.SegmentationType, seg.BitsAllocated) == ("BINARY", 1)
        assert seg.SeriesDescription == "LCTfound lung segmentation (research use only)"
        assert "Research use only" in seg.ContentDescription and seg.ContentLabel == "LCTFOUND"
        assert (seg.Manufacturer, seg.SoftwareVersions) == ("LCTfound", __version__)
        assert seg.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert usual.path.read_bytes()[128:132] == b"DICM"
        spacing = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
        assert float(spacing) == pytest.approx(8.0)

    def test_edits_weights_and_tracking_are_told(self, tmp_path: Path) -> None:
        making = Making({"weights": {"coarse": {"version": 2, "sha256": "ab12"}, "odd": "?"}}, edited=True)
        first = written(small_lungs(), tmp_path, making=making)
        write_dicom_seg(first.segments, first.trees, [first.series], tmp_path / "again.dcm", making=making)
        again = pydicom.dcmread(tmp_path / "again.dcm")
        assert again.SOPInstanceUID != first.dataset.SOPInstanceUID
        tracked = [item.TrackingUID for item in first.dataset.SegmentSequence]
        assert len(set(tracked)) == 21 and tracked == [item.TrackingUID for item in again.SegmentSequence]
        for item in again.SegmentSequence:
            assert item.SegmentAlgorithmType == "SEMIAUTOMATIC"
            maker = item.SegmentationAlgorithmIdentificationSequence[0]
            assert maker.AlgorithmParameters == "coarse=ab12"
            assert pydicom.uid.UID(item.TrackingUID).is_valid and item.TrackingID.startswith("LCTfound ")

    @pytest.mark.parametrize(
        ("charset", "name"),
        [
            ("ISO_IR 192", "Müller^Jürgen=山田^太郎"),
            (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
            ("ISO_IR 100", "Größe^Élise"),
        ],
    )
    def test_names_in_any_script_arrive(self, charset: str | list[str], name: str, tmp_path: Path) -> None:
        def change(image: Dataset, k: int) -> None:
            image.SpecificCharacterSet, image.PatientName = charset, name

        ct, segments, trees = small_lungs()
        write_dicom_seg(segments, trees, [write_series(ct, tmp_path / "CT", change=change)], tmp_path / "a.dcm")
        assert pydicom.dcmread(tmp_path / "a.dcm").PatientName == name

    def test_what_anonymizers_leave_is_enough(self, tmp_path: Path) -> None:
        def change(image: Dataset, k: int) -> None:
            for keyword in ("PatientName", "PatientID", "StudyID", "StudyTime", "ReferringPhysicianName"):
                del image[keyword]
            del image.AccessionNumber, image.SeriesNumber, image.PositionReferenceIndicator, image.SliceThickness
            image.PatientSex = "X"
            image.add_new("PatientBirthDate", "DA", "00000000")
            image.StudyDate = ""

        ct, segments, trees = small_lungs()
        with pytest.warns(UserWarning, match="DA"):
            series = write_series(ct, tmp_path / "CT", change=change)
        write_dicom_seg(segments, trees, [series], tmp_path / "a.dcm")
        result = Written(segments, trees, tmp_path / "a.dcm", [], series)
        assert_masks(result, STRUCTURE_PARTS)
        empty = [
            result.dataset[keyword].value for keyword in ("PatientName", "PatientSex", "PatientBirthDate", "StudyID")
        ]
        assert not any(empty)


class TestSource:
    def test_files_in_any_order_beside_other_series(self, tmp_path: Path, rng: np.random.Generator) -> None:
        ct, segments, trees = small_lungs()
        folder = write_series(ct, tmp_path / "CT", rng)
        files = list(rng.permutation(sorted(folder.iterdir())))
        other = Volume(ct.array[:12], ct.spacing, (0.0, 0.0, 900.0), ct.direction)
        write_series(other, folder, rng)
        for name, places in (("files", files), ("folder", [folder])):
            path = tmp_path / f"{name}.dcm"
            write_dicom_seg(segments, trees, places, path)
            assert_masks(Written(segments, trees, path, [], folder), STRUCTURE_PARTS)

    def test_directions_that_differ_in_the_last_digits(self, tmp_path: Path, rng: np.random.Generator) -> None:
        def change(image: Dataset, k: int) -> None:
            image.ImageOrientationPatient = [x + (k % 3) * 1e-6 for x in image.ImageOrientationPatient]

        ct, segments, trees = small_lungs(direction=oblique(tuple(rng.uniform(-10, 10, 3))))
        series = write_series(ct, tmp_path / "CT", rng, change)
        write_dicom_seg(segments, trees, [series], tmp_path / "a.dcm")
        assert_masks(Written(segments, trees, tmp_path / "a.dcm", [], series), STRUCTURE_PARTS)

    @pytest.mark.parametrize("backwards", [False, True])
    def test_a_multi_frame_file(self, backwards: bool, tmp_path: Path) -> None:
        ct, segments, trees = small_lungs(ODD, oblique((5, 10, -15)))
        path = write_enhanced(ct, tmp_path / "enhanced.dcm", backwards)
        assert read_volume(path).same_grid(ct)
        write_dicom_seg(segments, trees, [path], tmp_path / "a.dcm")
        assert_masks(Written(segments, trees, tmp_path / "a.dcm", [], path), STRUCTURE_PARTS)
        frame = pydicom.dcmread(tmp_path / "a.dcm").PerFrameFunctionalGroupsSequence[0]
        assert frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber > 0

    @pytest.mark.parametrize(
        "moved",
        [
            lambda v: v.crop((1, 0, 0), v.shape),
            lambda v: Volume(v.array, v.spacing, tuple(np.add(v.origin, (0, 0, 3))), v.direction),
            lambda v: Volume(v.array, (6.0, 5.5, 7.9), v.origin, v.direction),
            lambda v: v.resample((3.0, 5.5, 8.0)),
        ],
    )
    def test_labels_that_lie_elsewhere_are_refused(self, moved: Callable[[Volume], Volume], tmp_path: Path) -> None:
        ct, segments, trees = small_lungs()
        series = write_series(ct, tmp_path / "CT")
        with pytest.raises(
            UnsuitableImage, match="do not lie on the voxels of the DICOM series .*; segment the series"
        ):
            write_dicom_seg(moved(segments), moved(trees), [series], tmp_path / "a.dcm")
        assert not (tmp_path / "a.dcm").exists()

    def test_a_straightened_or_interpolated_series_is_refused(self, tmp_path: Path) -> None:
        def tilt(image: Dataset, k: int) -> None:
            x, y, z = image.ImagePositionPatient
            image.ImagePositionPatient = [x, float(y) + 2.0 * k, z]

        def gap(image: Dataset, k: int) -> None:
            x, y, z = image.ImagePositionPatient
            image.ImagePositionPatient = [x, y, float(z) + (3.0 if k > 9 else 0.0)]

        ct, _, _ = small_lungs()
        for name, change in (("tilt", tilt), ("gap", gap)):
            folder = write_series(ct, tmp_path / name, change=change)
            labels = read_volume(folder)
            labels = labels.with_array((labels.array < -500).astype(np.uint8))
            with pytest.raises(UnsuitableImage, match="straightened or interpolated.*; export another format"):
                write_dicom_seg(labels, labels, [folder], tmp_path / "a.dcm")

    def test_a_series_without_its_identifiers_is_refused(self, tmp_path: Path) -> None:
        def change(image: Dataset, k: int) -> None:
            del image.StudyInstanceUID

        ct, segments, trees = small_lungs()
        series = write_series(ct, tmp_path / "CT", change=change)
        with pytest.raises(UnsuitableImage, match="have no StudyInstanceUID; export .seg.nrrd"):
            write_dicom_seg(segments, trees, [series], tmp_path / "a.dcm")


def write_enhanced(ct: Volume, path: Path, backwards: bool) -> Path:
    """All planes as the frames of one enhanced CT image."""
    image = slice_header(ct, 0, generate_uid())
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, orientation, measures, values = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = image.ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = image.PixelSpacing, ct.spacing[2]
    values.RescaleSlope, values.RescaleIntercept = 1, 0
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([values])
    for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "RescaleSlope"):
        del image[keyword]
    order = range(ct.shape[0])[:: -1 if backwards else 1]
    frames = []
    for k in order:
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = np.round(ct.world_from_index(np.array([k, 0, 0])), 6).tolist()
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    image.PerFrameFunctionalGroupsSequence = Sequence(frames)
    image.NumberOfFrames = len(frames)
    image.PixelData = np.ascontiguousarray(ct.array[list(order)]).astype("<i2").tobytes()
    image.save_as(path, enforce_file_format=True)
    return path


class TestExport:
    def export(self, volumes: tuple[Volume, ...], **changes: object) -> LungExport:
        ct, segments, trees = volumes
        return LungExport("case", segments, trees, ct, **changes)  # type: ignore[arg-type]

    def test_a_dicom_source_gets_its_segmentation(self, tmp_path: Path) -> None:
        volumes = small_lungs()
        source = write_series(volumes[0], tmp_path / "CT")
        options = ExportOptions.parse(
            {"formats": ["dicom-seg"], "source_dicom": [str(source)], "structures": ["lungs"]}
        )
        export_all(self.export(volumes, edited=True), tmp_path / "out", options)
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert [entry["path"] for entry in manifest["files"]] == ["segmentation.dcm"]
        assert manifest["export"]["not_written"] == {} and manifest["edited_by_hand"]
        seg = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
        assert [item.SegmentLabel for item in seg.SegmentSequence] == ["Both lungs"]
        assert seg.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"

    def test_without_a_dicom_source_asking_for_it_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UnsuitableImage, match="needs the DICOM series that the CT was read from; export .seg.nrrd"):
            export_all(self.export(small_lungs()), tmp_path / "out", ExportOptions.parse({"formats": ["dicom-seg"]}))
        assert not (tmp_path / "out").exists()

    def test_without_a_dicom_source_all_formats_leave_it_out_and_say_so(self, tmp_path: Path) -> None:
        export_all(self.export(small_lungs()), tmp_path / "out")
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert "needs the DICOM series" in manifest["export"]["not_written"]["dicom-seg"]
        assert "dicom-seg" not in manifest["export"]["formats"] and "stl" in manifest["export"]["formats"]
        assert not (tmp_path / "out" / "segmentation.dcm").exists()

    def test_the_shell_writes_it_for_a_dicom_folder(
        self, simple_chest: Volume, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        real, toy = real_engine(), ToyEngine()

        def segment(ct: Volume, options: object, progress: object) -> object:
            result = toy_result(ct)
            return result

        engine = replace(toy.engine(), read=real.read, segment=segment, export=real.export)
        folder = write_series(simple_chest, tmp_path / "CT", rng)
        arguments = ["segment-lungs", str(folder), str(tmp_path / "out"), "--format", "dicom-seg,stl"]
        choices = ["--structures", "right_lung,airway", "--frame", "RAS", "--single-file", "--triangles", "4000"]
        assert cli.main(arguments + choices, engine) == 0
        seg = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
        masks = masks_by_hand(seg, simple_chest)
        expected = toy_result(read_volume(folder))
        assert [item.SegmentLabel for item in seg.SegmentSequence] == ["Airway", "Right lung"]
        assert (masks[1] == (expected.trees.array == 1)).all() and (masks[2] == (expected.segments.array == 1)).all()
        assert (tmp_path / "out" / "models" / "lungs.stl").read_bytes().startswith(b"SPACE=RAS")

    def test_the_shell_refuses_before_the_long_work_what_cannot_be_written(
        self, simple_chest: Volume, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from Testing.engine.toy_engine import write_ct

        toy = ToyEngine()
        source = write_ct(simple_chest, tmp_path / "ct.nii.gz")
        arguments = ["segment-lungs", str(source), str(tmp_path / "out"), "--format", "dicom-seg"]
        assert cli.main(arguments, toy.engine()) == 2
        assert "DICOM SEG needs the DICOM series" in capsys.readouterr().err
        assert toy.segmented == []


def toy_result(ct: Volume) -> object:
    from types import SimpleNamespace

    from Testing.engine.toy_engine import lungs_by_threshold

    result = lungs_by_threshold(ct)
    return SimpleNamespace(**vars(result) | {"findings": [], "provenance": {}})
