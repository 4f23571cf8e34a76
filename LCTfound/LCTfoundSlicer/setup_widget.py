"""The set-up section of the home panel, and what every panel asks before its first run: is all there?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from LCTfoundLib.errors import WeightError
from LCTfoundSlicer.environment import RunningProbe
from LCTfoundSlicer.lights import lightIcon, lightPixmap, lightWord
from LCTfoundSlicer.run import sharedRunner, shutDown
from LCTfoundSlicer.setup import Outcome, Setup, Step
from LCTfoundSlicer.setup_checks import SetupState
from LCTfoundSlicer.setup_errors import ConsentDeclined, FilesInUse, SetupError
from LCTfoundSlicer.setup_plan import InstallPlan
from LCTfoundSlicer.slicer_doors import applicationSettings, slicerSetup
from LCTfoundSlicer.weights import Weights
from LCTfoundSlicer.weights_widget import acknowledgeLicenses

__all__ = ["SetupSection", "askConsent", "ensureReady"]

_PULSE_MS = 100
_LIGHT, _WHAT, _FOUND = range(3)


def ensureReady(weightNames: Sequence[str] = ()) -> bool:
    """Whether a run may start now; offers to install what is missing and asks for licenses not yet acknowledged.

    Quick when all is there: only the records of the packages are read.

    Args:
        weightNames: weights that the run needs.

    Returns:
        False when the user declined.

    Raises:
        SetupError: something is missing or broken and could not be mended; the message tells the remedy.
        WeightError: a weight is missing, or its license was not acknowledged and nobody is there to ask.
    """
    setup = slicerSetup()
    state = setup.state()
    if state.needsInstall:
        if slicer.app.testingEnabled() or slicer.util.mainWindow() is None:
            raise SetupError(f"{state.problems()[0].title}: {state.sentence()}")
        try:
            _install(setup, setup.plan(setup.examine()))
        except ConsentDeclined:
            return False
    return _weightsAreUsable(Weights(applicationSettings()), weightNames)


def _weightsAreUsable(weights: Weights, names: Sequence[str]) -> bool:
    found = {weight.name for weight in weights.all()}
    if missing := [name for name in names if name not in found]:
        raise WeightError(
            _("The weights {names} are missing; bring them in with 'Import' in the module LCTfound.").format(
                names=", ".join(missing)
            )
        )
    return acknowledgeLicenses(weights, names)


def askConsent(plan: InstallPlan) -> bool:
    """The one question before an install."""
    title = _("LCTfound: install Python packages")
    return bool(slicer.util.confirmOkCancelDisplay(plan.text(), title))


def _install(setup: Setup, plan: InstallPlan, onStep: Callable[[Step], None] = lambda step: None) -> Outcome:
    """Install by a plan, with the worker ended: it holds the packages open."""
    if sharedRunner().isBusy:
        raise FilesInUse(_("A computation is running; wait for it or cancel it, then install."))
    shutDown()
    outcome = setup.install(plan, askConsent, onStep)
    _offerRestart(outcome)
    return outcome


def _offerRestart(outcome: Outcome) -> None:
    if not outcome.restart or slicer.app.testingEnabled():
        return
    question = _("Slicer still holds the old version of {names}. Restart it now?").format(
        names=", ".join(outcome.restart)
    )
    if slicer.util.confirmYesNoDisplay(question, _("LCTfound: restart")):
        slicer.util.restart()


class SetupSection:
    """Lights, checks, and the buttons that mend; all widgets come from the .ui file.

    Args:
        ui: the panel's widgets by name.
        setup: of this Slicer.
    """

    def __init__(self, ui: Any, setup: Setup) -> None:
        self.ui, self.setup = ui, setup
        self.state: SetupState = setup.state()
        self._probe: RunningProbe | None = None
        self._isInstalling = False
        self._timer = qt.QTimer()
        self._timer.setInterval(_PULSE_MS)
        self._timer.connect("timeout()", self._pulse)
        self._setUpTable()
        ui.installButton.connect("clicked()", self.install)
        ui.offlineButton.connect("clicked()", self._askForWheels)
        ui.checkButton.connect("clicked()", self.check)
        ui.continueButton.connect("clicked()", self.goOn)
        ui.forgetButton.connect("clicked()", self._forget)
        ui.setupProgressBar.visible = False
        self._say("")
        self._show()

    @property
    def isChecking(self) -> bool:
        return self._probe is not None

    def cleanup(self) -> None:
        """End what runs in the background."""
        self._timer.stop()
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    def checkOnce(self) -> None:
        """Check by real imports, unless that was done already."""
        if not self.state.isVerified:
            self.check()

    def check(self) -> None:
        """Check by real imports, in the background."""
        if self.isChecking or self._isInstalling:
            return
        self._say(_("Trying the packages ..."))
        self._probe = self.setup.startProbe()
        self._timer.start()
        self._updateButtons()

    def install(self) -> None:
        """Install or repair what the state asks for."""
        self._carryOut(None, self.ui.cpuOnlyCheckBox.checked)

    def installOffline(self, folder: Path) -> None:
        """The same from a folder of wheels."""
        self._carryOut(folder, self.ui.cpuOnlyCheckBox.checked)

    def goOn(self) -> None:
        """Go on with an install that was cut off, as it was begun."""
        pending = self.setup.pending()
        if pending is not None:
            self._carryOut(Path(pending.offlineFolder) if pending.offlineFolder else None, pending.cpuOnly)

    def _carryOut(self, offlineFolder: Path | None, cpuOnly: bool) -> None:
        if self.isChecking or self._isInstalling:
            return
        self._isInstalling = True
        self.ui.setupProgressBar.visible = True
        self._updateButtons()
        try:
            self._say(_("Looking at what is there ..."))
            plan = self.setup.plan(self.setup.examine(), offlineFolder, cpuOnly)
            self.state = _install(self.setup, plan, self._showStep).state
            self._say(_("All packages work."))
        except ConsentDeclined as error:
            self._say(str(error))
            self.state = self.setup.state()
        except SetupError as error:
            self._say(str(error))
            self.state = self.setup.state()
            slicer.util.errorDisplay(str(error), windowTitle=_("LCTfound: install"), detailedText=error.log)
        finally:
            self._isInstalling = False
            self.ui.setupProgressBar.visible = False
            self._show()

    def _showStep(self, step: Step) -> None:
        self.ui.setupProgressBar.setValue(list(Step).index(step) + 1)
        self._say(step.text + " ...")
        slicer.app.processEvents()

    def _pulse(self) -> None:
        if self._probe is None or not self._probe.poll():
            return
        self._timer.stop()
        self.state = self.setup.state(self._probe.result())
        self._probe = None
        pending = self.setup.pending()
        if pending is not None and pending.step is Step.VERIFY and self.state.isReady:
            self.setup.forgetPending()  # only this check was still to be done
        self._say("")
        self._show()

    def _setUpTable(self) -> None:
        table = self.ui.checksTable
        table.setColumnCount(3)
        table.setHorizontalHeaderLabels([_("Light"), _("What"), _("Found")])
        table.horizontalHeader().setStretchLastSection(True)
        table.verticalHeader().setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        table.verticalHeader().setVisible(False)
        self.ui.setupProgressBar.setRange(0, len(Step))

    def _show(self) -> None:
        light = self.state.light
        self.ui.lightLabel.setPixmap(lightPixmap(light, 24))
        self.ui.lightLabel.toolTip = lightWord(light)
        self.ui.stateLabel.text = f"<b>{escape(lightWord(light).capitalize())}.</b> {escape(self.state.sentence())}"
        self._fillTable()
        self._showHardware()
        self._showPending()
        self._updateButtons()

    def _fillTable(self) -> None:
        table = self.ui.checksTable
        checks = sorted(self.state.checks, key=lambda check: -check.light)  # what needs attention first
        table.setRowCount(len(checks))
        for row, check in enumerate(checks):
            found = f"{check.finding}\n{check.remedy}" if check.remedy else check.finding
            for column, text in ((_LIGHT, lightWord(check.light)), (_WHAT, check.title), (_FOUND, found)):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(found)
                if column == _LIGHT:
                    item.setIcon(lightIcon(check.light))
                table.setItem(row, column, item)
        table.resizeColumnToContents(_LIGHT)
        table.resizeColumnToContents(_WHAT)

    def _showHardware(self) -> None:
        rows = "".join(
            f"<tr><td valign='top'><b>{escape(what)}</b>&nbsp;</td><td>{escape(value)}</td></tr>"
            for what, value in self.state.hardware
        )
        unknown = escape(_("Known once the packages are installed and checked."))
        self.ui.hardwareLabel.text = f"<table>{rows}</table>" if rows else unknown

    def _showPending(self) -> None:
        pending = self.setup.pending()
        self.ui.pendingFrame.visible = pending is not None
        if pending is not None:
            self.ui.pendingLabel.text = _("An install was cut off ({step}, {time}).").format(
                step=pending.step.text, time=pending.started[:16].replace("T", " ")
            )

    def _updateButtons(self) -> None:
        idle = not self.isChecking and not self._isInstalling
        ui = self.ui
        ui.installButton.text = _("Repair ...") if self.state.needsRepair else _("Install ...")
        ui.installButton.enabled = idle and self.state.needsInstall
        ui.offlineButton.enabled = idle and self.state.needsInstall
        ui.cpuOnlyCheckBox.enabled = idle and self.state.needsInstall
        ui.checkButton.enabled = idle
        ui.continueButton.enabled = idle
        ui.forgetButton.enabled = idle

    def _askForWheels(self) -> None:
        folder = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), _("Folder of wheels (.whl)"))
        if folder:
            self.installOffline(Path(folder))

    def _forget(self) -> None:
        self.setup.forgetPending()
        self._showPending()

    def _say(self, text: str) -> None:
        self.ui.setupStatusLabel.text = text
        self.ui.setupStatusLabel.visible = bool(text)
