"""The real worker with some more tasks, which do what real ones do only by accident; run as a program."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from LCTfoundLib import worker, worker_jobs  # noqa: E402
from LCTfoundLib.runtime.files import atomic_folder  # noqa: E402


def noisy(fields: Any, progress: Any) -> dict[str, Any]:
    """Prints in all ways a library can."""
    print("python noise")
    sys.__stdout__.write("stdout noise\n")
    sys.__stdout__.flush()
    os.write(1, b"descriptor noise\n")
    os.system("echo child noise")
    return {"input": os.read(0, 10).decode()}


def obedient(fields: Any, progress: Any) -> dict[str, Any]:
    """Goes on until it is stopped, with an unfinished folder."""
    with atomic_folder(fields.output()) as folder:
        (folder / "half").write_bytes(b"0" * 1000)
        while True:
            progress.update(0.5, "Waiting to be stopped")
            time.sleep(0.01)


def stubborn(fields: Any, progress: Any) -> dict[str, Any]:
    """Does not look whether it is stopped, with an unfinished folder."""
    with atomic_folder(fields.output()) as folder:
        (folder / "half").write_bytes(b"0" * 1000)
        progress.update(0.5, "Not listening")
        time.sleep(600)
    return {}


def frozen(fields: Any, progress: Any) -> dict[str, Any]:
    """Stands still with all its threads, as in a long call that keeps Python's lock."""
    with atomic_folder(fields.output()) as folder:
        (folder / "half").write_bytes(b"0" * 1000)
        progress.update(0.5, "Frozen")
        os.kill(os.getpid(), signal.SIGSTOP)
    return {}


def hungry(fields: Any, progress: Any) -> dict[str, Any]:
    """Asks for a petabyte of whom it is told."""
    if fields.text("of") == "numpy":
        import numpy

        numpy.ones(2**47)
    elif fields.text("of") == "torch":
        import torch

        torch.ones(2**47)
    else:
        bytearray(2**50)
    return {}


def broken(fields: Any, progress: Any) -> dict[str, Any]:
    """Has a bug."""
    return {"value": 1 / 0}


def leaving(fields: Any, progress: Any) -> dict[str, Any]:
    """A library that calls exit."""
    sys.exit(3)


def unspeakable(fields: Any, progress: Any) -> dict[str, Any]:
    """Gives what JSON does not know."""
    return {"value": float("nan")}


def dying(fields: Any, progress: Any) -> dict[str, Any]:
    """Is ended by the signal it is told, with an unfinished folder."""
    with atomic_folder(fields.output()) as folder:
        (folder / "half").write_bytes(b"0" * 1000)
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), fields.number("signal"))
        time.sleep(10)
    return {}


def threads(fields: Any, progress: Any) -> dict[str, Any]:
    """How many threads the libraries use."""
    import torch

    return {"torch": torch.get_num_threads(), "wanted": worker.thread_count()}


for task in (noisy, obedient, stubborn, frozen, hungry, broken, leaving, unspeakable, dying, threads):
    worker_jobs._TASKS[task.__name__] = task

if __name__ == "__main__":
    sys.exit(worker.main())
