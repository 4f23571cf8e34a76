"""Pretraining shards from what needs no curation: phantoms, and the permissive real CT that a user has downloaded.

    python -m training.pretraining_data phantom --out runs/shards/phantom --count 150 --processes 2
    python -m training.pretraining_data ct LIDC-IDRI-0003_ct.nii.gz --license "CC BY 3.0" --out runs/shards/real
    python -m training.pretraining_data slices tcga_luad_100slices.npz --license "CC BY 3.0" --out runs/shards/real

They are of the layout that curation packs (``training/curation/shards.py``), so that both may lie in one folder.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.networks.conditions import Disease
from LCTfoundLib.volume_io import read_ct
from training.curation.shards import ShardWriter
from training.phantom.pathology import Pathology
from training.phantom.render import Scan, make_patient, render
from training.processes import share_seeds

__all__ = ["FIRST_SEED", "diseases_of", "is_held_out", "main", "write_ct", "write_phantom", "write_slices"]

#: Of the patients of pretraining; far from the seeds of the segmentation nets and of their tests.
FIRST_SEED = 700_000
#: In the shards and in the weight's card.
PHANTOM_LICENSE = "Apache-2.0"

_DISEASE_OF_PATHOLOGY = {
    "mediastinal tumor": Disease.MEDIASTINAL_MASS,
    "lymph node": Disease.LYMPH_NODE_ENLARGEMENT,
    "emphysema": Disease.EMPHYSEMA,
    "effusion": Disease.PLEURAL_EFFUSION,
    "fibrosis": Disease.FIBROSIS,
    "ground glass": Disease.DPLD,
    "crazy paving": Disease.DPLD,
    "atelectasis": Disease.ATELECTASIS,
    "calcification": Disease.CALCIFICATION,
}


def is_held_out(patient: str) -> bool:
    """Whether a real patient is kept for tests, 2 of 5 by the checksum of the name: the same in every part."""
    return hashlib.sha256(patient.encode()).digest()[0] % 5 < 2


def diseases_of(pathologies: Iterable[Pathology]) -> set[Disease]:
    """What the backbone can be told of a phantom's pathologies; nodules and consolidation are none of its terms."""
    names = {pathology.name for pathology in pathologies}
    return {disease for name, disease in _DISEASE_OF_PATHOLOGY.items() if name in names}


def write_phantom(seed: int, out: Path) -> None:
    """One patient as a shard: a clinical scan on 1.5 mm pixels (a whole chest fills 256 x 256), slices 2.5 mm apart."""
    patient = make_patient(seed, spacing=2.0)
    scan = replace(Scan.sample(np.random.default_rng([seed, 3])), spacing=(1.5, 1.5, 2.5))
    ct = render(patient, scan, seed).ct
    facts = {
        "contrast": max(vars(scan.contrast).values()) > 0,
        "labels": {str(disease): 1.0 for disease in sorted(diseases_of(patient.pathologies))},
        "license": PHANTOM_LICENSE,
        "source": "phantom",
    }
    _write(out, [(ct.array, _facts(f"phantom{seed}", ct.spacing, facts))])


def write_ct(path: Path, license_name: str, out: Path) -> None:
    """One real scan as a shard, on its own grid."""
    ct = read_ct(path).to_canonical()
    name = path.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_ct")
    facts = _facts(name, ct.spacing, {"labels": {}, "license": license_name, "source": name})
    _write(out, [(np.maximum(ct.array, -1024), facts)])


def write_slices(path: Path, license_name: str, out: Path) -> int:
    """Single slices of many patients as one shard, without the held-out patients; how many slices."""
    with np.load(path, allow_pickle=False) as data:
        hu, patients, spacing = data["hu"], data["patient"].tolist(), data["spacing"]
        contrast = data["contrast"]
    studies = []
    for n, patient in enumerate(patients):
        if not is_held_out(patient):
            told = {"contrast": bool(contrast[n]), "labels": {}, "license": license_name, "source": path.stem}
            facts = _facts(patient, (float(spacing[n][1]), float(spacing[n][0]), 1.0), told)
            studies.append((np.maximum(hu[n][None], -1024), facts | {"study": f"{patient}-{n:03d}"}))
    _write(out, studies)
    return len(studies)


def _facts(patient: str, spacing: Sequence[float], more: dict[str, Any]) -> dict[str, Any]:
    return {"study": patient, "patient": patient, "spacing": [round(float(step), 4) for step in spacing], **more}


def _write(out: Path, studies: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    with ShardWriter(out) as writer:
        for array, facts in studies:
            writer.add(np.ascontiguousarray(array, np.int16), facts | {"slices": len(array)})
        shard = writer.close()
    if shard is not None:
        (out / shard.staging).rename(out / f"shard-{studies[0][1]['study']}.tar")


def _write_phantoms(seeds: Sequence[int], out: Path) -> None:
    for seed in seeds:
        if not (out / f"shard-phantom{seed}.tar").exists():
            write_phantom(seed, out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretraining shards from phantoms and permissive real CT.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    phantom = kinds.add_parser("phantom", help="synthetic patients; those already there are kept")
    phantom.add_argument("--count", type=int, default=150)
    phantom.add_argument("--first-seed", type=int, default=FIRST_SEED)
    phantom.add_argument("--processes", type=int, default=1)
    for name, text in (("ct", "a CT file"), ("slices", "a .npz of slices (hu, patient, spacing, contrast)")):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("path", type=Path)
        kind.add_argument("--license", required=True, help="of the data, for the card of what is trained on it")
    for kind in kinds.choices.values():
        kind.add_argument("--out", type=Path, required=True, help="folder of the shards")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    if options.kind == "ct":
        write_ct(options.path, options.license, options.out)
    elif options.kind == "slices":
        write_slices(options.path, options.license, options.out)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        seeds = range(options.first_seed, options.first_seed + options.count)
        share_seeds(_write_phantoms, seeds, options.processes, options.out)
    parser.exit(0, f"done in {time.monotonic() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
