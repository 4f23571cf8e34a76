"""Training of the low-dose net: chests scanned at a random dose, each paired with what a scan without noise shows.

The pair's target is the noise-free reconstruction with the same kernel, not a scan at full dose: a net that sees a
noisy target learns its mean all the same, only slower, and the kernel's blur is the user's choice and no noise. That
the logarithm of few counts is off on average (streaks between the shoulders) is in the input and not in the target, so
that it is learned too.

Real slices show few lesions, and a net that has seen none takes a faint one for noise. So most samples have some put in
before the scan: balls of any size and contrast, in all tissues.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.networks.low_dose import LOW_DOSE_SHAPE, LOW_DOSE_WEIGHT, LowDoseAnswer, LowDoseNet, noise_fineness
from LCTfoundLib.networks.restoration import RestorationConfig
from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.image_quality import estimate_noise
from LCTfoundLib.physics.noise import Dose, Kernel, measure, tube_current
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import RampFilter
from training.restoration import ImageSampler, slice_psnr
from training.shard_stream import Augmentation, Mixture

__all__ = ["AIR", "LowDoseScanner", "LowDoseTask", "Pair", "add_lesions"]

#: What scanners cut their images at, -1024 HU, in units of water.
AIR = -0.024
#: Denser pixels are soft tissue and bone, in units of water.
_TISSUE = 0.8
#: Less is air around or in the body, in units of water.
_LUNG_AT_LEAST = 0.05
#: How far off the told noise and its fineness are in training (relative, absolute): a volume tells one for all slices.
_NOISE_OFF, _FINENESS_OFF = 0.15, 0.03
#: Share of the samples without neighbors: the slice itself stands in, noise and all, as at a volume's ends.
_ALONE = 0.1
#: Lesions of a sample that has some, at most; their radius (mm) and contrast (HU) in soft tissue and in lung.
_LESIONS, _RADIUS_MM, _TISSUE_HU, _LUNG_HU = 8, (1.5, 12.0), (10.0, 80.0), (60.0, 400.0)
#: Spacing of the slices that lesions reach through, mm; width of their edges.
_SLICE_MM, _EDGE_MM = 2.5, 1.0
#: Weight of the scale's likelihood: the trunk belongs to the image.
_SCALE_WEIGHT = 0.01
#: Error below which the loss is square, in units of water: 5 HU.
_SOFT = 0.005
#: Share of the full dose that scores are measured at; side of their images in mm.
_SCORED_DOSE, _SCORED_FIELD_MM = 0.05, 384.0
#: Half of the interval of a Laplace distribution that holds 90 %, in scales.
_NINETY = math.log(10)
_TEXTS = {
    "task": "low-dose CT",
    "intended_use": "Noise reduction of chest CT images taken at a low dose, for research.",
    "limits": (
        "Research use, no medical device. Contrasts below the noise may be lost, and what is filled in may be wrong "
        "without looking so. Trained for a short time on a CPU, on simulated scans: parallel beams, photon and "
        "electronic noise, no scatter, no beam hardening, no iterative reconstruction."
    ),
}


class LowDoseScanner:
    """Scans and reconstructs slices of one size, with matrices for both ways that are kept.

    The reconstruction is ``physics.solvers.filtered_back_projection``, as a matrix: 12 slices of 256 x 256 with 240
    views take 0.1 s instead of 1.5 s. Lengths are in pixels, so that pixels of any size share the matrices.

    Args:
        size: pixels of a side.
        views: over a half turn.
    """

    def __init__(self, size: int, views: int) -> None:
        grid = ImageGrid(size, size, 1.0)
        self.beam = ParallelBeam.around(grid, views)
        self.projector = Projector(grid, self.beam)
        self._back = _back_projection(grid, self.beam)

    def rays(self, slices: Tensor, pixel_mm: float | Tensor) -> Tensor:
        """Line integrals (..., views, channels) of slices (..., size, size) in units of water.

        Args:
            pixel_mm: edge of a pixel, a number or one for each slice, (..., 1, 1).
        """
        return self.projector.forward(slices * (pixel_mm * WATER_PER_MM))

    def images(self, rays: Tensor, kernels: Sequence[Kernel], pixel_mm: float | Tensor) -> Tensor:
        """Slices (N, size, size) in units of water, from line integrals (N, views, channels), each with its kernel."""
        filtered = torch.stack([self._filtered(one, kernel) for one, kernel in zip(rays, kernels, strict=True)])
        if self._back.device != rays.device:
            self._back = self._back.to(rays.device)
        smeared = (self._back @ filtered.flatten(1).t().contiguous()).t()
        return smeared.reshape(-1, *self.projector.image_shape) / (pixel_mm * WATER_PER_MM)

    def _filtered(self, rays: Tensor, kernel: Kernel) -> Tensor:
        size = 2 ** math.ceil(math.log2(2 * self.beam.detectors))
        steps = torch.fft.fftfreq(size, 1 / size, device=rays.device)
        ramp = torch.where(steps % 2 == 1, -1 / (math.pi * steps).square().clamp(min=1), 0.0)
        ramp[0] = 0.25
        frequency = torch.fft.rfftfreq(size, device=rays.device)
        transfer = torch.fft.rfft(ramp).real * kernel.transfer(frequency, pitch_mm=1.0)
        return torch.fft.irfft(torch.fft.rfft(rays, size) * transfer, size)[..., : self.beam.detectors]


def _back_projection(grid: ImageGrid, beam: ParallelBeam) -> Tensor:
    """From filtered views to the image, linear interpolation: sparse CSR float32 (pixels, views * channels)."""
    x, y = np.broadcast_arrays(grid.x_mm, grid.y_mm[:, None])
    columns = np.empty((grid.pixels, beam.views, 2), np.int32)
    values = np.empty(columns.shape, np.float32)
    for view, angle in enumerate(beam.angles):
        channel = (x * math.cos(angle) + y * math.sin(angle)).ravel() + (beam.detectors - 1) / 2
        low = np.clip(np.floor(channel), 0, beam.detectors - 2)
        columns[:, view, 0], columns[:, view, 1] = low + view * beam.detectors, low + 1 + view * beam.detectors
        values[:, view, 0], values[:, view, 1] = 1 - (channel - low), channel - low
    values *= beam.turn / beam.views
    starts = np.arange(0, columns.size + 1, 2 * beam.views, dtype=np.int32)
    matrix = sparse.csr_array((values.ravel(), columns.ravel(), starts), (grid.pixels, beam.views * beam.detectors))
    parts = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*beta state.*")
        return torch.sparse_csr_tensor(*parts, size=matrix.shape, check_invariants=False)


@dataclass(frozen=True)
class _Draw:
    """What is random about a scan beside its photons."""

    dose: Dose
    pixel_mm: float
    current: float
    alone: bool = False
    noise_off: float = 1.0
    fineness_off: float = 0.0

    @property
    def fineness(self) -> float:
        return noise_fineness(self.dose.kernel, self.pixel_mm, self.pixel_mm) + self.fineness_off


@dataclass
class Pair:
    """A batch: what the net sees, what it is told, and what it should answer, in units of water."""

    slices: Tensor
    sigma_hu: Tensor
    fineness: Tensor
    wanted: Tensor


class LowDoseTask:
    """Training and scores of a ``LowDoseNet``.

    Args:
        config: the parsed TOML file.
        mixture, held_out: of shards.
    """

    name = LOW_DOSE_WEIGHT
    architecture = "LowDoseNet"
    texts = _TEXTS

    def __init__(self, config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> None:
        data = config["data"]
        self.network = self.build(config["network"])
        self.seed, self.size, self.batch = int(config.get("seed", 0)), int(data["size"]), config["optimizer"]["batch"]
        self.dose = Dose(float(data["photons"]), electronic_noise=float(data["electronic_noise"]))
        self.fractions, self.field_mm = tuple(data["fractions"]), tuple(data["field_mm"])
        self.lesions = float(data.get("lesions", 0.0))
        self.scanner = LowDoseScanner(self.size, int(data["views"]))
        augmentation = Augmentation(self.size, self.size)
        self._train = ImageSampler(mixture, augmentation, self.seed, neighbors=1)
        self._held_out = ImageSampler(held_out, augmentation, 9_999_999, neighbors=1) if held_out else None

    def build(self, shape: Mapping[str, Any]) -> nn.Module:
        """The network that is trained."""
        return LowDoseNet(RestorationConfig.from_dict(LOW_DOSE_SHAPE.to_dict() | shape))

    @property
    def parameters(self) -> dict[str, Any]:
        return self.network.config.to_dict()

    def pair_of(self, step: int) -> Pair:
        """Of a step of the training."""
        numbers = range(step * self.batch, (step + 1) * self.batch)
        return self._pair(self._train, numbers, [self._draw(number) for number in numbers], self.lesions)

    def scored_pair(self) -> Pair:
        """Held-out chests at 5 % of the dose, soft kernel."""
        assert self._held_out is not None
        draw = _Draw(Dose(self.dose.photons, _SCORED_DOSE, self.dose.electronic_noise), _SCORED_FIELD_MM / self.size, 0)
        return self._pair(self._held_out, range(8), [draw] * 8)

    def loss(self, step: int) -> Tensor:
        pair = self.pair_of(step)
        answer = self._run(pair)
        missed = answer.images - pair.wanted
        # Charbonnier: straight for large errors, and the squares that PSNR counts beside it.
        loss = (missed.square() + _SOFT**2).sqrt().mean() - _SOFT + 2.0 * missed.square().mean()
        likelihood = answer.scale.log() + missed.detach().abs() / answer.scale
        return loss + _SCALE_WEIGHT * likelihood.mean()

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """On held-out chests at 5 % of the dose, soft kernel: PSNR (2,000 HU) before and after, share in the interval.

        The interval is the one that should hold 90 %.
        """
        if self._held_out is None:
            return {}
        pair = self.scored_pair()
        answer = self._run(pair)
        inside = (answer.images - pair.wanted).abs() <= _NINETY * answer.scale
        return {
            "input psnr": slice_psnr(pair.slices[:, 1], pair.wanted),
            "psnr": slice_psnr(answer.images, pair.wanted),
            "inside": float(inside[pair.wanted > _TISSUE].float().mean()),
        }

    def _run(self, pair: Pair) -> LowDoseAnswer:
        with torch.autocast(pair.slices.device.type, torch.bfloat16):
            return self.network(pair.slices, pair.sigma_hu, pair.fineness)

    def _draw(self, number: int) -> _Draw:
        rng = np.random.default_rng([self.seed, number, 4])
        fraction = float(np.exp(rng.uniform(*np.log(self.fractions))))
        kernel = Kernel(list(RampFilter)[int(rng.integers(len(RampFilter)))], float(rng.uniform(0.7, 1.0)))
        return _Draw(
            Dose(self.dose.photons, fraction, self.dose.electronic_noise, kernel=kernel),
            float(rng.uniform(*self.field_mm)) / self.size,
            float(rng.uniform()) if rng.random() < 0.5 else 0.0,
            bool(rng.random() < _ALONE),
            float(np.exp(rng.normal(0, _NOISE_OFF))),
            float(rng.normal(0, _FINENESS_OFF)),
        )

    def _pair(self, sampler: ImageSampler, numbers: range, draws: Sequence[_Draw], lesions: float = 0.0) -> Pair:
        device = next(self.network.parameters()).device
        triples = torch.stack([sampler(number) for number in numbers]).to(device) / 1000 + 1
        for triple, draw, number in zip(triples, draws, numbers, strict=True):
            rng = np.random.default_rng([self.seed, number, 6])
            if rng.random() < lesions:
                add_lesions(triple, draw.pixel_mm, rng)
        pixel_mm = triples.new_tensor([draw.pixel_mm for draw in draws])[:, None, None, None]
        clean = self.scanner.rays(triples, pixel_mm)
        noisy = torch.stack([self._measured(*each) for each in zip(clean, draws, numbers, strict=True)])
        rays = torch.cat([noisy.flatten(0, 1), clean[:, 1]])
        kernels = [draw.dose.kernel for draw in draws for _ in range(3)] + [draw.dose.kernel for draw in draws]
        edges = torch.cat([pixel_mm[:, 0].repeat_interleave(3, dim=0), pixel_mm[:, 0]])
        images = self.scanner.images(rays, kernels, edges).clamp(min=AIR)
        slices, wanted = images[: 3 * len(draws)].unflatten(0, (-1, 3)), images[3 * len(draws) :]
        for row, (draw, triple) in enumerate(zip(draws, triples, strict=True)):
            for place in (0, 2):
                if draw.alone or torch.equal(triple[place], triple[1]):
                    slices[row, place] = slices[row, 1]
        told = [_told_noise(*each) for each in zip(slices[:, 1], wanted, draws, strict=True)]
        return Pair(slices, wanted.new_tensor(told), wanted.new_tensor([draw.fineness for draw in draws]), wanted)

    def _measured(self, clean: Tensor, draw: _Draw, number: int) -> Tensor:
        generator = torch.Generator(clean.device).manual_seed(self.seed * 1_000_003 + number)
        return measure(clean, draw.dose, generator, tube_current(clean, draw.current))


def add_lesions(triple: Tensor, pixel_mm: float, rng: np.random.Generator) -> None:
    """Put balls of random size and contrast into the body of three neighboring slices, in place.

    Args:
        triple: (3, S, S), units of water.
        pixel_mm: side of a pixel.
        rng: what is random about them.
    """
    rows, columns = torch.nonzero(triple[1] > _LUNG_AT_LEAST, as_tuple=True)
    if not len(rows):
        return
    axis = torch.arange(triple.shape[-1], device=triple.device) * pixel_mm
    heights = torch.tensor([-_SLICE_MM, 0.0, _SLICE_MM], device=triple.device)[:, None, None]
    for _ in range(int(rng.integers(1, _LESIONS + 1))):
        place = int(rng.integers(len(rows)))
        row, column = int(rows[place]), int(columns[place])
        radius = float(np.exp(rng.uniform(*np.log(_RADIUS_MM))))
        in_lung = bool(triple[1, row, column] < _TISSUE)
        contrast = float(np.exp(rng.uniform(*np.log(_LUNG_HU if in_lung else _TISSUE_HU)))) / 1000
        if not in_lung and rng.random() < 0.5:
            contrast = -contrast
        height = heights - float(rng.uniform(-radius, radius)) / 2
        away = (height**2 + (axis[:, None] - axis[row]) ** 2 + (axis - axis[column]) ** 2).sqrt()
        triple += contrast * torch.sigmoid((radius - away) * 4 / _EDGE_MM) * (triple > _LUNG_AT_LEAST)
    triple.clamp_(min=0.0)


def _told_noise(noisy: Tensor, clean: Tensor, draw: _Draw) -> float:
    """HU, as the image tells it; where nothing is flat, what it is."""
    try:
        sigma = estimate_noise(1000 * (noisy - 1), draw.pixel_mm).sigma_hu
    except UnsuitableImage:
        sigma = 1000 * float((noisy - clean).square().mean().sqrt())
    return draw.noise_off * sigma
