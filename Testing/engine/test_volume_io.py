"""Reading what hospitals send, refusing with a remedy what cannot be used, writing whole files or none."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from LCTfoundLib import volume_io
from LCTfoundLib.errors import Cancelled, OutputError, UnsuitableImage
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_io import check_ct, read_ct, read_volume, to_sitk, warnings_of, write_volume

PATIENT = "Mustermann^Erika"


@pytest.fixture(scope="module", name="simple_chest")
def chest_in_12_bits(simple_chest) -> Volume:
    """As scanners store it: nothing below -1024."""
    return simple_chest.with_array(np.maximum(simple_chest.array, -1024))


@pytest.fixture(scope="module")
def chest(simple_chest) -> Volume:
    """Every second slice of it."""
    return Volume(simple_chest.array[::2], (4.0, 4.0, 8.0), simple_chest.origin, np.eye(3), {"Modality": "CT"})


def one_slice(ct: Volume, k: int, series: str, slope: float = 1.0, intercept: float = -1024.0) -> FileDataset:
    """Slice ``k`` as a CT image of the usual kind."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.Modality, image.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.PatientName, image.PatientID = PATIENT, "4711-0815"
    image.SeriesInstanceUID, image.FrameOfReferenceUID = series, series[:-2]
    image.SeriesNumber, image.SeriesDescription, image.BodyPartExamined = 3, "Thorax 8mm", "CHEST"
    image.InstanceNumber = k + 1
    image.ImageOrientationPatient = ct.direction[:, :2].T.ravel().tolist()
    image.ImagePositionPatient = ct.world_from_index(np.array([k, 0, 0])).tolist()
    image.PixelSpacing = [ct.spacing[1], ct.spacing[0]]
    image.Rows, image.Columns = ct.shape[1:]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    image.RescaleSlope, image.RescaleIntercept = slope, intercept
    image.PixelData = np.rint((ct.array[k] - intercept) / slope).astype(np.uint16).tobytes()
    return image


def series_of(ct: Volume, **kinds) -> list[FileDataset]:
    series = generate_uid()
    return [one_slice(ct, k, series, **kinds) for k in range(ct.shape[0])]


def save(images: list[FileDataset], folder: Path, order: np.random.Generator | None = None) -> Path:
    """Write the images under names that tell nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(len(images)) if order is None else order.permutation(len(images))
    start = len(list(folder.iterdir()))
    for number, image in zip(numbers, images, strict=True):
        image.save_as(folder / f"IM{start + number:04d}", enforce_file_format=True)
    return folder


def assert_same(a: Volume, b: Volume, tolerance: float = 0) -> None:
    assert a.same_grid(b)
    assert np.abs(a.array.astype(int) - b.array.astype(int)).max() <= tolerance


def refused(source: Path | Callable[[], object], *words: str) -> str:
    """The message of the refusal: one sentence with a remedy."""
    with pytest.raises(UnsuitableImage) as caught:
        read_volume(source) if isinstance(source, Path) else source()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert message.endswith(".") and "\n" not in message
    assert ";" in message or ":" in message, "names no remedy"
    return message


class TestDicomFolder:
    def test_a_shuffled_series_comes_out_sorted(self, chest, tmp_path, rng):
        ct = read_volume(save(series_of(chest), tmp_path / "CT", rng))
        assert_same(ct, chest)
        assert ct.array.dtype == np.int16
        assert not warnings_of(ct)
        assert ct.metadata["Series"] == "3 Thorax 8mm"

    @pytest.mark.parametrize("trial", range(4))
    def test_any_orientation_agrees_with_simpleitk(self, trial, chest, tmp_path, rng):
        rotation = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix()
        turned = Volume(chest.array, chest.spacing, chest.origin, rotation)
        folder = save(series_of(turned), tmp_path / "CT", rng)
        ct = read_volume(folder)
        assert_same(ct, turned)
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        assert_same(ct, volume_io.from_sitk(sitk.ReadImage(names)))

    def test_every_slice_has_its_own_rescale(self, chest, tmp_path, rng):
        series = generate_uid()
        slopes = rng.uniform(0.5, 1.5, chest.shape[0])
        images = [one_slice(chest, k, series, float(round(s, 6)), -1024.5) for k, s in enumerate(slopes)]
        assert_same(read_volume(save(images, tmp_path)), chest, tolerance=1)

    def test_nested_folders_and_other_files(self, chest, tmp_path, rng):
        images = series_of(chest)
        save(images[:10], tmp_path / "Größe 肺" / "a")
        save(images[10:], tmp_path / "Größe 肺" / "b" / "c")
        (tmp_path / "Größe 肺" / "readme.txt").write_text("not an image")
        (tmp_path / "Größe 肺" / "DICOMDIR").write_bytes(b"\0" * 500)
        (tmp_path / "Größe 肺" / "noise.dcm").write_bytes(rng.bytes(5000))
        (tmp_path / "Größe 肺" / "marked").write_bytes(b"\0" * 128 + b"DICM" + rng.bytes(5000))
        (tmp_path / "Größe 肺" / ".hidden").write_bytes(b"x")
        assert_same(read_volume(tmp_path), chest)

    def test_files_without_preamble(self, chest, tmp_path):
        for k, image in enumerate(series_of(chest)):
            pydicom.dcmwrite(tmp_path / f"{k}.dcm", Dataset(image), implicit_vr=True, little_endian=True)
            content = (tmp_path / f"{k}.dcm").read_bytes()
            assert content[128:132] != b"DICM"
        assert_same(read_volume(tmp_path), chest)

    @pytest.mark.parametrize("syntax", [RLELossless, JPEG2000])
    def test_compressed_slices(self, syntax, chest, tmp_path):
        """pydicom brings RLE; for JPEG 2000 SimpleITK writes the file and decodes it."""
        if syntax == RLELossless:
            images = series_of(chest)
            for image in images:
                image.compress(RLELossless)
            folder = save(images, tmp_path / "CT")
        else:
            folder = save(series_of(chest), tmp_path / "CT")
            for path in folder.iterdir():
                self.compress_with_sitk(path)
        assert_same(read_volume(folder), chest)

    @staticmethod
    def compress_with_sitk(path: Path) -> None:
        image = sitk.Cast(sitk.ReadImage(str(path), imageIO="GDCMImageIO"), sitk.sitkInt16)
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        packed_path = str(path) + ".dcm"
        writer = sitk.ImageFileWriter()
        writer.SetFileName(packed_path)
        writer.SetCompressor("JPEG2000")
        writer.UseCompressionOn()
        writer.Execute(image)
        original, packed = pydicom.dcmread(path), pydicom.dcmread(packed_path)
        os.remove(packed_path)
        assert packed.file_meta.TransferSyntaxUID.is_compressed
        geometry = ("ImagePositionPatient", "ImageOrientationPatient", "SeriesInstanceUID", "FrameOfReferenceUID")
        for keyword in (*geometry, "Modality", "PixelSpacing", "ImageType"):
            packed[keyword] = original[keyword]
        packed.save_as(path, enforce_file_format=True)

    def test_progress_and_cancel(self, chest, tmp_path):
        folder = save(series_of(chest), tmp_path)
        fractions: list[float] = []
        read_volume(folder, Progress(lambda report: fractions.append(report.fraction)))
        assert fractions == sorted(fractions) and fractions[-1] == 1.0
        token = CancelToken()
        token.cancel()
        with pytest.raises(Cancelled):
            read_volume(folder, Progress(cancel=token))

    def test_nothing_tells_the_patient(self, chest, tmp_path):
        images = series_of(chest)
        for image in images:
            image.SeriesDescription = "Thorax mustermann"
            image.ConvolutionKernel = "4711-0815"
        told = " ".join(read_volume(save(images, tmp_path)).metadata.values()).lower()
        for secret in ("mustermann", "erika", "4711"):
            assert secret not in told


class TestSeriesChoice:
    def test_the_chest_ct_among_others(self, chest, tmp_path, rng):
        save(series_of(chest), tmp_path, rng)
        scout, report, abdomen = series_of(chest), series_of(chest)[0], series_of(chest)
        for image in scout:
            image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        save(scout[:2], tmp_path)
        report.Modality = "SR"
        del report.PixelData, report.Rows
        save([report], tmp_path)
        for image in abdomen:
            image.BodyPartExamined, image.SeriesDescription = "ABDOMEN", "abd"
            image.PixelData = b"\0" * len(image.PixelData)
        save(abdomen, tmp_path)
        coronal = Volume(chest.array, chest.spacing, chest.origin, np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]]))
        save(series_of(coronal), tmp_path)
        ct = read_volume(tmp_path)
        assert_same(ct, chest)
        assert ct.metadata["OtherSeries"] == "2"

    def test_the_series_with_more_slices(self, chest, simple_chest, tmp_path):
        save(series_of(chest), tmp_path / "thick")
        save(series_of(simple_chest), tmp_path / "thin")
        assert_same(read_volume(tmp_path), simple_chest)

    def test_two_scans_of_one_place_in_a_series(self, chest, tmp_path):
        images = series_of(chest)
        later = [one_slice(chest, k, images[0].SeriesInstanceUID) for k in range(chest.shape[0] - 3)]
        for number, scan in enumerate((images, later)):
            for image in scan:
                image.AcquisitionNumber = number + 1
        for image in later:
            image.PixelData = b"\7" * len(image.PixelData)
        ct = read_volume(save(images + later, tmp_path))
        assert_same(ct, chest)
        assert "2 scans" in warnings_of(ct)[0]

    def test_no_ct(self, chest, tmp_path):
        images = series_of(chest)
        for image in images:
            image.Modality = "MR"
        refused(save(images, tmp_path), "MR images but no CT", "chest CT")

    def test_only_scout_views(self, chest, tmp_path):
        images = series_of(chest)[:2]
        for image in images:
            image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        refused(save(images, tmp_path), "scout")

    def test_an_empty_folder(self, tmp_path):
        refused(tmp_path, "no DICOM images")

    def test_images_without_position(self, chest, tmp_path):
        images = series_of(chest)
        for image in images:
            del image.ImagePositionPatient
        refused(save(images, tmp_path), "no position")


class TestSliceGeometry:
    def test_one_slice(self, chest, tmp_path):
        folder = save(series_of(chest)[:1], tmp_path)
        refused(folder, "single slice", "all slices")
        refused(next(folder.iterdir()), "single slice")

    def test_a_wide_gap_is_refused(self, chest, tmp_path, rng):
        images = series_of(chest)
        missing = int(rng.integers(1, len(images) - 2))
        z = [chest.origin[2] + 8 * k for k in (missing - 1, missing + 1)]
        message = refused(save(images[:missing] + images[missing + 1 :], tmp_path, rng), "About 1 slices are missing")
        assert f"between z = {z[0]:.1f} and {z[1]:.1f} mm" in message

    def test_a_narrow_gap_is_closed_with_a_warning(self, simple_chest, tmp_path):
        thin = Volume(simple_chest.array, (4.0, 4.0, 2.5), simple_chest.origin)
        images = series_of(thin)
        ct = read_volume(save(images[:7] + images[8:], tmp_path))
        assert ct.same_grid(thin)
        assert "interpolated" in warnings_of(ct)[0]
        expected = thin.array.astype(int)
        expected[7] = np.rint((expected[6] + expected[8]) / 2)
        assert np.abs(ct.array - expected).max() <= 1

    def test_uneven_spacing_is_made_even(self, simple_chest, tmp_path):
        """The upper half in 2.5 mm, the lower in 5 mm, of a volume that rises evenly."""
        k = np.indices((60, 64, 88))[0]
        thin = Volume((10 * k - 500).astype(np.int16), (4.0, 4.0, 2.5))
        images = series_of(thin)
        ct = read_volume(save(images[:20:2] + images[20:], tmp_path))
        assert_same(ct, thin, tolerance=1)

    def test_small_jitter_is_not_a_gap(self, chest, tmp_path, rng):
        images = series_of(chest)
        for image in images[1:-1]:
            image.ImagePositionPatient[2] += float(rng.uniform(-0.3, 0.3))
        ct = read_volume(save(images, tmp_path))
        assert_same(ct, chest)
        assert not warnings_of(ct)

    def test_a_copied_slice_is_left_out(self, chest, tmp_path, rng):
        images = series_of(chest)
        ct = read_volume(save([*images, images[5]], tmp_path, rng))
        assert_same(ct, chest)
        assert "1 slices were there twice" in warnings_of(ct)[0]

    def test_two_different_slices_at_one_place(self, chest, tmp_path):
        images = series_of(chest)
        other = one_slice(chest, 5, images[0].SeriesInstanceUID)
        other.PixelData = images[20].PixelData
        refused(save([*images, other], tmp_path), "different images at the same place", "remove")

    @pytest.mark.parametrize("degrees", [-18.0, 12.0])
    def test_a_tilted_gantry_is_straightened(self, degrees, simple_chest, tmp_path):
        """Slices turned about x while the table moves along z, of a ball: it must stay one, at its place."""
        rotation = Rotation.from_euler("x", degrees, degrees=True).as_matrix()
        radius, center = 60.0, rotation @ (117.0, 132.0, 0) + (-110, -135, 91)  # about the middle of the stack
        images, series = [], generate_uid()
        for k in range(60):
            plane = Volume(np.zeros((1, 90, 80), np.int16), (3.0, 3.0, 3.0), (-110, -135, 3.0 * k), rotation)
            world = plane.world_from_index(np.moveaxis(np.indices(plane.shape), 0, -1))
            plane.array[np.linalg.norm(world - center, axis=-1) < radius] = 500
            images.append(one_slice(plane, 0, series))
        ct = read_volume(save(images, tmp_path))
        assert f"tilted by {abs(degrees):.1f} degrees" in warnings_of(ct)[0]
        np.testing.assert_allclose(ct.direction, rotation, atol=1e-6)
        assert ct.spacing[2] == pytest.approx(3 * np.cos(np.deg2rad(degrees)), rel=1e-6)
        index = np.argwhere(ct.array > 250)
        np.testing.assert_allclose(ct.world_from_index(index).mean(axis=0), center, atol=0.3)
        distances = np.linalg.norm(ct.world_from_index(index) - center, axis=1)
        assert distances.max() < radius + 2.6
        assert len(index) * ct.voxel_ml == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.01)

    def test_slices_shifted_at_random_are_refused(self, chest, tmp_path, rng):
        images = series_of(chest)
        for image in images:
            image.ImagePositionPatient[0] += float(rng.uniform(-20, 20))
        refused(save(images, tmp_path), "shifted", "export")

    @pytest.mark.parametrize(
        ("keyword", "value", "what"),
        [
            ("PixelSpacing", [2.0, 2.0], "pixel spacing"),
            ("ImageOrientationPatient", [0, 1, 0, 1, 0, 0], "orientation"),
            ("FrameOfReferenceUID", "1.2.3", "frame of reference"),
        ],
    )
    def test_a_mixed_series(self, keyword, value, what, chest, tmp_path):
        images = series_of(chest)
        for image in images[:10]:
            setattr(image, keyword, value)
        refused(save(images, tmp_path), f"different {what}", "folder of their own")

    def test_mixed_sizes(self, chest, tmp_path):
        images = series_of(chest)
        small = Volume(np.ascontiguousarray(chest.array[:, ::2, ::2]), chest.spacing, chest.origin)
        images[:9] = [one_slice(small, k, images[0].SeriesInstanceUID) for k in range(9)]
        refused(save(images, tmp_path), "different size")

    def test_a_single_stray_image_is_left_out(self, simple_chest, tmp_path):
        images = series_of(simple_chest)
        stray = one_slice(simple_chest, 3, images[0].SeriesInstanceUID)
        stray.PixelSpacing = [1.0, 1.0]
        ct = read_volume(save([*images, stray], tmp_path))
        assert_same(ct, simple_chest)
        assert "left out" in warnings_of(ct)[0]


class TestPixels:
    def test_padding_becomes_air(self, chest, tmp_path):
        images = series_of(chest)
        for image in images:
            pixels = np.frombuffer(image.PixelData, np.uint16).reshape(image.Rows, image.Columns).copy()
            pixels[:4, :4] = 63536
            image.PixelData, image.PixelPaddingValue = pixels.tobytes(), 63536
        ct = read_volume(save(images, tmp_path))
        assert (ct.array[:, :4, :4] == -1024).all()
        np.testing.assert_array_equal(ct.array[:, 4:], chest.array[:, 4:])

    def test_a_wrong_padding_value_does_not_erase_tissue(self, chest, tmp_path):
        images = series_of(chest)
        for image in images:
            image.PixelPaddingValue = 1024 + 40
        assert_same(read_volume(save(images, tmp_path)), chest)

    def test_truncated_pixels_are_refused(self, chest, tmp_path):
        folder = save(series_of(chest), tmp_path)
        victim = sorted(folder.iterdir())[3]
        victim.write_bytes(victim.read_bytes()[:-3000])
        refused(folder, victim.name, "export")

    def test_broken_headers_do_not_crash(self, chest, tmp_path, rng):
        """Random bytes over the header: the slice is either read or missing, nothing else happens."""
        folder = save(series_of(chest), tmp_path)
        for path in folder.iterdir():
            content = bytearray(path.read_bytes())
            for place in rng.integers(132, 1200, 12):
                content[place] = int(rng.integers(256))
            path.write_bytes(bytes(content))
        try:
            read_volume(folder)
        except UnsuitableImage:
            pass

    def test_deflated_files_are_not_opened(self, chest, tmp_path):
        images = series_of(chest)
        for image in images:
            image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        refused(save(images, tmp_path), "no DICOM images")

    def test_an_impossible_size_asks_for_no_memory(self, chest, tmp_path):
        images = series_of(chest)
        for image in images:
            image.Rows = image.Columns = 65535
        refused(save(images, tmp_path), "no DICOM images")


def enhanced(ct: Volume) -> FileDataset:
    """The whole CT in one multi-frame file, frames in reverse."""
    image = one_slice(ct, 0, generate_uid())
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(image, keyword)
    del image.RescaleIntercept

    def macro(**values: object) -> Sequence:
        item = Dataset()
        for keyword, value in values.items():
            setattr(item, keyword, value)
        return Sequence([item])

    order = range(ct.shape[0])[::-1]
    shared = Dataset()
    shared.PixelMeasuresSequence = macro(PixelSpacing=[ct.spacing[1], ct.spacing[0]])
    shared.PlaneOrientationSequence = macro(ImageOrientationPatient=ct.direction[:, :2].T.ravel().tolist())
    shared.PixelValueTransformationSequence = macro(RescaleSlope=1, RescaleIntercept=-1024)
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for k in order:
        frame = Dataset()
        position = ct.world_from_index(np.array([k, 0, 0])).tolist()
        frame.PlanePositionSequence = macro(ImagePositionPatient=position)
        frames.append(frame)
    image.PerFrameFunctionalGroupsSequence = Sequence(frames)
    image.NumberOfFrames = len(frames)
    image.PixelData = (ct.array[list(order)] + 1024).astype(np.uint16).tobytes()
    return image


class TestEnhanced:
    def test_a_multi_frame_file_and_its_folder(self, chest, tmp_path):
        folder = save([enhanced(chest)], tmp_path)
        assert_same(read_volume(folder), chest)
        assert_same(read_volume(next(folder.iterdir())), chest)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
    @pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, bool])
    def test_round_trip(self, suffix, dtype, tmp_path, rng):
        rotation = Rotation.random(random_state=int(rng.integers(2**31))).as_matrix()
        array = rng.integers(0, 2 if dtype is bool else 100, (5, 6, 7)).astype(dtype)
        volume = Volume(array, (0.7, 0.8, 2.5), (-100.5, 20.25, 1000.0), rotation)
        path = tmp_path / "Größe 肺" / f"ct{suffix}"
        write_volume(volume, path)
        back = read_volume(path)
        np.testing.assert_array_equal(back.array, array)
        assert back.array.dtype == (np.uint8 if dtype is bool else dtype)
        assert back.same_grid(volume)
        assert not warnings_of(back)
        assert os.listdir(path.parent) == [path.name]

    def test_the_format_is_seen_without_a_suffix(self, tmp_path, rng):
        volume = Volume(rng.integers(0, 9, (4, 5, 6)).astype(np.int16))
        for suffix in (".nrrd", ".mha"):
            write_volume(volume, tmp_path / f"a{suffix}")
            (tmp_path / f"a{suffix}").rename(tmp_path / "plain")
            np.testing.assert_array_equal(read_volume(tmp_path / "plain").array, volume.array)

    def test_a_label_map_of_slicer(self, tmp_path, rng):
        labels = Volume(rng.integers(0, 22, (6, 7, 8)).astype(np.uint8), (1, 1, 2))
        write_volume(labels, tmp_path / "a.seg.nrrd")
        np.testing.assert_array_equal(read_volume(tmp_path / "a.seg.nrrd").array, labels.array)

    def test_double_precision_is_not_kept(self, tmp_path):
        sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 5, 6), 1.5)), str(tmp_path / "a.nii"))
        assert read_volume(tmp_path / "a.nii").array.dtype == np.float32

    def test_one_time_point_is_a_volume_more_are_not(self, tmp_path, rng):
        array = rng.integers(0, 9, (2, 4, 5, 6)).astype(np.int16)
        four = sitk.JoinSeries([sitk.GetImageFromArray(part) for part in array])
        sitk.WriteImage(four[:, :, :, :1], str(tmp_path / "one.nii"))
        np.testing.assert_array_equal(read_volume(tmp_path / "one.nii").array, array[0])
        sitk.WriteImage(four, str(tmp_path / "two.nrrd"))
        refused(tmp_path / "two.nrrd", "export one volume")

    def test_color_images(self, tmp_path):
        image = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
        sitk.WriteImage(image, str(tmp_path / "a.mha"))
        refused(tmp_path / "a.mha", "several values")

    @pytest.mark.parametrize("shape", [(6, 7), (1, 6, 7)])
    def test_a_single_slice(self, shape, tmp_path):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros(shape, np.int16)), str(tmp_path / "a.nii"))
        refused(tmp_path / "a.nii", "single slice")

    def test_damaged_files(self, tmp_path, rng):
        volume = Volume(rng.integers(0, 999, (20, 20, 20)).astype(np.int16))
        for name in ("a.nrrd", "a.mha"):
            write_volume(volume, tmp_path / name)
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-4000])
            refused(tmp_path / name, "damaged")
        for name in ("b.nii", "b.nii.gz", "b.nrrd", "b.mha"):
            (tmp_path / name).write_bytes(rng.bytes(1000))
            refused(tmp_path / name, "damaged")

    def test_a_header_that_claims_terabytes(self, tmp_path):
        header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 30000 30000 30000\nencoding: raw\nendian: little\n\n"
        (tmp_path / "a.nrrd").write_text(header)
        refused(tmp_path / "a.nrrd", "crop it")

    def test_other_files_and_no_file(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG")
        refused(tmp_path / "a.png", "unknown format", "NIfTI")
        refused(tmp_path / "b.nii", "check the path")
        (tmp_path / "c.dcm").write_bytes(b"nothing")
        refused(tmp_path / "c.dcm", "no DICOM")

    def test_a_file_without_orientation_warns(self, tmp_path):
        plain = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 3 4\nencoding: raw\n\n" + "0" * 24
        (tmp_path / "a.nrrd").write_text(plain)
        assert "left and right" in warnings_of(read_volume(tmp_path / "a.nrrd"))[0]

    def test_nothing_of_a_header_but_its_geometry_is_kept(self, tmp_path):
        image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
        image.SetMetaData("PatientName", PATIENT)
        sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
        assert PATIENT not in str(read_volume(tmp_path / "a.nrrd").metadata)

    def test_names_on_systems_that_want_ascii(self, tmp_path, monkeypatch, rng):
        monkeypatch.setattr(volume_io, "_ASCII_NAMES_ONLY", True)
        seen = []
        real = sitk.WriteImage
        monkeypatch.setattr(sitk, "WriteImage", lambda image, name, **k: (seen.append(name), real(image, name, **k)))
        volume = Volume(rng.integers(0, 9, (4, 5, 6)).astype(np.int16))
        path = tmp_path / "肺.nii.gz"
        write_volume(volume, path)
        np.testing.assert_array_equal(read_volume(path).array, volume.array)
        assert seen[0].isascii()
        assert os.listdir(tmp_path) == [path.name]


class TestWritingFails:
    def test_an_unknown_suffix(self, chest, tmp_path):
        for name in ("a.png", "a.mhd", "a"):
            with pytest.raises(OutputError, match="suffix"):
                write_volume(chest, tmp_path / name)

    def test_a_place_that_cannot_be_written(self, chest, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="another output place"):
            write_volume(chest, tmp_path / "file" / "a.nii.gz")

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place that not even root can write")
    def test_a_place_of_the_system(self, chest):
        with pytest.raises(OutputError, match="another output place"):
            write_volume(chest, Path("/proc/a.nii.gz"))

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_folder(self, chest, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(OutputError, match="another output place"):
            write_volume(chest, tmp_path / "a.nii.gz")

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
    def test_a_full_disk_leaves_the_old_file(self, suffix, tmp_path, rng):
        """A limit on file sizes fails like a full disk does."""
        resource = pytest.importorskip("resource")
        old = Volume(np.zeros((3, 3, 3), np.int16))
        path = tmp_path / f"a{suffix}"
        write_volume(old, path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
        try:
            with pytest.raises(OutputError, match="full"):
                write_volume(Volume(rng.integers(-999, 999, (60, 60, 60)).astype(np.int16)), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        np.testing.assert_array_equal(read_volume(path).array, old.array)
        assert os.listdir(tmp_path) == [path.name]


class TestCheckCt:
    def test_a_good_ct_passes_unchanged(self, simple_chest):
        checked = check_ct(simple_chest)
        np.testing.assert_array_equal(checked.array, np.maximum(simple_chest.array, -1024))
        assert not warnings_of(checked)
        assert checked.same_grid(simple_chest)

    @pytest.mark.parametrize("value", [-2048, -3024, -32768])
    @pytest.mark.parametrize("dtype", [np.int16, np.float32])
    def test_padding_becomes_air(self, value, dtype, simple_chest):
        array = simple_chest.array.astype(dtype)
        array[:, :5] = value
        checked = check_ct(simple_chest.with_array(array))
        assert checked.array.min() == -1024
        assert checked.array.dtype == np.int16
        assert (array[:, :5] == value).all(), "the input was changed"

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_values_stored_1024_too_high_are_corrected(self, dtype, simple_chest):
        array = np.maximum(simple_chest.array + 1024, 0).astype(dtype)
        checked = check_ct(simple_chest.with_array(array))
        np.testing.assert_array_equal(checked.array, np.maximum(simple_chest.array, -1024))
        assert "1024" in warnings_of(checked)[0]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda hu: (hu + 1024) / 4096, "normalized"),
            (lambda hu: np.clip((hu + 1000) / 1400, 0, 1) * 2 - 1, "normalized"),
            (lambda hu: np.clip((hu + 1000) / 1400 * 255, 0, 255).astype(np.uint8), "8-bit"),
            (lambda hu: (hu + 500) / 400, "standardized"),
            (lambda hu: np.clip(hu, -160, 240), "hold no air"),
            (lambda hu: hu * 0 + 7, "all 7"),
        ],
    )
    def test_other_scales_are_refused(self, change, words, simple_chest):
        other = simple_chest.with_array(change(simple_chest.array.astype(np.float32)))
        refused(lambda: check_ct(other), words, "original CT series")

    @pytest.mark.parametrize("trial", range(6))
    def test_mr_images_are_refused(self, trial, simple_chest, rng):
        """Dark lungs and background, tissue of any brightness, an uneven field, Rician noise."""
        tissue = rng.uniform(150, 2000)
        signal = np.where(simple_chest.array > -500, tissue, 0.05 * tissue) * rng.uniform(0.9, 1.1)
        field = 1 + 0.4 * np.sin(np.linspace(0, 3, simple_chest.shape[2]) + rng.uniform(0, 6))
        noise = rng.normal(0, 0.03 * tissue, (2, *simple_chest.shape))
        array = np.hypot(signal * field + noise[0], noise[1]).astype(np.int16)
        refused(lambda: check_ct(simple_chest.with_array(array)))

    def test_the_modality_is_believed(self, simple_chest):
        mr = Volume(simple_chest.array, simple_chest.spacing, metadata={"Modality": "MR"})
        refused(lambda: check_ct(mr), "MR image")

    def test_a_few_missing_values_become_air(self, simple_chest, rng):
        array = simple_chest.array.astype(np.float32)
        array[3, 4, 5:10] = np.nan
        array[9, 4, 5] = np.inf
        checked = check_ct(simple_chest.with_array(array))
        assert (checked.array[3, 4, 5:10] == -1024).all() and checked.array[9, 4, 5] == -1024
        assert "6 voxels without a value" in warnings_of(checked)[0]

    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_many_missing_values_are_refused(self, value, simple_chest):
        array = simple_chest.array.astype(np.float32)
        array[:3] = value
        refused(lambda: check_ct(simple_chest.with_array(array)), "5.0 %", "no numbers")

    @pytest.mark.parametrize(
        ("shape", "spacing", "words"),
        [
            ((1, 64, 64), (1, 1, 1), "single slice"),
            ((5, 64, 64), (5, 5, 5), "too small"),
            ((64, 64, 64), (0.5, 0.5, 0.5), "too small"),
            ((20, 64, 64), (5, 5, 12), "12.0 mm apart"),
            ((64, 64, 400), (9, 9, 9), "check its voxel spacing"),
        ],
    )
    def test_sizes_that_are_no_chest(self, shape, spacing, words):
        refused(lambda: check_ct(Volume(np.zeros(shape, np.int16), spacing)), words)

    def test_abdomen_only(self, simple_chest):
        """Body, some bowel gas, air around, no lung."""
        array = np.where(simple_chest.array < -950, simple_chest.array, 40).astype(np.int16)
        array[10:20, 30:34, 40:44] = -990
        array[10:13, 28:31, 20:40] = -600
        refused(lambda: check_ct(simple_chest.with_array(array)), "no air-filled lung")

    def test_cropped_lungs_pass_here(self, simple_chest):
        """Whether they are whole is for the quality checks to tell."""
        check_ct(simple_chest.crop((20, 10, 10), (60, 54, 60)))

    def test_masks_and_complex_values_are_no_ct(self, simple_chest):
        for dtype in (bool, np.complex64):
            refused(lambda dtype=dtype: check_ct(simple_chest.with_array(simple_chest.array.astype(dtype))), "HU")

    @pytest.mark.parametrize("orientation", [np.diag([1.0, -1, -1]), np.eye(3)[:, [2, 0, 1]]])
    def test_any_orientation_passes(self, orientation, simple_chest):
        turned = Volume(simple_chest.array, simple_chest.spacing, simple_chest.origin, orientation)
        assert check_ct(turned).same_grid(turned)

    @pytest.mark.parametrize("dtype", [np.int16, np.float32])
    def test_a_large_ct_is_not_copied_more_than_once(self, dtype, simple_chest):
        large = Volume(np.tile(simple_chest.array, (4, 2, 2)).astype(dtype), (2.0, 2.0, 1.0))
        tracemalloc.start()
        check_ct(large)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.6 * large.array.size + 8e7

    def test_reading_and_checking_in_one(self, simple_chest, tmp_path):
        sitk.WriteImage(to_sitk(simple_chest.with_array(simple_chest.array + np.int16(1024))), str(tmp_path / "a.nrrd"))
        checked = read_ct(tmp_path / "a.nrrd")
        assert_same(checked, simple_chest.with_array(np.maximum(simple_chest.array, -1024)))
