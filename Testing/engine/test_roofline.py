"""The acceleration report's counting against torch's own and by hand, its limits, its rules, and a real small run."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from LCTfoundLib.networks.backbone import Preset, backbone_config, build_backbone, parameter_count
from Testing.benchmarks import acceleration, acceleration_report, roofline
from Testing.benchmarks.roofline import Kind, Operation, Peaks, limit, torch_flops, trace

pytestmark = pytest.mark.usefixtures("one_thread")


def toy(rng: np.random.Generator, preset: str, **changes: Any) -> nn.Module:
    """A backbone of random widths, by shapes alone."""
    widths = tuple(int(width) for width in 8 * rng.integers(1, 5, 5))
    config = backbone_config(
        preset, block_out_channels=widths, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2, **changes
    )
    return build_backbone(config, "meta").eval()


def total(operations: list[Operation], what: str) -> int:
    return sum(getattr(operation, what) for operation in operations)


def peaks(rng: np.random.Generator) -> Peaks:
    speeds = np.sort(rng.uniform(1e9, 1e11, 3))[::-1]
    copies = [(2**power, float(speed)) for power, speed in zip((20, 24, 28), speeds, strict=True)]
    flops = {"fp32": float(rng.uniform(1e9, 1e12)), "bf16": float(rng.uniform(1e9, 1e12))}
    return Peaks(flops, float(rng.uniform(1e8, 1e11)), copies, {})


class Block(nn.Module):
    """Something with the inputs of a backbone, to be counted by hand."""

    def __init__(self, work: Any, parameters: nn.Module) -> None:
        super().__init__()
        self.work, self.parts = work, parameters

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return self.work(self.parts, images)


class TestCounting:
    @pytest.mark.parametrize("preset", list(Preset))
    def test_work_is_what_torch_counts(self, rng, preset):
        network, batch, size = toy(rng, preset), int(rng.integers(1, 4)), 16 * int(rng.integers(1, 4))
        assert total(trace(network, batch, size), "flops") == torch_flops(network, batch, size) > 0

    def test_the_published_backbone(self):
        network = build_backbone("paper", "meta")
        operations = trace(network)
        assert total(operations, "flops") == torch_flops(network)
        # Self-attention and attention to one condition token, 8 heads: 2 + 3 blocks at each of 128, 64 and 32, 1 at 16.
        by_hand = sum(count * 8 * side**2 * (side**2 + 1) for count, side in ((5, 128), (5, 64), (5, 32), (1, 16)))
        assert total(operations, "exponentials") == by_hand
        finest = [part for part in operations if part.kind is Kind.ATTENTION and part.positions == 128**2]
        # 8 heads of width 16: 64 operations for each exponential, scores and their sums with the values.
        assert total(finest, "flops") == 64 * total(finest, "exponentials") > 0.49 * total(operations, "flops")

    def test_lite_has_no_attention_above_32(self, rng):
        found = {part.positions for part in trace(toy(rng, "lite"), 1, 256) if part.kind is Kind.ATTENTION}
        assert found == {32**2, 16**2}

    def test_a_convolution_by_hand(self, rng):
        out, kernel, size = int(rng.integers(1, 20)), int(rng.choice([1, 3, 5])), 16 * int(rng.integers(1, 5))
        stride, batch = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        layer = nn.Conv2d(3, out, kernel, stride=stride, padding=kernel // 2, device="meta", dtype=torch.bfloat16)
        (found,) = trace(Block(lambda layer, images: layer(images), layer), batch, size)
        side = math.ceil(size / stride)
        assert (found.kind, found.positions, found.exponentials) == (Kind.CONVOLUTION, side**2, 0)
        assert found.flops == 2 * batch * out * side**2 * 3 * kernel**2
        assert found.read == 2 * (batch * 3 * size**2 + out * 3 * kernel**2 + out)
        assert found.written == 2 * batch * out * side**2
        assert found.moved(True) == found.moved(False) == found.read + found.written

    def test_attention_by_hand(self, rng):
        heads, width, keys = (int(number) for number in rng.integers(1, 9, 3))
        batch, size = int(rng.integers(1, 4)), 16

        def work(_parts: nn.Module, images: torch.Tensor) -> torch.Tensor:
            query = images.new_empty(batch, heads, size, width)
            key = images.new_empty(batch, heads, keys, width)
            return F.scaled_dot_product_attention(query, key, value=key)

        (found,) = trace(Block(work, nn.Linear(1, 1, device="meta")), batch, size)
        assert found.exponentials == batch * heads * size * keys
        assert found.flops == 2 * 2 * batch * heads * size * keys * width
        assert (found.read, found.written) == (
            4 * batch * heads * width * (size + 2 * keys),
            4 * batch * heads * size * width,
        )

    def test_views_move_nothing_and_repeated_values_once(self, rng):
        size = 16 * int(rng.integers(1, 4))

        def work(_parts: nn.Module, images: torch.Tensor) -> torch.Tensor:
            rows = images.flatten(2).transpose(1, 2).reshape(2, size, size, 3).permute(0, 3, 1, 2)[:, :1]
            return rows + rows[:1, :, :1, :1].expand(2, 1, size, size)

        found = trace(Block(work, nn.Linear(1, 1, device="meta")), 2, size)
        assert [part.name for part in found] == ["add"]
        assert (found[0].read, found[0].written) == (4 * (2 * size**2 + 1), 4 * 2 * size**2)
        assert found[0].moved(True) == 0 and found[0].moved(False) == found[0].read + found[0].written

    def test_a_batch_multiplies_the_work_and_shares_the_weights(self, rng):
        network = toy(rng, "student")
        one, four = trace(network, 1, 32), trace(network, 4, 32)
        assert total(four, "flops") == 4 * total(one, "flops")
        assert total(four, "exponentials") == 4 * total(one, "exponentials")
        moved = [sum(part.moved(True) for part in operations) for operations in (one, four)]
        weights = 4 * parameter_count(network)
        assert 4 * (moved[0] - weights) <= moved[1] < 4 * moved[0] - 2 * weights
        half = sum(part.moved(True) for part in trace(network.to(torch.bfloat16), 1, 32))
        assert half == pytest.approx(moved[0] / 2, rel=0.02)  # timesteps and their waves stay as they are


class TestLimit:
    def test_each_operation_takes_its_slowest_resource(self, rng):
        machine, names = peaks(rng), ("compute", "exponentials", "memory")
        operations = [
            Operation(Kind.ATTENTION, "", 1, *(int(value) for value in 10 ** rng.uniform(3, 10, 4))) for _ in range(50)
        ]
        times = np.array(
            [
                [
                    part.flops / machine.flops["bf16"],
                    part.exponentials / machine.exponentials,
                    machine.seconds_to_move(part.read + part.written),
                ]
                for part in operations
            ]
        )
        found = limit(operations, machine, "bf16")
        assert found.seconds == pytest.approx(times.max(axis=1).sum())
        for number, name in enumerate(names):
            assert getattr(found, name) == pytest.approx(times[times.argmax(axis=1) == number, number].sum())
        assert found.held_up_by == max(names, key=lambda name: getattr(found, name))

    def test_bytes_move_at_the_speed_of_a_copy_no_larger(self, rng):
        machine = peaks(rng)
        for (size, speed), following in zip(machine.copies, [*machine.copies[1:], (2**40, 0.0)], strict=True):
            count = int(rng.integers(size, following[0]))
            assert machine.seconds_to_move(count) == pytest.approx(count / speed)
        assert machine.seconds_to_move(5) == pytest.approx(5 / machine.copies[0][1])
        assert Peaks.from_dict(json.loads(json.dumps(machine.as_dict()))) == machine

    def test_without_fusion_it_is_no_shorter(self, rng):
        machine, operations = peaks(rng), trace(toy(rng, "student"), 1, 32)
        assert limit(operations, machine, "fp32", fused=False).memory > limit(operations, machine, "fp32").memory

    def test_measured_peaks_bound_what_runs(self, monkeypatch):
        monkeypatch.setattr(roofline, "_COPY_SIZES", ((2**16, 2**20), ()))
        found = roofline.measure_peaks(torch.device("cpu"), seconds=1.0)
        assert set(found.reached_by) == {"fp32", "bf16", "exponentials"}
        speeds = [speed for _, speed in found.copies]
        assert speeds == sorted(speeds, reverse=True) and found.bandwidth == speeds[-1] > 1e8
        assert min(found.flops.values()) > 1e9 and found.exponentials > 1e7


def run_of(mode: str, seconds: float, batch: int = 1, **changes: Any) -> dict[str, Any]:
    """A measured run, as the benchmark writes it."""
    facts = {"state": "measured", "spread": 0.0, "repeats": 3, "first": seconds, "memory": 1, "others": 0.0}
    run = {"preset": "student", "mode": mode, "batch": batch, "seconds": seconds, "difference": 0.0}
    return {**facts, **run, **changes}


def results_of(*runs: dict[str, Any], kind: str = "cpu") -> dict[str, Any]:
    modes = {
        name: {"precision": mode.precision, "graphs": mode.graphs, "compiled": bool(mode.compiled)}
        for name, mode in acceleration.MODES.items()
    }
    presets = dict.fromkeys(run["preset"] for run in runs)
    return {"modes": modes, "runs": list(runs), "features": [], "presets": presets, "machine": {"kind": kind}}


class TestRules:
    def test_the_fastest_that_needs_no_compiler_wins(self, rng):
        seconds = rng.uniform(0.1, 1)
        runs = [run_of("eager", 2 * seconds), run_of("bf16", seconds), run_of("compiled", seconds / 10)]
        choice = acceleration_report.choose(results_of(*runs), "student")
        assert choice is not None and choice.run is runs[1]
        runs[0]["seconds"] = seconds / 2
        assert acceleration_report.choose(results_of(*runs), "student").run is runs[0]

    def test_a_tie_goes_to_the_plainer(self, rng):
        seconds = rng.uniform(0.1, 1)
        runs = [
            run_of("bf16", seconds, 8),
            run_of("channels-last", seconds * 1.04, 4),
            run_of("channels-last", seconds * 1.045, 1),
            run_of("eager", seconds * 1.06),
        ]
        choice = acceleration_report.choose(results_of(*runs), "student")
        assert choice is not None and choice.run is runs[2] and choice.fastest is runs[0]

    def test_a_mode_with_another_answer_is_no_candidate(self):
        runs = [run_of("eager", 1.0), run_of("bf16", 0.5, difference=0.2), run_of("bf16", 0.3, 4, difference=None)]
        assert acceleration_report.choose(results_of(*runs), "student").run is runs[0]

    def test_compilation_is_won_back_after_so_many_slices(self, rng):
        slow, fast, compiling = rng.uniform(0.5, 1), rng.uniform(0.1, 0.4), rng.uniform(10, 90)
        runs = [run_of("eager", slow), run_of("compiled", fast, first=compiling + fast)]
        run, gain, slices = acceleration_report.compiled_gain(results_of(*runs), "student")
        assert run is runs[1] and gain == pytest.approx(slow / fast)
        # With it, that many slices and the compilation take as long as without.
        assert slices * fast + compiling == pytest.approx(slices * slow)
        runs[1]["seconds"] = 2 * slow
        assert math.isinf(acceleration_report.compiled_gain(results_of(*runs), "student")[2])

    def test_the_largest_preset_that_is_fast_enough(self):
        def preset(paper: float, student: float) -> tuple[str, bool] | None:
            runs = [run_of("eager", paper, preset="paper"), run_of("eager", student)]
            return acceleration_report.preset_for(results_of(*runs))

        assert preset(0.5, 0.1) == ("paper", True)
        assert preset(20.0, 0.5) == ("student", True)
        assert preset(20.0, 9.0) == ("student", False)
        nothing = run_of("eager", 0, state="no time")
        assert acceleration_report.preset_for(results_of(nothing)) is None

    def test_targets_are_judged_by_what_was_measured(self, rng):
        def verdicts(results: dict[str, Any]) -> list[str]:
            results["machine"]["threads"] = 2
            return [verdict for _, _, verdict in acceleration_report.targets(results)]

        slow = results_of(run_of("eager", 0.9), run_of("channels-last", rng.uniform(0.46, 0.8)), run_of("bf16", 0.1))
        slow["features"] = [
            {"preset": "student", "batch": 1, "state": "measured"}
            | {"together": 5.0, "apart": 4.0, "clean": 1.0, "all": 1.25}
        ]
        assert verdicts(slow) == ["**missed**", "-", "met", "**missed**"]
        fast = results_of(run_of("eager", 0.9), run_of("channels-last", rng.uniform(0.1, 0.45)))
        assert verdicts(fast) == ["met", "-", "-", "-"]
        runs = [run_of("eager", 3.0, 1, preset="paper"), run_of("eager", 2.0, 8, preset="paper")]
        gpu = results_of(*runs, run_of("graphs", rng.uniform(0.5, 0.99), 4, preset="paper"), kind="cuda")
        assert verdicts(gpu)[0] == "met"
        gpu["runs"][-1]["seconds"] = 1.5
        assert verdicts(gpu)[0] == "**missed**"


class TestMeasuring:
    def test_a_mode_out_of_time_or_killed_is_a_line_of_the_report(self, tmp_path, monkeypatch):
        program = tmp_path / "program.py"
        monkeypatch.setattr(acceleration, "__file__", str(program))
        monkeypatch.setattr(acceleration, "PATIENCE", 1.0)
        task = acceleration.Task("network", "cpu", 1, "student", "eager", (1, 2))
        first = (
            f"open(sys.argv[4], 'a').write({json.dumps({'batch': 1, 'state': 'measured', 'seconds': 1.0})!r} + '\\n')"
        )
        for end, state in (
            ("time.sleep(60)", "no time"),
            ("os.kill(os.getpid(), 9)", "out of memory"),
            ("raise ValueError('no compiler')", "failed"),
        ):
            program.write_text(f"import os, sys, time\n{first}\n{end}\n", encoding="utf-8")
            results = results_of()
            acceleration.add(results, task, tmp_path, share=1, left=1 if state == "no time" else 60)
            done, missing = results["runs"]
            assert (done["batch"], done["state"]) == (1, "measured")
            assert (missing["batch"], missing["state"]) == (2, state)
        assert missing["note"] == "ValueError: no compiler"

    def test_modes_give_the_eager_answer(self, tmp_path):
        written: dict[str, dict[str, Any]] = {}
        for name in ("eager", "channels-last", "bf16", "autocast"):
            task = acceleration.Task("network", "cpu", 1, "student", name, (1,), 16, 0.0, str(tmp_path / "answer.pt"))
            acceleration.run_here(task, lambda record, name=name: written.update({name: record}))
        assert {record["state"] for record in written.values()} == {"measured"}
        assert all(record["seconds"] > 0 and record["repeats"] >= 2 for record in written.values())
        assert written["eager"]["difference"] == 0 and written["channels-last"]["difference"] < 1e-4
        for name in ("bf16", "autocast"):
            assert 1e-4 < written[name]["difference"] < acceleration_report.MAX_DIFFERENCE

    def test_lack_of_memory_is_told_from_other_failures(self):
        with pytest.raises(RuntimeError) as error:
            torch.empty(2**50)
        assert acceleration.state_of(error.value) == "out of memory"
        assert acceleration.state_of(RuntimeError("no compiler found")) == "failed"

    def test_others_are_seen(self):
        busy = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
        with acceleration.Others() as others:
            end = acceleration.time.monotonic() + 0.5
            while acceleration.time.monotonic() < end:  # our own work is not theirs
                pass
            own = others.share()
        # Not a child of ours, or it would count as ours: started by a process that ends at once.
        starter = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {busy!r}], stdout=2).pid)"
        made = subprocess.run([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, check=True)
        process = acceleration.psutil.Process(int(made.stdout))
        try:
            share = acceleration.load_before(1.0)
        finally:
            process.kill()
        cores = acceleration.os.cpu_count() or 1
        assert share > 0.3 / cores
        assert own < 1 / cores + share  # a core of ours did not count, whatever others did

    @pytest.mark.slow
    def test_a_run_writes_numbers_a_report_and_a_picture(self, tmp_path):
        words = ["--presets", "student", "--batches", "1", "--modes", "eager,graphs", "--size", "16"]
        words += ["--threads", "1", "--minutes", "0.05", "--out", str(tmp_path)]
        options = acceleration.arguments(argparse.ArgumentParser(), words)
        options.load = 0.0
        acceleration_report.write_report(acceleration.measure(options), tmp_path)
        results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        eager = [run for run in results["runs"] if run["mode"] == "eager"]
        assert eager[0]["state"] == "measured" and eager[0]["seconds"] > 0 and eager[0]["difference"] == 0
        assert 2**27 < eager[0]["base_memory"] < eager[0]["memory"]
        graphs = next(run for run in results["runs"] if run["mode"] == "graphs")
        assert (graphs["state"], graphs["note"]) == ("failed", "needs a CUDA GPU")
        assert results["presets"]["student"]["parameters"] == parameter_count(build_backbone("student", "meta"))
        report = (tmp_path / "report.md").read_text(encoding="utf-8")
        choice = acceleration_report.choose(results, "student")
        assert f"**{choice.run['mode']}**" in report and "| student | graphs | 1 | failed |" in report
        from PIL import Image

        with Image.open(tmp_path / "roofline.png") as picture:
            assert picture.size[0] > 1000 and len(picture.convert("L").getcolors()) > 5

    @pytest.mark.parametrize(
        "words", [["--modes", "fast"], ["--presets", "large"], ["--size", "40"], ["--batches", "0"]]
    )
    def test_wrong_options_are_told(self, words, capsys):
        with pytest.raises(SystemExit):
            acceleration.arguments(argparse.ArgumentParser(), [*words, "--out", "x"])
        assert "error" in capsys.readouterr().err
