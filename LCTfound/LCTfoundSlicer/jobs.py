"""Jobs for the engine's worker: a warm process that computes while the window stays alive.

The runner needs neither Qt nor Slicer. Threads move lines between the worker's pipes and queues; ``poll``, which a
timer of the window or a script calls, looks into the queue and calls back in its own thread, and never waits. One job
runs at a time, others wait for their turn. When the worker dies, its job fails with a sentence that tells the remedy,
and the next job gets a fresh worker.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

__all__ = ["Callbacks", "Job", "JobError", "JobErrorKind", "JobRunner", "JobState", "ProgressReport"]

_PROTOCOL = 1
#: The worker imports nothing heavy before it says hello, but a virus scanner may look at Python first (s).
_HELLO_TIMEOUT = 60.0
#: A worker that does not stop by itself in this time after a cancel is killed (s).
_CANCEL_GRACE = 0.5
#: A worker gets so long to end by itself (s).
_QUIT_GRACE = 1.0
#: ``poll`` handles events no longer than this (s); the rest waits for the next call.
_POLL_BUDGET = 0.03
_TAIL_LINES = 40
_MOST_LOG_BYTES = 2_000_000
_MARKER = "owner.json"
_SCRATCH = "lctfound-session-"
#: A scratch folder that does not tell its owner is removed when it is older (s).
_OLD = 86_400.0

_log = logging.getLogger(__name__)


class JobState(Enum):
    """How far a job is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def isOver(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class JobErrorKind(Enum):
    """What went wrong; the last two are seen by the runner, the others are told by the worker."""

    UNSUITABLE_IMAGE = "unsuitable_image"
    WEIGHT = "weight"
    OUTPUT = "output"
    OUT_OF_MEMORY = "out_of_memory"
    REQUEST = "request"
    INTERNAL = "internal"
    CRASHED = "crashed"
    NOT_STARTED = "not_started"


@dataclass(frozen=True)
class JobError:
    """Why a job failed.

    Attributes:
        kind: for a program.
        message: one sentence with the remedy, for a person.
        log: path of a file for a report; empty where there is none.
        details: the last lines that the worker wrote.
    """

    kind: JobErrorKind
    message: str
    log: str = ""
    details: str = ""

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class ProgressReport:
    """How far a job is: stage, share done (0-1), seconds since its start and left (None while that is unknown)."""

    stage: str
    fraction: float
    elapsed: float = 0.0
    secondsLeft: float | None = None


@dataclass(frozen=True)
class Callbacks:
    """What a job tells, all from within ``JobRunner.poll``; ``onResult``, ``onError`` or ``onCancelled`` comes last."""

    onProgress: Callable[[ProgressReport], None] | None = None
    onWarning: Callable[[str], None] | None = None
    onResult: Callable[[dict[str, Any]], None] | None = None
    onError: Callable[[JobError], None] | None = None
    onCancelled: Callable[[], None] | None = None
    onLog: Callable[[str], None] | None = None


@dataclass(eq=False)
class Job:
    """A job that was submitted.

    Attributes:
        id: as in the worker's events.
        task, payload: what was asked for, with all fields of the request.
        state: how far it is; changes only in ``JobRunner``'s methods.
        result: the worker's result event once DONE, ``folder`` and so on.
        error: why it FAILED.
    """

    id: str
    task: str
    payload: dict[str, Any]
    callbacks: Callbacks
    state: JobState = JobState.WAITING
    result: dict[str, Any] | None = None
    error: JobError | None = None
    cancelledAt: float | None = None


class JobRunner:
    """Jobs for one worker.

    Args:
        command: starts the worker; default: PythonSlicer (or this Python) with the engine beside this package.
        environment: variables for the worker, added to those of this process.
        helloTimeout: seconds until a worker that says nothing is given up.
        scratchParent: where the session's scratch folder is made; default: the system's temporary folder.

    All methods are for one thread, such as the window's. The runner ends with its process at the latest.
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        helloTimeout: float = _HELLO_TIMEOUT,
        scratchParent: Path | None = None,
    ) -> None:
        self._command = list(command) if command is not None else _workerCommand()
        self._helloTimeout = helloTimeout
        self._scratch = _Scratch(scratchParent or Path(tempfile.gettempdir()))
        self._environment = _workerEnvironment() | {"LCTFOUND_SCRATCH": str(self.scratch)} | dict(environment or {})
        self._inbox = _Inbox()
        self._process: _Process | None = None
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._untold: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._closed = False
        self._device: dict[str, str] | None = None
        self._atExit = _atExit(self)

    @property
    def scratch(self) -> Path:
        """Folder of this session for what is exchanged with the worker; outputs must lie in it."""
        return self._scratch.folder

    @property
    def isBusy(self) -> bool:
        """Whether a job runs or waits."""
        return self._running is not None or bool(self._waiting)

    @property
    def isWarm(self) -> bool:
        """Whether the worker has its libraries and networks loaded."""
        return self._device is not None

    @property
    def device(self) -> dict[str, str] | None:
        """What the worker computes on (``device``, ``name``, ``precision``, ``reason``); None until it is warm."""
        return self._device

    @property
    def workerPid(self) -> int | None:
        """Process of the worker; None before its hello."""
        return self._process.pid if self._process is not None else None

    def warmUp(self) -> None:
        """Start the worker, so that it is warm when the first job comes."""
        self._checkOpen()
        self._ensureProcess()

    def submit(self, task: str, payload: Mapping[str, Any], callbacks: Callbacks | None = None) -> Job:
        """Hand in a job; it begins when those before it are over.

        Args:
            task: ``segment_lungs``, ``relabel``, ``export`` or ``doctor``.
            payload: the other fields of the request; where ``output`` is missing, it lies in ``scratch``.
            callbacks: told from within ``poll``.

        Raises:
            TypeError: the payload holds more than plain values and paths.
        """
        self._checkOpen()
        name = f"job-{secrets.token_hex(6)}"
        request = {"output": str(self.scratch / name), **payload, "task": task, "id": name}
        request = json.loads(json.dumps(request, default=os.fspath))  # what cannot be sent is told here, not in poll
        job = Job(name, task, request, callbacks or Callbacks())
        self._waiting.append(job)
        if not self.isWarm:
            self._tell(job.callbacks.onProgress, ProgressReport("Starting the engine", 0.0))
        self._advance()
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job; ``onCancelled`` tells when it is stopped, within a second. A job that is over stays as it is."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._finish(job, JobState.CANCELLED)
        elif job is self._running and job.cancelledAt is None:
            job.cancelledAt = time.monotonic()
            assert self._process is not None
            self._process.send({"task": "cancel", "id": job.id})

    def poll(self) -> None:
        """Call back for what happened since the last call, and go on with the jobs. Never waits.

        Callbacks may call any method of the runner. What a callback raises is logged.
        """
        end = time.monotonic() + _POLL_BUDGET
        self._tellAll()
        while not self._closed and time.monotonic() < end:
            arrived = self._inbox.take()
            if arrived is None:
                break
            self._handle(*arrived)
            self._tellAll()
        if not self._closed:
            self._checkTimes()
            self._advance()
        self._tellAll()

    def wait(self, job: Job, timeout: float | None = None) -> JobState:
        """Poll until a job is over, for scripts and tests.

        Returns:
            The job's state; not over if ``timeout`` seconds passed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self.poll()
            left = 1.0 if end is None else end - time.monotonic()
            if job.state.isOver or left <= 0 or self._closed:
                return job.state
            self._inbox.wait(min(left, 0.05))

    def shutdown(self) -> None:
        """End the worker, drop all jobs (no callback is called any more) and remove the scratch folder."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._atExit)
        for job in (self._running, *self._waiting):
            if job is not None:
                job.state = JobState.CANCELLED
        if self._process is not None:
            self._process.quit()
            if self._running is not None:
                _removeUnfinished(self._running)
        self._running, self._process, self._device = None, None, None
        self._waiting.clear()
        self._untold.clear()
        self._scratch.remove()

    # -- the worker ------------------------------------------------------------------------------------------------

    def _checkOpen(self) -> None:
        if self._closed:
            raise RuntimeError("the job runner was shut down")

    def _ensureProcess(self) -> _Process | None:
        """The worker, started where there is none; None when that fails, which all waiting jobs are told."""
        if self._process is None:
            self._device = None
            try:
                self._process = _Process(self._command, self._environment, self.scratch, self._inbox)
            except OSError as error:
                reason = f"{self._command[0]}: {error.strerror or error}"
                self._failWaiting(JobError(JobErrorKind.NOT_STARTED, _notStarted(reason)))
        return self._process

    def _advance(self) -> None:
        """Send the next job if the worker is free and has said hello."""
        if self._running is not None or not self._waiting:
            return
        process = self._ensureProcess()
        if process is not None and process.pid is not None:
            job = self._running = self._waiting.popleft()
            job.state = JobState.RUNNING
            process.send(job.payload)

    def _checkTimes(self) -> None:
        process, job, now = self._process, self._running, time.monotonic()
        if process is None:
            return
        if process.pid is None and now - process.startedAt > self._helloTimeout:
            self._discard(process)
            reason = f"no answer in {self._helloTimeout:.0f} s{process.lastWords()}"
            self._failWaiting(process.error(JobErrorKind.NOT_STARTED, _notStarted(reason)))
        elif job is not None and job.cancelledAt is not None and now - job.cancelledAt > _CANCEL_GRACE:
            self._discard(process)
            _removeUnfinished(job)
            self._finish(job, JobState.CANCELLED)
            self._ensureProcess()

    def _discard(self, process: _Process) -> None:
        """Kill the worker; what still comes from it counts for nothing."""
        process.kill()
        self._process, self._device = None, None

    # -- what arrives ----------------------------------------------------------------------------------------------

    def _handle(self, process: _Process, event: dict[str, Any] | _Ended | str) -> None:
        if process is not self._process:
            return
        if isinstance(event, str):
            if self._running is not None:
                self._tell(self._running.callbacks.onLog, event)
        elif isinstance(event, _Ended):
            self._workerEnded(process, event.code)
        elif event.get("event") == "hello":
            self._greet(process, event)
        elif event.get("event") == "ready":
            self._device = dict(event.get("device") or {})
        elif self._running is not None and event.get("id") == self._running.id:
            self._jobEvent(self._running, event)
        elif event.get("event") == "error":
            _log.warning("worker: %s", event.get("message"))

    def _greet(self, process: _Process, hello: Mapping[str, Any]) -> None:
        if hello.get("protocol") != _PROTOCOL or not isinstance(hello.get("pid"), int):
            self._discard(process)
            reason = f"engine {hello.get('version')} does not fit this extension"
            self._failWaiting(JobError(JobErrorKind.NOT_STARTED, _notStarted(reason)))
            return
        process.pid = hello["pid"]

    def _jobEvent(self, job: Job, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "progress" and job.cancelledAt is None:
            self._tell(job.callbacks.onProgress, _report(event))
        elif kind == "warning":
            self._tell(job.callbacks.onWarning, str(event.get("message")))
        elif kind in ("result", "error", "cancelled"):
            if job.cancelledAt is not None or kind == "cancelled":  # whoever cancelled wants no late result
                self._finish(job, JobState.CANCELLED)
            elif kind == "result":
                job.result = event
                self._finish(job, JobState.DONE)
            else:
                job.error = _jobError(event)
                self._finish(job, JobState.FAILED)

    def _workerEnded(self, process: _Process, code: int) -> None:
        """The worker ended by itself, or was ended by others."""
        self._process, self._device = None, None
        job = self._running
        if job is not None:
            _removeUnfinished(job)
            job.error = _crashError(process, code)
            self._finish(job, JobState.FAILED if job.cancelledAt is None else JobState.CANCELLED)
        elif process.pid is None:
            reason = f"exit code {code}{process.lastWords()}"
            self._failWaiting(process.error(JobErrorKind.NOT_STARTED, _notStarted(reason)))
        else:
            _log.warning("The idle worker ended with code %s", code)

    def _failWaiting(self, error: JobError) -> None:
        """All jobs that wait would meet the same trouble."""
        _log.warning("%s", error.message)
        while self._waiting:
            job = self._waiting.popleft()
            job.error = error
            self._finish(job, JobState.FAILED)

    def _finish(self, job: Job, state: JobState) -> None:
        job.state = state
        if job is self._running:
            self._running = None
        if state is JobState.DONE:
            self._tell(job.callbacks.onResult, job.result)
            return
        _removeOutput(job, self.scratch)
        if state is JobState.FAILED:
            self._tell(job.callbacks.onError, job.error)
        else:
            job.error = None
            self._tell(job.callbacks.onCancelled)

    def _tell(self, callback: Callable[..., None] | None, *arguments: Any) -> None:
        """Call back from within ``poll``."""
        if callback is not None:
            self._untold.append((callback, arguments))

    def _tellAll(self) -> None:
        while self._untold:
            callback, arguments = self._untold.popleft()
            try:
                callback(*arguments)
            except Exception:
                _log.exception("A callback of a job failed")


def _atExit(runner: JobRunner) -> Callable[[], None]:
    """Shuts the runner down if it still exists by then."""
    reference = weakref.ref(runner)

    def end() -> None:
        alive = reference()
        if alive is not None:
            alive.shutdown()

    atexit.register(end)
    return end


def _report(event: Mapping[str, Any]) -> ProgressReport:
    left = event.get("seconds_left")
    return ProgressReport(
        str(event.get("stage", "")),
        float(event.get("fraction") or 0.0),
        float(event.get("elapsed") or 0.0),
        None if left is None else float(left),
    )


def _jobError(event: Mapping[str, Any]) -> JobError:
    try:
        kind = JobErrorKind(event.get("kind"))
    except ValueError:
        kind = JobErrorKind.INTERNAL
    return JobError(kind, str(event.get("message")), str(event.get("log") or ""))


# -- the process -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ended:
    """The process is gone, with this exit code (negative: a signal)."""

    code: int


class _Inbox:
    """What the threads of all workers read, for ``poll``."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[_Process, dict[str, Any] | _Ended | str]] = SimpleQueue()
        self._arrived = threading.Event()

    def put(self, process: _Process, event: dict[str, Any] | _Ended | str) -> None:
        self._queue.put((process, event))
        self._arrived.set()

    def take(self) -> tuple[_Process, dict[str, Any] | _Ended | str] | None:
        """The next event; None if there is none now."""
        self._arrived.clear()
        try:
            return self._queue.get_nowait()
        except Empty:
            return None

    def wait(self, seconds: float) -> None:
        """Until something arrives or the time is over."""
        if self._queue.empty():
            self._arrived.wait(seconds)


class _Process:
    """A worker process; three threads serve its pipes, so that nobody else ever waits for them.

    Attributes:
        pid: of the worker itself once it said hello; the process that was started may be a launcher.
        startedAt: monotonic seconds.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], scratch: Path, inbox: _Inbox) -> None:
        self.pid: int | None = None
        self.startedAt = time.monotonic()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._logPath = scratch / f"worker-{secrets.token_hex(4)}.log"
        self._inbox = inbox
        self._popen = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=scratch,
            **_apart(),
        )
        self._errorReader = self._start(self._readErrors)
        self._reader = self._start(self._readEvents)
        self._writer = self._start(self._writeRequests)

    def send(self, request: Mapping[str, Any]) -> None:
        """Queue a request; one that does not reach the worker shows in its end."""
        self._outbox.put(json.dumps(request).encode("ascii") + b"\n")

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        self._outbox.put(None)
        if self._popen.poll() is not None and not self._reader.is_alive():
            return
        with suppress(OSError):
            if os.name == "posix":
                os.killpg(self._popen.pid, signal.SIGKILL)  # it leads a session of its own
            else:
                _terminate(self.pid)
                self._popen.kill()

    def quit(self) -> None:
        """End the process and wait for that: politely, then by force."""
        self.send({"task": "quit"})
        self._outbox.put(None)
        self._reader.join(_QUIT_GRACE)
        if self._reader.is_alive():
            self.kill()
        for thread in (self._reader, self._errorReader, self._writer):
            thread.join(_QUIT_GRACE)

    def lastWords(self) -> str:
        """What the worker said last, to end a reason with."""
        lines = [line for line in list(self._tail) if line.strip()]
        return f": {lines[-1].strip()}" if lines else ""

    def error(self, kind: JobErrorKind, message: str) -> JobError:
        """An error with the worker's log, kept where it outlives the scratch folder."""
        details, log = "\n".join(list(self._tail)), ""
        with suppress(OSError):
            kept = Path(tempfile.gettempdir()) / f"lctfound-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.log"
            shutil.copyfile(self._logPath, kept)
            log = str(kept)
        return JobError(kind, message.replace("{log}", log or "the system's messages"), log, details)

    def says(self, *texts: str) -> bool:
        """Whether one of some texts stands in the last lines."""
        said = "\n".join(list(self._tail)).lower()
        return any(text in said for text in texts)

    def _start(self, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"LCTfound {target.__name__}", daemon=True)
        thread.start()
        return thread

    def _readEvents(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as lines, suppress(OSError, ValueError):
            for line in lines:
                event = _parsed(line)
                if event is None:
                    self._hear(line)
                else:
                    self._inbox.put(self, event)
        try:
            code = self._popen.wait(_QUIT_GRACE)
        except subprocess.TimeoutExpired:  # it closed its output and goes on: nothing can come of it
            self.kill()
            code = self._popen.wait()
        self._errorReader.join(_QUIT_GRACE)
        self._outbox.put(None)
        self._inbox.put(self, _Ended(code))

    def _readErrors(self) -> None:
        assert self._popen.stderr is not None
        written = 0
        with self._popen.stderr as lines, suppress(OSError, ValueError), self._logPath.open("wb") as log:
            for line in lines:
                self._hear(line)
                written += len(line)
                if written < _MOST_LOG_BYTES:
                    log.write(line)
                    log.flush()

    def _hear(self, line: bytes) -> None:
        """A line for people."""
        text = line.decode("utf-8", "replace").rstrip()
        self._tail.append(text)
        self._inbox.put(self, text)

    def _writeRequests(self) -> None:
        assert self._popen.stdin is not None
        with suppress(OSError), self._popen.stdin as stream:  # closing tells the worker to end
            while (line := self._outbox.get()) is not None:
                stream.write(line)
                stream.flush()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event on a line; None for anything else that was written there."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _apart() -> dict[str, Any]:
    """Arguments that give the worker a process group of its own and no console window."""
    if os.name == "posix":
        return {"start_new_session": True}
    return {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]


def _terminate(pid: int | None) -> None:
    """End a process on Windows by its number: killing a launcher would leave the worker."""
    if pid is None:
        return
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    handle = kernel.OpenProcess(0x0001, False, pid)  # PROCESS_TERMINATE
    if handle:
        kernel.TerminateProcess(handle, 1)
        kernel.CloseHandle(handle)


def _workerCommand() -> list[str]:
    return [shutil.which("PythonSlicer") or sys.executable, "-m", "LCTfoundLib", "worker"]


def _workerEnvironment() -> dict[str, str]:
    """This process's variables, with the engine on the path."""
    environment = dict(os.environ)
    paths = [str(_engineFolder()), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _engineFolder() -> Path:
    """The folder that holds ``LCTfoundLib``: that of this package when installed, the repository in a checkout."""
    here = Path(__file__).resolve()
    for folder in here.parents[1:4]:
        if (folder / "LCTfoundLib" / "__main__.py").is_file():
            return folder
    found = importlib.util.find_spec("LCTfoundLib")
    return Path(found.origin).parents[1] if found is not None and found.origin else here.parents[1]


# -- what went wrong -------------------------------------------------------------------------------------------------

_MEMORY_MESSAGE = (
    "The engine was ended by the system, most likely because the memory did not suffice; close other programs or "
    "choose the quality 'fast'."
)
#: Windows: no memory, and the page file is full.
_NO_MEMORY_CODES = (0xC0000017, 0xC000012D)


def _notStarted(reason: str) -> str:
    return f"The engine could not be started ({reason}); check the set-up on the home panel of LCTfound."


def _crashError(process: _Process, code: int) -> JobError:
    """What an exit code tells; launchers report a signal as 128 and its number."""
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    out_of_memory = code & 0xFFFFFFFF in _NO_MEMORY_CODES or process.says("bad_alloc", "memoryerror", "out of memory")
    if (os.name == "posix" and number == signal.SIGKILL) or out_of_memory:
        return process.error(JobErrorKind.OUT_OF_MEMORY, _MEMORY_MESSAGE)
    known = {item.value: item.name for item in signal.Signals} if os.name == "posix" else {}
    reason = known.get(number) or (f"code {code & 0xFFFFFFFF:#x}" if os.name == "nt" else f"exit code {code}")
    message = (
        f"The engine crashed ({reason}); close other programs and try again, and if it happens again report it with "
        "the log {log}"
    )
    return process.error(JobErrorKind.CRASHED, message)


# -- files -----------------------------------------------------------------------------------------------------------


def _removeUnfinished(job: Job) -> None:
    """Remove what a worker that was killed was writing: hidden, beside or in the target."""
    for name in ("output", "folder"):
        target = job.payload.get(name)
        if not isinstance(target, str):
            continue
        path = Path(target)
        pattern = re.compile(rf"\.(lctfound-unfinished-\d+|[0-9a-f]{{8}})-({re.escape(path.name)}|update)")
        for place in (path.parent, path):
            with suppress(OSError):
                for found in place.iterdir():
                    if pattern.fullmatch(found.name):
                        shutil.rmtree(found, ignore_errors=True)


def _removeOutput(job: Job, scratch: Path) -> None:
    """Remove the output of a job without a result."""
    output = Path(str(job.payload.get("output")))
    if output.is_relative_to(scratch) and output != scratch:
        shutil.rmtree(output, ignore_errors=True)


class _Scratch:
    """The session's folder, marked with the process it belongs to; those of dead sessions are removed.

    Args:
        parent: where it is made.
    """

    #: Of all runners in this process, with the lock under which folders are made and judged.
    _ours: set[Path] = set()
    _lock = threading.Lock()

    def __init__(self, parent: Path) -> None:
        with self._lock:
            self.folder = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-", dir=parent)).resolve()
            self._ours.add(self.folder)
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        (self.folder / _MARKER).write_text(json.dumps(owner), encoding="utf-8")
        # In a thread: results of a crashed session may be gigabytes.
        self._sweeper = threading.Thread(target=self._sweep, args=(parent,), daemon=True)
        self._sweeper.start()

    def remove(self) -> None:
        self._sweeper.join()
        for _attempt in range(3):  # Windows keeps files of a process that has just ended for a moment
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                break
            time.sleep(0.1)
        with self._lock:
            self._ours.discard(self.folder)

    @classmethod
    def _sweep(cls, parent: Path) -> None:
        """Remove the scratch folders of sessions that died."""
        with suppress(OSError):
            for folder in parent.glob(f"{_SCRATCH}*"):
                with cls._lock:
                    abandoned = folder.resolve() not in cls._ours and _isAbandoned(folder)
                if abandoned:
                    shutil.rmtree(folder, ignore_errors=True)


def _isAbandoned(folder: Path) -> bool:
    """Whether a scratch folder is one of this user, whose process is gone from this computer."""
    try:
        status = folder.lstat()
        if folder.is_symlink() or not folder.is_dir() or (os.name == "posix" and status.st_uid != os.getuid()):
            return False
        owner = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        if owner["host"] != socket.gethostname():
            return False
        return int(owner["pid"]) == os.getpid() or not _isAlive(int(owner["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        with suppress(OSError):
            return time.time() - folder.lstat().st_mtime > _OLD
        return False


def _isAlive(pid: int) -> bool:
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user
            return True
        return True
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return False
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == 259  # STILL_ACTIVE
