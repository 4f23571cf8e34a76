"""Choosing what goes out: structures, lobes and lungs, triangles, frame, one file or many."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import vtk
from vtk.util import numpy_support

from LCTfoundLib import cli
from LCTfoundLib.anatomy.structures import STRUCTURES
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.export.bundle import ExportOptions, Format, Frame, LungExport, export_all
from LCTfoundLib.export.options import MESH_FORMATS, TRIANGLES
from LCTfoundLib.export.parts import Part, choose_parts
from LCTfoundLib.export.surfaces import Mesh, mesh_report
from Testing.engine.export_shapes import lung_export

#: A segment, a lobe around it, a tree and both lungs.
KEYS = ["right_s02", "airway", "right_upper_lobe", "lungs"]
MESHES = [f.value for f in MESH_FORMATS]


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def exported(folder: Path, export: LungExport | None = None, **options: object) -> Path:
    export_all(export or lung_export(), folder, ExportOptions.parse(options))
    return folder


def label_volume(part: Part, export: LungExport) -> float:
    """mm3, counted."""
    labels = export.trees if part.is_tree else export.segments
    return float(np.isin(labels.array, part.codes).sum() * np.prod(labels.spacing))


def mesh_of(path: Path) -> Mesh:
    """A mesh file as VTK reads it, points that coincide joined."""
    readers = {".stl": vtk.vtkSTLReader, ".obj": vtk.vtkOBJReader, ".ply": vtk.vtkPLYReader}
    reader = readers[path.suffix]()
    reader.SetFileName(str(path))
    reader.Update()
    data = reader.GetOutput()
    points = numpy_support.vtk_to_numpy(data.GetPoints().GetData()).astype(float)
    return Mesh(points, numpy_support.vtk_to_numpy(data.GetPolys().GetConnectivityArray()).reshape(-1, 3))


def gltf_of(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[20 : 20 + struct.unpack_from("<I", raw, 12)[0]])


class TestParsing:
    def test_what_is_missing_or_null_is_the_default(self) -> None:
        assert ExportOptions.parse({}) == ExportOptions()
        nulls = {"formats": None, "structures": None, "triangles": None, "source_dicom": None}
        assert ExportOptions.parse(nulls) == ExportOptions((), None, TRIANGLES, Frame.LPS, False, False, ())
        assert ExportOptions().wanted == tuple(Format) and not ExportOptions().requires(Format.DICOM_SEG)

    def test_a_request_as_json_sends_it(self) -> None:
        text = """{"formats": ["stl", ".GLB", "dicom-seg"], "structures": ["airway", "right_upper_lobe"],
                   "triangles": 5000, "frame": "ras", "single_file": true, "source_dicom": ["/a/1", "/a/2"]}"""
        options = ExportOptions.parse(json.loads(text))
        assert options.formats == (Format.STL, Format.GLB, Format.DICOM_SEG) == options.wanted
        assert options.requires(Format.DICOM_SEG) and not options.requires(Format.OBJ)
        assert [part.key for part in options.parts] == ["airway", "right_upper_lobe"]
        assert (options.triangles, options.frame, options.single_file) == (5000, Frame.RAS, True)
        assert options.source_dicom == (Path("/a/1"), Path("/a/2"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"formats": ["dwg"]}, "no format 'dwg'; choose from seg.nrrd"),
            ({"structures": ["spleen"]}, "no structure 'spleen'; choose from right_s01"),
            ({"structures": []}, "No structure is chosen; choose from"),
            ({"structures": "airway"}, "not understood .'airway' is no list.; correct"),
            ({"frame": "LAS"}, "no frame 'LAS'; choose from LPS, RAS"),
            ({"triangles": 20}, "20 triangles are too few; choose at least 1000"),
            ({"triangles": "many"}, "not understood"),
            ({"single_file": "no"}, "'no' is neither true nor false"),
            ({"singleFile": True}, "no export option 'singleFile'; choose from formats, structures"),
        ],
    )
    def test_what_is_not_understood_is_named_with_the_remedy(self, options: dict, message: str) -> None:
        with pytest.raises(LCTfoundError, match=message):
            ExportOptions.parse(options)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--structures", "airway,spleen"], "no structure 'spleen'"),
            (["--format", "stl,dwg"], "no format 'dwg'"),
            (["--triangles", "7"], "too few"),
        ],
    )
    def test_the_shell_refuses_it_before_it_reads(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "ct.nii.gz").write_bytes(b"not read")
        assert cli.main(["segment-lungs", str(tmp_path / "ct.nii.gz"), str(tmp_path / "out"), *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestStructures:
    def test_models_and_labels_hold_the_chosen_ones(self, tmp_path: Path) -> None:
        folder = exported(tmp_path / "out", formats=[*MESHES, "seg.nrrd", "nifti", "csv"], structures=KEYS)
        expected = {"manifest.json", "volumes.csv", "segmentation.seg.nrrd", "models/lungs.glb"}
        expected |= {f"models/{kind}/{key}.{kind}" for kind in ("stl", "obj", "ply") for key in KEYS}
        expected |= {"models/obj/structures.mtl"}
        expected |= {f"labels/{name}.nii.gz" for name in ("segments", "trees", "lobes", "lungs")}
        assert files_of(folder) == expected
        names = [node["name"] for node in gltf_of(folder / "models/lungs.glb")["nodes"][1:]]
        assert names == [part.name for part in choose_parts(KEYS)]
        # The table is always of the whole case.
        assert len((folder / "volumes.csv").read_text().splitlines()) == 1 + 29

    @pytest.mark.parametrize("triangles", [1_000, 4_000, TRIANGLES])
    def test_models_are_watertight_and_keep_the_volume_at_any_size(self, triangles: int, tmp_path: Path) -> None:
        export = lung_export()
        folder = exported(tmp_path / "out", export, formats=["obj"], structures=KEYS, triangles=triangles)
        entries = {item["key"]: item for item in manifest_of(folder)["structures"]}
        for part in choose_parts(KEYS):
            report = mesh_report(mesh_of(folder / "models" / "obj" / f"{part.key}.obj"))
            assert report.watertight, part.key
            assert report.volume == pytest.approx(label_volume(part, export), rel=0.02)
            assert entries[part.key]["mesh"]["triangles"] == report.triangles
        assert sum(entries[key]["mesh"]["triangles"] for key in KEYS) <= 1.05 * triangles

    def test_the_manifest_tells_choice_files_and_what_is_absent(self, tmp_path: Path) -> None:
        export = lung_export()
        export.segments.array[np.isin(export.segments.array, [4, 5])] = 0
        export.trees.array[export.trees.array == 3] = 0
        keys = ["right_s05", "right_s06", "right_middle_lobe", "pulmonary_vein", "left_lung"]
        folder = exported(tmp_path / "out", export, formats=["stl", "glb", "seg.nrrd"], structures=keys)
        manifest = manifest_of(folder)
        assert manifest["export"] == {
            "formats": ["stl", "glb", "seg.nrrd"],
            "not_written": {},
            "structures": ["right_s05", "right_s06", "pulmonary_vein", "right_middle_lobe", "left_lung"],
            "absent": ["right_s05", "pulmonary_vein", "right_middle_lobe"],
            "triangles": TRIANGLES,
            "single_file": False,
        }
        assert manifest["models"] == {
            "models/stl/right_s06.stl": ["right_s06"],
            "models/stl/left_lung.stl": ["left_lung"],
            "models/lungs.glb": ["right_s06", "left_lung"],
        }
        assert [item["key"] for item in manifest["structures"]] == [
            *(s.key for s in STRUCTURES),
            "right_middle_lobe",
            "left_lung",
        ]
        lung = manifest["structures"][-1]
        assert lung["present"] and lung["files"] == ["models/stl/left_lung.stl"] and lung["mesh"]["watertight"]
        assert (lung["code"], lung["type"]["value"], lung["modifier"]["value"]) == (None, "39607008", "7771000")
        assert not manifest["structures"][-2]["present"]

    def test_a_choice_of_which_nothing_is_there_is_refused(self, tmp_path: Path) -> None:
        export = lung_export()
        export.trees.array[:] = 0
        with pytest.raises(
            LCTfoundError, match="none of the chosen structures .Airway, Pulmonary vein.; choose others"
        ):
            exported(tmp_path / "out", export, structures=["airway", "pulmonary_vein"])
        assert list(tmp_path.iterdir()) == []

    def test_the_report_shows_the_whole_case_all_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = exported(tmp_path / "out", formats=["stl", "report"], structures=["airway"], frame="RAS")
        html = (folder / "report.html").read_text(encoding="utf-8")
        assert all(f"{side} lung, outer side" in html for side in ("Right", "Left"))
        assert "1 surface in RAS millimeters" in html
        assert files_of(folder) == {"manifest.json", "report.html", "models/stl/airway.stl"}


class TestFrame:
    def test_ras_turns_points_and_says_so_and_gltf_stays(self, tmp_path: Path) -> None:
        lps = exported(tmp_path / "lps", formats=MESHES, structures=KEYS)
        ras = exported(tmp_path / "ras", formats=MESHES, structures=KEYS, frame="RAS")
        for kind in ("stl", "obj", "ply"):
            for key in KEYS:
                name = f"models/{kind}/{key}.{kind}"
                here, there = mesh_of(lps / name), mesh_of(ras / name)
                assert there.points[there.faces] * (-1, -1, 1) == pytest.approx(here.points[here.faces], abs=1e-3)
                assert mesh_report(there).volume > 0  # the faces look outward in both
                for folder, frame in ((lps, b"SPACE=LPS"), (ras, b"SPACE=RAS")):
                    assert (folder / name).read_bytes()[:100].count(frame) == 1
        assert (lps / "models/lungs.glb").read_bytes() == (ras / "models/lungs.glb").read_bytes()
        assert (manifest_of(lps)["frame"], manifest_of(ras)["frame"]) == ("LPS", "RAS")
        assert manifest_of(ras)["grid"] == manifest_of(lps)["grid"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("many") / "out", formats=MESHES, structures=KEYS)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "out"
    return exported(folder, formats=MESHES, structures=KEYS, single_file=True)


class TestSingleFile:
    def test_there_is_one_of_each_format(self, single: Path) -> None:
        names = {f"models/lungs.{kind}" for kind in MESHES}
        assert files_of(single) == {"manifest.json", "models/structures.mtl", *names}
        keys = [part.key for part in choose_parts(KEYS)]
        assert manifest_of(single)["models"] == dict.fromkeys([f"models/lungs.{kind}" for kind in MESHES], keys)
        assert all(item["files"] == [] for item in manifest_of(single)["structures"])

    @pytest.mark.parametrize("kind", ["stl", "obj", "ply"])
    def test_it_holds_all_models_and_each_is_closed(self, kind: str, single: Path, many: Path) -> None:
        whole = mesh_of(single / "models" / f"lungs.{kind}")
        parts = [mesh_of(many / "models" / kind / f"{part.key}.{kind}") for part in choose_parts(KEYS)]
        triangles = np.concatenate([mesh.points[mesh.faces] for mesh in parts])
        assert whole.points[whole.faces] == pytest.approx(triangles, abs=1e-3)
        if kind != "stl":  # which has no points of its own: those of neighbors that coincide are joined on reading
            assert mesh_report(whole).watertight

    def test_obj_has_a_group_and_a_material_for_each(self, single: Path, many: Path) -> None:
        lines = (single / "models/lungs.obj").read_text().splitlines()
        for word in ("o", "g", "usemtl"):
            assert [line.split()[1] for line in lines if line.startswith(f"{word} ")] == [
                part.key for part in choose_parts(KEYS)
            ]
        faces: dict[str, int] = {}
        group = ""
        for line in lines:
            group = line.split()[1] if line.startswith("g ") else group
            faces[group] = faces.get(group, 0) + line.startswith("f ")
        for part in choose_parts(KEYS):
            assert faces[part.key] == len(mesh_of(many / "models/obj" / f"{part.key}.obj").faces)
        materials = (single / "models/structures.mtl").read_text()
        assert [line.split()[1] for line in materials.splitlines() if line.startswith("newmtl")] == [
            part.key for part in choose_parts(KEYS)
        ]

    def test_ply_has_the_color_of_each_at_its_points(self, single: Path, many: Path) -> None:
        reader = vtk.vtkPLYReader()
        reader.SetFileName(str(single / "models/lungs.ply"))
        reader.Update()
        colors = numpy_support.vtk_to_numpy(reader.GetOutput().GetPointData().GetScalars())[:, :3]
        first = 0
        for part in choose_parts(KEYS):
            count = len(mesh_of(many / "models/ply" / f"{part.key}.ply").points)
            assert (colors[first : first + count] == part.color).all()
            first += count
        assert first == len(colors)

    def test_a_glb_for_each_only_when_asked_for(self, tmp_path: Path, many: Path) -> None:
        assert [name for name in files_of(many) if name.endswith(".glb")] == ["models/lungs.glb"]
        each = exported(tmp_path / "each", formats=["glb"], structures=KEYS, glb_each=True)
        assert files_of(each) == {"manifest.json", *(f"models/glb/{key}.glb" for key in KEYS)}
        for part in choose_parts(KEYS):
            assert [m["name"] for m in gltf_of(each / f"models/glb/{part.key}.glb")["meshes"]] == [part.key]
        one = exported(tmp_path / "one", formats=["glb"], structures=KEYS, glb_each=True, single_file=True)
        assert files_of(one) == {"manifest.json", "models/lungs.glb"}
