"""The weights section of the home panel, and the question about licenses."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from LCTfoundLib.errors import WeightError
from LCTfoundSlicer.lights import lightIcon
from LCTfoundSlicer.setup_checks import Light
from LCTfoundSlicer.weights import (
    CheckResult,
    Weight,
    WeightImport,
    Weights,
    cardLines,
    licenseText,
)

__all__ = ["WeightsSection", "acknowledgeLicenses"]

_NAME, _VERSION, _SIZE, _LICENSE, _STATE = range(5)
#: Steps of a check or an import: one for each turn of the event loop.
_PULSE_MS = 1


def acknowledgeLicenses(weights: Weights, names: Sequence[str]) -> bool:
    """Ask once for each weight whose license restricts its use; whether all are acknowledged now.

    Without a person (tests, ``--no-main-window``) nothing is acknowledged.

    Raises:
        WeightError: nobody is there to ask.
    """
    for card in weights.unacknowledged(names):
        if slicer.app.testingEnabled() or slicer.util.mainWindow() is None:
            raise WeightError(
                _(
                    "The license {license} of the weight '{name}' was not acknowledged yet; do so in the module "
                    "LCTfound, or by LCTfoundSlicer.weights.Weights.acknowledge in a script."
                ).format(license=card.license, name=card.name)
            )
        question = f"{licenseText(card)}\n\n{_('Do you acknowledge this license?')}"
        if not slicer.util.confirmYesNoDisplay(question, _("License of a weight")):
            return False
        weights.acknowledge(card)
    return True


class WeightsSection:
    """Folder picker, table, details and buttons; all widgets come from the .ui file.

    Args:
        ui: the panel's widgets by name.
        weights: of this Slicer.
        onChanged: told when other weights may be used from now on.
    """

    def __init__(self, ui: Any, weights: Weights, onChanged: Callable[[], None] = lambda: None) -> None:
        self.ui, self.weights, self._onChanged = ui, weights, onChanged
        self._rows: list[Weight] = []
        self._work: Generator[float, None, Any] | None = None
        self._onWorkDone: Callable[[Any], None] = lambda result: None
        self._timer = qt.QTimer()
        self._timer.setInterval(_PULSE_MS)
        self._timer.connect("timeout()", self._step)
        self._setUpTable()
        folder = weights.folder
        ui.weightsPathLineEdit.currentPath = "" if folder is None else str(folder)
        ui.weightsPathLineEdit.connect("currentPathChanged(QString)", self._folderEdited)
        ui.weightsTable.connect("itemSelectionChanged()", self._showDetails)
        ui.checkWeightsButton.connect("clicked()", self.checkAll)
        ui.importWeightsButton.connect("clicked()", self._askForImport)
        ui.deleteWeightButton.connect("clicked()", self._askForDelete)
        ui.acknowledgeButton.connect("clicked()", self._acknowledge)
        ui.weightsProgressBar.visible = False
        self.refresh()

    @property
    def isBusy(self) -> bool:
        return self._work is not None

    @property
    def selected(self) -> Weight | None:
        """The weight of the selected row."""
        row = self.ui.weightsTable.currentRow()
        return self._rows[row] if 0 <= row < len(self._rows) else None

    def cleanup(self) -> None:
        """Stop what is going on; a half-copied weight is removed."""
        self._timer.stop()
        if self._work is not None:
            self._work.close()
            self._work = None

    def refresh(self) -> None:
        """Read the folders again."""
        chosen = self.selected.name if self.selected else ""
        self._rows = self.weights.all()
        table = self.ui.weightsTable
        table.setRowCount(len(self._rows))
        for row, weight in enumerate(self._rows):
            self._fillRow(row, weight)
        table.resizeColumnsToContents()
        table.resizeRowsToContents()
        names = [weight.name for weight in self._rows]
        if names:
            table.selectRow(names.index(chosen) if chosen in names else 0)
        self._showDetails()

    def checkAll(self) -> None:
        """Compare all checksums, while the window goes on."""
        self._start(self._checkAll(), lambda result: self._say(result))

    def importFrom(self, folder: Path) -> None:
        """Bring in the weights of a folder, while the window goes on."""
        self._start(self.weights.importFrom(folder), self._imported)

    def _checkAll(self) -> Generator[float, None, str]:
        weights = self.weights.all()
        problems = []
        for number, weight in enumerate(weights):
            check = self.weights.check(weight)
            while True:
                try:
                    yield (number + next(check)) / len(weights)
                except StopIteration as end:
                    problems += [end.value] if end.value else []
                    break
        return "\n".join(problems) or _("All weights match their checksums.")

    def _imported(self, result: WeightImport) -> None:
        lines = list(result.problems)
        if result.imported:
            lines.insert(0, _("Brought in: {names}.").format(names=", ".join(result.imported)))
            self._onChanged()
        self._say("\n".join(lines))

    def _start(self, work: Generator[float, None, Any], onDone: Callable[[Any], None]) -> None:
        if self.isBusy:
            return
        self._work, self._onWorkDone = work, onDone
        self._say("")
        self.ui.weightsProgressBar.setValue(0)
        self.ui.weightsProgressBar.visible = True
        self._updateButtons()
        self._timer.start()

    def _step(self) -> None:
        """One step of the work: some 20 ms."""
        if self._work is None:
            return
        try:
            self.ui.weightsProgressBar.setValue(round(100 * next(self._work)))
            return
        except StopIteration as end:
            done, result = self._onWorkDone, end.value
        except Exception as error:
            done, result = self._say, str(error)
        self._timer.stop()
        self._work = None
        self.ui.weightsProgressBar.visible = False
        self.refresh()
        done(result)

    def _setUpTable(self) -> None:
        table = self.ui.weightsTable
        table.setColumnCount(5)
        table.setHorizontalHeaderLabels([_("Weight"), _("Version"), _("Size"), _("License"), _("State")])
        table.horizontalHeader().setStretchLastSection(True)
        table.verticalHeader().setVisible(False)

    def _fillRow(self, row: int, weight: Weight) -> None:
        card = weight.card
        texts = {
            _NAME: weight.name,
            _VERSION: card.version if card else "",
            _SIZE: f"{weight.megabytes:.1f} MB",
            _LICENSE: card.license if card else "",
            _STATE: weight.resultText(),
        }
        for column, text in texts.items():
            item = qt.QTableWidgetItem(text)
            item.setToolTip(weight.problem or f"{weight.origin.text}: {weight.entry.path}")
            if column == _STATE:
                item.setIcon(lightIcon(_light(weight)))
            self.ui.weightsTable.setItem(row, column, item)

    def _showDetails(self) -> None:
        weight = self.selected
        lines = cardLines(weight) if weight else [(_("Weights"), _("There is none; bring some in."))]
        rows = "".join(
            f"<tr><td valign='top' width='90'><b>{escape(what)}</b></td><td>{escape(value)}</td></tr>"
            for what, value in lines
        )
        self.ui.weightDetails.setHtml(f"<table>{rows}</table>")
        self._updateButtons()

    def _updateButtons(self) -> None:
        weight, idle = self.selected, not self.isBusy
        self.ui.checkWeightsButton.enabled = idle and bool(self._rows)
        self.ui.importWeightsButton.enabled = idle
        self.ui.deleteWeightButton.enabled = idle and weight is not None and weight.canBeDeleted
        self.ui.acknowledgeButton.visible = weight is not None and bool(self.weights.unacknowledged([weight.name]))

    def _folderEdited(self, text: str) -> None:
        """Each letter typed comes here: what is no folder yet is not taken."""
        text = text.strip()
        if text and not Path(text).is_dir():
            self._say(_("There is no such folder; the weights are looked for where they were before."))
            return
        self.weights.chooseFolder(Path(text) if text else None)
        self._say("")
        self.refresh()
        self._onChanged()

    def _askForImport(self) -> None:
        title = _("Folder with weights and their cards")
        folder = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), title)
        if folder:
            self.importFrom(Path(folder))

    def _askForDelete(self) -> None:
        weight = self.selected
        if weight is None:
            return
        question = _("Delete the weight '{name}' and its card from {folder}?").format(
            name=weight.name, folder=weight.entry.path.parent
        )
        if slicer.util.confirmYesNoDisplay(question, _("Delete a weight")):
            self.delete(weight)

    def delete(self, weight: Weight) -> None:
        """Delete a weight of the user's, without a question."""
        with slicer.util.tryWithErrorDisplay(_("The weight was not deleted.")):
            self.weights.delete(weight)
            self._onChanged()
        self.refresh()

    def _acknowledge(self) -> None:
        weight = self.selected
        if weight is not None:
            acknowledgeLicenses(self.weights, [weight.name])
            self._updateButtons()

    def _say(self, text: str) -> None:
        self.ui.weightsStatusLabel.text = text
        self.ui.weightsStatusLabel.visible = bool(text)


def _light(weight: Weight) -> Light:
    return {
        CheckResult.GOOD: Light.GOOD,
        CheckResult.UNCHECKED: Light.UNKNOWN,
        CheckResult.BAD: Light.PROBLEM,
    }[weight.result]
