"""Pretraining: the same samples whatever happens, targets that are right, and a resume that is bit for bit."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from LCTfoundLib.errors import OutputError
from LCTfoundLib.networks.conditions import FREEDOM, LUNG, MEDIASTINUM, WIDE, Disease, Scaling
from LCTfoundLib.networks.features import NoiseSchedule, Prediction
from LCTfoundLib.networks.foundation import InputRecipe, Slices
from training.curation.shards import ShardWriter, read_shard
from training.pretext import Kind, Pretext, masked_input, pretext_loss
from training.pretrain import Pretrainer, _Numbers, averaged_weights, main, newest_checkpoint
from training.shard_stream import (
    Augmentation,
    Mixture,
    ShardError,
    ShardIndex,
    SliceOrder,
    SliceSampler,
    SmallSlices,
    Source,
)

pytest.importorskip("accelerate", reason="accelerate is not installed (the extra 'training')")
pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW)
CONFIG = {
    "preset": "student",
    "seed": 5,
    "precision": "no",
    "network": {"block_out_channels": [8, 8, 8, 16, 16], "norm_num_groups": 4, "cross_attention_dim": 8},
    "input": {"slices": "neighbors", "scaling": "window"},
    "augmentation": {"size": 16, "canvas": 32, "whole": 0.5},
    "pretext": {"masked": 0.2, "slice": 0.1, "block": 4},
    "optimizer": {"lr": 2e-3, "warmup": 2, "steps": 6, "batch": 2, "accumulate": 2, "ema": 0.9},
}


def write_shards(folder: Path, rng: np.random.Generator) -> Path:
    """Five shards of one to three studies; the HU of a slice tell study and place."""
    study = 0
    for number in range(5):
        with ShardWriter(folder) as writer:
            for _ in range(1 + number % 3):
                slices = int(rng.integers(1, 6))
                hu = ndimage.gaussian_filter(rng.normal(0, 4000, (slices, 40, 36)), (0, 3, 3)) - 400
                hu[:, 0, 0], hu[:, 0, 1] = study, np.arange(slices)
                labels = {"emphysema": 0.97, "fibrosis": 0.1}
                writer.add(hu.astype(np.int16), {"study": f"s{study}", "labels": labels, "license": "CC0"})
                study += 1
            staged = writer.close()
        (folder / staged.staging).rename(folder / f"shard-{number}.tar")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), np.random.default_rng())


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the life of a process."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer_of(shards: Path, run: Path, config=CONFIG, **options) -> Pretrainer:
    return Pretrainer(config, [Source(shards)], run, **options)


def weights_of(trainer: Pretrainer) -> list[torch.Tensor]:
    return [value.detach().clone() for value in (*trainer.model.parameters(), *trainer.ema.shadow_params)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestOrder:
    def test_every_slice_once_an_epoch_and_in_another_order_each(self, shards, rng):
        index = ShardIndex(shards)
        order = SliceOrder(index, int(rng.integers(1000)), group=2)
        epochs = [[order(e * len(index) + n) for n in range(len(index))] for e in range(3)]
        assert all(sorted(epoch) == list(range(len(index))) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]

    def test_a_place_is_the_same_slice_however_one_comes_there(self, shards, rng):
        index, seed = ShardIndex(shards), int(rng.integers(1000))
        straight = SliceOrder(index, seed, group=2)
        wanted = [straight(n) for n in range(3 * len(index))]
        jumping = SliceOrder(index, seed, group=2)
        for n in rng.permutation(len(wanted)):
            assert jumping(int(n)) == wanted[n]

    def test_neighbors_stay_in_their_study_and_are_read_where_they_lie(self, shards):
        index = ShardIndex(shards)
        for number in range(len(index)):
            planes = [index.read(n) for n in index.neighbors(number)]
            study, place = planes[1][0, 0], planes[1][0, 1]
            assert index.studies[index.study[number]].name == f"s{study}"
            assert all(plane[0, 0] == study for plane in planes)
            last = np.flatnonzero(index.study == index.study[number])[-1] == number
            assert planes[0][0, 1] == max(place - 1, 0)
            assert planes[2][0, 1] == (place if last else place + 1)

    def test_sources_have_their_shares_and_each_its_own_order(self, shards, tmp_path):
        (tmp_path / "b").symlink_to(shards)
        mixture = Mixture([Source(shards, 0.7), Source(tmp_path / "b", 0.3)], seed=3)
        drawn = [mixture(n) for n in range(400)]
        for source, share in zip(mixture.indexes, (0.7, 0.3), strict=True):
            places = [place for index, place in drawn if index is source]
            assert len(places) == 400 * share
            count = len(source)
            assert sorted(places[:count]) == list(range(count))

    def test_a_step_takes_the_same_samples_with_any_number_of_processes(self, rng):
        step = int(rng.integers(100))
        one = _Numbers(step, 4, 2, 0, 1).__iter__()
        wanted = {n for _ in range(4) for n in next(one)}
        two = [_Numbers(step, 2, 2, rank, 2).__iter__() for rank in range(2)]
        assert {n for process in two for _ in range(2) for n in next(process)} == wanted

    def test_what_is_told(self, shards):
        assert {study.diseases for study in ShardIndex(shards).studies} == {(Disease.EMPHYSEMA,)}
        sampler = SliceSampler(Mixture([Source(shards)], 0), Augmentation(16, 32), RECIPE, 0)
        told = [sampler(n).condition for n in range(300)]
        assert 0 < sum(condition == FREEDOM for condition in told) < 45
        assert 90 < sum(bool(condition.diseases) for condition in told) < 200
        assert {condition.window for condition in told} == {None, LUNG, MEDIASTINUM}

    def test_windows_in_their_shares(self, shards):
        mixture, shares = Mixture([Source(shards)], 0), {"wide": 0.6, "lung": 0.4}
        sampler = SliceSampler(mixture, Augmentation(16, 32), RECIPE, 0, drop=False, windows=shares)
        drawn = [sampler(n) for n in range(300)]
        wide = [sample for sample in drawn if sample.condition.window == WIDE]
        assert {sample.condition.window for sample in drawn} == {WIDE, LUNG}
        assert abs(len(wide) - 180) < 45  # five standard deviations
        for unknown in ({"bone": 1.0}, {"lung": 0.0}, {"lung": 1.0, "wide": -0.5}):
            with pytest.raises(ShardError, match="windows"):
                SliceSampler(mixture, Augmentation(16, 32), RECIPE, 0, windows=unknown)

    def test_small_slices_fill_whole_batches(self, shards):
        mixture, small = Mixture([Source(shards)], 0), SmallSlices(8, 0.6, 300, 4)
        sampler = SliceSampler(mixture, Augmentation(16, 32), RECIPE, 0, small=small)
        drawn = [sampler(n) for n in range(400)]
        sizes = np.array([sample.image.shape[-1] for sample in drawn]).reshape(-1, 4)
        assert (sizes == sizes[:, :1]).all() and set(sizes.flat) == {8, 16}
        assert abs((sizes[:, 0] == 8).mean() - 0.6) < 0.25
        assert all(sample.most_noise == (1000 if sample.image.shape[-1] == 8 else 300) for sample in drawn)
        tasks = [Pretext().draw(tuple(s.image.shape), (0, s.number), s.most_noise).timestep for s in drawn]
        assert max(t for t, s in zip(tasks, drawn, strict=True) if s.most_noise == 300) < 300 <= max(tasks)

    @pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
    def test_damaged_shards_are_told(self, damage, shards, tmp_path, rng):
        whole = (shards / "shard-2.tar").read_bytes()
        data = {"cut": whole[: len(whole) // 2], "empty": b"", "noise": rng.bytes(5000)}[damage]
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(ShardError, match="no whole shard|damaged"):
            index = ShardIndex(tmp_path)
            [index.read(n) for n in range(len(index))]

    def test_a_cut_at_any_block_is_told(self, shards, tmp_path):
        whole = (shards / "shard-2.tar").read_bytes()
        content = len(whole.rstrip(b"\0"))
        for size in range(0, content, 512):  # a tar file's unit: nothing in the middle of an entry tells of these
            (tmp_path / "x.tar").write_bytes(whole[:size])
            with pytest.raises(ShardError, match="no whole shard"):
                ShardIndex(tmp_path)
            with pytest.raises(OutputError, match="no whole shard"):
                list(read_shard(tmp_path / "x.tar"))
        (tmp_path / "x.tar").write_bytes(whole)
        assert len(ShardIndex(tmp_path)) == len(list(read_shard(tmp_path / "x.tar"))) > 0

    def test_no_shards_and_no_share(self, shards, tmp_path):
        with pytest.raises(ShardError, match="no shard"):
            ShardIndex(tmp_path)
        with pytest.raises(ShardError, match="FOLDER:SHARE"):
            Mixture([Source(shards, 0.0)], 0)
        assert Source.parse("a/b:0.25") == Source(Path("a/b"), 0.25)
        assert Source.parse("C:/b") == Source(Path("C:/b"))


class TestAugmentation:
    def test_a_sample_is_interpolated_as_scipy_does(self, rng):
        hu = ndimage.gaussian_filter(rng.normal(0, 3000, (3, 48, 48)), (0, 4, 4)).astype(np.float32)
        plain = Augmentation(40, 48, whole=0.0, scale=(1.0, 1.0), flip=(0, 0), turn=0.0)
        seed = int(rng.integers(1000))
        placed = plain.place(torch.from_numpy(hu), np.random.default_rng(seed)).numpy()
        draws = np.random.default_rng(seed)
        draws.uniform(1, 1), draws.random()
        reach = (48 - 40) / 48
        shift = draws.uniform(-reach, reach, 2) * 24
        axis = np.arange(40) + 4.0
        rows, columns = np.meshgrid(axis + shift[0], axis + shift[1], indexing="ij")
        for channel in range(3):
            wanted = ndimage.map_coordinates(hu[channel], [rows, columns], order=1, mode="nearest")
            inside = (rows > 0) & (rows < 47) & (columns > 0) & (columns < 47)
            np.testing.assert_allclose(placed[channel][inside], wanted[inside], atol=0.5)

    def test_beyond_the_image_is_air_and_large_slices_are_averaged(self, rng):
        hu = torch.from_numpy(rng.normal(0, 100, (1, 512, 400))).float()
        placed = Augmentation(64, 64, scale=(1.0, 1.0), flip=(0, 0), turn=0).place(hu, rng)
        assert placed.min() == -1024
        assert float(placed[0, 20:44, 20:44].std()) < 30  # 8 x 8 pixels in one: 100 / 8

    def test_turned_samples_show_the_same_slice(self, rng):
        hu = torch.from_numpy(rng.normal(0, 100, (1, 32, 32))).float()
        still = Augmentation(32, 32, scale=(1.0, 1.0), flip=(0, 0), turn=0)
        turned = Augmentation(32, 32, scale=(1.0, 1.0), flip=(0, 0), turn=1)
        seed = int(rng.integers(1000))
        first = still.place(hu, np.random.default_rng(seed))
        second = turned.place(hu, np.random.default_rng(seed))
        assert not torch.equal(first, second)
        torch.testing.assert_close(first.flatten().sort().values, second.flatten().sort().values)

    def test_gamma_keeps_black_and_white(self, rng):
        shade = Augmentation(gamma=(0.5, 0.5), gamma_share=1.0).shade
        ends = torch.tensor([-1.0, 0.0, 1.0])
        torch.testing.assert_close(shade(ends, rng), torch.tensor([-1.0, 2 * 0.5**0.5 - 1, 1.0]))


class TestPretext:
    def test_input_and_target_are_the_formulas(self, rng):
        pretext = Pretext(masked=0.25, slice=0.25, mae=0.25, block=4)
        tasks = [pretext.draw((3, 16, 16), (int(rng.integers(1000)), n)) for n in range(40)]
        images = torch.from_numpy(rng.uniform(-1, 1, (40, 3, 16, 16)).astype(np.float32))
        noise, mask = torch.stack([t.noise for t in tasks]), torch.stack([t.mask for t in tasks])
        steps, kinds = torch.tensor([t.timestep for t in tasks]), torch.tensor([int(t.kind) for t in tasks])
        shown, target, weight = masked_input(images, noise, steps, mask, kinds, NoiseSchedule())
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        assert set(kinds.tolist()) == set(Kind)
        for n, task in enumerate(tasks):
            x, eps, hidden = images[n].numpy(), task.noise.numpy(), task.mask.numpy()
            noisy = np.sqrt(kept[task.timestep]) * x + np.sqrt(1 - kept[task.timestep]) * eps
            wanted = {Kind.NOISE: noisy, Kind.MAE: np.where(hidden, 0, x)}.get(task.kind, np.where(hidden, 0, noisy))
            np.testing.assert_allclose(shown[n], wanted, atol=1e-5)
            np.testing.assert_allclose(target[n], np.where(hidden, -x, eps))
            np.testing.assert_array_equal(weight[n], hidden if task.kind is Kind.MAE else np.ones_like(x))
            covered = {Kind.NOISE: 0, Kind.SLICE: 1 / 3}.get(task.kind, 0.6)
            assert hidden.mean() == pytest.approx(covered, abs=0.04)

    def test_v_is_the_formula_and_tells_the_noise(self, rng):
        schedule = NoiseSchedule()
        images, noise = (torch.from_numpy(rng.normal(size=(5, 3, 8, 8))) for _ in range(2))
        steps = torch.from_numpy(rng.integers(0, 1000, 5))
        v = schedule.target(images, noise, steps, Prediction.V)
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[steps.numpy()][:, None, None, None]
        np.testing.assert_allclose(v, np.sqrt(kept) * noise.numpy() - np.sqrt(1 - kept) * images.numpy(), atol=1e-4)
        noisy = schedule.add_noise(images, noise, steps)
        torch.testing.assert_close(schedule.noise_in(noisy, v, steps, Prediction.V), noise, atol=1e-4, rtol=1e-4)
        assert schedule.target(images, noise, steps, Prediction.EPSILON) is noise

    def test_loss_is_the_mean_over_what_counts(self, rng):
        answer, target = (torch.from_numpy(rng.normal(size=(4, 3, 8, 8))) for _ in range(2))
        weight = torch.from_numpy((rng.random((4, 3, 8, 8)) < 0.5).astype(np.float64))
        wanted = [float(((answer[n] - target[n])[weight[n] > 0] ** 2).mean()) for n in range(4)]
        np.testing.assert_allclose(pretext_loss(answer, target, weight), wanted, rtol=1e-5)
        assert float(pretext_loss(target, target, weight).sum()) < 1e-10

    def test_shares_are_kept(self, rng):
        pretext = Pretext(masked=0.3, slice=0.1)
        kinds = [pretext.kind(rng) for _ in range(4000)]
        assert kinds.count(Kind.MASKED) / 4000 == pytest.approx(0.3, abs=0.05)
        assert kinds.count(Kind.SLICE) / 4000 == pytest.approx(0.1, abs=0.03)
        with pytest.raises(ValueError, match="together at most 1"):
            Pretext(masked=0.7, mae=0.7)


class TestTraining:
    def test_a_resumed_run_is_bit_for_bit_the_same(self, shards, tmp_path, fresh_accelerate):
        whole = trainer_of(shards, tmp_path / "whole")
        whole.fit()
        first = trainer_of(shards, tmp_path / "parts")
        first.fit(last_step=3)
        assert first.step == 3 and not same(weights_of(first), weights_of(whole))
        second = trainer_of(shards, tmp_path / "parts")
        assert second.step == 3 and same(weights_of(second), weights_of(first))
        second.fit()
        assert second.step == whole.step == 6
        assert same(weights_of(second), weights_of(whole))

    def test_a_killed_run_resumes_from_a_whole_checkpoint(self, shards, tmp_path):
        config = copy.deepcopy(CONFIG)
        config["optimizer"]["steps"] = 400
        (tmp_path / "c.toml").write_text(_toml(config))
        command = [sys.executable, "-m", "training.pretrain", str(tmp_path / "c.toml"), "--shards", str(shards)]
        command += ["--out", str(tmp_path / "run"), "--save-every", "1", "--threads", "1"]
        process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2], start_new_session=True)
        end = time.monotonic() + 120
        while (newest := newest_checkpoint(tmp_path / "run")) is None or int(newest.name[5:]) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        resumed = trainer_of(shards, tmp_path / "run", config)
        assert 3 <= resumed.step < 400
        straight = trainer_of(shards, tmp_path / "straight", config)
        straight.fit(last_step=resumed.step)
        assert same(weights_of(resumed), weights_of(straight))
        assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) <= 3

    def test_it_learns_and_tells(self, shards, tmp_path):
        config = copy.deepcopy(CONFIG)
        config["optimizer"] |= {"steps": 60, "accumulate": 1, "batch": 8}
        trainer = trainer_of(shards, tmp_path / "run", config, validation=shards)
        trainer.fit(sample_every=60, validate_every=30)
        entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        scores = [entry["validation_loss"] for entry in entries if "validation_loss" in entry]
        assert losses[-1] < 0.85 * losses[0] and scores[-1] < scores[0]
        report = json.loads((tmp_path / "run/report.json").read_text())
        assert report["slices_per_second"] > 0 and report["peak_memory_mb"] > 50 and report["step"] == 60
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
        assert {"loss", "lr", "slices_per_second", "validation_loss"} <= set(board.Tags()["scalars"])
        assert board.Tags()["images"]

    def test_the_rate_is_the_published_course(self, shards, tmp_path):
        trainer = trainer_of(shards, tmp_path)
        settings = {"warmup": 10, "steps": 110, "batch": 2, "lr": 1.0}
        trainer.config = {**CONFIG, "optimizer": settings}
        rates = [trainer.rate(step) for step in range(111)]
        assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
        assert rates[10:] == pytest.approx([0.5 * (1 + np.cos(np.pi * n / 100)) for n in range(101)])
        trainer.config = {**CONFIG, "optimizer": settings | {"hold": 0.5}}
        assert trainer.rate(54) == 1.0 and trainer.rate(82) < 0.6 and trainer.rate(110) == 0.0

    def test_a_full_disk_keeps_the_last_checkpoint(self, shards, tmp_path, monkeypatch):
        trainer = trainer_of(shards, tmp_path / "run")
        trainer.fit(last_step=1)

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match="full"):
            trainer.fit(last_step=2)
        monkeypatch.undo()
        again = trainer_of(shards, tmp_path / "run")
        assert again.step == 1
        again.fit(last_step=2)
        assert newest_checkpoint(tmp_path / "run").name == "step-00000002"

    def test_another_configuration_is_refused(self, shards, tmp_path, capsys):
        trainer_of(shards, tmp_path / "run").fit(last_step=1)
        other = copy.deepcopy(CONFIG)
        other["optimizer"]["batch"] = 3
        with pytest.raises(ShardError, match="another configuration"):
            trainer_of(shards, tmp_path / "run", other)
        (tmp_path / "c.toml").write_text(_toml(CONFIG))
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "c.toml"), "--shards", str(tmp_path), "--out", str(tmp_path / "new")])
        assert stop.value.code == 2 and "no shard" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="several processes talk by gloo")
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one(sharded, tmp_path):
    """Half of each step's samples each; the sums differ in their order only.

    The same slices each time: where a gradient is all but zero, Adam makes a whole step of its last bit, and fresh ones
    missed the bound in 1 of 15 runs.
    """
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", np.random.default_rng(0))
    two = copy.deepcopy(CONFIG)
    two["optimizer"]["accumulate"] = 1
    (tmp_path / "c.toml").write_text(_toml(two))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["Testing/training/fsdp_on_cpu.py"] if sharded else ["-m", "training.pretrain"]
    command += [str(tmp_path / "c.toml"), "--shards", str(shards), "--out", str(tmp_path / "two")]
    command += ["--threads", "1"] + ["--fsdp"] * sharded
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    for last in ("2", "4") if sharded else ("4",):  # the sharded one is resumed once
        subprocess.run(
            [*command, "--last-step", last], cwd=Path(__file__).resolve().parents[2], env=environment, check=True,
            timeout=300,
        )  # fmt: skip
    one = trainer_of(shards, tmp_path / "one")
    one.fit(last_step=4)
    begin = trainer_of(shards, tmp_path / "begin")
    begin.save()
    parts = [averaged_weights(newest_checkpoint(tmp_path / name)) for name in ("begin", "one", "two")]
    start, wanted, found = (network | encoder for network, encoder in parts)
    moved = max(float((wanted[key] - start[key]).abs().max()) for key in wanted)
    apart = max(float((wanted[key] - found[key]).abs().max()) for key in wanted)
    print(f"apart by {apart / moved:.4f} of the way")
    assert apart < 0.05 * moved


def _toml(config: dict) -> str:
    """A table of plain values and one level of tables."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for name, table in config.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
