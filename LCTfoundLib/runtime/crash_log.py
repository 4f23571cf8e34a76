"""A file with what is needed to understand an unexpected error; it stays when scratch folders go."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from LCTfoundLib import __version__

__all__ = ["write_crash_log"]


def write_crash_log(error: BaseException, doing: str) -> Path:
    """Write the traceback into the system's temporary folder.

    Args:
        error: what happened.
        doing: what was asked for; it must tell nothing of the patient.
    """
    moment = time.strftime("%Y%m%d-%H%M%S")
    log = Path(tempfile.gettempdir()) / f"lctfound-{moment}-{os.getpid()}-{time.monotonic_ns() % 10**6:06d}.log"
    lines = [f"LCTfound {__version__}, Python {sys.version}", doing, ""]
    log.write_text("\n".join(lines) + "".join(traceback.format_exception(error)), encoding="utf-8")
    return log
