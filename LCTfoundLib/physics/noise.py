"""Photons that are counted and the electronics behind them: measurements at a dose, simulated or made noisier.

A ray of line integral y counts ``Poisson(n exp(-y)) + Normal(0, electronic noise)``, where n is what the tube, the
bow-tie filter and the tube current send along it (Whiting et al., Med. Phys. 33 (2006) 3290, with one energy). Every
draw comes from a generator that the caller seeds: the same one gives the same noise, on any device if it is the CPU's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import Beam
from LCTfoundLib.physics.hounsfield import WATER_PER_MM
from LCTfoundLib.physics.solvers import RampFilter, poisson_weights

__all__ = [
    "SHARP",
    "SOFT",
    "Dose",
    "Kernel",
    "add_image_noise",
    "bow_tie",
    "check_line_integrals",
    "colored_noise",
    "count_photons",
    "expected_noise_hu",
    "insert_noise",
    "line_integrals",
    "measure",
    "noise_transfer",
    "statistical_weights",
    "tube_current",
]

#: Channels averaged for a starved ray, narrowest first.
_WIDTHS = (3, 5, 9, 17)
#: A count this many standard deviations from what can be is no noise.
_SIGMAS = 8.0
#: Air calibrations drift by less than this share.
_DRIFT = 0.2
#: More than the line integral of a meter of water, and less than that of air under any noise of a usable scan.
_DENSEST, _EMPTIEST = 20.0, -3.0


@dataclass(frozen=True)
class Kernel:
    """A reconstruction kernel: the window of filtered back-projection, which shapes detail and noise alike.

    Attributes:
        ramp: window of the ramp filter.
        cutoff: highest frequency kept, as a share of what the channels can carry; 0-1.
    """

    ramp: RampFilter
    cutoff: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ramp", RampFilter(self.ramp))
        if not 0 < self.cutoff <= 1:
            raise ValueError(f"cutoff {self.cutoff} must be above 0 and at most 1")

    def transfer(self, frequency: Tensor, pitch_mm: float) -> Tensor:
        """Share of the detail kept at frequencies (1/mm) for channels that are ``pitch_mm`` apart at the isocenter."""
        share = frequency.abs() * (2 * pitch_mm) / self.cutoff
        return self.ramp.window(share.clamp(max=1)) * (share <= 1)


#: As for soft tissue (the B30f and Standard kind), and as for lung (B70f, Lung): at channels of 0.7 mm half of the
#: detail is left at 0.29 and 0.71 per mm.
SOFT = Kernel(RampFilter.HANN, 0.8)
SHARP = Kernel(RampFilter.RAM_LAK)


@dataclass(frozen=True)
class Dose:
    """What a scan sends along its rays and how it is read out.

    Attributes:
        photons: of an unattenuated central ray at the full dose.
        fraction: of the full dose; above 0.
        electronic_noise: standard deviation, in photons; the same at every dose.
        bow_tie: share of the central ray's photons by channel, as :func:`bow_tie` makes it; empty: all alike.
        kernel: that the images are reconstructed with; the counts do not depend on it.

    Raises:
        ValueError: no such dose.
    """

    photons: float = 1e5
    fraction: float = 1.0
    electronic_noise: float = 10.0
    bow_tie: tuple[float, ...] = ()
    kernel: Kernel = SOFT

    def __post_init__(self) -> None:
        object.__setattr__(self, "bow_tie", tuple(float(share) for share in self.bow_tie))
        if not (_is_positive(self.photons) and _is_positive(self.fraction)):
            raise ValueError(f"{self.photons} photons at a fraction of {self.fraction}: both must be above 0")
        if not (math.isfinite(self.electronic_noise) and self.electronic_noise >= 0):
            raise ValueError(f"electronic noise of {self.electronic_noise} photons must not be negative")
        if not all(map(_is_positive, self.bow_tie)):
            raise ValueError("a bow-tie filter lets some of each channel's photons through: all above 0")

    def at(self, fraction: float) -> Dose:
        """The same scan at another fraction of the full dose."""
        return replace(self, fraction=fraction)

    def unattenuated(self, like: Tensor, current: Tensor | None = None) -> Tensor:
        """Photons of each ray in air, ready to be multiplied with sinograms like this one.

        Args:
            like: (..., views, detectors).
            current: factors of the tube current, (views,) or (..., views).

        Raises:
            UnsuitableProjections: bow-tie or current are those of another scan.
        """
        photons = torch.full_like(like[..., :1, :1], self.photons * self.fraction)
        if self.bow_tie:
            if len(self.bow_tie) != like.shape[-1]:
                raise UnsuitableProjections(
                    f"The bow-tie filter is given for {len(self.bow_tie)} channels and the sinogram has "
                    f"{like.shape[-1]}; make it for the sinogram's beam."
                )
            photons = photons * torch.tensor(self.bow_tie, dtype=like.dtype, device=like.device)
        if current is not None:
            if current.shape[-1] != like.shape[-2] or not (current > 0).all():
                raise UnsuitableProjections(
                    f"The tube current is given for {current.shape[-1]} views and the sinogram has {like.shape[-2]}; "
                    "give a factor above 0 for each view."
                )
            photons = photons * current[..., None].to(like)
        return photons


def bow_tie(beam: Beam, radius_mm: float = 160.0, strength: float = 0.4) -> tuple[float, ...]:
    """A bow-tie filter's profile, for :attr:`Dose.bow_tie`.

    The ideal filter adds what a centered cylinder of water lacks at each ray, so that all rays are attenuated alike;
    real ones fill a part of it (Boone, Med. Phys. 37 (2010) 40).

    Args:
        beam: its channels.
        radius_mm: of the cylinder.
        strength: 0 no filter, 1 the ideal one.

    Returns:
        Share of the central ray's photons, one for each channel; beside the cylinder as at its rim.
    """
    _, distances = beam.rays(slice(0, 1))
    across = torch.as_tensor(distances[0].copy()).abs().clamp(max=radius_mm)
    lacking = 2 * (radius_mm - torch.sqrt(radius_mm**2 - across**2))
    return tuple(torch.exp(-strength * WATER_PER_MM * lacking).tolist())


def tube_current(sinograms: Tensor, strength: float = 1.0) -> Tensor:
    """Factors of the tube current that follow the patient's width, view by view, at the same total dose.

    Least noise for a dose needs a current in proportion to the root of the view's attenuation, exp(y / 2) (Gies et
    al., Med. Phys. 26 (1999) 2235); y is the view's densest ray.

    Args:
        sinograms: line integrals (..., views, detectors).
        strength: 0 constant, 1 that optimum.

    Returns:
        (..., views), on average 1.
    """
    exponent = strength * sinograms.amax(-1) / 2
    factor = torch.exp(exponent - exponent.amax(-1, keepdim=True))
    return factor / factor.mean(-1, keepdim=True)


def count_photons(
    sinograms: Tensor, dose: Dose, generator: torch.Generator | None = None, current: Tensor | None = None
) -> Tensor:
    """What the detector counts, with Poisson and electronic noise; may be negative.

    Args:
        sinograms: line integrals (..., views, detectors).
        dose: of the scan.
        generator: of the noise.
        current: factors of the tube current, as of :func:`tube_current`.

    Returns:
        Photons, of the sinograms' shape.

    Raises:
        UnsuitableProjections: these are no line integrals, or dose and scan do not match.
    """
    check_line_integrals(sinograms)
    expected = dose.unattenuated(sinograms, current) * torch.exp(-sinograms)
    drawn = expected.to(_device(generator, expected))
    counts = torch.poisson(drawn, generator=generator)
    if dose.electronic_noise:
        counts = counts + dose.electronic_noise * _normal(counts, generator)
    return counts.to(sinograms.device)


def line_integrals(
    counts: Tensor,
    unattenuated: Tensor | float,
    electronic_noise: float = 0.0,
    saturation: float | None = None,
) -> Tensor:
    """Line integrals of counts: log(n / count), with neighbors' help where too few photons arrived.

    A ray with less than the electronic noise, or one photon, says little but that it is dense, and its logarithm does
    not exist or is far off. It takes the mean of 3, 5, 9 or 17 channels, the fewest that reach this threshold, as
    trimmed-mean filters do (Hsieh, Med. Phys. 25 (1998) 2139); what even 17 do not reach is held at one photon. At 16
    expected photons and electronic noise of 10, the line integral is off by -0.11 on average and by 0.36 (standard
    deviation); with counts held at one photon instead, by +0.30 and 0.99. From 100 photons on nothing is touched.

    Args:
        counts: (..., views, detectors), photons.
        unattenuated: of each ray in air, a number or what broadcasts to the counts (:meth:`Dose.unattenuated`).
        electronic_noise: standard deviation, in photons.
        saturation: the detector's ceiling, if there is one.

    Raises:
        UnsuitableProjections: counts that no noise explains: no numbers, far below zero, at the ceiling, more than in
            air.
    """
    unattenuated = torch.as_tensor(unattenuated, dtype=counts.dtype, device=counts.device)
    _check_counts(counts, unattenuated, electronic_noise, saturation)
    threshold = max(1.0, electronic_noise)
    # Bow-tie and tube current differ from ray to ray: neighbors are averaged as shares of their unattenuated photons.
    share = _starved_replaced(counts / unattenuated, threshold / unattenuated)
    return -torch.log(torch.maximum(share, 1 / unattenuated))


def measure(
    sinograms: Tensor, dose: Dose, generator: torch.Generator | None = None, current: Tensor | None = None
) -> Tensor:
    """Line integrals as a scan at this dose measures them: :func:`count_photons`, then :func:`line_integrals`."""
    counts = count_photons(sinograms, dose, generator, current)
    return line_integrals(counts, dose.unattenuated(sinograms, current), dose.electronic_noise)


def insert_noise(
    sinograms: Tensor,
    measured: Dose,
    fraction: float,
    generator: torch.Generator | None = None,
    current: Tensor | None = None,
) -> Tensor:
    """Line integrals measured at one dose as a scan at a lower dose would have measured them.

    Only the noise that is missing is added, so that the whole has the lower dose's. As in Zeng et al. (IEEE Trans.
    Nucl. Sci. 62 (2015) 2226) the counts are scaled and, as there and in Yu et al. (J. Comput. Assist. Tomogr. 36
    (2012) 477), quantum and electronic noise are topped up. The quantum part is drawn by thinning instead of from a
    normal distribution: every counted photon is kept with the probability of the doses' ratio, which turns a Poisson
    count into the Poisson count of the lower dose, exactly, also where few photons are left.

    Args:
        sinograms: measured line integrals (..., views, detectors).
        measured: the dose they were measured at.
        fraction: of the full dose, wanted; at most the measured one.
        generator: of the noise.
        current: factors of the tube current in both.

    Returns:
        Line integrals, of the sinograms' shape.

    Raises:
        UnsuitableProjections: these are no line integrals, or dose and scan do not match.
        ValueError: a higher dose is wanted.
    """
    check_line_integrals(sinograms)
    ratio = fraction / measured.fraction
    if not 0 < ratio <= 1:
        raise ValueError(f"noise can be added but not taken away: fraction {fraction} of {measured.fraction}")
    if ratio == 1:
        return sinograms.clone()
    wanted = measured.at(fraction)
    counts = measured.unattenuated(sinograms, current) * torch.exp(-sinograms)
    counts = counts.to(_device(generator, counts))
    whole = counts.round().clamp(min=0)
    thinned = torch.binomial(whole, torch.full_like(whole, ratio), generator=generator)
    # What is left of the rounding is scaled without noise.
    low = thinned + ratio * (counts - whole)
    low = low + measured.electronic_noise * math.sqrt(1 - ratio**2) * _normal(low, generator)
    low = low.to(sinograms.device)
    return line_integrals(low, wanted.unattenuated(sinograms, current), wanted.electronic_noise)


def statistical_weights(sinograms: Tensor, dose: Dose, current: Tensor | None = None) -> Tensor:
    """Inverse variances of measured line integrals, for the weights of the solvers; of the sinograms' shape."""
    return poisson_weights(sinograms, dose.unattenuated(sinograms, current), dose.electronic_noise)


def check_line_integrals(sinograms: Tensor) -> None:
    """Refuse what cannot be line integrals.

    Raises:
        UnsuitableProjections: no numbers, or values of no patient.
    """
    broken = int((~sinograms.isfinite()).sum())
    if broken:
        raise UnsuitableProjections(
            f"{broken} of {sinograms.numel()} values of the sinogram are no numbers; leave their views out or export "
            "the sinogram again."
        )
    low, high = (float(end) for end in sinograms.aminmax()) if sinograms.numel() else (0.0, 0.0)
    if low < _EMPTIEST or high > _DENSEST:
        raise UnsuitableProjections(
            f"The sinogram holds values from {low:.4g} to {high:.4g}, and line integrals of a patient lie between 0 "
            f"and {_DENSEST:.0f}; give log(air / counts), of attenuation per mm."
        )


def _check_counts(counts: Tensor, unattenuated: Tensor, noise: float, saturation: float | None) -> None:
    if not (unattenuated.isfinite().all() and (unattenuated > 0).all()):
        raise UnsuitableProjections("The air scan has channels without photons; measure it again or leave them out.")
    if not counts.isfinite().all():
        broken = int((~counts.isfinite()).sum())
        raise UnsuitableProjections(
            f"{broken} of {counts.numel()} counts are no numbers; leave their views out or export them again."
        )
    if not counts.numel():
        return
    if saturation is not None and (counts >= saturation).any():
        share = float((counts >= saturation).double().mean())
        raise UnsuitableProjections(
            f"{share:.2%} of the counts reach the detector's ceiling of {saturation:.6g}, where thickness can no "
            "longer be told; leave those views out or scan with less tube current."
        )
    lowest = float(counts.min())
    if lowest < -_SIGMAS * max(noise, 1.0):
        raise UnsuitableProjections(
            f"Counts fall to {lowest:.4g}, below what electronic noise of {noise:.4g} explains; subtract the dark "
            "signal, give the electronic noise, or say that these are line integrals."
        )
    most = unattenuated * (1 + _DRIFT) + _SIGMAS * torch.sqrt(unattenuated + noise**2)
    if (counts > most).any():
        share = float((counts > most).double().mean())
        raise UnsuitableProjections(
            f"{share:.2%} of the counts exceed those of air by more than noise and drift explain; give the air scan "
            "that belongs to these projections."
        )


def _starved_replaced(share: Tensor, threshold: Tensor) -> Tensor:
    """Values below their threshold replaced by the mean of the fewest channels that reaches it, or of the most."""
    threshold = threshold.expand_as(share)
    starved = share < threshold
    if not starved.any():
        return share
    rows, found = share.reshape(-1, 1, share.shape[-1]), share.clone()
    for width in _WIDTHS:
        padded = F.pad(rows, (width // 2, width // 2), mode="replicate")
        mean = F.avg_pool1d(padded, width, 1).reshape(share.shape)
        found = torch.where(starved, mean, found)
        starved = starved & (mean < threshold)
    return found


def noise_transfer(frequency: Tensor, kernel: Kernel, pitch_mm: float) -> Tensor:
    """Amplitude of filtered back-projection's noise by frequency, up to a factor.

    The power of white noise in the channels comes out as ``f |G(f)|^2`` (Riederer, Pelc & Chesler, Phys. Med. Biol. 23
    (1978) 446), where G is the kernel's window and the interpolation between channels.

    Args:
        frequency: 1/mm, radial, of any shape.
        kernel: of the reconstruction.
        pitch_mm: between channels at the isocenter.
    """
    interpolation = torch.sinc(frequency * pitch_mm) ** 2
    return torch.sqrt(frequency.abs()) * kernel.transfer(frequency, pitch_mm) * interpolation


def colored_noise(
    shape: tuple[int, ...],
    pixel_mm: float,
    kernel: Kernel = SOFT,
    generator: torch.Generator | None = None,
    pitch_mm: float = 0.7,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise with the texture that a kernel gives it, for images without projections.

    It is alike everywhere and in all directions, and independent from slice to slice: a stand-in that knows nothing of
    the patient's streaks; :func:`measure` and a reconstruction do.

    Args:
        shape: (..., rows, columns).
        pixel_mm: edge of a pixel.
        kernel: of the reconstruction.
        generator: of the noise.
        pitch_mm: between channels at the isocenter.
        device: of the result; by default the generator's.

    Returns:
        float32, mean 0, standard deviation 1 (expected, not that of the draw).
    """
    at = _device(generator, torch.empty(0, device=device or "cpu"))
    rows, columns = shape[-2:]
    # Twice the size, cut: opposite edges of an image are no neighbors.
    size = (2 * rows, 2 * columns)
    across = torch.fft.fftfreq(size[0], pixel_mm, device=at)[:, None]
    along = torch.fft.fftfreq(size[1], pixel_mm, device=at)[None]
    amplitude = noise_transfer(torch.hypot(across, along), kernel, pitch_mm)
    amplitude = amplitude / amplitude.square().mean().sqrt()
    white = torch.randn((*shape[:-2], *size), generator=generator, device=at)
    noise = torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real
    return noise[..., :rows, :columns].contiguous().to(device or at)


def add_image_noise(
    hu: Tensor,
    sigma_hu: float | Tensor,
    pixel_mm: float,
    kernel: Kernel = SOFT,
    generator: torch.Generator | None = None,
    pitch_mm: float = 0.7,
) -> Tensor:
    """Images with :func:`colored_noise` of a given strength.

    Args:
        hu: (..., rows, columns).
        sigma_hu: standard deviation; a number, or what broadcasts to the images, as a map of the local noise.
        pixel_mm, kernel, generator, pitch_mm: as of :func:`colored_noise`.
    """
    noise = colored_noise(tuple(hu.shape), pixel_mm, kernel, generator, pitch_mm, hu.device)
    return hu + torch.as_tensor(sigma_hu, dtype=hu.dtype, device=hu.device) * noise.to(hu.dtype)


def expected_noise_hu(dose: Dose, path_mm: float, views: int, pitch_mm: float) -> float:
    """Noise in the middle of a water cylinder after filtered back-projection of parallel beams, closed form.

    ``pi^2 / views * pitch * int f^2 |W|^2 I df * var(y)`` (Brooks & Di Chiro, Med. Phys. 3 (1976) 237), with the
    kernel's window W and I, the noise that interpolation between channels leaves on average. For pixels small beside
    the channels and counts above some tens.

    Args:
        dose: with the kernel.
        path_mm: of water, along every ray through the middle.
        views: over a half turn.
        pitch_mm: between channels.

    Returns:
        Standard deviation, HU.
    """
    counts = dose.photons * dose.fraction * math.exp(-WATER_PER_MM * path_mm)
    variance = (counts + dose.electronic_noise**2) / counts**2
    frequency = torch.linspace(0, 0.5 / pitch_mm, 4001, dtype=torch.float64)
    left = (2 + torch.cos(2 * math.pi * frequency * pitch_mm)) / 3
    power = (frequency * dose.kernel.transfer(frequency, pitch_mm)).square() * left
    integral = 2 * float(torch.trapezoid(power, frequency))
    sigma = math.sqrt(math.pi**2 / views * pitch_mm * integral * variance)
    return 1000 * sigma / WATER_PER_MM


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _device(generator: torch.Generator | None, otherwise: Tensor) -> torch.device:
    """Where to draw: a generator draws on its own device only."""
    return otherwise.device if generator is None else generator.device


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
