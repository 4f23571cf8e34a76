"""The manifest: what a program needs to know to use the exported files without guessing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib import __version__
from LCTfoundLib.anatomy.structures import STRUCTURES
from LCTfoundLib.export.mesh_files import GLTF_FROM_LPS
from LCTfoundLib.export.options import ExportOptions
from LCTfoundLib.export.output_folder import MANIFEST, file_entries
from LCTfoundLib.export.parts import STRUCTURE_PARTS, Part
from LCTfoundLib.export.surfaces import MeshReport
from LCTfoundLib.export.tables import VolumeRow
from LCTfoundLib.export.terminology import Code
from LCTfoundLib.volume import Volume

__all__ = ["ManifestContent", "jsonable", "write_manifest"]


@dataclass(frozen=True)
class ManifestContent:
    """What the manifest tells.

    Attributes:
        case: name of the case.
        grid: volume whose grid the label maps have.
        rows: of the volumes table.
        options: what was asked for.
        meshes: reports of the models by key.
        models: keys of the parts in each model file, by its path in the folder.
        not_written: why a format was left out, by format.
        findings: with severity, structure and sentence.
        edited: whether boundaries were changed by hand.
        provenance: weights, settings, times; anything JSON can hold, the rest as text.
    """

    case: str
    grid: Volume
    rows: Iterable[VolumeRow]
    options: ExportOptions = ExportOptions()
    meshes: Mapping[str, MeshReport] = field(default_factory=dict)
    models: Mapping[str, list[str]] = field(default_factory=dict)
    not_written: Mapping[str, str] = field(default_factory=dict)
    findings: Iterable[Any] = ()
    edited: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_manifest(folder: Path, content: ManifestContent) -> Path:
    """Write ``manifest.json`` about the files now in ``folder``, which holds all other files already."""
    files = file_entries(folder)
    table = {row.key: row for row in content.rows}
    chosen = [part for part in content.options.parts if part not in STRUCTURE_PARTS]
    text = {
        "product": "LCTfound",
        "version": __version__,
        "complete": True,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "case": content.case,
        "intended_use": "Research use only; not a medical device.",
        **_conventions(content.options, table.values()),
        "grid": _grid(content.grid),
        "export": _export(content, table),
        "structures": [_part(part, table[part.key], content) for part in (*STRUCTURE_PARTS, *chosen)],
        "models": content.models,
        "volumes_ml": {row.key: round(row.volume, 3) for row in table.values()},
        "findings": [
            {k: _plain(getattr(f, k, "")) for k in ("severity", "structure", "sentence")} for f in content.findings
        ],
        "edited_by_hand": content.edited,
        "weights": jsonable(content.provenance.get("weights", {})),
        "provenance": jsonable(dict(content.provenance)),
        "files": files,
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(text, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _conventions(options: ExportOptions, rows: Iterable[VolumeRow]) -> dict[str, Any]:
    """Frame (of STL, OBJ and PLY), units and what the numbers in the label maps mean."""
    return {
        "frame": options.frame.value,
        "units": "mm",
        "gltf": {"node_matrix_from_lps_mm": GLTF_FROM_LPS.tolist(), "units": "m", "up": "+y superior", "front": "+z"},
        "label_maps": {
            "segments": "1-18, see structures",
            "trees": {"1": "airway", "2": "pulmonary_artery", "3": "pulmonary_vein"},
            "lobes": {str(row.code): row.key for row in rows if row.kind == "lobe"},
            "sides": {"1": "right_lung", "2": "left_lung"},
            "lungs": {"1": "lungs"},
        },
    }


def _grid(volume: Volume) -> dict[str, Any]:
    return {
        "size_ijk": list(reversed(volume.shape)),
        "spacing_mm": [float(s) for s in volume.spacing],
        "origin_lps_mm": [float(o) for o in volume.origin],
        "direction_columns_lps": np.asarray(volume.direction, float).tolist(),
    }


def _export(content: ManifestContent, table: Mapping[str, VolumeRow]) -> dict[str, Any]:
    """What was asked for, and what of it is not there."""
    options, keys = content.options, [part.key for part in content.options.parts]
    return {
        "formats": [format.value for format in options.wanted if format.value not in content.not_written],
        "not_written": dict(content.not_written),
        "structures": keys,
        "absent": [key for key in keys if not table[key].volume],
        "triangles": options.triangles,
        "single_file": options.single_file,
    }


def _part(part: Part, row: VolumeRow, content: ManifestContent) -> dict[str, Any]:
    structure = STRUCTURES[part.code - 1] if part.code else None
    mesh = content.meshes.get(part.key)
    return {
        "key": part.key,
        "code": part.code,
        "name": part.name,
        "short": structure.short if structure else None,
        "side": row.side or None,
        "lobe": row.lobe or None,
        "color_srgb": list(part.color),
        "type": _code(part.term.type),
        "modifier": _code(part.term.modifier),
        "present": row.volume > 0,
        "volume_ml": round(row.volume, 3),
        "confidence": jsonable(row.confidence),
        "mesh": ({k: jsonable(v) for k, v in asdict(mesh).items()} | {"watertight": mesh.watertight}) if mesh else None,
        "files": [path for path, keys in content.models.items() if keys == [part.key]],
    }


def _code(code: Code) -> dict[str, str] | None:
    return {"scheme": code.scheme, "value": code.value, "meaning": code.meaning} if code.value else None


def _plain(value: Any) -> Any:
    return jsonable(getattr(value, "value", value))


def jsonable(value: Any) -> Any:
    """The value in types JSON knows: enums by value, arrays as lists, NaN as null, anything else as text."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    value = getattr(value, "value", value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
