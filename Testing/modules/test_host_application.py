"""The test host itself: a made-up module runs through it as it would through Slicer."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

pytestmark = pytest.mark.alone

slicer = pytest.importorskip("slicer", reason="slicer-core is not installed: pip install -e '.[host]'")
import vtk  # noqa: E402

_MODULE = """
import enum
import pathlib

import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import parameterNodeWrapper, WithinRange
from slicer.ScriptedLoadableModule import *
from slicer.util import VTKObservationMixin
from typing import Annotated

calls = []


class Speed(enum.Enum):
    SLOW = 1
    FAST = 2

    def label(self):
        return self.name.lower()


class HostDemo(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("Host demo")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.helpText = "Help." + self.getDefaultModuleDocumentationLink()
        slicer.app.connect("startupCompleted()", lambda: calls.append("startup"))


@parameterNodeWrapper
class HostDemoParameterNode:
    inputVolume: vtkMRMLScalarVolumeNode
    result: vtkMRMLSegmentationNode
    threshold: Annotated[float, WithinRange(-100, 500)] = 100.0
    count: int = 3
    invert: bool = False
    label: str = "demo"
    speed: Speed = Speed.FAST
    folder: pathlib.Path


class HostDemoWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._tag = None

    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        calls.append("setup")
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/HostDemo.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = HostDemoLogic()
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        # A scene's parameters are read before the nodes they refer to: only now can the selectors show them.
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneEndClose)
        self.ui.applyButton.connect("clicked(bool)", self.onApplyButton)
        self.initializeParameterNode()

    def cleanup(self):
        calls.append("cleanup")
        self.removeObservers()

    def enter(self):
        calls.append("enter")
        self.initializeParameterNode()

    def exit(self):
        calls.append("exit")
        self.setParameterNode(None)

    def onSceneStartClose(self, caller, event):
        self.setParameterNode(None)

    def onSceneEndClose(self, caller, event):
        if self.parent.isEntered:
            self.initializeParameterNode()

    def initializeParameterNode(self):
        self.setParameterNode(self.logic.getParameterNode())

    def setParameterNode(self, node):
        if self._parameterNode:
            self._parameterNode.disconnectGui(self._tag)
            self.removeObserver(self._parameterNode, vtk.vtkCommand.ModifiedEvent, self._checkCanApply)
        self._parameterNode = node
        if node:
            self._tag = node.connectGui(self.ui)
            self.addObserver(node, vtk.vtkCommand.ModifiedEvent, self._checkCanApply)
            self._checkCanApply()

    def _checkCanApply(self, caller=None, event=None):
        self.ui.applyButton.enabled = self._parameterNode.inputVolume is not None

    def onApplyButton(self):
        with slicer.util.tryWithErrorDisplay(_("Failed."), waitCursor=True):
            node = self._parameterNode
            node.result = self.logic.process(node.inputVolume, node.threshold)


class HostDemoLogic(ScriptedLoadableModuleLogic):
    def getParameterNode(self):
        return HostDemoParameterNode(super().getParameterNode())

    def process(self, volume, threshold):
        import numpy as np

        mask = slicer.util.arrayFromVolume(volume) > threshold
        segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Result")
        segmentation.CreateDefaultDisplayNodes()
        segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        segmentation.GetSegmentation().AddEmptySegment("above", "Above")
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask.astype(np.uint8), segmentation, "above", volume)
        segmentation.CreateClosedSurfaceRepresentation()
        return segmentation


class HostDemoTest(ScriptedLoadableModuleTest):
    def runTest(self):
        self.setUp()
        self.test_process()

    def test_process(self):
        import numpy as np

        array = np.zeros((8, 9, 10), np.int16)
        array[2:6, 2:6, 2:6] = 300
        volume = slicer.util.addVolumeFromArray(array)
        segmentation = HostDemoLogic().process(volume, 100)
        self.delayDisplay("Segmented")
        found = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, "above", volume)
        self.assertEqual(int(found.sum()), 64)
"""

_UI = """<?xml version="1.0" encoding="UTF-8"?>
<ui version="4.0">
 <class>HostDemo</class>
 <widget class="qMRMLWidget" name="HostDemo">
  <layout class="QVBoxLayout">
   <item>
    <widget class="ctkCollapsibleButton" name="inputsButton">
     <property name="text"><string>Inputs</string></property>
     <layout class="QFormLayout">
      <item row="0" column="0"><widget class="QLabel" name="ctLabel"/></item>
      <item row="0" column="1">
       <widget class="qMRMLNodeComboBox" name="inputSelector">
        <property name="nodeTypes"><stringlist><string>vtkMRMLScalarVolumeNode</string></stringlist></property>
        <property name="addEnabled"><bool>false</bool></property>
        <property name="noneEnabled"><bool>true</bool></property>
        <property name="SlicerParameterName" stdset="0"><string>inputVolume</string></property>
       </widget>
      </item>
      <item row="1" column="1">
       <widget class="ctkSliderWidget" name="thresholdSlider">
        <property name="SlicerParameterName" stdset="0"><string>threshold</string></property>
       </widget>
      </item>
      <item row="2" column="1">
       <widget class="QSpinBox" name="countBox">
        <property name="SlicerParameterName" stdset="0"><string>count</string></property>
       </widget>
      </item>
      <item row="3" column="1">
       <widget class="QCheckBox" name="invertBox">
        <property name="text"><string>Invert</string></property>
        <property name="SlicerParameterName" stdset="0"><string>invert</string></property>
       </widget>
      </item>
      <item row="4" column="1">
       <widget class="QLineEdit" name="labelEdit">
        <property name="SlicerParameterName" stdset="0"><string>label</string></property>
       </widget>
      </item>
      <item row="5" column="1">
       <widget class="QComboBox" name="speedBox">
        <property name="SlicerParameterName" stdset="0"><string>speed</string></property>
       </widget>
      </item>
      <item row="6" column="1">
       <widget class="ctkPathLineEdit" name="folderEdit">
        <property name="SlicerParameterName" stdset="0"><string>folder</string></property>
       </widget>
      </item>
     </layout>
    </widget>
   </item>
   <item>
    <widget class="QPushButton" name="applyButton">
     <property name="enabled"><bool>false</bool></property>
     <property name="text"><string>Apply</string></property>
    </widget>
   </item>
  </layout>
 </widget>
 <customwidgets>
  <customwidget><class>qMRMLWidget</class><extends>QWidget</extends><header>qMRMLWidget.h</header></customwidget>
  <customwidget><class>qMRMLNodeComboBox</class><extends>QWidget</extends><header>qMRMLNodeComboBox.h</header></customwidget>
  <customwidget><class>ctkCollapsibleButton</class><extends>QWidget</extends><header>ctkCollapsibleButton.h</header></customwidget>
  <customwidget><class>ctkSliderWidget</class><extends>QWidget</extends><header>ctkSliderWidget.h</header></customwidget>
  <customwidget><class>ctkPathLineEdit</class><extends>QWidget</extends><header>ctkPathLineEdit.h</header></customwidget>
 </customwidgets>
 <resources/>
 <connections>
  <connection>
   <sender>HostDemo</sender><signal>mrmlSceneChanged(vtkMRMLScene*)</signal>
   <receiver>inputSelector</receiver><slot>setMRMLScene(vtkMRMLScene*)</slot>
  </connection>
 </connections>
</ui>
"""


@pytest.fixture(scope="session")
def demoFile(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("module") / "HostDemo"
    (folder / "Resources" / "UI").mkdir(parents=True)
    (folder / "HostDemo.py").write_text(textwrap.dedent(_MODULE))
    (folder / "Resources" / "UI" / "HostDemo.ui").write_text(_UI)
    return folder / "HostDemo.py"


@pytest.fixture
def demo(host, demoFile):
    """The made-up module, freshly loaded."""
    module = host.load_module(demoFile)
    yield module
    if host.moduleManager.isLoaded("HostDemo"):
        host.moduleManager.unload("HostDemo")


@pytest.fixture
def window(host):
    yield host.open_window(1000, 700)
    host.close_window()


def _box(name: str = "CT") -> Any:
    """A volume of 2 x 3 x 4 mm voxels with a bright box, not centered, and its mask."""
    array = np.full((20, 24, 28), -1000, np.int16)
    array[4:12, 6:18, 8:20] = 300
    affine = np.diag([-2.0, -3.0, 4.0, 1.0])
    affine[:3, 3] = 40, 50, -60
    return slicer.util.addVolumeFromArray(array, affine, name=name)


def _segmented(volume: Any) -> Any:
    mask = (slicer.util.arrayFromVolume(volume) > 0).astype(np.uint8)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "Box")
    node.CreateDefaultDisplayNodes()
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    node.GetSegmentation().AddEmptySegment("box", "Box", (0.9, 0.2, 0.1))
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, node, "box", volume)
    node.CreateClosedSurfaceRepresentation()
    return node


def _surface(segmentation: Any, segment: str = "box") -> Any:
    surface = vtk.vtkPolyData()
    segmentation.GetClosedSurfaceRepresentation(segment, surface)
    return surface


# -- application -------------------------------------------------------------------------------------------------------


def test_core_modules_have_their_real_logics(host):
    names = "segmentations volumes terminologies colors models markups tables plots transforms".split()
    for name in [*names, "subjecthierarchy", "volumerendering"]:
        assert getattr(slicer.modules, name).logic().IsA("vtkMRMLAbstractLogic"), name
    assert slicer.util.getModuleLogic("Segmentations") is slicer.modules.segmentations.logic()


def test_application_is_the_host_and_says_so(host):
    assert slicer.app.mrmlScene() is slicer.mrmlScene
    assert slicer.app.applicationLogic().GetMRMLScene() is slicer.mrmlScene
    assert (slicer.app.majorVersion, slicer.app.minorVersion) == (5, 12)
    assert slicer.app.testingEnabled()
    assert slicer.app.layoutManager() is None and slicer.util.mainWindow() is None
    assert "host" in slicer.app.applicationName


def test_temporary_folder_and_settings_stay_in_the_host(host):
    import qt

    assert Path(slicer.util.tempDirectory()).is_relative_to(host.folder)
    qt.QSettings().setValue("LCTfound/test", 7)
    assert int(slicer.util.settingsValue("LCTfound/test", 0, converter=int)) == 7
    assert Path(slicer.app.slicerUserSettingsFilePath).is_relative_to(host.folder)


def test_messages_do_not_wait_for_an_answer_under_testing(host):
    start = time.monotonic()
    slicer.util.errorDisplay("Nothing is wrong.")
    slicer.util.confirmYesNoDisplay("Really?")
    assert time.monotonic() - start < 1.0


def test_none_outlives_more_calls_than_python_has_references_to_it(host):
    """PySide6 6.12.0 on Python 3.11 would end this process."""
    import qt

    label = qt.QLabel()
    for _ in range(100_000):
        label.setText("x")
    assert sys.getrefcount(None) > 10_000


def test_exception_in_a_slot_reaches_the_hook_that_fails_a_test(host):
    import qt

    caught = []
    before, sys.excepthook = sys.excepthook, lambda kind, error, trace: caught.append(str(error))
    try:
        button = qt.QPushButton()
        button.connect("clicked()", lambda: 1 / 0)
        button.click()
        observed = vtk.vtkObject()
        observed.AddObserver("ModifiedEvent", lambda *_: {}["missing"])
        observed.Modified()
    finally:
        sys.excepthook = before
    assert caught == ["division by zero", "'missing'"]


# -- modules -----------------------------------------------------------------------------------------------------------


def test_module_is_loaded_as_slicer_does(demo, demoFile):
    assert slicer.modules.hostdemo is demo
    assert slicer.util.modulePath("HostDemo") == str(demoFile)
    assert demo.title == "Host demo" and demo.categories == ["Segmentation"] and demo.helpText.startswith("Help.<p>")
    assert str(demoFile.parent) in sys.path
    assert "HostDemo" in slicer.util.moduleNames()
    assert sys.modules["HostDemo"].calls == ["startup"]


def test_startup_is_told_once_to_each_module(host, demo, tmp_path):
    other = tmp_path / "OtherDemo.py"
    text = "from slicer.ScriptedLoadableModule import *\nclass OtherDemo(ScriptedLoadableModule):\n    pass\n"
    other.write_text(text)
    host.load_module(other)
    assert sys.modules["HostDemo"].calls.count("startup") == 1
    host.moduleManager.unload("OtherDemo")


def test_module_file_without_its_class_is_refused_and_leaves_nothing(host, tmp_path):
    (tmp_path / "Nothing.py").write_text("value = 1\n")
    with pytest.raises(ImportError, match="no class Nothing"):
        host.load_module(tmp_path / "Nothing.py")
    assert not hasattr(slicer.modules, "nothing") and "Nothing" not in sys.modules


def test_panel_lives_through_enter_exit_and_cleanup(host, demo):
    calls = sys.modules["HostDemo"].calls
    widget = demo.widgetRepresentation()
    assert isinstance(widget, slicer.qSlicerScriptedLoadableModuleWidget) and not widget.isEntered
    assert slicer.modules.HostDemoWidget is widget.self() is slicer.util.getModuleWidget("HostDemo")
    host.select_module("HostDemo")
    assert widget.isEntered
    host.moduleManager.unload("HostDemo")
    assert calls == ["startup", "setup", "enter", "exit", "cleanup"]


def test_panel_is_made_anew_by_reload(host, demo):
    first = host.select_module("HostDemo")
    slicer.util.reloadScriptedModule("HostDemo")
    second = slicer.modules.HostDemoWidget
    assert second is not first and demo.widgetRepresentation().self() is second
    second.ui.labelEdit.text = "after reload"
    assert second.logic.getParameterNode().label == "after reload"


def test_module_own_test_passes(host, demo, demoFile):
    from slicer.testing import EXIT_SUCCESS, runUnitTest

    slicer.selfTests["HostDemo"]()
    assert runUnitTest([str(demoFile.parent)], "HostDemo") == EXIT_SUCCESS


def test_panel_runs_and_its_scene_comes_back_from_a_bundle(host, demo, tmp_path):
    """The whole way: select, run, save, clear, reopen; references and values are as they were."""
    panel = host.select_module("HostDemo")
    assert not panel.ui.applyButton.enabled
    volume = _box()
    panel.ui.inputSelector.setCurrentNode(volume)
    assert panel._parameterNode.inputVolume is volume and panel.ui.applyButton.enabled
    panel.ui.thresholdSlider.value = 250
    panel.ui.countBox.value = 8
    panel.ui.invertBox.checked = True
    panel.ui.labelEdit.text = "lung <&> ü"
    panel.ui.speedBox.currentIndex = 0
    panel.ui.folderEdit.currentPath = str(tmp_path)
    panel.ui.applyButton.click()
    node = panel._parameterNode
    assert (node.threshold, node.count, node.invert, node.label) == (250.0, 8, True, "lung <&> ü")
    assert node.speed.name == "SLOW" and node.folder == tmp_path
    assert node.result.GetName() == "Result"
    mask = slicer.util.arrayFromSegmentBinaryLabelmap(node.result, "above", volume)
    array = slicer.util.arrayFromVolume(volume).copy()
    assert int(mask.sum()) == 8 * 12 * 12
    assert slicer.util.saveScene(str(tmp_path / "scene.mrb"), {})

    slicer.mrmlScene.Clear(0)
    assert panel._parameterNode.inputVolume is None and panel._parameterNode.count == 3
    assert panel.ui.countBox.value == 3 and not panel.ui.applyButton.enabled

    slicer.util.loadScene(str(tmp_path / "scene.mrb"), {})
    reopened = panel.logic.getParameterNode()
    assert reopened.inputVolume.GetName() == "CT" and reopened.result.GetName() == "Result"
    assert (reopened.threshold, reopened.count, reopened.invert, reopened.label) == (250.0, 8, True, "lung <&> ü")
    assert reopened.speed.name == "SLOW" and reopened.folder == tmp_path
    assert np.array_equal(slicer.util.arrayFromVolume(reopened.inputVolume), array)
    again = slicer.util.arrayFromSegmentBinaryLabelmap(reopened.result, "above", reopened.inputVolume)
    assert np.array_equal(again, mask)
    assert panel.ui.countBox.value == 8 and panel.ui.inputSelector.currentNode() is reopened.inputVolume


# -- parameter nodes ---------------------------------------------------------------------------------------------------


def _wrapped(**hints: Any) -> Any:
    """A parameter node with the given members; a tuple is (type, default)."""
    from slicer.parameterNodeWrapper import parameterNodeWrapper

    annotations = {name: hint[0] if isinstance(hint, tuple) else hint for name, hint in hints.items()}
    defaults = {name: hint[1] for name, hint in hints.items() if isinstance(hint, tuple)}
    kind = parameterNodeWrapper(type("Parameters", (), {"__annotations__": annotations, **defaults}))
    return kind, kind(slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScriptedModuleNode"))


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        (int, [5, -3]),
        (float, [2.5, 1e-9]),
        (str, ["", "a,b;c\n<d>"]),
        (bool, [True, False]),
        (Path, [Path("/tmp/a b"), Path()]),
        (list[int], [[], [1, 2, 3]]),
        (list[list[str]], [[["a"], []]]),
        (tuple[int, str], [(4, "four")]),
        (dict[str, float], [{}, {"a": 1.0, "b": 2.5}]),
        (int | None, [None, 7]),
        (int | str, ["seven", 7]),
    ],
)
def test_value_is_the_same_for_a_second_wrapper_of_the_node(host, hint, values):
    kind, node = _wrapped(value=hint)
    for value in values:
        node.value = value
        assert node.value == value
        assert kind(node.parameterNode).value == value


def test_implicit_defaults_are_those_of_the_guide(host):
    hints = {"i": int, "f": float, "s": str, "b": bool, "l": list[int], "d": dict[str, int], "p": Path, "o": int | None}
    _, node = _wrapped(**hints, n=slicer.vtkMRMLModelNode, t=tuple[int, bool])
    assert (node.i, node.f, node.s, node.b, node.l, node.d) == (0, 0.0, "", False, [], {})
    assert (node.p, node.o, node.n, node.t) == (Path(), None, None, (0, False))


def test_value_in_the_node_comes_before_the_default(host):
    kind, node = _wrapped(count=(int, 50))
    assert node.count == 50
    node.count = 4
    assert kind(node.parameterNode).count == 4


def test_bad_values_are_refused_and_change_nothing(host):
    from slicer.parameterNodeWrapper import Choice, Minimum, WithinRange

    choices = Annotated[str, Choice(["a", "b"])]
    _, node = _wrapped(
        count=(Annotated[int, Minimum(0)], 3), x=(Annotated[float, WithinRange(0, 1)], 0.5), c=(choices, "a")
    )
    for name, value, error in (
        ("count", -1, ValueError),
        ("count", "1", TypeError),
        ("count", None, ValueError),
        ("x", 1.5, ValueError),
        ("c", "z", ValueError),
        ("unknown", 1, AttributeError),
    ):
        with pytest.raises(error):
            setattr(node, name, value)
    assert (node.count, node.x, node.c) == (3, 0.5, "a")


def test_nodes_are_kept_as_references(host):
    _, node = _wrapped(volume=slicer.vtkMRMLScalarVolumeNode, many=list[slicer.vtkMRMLNode])
    volume, model = _box(), slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode")
    node.volume = volume
    node.many = [model, None, volume]
    assert node.parameterNode.GetNodeReferenceID("volume") == volume.GetID()
    with pytest.raises(TypeError):
        node.volume = model
    slicer.mrmlScene.RemoveNode(volume)
    assert node.volume is None and node.many == [model, None, None]


def test_list_and_dict_write_through(host):
    kind, node = _wrapped(texts=list[str], numbers=dict[str, int])
    texts = node.texts
    texts.append("a")
    texts += ["b", "c"]
    texts[0] = "A"
    del texts[1]
    node.numbers["x"] = 1
    node.numbers.update(y=2)
    other = kind(node.parameterNode)
    assert other.texts == ["A", "c"] and other.numbers == {"x": 1, "y": 2}
    with pytest.raises(TypeError):
        texts.append(3)
    assert node.texts == ["A", "c"]


def test_change_from_outside_is_seen(host):
    kind, node = _wrapped(count=int)
    assert node.isCached("count") and node.count == 0
    kind(node.parameterNode).count = 9
    assert node.count == 9
    node.parameterNode.SetParameter("count", "11")
    assert node.count == 11


def test_many_changes_within_start_and_end_are_told_once(host):
    _, node = _wrapped(a=int, b=int)
    told = []
    node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: told.append((node.a, node.b)))
    state = node.StartModify()
    node.a, node.b = 1, 2
    assert told == []
    node.EndModify(state)
    assert told == [(1, 2)]
    with slicer.util.NodeModify(node):
        node.a = 5
        node.a = 6
    assert told == [(1, 2), (6, 2)]


def test_parameter_pack_is_a_value_of_its_own_and_a_view_in_a_node(host):
    from slicer.parameterNodeWrapper import Default, WithinRange, parameterPack

    hints = {"x": Annotated[float, WithinRange(-10, 10)], "y": float}
    Point = parameterPack(type("Point", (), {"__annotations__": hints, "y": 2.0}))
    Box = parameterPack(type("Box", (), {"__annotations__": {"low": Point, "high": Point}}))
    assert Point() == Point(0.0, 2.0) != Point(1.0) and repr(Point(y=3.0)) == "Point(x=0.0, y=3.0)"
    with pytest.raises(ValueError, match="range"):
        Point(11.0)
    kind, node = _wrapped(box=Annotated[Box, Default(Box(Point(1.0, 1.0), Point(5.0, 5.0)))])
    node.box.low.x = -4.0
    node.setValue("box.high.y", 7.0)
    node.box.high = Point(6.0, node.box.high.y)
    assert kind(node.parameterNode).box == Box(Point(-4.0, 1.0), Point(6.0, 7.0))
    assert node.parameterNode.GetParameter("box.low.x") == "-4.0"
    assert node.getValue("box.low.x") == -4.0 and node.dataType("box.low.y") is float
    with pytest.raises(AttributeError):
        node.box.z = 1


def test_widgets_and_parameters_follow_each_other_until_disconnected(host):
    import qt
    from slicer.parameterNodeWrapper import Choice, Decimals, WithinRange

    _, node = _wrapped(
        count=(Annotated[int, WithinRange(2, 9)], 4),
        ratio=(Annotated[float, WithinRange(0, 1), Decimals(3)], 0.25),
        on=bool,
        pressed=bool,
        text=str,
        choice=(Annotated[str, Choice(["x", "y"])], "y"),
    )
    spin, slider, ratio = qt.QSpinBox(), qt.QSlider(), qt.QDoubleSpinBox()
    box, button, edit, label, combo = qt.QCheckBox(), qt.QPushButton(), qt.QLineEdit(), qt.QLabel(), qt.QComboBox()
    button.checkable = True
    mapping = {"count": spin, "ratio": ratio, "on": box, "pressed": button, "text": edit, "choice": combo}
    tag = node.connectParametersToGui(mapping)
    shown = node.connectParametersToGui({"text": label, "count": slider})
    assert (spin.minimum, spin.maximum, spin.value, slider.value) == (2, 9, 4, 4)
    assert (ratio.decimals, ratio.value, combo.currentText) == (3, 0.25, "y")
    spin.value, ratio.value, box.checked, button.checked, edit.text, combo.currentIndex = 6, 0.125, True, True, "a", 0
    assert (node.count, node.ratio, node.on, node.pressed, node.text, node.choice) == (6, 0.125, True, True, "a", "x")
    assert slider.value == 6 and label.text == "a"
    node.count, node.choice, node.on = 8, "y", False
    assert (spin.value, slider.value, combo.currentIndex, box.checked) == (8, 8, 1, False)
    node.disconnectGui(tag)
    node.disconnectGui(tag)
    spin.value = 3
    node.ratio = 1.0
    assert node.count == 8 and ratio.value == 0.125
    node.disconnectGui(shown)


def test_widget_that_cannot_show_a_type_is_refused(host):
    """As in Slicer: a combo box needs choices, a slider limits on both sides."""
    import ctk
    import qt

    _, node = _wrapped(text=str, count=int, ratio=float)
    refused = {
        "text": [qt.QComboBox(), qt.QCheckBox()],
        "count": [qt.QCheckBox(), qt.QSlider(), qt.QDoubleSpinBox()],
        "ratio": [ctk.ctkSliderWidget()],
    }
    for name, widgets in refused.items():
        for widget in widgets:
            with pytest.raises(RuntimeError):
                node.connectParametersToGui({name: widget})
    with pytest.raises(ValueError, match="missing"):
        node.connectParametersToGui({"missing": qt.QLineEdit()})


def test_connecting_changes_the_widget_as_slicer_does(host):
    """Limits and node types of the .ui file give way to those of the parameter."""
    import qt

    _, node = _wrapped(count=int, on=bool, node=slicer.vtkMRMLModelNode)
    spin, button, selector = qt.QSpinBox(), qt.QPushButton(), slicer.qMRMLNodeComboBox()
    spin.maximum = 7
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    node.connectParametersToGui({"count": spin, "on": button, "node": selector})
    assert (spin.minimum, spin.maximum) == (-(2**31), 2**31 - 1) and button.checkable
    assert list(selector.nodeTypes) == ["vtkMRMLModelNode"]


def test_reference_is_read_when_the_node_tells_of_a_change_and_not_before(host):
    """As in Slicer; a scene's parameters are read before its volumes, so panels wrap the node anew at EndImport."""
    kind, node = _wrapped(volume=slicer.vtkMRMLScalarVolumeNode)
    volume = _box()
    node.parameterNode.SetDisableModifiedEvent(True)
    node.parameterNode.SetNodeReferenceID("volume", volume.GetID())
    node.parameterNode.SetDisableModifiedEvent(False)
    assert node.volume is None and kind(node.parameterNode).volume is volume
    node.Modified()
    assert node.volume is volume


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["stl", "obj", "ply", "vtk"])
def test_surface_is_the_same_after_writing_and_reading(host, tmp_path, ending):
    model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", "Box")
    model.SetAndObservePolyData(_surface(_segmented(_box())))
    bounds, area = np.array(model.GetPolyData().GetBounds()), _area(model.GetPolyData())
    assert slicer.util.saveNode(model, str(tmp_path / f"box.{ending}"), {})
    read = slicer.util.loadModel(str(tmp_path / f"box.{ending}"))
    assert np.allclose(read.GetPolyData().GetBounds(), bounds, atol=1e-3)
    assert _area(read.GetPolyData()) == pytest.approx(area, rel=1e-4)


def _area(surface: Any) -> float:
    triangles, mass = vtk.vtkTriangleFilter(), vtk.vtkMassProperties()
    triangles.SetInputData(surface)
    mass.SetInputConnection(triangles.GetOutputPort())
    return mass.GetSurfaceArea()


def test_segments_are_exported_by_the_segmentations_logic(host, tmp_path):
    segmentation = _segmented(_box())
    folder = tmp_path / "surfaces"
    folder.mkdir()
    logic = slicer.vtkSlicerSegmentationsModuleLogic
    assert logic.ExportSegmentsClosedSurfaceRepresentationToFiles(str(folder), segmentation, None, "STL", True)
    read = slicer.util.loadModel(str(next(folder.glob("*.stl"))))
    assert np.allclose(read.GetPolyData().GetBounds(), _surface(segmentation).GetBounds(), atol=1e-3)


def test_segmentation_is_the_same_after_writing_and_reading(host, tmp_path):
    volume = _box()
    segmentation = _segmented(volume)
    mask = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation, "box", volume)
    assert slicer.util.saveNode(segmentation, str(tmp_path / "box.seg.nrrd"), {})
    read = slicer.util.loadSegmentation(str(tmp_path / "box.seg.nrrd"), {})
    assert read.GetName() == "box" and read.GetSegmentation().GetSegment("box").GetName() == "Box"
    assert np.allclose(read.GetSegmentation().GetSegment("box").GetColor(), (0.9, 0.2, 0.1), atol=0.01)
    assert np.array_equal(slicer.util.arrayFromSegmentBinaryLabelmap(read, "box", volume), mask)


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd"])
def test_volume_is_the_same_after_writing_and_reading(host, tmp_path, ending):
    volume = _box()
    assert slicer.util.saveNode(volume, str(tmp_path / f"ct.{ending}"), {})
    read = slicer.util.loadVolume(str(tmp_path / f"ct.{ending}"), {"name": "Again"})
    matrices = [vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()]
    for node, matrix in zip((volume, read), matrices, strict=True):
        node.GetIJKToRASMatrix(matrix)
    assert read.GetName() == "Again"
    assert np.array_equal(slicer.util.arrayFromVolume(read), slicer.util.arrayFromVolume(volume))
    assert np.allclose(*(slicer.util.arrayFromVTKMatrix(matrix) for matrix in matrices))


def test_export_in_world_coordinates_leaves_the_node_as_it_is(host, tmp_path):
    model = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLModelNode", "Box")
    model.SetAndObservePolyData(_surface(_segmented(_box())))
    moved = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "Moved")
    matrix = np.eye(4)
    matrix[:3, 3] = 100, -20, 5
    slicer.util.updateTransformMatrixFromArray(moved, matrix)
    model.SetAndObserveTransformNodeID(moved.GetID())
    count, storages = slicer.mrmlScene.GetNumberOfNodes(), model.GetNumberOfStorageNodes()
    assert slicer.util.exportNode(model, str(tmp_path / "world.stl"), {}, world=True)
    assert slicer.util.exportNode(model, str(tmp_path / "local.stl"), {})
    assert slicer.mrmlScene.GetNumberOfNodes() == count and model.GetNumberOfStorageNodes() == storages
    world = slicer.util.loadModel(str(tmp_path / "world.stl")).GetPolyData().GetBounds()
    local = slicer.util.loadModel(str(tmp_path / "local.stl")).GetPolyData().GetBounds()
    assert np.allclose(np.array(world) - local, [100, 100, -20, -20, 5, 5], atol=1e-3)


@pytest.mark.parametrize("ending", ["mrb", "mrml", ""])
def test_scene_is_saved_in_every_form(host, tmp_path, ending):
    target = tmp_path / (f"scene.{ending}" if ending else "scene")
    table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", "Volumes")
    slicer.util.updateTableFromArray(table, [np.arange(3.0)], ["mL"])
    if ending == "mrml":
        assert slicer.util.saveNode(table, str(tmp_path / "Volumes.tsv"), {})
    assert slicer.util.saveScene(str(target), {})
    slicer.mrmlScene.Clear(0)
    slicer.util.loadScene(str(target if ending else next(target.glob("*.mrml"))), {})
    found = slicer.util.getNode("Volumes")
    assert [found.GetTable().GetValue(row, 0).ToDouble() for row in range(3)] == [0.0, 1.0, 2.0]


def test_missing_or_broken_file_is_an_error_with_its_name(host, tmp_path):
    broken = tmp_path / "broken.mrb"
    broken.write_bytes(b"no scene")
    with pytest.raises(RuntimeError, match="missing.nrrd"):
        slicer.util.loadVolume(str(tmp_path / "missing.nrrd"), {})
    with pytest.raises(RuntimeError, match="broken.mrb"):
        slicer.util.loadScene(str(broken), {})


def test_every_node_that_users_see_has_one_item_in_the_hierarchy(host, tmp_path):
    def items() -> dict[str, int]:
        hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
        nodes = slicer.util.getNodesByClass("vtkMRMLStorableNode")
        return {node.GetName(): hierarchy.GetItemByDataNode(node) for node in nodes if not node.GetHideFromEditors()}

    segmentation = _segmented(_box())
    assert {"CT", "Box"} <= items().keys() and all(items()[name] for name in ("CT", "Box"))
    assert slicer.util.saveScene(str(tmp_path / "scene.mrb"), {})
    before = slicer.mrmlScene.GetSubjectHierarchyNode().GetNumberOfItems()
    slicer.mrmlScene.RemoveNode(segmentation)
    assert slicer.mrmlScene.GetSubjectHierarchyNode().GetNumberOfItems() == before - 1
    for _ in range(2):
        slicer.mrmlScene.Clear(0)
        slicer.util.loadScene(str(tmp_path / "scene.mrb"), {})
    assert len(slicer.util.getNodesByClass("vtkMRMLSubjectHierarchyNode")) == 1
    assert slicer.mrmlScene.GetSubjectHierarchyNode().GetNumberOfItems() == before


# -- DICOM -------------------------------------------------------------------------------------------------------------


def _writeSeries(folder: Path, array: np.ndarray, rng: np.random.Generator) -> list[str]:
    """A CT series whose file names and instance numbers say nothing of the order; UIDs from the lowest slice up."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    study, series, uids = generate_uid(), generate_uid(), []
    order = rng.permutation(len(array))
    for index, plane in enumerate(array):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folder / f"{order[index]:03d}.dcm"
        item = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        item.StudyInstanceUID, item.SeriesInstanceUID, item.Modality = study, series, "CT"
        item.PatientName, item.PatientID, item.StudyDate, item.SeriesNumber = "Doe^Jane", "P7", "20260102", 4
        item.SeriesDescription, item.InstanceNumber = "Lung", int(rng.integers(1, 999))
        item.ImagePositionPatient, item.ImageOrientationPatient = [-10, -20, 5.0 * index], [1, 0, 0, 0, 1, 0]
        item.PixelSpacing, item.SliceThickness, item.RescaleIntercept, item.RescaleSlope = [0.5, 0.5], 5, -1024, 1
        item.Rows, item.Columns = plane.shape
        item.SamplesPerPixel, item.PhotometricInterpretation, item.PixelRepresentation = 1, "MONOCHROME2", 0
        item.BitsAllocated, item.BitsStored, item.HighBit = 16, 16, 15
        item.PixelData = (plane.astype(np.int32) + 1024).astype(np.uint16).tobytes()
        pydicom.dcmwrite(path, item, enforce_file_format=True)
        uids.append(str(item.SOPInstanceUID))
    return uids


def test_dicom_folder_becomes_a_volume_filed_under_its_patient(host, tmp_path, rng):
    array = rng.integers(-1000, 400, (7, 12, 16)).astype(np.int16)
    uids = _writeSeries(tmp_path, array, rng)
    (tmp_path / "notes.txt").write_text("no image")
    (node,) = host.load_dicom_folder(tmp_path)
    assert np.array_equal(slicer.util.arrayFromVolume(node), array)
    assert np.allclose(node.GetOrigin(), (10, 20, 0)) and np.allclose(node.GetSpacing(), (0.5, 0.5, 5))
    assert node.GetName() == "4: Lung" and node.GetAttribute("DICOM.instanceUIDs").split() == uids
    files = [slicer.dicomDatabase.fileForInstance(uid) for uid in uids]
    assert sorted(files) == sorted(str(path) for path in tmp_path.glob("*.dcm"))
    assert slicer.dicomDatabase.instanceValue(uids[2], "0020,0032").startswith("[-10")
    assert slicer.dicomDatabase.fileForInstance("1.2.3") == ""
    hierarchy = slicer.mrmlScene.GetSubjectHierarchyNode()
    series = hierarchy.GetItemByDataNode(node)
    study = hierarchy.GetItemParent(series)
    patient = hierarchy.GetItemParent(study)
    assert hierarchy.GetItemName(patient) == "Doe^Jane (P7)" and hierarchy.GetItemLevel(study) == "Study"
    assert hierarchy.GetItemAttribute(patient, "DICOM.PatientID") == "P7"


def test_folder_without_images_is_refused(host, tmp_path):
    from host.dicom import NoImages

    with pytest.raises(NoImages, match="no DICOM images"):
        host.load_dicom_folder(tmp_path)


# -- sample data and packages ------------------------------------------------------------------------------------------


def test_sample_data_are_downloaded_checked_and_loaded(host, tmp_path):
    import hashlib

    import SampleData

    slicer.util.saveNode(_box(), str(tmp_path / "source.nrrd"), {})
    digest = hashlib.sha256((tmp_path / "source.nrrd").read_bytes()).hexdigest()
    logic = SampleData.SampleDataLogic
    logic.registerCustomSampleDataCategory("HostDemo", title="Host demo")
    for name, checksum in (("HostGood", digest), ("HostBad", "0" * 64)):
        logic.registerCustomSampleDataSource(
            category="HostDemo",
            sampleName=name,
            uris=(tmp_path / "source.nrrd").as_uri(),
            fileNames=f"{name}.nrrd",
            checksums=f"SHA256:{checksum}",
            nodeNames=name,
        )
    node = SampleData.downloadSample("HostGood")
    assert node.GetName() == "HostGood" and slicer.util.arrayFromVolume(node).max() == 300
    with pytest.raises(SampleData.ChecksumError):
        SampleData.downloadSample("HostBad")
    (tmp_path / "source.nrrd").unlink()
    assert SampleData.downloadSample("HostGood") is not node


def test_installed_packages_are_really_checked(host, tmp_path):
    from slicer.packaging import load_requirements, pip_check, pip_ensure

    file = tmp_path / "requirements.txt"
    file.write_text("# what we need\n--index-url https://example.org\nnumpy>=1.20 # arrays\n\nno-such-package>=1\n")
    present, absent = load_requirements(file)
    assert (present.name, absent.name) == ("numpy", "no-such-package")
    assert pip_check(present) and not pip_check([present, absent]) and not pip_check("numpy<1")
    assert pip_ensure([present, absent], requester="Test") is None
    with pytest.raises(RuntimeError, match="no-such-package"):
        pip_ensure([present, absent], skip_in_testing=False)
    pip_ensure([absent], skip_packages=["No_Such.Package"], skip_in_testing=False)


# -- views -------------------------------------------------------------------------------------------------------------


def _mouse(view: Any, kind: str, x: int, y: int, button: Any = None) -> None:
    """Send a real Qt mouse event."""
    import qt

    button = qt.Qt.LeftButton if button is None else button
    held = qt.Qt.NoButton if kind == "MouseButtonRelease" or button == qt.Qt.NoButton else button
    own = qt.Qt.NoButton if kind == "MouseMove" else button
    place = qt.QPointF(x, y)
    event = qt.QMouseEvent(getattr(qt.QEvent, kind), place, place, own, held, qt.Qt.NoModifier)
    qt.QApplication.sendEvent(view, event)


def _show(host: Any) -> tuple[Any, Any]:
    volume = _box()
    segmentation = _segmented(volume)
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    host.layoutManager.resetSliceViews()
    host.layoutManager.threeDWidget(0).threeDView().resetFocalPoint()
    host.settle()
    return volume, segmentation


def test_views_show_the_volume_and_translucent_segments(host, window):
    _, segmentation = _show(host)
    view = host.layoutManager.sliceWidget("Red").sliceView()
    threeD = host.layoutManager.threeDWidget(0).threeDView()
    background = threeD.pixels()[5, 5]

    def red(picture: np.ndarray) -> int:
        colors = picture.astype(int)
        return int(((colors[..., 0] - colors[..., 1] > 40) & (colors[..., 0] - colors[..., 2] > 20)).sum())

    assert red(view.pixels()) > 500 and red(threeD.pixels()) > 500
    opaque = threeD.pixels()[threeD.height // 2, threeD.width // 2].astype(int)
    segmentation.GetDisplayNode().SetOpacity3D(0.4)
    translucent = threeD.pixels()[threeD.height // 2, threeD.width // 2].astype(int)
    assert not np.array_equal(translucent, background), "translucent segments vanish"
    assert translucent[2] > opaque[2] + 10, "the background shines through"
    segmentation.GetDisplayNode().SetVisibility(False)
    host.settle()
    assert red(view.pixels()) == red(threeD.pixels()) == 0


def test_wheel_scrolls_the_slice(host, window):
    import qt

    _show(host)
    widget = host.layoutManager.sliceWidget("Red")
    before, picture = widget.sliceLogic().GetSliceOffset(), widget.sliceView().pixels()
    place = qt.QPointF(60, 60)
    for _ in range(3):
        event = qt.QWheelEvent(
            place, place, qt.QPoint(), qt.QPoint(0, 120), qt.Qt.NoButton, qt.Qt.NoModifier, qt.Qt.NoScrollPhase, False
        )
        qt.QApplication.sendEvent(widget.sliceView(), event)
    host.settle()
    assert abs(widget.sliceLogic().GetSliceOffset() - before) == pytest.approx(12.0)
    assert widget.sliceController().sliceOffsetSlider().value > 0
    assert picture.shape == widget.sliceView().pixels().shape


def test_drag_turns_the_camera(host, window):
    _show(host)
    view = host.layoutManager.threeDWidget(0).threeDView()
    before = np.array(view.cameraNode().GetPosition())
    _mouse(view, "MouseButtonPress", 100, 100)
    for step in range(5):
        _mouse(view, "MouseMove", 110 + 10 * step, 100)
    _mouse(view, "MouseButtonRelease", 150, 100)
    after, focus = np.array(view.cameraNode().GetPosition()), np.array(view.cameraNode().GetFocalPoint())
    assert np.linalg.norm(after - before) > 20
    assert np.linalg.norm(after - focus) == pytest.approx(np.linalg.norm(before - focus), rel=1e-3)


@pytest.mark.parametrize("place", ["Red", "3D"])
def test_click_places_a_point_where_the_mouse_is(host, window, place):
    _, segmentation = _show(host)
    markups = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Picked")
    markups.CreateDefaultDisplayNodes()
    slicer.modules.markups.logic().SetActiveList(markups)
    slicer.modules.markups.logic().StartPlaceMode(False)
    manager = host.layoutManager
    view = manager.sliceWidget("Red").sliceView() if place == "Red" else manager.threeDWidget(0).threeDView()
    host.settle()
    x, y = view.width // 2 + 15, view.height // 2 - 10
    _mouse(view, "MouseMove", x, y, 0)
    _mouse(view, "MouseButtonPress", x, y)
    _mouse(view, "MouseButtonRelease", x, y)
    assert markups.GetNumberOfDefinedControlPoints() == 1
    point = np.array(markups.GetNthControlPointPositionWorld(0))
    if place == "Red":
        assert np.allclose(point, view.convertXYZToRAS(view.convertDeviceToXYZ((x, y))), atol=0.5)
    else:
        tree = vtk.vtkCellLocator()
        tree.SetDataSet(_surface(segmentation))
        tree.BuildLocator()
        closest, cell, sub, distance = [0.0] * 3, vtk.reference(0), vtk.reference(0), vtk.reference(0.0)
        tree.FindClosestPoint(point, closest, cell, sub, distance)
        assert float(distance) ** 0.5 < 1.0, "the point lies on the segment's surface"


def test_slices_jump_to_a_point(host, window):
    _show(host)
    slicer.modules.markups.logic().JumpSlicesToLocation(12.0, 8.0, -20.0, True)
    offsets = {name: host.layoutManager.sliceWidget(name).sliceLogic().GetSliceOffset() for name in ("Red", "Green")}
    assert offsets["Red"] == pytest.approx(-20, abs=2) and offsets["Green"] == pytest.approx(8, abs=1.5)


def test_many_changes_make_one_picture(host, window):
    _show(host)
    view = host.layoutManager.threeDWidget(0).threeDView()
    drawn = []
    view.renderWindow().AddObserver("StartEvent", lambda *_: drawn.append(1))
    for step in range(50):
        view.cameraNode().SetPosition(300.0 + step, 0, 0)
    assert drawn == [], "nothing is drawn while the scene changes"
    host.wait_for(lambda: drawn, 10)
    host.settle()
    assert len(drawn) <= 2


def test_event_loop_draws_by_itself_and_ends_with_the_window(host, window):
    import qt

    volume = _box()
    slicer.util.setSliceViewerLayers(background=volume, fit=True)
    view = host.layoutManager.sliceWidget("Red").sliceView()
    drawn = []
    view.renderWindow().AddObserver("EndEvent", lambda *_: drawn.append(time.monotonic()))
    waiting = qt.QTimer()
    waiting.connect("timeout()", lambda: window.close() if drawn else None)
    waiting.start(20)
    assert host.run() == 0
    waiting.stop()
    assert drawn and host.layoutManager.slowestRender < 10


def test_layout_changes_the_views_that_are_seen(host, window):
    manager = host.layoutManager
    layouts = slicer.vtkMRMLLayoutNode
    told = []
    manager.connect("layoutChanged(int)", told.append)
    manager.setLayout(layouts.SlicerLayoutOneUp3DView)
    host.settle()
    assert manager.threeDWidget(0).isVisible() and not manager.sliceWidget("Red").isVisible()
    manager.setLayout(layouts.SlicerLayoutFourUpTableView)
    table = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", "Volumes")
    slicer.util.updateTableFromArray(table, [np.array([7.0, 8.0])], ["mL"])
    slicer.app.applicationLogic().GetSelectionNode().SetActiveTableID(table.GetID())
    slicer.app.applicationLogic().PropagateTableSelection()
    host.settle()
    assert manager.sliceWidget("Red").isVisible()
    assert manager.tableWidget(0).tableView().mrmlTableNode() is table
    assert told == [layouts.SlicerLayoutOneUp3DView, layouts.SlicerLayoutFourUpTableView]


def test_scene_with_segments_is_reopened_while_views_exist(host, window, tmp_path):
    """In a hierarchy with two roots this would never end."""
    _show(host)
    assert slicer.util.saveScene(str(tmp_path / "scene.mrb"), {})
    for _ in range(2):
        slicer.mrmlScene.Clear(0)
        host.settle()
        slicer.util.loadScene(str(tmp_path / "scene.mrb"), {})
        host.settle()
    picture = host.layoutManager.sliceWidget("Red").sliceView().pixels()
    assert picture.std() > 10


def test_window_says_that_it_is_not_slicer_and_is_pictured(host, window, demo, tmp_path):
    from PIL import Image

    slicer.util.selectModule("HostDemo")
    assert slicer.util.mainWindow() is window and "not 3D Slicer" in window.windowTitle
    assert slicer.util.selectedModule() == "HostDemo"
    whole = np.asarray(Image.open(host.grab(tmp_path / "window.png")).convert("RGB"))
    panel = np.asarray(Image.open(host.grab_panel(tmp_path / "panel.png")).convert("RGB"))
    assert whole.shape == (700, 1000, 3) and whole.std() > 10
    assert panel.shape[1] < whole.shape[1] and panel.std() > 5


def test_panel_is_pictured_without_a_window(host, demo, tmp_path):
    from PIL import Image

    host.select_module("HostDemo")
    assert np.asarray(Image.open(host.grab_panel(tmp_path / "panel.png")).convert("RGB")).std() > 5
    assert slicer.util.mainWindow() is None


@pytest.mark.parametrize("arguments", [["missing.nrrd"], ["--module", "Nothing"]])
def test_host_names_what_is_wrong_with_its_arguments(arguments, capsys):
    from host.__main__ import main

    with pytest.raises(SystemExit):
        main(["panel", *arguments])
    assert arguments[-1] in capsys.readouterr().err


def test_host_without_data_ends_with_a_picture(tmp_path):
    """`python -m host panel` in a process of its own."""
    testing = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(testing), "QT_QPA_PLATFORM": "offscreen"}
    command = [sys.executable, "-m", "host", "panel", "--screenshot", str(tmp_path / "window.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "window.png").stat().st_size > 5000
