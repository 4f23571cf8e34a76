"""Diseases laid over a patient's anatomy; each is defined in the patient's space, so any grid shows the same one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from LCTfoundLib.anatomy.structures import SEGMENTS, Lobe
from training.phantom.pathology_canvas import Canvas, DepthMap, Patch
from training.phantom.render_grid import LUNG_CODE, Frame
from training.phantom.thorax import Organ

if TYPE_CHECKING:
    from training.phantom.thorax import Thorax

__all__ = [
    "AtelectasisBand",
    "Calcification",
    "Canvas",
    "Consolidation",
    "CrazyPaving",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "GroundGlass",
    "LymphNode",
    "MediastinalTumor",
    "Nodule",
    "NoduleKind",
    "Pathology",
    "sample_pathologies",
]

Point = tuple[float, float, float]
#: Centers LPS mm and radii mm: (x, y, z, radius) each.
Spheres = tuple[tuple[float, float, float, float], ...]


class Pathology(Protocol):
    """One disease of a patient."""

    @property
    def name(self) -> str:
        """What its mask is called."""

    def paint(self, canvas: Canvas) -> None:
        """Change labels and HU in place and mark where it lies."""


class NoduleKind(Enum):
    """Density and outline of a nodule."""

    SOLID = "solid"
    PART_SOLID = "part-solid"
    GROUND_GLASS = "ground-glass"
    SPICULATED = "spiculated"


@dataclass(frozen=True)
class Nodule:
    """A lung nodule or tumor.

    Attributes:
        center: LPS mm.
        radius: mm.
        cavity: radius of a hole as a share of the nodule's, 0 none.
    """

    center: Point
    radius: float
    kind: NoduleKind
    seed: int
    cavity: float = 0.0
    name: str = "nodule"

    def paint(self, canvas: Canvas) -> None:
        spiculated = self.kind is NoduleKind.SPICULATED
        patch = canvas.patch(np.asarray(self.center), self.radius * (2.6 if spiculated else 1.6) + 2)
        if patch is None:
            return
        x, y, z = patch.offsets(np.asarray(self.center))
        distance = np.sqrt(x * x + y * y + z * z)
        reach = self.radius * (1 + 0.14 * np.clip(patch.noise(self.seed, 0.9 * self.radius + 1), -2, 2))
        if spiculated:
            reach = reach + self.radius * self._spicules(x, y, z, distance)
        cover = patch.soft(distance - reach) * patch.lung
        self._fill(patch, cover, distance)
        patch.mark(self.name, cover >= 0.5, dense=self.kind in (NoduleKind.SOLID, NoduleKind.SPICULATED))

    def _spicules(self, x: np.ndarray, y: np.ndarray, z: np.ndarray, distance: np.ndarray) -> np.ndarray:
        """How much farther, in radii, the nodule reaches along its rays."""
        rng = np.random.default_rng([self.seed, 41])
        rays = rng.normal(size=(int(rng.integers(10, 24)), 3))
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        longest = rng.uniform(0.4, 1.4, len(rays))
        reach = np.zeros(distance.shape, np.float32)
        for (rx, ry, rz), length in zip(rays, longest, strict=True):
            cosine = (x * rx + y * ry + z * rz) / np.maximum(distance, 1e-3)
            reach = np.maximum(reach, length * np.exp(-(1 - cosine) / 0.008))
        return reach

    def _fill(self, patch: Patch, cover: np.ndarray, distance: np.ndarray) -> None:
        rng = np.random.default_rng([self.seed, 42])
        soft = rng.uniform(0, 60) + 0.4 * patch.canvas.enhancement
        ground = rng.uniform(-720, -420) + 60 * patch.noise(self.seed + 1, 3.0)
        if self.kind is NoduleKind.GROUND_GLASS:
            patch.blend(cover, ground)
        elif self.kind is NoduleKind.PART_SOLID:
            patch.blend(cover, ground)
            patch.blend(patch.soft(distance - self.radius * rng.uniform(0.3, 0.7)) * cover, soft)
        else:
            patch.blend(cover, soft)
        if self.cavity > 0:
            patch.blend(patch.soft(distance - self.radius * self.cavity) * cover, -950.0)


@dataclass(frozen=True)
class MediastinalTumor:
    """A lobulated mass that displaces mediastinal fat and bulges into the lung; vessels and heart stay.

    Attributes:
        lobules: centers LPS mm, (x, y, z, radius mm) each.
        necrosis: 0-1, share of low density.
        calcified: 0-1, share of coarse calcification.
    """

    lobules: Spheres
    seed: int
    necrosis: float = 0.0
    calcified: float = 0.0
    fat: bool = False
    name: str = "mediastinal tumor"

    def paint(self, canvas: Canvas) -> None:
        parts = np.asarray(self.lobules)
        center = parts[:, :3].mean(axis=0)
        reach = float(np.max(np.linalg.norm(parts[:, :3] - center, axis=1) + parts[:, 3])) + 6
        patch = canvas.patch(center, reach)
        if patch is None:
            return
        level = self._level(patch)
        lung, room = patch.lung, np.isin(patch.labels, _DISPLACED)
        cover = patch.soft(level) * (lung | room)
        inside = cover >= 0.5
        self._fill(patch, cover)
        patch.mark(self.name, inside, dense=True)
        canvas.erased[patch.slices] |= inside & lung
        patch.labels[inside & lung] = Organ.MEDIASTINAL_FAT

    def _level(self, patch: Patch) -> np.ndarray:
        """Signed distance, about, to the smooth union of the lobules with a wavy surface."""
        total = np.float32(0.0)
        for x0, y0, z0, radius in self.lobules:
            x, y, z = patch.offsets(np.array([x0, y0, z0]))
            total = total + np.exp(-(np.sqrt(x * x + y * y + z * z) - radius) / 3.0)
        return -3.0 * np.log(np.maximum(total, 1e-12)) + 0.9 * patch.noise(self.seed, 7.0)

    def _fill(self, patch: Patch, cover: np.ndarray) -> None:
        rng = np.random.default_rng([self.seed, 43])
        base = rng.uniform(25, 60) + rng.uniform(0.2, 0.7) * patch.canvas.enhancement
        grain = patch.noise(self.seed + 2, 6.0)
        value = base + 8 * grain
        if self.fat:
            value = np.where(patch.noise(self.seed + 4, 9.0) > 0.3, -90.0, value)
        patch.blend(cover, value)
        if self.necrosis > 0:
            hole = np.clip((patch.noise(self.seed + 3, 10.0) + 2 * self.necrosis - 1.6) * 3, 0, 1)
            patch.blend(cover * hole, 12.0)
        if self.calcified > 0:
            speck = np.clip((patch.noise(self.seed + 5, 3.0) + self.calcified - 2.4) * 4, 0, 1)
            patch.blend(cover * speck, 500.0)


_DISPLACED = [Organ.MEDIASTINAL_FAT, Organ.FAT, Organ.LYMPH_NODE]


@dataclass(frozen=True)
class LymphNode:
    """An ellipsoidal node in mediastinal fat.

    Attributes:
        radii: mm along x, y, z.
    """

    center: Point
    radii: Point
    seed: int
    calcified: bool = False
    name: str = "lymph node"

    def paint(self, canvas: Canvas) -> None:
        patch = canvas.patch(np.asarray(self.center), max(self.radii) + 2)
        if patch is None:
            return
        x, y, z = patch.offsets(np.asarray(self.center))
        a, b, c = self.radii
        level = (np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2) - 1) * min(self.radii)
        cover = patch.soft(level) * np.isin(patch.labels, _DISPLACED)
        inside = cover >= 0.5
        value = 35 + 15 * np.sin(self.seed) + 0.5 * canvas.enhancement
        patch.blend(cover, 450.0 if self.calcified else value)
        patch.mark(self.name, inside, dense=True)
        patch.labels[inside] = Organ.LYMPH_NODE


@dataclass(frozen=True)
class Emphysema:
    """Centrilobular holes, denser towards ``focus``, and bullae under the pleura.

    Attributes:
        severity: 0-1.
        focus: LPS z of the most diseased level, mm.
        bullae: (x, y, z, radius), mm.
    """

    severity: float
    focus: float
    seed: int
    bullae: Spheres = ()
    name: str = "emphysema"

    def paint(self, canvas: Canvas) -> None:
        patch = canvas.whole()
        _, _, z = patch.offsets(np.array([0.0, 0.0, self.focus]))
        weight = np.exp(-((z / 110.0) ** 2)) * 1.6 - 2.9 + 1.7 * self.severity
        field = patch.noise(self.seed, 2.4) + 0.5 * patch.noise(self.seed + 1, 15.0)
        hole = np.clip((field + weight) * 1.5, 0, 1) * patch.lung
        patch.blend(0.85 * hole, -975.0)
        patch.mark(self.name, hole >= 0.5)
        for x0, y0, z0, radius in self.bullae:
            self._bulla(canvas, np.array([x0, y0, z0]), radius)

    def _bulla(self, canvas: Canvas, center: np.ndarray, radius: float) -> None:
        patch = canvas.patch(center, radius + 4)
        if patch is None:
            return
        x, y, z = patch.offsets(center)
        level = np.sqrt(x * x + y * y + z * z) - radius * (1 + 0.1 * patch.noise(self.seed + 2, radius))
        lung = patch.lung
        patch.blend(0.6 * np.clip(1 - np.abs(level) / (0.5 + 0.5 * patch.extent), 0, 1) * lung, -500.0)
        inside = patch.soft(level + 0.6) * lung
        patch.blend(inside, -990.0)
        patch.mark(self.name, inside >= 0.5, erased=True)


@dataclass(frozen=True)
class GroundGlass:
    """Hazy patches.

    Attributes:
        patches: (x, y, z, radius), mm.
        density: HU added.
    """

    patches: Spheres
    density: float
    seed: int
    name: str = "ground glass"

    def paint(self, canvas: Canvas) -> None:
        for x0, y0, z0, radius in self.patches:
            patch = canvas.patch(np.array([x0, y0, z0]), 1.7 * radius)
            if patch is None:
                continue
            x, y, z = patch.offsets(np.array([x0, y0, z0]))
            ragged = 0.35 * patch.noise(self.seed, 8.0) + 0.2 * patch.noise(self.seed + 1, 3.0)
            cover = np.clip((1 - np.sqrt(x * x + y * y + z * z) / radius + ragged) * 2.5, 0, 1) * patch.lung
            patch.brighten(self.density * cover)
            patch.mark(self.name, cover >= 0.5)


@dataclass(frozen=True)
class Consolidation:
    """Airless segments; their airways stay dark (air bronchogram).

    Attributes:
        segments: segment codes.
        extent: 0-1, share of the segments that is filled, from patchy to complete.
    """

    segments: tuple[int, ...]
    extent: float
    seed: int
    name: str = "consolidation"

    def paint(self, canvas: Canvas) -> None:
        inside = np.isin(canvas.labels, [LUNG_CODE + code for code in self.segments])
        patch = _bounded(canvas, inside)
        if patch is None:
            return
        inside = inside[patch.slices]
        field = 0.7 * patch.noise(self.seed, 14.0) + 0.3 * patch.noise(self.seed + 1, 4.0)
        cover = np.clip((field + 3.2 * self.extent - 1.2) * 2, 0, 1) * inside
        value = 35 + 0.5 * canvas.enhancement + 10 * patch.noise(self.seed + 2, 3.0)
        patch.blend(0.97 * cover, value)
        patch.mark(self.name, cover >= 0.6, dense=True)


def _bounded(canvas: Canvas, inside: np.ndarray) -> Patch | None:
    """The block of a canvas that holds a mask."""
    slices = []
    for axis in range(3):
        used = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(used):
            return None
        slices.append(slice(int(used[0]), int(used[-1]) + 1))
    return Patch(canvas, (slices[0], slices[1], slices[2]))


@dataclass(frozen=True)
class Effusion:
    """Fluid along the dependent chest wall; it is not lung, and the lung beside it is compressed.

    Attributes:
        right: which side.
        depth: greatest thickness, mm.
        back, bottom: LPS y of the posterior and z of the inferior end of the lung, mm.
        size: (y, z) mm of the lung.
    """

    right: bool
    depth: float
    back: float
    bottom: float
    size: tuple[float, float]
    surface: DepthMap
    name: str = "effusion"

    def paint(self, canvas: Canvas) -> None:
        patch = canvas.whole()
        _, y, z = patch.offsets(np.array([0.0, self.back, self.bottom]))
        first, last = (LUNG_CODE + 1, LUNG_CODE + 10) if self.right else (LUNG_CODE + 11, LUNG_CODE + 18)
        lung = (patch.labels >= first) & (patch.labels <= last)
        behind = np.clip(1 + y / (0.75 * self.size[0]), 0, 1)
        below = np.clip(1 - z / (0.85 * self.size[1]), 0, 1)
        thickness = self.depth * behind**0.7 * below
        level = self.surface.at(patch.frame) - thickness + 1.5
        cover = patch.soft(level) * lung
        compressed = np.clip(1 - level / 9, 0, 1) * np.clip(thickness / 12, 0, 1) * lung
        patch.blend(0.75 * compressed, 20.0)
        patch.blend(cover, 8.0)
        inside = cover >= 0.5
        patch.mark(self.name, inside, dense=True, erased=True)
        patch.labels[inside] = Organ.EFFUSION


@dataclass(frozen=True)
class Fibrosis:
    """Reticulation and honeycombing under the pleura, most at the bases.

    Attributes:
        severity: 0-1; beyond 0.5 the outer layer is honeycombed.
        bottom: LPS z of the lungs' lower end, mm.
        height: mm of the lungs.
    """

    severity: float
    bottom: float
    height: float
    seed: int
    surface: DepthMap
    name: str = "fibrosis"

    def paint(self, canvas: Canvas) -> None:
        patch = canvas.whole()
        _, _, z = patch.offsets(np.array([0.0, 0.0, self.bottom]))
        basal = np.clip(1.1 - z / self.height, 0.1, 1)
        depth = self.surface.at(patch.frame)
        ragged = 0.3 * patch.noise(self.seed + 2, 9.0)
        weight = np.clip(1.3 + ragged - depth / (15 * self.severity * basal + 2), 0, 1) * patch.lung
        net = np.clip(1 - np.abs(patch.noise(self.seed, 2.3)) / 0.4, 0, 1)
        patch.brighten(weight * (130 + 480 * self.severity * net))
        if self.severity > 0.5:
            cell = np.clip(3 * (patch.noise(self.seed + 1, 1.9) - 0.1), 0, 1)
            patch.blend(0.9 * cell * np.clip(2 * weight - 1, 0, 1), -940.0)
        patch.mark(self.name, weight >= 0.5)


@dataclass(frozen=True)
class CrazyPaving:
    """Alveolar proteinosis: sharply bounded ground glass with a net of thickened septa.

    Attributes:
        extent: 0-1, share of the lungs.
    """

    extent: float
    seed: int
    name: str = "crazy paving"

    def paint(self, canvas: Canvas) -> None:
        patch = canvas.whole()
        area = np.clip((patch.noise(self.seed, 22.0) + 2.4 * self.extent - 1.3) * 4, 0, 1) * patch.lung
        net = np.clip(1 - np.abs(patch.noise(self.seed + 1, 2.6)) / 0.3, 0, 1)
        patch.brighten(area * (230 + 190 * net))
        patch.mark(self.name, area >= 0.5)


@dataclass(frozen=True)
class AtelectasisBand:
    """A plate of collapsed lung.

    Attributes:
        normal: unit vector across the plate.
        radius, thickness: mm.
    """

    center: Point
    normal: Point
    radius: float
    thickness: float
    seed: int
    name: str = "atelectasis"

    def paint(self, canvas: Canvas) -> None:
        patch = canvas.patch(np.asarray(self.center), self.radius + 3)
        if patch is None:
            return
        x, y, z = patch.offsets(np.asarray(self.center))
        across = x * self.normal[0] + y * self.normal[1] + z * self.normal[2] + 1.2 * patch.noise(self.seed, 15.0)
        along = np.sqrt(np.maximum(x * x + y * y + z * z - across**2, 0))
        cover = patch.soft(np.abs(across) - self.thickness / 2) * np.clip((self.radius - along) / 6, 0, 1) * patch.lung
        patch.blend(0.9 * cover, 10.0)
        patch.mark(self.name, cover >= 0.5)


@dataclass(frozen=True)
class Calcification:
    """Specks of calcium in given organs: coronary arteries, aortic wall, granulomas.

    Attributes:
        specks: (x, y, z, radius), mm.
        organs: joint codes in which they may lie.
    """

    specks: Spheres
    organs: tuple[int, ...]
    density: float
    name: str = "calcification"

    def paint(self, canvas: Canvas) -> None:
        for x0, y0, z0, radius in self.specks:
            center = np.array([x0, y0, z0])
            patch = canvas.patch(center, radius + 2)
            if patch is None:
                continue
            x, y, z = patch.offsets(center)
            cover = patch.soft(np.sqrt(x * x + y * y + z * z) - radius) * np.isin(patch.labels, self.organs)
            patch.blend(cover, self.density)
            patch.mark(self.name, cover >= 0.5)


@dataclass
class _Sampler:
    """Draws diseases for one patient."""

    thorax: Thorax
    rng: np.random.Generator

    def __post_init__(self) -> None:
        grid = self.thorax.grid
        k, j, i = self.thorax.organs.shape
        x, y, z = (float(v) for v in grid.origin)
        self.frame = Frame((x, y, z), (float(grid.spacing),) * 3, (k, j, i))
        self.lung = np.argwhere(self.thorax.lobes[::4, ::4, ::4] > 0) * 4
        self._surface: DepthMap | None = None

    @property
    def surface(self) -> DepthMap:
        if self._surface is None:
            self._surface = DepthMap.of_lung(self.thorax.lobes > 0, self.frame)
        return self._surface

    def seed(self) -> int:
        return int(self.rng.integers(1, 2**31 - 10))

    def point(self, voxels: np.ndarray) -> np.ndarray:
        """LPS mm of one of the voxels, somewhere inside it."""
        k, j, i = voxels[self.rng.integers(len(voxels))] + self.rng.uniform(-0.5, 0.5, 3)
        return np.asarray(self.frame.origin) + np.array([i, j, k]) * self.frame.step

    def organ(self, *organs: Organ) -> np.ndarray:
        """Voxels (N, 3) of organs, every other one."""
        return np.argwhere(np.isin(self.thorax.organs[::2, ::2, ::2], organs)) * 2

    def _spheres(self, voxels: np.ndarray, count: int, least: float, most: float) -> Spheres:
        return tuple((*_point(self.point(voxels)), float(self.rng.uniform(least, most))) for _ in range(count))

    def span(self, axis: int, side: int = 0) -> tuple[float, float]:
        """LPS mm range of the lungs along x (0), y (1) or z (2); side -1 right, 1 left, 0 both."""
        lung = self.lung
        if side:
            middle = np.median(lung[:, 2])
            lung = lung[(lung[:, 2] - middle) * side > 0]
        values = self.frame.origin[axis] + lung[:, 2 - axis] * self.frame.step[axis]
        return float(values.min()), float(values.max())

    def nodules(self) -> list[Pathology]:
        rng, count = self.rng, 1 + int(self.rng.geometric(0.45))
        found: list[Pathology] = []
        for _ in range(min(count, 8)):
            radius = float(np.clip(np.exp(rng.normal(np.log(5), 0.6)), 1.8, 22))
            kind = list(NoduleKind)[int(rng.choice(4, p=[0.5, 0.12, 0.15, 0.23]))]
            cavity = float(rng.uniform(0.3, 0.7)) if radius > 9 and rng.random() < 0.15 else 0.0
            found.append(Nodule(_point(self.point(self.lung)), radius, kind, self.seed(), cavity))
        return found

    def tumor(self) -> list[Pathology]:
        fat = self.organ(Organ.MEDIASTINAL_FAT)
        if not len(fat):
            return []
        rng = self.rng
        start, size = self.point(fat), float(np.exp(rng.uniform(np.log(8), np.log(32))))
        lobules = []
        for _ in range(int(rng.integers(2, 8))):
            offset = rng.normal(0, 0.5 * size, 3) * [1, 0.7, 1.1]
            x, y, z = start + offset
            lobules.append((float(x), float(y), float(z), float(size * rng.uniform(0.45, 0.95))))
        necrosis = float(rng.uniform(0.2, 1)) if rng.random() < 0.4 else 0.0
        calcified = float(rng.uniform(0.2, 1)) if rng.random() < 0.2 else 0.0
        return [MediastinalTumor(tuple(lobules), self.seed(), necrosis, calcified, bool(rng.random() < 0.12))]

    def nodes(self) -> list[Pathology]:
        fat = self.organ(Organ.MEDIASTINAL_FAT)
        central = self._central(fat)
        found: list[Pathology] = []
        for _ in range(int(self.rng.integers(1, 9)) if len(fat) else 0):
            place = central if len(central) and self.rng.random() < 0.75 else fat
            short = float(self.rng.uniform(3, 9))
            a, b, c = short * self.rng.uniform([1, 1, 1], [1.6, 1.3, 1.9])
            calcified = bool(self.rng.random() < 0.1)
            found.append(LymphNode(_point(self.point(place)), (float(a), float(b), float(c)), self.seed(), calcified))
        return found

    def _central(self, voxels: np.ndarray) -> np.ndarray:
        """Voxels (N, 3) within 40 mm of the carina or a hilum, where the nodal stations are."""
        marks = [self.thorax.landmarks.get(name) for name in ("carina", "hilum_right", "hilum_left")]
        points = np.asarray(self.frame.origin) + voxels[:, ::-1] * self.frame.step
        near = [np.linalg.norm(points - mark, axis=1) < 40 for mark in marks if mark is not None]
        return voxels[np.any(near, axis=0)] if near else voxels[:0]

    def emphysema(self) -> list[Pathology]:
        low, high = self.span(2)
        focus = high - float(self.rng.uniform(0, 0.5)) * (high - low)
        bullae: Spheres = ()
        if self.rng.random() < 0.4:
            rim = self._rim(8.0)
            bullae = self._spheres(rim, int(self.rng.integers(1, 10)), 4, 16)
        return [Emphysema(float(self.rng.uniform(0.2, 1)), focus, self.seed(), bullae)]

    def _rim(self, depth: float) -> np.ndarray:
        """Voxels (N, 3) of lung within ``depth`` mm of its surface."""
        ratio = round(self.surface.frame.step[0] / self.frame.step[0])
        values = self.surface.depth
        return np.argwhere((values > 0) & (values < depth)) * ratio

    def ground_glass(self) -> list[Pathology]:
        count = int(self.rng.integers(1, 9))
        patches = self._spheres(self.lung, count, 8, 45)
        return [GroundGlass(patches, float(self.rng.uniform(100, 350)), self.seed())]

    def consolidation(self) -> list[Pathology]:
        lobe = Lobe(int(self.rng.integers(1, 6)))
        codes = [segment.code for segment in SEGMENTS if segment.lobe == lobe]
        if self.rng.random() < 0.7:
            codes = list(self.rng.choice(codes, int(self.rng.integers(1, len(codes) + 1)), replace=False))
        return [Consolidation(tuple(int(code) for code in codes), float(self.rng.uniform(0.2, 1)), self.seed())]

    def effusion(self) -> list[Pathology]:
        found: list[Pathology] = []
        for side in (-1, 1):
            if self.rng.random() < 0.65:
                (front, back), (bottom, top) = self.span(1, side), self.span(2, side)
                depth = float(self.rng.uniform(6, 34))
                size = (back - front, top - bottom)
                found.append(Effusion(side < 0, depth, back, bottom, size, self.surface))
        return found

    def fibrosis(self) -> list[Pathology]:
        low, high = self.span(2)
        return [Fibrosis(float(self.rng.uniform(0.2, 1)), low, high - low, self.seed(), self.surface)]

    def crazy_paving(self) -> list[Pathology]:
        return [CrazyPaving(float(self.rng.uniform(0.1, 0.8)), self.seed())]

    def bands(self) -> list[Pathology]:
        low, high = self.span(2)
        base = self.lung[self.lung[:, 0] * self.frame.step[2] + self.frame.origin[2] < low + 0.4 * (high - low)]
        found: list[Pathology] = []
        for _ in range(int(self.rng.integers(1, 5)) if len(base) else 0):
            normal = self.rng.normal(0, 1, 3) * [0.5, 0.5, 1]
            normal /= np.linalg.norm(normal)
            radius, thickness = float(self.rng.uniform(10, 35)), float(self.rng.uniform(1, 5))
            found.append(AtelectasisBand(_point(self.point(base)), _point(normal), radius, thickness, self.seed()))
        return found

    def calcium(self) -> list[Pathology]:
        rng = self.rng
        found: list[Pathology] = []
        heart, aorta = self.organ(Organ.MYOCARDIUM), self._aortic_wall()
        density = float(rng.uniform(250, 900))
        for voxels, organs in ((heart, (Organ.MYOCARDIUM,)), (aorta, (Organ.AORTA, Organ.MEDIASTINAL_FAT))):
            if len(voxels):
                specks = self._spheres(voxels, int(rng.integers(1, 14)), 0.6, 2.8)
                found.append(Calcification(specks, tuple(int(organ) for organ in organs), density))
        granulomas = self._spheres(self.lung, int(rng.integers(0, 4)), 1, 2.5)
        found.append(Calcification(granulomas, tuple(range(LUNG_CODE, LUNG_CODE + 19)), density))
        return found

    def _aortic_wall(self) -> np.ndarray:
        """Voxels (N, 3) of the aorta beside something else."""
        aorta = self.thorax.organs == Organ.AORTA
        inside = aorta.copy()
        for axis in (1, 2):
            for shift in (-1, 1):
                inside &= np.roll(aorta, shift, axis)
        return np.argwhere(aorta & ~inside)


def _point(values: np.ndarray) -> Point:
    x, y, z = (float(v) for v in values)
    return x, y, z


def sample_pathologies(thorax: Thorax, seed: int, share: float = 0.5) -> tuple[Pathology, ...]:
    """The diseases of a patient.

    Args:
        share: of patients with any disease; they have one to three kinds.
    """
    rng = np.random.default_rng([seed, 40])
    if rng.random() >= share:
        return ()
    sampler = _Sampler(thorax, rng)
    if not len(sampler.lung):
        return ()
    # Painted in this order: what fills the lung first, then what lies in it, last what takes its room.
    kinds: list[tuple[Callable[[], list[Pathology]], float]] = [
        (sampler.emphysema, 0.14),
        (sampler.ground_glass, 0.10),
        (sampler.crazy_paving, 0.05),
        (sampler.fibrosis, 0.10),
        (sampler.consolidation, 0.12),
        (sampler.bands, 0.12),
        (sampler.nodules, 0.35),
        (sampler.calcium, 0.25),
        (sampler.nodes, 0.22),
        (sampler.tumor, 0.15),
        (sampler.effusion, 0.13),
    ]
    weights = np.array([weight for _, weight in kinds])
    chosen = rng.choice(len(kinds), int(rng.integers(1, 4)), replace=False, p=weights / weights.sum())
    return tuple(pathology for index in sorted(chosen) for pathology in kinds[index][0]())
