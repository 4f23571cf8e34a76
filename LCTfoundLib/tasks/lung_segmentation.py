"""Whole-lung segmentation: a chest CT in, 21 structures out.

Coarse net (3 mm, whole chest) -> fine net (0.8-1.5 mm, lungs and hila) -> skeleton graphs, repaired and separated
-> labeled segmental bronchi -> territories within each lobe -> the input's own grid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

import LCTfoundLib
from LCTfoundLib.anatomy.airway_labels import label_airway, label_artery
from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.lungs import find_lungs, refine_lungs
from LCTfoundLib.anatomy.masks import Probabilities, close_ball, resample
from LCTfoundLib.anatomy.quality import (
    Finding,
    Severity,
    check_image,
    check_laterality,
    check_lobe_volumes,
    check_trees,
    check_truncation,
    tree_confidence,
)
from LCTfoundLib.anatomy.repair import AirwayTree, repair_airway
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, STRUCTURES, Context, Tree
from LCTfoundLib.anatomy.territories import connect_labels, lobe_probabilities, smooth_lobes
from LCTfoundLib.anatomy.vessels import Vessels, separate_vessels
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.networks.inputs import LungBox
from LCTfoundLib.networks.lung import (
    COARSE,
    FINE,
    CoarseProbabilities,
    FineProbabilities,
    LoadedNet,
    load_net,
    predict_coarse,
    predict_fine,
)
from LCTfoundLib.runtime.device import DeviceChoice, choose_device
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.tasks.segments import divide, judge, rounded_prior, tile_lobes, variants
from LCTfoundLib.tasks.state import LungState
from LCTfoundLib.volume import Volume
from LCTfoundLib.weights.registry import Card

__all__ = ["LungRequest", "LungResult", "Quality", "segment_lungs"]

#: The coarse net's grid, mm; the fine net's per quality is in ``_PLANS``.
_COARSE_MM = 3.0
#: Room around the lungs that the coarse net sees, as in its training.
_COARSE_MARGIN_MM = 20.0
#: Room around the lungs on the fine grid: hila and central vessels.
_FINE_MARGIN_MM = 12.0


#: Largest correction of the log-odds between artery and vein.
_MOST_SHIFT = 2.0

#: Where the fine net's card keeps the shares of vessel points on real CTs that got the other name, and how many may.
_SWAPS = "artery/vein points swapped"
_MOST_SWAPS = 0.10

_MIRRORED = Finding(
    Severity.SERIOUS,
    "image",
    "The image looks like a mirror image: left and right of the file are swapped, or the patient has situs inversus. "
    "Check the orientation before using any side.",
)


class Quality(StrEnum):
    """How fine, and so how slow."""

    FAST = "fast"
    STANDARD = "standard"
    FULL = "full"


@dataclass(frozen=True)
class _Plan:
    """Settings of a quality: fine grid in mm, and share of a tile that overlaps with the next."""

    spacing: float
    overlap: float


_PLANS = {Quality.FAST: _Plan(1.5, 0.15), Quality.STANDARD: _Plan(1.0, 0.2), Quality.FULL: _Plan(0.8, 0.4)}


@dataclass(frozen=True)
class LungRequest:
    """What is asked for.

    Attributes:
        quality: see ``Quality``.
        device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
        weights_folder: other place of the weights.
    """

    quality: Quality = Quality.STANDARD
    device: str = "auto"
    weights_folder: Path | None = None


@dataclass
class LungResult:
    """What was found, on the input's own grid.

    Attributes:
        segments: uint8 codes 0-18; the 18 segments tile the lungs.
        trees: uint8 ``Tree`` codes; they lie over the segments.
        confidence: 0-1 by structure key.
        findings: most severe first.
        graphs: centerlines by tree, LPS mm of the input's world.
        provenance: weights, versions, settings, seconds per step.
        state: what ``relabel`` needs to name branches otherwise.
    """

    segments: Volume
    trees: Volume
    confidence: dict[str, float]
    findings: list[Finding]
    graphs: dict[Tree, TreeGraph] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    state: LungState | None = None


def segment_lungs(
    ct: Volume,
    request: LungRequest | None = None,
    progress: Progress | None = None,
    load: Callable[[str, Path | None], LoadedNet] = load_net,
) -> LungResult:
    """Segment the 21 structures of a chest CT.

    Args:
        ct: HU, any orientation; checked by ``volume_io.check_ct``.
        request: quality, device, weights.
        progress: told about stages; stops the run when cancelled.
        load: gives the nets by name and folder; a worker keeps them between its jobs.

    Raises:
        UnsuitableImage: no lungs in view.
        WeightError: weights missing or damaged.
        OutOfMemory, Cancelled.
    """
    request = request or LungRequest()
    clock = _Clock()
    steps = Progress.of(progress).split(
        {
            "Loading": 2,
            "Coarse network": 8,
            "Fine network": 45,
            "Airway and vessels": 25,
            "Segments": 15,
            "Original grid": 5,
        }
    )
    loading, coarse_step, fine_step, tree_step, segment_step, last_step = steps
    loading.update(0.0)
    choice = choose_device(request.device)
    nets = load(COARSE, request.weights_folder), load(FINE, request.weights_folder)
    upright = ct.resample_canonical()
    clock.lap("loading")
    coarse, box = _coarse(nets[0], upright, choice, coarse_step)
    mirrored = _looks_mirrored(nets[0], coarse, box, choice)
    clock.lap("coarse network")
    plan = _PLANS[request.quality]
    work = _working_volume(upright, box, plan.spacing)
    fine = _fine(nets[1], work, coarse, box, choice, plan, fine_step)
    clock.lap("fine network")
    trees = _find_trees(fine, coarse, tree_step)
    clock.lap("trees")
    parts = _find_segments(work, fine, coarse, trees, segment_step)
    clock.lap("segments")
    last_step.update(0.0)
    state = _state(ct, trees, parts)
    findings, state.confidence = _judged(upright, coarse, trees, parts, state)
    findings = [*_mistrust_vessels(nets[1].card, state.confidence), *findings]
    findings.sort(key=lambda finding: -finding.severity)
    state.findings = [_MIRRORED, *findings] if mirrored else findings
    segments, labels = _on_input_grid(state)
    clock.lap("original grid")
    state.provenance = _provenance(request, choice, nets, plan, clock)
    last_step.done()
    return LungResult(segments, labels, state.confidence, state.findings, state.graphs, state.provenance, state)


# -- networks --------------------------------------------------------------------------------------------------------


def _coarse(
    net: LoadedNet, ct: Volume, choice: DeviceChoice, progress: Progress
) -> tuple[CoarseProbabilities, LungBox]:
    """The coarse net twice: the lungs it finds correct the box that a threshold gave (effusion, bowel gas)."""
    progress.update(0.0)
    small, found = find_lungs(ct)
    box = LungBox.of_mask(found.lungs, small.spacing, small.origin)
    for round_ in range(2):
        progress.update(0.3 + 0.35 * round_)
        image = _around(ct, box, _COARSE_MARGIN_MM, _COARSE_MM)
        coarse = predict_coarse(net, image, box, choice)
        lungs = _lungs_without_trachea(coarse) > 0.5
        if not lungs.any():
            raise UnsuitableImage("The networks found no lungs; check that the image is a CT of the chest in HU.")
        box = LungBox.of_mask(lungs, image.spacing, image.origin)
    progress.done()
    return coarse, box


def _looks_mirrored(net: LoadedNet, coarse: CoarseProbabilities, box: LungBox, choice: DeviceChoice) -> bool:
    """Whether the image resembles a patient more when left and right are exchanged.

    The net names organs by position too, so it calls whatever lies on the left stomach; but it recognizes an aorta only
    on the left of the spine. Of three patients it lost 73-83 % of the aorta when the image was mirrored.
    """
    x = coarse.grid.origin[0]
    width = coarse.grid.spacing[0] * (coarse.grid.shape[2] - 1)
    low, high = (2 * x + width - box.high[0], *box.low[1:]), (2 * x + width - box.low[0], *box.high[1:])
    image = coarse.grid.with_array(np.ascontiguousarray(coarse.grid.array[:, :, ::-1]))
    other = predict_coarse(net, image, LungBox(low, high), choice)
    here, there = (float(c.regions[Context.AORTA].sum()) * c.grid.voxel_ml for c in (coarse, other))
    return there > 20.0 and there > 2.0 * here


def _lungs_without_trachea(coarse: CoarseProbabilities) -> np.ndarray:
    """Probability of lung (k, j, i) without trachea and main bronchi, whose air looks like lung, and without islands.

    Bronchi inside the lungs stay in: a closing bridges them, but not the wide airways of the mediastinum.
    """
    spacing = coarse.grid.spacing
    airway = ndimage.binary_dilation(coarse.trees[Tree.AIRWAY] > 0.5)
    body = _largest_lungs((coarse.lungs > 0.5) & ~airway)
    body |= close_ball(body, 6.0, spacing) & (coarse.lungs > 0.3)
    return np.where(body, np.maximum(coarse.lungs, 0.51), np.minimum(coarse.lungs, 0.49)).astype(np.float32)


def _largest_lungs(lungs: np.ndarray) -> np.ndarray:
    """Without islands smaller than a tenth of the largest part: they would stretch the box."""
    labels, count = ndimage.label(lungs)
    if count < 2:
        return lungs
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray((sizes >= 0.1 * sizes.max())[labels])


def _around(ct: Volume, box: LungBox, margin: float, spacing: float) -> Volume:
    """The CT around the lungs on an isotropic grid, int16 HU, -1024 beyond the image."""
    inner = np.array(ct.origin), np.array(ct.origin) + np.array(ct.spacing) * (np.array(ct.shape[::-1]) - 1)
    low = np.maximum(np.array(box.low) - margin, inner[0])
    high = np.minimum(np.array(box.high) + margin, inner[1])
    size = np.maximum(np.round((high - low) / spacing).astype(int) + 1, 1)
    grid = Volume(np.broadcast_to(np.int16(0), size[::-1]), (spacing,) * 3, (low[0], low[1], low[2]))
    return ct.resample(grid, pad=-1024)


def _working_volume(ct: Volume, box: LungBox, spacing: float) -> Volume:
    return _around(ct, box, _FINE_MARGIN_MM, spacing)


def _fine(
    net: LoadedNet,
    work: Volume,
    coarse: CoarseProbabilities,
    box: LungBox,
    choice: DeviceChoice,
    plan: _Plan,
    progress: Progress,
) -> FineProbabilities:
    """The fine net where lungs, hila or central trees may be."""
    asked = (coarse.lungs > 0.2) | (coarse.trees[1:].sum(axis=0) > 0.2)
    near = ndimage.distance_transform_edt(~asked, sampling=coarse.grid.spacing[::-1]) <= 9.0
    mask = resample(coarse.grid.with_array(near), work, order=0)
    return predict_fine(net, work, box, mask, choice, plan.overlap, progress=progress)


# -- trees -----------------------------------------------------------------------------------------------------------


@dataclass
class _Trees:
    """Repaired trees on the working grid."""

    airway: AirwayTree
    vessels: Vessels

    @property
    def labels(self) -> np.ndarray:
        """uint8 ``Tree`` codes; the airway wins where masks meet, because its lumen is the clearest."""
        labels = np.zeros(self.airway.mask.shape, dtype=np.uint8)
        labels[self.vessels.vein.mask.array] = Tree.VEIN
        labels[self.vessels.artery.mask.array] = Tree.ARTERY
        labels[self.airway.mask.array] = Tree.AIRWAY
        return labels

    @property
    def graphs(self) -> dict[Tree, TreeGraph]:
        return {
            Tree.AIRWAY: self.airway.graph,
            Tree.ARTERY: self.vessels.artery.graph,
            Tree.VEIN: self.vessels.vein.graph,
        }


def _find_trees(fine: FineProbabilities, coarse: CoarseProbabilities, progress: Progress) -> _Trees:
    progress.update(0.0)
    airway = repair_airway(fine.grid.with_array(fine.trees[0].astype(np.float32)))
    progress.update(0.35)
    # The trees end at the heart: its blood looks like theirs.
    heart = resample(coarse.grid.with_array(coarse.regions[Context.HEART]), fine.grid) > 0.6
    foreign = heart | _outside_lungs_and_hila(coarse, fine.grid)
    artery, vein = (np.where(foreign, 0.0, fine.trees[index]).astype(np.float32) for index in (1, 2))
    artery, vein = _balanced(artery, vein, resample(coarse.grid.with_array(coarse.lungs), fine.grid) > 0.5)
    vessels = separate_vessels(fine.grid.with_array(artery), vein, airway.graph)
    progress.done()
    return _Trees(airway, vessels)


def _balanced(artery: np.ndarray, vein: np.ndarray, lungs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Artery and vein probabilities shifted so that the lungs hold about as much of the one as of the other.

    On a real scan the fine net leans to one of the two; which branch is more of an artery than others it knows better.
    Anatomy gives the balance, so the log-odds' median is taken off, up to ``_MOST_SHIFT``.
    """
    both = artery + vein
    vessel = lungs & (both > 0.5)
    if np.count_nonzero(vessel) < 1000:
        return artery, vein
    median = float(np.median(np.log(artery[vessel] + 0.01) - np.log(vein[vessel] + 0.01)))
    factor = np.float32(np.exp(-np.clip(median, -_MOST_SHIFT, _MOST_SHIFT)))
    total = np.maximum(factor * artery + vein, 1e-6)
    return both * factor * artery / total, both * vein / total


def _outside_lungs_and_hila(coarse: CoarseProbabilities, grid: Volume) -> np.ndarray:
    """Where no pulmonary vessel can be, bool on ``grid``: a rib looks like one in a small tile.

    Outside the lungs, vessels are believed only where the coarse net, which sees the whole chest, sees a tree too.
    """
    lungs = resample(coarse.grid.with_array(_lungs_without_trachea(coarse)), grid) > 0.5
    seen = ndimage.binary_dilation(coarse.trees[1:].sum(axis=0) > 0.3)
    return ~lungs & (resample(coarse.grid.with_array(seen), grid, order=0) == 0)


# -- segments --------------------------------------------------------------------------------------------------------


@dataclass
class _Segments:
    """Segments on the working grid, and what led to them."""

    segments: Volume
    lobes: Volume
    graphs: dict[Tree, TreeGraph]
    prior: Probabilities


def _find_segments(
    work: Volume, fine: FineProbabilities, coarse: CoarseProbabilities, trees: _Trees, progress: Progress
) -> _Segments:
    progress.update(0.0)
    lungs = refine_lungs(work, coarse.grid.with_array(_lungs_without_trachea(coarse)), trees.airway.mask)
    progress.update(0.25)
    prior = Probabilities(coarse.grid, coarse.regions)
    fused = _fused_lobes(fine, lobe_probabilities(prior))
    lobes = work.with_array(smooth_lobes(fused, work.with_array(lungs), smooth_mm=0.8))
    progress.update(0.5)
    airway = label_airway(trees.airway.graph, lobes, prior).graph
    artery = label_artery(trees.vessels.artery.graph, airway, lobes, prior).graph
    graphs = {Tree.AIRWAY: airway, Tree.ARTERY: artery, Tree.VEIN: trees.vessels.vein.graph}
    progress.update(0.7)
    kept = rounded_prior(prior)
    segments = work.with_array(divide(lobes, graphs, kept))
    progress.done()
    return _Segments(segments, lobes, graphs, kept)


def _fused_lobes(fine: FineProbabilities, coarse: Probabilities) -> Probabilities:
    """Lobes as both nets see them: the product of their probabilities.

    The coarse net sees the whole lung, the fine net the fissures, but from a tile it may take one for another. On six
    validation phantoms the mean lobe Dice was .927 by the coarse net, .817 by the fine one, .926 by both; on three real
    CTs without labels the borders by both lay on brighter voxels (10-13 HU, a fissure) than the coarse net's (6-7 HU).
    """
    values = np.empty(fine.lobes.shape, dtype=np.float32)
    for code in range(len(values)):
        prior = np.maximum(resample(coarse.channel(code), fine.grid), 1e-4)
        values[code] = prior * (fine.lobes[code].astype(np.float32) + 1e-3)
    values /= values.sum(axis=0)
    return Probabilities(fine.grid, values)


# -- result ----------------------------------------------------------------------------------------------------------


def _state(ct: Volume, trees: _Trees, parts: _Segments) -> LungState:
    grid = Volume(np.broadcast_to(np.uint8(0), ct.shape), ct.spacing, ct.origin, ct.direction)
    given = {tree: graph.segment.copy() for tree, graph in parts.graphs.items()}
    return LungState(grid, parts.segments, parts.segments.with_array(trees.labels), parts.prior, parts.graphs, given)


def _on_input_grid(state: LungState) -> tuple[Volume, Volume]:
    """Segments and trees on the input's grid; the state remembers what had to be mended there."""
    restored = state.segments.restore_to(state.grid)
    lobes = connect_labels(LOBE_OF_SEGMENT[restored.array], restored.array > 0)
    segments = restored.with_array(tile_lobes(restored.array, lobes))
    state.correct(segments.array, restored.array)
    return segments, state.trees_on_input_grid()


def _judged(
    upright: Volume, coarse: CoarseProbabilities, trees: _Trees, parts: _Segments, state: LungState
) -> tuple[list[Finding], dict[str, float]]:
    """Everything a reader has to know, and the confidence of all structures."""
    lungs = parts.lobes.with_array(parts.lobes.array > 0).restore_to(upright).array
    context = coarse.grid.with_array(coarse.regions.argmax(axis=0).astype(np.uint8))
    on_segments, confidence = judge(state.segments, state.prior)
    findings = [
        *check_image(upright, lungs),
        *check_truncation(lungs, upright.spacing),
        *check_laterality(parts.lobes, context),
        *check_lobe_volumes(parts.lobes.array),
        *check_trees(state.trees.array, state.trees.spacing, parts.lobes.array),
        *on_segments,
        *variants(state.graphs[Tree.AIRWAY]),
    ]
    for structure in STRUCTURES[18:]:
        assert structure.tree is not None
        confidence[structure.key] = tree_confidence(trees.graphs[structure.tree])
    return findings, confidence


def _mistrust_vessels(card: Card, confidence: dict[str, float]) -> list[Finding]:
    """Artery and vein are no surer than the weight's card says, however sure the network is; changes ``confidence``."""
    rates = card.numbers.get(_SWAPS)
    known = [float(rate) for rate in rates.values()] if isinstance(rates, dict) else []
    if not known or max(known) <= _MOST_SWAPS:
        return []
    for structure in STRUCTURES[19:]:
        confidence[structure.key] = min(confidence[structure.key], 1.0 - max(known))
    share = f"{100 * min(known):.0f} to {100 * max(known):.0f} %"
    sentence = (
        f"In tests on real CTs {share} of the vessel points got the wrong name (artery or vein): "
        "take the two together as vessels."
    )
    return [Finding(Severity.WARNING, "pulmonary_artery", sentence)]


def _provenance(
    request: LungRequest, choice: DeviceChoice, nets: tuple[LoadedNet, LoadedNet], plan: _Plan, clock: _Clock
) -> dict[str, Any]:
    return {
        "product": f"LCTfound {LCTfoundLib.__version__}",
        "task": "whole-lung segmentation, 21 structures",
        "quality": request.quality.value,
        "fine grid (mm)": plan.spacing,
        "device": f"{choice.device} ({choice.name}), {choice.precision.value}",
        "weights": {
            net.card.name: {"version": net.card.version, "sha256": net.card.sha256, "license": net.card.license}
            for net in nets
        },
        "seconds": clock.seconds,
    }


class _Clock:
    """Seconds per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, step: str) -> None:
        now = time.monotonic()
        self.seconds[step] = round(now - self._last, 2)
        self._last = now
