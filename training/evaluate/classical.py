"""The classical baseline that the nets have to beat: no learned weights, only textbook image processing.

* lungs: threshold inside the body, two largest parts, closed;
* airway: region growing from the trachea with a rising threshold, stopped before it explodes (Mori et al., 2000);
* vessels: Hessian vesselness (Sato et al., 1998, the line measure of Frangi-type filters) at three scales, threshold;
* artery and vein: no attempt at anatomy; the half of the vessel voxels nearer to the airway is called artery;
* lobes and segments: the territory that an atlas of phantoms has at the same place of the lung's bounding box.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from LCTfoundLib.anatomy.structures import SEGMENTS, Side, Tree
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.volume import Volume
from training.evaluate.metrics import CORNERS, FACES, crop_around, largest_component

__all__ = ["ClassicalResult", "SegmentAtlas", "build_atlas", "segment_classically"]

Spacing = tuple[float, float, float]

#: Codes of a lung side map.
RIGHT, LEFT = 1, 2
SIDE_CODES = {Side.RIGHT: RIGHT, Side.LEFT: LEFT}

WORKING_MM = 1.5
LUNG_HU = -400.0
BODY_HU = -300.0
SMALLEST_LUNG_ML = 150.0
CLOSE_MM = 6.0
AIR_HU = -900.0
#: Region growing: thresholds tried in turn, and the growth per step or total volume that counts as a leak.
GROW_HU = np.arange(-960, -780, 10.0)
LEAK_GROWTH = 1.4
RIM_HU = -500.0
LARGEST_AIRWAY_ML = 130.0
#: Line scales in mm, and the response (HU, scale-normalized) that counts as a vessel: best Dice on validation phantoms.
VESSEL_SCALES_MM = (0.9, 1.6, 2.8)
VESSEL_RESPONSE = 40.0
VESSEL_HU = -650.0
SMALLEST_VESSEL_ML = 0.2


@dataclass
class ClassicalResult:
    """What the baseline finds, on the input's grid.

    Attributes:
        segments: uint8 territory layer, codes 1-18.
        trees: uint8 tree layer, ``Tree`` codes.
    """

    segments: Volume
    trees: Volume


def segment_classically(ct: Volume, atlas: SegmentAtlas) -> ClassicalResult:
    """Segment a canonical CT (HU) with the classical baseline.

    Raises:
        UnsuitableImage: when no air-filled lungs are found.
    """
    work, zoom = _resampled(ct, WORKING_MM)
    spacing = (WORKING_MM,) * 3
    body = _body(work)
    air = _inner_air(work, body)
    airway = grow_airway(work, air, spacing)
    sides = _lung_sides(air & ~ndimage.binary_dilation(airway, FACES, iterations=2), spacing)
    vessels = _vessels(work, sides > 0, airway, spacing)
    trees = _name_vessels(vessels, airway, spacing)
    segments = atlas.segments(sides)
    back = [ct.with_array(_to_grid(array, zoom, ct.shape)) for array in (segments, trees)]
    return ClassicalResult(*back)


def _resampled(ct: Volume, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """HU on an isotropic grid, and the scale (new voxels per old voxel) along k, j, i."""
    scale = np.array(ct.spacing[::-1]) / spacing_mm
    hu = np.clip(np.asarray(ct.array, dtype=np.float32), -1024, 2000)
    # Average before dropping rows and columns; along a coarser axis nothing is lost and nothing is smoothed.
    sigma = np.where(scale < 0.8, 0.4 / scale, 0.0)
    shape = np.maximum(1, np.rint(np.array(ct.shape) * scale)).astype(int)
    result = ndimage.affine_transform(
        ndimage.gaussian_filter(hu, sigma), 1 / scale, output_shape=tuple(shape), order=1, mode="nearest"
    )
    return result, scale


def _to_grid(labels: np.ndarray, scale: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Nearest-neighbor way back from the working grid."""
    picks = [
        np.clip(np.rint(np.arange(size) * factor), 0, have - 1).astype(int)
        for size, factor, have in zip(shape, scale, labels.shape, strict=True)
    ]
    return labels[np.ix_(*picks)]


# -- lungs -----------------------------------------------------------------------------------------------------------


def _body(hu: np.ndarray) -> np.ndarray:
    """The patient: largest dense part, holes filled slice by slice.

    An opening cuts off the table; a thin chest wall that it took as well is given back.
    """
    dense = hu > BODY_HU
    body = largest_component(ndimage.binary_opening(dense, FACES, iterations=2))
    body |= dense & ndimage.binary_dilation(body, FACES, iterations=3)
    filled = np.zeros_like(body)
    for k in range(len(body)):
        filled[k] = ndimage.binary_fill_holes(body[k])
    return filled


def _inner_air(hu: np.ndarray, body: np.ndarray) -> np.ndarray:
    return (hu < LUNG_HU) & body


def _lung_sides(air: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Right (1) and left (2) lung of an air mask without the airway."""
    labels, count = ndimage.label(ndimage.binary_opening(air, FACES), FACES)
    sizes = np.bincount(labels.ravel(), minlength=count + 1) * np.prod(spacing) / 1000
    sizes[0] = 0
    lungs = np.isin(labels, np.flatnonzero(sizes >= SMALLEST_LUNG_ML))
    if not lungs.any():
        raise UnsuitableImage("No air-filled lungs were found; check that this is a chest CT in HU.")
    radius = CLOSE_MM / spacing[0]
    box = crop_around(lungs, margin=int(np.ceil(radius)) + 1)
    closed = _closed(lungs[box], radius)
    sides = np.zeros(air.shape, dtype=np.uint8)
    markers = _side_markers(lungs[box], spacing)
    sides[box] = watershed(-ndimage.distance_transform_edt(closed), markers, mask=closed)
    return sides


def _closed(mask: np.ndarray, radius: float) -> np.ndarray:
    """Closing with a ball by two distance transforms; vessels and small tumors come in."""
    grown = ndimage.distance_transform_edt(~mask) <= radius
    return mask | (ndimage.distance_transform_edt(grown) > radius)


def _side_markers(lungs: np.ndarray, spacing: Spacing) -> np.ndarray:
    """One marker per lung: erode until right and left part; with one lung only, one marker."""
    depth = ndimage.distance_transform_edt(lungs, sampling=spacing[::-1])
    middle = float(np.argwhere(lungs)[:, 2].mean())
    for radius in (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0):
        labels, count = ndimage.label(depth > radius, FACES)
        if count < 2:
            continue
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        first, second = np.argsort(sizes)[::-1][:2]
        if sizes[second] > 0.15 * sizes[first]:
            x = [float(np.argwhere(labels == label)[:, 2].mean()) for label in (first, second)]
            right, left = (first, second) if x[0] < x[1] else (second, first)
            return np.where(labels == right, RIGHT, np.where(labels == left, LEFT, 0))
    return np.where(depth > 0, np.where(np.arange(lungs.shape[2]) < middle, RIGHT, LEFT), 0)


# -- airway ----------------------------------------------------------------------------------------------------------


def grow_airway(hu: np.ndarray, air: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Airway lumen by region growing from the trachea; empty when no trachea is seen.

    Args:
        hu: [k, j, i] at ``spacing``.
        air: mask of air inside the body; growth is confined to it.
    """
    seed = _trachea_seed(hu, air, spacing)
    if seed is None:
        return np.zeros(hu.shape, dtype=bool)
    voxel_ml = float(np.prod(spacing)) / 1000
    accepted = np.zeros(hu.shape, dtype=bool)
    for threshold in GROW_HU:
        labels, _ = ndimage.label(air & (hu < threshold), FACES)
        if labels[seed] == 0:
            continue
        grown = labels == labels[seed]
        size, before = grown.sum() * voxel_ml, accepted.sum() * voxel_ml
        if size > LARGEST_AIRWAY_ML or (before > 10 and size > LEAK_GROWTH * before):
            break
        accepted = grown
    # The threshold stops at the blurred rim of the lumen: one more layer, up to halfway to the wall.
    rim = ndimage.binary_dilation(accepted, FACES) & air & (hu < RIM_HU)
    return ndimage.binary_closing(accepted | rim, FACES)


def _trachea_seed(hu: np.ndarray, air: np.ndarray, spacing: Spacing) -> tuple[int, int, int] | None:
    """A voxel of the trachea: the round air hole near the midline that goes on through the most slices."""
    pixel = spacing[0] * spacing[1]
    middle = hu.shape[2] / 2
    best: tuple[float, tuple[int, int, int]] | None = None
    tracks: list[tuple[int, float, float]] = []
    for k in range(hu.shape[0] - 1, hu.shape[0] // 3, -1):
        labels, count = ndimage.label(air[k] & (hu[k] < AIR_HU))
        found = []
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            hole = labels[box] == label
            area, height, width = hole.sum() * pixel, *hole.shape
            if not 60 <= area <= 700 or max(height, width) > 2.2 * min(height, width):
                continue
            j, i = (s.start + c for s, c in zip(box, ndimage.center_of_mass(hole), strict=True))
            if abs(i - middle) * spacing[0] > 60:
                continue
            length = 1 + max((n for n, y, x in tracks if np.hypot(y - j, x - i) * spacing[0] < 6), default=0)
            found.append((length, j, i))
            place = (k, round(j), round(i))
            if labels[place[1:]] == label and (best is None or length > best[0]):
                best = (length, place)
        tracks = found
    return best[1] if best and best[0] * spacing[2] >= 15 else None


# -- vessels ---------------------------------------------------------------------------------------------------------


def _vessels(hu: np.ndarray, lungs: np.ndarray, airway: np.ndarray, spacing: Spacing) -> np.ndarray:
    box = crop_around(lungs, margin=4)
    inside = lungs[box]
    # Outside the lungs the chest wall would answer as one large vessel.
    filled = np.where(inside, np.minimum(hu[box], 100), np.float32(-850.0))
    response = line_response(filled, spacing, VESSEL_SCALES_MM)
    wall = ndimage.binary_dilation(airway[box], CORNERS, iterations=1)
    # The lung's rim is an edge of `filled`; a vessel starts two voxels further in.
    found = (response > VESSEL_RESPONSE) & (filled > VESSEL_HU) & ndimage.binary_erosion(inside, FACES) & ~wall
    labels, count = ndimage.label(found, CORNERS)
    sizes = np.bincount(labels.ravel(), minlength=count + 1) * np.prod(spacing) / 1000
    sizes[0] = 0
    result = np.zeros(hu.shape, dtype=bool)
    result[box] = (sizes >= SMALLEST_VESSEL_ML)[labels]
    return result


def line_response(hu: np.ndarray, spacing: Spacing, scales_mm: Iterable[float]) -> np.ndarray:
    """Bright-line measure: the largest over scales of sigma^2 * sqrt(l2 * l3), l3 <= l2 < 0 eigenvalues of the Hessian.

    In HU; a cylinder of contrast c at its matching scale answers with about c / 3, a plane or a step with about 0.
    """
    best = np.zeros(hu.shape, dtype=np.float32)
    for scale in scales_mm:
        hessian = _hessian(hu.astype(np.float32), np.array(spacing[::-1]), scale)
        middle, smallest = _two_smallest_eigenvalues(hessian)
        lines = middle < 0
        response = np.zeros_like(best)
        response[lines] = np.sqrt(middle[lines] * smallest[lines])
        np.maximum(best, scale**2 * response, out=best)
    return best


def _hessian(hu: np.ndarray, spacing: np.ndarray, scale: float) -> list[np.ndarray]:
    """Second derivatives of the smoothed image per mm^2: kk, jj, ii, kj, ki, ji."""
    result = []
    for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
        order = [0, 0, 0]
        order[a] += 1
        order[b] += 1
        derivative = ndimage.gaussian_filter(hu, scale / spacing, order=order, truncate=3.0)
        result.append(derivative / float(spacing[a] * spacing[b]))
    return result


def _two_smallest_eigenvalues(hessian: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Middle and smallest eigenvalue of symmetric 3x3 matrices in closed form (Smith 1961); far faster than LAPACK."""
    kk, jj, ii, kj, ki, ji = hessian
    mean = (kk + jj + ii) / 3
    off = kj**2 + ki**2 + ji**2
    spread = np.sqrt(((kk - mean) ** 2 + (jj - mean) ** 2 + (ii - mean) ** 2 + 2 * off) / 6)
    safe = np.where(spread > 1e-12, spread, 1)
    a, b, c, d, e, f = (kk - mean) / safe, (jj - mean) / safe, (ii - mean) / safe, kj / safe, ki / safe, ji / safe
    half = (a * (b * c - f * f) - d * (d * c - f * e) + e * (d * f - b * e)) / 2
    angle = np.arccos(np.clip(half, -1, 1)) / 3
    largest = mean + 2 * spread * np.cos(angle)
    smallest = mean + 2 * spread * np.cos(angle + 2 * np.pi / 3)
    return 3 * mean - largest - smallest, smallest


def _name_vessels(vessels: np.ndarray, airway: np.ndarray, spacing: Spacing) -> np.ndarray:
    """The tree layer; artery and vein by distance to the airway alone."""
    trees = np.zeros(vessels.shape, dtype=np.uint8)
    if airway.any():
        distance = ndimage.distance_transform_edt(~airway, sampling=spacing[::-1])
        near = distance <= np.median(distance[vessels]) if vessels.any() else vessels
    else:
        near = np.zeros_like(vessels)
    trees[vessels & near], trees[vessels & ~near] = Tree.ARTERY, Tree.VEIN
    trees[airway] = Tree.AIRWAY
    return trees


# -- territories -----------------------------------------------------------------------------------------------------


@dataclass
class SegmentAtlas:
    """For each lung, the commonest segment at each place of its bounding box.

    Attributes:
        right, left: uint8 (n, n, n) over (k, j, i) of the box, segment codes.
    """

    right: np.ndarray
    left: np.ndarray

    def segments(self, sides: np.ndarray) -> np.ndarray:
        """Territory layer (uint8) of a side map (1 right, 2 left): each lung tiled by its atlas."""
        result = np.zeros(sides.shape, dtype=np.uint8)
        for code, table in ((RIGHT, self.right), (LEFT, self.left)):
            lung = sides == code
            if lung.any():
                index = np.argwhere(lung)
                result[lung] = table[tuple(_box_cells(index, index, len(table)).T)]
        return result

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, right=self.right, left=self.left)

    @classmethod
    def load(cls, path: Path) -> SegmentAtlas:
        with np.load(path) as data:
            return cls(data["right"], data["left"])


def build_atlas(territories: Iterable[np.ndarray], cells: int = 24) -> SegmentAtlas:
    """The atlas of some territory layers (codes 1-18), for example of training phantoms."""
    votes = {side: np.zeros((cells,) * 3 + (19,), dtype=np.int64) for side in Side}
    codes = {side: [s.code for s in SEGMENTS if s.side is side] for side in Side}
    for segments in territories:
        for side in Side:
            lung = np.isin(segments, codes[side])
            index = np.argwhere(lung)
            if len(index):
                k, j, i = _box_cells(index, index, cells).T
                np.add.at(votes[side], (k, j, i, segments[lung]), 1)
    return SegmentAtlas(_winners(votes[Side.RIGHT]), _winners(votes[Side.LEFT]))


def _box_cells(index: np.ndarray, of: np.ndarray, cells: int) -> np.ndarray:
    """(N, 3) cell of each voxel within the bounding box of ``of``."""
    low, high = of.min(axis=0), of.max(axis=0) + 1
    return np.minimum((index - low) * cells // (high - low), cells - 1)


def _winners(votes: np.ndarray) -> np.ndarray:
    """The commonest code of each cell; cells no lung ever reached take their nearest neighbor's."""
    winner = votes.argmax(axis=-1)
    nearest = ndimage.distance_transform_edt(winner == 0, return_distances=False, return_indices=True)
    return winner[tuple(nearest)].astype(np.uint8)
