"""One call that writes everything a surgeon takes along: ``export_all``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from LCTfoundLib.anatomy.structures import STRUCTURES
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.export.manifest import write_manifest
from LCTfoundLib.export.mesh_files import write_glb, write_materials, write_obj, write_ply, write_stl
from LCTfoundLib.export.output_folder import output_folder
from LCTfoundLib.export.rendering import available_renderer, render_views
from LCTfoundLib.export.report import ReportContent, render_report
from LCTfoundLib.export.segmentation import write_label_maps, write_seg_nrrd
from LCTfoundLib.export.slices import Picture, Plane, SlicePainter
from LCTfoundLib.export.surfaces import Mesh, MeshReport, SurfaceSettings, lung_surfaces, mesh_report
from LCTfoundLib.export.tables import VolumeRow, volume_rows, write_volumes
from LCTfoundLib.volume import Volume

__all__ = ["Finding", "Format", "LungExport", "export_all"]

ProgressCallback = Callable[[float, str], None]


class Finding(Protocol):
    """What an export needs of a quality finding."""

    @property
    def severity(self) -> Any: ...

    @property
    def structure(self) -> Any: ...

    @property
    def sentence(self) -> str: ...


class Format(StrEnum):
    """What can be written."""

    SEG_NRRD = "seg.nrrd"
    NIFTI = "nifti"
    STL = "stl"
    OBJ = "obj"
    PLY = "ply"
    GLB = "glb"
    CSV = "csv"
    REPORT = "report"

    @classmethod
    def parse(cls, names: Iterable[str]) -> tuple[Format, ...]:
        """Formats of their names, all for no name.

        Raises:
            LCTfoundError: if a name is unknown.
        """
        chosen = []
        for name in names:
            text = name.strip().lower().lstrip(".")
            text = _OTHER_NAMES.get(text, text)
            if text not in {f.value for f in cls}:
                raise LCTfoundError(f"There is no format '{name}'; choose from {', '.join(f.value for f in cls)}.")
            chosen.append(cls(text))
        return tuple(dict.fromkeys(chosen)) or tuple(cls)


_OTHER_NAMES = {"seg": "seg.nrrd", "nii": "nifti", "nii.gz": "nifti", "gltf": "glb", "html": "report", "table": "csv"}
_MESH_FORMATS = {Format.STL, Format.OBJ, Format.PLY, Format.GLB}


@dataclass
class LungExport:
    """A lung segmentation, ready to be written.

    Attributes:
        case: name of the case.
        segments: uint8 label map, codes 1-18.
        trees: uint8 label map on the same grid, codes 1 airway, 2 artery, 3 vein.
        ct: HU on the same grid.
        confidence: 0-1 by structure key.
        findings: quality findings, most important first.
        provenance: how it came about: weights, versions, settings, times; nested as wanted.
    """

    case: str
    segments: Volume
    trees: Volume
    ct: Volume
    confidence: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.segments.same_grid(self.ct) and self.trees.same_grid(self.ct)):
            raise ValueError("segments and trees must lie on the grid of the CT")


def export_all(
    export: LungExport,
    folder: Path,
    formats: Iterable[Format | str] = (),
    progress: ProgressCallback | None = None,
    settings: SurfaceSettings | None = None,
) -> Path:
    """Write the formats and a manifest into ``folder``, all or nothing.

    Args:
        export: what to write.
        folder: made if missing; an earlier export in it is replaced, files of others stay as they are.
        formats: empty for all.
        progress: called with the share done (0-1) and a sentence; may raise to stop.
        settings: of the surfaces.

    Returns:
        Path of the manifest.

    Raises:
        OutputError: the folder cannot be written, the disk is full, or a file of others is in the way.
        LCTfoundError: a format is unknown.
    """
    chosen = set(Format.parse(f.value if isinstance(f, Format) else f for f in formats))
    report = progress or (lambda share, text: None)
    with output_folder(folder) as stage:
        return folder / _write_all(export, stage, chosen, report, settings).name


def _write_all(
    export: LungExport, stage: Path, chosen: set[Format], report: ProgressCallback, settings: SurfaceSettings | None
) -> Path:
    report(0.0, "Volumes")
    rows = volume_rows(export.segments, export.trees, export.ct, export.confidence)
    if Format.CSV in chosen:
        write_volumes(rows, stage / "volumes.csv")
    _write_labels(export, stage, chosen, report)
    meshes: dict[str, Mesh] = {}
    if chosen & (_MESH_FORMATS | {Format.REPORT}):
        meshes = lung_surfaces(
            export.segments, export.trees, settings, lambda share, text: report(0.15 + 0.45 * share, text)
        )
    reports = {key: mesh_report(mesh) for key, mesh in meshes.items()}
    _write_meshes(meshes, stage / "models", chosen, export.case, report)
    if Format.REPORT in chosen:
        content = _report_content(export, rows, meshes, reports, report)
        (stage / "report.html").write_text(render_report(content), encoding="utf-8", newline="\n")
    report(0.97, "Manifest")
    path = write_manifest(stage, export.case, export.segments, rows, reports, export.findings, export.provenance)
    report(1.0, "Export finished")
    return path


def _write_labels(export: LungExport, stage: Path, chosen: set[Format], report: ProgressCallback) -> None:
    if Format.SEG_NRRD in chosen:
        report(0.03, "Segmentation for Slicer")
        write_seg_nrrd(export.segments, export.trees, stage / "segmentation.seg.nrrd", export.confidence)
    if Format.NIFTI in chosen:
        report(0.08, "Label maps")
        (stage / "labels").mkdir()
        write_label_maps(export.segments, export.trees, stage / "labels")


def _write_meshes(
    meshes: Mapping[str, Mesh], folder: Path, chosen: set[Format], title: str, report: ProgressCallback
) -> None:
    wanted = chosen & _MESH_FORMATS
    if not wanted or not meshes:
        return
    report(0.6, "Models")
    folder.mkdir()
    if Format.GLB in wanted:
        write_glb(meshes, folder / "lungs.glb", title)
    for kind in sorted(wanted - {Format.GLB}):
        (folder / kind.value).mkdir()
        if kind is Format.OBJ:
            write_materials(folder / kind.value)
        for structure in STRUCTURES:
            if structure.key in meshes:
                report(0.62, f"Models: {structure.name}")
                path = folder / kind.value / f"{structure.key}.{kind.value}"
                if kind is Format.STL:
                    write_stl(meshes[structure.key], path, structure.key)
                else:
                    (write_obj if kind is Format.OBJ else write_ply)(meshes[structure.key], path, structure)


def _report_content(
    export: LungExport,
    rows: Sequence[VolumeRow],
    meshes: Mapping[str, Mesh],
    reports: Mapping[str, MeshReport],
    report: ProgressCallback,
) -> ReportContent:
    report(0.7, "Slice pictures")
    slices = _slices(export)
    report(0.75, "3D pictures")
    renderer = available_renderer()
    renderings = render_views(meshes, renderer=renderer, check=lambda: report(0.8, "3D pictures"))
    return ReportContent(
        case=export.case,
        rows=rows,
        findings=export.findings,
        renderings=renderings,
        slices=slices,
        provenance=export.provenance,
        renderer=renderer.value,
        meshes=reports,
        image=_image_facts(export.ct),
    )


def _slices(export: LungExport) -> dict[str, list[Picture]]:
    painter = SlicePainter(export.ct, export.segments, export.trees)
    sagittal = painter.sagittal_levels(2)
    return {
        "Axial, seen from the feet": [painter.paint(Plane.AXIAL, i) for i in reversed(painter.levels(Plane.AXIAL, 6))],
        "Coronal, seen from the front": [painter.paint(Plane.CORONAL, i) for i in painter.levels(Plane.CORONAL, 3)],
        "Sagittal, seen from the left": [painter.paint(Plane.SAGITTAL, i) for i in sagittal],
    }


def _image_facts(ct: Volume) -> dict[str, str]:
    """What the report's head says about the CT."""
    size = " x ".join(str(n) for n in reversed(ct.shape))
    spacing = " x ".join(f"{s:.2f}" for s in ct.spacing)
    facts = {"Voxels": size, "Spacing": f"{spacing} mm"}
    if not np.allclose(ct.direction, np.round(ct.direction), atol=1e-3):
        facts["Orientation"] = "oblique; slices are shown along the nearest axes"
    return facts
