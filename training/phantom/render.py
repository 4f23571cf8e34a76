"""From anatomy to CT: one patient, any scan, any box, with exact labels on the same grid.

patient = make_patient(seed=7)
rendered = render(patient, Scan.sample(rng), seed=70)
rendered.ct, rendered.segments, rendered.trees      # Volumes; a layer is computed when first asked for
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from numba import njit
from scipy import ndimage

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import Tree, lobes_from_segments
from LCTfoundLib.volume import Volume
from training.phantom import acquisition
from training.phantom.acquisition import Contrast, Phase, Regime, Scan
from training.phantom.growth import LungTrees, grow_trees
from training.phantom.pathology import Canvas, Pathology, sample_pathologies
from training.phantom.rasterize import Cover, TreeLabels, coverage, label_trees, visible_pieces
from training.phantom.render_grid import LUNG_CODE, Frame, lung_field, sample_labels, uniform_blocks
from training.phantom.render_tissue import Tissue, add_fissures, add_texture
from training.phantom.thorax import Organ, Thorax, make_thorax, thorax_from_lobes

__all__ = ["VERSION", "Contrast", "Patient", "Phase", "Regime", "Rendered", "Scan", "make_patient", "phantom", "render"]

#: Of the renderer; part of every provenance.
VERSION = "1"

Box = tuple[np.ndarray, np.ndarray]

#: Smallest diameter a scan shows, in its resolution cells: a vessel is bright in dark lung; the blurred wall of a small
#: airway outweighs its lumen and makes it look like a vessel.
_VISIBLE = {Tree.AIRWAY: 1.4, Tree.ARTERY: 0.7, Tree.VEIN: 0.7}

_COARSE = 8.0

_PLAIN = Contrast()


@dataclass
class Patient:
    """One synthetic patient: anatomy, trees, diseases and tissue at one breath.

    Attributes:
        thorax, trees: see there.
        pathologies: diseases, painted in this order.
        seed: of tissue and texture.
    """

    thorax: Thorax
    trees: LungTrees
    pathologies: tuple[Pathology, ...] = ()
    seed: int = 0

    @cached_property
    def tissue(self) -> Tissue:
        return Tissue.sample(self.seed)

    @cached_property
    def frame(self) -> Frame:
        """The anatomy's own grid."""
        grid = self.thorax.grid
        x, y, z = (float(v) for v in grid.origin)
        k, j, i = self.thorax.organs.shape
        return Frame((x, y, z), (float(grid.spacing),) * 3, (k, j, i))

    @cached_property
    def codes(self) -> np.ndarray:
        """uint8 [k, j, i] joint codes: organs, lung voxels as ``LUNG_CODE`` + segment."""
        organs, segments = self.thorax.organs, self.trees.segments
        return np.where(organs == Organ.LUNG, LUNG_CODE + segments, organs).astype(np.uint8)

    @cached_property
    def uniform(self) -> np.ndarray:
        return uniform_blocks(self.codes)

    @cached_property
    def lung_field(self) -> np.ndarray:
        return lung_field(self.codes)

    @cached_property
    def fissures(self) -> tuple[np.ndarray, np.ndarray]:
        """Distance in 1/20 mm, and lobe code plus 128 where the fissure is complete; uint8 [k, j, i]."""
        distance = np.clip(self.thorax.fissure_distance.astype(np.float32), 0, 12) * 20
        complete = (self.thorax.fissure_complete > 0).astype(np.uint8)
        return np.round(distance).astype(np.uint8), self.thorax.lobes | (complete << 7)

    @cached_property
    def middle(self) -> float:
        """LPS y of the lungs' center, mm."""
        rows = np.count_nonzero(self.thorax.lobes, axis=(0, 2))
        center = float(np.average(np.arange(len(rows)), weights=rows)) if rows.any() else len(rows) / 2
        return self.frame.origin[1] + center * self.frame.step[1]

    @cached_property
    def coarse_codes(self) -> tuple[np.ndarray, float]:
        """Every n-th voxel of ``codes`` in each direction, and the spacing, about 8 mm."""
        stride = max(1, round(_COARSE / self.frame.step[0]))
        start = stride // 2
        return self.codes[start::stride, start::stride, start::stride], stride * self.frame.step[0]

    @cached_property
    def noise_level(self) -> np.ndarray:
        """Local noise on the coarse grid, 1 in the middle of 300 mm of water."""
        return acquisition.path_noise(self._attenuation, self.coarse_codes[1])

    @cached_property
    def lateral_excess(self) -> np.ndarray:
        """Of left-right over other rays on the coarse grid's rows, [k, j, 2]."""
        return acquisition.lateral_excess(self._attenuation, self.coarse_codes[1]).repeat(2, axis=2)

    @property
    def _attenuation(self) -> np.ndarray:
        """Per mm on the coarse grid."""
        density = 1 + self.tissue.means / 1000
        density[Organ.AIR] = 0
        return (0.0192 * density.astype(np.float32))[self.coarse_codes[0]]

    @cached_property
    def dense_vein(self) -> np.ndarray:
        """(M, 4) x, y, z, radius in mm of the vena cava above the heart, slice by slice of the coarse grid."""
        codes, step = self.coarse_codes
        start = self._coarse_start
        vein = np.isin(codes, [Organ.VENA_CAVA, Organ.BRACHIOCEPHALIC_VEIN])
        heart = np.flatnonzero((codes == Organ.RIGHT_ATRIUM).any(axis=(1, 2)))
        found = []
        for k in range(int(heart[len(heart) // 2]) if len(heart) else 0, len(codes)):
            rows, columns = np.nonzero(vein[k])
            if len(rows):
                place = np.array([columns.mean(), rows.mean(), k]) * step + start + self.frame.origin
                found.append((*place, 0.5 * step * np.sqrt(len(rows))))
        return np.array(found).reshape(-1, 4)

    @cached_property
    def field(self) -> tuple[float, float, float]:
        """Center x, y and radius (LPS mm) of the circle around the lungs."""
        columns = np.flatnonzero(self.thorax.lobes.any(axis=(0, 1)))
        rows = np.flatnonzero(self.thorax.lobes.any(axis=(0, 2)))
        if not len(columns):
            return self.frame.origin[0], self.frame.origin[1], float("inf")
        (x0, x1), (y0, y1) = (self.frame.axis(a)[[used[0], used[-1]]] for a, used in ((0, columns), (1, rows)))
        return float(x0 + x1) / 2, float(y0 + y1) / 2, float(np.hypot(x1 - x0, 0.6 * (y1 - y0))) / 2

    @property
    def _coarse_start(self) -> float:
        return (max(1, round(_COARSE / self.frame.step[0])) // 2) * self.frame.step[0]

    @cached_property
    def restless(self) -> np.ndarray:
        """0-1 on the coarse grid: what moves with the heart and the diaphragm."""
        codes, step = self.coarse_codes
        heart = np.isin(codes, _HEART).astype(np.float32)
        abdomen = np.isin(codes, _ABDOMEN).astype(np.float32)
        near = [ndimage.gaussian_filter(mask, 14 / step) for mask in (heart, abdomen)]
        return np.clip(2.5 * near[0] + 2.5 * near[1] * (1 - near[1]) * 2, 0, 1).astype(np.float32)

    @property
    def graphs(self) -> dict[Tree, TreeGraph]:
        return {Tree.AIRWAY: self.trees.airway, Tree.ARTERY: self.trees.artery, Tree.VEIN: self.trees.vein}

    def coarse_in(self, coarse: np.ndarray, frame: Frame) -> np.ndarray:
        """A map of the coarse grid resampled over a frame's extent, about 10 mm apart."""
        step = self.coarse_codes[1]
        start = self._coarse_start
        axes = []
        for axis in range(3):
            size = frame.shape[2 - axis] * frame.step[axis]
            count = max(2, round(size / 10))
            low = frame.origin[axis] - frame.step[axis] / 2
            positions = low + size * (np.arange(count) + 0.5) / count
            axes.append((positions - self.frame.origin[axis] - start) / step)
        x, y, z = axes
        points = np.meshgrid(z, y, x, indexing="ij")
        return ndimage.map_coordinates(coarse, points, order=1, mode="nearest").astype(np.float32)


_HEART = [Organ.MYOCARDIUM, Organ.LEFT_VENTRICLE, Organ.RIGHT_VENTRICLE, Organ.LEFT_ATRIUM, Organ.RIGHT_ATRIUM]
_ABDOMEN = [Organ.LIVER, Organ.SPLEEN, Organ.STOMACH]


@dataclass
class Rendered:
    """One scan of a patient; each layer is computed when first asked for, all on the same grid.

    Attributes:
        patient, scan, seed: what was rendered; the seed draws the noise.
        frame: the grid.
    """

    patient: Patient
    scan: Scan
    seed: int
    frame: Frame
    margin: tuple[int, int, int] = (0, 0, 0)
    _tissue: Tissue | None = field(default=None, repr=False)

    @cached_property
    def ct(self) -> Volume:
        """int16 HU."""
        return self._volume(_acquire(self))

    @cached_property
    def segments(self) -> Volume:
        """uint8 segment codes 1-18; they tile the lungs."""
        codes = self._labels.labels
        return self._volume(np.where(codes >= LUNG_CODE, codes - LUNG_CODE, 0).astype(np.uint8))

    @cached_property
    def lobes(self) -> Volume:
        """uint8 ``Lobe`` codes."""
        return self._volume(lobes_from_segments(self.segments.array))

    @cached_property
    def organs(self) -> Volume:
        """uint8 ``Organ`` codes."""
        codes = self._labels.labels
        return self._volume(np.where(codes >= LUNG_CODE, np.uint8(Organ.LUNG), codes))

    @property
    def trees(self) -> Volume:
        """uint8 ``Tree`` codes of every branch."""
        return self._volume(self._tree_labels.trees)

    @property
    def visible(self) -> Volume:
        """``trees`` restricted to what the scan can show; the rest is to be ignored."""
        return self._volume(self._tree_labels.visible)

    @property
    def skeleton(self) -> Volume:
        """uint8 ``Tree`` codes on the visible branches' centerlines, dilated by a voxel inside the branch."""
        return self._volume(self._tree_labels.skeleton)

    @cached_property
    def masks(self) -> dict[str, Volume]:
        """uint8 mask of each disease, by name; diseases of one name share a mask."""
        return {name: self._volume(mask.astype(np.uint8)) for name, mask in self._labels.masks.items()}

    @property
    def graphs(self) -> dict[Tree, TreeGraph]:
        """The labeled graphs of airway, artery and vein; whole, also for a box."""
        return self.patient.graphs

    @property
    def provenance(self) -> dict[str, object]:
        """Seeds and parameters that make this scan again."""
        return {
            "renderer": VERSION,
            "patient": self.patient.seed,
            "seed": self.seed,
            "scan": {**asdict(self.scan), "regime": self.scan.regime.value},
            "pathologies": [pathology.name for pathology in self.patient.pathologies],
        }

    @property
    def _look(self) -> Tissue:
        if self._tissue is None:
            tissue = self.patient.tissue
            if self.scan.regime is Regime.RANDOM:
                tissue = tissue.randomized(np.random.default_rng([self.seed, 21]))
            self._tissue = tissue
        return self._tissue

    @cached_property
    def _labels(self) -> Canvas:
        return _anatomy(self.patient, self.frame)

    @cached_property
    def _shown(self) -> dict[Tree, np.ndarray]:
        cell = resolution(self.scan)
        return {tree: visible_pieces(graph, _VISIBLE[tree] * cell) for tree, graph in self.patient.graphs.items()}

    @cached_property
    def _covers(self) -> dict[Tree, Cover]:
        return _covers(self.patient, self.frame, self._shown)

    @cached_property
    def _tree_labels(self) -> TreeLabels:
        layers = label_trees(self.patient.graphs, self._covers, self._shown, self.frame)
        _clear_hidden(layers, self._labels, self.scan)
        return layers

    def _volume(self, array: np.ndarray) -> Volume:
        return self.frame.volume(array)


def resolution(scan: Scan) -> float:
    """Geometric mean of the smallest size a scan tells apart along the three axes, mm."""
    plane = [max(step, 1.3 * scan.blur) for step in scan.spacing[:2]]
    return float(np.cbrt(plane[0] * plane[1] * max(scan.spacing[2], scan.interval, scan.thickness)))


def make_patient(seed: int, spacing: float = 1.5, shifted: bool = False, lobe_map: Volume | None = None) -> Patient:
    """A patient of a seed.

    Args:
        spacing: mm of the anatomy's grid; a scan may be finer.
        shifted: the other generator, for tests of generalization (see ``make_thorax`` and ``grow_trees``).
        lobe_map: a real lobe map (``Lobe`` codes, canonical) whose lungs the patient gets.
    """
    if lobe_map is None:
        thorax = make_thorax(seed, spacing, shifted)
    else:
        thorax = thorax_from_lobes(lobe_map.array, lobe_map.spacing, lobe_map.origin, seed, spacing)
    trees = grow_trees(thorax, seed, shifted)
    return Patient(thorax, trees, sample_pathologies(thorax, seed), seed)


def phantom(
    seed: int,
    spacing: float | tuple[float, float, float] = 1.5,
    contrast: Phase | Contrast = Phase.MIXED,
    dose: float = 1.0,
    shifted: bool = False,
    lobe_map: Volume | None = None,
    scan: Scan | None = None,
) -> Rendered:
    """The one call: a patient, scanned. Layers are computed when asked for: CT, labels, trees, graphs, masks.

    The same seed with another contrast, dose or spacing is the same patient with the same breath.

    Args:
        spacing: mm of the CT, one number or (i, j, k).
        contrast: a phase, drawn with the seed, or exact enhancements.
        dose: relative to a standard chest CT; noise goes with its inverse root.
        shifted, lobe_map: see ``make_patient``.
        scan: all other settings; its spacing and contrast give way to the arguments.
    """
    steps = (spacing,) * 3 if isinstance(spacing, (int, float)) else spacing
    patient = make_patient(seed, shifted=shifted, lobe_map=lobe_map)
    if isinstance(contrast, Phase):
        contrast = Contrast.of_phase(contrast, np.random.default_rng([seed, 31]))
    base = scan or Scan(thickness=steps[2])
    return render(patient, replace(base, spacing=steps, contrast=contrast).at_dose(dose), seed)


def render(patient: Patient, scan: Scan, seed: int, box: Box | None = None) -> Rendered:
    """Scan a patient.

    Args:
        seed: of noise, motion and (random regime) intensities.
        box: (low, high) corners, LPS mm, of the part to render; the whole anatomy (within ``scan.coverage``) if None.
    """
    step = (float(scan.spacing[0]), float(scan.spacing[1]), float(scan.spacing[2]))
    if box is not None:
        return Rendered(patient, scan, seed, Frame.of_box(box[0], box[1], step), _margin(scan))
    whole = patient.frame
    low = np.asarray(whole.origin) - np.asarray(whole.step) / 2
    high = low + np.asarray(whole.shape[::-1]) * np.asarray(whole.step)
    low[2], high[2] = low[2] + np.asarray(scan.coverage) * (high[2] - low[2])
    return Rendered(patient, scan, seed, Frame.of_box(low, high, step))


def _margin(scan: Scan) -> tuple[int, int, int]:
    """Voxels a box needs around it so that its filters see what lies beyond."""
    reach = 3 * scan.blur + (2.0 if scan.edge else 0.0)
    x, y = (min(8, int(np.ceil(reach / step))) for step in scan.spacing[:2])
    return x, y, 0


def _anatomy(patient: Patient, frame: Frame, tissue: Tissue | None = None, contrast: Contrast = _PLAIN) -> Canvas:
    """Labels (and with a tissue, HU) of organs, lungs and diseases on a grid, before trees are drawn."""
    means = tissue.enhanced(contrast) if tissue else np.zeros(64, np.float32)
    anatomy = patient.codes, patient.uniform, patient.lung_field, patient.frame
    labels, hu = sample_labels(*anatomy, frame, means, tissue is not None)
    if tissue:
        add_texture(hu, labels, frame, tissue, patient.middle)
        add_fissures(hu, labels, frame, *patient.fissures, patient.frame, tissue.fissure)
    canvas = Canvas(frame, labels, hu if tissue else None, contrast.organs)
    for pathology in patient.pathologies:
        pathology.paint(canvas)
    if tissue and canvas.dense.any():
        _close_rim(canvas, means)
    return canvas


def _close_rim(canvas: Canvas, means: np.ndarray) -> None:
    """Where soft tissue fills the lung to its surface, the surface's partial volume holds no air any more."""
    assert canvas.hu is not None
    rim = ndimage.binary_dilation(canvas.dense) & (canvas.labels < LUNG_CODE) & ~canvas.dense
    canvas.hu[rim] = np.maximum(canvas.hu[rim], np.maximum(means[canvas.labels[rim]], -120))


def _covers(patient: Patient, frame: Frame, shown: dict[Tree, np.ndarray]) -> dict[Tree, Cover]:
    walls = {Tree.AIRWAY: patient.trees.airway_wall}
    return {tree: coverage(graph, frame, shown[tree], walls.get(tree)) for tree, graph in patient.graphs.items()}


def _clear_hidden(layers: TreeLabels, canvas: Canvas, scan: Scan) -> None:
    """Take away what a disease destroyed, and hide what it makes indistinguishable."""
    if canvas.erased.any():
        for layer in (layers.trees, layers.visible, layers.skeleton):
            layer[canvas.erased] = 0
    if canvas.dense.any():
        dye = {Tree.ARTERY: scan.contrast.pulmonary_artery, Tree.VEIN: scan.contrast.pulmonary_vein}
        for tree, enhancement in dye.items():
            if enhancement < 60:
                hidden = canvas.dense & (layers.trees == tree)
                layers.visible[hidden] = 0
                layers.skeleton[hidden] = 0


def _acquire(rendered: Rendered) -> np.ndarray:
    """int16 HU on the output grid."""
    scan, frame, patient = rendered.scan, rendered.frame, rendered.patient
    rng = np.random.default_rng([rendered.seed, 22])
    slices = _acquired_slices(scan, frame.grown(rendered.margin), rng)
    fine = _thin_slices(scan, slices)
    hu = _draw(rendered, fine)
    hu = acquisition.slice_profile(hu, fine, slices, max(scan.thickness, slices.step[2] if scan.interval <= 0 else 0))
    hu = acquisition.blur_in_plane(hu, slices, scan)
    if scan.motion > 0:
        hu = acquisition.blur_motion(hu, patient.coarse_in(patient.restless, slices), slices, scan.motion)
    acquisition.add_noise(hu, slices, scan, patient.coarse_in(patient.noise_level, slices), rng)
    acquisition.add_shoulder_streaks(hu, slices, scan, patient.coarse_in(patient.lateral_excess, slices), rng)
    dense = scan.streaks * max(0.0, scan.contrast.vena_cava - 150) * 0.3
    acquisition.add_contrast_streaks(hu, slices, patient.dense_vein, dense, rng)
    hu = _at_output(hu, slices, frame, rendered.margin)
    _cut_field(hu, rendered)
    return np.clip(np.round(hu), -1024, 3071).astype(np.int16)


def _cut_field(hu: np.ndarray, rendered: Rendered) -> None:
    """Padding outside the circular field of view, in place."""
    if not np.isfinite(rendered.scan.field_margin):
        return
    x, y, radius = rendered.patient.field
    dx, dy = rendered.frame.axis(0) - x, rendered.frame.axis(1) - y
    hu[:, np.hypot(dx[None], dy[:, None]) > radius + rendered.scan.field_margin] = -1024


def _acquired_slices(scan: Scan, frame: Frame, rng: np.random.Generator) -> Frame:
    """The grid of the slices the scanner made: the output's, or wider apart with a random phase."""
    if scan.interval <= 1.01 * frame.step[2]:
        return frame
    count = int(np.ceil((frame.shape[0] - 1) * frame.step[2] / scan.interval)) + 2
    start = frame.origin[2] - float(rng.random()) * scan.interval
    origin = (frame.origin[0], frame.origin[1], start)
    return Frame(origin, (frame.step[0], frame.step[1], scan.interval), (count, frame.shape[1], frame.shape[2]))


def _thin_slices(scan: Scan, slices: Frame) -> Frame:
    """Thinner slices that the acquired ones average."""
    parts = max(1, int(np.ceil(slices.step[2] / max(1.7, slices.step[0]) - 0.05)))
    beyond = int(np.ceil(max(0.0, scan.thickness - slices.step[2]) / 2 / slices.step[2]))
    return slices.grown((0, 0, beyond)).split_slices(parts)


def _draw(rendered: Rendered, frame: Frame) -> np.ndarray:
    """float32 HU of organs, diseases and trees on a grid, without any acquisition."""
    patient, tissue, contrast = rendered.patient, rendered._look, rendered.scan.contrast
    canvas = _anatomy(patient, frame, tissue, contrast)
    if frame == rendered.frame:
        rendered._labels = canvas  # the same grid: the labels need no second sampling
    covers = rendered._covers if frame == rendered.frame else _covers(patient, frame, rendered._shown)
    if canvas.erased.any():
        for cover in covers.values():
            cover.lumen[canvas.erased] = 0
            cover.outer[canvas.erased] = 0
    dye = tissue.blood + contrast.pulmonary_artery, tissue.blood + contrast.pulmonary_vein
    values = np.array([tissue.means[Organ.AIR] + 8, tissue.wall, *dye], np.float32)
    airway, artery, vein = (covers[tree] for tree in (Tree.AIRWAY, Tree.ARTERY, Tree.VEIN))
    hu, canvas.hu = canvas.hu, None
    assert hu is not None
    _compose(hu, airway.lumen, airway.outer, artery.lumen, vein.lumen, values)
    return hu


@njit(cache=True, fastmath=True)
def _compose(hu, lumen, outer, artery, vein, values):  # type: ignore[no-untyped-def]
    """Lay vein, artery, airway wall and airway lumen over the tissue by their coverage."""
    scale = np.float32(1 / 255)
    for k in range(hu.shape[0]):
        for j in range(hu.shape[1]):
            for i in range(hu.shape[2]):
                value = hu[k, j, i]
                if vein[k, j, i]:
                    value += vein[k, j, i] * scale * (values[3] - value)
                if artery[k, j, i]:
                    value += artery[k, j, i] * scale * (values[2] - value)
                if outer[k, j, i]:
                    whole = np.float32(outer[k, j, i])
                    air = min(np.float32(lumen[k, j, i]), whole)
                    value = value * (1 - whole * scale) + (whole - air) * scale * values[1] + air * scale * values[0]
                hu[k, j, i] = value


def _at_output(hu: np.ndarray, slices: Frame, frame: Frame, margin: tuple[int, int, int]) -> np.ndarray:
    """Interpolate between the acquired slices and cut the margin off."""
    x, y, _ = margin
    hu = hu[:, y : hu.shape[1] - y, x : hu.shape[2] - x]
    if hu.shape == frame.shape and slices.step[2] == frame.step[2]:
        return hu
    place = np.clip((frame.axis(2) - slices.origin[2]) / slices.step[2], 0, len(hu) - 1.0)
    low = np.minimum(place.astype(int), len(hu) - 2)
    share = (place - low).astype(np.float32)[:, None, None]
    return hu[low] * (1 - share) + hu[low + 1] * share
