"""Sampling an anatomy's label map on any grid: smooth at finer spacing, consistent between a crop and the whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from LCTfoundLib.volume import Volume

__all__ = ["LUNG_CODE", "Frame", "gaussian", "lung_field", "sample_labels", "uniform_blocks"]

#: Joint codes: organs keep theirs, a lung voxel is ``LUNG_CODE`` + segment (0-18).
LUNG_CODE = 32
_CODES = 64

#: Sigma in voxels that takes the steps out of a binary surface; more would round off the recesses.
_SMOOTHING = 0.7


@dataclass(frozen=True)
class Frame:
    """A canonical voxel grid with a spacing per axis.

    Attributes:
        origin: LPS mm of voxel (0, 0, 0), (x, y, z).
        step: mm along x, y, z.
        shape: (k, j, i).
    """

    origin: tuple[float, float, float]
    step: tuple[float, float, float]
    shape: tuple[int, int, int]

    @classmethod
    def of_box(cls, low: np.ndarray, high: np.ndarray, step: tuple[float, float, float]) -> Frame:
        """The grid whose voxels tile a box (LPS mm)."""
        size = np.maximum(1, np.round((np.asarray(high) - np.asarray(low)) / step).astype(int))
        origin = np.asarray(low) + np.asarray(step) / 2
        x, y, z = (float(v) for v in origin)
        return cls((x, y, z), step, (int(size[2]), int(size[1]), int(size[0])))

    @property
    def voxel(self) -> float:
        """Geometric mean of the steps, mm."""
        return float(np.cbrt(np.prod(self.step)))

    def grown(self, voxels: tuple[int, int, int]) -> Frame:
        """With a margin of whole voxels along x, y, z on both sides."""
        x, y, z = (o - n * s for o, n, s in zip(self.origin, voxels, self.step, strict=True))
        k, j, i = (n + 2 * v for n, v in zip(self.shape, voxels[::-1], strict=True))
        return Frame((x, y, z), self.step, (k, j, i))

    def split_slices(self, parts: int) -> Frame:
        """Each slice cut into ``parts`` thinner ones around the same center."""
        step = self.step[2] / parts
        start = self.origin[2] - step * (parts - 1) / 2
        k, j, i = self.shape
        return Frame((self.origin[0], self.origin[1], start), (self.step[0], self.step[1], step), (k * parts, j, i))

    def axis(self, axis: int) -> np.ndarray:
        """LPS mm of the voxel centers along x (0), y (1) or z (2); float64."""
        return self.origin[axis] + self.step[axis] * np.arange(self.shape[2 - axis])

    def volume(self, array: np.ndarray) -> Volume:
        """An array [k, j, i] on this grid as a canonical volume."""
        return Volume(array, self.step, self.origin)


def uniform_blocks(codes: np.ndarray) -> np.ndarray:
    """Bool [k, j, i]: whether the 4x4x4 block from one voxel before to two after holds a single code."""
    low = high = codes
    for axis in range(3):
        low, high = _window(low, axis, np.minimum), _window(high, axis, np.maximum)
    return low == high


def _window(array: np.ndarray, axis: int, function: np.ufunc) -> np.ndarray:
    """``function`` over the window [-1, +2] along an axis, clamped at the ends."""
    moved = np.moveaxis(array, axis, 0)
    padded = np.concatenate([moved[:1], moved, moved[-1:], moved[-1:]])
    count = len(moved)
    pair = function(padded[:-1], padded[1:])
    result = function(pair[:count], pair[2 : count + 2])
    return np.moveaxis(result, 0, axis)


def lung_field(codes: np.ndarray) -> np.ndarray:
    """Lung smoothed by a small Gaussian, uint8 [k, j, i] (255 = lung all around); its 50 % surface is smooth."""
    field = (255.0 * (codes >= LUNG_CODE)).astype(np.float32)
    return np.round(gaussian(field, (_SMOOTHING,) * 3)).astype(np.uint8)


def sample_labels(
    codes: np.ndarray,
    uniform: np.ndarray,
    field: np.ndarray,
    source: Frame,
    frame: Frame,
    means: np.ndarray,
    want_hu: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and mean HU of a joint code map on another grid.

    The lung's surface is where its smoothed indicator passes one half; what lies on either side of it is decided by
    cubic B-spline weights of each class's indicator. Surfaces are smooth, not enlarged voxels.

    Args:
        codes: uint8 [k, j, i] joint codes on ``source``.
        uniform: of ``uniform_blocks``.
        field: of ``lung_field``.
        means: (64,) float32, HU per joint code.
        want_hu: False leaves the second result empty.

    Returns:
        uint8 joint codes and float32 HU (partial volume at the surfaces), both [k, j, i] on ``frame``.
    """
    tables = [_weights(frame.axis(axis), source.origin[axis], source.step[axis]) for axis in (2, 1, 0)]
    labels = np.zeros(frame.shape, np.uint8)
    hu = np.zeros(frame.shape if want_hu else (0, 0, 0), np.float32)
    (bk, wk), (bj, wj), (bi, wi) = tables
    # The B-spline blurs too, by a variance of 1/3 voxel^2.
    slope = np.sqrt(2 * np.pi * (_SMOOTHING**2 + 1 / 3)) * source.step[0] / frame.voxel
    _vote(codes, uniform, field, bk, wk, bj, wj, bi, wi, means.astype(np.float32), slope, labels, hu, want_hu)
    return labels, hu


def _weights(positions: np.ndarray, origin: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Base index (before the position) and the four cubic B-spline weights at each position."""
    u = (positions - origin) / step
    base = np.floor(u + 1e-9).astype(np.int64)
    f = np.clip(u - base, 0.0, 1.0)
    weights = np.stack(
        [(1 - f) ** 3 / 6, (3 * f**3 - 6 * f**2 + 4) / 6, (-3 * f**3 + 3 * f**2 + 3 * f + 1) / 6, f**3 / 6], axis=1
    )
    return base, weights.astype(np.float32)


@njit(cache=True, fastmath=True)
def _vote(codes, uniform, field, bk, wk, bj, wj, bi, wi, means, slope, labels, hu, want_hu):  # type: ignore[no-untyped-def]
    nk, nj, ni = codes.shape
    total = np.zeros(_CODES, np.float32)
    seen = np.zeros(64, np.uint8)
    air = np.uint8(0)
    for k in range(labels.shape[0]):
        z = min(max(bk[k], 0), nk - 1)
        for j in range(labels.shape[1]):
            y = min(max(bj[j], 0), nj - 1)
            beyond = bj[j] < -1 or bj[j] >= nj
            for i in range(labels.shape[2]):
                x = min(max(bi[i], 0), ni - 1)
                outside = beyond or bi[i] < -1 or bi[i] >= ni
                if outside or uniform[z, y, x]:
                    code = air if outside else codes[z, y, x]
                    labels[k, j, i] = code
                    if want_hu:
                        hu[k, j, i] = means[code]
                    continue
                corner = bk[k], bj[j], bi[i]
                count, mix, lung, level = _gather(codes, field, corner, wk[k], wj[j], wi[i], means, total, seen)
                # The field's distance from one half, in voxels of the target, is the depth below the lung's surface.
                cover = np.float32(0.5) + (level / np.float32(255) - np.float32(0.5)) * slope
                cover = min(np.float32(1), max(np.float32(0), cover))
                if lung < 0.001:
                    cover = np.float32(0)
                elif lung > 0.999:
                    cover = np.float32(1)
                labels[k, j, i] = _winner(total, seen, count, cover >= 0.5)
                if want_hu:
                    rest = mix * (1 - cover) / (1 - lung) if cover < 1 else np.float32(0)
                    hu[k, j, i] = cover * means[LUNG_CODE] + rest


@njit(cache=True, fastmath=True)
def _gather(codes, field, corner, wk, wj, wi, means, total, seen):  # type: ignore[no-untyped-def]
    """Weigh the 64 voxels around a position into ``total`` by class.

    Returns:
        number of classes in ``seen``, weighted HU of the organs, weight of lung, weighted lung field.
    """
    nk, nj, ni = codes.shape
    count = 0
    mix, lung, level = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for dz in range(4):
        z = min(max(corner[0] + dz - 1, 0), nk - 1)
        for dy in range(4):
            y = min(max(corner[1] + dy - 1, 0), nj - 1)
            row = wk[dz] * wj[dy]
            if row <= 0:
                continue
            for dx in range(4):
                weight = row * wi[dx]
                if weight <= 0:
                    continue
                x = min(max(corner[2] + dx - 1, 0), ni - 1)
                code = codes[z, y, x]
                if total[code] == 0:
                    seen[count] = code
                    count += 1
                total[code] += weight
                level += weight * field[z, y, x]
                if code >= LUNG_CODE:
                    lung += weight
                else:
                    mix += weight * means[code]
    return count, mix, lung, level


@njit(cache=True)
def _winner(total, seen, count, lung):  # type: ignore[no-untyped-def]
    """The segment or the organ with most weight; empties ``total`` for the next voxel."""
    organ, organ_weight = 0, np.float32(-1.0)
    segment, segment_weight = 0, np.float32(-1.0)
    for index in range(count):
        code = seen[index]
        weight = total[code]
        total[code] = 0
        if code >= LUNG_CODE:
            if weight > segment_weight:
                segment, segment_weight = code, weight
        elif weight > organ_weight:
            organ, organ_weight = code, weight
    return segment if lung else organ


def gaussian(array: np.ndarray, sigma: tuple[float, float, float]) -> np.ndarray:
    """A Gaussian blur, sigma in voxels along k, j, i; float32, faster than a general filter."""
    for axis, width in enumerate(sigma):
        if width > 0.15:
            array = _convolve(array, _kernel(width), axis)
    return array


def _kernel(sigma: float) -> np.ndarray:
    """Gaussian integrated over voxels, odd length, float32."""
    reach = max(1, int(np.ceil(3 * sigma)))
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (x / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _convolve(array: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    out = np.empty_like(array)
    (_convolve_k, _convolve_j, _convolve_i)[axis](np.ascontiguousarray(array), kernel, out)
    return out


@njit(cache=True, fastmath=True)
def _convolve_k(array, kernel, out):  # type: ignore[no-untyped-def]
    reach = len(kernel) // 2
    last = array.shape[0] - 1
    for k in range(array.shape[0]):
        for j in range(array.shape[1]):
            out[k, j] = 0
            for m in range(len(kernel)):
                source = min(max(k + m - reach, 0), last)
                for i in range(array.shape[2]):
                    out[k, j, i] += kernel[m] * array[source, j, i]


@njit(cache=True, fastmath=True)
def _convolve_j(array, kernel, out):  # type: ignore[no-untyped-def]
    reach = len(kernel) // 2
    last = array.shape[1] - 1
    for k in range(array.shape[0]):
        for j in range(array.shape[1]):
            out[k, j] = 0
            for m in range(len(kernel)):
                source = min(max(j + m - reach, 0), last)
                for i in range(array.shape[2]):
                    out[k, j, i] += kernel[m] * array[k, source, i]


@njit(cache=True, fastmath=True)
def _convolve_i(array, kernel, out):  # type: ignore[no-untyped-def]
    reach = len(kernel) // 2
    size = array.shape[2]
    padded = np.empty(size + 2 * reach, np.float32)
    for k in range(array.shape[0]):
        for j in range(array.shape[1]):
            padded[:reach] = array[k, j, 0]
            padded[reach : reach + size] = array[k, j]
            padded[reach + size :] = array[k, j, size - 1]
            out[k, j] = 0
            for m in range(len(kernel)):
                for i in range(size):
                    out[k, j, i] += kernel[m] * padded[i + m]
