"""From sinograms to images without a network: filtered back-projection, conjugate gradients, SIRT, total variation.

Images are attenuation per mm, (..., rows, columns), sinograms line integrals, (..., views, detectors), with the same
leading axes; the iterative solvers treat each slice as a problem of its own (its own step sizes and stopping), work
for any linear operator and are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.errors import UnsuitableProjections
from LCTfoundLib.physics.geometry import Detector, FanBeam
from LCTfoundLib.physics.projector import Projector

__all__ = [
    "LinearOperator",
    "RampFilter",
    "conjugate_gradient",
    "filtered_back_projection",
    "poisson_weights",
    "relative_residual",
    "sirt",
    "total_variation",
    "total_variation_objective",
    "total_variation_reconstruction",
]

#: Told the share of the iterations done, 0-1, after each; what it raises stops the solver, as ``runtime.Progress``
#: does when the user cancels.
Hook = Callable[[float], object]

#: Filtered back-projection bridges a gap between views up to this angle (radians); with a wider one it would distort
#: the image without a sign.
_WIDEST_GAP = math.radians(50)
#: Fans with a gap from this angle on, and no other, are a short scan: bridging 20 degrees errs by 37 HU, a short scan's
#: weights by 9; at 2 degrees it is 2 and 8.
_SHORT_GAP = math.radians(10)
#: Weight of the gradient against the rays in the steps of total variation. On a chest slice of 256 x 256 with 16 and 64
#: views, 0.3 came nearest to the optimum in 200 iterations, of 0.03 to 3.
_GRADIENT_SCALE = 0.3


class LinearOperator(Protocol):
    """A matrix without negative entries and its transpose, over the last two axes."""

    def forward(self, images: Tensor, /) -> Tensor: ...

    def adjoint(self, sinograms: Tensor, /) -> Tensor: ...


class RampFilter(StrEnum):
    """What the ramp of filtered back-projection is multiplied with, from sharp to soft."""

    RAM_LAK = "ram-lak"
    SHEPP_LOGAN = "shepp-logan"
    COSINE = "cosine"
    HANN = "hann"

    def window(self, frequency: Tensor) -> Tensor:
        """Of frequencies as shares of the highest, 0-1."""
        match self:
            case RampFilter.SHEPP_LOGAN:
                return torch.sinc(frequency / 2)
            case RampFilter.COSINE:
                return torch.cos(math.pi / 2 * frequency)
            case RampFilter.HANN:
                return (1 + torch.cos(math.pi * frequency)) / 2
            case _:
                return torch.ones_like(frequency)


def filtered_back_projection(
    projector: Projector, sinograms: Tensor, ramp: RampFilter = RampFilter.RAM_LAK, cutoff: float = 1.0
) -> Tensor:
    """Filtered back-projection of parallel and fan beams (Kak & Slaney, chapter 3), linear interpolation.

    Each view counts for the angle it stands for, so that uneven or single missing views tilt no values; streaks between
    sparse views remain. Fans over less than a full turn, but over a half turn and the fan's own angle at least, are a
    short scan, in which rays that were measured twice share their weight (Parker, Med. Phys. 9 (1982) 254).

    Args:
        projector: for its grid and beam.
        sinograms: (..., views, detectors).
        ramp: window of the ramp filter.
        cutoff: highest frequency kept, as a share of what the channels can carry.

    Returns:
        (..., rows, columns), per mm; differentiable.

    Raises:
        UnsuitableProjections: sinograms do not match, hold no numbers, or the views leave too wide a gap.
    """
    _check(projector, sinograms)
    if not 0 < cutoff <= 1:
        raise ValueError(f"cutoff {cutoff} must be above 0 and at most 1")
    beam = projector.beam
    shares = beam.view_weights
    flat = sinograms.reshape(-1, *beam.shape)
    # Few views are far apart, and no view is missing.
    usual = 1.5 * beam.turn / beam.views
    short = _short_scan(beam) if isinstance(beam, FanBeam) and beam.widest_gap > max(_SHORT_GAP, usual) else None
    if short is not None:
        weights, shares = short
        flat = flat * torch.from_numpy(weights).to(flat)
    elif beam.widest_gap > min(max(_WIDEST_GAP, usual), 0.75 * beam.turn):
        raise UnsuitableProjections(
            f"The views leave a gap of {math.degrees(beam.widest_gap):.0f} degrees, too wide for filtered "
            "back-projection; reconstruct with total variation or conjugate gradients instead."
        )
    images = _BackProjection(projector, flat, shares).of(_filtered(projector, flat, ramp, cutoff))
    return images.reshape(*sinograms.shape[:-2], *projector.image_shape)


def _short_scan(beam: FanBeam) -> tuple[np.ndarray, np.ndarray] | None:
    """Parker's weights of the rays, twice over, (views, detectors), and the angle that each view stands for, (views,).

    None if some rays were not measured from either side, or views within the scan are missing.
    """
    order, gaps = beam.gaps()
    last = int(gaps.argmax())
    order, steps = np.roll(order, -last - 1), np.delete(np.roll(gaps, -last - 1), -1)
    if len(steps) < 2 or steps.max() > 1.5 * np.median(steps):
        return None
    # Each view stands for a step: those at the ends for a half beyond them.
    between = np.concatenate([[steps[0]], (steps[1:] + steps[:-1]) / 2, [steps[-1]]])
    start = np.cumsum(np.concatenate([[steps[0] / 2], steps]))[:, None]
    overlap, fan = (between.sum() - math.pi) / 2, beam.fan_angles
    if overlap < np.abs(fan).max():
        return None
    # The other view of a ray is a half turn and twice its fan angle later.
    rising, falling = 2 * (overlap - fan), math.pi - 2 * fan
    first = np.sin(np.pi / 2 * np.clip(start / np.maximum(rising, 1e-9), 0, 1)) ** 2
    final = (
        np.sin(np.pi / 2 * np.clip((math.pi + 2 * overlap - start) / np.maximum(2 * (overlap + fan), 1e-9), 0, 1)) ** 2
    )
    weights, shares = np.empty((beam.views, beam.detectors)), np.empty(beam.views)
    weights[order] = 2 * np.where(start < falling, first, final)
    shares[order] = between
    return weights, shares


def _filtered(projector: Projector, sinograms: Tensor, ramp: RampFilter, cutoff: float) -> Tensor:
    """Weighted and convolved with the ramp, (N, views, detectors)."""
    beam = projector.beam
    size = 2 ** math.ceil(math.log2(2 * beam.detectors))
    steps = np.fft.fftfreq(size, 1 / size)
    if not isinstance(beam, FanBeam):
        weights, kernel = np.ones(beam.detectors), _ramp(steps, beam.pitch_mm) * beam.pitch_mm
    elif beam.detector is Detector.ARC:
        pitch = beam.pitch_mm / beam.source_detector_mm
        # Beyond the detector's own length the kernel is not used; the sine must not vanish there.
        angles = np.clip(steps, -beam.detectors, beam.detectors) * pitch
        weights = beam.source_isocenter_mm * np.cos(beam.fan_angles)
        kernel = _ramp(steps, pitch) * pitch / 2 / np.sinc(angles / np.pi) ** 2
    else:
        # As if the detector stood at the isocenter.
        pitch = beam.pitch_mm * beam.source_isocenter_mm / beam.source_detector_mm
        weights, kernel = np.cos(beam.fan_angles), _ramp(steps, pitch) * pitch / 2
    transfer = torch.from_numpy(np.fft.rfft(kernel).real)
    frequency = torch.linspace(0, 1, len(transfer), dtype=torch.float64) / cutoff
    transfer = transfer * ramp.window(frequency.clamp(max=1)) * (frequency <= 1)
    weighted = sinograms * torch.from_numpy(weights).to(sinograms)
    return torch.fft.irfft(torch.fft.rfft(weighted, size) * transfer.to(sinograms), size)[..., : beam.detectors]


def _ramp(steps: np.ndarray, pitch: float) -> np.ndarray:
    """The ramp filter as a kernel over whole steps; sampling it there keeps the image's mean right."""
    odd = steps.astype(int) % 2 == 1
    kernel = np.zeros(len(steps))
    kernel[odd] = -1 / (np.pi * steps[odd] * pitch) ** 2
    kernel[steps == 0] = 1 / (4 * pitch**2)
    return kernel


class _BackProjection:
    """Smears filtered views over the image: each pixel takes the value where its ray falls on the detector."""

    def __init__(self, projector: Projector, like: Tensor, shares: np.ndarray) -> None:
        self.beam, self.grid, self.shares = projector.beam, projector.grid, shares
        self.x = torch.from_numpy(self.grid.x_mm).to(like.device)
        self.y = torch.from_numpy(self.grid.y_mm).to(like.device)[:, None]

    def of(self, filtered: Tensor) -> Tensor:
        images = filtered.new_zeros(len(filtered), self.grid.pixels)
        for view, share in enumerate(self.shares):
            channel, weight = self._seen(self.beam.angles[view])
            channel, weight = channel.flatten(), (weight * share).to(filtered.dtype).flatten()
            low = channel.floor()
            between = (channel - low).to(filtered.dtype)
            # A channel of zeros on either side: rays beside the detector count nothing.
            index = (low.long() + 1).clamp(0, self.beam.detectors)
            padded = F.pad(filtered[:, view], (1, 1))
            inside = weight * ((channel > -1) & (channel < self.beam.detectors))
            images = images + inside * torch.lerp(padded[:, index], padded[:, index + 1], between)
        return images

    def _seen(self, angle: float) -> tuple[Tensor, Tensor]:
        """Channel that each pixel's ray falls on, and the pixel's weight, float64 (rows, columns)."""
        beam = self.beam
        across = self.x * math.cos(angle) + self.y * math.sin(angle)
        if not isinstance(beam, FanBeam):
            return self._channel(across), torch.ones_like(across)
        away = beam.source_isocenter_mm + self.x * math.sin(angle) - self.y * math.cos(angle)
        if beam.detector is Detector.ARC:
            return self._channel(torch.atan2(across, away) * beam.source_detector_mm), 1 / (across**2 + away**2)
        weight = (beam.source_isocenter_mm / away) ** 2
        return self._channel(across / away * beam.source_detector_mm), weight

    def _channel(self, place_mm: Tensor) -> Tensor:
        return place_mm / self.beam.pitch_mm + (self.beam.detectors - 1) / 2 + self.beam.offset


def conjugate_gradient(
    operator: LinearOperator,
    sinograms: Tensor,
    start: Tensor | None = None,
    iterations: int = 20,
    tolerance: float = 0.0,
    prior: Tensor | None = None,
    strength: float | Tensor = 0.0,
    weights: Tensor | None = None,
    progress: Hook | None = None,
) -> Tensor:
    """Conjugate gradients for the least squares ``||Ax - y||_W^2 + strength ||x - prior||^2``.

    Hestenes and Stiefel (1952) on the normal equations. A few iterations from the estimate of a network are the data
    consistency of diffusion sampling (Chung et al., ICLR 2024); stopping early regularizes.

    Args:
        operator: a projector.
        sinograms: y, (..., views, detectors).
        start: where to begin, (..., rows, columns); default: the prior, or zeros.
        iterations: at most.
        tolerance: a slice is done when its residual of the normal equations falls below this share of their right side.
        prior: pulls the image; zeros by default.
        strength: of the pull, mm^2.
        weights: W, not negative, of the rays, as :func:`poisson_weights`; 1 by default.
        progress: called after each iteration.

    Returns:
        (..., rows, columns), per mm.

    Raises:
        UnsuitableProjections: sinograms do not match or hold no numbers.
    """
    _check(operator, sinograms)
    weigh = _weighing(weights)

    def normal(images: Tensor) -> Tensor:
        return operator.adjoint(weigh(operator.forward(images))) + strength * images

    right = operator.adjoint(weigh(sinograms))
    if prior is not None:
        right = right + strength * prior
    x = start if start is not None else prior if prior is not None else torch.zeros_like(right)
    residual = right - normal(x)
    direction, square = residual, _dot(residual, residual)
    enough = tolerance**2 * _dot(right, right)
    for iteration in range(iterations):
        going = square > enough
        if not bool(going.any()):
            break
        image = normal(direction)
        step = torch.where(going, square / _positive(_dot(direction, image)), 0.0)
        x = x + step * direction
        residual = residual - step * image
        last, square = square, _dot(residual, residual)
        direction = residual + square / _positive(last) * direction
        _tell(progress, iteration, iterations)
    return x


def sirt(
    operator: LinearOperator,
    sinograms: Tensor,
    start: Tensor | None = None,
    iterations: int = 100,
    relaxation: float = 1.0,
    non_negative: bool = True,
    progress: Hook | None = None,
) -> Tensor:
    """Simultaneous iterative reconstruction: ``x + relaxation C A^T R (y - Ax)`` again and again.

    R and C are the inverse sums of A's rows and columns (Gilbert 1972; Gregor & Benson, IEEE T-MI 27 (2008) 918). The
    residual weighted by R falls in each iteration for a relaxation below 2.

    Args, returns and raises as :func:`conjugate_gradient`, and:
        non_negative: cut negative attenuation off after each iteration.
    """
    _check(operator, sinograms)
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation {relaxation} must lie between 0 and 2, or the iterations diverge")
    x = start if start is not None else torch.zeros_like(operator.adjoint(sinograms))
    rows = _inverse(operator.forward(torch.ones_like(x)))
    columns = _inverse(operator.adjoint(torch.ones_like(sinograms)))
    for iteration in range(iterations):
        x = x + relaxation * columns * operator.adjoint(rows * (sinograms - operator.forward(x)))
        x = x.clamp(min=0) if non_negative else x
        _tell(progress, iteration, iterations)
    return x


def total_variation_reconstruction(
    operator: LinearOperator,
    sinograms: Tensor,
    strength: float | Tensor,
    start: Tensor | None = None,
    iterations: int = 200,
    weights: Tensor | None = None,
    non_negative: bool = True,
    progress: Hook | None = None,
) -> Tensor:
    """The image of least ``1/2 ||Ax - y||_W^2 + strength TV(x)``: piecewise smooth, edges kept.

    Primal-dual iterations (Chambolle & Pock, J. Math. Imaging Vis. 40 (2011) 120) with the diagonal steps of Pock &
    Chambolle (ICCV 2011), as Sidky et al. (Phys. Med. Biol. 57 (2012) 3065) use them for CT.

    Args, returns and raises as :func:`conjugate_gradient`, and:
        strength: of the total variation, mm, a number or one for each slice, (..., 1, 1). It sets the pace too: with a
            few tenths of a pixel's edge 100 iterations suffice, with a hundredth of it 2,000 do not.
        non_negative: no attenuation below zero.
    """
    _check(operator, sinograms)
    strength = torch.as_tensor(strength, dtype=sinograms.dtype, device=sinograms.device)
    if not bool((strength >= 0).all()):
        raise ValueError(f"strength {strength} must not be negative")
    weight = torch.ones_like(sinograms) if weights is None else weights.expand_as(sinograms)
    x = start if start is not None else torch.zeros_like(operator.adjoint(sinograms))
    columns = operator.adjoint(torch.ones_like(sinograms))
    pace = _GRADIENT_SCALE * columns.amax(dim=(-2, -1), keepdim=True) / 4
    data_step = _inverse(operator.forward(torch.ones_like(x)))
    gradient_step = pace / 2
    step = _inverse(columns + 4 * pace)
    data_dual, gradient_dual, ahead = torch.zeros_like(sinograms), torch.zeros_like(_gradient(x)), x
    for iteration in range(iterations):
        moved = data_dual + data_step * (operator.forward(ahead) - sinograms)
        data_dual = weight * moved / _positive(weight + data_step)
        gradient_dual = _within(torch.addcmul(gradient_dual, gradient_step, _gradient(ahead)), strength)
        last = x
        x = torch.addcmul(x, step, operator.adjoint(data_dual) + _gradient_adjoint(gradient_dual), value=-1)
        x = x.clamp(min=0) if non_negative else x
        ahead = torch.lerp(last, x, 2.0)
        _tell(progress, iteration, iterations)
    return x


def total_variation(images: Tensor) -> Tensor:
    """Sum of the lengths of the differences to the next row and column, isotropic: (..., rows, columns) to (...)."""
    return _lengths(_gradient(images)).sum(dim=(-2, -1))


def total_variation_objective(
    operator: LinearOperator, images: Tensor, sinograms: Tensor, strength: float, weights: Tensor | None = None
) -> Tensor:
    """What :func:`total_variation_reconstruction` makes small: one value a slice, (...)."""
    error = operator.forward(images) - sinograms
    return _dot(error, _weighing(weights)(error))[..., 0, 0] / 2 + strength * total_variation(images)


def relative_residual(operator: LinearOperator, images: Tensor, sinograms: Tensor) -> Tensor:
    """``||Ax - y|| / ||y||`` of each slice, (...): 0 where an image explains its rays; 0 too for an empty sinogram."""
    error = operator.forward(images) - sinograms
    return torch.sqrt(_dot(error, error) / _positive(_dot(sinograms, sinograms)))[..., 0, 0]


def poisson_weights(sinograms: Tensor, photons: float | Tensor, electronic_noise: float = 0.0) -> Tensor:
    """Inverse variance of measured line integrals, for the least squares of noisy rays.

    A ray of line integral y counts ``n = photons exp(-y)`` photons with a variance of ``n + electronic_noise^2``; its
    logarithm has that over n^2 (Thibault et al., Med. Phys. 34 (2007) 4526).

    Args:
        sinograms: (..., views, detectors).
        photons: of the unattenuated ray; a number, or anything that broadcasts, as a bow-tie's (detectors,).
        electronic_noise: standard deviation, in photons.
    """
    counts = photons * torch.exp(-sinograms)
    return counts**2 / (counts + electronic_noise**2)


def _gradient(images: Tensor) -> Tensor:
    """Differences to the next row and column, 0 at the last ones: (2, ..., rows, columns).

    Written into parts of an empty field, since padding and stacking took as long as the projections.
    """
    found = images.new_zeros(2, *images.shape)
    found[0, ..., :-1, :] = images.diff(dim=-2)
    found[1, ..., :-1] = images.diff(dim=-1)
    return found


def _gradient_adjoint(duals: Tensor) -> Tensor:
    """The transpose of :func:`_gradient`."""
    down, right = duals[0, ..., :-1, :], duals[1, ..., :-1]
    found = torch.zeros_like(duals[0])
    found[..., 1:, :] += down
    found[..., :-1, :] -= down
    found[..., 1:] += right
    found[..., :-1] -= right
    return found


def _within(duals: Tensor, radius: Tensor) -> Tensor:
    """Vectors longer than the radius cut to it."""
    return duals * (radius / torch.maximum(_lengths(duals), radius))


def _lengths(vectors: Tensor) -> Tensor:
    """Of vectors along the first axis, never quite 0, where their derivative is none.

    ``vector_norm`` over the first axis takes ten times as long.
    """
    square = torch.addcmul(vectors[0].square(), vectors[1], vectors[1])
    return square.clamp(min=torch.finfo(vectors.dtype).tiny).sqrt()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Of each slice, (..., 1, 1)."""
    return (first * second).sum(dim=(-2, -1), keepdim=True)


def _positive(values: Tensor) -> Tensor:
    """Fit to divide by: 1 where there is nothing to divide."""
    return torch.where(values > 0, values, 1.0)


def _inverse(sums: Tensor) -> Tensor:
    """1 over it; 0 for rays that miss the image and pixels that no ray meets."""
    return torch.where(sums > 0, 1 / _positive(sums), 0.0)


def _weighing(weights: Tensor | None) -> Callable[[Tensor], Tensor]:
    return (lambda values: values) if weights is None else (lambda values: weights * values)


def _tell(progress: Hook | None, iteration: int, iterations: int) -> None:
    if progress is not None:
        progress((iteration + 1) / iterations)


def _check(operator: LinearOperator, sinograms: Tensor) -> None:
    if isinstance(operator, Projector):
        operator.check_shape(sinograms)
    if not bool(torch.isfinite(sinograms).all()):
        raise UnsuitableProjections(
            "Some rays of the sinogram are no numbers; leave their views out, or export the projections again."
        )
