"""Volume: geometry kept through turning, cropping, resampling; to the canonical frame and back to the input's grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from LCTfoundLib.volume import Interpolation, Volume
from LCTfoundLib.volume_io import from_sitk, to_sitk

SIGNED_PERMUTATIONS = [
    np.eye(3)[:, list(order)] * np.array(signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]


def random_volume(rng: np.random.Generator, direction: np.ndarray | None = None, dtype: type = np.int16) -> Volume:
    shape = tuple(int(n) for n in rng.integers(3, 12, 3))
    array = rng.integers(0, 100, shape).astype(dtype)
    spacing = tuple(float(x) for x in rng.uniform(0.5, 3.0, 3))
    origin = tuple(float(x) for x in rng.uniform(-200, 200, 3))
    return Volume(array, spacing, origin, np.eye(3) if direction is None else direction)


def random_rotation(rng: np.random.Generator, degrees: float = 180.0) -> np.ndarray:
    axis = rng.normal(size=3)
    return Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.deg2rad(rng.uniform(0, degrees))).as_matrix()


class TestGeometry:
    def test_world_points_are_those_of_simpleitk(self, rng):
        volume = random_volume(rng, random_rotation(rng))
        image = to_sitk(volume)
        index = rng.uniform(0, 5, 3)
        expected = image.TransformContinuousIndexToPhysicalPoint(index[::-1].tolist())
        np.testing.assert_allclose(volume.world_from_index(index), expected)
        np.testing.assert_allclose(volume.affine @ [*index[::-1], 1], [*expected, 1])

    def test_index_and_world_invert_each_other(self, rng):
        volume = random_volume(rng, random_rotation(rng))
        index = rng.uniform(-5, 20, (7, 2, 3))
        np.testing.assert_allclose(volume.index_from_world(volume.world_from_index(index)), index, atol=1e-9)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"array": np.zeros((4, 4))}, "dimensions"),
            ({"spacing": (1, 0, 1)}, "spacing"),
            ({"spacing": (1, np.nan, 1)}, "spacing"),
            ({"origin": (0, np.inf, 0)}, "origin"),
            ({"direction": np.ones((3, 3))}, "direction"),
        ],
    )
    def test_impossible_geometry_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Volume(**{"array": np.zeros((4, 4, 4)), **changes})

    def test_crop_keeps_every_voxel_at_its_place(self, rng):
        volume = random_volume(rng, random_rotation(rng))
        part = volume.crop((1, -3, 1), (3, 2, 99))
        assert part.shape == (2, 2, volume.shape[2] - 1)
        for index in np.ndindex(*part.shape):
            there = np.rint(volume.index_from_world(part.world_from_index(np.array(index)))).astype(int)
            assert part.array[index] == volume.array[tuple(there)]

    def test_an_empty_crop_is_refused(self, rng):
        with pytest.raises(ValueError, match="nothing"):
            random_volume(rng).crop((2, 0, 0), (2, 3, 3))

    def test_same_grid_sees_a_shift_of_a_tenth_of_a_voxel(self, rng):
        volume = random_volume(rng, random_rotation(rng))
        moved = Volume(volume.array, volume.spacing, np.add(volume.origin, 0.1 * volume.spacing[0]), volume.direction)
        assert volume.same_grid(volume.with_array(volume.array))
        assert not volume.same_grid(moved)


class TestCanonical:
    @pytest.mark.parametrize("direction", SIGNED_PERMUTATIONS)
    def test_every_axis_aligned_orientation_goes_in_and_out_without_loss(self, direction, rng):
        volume = random_volume(rng, direction)
        canonical = volume.to_canonical()
        assert canonical.is_canonical
        assert np.array_equal(canonical.direction, np.eye(3))
        for index in itertools.islice(np.ndindex(*canonical.shape), 0, None, 7):
            there = np.rint(volume.index_from_world(canonical.world_from_index(np.array(index)))).astype(int)
            assert canonical.array[index] == volume.array[tuple(there)]
        back = canonical.restore_to(volume)
        np.testing.assert_array_equal(back.array, volume.array)
        assert (back.spacing, back.origin) == (volume.spacing, volume.origin)
        np.testing.assert_array_equal(back.direction, volume.direction)

    def test_simpleitk_orients_the_same(self, rng):
        for direction in SIGNED_PERMUTATIONS:
            if np.linalg.det(direction) < 0:
                continue
            volume = random_volume(rng, direction)
            expected = from_sitk(sitk.DICOMOrient(to_sitk(volume), "LPS"))
            ours = volume.to_canonical()
            np.testing.assert_array_equal(ours.array, expected.array)
            assert ours.same_grid(expected)

    @pytest.mark.parametrize("trial", range(8))
    def test_an_oblique_volume_keeps_its_values_and_comes_back(self, trial, rng):
        volume = random_volume(rng, random_rotation(rng) @ SIGNED_PERMUTATIONS[int(rng.integers(48))])
        canonical = volume.to_canonical()
        assert np.trace(canonical.direction) >= np.trace(volume.direction) - 1e-9
        assert np.all(np.diag(canonical.direction) > 0)
        assert sorted(canonical.array.ravel()) == sorted(volume.array.ravel())
        back = canonical.restore_to(volume)
        np.testing.assert_array_equal(back.array, volume.array)
        assert back.same_grid(volume)

    @pytest.mark.parametrize("degrees", [3, 20, 180])
    def test_an_oblique_label_map_survives_the_upright_grid(self, degrees, rng):
        rotation = random_rotation(rng, degrees) @ SIGNED_PERMUTATIONS[int(rng.integers(48))]
        grid = Volume(np.zeros((30, 34, 38), np.uint8), (1.0, 1.2, 0.9), (5, -7, 9), rotation)
        center = grid.world_from_index((np.array(grid.shape) - 1) / 2)
        world = grid.world_from_index(np.moveaxis(np.indices(grid.shape), 0, -1))
        ball = (np.linalg.norm(world - center, axis=-1) < 11).astype(np.uint8)
        upright = grid.with_array(ball).resample_canonical(Interpolation.NEAREST, pad=0)
        assert upright.is_canonical
        back = upright.restore_to(grid)
        assert back.same_grid(grid)
        dice = 2 * (back.array & ball).sum() / (back.array.sum() + ball.sum())
        assert dice > 0.93

    def test_the_upright_grid_of_an_oblique_volume_encloses_it(self, rng):
        volume = random_volume(rng, random_rotation(rng))
        upright = volume.resample_canonical(pad=-1)
        corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in volume.shape))))
        index = upright.index_from_world(volume.world_from_index(corners))
        assert (index > -0.5 - 1e-6).all() and (index < np.array(upright.shape) - 0.5 + 1e-6).all()

    def test_a_result_on_a_crop_comes_back_to_the_input(self, rng):
        volume = random_volume(rng, SIGNED_PERMUTATIONS[int(rng.integers(48))], np.uint8)
        canonical = volume.to_canonical()
        back = canonical.crop((1, 1, 0), (3, 3, 2)).restore_to(volume, pad=0)
        expected = np.zeros(canonical.shape, np.uint8)
        expected[1:3, 1:3, 0:2] = canonical.array[1:3, 1:3, 0:2]
        np.testing.assert_array_equal(back.array, canonical.with_array(expected).restore_to(volume).array)

    def test_rounding_in_the_direction_does_not_cost_a_resampling(self, rng):
        """NIfTI stores quaternions in float32."""
        direction = SIGNED_PERMUTATIONS[int(rng.integers(48))] @ Rotation.from_rotvec([3e-6, -5e-6, 4e-6]).as_matrix()
        volume = random_volume(rng, direction)
        assert volume.to_canonical().is_canonical
        np.testing.assert_array_equal(volume.to_canonical().restore_to(volume).array, volume.array)


class TestResampling:
    @pytest.mark.parametrize("trial", range(5))
    def test_finer_grids_match_scipy(self, trial, rng):
        source = random_volume(rng, random_rotation(rng), np.float32)
        turned = source.direction @ SIGNED_PERMUTATIONS[int(rng.integers(48))]
        spacing = tuple(float(x) for x in rng.uniform(0.3, 0.5, 3))
        middle = source.world_from_index((np.array(source.shape) - 1) / 2)
        corner = -turned @ (np.array([9, 8, 7]) / 2 * spacing)
        grid = Volume(np.zeros((7, 8, 9)), spacing, middle + corner, turned)
        index = source.index_from_world(grid.world_from_index(np.moveaxis(np.indices(grid.shape), 0, -1)))
        expected = ndimage.map_coordinates(source.array, np.moveaxis(index, -1, 0), order=1, mode="nearest")
        inside = np.all((index >= -0.5) & (index <= np.array(source.shape) - 0.5), axis=-1)
        result = source.resample(grid, pad=-7)
        np.testing.assert_allclose(result.array[inside], expected[inside], atol=1e-2)
        assert (result.array[~inside] == -7).all()
        assert result.same_grid(grid)

    @pytest.mark.parametrize("trial", range(5))
    def test_nearest_matches_scipy(self, trial, rng):
        source = random_volume(rng, random_rotation(rng), np.uint8)
        grid = random_volume(rng, source.direction @ SIGNED_PERMUTATIONS[int(rng.integers(48))])
        grid.origin = tuple(source.world_from_index(rng.uniform(0, 2, 3)))
        index = source.index_from_world(grid.world_from_index(np.moveaxis(np.indices(grid.shape), 0, -1)))
        inside = np.all((index >= -0.5) & (index < np.array(source.shape) - 0.5), axis=-1)
        nearest = np.clip(np.floor(index + 0.5).astype(int), 0, np.array(source.shape) - 1)
        expected = np.where(inside, source.array[tuple(np.moveaxis(nearest, -1, 0))], 77)
        np.testing.assert_array_equal(source.resample(grid, Interpolation.NEAREST, pad=77).array, expected)

    @pytest.mark.parametrize("interpolation", list(Interpolation))
    def test_oblique_and_parallel_paths_agree(self, interpolation, rng):
        """The same grids, once parallel and once turned by too little to move a value but enough for the other path."""
        smooth = ndimage.gaussian_filter(rng.normal(0, 300, (20, 24, 22)), 3).astype(np.float32)
        source = Volume(smooth, (1.0, 1.1, 0.9))
        grid = Volume(np.zeros((12, 12, 12)), (1.3, 1.3, 1.3), (3, 3, 3))
        turned = Rotation.from_rotvec([2e-4, 0, 0]).as_matrix()
        oblique = Volume(grid.array, grid.spacing, grid.origin, turned)
        a, b = (source.resample(g, interpolation).array for g in (grid, oblique))
        assert np.mean(np.abs(a - b)) < 0.06 * np.std(smooth)

    def test_a_linear_ramp_is_not_shifted_at_any_spacing(self):
        k, j, i = np.indices((24, 20, 28))
        source = Volume(10.0 * i - 3 * j + 7 * k, (1.0, 1.5, 0.8), (3, 4, 5))
        for spacing in ((2.3, 3.1, 1.9), (0.6, 0.7, 0.5), (1.0, 4.0, 0.4)):
            result = source.resample(spacing)
            inner = result.crop([n // 3 for n in result.shape], [2 * n // 3 + 1 for n in result.shape])
            index = source.index_from_world(inner.world_from_index(np.moveaxis(np.indices(inner.shape), 0, -1)))
            np.testing.assert_allclose(inner.array, index @ [7, -3, 10], atol=0.08 * 20)

    def test_a_new_spacing_keeps_center_and_extent(self, rng):
        source = random_volume(rng, random_rotation(rng), np.float32)
        result = source.resample((0.7, 0.9, 1.1))
        centers = [v.world_from_index((np.array(v.shape) - 1) / 2) for v in (source, result)]
        np.testing.assert_allclose(*centers, atol=1e-9)
        extents = [np.array(v.shape[::-1]) * v.spacing for v in (source, result)]
        assert (np.abs(extents[0] - extents[1]) <= np.array(result.spacing) / 2 + 1e-9).all()

    def test_coarser_grids_do_not_alias(self, rng):
        """A checkerboard has mean 0: picking every third voxel would show it, averaging does not."""
        source = Volume((1000 * (-1) ** np.indices((42, 42, 42)).sum(0)).astype(np.int16))
        assert np.abs(source.resample((3.0, 3.0, 3.0)).array).max() < 40

    def test_noise_falls_and_the_mean_stays_at_coarser_grids(self, rng):
        source = Volume(rng.normal(-850, 100, (50, 50, 50)).astype(np.float32))
        result = source.resample((2.5, 2.5, 2.5)).array
        assert abs(result.mean() + 850) < 2
        assert result.std() < 30

    def test_integers_are_rounded_not_cut(self, rng):
        source = Volume(np.full((8, 8, 8), -3, np.int16))
        source.array[4:] = -4
        for direction in (np.eye(3), random_rotation(rng, 20)):
            grid = Volume(np.zeros((5, 5, 5)), (0.3,) * 3, (3, 3, 2.5), direction)
            values = source.array.astype(np.float64)
            index = source.index_from_world(grid.world_from_index(np.moveaxis(np.indices(grid.shape), 0, -1)))
            exact = ndimage.map_coordinates(values, np.moveaxis(index, -1, 0), order=1)
            assert np.abs(source.resample(grid).array - exact).max() <= 0.5 + 1e-3

    def test_a_mask_stays_boolean(self, rng):
        source = Volume(rng.random((9, 9, 9)) > 0.5)
        for direction in (np.eye(3), random_rotation(rng, 20)):
            grid = Volume(np.zeros((6, 6, 6)), (1.2,) * 3, (1, 1, 1), direction)
            assert source.resample(grid).array.dtype == bool

    def test_a_grid_that_does_not_touch_gives_padding(self, rng):
        source = random_volume(rng)
        grid = Volume(np.zeros((3, 3, 3)), origin=np.add(source.origin, 1000))
        for interpolation in Interpolation:
            assert (source.resample(grid, interpolation, pad=-1024).array == -1024).all()

    def test_like_returns_the_volume_itself_on_its_own_grid(self, rng):
        volume = random_volume(rng)
        assert volume.like(volume.with_array(volume.array)) is volume

    @pytest.mark.parametrize("interpolation", list(Interpolation))
    def test_a_resampled_array_is_a_new_one(self, interpolation, rng):
        volume = random_volume(rng)
        grids = [volume.with_array(volume.array), (2.0, 2.0, 2.0), Volume(volume.array, direction=random_rotation(rng))]
        for grid in grids:
            assert not np.shares_memory(volume.resample(grid, interpolation).array, volume.array)
