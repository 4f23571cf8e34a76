"""Noise reduction of low-dose CT, measured: images, noise and lesions on frozen slices of patients never trained on.

    python -m training.evaluate.low_dose --out output/low_dose --weights Resources/Weights

Scans are simulated from real CT slices (parallel beam; photon and electronic noise) and reconstructed by filtered
back-projection with a stated kernel. The reference is the same reconstruction without noise: what the best of all
denoisers would show, kernel blur included. Beside PSNR, SSIM, VIF and RMSE stand what smoothing cannot hide from: the
noise power spectrum of what differs from the reference, and the contrast that lesions keep which were inserted before
the scan. A Gaussian blur is the yardstick; of its widths the best one for each slice is taken, told by the reference.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from LCTfoundLib.demo import cache_folder, fetch_case
from LCTfoundLib.export.slices import draw_text
from LCTfoundLib.networks.low_dose import LOW_DOSE_WEIGHT, load_low_dose
from LCTfoundLib.physics.image_quality import (
    STANDARD_LESIONS,
    Lesion,
    LesionShape,
    NoisePowerSpectrum,
    contrast_recovery,
    insert_lesion,
    lesion_places,
    noise_power_spectrum,
)
from LCTfoundLib.physics.noise import SHARP, SOFT, Dose, Kernel, measure
from LCTfoundLib.runtime.files import output_errors
from LCTfoundLib.tasks.low_dose import KEPT_MM, LowDoseRequest, LowDoseTier, load_cold, reduce_noise
from LCTfoundLib.volume import Volume
from training.evaluate.cases import DEFAULT_DATA, read_canonical
from training.evaluate.command import command
from training.evaluate.image_metrics import METRICS, psnr, rmse, ssim, vif
from training.evaluate.reconstruction_slices import ReconstructionSlice, SliceChoice, at_size, read_slices
from training.evaluate.statistics import bootstrap, compare_paired
from training.low_dose import AIR, LowDoseScanner

__all__ = [
    "Denoiser",
    "LesionRow",
    "LowDoseScans",
    "Scan",
    "SliceRow",
    "evaluate",
    "main",
    "scan_of",
    "volume_of",
    "with_neighbors",
    "write_report",
]

#: Images (3, S, S) HU, pixel edge, spacing of slices to the middle image (S, S) HU.
Denoiser = Callable[[np.ndarray, float, float], np.ndarray]

_KERNELS = {"soft": SOFT, "sharp": SHARP}
_MEASURES = {"psnr": psnr, "ssim": ssim, "rmse": rmse, "vif": vif}
_WIDTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
#: Lesions of a kind in a slice, and pixels of the regions of the noise power spectrum.
_LESIONS, _REGION = 2, 16
_INPUT, _NET, _BLUR = "low dose", "low-dose net", "Gaussian blur"
#: Where slices have no neighbors in the data, their thickness, mm (of no effect on a disk).
_NO_SPACING = 2.5
_NOTES = """\
- Slices of real CT of patients that no weight was trained on; scans are **simulated**. Not measured on a scanner.
- The reference is the noise-free reconstruction with the same kernel. Metrics in HU inside the body, range 2,000 HU.
- Noise: standard deviation of what differs from the reference inside the body, and mean frequency of its power as a
  share of what the input has: below 1 it is coarser, which looks like blotches.
- Lesions are synthetic, inserted before the scan: spheres where a slice has neighbors, disks where it has none. What is
  found of their contrast is told by the difference of two scans with the same noise; "kept" is its share of what the
  input shows, whose kernel blurs small lesions already.
- The Gaussian blur's width is the best one for each slice, chosen with the reference in sight: better than it could do.
"""


# -- scans -----------------------------------------------------------------------------------------------------------


@dataclass
class Scan:
    """A slice at a low dose.

    Attributes:
        piece: the slice.
        triple: HU that were scanned, float32 (3, S, S): the slice between its neighbors, or three times itself.
        spacing_mm: between them; 0 without neighbors.
        clean, measured: line integrals (3, views, channels) without and with noise.
        reference: noise-free HU of the middle, (S, S).
        noisy: HU (3, S, S); without neighbors the same three times, noise and all.
    """

    piece: ReconstructionSlice
    triple: np.ndarray
    spacing_mm: float
    clean: Tensor
    measured: Tensor
    reference: np.ndarray
    noisy: np.ndarray


class LowDoseScans:
    """What scans and reconstructs all slices of a table.

    Args:
        size: pixels of a side.
        views: over a half turn.
        dose: of the scans.
        kernel: of the images.
        seed: of the noise and of the lesions' places.
    """

    def __init__(self, size: int, views: int, dose: Dose, kernel: Kernel, seed: int = 0) -> None:
        self.scanner, self.dose, self.kernel, self.seed = LowDoseScanner(size, views), dose, kernel, seed

    def images(self, rays: Tensor, pixel_mm: float) -> np.ndarray:
        """HU, cut at -1024 as scanners do."""
        found = self.scanner.images(rays, [self.kernel] * len(rays), pixel_mm).clamp(min=AIR)
        return 1000 * (found.numpy() - 1)

    def rays(self, hu: np.ndarray, pixel_mm: float) -> Tensor:
        return self.scanner.rays(torch.from_numpy(hu / 1000 + 1).float(), pixel_mm)

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{name} {self.seed}".encode()))


def scan_of(scans: LowDoseScans, piece: ReconstructionSlice, triple: np.ndarray, spacing_mm: float) -> Scan:
    """Scan a slice; each neighbor's noise is its own, and the same at every call."""
    clean = scans.rays(triple, piece.pixel_mm)
    measured = measure(clean, scans.dose, scans.generator(piece.name))
    if not spacing_mm:
        measured = measured[1:2].expand(3, -1, -1)
    reference = scans.images(clean[1:2], piece.pixel_mm)[0]
    return Scan(piece, triple, spacing_mm, clean, measured, reference, scans.images(measured, piece.pixel_mm))


def with_neighbors(piece: ReconstructionSlice, size: int, data: Path) -> tuple[np.ndarray, float]:
    """The slice between the ones below and above it, (3, S, S), and their distance; if alone three times itself, 0."""
    found = re.fullmatch(r"(.+) level (\d+)", piece.name)
    alone = np.repeat(piece.hu[None], 3, axis=0)
    if found is None:
        return alone, 0.0
    ct = _volume(found[1], data)
    level = int(found[2])
    if not 0 < level < len(ct.array) - 1:
        return alone, 0.0
    planes = [at_size(np.asarray(ct.array[k]), piece.pixel_mm, size)[0] for k in (level - 1, level, level + 1)]
    return np.stack(planes), float(ct.spacing[2])


@lru_cache(maxsize=1)
def _volume(name: str, data: Path) -> Volume:
    path = data / "ct" / f"{name}_ct.nii.gz"
    return read_canonical(path if path.is_file() else fetch_case(cache_folder()).ct)


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceRow:
    """One slice by one method.

    Attributes:
        scores: of ``_MEASURES``.
        noise_hu, mean_frequency: deviation of what differs from the reference, and its mean frequency (1/mm).
        frequency, spectrum: radial power of it, HU^2 mm^2, at frequencies in 1/mm.
        seconds: taken.
    """

    slice: str
    patient: str
    method: str
    scores: Mapping[str, float]
    noise_hu: float
    mean_frequency: float
    frequency: tuple[float, ...] = field(repr=False)
    spectrum: tuple[float, ...] = field(repr=False)
    seconds: float = 0.0


@dataclass(frozen=True)
class LesionRow:
    """Lesions of one kind in one slice by one method: the share of the inserted contrast that is found."""

    slice: str
    method: str
    lesion: Lesion
    number: int
    recovery: float


def evaluate(
    scans: LowDoseScans,
    pieces: Sequence[tuple[ReconstructionSlice, np.ndarray, float]],
    denoise: Denoiser,
    lesions: Sequence[Lesion] = STANDARD_LESIONS,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[SliceRow], list[LesionRow], list[tuple[Scan, dict[str, np.ndarray]]]]:
    """All slices by the input itself, the net and the blur.

    Args:
        scans: of one size.
        pieces: slices, each with its triple and the distance of the neighbors (``with_neighbors``).
        denoise: the method in question.
        lesions: inserted.
        log: told after each slice.

    Returns:
        Rows of slices and of lesions, and each scan with the methods' images.
    """
    rows: list[SliceRow] = []
    found: list[LesionRow] = []
    shown = []
    for piece, triple, spacing in pieces:
        scan = scan_of(scans, piece, triple, spacing)
        width = min(_WIDTHS, key=lambda sigma: rmse(scan.reference, _blurred(scan.noisy[1], sigma), piece.body))
        methods: dict[str, Denoiser] = {
            _INPUT: lambda images, pixel, gap: images[1],
            _NET: denoise,
            _BLUR: lambda images, pixel, gap, width=width: _blurred(images[1], width),
        }
        images = {}
        for name, method in methods.items():
            begin = time.perf_counter()
            images[name] = method(scan.noisy, piece.pixel_mm, spacing or _NO_SPACING)
            rows.append(_row(scan, name, images[name], time.perf_counter() - begin))
        for lesion in lesions:
            found += _lesions(scans, scan, lesion, methods, images)
        shown.append((scan, images))
        told = ", ".join(f"{row.method} {row.scores['psnr']:.1f} dB" for row in rows[-len(methods) :])
        log(f"{piece.name}: {told}")
    return rows, found, shown


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, sigma)


def _row(scan: Scan, method: str, image: np.ndarray, seconds: float) -> SliceRow:
    piece = scan.piece
    scores = {key: measured(scan.reference, image, piece.body) for key, measured in _MEASURES.items()}
    spectrum = _spectrum(scan, image)
    return SliceRow(
        piece.name,
        piece.patient,
        method,
        scores,
        float(np.std((image - scan.reference)[piece.body])),
        spectrum.mean_frequency,
        tuple(map(float, spectrum.radial_frequency)),
        tuple(map(float, spectrum.radial_power)),
        seconds,
    )


def _spectrum(scan: Scan, image: np.ndarray) -> NoisePowerSpectrum:
    """Of what differs from the reference, in squares that lie in the body."""
    difference = torch.from_numpy(np.ascontiguousarray(image - scan.reference, np.float32))
    return noise_power_spectrum(difference, scan.piece.pixel_mm, _REGION, torch.from_numpy(scan.piece.body))


def _lesions(
    scans: LowDoseScans, scan: Scan, lesion: Lesion, methods: Mapping[str, Denoiser], without: Mapping[str, np.ndarray]
) -> list[LesionRow]:
    """The same scan with lesions of one kind, by every method."""
    pixel, triple = scan.piece.pixel_mm, torch.from_numpy(scan.triple)
    inserted = replace(lesion, shape=LesionShape.SPHERE if scan.spacing_mm else LesionShape.DISK)
    spacing = (scan.spacing_mm or _NO_SPACING, pixel, pixel)
    generator = scans.generator(f"{scan.piece.name} {lesion}")
    reference = torch.from_numpy(scan.reference)[None]
    places = lesion_places(reference, spacing, replace(lesion, shape=LesionShape.DISK), _LESIONS, generator)
    if not places:
        return []
    spoiled = triple
    for _, row, column in places:
        spoiled, _ = insert_lesion(spoiled, spacing, inserted, (1, row, column))
    # The same noise in both: photons drawn anew would hide the lesion's few HU.
    added_rays = scans.rays(spoiled.numpy(), pixel) - scan.clean
    noisy = scans.images(scan.measured + added_rays, pixel)
    added = (spoiled - triple)[1]
    rows = []
    for name, method in methods.items():
        image = method(noisy, pixel, scan.spacing_mm or _NO_SPACING)
        recovery = contrast_recovery(torch.from_numpy(image), torch.from_numpy(without[name]), added)
        rows.append(LesionRow(scan.piece.name, name, lesion, len(places), recovery))
    return rows


# -- report ----------------------------------------------------------------------------------------------------------


def _text(
    rows: Sequence[SliceRow], lesions: Sequence[LesionRow], told: Mapping[str, Any], missing: Sequence[str]
) -> str:
    slices, patients = {row.slice for row in rows}, {row.patient for row in rows}
    settings = "; ".join(f"{key} {value}" for key, value in told.items())
    parts = ["# Low dose\n", _NOTES, f"Settings: {settings}\n"]
    parts += [f"## Images: {len(slices)} slices of {len(patients)} patients, mean ± standard deviation\n"]
    parts += [_markdown(_image_table(rows))]
    parts += [f"PSNR gained: {_gain(rows)}\n", "## Contrast of inserted lesions: found, and kept of the input's\n"]
    parts += [_markdown(_lesion_table(lesions)), *(f"Left out: {reason}\n" for reason in missing)]
    return "\n".join(parts)


def _image_table(rows: Sequence[SliceRow]) -> list[list[str]]:
    head = ["method", *(METRICS[key].name for key in _MEASURES), "noise (HU)", "mean frequency, of the input's", "s"]
    table = [head]
    first = {row.slice: row.mean_frequency for row in rows if row.method == _INPUT}
    for name in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == name]
        cells = []
        for key in _MEASURES:
            values, digits = [row.scores[key] for row in mine], METRICS[key].digits
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}")
        cells.append(f"{np.mean([row.noise_hu for row in mine]):.1f}")
        cells.append(f"{np.mean([row.mean_frequency / first[row.slice] for row in mine]):.2f}")
        table.append([name, *cells, f"{np.median([row.seconds for row in mine]):.2f}"])
    return table


def _gain(rows: Sequence[SliceRow]) -> str:
    """Of the net over the input and over the blur, by patients."""
    told = []
    for other in (_INPUT, _BLUR):
        mean = {
            name: [
                float(np.mean([row.scores["psnr"] for row in rows if (row.method, row.patient) == (name, patient)]))
                for patient in dict.fromkeys(row.patient for row in rows)
            ]
            for name in (other, _NET)
        }
        interval = bootstrap([b - a for a, b in zip(mean[other], mean[_NET], strict=True)])
        p = compare_paired(mean[other], mean[_NET]).p_value
        told.append(
            f"{interval.mean:+.2f} dB over the {other} [{interval.low:+.2f}, {interval.high:+.2f}] "
            f"(bootstrap over {interval.cases} patients; Wilcoxon p {p:.2g})"
        )
    return "; ".join(told)


def _lesion_table(rows: Sequence[LesionRow]) -> list[list[str]]:
    table = [["lesion", "lesions", *(f"{name}: found" for name in (_INPUT, _NET, _BLUR)), "net: kept", "blur: kept"]]
    for lesion in dict.fromkeys(row.lesion for row in rows):
        mine = {name: [r for r in rows if (r.lesion, r.method) == (lesion, name)] for name in (_INPUT, _NET, _BLUR)}
        found = {
            name: float(np.average([r.recovery for r in some], weights=[r.number for r in some]))
            for name, some in mine.items()
        }
        kept = [f"{100 * found[name] / found[_INPUT]:.0f} %" for name in (_NET, _BLUR)]
        name = f"{lesion.kind.value}, {lesion.diameter_mm:g} mm, {lesion.contrast_hu:+g} HU"
        table.append([name, str(sum(r.number for r in mine[_NET])), *(f"{v:.2f}" for v in found.values()), *kept])
    return table


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def write_report(
    folder: Path,
    rows: Sequence[SliceRow],
    lesions: Sequence[LesionRow],
    shown: Sequence[tuple[Scan, Mapping[str, np.ndarray]]],
    told: Mapping[str, Any],
    missing: Sequence[str] = (),
) -> str:
    """Write ``results.md``, ``results.json``, ``slices.csv``, ``lesions.csv`` and ``sheet.png``; return the first.

    Raises:
        OutputError: the folder cannot be written.
    """
    text = _text(rows, lesions, told, missing)
    slices = [
        {"slice": r.slice, "patient": r.patient, "method": r.method, **r.scores, "noise_hu": r.noise_hu,
         "mean_frequency": r.mean_frequency, "seconds": r.seconds}
        for r in rows
    ]  # fmt: skip
    contrast = [
        {"slice": r.slice, "method": r.method, "kind": r.lesion.kind.value, "diameter_mm": r.lesion.diameter_mm,
         "contrast_hu": r.lesion.contrast_hu, "lesions": r.number, "recovery": r.recovery}
        for r in lesions
    ]  # fmt: skip
    spectra = [{"slice": r.slice, "method": r.method, "frequency": r.frequency, "power": r.spectrum} for r in rows]
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.md").write_text(text, encoding="utf-8")
        content = {
            "settings": dict(told),
            "missing": list(missing),
            "slices": slices,
            "lesions": contrast,
            "spectra": spectra,
        }
        (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for name, table in (("slices.csv", slices), ("lesions.csv", contrast)):
            with (folder / name).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(table[0]) if table else [])
                writer.writeheader()
                writer.writerows(table)
        _sheet(shown, rows).save(folder / "sheet.png")
    return text


_TILE = 288
_WINDOW, _DIFFERENCE_HU = (-160.0, 240.0), 100.0
_COLORS = {_INPUT: (200, 60, 50), _NET: (30, 90, 190), _BLUR: (110, 110, 110)}


def _sheet(shown: Sequence[tuple[Scan, Mapping[str, np.ndarray]]], rows: Sequence[SliceRow]) -> Image.Image:
    """Two rows a slice: reference and methods in a soft tissue window; noise spectra and what differs."""
    sheet = Image.new("RGB", (4 * _TILE, 2 * _TILE * len(shown)), (255, 255, 255))
    for number, (scan, images) in enumerate(shown):
        top, mine = 2 * _TILE * number, {r.method: r for r in rows if r.slice == scan.piece.name}
        sheet.paste(_gray(scan.reference, *_WINDOW), (0, top))
        draw_text(sheet, (6, top + 6), f"no noise: {scan.piece.name}", 14, "lt")
        _plot(sheet, (0, top + _TILE), mine)
        for column, (name, image) in enumerate(images.items(), start=1):
            left, row = column * _TILE, mine[name]
            sheet.paste(_gray(image, *_WINDOW), (left, top))
            sheet.paste(_gray(image - scan.reference, -_DIFFERENCE_HU, _DIFFERENCE_HU), (left, top + _TILE))
            draw_text(sheet, (left + 6, top + 6), name, 14, "lt")
            score = f"{row.scores['psnr']:.1f} dB, SSIM {row.scores['ssim']:.3f}, noise {row.noise_hu:.0f} HU"
            draw_text(sheet, (left + 6, top + _TILE - 6), score, 14, "lb")
            draw_text(sheet, (left + 6, top + _TILE + 6), f"difference ±{_DIFFERENCE_HU:g} HU", 14, "lt")
    return sheet


def _gray(hu: np.ndarray, low: float, high: float) -> Image.Image:
    picture = Image.fromarray(np.rint(255 * ((hu - low) / (high - low)).clip(0, 1)).astype(np.uint8))
    return picture.resize((_TILE, _TILE), Image.Resampling.BICUBIC)


def _plot(sheet: Image.Image, corner: tuple[int, int], rows: Mapping[str, SliceRow]) -> None:
    """Radial noise power on a logarithmic axis of four decades."""
    draw, pad = ImageDraw.Draw(sheet), 34
    left, top, side = corner[0] + pad, corner[1] + pad, _TILE - 2 * pad
    peak = np.log10(max(max(row.spectrum) for row in rows.values()))
    draw.rectangle((left, top, left + side, top + side), outline=(150, 150, 150))
    for number, (name, row) in enumerate(rows.items()):
        x = left + side * np.array(row.frequency) / row.frequency[-1]
        height = (peak - np.log10(np.maximum(row.spectrum, 10 ** (peak - 4)))) / 4
        draw.line(list(zip(x, top + side * height, strict=True))[1:], fill=_COLORS[name], width=2)
        draw_text(sheet, (left + side - 6, top + 6 + 17 * number), name, 13, "rt", _COLORS[name], (255, 255, 255))
    black, white = (0, 0, 0), (255, 255, 255)
    draw_text(sheet, (left, top - 6), f"noise power, 4 decades to {10**peak:.1g} HU^2 mm^2", 11, "lb", black, white)
    last = next(iter(rows.values())).frequency[-1]
    draw_text(sheet, (left + side, top + side + 6), f"0 to {last:.2f} per mm", 12, "rt", black, white)


# -- the command -----------------------------------------------------------------------------------------------------


def volume_of(images: np.ndarray, pixel_mm: float, gap_mm: float) -> Volume:
    """Three slices as the task takes them."""
    return Volume(images.astype(np.float32), (pixel_mm, pixel_mm, gap_mm or _NO_SPACING))


def denoiser(
    weights: Path | None, strength: float, device: str, tier: LowDoseTier = LowDoseTier.FAST, kept_mm: float = KEPT_MM
) -> Denoiser:
    """The task itself, on three slices at a time, with the noise told by them."""
    fast, best = cache(lambda folder: load_low_dose(LOW_DOSE_WEIGHT, folder)), cache(load_cold)

    def denoise(images: np.ndarray, pixel_mm: float, gap_mm: float) -> np.ndarray:
        request = LowDoseRequest(tier, strength, kept_mm, device=device, weights_folder=weights)
        result = reduce_noise(volume_of(images, pixel_mm, gap_mm), request, load_net=fast, load_best=best)
        return result.ct.array[1].astype(np.float32)

    return denoise


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Noise reduction of low-dose CT, measured on real slices.")
    parser.add_argument("--dose", type=float, default=0.05, help="share of the photons")
    parser.add_argument("--photons", type=float, default=1e5, help="of a ray in air at the full dose")
    parser.add_argument("--electronic-noise", type=float, default=10.0, help="standard deviation, in photons")
    parser.add_argument("--views", type=int, default=360, help="over a half turn")
    parser.add_argument("--kernel", choices=_KERNELS, default="soft")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--kept-mm", type=float, default=KEPT_MM, help="what is coarser is left as it was")
    parser.add_argument("--tier", type=LowDoseTier, choices=list(LowDoseTier), default=LowDoseTier.FAST)
    choices = [choice for choice in SliceChoice if choice is not SliceChoice.TUNING]
    parser.add_argument("--slices", type=SliceChoice, choices=choices, default=SliceChoice.TEST)
    parser.add_argument("--first", type=int, help="only so many slices, evenly chosen")
    parser.add_argument("--weights", type=Path, help="folder of the weight; the usual places by default")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("output/low_dose"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    options = parser.parse_args(arguments)
    if not (0 < options.dose <= 1 and options.photons > 0 and options.views > 0 and options.size >= 41):
        parser.error("--dose must be above 0 and at most 1, --photons and --views above 0, --size 41 at least")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with command() as log:
        found, missing = read_slices(options.slices, options.size, options.data)
        if options.first:
            found = [
                found[n] for n in np.linspace(0, len(found) - 1, min(options.first, len(found))).round().astype(int)
            ]
        pieces = [(piece, *with_neighbors(piece, options.size, options.data)) for piece in found]
        dose = Dose(options.photons, options.dose, options.electronic_noise)
        scans = LowDoseScans(options.size, options.views, dose, _KERNELS[options.kernel], options.seed)
        denoise = denoiser(options.weights, options.strength, options.device, options.tier, options.kept_mm)
        rows, lesions, shown = evaluate(scans, pieces, denoise, log=log)
        told = {
            "dose": f"{100 * options.dose:g} % of {options.photons:g} photons a ray",
            "electronic noise": options.electronic_noise,
            "views": options.views,
            "kernel": f"{options.kernel} ({scans.kernel.ramp.value}, cutoff {scans.kernel.cutoff:g})",
            "geometry": "parallel beam, channels as wide as pixels",
            "size": options.size,
            "tier": options.tier.value,
            "strength": options.strength,
            "kept from": f"{options.kept_mm:g} mm",
            "slices": f"{options.slices.value}, {sum(gap > 0 for *_, gap in pieces)} of {len(pieces)} with neighbors",
            "seed": options.seed,
        }
        spread = np.linspace(0, len(shown) - 1, min(4, len(shown))).round().astype(int)
        print(write_report(options.out, rows, lesions, [shown[n] for n in spread], told, missing))
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
