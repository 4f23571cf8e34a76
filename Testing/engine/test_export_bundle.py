"""The whole export: everything there, checksums right, all or nothing, and nothing of others touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from LCTfoundLib.anatomy.structures import STRUCTURES
from LCTfoundLib.errors import Cancelled, LCTfoundError, OutputError
from LCTfoundLib.export import bundle
from LCTfoundLib.export.bundle import ExportOptions, Format, LungExport, export_all
from LCTfoundLib.export.manifest import jsonable
from LCTfoundLib.export.rendering import available_renderer
from LCTfoundLib.runtime.progress import Progress
from Testing.engine.export_shapes import lung_export


class Level(Enum):
    WARNING = "warning"


FINDING = SimpleNamespace(severity=Level.WARNING, structure="left_s04", sentence="Its bronchus was not found.")


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def options(*formats: str, **more: object) -> ExportOptions:
    return ExportOptions.parse({"formats": formats} | more)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "Fall Müller 肺"
    export = lung_export(
        findings=[FINDING],
        confidence={"right_s01": 0.9},
        provenance={
            "weights": {"coarse": {"sha256": "ab12"}},
            "seconds": {"coarse": np.float32(1.5)},
            "path": Path("x"),
        },
    )
    assert export_all(export, folder) == folder / "manifest.json"
    return folder


def test_all_formats_are_written(whole: Path) -> None:
    expected = {"manifest.json", "report.html", "volumes.csv", "segmentation.seg.nrrd", "models/lungs.glb"}
    expected |= {f"labels/{n}.nii.gz" for n in ("segments", "trees", "lobes")} | {"models/obj/structures.mtl"}
    expected |= {f"models/{f}/{s.key}.{f}" for f in ("stl", "obj", "ply") for s in STRUCTURES}
    assert set(content_of(whole)) == expected
    assert [p.name for p in whole.parent.iterdir()] == [whole.name]  # no scratch folder left


def test_the_manifest_tells_frame_units_checksums_and_structures(whole: Path) -> None:
    manifest = manifest_of(whole)
    assert (manifest["frame"], manifest["units"], manifest["complete"]) == ("LPS", "mm", True)
    assert manifest["grid"]["spacing_mm"] == [3.0, 3.0, 4.0]
    assert manifest["weights"] == {"coarse": {"sha256": "ab12"}}
    assert manifest["provenance"]["path"] == "x"
    assert manifest["findings"] == [
        {"severity": "warning", "structure": "left_s04", "sentence": "Its bronchus was not found."}
    ]
    files = content_of(whole)
    assert {f["path"] for f in manifest["files"]} == set(files) - {"manifest.json"}
    for entry in manifest["files"]:
        assert hashlib.sha256(files[entry["path"]]).hexdigest() == entry["sha256"]
        assert len(files[entry["path"]]) == entry["bytes"]
    for structure, item in zip(STRUCTURES, manifest["structures"], strict=True):
        assert item["key"] == structure.key and item["present"] and item["mesh"]["watertight"]
        assert abs(item["mesh"]["volume_error"]) < 0.02
        assert sorted(item["files"]) == [f"models/{f}/{structure.key}.{f}" for f in ("obj", "ply", "stl")]


def test_the_report_is_small_and_names_the_renderer(whole: Path) -> None:
    html = (whole / "report.html").read_text(encoding="utf-8")
    assert len(html) < 6e6
    assert f"Drawn by {available_renderer().value}" in html
    assert "Its bronchus was not found." in html
    assert "ab12" in html


def test_chosen_formats_only(tmp_path: Path) -> None:
    export_all(lung_export(), tmp_path / "a", options("csv", "html"))
    assert set(content_of(tmp_path / "a")) == {"manifest.json", "volumes.csv", "report.html"}
    export_all(lung_export(), tmp_path / "b", options(Format.GLB))
    assert set(content_of(tmp_path / "b")) == {"manifest.json", "models/lungs.glb"}


def test_format_names() -> None:
    assert Format.parse([]) == tuple(Format)
    assert Format.parse([".STL", "nii.gz", "gltf", "stl"]) == (Format.STL, Format.NIFTI, Format.GLB)
    with pytest.raises(LCTfoundError, match="no format 'dwg'; choose from seg.nrrd"):
        Format.parse(["dwg"])


def test_an_earlier_export_is_replaced_and_foreign_files_stay(tmp_path: Path) -> None:
    export_all(lung_export(case="first"), tmp_path, options("csv", "seg.nrrd", "glb"))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "models" / "plan.stl").write_text("mine too")
    export_all(lung_export(case="second"), tmp_path, options("csv", "stl"))
    files = content_of(tmp_path)
    assert manifest_of(tmp_path)["case"] == "second" and manifest_of(tmp_path)["complete"]
    assert files["notes.txt"] == b"mine" and files["models/plan.stl"] == b"mine too"
    assert "segmentation.seg.nrrd" not in files and "models/lungs.glb" not in files
    assert "models/stl/airway.stl" in files
    export_all(lung_export(), tmp_path, options("csv"))
    assert set(content_of(tmp_path)) == {"manifest.json", "volumes.csv", "notes.txt", "models/plan.stl"}
    assert not (tmp_path / "models" / "stl").exists()


def test_a_file_edited_by_hand_is_kept(tmp_path: Path) -> None:
    export_all(lung_export(), tmp_path, options("csv", "seg.nrrd"))
    for text in ("edited", "again"):
        (tmp_path / "segmentation.seg.nrrd").write_text(text)
        export_all(lung_export(), tmp_path, options("csv", "seg.nrrd"))
    assert (tmp_path / "segmentation (edited).seg.nrrd").read_text() == "edited"
    assert (tmp_path / "segmentation (edited 2).seg.nrrd").read_text() == "again"
    assert (tmp_path / "segmentation.seg.nrrd").read_bytes().startswith(b"NRRD")


@pytest.mark.parametrize("name", ["volumes.csv", "manifest.json"])
def test_a_foreign_file_in_the_way_stops_the_export_unharmed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"product": "another", "files": [{"path": "volumes.csv", "sha256": ""}]}')
    before = content_of(tmp_path)
    with pytest.raises(OutputError, match="was not written by LCTfound; move it away"):
        export_all(lung_export(), tmp_path, options("csv"))
    assert content_of(tmp_path) == before


def test_a_manifest_cannot_make_us_delete_files_elsewhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("x")
    folder = tmp_path / "out"
    export_all(lung_export(), folder, options("csv"))
    manifest = manifest_of(folder)
    digest = hashlib.sha256(b"x").hexdigest()
    manifest["files"] += [{"path": "../victim.txt", "sha256": digest}, {"path": str(victim), "sha256": digest}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    export_all(lung_export(), folder, options("csv"))
    assert victim.read_text() == "x"


@pytest.mark.parametrize(
    ("exists", "share", "formats"),
    [
        (True, 0.0, ("csv",)),
        (False, 0.03, ("seg.nrrd",)),
        (True, 0.2, ("stl",)),
        (False, 0.62, ("csv", "stl")),
        (False, 0.8, ("report",)),
        (True, 0.97, ("csv", "stl")),
    ],
)
def test_cancel_leaves_everything_as_it_was(tmp_path: Path, exists: bool, share: float, formats: tuple[str]) -> None:
    folder = tmp_path / "out"
    if exists:
        export_all(lung_export(case="old"), folder, options("csv"))
    before = content_of(tmp_path)

    def stop(fraction: float, text: str) -> None:
        if fraction >= share:
            raise Cancelled("The run was stopped.")

    with pytest.raises(Cancelled):
        export_all(lung_export(), folder, options(*formats), progress=stop)
    assert content_of(tmp_path) == before
    assert folder.exists() == exists


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    if exists:
        export_all(lung_export(), folder, options("csv"))
    before = content_of(tmp_path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(bundle._WRITERS, Format.PLY, full)
    with pytest.raises(OutputError, match="full; free some space"):
        export_all(lung_export(), folder, options("csv", "stl", "ply"))
    assert content_of(tmp_path) == before


def test_an_interrupted_update_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_all(lung_export(), tmp_path, options("csv", "stl"))
    replace, count = os.replace, 0

    def die(*args: object) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.EIO, "Input/output error")
        replace(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OutputError):
        export_all(lung_export(), tmp_path, options("csv", "ply"))
    monkeypatch.undo()
    assert manifest_of(tmp_path)["complete"] is False
    export_all(lung_export(), tmp_path, options("csv"))
    assert set(content_of(tmp_path)) == {"manifest.json", "volumes.csv"}


def test_scratch_folders_of_dead_runs_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".lctfound-unfinished-999999999-out"
    dead.mkdir()
    (dead / "half.stl").write_text("x")
    export_all(lung_export(), tmp_path / "out", options("csv"))
    assert not dead.exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_place_is_named(tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="out cannot be written .Read-only file system."):
        export_all(lung_export(), folder, options("csv"))


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        export_all(lung_export(), tmp_path / "out", options("csv"))


def test_an_empty_result_is_exported_and_says_so(tmp_path: Path) -> None:
    export = lung_export()
    empty = export.segments.with_array(np.zeros_like(export.segments.array))
    export_all(lung_export(segments=empty, trees=empty), tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert not any(s["present"] for s in manifest["structures"])
    assert "not found" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_grids_that_do_not_fit_are_refused() -> None:
    export = lung_export()
    with pytest.raises(ValueError, match="grid of the CT"):
        LungExport("x", export.segments, export.trees, export.ct.crop((1, 0, 0), export.ct.shape))


def test_progress_rises_to_one_and_takes_the_engines_progress(tmp_path: Path) -> None:
    seen: list[float] = []
    export_all(lung_export(), tmp_path / "a", options("csv", "stl"), progress=lambda share, text: seen.append(share))
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1
    progress = Progress()
    export_all(lung_export(), tmp_path / "b", options("csv"), progress=progress)
    assert progress.report.fraction == 1


def test_anything_becomes_json() -> None:
    value = {1: np.int64(2), "nan": float("nan"), "set": {Level.WARNING}, "array": np.arange(2.0), "path": Path("a")}
    assert jsonable(value) == {"1": 2, "nan": None, "set": ["warning"], "array": [0.0, 1.0], "path": "a"}
