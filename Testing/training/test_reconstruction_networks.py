"""Methods with networks in the evaluation of reconstruction, and the interval's factor."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from LCTfoundLib.errors import LCTfoundError, WeightError
from LCTfoundLib.networks.backbone import backbone_config, build_backbone
from LCTfoundLib.networks.conditions import BuiltInEncoder, Scaling
from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.foundation import STUDENT_WEIGHT, InputRecipe, Slices, save_foundation
from LCTfoundLib.networks.posterior import PosteriorSettings
from LCTfoundLib.networks.restoration import RestorationConfig
from LCTfoundLib.networks.unrolled import (
    UNROLLED_WEIGHT,
    UnrolledConfig,
    UnrolledInput,
    UnrolledNet,
    load_unrolled,
)
from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam
from LCTfoundLib.physics.noise import Dose
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.tasks.sparse_view import INTERVAL_FACTOR, SparseViewRequest
from LCTfoundLib.weights.registry import Card, DataSource, save_weight
from Testing.training.test_reconstruction_evaluation import SIDE, chest, method, offline, tcga_folder  # noqa: F401
from training.curation.shards import ShardWriter
from training.evaluate.reconstruction import evaluate, simulated
from training.evaluate.reconstruction_interval import calibrated, main, shortfalls
from training.evaluate.reconstruction_methods import Context, Reconstructed, Setting, methods_named
from training.evaluate.reconstruction_networks import NETWORKS, guided_sampling, weights_of
from training.evaluate.reconstruction_report import write_report
from training.evaluate.reconstruction_slices import ReconstructionSlice, is_test_patient
from training.sparse_view_baselines import (
    DUAL_DOMAIN_WEIGHT,
    POST_PROCESSING_WEIGHT,
    DualDomainNet,
    PostProcessingNet,
)

pytestmark = pytest.mark.usefixtures("one_thread")

UNROLLED = UnrolledConfig(2, 2, RestorationConfig(3, 2, 4, (8,), (1,)))
ONE, TWO = (RestorationConfig(count, 1, 3, (8,), (1,)) for count in (1, 2))
CARD = Card(
    name=UNROLLED_WEIGHT, version="1", task="", architecture="UnrolledNet", architecture_parameters=UNROLLED.to_dict(),
    spacing=(1.0, 1.0, 1.0), classes=(), data=(DataSource("none", "CC0-1.0"),), license="CC0-1.0", seed=0, commit="",
    numbers={INTERVAL_FACTOR: 1.25}, intended_use="", limits="",
)  # fmt: skip


def shaken(network: torch.nn.Module) -> dict[str, Tensor]:
    """Weights that do something: a new net's last layer is zero."""
    return {key: value + 0.02 * torch.randn_like(value) for key, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small nets of every method."""
    folder = tmp_path_factory.mktemp("weights")
    save_weight(shaken(UnrolledNet(UNROLLED)), CARD, folder)
    for name, network, shapes in (
        (POST_PROCESSING_WEIGHT, PostProcessingNet(ONE), {"image": ONE}),
        (DUAL_DOMAIN_WEIGHT, DualDomainNet(TWO, TWO), {"sinogram": TWO, "image": TWO}),
    ):
        parameters = {key: shape.to_dict() for key, shape in shapes.items()}
        save_weight(shaken(network), replace(CARD, name=name, architecture_parameters=parameters), folder)
    config = backbone_config(
        "student", block_out_channels=(8, 16), norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    save_foundation(
        build_backbone(config).state_dict(), BuiltInEncoder().state_dict(), config,
        InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW), replace(CARD, name=STUDENT_WEIGHT), folder,
    )  # fmt: skip
    return folder


@pytest.fixture
def piece(rng: np.random.Generator) -> ReconstructionSlice:
    return ReconstructionSlice("a 1", "a", chest(rng), float(rng.uniform(5, 7)))


@pytest.mark.parametrize("dose", [None, Dose(1e5)])
def test_every_method_answers(piece, weights, dose):
    setting = Setting(SIDE, 8, dose, weights=weights, paper_steps=6)
    methods = methods_named(NETWORKS)
    rows, _ = evaluate([piece], methods, setting, dict.fromkeys(NETWORKS, {}))
    asked = {row.method: row.evaluations for row in rows}
    assert asked == {
        "fast": 2,
        "best": 2 + SparseViewRequest.samples * PosteriorSettings.steps,
        "paper": 5,
        "post_processing": 1,
        "dual_domain": 2,
    }
    assert {row.method for row in rows if row.inside is not None} == {"fast", "best"}
    digests = weights_of(methods, weights)
    assert set(digests) == {name for names in NETWORKS.values() for name in names}
    assert len(weights_of(methods_named(["fast", "sirt"]), weights)) == 1


def test_fast_is_the_net_with_its_interval(piece, weights):
    setting = Setting(SIDE, 8, Dose(1e5), weights=weights)
    sinogram, projector = simulated(piece, setting)
    (fast,) = methods_named(["fast"])
    answer = fast.make(setting)(sinogram, projector, Context(setting, {}, 0))
    network, _ = load_unrolled(folder=weights)
    with torch.inference_mode():
        told = network(UnrolledInput.of(sinogram, projector, 1e5, Dose(1e5).electronic_noise), projector)
    # The engine may compute in half precision.
    torch.testing.assert_close(answer.hu, (told.images - 1) * 1000, atol=30, rtol=0.02)
    expected = 1000 * 1.25 * math.log(10) * told.scale
    torch.testing.assert_close(answer.interval_hu, expected, atol=30, rtol=0.05)


def test_a_missing_weight_is_named(tmp_path):
    (missing,) = methods_named(["dual_domain"])
    with pytest.raises(WeightError, match="dual_domain"):
        missing.make(Setting(SIDE, 8, weights=tmp_path))


def test_the_report_tells_how_many_pixels_lie_inside(piece, rng, tmp_path):
    error = rng.normal(0, 30, piece.hu.shape).astype(np.float32)

    def near(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        hu = torch.from_numpy(piece.hu + error)[None]
        return Reconstructed(hu, interval_hu=torch.full_like(hu, 45.0))

    def silent(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        return Reconstructed(torch.from_numpy(piece.hu)[None])

    methods = [method("near", near), method("silent", silent)]
    rows, _ = evaluate([piece], methods, Setting(SIDE, 5), {"near": {}, "silent": {}})
    share = (np.abs(error) <= 45)[piece.body].mean()
    assert rows[0].inside == pytest.approx(share, abs=2e-3) and rows[1].inside is None
    lines = write_report(tmp_path, rows, methods, {}, {}).splitlines()
    table = [line for line in lines if line.startswith(("| NEAR", "| SILENT"))]
    assert table[0].endswith(f"| {100 * rows[0].inside:.1f} ± 0.0 |") and table[1].endswith("| - |")
    assert json.loads((tmp_path / "results.json").read_text())["slices"][1]["inside"] is None


# -- the interval's factor -------------------------------------------------------------------------------------------


def test_the_factor_holds_nine_of_ten_pixels_of_nine_in_ten_patients(rng):
    groups = [np.abs(rng.laplace(0, rng.uniform(0.2, 0.7), int(rng.integers(2_000, 50_000)))) for _ in range(40)]
    factor = calibrated(groups)
    held = [(values <= factor).mean() for values in groups]
    assert np.mean(np.array(held) >= 0.9) == pytest.approx(0.9, abs=0.03)
    assert calibrated([2 * values for values in groups]) == pytest.approx(2 * factor)
    with pytest.raises(LCTfoundError, match="FBP, bare ramp tells no interval"):
        shortfalls(
            [ReconstructionSlice("a", "a", chest(rng), 6.0)], methods_named(["fbp_ram_lak"])[0], Setting(SIDE, 4)
        )


@pytest.mark.usefixtures("offline")
def test_the_command_writes_numbers_for_the_card(rng, weights, tmp_path, capsys):
    data, out = tcga_folder(tmp_path / "data", rng), tmp_path / "interval.json"
    with ShardWriter(tmp_path) as writer:
        hu = np.stack([chest(rng)] * 2).astype(np.int16)
        writer.add(hu, {"study": "held out", "labels": {}, "source": "phantom", "license": "CC0-1.0"})
        staged = writer.close()
    (tmp_path / "held_out").mkdir()
    (tmp_path / staged.staging).rename(tmp_path / "held_out/shard-0.tar")
    main(
        ["--weights", str(weights), "--data", str(data), "--held-out", str(tmp_path / "held_out"), "--count", "2"]
        + ["--views", "6", "--sizes", "64", "--device", "cpu", "--out", str(out)]
    )
    told = json.loads(out.read_text(encoding="utf-8"))
    coverage = told["inside the 90 % interval"]
    assert len(coverage) == 2 and min(v["after"] for v in coverage.values()) > 0.88
    assert all(v["least of a patient"] <= v["after"] for v in coverage.values())
    assert "held-out 1" in told["interval found on"] and not any(
        is_test_patient(n.split()[0]) for n in told["interval found on"]
    )
    # With the factor in the card, nothing is left to do.
    network = load_unrolled(folder=weights)[0].state_dict()
    save_weight(network, replace(CARD, numbers=told), tmp_path)
    again = ["--weights", str(tmp_path), "--data", str(data), "--views", "6", "--sizes", "64", "--device", "cpu"]
    main([*again, "--held-out", str(tmp_path / "held_out"), "--count", "2", "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8"))[INTERVAL_FACTOR] == pytest.approx(
        told[INTERVAL_FACTOR], rel=1e-2
    )
    assert "| before | after |" in capsys.readouterr().out


# -- the published recipe --------------------------------------------------------------------------------------------


def test_guided_sampling_draws_from_the_posterior_of_an_exact_prior(rng):
    """Pixels are normal around a level: of that the best prediction of the noise is known."""
    level, spread, size, count = float(rng.uniform(-0.3, 0.3)), 0.15, 12, 24
    schedule = NoiseSchedule()

    def predict(state: Tensor, timestep: int) -> Tensor:
        signal, share = float(schedule.signal[timestep]), float(schedule.noise[timestep])
        return share * (state - signal * level) / (signal**2 * spread**2 + share**2)

    grid = ImageGrid(size, size, 1.0)
    projector = Projector(grid, ParallelBeam.around(grid, 4))
    truth = level + spread * torch.from_numpy(rng.normal(size=(1, size, size))).float()
    rays = projector.forward((truth + 1.0).expand(count, -1, -1))
    drawn = guided_sampling(predict, UnrolledInput.of(rays, projector, water_per_mm=1.0), projector, 200, 1) - 1.0
    missed = projector.forward(drawn - truth).norm() / projector.forward((truth - level).expand_as(drawn)).norm()
    assert missed < 0.1
    # What the views do not tell is as wide as the prior.
    matrix = projector.forward(torch.eye(size**2).reshape(-1, size, size)).flatten(1).T
    _, values, rows = torch.linalg.svd(matrix.double())
    rank = int((values > 1e-4 * values[0]).sum())
    unseen = (drawn - level).flatten(1).double() @ rows[rank:].T
    assert unseen.std() == pytest.approx(spread, rel=0.2)
    again = guided_sampling(predict, UnrolledInput.of(rays[:1], projector, water_per_mm=1.0), projector, 20, 7)
    other = guided_sampling(predict, UnrolledInput.of(rays[:1], projector, water_per_mm=1.0), projector, 20, 8)
    assert not torch.allclose(again, other, atol=0.05)
