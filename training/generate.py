"""Fill a pool with phantom samples for ``training.segmentation``.

    python -m training.generate coarse --pool runs/pool/coarse --count 500 --processes 2
    python -m training.generate fine   --pool runs/pool/fine --count 500 --first-seed 0

Each patient is grown once; several scans (coarse) or boxes (fine) of it are rendered. Seeds 0-999999 are for training,
1000000-1000019 for validation (``training/evaluate/split_manifest.json``).
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from enum import Enum
from pathlib import Path

import numpy as np

from LCTfoundLib.anatomy.structures import Context
from LCTfoundLib.networks.inputs import LungBox
from training.losses import IGNORE
from training.phantom.render import Patient, Rendered, Scan, make_patient, render
from training.phantom.thorax import Organ
from training.processes import share_seeds
from training.samples import Pool, Sample

__all__ = ["Kind", "coarse_samples", "fine_samples", "main"]

_CONTEXT: dict[Context, tuple[Organ, ...]] = {
    Context.HEART: (
        Organ.MYOCARDIUM,
        Organ.LEFT_VENTRICLE,
        Organ.RIGHT_VENTRICLE,
        Organ.LEFT_ATRIUM,
        Organ.RIGHT_ATRIUM,
    ),
    Context.AORTA: (Organ.AORTA,),
    Context.VENA_CAVA: (Organ.VENA_CAVA,),
    Context.ESOPHAGUS: (Organ.ESOPHAGUS,),
    Context.BONE: (Organ.BONE_CORTEX, Organ.BONE_MARROW),
    Context.UPPER_ABDOMEN_RIGHT: (Organ.LIVER,),
    Context.UPPER_ABDOMEN_LEFT: (Organ.STOMACH, Organ.SPLEEN),
}
#: Lookup table: organ code (index) -> context code of the coarse net's first head.
_CONTEXT_OF_ORGAN = np.zeros(256, dtype=np.uint8)
for _context, _organs in _CONTEXT.items():
    _CONTEXT_OF_ORGAN[list(_organs)] = _context


class Kind(Enum):
    """Which net the samples are for."""

    COARSE = "coarse"
    FINE = "fine"


def coarse_samples(seed: int, scans: int = 2, spacing: float = 3.0) -> list[Sample]:
    """Whole-chest samples of one patient on the coarse net's grid."""
    rng = np.random.default_rng([seed, 1])
    patient = make_patient(seed, spacing=spacing)
    samples = []
    for index in range(scans):
        scan = replace(Scan.sample(rng), spacing=(spacing,) * 3)
        rendered = render(patient, scan, seed=seed * 10 + index)
        samples.append(_sample(rendered, patient_box(rendered.lobes.array, rendered), margin_mm=20.0))
    return samples


def fine_samples(seed: int, boxes: int = 10, size: int = 88) -> list[Sample]:
    """Boxes of ``size`` voxels at 0.9-1.5 mm of one patient, over the lungs, a third of them at a hilum."""
    rng = np.random.default_rng([seed, 2])
    patient = make_patient(seed, spacing=1.5)
    thorax = patient.thorax
    lungs = thorax.lobes > 0
    box = LungBox.of_mask(lungs, (thorax.grid.spacing,) * 3, thorax.grid.origin)
    inside = np.argwhere(lungs)
    samples = []
    for index in range(boxes):
        spacing = float(rng.uniform(0.9, 1.5)) if rng.random() < 0.6 else 1.0
        scan = replace(Scan.sample(rng), spacing=(spacing,) * 3)
        center = _fine_center(patient, inside, rng)
        half = spacing * size / 2
        rendered = render(patient, scan, seed=seed * 100 + index, box=(center - half, center + half))
        samples.append(_sample(rendered, box))
    return samples


def _fine_center(patient: Patient, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """LPS mm: near a hilum or the carina in a third of the draws, else any lung voxel."""
    if rng.random() < 0.35:
        name = rng.choice(["hilum_right", "hilum_left", "carina"])
        return np.asarray(patient.thorax.landmarks[name]) + rng.normal(0, 15, 3)
    grid = patient.thorax.grid
    k, j, i = inside[rng.integers(len(inside))]
    return np.asarray(grid.origin) + grid.spacing * np.array([i, j, k])


def patient_box(lobes: np.ndarray, rendered: Rendered) -> LungBox:
    """The lungs' bounding box in a rendered scan."""
    return LungBox.of_mask(lobes > 0, rendered.ct.spacing, rendered.ct.origin)


def _sample(rendered: Rendered, box: LungBox, margin_mm: float | None = None) -> Sample:
    """Targets of a rendered scan; with a margin, cropped to the lung box (plus margin) as inference crops."""
    ct = rendered.ct
    trees, visible = rendered.trees.array, rendered.visible.array
    sample = Sample(
        ct.array,
        region_codes(rendered.segments.array, rendered.organs.array),
        rendered.lobes.array,
        np.where((trees > 0) & (visible == 0), np.uint8(IGNORE), trees),
        rendered.skeleton.array,
        ct.spacing,
        ct.origin,
        box,
    )
    return sample if margin_mm is None else _cropped(sample, margin_mm)


def region_codes(segments: np.ndarray, organs: np.ndarray) -> np.ndarray:
    """Codes of the coarse net's first head: segments 1-18, ``Context`` 19-25."""
    return np.where(segments > 0, segments, _CONTEXT_OF_ORGAN[organs]).astype(np.uint8)


def _cropped(sample: Sample, margin_mm: float) -> Sample:
    slices, origin = [], list(sample.origin)
    for axis, size in enumerate(sample.ct.shape):
        xyz = 2 - axis
        step = sample.spacing[xyz]
        low = max(0, round((sample.box.low[xyz] - margin_mm - sample.origin[xyz]) / step))
        high = min(size, round((sample.box.high[xyz] + margin_mm - sample.origin[xyz]) / step) + 1)
        slices.append(slice(low, high))
        origin[xyz] += low * step
    cut = tuple(slices)
    return Sample(
        sample.ct[cut],
        sample.regions[cut],
        sample.lobes[cut],
        sample.trees[cut],
        sample.skeleton[cut],
        sample.spacing,
        (origin[0], origin[1], origin[2]),
        sample.box,
    )


def _work(seeds: list[int], kind: Kind, pool: Pool) -> None:
    os.nice(5)  # the trainer goes first
    make = coarse_samples if kind is Kind.COARSE else fine_samples
    for seed in seeds:
        for index, sample in enumerate(make(seed)):
            pool.add(sample, f"{seed:07d}_{index}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fill a pool with phantom training samples.")
    parser.add_argument("kind", type=Kind, choices=list(Kind))
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="patients")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=1000, help="samples kept; older ones go")
    options = parser.parse_args(arguments)
    pool = Pool(options.pool, options.capacity)
    seeds = list(range(options.first_seed, options.first_seed + options.count))
    begin = time.monotonic()
    share_seeds(_work, seeds, options.processes, options.kind, pool)
    parser.exit(0, f"{len(seeds)} patients in {time.monotonic() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
