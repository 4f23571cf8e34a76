"""The home panel: opens anywhere and at once, tells by sign and word, mends what it can, loads the sample, leads on."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone

_REPOSITORY = Path(__file__).resolve().parents[2]
_MODULE = _REPOSITORY / "LCTfound" / "LCTfound" / "LCTfound.py"


@pytest.fixture
def module(host) -> Any:
    import slicer

    slicer.app.revisionUserSettings().remove("LCTfound")
    slicer.app.userSettings().remove("LCTfound")
    return host.load_module(_MODULE)


@pytest.fixture
def panel(host, module):
    widget = module.createNewWidgetRepresentation()
    yield widget.self()
    widget.self().cleanup()
    widget.deleteLater()


def cells(table) -> list[list[str]]:
    return [[table.item(r, c).text() for c in range(table.columnCount)] for r in range(table.rowCount)]


def checked(host, panel):
    """The panel after its check by real imports."""
    panel.enter()
    host.wait_for(lambda: not panel.setupSection.isChecking, 90)
    return panel


class Doors:
    """Doors that write down what passes, and install by nothing but a word."""

    def __init__(self, available: bool = True, error: Exception | None = None) -> None:
        self.available, self.error, self.calls = available, error, []

    def isAvailable(self) -> bool:
        return self.available

    def install(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error


class TestOpening:
    def test_it_opens_within_a_second_and_imports_no_torch(self, host, module):
        start = time.monotonic()
        widget = module.createNewWidgetRepresentation()
        assert time.monotonic() - start < 1.0
        widget.self().cleanup()
        widget.deleteLater()

    def test_it_opens_where_torch_and_the_rest_are_missing(self):
        """In a process of its own that cannot import them, without a main window, as Slicer's own tests do it."""
        code = f"""
import sys
for name in ("torch", "safetensors", "skimage", "psutil"):
    sys.modules[name] = None
sys.path[:0] = [{str(_REPOSITORY / "Testing")!r}]
from host.application import Host
host = Host()
import importlib.metadata
real = importlib.metadata.distributions
importlib.metadata.distributions = lambda **how: (
    found for found in real(**how) if found.metadata["Name"] not in ("torch", "safetensors", "scikit-image", "psutil")
)
module = host.load_module({str(_MODULE)!r})
panel = module.widgetRepresentation().self()
print(panel.setupSection.state.sentence())
print(len(panel.logic.weights().all()), panel.ui.installButton.enabled)
host.close()
"""
        environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment
        )
        assert answer.returncode == 0, answer.stderr
        lines = answer.stdout.splitlines()
        assert "missing" in lines[-2] or "Install" in lines[-2]
        assert lines[-1].split()[0] >= "2" and lines[-1].endswith("True"), answer.stdout

    def test_it_says_what_it_is_not(self, panel):
        assert "Research use only. Not a medical device." in panel.ui.researchLabel.text
        assert panel.ui.researchLabel.isVisibleTo(panel.parent)

    def test_modules_own_test_passes(self, host, module):
        import slicer

        slicer.selfTests["LCTfound"]()

    def test_its_metadata(self, module):
        assert module.title == "LCTfound" and module.categories == ["Segmentation"]
        assert "not a medical device" in module.helpText and "CC BY 3.0" in module.acknowledgementText


class TestSetup:
    def test_the_real_environment_is_found_good_without_stopping_the_window(self, host, panel):
        panel.enter()
        assert panel.setupSection.isChecking and not panel.ui.checkButton.enabled
        longest, last = 0.0, time.monotonic()
        while panel.setupSection.isChecking:
            host.app.processEvents()
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            time.sleep(0.002)
            assert longest < 5
        assert panel.setupSection.state.isVerified and panel.setupSection.state.isReady
        assert "All is set up" in panel.ui.stateLabel.text and longest < 0.3
        assert not panel.ui.installButton.enabled and panel.ui.checkButton.enabled
        assert "torch" in panel.ui.hardwareLabel.text

    def test_each_line_has_a_sign_and_a_word(self, host, panel):
        from LCTfoundSlicer.lights import lightPixmap, lightWord
        from LCTfoundSlicer.setup_checks import Light

        checked(host, panel)
        lines = cells(panel.ui.checksTable)
        assert {"Python", "torch", "safetensors", "numpy", "Memory", "Free disk space"} <= {
            what for _, what, _ in lines
        }
        assert all(word in {lightWord(light) for light in Light} and found for word, _, found in lines)
        assert not panel.ui.checksTable.item(0, 0).icon().isNull()
        pictures = {bytes(gray(lightPixmap(light, 32))) for light in Light}
        assert len(pictures) == len(Light), "the signs differ also without color"

    def test_opened_again_nothing_is_tried_again(self, host, panel):
        checked(host, panel)
        panel.enter()
        assert not panel.setupSection.isChecking

    def test_a_check_under_way_ends_with_the_panel(self, host, module):
        widget = module.createNewWidgetRepresentation()
        panel = widget.self()
        panel.enter()
        process = panel.setupSection._probe._process._process
        panel.cleanup()
        assert process.poll() is not None
        widget.deleteLater()

    def test_install_asks_once_and_declining_changes_nothing(self, host, panel, monkeypatch):
        import slicer

        section, torch, asked = with_missing(panel, "safetensors", monkeypatch), Doors(), []
        monkeypatch.setattr(
            slicer.util, "confirmOkCancelDisplay", lambda text, *rest, **more: asked.append(text) or False
        )
        section.setup._doors = replace(section.setup._doors, packages=torch, torch=torch)
        panel.ui.installButton.click()
        assert len(asked) == 1 and "safetensors>=" in asked[0] and not torch.calls
        assert "Nothing was changed" in panel.ui.setupStatusLabel.text
        assert section.setup.pending() is None and panel.ui.installButton.enabled

    def test_install_goes_through_the_door_and_is_not_believed_without_a_check(self, host, panel, monkeypatch):
        import slicer

        section, door, shown = with_missing(panel, "safetensors", monkeypatch), Doors(), []
        monkeypatch.setattr(slicer.util, "errorDisplay", lambda text, **more: shown.append(text))
        monkeypatch.setattr(slicer.util, "confirmOkCancelDisplay", lambda text, *rest: True)
        section.setup._doors = replace(section.setup._doors, packages=door, torch=door)
        panel.ui.installButton.click()
        ((request,),) = door.calls
        assert request.requirements[0].startswith("safetensors") and request.isPlain
        assert "does not work yet" in shown[0], "the door did nothing"

    def test_offline_install_names_what_the_folder_lacks(self, panel, monkeypatch, tmp_path):
        import slicer

        section, shown = with_missing(panel, "safetensors", monkeypatch), []
        monkeypatch.setattr(slicer.util, "errorDisplay", lambda text, **more: shown.append(text))
        section.installOffline(tmp_path)
        assert "lacks wheels: safetensors" in shown[0] and "safetensors" in panel.ui.setupStatusLabel.text

    def test_the_button_repairs_what_is_broken(self, panel):
        from LCTfoundSlicer.setup_checks import PackageState

        section = panel.setupSection
        section.state = replace(section.state, packages={**section.state.packages, "torch": PackageState.INCOMPLETE})
        section._show()
        assert panel.ui.installButton.text == "Repair ..." and panel.ui.installButton.enabled

    def test_an_install_that_was_cut_off_is_offered_to_go_on(self, host, panel):
        from LCTfoundSlicer.setup import PendingInstall, Step

        section = panel.setupSection
        assert not panel.ui.pendingFrame.isVisibleTo(panel.parent)
        pending = PendingInstall(Step.PACKAGES, "", False, "2026-01-01T00:00:00+00:00")
        section.setup._doors.settings.setValue("LCTfound/PendingInstall", pending.toText())
        checked(host, panel)
        assert panel.ui.pendingFrame.isVisibleTo(panel.parent) and "cut off" in panel.ui.pendingLabel.text
        panel.ui.continueButton.click()
        assert section.setup.pending() is None and not panel.ui.pendingFrame.isVisibleTo(panel.parent)
        assert "All packages work" in panel.ui.setupStatusLabel.text

    def test_after_a_restart_a_mere_check_finishes_the_install(self, host, panel):
        from LCTfoundSlicer.setup import PendingInstall, Step

        section = panel.setupSection
        section.setup._doors.settings.setValue("LCTfound/PendingInstall", PendingInstall(Step.VERIFY).toText())
        checked(host, panel)
        assert section.setup.pending() is None and not panel.ui.pendingFrame.isVisibleTo(panel.parent)

    def test_a_panel_asks_before_its_first_run_and_gets_a_sentence(self, module, monkeypatch):
        from LCTfoundSlicer.setup_errors import SetupError
        from LCTfoundSlicer.setup_widget import ensureReady

        assert ensureReady(["lung_coarse", "lung_fine"])
        hide(monkeypatch, "safetensors")
        with pytest.raises(SetupError, match="safetensors.*Install"):
            ensureReady()

    def test_asking_is_quick(self, module):
        from LCTfoundSlicer.setup_widget import ensureReady

        ensureReady()
        start = time.monotonic()
        ensureReady(["lung_coarse", "lung_fine"])
        assert time.monotonic() - start < 0.5


class TestDoors:
    """The doors to Slicer, with what stands behind them replaced by what behaves like it."""

    @pytest.fixture
    def request_(self, module, tmp_path):
        from LCTfoundSlicer.setup import PipRequest

        (tmp_path / "constraints.txt").write_text("numpy==2.4.6\n")
        return PipRequest(("psutil>=5.9",), tmp_path / "constraints.txt")

    def test_packages_go_through_slicer_packaging_with_pins_and_without_a_second_question(self, request_, monkeypatch):
        import slicer.packaging

        from LCTfoundSlicer.slicer_doors import SlicerPackages

        calls = []

        def ensure(requirements, **how):
            calls.append((requirements, how, os.environ.get("PIP_ONLY_BINARY")))

        monkeypatch.setattr(slicer.packaging, "pip_ensure", ensure)
        SlicerPackages().install(request_)
        ((requirements, how, binary),) = calls
        assert requirements == ["psutil>=5.9"] and how["constraints"] == request_.constraints and binary == ":all:"
        assert how["prompt_install"] is how["prompt_restart"] is False and how["requester"] == "LCTfound"
        assert "PIP_ONLY_BINARY" not in os.environ

    def test_offline_and_repair_go_the_same_way_with_pips_options(self, request_, monkeypatch, tmp_path):
        import slicer.packaging

        from LCTfoundSlicer.slicer_doors import SlicerPackages

        calls = []
        monkeypatch.setattr(slicer.packaging, "pip_install", lambda arguments, **how: calls.append((arguments, how)))
        SlicerPackages().install(replace(request_, offlineFolder=tmp_path))
        SlicerPackages().install(replace(request_, reinstall=True))
        assert "--no-index" in calls[0][0] and str(tmp_path) in calls[0][0]
        assert "--force-reinstall" in calls[1][0] and calls[1][1]["constraints"] == request_.constraints

    def test_what_pip_printed_becomes_the_sentence(self, request_, monkeypatch, capsys):
        import slicer.packaging

        from LCTfoundSlicer.setup_errors import NetworkBlocked
        from LCTfoundSlicer.slicer_doors import SlicerPackages

        def fail(requirements, **how):
            print("WARNING: Retrying after connection broken by 'SSLError(CERTIFICATE_VERIFY_FAILED)'")
            raise subprocess.CalledProcessError(1, "pip install")  # as Slicer does: without pip's words

        monkeypatch.setattr(slicer.packaging, "pip_ensure", fail)
        with pytest.raises(NetworkBlocked, match="PIP_CERT") as caught:
            SlicerPackages().install(request_)
        assert "SSLError" in caught.value.log and "SSLError" in capsys.readouterr().out, "still in Slicer's log"

    def test_torch_goes_through_the_extension_with_the_pins_in_pips_environment(self, request_, monkeypatch):
        from LCTfoundSlicer.slicer_doors import PyTorchExtension

        assert not PyTorchExtension().isAvailable(), "the host has no extensions"
        calls = []

        class Logic:
            def installTorch(  # the signature of the extension
                self,
                askConfirmation=False,
                forceComputationBackend=None,
                torchVersionRequirement=None,
                torchvisionVersionRequirement=None,
            ):
                calls.append((askConfirmation, forceComputationBackend, torchVersionRequirement))
                calls.append(os.environ["PIP_CONSTRAINT"])

        stub(monkeypatch, PyTorchUtilsLogic=Logic)
        PyTorchExtension().install(">=2.6", True, request_.constraints)
        assert calls == [(False, "cpu", ">=2.6"), str(request_.constraints)] and "PIP_CONSTRAINT" not in os.environ

    def test_the_extensions_failures_become_sentences(self, request_, monkeypatch):
        from LCTfoundSlicer.setup_errors import PathUnsuitable
        from LCTfoundSlicer.slicer_doors import PyTorchExtension

        class Logic:
            def installTorch(self, **how):
                print("ERROR: Could not install packages due to an OSError: [WinError 206] The filename is too long")
                raise subprocess.CalledProcessError(1, "ltt")

        stub(monkeypatch, PyTorchUtilsLogic=Logic)
        with pytest.raises(PathUnsuitable, match="short folder"):
            PyTorchExtension().install(">=2.6", False, request_.constraints)


class TestSample:
    @pytest.fixture
    def cache(self, module, monkeypatch, tmp_path) -> Path:
        monkeypatch.setenv("LCTFOUND_CACHE", str(tmp_path))
        return tmp_path

    def put_sample(self, cache: Path) -> None:
        import numpy as np
        import SimpleITK as sitk

        from LCTfoundLib.demo import CASE

        (cache / CASE).mkdir()
        image = sitk.GetImageFromArray(np.full((5, 6, 7), -800, np.int16))
        sitk.WriteImage(image, str(cache / CASE / "cxr.nii.gz"))

    def test_it_is_loaded_while_the_window_goes_on(self, host, panel, cache):
        import slicer

        self.put_sample(cache)
        panel.ui.sampleButton.click()
        assert panel.ui.sampleButton.text == "Stop" and panel.ui.sampleProgressBar.isVisibleTo(panel.parent)
        host.wait_for(lambda: panel.ui.sampleButton.text != "Stop", 60)
        node = slicer.util.getNode("LIDC-IDRI-0001 CT")
        assert slicer.util.arrayFromVolume(node).shape == (5, 6, 7)
        assert node.GetDisplayNode().GetWindow() == 1400
        assert "CC BY 3.0" in panel.ui.sampleLabel.text

    def test_without_network_the_remedy_is_told(self, host, panel, cache, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        panel.ui.sampleButton.click()
        host.wait_for(lambda: panel.ui.sampleButton.text != "Stop", 60)
        assert "connect to the internet" in panel.ui.sampleLabel.text

    def test_it_can_be_stopped(self, host, panel, cache):
        import slicer

        self.put_sample(cache)
        panel.ui.sampleButton.click()
        panel.ui.sampleButton.click()
        assert panel.ui.sampleButton.text == "Load sample CT" and "Stopped" in panel.ui.sampleLabel.text
        host.settle(0.3)
        assert not slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")

    def test_scripts_get_it_too(self, module, cache):
        self.put_sample(cache)
        node = sys.modules["LCTfound"].LCTfoundLogic().loadSampleCt()
        assert node.GetName() == "LIDC-IDRI-0001 CT"

    def test_it_is_registered_with_sample_data_where_that_module_is(self, module, cache, monkeypatch):
        from LCTfoundSlicer.sample_data import registerSampleData

        calls = []

        class Logic:
            @staticmethod
            def registerCustomSampleDataCategory(category, title):
                calls.append(category)

            @staticmethod
            def registerCustomSampleDataSource(**source):
                calls.append(source)

        thumbnail = _MODULE.parent / "Resources" / "SampleData" / "LIDC-IDRI-0001.png"
        assert thumbnail.is_file()
        monkeypatch.setitem(sys.modules, "SampleData", None)
        assert not registerSampleData(thumbnail)
        stub(monkeypatch, "SampleData", SampleDataLogic=Logic)
        assert registerSampleData(thumbnail)
        assert calls[0] == calls[1]["category"] == "LCTfound"
        assert Path(calls[1]["uris"].removeprefix("file://")).parent.parent == cache
        self.put_sample(cache)
        assert Path(calls[1]["uris"].removeprefix("file://")).is_file()


class TestPanels:
    def test_a_button_leads_to_each_panel_that_is_there_and_to_no_other(self, host, panel, tmp_path):
        names = [name for name in panel._panelButtons]
        assert all(name in host.moduleManager.modulesNames() for name in names)
        source = (
            "from slicer.ScriptedLoadableModule import *\n"
            "class LCTfoundRiskScoring(ScriptedLoadableModule):\n"
            "    def __init__(self, parent):\n"
            "        ScriptedLoadableModule.__init__(self, parent)\n"
            "        parent.title = 'Risk'\n"
            "class LCTfoundRiskScoringWidget(ScriptedLoadableModuleWidget): pass\n"
        )
        (tmp_path / "LCTfoundRiskScoring.py").write_text(source)
        host.load_module(tmp_path / "LCTfoundRiskScoring.py")
        try:
            panel.enter()
            button = panel._panelButtons["LCTfoundRiskScoring"]
            assert button.text == "Risk" and len(panel._panelButtons) == len(names) + 1
            panel.enter()
            assert len(panel._panelButtons) == len(names) + 1, "no second button"
        finally:
            host.moduleManager.unload("LCTfoundRiskScoring")


def gray(pixmap) -> bytes:
    """The picture without its colors."""
    image = pixmap.toImage()
    return bytes(
        int(image.pixelColor(x, y).lightness() > 200) for y in range(image.height()) for x in range(image.width())
    )


def hide(monkeypatch, name: str) -> None:
    """Make a package look as if it were not installed, to this process."""
    real = importlib.metadata.distributions

    def without(**how):
        return (found for found in real(**how) if found.metadata["Name"] != name)

    monkeypatch.setattr(importlib.metadata, "distributions", without)


def with_missing(panel, name: str, monkeypatch):
    """The set-up section in a Slicer without one package."""
    hide(monkeypatch, name)
    section = panel.setupSection
    section.state = section.setup.state()
    section._show()
    assert section.state.needsInstall
    return section


def stub(monkeypatch, name: str = "PyTorchUtils", **content: Any) -> None:
    """A module that Slicer would have."""
    import types

    module = types.ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
