"""The ledger: which study stands where. One SQLite file that survives kills, and from which every run resumes.

A study is *claimed* by a worker for the length of a lease, which the worker keeps renewing; a killed worker renews
nothing, and its studies are claimed by others. What a worker brings back is written in one transaction that checks that
the claim is still its own, so nothing is done twice. A shard is complete on the disk under a hidden name before that
transaction, and gets its name after it: :meth:`Ledger.settle` gives it the name if the worker died in between.

SQLite's write-ahead log needs one machine: on a cluster only the coordinator opens the ledger (:mod:`cluster`).
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

from LCTfoundLib.errors import OutputError
from training.curation.errors import LeaseLost, LedgerError

__all__ = ["Claim", "FoundStudy", "Gate", "Ledger", "Outcome", "PackedShard", "State", "Study"]

_VERSION = 1
#: A study that took this many workers down, or failed this often, waits for a person.
MAX_ATTEMPTS = 3
_REJECTED = "rejected in review"

_SCHEMA = """
CREATE TABLE studies (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,            -- StudyInstanceUID, or the folder where none can be read
    accession TEXT NOT NULL,
    patient TEXT NOT NULL,
    files BLOB NOT NULL,                 -- zlib: paths below the archive, one a line
    digest TEXT NOT NULL,
    facts TEXT NOT NULL,                 -- JSON of what the headers say and the shards may tell
    report TEXT,
    report_problem TEXT,
    state TEXT NOT NULL DEFAULT 'found',
    passed INTEGER NOT NULL DEFAULT 0,   -- the last Gate passed
    waived INTEGER NOT NULL DEFAULT 0,   -- bits of the gates a person waived in review
    reason TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    lease REAL,
    labels TEXT,
    confidence REAL,
    measures TEXT,
    shard TEXT,
    updated REAL NOT NULL
);
CREATE INDEX studies_by_state ON studies (state, id);
CREATE INDEX studies_by_worker ON studies (worker);
CREATE TABLE shards (
    name TEXT PRIMARY KEY, staging TEXT NOT NULL, settled INTEGER NOT NULL DEFAULT 0,
    studies INTEGER NOT NULL, slices INTEGER NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, study INTEGER NOT NULL REFERENCES studies, time REAL NOT NULL,
    worker TEXT, event TEXT NOT NULL, reason TEXT NOT NULL
);
CREATE INDEX events_by_study ON events (study, event);
"""


class Gate(IntEnum):
    """The gates in the order of the paper's table."""

    FOUND = 0
    REPORT = 1
    CONFIDENT = 2
    INTACT = 3
    CLEAN = 4
    PACKED = 5


class State(StrEnum):
    """Where a study stands."""

    FOUND = "found"  # its report is not classified yet
    READY = "ready"  # its images wait for a worker
    CLAIMED = "claimed"
    PACKED = "packed"
    EXCLUDED = "excluded"  # by a gate, for the reason given
    REVIEW = "review"  # a person decides
    FAILED = "failed"  # tried too often


@dataclass(frozen=True)
class FoundStudy:
    """A study as the archive's headers describe it.

    Attributes:
        key: StudyInstanceUID, or ``folder:PATH`` where no header can be read.
        files: paths below the archive.
        digest: changes with the files' names and sizes.
        facts: what the shards may tell, and the counts the gates need (:mod:`training.curation.archive`).
    """

    key: str
    accession: str
    patient: str
    files: tuple[str, ...]
    digest: str
    facts: dict[str, Any]
    report: str | None = None
    report_problem: str | None = None


@dataclass(frozen=True)
class Study:
    """A study as a worker gets it."""

    id: int
    key: str
    patient: str
    files: tuple[str, ...]
    facts: dict[str, Any]
    labels: dict[str, float]
    confidence: float
    waived: frozenset[Gate] = frozenset()


@dataclass(frozen=True)
class Claim:
    """Studies lent to one worker. The token is new with each claim."""

    token: str
    studies: tuple[Study, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a study: its last gate passed, and the state and reason it stopped with."""

    study: int
    state: State
    passed: Gate
    reason: str = ""
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedShard:
    """A whole shard under its hidden name, to be made known with the outcomes of its studies."""

    name: str
    staging: str
    studies: int
    slices: int
    bytes: int
    sha256: str


class Ledger:
    """The ledger in ``path``. One object serves one process; threads share it.

    Raises (all methods):
        LedgerError: damaged, or of another version.
        OutputError: its disk is full or read-only.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, create: bool = True) -> None:
        self.path = Path(path)
        self._clock = clock
        self._lock = threading.RLock()
        if not create and not self.path.exists():
            raise LedgerError(f"There is no ledger {self.path}; name the OUT folder of an earlier run.")
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            with suppress(OSError):
                os.chmod(self.path, 0o600)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._prepare()

    def _prepare(self) -> None:
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        db.execute(statement)
                db.execute(f"PRAGMA user_version={_VERSION}")
            elif version != _VERSION:
                raise LedgerError(
                    f"{self.path} is no ledger of this version ({version}, not {_VERSION}); name a new OUT folder."
                )

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled it back already
                    self._connection.execute("ROLLBACK")
                raise

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, _explained(self.path):
            return self._connection.execute(query, values).fetchall()

    # Finding and labelling: by the coordinator.

    def add(self, studies: Iterable[FoundStudy]) -> tuple[int, int]:
        """Enter what was found; numbers of new studies, and of known ones whose files changed.

        A known study gets its new files. One that its images had excluded, or that failed, is tried again; a packed one
        is put on the review list, so that no slice gets into a second shard unseen; others keep their state. A report
        found later brings an excluded study back.
        """
        new = changed = 0
        with self._transaction() as db:
            for study in studies:
                known = db.execute("SELECT * FROM studies WHERE key = ?", (study.key,)).fetchone()
                if known is None:
                    self._insert(db, study)
                    new += 1
                elif known["digest"] != study.digest:
                    self._note_change(db, known, study)
                    changed += 1
                elif known["report"] is None and study.report is not None and known["passed"] < Gate.REPORT:
                    db.execute(
                        "UPDATE studies SET report = ?, report_problem = NULL WHERE id = ?", (study.report, known["id"])
                    )
                    self._move(db, known["id"], State.FOUND, "a report was found")
        return new, changed

    def _insert(self, db: sqlite3.Connection, study: FoundStudy) -> None:
        values = (
            study.key, study.accession, study.patient, _packed(study.files), study.digest, json.dumps(study.facts),
            study.report, study.report_problem, self._clock(),
        )  # fmt: skip
        db.execute(
            "INSERT INTO studies (key, accession, patient, files, digest, facts, report, report_problem, updated) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            values,
        )

    def _note_change(self, db: sqlite3.Connection, known: sqlite3.Row, study: FoundStudy) -> None:
        values = (_packed(study.files), study.digest, json.dumps(study.facts), known["id"])
        db.execute("UPDATE studies SET files = ?, digest = ?, facts = ? WHERE id = ?", values)
        by_images = known["state"] == State.EXCLUDED and known["passed"] >= Gate.CONFIDENT
        if (by_images and not known["reason"].startswith(_REJECTED)) or known["state"] == State.FAILED:
            db.execute("UPDATE studies SET attempts = 0 WHERE id = ?", (known["id"],))
            self._move(db, known["id"], State.READY, "its files changed")
        elif known["state"] == State.PACKED:
            db.execute(
                "UPDATE studies SET reason = ? WHERE id = ?",
                ("its files changed after it was packed", known["id"]),
            )
            self._tell(db, known["id"], "changed", "its files changed after it was packed")

    def unlabelled(self, count: int = 1000) -> list[tuple[int, str | None, str | None, frozenset[Gate]]]:
        """Studies whose report is not classified yet: id, report, what is wrong with the report, gates waived."""
        rows = self._rows(
            "SELECT id, report, report_problem, waived FROM studies WHERE state = 'found' ORDER BY id LIMIT ?", (count,)
        )
        return [(row["id"], row["report"], row["report_problem"], _gates(row["waived"])) for row in rows]

    def label(self, outcomes: Iterable[tuple[Outcome, dict[str, float], float]]) -> None:
        """Enter outcomes of the reports with their labels' probabilities and confidence."""
        with self._transaction() as db:
            for outcome, labels, confidence in outcomes:
                db.execute(
                    "UPDATE studies SET labels = ?, confidence = ? WHERE id = ? AND state = 'found'",
                    (json.dumps(labels), confidence, outcome.study),
                )
                self._finish(db, outcome)

    def reopen_unsure(self) -> int:
        """Let the reports that the classifier was not sure of be classified again (by a better one); how many."""
        with self._transaction() as db:
            query = "SELECT id FROM studies WHERE state = 'excluded' AND passed = ?"
            rows = db.execute(query, (Gate.REPORT,)).fetchall()
            for row in rows:
                self._move(db, row["id"], State.FOUND, "to be classified again")
        return len(rows)

    def least_sure(self, count: int) -> list[tuple[str, str]]:
        """Key and report of the studies that the classifier is least sure of, to annotate next."""
        rows = self._rows(
            "SELECT key, report FROM studies WHERE report IS NOT NULL AND confidence IS NOT NULL "
            "ORDER BY confidence, id LIMIT ?",
            (count,),
        )
        return [(row["key"], row["report"]) for row in rows]

    # Working: by local workers, or by the coordinator for those on other machines.

    def claim(self, worker: str, count: int, lease: float) -> Claim | None:
        """Up to ``count`` studies for ``worker`` for ``lease`` seconds; None if none waits.

        A study that was tried before comes alone, so that the one that kills workers is found out; after
        ``MAX_ATTEMPTS`` it waits for a person.
        """
        now = self._clock()
        with self._transaction() as db:
            self._expire(db, now)
            rows = db.execute(
                "SELECT * FROM studies WHERE state = 'ready' AND attempts = 0 ORDER BY id LIMIT ?", (count,)
            ).fetchall()
            rows = rows or db.execute("SELECT * FROM studies WHERE state = 'ready' ORDER BY id LIMIT 1").fetchall()
            if not rows:
                return None
            token = f"{worker}/{secrets.token_hex(6)}"
            for row in rows:
                db.execute(
                    "UPDATE studies SET state = 'claimed', worker = ?, lease = ?, attempts = attempts + 1, updated = ? "
                    "WHERE id = ?",
                    (token, now + lease, now, row["id"]),
                )
                self._tell(db, row["id"], "claimed", "", token)
        return Claim(token, tuple(_study(row) for row in rows))

    def _expire(self, db: sqlite3.Connection, now: float) -> None:
        query = "SELECT id, attempts FROM studies WHERE state = 'claimed' AND lease < ?"
        for row in db.execute(query, (now,)).fetchall():
            self._give_back(db, row["id"], row["attempts"], "its worker gave no sign of life")

    def _give_back(self, db: sqlite3.Connection, study: int, attempts: int, reason: str) -> None:
        state = State.FAILED if attempts >= MAX_ATTEMPTS else State.READY
        self._move(db, study, state, reason)

    def renew(self, claim: Claim, lease: float) -> bool:
        """Prolong the lease; False if the claim is no longer the worker's own."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE studies SET lease = ? WHERE worker = ? AND state = 'claimed'",
                (self._clock() + lease, claim.token),
            )
            return changed.rowcount == len(claim.studies)

    def release(self, claim: Claim, reason: str) -> None:
        """Give studies back that the worker is not to blame for (disk full, interrupted); no attempt is counted."""
        with self._transaction() as db:
            query = "SELECT id FROM studies WHERE worker = ? AND state = 'claimed'"
            for row in db.execute(query, (claim.token,)).fetchall():
                db.execute("UPDATE studies SET attempts = attempts - 1 WHERE id = ?", (row["id"],))
                self._move(db, row["id"], State.READY, reason)

    def fail(self, claim: Claim, reason: str) -> None:
        """Give studies back whose worker died or failed; the attempt counts."""
        with self._transaction() as db:
            query = "SELECT id, attempts FROM studies WHERE worker = ? AND state = 'claimed'"
            for row in db.execute(query, (claim.token,)).fetchall():
                self._give_back(db, row["id"], row["attempts"], reason)

    def commit(self, claim: Claim, outcomes: Sequence[Outcome], shard: PackedShard | None) -> None:
        """Enter what became of all studies of a claim, and the shard with the packed ones, in one transaction.

        Raises:
            LeaseLost: a study of the claim is no longer the worker's own; nothing is entered.
        """
        if {item.study for item in outcomes} != {study.id for study in claim.studies}:
            raise ValueError("there must be one outcome for each study of the claim")
        packed = sum(item.state == State.PACKED for item in outcomes)
        if packed != (shard.studies if shard else 0):
            raise ValueError("the shard must hold exactly the packed studies")
        with self._transaction() as db:
            query = "SELECT COUNT(*) FROM studies WHERE worker = ? AND state = 'claimed'"
            if db.execute(query, (claim.token,)).fetchone()[0] != len(claim.studies):
                raise LeaseLost("The lease ran out, and another worker has the studies; give a longer --lease.")
            if shard is not None:
                db.execute(
                    "INSERT INTO shards (name, staging, studies, slices, bytes, sha256) VALUES (?, ?, ?, ?, ?, ?)",
                    (shard.name, shard.staging, shard.studies, shard.slices, shard.bytes, shard.sha256),
                )
            for item in outcomes:
                if item.state == State.PACKED and shard is not None:
                    db.execute("UPDATE studies SET shard = ? WHERE id = ?", (shard.name, item.study))
                self._finish(db, item, claim.token)

    def _finish(self, db: sqlite3.Connection, item: Outcome, token: str | None = None) -> None:
        db.execute(
            "UPDATE studies SET passed = ?, measures = ? WHERE id = ?",
            (item.passed, json.dumps(item.measures), item.study),
        )
        if item.state == State.FAILED:
            attempts = db.execute("SELECT attempts FROM studies WHERE id = ?", (item.study,)).fetchone()[0]
            self._give_back(db, item.study, attempts, item.reason)
        else:
            self._move(db, item.study, item.state, item.reason, token)

    def _move(self, db: sqlite3.Connection, study: int, state: State, reason: str, token: str | None = None) -> None:
        db.execute(
            "UPDATE studies SET state = ?, reason = ?, worker = NULL, lease = NULL, updated = ? WHERE id = ?",
            (state, reason, self._clock(), study),
        )
        self._tell(db, study, state, reason, token)

    def _tell(self, db: sqlite3.Connection, study: int, event: str, reason: str, token: str | None = None) -> None:
        db.execute(
            "INSERT INTO events (study, time, worker, event, reason) VALUES (?, ?, ?, ?, ?)",
            (study, self._clock(), token, event, reason),
        )

    def settle(self, folder: Path) -> int:
        """Give committed shards their names in ``folder``; how many there were.

        Raises:
            LedgerError: a committed shard is neither under its hidden nor under its own name.
        """
        rows = self._rows("SELECT name, staging FROM shards WHERE settled = 0")
        for row in rows:
            hidden, final = folder / row["staging"], folder / row["name"]
            try:
                os.replace(hidden, final)
            except FileNotFoundError:
                if not final.exists():  # another process may have been faster
                    raise LedgerError(
                        f"The shard {final} is gone; bring it back, or curate into a new OUT folder."
                    ) from None
            with self._transaction() as db:
                db.execute("UPDATE shards SET settled = 1 WHERE name = ?", (row["name"],))
        return len(rows)

    def sweep(self, folder: Path, lease: float) -> int:
        """Remove hidden files of workers that died; how many. Younger ones than two leases may still be written."""
        known = {row["staging"] for row in self._rows("SELECT staging FROM shards")}
        removed = 0
        for path in folder.glob(".*.tar"):
            with suppress(OSError):
                if path.name not in known and self._clock() - path.stat().st_mtime > 2 * lease:
                    path.unlink()
                    removed += 1
        return removed

    # Looking and deciding: by a person.

    def states(self) -> dict[State, int]:
        """How many studies stand where."""
        found = {row["state"]: row["n"] for row in self._rows("SELECT state, COUNT(*) n FROM studies GROUP BY state")}
        return {state: found.get(state, 0) for state in State}

    def funnel(self) -> dict[Gate, int]:
        """How many studies passed each gate."""
        rows = self._rows("SELECT passed, COUNT(*) n FROM studies GROUP BY passed")
        return {gate: sum(row["n"] for row in rows if row["passed"] >= gate) for gate in Gate}

    def label_counts(self, threshold: float = 0.5) -> dict[str, int]:
        """How many packed studies have each label."""
        counts: dict[str, int] = {}
        for row in self._rows("SELECT labels FROM studies WHERE state = 'packed'"):
            for name, probability in json.loads(row["labels"] or "{}").items():
                counts[name] = counts.get(name, 0) + (probability > threshold)
        return counts

    def reasons(self) -> dict[tuple[State, str], int]:
        """How many studies were excluded, wait for a person or failed, by reason."""
        rows = self._rows(
            "SELECT state, reason, COUNT(*) n FROM studies WHERE state IN ('excluded', 'review', 'failed') "
            "GROUP BY state, reason ORDER BY n DESC"
        )
        return {(State(row["state"]), row["reason"]): row["n"] for row in rows}

    def totals(self) -> dict[str, int]:
        """Shards, studies, slices and bytes packed."""
        row = self._rows(
            "SELECT COUNT(*) shards, COALESCE(SUM(studies), 0) studies, COALESCE(SUM(slices), 0) slices, "
            "COALESCE(SUM(bytes), 0) bytes FROM shards"
        )[0]
        return dict(row)

    def shards(self) -> list[dict[str, Any]]:
        """The shards as they were committed."""
        return [dict(row) for row in self._rows("SELECT * FROM shards ORDER BY name")]

    def events(self, event: str) -> dict[str, int]:
        """How often each study met ``event``: its key and the number."""
        rows = self._rows(
            "SELECT key, COUNT(*) n FROM events JOIN studies ON studies.id = study WHERE event = ? GROUP BY key",
            (event,),
        )
        return {row["key"]: row["n"] for row in rows}

    def waiting(self) -> list[dict[str, Any]]:
        """The review list: what a person has to decide, and packed studies whose files changed later."""
        rows = self._rows(
            "SELECT key, state, passed, reason, confidence, measures FROM studies "
            "WHERE state IN ('review', 'failed') OR (state = 'packed' AND reason != '') ORDER BY state, reason, id"
        )
        return [dict(row) for row in rows]

    def decide(self, key: str, accept: bool) -> None:
        """A person's decision: take the study and waive the gate it stopped at, or leave it out.

        A failed study that is accepted is tried again.
        """
        with self._transaction() as db:
            row = db.execute("SELECT * FROM studies WHERE key = ?", (key,)).fetchone()
            if row is None or row["state"] not in (State.REVIEW, State.FAILED):
                raise LedgerError(f"{key} does not wait for review; 'review' lists the studies that do.")
            if not accept:
                self._move(db, row["id"], State.EXCLUDED, f"{_REJECTED}: {row['reason']}")
                return
            gate = Gate(row["passed"] + 1)
            waived = row["waived"] | (1 << gate if row["state"] == State.REVIEW else 0)
            db.execute("UPDATE studies SET waived = ?, attempts = 0 WHERE id = ?", (waived, row["id"]))
            self._move(db, row["id"], State.READY if gate > Gate.CONFIDENT else State.FOUND, "accepted in review")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors as errors with a remedy."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "full" in text or "disk I/O" in text:
            raise OutputError(f"The disk of {path} is full; free some space and run again.") from error
        if "readonly" in text or "unable to open" in text:
            raise OutputError(f"{path} cannot be written ({text}); name another OUT folder.") from error
        raise LedgerError(f"The ledger {path} cannot be used now ({text}); run again.") from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"The ledger {path} is damaged ({error}); bring back its last copy.") from error


def _packed(files: Sequence[str]) -> bytes:
    return zlib.compress("\n".join(files).encode("utf-8", "surrogateescape"))


def _gates(bits: int) -> frozenset[Gate]:
    return frozenset(gate for gate in Gate if bits >> gate & 1)


def _study(row: sqlite3.Row) -> Study:
    files = tuple(zlib.decompress(row["files"]).decode("utf-8", "surrogateescape").split("\n"))
    labels = json.loads(row["labels"] or "{}")
    return Study(
        row["id"], row["key"], row["patient"], files, json.loads(row["facts"]), labels, row["confidence"] or 0.0,
        _gates(row["waived"]),
    )  # fmt: skip
