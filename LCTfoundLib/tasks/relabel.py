"""Name branches otherwise: their territories move, everything else of a finished segmentation stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import Probabilities, sample
from LCTfoundLib.anatomy.quality import Finding
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Lobe, Tree, segment_by_code, segments_of_lobe
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.tasks.segments import divide, judge, lobes_of, overrule, tile_lobes, variants
from LCTfoundLib.tasks.state import LungState, StateError
from LCTfoundLib.volume import Volume

__all__ = ["BranchName", "Relabeled", "relabel"]

#: Share of a branch's nodes in the lungs that a lobe must hold to own it: fissures are not exact.
_OWNED = 1 / 3


@dataclass(frozen=True)
class BranchName:
    """Another name for a branch and all that comes from it.

    Attributes:
        tree: AIRWAY or ARTERY; veins run between the segments and name none.
        branch: a node of the branch in the tree's graph, such as its first.
        segment: code 1-18, or 0 for a branch that serves several segments.
    """

    tree: Tree
    branch: int
    segment: int


@dataclass
class Relabeled:
    """What a relabeling gave.

    Attributes:
        state: of the new result, with its graphs, confidence and findings.
        segments, trees: uint8 on the input's grid.
        lobes: whose segments were computed again.
    """

    state: LungState
    segments: Volume
    trees: Volume
    lobes: frozenset[Lobe]


def relabel(
    state: LungState,
    changes: Sequence[BranchName],
    progress: Progress | None = None,
    again: Sequence[Lobe] = (),
) -> Relabeled:
    """Rename branches with their subtrees, in order, and compute the territories of the lobes they concern.

    Args:
        state: of a finished segmentation; it is not changed.
        changes: what to rename; none gives the same result again.
        progress: told about steps; stops when cancelled.
        again: lobes to compute in any case.

    Raises:
        StateError: no such branch or segment, or a segment of another lobe than that the branch lies in.
        Cancelled.
    """
    progress = Progress.of(progress)
    progress.update(0.0)
    lobes = lobes_of(state.segments)
    graphs, concerned = _renamed(state, lobes, changes)
    concerned |= set(again)
    work = state.segments.with_array(state.segments.array.copy())
    effective, prior = overrule(graphs, state.given, state.prior)
    divided = divide(lobes.with_array(_masked(lobes.array, concerned)), effective, prior)
    np.copyto(work.array, divided, where=divided > 0)
    progress.update(0.3)
    result = replace(state, segments=work, graphs=graphs)
    segments = _on_input_grid(state, result, concerned)
    progress.update(0.7)
    trees = result.trees_on_input_grid()
    result.findings, result.confidence = _judged(state, result, prior, concerned)
    progress.done()
    return Relabeled(result, segments, trees, frozenset(concerned))


def _renamed(state: LungState, lobes: Volume, changes: Sequence[BranchName]) -> tuple[dict[Tree, TreeGraph], set[Lobe]]:
    """Graphs with the new names, and the lobes that a changed name, old or new, belongs to."""
    graphs = {
        tree: replace(graph, segment=graph.segment.copy(), confidence=graph.confidence.copy())
        for tree, graph in state.graphs.items()
    }
    concerned: set[Lobe] = set()
    for change in changes:
        nodes = _subtree(graphs, change)
        graph = graphs[change.tree]
        _check_place(graph, nodes, lobes, change)
        codes = {int(code) for code in graph.segment[nodes]}
        if codes != {change.segment}:
            concerned |= {Lobe(LOBE_OF_SEGMENT[code]) for code in codes | {change.segment} if code}
        graph.segment[nodes] = change.segment
        if len(graph.confidence):
            graph.confidence[nodes] = 1.0  # a person said so
    return graphs, concerned


def _subtree(graphs: dict[Tree, TreeGraph], change: BranchName) -> np.ndarray:
    """(N,) bool: the nodes of a branch and of all that comes from it."""
    if change.tree is Tree.VEIN:
        raise StateError("Veins supply no segment; rename a branch of the airway or of the artery.")
    if not 0 <= change.segment < len(LOBE_OF_SEGMENT):
        raise StateError(f"There is no segment {change.segment}; give a code from 0 to {len(LOBE_OF_SEGMENT) - 1}.")
    graph = graphs[change.tree]
    if not 0 <= change.branch < len(graph):
        raise StateError(f"The {change.tree.name.lower()} has no branch {change.branch}; choose one of this result.")
    branches = graph.branches()
    return branches.descendants(int(branches.of_node[change.branch]))[branches.of_node]


def _check_place(graph: TreeGraph, nodes: np.ndarray, lobes: Volume, change: BranchName) -> None:
    """Refuse a segment of a lobe that the branch does not lie in: territories stay within their lobes.

    A branch that lies wholly in a hilum belongs to the lobe that it is named by.
    """
    if not change.segment:
        return
    wanted = segment_by_code(change.segment)
    assert wanted.lobe is not None
    places = sample(lobes, graph.points[nodes], order=0).astype(int)
    places = places if places.any() else LOBE_OF_SEGMENT[graph.segment[nodes]]
    counts = np.bincount(places, minlength=len(Lobe) + 1)[1:]
    shares = counts / max(1, counts.sum())
    if shares[wanted.lobe - 1] >= _OWNED:
        return
    owners = [lobe for lobe in Lobe if shares[lobe - 1] >= _OWNED]
    if not counts.any():
        raise StateError(f"The branch lies outside the lungs, so it cannot be {wanted.name}; choose one further down.")
    if not owners:
        raise StateError(f"The branch supplies several lobes, so it cannot be {wanted.name}; choose one further down.")
    where = " and ".join(f"the {lobe.label.lower()}" for lobe in owners)
    names = ", ".join(segment.name for lobe in owners for segment in segments_of_lobe(lobe))
    raise StateError(f"The branch lies in {where}, so it cannot be {wanted.name}; choose from {names}.")


def _masked(lobes: np.ndarray, wanted: set[Lobe]) -> np.ndarray:
    keep = np.array([code if code in wanted else 0 for code in range(len(Lobe) + 1)], dtype=np.uint8)
    return keep[lobes]


def _on_input_grid(old: LungState, new: LungState, concerned: set[Lobe]) -> Volume:
    """The segments on the input's grid: the old ones, and in the lobes concerned the new ones."""
    segments = old.segments_on_input_grid()
    if not concerned:
        return segments
    restored = new.segments.restore_to(new.grid)
    tiled = tile_lobes(restored.array, LOBE_OF_SEGMENT[segments.array], concerned)
    np.copyto(segments.array, tiled, where=tiled > 0)
    new.correct(segments.array, restored.array)
    return segments


def _judged(
    old: LungState, new: LungState, prior: Probabilities, concerned: set[Lobe]
) -> tuple[list[Finding], dict[str, float]]:
    """Findings and confidence of the new result; what rests on no name that changed is taken over."""
    if not concerned:
        return list(old.findings), dict(old.confidence)
    keys = {segment.key for lobe in concerned for segment in segments_of_lobe(lobe)}
    replaced = set(variants(old.graphs[Tree.AIRWAY]))
    kept = [finding for finding in old.findings if finding.structure not in keys and finding not in replaced]
    on_segments, confidence = judge(new.segments, prior, concerned)
    findings = [*kept, *on_segments, *variants(new.graphs[Tree.AIRWAY])]
    confidence |= {key: value for key, value in old.confidence.items() if key not in keys}
    return sorted(findings, key=lambda finding: -finding.severity), confidence
