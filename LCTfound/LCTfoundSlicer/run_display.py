"""How a run goes, in a panel's widgets: one button that starts and stops, a bar, a line of text, and a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import slicer

from LCTfoundSlicer.run import Listener, PanelRun, RunFailed, Stage
from LCTfoundSlicer.translation import tr as _

__all__ = ["RunDisplay", "duration"]


@dataclass
class RunDisplay:
    """The widgets of a panel that show its run.

    Attributes:
        progressBar: QProgressBar from 0 to 1000.
        statusLabel: QLabel.
        logText: QPlainTextEdit.
        changed: called when a run has begun or ended.
    """

    progressBar: Any
    statusLabel: Any
    logText: Any
    changed: Callable[[], None]

    def __post_init__(self) -> None:
        self.run: PanelRun | None = None

    @property
    def isRunning(self) -> bool:
        return self.run is not None

    def start(self, start: Callable[[Listener], PanelRun], onDone: Callable[[Any], None]) -> None:
        """Start a run; ``onDone`` gets what it was for."""
        self.progressBar.setValue(0)
        self.say("")
        listener = Listener(
            onProgress=self._show,
            onWarning=lambda text: self.log(_("Warning: {text}").format(text=text)),
            onLog=self.log,
            onDone=lambda value: self._ended(lambda: onDone(value)),
            onFailed=self._failed,
            onCancelled=lambda: self._ended(lambda: self.say(_("Stopped; the scene is as it was."))),
        )
        self.run = start(listener)
        self.progressBar.visible = True
        self.changed()

    def cancel(self) -> None:
        """Stop the run, if there is one; it ends within a second."""
        if self.run is not None:
            self.say(_("Stopping ..."))
            self.run.cancel()

    def say(self, text: str) -> None:
        self.statusLabel.text = text

    def log(self, text: str) -> None:
        self.logText.appendPlainText(text)

    def _show(self, stage: Stage) -> None:
        left = "" if stage.secondsLeft is None else _(", about {left} left").format(left=duration(stage.secondsLeft))
        self.progressBar.setValue(round(1000 * stage.fraction))
        self.say(f"{stage.text}{left}")

    def _ended(self, then: Callable[[], None]) -> None:
        self.run = None
        self.progressBar.visible = False
        try:
            then()
        finally:  # the button starts again, whatever showing the result came to
            self.changed()

    def _failed(self, error: RunFailed) -> None:
        self._ended(lambda: self.say(str(error)))
        self.log(str(error) + (f"\n{error.log}" if error.log else ""))
        slicer.util.errorDisplay(str(error), windowTitle=_("LCTfound"), detailedText=error.log or None)


def duration(seconds: float) -> str:
    """In minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
