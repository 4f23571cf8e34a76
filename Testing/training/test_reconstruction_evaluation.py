"""The evaluation of reconstruction: patients kept apart, the same measurement for every method, honest statistics."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor

from LCTfoundLib.demo import CASE, cache_folder
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import attenuation_of
from LCTfoundLib.physics.noise import Dose
from LCTfoundLib.physics.projector import Projector
from training.evaluate import reconstruction
from training.evaluate.cases import DEFAULT_DATA, manifest
from training.evaluate.image_metrics import psnr, rmse
from training.evaluate.reconstruction import evaluate, main, parameters_for, simulated, tune
from training.evaluate.reconstruction_baselines import BASELINES
from training.evaluate.reconstruction_methods import (
    METHODS,
    Context,
    Method,
    Reconstructed,
    Setting,
    methods_named,
    register,
)
from training.evaluate.reconstruction_report import MEASURES, Row, Shown, comparisons, per_patient, write_report
from training.evaluate.reconstruction_slices import (
    AIR_HU,
    SPLIT,
    ReconstructionSlice,
    SliceChoice,
    SliceWithMetal,
    at_size,
    is_test_patient,
    read_slices,
    training_slices,
)
from training.evaluate.statistics import holm
from training.pretraining_data import is_held_out

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 48
#: Of every baseline, good enough for a phantom.
PARAMETERS: dict[str, dict[str, Any]] = {
    "fbp": {"ramp": "hann", "cutoff": 0.75},
    "fbp_ram_lak": {},
    "cg": {"iterations": 12},
    "sirt": {"iterations": 60},
    "tv": {"strength": 0.005},
}


def chest(rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """HU of tissue with lungs, vessels and a bone."""
    y, x = (np.indices((side, side)) + 0.5) / side * 2 - 1
    hu = np.full((side, side), -1000.0, np.float32)
    hu[(x / 0.85) ** 2 + (y / 0.65) ** 2 < 1] = 40
    for center in (-0.4, 0.4):
        hu[((x - center) / 0.3) ** 2 + (y / 0.42) ** 2 < 1] = -850
        for _ in range(4):
            cx, cy = center + rng.uniform(-0.15, 0.15), rng.uniform(-0.25, 0.25)
            hu[(x - cx) ** 2 + (y - cy) ** 2 < 0.004] = 50
    hu[x**2 + (y - 0.45) ** 2 < 0.01] = 500
    return hu


@pytest.fixture
def slices(rng: np.random.Generator) -> list[ReconstructionSlice]:
    """Two slices of one patient and one of another."""
    pixels = rng.uniform(5, 7, 2)
    return [
        ReconstructionSlice("a 1", "a", chest(rng), float(pixels[0])),
        ReconstructionSlice("a 2", "a", chest(rng), float(pixels[0])),
        ReconstructionSlice("b 1", "b", chest(rng), float(pixels[1])),
    ]


def method(name: str, run: Callable[[Tensor, Projector, Context], Reconstructed], **grid: Any) -> Method:
    return Method(name, name.upper(), lambda setting: run, grid)


def nothing(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
    return Reconstructed(torch.full((len(sinogram), SIDE, SIDE), AIR_HU))


def test_a_screw_in_the_body_is_left_out_of_the_measurement(slices):
    piece = slices[0]
    screw = SliceWithMetal.of(piece, 15.0)
    middle = np.array([round(np.nonzero(piece.body)[axis].mean()) for axis in (0, 1)])
    distance = np.hypot(*(np.indices(piece.hu.shape) - middle[:, None, None])) * piece.pixel_mm
    metal = screw.hu > 5000
    assert (metal == (distance <= 15)).all() and metal.sum() >= 9
    left_out = piece.body & ~screw.body
    assert (left_out == (piece.body & (distance <= 30))).all() and (screw.body <= piece.body).all()
    assert (screw.hu[~metal] == piece.hu[~metal]).all() and isinstance(screw, ReconstructionSlice)


# -- the measurement -------------------------------------------------------------------------------------------------


def test_a_measurement_is_the_line_integrals_of_the_slice(slices):
    sinogram, projector = simulated(slices[0], Setting(SIDE, 9))
    grid = ImageGrid(SIDE, SIDE, slices[0].pixel_mm)
    expected = Projector(grid, ParallelBeam.around(grid, 9)).forward(attenuation_of(torch.from_numpy(slices[0].hu)))
    assert torch.equal(sinogram[0], expected) and projector.beam.views == 9
    # What the rays of each view see together is what is there.
    total = float(attenuation_of(torch.from_numpy(slices[0].hu)).sum()) * slices[0].pixel_mm
    assert sinogram[0].sum(dim=-1).numpy() == pytest.approx(np.full(9, total), rel=0.02)


def test_noise_is_the_same_for_every_method_and_another_for_every_slice(slices):
    setting = Setting(SIDE, 9, Dose(2e4))
    again = [simulated(slices[0], setting)[0] for _ in range(2)]
    assert torch.equal(*again)
    clean = [simulated(piece, Setting(SIDE, 9))[0] for piece in slices[:2]]
    noise = [again[0] - clean[0], simulated(slices[1], setting)[0] - clean[1]]
    assert abs(float(torch.corrcoef(torch.stack([n.flatten() for n in noise]))[0, 1])) < 0.2
    assert not torch.equal(again[0], simulated(slices[0], Setting(SIDE, 9, Dose(2e4), seed=1))[0])
    # The variance of a logarithm of counts is about the inverse of the counts.
    counts = 2e4 * torch.exp(-clean[0])
    plenty = counts > 1000
    assert float((noise[0][plenty] ** 2 * counts[plenty]).mean()) == pytest.approx(1, rel=0.35)


def test_all_methods_get_the_same_sinogram_though_one_spoils_its_own(slices):
    seen: list[Tensor] = []

    def spoil(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        seen.append(sinogram.clone())
        sinogram.zero_()
        return nothing(sinogram, projector, context)

    methods = [method("first", spoil), method("second", spoil)]
    evaluate(slices, methods, Setting(SIDE, 5), {"first": {}, "second": {}})
    assert len(seen) == 6
    for first, second, piece in zip(seen[::2], seen[1::2], slices, strict=True):
        assert torch.equal(first, second) and torch.equal(first, simulated(piece, Setting(SIDE, 5))[0])


def test_rows_hold_what_was_measured(slices, rng):
    error = torch.from_numpy(rng.normal(0, 30, (SIDE, SIDE)).astype(np.float32))
    truth = iter(slices)

    def near(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        assert context.parameters == {"strength": 3}
        return Reconstructed((torch.from_numpy(next(truth).hu) + error)[None], evaluations=8)

    rows, shown = evaluate(slices, [method("near", near)], Setting(SIDE, 6), {"near": {"strength": 3}})
    assert [(row.slice, row.patient, row.views, row.method) for row in rows] == [
        (piece.name, piece.patient, 6, "near") for piece in slices
    ]
    for row, piece in zip(rows, slices, strict=True):
        image = piece.hu + error.numpy()
        assert row.scores["rmse"] == pytest.approx(rmse(piece.hu, image, piece.body))
        assert row.scores["psnr"] == pytest.approx(psnr(piece.hu, image, piece.body))
        sinogram, projector = simulated(piece, Setting(SIDE, 6))
        residual = projector.forward(attenuation_of(torch.from_numpy(image))) - sinogram[0]
        assert row.scores["residual"] == pytest.approx(float(residual.norm() / sinogram.norm()), rel=1e-4)
        assert row.evaluations == 8 and row.seconds > 0
    assert np.array_equal(shown[0].images["near"], slices[0].hu + error.numpy())


def test_answers_that_are_no_image_are_refused(slices):
    def small(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        return Reconstructed(torch.zeros(1, SIDE // 2, SIDE // 2))

    def broken(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        return Reconstructed(torch.full((1, SIDE, SIDE), torch.nan))

    with pytest.raises(ValueError, match="small answered"):
        evaluate(slices, [method("small", small)], Setting(SIDE, 4), {"small": {}})
    with pytest.raises(ValueError, match="broken answered pixels that are not finite"):
        evaluate(slices, [method("broken", broken)], Setting(SIDE, 4), {"broken": {}})


@pytest.mark.parametrize("dose", [None, Dose(1e5)])
def test_the_baselines_reconstruct(slices, dose):
    rows, _ = evaluate(slices[1:], methods_named(BASELINES), Setting(SIDE, 16, dose), PARAMETERS)
    mean = {name: np.mean([row.scores["psnr"] for row in rows if row.method == name]) for name in BASELINES}
    # A phantom is piecewise flat, which is all that total variation assumes.
    assert mean["tv"] > 4 + max(value for name, value in mean.items() if name != "tv") and min(mean.values()) > 14
    assert all(row.scores["residual"] < 0.05 for row in rows if row.method == "tv")


def test_more_views_are_better(slices):
    scores = [
        evaluate(slices[:1], methods_named(["sirt"]), Setting(SIDE, views), PARAMETERS)[0][0].scores["psnr"]
        for views in (5, 12, 40)
    ]
    assert scores[0] < scores[1] < scores[2]


# -- methods ---------------------------------------------------------------------------------------------------------


def test_methods_are_known_by_their_names(monkeypatch):
    monkeypatch.setattr("training.evaluate.reconstruction_methods.METHODS", known := dict(METHODS))

    @register("mine", "My method", weight=(1, 2))
    def _mine(setting: Setting) -> Any:
        return nothing

    assert known["mine"].title == "My method" and known["mine"].grid == {"weight": (1, 2)}
    assert [m.name for m in methods_named(["mine", "tv", "mine"])] == ["mine", "tv"]
    with pytest.raises(ValueError, match="already"):
        register("mine", "again")(_mine)
    with pytest.raises(LCTfoundError, match="no method yours; choose among .*mine"):
        methods_named(["yours", "tv"])


def test_parameters_are_those_with_the_least_error_on_the_training_slices(slices, rng, tmp_path):
    best = float(rng.choice([20, 30]))
    references = {simulated(piece, Setting(SIDE, 4))[0].numpy().tobytes(): piece.hu for piece in slices}

    def off(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        error = context.parameters["level"] - best + (5 if context.parameters["kind"] == "rough" else 0)
        return Reconstructed(torch.from_numpy(references[sinogram.numpy().tobytes()])[None] + abs(error))

    told: list[str] = []
    tried = method("off", off, level=(10, 20, 30, 40), kind=("rough", "fine"))
    chosen = tune(slices, tried, Setting(SIDE, 4), told.append)
    assert chosen["parameters"] == {"level": best, "kind": "fine"} and chosen["rmse"] == pytest.approx(0, abs=1e-3)
    assert chosen["slices"] == [piece.name for piece in slices] and len(told) == 8
    best = 5.0
    told.clear()
    assert tune(slices, tried, Setting(SIDE, 4), told.append)["parameters"]["level"] == 10
    assert told[-1].endswith("level is at the end of its range")


def test_without_chosen_parameters_nothing_is_evaluated(tmp_path):
    path, setting = tmp_path / "parameters.json", Setting(64, 7)
    tried = method("tried", nothing, level=(1, 2))
    with pytest.raises(LCTfoundError, match="tried, 64 pixels, 7 views, noise none.*--tune"):
        parameters_for(tried, setting, path)
    reconstruction._keep(path, {reconstruction._key(tried, setting): {"parameters": {"level": 2}}})
    reconstruction._keep(path, {"another": {"parameters": {}}})
    assert parameters_for(tried, setting, path) == {"level": 2}
    with pytest.raises(LCTfoundError, match="quantum 10000 photons"):
        parameters_for(tried, Setting(64, 7, Dose(1e4)), path)
    assert parameters_for(method("plain", nothing), setting, path) == {}


# -- statistics ------------------------------------------------------------------------------------------------------


def test_holm_steps_down(rng):
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.9])[::2] == pytest.approx([1.0, 1.0]) and math.isnan(holm([0.5, math.nan])[1])
    p = rng.uniform(0, 0.2, 7)
    adjusted = np.array(holm(p.tolist()))
    # Independent form: of all values not above it, the largest of (number of values at least as large) times the value.
    expected = [min(1.0, max((p >= q).sum() * q for q in p[p <= value])) for value in p]
    assert adjusted == pytest.approx(expected)
    assert holm([]) == []


def rows_of(scores: dict[str, dict[str, list[float]]], views: int = 16) -> list[Row]:
    """Rows of method -> patient -> PSNR of the patient's slices; all other measures follow from it."""
    return [
        Row(f"{patient} {n}", patient, views, name, {"psnr": value, "rmse": 100 - value}, 0, 0.1)
        for name, patients in scores.items()
        for patient, values in patients.items()
        for n, value in enumerate(values)
    ]


def test_pairs_are_tested_over_patients_and_over_slices(rng):
    names = [f"p{n}" for n in range(9)]
    scores = {
        name: {p: (30 + gain + rng.normal(0, 1, 3)).tolist() for p in names}
        for name, gain in (("a", 0), ("b", 2), ("c", 0))
    }
    found = {(pair.measure, pair.first, pair.second): pair for pair in comparisons(rows_of(scores))}
    assert set(found) == {(m, *pair) for m in ("psnr", "rmse") for pair in (("a", "b"), ("a", "c"), ("b", "c"))}
    table = {name: np.array([scores[name][p] for p in names]) for name in scores}
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    by_slice = holm([stats.wilcoxon(table[x].ravel(), table[y].ravel()).pvalue for x, y in pairs])
    by_patient = holm([stats.wilcoxon(table[x].mean(axis=1), table[y].mean(axis=1)).pvalue for x, y in pairs])
    for pair, p_slices, p_patients in zip(pairs, by_slice, by_patient, strict=True):
        one = found["psnr", *pair]
        assert (one.p_slices, one.p_patients) == pytest.approx((p_slices, p_patients))
        assert one.difference.mean == pytest.approx((table[pair[1]] - table[pair[0]]).mean())
        assert one.difference.cases == 9
    assert found["psnr", "a", "b"].p_patients < 0.05


def test_a_patient_counts_once(rng):
    rows = rows_of({"a": {"many": [10.0, 20.0, 60.0], "one": [40.0]}})
    assert per_patient(rows, "psnr") == {"many": 30.0, "one": 40.0}


# -- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_who_is_better_and_where_nobody_is(tmp_path, rng):
    names = [f"p{n}" for n in range(8)]
    base = rng.normal(30, 1, 8)
    ripple = np.where(np.arange(8) % 2, 0.5, -0.5)
    scores = {
        "mine": {p: [float(v)] for p, v in zip(names, base, strict=True)},
        "worse": {p: [float(v - 1 - 0.1 * n)] for n, (p, v) in enumerate(zip(names, base, strict=True))},
        "alike": {p: [float(v)] for p, v in zip(names, base + ripple, strict=True)},
    }
    methods = [method(name, nothing) for name in scores]
    text = write_report(tmp_path, rows_of(scores), methods, {}, {"size": 48}, ["LUNG1-001: not there"])
    lines = [line for line in text.splitlines() if line.startswith("| PSNR (dB) | ") and "[" in line]
    cells = {line.split(" | ")[1]: [cell.strip(" |") for cell in line.split(" | ")] for line in lines}
    assert cells["WORSE"][2].startswith("+1.35 [+1.") and cells["WORSE"][3] == "MINE"
    assert float(cells["WORSE"][4]) == pytest.approx(3 * 2 / 2**8, rel=0.05)
    assert cells["ALIKE"][3] == "-" and "Left out: LUNG1-001: not there" in text
    rmse_lines = [line for line in text.splitlines() if line.startswith("| RMSE (HU) | WORSE")]
    assert "| MINE |" in rmse_lines[0] and "-1.35" in rmse_lines[0]
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(written["comparisons"]) == 6 and written["provenance"] == {"size": 48}
    with (tmp_path / "slices.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["psnr"]) for row in table[:8]] == pytest.approx(base.tolist())


def test_an_exact_answer_has_a_report_too(slices, tmp_path):
    """An infinite PSNR is no number of JSON."""
    truth = iter(slices)

    def exact(sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        return Reconstructed(torch.from_numpy(next(truth).hu)[None])

    methods = [method("exact", exact), method("nothing", nothing)]
    rows, shown = evaluate(slices, methods, Setting(SIDE, 4), {"exact": {}, "nothing": {}})
    write_report(tmp_path, rows, methods, {4: shown}, {})
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["slices"][0]["scores"]["psnr"] is None and written["slices"][0]["scores"]["ssim"] == pytest.approx(1)


def test_the_picture_sheet_shows_images_and_differences(slices, tmp_path):
    dark, bright = slices[0].hu - 80, slices[0].hu + 400
    shown = {5: [Shown(slices[0], {"dark": dark, "bright": bright})]}
    rows = [Row(slices[0].name, "a", 5, name, dict.fromkeys(MEASURES, 1.0), 0, 0.1) for name in ("dark", "bright")]
    write_report(tmp_path, rows, [method("dark", nothing), method("bright", nothing)], shown, {})
    sheet = np.asarray(Image.open(tmp_path / "sheet_5.png")).astype(int)
    assert sheet.shape == (512, 3 * 256, 3)
    middle = (slice(100, 156), slice(100, 156))
    images, differences = sheet[:256], sheet[256:]
    expected = np.repeat((slices[0].hu - AIR_HU) / 1400 * 255, 1).reshape(SIDE, SIDE).clip(0, 255)
    center = np.asarray(Image.fromarray(np.rint(expected).astype(np.uint8)).resize((256, 256), Image.Resampling.BOX))
    assert np.abs(images[middle][..., 0] - center[middle]).max() <= 1
    assert (differences[100:156, 356:412] == [153, 153, 255]).all()  # 80 of 200 HU too dark: 40 % of the way to blue
    assert (differences[100:156, 612:668] == [255, 0, 0]).all()
    boxes = Image.open(tmp_path / "boxes_5.png")
    assert len(boxes.convert("L").getcolors()) > 3


# -- slices ----------------------------------------------------------------------------------------------------------


def test_smaller_slices_are_means_of_whole_pixels(rng):
    hu = rng.integers(-1200, 2000, (24, 24)).astype(np.int16)
    small, pixel = at_size(hu, 0.7, 8)
    clipped = np.maximum(hu, -1000).astype(float)
    expected = [[clipped[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean() for j in range(8)] for i in range(8)]
    assert small == pytest.approx(np.array(expected), rel=1e-5) and pixel == pytest.approx(2.1)
    assert np.array_equal(at_size(hu, 0.7, 24)[0], clipped)


def test_slices_become_squares_and_never_larger(rng):
    square, _ = at_size(rng.normal(0, 50, (20, 32)), 1.0, 32)
    assert square.shape == (32, 32) and (square[:6] == AIR_HU).all() and (square[26:] == AIR_HU).all()
    assert square[6:26].min() > AIR_HU
    with pytest.raises(LCTfoundError, match="whole part of 32"):
        at_size(np.zeros((32, 32)), 1.0, 64)


def test_the_frozen_lists_lie_within_each_other():
    split = json.loads(SPLIT.read_text(encoding="utf-8"))
    for source, levels in split["test"].items():
        if source != "about":
            assert len(levels) == len(set(levels))
            assert set(split["eight"][source]) <= set(split["twelve"][source]) <= set(levels)
            assert source == "tcga_luad" or source in manifest()["real"]["test"]
    assert not set(split["tuning"]["tcga_luad"]) & set(split["test"]["tcga_luad"])
    assert not any(is_test_patient(name) for name in split["train_volumes"])
    counts = {name: sum(len(v) for v in split[name].values() if isinstance(v, list)) for name in ("twelve", "eight")}
    assert counts == {"twelve": 12, "eight": 8}


def tcga_folder(folder: Path, rng: np.random.Generator, wrong: int | None = None) -> Path:
    """A stand-in for the TCGA file, of phantoms: patients with lists of their own fall on the side they must."""
    split = json.loads(SPLIT.read_text(encoding="utf-8"))
    names = iter([f"patient-{n}" for n in range(2000)])
    tests = set(split["test"]["tcga_luad"])
    patients = []
    for row in range(100):
        held_out = (row in tests) is not (row == wrong)
        patients.append(next(name for name in names if is_held_out(name) is held_out))
    (folder / "slices").mkdir(parents=True)
    hu = np.stack([chest(rng, 64) for _ in range(100)]).astype(np.int16)
    hu[99] = hu[98]
    np.savez(
        folder / "slices" / "tcga_luad_100slices.npz",
        hu=hu,
        patient=np.array(patients),
        spacing=np.full((100, 2), 4.5),
        contrast=np.zeros(100, bool),
    )
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The public case cannot be downloaded."""
    monkeypatch.setenv("LCTFOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_what_is_missing_is_left_out_with_its_reason(rng, tmp_path, offline):
    data = tcga_folder(tmp_path, rng)
    found, missing = read_slices(SliceChoice.EIGHT, 64, data)
    assert len(found) == 4 and all(is_held_out(piece.patient) for piece in found)
    assert len(missing) == 2 and missing[0].startswith(f"{CASE}: ") and missing[1].startswith("LUNG1-001: ")
    assert found[0].hu.shape == (64, 64) and 0.3 < found[0].body.mean() < 0.6
    train, missing = training_slices(32, data)
    # The slice that is stored twice counts once.
    assert len(train) == 100 - 22 - 1 and len(missing) == 2
    assert not any(is_test_patient(piece.patient) for piece in train)


def test_a_patient_on_the_wrong_side_is_never_used(rng, tmp_path, offline):
    rows = json.loads(SPLIT.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="wrong side"):
        read_slices(SliceChoice.EIGHT, 64, tcga_folder(tmp_path / "a", rng, rows["eight"]["tcga_luad"][1]))
    with pytest.raises(ValueError, match="wrong side"):
        read_slices(SliceChoice.TUNING, 64, tcga_folder(tmp_path / "b", rng, rows["tuning"]["tcga_luad"][0]))


@pytest.mark.real_data
def test_the_real_slices_are_of_test_patients():
    if not (DEFAULT_DATA / "slices").is_dir() or not (cache_folder() / CASE).is_dir():
        pytest.skip("the real data is not there")
    found, missing = read_slices(SliceChoice.TWELVE, 256)
    assert not missing and len({piece.name for piece in found}) == 12 and len({piece.patient for piece in found}) == 8
    for piece in found:
        assert is_test_patient(piece.patient) and piece.hu.shape == (256, 256) and 1.0 < piece.pixel_mm < 2.0
        lung = (piece.hu < -500) & piece.body
        assert 0.08 < lung.sum() / piece.body.sum() < 0.6 and 0.15 < piece.body.mean() < 0.95
        assert np.abs(np.array(ndimage.center_of_mass(piece.body)) - 128).max() < 40


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_tunes_on_training_slices_and_evaluates_on_others(rng, tmp_path, offline, capsys):
    data, out = tcga_folder(tmp_path / "data", rng), tmp_path / "out"
    common = ["--methods", "cg,fbp_ram_lak", "--views", "12", "--size", "64", "--data", str(data), "--device", "cpu"]
    common += [
        "--parameters",
        str(tmp_path / "p.json"),
        "--slices",
        "eight",
        "--no-feature-distance",
        "--out",
        str(out),
    ]
    with pytest.raises(SystemExit, match="--tune"):
        main(common)
    main([*common, "--tune"])
    chosen = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))["cg, 64 pixels, 12 views, noise none"]
    assert chosen["parameters"]["iterations"] in METHODS["cg"].grid["iterations"]
    assert not any(is_held_out(name.split(" ")[0]) for name in chosen["slices"])
    main(common)
    written = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert len(written["slices"]) == 2 * 4 and len(written["missing"]) == 2
    assert all(is_held_out(row["patient"]) for row in written["slices"])
    assert written["provenance"]["parameters"] == {"12": {"cg": chosen["parameters"], "fbp_ram_lak": {}}}
    assert Image.open(out / "sheet_12.png").size == (3 * 256, 8 * 256) and (out / "boxes_12.png").is_file()
    assert "CG, stopped early against the others" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--views", "0"], ["--size", "32"], ["--photons", "0"]])
def test_senseless_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert "41 at least" in capsys.readouterr().err
