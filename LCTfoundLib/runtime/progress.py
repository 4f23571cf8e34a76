"""Progress, time left and cancel: one object handed down through a run.

A run splits its progress into stages, a stage into smaller ones; each only knows its own 0-1 and the root adds up.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from typing import Any, TextIO, TypeVar

from LCTfoundLib.errors import Cancelled

__all__ = ["CancelToken", "JsonLines", "Progress", "Report"]

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

#: A listener hears of the same stage at most so often (seconds).
_INTERVAL = 0.1
#: No guess of the time left before this share and time are over: it would jump.
_FIRST_GUESS_FRACTION = 0.02
_FIRST_GUESS_SECONDS = 1.0


@dataclass(frozen=True)
class Report:
    """What a listener is told.

    Attributes:
        stage: what is being done, ready to show.
        fraction: share of the whole run done, 0-1; never falls.
        elapsed: seconds since the start.
        seconds_left: estimate, or None while it would be a guess.
    """

    stage: str
    fraction: float
    elapsed: float
    seconds_left: float | None


class CancelToken:
    """Set from any thread (a button, a signal, a closed pipe); looked at by the work between its steps."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()


class _Root:
    """What all parts of a run share; guarded by one lock."""

    def __init__(
        self,
        listener: Callable[[Report], None] | None,
        warn: Callable[[str], None] | None,
        cancel: CancelToken | None,
        clock: Callable[[], float],
    ) -> None:
        self.listener = listener
        self.warn = warn
        self.cancel = cancel or CancelToken()
        self.clock = clock
        self.start = clock()
        self.fraction = 0.0
        self.stage = ""
        self._told: tuple[str, float, float] = ("", -1.0, -math.inf)
        # Reentrant: a listener may itself look at the progress.
        self._lock = threading.RLock()

    def report(self) -> Report:
        elapsed = self.clock() - self.start
        return Report(self.stage, self.fraction, elapsed, self._seconds_left(elapsed))

    def _seconds_left(self, elapsed: float) -> float | None:
        if self.fraction >= 1.0:
            return 0.0
        if self.fraction < _FIRST_GUESS_FRACTION or elapsed < _FIRST_GUESS_SECONDS:
            return None
        return elapsed * (1.0 - self.fraction) / self.fraction

    def move_to(self, fraction: float, stage: str) -> None:
        with self._lock:
            self.fraction = min(max(self.fraction, fraction), 1.0)
            self.stage = stage or self.stage
            if self.listener is not None and self._worth_telling():
                self._told = (self.stage, self.fraction, self.clock())
                self.listener(self.report())

    def _worth_telling(self) -> bool:
        stage, fraction, moment = self._told
        if self.stage != stage or (self.fraction >= 1.0 and fraction < 1.0):
            return True
        return self.fraction > fraction and self.clock() - moment >= _INTERVAL


class Progress:
    """The progress of a run, or of a part of it. Safe to use from several threads.

    ``Progress()`` without a listener only carries the cancel token; :meth:`of` makes it from an optional argument::

        def segment(ct, progress=None):
            reading, net, export = Progress.of(progress).split({"Reading": 1, "Network": 8, "Export": 3})
            for tile in net.track(tiles):
                ...

    Args:
        listener: called with a :class:`Report` when there is something new, at most about ten times a second for one
            stage. What it raises reaches the work.
        warn: called with a sentence that the user should read although the run goes on; default: the log.
        cancel: token that stops the run.
        clock: seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        listener: Callable[[Report], None] | None = None,
        warn: Callable[[str], None] | None = None,
        cancel: CancelToken | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = _Root(listener, warn, cancel, clock)
        self._low, self._width, self._stage = 0.0, 1.0, ""

    @classmethod
    def of(cls, progress: Progress | None) -> Progress:
        """``progress`` itself, or a silent one."""
        return progress if progress is not None else cls()

    @property
    def cancel_token(self) -> CancelToken:
        return self._root.cancel

    @property
    def report(self) -> Report:
        """Where the whole run stands."""
        return self._root.report()

    def split(self, weights: Mapping[str, float]) -> list[Progress]:
        """Parts that follow each other, from stage name to share of the cost; the shares need not add up to 1.

        An empty name keeps the name of this part.
        """
        total = float(sum(weights.values()))
        if not total > 0 or min(weights.values()) < 0:
            raise ValueError(f"stage weights must not be negative and not all zero: {dict(weights)}")
        parts, low = [], self._low
        for name, weight in weights.items():
            width = self._width * weight / total
            parts.append(self._part(low, width, name or self._stage))
            low += width
        return parts

    def _part(self, low: float, width: float, stage: str) -> Progress:
        part = object.__new__(Progress)
        part._root, part._low, part._width, part._stage = self._root, low, width, stage
        return part

    def update(self, fraction: float, text: str = "") -> None:
        """Say that ``fraction`` (0-1) of this part is done.

        Args:
            fraction: of this part; values beyond 0-1 are clipped, a smaller one than before changes nothing.
            text: what is being done, if it is more exact than the stage's name.

        Raises:
            Cancelled: the user stopped the run.
        """
        self.check()
        self._root.move_to(self._low + self._width * min(max(fraction, 0.0), 1.0), text or self._stage)

    def __call__(self, fraction: float, text: str = "") -> None:
        """The same as :meth:`update`, for functions that take a plain callback."""
        self.update(fraction, text)

    def check(self) -> None:
        """Raise ``Cancelled`` if the user stopped the run."""
        if self._root.cancel.cancelled:
            raise Cancelled("The run was stopped; start it again to get a result.")

    def done(self) -> None:
        """Say that this part is finished."""
        self.update(1.0)

    def track(self, items: Iterable[_T], total: int | None = None) -> Iterator[_T]:
        """Go through ``items``, of about equal cost, and move this part from 0 to 1.

        Args:
            items: anything iterable.
            total: their number, where ``len`` does not tell it.
        """
        count = total if total is not None else (len(items) if isinstance(items, Sized) else 0)
        self.update(0.0)
        for number, item in enumerate(items, start=1):
            yield item
            self.update(number / count if count else 0.0)
        self.done()

    def warn(self, text: str) -> None:
        """Tell the user something that does not stop the run."""
        _log.warning("%s", text)
        if self._root.warn is not None:
            self._root.warn(text)


class JsonLines:
    """Listener that writes one JSON object a line, as the worker's and the shell's readers expect.

    Use ``JsonLines(stream)`` as listener and its :meth:`warning` as ``warn``. Lines of several threads do not mix.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def __call__(self, report: Report) -> None:
        fields = asdict(report)
        left = report.seconds_left
        fields |= {"fraction": round(report.fraction, 4), "elapsed": round(report.elapsed, 1)}
        fields["seconds_left"] = None if left is None else round(left, 1)
        self.write("progress", **fields)

    def warning(self, text: str) -> None:
        self.write("warning", message=text)

    def write(self, event: str, **fields: Any) -> None:
        """Write any event; non-ASCII is escaped, so that the reader's encoding does not matter."""
        line = json.dumps({"event": event, **fields}, allow_nan=False) + "\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()
