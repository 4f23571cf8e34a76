"""A process in the background: no thread, no blocking call; a timer asks ``poll`` whether it has finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["BackgroundProcess"]


class BackgroundProcess:
    """A process whose output goes to temporary files, which cannot fill up and stall it as pipes do.

    Args:
        command: program and arguments.
        environment: of the process; None: that of this one.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lctfound-", ignore_cleanup_errors=True)
        self._outputFile = Path(self._folder.name) / "output"
        self._errorFile = Path(self._folder.name) / "errors"
        with self._outputFile.open("wb") as output, self._errorFile.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=None if environment is None else dict(environment),
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # no black window on Windows
                start_new_session=sys.platform != "win32",
            )

    def poll(self) -> bool:
        """Whether it has finished; returns at once."""
        return self._process.poll() is not None

    def wait(self, timeout: float) -> bool:
        """Wait for its end at most ``timeout`` seconds; whether it has finished."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self.poll()

    @property
    def exitCode(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        return self._process.poll()

    def output(self) -> str:
        """What it wrote to stdout so far."""
        return self._outputFile.read_text("utf-8", "replace")

    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self._errorFile.read_text("utf-8", "replace")

    def stop(self) -> None:
        """End it and, where the system has process groups, its children."""
        if not self.poll():
            with suppress(OSError):
                if sys.platform == "win32":
                    self._process.kill()
                else:
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.close()

    def close(self) -> None:
        """Remove the temporary files; to be called after the end."""
        self._folder.cleanup()
