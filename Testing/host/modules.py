"""`slicer.modules`: core modules by their logics, scripted modules by their files, as Slicer loads them."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import qt
import slicer


class Modules:
    """The namespace `slicer.modules`: one attribute for each module, by its name in lower case."""

    def __repr__(self) -> str:
        return f"<slicer.modules of the test host: {', '.join(sorted(vars(self)))}>"


class CoreModule:
    """Stand-in for a module written in C++: its real logic, but no panel."""

    def __init__(self, name: str, logic: Any) -> None:
        self.name, self._logic = name, logic
        self.title, self.path, self.hidden = name, "", True

    def logic(self) -> Any:
        return self._logic

    def widgetRepresentation(self) -> None:
        """The host has no panel of this module."""


class ScriptedModule:
    """qSlicerScriptedLoadableModule: made from a file; `parent` of the module class in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = str(path), path.stem
        self.title, self.helpText, self.acknowledgementText = self.name, "", ""
        self.categories: list[str] = []
        self.dependencies: list[str] = []
        self.contributors: list[str] = []
        self.associatedNodeTypes: list[str] = []
        self.hidden, self.widgetRepresentationCreationEnabled, self.index = False, True, -1
        self.icon = qt.QIcon()
        self._logic = slicer.vtkSlicerScriptedLoadableModuleLogic()
        self._logic.SetMRMLScene(slicer.mrmlScene)
        self._widget: ScriptedModuleWidget | None = None
        self._self: Any = None

    def load(self) -> None:
        """Import the file and tell its module class of this module."""
        folder = str(Path(self.path).parent)
        if folder not in sys.path:
            sys.path.append(folder)
        source = _import(self.name, self.path)
        self._self = getattr(source, self.name)(self)
        if hasattr(self._self, "setup"):
            self._self.setup()

    def self(self) -> Any:
        return self._self

    def logic(self) -> Any:
        return self._logic

    def resourcePath(self, fileName: str) -> str:
        return str(Path(self.path).parent / "Resources" / fileName)

    def widgetRepresentation(self) -> ScriptedModuleWidget:
        """The module's panel; set up when it is first asked for."""
        if self._widget is None:
            self._widget = self.createNewWidgetRepresentation()
            setattr(slicer.modules, f"{self.name}Widget", self._widget.self())
        return self._widget

    def createNewWidgetRepresentation(self) -> ScriptedModuleWidget:
        widget = ScriptedModuleWidget(self)
        widget.setup()
        return widget

    @property
    def hasWidget(self) -> bool:
        return self._widget is not None

    def unload(self) -> None:
        """End the panel: it is left, cleaned up by `moduleAboutToBeUnloaded`, and deleted."""
        if self._widget is not None:
            self._widget.exit()
            slicer.app.moduleManager().moduleAboutToBeUnloaded.emit(self.name)
            self._widget.deleteLater()
            self._widget = None


class ScriptedModuleWidget(slicer.qMRMLWidget):
    """qSlicerScriptedLoadableModuleWidget: `parent` of the panel class of a module file."""

    def __init__(self, module: ScriptedModule) -> None:
        super().__init__()
        self._module, self._panel, self._entered = module, None, False
        self.setLayout(qt.QVBoxLayout())
        self.setMRMLScene(slicer.mrmlScene)
        self.setWindowTitle(module.title)

    @property
    def moduleName(self) -> str:
        return self._module.name

    @property
    def isEntered(self) -> bool:
        return self._entered

    def module(self) -> ScriptedModule:
        return self._module

    def self(self) -> Any:
        return self._panel

    def setup(self) -> None:
        panelClass = getattr(sys.modules[self._module.name], f"{self._module.name}Widget")
        self._panel = panelClass(self)
        self._panel.setup()

    def enter(self) -> None:
        if not self._entered:
            self._entered = True
            self._panel.enter()

    def exit(self) -> None:
        if self._entered:
            self._entered = False
            self._panel.exit()

    def reload(self) -> None:
        """Make the panel anew from the module file that was imported again."""
        wasEntered, self._entered = self._entered, False
        self.setup()
        setattr(slicer.modules, f"{self._module.name}Widget", self._panel)
        if wasEntered:
            self.enter()


class ModuleManager(qt.QObject):
    """`slicer.app.moduleManager()`, and its factory manager."""

    moduleLoaded = qt.Signal(str)
    moduleAboutToBeUnloaded = qt.Signal(str)
    moduleUnloaded = qt.Signal(str)

    def __init__(self) -> None:
        super().__init__()
        self._modules: dict[str, Any] = {}

    def factoryManager(self) -> ModuleManager:
        return self

    def module(self, name: str) -> Any:
        return self._modules.get(name)

    def modulesNames(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def loadedModuleNames(self) -> tuple[str, ...]:
        return tuple(self._modules)

    def isLoaded(self, name: str) -> bool:
        return name in self._modules

    def scriptedModules(self) -> list[ScriptedModule]:
        """Those with a place in the module selector."""
        return [item for item in self._modules.values() if isinstance(item, ScriptedModule) and not item.hidden]

    def add(self, module: Any) -> None:
        self._modules[module.name] = module
        setattr(slicer.modules, module.name.lower(), module)

    def load(self, path: str | Path) -> ScriptedModule:
        """Load a module file; one that is loaded already is returned as it is."""
        path = Path(path).resolve()
        known = self._modules.get(path.stem)
        if known is not None and known.path == str(path):
            return known
        if known is not None:
            self.unload(path.stem)
        module = ScriptedModule(path)
        self.add(module)
        try:
            module.load()
        except BaseException:
            self._remove(path.stem)
            raise
        missing = [name for name in module.dependencies if name not in self._modules]
        if missing:
            logging.warning("%s asks for modules that the host does not have: %s", module.name, ", ".join(missing))
        self.moduleLoaded.emit(module.name)
        return module

    def unload(self, name: str) -> None:
        self._modules[name].unload()
        self._remove(name)
        self.moduleUnloaded.emit(name)

    def _remove(self, name: str) -> None:
        del self._modules[name]
        sys.modules.pop(name, None)
        for attribute in (name.lower(), f"{name}Widget"):
            if hasattr(slicer.modules, attribute):
                delattr(slicer.modules, attribute)


def _import(name: str, path: str) -> Any:
    """The module file under its own name, so that its classes can be pickled and its tests be found."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if not inspect.isclass(getattr(module, name, None)):
        raise ImportError(f"{path} has no class {name}; Slicer wants one of the file's name.")
    return module
