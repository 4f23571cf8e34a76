"""Sinograms from files: what is written comes back, a DICOM scan shows its object where it was, the rest is refused."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics import projection_files
from LCTfoundLib.physics.geometry import Detector, FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.projection_files import Projections, read_projections
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import filtered_back_projection

pytestmark = pytest.mark.usefixtures("one_thread")

VIEWS, CHANNELS = 5, 12
PARALLEL: dict[str, Any] = {"geometry": "parallel", "angles_deg": [0, 36, 72, 108, 144], "pitch_mm": 0.8}
FAN = {
    **PARALLEL,
    "geometry": "fan",
    "offset": 0.25,
    "source_isocenter_mm": 595.0,
    "source_detector_mm": 1085.6,
    "detector": "flat",
}


@pytest.fixture
def sinogram(rng) -> np.ndarray:
    return rng.uniform(0, 6, (3, VIEWS, CHANNELS)).astype(np.float32)


def write(folder: Path, sinogram: np.ndarray, settings: dict[str, Any], suffix: str) -> Path:
    path = folder / f"scan{suffix}"
    if suffix == ".npz":
        np.savez(path, sinogram=sinogram, **settings)
        return path
    path.with_suffix(".json").write_text(json.dumps(settings))
    if suffix == ".npy":
        np.save(path, sinogram)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(sinogram), str(path), useCompression=True)
    return path


class TestArrays:
    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".nrrd"])
    @pytest.mark.parametrize("settings", [PARALLEL, FAN], ids=["parallel", "fan"])
    def test_there_and_back(self, tmp_path, sinogram, suffix, settings):
        found = read_projections(write(tmp_path, sinogram, {**settings, "heights_mm": [0, 1, 2]}, suffix))
        np.testing.assert_array_equal(found.sinogram.numpy(), sinogram)
        assert found.heights_mm == (0, 1, 2) and found.water_per_mm == WATER_PER_MM and not found.warnings
        np.testing.assert_allclose(found.beam.angles, np.radians([0, 36, 72, 108, 144]))
        assert (found.beam.detectors, found.beam.pitch_mm) == (CHANNELS, 0.8)
        if settings is FAN:
            assert isinstance(found.beam, FanBeam) and found.beam.detector is Detector.FLAT
            assert (found.beam.offset, found.beam.source_detector_mm) == (0.25, 1085.6)
        else:
            assert isinstance(found.beam, ParallelBeam)

    def test_one_slice_in_radians_of_doubles_in_columns(self, tmp_path, sinogram):
        settings = {"geometry": "parallel", "angles_rad": [0.0, 0.5, 1.0, 1.5, 2.0], "pitch_mm": 1}
        array = np.asfortranarray(sinogram[0].astype(np.float64))
        found = read_projections(write(tmp_path, array, settings, ".npy"))
        np.testing.assert_array_equal(found.sinogram[0].numpy(), sinogram[0])
        assert found.beam.angles == (0.0, 0.5, 1.0, 1.5, 2.0)

    @pytest.mark.parametrize("shape", [(), (CHANNELS,), (VIEWS, CHANNELS)])
    def test_counts_become_line_integrals(self, tmp_path, sinogram, rng, shape):
        photons = rng.uniform(5e4, 1e5, shape)
        counts = np.rint(photons * np.exp(-sinogram)).astype(np.uint32)
        settings = {**PARALLEL, "quantity": "counts", "photons": photons.tolist(), "electronic_noise": 4}
        found = read_projections(write(tmp_path, counts, settings, ".npz"))
        assert found.electronic_noise == 4
        np.testing.assert_allclose(found.sinogram.numpy(), sinogram, atol=0.01)
        assert found.photons is not None and tuple(found.photons.shape) == shape

    def test_geometry_beside_a_npz(self, tmp_path, sinogram):
        path = write(tmp_path, sinogram, {}, ".npz")
        path.with_suffix(".json").write_text(json.dumps(PARALLEL))
        assert read_projections(path).beam.views == VIEWS


class TestRefusedArrays:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"pitch_mm": None}, "missing: pitch_mm"),
            ({"angles_deg": None}, "missing: angles_rad or angles_deg"),
            ({"angles_rad": [0, 1, 2, 3, 4]}, "angles_rad or angles_deg"),
            ({"ofset": 0.25}, "unknown: ofset"),
            ({"source_isocenter_mm": 500}, "unknown: source_isocenter_mm"),
            ({"geometry": "fan"}, "missing: detector, source_detector_mm, source_isocenter_mm"),
            ({"geometry": "cone"}, 'say "parallel", or "fan"'),
            ({"pitch_mm": "wide"}, "pitch_mm of scan.npy holds no numbers"),
            ({"pitch_mm": -1}, "no detector"),
            ({"angles_deg": [0, 36, 72, 108]}, "4 views with 12 channels"),
            ({"angles_deg": [0, 36, 72, math.nan, 144]}, "holds no numbers"),
            ({"angles_deg": {"first": 0}}, "holds no numbers"),
            ({"heights_mm": [1, 2]}, "3 slices and 2 heights"),
            ({"photons": [1e5] * 7}, "photons of scan.npy do not fit 5 views of 12 channels"),
            ({"quantity": "counts"}, "add photons"),
            ({"quantity": "HU"}, "line integrals"),
            ({"water_per_mm": 0.192}, "in 1/mm"),
            ({"photons": 1e5, "electronic_noise": -3}, "Electronic noise of -3 photons"),
        ],
    )
    def test_settings(self, tmp_path, sinogram, change, words):
        settings = {name: value for name, value in {**PARALLEL, **change}.items() if value is not None}
        with pytest.raises(UnsuitableProjections, match=words):
            read_projections(write(tmp_path, sinogram, settings, ".npy"))

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.zeros((3, CHANNELS, VIEWS)), "axes seem to be exchanged"),
            (np.zeros(VIEWS), "slices x views x channels"),
            (np.zeros((0, VIEWS, CHANNELS)), "slices x views x channels"),
            (np.zeros((VIEWS, CHANNELS), complex), "plain numbers"),
            (np.array([{"a": 1}]), "plain numbers"),
            (np.full((VIEWS, CHANNELS), np.nan), "no numbers"),
            (np.full((VIEWS, CHANNELS), 1e4), "log"),
        ],
    )
    def test_arrays(self, tmp_path, array, words):
        with pytest.raises(UnsuitableProjections, match=words):
            read_projections(write(tmp_path, array, PARALLEL, ".npy"))

    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".nrrd"])
    def test_damaged_files(self, tmp_path, sinogram, rng, suffix):
        path = write(tmp_path, sinogram, PARALLEL, suffix)
        whole = path.read_bytes()
        for broken in (b"", whole[: len(whole) // 2], whole[:40], rng.bytes(500)):
            path.write_bytes(broken)
            with pytest.raises(UnsuitableProjections, match="again"):
                read_projections(path)

    @pytest.mark.parametrize("suffix", [".npy", ".npz", ".nrrd"])
    def test_broken_bytes_never_end_in_another_error(self, tmp_path, sinogram, rng, suffix):
        path = write(tmp_path, sinogram, PARALLEL, suffix)
        whole = path.read_bytes()
        for _ in range(100):
            broken = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 400), 3):
                broken[place] = rng.integers(256)
            path.write_bytes(broken)
            try:
                assert isinstance(read_projections(path), Projections)
            except UnsuitableProjections as error:
                assert str(error)

    def test_headers_that_promise_too_much(self, tmp_path):
        path = tmp_path / "scan.npy"
        for shape, words in (("(9999999, 9999, 9999)", "split it"), ("(2, 5, 12)", "cut off")):
            header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
            path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100))
            with pytest.raises(UnsuitableProjections, match=words):
                read_projections(path)
        path = tmp_path / "scan.nrrd"
        path.write_text(
            "NRRD0004\ntype: float\ndimension: 3\nsizes: 90000 90000 900\nendian: little\nencoding: raw\n\n"
        )
        with pytest.raises(UnsuitableProjections, match="at most 500,000,000 rays"):
            read_projections(path)

    def test_a_bomb_is_not_unpacked(self, tmp_path):
        path = tmp_path / "scan.npz"
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (40000, 500, 100)}".ljust(117) + b"\n"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("sinogram.npy", "w") as file:
            file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
            for _ in range(20):
                file.write(bytes(2**20))
        with pytest.raises(UnsuitableProjections, match="split it"):
            read_projections(path)

    def test_a_header_may_not_send_the_reader_elsewhere(self, tmp_path, sinogram):
        secret = tmp_path / "secret.raw"
        secret.write_bytes(sinogram.tobytes())
        path = tmp_path / "scan.nrrd"
        path.write_text(
            "NRRD0004\ntype: float\ndimension: 3\nsizes: 12 5 3\nendian: little\nencoding: raw\n"
            f"data file: {secret}\n\n"
        )
        path.with_suffix(".json").write_text(json.dumps(PARALLEL))
        with pytest.raises(UnsuitableProjections, match="data lie in another file"):
            read_projections(path)

    def test_geometry_files(self, tmp_path, sinogram):
        path = write(tmp_path, sinogram, PARALLEL, ".npy")
        side = path.with_suffix(".json")
        for text, words in (("{", "no valid JSON"), ("[1]", "names with values"), ("[" * 100000, "no valid JSON")):
            side.write_text(text)
            with pytest.raises(UnsuitableProjections, match=words):
                read_projections(path)
        side.unlink()
        with pytest.raises(UnsuitableProjections, match="scan.json beside it"):
            read_projections(path)

    def test_other_files(self, tmp_path):
        with pytest.raises(UnsuitableProjections, match="no file"):
            read_projections(tmp_path / "nowhere.npy")
        for name, words in (("view.dcm", "the folder with all"), ("scan.mat", "no known format")):
            (tmp_path / name).write_bytes(b"1")
            with pytest.raises(UnsuitableProjections, match=words):
                read_projections(tmp_path / name)
        np.savez(tmp_path / "other.npz", data=np.zeros(3))
        with pytest.raises(UnsuitableProjections, match="no array named sinogram"):
            read_projections(tmp_path / "other.npz")


# --- DICOM-CT-PD ---

RHO, D0, COLUMNS, ROWS, PITCH, ROW_MM, CENTRAL = 595.0, 1085.6, 96, 4, 5.0, 2.0, (49.625, 2.5)
SLOPE, INTERCEPT = 1e-4, -0.5


def disk_through(position: tuple[float, float], radius: float, phi: np.ndarray) -> np.ndarray:
    """Paths through a disk, from the manual's coordinates and not from our projector, mm (views, columns).

    The source is at x = -rho sin(phi), y = rho cos(phi), as seen from the table; the detector's arc of radius d0 is
    around it, and from there, with the detector at 6 o'clock, column 1 is at the left.
    """
    source = np.stack([-RHO * np.sin(phi), RHO * np.cos(phi)], -1)[:, None]
    to_isocenter = -source / RHO
    column = np.arange(1, COLUMNS + 1)
    angle = (column - CENTRAL[0]) * PITCH / D0
    # At phi = 0 the ray to the right has a positive x: "right" is the direction to the isocenter turned by 90 degrees.
    right = np.stack([-to_isocenter[..., 1], to_isocenter[..., 0]], -1)
    ray = np.cos(angle)[None, :, None] * to_isocenter + np.sin(angle)[None, :, None] * right
    assert np.all(ray[np.abs(phi) < 1e-9][..., -1, 0] > 0)
    offset = np.asarray(position) - source
    apart = np.abs(offset[..., 0] * ray[..., 1] - offset[..., 1] * ray[..., 0])
    return 2 * np.sqrt(np.maximum(radius**2 - apart**2, 0))


def a_view(line: np.ndarray, phi: float, number: int, photons: np.ndarray, **change: Any) -> Dataset:
    """A view (rows, columns) with the header of DICOM-CT-PD; ``change``: other values by private tag or keyword."""
    view = Dataset()
    view.SOPClassUID, view.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    view.InstanceNumber, view.Modality = number, "CT"
    # As in the public data set: the detector's columns are the image's rows.
    stored = np.rint((line.T - INTERCEPT) / SLOPE).astype("<u2")
    view.Rows, view.Columns = stored.shape
    view.SamplesPerPixel, view.BitsAllocated, view.BitsStored, view.HighBit = 1, 16, 16, 15
    view.PixelRepresentation, view.PhotometricInterpretation = 0, "MONOCHROME2"
    view.RescaleSlope, view.RescaleIntercept = SLOPE, INTERCEPT
    view.PixelData = stored.tobytes()
    tags: dict[int, tuple[str, Any]] = {
        0x7029_1010: ("US", ROWS), 0x7029_1011: ("US", COLUMNS), 0x7029_1002: ("FL", PITCH),
        0x7029_1006: ("FL", ROW_MM), 0x7029_100B: ("CS", "CYLINDRICAL"), 0x7031_1001: ("FL", phi),
        0x7031_1002: ("FL", 120.0),
        0x7031_1003: ("FL", RHO), 0x7031_1031: ("FL", D0), 0x7031_1033: ("FL", list(CENTRAL)),
        0x7033_100B: ("FL", 0.0), 0x7033_100C: ("FL", 0.0), 0x7033_100D: ("FL", 0.0), 0x7033_100E: ("CS", "FFSNONE"),
        0x7033_1013: ("US", 60), 0x7033_1061: ("US", 1), 0x7033_1063: ("US", 1),
        0x7033_1065: ("FL", photons.tolist()), 0x7037_1009: ("CS", "AXIAL"), 0x7037_100A: ("CS", "FANBEAM"),
        0x7039_1009: ("CS", "YES"), 0x7041_1001: ("DS", "0.0193"),
    }  # fmt: skip
    for group in sorted({tag >> 16 for tag in tags}):
        view.add_new((group << 16) + 0x10, "LO", "CT IMG ACQUISITION")
    for tag, (kind, value) in tags.items():
        other = change.get(f"{tag:08X}", value)
        if other is not None:
            view.add_new(tag, kind, other)
    for name, value in change.items():
        if not name[0].isdigit():
            setattr(view, name, value)
    return view


def save(view: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = view.SOPClassUID, view.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    file = FileDataset(path, view, file_meta=meta, preamble=bytes(128))
    pydicom.dcmwrite(path, file, enforce_file_format=True)


@pytest.fixture
def scan(tmp_path, rng) -> Any:
    """Writes a scan of a disk; each row a little denser than the one before."""
    photons = rng.uniform(1e4, 1e5, COLUMNS).astype(np.float32)

    def make(views: int = 60, syntax: str = ExplicitVRLittleEndian, position=(60.0, 25.0), **change: Any) -> Path:
        folder = tmp_path / f"scan{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        phi = 2 * np.pi * np.arange(views) / views
        paths = disk_through(position, 30.0, phi)
        for index in range(views):
            line = 0.0193 * paths[index] * np.linspace(0.8, 1.1, ROWS)[:, None]
            view = a_view(line, phi[index], index + 1, photons, **change)
            # Names in another order than the views.
            save(view, folder / f"{(7 * index) % 1000:04d}.dcm", syntax)
        return folder

    make.photons = photons  # type: ignore[attr-defined]
    return make


class TestDicom:
    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
    def test_geometry_and_values(self, scan, syntax):
        found = read_projections(scan(syntax=syntax))
        beam = found.beam
        assert isinstance(beam, FanBeam) and beam.detector is Detector.ARC and beam.shape == (60, COLUMNS)
        assert (beam.source_isocenter_mm, beam.source_detector_mm) == pytest.approx((RHO, D0), rel=1e-6)
        assert (beam.pitch_mm, beam.offset) == pytest.approx((PITCH, CENTRAL[0] - 48.5), rel=1e-6)
        assert found.water_per_mm == pytest.approx(0.0193) and not found.warnings
        phi = np.asarray(beam.angles)
        np.testing.assert_allclose(phi, 2 * np.pi * np.arange(60) / 60, atol=1e-5)
        # Row 1 is the farthest from the table and the highest; slices rise.
        lines = 0.0193 * disk_through((60.0, 25.0), 30.0, phi) * np.linspace(0.8, 1.1, ROWS)[::-1, None, None]
        np.testing.assert_allclose(found.sinogram.numpy(), lines, atol=SLOPE)
        step = ROW_MM * RHO / D0
        np.testing.assert_allclose(found.heights_mm, 120 + step * np.array([-1.5, -0.5, 0.5, 1.5]), rtol=1e-5)
        assert found.photons is not None
        np.testing.assert_allclose(found.photons.numpy(), np.tile(scan.photons, (60, 1)))

    @pytest.mark.parametrize("position", [(60.0, 25.0), (-45.0, 10.0), (0.0, -70.0)])
    def test_reconstruction_shows_the_disk_where_it_was(self, scan, position):
        found = read_projections(scan(views=120, position=position))
        grid = ImageGrid(60, 60, 4.0)
        image = filtered_back_projection(Projector(grid, found.beam), found.sinogram)[1]
        weight = torch.where(image > 0.01, image, 0)
        x = float((weight.sum(0) * torch.from_numpy(grid.x_mm)).sum() / weight.sum())
        y = float((weight.sum(1) * torch.from_numpy(grid.y_mm)).sum() / weight.sum())
        assert (x, y) == pytest.approx(position, abs=1.0)
        inside = np.hypot(grid.x_mm[None] - position[0], grid.y_mm[:, None] - position[1]) < 22
        assert float(image[torch.from_numpy(inside)].mean()) == pytest.approx(0.0193, rel=0.03)

    def test_a_helical_scan_with_a_flying_focal_spot_becomes_slices(self, tmp_path, rng, monkeypatch):
        position, photons = (40.0, -35.0), np.linspace(*rng.uniform(1e4, 1e5, 2), COLUMNS).astype(np.float32)
        phi = 2 * np.pi * np.arange(3 * 120) / 120
        paths = disk_through(position, 30.0, phi)
        for index, angle in enumerate(phi):
            view = a_view(
                np.tile(0.0193 * paths[index], (ROWS, 1)), angle % (2 * np.pi), index + 1, photons,
                **{"70311002": 200 - 4.0 * index / 120, "70371009": "HELICAL", "7033100E": "FFSZ",
                   "7033100C": 0.4 if index % 2 else -0.4, "70331013": 120},
            )  # fmt: skip
            save(view, tmp_path / f"{index:04d}.dcm")
        told: list[float] = []
        found = read_projections(tmp_path, told.append)
        beam = found.beam
        assert isinstance(beam, ParallelBeam) and beam.views == 30 and told == sorted(told)
        apart = beam.channels_mm - position[0] * np.cos(beam.angles)[:, None]
        apart = apart - position[1] * np.sin(beam.angles)[:, None]
        inside = np.abs(apart) < 20
        lines = 0.0193 * 2 * np.sqrt(900 - apart[inside] ** 2)
        assert np.abs(found.sinogram[:, torch.from_numpy(inside)].numpy() - lines).max() < 0.0193 * 1.5
        step = ROW_MM * RHO / D0
        np.testing.assert_allclose(np.diff(found.heights_mm), step, rtol=1e-5)
        assert 188 < found.heights_mm[0] < 191 and 197 < found.heights_mm[-1] < 200
        # A slice is as thick as a row, 2 half turns x 4 rows / 4 mm of feed see it, and a view is made of two.
        assert found.photons is not None and found.photons.shape == beam.shape
        middle = float(found.photons[3, beam.detectors // 2] / np.interp(CENTRAL[0], range(1, COLUMNS + 1), photons))
        assert middle == pytest.approx(2 * 2 * ROWS * step / 4.0, rel=0.3)
        assert len(found.warnings) == 1 and "30 parallel views" in found.warnings[0]
        monkeypatch.setattr(projection_files, "MAX_RAYS", 1000)  # of what is held at once, not of what is read
        few = read_projections(tmp_path, choose=lambda count: range(1, 4, 2))
        assert few.chosen == (1, 3) and few.heights_mm == (found.heights_mm[1], found.heights_mm[3])
        assert torch.equal(few.sinogram, found.sinogram[[1, 3]])
        for path in tmp_path.iterdir():
            view = pydicom.dcmread(path)
            view[0x7033_1013].value = 1
            view.save_as(path)
        assert read_projections(tmp_path).beam.views == 30  # measured by the angles

    def test_rows_that_follow_each_other_as_the_manual_says(self, scan):
        folder = scan(views=8)
        transposed = read_projections(folder)
        for path in folder.iterdir():
            view = pydicom.dcmread(path)
            view.PixelData = np.ascontiguousarray(view.pixel_array.T).tobytes()
            view.Rows, view.Columns = view.Columns, view.Rows
            view.save_as(path)
        assert torch.equal(read_projections(folder).sinogram, transposed.sinogram)

    def test_missing_views_and_tilted_rows_are_told(self, scan):
        folder = scan(**{"70291006": 8.0})
        for path in sorted(folder.iterdir())[:3]:
            path.unlink()
        few, tilted = read_projections(folder).warnings
        assert "3 of the 60 views" in few and "off their plane" in tilted

    def test_progress_rises_and_stops(self, scan):
        folder, told = scan(views=6), []
        read_projections(folder, told.append)
        assert told == sorted(told) and told[-1] == 1.0

        def stop(share: float) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            read_projections(folder, stop)


class TestRefusedDicom:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"7029100B": "WAVY"}, "unknown form"),
            ({"70391009": "NO"}, "intensities, not their logarithm"),
            ({"70411001": "0.193"}, "no energy of a CT"),
            ({"70311003": None}, r"has no \(7031,1003\)"),
            ({"70311003": 2000.0}, "isocenter lies between them"),
            ({"70311033": [1.0, 2.0, 3.0]}, "3 numbers"),
            ({"70291011": COLUMNS + 1, "70331065": None}, "4 x 97 plain 16-bit"),
            ({"70291010": 60000, "70291011": 60000, "70331065": None}, "at most"),
            ({"BitsAllocated": 8}, "plain 16-bit"),
            ({"PixelData": b"12"}, "plain 16-bit"),
        ],
        ids=lambda value: value[:20] if isinstance(value, str) else next(iter(value)),
    )
    def test_scans(self, scan, change, words):
        with pytest.raises(UnsuitableProjections, match=words):
            read_projections(scan(views=3, **change))

    def test_jumping_table_spots_mixed_spectra_and_single_views(self, scan):
        folder = scan(views=8)
        first, *others = sorted(folder.iterdir())

        def change(path: Path, tag: int, value: float) -> float:
            view = pydicom.dcmread(path)
            kept, view[tag].value = view[tag].value, value
            view.save_as(path)
            return kept

        for tag, value, words in (
            (0x7031_1002, 140.0, "table moves between turns, by 20.0 mm"),
            (0x7033_1063, 2, "another scan"),
        ):
            kept = change(first, tag, value)
            with pytest.raises(UnsuitableProjections, match=words):
                read_projections(folder)
            change(first, tag, kept)
        for number, path in enumerate(others):
            change(path, 0x7033_100C, 0.3 * number)
        with pytest.raises(UnsuitableProjections, match="more than 4 places"):
            read_projections(folder)
        with pytest.raises(UnsuitableProjections, match="single view"):
            read_projections(scan(views=1))

    def test_two_series_in_a_folder(self, scan):
        folder = scan(views=8)
        for number, path in enumerate(sorted(folder.iterdir())):
            view = pydicom.dcmread(path)
            view.SeriesInstanceUID = f"1.2.{number % 2}"
            view.save_as(path)
        with pytest.raises(UnsuitableProjections, match="of another scan"):
            read_projections(folder)

    def test_empty_photons_are_none(self, scan):
        folder = scan(views=8)
        for path in folder.iterdir():
            view = pydicom.dcmread(path)
            view[0x7033_1065].value = None
            view.save_as(path)
        assert read_projections(folder).photons is None

    def test_other_folders(self, scan, tmp_path, rng):
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(UnsuitableProjections, match="holds no DICOM projections"):
            read_projections(empty)
        (empty / "image.dcm").write_bytes(rng.bytes(3000))
        with pytest.raises(UnsuitableProjections, match="image.dcm is no DICOM projection"):
            read_projections(empty)
        folder = scan(views=3)
        (folder / "notes.txt").write_text("hello")
        with pytest.raises(UnsuitableProjections, match="notes.txt is no DICOM projection.*take it out"):
            read_projections(folder)

    def test_compressed_views(self, scan):
        with pytest.raises(UnsuitableProjections, match="is compressed"):
            read_projections(scan(views=2, syntax=DeflatedExplicitVRLittleEndian))

    @pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")
    def test_broken_bytes_never_end_in_another_error(self, scan, rng):
        folder = scan(views=2)
        victim = sorted(folder.iterdir())[0]
        whole = victim.read_bytes()
        for _ in range(60):
            broken = bytearray(whole if rng.random() < 0.6 else whole[: rng.integers(1, len(whole))])
            # Mostly in the header.
            for place in rng.integers(0, min(len(broken), 1500), 4):
                broken[place] = rng.integers(256)
            victim.write_bytes(broken)
            try:
                assert isinstance(read_projections(folder), Projections)
            except UnsuitableProjections as error:
                assert str(error)
