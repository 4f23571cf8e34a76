"""Stand-ins for Slicer's MRML widgets: real MRML nodes, watched by VTK observers, in plain Qt widgets.

Only what PythonQt shows of the real classes is public: properties, signals, slots and invokable methods. A method that
is missing here raises AttributeError when called.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import shiboken6
import slicer
import vtk

from host.ctk_widgets import ctkCheckableComboBox, ctkColorPickerButton, ctkComboBox, ctkMenuButton, ctkSliderWidget
from host.qt_compat import QtCore, QtGui, QtWidgets
from host.standin import computed, flags, forwarded, stored

Qt, Signal = QtCore.Qt, QtCore.Signal
_NODE = "PyObject"  # what PySide6 calls a VTK object in the signature of a signal


class _Observations:
    """The VTK observers of one widget. They do not keep it alive, and end with it."""

    def __init__(self, widget: QtWidgets.QWidget) -> None:
        self._widget = weakref.ref(widget)
        self._tags: dict[str, list[tuple[Any, int]]] = {}
        tags = self._tags
        widget.destroyed.connect(lambda: _remove_observers(tags))

    def watch(self, group: str, watched: Any, events: Iterable[Any], method: str) -> None:
        """Call the widget's method (without arguments) at each of the events; `group` names them for `leave`."""
        widget = self._widget

        def call(*_: Any) -> None:
            living = widget()
            if living is not None and shiboken6.isValid(living):
                getattr(living, method)()

        for event in events:
            self._tags.setdefault(group, []).append((watched, watched.AddObserver(event, call)))

    def watch_node(self, group: str, scene: Any, event: Any, method: str) -> None:
        """Call the widget's method with the node of a scene event."""
        widget = self._widget

        @vtk.calldata_type(vtk.VTK_OBJECT)
        def call(_scene: Any, _event: Any, node: Any) -> None:
            living = widget()
            if living is not None and shiboken6.isValid(living):
                getattr(living, method)(node)

        self._tags.setdefault(group, []).append((scene, scene.AddObserver(event, call)))

    def leave(self, group: str) -> None:
        _remove_observers({group: self._tags.pop(group, [])})


def _remove_observers(tags: dict[str, list[tuple[Any, int]]]) -> None:
    for watched, tag in [item for group in tags.values() for item in group]:
        watched.RemoveObserver(tag)
    tags.clear()


# -- widgets with a scene ---------------------------------------------------------------------------------------------


class qMRMLWidget(QtWidgets.QWidget):
    """A widget that knows the scene and tells its children of it (by connections of the .ui file)."""

    mrmlSceneChanged = Signal(object)
    signal_signatures = {"mrmlSceneChanged(vtkMRMLScene*)": f"mrmlSceneChanged({_NODE})"}

    def __init__(self, parent: Any = None, *flags: Any) -> None:
        super().__init__(parent, *flags)
        self._scene: Any = None
        self._observations = _Observations(self)

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, newScene: Any) -> None:
        if newScene is not self._scene:
            self._scene = newScene
            self._sceneChanged()
            self.mrmlSceneChanged.emit(newScene)

    def _sceneChanged(self) -> None:
        """For the classes below."""


class qSlicerWidget(qMRMLWidget):
    """The same in the application's library."""


# -- choosing a node --------------------------------------------------------------------------------------------------

_ACTION, _NODE_ID = int(Qt.ItemDataRole.UserRole) + 1, int(Qt.ItemDataRole.UserRole) + 2
#: Scene events after which the list of nodes is made anew; it is not touched while many nodes come or go.
_SCENE_EVENTS = ("NodeAddedEvent", "NodeRemovedEvent", "EndBatchProcessEvent", "EndImportEvent", "EndCloseEvent")


class qMRMLNodeComboBox(QtWidgets.QWidget):
    """A combo box of the scene's nodes of some types, with entries to make, rename and delete one."""

    currentNodeChanged = Signal((object,), (bool,))
    currentNodeIDChanged = Signal(str)
    nodeActivated = Signal(object)
    nodeAdded = Signal(object)
    nodeAddedByUser = Signal(object)
    nodeAddedByUserAction = Signal(object)
    nodeAboutToBeRemoved = Signal(object)
    nodeAboutToBeEdited = Signal(object)
    currentNodeRenamed = Signal(str)
    signal_signatures = {
        f"{name}(vtkMRMLNode*)": f"{name}({_NODE})"
        for name in (
            "currentNodeChanged nodeActivated nodeAdded nodeAddedByUser nodeAddedByUserAction nodeAboutToBeRemoved"
            " nodeAboutToBeEdited"
        ).split()
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._observations = _Observations(self)
        self._ids: list[str] = []
        self._currentID = ""
        self._requestedID: str | None = None  # asked for before there was a scene
        self._attributes: dict[str, tuple[str, str | None]] = {}
        self._baseNames: dict[str, str] = {}
        self._typeLabels: dict[str, str] = {}
        self._menuActions: list[QtGui.QAction] = []
        self._combo = self._makeComboBox()
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo)
        self.setFocusProxy(self._combo)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Preferred, QtWidgets.QSizePolicy.Policy.Fixed)
        self._combo.setSizePolicy(QtWidgets.QSizePolicy.Policy.Expanding, QtWidgets.QSizePolicy.Policy.Expanding)
        self._combo.currentIndexChanged.connect(self._indexChanged)
        self._combo.activated.connect(self._activated)
        self.setEnabled(False)

    def _makeComboBox(self) -> QtWidgets.QComboBox:
        combo = ctkComboBox(self)
        combo.elideMode = int(Qt.TextElideMode.ElideMiddle)
        return combo

    currentNodeID = computed(str, "_currentID", "setCurrentNodeID")
    nodeTypes = stored("QStringList", "nodeTypes", [], "_rebuild")
    showHidden = stored(bool, "showHidden", False, "_rebuild")
    showChildNodeTypes = stored(bool, "showChildNodeTypes", True, "_rebuild")
    hideChildNodeTypes = stored("QStringList", "hideChildNodeTypes", [], "_rebuild")
    baseName = computed(str, lambda self: self._firstBaseName(), "_setBaseName")
    noneEnabled = stored(bool, "noneEnabled", False, "_rebuild")
    addEnabled = stored(bool, "addEnabled", True, "_rebuild")
    removeEnabled = stored(bool, "removeEnabled", True, "_rebuild")
    editEnabled = stored(bool, "editEnabled", False, "_rebuild")
    renameEnabled = stored(bool, "renameEnabled", False, "_rebuild")
    interactionNodeSingletonTag = stored(str, "interactionNodeSingletonTag", "")
    selectNodeUponCreation = stored(bool, "selectNodeUponCreation", True)
    noneDisplay = stored(str, "noneDisplay", "None", "_rebuild")
    sizeAdjustPolicy = forwarded(int, "_combo.sizeAdjustPolicy")

    # which nodes

    def addAttribute(self, nodeType: str, attributeName: str, attributeValue: Any = None) -> None:
        self._attributes[nodeType] = (attributeName, None if attributeValue is None else str(attributeValue))
        self._rebuild()

    def removeAttribute(self, nodeType: str, attributeName: str) -> None:
        if self._attributes.get(nodeType, ("",))[0] == attributeName:
            del self._attributes[nodeType]
            self._rebuild()

    def _isOfType(self, node: Any) -> bool:
        return not self.nodeTypes or any(node.IsA(nodeType) for nodeType in self.nodeTypes)

    def _accepts(self, node: Any) -> bool:
        if node.GetHideFromEditors() and not self.showHidden:
            return False
        if not self.nodeTypes:
            return True
        for nodeType in self.nodeTypes:
            if not node.IsA(nodeType) or (not self.showChildNodeTypes and node.GetClassName() != nodeType):
                continue
            if self.showChildNodeTypes and any(node.IsA(hidden) for hidden in self.hideChildNodeTypes):
                return False
            return self._hasAttribute(node, nodeType)
        return False

    def _hasAttribute(self, node: Any, nodeType: str) -> bool:
        name, wanted = self._attributes.get(nodeType, ("", None))
        value = node.GetAttribute(name) if name else ""
        return value is not None and wanted in (None, value)

    def _sceneNodes(self) -> list[Any]:
        if self._scene is None:
            return []
        return [self._scene.GetNthNode(n) for n in range(self._scene.GetNumberOfNodes())]

    # names

    def _firstBaseName(self) -> str:
        return self._baseNames.get(self.nodeTypes[0], "") if self.nodeTypes else ""

    def _setBaseName(self, name: str) -> None:
        if not self.nodeTypes:
            raise ValueError("baseName without nodeTypes has no effect: set nodeTypes before")
        self._baseNames = dict.fromkeys(self.nodeTypes, name)

    def setNodeTypeLabel(self, label: str, nodeType: str) -> None:
        self._typeLabels[nodeType] = label
        self._rebuild()

    def nodeTypeLabel(self, nodeType: str) -> str:
        label = self._typeLabels.get(nodeType, "")
        if not label and self._scene is not None and nodeType:
            label = self._scene.GetTypeDisplayNameByClassName(nodeType)
        return label or "node"

    # the list

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        if scene is self._scene:
            return
        self._observations.leave("scene")
        self._scene = scene
        if scene is not None:
            self._observations.watch("scene", scene, [getattr(scene, name) for name in _SCENE_EVENTS], "_rebuild")
            self._observations.watch_node("scene", scene, scene.NodeAboutToBeRemovedEvent, "_nodeLeaves")
        wanted, self._requestedID = self._requestedID, None
        self._rebuild(entered=True)
        if wanted is not None:
            self.setCurrentNodeID(wanted)
        self.setEnabled(scene is not None)

    def _nodeLeaves(self, node: Any) -> None:
        if node.GetID() in self._ids:
            self.nodeAboutToBeRemoved.emit(node)

    def _rebuild(self, entered: bool = False) -> None:
        """List the nodes anew, and keep the current one, or take the one in its place when it is gone."""
        if self._scene is not None and self._scene.IsBatchProcessing():
            return
        candidates = [node for node in self._sceneNodes() if self._isOfType(node)]
        self._watch(candidates)
        before, nodes = self._ids, [node for node in candidates if self._accepts(node)]
        self._ids = [node.GetID() for node in nodes]
        current = self._successor(before, entered)
        self._fill(nodes, current)
        for node in nodes:
            if not entered and node.GetID() not in before:
                self.nodeAdded.emit(node)
        self._become(current)

    def _watch(self, candidates: list[Any]) -> None:
        ids = [node.GetID() for node in candidates]
        if ids == self.__dict__.get("_watchedIDs"):
            return
        self._watchedIDs = ids
        self._observations.leave("nodes")
        for node in candidates:
            self._observations.watch("nodes", node, ["ModifiedEvent"], "_nodeModified")

    def _nodeModified(self) -> None:
        shown = [(node.GetID(), node.GetName()) for node in self._sceneNodes() if self._accepts(node)]
        if shown != self.__dict__.get("_shownNames"):
            renamed = dict(shown).get(self._currentID) != dict(self._shownNames).get(self._currentID)
            self._rebuild()
            if renamed and self._currentID:
                self._announce()  # the text of the combo box changed, which is what the real one listens to

    def _successor(self, before: list[str], entered: bool) -> str:
        """The current node after the list changed. Qt chooses the neighbor of an item that went, and the first item
        of a list that was empty."""
        if self._currentID in self._ids:
            return self._currentID
        if not self._ids:
            return ""
        if self._currentID:
            place = before.index(self._currentID) if self._currentID in before else 0
            return self._ids[min(place, len(self._ids) - 1)]
        wasEmpty = not before and not self.noneEnabled and not self._actions()
        return self._ids[0] if (entered and not self.noneEnabled) or (wasEmpty and not entered) else ""

    def _actions(self) -> list[tuple[str, str]]:
        """(text, what) of the entries below the nodes."""
        if self._scene is None:
            return []
        label = self.nodeTypeLabel(self.nodeTypes[0] if len(self.nodeTypes) == 1 else "")
        actions = []
        if self.renameEnabled:
            actions.append((f"Rename current {label}", "RENAME"))
        if self.editEnabled:
            actions.append((f"Edit current {label}", "EDIT"))
        if self.addEnabled:
            for nodeType in self.nodeTypes:
                actions.append((f"Create new {self.nodeTypeLabel(nodeType)}", f"CREATE/{nodeType}"))
                if self.renameEnabled:
                    actions.append((f"Create new {self.nodeTypeLabel(nodeType)} as...", f"CREATE_AS/{nodeType}"))
        if self.removeEnabled:
            actions.append((f"Delete current {label}", "DELETE"))
        return actions + [(action.text, f"USER/{n}") for n, action in enumerate(self._menuActions)]

    def _fill(self, nodes: list[Any], current: str) -> None:
        combo = self._combo
        blocked = combo.blockSignals(True)
        combo.clear()
        if self.noneEnabled:
            combo.addItem(self.noneDisplay)
        for node in nodes:
            combo.addItem(node.GetName() or "")
            combo.setItemData(combo.count - 1, node.GetID(), _NODE_ID)
            self._decorate(combo.count - 1, node)
        actions = self._actions()
        if actions:
            combo.insertSeparator(combo.count)
        for text, what in actions:
            combo.addItem(text)
            combo.setItemData(combo.count - 1, what, _ACTION)
        combo.setCurrentIndex(self._row(current))
        if isinstance(combo, ctkComboBox):
            combo.defaultText = f"Select a {self.nodeTypeLabel(self.nodeTypes[0] if self.nodeTypes else '')}"
        combo.blockSignals(blocked)
        self._shownNames = [(node.GetID(), node.GetName()) for node in nodes]

    def _decorate(self, row: int, node: Any) -> None:
        """For the checkable one below."""

    def _row(self, nodeID: str) -> int:
        if nodeID in self._ids:
            return self._ids.index(nodeID) + int(self.noneEnabled)
        return 0 if self.noneEnabled else -1

    # the current node

    def _become(self, nodeID: str) -> None:
        blocked = self._combo.blockSignals(True)
        self._combo.setCurrentIndex(self._row(nodeID))
        self._combo.blockSignals(blocked)
        if nodeID != self._currentID:
            self._currentID = nodeID
            self._announce()

    def _announce(self) -> None:
        node = self.currentNode()
        self.currentNodeChanged[object].emit(node)
        self.currentNodeChanged[bool].emit(node is not None)
        self.currentNodeIDChanged.emit(self._currentID)

    def _indexChanged(self, row: int) -> None:
        """The user moved the choice; entries that are no nodes are not chosen."""
        if row < 0 or self._combo.itemData(row, _NODE_ID) or (row == 0 and self.noneEnabled):
            self._become((self._combo.itemData(row, _NODE_ID) or "") if row >= 0 else "")
        else:
            self._become(self._currentID)

    def _activated(self, row: int) -> None:
        what = self._combo.itemData(row, _ACTION)
        if what is None:
            self.nodeActivated.emit(self.currentNode())
            return
        kind, _, argument = what.partition("/")
        {
            "RENAME": self.renameCurrentNode,
            "EDIT": self.editCurrentNode,
            "CREATE": lambda: self._createByUser(argument, ""),
            "CREATE_AS": lambda: self._createByUser(argument, self._askName(f"Create new {argument}", "")),
            "DELETE": self.removeCurrentNode,
            "USER": lambda: self._menuActions[int(argument)].trigger(),
        }[kind]()

    def _createByUser(self, nodeType: str, name: str | None) -> None:
        if name is None:
            return
        node = self.addNode(nodeType)
        if name:
            node.SetName(name)
        self.setCurrentNode(node)
        self.nodeAddedByUserAction.emit(node)

    def _askName(self, title: str, name: str) -> str | None:
        return QtWidgets.QInputDialog.getText(
            self, title, "New name:", QtWidgets.QLineEdit.EchoMode.Normal, name
        ) or None  # fmt: skip

    def nodeCount(self) -> int:
        return len(self._ids)

    def nodeFromIndex(self, index: int) -> Any:
        return self._scene.GetNodeByID(self._ids[index]) if 0 <= index < len(self._ids) else None

    def currentNode(self) -> Any:
        return self._scene.GetNodeByID(self._currentID) if self._scene is not None and self._currentID else None

    def setCurrentNode(self, node: Any) -> None:
        if node is not None and not hasattr(node, "GetID"):
            raise TypeError(f"a node is needed, not {node!r}")
        self.setCurrentNodeID((node.GetID() or "") if node is not None else "")

    def setCurrentNodeID(self, nodeID: str) -> None:
        if self._scene is None:
            self._requestedID = nodeID
        self._become(nodeID if nodeID in self._ids else "")

    def setCurrentNodeIndex(self, index: int) -> None:
        self._become(self._ids[index] if 0 <= index < len(self._ids) else "")

    # changing the scene

    def addNode(self, nodeType: str | None = None) -> Any:
        nodeType = nodeType or next(iter(self.nodeTypes), None)
        if nodeType not in self.nodeTypes or self._scene is None:
            return None
        node = self._scene.CreateNodeByClass(nodeType)
        node.UnRegister(None)  # the reference of the one who asked
        baseName = self._baseNames.get(nodeType, "") or ("" if node.GetName() else node.GetDefaultNodeNamePrefix())
        if baseName:
            node.SetName(self._scene.GetUniqueNameByString(baseName))
        for name, value in self._attributes.values():
            node.SetAttribute(name, value or "")
        node = self._scene.AddNode(node)
        if self.selectNodeUponCreation:
            self.setCurrentNode(node)
        self.nodeAddedByUser.emit(node)
        return node

    def removeCurrentNode(self) -> None:
        node = self.currentNode()
        if node is not None:
            self._scene.RemoveNode(node)

    def renameCurrentNode(self) -> None:
        node = self.currentNode()
        if node is None:
            return
        name = self._askName(f"Rename {self.nodeTypeLabel(node.GetClassName())}", node.GetName())
        if name:
            node.SetName(name)
            self.currentNodeRenamed.emit(name)

    def editCurrentNode(self) -> None:
        self.nodeAboutToBeEdited.emit(self.currentNode())

    def addMenuAction(self, newAction: QtGui.QAction) -> None:
        if all(action.text != newAction.text for action in self._menuActions):
            self._menuActions.append(newAction)
            self._rebuild()


class qMRMLColorTableComboBox(qMRMLNodeComboBox):
    """A combo box of color tables."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self.nodeTypes = ["vtkMRMLColorNode"]
        self.addEnabled = self.removeEnabled = False
        self.showHidden = True


class qMRMLCheckableNodeComboBox(qMRMLNodeComboBox):
    """A combo box of nodes with check marks."""

    checkedNodesChanged = Signal()

    def __init__(self, parent: Any = None) -> None:
        self_checks: dict[str, int] = {}
        super().__init__(parent)
        self._checks = self_checks
        self._combo.checkedIndexesChanged.connect(self._readChecks)

    def _makeComboBox(self) -> QtWidgets.QComboBox:
        return ctkCheckableComboBox(self)

    def _decorate(self, row: int, node: Any) -> None:
        item = self._combo.model().item(row)
        item.setCheckable(True)
        item.setCheckState(Qt.CheckState(self._checks.get(node.GetID(), Qt.CheckState.Unchecked)))

    def _readChecks(self) -> None:
        """From the check marks of the list, which the user sets."""
        model, before = self._combo.model(), dict(self._checks)
        for row, nodeID in enumerate(self._ids, start=int(self.noneEnabled)):
            if model.item(row).data(_NODE_ID) == nodeID:
                self._checks[nodeID] = model.item(row).checkState()
        if {key: value for key, value in before.items() if value} != {k: v for k, v in self._checks.items() if v}:
            self.checkedNodesChanged.emit()

    def _nodesWith(self, checked: bool) -> list[Any]:
        return [self._scene.GetNodeByID(nodeID) for nodeID in self._ids if bool(self._checks.get(nodeID)) == checked]

    def checkedNodes(self) -> list[Any]:
        return self._nodesWith(True)

    def uncheckedNodes(self) -> list[Any]:
        return self._nodesWith(False)

    def allChecked(self) -> bool:
        return not self.uncheckedNodes()

    def noneChecked(self) -> bool:
        return not self.checkedNodes()

    def checkState(self, node: Any) -> int:
        return Qt.CheckState(self._checks.get(node.GetID(), Qt.CheckState.Unchecked))

    def setCheckState(self, node: Any, check: int) -> None:
        if node.GetID() in self._ids:
            self._combo.model().item(self._row(node.GetID())).setCheckState(Qt.CheckState(check))

    def setUserCheckable(self, node: Any, userCheckable: bool) -> None:
        self._combo.model().item(self._row(node.GetID())).setCheckable(userCheckable)

    def check(self, node: Any) -> None:
        self.setCheckState(node, Qt.CheckState.Checked)

    def uncheck(self, node: Any) -> None:
        self.setCheckState(node, Qt.CheckState.Unchecked)


# -- numbers with units -----------------------------------------------------------------------------------------------


class qMRMLSliderWidget(ctkSliderWidget):
    """A slider that shows a quantity in the scene's unit. (`None` cannot be an attribute in Python.)"""

    Prefix, Suffix, Precision, MinimumValue, MaximumValue, Scaling, All = 1, 2, 4, 8, 16, 32, 63

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._observations = _Observations(self)

    quantity = computed(str, lambda self: self.__dict__.get("_quantity", ""), "setQuantity")
    unitAwareProperties = stored(int, "unitAwareProperties", 1 | 2 | 4, "_followUnit")
    orientation = computed(int, "_slider.orientation", "setOrientation")

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        self._observations.leave("selection")
        self._scene = scene
        selection = scene.GetNodeByID("vtkMRMLSelectionNodeSingleton") if scene is not None else None
        if selection is not None:
            self._observations.watch("selection", selection, ["ModifiedEvent"], "_followUnit")
        self._followUnit()

    def setQuantity(self, baseName: str) -> None:
        self._quantity = baseName
        self._followUnit()

    def setUnitAwareProperties(self, flags: int) -> None:
        self.unitAwareProperties = int(flags)

    def setOrientation(self, orientation: int) -> None:
        self._slider.setOrientation(Qt.Orientation(orientation))

    def _followUnit(self) -> None:
        selection = self._scene.GetNodeByID("vtkMRMLSelectionNodeSingleton") if self._scene is not None else None
        unit = selection.GetUnitNode(self.quantity) if selection is not None and self.quantity else None
        if unit is None:
            return
        if self.unitAwareProperties & self.Prefix:
            self.prefix = unit.GetPrefix() or ""
        if self.unitAwareProperties & self.Suffix:
            self.suffix = unit.GetSuffix() or ""
        if self.unitAwareProperties & self.Precision:
            self.decimals = unit.GetPrecision()


# -- segmentations ----------------------------------------------------------------------------------------------------

_SEGMENT_EVENTS = ("SegmentAdded", "SegmentRemoved", "SegmentModified", "SegmentsOrderModified")


def _segment_ids(segmentationNode: Any) -> list[str]:
    return list(segmentationNode.GetSegmentation().GetSegmentIDs()) if segmentationNode is not None else []


def _segmentation_or_none(node: Any) -> Any:
    return node if node is not None and node.IsA("vtkMRMLSegmentationNode") else None


class qMRMLSegmentationShow3DButton(ctkMenuButton):
    """Makes the surfaces of a segmentation, and removes them."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__("Show 3D", parent)
        self._node: Any = None
        self._observations = _Observations(self)
        self.setCheckable(True)
        self.setMenu(self._makeMenu())
        self.toggled.connect(self._onToggled)
        self._follow()

    locked = stored(bool, "locked", False, "_follow")

    def setLocked(self, locked: bool) -> None:
        self.locked = locked

    def _makeMenu(self) -> QtWidgets.QMenu:
        menu = QtWidgets.QMenu(self)
        self._smoothing = menu.addAction("Surface smoothing")
        self._smoothing.setCheckable(True)
        self._smoothing.triggered.connect(self._onSmoothing)
        return menu

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        self._observations.leave("node")
        self._node = _segmentation_or_none(node)
        if self._node is not None:
            segmentation = slicer.vtkSegmentation
            events = [getattr(segmentation, name) for name in _SEGMENT_EVENTS]
            events += [segmentation.ContainedRepresentationNamesModified, segmentation.SourceRepresentationModified]
            self._observations.watch("node", self._node, events, "_follow")
        self._follow()

    def _follow(self) -> None:
        segmentation = self._node.GetSegmentation() if self._node is not None else None
        surface = slicer.vtkSegmentationConverter.GetSegmentationClosedSurfaceRepresentationName()
        if segmentation is None:
            self.setEnabled(False)
            return
        can = segmentation.GetNumberOfSegments() > 0 and segmentation.GetSourceRepresentationName() != surface
        self.setEnabled(can and not self.locked)
        blocked = self.blockSignals(True)
        self.setChecked(segmentation.ContainsRepresentation(surface))
        self.blockSignals(blocked)
        self._smoothing.setChecked(float(segmentation.GetConversionParameter("Smoothing factor") or 0.5) >= 0)

    def _onToggled(self, on: bool) -> None:
        if self._node is None:
            return
        segmentation, converter = self._node.GetSegmentation(), slicer.vtkSegmentationConverter
        surface = converter.GetSegmentationClosedSurfaceRepresentationName()
        labelmap = converter.GetSegmentationBinaryLabelmapRepresentationName()
        if not on:
            if segmentation.GetSourceRepresentationName() != surface:
                segmentation.RemoveRepresentation(surface)
            return
        display = self._node.GetDisplayNode()
        if segmentation.CreateRepresentation(surface) and display is not None:
            display.SetPreferredDisplayRepresentationName3D(surface)
            if segmentation.ContainsRepresentation(labelmap):
                display.SetPreferredDisplayRepresentationName2D(labelmap)

    def _onSmoothing(self, on: bool) -> None:
        if self._node is None:
            return
        segmentation = self._node.GetSegmentation()
        segmentation.SetConversionParameter("Smoothing factor", "0.5" if on else "-0.5")
        if self.checked:
            self._onToggled(False)
            self._onToggled(True)


#: Columns of the table of segments.
_VISIBILITY, _COLOR, _OPACITY, _NAME, _LAYER, _STATUS = range(6)
_SEGMENT_ID = int(Qt.ItemDataRole.UserRole) + 1


class qMRMLSegmentsTableView(qMRMLWidget):
    """The table of a segmentation's segments. (The filter bar and the terminology selector are not imitated.)"""

    selectionChanged = Signal(QtCore.QItemSelection, QtCore.QItemSelection)
    segmentAboutToBeModified = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._hidden: list[str] = []
        self._filling = False
        self._model = QtGui.QStandardItemModel(0, 6, self)
        self._model.setHorizontalHeaderLabels(["", "", "Opacity", "Name", "Layer", "Status"])
        self._table = QtWidgets.QTableView(self)
        self._table.setObjectName("SegmentsTable")
        self._table.setModel(self._model)
        self._table.setSelectionBehavior(QtWidgets.QTableView.SelectionBehavior.SelectRows)
        self._table.setSelectionMode(QtWidgets.QTableView.SelectionMode.ExtendedSelection)
        self._table.verticalHeader().hide()
        header = self._table.horizontalHeader()
        header.setSectionResizeMode(QtWidgets.QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(_NAME, QtWidgets.QHeaderView.ResizeMode.Stretch)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._table)
        self._model.itemChanged.connect(self._edited)
        self._table.doubleClicked.connect(self._doubleClicked)
        self._table.selectionModel().selectionChanged.connect(self._selected)
        self._table.setColumnHidden(_LAYER, True)

    def _column(column: int) -> Any:  # noqa: N805
        return computed(
            bool,
            lambda self: not self._table.isColumnHidden(column),
            lambda self, value: self._table.setColumnHidden(column, not value),
        )

    visibilityColumnVisible, colorColumnVisible = _column(_VISIBILITY), _column(_COLOR)
    opacityColumnVisible, statusColumnVisible, layerColumnVisible = _column(_OPACITY), _column(_STATUS), _column(_LAYER)
    del _column
    selectionMode = computed(int, "_table.selectionMode", "setSelectionMode")
    headerVisible = computed(bool, lambda self: not self._table.horizontalHeader().isHidden(), "setHeaderVisible")
    readOnly = computed(bool, lambda self: int(self._table.editTriggers) == 0, "setReadOnly")
    filterBarVisible = stored(bool, "filterBarVisible", False)
    textFilter = stored(str, "textFilter", "", "_refill")
    jumpToSelectedSegmentEnabled = stored(bool, "jumpToSelectedSegmentEnabled", False)
    segmentCount = computed(int, lambda self: self._model.rowCount())
    useTerminologySelector = stored(bool, "useTerminologySelector", True)

    # content

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        if _segmentation_or_none(node) is self._node:
            return
        self._observations.leave("node")
        self._node = _segmentation_or_none(node)
        if self._node is not None:
            events = [getattr(slicer.vtkSegmentation, name) for name in _SEGMENT_EVENTS]
            self._observations.watch("node", self._node, [*events, self._node.DisplayModifiedEvent], "_refill")
        self._refill()

    def tableWidget(self) -> QtWidgets.QTableView:
        return self._table

    def model(self) -> QtCore.QAbstractItemModel:
        return self._model

    def displayedSegmentIDs(self) -> list[str]:
        wanted = self.textFilter.lower()
        names = {key: self._node.GetSegmentation().GetSegment(key).GetName() for key in _segment_ids(self._node)}
        return [key for key, name in names.items() if key not in self._hidden and wanted in name.lower()]

    def setHideSegments(self, segmentIDs: list[str]) -> None:
        self._hidden = list(segmentIDs)
        self._refill()

    def hideSegments(self) -> list[str]:
        return list(self._hidden)

    def _refill(self) -> None:
        """Show the segments as they are; keep the selection and, where the rows are the same, the items."""
        if self._filling:
            return
        self._filling = True
        keys, chosen = self.displayedSegmentIDs(), self.selectedSegmentIDs()
        if keys != [self.segmentIDForRow(row) for row in range(self._model.rowCount())]:
            self._model.setRowCount(0)
            for key in keys:
                self._model.appendRow([self._item(key, column) for column in range(6)])
            self.setSelectedSegmentIDs([key for key in chosen if key in keys])
        for row, key in enumerate(keys):
            self._showSegment(row, key)
        self._filling = False

    def _item(self, segmentID: str, column: int) -> QtGui.QStandardItem:
        item = QtGui.QStandardItem()
        item.setData(segmentID, _SEGMENT_ID)
        item.setCheckable(column == _VISIBILITY)
        item.setEditable(column in (_NAME, _OPACITY))
        return item

    def _showSegment(self, row: int, segmentID: str) -> None:
        segment, display = self._node.GetSegmentation().GetSegment(segmentID), self._node.GetDisplayNode()
        self._model.item(row, _NAME).setText(segment.GetName())
        color = QtGui.QPixmap(14, 14)
        color.fill(QtGui.QColor.fromRgbF(*segment.GetColor()))
        self._model.item(row, _COLOR).setIcon(QtGui.QIcon(color))
        visible = display is not None and display.GetSegmentVisibility(segmentID)
        self._model.item(row, _VISIBILITY).setCheckState(Qt.CheckState.Checked if visible else Qt.CheckState.Unchecked)
        opacity = display.GetSegmentOpacity3D(segmentID) if display is not None else 1.0
        self._model.item(row, _OPACITY).setText(f"{opacity:.2f}")
        self._model.item(row, _LAYER).setText(str(self._node.GetSegmentation().GetLayerIndex(segmentID)))
        status = slicer.vtkSlicerSegmentationsModuleLogic.GetSegmentStatus(segment)
        name = slicer.vtkSlicerSegmentationsModuleLogic.GetSegmentStatusAsHumanReadableString(status)
        self._model.item(row, _STATUS).setText(name)

    # what the user does

    def _edited(self, item: QtGui.QStandardItem) -> None:
        if self._filling or self._node is None:
            return
        segmentID, display = item.data(_SEGMENT_ID), self._node.GetDisplayNode()
        self.segmentAboutToBeModified.emit(segmentID)
        if item.column() == _VISIBILITY and display is not None:
            display.SetSegmentVisibility(segmentID, item.checkState() == Qt.CheckState.Checked)
        elif item.column() == _NAME:
            self._node.GetSegmentation().GetSegment(segmentID).SetName(item.text())
        elif item.column() == _OPACITY and display is not None:
            display.SetSegmentOpacity(segmentID, float(item.text()))

    def _doubleClicked(self, index: QtCore.QModelIndex) -> None:
        if index.column() != _COLOR or self.readOnly:
            return
        segmentID = self.segmentIDForRow(index.row())
        segment = self._node.GetSegmentation().GetSegment(segmentID)
        color = QtWidgets.QColorDialog.getColor(QtGui.QColor.fromRgbF(*segment.GetColor()), self)
        if color.isValid():
            self.segmentAboutToBeModified.emit(segmentID)
            segment.SetColor(color.redF(), color.greenF(), color.blueF())

    def _selected(self, selected: QtCore.QItemSelection, deselected: QtCore.QItemSelection) -> None:
        self.selectionChanged.emit(selected, deselected)
        if self.jumpToSelectedSegmentEnabled:
            self.jumpSlices()

    # selection

    def rowForSegmentID(self, segmentID: str) -> int:
        rows = [row for row in range(self._model.rowCount()) if self.segmentIDForRow(row) == segmentID]
        return rows[0] if rows else -1

    def segmentIDForRow(self, row: int) -> str:
        item = self._model.item(row, _NAME)
        return item.data(_SEGMENT_ID) if item is not None else ""

    def selectedSegmentIDs(self) -> list[str]:
        rows = sorted({index.row() for index in self._table.selectionModel().selectedIndexes})
        return [self.segmentIDForRow(row) for row in rows]

    def setSelectedSegmentIDs(self, segmentIDs: list[str]) -> None:
        selection = QtCore.QItemSelection()
        for row in (self.rowForSegmentID(key) for key in segmentIDs):
            if row >= 0:
                selection.select(self._model.index(row, 0), self._model.index(row, self._model.columnCount() - 1))
        self._table.selectionModel().select(selection, QtCore.QItemSelectionModel.SelectionFlag.ClearAndSelect)

    def clearSelection(self) -> None:
        self._table.clearSelection()

    def showOnlySelectedSegments(self) -> None:
        chosen = self.selectedSegmentIDs()
        for key in self.displayedSegmentIDs() if chosen else []:
            self._node.GetDisplayNode().SetSegmentVisibility(key, key in chosen)

    def toggleSelectedSegmentsVisibility(self) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        for key in self.selectedSegmentIDs() if display is not None else []:
            display.SetSegmentVisibility(key, not display.GetSegmentVisibility(key))

    def jumpSlices(self) -> None:
        chosen = self.selectedSegmentIDs()
        center = self._node.GetSegmentCenterRAS(chosen[0]) if chosen else None
        if center is not None:
            slicer.vtkMRMLSliceNode.JumpAllSlices(self._scene or self._node.GetScene(), *center)

    # looks

    def setSelectionMode(self, mode: int) -> None:
        self._table.setSelectionMode(QtWidgets.QTableView.SelectionMode(mode))

    def setHeaderVisible(self, visible: bool) -> None:
        self._table.horizontalHeader().setVisible(visible)

    def setReadOnly(self, readOnly: bool) -> None:
        triggers = QtWidgets.QTableView.EditTrigger
        edit = triggers.DoubleClicked | triggers.EditKeyPressed
        self._table.setEditTriggers(triggers.NoEditTriggers if readOnly else edit)

    def setVisibilityColumnVisible(self, visible: bool) -> None:
        self.visibilityColumnVisible = visible

    def setColorColumnVisible(self, visible: bool) -> None:
        self.colorColumnVisible = visible

    def setOpacityColumnVisible(self, visible: bool) -> None:
        self.opacityColumnVisible = visible

    def setStatusColumnVisible(self, visible: bool) -> None:
        self.statusColumnVisible = visible

    def setLayerColumnVisible(self, visible: bool) -> None:
        self.layerColumnVisible = visible

    def setTextFilter(self, textFilter: str) -> None:
        self.textFilter = textFilter

    def setJumpToSelectedSegmentEnabled(self, enable: bool) -> None:
        self.jumpToSelectedSegmentEnabled = enable


class qMRMLSegmentSelectorWidget(qMRMLWidget):
    """A segmentation and one (or some) of its segments."""

    currentNodeChanged = Signal((object,), (bool,))
    currentSegmentChanged = Signal(str)
    segmentSelectionChanged = Signal("QStringList")
    nodeAboutToBeEdited = Signal(object)
    signal_signatures = {
        f"{name}(vtkMRMLNode*)": f"{name}({_NODE})" for name in ("currentNodeChanged", "nodeAboutToBeEdited")
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._segmentID, self._chosen = "", []
        self._nodes = qMRMLNodeComboBox(self)
        self._nodes.nodeTypes = ["vtkMRMLSegmentationNode"]
        self._nodes.addEnabled = self._nodes.removeEnabled = False
        self._one, self._many = QtWidgets.QComboBox(), ctkCheckableComboBox()
        self._layout = QtWidgets.QBoxLayout(QtWidgets.QBoxLayout.Direction.TopToBottom, self)
        self._layout.setContentsMargins(0, 0, 0, 0)
        for widget in (self._nodes, self._one, self._many):
            self._layout.addWidget(widget)
        self._nodes.currentNodeChanged[object].connect(self._nodeChanged)
        self._nodes.nodeAboutToBeEdited.connect(self.nodeAboutToBeEdited.emit)
        self._one.currentIndexChanged.connect(self._segmentChosen)
        self._many.checkedIndexesChanged.connect(self._segmentsChecked)
        self._refill()

    noneEnabled = stored(bool, "noneEnabled", False, "_refill")
    editEnabled = forwarded(bool, "_nodes.editEnabled")
    segmentationNodeSelectorVisible = computed(
        bool, lambda self: not self._nodes.isHidden(), lambda self, v: self._nodes.setVisible(v)
    )
    multiSelection = stored(bool, "multiSelection", False, "_refill")
    horizontalLayout = stored(bool, "horizontalLayout", False, "_arrange")
    selectNodeUponCreation = forwarded(bool, "_nodes.selectNodeUponCreation")

    def _sceneChanged(self) -> None:
        self._nodes.setMRMLScene(self._scene)

    def _arrange(self) -> None:
        direction = QtWidgets.QBoxLayout.Direction
        self._layout.setDirection(direction.LeftToRight if self.horizontalLayout else direction.TopToBottom)

    def _nodeChanged(self, node: Any) -> None:
        self._observations.leave("node")
        if node is not None:
            events = [getattr(slicer.vtkSegmentation, name) for name in _SEGMENT_EVENTS]
            self._observations.watch("node", node, events, "_refill")
        self._refill()
        self.currentNodeChanged[object].emit(node)
        self.currentNodeChanged[bool].emit(node is not None)

    def _refill(self) -> None:
        keys = self.segmentIDs()
        segmentation = self.currentNode().GetSegmentation() if keys else None
        for combo in (self._one, self._many):
            blocked = combo.blockSignals(True)
            combo.clear()
            if combo is self._one and self.noneEnabled:
                combo.addItem("None", "")
            for key in keys:
                combo.addItem(segmentation.GetSegment(key).GetName(), key)
            combo.blockSignals(blocked)
        self._one.setVisible(not self.multiSelection and bool(keys))
        self._many.setVisible(self.multiSelection and bool(keys))
        self._restore(keys)

    def _restore(self, keys: list[str]) -> None:
        if self.multiSelection:
            self._check([key for key in self._chosen if key in keys])
            return
        wanted = self._segmentID
        if wanted not in keys and not (self.noneEnabled and not wanted):
            wanted = keys[0] if keys else ""
        blocked = self._one.blockSignals(True)
        self._one.setCurrentIndex(self._one.findData(wanted) if keys else -1)
        self._one.blockSignals(blocked)
        if keys and wanted != self._segmentID:
            self._segmentID = wanted
            self.currentSegmentChanged.emit(wanted)

    def _segmentChosen(self, row: int) -> None:
        self._segmentID = self._one.itemData(row) or ""
        self.currentSegmentChanged.emit(self._segmentID)

    def _check(self, keys: list[str]) -> None:
        blocked = self._many.blockSignals(True)
        for row in range(self._many.count):
            state = Qt.CheckState.Checked if self._many.itemData(row) in keys else Qt.CheckState.Unchecked
            self._many.setCheckState(self._many.model().index(row, 0), state)
        self._many.blockSignals(blocked)
        self._chosen = keys

    def _segmentsChecked(self) -> None:
        self._chosen = [self._many.itemData(index.row()) for index in self._many.checkedIndexes()]
        self.segmentSelectionChanged.emit(self._chosen)

    def currentNode(self) -> Any:
        return self._nodes.currentNode()

    def currentNodeID(self) -> str:
        return self._nodes.currentNodeID

    def currentSegmentID(self) -> str:
        return "" if self.multiSelection else self._segmentID

    def selectedSegmentIDs(self) -> list[str]:
        return list(self._chosen)

    def segmentIDs(self) -> list[str]:
        return _segment_ids(self.currentNode())

    def setCurrentNode(self, node: Any) -> None:
        self._nodes.setCurrentNode(node)

    def setCurrentNodeID(self, nodeID: str) -> None:
        self._nodes.setCurrentNodeID(nodeID)

    def setCurrentSegmentID(self, segmentID: str) -> None:
        row = self._one.findData(segmentID)
        if row >= 0 and not self.multiSelection:
            self._one.setCurrentIndex(row)

    def setSelectedSegmentIDs(self, segmentIDList: list[str]) -> None:
        before = self._chosen
        self._check([key for key in segmentIDList if key in self.segmentIDs()])
        if self._chosen != before:
            self.segmentSelectionChanged.emit(self._chosen)


# -- subject hierarchy ------------------------------------------------------------------------------------------------

_ITEM_ID = int(Qt.ItemDataRole.UserRole) + 1
_HIERARCHY_EVENTS = ("ItemAddedEvent", "ItemRemovedEvent", "ItemModifiedEvent", "ItemReparentedEvent")


class qMRMLSubjectHierarchyTreeView(QtWidgets.QTreeView):
    """The tree of the scene's data, by name. (Only choosing items; no menus, no dragging, no other columns.)"""

    currentItemChanged = Signal("qlonglong")
    currentNodeChanged = Signal(object)
    currentItemsChanged = Signal("QVariantList")
    signal_signatures = {
        "currentItemChanged(vtkIdType)": "currentItemChanged(qlonglong)",
        "currentNodeChanged(vtkMRMLNode*)": f"currentNodeChanged({_NODE})",
        "currentItemsChanged(QList<vtkIdType>)": "currentItemsChanged(QVariantList)",
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._root = 0
        self._observations = _Observations(self)
        self._filling = False
        self._items = QtGui.QStandardItemModel(self)
        self._items.setHorizontalHeaderLabels(["Node"])
        self.setModel(self._items)
        self.setEditTriggers(QtWidgets.QTreeView.EditTrigger.NoEditTriggers)
        self.selectionModel().selectionChanged.connect(self._selected)

    multiSelection = computed(
        bool,
        lambda self: self.selectionMode == QtWidgets.QTreeView.SelectionMode.ExtendedSelection,
        "setMultiSelection",
    )
    nodeTypes = stored("QStringList", "nodeTypes", [], "_refill")
    hideChildNodeTypes = stored("QStringList", "hideChildNodeTypes", [], "_refill")
    nameFilter = stored(str, "nameFilter", "", "_refill")
    contextMenuEnabled = stored(bool, "contextMenuEnabled", True)
    editMenuActionVisible = stored(bool, "editMenuActionVisible", True)
    visibilityColumnVisible = stored(bool, "visibilityColumnVisible", True)
    idColumnVisible = stored(bool, "idColumnVisible", False)
    colorColumnVisible = stored(bool, "colorColumnVisible", True)
    transformColumnVisible = stored(bool, "transformColumnVisible", True)
    descriptionColumnVisible = stored(bool, "descriptionColumnVisible", False)

    def mrmlScene(self) -> Any:
        return self._scene

    def subjectHierarchyNode(self) -> Any:
        return self._scene.GetSubjectHierarchyNode() if self._scene is not None else None

    def setMRMLScene(self, scene: Any) -> None:
        self._observations.leave("hierarchy")
        self._scene = scene
        hierarchy = self.subjectHierarchyNode()
        if hierarchy is not None:
            events = [getattr(hierarchy, f"SubjectHierarchy{name}") for name in _HIERARCHY_EVENTS]
            self._observations.watch("hierarchy", hierarchy, events, "_refill")
            self._observations.watch("hierarchy", scene, [scene.EndBatchProcessEvent], "_refill")
        self._refill()

    def rootItem(self) -> int:
        hierarchy = self.subjectHierarchyNode()
        return self._root or (hierarchy.GetSceneItemID() if hierarchy is not None else 0)

    def setRootItem(self, itemID: int) -> None:
        self._root = itemID
        self._refill()

    def setMultiSelection(self, multiSelectionOn: bool) -> None:
        modes = QtWidgets.QTreeView.SelectionMode
        self.setSelectionMode(modes.ExtendedSelection if multiSelectionOn else modes.SingleSelection)

    def _refill(self) -> None:
        if self._scene is not None and self._scene.IsBatchProcessing():
            return
        chosen, hierarchy = self.currentItems(), self.subjectHierarchyNode()
        self._filling = True
        self._items.removeRows(0, self._items.rowCount())
        if hierarchy is not None:
            self._addChildren(hierarchy, self.rootItem(), self._items.invisibleRootItem())
        self.expandAll()
        self.setCurrentItems(chosen)
        self._filling = False
        if self.currentItems() != chosen:
            self._announce()

    def _addChildren(self, hierarchy: Any, parentID: int, parent: QtGui.QStandardItem) -> None:
        children = vtk.vtkIdList()
        hierarchy.GetItemChildren(parentID, children, False)
        for itemID in (children.GetId(n) for n in range(children.GetNumberOfIds())):
            item = QtGui.QStandardItem(hierarchy.GetItemName(itemID))
            item.setData(itemID, _ITEM_ID)
            self._addChildren(hierarchy, itemID, item)
            if item.rowCount() or self._accepts(hierarchy, itemID):
                parent.appendRow(item)

    def _accepts(self, hierarchy: Any, itemID: int) -> bool:
        node = hierarchy.GetItemDataNode(itemID)
        if self.nameFilter.lower() not in hierarchy.GetItemName(itemID).lower():
            return False
        if node is None:
            return not self.nodeTypes
        if node.GetHideFromEditors() or any(node.IsA(hidden) for hidden in self.hideChildNodeTypes):
            return False
        return not self.nodeTypes or any(node.IsA(nodeType) for nodeType in self.nodeTypes)

    def _indexOf(self, itemID: int) -> QtCore.QModelIndex:
        flags = Qt.MatchFlag.MatchRecursive | Qt.MatchFlag.MatchExactly
        found = self._items.match(self._items.index(0, 0), _ITEM_ID, itemID, 1, flags) if self._items.rowCount() else []
        return found[0] if found else QtCore.QModelIndex()

    def displayedItemCount(self) -> int:
        def count(item: QtGui.QStandardItem) -> int:
            return sum(1 + count(item.child(row)) for row in range(item.rowCount()))

        return count(self._items.invisibleRootItem())

    def currentItems(self) -> list[int]:
        return [index.data(_ITEM_ID) for index in self.selectionModel().selectedIndexes]

    def currentItem(self) -> int:
        return next(iter(self.currentItems()), 0)

    def currentNode(self) -> Any:
        hierarchy = self.subjectHierarchyNode()
        return hierarchy.GetItemDataNode(self.currentItem()) if hierarchy is not None and self.currentItem() else None

    def setCurrentItem(self, itemID: int) -> None:
        self.setCurrentItems([itemID])

    def setCurrentItems(self, items: list[int]) -> None:
        selection = QtCore.QItemSelection()
        for index in (self._indexOf(itemID) for itemID in items):
            if index.isValid():
                selection.select(index, index)
        self.selectionModel().select(selection, QtCore.QItemSelectionModel.SelectionFlag.ClearAndSelect)

    def setCurrentNode(self, node: Any) -> None:
        self.setCurrentItem(self.subjectHierarchyNode().GetItemByDataNode(node) if node is not None else 0)

    def _selected(self, *_: Any) -> None:
        if not self._filling:
            self._announce()

    def _announce(self) -> None:
        self.currentItemChanged.emit(self.currentItem())
        self.currentNodeChanged.emit(self.currentNode())
        self.currentItemsChanged.emit(self.currentItems())


# -- markups ----------------------------------------------------------------------------------------------------------

_POINT_EVENTS = ("PointAddedEvent", "PointRemovedEvent", "PointModifiedEvent", "PointPositionDefinedEvent")
_POINT_EVENTS += ("PointPositionUndefinedEvent",)


def _markups_or_none(node: Any) -> Any:
    return node if node is not None and node.IsA("vtkMRMLMarkupsNode") else None


@flags(ShowPlaceMultipleMarkupsOption=0, HidePlaceMultipleMarkupsOption=1)
@flags(ForcePlaceSingleMarkup=2, ForcePlaceMultipleMarkups=3)
class qSlicerMarkupsPlaceWidget(qSlicerWidget):
    """Buttons to place the points of a markups node; they set the mode in the scene's interaction node."""

    activeMarkupsPlaceModeChanged = Signal(bool)
    activeMarkupsFiducialPlaceModeChanged = Signal(bool)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._wasPlacing = False
        self._placeButton, self._deleteButton = QtWidgets.QToolButton(), QtWidgets.QToolButton()
        self._colorButton = ctkColorPickerButton()
        self._colorButton.displayColorName = False
        self._placeButton.setText("Place")
        self._placeButton.setCheckable(True)
        self._deleteButton.setText("Delete")
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for button in (self._colorButton, self._placeButton, self._deleteButton):
            layout.addWidget(button)
        self._placeButton.toggled.connect(lambda checked: self.setPlaceModeEnabled(checked))
        self._deleteButton.clicked.connect(lambda _checked: self.deleteLastPoint())
        self._colorButton.colorChanged.connect(self.setNodeColor)
        self._follow()

    buttonsVisible = stored(bool, "buttonsVisible", True, "_showButtons")
    deleteAllControlPointsOptionVisible = stored(bool, "deleteAllControlPointsOptionVisible", True)
    unsetLastControlPointOptionVisible = stored(bool, "unsetLastControlPointOptionVisible", False)
    unsetAllControlPointsOptionVisible = stored(bool, "unsetAllControlPointsOptionVisible", False)
    placeMultipleMarkups = stored(int, "placeMultipleMarkups", 0)
    nodeColor = computed(QtGui.QColor, "_colorButton.color", "setNodeColor")
    defaultNodeColor = stored(QtGui.QColor, "defaultNodeColor", QtGui.QColor(0, 0, 0))
    currentNodeActive = computed(bool, lambda self: self._isActive(), "setCurrentNodeActive")
    placeModeEnabled = computed(bool, lambda self: self._isPlacing(), "setPlaceModeEnabled")
    placeModePersistency = computed(
        bool,
        lambda self: bool(self._usable() and self.interactionNode().GetPlaceModePersistence()),
        "setPlaceModePersistency",
    )

    def _singleton(self, name: str) -> Any:
        return self._scene.GetNodeByID(f"vtkMRML{name}NodeSingleton") if self._scene is not None else None

    def interactionNode(self) -> Any:
        return self._singleton("Interaction")

    def selectionNode(self) -> Any:
        return self._singleton("Selection")

    def _usable(self) -> bool:
        return self.interactionNode() is not None and self.selectionNode() is not None

    def _sceneChanged(self) -> None:
        self._observations.leave("modes")
        if self._usable():
            interaction, selection = self.interactionNode(), self.selectionNode()
            modes = [interaction.InteractionModeChangedEvent, interaction.InteractionModePersistenceChangedEvent]
            self._observations.watch("modes", interaction, modes, "_follow")
            self._observations.watch("modes", selection, ["ModifiedEvent"], "_follow")
        self._follow()

    def currentNode(self) -> Any:
        return self._node

    currentMarkupsNode = currentNode

    def setCurrentNode(self, currentNode: Any) -> None:
        if _markups_or_none(currentNode) is self._node:
            return
        self._observations.leave("node")
        self._node = _markups_or_none(currentNode)
        if self._node is not None:
            events = [getattr(self._node, name) for name in _POINT_EVENTS]
            self._observations.watch("node", self._node, [*events, "ModifiedEvent"], "_follow")
        self._follow()

    def _isActive(self) -> bool:
        if self._node is None or not self._usable():
            return False
        selection = self.selectionNode()
        sameClass = selection.GetActivePlaceNodeClassName() == self._node.GetClassName()
        return sameClass and selection.GetActivePlaceNodeID() == self._node.GetID()

    def _isPlacing(self) -> bool:
        return self._isActive() and self.interactionNode().GetCurrentInteractionMode() == self.interactionNode().Place

    def setCurrentNodeActive(self, active: bool) -> None:
        if not self._usable() or active == self._isActive():
            return
        if active and self._node is not None:
            self.selectionNode().SetReferenceActivePlaceNodeClassName(self._node.GetClassName())
            self.selectionNode().SetActivePlaceNodeID(self._node.GetID())
        else:
            self.selectionNode().SetActivePlaceNodeID(None)
            self.interactionNode().SetCurrentInteractionMode(self.interactionNode().ViewTransform)

    def setPlaceModeEnabled(self, enable: bool) -> None:
        if not self._usable() or self._node is None:
            return
        interaction = self.interactionNode()
        if not enable:
            interaction.SetCurrentInteractionMode(interaction.ViewTransform)
            return
        self.setCurrentNodeActive(True)
        if self.placeMultipleMarkups in (self.ForcePlaceSingleMarkup, self.ForcePlaceMultipleMarkups):
            interaction.SetPlaceModePersistence(self.placeMultipleMarkups == self.ForcePlaceMultipleMarkups)
        interaction.SetCurrentInteractionMode(interaction.Place)

    def setPlaceModePersistency(self, persistent: bool) -> None:
        self.interactionNode().SetPlaceModePersistence(persistent)

    def setPlaceMultipleMarkups(self, option: int) -> None:
        self.placeMultipleMarkups = int(option)

    def setButtonsVisible(self, visible: bool) -> None:
        self.buttonsVisible = visible

    def _showButtons(self) -> None:
        for button in (self._colorButton, self._placeButton, self._deleteButton):
            button.setVisible(self.buttonsVisible)

    def placeButton(self) -> QtWidgets.QToolButton:
        return self._placeButton

    def deleteButton(self) -> QtWidgets.QToolButton:
        return self._deleteButton

    def setNodeColor(self, color: QtGui.QColor) -> None:
        display = self._node.GetDisplayNode() if self._node is not None else None
        if display is not None:
            display.SetSelectedColor(color.redF(), color.greenF(), color.blueF())

    def setDefaultNodeColor(self, color: QtGui.QColor) -> None:
        self.defaultNodeColor = color

    def deleteLastPoint(self) -> None:
        if self._node is not None and self._node.GetNumberOfControlPoints() > 0:
            self._node.RemoveNthControlPoint(self._node.GetNumberOfControlPoints() - 1)

    def deleteAllPoints(self) -> None:
        if self._node is not None:
            self._node.RemoveAllControlPoints()

    def unsetLastDefinedPoint(self) -> None:
        node = self._node
        for n in reversed(range(node.GetNumberOfControlPoints() if node is not None else 0)):
            if node.GetNthControlPointPositionStatus(n) == node.PositionDefined:
                node.UnsetNthControlPointPosition(n)
                return

    def unsetAllPoints(self) -> None:
        if self._node is not None:
            self._node.UnsetAllControlPoints()

    def _follow(self) -> None:
        usable = self._node is not None and self._usable()
        self._colorButton.setEnabled(usable)
        self._placeButton.setEnabled(usable and not self._node.GetControlPointPlacementComplete())
        self._deleteButton.setEnabled(usable and self._node.GetNumberOfControlPoints() > 0)
        blocked = [(button, button.blockSignals(True)) for button in (self._placeButton, self._colorButton)]
        self._placeButton.setChecked(usable and self._isPlacing())
        display = self._node.GetDisplayNode() if usable else None
        color = QtGui.QColor.fromRgbF(*display.GetSelectedColor()) if display is not None else self.defaultNodeColor
        self._colorButton.setColor(color)
        for button, before in blocked:
            button.blockSignals(before)
        placing = usable and self._isPlacing()
        if placing != self._wasPlacing:
            self._wasPlacing = placing
            self.activeMarkupsFiducialPlaceModeChanged.emit(placing)
            self.activeMarkupsPlaceModeChanged.emit(placing)


class qSlicerSimpleMarkupsWidget(qSlicerWidget):
    """A markups node, its place buttons and the table of its points."""

    markupsNodeChanged = Signal()
    markupsFiducialNodeChanged = Signal()
    currentMarkupsControlPointSelectionChanged = Signal(int)
    currentMarkupsFiducialSelectionChanged = Signal(int)
    activeMarkupsPlaceModeChanged = Signal(bool)
    activeMarkupsFiducialPlaceModeChanged = Signal(bool)
    updateFinished = Signal()

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self._nodes = qMRMLNodeComboBox()
        self._nodes.nodeTypes = ["vtkMRMLMarkupsFiducialNode"]
        self._nodes.noneEnabled = self._nodes.renameEnabled = True
        self._place = qSlicerMarkupsPlaceWidget()
        self._table = QtWidgets.QTableWidget(0, 4)
        self._table.setSelectionBehavior(QtWidgets.QTableView.SelectionBehavior.SelectRows)
        self._table.setHorizontalHeaderLabels(["Label", "R", "A", "S"])
        self._table.horizontalHeader().setSectionResizeMode(QtWidgets.QHeaderView.ResizeMode.Stretch)
        layout, row = QtWidgets.QVBoxLayout(self), QtWidgets.QHBoxLayout()
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        row.addWidget(self._nodes, 1)
        row.addWidget(self._place)
        layout.addWidget(self._table)
        self._nodes.currentNodeChanged[object].connect(self._nodeChosen)
        self._place.activeMarkupsPlaceModeChanged.connect(self.activeMarkupsPlaceModeChanged.emit)
        self._place.activeMarkupsFiducialPlaceModeChanged.connect(self.activeMarkupsFiducialPlaceModeChanged.emit)
        self._table.cellChanged.connect(self._edited)
        self._table.currentCellChanged.connect(lambda row, *_: self._pointChosen(row))

    enterPlaceModeOnNodeChange = stored(bool, "enterPlaceModeOnNodeChange", True)
    jumpToSliceEnabled = stored(bool, "jumpToSliceEnabled", False)
    nodeSelectorVisible = computed(bool, lambda self: not self._nodes.isHidden(), "setNodeSelectorVisible")
    optionsVisible = computed(bool, lambda self: not self._place.isHidden(), "setOptionsVisible")
    nodeColor = computed(QtGui.QColor, "_place.nodeColor", "setNodeColor")
    defaultNodeColor = computed(QtGui.QColor, "_place.defaultNodeColor", "setDefaultNodeColor")
    viewGroup = stored(int, "viewGroup", -1)

    def _sceneChanged(self) -> None:
        self._place.setMRMLScene(self._scene)
        self._nodes.setMRMLScene(self._scene)

    def currentNode(self) -> Any:
        return self._node

    getCurrentNode = currentNode

    def interactionNode(self) -> Any:
        return self._place.interactionNode()

    def tableWidget(self) -> QtWidgets.QTableWidget:
        return self._table

    def markupsPlaceWidget(self) -> qSlicerMarkupsPlaceWidget:
        return self._place

    def markupsSelectorComboBox(self) -> qMRMLNodeComboBox:
        return self._nodes

    def setNodeBaseName(self, newNodeBaseName: str) -> None:
        self._nodes.baseName = newNodeBaseName

    def setNodeSelectorVisible(self, visible: bool) -> None:
        self._nodes.setVisible(visible)

    def setOptionsVisible(self, visible: bool) -> None:
        self._place.setVisible(visible)

    def setEnterPlaceModeOnNodeChange(self, enable: bool) -> None:
        self.enterPlaceModeOnNodeChange = enable

    def setJumpToSliceEnabled(self, enable: bool) -> None:
        self.jumpToSliceEnabled = enable

    def setNodeColor(self, color: QtGui.QColor) -> None:
        self._place.setNodeColor(color)

    def setDefaultNodeColor(self, color: QtGui.QColor) -> None:
        self._place.setDefaultNodeColor(color)

    def _nodeChosen(self, node: Any) -> None:
        self.setCurrentNode(node)
        if self.enterPlaceModeOnNodeChange:
            self._place.setPlaceModeEnabled(node is not None)

    def setCurrentNode(self, currentNode: Any) -> None:
        if _markups_or_none(currentNode) is self._node:
            return
        self._node = _markups_or_none(currentNode)
        blocked = self._nodes.blockSignals(True)
        self._nodes.setCurrentNode(self._node)
        self._nodes.blockSignals(blocked)
        self._place.setCurrentNode(self._node)
        self._observations.leave("node")
        if self._node is not None:
            events = [getattr(self._node, name) for name in _POINT_EVENTS]
            self._observations.watch("node", self._node, [*events, "ModifiedEvent"], "_showPoints")
        self._showPoints()
        self.markupsNodeChanged.emit()
        self.markupsFiducialNodeChanged.emit()

    def _showPoints(self) -> None:
        count = self._node.GetNumberOfControlPoints() if self._node is not None else 0
        blocked = self._table.blockSignals(True)
        self._table.setRowCount(count)
        for row in range(count):
            defined = self._node.GetNthControlPointPositionStatus(row) == self._node.PositionDefined
            position = self._node.GetNthControlPointPosition(row)
            numbers = [f"{value:.3f}" if defined else "" for value in position]
            for column, text in enumerate((self._node.GetNthControlPointLabel(row), *numbers)):
                item = self._table.item(row, column)
                if item is None:
                    item = QtWidgets.QTableWidgetItem()
                    self._table.setItem(row, column, item)
                item.setText(text)
        self._table.blockSignals(blocked)
        self.updateFinished.emit()

    def _edited(self, row: int, column: int) -> None:
        text = self._table.item(row, column).text()
        if column == 0:
            self._node.SetNthControlPointLabel(row, text)
            return
        position = list(self._node.GetNthControlPointPosition(row))
        position[column - 1] = float(text)
        self._node.SetNthControlPointPosition(row, *position)

    def _pointChosen(self, row: int) -> None:
        self.currentMarkupsControlPointSelectionChanged.emit(row)
        self.currentMarkupsFiducialSelectionChanged.emit(row)
        if self.jumpToSliceEnabled and row >= 0:
            slicer.vtkMRMLSliceNode.JumpAllSlices(self._scene, *self._node.GetNthControlPointPosition(row))

    def highlightNthControlPoint(self, n: int) -> None:
        if 0 <= n < self._table.rowCount:
            self._table.selectRow(n)
        else:
            self._table.clearSelection()

    def activate(self) -> None:
        self._place.setCurrentNodeActive(True)

    def placeActive(self, place: bool) -> None:
        self._place.setPlaceModeEnabled(place)


# -- tables -----------------------------------------------------------------------------------------------------------


class qMRMLTableView(QtWidgets.QTableView):
    """A table node; editable unless the node is locked."""

    mrmlSceneChanged = Signal(object)
    selectionChanged = Signal()
    signal_signatures = {"mrmlSceneChanged(vtkMRMLScene*)": f"mrmlSceneChanged({_NODE})"}

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._node: Any = None
        self._filling = False
        self._observations = _Observations(self)
        self._cells = QtGui.QStandardItemModel(self)
        self.setModel(self._cells)
        self._cells.itemChanged.connect(self._edited)
        self.selectionModel().selectionChanged.connect(lambda *_: self.selectionChanged.emit())

    transposed = stored(bool, "transposed", False, "_refill")
    firstRowLocked = stored(bool, "firstRowLocked", False, "_refill")
    firstColumnLocked = stored(bool, "firstColumnLocked", False, "_refill")

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, newScene: Any) -> None:
        if newScene is not self._scene:
            self._scene = newScene
            self.mrmlSceneChanged.emit(newScene)

    def mrmlTableNode(self) -> Any:
        return self._node

    def setMRMLTableNode(self, tableNode: Any) -> None:
        self._observations.leave("node")
        self._node = tableNode if tableNode is not None and tableNode.IsA("vtkMRMLTableNode") else None
        if self._node is not None:
            self._observations.watch("node", self._node, ["ModifiedEvent"], "_refill")
        self._refill()

    def setTransposed(self, transposed: bool) -> None:
        self.transposed = transposed

    def setFirstRowLocked(self, locked: bool) -> None:
        self.firstRowLocked = locked

    def setFirstColumnLocked(self, locked: bool) -> None:
        self.firstColumnLocked = locked

    def tableModel(self) -> QtCore.QAbstractItemModel:
        return self._cells

    def _refill(self) -> None:
        """One row of names above the values; a locked first row or column becomes the header."""
        self._filling = True
        self._cells.clear()
        table = self._node.GetTable() if self._node is not None else None
        columns = [table.GetColumn(n) for n in range(table.GetNumberOfColumns())] if table is not None else []
        for column in columns:
            values = [str(column.GetVariantValue(n).ToString()) for n in range(column.GetNumberOfValues())]
            self._addLine([column.GetName() or "", *values])
        self._filling = False

    def _addLine(self, texts: list[str]) -> None:
        items = [QtGui.QStandardItem(text) for text in texts]
        for item in items:
            item.setEditable(not self._node.GetLocked())
        (self._cells.appendRow if self.transposed else self._cells.appendColumn)(items)
        self._nameHeaders()

    def _nameHeaders(self) -> None:
        sides = ((Qt.Orientation.Horizontal, self.firstRowLocked), (Qt.Orientation.Vertical, self.firstColumnLocked))
        for orientation, locked in sides:
            horizontal = orientation == Qt.Orientation.Horizontal
            for n in range(self._cells.columnCount() if horizontal else self._cells.rowCount()):
                first = self._cells.item(0, n) if horizontal else self._cells.item(n, 0)
                if locked and first is not None:
                    self._cells.setHeaderData(n, orientation, first.text())
        self.setRowHidden(0, self.firstRowLocked)
        self.setColumnHidden(0, self.firstColumnLocked)

    def _edited(self, item: QtGui.QStandardItem) -> None:
        if self._filling:
            return
        row, column = (item.column(), item.row()) if self.transposed else (item.row(), item.column())
        if row == 0:
            self._node.GetTable().GetColumn(column).SetName(item.text())
        else:
            self._node.GetTable().SetValue(row - 1, column, vtk.vtkVariant(item.text()))
        self._node.Modified()


#: Name of the class in Slicer -> its stand-in.
CLASSES: dict[str, type] = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and cls.__name__.startswith("q")
}
__all__ = list(CLASSES)
