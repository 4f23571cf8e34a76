"""What few views do to a later task: the lungs segmented in reconstructions, against the full CT's segmentation.

    python -m training.evaluate.reconstruction_segmentation --cases LIDC-IDRI-0001,LUNG1-001 --views 32 \\
        --out output/reconstruction_segmentation

A CT is scanned slice by slice with a few parallel views (simulated, without noise), reconstructed, and segmented by the
engine. What the same nets find in the CT itself stands for the truth: the Dice say what the missing views cost, not how
right the segmentation is. A reconstruction that the engine refuses counts as one in which it found nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import LCTfoundLib
from LCTfoundLib.anatomy.structures import SEGMENTS, Lobe, Tree, lobes_from_segments
from LCTfoundLib.demo import cache_folder, fetch_case
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.export.slices import draw_text
from LCTfoundLib.physics.geometry import ImageGrid
from LCTfoundLib.physics.projection_files import Projections
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import RampFilter, filtered_back_projection
from LCTfoundLib.runtime.files import output_errors
from LCTfoundLib.tasks.sparse_view import SparseViewRequest, Tier, reconstruct_sparse_view, scan_of_volume
from LCTfoundLib.volume import Volume
from training.evaluate.cases import DEFAULT_DATA, read_canonical
from training.evaluate.command import Log, command
from training.evaluate.lung_segmentation import Predictor, net_predictor
from training.evaluate.metrics import dice
from training.evaluate.scoring import Prediction

__all__ = ["CASES", "METHODS", "CaseResult", "compare_segmentations", "main", "segment_dice"]

#: HU (N, rows, columns) of a scan.
Reconstruct = Callable[[Projections, ImageGrid], np.ndarray]

CASES = ("LIDC-IDRI-0001", "LUNG1-001")
METHODS = ("fbp", "preview", "fast")
#: Titles of the columns, the reference's first.
_TITLES = {"full": "all views", "fbp": "FBP", "preview": "TV (preview)", "fast": "LCTfound fast"}
_SEGMENTS, _LOBES, _LUNGS = "Segments, mean", "Lobes, mean", "Lungs"
#: Slices back-projected at a time.
_SLICES = 4
#: HU shown black and white.
_WINDOW = (-1300.0, 300.0)
_WIDTH = 320
_TINT = 0.45
_SEGMENT_COLORS = np.array([(0, 0, 0), *(segment.color for segment in SEGMENTS)], np.float32)
_TREE_COLORS = np.array([(0, 0, 0), (120, 220, 255), (40, 120, 235), (235, 60, 60)], np.float32)


@dataclass(frozen=True)
class CaseResult:
    """One CT.

    Attributes:
        name: of the CT.
        views: of the scan.
        size: pixels of a side.
        dice: method -> structure -> Dice against the full CT's segmentation; ``nan`` where both lack the structure.
        seconds: method -> of the reconstruction.
        refused: method -> why the engine did not segment it.
    """

    name: str
    views: int
    size: int
    dice: dict[str, dict[str, float]]
    seconds: dict[str, float]
    refused: dict[str, str]


def compare_segmentations(
    name: str,
    ct: Volume,
    methods: Mapping[str, Reconstruct],
    segment: Predictor,
    views: int,
    size: int | None = None,
    log: Log = lambda line: None,
) -> tuple[CaseResult, Image.Image]:
    """Scan, reconstruct, segment and compare.

    Args:
        name: of the CT.
        ct: canonical, with square pixels.
        methods: to reconstruct with.
        segment: finds segments and trees.
        views: over a half turn.
        size: pixels of a side, a whole part of the CT's; None keeps it.
        log: told of each step.

    Returns:
        The result, and a picture of a slice and a coronal plane by every method.

    Raises:
        UnsuitableImage: pixels are not square, or the size does not divide.
        LCTfoundError: the full CT cannot be segmented.
    """
    scan, grid, full = scan_of_volume(ct, views, None, size)
    spacing = (grid.pixel_mm, grid.pixel_mm, ct.spacing[2])
    images, found = {"full": full}, {"full": segment(Volume(full, spacing))}
    log(f"{name}: segmented with all views")
    result = CaseResult(name, views, grid.rows, {}, {}, {})
    for method, reconstruct in methods.items():
        begin = time.monotonic()
        images[method] = reconstruct(scan, grid)
        result.seconds[method] = round(time.monotonic() - begin, 1)
        try:
            found[method] = segment(Volume(images[method], spacing))
        except LCTfoundError as error:
            result.refused[method] = str(error)
            nothing = np.zeros(full.shape, np.uint8)
            found[method] = Prediction(nothing, nothing)
        scores = result.dice[method] = segment_dice(found["full"], found[method])
        log(
            f"{name} {method}: {result.seconds[method]:.0f} s, Dice of the lungs {scores[_LUNGS]:.3f}, of the segments "
            f"{scores[_SEGMENTS]:.3f}"
        )
    return result, _picture(images, found, spacing)


def segment_dice(reference: Prediction, found: Prediction) -> dict[str, float]:
    """Dice of the lungs, the 5 lobes, the 18 segments, each with their mean, and the 3 trees."""
    scores = {_LUNGS: dice(reference.segments > 0, found.segments > 0)}
    both = [lobes_from_segments(one.segments) for one in (reference, found)]
    lobes = {lobe.label: dice(both[0] == lobe, both[1] == lobe) for lobe in Lobe}
    scores |= {_LOBES: _mean(lobes), **lobes}
    segments = {s.short: dice(reference.segments == s.code, found.segments == s.code) for s in SEGMENTS}
    scores[_SEGMENTS] = _mean(segments)
    trees = {tree.name.capitalize(): dice(reference.trees == tree, found.trees == tree) for tree in Tree}
    return scores | trees | segments


def _mean(scores: Mapping[str, float]) -> float:
    """Of what at least one of the two has."""
    known = [value for value in scores.values() if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


# -- reconstruction --------------------------------------------------------------------------------------------------


def reconstructors(names: Sequence[str], weights: Path | None, device: str) -> dict[str, Reconstruct]:
    """By name.

    Raises:
        LCTfoundError: one is not known.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise LCTfoundError(f"There is no method {', '.join(unknown)}; choose among {', '.join(METHODS)}.")
    return {name: _fbp if name == "fbp" else _tier(Tier(name), weights, device) for name in names}


def _fbp(scan: Projections, grid: ImageGrid) -> np.ndarray:
    """With a Hann window: without one the streaks of few views drown the lungs."""
    projector = Projector(grid, scan.beam)
    with torch.inference_mode():
        parts = [
            filtered_back_projection(projector, rays / scan.water_per_mm, RampFilter.HANN)
            for rays in scan.sinogram.split(_SLICES)
        ]
    return ((torch.cat(parts) - 1.0) * 1000.0).numpy()


def _tier(tier: Tier, weights: Path | None, device: str) -> Reconstruct:
    request = SparseViewRequest(tier, device=device, weights_folder=weights)
    return lambda scan, grid: reconstruct_sparse_view(scan, grid, request).hu


# -- report ----------------------------------------------------------------------------------------------------------


def table(result: CaseResult) -> str:
    """Markdown: a row for each structure, a column for each method."""
    methods = list(result.dice)
    lines = [
        f"## {result.name}: {result.views} views, {result.size} x {result.size} pixels\n",
        "| Dice | " + " | ".join(_TITLES.get(method, method) for method in methods) + " |",
        "|---|" + "---|" * len(methods),
    ]
    for structure in result.dice[methods[0]]:
        cells = [result.dice[method][structure] for method in methods]
        lines.append(f"| {structure} | " + " | ".join("-" if np.isnan(v) else f"{v:.3f}" for v in cells) + " |")
    lines.append("| s to reconstruct | " + " | ".join(f"{result.seconds[method]:.0f}" for method in methods) + " |")
    lines += [f"\n{_TITLES.get(method, method)} was not segmented: {why}" for method, why in result.refused.items()]
    return "\n".join(lines) + "\n"


def _picture(
    images: Mapping[str, np.ndarray], found: Mapping[str, Prediction], spacing: tuple[float, float, float]
) -> Image.Image:
    """A column for each method: the slice, and the coronal plane, in which the reference has the most lung."""
    lungs = found["full"].segments > 0
    level, row = (int(lungs.sum(axis=axes).argmax()) for axes in ((1, 2), (0, 2)))
    tiles = []
    for method, hu in images.items():
        one = found[method]
        axial = _tile(hu[level], one.segments[level], one.trees[level], 1.0)
        coronal = _tile(*(array[::-1, row] for array in (hu, one.segments, one.trees)), aspect=spacing[2] / spacing[0])
        column = Image.new("RGB", (_WIDTH, axial.height + coronal.height))
        column.paste(axial, (0, 0))
        column.paste(coronal, (0, axial.height))
        draw_text(column, (8, 8), _TITLES.get(method, method), 20, "lt")
        tiles.append(column)
    sheet = Image.new("RGB", (_WIDTH * len(tiles), tiles[0].height))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number * _WIDTH, 0))
    return sheet


def _tile(hu: np.ndarray, segments: np.ndarray, trees: np.ndarray, aspect: float) -> Image.Image:
    low, high = _WINDOW
    color = np.repeat(255 * ((hu - low) / (high - low)).clip(0, 1)[..., None], 3, axis=-1)
    color[segments > 0] += _TINT * (_SEGMENT_COLORS[segments[segments > 0]] - color[segments > 0])
    color[trees > 0] = _TREE_COLORS[trees[trees > 0]]
    height = max(round(_WIDTH * aspect * len(hu) / hu.shape[1]), 1)
    return Image.fromarray(color.astype(np.uint8)).resize((_WIDTH, height), Image.Resampling.BILINEAR)


# -- the command -----------------------------------------------------------------------------------------------------


def read_case(name: str, data: Path) -> Volume:
    """A CT by its name.

    Raises:
        LCTfoundError: it is not there.
    """
    if name == CASES[0]:
        return read_canonical(fetch_case(cache_folder()).ct)
    path = data / "ct" / f"{name}_ct.nii.gz"
    if not path.is_file():
        raise LCTfoundError(f"{path.name} is not in the data folder; name the folder with --data.")
    return read_canonical(path)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Lung segmentation in reconstructions from few views.")
    parser.add_argument("--cases", default=",".join(CASES), help="names of CTs")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--size", type=int, help="pixels of a side, a whole part of the CT's; its own by default")
    parser.add_argument("--weights", type=Path, help="other folder of the weights, of reconstruction and segmentation")
    parser.add_argument("--quality", default="standard", choices=["fast", "standard", "full"], help="of segmentation")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("output/reconstruction_segmentation"))
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, log: Log) -> str:
    methods = reconstructors(options.methods.split(","), options.weights, options.device)
    segment = net_predictor(options.weights, options.quality, options.device)
    results = []
    for name in options.cases.split(","):
        ct = read_case(name, options.data)
        result, picture = compare_segmentations(name, ct, methods, segment, options.views, options.size, log)
        results.append(result)
        _write(options, results)
        picture.save(options.out / f"{name}.png")
    return _text(results)


def _text(results: Sequence[CaseResult]) -> str:
    return (
        "# Lung segmentation in reconstructions from few views\n\nSimulated parallel beams without noise. Dice against "
        "what the same nets find in the CT itself: what the missing views cost, not how right it is.\n\n"
    ) + "\n".join(map(table, results))


def _write(options: argparse.Namespace, results: Sequence[CaseResult]) -> None:
    told = {
        "version": LCTfoundLib.__version__,
        "quality": options.quality,
        "device": options.device,
        "weights": str(options.weights) if options.weights else "shipped",
        "cases": [_finite(asdict(result)) for result in results],
    }
    with output_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.md").write_text(_text(results), encoding="utf-8")
        (options.out / "results.json").write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    """JSON knows no nan: what has no value is null."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with command() as log:
        print(_run(options, log))
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
