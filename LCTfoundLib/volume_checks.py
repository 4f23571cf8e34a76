"""Is this a CT in HU that holds lungs? What can be mended is, with a warning; the rest is refused with a remedy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.volume import AIR, Volume

__all__ = ["add_warning", "check_ct", "warnings_of"]

_MIN_SLICES = 8
_MIN_SIDE = 16
_MIN_EXTENT_MM = 60.0
_MAX_EXTENT_MM = 2500.0
_MAX_SPACING_MM = 10.0
#: Up to this share of NaN and infinite values is replaced by air.
_MAX_NOT_FINITE = 0.001
_CHUNK_VOXELS = 2**24
#: Voxels looked at to tell HU from other scales.
_SAMPLE = 1_000_000
#: HU of water in images that were stored without their rescale intercept.
_OFFSET = 1024
_LUNG_GRID_MM = 4.0
#: Lung tissue with its air, smoothed over some millimeters; air outside of the body and in the bowel is darker.
_LUNG_HU = (-975.0, -550.0)
_MIN_LUNG_ML = 100.0


def check_ct(ct: Volume) -> Volume:
    """A CT of the chest as int16 HU, at least -1024, contiguous; the input is not changed.

    Mended, with a sentence in ``metadata["warnings"]``: values stored 1024 too high; a few values that are no numbers.
    Padding below -1024 becomes -1024. Memory: the result, and no other copy of the whole.

    Args:
        ct: as read, in any orientation.

    Raises:
        UnsuitableImage: too few slices, too small or coarse, not in HU, without an air-filled lung.
    """
    modality = ct.metadata.get("Modality", "CT")
    if modality != "CT":
        raise UnsuitableImage(f"This is a {modality} image; give a CT of the chest.")
    _check_geometry(ct)
    array, not_finite = _as_int16(ct.array)
    checked = ct.with_array(array)
    if not_finite:
        add_warning(checked, f"{not_finite} voxels without a value were set to air.")
    _check_scale(ct.array)
    if _is_offset(_sample(array)):
        _subtract(array, _OFFSET)
        add_warning(checked, f"The values were {_OFFSET} above HU (stored without their intercept); it was corrected.")
    np.maximum(array, AIR, out=array)
    _check_hu(_sample(array))
    _check_lungs(checked)
    return checked


def warnings_of(volume: Volume) -> list[str]:
    """What reading and checking had to mend, one sentence each."""
    return [line for line in volume.metadata.get("warnings", "").split("\n") if line]


def add_warning(volume: Volume, text: str) -> None:
    """Add a sentence to ``metadata["warnings"]``."""
    volume.metadata["warnings"] = "\n".join([*warnings_of(volume), text])


def _check_geometry(ct: Volume) -> None:
    if not np.issubdtype(ct.array.dtype, np.number) or np.iscomplexobj(ct.array):
        raise UnsuitableImage("The image has no plain numbers as values; give a CT in HU.")
    if min(ct.shape) == 1:
        raise UnsuitableImage("The image is a single slice; give the whole series of the chest CT.")
    extent = [n * step for n, step in zip(ct.shape[::-1], ct.spacing, strict=True)]
    size = " x ".join(f"{length:.0f}" for length in extent) + " mm"
    if min(ct.shape) < _MIN_SLICES or sorted(ct.shape)[1] < _MIN_SIDE or min(extent) < _MIN_EXTENT_MM:
        voxels = "x".join(str(n) for n in ct.shape[::-1])
        raise UnsuitableImage(f"The image is too small ({voxels} voxels, {size}); give a CT of the whole chest.")
    if max(ct.spacing) > _MAX_SPACING_MM + 1e-3:
        raise UnsuitableImage(
            f"The slices are {max(ct.spacing):.1f} mm apart; give a series with at most {_MAX_SPACING_MM:.0f} mm."
        )
    if max(extent) > _MAX_EXTENT_MM:
        raise UnsuitableImage(f"The image measures {size}, which no patient does; check its voxel spacing.")


def _as_int16(array: np.ndarray) -> tuple[np.ndarray, int]:
    """Rounded and clipped copy, and the number of values that were not finite."""
    if array.dtype == np.int16:
        return np.array(array, order="C"), 0
    result = np.empty(array.shape, np.int16)
    step = max(1, _CHUNK_VOXELS // (array.shape[1] * array.shape[2]))
    not_finite = 0
    low, high = -32768, 32767
    if np.issubdtype(array.dtype, np.integer):  # clipping is to types that hold the limits
        low, high = max(low, np.iinfo(array.dtype).min), min(high, np.iinfo(array.dtype).max)
    for first in range(0, array.shape[0], step):
        part = array[first : first + step]
        if np.issubdtype(array.dtype, np.floating):
            bad = ~np.isfinite(part)
            not_finite += int(bad.sum())
            part = np.rint(np.where(bad, AIR, part))
        result[first : first + step] = np.clip(part, low, high)
    if not_finite > _MAX_NOT_FINITE * array.size:
        share = 100 * not_finite / array.size
        raise UnsuitableImage(f"{share:.1f} % of the values are no numbers; export the CT again from its source.")
    return result, not_finite


def _sample(array: np.ndarray) -> np.ndarray:
    """About a million evenly spread voxels."""
    step = max(1, round((array.size / _SAMPLE) ** (1 / 3)))
    return array[step // 2 :: step, step // 2 :: step, step // 2 :: step].ravel()


@dataclass(frozen=True)
class _Shares:
    """Share of the sampled voxels that lie in the range of air (with lung), and of soft tissue."""

    air: float
    soft: float

    @classmethod
    def of(cls, sample: np.ndarray, offset: int = 0) -> _Shares:
        hu = sample.astype(np.int32) - offset
        return cls(float(np.mean((hu >= AIR - 1) & (hu < -500))), float(np.mean((hu > -200) & (hu < 200))))

    @property
    def like_ct(self) -> bool:
        return self.air > 0.01 and self.soft > 0.02


def _is_offset(sample: np.ndarray) -> bool:
    """Whether adding 1024 explains the values: none is negative, and air and soft tissue lie where they then would."""
    if np.percentile(sample, 0.1) < -100 or _Shares.of(sample).like_ct:
        return False
    shares = _Shares.of(sample, _OFFSET)
    hu = sample.astype(np.int32) - _OFFSET
    # In a CT fat and muscle make a narrow peak, and little lies between it and the lung; in MR the values spread.
    peak = float(np.mean((hu > -140) & (hu < 110)))
    between, above = float(np.mean((hu > -500) & (hu < -200))), float(np.mean(hu > 200))
    # In MR the lungs are as dark as the air around the patient; in a CT they are some 100 HU brighter.
    dark, lung = float(np.mean(hu < -500)), float(np.mean((hu > -880) & (hu < -600)))
    narrow = peak > 0.7 * shares.soft and shares.soft > 2 * between and shares.soft > 2 * above
    return shares.like_ct and narrow and lung > 0.12 * dark


def _subtract(array: np.ndarray, value: int) -> None:
    np.maximum(array, value - 32768, out=array)
    np.subtract(array, np.int16(value), out=array)


def _check_scale(array: np.ndarray) -> None:
    """Refuse the usual scales of exported gray values."""
    sample = _sample(array)
    sample = sample[np.isfinite(sample)]
    low, high = (float(sample.min()), float(sample.max())) if sample.size else (0.0, 0.0)
    scale = ""
    if low == high:
        scale = f"all {low:g}"
    elif low >= -1.5 and high <= 1.5:
        scale = "normalized to about 0-1"
    elif low >= 0 and high <= 255:
        scale = "8-bit gray values (0-255)"
    elif low > -20 and high < 20:
        scale = f"standardized ({low:.1f} to {high:.1f})"
    if scale:
        raise UnsuitableImage(f"The values are {scale}, not HU; export the original CT series without rescaling.")


def _check_hu(sample: np.ndarray) -> None:
    low, high = (float(x) for x in np.percentile(sample, [0.1, 99.9]))
    shares = _Shares.of(sample)
    if shares.like_ct:
        return
    if low > -500:
        raise UnsuitableImage(
            f"The values ({low:.0f} to {high:.0f}) hold no air, so this is no chest CT in HU (an MR, rescaled or "
            "windowed gray values, or no lung in view?); give the original CT series of the chest."
        )
    if shares.soft <= 0.02:
        raise UnsuitableImage(
            f"The values ({low:.0f} to {high:.0f}) hold no soft tissue, so this is no CT in HU; "
            "export the original CT series."
        )
    raise UnsuitableImage("There is no air-filled lung in view; give a CT of the chest.")


def _check_lungs(ct: Volume) -> None:
    """Cheap: is there enough tissue of the lung's density? Where the lungs lie is for the quality checks to tell."""
    steps = [max(1, round(_LUNG_GRID_MM / step)) for step in ct.spacing[::-1]]
    small = _block_means(ct.array, steps)
    lung = (small > _LUNG_HU[0]) & (small < _LUNG_HU[1])
    # The rim between body and air has that density too, but is thin.
    core = ndimage.binary_erosion(lung, ndimage.generate_binary_structure(3, 1))
    voxel_ml = float(np.prod(ct.spacing) * np.prod(steps)) / 1000
    if core.sum() * voxel_ml < _MIN_LUNG_ML:
        raise UnsuitableImage("There is no air-filled lung in view; give a CT of the chest.")


def _block_means(array: np.ndarray, steps: list[int]) -> np.ndarray:
    """float32 means over blocks of ``steps`` voxels (k, j, i); what is left over at the end is dropped."""
    counts = [max(1, n // step) for n, step in zip(array.shape, steps, strict=True)]
    means = np.empty(counts, np.float32)
    for k in range(counts[0]):
        planes = array[k * steps[0] : (k + 1) * steps[0], : counts[1] * steps[1], : counts[2] * steps[2]]
        flat = planes.mean(axis=0, dtype=np.float32)
        means[k] = flat.reshape(counts[1], steps[1], counts[2], steps[2]).mean(axis=(1, 3))
    return means
