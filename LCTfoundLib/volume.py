"""``Volume``: an array with its geometry in LPS millimeters."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Volume"]


@dataclass
class Volume:
    """A 3D image with geometry, in SimpleITK's convention.

    Attributes:
        array: values indexed ``[k, j, i]`` (slice, row, column): HU for a CT, codes for a label map.
        spacing: mm along ``(i, j, k)``.
        origin: LPS mm of voxel ``(0, 0, 0)``.
        direction: 3x3; its columns are the LPS directions of i, j and k.
        metadata: what is known of the source (modality, patient position, ...), for provenance.

    A *canonical* volume has the identity as direction: i runs to the patient's left, j to posterior, k to superior.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: np.ndarray = field(default_factory=lambda: np.eye(3))
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Array shape ``(k, j, i)``."""
        k, j, i = self.array.shape
        return k, j, i

    def with_array(self, array: np.ndarray) -> Volume:
        """Another array on the same grid."""
        return Volume(array, self.spacing, self.origin, self.direction, dict(self.metadata))
