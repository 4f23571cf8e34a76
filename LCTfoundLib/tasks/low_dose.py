"""Noise reduction of low-dose CT: a noisy CT in, a quieter one out, with what was done to its noise and how sure it is.

Two tiers. *Fast*: one step of the low-dose net, which also tells the error it expects. *Best*: the published way, cold
diffusion by an adapter of the backbone, where its weight is installed.

A smooth image looks good and may have lost what it was taken for. So the result holds the noise power spectra before
and after, and of what was taken away; the strength lets a reader go back to the image as it was measured; and what is
not fine is left as it was measured from the first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

import LCTfoundLib
from LCTfoundLib.errors import LCTfoundError, UnsuitableImage, WeightError
from LCTfoundLib.networks.adapters import AdapterHost, LoadedAdapter, load_adapter
from LCTfoundLib.networks.cold_diffusion import ColdRestorer
from LCTfoundLib.networks.conditions import WIDE, Condition
from LCTfoundLib.networks.foundation import FoundationModel, load_foundation
from LCTfoundLib.networks.low_dose import REGION, LowDoseNet, load_low_dose, noise_fineness
from LCTfoundLib.physics.image_quality import (
    DoseEstimate,
    NoiseCurve,
    NoisePowerSpectrum,
    Tissue,
    estimate_dose,
    noise_power_spectrum,
)
from LCTfoundLib.physics.noise import SHARP, SOFT, Dose, Kernel, expected_noise_hu
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.tasks.sparse_view import INTERVAL_FACTOR
from LCTfoundLib.volume import AIR, Volume
from LCTfoundLib.weights.registry import Card, list_weights, search_folders

__all__ = [
    "COLD_WEIGHT",
    "KEPT_MM",
    "LowDoseRequest",
    "LowDoseResult",
    "LowDoseTier",
    "NoiseReport",
    "reduce_noise",
    "standard_curve",
]

#: Name of the cold diffusion adapter's weight.
COLD_WEIGHT = "low_dose_cold"
#: Slices at a time, and slices that the noise is told by.
_SLICES, _LOOKED_AT = 4, 12
#: Of ``LowDoseRequest.kept_mm``: at 5 % of 1e5 photons lesions of 8 mm keep twice as much contrast as with 0.
KEPT_MM, _KEPT_AT_MOST_MM = 5.0, 50.0
#: Standard deviations in the width at half height.
_DEVIATIONS = 2 * math.sqrt(2 * math.log(2))
#: Half of the interval of a Laplace distribution that holds 90 %, in scales.
_NINETY = math.log(10)
#: Image sides that the backbone takes are multiples of this.
_MULTIPLE = 16
#: Less noise than this, HU, is that of a scan at full dose.
_QUIET_HU = 8.0
#: Noise whose mean frequency falls below this share of what it was looks like blotches, which pass for lesions.
_BLOTCHY = 0.8
#: Regions that spectra need at least, and the share of the flattest that they are taken from.
_FEWEST_REGIONS, _FLATTEST = 8, 0.25
#: HU of the tissues that spectra are taken in, by a region's mean: fat to contrast; lung where there is none.
_SOFT_TISSUE, _LUNG = (-120.0, 150.0), (-940.0, -700.0)
#: Dose that fractions refer to: 1e5 photons a ray, 360 views over a half turn, channels as wide as pixels.
_FULL_DOSE, _VIEWS = Dose(1e5, electronic_noise=10.0), 360
#: Water, mm, that attenuates the rays as an adult's chest does, and doses that the curve is fitted to.
_CHEST_MM, _FITTED = 230.0, (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


class LowDoseTier(StrEnum):
    """How, and so how slow."""

    FAST = "fast"
    BEST = "best"


@dataclass(frozen=True)
class LowDoseRequest:
    """What is asked for.

    Attributes:
        tier: see ``LowDoseTier``.
        strength: 0 leaves the CT as it is, 1 takes away all that the net takes for noise; in between a share of it.
        kept_mm: only what is finer than this is taken away: a net takes faint lesions for noise, whose power lies in
            the fine. Width of a Gaussian at half of its height; 0 takes away noise of any size.
        sigma_hu: standard deviation of the noise in soft tissue, if it is known; None tells it by the CT.
        dose: share of the full dose, if that is known instead.
        curve: noise by dose of this scanner's protocol; None takes ``standard_curve``.
        device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
        precision: of the networks; None takes the fastest that is safe.
        weights_folder: other place of the weights.

    Raises:
        LCTfoundError: a number is out of its range, or both noise and dose are given.
    """

    tier: LowDoseTier = LowDoseTier.FAST
    strength: float = 1.0
    kept_mm: float = KEPT_MM
    sigma_hu: float | None = None
    dose: float | None = None
    curve: NoiseCurve | None = None
    device: str = "auto"
    precision: str | None = None
    weights_folder: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise LCTfoundError(f"A strength of {self.strength} is none; take 0 (unchanged) to 1 (all noise removed).")
        if not 0 <= self.kept_mm <= _KEPT_AT_MOST_MM:
            raise LCTfoundError(
                f"Structures from {self.kept_mm} mm on cannot be kept; take 0 (any noise is removed) to "
                f"{_KEPT_AT_MOST_MM:g} mm."
            )
        if self.sigma_hu is not None and self.dose is not None:
            raise LCTfoundError("Noise and dose are both given, and one follows from the other; give one of them.")
        if self.sigma_hu is not None and not (math.isfinite(self.sigma_hu) and self.sigma_hu > 0):
            raise LCTfoundError(f"Noise of {self.sigma_hu} HU is none; give its standard deviation, above 0.")
        if self.dose is not None and not 0 < self.dose <= 1:
            raise LCTfoundError(f"{self.dose} is no share of the full dose; give more than 0 and at most 1.")


@dataclass(frozen=True)
class NoiseReport:
    """Noise before and after, in the same flat regions: what was taken at which frequency.

    Attributes:
        frequency: of the spectra, 1/mm, rising.
        before, after, removed: radial noise power of the CT, of the result and of their difference, HU^2 mm^2. Regions
            of a patient are never quite flat: some anatomy is in all of them.
        sigma_before_hu, sigma_after_hu: standard deviation in the regions.
        mean_before, mean_after: frequency of the power, 1/mm; falls when noise becomes blotchy.
        tissue: of the regions.
        regions: number of them.
    """

    frequency: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    removed: tuple[float, ...]
    sigma_before_hu: float
    sigma_after_hu: float
    mean_before: float
    mean_after: float
    tissue: Tissue
    regions: int

    @property
    def is_blotchy(self) -> bool:
        """Whether the noise that is left is much coarser than it was."""
        return self.mean_after < _BLOTCHY * self.mean_before

    def to_dict(self) -> dict[str, Any]:
        """For JSON and plots."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass
class LowDoseResult:
    """A quieter CT.

    Attributes:
        ct: in the geometry of the input, HU; int16 where the input is of whole numbers, else float32.
        interval_hu: half of the width of the interval that should hold a noise-free scan's value in 9 of 10 cases,
            float32 of the CT's shape; None for a tier that does not tell.
        sigma_hu: noise that the net was told.
        dose: that the CT looks like, with the noise that tells it; None where nothing in it is flat.
        noise: spectra before and after; None where nothing is flat.
        evaluations: of a network, for a slice.
        warnings: sentences for the user.
        provenance: weights, settings, versions, seconds.
    """

    ct: Volume
    interval_hu: np.ndarray | None
    sigma_hu: float
    dose: DoseEstimate | None
    noise: NoiseReport | None
    evaluations: int
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def standard_curve(pixel_mm: float, kernel: Kernel = SOFT) -> NoiseCurve:
    """Noise by dose of the scan that fractions refer to when no scanner's curve is given.

    It is that of the middle of a cylinder of 230 mm of water, about what an adult's chest attenuates, in closed form
    (``expected_noise_hu``): 1e5 photons a ray, electronic noise of 10, 360 views, channels and slices as they are
    measured. A dose told by it compares images; it is not what a scanner gave, and how wide the patient is counts more
    than its interval allows for: six real slices scanned at 5 % were told 4 to 12 %, at 25 % 8 to 28 %.

    Args:
        pixel_mm: edge of a pixel, and width of a channel at the isocenter.
        kernel: of the images.
    """
    full = replace(_FULL_DOSE, kernel=kernel)
    sigmas = [expected_noise_hu(full.at(share), _CHEST_MM, _VIEWS, pixel_mm) for share in _FITTED]
    return NoiseCurve.fit(_FITTED, sigmas)


def load_cold(folder: Path | None) -> tuple[FoundationModel, LoadedAdapter]:
    """The backbone and the cold diffusion adapter, if that is installed.

    Raises:
        WeightError: it is not, or one of both is damaged.
    """
    if COLD_WEIGHT not in {entry.name for entry in list_weights(search_folders(folder))}:
        raise WeightError(
            f"The best tier needs the adapter '{COLD_WEIGHT}', which is not installed; choose the fast tier, or train "
            "the adapter on your backbone (training/adapters) and put it into your weights folder."
        )
    model = load_foundation(folder=folder)
    return model, load_adapter(COLD_WEIGHT, model.network, folder)


def reduce_noise(
    ct: Volume,
    request: LowDoseRequest | None = None,
    progress: Progress | None = None,
    load_net: Callable[[Path | None], tuple[LowDoseNet, Card]] = lambda folder: load_low_dose(folder=folder),
    load_best: Callable[[Path | None], tuple[FoundationModel, LoadedAdapter]] = load_cold,
) -> LowDoseResult:
    """Take the noise out of a CT, slice by slice of its first axis with their neighbors.

    Args:
        ct: HU, checked at the door, slices as they were reconstructed: in a resampled CT noise is another.
        request: how.
        progress: told after some slices; stops the run when cancelled.
        load_net, load_best: from a weights folder.

    Raises:
        UnsuitableImage: pixels are not square, or not all values are numbers.
        WeightError: a weight is missing or damaged.
        Cancelled: the user stopped.
    """
    request, start = request or LowDoseRequest(), time.monotonic()
    pixel_mm = _pixel_of(ct)
    progress = Progress.of(progress)
    progress.update(0.0, "Measuring the noise")
    known = _Known.of(ct, pixel_mm, request)
    run = _Run(request, known, load_net, load_best)
    images, interval = run(ct, progress)
    report = known.regions.report(images, pixel_mm) if known.regions is not None else None
    warnings = [*known.warnings, *_warnings(request, report)]
    for text in warnings:
        progress.warn(text)
    progress.done()
    provenance = _provenance(request, run, known) | {"seconds": round(time.monotonic() - start, 1)}
    return LowDoseResult(
        ct.with_array(images), interval, known.sigma_hu, known.dose, report, run.evaluations, warnings, provenance
    )


def _pixel_of(ct: Volume) -> float:
    width, height = ct.spacing[:2]
    if abs(width - height) > 1e-3 * width:
        raise UnsuitableImage(
            f"The pixels measure {width:g} x {height:g} mm; give the series as it was reconstructed, with square ones."
        )
    if not np.isfinite(ct.array).all():
        raise UnsuitableImage("Some values of the CT are no numbers; export it again from its source.")
    return float(width)


# -- what is known of the noise --------------------------------------------------------------------------------------


@dataclass
class _Regions:
    """Flat squares of a CT by their corners: slice, row, column, (R, 3)."""

    corners: np.ndarray
    before: Tensor
    tissue: Tissue

    @classmethod
    def of(cls, array: np.ndarray, levels: np.ndarray) -> _Regions | None:
        """The flattest squares of soft tissue, else of lung; None where there are too few.

        Flatness is that of the blurred image, which has little noise: choosing by the noise itself would find squares
        where by chance there is less of it.
        """
        if min(array.shape[1:]) < REGION:
            return None
        squares: list[Tensor] = []
        blurred: list[Tensor] = []
        corners: list[np.ndarray] = []
        step = REGION // 2
        for level in levels:
            plane = torch.from_numpy(array[level].astype(np.float32))
            smooth = F.avg_pool2d(F.pad(plane[None, None], (2, 2, 2, 2), mode="replicate"), 5, 1)[0, 0]
            for image, into in ((plane, squares), (smooth, blurred)):
                into.append(image.unfold(0, REGION, step).unfold(1, REGION, step).reshape(-1, REGION, REGION))
            rows, columns = ((count - REGION) // step + 1 for count in plane.shape)
            grid = np.stack(np.meshgrid(level, np.arange(rows) * step, np.arange(columns) * step, indexing="ij"), -1)
            corners.append(grid.reshape(-1, 3))
        every, smooth, places = torch.cat(squares), torch.cat(blurred), np.concatenate(corners)
        means, unevenness = smooth.mean(dim=(1, 2)), smooth.flatten(1).std(dim=1)
        for tissue, (low, high) in ((Tissue.SOFT_TISSUE, _SOFT_TISSUE), (Tissue.LUNG, _LUNG)):
            inside = torch.nonzero((means > low) & (means < high))[:, 0]
            chosen = inside[unevenness[inside].argsort()][: max(_FEWEST_REGIONS, int(_FLATTEST * len(inside)))]
            if len(chosen) >= _FEWEST_REGIONS:
                return cls(places[chosen.numpy()], every[chosen], tissue)
        return None

    def spectrum(self, squares: Tensor, pixel_mm: float) -> NoisePowerSpectrum:
        return noise_power_spectrum(squares, pixel_mm, REGION)

    def report(self, array: np.ndarray, pixel_mm: float) -> NoiseReport:
        """Against the result."""
        squares = [array[k, j : j + REGION, i : i + REGION] for k, j, i in self.corners]
        after = torch.from_numpy(np.stack(squares).astype(np.float32))
        old, new, gone = (self.spectrum(part, pixel_mm) for part in (self.before, after, self.before - after))
        return NoiseReport(
            tuple(map(float, old.radial_frequency)),
            tuple(map(float, old.radial_power)),
            tuple(map(float, new.radial_power)),
            tuple(map(float, gone.radial_power)),
            math.sqrt(old.variance),
            math.sqrt(new.variance),
            _mean_frequency(old),
            _mean_frequency(new),
            self.tissue,
            len(self.corners),
        )


def _mean_frequency(spectrum: NoisePowerSpectrum) -> float:
    """0 where there is no noise at all."""
    return spectrum.mean_frequency if spectrum.radial_power.any() else 0.0


@dataclass
class _Known:
    """What a CT and the request tell of the noise.

    Attributes:
        sigma_hu, fineness: for the net.
        dose: estimated.
        regions: for the report.
        warnings: about it.
    """

    sigma_hu: float
    fineness: float
    dose: DoseEstimate | None
    regions: _Regions | None
    warnings: list[str]

    @classmethod
    def of(cls, ct: Volume, pixel_mm: float, request: LowDoseRequest) -> _Known:
        count = len(ct.array)
        levels = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).round().astype(int))
        regions = _Regions.of(ct.array, levels)
        warnings = []
        fineness = noise_fineness(SOFT, pixel_mm, pixel_mm)
        if regions is not None:
            fineness = 2 * pixel_mm * _mean_frequency(regions.spectrum(regions.before, pixel_mm))
        else:
            warnings.append(
                "Nothing in the CT is flat enough to show the texture of its noise; that of a soft kernel is assumed."
            )
        curve = request.curve or standard_curve(pixel_mm, _kernel_like(fineness))
        dose = _dose_of(ct, levels, pixel_mm, curve)
        if request.sigma_hu is not None:
            return cls(request.sigma_hu, fineness, dose, regions, warnings)
        if request.dose is not None:
            return cls(curve.sigma_hu(request.dose), fineness, dose, regions, warnings)
        if dose is None:
            raise UnsuitableImage(
                "The CT has too little flat air, lung or soft tissue to tell its noise; state the noise in HU."
            )
        if not dose.is_sure:
            warnings.append(
                f"The noise is told to be {dose.noise.sigma_hu:.0f} HU with {100 * dose.noise.uncertainty:.0f} % of "
                "uncertainty; compare the result with the CT, or state the noise."
            )
        if dose.noise.sigma_hu < _QUIET_HU:
            warnings.append(
                f"There is little noise in this CT ({dose.noise.sigma_hu:.0f} HU); there is not much to win here."
            )
        return cls(dose.noise.sigma_hu, fineness, dose, regions, warnings)


def _kernel_like(fineness: float) -> Kernel:
    """The kernel whose noise is nearest as fine."""
    return min((SOFT, SHARP), key=lambda kernel: abs(noise_fineness(kernel, 1.0, 1.0) - fineness))


def _dose_of(ct: Volume, levels: np.ndarray, pixel_mm: float, curve: NoiseCurve) -> DoseEstimate | None:
    planes = torch.from_numpy(ct.array[levels].astype(np.float32))
    try:
        return estimate_dose(planes.clamp(min=AIR), pixel_mm, curve)
    except UnsuitableImage:
        return None


# -- the work --------------------------------------------------------------------------------------------------------


class _Run:
    """One reduction of noise."""

    def __init__(
        self,
        request: LowDoseRequest,
        known: _Known,
        load_net: Callable[[Path | None], tuple[LowDoseNet, Card]],
        load_best: Callable[[Path | None], tuple[FoundationModel, LoadedAdapter]],
    ) -> None:
        self.request, self.known = request, known
        self.choice = choose_device(request.device, request.precision)
        self._load_net, self._load_best = load_net, load_best
        self.evaluations = 0
        self.weights: dict[str, Any] = {}

    @torch.inference_mode()
    def __call__(self, ct: Volume, progress: Progress) -> tuple[np.ndarray, np.ndarray | None]:
        """Images of the CT's kind of number, and half the width of their interval."""
        restore = self._fast() if self.request.tier is LowDoseTier.FAST else self._best()
        count, strength = len(ct.array), self.request.strength
        whole = np.issubdtype(ct.array.dtype, np.integer)
        images = np.empty(ct.shape, np.int16 if whole else np.float32)
        intervals = np.empty(ct.shape, np.float32) if self.request.tier is LowDoseTier.FAST else None
        for first in range(0, count, _SLICES):
            progress.update(first / count, f"Reducing the noise of slice {first + 1} of {count}")
            part = np.arange(first, min(first + _SLICES, count))
            around = np.clip(part[:, None] + np.arange(-1, 2), 0, count - 1)
            hu = torch.from_numpy(ct.array[around].astype(np.float32)).clamp(min=AIR)
            correction, interval = restore(hu)
            taken = strength * self._fine(correction, ct.spacing[0])
            # Padding below the lowest HU is no image, and stays what it is.
            measured = ct.array[part].astype(np.float32)
            blended = np.where(measured < AIR, measured, measured + taken.numpy())
            images[part] = np.rint(blended) if whole else blended
            if intervals is not None and interval is not None:
                # What is left of the noise on purpose is known, pixel by pixel, and widens the interval.
                intervals[part] = (interval + (correction - taken).abs()).numpy()
        return images, intervals

    def _fine(self, correction: Tensor, pixel_mm: float) -> Tensor:
        """What of it is finer than what is kept."""
        sigma = self.request.kept_mm / _DEVIATIONS / pixel_mm
        if not sigma:
            return correction
        return correction - torch.from_numpy(ndimage.gaussian_filter(correction.numpy(), (0, sigma, sigma)))

    def _fast(self) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        network, card = self._load_net(self.request.weights_folder)
        network.to(self.choice.device)
        self._know(card)
        self.evaluations = 1
        factor = _NINETY * float(card.numbers.get(INTERVAL_FACTOR, 1.0)) * 1000
        told = torch.tensor([[self.known.sigma_hu], [self.known.fineness]], device=self.choice.device)

        def restore(hu: Tensor) -> tuple[Tensor, Tensor]:
            slices = (hu / 1000 + 1).to(self.choice.device)
            with self._precision():
                answer = network(slices, *told)
            return 1000 * (answer.images - slices[:, 1]).cpu(), factor * answer.scale.cpu()

        return restore

    def _best(self) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        model, loaded = self._load_best(self.request.weights_folder)
        if not isinstance(loaded.adapter, ColdRestorer):
            raise WeightError(f"The weight '{COLD_WEIGHT}' is no cold diffusion adapter; get it again.")
        model.to(self.choice.device)
        for card in (model.card, loaded.card):
            if card is not None:
                self._know(card)
        self.evaluations = loaded.adapter.diffusion.steps
        host = AdapterHost(model.network, batch=_SLICES, dtype=self.choice.dtype)
        host.add(COLD_WEIGHT, loaded)
        embedding = model.encoder.encode([Condition(WIDE)])

        def restore(hu: Tensor) -> tuple[Tensor, None]:
            height, width = hu.shape[-2:]
            shown = 2 * WIDE.apply(hu) - 1
            padded = F.pad(shown, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE), mode="replicate")
            answer = host.run(COLD_WEIGHT, padded, embedding)[:, 0, :height, :width].cpu()
            # The window ends at 1000 HU: what is brighter is corrected as what the backbone saw of it.
            return (answer - shown[:, 1]) * WIDE.width / 2, None

        return restore

    def _precision(self) -> torch.autocast:
        half = self.choice.dtype != torch.float32
        return torch.autocast(self.choice.device.type, self.choice.dtype if half else torch.bfloat16, enabled=half)

    def _know(self, card: Card) -> None:
        self.weights[card.name] = {"version": card.version, "sha256": card.sha256, "license": card.license}


def _warnings(request: LowDoseRequest, report: NoiseReport | None) -> list[str]:
    found = []
    if request.strength > 0:
        found.append(
            "Noise was reduced by a network: small contrasts may be weaker or missing. Compare with the CT as it was "
            "measured. Research use only, not for diagnosis."
        )
    if report is not None and report.is_blotchy:
        found.append(
            f"The noise that is left is coarser than it was (mean frequency {report.mean_after:.2f} instead of "
            f"{report.mean_before:.2f} per mm) and may look like lesions; lower the strength."
        )
    return found


def _provenance(request: LowDoseRequest, run: _Run, known: _Known) -> dict[str, Any]:
    dose = known.dose
    return {
        "product": f"LCTfound {LCTfoundLib.__version__}",
        "task": "noise reduction of low-dose CT",
        "tier": request.tier.value,
        "strength": request.strength,
        "kept from, mm": request.kept_mm,
        "noise": {
            "told to the net, HU": round(known.sigma_hu, 2),
            "known": request.sigma_hu is not None or request.dose is not None,
            "estimated, HU": None if dose is None else round(dose.noise.sigma_hu, 2),
            "tissue": None if dose is None else dose.noise.tissue.value,
            "fineness": round(known.fineness, 3),
        },
        "dose": None
        if dose is None
        else {
            "share": round(dose.fraction, 4),
            "from": round(dose.low, 4),
            "to": round(dose.high, 4),
            "of": "the given curve" if request.curve is not None else "1e5 photons a ray, 230 mm of water, 360 views",
        },
        "network evaluations a slice": run.evaluations,
        "weights": run.weights,
        "device": f"{run.choice.device} ({run.choice.name}), {run.choice.precision.value}",
        "versions": {name: version(name) for name in ("numpy", "torch")},
    }
