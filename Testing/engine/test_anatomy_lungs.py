"""Lungs by threshold and refined at the HU edge, on chests with known lungs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from LCTfoundLib.anatomy.lungs import find_lungs, lung_mask, refine_lungs, split_sides
from LCTfoundLib.anatomy.masks import resample
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.volume import Volume

SHAPE, SPACING = (100, 110, 150), 2.0


def _coordinates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k, j, i = np.indices(SHAPE, dtype=np.float32)
    x, y, z = (SPACING * (n - (size - 1) / 2) for n, size in zip((i, j, k), SHAPE[::-1], strict=True))
    return x, y, z


def _chest(rng: np.random.Generator) -> tuple[Volume, np.ndarray]:
    """A CT with body, table, lungs with vessels, trachea, colon gas; and its lung codes (1 right, 2 left)."""
    x, y, z = _coordinates()
    hu = np.full(SHAPE, -1000, np.float32)
    body = (x / 135) ** 2 + (y / 90) ** 2 < 1
    hu[body] = 40
    hu[(y > 97) & (y < 102)] = -100  # table
    sides = np.zeros(SHAPE, np.uint8)
    for code, side in ((1, -1), (2, 1)):
        sides[((x - side * 60) / 45) ** 2 + (y / 65) ** 2 + ((z - 8) / 85) ** 2 < 1] = code
    hu[sides > 0] = -850
    vessels = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.2) > 0.19
    hu[(sides > 0) & vessels] = 40
    hu[(x**2 + (y + 15) ** 2 < 8**2) & (z > -20)] = -990
    hu[(x**2 / 40**2 + (y + 50) ** 2 / 12**2 < 1) & (z < -88)] = -995
    hu += rng.normal(0, 20, SHAPE)
    origin = tuple(-SPACING * (size - 1) / 2 for size in SHAPE[::-1])
    return Volume(hu.astype(np.int16), (SPACING,) * 3, origin), sides  # type: ignore[arg-type]


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_both_lungs_are_found_on_their_sides(rng: np.random.Generator) -> None:
    ct, sides = _chest(rng)
    found = lung_mask(ct)
    for code in (1, 2):
        assert _dice(found.sides == code, sides == code) > 0.97
    x, y, z = _coordinates()
    trachea = (x**2 + (y + 15) ** 2 < 6**2) & (z > -10)
    assert found.airway[trachea].mean() > 0.8
    assert not found.lungs[trachea].any()
    assert not found.lungs[z < -88].any(), "colon gas is no lung"
    assert not found.lungs[(x / 135) ** 2 + (y / 90) ** 2 > 1].any(), "nothing outside the body"


def test_the_coarse_grid_is_enough_for_a_box(rng: np.random.Generator) -> None:
    ct, sides = _chest(rng)
    small, found = find_lungs(ct)
    assert 2.4 < max(small.spacing) < 3.0 and found.sides.shape == small.shape
    back = resample(small.with_array(found.lungs), ct, order=0)
    assert _dice(back, sides > 0) > 0.93


@pytest.mark.parametrize("case", ["padding", "narrow", "anisotropic"])
def test_other_fields_of_view(rng: np.random.Generator, case: str) -> None:
    ct, sides = _chest(rng)
    if case == "padding":
        x, y, _ = _coordinates()
        ct.array[(x / 140) ** 2 + (y / 105) ** 2 > 1] = -2048
    elif case == "narrow":  # the right lung is cut off
        ct, sides = ct.crop((0, 0, 32), SHAPE), sides[:, :, 32:]
    else:
        ct, sides = Volume(ct.array[::3], (SPACING, SPACING, 3 * SPACING), ct.origin), sides[::3]
    assert _dice(lung_mask(ct).lungs, sides > 0) > (0.93 if case == "anisotropic" else 0.96)


def test_no_lungs_is_said_in_words(rng: np.random.Generator) -> None:
    hu = np.full((40, 50, 60), -1000, np.int16)
    hu[:, 10:40, 10:50] = 40
    with pytest.raises(UnsuitableImage, match="chest"):
        lung_mask(Volume(hu, (4.0, 4.0, 4.0)))
    with pytest.raises(UnsuitableImage):
        lung_mask(Volume(np.full((20, 20, 20), 50, np.int16), (4.0, 4.0, 4.0)))


def test_a_coarse_border_snaps_to_the_edge(rng: np.random.Generator) -> None:
    ct, sides = _chest(rng)
    truth = sides > 0
    depth = ndimage.distance_transform_edt(truth) - ndimage.distance_transform_edt(~truth)
    wave = ndimage.gaussian_filter(rng.normal(size=SHAPE), 5)
    wrong = SPACING * depth + 2.0 * wave / wave.std() > 0
    x, y, z = _coordinates()
    trachea = ct.with_array((x**2 + (y + 15) ** 2 < 8**2) & (z > -20))
    better = refine_lungs(ct, ct.with_array(wrong), trachea)
    assert _dice(better, truth) > max(0.985, _dice(wrong, truth))


def test_consolidation_the_network_calls_lung_stays(rng: np.random.Generator) -> None:
    ct, sides = _chest(rng)
    x, y, z = _coordinates()
    dense = (sides == 1) & (z < -30)
    ct.array[dense] = 30
    probability = ndimage.gaussian_filter((sides > 0).astype(np.float32), 0.7)
    kept = refine_lungs(ct, ct.with_array(probability))
    assert kept[dense].mean() > 0.95
    assert kept[sides == 0].mean() < 0.01


def test_touching_lungs_are_parted(rng: np.random.Generator) -> None:
    _, sides = _chest(rng)
    x, y, z = _coordinates()
    both = (sides > 0) | ((np.abs(x) < 25) & (np.abs(y + 30) < 6) & (np.abs(z) < 20))
    parted = split_sides(both, (SPACING,) * 3)
    for code in (1, 2):
        assert _dice(parted == code, sides == code) > 0.97
    assert set(np.unique(split_sides(sides == 2, (SPACING,) * 3))) == {0, 2}
