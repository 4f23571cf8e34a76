"""Hounsfield units and linear attenuation, for tensors and arrays alike.

The scale by definition: water is 0 HU and a vacuum is -1000 HU, in between and beyond linear (ICRU Report 87, 2012).
Air is taken for a vacuum, as every reconstruction does whose scanner was calibrated in air.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from torch import Tensor

__all__ = ["HU_OF_VACUUM", "WATER_PER_MM", "attenuation_of", "hu_of"]

#: Linear attenuation of water, 1/mm, at 70 keV: the mean energy of a 120 kV tube (NIST XCOM, without coherent
#: scattering 0.0192 to 0.0193).
WATER_PER_MM = 0.0192
#: What does not attenuate.
HU_OF_VACUUM = -1000.0

_Values = TypeVar("_Values", float, np.ndarray, Tensor)


def attenuation_of(hu: _Values, water_per_mm: float = WATER_PER_MM) -> _Values:
    """Linear attenuation of Hounsfield units.

    Values below -1000 HU (noise, and the -1024 or -2048 outside of a scan's field) become negative, so that the way
    back is exact; clamp the HU first where a body without negative attenuation is needed.

    Args:
        hu: of any shape; floating point, or an array of integers.
        water_per_mm: attenuation of water, 1/mm, at the energy in question.

    Returns:
        1/mm, of the shape of ``hu``.
    """
    return (hu - HU_OF_VACUUM) * (water_per_mm / 1000.0)


def hu_of(attenuation: _Values, water_per_mm: float = WATER_PER_MM) -> _Values:
    """Hounsfield units of linear attenuation, the inverse of :func:`attenuation_of`.

    Args:
        attenuation: 1/mm, of any shape.
        water_per_mm: attenuation of water, 1/mm, at the energy in question.

    Returns:
        HU, of the shape of ``attenuation``.
    """
    return attenuation * (1000.0 / water_per_mm) + HU_OF_VACUUM
