"""What renaming a branch needs of a finished lung segmentation: small enough to travel with a saved scene.

A state file is a compressed archive of plain arrays. It may come from anywhere, so nothing in it is run (no pickle) and
everything is checked when it is read.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import Probabilities
from LCTfoundLib.anatomy.quality import Finding, Severity
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, STRUCTURES, Tree
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.runtime.files import atomic_path
from LCTfoundLib.tasks.segments import spread
from LCTfoundLib.volume import Volume

__all__ = ["LungState", "StateError", "load_state", "save_state"]

#: Raised when a reader of the older one could not understand the file.
_FORMAT = 1
_REMEDY = "segment the CT again"
#: Bytes of all arrays of a file together, unpacked: some times those of the largest chest at the finest quality.
_MOST_BYTES = 2**30
#: Voxels of the input, as for images that are read.
_MOST_VOXELS = 1_500_000_000
_MOST_NODES = 1_000_000
_MOST_MM = 1e5
_GRAPH_TYPES = {
    "points": np.float64,
    "radius": np.float64,
    "parent": np.int64,
    "segment": np.int64,
    "generation": np.int64,
    "confidence": np.float64,
}


class StateError(LCTfoundError):
    """A state file is missing, damaged, of another version, or a change does not fit it."""


@dataclass
class LungState:
    """A lung segmentation before the last steps, which depend on the branches' names.

    Attributes:
        grid: the input's grid; its array takes no memory.
        segments: uint8 codes 0-18 on the working grid (canonical); the lobes follow from them.
        trees: uint8 ``Tree`` codes on the working grid.
        prior: the coarse net's segments, float32 (19, k, j, i) in steps of 1/255.
        graphs: labeled centerlines of the three trees, LPS mm.
        given: (N,) int64 by tree, the segments of the graphs' nodes as the engine named them.
        corrected: (N,) int64, flat indices of the voxels of ``grid`` that differ from the working grid's segments
            because no segment may have islands there.
        corrected_code: (N,) uint8, their codes.
        confidence: 0-1 by structure key.
        findings: all of the result.
        provenance: of the result.
    """

    grid: Volume
    segments: Volume
    trees: Volume
    prior: Probabilities
    graphs: dict[Tree, TreeGraph]
    given: dict[Tree, np.ndarray]
    corrected: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    corrected_code: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    confidence: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def correct(self, final: np.ndarray, restored: np.ndarray) -> None:
        """Remember how the input grid's final segments differ from the working grid's that were put there."""
        self.corrected = np.flatnonzero(final != restored)
        self.corrected_code = final.ravel()[self.corrected]

    def segments_on_input_grid(self) -> Volume:
        """The result's segments, uint8 on the input's grid."""
        result = self.segments.restore_to(self.grid)
        result.array.ravel()[self.corrected] = self.corrected_code  # contiguous: ravel is a view
        return result

    def trees_on_input_grid(self) -> Volume:
        """The result's trees, uint8 on the input's grid."""
        return self.trees.restore_to(self.grid)


def save_state(state: LungState, path: Path | str) -> None:
    """Write a state file (``.npz``), whole or not at all.

    Raises:
        OutputError: the place cannot be written or is full.
    """
    facts = {
        "confidence": state.confidence,
        "findings": [[int(f.severity), f.structure, f.sentence] for f in state.findings],
        "provenance": state.provenance,
    }
    arrays: dict[str, np.ndarray] = {
        "format": np.array([_FORMAT]),
        "grid.shape": np.array(state.grid.shape),
        "grid.spacing": np.array(state.grid.spacing),
        "grid.origin": np.array(state.grid.origin),
        "grid.direction": state.grid.direction,
        "work.spacing": np.array(state.segments.spacing),
        "work.origin": np.array(state.segments.origin),
        "segments": state.segments.array,
        "trees": state.trees.array,
        "prior.spacing": np.array(state.prior.grid.spacing),
        "prior.origin": np.array(state.prior.grid.origin),
        "prior": np.rint(255 * state.prior.values).astype(np.uint8),
        "corrected": state.corrected.astype(np.int64),
        "corrected_code": state.corrected_code,
        "facts": np.frombuffer(json.dumps(facts).encode("ascii"), np.uint8),
    }
    for tree, graph in state.graphs.items():
        for name, kind in _GRAPH_TYPES.items():
            arrays[f"{tree.name.lower()}.{name}"] = np.asarray(getattr(graph, name), kind)
        arrays[f"{tree.name.lower()}.given"] = np.asarray(state.given[tree], np.int64)
    with atomic_path(path) as staging, staging.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy takes any name


def load_state(path: Path | str) -> LungState:
    """Read and check a state file.

    Raises:
        StateError: missing, damaged, of another version, or with values that make no sense.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _state_from(_Arrays(archive))
    except FileNotFoundError:
        raise StateError(f"There is no file {path}; {_REMEDY}.") from None
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except StateError:
        raise
    # zipfile and numpy raise all kinds of errors for damaged files.
    except Exception as error:
        raise StateError(f"The saved state is damaged ({error}); {_REMEDY}.") from error


class _Arrays:
    """The arrays of an archive; each is checked by its header before memory is given to it."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._sizes = {info.filename: info.file_size for info in archive.infolist()}
        _require(sum(self._sizes.values()) <= _MOST_BYTES, "it is larger than a state can be")

    def read(self, name: str, kind: type, *shape: int) -> np.ndarray:
        """An array of a type; a negative number in ``shape`` stands for any length."""
        member = f"{name}.npy"
        _require(member in self._sizes, f"'{name}' is missing")
        with self._archive.open(member) as file:
            _require(np.lib.format.read_magic(file) == (1, 0), f"'{name}' is no array")
            found, _, dtype = np.lib.format.read_array_header_1_0(file)
            fits = len(found) == len(shape) and all(b in (a, -1) for a, b in zip(found, shape, strict=True))
            _require(dtype == np.dtype(kind) and fits, f"'{name}' has another type or shape")
            _require(math.prod(found) * dtype.itemsize <= self._sizes[member], f"'{name}' is cut off")
        with self._archive.open(member) as file:
            return np.ascontiguousarray(np.lib.format.read_array(file, allow_pickle=False))


def _state_from(arrays: _Arrays) -> LungState:
    version = int(arrays.read("format", np.int64, 1)[0])
    if version != _FORMAT:
        raise StateError(f"The saved state is of another version ({version}); {_REMEDY}.")
    grid = _input_grid(arrays)
    segments = _upright("work", arrays.read("segments", np.uint8, -1, -1, -1), arrays)
    trees = segments.with_array(arrays.read("trees", np.uint8, *segments.shape))
    _require(segments.array.max(initial=0) < len(LOBE_OF_SEGMENT), "unknown segments")
    _require(trees.array.max(initial=0) <= max(Tree), "unknown trees")
    levels = arrays.read("prior", np.uint8, len(LOBE_OF_SEGMENT), -1, -1, -1)
    prior = spread(_upright("prior", levels[0], arrays), levels)
    corrected = arrays.read("corrected", np.int64, -1)
    codes = arrays.read("corrected_code", np.uint8, len(corrected))
    within = (corrected >= 0) & (corrected < math.prod(grid.shape)) & (codes < len(LOBE_OF_SEGMENT))
    _require(bool(within.all()), "corrections beyond the image")
    graphs = {tree: _graph(tree, arrays) for tree in Tree}
    given = {tree: _given(tree, len(graph), arrays) for tree, graph in graphs.items()}
    return LungState(grid, segments, trees, prior, graphs, given, corrected, codes, *_facts(arrays))


def _input_grid(arrays: _Arrays) -> Volume:
    k, j, i = (int(n) for n in arrays.read("grid.shape", np.int64, 3))
    _require(min(k, j, i) > 0 and k * j * i <= _MOST_VOXELS, "an impossible size of the image")
    spacing, origin = _three("grid.spacing", arrays), _three("grid.origin", arrays)
    direction = arrays.read("grid.direction", np.float64, 3, 3)
    _require(bool(np.isfinite(direction).all()), "an impossible orientation")
    return Volume(np.broadcast_to(np.uint8(0), (k, j, i)), spacing, origin, direction)


def _upright(name: str, array: np.ndarray, arrays: _Arrays) -> Volume:
    return Volume(array, _three(f"{name}.spacing", arrays), _three(f"{name}.origin", arrays))


def _three(name: str, arrays: _Arrays) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in arrays.read(name, np.float64, 3))
    _require(all(math.isfinite(v) and abs(v) < _MOST_MM for v in (x, y, z)), f"'{name}' is impossible")
    return x, y, z


def _graph(tree: Tree, arrays: _Arrays) -> TreeGraph:
    name = tree.name.lower()
    points = arrays.read(f"{name}.points", np.float64, -1, 3)
    count = len(points)
    columns = {
        item: arrays.read(f"{name}.{item}", kind, -1 if item == "confidence" else count)
        for item, kind in _GRAPH_TYPES.items()
        if item != "points"
    }
    graph = TreeGraph(points, **columns)
    known_confidence = len(graph.confidence) in (0, count)
    sound = (
        count <= _MOST_NODES
        and known_confidence
        and (np.abs(points) < _MOST_MM).all()  # False for NaN too
        and ((graph.radius >= 0) & (graph.radius < _MOST_MM)).all()
        and ((graph.parent >= -1) & (graph.parent < np.arange(count))).all()
        and ((graph.segment >= 0) & (graph.segment < len(LOBE_OF_SEGMENT))).all()
        and ((graph.generation >= 0) & (graph.generation <= count)).all()
        and ((graph.confidence >= 0) & (graph.confidence <= 1)).all()
    )
    _require(bool(sound), f"the {name} is no tree")
    return graph


def _given(tree: Tree, count: int, arrays: _Arrays) -> np.ndarray:
    segment = arrays.read(f"{tree.name.lower()}.given", np.int64, count)
    _require(bool(((segment >= 0) & (segment < len(LOBE_OF_SEGMENT))).all()), "unknown segments")
    return segment


def _facts(arrays: _Arrays) -> tuple[dict[str, float], list[Finding], dict[str, Any]]:
    facts = json.loads(arrays.read("facts", np.uint8, -1).tobytes())
    known = {structure.key for structure in STRUCTURES}
    confidence = {key: float(value) for key, value in facts["confidence"].items() if key in known}
    _require(all(0.0 <= value <= 1.0 for value in confidence.values()), "an impossible confidence")
    findings = [Finding(Severity(number), str(key), str(sentence)) for number, key, sentence in facts["findings"]]
    _require(isinstance(facts["provenance"], dict), "no provenance")
    return confidence, findings, facts["provenance"]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise StateError(f"The saved state is damaged ({what}); {_REMEDY}.")
