"""The Qt side of the test host: PythonQt's manners, stand-ins for CTK and MRML widgets, and that mistakes fail."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("PySide6") is None:  # not imported here: the host sets its options first
    pytest.skip("PySide6 is not installed: pip install -e '.[host]'", allow_module_level=True)
slicer = pytest.importorskip("slicer", reason="slicer-core is not installed: pip install -e '.[host]'")

_REPOSITORY = Path(__file__).resolve().parents[2]
_UI_FILES = sorted(_REPOSITORY.glob("LCTfound/*/Resources/UI/*.ui"))
_SOURCES = sorted(_REPOSITORY.glob("LCTfound/*/*.py"))


@pytest.fixture
def qt(host):
    import qt

    return qt


@pytest.fixture
def ctk(host):
    import ctk

    return ctk


@pytest.fixture
def scene(host):
    return slicer.mrmlScene


class Received(list):
    """Collects what a signal sends."""

    def of(self, sender, signal: str) -> Received:
        assert sender.connect(signal, self.take)
        return self

    def take(self, *arguments) -> None:
        self.append(arguments[0] if len(arguments) == 1 else arguments)


# -- PythonQt's manners ----------------------------------------------------------------------------------------------


def test_properties_are_attributes(qt) -> None:
    button = qt.QPushButton("Go")
    assert button.text == "Go" and button.enabled and not button.checkable
    button.text, button.enabled, button.checkable = "Stop", False, True
    assert button.text == "Stop" and not button.isEnabled() and button.isCheckable()
    with pytest.raises(TypeError, match="not callable"):
        button.text()


def test_widgets_made_by_qt_itself_obey_too(qt) -> None:
    box = qt.QDialogButtonBox(qt.QDialogButtonBox.Ok)
    button = box.button(qt.QDialogButtonBox.Ok)
    assert button.text.replace("&", "") == "OK"
    with pytest.raises(AttributeError, match="txt"):
        button.txt = "no"
    clicks = Received().of(button, "clicked()")
    button.click()
    assert len(clicks) == 1


@pytest.mark.parametrize("name", ["txt", "tooltip", "_private", "Enabled"])
def test_a_misspelt_property_cannot_be_set_or_read(qt, name) -> None:
    label = qt.QLabel()
    with pytest.raises(AttributeError, match=name):
        setattr(label, name, "x")
    with pytest.raises(AttributeError, match=name):
        getattr(label, name)
    assert not hasattr(label, name)


def test_methods_signals_and_read_only_properties_cannot_be_replaced(qt) -> None:
    label = qt.QLabel()
    for name in ("setText", "linkActivated"):
        with pytest.raises(AttributeError, match="cannot be replaced"):
            setattr(label, name, print)
    with pytest.raises(AttributeError, match="read-only"):
        label.width = 3


def test_a_value_of_the_wrong_kind_is_refused(qt) -> None:
    label = qt.QLabel()
    with pytest.raises(TypeError):
        label.alignment = "left"
    with pytest.raises(TypeError):
        label.geometry = 3


def test_classes_written_in_python_may_have_attributes_of_their_own(qt) -> None:
    class Panel(qt.QDialog):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

    panel = Panel()
    panel.count += 1
    panel.windowTitle = "Panel"
    assert panel.count == 1 and panel.windowTitle == "Panel"


def test_enum_values_are_ints_under_their_flat_names(qt) -> None:
    assert qt.Qt.AlignLeft | qt.Qt.AlignTop == 0x21 and isinstance(qt.QMessageBox.Ok, int)
    assert qt.Qt.Checked == 2 and qt.Qt.UserRole + 1 == 257
    label = qt.QLabel()
    label.alignment = 0x21
    assert label.alignment == qt.Qt.AlignLeft | qt.Qt.AlignTop


def test_dynamic_properties_and_named_children_are_attributes(qt) -> None:
    parent = qt.QWidget()
    child = qt.QLabel("x", parent)
    child.name = "note"
    assert parent.note is child and child.objectName == "note" and child.className() == "QLabel"
    child.setProperty("SlicerParameterName", "input")
    assert child.SlicerParameterName == "input"
    child.SlicerParameterName = "output"
    assert child.property("SlicerParameterName") == "output"


def test_signals_are_connected_by_signature_and_give_as_many_arguments_as_are_taken(qt) -> None:
    button = qt.QPushButton()
    button.checkable = True
    with_value, without = [], []

    def take(checked, more="default"):
        with_value.append((checked, more))

    button.connect("clicked(bool)", take)
    button.connect("clicked(bool)", lambda: without.append("clicked"))
    button.connect("toggled( bool )", lambda *all: without.append(all))
    button.click()
    assert with_value == [(True, "default")] and sorted(map(str, without)) == ["(True,)", "clicked"]
    assert button.disconnect("clicked(bool)", take)
    assert not button.disconnect("clicked(bool)", take)
    button.click()
    assert len(with_value) == 1 and len(without) == 4


def test_methods_stay_connected_although_nobody_else_holds_their_object(qt) -> None:
    received: list[str] = []

    class Owner:
        def clicked(self) -> None:
            received.append("clicked")

    button = qt.QPushButton()
    button.connect("clicked()", Owner().clicked)
    gc.collect()
    button.click()
    assert received == ["clicked"]


def test_methods_of_widgets_can_be_connected_to_attributes(qt, scene) -> None:
    """`signal.connect(widget.method)`, as PythonQt has it besides."""
    root, selector = slicer.qMRMLWidget(), slicer.qMRMLNodeComboBox()
    root.mrmlSceneChanged.connect(selector.setMRMLScene)
    root.setMRMLScene(scene)
    assert selector.mrmlScene() is scene


def test_a_signal_goes_to_the_slot_of_another_object(qt) -> None:
    box, label = qt.QLineEdit(), qt.QLabel()
    box.connect("textChanged(QString)", label, "setText(QString)")
    box.text = "hello"
    assert label.text == "hello"


@pytest.mark.parametrize("signal", ["clickd()", "clicked(int)", "valueChanged(int)", "clicked"])
def test_an_unknown_signal_fails(qt, signal) -> None:
    from host.qt_compat import UnknownSignal

    button = qt.QPushButton()
    with pytest.raises(UnknownSignal, match="QPushButton has no signal"):
        button.connect(signal, print)
    with pytest.raises(UnknownSignal):
        button.disconnect(signal, print)


def test_signals_that_qt_5_does_not_have_fail(qt) -> None:
    with pytest.raises(AttributeError):
        qt.QCheckBox().connect("checkStateChanged(Qt::CheckState)", print)


def test_connections_end_with_the_object(qt) -> None:
    from host import qt_compat

    button = qt.QPushButton()
    before = len(qt_compat._connections)
    button.connect("clicked()", lambda: None)
    assert len(qt_compat._connections) == before + 1
    button.delete()
    assert len(qt_compat._connections) == before


def test_timers_have_the_static_and_the_property(qt) -> None:
    shots: list[str] = []
    qt.QTimer.singleShot(0, lambda: shots.append("static"))
    timer = qt.QTimer()
    timer.singleShot, timer.interval = True, 0
    timer.connect("timeout()", lambda: shots.append("timer"))
    timer.start()
    assert timer.singleShot and timer.active
    for _ in range(100):
        qt.QCoreApplication.processEvents()
    assert sorted(shots) == ["static", "timer"] and not timer.active


def test_static_dialogs_answer_with_the_bare_value(qt) -> None:
    from host.dialogs import answering

    def type_name(dialog) -> None:
        dialog.setTextValue("left lung")
        dialog.accept()

    with answering(type_name) as texts:
        assert qt.QInputDialog.getText(None, "Rename", "New name:") == "left lung"
    assert texts == ["New name:"]
    with answering(lambda dialog: dialog.reject()):
        assert qt.QInputDialog.getText(None, "Rename", "New name:") == ""
    with answering(lambda dialog: dialog.button(qt.QMessageBox.No).click()) as texts:
        assert qt.QMessageBox.question(None, "?", "Really?") == qt.QMessageBox.No
    assert texts == ["Really?"]


def test_a_dialog_that_nobody_answers_does_not_hang(qt) -> None:
    from host.dialogs import answering

    with answering(lambda dialog: None):
        assert qt.QDialog().exec_() == qt.QDialog.Rejected


def test_lists_are_tuples_as_in_slicer(scene) -> None:
    box = slicer.qMRMLNodeComboBox()
    box.nodeTypes = ("vtkMRMLScalarVolumeNode", "vtkMRMLModelNode")
    assert box.nodeTypes == ("vtkMRMLScalarVolumeNode", "vtkMRMLModelNode")


def test_names_that_pythonqt_does_not_have_are_not_there(qt) -> None:
    assert not {"SIGNAL", "SLOT", "QEnum", "QWebEngineView"} & set(dir(qt))
    with pytest.raises(AttributeError):
        qt.QLable  # noqa: B018


def test_tree_and_text_widgets_work_as_panels_use_them(qt) -> None:
    tree = qt.QTreeWidget()
    item = qt.QTreeWidgetItem(tree, ["Right lung", "2.1"])
    item.setData(0, qt.Qt.UserRole + 1, "key")
    changed = Received().of(tree, "itemChanged(QTreeWidgetItem*,int)")
    item.setCheckState(0, qt.Qt.Checked)
    assert tree.topLevelItemCount == 1 and item.text(1) == "2.1" and item.data(0, 257) == "key"
    assert changed == [(item, 0)]
    log = qt.QPlainTextEdit()
    log.appendPlainText("one")
    log.plainText += "\ntwo"
    assert log.plainText == "one\ntwo"
    box = qt.QComboBox()
    box.addItem("Fast", "fast")
    assert (box.count, box.currentText, box.currentData) == (1, "Fast", "fast")


# -- CTK -------------------------------------------------------------------------------------------------------------


def test_every_stand_in_opens_and_paints(qt, host) -> None:
    from host import ctk_widgets, mrml_widgets

    for name, cls in {**ctk_widgets.CLASSES, **mrml_widgets.CLASSES}.items():
        widget = cls()
        if hasattr(widget, "setMRMLScene"):
            widget.setMRMLScene(slicer.mrmlScene)
        widget.show()
        qt.QApplication.processEvents()
        assert not widget.grab().isNull(), name
        widget.delete()


def _another(value):
    """A value of the same kind that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "another"
    if isinstance(value, int | float):
        return value + 1
    return ("another",) if isinstance(value, tuple) else value


def test_every_property_of_a_stand_in_becomes_what_it_is_set_to(qt, host) -> None:
    """In its own class, by attribute and by setProperty, which .ui files use."""
    from host import ctk_widgets, mrml_widgets
    from host.qt_compat import properties

    # These ask for a node, an entry or an existing folder, or are enums without a further value.
    special = {"currentNodeID", "currentUserDataAsString", "currentNodeActive", "placeModeEnabled", "directory"}
    special |= {"dontShowAgainButtonRoles", "baseName", "spinBoxVisible", "setMode"}
    for cls in {**ctk_widgets.CLASSES, **mrml_widgets.CLASSES}.values():
        widget = cls()
        if hasattr(widget, "setMRMLScene"):
            widget.setMRMLScene(slicer.mrmlScene)
        inherited = set(properties(next(base for base in cls.__mro__ if base.__module__.startswith("PySide6"))))
        for name in sorted(n for n, writable in properties(cls).items() if writable and n not in inherited | special):
            for put in (lambda value: setattr(widget, name, value), lambda value: widget.setProperty(name, value)):  # noqa: B023
                value = _another(getattr(widget, name))
                put(value)
                if not isinstance(value, qt.QIcon):
                    assert getattr(widget, name) == value, f"{cls.__name__}.{name}"
        widget.delete()


def test_stand_ins_refuse_what_the_real_ones_do_not_have(qt, ctk, scene) -> None:
    button = ctk.ctkCollapsibleButton()
    for name in ("colapsed", "_secret"):
        with pytest.raises(AttributeError, match=name):
            setattr(button, name, True)
    with pytest.raises(AttributeError):
        button.setCollapsed(True)  # not a slot of the real one: PythonQt does not have it either
    with pytest.raises(AttributeError):
        slicer.qMRMLNodeComboBox().currentNodes()
    with pytest.raises(AttributeError):
        slicer.qMRMLNodeComboBox().connect("currentNodeChanged(PyObject)", print)
    assert not hasattr(ctk, "ctkNoSuchWidget")


def test_a_collapsible_button_hides_what_is_in_it_and_no_more(qt, ctk) -> None:
    button = ctk.ctkCollapsibleButton("Advanced")
    layout = qt.QVBoxLayout(button)
    shown, hidden = qt.QLabel("a"), qt.QLabel("b")
    layout.addWidget(shown)
    layout.addWidget(hidden)
    hidden.hide()
    button.show()
    height = button.sizeHint.height()
    changes = Received().of(button, "contentsCollapsed(bool)")
    button.collapsed = True
    assert not shown.visible and not button.checked and changes == [True] and button.maximumHeight < height
    shown.visible, hidden.visible = False, True  # while it is folded
    assert not hidden.visible
    button.checked = True
    assert not button.collapsed and not shown.visible and hidden.visible and changes == [True, False]


def test_a_slider_widget_limits_rounds_and_tracks(qt, ctk) -> None:
    slider = ctk.ctkSliderWidget()
    values = Received().of(slider, "valueChanged(double)")
    moving = Received().of(slider, "valueIsChanging(double)")
    slider.minimum, slider.maximum, slider.decimals = -10, 10, 1
    slider.value = 3.14159
    slider.value = 99
    slider.value = 99
    assert values == [pytest.approx(3.1), 10] and slider.value == 10 and moving == []
    slider.tracking = False
    handle = slider.findChild(qt.QSlider)
    handle.setSliderDown(True)
    handle.value = handle.minimum
    assert slider.value == 10 and moving == [-10]
    handle.setSliderDown(False)
    assert slider.value == -10 and values[-1] == -10


def test_a_range_widget_keeps_low_below_high(qt, ctk) -> None:
    widget = ctk.ctkRangeWidget()
    values = Received().of(widget, "valuesChanged(double,double)")
    widget.setRange(-1000, 400)
    widget.setValues(-900, -500)
    widget.minimumValue = -300
    assert values[-1] == (-300, -300) and widget.maximumValue == -300
    widget.maximum = -600
    assert (widget.minimumValue, widget.maximumValue) == (-600, -600)


def test_a_path_is_typed_browsed_and_remembered(qt, ctk, tmp_path, monkeypatch) -> None:
    line = ctk.ctkPathLineEdit()
    paths = Received().of(line, "currentPathChanged(QString)")
    line.filters = ctk.ctkPathLineEdit.Dirs | ctk.ctkPathLineEdit.Writable
    line.currentPath = "/somewhere"
    monkeypatch.setattr(qt.QFileDialog, "getExistingDirectory", lambda *_: str(tmp_path))
    line.browse()
    assert paths == ["/somewhere", str(tmp_path)] and line.currentPath == str(tmp_path)
    line.settingKey = f"Test/{tmp_path.name}"
    line.addCurrentPathToHistory()
    other = ctk.ctkPathLineEdit()
    other.settingKey = f"Test/{tmp_path.name}"
    assert other.currentPath == str(tmp_path)


def test_a_directory_button_tells_of_another_folder(qt, ctk, tmp_path) -> None:
    button = ctk.ctkDirectoryButton()
    folders = Received().of(button, "directoryChanged(QString)")
    button.directory = str(tmp_path)
    button.directory = str(tmp_path)
    assert folders == [str(tmp_path)] and button.directory == str(tmp_path)


def test_a_checkable_push_button_follows_its_box(qt, ctk) -> None:
    button = ctk.ctkCheckablePushButton("Apply")
    boxes = Received().of(button, "checkBoxToggled(bool)")
    button.checkState = qt.Qt.Checked
    assert button.checkable and not button.checked and boxes == [True]
    button.click()
    assert button.checked
    button.checkState = qt.Qt.Unchecked
    assert not button.checkable and not button.checked


def test_a_color_button_tells_of_another_color(qt, ctk) -> None:
    button = ctk.ctkColorPickerButton()
    colors = Received().of(button, "colorChanged(QColor)")
    button.color = qt.QColor(255, 0, 0)
    button.color = qt.QColor(255, 0, 0)
    assert [color.name() for color in colors] == ["#ff0000"] and button.text == "#ff0000"


def test_a_message_box_answers_itself_when_asked_to(qt, ctk, tmp_path) -> None:
    from host.dialogs import answering

    def box():
        message = ctk.ctkMessageBox()
        message.text = "Research use only."
        message.addButton(qt.QMessageBox.Ok)
        message.dontShowAgainSettingsKey = f"Test/{tmp_path.name}"
        return message

    def agree(dialog) -> None:
        dialog.dontShowAgain = True
        dialog.button(qt.QMessageBox.Ok).click()

    with answering(agree) as texts:
        assert box().exec_() == qt.QMessageBox.Ok
        assert box().exec_() == qt.QMessageBox.Ok
    assert texts == ["Research use only."]


def test_a_text_browser_unfolds(qt, ctk) -> None:
    text = ctk.ctkFittedTextBrowser()
    text.setCollapsibleText("First line\nmore\nand more")
    assert "and more" not in text.plainText
    text.collapsed = False
    assert "and more" in text.plainText and text.collapsibleText().startswith("First line")


def test_a_combo_box_chooses_by_user_data(qt, ctk) -> None:
    box = ctk.ctkComboBox()
    box.addItem("Lobe", "lobe")
    box.addItem("Segment", "segment")
    box.currentUserDataAsString = "segment"
    assert box.currentIndex == 1
    box.currentUserDataAsString = "nothing"
    assert box.currentIndex == -1


# -- nodes -----------------------------------------------------------------------------------------------------------


def _selector(scene, **properties):
    box = slicer.qMRMLNodeComboBox()
    box.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    for name, value in properties.items():
        setattr(box, name, value)
    box.setMRMLScene(scene)
    return box


def _volume(scene, name: str):
    return scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)


def test_a_node_selector_lists_the_nodes_of_its_type(scene) -> None:
    box = _selector(scene, noneEnabled=True)
    added = Received().of(box, "nodeAdded(vtkMRMLNode*)")
    volume = _volume(scene, "CT")
    scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Segmentation")
    hidden = scene.CreateNodeByClass("vtkMRMLScalarVolumeNode")
    hidden.UnRegister(None)
    hidden.SetHideFromEditors(True)
    scene.AddNode(hidden)
    assert box.nodeCount() == 1 and box.nodeFromIndex(0) is volume and added == [volume]
    assert box.currentNode() is None and box.currentNodeID == ""
    box.showHidden = True
    assert box.nodeCount() == 2
    hidden.SetHideFromEditors(False)
    box.showHidden = False
    assert box.nodeCount() == 2


def test_a_node_selector_tells_of_the_current_node_as_node_validity_and_id(scene) -> None:
    volume, box = _volume(scene, "CT"), _selector(scene, noneEnabled=True)
    nodes = Received().of(box, "currentNodeChanged(vtkMRMLNode*)")
    valid = Received().of(box, "currentNodeChanged(bool)")
    ids = Received().of(box, "currentNodeIDChanged(QString)")
    box.setCurrentNode(volume)
    box.setCurrentNode(volume)
    box.setCurrentNode(None)
    assert nodes == [volume, None] and valid == [True, False] and ids == [volume.GetID(), ""]
    box.currentNodeID = volume.GetID()
    assert box.currentNode() is volume
    with pytest.raises(TypeError):
        box.setCurrentNode("CT")


def test_a_node_selector_without_none_takes_the_first_node(scene) -> None:
    first, second = _volume(scene, "first"), _volume(scene, "second")
    assert _selector(scene).currentNode() is first
    box = _selector(scene)
    box.setCurrentNode(second)
    scene.RemoveNode(second)
    assert box.currentNode() is first


def test_a_node_selector_follows_the_scene(scene, host) -> None:
    box = _selector(scene, noneEnabled=True)
    volume = _volume(scene, "CT")
    box.setCurrentNode(volume)
    leaving = Received().of(box, "nodeAboutToBeRemoved(vtkMRMLNode*)")
    renamed = Received().of(box, "currentNodeChanged(bool)")
    volume.SetName("Other")
    assert renamed == [True] and box.findChild(type(box._combo)).currentText == "Other"
    scene.RemoveNode(volume)
    assert leaving == [volume] and box.currentNode() is None
    box.setCurrentNode(_volume(scene, "CT"))
    scene.Clear(0)
    assert box.currentNode() is None and box.nodeCount() == 0


def test_a_node_selector_loses_its_choice_when_a_scene_is_read(scene, tmp_path) -> None:
    """As the real one does: it takes all nodes out and in again, and knows none while the scene is being read."""
    kept, box = _volume(scene, "CT"), _selector(scene, noneEnabled=True)
    assert scene.WriteToMRB(str(tmp_path / "scene.mrb"))
    box.setCurrentNode(kept)
    nodes = Received().of(box, "currentNodeChanged(vtkMRMLNode*)")
    during = []
    tag = scene.AddObserver(scene.NodeAddedEvent, lambda *_: during.append(box.nodeCount()))
    assert slicer.util.loadScene(str(tmp_path / "scene.mrb"))
    scene.RemoveObserver(tag)
    assert box.nodeCount() == 2 and set(during) == {1}
    assert nodes == [None] and box.currentNode() is None


def test_a_node_selector_makes_renames_and_removes_nodes(scene) -> None:
    from host.dialogs import answering

    box = _selector(scene, noneEnabled=True, renameEnabled=True, baseName="Scan")
    made = Received().of(box, "nodeAddedByUser(vtkMRMLNode*)")
    node = box.addNode()
    assert node.GetName() == "Scan" and box.currentNode() is node and made == [node]
    combo = box.findChild(type(box._combo))

    def choose(text: str) -> None:
        row = combo.findText(text)
        assert row >= 0
        combo.setCurrentIndex(row)
        combo.activated.emit(row)

    with answering(lambda dialog: (dialog.setTextValue("Patient"), dialog.accept())):
        choose("Rename current Volume")
    assert node.GetName() == "Patient" and box.currentNode() is node
    choose("Create new Volume")
    assert box.nodeCount() == 2 and box.currentNode().GetName() == "Scan_1"
    choose("Delete current Volume")
    assert box.nodeCount() == 1
    box.addEnabled = False
    assert combo.findText("Create new Volume") == -1


def test_a_node_selector_filters_by_attribute(scene) -> None:
    box = _selector(scene, noneEnabled=True)
    box.addAttribute("vtkMRMLScalarVolumeNode", "Modality", "CT")
    volume = _volume(scene, "CT")
    assert box.nodeCount() == 0
    volume.SetAttribute("Modality", "MR")
    assert box.nodeCount() == 0
    volume.SetAttribute("Modality", "CT")
    assert box.nodeCount() == 1
    assert box.addNode().GetAttribute("Modality") == "CT"


def test_a_node_selector_remembers_a_node_until_it_has_a_scene(scene) -> None:
    _volume(scene, "first")
    volume = _volume(scene, "second")
    box = slicer.qMRMLNodeComboBox()
    box.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    assert not box.enabled
    box.setCurrentNode(volume)
    box.setMRMLScene(scene)
    assert box.currentNode() is volume and box.enabled


def test_widgets_that_are_gone_hear_no_more_of_the_scene(scene, qt) -> None:
    boxes = [_selector(scene) for _ in range(3)]
    volume = _volume(scene, "CT")
    boxes[0].delete()
    del boxes[1]
    gc.collect()
    volume.SetName("Other")
    _volume(scene, "more")
    assert boxes[-1].nodeCount() == 2


def test_checked_nodes(scene, qt) -> None:
    box = slicer.qMRMLCheckableNodeComboBox()
    box.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    box.setMRMLScene(scene)
    first, second = _volume(scene, "first"), _volume(scene, "second")
    changes = Received().of(box, "checkedNodesChanged()")
    box.check(second)
    assert box.checkedNodes() == (second,) and box.uncheckedNodes() == (first,) and len(changes) == 1
    first.SetName("renamed")
    assert box.checkState(second) == qt.Qt.Checked and not box.allChecked()


# -- segmentations ---------------------------------------------------------------------------------------------------


@pytest.fixture
def segmentation(scene):
    """Two cubes."""
    import numpy as np

    volume = slicer.util.addVolumeFromArray(np.zeros((12, 12, 12), np.int16), name="CT")
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    for n, key in enumerate(("right", "left")):
        node.GetSegmentation().AddEmptySegment(key, f"{key.title()} lung")
        array = np.zeros((12, 12, 12), np.uint8)
        array[2:10, 2:10, 1 + 5 * n : 5 + 5 * n] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(array, node, key, volume)
    return node


def test_the_segments_table_shows_and_changes_segments(segmentation, scene, qt) -> None:
    table = slicer.qMRMLSegmentsTableView()
    table.setMRMLScene(scene)
    table.setSegmentationNode(segmentation)
    model, display = table.model(), segmentation.GetDisplayNode()
    assert table.displayedSegmentIDs() == ("right", "left") and model.item(0, 3).text() == "Right lung"
    model.item(0, 0).setCheckState(qt.Qt.Unchecked)
    assert not display.GetSegmentVisibility("right")
    display.SetSegmentVisibility("right", True)
    assert model.item(0, 0).checkState() == qt.Qt.Checked
    model.item(1, 3).setText("Other lung")
    assert segmentation.GetSegmentation().GetSegment("left").GetName() == "Other lung"
    selections = Received().of(table, "selectionChanged(QItemSelection,QItemSelection)")
    table.setSelectedSegmentIDs(["left"])
    assert table.selectedSegmentIDs() == ("left",) and len(selections) == 1
    table.textFilter = "other"
    assert table.displayedSegmentIDs() == ("left",) and table.selectedSegmentIDs() == ("left",)
    segmentation.GetSegmentation().RemoveSegment("left")
    assert table.segmentCount == 0
    table.setSegmentationNode(None)
    table.textFilter = ""
    assert table.segmentCount == 0


def test_show_3d_makes_surfaces_and_removes_them(segmentation) -> None:
    button = slicer.qMRMLSegmentationShow3DButton()
    assert not button.enabled
    button.setSegmentationNode(segmentation)
    assert button.enabled and not button.checked
    button.click()
    surface = segmentation.GetSegmentation().GetSegment("left").GetRepresentation("Closed surface")
    assert surface.GetNumberOfCells() > 50
    segmentation.GetSegmentation().RemoveRepresentation("Closed surface")
    assert not button.checked
    button.locked = True
    assert not button.enabled


def test_a_segment_is_selected(segmentation, scene) -> None:
    widget = slicer.qMRMLSegmentSelectorWidget()
    chosen = Received().of(widget, "currentSegmentChanged(QString)")
    widget.setMRMLScene(scene)
    assert widget.currentNode() is segmentation and widget.currentSegmentID() == "right"
    widget.setCurrentSegmentID("left")
    segmentation.GetSegmentation().RemoveSegment("left")
    assert chosen == ["right", "left", "right"]
    widget.multiSelection = True
    several = Received().of(widget, "segmentSelectionChanged(QStringList)")
    widget.setSelectedSegmentIDs(["right", "no such segment"])
    assert widget.selectedSegmentIDs() == ("right",) and several == [("right",)]


# -- hierarchy, markups, tables --------------------------------------------------------------------------------------


def test_the_hierarchy_tree_shows_and_selects_items(scene, qt) -> None:
    tree = slicer.qMRMLSubjectHierarchyTreeView()
    tree.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    tree.setMRMLScene(scene)
    volume = _volume(scene, "CT")
    scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
    assert tree.displayedItemCount() == 1
    nodes = Received().of(tree, "currentNodeChanged(vtkMRMLNode*)")
    items = Received().of(tree, "currentItemChanged(vtkIdType)")
    tree.setCurrentNode(volume)
    item = scene.GetSubjectHierarchyNode().GetItemByDataNode(volume)
    assert nodes == [volume] and items == [item] and tree.currentItem() == item
    scene.RemoveNode(volume)
    assert tree.displayedItemCount() == 0 and tree.currentNode() is None and nodes == [volume, None]


def test_points_are_placed_by_the_modes_of_the_scene(scene) -> None:
    points = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Nodules")
    widget = slicer.qSlicerMarkupsPlaceWidget()
    widget.setMRMLScene(scene)
    placing = Received().of(widget, "activeMarkupsPlaceModeChanged(bool)")
    assert not widget.placeButton().enabled
    widget.setCurrentNode(points)
    widget.placeMultipleMarkups = slicer.qSlicerMarkupsPlaceWidget.ForcePlaceMultipleMarkups
    widget.placeButton().click()
    interaction, selection = widget.interactionNode(), widget.selectionNode()
    assert interaction.GetCurrentInteractionMode() == interaction.Place and interaction.GetPlaceModePersistence()
    assert selection.GetActivePlaceNodeID() == points.GetID() and placing == [True] and widget.placeModeEnabled
    interaction.SetCurrentInteractionMode(interaction.ViewTransform)  # by someone else
    assert not widget.placeModeEnabled and not widget.placeButton().checked and placing == [True, False]
    points.AddControlPoint(1, 2, 3)
    widget.deleteButton().click()
    assert points.GetNumberOfControlPoints() == 0


def test_the_simple_markups_widget_lists_points(scene) -> None:
    widget = slicer.qSlicerSimpleMarkupsWidget()
    widget.setMRMLScene(scene)
    points = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Nodules")
    widget.setCurrentNode(points)
    points.AddControlPoint(1, 2, 3, "apex")
    table = widget.tableWidget()
    assert [table.item(0, column).text() for column in range(4)] == ["apex", "1.000", "2.000", "3.000"]
    table.item(0, 3).setText("4.5")
    table.item(0, 0).setText("base")
    assert points.GetNthControlPointPosition(0) == (1, 2, 4.5) and points.GetNthControlPointLabel(0) == "base"


def test_a_table_is_shown_and_edited(scene) -> None:
    node = scene.AddNewNodeByClass("vtkMRMLTableNode", "Volumes")
    node.AddColumn().SetName("Lobe")
    node.AddEmptyRow()
    node.SetCellText(0, 0, "upper")
    view = slicer.qMRMLTableView()
    view.setMRMLTableNode(node)
    model = view.model()
    assert [model.item(row, 0).text() for row in range(2)] == ["Lobe", "upper"]
    model.item(1, 0).setText("lower")
    assert node.GetCellText(0, 0) == "lower"
    node.SetLocked(True)
    assert not model.item(1, 0).isEditable()
    view.transposed = view.firstColumnLocked = True
    assert model.rowCount() == 1 and view.isColumnHidden(0)


def test_a_slider_shows_the_unit_of_the_scene(scene) -> None:
    slider = slicer.qMRMLSliderWidget()
    slider.quantity = "length"
    slider.setMRMLScene(scene)
    unit = scene.GetNodeByID("vtkMRMLSelectionNodeSingleton").GetUnitNode("length")
    assert unit is not None and slider.suffix == unit.GetSuffix() and slider.decimals == unit.GetPrecision()


# -- .ui files -------------------------------------------------------------------------------------------------------

_UI = """<ui version="4.0"><class>Panel</class><widget class="qMRMLWidget" name="Panel">
<layout class="QVBoxLayout" name="layout"><item><widget class="{cls}" name="child">{properties}</widget></item>
<item><widget class="qMRMLNodeComboBox" name="selector"><property name="nodeTypes"><stringlist>
<string>vtkMRMLScalarVolumeNode</string></stringlist></property>
<property name="noneEnabled"><bool>true</bool></property>
<property name="SlicerParameterName" stdset="0"><string>input</string></property></widget></item></layout></widget>
<connections><connection><sender>{sender}</sender><signal>{signal}</signal><receiver>selector</receiver>
<slot>{slot}</slot></connection></connections></ui>"""
_SOUND = {"cls": "QLabel", "properties": "", "sender": "Panel", "signal": "mrmlSceneChanged(vtkMRMLScene*)"}
_SOUND |= {"slot": "setMRMLScene(vtkMRMLScene*)"}


def _ui(folder: Path, **parts: str) -> Path:
    path = folder / "Panel.ui"
    path.write_text(_UI.format(**{**_SOUND, **parts}), encoding="utf-8")
    return path


def _property(name: str, value: str, more: str = "") -> str:
    return f'<property name="{name}" {more}>{value}</property>'


def test_a_ui_file_becomes_widgets_with_their_properties_and_connections(host, scene, qt, tmp_path) -> None:
    value = _property("filters", "<set>ctkPathLineEdit::Dirs|ctkPathLineEdit::Writable</set>")
    root = slicer.util.loadUI(str(_ui(tmp_path, cls="ctkPathLineEdit", properties=value)))
    selector = root.findChild(qt.QObject, "selector")
    assert isinstance(root, slicer.qMRMLWidget) and root.child.filters == 0x21
    assert selector.nodeTypes == ("vtkMRMLScalarVolumeNode",) and selector.noneEnabled
    assert selector.SlicerParameterName == "input" and selector.mrmlScene() is None
    root.setMRMLScene(scene)
    assert selector.mrmlScene() is scene


def test_lines_headers_and_enums_of_qt_load(host, qt, tmp_path) -> None:
    line = _property("orientation", "<enum>Qt::Horizontal</enum>")
    assert slicer.util.loadUI(str(_ui(tmp_path, cls="Line", properties=line))).child.frameShape == qt.QFrame.HLine
    header = '<attribute name="headerVisible"><bool>false</bool></attribute>'
    mode = _property("selectionMode", "<enum>QAbstractItemView::ExtendedSelection</enum>")
    tree = slicer.util.loadUI(str(_ui(tmp_path, cls="QTreeWidget", properties=header + mode))).child
    assert tree.header().isHidden() and tree.selectionMode == qt.QAbstractItemView.ExtendedSelection


@pytest.mark.parametrize(
    ("parts", "error", "told"),
    [
        ({"cls": "ctkColapsibleButton"}, "UnknownWidget", "child.*ctkColapsibleButton"),
        ({"cls": "QLable"}, "UnknownWidget", "QLable"),
        ({"cls": "qMRMLUnheardOfWidget"}, "UnknownWidget", "qMRMLUnheardOfWidget"),
        (
            {"properties": _property("txt", "<string>a</string>")},
            "UnknownProperty",
            "child: QLabel has no property txt",
        ),
        (
            {"cls": "ctkCollapsibleButton", "properties": _property("colapsed", "<bool>1</bool>")},
            "UnknownProperty",
            "child: ctkCollapsibleButton has no property colapsed",
        ),
        (
            {"properties": _property("SlicerParameterNmae", "<string>a</string>", 'stdset="0"')},
            "UnknownProperty",
            "SlicerParameterNmae",
        ),
        (
            {"cls": "QTreeWidget", "properties": '<attribute name="headerVisibel"><bool>false</bool></attribute>'},
            "UnknownProperty",
            "headerVisibel",
        ),
        ({"properties": _property("width", "<number>1</number>")}, "UnknownProperty", "read-only"),
        (
            {"cls": "ctkPathLineEdit", "properties": _property("filters", "<set>ctkPathLineEdit::Nothing</set>")},
            "UnknownProperty",
            "Nothing",
        ),
        ({"signal": "mrmlSceneChange(vtkMRMLScene*)"}, "UnknownConnection", "no such signal"),
        ({"slot": "setScene(vtkMRMLScene*)"}, "UnknownConnection", "no slot setScene"),
        ({"sender": "Pannel"}, "UnknownConnection", "no object Pannel"),
    ],
)
def test_a_ui_file_with_a_mistake_fails(host, tmp_path, parts, error, told) -> None:
    from host import ui_loader

    with pytest.raises(getattr(ui_loader, error), match=told):
        ui_loader.load_ui(_ui(tmp_path, **parts))


@pytest.mark.parametrize("path", _UI_FILES, ids=lambda path: path.stem)
def test_the_panels_files_load_with_every_value_they_give(host, qt, path) -> None:
    """Each bool, number and string of the file is what the widget says afterwards."""
    from xml.etree import ElementTree

    from host.ui_loader import load_ui

    root = load_ui(path)
    kinds = {"bool": lambda text: text == "true", "number": int, "double": float, "string": lambda text: text or ""}
    for element in ElementTree.parse(path).iter("widget"):
        name = element.get("name")
        widget = root if root.objectName == name else root.findChild(qt.QObject, name)
        for entry in element.findall("property"):
            value = entry[0]
            if value.tag in kinds:
                found = widget.property(entry.get("name"))
                assert found == kinds[value.tag](value.text), f"{name}.{entry.get('name')}"


# -- reading sources -------------------------------------------------------------------------------------------------


def _findings(tmp_path: Path, line: str) -> list[str]:
    from host.strict import unknown_names_in_source

    source = tmp_path / "Panel.py"
    head = "import ctk\nimport qt\nimport slicer\n\n\nclass PanelWidget:\n    def setup(self):\n"
    made = "        self.button = qt.QPushButton()\n        box = ctk.ctkComboBox()\n"
    source.write_text(f"{head}{made}        {line}\n", encoding="utf-8")
    return unknown_names_in_source(source, [_ui(tmp_path)])


@pytest.mark.parametrize(
    "line",
    [
        "self.ui.child.text = box.currentText",
        "self.ui.child.setText('x')",
        "self.ui.selector.connect('currentNodeChanged(vtkMRMLNode*)', self.changed)",
        "self.ui.selector.setCurrentNode(self.ui.selector.currentNode())",
        "self.button.connect('clicked(bool)', self.changed)",
        "self.button.setVisible(qt.Qt.AlignLeft | qt.QSizePolicy.Expanding)",
        "slicer.util.arrayFromVolume(slicer.vtkMRMLScalarVolumeNode())",
        "box = object(); box.whatever()",
    ],
)
def test_sound_lines_are_accepted(host, tmp_path, line) -> None:
    assert _findings(tmp_path, line) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("self.ui.chld.text = ''", "no .ui file has a widget chld"),
        ("self.ui.child.txt = ''", "QLabel has no property to set called txt"),
        ("print(self.ui.child.toolTipp)", "QLabel has no toolTipp"),
        ("self.ui.child.width = 3", "QLabel has no property to set called width"),
        ("print(self.ui.child.text())", "text of QLabel is a property, not a method"),
        ("self.ui.selector.connect('currentNodeChange(vtkMRMLNode*)', print)", "has no signal currentNodeChange"),
        ("self.ui.selector.nodes()", "qMRMLNodeComboBox has no nodes"),
        ("self.button.connect('clickd()', print)", "QPushButton has no signal clickd()"),
        ("self.button.txt = ''", "QPushButton has no property to set called txt"),
        ("box.curentText", "ctkComboBox has no curentText"),
        ("qt.QLable()", "qt has no QLable"),
        ("ctk.ctkCollapsableButton()", "ctk has no ctkCollapsableButton"),
        ("print(qt.Qt.AlignLeftish)", "qt.Qt has no AlignLeftish"),
        ("print(qt.Qt.AlignmentFlag.AlignLeft)", "qt.Qt.AlignLeft only"),
        ("slicer.vtkMRMLScalerVolumeNode()", "slicer has no vtkMRMLScalerVolumeNode"),
        ("slicer.util.arrayFromVolumes(None)", "util has no arrayFromVolumes"),
    ],
)
def test_mistakes_in_a_source_are_found(host, tmp_path, line, told) -> None:
    (found,) = _findings(tmp_path, line)
    assert told in found and found.startswith("Panel.py:10:")


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: path.stem)
def test_the_panels_sources_use_only_what_exists(host, path) -> None:
    from host.strict import unknown_names_in_source

    assert unknown_names_in_source(path, _UI_FILES) == []
