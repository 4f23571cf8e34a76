"""The worker: a warm background process that does one job after another for a panel or a program.

Requests come as one JSON object a line on standard input, events leave as one a line on standard output:

* ``hello`` at once, ``ready`` when the libraries and the networks are loaded;
* for a job ``started``, ``progress``, ``warning``, and then exactly one of ``result``, ``error`` and ``cancelled``.

What a job does is in ``worker_jobs``; here is only the conversation. Nothing heavy is imported before ``hello``. The
worker ends when its input ends or its parent dies, whatever it is doing.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from io import BufferedReader
from typing import Any

from LCTfoundLib import __version__
from LCTfoundLib.errors import Cancelled, LCTfoundError, OutOfMemory, OutputError, UnsuitableImage, WeightError
from LCTfoundLib.runtime.crash_log import write_crash_log
from LCTfoundLib.runtime.progress import CancelToken, JsonLines, Progress, Report

__all__ = ["PROTOCOL", "ErrorKind", "main"]

PROTOCOL = 1

#: Bytes of a request; lists of findings and changes are far smaller.
_LONGEST_LINE = 2**24
_LONGEST_ID = 200
#: A job that was running when the worker must end gets so long (s) to take its unfinished files away.
_GRACE = 0.4
#: Between two looks whether the parent still lives (s).
_WATCH = 0.5
#: Cores of which one is left to the window.
_ENOUGH_CORES = 3
#: How libraries other than torch and numpy put it.
_OUT_OF_MEMORY_TEXTS = ("failed to allocate memory", "bad_alloc", "can't start new thread")


class ErrorKind(StrEnum):
    """What went wrong, for a program; the message is for a person."""

    UNSUITABLE_IMAGE = "unsuitable_image"
    WEIGHT = "weight"
    OUTPUT = "output"
    OUT_OF_MEMORY = "out_of_memory"
    REQUEST = "request"
    INTERNAL = "internal"


_KINDS: tuple[tuple[type[Exception], ErrorKind], ...] = (
    (UnsuitableImage, ErrorKind.UNSUITABLE_IMAGE),
    (WeightError, ErrorKind.WEIGHT),
    (OutputError, ErrorKind.OUTPUT),
    (OutOfMemory, ErrorKind.OUT_OF_MEMORY),
    (LCTfoundError, ErrorKind.REQUEST),
)


def main() -> int:
    """Talk until the input ends."""
    requests, events = _take_pipes()
    events.write("hello", protocol=PROTOCOL, version=__version__, pid=os.getpid())
    _be_modest()
    worker = _Worker(events)
    threading.Thread(target=_listen, args=(requests, worker), daemon=True).start()
    threading.Thread(target=_watch_parent, args=(os.getppid(), worker), daemon=True).start()
    return worker.run()


# -- the process -----------------------------------------------------------------------------------------------------


def _take_pipes() -> tuple[BufferedReader, _Events]:
    """Standard input and output for the conversation alone: what libraries print goes to standard error."""
    requests = os.fdopen(os.dup(0), "rb")
    events = _Events(os.dup(1))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, events


def _be_modest() -> None:
    """Leave the window one core and the right of way; a Ctrl-C in a shell is for the parent."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "VTK_SMP_MAX_THREADS"):
        os.environ.setdefault(name, str(thread_count()))
    with suppress(OSError):
        if hasattr(os, "nice"):
            os.nice(5)
        else:
            import psutil

            psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)


def thread_count() -> int:
    """Threads to compute with: one core fewer than this process may use, where there are more than two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores - 1 if cores >= _ENOUGH_CORES else cores


def _watch_parent(parent: int, worker: _Worker) -> None:
    """End when the parent is gone though something else still holds the input open (not on Windows)."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    worker.leave()


class _Events(JsonLines):
    """Events on a file descriptor; when nobody reads them any more, the worker ends."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(os.fdopen(descriptor, "w", encoding="ascii", newline="\n"))

    def write(self, event: str, **fields: Any) -> None:
        try:
            super().write(event, **fields)
        except OSError:
            os._exit(1)


# -- the conversation ------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    """A request that waits or runs."""

    id: str
    request: dict[str, Any]
    cancel: CancelToken = field(default_factory=CancelToken)


class _Worker:
    """Jobs in the order they came, done by the thread that calls :meth:`run`; other threads add and stop them."""

    def __init__(self, events: _Events) -> None:
        self.events = events
        self._waiting: dict[str, _Job] = {}
        self._running: _Job | None = None
        self._leaving = False
        self._idle = threading.Event()
        self._changed = threading.Condition()

    def run(self) -> int:
        """Warm up, then do jobs until the worker is told to leave."""
        self._warm()
        while True:
            job = self._next()
            if job is None:
                self._idle.set()
                return 0
            self._do(job)

    def take(self, line: bytes) -> None:
        """A line of the input."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            self._refuse(None, f"A request must be one JSON object a line; this one is not ({error}).")
            return
        name, task = request.get("id"), request.get("task")
        known = name if isinstance(name, str) else None
        if task == "quit":
            self.leave()
        elif not known or len(known) > _LONGEST_ID:
            self._refuse(None, "A request needs an 'id', a text of up to 200 characters.")
        elif task == "cancel":
            self._cancel(known)
        else:
            self._add(known, request)

    def leave(self) -> None:
        """End the process, with a moment for a running job to tidy up."""
        with self._changed:
            self._leaving = True
            if self._running is not None:
                self._running.cancel.cancel()
            self._changed.notify_all()
        self._idle.wait(_GRACE)
        os._exit(0)

    def _add(self, name: str, request: dict[str, Any]) -> None:
        with self._changed:
            taken = name in self._waiting or (self._running is not None and self._running.id == name)
            if not taken:
                self._waiting[name] = _Job(name, request)
                self._changed.notify_all()
        if taken:
            self._refuse(None, f"There is a job '{name}' already; give each an id of its own.")

    def _cancel(self, name: str) -> None:
        """Stop a job; one that is over already needs nothing."""
        with self._changed:
            waited = self._waiting.pop(name, None)
            if self._running is not None and self._running.id == name:
                self._running.cancel.cancel()
        if waited is not None:
            self.events.write("cancelled", id=name)

    def _refuse(self, name: str | None, message: str) -> None:
        self.events.write("error", id=name, kind=ErrorKind.REQUEST.value, message=message, log=None)

    def _next(self) -> _Job | None:
        """The next job, waited for; None when it is time to leave."""
        with self._changed:
            self._running = None
            while not self._waiting and not self._leaving:
                self._changed.wait()
            if self._leaving:
                return None
            self._running = self._waiting.pop(next(iter(self._waiting)))
            return self._running

    def _warm(self) -> None:
        """Load what all jobs need; where that fails, jobs that can do without still can be done."""
        try:
            from LCTfoundLib import worker_jobs

            self.events.write("ready", device=worker_jobs.warm(thread_count()))
        except Exception as error:
            self._fail(None, error, "getting ready")

    def _do(self, job: _Job) -> None:
        self.events.write("started", id=job.id)
        try:
            from LCTfoundLib import worker_jobs

            result = worker_jobs.perform(job.request, self._progress(job))
            self.events.write("result", id=job.id, **result)
        except Cancelled:
            self.events.write("cancelled", id=job.id)
        except (Exception, SystemExit) as error:
            self._fail(job.id, error, f"task: {job.request.get('task')}")
        _release_memory()

    def _progress(self, job: _Job) -> Progress:
        def listen(report: Report) -> None:
            numbers = {"fraction": round(report.fraction, 4), "elapsed": round(report.elapsed, 1)}
            left = None if report.seconds_left is None else round(report.seconds_left, 1)
            self.events.write("progress", id=job.id, **asdict(report) | numbers | {"seconds_left": left})

        def warn(text: str) -> None:
            self.events.write("warning", id=job.id, message=text)

        return Progress(listen, warn, job.cancel)

    def _fail(self, name: str | None, error: BaseException, doing: str) -> None:
        kind, message, log = _explain(error, doing)
        self.events.write("error", id=name, kind=kind.value, message=message, log=log)


def _listen(requests: BufferedReader, worker: _Worker) -> None:
    """Hand lines on until there are no more."""
    with suppress(OSError):
        while line := requests.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = requests.readline(_LONGEST_LINE)
                line = b"<too long>"
            if line.strip():
                worker.take(line)
    worker.leave()


def _explain(error: BaseException, doing: str) -> tuple[ErrorKind, str, str | None]:
    """Kind, sentence with the remedy, and path of the log for what nobody expected."""
    for known, kind in _KINDS:
        if isinstance(error, known):
            return kind, str(error), None
    if _is_out_of_memory(error):
        message = "The memory does not suffice; close other programs or choose the quality 'fast'."
        return ErrorKind.OUT_OF_MEMORY, message, None
    log = _crash_log(error, doing)
    if isinstance(error, ImportError):
        message = f"A library of the engine cannot be loaded ({error}); install the engine's libraries again."
    else:
        message = f"An unexpected error happened ({type(error).__name__}: {error}); please report it with the log {log}"
    return ErrorKind.INTERNAL, message, log


def _crash_log(error: BaseException, doing: str) -> str | None:
    try:
        return str(write_crash_log(error, doing))
    except OSError:  # the disk is full, which may be the very trouble
        return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Also before torch is loaded, and when it cannot be."""
    if isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS):
        return True
    if "torch" not in sys.modules:
        return False
    from LCTfoundLib.runtime.tiling import is_out_of_memory

    return is_out_of_memory(error)


def _release_memory() -> None:
    """Give back what the job held: the worker may now be idle for hours."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
