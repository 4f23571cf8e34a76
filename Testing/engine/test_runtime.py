"""Runtime: progress and cancel, device choice, files that appear whole, tiles that agree with the whole volume."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from torch import nn

from LCTfoundLib.errors import Cancelled, LCTfoundError, OutOfMemory, OutputError
from LCTfoundLib.runtime import device as device_module
from LCTfoundLib.runtime.device import DeviceChoice, Precision, choose_device, cpu_count, describe, free_memory
from LCTfoundLib.runtime.files import atomic_folder, atomic_path, output_errors
from LCTfoundLib.runtime.progress import CancelToken, JsonLines, Progress, Report
from LCTfoundLib.runtime.tiling import Blend, is_out_of_memory, sliding_window, tile_starts, tile_weights

CPU = DeviceChoice(torch.device("cpu"), Precision.FP32, "CPU", "test")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.2
        return self.now


class TestProgress:
    def test_nested_stages_add_up_and_never_fall(self):
        reports: list[Report] = []
        run = Progress(reports.append, clock=Clock())
        reading, network = run.split({"Reading": 1, "Network": 3})
        list(reading.track(range(4)))
        first, second = network.split({"": 1, "Fine net": 1})
        first.update(0.5)
        first.update(0.2)
        second.update(0.5, "Tile 3")
        by_stage = {report.stage: report.fraction for report in reports}
        run.done()
        fractions = [report.fraction for report in reports]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        assert by_stage["Reading"] == pytest.approx(0.25)
        assert by_stage["Network"] == pytest.approx(0.25 + 0.75 * 0.25)
        assert by_stage["Tile 3"] == pytest.approx(0.25 + 0.75 * 0.75)

    def test_time_left_follows_the_pace(self):
        clock = Clock()
        run = Progress(clock=clock)
        assert run.report.seconds_left is None
        clock.now += 10
        run.update(0.25)
        assert run.report.seconds_left == pytest.approx(30, rel=0.1)
        run.done()
        assert run.report.seconds_left == 0

    def test_a_listener_is_not_flooded(self):
        reports: list[Report] = []
        run = Progress(reports.append)
        for n in range(5000):
            run.update(n / 5000)
        run.done()
        assert len(reports) < 100
        assert reports[-1].fraction == 1.0

    def test_cancel_from_another_thread_stops_the_work(self):
        token = CancelToken()
        run = Progress(cancel=token)
        (part,) = run.split({"Work": 1})
        thread = threading.Thread(target=token.cancel)
        seen = []
        with pytest.raises(Cancelled, match="stopped"):
            for n in part.track(range(10)):
                seen.append(n)
                if n == 3:
                    thread.start()
                    thread.join()
        assert seen == [0, 1, 2, 3]

    def test_threads_can_share_a_progress(self):
        fractions: list[float] = []
        run = Progress(lambda report: fractions.append(report.fraction), clock=Clock())
        parts = run.split({f"part {n}": 1 for n in range(4)})
        threads = [threading.Thread(target=lambda p=part: list(p.track(range(200)))) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert fractions == sorted(fractions)
        assert run.report.fraction == 1.0

    def test_json_lines_are_one_object_each(self):
        stream = io.StringIO()
        lines = JsonLines(stream)
        run = Progress(lines, lines.warning, clock=Clock())
        (part,) = run.split({"Lésung\n2": 1})
        list(part.track(range(3)))
        part.warn("thick slices")
        events = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert {event["event"] for event in events} == {"progress", "warning"}
        assert events[0]["stage"] == "Lésung\n2"
        assert events[-1] == {"event": "warning", "message": "thick slices"}
        assert stream.getvalue().isascii()

    def test_a_generator_without_length_still_reports_its_end(self):
        run = Progress()
        assert list(run.track(iter("ab"))) == ["a", "b"]
        assert run.report.fraction == 1.0

    def test_bad_weights_are_refused(self):
        for weights in ({"a": 0.0}, {"a": 1.0, "b": -1.0}):
            with pytest.raises(ValueError, match="weights"):
                Progress().split(weights)

    def test_it_serves_as_a_plain_callback(self):
        run = Progress.of(None)
        run(0.5, "half")
        assert (run.report.fraction, run.report.stage) == (0.5, "half")


class TestDevice:
    def test_auto_takes_the_cpu_where_there_is_nothing_else_and_says_why(self, monkeypatch):
        monkeypatch.setattr(device_module, "_problem_with", lambda device: "" if device.type == "cpu" else "none here")
        choice = choose_device()
        assert choice.device.type == "cpu"
        assert "none here" in choice.reason

    def test_auto_prefers_cuda_then_mps(self, monkeypatch):
        monkeypatch.setattr(device_module, "_name_of", lambda device: "a GPU")
        monkeypatch.setattr(device_module, "_cuda_precision", lambda device: (Precision.BF16, "bf16"))
        monkeypatch.setattr(device_module, "_problem_with", lambda device: "")
        assert choose_device().device.type == "cuda"
        monkeypatch.setattr(device_module, "_problem_with", lambda device: "gone" if device.type == "cuda" else "")
        assert choose_device().device.type == "mps"

    def test_a_device_that_is_not_there_is_refused_with_a_remedy(self):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(LCTfoundError, match="choose 'auto' or 'cpu'"):
            choose_device("cuda")

    @pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "tpu:0", ""])
    def test_unknown_names_are_refused(self, name):
        with pytest.raises(LCTfoundError, match="There is no device"):
            choose_device(name)

    def test_the_precision_can_be_fixed(self):
        assert choose_device("cpu", "fp32").dtype == torch.float32
        assert choose_device("cpu", "bf16").precision is Precision.BF16
        with pytest.raises(LCTfoundError, match="precision"):
            choose_device("cpu", "fp8")

    @pytest.mark.parametrize(
        ("capability", "name", "expected"),
        [
            ((9, 0), "H100", Precision.BF16),
            ((7, 5), "Tesla T4", Precision.FP16),
            ((7, 5), "NVIDIA GeForce GTX 1660", Precision.FP32),
            ((6, 1), "GTX 1080", Precision.FP32),
        ],
    )
    def test_cuda_precision_by_generation(self, capability, name, expected, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert device_module.choose_precision(torch.device("cuda"))[0] is expected

    def test_a_containers_memory_limit_counts(self, tmp_path):
        assert device_module._cgroup_free(tmp_path) is None
        (tmp_path / "memory.max").write_text("1000\n")
        (tmp_path / "memory.current").write_text("700\n")
        (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
        assert device_module._cgroup_free(tmp_path) == 400
        (tmp_path / "memory.max").write_text("max\n")
        assert device_module._cgroup_free(tmp_path) is None

    def test_describe_and_memory(self):
        lines = dict(describe())
        assert {"System", "CPU", "Memory", "Device used", "Why"} <= set(lines)
        assert free_memory() > 2**20
        assert cpu_count() >= 1


class TestFiles:
    def test_a_file_appears_when_it_is_whole(self, tmp_path):
        target = tmp_path / "new" / "a.seg.nrrd"
        with atomic_path(target) as staging:
            assert staging.name.endswith(".seg.nrrd")
            staging.write_text("new")
            assert not target.exists()
        assert target.read_text() == "new"
        assert os.listdir(target.parent) == ["a.seg.nrrd"]

    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path):
        target = tmp_path / "a.txt"
        target.write_text("old")
        with pytest.raises(RuntimeError), atomic_path(target) as staging:
            staging.write_text("half")
            raise RuntimeError
        assert target.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_a_block_that_wrote_nothing_is_an_error(self, tmp_path):
        with pytest.raises(OutputError), atomic_path(tmp_path / "a.txt"):
            pass

    def test_a_folder_appears_when_it_is_whole(self, tmp_path):
        target = tmp_path / "result"
        with atomic_folder(target) as staging:
            (staging / "a").write_text("1")
            assert not target.exists()
        assert os.listdir(target) == ["a"]
        assert os.listdir(tmp_path) == ["result"]

    def test_a_folder_in_use_is_replaced_only_on_demand(self, tmp_path):
        target = tmp_path / "result"
        target.mkdir()
        (target / "old").touch()
        with pytest.raises(OutputError, match="already there"), atomic_folder(target):
            pass
        with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as staging:
            (staging / "half").touch()
            raise RuntimeError
        assert os.listdir(target) == ["old"]
        with atomic_folder(target, overwrite=True) as staging:
            (staging / "new").touch()
        assert os.listdir(target) == ["new"]
        assert os.listdir(tmp_path) == ["result"]

    @pytest.mark.parametrize(
        ("number", "message"),
        [(errno.ENOSPC, "full; free some space"), (errno.EROFS, "cannot be written"), (errno.EACCES, "another output")],
    )
    def test_errors_of_the_system_name_the_remedy(self, number, message):
        with pytest.raises(OutputError, match=message), output_errors(Path("x")):
            raise OSError(number, os.strerror(number))

    def test_a_file_in_the_way_of_a_folder(self, tmp_path):
        (tmp_path / "a").write_text("")
        with pytest.raises(OutputError), atomic_path(tmp_path / "a" / "b.txt"):
            pass
        with pytest.raises(OutputError, match="folder"), atomic_path(tmp_path):
            pass


def pointwise(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.sum(1, keepdim=True) * 0.37, x[:, :1].sin(), -x[:, :1]], 1)


class Limited(nn.Module):
    """A network that needs more memory than there is, for batches or tiles over a limit."""

    def __init__(self, max_voxels: int, error: type[Exception] = torch.cuda.OutOfMemoryError, on: str = "") -> None:
        super().__init__()
        self.max_voxels, self.error, self.on = max_voxels, error, on
        self.shapes: list[tuple[int, ...]] = []
        self.devices: list[str] = []

    def to(self, device, *rest):
        self.devices.append(str(device))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        limited = not self.on or self.devices[-1].startswith(self.on)
        if limited and x.numel() > self.max_voxels:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return pointwise(x)


class TestTiles:
    @pytest.mark.parametrize("blend", list(Blend))
    @pytest.mark.parametrize("accumulate", [torch.float32, torch.float16])
    def test_a_pointwise_network_gives_exactly_what_it_gives_on_the_whole(self, blend, accumulate, rng):
        size = rng.integers(5, 40, 3)
        image = torch.from_numpy(rng.normal(0, 1, (2, *size)).astype(np.float32))
        tile, overlap = rng.integers(3, 20, 3), float(rng.uniform(0, 0.8))
        result = sliding_window(
            pointwise, image, tile, 3, overlap=overlap, batch=int(rng.integers(1, 5)), device=CPU, blend=blend,
            multiple=int(rng.integers(1, 5)), accumulate=accumulate,
        )  # fmt: skip
        assert torch.equal(result, pointwise(image[None])[0].to(accumulate))

    def test_a_convolution_agrees_with_monai(self, rng):
        torch.manual_seed(int(rng.integers(2**31)))
        network = nn.Conv3d(1, 2, 5, padding=2)
        image = torch.from_numpy(rng.normal(0, 1, (1, 32, 28, 36)).astype(np.float32))
        # 16 of 32 with overlap .5 puts both libraries' tiles at the same places in k; i and j are a single tile.
        ours = sliding_window(network, image, (16, 28, 36), 2, overlap=0.5, batch=2, device=CPU)
        with torch.inference_mode():
            theirs = sliding_window_inference(image[None], (16, 28, 36), 2, network, overlap=0.5, mode="gaussian")
        torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-4)

    def test_the_gaussian_is_monais(self):
        expected = compute_importance_map((12, 9, 16), mode="gaussian", sigma_scale=0.125)
        torch.testing.assert_close(
            tile_weights((12, 9, 16), Blend.GAUSSIAN), expected.clamp(min=1e-3), atol=2e-3, rtol=1e-2
        )

    def test_overlap_hides_the_seams(self, rng):
        network = nn.Conv3d(1, 1, 7, padding=3)
        image = torch.from_numpy(rng.normal(0, 1, (1, 40, 24, 24)).astype(np.float32))
        with torch.inference_mode():
            whole = network(image[None])[0]
        errors = [
            float((sliding_window(network, image, (20, 24, 24), 1, overlap=o, device=CPU) - whole).abs().mean())
            for o in (0.0, 0.5)
        ]
        assert errors[1] < 0.5 * errors[0]

    @pytest.mark.parametrize("trial", range(20))
    def test_tiles_cover_with_the_overlap(self, trial, rng):
        size, tile, overlap = int(rng.integers(1, 200)), int(rng.integers(1, 60)), float(rng.uniform(0, 0.9))
        starts = tile_starts(size, tile, overlap)
        covered = np.zeros(max(size, tile), bool)
        for start in starts:
            covered[start : start + tile] = True
        assert covered[:size].all()
        assert starts == sorted(set(starts))
        assert starts[-1] + tile == max(size, tile)
        assert all(b - a <= max(1, int(tile * (1 - overlap))) for a, b in zip(starts, starts[1:], strict=False))

    def test_reduce_sees_every_plane_once_and_decides_what_stays(self, rng):
        image = torch.from_numpy(rng.normal(0, 1, (1, 31, 17, 14)).astype(np.float32))
        planes = []

        def arg_max(slab: torch.Tensor) -> torch.Tensor:
            planes.append(slab.shape[1])
            return slab.argmax(0).to(torch.uint8)

        result = sliding_window(pointwise, image, (8, 8, 8), 3, reduce=arg_max, device=CPU)
        assert sum(planes) == 31
        assert max(planes) <= 8
        assert result.dtype == torch.uint8
        assert torch.equal(result, pointwise(image[None])[0].argmax(0).to(torch.uint8))

    def test_prepare_gets_the_place_of_each_tile(self, rng):
        image = torch.from_numpy(rng.integers(-1000, 1000, (1, 20, 13, 11)).astype(np.int16))

        def prepare(tile: torch.Tensor, start: tuple[int, int, int]) -> torch.Tensor:
            assert tile.dtype == torch.int16
            position = [torch.arange(n) + a for n, a in zip(tile.shape[1:], start, strict=True)]
            k, j, i = torch.meshgrid(*position, indexing="ij")
            return torch.stack([tile[0].float(), (k * 10000 + j * 100 + i).float()])

        result = sliding_window(lambda x: x, image, (7, 7, 7), 2, prepare=prepare, device=CPU)
        k, j, i = np.indices(image.shape[1:])
        np.testing.assert_array_equal(result[1], k * 10000 + j * 100 + i)
        np.testing.assert_array_equal(result[0], image[0])

    def test_tiles_outside_of_the_mask_are_skipped(self, rng):
        image = torch.from_numpy(rng.normal(0, 1, (1, 40, 40, 40)).astype(np.float32))
        mask = np.zeros((40, 40, 40), bool)
        mask[3:13, 30:38, 20:22] = True
        calls = Limited(10**9)
        result = sliding_window(calls, image, (10, 10, 10), 3, mask=mask, overlap=0.0, device=CPU)
        assert len(calls.shapes) == 2  # of 64: k = 3-12 lies in two, j and i in one
        expected = pointwise(image[None])[0]
        inside = torch.from_numpy(mask)
        assert torch.equal(result[:, inside], expected[:, inside])
        assert (result[:, ~inside] == 0).all()

    def test_an_empty_mask_needs_no_network(self):
        result = sliding_window(pointwise, torch.ones(1, 9, 9, 9), (4, 4, 4), 3, mask=np.zeros((9, 9, 9)), device=CPU)
        assert result.shape == (3, 9, 9, 9)
        assert not result.any()

    def test_an_image_smaller_than_the_tile_is_padded_to_the_networks_divisor_only(self):
        seen = Limited(10**9)
        image = torch.arange(5 * 6 * 7, dtype=torch.float32).view(1, 5, 6, 7)
        result = sliding_window(seen, image, (64, 64, 64), 3, multiple=4, device=CPU)
        assert seen.shapes == [(1, 1, 8, 8, 8)]
        assert torch.equal(result, pointwise(image[None])[0])

    @pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError, MemoryError])
    def test_out_of_memory_halves_the_batch_and_then_the_tile(self, error, rng):
        image = torch.from_numpy(rng.normal(0, 1, (1, 70, 70, 70)).astype(np.float32))
        network = Limited(40 * 40 * 70, error)
        result = sliding_window(network, image, (64, 64, 64), 3, batch=4, device=CPU)
        assert torch.equal(result, pointwise(image[None])[0])
        tried = list(dict.fromkeys(shape for shape in network.shapes))
        assert [shape[0] for shape in tried[:3]] == [4, 2, 1]
        assert sorted(tried[-1][2:]) == [32, 32, 64]

    def test_out_of_memory_goes_to_the_cpu_in_the_end(self, rng):
        """torch's ``meta`` device stands for a GPU: its tensors have a shape and no memory at all."""
        gpu = DeviceChoice(torch.device("meta"), Precision.FP32, "GPU", "test")
        image = torch.from_numpy(rng.normal(0, 1, (1, 40, 40, 40)).astype(np.float32))
        network, warnings = Limited(10, on="meta"), []
        progress = Progress(warn=warnings.append)
        result = sliding_window(network, image, (40, 40, 40), 3, batch=2, device=gpu, progress=progress)
        assert torch.equal(result, pointwise(image[None])[0])
        assert network.devices[-1] == "cpu"
        assert network.shapes[-1] == (1, 1, 40, 40, 40)
        assert len(warnings) == 1 and "CPU" in warnings[0]

    def test_when_nothing_fits_the_user_is_told(self):
        network = Limited(10)
        with pytest.raises(OutOfMemory, match="close other programs"):
            sliding_window(network, torch.zeros(1, 64, 64, 64), (64, 64, 64), 3, batch=2, device=CPU)
        assert network.shapes[-1] == (1, 1, 32, 32, 32)

    def test_other_errors_are_not_hidden(self):
        def broken(x):
            raise RuntimeError("shape mismatch")

        with pytest.raises(RuntimeError, match="shape mismatch"):
            sliding_window(broken, torch.zeros(1, 4, 4, 4), (4, 4, 4), 1, device=CPU)
        assert not is_out_of_memory(ValueError("out of memory"))

    def test_a_wrong_number_of_channels_is_refused(self):
        with pytest.raises(ValueError, match="answered"):
            sliding_window(pointwise, torch.zeros(1, 4, 4, 4), (4, 4, 4), 5, device=CPU)

    @pytest.mark.parametrize(
        "changes", [{"tile": (0, 4, 4)}, {"overlap": 1.0}, {"batch": 0}, {"mask": np.ones((2, 2, 2))}]
    )
    def test_wrong_arguments_are_refused(self, changes):
        arguments = {"tile": (4, 4, 4), "out_channels": 3, "device": CPU, **changes}
        with pytest.raises(ValueError):
            sliding_window(pointwise, torch.zeros(1, 8, 8, 8), **arguments)

    def test_cancel_stops_between_tiles(self):
        token, calls = CancelToken(), []

        def network(x):
            calls.append(len(calls))
            if len(calls) == 3:
                token.cancel()
            return pointwise(x)

        with pytest.raises(Cancelled):
            sliding_window(
                network, torch.zeros(1, 32, 8, 8), (8, 8, 8), 3, overlap=0, device=CPU, progress=Progress(cancel=token)
            )
        assert len(calls) == 3

    def test_progress_rises_also_over_a_restart(self, rng):
        fractions: list[float] = []
        progress = Progress(lambda report: fractions.append(report.fraction), clock=Clock())
        image = torch.zeros(1, 70, 70, 70)
        sliding_window(Limited(40 * 64 * 64), image, (64, 64, 64), 3, batch=2, device=CPU, progress=progress)
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        assert len(fractions) > 4

    def test_bf16_runs_the_network_in_bf16(self):
        seen = []

        def network(x):
            y = nn.functional.conv3d(x, torch.ones(1, 1, 1, 1, 1))
            seen.append(y.dtype)
            return y

        half = DeviceChoice(torch.device("cpu"), Precision.BF16, "CPU", "test")
        result = sliding_window(network, torch.ones(1, 4, 4, 4), (4, 4, 4), 1, device=half)
        assert seen == [torch.bfloat16]
        assert result.dtype == torch.float32
