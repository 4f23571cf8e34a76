"""How much wider the low-dose net's interval has to be than the net says, so that it holds 90 % of the pixels.

    python -m training.evaluate.low_dose_interval --weights runs/exported --out interval.json

As ``reconstruction_interval`` finds it, on the frozen tuning slices, over doses and kernels. The reference is the
noise-free reconstruction with the same kernel. The file goes into the weight's card
(``training.restoration --export FOLDER --numbers FILE``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.low_dose import LOW_DOSE_WEIGHT, load_low_dose
from LCTfoundLib.physics.noise import SHARP, SOFT, Dose
from LCTfoundLib.tasks.low_dose import LowDoseRequest, reduce_noise
from training.evaluate.cases import DEFAULT_DATA
from training.evaluate.command import Log, command
from training.evaluate.low_dose import LowDoseScans, Scan, scan_of, volume_of, with_neighbors
from training.evaluate.reconstruction_interval import found_of, inside, write_found
from training.evaluate.reconstruction_slices import SliceChoice, read_slices

__all__ = ["main", "shortfalls"]

#: Shares of the full dose.
_DOSES = (0.02, 0.05, 0.1, 0.25, 0.5)
_KERNELS = {"soft": SOFT, "sharp": SHARP}
_VIEWS = 360


def shortfalls(scans: Sequence[Scan], weights: Path | None) -> dict[str, np.ndarray]:
    """Of each patient, errors of the body's pixels as shares of half of the interval's width, float32; 1 is its edge.

    Noise of any size is removed: what is left on purpose widens the interval by what it is, which no factor changes.
    """
    found: dict[str, list[np.ndarray]] = {}
    for scan in scans:
        result = reduce_noise(
            volume_of(scan.noisy, scan.piece.pixel_mm, scan.spacing_mm),
            LowDoseRequest(kept_mm=0.0, weights_folder=weights),
        )
        assert result.interval_hu is not None
        error = np.abs(result.ct.array[1] - scan.reference)
        found.setdefault(scan.piece.patient, []).append((error / result.interval_hu[1])[scan.piece.body])
    return {patient: np.concatenate(ratios).astype(np.float32) for patient, ratios in found.items()}


def _run(options: argparse.Namespace, log: Log) -> dict[str, Any]:
    card = load_low_dose(LOW_DOSE_WEIGHT, options.weights)[1]
    slices, missing = read_slices(SliceChoice.TUNING, options.size, options.data)
    for reason in missing:
        log(f"left out: {reason}")
    if not slices:
        raise LCTfoundError(f"There is no slice to work on ({'; '.join(missing)}).")
    pieces = [(piece, *with_neighbors(piece, options.size, options.data)) for piece in slices]
    ratios: dict[str, dict[str, np.ndarray]] = {}
    for kernel in _KERNELS:
        for share in _DOSES:
            scanner = LowDoseScans(options.size, _VIEWS, Dose(1e5, share, 10.0), _KERNELS[kernel], options.seed)
            name = f"{options.size} pixels, {100 * share:g} % of 1e5 photons, {kernel} kernel"
            ratios[name] = shortfalls([scan_of(scanner, *each) for each in pieces], options.weights)
            log(f"{name}: {100 * inside(ratios[name]):.1f} % inside")
    return found_of(ratios, card, [piece.name for piece in slices], log)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find the factor of the low-dose net's interval.")
    parser.add_argument("--weights", type=Path, help="folder of the weight; the usual places otherwise")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("output/low_dose_interval.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with command() as log:
        write_found(_run(options, log), options.out)
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
