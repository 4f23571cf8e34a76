"""Checks of a finished segmentation: what a reader has to know before trusting it, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from scipy import ndimage

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.masks import CORNERS, FACES, Probabilities, Spacing, component_sizes, resample
from LCTfoundLib.anatomy.structures import SEGMENTS, Context, Lobe, Side, Tree, segment_by_code
from LCTfoundLib.volume import Volume

__all__ = [
    "LOBE_SHARES",
    "Finding",
    "Severity",
    "check_agreement",
    "check_image",
    "check_laterality",
    "check_lobe_volumes",
    "check_segments",
    "check_trees",
    "check_truncation",
    "tree_confidence",
    "region_confidence",
]


class Severity(IntEnum):
    """How much a finding matters."""

    NOTE = 0  # good to know: a variant, a segment named by the network alone
    WARNING = 1  # look at this structure before using it
    SERIOUS = 2  # the result is probably wrong


@dataclass(frozen=True)
class Finding:
    """Something a reader has to know.

    Attributes:
        severity: how much it matters.
        structure: key of the structure it is about (``right_s01``, ``right_middle``, ``airway``, ``lungs``, ``image``).
        sentence: one sentence in plain words.
    """

    severity: Severity
    structure: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence


#: Share of each lobe in its own lung, mean and SD: from the shares of the total in supine CT of 32 healthy adults,
#: Yamada et al., Respiration 2020 (10.1159/000507265), table 3. The SDs are doubled, because patients vary more.
LOBE_SHARES: dict[Lobe, tuple[float, float]] = {
    Lobe.RIGHT_UPPER: (0.334, 0.090),
    Lobe.RIGHT_MIDDLE: (0.174, 0.060),
    Lobe.RIGHT_LOWER: (0.494, 0.097),
    Lobe.LEFT_UPPER: (0.498, 0.091),
    Lobe.LEFT_LOWER: (0.500, 0.103),
}
#: Share of the right lung in both, same source and doubling.
RIGHT_LUNG_SHARE = (0.536, 0.030)

_THICK_MM = 3.0


# -- image -----------------------------------------------------------------------------------------------------------


def check_image(ct: Volume, lungs: np.ndarray) -> list[Finding]:
    """Slice thickness and noise.

    Args:
        ct: HU on a canonical grid.
        lungs: bool, same grid.
    """
    findings = []
    thickest = max(ct.spacing)
    if thickest > _THICK_MM:
        sentence = (
            f"The slices are {thickest:.1f} mm apart; small airways and vessels are lost, and segment borders rest "
            "mostly on the network. Slices of 1 mm are better."
        )
        findings.append(Finding(Severity.WARNING, "image", sentence))
    noise = lung_noise(ct, lungs)
    if noise > 90.0:
        sentence = f"The image is noisy ({noise:.0f} HU in the lungs); thin branches may be missing or false."
        findings.append(Finding(Severity.WARNING, "image", sentence))
    contrast = lung_contrast(ct, lungs)
    if contrast is not None and contrast < 350.0:
        sentence = (
            f"The lungs are only {contrast:.0f} HU darker than soft tissue; they are dense or the image is not in HU."
        )
        findings.append(Finding(Severity.WARNING, "lungs", sentence))
    return findings


def lung_noise(ct: Volume, lungs: np.ndarray) -> float:
    """Noise in the lungs, HU: robust SD of the difference of neighbors along a row, free of slow changes."""
    row = ct.array[::3].astype(np.float32)
    inside = lungs[::3]
    pair = inside[..., 2:] & inside[..., 1:-1] & inside[..., :-2]
    if pair.sum() < 100:
        return 0.0
    second = (row[..., 2:] - 2 * row[..., 1:-1] + row[..., :-2])[pair]
    return float(1.4826 * np.median(np.abs(second)) / np.sqrt(6.0))


def lung_contrast(ct: Volume, lungs: np.ndarray) -> float | None:
    """Median HU of soft tissue (-50..150) minus median HU of the lungs; None where one of them is not seen."""
    sub = ct.array[::3, ::3, ::3]
    inside = lungs[::3, ::3, ::3]
    soft = sub[~inside & (sub > -50) & (sub < 150)]
    if inside.sum() < 50 or soft.size < 50:
        return None
    return float(np.median(soft) - np.median(sub[inside]))


def check_truncation(lungs: np.ndarray, spacing: Spacing, least_mm2: float = 100.0) -> list[Finding]:
    """Lungs cut off at the edge of the image.

    Args:
        lungs: bool [k, j, i] on the whole canonical image.
        spacing: mm.
        least_mm2: area of lung on the edge that counts.
    """
    x, y, z = spacing
    faces = {
        "top": (lungs[-1], x * y),
        "bottom": (lungs[0], x * y),
        "front": (lungs[:, 0], x * z),
        "back": (lungs[:, -1], x * z),
        "right side": (lungs[:, :, 0], y * z),
        "left side": (lungs[:, :, -1], y * z),
    }
    findings = []
    for name, (face, pixel) in faces.items():
        area = float(face.sum()) * pixel
        if area >= least_mm2:
            severity = Severity.SERIOUS if area > 2500.0 else Severity.WARNING
            cut = f"cut off at the {name} of the image ({area / 100:.0f} cm2)"
            sentence = f"The lungs are {cut}; volumes are too small."
            findings.append(Finding(severity, "lungs", sentence))
    return findings


# -- territories -----------------------------------------------------------------------------------------------------


def check_lobe_volumes(lobes: np.ndarray, most: float = 3.0) -> list[Finding]:
    """Lobes missing or far from the usual share of their lung (more than ``most`` SD), and lungs of unusual balance."""
    counts = np.bincount(lobes.ravel(), minlength=len(Lobe) + 1).astype(float)
    findings = []
    sides = {side: sum(counts[lobe] for lobe in Lobe if lobe.side is side) for side in Side}
    for lobe in Lobe:
        if counts[lobe] == 0:
            sentence = f"{lobe.label}: not found; it is collapsed, resected, out of view or missed."
            findings.append(Finding(Severity.WARNING, lobe.name.lower(), sentence))
            continue
        mean, deviation = LOBE_SHARES[lobe]
        share = counts[lobe] / sides[lobe.side]
        if abs(share - mean) > most * deviation:
            sentence = (
                f"{lobe.label}: {100 * share:.0f} % of its lung, usual is {100 * mean:.0f} %; "
                "look for collapse, emphysema, resection or a wrong fissure."
            )
            findings.append(Finding(Severity.WARNING, lobe.name.lower(), sentence))
    return findings + _balance(sides, most)


def _balance(sides: Mapping[Side, float], most: float) -> list[Finding]:
    total = sides[Side.RIGHT] + sides[Side.LEFT]
    if total == 0:
        return [Finding(Severity.SERIOUS, "lungs", "No lung was found.")]
    share = sides[Side.RIGHT] / total
    if abs(share - RIGHT_LUNG_SHARE[0]) <= most * RIGHT_LUNG_SHARE[1]:
        return []
    small = Side.RIGHT if share < RIGHT_LUNG_SHARE[0] else Side.LEFT
    sentence = f"The {small.value} lung is unusually small (right lung {100 * share:.0f} % of both, usual is 54 %)."
    return [Finding(Severity.WARNING, "lungs", sentence)]


def check_segments(segments: np.ndarray, spacing: Spacing, smallest_ml: float = 5.0) -> list[Finding]:
    """Segments that are missing, tiny or in several pieces.

    Args:
        segments: uint8 codes 0-18.
        spacing: mm.
    """
    ml = np.bincount(segments.ravel(), minlength=len(SEGMENTS) + 1) * float(np.prod(spacing)) / 1000
    boxes = ndimage.find_objects(segments, max_label=len(SEGMENTS))
    findings = []
    for segment, box in zip(SEGMENTS, boxes, strict=True):
        if box is None:
            sentence = f"{segment.name} ({segment.short}) was not found: fused with a neighbor, or out of view."
            findings.append(Finding(Severity.WARNING, segment.key, sentence))
            continue
        if ml[segment.code] < smallest_ml:
            sentence = f"{segment.name} ({segment.short}) is very small ({ml[segment.code]:.1f} mL)."
            findings.append(Finding(Severity.WARNING, segment.key, sentence))
        pieces = int(ndimage.label(segments[box] == segment.code, FACES)[1])
        if pieces > 1:
            sentence = f"{segment.name} ({segment.short}) is in {pieces} pieces."
            findings.append(Finding(Severity.WARNING, segment.key, sentence))
    return findings


def check_agreement(
    segments: np.ndarray, coarse: np.ndarray, least: float = 0.6
) -> tuple[list[Finding], dict[int, float]]:
    """How far the final territories agree with the coarse network's own segments.

    Args:
        segments: uint8 codes 0-18.
        coarse: uint8 codes 0-18 on the same grid.
        least: Dice below which a segment is named.

    Returns:
        Findings, and the Dice of each segment that is in either map.
    """
    inside = (segments > 0) & (coarse > 0)
    count = len(SEGMENTS) + 1
    table = np.bincount(segments[inside].astype(int) * count + coarse[inside], minlength=count * count)
    table = table.reshape(count, count)
    total = table.sum(axis=0) + table.sum(axis=1)
    dice = {c: float(2 * table[c, c] / total[c]) for c in range(1, count) if total[c] > 0}
    findings = []
    for code, value in dice.items():
        if value < least:
            segment = segment_by_code(code)
            sentence = (
                f"{segment.name} ({segment.short}): the tree and the network disagree on its extent (Dice {value:.2f})."
            )
            findings.append(Finding(Severity.WARNING, segment.key, sentence))
    return findings, dice


def check_laterality(lobes: Volume, context: Volume | None) -> list[Finding]:
    """Left and right against anatomy: the lobes' sides, the heart (left), the liver (right).

    Args:
        lobes: ``Lobe`` codes, canonical.
        context: codes that include ``Context``, canonical, any grid; None where unknown.
    """
    right = _mean_x(lobes, [lobe for lobe in Lobe if lobe.side is Side.RIGHT])
    left = _mean_x(lobes, [lobe for lobe in Lobe if lobe.side is Side.LEFT])
    if right is None or left is None:
        return []
    if right > left:
        return [Finding(Severity.SERIOUS, "lungs", "The lobes called right lie on the patient's left side.")]
    if context is None:
        return []
    middle = (right + left) / 2
    against = 0
    heart = _mean_x(context, [Context.HEART])
    liver, stomach = _mean_x(context, [Context.UPPER_ABDOMEN_RIGHT]), _mean_x(context, [Context.UPPER_ABDOMEN_LEFT])
    if heart is not None:
        against += 1 if heart < middle - 5.0 else (-1 if heart > middle + 5.0 else 0)
    if liver is not None and stomach is not None:
        against += 1 if liver > stomach + 20.0 else -1
    if against <= 0:
        return []
    sentence = (
        "Heart and upper abdomen lie as in a mirror image: left and right of the file are swapped, or the patient has "
        "situs inversus. Check the orientation before using any side."
    )
    return [Finding(Severity.SERIOUS, "image", sentence)]


def _mean_x(labels: Volume, codes: Sequence[int]) -> float | None:
    sub = labels.array[::2, ::2, ::2]
    columns = np.flatnonzero(np.isin(sub, codes).ravel()) % sub.shape[2] if sub.size else np.zeros(0)
    return float(labels.origin[0] + labels.spacing[0] * 2 * columns.mean()) if len(columns) > 20 else None


# -- trees -----------------------------------------------------------------------------------------------------------


def check_trees(trees: np.ndarray, spacing: Spacing, lobes: np.ndarray | None = None) -> list[Finding]:
    """Disconnected trees, and lobes that a tree does not reach.

    Args:
        trees: uint8 ``Tree`` codes.
        spacing: mm.
        lobes: ``Lobe`` codes, same grid; optional.
    """
    findings = []
    for tree in Tree:
        name = {Tree.AIRWAY: "airway", Tree.ARTERY: "pulmonary artery", Tree.VEIN: "pulmonary vein"}[tree]
        key = name.replace(" ", "_")
        mask = trees == tree
        if not mask.any():
            findings.append(Finding(Severity.SERIOUS, key, f"No {name} was found."))
            continue
        sizes = component_sizes(ndimage.label(mask, CORNERS)[0])
        main = float(sizes.max() / sizes.sum())
        # Arteries and veins may reach the lungs as a right and a left part where the center is not in view.
        if main < (0.98 if tree is Tree.AIRWAY else 0.40):
            pieces = int((sizes > 0).sum())
            sentence = f"The {name} is in {pieces} pieces; the largest holds {100 * main:.0f} % of it."
            findings.append(Finding(Severity.WARNING, key, sentence))
        if lobes is not None:
            findings += _unreached(mask, lobes, name, key)
    return findings


def _unreached(mask: np.ndarray, lobes: np.ndarray, name: str, key: str) -> list[Finding]:
    present = np.bincount(lobes.ravel(), minlength=len(Lobe) + 1) > 0
    inside = np.bincount(lobes[mask], minlength=len(Lobe) + 1)
    return [
        Finding(Severity.WARNING, key, f"The {name} does not reach the {lobe.label.lower()}.")
        for lobe in Lobe
        if present[lobe] and inside[lobe] < 10
    ]


# -- confidence ------------------------------------------------------------------------------------------------------


def region_confidence(
    segments: Volume, prior: Probabilities, agreement: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Confidence 0..1 of each segment: the network's mean probability of it in its territory, and their agreement.

    The geometric mean of both, as either alone can be high where the other is not.

    Args:
        segments: codes 0-18, canonical.
        prior: probabilities of the segments (codes 1-18) on a canonical grid.
        agreement: Dice per segment from ``check_agreement``.
    """
    on_grid = resample(segments, prior.grid, order=0)
    result = {}
    for code in range(1, len(SEGMENTS) + 1):
        place = on_grid == code
        if not place.any():
            continue
        total = prior.values[1 : len(SEGMENTS) + 1, place].astype(np.float32).sum(axis=0)
        mean = float((prior.values[code][place] / np.maximum(total, 1e-3)).mean())
        result[code] = float(np.sqrt(mean * (agreement or {}).get(code, mean)))
    return {code: float(np.clip(value, 0.0, 1.0)) for code, value in result.items()}


def tree_confidence(graph: TreeGraph) -> float:
    """Confidence 0..1 of a tree: the mean of its nodes' confidence weighted by length; 0 for an empty tree."""
    if not len(graph) or not len(graph.confidence):
        return 0.0
    weight = graph.lengths() + 1e-6
    return float(np.clip((graph.confidence * weight).sum() / weight.sum(), 0.0, 1.0))
