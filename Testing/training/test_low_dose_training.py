"""Training of the low-dose net: scans against the engine's physics, what the net is told, and that it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.low_dose import LOW_DOSE_SHAPE, LOW_DOSE_WEIGHT, LowDoseNet, load_low_dose
from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.image_quality import Lesion
from LCTfoundLib.physics.noise import SHARP, SOFT, Dose
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import filtered_back_projection
from LCTfoundLib.tasks.low_dose import COLD_WEIGHT, load_cold
from LCTfoundLib.tasks.sparse_view import INTERVAL_FACTOR
from training.curation.shards import ShardWriter
from training.evaluate import low_dose_interval
from training.evaluate.image_metrics import psnr, rmse
from training.evaluate.low_dose import LowDoseScans, evaluate, scan_of, with_neighbors, write_report
from training.evaluate.reconstruction_slices import ReconstructionSlice
from training.low_dose import AIR, LowDoseScanner, _Draw, add_lesions
from training.restoration import Trainer, task_of
from training.shard_stream import Mixture, Source

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "task": "low_dose",
    "seed": 3,
    "network": {"channels": [16, 24], "blocks": [1, 1]},
    "data": {
        "size": 32,
        "views": 32,
        "field_mm": [300.0, 420.0],
        "photons": 1e4,
        "electronic_noise": 10.0,
        "fractions": [0.02, 0.5],
    },
    "optimizer": {"lr": 3e-3, "warmup": 2, "steps": 4, "batch": 2, "ema": 0.9},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Three studies of soft blobs in a body in air, whose slices resemble their neighbors."""
    rng, folder = np.random.default_rng(), tmp_path_factory.mktemp("shards")
    with ShardWriter(folder) as writer:
        for study in range(3):
            hu = ndimage.gaussian_filter(rng.normal(0, 1, (6, 40, 40)), (1, 4, 4))
            hu = np.where(np.hypot(*np.mgrid[-20:20, -20:20]) < 15, 40 + 6000 * hu, -1024)
            facts = {"study": f"s{study}", "labels": {}, "source": "blobs", "license": "CC0-1.0"}
            writer.add(hu.clip(-1024, 1500).astype(np.int16), facts)
        staged = writer.close()
    (folder / staged.staging).rename(folder / "shard-0.tar")
    return folder


def trainer_of(shards: Path, run: Path, **optimizer: float) -> Trainer:
    config = CONFIG | {"optimizer": CONFIG["optimizer"] | optimizer}
    mixture = Mixture([Source(shards)], 3)
    return Trainer(config, task_of(config, mixture, Mixture([Source(shards)], 0)), run, mixture.data)


class TestScanner:
    @pytest.mark.parametrize("kernel", [SOFT, SHARP], ids=["soft", "sharp"])
    def test_it_is_the_projector_and_the_filtered_back_projection_of_the_engine(self, rng, kernel):
        size, views, pixel = 40, 30, float(rng.uniform(0.5, 3))
        slices = torch.from_numpy(rng.uniform(0, 2, (2, size, size)).astype(np.float32))
        scanner, grid = LowDoseScanner(size, views), ImageGrid(size, size, pixel)
        projector = Projector(grid, ParallelBeam.around(grid, views))
        rays = scanner.rays(slices, pixel)
        torch.testing.assert_close(rays, projector.forward(slices * WATER_PER_MM), atol=1e-5, rtol=1e-5)
        wanted = filtered_back_projection(projector, rays, kernel.ramp, kernel.cutoff) / WATER_PER_MM
        torch.testing.assert_close(scanner.images(rays, [kernel] * 2, pixel), wanted, atol=2e-4, rtol=2e-4)

    def test_each_slice_has_its_own_kernel_and_pixel(self, rng):
        scanner = LowDoseScanner(24, 20)
        slices = torch.from_numpy(rng.uniform(0, 2, (2, 24, 24)).astype(np.float32))
        pixels = torch.tensor([0.7, 1.9])[:, None, None]
        together = scanner.images(scanner.rays(slices, pixels), [SOFT, SHARP], pixels)
        for row, kernel in enumerate((SOFT, SHARP)):
            pixel = float(pixels[row])
            alone = scanner.images(scanner.rays(slices[row : row + 1], pixel), [kernel], pixel)
            torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)


class TestPairs:
    def pair(self, task, **options):
        draw = _Draw(**({"dose": Dose(1e5, 0.05), "pixel_mm": 10.0, "current": 0.0} | options))
        return task._pair(task._held_out, range(6), [draw] * 6)

    def test_noise_is_independent_from_slice_to_slice_and_grows_as_the_dose_falls(self, shards, tmp_path):
        task = trainer_of(shards, tmp_path).task
        high, low, clean = (self.pair(task, dose=Dose(1e7, share, electronic_noise=0)) for share in (0.5, 0.05, 1e5))
        assert torch.equal(high.wanted, low.wanted)
        torch.testing.assert_close(clean.slices[:, 1], clean.wanted, atol=2e-3, rtol=0)
        inside = (torch.from_numpy(np.hypot(*np.mgrid[-16:16, -16:16])) < 9).expand(6, -1, -1)
        deviations = [float((pair.slices[:, 1] - pair.wanted)[inside].std()) for pair in (high, low)]
        assert deviations[1] / deviations[0] == pytest.approx(math.sqrt(10), rel=0.15)  # ten times fewer photons
        noise = low.slices - clean.slices
        apart = [row for row in range(6) if not torch.equal(low.slices[row, 0], low.slices[row, 1])]
        assert apart
        both = torch.stack([noise[apart, 0][inside[apart]], noise[apart, 1][inside[apart]]])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.25

    def test_a_slice_without_neighbors_is_seen_three_times_with_the_same_noise(self, shards, tmp_path):
        """Three draws of one anatomy would be an average to take, which no scan offers."""
        task = trainer_of(shards, tmp_path).task
        alone = self.pair(task, alone=True)
        assert torch.equal(alone.slices[:, 0], alone.slices[:, 1]) and torch.equal(
            alone.slices[:, 2], alone.slices[:, 1]
        )
        beside = self.pair(task)
        for number in range(6):
            triple = task._held_out(number)
            for place in (0, 2):
                stands_in = torch.equal(triple[place], triple[1])
                assert torch.equal(beside.slices[number, place], beside.slices[number, 1]) == stands_in

    def test_the_net_is_told_the_noise_about_as_it_is(self, shards, tmp_path):
        task = trainer_of(shards, tmp_path).task
        pair = self.pair(task, noise_off=1.0)
        inside = torch.from_numpy(np.hypot(*np.mgrid[-16:16, -16:16])) < 9
        truth = 1000 * (pair.slices[:, 1] - pair.wanted)[:, inside].std(dim=1)
        ratio = pair.sigma_hu / truth
        print(ratio)
        assert 0.4 < float(ratio.median()) < 2.5
        off = self.pair(task, noise_off=1.3)
        torch.testing.assert_close(off.sigma_hu, 1.3 * pair.sigma_hu)

    def test_values_are_cut_where_scanners_cut_them(self, shards, tmp_path):
        pair = self.pair(trainer_of(shards, tmp_path).task, dose=Dose(1e5, 0.02))
        assert float(pair.slices.min()) == pytest.approx(AIR) and float(pair.wanted.min()) >= AIR - 1e-6

    def test_a_step_is_a_function_of_its_number(self, shards, tmp_path):
        task = trainer_of(shards, tmp_path).task
        losses = [float(task.loss(step).detach()) for step in (5, 5, 6)]
        assert losses[0] == losses[1] != losses[2]
        draws = [task._draw(number) for number in range(200)]
        shares = np.array([draw.dose.fraction for draw in draws])
        assert 0.02 <= shares.min() < 0.04 and 0.25 < shares.max() <= 0.5
        assert 0.05 < np.mean([draw.alone for draw in draws]) < 0.2
        assert len({draw.dose.kernel.ramp for draw in draws}) == 4


def test_it_learns(shards, tmp_path):
    trainer = trainer_of(shards, tmp_path, steps=120)
    before = trainer.scores()
    trainer.fit(score_every=1000)
    after = trainer.scores()
    print(before, after)
    assert before["psnr"] == pytest.approx(before["input psnr"])  # an untrained net changes nothing
    assert after["psnr"] > after["input psnr"] + 3
    assert 0.6 < after["inside"] <= 1


def test_the_weight_loads_in_the_engine(shards, tmp_path):
    trainer = trainer_of(shards, tmp_path / "run")
    trainer.fit()
    card = trainer.export(tmp_path, "1", {"psnr": 1.0})
    assert card.name == LOW_DOSE_WEIGHT and card.license == "CC0-1.0" and "simulated" in card.limits
    network, loaded = load_low_dose(folder=tmp_path)
    assert loaded.training["steps"] == 4 and not network.training
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, trainer.average[key], atol=2e-3, rtol=2e-3)
    path = tmp_path / f"{card.name}.json"
    values = json.loads(path.read_text())
    values["architecture_parameters"]["numbers"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises(WeightError, match="not what its card describes"):
        load_low_dose(folder=tmp_path)


def test_the_published_adapter_is_trained_on_the_shipped_backbone_and_loads(shards, tmp_path):
    config = CONFIG | {"task": "low_dose_cold", "network": {"width": 8}, "data": CONFIG["data"] | {"patch": 16}}
    config |= {"optimizer": CONFIG["optimizer"] | {"steps": 2, "ema": 0.0}}
    mixture = Mixture([Source(shards)], 3)
    task = task_of(config, mixture, Mixture([Source(shards)], 0))
    before = task.scores()
    assert before["psnr"] == pytest.approx(before["input psnr"], abs=0.1)  # a fresh adapter hands the slice through
    trainer = Trainer(config, task, tmp_path / "run", mixture.data)
    trainer.fit(score_every=1000)
    card = trainer.export(tmp_path, "1", {})
    assert card.name == COLD_WEIGHT
    _, loaded = load_cold(tmp_path)
    for key, value in loaded.adapter.state_dict().items():
        torch.testing.assert_close(value, trainer.average[key], atol=2e-3, rtol=2e-3)
    assert trainer.scores()["psnr"] != before["psnr"]


def test_the_shipped_shape_fits_its_budget():
    assert LowDoseNet(LOW_DOSE_SHAPE).parameter_count <= 1.5e6
    assert math.isclose(LowDoseNet(LOW_DOSE_SHAPE).parameter_count / 1e6, 1.28, abs_tol=0.01)


# -- evaluation ------------------------------------------------------------------------------------------------------

LESION = Lesion(36.0, 40.0)


@pytest.fixture
def piece() -> ReconstructionSlice:
    y, x = (np.indices((64, 64)) + 0.5) / 64 * 2 - 1
    hu = np.where((x / 0.85) ** 2 + (y / 0.7) ** 2 < 1, 40.0, -1000.0)
    hu[((x - 0.45) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -850
    return ReconstructionSlice("a row 1", "a", hu.astype(np.float32), 5.0)


@pytest.fixture
def scans() -> LowDoseScans:
    return LowDoseScans(64, 60, Dose(1e5, 0.05), SOFT)


def test_a_scan_repeats_and_a_lone_slice_has_one_noise(piece, scans):
    triple, spacing = with_neighbors(piece, 64, Path("nowhere"))
    assert spacing == 0 and all(np.array_equal(plane, piece.hu) for plane in triple)
    scan, again = (scan_of(scans, piece, triple, spacing) for _ in range(2))
    assert np.array_equal(scan.noisy, again.noisy)
    assert np.array_equal(scan.noisy[0], scan.noisy[1]) and np.array_equal(scan.noisy[2], scan.noisy[1])
    beside = scan_of(scans, piece, triple, 2.5)
    assert not np.array_equal(beside.noisy[0], beside.noisy[1])
    assert np.array_equal(beside.reference, scan.reference)
    flat = np.zeros_like(piece.body)
    flat[24:40, 18:34] = True  # tissue alone
    assert rmse(piece.hu, scan.reference, flat) < 15 < rmse(scan.reference, scan.noisy[1], flat)


def test_a_smoother_loses_the_contrast_that_the_table_tells(piece, scans, tmp_path):
    """Methods whose share of the lesion is known: one that shows half of what differs from a flat 40 HU."""

    def half(images: np.ndarray, pixel_mm: float, gap_mm: float) -> np.ndarray:
        return 40 + 0.5 * (images[1] - 40)

    rows, lesions, shown = evaluate(scans, [(piece, *with_neighbors(piece, 64, tmp_path))], half, [LESION])
    assert [row.method for row in rows] == ["low dose", "low-dose net", "Gaussian blur"]
    found = {row.method: row.recovery for row in lesions}
    assert 0.7 < found["low dose"] < 1.15  # the kernel's blur, and no noise at all
    assert found["low-dose net"] == pytest.approx(0.5 * found["low dose"], rel=1e-3)
    assert found["Gaussian blur"] < found["low dose"]
    by_name = {row.method: row for row in rows}
    scan = shown[0][0]
    assert by_name["low dose"].scores["psnr"] == pytest.approx(psnr(scan.reference, scan.noisy[1], piece.body))
    assert by_name["Gaussian blur"].noise_hu < by_name["low dose"].noise_hu
    assert by_name["Gaussian blur"].mean_frequency < by_name["low dose"].mean_frequency
    text = write_report(tmp_path, rows, lesions, shown, {"dose": "5 %"}, ["b: not there"])
    assert "50 %" in text and "Left out: b" in text and "**simulated**" in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["spectra"]) == 3 and content["lesions"][1]["recovery"] == pytest.approx(found["low-dose net"])
    assert len((tmp_path / "slices.csv").read_text().splitlines()) == 4
    assert Image.open(tmp_path / "sheet.png").size == (4 * 288, 2 * 288)


def test_an_interval_is_made_wide_enough_on_slices_it_was_not_trained_on(shards, tmp_path, monkeypatch, piece, capsys):
    trainer = trainer_of(shards, tmp_path / "run")
    trainer.fit()
    card = trainer.export(tmp_path, "1", {INTERVAL_FACTOR: 0.25})
    monkeypatch.setattr(low_dose_interval, "read_slices", lambda *_: ([piece], ["LUNG1-001: not there"]))
    monkeypatch.setattr(low_dose_interval, "_DOSES", (0.05, 0.25))
    monkeypatch.setattr(low_dose_interval, "_VIEWS", 60)
    low_dose_interval.main(["--weights", str(tmp_path), "--size", "64", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    coverage = found["inside the 90 % interval"].values()
    assert len(coverage) == 4 and found["weight_sha256"] == card.sha256
    assert min(each["after"] for each in coverage) > 0.88
    assert np.mean([each["before"] for each in coverage]) < 0.85 and found[INTERVAL_FACTOR] > 0.25
    assert "left out: LUNG1-001" in capsys.readouterr().out


def test_inserted_lesions_lie_in_the_body_and_reach_through_the_slices(rng):
    """Their contrast and place vary; air stays air, and nothing falls below it."""
    distance = np.hypot(*np.mgrid[-30:30, -30:30])
    plane = np.where(distance < 25, 1.0, 0.0)
    plane[distance < 10] = 0.2
    before = torch.from_numpy(np.stack([plane] * 3)).float()
    changed = []
    for _ in range(20):
        triple = before.clone()
        add_lesions(triple, 2.0, rng)
        change = triple - before
        assert triple.min() >= 0 and not change[before < 0.05].any()
        changed.append([float(part.abs().sum()) for part in change])
    changed = np.array(changed)
    assert (changed[:, 1] > 0).all() and np.corrcoef(changed[:, 0], changed[:, 1])[0, 1] > 0.7
    assert changed[:, 1].std() > 0.3 * changed[:, 1].mean()
