"""Trees and segments of the phantom: exact tiling, valid graphs, anatomy, geometry, statistics."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, lobes_from_segments
from training.phantom.airway import Frame, central_airway
from training.phantom.branching import (
    FillRule,
    VoxelMap,
    accumulate,
    branch_flow,
    fill_cloud,
    generations,
    smooth_nodes,
)
from training.phantom.growth import LungTrees, grow_trees
from training.phantom.literature import LITERATURE, branch_table, main, mask_to_tree, statistics, tree_statistics
from training.phantom.segments import connect, nearest_branch_segments

DATA = Path(os.environ.get("LCTFOUND_DATA", Path(__file__).parents[3] / "shared" / "data"))


def small_thorax(spacing: float = 3.0) -> SimpleNamespace:
    """Two ellipsoid lungs with plane fissures and the landmarks of an adult; no organs."""
    shape = tuple(int(size / spacing) for size in (290, 200, 300))
    origin = np.array([-150.0, -100.0, -190.0])
    k, j, i = np.indices(shape)
    x, y, z = origin[0] + spacing * i, origin[1] + spacing * j, origin[2] + spacing * k
    lobes = np.zeros(shape, dtype=np.uint8)
    for side, codes in ((-1, (1, 2, 3)), (1, (4, 4, 5))):
        lung = ((x - side * 78) / 58) ** 2 + (y / 85) ** 2 + ((z + 50) / 125) ** 2 < 1
        lung &= side * x > 22
        oblique = z + 40 > 1.0 * (y - 5)  # above and in front of the oblique fissure
        upper = z > -40
        lobes[lung & oblique & upper] = codes[0]
        lobes[lung & oblique & ~upper] = codes[1]
        lobes[lung & ~oblique] = codes[2]
    landmarks = {
        "carina": (0, 0, 0),
        "trachea_top": (0, -25, 100),
        "hilum_right": (-34, 5, -22),
        "hilum_left": (42, 5, -24),
        "pulmonary_trunk": (20, -50, -45),
        "left_atrium_superior_right": (-12, -8, -45),
        "left_atrium_inferior_right": (-10, 2, -62),
        "left_atrium_superior_left": (32, -8, -44),
        "left_atrium_inferior_left": (30, 2, -60),
        "aortic_arch": (5, -10, 20),
    }
    grid = SimpleNamespace(spacing=spacing, shape=shape, origin=tuple(origin))
    points = {name: np.array(point, dtype=float) for name, point in landmarks.items()}
    return SimpleNamespace(grid=grid, lobes=lobes, landmarks=points)


@pytest.fixture(scope="module")
def thorax() -> SimpleNamespace:
    return small_thorax()


@pytest.fixture(scope="module", params=[False, True], ids=["main", "shifted"])
def trees(request: pytest.FixtureRequest, thorax: SimpleNamespace) -> LungTrees:
    return grow_trees(thorax, seed=5, shifted=request.param)


def assert_tiles(segments: np.ndarray, lobes: np.ndarray) -> None:
    """Segments cover the lobes exactly, stay in their lobe, and are one 6-connected component each."""
    assert segments.dtype == np.uint8
    assert np.array_equal(lobes_from_segments(segments), lobes)
    for code in range(1, 19):
        if (lobes == LOBE_OF_SEGMENT[code]).any():
            assert ndimage.label(segments == code)[1] == 1, f"segment {code}"


# --- segments --------------------------------------------------------------------------------------------------------


def test_segments_tile_the_lobes_with_one_component_each(trees: LungTrees, thorax: SimpleNamespace) -> None:
    assert_tiles(trees.segments, thorax.lobes)


def test_segment_volumes_are_plausible(trees: LungTrees, thorax: SimpleNamespace) -> None:
    volume = np.bincount(trees.segments.ravel(), minlength=19).astype(float)
    for lobe in range(1, 6):
        codes = np.flatnonzero(LOBE_OF_SEGMENT == lobe)
        share = volume[codes] / volume[codes].sum()
        assert share.min() > 0.04
        assert share.max() < 0.75


def test_segments_lie_where_anatomy_has_them(trees: LungTrees, thorax: SimpleNamespace) -> None:
    grid = thorax.grid
    center = {
        code: np.asarray(grid.origin) + grid.spacing * np.argwhere(trees.segments == code).mean(0)[::-1]
        for code in range(1, 19)
    }
    x, y, z = ({code: point[axis] for code, point in center.items()} for axis in range(3))
    assert z[1] > max(z[2], z[3]) and y[3] < y[2]  # apical above; anterior in front of posterior
    assert x[4] < x[5]  # lateral is farther to the right
    assert z[6] > max(z[c] for c in (7, 8, 9, 10)) and z[15] > max(z[c] for c in (16, 17, 18))
    assert x[7] > x[9] and y[8] < y[10]  # medial, lateral; anterior, posterior
    assert z[11] > z[13] and z[13] > z[14] and y[12] < y[11]
    assert y[16] < y[18] and x[17] > x[18]


def test_connect_repairs_noise(rng: np.random.Generator, thorax: SimpleNamespace) -> None:
    lobes = thorax.lobes
    codes = np.array([0, 1, 4, 6, 11, 15], dtype=np.uint8)[lobes]
    noisy = np.where(rng.random(lobes.shape) < 0.3, codes + (lobes > 0), codes).astype(np.uint8)
    noisy[rng.random(lobes.shape) < 0.1] = 0
    noisy[lobes == 0] = 0
    fixed = connect(noisy, lobes)
    assert np.array_equal(fixed > 0, lobes > 0)
    assert np.array_equal(LOBE_OF_SEGMENT[fixed], lobes)
    for code in np.unique(fixed[fixed > 0]):
        assert ndimage.label(fixed == code)[1] == 1
        sizes = np.bincount(ndimage.label(noisy == code)[0].ravel())[1:]
        assert ((fixed == code) & (noisy == code)).sum() >= sizes.max()


def test_nearest_branch_agrees_with_brute_force(rng: np.random.Generator) -> None:
    lobes = np.zeros((24, 22, 26), dtype=np.uint8)
    lobes[2:22, 2:20, 2:13], lobes[2:22, 2:20, 13:24] = 1, 4
    points = rng.uniform([4, 4, 4], [48, 40, 44], (30, 3))
    codes = np.where(points[:, 0] < 26, rng.integers(1, 4, 30), rng.integers(11, 15, 30))
    planes = VoxelMap(np.zeros_like(lobes), 2.0, np.zeros(3))
    index = np.argwhere(lobes > 0)
    world = 2.0 * index[:, ::-1]
    distance = np.linalg.norm(world[:, None] - points[None], axis=2)
    distance[LOBE_OF_SEGMENT[codes][None] != lobes[tuple(index.T)][:, None]] = np.inf
    expected = np.zeros_like(lobes)
    expected[tuple(index.T)] = codes[distance.argmin(1)]
    result = nearest_branch_segments(planes, lobes, points, codes, tolerance=0.0, coarse=2)
    assert (result == connect(expected, lobes))[lobes > 0].mean() > 0.99


# --- graphs ----------------------------------------------------------------------------------------------------------


def graphs(trees: LungTrees) -> dict[str, TreeGraph]:
    return {"airway": trees.airway, "artery": trees.artery, "vein": trees.vein}


def test_graphs_are_rooted_and_ordered(trees: LungTrees, thorax: SimpleNamespace) -> None:
    for name, graph in graphs(trees).items():
        nodes = np.arange(len(graph))
        assert (graph.parent < nodes).all()
        assert (graph.parent < 0).sum() == (4 if name == "vein" else 1)
        assert np.isfinite(graph.points).all() and (graph.radius > 0).all()
        assert all(len(field) == len(graph) for field in (graph.radius, graph.parent, graph.segment, graph.generation))
    assert np.allclose(trees.airway.points[0], thorax.landmarks["trachea_top"])
    assert np.allclose(trees.artery.points[0], thorax.landmarks["pulmonary_trunk"])
    assert len(trees.airway_wall) == len(trees.airway) and (trees.airway_wall > 0).all()


def test_pieces_are_short_and_radii_shrink_outward(trees: LungTrees) -> None:
    for graph in graphs(trees).values():
        child = graph.parent >= 0
        up = graph.parent[child]
        length = np.linalg.norm(graph.points[child] - graph.points[up], axis=1)
        assert np.quantile(length, 0.999) < 6.5
        assert (graph.radius[child] <= 1.15 * graph.radius[up] + 1e-6).mean() > 0.995


def test_generation_counts_bifurcations(trees: LungTrees) -> None:
    for graph in graphs(trees).values():
        children = graph.children()
        for node in np.random.default_rng(0).choice(len(graph), 60):
            count, here = 0, int(node)
            while graph.parent[here] >= 0:
                count += len(children[graph.parent[here]]) > 1
                here = int(graph.parent[here])
            assert graph.generation[node] == count


def test_every_segment_has_its_bronchus_and_artery(trees: LungTrees) -> None:
    for graph in (trees.airway, trees.artery):
        assert set(np.unique(graph.segment)) == set(range(19))
    airway = trees.airway
    inner = airway.parent >= 0
    above = airway.segment[airway.parent[inner]]
    # once a branch belongs to a segment, all below belongs to it
    assert (airway.segment[inner][above > 0] == above[above > 0]).all()


def test_branch_numbers() -> None:
    trees = grow_trees(small_thorax(), seed=1)
    count = {name: len(branch_table(graph)) for name, graph in graphs(trees).items()}
    assert 200 < count["airway"] < 1500
    assert 1500 < count["artery"] < 4500
    assert 1500 < count["vein"] < 4500


def test_seed_decides_everything(thorax: SimpleNamespace) -> None:
    first, again, other = (grow_trees(thorax, seed) for seed in (3, 3, 4))
    for name in ("airway", "artery", "vein"):
        a, b = getattr(first, name), getattr(again, name)
        assert np.array_equal(a.points, b.points) and np.array_equal(a.radius, b.radius)
    assert np.array_equal(first.segments, again.segments) and first.variants == again.variants
    assert not np.array_equal(first.segments, other.segments)


def test_detail_sets_the_number_of_branches(thorax: SimpleNamespace) -> None:
    coarse, fine = (grow_trees(thorax, 2, detail=detail) for detail in (0.5, 1.5))
    assert len(coarse.artery) < 0.7 * len(fine.artery)
    assert len(coarse.vein) < 0.7 * len(fine.vein)


# --- anatomy ---------------------------------------------------------------------------------------------------------


def test_segmental_branches_stay_in_their_lobe(trees: LungTrees, thorax: SimpleNamespace) -> None:
    lobes = VoxelMap(thorax.lobes, thorax.grid.spacing, np.asarray(thorax.grid.origin))
    for graph in (trees.airway, trees.artery):
        inner = np.flatnonzero(graph.segment > 0)
        # segmental stems may still run at the hilum, outside of all lobes
        home = lobes.at(graph.points[inner])
        assert (home == LOBE_OF_SEGMENT[graph.segment[inner]])[home > 0].mean() > 0.97
        assert (home > 0).mean() > 0.93


def test_branches_supply_their_segment(trees: LungTrees, thorax: SimpleNamespace) -> None:
    segments = VoxelMap(trees.segments, thorax.grid.spacing, np.asarray(thorax.grid.origin))
    children = np.bincount(trees.artery.parent[1:], minlength=len(trees.artery))
    tip = (children == 0) & (trees.artery.segment > 0)
    assert (segments.at(trees.artery.points[tip]) == trees.artery.segment[tip]).mean() > 0.9


def test_artery_runs_beside_the_airway(trees: LungTrees) -> None:
    inner = (trees.airway.segment > 0) & (trees.airway.radius > 1.0)
    points, radius = trees.airway.points[inner], trees.airway.radius[inner] + trees.airway_wall[inner]
    artery = trees.artery.segment > 0
    distance, near = cKDTree(trees.artery.points[artery]).query(points)
    gap = distance - radius - trees.artery.radius[artery][near]
    assert (gap < 3.0).mean() > 0.95


def test_trees_hardly_overlap(trees: LungTrees) -> None:
    """Brute force: nodes of one tree inside the lumen of another."""
    pairs = ((trees.vein, trees.artery), (trees.vein, trees.airway), (trees.artery, trees.airway))
    for one, other in pairs:
        inner, outer = np.flatnonzero(one.segment > 0)[::4], np.flatnonzero(other.segment > 0)
        inside = np.zeros(len(inner), dtype=bool)
        for part in np.array_split(np.arange(len(inner)), 20):
            distance = np.linalg.norm(one.points[inner[part], None] - other.points[None, outer], axis=2)
            inside[part] = (distance < other.radius[outer][None]).any(1)
        assert inside.mean() < 0.03


def test_veins_run_between_segments(thorax: SimpleNamespace) -> None:
    trees = grow_trees(thorax, seed=6)
    same = np.ones(trees.segments.shape, dtype=bool)
    for axis in range(3):
        step = np.diff(trees.segments.astype(int), axis=axis) != 0
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        same[tuple(low)] &= ~step
        same[tuple(high)] &= ~step
    away = ndimage.distance_transform_edt(same) * thorax.grid.spacing
    distance = VoxelMap(away, thorax.grid.spacing, np.asarray(thorax.grid.origin))
    lobes = VoxelMap(thorax.lobes, thorax.grid.spacing, np.asarray(thorax.grid.origin))

    def typical(graph: TreeGraph) -> float:
        big = (graph.radius > 1.2) & (graph.radius < 4) & (lobes.at(graph.points) > 0)
        return float(np.median(distance.at(graph.points[big])))

    assert typical(trees.vein) < 0.75 * typical(trees.artery)


def test_vessels_reach_the_pleura(trees: LungTrees, thorax: SimpleNamespace) -> None:
    lungs = thorax.lobes > 0
    surface = np.argwhere(lungs & ~ndimage.binary_erosion(lungs))
    points = np.asarray(thorax.grid.origin) + thorax.grid.spacing * surface[:, ::-1]
    vessels = cKDTree(np.concatenate([trees.artery.points, trees.vein.points]))
    assert (vessels.query(points)[0] < 10).mean() > 0.75


def test_variants_have_their_frequency(thorax: SimpleNamespace) -> None:
    lobes = VoxelMap(thorax.lobes, thorax.grid.spacing, np.asarray(thorax.grid.origin))
    core = {c: lobes.world(np.argwhere(thorax.lobes == c)[::50]) for c in range(1, 6)}
    frame = Frame(thorax.landmarks, lobes, core, {c: cKDTree(p) for c, p in core.items()}, 1.0)
    drawn = [central_airway(frame, np.random.default_rng(seed)).variants for seed in range(600)]
    share = {name: np.mean([name in variants for variants in drawn]) for name in {v for d in drawn for v in d}}
    assert abs(share["right B1+2 common trunk"] - 0.185) < 0.06
    assert abs(share["left B1, B2, B3 trifurcation"] - 0.173) < 0.06
    assert abs(share["left basal trifurcation"] - 0.187) < 0.06
    assert share.get("tracheal bronchus", 0.0) < 0.025


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("damage", ["no lower lobe", "tiny middle lobe", "base cut off", "no left lung", "no lungs"])
def test_grows_in_damaged_lungs(damage: str, shifted: bool) -> None:
    thorax = small_thorax(4.0)
    lobes = thorax.lobes
    if damage == "no lower lobe":
        lobes[lobes == 3] = 0
    elif damage == "tiny middle lobe":
        lobes[tuple(np.argwhere(lobes == 2)[20:].T)] = 0
    elif damage == "base cut off":
        lobes[:25] = 0
    else:
        lobes[lobes > (3 if damage == "no left lung" else 0)] = 0
    trees = grow_trees(thorax, 1, shifted=shifted)
    assert_tiles(trees.segments, lobes)
    for graph in graphs(trees).values():
        assert np.isfinite(graph.points).all() and (graph.parent < np.arange(len(graph))).all()
        assert set(LOBE_OF_SEGMENT[graph.segment]) <= set(np.unique(lobes)) | {0}


# --- growth ----------------------------------------------------------------------------------------------------------


def ball(rng: np.random.Generator) -> tuple[VoxelMap, np.ndarray]:
    k, j, i = np.indices((41, 41, 41)) - 20
    array = (k**2 + j**2 + i**2 <= 19**2).astype(np.uint8)
    cloud = rng.normal(size=(150, 3))
    cloud *= (36.0 * rng.random(150) ** (1 / 3) / np.linalg.norm(cloud, axis=1))[:, None]
    return VoxelMap(array, 2.0, np.full(3, -40.0)), cloud


@pytest.mark.parametrize("constructive", [False, True])
def test_filling_reaches_the_cloud_inside_the_territory(rng: np.random.Generator, constructive: bool) -> None:
    territory, cloud = ball(rng)
    rule = FillRule(constructive=constructive)
    ends, parents = fill_cloud(cloud.copy(), np.zeros(3), np.array([0, 0, 1.0]), territory, territory, 1, rule, 7)
    assert (territory.at(ends) == 1).all()
    assert (parents < np.arange(len(parents))).all()
    distance = cKDTree(ends).query(cloud)[0]
    assert np.quantile(distance, 0.95) < 6.0
    leaves = len(ends) - len(np.unique(parents[parents >= 0]))
    assert 0.8 * len(cloud) < leaves <= len(cloud)


def test_filling_respects_the_angle_limit(rng: np.random.Generator) -> None:
    territory, cloud = ball(rng)
    ends, parents = fill_cloud(
        cloud.copy(), np.zeros(3), np.array([0, 0, 1.0]), territory, territory, 1, FillRule(max_angle=50), 3
    )
    starts = np.where(parents[:, None] >= 0, ends[parents], 0.0)
    way = (ends - starts) / np.linalg.norm(ends - starts, axis=1, keepdims=True)
    inner = parents >= 0
    angle = np.degrees(np.arccos(np.clip((way[inner] * way[parents[inner]]).sum(1), -1, 1)))
    assert (angle < 50.1).mean() > 0.97  # the rest is the way out of a dead end


def test_accumulate_and_flow_agree_with_a_walk(rng: np.random.Generator) -> None:
    parent = np.array([-1, *(rng.integers(0, n) for n in range(1, 80))])
    own = rng.random(80)
    total = own.copy()
    for node in range(1, 80):
        here = parent[node]
        while here >= 0:
            total[here] += own[node]
            here = parent[here]
    assert np.allclose(accumulate(parent, own), total)
    leaves = ~np.isin(np.arange(80), parent)
    assert branch_flow(parent)[0] == leaves.sum()


def test_smoothing_keeps_ends_and_straightens() -> None:
    points = np.array([[0, 0, 0], [1, 1, 0], [2, -1, 0], [3, 1, 0], [4, 0, 0]], dtype=float)
    parent = np.arange(-1, 4)
    smooth = smooth_nodes(points, parent, 20, np.zeros(5, dtype=bool))
    assert np.array_equal(smooth[[0, 4]], points[[0, 4]])
    assert np.abs(smooth[:, 1]).max() < 0.1


# --- statistics ------------------------------------------------------------------------------------------------------


def y_graph() -> TreeGraph:
    """A stem of 20 mm and two arms of 10 mm at 45 degrees, radii 3, 2 and 1."""
    s = np.sqrt(0.5)
    stem = [(0, 0, -z) for z in (0, 5, 10, 15, 20)]
    left = [(d * s, 0, -20 - d * s) for d in (5, 10)]
    right = [(-d * s, 0, -20 - d * s) for d in (5, 10)]
    parent = np.array([-1, 0, 1, 2, 3, 4, 5, 4, 7])
    radius = np.array([3, 3, 3, 3, 3, 2, 2, 1, 1], dtype=float)
    zero = np.zeros(9, dtype=int)
    return TreeGraph(np.array(stem + left + right, dtype=float), radius, parent, zero, generations(parent))


def test_statistics_of_a_known_tree() -> None:
    table = branch_table(y_graph())
    assert table.parent.tolist() == [-1, 0, 0]
    assert np.allclose(table.length, [20, 10, 10]) and np.allclose(table.diameter, [6, 4, 2])
    assert table.order.tolist() == [2, 1, 1] and table.generation.tolist() == [0, 1, 1]
    result = tree_statistics(y_graph())
    assert result["angle"] == pytest.approx(45) and result["minor/major diameter"] == pytest.approx(0.5)
    assert result["child/parent diameter"] == pytest.approx(0.5)


def test_mask_to_tree_recovers_a_drawn_tree() -> None:
    graph, size = y_graph(), (50, 24, 60)
    k, j, i = np.indices(size)
    world = np.stack([(i - 30) * 0.8, (j - 12) * 0.8, (k - 45) * 0.8], axis=-1)
    mask = np.zeros(size, dtype=bool)
    for node in range(1, len(graph)):
        a, b = graph.points[graph.parent[node]], graph.points[node]
        t = np.clip(((world - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)
        mask |= np.linalg.norm(world - (a + t[..., None] * (b - a)), axis=-1) < graph.radius[node]
    table = branch_table(mask_to_tree(mask, (0.8, 0.8, 0.8), top_root=True))
    assert len(table) == 3
    assert table.length[0] == pytest.approx(20, abs=6)
    assert table.diameter[0] == pytest.approx(6, abs=1.2)


def test_statistics_are_in_the_range_of_literature(thorax: SimpleNamespace) -> None:
    values = statistics(grow_trees(thorax, seed=8), thorax)
    limits = {
        "trachea.diameter": (13, 23),
        "right main.angle": (20, 55),
        "left main.angle": (28, 60),
        "airway.angle": (28, 48),
        "airway.length/diameter": (2.5, 6),
        "airway.child/parent diameter": (0.65, 0.85),
        "airway.minor/major diameter": (0.75, 0.95),
        "airway.strahler branching": (2.2, 3.3),
        "airway.strahler diameter": (1.3, 1.65),
        "airway.count 5": (22, 45),
        "artery/airway diameter": (0.9, 1.6),
        "artery.strahler diameter": (1.35, 1.75),
    }
    for key, (low, high) in limits.items():
        assert low < values[key] < high, key
    assert set(LITERATURE) <= set(values)
    assert sum(values[f"share {name}"] for name in ("RS1", "RS2", "RS3")) == pytest.approx(1)


def test_table_says_when_real_trees_are_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("training.phantom.thorax")
    main(["--patients", "1", "--spacing", "4", "--trees", str(tmp_path / "none")])
    text = capsys.readouterr().out
    assert "Real trees are left out" in text and "Tawhai 2004" in text and "volume share RS1" in text


# --- whole thorax ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shifted", [False, True])
def test_trees_of_a_synthetic_thorax(shifted: bool) -> None:
    synthetic = pytest.importorskip("training.phantom.thorax")
    thorax = synthetic.make_thorax(11, 2.5, shifted=shifted)
    trees = grow_trees(thorax, 11, shifted=shifted)
    assert np.array_equal(lobes_from_segments(trees.segments), thorax.lobes)


@pytest.mark.slow
def test_growth_is_fast_enough(thorax: SimpleNamespace) -> None:
    fine = small_thorax(1.5)
    grow_trees(thorax, 1)  # compiled
    begin = time.process_time()
    grow_trees(fine, 1)
    assert time.process_time() - begin < 6.0


@pytest.mark.real_data
@pytest.mark.parametrize("number", [0, 2])
def test_trees_grow_in_a_real_lobe_map(number: int) -> None:
    files = sorted((DATA / "shapes" / "lobes").glob("*.nrrd"))[:13]
    if not files:
        pytest.skip(f"no lobe maps in {DATA / 'shapes' / 'lobes'}; set LCTFOUND_DATA")
    from training.phantom.thorax import thorax_from_lobes

    sitk = pytest.importorskip("SimpleITK")
    image = sitk.DICOMOrient(sitk.ReadImage(str(files[number])), "LPS")
    x, y, z = image.GetSpacing()
    thorax = thorax_from_lobes(sitk.GetArrayFromImage(image), (x, y, z), image.GetOrigin(), 1, spacing=2.5)
    trees = grow_trees(thorax, number)
    assert np.array_equal(lobes_from_segments(trees.segments), thorax.lobes)
    assert set(range(1, 19)) <= set(np.unique(trees.airway.segment))
