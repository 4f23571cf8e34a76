"""What the commands of the evaluation share: lines with the seconds since the start, errors as one sentence."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from LCTfoundLib.errors import LCTfoundError

__all__ = ["Log", "command"]

Log = Callable[[str], None]


@contextmanager
def command() -> Iterator[Log]:
    """A log to print with; an error that the user can mend ends the command with its sentence.

    What tasks warn their users of would be said for every slice, and is not.
    """
    begin = time.monotonic()
    logging.getLogger("LCTfoundLib").setLevel(logging.ERROR)

    def log(line: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {line}", flush=True)

    try:
        yield log
    except LCTfoundError as error:
        raise SystemExit(str(error)) from error
