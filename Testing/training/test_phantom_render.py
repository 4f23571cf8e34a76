"""The renderer against geometry, statistics and itself, on a toy chest of ellipsoids with random trees."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Tree
from training.phantom import acquisition, pathology
from training.phantom.acquisition import Contrast, Phase, Regime, Scan
from training.phantom.pathology_canvas import DepthMap, noise_field
from training.phantom.rasterize import coverage, label_trees, skeleton_voxels
from training.phantom.render import Patient, Rendered, render
from training.phantom.render_grid import LUNG_CODE, Frame, lung_field, sample_labels, uniform_blocks
from training.phantom.thorax import Organ

SPACING = 2.0
SHAPE = (80, 80, 104)
CLEAN = Scan(spacing=(SPACING,) * 3, thickness=SPACING, noise=0.0, blur=0.0)


def chain(points: np.ndarray, radius: float | np.ndarray) -> TreeGraph:
    """An unbranched tree."""
    count = len(points)
    radii = np.broadcast_to(np.asarray(radius, float), count).copy()
    return TreeGraph(np.asarray(points, float), radii, np.arange(count) - 1, np.zeros(count, int), np.zeros(count, int))


def bush(
    rng: np.random.Generator, start: np.ndarray, direction: np.ndarray, radius: float, depth: int = 9
) -> TreeGraph:
    """A tree that forks in random planes."""
    points, radii, parents, generations = [np.asarray(start, float)], [radius], [-1], [0]

    def grow(node: int, way: np.ndarray, width: float, generation: int, length: float) -> None:
        for _ in range(3):
            points.append(points[node] + way * length / 3)
            radii.append(width)
            parents.append(node)
            generations.append(generation)
            node = len(points) - 1
        if generation < depth:
            side = rng.normal(size=3)
            side -= (side @ way) * way
            side /= np.linalg.norm(side)
            for sign in (-0.7, 0.7):
                branch = way + sign * side
                grow(node, branch / np.linalg.norm(branch), width * 0.8, generation + 1, length * 0.8)

    grow(0, np.asarray(direction, float) / np.linalg.norm(direction), radius, 0, 24.0)
    count = len(points)
    return TreeGraph(np.array(points), np.array(radii), np.array(parents), np.zeros(count, int), np.array(generations))


def toy_thorax() -> Any:
    """Fat, muscle, mediastinum with heart and spine, two ellipsoidal lungs of two lobes each."""
    k, j, i = np.indices(SHAPE, dtype=np.float32)
    origin = tuple(-SPACING * (size - 1) / 2 for size in SHAPE[::-1])
    x, y, z = (origin[0] + i * SPACING, origin[1] + j * SPACING, origin[2] + k * SPACING)
    organs = np.zeros(SHAPE, np.uint8)
    organs[(x / 100) ** 2 + (y / 76) ** 2 < 1] = Organ.FAT
    organs[(x / 94) ** 2 + (y / 70) ** 2 < 1] = Organ.MUSCLE
    organs[(x / 88) ** 2 + (y / 64) ** 2 < 1] = Organ.MEDIASTINAL_FAT
    organs[x**2 + (y + 20) ** 2 + (z + 30) ** 2 < 26**2] = Organ.MYOCARDIUM
    organs[x**2 + (y + 20) ** 2 + (z + 30) ** 2 < 18**2] = Organ.LEFT_VENTRICLE
    organs[(x + 12) ** 2 + (y + 20) ** 2 + (z - 10) ** 2 < 11**2] = Organ.RIGHT_ATRIUM
    organs[((x + 20) ** 2 + (y + 20) ** 2 < 6**2) & (z > 20)] = Organ.VENA_CAVA
    organs[x**2 + (y - 45) ** 2 < 12**2] = Organ.BONE_MARROW
    organs[(x - 16) ** 2 + (y - 22) ** 2 < 9**2] = Organ.AORTA
    lobes, segments = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    distance = np.full(SHAPE, 12, np.float16)
    for side, codes in ((-1, (1, 2, 6, 10)), (1, (11, 12, 15, 18))):
        lung = ((x - side * 54) / 34) ** 2 + (y / 56) ** 2 + (z / 70) ** 2 < 1
        height = (z + 0.5 * y + 4) / np.hypot(1, 0.5)
        code = np.where(height > 0, np.where(y < 0, codes[0], codes[1]), np.where(y < 0, codes[2], codes[3]))
        organs[lung], segments[lung] = Organ.LUNG, code[lung]
        distance[lung] = np.minimum(np.abs(height[lung]), 12)
    lobes = LOBE_OF_SEGMENT[segments]
    return SimpleNamespace(
        grid=SimpleNamespace(spacing=SPACING, shape=SHAPE, origin=origin),
        organs=organs,
        lobes=lobes,
        fissure_distance=distance,
        fissure_complete=np.ones(SHAPE, np.uint8),
        landmarks={},
        parameters={},
        segments=segments,
    )


def toy_trees(thorax: Any, rng: np.random.Generator) -> Any:
    airway = bush(rng, np.array([-30.0, 0, 10]), np.array([-1.0, 0.1, 0]), 5.0)
    return SimpleNamespace(
        airway=airway,
        artery=bush(rng, np.array([-30.0, -12, 10]), np.array([-1.0, -0.3, 0.1]), 5.0),
        vein=bush(rng, np.array([30.0, 0, 0]), np.array([1.0, 0.2, 0.1]), 5.0),
        airway_wall=0.15 * 2 * airway.radius + 0.2,
        segments=thorax.segments,
        variants=[],
    )


@pytest.fixture(scope="module")
def anatomy() -> tuple[Any, Any]:
    thorax = toy_thorax()
    return thorax, toy_trees(thorax, np.random.default_rng(5))


def patient_of(anatomy: tuple[Any, Any], *diseases: pathology.Pathology, seed: int = 3) -> Patient:
    return Patient(anatomy[0], anatomy[1], diseases, seed)


@pytest.fixture(scope="module")
def patient(anatomy: tuple[Any, Any]) -> Patient:
    return patient_of(anatomy)


def box_at(patient: Patient, low: tuple[int, int, int], size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The box of voxels (k, j, i) of the anatomy's own grid."""
    start = np.asarray(patient.frame.origin) + SPACING * (np.array(low[::-1]) - 0.5)
    return start, start + SPACING * np.array(size[::-1])


# ---------------------------------------------------------------------------------------------------- rasterizing


@pytest.mark.parametrize("radius", [0.15, 0.35, 0.6, 1.0, 2.7, 5.0])
def test_coverage_has_the_volume_of_the_capsule(radius: float, rng: np.random.Generator) -> None:
    frame = Frame((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (48, 48, 48))
    way = rng.normal(size=3)
    way /= np.linalg.norm(way)
    middle, length = 23.5 + rng.uniform(-0.5, 0.5, 3), 28.0
    graph = chain(np.array([middle - way * length / 2, middle + way * length / 2]), radius)
    lumen = coverage(graph, frame, np.ones(2, bool)).lumen
    expected = np.pi * radius**2 * length + 4 / 3 * np.pi * radius**3
    # A sub-voxel end is a voxel's blob, and 1/255 steps count.
    tolerance = 0.04 if radius >= 1 else 0.07 if radius >= 0.5 else 0.25
    assert lumen.astype(float).sum() / 255 == pytest.approx(expected, rel=tolerance)


def test_coverage_is_what_supersampling_finds(rng: np.random.Generator) -> None:
    frame = Frame((-6.0, -6.0, -6.0), (0.9, 1.1, 1.4), (9, 12, 14))
    start, end = rng.uniform(-3, 3, 3), rng.uniform(-3, 3, 3)
    radius = float(rng.uniform(1.2, 2.5))
    lumen = coverage(chain(np.array([start, end]), radius), frame, np.ones(2, bool)).lumen / 255
    parts = 9
    offsets = (np.arange(parts) + 0.5) / parts - 0.5
    axes = [(frame.axis(a)[:, None] + frame.step[a] * offsets).ravel() for a in range(3)]
    z, y, x = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    points = np.stack([x, y, z], axis=-1)
    along = np.clip(((points - start) @ (end - start)) / ((end - start) @ (end - start)), 0, 1)
    inside = np.linalg.norm(points - start - along[..., None] * (end - start), axis=-1) < radius
    k, j, i = frame.shape
    truth = inside.reshape(k, parts, j, parts, i, parts).mean(axis=(1, 3, 5))
    assert np.abs(lumen - truth).max() < 0.2
    assert np.abs(lumen - truth).mean() < 0.01


def test_the_wall_surrounds_the_lumen_with_its_own_area() -> None:
    frame = Frame((0.0, 0.0, 0.0), (0.7, 0.7, 0.7), (60, 40, 40))
    graph = chain(np.array([[14.0, 14.0, -10.0], [14.0, 14.0, 60.0]]), 3.0)
    cover = coverage(graph, frame, np.ones(2, bool), wall=np.full(2, 0.9))
    area = (cover.outer.astype(float) - cover.lumen).sum(axis=(1, 2)) / 255 * 0.49
    assert area[30] == pytest.approx(np.pi * (3.9**2 - 3.0**2), rel=0.03)


def test_airway_lies_over_artery_over_vein() -> None:
    frame = Frame((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (20, 20, 20))
    lines = {
        Tree.AIRWAY: chain(np.array([[0.0, 10, 10], [20, 10, 10]]), 3.0),
        Tree.ARTERY: chain(np.array([[10.0, 0, 10], [10, 20, 10]]), 3.0),
        Tree.VEIN: chain(np.array([[10.0, 10, 0], [10, 10, 20]]), 3.0),
    }
    shown = {tree: np.ones(2, bool) for tree in Tree}
    covers = {tree: coverage(graph, frame, shown[tree]) for tree, graph in lines.items()}
    trees = label_trees(lines, covers, shown, frame).trees
    assert trees[10, 10, 10] == Tree.AIRWAY
    assert trees[10, 6, 10] == Tree.ARTERY and trees[6, 10, 10] == Tree.VEIN
    assert trees[12, 10, 10] == Tree.AIRWAY  # inside the vein too


def test_a_branch_too_thin_to_see_is_labeled_and_marked_to_ignore(anatomy: tuple[Any, Any]) -> None:
    patient = patient_of(anatomy)
    coarse = render(patient, replace(CLEAN, spacing=(3.0,) * 3, thickness=3.0), 0)
    trees, visible = coarse.trees.array, coarse.visible.array
    assert (visible[trees == 0] == 0).all() and (trees[visible > 0] == visible[visible > 0]).all()
    voxels, piece = skeleton_voxels(patient.trees.artery, coarse.frame)
    thin = 2 * patient.trees.artery.radius[piece] < 0.6 * 3.0
    on_artery = trees[tuple(voxels.T)] == Tree.ARTERY
    assert on_artery[thin].mean() > 0.9
    assert (visible[tuple(voxels[thin & on_artery].T)] == 0).mean() > 0.8
    thick = 2 * patient.trees.artery.radius[piece] > 1.5 * 3.0
    assert (visible[tuple(voxels[thick & on_artery].T)] == Tree.ARTERY).all()


def test_the_skeleton_lies_inside_visible_branches(patient: Patient) -> None:
    rendered = render(patient, CLEAN, 0)
    skeleton, visible = rendered.skeleton.array, rendered.visible.array
    assert (skeleton > 0).any() and (visible[skeleton > 0] == skeleton[skeleton > 0]).all()


# ------------------------------------------------------------------------------------------------------- sampling


def test_finer_sampling_gives_a_smooth_surface(rng: np.random.Generator) -> None:
    source = Frame((0.0, 0.0, 0.0), (1.5, 1.5, 1.5), (40, 40, 40))
    center, radius = rng.uniform(28, 31, 3), float(rng.uniform(16, 20))

    def distance(frame: Frame) -> np.ndarray:
        x, y, z = (frame.axis(a) - center[a] for a in range(3))
        return np.sqrt(x[None, None] ** 2 + y[None, :, None] ** 2 + z[:, None, None] ** 2)

    codes = (LUNG_CODE * (distance(source) < radius)).astype(np.uint8)
    fine = Frame((8.0, 8.0, 8.0), (0.6, 0.6, 0.6), (72, 72, 72))
    labels, _ = sample_labels(codes, uniform_blocks(codes), lung_field(codes), source, fine, np.zeros(64))
    wrong = (labels > 0) != (distance(fine) < radius)
    nearest = codes[np.ix_(*(np.round(fine.axis(a) / 1.5).astype(int) for a in (2, 1, 0)))]
    assert wrong.sum() < 0.5 * ((nearest > 0) != (distance(fine) < radius)).sum()
    assert (labels > 0).sum() * 0.6**3 == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.025)


def test_uniform_blocks_are_uniform(rng: np.random.Generator) -> None:
    codes = (rng.random((9, 8, 10)) < 0.03).astype(np.uint8)
    flags = uniform_blocks(codes)
    padded = np.pad(codes, ((1, 2),) * 3, mode="edge")
    for k, j, i in np.ndindex(codes.shape):
        assert flags[k, j, i] == (len(np.unique(padded[k : k + 4, j : j + 4, i : i + 4])) == 1)


def test_on_its_own_grid_the_anatomy_keeps_its_labels(patient: Patient) -> None:
    rendered = render(patient, CLEAN, 0)
    same = rendered.organs.array == patient.thorax.organs
    assert same.mean() > 0.995
    assert set(np.unique(rendered.segments.array)) == set(np.unique(patient.trees.segments))


def test_a_box_is_a_part_of_the_whole(patient: Patient) -> None:
    whole = render(patient, CLEAN, 0)
    low, size = (20, 22, 10), (24, 30, 28)
    part = render(patient, CLEAN, 0, box_at(patient, low, size))
    cut = tuple(slice(start, start + count) for start, count in zip(low, size, strict=True))
    for layer in ("segments", "lobes", "organs", "trees", "visible"):
        np.testing.assert_array_equal(getattr(part, layer).array, getattr(whole, layer).array[cut], err_msg=layer)
    np.testing.assert_allclose(part.ct.array, whole.ct.array[cut], atol=1)
    np.testing.assert_allclose(part.ct.origin, np.asarray(whole.ct.origin) + SPACING * np.array(low[::-1]), atol=1e-6)


def test_segments_tile_the_lungs_and_lobes_are_their_unions(patient: Patient) -> None:
    rendered = render(patient, replace(CLEAN, spacing=(1.3, 1.3, 2.2)), 0)
    lung = rendered.organs.array == Organ.LUNG
    np.testing.assert_array_equal(rendered.segments.array > 0, lung)
    np.testing.assert_array_equal(rendered.lobes.array, LOBE_OF_SEGMENT[rendered.segments.array])


# ------------------------------------------------------------------------------------- same patient, same breath


def test_the_seed_decides_everything(anatomy: tuple[Any, Any]) -> None:
    scan = Scan.sample(np.random.default_rng(8))
    scan = replace(scan, spacing=(3.0,) * 3, noise=20.0)
    first, again, other = (render(patient_of(anatomy), scan, seed).ct.array for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_without_contrast_only_blood_and_what_it_feeds_differ(patient: Patient) -> None:
    contrast = Contrast(300, 200, 150, 400, 300, 60)
    dyed = render(patient, replace(CLEAN, contrast=contrast), 0)
    plain = render(patient, dyed.scan.without_contrast(), 0)
    difference = dyed.ct.array.astype(int) - plain.ct.array
    organs, trees = dyed.organs.array, dyed.trees.array
    for still in (Organ.FAT, Organ.LUNG, Organ.BONE_MARROW):
        away = _eroded((organs == still) & (trees == 0) & ~_near(trees > 0))
        assert away.any() and (difference[away] == 0).all()
    assert difference[organs == Organ.LEFT_VENTRICLE].mean() == pytest.approx(150, abs=15)
    assert difference[organs == Organ.VENA_CAVA].mean() > 200
    thick = _eroded(trees == Tree.ARTERY)
    assert difference[thick].mean() == pytest.approx(300, abs=20)
    np.testing.assert_array_equal(dyed.segments.array, plain.segments.array)


def _eroded(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return ndimage.binary_erosion(mask, np.ones((3, 3, 3)))


def _near(mask: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return ndimage.binary_dilation(mask, np.ones((5, 5, 5)))


def test_phases_fill_the_vessels_in_turn(rng: np.random.Generator) -> None:
    pulmonary, systemic = (Contrast.of_phase(phase, rng) for phase in (Phase.PULMONARY, Phase.SYSTEMIC))
    assert pulmonary.pulmonary_artery > pulmonary.pulmonary_vein > 0
    assert systemic.left_heart > systemic.pulmonary_artery
    assert Contrast.of_phase(Phase.NONE, rng) == Contrast()


def test_scans_are_drawn_in_range(rng: np.random.Generator) -> None:
    scans = [Scan.sample(rng) for _ in range(300)]
    share = np.mean([scan.regime is Regime.PHYSICS for scan in scans])
    assert 0.55 < share < 0.85
    for scan in scans:
        assert 0.5 <= scan.thickness <= 5 and 0 < scan.noise < 150 and scan.interval <= scan.thickness
        assert 0 <= scan.contrast.pulmonary_artery <= 400 and scan.coverage[0] < scan.coverage[1]
    assert Scan.sample(np.random.default_rng(4)) == Scan.sample(np.random.default_rng(4))


def test_the_random_regime_keeps_air_darkest(anatomy: tuple[Any, Any]) -> None:
    patient = patient_of(anatomy)
    means = []
    for seed in range(6):
        rendered = render(patient, replace(CLEAN, spacing=(3.0,) * 3, regime=Regime.RANDOM), seed)
        hu, organs = rendered.ct.array, rendered.organs.array
        lung, soft = hu[organs == Organ.LUNG].mean(), hu[organs == Organ.MUSCLE].mean()
        assert hu[organs == Organ.AIR].mean() < lung < soft
        means.append(soft)
    assert np.ptp(means) > 20


# ---------------------------------------------------------------------------------------------------- acquisition


def test_a_thick_slice_is_the_mean_of_thin_ones(patient: Patient) -> None:
    low, size = (16, 20, 8), (30, 30, 40)
    box = box_at(patient, low, size)
    thin = replace(CLEAN, spacing=(SPACING, SPACING, 1.0), thickness=1.0)
    thick = replace(CLEAN, spacing=(SPACING, SPACING, 6.0), thickness=6.0)
    reference = render(patient, thin, 0, box).ct.array.astype(float).reshape(10, 6, 30, 40).mean(axis=1)
    measured = render(patient, thick, 0, box).ct.array
    assert np.abs(measured - reference)[1:-1].mean() < 12
    assert np.corrcoef(measured.ravel(), reference.ravel())[0, 1] > 0.998


def test_slices_apart_are_interpolated_between(patient: Patient) -> None:
    scan = replace(CLEAN, spacing=(SPACING, SPACING, 1.0), thickness=5.0, interval=5.0)
    box = box_at(patient, (16, 20, 8), (30, 30, 40))
    hu = render(patient, scan, 0, box).ct.array.astype(float)
    bends = np.abs(np.diff(hu, 2, axis=0)).mean(axis=(1, 2))
    kinks = np.flatnonzero(bends > 2)
    assert len(kinks) and set(np.diff(kinks)) <= {1, 4, 5}
    assert np.median(bends) < 1 < bends.max()


def test_noise_grows_with_the_inverse_root_of_dose_and_thickness(patient: Patient) -> None:
    still = render(patient, CLEAN, 4).ct.array.astype(float)
    heart = _eroded(render(patient, CLEAN, 4).organs.array == Organ.MYOCARDIUM)

    def sigma(scan: Scan) -> float:
        return float((render(patient, scan, 4).ct.array - still)[heart].std())

    full = replace(CLEAN, noise=30.0)
    assert sigma(full.at_dose(0.25)) / sigma(full) == pytest.approx(2.0, rel=0.05)


def test_noise_of_a_thick_slice_is_weaker(rng: np.random.Generator) -> None:
    step = (0.7, 0.7, 0.5)
    thin, thick = (acquisition.noise_tile(rng, step, 0.3, thickness).std() for thickness in (1.0, 4.0))
    assert thin == pytest.approx(1.0, rel=0.1)  # the tile's variance is relative to its own thickness
    assert thick == pytest.approx(1.0, rel=0.1)
    frame = Frame((0.0, 0.0, 0.0), step, (64, 64, 64))
    level = np.ones((2, 2, 2), np.float32)
    values = []
    for thickness in (1.0, 4.0):
        hu = np.zeros(frame.shape, np.float32)
        acquisition.add_noise(hu, frame, Scan(noise=20.0, thickness=thickness), level, rng)
        values.append(hu.std())
    assert values[0] / values[1] == pytest.approx(2.0, rel=0.12)
    assert values[0] == pytest.approx(20.0, rel=0.12)


@pytest.mark.parametrize("peak", [0.2, 0.35, 0.5])
def test_the_noise_power_peaks_where_it_is_told(peak: float, rng: np.random.Generator) -> None:
    step = 0.6
    tile = acquisition.noise_tile(rng, (step, step, 1.0), peak, 1.0, size=128)
    power = (np.abs(np.fft.fft2(tile, axes=(1, 2))) ** 2).mean(axis=0)
    f = np.fft.fftfreq(128, step)
    radius = np.hypot(f[:, None], f[None])
    bins = np.arange(0.02, 0.82, 0.04)
    where = np.digitize(radius, bins)
    radial = [power[where == index].mean() for index in range(1, len(bins))]
    center = (bins[:-1] + bins[1:]) / 2
    assert center[int(np.argmax(radial))] == pytest.approx(peak, abs=0.085)  # the maximum is broad


def test_a_coarse_grid_averages_noise_out(rng: np.random.Generator) -> None:
    fine = acquisition.noise_tile(rng, (0.5, 0.5, 1.0), 0.4, 1.0).std()
    coarse = acquisition.noise_tile(rng, (2.5, 2.5, 2.5), 0.4, 1.0).std()
    assert coarse < 0.35 * fine


def test_noise_is_strongest_where_the_body_is_thickest() -> None:
    water = np.zeros((3, 50, 50), np.float32)
    y, x = np.indices((50, 50)) - 24.5
    water[1, np.hypot(x, y) < 150 / 8] = 0.0192
    water[2, np.hypot(x / 1.3, y) < 150 / 8] = 0.0192
    level = acquisition.path_noise(water, 8.0, angles=24)
    assert level[1, 24, 24] == pytest.approx(1.0, rel=0.08)
    assert level[1, 24, 24] > 1.3 * level[1, 24, 8] > level[0, 24, 24]
    assert level[2, 24, 24] > 1.2 * level[1, 24, 24]


def test_blur_spreads_as_its_sigma_says_and_keeps_the_mean() -> None:
    frame = Frame((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (3, 41, 41))
    hu = np.zeros(frame.shape, np.float32)
    hu[1, 20, 20] = 1000
    out = acquisition.blur_in_plane(hu, frame, Scan(blur=1.2))
    assert out.sum() == pytest.approx(1000, rel=1e-3) and out[0].max() == 0
    x = (np.arange(41) - 20) * 0.5
    variance = (out[1].sum(axis=0) * x**2).sum() / out[1].sum()
    assert variance == pytest.approx(1.2**2 - 0.5**2 / 12, rel=0.05)
    sharp = acquisition.blur_in_plane(hu, frame, Scan(blur=0.4, edge=1.0))
    assert sharp.min() < 0 and sharp.sum() == pytest.approx(1000, rel=1e-2)


def test_streaks_come_from_the_dense_vein(patient: Patient) -> None:
    dye = replace(CLEAN, contrast=Contrast(vena_cava=800.0))
    smooth, streaky = (render(patient, replace(dye, streaks=s), 0).ct.array.astype(int) for s in (0.0, 1.0))
    changed = np.abs(streaky - smooth)
    organs = render(patient, CLEAN, 0).organs.array
    top = np.flatnonzero((organs == Organ.VENA_CAVA).any(axis=(1, 2)))
    assert changed[top[2:]].max() > 40 and changed[: top[0] - 8].max() < 8


def test_motion_blurs_near_the_heart_only(patient: Patient) -> None:
    moved = render(patient, replace(CLEAN, motion=4.0), 0).ct.array.astype(int)
    still = render(patient, CLEAN, 0).ct.array.astype(int)
    weight = patient.restless
    high = np.abs(moved - still)
    assert high[25].mean() > 5 * high[-6:].mean() and weight.max() > 0.5


def test_padding_lies_outside_the_field_of_view(patient: Patient) -> None:
    rendered = render(patient, replace(CLEAN, field_margin=4.0), 0)
    ct, segments = rendered.ct.array, rendered.segments.array
    assert (ct[:, 0, 0] == -1024).all() and (ct[:, 40, 52] > -1024).all()
    lung = segments > 0
    assert (ct[lung] > -1024).mean() > 0.99


# ------------------------------------------------------------------------------------------------ tissue and disease


def test_a_fissure_is_a_thin_bright_sheet_only_where_complete(anatomy: tuple[Any, Any]) -> None:
    thorax, trees = anatomy
    half = SimpleNamespace(**vars(thorax))
    half.fissure_complete = np.ones(SHAPE, np.uint8)
    half.fissure_complete[:, :, : SHAPE[2] // 2] = 0
    patient = Patient(cast(Any, half), trees, (), 3)
    patient.tissue = replace(patient.tissue, fissure=0.5)
    rendered = render(patient, CLEAN, 0)
    distance = thorax.fissure_distance.astype(float)
    clear = _eroded(rendered.segments.array > 0) & ~_near(rendered.trees.array > 0)
    left, right = clear.copy(), clear.copy()
    left[:, :, : SHAPE[2] // 2] = False
    right[:, :, SHAPE[2] // 2 :] = False
    hu = rendered.ct.array
    near, far = hu[left & (distance < 0.6)].mean(), hu[left & (distance > 4)].mean()
    assert near - far > 120
    assert abs(hu[right & (distance < 0.6)].mean() - hu[right & (distance > 4)].mean()) < 15


def test_a_fissure_stays_thin_on_a_finer_grid(anatomy: tuple[Any, Any]) -> None:
    patient = patient_of(anatomy)
    patient.tissue = replace(patient.tissue, fissure=0.5)
    box = np.array([40.0, -16.0, -16.0]), np.array([70.0, 16.0, 16.0])
    hu = render(patient, replace(CLEAN, spacing=(0.8,) * 3, thickness=0.8), 0, box).ct.array
    column = hu[:, 36, 4:12].mean(axis=1)
    bright = column > np.median(column) + 100
    assert 1 <= bright.sum() <= 3


def test_texture_belongs_to_the_patient_not_to_the_grid(patient: Patient) -> None:
    box = box_at(patient, (30, 30, 8), (16, 16, 16))
    first = noise_field(9, 4.0, Frame.of_box(*box, (1.0, 1.0, 1.0)))
    inner = box[0] + 8, box[1] - 8
    np.testing.assert_allclose(
        noise_field(9, 4.0, Frame.of_box(*inner, (1.0, 1.0, 1.0))), first[8:-8, 8:-8, 8:-8], atol=1e-4
    )
    assert first.std() == pytest.approx(1.0, abs=0.3)


def test_posterior_lung_is_denser(anatomy: tuple[Any, Any]) -> None:
    patient = patient_of(anatomy)
    patient.tissue = replace(patient.tissue, gravity=0.5)
    rendered = render(patient, CLEAN, 0)
    lung = _eroded(rendered.segments.array > 0) & ~_near(rendered.trees.array > 0)
    y = np.broadcast_to(rendered.frame.axis(1)[None, :, None], lung.shape)
    slope = np.polyfit(y[lung], rendered.ct.array[lung], 1)[0]
    assert slope == pytest.approx(0.5, abs=0.1)


def change(anatomy: tuple[Any, Any], disease: pathology.Pathology) -> tuple[Rendered, Rendered, np.ndarray]:
    """Healthy and diseased scan, and HU difference."""
    healthy = render(patient_of(anatomy), CLEAN, 0)
    diseased = render(patient_of(anatomy, disease), CLEAN, 0)
    return healthy, diseased, diseased.ct.array.astype(int) - healthy.ct.array


def surface(anatomy: tuple[Any, Any]) -> DepthMap:
    return DepthMap.of_lung(anatomy[0].lobes > 0, patient_of(anatomy).frame)


@pytest.mark.parametrize("kind", list(pathology.NoduleKind))
def test_a_nodule_is_bright_round_and_inside_the_lung(anatomy: tuple[Any, Any], kind: pathology.NoduleKind) -> None:
    solid, spiculated = pathology.NoduleKind.SOLID, pathology.NoduleKind.SPICULATED
    nodule = pathology.Nodule((60.0, 20.0, 20.0), 8.0, kind, 5)
    healthy, diseased, difference = change(anatomy, nodule)
    mask = diseased.masks["nodule"].array > 0
    volume = mask.sum() * SPACING**3
    assert 0.5 < volume / (4 / 3 * np.pi * 8**3) < 2.5
    free = mask & (diseased.trees.array == 0) & ~_near(diseased.trees.array > 0)
    assert difference[free].mean() > (300 if kind in (solid, spiculated) else 130)
    assert (difference[~_near(mask)] == 0).mean() > 0.995
    np.testing.assert_array_equal(healthy.segments.array, diseased.segments.array)


def test_a_mediastinal_tumor_takes_fat_and_lung_but_spares_the_heart(anatomy: tuple[Any, Any]) -> None:
    tumor = pathology.MediastinalTumor(((10.0, -25.0, 25.0, 16.0), (22.0, -22.0, 30.0, 14.0)), 5)
    healthy, diseased, difference = change(anatomy, tumor)
    mask = diseased.masks["mediastinal tumor"].array > 0
    fat = mask & (healthy.organs.array == Organ.MEDIASTINAL_FAT) & (diseased.trees.array == 0)
    assert fat.any() and difference[_eroded(fat)].mean() > 80
    assert not mask[np.isin(healthy.organs.array, [Organ.MYOCARDIUM, Organ.LEFT_VENTRICLE, Organ.VENA_CAVA])].any()
    bulge = mask & (healthy.segments.array > 0)
    assert bulge.any() and (diseased.segments.array[bulge] == 0).all()


def test_a_lymph_node_is_an_organ_in_the_fat(anatomy: tuple[Any, Any]) -> None:
    _, diseased, difference = change(anatomy, pathology.LymphNode((0.0, 8.0, 30.0), (8.0, 6.0, 9.0), 5))
    node = diseased.organs.array == Organ.LYMPH_NODE
    assert node.sum() * SPACING**3 == pytest.approx(4 / 3 * np.pi * 8 * 6 * 9, rel=0.15)
    assert difference[_eroded(node)].mean() > 80


def test_emphysema_makes_holes(anatomy: tuple[Any, Any]) -> None:
    disease = pathology.Emphysema(0.6, 30.0, 5, bullae=((70.0, 0.0, 30.0, 10.0),))
    _, diseased, difference = change(anatomy, disease)
    mask = diseased.masks["emphysema"].array > 0
    assert 0.02 < mask.sum() / (diseased.segments.array > 0).sum() < 0.7
    assert difference[mask & (diseased.trees.array == 0)].mean() < -40
    bulla = render(patient_of(anatomy, disease), CLEAN, 0).ct.array[55, 40, 87]
    assert bulla < -930


@pytest.mark.parametrize(
    "disease",
    [
        pathology.GroundGlass(((60.0, 0.0, 10.0, 20.0),), 250.0, 5),
        pathology.CrazyPaving(0.5, 5),
        pathology.AtelectasisBand((60.0, 0.0, -20.0), (0.0, 0.0, 1.0), 20.0, 5.0, 5),
    ],
    ids=lambda disease: disease.name,
)
def test_haze_and_bands_raise_lung_density_where_they_say(
    anatomy: tuple[Any, Any], disease: pathology.Pathology
) -> None:
    healthy, diseased, difference = change(anatomy, disease)
    mask = diseased.masks[disease.name].array > 0
    assert mask.any() and (healthy.segments.array[mask] > 0).all()
    free = mask & ~_near(diseased.trees.array > 0)
    assert difference[free].mean() > 120
    assert (difference[(diseased.segments.array == 0) & ~_near(mask)] == 0).all()


def test_a_consolidated_segment_is_solid_but_its_airways_stay_dark(anatomy: tuple[Any, Any]) -> None:
    codes = tuple(int(code) for code in np.unique(anatomy[0].segments) if 0 < code <= 10)
    healthy, diseased, _ = change(anatomy, pathology.Consolidation(codes, 1.0, 5))
    hu, trees = diseased.ct.array, diseased.trees.array
    mask = diseased.masks["consolidation"].array > 0
    assert abs(np.median(hu[mask & ~_near(trees > 0)]) - 35) < 30
    assert np.median(hu[_eroded(trees == Tree.AIRWAY)]) < -900
    np.testing.assert_array_equal(healthy.segments.array, diseased.segments.array)
    vessels = mask & (trees == Tree.ARTERY)
    assert vessels.any() and (diseased.visible.array[vessels] == 0).all()
    dyed = render(diseased.patient, replace(CLEAN, contrast=Contrast(pulmonary_artery=250.0)), 0)
    assert (dyed.visible.array[vessels] > 0).any()


def test_an_effusion_is_fluid_behind_and_below_and_not_lung(anatomy: tuple[Any, Any]) -> None:
    disease = pathology.Effusion(True, 25.0, 56.0, -70.0, (112.0, 140.0), surface(anatomy))
    healthy, diseased, _ = change(anatomy, disease)
    fluid = diseased.organs.array == Organ.EFFUSION
    np.testing.assert_array_equal(fluid, diseased.masks["effusion"].array > 0)
    assert (healthy.segments.array[fluid] > 0).all() and (diseased.segments.array[fluid] == 0).all()
    assert (diseased.trees.array[fluid] == 0).all()
    k, j, i = np.nonzero(fluid)
    lung = np.argwhere(healthy.segments.array > 0)
    assert k.mean() < lung[:, 0].mean() and j.mean() > lung[:, 1].mean() and (i < SHAPE[2] / 2).all()
    assert abs(np.median(diseased.ct.array[_eroded(fluid)]) - 8) < 10


def test_fibrosis_sits_under_the_pleura(anatomy: tuple[Any, Any]) -> None:
    depth_map = surface(anatomy)
    _, diseased, difference = change(anatomy, pathology.Fibrosis(0.8, -70.0, 140.0, 5, depth_map))
    depth = depth_map.at(diseased.frame)
    lung = diseased.segments.array > 0
    rim, core = lung & (depth < 8), lung & (depth > 26)
    assert difference[rim].std() > 3 * difference[core].std()
    assert difference[rim].mean() > 50


def test_calcium_is_bright_and_small(anatomy: tuple[Any, Any]) -> None:
    disease = pathology.Calcification(((0.0, -20.0, -8.0, 2.5),), (int(Organ.MYOCARDIUM),), 700.0)
    _, diseased, difference = change(anatomy, disease)
    assert difference.max() > 400 and 1 <= (diseased.masks["calcification"].array > 0).sum() < 20


def test_about_half_of_the_patients_are_ill_and_each_can_be_drawn_again(anatomy: tuple[Any, Any]) -> None:
    thorax = anatomy[0]
    drawn = [pathology.sample_pathologies(thorax, seed) for seed in range(120)]
    assert 0.35 < np.mean([len(diseases) > 0 for diseases in drawn]) < 0.65
    names = {disease.name for diseases in drawn for disease in diseases}
    assert len(names) >= 10
    for seed in range(4):
        again = pathology.sample_pathologies(thorax, seed)
        assert [disease.name for disease in again] == [disease.name for disease in drawn[seed]]


def test_every_drawn_disease_paints_the_same_on_a_box_and_on_the_whole(anatomy: tuple[Any, Any]) -> None:
    seeds = np.random.default_rng(2).permutation(60)[:4]
    for seed in seeds:
        diseases = pathology.sample_pathologies(anatomy[0], int(seed), share=1.0)
        patient = patient_of(anatomy, *diseases)
        low, size = (24, 20, 60), (30, 36, 36)
        whole, part = render(patient, CLEAN, 0), render(patient, CLEAN, 0, box_at(patient, low, size))
        cut = tuple(slice(start, start + count) for start, count in zip(low, size, strict=True))
        assert (part.segments.array != whole.segments.array[cut]).mean() < 1e-4
        assert np.abs(part.ct.array.astype(int) - whole.ct.array[cut]).mean() < 0.5


def test_joint_codes_hold_organs_and_segments(patient: Patient) -> None:
    codes = patient.codes
    lung = patient.thorax.lobes > 0
    assert (codes[lung] == LUNG_CODE + patient.trees.segments[lung]).all()
    assert max(Organ) < LUNG_CODE


@pytest.mark.slow
def test_one_call_gives_the_same_patient_at_another_dose_and_without_contrast() -> None:
    from training.phantom import phantom

    full = phantom(5, spacing=3.0, contrast=Phase.PULMONARY)
    low = phantom(5, spacing=3.0, contrast=Phase.NONE, dose=0.1)
    np.testing.assert_array_equal(full.segments.array, low.segments.array)
    np.testing.assert_array_equal(full.trees.array, low.trees.array)
    liver = _eroded(full.organs.array == Organ.LIVER)
    assert low.ct.array[liver].std() > 1.5 * full.ct.array[liver].std()
    artery = _eroded(full.trees.array == Tree.ARTERY)
    assert full.ct.array[artery].mean() > low.ct.array[artery].mean() + 80
    assert set(np.unique(full.segments.array)) == set(range(19))
    assert full.provenance["patient"] == 5 and len(full.graphs[Tree.AIRWAY]) > 300


@pytest.mark.slow
def test_a_box_is_rendered_within_its_budget(patient: Patient) -> None:
    scan = Scan(spacing=(1.0,) * 3, thickness=1.0)
    box = np.array([-90.0, -48.0, -48.0]), np.array([6.0, 48.0, 48.0])
    render(patient, scan, 0, box).ct  # noqa: B018 - compiles
    begin = time.perf_counter()
    rendered = render(patient, scan, 1, box)
    assert rendered.ct.shape == (96, 96, 96) and rendered.skeleton.array.any()
    assert time.perf_counter() - begin < 3.0  # 0.3 s on an idle core
