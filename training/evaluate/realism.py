"""Where the phantom does not look like real CT: the same measurements on both, side by side.

    python -m training.evaluate.realism --phantoms 6 --out output/realism

Lungs are found without a network (``anatomy.lungs``), so that nothing trained on the phantom judges it. Phantoms are
scanned with slices like those of the real scans (0.9 mm pixels, 2.5 mm thick). Of these only patients that may train
are measured: tests stay unseen. A difference is told in deviations of the phantoms, since there are few real scans.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from LCTfoundLib.anatomy.lungs import lung_mask
from LCTfoundLib.errors import LCTfoundError, UnsuitableImage
from LCTfoundLib.export.reconstruction_pictures import Curves
from LCTfoundLib.physics.image_quality import NoiseEstimate, Tissue, estimate_noise
from LCTfoundLib.runtime.files import output_errors
from LCTfoundLib.volume import Volume
from training.evaluate.cases import DEFAULT_DATA, read_canonical
from training.evaluate.command import command

__all__ = ["DEPTHS_MM", "Look", "look_at", "main", "table"]

#: Of the bins of the distance from the pleura.
DEPTHS_MM = (3.0, 6.0, 10.0, 15.0, 20.0, 30.0, 60.0)
#: Real scans that may train, and that are whole chests.
REAL = ("LIDC-IDRI-0003", "4D-Lung_113_HM10395_p40")
#: First seed of the phantoms; no test's.
FIRST_SEED = 760_000
#: HU above which a voxel in a lung is a vessel or a wall, and bins of the histogram.
_VESSEL_HU = -600.0
_HISTOGRAM = np.arange(-1024.0, 1024.0, 16.0)
#: Inside of this distance (mm) from the pleura the partial volume of the chest wall counts.
_RIM_MM = 3.0
#: Reach of the profile through the pleura, mm.
_PROFILE_MM = 8.0


@dataclass(frozen=True, eq=False)
class Look:
    """What a scan looks like.

    Attributes:
        name: of the scan.
        numbers: by what they are.
        vessels: share of the lung's voxels above -600 HU, by depth, (depths,).
        histogram: of the HU inside the body, as shares, (bins,).
        profile: mean HU by the distance from the lateral pleura (mm, negative outside the lung): places and HU.
    """

    name: str
    numbers: Mapping[str, float]
    vessels: np.ndarray
    histogram: np.ndarray
    profile: tuple[np.ndarray, np.ndarray]


def look_at(name: str, ct: Volume) -> Look:
    """Measure a whole chest.

    Args:
        name: for the table.
        ct: HU, canonical.

    Raises:
        UnsuitableImage: there are no lungs.
    """
    hu = ct.array.astype(np.float32)
    found = lung_mask(ct)
    step = np.array(ct.spacing[::-1])
    lungs = found.lungs
    depth = ndimage.distance_transform_edt(lungs, step)
    outside = ndimage.distance_transform_edt(~lungs, step)
    body = _body(hu, lungs)
    inner = depth > _RIM_MM
    parenchyma = inner & ~ndimage.binary_dilation(hu > _VESSEL_HU, iterations=1)
    soft = body & (outside > 6) & ~ndimage.binary_dilation((hu > 150) | (hu < -40), iterations=1)
    fat = body & (outside > 6) & (hu > -160) & (hu < -50)
    between = _between_lungs(found.sides, outside)
    vessels = np.array([float((hu[part] > _VESSEL_HU).mean()) for part in _by_depth(depth)])
    bright = [float(np.percentile(hu[part], 99)) for part in _by_depth(depth)]
    place, profile = _pleura(hu, lungs, depth, outside)
    numbers = {
        "lung volume, mL": float(lungs.sum() * ct.voxel_ml),
        "parenchyma, median HU": _percentile(hu, parenchyma, 50),
        "parenchyma, 10th to 90th percentile, HU": _percentile(hu, parenchyma, 90) - _percentile(hu, parenchyma, 10),
        "parenchyma, texture of 1 to 3 mm, HU": _texture(hu, parenchyma, step),
        "parenchyma, back minus front, HU": _back_minus_front(hu, parenchyma),
        "vessels, share of the lung": float((hu[inner] > _VESSEL_HU).mean()),
        **{f"vessels, share {low:g} to {high:g} mm deep": float(share)
           for low, high, share in zip((_RIM_MM, *DEPTHS_MM[1:-1]), DEPTHS_MM[1:], vessels[1:], strict=True)},
        **{f"brightest 1 %, {low:g} to {high:g} mm deep, HU": value
           for low, high, value in zip((_RIM_MM, *DEPTHS_MM[1:-1]), DEPTHS_MM[1:], bright[1:], strict=True)},
        "pleura, 10 to 90 %, mm": _rise(place, profile),
        "trachea, median HU": _percentile(hu, found.airway, 50),
        "soft tissue, median HU": _percentile(hu, soft, 50),
        "fat, median HU": _percentile(hu, fat, 50),
        "fat, share of the body without lungs": float(fat.sum() / max((body & (outside > 6)).sum(), 1)),
        "bone, share of the body above 200 HU": float((hu[body & (outside > 6)] > 200).mean()),
        "between the lungs, 90th percentile HU": _percentile(hu, between, 90),
        **_noise(ct),
    }  # fmt: skip
    counts, _ = np.histogram(hu[body | lungs], np.append(_HISTOGRAM, _HISTOGRAM[-1] + 16))
    return Look(name, numbers, vessels, counts / max(counts.sum(), 1), (place, profile))


def _percentile(hu: np.ndarray, part: np.ndarray, share: float) -> float:
    return float(np.percentile(hu[part], share)) if part.any() else float("nan")


def _by_depth(depth: np.ndarray) -> Iterable[np.ndarray]:
    """Masks of the bins; a bin without voxels is the whole lung's edge."""
    for low, high in zip((0.0, *DEPTHS_MM[:-1]), DEPTHS_MM, strict=True):
        part = (depth > low) & (depth <= high)
        yield part if part.any() else depth > 0


def _body(hu: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The largest piece that is no air, slice by slice filled."""
    solid = ndimage.binary_opening(hu > -300, iterations=2)
    labels, count = ndimage.label(solid)
    if not count:
        raise UnsuitableImage("There is nothing but air in the scan; give a chest CT in HU.")
    largest = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return np.stack([ndimage.binary_fill_holes(plane) for plane in largest | lungs]) & ~lungs


def _between_lungs(sides: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Voxels with the right lung on one side of their row and the left on the other: heart and great vessels."""
    right, left = sides == 1, sides == 2
    after_right = np.maximum.accumulate(right, axis=2)
    before_left = np.maximum.accumulate(left[:, :, ::-1], axis=2)[:, :, ::-1]
    return after_right & before_left & (outside > 5)


def _texture(hu: np.ndarray, parenchyma: np.ndarray, step: np.ndarray) -> float:
    """Standard deviation between two Gaussians in the plane, away from what is no parenchyma."""
    far = ndimage.binary_erosion(parenchyma, np.ones((1, 5, 5)))
    sigma = [(0, 0.6 / step[1], 0.6 / step[2]), (0, 1.8 / step[1], 1.8 / step[2])]
    band = ndimage.gaussian_filter(hu, sigma[0]) - ndimage.gaussian_filter(hu, sigma[1])
    return float(band[far].std()) if far.any() else float("nan")


def _back_minus_front(hu: np.ndarray, parenchyma: np.ndarray) -> float:
    """Gravity: the lowest third of the lungs against the highest, for a patient on the back."""
    rows = np.nonzero(parenchyma)[1]
    front, back = np.percentile(rows, [33, 67])
    values = hu[parenchyma]
    return float(np.median(values[rows > back]) - np.median(values[rows < front]))


def _pleura(hu: np.ndarray, lungs: np.ndarray, depth: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean HU by the distance from the lungs' edge, in the outer third of each side, where it stands upright."""
    columns = np.nonzero(lungs)[2]
    left, right = np.percentile(columns, [8, 92])
    index = np.arange(hu.shape[2])
    lateral = np.zeros(hu.shape, bool)
    lateral[..., (index < left) | (index > right)] = True
    rows = np.nonzero(lungs)[1]
    front, back = np.percentile(rows, [30, 70])
    lateral[:, : int(front)] = lateral[:, int(back) :] = False
    signed = np.where(lungs, depth, -outside)
    near = lateral & (np.abs(signed) < _PROFILE_MM)
    bins = np.floor((signed[near] + _PROFILE_MM) * 2).astype(int)
    number = np.bincount(bins, minlength=int(4 * _PROFILE_MM))
    mean = np.bincount(bins, hu[near], minlength=len(number)) / np.maximum(number, 1)
    place = (np.arange(len(number)) + 0.5) / 2 - _PROFILE_MM
    return place[number > 0], mean[number > 0]


def _rise(place: np.ndarray, profile: np.ndarray) -> float:
    """From 10 to 90 % of the way between wall and lung, mm."""
    wall, lung = float(profile[place < -4].mean()), float(profile[place > 4].mean())
    share = (profile - wall) / (lung - wall)
    low = np.interp(0.1, np.maximum.accumulate(share), place)
    return float(np.interp(0.9, np.maximum.accumulate(share), place) - low)


def _noise(ct: Volume) -> dict[str, float]:
    planes = torch.from_numpy(ct.array[:: max(1, len(ct.array) // 12)].astype(np.float32))
    try:
        found: NoiseEstimate | None = estimate_noise(planes, ct.spacing[0])
    except UnsuitableImage:
        found = None
    by_tissue = {} if found is None else found.by_tissue
    return {
        f"noise in {tissue.value}, HU": by_tissue[tissue].sigma_hu if tissue in by_tissue else float("nan")
        for tissue in (Tissue.SOFT_TISSUE, Tissue.LUNG)
    }


# -- what is told ----------------------------------------------------------------------------------------------------


def table(phantoms: Sequence[Look], real: Sequence[Look]) -> str:
    """Markdown: each number of the phantoms (mean and deviation) and of the real scans, and how far these are off."""
    head = ["", f"phantoms ({len(phantoms)})", *(look.name for look in real), "off, in deviations of the phantoms"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in phantoms[0].numbers:
        values = np.array([look.numbers[key] for look in phantoms])
        mean, spread = float(np.nanmean(values)), float(np.nanstd(values, ddof=1)) if len(values) > 1 else 0.0
        others = [look.numbers[key] for look in real]
        off = "-" if not spread or not others else ", ".join(f"{(value - mean) / spread:+.1f}" for value in others)
        cells = [key, f"{mean:.4g} ± {spread:.2g}", *(f"{value:.4g}" for value in others), off]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plots(phantoms: Sequence[Look], real: Sequence[Look]) -> dict[str, Curves]:
    depths = [(low + high) / 2 for low, high in zip((0.0, *DEPTHS_MM[:-1]), DEPTHS_MM, strict=True)]
    mean_of: Callable[[str], np.ndarray] = lambda name: np.mean([getattr(look, name) for look in phantoms], axis=0)  # noqa: E731
    shown = {"phantoms, mean": mean_of("vessels"), **{look.name: look.vessels for look in real}}
    histogram = {"phantoms, mean": mean_of("histogram"), **{look.name: look.histogram for look in real}}
    return {
        "vessels": Curves("vessels", "Share of the lung above -600 HU by depth", depths, shown, "mm from the pleura"),
        "histogram": Curves("histogram", "HU inside the body", list(_HISTOGRAM), histogram, "HU"),
    }


def _write(folder: Path, text: str, phantoms: Sequence[Look], real: Sequence[Look]) -> None:
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "realism.md").write_text(text, encoding="utf-8")
        with (folder / "realism.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["scan", *phantoms[0].numbers])
            writer.writerows([look.name, *look.numbers.values()] for look in (*phantoms, *real))
        for name, curves in _plots(phantoms, real).items():
            curves.picture.image.save(folder / f"{name}.png")


def phantom_scan(seed: int) -> Volume:
    """A training phantom with slices like the real scans'."""
    from training.phantom.acquisition import Regime, Scan
    from training.phantom.render import make_patient, render

    scan = Scan.sample(np.random.default_rng([seed, 40]), Regime.PHYSICS)
    scan = replace(
        scan,
        spacing=(0.9, 0.9, 2.5),
        interval=2.5,
        thickness=2.5,
        coverage=(0.0, 1.0),
        field_margin=float("inf"),
    )
    return render(make_patient(seed), scan, seed).ct


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Phantom and real CT, measured alike.")
    parser.add_argument("--phantoms", type=int, default=6, help="how many")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("output/realism"))
    options = parser.parse_args(arguments)
    if options.phantoms < 1:
        parser.error("--phantoms must be 1 or more")
    with command() as log:
        phantoms, real = [], []
        for name in REAL:
            path = options.data / "ct" / f"{name}_ct.nii.gz"
            if not path.is_file():
                log(f"left out: {path.name} is not in the data folder")
                continue
            real.append(look_at(name, read_canonical(path)))
            log(name)
        for seed in range(options.first_seed, options.first_seed + options.phantoms):
            try:
                phantoms.append(look_at(str(seed), phantom_scan(seed)))
                log(f"phantom {seed}")
            except UnsuitableImage as error:
                log(f"left out: phantom {seed}: {error}")
        if not phantoms:
            raise LCTfoundError("No phantom could be measured; take another --first-seed.")
        text = table(phantoms, real)
        _write(options.out, text, phantoms, real)
        print(text)
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
