"""The shell's door to curation.

python -m training.curation run ARCHIVE OUT [--reports FILE] [--classifier MODEL] [--workers N | --dask ADDRESS]
python -m training.curation status OUT
python -m training.curation counts OUT
python -m training.curation review OUT [--accept KEY] [--reject KEY]
python -m training.curation ask OUT TO_ANNOTATE.csv [--count 2000]
python -m training.curation learn ANNOTATED.csv MODEL.npz

The rounds of annotation: ``ask`` writes the reports the classifier is least sure of, a person fills in the labels,
``learn`` learns from all annotated so far, and ``run --classifier MODEL.npz --again`` classifies the unsure ones anew.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.runtime.files import atomic_path
from training.curation.archive import decode, find_studies, read_reports, report_columns, report_text
from training.curation.cluster import connect, run_on_cluster
from training.curation.deidentify import DatePolicy, site_key
from training.curation.errors import UnreadableReport
from training.curation.ledger import Gate, Ledger
from training.curation.local import LEASE_S, run_workers
from training.curation.reports.heads import LearnedClassifier, RuleClassifier
from training.curation.stages import Settings, classify_reports, site_folders

__all__ = ["main", "read_annotated"]

_GATES = {
    Gate.FOUND: "input scans",
    Gate.REPORT: "with reports",
    Gate.CONFIDENT: "report classifier confident",
    Gate.INTACT: "intact",
    Gate.CLEAN: "clean",
    Gate.PACKED: "in shards",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except LCTfoundError as error:
        print(f"curation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("curation: interrupted; the same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.curation", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="find, gate, de-identify and pack; run it again to resume")
    run.set_defaults(command=_run)
    run.add_argument("archive", type=Path)
    run.add_argument("out", type=Path)
    run.add_argument("--reports", type=Path, help="CSV, JSON, JSON lines or folder; default: text beside the images")
    run.add_argument("--encoding", help="of the reports; default: UTF-8, UTF-16 or GB 18030, as recognized")
    run.add_argument("--classifier", type=Path, help="report classifier made by 'learn'; default: rules")
    run.add_argument("--again", action="store_true", help="classify the reports anew that it was not sure of")
    run.add_argument("--confidence", type=float, default=0.9)
    run.add_argument("--workers", type=int, default=1)
    run.add_argument("--dask", metavar="ADDRESS", help="of a Dask scheduler whose workers see ARCHIVE and OUT/shards")
    run.add_argument("--studies-per-shard", type=int, default=16)
    run.add_argument("--lease", type=float, default=LEASE_S, help="seconds until a silent worker is taken for dead")
    run.add_argument("--dates", type=DatePolicy, choices=list(DatePolicy), default=DatePolicy.DROP)
    for name, command, text in (
        ("status", _status, "where the studies stand"),
        ("counts", _counts, "the table of gates and diseases"),
        ("review", _review, "what a person has to decide"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(command=command)
        sub.add_argument("out", type=Path)
        if name == "review":
            sub.add_argument("--accept", action="append", default=[], metavar="KEY", help="take it and waive the gate")
            sub.add_argument("--reject", action="append", default=[], metavar="KEY", help="leave it out for good")
    ask = commands.add_parser("ask", help="write the reports to annotate next: a CSV with a column for each label")
    ask.set_defaults(command=_ask)
    ask.add_argument("out", type=Path)
    ask.add_argument("csv", type=Path)
    ask.add_argument("--count", type=int, default=2000)
    learn = commands.add_parser("learn", help="learn a report classifier")
    learn.set_defaults(command=_learn)
    learn.add_argument("annotated", type=Path, help="CSV: an id, the report, and a column of 0 and 1 for each label")
    learn.add_argument("model", type=Path)
    learn.add_argument("--encoding")
    return parser


def _run(options: argparse.Namespace) -> None:
    if not options.archive.is_dir():
        raise UnreadableReport(f"There is no folder {options.archive}; name the root of the DICOM archive.")
    path, key, shards = site_folders(options.out)
    reports = read_reports(options.reports, options.encoding) if options.reports else None
    classifier = LearnedClassifier.load(options.classifier) if options.classifier else RuleClassifier()
    settings = Settings(options.archive, shards, site_key(key), options.dates)
    start = time.monotonic()
    with Ledger(path) as ledger:
        new, changed = ledger.add(find_studies(options.archive, reports, options.encoding, options.workers))
        print(f"{new} new studies, {changed} changed", flush=True)
        if options.again:
            print(f"{ledger.reopen_unsure()} reports to be classified again")
        print(f"{classify_reports(ledger, classifier, options.confidence)} reports classified", flush=True)
    if options.dask:
        run_on_cluster(path, settings, connect(options.dask), options.studies_per_shard, options.lease)
    else:
        run_workers(path, settings, options.workers, options.studies_per_shard, options.lease)
    _status(options)
    print(f"{time.monotonic() - start:.0f} s")


def _open(options: argparse.Namespace) -> Ledger:
    return Ledger(site_folders(options.out)[0], create=False)


def _status(options: argparse.Namespace) -> None:
    with _open(options) as ledger:
        for state, number in ledger.states().items():
            print(f"{state:<10}{number:>9,}")
        totals = ledger.totals()
        print(f"{totals['slices']:,} slices in {totals['shards']:,} shards, {totals['bytes'] / 1e9:.2f} GB")
        for (state, reason), number in list(ledger.reasons().items())[:20]:
            print(f"{number:>9,}  {state}: {reason}")


def _counts(options: argparse.Namespace) -> None:
    with _open(options) as ledger:
        for gate, number in ledger.funnel().items():
            print(f"{_GATES[gate]:<36}{number:>9,}")
        print(f"{'slices':<36}{ledger.totals()['slices']:>9,}")
        for name, number in sorted(ledger.label_counts().items(), key=lambda item: -item[1]):
            print(f"  {name:<34}{number:>9,}")


def _review(options: argparse.Namespace) -> None:
    with _open(options) as ledger:
        for key in options.accept:
            ledger.decide(key, accept=True)
        for key in options.reject:
            ledger.decide(key, accept=False)
        for row in ledger.waiting():
            print(f"{row['key']}\t{row['state']}\t{row['reason']}\t{row['measures'] or ''}")


def _ask(options: argparse.Namespace) -> None:
    with _open(options) as ledger:
        asked = ledger.least_sure(options.count)
    with atomic_path(options.csv) as staging, staging.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "report", *RuleClassifier.labels])
        writer.writerows([key, report, *[""] * len(RuleClassifier.labels)] for key, report in asked)
    print(f"{len(asked)} reports in {options.csv}; fill in 0 or 1, and keep the file in the hospital")


def _learn(options: argparse.Namespace) -> None:
    texts, labels = read_annotated(options.annotated, options.encoding)
    LearnedClassifier.learn(texts, labels).save(options.model)
    print(f"learned {len(labels[0])} labels from {len(texts)} reports")


def read_annotated(path: Path, encoding: str | None = None) -> tuple[list[str], list[dict[str, int]]]:
    """Reports and labels of a CSV: all columns that hold nothing but 0 and 1 are labels.

    Raises:
        UnreadableReport: missing, in an unknown encoding or layout.
    """
    try:
        text = decode(path.read_bytes(), path.name, encoding)
    except OSError as error:
        raise UnreadableReport(f"{path} cannot be read ({error.strerror}); name the annotated CSV.") from error
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not rows:
        raise UnreadableReport(f"{path.name} holds no report; export the reports again.")
    key, parts = report_columns(rows[0], path.name)
    others = [name for name in rows[0] if name != key and name not in parts]
    names = [name for name in others if all((row[name] or "").strip() in ("0", "1") for row in rows)]
    if not names:
        raise UnreadableReport(f"{path.name} has no column of 0 and 1; give one for each label.")
    return [report_text(row, parts) for row in rows], [{name: int(row[name]) for name in names} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
