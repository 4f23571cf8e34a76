"""What the segmentation nets see: two HU windows and the position within the lungs' bounding box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["IN_CHANNELS", "LungBox", "network_input"]

#: Lung window, soft tissue window, position along k, j, i.
IN_CHANNELS = 5


@dataclass(frozen=True)
class LungBox:
    """Bounding box of the lungs in world coordinates.

    Attributes:
        low: (x, y, z) LPS mm of the right, anterior, inferior corner.
        high: (x, y, z) LPS mm of the left, posterior, superior corner.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    @classmethod
    def of_mask(
        cls, mask: np.ndarray, spacing: tuple[float, float, float], origin: tuple[float, float, float]
    ) -> LungBox:
        """The box of a non-empty boolean mask [k, j, i] on a canonical grid."""
        low, high = [], []
        for axis in (2, 1, 0):  # x, y, z
            others = tuple(a for a in range(3) if a != axis)
            used = np.flatnonzero(mask.any(axis=others))
            step, start = spacing[2 - axis], origin[2 - axis]
            low.append(start + step * float(used[0]))
            high.append(start + step * float(used[-1]))
        return cls((low[0], low[1], low[2]), (high[0], high[1], high[2]))


def network_input(
    ct: Tensor, spacing: tuple[float, float, float], origin: tuple[float, float, float], box: LungBox
) -> Tensor:
    """Input channels of the nets.

    Args:
        ct: HU [k, j, i], any dtype, on a canonical grid.
        spacing: mm along (i, j, k).
        origin: LPS mm of voxel 0.
        box: the lungs' bounding box; position -1..1 spans it. Position is given, not learned from the far field,
            so that patches and truncated scans keep it, and small nets need not spend capacity on it.

    Returns:
        float32 (5, k, j, i).
    """
    hu = ct.float()
    channels = [
        ((hu + 600.0) / 400.0).clamp(-1.0, 1.0),  # -1000..-200: parenchyma, airway wall, small vessels, fissures
        ((hu - 50.0) / 250.0).clamp(-1.0, 1.0),  # -200..300: fat, soft tissue, contrast
    ]
    for axis in range(3):
        xyz = 2 - axis
        count = hu.shape[axis]
        world = origin[xyz] + spacing[xyz] * torch.arange(count, dtype=torch.float32, device=hu.device)
        middle = (box.low[xyz] + box.high[xyz]) / 2
        half = max((box.high[xyz] - box.low[xyz]) / 2, 1.0)
        position = ((world - middle) / half).clamp(-1.5, 1.5)
        view = [1, 1, 1]
        view[axis] = count
        channels.append(position.view(view).expand(hu.shape))
    return torch.stack(channels)
