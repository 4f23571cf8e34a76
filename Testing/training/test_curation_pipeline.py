"""Curation: found, gated, de-identified and packed; nothing lost, nothing twice, whatever dies in between."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import generate_uid

from LCTfoundLib.errors import OutputError
from LCTfoundLib.volume import Volume
from training.curation import local, shards
from training.curation.archive import decode, find_studies, read_reports
from training.curation.deidentify import DatePolicy, Deidentifier, site_key
from training.curation.errors import LeaseLost, LedgerError, UnreadableReport
from training.curation.ledger import MAX_ATTEMPTS, FoundStudy, Gate, Ledger, Outcome, State
from training.curation.quality import EdgeGate, edge_ratio, load_study
from training.curation.shards import ShardWriter, read_shard
from training.curation.stages import Packed, ReportLabels, Settings, classify_reports, pack, site_folders
from training.curation.synthetic import write_study

#: A forked child of a process with computing threads (torch, ITK) may wait for ever for a lock that one of them held.
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def chest(simple_chest) -> Volume:
    """16 slices, small enough for many studies."""
    part = simple_chest.crop((22, 0, 0), (38, 64, 88))
    return part.with_array(np.maximum(part.array, -1024))


def noisy(ct: Volume, rng) -> np.ndarray:
    """Noise everywhere but in the lungs, which still have to be found."""
    lung = (ct.array > -950) & (ct.array < -500)
    return np.where(lung, ct.array, ct.array + rng.normal(0, 400, ct.shape)).clip(-1024, 3000).astype(np.int16)


def sure(texts):
    return [ReportLabels({"emphysema": 0.97}, 0.95) for _ in texts]


def settings_of(archive: Path, out: Path, **options) -> Settings:
    _, key, folder = site_folders(out)
    return Settings(archive, folder, site_key(key), **options)


def curate(archive: Path, out: Path, classifier=sure, **options) -> Ledger:
    path, _, _ = site_folders(out)
    ledger = Ledger(path)
    ledger.add(find_studies(archive))
    classify_reports(ledger, classifier)
    local.run_workers(path, settings_of(archive, out, **options), workers=1, studies_per_shard=3)
    return ledger


def fake(key: str, **options) -> FoundStudy:
    return FoundStudy(key, "", key, (f"{key}/1.dcm",), "digest", {}, report="text", **options)


def ledger_with(path: Path, count: int, clock=time.time) -> Ledger:
    ledger = Ledger(path, clock=clock)
    ledger.add(fake(f"study{n}") for n in range(count))
    classify_reports(ledger, sure)
    return ledger


def all_packed(claim, shard=None):
    return [Outcome(study.id, State.PACKED if shard else State.EXCLUDED, Gate.PACKED) for study in claim.studies]


class TestFromArchiveToShards:
    def test_slices_come_out_as_they_went_in(self, chest, tmp_path):
        uid = write_study(tmp_path / "archive/a", chest, "Emphysema.", PatientID="P1")
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.states()[State.PACKED] == 1
            (shard,) = (tmp_path / "out/shards").iterdir()
            planes, facts = zip(*read_shard(shard), strict=True)
            np.testing.assert_array_equal(np.stack(planes), chest.array)
            assert [item["slice"] for item in facts] == list(range(16))
            assert facts[0]["labels"] == {"emphysema": 0.97}
            assert facts[0]["spacing"] == [4.0, 4.0, 4.0]
            assert facts[0]["study"] == Deidentifier(site_key(tmp_path / "out/private/site.key")).name("study", uid)
            row = ledger.shards()[0]
            assert row["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
            assert (row["studies"], row["slices"]) == (1, 16)

    def test_the_funnel_counts_each_gate(self, chest, tmp_path, rng):
        archive = tmp_path / "archive"
        write_study(archive / "good", chest, "Emphysema.")
        write_study(archive / "silent", chest)
        write_study(archive / "unsure", chest, "Perhaps?")
        write_study(archive / "gap", chest, "Emphysema.")
        for k in range(5, 9):
            (archive / f"gap/IM{k:04d}.dcm").unlink()
        noise = noisy(chest, rng)
        write_study(archive / "noisy", chest.with_array(noise), "Emphysema.")
        (archive / "broken").mkdir()
        (archive / "broken/IM1.dcm").write_bytes(b"\0" * 128 + b"DICM" + rng.bytes(50))
        (archive / "broken/report.txt").write_text("Emphysema.")

        def classifier(texts):
            return [ReportLabels({"emphysema": 0.97}, 0.6 if "?" in text else 0.95) for text in texts]

        with curate(archive, tmp_path / "out", classifier) as ledger:
            counts = {gate.name: number for gate, number in ledger.funnel().items()}
            wanted = {"FOUND": 6, "REPORT": 5, "CONFIDENT": 4, "INTACT": 2, "CLEAN": 1, "PACKED": 1}
            assert counts == wanted
            assert [(row["state"], row["reason"][:5]) for row in ledger.waiting()] == [("review", "noisy")]
            assert ledger.label_counts() == {"emphysema": 1}

    def test_a_second_run_does_nothing_and_takes_up_what_is_new(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest, "Emphysema.")
        curate(tmp_path / "archive", tmp_path / "out").close()
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").iterdir()}
        write_study(tmp_path / "archive/b", chest, "Emphysema.")
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").iterdir()}
            assert before.items() < after.items() and len(after) == 2
            assert set(ledger.events("packed").values()) == {1}

    def test_files_added_to_a_packed_study_are_seen_and_not_packed_again(self, chest, tmp_path):
        uid = write_study(tmp_path / "archive/a", chest, "Emphysema.")
        curate(tmp_path / "archive", tmp_path / "out").close()
        write_study(tmp_path / "archive/late", chest, StudyInstanceUID=uid)
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert [(row["key"], row["state"]) for row in ledger.waiting()] == [(uid, "packed")]
            assert ledger.totals()["studies"] == 1

    def test_studies_that_share_a_folder_or_spread_over_two_are_told_apart(self, chest, tmp_path):
        archive, uids = tmp_path / "archive", [generate_uid(), generate_uid()]
        for n, uid in enumerate(uids):
            write_study(tmp_path / f"made{n}", chest.with_array(chest.array + np.int16(n)), StudyInstanceUID=uid)
            for path in (tmp_path / f"made{n}").iterdir():
                target = archive / ("x" if int(path.stem[2:]) % 2 else "y") / f"{n}-{path.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        found = {study.key: study for study in find_studies(archive)}
        assert set(found) == set(uids)
        for n, uid in enumerate(uids):
            np.testing.assert_array_equal(load_study(archive, found[uid].files).array, chest.array + n)

    def test_a_damaged_slice_excludes_the_study(self, chest, tmp_path, rng):
        write_study(tmp_path / "archive/a", chest, "Emphysema.")
        victim = tmp_path / f"archive/a/IM{rng.integers(16):04d}.dcm"
        victim.write_bytes(victim.read_bytes()[: int(rng.integers(2000, 8000))])
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.states()[State.EXCLUDED] == 1
            assert list((tmp_path / "out/shards").iterdir()) == []

    def test_a_study_that_was_not_whole_is_tried_again_when_it_is(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest, "Emphysema.")
        for k in (5, 6, 7):
            (tmp_path / f"archive/a/IM{k:04d}.dcm").rename(tmp_path / f"IM{k:04d}.dcm")
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.states()[State.EXCLUDED] == 1
        for k in (5, 6, 7):
            (tmp_path / f"IM{k:04d}.dcm").rename(tmp_path / f"archive/a/IM{k:04d}.dcm")
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.states()[State.PACKED] == 1

    def test_several_processes_find_the_same(self, chest, tmp_path):
        for n in range(3):
            write_study(tmp_path / f"archive/{n}/x", chest.crop((0, 0, 0), (2, 64, 88)), f"Report {n}.")
        found = list(find_studies(tmp_path / "archive"))
        assert list(find_studies(tmp_path / "archive", processes=2)) == found
        assert [study.report for study in sorted(found, key=lambda s: s.files)] == [f"Report {n}." for n in range(3)]

    def test_a_file_that_vanished_is_tried_again_and_then_told(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest, "Emphysema.")
        path, _, _ = site_folders(tmp_path / "out")
        with Ledger(path) as ledger:
            ledger.add(find_studies(tmp_path / "archive"))
            classify_reports(ledger, sure)
            (tmp_path / "archive/a/IM0003.dcm").unlink()
            local.run_workers(path, settings_of(tmp_path / "archive", tmp_path / "out"), 1)
            assert ledger.states()[State.FAILED] == 1
            assert list(ledger.events("claimed").values()) == [MAX_ATTEMPTS]
            assert "does not answer" in ledger.waiting()[0]["reason"]

    def test_a_person_accepts_one_noisy_study_and_rejects_another(self, chest, tmp_path, rng):
        noise = noisy(chest, rng)
        uids = [write_study(tmp_path / f"archive/{n}", chest.with_array(noise), "Emphysema.") for n in range(2)]
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            ledger.decide(uids[0], accept=True)
            ledger.decide(uids[1], accept=False)
            with pytest.raises(LedgerError, match="does not wait for review"):
                ledger.decide(uids[1], accept=True)
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.states()[State.PACKED] == ledger.states()[State.EXCLUDED] == 1


class TestDeidentification:
    def test_no_original_identifier_survives_in_the_shards(self, chest, tmp_path, rng):
        secrets = [f"SECRET{rng.integers(10**8):08d}" for _ in range(12)]
        header = {
            "PatientName": f"{secrets[0]}^Ada", "PatientID": secrets[1], "AccessionNumber": secrets[2][:16],
            "StudyDescription": secrets[3], "SeriesDescription": secrets[4], "InstitutionName": secrets[5],
            "ReferringPhysicianName": secrets[6], "StationName": secrets[7][:16], "ConvolutionKernel": secrets[8],
            "Manufacturer": f"SIEMENS {secrets[9]}", "ProtocolName": secrets[10], "ContrastBolusAgent": secrets[11],
            "StudyDate": "20170316", "PatientBirthDate": "19310405", "PatientAge": "095Y", "PatientSex": "F",
            "StudyID": "98765", "KVP": "120",
        }  # fmt: skip
        uid = write_study(tmp_path / "archive/a", chest, f"Emphysema in {secrets[0]}.", **header)
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.totals()["studies"] == 1
        (shard,) = (tmp_path / "out/shards").iterdir()
        told = shard.read_bytes()  # names and JSON lie open in it; arrays are pixels only
        with tarfile.open(shard) as archive:
            told += b"".join(archive.extractfile(entry).read() for entry in archive)
        series = [str(value) for value in (uid, uid.split(".")[-1])]
        for word in (*secrets, *(s[:16] for s in secrets), *series, "20170316", "2017-03-16", "19310405", "98765"):
            assert word.encode() not in told
        _, facts = next(read_shard(shard))
        assert facts["sex"] == "F" and facts["age"] == 89 and facts["kvp"] == 120 and facts["contrast"] is True
        assert facts["vendor"] == "siemens" and "date" not in facts
        allowed = {"study", "patient", "slices", "spacing", "contrast", "vendor", "labels", "confidence", "kvp",
                   "thickness", "sex", "age", "date", "slice"}  # fmt: skip
        assert set(facts) <= allowed
        with tarfile.open(shard) as archive:
            assert {(e.mtime, e.uid, e.gid, e.uname, e.gname) for e in archive} == {(0, 0, 0, "", "")}

    def test_dates_move_by_the_patient_and_keep_intervals(self, rng):
        names = Deidentifier(rng.bytes(32), DatePolicy.SHIFT)
        first, second = (np.datetime64(names.date("P1", day)) for day in ("20200110", "20200210"))
        assert second - first == np.timedelta64(31, "D")
        moved = [np.datetime64(names.date(f"P{n}", "20200110")) - np.datetime64("2020-01-10") for n in range(200)]
        assert len(set(moved)) > 100 and np.timedelta64(0, "D") not in moved
        assert names.date("P1", "20201399") is None and names.date("P1", "") is None

    def test_hashes_depend_on_the_sites_key_and_the_key_stays(self, tmp_path):
        key = site_key(tmp_path / "private/site.key")
        assert site_key(tmp_path / "private/site.key") == key
        assert Deidentifier(key).name("study", "1.2") != Deidentifier(b"x" * 32).name("study", "1.2")
        assert Deidentifier(key).name("study", "1.2") != Deidentifier(key).name("patient", "1.2")
        if os.name == "posix":
            assert (tmp_path / "private/site.key").stat().st_mode & 0o077 == 0

    def test_the_key_is_not_shown_with_the_settings(self, tmp_path):
        settings = settings_of(tmp_path, tmp_path)
        assert repr(settings.key) not in repr(settings)

    def test_burned_in_writing_goes_to_review(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest, "Emphysema.", BurnedInAnnotation="YES")
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert "burned-in" in ledger.waiting()[0]["reason"]
            assert ledger.totals()["shards"] == 0


class TestLedger:
    def test_a_killed_workers_studies_are_taken_again_after_the_lease(self, tmp_path):
        now = [1000.0]
        ledger = ledger_with(tmp_path / "l.sqlite", 3, clock=lambda: now[0])
        dead = ledger.claim("dead", 3, lease=60)
        assert ledger.claim("other", 3, lease=60) is None
        now[0] += 61
        again = [ledger.claim("other", 3, lease=60) for _ in range(3)]
        assert [len(claim.studies) for claim in again] == [1, 1, 1]  # alone, to find out which one kills
        with pytest.raises(LeaseLost):
            ledger.commit(dead, all_packed(dead), None)
        for claim in again:
            ledger.commit(claim, all_packed(claim), None)
        assert set(ledger.events("excluded").values()) == {1}

    def test_a_living_worker_keeps_its_claim(self, tmp_path):
        now = [1000.0]
        ledger = ledger_with(tmp_path / "l.sqlite", 1, clock=lambda: now[0])
        claim = ledger.claim("slow", 1, lease=60)
        for _ in range(5):
            now[0] += 50
            assert ledger.renew(claim, 60)
            assert ledger.claim("other", 1, lease=60) is None
        ledger.commit(claim, all_packed(claim), None)

    def test_a_study_that_kills_its_workers_waits_for_a_person(self, tmp_path):
        now = [0.0]
        ledger = ledger_with(tmp_path / "l.sqlite", 1, clock=lambda: now[0])
        for _ in range(MAX_ATTEMPTS):
            assert ledger.claim("w", 1, lease=1) is not None
            now[0] += 2
        assert ledger.claim("w", 1, lease=1) is None
        assert ledger.states()[State.FAILED] == 1
        ledger.decide("study0", accept=True)
        assert ledger.claim("w", 1, lease=1) is not None

    def test_two_processes_never_get_the_same_study(self, tmp_path):
        ledger_with(tmp_path / "l.sqlite", 60).close()
        queue = SPAWN.SimpleQueue()
        workers = [SPAWN.Process(target=_claim_all, args=(tmp_path / "l.sqlite", queue)) for _ in range(4)]
        for worker in workers:
            worker.start()
        taken = [n for _ in workers for n in queue.get()]
        for worker in workers:
            worker.join()
        assert sorted(taken) == list(range(1, 61))

    def test_a_worker_killed_between_commit_and_rename_leaves_one_shard(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest, "Emphysema.")
        path, _, folder = site_folders(tmp_path / "out")
        settings = settings_of(tmp_path / "archive", tmp_path / "out")
        with Ledger(path) as ledger:
            ledger.add(find_studies(tmp_path / "archive"))
            classify_reports(ledger, sure)
            claim = ledger.claim("w", 5, 60)
            packed = pack(claim.studies, settings)
            ledger.commit(claim, packed.outcomes, packed.shard)
        assert not list(folder.glob("shard-*"))  # killed here
        local.run_workers(path, settings, 1)
        (shard,) = folder.iterdir()
        assert len(list(read_shard(shard))) == 16

    def test_a_worker_killed_before_the_commit_leaves_nothing_for_good(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest, "Emphysema.")
        path, _, folder = site_folders(tmp_path / "out")
        settings = settings_of(tmp_path / "archive", tmp_path / "out")
        with Ledger(path) as ledger:
            ledger.add(find_studies(tmp_path / "archive"))
            classify_reports(ledger, sure)
            pack(ledger.claim("w", 5, lease=0.0).studies, settings)  # killed here
        (orphan,) = folder.iterdir()
        os.utime(orphan, (0, 0))
        local.run_workers(path, settings, 1)
        (shard,) = folder.iterdir()
        assert shard.name.startswith("shard-") and len(list(read_shard(shard))) == 16

    def test_a_damaged_ledger_is_told(self, tmp_path, rng):
        (tmp_path / "l.sqlite").write_bytes(rng.bytes(8192))
        with pytest.raises(LedgerError, match="damaged"):
            Ledger(tmp_path / "l.sqlite")
        with pytest.raises(LedgerError, match="no ledger"):
            Ledger(tmp_path / "none.sqlite", create=False)

    def test_another_version_is_told(self, tmp_path):
        Ledger(tmp_path / "l.sqlite").close()
        with sqlite3.connect(tmp_path / "l.sqlite") as db:
            db.execute("PRAGMA user_version=99")
        with pytest.raises(LedgerError, match="version"):
            Ledger(tmp_path / "l.sqlite")


def _claim_all(path: Path, queue) -> None:
    taken = []
    with Ledger(path) as ledger:
        while claim := ledger.claim(str(os.getpid()), 3, 60):
            taken += [study.id for study in claim.studies]
    queue.put(taken)


def _slow_pack(studies, settings) -> Packed:
    (settings.shards.parent / f"taken-{os.getpid()}").touch()
    time.sleep(0.1)
    return pack(studies, settings)


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a signal")
def test_workers_killed_in_the_middle_lose_nothing_and_do_nothing_twice(chest, tmp_path, rng):
    count = 6
    uids = {write_study(tmp_path / f"archive/{n}", chest, "Emphysema.") for n in range(count)}
    path, _, folder = site_folders(tmp_path / "out")
    settings = settings_of(tmp_path / "archive", tmp_path / "out", edges=EdgeGate(slices=2))
    with Ledger(path) as ledger:
        ledger.add(find_studies(tmp_path / "archive"))
        classify_reports(ledger, sure)
    for _ in range(2):
        victim = SPAWN.Process(target=local.work, args=(path, settings, 2, 0.5, _slow_pack), daemon=True)
        victim.start()
        while not (tmp_path / f"out/taken-{victim.pid}").exists():
            assert victim.is_alive()
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.5)))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    local.run_workers(path, settings, 1, studies_per_shard=2, lease=0.5)
    with Ledger(path) as ledger:
        assert ledger.states()[State.PACKED] == count
        assert set(ledger.events("packed")) == uids and set(ledger.events("packed").values()) == {1}
        named = {row["name"] for row in ledger.shards()}
    names = Deidentifier(settings.key)
    told = [facts["study"] for shard in folder.glob("shard-*.tar") for _, facts in read_shard(shard)]
    assert {shard.name for shard in folder.glob("shard-*.tar")} == named
    assert sorted(told) == sorted(names.name("study", uid) for uid in uids for _ in range(16))


@pytest.mark.parametrize("full_after", [0, 20_000, 200_000])
def test_a_full_disk_leaves_no_half_shard_and_a_whole_ledger(full_after, chest, tmp_path, monkeypatch):
    for n in range(3):
        write_study(tmp_path / f"archive/{n}", chest, "Emphysema.")
    written = [0]
    append = ShardWriter._append

    def fill(self, name, data):
        written[0] += len(data)
        if written[0] > full_after:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, name, data)

    monkeypatch.setattr(shards.ShardWriter, "_append", fill)
    with pytest.raises(OutputError, match="full; free some space"):
        curate(tmp_path / "archive", tmp_path / "out")
    assert list((tmp_path / "out/shards").iterdir()) == []
    with Ledger(site_folders(tmp_path / "out")[0]) as ledger:
        assert ledger.states()[State.READY] == 3
    monkeypatch.undo()
    with curate(tmp_path / "archive", tmp_path / "out") as ledger:
        assert ledger.totals()["studies"] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_really_full_device(chest, tmp_path, monkeypatch):
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a: opened(Path("/dev/full") if self.suffix == ".tar" else self, *a))
    with pytest.raises(OutputError, match="full"), ShardWriter(tmp_path) as writer:
        writer.add(chest.array, {"study": "a"})
        writer.close()


class TestEdges:
    def test_agrees_with_edges_counted_by_hand(self):
        plane = np.full((64, 64), -1000, np.int16)
        plane[:, 32:] = 0
        assert edge_ratio(plane) == pytest.approx(64 / 64**2, rel=0.1)  # one line of edge pixels
        assert edge_ratio(np.zeros((64, 64), np.int16)) == 0

    def test_grows_with_noise_and_passes_the_papers_threshold(self, chest, rng):
        ratios = [edge_ratio(chest.array[8] + rng.normal(0, sd, chest.shape[1:])) for sd in (0, 100, 300, 600)]
        assert ratios == sorted(ratios) and ratios[0] < 0.1 and ratios[-1] > 0.2

    def test_a_few_noisy_slices_make_no_noisy_study(self, chest, rng):
        array = chest.array.copy()
        array[:1] = array[:1] + rng.normal(0, 600, array[:1].shape)
        gate = EdgeGate(slices=0)
        assert gate.is_clean(gate.measure(chest.with_array(array)))
        array[:4] = array[:4] + rng.normal(0, 600, array[:4].shape)
        assert not gate.is_clean(gate.measure(chest.with_array(array)))


class TestReports:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
    def test_known_encodings(self, encoding):
        text = "双肺气肿，未见胸腔积液。CT"
        assert decode(text.encode(encoding), "r.txt") == text

    @pytest.mark.parametrize("data", ["Gefäße weiß, Größe".encode("cp1252"), b"\x00\x01\xff", b"\xff\xfe\xfd"])
    def test_an_unknown_encoding_is_not_guessed_at(self, data):
        with pytest.raises(UnreadableReport, match="--encoding"):
            decode(data, "r.txt")
        assert decode("Gefäße".encode("cp1252"), "r.txt", "cp1252") == "Gefäße"

    def test_a_study_whose_report_is_unreadable_is_kept_for_review(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest)
        (tmp_path / "archive/a/report.txt").write_bytes("Gefäße, Größe".encode("cp1252"))
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert "unknown encoding" in ledger.waiting()[0]["reason"]
            assert ledger.states()[State.REVIEW] == 1

    def test_csv_json_lines_and_folder_say_the_same(self, tmp_path):
        wanted = {"A1": 'Emphysema, "mild".', "A2": "No nodule.\nNormal."}
        rows = [{"AccessionNo": key, "report_text": text} for key, text in wanted.items()]
        quoted = [f'{row["AccessionNo"]},"{row["report_text"].replace(chr(34), chr(34) * 2)}"' for row in rows]
        (tmp_path / "r.csv").write_text("\n".join(["AccessionNo,report_text", *quoted]))
        (tmp_path / "r.json").write_text(json.dumps(rows))
        (tmp_path / "d.json").write_text(json.dumps(wanted))
        (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        (tmp_path / "texts").mkdir()
        for key, text in wanted.items():
            (tmp_path / f"texts/{key}.txt").write_text(text)
        for name in ("r.csv", "r.json", "d.json", "r.jsonl", "texts"):
            assert read_reports(tmp_path / name).texts == wanted

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("r.csv", "a,b\n1,2\n", "needs an id"),
            ("r.json", "{", "no valid JSON"),
            ("r.json", "[1, 2]", "no list of reports"),
            ("r.json", "[]", "holds no report"),
            ("r.xml", "<a/>", "no CSV, JSON"),
        ],
    )
    def test_other_layouts_are_told(self, name, text, words, tmp_path):
        (tmp_path / name).write_text(text)
        with pytest.raises(UnreadableReport, match=words):
            read_reports(tmp_path / name)
        with pytest.raises(UnreadableReport, match="cannot be read"):
            read_reports(tmp_path / "none.csv")

    def test_reports_are_matched_by_study_or_accession(self, chest, tmp_path):
        few = chest.crop((0, 0, 0), (2, 64, 88))
        by_uid = write_study(tmp_path / "a/1", few)
        by_accession = write_study(tmp_path / "a/2", few, AccessionNumber="ACC7")
        (tmp_path / "r.json").write_text(json.dumps({by_uid: "one", "ACC7": "two"}))
        found = {study.key: study.report for study in find_studies(tmp_path / "a", read_reports(tmp_path / "r.json"))}
        assert found == {by_uid: "one", by_accession: "two"}

    def test_a_report_that_comes_later_brings_its_study_back(self, chest, tmp_path):
        write_study(tmp_path / "archive/a", chest)
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.states()[State.EXCLUDED] == 1
        (tmp_path / "archive/a/report.txt").write_text("Emphysema.")
        with curate(tmp_path / "archive", tmp_path / "out") as ledger:
            assert ledger.states()[State.PACKED] == 1
