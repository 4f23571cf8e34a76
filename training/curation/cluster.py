"""Curation on a Dask cluster: the same stage functions, one coordinator that keeps the ledger.

Workers read the archive and write shards on a file system that all see; only the coordinator opens the ledger, because
SQLite wants one machine. Dask runs a dead worker's task again elsewhere; such a second run writes a shard of its own,
and the ledger commits exactly one. If the coordinator dies, its claims run out and the next run takes them up.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LCTfoundLib.errors import OutputError
from training.curation.errors import MissingPackage, NoCluster
from training.curation.ledger import Claim, Ledger, State
from training.curation.local import LEASE_S, commit
from training.curation.stages import Packed, Settings, pack

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["connect", "run_on_cluster"]

_AHEAD = 2  # claims per worker thread, so that none waits for the coordinator


def connect(address: str) -> Client:
    """A client of the Dask scheduler at ``address``.

    Raises:
        NoCluster: it does not answer.
        MissingPackage: dask.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingPackage("A cluster needs Dask; install the extra 'cluster'.") from error
    try:
        return Client(address, timeout=20)
    except (OSError, ValueError) as error:
        raise NoCluster(f"No Dask scheduler answers at {address}; start 'dask scheduler' or correct it.") from error


def run_on_cluster(
    ledger_path: Path,
    settings: Settings,
    client: Client,
    studies_per_shard: int = 16,
    lease: float = LEASE_S,
    packer: Callable[..., Packed] = pack,
) -> None:
    """Pack all studies that wait on ``client``'s workers, until none does.

    Raises:
        OutputError: a worker cannot write the shards, or the ledger cannot be written; what is not committed is given
            back.
        MissingPackage: dask.
    """
    try:
        from distributed import wait
    except ImportError as error:
        raise MissingPackage("A cluster needs Dask; install the extra 'cluster'.") from error
    name = f"dask-{socket.gethostname()}"
    running: dict[Any, Claim] = {}
    with Ledger(ledger_path) as ledger:
        ledger.settle(settings.shards)
        ledger.sweep(settings.shards, lease)
        try:
            while True:
                renewed = time.monotonic()
                room = _AHEAD * max(1, sum(client.nthreads().values())) - len(running)
                for _ in range(room):
                    claim = ledger.claim(name, studies_per_shard, lease)
                    if claim is None:
                        break
                    # pure=False: the same studies after a failure are new work. A study that kills its workers
                    # makes Dask give up after some; then it is tried alone, and counted, by the ledger.
                    future = client.submit(packer, claim.studies, settings, pure=False)
                    running[future] = claim
                if not running:
                    states = ledger.states()
                    if not states[State.CLAIMED] and not states[State.READY]:
                        return
                    time.sleep(min(1.0, lease / 3))  # for claims of a coordinator that died
                    continue
                _wait_for_one(wait, list(running), max(0.0, renewed + lease / 3 - time.monotonic()))
                for future in [future for future in running if future.done()]:
                    _take(ledger, running.pop(future), future, settings)
                for claim in running.values():
                    ledger.renew(claim, lease)
        finally:
            for future, claim in running.items():
                future.cancel()
                ledger.release(claim, "interrupted")


def _wait_for_one(wait: Callable[..., Any], futures: list[Any], timeout: float) -> None:
    try:
        wait(futures, timeout=timeout, return_when="FIRST_COMPLETED")
    except TimeoutError:
        pass


def _take(ledger: Ledger, claim: Claim, future: Any, settings: Settings) -> None:
    """Commit what a worker brought; its studies come back if it died once too often."""
    error = future.exception()
    if isinstance(error, OutputError):
        ledger.release(claim, str(error))
        raise error
    if error is not None:
        ledger.fail(claim, f"its workers died or failed ({type(error).__name__})")
        return
    commit(ledger, claim, future.result(), settings.shards)
