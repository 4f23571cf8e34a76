"""Measurements that tell phantom from real CT: on a chest whose looks are known."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import ndimage

from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.volume import Volume
from training.evaluate import realism
from training.evaluate.realism import DEPTHS_MM, look_at, main, table


@pytest.fixture(scope="module")
def chest() -> Volume:
    """Lungs of -860 HU in water with fat around, rods of 100 HU through them, a heart of 60 HU; sigma 8 HU."""
    shape, step = (40, 110, 150), 2.0
    k, j, i = (np.indices(shape, np.float32).T - (np.array(shape) - 1) / 2).T * step
    hu = np.full(shape, -1000, np.float32)
    hu[(i / 145) ** 2 + (j / 105) ** 2 < 1] = -105
    hu[(i / 130) ** 2 + (j / 92) ** 2 < 1] = 30
    for side in (-1, 1):
        lung = ((i - side * 70) / 48) ** 2 + (j / 70) ** 2 + (k / 75) ** 2 < 1
        hu[lung] = -860
        for place in (-30, 0, 30):
            hu[lung & (np.hypot(i - side * 70, j - place) < 4)] = 100
    hu[(np.hypot(i, j + 40) < 8) & (k > 0)] = -990  # trachea
    hu = ndimage.gaussian_filter(hu, 0.5) + np.random.default_rng(5).normal(0, 8, shape)
    return Volume(hu.astype(np.int16), (step,) * 3, (-149.0, -109.0, -39.0))


def test_a_known_chest(chest):
    look = look_at("chest", chest)
    found = look.numbers
    assert found["parenchyma, median HU"] == pytest.approx(-860, abs=4)
    assert found["soft tissue, median HU"] == pytest.approx(30, abs=4)
    assert found["fat, median HU"] == pytest.approx(-105, abs=6)
    assert found["between the lungs, 90th percentile HU"] == pytest.approx(30 + 1.28 * 8, abs=6)
    assert abs(found["parenchyma, back minus front, HU"]) < 3
    assert 2 < found["pleura, 10 to 90 %, mm"] < 6
    assert found["noise in soft tissue, HU"] == pytest.approx(8, rel=0.2)
    assert 0.005 < found["vessels, share of the lung"] < 0.03
    # The rods run through the middle of the lungs.
    assert look.vessels.shape == (len(DEPTHS_MM),) and look.vessels[-1] > 3 * look.vessels[2]
    place, profile = look.profile
    assert profile[place < -4].mean() == pytest.approx(30, abs=15) and profile[place > 4].mean() < -840
    assert look.histogram.sum() == pytest.approx(1, abs=1e-6)


def test_what_is_changed_is_seen(chest):
    before = look_at("before", chest).numbers
    dense = chest.array.astype(np.float32)
    row = np.linspace(-60, 60, dense.shape[1])[None, :, None]
    dense = np.where(dense < -700, dense + row, dense)
    after = look_at("after", chest.with_array(dense.astype(np.int16))).numbers
    assert after["parenchyma, back minus front, HU"] > before["parenchyma, back minus front, HU"] + 20
    noisy = chest.array + np.random.default_rng(6).normal(0, 30, chest.shape)
    after = look_at("noisy", chest.with_array(noisy.astype(np.int16))).numbers
    assert after["noise in soft tissue, HU"] == pytest.approx(np.hypot(8, 30), rel=0.2)
    assert after["parenchyma, texture of 1 to 3 mm, HU"] > 1.5 * before["parenchyma, texture of 1 to 3 mm, HU"]


def test_the_table_tells_how_far_off_real_scans_are(chest):
    looks = [look_at(str(n), chest.with_array((chest.array + n).astype(np.int16))) for n in (0, 2, 4)]
    text = table(looks[:2], looks[2:])
    line = next(row for row in text.splitlines() if row.startswith("| soft tissue, median HU"))
    assert line.split(" | ")[-1].startswith("+2.1") and " ± " in line


def test_command(chest, tmp_path, monkeypatch):
    def scan(seed: int) -> Volume:
        if seed == 1:
            raise UnsuitableImage("no lungs")
        return chest

    monkeypatch.setattr(realism, "phantom_scan", scan)
    main(["--phantoms", "3", "--first-seed", "0", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    with (tmp_path / "out/realism.csv").open() as file:
        assert [row["scan"] for row in csv.DictReader(file)] == ["0", "2"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "realism.md", "realism.csv", "vessels.png", "histogram.png",
    }  # fmt: skip
