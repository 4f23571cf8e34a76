"""A panel's run: the input goes to the worker, the result comes into the scene, and the window never waits.

What must happen in Slicer's own process is cut into steps of some milliseconds (generators); a timer does a few of them
at a time between the window's events. Scripts wait for the same run with ``PanelRun.wait``.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import qt
import slicer

from LCTfoundSlicer.jobs import Callbacks, Job, JobError, JobRunner, ProgressReport

__all__ = ["Listener", "PanelRun", "RunFailed", "RunState", "Stage", "scratchFolder", "sharedRunner", "shutDown"]

#: The timer's pulse, and how long the steps of one pulse may take before the window gets its turn (ms).
_PULSE_MS = 20
_SLICE_MS = 25
#: Shares of the bar: sending the input, the worker, showing the result.
_SENDING, _SHOWING = 0.03, 0.05


class RunFailed(RuntimeError):
    """A run ended without a result; the message is for the user, ``log`` for a report."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class RunState(Enum):
    """How far a run is."""

    SENDING = "sending"
    WORKING = "working"
    SHOWING = "showing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def isOver(self) -> bool:
        return self in (RunState.DONE, RunState.FAILED, RunState.CANCELLED)


@dataclass(frozen=True)
class Stage:
    """What a progress bar shows."""

    text: str
    fraction: float
    secondsLeft: float | None = None


def _ignore(*arguments: Any) -> None:
    pass


@dataclass
class Listener:
    """What a run tells; all calls come in the window's thread."""

    onProgress: Callable[[Stage], None] = _ignore
    onWarning: Callable[[str], None] = _ignore
    onLog: Callable[[str], None] = _ignore
    onDone: Callable[[Any], None] = _ignore
    onFailed: Callable[[RunFailed], None] = _ignore
    onCancelled: Callable[[], None] = _ignore


@dataclass
class PanelRun:
    """One run.

    Attributes:
        task: the worker's task.
        send: writes the input; yields the share done.
        payload: the request, asked for once the input is written.
        show: brings the worker's result into the scene; yields the share done and returns what the run is for.
        folder: what is exchanged with the worker; removed at the end.
        listener: told how it goes.
        stages: what the bar says while sending and while showing.
    """

    task: str
    send: Generator[float, None, Any]
    payload: Callable[[], dict[str, Any]]
    show: Callable[[dict[str, Any]], Generator[float, None, Any]]
    folder: Path
    listener: Listener | None = None
    stages: tuple[str, str] = ("Sending the CT", "Showing the result")
    state: RunState = RunState.SENDING
    value: Any = None
    error: RunFailed | None = None
    _job: Job | None = None
    _showing: Generator[float, None, Any] | None = None
    _tell: Listener = field(default_factory=Listener)
    _stepping: bool = False
    _cancelAsked: bool = False

    def start(self) -> PanelRun:
        """Begin; the window's timer carries the run on."""
        _pulse().add(self)
        self._tell = self.listener or Listener()
        self._tell.onProgress(Stage(self.stages[0], 0.0))
        return self

    def cancel(self) -> None:
        """Stop; nothing of the run stays in the scene."""
        if self.state is RunState.WORKING and self._job is not None:
            sharedRunner().cancel(self._job)
        elif self._stepping:  # asked for by what the step itself brought about
            self._cancelAsked = True
        elif not self.state.isOver:
            self._end(RunState.CANCELLED)

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the result, for scripts; the window stays alive meanwhile.

        Returns:
            What the run is for, for example the segmentation node; None if it was cancelled.

        Raises:
            RunFailed: with the sentence the panel would show.
            TimeoutError: not over in ``timeout`` seconds.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        while not self.state.isOver:
            _pulse().beat()
            slicer.app.processEvents()
            if limit is not None and time.monotonic() > limit:
                raise TimeoutError(f"the run was not over in {timeout} s")
            time.sleep(0.005)
        if self.error is not None:
            raise self.error
        return self.value

    def advance(self) -> None:
        """Do one step in the window's thread."""
        self._stepping = True
        try:
            if self.state is RunState.SENDING:
                self._sendStep()
            elif self.state is RunState.SHOWING:
                self._showStep()
        except Exception as error:  # whatever happens in here must reach the user, not vanish in the event loop
            self._fail(RunFailed(str(error) or type(error).__name__))
        finally:
            self._stepping = False
        if self._cancelAsked and not self.state.isOver:
            self.cancel()

    def _sendStep(self) -> None:
        share = next(self.send, None)
        if share is not None:
            self._tell.onProgress(Stage(self.stages[0], _SENDING * share))
            return
        self.state = RunState.WORKING
        callbacks = Callbacks(
            onProgress=self._report,
            onWarning=self._tell.onWarning,
            onLog=self._tell.onLog,
            onResult=self._received,
            onError=self._jobFailed,
            onCancelled=lambda: self._end(RunState.CANCELLED),
        )
        self._job = sharedRunner().submit(self.task, self.payload(), callbacks)

    def _report(self, report: ProgressReport) -> None:
        fraction = _SENDING + (1 - _SENDING - _SHOWING) * report.fraction
        self._tell.onProgress(Stage(report.stage, fraction, report.secondsLeft))

    def _received(self, result: dict[str, Any]) -> None:
        self.state = RunState.SHOWING
        self._showing = self.show(result)

    def _showStep(self) -> None:
        assert self._showing is not None
        try:
            share = next(self._showing)
        except StopIteration as stop:
            self.value = stop.value
            self._end(RunState.DONE)
            return
        self._tell.onProgress(Stage(self.stages[1], 1 - _SHOWING + _SHOWING * share))

    def _jobFailed(self, error: JobError) -> None:
        self._fail(RunFailed(error.message, error.log))

    def _fail(self, error: RunFailed) -> None:
        self.error = error
        self._end(RunState.FAILED)

    def _end(self, state: RunState) -> None:
        self.state = state
        _pulse().remove(self)
        for steps in (self.send, self._showing):
            if steps is not None:
                steps.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if state is RunState.DONE:
            self._tell.onDone(self.value)
        elif state is RunState.FAILED:
            self._tell.onFailed(self.error)
        else:
            self._tell.onCancelled()


class _Pulse:
    """The timer that carries runs on and fetches the worker's events."""

    def __init__(self) -> None:
        self.runs: list[PanelRun] = []
        self.timer = qt.QTimer()
        self.timer.setInterval(_PULSE_MS)
        self.timer.connect("timeout()", self.beat)
        self._beating = False

    def add(self, run: PanelRun) -> None:
        self.runs.append(run)
        self.timer.start()

    def remove(self, run: PanelRun) -> None:
        if run in self.runs:
            self.runs.remove(run)
        if not self.runs:
            self.timer.stop()

    def beat(self) -> None:
        """Fetch events, then do steps for a few milliseconds."""
        if self._beating:  # a callback that itself processes events must not start another round
            return
        self._beating = True
        try:
            time.sleep(0.001)  # lets the thread that reads the worker's lines have Python for a moment
            sharedRunner().poll()
            end = time.monotonic() + _SLICE_MS / 1000
            for run in list(self.runs):
                while run.state in (RunState.SENDING, RunState.SHOWING) and time.monotonic() < end:
                    run.advance()
        finally:
            self._beating = False


_shared: dict[str, Any] = {}


def _pulse() -> _Pulse:
    if "pulse" not in _shared:
        _shared["pulse"] = _Pulse()
    return _shared["pulse"]


def sharedRunner() -> JobRunner:
    """The one worker of the application; it ends with it."""
    if "runner" not in _shared:
        _shared["runner"] = JobRunner()
        slicer.app.connect("aboutToQuit()", shutDown)
    return _shared["runner"]


def shutDown() -> None:
    """End the worker and remove what was exchanged with it; the timer must not outlive the application."""
    pulse, runner = _shared.pop("pulse", None), _shared.pop("runner", None)
    if pulse is not None:
        pulse.timer.stop()
    if runner is not None:
        runner.shutdown()


def scratchFolder(kind: str) -> Path:
    """A new folder for what a run exchanges with the worker; it vanishes with the application at the latest."""
    return Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=sharedRunner().scratch))
