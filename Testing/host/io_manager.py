"""`slicer.app.coreIOManager()`: what `slicer.util.load...`, `saveNode`, `saveScene` and `exportNode` call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import slicer
import vtk

Properties = Mapping[str, Any]

#: Ending -> file type; a longer ending comes before the shorter one it ends with.
_FILE_TYPES = {
    ".seg.nrrd": "SegmentationFile",
    ".seg.nhdr": "SegmentationFile",
    ".seg.vtm": "SegmentationFile",
    ".mrk.json": "MarkupsFile",
    ".fcsv": "MarkupsFile",
    ".mrml": "SceneFile",
    ".mrb": "SceneFile",
    ".stl": "ModelFile",
    ".obj": "ModelFile",
    ".ply": "ModelFile",
    ".vtk": "ModelFile",
    ".vtp": "ModelFile",
    ".vtu": "ModelFile",
    ".csv": "TableFile",
    ".tsv": "TableFile",
    ".h5": "TransformFile",
    ".tfm": "TransformFile",
    ".mat": "TransformFile",
    ".ctbl": "ColorTableFile",
    ".txt": "TextFile",
    ".json": "TextFile",
    ".xml": "TextFile",
}
_WRITER_TYPES = {
    "vtkMRMLSegmentationNode": "SegmentationFile",
    "vtkMRMLVolumeNode": "VolumeFile",
    "vtkMRMLModelNode": "ModelFile",
    "vtkMRMLMarkupsNode": "MarkupsFile",
    "vtkMRMLTableNode": "TableFile",
    "vtkMRMLTransformNode": "TransformFile",
    "vtkMRMLColorTableNode": "ColorTableFile",
    "vtkMRMLTextNode": "TextFile",
}
_SURFACE_ENDINGS = (".stl", ".obj", ".ply", ".vtk", ".vtp")


class CoreIOManager:
    """Files to nodes and back, by Slicer's own logics and storage nodes."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self._readers: dict[str, Callable[[str, Properties, Any], list[Any]]] = {
            "VolumeFile": self._readVolume,
            "SegmentationFile": self._readSegmentation,
            "ModelFile": self._readModel,
            "MarkupsFile": self._readMarkups,
            "SceneFile": self._readScene,
            "TableFile": self._byStorage("vtkMRMLTableNode"),
            "TransformFile": self._byStorage("vtkMRMLTransformNode"),
            "ColorTableFile": self._byStorage("vtkMRMLColorTableNode"),
            "TextFile": self._byStorage("vtkMRMLTextNode"),
        }

    # -- reading ---------------------------------------------------------------------------------------------------

    def fileType(self, fileName: str | Path) -> str:
        name = Path(fileName).name.lower()
        return next((kind for ending, kind in _FILE_TYPES.items() if name.endswith(ending)), "VolumeFile")

    def registeredFileReaderCount(self, fileType: str) -> int:
        return int(fileType in self._readers)

    def loadNodes(
        self, fileType: str, properties: Properties, loadedNodes: Any = None, userMessages: Any = None
    ) -> bool:
        """Read `properties["fileName"]`; what was loaded is added to the vtkCollection `loadedNodes`."""
        fileName = str(properties["fileName"])
        messages = userMessages if userMessages is not None else slicer.vtkMRMLMessageCollection()
        if fileType not in self._readers:
            _complain(messages, f"The host has no reader for {fileType}.")
            return False
        if not Path(fileName).exists():
            _complain(messages, f"The file {fileName} does not exist.")
            return False
        nodes = [node for node in self._readers[fileType](fileName, properties, messages) if node is not None]
        for node in nodes:
            if loadedNodes is not None:
                loadedNodes.AddItem(node)
        return bool(nodes) or (fileType == "SceneFile" and not messages.GetNumberOfMessagesOfType(_ERROR))

    def loadNodesAndGetFirst(self, fileType: str, properties: Properties, userMessages: Any = None) -> Any:
        loaded = vtk.vtkCollection()
        self.loadNodes(fileType, properties, loaded, userMessages)
        return loaded.GetItemAsObject(0)

    def loadScene(self, fileName: str, clear: bool = True) -> bool:
        return self.loadNodes("SceneFile", {"fileName": fileName, "clear": clear})

    def _readVolume(self, fileName: str, properties: Properties, messages: Any) -> list[Any]:
        logic = self._host.logic("Volumes")
        flags = {
            "labelmap": logic.LabelMap,
            "center": logic.CenterImage,
            "singleFile": logic.SingleFile,
            "autoWindowLevel": logic.AutoWindowLevel,
            "discardOrientation": logic.DiscardOrientation,
        }
        given = {"autoWindowLevel": True, **properties}
        options = sum(flag for name, flag in flags.items() if given.get(name))
        files = _stringArray(properties["fileNames"]) if properties.get("fileNames") else None
        name = properties.get("name") or _baseName(fileName)
        node = logic.AddArchetypeVolume(fileName, name, options, files, messages)
        if node is None:
            return []
        if properties.get("colorNodeID"):
            node.GetDisplayNode().SetAndObserveColorNodeID(properties["colorNodeID"])
        if properties.get("show", True):
            self._show(node)
        return [node]

    def _show(self, volumeNode: Any) -> None:
        application = self._host.applicationLogic
        selection = application.GetSelectionNode()
        if volumeNode.IsA("vtkMRMLLabelMapVolumeNode"):
            selection.SetActiveLabelVolumeID(volumeNode.GetID())
        else:
            selection.SetActiveVolumeID(volumeNode.GetID())
        application.PropagateVolumeSelection()

    def _readSegmentation(self, fileName: str, properties: Properties, messages: Any) -> list[Any]:
        name = properties.get("name") or _baseName(fileName)
        if fileName.lower().endswith(_SURFACE_ENDINGS):
            return self._segmentationOfSurface(fileName, name, messages)
        colors = properties.get("colorNodeID")
        table = self._host.scene.GetNodeByID(colors) if colors else None
        opacities = bool(properties.get("autoOpacities", True))
        logic = self._host.logic("Segmentations")
        return [logic.LoadSegmentationFromFile(fileName, opacities, name, table, messages)]

    def _segmentationOfSurface(self, fileName: str, name: str, messages: Any) -> list[Any]:
        model = self._host.logic("Models").AddModel(fileName, _LPS, messages)
        if model is None:
            return []
        segmentation = self._host.scene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        segmentation.CreateDefaultDisplayNodes()
        segmentation.SetSourceRepresentationToClosedSurface()
        self._host.logic("Segmentations").ImportModelToSegmentationNode(model, segmentation)
        self._host.scene.RemoveNode(model)
        return [segmentation]

    def _readModel(self, fileName: str, properties: Properties, messages: Any) -> list[Any]:
        frame = properties.get("coordinateSystem", _LPS)
        model = self._host.logic("Models").AddModel(fileName, frame, messages)
        if model is not None and properties.get("name"):
            model.SetName(properties["name"])
        return [model]

    def _readMarkups(self, fileName: str, properties: Properties, messages: Any) -> list[Any]:
        name = properties.get("name") or _baseName(fileName)
        identifiers = self._host.logic("Markups").LoadMarkups(fileName, name, messages)
        return [self._host.scene.GetNodeByID(identifier) for identifier in (identifiers or "").split(",") if identifier]

    def _byStorage(self, className: str) -> Callable[[str, Properties, Any], list[Any]]:
        """A reader that lets the default storage node of a class do the work."""

        def read(fileName: str, properties: Properties, messages: Any) -> list[Any]:
            scene = self._host.scene
            node = scene.AddNewNodeByClass(className, properties.get("name") or _baseName(fileName))
            node.AddDefaultStorageNode()
            storage = node.GetStorageNode()
            storage.SetFileName(fileName)
            if storage.ReadData(node):
                return [node]
            _copyMessages(storage, messages)
            scene.RemoveNode(storage)
            scene.RemoveNode(node)
            return []

        return read

    def _readScene(self, fileName: str, properties: Properties, messages: Any) -> list[Any]:
        scene, clear = self._host.scene, bool(properties.get("clear", False))
        before = set() if clear else {node.GetID() for node in slicer.util.getNodesByClass("vtkMRMLNode", scene)}
        if fileName.lower().endswith(".mrb"):
            with chdir(os.getcwd()):  # after a broken bundle the reader stays in a folder that it removes
                succeeded = scene.ReadFromMRB(fileName, clear, messages)
        else:
            scene.SetURL(fileName)
            succeeded = scene.Connect(messages) if clear else scene.Import(messages)
        if not succeeded:
            _complain(messages, f"The scene {fileName} could not be read.")
            return []
        return [
            node for node in slicer.util.getNodesByClass("vtkMRMLStorableNode", scene) if node.GetID() not in before
        ]

    # -- writing ---------------------------------------------------------------------------------------------------

    def fileWriterFileType(self, node: Any, fileFormat: str = "") -> str:
        return next((kind for name, kind in _WRITER_TYPES.items() if node.IsA(name)), "NoFile")

    def fileWriterExtensions(self, node: Any) -> tuple[str, ...]:
        """Formats such as "Segmentation (.seg.nrrd)"."""
        with self._ownStorage(node) as storage:
            formats = storage.GetSupportedWriteFileTypes() if storage is not None else vtk.vtkStringArray()
        return tuple(formats.GetValue(index) for index in range(formats.GetNumberOfValues()))

    def extractKnownExtension(self, fileName: str | Path, node: Any) -> str:
        """The longest ending of `fileName` that can be written for `node`; "" if there is none."""
        toExtension = slicer.vtkDataFileFormatHelper.GetFileExtensionFromFormatString
        known = sorted((toExtension(text) for text in self.fileWriterExtensions(node)), key=len, reverse=True)
        return next((ending for ending in known if str(fileName).lower().endswith(ending)), "")

    def saveNodes(self, fileType: str, properties: Properties, userMessages: Any = None) -> bool:
        messages = userMessages if userMessages is not None else slicer.vtkMRMLMessageCollection()
        fileName = str(properties["fileName"])
        if fileType == "SceneFile":
            return self._saveScene(fileName, messages)
        node = self._host.scene.GetNodeByID(properties["nodeID"])
        if not node.GetStorageNode() and not node.AddDefaultStorageNode():
            _complain(messages, f"{node.GetName()} cannot be saved.")
            return False
        storage = node.GetStorageNode()
        _setTransfer(storage, fileName, properties)
        if self._write(storage, node, messages):
            storage.SetWriteFileFormat(properties.get("fileFormat") or storage.GetWriteFileFormat())
            return True
        return False

    def saveScene(self, fileName: str, screenShot: Any = None) -> bool:
        return self.saveNodes("SceneFile", {"fileName": fileName})

    def exportNodes(
        self,
        nodeIDs: list[str],
        fileNames: list[str],
        properties: Properties,
        hardenTransform: bool,
        userMessages: Any = None,
    ) -> bool:
        """Write nodes without touching their own storage nodes."""
        messages = userMessages if userMessages is not None else slicer.vtkMRMLMessageCollection()
        written = []
        for nodeID, fileName in zip(nodeIDs, fileNames, strict=True):
            node = self._host.scene.GetNodeByID(nodeID)
            with _hardened(node) if hardenTransform else nullcontext(node) as source:
                written.append(self._exportNode(source, str(fileName), properties, messages))
        return all(written)

    def _exportNode(self, node: Any, fileName: str, properties: Properties, messages: Any) -> bool:
        with self._ownStorage(node) as storage:
            if storage is None:
                _complain(messages, f"{node.GetName()} cannot be exported.")
                return False
            _setTransfer(storage, fileName, properties)
            return self._write(storage, node, messages)

    def _write(self, storage: Any, node: Any, messages: Any) -> bool:
        Path(storage.GetFileName()).parent.mkdir(parents=True, exist_ok=True)
        succeeded = bool(storage.WriteData(node))
        _copyMessages(storage, messages)
        return succeeded

    @contextmanager
    def _ownStorage(self, node: Any) -> Iterator[Any]:
        """A storage node apart from the node's own; None where the node needs no file.

        It is in the scene as long as it is used: without an ID it crashes while it looks for its owner.
        """
        storage = node.CreateDefaultStorageNode() if node.IsA("vtkMRMLStorableNode") else None
        if storage is None:
            yield None
            return
        storage.UnRegister(None)
        self._host.scene.AddNode(storage)
        try:
            yield storage
        finally:
            self._host.scene.RemoveNode(storage)

    def _saveScene(self, fileName: str, messages: Any) -> bool:
        scene, path = self._host.scene, Path(fileName)
        if path.suffix.lower() == ".mrb":
            return bool(scene.WriteToMRB(fileName, None, messages))
        if path.suffix.lower() == ".mrml":
            path.parent.mkdir(parents=True, exist_ok=True)
            scene.SetURL(fileName)
            scene.SetRootDirectory(str(path.parent))
            return bool(scene.Commit(fileName, messages))
        path.mkdir(parents=True, exist_ok=True)
        return bool(self._host.applicationLogic.SaveSceneToSlicerDataBundleDirectory(fileName, None, messages))


_LPS = slicer.vtkMRMLStorageNode.CoordinateSystemLPS
_ERROR = vtk.vtkCommand.ErrorEvent


def _complain(messages: Any, sentence: str) -> None:
    messages.AddMessage(_ERROR, sentence)


def _copyMessages(storage: Any, messages: Any) -> None:
    own = storage.GetUserMessages()
    if own.GetNumberOfMessages():
        messages.AddMessages(own)


def _setTransfer(storage: Any, fileName: str, properties: Properties) -> None:
    storage.SetFileName(fileName)
    if "useCompression" in properties:
        storage.SetUseCompression(int(properties["useCompression"]))
    if properties.get("compressionParameter"):
        storage.SetCompressionParameter(properties["compressionParameter"])


@contextmanager
def _hardened(node: Any) -> Iterator[Any]:
    """The node in world coordinates: a copy that lives as long as it is written, where a transform moves the node."""
    if not node.IsA("vtkMRMLTransformableNode") or node.GetParentTransformNode() is None:
        yield node
        return
    scene = node.GetScene()
    copy = scene.AddNewNodeByClass(node.GetClassName(), node.GetName())
    try:
        copy.CopyContent(node)
        copy.SetAndObserveTransformNodeID(node.GetTransformNodeID())
        copy.HardenTransform()
        yield copy
    finally:
        scene.RemoveNode(copy)


def _stringArray(texts: list[str]) -> Any:
    array = vtk.vtkStringArray()
    for text in texts:
        array.InsertNextValue(str(text))
    return array


def _baseName(fileName: str) -> str:
    """The file's name without its ending, be it double."""
    name = Path(fileName).name
    for ending in (".seg.nrrd", ".seg.nhdr", ".nii.gz", ".mrk.json", ".labels.csv"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return Path(name).stem
