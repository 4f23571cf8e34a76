"""One call that writes everything a surgeon takes along: ``export_all``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from LCTfoundLib.errors import LCTfoundError, UnsuitableImage
from LCTfoundLib.export.dicom_seg import Making, write_dicom_seg
from LCTfoundLib.export.manifest import ManifestContent, write_manifest
from LCTfoundLib.export.mesh_files import Model, write_glb, write_materials, write_obj, write_ply, write_stl
from LCTfoundLib.export.options import MESH_FORMATS, TRIANGLES, ExportOptions, Format, Frame
from LCTfoundLib.export.output_folder import output_folder
from LCTfoundLib.export.parts import STRUCTURE_PARTS, Part
from LCTfoundLib.export.rendering import available_renderer, render_views
from LCTfoundLib.export.report import ReportContent, render_report
from LCTfoundLib.export.segmentation import MAPPED_PARTS, write_label_maps, write_seg_nrrd
from LCTfoundLib.export.slices import Picture, Plane, SlicePainter
from LCTfoundLib.export.surfaces import Mesh, MeshReport, SurfaceSettings, lung_surfaces, mesh_report
from LCTfoundLib.export.tables import VolumeRow, volume_rows, write_volumes
from LCTfoundLib.volume import Volume

__all__ = ["ExportOptions", "Finding", "Format", "Frame", "LungExport", "export_all"]

ProgressCallback = Callable[[float, str], None]

_log = logging.getLogger(__name__)

_WRITERS: dict[Format, Callable[[Sequence[Model], Path, Frame], None]] = {
    Format.STL: write_stl,
    Format.OBJ: write_obj,
    Format.PLY: write_ply,
}


class Finding(Protocol):
    """What an export needs of a quality finding."""

    @property
    def severity(self) -> Any: ...

    @property
    def structure(self) -> Any: ...

    @property
    def sentence(self) -> str: ...


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
        edited: whether somebody changed the label maps by hand.
    """

    case: str
    segments: Volume
    trees: Volume
    ct: Volume
    confidence: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    edited: bool = False

    def __post_init__(self) -> None:
        if not (self.segments.same_grid(self.ct) and self.trees.same_grid(self.ct)):
            raise ValueError("segments and trees must lie on the grid of the CT")


def export_all(
    export: LungExport,
    folder: Path,
    options: ExportOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Path:
    """Write the formats and a manifest into ``folder``, all or nothing.

    Args:
        export: what to write.
        folder: made if missing; an earlier export in it is replaced, files of others stay as they are.
        options: what to write and how; default: everything. A chosen structure that the case lacks is told in the
            manifest; so is DICOM SEG where it cannot be made and was not asked for by name.
        progress: called with the share done (0-1) and a sentence; may raise to stop.

    Returns:
        Path of the manifest.

    Raises:
        OutputError: the folder cannot be written, the disk is full, or a file of others is in the way.
        UnsuitableImage: DICOM SEG was asked for and the CT is no DICOM series, or lies elsewhere.
        LCTfoundError: the case has none of the chosen structures.
    """
    report = progress or (lambda share, text: None)
    with output_folder(folder) as stage:
        return folder / _Writer(export, stage, options or ExportOptions(), report).write().name


class _Writer:
    """One run of ``export_all``, into its scratch folder."""

    def __init__(self, export: LungExport, stage: Path, options: ExportOptions, report: ProgressCallback) -> None:
        self.export = export
        self.stage = stage
        self.options = options
        self.report = report
        self.formats = set(options.wanted)
        self.models: dict[str, list[str]] = {}
        self.not_written: dict[str, str] = {}

    def write(self) -> Path:
        """Everything; returns the manifest's path."""
        export, options = self.export, self.options
        self.report(0.0, "Volumes")
        rows = volume_rows(export.segments, export.trees, export.ct, export.confidence)
        self._refuse_nothing(rows)
        if Format.CSV in self.formats:
            write_volumes(rows, self.stage / "volumes.csv")
        self._write_labels()
        meshes, shown = self._surfaces()
        reports = {key: mesh_report(mesh) for key, mesh in (meshes or shown).items()}
        self._write_models(meshes)
        if Format.REPORT in self.formats:
            content = self._report_content(rows, shown, reports)
            (self.stage / "report.html").write_text(render_report(content), encoding="utf-8", newline="\n")
        self.report(0.97, "Manifest")
        path = write_manifest(
            self.stage,
            ManifestContent(
                export.case,
                export.segments,
                rows,
                options,
                reports,
                self.models,
                self.not_written,
                export.findings,
                export.edited,
                export.provenance,
            ),
        )
        self.report(1.0, "Export finished")
        return path

    def _refuse_nothing(self, rows: Sequence[VolumeRow]) -> None:
        """A choice of which nothing is there would be an export of empty files."""
        found = {row.key for row in rows if row.volume}
        if self.options.structures is not None and not any(part.key in found for part in self.options.parts):
            names = ", ".join(part.name for part in self.options.parts)
            raise LCTfoundError(f"The case has none of the chosen structures ({names}); choose others.")

    def _write_labels(self) -> None:
        export, parts = self.export, self.options.parts
        if Format.SEG_NRRD in self.formats:
            self.report(0.03, "Segmentation for Slicer")
            path = self.stage / "segmentation.seg.nrrd"
            write_seg_nrrd(export.segments, export.trees, path, export.confidence, parts)
        if Format.NIFTI in self.formats:
            self.report(0.08, "Label maps")
            (self.stage / "labels").mkdir()
            held = MAPPED_PARTS if self.options.structures is None else parts
            write_label_maps(export.segments, export.trees, self.stage / "labels", held)
        if Format.DICOM_SEG in self.formats:
            self.report(0.12, "DICOM segmentation")
            self._write_dicom_seg()

    def _write_dicom_seg(self) -> None:
        export, options = self.export, self.options
        making = Making(export.provenance, export.edited)
        path = self.stage / "segmentation.dcm"
        try:
            write_dicom_seg(export.segments, export.trees, options.source_dicom, path, options.parts, making)
        except UnsuitableImage as reason:
            if options.requires(Format.DICOM_SEG):
                raise
            _log.info("no DICOM SEG: %s", reason)
            self.not_written[Format.DICOM_SEG.value] = str(reason)

    def _surfaces(self) -> tuple[dict[str, Mesh], dict[str, Mesh]]:
        """Meshes to write, and those that the report shows: always of the whole case."""
        models = bool(self.formats.intersection(MESH_FORMATS))
        whole = Format.REPORT in self.formats and not (models and self.options.structures is None)
        middle = 0.15 if not models else 0.6 if not whole else 0.35
        chosen = self._meshes(self.options.parts, self.options.triangles, 0.15, middle) if models else {}
        shown = self._meshes(STRUCTURE_PARTS, TRIANGLES, middle, 0.6) if whole else chosen
        return chosen, shown

    def _meshes(self, parts: Sequence[Part], triangles: int, start: float, stop: float) -> dict[str, Mesh]:
        return lung_surfaces(
            self.export.segments,
            self.export.trees,
            SurfaceSettings(triangles),
            lambda share, text: self.report(start + (stop - start) * share, text),
            parts,
        )

    def _write_models(self, meshes: Mapping[str, Mesh]) -> None:
        models = [Model(part, meshes[part.key]) for part in self.options.parts if part.key in meshes]
        if not models:
            return
        self.report(0.6, "Models")
        (self.stage / "models").mkdir()
        for kind in MESH_FORMATS:
            if kind in self.formats:
                self._write_kind(kind, models)

    def _write_kind(self, kind: Format, models: Sequence[Model]) -> None:
        """All model files of one format."""
        each = self.options.glb_each if kind is Format.GLB else True
        folder = self.stage / "models"
        if self.options.single_file or not each:
            self._write_model_file(kind, models, folder / f"lungs.{kind.value}")
        else:
            folder /= kind.value
            folder.mkdir()
            for model in models:
                self._write_model_file(kind, [model], folder / f"{model.part.key}.{kind.value}")
        if kind is Format.OBJ:
            write_materials([model.part for model in models], folder)

    def _write_model_file(self, kind: Format, models: Sequence[Model], path: Path) -> None:
        name = models[0].part.name if len(models) == 1 else f"{len(models)} structures"
        self.report(0.62, f"Models: {name}")
        if kind is Format.GLB:
            write_glb(models, path, self.export.case)
        else:
            _WRITERS[kind](models, path, self.options.frame)
        self.models[path.relative_to(self.stage).as_posix()] = [model.part.key for model in models]

    def _report_content(
        self, rows: Sequence[VolumeRow], meshes: Mapping[str, Mesh], reports: Mapping[str, MeshReport]
    ) -> ReportContent:
        self.report(0.7, "Slice pictures")
        slices = _slices(self.export)
        self.report(0.75, "3D pictures")
        renderer = available_renderer()
        renderings = render_views(meshes, renderer=renderer, check=lambda: self.report(0.8, "3D pictures"))
        return ReportContent(
            case=self.export.case,
            rows=rows,
            findings=self.export.findings,
            renderings=renderings,
            slices=slices,
            provenance=self.export.provenance,
            renderer=renderer.value,
            meshes=reports,
            frame=self.options.frame,
            image=_image_facts(self.export.ct),
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
