"""The patient in a slice: where images are compared."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from LCTfoundLib.anatomy.masks import largest_component

__all__ = ["body_mask"]

_BODY_HU, _OUTER_AIR_HU = -500.0, -880.0
#: Table, cables and clothes are thinner than this; the opening cuts them off.
_THIN_MM = 6.0


def body_mask(hu: np.ndarray, pixel_mm: float) -> np.ndarray:
    """The patient with all holes, of a single slice: what no outer air reaches from the picture's rim.

    Lungs that a small field of view cuts reach the rim too, but are denser than air and the couch's foam (-900 HU).

    Args:
        hu: (H, W).
        pixel_mm: side of a pixel.

    Returns:
        bool (H, W); empty if nothing in the picture is as dense as tissue.
    """
    dense = hu > _BODY_HU
    # Tissue at the rim goes on beyond it: the opening must not take it for thin.
    reach = max(1, round(_THIN_MM / 2 / pixel_mm))
    disk = np.hypot(*np.ogrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    opened = ndimage.binary_opening(np.pad(dense, reach, mode="edge"), disk)[reach:-reach, reach:-reach]
    body = largest_component(opened, np.ones((3, 3), bool))
    if not body.any():
        return body
    labels, count = ndimage.label(~body)
    rim = np.zeros(labels.shape, bool)
    rim[[0, -1]] = rim[:, [0, -1]] = True
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    thin = np.bincount(labels.ravel(), weights=(hu < _OUTER_AIR_HU).ravel(), minlength=count + 1)
    outer = thin > 0.4 * sizes
    outer[np.setdiff1d(np.arange(count + 1), labels[rim])] = False
    outer[0] = False
    return ~outer[labels]
