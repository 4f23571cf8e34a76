"""Mesh files: STL, OBJ, PLY and binary glTF, with one model or many in a file.

STL, OBJ and PLY hold millimeters in the frame of choice and name it in their header (``SPACE=LPS``, read by Slicer), as
their formats have no field for it. glTF prescribes meters and y up: its root node scales by 0.001 and turns, so the
numbers in the file are always LPS mm and a viewer shows the patient upright, facing it. Written by hand: VTK's glTF and
OBJ exporters need an OpenGL context and keep no names.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.export.options import Frame
from LCTfoundLib.export.parts import Part
from LCTfoundLib.export.surfaces import Mesh, point_normals

__all__ = ["GLTF_FROM_LPS", "Model", "write_glb", "write_materials", "write_obj", "write_ply", "write_stl"]

#: LPS mm -> glTF meters: x left stays x, z superior becomes y, y posterior becomes -z. Homogeneous 4x4.
GLTF_FROM_LPS = np.array([[0.001, 0, 0, 0], [0, 0, 0.001, 0], [0, -0.001, 0, 0], [0, 0, 0, 1]])

#: A segment is see-through in glTF, so that the trees inside show.
_SEGMENT_ALPHA = 0.45
_MATERIALS = "structures.mtl"


@dataclass(frozen=True)
class Model:
    """A surface and what it is of."""

    part: Part
    mesh: Mesh


def write_stl(models: Sequence[Model], path: Path, frame: Frame = Frame.LPS) -> None:
    """Write a binary STL of all models; the 80-byte header names frame and unit."""
    title = models[0].part.key if len(models) == 1 else f"{len(models)} structures"
    header = f"SPACE={frame}; UNITS=mm; {title}".encode("ascii", "replace")[:80].ljust(80)
    with path.open("wb") as file:
        file.write(header + struct.pack("<I", sum(len(model.mesh.faces) for model in models)))
        for model in models:
            file.write(_stl_triangles(model.mesh, frame).tobytes())


def _stl_triangles(mesh: Mesh, frame: Frame) -> np.ndarray:
    corners = frame.from_lps(mesh.points)[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1), 1e-12)[:, None]
    triangles = np.zeros(len(mesh.faces), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    triangles["normal"], triangles["corners"] = normals, corners
    return triangles


def write_ply(models: Sequence[Model], path: Path, frame: Frame = Frame.LPS) -> None:
    """Write a binary PLY of all models with their colors at the points."""
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment SPACE={frame}",
        "comment UNITS=mm",
        *(f"comment {model.part.name}" for model in models),
        f"element vertex {sum(len(model.mesh.points) for model in models)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
        f"element face {sum(len(model.mesh.faces) for model in models)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    with path.open("wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        for model in models:
            points = np.zeros(len(model.mesh.points), [("at", "<f4", 3), ("color", "u1", 3)])
            points["at"], points["color"] = frame.from_lps(model.mesh.points), model.part.color
            file.write(points.tobytes())
        for model, first in zip(models, _first_points(models), strict=True):
            faces = np.zeros(len(model.mesh.faces), [("count", "u1"), ("points", "<i4", 3)])
            faces["count"], faces["points"] = 3, model.mesh.faces + first
            file.write(faces.tobytes())


def write_obj(models: Sequence[Model], path: Path, frame: Frame = Frame.LPS) -> None:
    """Write an OBJ of all models, a group each, colored by ``structures.mtl`` beside it (see ``write_materials``)."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write(f"# SPACE={frame}\n# UNITS=mm\nmtllib {_MATERIALS}\n")
        for model, first in zip(models, _first_points(models), strict=True):
            key, points, faces = model.part.key, frame.from_lps(model.mesh.points), model.mesh.faces + first + 1
            file.write(f"o {key}\ng {key}\nusemtl {key}\n")
            file.write(("v %.4f %.4f %.4f\n" * len(points)) % tuple(points.ravel().tolist()))
            file.write(("f %d %d %d\n" * len(faces)) % tuple(faces.ravel().tolist()))


def _first_points(models: Sequence[Model]) -> list[int]:
    """Number of each model's first point where the points of all stand one after another."""
    return np.cumsum([0, *(len(model.mesh.points) for model in models[:-1])]).tolist()


def write_materials(parts: Iterable[Part], folder: Path) -> Path:
    """Write the OBJ material library of the parts."""
    lines = []
    for part in parts:
        color = " ".join(f"{c / 255:.4f}" for c in part.color)
        lines += [f"newmtl {part.key}", f"Kd {color}", "Ka 0 0 0", "Ks 0.1 0.1 0.1", "Ns 20", "d 1", ""]
    path = folder / _MATERIALS
    path.write_text("\n".join(lines), encoding="ascii", newline="\n")
    return path


def write_glb(models: Sequence[Model], path: Path, title: str) -> None:
    """Write all models as one binary glTF 2.0: a node, a mesh and a material each, named.

    Args:
        models: surfaces in LPS.
        path: file ending in ``.glb``.
        title: name of the scene.
    """
    buffer = _GltfBuffer()
    gltf: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "LCTfound", "extras": {"frame": "LPS", "units": "mm"}},
        "scene": 0,
        "scenes": [{"name": title, "nodes": [0]}],
        "nodes": [
            {
                "name": "Lungs (LPS mm)",
                "matrix": GLTF_FROM_LPS.T.ravel().tolist(),
                "children": list(range(1, len(models) + 1)),
            },
            *({"name": m.part.name, "mesh": n, "extras": _extras(m.part)} for n, m in enumerate(models)),
        ],
        "meshes": [_gltf_mesh(model, n, buffer) for n, model in enumerate(models)],
        "materials": [_gltf_material(model.part) for model in models],
    }
    if not models:
        gltf.pop("meshes"), gltf.pop("materials"), gltf["nodes"][0].pop("children")
    gltf.update(buffer.tables())
    _write_chunks(path, gltf, buffer.content)


def _extras(part: Part) -> dict[str, Any]:
    return {"key": part.key, "SCT": part.term.type.value} | ({} if part.code is None else {"code": part.code})


def _gltf_mesh(model: Model, material: int, buffer: _GltfBuffer) -> dict[str, Any]:
    mesh = model.mesh
    attributes = {
        "POSITION": buffer.add(mesh.points.astype("<f4"), "VEC3", 34962, bounds=True),
        "NORMAL": buffer.add(point_normals(mesh.points, mesh.faces).astype("<f4"), "VEC3", 34962),
    }
    indices = buffer.add(mesh.faces.astype("<u4").reshape(-1, 1), "SCALAR", 34963)
    primitive = {"attributes": attributes, "indices": indices, "material": material, "mode": 4}
    return {"name": model.part.key, "primitives": [primitive]}


def _gltf_material(part: Part) -> dict[str, Any]:
    srgb = np.array(part.color) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    alpha = 1.0 if part.is_tree else _SEGMENT_ALPHA
    return {
        "name": part.key,
        "pbrMetallicRoughness": {
            "baseColorFactor": [*(round(float(c), 5) for c in linear), alpha],
            "metallicFactor": 0.0,
            "roughnessFactor": 0.6,
        },
        "alphaMode": "OPAQUE" if alpha == 1 else "BLEND",
    }


class _GltfBuffer:
    """The binary part of a glTF with its views and accessors."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._views: list[dict[str, Any]] = []
        self._accessors: list[dict[str, Any]] = []

    def add(self, values: np.ndarray, kind: str, target: int, bounds: bool = False) -> int:
        """Append an array (n, c) of 4-byte numbers; returns the number of its accessor."""
        start = len(self.content)
        self.content += values.tobytes()
        self._views.append({"buffer": 0, "byteOffset": start, "byteLength": values.nbytes, "target": target})
        component = 5126 if values.dtype.kind == "f" else 5125
        accessor = {"bufferView": len(self._views) - 1, "componentType": component, "count": len(values), "type": kind}
        if bounds:
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        self._accessors.append(accessor)
        return len(self._accessors) - 1

    def tables(self) -> dict[str, Any]:
        """The glTF entries that describe the buffer."""
        if not self._views:
            return {}
        return {
            "buffers": [{"byteLength": len(self.content)}],
            "bufferViews": self._views,
            "accessors": self._accessors,
        }


def _write_chunks(path: Path, gltf: dict[str, Any], content: bytearray) -> None:
    text = json.dumps(gltf, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 4)
    content += bytes(-len(content) % 4)
    total = 12 + 8 + len(text) + (8 + len(content) if content else 0)
    with path.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, total))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        if content:
            file.write(struct.pack("<I4s", len(content), b"BIN\0") + bytes(content))
