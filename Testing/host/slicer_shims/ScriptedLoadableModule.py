"""`slicer.ScriptedLoadableModule`: the four base classes of a scripted module."""

from __future__ import annotations

import importlib
import logging
import unittest
from pathlib import Path
from typing import Any

import qt
import slicer

__all__ = [
    "ScriptedLoadableModule",
    "ScriptedLoadableModuleLogic",
    "ScriptedLoadableModuleTest",
    "ScriptedLoadableModuleWidget",
]


def _resource(moduleName: str, fileName: str) -> str:
    return str(Path(slicer.util.modulePath(moduleName)).parent / "Resources" / fileName)


class ScriptedLoadableModule:
    """What a module tells of itself. `parent` is the module object that Slicer made for the file."""

    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.moduleName = type(self).__name__
        parent.title, parent.helpText, parent.acknowledgementText = "", "", ""
        parent.categories, parent.dependencies, parent.contributors = [], [], []
        parent.hidden = False
        self._setIcon(Path(parent.path).parent / "Resources" / "Icons")
        if not hasattr(slicer, "selfTests"):
            slicer.selfTests = {}
        slicer.selfTests[self.moduleName] = self.runTest

    def _setIcon(self, folder: Path) -> None:
        for ending in (".svg", ".png"):
            if (folder / f"{self.moduleName}{ending}").is_file():
                self.parent.icon = qt.QIcon(str(folder / f"{self.moduleName}{ending}"))
                return

    def resourcePath(self, filename: str) -> str:
        return _resource(self.moduleName, filename)

    def getDefaultModuleDocumentationLink(self, docPage: str | None = None) -> str:
        page = docPage or f"https://slicer.readthedocs.io/en/latest/user_guide/modules/{self.moduleName.lower()}.html"
        return f'<p>For more information see the <a href="{page}">online documentation</a>.</p>'

    def runTest(self, msec: int = 100, **kwargs: Any) -> None:
        """Run the module's test class once; `msec`: how long its messages stay."""
        testClass = getattr(importlib.import_module(self.moduleName), f"{self.moduleName}Test")
        case = testClass()
        case.messageDelay = msec
        case.runTest(**kwargs)


class ScriptedLoadableModuleWidget:
    """The panel. Without `parent` it makes a window of its own, sets itself up and shows it."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__()  # of VTKObservationMixin, where a panel has it as second base
        self.moduleName = type(self).__name__.removesuffix("Widget")
        self.developerMode = slicer.util.settingsValue("Developer/DeveloperMode", False, converter=slicer.util.toBool)
        self.parent = parent or self._ownWindow()
        self.layout = self.parent.layout()
        slicer.app.moduleManager().connect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)
        if not parent:
            self.setup()
            self.parent.show()

    def _ownWindow(self) -> Any:
        window = slicer.qMRMLWidget()
        window.setLayout(qt.QVBoxLayout())
        window.setMRMLScene(slicer.mrmlScene)
        return window

    def resourcePath(self, filename: str) -> str:
        return _resource(self.moduleName, filename)

    def setup(self) -> None:
        if self.developerMode:
            self.setupDeveloperSection()

    def setupDeveloperSection(self) -> None:
        """Reload and test buttons, as in Slicer's developer mode."""
        import ctk

        self.reloadCollapsibleButton = ctk.ctkCollapsibleButton()
        self.reloadCollapsibleButton.text = "Reload && Test"
        row = qt.QHBoxLayout(self.reloadCollapsibleButton)
        self.reloadButton, self.reloadAndTestButton = qt.QPushButton("Reload"), qt.QPushButton("Reload and Test")
        for button, slot in ((self.reloadButton, self.onReload), (self.reloadAndTestButton, self.onReloadAndTest)):
            row.addWidget(button)
            button.connect("clicked()", slot)
        self.layout.addWidget(self.reloadCollapsibleButton)

    def enter(self) -> None:
        pass

    def exit(self) -> None:
        pass

    def cleanup(self) -> None:
        pass

    def onReload(self) -> None:
        slicer.util.reloadScriptedModule(self.moduleName)

    def onReloadAndTest(self, **kwargs: Any) -> None:
        self.onReload()
        slicer.selfTests[self.moduleName](**kwargs)

    def _onModuleAboutToBeUnloaded(self, moduleName: str) -> None:
        if moduleName == self.moduleName:
            self.cleanup()
            slicer.app.moduleManager().disconnect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)


class ScriptedLoadableModuleLogic:
    """Computation of a module; its parameters live in a vtkMRMLScriptedModuleNode of the scene."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__()
        self.parent = parent
        self.moduleName = type(self).__name__.removesuffix("Logic")
        #: False: each call of createParameterNode() adds one more set of parameters to the scene.
        self.isSingletonParameterNode = True

    def getParameterNode(self) -> Any:
        """The parameter node of this module; made on the first call."""
        if self.isSingletonParameterNode:
            found = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
        else:
            found = next(iter(self.getAllParameterNodes()), None)
        return found or self._added(self.createParameterNode())

    def getAllParameterNodes(self) -> list[Any]:
        nodes = slicer.util.getNodesByClass("vtkMRMLScriptedModuleNode")
        return [node for node in nodes if node.GetAttribute("ModuleName") == self.moduleName]

    def createParameterNode(self) -> Any:
        """A parameter node that is not yet in the scene."""
        node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
        node.UnRegister(None)
        if self.isSingletonParameterNode:
            node.SetSingletonTag(self.moduleName)
        node.SetModuleName(self.moduleName)
        node.SetAttribute("ModuleName", self.moduleName)
        node.SetName(slicer.mrmlScene.GenerateUniqueName(self.moduleName))
        return node

    def _added(self, node: Any) -> Any:
        added = slicer.mrmlScene.AddNode(node)
        return added or slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")


class ScriptedLoadableModuleTest(unittest.TestCase):
    """Base of a module's own tests. Slicer calls `runTest`; unittest calls the `test_*` methods."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        super(unittest.TestCase, self).__init__()  # unittest does not pass the call on
        self.messageDelay = 1000

    def setUp(self) -> None:
        slicer.mrmlScene.Clear(0)

    def runTest(self, **kwargs: Any) -> None:
        logging.warning("%s has no runTest method.", type(self).__name__)

    def delayDisplay(self, message: str, requestedDelay: int | None = None, msec: int | None = None) -> None:
        slicer.util.delayDisplay(message, self._delay(requestedDelay if requestedDelay is not None else msec))

    def _delay(self, requested: int | None) -> int:
        """Nobody watches under testing: the message is logged, and the window lives on for one turn."""
        if slicer.app.testingEnabled():
            return 0
        return self.messageDelay if requested is None else requested
