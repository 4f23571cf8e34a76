"""Training of the nets that restore images: the same samples again, resumed as if never stopped, and it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from LCTfoundLib.errors import LCTfoundError, WeightError
from LCTfoundLib.networks.unrolled import load_unrolled
from LCTfoundLib.physics.geometry import FanBeam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.noise import Dose
from LCTfoundLib.physics.projector import Projector
from training.curation.shards import ShardWriter
from training.restoration import ImageSampler, Trainer, main, task_of
from training.shard_stream import Augmentation, Mixture, Source
from training.sparse_view_baselines import denser, load_dual_domain, load_post_processing, more_views

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "task": "sparse_view",
    "seed": 3,
    "network": {"iterations": 2, "steps": 2, "prior": {"channels": [8, 12], "blocks": [1, 1]}},
    "data": {
        "scored": 32,
        "views": [6, 12],
        "noisy": 0.5,
        "photons": [1e4, 1e6],
        "grids": [
            {"size": 32, "field_mm": 48.0, "share": 0.7, "batch": 2},
            {"size": 24, "field_mm": 48.0, "share": 0.3, "batch": 3},
        ],
    },
    "optimizer": {"lr": 3e-3, "warmup": 2, "steps": 6, "ema": 0.9},
}
#: Of the networks that the unrolled one is compared with.
_SMALL = {"channels": [8, 12], "blocks": [1, 1]}
BASELINES = {"post_processing": {"image": _SMALL}, "dual_domain": {"sinogram": _SMALL, "image": _SMALL}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def write_shards(folder: Path, stripes: float = 0.0) -> Path:
    """Three studies of smooth blobs in air, with stripes of some HU."""
    rng = np.random.default_rng()
    with ShardWriter(folder) as writer:
        for study in range(3):
            hu = ndimage.gaussian_filter(rng.normal(0, 1, (6, 40, 40)), (0, 4, 4))
            hu = np.where(np.hypot(*np.mgrid[-20:20, -20:20]) < 16, 100 + 4000 * hu, -1024)
            hu = np.where(hu > -1000, hu + stripes * np.cos(np.arange(40) * np.pi / 3), hu)
            writer.add(
                hu.astype(np.int16), {"study": f"s{study}", "labels": {}, "source": "blobs", "license": "CC0-1.0"}
            )
        staged = writer.close()
    (folder / staged.staging).rename(folder / "shard-0.tar")
    return folder


def trainer_of(shards: Path, run: Path, noisy: float = 0.5, task: str = "sparse_view", **optimizer: float) -> Trainer:
    config = CONFIG | {"optimizer": CONFIG["optimizer"] | optimizer, "data": CONFIG["data"] | {"noisy": noisy}}
    config |= {"task": task, "network": BASELINES.get(task, CONFIG["network"])}
    mixture = Mixture([Source(shards)], 3)
    return Trainer(config, task_of(config, mixture, Mixture([Source(shards)], 0)), run, mixture.data)


def test_slices_in_hu_with_their_neighbors(shards):
    mixture = Mixture([Source(shards)], 0)
    plain = Augmentation(40, 40, scale=(1.0, 1.0), flip=(0, 0), turn=0)
    for number in range(6):
        index, place = mixture(number)
        hu = ImageSampler(mixture, plain, 0, neighbors=1)(number)
        assert hu.shape == (3, 40, 40) and hu.min() == -1000
        inside = np.hypot(*np.mgrid[-20:20, -20:20]) < 10
        shift = np.abs(hu[1].numpy() - index.read(place))[inside]
        assert np.median(shift) < 60  # placed off the center by a twentieth at most
        ends = [index.study[max(place - 1, 0)] == index.study[place], place > 0]
        assert torch.equal(hu[0], hu[1]) == (not all(ends))


def test_a_resumed_run_is_the_straight_one_bit_for_bit(shards, tmp_path):
    straight = trainer_of(shards, tmp_path / "straight")
    straight.fit()
    first = trainer_of(shards, tmp_path / "resumed")
    while first.step < 3:
        first._train_step()
        first.step += 1
    first.save()
    second = trainer_of(shards, tmp_path / "resumed")
    assert second.step == 3
    second.fit()
    for key, value in straight.average.items():
        assert torch.equal(value, second.average[key]), key
    entries = [json.loads(line) for line in (tmp_path / "straight/log.jsonl").read_text().splitlines()]
    assert {"psnr 6", "psnr 12", "start 6"} <= entries[-1].keys()


def test_a_run_begins_with_another_run_or_with_a_weight(shards, tmp_path):
    first = trainer_of(shards, tmp_path / "first", steps=2)
    first.fit()
    first.export(tmp_path / "weights", "1", {})
    exact, half = (trainer_of(shards, tmp_path / name) for name in ("exact", "half"))
    exact.start_from(tmp_path / "first")
    half.start_from(tmp_path / "weights")
    for key, value in first.average.items():
        assert torch.equal(exact.network.state_dict()[key], value)
        torch.testing.assert_close(half.network.state_dict()[key], value, rtol=2e-3, atol=1e-4)
    assert half.step == 0 and torch.equal(half.average[key], half.network.state_dict()[key])
    begun = trainer_of(shards, tmp_path / "first")  # resumes, and keeps its own
    begun.start_from(tmp_path / "nowhere")
    with pytest.raises(WeightError, match="neither a run's checkpoint nor a weight"):
        trainer_of(shards, tmp_path / "new").start_from(tmp_path / "nowhere")


def test_it_learns(tmp_path):
    """Stripes, since of blobs alone total variation, where it begins, leaves little to learn."""
    trainer = trainer_of(write_shards(tmp_path, stripes=300.0), tmp_path / "run", noisy=0.0, steps=100)
    before = trainer.scores()
    trainer.fit()
    after = trainer.scores()
    assert after["psnr 6"] > before["psnr 6"] + 0.15
    assert all(after[f"psnr {views}"] > after[f"start {views}"] + 1 for views in (6, 12))


def test_noisy_scans_are_told_their_noise(shards, tmp_path):
    task = trainer_of(shards, tmp_path).task
    clean, noisy = (task.scans.held_out(2, 6, dose, torch.device("cpu")).measured for dose in (None, Dose(1e5)))
    assert clean.weights is None and not clean.noise.any()
    assert (noisy.noise > 0).all() and (noisy.sinograms - clean.sinograms).abs().mean() > 0.01


def test_the_weight_loads_in_the_engine(shards, tmp_path):
    trainer = trainer_of(shards, tmp_path / "run")
    trainer.fit()
    card = trainer.export(tmp_path, "2", {"psnr": 1.0})
    network, loaded = load_unrolled(card.name, tmp_path)
    assert loaded.license == "CC0-1.0" and loaded.training["steps"] == 6 and loaded.numbers == {"psnr": 1.0}
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, trainer.average[key], atol=2e-3, rtol=2e-3)
    (tmp_path / f"{card.name}.json").write_text(
        (tmp_path / f"{card.name}.json").read_text().replace('"iterations": 2', '"iterations": 3')
    )
    with pytest.raises(WeightError, match="not what its card describes"):
        load_unrolled(card.name, tmp_path)


def _toml(config: dict) -> str:
    tables = {name: dict(table) for name, table in config.items() if isinstance(table, dict)}
    prior, grids = tables["network"].pop("prior"), tables["data"].pop("grids")
    tables["network.prior"] = prior
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items() if not isinstance(value, dict)]
    for name, table in [
        *((f"[{name}]", table) for name, table in tables.items()),
        *(("[[data.grids]]", g) for g in grids),
    ]:
        lines += [name, *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)


def test_the_command(shards, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text(_toml(CONFIG))
    run = [str(config), "--shards", str(shards), "--out", str(tmp_path / "run")]
    main([*run, "--minutes", "0"])
    with pytest.raises(SystemExit) as stop:
        main([*run, "--export", str(tmp_path)])
    assert stop.value.code == 0 and "CC0-1.0" in capsys.readouterr().err
    config.write_text(config.read_text().replace("sparse_view", "miracle"))
    with pytest.raises(SystemExit) as stop:
        main(run)
    assert stop.value.code == 2 and "no restoration task 'miracle'" in capsys.readouterr().err


def test_in_between_views_are_near_to_measured_ones(rng):
    inside = np.hypot(*np.mgrid[-24:24, -24:24]) < 12
    image = torch.from_numpy(ndimage.gaussian_filter(rng.random((48, 48)) * inside, 3))[None].float()
    grid = ImageGrid(48, 48, 1.0)
    few = Projector(grid, ParallelBeam.around(grid, 24))
    exact = denser(few).forward(image)
    error = (more_views(few.forward(image)) - exact).abs().amax(dim=(0, 2))
    assert not error[::4].any()
    # Behind the last view comes the first one, flipped: there it is no worse than elsewhere.
    assert error.max() < 0.02 * exact.max() and error[-3:].max() < 3 * error[:-4].max()


@pytest.mark.parametrize("task", BASELINES)
def test_baselines_learn_and_load(task, shards, tmp_path):
    trainer = trainer_of(shards, tmp_path / "run", noisy=0.5, task=task, steps=40)
    before = trainer.scores()
    trainer.fit(score_every=1000)
    after = trainer.scores()
    assert after["psnr 6"] > before["psnr 6"] + 0.25 and after["psnr 6"] > after["start 6"] + 0.25
    card = trainer.export(tmp_path, "1", {})
    load = load_post_processing if task == "post_processing" else load_dual_domain
    scan = trainer.task.scans.held_out(2, 6, Dose(1e5), torch.device("cpu"))
    with torch.inference_mode():
        network = load(tmp_path)[0]
        assert card.name == task and network(scan.measured, scan.projector).shape == scan.wanted.shape


def test_no_such_task(shards):
    with pytest.raises(LCTfoundError, match="no restoration task"):
        task_of({"task": "x"}, Mixture([Source(shards)], 0), None)


def test_some_scans_are_fans_that_see_the_whole_image(shards, tmp_path):
    config = CONFIG | {"data": CONFIG["data"] | {"fans": 0.5}}
    scans = task_of(config, Mixture([Source(shards)], 3), None).scans
    beams = [scans.of_step(step, torch.device("cpu")).projector for step in range(12)]
    kinds = {type(projector.beam) for projector in beams}
    assert kinds == {FanBeam, ParallelBeam}
    for projector in beams:
        assert projector.beam.covers(projector.grid) and projector.beam.views in (6, 12)
        if isinstance(projector.beam, FanBeam):
            near, far = projector.beam.source_isocenter_mm, projector.beam.source_detector_mm
            assert projector.beam.pitch_mm * near / far == pytest.approx(projector.grid.pixel_mm)
