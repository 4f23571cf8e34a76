"""Thinning of a mask to one-voxel-wide lines with the same topology.

Why not scikit-image's: its 3D ``skeletonize`` erases straight tubes of even width completely (scikit-image issue 3757,
open since 2019; a quarter of random axis-parallel cylinders), and eats such branches from their tips.
"""

from __future__ import annotations

import numpy as np

__all__ = ["thin"]

# A 3x3x3 neighborhood is a 27-bit number: bit 9 * k + 3 * j + i, the center is bit 13.
_OFFSETS = [(k, j, i) for k in (-1, 0, 1) for j in (-1, 0, 1) for i in (-1, 0, 1)]
_CENTER = 13
_DIRECTIONS = [(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)]


def _bits(condition) -> np.int32:  # type: ignore[no-untyped-def]
    """The number with the bits of the offsets that fulfill a condition (the center never does)."""
    return np.int32(sum(1 << b for b, offset in enumerate(_OFFSETS) if b != _CENTER and condition(*offset)))


_ALL = _bits(lambda k, j, i: True)
_WITHIN_18 = _bits(lambda k, j, i: abs(k) + abs(j) + abs(i) <= 2)
_WITHIN_6 = _bits(lambda k, j, i: abs(k) + abs(j) + abs(i) == 1)
# Masks that keep a shift by one step along an axis from running into the next line.
_CENTER_BIT = np.int32(1 << _CENTER)
_NOT_LAST_I, _NOT_FIRST_I = (_bits(lambda k, j, i, e=edge: i != e) | _CENTER_BIT for edge in (1, -1))
_NOT_LAST_J, _NOT_FIRST_J = (_bits(lambda k, j, i, e=edge: j != e) | _CENTER_BIT for edge in (1, -1))
_NOT_LAST_K = _bits(lambda k, j, i: k != 1) | _CENTER_BIT


def thin(mask: np.ndarray) -> np.ndarray:
    """Centerlines (bool) of a mask: 26-connected, one voxel wide, the components, loops and cavities of the mask kept.

    Directional thinning: border voxels are deleted, one direction and one layer at a time, while they are simple
    (26-connected object, 6-connected background; Malandain & Bertrand 1992) and not the end of a line. Within a
    direction the eight parity classes of voxels follow one another: no two of a class touch, so deleting a whole class
    at once is as safe as one voxel after the other.

    Args:
        mask: bool or integer [k, j, i].
    """
    image = np.pad(np.asarray(mask) > 0, 1).astype(np.uint8)
    shape = image.shape
    flat = image.ravel()
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    steps = [int(np.dot(offset, strides)) for offset in _OFFSETS]
    alive = np.flatnonzero(flat)
    k, j, i = np.unravel_index(alive, shape)
    parity = (k & 1) * 4 + (j & 1) * 2 + (i & 1)
    changed = True
    while changed:
        changed = False
        for direction in _DIRECTIONS:
            border = flat[alive + int(np.dot(direction, strides))] == 0
            for group in range(8):
                candidates = alive[border & (parity == group)]
                gone = candidates[_deletable(flat, candidates, steps)]
                flat[gone] = 0
                changed |= bool(len(gone))
            kept = flat[alive] > 0
            alive, parity = alive[kept], parity[kept]
    return image[1:-1, 1:-1, 1:-1] > 0


def _deletable(flat: np.ndarray, index: np.ndarray, steps: list[int]) -> np.ndarray:
    """(M,) bool: voxels whose deletion changes neither topology nor the length of a line."""
    code = np.zeros(len(index), dtype=np.int32)
    for bit, step in enumerate(steps):
        if bit != _CENTER:
            code |= flat[index + step].astype(np.int32) << bit
    several = (code & (code - 1)) != 0  # more than one neighbor: not an end, not alone
    result = np.zeros(len(index), dtype=bool)
    result[several] = _is_simple(code[several])
    return result


def _is_simple(code: np.ndarray) -> np.ndarray:
    """(M,) bool: one object component around the voxel, and one background component that touches its faces."""
    background = ~code & _WITHIN_18
    faces = background & _WITHIN_6
    outside = _flooded(faces & -faces, background, _grow_6)
    simple = (faces != 0) & ((outside & faces) == faces)
    object_ = code & _ALL
    simple[simple] = _flooded((object_ & -object_)[simple], object_[simple], _grow_26) == object_[simple]
    return simple


def _flooded(start: np.ndarray, within: np.ndarray, grow) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The bits reached from ``start`` by growing within a set."""
    reached = start
    while True:
        grown = grow(reached) & within
        if (grown == reached).all():
            return reached
        reached = grown


def _grow_26(bits: np.ndarray) -> np.ndarray:
    bits = bits | (bits & _NOT_LAST_I) << 1 | (bits & _NOT_FIRST_I) >> 1
    bits = bits | (bits & _NOT_LAST_J) << 3 | (bits & _NOT_FIRST_J) >> 3
    return bits | (bits & _NOT_LAST_K) << 9 | bits >> 9


def _grow_6(bits: np.ndarray) -> np.ndarray:
    along_i = (bits & _NOT_LAST_I) << 1 | (bits & _NOT_FIRST_I) >> 1
    along_j = (bits & _NOT_LAST_J) << 3 | (bits & _NOT_FIRST_J) >> 3
    return bits | along_i | along_j | (bits & _NOT_LAST_K) << 9 | bits >> 9
