"""`slicer.app`, and `Host`: the stand-in application that tests and `./run panel` start."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
from host.none_guard import holdNone

holdNone()
host.install_shims()

import qt  # noqa: E402
import slicer  # noqa: E402

from host import boot, dicom  # noqa: E402
from host.io_manager import CoreIOManager  # noqa: E402
from host.subject_hierarchy import SubjectHierarchyKeeper  # noqa: E402

NAME = "LCTfound test host"
#: `slicer.ScriptedLoadableModule` and the other Python parts of Slicer that the wheel lacks.
_SLICER_SHIMS = Path(__file__).resolve().parent / "slicer_shims"
#: Libraries that modules of Slicer import by their own names; here all their classes are in `slicer`.
_ALIASES = (
    "MRMLCorePython",
    "MRMLLogicPython",
    "vtkSegmentationCorePython",
    "vtkSlicerSegmentationsModuleLogicPython",
    "vtkSlicerSegmentationsModuleMRMLPython",
)


class Application(qt.QObject):
    """`slicer.app`. What it does not have itself is asked of the QApplication."""

    startupCompleted = qt.Signal()
    aboutToQuit = qt.Signal()

    def __init__(self, owner: Host) -> None:
        super().__init__()
        self._host, self._pauses = owner, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(qt.QApplication.instance(), name)

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def applicationName(self) -> str:
        return NAME

    @property
    def mainApplicationName(self) -> str:
        return "Slicer"

    @property
    def applicationVersion(self) -> str:
        return metadata.version("slicer-core")

    @property
    def mainApplicationVersion(self) -> str:
        return self.applicationVersion

    @property
    def majorVersion(self) -> int:
        return int(self.applicationVersion.split(".")[0])

    @property
    def minorVersion(self) -> int:
        return int(self.applicationVersion.split(".")[1])

    @property
    def revision(self) -> str:
        return "0"

    @property
    def repositoryRevision(self) -> str:
        return "test host"

    @property
    def isInstalled(self) -> bool:
        return True

    @property
    def slicerHome(self) -> str:
        return str(self._host.folder)

    @property
    def temporaryPath(self) -> str:
        return str(self._host.temporaryFolder)

    @property
    def extensionsInstallPath(self) -> str:
        return str(self._host.folder / "Extensions")

    @property
    def slicerUserSettingsFilePath(self) -> str:
        return str(self.userSettings().fileName())

    @property
    def slicerRevisionUserSettingsFilePath(self) -> str:
        return str(self.revisionUserSettings().fileName())

    def testingEnabled(self) -> bool:
        return self._host.testing

    def commandOptions(self) -> Any:
        noWindow = self._host.mainWindow is None
        return SimpleNamespace(testingEnabled=self._host.testing, noMainWindow=noWindow, runPythonAndExit=False)

    # -- its parts -------------------------------------------------------------------------------------------------

    def mrmlScene(self) -> Any:
        return self._host.scene

    def applicationLogic(self) -> Any:
        return self._host.applicationLogic

    def coreIOManager(self) -> CoreIOManager:
        return self._host.ioManager

    def ioManager(self) -> CoreIOManager:
        return self._host.ioManager

    def moduleManager(self) -> Any:
        return self._host.moduleManager

    def moduleLogic(self, name: str) -> Any:
        module = self._host.moduleManager.module(name)
        return None if module is None else module.logic()

    def layoutManager(self) -> Any:
        """None without a main window, as in Slicer."""
        return self._host.layoutManager

    def extensionsManagerModel(self) -> Any:
        """No extension is installed by the host."""
        return SimpleNamespace(isExtensionInstalled=lambda name: False, installedExtensions=())

    def userSettings(self) -> Any:
        return qt.QSettings()

    def settings(self) -> Any:
        return qt.QSettings()

    def revisionUserSettings(self) -> Any:
        return qt.QSettings(str(self._host.folder / "revision.ini"), qt.QSettings.IniFormat)

    def startupEnvironment(self) -> Any:
        return SimpleNamespace(keys=lambda: list(os.environ), value=lambda name: os.environ.get(name, ""))

    def pythonConsole(self) -> None:
        return None

    # -- what it does ----------------------------------------------------------------------------------------------

    def processEvents(self, flags: Any = None) -> None:
        if flags is None:
            qt.QApplication.processEvents()
        else:
            qt.QApplication.processEvents(flags)

    def pauseRender(self) -> None:
        self._pauses += 1
        self._host.applicationLogic.PauseRender()

    def resumeRender(self) -> None:
        self._pauses -= 1
        self._host.applicationLogic.ResumeRender()
        if self._pauses == 0 and self._host.layoutManager is not None:
            self._host.layoutManager.scheduleRender()

    @property
    def renderPaused(self) -> bool:
        return self._pauses > 0

    def quit(self) -> None:
        self.exit(0)

    def exit(self, code: int = 0) -> None:
        qt.QApplication.exit(code)


class Host:
    """Slicer's libraries with a Qt application around them. One per process.

    Args:
        testing: as `Slicer --testing`: no message box waits for an answer.
        settings: folder for settings and temporary files; None: a temporary one, removed at the end.
    """

    _running: Host | None = None

    def __init__(self, testing: bool = True, settings: Path | None = None) -> None:
        if Host._running is not None:
            raise RuntimeError("A host runs already in this process; use Host.instance().")
        self.testing = testing
        self._isTemporary = settings is None
        self.folder = Path(tempfile.mkdtemp(prefix="lctfound-host-")) if settings is None else settings
        self.temporaryFolder = self.folder / "temporary"
        self.temporaryFolder.mkdir(parents=True, exist_ok=True)
        self._startQt()
        self._mrml = boot.boot(self.temporaryFolder)
        self.scene, self.applicationLogic = self._mrml.scene, self._mrml.applicationLogic
        self.ioManager, self.database = CoreIOManager(self), dicom.DicomDatabase()
        self.layoutManager: Any = None
        self.mainWindow: Any = None
        self._fillSlicer()
        self.app = slicer.app
        self._hierarchy = SubjectHierarchyKeeper(self.scene)
        Host._running = self
        atexit.register(self.close)

    @classmethod
    def instance(cls) -> Host | None:
        return cls._running

    def _startQt(self) -> None:
        qt.qInstallMessageHandler(_log)
        self._qt = qt.QApplication.instance() or qt.QApplication([NAME])
        qt.QCoreApplication.setOrganizationName("LCTfound")
        qt.QCoreApplication.setApplicationName("TestHost")
        qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
        qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, str(self.folder))

    def _fillSlicer(self) -> None:
        """Give the package `slicer` what the application adds to it."""
        if str(_SLICER_SHIMS) not in slicer.__path__:
            slicer.__path__.append(str(_SLICER_SHIMS))
        for alias in _ALIASES:
            sys.modules.setdefault(alias, slicer)
        slicer.mrmlScene, slicer.dicomDatabase = self.scene, self.database
        slicer.app = Application(self)
        _addWidgets()
        from host import modules

        slicer.modules = modules.Modules()
        slicer.qSlicerScriptedLoadableModule = modules.ScriptedModule
        slicer.qSlicerScriptedLoadableModuleWidget = modules.ScriptedModuleWidget
        self.moduleManager = modules.ModuleManager()
        for name, logic in self._mrml.logics.items():
            self.moduleManager.add(modules.CoreModule(name, logic))

    def logic(self, name: str) -> Any:
        """Logic of a core module: "Volumes", "Segmentations" ..."""
        return self._mrml.logics[name]

    # -- modules ---------------------------------------------------------------------------------------------------

    def load_module(self, path: str | Path) -> Any:
        """Load a scripted module file; `.widgetRepresentation().self()` of what returns is its panel.

        What the module connected to `startupCompleted()` is called once, afterwards.
        """
        module = self.moduleManager.load(path)
        self.app.startupCompleted.emit()
        self.app.disconnect("startupCompleted()")
        return module

    def select_module(self, name: str) -> Any:
        """Enter a module, leaving the one before; its panel is shown where there is a window. The panel object."""
        module = self.moduleManager.module(name)
        if module is None:
            known = ", ".join(item.name for item in self.moduleManager.scriptedModules())
            raise ValueError(f"No module {name!r} is loaded; there are: {known}")
        if self.mainWindow is not None:
            self.mainWindow.moduleSelector().selectModule(name)
        else:
            for other in self.moduleManager.scriptedModules():
                if other is not module and other.hasWidget:
                    other.widgetRepresentation().exit()
            module.widgetRepresentation().enter()
        return module.widgetRepresentation().self()

    # -- data ------------------------------------------------------------------------------------------------------

    def load_dicom_folder(self, folder: str | Path) -> list[Any]:
        """The image series of a folder as volume nodes, filed under patient and study."""
        return dicom.loadFolder(folder, self.logic("Volumes"), self.database)

    # -- window ----------------------------------------------------------------------------------------------------

    def open_window(self, width: int = 1400, height: int = 900) -> Any:
        """The main window with module panel and views; made on the first call."""
        if self.mainWindow is None:
            from host.views import LayoutManager
            from host.window import MainWindow

            self.layoutManager = LayoutManager(self)
            self.mainWindow = MainWindow(self)
            self.mainWindow.resize(width, height)
            self.mainWindow.show()
        return self.mainWindow

    def close_window(self) -> None:
        """Back to an application without main window and views."""
        if self.mainWindow is not None:
            self.mainWindow.release()
            self.layoutManager.release()
            self.mainWindow.deleteLater()
            self.mainWindow = self.layoutManager = None
            self.settle()

    def settle(self, seconds: float = 0.0) -> None:
        """Handle what waits in the event loop, and draw the views; then go on for some seconds."""
        end = time.monotonic() + seconds
        while True:
            self.app.processEvents()
            qt.QApplication.sendPostedEvents(None, qt.QEvent.DeferredDelete)
            if self.layoutManager is not None:
                self.layoutManager.renderNow()
            if time.monotonic() >= end:
                return
            time.sleep(0.002)

    def wait_for(self, condition: Callable[[], Any], seconds: float = 30.0) -> float:
        """Let the application live until `condition()` is true; the seconds it took.

        Raises:
            TimeoutError: it never was.
        """
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > seconds:
                raise TimeoutError(f"What was waited for did not happen within {seconds:g} s.")
            self.app.processEvents()
            time.sleep(0.002)
        return time.monotonic() - start

    def run(self) -> int:
        """Hand control to the user until the window is closed."""
        return int(qt.QApplication.exec())

    def grab(self, path: str | Path) -> Path:
        """Picture of the whole window as PNG; opens the window if there is none."""
        window = self.open_window()
        self.settle(0.2)
        return _save(window.grab(), path)

    def grab_panel(self, path: str | Path, module: str | None = None, width: int = 480) -> Path:
        """Picture of a panel alone, in its full height, as PNG. Default: the module that is entered."""
        names = [item.name for item in self.moduleManager.scriptedModules() if item.hasWidget]
        entered = [name for name in names if self.moduleManager.module(name).widgetRepresentation().isEntered]
        panel = self.moduleManager.module(module or (entered or names)[0]).widgetRepresentation()
        if self.mainWindow is None:
            panel.resize(width, max(panel.sizeHint.height(), 200))
            panel.show()
        self.settle()
        return _save(panel.grab(), path)

    def close(self) -> None:
        """End the application: panels are cleaned up, `aboutToQuit` is sent."""
        if Host._running is not self:
            return
        atexit.unregister(self.close)
        self.app.aboutToQuit.emit()
        for module in self.moduleManager.scriptedModules():
            self.moduleManager.unload(module.name)
        self.close_window()
        self.scene.Clear(1)
        self._hierarchy.release()
        Host._running = None
        if self._isTemporary:
            shutil.rmtree(self.folder, ignore_errors=True)


def _addWidgets() -> None:
    """The stand-ins of Slicer's MRML widgets, under `slicer` as in Slicer; and their loader of .ui files."""
    from host import mrml_widgets, ui_loader

    for name in mrml_widgets.__all__:
        setattr(slicer, name, getattr(mrml_widgets, name))
    slicer.util.loadUI = ui_loader.load_ui


def _log(kind: Any, context: Any, text: str) -> None:
    """Qt's messages as warnings of Python; the platform `offscreen` tells of every window that it ignores hints."""
    if "propagateSizeHints" not in text:
        logging.getLogger("Qt").warning(text)


def _save(picture: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not picture.save(str(path)):
        raise OSError(f"The picture {path} could not be written.")
    return path
