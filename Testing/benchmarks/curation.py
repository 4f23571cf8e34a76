"""How fast is curation? Synthetic studies through all gates on one core, by stage, and what the paper's archive takes.

    ./run python Testing/benchmarks/curation.py [--studies 3] [--slices 300] [--size 512]

The studies are a phantom patient on the scanner's grid. Times are those of the processor (one thread), so a busy
machine hardly changes them; reading is from this machine's disk cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from LCTfoundLib.volume import Volume  # noqa: E402
from training.curation.archive import find_studies  # noqa: E402
from training.curation.deidentify import Deidentifier, allowed_facts, site_key  # noqa: E402
from training.curation.ledger import Ledger  # noqa: E402
from training.curation.local import work  # noqa: E402
from training.curation.quality import EdgeGate, load_study  # noqa: E402
from training.curation.reports.heads import RuleClassifier  # noqa: E402
from training.curation.shards import ShardWriter  # noqa: E402
from training.curation.stages import Settings, classify_reports, site_folders  # noqa: E402
from training.curation.synthetic import write_study  # noqa: E402

#: The paper's archive, and the studies whose images it opened (those with a report).
SCANS, WITH_REPORTS = 485_885, 263_483
REPORT = (
    "Trachea and main bronchi are open. No pleural effusion was detected. Emphysema is observed in both lungs. "
    "No pathologically enlarged lymph nodes. Bone structures are natural. "
) * 3


def patient(slices: int, size: int) -> Volume:
    """A synthetic chest on a grid of ``slices`` x ``size`` x ``size``, with a scan's noise."""
    from training.phantom.render import phantom

    ct = phantom(seed=20, spacing=2.5).ct
    extent = np.array(ct.shape[::-1]) * ct.spacing
    spacing = extent / (size, size, slices)
    origin = np.array(ct.origin) - np.array(ct.spacing) / 2 + spacing / 2
    grid = Volume(np.broadcast_to(np.int16(0), (slices, size, size)), tuple(spacing), tuple(origin))
    fine = ct.resample(grid, pad=-1024)
    noise = np.random.default_rng(0).normal(0, 25, fine.shape).astype(np.float32)
    return fine.with_array(np.clip(fine.array + noise, -1024, 3000).astype(np.int16))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and seconds of this process's processor time."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=3)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    archive, out = folder / "archive", folder / "out"
    ct = patient(options.slices, options.size)
    for n in range(options.studies):
        write_study(archive / str(n), ct, REPORT, PatientID=f"P{n}")
    path, key, shards = site_folders(out)
    settings = Settings(archive, shards, site_key(key))
    with Ledger(path) as ledger:
        found, finding = timed(lambda: list(find_studies(archive)))
        _, entering = timed(lambda: ledger.add(found))
        _, reading = timed(lambda: classify_reports(ledger, RuleClassifier()))
    stages = {"find (headers)": finding, "ledger": entering, "report": reading}
    stages |= one_by_one(archive, folder, found, settings)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {options.studies} studies of {options.slices} x {options.size} x {options.size}")
    for name, seconds in stages.items():
        print(f"{name:<28}{seconds / options.studies:8.2f} s a study", flush=True)
    done, packing = timed(lambda: work(path, settings))
    assert done == options.studies, "not all studies were taken"
    with Ledger(path) as ledger:
        totals = ledger.totals()
    early = (finding + entering + reading) / options.studies
    late = packing / options.studies
    rate = 60 / (early + late)
    print(f"{'all, as the worker runs it':<28}{early + late:8.2f} s a study = {rate:.1f} studies a minute a core")
    size = totals["bytes"]
    print(f"{size / totals['slices'] / 1000:.0f} kB a slice, {size / totals['studies'] / 1e6:.0f} MB a study")
    for what, seconds in (
        (f"{SCANS:,} scans found, the images of {WITH_REPORTS:,} opened", SCANS * early + WITH_REPORTS * late),
        (f"the images of all {SCANS:,} opened", SCANS * (early + late)),
    ):
        print(f"{what}: {seconds / 3600:,.0f} core hours = {seconds / 3600 / 24 / 64:.1f} days on 64 cores")


def one_by_one(archive: Path, folder: Path, found: list[Any], settings: Settings) -> dict[str, float]:
    """Seconds of all studies by stage."""
    names = Deidentifier(settings.key)
    total = dict.fromkeys(("read, whole? a chest CT?", "edges", "write"), 0.0)
    for study in found:
        ct, seconds = timed(lambda study=study: load_study(archive, study.files))
        total["read, whole? a chest CT?"] += seconds
        measures, seconds = timed(lambda ct=ct: EdgeGate().measure(ct))
        total["edges"] += seconds

        def write(study=study, ct=ct) -> None:
            from training.curation.ledger import Study

            entry = Study(0, study.key, study.patient, study.files, study.facts, {}, 1.0)
            with ShardWriter(folder / "apart") as writer:
                writer.add(ct.array, allowed_facts(entry, ct, names))
                writer.close()

        total["write"] += timed(write)[1]
    print(f"edge ratio {measures['edge_ratio']:.3f}")
    return total


if __name__ == "__main__":
    main()
