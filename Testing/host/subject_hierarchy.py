"""Keeps the subject hierarchy as Slicer's Qt code does: an item for every node that a user sees.

Without it a scene with segmentations never finishes loading once views exist: the folder display nodes look for
their place in a hierarchy that has two roots.
"""

from __future__ import annotations

from typing import Any

import slicer
import vtk

#: Before all other observers, so that they find one hierarchy.
_FIRST = 1000.0

#: Node class -> plugin that owns its item in Slicer; subclasses come first.
_OWNERS = {
    "vtkMRMLSegmentationNode": "Segmentations",
    "vtkMRMLLabelMapVolumeNode": "LabelMaps",
    "vtkMRMLVolumeNode": "Volumes",
    "vtkMRMLMarkupsNode": "Markups",
    "vtkMRMLModelNode": "Models",
    "vtkMRMLTransformNode": "Transforms",
    "vtkMRMLTableNode": "Tables",
    "vtkMRMLTextNode": "Texts",
    "vtkMRMLPlotChartNode": "Charts",
    "vtkMRMLPlotSeriesNode": "PlotSeries",
    "vtkMRMLCameraNode": "Cameras",
}


class SubjectHierarchyKeeper:
    def __init__(self, scene: Any) -> None:
        self._scene = scene
        events = {
            scene.NodeAddedEvent: self._nodeAdded,
            scene.NodeAboutToBeRemovedEvent: self._nodeAboutToBeRemoved,
            scene.StartCloseEvent: self._empty,
            scene.EndImportEvent: self._resolve,
            scene.EndCloseEvent: self._resolve,
            scene.EndRestoreEvent: self._resolve,
        }
        self._tags = [scene.AddObserver(event, method, _FIRST) for event, method in events.items()]
        self._resolve()

    def release(self) -> None:
        for tag in self._tags:
            self._scene.RemoveObserver(tag)
        self._tags = []

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _nodeAdded(self, scene: Any, event: str, node: Any) -> None:
        if not scene.IsImporting() and not scene.IsClosing() and not scene.IsRestoring():
            self._addItem(node)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _nodeAboutToBeRemoved(self, scene: Any, event: str, node: Any) -> None:
        hierarchy = scene.GetSubjectHierarchyNode() if not scene.IsClosing() else None
        if hierarchy is None or hierarchy is node:
            return
        item = hierarchy.GetItemByDataNode(node)
        if item:
            hierarchy.RemoveItem(item, False, False)

    def _empty(self, scene: Any, event: str) -> None:
        """Items are looked up by the address of their node: those of a closed scene would be taken for new nodes'."""
        hierarchy = scene.GetSubjectHierarchyNode()
        if hierarchy is not None:
            hierarchy.RemoveAllItems()

    def _resolve(self, caller: Any = None, event: str = "") -> None:
        """One hierarchy for the scene, with an item for each node."""
        slicer.vtkMRMLSubjectHierarchyNode.ResolveSubjectHierarchy(self._scene)
        for node in slicer.util.getNodesByClass("vtkMRMLNode", self._scene):
            self._addItem(node)

    def _addItem(self, node: Any) -> None:
        owner = next((owner for kind, owner in _OWNERS.items() if node.IsA(kind)), None)
        if owner is None or node.GetHideFromEditors():
            return
        hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(self._scene)
        item = hierarchy.GetItemByDataNode(node)
        if not item:
            item = hierarchy.CreateItem(hierarchy.GetSceneItemID(), node)
        if not hierarchy.GetItemOwnerPluginName(item):
            hierarchy.SetItemOwnerPluginName(item, owner)
