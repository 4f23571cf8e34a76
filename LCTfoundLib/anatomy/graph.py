"""Tree graphs: the centerlines of airway, artery or vein with radii and segment labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["TreeGraph"]


@dataclass
class TreeGraph:
    """A rooted tree (or forest) of centerline points; each node but a root carries the piece from its parent to itself.

    Attributes:
        points: (N, 3) float, LPS mm, columns x, y, z.
        radius: (N,) float, lumen radius in mm.
        parent: (N,) int, index of the parent node, -1 at a root; a parent comes before its children.
        segment: (N,) int, segment code 1-18 the piece supplies, 0 where it serves several segments (central).
        generation: (N,) int, 0 at the trachea or trunk, +1 at each bifurcation.
        confidence: (N,) float in 0..1; empty where it is not known.
    """

    points: np.ndarray
    radius: np.ndarray
    parent: np.ndarray
    segment: np.ndarray
    generation: np.ndarray
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.points)

    def children(self) -> list[list[int]]:
        """For each node the list of its children."""
        result: list[list[int]] = [[] for _ in range(len(self))]
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                result[parent].append(node)
        return result
