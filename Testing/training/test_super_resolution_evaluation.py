"""The evaluation of super-resolution: the same coarse slices for every method, and what is written of them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.conditions import BuiltInEncoder, Scaling
from LCTfoundLib.networks.foundation import FoundationModel, InputRecipe, Slices
from LCTfoundLib.networks.null_space import NullSpaceSettings
from LCTfoundLib.tasks.super_resolution import Direction, SuperResolutionRequest
from Testing.engine.toy_backbones import two_levels
from training.evaluate import super_resolution
from training.evaluate.image_metrics import psnr
from training.evaluate.reconstruction_slices import ReconstructionSlice
from training.evaluate.super_resolution import METHODS, Stack, evaluate, main, table

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def slices(rng) -> list[ReconstructionSlice]:
    """Two patients of 48 pixels: tissue with a lung, and noise of their own."""
    y, x = np.mgrid[-24:24, -24:24] + 0.5
    body = np.where((x / 22) ** 2 + (y / 18) ** 2 < 1, 40.0, -1000.0)
    body[(x / 8) ** 2 + (y / 12) ** 2 < 1] = -850
    return [
        ReconstructionSlice(f"{name} 1", name, (body + rng.normal(0, 20, body.shape)).astype(np.float32), 1.5)
        for name in ("first", "second")
    ]


def backbone(folder: object = None) -> FoundationModel:
    torch.manual_seed(1)
    return FoundationModel(two_levels(), BuiltInEncoder().eval(), InputRecipe(Slices.NEIGHBORS, Scaling.WINDOW))


REQUEST = SuperResolutionRequest(factor=4, samples=2, sampling=NullSpaceSettings(2, 50), device="cpu", precision="fp32")


def test_methods_see_the_same_and_are_measured_alike(slices):
    rows, answers = evaluate([Stack.single(piece) for piece in slices], list(METHODS), REQUEST, backbone)
    assert [(row.slice, row.method) for row in rows] == [(s.name, name) for s in slices for name in METHODS]
    for row in rows:
        piece = next(s for s in slices if s.name == row.slice)
        answer = answers[row.slice][row.method]
        assert row.scores["psnr"] == psnr(piece.hu, answer.hu[0], piece.body)
        means = answer.hu.reshape(12, 4, 12, 4).mean(axis=(1, 3)) - piece.hu.reshape(12, 4, 12, 4).mean(axis=(1, 3))
        assert row.scores["residual"] == pytest.approx(float(np.sqrt(np.mean(means**2))), abs=1e-3)
        # Interpolation alone does not keep the means; what the task makes does.
        assert (row.scores["residual"] > 1) is (row.method == "cubic")
        assert ("covered" in row.scores) is (row.method == "null_space")
        assert row.evaluations == (4 if row.method == "null_space" else 0)
    drawn = answers["first 1"]["null_space"]
    inside = np.abs(drawn.hu[0] - slices[0].hu) <= drawn.interval_hu[0]
    assert rows[2].scores["covered"] == pytest.approx(inside[slices[0].body].mean())


def test_thin_slices_of_the_middle_thick_one_are_scored(slices, rng):
    first = slices[0]
    planes = [
        ReconstructionSlice(f"first {n}", "first", first.hu + rng.normal(0, 9, first.hu.shape).astype(np.float32), 1.5)
        for n in range(10)
    ]
    stack = Stack.thin(planes, 2.5, 2)
    assert list(stack.scored) == [4, 5] and stack.shown.name == "first 5" and stack.volume.spacing == (1.5, 1.5, 2.5)
    request = SuperResolutionRequest(
        Direction.SLICES, 2, samples=2, sampling=NullSpaceSettings(2, 50), device="cpu", precision="fp32"
    )
    rows, answers = evaluate([stack], list(METHODS), request, backbone)
    for row in rows:
        answer = answers["first 5"][row.method]
        assert answer.hu.shape == (10, 48, 48)
        expected = np.mean([psnr(planes[k].hu, answer.hu[k], planes[k].body) for k in (4, 5)])
        assert row.scores["psnr"] == pytest.approx(expected)
        thick = np.stack([piece.hu for piece in planes]) - answer.hu
        thick = thick.reshape(5, 2, 48, 48).mean(axis=1)
        assert row.scores["residual"] == pytest.approx(float(np.sqrt(np.mean(thick**2))), abs=1e-3)


def test_table_and_files(slices, tmp_path, monkeypatch):
    monkeypatch.setattr(super_resolution, "read_slices", lambda *told: (slices, ["third: it is not there"]))
    main(["--methods", "cubic,consistent", "--size", "48", "--factor", "3", "--out", str(tmp_path)])
    text = (tmp_path / "results.md").read_text()
    assert "x3 in plane, 2 places" in text and "third: it is not there" in text
    with (tmp_path / "slices.csv").open() as file:
        stored = list(csv.DictReader(file))
    mean = np.mean([float(row["psnr"]) for row in stored if row["method"] == "consistent"])
    assert f"| cubic, made consistent | {mean:.2f} ±" in text and "over 2 patients" in text
    assert json.loads((tmp_path / "provenance.json").read_text())["consistent"]["factor"] == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 384, 2 * 384) and np.asarray(sheet).std() > 20


def test_refused(slices):
    with pytest.raises(LCTfoundError, match="no method magic"):
        evaluate([Stack.single(piece) for piece in slices], ["magic"], REQUEST, backbone)
    with pytest.raises(LCTfoundError, match="crop it to 45 x 45"):
        evaluate([Stack.single(piece) for piece in slices], ["cubic"], SuperResolutionRequest(factor=5), backbone)


def test_one_method_has_no_comparison(slices):
    rows, _ = evaluate([Stack.single(piece) for piece in slices], ["cubic"], REQUEST, backbone)
    assert "minus" not in table(rows)
