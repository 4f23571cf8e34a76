"""Picking a branch of airway or artery in the views, so that it can be given another segment."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import slicer
import vtk
from scipy.spatial import cKDTree
from slicer.i18n import tr as _
from vtk.util import numpy_support

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Lobe, segment_by_code, segments_of_lobe
from LCTfoundSlicer.lung_result import BranchChange, LungCase
from LCTfoundSlicer.mrml import engineGeometry, matrixToArray

__all__ = ["BranchPicker", "PickedBranch"]

_TREES = ("airway", "artery")
#: Farther from any branch than this is a click beside them.
_REACH_MM = 15.0
#: The picked branch is drawn as a tube so much wider than its lumen, so that it shows around it.
_HALO = 1.4


@dataclass
class PickedBranch:
    """A branch with all that comes from it.

    Attributes:
        tree: ``airway`` or ``artery``.
        branch: its first node in the tree's graph.
        segment: code it is named by now, 0 for none.
        lobe: that it supplies; None for a central one.
        lengthMm: of the branch and all that comes from it.
        line: what is drawn, RAS mm of the world.
    """

    tree: str
    branch: int
    segment: int
    lobe: Lobe | None
    lengthMm: float
    line: Any
    _model: Any = field(default=None, repr=False)

    @property
    def sentence(self) -> str:
        """What was picked, for a person."""
        kind = _("Bronchus") if self.tree == "airway" else _("Artery")
        name = segment_by_code(self.segment).name if self.segment else _("no segment (central)")
        return _("{kind} of {name}, {length} mm with its branches.").format(
            kind=kind, name=name, length=round(self.lengthMm)
        )

    @property
    def choices(self) -> list[tuple[int, str]]:
        """Segments it may be given, as (code, name): those of its lobe, and none."""
        lobes = [self.lobe] if self.lobe is not None else list(Lobe)
        named = [(s.code, s.name) for lobe in lobes for s in segments_of_lobe(lobe)]
        return [*named, (0, _("none (central)"))]

    def show(self) -> None:
        """Draw the branch in all views."""
        if self._model is None:
            self._model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", _("Picked branch"))
            self._model.SetSaveWithScene(False)
            self._model.SetAndObservePolyData(self.line)
            self._model.CreateDefaultDisplayNodes()
            display = self._model.GetDisplayNode()
            display.SetColor(1.0, 0.9, 0.1)
            display.SetVisibility2D(True)
            display.SetSliceIntersectionThickness(3)

    def hide(self) -> None:
        """Take the drawing away."""
        if self._model is not None:
            slicer.mrmlScene.RemoveNode(self._model)
            self._model = None


class BranchPicker:
    """The named branches of a result."""

    def __init__(self, case: LungCase) -> None:
        self._graphs = _graphsOf(case)
        for change in case.changes:
            _rename(self._graphs[change.tree], change)
        self._worldFromEngine = _worldFromEngine(case)

    @classmethod
    def of(cls, segmentation: Any) -> BranchPicker:
        """The branches of a segmentation node that holds a result, by the names they have now."""
        return cls(LungCase(segmentation))

    def at(self, point: Any) -> PickedBranch | None:
        """The branch nearest to a point (RAS mm of the world); None if there is none near."""
        local = (np.linalg.inv(self._worldFromEngine) @ np.array([*point, 1.0]))[:3]
        found = []
        for tree in _TREES:
            graph = self._graphs[tree]
            if len(graph):
                distance, node = cKDTree(graph.points).query(local)
                # In a wide branch a click inside the lumen is a hit, however far from the centerline.
                found.append((distance - graph.radius[node], tree, int(node)))
        if not found or min(found)[0] > _REACH_MM:
            return None
        _distance, tree, node = min(found)
        return self._picked(tree, node)

    def lobesOf(self, changes: Iterable[BranchChange]) -> list[Lobe]:
        """The lobes that a change of names touches, by the names before and after."""
        codes: set[int] = set()
        for change in changes:
            graph = self._graphs[change.tree]
            codes |= {change.segment, *graph.segment[_below(graph, change.branch)].tolist()}
        return sorted({Lobe(int(LOBE_OF_SEGMENT[code])) for code in codes if code > 0})

    def _picked(self, tree: str, node: int) -> PickedBranch:
        graph = self._graphs[tree]
        branches = graph.branches()
        first = int(branches.first[branches.of_node[node]])
        below = _below(graph, first)
        code = int(graph.segment[node])
        codes = graph.segment[below]
        lobes = {int(LOBE_OF_SEGMENT[c]) for c in codes if c > 0}
        lobe = Lobe(lobes.pop()) if len(lobes) == 1 else None
        length = float(graph.lengths()[below].sum())
        return PickedBranch(tree, first, code, lobe, length, _tubes(graph, below, self._worldFromEngine))


def _graphsOf(case: LungCase) -> dict[str, TreeGraph]:
    """Airway and artery of the state that the result carries; the worker checks the rest of it."""
    content = base64.b64decode(case.stateText)
    graphs = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for tree in _TREES:
            names = ("points", "radius", "parent", "segment", "generation", "confidence")
            graphs[tree] = TreeGraph(*(arrays[f"{tree}.{name}"] for name in names))
    return graphs


def _worldFromEngine(case: LungCase) -> np.ndarray:
    """4x4 from the engine's LPS to RAS of the world."""
    matrix = vtk.vtkMatrix4x4()
    slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(case.node.GetParentTransformNode(), None, matrix)
    return matrixToArray(matrix) @ engineGeometry(case.volumeNode).localFromEngine


def _below(graph: TreeGraph, branch: int) -> np.ndarray:
    """(N,) bool: the nodes of the branch that begins at a node, and of all that comes from it."""
    branches = graph.branches()
    if not 0 <= branch < len(graph):
        return np.zeros(len(graph), dtype=bool)
    return branches.descendants(int(branches.of_node[branch]))[branches.of_node]


def _rename(graph: TreeGraph, change: BranchChange) -> None:
    graph.segment[_below(graph, change.branch)] = change.segment


def _tubes(graph: TreeGraph, nodes: np.ndarray, worldFromEngine: np.ndarray) -> Any:
    """Tubes around the pieces that end at some nodes, vtkPolyData in the world."""
    ends = np.flatnonzero(nodes & (graph.parent >= 0))
    index = np.stack([np.arange(len(ends)) * 2, np.arange(len(ends)) * 2 + 1], axis=1)
    places = np.stack([graph.points[graph.parent[ends]], graph.points[ends]], axis=1).reshape(-1, 3)
    world = places @ worldFromEngine[:3, :3].T + worldFromEngine[:3, 3]
    radius = np.repeat(graph.radius[ends], 2) * _HALO
    lines = vtk.vtkPolyData()
    points = vtk.vtkPoints()
    points.SetData(numpy_support.numpy_to_vtk(np.ascontiguousarray(world), deep=True))
    lines.SetPoints(points)
    cells = vtk.vtkCellArray()
    cells.SetData(
        numpy_support.numpy_to_vtkIdTypeArray(np.arange(0, 2 * len(ends) + 1, 2, dtype=np.int64), deep=True),
        numpy_support.numpy_to_vtkIdTypeArray(np.ascontiguousarray(index.ravel(), dtype=np.int64), deep=True),
    )
    lines.SetLines(cells)
    scalars = numpy_support.numpy_to_vtk(radius, deep=True)
    scalars.SetName("radius")
    lines.GetPointData().SetScalars(scalars)
    tube = vtk.vtkTubeFilter()
    tube.SetInputData(lines)
    tube.SetNumberOfSides(8)
    tube.SetVaryRadiusToVaryRadiusByAbsoluteScalar()
    tube.Update()
    result = tube.GetOutput()
    result.GetPointData().SetScalars(None)
    return result
