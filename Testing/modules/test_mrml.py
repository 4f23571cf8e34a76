"""MRML <-> engine on real nodes: geometry under any transform, label maps and meshes there and back."""

from __future__ import annotations

import numpy as np
import pytest

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed: pip install -e '.[host]'")
import vtk  # noqa: E402
from vtk.util.numpy_support import vtk_to_numpy  # noqa: E402

_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def _matrix(array: np.ndarray) -> vtk.vtkMatrix4x4:
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy(np.asarray(array, float).ravel().tolist())
    return matrix


def _rotation(rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return q if np.linalg.det(q) > 0 else q * [1, 1, -1]


def _volume(host, rng: np.random.Generator, shape=(7, 9, 11), mirrored=False):
    """A node with random voxels and a random rigid geometry with random steps."""
    node = slicer.util.addVolumeFromArray(rng.integers(-1000, 1000, shape).astype(np.int16), name="CT")
    affine = np.eye(4)
    affine[:3, :3] = _rotation(rng) * rng.uniform(0.5, 3, 3)
    if mirrored:
        affine[:3, 0] *= -1
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    node.SetIJKToRASMatrix(_matrix(affine))
    return node, affine


def _transformed(node, matrix: np.ndarray):
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "Moved")
    transform.SetMatrixTransformToParent(_matrix(matrix))
    node.SetAndObserveTransformNodeID(transform.GetID())
    return transform


def _engineAffine(geometry) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(geometry.direction).reshape(3, 3) * geometry.spacing
    affine[:3, 3] = geometry.origin
    return affine


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_engine_sees_voxels_where_the_scene_shows_them(host, rng, mirrored) -> None:
    from LCTfoundSlicer.mrml import engineGeometry

    node, affine = _volume(host, rng, mirrored=mirrored)
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = _rotation(rng), rng.uniform(-100, 100, 3)
    _transformed(node, move)
    geometry = engineGeometry(node)
    np.testing.assert_allclose(_engineAffine(geometry), _FLIP @ move @ affine, atol=1e-6)
    voxel = np.array([*rng.uniform(0, 6, 3), 1])
    local = geometry.localFromEngine @ _engineAffine(geometry) @ voxel
    np.testing.assert_allclose(local, affine @ voxel, atol=1e-6)


def test_a_stretching_transform_does_not_change_the_sizes_the_networks_see(host, rng) -> None:
    from LCTfoundSlicer.mrml import engineGeometry

    node, affine = _volume(host, rng)
    _transformed(node, np.diag([1.5, 1.0, 0.8, 1.0]))
    geometry = engineGeometry(node)
    np.testing.assert_allclose(_engineAffine(geometry), _FLIP @ affine, atol=1e-6)


def test_a_sheared_volume_is_refused_with_the_remedy(host, rng) -> None:
    from LCTfoundSlicer.mrml import UnusableVolume, engineGeometry

    node, affine = _volume(host, rng)
    affine[:3, 1] += 0.3 * affine[:3, 0]
    node.SetIJKToRASMatrix(_matrix(affine))
    with pytest.raises(UnusableVolume, match="resample"):
        engineGeometry(node)


def test_a_volume_without_an_image_is_refused(host) -> None:
    from LCTfoundSlicer.mrml import UnusableVolume, engineGeometry

    with pytest.raises(UnusableVolume, match="load"):
        engineGeometry(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode"))


def test_the_array_arrives_whole(host, rng, tmp_path, monkeypatch) -> None:
    from LCTfoundSlicer import mrml

    monkeypatch.setattr(mrml, "_SLAB_BYTES", 500)  # several slabs
    node, _ = _volume(host, rng)
    shares = list(mrml.writeArray(node, tmp_path / "ct.npy"))
    assert len(shares) > 2 and shares == sorted(shares) and shares[-1] == 1.0
    np.testing.assert_array_equal(np.load(tmp_path / "ct.npy"), slicer.util.arrayFromVolume(node))


def test_a_signature_notices_voxels_geometry_transform_and_removal(host, rng) -> None:
    from LCTfoundSlicer.mrml import InputSignature

    node, affine = _volume(host, rng)
    transform = _transformed(node, np.eye(4))

    def changed(change) -> bool:
        signature = InputSignature.of(node)
        assert signature.isCurrent
        change()
        return not signature.isCurrent

    def paint() -> None:
        slicer.util.arrayFromVolume(node)[0, 0, 0] += 1
        slicer.util.arrayFromVolumeModified(node)

    moved = np.eye(4)
    moved[0, 3] = 1
    assert changed(paint)
    assert changed(lambda: node.SetSpacing(1, 2, 3))
    assert changed(lambda: transform.SetMatrixTransformToParent(_matrix(moved)))
    assert not changed(lambda: node.SetName("Another name"))
    assert changed(lambda: slicer.mrmlScene.RemoveNode(node))


def test_label_maps_come_back_from_the_scene_as_they_went_in(host, rng) -> None:
    from LCTfoundLib.anatomy.structures import STRUCTURES
    from LCTfoundSlicer import lung_result, mrml

    node, _ = _volume(host, rng, shape=(60, 20, 24), mirrored=True)
    labels = {"segments": rng.integers(0, 19, (60, 20, 24)), "trees": rng.integers(0, 4, (60, 20, 24))}
    for array in labels.values():
        array[:5] = 0
        array[:, :, 20:] = 0
    result = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    layers = [mrml.labelLayer(node, labels[name].astype(np.uint8)) for name in ("segments", "trees")]
    segments = [(s.key, lung_result._segment(s, layers[s.tree is not None], None, {})) for s in STRUCTURES]
    lung_result._replaceSegments(result, segments)
    back = {name: np.zeros((60, 20, 24), np.uint8) for name in labels}
    shares = list(lung_result.collectLabels(result, node, **back))
    assert len(shares) > 2  # in steps
    for name, array in labels.items():
        np.testing.assert_array_equal(back[name], array)
    assert result.GetSegmentation().GetNumberOfLayers("Binary labelmap") == 2
    voxel = float(np.prod(node.GetSpacing())) / 1000
    volumes = lung_result.labelVolumes(result)
    for s in STRUCTURES:
        count = (labels["segments"] == s.code).sum() if s.tree is None else (labels["trees"] == s.tree).sum()
        assert volumes[s.key] == pytest.approx(count * voxel)


def test_labels_edited_on_another_grid_are_read_on_the_ct(host, rng) -> None:
    """The Segment Editor may leave a segment with its own, finer geometry."""
    from LCTfoundLib.anatomy.structures import STRUCTURES
    from LCTfoundSlicer import lung_result, mrml

    node = slicer.util.addVolumeFromArray(np.zeros((10, 10, 10), np.int16), name="CT")
    node.SetSpacing(2, 2, 2)
    fine = slicer.util.addVolumeFromArray(np.zeros((20, 20, 20), np.int16), name="fine")
    fine.SetOrigin(-0.5, -0.5, -0.5)
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[4:12, 6:10, 2:18] = 1
    segment = lung_result._segment(STRUCTURES[0], mrml.labelLayer(fine, labels), None, {})
    result = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    lung_result._replaceSegments(result, [(STRUCTURES[0].key, segment)])
    back, trees = np.zeros((10, 10, 10), np.uint8), np.zeros((10, 10, 10), np.uint8)
    list(lung_result.collectLabels(result, node, back, trees))
    expected = np.zeros((10, 10, 10), np.uint8)
    expected[2:6, 3:5, 1:9] = 1
    np.testing.assert_array_equal(back, expected)
    assert not trees.any()


@pytest.mark.parametrize("mirrored", [False, True])
def test_meshes_keep_their_place_and_look_outward(host, rng, mirrored) -> None:
    from LCTfoundSlicer.mrml import engineGeometry, polyDataFromMesh

    node, _ = _volume(host, rng, mirrored=mirrored)
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = _rotation(rng), rng.uniform(-100, 100, 3)
    _transformed(node, move)
    geometry = engineGeometry(node)
    sphere = vtk.vtkSphereSource()
    sphere.SetRadius(10)
    sphere.SetCenter(*rng.uniform(-50, 50, 3))
    sphere.Update()
    output = sphere.GetOutput()
    places = vtk_to_numpy(output.GetPoints().GetData()).astype(float)
    faces = vtk_to_numpy(output.GetPolys().GetConnectivityArray()).reshape(-1, 3)
    normals = vtk_to_numpy(output.GetPointData().GetNormals())
    mesh = polyDataFromMesh(places, faces, normals, geometry.localFromEngine)
    local = vtk_to_numpy(mesh.GetPoints().GetData()).astype(float)
    world = local @ move[:3, :3].T + move[:3, 3]
    np.testing.assert_allclose(world @ _FLIP[:3, :3], places, atol=1e-3)
    mass = vtk.vtkMassProperties()
    mass.SetInputData(mesh)
    mass.Update()
    assert mass.GetVolume() == pytest.approx(4 / 3 * np.pi * 1000, rel=0.2)
    corners = local[vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).reshape(-1, 3)]
    outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    middle = local.mean(axis=0)
    assert (np.einsum("ij,ij->i", outward, corners.mean(axis=1) - middle) > 0).all()
    pointing = vtk_to_numpy(mesh.GetPointData().GetNormals())
    assert (np.einsum("ij,ij->i", pointing, local - middle) > 0).all()
