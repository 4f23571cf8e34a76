"""Curation on one machine: worker processes that share the ledger."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from LCTfoundLib.errors import LCTfoundError, OutputError
from training.curation.errors import LeaseLost
from training.curation.ledger import Claim, Ledger, State
from training.curation.stages import Packed, Settings, pack

__all__ = ["LEASE_S", "heartbeat", "run_workers", "work"]

#: A worker renews three times as often; a killed one's studies wait this long.
LEASE_S = 120.0


@contextmanager
def heartbeat(ledger: Ledger, claim: Claim, lease: float) -> Iterator[None]:
    """Renew the claim in the background while the block runs."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(lease / 3):
            try:
                if not ledger.renew(claim, lease):
                    return
            except LCTfoundError:
                continue  # busy for a moment; committing will tell

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def work(
    ledger_path: Path,
    settings: Settings,
    studies_per_shard: int = 16,
    lease: float = LEASE_S,
    packer: Callable[..., Packed] = pack,
) -> int:
    """Claim, pack and commit until nothing waits; how many studies.

    Raises:
        OutputError: the shards or the ledger cannot be written; the studies in hand are given back.
    """
    name = f"{socket.gethostname()}-{os.getpid()}"
    done = 0
    with Ledger(ledger_path, create=False) as ledger:
        while (claim := ledger.claim(name, studies_per_shard, lease)) is not None:
            try:
                with heartbeat(ledger, claim, lease):
                    packed = packer(claim.studies, settings)
            except OutputError as error:
                ledger.release(claim, str(error))
                raise
            except BaseException:
                ledger.release(claim, "interrupted")
                raise
            if commit(ledger, claim, packed, settings.shards):
                done += len(claim.studies)
    return done


def commit(ledger: Ledger, claim: Claim, packed: Packed, shards: Path) -> bool:
    """Enter what a worker brought back; False (and the shard removed) if the studies were given to another."""
    try:
        ledger.commit(claim, packed.outcomes, packed.shard)
    except LCTfoundError as error:  # for sure not entered; after an interrupt nobody knows, and ``sweep`` finds out
        if packed.shard is not None:
            (shards / packed.shard.staging).unlink(missing_ok=True)
        if isinstance(error, LeaseLost):
            return False
        raise
    ledger.settle(shards)
    return True


def run_workers(
    ledger_path: Path, settings: Settings, workers: int, studies_per_shard: int = 16, lease: float = LEASE_S
) -> None:
    """``workers`` processes until nothing waits. A dead one is replaced; its studies come back when the lease ends.

    Raises:
        OutputError: as the first worker that could not write said it.
    """
    with Ledger(ledger_path) as ledger:
        ledger.settle(settings.shards)
        ledger.sweep(settings.shards, lease)
    if workers <= 1:
        work(ledger_path, settings, studies_per_shard, lease)
        while _is_open(ledger_path):
            time.sleep(min(1.0, lease / 3))
            work(ledger_path, settings, studies_per_shard, lease)
        return
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    arguments = (ledger_path, settings, studies_per_shard, lease, errors)

    def start() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_work_and_tell, args=arguments, daemon=True)
        process.start()
        return process

    running = [start() for _ in range(workers)]
    try:
        while running:
            time.sleep(0.2)
            if not errors.empty():
                raise OutputError(errors.get())
            killed = sum(process.exitcode not in (None, 0) for process in running)
            running = [process for process in running if process.is_alive()]
            running += [start() for _ in range(killed)]
            if not running and _is_open(ledger_path):
                time.sleep(min(1.0, lease / 3))
                running = [start()]
    finally:
        for process in running:
            process.terminate()
            process.join()


def _work_and_tell(
    ledger_path: Path, settings: Settings, studies_per_shard: int, lease: float, errors: SimpleQueue
) -> None:
    try:
        work(ledger_path, settings, studies_per_shard, lease)
    except LCTfoundError as error:
        errors.put(str(error))
    except Exception as error:
        errors.put(f"A worker stopped with {type(error).__name__}: {error}; this is a defect, please report it.")
        raise


def _is_open(ledger_path: Path) -> bool:
    """Whether studies of a dead worker still wait for the end of their lease, or have just come back."""
    with Ledger(ledger_path, create=False) as ledger:
        states = ledger.states()
    return bool(states[State.CLAIMED] or states[State.READY])
