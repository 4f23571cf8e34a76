"""What the worker does: requests in plain values to tasks, and their results into a folder that a panel reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.anatomy.quality import Finding, Severity
from LCTfoundLib.anatomy.structures import STRUCTURES, Lobe, Tree, segments_of_lobe
from LCTfoundLib.export.bundle import ExportOptions, LungExport, export_all
from LCTfoundLib.export.options import TRIANGLES
from LCTfoundLib.export.parts import STRUCTURE_PARTS
from LCTfoundLib.export.surfaces import Mesh, SurfaceSettings, lung_surfaces, point_normals
from LCTfoundLib.export.tables import volume_rows
from LCTfoundLib.networks.lung import COARSE, FINE, LoadedNet, load_net
from LCTfoundLib.runtime.device import DeviceChoice, choose_device
from LCTfoundLib.runtime.files import atomic_folder
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.tasks.lung_segmentation import LungRequest, Quality, segment_lungs
from LCTfoundLib.tasks.relabel import BranchName, relabel
from LCTfoundLib.tasks.segments import only_lobes
from LCTfoundLib.tasks.state import LungState, StateError, load_state, save_state
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_checks import warnings_of
from LCTfoundLib.weights.registry import list_weights, search_folders
from LCTfoundLib.worker_requests import BadRequest, Fields, ct_of, labels_of

__all__ = ["perform", "warm"]

#: mm; somebody waits for what is shown, and segments are smooth: from voxels of this size their surfaces need no
#: decimation, which would take most of the time (10 s of 13 for a 512 x 512 x 300 CT). What is exported is finer.
_SHOWN_VOXEL = 1.8


def perform(request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Do one job.

    Args:
        request: as the protocol has it; see the functions of the tasks below for its fields.
        progress: told about stages; raises ``Cancelled`` when the job was stopped.

    Returns:
        Fields of the result event.

    Raises:
        LCTfoundError: of any kind; no file is left behind then.
    """
    task = request.get("task")
    if not isinstance(task, str) or task not in _TASKS:
        raise BadRequest(f"There is no task '{task}'; choose from {', '.join(_TASKS)}.")
    return _TASKS[task](Fields(request), progress)


def warm(threads: int) -> dict[str, str]:
    """Choose the device, load the networks and limit torch's threads.

    Returns:
        What the device is: ``device``, ``name``, ``precision``, ``reason``.

    Raises:
        WeightError: missing or damaged weight.
    """
    import torch

    torch.set_num_threads(min(threads, torch.get_num_threads()))
    choice: DeviceChoice = choose_device()
    for name in (COARSE, FINE):
        _nets.load(name, None)
    return {
        "device": str(choice.device),
        "name": choice.name,
        "precision": choice.precision.value,
        "reason": choice.reason,
    }


class _KeptNets:
    """Networks stay loaded between jobs, until their file changes."""

    def __init__(self) -> None:
        self._nets: dict[str, tuple[tuple[str, int, int], LoadedNet]] = {}

    def load(self, name: str, folder: Path | None) -> LoadedNet:
        """As ``load_net``."""
        key = self._file(name, folder)
        kept = self._nets.get(name)
        if key is None or kept is None or kept[0] != key:
            net = load_net(name, folder)
            if key is None:
                return net
            kept = self._nets[name] = key, net
        return kept[1]

    def _file(self, name: str, folder: Path | None) -> tuple[str, int, int] | None:
        """Path, size and time of change of the file that would be loaded; None when it cannot be told."""
        if folder is not None and not folder.is_dir():
            return None  # loading tells what is wrong
        for entry in list_weights(search_folders(folder)):
            if entry.name == name:
                stat = entry.path.stat()
                return str(entry.path), stat.st_size, stat.st_mtime_ns
        return None


_nets = _KeptNets()


# -- segmentation ----------------------------------------------------------------------------------------------------


def _segment_lungs(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``input`` (array, spacing, origin, direction, metadata), ``options`` (quality, device, weights_folder),
    ``output``."""
    checking, segmenting, surfaces, writing = progress.split(
        {"Checking the CT": 2, "Segmentation": 80, "Surfaces": 15, "Writing the result": 3}
    )
    checking.update(0.0)
    output, request = fields.output(), _lung_request(fields.group("options"))
    ct = ct_of(fields.group("input"), checking)
    result = segment_lungs(ct, request, segmenting, _nets.load)
    state = result.state
    assert state is not None
    mended = [Finding(Severity.WARNING, "image", text) for text in warnings_of(ct)]
    state.findings = sorted([*mended, *state.findings], key=lambda finding: -finding.severity)
    meshes = lung_surfaces(state.segments, state.trees, _shown(TRIANGLES), surfaces)
    writing.update(0.0)
    with atomic_folder(output) as folder:
        _write_result(folder, state, result.segments, result.trees, ct, meshes, {})
        writing.check()
    writing.done()
    return {"folder": str(output)}


def _lung_request(options: Fields) -> LungRequest:
    quality = options.text("quality", Quality.STANDARD.value)
    if quality not in set(Quality):
        raise BadRequest(f"There is no quality '{quality}'; choose from {', '.join(Quality)}.")
    weights = options.text("weights_folder", "")
    return LungRequest(Quality(quality), options.text("device", "auto"), Path(weights) if weights else None)


def _shown(triangles: int) -> SurfaceSettings:
    """Surfaces to look at; as many threads as torch may use, four at most."""
    import torch

    threads = min(4, torch.get_num_threads())
    return SurfaceSettings(triangle_budget=triangles, segment_voxel=_SHOWN_VOXEL, most_kept=1.0, threads=threads)


def _write_result(
    folder: Path,
    state: LungState,
    segments: Volume,
    trees: Volume,
    ct: Volume | None,
    meshes: Mapping[str, Mesh],
    facts: Mapping[str, Any],
) -> None:
    """Label maps, meshes, graphs, state and ``result.json``."""
    np.save(folder / "segments.npy", segments.array)
    np.save(folder / "trees.npy", trees.array)
    _save_meshes(meshes, folder / "meshes.npz")
    _save_graphs(state, folder / "graphs.npz")
    save_state(state, folder / "state.npz")
    content = {
        "confidence": state.confidence,
        "findings": [_plain(finding) for finding in state.findings],
        "provenance": state.provenance,
        "volumes": _volumes(segments, trees, ct, state.confidence),
    }
    (folder / "result.json").write_text(json.dumps(content | dict(facts), indent=1, allow_nan=False), encoding="utf-8")


def _save_meshes(meshes: Mapping[str, Mesh], path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for key, mesh in meshes.items():
        arrays[f"{key}.points"] = mesh.points.astype(np.float32)
        arrays[f"{key}.faces"] = mesh.faces.astype(np.int32)
        arrays[f"{key}.normals"] = _normals(mesh).astype(np.float32)
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy takes any name


def _normals(mesh: Mesh) -> np.ndarray:
    """Unit normals at the points; where those of the faces around cancel out (a tip, one voxel wide), of one face."""
    normals = point_normals(mesh.points, mesh.faces)
    none = np.linalg.norm(normals, axis=1) < 0.5
    if none.any():
        corners = mesh.points[mesh.faces]
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        length = np.linalg.norm(across, axis=1)
        faces, across = mesh.faces[length > 0], across[length > 0] / length[length > 0, None]
        instead = np.tile([0.0, 0.0, 1.0], (len(normals), 1))
        for corner in range(3):
            instead[faces[:, corner]] = across
        normals[none] = instead[none]
    return normals


def _save_graphs(state: LungState, path: Path) -> None:
    kinds = {
        "points": np.float32,
        "radius": np.float32,
        "parent": np.int32,
        "segment": np.uint8,
        "generation": np.int32,
        "confidence": np.float32,
    }
    arrays = {
        f"{tree.name.lower()}.{name}": getattr(graph, name).astype(kind)
        for tree, graph in state.graphs.items()
        for name, kind in kinds.items()
    }
    np.savez(path, **arrays)


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "severity": int(finding.severity),
        "name": finding.severity.name.lower(),
        "structure": finding.structure,
        "sentence": finding.sentence,
    }


def _volumes(
    segments: Volume, trees: Volume, ct: Volume | None, confidence: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of the volumes table; without a CT the mean HU is unknown."""
    image = ct or segments.with_array(np.broadcast_to(np.int16(0), segments.shape))
    rows = volume_rows(segments, trees, image, confidence)
    return [asdict(row if ct else replace(row, mean_hu=None)) for row in rows]


# -- relabeling ------------------------------------------------------------------------------------------------------


def _relabel(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``state`` (file), ``ct`` (as ``input`` above, or null), ``changes`` (tree, branch, segment), ``output``;
    ``lobes`` (codes): to compute again in any case, such as those of a change that was taken back.

    The output has meshes of the segments of the lobes computed again, which ``lobes`` in its ``result.json`` names.
    """
    reading, naming, surfaces, writing = progress.split(
        {"Reading the segmentation": 15, "Segments": 45, "Surfaces": 30, "Writing the result": 10}
    )
    reading.update(0.0)
    output, changes, again = fields.output(), _changes(fields), _lobes(fields)
    state = load_state(fields.file("state"))
    ct = ct_of(fields.group("ct"), reading) if fields.has("ct") else None
    if ct is not None and not ct.same_grid(state.grid):
        raise StateError("The CT is not the one that was segmented (other size or position); choose that or none.")
    result = relabel(state, changes, naming, again)
    meshes = _surfaces_of(result.state.segments, result.lobes, surfaces)
    writing.update(0.0)
    with atomic_folder(output) as folder:
        lobes = {"lobes": sorted(int(lobe) for lobe in result.lobes)}
        _write_result(folder, result.state, result.segments, result.trees, ct, meshes, lobes)
        writing.check()
    writing.done()
    return {"folder": str(output)}


def _changes(fields: Fields) -> list[BranchName]:
    trees = {tree.name.lower(): tree for tree in Tree}
    changes = []
    for item in fields.items("changes"):
        change = Fields(item if isinstance(item, dict) else {})
        name = change.text("tree")
        if name not in trees:
            raise BadRequest(f"There is no tree '{name}'; choose airway or artery.")
        changes.append(BranchName(trees[name], change.number("branch"), change.number("segment")))
    return changes


def _lobes(fields: Fields) -> list[Lobe]:
    codes = fields.items("lobes")
    if not all(isinstance(code, int) and code in set(Lobe) for code in codes):
        raise BadRequest(f"'lobes' must be codes from 1 to {len(Lobe)}.")
    return [Lobe(code) for code in codes]


def _surfaces_of(segments: Volume, lobes: Collection[Lobe], progress: Progress) -> dict[str, Mesh]:
    """Surfaces of the segments of some lobes, with their share of the triangles."""
    wanted = {segment.key for lobe in lobes for segment in segments_of_lobe(lobe)}
    if not wanted:
        return {}
    parts = [part for part in STRUCTURE_PARTS if part.key in wanted]
    mine = segments.with_array(only_lobes(segments.array, lobes))
    no_trees = Volume(np.zeros((1, 1, 1), np.uint8))
    return lung_surfaces(mine, no_trees, _shown(TRIANGLES * len(wanted) // len(STRUCTURES)), progress, parts)


# -- export and doctor -----------------------------------------------------------------------------------------------


def _export(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``input``, ``segments`` and ``trees`` (files), ``confidence``, ``findings``, ``provenance``, ``edited``,
    ``options`` (see ``ExportOptions``), ``case`` (name), ``folder`` (target)."""
    checking, exporting = progress.split({"Checking the CT": 5, "Export": 95})
    checking.update(0.0)
    folder, options = fields.path("folder"), ExportOptions.parse(fields.group("options").values)
    ct = ct_of(fields.group("input"), checking)
    content = LungExport(
        fields.text("case", "case"),
        labels_of(fields.file("segments"), ct, len(STRUCTURES) - len(Tree)),
        labels_of(fields.file("trees"), ct, max(Tree)),
        ct,
        _confidence(fields.group("confidence").values),
        _findings(fields.items("findings")),
        fields.group("provenance").values,
        edited=bool(fields.values.get("edited", False)),
    )
    export_all(content, folder, options, exporting)
    exporting.done()
    return {"folder": str(folder)}


def _confidence(values: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in values.items()}
    except (TypeError, ValueError) as error:
        raise BadRequest("'confidence' must hold numbers.") from error


def _findings(items: Sequence[Any]) -> list[Finding]:
    try:
        return [Finding(Severity(int(f["severity"])), str(f["structure"]), str(f["sentence"])) for f in items]
    except (TypeError, KeyError, ValueError) as error:
        raise BadRequest("'findings' must hold objects with severity (0-2), structure and sentence.") from error


def _doctor(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``folder`` (whose disk is looked at; optional), ``weights_folder`` (optional)."""
    from LCTfoundLib.doctor import examine

    progress.update(0.0, "Looking at the computer")
    weights = fields.text("weights_folder", "")
    place = fields.path("folder") if fields.has("folder") else Path.home()
    checks = examine(place, Path(weights) if weights else None)
    progress.done()
    return {"checks": [{"what": c.what, "value": c.value, "verdict": c.verdict.value} for c in checks]}


def _reconstruction(task: str) -> Callable[[Fields, Progress], dict[str, Any]]:
    """One of ``worker_reconstruction``, which is imported when it is asked for: the worker is warm sooner."""

    def perform_it(fields: Fields, progress: Progress) -> dict[str, Any]:
        from LCTfoundLib.worker_reconstruction import RECONSTRUCTIONS

        return RECONSTRUCTIONS[task](fields, progress)

    return perform_it


_TASKS: dict[str, Callable[[Fields, Progress], dict[str, Any]]] = {
    "segment_lungs": _segment_lungs,
    "relabel": _relabel,
    "export": _export,
    "doctor": _doctor,
    **{task: _reconstruction(task) for task in ("sparse_view", "low_dose", "super_resolution", "export_series")},
}
