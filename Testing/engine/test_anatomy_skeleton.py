"""Skeleton graphs and mask tools against exact trees and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import close_ball, coarse_grid, dilate_ball, paint_tube, resample, signed_distance
from LCTfoundLib.anatomy.skeleton import airway_root, nearest_nodes, skeleton_graph
from LCTfoundLib.anatomy.thinning import thin
from LCTfoundLib.volume import Volume
from Testing.engine.synthetic_trees import TreeSpec, blank, random_tree, rasterize

SPEC = TreeSpec(depth=4, trunk_mm=28, trunk_radius=4.5)


def _small_tree(rng: np.random.Generator, spacing=1.0) -> tuple[TreeGraph, Volume]:  # type: ignore[no-untyped-def]
    steps = np.array((spacing,) * 3 if isinstance(spacing, float) else spacing)
    grid = blank(tuple(np.round(120 / steps[::-1]).astype(int)), tuple(steps))
    tree = random_tree(rng, SPEC, np.array([0, 0, 50.0]), np.array([0, 0.1, -1.0]))
    return tree, grid.with_array(rasterize(tree, grid))


@pytest.mark.parametrize("spacing", [1.0, (0.8, 0.8, 1.6), (0.7, 0.7, 2.5)])
def test_rasterized_trees_come_back(rng: np.random.Generator, spacing) -> None:  # type: ignore[no-untyped-def]
    """Means over eight trees, each bound at least four standard errors off what 100 trees had."""
    measured = np.array([_compared(*_small_tree(rng, spacing)) for _ in range(8)])
    branches, generations, length, away = measured.mean(axis=0)
    assert branches <= 3.0, "of 15; 0 to 0.7 measured"
    assert generations <= 1.5, "0 to 0.3 measured"
    assert length == pytest.approx(1.0, abs=0.06), "0.97 to 1.02 measured"
    assert away < 1.5, "voxels; 0.8 to 1.2 measured"


def _compared(tree: TreeGraph, mask: Volume) -> tuple[float, float, float, float]:
    """Branches and generations too many or too few, ratio of lengths, and the distance of 95% of nodes in voxels."""
    found = skeleton_graph(mask, tree.points[0])
    assert (found.parent < 0).sum() == 1
    assert (found.parent < np.arange(len(found))).all(), "a parent comes before its children"
    assert np.linalg.norm(found.points[0] - tree.points[0]) < 6.0, "it begins at the given root"
    # The mask has a half ball of the tube's radius at each free end, and centerlines go on to where the mask ends.
    caps = tree.radius[tree.child_counts() == 0].sum() + tree.radius[0]
    away, _ = cKDTree(tree.points).query(found.points)
    return (
        abs(len(found.branches()) - len(tree.branches())),
        abs(found.generation.max() - tree.generation.max()),
        found.lengths().sum() / (tree.lengths().sum() + caps),
        np.percentile(away, 95) / max(mask.spacing),
    )


def test_radii_are_those_of_the_tubes(rng: np.random.Generator) -> None:
    tree, mask = _small_tree(rng)
    found = skeleton_graph(mask, tree.points[0])
    _, node = cKDTree(tree.points).query(found.points)
    for radius in np.unique(tree.radius.round(3)):
        here = np.isclose(tree.radius[node], radius, atol=2e-3) & (tree.child_counts()[node] == 1)
        assert np.median(found.radius[here]) == pytest.approx(radius, abs=0.35)


def test_the_root_of_an_airway_is_its_thick_upper_end(rng: np.random.Generator) -> None:
    grid = blank((110, 90, 90))
    mask = grid.array.copy()
    for points, radius in (
        ([[0.0, 0, 30], [0, 0, -10]], 7.0),
        ([[0.0, 0, -10], [20, 0, -25]], 5.0),
        ([[0.0, 0, -10], [-20, 0, -25], [-30, 0, 45]], 2.0),  # a bronchus that rises above the trachea's top
    ):
        paint_tube(mask, np.array(points), np.full(len(points), radius), grid)
    root = airway_root(grid.with_array(mask))
    assert root is not None and np.linalg.norm(root - [0, 0, 34]) < 7.0
    assert airway_root(grid) is None


def test_components_are_kept_and_spurs_are_not(rng: np.random.Generator) -> None:
    grid = blank((60, 40, 40))
    mask = grid.array.copy()
    ends = np.array([[0.0, 0, -25], [0, 0, 25]])
    paint_tube(mask, ends, np.array([5.0, 5.0]), grid)
    paint_tube(mask, np.array([[0.0, 0, 0], [5.0, 0, 0]]), np.array([1.0, 1.0]), grid)  # a bump, 1 mm out of the tube
    paint_tube(mask, np.array([[14.0, 14, -10], [14, 14, 10]]), np.array([1.5, 1.5]), grid)
    found = skeleton_graph(grid.with_array(mask), ends[1])
    assert (found.parent < 0).sum() == 2
    assert len(found.branches()) == 2
    assert len(skeleton_graph(grid)) == 0


def test_loops_are_cut_at_their_thinnest_place() -> None:
    grid = blank((60, 60, 20))
    mask = grid.array.copy()
    corners = np.array([[0.0, -20, -20], [0, 20, -20], [0, 20, 20], [0, -20, 20]])
    for thick, a, b in ((3.5, 0, 1), (3.5, 1, 2), (3.5, 3, 0), (1.2, 2, 3)):
        paint_tube(mask, corners[[a, b]], np.array([thick] * 2), grid)
    found = skeleton_graph(grid.with_array(mask), corners[0])
    links = np.linalg.norm(found.points[1:] - found.points[found.parent[1:]], axis=1)
    assert (found.parent < 0).sum() == 1
    assert links.max() < 4.0
    leaf = found.points[found.child_counts() == 0]
    assert (leaf[:, 2] > 10).all(), "the cut is on the thin side"


def test_nearest_nodes_prefer_the_thick_tube_inside_itself(rng: np.random.Generator) -> None:
    tree, mask = _small_tree(rng)
    voxels = mask.world_from_index(np.argwhere(mask.array))
    owner = nearest_nodes(tree, voxels)
    # Brute force over all nodes of one branch's exact mask away from bifurcations: they must own its voxels.
    branches = tree.branches()
    trunk = branches.nodes()[0][5:-8]
    only = np.zeros(len(tree), bool)
    only[trunk] = True
    inside = rasterize(tree, mask, only)[mask.array]
    assert (branches.of_node[owner[inside]] == 0).mean() > 0.97


def test_branches_partition_the_graph(rng: np.random.Generator) -> None:
    tree, _ = _small_tree(rng)
    branches = tree.branches()
    nodes = branches.nodes()
    assert sorted(np.concatenate(nodes)) == list(range(len(tree)))
    assert branches.length.sum() == pytest.approx(tree.lengths().sum())
    for branch, chain in enumerate(nodes):
        assert chain[0] == branches.first[branch] and chain[-1] == branches.last[branch]
        assert (tree.parent[chain[1:]] == chain[:-1]).all()
        assert branches.radius[branch] == pytest.approx(np.median(tree.radius[chain]))
    below = branches.descendants(1)
    kept = tree.subset(below[branches.of_node])
    assert (kept.parent < 0).sum() == 1
    assert kept.lengths()[1:].sum() == pytest.approx(branches.length[below].sum() - tree.lengths()[branches.first[1]])


# -- mask tools ------------------------------------------------------------------------------------------------------


def test_balls_against_brute_force(rng: np.random.Generator) -> None:
    spacing = (1.0, 1.5, 2.0)
    mask = rng.random((12, 13, 14)) > 0.97
    mask[0, 0, 0] = True
    points = np.argwhere(np.ones_like(mask)) * spacing[::-1]
    near = cKDTree(points[mask.ravel()]).query(points)[0].reshape(mask.shape)
    assert (dilate_ball(mask, 3.0, spacing) == (near <= 3.0)).all()
    ball = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), -1) * spacing[::-1]
    element = np.linalg.norm(ball, axis=-1) <= 3.0
    padded = np.pad(mask, 6)
    expected = ndimage.binary_erosion(ndimage.binary_dilation(padded, element), element)[6:-6, 6:-6, 6:-6]
    assert (close_ball(mask, 3.0, spacing) == (expected | mask)).all()


def test_signed_distance_is_zero_at_the_border() -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[5:15] = True
    distance = signed_distance(mask, (1.0, 1.0, 1.0))
    assert distance[5, 10, 10] == pytest.approx(0.5) and distance[4, 10, 10] == pytest.approx(-0.5)
    assert distance[9, 10, 10] == pytest.approx(4.5)


def test_resampling_keeps_linear_images(rng: np.random.Generator) -> None:
    slope = rng.normal(size=3)
    shape, spacing, origin = (20, 24, 28), (1.0, 1.2, 2.0), (-3.0, 5.0, 1.0)
    grid = Volume(np.zeros(shape), spacing, origin)
    plane = grid.with_array((grid.world_from_index(np.indices(shape).reshape(3, -1).T) @ slope).reshape(shape))
    for step in (0.7, 2.5, 3.1):
        other = coarse_grid(plane, step) if step > 2 else Volume(np.zeros((9, 9, 9)), (step,) * 3, (2.0, 10.0, 8.0))
        expected = other.world_from_index(np.indices(other.shape).reshape(3, -1).T) @ slope
        inner = (slice(2, -2),) * 3 if step > 2 else (slice(None),) * 3
        np.testing.assert_allclose(
            resample(plane, other)[inner], expected.reshape(other.shape)[inner], atol=0.02 * np.abs(expected).max()
        )


# -- thinning --------------------------------------------------------------------------------------------------------


def _topology(mask: np.ndarray) -> tuple[int, int, int]:
    """Components (26), cavities (6) and Euler number (26) of a mask."""
    from skimage.measure import euler_number

    return (
        int(ndimage.label(mask, np.ones((3, 3, 3)))[1]),
        int(ndimage.label(~np.pad(mask, 1))[1]),
        int(euler_number(mask, connectivity=3)),
    )


def test_thinning_keeps_the_topology_of_any_mask(rng: np.random.Generator) -> None:
    for _ in range(10):
        noise = ndimage.gaussian_filter(rng.normal(size=(22, 23, 24)), 1.5)
        mask = noise > np.quantile(noise, rng.uniform(0.5, 0.95))
        lines = thin(mask)
        assert not (lines & ~mask).any()
        assert _topology(lines) == _topology(mask)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_straight_bars_of_any_width_keep_their_line(width: int, axis: int) -> None:
    shape, box = [14] * 3, [slice(4, 4 + width)] * 3
    shape[axis], box[axis] = 40, slice(5, 35)
    mask = np.zeros(shape, bool)
    mask[tuple(box)] = True
    lines = thin(mask)
    along = np.flatnonzero(lines.any(axis=tuple(a for a in range(3) if a != axis)))
    assert lines.sum() == len(along) >= 29 - width, "one voxel per step along the bar"
