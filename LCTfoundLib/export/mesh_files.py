"""Mesh files: STL, OBJ, PLY and binary glTF.

All hold LPS millimeters; STL, OBJ and PLY say so in their header (``SPACE=LPS``, read by Slicer), as their formats have
no field for it. glTF prescribes meters and y up: its root node scales by 0.001 and turns, so the numbers in the file
stay LPS mm and a viewer shows the patient upright, facing it. Written by hand: VTK's glTF and OBJ exporters need an
OpenGL context and keep no names.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.anatomy.structures import STRUCTURES, Structure
from LCTfoundLib.export.surfaces import Mesh, point_normals
from LCTfoundLib.export.terminology import term_of

__all__ = ["GLTF_FROM_LPS", "write_glb", "write_materials", "write_obj", "write_ply", "write_stl"]

#: LPS mm -> glTF meters: x left stays x, z superior becomes y, y posterior becomes -z. Homogeneous 4x4.
GLTF_FROM_LPS = np.array([[0.001, 0, 0, 0], [0, 0, 0.001, 0], [0, -0.001, 0, 0], [0, 0, 0, 1]])

#: A segment is see-through in glTF, so that the trees inside show.
_SEGMENT_ALPHA = 0.45
_MATERIALS = "structures.mtl"


def write_stl(mesh: Mesh, path: Path, name: str) -> None:
    """Write a binary STL; the 80-byte header names frame and unit."""
    header = f"SPACE=LPS; UNITS=mm; {name}".encode("ascii", "replace")[:80].ljust(80)
    corners = mesh.points[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1), 1e-12)[:, None]
    triangles = np.zeros(len(mesh.faces), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    triangles["normal"], triangles["corners"] = normals, corners
    with path.open("wb") as file:
        file.write(header + struct.pack("<I", len(triangles)))
        file.write(triangles.tobytes())


def write_ply(mesh: Mesh, path: Path, structure: Structure) -> None:
    """Write a binary PLY with the structure's color at each point."""
    header = [
        "ply",
        "format binary_little_endian 1.0",
        "comment SPACE=LPS",
        "comment UNITS=mm",
        f"comment {structure.name}",
        f"element vertex {len(mesh.points)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {channel}" for channel in ("red", "green", "blue")),
        f"element face {len(mesh.faces)}",
        "property list uchar int vertex_indices",
        "end_header",
    ]
    points = np.zeros(len(mesh.points), [("at", "<f4", 3), ("color", "u1", 3)])
    points["at"], points["color"] = mesh.points, structure.color
    faces = np.zeros(len(mesh.faces), [("count", "u1"), ("points", "<i4", 3)])
    faces["count"], faces["points"] = 3, mesh.faces
    with path.open("wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        file.write(points.tobytes())
        file.write(faces.tobytes())


def write_obj(mesh: Mesh, path: Path, structure: Structure) -> None:
    """Write an OBJ that takes its color from ``structures.mtl`` beside it (see ``write_materials``)."""
    head = ["# SPACE=LPS", "# UNITS=mm", f"mtllib {_MATERIALS}", f"o {structure.key}", f"usemtl {structure.key}"]
    points = ("v %.4f %.4f %.4f\n" * len(mesh.points)) % tuple(mesh.points.ravel().tolist())
    faces = ("f %d %d %d\n" * len(mesh.faces)) % tuple((mesh.faces.ravel() + 1).tolist())
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write("\n".join(head) + "\n" + points + faces)


def write_materials(folder: Path) -> Path:
    """Write the OBJ material library of all structures."""
    lines = []
    for structure in STRUCTURES:
        color = " ".join(f"{c / 255:.4f}" for c in structure.color)
        lines += [f"newmtl {structure.key}", f"Kd {color}", "Ka 0 0 0", "Ks 0.1 0.1 0.1", "Ns 20", "d 1", ""]
    path = folder / _MATERIALS
    path.write_text("\n".join(lines), encoding="ascii", newline="\n")
    return path


def write_glb(meshes: Mapping[str, Mesh], path: Path, title: str) -> None:
    """Write all structures as one binary glTF 2.0: a node, a mesh and a material per structure, named.

    Args:
        meshes: by structure key.
        path: file ending in ``.glb``.
        title: name of the scene.
    """
    structures = [s for s in STRUCTURES if s.key in meshes]
    buffer = _GltfBuffer()
    gltf: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "LCTfound", "extras": {"frame": "LPS", "units": "mm"}},
        "scene": 0,
        "scenes": [{"name": title, "nodes": [0]}],
        "nodes": [
            {
                "name": "Lungs (LPS mm)",
                "matrix": GLTF_FROM_LPS.T.ravel().tolist(),
                "children": list(range(1, len(structures) + 1)),
            },
            *({"name": s.name, "mesh": n, "extras": _extras(s)} for n, s in enumerate(structures)),
        ],
        "meshes": [_gltf_mesh(s, n, meshes[s.key], buffer) for n, s in enumerate(structures)],
        "materials": [_gltf_material(s) for s in structures],
    }
    if not structures:
        gltf.pop("meshes"), gltf.pop("materials"), gltf["nodes"][0].pop("children")
    gltf.update(buffer.tables())
    _write_chunks(path, gltf, buffer.content)


def _extras(structure: Structure) -> dict[str, Any]:
    return {"key": structure.key, "code": structure.code, "SCT": term_of(structure).type.value}


def _gltf_mesh(structure: Structure, material: int, mesh: Mesh, buffer: _GltfBuffer) -> dict[str, Any]:
    points = mesh.points.astype("<f4")
    attributes = {
        "POSITION": buffer.add(points, "VEC3", 34962, bounds=True),
        "NORMAL": buffer.add(point_normals(mesh.points, mesh.faces).astype("<f4"), "VEC3", 34962),
    }
    indices = buffer.add(mesh.faces.astype("<u4").reshape(-1, 1), "SCALAR", 34963)
    primitive = {"attributes": attributes, "indices": indices, "material": material, "mode": 4}
    return {"name": structure.key, "primitives": [primitive]}


def _gltf_material(structure: Structure) -> dict[str, Any]:
    srgb = np.array(structure.color) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    alpha = 1.0 if structure.tree is not None else _SEGMENT_ALPHA
    return {
        "name": structure.key,
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
