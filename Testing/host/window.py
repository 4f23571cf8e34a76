"""The main window of the host: module selector and panel at the left, views at the right."""

from __future__ import annotations

from typing import Any

import qt

TITLE = "LCTfound test host (not 3D Slicer)"
_PANEL_WIDTH = 480


class ModuleSelector(qt.QComboBox):
    """qSlicerModuleSelectorToolBar, as far as `slicer.util.selectModule` needs it."""

    moduleSelected = qt.Signal(str)

    def __init__(self, manager: Any) -> None:
        super().__init__()
        self._manager, self._selected = manager, ""
        self.connect("activated(int)", lambda index: self.selectModule(self.itemData(index)))
        manager.connect("moduleLoaded(QString)", self.refresh)
        manager.connect("moduleUnloaded(QString)", self.refresh)
        self.refresh()

    @property
    def selectedModule(self) -> str:
        return self._selected

    def refresh(self, name: str = "") -> None:
        self.clear()
        for module in self._manager.scriptedModules():
            self.addItem(module.icon, module.title, module.name)
        self.setCurrentIndex(self.findData(self._selected))

    def release(self) -> None:
        self._manager.disconnect("moduleLoaded(QString)", self.refresh)
        self._manager.disconnect("moduleUnloaded(QString)", self.refresh)

    def selectModule(self, name: str) -> None:
        if name != self._selected and self._manager.module(name) is not None:
            self._selected = name
            self.setCurrentIndex(self.findData(name))
            self.moduleSelected.emit(name)


class MainWindow(qt.QMainWindow):
    def __init__(self, owner: Any) -> None:
        super().__init__()
        self._host, self._panel = owner, None
        self.objectName = "qSlicerMainWindow"
        self.setWindowTitle(TITLE)
        self._selector = ModuleSelector(owner.moduleManager)
        self._selector.connect("moduleSelected(QString)", self._showModule)
        owner.moduleManager.connect("moduleAboutToBeUnloaded(QString)", self._moduleGone)
        self._scroll = qt.QScrollArea()
        self._scroll.setWidgetResizable(True)
        self._scroll.setHorizontalScrollBarPolicy(qt.Qt.ScrollBarAlwaysOff)
        self._scroll.setFrameShape(qt.QFrame.NoFrame)
        self.setCentralWidget(self._body())
        self.statusBar().showMessage(TITLE)

    def _body(self) -> Any:
        left = qt.QWidget()
        left.objectName = "PanelDockWidget"
        column = qt.QVBoxLayout(left)
        column.setContentsMargins(4, 4, 4, 4)
        title = qt.QLabel(TITLE)
        title.setAlignment(qt.Qt.AlignCenter)
        for widget in (title, self._selector, self._scroll):
            column.addWidget(widget)
        column.setStretchFactor(self._scroll, 1)
        splitter = qt.QSplitter(qt.Qt.Horizontal)
        splitter.addWidget(left)
        splitter.addWidget(self._host.layoutManager.viewport())
        splitter.setStretchFactor(1, 1)
        splitter.setSizes([_PANEL_WIDTH, 10 * _PANEL_WIDTH])
        left.setMinimumWidth(_PANEL_WIDTH)
        return splitter

    def moduleSelector(self) -> ModuleSelector:
        return self._selector

    def _showModule(self, name: str) -> None:
        """Leave the module that is shown and enter another one."""
        self._putAway()
        self._panel = self._host.moduleManager.module(name).widgetRepresentation()
        self._scroll.setWidget(self._panel)
        self._panel.show()
        self._panel.enter()

    def _moduleGone(self, name: str) -> None:
        if self._panel is not None and self._panel.moduleName == name:
            self._putAway()
            self._selector.clear()

    def _putAway(self) -> None:
        if self._panel is not None:
            self._panel.exit()
            self._scroll.takeWidget()
            self._panel.hide()
            self._panel = None

    def release(self) -> None:
        """Give the panels back before the window is deleted."""
        self._putAway()
        self._host.moduleManager.disconnect("moduleAboutToBeUnloaded(QString)", self._moduleGone)
        self._selector.release()
