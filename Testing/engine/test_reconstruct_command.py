"""``reconstruct``: from projections or a CT to a folder that tells the truth about itself, or to a sentence."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from LCTfoundLib import cli
from LCTfoundLib.anatomy.agreement import agreement_of, bodies
from LCTfoundLib.anatomy.body import body_mask
from LCTfoundLib.errors import Cancelled, LCTfoundError, OutputError
from LCTfoundLib.export.derived_series import DicomSource, Marks, write_derived_series
from LCTfoundLib.export.marking import Nature
from LCTfoundLib.export.output_folder import MANIFEST, file_entries
from LCTfoundLib.export.page import figure
from LCTfoundLib.export.reconstruction import Reconstruction, write_reconstruction
from LCTfoundLib.export.reconstruction_pictures import LUNG, ReconstructionPainter, residual_plot
from LCTfoundLib.export.slices import Picture
from LCTfoundLib.networks.backbone import backbone_config, build_backbone
from LCTfoundLib.networks.conditions import BuiltInEncoder, Scaling
from LCTfoundLib.networks.foundation import STUDENT_WEIGHT, InputRecipe, Slices, save_foundation
from LCTfoundLib.networks.low_dose import LOW_DOSE_WEIGHT, LowDoseNet
from LCTfoundLib.networks.restoration import RestorationConfig
from LCTfoundLib.networks.unrolled import UNROLLED_WEIGHT, UnrolledConfig, UnrolledNet
from LCTfoundLib.physics.geometry import FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import attenuation_of
from LCTfoundLib.physics.projection_files import Projections
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.reconstruction_case import SliceChoice, _scanned_grid
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.scan_input import grid_of_scan, with_views
from LCTfoundLib.tasks.low_dose import standard_curve
from LCTfoundLib.tasks.sparse_view import scan_of_volume
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_dicom import read_dicom
from LCTfoundLib.volume_io import read_ct, read_volume, write_volume
from LCTfoundLib.weights import registry
from LCTfoundLib.weights.registry import Card, DataSource, save_weight
from Testing.engine.dicom_series import PATIENT, write_series
from Testing.engine.test_projection_files import COLUMNS, ROWS, a_view, disk_through, save
from training.evaluate import image_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = UnrolledConfig(2, 2, RestorationConfig(3, 2, 4, (8,), (1,)))
QUICK = ("--tier", "preview", "--slices", "29:31", "--size", "44", "--device", "cpu")


def run(*arguments: object, task: str = "sparse-view") -> int:
    return cli.main(["reconstruct", task, *map(str, arguments)])


@pytest.fixture(scope="module")
def ct_file(simple_chest: Volume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ct") / "chest.nii.gz"
    write_volume(simple_chest, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unrolled net and a backbone, as new as they come."""
    folder = tmp_path_factory.mktemp("weights")
    card = Card(
        name=UNROLLED_WEIGHT, version="7", task="", architecture="UnrolledNet",
        architecture_parameters=SMALL.to_dict(), spacing=(1.0, 1.0, 1.0), classes=(),
        data=(DataSource("none", "CC0-1.0"),), license="CC0-1.0", seed=0, commit="", numbers={}, intended_use="",
        limits="",
    )  # fmt: skip
    save_weight(UnrolledNet(SMALL).state_dict(), card, folder)
    quiet = RestorationConfig(3, 2, 2, (8,), (1,))
    low_dose = replace(card, name=LOW_DOSE_WEIGHT, architecture="LowDoseNet", architecture_parameters=quiet.to_dict())
    save_weight(LowDoseNet(quiet).state_dict(), low_dose, folder)
    config = backbone_config(
        "student", block_out_channels=(8, 16), norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    save_foundation(
        build_backbone(config).state_dict(), BuiltInEncoder().state_dict(), config,
        InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW), replace(card, name=STUDENT_WEIGHT), folder,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def finished(ct_file: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fast reconstruction of a CT scanned with 16 views."""
    out = tmp_path_factory.mktemp("finished") / "out"
    arguments = ("--slices", "21:41:5", "--size", "44", "--dose", "1", "--device", "cpu", "--weights-folder", weights)
    assert run(ct_file, out, *arguments) == 0
    return out


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


class TestFromACt:
    def test_the_folder_is_whole_and_tells_of_itself(self, finished):
        told = manifest_of(finished)
        names = {entry["path"] for entry in told["files"]}
        dicom = {f"dicom/slice_{k:04d}.dcm" for k in range(1, 6)}
        assert names == {"reconstruction.nrrd", "uncertainty.nrrd", "report.html", "overview.png"} | dicom
        assert told["files"] == file_entries(finished) and told["complete"]
        assert told["synthetic"] and "SYNTHETIC DETAIL" in told["notice"] and "Research use" in told["intended_use"]
        assert told["slices"] == [21, 26, 31, 36, 41] and len(told["residual"]) == 5
        assert told["provenance"]["weights"][UNROLLED_WEIGHT]["version"] == "7"
        assert told["provenance"]["views"] == 16 and told["provenance"]["simulated"]["dose"] == 1
        assert any("16 views" in text for text in told["warnings"])
        assert any("simulated from the CT" in text for text in told["notes"])

    def test_the_numbers_are_those_of_the_files(self, finished, simple_chest):
        told = manifest_of(finished)["agreement"]["Reconstruction"]
        image, interval = (read_volume(finished / name) for name in ("reconstruction.nrrd", "uncertainty.nrrd"))
        _, grid, wanted = scan_of_volume(simple_chest, 16, size=44)
        wanted = wanted[20:41:5]
        scores = [
            [metric(a, b, body_mask(a, 8.0)) for metric in (image_metrics.psnr, image_metrics.ssim, image_metrics.rmse)]
            for a, b in zip(wanted, image.array.astype(np.float32), strict=True)
        ]
        expected = np.mean(scores, axis=0)
        assert [told["psnr"], told["ssim"], told["rmse_hu"]] == pytest.approx(expected.tolist(), rel=0.01)
        inside = np.abs(image.array - wanted) <= interval.array
        assert told["covered"] == pytest.approx(inside[bodies(wanted, 8.0)].mean(), abs=0.02)
        assert manifest_of(finished)["agreement"]["Filtered back-projection"]["covered"] is None

    def test_files_lie_where_the_ct_lies(self, finished):
        image = read_volume(finished / "reconstruction.nrrd")
        # 88 columns and 64 rows of 4 mm, padded to 88 x 88 and halved; every fifth slice from the 21st.
        assert image.spacing == (8.0, 8.0, 20.0) and image.shape == (5, 44, 44)
        np.testing.assert_allclose(image.origin, (-174.0 + 2, -126.0 - 12 * 4 + 2, -118.0 + 20 * 4))
        series = read_dicom(finished / "dicom")
        assert series.same_grid(image) and read_volume(finished / "uncertainty.nrrd").same_grid(image)
        np.testing.assert_array_equal(series.array, image.array)

    def test_nrrd_files_carry_the_marks(self, finished):
        reader = sitk.ImageFileReader()
        for name, meaning in (("reconstruction.nrrd", "HU"), ("uncertainty.nrrd", "half of the width")):
            reader.SetFileName(str(finished / name))
            reader.ReadImageInformation()
            assert reader.GetMetaData("Synthetic") == "YES" and meaning in reader.GetMetaData("Values")
            assert "SYNTHETIC DETAIL" in reader.GetMetaData("Description")
            assert json.loads(reader.GetMetaData("Provenance"))["task"] == "sparse-view reconstruction"

    def test_the_report(self, finished):
        page = (finished / "report.html").read_text(encoding="utf-8")
        assert page.index("16 views leave most of the image open") < page.index("How near to the truth")
        assert "SYNTHETIC DETAIL" in page and "not for diagnosis" in page and "default-src 'none'" in page
        assert not re.search(r'(src|href)="(?!data:)', page)
        # Three slices of five pictures, one of three in the other window, and the residual.
        assert page.count("<img ") == 3 * 5 + 3 + 1
        assert re.search(r"truth within the 90 % interval.*\d+ % of pixels", page, re.DOTALL)
        with Image.open(finished / "overview.png") as sheet:
            assert sheet.width > 5 * 400 and np.asarray(sheet.convert("L")).std() > 20

    def test_what_the_shell_prints(self, ct_file, tmp_path, capsys):
        assert run(ct_file, tmp_path / "out", *QUICK, "--views", 24, "--jsonl") == 0
        captured = capsys.readouterr()
        events = [json.loads(line) for line in captured.out.splitlines()]
        fractions = [event["fraction"] for event in events if event["event"] == "progress"]
        assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(fractions) > 3
        result = events[-1]
        assert result["event"] == "result" and result["folder"] == str(tmp_path / "out")
        assert "overview.png" in result["files"] and not any("dicom/" in name for name in result["files"])
        ours, before = (result["agreement"][name] for name in ("Reconstruction", "Filtered back-projection"))
        assert ours["psnr"] > before["psnr"] + 2 and ours["rmse_hu"] < before["rmse_hu"]
        assert f"Reconstruction: PSNR {ours['psnr']:.1f} dB" in captured.err and "Research use only" in captured.err
        told = manifest_of(tmp_path / "out")
        assert "SIMULATED SCAN" in told["notice"] and told["synthetic"] and told["provenance"]["views"] == 24
        assert not (tmp_path / "out" / "uncertainty.nrrd").exists()

    def test_the_best_tier_tells_an_interval_and_warns_of_slices_that_are_apart(self, ct_file, weights, tmp_path):
        arguments = ("--tier", "best", "--samples", 1, "--size", 44, "--device", "cpu", "--weights-folder", weights)
        assert run(ct_file, tmp_path / "out", *arguments, "--slices", "30:36:6", "--seed", 3) == 0
        told = manifest_of(tmp_path / "out")
        assert set(told["provenance"]["weights"]) == {UNROLLED_WEIGHT, STUDENT_WEIGHT}
        assert any("Every 6th slice" in text for text in told["notes"])
        assert (read_volume(tmp_path / "out" / "uncertainty.nrrd").array > 0).all()

    @pytest.mark.parametrize("size", [None, 44, 11])
    def test_every_pixel_of_the_scanned_slices_keeps_its_place(self, rng, size):
        """Slices of a slope, in any orientation: the value at a place is the slope's there."""
        turn = np.diag(rng.choice([-1.0, 1.0], 3))[rng.permutation(3)]
        slope, spacing = rng.uniform(-1, 1, 3), np.array([2.0, 2.0, 2.0])
        ct = Volume(np.zeros((9, 30, 44), np.float32), tuple(spacing), tuple(rng.uniform(-50, 50, 3)), turn)
        index = np.stack(np.meshgrid(*map(np.arange, ct.shape), indexing="ij"), axis=-1)
        ct = ct.with_array((ct.world_from_index(index) @ slope).astype(np.float32)).to_canonical()
        side = max(ct.shape[1:])
        if side % (size or side):
            size = None
        _, grid, slices = scan_of_volume(ct, 2, size=size)
        where = _scanned_grid(ct, grid)
        places = where.world_from_index(np.stack(np.meshgrid(*map(np.arange, where.shape), indexing="ij"), axis=-1))
        step = side // grid.rows
        inside = ct.index_from_world(places)
        margin = (step - 1) / 2
        low, high = margin - 1e-6, np.array(ct.shape) - 1 - margin + 1e-6
        seen = ((inside[..., 1:] >= low) & (inside[..., 1:] <= high[1:])).all(axis=-1)
        assert seen.mean() > 0.05
        np.testing.assert_allclose(slices[seen], (places @ slope)[seen], atol=0.02)


class TestDicom:
    def test_it_joins_the_patients_study_as_a_marked_series(self, simple_chest, tmp_path, rng):
        def change(image: pydicom.Dataset, k: int) -> None:
            image.SpecificCharacterSet = "ISO_IR 100"
            image.PatientName, image.PatientBirthDate, image.PatientPosition = "Müller^Änne", "19600229", "HFS"

        source = write_series(simple_chest, tmp_path / "in", rng, change)
        assert run(source, tmp_path / "out", *QUICK) == 0
        images = [pydicom.dcmread(path) for path in sorted((tmp_path / "out" / "dicom").iterdir())]
        originals = {str(image.SOPInstanceUID): image for image in map(pydicom.dcmread, source.iterdir())}
        first = next(iter(originals.values()))
        assert len(images) == 3 and len({image.SOPInstanceUID for image in images}) == 3
        for image in images:
            for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
                assert str(image[keyword].value) == str(first[keyword].value), keyword
            assert image.PatientPosition == "HFS" and image.SeriesInstanceUID != first.SeriesInstanceUID
            assert list(image.ImageType[:2]) == ["DERIVED", "SECONDARY"] and "SYNTHETIC" in image.ImageType
            assert image.SyntheticData == "YES" and "simulated scan" in image.ImageComments.lower()
            assert "preview, 16 views" in image.SeriesDescription and len(image.SeriesDescription) <= 64
            for text in ("LCTfound", "preview", "16 views", "weights: none", "simulated scan", "research use"):
                assert text in image.DerivationDescription, text
            named = originals[image.SourceImageSequence[0].ReferencedSOPInstanceUID]
            assert named.ImagePositionPatient[2] == pytest.approx(image.ImagePositionPatient[2])
        # Whoever reads the study still takes the scanner's series for the CT.
        together = tmp_path / "together"
        together.mkdir()
        for number, path in enumerate([*source.iterdir(), *(tmp_path / "out" / "dicom").iterdir()]):
            (together / f"{number}.dcm").write_bytes(path.read_bytes())
        np.testing.assert_array_equal(read_ct(together).array, np.maximum(simple_chest.array, -1024))

    def test_a_file_without_patient_is_of_nobody(self, finished):
        image = pydicom.dcmread(finished / "dicom" / "slice_0001.dcm")
        assert str(image.PatientName) == "ANONYMOUS^LCTFOUND" and image.PatientID.startswith("ANONYMOUS-")
        assert not image.PatientBirthDate and not image.StudyDate and "SourceImageSequence" not in image
        assert "synthetic detail" in image.DerivationDescription and "sha256" in image.DerivationDescription

    def test_invalid_values_are_left_empty(self, simple_chest, tmp_path):
        def change(image: pydicom.Dataset, k: int) -> None:
            image.PatientSex, image.SliceThickness = "W", None
            with pytest.warns(UserWarning):
                image.PatientBirthDate, image.StudyTime = "1960-02", "noon"
            del image.AccessionNumber

        source = DicomSource.of_ct(write_series(simple_chest, tmp_path / "in", change=change))
        (tmp_path / "out").mkdir()
        write_derived_series(simple_chest, tmp_path / "out", Marks("t", "d", Nature.DERIVED), source)
        image = pydicom.dcmread(tmp_path / "out" / "slice_0001.dcm")
        for keyword in ("PatientSex", "PatientBirthDate", "StudyTime", "AccessionNumber"):
            assert keyword in image and not image[keyword].value, keyword
        assert str(image.PatientName) == PATIENT and image.SliceThickness == 4
        assert image.SyntheticData == "NO" and "SYNTHETIC" not in image.ImageType and image.ImageType[0] == "DERIVED"

    def test_oblique_slices_keep_their_place(self, tmp_path, rng):
        angle = float(rng.uniform(-0.3, 0.3))
        turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
        array = rng.integers(-1000, 1000, (3, 5, 7)).astype(np.float32)
        image = Volume(array, (0.7, 0.7, 1.3), tuple(rng.uniform(-200, 200, 3)), turn)
        write_derived_series(image, tmp_path, Marks("t", "d", Nature.DERIVED))
        found = read_dicom(tmp_path)
        assert found.same_grid(image)
        np.testing.assert_array_equal(found.array, array)


def write_scan(folder: Path, hu: np.ndarray, beam: ParallelBeam | FanBeam, pixel_mm: float, **more: object) -> Path:
    grid = ImageGrid(*hu.shape[1:], pixel_mm)
    rays = Projector(grid, beam, truncated=True).forward(attenuation_of(torch.from_numpy(hu)))
    path = folder / "scan.npz"
    kind = "fan" if isinstance(beam, FanBeam) else "parallel"
    np.savez(
        path, sinogram=rays.numpy(), geometry=kind, angles_rad=np.array(beam.angles), pitch_mm=beam.pitch_mm, **more
    )
    return path


@pytest.fixture
def disks(rng) -> np.ndarray:
    """Three slices of a cylinder of water with a denser rod at the left front and a hole."""
    y, x = np.mgrid[-32:32, -32:32] + 0.5
    hu = np.where(x**2 + y**2 < 24**2, 0.0, -1000.0)
    hu[(x + 12) ** 2 + (y + 8) ** 2 < 5**2] = 300
    hu[(x - 10) ** 2 + (y - 4) ** 2 < 6**2] = -800
    return (np.repeat(hu[None], 3, axis=0) + np.array([0, 10, 20])[:, None, None]).astype(np.float32)


class TestFromProjections:
    ON_GRID = ("--tier", "preview", "--size", "64", "--pixel-mm", "4", "--device", "cpu")

    def test_the_object_is_where_it_was(self, disks, tmp_path):
        scan = write_scan(tmp_path, disks, ParallelBeam.around(ImageGrid(64, 64, 4.0), 60), 4.0, heights_mm=[5, 8, 11])
        assert run(scan, tmp_path / "out", *self.ON_GRID) == 0
        image = read_volume(tmp_path / "out" / "reconstruction.nrrd")
        assert image.spacing == (4.0, 4.0, 3.0) and image.origin == (-126.0, -126.0, 5.0)
        assert np.abs(image.array - disks).mean() < 15
        told = manifest_of(tmp_path / "out")
        assert told["notice"].startswith("DERIVED IMAGE") and not told["synthetic"] and not told["agreement"]
        assert any("how the patient lay" in text for text in told["notes"])
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert "There is no reference" in page and "What the method changed" in page

    def test_a_part_of_the_slices_and_of_the_views(self, disks, tmp_path):
        scan = write_scan(tmp_path, disks, ParallelBeam.around(ImageGrid(64, 64, 4.0), 60), 4.0)
        assert run(scan, tmp_path / "out", *self.ON_GRID, "--slices", "2:3", "--views", 30) == 0
        told = manifest_of(tmp_path / "out")
        assert told["slices"] == [2, 3] and told["provenance"]["views"] == 30
        assert any("1 mm apart" in text for text in told["notes"])

    def test_views_are_thinned_evenly(self, rng):
        beam = ParallelBeam(tuple(rng.permutation(np.pi * np.arange(60) / 60)), 9, 1.0)
        photons = torch.from_numpy(rng.uniform(1, 2, (60, 9)).astype(np.float32))
        scan = Projections(torch.from_numpy(rng.uniform(0, 1, (2, 60, 9)).astype(np.float32)), beam, photons=photons)
        few = with_views(scan, 12)
        np.testing.assert_allclose(np.diff(np.sort(few.beam.angles)), np.pi / 12)
        for view, angle in enumerate(few.beam.angles):
            was = scan.beam.angles.index(angle)
            assert torch.equal(few.sinogram[:, view], scan.sinogram[:, was])
            assert torch.equal(few.photons[view], photons[was])
        with pytest.raises(LCTfoundError, match="has 60 views"):
            with_views(scan, 61)

    def test_the_largest_image_that_the_detector_covers(self):
        for beam, size in ((FanBeam.siemens(4), 512), (ParallelBeam((0.0, 1.0), 300, 1.5), 256)):
            scan = Projections(torch.zeros(1, beam.views, beam.detectors), beam)
            grid = grid_of_scan(scan)
            assert grid.rows == grid.columns == size and beam.covers(grid)
            assert not beam.covers(replace(grid, pixel_mm=1.001 * grid.pixel_mm))
            assert grid_of_scan(scan, 100, field_mm=350.0) == ImageGrid(100, 100, 3.5)

    def test_a_dicom_scan_keeps_its_patient(self, tmp_path, rng):
        folder = tmp_path / "scan"
        folder.mkdir()
        phi = 2 * np.pi * np.arange(40) / 40
        paths, photons = disk_through((30.0, -20.0), 40.0, phi), np.full(COLUMNS, 1e5, np.float32)
        for view in range(40):
            line = 0.0193 * paths[view] * np.ones((ROWS, 1))
            save(a_view(line, phi[view], view + 1, photons, PatientID="C081"), folder / f"{view:03d}.dcm")
        arguments = ("--tier", "preview", "--size", "64", "--slices", "2:3", "--device", "cpu")
        assert run(folder, tmp_path / "out", *arguments) == 0
        image = pydicom.dcmread(tmp_path / "out" / "dicom" / "slice_0001.dcm")
        assert image.PatientID == "C081" and image.SyntheticData == "NO"
        hu = read_volume(tmp_path / "out" / "reconstruction.nrrd")
        dense = np.argwhere(hu.array > -300).mean(axis=0)
        x, y, _ = hu.world_from_index(dense)
        assert (x, y) == pytest.approx((30.0, 20.0), abs=3.0)  # the scanner's y points up, the patient's back down


class TestLowDose:
    def test_simulated_noise_is_compared_with_the_ct(self, ct_file, weights, tmp_path, simple_chest):
        arguments = ("--simulate", 0.1, "--slices", "25:35:2", "--device", "cpu", "--weights-folder", weights)
        assert run(ct_file, tmp_path / "out", *arguments, task="low-dose") == 0
        told = manifest_of(tmp_path / "out")
        image, interval = (read_volume(tmp_path / "out" / name) for name in ("reconstruction.nrrd", "uncertainty.nrrd"))
        reference = simple_chest.crop((24, 0, 0), (35, 64, 88))
        np.testing.assert_allclose(image.origin, reference.origin)
        # A net that was not trained changes nothing: what is left is the noise of the dose.
        wanted = standard_curve(4.0).sigma_hu(0.1)
        assert (image.array - reference.array[::2]).std() == pytest.approx(wanted, rel=0.1)
        before, after = told["agreement"]["CT with simulated noise"], told["agreement"]["Reconstruction"]
        assert after["psnr"] == pytest.approx(before["psnr"], abs=0.1) and after["covered"] is not None
        assert (interval.array > 0).all() and "SYNTHETIC DETAIL" in told["notice"]
        assert any("streaks" in text for text in told["notes"])
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert "noise told to the net" in page and "Reference: CT as it was." in page

    def test_a_ct_without_a_reference(self, ct_file, weights, tmp_path):
        arguments = ("--noise-hu", 15, "--strength", 0.5, "--slices", "30:32", "--device", "cpu")
        assert run(ct_file, tmp_path / "out", *arguments, "--weights-folder", weights, task="low-dose") == 0
        told = manifest_of(tmp_path / "out")
        assert told["how"] == "fast, strength 0.5" and not told["agreement"] and told["slices"] == [30, 31, 32]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--simulate", 0), "dose of 0 cannot be simulated"),
            (("--strength", 2), "strength of 2"),
            (("--noise-hu", 5, "--dose", 0.5), "give one of them"),
        ],
    )
    def test_refused(self, ct_file, tmp_path, capsys, arguments, words):
        assert run(ct_file, tmp_path / "out", *arguments, task="low-dose") == 2
        assert words in capsys.readouterr().err and os.listdir(tmp_path) == []


class TestSuperResolution:
    @pytest.mark.parametrize("direction", ["in-plane", "slices"])
    def test_a_ct_that_was_made_coarse_comes_back_nearer(self, ct_file, tmp_path, simple_chest, direction):
        arguments = ("--simulate", "--method", "cubic", "--factor", 4, "--direction", direction, "--device", "cpu")
        assert run(ct_file, tmp_path / "out", *arguments, "--slices", "29:36", task="super-resolution") == 0
        told = manifest_of(tmp_path / "out")
        image = read_volume(tmp_path / "out" / "reconstruction.nrrd")
        assert image.same_grid(simple_chest.crop((28, 0, 0), (36, 64, 88)))
        coarse, fine = told["agreement"]["Coarse CT"], told["agreement"]["Reconstruction"]
        assert fine["psnr"] > coarse["psnr"] + (0.5 if direction == "in-plane" else -0.5)
        assert "SIMULATED SCAN" in told["notice"] and told["how"].startswith("cubic, 4 times finer")
        found = read_dicom(tmp_path / "out" / "dicom")
        assert found.same_grid(image)

    def test_finer_slices_of_a_ct(self, simple_chest, tmp_path, weights):
        source = write_series(simple_chest.resample((8.0, 8.0, 8.0)), tmp_path / "in")
        arguments = ("--factor", 2, "--direction", "slices", "--samples", 2, "--device", "cpu", "--slices", "15:16")
        assert run(source, tmp_path / "out", *arguments, "--weights-folder", weights, task="super-resolution") == 0
        told = manifest_of(tmp_path / "out")
        assert "SYNTHETIC DETAIL" in told["notice"] and STUDENT_WEIGHT in told["provenance"]["weights"]
        image = pydicom.dcmread(tmp_path / "out" / "dicom" / "slice_0004.dcm")
        assert image.SliceThickness == 4 and str(image.PatientName) == PATIENT
        coarse = read_ct(source).array[14:16].astype(np.float32)
        fine = read_volume(tmp_path / "out" / "reconstruction.nrrd").array.astype(np.float32)
        np.testing.assert_allclose(fine.reshape(2, 2, 32, 44).mean(axis=1), coarse, atol=1.0)

    def test_refused(self, ct_file, tmp_path, capsys):
        for arguments, words in (
            (("--factor", 20), "factor of 20"),
            (("--direction", "slices", "--slices", "::2"), "cannot be made up"),
            (("--simulate", "--factor", 4, "--direction", "slices", "--slices", "30:35"), "no whole number of groups"),
        ):
            assert run(ct_file, tmp_path / "out", "--method", "cubic", *arguments, task="super-resolution") == 2
            assert words in capsys.readouterr().err
        assert os.listdir(tmp_path) == []


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--views", 0), "0 views are no scan"),
            (("--dose", -1), "dose of -1 cannot be simulated"),
            (("--dose", "nan"), "cannot be simulated"),
            (("--size", 50), "whole part of 88"),
            (("--size", 0), "between 16 and 2048"),
            (("--pixel-mm", 1), "for projections"),
            (("--pixel-mm", -1), "no length"),
            (("--pixel-mm", 1, "--field-mm", 300), "one of them"),
            (("--samples", 0), "0 samples"),
            (("--slices", "70:80"), "There are 60 slices"),
            (("--slices", "9:3"), "No slice is chosen"),
            (("--slices", "a:b"), "names no slices"),
            (("--weights-folder", "nowhere", "--tier", "fast"), "no folder nowhere for weights"),
        ],
    )
    def test_options(self, ct_file, tmp_path, capsys, arguments, words):
        start = () if "--size" in arguments else ("--size", "44")
        quick = ("--tier", "preview", "--slices", "29:31", *start, "--device", "cpu")
        assert run(ct_file, tmp_path / "out", *quick, *arguments) == 2
        captured = capsys.readouterr()
        assert words in captured.err.splitlines()[-1] and captured.out == "" and os.listdir(tmp_path) == []

    def test_without_its_weight_the_fast_tier_says_how_to_get_it(self, ct_file, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(registry, "shipped_folders", list)
        monkeypatch.setattr(registry, "user_folder", lambda: tmp_path / "user")
        monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
        assert run(ct_file, tmp_path / "out", "--slices", "29:31", "--size", "44", "--device", "cpu") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"put {UNROLLED_WEIGHT}.safetensors and {UNROLLED_WEIGHT}.json into {tmp_path / 'user'}" in error
        assert os.listdir(tmp_path) == []

    def test_inputs(self, tmp_path, rng, capsys):
        sinogram = rng.uniform(0, 3, (8, 20, 30)).astype(np.float32)
        np.save(tmp_path / "bare.npy", sinogram)
        sitk.WriteImage(sitk.GetImageFromArray(sinogram), str(tmp_path / "bare.nrrd"))
        (tmp_path / "broken.nii.gz").write_bytes(rng.bytes(500))
        (tmp_path / "empty").mkdir()
        cases = {
            "nowhere": "There is no file or folder",
            "bare.npy": "geometry of bare.npy is missing",
            "bare.nrrd": "If it is a sinogram, write its geometry to bare.json beside it",
            "broken.nii.gz": "damaged",
            "empty": "no DICOM images",
        }
        for name, words in cases.items():
            assert run(tmp_path / name, tmp_path / "out", "--tier", "preview") == 2, name
            assert words in capsys.readouterr().err.splitlines()[-1], name
        assert not (tmp_path / "out").exists()

    def test_options_that_measured_projections_do_not_take(self, disks, tmp_path, capsys):
        beam = ParallelBeam.around(ImageGrid(64, 64, 4.0), 20)
        scan = write_scan(tmp_path, disks, beam, 4.0, heights_mm=[0, 1, 5])
        for arguments, words in (
            (("--dose", 0.1), "simulated from a CT"),
            ((), "do not rise evenly"),
            (("--slices", "1:2", "--field-mm", 600), "detector sees a circle"),
        ):
            assert run(scan, tmp_path / "out", "--tier", "preview", "--size", 32, "--device", "cpu", *arguments) == 2
            assert words in capsys.readouterr().err.splitlines()[-1]
        assert sorted(os.listdir(tmp_path)) == ["scan.npz"]

    @pytest.mark.parametrize("text", ["1:2:3:4", "1:-2", "0:5", "::0", "x", "1.5:2", "-3"])
    def test_slices(self, text):
        with pytest.raises(LCTfoundError, match="slice"):
            SliceChoice.parse(text)

    def test_chosen_slices(self):
        chosen = {"": range(10), "3:5": range(2, 5), "4": range(3, 4), "::4": range(0, 10, 4), "8:": range(7, 10)}
        for text, wanted in {**chosen, ":2": range(2), "9:99": range(8, 10)}.items():
            assert SliceChoice.parse(text).of(10) == wanted, text


def a_reconstruction(rng: np.random.Generator, case: str = "case") -> Reconstruction:
    """Noise around a body in 4 slices of 40 x 40 pixels."""
    body = np.where(np.hypot(*np.mgrid[-20:20, -20:20]) < 15, 0, -1000).astype(np.float32)
    image = Volume(body + rng.normal(0, 30, (4, 40, 40)).astype(np.float32), (2.0, 2.0, 3.0))
    return Reconstruction(
        case, "sparse-view reconstruction", "fast, 9 views", image, image.with_array(image.array + 90), "Before",
        Nature.SYNTHETIC_DETAIL, image.with_array(np.full_like(image.array, 100)), residual=np.linspace(0.01, 0.02, 4),
        numbers=(1, 2, 3, 4), warnings=["<b>look</b> here"],
    )  # fmt: skip


class TestFolder:
    def test_an_earlier_result_is_replaced_on_demand_only(self, ct_file, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(ct_file, out, *QUICK) == 0
        before = file_entries(out)
        assert run(ct_file, out, *QUICK) == 2
        assert "already holds a result; name another folder or add --overwrite" in capsys.readouterr().err
        assert file_entries(out) == before
        assert run(ct_file, out, *QUICK[:2], "--slices", "30", "--size", "44", "--device", "cpu", "--overwrite") == 0
        assert [path.name for path in (out / "dicom").iterdir()] == ["slice_0001.dcm"]
        assert manifest_of(out)["files"] == file_entries(out)

    def test_what_is_no_reconstruction_is_never_replaced(self, ct_file, tmp_path, capsys):
        others, segmented = tmp_path / "others", tmp_path / "segmented"
        for folder, name, text in ((others, "notes.txt", "mine"), (segmented, MANIFEST, '{"product": "LCTfound"}')):
            folder.mkdir()
            (folder / name).write_text(text)
            assert run(ct_file, folder, *QUICK, "--overwrite") == 2
            assert os.listdir(folder) == [name] and (folder / name).read_text() == text
        assert "holds a result of another kind" in capsys.readouterr().err

    def test_the_input_is_never_the_output(self, finished, capsys):
        before = file_entries(finished)
        for source in (finished / "dicom", finished / "reconstruction.nrrd", finished):
            assert run(source, finished, *QUICK, "--overwrite") == 2
            assert "The input lies in" in capsys.readouterr().err
        assert file_entries(finished) == before

    def test_a_full_disk_leaves_nothing(self, tmp_path, rng):
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        content = a_reconstruction(rng)
        for limit in (1000, 20_000):  # within the first image, and within the pictures
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                with pytest.raises(OutputError, match="full; free some space"):
                    write_reconstruction(content, tmp_path / "out")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_stopping_leaves_the_earlier_result(self, tmp_path, rng, share):
        write_reconstruction(a_reconstruction(rng), tmp_path / "out")
        before, token = file_entries(tmp_path / "out"), CancelToken()
        stopping = Progress(lambda report: token.cancel() if report.fraction >= share else None, cancel=token)
        with pytest.raises(Cancelled):
            write_reconstruction(a_reconstruction(rng), tmp_path / "out", stopping)
        assert file_entries(tmp_path / "out") == before
        assert manifest_of(tmp_path / "out")["files"] == before and os.listdir(tmp_path) == ["out"]

    def test_text_from_outside_is_escaped(self, tmp_path, rng):
        write_reconstruction(a_reconstruction(rng, "<script>x</script>"), tmp_path / "out")
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;look&lt;/b&gt; here" in page


class TestPictures:
    def test_colored_noise_fits_into_a_report(self, rng):
        noise = Image.fromarray(rng.integers(0, 256, (700, 700, 3), np.uint8))
        assert figure(Picture(noise, "")).count("data:image/jpeg") == 1

    def test_colors_tell_the_sign_and_the_size(self, rng):
        content = a_reconstruction(rng)
        painter = ReconstructionPainter(content.image, "MARK")
        same = np.asarray(painter.difference(content.image, content.image, 1, "").image, int)
        less = np.asarray(painter.difference(content.image, content.before, 1, "").image, int)
        more = np.asarray(painter.difference(content.before, content.image, 1, "").image, int)
        middle = tuple(n // 2 for n in same.shape[:2])
        assert (same[middle] == 0).all()
        assert less[middle][2] > less[middle][0] + 50 and more[middle][0] > more[middle][2] + 50
        half = np.asarray(painter.expected_error(content.interval, 1, "").image, int)
        assert np.abs(half[middle] - (190, 50, 85)).max() <= 2

    def test_pictures_are_cut_to_the_body_and_marked(self, rng):
        content = a_reconstruction(rng)
        painter = ReconstructionPainter(content.image, "MARK", 300)
        plain, marked = (
            np.asarray(painter.gray(content.image, 2, LUNG, "", marked).image, int) for marked in (False, True)
        )
        assert plain.shape[:2] == (300, 300) and (plain != marked).any()
        # 30 pixels of body and 5 of margin at either end of it.
        assert (plain[100:200, 150] > 180).all() and (plain[15:30, 150] < 100).all()

    def test_the_plot_has_its_points_where_they_belong(self):
        plot = np.asarray(residual_plot(np.array([0.0, 0.01]), [10, 20]), int)
        blue = np.argwhere(np.abs(plot - (11, 93, 122)).max(axis=-1) == 0)
        first, last = blue[blue[:, 1].argmin()], blue[blue[:, 1].argmax()]
        assert first[0] == pytest.approx(190, abs=4) and last[0] == pytest.approx(16, abs=4)
        assert np.asarray(residual_plot(np.array([0.0]), [3]), int).min() < 200


class TestAgreement:
    def test_it_is_the_evaluations(self, rng, simple_chest):
        reference = simple_chest.array[::20].astype(np.float32)
        images = reference + rng.normal(0, 60, reference.shape).astype(np.float32) * rng.uniform(0.5, 3)
        masks = bodies(reference, 4.0)
        found = agreement_of(reference, images, masks, np.full_like(images, 100))
        wanted = [
            np.mean([metric(a, b, m) for a, b, m in zip(reference, images, masks, strict=True)])
            for metric in (image_metrics.psnr, image_metrics.ssim, image_metrics.rmse)
        ]
        assert [found.psnr, found.ssim, found.rmse_hu] == pytest.approx(wanted, rel=1e-6)
        assert found.covered == pytest.approx((np.abs(images - reference) <= 100)[masks].mean()) and found.slices == 3

    def test_without_a_body_there_is_nothing_to_compare(self):
        air = np.full((2, 20, 20), -1000, np.float32)
        assert agreement_of(air, air, bodies(air, 2.0)) is None
