"""The manifest: what a program needs to know to use the exported files without guessing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib import __version__
from LCTfoundLib.anatomy.structures import STRUCTURES, Structure
from LCTfoundLib.export.mesh_files import GLTF_FROM_LPS
from LCTfoundLib.export.output_folder import MANIFEST, file_entries
from LCTfoundLib.export.surfaces import MeshReport
from LCTfoundLib.export.tables import VolumeRow
from LCTfoundLib.export.terminology import Code, term_of
from LCTfoundLib.volume import Volume

__all__ = ["jsonable", "write_manifest"]


def write_manifest(
    folder: Path,
    case: str,
    grid: Volume,
    rows: Iterable[VolumeRow],
    meshes: Mapping[str, MeshReport],
    findings: Iterable[Any],
    provenance: Mapping[str, Any],
) -> Path:
    """Write ``manifest.json`` about the files now in ``folder``.

    Args:
        folder: holds all other files already; they are listed with their checksums.
        case: name of the case.
        grid: volume whose grid the label maps have.
        rows: of the volumes table.
        meshes: reports by structure key.
        findings: with severity, structure and sentence.
        provenance: weights, settings, times; anything JSON can hold, the rest as text.
    """
    files = file_entries(folder)
    table = {row.key: row for row in rows}
    content = {
        "product": "LCTfound",
        "version": __version__,
        "complete": True,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "case": case,
        "intended_use": "Research use only; not a medical device.",
        **_conventions(table.values()),
        "grid": _grid(grid),
        "structures": [_structure(s, table.get(s.key), meshes.get(s.key), files) for s in STRUCTURES],
        "volumes_ml": {row.key: round(row.volume, 3) for row in table.values()},
        "findings": [{k: _plain(getattr(f, k, "")) for k in ("severity", "structure", "sentence")} for f in findings],
        "weights": jsonable(provenance.get("weights", {})),
        "provenance": jsonable(dict(provenance)),
        "files": files,
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _conventions(rows: Iterable[VolumeRow]) -> dict[str, Any]:
    """Frame, units and what the numbers in the label maps mean."""
    return {
        "frame": "LPS",
        "units": "mm",
        "gltf": {"node_matrix_from_lps_mm": GLTF_FROM_LPS.tolist(), "units": "m", "up": "+y superior", "front": "+z"},
        "label_maps": {
            "segments": "1-18, see structures",
            "trees": {"1": "airway", "2": "pulmonary_artery", "3": "pulmonary_vein"},
            "lobes": {str(row.code): row.key for row in rows if row.kind == "lobe"},
        },
    }


def _grid(volume: Volume) -> dict[str, Any]:
    return {
        "size_ijk": list(reversed(volume.shape)),
        "spacing_mm": [float(s) for s in volume.spacing],
        "origin_lps_mm": [float(o) for o in volume.origin],
        "direction_columns_lps": np.asarray(volume.direction, float).tolist(),
    }


def _structure(
    structure: Structure, row: VolumeRow | None, mesh: MeshReport | None, files: list[dict[str, Any]]
) -> dict[str, Any]:
    term = term_of(structure)
    return {
        "key": structure.key,
        "code": structure.code,
        "name": structure.name,
        "short": structure.short,
        "side": structure.side.value if structure.side else None,
        "lobe": structure.lobe.label if structure.lobe else None,
        "color_srgb": list(structure.color),
        "type": _code(term.type),
        "modifier": _code(term.modifier),
        "present": bool(row and row.volume > 0),
        "volume_ml": round(row.volume, 3) if row else None,
        "confidence": jsonable(row.confidence) if row else None,
        "mesh": ({k: jsonable(v) for k, v in asdict(mesh).items()} | {"watertight": mesh.watertight}) if mesh else None,
        "files": [f["path"] for f in files if Path(f["path"]).name.split(".")[0] == structure.key],
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
