"""From a pretraining run to a weight, and to its single-pass extractor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.conditions import LUNG, Condition, Scaling
from LCTfoundLib.networks.features import Prediction
from LCTfoundLib.networks.foundation import Slices, load_foundation
from LCTfoundLib.volume_io import write_volume
from training import distill_features, pretraining_data
from training.export_backbone import export_backbone, main, strictest
from training.pretrain import Pretrainer, averaged_weights, newest_checkpoint
from training.shard_stream import ShardIndex, Source

pytest.importorskip("accelerate", reason="accelerate is not installed (the extra 'training')")
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "preset": "student",
    "seed": 1,
    "prediction": "v",
    "precision": "no",
    "network": {"block_out_channels": [8, 8, 8, 16, 16], "norm_num_groups": 4, "cross_attention_dim": 8},
    "input": {"slices": "neighbors", "scaling": "window"},
    "augmentation": {"size": 16, "canvas": 32},
    "optimizer": {"lr": 1e-3, "warmup": 1, "steps": 2, "batch": 2, "ema": 0.9},
}


@pytest.fixture(scope="module")
def shards(simple_chest, tmp_path_factory):
    """Of a CT file and of single slices, as a user makes them."""
    folder = tmp_path_factory.mktemp("shards")
    write_volume(simple_chest, folder / "case_ct.nii.gz")
    patients = np.array([f"P{n}" for n in range(12)])
    hu = np.repeat(simple_chest.array[30:31], 12, axis=0)
    np.savez(folder / "s.npz", hu=hu, patient=patients, spacing=np.ones((12, 2)), contrast=np.zeros(12, bool))
    for arguments in (["ct", str(folder / "case_ct.nii.gz")], ["slices", str(folder / "s.npz")]):
        with pytest.raises(SystemExit) as stop:
            pretraining_data.main([*arguments, "--license", "CC BY 3.0", "--out", str(folder / "shards")])
        assert stop.value.code == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    Pretrainer(CONFIG, [Source(shards)], run).fit()
    return run


def test_held_out_patients_are_in_no_shard(shards):
    index = ShardIndex(shards)
    names = {study.name.split("-")[0] for study in index.studies} - {"case"}
    kept = {f"P{n}" for n in range(12) if pretraining_data.is_held_out(f"P{n}")}
    assert kept and names == {f"P{n}" for n in range(12)} - kept
    assert {study.license for study in index.studies} == {"CC BY 3.0"}


def test_a_phantom_becomes_a_study_with_its_diseases(tmp_path):
    seed = pretraining_data.FIRST_SEED
    pretraining_data.write_phantom(seed, tmp_path)
    index = ShardIndex(tmp_path)
    patient = pretraining_data.make_patient(seed, spacing=2.0)
    assert set(index.studies[0].diseases) == pretraining_data.diseases_of(patient.pathologies)
    middle = index.read(len(index) // 2)
    assert -1024 <= middle.min() < -700 and middle.max() > 0
    assert (index.studies[0].source, index.studies[0].license) == ("phantom", "Apache-2.0")


def test_the_weight_is_the_average_and_loads_in_the_engine(run, tmp_path, rng):
    card = export_backbone(run, "toy", tmp_path, "3", {"kid": 0.1})
    assert card.license == "CC-BY-3.0" and card.training["steps"] == 2 and card.numbers == {"kid": 0.1}
    model = load_foundation("toy", tmp_path)
    assert (model.recipe.slices, model.recipe.scaling) == (Slices.NEIGHBORS, Scaling.WINDOW)
    assert model.prediction is Prediction.V and model.recipe.side == 32  # no slice was shown smaller than the canvas
    network, encoder = averaged_weights(newest_checkpoint(run))
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, network[name], atol=2e-3, rtol=2e-3)
    told = model.encoder.encode([Condition(LUNG)])
    assert torch.equal(model.encoder.freedom.half(), encoder["freedom"].half())
    images = model.recipe(torch.from_numpy(rng.normal(-500, 300, (2, 16, 16))), LUNG)
    assert torch.isfinite(model.network(images, 10, told.expand(2, -1, -1)).sample).all()


def test_a_weight_tells_what_its_training_began_with(run, shards, tmp_path):
    config = CONFIG | {"augmentation": {"size": 16, "canvas": 32, "whole": 0.5}}
    second = Pretrainer(config, [Source(shards)], tmp_path / "second")
    second.start_from(run)
    second.fit(last_step=1)
    resumed = Pretrainer(config, [Source(shards)], tmp_path / "second")
    resumed.start_from(tmp_path / "nowhere")  # it has begun: nothing is read
    resumed.fit()
    card = export_backbone(tmp_path / "second", "toy", tmp_path, "1", {})
    begun = card.training["begun_from"]
    assert (begun["step"], begun["slices_per_step"], begun["begun_from"]) == (2, 2, None)
    assert load_foundation("toy", tmp_path).recipe.side == 16


def test_licenses(run, tmp_path, capsys):
    assert strictest(["Apache-2.0", "CC-BY-NC-3.0", "CC-BY-4.0"]) == "CC-BY-NC-3.0"
    with pytest.raises(LCTfoundError, match="unknown"):
        strictest(["Apache-2.0", "secret"])
    with pytest.raises(SystemExit) as stop:
        main([str(run), "--name", "x", "--out", str(tmp_path / "none"), "--step", "77"])
    assert stop.value.code == 2 and "no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_distillation_comes_nearer_to_the_noisy_passes(run, shards, tmp_path, capsys):
    export_backbone(run, "toy", tmp_path, "1", {})
    with pytest.raises(SystemExit) as stop:
        distill_features.main(
            ["--model", "toy", "--weights", str(tmp_path), "--shards", str(shards), "--held-out", str(shards)]
            + ["--out", str(tmp_path / "out"), "--minutes", "0.05", "--size", "16"]
        )
    assert stop.value.code == 0
    report = distill_features.json.loads((tmp_path / "out/report.json").read_text())
    before, after = (report[key]["single pass"] for key in ("cosine before", "cosine after"))
    assert report["steps"] > 3 and sum(after.values()) > sum(before.values())
    assert set(load_file(tmp_path / "out/distilled.safetensors"))
    assert report["seconds a slice"]["single pass, clean maps"] < report["seconds a slice"]["four timesteps"]
