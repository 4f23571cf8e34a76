"""Generator processes that share seeds among them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["share_seeds"]


def share_seeds(work: Callable[..., None], seeds: Sequence[int], processes: int, *arguments: Any) -> None:
    """``work(seeds of one process, *arguments)`` in each of several processes, until all are done.

    Raises:
        SystemExit: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(seeds[n::processes], *arguments)) for n in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a generator process failed; see its traceback above")
