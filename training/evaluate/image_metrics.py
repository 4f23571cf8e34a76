"""How near a reconstructed slice is to its reference: in HU, inside the body, over a fixed range of 2,000 HU.

Policy, the same for every method and every number here unless it says otherwise:

- Both images are clipped to -1000..1000 HU first; that span (2,000 HU) is the data range of PSNR and SSIM and is what
  becomes 0..255 for VIF and FSIM, whose constants are made for 8 bits. What leaves the span (metal, or a method that
  runs away) counts no more than its end, therefore ``rmse_unclipped`` stands beside ``rmse``.
- Only pixels of the body count (:func:`body_mask` of the reference, never of the answer). Windows that reach out of the
  body still see what lies there.

Each function takes a reference and an image (H, W) and returns a float64 computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, signal
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.anatomy.body import body_mask
from LCTfoundLib.runtime.device import DeviceChoice
from training.evaluate.foundation_slices import PIXEL_MM
from training.evaluate.kernel_distance import FixedNet

__all__ = [
    "METRICS",
    "RANGE",
    "FeatureDistance",
    "HURange",
    "Metric",
    "body_mask",
    "fsim",
    "mae",
    "phase_congruency",
    "psnr",
    "rmse",
    "rmse_unclipped",
    "score_slice",
    "ssim",
    "vif",
]


@dataclass(frozen=True)
class HURange:
    """The span of HU that counts."""

    low: float = -1000.0
    high: float = 1000.0

    @property
    def width(self) -> float:
        return self.high - self.low

    def clipped(self, hu: np.ndarray) -> np.ndarray:
        """Float64, what is beyond at the span's end."""
        return np.clip(np.asarray(hu, np.float64), self.low, self.high)

    def as_bytes(self, hu: np.ndarray) -> np.ndarray:
        """The span as 0..255, not rounded."""
        return (self.clipped(hu) - self.low) * (255.0 / self.width)


RANGE = HURange()


# -- pixel by pixel --------------------------------------------------------------------------------------------------


def _checked(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The mask, all pixels if None.

    Raises:
        ValueError: shapes differ, a pixel is not finite, or no pixel counts.
    """
    if reference.ndim != 2 or reference.shape != image.shape:
        raise ValueError(f"the reference is {reference.shape} and the image {image.shape}; both must be one (H, W)")
    if not (np.isfinite(reference).all() and np.isfinite(image).all()):
        raise ValueError("a pixel is not a finite number; no metric means anything then")
    mask = np.ones(reference.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != reference.shape or not mask.any():
        raise ValueError(
            f"the mask is {mask.shape} with {int(mask.sum())} pixels; it must be the image's and not empty"
        )
    return mask


def _difference(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None, span: HURange) -> np.ndarray:
    mask = _checked(reference, image, mask)
    return (span.clipped(image) - span.clipped(reference))[mask]


def rmse(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None, span: HURange = RANGE) -> float:
    """Root of the mean squared difference, HU."""
    return float(np.sqrt(np.mean(_difference(reference, image, mask, span) ** 2)))


def rmse_unclipped(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Root of the mean squared difference without clipping, HU."""
    return rmse(reference, image, mask, HURange(-np.inf, np.inf))


def mae(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None, span: HURange = RANGE) -> float:
    """Mean absolute difference, HU."""
    return float(np.mean(np.abs(_difference(reference, image, mask, span))))


def psnr(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None, span: HURange = RANGE) -> float:
    """Peak signal-to-noise ratio, dB, the peak being the whole span; infinite for the same image."""
    error = rmse(reference, image, mask, span)
    return float("inf") if error == 0 else 20 * float(np.log10(span.width / error))


def ssim(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None, span: HURange = RANGE) -> float:
    """Structural similarity (Wang et al., IEEE TIP 2004): Gaussian window of 11 pixels and 1.5 deviation, 1 at best.

    Local moments are the window's weighted means, as in the paper (no correction for the sample's size). At the
    picture's rim it is mirrored.
    """
    mask = _checked(reference, image, mask)
    x, y = span.clipped(reference), span.clipped(image)

    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, truncate=3.5, mode="reflect")

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * span.width) ** 2, (0.03 * span.width) ** 2
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(similarity[mask].mean())


# -- visual information ----------------------------------------------------------------------------------------------

#: Variance of the visual noise of VIF, for gray values 0..255, as in the authors' program.
_VISUAL_NOISE = 2.0


def vif(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None, span: HURange = RANGE) -> float:
    """Visual information fidelity in the pixel domain, four scales (Sheikh & Bovik, IEEE TIP 2006; their ``vifp``).

    1 for the same image, 0 where nothing of it is left; above 1 for a contrast beyond the reference's.

    Raises:
        ValueError: additionally, if the image is too small for four scales, or the reference is flat inside the mask.
    """
    mask = _checked(reference, image, mask)
    x, y, inside = span.as_bytes(reference), span.as_bytes(image), mask.astype(np.float64)
    kept = whole = 0.0
    for scale in range(4):
        window = _gaussian(2 ** (4 - scale) + 1)
        if scale:
            x, y, inside = (_windowed(part, window)[::2, ::2] for part in (x, y, inside))
        if min(x.shape) < len(window):
            raise ValueError(f"{reference.shape} pixels are too few for the four scales of VIF; 41 x 41 are the least")
        information, of_reference = _information(x, y, window)
        # Of windows at the body's border counts the part of their weight that lies in it.
        weight = _windowed(inside, window)
        kept += float((weight * information).sum())
        whole += float((weight * of_reference).sum())
    if whole == 0:
        raise ValueError("the reference is flat inside the mask: there is no information to keep")
    return kept / whole


def _information(x: np.ndarray, y: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each window: what of the reference a viewer of the image still gets, and what one of the reference gets."""
    tiny = 1e-10
    mx, my = _windowed(x, window), _windowed(y, window)
    vx = (_windowed(x * x, window) - mx * mx).clip(min=0)
    vy = (_windowed(y * y, window) - my * my).clip(min=0)
    vxy = _windowed(x * y, window) - mx * my
    gain = vxy / (vx + tiny)
    rest = vy - gain * vxy
    flat_x, flat_y = vx < tiny, vy < tiny
    gain[flat_x], rest[flat_x] = 0, vy[flat_x]
    vx = np.where(flat_x, 0, vx)
    gain[flat_y], rest[flat_y] = 0, 0
    against = gain < 0
    rest[against], gain[against] = vy[against], 0
    rest = rest.clip(min=tiny)
    return np.log10(1 + gain**2 * vx / (rest + _VISUAL_NOISE)), np.log10(1 + vx / _VISUAL_NOISE)


def _gaussian(size: int) -> np.ndarray:
    """Weights of a window of ``size`` pixels whose deviation is a fifth of it; they sum to 1."""
    at = np.arange(size) - (size - 1) / 2
    weights = np.exp(-(at**2) / (2 * (size / 5) ** 2))
    return weights / weights.sum()


def _windowed(image: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Weighted means of all windows that lie within the image."""
    reach = len(window) // 2
    means = ndimage.correlate1d(ndimage.correlate1d(image, window, axis=0), window, axis=1)
    return means[reach:-reach, reach:-reach]


# -- features that people see ----------------------------------------------------------------------------------------

_PC_SCALES, _PC_TURNS = 4, 4
#: Constants of the paper, for gray values 0..255.
_T_CONGRUENCY, _T_GRADIENT = 0.85, 160.0
_SCHARR = np.array([[3, 0, -3], [10, 0, -10], [3, 0, -3]], np.float64) / 16


def fsim(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None, span: HURange = RANGE) -> float:
    """Feature similarity (Zhang et al., IEEE TIP 2011): phase congruency and gradient, 1 at best.

    As in the paper, an image larger than 256 pixels is first averaged down to about that size.

    Raises:
        ValueError: additionally, if the reference and the image have no feature at all inside the mask.
    """
    mask = _checked(reference, image, mask)
    step = max(1, round(min(reference.shape) / 256))
    x, y = _block_means(span.as_bytes(reference), step), _block_means(span.as_bytes(image), step)
    inside = _block_means(mask.astype(np.float64), step) >= 0.5
    cx, cy = phase_congruency(x), phase_congruency(y)
    gx, gy = _gradient(x), _gradient(y)
    congruent = (2 * cx * cy + _T_CONGRUENCY) / (cx**2 + cy**2 + _T_CONGRUENCY)
    alike = (2 * gx * gy + _T_GRADIENT) / (gx**2 + gy**2 + _T_GRADIENT)
    weight = np.maximum(cx, cy) * inside
    if not weight.any():
        raise ValueError("neither image has a feature inside the mask: there is nothing to compare")
    return float((congruent * alike * weight).sum() / weight.sum())


def _block_means(image: np.ndarray, step: int) -> np.ndarray:
    """Means over blocks of ``step`` x ``step`` pixels; a rest at the end is left out."""
    rows, columns = (count // step for count in image.shape)
    return image[: rows * step, : columns * step].reshape(rows, step, columns, step).mean(axis=(1, 3))


def _gradient(image: np.ndarray) -> np.ndarray:
    along, across = (signal.convolve2d(image, kernel, "same", "symm") for kernel in (_SCHARR, _SCHARR.T))
    return np.hypot(along, across)


def phase_congruency(image: np.ndarray) -> np.ndarray:
    """Phase congruency after Kovesi with the noise threshold and the constants that FSIM prescribes.

    Four scales (wavelengths 6, 12, 24, 48 pixels) of log-Gabor filters in four orientations. The noise is estimated
    from the finest scale: its squared amplitude is exponentially distributed where there is nothing but noise.

    Args:
        image: (H, W), gray values 0..255.

    Returns:
        float64 (H, W), 0..1.
    """
    radial, angular = _filters(image.shape)
    spectrum = np.fft.fft2(image)
    energy_of_all, amplitude_of_all = np.zeros(image.shape), np.zeros(image.shape)
    for spread in angular:
        filters = radial * spread
        answers = np.fft.ifft2(spectrum * filters)
        amplitude = np.abs(answers)
        total = answers.sum(axis=0)
        direction = total / (np.abs(total) + 1e-4)
        turned = answers * direction.conj()
        energy = (turned.real - np.abs(turned.imag)).sum(axis=0)
        energy_of_all += (energy - _noise_threshold(amplitude[0], filters)).clip(min=0)
        amplitude_of_all += amplitude.sum(axis=0)
    return energy_of_all / np.where(amplitude_of_all > 0, amplitude_of_all, 1.0)


def _noise_threshold(finest: np.ndarray, filters: np.ndarray) -> float:
    """The energy that noise alone reaches (mean and twice its deviation, Rayleigh, over the empirical 1.7)."""
    power = np.median(finest**2) / np.log(2) / (filters[0] ** 2).sum()
    kernels = np.fft.ifft2(filters).real * np.sqrt(finest.size)
    squares = (kernels**2).sum()
    products = ((kernels.sum(axis=0) ** 2).sum() - squares) / 2
    tau = np.sqrt(power * (squares + 2 * products))
    return float(tau * (np.sqrt(np.pi / 2) + 2.0 * np.sqrt(2 - np.pi / 2)) / 1.7)


@lru_cache(maxsize=4)
def _filters(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Radial (scales, H, W) and angular (orientations, H, W) parts of the log-Gabor filters, zero frequency first."""
    rows, columns = (np.fft.fftfreq(size) for size in shape)
    radius, angle = np.hypot(rows[:, None], columns[None]), np.arctan2(-rows[:, None], columns[None])
    radius[0, 0] = 1.0
    low_pass = 1 / (1 + (radius / 0.45) ** 30)
    radial = np.empty((_PC_SCALES, *shape))
    for scale in range(_PC_SCALES):
        center = 1 / (6.0 * 2.0**scale)
        radial[scale] = np.exp(-(np.log(radius / center) ** 2) / (2 * np.log(0.55) ** 2)) * low_pass
        radial[scale, 0, 0] = 0.0
    width = np.pi / _PC_TURNS / 1.2
    turns = np.arange(_PC_TURNS) * np.pi / _PC_TURNS
    apart = np.abs(np.angle(np.exp(1j * (angle[None] - turns[:, None, None]))))
    return radial, np.exp(-(apart**2) / (2 * width**2))


# -- features that a net of ours sees --------------------------------------------------------------------------------


class FeatureDistance:
    """Distance of two slices in the maps of a frozen net of ours, the shipped fine lung net.

    It is **not** LPIPS (no net for photographs, no weights fitted to people's judgments): numbers compare methods here,
    nothing published. At each of the five encoder levels the root mean square, over channels and the body, of the
    difference of the maps, each channel in units of its standard deviation over the reference's body; then the mean
    over levels. 0 for the same slice; 1.4 for maps that have nothing to do with each other but look alike at large.
    """

    def __init__(self, choice: DeviceChoice, folder: Path | None = None, span: HURange = RANGE) -> None:
        """Load the net.

        Args:
            choice: device and precision.
            folder: of another weight; the shipped one if None.
            span: the slices are clipped to.

        Raises:
            WeightError: missing or damaged weight.
        """
        self.net, self.span = FixedNet(choice, folder), span
        self._last: tuple[bytes, list[Tensor]] | None = None

    def __call__(self, reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None, pixel_mm: float) -> float:
        """The distance of (H, W) slices of ``pixel_mm`` pixels inside a mask (all pixels if None)."""
        mask = _checked(reference, image, mask)
        inside = self._placed(torch.from_numpy(mask.astype(np.float32)), pixel_mm, 0.0)
        theirs, ours = self._of_reference(reference, pixel_mm), self._maps(image, pixel_mm)
        levels = []
        for a, b in zip(theirs, ours, strict=True):
            weight = F.interpolate(inside[None, None], a.shape[-2:], mode="area")[0, 0]
            weight = weight / weight.sum()
            mean = (a * weight).sum(dim=(1, 2), keepdim=True)
            variance = ((a - mean) ** 2 * weight).sum(dim=(1, 2))
            squares = ((a - b) ** 2 * weight).sum(dim=(1, 2))
            used = variance > 1e-8 * (mean[:, 0, 0] ** 2).clamp(min=1e-8)
            levels.append(float((squares[used] / variance[used]).mean().sqrt()) if used.any() else 0.0)
        return float(np.mean(levels))

    def _of_reference(self, reference: np.ndarray, pixel_mm: float) -> list[Tensor]:
        """Its maps, kept until another reference comes: methods are compared on one slice after the other."""
        key = np.ascontiguousarray(reference).tobytes() + str(pixel_mm).encode()
        if self._last is None or self._last[0] != key:
            self._last = key, self._maps(reference, pixel_mm)
        return self._last[1]

    def _maps(self, hu: np.ndarray, pixel_mm: float) -> list[Tensor]:
        plane = torch.from_numpy(self.span.clipped(hu).astype(np.float32))
        return self.net.maps(self._placed(plane, pixel_mm, self.span.low))

    @staticmethod
    def _placed(plane: Tensor, pixel_mm: float, outside: float) -> Tensor:
        """On the net's pixels of 1.5 mm, in a picture of a multiple of 16 of them."""
        size = [max(1, round(count * pixel_mm / PIXEL_MM)) for count in plane.shape]
        small = F.interpolate(plane[None, None], size, mode="bilinear", antialias=True)[0, 0]
        rows, columns = (-count % 16 for count in size)
        return F.pad(small, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=outside)


# -- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One column of the tables.

    Attributes:
        name: as in the tables.
        digits: after the point.
        higher_is_better: its direction.
        measure: (reference, image, mask) to a number; None for the feature distance, which needs its net.
    """

    name: str
    digits: int
    higher_is_better: bool
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float] | None


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR (dB)", 2, True, psnr),
    "ssim": Metric("SSIM", 4, True, ssim),
    "rmse": Metric("RMSE (HU)", 2, False, rmse),
    "mae": Metric("MAE (HU)", 2, False, mae),
    "vif": Metric("VIF", 4, True, vif),
    "fsim": Metric("FSIM", 4, True, fsim),
    "rmse_unclipped": Metric("RMSE, not clipped (HU)", 2, False, rmse_unclipped),
    "feature_distance": Metric("feature distance (lung_fine)", 4, False, None),
}


def score_slice(
    reference: np.ndarray,
    image: np.ndarray,
    mask: np.ndarray,
    pixel_mm: float,
    feature_distance: FeatureDistance | None = None,
) -> dict[str, float]:
    """All metrics of a slice, by their keys in ``METRICS``; the feature distance only where its net is given."""
    scores = {key: m.measure(reference, image, mask) for key, m in METRICS.items() if m.measure is not None}
    if feature_distance is not None:
        scores["feature_distance"] = feature_distance(reference, image, mask, pixel_mm)
    return scores
