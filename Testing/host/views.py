"""Slice, 3D and table views: Slicer's displayable managers and interactor styles draw off screen, Qt shows the picture.

Nothing is drawn until the event loop is idle; many changes of the scene make one picture.
"""

from __future__ import annotations

import time
from typing import Any
from xml.etree import ElementTree

import numpy as np
import qt
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

#: Milliseconds between a change and its picture; changes in between are drawn together.
_PATIENCE = 20

_SLICE_MANAGERS = (
    "vtkMRMLVolumeGlyphSliceDisplayableManager",
    "vtkMRMLModelSliceDisplayableManager",
    "vtkMRMLCrosshairDisplayableManager",
    "vtkMRMLOrientationMarkerDisplayableManager",
    "vtkMRMLRulerDisplayableManager",
    "vtkMRMLScalarBarDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLMarkupsDisplayableManager",
    "vtkMRMLTransformsDisplayableManager2D",
    "vtkMRMLColorLegendDisplayableManager",
)
_THREE_D_MANAGERS = (
    "vtkMRMLCameraDisplayableManager",
    "vtkMRMLViewDisplayableManager",
    "vtkMRMLModelDisplayableManager",
    "vtkMRMLThreeDReformatDisplayableManager",
    "vtkMRMLCrosshairDisplayableManager3D",
    "vtkMRMLOrientationMarkerDisplayableManager",
    "vtkMRMLRulerDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager3D",
    "vtkMRMLVolumeRenderingDisplayableManager",
    "vtkMRMLMarkupsDisplayableManager",
    "vtkMRMLLinearTransformsDisplayableManager",
    "vtkMRMLTransformsDisplayableManager3D",
    "vtkMRMLColorLegendDisplayableManager",
)


def _registered(factory: Any, names: tuple[str, ...], applicationLogic: Any) -> Any:
    factory.SetMRMLApplicationLogic(applicationLogic)
    for name in names:
        if hasattr(slicer, name) and not factory.IsDisplayableManagerRegistered(name):
            factory.RegisterDisplayableManager(name)
    return factory


class RenderView(qt.QWidget):
    """A widget that shows what an off-screen render window draws, and passes the mouse on to its interactor."""

    def __init__(self, manager: LayoutManager, style: Any) -> None:
        super().__init__()
        self._manager, self._style, self._picture, self._isStale = manager, style, None, True
        self._group: Any = None
        self._tags: list[tuple[Any, int]] = []
        self._renderer = vtk.vtkRenderer()
        self._renderer.UseFXAAOn()
        self._window = vtk.vtkRenderWindow()
        self._window.SetOffScreenRendering(1)
        # With multisampling translucent surfaces vanish under depth peeling.
        self._window.SetMultiSamples(0)
        self._window.SetAlphaBitPlanes(1)
        self._window.AddRenderer(self._renderer)
        self._interactor = vtk.vtkGenericRenderWindowInteractor()
        self._interactor.SetRenderWindow(self._window)
        self._interactor.EnableRenderOff()
        self._interactor.SetInteractorStyle(vtk.vtkInteractorStyleUser())  # does nothing itself
        style.SetInteractor(self._interactor)
        self._interactor.Initialize()
        self._observe(self._interactor, vtk.vtkCommand.RenderEvent)
        self._interactor.AddObserver("CreateTimerEvent", lambda *_: None)
        self.setMouseTracking(True)
        self.setFocusPolicy(qt.Qt.StrongFocus)
        self.setMinimumSize(80, 60)

    def _observe(self, sender: Any, event: Any) -> None:
        self._tags.append((sender, sender.AddObserver(event, lambda *_: self.scheduleRender())))

    def _initializeGroup(self, factory: Any, node: Any) -> None:
        self._group = slicer.vtkMRMLDisplayableManagerGroup()
        self._group.SetRenderer(self._renderer)
        self._group.Initialize(factory, self._renderer)
        self._group.SetMRMLDisplayableNode(node)
        self._style.SetDisplayableManagers(self._group)
        self._observe(self._group, vtk.vtkCommand.UpdateEvent)

    def release(self) -> None:
        for sender, tag in self._tags:
            sender.RemoveObserver(tag)
        self._tags = []
        if self._group is not None:
            self._group.SetMRMLDisplayableNode(None)
        self._style.SetInteractor(None)
        self._interactor.SetRenderWindow(None)
        self._window.Finalize()

    # -- what Slicer's views offer ---------------------------------------------------------------------------------

    def renderWindow(self) -> Any:
        return self._window

    def renderer(self) -> Any:
        return self._renderer

    def interactor(self) -> Any:
        return self._interactor

    def interactorStyle(self) -> Any:
        return self._style

    def displayableManagerByClassName(self, className: str) -> Any:
        return self._group.GetDisplayableManagerByClassName(className)

    def scheduleRender(self) -> None:
        self._isStale = True
        self._manager.scheduleRender()

    def forceRender(self) -> None:
        """Draw now, whatever is paused or hidden."""
        width, height = self.width, self.height
        self._isStale = False
        self._prepare(width, height)
        self._window.SetSize(width, height)
        self._interactor.UpdateSize(width, height)
        self._window.Render()
        self._picture = _picture(self._window)
        self.update()

    def renderIfStale(self) -> bool:
        """Draw if something changed and the view can be seen; was it drawn?"""
        if not self._isStale or not self.isVisible():
            return False
        self.forceRender()
        return True

    def _prepare(self, width: int, height: int) -> None:
        """Bring into order what depends on the size."""

    def pixels(self) -> np.ndarray:
        """The picture as (height, width, 3) uint8."""
        if self._isStale or self._picture is None:
            self.forceRender()
        return _pixels(self._window)[::-1, :, :3].copy()

    # -- Qt --------------------------------------------------------------------------------------------------------

    def paintEvent(self, event: Any) -> None:
        painter = qt.QPainter(self)
        if self._picture is not None:
            painter.drawImage(0, 0, self._picture)
        else:
            painter.fillRect(self.rect, qt.QColor(0, 0, 0))
        painter.end()

    def resizeEvent(self, event: Any) -> None:
        self.scheduleRender()

    def showEvent(self, event: Any) -> None:
        self.scheduleRender()

    def mousePressEvent(self, event: Any) -> None:
        self._mouse(event, "Press")

    def mouseReleaseEvent(self, event: Any) -> None:
        self._mouse(event, "Release")

    def mouseDoubleClickEvent(self, event: Any) -> None:
        self._mouse(event, "DoubleClick")

    def mouseMoveEvent(self, event: Any) -> None:
        self._tell(event)
        self._interactor.MouseMoveEvent()

    def wheelEvent(self, event: Any) -> None:
        self._tell(event)
        if event.angleDelta().y() > 0:
            self._interactor.MouseWheelForwardEvent()
        else:
            self._interactor.MouseWheelBackwardEvent()

    def enterEvent(self, event: Any) -> None:
        self._interactor.EnterEvent()

    def leaveEvent(self, event: Any) -> None:
        self._interactor.LeaveEvent()

    def _mouse(self, event: Any, action: str) -> None:
        names = {qt.Qt.LeftButton: "Left", qt.Qt.RightButton: "Right", qt.Qt.MiddleButton: "Middle"}
        button = names.get(event.button())
        if button is None:
            return
        self._tell(event)
        getattr(self._interactor, f"{button}Button{action}Event")()

    def _tell(self, event: Any) -> None:
        """Where the mouse is, and which keys are held."""
        place, keys = event.position(), event.modifiers()
        control, shift = bool(keys & qt.Qt.ControlModifier), bool(keys & qt.Qt.ShiftModifier)
        self._interactor.SetEventInformationFlipY(int(place.x()), int(place.y()), control, shift, chr(0), 0, None)
        self._interactor.SetAltKey(bool(keys & qt.Qt.AltModifier))


class SliceView(RenderView):
    """qMRMLSliceView."""

    def __init__(self, manager: LayoutManager, logic: Any) -> None:
        super().__init__(manager, slicer.vtkMRMLSliceViewInteractorStyle())
        self._logic = logic
        self._style.SetSliceLogic(logic)
        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        self._image = vtk.vtkActor2D()
        self._image.SetMapper(self._mapper)
        self._image.GetProperty().SetDisplayLocationToBackground()
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        self._initializeGroup(_registered(factory, _SLICE_MANAGERS, manager.applicationLogic), logic.GetSliceNode())
        logic.SetDisplayableManagerGroup(self._group)
        self._observe(logic, vtk.vtkCommand.ModifiedEvent)
        self._observe(logic.GetSliceNode(), vtk.vtkCommand.ModifiedEvent)

    def mrmlSliceNode(self) -> Any:
        return self._logic.GetSliceNode()

    def sliceViewInteractorStyle(self) -> Any:
        return self._style

    def convertRASToXYZ(self, ras: Any) -> list[float]:
        """RAS, mm -> pixels from the lower left corner."""
        inverse = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(self.mrmlSliceNode().GetXYToRAS(), inverse)
        return list(inverse.MultiplyPoint([*ras, 1.0]))[:3]

    def convertXYZToRAS(self, xyz: Any) -> list[float]:
        return list(self.mrmlSliceNode().GetXYToRAS().MultiplyPoint([*xyz, 1.0]))[:3]

    def convertDeviceToXYZ(self, xy: Any) -> list[float]:
        return [float(xy[0]), float(self.height - 1 - xy[1]), 0.0]

    def _prepare(self, width: int, height: int) -> None:
        if tuple(self.mrmlSliceNode().GetDimensions())[:2] != (width, height):
            self._logic.ResizeSliceNode(width, height)
        connection = self._logic.GetImageDataConnection()
        self._mapper.SetInputConnection(connection)
        self._renderer.RemoveViewProp(self._image)
        if connection is not None:
            self._renderer.AddViewProp(self._image)


class ThreeDView(RenderView):
    """qMRMLThreeDView."""

    def __init__(self, manager: LayoutManager, node: Any) -> None:
        super().__init__(manager, slicer.vtkMRMLThreeDViewInteractorStyle())
        self._node = node
        factory = slicer.vtkMRMLThreeDViewDisplayableManagerFactory.GetInstance()
        self._initializeGroup(_registered(factory, _THREE_D_MANAGERS, manager.applicationLogic), node)
        self._observe(node, vtk.vtkCommand.ModifiedEvent)

    def mrmlViewNode(self) -> Any:
        return self._node

    def cameraNode(self) -> Any:
        manager = self.displayableManagerByClassName("vtkMRMLCameraDisplayableManager")
        return manager.GetCameraNode()

    def resetFocalPoint(self) -> None:
        """Look at the middle of what is shown, from where the camera looks now."""
        bounds = self._visibleBounds()
        if bounds is None:
            return
        node = self.cameraNode()
        middle = np.reshape(bounds, (3, 2)).mean(axis=1)
        shift = middle - np.asarray(node.GetFocalPoint())
        node.SetFocalPoint(*middle)
        node.SetPosition(*(np.asarray(node.GetPosition()) + shift))
        node.ResetClippingRange()

    def resetCamera(self) -> None:
        """Look at all that is shown, as near as it fits."""
        bounds = self._visibleBounds()
        if bounds is not None:
            self._renderer.ResetCamera(bounds)
            self.cameraNode().ResetClippingRange()
            self.scheduleRender()

    def rotateToViewAxis(self, axisId: int) -> None:
        """0 left, 1 right, 2 posterior, 3 anterior, 4 inferior, 5 superior."""
        self.cameraNode().RotateTo(axisId)
        self.scheduleRender()

    def lookFromAxis(self, axis: int, fov: float = -1) -> None:
        self.rotateToViewAxis(axis)

    def zoomIn(self) -> None:
        self._renderer.GetActiveCamera().Dolly(1.2)
        self.scheduleRender()

    def zoomOut(self) -> None:
        self._renderer.GetActiveCamera().Dolly(1 / 1.2)
        self.scheduleRender()

    def _visibleBounds(self) -> tuple[float, ...] | None:
        """Bounds of the objects, without the box and its labels around them."""
        node = self.mrmlViewNode()
        box, labels = node.GetBoxVisible(), node.GetAxisLabelsVisible()
        node.SetBoxVisible(False)
        node.SetAxisLabelsVisible(False)
        bounds = self._renderer.ComputeVisiblePropBounds()
        node.SetBoxVisible(box)
        node.SetAxisLabelsVisible(labels)
        return bounds if vtk.vtkMath.AreBoundsInitialized(bounds) else None


class SliceController(qt.QWidget):
    """qMRMLSliceControllerWidget: the bar above a slice view."""

    def __init__(self, logic: Any) -> None:
        super().__init__()
        self._logic = logic
        node = logic.GetSliceNode()
        self._name, self._slider, self._text = qt.QLabel(node.GetLayoutLabel()), qt.QSlider(), qt.QLabel()
        self._name.setAlignment(qt.Qt.AlignCenter)
        self._slider.orientation = qt.Qt.Horizontal
        row = qt.QHBoxLayout(self)
        row.setContentsMargins(2, 2, 6, 2)
        self._name.setFixedWidth(20)
        self._text.setMinimumWidth(90)
        for widget in (self._name, self._slider, self._text):
            row.addWidget(widget)
        color = qt.QColor.fromRgbF(*node.GetLayoutColor())
        self.setStyleSheet(f"QWidget {{ background: {color.name()}; color: black; }}")
        self._slider.connect("valueChanged(int)", self._slid)
        self._tag = logic.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._show())
        self._show()

    def release(self) -> None:
        self._logic.RemoveObserver(self._tag)

    def mrmlSliceNode(self) -> Any:
        return self._logic.GetSliceNode()

    def sliceLogic(self) -> Any:
        return self._logic

    def sliceOffsetSlider(self) -> Any:
        return self._slider

    def fitSliceToBackground(self) -> None:
        self._logic.FitSliceToBackground()
        self._logic.SnapSliceOffsetToIJK()

    def setSliceOffsetValue(self, offset: float) -> None:
        self._logic.SetSliceOffset(offset)

    def setSliceVisible(self, visible: bool) -> None:
        self._logic.GetSliceNode().SetSliceVisible(visible)

    def _range(self) -> tuple[float, float, float]:
        """Smallest and largest offset and the step between slices, mm."""
        limits, resolution = [0.0, 0.0], vtk.reference(1.0)
        self._logic.GetSliceOffsetRangeResolution(limits, resolution)
        return limits[0], limits[1], max(float(resolution), 1e-3)

    def _slid(self, step: int) -> None:
        low, _, resolution = self._range()
        self._logic.SetSliceOffset(low + step * resolution)

    def _show(self) -> None:
        low, high, resolution = self._range()
        offset = self._logic.GetSliceOffset()
        blocked = self._slider.blockSignals(True)
        self._slider.setRange(0, max(round((high - low) / resolution), 0))
        self._slider.setValue(round((offset - low) / resolution))
        self._slider.blockSignals(blocked)
        self._text.text = f"{self._logic.GetSliceNode().GetOrientation()[:1]}: {offset:.1f} mm"


class SliceWidget(qt.QWidget):
    """qMRMLSliceWidget."""

    def __init__(self, manager: LayoutManager, logic: Any) -> None:
        super().__init__()
        self._logic, self._view, self._controller = logic, SliceView(manager, logic), SliceController(logic)
        _stack(self, self._controller, self._view)

    def sliceLogic(self) -> Any:
        return self._logic

    def sliceView(self) -> SliceView:
        return self._view

    def sliceController(self) -> SliceController:
        return self._controller

    def mrmlSliceNode(self) -> Any:
        return self._logic.GetSliceNode()

    def mrmlSliceCompositeNode(self) -> Any:
        return self._logic.GetSliceCompositeNode()

    def interactorStyle(self) -> Any:
        return self._view.interactorStyle()

    def fitSliceToBackground(self) -> None:
        self._controller.fitSliceToBackground()

    def release(self) -> None:
        self._controller.release()
        self._view.release()


class ThreeDWidget(qt.QWidget):
    """qMRMLThreeDWidget."""

    def __init__(self, manager: LayoutManager, node: Any) -> None:
        super().__init__()
        self._view, self._controller = ThreeDView(manager, node), qt.QLabel("3D")
        self._controller.setAlignment(qt.Qt.AlignCenter)
        self._controller.setStyleSheet("background: #7f7fc8; color: black; padding: 3px;")
        _stack(self, self._controller, self._view)

    def threeDView(self) -> ThreeDView:
        return self._view

    def threeDController(self) -> Any:
        return self._controller

    def mrmlViewNode(self) -> Any:
        return self._view.mrmlViewNode()

    def release(self) -> None:
        self._view.release()


class TableWidget(qt.QWidget):
    """qMRMLTableWidget: shows the active table of the scene."""

    def __init__(self, manager: LayoutManager) -> None:
        super().__init__()
        self._view = slicer.qMRMLTableView()
        self._view.firstRowLocked = True
        _stack(self, self._view)
        self._selection = manager.applicationLogic.GetSelectionNode()
        self._tag = self._selection.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._show())
        self._show()

    def tableView(self) -> Any:
        return self._view

    def _show(self) -> None:
        identifier = self._selection.GetActiveTableID()
        self._view.setMRMLTableNode(slicer.mrmlScene.GetNodeByID(identifier) if identifier else None)

    def release(self) -> None:
        self._selection.RemoveObserver(self._tag)


class LayoutManager(qt.QObject):
    """qSlicerLayoutManager: the views that the scene's layout asks for, in `viewport()`."""

    layoutChanged = qt.Signal(int)

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self._host, self._scene, self._description, self._root = owner, owner.scene, None, None
        self._slices: dict[str, SliceWidget] = {}
        self._threeDs: dict[str, ThreeDWidget] = {}
        self._tables: dict[str, TableWidget] = {}
        self._sliceLogics = vtk.vtkCollection()
        owner.applicationLogic.SetSliceLogics(self._sliceLogics)
        self._viewport = qt.QWidget()
        self._viewport.setLayout(qt.QVBoxLayout())
        self._viewport.layout().setContentsMargins(0, 0, 0, 0)
        self._timer = qt.QTimer()
        self._timer.singleShot, self._slowest = True, 0.0
        self._timer.connect("timeout()", self._renderOne)
        self._layoutLogic = slicer.vtkMRMLLayoutLogic()
        self._layoutLogic.SetMRMLApplicationLogic(owner.applicationLogic)
        self._layoutLogic.SetMRMLScene(self._scene)
        self._node = self._layoutLogic.GetLayoutNode()
        self._node.SetViewArrangement(slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView)
        self._tag = self._node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._arrange())
        self._arrange()

    def release(self) -> None:
        self._timer.stop()
        self._node.RemoveObserver(self._tag)
        for widget in (*self._slices.values(), *self._threeDs.values(), *self._tables.values()):
            widget.release()
        self._sliceLogics.RemoveAllItems()
        self._viewport.deleteLater()
        self._layoutLogic.SetMRMLScene(None)

    @property
    def applicationLogic(self) -> Any:
        return self._host.applicationLogic

    # -- what Slicer's layout manager offers -----------------------------------------------------------------------

    def viewport(self) -> Any:
        return self._viewport

    def layoutLogic(self) -> Any:
        return self._layoutLogic

    @property
    def layout(self) -> int:
        return self._node.GetViewArrangement()

    def setLayout(self, layout: int) -> None:
        self._node.SetViewArrangement(layout)

    def mrmlSliceLogics(self) -> Any:
        return self._sliceLogics

    def sliceViewNames(self) -> tuple[str, ...]:
        return tuple(self._slices)

    def sliceWidget(self, name: str) -> SliceWidget | None:
        return self._slices.get(name)

    @property
    def threeDViewCount(self) -> int:
        return len(self._threeDs)

    def threeDWidget(self, which: int | str) -> ThreeDWidget | None:
        return _nth(self._threeDs, which)

    @property
    def tableViewCount(self) -> int:
        return len(self._tables)

    def tableWidget(self, which: int | str) -> TableWidget | None:
        return _nth(self._tables, which)

    @property
    def plotViewCount(self) -> int:
        """The host draws no plots."""
        return 0

    def resetSliceViews(self) -> None:
        for widget in self._slices.values():
            widget.fitSliceToBackground()

    def resetThreeDViews(self) -> None:
        for widget in self._threeDs.values():
            widget.threeDView().resetFocalPoint()

    # -- drawing ---------------------------------------------------------------------------------------------------

    def _views(self) -> list[RenderView]:
        slices = [widget.sliceView() for widget in self._slices.values()]
        return slices + [widget.threeDView() for widget in self._threeDs.values()]

    def scheduleRender(self) -> None:
        if not self._timer.active:
            self._timer.start(_PATIENCE)

    def _renderOne(self) -> None:
        """Draw one view and let the event loop go on before the next: nothing waits longer than for one picture."""
        if self._host.app.renderPaused or self._scene.IsBatchProcessing():
            self._timer.start(_PATIENCE)
            return
        for view in self._views():
            start = time.perf_counter()
            if view.renderIfStale():
                self._slowest = max(self._slowest, time.perf_counter() - start)
                self._timer.start(0)
                return

    def renderNow(self) -> None:
        """Draw every view that can be seen and is not up to date."""
        for view in self._views():
            view.renderIfStale()
        qt.QApplication.processEvents()

    @property
    def slowestRender(self) -> float:
        """Seconds of the slowest picture so far."""
        return self._slowest

    # -- arranging -------------------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Build the views of the current layout, unless they are shown already."""
        description = self._node.GetCurrentLayoutDescription()
        if not description or description == self._description:
            return
        self._description = description
        for widget in (*self._slices.values(), *self._threeDs.values(), *self._tables.values()):
            widget.hide()
            widget.setParent(None)  # the old arrangement is deleted, the views stay
        old, self._root = self._root, self._build(ElementTree.fromstring(description))
        self._viewport.layout().addWidget(self._root)
        self._root.show()
        if old is not None:
            self._viewport.layout().removeWidget(old)
            old.hide()
            old.deleteLater()
        self.layoutChanged.emit(self.layout)

    def _build(self, element: Any) -> Any:
        if element.tag == "view":
            return self._view(element)
        kind = element.get("type", "vertical")
        children = [self._build(child) for item in element.findall("item") for child in item]
        if kind == "tab":
            box = qt.QTabWidget()
            for child in children:
                box.addTab(child, child.objectName)
            return box
        box = qt.QSplitter(qt.Qt.Horizontal if kind == "horizontal" else qt.Qt.Vertical)
        for index, child in enumerate(children):
            box.addWidget(child)
            box.setStretchFactor(index, 1)
        box.setSizes([10000] * len(children))
        return box

    def _view(self, element: Any) -> Any:
        kind, name = element.get("class"), element.get("singletontag")
        makers = {
            "vtkMRMLSliceNode": (self._slices, self._newSlice),
            "vtkMRMLViewNode": (self._threeDs, self._newThreeD),
            "vtkMRMLTableViewNode": (self._tables, lambda name: TableWidget(self)),
        }
        if kind not in makers:
            return qt.QLabel(f"{kind}: not drawn by the test host")
        known, make = makers[kind]
        if name not in known:
            known[name] = make(name)
            known[name].objectName = name
        known[name].show()
        return known[name]

    def _newSlice(self, name: str) -> SliceWidget:
        logic = slicer.vtkMRMLSliceLogic()
        logic.SetMRMLApplicationLogic(self.applicationLogic)
        logic.SetMRMLScene(self._scene)
        logic.SetSliceNode(self._scene.GetSingletonNode(name, "vtkMRMLSliceNode"))
        self._sliceLogics.AddItem(logic)
        return SliceWidget(self, logic)

    def _newThreeD(self, name: str) -> ThreeDWidget:
        return ThreeDWidget(self, self._scene.GetSingletonNode(name, "vtkMRMLViewNode"))


def _nth(widgets: dict[str, Any], which: int | str) -> Any:
    """A widget by its name or its number; None where there is none."""
    return widgets.get(which) if isinstance(which, str) else dict(enumerate(widgets.values())).get(which)


def _stack(parent: Any, *widgets: Any) -> None:
    column = qt.QVBoxLayout(parent)
    column.setContentsMargins(0, 0, 0, 0)
    column.setSpacing(0)
    for widget in widgets:
        column.addWidget(widget)
    column.setStretchFactor(widgets[-1], 1)


def _pixels(window: Any) -> np.ndarray:
    """(height, width, 4) uint8, from the lowest row up."""
    width, height = window.GetSize()
    data = vtk.vtkUnsignedCharArray()
    window.GetRGBACharPixelData(0, 0, width - 1, height - 1, 0, data)
    return vtk_to_numpy(data).reshape(height, width, 4)


def _picture(window: Any) -> Any:
    rows = np.ascontiguousarray(_pixels(window)[::-1])
    height, width = rows.shape[:2]
    return qt.QImage(rows.data, width, height, 4 * width, qt.QImage.Format_RGBX8888).copy()
