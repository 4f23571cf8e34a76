"""Stand-ins for the widgets of CTK: the same properties, signals and slots, and the behavior that panels rely on.

Only what PythonQt shows of the real classes is public: properties, signals, slots and invokable methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from host.qt_compat import QtCore, QtGui, QtWidgets
from host.standin import computed, flags, forwarded, stored

__all__ = ["CLASSES"]

Qt, Signal = QtCore.Qt, QtCore.Signal
_LEFT = int(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)


# -- folding ----------------------------------------------------------------------------------------------------------


class _Folding:
    """Hides the children of a widget and brings back those that nobody else has hidden meanwhile."""

    def __init__(self, owner: QtWidgets.QWidget) -> None:
        self.owner, self.forcing = owner, False

    def child_added(self, child: QtCore.QObject) -> None:
        if child.isWidgetType():
            child.installEventFilter(self.owner)

    def watch(self, child: QtCore.QObject, event: QtCore.QEvent, folded: bool) -> None:
        """Remember what the program wants of a child, whether the fold is open or not."""
        kind = event.type()
        if self.forcing or kind not in (QtCore.QEvent.Type.ShowToParent, QtCore.QEvent.Type.HideToParent):
            return
        child.setProperty("visibilityToParent", kind == QtCore.QEvent.Type.ShowToParent)
        if folded and kind == QtCore.QEvent.Type.ShowToParent:
            self._show(child, False)

    def apply(self, folded: bool) -> None:
        for child in self.owner.children():
            if child.isWidgetType() and not child.isWindow():
                wanted = child.property("visibilityToParent") is not False
                self._show(child, not folded and wanted)
                # As if never asked for, so that Qt reports when the program hides the child while it is folded away.
                if wanted:
                    child.setAttribute(Qt.WidgetAttribute.WA_WState_ExplicitShowHide, False)

    def _show(self, child: Any, visible: bool) -> None:
        self.forcing = True
        child.setVisible(visible)
        self.forcing = False


class ctkCollapsibleButton(QtWidgets.QAbstractButton):
    """A titled section that a click on its title folds away; checked is open."""

    contentsCollapsed = Signal(bool)
    _folding: _Folding | None = None  # events come before the constructor is through

    def __init__(self, *arguments: Any) -> None:
        text, parent = _text_and_parent(arguments)
        super().__init__(parent)
        self._folding = _Folding(self)
        self._collapsed = False
        self._openHeight = self.maximumHeight
        self.setCheckable(True)
        self.setChecked(True)
        self.setText(text)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Minimum, QtWidgets.QSizePolicy.Policy.Preferred)
        self.setContentsMargins(0, self._titleHeight(), 0, 0)
        self.toggled.connect(self._onToggled)

    collapsed = computed(bool, lambda self: self._collapsed, lambda self, value: self.setChecked(not value))
    collapsedHeight = stored(int, "collapsedHeight", 14, "updateGeometry")
    flat = stored(bool, "flat", False, "update")
    contentsFrameShape = stored(int, "contentsFrameShape", int(QtWidgets.QFrame.Shape.NoFrame), "update")
    contentsFrameShadow = stored(int, "contentsFrameShadow", int(QtWidgets.QFrame.Shadow.Plain), "update")
    contentsLineWidth = stored(int, "contentsLineWidth", 1, "update")
    contentsMidLineWidth = stored(int, "contentsMidLineWidth", 0, "update")
    buttonTextAlignment = stored(int, "buttonTextAlignment", _LEFT, "update")
    indicatorAlignment = stored(int, "indicatorAlignment", _LEFT, "update")

    def _titleHeight(self) -> int:
        return self.fontMetrics().height() + 8

    def _onToggled(self, checked: bool) -> None:
        if checked != self._collapsed:
            return
        self._collapsed = not checked
        if self._collapsed:
            self._openHeight = self.maximumHeight
            self.setMaximumHeight(self._titleHeight() + self.collapsedHeight)
        else:
            self.setMaximumHeight(self._openHeight)
        self._folding.apply(self._collapsed)
        self.updateGeometry()
        self.contentsCollapsed.emit(self._collapsed)

    def childEvent(self, event: QtCore.QChildEvent) -> None:
        if self._folding and event.added():
            self._folding.child_added(event.child())

    def eventFilter(self, child: QtCore.QObject, event: QtCore.QEvent) -> bool:
        if self._folding:
            self._folding.watch(child, event, self._collapsed)
        return False

    def hitButton(self, position: QtCore.QPoint) -> bool:
        return position.y() < self._titleHeight() and self.rect.contains(position)

    def paintEvent(self, event: QtGui.QPaintEvent) -> None:
        painter, style = QtWidgets.QStylePainter(self), self.style()
        title = QtCore.QRect(0, 0, self.width, self._titleHeight())
        button = QtWidgets.QStyleOptionButton()
        button.initFrom(self)
        button.rect = title
        button.state |= style.StateFlag.State_Sunken if self.isDown() else style.StateFlag.State_Raised
        painter.drawControl(style.ControlElement.CE_PushButtonBevel, button)
        arrow = QtWidgets.QStyleOption()
        arrow.initFrom(self)
        arrow.rect = QtCore.QRect(4, title.center().y() - 6, 12, 12)
        element = style.PrimitiveElement
        painter.drawPrimitive(
            element.PE_IndicatorArrowRight if self._collapsed else element.PE_IndicatorArrowDown, arrow
        )
        painter.drawItemText(
            title.adjusted(22, 0, -4, 0), self.buttonTextAlignment, self.palette, self.enabled, self.text
        )


class ctkCollapsibleGroupBox(QtWidgets.QGroupBox):
    """A group box that its check mark folds away."""

    _folding: _Folding | None = None

    def __init__(self, *arguments: Any) -> None:
        text, parent = _text_and_parent(arguments)
        super().__init__(text, parent)
        self._folding = _Folding(self)
        self.setCheckable(True)
        self.setChecked(True)
        self.toggled.connect(lambda checked: self._folding.apply(not checked))

    collapsed = computed(bool, lambda self: not self.checked, lambda self, value: self.setChecked(not value))
    collapsedHeight = stored(int, "collapsedHeight", 14, "updateGeometry")

    def childEvent(self, event: QtCore.QChildEvent) -> None:
        if self._folding and event.added():
            self._folding.child_added(event.child())

    def eventFilter(self, child: QtCore.QObject, event: QtCore.QEvent) -> bool:
        if self._folding:
            self._folding.watch(child, event, not self.checked)
        return False


def _text_and_parent(arguments: tuple) -> tuple[str, Any]:
    """(text, parent) of a constructor that takes either, both or none."""
    text = next((item for item in arguments if isinstance(item, str)), "")
    return text, next((item for item in arguments if isinstance(item, QtWidgets.QWidget)), None)


@flags(NoOrientation=0, Horizontal=1, Vertical=2)
class ctkExpandableWidget(QtWidgets.QFrame):
    """A frame that the user makes larger by a grip in its corner."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._grip = QtWidgets.QSizeGrip(self)

    orientations = stored(int, "orientations", int(Qt.Orientation.Horizontal | Qt.Orientation.Vertical))
    sizeGripInside = stored(bool, "sizeGripInside", True, "updateSizeHint")
    sizeGripMargins = stored(QtCore.QSize, "sizeGripMargins", QtCore.QSize(), "updateSizeHint")

    def updateSizeHint(self) -> None:
        self.updateGeometry()

    def resizeEvent(self, event: QtGui.QResizeEvent) -> None:
        self._grip.move(self.rect.bottomRight() - self._grip.rect.bottomRight())
        self._grip.raise_()


# -- choosing ---------------------------------------------------------------------------------------------------------


@flags(NeverScroll=0, AlwaysScroll=1, ScrollWithFocus=2, ScrollWithNoVScrollBar=3)
class ctkComboBox(QtWidgets.QComboBox):
    """A combo box that shows a default text while nothing is chosen and may leave the mouse wheel alone."""

    returnRelease = Signal()

    defaultText = stored(str, "defaultText", "", "update")
    defaultIcon = stored(QtGui.QIcon, "defaultIcon", QtGui.QIcon(), "update")
    forceDefault = stored(bool, "forceDefault", False, "update")
    elideMode = stored(int, "elideMode", int(Qt.TextElideMode.ElideNone), "update")
    scrollWheelEffect = stored(int, "scrollWheelEffect", 1)
    currentUserDataAsString = computed(str, lambda self: str(self.currentData or ""), "setCurrentUserDataAsString")

    def setCurrentUserDataAsString(self, userData: str) -> None:
        found = [index for index in range(self.count) if str(self.itemData(index)) == userData]
        self.setCurrentIndex(found[0] if found else -1)

    def _shownText(self) -> str:
        return self.defaultText if self.forceDefault or self.currentIndex < 0 else self.currentText

    def paintEvent(self, event: QtGui.QPaintEvent) -> None:
        painter, option = QtWidgets.QStylePainter(self), QtWidgets.QStyleOptionComboBox()
        self.initStyleOption(option)
        style = self.style()
        painter.drawComplexControl(style.ComplexControl.CC_ComboBox, option)
        field = style.subControlRect(
            style.ComplexControl.CC_ComboBox, option, style.SubControl.SC_ComboBoxEditField, self
        )
        mode = Qt.TextElideMode(self.elideMode)
        option.currentText = self.fontMetrics().elidedText(self._shownText(), mode, field.width() - 4)
        painter.drawControl(style.ControlElement.CE_ComboBoxLabel, option)

    def wheelEvent(self, event: QtGui.QWheelEvent) -> None:
        if self.scrollWheelEffect == 1 or (self.scrollWheelEffect == 2 and self.hasFocus()):
            super().wheelEvent(event)
        else:
            event.ignore()

    def keyReleaseEvent(self, event: QtGui.QKeyEvent) -> None:
        super().keyReleaseEvent(event)
        if event.key() in (Qt.Key.Key_Enter, Qt.Key.Key_Return):
            self.returnRelease.emit()


class ctkCheckableComboBox(QtWidgets.QComboBox):
    """A combo box whose items have check marks."""

    checkedIndexesChanged = Signal()

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self.model().dataChanged.connect(lambda *_: self.checkedIndexesChanged.emit())
        self.view().pressed.connect(self._flip)

    def _flip(self, index: QtCore.QModelIndex) -> None:
        checked = self.checkState(index) == Qt.CheckState.Checked
        self.setCheckState(index, Qt.CheckState.Unchecked if checked else Qt.CheckState.Checked)

    def _indexes(self) -> list[QtCore.QModelIndex]:
        return [self.model().index(row, self.modelColumn) for row in range(self.count)]

    def checkState(self, index: QtCore.QModelIndex) -> int:
        return Qt.CheckState(self.model().data(index, Qt.ItemDataRole.CheckStateRole) or 0)

    def setCheckState(self, index: QtCore.QModelIndex, check: int) -> None:
        self.model().setData(index, int(check), Qt.ItemDataRole.CheckStateRole)

    def checkableModel(self) -> QtCore.QAbstractItemModel:
        return self.model()

    def checkedIndexes(self) -> list[QtCore.QModelIndex]:
        return [index for index in self._indexes() if self.checkState(index) == Qt.CheckState.Checked]

    def allChecked(self) -> bool:
        return len(self.checkedIndexes()) == self.count

    def noneChecked(self) -> bool:
        return not self.checkedIndexes()


# -- numbers ----------------------------------------------------------------------------------------------------------


@flags(SetAlways=0, SetIfDifferent=1, SizeHintByMinMax=0, SizeHintByValue=1)
@flags(FixedDecimals=0, DecimalsByShortcuts=1, DecimalsByKey=2, DecimalsByValue=4, InsertDecimals=8)
@flags(ReplaceDecimals=16, DecimalsAsMax=32, DecimalsAsMin=64, DecimalPointAlwaysVisible=128)
class ctkDoubleSpinBox(QtWidgets.QWidget):
    """A spin box for numbers with decimals. (The keys that change the number of decimals are not imitated.)"""

    valueChanged = Signal((float,), (str,))
    editingFinished = Signal()
    decimalsChanged = Signal(int)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(next((item for item in arguments if isinstance(item, QtWidgets.QWidget)), None))
        self._box = QtWidgets.QDoubleSpinBox()
        self._box.setObjectName("SpinBox")
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._box)
        self.setFocusProxy(self._box)
        self._box.valueChanged.connect(self._changed)
        self._box.editingFinished.connect(self.editingFinished.emit)

    alignment = forwarded(int, "_box.alignment")
    frame = forwarded(bool, "_box.frame")
    readOnly = computed(bool, "_box.readOnly", "setReadOnly")
    prefix = forwarded(str, "_box.prefix")
    suffix = forwarded(str, "_box.suffix")
    cleanText = computed(str, "_box.cleanText")
    decimals = computed(int, "_box.decimals", "setDecimals")
    decimalsOption = stored(int, "decimalsOption", 9)
    minimum = forwarded(float, "_box.minimum")
    maximum = forwarded(float, "_box.maximum")
    singleStep = forwarded(float, "_box.singleStep")
    value = computed(float, "_box.value", "setValue")
    setMode = stored(int, "setMode", 1)
    invertedControls = stored(bool, "invertedControls", False)
    sizeHintPolicy = stored(int, "sizeHintPolicy", 0)

    def _changed(self, value: float) -> None:
        self.valueChanged[float].emit(value)
        self.valueChanged[str].emit(self._box.text)

    def setValue(self, value: float) -> None:
        before = self._box.value
        self._box.setValue(value)
        if self.setMode == 0 and self._box.value == before:
            self._changed(before)

    def setValueIfDifferent(self, value: float) -> None:
        self._box.setValue(value)

    def setValueAlways(self, value: float) -> None:
        before = self._box.value
        self._box.setValue(value)
        if self._box.value == before:
            self._changed(before)

    def setDecimals(self, decimals: int) -> None:
        if decimals != self._box.decimals:
            self._box.setDecimals(decimals)
            self.decimalsChanged.emit(decimals)

    def setReadOnly(self, readOnly: bool) -> None:
        self._box.setReadOnly(readOnly)

    def stepUp(self) -> None:
        self._box.stepUp()

    def stepDown(self) -> None:
        self._box.stepDown()


#: Positions of an int slider that stands for a range of floats.
_POSITIONS = 10000


@flags(NoSynchronize=0, SynchronizeWidth=1, SynchronizeDecimals=2)
class ctkSliderWidget(QtWidgets.QWidget):
    """A slider and a spin box for the same number; without `tracking` the value changes when the slider is let go."""

    valueChanged = Signal(float)
    valueIsChanging = Signal(float)
    decimalsChanged = Signal(int)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._slider = QtWidgets.QSlider(Qt.Orientation.Horizontal)
        self._slider.setRange(0, _POSITIONS)
        self._box = ctkDoubleSpinBox()
        self._box.setObjectName("SpinBox")
        self._box.maximum = 99.0
        self._valueBefore: float | None = None  # while the slider is held and does not track
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._slider, 1)
        layout.addWidget(self._box)
        self._box.valueChanged[float].connect(self._boxChanged)
        self._slider.valueChanged.connect(self._sliderMoved)
        self._slider.sliderPressed.connect(self._startChanging)
        self._slider.sliderReleased.connect(self._stopChanging)

    decimals = computed(int, "_box.decimals", "setDecimals")
    singleStep = forwarded(float, "_box.singleStep")
    pageStep = stored(float, "pageStep", 10.0)
    minimum = computed(float, lambda self: self._box.minimum, lambda self, value: self._limit("minimum", value))
    maximum = computed(float, lambda self: self._box.maximum, lambda self, value: self._limit("maximum", value))
    value = computed(
        float, lambda self: self._box.value if self._valueBefore is None else self._valueBefore, "setValue"
    )
    prefix = forwarded(str, "_box.prefix")
    suffix = forwarded(str, "_box.suffix")
    tickInterval = stored(float, "tickInterval", 0.0)
    tickPosition = forwarded(int, "_slider.tickPosition")
    synchronizeSiblings = stored(int, "synchronizeSiblings", 3)
    spinBoxAlignment = stored(int, "spinBoxAlignment", int(Qt.AlignmentFlag.AlignVCenter))
    tracking = stored(bool, "tracking", True)
    spinBoxVisible = computed(bool, lambda self: not self._box.isHidden(), "setSpinBoxVisible")
    popupSlider = stored(bool, "popupSlider", False)
    invertedAppearance = forwarded(bool, "_slider.invertedAppearance")
    invertedControls = forwarded(bool, "_slider.invertedControls")

    def _limit(self, side: str, value: float) -> None:
        setattr(self._box, side, value)
        self._placeSlider()

    def _placeSlider(self) -> None:
        extent = self.maximum - self.minimum
        blocked = self._slider.blockSignals(True)
        self._slider.setValue(round((self._box.value - self.minimum) / extent * _POSITIONS) if extent > 0 else 0)
        self._slider.blockSignals(blocked)

    def _boxChanged(self, value: float) -> None:
        self._placeSlider()
        if not self.tracking:
            self.valueIsChanging.emit(value)
        if self._valueBefore is None:
            self.valueChanged.emit(value)

    def _sliderMoved(self, position: int) -> None:
        extent, step = self.maximum - self.minimum, self.singleStep
        value = round(extent * position / _POSITIONS / step) * step if step > 0 else extent * position / _POSITIONS
        self._box.value = self.minimum + value

    def _startChanging(self) -> None:
        if not self.tracking:
            self._valueBefore = self._box.value

    def _stopChanging(self) -> None:
        before, self._valueBefore = self._valueBefore, None
        if before is not None and self._box.value != before:
            self.valueChanged.emit(self._box.value)

    def setValue(self, value: float) -> None:
        self._valueBefore = None
        self._box.setValue(value)

    def reset(self) -> None:
        self.setValue(0.0)

    def setSpinBoxVisible(self, visible: bool) -> None:
        self._box.setVisible(visible)

    def setDecimals(self, decimals: int) -> None:
        if decimals != self._box.decimals:
            self._box.setDecimals(decimals)
            self.decimalsChanged.emit(decimals)


class ctkRangeWidget(QtWidgets.QWidget):
    """Two numbers with low <= high. (The real one has a slider with two handles between the spin boxes.)"""

    minimumValueChanged = Signal(float)
    minimumValueIsChanging = Signal(float)
    maximumValueChanged = Signal(float)
    maximumValueIsChanging = Signal(float)
    valuesChanged = Signal(float, float)
    rangeChanged = Signal(float, float)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._low, self._high = QtWidgets.QDoubleSpinBox(), QtWidgets.QDoubleSpinBox()
        self._range = (0.0, 99.0)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for box, name, value in ((self._low, "MinimumSpinBox", 0.0), (self._high, "MaximumSpinBox", 99.0)):
            box.setObjectName(name)
            box.setRange(*self._range)
            box.setValue(value)
            layout.addWidget(box, 1)
        self._low.valueChanged.connect(lambda value: self.setValues(value, max(value, self._high.value)))
        self._high.valueChanged.connect(lambda value: self.setValues(min(value, self._low.value), value))
        self._values = (0.0, 99.0)

    decimals = computed(int, "_low.decimals", "setDecimals")
    singleStep = computed(
        float, lambda self: self._low.singleStep, lambda self, value: self._onBoth("singleStep", value)
    )
    minimum = computed(
        float, lambda self: self._range[0], lambda self, value: self.setRange(value, max(value, self._range[1]))
    )
    maximum = computed(
        float, lambda self: self._range[1], lambda self, value: self.setRange(min(value, self._range[0]), value)
    )
    minimumValue = computed(float, lambda self: self._values[0], "setMinimumValue")
    maximumValue = computed(float, lambda self: self._values[1], "setMaximumValue")
    prefix = computed(str, lambda self: self._low.prefix, lambda self, value: self._onBoth("prefix", value))
    suffix = computed(str, lambda self: self._low.suffix, lambda self, value: self._onBoth("suffix", value))
    tickInterval = stored(float, "tickInterval", 0.0)
    autoSpinBoxWidth = stored(bool, "autoSpinBoxWidth", True)
    spinBoxTextAlignment = stored(int, "spinBoxTextAlignment", _LEFT)
    spinBoxAlignment = stored(int, "spinBoxAlignment", int(Qt.AlignmentFlag.AlignVCenter))
    tracking = stored(bool, "tracking", True)
    symmetricMoves = stored(bool, "symmetricMoves", False)

    def _onBoth(self, name: str, value: Any) -> None:
        setattr(self._low, name, value)
        setattr(self._high, name, value)

    def setRange(self, minimum: float, maximum: float) -> None:
        self._range = (min(minimum, maximum), max(minimum, maximum))
        for box in (self._low, self._high):
            blocked = box.blockSignals(True)
            box.setRange(*self._range)
            box.blockSignals(blocked)
        self.rangeChanged.emit(*self._range)
        self.setValues(*self._values)

    def setMinimumValue(self, value: float) -> None:
        self.setValues(value, max(value, self._values[1]))

    def setMaximumValue(self, value: float) -> None:
        self.setValues(min(value, self._values[0]), value)

    def setValues(self, low: float, high: float) -> None:
        before = self._values
        for box, value in ((self._low, min(low, high)), (self._high, max(low, high))):
            blocked = box.blockSignals(True)
            box.setValue(value)  # clamps and rounds
            box.blockSignals(blocked)
        self._values = (self._low.value, self._high.value)
        if self._values[0] != before[0]:
            self.minimumValueChanged.emit(self._values[0])
        if self._values[1] != before[1]:
            self.maximumValueChanged.emit(self._values[1])
        if self._values != before:
            self.valuesChanged.emit(*self._values)

    def setDecimals(self, decimals: int) -> None:
        self._onBoth("decimals", decimals)

    def reset(self) -> None:
        self.setValues(*self._range)


# -- files ------------------------------------------------------------------------------------------------------------


@flags(Dirs=0x1, Files=0x2, Drives=0x4, NoSymLinks=0x8, AllEntries=0x7, TypeMask=0xF, Readable=0x10, Writable=0x20)
@flags(Executable=0x40, PermissionMask=0x70, Modified=0x80, Hidden=0x100, System=0x200, AccessMask=0x3F0, AllDirs=0x400)
@flags(CaseSensitive=0x800, NoDot=0x2000, NoDotDot=0x4000, NoDotAndDotDot=0x6000, NoFilter=-1)
@flags(AdjustToContents=0, AdjustToContentsOnFirstShow=1, AdjustToMinimumContentsLength=2)
@flags(ShowDirsOnly=0x1, DontResolveSymlinks=0x2, DontConfirmOverwrite=0x4, DontUseNativeDialog=0x10, ReadOnly=0x20)
class ctkPathLineEdit(QtWidgets.QWidget):
    """A file or folder: typed, chosen in a dialog, or taken from those used before."""

    validInputChanged = Signal(bool)
    currentPathChanged = Signal(str)

    _HISTORY = 5

    def __init__(self, *arguments: Any) -> None:
        super().__init__(next((item for item in arguments if isinstance(item, QtWidgets.QWidget)), None))
        self._combo = QtWidgets.QComboBox()
        self._combo.setEditable(True)
        self._combo.setInsertPolicy(QtWidgets.QComboBox.InsertPolicy.NoInsert)
        self._combo.setSizePolicy(QtWidgets.QSizePolicy.Policy.Expanding, QtWidgets.QSizePolicy.Policy.Fixed)
        self._button = QtWidgets.QToolButton()
        self._button.setText("...")
        self._key = ""
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._combo)
        layout.addWidget(self._button)
        self._combo.editTextChanged.connect(self.currentPathChanged.emit)
        self._button.clicked.connect(lambda _checked: self.browse())

    label = stored(str, "label", "")
    filters = stored(int, "filters", 0x7)
    currentPath = computed(str, "_combo.currentText", "setCurrentPath")
    options = stored(int, "options", 0)
    settingKey = computed(str, "_key", "_setSettingKey")
    showBrowseButton = computed(
        bool, lambda self: not self._button.isHidden(), lambda self, value: self._button.setVisible(value)
    )
    showHistoryButton = stored(bool, "showHistoryButton", True)
    sizeAdjustPolicy = stored(int, "sizeAdjustPolicy", 2)
    minimumContentsLength = stored(int, "minimumContentsLength", 0)
    nameFilters = stored("QStringList", "nameFilters", [])

    def comboBox(self) -> QtWidgets.QComboBox:
        return self._combo

    def setCurrentPath(self, path: str) -> None:
        self._combo.setEditText(path)

    def browse(self) -> None:
        start, filters = self.currentPath or str(Path.cwd()), ";;".join(self.nameFilters)
        if not self.filters & self.Files:
            path = QtWidgets.QFileDialog.getExistingDirectory(self, "Select a directory...", start)
        elif self.filters & self.Writable:
            path = QtWidgets.QFileDialog.getSaveFileName(self, "Select a file to save", start, filters)
        else:
            path = QtWidgets.QFileDialog.getOpenFileName(self, "Open a file", start, filters)
        if path:
            self.setCurrentPath(path)

    def _setSettingKey(self, key: str) -> None:
        self._key = key
        self.retrieveHistory()

    def _history(self) -> list[str]:
        saved = QtCore.QSettings().value(self._key) or []
        return [saved] if isinstance(saved, str) else list(saved)

    def retrieveHistory(self) -> None:
        path = self.currentPath
        blocked = self.blockSignals(True)
        self._combo.clear()
        self._combo.addItems(self._history()[: self._HISTORY])
        self.blockSignals(blocked)
        self.setCurrentPath(path or self._combo.itemText(0))

    def addCurrentPathToHistory(self) -> None:
        path = self.currentPath
        if not path:
            return
        history = [path, *(old for old in self._history() if old != path)]
        QtCore.QSettings().setValue(self._key, history)
        self.retrieveHistory()


@flags(ShowDirsOnly=0x1, DontResolveSymlinks=0x2, DontConfirmOverwrite=0x4, DontUseSheet=0x8)
@flags(DontUseNativeDialog=0x10, ReadOnly=0x20, HideNameFilterDetails=0x40)
class ctkDirectoryButton(QtWidgets.QWidget):
    """A button that shows a folder and lets the user choose another."""

    directoryChanged = Signal(str)
    directorySelected = Signal(str)

    def __init__(self, *arguments: Any) -> None:
        folder, parent = _text_and_parent(arguments)
        super().__init__(parent)
        self._folder = QtCore.QDir(folder or ".")
        self._button = QtWidgets.QPushButton(self.style().standardIcon(self.style().StandardPixmap.SP_DirIcon), "")
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._button)
        self._button.clicked.connect(lambda _checked: self.browse())
        self._showFolder()

    acceptMode = stored(int, "acceptMode", 0)
    directory = computed(str, lambda self: self._folder.path(), "_setDirectory")
    caption = stored(str, "caption", "")
    text = stored(str, "text", "", "_showFolder")
    icon = forwarded(QtGui.QIcon, "_button.icon")
    elideMode = stored(int, "elideMode", int(Qt.TextElideMode.ElideNone))
    options = stored(int, "options", 0x1)

    def _showFolder(self) -> None:
        self._button.setText(self.text or self._folder.absolutePath())

    def _setDirectory(self, folder: str) -> None:
        new = QtCore.QDir(folder)
        changed = new != self._folder
        if changed:
            self._folder = QtCore.QDir(new.absolutePath())
            self._showFolder()
        self.directorySelected.emit(new.absolutePath())
        if changed:
            self.directoryChanged.emit(self._folder.path())

    def browse(self) -> str:
        folder = QtWidgets.QFileDialog.getExistingDirectory(self, self.caption or self.toolTip, self._folder.path())
        if folder:
            self._setDirectory(folder)
        return folder


# -- buttons ----------------------------------------------------------------------------------------------------------


class ctkPushButton(QtWidgets.QPushButton):
    """A push button whose text and icon can be aligned."""

    def __init__(self, *arguments: Any) -> None:
        text, parent = _text_and_parent(arguments)
        super().__init__(text, parent)

    buttonTextAlignment = stored(int, "buttonTextAlignment", int(Qt.AlignmentFlag.AlignCenter), "update")
    iconAlignment = stored(int, "iconAlignment", _LEFT, "update")
    elideMode = stored(int, "elideMode", int(Qt.TextElideMode.ElideNone), "update")


class ctkCheckBox(QtWidgets.QCheckBox):
    """A check box that may have an icon in place of its box. (The icon is kept, and not painted.)"""

    indicatorIcon = stored(QtGui.QIcon, "indicatorIcon", QtGui.QIcon())
    indicatorIconSize = stored(QtCore.QSize, "indicatorIconSize", QtCore.QSize())


class ctkCheckablePushButton(ctkPushButton):
    """A push button with a check box in it that makes it checkable (or, on request, pressed)."""

    checkBoxToggled = Signal(bool)
    checkStateChanged = Signal(Qt.CheckState)
    signal_signatures = {}

    indicatorAlignment = computed(
        int, lambda self: self.iconAlignment, lambda self, value: setattr(self, "iconAlignment", value)
    )
    checkState = computed(int, lambda self: self._state(), "_setState")
    checkBoxControlsButton = stored(bool, "checkBoxControlsButton", True, "_followCheckable")
    checkBoxControlsButtonToggleState = stored(bool, "checkBoxControlsButtonToggleState", False, "_followToggleState")
    checkBoxUserCheckable = stored(bool, "checkBoxUserCheckable", True, "update")

    def _state(self) -> Qt.CheckState:
        return Qt.CheckState(self.__dict__.get("_checkState", Qt.CheckState.Unchecked))

    def _setState(self, state: int) -> None:
        if state == self._state():
            return
        self._checkState = Qt.CheckState(state)
        checked = self._checkState == Qt.CheckState.Checked
        if self.checkBoxControlsButton:
            was = self.checked
            self.setCheckable(checked)
            if was != self.checked:
                self.toggled.emit(self.checked)
            if self.checkBoxControlsButtonToggleState and self.checked != checked:
                self.setChecked(checked)
        self.checkStateChanged.emit(self._checkState)
        self.checkBoxToggled.emit(checked)
        self.update()

    def _followCheckable(self) -> None:
        if self.checkBoxControlsButton:
            self._setState(Qt.CheckState.Checked if self.checkable else Qt.CheckState.Unchecked)

    def _followToggleState(self) -> None:
        if self.checkBoxControlsButtonToggleState and self._state() and not self.checked:
            self.setChecked(True)

    def _indicator(self) -> QtCore.QRect:
        size = self.style().pixelMetric(self.style().PixelMetric.PM_IndicatorWidth)
        return QtCore.QRect(6, (self.height - size) // 2, size, size)

    def hitButton(self, position: QtCore.QPoint) -> bool:
        return not self._indicator().contains(position) and self.rect.contains(position)

    def mousePressEvent(self, event: QtGui.QMouseEvent) -> None:
        if self.checkBoxUserCheckable and self._indicator().contains(event.position().toPoint()):
            unchecked = self._state() != Qt.CheckState.Checked
            self._setState(Qt.CheckState.Checked if unchecked else Qt.CheckState.Unchecked)
        else:
            super().mousePressEvent(event)

    def paintEvent(self, event: QtGui.QPaintEvent) -> None:
        super().paintEvent(event)
        painter, style = QtWidgets.QStylePainter(self), self.style()
        option = QtWidgets.QStyleOptionButton()
        option.initFrom(self)
        option.rect = self._indicator()
        checked = self._state() == Qt.CheckState.Checked
        option.state |= style.StateFlag.State_On if checked else style.StateFlag.State_Off
        painter.drawPrimitive(style.PrimitiveElement.PE_IndicatorCheckBox, option)


class ctkMenuButton(QtWidgets.QPushButton):
    """A push button with a separate arrow that opens its menu."""

    _ARROW = 20

    def __init__(self, *arguments: Any) -> None:
        text, parent = _text_and_parent(arguments)
        super().__init__(text, parent)

    def mousePressEvent(self, event: QtGui.QMouseEvent) -> None:
        if self.menu() and event.position().x() < self.width - self._ARROW:
            menu = self.menu()
            self.setMenu(None)  # Qt would open it for a click anywhere
            super().mousePressEvent(event)
            self.setMenu(menu)
        else:
            super().mousePressEvent(event)


@flags(ShowAlphaChannel=0x1, NoButtons=0x2, DontUseNativeDialog=0x4, UseCTKColorDialog=0xC)
class ctkColorPickerButton(QtWidgets.QPushButton):
    """A button that shows a color and lets the user choose another."""

    colorChanged = Signal(QtGui.QColor)
    colorNameChanged = Signal(str)

    def __init__(self, *arguments: Any) -> None:
        text, parent = _text_and_parent(arguments)
        super().__init__(text, parent)
        self._color = next((item for item in arguments if isinstance(item, QtGui.QColor)), QtGui.QColor(0, 0, 0))
        self._colorName = self._color.name()
        self.setCheckable(True)
        self.toggled.connect(self._onToggled)
        self._showColor()

    color = computed(QtGui.QColor, "_color", "setColor")
    colorName = computed(str, "_colorName", "_setColorName")
    displayColorName = stored(bool, "displayColorName", True, "_showColor")
    dialogOptions = stored(int, "dialogOptions", 0)

    def setColor(self, color: QtGui.QColor) -> None:
        color = QtGui.QColor(color)
        if color == self._color:
            return
        self._color = color
        self._colorName = color.name()
        self._showColor()
        self.colorChanged.emit(color)
        self.colorNameChanged.emit(self._colorName)

    def _setColorName(self, name: str) -> None:
        if name != self._colorName:
            self._colorName = name
            self._showColor()
            self.colorNameChanged.emit(name)

    def setDisplayColorName(self, displayColorName: bool) -> None:
        self.displayColorName = displayColorName

    def _showColor(self) -> None:
        picture = QtGui.QPixmap(self.iconSize)
        picture.fill(self._color)
        self.setIcon(QtGui.QIcon(picture))
        if self.displayColorName:
            self.setText(self._colorName)

    def _onToggled(self, checked: bool) -> None:
        if checked:
            self.changeColor()
            self.setChecked(False)

    def changeColor(self) -> None:
        options = QtWidgets.QColorDialog.ColorDialogOption(self.dialogOptions & 0x7)
        color = QtWidgets.QColorDialog.getColor(self._color, self, self.toolTip, options)
        if color.isValid():
            self.setColor(color)


# -- text -------------------------------------------------------------------------------------------------------------


class ctkMessageBox(QtWidgets.QMessageBox):
    """A message box that the user may ask not to see again; it then answers itself."""

    _ASK = int(QtWidgets.QMessageBox.ButtonRole.InvalidRole)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._box = QtWidgets.QCheckBox("Don't show this message again")
        self._box.setParent(self)
        self._box.hide()
        self._key = ""
        self._roles = [QtWidgets.QMessageBox.ButtonRole.AcceptRole]
        self.finished.connect(self._remember)

    dontShowAgain = computed(bool, "_box.checked", "setDontShowAgain")
    dontShowAgainSettingsKey = computed(str, "_key", "_setKey")
    dontShowAgainVisible = computed(bool, lambda self: not self._box.isHidden(), "_setBoxVisible")
    dontShowAgainButtonRoles = computed(
        "QVariantList", lambda self: list(self._roles), lambda self, value: setattr(self, "_roles", list(value))
    )

    def _saved(self) -> int:
        return int(QtCore.QSettings().value(self._key, self._ASK)) if self._key else self._ASK

    def _setKey(self, key: str) -> None:
        self._key = key
        self._box.setChecked(self._saved() != self._ASK)
        self._setBoxVisible(bool(key))

    def _setBoxVisible(self, visible: bool) -> None:
        if visible:
            self.setCheckBox(self._box)
        self._box.setVisible(visible)

    def setDontShowAgain(self, dontShow: bool) -> None:
        self._box.setChecked(dontShow)

    def addDontShowAgainButtonRole(self, role: int) -> None:
        self._roles.append(QtWidgets.QMessageBox.ButtonRole(role))

    def _remember(self, _result: int) -> None:
        button = self.clickedButton()
        if self._key and button is not None and self.buttonRole(button) in self._roles:
            answer = int(self.standardButton(button)) or int(self.buttonRole(button))
            QtCore.QSettings().setValue(self._key, answer if self._box.checked else self._ASK)

    def _automaticButton(self) -> Any:
        """The button that answers for the user, when he has asked for that."""
        if not self._box.checked:
            return None
        if not self.buttons():
            self.addButton(QtWidgets.QMessageBox.StandardButton.Ok)
        saved = self._saved()
        accept = QtWidgets.QMessageBox.ButtonRole.AcceptRole
        for button in self.buttons():
            if saved in (int(self.standardButton(button)), int(self.buttonRole(button))):
                return button
        return next((button for button in self.buttons() if self.buttonRole(button) == accept), None)

    def setVisible(self, visible: bool) -> None:
        button = self._automaticButton() if visible else None
        if button is not None:
            self.setAttribute(Qt.WidgetAttribute.WA_DontShowOnScreen, True)
            QtCore.QTimer.singleShot(0, button.click)
        super().setVisible(visible)


class ctkFittedTextBrowser(QtWidgets.QTextBrowser):
    """Rich text as high as it is, with a first line that a link unfolds."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._source: tuple[str, bool] | None = None  # (text, is HTML)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Ignored, QtWidgets.QSizePolicy.Policy.Preferred)
        self.setOpenLinks(False)
        self.textChanged.connect(self.updateGeometry)
        super().anchorClicked.connect(self._onAnchor)

    disableMouseScroll = stored(bool, "disableMouseScroll", False)
    collapsed = stored(bool, "collapsed", True, "_showText")
    showDetailsText = stored(str, "showDetailsText", "Show details.", "_showText")
    hideDetailsText = stored(str, "hideDetailsText", "Hide details.", "_showText")

    def collapsibleText(self) -> str:
        return self._source[0] if self._source else ""

    def setCollapsibleText(self, text: str) -> None:
        self._setSource(text, "<html>" in text)

    def setCollapsibleHtml(self, text: str) -> None:
        self._setSource(text, True)

    def setCollapsiblePlainText(self, text: str) -> None:
        self._setSource(text, False)

    def _setSource(self, text: str, html: bool) -> None:
        self._source = (text, html)
        self._showText()

    def _showText(self) -> None:
        if self._source is None:
            return
        text, html = self._source
        teaser, separator, details = text.partition("<br>" if html else "\n")
        if not separator:
            self.setHtml(text)
            return
        link = ("more", self.showDetailsText) if self.collapsed else ("less", self.hideDetailsText)
        shown = teaser + "&hellip;" if self.collapsed else teaser + details
        self.setHtml(f'{shown if html else shown.replace(chr(10), "<br>")} <a href="#{link[0]}">{link[1]}</a>')

    def _onAnchor(self, url: QtCore.QUrl) -> None:
        if url.path() == "" and url.fragment() in ("more", "less"):
            self.collapsed = url.fragment() == "less"

    def heightForWidth(self, width: int) -> int:
        document = self.document.clone()
        frame = 2 * self.frameWidth
        document.setTextWidth(width - frame)
        return int(document.size.height()) + frame

    def resizeEvent(self, event: QtGui.QResizeEvent) -> None:
        super().resizeEvent(event)
        height = self.heightForWidth(self.width)
        if self.minimumHeight != height:
            self.setMinimumHeight(height)

    def wheelEvent(self, event: QtGui.QWheelEvent) -> None:
        event.ignore() if self.disableMouseScroll else super().wheelEvent(event)


#: Name of the class in CTK -> its stand-in.
CLASSES: dict[str, type] = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and cls.__name__.startswith("ctk")
}
