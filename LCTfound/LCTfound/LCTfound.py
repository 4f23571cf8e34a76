"""Home of LCTfound: is all set up, which weights are there, a sample CT, and the way to the panels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)

#: Panels in the order to show them; only those that this Slicer has loaded are shown.
PANELS = (
    "LCTfoundLungSegmentation",
    "LCTfoundMediastinalTumor",
    "LCTfoundVirtualCTA",
    "LCTfoundReconstruction",
    "LCTfoundRiskScoring",
)


def _findLibraries() -> None:
    """In a source checkout the libraries lie beside this module's folder; installed, they lie in it."""
    here = Path(__file__).resolve().parent
    if not (here / "LCTfoundSlicer").is_dir():
        sys.path += [str(place) for place in (here.parent, here.parent.parent) if str(place) not in sys.path]


class LCTfound(ScriptedLoadableModule):
    """The module as Slicer lists it."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        _findLibraries()
        parent.title = _("LCTfound")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = []
        parent.contributors = ["LCTfound contributors"]
        parent.helpText = _(
            "Start here: checks whether all that LCTfound needs is installed, and installs or repairs it; shows the "
            "weights with their cards, checks them and brings in others; loads a sample CT; leads to the panels. "
            "All computation stays on this computer. Research use only; not a medical device."
        )
        parent.acknowledgementText = _(
            "After: A lung CT vision foundation model facilitating disease diagnosis and medical imaging. "
            "Nature Communications (2025). Sample CT: LIDC-IDRI, The Cancer Imaging Archive, CC BY 3.0."
        )
        slicer.app.connect("startupCompleted()", self._onStartupCompleted)

    def _onStartupCompleted(self) -> None:
        from LCTfoundSlicer.sample_data import registerSampleData
        from LCTfoundSlicer.slicer_doors import slicerSetup

        registerSampleData(Path(self.resourcePath("SampleData/LIDC-IDRI-0001.png")))
        # A restart in the middle of an install: whoever asked for it finds the panel that goes on with it.
        if slicer.util.mainWindow() is not None and not slicer.app.testingEnabled() and slicerSetup().pending():
            slicer.util.selectModule(self.moduleName)


class LCTfoundLogic(ScriptedLoadableModuleLogic):
    """What the panel does, for scripts: no method needs the panel, or a main window."""

    def setup(self) -> Any:
        """The set-up of this Slicer, a ``LCTfoundSlicer.setup.Setup``."""
        from LCTfoundSlicer.slicer_doors import slicerSetup

        return slicerSetup()

    def weights(self) -> Any:
        """The weights of this Slicer, a ``LCTfoundSlicer.weights.Weights``."""
        from LCTfoundSlicer.slicer_doors import applicationSettings
        from LCTfoundSlicer.weights import Weights

        return Weights(applicationSettings())

    def panels(self) -> list[Any]:
        """The modules of the panels that this Slicer has loaded."""
        found = (getattr(slicer.modules, name.lower(), None) for name in PANELS)
        return [module for module in found if module is not None]

    def loadSampleCt(self, timeout: float = 600.0) -> Any:
        """Load the sample CT, fetched first if need be; its volume node. Waits for it.

        Raises:
            RuntimeError: it cannot be fetched or read; the message tells the remedy.
        """
        import time

        from LCTfoundSlicer.sample_data import SampleFetch, loadSample

        fetch, end = SampleFetch(), time.monotonic() + timeout
        while not fetch.poll():
            if time.monotonic() > end:
                fetch.cancel()
            slicer.app.processEvents()
            time.sleep(0.02)
        if fetch.path is None:
            raise RuntimeError(fetch.problem)
        return loadSample(fetch.path)


class LCTfoundWidget(ScriptedLoadableModuleWidget):
    """The home panel."""

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        from LCTfoundSlicer.setup_widget import SetupSection
        from LCTfoundSlicer.weights_widget import WeightsSection

        self.logic = LCTfoundLogic()
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/LCTfound.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self._sample: Any = None
        self.setupSection = SetupSection(self.ui, self.logic.setup())
        self.weightsSection = WeightsSection(self.ui, self.logic.weights())
        self.ui.sampleButton.connect("clicked()", self.onSampleButton)
        self._showSample(_attribution())
        self._panelButtons: dict[str, Any] = {}
        self._showPanels()

    def enter(self) -> None:
        """Each time the panel is opened; the first time the packages are really tried, in the background."""
        self._showPanels()
        self.weightsSection.refresh()
        self.setupSection.checkOnce()

    def cleanup(self) -> None:
        """The module is unloaded: nothing may go on."""
        if self._sample is not None:
            self._sample.cancel()
        self.setupSection.cleanup()
        self.weightsSection.cleanup()

    def onSampleButton(self) -> None:
        """Load the sample CT; while it is fetched, stop."""
        from LCTfoundSlicer.sample_data import SampleLoader

        if self._sample is not None and self._sample.isRunning:
            self._sample.cancel()
            self._showSample(_("Stopped; nothing was loaded."))
            return
        self._sample = SampleLoader(self._sampleLoaded, self._showSample)
        self._showSample(_("Fetching the sample CT ..."))

    def _sampleLoaded(self, node: Any) -> None:
        self._showSample(_("'{name}' is loaded. {attribution}").format(name=node.GetName(), attribution=_attribution()))

    def _showSample(self, text: str) -> None:
        isRunning = self._sample is not None and self._sample.isRunning
        self.ui.sampleButton.text = _("Stop") if isRunning else _("Load sample CT")
        self.ui.sampleProgressBar.visible = isRunning
        self.ui.sampleLabel.text = text

    def _showPanels(self) -> None:
        """A button for each panel; a panel may have been loaded since."""
        for module in self.logic.panels():
            if module.name in self._panelButtons:
                continue
            button = qt.QPushButton(module.title)
            button.setIcon(module.icon)
            button.toolTip = module.helpText
            button.connect("clicked()", lambda name=module.name: slicer.util.selectModule(name))
            self.ui.panelsFrame.layout().addWidget(button)
            self._panelButtons[module.name] = button


def _attribution() -> str:
    from LCTfoundLib.demo import ATTRIBUTION

    return ATTRIBUTION


class LCTfoundTest(ScriptedLoadableModuleTest):
    """Runs in Slicer as ``py_LCTfound`` and on the project's host; installs and downloads nothing."""

    def setUp(self) -> None:
        slicer.mrmlScene.Clear()

    def runTest(self) -> None:
        for test in (
            self.test_every_check_has_a_finding_and_every_problem_a_remedy,
            self.test_nothing_is_installed_without_consent,
            self.test_the_shipped_weights_match_their_checksums,
            self.test_shipped_weights_are_not_deleted,
        ):
            self.setUp()
            test()

    def test_every_check_has_a_finding_and_every_problem_a_remedy(self) -> None:
        """Nothing is imported for it: a Slicer without torch is told so, and does not fail."""
        from LCTfoundSlicer.setup_checks import Light

        state = LCTfoundLogic().setup().state()
        self.assertGreater(len(state.checks), 8)
        for check in state.checks:
            self.assertTrue(check.title and check.finding)
            self.assertEqual(check.light is Light.PROBLEM, bool(check.remedy) and check in state.problems())

    def test_nothing_is_installed_without_consent(self) -> None:
        """Declining leaves all installed packages as they are."""
        from LCTfoundSlicer.setup_errors import SetupError
        from LCTfoundSlicer.setup_plan import InstallPlan, PackageSize, PlannedPackage, Source

        setup = LCTfoundLogic().setup()
        before = setup.environment.distributions()
        package = PlannedPackage("lctfound-nothing", "test", PackageSize(1, 1), Source.PACKAGE_INDEX)
        plan = InstallPlan((package,), (), setup.environment.sitePackages)
        with self.assertRaises(SetupError):
            setup.install(plan, lambda plan: False)
        self.assertEqual(setup.environment.distributions(), before)
        self.assertIsNone(setup.pending())

    def test_the_shipped_weights_match_their_checksums(self) -> None:
        weights = LCTfoundLogic().weights()
        shipped = [weight for weight in weights.all() if not weight.canBeDeleted]
        self.assertTrue(shipped, "there are no weights beside the module")
        for weight in shipped:
            for _fraction in weights.check(weight):
                pass
            checked = weights.find(weight.name)
            self.assertEqual(checked.problem, "")

    def test_shipped_weights_are_not_deleted(self) -> None:
        from LCTfoundLib.errors import WeightError

        weights = LCTfoundLogic().weights()
        for weight in weights.all():
            if not weight.canBeDeleted:
                with self.assertRaises(WeightError):
                    weights.delete(weight)
                self.assertTrue(weight.entry.path.is_file())
