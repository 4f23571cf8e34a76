"""The lungs on a CT: a classical mask by threshold and components, and the HU edge for a network's coarse lungs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from LCTfoundLib.anatomy.masks import (
    FACES,
    Box,
    Spacing,
    bounding_box,
    close_ball,
    coarse_grid,
    component_containing,
    component_sizes,
    crop,
    fill_holes,
    largest_component,
    resample,
    signed_distance,
)
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.volume import Volume

__all__ = ["LungMask", "find_lungs", "lung_mask", "refine_lungs", "split_sides"]

#: Codes of the sides map.
RIGHT, LEFT = 1, 2

_WORKING_MM = 2.5
#: HU that divides aerated lung from soft tissue: halfway between -850 and +50.
_EDGE_HU = -400.0
_BODY_HU = -300.0
#: Air outside the patient, after averaging over 2.5 mm; aerated lung is denser.
_OUTER_AIR_HU = -940.0
#: Below any air: voxels outside the reconstructed circle.
_PADDING_HU = -1200.0
_AIRWAY_HU = -900.0
_SHORTEST_TRACHEA_MM = 20.0
_SMALLEST_LUNG_ML = 80.0
#: Gas in stomach or colon has no vessels: the mean of its inside stays below this.
_PURE_GAS_HU = -965.0


@dataclass
class LungMask:
    """The lungs found without a network.

    Attributes:
        sides: uint8 [k, j, i], 1 right lung, 2 left lung.
        airway: bool, trachea and main bronchi as far as they are seen outside the lungs.
    """

    sides: np.ndarray
    airway: np.ndarray

    @property
    def lungs(self) -> np.ndarray:
        """Both lungs, bool."""
        return self.sides > 0


# -- classical -------------------------------------------------------------------------------------------------------


def find_lungs(ct: Volume) -> tuple[Volume, LungMask]:
    """The lungs on a grid of about 2.5 mm: fast, for cropping.

    Args:
        ct: HU on a canonical grid.

    Returns:
        The averaged CT (float32 HU, -1024..1000) and the lungs on its grid.

    Raises:
        UnsuitableImage: no air-filled lung is in view.
    """
    grid = coarse_grid(ct, _WORKING_MM)
    hu = resample(ct, grid)
    padding = hu < _PADDING_HU
    np.clip(hu, -1024, 1000, out=hu)
    air = (hu < _EDGE_HU) & _inside_body(hu, padding)
    airway = _trachea(hu, air, grid.spacing)
    lungs = _lung_components(hu, air & ~ndimage.binary_dilation(airway, FACES), grid.spacing)
    closed = close_ball(lungs, 5.0, grid.spacing) & ~airway
    return grid.with_array(hu), LungMask(split_sides(closed, grid.spacing), airway)


def lung_mask(ct: Volume) -> LungMask:
    """Right and left lung by threshold and connected components on a 2.5 mm grid, refined at the HU edge.

    Consolidated lung and effusion are missed: use it as the baseline. For cropping alone ``find_lungs`` is enough.

    Args:
        ct: HU on a canonical grid.

    Returns:
        The lungs on the CT's grid.

    Raises:
        UnsuitableImage: no air-filled lung is in view.
    """
    grid, found = find_lungs(ct)
    airway = grid.with_array(found.airway)
    fine = refine_lungs(ct, grid.with_array(found.lungs), airway, band_mm=1.2 * _WORKING_MM)
    sides = np.where(fine, _nearest_side(grid.with_array(found.sides), ct), 0)
    return LungMask(sides.astype(np.uint8), resample(airway, ct, 0) & ~fine)


def _inside_body(hu: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """The patient with all holes: what no thin air reaches, slice by slice, from the image's sides or its padding.

    Lungs cut by a small field of view reach the sides too, but they are denser than air.
    """
    dense = ndimage.binary_opening(hu > _BODY_HU, FACES, iterations=2)
    body = largest_component(dense)  # without table and clothes
    thin = hu < _OUTER_AIR_HU
    inside = np.ones(hu.shape, dtype=bool)
    for k in range(len(hu)):
        labels, count = ndimage.label(~(body[k] | padding[k]))
        rim = np.zeros(labels.shape, dtype=bool)
        rim[[0, -1]] = rim[:, [0, -1]] = True
        rim |= ndimage.binary_dilation(padding[k], iterations=2)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        outer = np.bincount(labels.ravel(), weights=thin[k].ravel(), minlength=count + 1) > 0.4 * sizes
        touching = np.zeros(count + 1, dtype=bool)
        touching[labels[rim]] = True
        inside[k] = ~(outer & touching)[labels] & ~padding[k]
    return inside


def _lung_components(hu: np.ndarray, air: np.ndarray, spacing: Spacing) -> np.ndarray:
    labels, count = ndimage.label(ndimage.binary_opening(air, FACES), FACES)
    ml = component_sizes(labels) * float(np.prod(spacing)) / 1000
    lungs = np.zeros(count + 1, dtype=bool)
    for label in np.flatnonzero(ml >= _SMALLEST_LUNG_ML):
        part = labels == label
        core = ndimage.binary_erosion(part, FACES)
        lungs[label] = core.any() and float(hu[core].mean()) > _PURE_GAS_HU
        if ml[label] < 0.25 * ml.max() and (part[:, [0, -1]].any() or part[:, :, [0, -1]].any()):
            lungs[label] = False  # table foam at the side of a small field of view
    if not lungs.any():
        raise UnsuitableImage(
            "No air-filled lungs were found; check that the image is a CT of the chest in Hounsfield units (HU)."
        )
    # The opening broke off thin parts (costophrenic recess); give back what touches the lungs.
    opened = lungs[labels]
    return opened | (air & ndimage.binary_dilation(opened, FACES, iterations=2))


def _trachea(hu: np.ndarray, air: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Trachea and main bronchi: round holes near the midline, followed downward while they stay small."""
    thin = air & (hu < _AIRWAY_HU)
    pixel = spacing[0] * spacing[1]
    result = np.zeros(hu.shape, dtype=bool)
    track: np.ndarray | None = None
    top = int(np.flatnonzero(air.any(axis=(1, 2)))[-1]) if air.any() else -1
    for k in range(top, -1, -1):
        labels, count = ndimage.label(thin[k])
        if count == 0:
            track = None
            continue
        area = np.bincount(labels.ravel(), minlength=count + 1) * pixel
        area[0] = 0
        if track is None:
            chosen = _round_holes(labels, area, spacing)
        else:
            touched = np.unique(labels[track])
            chosen = [int(label) for label in touched if 0 < area[label] <= 900]
        track = np.isin(labels, chosen) if chosen else None
        if track is not None:
            result[k] = track
    # The border voxels are half wall.
    return ndimage.binary_dilation(_uppermost_tube(result, spacing), FACES) & air


def _uppermost_tube(tracks: np.ndarray, spacing: Spacing) -> np.ndarray:
    """The track that begins highest, of those long enough for a trachea: gas in the colon is tracked too, but lower."""
    labels, _ = ndimage.label(tracks, FACES)
    tops = [
        (box[0].stop, label)
        for label, box in enumerate(ndimage.find_objects(labels), start=1)
        if (box[0].stop - box[0].start) * spacing[2] >= _SHORTEST_TRACHEA_MM
    ]
    return labels == max(tops)[1] if tops else np.zeros_like(tracks)


def _round_holes(labels: np.ndarray, area: np.ndarray, spacing: Spacing) -> list[int]:
    """The one round hole of a trachea's size in the middle third of a slice, if there is one."""
    middle = (labels.shape[1] - 1) / 2
    best: list[tuple[float, int]] = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        height, width = (s.stop - s.start for s in box)
        if not 60 <= area[label] <= 800 or max(height, width) > 2.2 * min(height, width):
            continue
        off = abs((box[1].start + box[1].stop - 1) / 2 - middle) * spacing[0]
        if off < 60:
            best.append((off, label))
    return [min(best)[1]] if best else []


def split_sides(lungs: np.ndarray, spacing: Spacing) -> np.ndarray:
    """Right (1) and left (2) lung, uint8: lungs that touch are parted where they are thinnest; islands go by x.

    With one lung only, it is named by the side of the image it lies on.
    """
    depth = ndimage.distance_transform_edt(lungs, sampling=spacing[::-1])
    markers = _side_markers(depth, lungs.shape[2])
    return watershed(-depth, markers, mask=lungs).astype(np.uint8)


def _side_markers(depth: np.ndarray, width: int) -> np.ndarray:
    """A marker in each lung: the first erosion that leaves two large parts beside each other."""
    for radius in (0.0, 2.5, 5.0, 7.5, 10.0, 12.5, 15.0):
        labels, count = ndimage.label(depth > radius, FACES)
        sizes = component_sizes(labels)
        order = np.argsort(sizes)[::-1][:2]
        if count < 2 or sizes[order[1]] < 0.12 * sizes[order[0]]:
            continue
        x = np.array([c[2] for c in ndimage.center_of_mass(labels > 0, labels, order)])
        if abs(x[0] - x[1]) < 0.15 * width:
            continue
        markers = np.zeros(depth.shape, dtype=np.int32)
        markers[labels == order[int(x.argmin())]] = RIGHT
        markers[labels == order[int(x.argmax())]] = LEFT
        return _mark_islands(markers, depth > 0, x)
    middle = (np.argwhere(depth > 0)[:, 2].mean()) if (depth > 0).any() else 0.0
    return np.where(depth > 0, RIGHT if middle < (width - 1) / 2 else LEFT, 0)


def _mark_islands(markers: np.ndarray, lungs: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Give components without a marker the side whose center is nearer."""
    labels, count = ndimage.label(lungs, FACES)
    marked = np.unique(labels[markers > 0])
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if label not in marked:
            here = (box[2].start + box[2].stop - 1) / 2
            part = labels[box] == label
            markers[box][part] = RIGHT if abs(here - x.min()) < abs(here - x.max()) else LEFT
    return markers


def _nearest_side(sides: Volume, ct: Volume) -> np.ndarray:
    """Side of every voxel of the CT's grid: that of the nearest lung voxel."""
    index = ndimage.distance_transform_edt(
        sides.array == 0, sampling=sides.spacing[::-1], return_distances=False, return_indices=True
    )
    return resample(sides.with_array(sides.array[tuple(index)]), ct, order=0)


# -- refinement ------------------------------------------------------------------------------------------------------


def refine_lungs(ct: Volume, coarse_lungs: Volume, airway: Volume | None = None, band_mm: float = 4.0) -> np.ndarray:
    """Snap the border of coarse lungs to the HU edge.

    Deeper than ``band_mm`` inside nothing changes, so consolidation, tumors and vessels stay in, and farther outside
    nothing comes in. Within the band, aerated voxels connected to the lung belong to it; dense voxels belong to it
    where the lung beneath is dense too (pathology at the pleura: the HU edge says nothing and the network decides) or
    where a closing fills them (vessels, nodules).

    Args:
        ct: HU on a canonical grid.
        coarse_lungs: mask or probability (border at 0.5) on any canonical grid.
        airway: mask or probability of the airway on any canonical grid; what of it lies outside the coarse lungs stays
            outside.
        band_mm: how far the border may move.

    Returns:
        bool [k, j, i] on the CT's grid.
    """
    inside = coarse_lungs.array > 0.5 if coarse_lungs.array.dtype != bool else coarse_lungs.array
    box = bounding_box(inside, coarse_lungs.spacing, band_mm + 2 * max(coarse_lungs.spacing))
    result = np.zeros(ct.array.shape, dtype=bool)
    if box is None:
        return result
    depth = crop(coarse_lungs, box)
    depth = depth.with_array(_sub_voxel_distance(depth))
    target = _overlap(ct, depth)
    part = crop(ct, target)
    result[target] = _snap(part, depth, airway, band_mm)
    return result


def _sub_voxel_distance(lungs: Volume) -> np.ndarray:
    """Signed distance of a mask or of the 0.5 level of a probability: linear between voxels near the border."""
    if lungs.array.dtype == bool:
        return signed_distance(lungs.array, lungs.spacing)
    distance = signed_distance(lungs.array > 0.5, lungs.spacing)
    # Where the probability is between 0 and 1 it places the border within the voxel.
    shift = (np.clip(lungs.array, 0.0, 1.0) - 0.5) * min(lungs.spacing)
    near = np.abs(distance) < 0.75 * max(lungs.spacing)
    distance[near] = shift[near]
    return distance


def _overlap(ct: Volume, region: Volume) -> Box:
    """The voxels of the CT that a region of another grid covers."""
    slices = []
    for axis in range(3):
        x = 2 - axis
        low = region.origin[x] - region.spacing[x] / 2
        high = low + region.spacing[x] * region.array.shape[axis]
        start = int(np.ceil((low - ct.origin[x]) / ct.spacing[x]))
        stop = int(np.floor((high - ct.origin[x]) / ct.spacing[x])) + 1
        slices.append(slice(max(0, start), max(0, min(stop, ct.array.shape[axis]))))
    return slices[0], slices[1], slices[2]


def _snap(ct: Volume, depth: Volume, airway: Volume | None, band_mm: float) -> np.ndarray:
    hu = ct.array
    border = resample(depth, ct)
    core = border > band_mm
    aerated = (hu < _EDGE_HU) & (border > -band_mm)
    if airway is not None:
        aerated &= ~_foreign_airway(airway, depth, ct)
    aerated &= core | _reached(aerated, core)
    lungs = core | aerated | ((border > 0) & (_dense_beneath(ct, depth, band_mm) > 0.5))
    return _filled_and_smooth(lungs, border, ct, band_mm)


def _reached(aerated: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Aerated voxels connected to the core over faces; the whole aerated part where there is no core (tiny lungs)."""
    if not core.any():
        return aerated
    return component_containing(aerated | core, core, FACES)


def _foreign_airway(airway: Volume, depth: Volume, ct: Volume) -> np.ndarray:
    """Airway outside the coarse lungs, with its wall."""
    mask = airway.array > 0.5 if airway.array.dtype != bool else airway.array
    outside = mask & (resample(depth, airway) < 1.0)
    wall = ndimage.binary_dilation(outside, FACES, iterations=max(1, round(1.5 / min(airway.spacing))))
    return resample(airway.with_array(wall.astype(np.float32)), ct) > 0.5


def _dense_beneath(ct: Volume, depth: Volume, band_mm: float) -> np.ndarray:
    """Share of dense voxels in the core nearby (a Gaussian window of 4 mm), on the CT's grid."""
    core = depth.array > band_mm
    dense = core & (resample(ct, depth) >= _EDGE_HU)
    sigma = 4.0 / np.array(depth.spacing[::-1])
    weight, share = (ndimage.gaussian_filter(part.astype(np.float32), sigma) for part in (core, dense))
    return resample(depth.with_array(np.where(weight > 1e-3, share / np.maximum(weight, 1e-3), 0.0)), ct)


def _filled_and_smooth(lungs: np.ndarray, border: np.ndarray, ct: Volume, band_mm: float) -> np.ndarray:
    """Close over vessels and nodules (3.5 mm ball, on a 2 mm grid), smooth by a Gaussian of 0.7 mm, fill holes."""
    grid = coarse_grid(ct, 2.0)
    coarse = resample(ct.with_array(lungs.astype(np.float32)), grid) > 0.5
    closed = fill_holes(close_ball(coarse, 3.5, grid.spacing))
    # The closing only adds where it is sure, so that its coarser border does not show.
    added = resample(grid.with_array((closed & ~coarse).astype(np.float32)), ct) > 0.6
    lungs = lungs | (added & (border > -band_mm))
    smooth = ndimage.gaussian_filter(lungs.astype(np.float32), 0.7 / np.array(ct.spacing[::-1]), truncate=2.0) > 0.5
    return fill_holes(smooth)
