"""The shell: what it prints where, its exit codes, and that it stops cleanly."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from LCTfoundLib import cli, demo, doctor
from LCTfoundLib.case import RECORD, CaseOptions
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.runtime.progress import Progress, Report
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_io import read_volume, write_volume
from LCTfoundLib.weights.registry import Card, DataSource, save_weight
from Testing.engine.toy_engine import ToyEngine, lungs_by_threshold, write_ct

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def toy() -> ToyEngine:
    return ToyEngine()


@pytest.fixture
def ct_file(simple_chest: Volume, tmp_path: Path) -> Path:
    return write_ct(simple_chest, tmp_path / "in" / "chest.nii.gz")


def run(toy: ToyEngine, *arguments: object, **steps: object) -> int:
    return cli.main([str(argument) for argument in arguments], replace(toy.engine(), **steps))


class TestSegmentLungs:
    def test_prints_only_the_result_folder_on_standard_output(self, ct_file, tmp_path, toy, capsys):
        out = tmp_path / "out"
        assert run(toy, "segment-lungs", ct_file, out) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{out}\n"
        assert "Reading the CT: 0 %" in captured.err
        assert re.search(r"Done in \d+ s, peak memory \d", captured.err)
        assert "thick slices" in captured.err
        assert np.load(out / "segments.npy").any()

    def test_hands_the_options_to_the_engine(self, ct_file, tmp_path, toy):
        seen = []

        def segment(ct, options, progress):
            seen.append(options)
            return toy.segment(ct, options, progress)

        arguments = ["--device", "cpu", "--quality", "fast", "--format", "stl, report", "--weights-folder", "w"]
        assert run(toy, "segment-lungs", ct_file, tmp_path / "out", *arguments, segment=segment) == 0
        assert seen == [CaseOptions("cpu", "fast", ("stl", "report"), Path("w"))]

    def test_json_lines_tell_everything(self, ct_file, tmp_path, toy, capsys):
        assert run(toy, "segment-lungs", ct_file, tmp_path / "out", "--jsonl") == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        fractions = [event["fraction"] for event in events if event["event"] == "progress"]
        assert len(fractions) >= 3
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        assert events[-1]["event"] == "result"
        assert events[-1]["folder"] == str(tmp_path / "out")
        assert events[-1]["findings"] == ["thick slices"]

    def test_a_mendable_error_is_one_sentence_and_code_2(self, tmp_path, toy, capsys):
        assert run(toy, "segment-lungs", tmp_path / "nowhere", tmp_path / "out") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert (
            captured.err == f"lctfound: There is no file or folder {tmp_path / 'nowhere'}; check the path of the CT.\n"
        )
        assert os.listdir(tmp_path) == []

    def test_json_lines_carry_the_error_too(self, tmp_path, toy, capsys):
        assert run(toy, "segment-lungs", tmp_path / "nowhere", tmp_path / "out", "--jsonl") == 2
        event = json.loads(capsys.readouterr().out)
        assert event["event"] == "error"
        assert "There is no file" in event["message"]

    def test_an_unexpected_error_points_to_a_log(self, ct_file, tmp_path, toy, capsys):
        def segment(ct, options, progress):
            raise ZeroDivisionError("secret detail")

        assert run(toy, "segment-lungs", ct_file, tmp_path / "out", segment=segment) == 1
        sentence = capsys.readouterr().err.splitlines()[-1]
        log = Path(re.search(r"log (\S+)$", sentence)[1])
        assert "ZeroDivisionError: secret detail" in log.read_text()
        log.unlink()
        assert sorted(os.listdir(tmp_path)) == ["in"]

    @pytest.mark.parametrize(
        "arguments", [[], ["segment-lungs"], ["segment-lungs", "a", "b", "--device", "tpu"], ["x"]]
    )
    def test_wrong_usage_is_code_2(self, arguments, toy, capsys):
        with pytest.raises(SystemExit) as stop:
            run(toy, *arguments)
        assert stop.value.code == 2
        assert "usage: lctfound" in capsys.readouterr().err


class TestBatch:
    def test_is_code_1_when_a_study_failed_and_0_when_all_are_done(self, simple_chest, tmp_path, toy, capsys):
        for name in "ab":
            write_ct(simple_chest, tmp_path / "in" / f"{name}.nii.gz")
        out = tmp_path / "out"

        def read(path: Path, progress: Progress) -> Volume:
            if path.name == "a.nii.gz":
                raise UnsuitableImage("not a CT")
            return toy.read(path, progress)

        assert run(toy, "segment-lungs", tmp_path / "in", out, "--batch", read=read) == 1
        captured = capsys.readouterr()
        assert captured.out == f"{out / 'b'}\n"
        assert "a: failed: not a CT" in captured.err
        assert "[2/2] b: Reading the CT: 0 %" in captured.err
        assert f"1 of 2 studies have a result; see {out / 'summary.csv'}" in captured.err
        assert run(toy, "segment-lungs", tmp_path / "in", out, "--batch") == 0
        assert capsys.readouterr().out == f"{out / 'a'}\n{out / 'b'}\n"
        assert toy.segmented == ["b.nii.gz", "a.nii.gz"]


class TestStopping:
    SCRIPT = """
import sys, time
from LCTfoundLib import cli
from Testing.engine.toy_engine import ToyEngine
class Slow(ToyEngine):
    def segment(self, ct, options, progress):
        print("working", file=sys.stderr, flush=True)
        time.sleep(60)
sys.exit(cli.main(sys.argv[1:], Slow().engine()))
"""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_leaves_nothing_and_is_code_130(self, number, ct_file, tmp_path):
        command = [sys.executable, "-c", self.SCRIPT, "segment-lungs", str(ct_file), str(tmp_path / "out")]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for line in process.stderr:
            if line.startswith("working"):
                break
        start = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - start < 5
        assert process.returncode == 130
        assert err.splitlines() == ["lctfound: Stopped; nothing unfinished was left behind."]
        assert out == ""
        assert sorted(os.listdir(tmp_path)) == ["in"]

    def test_leaves_the_signal_handlers_as_they_were(self, ct_file, tmp_path, toy):
        before = signal.getsignal(signal.SIGINT)
        run(toy, "segment-lungs", ct_file, tmp_path / "out")
        assert signal.getsignal(signal.SIGINT) is before


class TestConsole:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def test_keeps_one_live_line_on_a_terminal(self):
        err = self.Terminal()
        console = cli.Console(False, io.StringIO(), err)
        listener = console.progress("[1/2] ")._root.listener
        listener(Report("Fine network", 0.25, 10.0, 95.4))
        listener(Report("Fine network", 0.26, 10.0, None))
        console.note("done")
        assert err.getvalue() == (
            "\r\x1b[K[1/2] Fine network: 25 %, 1:35 left\r\x1b[K[1/2] Fine network: 26 %\r\x1b[Kdone\n"
        )

    def test_writes_a_line_per_tenth_elsewhere(self):
        err = io.StringIO()
        listener = cli.Console(False, io.StringIO(), err).progress()._root.listener
        for percent in range(0, 101):
            listener(Report(f"Stage {percent}", percent / 100, 1.0, None))
        assert len(err.getvalue().splitlines()) == 11

    def test_writes_a_line_now_and_then_while_nothing_seems_to_move(self):
        err = io.StringIO()
        listener = cli.Console(False, io.StringIO(), err).progress()._root.listener
        for second in range(61):
            listener(Report("Net", 0.55, second, None))
        assert len(err.getvalue().splitlines()) == 7


class TestDemo:
    def test_compares_with_the_machine_labels_of_its_case(self, simple_chest, tmp_path, toy, capsys, monkeypatch):
        monkeypatch.setenv("LCTFOUND_CACHE", str(tmp_path))
        folder, out = tmp_path / demo.CASE, tmp_path / "out"
        write_ct(simple_chest, folder / "cxr.nii.gz")
        names = [*demo.LOBE_LABELS.values(), "trachea"]
        (folder / "structures.csv").write_text("structure,id\n" + "".join(f"{n},{i}\n" for i, n in enumerate(names, 1)))
        ours = lungs_by_threshold(simple_chest).segments.array
        labels = np.where(ours == 1, names.index("lung_upper_lobe_right") + 1, 0).astype(np.uint8)
        write_ct(simple_chest.with_array(labels), folder / "mask.nii.gz")
        assert run(toy, "demo", out) == 0
        printed = capsys.readouterr().out
        assert re.search(r"^Right upper lobe +1\.000", printed, re.MULTILINE)
        assert re.search(r"^Left upper lobe +0\.000", printed, re.MULTILINE)
        assert re.search(r"^    Right S1 apical +\d+\.\d +0\.90$", printed, re.MULTILINE)
        assert "not ground truth" in printed
        assert "CC BY 3.0" in printed
        assert printed.splitlines()[-1] == str(out)
        assert json.loads((out / RECORD).read_text())["case"] == demo.CASE


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with a whole weight and one whose last byte is wrong."""
    folder = tmp_path / "weights"
    for name in ("toy_whole", "toy_damaged"):
        save_weight({"w": torch.rand(3)}, toy_card(name), folder)
    path = folder / "toy_damaged.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return folder


def toy_card(name: str) -> Card:
    data = (DataSource("phantom", "Apache-2.0"),)
    return Card(
        name, "1", "test", "Net", {}, (1.0, 1.0, 1.0), ("a",), data, "Apache-2.0", 0, "c", {}, "tests", "all else"
    )


class TestWeights:
    def run(self, *arguments: object) -> int:
        return cli.main(["weights", *map(str, arguments)])

    def test_list_names_them_with_task_and_license(self, weights, capsys):
        assert self.run("--weights-folder", weights) == 0
        out = capsys.readouterr().out
        assert re.search(r"toy_whole +1 +0\.0 MB +Apache-2.0 +test", out)

    def test_show_gives_the_card(self, weights, capsys):
        assert self.run("show", "toy_whole", "--weights-folder", weights) == 0
        assert json.loads(capsys.readouterr().out)["intended_use"] == "tests"

    def test_verify_finds_the_damaged_one(self, weights, capsys):
        assert self.run("verify", "toy_whole", "--weights-folder", weights) == 0
        assert capsys.readouterr().out == "toy_whole: as its card says\n"
        assert self.run("verify", "--weights-folder", weights, "--jsonl") == 2
        events = {event["name"]: event for event in map(json.loads, capsys.readouterr().out.splitlines())}
        assert events["toy_whole"]["problem"] == ""
        assert "checksum" in events["toy_damaged"]["problem"]

    def test_says_that_there_is_none_of_the_name(self, weights, capsys):
        assert self.run("show", "nothing", "--weights-folder", weights) == 2
        assert "There is no weight 'nothing' in" in capsys.readouterr().err


class TestDoctor:
    def test_marks_what_is_wrong(self, weights, capsys):
        assert cli.main(["doctor", "--weights-folder", str(weights)]) == 2
        captured = capsys.readouterr()
        assert re.search(r"^X Weight toy_damaged .*checksum", captured.out, re.MULTILINE)
        assert re.search(r"^  Weight toy_whole .*checksum right", captured.out, re.MULTILINE)
        assert re.search(r"^  CPU .*cores", captured.out, re.MULTILINE)
        assert "found a problem" in captured.err

    def test_warns_of_little_memory_and_disk(self, monkeypatch, tmp_path):
        monkeypatch.setattr(doctor, "free_memory", lambda: 2e9)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e8))
        found = {check.what: check for check in doctor.examine(tmp_path)}
        assert found["Memory for a run"].verdict is doctor.Verdict.WARNING
        assert found["Free disk"].verdict is doctor.Verdict.WARNING

    def test_knows_the_time_of_the_demo_once_it_ran(self, ct_file, tmp_path, toy):
        assert "not measured" in doctor.examine(tmp_path)[-1].value
        run(toy, "segment-lungs", ct_file, tmp_path / "output" / "demo", "--quality", "fast")
        assert re.match(r"the demo's CT took \d+ s here .*quality fast", doctor.examine(tmp_path)[-1].value)


class TestRealEngine:
    def test_help_does_not_wait_for_the_networks(self):
        code = "import sys; from LCTfoundLib import cli; print('torch' in sys.modules, 'vtk' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False"]

    def test_module_answers(self):
        command = [sys.executable, "-m", "LCTfoundLib", "--version"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("LCTfound 0.")

    @pytest.mark.end_to_end
    @pytest.mark.slow
    def test_segments_a_phantom_from_file_to_models(self, shipped_weights, phantom_case, tmp_path, capsys):
        source, out = tmp_path / "phantom.nii.gz", tmp_path / "out"
        write_volume(phantom_case.ct, source)
        arguments = ["--quality", "fast", "--device", "cpu", "--format", "nifti,stl,csv"]
        assert cli.main(["segment-lungs", str(source), str(out), *arguments]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        segments = read_volume(out / "labels" / "segments.nii.gz")
        trees = read_volume(out / "labels" / "trees.nii.gz").array
        assert segments.same_grid(phantom_case.ct)
        truth = phantom_case.segments.array > 0
        ours = segments.array > 0
        assert 2 * np.count_nonzero(ours & truth) / (ours.sum() + truth.sum()) > 0.9
        assert set(np.unique(trees)) == {0, 1, 2, 3}
        record = json.loads((out / RECORD).read_text())
        assert record["volumes_ml"]["lungs"] == pytest.approx(ours.sum() * segments.voxel_ml, rel=0.01)
        assert (out / "models" / "stl" / "airway.stl").stat().st_size > 10_000
