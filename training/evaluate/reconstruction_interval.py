"""How much wider the fast tier's interval has to be than its net says, so that it holds 90 % of the pixels.

    python -m training.evaluate.reconstruction_interval --weights runs/exported --held-out runs/shards/validation \\
        --out interval.json

The net learns the scale of its errors on what it is trained on, and on others it errs more. One factor for all makes up
for that (after conformal prediction for images, Angelopoulos et al., ICML 2022; nothing is guaranteed). It is found on
shards that nothing is trained on and on the frozen tuning slices, never on a test patient. Patients differ more than
pixels do, and the net has seen those of the tuning slices: so the intervals shall hold 90 % of the pixels of nine in
ten patients and settings, and not of all of them on the average, which new patients fell short of. The file goes into
the weight's card (``training.restoration --export FOLDER --numbers FILE``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.unrolled import load_unrolled
from LCTfoundLib.physics.noise import Dose
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.runtime.files import atomic_path, output_errors
from LCTfoundLib.tasks.sparse_view import INTERVAL_FACTOR
from LCTfoundLib.weights.registry import Card
from training.evaluate.cases import DEFAULT_DATA
from training.evaluate.command import Log, command
from training.evaluate.reconstruction import simulated
from training.evaluate.reconstruction_methods import Context, Method, Setting, methods_named
from training.evaluate.reconstruction_slices import ReconstructionSlice, SliceChoice, read_slices
from training.restoration import ImageSampler
from training.shard_stream import Augmentation, Mixture, Source

__all__ = ["calibrated", "found_of", "held_out_slices", "inside", "main", "shortfalls", "table", "write_found"]

#: What the interval shall hold.
_COVERAGE = 0.9
#: Side of the images from shards, mm.
_FIELD_MM = 384.0
#: Of how many patients, in all settings.
_OF_PATIENTS = 0.9


def held_out_slices(folder: Path, size: int, count: int) -> list[ReconstructionSlice]:
    """Chests of shards that nothing is trained on."""
    sampler = ImageSampler(Mixture([Source(folder)], 0), Augmentation(size, size), 9_999_999)
    return [
        ReconstructionSlice(f"held-out {n}", f"held-out {n}", sampler(n)[0].numpy(), _FIELD_MM / size)
        for n in range(count)
    ]


def shortfalls(slices: Sequence[ReconstructionSlice], method: Method, setting: Setting) -> dict[str, np.ndarray]:
    """Of each patient, errors of the body's pixels as shares of half of the interval's width, float32; 1 is its edge.

    Raises:
        LCTfoundError: the method tells no interval.
    """
    run = method.make(setting)
    found: dict[str, list[np.ndarray]] = {}
    for piece in slices:
        sinogram, projector = simulated(piece, setting)
        answer = run(sinogram, projector, Context(setting, {}, setting.seed))
        if answer.interval_hu is None:
            raise LCTfoundError(f"{method.title} tells no interval; choose a method that does, such as 'fast'.")
        error = (answer.hu[0].cpu() - torch.from_numpy(piece.hu)).abs()
        found.setdefault(piece.patient, []).append((error / answer.interval_hu[0].cpu()).numpy()[piece.body])
    return {patient: np.concatenate(ratios).astype(np.float32) for patient, ratios in found.items()}


def inside(ratios: Mapping[str, np.ndarray]) -> float:
    """Share of the pixels of all patients."""
    return float((np.concatenate(list(ratios.values())) <= 1).mean())


def calibrated(groups: Iterable[np.ndarray], coverage: float = _COVERAGE, of_patients: float = _OF_PATIENTS) -> float:
    """What the intervals have to be multiplied with to hold a share of the pixels of a share of the groups.

    Args:
        groups: ratios of a patient in a setting, any number.
        coverage, of_patients: the shares, 0-1.
    """
    return float(np.quantile([np.quantile(each, coverage) for each in groups], of_patients))


def found_of(
    ratios: Mapping[str, Mapping[str, np.ndarray]], card: Card, names: Iterable[str], log: Log
) -> dict[str, Any]:
    """What goes into the card of the weight that was looked at: factor, coverage, slices.

    Args:
        ratios: by setting and patient.
        card: of the weight.
        names: of the slices.
        log: told the factor.
    """
    before = float(card.numbers.get(INTERVAL_FACTOR, 1.0))
    factor = calibrated(each for setting in ratios.values() for each in setting.values())
    log(f"factor {before * factor:.3f} (was {before:.3f})")
    coverage = {}
    for name, setting in ratios.items():
        pixels = np.concatenate(list(setting.values()))
        coverage[name] = {
            "before": round(float((pixels <= 1).mean()), 4),
            "after": round(float((pixels <= factor).mean()), 4),
            "least of a patient": round(min(float((each <= factor).mean()) for each in setting.values()), 4),
        }
    return {
        INTERVAL_FACTOR: round(before * factor, 4),
        "inside the 90 % interval": coverage,
        "interval found on": sorted(names),
        "weight_sha256": card.sha256,
    }


def write_found(found: Mapping[str, Any], path: Path) -> None:
    """Write it as JSON, and print the table.

    Raises:
        OutputError: the file cannot be written.
    """
    with output_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found["inside the 90 % interval"]))


# -- the command -----------------------------------------------------------------------------------------------------


def _settings(options: argparse.Namespace, size: int) -> Iterator[tuple[str, Setting]]:
    device = choose_device(options.device).device
    for views in options.views:
        for dose in (None, Dose(options.photons)):
            setting = Setting(size, views, dose, device, options.seed, options.weights)
            yield f"{size} pixels, {views} views, noise {setting.noise}", setting


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find the factor of the fast tier's interval.")
    parser.add_argument("--weights", type=Path, help="folder of the weight; the usual places otherwise")
    parser.add_argument("--held-out", type=Path, help="folder of shards that nothing is trained on")
    parser.add_argument("--count", type=int, default=8, help="slices of these shards")
    parser.add_argument("--views", type=_numbers, default=(8, 16, 32))
    parser.add_argument("--sizes", type=_numbers, default=(256, 512), help="pixels of a side")
    parser.add_argument("--photons", type=float, default=Dose.photons, help="of a ray in air, with noise")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("output/interval.json"))
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, log: Log) -> dict[str, Any]:
    (fast,) = methods_named(["fast"])
    card = load_unrolled(folder=options.weights)[1]
    ratios: dict[str, dict[str, np.ndarray]] = {}
    names: set[str] = set()
    for size in options.sizes:
        slices, missing = read_slices(SliceChoice.TUNING, size, options.data)
        for reason in missing:
            log(f"left out: {reason}")
        slices += held_out_slices(options.held_out, size, options.count) if options.held_out else []
        if not slices:
            raise LCTfoundError(f"There is no slice to work on ({'; '.join(missing)}).")
        names |= {piece.name for piece in slices}
        for name, setting in _settings(options, size):
            ratios[name] = shortfalls(slices, fast, setting)
            log(f"{name}: {100 * inside(ratios[name]):.1f} % inside")
    return found_of(ratios, card, names, log)


def table(coverage: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: share inside before and after, and of the patient with the least."""
    lines = ["| setting | before | after | least of a patient |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in v.values())} |" for name, v in coverage.items()
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with command() as log:
        found = _run(options, log)
        write_found(found, options.out)
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
