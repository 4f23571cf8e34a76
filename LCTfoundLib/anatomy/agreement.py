"""How near reconstructed slices are to those they should be, and whether the told uncertainty holds.

Inside the body, clipped to -1000..1000 HU: a data range of 2,000 HU, the same for every method and every report.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.metrics import structural_similarity

from LCTfoundLib.anatomy.body import body_mask

__all__ = ["RANGE_HU", "Agreement", "agreement_of", "bodies", "rmse_of"]

_LOW, _HIGH = -1000.0, 1000.0
RANGE_HU = _HIGH - _LOW
#: Side of the window of the structural similarity; smaller images have none.
_WINDOW = 11


@dataclass(frozen=True)
class Agreement:
    """Of slices with their reference; means over slices.

    Attributes:
        psnr: peak signal-to-noise ratio at 2,000 HU, dB; infinite for the same images.
        ssim: structural similarity (Wang et al., IEEE TIP 2004), 1 at best; None for images smaller than its window.
        rmse_hu: root of the mean squared difference.
        covered: share of the body's pixels whose true value lies in the interval; None without an interval.
        slices: how many had a body to look at.
    """

    psnr: float
    ssim: float | None
    rmse_hu: float
    covered: float | None
    slices: int


def bodies(hu: np.ndarray, pixel_mm: float) -> np.ndarray:
    """Masks of the body, bool (N, H, W), of slices (N, H, W)."""
    return np.stack([body_mask(image, pixel_mm) for image in hu])


def agreement_of(
    reference: np.ndarray, images: np.ndarray, masks: np.ndarray, interval: np.ndarray | None = None
) -> Agreement | None:
    """Compare.

    Args:
        reference, images: HU, (N, H, W).
        masks: where to look, bool (N, H, W); those of the reference, never of the answer.
        interval: half of the width of the interval that should hold the truth, HU, (N, H, W).

    Returns:
        None if there is no body in any slice.
    """
    seen = [k for k in range(len(masks)) if masks[k].any()]
    if not seen:
        return None
    errors = [rmse_of(reference[k], images[k], masks[k]) for k in seen]
    similar = [_ssim(reference[k], images[k], masks[k]) for k in seen] if min(reference.shape[1:]) >= _WINDOW else []
    covered = None
    if interval is not None:
        covered = float((np.abs(images - reference) <= interval)[masks].mean())
    with np.errstate(divide="ignore"):
        psnr = float(np.mean(20 * np.log10(RANGE_HU / np.asarray(errors))))
    return Agreement(psnr, float(np.mean(similar)) if similar else None, float(np.mean(errors)), covered, len(seen))


def rmse_of(reference: np.ndarray, image: np.ndarray, mask: np.ndarray) -> float:
    """Root of the mean squared difference of a slice (H, W) where the mask is, HU; the mask must not be empty."""
    return float(np.sqrt(np.mean((_clipped(image) - _clipped(reference))[mask] ** 2)))


def _ssim(reference: np.ndarray, image: np.ndarray, mask: np.ndarray) -> float:
    _, similar = structural_similarity(
        _clipped(reference), _clipped(image), data_range=RANGE_HU, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    return float(similar[mask].mean())


def _clipped(hu: np.ndarray) -> np.ndarray:
    return np.clip(hu.astype(np.float64), _LOW, _HIGH)
