"""Statistics of generated trees beside literature values and real trees: ``python -m training.phantom.literature``.

The sources are in ``REFERENCES``. Values of those in ``QUOTED`` are the ones usually quoted from these works and were
not looked up in the original again; all others were read in the abstract or table of the source.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import SEGMENTS, Lobe
from training.phantom.branching import accumulate, generations, unit
from training.phantom.growth import LungTrees, grow_trees

if TYPE_CHECKING:
    from training.phantom.thorax import Thorax

__all__ = ["BranchTable", "LITERATURE", "REFERENCES", "branch_table", "mask_to_tree", "statistics", "tree_statistics"]

REFERENCES: dict[str, str] = {
    "Weibel 1963": "Weibel ER. Morphometry of the Human Lung. Springer 1963, model A",
    "Horsfield 1968": "Horsfield K, Cumming G. Morphology of the bronchial tree in man. J Appl Physiol 24:373",
    "Horsfield 1976": "Horsfield K. Diameter, length and branching ratios in the bronchial tree. Respir Physiol 26:351",
    "Raabe 1976": "Raabe OG et al. Tracheobronchial geometry. Lovelace Foundation LF-53",
    "Kitaoka 1999": "Kitaoka H et al. A three-dimensional model of the human airway tree. J Appl Physiol 87:2207",
    "Tawhai 2004": "Tawhai MH et al. CT-based geometry analysis ... bronchial tree. J Appl Physiol 97:2310",
    "Huang 1996": "Huang W et al. Morphometry of the human pulmonary vasculature. J Appl Physiol 81:2123",
    "Dong 2020": "Dong M et al. Image-based scaling laws ... pulmonary artery. Am J Physiol Heart 319:H432",
    "Mi 2015": "Mi W et al. Tracheobronchial tree in a Chinese population by CT. PLoS One 10:e0123177 (2107 CTs)",
    "Zahedi-Nejad 2011": "Zahedi-Nejad N et al. Normal dimensions of trachea and main bronchi. Pol J Radiol 76(4):28",
    "Yamada 2020": "Yamada Y et al. Lung and lobe volumes, supine and standing CT. Sci Rep 10 (PMC7490509)",
    "Huang 2019": "Huang M et al. The right bronchial tree by CT. Surg Radiol Anat, s00276-019-02199-7 (238 CTs)",
    "Wang 2018": "Wang T et al. Variations of right bronchial tree. Surg Radiol Anat 40:955 (238 CTs)",
    "Left upper 2023": "Types of segmental bronchi in left superior and lingular lobes, multi-slice CT (10,000 CTs)",
    "Zhao 2009": "Zhao X et al. Bronchial anatomy of left lung. Surg Radiol Anat, s00276-008-0404-8 (216 CTs)",
    "Left lower 2024": "Branching pattern of the bronchi in the left lower lobe, Hebei General Hospital (540 CTs)",
    "Atwell 1966": "Atwell SW. Double superior segmental bronchi. Ann Thorac Surg 2:755 (1200 bronchograms)",
    "Ghaye 2001": "Ghaye B et al. Congenital bronchial abnormalities revisited. Radiographics 21:105",
    "Nakano 2000": "Nakano Y et al. CT assessment of airway wall. Am J Respir Crit Care Med 162:1102",
    "Kim 1995": "Kim SJ et al. Normal bronchial and pulmonary arterial diameters by thin-section CT. JCAT 19:365",
}


#: Sources whose values are quoted, not looked up again.
QUOTED = frozenset(
    {
        "Weibel 1963",
        "Horsfield 1968",
        "Horsfield 1976",
        "Raabe 1976",
        "Kitaoka 1999",
        "Tawhai 2004",
        "Huang 1996",
        "Ghaye 2001",
        "Nakano 2000",
        "Kim 1995",
    }
)


@dataclass(frozen=True)
class Value:
    """A literature value: what, how much, from where."""

    label: str
    value: str
    source: str


#: Key of ``statistics`` -> literature value.
LITERATURE: dict[str, Value] = {
    "trachea.diameter": Value("trachea diameter, mm", "15-20", "Zahedi-Nejad 2011"),
    "trachea.length": Value("trachea length, mm", "105 +- 13", "Mi 2015"),
    "right main.length": Value("right main bronchus length, mm", "13.6 +- 4.3", "Mi 2015"),
    "left main.length": Value("left main bronchus length, mm", "48.3 +- 6.5", "Mi 2015"),
    "right main.angle": Value("right main bronchus to the vertical, degrees", "34.9", "Mi 2015"),
    "left main.angle": Value("left main bronchus to the vertical, degrees", "42.5", "Mi 2015"),
    "right main.diameter": Value("right main bronchus diameter, mm", "12-16", "common CT reference"),
    "left main.diameter": Value("left main bronchus diameter, mm", "10-14", "common CT reference"),
    "airway.branches": Value("airway branches", "", ""),
    "airway.angle": Value("airway branching angle, degrees", "35-45", "Horsfield 1968, Tawhai 2004"),
    "airway.length/diameter": Value("airway length / diameter", "2.8-3.25", "Weibel 1963, Tawhai 2004"),
    "airway.child/parent diameter": Value("airway child / parent diameter", "0.79 (2^-1/3)", "Weibel 1963"),
    "airway.minor/major diameter": Value("airway minor / major child diameter", "0.8-0.86", "Raabe 1976, Kitaoka 1999"),
    "airway.strahler branching": Value("airway Strahler branching ratio", "2.5-2.8", "Horsfield 1976"),
    "airway.strahler diameter": Value("airway Strahler diameter ratio", "1.35-1.43", "Horsfield 1976"),
    "airway.strahler length": Value("airway Strahler length ratio", "1.33-1.46", "Horsfield 1976"),
    "airway.wall/diameter": Value("segmental wall / lumen diameter", "0.1-0.25", "Nakano 2000"),
    "artery/airway diameter": Value("artery / airway lumen diameter, segmental", "1.0-1.5 (outer: 0.98)", "Kim 1995"),
    "artery.branches": Value("artery branches", "", ""),
    "artery.angle": Value("artery branching angle, degrees", "28 +- 15", "Dong 2020"),
    "artery.tortuosity": Value("artery way / chord - 1", "0.026 +- 0.024", "Dong 2020"),
    "artery.strahler branching": Value("artery Strahler branching ratio", "3.4", "Huang 1996"),
    "artery.strahler diameter": Value("artery Strahler diameter ratio", "1.56", "Huang 1996"),
    "artery.strahler length": Value("artery Strahler length ratio", "1.49", "Huang 1996"),
    "artery.root diameter": Value("pulmonary trunk diameter, mm", "25 +- 3", "common CT reference"),
    "vein.branches": Value("vein branches", "", ""),
    "vein.angle": Value("vein branching angle, degrees", "", ""),
    "vein.strahler branching": Value("vein Strahler branching ratio", "3.3", "Huang 1996"),
    "vein.strahler diameter": Value("vein Strahler diameter ratio", "1.58", "Huang 1996"),
    "vein.root diameter": Value("pulmonary vein ostium diameter, mm", "12-18", "common CT reference"),
    "pleura.vessel": Value("pleural surface within 10 mm of a vessel, share", "", ""),
} | {
    f"airway.count {generation}": Value(f"airways of generation {generation}", str(2**generation), "Weibel 1963")
    for generation in range(1, 9)
} | {
    f"airway.diameter {generation}": Value(f"airway diameter, generation {generation}, mm", str(mm), "Weibel 1963")
    for generation, mm in enumerate((18.0, 12.2, 8.3, 5.6, 4.5, 3.5, 2.8, 2.3, 1.86))
}  # fmt: skip


#: Share of each lobe in both lungs, supine (Yamada 2020, 32 volunteers).
LOBE_SHARE: dict[str, str] = {
    "Right upper lobe": "0.179 +- 0.024",
    "Right middle lobe": "0.093 +- 0.016",
    "Right lower lobe": "0.265 +- 0.026",
    "Left upper lobe": "0.231 +- 0.021",
    "Left lower lobe": "0.232 +- 0.024",
}


@dataclass
class BranchTable:
    """The branches of a tree graph, from bifurcation to bifurcation.

    Attributes:
        first, last: (B,) node before the branch and its last node.
        parent: (B,) parent branch, -1 at a root.
        length: (B,) mm along the centerline.
        chord: (B, 3) from start to end, mm.
        diameter: (B,) mean lumen diameter in mm.
        generation: (B,) 0 at a root.
        order: (B,) Strahler order, 1 at the tips.
    """

    first: np.ndarray
    last: np.ndarray
    parent: np.ndarray
    length: np.ndarray
    chord: np.ndarray
    diameter: np.ndarray
    generation: np.ndarray
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def branch_table(graph: TreeGraph) -> BranchTable:
    """Group the pieces of a graph into branches."""
    parent = graph.parent
    has = parent >= 0
    children = np.bincount(parent[has], minlength=len(graph))
    starts = has & ((parent < 0) | (children[np.maximum(parent, 0)] != 1) | (parent[np.maximum(parent, 0)] < 0))
    branch = np.full(len(graph), -1)
    branch[starts] = np.arange(starts.sum())
    for node in range(len(graph)):  # parents come first
        if has[node] and not starts[node]:
            branch[node] = branch[parent[node]]
    piece = np.where(has, np.linalg.norm(graph.points - graph.points[np.maximum(parent, 0)], axis=1), 0.0)
    count = int(starts.sum())
    nodes = np.flatnonzero(has)
    owner = branch[nodes]
    first = parent[starts]
    last = np.zeros(count, dtype=np.int64)
    np.maximum.at(last, owner, nodes)  # the last node of a chain comes last
    length = np.bincount(owner, piece[nodes], minlength=count)
    weighted = np.bincount(owner, piece[nodes] * 2 * graph.radius[nodes], minlength=count)
    up = branch[first]
    return BranchTable(
        first,
        last,
        up,
        length,
        graph.points[last] - graph.points[first],
        weighted / np.maximum(length, 1e-9),
        generations(up),
        _strahler(up),
    )


def _strahler(parent: np.ndarray) -> np.ndarray:
    """Strahler order of branches whose parents come first."""
    order = np.zeros(len(parent), dtype=np.int64)
    best: dict[int, tuple[int, int]] = {}
    for branch in range(len(parent) - 1, -1, -1):
        top, ties = best.get(branch, (0, 0))
        order[branch] = 1 if top == 0 else top + (ties > 1)
        up = int(parent[branch])
        if up >= 0:
            high, count = best.get(up, (0, 0))
            mine = int(order[branch])
            best[up] = (mine, 1) if mine > high else (high, count + (mine == high))
    return order


def tree_statistics(graph: TreeGraph, smallest: float = 0.0, largest: float = np.inf) -> dict[str, float]:
    """Shape statistics of one tree.

    Args:
        smallest, largest: mm; only branches of these diameters (and their bifurcations) are measured.
    """
    table = branch_table(graph)
    use = (table.diameter >= smallest) & (table.diameter <= largest) & (table.length > 0.5)
    child = use & (table.parent >= 0)
    child &= np.where(table.parent >= 0, use[np.maximum(table.parent, 0)], False)
    up = table.parent[child]
    cosine = (unit(table.chord[child]) * unit(table.chord[up])).sum(1)
    chord = np.maximum(np.linalg.norm(table.chord, axis=1), 1e-6)
    roots = graph.parent < 0
    result = {
        "branches": float(use.sum()),
        "angle": float(np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()),
        "length": float(table.length[use].mean()),
        "length/diameter": float(np.median((table.length / table.diameter)[use])),
        "child/parent diameter": float((table.diameter[child] / table.diameter[up]).mean()),
        "minor/major diameter": _minor_major(table, use),
        "tortuosity": float((table.length / chord - 1)[use].mean()),
        "total length": float(table.length[use].sum()),
        "root diameter": float(2 * graph.radius[roots].mean()),
    }
    result |= _strahler_ratios(table, use)
    for generation in range(9):
        mine = use & (table.generation == generation)
        result[f"count {generation}"] = float(mine.sum())
        if mine.any():
            result[f"diameter {generation}"] = float(table.diameter[mine].mean())
    return result


def _minor_major(table: BranchTable, use: np.ndarray) -> float:
    """Mean ratio of the diameters of the two children of a bifurcation."""
    ratios = []
    order = np.argsort(table.parent, kind="stable")
    for pair in np.split(order, np.flatnonzero(np.diff(table.parent[order])) + 1):
        if len(pair) == 2 and table.parent[pair[0]] >= 0 and use[pair].all():
            small, large = np.sort(table.diameter[pair])
            ratios.append(small / large)
    return float(np.mean(ratios)) if ratios else float("nan")


def _strahler_ratios(table: BranchTable, use: np.ndarray) -> dict[str, float]:
    """Slopes of count, diameter and length over Strahler order (orders with at least three vessels)."""
    # branches in series of one order count as one vessel
    head = np.where(table.parent >= 0, table.order[np.maximum(table.parent, 0)] != table.order, True)
    orders = [o for o in range(1, int(table.order.max()) + 1) if (use & head & (table.order == o)).sum() >= 3]
    if len(orders) < 3:
        return {}
    count = [(use & head & (table.order == o)).sum() for o in orders]
    series = [table.length[use & (table.order == o)].sum() / c for o, c in zip(orders, count, strict=True)]
    diameter = [table.diameter[use & (table.order == o)].mean() for o in orders]

    def ratio(values: Iterable[float]) -> float:
        return float(np.exp(abs(np.polyfit(orders, np.log(list(values)), 1)[0])))

    return {"strahler branching": ratio(count), "strahler diameter": ratio(diameter), "strahler length": ratio(series)}


def statistics(trees: LungTrees, thorax: Thorax) -> dict[str, float]:
    """All statistics of one patient, keys as in ``LITERATURE`` and per segment ``share <short name>`` of its lobe."""
    result = {
        f"{name}.{key}": value
        for name, graph in (("airway", trees.airway), ("artery", trees.artery), ("vein", trees.vein))
        for key, value in tree_statistics(graph).items()
    }
    result |= _central_airways(trees.airway, np.asarray(thorax.landmarks["carina"]))
    segmental = (trees.airway.segment > 0) & (trees.airway.radius > 1.5)
    result["airway.wall/diameter"] = float((trees.airway_wall / (2 * trees.airway.radius))[segmental].mean())
    result["artery/airway diameter"] = _artery_over_airway(trees, segmental)
    result["pleura.vessel"] = _pleura_near_vessel(trees, thorax)
    volumes = np.bincount(trees.segments.ravel(), minlength=19).astype(float)
    for segment in SEGMENTS:
        lobe = sum(volumes[s.code] for s in SEGMENTS if s.lobe == segment.lobe)
        result[f"share {segment.short}"] = float(volumes[segment.code] / lobe) if lobe else float("nan")
    lungs = volumes[1:].sum()
    for lobe in Lobe:
        result[f"share {lobe.label}"] = float(sum(volumes[s.code] for s in SEGMENTS if s.lobe == lobe) / lungs)
    return result


def _central_airways(airway: TreeGraph, carina: np.ndarray) -> dict[str, float]:
    table = branch_table(airway)
    at_carina = np.linalg.norm(airway.points[table.last] - carina, axis=1) < 5.0
    if not at_carina.any():
        return {}
    trachea = int(np.flatnonzero(at_carina)[0])
    result = {"trachea.diameter": float(table.diameter[trachea]), "trachea.length": float(table.length[trachea])}
    for branch in np.flatnonzero(table.parent == trachea):
        name = "right main" if table.chord[branch, 0] < 0 else "left main"
        result[f"{name}.length"] = float(table.length[branch])
        result[f"{name}.diameter"] = float(table.diameter[branch])
        # in the coronal plane, as it is measured on images
        x, z = table.chord[branch, 0], table.chord[branch, 2]
        result[f"{name}.angle"] = float(np.degrees(np.arctan2(abs(x), -z)))
    return result


def _artery_over_airway(trees: LungTrees, segmental: np.ndarray) -> float:
    """Mean diameter ratio of the accompanying artery (the thickest that touches the bundle) at segmental bronchi."""
    inside = np.flatnonzero(trees.artery.segment > 0)
    points, radius = trees.airway.points[segmental], trees.airway.radius[segmental]
    reach = 2.6 * radius + 3.0
    near = cKDTree(trees.artery.points[inside]).query_ball_point(points, reach)
    ratios = [trees.artery.radius[inside[n]].max() / r for n, r in zip(near, radius, strict=True) if n]
    return float(np.mean(ratios)) if ratios else float("nan")


def _pleura_near_vessel(trees: LungTrees, thorax: Thorax, distance: float = 10.0) -> float:
    lungs = thorax.lobes > 0
    surface = np.argwhere(lungs & ~ndimage.binary_erosion(lungs))[::11]
    points = np.asarray(thorax.grid.origin) + thorax.grid.spacing * surface[:, ::-1]
    vessels = cKDTree(np.concatenate([trees.artery.points, trees.vein.points]))
    return float((vessels.query(points)[0] < distance).mean())


# --- real trees ------------------------------------------------------------------------------------------------------


def mask_to_tree(mask: np.ndarray, spacing: tuple[float, float, float], top_root: bool) -> TreeGraph:
    """Skeleton graph of a tree mask.

    Args:
        mask: bool [k, j, i], k to superior.
        spacing: (k, j, i) mm.
        top_root: root at the highest point (airway), else at the thickest of each component.
    """
    box = tuple(slice(int(v.min()), int(v.max()) + 1) for v in np.nonzero(mask))
    part = np.pad(mask[box], 1)
    radius = ndimage.distance_transform_edt(part, sampling=spacing)
    voxels = np.argwhere(skeletonize(part))
    points = (voxels * np.array(spacing))[:, ::-1]
    size = np.array([radius[tuple(v)] for v in voxels])
    pairs = cKDTree(voxels).query_pairs(1.8, output_type="ndarray")
    length = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
    links = coo_matrix((length, (pairs[:, 0], pairs[:, 1])), shape=(len(points), len(points))).tocsr()
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    free = np.ones(len(points), dtype=bool)
    rank = points[:, 2] if top_root else size
    while free.any() and len(pieces) < 200:
        root = int(np.flatnonzero(free)[np.argmax(rank[free])])
        way, before = dijkstra(links, directed=False, indices=root, return_predecessors=True)
        mine = np.isfinite(way)
        free &= ~mine
        if mine.sum() >= 10:
            pieces.append((way, before, mine))
    return _prune(_assemble(points, size, pieces))


def _assemble(
    points: np.ndarray, size: np.ndarray, pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> TreeGraph:
    order = np.concatenate([np.flatnonzero(mine)[np.argsort(way[mine], kind="stable")] for way, _, mine in pieces])
    number = np.full(len(points), -1)
    number[order] = np.arange(len(order))
    before = np.full(len(points), -1)
    for _, back, mine in pieces:
        before[mine] = np.where(back[mine] >= 0, number[np.maximum(back[mine], 0)], -1)
    parent = before[order]
    zero = np.zeros(len(order), dtype=np.int64)
    return TreeGraph(points[order], size[order], parent, zero, generations(parent))


def _prune(graph: TreeGraph, rounds: int = 3) -> TreeGraph:
    """Drop end branches that do not reach 2 mm out of their parent's lumen (spurs of the skeleton)."""
    for _ in range(rounds):
        table = branch_table(graph)
        leaf = np.ones(len(table), dtype=bool)
        leaf[table.parent[table.parent >= 0]] = False
        spur = leaf & (table.parent >= 0) & (table.length < graph.radius[table.first] + 2.0)
        if not spur.any():
            break
        drop = np.zeros(len(graph))
        drop[table.last[spur]] = 1
        gone = (accumulate(graph.parent, drop) > 0) & _in_branches(graph, table, spur)
        graph = _subset(graph, ~gone)
    return graph


def _in_branches(graph: TreeGraph, table: BranchTable, chosen: np.ndarray) -> np.ndarray:
    """Whether each node belongs to one of the chosen branches."""
    result = np.zeros(len(graph), dtype=bool)
    for branch in np.flatnonzero(chosen):
        node = int(table.last[branch])
        while node >= 0 and node != table.first[branch]:
            result[node] = True
            node = int(graph.parent[node])
    return result


def _subset(graph: TreeGraph, keep: np.ndarray) -> TreeGraph:
    number = np.cumsum(keep) - 1
    parent = graph.parent[keep]
    parent = np.where(parent >= 0, number[np.maximum(parent, 0)], -1)
    return TreeGraph(graph.points[keep], graph.radius[keep], parent, graph.segment[keep], generations(parent))


#: Diameters in mm at which generated and real trees are compared: what the masks show fully, without the hilum.
AIRWAY_RANGE = (2.0, 30.0)
VESSEL_RANGE = (2.0, 8.0)

#: What is compared with real masks.
COMPARED: dict[str, str] = {
    "branches": "branches",
    "total length": "total length, mm",
    "length": "branch length, mm",
    "length/diameter": "length / diameter",
    "angle": "branching angle, degrees",
    "child/parent diameter": "child / parent diameter",
    "minor/major diameter": "minor / major child diameter",
}


def real_statistics(folder: Path) -> dict[str, list[float]]:
    """Statistics of the real masks of each patient: ``bronchialTree``, and ``vessels`` (artery and vein together)."""
    result: dict[str, list[float]] = {}
    for patient in sorted(folder.iterdir()):
        for name, file, limits in (("airway", "bronchialTree", AIRWAY_RANGE), ("vessels", "vessels", VESSEL_RANGE)):
            image = sitk.DICOMOrient(sitk.ReadImage(str(patient / f"{file}.nii.gz")), "LPS")
            x, y, z = image.GetSpacing()
            tree = mask_to_tree(sitk.GetArrayFromImage(image) > 0, (z, y, x), top_root=name == "airway")
            _add(result, name, tree_statistics(tree, *limits))
    return result


def comparable_statistics(trees: LungTrees) -> dict[str, float]:
    """The same of generated trees; counts and lengths of artery and vein are added, the rest is averaged."""
    result = {f"airway.{key}": value for key, value in tree_statistics(trees.airway, *AIRWAY_RANGE).items()}
    artery, vein = (tree_statistics(graph, *VESSEL_RANGE) for graph in (trees.artery, trees.vein))
    for key in COMPARED:
        total = artery[key] + vein[key]
        result[f"vessels.{key}"] = total if key in ("branches", "total length") else total / 2
    return result


def _add(result: dict[str, list[float]], name: str, values: dict[str, float]) -> None:
    for key, value in values.items():
        result.setdefault(f"{name}.{key}", []).append(value)


# --- table -----------------------------------------------------------------------------------------------------------


def _mean(values: list[float]) -> str:
    known = [value for value in values if np.isfinite(value)]
    return f"{np.mean(known):.3g} +- {np.std(known):.2g}" if known else "-"


def literature_table(generated: dict[str, list[float]]) -> str:
    """Markdown table: generated beside literature, then volume shares."""
    rows = ["| what | generated | literature | source |", "|---|---|---|---|"]
    for key, value in LITERATURE.items():
        rows.append(f"| {value.label} | {_mean(generated.get(key, []))} | {value.value} | {value.source} |")
    for key in sorted(k for k in generated if k.startswith("share ")):
        known = LOBE_SHARE.get(key.removeprefix("share "), "")
        rows.append(f"| volume {key} | {_mean(generated[key])} | {known} | {'Yamada 2020' if known else ''} |")
    return "\n".join(rows)


def real_table(generated: dict[str, list[float]], real: dict[str, list[float]]) -> str:
    """Markdown table: generated beside real masks, at equal diameters."""
    rows = [f"| diameters {AIRWAY_RANGE} and {VESSEL_RANGE} mm | generated | real masks |", "|---|---|---|"]
    for name in ("airway", "vessels"):
        for key, label in COMPARED.items():
            values = generated.get(f"{name}.{key}", []), real.get(f"{name}.{key}", [])
            rows.append(f"| {name}: {label} | {_mean(values[0])} | {_mean(values[1])} |")
        if name == "airway":
            rows += [
                f"| airway: {what} of generation {n} | {_mean(generated[f'airway.{key} {n}'])} "
                f"| {_mean(real.get(f'airway.{key} {n}', []))} |"
                for key, what in (("count", "number"), ("diameter", "diameter, mm,"))
                for n in range(1, 7)
            ]
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    from training.phantom.thorax import make_thorax

    parser = argparse.ArgumentParser(description="Statistics of generated trees beside literature and real trees.")
    parser.add_argument("--patients", type=int, default=10)
    parser.add_argument("--spacing", type=float, default=1.5)
    parser.add_argument("--shifted", action="store_true")
    data = Path(os.environ.get("LCTFOUND_DATA", "../shared/data"))
    parser.add_argument("--trees", type=Path, default=data / "shapes" / "trees")
    options = parser.parse_args(arguments)
    generated: dict[str, list[float]] = {}
    comparable: dict[str, list[float]] = {}
    for seed in range(options.patients):
        thorax = make_thorax(seed, options.spacing)
        trees = grow_trees(thorax, seed, shifted=options.shifted)
        for result, values in ((generated, statistics(trees, thorax)), (comparable, comparable_statistics(trees))):
            for key, value in values.items():
                result.setdefault(key, []).append(value)
    print(literature_table(generated) + "\n")
    if options.trees.is_dir():
        print(real_table(comparable, real_statistics(options.trees)))
    else:
        print(f"Real trees are left out: there is no folder {options.trees}; name it with --trees.")
    print("\n" + "\n".join(f"* {name}: {text}" for name, text in REFERENCES.items()))
    print("\nQuoted, not looked up again: " + ", ".join(sorted(QUOTED)) + ".")


if __name__ == "__main__":
    main()
