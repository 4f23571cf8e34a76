"""The phantom thorax: labels that fit together, anatomy in its place, proportions of real lungs."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

pytest.importorskip("numba")

from LCTfoundLib.anatomy.structures import Lobe  # noqa: E402
from training.phantom.grid import Grid, SmoothNoise, sample_at, upsample  # noqa: E402
from training.phantom.lobe_map import LUNA_CODES, read_lobe_map  # noqa: E402
from training.phantom.shape_statistics import LOBE_SHARE_MEAN, LOBE_SHARE_SD  # noqa: E402
from training.phantom.solids import Ellipsoid, Tube, paint_tube, smooth_union, spline  # noqa: E402
from training.phantom.thorax import Organ, Thorax, make_thorax, thorax_from_lobes  # noqa: E402
from training.phantom.warp import Warp  # noqa: E402

SPACING = 4.0
LANDMARKS = {
    "carina",
    "trachea_top",
    "hilum_right",
    "hilum_left",
    "pulmonary_trunk",
    "left_atrium_superior_right",
    "left_atrium_inferior_right",
    "left_atrium_superior_left",
    "left_atrium_inferior_left",
    "aortic_arch",
}
GENERATORS = [(3, False), (11, False), (5, True)]


@cache
def drawn(seed: int, shifted: bool = False) -> Thorax:
    return make_thorax(seed, SPACING, shifted)


def center(thorax: Thorax, mask: np.ndarray) -> np.ndarray:
    return thorax.grid.to_point(np.array(np.nonzero(mask)).mean(axis=1))


def shares(lobes: np.ndarray) -> np.ndarray:
    counts = np.bincount(lobes.ravel(), minlength=6)[1:6]
    return counts / counts.sum()


@pytest.mark.parametrize(("seed", "shifted"), GENERATORS)
def test_layers_fit_together(seed: int, shifted: bool) -> None:
    thorax = drawn(seed, shifted)
    shape = thorax.grid.shape
    assert thorax.organs.dtype == thorax.lobes.dtype == thorax.fissure_complete.dtype == np.uint8
    assert thorax.fissure_distance.dtype == np.float16
    for layer in (thorax.organs, thorax.lobes, thorax.fissure_distance, thorax.fissure_complete):
        assert layer.shape == shape
    assert np.array_equal(thorax.organs == Organ.LUNG, thorax.lobes > 0)
    assert set(np.unique(thorax.lobes)) == {0, *map(int, Lobe)}
    assert (thorax.fissure_distance[thorax.lobes == 0] == 12).all()
    assert set(thorax.landmarks) == LANDMARKS


@pytest.mark.parametrize(("seed", "shifted"), GENERATORS)
def test_the_lungs_are_wrapped_in_the_body(seed: int, shifted: bool) -> None:
    thorax = drawn(seed, shifted)
    outside = np.isin(thorax.organs, (Organ.AIR, Organ.SKIN, Organ.TABLE))
    near = ndimage.binary_dilation(thorax.lobes > 0)
    assert not (near & outside).any()
    for face in (thorax.lobes[0], thorax.lobes[-1]):
        assert not face.any()
    right, left = (thorax.lobes > 0) & (thorax.lobes < 4), thorax.lobes > 3
    # where they meet before the heart, the mediastinum is thinner than these voxels
    assert (ndimage.binary_dilation(right) & left).sum() < 0.002 * left.sum()


@pytest.mark.parametrize(("seed", "shifted"), GENERATORS)
def test_lungs_and_lobes_are_whole(seed: int, shifted: bool) -> None:
    thorax = drawn(seed, shifted)
    for codes in ((1, 2, 3), (4, 5), *((n,) for n in range(1, 6))):
        mask = np.isin(thorax.lobes, codes)
        labels, count = ndimage.label(mask)
        largest = np.bincount(labels.ravel())[1:].max() if count else 0
        assert largest > 0.97 * mask.sum()


@pytest.mark.parametrize(("seed", "shifted"), GENERATORS)
def test_organs_lie_where_they_belong(seed: int, shifted: bool) -> None:
    thorax = drawn(seed, shifted)
    lobe = {n: center(thorax, thorax.lobes == n) for n in range(1, 6)}
    organ = {o: center(thorax, thorax.organs == o) for o in Organ if (thorax.organs == o).any()}
    assert max(lobe[n][0] for n in (1, 2, 3)) < min(lobe[4][0], lobe[5][0])
    assert lobe[1][2] > lobe[3][2] and lobe[4][2] > lobe[5][2]  # upper over lower
    assert lobe[2][1] < lobe[3][1] and lobe[4][1] < lobe[5][1]  # middle and upper before lower
    assert organ[Organ.LIVER][0] < -10 < organ[Organ.LEFT_VENTRICLE][0]
    assert organ[Organ.RIGHT_ATRIUM][0] < organ[Organ.LEFT_VENTRICLE][0] < organ[Organ.SPLEEN][0]
    assert organ[Organ.RIGHT_VENTRICLE][1] < organ[Organ.LEFT_ATRIUM][1] < organ[Organ.SPINAL_CANAL][1]
    assert organ[Organ.LIVER][2] < organ[Organ.LEFT_VENTRICLE][2] < organ[Organ.GREAT_VESSEL][2]
    descending = (thorax.organs == Organ.AORTA) & (thorax.grid.points()[1] > thorax.landmarks["carina"][1] + 10)
    assert center(thorax, descending)[0] > 0
    heart = np.isin(thorax.organs, range(Organ.MYOCARDIUM, Organ.RIGHT_ATRIUM + 1)).sum() * SPACING**3 / 1000
    assert 300 < heart < 1300


@pytest.mark.parametrize(("seed", "shifted"), GENERATORS)
def test_landmarks_guide_the_trees(seed: int, shifted: bool) -> None:
    thorax = drawn(seed, shifted)
    mark = thorax.landmarks
    index = {name: np.round(thorax.grid.to_index(point)).astype(int) for name, point in mark.items()}
    for name, at in index.items():
        assert (at >= 0).all() and (at < thorax.grid.shape).all(), name
    assert mark["hilum_right"][0] < mark["carina"][0] < mark["hilum_left"][0]
    assert mark["pulmonary_trunk"][2] < mark["carina"][2] < mark["aortic_arch"][2] < mark["trachea_top"][2]
    for name, codes in (("hilum_right", (1, 2, 3)), ("hilum_left", (4, 5))):
        away = ndimage.distance_transform_edt(~np.isin(thorax.lobes, codes), SPACING)
        assert away[tuple(index[name])] < 20, name
    for name in ("carina", "trachea_top", "pulmonary_trunk"):
        assert thorax.lobes[tuple(index[name])] == 0, name
    atrium = ndimage.distance_transform_edt(thorax.organs != Organ.LEFT_ATRIUM, SPACING)
    for name in (n for n in LANDMARKS if n.startswith("left_atrium")):
        assert atrium[tuple(index[name])] < 12, name


@pytest.mark.parametrize(("lower", "others"), [(3, (1, 2)), (5, (4,))])
def test_oblique_fissures_fall_from_the_upper_back_to_the_lower_front(lower: int, others: tuple[int, ...]) -> None:
    for seed in (3, 11, 12, 13):
        thorax = drawn(seed)
        lower_lobe, upper = thorax.lobes == lower, np.isin(thorax.lobes, others)
        k, j, _ = np.nonzero(lower_lobe[:-1] & upper[1:])
        slope = np.polyfit(j, k, 1)[0]
        assert 0.2 < slope < 3, "height per way to the back"


@pytest.mark.parametrize(("seed", "shifted"), GENERATORS)
def test_fissure_distance_matches_the_borders_of_the_labels(seed: int, shifted: bool) -> None:
    thorax = make_thorax(seed, 3.0, shifted)
    for codes in ((1, 2, 3), (4, 5)):
        lobes = np.where(np.isin(thorax.lobes, codes), thorax.lobes, 0)
        border = np.zeros(lobes.shape, bool)
        for axis in range(3):
            a, b = np.moveaxis(lobes, axis, 0)[:-1], np.moveaxis(lobes, axis, 0)[1:]
            step = (a > 0) & (b > 0) & (a != b)
            view = np.moveaxis(border, axis, 0)
            view[:-1] |= step
            view[1:] |= step
        reference = ndimage.distance_transform_edt(~border, 3.0) + 1.0
        inside = (lobes > 0) & (reference < 8)
        distance = thorax.fissure_distance.astype(np.float32)
        if thorax.parameters["accessory_lobe"] == 0:
            assert np.median(np.abs(distance - reference)[inside]) < 1.2
        assert np.quantile(distance[border], 0.95) < 3.5


def test_one_seed_is_one_patient_at_every_spacing() -> None:
    first, again, other = drawn(3), make_thorax(3, SPACING), drawn(11)
    assert np.array_equal(first.organs, again.organs) and np.array_equal(first.fissure_distance, again.fissure_distance)
    assert first.organs.shape != other.organs.shape or not np.array_equal(first.organs, other.organs)
    finer = make_thorax(3, 2.5)
    for n in range(1, 6):
        a, b = first.lobes == n, finer.lobes == n
        assert b.sum() * 2.5**3 == pytest.approx(a.sum() * SPACING**3, rel=0.05)
        assert np.linalg.norm(center(first, a) - center(finer, b)) < 1.5
    for name, point in first.landmarks.items():
        assert np.allclose(point, finer.landmarks[name], atol=0.5)


def test_lobe_shares_are_those_of_real_lungs() -> None:
    lungs = [drawn(seed).lobes for seed in range(20, 44)]
    found = np.array([shares(lobes) for lobes in lungs])
    assert np.abs(found.mean(axis=0) - LOBE_SHARE_MEAN).max() < 0.03
    assert (found.std(axis=0) > 0.6 * LOBE_SHARE_SD).all() and (found.std(axis=0) < 1.6 * LOBE_SHARE_SD).all()
    liters = np.array([(lobes > 0).sum() for lobes in lungs]) * SPACING**3 / 1e6
    assert 4.4 < liters.mean() < 6.2 and 0.5 < liters.std() < 1.7


def test_many_fissures_are_incomplete_toward_the_hilum() -> None:
    fused, far_open, far_fused = [], [], []
    for seed in range(20, 44):
        thorax = drawn(seed)
        near = (thorax.lobes > 0) & (thorax.lobes < 4) & (thorax.fissure_distance < 4)
        away = np.linalg.norm(thorax.grid.to_point(np.argwhere(near)) - thorax.landmarks["hilum_right"], axis=1)
        whole = thorax.fissure_complete[near] > 0
        fused.append((~whole).mean())
        far_open += away[whole].tolist()
        far_fused += away[~whole].tolist()
    fused_share = np.array(fused)
    assert 0.5 < (fused_share > 0.05).mean() <= 1
    assert (fused_share < 0.01).any()
    assert np.mean(far_fused) + 15 < np.mean(far_open)


def test_the_shifted_generator_has_another_distribution() -> None:
    names = ("width", "depth", "height")
    plain = np.array([[drawn(seed).parameters[n] for n in names] for seed in range(20, 44)], float)
    shifted = np.array([[drawn(seed, True).parameters[n] for n in names] for seed in range(1, 9)], float)
    ratio = lambda size: size[:, 2] / size[:, 1]  # noqa: E731
    assert ratio(shifted).mean() < ratio(plain).mean() - 0.03
    assert drawn(1, True).parameters["generator"] == "shifted"


def test_a_lobe_map_becomes_a_thorax_in_its_own_coordinates() -> None:
    source = make_thorax(4, 2.5)
    spacing, origin = (2.5, 2.5, 2.5), np.array(source.grid.origin) + [31.0, -250.0, -700.0]
    thorax = thorax_from_lobes(source.lobes, spacing, tuple(origin), 9, 3.0)
    assert np.array_equal(thorax.organs == Organ.LUNG, thorax.lobes > 0)
    expected = _nearest(source.lobes, Grid(2.5, source.grid.shape, tuple(origin)), thorax.grid)
    for n in range(1, 6):
        a, b = thorax.lobes == n, expected == n
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95
    shift = origin - np.array(source.grid.origin)
    for name in ("carina", "hilum_right", "hilum_left", "aortic_arch", "pulmonary_trunk"):
        assert np.linalg.norm(thorax.landmarks[name] - source.landmarks[name] - shift) < 45, name
    for organ in (Organ.LEFT_VENTRICLE, Organ.AORTA, Organ.LIVER, Organ.BONE_MARROW, Organ.ESOPHAGUS):
        assert (thorax.organs == organ).sum() > 50, organ
    assert thorax.parameters["generator"] == "lobe map"


def _nearest(codes: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    """Nearest-neighbor values at the voxels of another grid, 0 outside."""
    out = codes
    for axis, (coordinates, o) in enumerate(zip(target.axes()[::-1], grid.origin[::-1], strict=True)):
        n = np.round((coordinates - o) / grid.spacing).astype(int)
        taken = np.take(out, np.clip(n, 0, grid.shape[axis] - 1), axis)
        shape = [1, 1, 1]
        shape[axis] = len(n)
        out = taken * ((n >= 0) & (n < grid.shape[axis])).reshape(shape)
    return out


def test_luna_codes_read_like_lobe_codes() -> None:
    lobes = drawn(3).lobes
    table = np.zeros(6, np.uint16)
    for luna, lobe in LUNA_CODES.items():
        table[lobe] = luna
    luna_map = table[lobes]
    luna_map[:, ::3][luna_map[:, ::3] > 0] += 512
    luna_map[0, 0, 0] = 512  # a border voxel of no lobe
    spacing, origin = (SPACING,) * 3, (1.0, 2.0, 3.0)
    plain, decoded = read_lobe_map(lobes, spacing, origin), read_lobe_map(luna_map, spacing, origin)
    assert np.array_equal(plain.codes, decoded.codes) and np.allclose(plain.offset, decoded.offset)
    with pytest.raises(ValueError, match="lacks a lung"):
        read_lobe_map(np.where(lobes < 4, lobes, 0), spacing, origin)


@pytest.mark.skipif("LCTFOUND_LOBE_MAPS" not in os.environ, reason="LCTFOUND_LOBE_MAPS names no folder of lobe maps")
def test_held_out_lobe_maps_become_thoraces_of_the_same_kind() -> None:
    import SimpleITK as sitk

    files = sorted(Path(os.environ["LCTFOUND_LOBE_MAPS"]).glob("*.nrrd"))[13:]
    found = []
    for n, file in enumerate(files):
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(image)
        thorax = thorax_from_lobes(array, image.GetSpacing(), image.GetOrigin(), n, SPACING)
        found.append(shares(thorax.lobes))
        assert np.array_equal(thorax.organs == Organ.LUNG, thorax.lobes > 0)
        for name in ("hilum_right", "hilum_left"):
            away = ndimage.distance_transform_edt(thorax.lobes == 0, SPACING)
            assert away[tuple(np.round(thorax.grid.to_index(thorax.landmarks[name])).astype(int))] < 25
    drawn_shares = np.array([shares(drawn(seed).lobes) for seed in range(20, 44)])
    assert np.abs(np.mean(found, axis=0) - drawn_shares.mean(axis=0)).max() < 0.04


def test_smooth_noise_belongs_to_space_not_to_a_grid() -> None:
    rng = np.random.default_rng()
    low, high = np.array([-50.0, -40, -30]), np.array([60.0, 50, 70])
    noise = SmoothNoise(rng, low, high, 16.0)
    grid = Grid(5.0, (20, 18, 22), (-50.0, -40.0, -30.0))
    field = noise.on(grid)
    index = np.array([[0, 0, 0], [19, 17, 21], [7, 11, 3]])
    assert np.allclose(field[tuple(index.T)], noise.at(grid.to_point(index)), atol=1e-4)
    finer = noise.on(Grid(2.5, (39, 35, 43), grid.origin))
    assert np.allclose(finer[::2, ::2, ::2], field, atol=1e-4)
    assert 0.75 < field.std() < 1.25


def test_upsample_and_sample_agree_with_scipy() -> None:
    rng = np.random.default_rng()
    fine = Grid(1.5, (21, 17, 26), (3.0, -8.0, 11.0))
    coarse = fine.coarse(3.5)
    field = rng.normal(size=coarse.shape).astype(np.float32)
    at = np.stack(np.meshgrid(*(np.arange(n) * 1.5 / 3.5 for n in fine.shape), indexing="ij"))
    expected = ndimage.map_coordinates(field, at, order=1)
    assert np.allclose(upsample(field, coarse, fine), expected, atol=1e-4)
    box = (slice(3, 9), slice(0, 17), slice(5, 20))
    assert np.allclose(upsample(field, coarse, fine, box), expected[box], atol=1e-4)
    points = fine.to_point(np.array([[2, 3, 4], [18, 14, 20]]))
    assert np.allclose(sample_at(field, coarse, points), expected[(2, 18), (3, 14), (4, 20)], atol=1e-3)


def test_tube_distance_matches_brute_force() -> None:
    rng = np.random.default_rng()
    points = rng.uniform(0, 30, (4, 3))
    # A vessel tapers by less than 1 in 10, and the distance across a cone of slope m is off by m^2 / 2 of its length.
    tapers = np.linalg.norm(np.diff(points, axis=0), axis=1) * rng.uniform(-0.1, 0.1, 3)
    tube = spline(points, np.clip(3.5 + np.cumsum([0, *tapers]), 2, 5), step=1.0)
    grid = Grid(2.0, (18, 17, 19), (-2.0, -1.0, -3.0))
    x, y, z = (np.broadcast_to(p, grid.shape) for p in grid.points())
    points = np.stack([x, y, z], -1).reshape(-1, 1, 3)
    dense_t = np.linspace(0, len(tube.points) - 1, 12 * len(tube.points))
    dense = np.stack([np.interp(dense_t, range(len(tube.points)), tube.points[:, a]) for a in range(3)], 1)
    radii = np.interp(dense_t, range(len(tube.points)), tube.radii)
    expected = (np.linalg.norm(points - dense, axis=2) - radii).min(axis=1).reshape(grid.shape)
    found = tube.distance(grid, 6.0)
    near = expected < 5
    assert np.abs(found - expected)[near].max() < 0.08
    labels = np.zeros(grid.shape, np.uint8)
    paint_tube(labels, grid, tube, 3, 4, np.eye(256, dtype=bool)[0], shell=1.0)
    sure = np.abs(expected) > 0.15
    assert np.array_equal((labels > 0)[sure], (expected < 0)[sure])
    assert (expected[labels == 4] < -0.85).all()


def test_ellipsoid_and_smooth_union() -> None:
    ball = Ellipsoid(np.array([10.0, 12, 9]), np.array([6.0, 6, 6]), np.eye(3))
    grid = Grid(1.0, (24, 25, 26), (0.0, 0.0, 0.0))
    x, y, z = grid.points()
    exact = np.sqrt((x - 10) ** 2 + (y - 12) ** 2 + (z - 9) ** 2) - 6
    assert np.allclose(ball.distance(grid, 0), exact, atol=1e-3)
    total = np.full(grid.shape, 100.0, np.float32)
    smooth_union(total, grid, ball, 2.0, 4.0)
    assert np.allclose(total[exact < 5], exact[exact < 5] - 2, atol=1e-3)
    before = total.copy()
    smooth_union(total, grid, Tube(np.array([[16.0, 12, 9], [24, 12, 9]]), np.array([3.0, 3])), 0.0, 4.0)
    assert (total <= before).all() and total.min() >= before.min() - 1.01


def test_warp_back_inverts_the_warp() -> None:
    rng = np.random.default_rng()
    grid = Grid(4.0, (60, 50, 70), (-140.0, -20.0, -20.0))
    warp = Warp.draw(rng, grid, ((4.0, 170.0), (1.3, 60.0)))
    points = rng.uniform([-100, 10, 10], [100, 150, 190], (40, 3))
    real = warp.back(points)
    there = real + np.stack([sample_at(warp.u[a], grid, real) for a in range(3)], axis=1)
    assert np.abs(there - points).max() < 0.05
