"""Tree graphs: the centerlines of airway, artery or vein with radii and segment labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Branches", "TreeGraph"]


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

    @classmethod
    def empty(cls) -> TreeGraph:
        """A graph without nodes."""
        none = np.zeros(0, dtype=int)
        return cls(np.zeros((0, 3)), np.zeros(0), none, none.copy(), none.copy())

    @classmethod
    def from_parents(cls, points: np.ndarray, radius: np.ndarray, parent: np.ndarray) -> TreeGraph:
        """An unlabeled graph; the generations follow from the parents (which must come before their children)."""
        parent = np.asarray(parent, dtype=int)
        counts = np.bincount(parent[parent >= 0], minlength=len(parent))
        generation = np.zeros(len(parent), dtype=int)
        for node, above in enumerate(parent):
            if above >= 0:
                generation[node] = generation[above] + (counts[above] > 1)
        return cls(np.asarray(points, float), np.asarray(radius, float), parent, np.zeros(len(parent), int), generation)

    def children(self) -> list[list[int]]:
        """For each node the list of its children."""
        result: list[list[int]] = [[] for _ in range(len(self))]
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                result[parent].append(node)
        return result

    def child_counts(self) -> np.ndarray:
        """(N,) number of children of each node."""
        return np.bincount(self.parent[self.parent >= 0], minlength=len(self))

    def lengths(self) -> np.ndarray:
        """(N,) mm from each node's parent to it, 0 at roots."""
        safe = np.where(self.parent >= 0, self.parent, np.arange(len(self)))
        return np.linalg.norm(self.points - self.points[safe], axis=1)

    def roots(self) -> np.ndarray:
        """(N,) the root node of each node's tree."""
        root = np.arange(len(self))
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                root[node] = root[parent]
        return root

    def subset(self, keep: np.ndarray) -> TreeGraph:
        """The graph of some nodes; a kept node whose parent goes becomes a root. Generations stay as they are.

        Args:
            keep: (N,) bool.
        """
        place = np.where(keep, np.cumsum(keep) - 1, -1)
        parent = np.where(self.parent[keep] >= 0, place[self.parent[keep]], -1)
        confidence = self.confidence[keep] if len(self.confidence) else self.confidence
        return TreeGraph(
            self.points[keep], self.radius[keep], parent, self.segment[keep], self.generation[keep], confidence
        )

    def branches(self) -> Branches:
        """The branches: chains from one bifurcation (or root) to the next."""
        return Branches.of(self)


@dataclass
class Branches:
    """The branches of a ``TreeGraph``, parents before their children.

    Attributes:
        of_node: (N,) int, branch of each node; a bifurcation node is the last node of the branch that ends there.
        parent: (B,) int, parent branch, -1 where a tree begins.
        first, last: (B,) int, first and last node.
        length: (B,) mm, from the bifurcation (or root) it begins at to its last node.
        radius: (B,) mm, median over its nodes: the radius at a bifurcation belongs to both branches.
    """

    of_node: np.ndarray
    parent: np.ndarray
    first: np.ndarray
    last: np.ndarray
    length: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def of(cls, graph: TreeGraph) -> Branches:
        """Split a graph into branches."""
        counts = graph.child_counts()
        of_node = np.full(len(graph), -1)
        parents: list[int] = []
        first: list[int] = []
        for node, parent in enumerate(graph.parent):
            if parent >= 0 and counts[parent] == 1:
                of_node[node] = of_node[parent]
            else:
                of_node[node] = len(parents)
                parents.append(of_node[parent] if parent >= 0 else -1)
                first.append(node)
        last = np.zeros(len(parents), dtype=int)
        last[of_node] = np.arange(len(graph))  # the largest node of a chain is its last one
        length = np.bincount(of_node, weights=graph.lengths(), minlength=len(parents))
        radius = _group_median(of_node, graph.radius, len(parents))
        return cls(of_node, np.array(parents, dtype=int), np.array(first, dtype=int), last, length, radius)

    def children(self) -> list[list[int]]:
        """For each branch the list of its child branches."""
        result: list[list[int]] = [[] for _ in range(len(self))]
        for branch, parent in enumerate(self.parent):
            if parent >= 0:
                result[parent].append(branch)
        return result

    def nodes(self) -> list[np.ndarray]:
        """For each branch its nodes, from its beginning to its end."""
        order = np.argsort(self.of_node, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.of_node, minlength=len(self)))[:-1])

    def descendants(self, branch: int) -> np.ndarray:
        """(B,) bool: the branch itself and all that come from it."""
        inside = np.zeros(len(self), dtype=bool)
        inside[branch] = True
        for other in range(branch + 1, len(self)):
            inside[other] = self.parent[other] >= 0 and inside[self.parent[other]]
        return inside


def _group_median(group: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """(count,) median of each group's values; every group has at least one."""
    order = np.lexsort((values, group))
    sizes = np.bincount(group, minlength=count)
    starts = np.cumsum(sizes) - sizes
    ranked = values[order]
    return (ranked[starts + (sizes - 1) // 2] + ranked[starts + sizes // 2]) / 2
