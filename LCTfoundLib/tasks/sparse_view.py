"""Reconstruction from few views: line integrals in, a CT out, with how sure it is.

Three tiers. *Preview*: total variation, no network. *Fast*: the unrolled net, which also tells the error it expects.
*Best*: draws of the backbone's posterior begun at the fast result; the mean of them and it, made to agree with the
measurements under little total variation, and what the draws disagree about.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import LCTfoundLib
from LCTfoundLib.errors import LCTfoundError, UnsuitableImage
from LCTfoundLib.networks.foundation import FoundationModel, load_foundation
from LCTfoundLib.networks.posterior import PosteriorSettings, sample_posterior
from LCTfoundLib.networks.unrolled import UnrolledInput, UnrolledNet, load_unrolled
from LCTfoundLib.physics.geometry import Beam, ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM, attenuation_of
from LCTfoundLib.physics.noise import Dose, measure
from LCTfoundLib.physics.projection_files import Projections
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import relative_residual
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.tasks.slice_predictor import SlicePredictor
from LCTfoundLib.volume import Volume
from LCTfoundLib.weights.registry import Card

__all__ = [
    "FEW_VIEWS",
    "SparseViewRequest",
    "SparseViewResult",
    "Tier",
    "reconstruct_sparse_view",
    "scan_of_volume",
]

#: At and below this number of views a warning says that detail may be made up.
FEW_VIEWS = 16
#: Of the interval in which the true value lies with this chance: Laplace and normal distributions.
_COVERAGE = 0.9
_LAPLACE, _NORMAL = math.log(1 / (1 - _COVERAGE)), 1.6449
#: Where a card keeps how much wider the interval has to be than its net says, from patients it was not trained on.
INTERVAL_FACTOR = "interval factor"
#: Slices at a time.
_SLICES = 4
#: Units of water that no bone or contrast medium reaches in pixels of about a mm, and mm^2 of them that are told of.
_METAL, _METAL_MM2 = 4.0, 6.0
#: Share of the fast result in the mean with the draws; total variation at the end, share of the preview's strength.
#: On tuning slices with 16 views the RMSE was 79.9 HU of the fast result alone, 80.5 of the draws', 79.8 of the mean,
#: 78.6 at the end.
_FAST_SHARE, _LAST_TV_SHARE, _LAST_TV_ITERATIONS = 0.5, 0.1, 60
#: Iterations of total variation, for ``PREVIEW``.
_TV_ITERATIONS = 150


class Tier(StrEnum):
    """How good, and so how slow."""

    PREVIEW = "preview"
    FAST = "fast"
    BEST = "best"


@dataclass(frozen=True)
class SparseViewRequest:
    """What is asked for.

    Attributes:
        tier: see ``Tier``.
        samples: draws of the posterior, for ``BEST``.
        posterior: how each is drawn.
        seed: of the draws.
        device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
        precision: of the networks; None takes the fastest that is safe.
        weights_folder: other place of the weights.
        truncated: let a detector pass that does not see the whole image.

    Raises:
        LCTfoundError: no samples.
    """

    tier: Tier = Tier.FAST
    samples: int = 4
    posterior: PosteriorSettings = field(default_factory=PosteriorSettings)
    seed: int = 0
    device: str = "auto"
    precision: str | None = None
    weights_folder: Path | None = None
    truncated: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise LCTfoundError(
                f"{self.samples} samples are no reconstruction; take 1 at least, 4 to see what differs."
            )


@dataclass
class SparseViewResult:
    """A reconstruction.

    Attributes:
        hu: float32 (N, rows, columns).
        interval_hu: half of the width of the interval that should hold the true value of a pixel in 9 of 10 cases,
            float32 (N, rows, columns); None for a tier that does not tell.
        residual: share of the measurements that each slice leaves unexplained, (N,).
        evaluations: of a network, for a slice.
        warnings: sentences for the user.
        provenance: weights, settings, versions, seconds.
    """

    hu: np.ndarray
    interval_hu: np.ndarray | None
    residual: np.ndarray
    evaluations: int
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def scan_of_volume(
    ct: Volume, views: int, dose: Dose | None = None, size: int | None = None, seed: int = 0
) -> tuple[Projections, ImageGrid, np.ndarray]:
    """Scan a CT with few parallel views, to see what would be left of it.

    Args:
        ct: HU, canonical, with square pixels.
        views: evenly spaced over a half turn.
        dose: of the scan; None measures without noise.
        size: pixels of a side, a whole part of the larger one; None keeps it.
        seed: of the noise.

    Returns:
        The scan, the grid, and the slices that were scanned: HU, float32 (N, size, size), squares padded with air.

    Raises:
        UnsuitableImage: pixels are not square, or the size does not divide.
    """
    slices, pixel_mm = _squares(ct, size)
    grid = ImageGrid(slices.shape[1], slices.shape[2], pixel_mm)
    projector = Projector(grid, ParallelBeam.around(grid, views))
    generator = torch.Generator().manual_seed(seed)
    rays = []
    for part in torch.from_numpy(slices).split(_SLICES):
        clean = projector.forward(attenuation_of(part))
        rays.append(clean if dose is None else measure(clean, dose, generator))
    sinogram = torch.cat(rays)
    photons = None if dose is None else torch.as_tensor(dose.unattenuated(sinogram[:1]))
    heights = tuple(float(ct.origin[2] + k * ct.spacing[2]) for k in range(len(slices)))
    electronic = 0.0 if dose is None else dose.electronic_noise
    scan = Projections(sinogram, projector.beam, WATER_PER_MM, photons, heights, electronic_noise=electronic)
    return scan, grid, slices


def reconstruct_sparse_view(
    scan: Projections,
    grid: ImageGrid,
    request: SparseViewRequest | None = None,
    progress: Progress | None = None,
    load_net: Callable[[Path | None], tuple[UnrolledNet, Card]] = lambda folder: load_unrolled(folder=folder),
    load_backbone: Callable[[Path | None], FoundationModel] = lambda folder: load_foundation(folder=folder),
) -> SparseViewResult:
    """Reconstruct.

    Args:
        scan: what was measured.
        grid: of the images.
        request: how.
        progress: told after each slice and step; stops the run when cancelled.
        load_net, load_backbone: from a weights folder.

    Raises:
        UnsuitableProjections: sinogram, geometry and grid do not match, or values are no line integrals.
        WeightError: a weight is missing or damaged.
        Cancelled: the user stopped.
    """
    request, start = request or SparseViewRequest(), time.monotonic()
    projector = Projector(grid, scan.beam, truncated=request.truncated)
    run = _Run(scan, projector, request, Progress.of(progress), load_net, load_backbone)
    warnings = [*scan.warnings, *_warnings(projector, request)]
    for text in warnings:
        run.progress.warn(text)
    images, interval = run()
    for text in _metal(images, grid, request.tier):
        run.progress.warn(text)
        warnings.append(text)
    residual = torch.cat(
        [
            relative_residual(projector, part * scan.water_per_mm, rays)
            for part, rays in zip(images.split(_SLICES), scan.sinogram.split(_SLICES), strict=True)
        ]
    )
    run.progress.done()
    provenance = _provenance(scan, grid, request, run) | {"seconds": round(time.monotonic() - start, 1)}
    return SparseViewResult(
        ((images - 1.0) * 1000.0).numpy(),
        None if interval is None else (interval * 1000.0).numpy(),
        residual.numpy(),
        run.evaluations,
        warnings,
        provenance,
    )


class _Run:
    """One reconstruction; images in units of water, on the CPU between the steps."""

    def __init__(
        self,
        scan: Projections,
        projector: Projector,
        request: SparseViewRequest,
        progress: Progress,
        load_net: Callable[[Path | None], tuple[UnrolledNet, Card]],
        load_backbone: Callable[[Path | None], FoundationModel],
    ) -> None:
        self.scan, self.projector, self.request, self.progress = scan, projector, request, progress
        self.choice = choose_device(request.device, request.precision)
        self._load_net, self._load_backbone = load_net, load_backbone
        self.evaluations = 0
        self.weights: dict[str, Any] = {}

    @torch.inference_mode()
    def __call__(self) -> tuple[Tensor, Tensor | None]:
        if self.request.tier is Tier.PREVIEW:
            return self._preview(), None
        if self.request.tier is Tier.FAST:
            return self._fast(self.progress)
        shares = {"Fast reconstruction": 2, "Best reconstruction": self.request.samples, "Agreement with the scan": 1}
        fast, best, last = self.progress.split(shares)
        mean, interval = self._best(*self._fast(fast), best)
        return self._agreed(mean, last), interval

    def _parts(self) -> Iterator[tuple[slice, UnrolledInput]]:
        """Some slices at a time, as the networks take them, on the device."""
        for first in range(0, len(self.scan.sinogram), _SLICES):
            part = slice(first, first + _SLICES)
            yield part, self._input(self.scan.sinogram[part])

    def _input(self, rays: Tensor) -> UnrolledInput:
        photons = self.scan.photons
        device = self.choice.device
        return UnrolledInput.of(
            rays.to(device),
            self.projector,
            None if photons is None else photons.to(device),
            self.scan.electronic_noise,
            water_per_mm=self.scan.water_per_mm,
        )

    def _preview(self) -> Tensor:
        """Total variation from the filtered back-projection."""
        images, total = [], len(self.scan.sinogram)
        for part, told in self._parts():

            def show(share: float, first: int = part.start) -> None:
                self.progress.update((first + share * _SLICES) / total, f"Reconstructing slice {first + 1} of {total}")

            images.append(told.smooth(self.projector, _TV_ITERATIONS, progress=show).cpu())
        return torch.cat(images)

    def _fast(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Images, and half the width of their interval."""
        network, card = self._load_net(self.request.weights_folder)
        network.to(self.choice.device)
        self._know(card)
        images, scales, total = [], [], len(self.scan.sinogram)
        for part, told in self._parts():
            progress.update(part.start / total, f"Reconstructing slice {part.start + 1} of {total}")
            with self._precision():
                result = network(told, self.projector)
            images.append(result.images.cpu())
            scales.append(result.scale.cpu())
        self.evaluations += network.config.iterations
        return torch.cat(images), _LAPLACE * _factor(card) * torch.cat(scales)

    def _best(self, start: Tensor, interval: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Mean of the draws and of where they began, and the interval of draws and net together."""
        model = self._load_backbone(self.request.weights_folder)
        if model.card is not None:
            self._know(model.card)
        told, steps = self._input(self.scan.sinogram), self.request.posterior.steps
        predict = SlicePredictor(model, self.choice, warn=self.progress.warn)
        draws = []
        for number in range(self.request.samples):

            def show(done: int, number: int = number) -> None:
                share = (number + done / steps) / self.request.samples
                progress.update(share, f"Drawing sample {number + 1} of {self.request.samples}")

            with self._precision():
                draws.append(
                    sample_posterior(
                        predict, told, self.projector, start.to(self.choice.device), self.request.posterior,
                        self.request.seed, number, show,
                    ).cpu()
                )  # fmt: skip
        self.evaluations += steps * self.request.samples
        drawn = torch.stack(draws)
        mean = drawn.mean(dim=0).lerp(start, _FAST_SHARE)
        if len(draws) > 1:
            # What the draws agree on may be wrong all the same: the net's own estimate does not become smaller.
            interval = torch.maximum(interval, _NORMAL * drawn.std(dim=0))
        return mean, interval

    def _agreed(self, images: Tensor, progress: Progress) -> Tensor:
        """Nearer to the measurements, at little total variation."""
        found = []
        for part, told in self._parts():
            progress.update(part.start / len(images), f"Comparing slice {part.start + 1} with the scan")
            begin = images[part].to(self.choice.device)
            found.append(told.smooth(self.projector, _LAST_TV_ITERATIONS, begin, _LAST_TV_SHARE).cpu())
        return torch.cat(found)

    def _precision(self) -> torch.autocast:
        half = self.choice.dtype != torch.float32
        return torch.autocast(self.choice.device.type, self.choice.dtype if half else torch.bfloat16, enabled=half)

    def _know(self, card: Card) -> None:
        self.weights[card.name] = {"version": card.version, "sha256": card.sha256, "license": card.license}


def _factor(card: Card) -> float:
    return float(card.numbers.get(INTERVAL_FACTOR, 1.0))


def _warnings(projector: Projector, request: SparseViewRequest) -> list[str]:
    found = []
    views = projector.beam.views
    if views <= FEW_VIEWS:
        lost = "missing" if request.tier is Tier.PREVIEW else "missing or made up"
        found.append(
            f"{views} views leave most of the image open: small vessels and nodules may be {lost}. "
            "Research use only, not for diagnosis."
        )
    if request.tier is not Tier.PREVIEW and not isinstance(projector.beam, ParallelBeam) and views > FEW_VIEWS:
        # RMSE on six test slices: 102 HU against the preview's 113 with 16 views, 71 against 69 with 32, 49 against 44
        # with 61.
        found.append(
            "The network has seen few fan beams: on six slices the preview was nearer to the truth, with 32 views of a "
            "fan by 2 %, with 61 by 10 %. Compare the two."
        )
    if not projector.beam.covers(projector.grid):
        found.append(
            f"The detector sees a circle of {2 * projector.beam.field_mm:.0f} mm only; values near its rim and beyond "
            "it are not to be trusted."
        )
    return found


def _metal(images: Tensor, grid: ImageGrid, tier: Tier) -> list[str]:
    """A sentence where slices hold what no tissue is, in units of water."""
    pixels = (images > _METAL).flatten(1).sum(dim=1)
    found = [number + 1 for number in range(len(images)) if pixels[number] * grid.pixel_mm**2 >= _METAL_MM2]
    if not found:
        return []
    where = f"slice {found[0]}" if len(found) == 1 else f"{len(found)} slices ({found[0]} to {found[-1]})"
    text = f"There seems to be metal in {where} of {len(images)}: streaks around it are not corrected"
    if tier is Tier.PREVIEW:
        return [f"{text}. Values within some centimeters of it are not to be trusted."]
    # Eight test slices with a screw of titanium, 16 and 32 views: RMSE 106 and 76 HU, of total variation 96 and 64.
    return [
        f"{text}, and the network has not seen any: with a screw it erred 11 to 20 % more than total variation. Take "
        "the preview for these slices."
    ]


def _squares(ct: Volume, size: int | None) -> tuple[np.ndarray, float]:
    """Slices as squares of ``size`` pixels, HU of -1000 at least, and the side of a pixel in mm."""
    width, height = ct.spacing[:2]
    if abs(width - height) > 1e-3 * width:
        raise UnsuitableImage(
            f"The pixels measure {width:g} x {height:g} mm; resample the CT to square pixels to scan it again."
        )
    rows, columns = ct.array.shape[1:]
    side = max(rows, columns)
    size = side if size is None else size
    if size < 1 or side % size:
        raise UnsuitableImage(f"A slice of {side} pixels has no version of {size}; choose a whole part of {side}.")
    top, left = (side - rows) // 2, (side - columns) // 2
    square = np.full((len(ct.array), side, side), -1000.0, np.float32)
    square[:, top : top + rows, left : left + columns] = np.maximum(ct.array, -1000)
    step = side // size
    means = F.avg_pool2d(torch.from_numpy(square)[:, None], step)[:, 0].numpy() if step > 1 else square
    return means, float(width) * step


def _provenance(scan: Projections, grid: ImageGrid, request: SparseViewRequest, run: _Run) -> dict[str, Any]:
    beam: Beam = scan.beam
    posterior = request.posterior
    return {
        "product": f"LCTfound {LCTfoundLib.__version__}",
        "task": "sparse-view reconstruction",
        "tier": request.tier.value,
        "views": beam.views,
        "geometry": type(beam).__name__,
        "grid": [grid.rows, grid.columns, grid.pixel_mm],
        "noise known": scan.photons is not None,
        "samples": request.samples if request.tier is Tier.BEST else None,
        "posterior": {**vars(posterior)} if request.tier is Tier.BEST else None,
        "seed": request.seed,
        "network evaluations a slice": run.evaluations,
        "weights": run.weights,
        "device": f"{run.choice.device} ({run.choice.name}), {run.choice.precision.value}",
        "versions": {name: version(name) for name in ("numpy", "torch")},
    }
