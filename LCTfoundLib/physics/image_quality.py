"""What is left of an image after reconstruction or denoising: noise and its texture, edges, contrast of small lesions.

A smooth image has little noise and a high PSNR; whether it still shows a small lesion is another question. So the power
spectrum of the noise, the width of edges and the share of an inserted lesion's contrast that is kept stand beside it.
Lesions inserted here are synthetic: they measure a method and are no findings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from scipy import ndimage, optimize, stats
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.errors import UnsuitableImage

__all__ = [
    "STANDARD_LESIONS",
    "DoseEstimate",
    "Lesion",
    "LesionKind",
    "LesionShape",
    "NoiseCurve",
    "NoiseEstimate",
    "NoisePowerSpectrum",
    "Tissue",
    "TissueNoise",
    "contrast_recovery",
    "edge_width",
    "estimate_dose",
    "estimate_noise",
    "insert_lesion",
    "lesion_coverage",
    "lesion_places",
    "noise_power_spectrum",
]


# --- Noise power spectrum ---


@dataclass(frozen=True, eq=False)
class NoisePowerSpectrum:
    """How noise is shared out over frequencies.

    Attributes:
        power: HU^2 mm^2, float64 (size, size), the frequency 0 in the middle.
        frequency: 1/mm along rows and columns, float64 (size,), rising.
        radial_frequency, radial_power: of rings as wide as the frequencies' step, float64 (rings,), up to the highest
            frequency that all directions have.
        variance: mean square of the regions after trend removal, HU^2; the integral of ``power``, exactly.
        regions: number of them.
    """

    power: np.ndarray
    frequency: np.ndarray
    radial_frequency: np.ndarray
    radial_power: np.ndarray
    variance: float
    regions: int

    @property
    def step(self) -> float:
        """Of the frequencies, 1/mm."""
        return float(self.frequency[1] - self.frequency[0])

    @property
    def integral(self) -> float:
        """Of the power over the plane of frequencies, HU^2."""
        return float(self.power.sum() * self.step**2)

    @property
    def peak_frequency(self) -> float:
        """Of the strongest ring, 1/mm."""
        return float(self.radial_frequency[self.radial_power.argmax()])

    @property
    def mean_frequency(self) -> float:
        """Of the rings, by their power, 1/mm: falls when noise becomes blotchy (AAPM TG-233)."""
        return float((self.radial_frequency * self.radial_power).sum() / self.radial_power.sum())


def noise_power_spectrum(
    images: Tensor, pixel_mm: float, size: int = 32, mask: Tensor | None = None, order: int = 2
) -> NoisePowerSpectrum:
    """Noise power spectrum of square regions that overlap by half.

    Each region loses its trend, a polynomial fitted to it, which would pass for noise of low frequency (ICRU Report 87;
    Siewerdsen et al., Med. Phys. 29 (2002) 2655). Where there is anatomy, give the difference of two scans over the
    root of 2, or of an image and its noise-free twin.

    Args:
        images: HU of noise, or of something uniform; (..., rows, columns).
        pixel_mm: edge of a pixel.
        size: edge of a region, pixels.
        mask: bool, of the images' shape or (rows, columns); regions lie wholly inside.
        order: of the polynomial; 0 takes the mean alone.

    Raises:
        UnsuitableImage: no region fits.
    """
    rows, columns = images.shape[-2:]
    step = max(1, size // 2)
    regions = images.new_zeros(0, size, size)
    if min(rows, columns) >= size:
        regions = _windows(images.reshape(-1, rows, columns), size, step)
        if mask is not None:
            inside = _windows(mask.expand(images.shape).reshape(-1, rows, columns), size, step)
            regions = regions[inside.flatten(1).all(1)]
    if not len(regions):
        raise UnsuitableImage(
            f"No region of {size} x {size} pixels lies inside of the image's uniform part; use smaller regions or a "
            "larger uniform part."
        )
    noise = _without_trend(regions.double().flatten(1), _polynomials(size, order)).reshape(regions.shape)
    power = torch.fft.fft2(noise).abs().square().mean(0) * (pixel_mm / size) ** 2
    power_2d = torch.fft.fftshift(power).cpu().numpy()
    frequency = np.fft.fftshift(np.fft.fftfreq(size, pixel_mm))
    radius, radial = _radial(power_2d, frequency)
    return NoisePowerSpectrum(power_2d, frequency, radius, radial, float(noise.square().mean()), len(regions))


def _radial(power: np.ndarray, frequency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.hypot(frequency[:, None], frequency[None])
    ring = np.rint(radius / (frequency[1] - frequency[0])).astype(int)
    number, last = np.bincount(ring.ravel()), len(frequency) // 2
    mean = (np.bincount(ring.ravel(), values.ravel()) / number for values in (radius, power))
    frequencies, powers = (values[: last + 1] for values in mean)
    return frequencies, powers


def _windows(images: Tensor, size: int, step: int) -> Tensor:
    """Square windows (regions, size, size) of images (N, rows, columns)."""
    return images.unfold(-2, size, step).unfold(-2, size, step).reshape(-1, size, size)


def _polynomials(size: int, order: int) -> Tensor:
    """Orthonormal polynomials of a square up to an order, float64 (size^2, number)."""
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    terms = [(x**i * y**j).flatten() for i in range(order + 1) for j in range(order + 1 - i)]
    return torch.linalg.qr(torch.stack(terms, 1)).Q


def _without_trend(values: Tensor, basis: Tensor) -> Tensor:
    """Values (regions, pixels) less what the basis explains of them."""
    basis = basis.to(values)
    return values - (values @ basis) @ basis.T


# --- Noise and dose of an image ---


class Tissue(StrEnum):
    """Where a CT is flat enough to show its noise."""

    AIR = "air"
    LUNG = "lung"
    SOFT_TISSUE = "soft tissue"


#: HU of a patch's mean. Air ends where the lungs of emphysema begin; soft tissue leaves fat and contrast out.
_RANGES = {Tissue.AIR: (-1023.0, -965.0), Tissue.LUNG: (-940.0, -700.0), Tissue.SOFT_TISSUE: (0.0, 90.0)}
_TOLD_BY = (Tissue.SOFT_TISSUE, Tissue.LUNG, Tissue.AIR)
#: Edge of a patch: noise is coarser than a pixel, and flat tissue seldom wider.
_PATCH_MM, _FEWEST_PIXELS = 6.0, 7
#: The flattest patches show noise alone. Were all of them flat, each of these quantiles would tell the same noise; how
#: far they differ tells how much anatomy there is in them.
_QUANTILES = (0.1, 0.2, 0.35)
_FEWEST_PATCHES = 20
#: What taking the slope out of coarse noise takes of its standard deviation: 5 to 11 % with a soft kernel and pixels of
#: 1 to 0.5 mm, at most 2 % with a sharp one (measured).
_SLOPE = 0.05
#: Sure enough: 1 standard deviation, relative.
_SURE = 0.15


@dataclass(frozen=True)
class TissueNoise:
    """Noise of one tissue.

    Attributes:
        sigma_hu: standard deviation.
        patches: that it was seen in.
        uncertainty: relative standard deviation, of chance, of anatomy among the patches and of the method.
    """

    sigma_hu: float
    patches: int
    uncertainty: float

    @property
    def is_sure(self) -> bool:
        return self.uncertainty <= _SURE


@dataclass(frozen=True)
class NoiseEstimate:
    """Noise of an image.

    Attributes:
        tissue: that tells it: soft tissue if there is any, else lung, else air, whose noise tells least of the body's.
        by_tissue: all that there are.
    """

    tissue: Tissue
    by_tissue: Mapping[Tissue, TissueNoise]

    @property
    def sigma_hu(self) -> float:
        return self.by_tissue[self.tissue].sigma_hu

    @property
    def uncertainty(self) -> float:
        """Relative standard deviation."""
        return self.by_tissue[self.tissue].uncertainty

    @property
    def is_sure(self) -> bool:
        return self.by_tissue[self.tissue].is_sure


def estimate_noise(images: Tensor, pixel_mm: float) -> NoiseEstimate:
    """Noise of CT images from their flat patches, without anything to tune.

    Patches of 6 mm lose their slope. Among those of one tissue the flattest show noise alone; their variances are read
    as low quantiles of a chi-square distribution, whose degrees of freedom follow from how the noise correlates, so
    that picking the flattest makes no noise smaller. The noise of lungs includes their finest vessels.

    Noise of 10, 30 and 100 HU added to nine real slices was found as 9.8 to 10.9, 27.6 to 32.5 and 89.5 to 104.6 HU
    beside what they had before (soft and sharp kernel; in soft tissue).

    Args:
        images: HU, (rows, columns) or (N, rows, columns).
        pixel_mm: edge of a pixel.

    Raises:
        UnsuitableImage: nothing flat in it.
    """
    size = max(_FEWEST_PIXELS, round(_PATCH_MM / pixel_mm))
    planes = images.reshape(-1, *images.shape[-2:])
    found = {}
    if min(planes.shape[-2:]) >= size:
        patches = _windows(planes, size, max(1, size // 2)).flatten(1)
        patches = patches[~_is_clipped(patches, planes)]
        means = patches.mean(1)
        for tissue, (low, high) in _RANGES.items():
            chosen = patches[(means > low) & (means < high)]
            if len(chosen) >= _FEWEST_PATCHES:
                found[tissue] = _noise_of(chosen.double(), size)
    if not found:
        raise UnsuitableImage(
            "The images have too little flat air, lung or soft tissue to tell their noise; give whole slices of a "
            "chest CT in HU, or state the dose."
        )
    return NoiseEstimate(next(tissue for tissue in _TOLD_BY if tissue in found), found)


def _is_clipped(patches: Tensor, images: Tensor) -> Tensor:
    """Patches where values stick to the images' lowest, as padding and air clipped at -1024 do."""
    return (patches <= images.min()).double().mean(1) > 0.02


def _noise_of(patches: Tensor, size: int) -> TissueNoise:
    basis = _polynomials(size, 1)
    noise = _without_trend(patches, basis)
    variances = noise.square().sum(1) / (noise.shape[1] - basis.shape[1])
    flattest = noise[variances <= variances.median()].reshape(-1, size, size)
    freedom = _degrees_of_freedom(flattest)
    quantiles = np.quantile(variances.cpu().numpy(), _QUANTILES)
    expected = stats.chi2.ppf(_QUANTILES, freedom) / freedom
    sigmas = np.sqrt(quantiles / expected)
    chance = _error_of_quantile(_QUANTILES[1], freedom, len(patches))
    anatomy = float(sigmas.max() - sigmas.min()) / 2 / max(float(sigmas.mean()), 1e-12)
    return TissueNoise(float(sigmas[1]), len(patches), math.hypot(chance, anatomy, _SLOPE))


def _degrees_of_freedom(noise: Tensor) -> float:
    """Of the variance of correlated values in a patch: n^2 over the sum of all pairs' squared correlations."""
    size = noise.shape[-1]
    spectrum = torch.fft.fft2(noise, s=(2 * size, 2 * size)).abs().square().mean(0)
    sums = torch.fft.ifft2(spectrum).real
    lag = torch.fft.fftfreq(2 * size, 1 / (2 * size), dtype=torch.float64, device=noise.device)
    pairs = (size - lag.abs()[:, None]) * (size - lag.abs()[None])
    # The sums over pairs, of which those of lag 0 are n times the variance.
    correlations = torch.where(pairs > 0, sums / pairs.clamp(min=1), 0) / (sums[0, 0] / size**2).clamp(min=1e-12)
    freedom = size**4 / float((pairs * correlations**2).sum().clamp(min=1e-12))
    return min(max(freedom, 2.0), size**2 - 3.0)


def _error_of_quantile(quantile: float, freedom: float, number: int) -> float:
    """Relative standard error of a standard deviation read from a quantile of ``number`` variances."""
    value = stats.chi2.ppf(quantile, freedom)
    # Patches overlap by half: a quarter of them are independent.
    error = math.sqrt(quantile * (1 - quantile) / (number / 4)) / stats.chi2.pdf(value, freedom)
    return float(error / value / 2)


@dataclass(frozen=True)
class NoiseCurve:
    """Noise by dose: ``sigma^2 = quantum / fraction + electronic / fraction^2``.

    It holds for one kernel, slice thickness, tissue and patient size.

    Attributes:
        quantum, electronic: HU^2 at the full dose.
    """

    quantum: float
    electronic: float = 0.0

    def __post_init__(self) -> None:
        if not (self.quantum >= 0 and self.electronic >= 0 and self.quantum + self.electronic > 0):
            raise ValueError(f"variances of {self.quantum} and {self.electronic} HU^2 make no noise")

    @classmethod
    def fit(cls, fractions: Sequence[float], sigmas_hu: Sequence[float]) -> NoiseCurve:
        """The curve through measured noise, least squares of relative errors.

        Args:
            fractions: of the full dose.
            sigmas_hu: at each.
        """
        dose, variance = np.asarray(fractions, float), np.asarray(sigmas_hu, float) ** 2
        columns = np.stack([1 / dose, 1 / dose**2], 1) / variance[:, None]
        (quantum, electronic), _ = optimize.nnls(columns, np.ones(len(dose)))
        return cls(float(quantum), float(electronic))

    def sigma_hu(self, fraction: float) -> float:
        return math.sqrt(self.quantum / fraction + self.electronic / fraction**2)

    def fraction(self, sigma_hu: float) -> float:
        """Of the full dose, that has this noise."""
        variance = max(sigma_hu, 1e-6) ** 2
        return (self.quantum + math.sqrt(self.quantum**2 + 4 * variance * self.electronic)) / (2 * variance)


@dataclass(frozen=True)
class DoseEstimate:
    """The dose that an image looks like.

    Attributes:
        fraction: of the curve's full dose.
        low, high: within which it lies with about 95 %.
        noise: that it was told by.
    """

    fraction: float
    low: float
    high: float
    noise: NoiseEstimate

    @property
    def is_sure(self) -> bool:
        return self.noise.is_sure


def estimate_dose(images: Tensor, pixel_mm: float, curve: NoiseCurve) -> DoseEstimate:
    """The share of the full dose at which images have the noise that these have.

    It is an equivalent dose, of this curve's kernel, thickness and patient size, not what the scanner gave.

    Args:
        images: HU, (rows, columns) or (N, rows, columns).
        pixel_mm: edge of a pixel.
        curve: measured with :func:`estimate_noise` too.

    Raises:
        UnsuitableImage: nothing flat in it.
    """
    noise = estimate_noise(images, pixel_mm)
    width = min(2 * noise.uncertainty, 0.9)
    ends = (curve.fraction(noise.sigma_hu * (1 + side * width)) for side in (1, -1))
    low, high = ends
    return DoseEstimate(curve.fraction(noise.sigma_hu), low, high, noise)


# --- Edges ---


def edge_width(
    images: Tensor, pixel_mm: float, center: tuple[float, float], radius_mm: float, reach_mm: float = 6.0
) -> float:
    """Distance over which a round object's edge rises from 10 to 90 %.

    All pixels around the edge make one finely sampled profile, as a circle crosses the pixels' grid everywhere (Richard
    et al., Med. Phys. 39 (2012) 4115). A Gaussian blur of sigma makes it 2.56 sigma wide.

    Args:
        images: (rows, columns) or (N, rows, columns), averaged.
        pixel_mm: edge of a pixel.
        center: row and column of the object's center, pixels.
        radius_mm: of the object.
        reach_mm: looked at on each side of the edge; at most the radius.

    Returns:
        mm.

    Raises:
        UnsuitableImage: no edge there, or noise hides it.
    """
    image = images.reshape(-1, *images.shape[-2:]).double().mean(0).cpu().numpy()
    rows, columns = np.indices(image.shape)
    distance = np.hypot(rows - center[0], columns - center[1]) * pixel_mm - radius_mm
    near = np.abs(distance) <= min(reach_mm, radius_mm)
    step = pixel_mm / 4
    bins = np.floor(distance[near] / step).astype(int)
    bins -= bins.min()
    number = np.bincount(bins)
    place, profile = (np.bincount(bins, values[near])[number > 0] / number[number > 0] for values in (distance, image))
    inside, outside = profile[place < place[0] / 2].mean(), profile[place > place[-1] / 2].mean()
    rise = (profile - inside) / (outside - inside) if outside != inside else np.zeros_like(profile)
    # Ringing leaves 0-1 on both sides; the edge is where the middle is crossed.
    middle = int(np.argmin(np.abs(place))) if len(place) else 0
    low, high = _crossing(place, rise, 0.1, middle, -1), _crossing(place, rise, 0.9, middle, 1)
    if low is None or high is None or not high > low:
        raise UnsuitableImage(
            "There is no clear edge at the given circle; check its center and radius, or average more images."
        )
    return high - low


def _crossing(place: np.ndarray, rise: np.ndarray, level: float, start: int, way: int) -> float | None:
    """Where the profile passes the level first on the way from the edge's middle."""
    index = start
    # From the half height, wherever around the start that lies.
    while 0 <= index < len(rise) and (rise[index] - 0.5) * way > 0:
        index -= way
    while 0 <= index < len(rise) and (rise[index] - level) * way < 0:
        index += way
    before = index - way
    if not (0 <= index < len(rise) and 0 <= before < len(rise)):
        return None
    share = (level - rise[before]) / (rise[index] - rise[before])
    return float(place[before] + share * (place[index] - place[before]))


# --- Lesions ---


class LesionKind(StrEnum):
    """What a lesion does to the tissue it lies in."""

    #: Adds its contrast everywhere.
    SOLID = "solid"
    #: Replaces air in the lung; vessels in it stay as they are.
    GROUND_GLASS = "ground glass"


class LesionShape(StrEnum):
    SPHERE = "sphere"
    #: The same circle in all slices: for single slices and for stacks of unrelated ones.
    DISK = "disk"


@dataclass(frozen=True)
class Lesion:
    """A synthetic lesion.

    Attributes:
        diameter_mm: of the sphere or disk.
        contrast_hu: over its surroundings, for ground glass over a lung of -850 HU.
        kind, shape: of it.
    """

    diameter_mm: float
    contrast_hu: float
    kind: LesionKind = LesionKind.SOLID
    shape: LesionShape = LesionShape.SPHERE

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", LesionKind(self.kind))
        object.__setattr__(self, "shape", LesionShape(self.shape))
        if not (self.diameter_mm > 0 and math.isfinite(self.contrast_hu)):
            raise ValueError(f"no lesion of {self.diameter_mm} mm and {self.contrast_hu} HU")

    @property
    def tissue(self) -> Tissue:
        """Where it is looked for."""
        return Tissue.LUNG if self.kind is LesionKind.GROUND_GLASS else Tissue.SOFT_TISSUE


#: What a low-dose method is measured with.
STANDARD_LESIONS = tuple(
    Lesion(diameter, contrast, kind)
    for diameter in (4.0, 8.0, 15.0)
    for contrast, kind in ((20.0, LesionKind.SOLID), (50.0, LesionKind.SOLID), (200.0, LesionKind.GROUND_GLASS))
)
#: HU of the lung that a ground glass lesion's contrast refers to.
_LUNG_HU = -850.0
#: Points for each axis of a voxel whose share in the lesion is counted.
_FINE = 5


def lesion_coverage(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], lesion: Lesion, center: Sequence[float]
) -> Tensor:
    """Share of each voxel that a lesion fills, with partial volumes at its edge.

    Args:
        shape: slices, rows, columns.
        spacing_mm: between slices, rows, columns; voxels fill the space between their neighbors.
        lesion: its diameter and shape.
        center: slice, row, column; between voxels too.

    Returns:
        float32 of the shape, 0-1.
    """
    coverage, radius = torch.zeros(shape), lesion.diameter_mm / 2
    axes, box = [], []
    for axis, (length, spacing, middle) in enumerate(zip(shape, spacing_mm, center, strict=True)):
        reach = radius / spacing + 1
        low, high = max(0, math.floor(middle - reach)), min(length, math.ceil(middle + reach) + 1)
        if axis == 0 and lesion.shape is LesionShape.DISK:
            low, high = 0, length
        if low >= high:
            return coverage
        fine = (torch.arange((high - low) * _FINE, dtype=torch.float64) + 0.5) / _FINE - 0.5 + low
        distance = (fine - middle) * spacing
        axes.append(distance * 0 if axis == 0 and lesion.shape is LesionShape.DISK else distance)
        box.append(slice(low, high))
    z, y, x = (distance.square() for distance in axes)
    inside = (z[:, None, None] + y[:, None] + x <= radius**2).float()
    coverage[tuple(box)] = F.avg_pool3d(inside[None, None], _FINE)[0, 0]
    return coverage


def insert_lesion(
    images: Tensor, spacing_mm: tuple[float, float, float], lesion: Lesion, center: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Images with a lesion, and what was added.

    Insert it into the images that a scan is simulated from, not behind the noise.

    Args:
        images: HU, (slices, rows, columns).
        spacing_mm: between slices, rows, columns.
        lesion: to insert.
        center: slice, row, column.

    Returns:
        Both of the images' shape.
    """
    slices, rows, columns = images.shape
    added = lesion.contrast_hu * lesion_coverage((slices, rows, columns), spacing_mm, lesion, center).to(images)
    if lesion.kind is LesionKind.GROUND_GLASS:
        # In proportion to the air there is to replace.
        added = added * (images / _LUNG_HU).clamp(0, 1)
    return images + added, added


def lesion_places(
    images: Tensor,
    spacing_mm: tuple[float, float, float],
    lesion: Lesion,
    number: int,
    generator: torch.Generator | None = None,
    margin_mm: float = 2.0,
) -> list[tuple[int, int, int]]:
    """Random places where a lesion lies in its tissue with nothing else, and apart from the others.

    Args:
        images: HU, (slices, rows, columns), with little noise.
        spacing_mm: between slices, rows, columns.
        lesion: to place.
        number: of places wanted.
        generator: of the choice.
        margin_mm: of tissue around the lesion.

    Returns:
        Slice, row, column of each; fewer than wanted, or none, where there is no room.
    """
    low, high = _RANGES[lesion.tissue]
    spacing, radius = np.asarray(spacing_mm, float), lesion.diameter_mm / 2 + margin_mm
    if lesion.shape is LesionShape.DISK:
        spacing[0] = 1e3  # its slices are unrelated
    blur = (0.0, 1.5 / spacing[1], 1.5 / spacing[2])
    smooth = ndimage.gaussian_filter(images.detach().cpu().numpy().astype(np.float32), blur)
    # Beyond the images nothing is known: a border of other tissue all around, but for slices that are unrelated.
    around = [(int(lesion.shape is LesionShape.SPHERE),) * 2, (1, 1), (1, 1)]
    inside = np.pad((smooth > low) & (smooth < high), around)
    depth = ndimage.distance_transform_edt(inside, sampling=tuple(spacing))
    free = np.argwhere(depth >= radius) - [before for before, _ in around]
    order = torch.randperm(len(free), generator=generator, device=generator.device if generator else "cpu").cpu()
    places: list[tuple[int, int, int]] = []
    for index in order.tolist():
        if len(places) == number:
            break
        offsets = (np.array(places).reshape(-1, 3) - free[index]) * spacing
        if not (np.linalg.norm(offsets, axis=1) < 2 * radius).any():
            k, j, i = (int(value) for value in free[index])
            places.append((k, j, i))
    return places


def contrast_recovery(with_lesion: Tensor, without: Tensor, added: Tensor) -> float:
    """Share of an inserted lesion's contrast that a method keeps.

    The method sees the same scan twice, with the same noise, with and without the lesion. The difference of what it
    makes of them is fitted by what was inserted (least squares), so that neither noise nor anatomy count: 1 all kept,
    0 wiped out; blur beyond the lesion's own edge counts as loss.

    Args:
        with_lesion, without: the method's images, of one shape.
        added: what was inserted, of the same shape.

    Raises:
        UnsuitableImage: nothing was inserted.
    """
    template = added.double()
    energy = float(template.square().sum())
    if energy == 0:
        raise UnsuitableImage("No lesion was inserted there; choose a place inside of the image.")
    return float(((with_lesion.double() - without.double()) * template).sum() / energy)
