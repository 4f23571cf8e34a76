"""The real worker with some more tasks, which do what real ones do only by accident; run as a program.

With the argument ``light`` it has these tasks alone and loads neither torch nor the networks.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import LCTfoundLib  # noqa: E402
from LCTfoundLib import worker  # noqa: E402
from LCTfoundLib.runtime.files import atomic_folder  # noqa: E402
from LCTfoundLib.runtime.progress import Progress  # noqa: E402

Request = Mapping[str, Any]


@contextmanager
def half_written(request: Request) -> Iterator[None]:
    """A result that is being written."""
    with atomic_folder(request["output"]) as folder:
        (folder / "half").write_bytes(b"0" * 1000)
        yield


def ping(request: Request, progress: Progress) -> dict[str, Any]:
    """Done at once."""
    progress.update(1.0, "Ping")
    return {"pong": True}


def noisy(request: Request, progress: Progress) -> dict[str, Any]:
    """Prints in all ways a library can, and tries to read the requests."""
    print("python noise")
    sys.__stdout__.write("stdout noise\n")
    sys.__stdout__.flush()
    os.write(1, b"descriptor noise\n")
    os.system("echo child noise")
    return {"input": os.read(0, 10).decode()}


def obedient(request: Request, progress: Progress) -> dict[str, Any]:
    """Goes on until it is stopped, with an unfinished folder."""
    with half_written(request):
        while True:
            progress.update(0.5, "Waiting to be stopped")
            time.sleep(0.01)


def stubborn(request: Request, progress: Progress) -> dict[str, Any]:
    """Does not look whether it is stopped, with an unfinished folder."""
    with half_written(request):
        progress.update(0.5, "Not listening")
        time.sleep(600)
    return {}


def frozen(request: Request, progress: Progress) -> dict[str, Any]:
    """Stands still with all its threads, as in a long call that keeps Python's lock."""
    with half_written(request):
        progress.update(0.5, "Frozen")
        os.kill(os.getpid(), signal.SIGSTOP)
    return {}


def hungry(request: Request, progress: Progress) -> dict[str, Any]:
    """Asks the library it is told for a petabyte."""
    if request["of"] == "numpy":
        import numpy

        numpy.ones(2**47)
    elif request["of"] == "torch":
        import torch

        torch.ones(2**47)
    else:
        bytearray(2**50)
    return {}


def broken(request: Request, progress: Progress) -> dict[str, Any]:
    """Has a bug."""
    return {"value": 1 / 0}


def leaving(request: Request, progress: Progress) -> dict[str, Any]:
    """A library that calls exit."""
    sys.exit(3)


def unspeakable(request: Request, progress: Progress) -> dict[str, Any]:
    """Gives what JSON does not know."""
    return {"value": float("nan")}


def dying(request: Request, progress: Progress) -> dict[str, Any]:
    """Is ended by the signal it is told, with an unfinished folder."""
    with half_written(request):
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), request["signal"])
        time.sleep(10)
    return {}


def threads(request: Request, progress: Progress) -> dict[str, Any]:
    """How many threads the libraries use."""
    import torch

    return {"torch": torch.get_num_threads(), "wanted": worker.thread_count()}


TASKS: dict[str, Callable[[Request, Progress], dict[str, Any]]] = {
    task.__name__: task
    for task in (ping, noisy, obedient, stubborn, frozen, hungry, broken, leaving, unspeakable, dying, threads)
}


def serve_these_alone() -> None:
    """Put the tasks in the place of the engine's, so that nothing heavy is loaded."""
    jobs = types.ModuleType("LCTfoundLib.worker_jobs")
    jobs.warm = lambda threads: {"device": "cpu"}  # type: ignore[attr-defined]
    jobs.perform = lambda request, progress: TASKS[request["task"]](request, progress)  # type: ignore[attr-defined]
    sys.modules[jobs.__name__] = jobs
    LCTfoundLib.worker_jobs = jobs  # type: ignore[attr-defined]


def serve_these_too() -> None:
    """Add the tasks to the engine's."""
    from LCTfoundLib import worker_jobs

    def plain(task: Callable[[Request, Progress], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        return lambda fields, progress: task(fields.values, progress)

    worker_jobs._TASKS.update({name: plain(task) for name, task in TASKS.items()})


if __name__ == "__main__":
    serve_these_alone() if sys.argv[1:] == ["light"] else serve_these_too()
    sys.exit(worker.main())
