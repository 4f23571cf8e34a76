"""Surfaces must be closed, keep the label's volume, lie where the voxels are, and survive decimation."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import vtk
from scipy import ndimage
from vtk.util import numpy_support

from LCTfoundLib.anatomy.structures import STRUCTURES
from LCTfoundLib.export.decimation import decimate
from LCTfoundLib.export.mesh_files import (
    GLTF_FROM_LPS,
    Model,
    write_glb,
    write_materials,
    write_obj,
    write_ply,
    write_stl,
)
from LCTfoundLib.export.parts import STRUCTURE_PARTS, choose_parts
from LCTfoundLib.export.surfaces import (
    Mesh,
    SurfaceSettings,
    label_surface,
    lung_surfaces,
    mesh_report,
    point_normals,
)
from LCTfoundLib.volume import Volume
from Testing.engine.export_shapes import lung_volumes, oblique


@pytest.fixture(scope="module")
def meshes() -> dict[str, Mesh]:
    _, segments, trees = lung_volumes()
    return lung_surfaces(segments, trees)


def model_of(key: str, meshes: dict[str, Mesh]) -> Model:
    return Model(*choose_parts([key]), meshes[key])


def vtk_counts(mesh: Mesh) -> tuple[int, int, float]:
    """Boundary edges, non-manifold edges and volume, as VTK counts them."""
    data = vtk.vtkPolyData()
    points = vtk.vtkPoints()
    points.SetData(numpy_support.numpy_to_vtk(mesh.points, deep=True))
    data.SetPoints(points)
    cells = vtk.vtkCellArray()
    cells.SetData(3, numpy_support.numpy_to_vtkIdTypeArray(mesh.faces.ravel().astype(np.int64), deep=True))
    data.SetPolys(cells)
    counts = []
    for boundary in (True, False):
        edges = vtk.vtkFeatureEdges()
        edges.SetInputData(data)
        edges.FeatureEdgesOff()
        edges.ManifoldEdgesOff()
        edges.SetBoundaryEdges(boundary)
        edges.SetNonManifoldEdges(not boundary)
        edges.Update()
        counts.append(edges.GetOutput().GetNumberOfCells())
    mass = vtk.vtkMassProperties()
    mass.SetInputData(data)
    return counts[0], counts[1], mass.GetVolume()


def test_all_structures_are_watertight_and_keep_their_volume(meshes: dict[str, Mesh]) -> None:
    _, segments, trees = lung_volumes()
    assert list(meshes) == [s.key for s in STRUCTURES]
    for structure in STRUCTURES:
        mesh = meshes[structure.key]
        label = trees.array == structure.code - 18 if structure.tree else segments.array == structure.code
        expected = label.sum() * 36.0
        boundary, crossed, volume = vtk_counts(mesh)
        assert (boundary, crossed) == (0, 0), structure.key
        assert volume == pytest.approx(expected, rel=0.02), structure.key
        report = mesh_report(mesh)
        assert report.watertight
        assert report.volume == pytest.approx(volume, rel=1e-3)  # positive: the faces look outward
        assert abs(report.volume_error) < 0.02


def test_the_trees_touch_the_image_border_and_are_closed_there(meshes: dict[str, Mesh]) -> None:
    ct, _, trees = lung_volumes()
    assert (trees.array[-1] > 0).any()
    top = ct.origin[2] + ct.spacing[2] * (ct.shape[0] - 1)
    assert meshes["airway"].points[:, 2].max() > top - ct.spacing[2] / 2


def test_a_connected_tree_stays_in_one_piece(meshes: dict[str, Mesh]) -> None:
    _, _, trees = lung_volumes()
    for code, key in ((1, "airway"), (3, "pulmonary_vein")):
        pieces = ndimage.label(trees.array == code, np.ones((3, 3, 3)))[1]
        assert mesh_report(meshes[key]).components == pieces


@pytest.mark.parametrize("step", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1)])
def test_voxels_that_touch_at_an_edge_or_corner_are_joined_in_trees(step: tuple[int, int, int]) -> None:
    mask = np.zeros((7, 7, 7), np.uint8)
    for n in (-1, 0, 1):
        mask[tuple(3 + n * np.array(step))] = 1
    report = mesh_report(label_surface(Volume(mask), thin=True))
    assert report.watertight
    assert report.components == 1
    assert report.volume == pytest.approx(3, rel=0.02)


def test_pinholes_in_a_tree_do_not_become_bubbles() -> None:
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[2:10, 2:10, 2:10] = 1
    mask[5, 5, 5] = 0
    assert mesh_report(label_surface(Volume(mask), thin=True)).components == 1


@pytest.mark.parametrize("thin", [True, False])
def test_random_masks_give_closed_manifolds(rng: np.random.Generator, thin: bool) -> None:
    for density in (0.15, 0.5, 0.8):
        noise = ndimage.gaussian_filter(rng.random((24, 22, 20)), 0.6)
        mask = noise < np.quantile(noise, density)
        mesh = label_surface(Volume(mask, (0.7, 1.1, 2.5)), thin=thin)
        report = mesh_report(mesh)
        assert (report.boundary_edges, report.non_manifold_edges) == (0, 0)
        assert vtk_counts(mesh)[:2] == (0, 0)
        if density == 0.5:
            assert report.volume == pytest.approx(mask.sum() * 0.7 * 1.1 * 2.5, rel=0.02)


@pytest.mark.parametrize("thin", [True, False])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_points_lie_at_the_voxels_of_flipped_and_oblique_volumes(
    rng: np.random.Generator, flips: tuple[int, int, int], thin: bool
) -> None:
    direction = oblique(tuple(rng.uniform(-25, 25, 3)), flips)
    spacing = (0.8, 0.5, 2.0)
    k, j, i = np.indices((30, 60, 50))
    ball = ((k - 14) * 2.0) ** 2 + ((j - 25) * 0.5) ** 2 + ((i - 30) * 0.8) ** 2 < 10**2
    volume = Volume(ball.astype(np.uint8), spacing, (12.0, -34.0, 56.0), direction)
    center = np.array([12.0, -34.0, 56.0]) + direction @ (np.array([30, 25, 14]) * spacing)
    mesh = label_surface(volume, thin=thin)
    away = mesh.points - center
    assert np.linalg.norm(away, axis=1) == pytest.approx(10, abs=1.2)
    assert np.linalg.norm(away.mean(axis=0)) < 0.2
    outward = np.einsum("ij,ij->i", point_normals(mesh.points, mesh.faces), away)
    assert (outward > 0).mean() > 0.99


def test_smoothing_takes_off_steps_and_stays_within_a_voxel() -> None:
    k, j, i = np.indices((40, 60, 60))
    slope = (j - 30) * 0.7 < 8 + 0.25 * (k - 20) * 2.5
    box = slope & (abs(i - 30) < 22) & (abs(k - 20) < 15) & (j > 8)
    mesh = label_surface(Volume(box.astype(np.uint8), (0.7, 0.7, 2.5)))
    x, y, z = mesh.points.T
    middle = (abs(x - 21) < 10) & (abs(z - 50) < 20) & (y > 18)
    plane = 21 + 8 + 0.25 * (z[middle] - 50)
    assert middle.sum() > 50
    assert np.abs(y[middle] - plane).max() < 0.7
    assert np.std(y[middle] - plane) < 0.15  # the steps of the slices alone have 0.18


def test_segments_on_a_fine_grid_are_averaged_and_keep_place_and_volume() -> None:
    k, j, i = np.indices((61, 62, 63))
    ball = ((k - 30) ** 2 + (j - 31) ** 2 + (i - 32) ** 2 < 25**2).astype(np.uint8)
    volume = Volume(ball, (0.4, 0.4, 0.4), (5.0, 6.0, 7.0))
    fine = label_surface(volume, settings=SurfaceSettings(segment_voxel=0.1))
    coarse = label_surface(volume)
    assert len(coarse.faces) < 0.4 * len(fine.faces)
    assert mesh_report(coarse).volume == pytest.approx(ball.sum() * 0.064, rel=0.005)
    assert coarse.points.mean(axis=0) == pytest.approx(fine.points.mean(axis=0), abs=0.05)


def test_the_triangle_budget_is_kept() -> None:
    _, segments, trees = lung_volumes()
    meshes = lung_surfaces(segments, trees, SurfaceSettings(triangle_budget=12_000))
    assert sum(len(m.faces) for m in meshes.values()) <= 12_600
    assert all(mesh_report(m).watertight and abs(mesh_report(m).volume_error) < 0.02 for m in meshes.values())


def test_decimation_keeps_pieces_handles_and_shape(rng: np.random.Generator) -> None:
    u, v = np.meshgrid(np.arange(96), np.arange(48), indexing="ij")
    a, b = 2 * np.pi * u / 96, 2 * np.pi * v / 48
    ring = 10 + 3 * np.cos(b)
    points = np.stack([ring * np.cos(a), ring * np.sin(a), 3 * np.sin(b)], axis=-1).reshape(-1, 3)
    points += rng.normal(0, 1e-3, points.shape)
    index = (u * 48 + v).ravel()
    right, up = (((u + 1) % 96) * 48 + v).ravel(), (u * 48 + (v + 1) % 48).ravel()
    both = (((u + 1) % 96) * 48 + (v + 1) % 48).ravel()
    faces = np.concatenate([np.column_stack([index, right, both]), np.column_stack([index, both, up])])
    small, less = decimate(points, faces, 1200)
    report = mesh_report(Mesh(small, less))
    assert 1150 < report.triangles <= 1200
    assert report.watertight and report.components == 1
    assert report.points - report.triangles / 2 == 0  # Euler number of a torus: still one handle
    ring = np.hypot(small[:, 0], small[:, 1]) - 10
    assert np.hypot(ring, small[:, 2]) == pytest.approx(3, abs=0.15)


def test_decimation_never_goes_below_a_closed_body() -> None:
    tetrahedron = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    _, left = decimate(tetrahedron, faces, 0)
    assert len(left) == 4


def test_an_open_and_a_crossed_mesh_are_reported() -> None:
    cube = label_surface(Volume(np.pad(np.ones((4, 4, 4), np.uint8), 1)))
    assert mesh_report(Mesh(cube.points, cube.faces[1:])).boundary_edges == 3
    extra = np.concatenate([cube.faces, cube.faces[:1]])
    assert not mesh_report(Mesh(cube.points, extra)).watertight


def test_empty_labels_give_no_surface() -> None:
    empty = Volume(np.zeros((5, 6, 7), np.uint8))
    assert lung_surfaces(empty, empty) == {}
    assert mesh_report(label_surface(empty)).triangles == 0


def test_a_single_voxel_gives_a_closed_body_of_its_volume() -> None:
    mask = np.zeros((3, 3, 3), np.uint8)
    mask[1, 1, 1] = 1
    for thin in (True, False):
        report = mesh_report(label_surface(Volume(mask, (0.5, 0.5, 2.0)), thin=thin))
        assert report.watertight and report.volume == pytest.approx(0.5, rel=0.02)


def test_cancel_stops_between_structures() -> None:
    _, segments, trees = lung_volumes()

    def stop(share: float, text: str) -> None:
        if share > 0.1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        lung_surfaces(segments, trees, progress=stop)


def read_with(reader: vtk.vtkAlgorithm, path: Path) -> tuple[np.ndarray, np.ndarray, vtk.vtkPolyData]:
    reader.SetFileName(str(path))
    reader.Update()
    data = reader.GetOutput()
    points = numpy_support.vtk_to_numpy(data.GetPoints().GetData())
    faces = numpy_support.vtk_to_numpy(data.GetPolys().GetConnectivityArray()).reshape(-1, 3)
    return points, faces, data


def test_stl_read_back_by_vtk_is_the_mesh_and_names_its_frame(meshes: dict[str, Mesh], tmp_path: Path) -> None:
    mesh = meshes["left_s01_02"]
    write_stl([model_of("left_s01_02", meshes)], tmp_path / "a.stl")
    points, faces, _ = read_with(vtk.vtkSTLReader(), tmp_path / "a.stl")
    assert points[faces] == pytest.approx(mesh.points[mesh.faces], abs=1e-3)
    header = (tmp_path / "a.stl").read_bytes()[:80]
    assert header.startswith(b"SPACE=LPS; UNITS=mm") and not header.startswith(b"solid")


def test_ply_read_back_by_vtk_has_points_faces_and_colors(meshes: dict[str, Mesh], tmp_path: Path) -> None:
    structure = STRUCTURES[20]
    mesh = meshes[structure.key]
    write_ply([model_of(structure.key, meshes)], tmp_path / "a.ply")
    points, faces, data = read_with(vtk.vtkPLYReader(), tmp_path / "a.ply")
    assert points == pytest.approx(mesh.points, abs=1e-3)
    assert (faces == mesh.faces).all()
    colors = numpy_support.vtk_to_numpy(data.GetPointData().GetScalars())
    assert (colors[:, :3] == structure.color).all()


def test_obj_read_back_by_vtk_and_its_material(meshes: dict[str, Mesh], tmp_path: Path) -> None:
    structure = STRUCTURES[3]
    mesh = meshes[structure.key]
    write_obj([model_of(structure.key, meshes)], tmp_path / "a.obj")
    points, faces, _ = read_with(vtk.vtkOBJReader(), tmp_path / "a.obj")
    assert points[faces] == pytest.approx(mesh.points[mesh.faces], abs=1e-3)
    text = write_materials(STRUCTURE_PARTS, tmp_path).read_text()
    assert f"newmtl {structure.key}\nKd 0.6824 0.8353 0.5059" in text
    assert "usemtl right_s04" in (tmp_path / "a.obj").read_text()[:200]


def test_glb_is_read_by_vtk_and_its_root_turns_lps_upright(meshes: dict[str, Mesh], tmp_path: Path) -> None:
    path = tmp_path / "lungs.glb"
    write_glb([model_of(key, meshes) for key in meshes], path, "case")
    raw = path.read_bytes()
    magic, version, total = struct.unpack_from("<4sII", raw)
    assert (magic, version, total) == (b"glTF", 2, len(raw))
    length = struct.unpack_from("<I", raw, 12)[0]
    gltf = json.loads(raw[20 : 20 + length])
    assert [n["name"] for n in gltf["nodes"][1:]] == [s.name for s in STRUCTURES]
    assert np.reshape(gltf["nodes"][0]["matrix"], (4, 4)).T == pytest.approx(GLTF_FROM_LPS)
    reader = vtk.vtkGLTFReader()
    reader.SetFileName(str(path))
    reader.ApplyDeformationsToGeometryOn()
    reader.Update()
    output = reader.GetOutput()
    bounds = np.zeros(6)
    output.GetBounds(bounds)
    world = np.concatenate([m.points for m in meshes.values()])
    upright = world @ GLTF_FROM_LPS[:3, :3].T
    turned = np.stack([upright.min(axis=0), upright.max(axis=0)], axis=1).ravel()
    assert bounds == pytest.approx(turned, abs=1e-5)


def test_gltf_transform_puts_head_up_face_front_and_left_left() -> None:
    turn = GLTF_FROM_LPS[:3, :3] * 1000
    assert np.linalg.det(turn) == pytest.approx(1)
    assert (turn @ [0, 0, 1]).tolist() == [0, 1, 0]  # superior is up
    assert (turn @ [0, -1, 0]).tolist() == [0, 0, 1]  # anterior looks at the viewer
    assert (turn @ [1, 0, 0]).tolist() == [1, 0, 0]  # the patient's left is at the viewer's right


def test_an_empty_glb_is_valid(tmp_path: Path) -> None:
    write_glb([], tmp_path / "a.glb", "nothing")
    raw = (tmp_path / "a.glb").read_bytes()
    assert struct.unpack_from("<I", raw, 8)[0] == len(raw)
    assert "meshes" not in json.loads(raw[20:])
