"""Label maps and the Slicer segmentation: read back by SimpleITK, by hand and, where it is installed, by Slicer."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LCTfoundLib.anatomy.structures import SEGMENTS, STRUCTURES, Side, lobes_from_segments
from LCTfoundLib.errors import LCTfoundError, OutputError
from LCTfoundLib.export import segmentation
from LCTfoundLib.export.mesh_files import Model, write_materials, write_obj, write_ply, write_stl
from LCTfoundLib.export.options import Frame
from LCTfoundLib.export.parts import PARTS, STRUCTURE_PARTS, Layer, Part, choose_parts
from LCTfoundLib.export.segmentation import write_label_maps, write_seg_nrrd
from LCTfoundLib.export.surfaces import lung_surfaces
from LCTfoundLib.export.tables import volume_rows
from LCTfoundLib.export.terminology import term_of
from LCTfoundLib.volume import Volume
from Testing.engine.export_shapes import lung_volumes, oblique

#: The codes that the design notes list as verified; a change here needs a source.
VERIFIED = {
    "110726009",
    "81040000",
    "122972007",
    "72674008",
    "3236000",
    "39743006",
    "22270008",
    "3788008",
    "24028007",
    "7771000",
    "123037004",
    "45653009",
    "72481006",
    "90572001",
    "39607008",
    "51440002",
}


def header_of(path: Path) -> tuple[dict[str, str], bytes]:
    """Fields of a NRRD header, and the unpacked data."""
    head, _, data = path.read_bytes().partition(b"\n\n")
    lines = [line for line in head.decode("utf-8").split("\n")[1:] if not line.startswith("#")]
    fields = dict(line.split(":=" if ":=" in line.split(": ")[0] else ": ", 1) for line in lines)
    return fields, gzip.decompress(data)


def test_seg_nrrd_has_two_layers_with_the_voxels(rng: np.random.Generator, tmp_path: Path) -> None:
    direction = oblique(tuple(rng.uniform(-20, 20, 3)), (-1, 1, -1))
    _, segments, trees = lung_volumes(direction=direction)
    written = write_seg_nrrd(segments, trees, tmp_path / "a.seg.nrrd", {"right_s01": 0.875})
    assert written == [s.key for s in STRUCTURES]
    image = sitk.ReadImage(str(tmp_path / "a.seg.nrrd"), sitk.sitkVectorUInt8)
    array = sitk.GetArrayFromImage(image)
    assert (array[..., 0] == segments.array).all()
    assert (array[..., 1] == trees.array).all()
    assert image.GetSpacing() == pytest.approx(segments.spacing)
    assert image.GetOrigin() == pytest.approx(segments.origin)
    assert np.reshape(image.GetDirection(), (3, 3)) == pytest.approx(direction)


def test_seg_nrrd_fields_name_color_and_code_each_structure(tmp_path: Path) -> None:
    _, segments, trees = lung_volumes()
    write_seg_nrrd(segments, trees, tmp_path / "a.seg.nrrd", {"right_s01": 0.875})
    fields, data = header_of(tmp_path / "a.seg.nrrd")
    assert fields["kinds"] == "list domain domain domain"
    assert fields["space"] == "left-posterior-superior"
    assert fields["Segmentation_MasterRepresentation"] == "Binary labelmap"
    array = np.frombuffer(data, np.uint8).reshape(*segments.shape, 2)
    for number, structure in enumerate(STRUCTURES):
        field = {name: fields[f"Segment{number}_{name}"] for name in ("ID", "Name", "Layer", "LabelValue", "Extent")}
        assert (field["ID"], field["Name"]) == (structure.key, structure.name)
        color = np.array(fields[f"Segment{number}_Color"].split(), float) * 255
        assert color == pytest.approx(structure.color, abs=0.01)
        voxels = np.argwhere(array[..., int(field["Layer"])] == int(field["LabelValue"]))
        box = np.stack([voxels.min(axis=0), voxels.max(axis=0)], axis=1)[::-1].ravel()
        assert [int(n) for n in field["Extent"].split()] == box.tolist()
    assert "LCTfound.Confidence:0.875|" in fields["Segment0_Tags"]
    assert "LCTfound.Confidence" not in fields["Segment1_Tags"]


def test_absent_structures_are_left_out(tmp_path: Path) -> None:
    _, segments, trees = lung_volumes()
    segments.array[segments.array == 5] = 0
    written = write_seg_nrrd(segments, trees.with_array(np.zeros_like(trees.array)), tmp_path / "a.seg.nrrd")
    assert written == [s.key for s in SEGMENTS if s.code != 5]
    assert "right_s05" not in (tmp_path / "a.seg.nrrd").read_bytes().partition(b"\n\n")[0].decode()


def test_only_verified_codes_are_used_and_sides_are_right() -> None:
    for part in PARTS:
        term = part.term
        assert {term.category.value, term.type.value, term.modifier.value} - {""} <= VERIFIED, part.key
    for structure in STRUCTURES:
        term = term_of(structure)
        if term.type.value == "72674008":
            assert term.modifier.meaning == ("Right" if structure.side is Side.RIGHT else "Left")
        entry = term.slicer_entry().split("~")
        assert len(entry) == 7 and all(part.count("^") == 2 for n, part in enumerate(entry) if n not in (0, 4))
    # A code with the side in its meaning must stand on that side, and on the segment of that name.
    by_key = {s.key: s for s in STRUCTURES}
    for key, words in {
        "right_s02": "Posterior segment of right upper",
        "right_s03": "Anterior segment of right upper",
        "right_s06": "Superior segment of right lower",
        "left_s03": "Anterior segment of left upper",
    }.items():
        term = term_of(by_key[key])
        assert term.type.meaning.startswith(words) and not term.modifier.value
        assert by_key[key].name.split()[-1] in term.type.meaning.lower()


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_label_maps_read_back_on_the_input_grid(
    rng: np.random.Generator, flips: tuple[int, int, int], tmp_path: Path
) -> None:
    direction = oblique(tuple(rng.uniform(-20, 20, 3)), flips)
    _, segments, trees = lung_volumes(direction=direction)
    folder = tmp_path / "Lungenflügel 肺"
    folder.mkdir()
    paths = write_label_maps(segments, trees, folder)
    expected = {"segments": segments.array, "trees": trees.array, "lobes": lobes_from_segments(segments.array)}
    assert set(paths) == set(expected)
    for name, array in expected.items():
        image = sitk.ReadImage(str(paths[name]))
        assert (sitk.GetArrayFromImage(image) == array).all()
        corner = tuple(n - 1 for n in reversed(array.shape))
        assert image.TransformIndexToPhysicalPoint(corner) == pytest.approx(
            segments.world_from_index(np.array(array.shape) - 1), abs=1e-3
        )


def test_chosen_parts_have_label_maps_of_their_own(tmp_path: Path) -> None:
    _, segments, trees = lung_volumes()
    parts = choose_parts(["right_s02", "left_upper_lobe", "right_lung", "left_lung", "lungs", "airway"])
    paths = write_label_maps(segments, trees, tmp_path, parts)
    found = {name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for name, path in paths.items()}
    assert list(found) == [layer.value for layer in Layer]
    sides = np.where(segments.array == 0, 0, np.where(segments.array <= 10, 1, 2))
    assert (found["segments"] == np.where(segments.array == 2, 2, 0)).all()
    assert (found["trees"] == (trees.array == 1)).all()
    assert (found["lobes"] == np.where(np.isin(segments.array, [11, 12, 13, 14]), 4, 0)).all()
    assert (found["sides"] == sides).all()
    assert (found["lungs"] == (segments.array > 0)).all()


def test_every_structure_lobe_and_lung_can_be_chosen() -> None:
    _, segments, trees = lung_volumes()
    rows = {row.key: row for row in volume_rows(segments, trees, segments)}
    assert {part.key for part in PARTS} == set(rows)
    for part in PARTS:
        assert part.name == rows[part.key].name
        label = part.table[(trees if part.is_tree else segments).array]
        assert rows[part.key].volume == pytest.approx(label.sum() * segments.voxel_ml), part.key
    assert choose_parts(None) == STRUCTURE_PARTS == PARTS[:21]
    assert [p.key for p in choose_parts([" Lungs", "airway", "airway"])] == ["airway", "lungs"]
    with pytest.raises(LCTfoundError, match="no structure 'heart'; choose from right_s01, "):
        choose_parts(["airway", "heart"])
    with pytest.raises(LCTfoundError, match="No structure is chosen; choose from"):
        choose_parts([])


def test_a_file_cut_short_by_a_full_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, segments, trees = lung_volumes()
    write = sitk.WriteImage

    def write_less(image: sitk.Image, path: str, **options: object) -> None:
        write(image, path, **options)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)

    monkeypatch.setattr(segmentation.sitk, "WriteImage", write_less)
    with pytest.raises(OutputError, match="free disk space"):
        write_label_maps(segments, trees, tmp_path)


READ_IN_SLICER = """
import json, sys
import numpy as np, slicer, vtk
from vtk.util import numpy_support
scene = slicer.vtkMRMLScene()
node, storage = slicer.vtkMRMLSegmentationNode(), slicer.vtkMRMLSegmentationStorageNode()
scene.AddNode(node); scene.AddNode(storage)
storage.SetFileName(sys.argv[1])
assert storage.ReadData(node)
segmentation = node.GetSegmentation()
found = []
for n in range(segmentation.GetNumberOfSegments()):
    key, segment = segmentation.GetNthSegmentID(n), segmentation.GetNthSegment(n)
    tag, image, matrix = vtk.reference(""), slicer.vtkOrientedImageData(), vtk.vtkMatrix4x4()
    segment.GetTag(slicer.vtkSegment.GetTerminologyEntryTagName(), tag)
    node.GetBinaryLabelmapRepresentation(key, image)
    image.GetImageToWorldMatrix(matrix)
    shape = [b - a + 1 for a, b in zip(image.GetExtent()[0::2], image.GetExtent()[1::2])][::-1]
    array = numpy_support.vtk_to_numpy(image.GetPointData().GetScalars()).reshape(shape)
    index = np.argwhere(array > 0)[:, ::-1].mean(axis=0) + image.GetExtent()[0::2]
    center = matrix.MultiplyPoint([*index, 1])[:3]
    found.append({"key": key, "name": segment.GetName(), "color": list(segment.GetColor()), "tag": str(tag),
                  "voxels": int((array > 0).sum()), "center_ras": list(center)})
models = []
for path, default in zip(sys.argv[2::2], sys.argv[3::2]):
    model, reader = slicer.vtkMRMLModelNode(), slicer.vtkMRMLModelStorageNode()
    scene.AddNode(model); scene.AddNode(reader)
    reader.SetFileName(path); reader.SetCoordinateSystem(int(default))
    assert reader.ReadData(model)
    models.append({"bounds_ras": list(model.GetPolyData().GetBounds()), "space": reader.GetCoordinateSystem(),
                   "triangles": model.GetPolyData().GetNumberOfPolys()})
print(json.dumps({"layers": segmentation.GetNumberOfLayers(), "segments": found, "models": models,
                  "geometry": segmentation.GetConversionParameter("Reference image geometry")}))
"""


def slicer_python() -> str | None:
    """A Python that has slicer-core: this one, or the one in LCTFOUND_SLICER_PYTHON."""
    if named := os.environ.get("LCTFOUND_SLICER_PYTHON"):
        return named
    return sys.executable if importlib.util.find_spec("slicer") else None


def read_in_slicer(segmentation_file: Path, models: list[tuple[Path, int]]) -> dict:
    """What Slicer finds in the files; it is told to expect the models in a frame (0 RAS, 1 LPS) if they name none."""
    arguments = [str(text) for model in models for text in model]
    command = [str(slicer_python()), "-c", READ_IN_SLICER, str(segmentation_file), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


needs_slicer = pytest.mark.skipif(
    slicer_python() is None, reason="slicer-core is not installed (or set LCTFOUND_SLICER_PYTHON)"
)


@needs_slicer
def test_real_slicer_reads_names_colors_terms_and_voxels(rng: np.random.Generator, tmp_path: Path) -> None:
    direction = oblique(tuple(rng.uniform(-20, 20, 3)), (-1, -1, 1))
    _, segments, trees = lung_volumes(direction=direction)
    write_seg_nrrd(segments, trees, tmp_path / "a.seg.nrrd")
    seen = read_in_slicer(tmp_path / "a.seg.nrrd", [])
    assert seen["layers"] == 2
    assert_segments(seen["segments"], STRUCTURE_PARTS, segments, trees)
    matrix = np.array(seen["geometry"].split(";")[:16], float).reshape(4, 4)
    assert matrix == pytest.approx(np.diag([-1.0, -1, 1, 1]) @ segments.affine, abs=1e-6)


def assert_segments(seen: list[dict], parts: Iterable[Part], segments: Volume, trees: Volume) -> None:
    for part, item in zip(parts, seen, strict=True):
        label = np.isin((trees if part.is_tree else segments).array, part.codes)
        assert (item["key"], item["name"]) == (part.key, part.name)
        assert np.array(item["color"]) * 255 == pytest.approx(part.color, abs=0.01)
        assert item["tag"] == part.term.slicer_entry()
        assert item["voxels"] == label.sum()
        center = segments.world_from_index(np.argwhere(label).mean(axis=0)) * (-1, -1, 1)
        assert item["center_ras"] == pytest.approx(center, abs=1e-3)


@needs_slicer
@pytest.mark.parametrize(
    "keys",
    [["right_s03"], ["airway", "pulmonary_vein"], ["left_s03", "airway", "left_upper_lobe", "left_lung", "lungs"]],
)
def test_real_slicer_reads_chosen_parts_also_where_they_overlap(keys: list[str], tmp_path: Path) -> None:
    _, segments, trees = lung_volumes()
    parts = choose_parts(keys)
    assert write_seg_nrrd(segments, trees, tmp_path / "a.seg.nrrd", parts=parts) == keys
    seen = read_in_slicer(tmp_path / "a.seg.nrrd", [])
    assert seen["layers"] == len({part.layer for part in parts})
    assert_segments(seen["segments"], parts, segments, trees)


@needs_slicer
def test_real_slicer_takes_the_frame_of_a_model_from_its_file(rng: np.random.Generator, tmp_path: Path) -> None:
    direction = oblique(tuple(rng.uniform(-20, 20, 3)), (-1, -1, 1))
    _, segments, trees = lung_volumes(direction=direction)
    write_seg_nrrd(segments, trees, tmp_path / "a.seg.nrrd")
    parts = choose_parts(["lungs", "airway"])
    models = [
        Model(part, mesh)
        for part, mesh in zip(parts, lung_surfaces(segments, trees, parts=parts).values(), strict=True)
    ]
    write_materials(parts, tmp_path)
    files = []
    for frame in Frame:
        for write, suffix in ((write_stl, "stl"), (write_obj, "obj"), (write_ply, "ply")):
            path = tmp_path / f"{frame}.{suffix}"
            write(models, path, frame)
            files.append((path, 0 if frame is Frame.LPS else 1))  # the other frame is what it expects
    seen = read_in_slicer(tmp_path / "a.seg.nrrd", files)["models"]
    points = np.concatenate([model.mesh.points for model in models])
    low, high = points.min(axis=0), points.max(axis=0)
    for (path, other), model in zip(files, seen, strict=True):
        assert model["space"] == 1 - other, path.name
        bounds = [-high[0], -low[0], -high[1], -low[1], low[2], high[2]]
        assert model["bounds_ras"] == pytest.approx(bounds, abs=1e-2), path.name
        assert model["triangles"] == sum(len(model.mesh.faces) for model in models)


def test_huge_label_maps_are_packed_slice_by_slice(tmp_path: Path) -> None:
    zeros = Volume(np.broadcast_to(np.uint8(0), (300, 512, 512)))
    write_seg_nrrd(zeros, zeros, tmp_path / "a.seg.nrrd")
    assert len(header_of(tmp_path / "a.seg.nrrd")[1]) == 2 * 300 * 512 * 512
