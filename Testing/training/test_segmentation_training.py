"""The trainer on a tiny net: it learns, resumes where it stopped, and exports a weight that the engine loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from LCTfoundLib.networks.inputs import LungBox
from LCTfoundLib.networks.unet3d import UNet3D, UNet3DConfig
from LCTfoundLib.weights.registry import load_weight
from training.export import export_run
from training.samples import Pool, Sample
from training.segmentation import Trainer


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """Blocks of air, artery-bright and vein-dim voxels: what a few steps can learn."""
    pool = Pool(tmp_path / "pool")
    rng = np.random.default_rng()
    for number in range(4):
        trees = np.kron(rng.integers(0, 4, (4, 4, 4)), np.ones((4, 4, 4))).astype(np.uint8)
        ct = np.array([-900, -1000, 300, 50])[trees].astype(np.int16)
        lobes = np.broadcast_to(np.arange(16)[:, None, None] // 4 + 1, trees.shape).astype(np.uint8)
        box = LungBox((0, 0, 0), (15, 15, 15))
        sample = Sample(ct, lobes, lobes, trees, trees, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), box)
        pool.add(sample, f"{number}")
    return pool


@pytest.fixture
def config() -> dict[str, Any]:
    return {
        "name": "tiny",
        "task": "test",
        "spacing": 1.0,
        "patch": [16, 16, 16],
        "heads": ["trees", "lobes"],
        "network": {
            "in_channels": 5,
            "heads": [4, 6],
            "channels": [8, 16],
            "blocks": [0, 1],
            "auxiliary": [1],
        },
        "optimizer": {
            "lr": 1e-2,
            "weight_decay": 0.0,
            "warmup_steps": 2,
            "steps": 60,
            "batch": 2,
            "clip": 5.0,
            "ema": 0.9,
        },
        "loss": {"skeleton_weight": 0.5, "tree_cost": 1.0},
    }


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_loss_falls_and_validation_scores_each_class(pool: Pool, config: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(config, pool, run, validation=pool).fit(log_every=5, validate_every=20)
    values = losses(run)
    assert values[-1] < 0.75 * values[0]
    scores = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if "dice" in line]
    assert scores[-1]["dice_lobes"] > 0.5 and len(scores[-1]["dice"]["trees"]) == 4


def test_a_stopped_run_goes_on_where_it_stopped(pool: Pool, config: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config["optimizer"]["steps"] = 6
    first = Trainer(config, pool, run)
    first.fit()
    config["optimizer"]["steps"] = 9
    second = Trainer(config, pool, run)
    assert second.step == 6
    for key, value in first.network.state_dict().items():
        torch.testing.assert_close(second.network.state_dict()[key], value)
    assert second.optimizer.state_dict()["state"][0]["step"] == 6
    second.fit()
    assert Trainer(config, pool, run).step == 9


def test_the_exported_weight_is_the_average_and_loads_in_the_engine(
    pool: Pool, config: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config["optimizer"]["steps"] = 4
    trainer = Trainer(config, pool, run)
    trainer.fit()
    export_run(config, run, tmp_path / "weights", "1", {"validation": {"dice": 0.5}})
    card, state = load_weight("tiny", tmp_path / "weights")
    network = UNet3D(UNet3DConfig.from_dict(card.architecture_parameters))
    network.load_state_dict(state, strict=False)
    assert card.classes[:4] == ("background", "airway", "artery", "vein") and card.training["steps"] == 4
    again = Trainer(config, pool, tmp_path / "second run")
    again.start_from(tmp_path / "weights")
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, trainer.ema[key], rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(again.network.state_dict()[key], value)
