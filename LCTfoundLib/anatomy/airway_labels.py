"""Segment names for the branches of a tree: which bronchus (or artery) supplies which segment.

Each terminal branch has an expectation which segment it ends in: from the coarse network's segment probabilities around
its tip, or from where the tip lies in its lobe. A dynamic program over the tree then names whole subtrees: a branch
with a segment hands it to all that comes from it, and cutting the tree costs, so that segmental bronchi are found
where the tree itself parts, whatever the variant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from LCTfoundLib.anatomy.graph import Branches, TreeGraph
from LCTfoundLib.anatomy.masks import Probabilities, sample
from LCTfoundLib.anatomy.quality import Finding, Severity
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, SEGMENTS, Lobe, Side, segment_by_code, segments_of_lobe
from LCTfoundLib.volume import Volume

__all__ = ["LabelRule", "LabeledTree", "airway_findings", "carina_node", "label_airway", "label_artery"]

_COUNT = len(SEGMENTS) + 1

#: Where a segment's middle lies in its lobe's bounding box: lateral (0 medial - 1 lateral), posterior, superior.
#: Textbook anatomy (Boyden; Ikeda's bronchial atlas), read off as thirds of the lobe.
_PLACE: dict[int, tuple[float, float, float]] = {
    1: (0.45, 0.50, 0.85),
    2: (0.60, 0.85, 0.45),
    3: (0.55, 0.20, 0.35),
    4: (0.75, 0.55, 0.50),
    5: (0.30, 0.30, 0.40),
    6: (0.50, 0.75, 0.80),
    7: (0.20, 0.45, 0.25),
    8: (0.60, 0.20, 0.30),
    9: (0.80, 0.50, 0.20),
    10: (0.45, 0.80, 0.20),
    11: (0.50, 0.65, 0.85),
    12: (0.55, 0.25, 0.60),
    13: (0.65, 0.40, 0.35),
    14: (0.50, 0.25, 0.12),
    15: (0.50, 0.75, 0.80),
    16: (0.45, 0.25, 0.30),
    17: (0.80, 0.50, 0.20),
    18: (0.45, 0.80, 0.20),
}


@dataclass(frozen=True)
class LabelRule:
    """Weights of the dynamic program, in log-probability of one terminal branch.

    Attributes:
        cut: cost of each named subtree: fewer, larger subtrees.
        central: cost of a terminal branch that stays unnamed.
        reach_mm: how far beyond its tip a branch looks into the territory it supplies.
        prior_weight: share of the network's probabilities in the expectation, against position alone.
    """

    cut: float = 1.2
    central: float = 4.0
    reach_mm: float = 8.0
    prior_weight: float = 0.85


@dataclass
class LabeledTree:
    """A tree with segments.

    Attributes:
        graph: the tree; ``segment`` is set, ``confidence`` is the share of a named subtree's tips that agree with its
            name (central branches keep what they had).
        purity: segment code -> share of agreement among its tips.
        stem: segment code -> node where its largest subtree begins.
    """

    graph: TreeGraph
    purity: dict[int, float]
    stem: dict[int, int]

    @property
    def missing(self) -> list[int]:
        """Segment codes no branch was found for."""
        return [s.code for s in SEGMENTS if s.code not in self.stem]


def label_airway(
    graph: TreeGraph, lobes: Volume, prior: Probabilities | None = None, rule: LabelRule | None = None
) -> LabeledTree:
    """Name the segment that each branch of an airway supplies.

    Args:
        graph: a rooted tree; it is not changed.
        lobes: uint8 ``Lobe`` codes, canonical.
        prior: probabilities of the segments (codes 1-18) on any canonical grid, as the coarse network gives them.
            Without it position within the lobe decides.
        rule: weights.

    Returns:
        A copy of the graph with segments; all 0 for an empty graph.
    """
    return _label(graph, lobes, prior, None, rule or LabelRule())


def label_artery(
    graph: TreeGraph,
    airway: TreeGraph,
    lobes: Volume,
    prior: Probabilities | None = None,
    rule: LabelRule | None = None,
) -> LabeledTree:
    """Name the segment that each branch of an artery supplies: as for the airway, whose labels count nearby.

    Args:
        graph: a rooted forest; it is not changed.
        airway: the labeled airway.
        lobes, prior, rule: as in ``label_airway``.
    """
    return _label(graph, lobes, prior, airway, rule or LabelRule())


def _label(
    graph: TreeGraph, lobes: Volume, prior: Probabilities | None, guide: TreeGraph | None, rule: LabelRule
) -> LabeledTree:
    result = TreeGraph(
        graph.points, graph.radius, graph.parent, np.zeros(len(graph), int), graph.generation, graph.confidence.copy()
    )
    if not len(graph):
        return LabeledTree(result, {}, {})
    branches = graph.branches()
    tips = np.bincount(branches.parent[branches.parent >= 0], minlength=len(branches)) == 0
    score = np.zeros((len(branches), _COUNT))
    score[tips] = _tip_scores(graph, branches.last[tips], lobes, prior, guide, rule)
    named = _cut_subtrees(branches, tips, score, rule)
    result.segment = named[branches.of_node]
    purity, agreement = _purity(branches, tips, score, named)
    if not len(result.confidence):
        result.confidence = np.ones(len(graph))
    result.confidence = np.where(result.segment > 0, agreement[branches.of_node], result.confidence)
    return LabeledTree(result, purity, _stems(branches, named, tips))


# -- expectation -----------------------------------------------------------------------------------------------------


def _tip_scores(
    graph: TreeGraph,
    tips: np.ndarray,
    lobes: Volume,
    prior: Probabilities | None,
    guide: TreeGraph | None,
    rule: LabelRule,
) -> np.ndarray:
    """(T, 19) log-probability of each segment for the terminal branches that end at some nodes."""
    around = _looked_at(graph, tips, rule.reach_mm)
    lobe = _lobe_shares(lobes, around)
    place = _place_scores(lobes, around.mean(axis=1))
    expected = place * (0.02 + lobe[:, LOBE_OF_SEGMENT])
    expected[:, 0] = 0
    expected /= np.maximum(expected.sum(axis=1, keepdims=True), 1e-9)
    if prior is not None:
        seen = np.zeros((len(tips), _COUNT))
        for code in range(1, _COUNT):
            values = sample(prior.channel(code), around.reshape(-1, 3))
            seen[:, code] = values.reshape(around.shape[:2]).mean(axis=1)
        known = seen.sum(axis=1)  # a tip in no segment (outside the lungs) says nothing
        seen = (seen + 1e-3) / (known + 1e-3 * _COUNT)[:, None]
        weight = (rule.prior_weight * np.minimum(1.0, 2 * known))[:, None]
        expected = weight * seen + (1 - weight) * expected
    if guide is not None and len(guide):
        expected = 0.6 * expected + 0.4 * _guide_shares(guide, around.mean(axis=1), expected)
    expected[:, 0] = 0
    return np.log(np.maximum(expected / np.maximum(expected.sum(axis=1, keepdims=True), 1e-9), 1e-3))


def _looked_at(graph: TreeGraph, tips: np.ndarray, reach_mm: float) -> np.ndarray:
    """(T, P, 3) points where a tip supplies: from just before it to ``reach_mm`` beyond, and a ring around the last."""
    back = tips.copy()
    for _ in range(8):
        above = graph.parent[back]
        near = np.linalg.norm(graph.points[back] - graph.points[tips], axis=1) < 6.0
        back = np.where((above >= 0) & near, above, back)
    way = graph.points[tips] - graph.points[back]
    way = way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9)
    side = np.cross(way, np.where(np.abs(way[:, :1]) < 0.8, [[1.0, 0, 0]], [[0, 1.0, 0]]))
    side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-9)
    other = np.cross(way, side)
    offsets = [step * reach_mm * way for step in (-0.3, 0.0, 0.35, 0.7, 1.0)]
    offsets += [0.5 * reach_mm * (way + turn) for turn in (side, -side, other, -other)]
    return graph.points[tips][:, None] + np.stack(offsets, axis=1)


def _lobe_shares(lobes: Volume, around: np.ndarray) -> np.ndarray:
    """(T, 6) share of the looked-at points in each lobe (0: outside)."""
    codes = sample(lobes, around.reshape(-1, 3), order=0).reshape(around.shape[:2]).astype(int)
    return np.stack([(codes == lobe).mean(axis=1) for lobe in range(len(Lobe) + 1)], axis=1)


def _place_scores(lobes: Volume, points: np.ndarray) -> np.ndarray:
    """(T, 19) likelihood of each segment by the place in its lobe's box: a Gaussian of a fifth of the box's size."""
    result = np.zeros((len(points), _COUNT))
    for lobe in Lobe:
        index = np.argwhere(lobes.array[::2, ::2, ::2] == lobe) * 2
        if not len(index):
            continue
        low, high = np.percentile(index[:, ::-1], [1, 99], axis=0)
        place = ((points - np.array(lobes.origin)) / np.array(lobes.spacing) - low) / np.maximum(high - low, 1.0)
        if lobe.side is Side.RIGHT:
            place[:, 0] = 1 - place[:, 0]  # x runs to the patient's left
        for segment in segments_of_lobe(lobe):
            off = place - np.array(_PLACE[segment.code])
            result[:, segment.code] = np.exp(-(off**2).sum(axis=1) / (2 * 0.22**2)) + 1e-4
    return result


def _guide_shares(guide: TreeGraph, points: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """(T, 19) segments of the labeled airway around points; where there is none within 15 mm, ``otherwise``."""
    labeled = guide.segment > 0
    if not labeled.any():
        return otherwise
    distance, node = cKDTree(guide.points[labeled]).query(points, k=min(8, int(labeled.sum())))
    distance, node = distance.reshape(len(points), -1), node.reshape(len(points), -1)
    weight = np.exp(-((distance / 6.0) ** 2))
    result = np.zeros((len(points), _COUNT))
    np.add.at(result, (np.arange(len(points))[:, None], guide.segment[labeled][node]), weight)
    near = weight.sum(axis=1, keepdims=True)
    return np.where(distance[:, :1] < 15.0, result / np.maximum(near, 1e-9), otherwise)


# -- the dynamic program ---------------------------------------------------------------------------------------------


def _cut_subtrees(branches: Branches, tips: np.ndarray, score: np.ndarray, rule: LabelRule) -> np.ndarray:
    """(B,) segment of each branch, 0 central: the best total of tip scores, cuts and unnamed tips."""
    count = len(branches)
    # Value of a subtree if it is one segment (column 1-18); a tip's vote counts less on a bush of many tips.
    as_one = score * _tip_weights(branches, tips)[:, None]
    for branch in range(count - 1, -1, -1):
        if branches.parent[branch] >= 0:
            as_one[branches.parent[branch]] += as_one[branch]
    best_segment = 1 + as_one[:, 1:].argmax(axis=1)
    best_one = as_one[np.arange(count), best_segment] - rule.cut
    below = np.zeros(count)  # what the children of a central branch yield together
    best = np.zeros(count)
    central = np.zeros(count, dtype=bool)
    for branch in range(count - 1, -1, -1):
        free = -rule.central if tips[branch] else below[branch]
        central[branch] = free > best_one[branch]
        best[branch] = max(free, best_one[branch])
        if branches.parent[branch] >= 0:
            below[branches.parent[branch]] += best[branch]
    named = np.zeros(count, dtype=int)
    for branch, parent in enumerate(branches.parent):
        if parent >= 0 and named[parent] > 0:
            named[branch] = named[parent]
        elif not central[branch]:
            named[branch] = best_segment[branch]
    return named


def _tip_weights(branches: Branches, tips: np.ndarray) -> np.ndarray:
    """(B,) weight of a tip: longer terminal branches are surer, stubs of the skeleton count little."""
    return np.where(tips, np.clip(branches.length / 8.0, 0.3, 1.5), 0.0)


def _purity(
    branches: Branches, tips: np.ndarray, score: np.ndarray, named: np.ndarray
) -> tuple[dict[int, float], np.ndarray]:
    """Per segment and per branch: share of tips whose own best segment is the name they got."""
    own = score.argmax(axis=1)
    total, agree = tips.astype(float), (tips & (own == named)).astype(float)
    purity = {int(c): float(agree[tips & (named == c)].mean()) for c in np.unique(named[tips]) if c > 0}
    for branch in range(len(branches) - 1, -1, -1):
        parent = branches.parent[branch]
        if parent >= 0:
            total[parent] += total[branch]
            agree[parent] += agree[branch]
    return purity, agree / np.maximum(total, 1)


def _stems(branches: Branches, named: np.ndarray, tips: np.ndarray) -> dict[int, int]:
    """Segment -> first node of its subtree with the most tips."""
    size = tips.astype(int)
    for branch in range(len(branches) - 1, -1, -1):
        if branches.parent[branch] >= 0:
            size[branches.parent[branch]] += size[branch]
    result: dict[int, tuple[int, int]] = {}
    for branch, code in enumerate(named):
        parent = branches.parent[branch]
        begins = code > 0 and (parent < 0 or named[parent] != code)
        if begins and size[branch] > result.get(int(code), (0, -1))[0]:
            result[int(code)] = (int(size[branch]), int(branches.first[branch]))
    return {code: node for code, (_, node) in sorted(result.items())}


# -- findings --------------------------------------------------------------------------------------------------------


def carina_node(tree: LabeledTree) -> int | None:
    """The bifurcation of the trachea: the lowest node from which branches go to both lungs; None without such."""
    graph = tree.graph
    sides = np.zeros((len(graph), 2))
    for node in range(len(graph) - 1, -1, -1):
        code = int(graph.segment[node])
        if code:
            sides[node, 0 if segment_by_code(code).side is Side.RIGHT else 1] += 1
        if graph.parent[node] >= 0:
            sides[graph.parent[node]] += sides[node]
    # A few branches with a name of the wrong side do not move it. The nodes above it are a chain: the last is lowest.
    both = np.flatnonzero((sides > 0.3 * sides.max(axis=0, initial=1)).all(axis=1))
    return int(both[-1]) if len(both) else None


def airway_findings(
    tree: LabeledTree, lobes: Volume | None = None, prior: Probabilities | None = None
) -> list[Finding]:
    """Missing segmental bronchi and variants of the airway, in words.

    Args:
        tree: the labeled airway.
        lobes: ``Lobe`` codes; a segment of a lobe that is not there is no finding. Optional.
        prior: the network's segments, which tell a bronchus not seen from a segment that is not there. Optional.
    """
    present = set(Lobe) if lobes is None else {Lobe(code) for code in np.unique(lobes.array[::2, ::2, ::2]) if code}
    findings = []
    for code in tree.missing:
        segment = segment_by_code(code)
        if segment.lobe not in present:
            continue
        if prior is not None and _share_in_lobe(prior, code) < 0.02:
            sentence = (
                f"{segment.name} ({segment.short}) seems to be missing or fused with a neighbor: no own bronchus."
            )
        else:
            sentence = f"No bronchus to {segment.name} ({segment.short}) was found; its extent rests on the network."
        findings.append(Finding(Severity.NOTE, segment.key, sentence))
    findings += _common_trunks(tree)
    tracheal = _tracheal_bronchus(tree)
    return findings + ([tracheal] if tracheal else [])


def _share_in_lobe(prior: Probabilities, code: int) -> float:
    """Share of its lobe that the network gives to a segment."""
    lobe = segment_by_code(code).lobe
    total = sum(float(prior.values[s.code].sum(dtype=np.float64)) for s in SEGMENTS if s.lobe == lobe)
    return float(prior.values[code].sum(dtype=np.float64)) / max(total, 1e-9)


#: Pairs that share a trunk in a variant worth naming; normally the three part at once or one after another.
_TRUNKS = ((1, 2), (1, 3), (2, 3), (8, 9), (7, 8), (16, 17))


def _common_trunks(tree: LabeledTree, shortest_mm: float = 6.0) -> list[Finding]:
    """Two segmental bronchi that come from one trunk of their own."""
    supplied = _supplied(tree.graph)
    branches = tree.graph.branches()
    findings = []
    for one, other in _TRUNKS:
        wanted = frozenset((one, other))
        trunk = [b for b in range(len(branches)) if supplied[branches.last[b]] == wanted and branches.parent[b] >= 0]
        long = [b for b in trunk if branches.length[b] >= shortest_mm and tree.graph.segment[branches.last[b]] == 0]
        if long:
            first, second = segment_by_code(one), segment_by_code(other)
            sentence = f"Variant: the bronchi of {first.name} and {second.name} share a common trunk."
            findings.append(Finding(Severity.NOTE, first.key, sentence))
    return findings


def _supplied(graph: TreeGraph) -> list[frozenset[int]]:
    """For each node the set of segments named at or below it."""
    sets: list[set[int]] = [({int(code)} if code else set()) for code in graph.segment]
    for node in range(len(graph) - 1, -1, -1):
        if graph.parent[node] >= 0:
            sets[graph.parent[node]] |= sets[node]
    return [frozenset(s) for s in sets]


def _tracheal_bronchus(
    tree: LabeledTree, above_mm: float = 5.0, below_mm: float = 40.0, least_mm: float = 20.0
) -> Finding | None:
    """A branch to an upper lobe that leaves the trachea ``above_mm`` to ``below_mm`` above the carina.

    Nearly all leave within 20 mm; one of less than ``least_mm`` with all that comes from it is a spur of the trachea.
    """
    carina = carina_node(tree)
    if carina is None:
        return None
    graph = tree.graph
    trachea = [carina]
    while graph.parent[trachea[-1]] >= 0:
        trachea.append(int(graph.parent[trachea[-1]]))
    supplied = _supplied(graph)
    upper = {s.code for s in segments_of_lobe(Lobe.RIGHT_UPPER)} | {s.code for s in segments_of_lobe(Lobe.LEFT_UPPER)}
    on_trachea = set(trachea)
    for node, parent in enumerate(graph.parent):
        if parent < 0 or int(parent) not in on_trachea or node in on_trachea:
            continue
        height = float(graph.points[parent][2] - graph.points[carina][2])
        plausible = above_mm < height <= below_mm and _length_below(graph, node) >= least_mm
        if int(parent) != carina and plausible and supplied[node] and supplied[node] <= upper:
            names = ", ".join(segment_by_code(code).short for code in sorted(supplied[node]))
            sentence = f"Variant: a tracheal bronchus leaves {height:.0f} mm above the carina and supplies {names}."
            return Finding(Severity.NOTE, "airway", sentence)
    return None


def _length_below(graph: TreeGraph, node: int) -> float:
    """mm of centerline from a node's parent through the node to all tips."""
    below = np.zeros(len(graph), dtype=bool)
    below[node] = True
    for child in range(node + 1, len(graph)):
        below[child] = graph.parent[child] >= 0 and below[graph.parent[child]]
    return float(graph.lengths()[below].sum())
