"""One case and many: results appear whole or not at all, batches resume, a failed study does not stop the rest."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from LCTfoundLib.batch import LOGS, SUMMARY, Status, Study, find_studies, run_batch
from LCTfoundLib.case import RECORD, CaseOptions, fingerprint, read_record, run_case
from LCTfoundLib.errors import Cancelled, OutputError, UnsuitableImage
from LCTfoundLib.volume import Volume
from Testing.engine.toy_engine import ToyEngine, lungs_by_threshold, write_ct


def write_dicom(path: Path, study: str) -> None:
    dataset = Dataset()
    dataset.StudyInstanceUID = study
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=False, implicit_vr=False, little_endian=True)
    content = path.read_bytes()
    path.write_bytes(content if content[128:132] == b"DICM" else bytes(128) + b"DICM" + content)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def run_all(studies, output: Path, toy: ToyEngine, options: CaseOptions | None = None):
    return list(run_batch(studies, output, options or CaseOptions(), toy.engine()))


@pytest.fixture
def toy() -> ToyEngine:
    return ToyEngine()


@pytest.fixture
def ct_file(simple_chest: Volume, tmp_path: Path) -> Path:
    return write_ct(simple_chest, tmp_path / "in" / "Häuser 肺.nii.gz")


class TestCase:
    def test_writes_the_result_and_its_record(self, ct_file, tmp_path, toy, simple_chest):
        target = tmp_path / "Ergebnis ü"
        record, _ = run_case(ct_file, target, CaseOptions(), toy.engine())
        assert read_record(target) == record
        expected = np.count_nonzero(lungs_by_threshold(simple_chest).segments.array) * 0.064
        assert record.volumes_ml["lungs"] == pytest.approx(expected, abs=0.01)
        assert record.volumes_ml["lungs"] > 2000
        assert record.case == "Häuser 肺"
        assert record.findings == ["thick slices"]
        assert set(record.seconds) == {"read", "segment", "export", "total"}
        assert record.peak_memory_mb > 10
        assert not leftovers(tmp_path)

    @pytest.mark.parametrize("step", ["read", "segment", "export"])
    def test_leaves_nothing_when_a_step_fails(self, step, ct_file, tmp_path, toy):
        def broken(*arguments: object) -> None:
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            run_case(ct_file, tmp_path / "deep" / "out", CaseOptions(), replace(toy.engine(), **{step: broken}))
        assert sorted(os.listdir(tmp_path)) == ["in"]

    def test_refuses_a_place_that_cannot_be_written_before_it_computes(self, ct_file, tmp_path, toy):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            run_case(ct_file, tmp_path / "file" / "out", CaseOptions(), toy.engine())
        assert toy.segmented == []

    def test_never_touches_a_folder_with_other_files(self, ct_file, tmp_path, toy):
        target = tmp_path / "mine"
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(OutputError, match="holds other files"):
                run_case(ct_file, target, CaseOptions(), toy.engine(), overwrite=overwrite)
        assert os.listdir(target) == ["thesis.txt"]

    def test_replaces_an_earlier_result_only_when_asked_and_only_by_a_whole_one(self, ct_file, tmp_path, toy):
        target = tmp_path / "out"
        run_case(ct_file, target, CaseOptions(), toy.engine())
        with pytest.raises(OutputError, match="--overwrite"):
            run_case(ct_file, target, CaseOptions(), toy.engine())

        def stopped(ct, options, progress):
            raise Cancelled("stopped")

        before = (target / RECORD).read_text()
        with pytest.raises(Cancelled):
            run_case(ct_file, target, CaseOptions(), replace(toy.engine(), segment=stopped), overwrite=True)
        assert (target / RECORD).read_text() == before
        run_case(ct_file, target, CaseOptions(quality="fast"), toy.engine(), overwrite=True)
        assert read_record(target).options["quality"] == "fast"
        assert not leftovers(tmp_path)

    def test_names_a_missing_input(self, tmp_path, toy):
        with pytest.raises(UnsuitableImage, match="There is no file or folder"):
            run_case(tmp_path / "nowhere.nii", tmp_path / "out", CaseOptions(), toy.engine())
        assert not (tmp_path / "out").exists()


class TestFingerprint:
    def test_changes_with_everything_that_decides_the_result(self, ct_file, toy):
        engine = toy.engine()
        base = fingerprint(ct_file, CaseOptions(), engine)
        assert base == fingerprint(ct_file, CaseOptions(), engine)
        assert base == fingerprint(ct_file, CaseOptions(device="cpu"), engine)
        others = {fingerprint(ct_file, CaseOptions(quality="full"), engine)}
        others.add(fingerprint(ct_file, CaseOptions(formats=("stl",)), engine))
        others.add(fingerprint(ct_file, CaseOptions(), ToyEngine(weights="b").engine()))
        os.utime(ct_file, ns=(1, 1))
        others.add(fingerprint(ct_file, CaseOptions(), engine))
        assert base not in others
        assert len(others) == 4

    def test_sees_a_new_slice_in_a_dicom_folder(self, tmp_path, toy):
        (tmp_path / "1.dcm").write_bytes(b"x")
        before = fingerprint(tmp_path, CaseOptions(), toy.engine())
        (tmp_path / "2.dcm").write_bytes(b"x")
        assert fingerprint(tmp_path, CaseOptions(), toy.engine()) != before


class TestFindStudies:
    def test_finds_images_and_dicom_folders_at_any_depth(self, tmp_path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        (tmp_path / "a" / "b" / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(10))
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "1.dcm").write_bytes(b"no mark")
        for name in ("x.nii.gz", "y.NRRD", "readme.txt", ".hidden.nii", "labels.seg.nrrd", "c/z.mha"):
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "notes").write_bytes(bytes(500))
        (tmp_path / ".trash").mkdir()
        (tmp_path / ".trash" / "old.nii").write_bytes(b"")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "result.nii.gz").write_bytes(b"")
        found = {study.name: study.source for study in find_studies(tmp_path, tmp_path / "out")}
        assert found == {
            "a__b": tmp_path / "a" / "b",
            "c": tmp_path / "c",
            "c__z": tmp_path / "c" / "z.mha",
            "x": tmp_path / "x.nii.gz",
            "y": tmp_path / "y.NRRD",
        }

    def test_knows_its_own_output_however_it_is_written(self, tmp_path, monkeypatch):
        (tmp_path / "in" / "out").mkdir(parents=True)
        for name in ("a.nii", "out/result.nii"):
            (tmp_path / "in" / name).write_bytes(b"")
        monkeypatch.chdir(tmp_path)
        for output in (Path("in/out"), tmp_path / "in" / "out", Path("in/../in/out")):
            assert [study.name for study in find_studies(Path("in"), output)] == ["a"]

    def test_gives_each_study_a_name_of_its_own(self, tmp_path):
        (tmp_path / "a").mkdir()
        for name in ("a.nii", "a.nii.gz", "a.mha", "a/1.dcm", "b.nii"):
            (tmp_path / name).write_bytes(b"")
        names = [study.name for study in find_studies(tmp_path, tmp_path / "out")]
        assert len(set(names)) == len(names) == 5
        assert "b" in names

    def test_takes_a_single_series_folder(self, tmp_path):
        (tmp_path / "1.dcm").write_bytes(b"")
        assert find_studies(tmp_path, tmp_path / "out") == [Study(tmp_path.name, tmp_path)]

    def test_takes_the_series_of_one_study_as_one_and_other_studies_apart(self, tmp_path):
        places = {"p1/lung": "1.2.3", "p1/soft": "1.2.3", "p2/before": "1.2.4", "p2/after": "1.2.5", "p3": "1.2.6"}
        for place, study in places.items():
            (tmp_path / place).mkdir(parents=True)
            write_dicom(tmp_path / place / "IM1", study)
        names = [study.name for study in find_studies(tmp_path, tmp_path / "out")]
        assert names == ["p1", "p2__after", "p2__before", "p3"]

    def test_says_when_there_is_nothing(self, tmp_path):
        with pytest.raises(UnsuitableImage, match="There is no CT in"):
            find_studies(tmp_path, tmp_path / "out")
        with pytest.raises(UnsuitableImage, match="is no folder"):
            find_studies(tmp_path / "x", tmp_path / "out")


class TestBatch:
    @pytest.fixture
    def studies(self, simple_chest, tmp_path) -> list[Study]:
        for name in ("a", "c"):
            write_ct(simple_chest, tmp_path / "in" / f"{name}.nii.gz")
        (tmp_path / "in" / "b.nii.gz").write_bytes(b"damaged")
        return find_studies(tmp_path / "in", tmp_path / "out")

    def test_goes_on_after_a_failed_study_and_tells_of_it(self, studies, tmp_path, toy):
        output = tmp_path / "out"
        outcomes = run_all(studies, output, toy)
        assert [outcome.status for outcome in outcomes] == [Status.DONE, Status.FAILED, Status.DONE]
        rows = list(csv.DictReader((output / SUMMARY).open(encoding="utf-8")))
        assert [row["status"] for row in rows] == ["done", "failed", "done"]
        assert rows[1]["message"].endswith("cannot be read.")
        assert float(rows[0]["lungs_ml"]) == json.loads((output / "a" / RECORD).read_text())["volumes_ml"]["lungs"]
        assert rows[1]["lungs_ml"] == ""
        assert "Traceback" in (output / LOGS / "b.log").read_text()
        assert "finished in" in (output / LOGS / "a.log").read_text()
        assert not (output / "b").exists()
        assert not leftovers(output)

    def test_an_unexpected_error_is_a_failed_study_too(self, studies, tmp_path, toy):
        def segment(ct, options, progress):
            raise ZeroDivisionError("oh")

        outcomes = list(run_batch(studies[:1], tmp_path / "out", CaseOptions(), replace(toy.engine(), segment=segment)))
        assert outcomes[0].status is Status.FAILED
        assert "ZeroDivisionError" in outcomes[0].message
        assert str(tmp_path / "out" / LOGS / "a.log") in outcomes[0].message

    def test_resumes_and_does_again_only_what_changed(self, studies, tmp_path, toy, simple_chest):
        output = tmp_path / "out"
        run_all(studies, output, toy)
        toy.segmented.clear()
        outcomes = run_all(studies, output, toy)
        assert [outcome.status for outcome in outcomes] == [Status.SKIPPED, Status.FAILED, Status.SKIPPED]
        assert toy.segmented == []
        rows = list(csv.DictReader((output / SUMMARY).open(encoding="utf-8")))
        assert float(rows[0]["lungs_ml"]) > 0
        write_ct(simple_chest.with_array(simple_chest.array + 1), studies[0].source)
        shutil.rmtree(output / "c")
        write_ct(simple_chest, studies[1].source)
        assert [outcome.status for outcome in run_all(studies, output, toy)] == [Status.DONE] * 3
        toy.weights = "b"
        assert [outcome.status for outcome in run_all(studies, output, toy)] == [Status.DONE] * 3

    def test_a_stop_keeps_what_is_finished_and_nothing_else(self, studies, tmp_path, toy):
        def segment(ct, options, progress):
            if ct.metadata["path"] == "c.nii.gz":
                raise Cancelled("stopped")
            return toy.segment(ct, options, progress)

        output = tmp_path / "out"
        with pytest.raises(Cancelled):
            list(run_batch(studies, output, CaseOptions(), replace(toy.engine(), segment=segment)))
        assert sorted(path.name for path in output.iterdir()) == ["a", LOGS, SUMMARY]
        assert len(list(csv.DictReader((output / SUMMARY).open()))) == 2
        assert run_all(studies, output, toy)[0].status is Status.SKIPPED
        assert (output / "c" / RECORD).is_file()
