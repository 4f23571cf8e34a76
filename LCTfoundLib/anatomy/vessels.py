"""Arteries and veins made consistent: a vessel does not change its kind on the way.

The networks decide per voxel. Here the vessels are cut into pieces (branches of each kind's skeleton), pieces that go
on into each other are coupled, and the labels of all pieces together are chosen with the least total cost: a Potts
model of two labels, solved exactly by a minimum cut (Greig et al., 1989), loops and all. The idea to decide on
subtrees, and the artery's company with the airway as a cue, follow Charbonnier et al. (IEEE TMI 2016).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import bounding_box, crop
from LCTfoundLib.anatomy.repair import Link, LinkRule, drop_islands, hysteresis, link_gaps
from LCTfoundLib.anatomy.skeleton import SkeletonRule, nearest_nodes, skeleton_graph
from LCTfoundLib.anatomy.structures import Tree
from LCTfoundLib.volume import Volume

__all__ = ["SeparationRule", "Swap", "VesselTree", "Vessels", "separate_vessels"]


_SMALLEST_MM3 = 8.0


@dataclass(frozen=True)
class SeparationRule:
    """How the pieces are labeled; costs are in units of log-odds.

    Attributes:
        low, high: hysteresis thresholds on the probability of any vessel.
        evidence_mm: length of vessel whose mean log-odds counts once.
        most_evidence_mm: a longer piece does not count more, because its voxels are not independent.
        goes_on: coupling of two pieces that continue each other straight.
        branches_off: coupling of a piece to the vessel it leaves.
        company: weight of running beside an airway, per ``evidence_mm``.
    """

    low: float = 0.35
    high: float = 0.6
    evidence_mm: float = 10.0
    most_evidence_mm: float = 20.0
    goes_on: float = 8.0
    branches_off: float = 6.0
    company: float = 0.5


@dataclass(frozen=True)
class Swap:
    """A piece whose kind was changed.

    Attributes:
        point: LPS mm, middle of the piece.
        length: mm.
        kind: what it is now.
        confidence: 0.5..1, how clearly the new kind is the better one.
    """

    point: np.ndarray
    length: float
    kind: Tree
    confidence: float


@dataclass
class VesselTree:
    """Mask (bool) and centerline forest of one kind of vessel; confidence of each node: see ``Vessels``."""

    mask: Volume
    graph: TreeGraph
    links: list[Link] = field(default_factory=list)


@dataclass
class Vessels:
    """Separated arteries and veins.

    Attributes:
        artery, vein: the two trees. The confidence of a node is how clearly its piece prefers its kind (0.5 undecided,
            1 certain).
        swaps: pieces whose kind was changed against their own probabilities.
        uncertain_share: share of the vessel length with a confidence below 0.75.
    """

    artery: VesselTree
    vein: VesselTree
    swaps: list[Swap]
    uncertain_share: float


def separate_vessels(
    artery: Volume,
    vein: np.ndarray,
    airway: TreeGraph | None = None,
    rule: SeparationRule | None = None,
    link_rule: LinkRule | None = None,
) -> Vessels:
    """Consistent artery and vein trees from their probabilities.

    Args:
        artery: float 0..1 on a canonical grid.
        vein: float 0..1, same grid.
        airway: the airway's centerlines, whose company marks arteries; optional.
        rule: see ``SeparationRule``.
        link_rule: which gaps to close afterwards.
    """
    rule = rule or SeparationRule()
    box = bounding_box((artery.array + vein) > rule.low, artery.spacing, 3.0)
    if box is None:
        none = artery.with_array(np.zeros(artery.array.shape, bool))
        return Vessels(VesselTree(none, TreeGraph.empty()), VesselTree(none, TreeGraph.empty()), [], 0.0)
    part, odds, vessel = _evidence(crop(artery, box), vein[box], rule)
    pieces = _Pieces.of(odds, vessel, part)
    unary = _unary(pieces, airway, rule)
    pairs = _couplings(pieces, rule, part)
    is_artery = _minimum_cut(unary, pairs)
    confidence = _confidence(unary, pairs, is_artery)
    owner = pieces.owner
    kinds = np.zeros(vessel.shape, dtype=np.uint8)
    kinds[vessel] = np.where(is_artery[owner], Tree.ARTERY, Tree.VEIN)
    certain = np.zeros(vessel.shape, dtype=np.float32)
    certain[vessel] = confidence[owner]
    probabilities = {Tree.ARTERY: part.array, Tree.VEIN: vein[box].astype(np.float32, copy=False)}
    trees = {
        kind: _finish(kinds == kind, probabilities[kind], certain, part, link_rule, artery, box)
        for kind in (Tree.ARTERY, Tree.VEIN)
    }
    weak = float(pieces.length[confidence < 0.75].sum() / max(pieces.length.sum(), 1e-9))
    return Vessels(trees[Tree.ARTERY], trees[Tree.VEIN], _swaps(pieces, is_artery, confidence), weak)


def _evidence(artery: Volume, vein: np.ndarray, rule: SeparationRule) -> tuple[Volume, np.ndarray, np.ndarray]:
    """The cropped artery probability, log-odds artery : vein of the vessel voxels (0 elsewhere), the vessel mask."""
    artery = artery.with_array(artery.array.astype(np.float32, copy=False))
    vein = vein.astype(np.float32, copy=False)
    both = artery.array + vein
    # Specks cost a skeleton each and would be dropped at the end.
    smallest = int(np.ceil(_SMALLEST_MM3 / float(np.prod(artery.spacing))))
    vessel = hysteresis(both, rule.low, rule.high, smallest)
    odds = np.where(vessel, np.log(np.maximum(artery.array, 0.01)) - np.log(np.maximum(vein, 0.01)), 0.0)
    odds = odds.astype(np.float32)
    # Speckle within a vessel is averaged away before the kinds are skeletonized.
    sigma = 0.8 / np.array(artery.spacing[::-1])
    weight = ndimage.gaussian_filter(vessel.astype(np.float32), sigma, truncate=2.5)
    odds = ndimage.gaussian_filter(odds, sigma, truncate=2.5) / np.maximum(weight, 1e-3)
    return artery, np.where(vessel, odds, 0.0), vessel


# -- pieces ----------------------------------------------------------------------------------------------------------


@dataclass
class _Pieces:
    """Vessel pieces: the branches of both kinds' skeletons as the voxels alone would have them.

    ``graph`` holds both forests (arteries first); ``piece`` maps its nodes to pieces; ``owner`` maps the vessel's
    voxels, in scan order, to pieces.
    """

    graph: TreeGraph
    piece: np.ndarray
    parent: np.ndarray
    first: np.ndarray
    last: np.ndarray
    length: np.ndarray
    radius: np.ndarray
    seems_artery: np.ndarray
    odds: np.ndarray
    owner: np.ndarray

    def __len__(self) -> int:
        return len(self.parent)

    @classmethod
    def of(cls, odds: np.ndarray, vessel: np.ndarray, grid: Volume) -> _Pieces:
        owner = np.zeros(int(vessel.sum()), dtype=int)
        values = odds[vessel]
        rule = SkeletonRule(spur_radii=1.2)
        graphs = []
        offset = 0
        for side in (values > 0, values <= 0):
            mask = np.zeros(vessel.shape, dtype=bool)
            mask[vessel] = side
            graph = skeleton_graph(grid.with_array(mask), rule=rule)
            graphs.append(graph)
            if not len(graph):
                continue
            branches = graph.branches()
            node = nearest_nodes(graph, grid.world_from_index(np.argwhere(mask)))
            owner[side] = branches.of_node[node] + offset
            offset += len(branches)
        return cls._joined(graphs, owner, values)

    @classmethod
    def _joined(cls, graphs: list[TreeGraph], owner: np.ndarray, values: np.ndarray) -> _Pieces:
        tables = [graph.branches() for graph in graphs]
        nodes, shift = len(graphs[0]), len(tables[0])
        graph = TreeGraph.from_parents(
            np.concatenate([g.points for g in graphs]),
            np.concatenate([g.radius for g in graphs]),
            np.concatenate([graphs[0].parent, np.where(graphs[1].parent >= 0, graphs[1].parent + nodes, -1)]),
        )
        second = tables[1]
        count = np.maximum(np.bincount(owner, minlength=shift + len(second)), 1)
        return cls(
            graph,
            np.concatenate([tables[0].of_node, second.of_node + shift]),
            np.concatenate([tables[0].parent, np.where(second.parent >= 0, second.parent + shift, -1)]),
            np.concatenate([tables[0].first, second.first + nodes]),
            np.concatenate([tables[0].last, second.last + nodes]),
            np.concatenate([tables[0].length, second.length]),
            np.concatenate([tables[0].radius, second.radius]),
            np.arange(shift + len(second)) < shift,
            np.bincount(owner, weights=values, minlength=shift + len(second)) / count,
            owner,
        )

    def chains(self) -> list[np.ndarray]:
        """Nodes of each piece, from its beginning to its end."""
        order = np.argsort(self.piece, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.piece, minlength=len(self)))[:-1])


def _unary(pieces: _Pieces, airway: TreeGraph | None, rule: SeparationRule) -> np.ndarray:
    """(B,) evidence for artery (positive) or vein of each piece by itself, in log-odds."""
    # A piece of one or two voxels has a length of its own width.
    length = np.clip(np.maximum(pieces.length, pieces.radius), 0.0, rule.most_evidence_mm) / rule.evidence_mm
    evidence = np.clip(pieces.odds, -3.5, 3.5)
    if airway is not None and len(airway):
        evidence = evidence + rule.company * _company(pieces, airway)
    return evidence * length


def _company(pieces: _Pieces, airway: TreeGraph) -> np.ndarray:
    """(B,) -0.5..1: share of each piece that runs along an airway, less the share expected of a vein.

    Only vessels of segmental size and less count: at the hilum everything is close to an airway.
    """
    distance, node = cKDTree(airway.points).query(pieces.graph.points)
    beside = distance < airway.radius[node] + pieces.graph.radius + 3.0
    parallel = np.abs((_tangents(pieces.graph) * _tangents(airway)[node]).sum(axis=1)) > 0.8
    count = np.maximum(np.bincount(pieces.piece, minlength=len(pieces)), 1)
    share = np.bincount(pieces.piece, weights=beside & parallel, minlength=len(pieces)) / count
    # Far from every airway that was found, its absence says nothing.
    reach = np.bincount(pieces.piece, weights=distance, minlength=len(pieces)) / count
    score = np.where(share > 0.4, share, np.where(reach < 20.0, -0.5, 0.0))
    return np.where(pieces.radius < 4.0, score, 0.0)


def _tangents(graph: TreeGraph) -> np.ndarray:
    """(N, 3) unit direction from the grandparent (as far as there is one) to each node."""
    above = np.where(graph.parent >= 0, graph.parent, np.arange(len(graph)))
    for _ in range(2):
        above = np.where(graph.parent[above] >= 0, graph.parent[above], above)
    way = graph.points - graph.points[above]
    return way / np.maximum(np.linalg.norm(way, axis=1), 1e-9)[:, None]


# -- couplings -------------------------------------------------------------------------------------------------------


def _couplings(pieces: _Pieces, rule: SeparationRule, grid: Volume) -> dict[tuple[int, int], float]:
    """Cost of giving two pieces different kinds."""
    pairs: dict[tuple[int, int], float] = {}
    chains = pieces.chains()
    for piece, parent in enumerate(pieces.parent):
        if parent >= 0:
            value = _junction_coupling(pieces, chains, piece, int(parent), rule)
            _couple(pairs, piece, int(parent), value)
    for siblings in _siblings(pieces.parent):
        for place, one in enumerate(siblings):
            for other in siblings[place + 1 :]:
                straight = -float(_heading(pieces, chains[one], True) @ _heading(pieces, chains[other], True))
                if straight > 0.8:  # a crossing: the two go on into each other rather than into the parent
                    _couple(pairs, one, other, rule.goes_on * straight * _similar(pieces, one, other))
    _couple_ends(pieces, chains, pairs, rule, min(grid.spacing))
    return pairs


def _couple(pairs: dict[tuple[int, int], float], one: int, other: int, value: float) -> None:
    key = (min(one, other), max(one, other))
    pairs[key] = max(pairs.get(key, 0.0), value)


def _siblings(parent: np.ndarray) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for piece, above in enumerate(parent):
        if above >= 0:
            groups.setdefault(int(above), []).append(piece)
    return [group for group in groups.values() if len(group) > 1]


def _heading(pieces: _Pieces, chain: np.ndarray, start: bool, reach_mm: float = 8.0) -> np.ndarray:
    """Unit direction of a piece at its start (into it) or at its end (out of it); 0 for a piece of one node."""
    points = pieces.graph.points[chain if start else chain[::-1]]
    above = pieces.graph.parent[chain[0]]
    if start and above >= 0:
        points = np.vstack([pieces.graph.points[above], points])
    far = np.linalg.norm(points - points[0], axis=1) > reach_mm
    to = points[int(far.argmax())] if far.any() else points[-1]
    way = (to - points[0]) if start else (points[0] - to)
    return way / max(float(np.linalg.norm(way)), 1e-9)


def _similar(pieces: _Pieces, one: int, other: int) -> float:
    """1 for equal radii, falling with their ratio."""
    return float(np.exp(-abs(np.log(pieces.radius[one] / pieces.radius[other]))))


def _junction_coupling(
    pieces: _Pieces, chains: list[np.ndarray], piece: int, parent: int, rule: SeparationRule
) -> float:
    """Coupling of a piece to the one it comes from in the same skeleton."""
    straight = float(_heading(pieces, chains[parent], False) @ _heading(pieces, chains[piece], True))
    narrower = min(1.0, 1.2 * pieces.radius[parent] / pieces.radius[piece])
    on = rule.goes_on * max(0.0, straight) ** 2 * _similar(pieces, piece, parent)
    return max(on, rule.branches_off * narrower * (1.0 if straight > -0.3 else 0.4))


def _couple_ends(
    pieces: _Pieces, chains: list[np.ndarray], pairs: dict[tuple[int, int], float], rule: SeparationRule, voxel: float
) -> None:
    """Couple free ends to what of the other kind they run into: there the kind changed along one vessel."""
    counts = pieces.graph.child_counts()
    ends = [(int(pieces.last[p]), p, False) for p in range(len(pieces)) if counts[pieces.last[p]] == 0]
    starts = np.flatnonzero(pieces.parent < 0)
    ends += [(int(pieces.first[p]), int(p), True) for p in starts if counts[pieces.first[p]] <= 1]
    free = {node: (piece, start) for node, piece, start in ends}
    for kind in (True, False):
        others = np.flatnonzero(pieces.seems_artery[pieces.piece] != kind)
        if not len(others):
            continue
        search = cKDTree(pieces.graph.points[others])
        for node, piece, start in ends:
            if pieces.seems_artery[piece] != kind:
                continue
            reach = 1.3 * (pieces.graph.radius[node] + pieces.radius[piece]) + 2.5 * voxel
            near = others[search.query_ball_point(pieces.graph.points[node], reach)]
            for other in np.unique(pieces.piece[near]):
                nodes = near[pieces.piece[near] == other]
                value = _end_coupling(pieces, chains, (node, piece, start), int(other), nodes, free, rule)
                _couple(pairs, piece, int(other), value)


def _end_coupling(
    pieces: _Pieces,
    chains: list[np.ndarray],
    end: tuple[int, int, bool],
    other: int,
    nodes: np.ndarray,
    free: dict[int, tuple[int, bool]],
    rule: SeparationRule,
) -> float:
    node, piece, start = end
    out = _heading(pieces, chains[piece], start) * (-1 if start else 1)
    short = not out.any() or pieces.length[piece] < 2 * pieces.radius[piece]
    similar = _similar(pieces, piece, other)
    faced = [n for n in nodes if n in free and free[n][0] == other]
    if faced:
        away = _heading(pieces, chains[other], free[faced[0]][1]) * (1 if free[faced[0]][1] else -1)
        straight = 0.7 if short or pieces.length[other] < 2 * pieces.radius[other] else float(out @ away)
        return rule.goes_on * max(0.0, straight) ** 2 * similar
    # It runs into the other's side: a branch of it, or two vessels that only touch.
    distance = np.linalg.norm(pieces.graph.points[nodes] - pieces.graph.points[node], axis=1)
    to = pieces.graph.points[nodes[distance.argmin()]] - pieces.graph.points[node]
    toward = 0.5 if short else max(0.0, float(out @ to) / max(float(distance.min()), 1e-9))
    thinner = min(1.0, pieces.radius[other] / pieces.radius[piece])
    return 0.5 * rule.branches_off * toward * thinner**2


# -- labels ----------------------------------------------------------------------------------------------------------


def _minimum_cut(unary: np.ndarray, pairs: dict[tuple[int, int], float]) -> np.ndarray:
    """(B,) bool artery: minimizes the sum of |unary| of pieces against their evidence and of the cut couplings."""
    size, scale = len(unary), 1000.0
    source, sink = size, size + 1
    capacity: dict[tuple[int, int], float] = {}
    for piece, value in enumerate(unary):
        capacity[(source, piece) if value > 0 else (piece, sink)] = abs(value)
    for (one, other), value in pairs.items():
        capacity[(one, other)] = capacity[(other, one)] = value
    keys = np.array(list(capacity), dtype=int).reshape(-1, 2)
    values = np.rint(scale * np.array(list(capacity.values()))).astype(np.int32)
    graph = sparse.csr_matrix((values, (keys[:, 0], keys[:, 1])), shape=(size + 2, size + 2))
    graph.eliminate_zeros()
    flow = maximum_flow(graph, source, sink).flow
    residual = (graph - flow).tocsr()
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    reached = breadth_first_order(residual, source, return_predecessors=False)
    artery = np.zeros(size + 2, dtype=bool)
    artery[reached] = True
    # A piece without any evidence and coupling is cut off from both sides: its own sign decides.
    return artery[:size]


def _confidence(unary: np.ndarray, pairs: dict[tuple[int, int], float], artery: np.ndarray) -> np.ndarray:
    """(B,) 0.5..1: logistic function of what a change of the piece alone would cost."""
    sign = np.where(artery, 1.0, -1.0)
    margin = sign * unary
    for (one, other), value in pairs.items():
        agree = value if artery[one] == artery[other] else -value
        margin[one] += agree
        margin[other] += agree
    return 1 / (1 + np.exp(-np.clip(margin, 0.0, 30.0)))


def _swaps(pieces: _Pieces, artery: np.ndarray, confidence: np.ndarray) -> list[Swap]:
    chains = pieces.chains()
    return [
        Swap(
            pieces.graph.points[chains[piece][len(chains[piece]) // 2]],
            float(pieces.length[piece]),
            Tree.ARTERY if artery[piece] else Tree.VEIN,
            float(confidence[piece]),
        )
        for piece in np.flatnonzero(artery != pieces.seems_artery)
    ]


def _finish(
    mask: np.ndarray,
    probability: np.ndarray,
    certain: np.ndarray,
    part: Volume,
    link_rule: LinkRule | None,
    whole: Volume,
    box: tuple[slice, slice, slice],
) -> VesselTree:
    """One kind's tree on the whole grid: islands dropped, gaps linked, skeleton with confidences."""
    mask = drop_islands(mask, part.spacing)
    joined, links = link_gaps(part.with_array(mask), probability, link_rule)
    graph = skeleton_graph(part.with_array(joined))
    graph.confidence = _node_confidence(graph, certain, part)
    full = np.zeros(whole.array.shape, dtype=bool)
    full[box] = joined
    return VesselTree(whole.with_array(full), graph, links)


def _node_confidence(graph: TreeGraph, certain: np.ndarray, grid: Volume) -> np.ndarray:
    """(N,) confidence of the piece at each node; in painted gaps that of the nodes around."""
    if not len(graph):
        return np.zeros(0)
    index = np.rint(grid.index_from_world(graph.points)).astype(int)
    values = certain[tuple(np.clip(index, 0, np.array(certain.shape) - 1).T)]
    return np.where(values > 0, values, 0.5)
