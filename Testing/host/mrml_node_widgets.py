"""Stand-ins for the widgets that show the nodes of a scene: selectors, the hierarchy, tables, numbers with units."""

from __future__ import annotations

from typing import Any

import vtk

from host.ctk_widgets import ctkCheckableComboBox, ctkComboBox, ctkSliderWidget
from host.mrml_base import NODE, Observations
from host.qt_compat import QtCore, QtGui, QtWidgets
from host.standin import computed, forwarded, stored

Qt, Signal = QtCore.Qt, QtCore.Signal

# -- choosing a node --------------------------------------------------------------------------------------------------

_ACTION, _NODE_ID = int(Qt.ItemDataRole.UserRole) + 1, int(Qt.ItemDataRole.UserRole) + 2


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
        f"{name}(vtkMRMLNode*)": f"{name}({NODE})"
        for name in (
            "currentNodeChanged nodeActivated nodeAdded nodeAddedByUser nodeAddedByUserAction nodeAboutToBeRemoved"
            " nodeAboutToBeEdited"
        ).split()
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._observations = Observations(self)
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
            self._observations.watch("scene", scene, [scene.NodeAddedEvent, scene.NodeRemovedEvent], "_rebuild")
            self._observations.watch("scene", scene, [scene.EndImportEvent, scene.EndCloseEvent], "_startAnew")
            self._observations.watch_node("scene", scene, scene.NodeAboutToBeRemovedEvent, "_nodeLeaves")
        wanted, self._requestedID = self._requestedID, None
        self._rebuild(entered=True)
        if wanted is not None:
            self.setCurrentNodeID(wanted)
        self.setEnabled(scene is not None)

    def _nodeLeaves(self, node: Any) -> None:
        if node.GetID() in self._ids:
            self.nodeAboutToBeRemoved.emit(node)

    def _startAnew(self) -> None:
        """A scene was read or closed: the real one takes all nodes out, which loses the choice, and in again."""
        self._ids = []
        self._fill([], "")
        self._become("")
        self._rebuild()

    def _rebuild(self, entered: bool = False) -> None:
        """List the nodes anew, and keep the current one, or take the one in its place when it is gone."""
        if self._scene is not None and (self._scene.IsImporting() or self._scene.IsClosing()):
            return  # as the real one, which waits for the end of both
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

    def _nodesWith(self, checked: bool) -> tuple[Any, ...]:
        ids = (nodeID for nodeID in self._ids if bool(self._checks.get(nodeID)) == checked)
        return tuple(self._scene.GetNodeByID(nodeID) for nodeID in ids)

    def checkedNodes(self) -> tuple[Any, ...]:
        return self._nodesWith(True)

    def uncheckedNodes(self) -> tuple[Any, ...]:
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
        self._observations = Observations(self)

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
        "currentNodeChanged(vtkMRMLNode*)": f"currentNodeChanged({NODE})",
        "currentItemsChanged(QList<vtkIdType>)": "currentItemsChanged(QVariantList)",
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._root = 0
        self._observations = Observations(self)
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
        chosen, hierarchy = self._chosen(), self.subjectHierarchyNode()
        self._filling = True
        self._items.removeRows(0, self._items.rowCount())
        if hierarchy is not None:
            self._addChildren(hierarchy, self.rootItem(), self._items.invisibleRootItem())
        self.expandAll()
        self._choose(chosen)
        self._filling = False
        if self._chosen() != chosen:
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

    def _chosen(self) -> list[int]:
        return [index.data(_ITEM_ID) for index in self.selectionModel().selectedIndexes]

    def currentItems(self, selectedItems: vtk.vtkIdList) -> None:
        selectedItems.Reset()
        for itemID in self._chosen():
            selectedItems.InsertNextId(itemID)

    def currentItem(self) -> int:
        return next(iter(self._chosen()), 0)

    def currentNode(self) -> Any:
        hierarchy = self.subjectHierarchyNode()
        return hierarchy.GetItemDataNode(self.currentItem()) if hierarchy is not None and self.currentItem() else None

    def setCurrentItem(self, itemID: int) -> None:
        self._choose([itemID])

    def setCurrentItems(self, items: vtk.vtkIdList | list[int]) -> None:
        self._choose([items.GetId(n) for n in range(items.GetNumberOfIds())] if hasattr(items, "GetId") else items)

    def _choose(self, items: list[int]) -> None:
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
        self.currentItemsChanged.emit(self._chosen())


# -- tables -----------------------------------------------------------------------------------------------------------


class qMRMLTableView(QtWidgets.QTableView):
    """A table node; editable unless the node is locked."""

    mrmlSceneChanged = Signal(object)
    selectionChanged = Signal()
    signal_signatures = {"mrmlSceneChanged(vtkMRMLScene*)": f"mrmlSceneChanged({NODE})"}

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None
        self._node: Any = None
        self._filling = False
        self._observations = Observations(self)
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
