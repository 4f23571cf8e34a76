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

import numpy as np
import pytest

from LCTfoundLib import cli
from LCTfoundLib.case import CaseOptions
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.runtime.progress import Report
from LCTfoundLib.volume import Volume
from Testing.engine.toy_engine import ToyEngine, write_ct

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
        assert "Segmentation: " in captured.err
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

        def read(path: Path) -> Volume:
            if path.name == "a.nii.gz":
                raise UnsuitableImage("not a CT")
            return toy.read(path)

        assert run(toy, "segment-lungs", tmp_path / "in", out, "--batch", read=read) == 1
        captured = capsys.readouterr()
        assert captured.out == f"{out / 'b'}\n"
        assert "a: failed: not a CT" in captured.err
        assert "[2/2] b: Segmentation" in captured.err
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

    def test_writes_a_line_per_stage_and_tenth_elsewhere(self):
        err = io.StringIO()
        listener = cli.Console(False, io.StringIO(), err).progress()._root.listener
        for percent in range(0, 101):
            listener(Report("Net", percent / 100, 1.0, None))
        assert len(err.getvalue().splitlines()) == 11


class TestRealEngine:
    def test_help_does_not_wait_for_the_networks(self):
        code = "import sys; from LCTfoundLib import cli; print('torch' in sys.modules, 'vtk' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False"]

    def test_module_answers(self):
        command = [sys.executable, "-m", "LCTfoundLib", "--version"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("LCTfound 0.")
