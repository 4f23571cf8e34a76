"""One reconstruction from its input to what is told of it: what the ``reconstruct`` tasks of shell and worker share.

A task's own function makes the image from slices of a CT; reading, refusing what cannot end well, comparing with a
reference where there is one, and writing are the same for all. The shell's result folder appears only when it is whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LCTfoundLib.anatomy.agreement import Agreement, agreement_of, bodies, rmse_of
from LCTfoundLib.case import case_name
from LCTfoundLib.errors import LCTfoundError, OutputError, UnsuitableImage
from LCTfoundLib.export.derived_series import DicomSource
from LCTfoundLib.export.marking import Nature
from LCTfoundLib.export.output_folder import MANIFEST, check_output_folder
from LCTfoundLib.export.reconstruction import KIND, Reconstruction, write_reconstruction
from LCTfoundLib.export.reconstruction_pictures import Curves
from LCTfoundLib.physics.geometry import ImageGrid
from LCTfoundLib.physics.noise import SOFT, Dose, add_image_noise
from LCTfoundLib.physics.projection_files import Projections, read_projections
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import filtered_back_projection
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.scan_input import (
    dicom_files,
    grid_of_scan,
    hint_of_geometry,
    holds_projections,
    volume_of_scan,
    with_views,
)
from LCTfoundLib.tasks.low_dose import LowDoseRequest, LowDoseResult, reduce_noise, standard_curve
from LCTfoundLib.tasks.sparse_view import (
    SparseViewRequest,
    SparseViewResult,
    Tier,
    reconstruct_sparse_view,
    scan_of_volume,
)
from LCTfoundLib.tasks.super_resolution import (
    Direction,
    Method,
    SuperResolutionRequest,
    SuperResolutionResult,
    coarse_volume,
    super_resolve,
)
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_checks import warnings_of
from LCTfoundLib.volume_dicom import is_dicom_file
from LCTfoundLib.volume_io import read_ct

__all__ = [
    "CtSlices",
    "LowDoseOptions",
    "MiddleSlices",
    "SliceChoice",
    "SparseViewOptions",
    "SuperResolutionOptions",
    "errors_of_slices",
    "low_dose_case",
    "low_dose_of",
    "run_reconstruction",
    "sparse_view_case",
    "sparse_view_of",
    "sparse_view_of_projections",
    "super_resolution_case",
    "super_resolution_of",
    "told_agreement",
]

#: Views that a CT is scanned with when none are named.
_VIEWS = 16
#: Slices at a time.
_SLICES = 4
_FBP = "Filtered back-projection"
_NOISE_ADDED = (
    "The noise was simulated: added to the CT, alike everywhere. A real low-dose scan has streaks, and the CT's own "
    "noise is taken for truth here."
)
_MADE_COARSE = (
    "The coarse CT was simulated: means over the voxels of the CT. A scanner's coarse voxels have another blur."
)
_ALONG = {Direction.IN_PLANE: "in-plane", Direction.SLICES: "along the slices"}
_SIMULATED = (
    "The scan was simulated from the CT, through the very pixels that are reconstructed and at one energy: a real scan "
    "is harder."
)


# -- what all have in common -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceChoice:
    """A part of the slices, counted from 1 at the feet, both ends included.

    Raises:
        LCTfoundError: no slice can be in it.
    """

    first: int = 1
    last: int | None = None
    step: int = 1

    def __post_init__(self) -> None:
        if self.first < 1 or self.step < 1 or (self.last is not None and self.last < self.first):
            raise LCTfoundError(
                "No slice is chosen; give FROM:TO or FROM:TO:STEP, counted from 1 at the feet, for example 40:60."
            )

    @classmethod
    def parse(cls, text: str) -> SliceChoice:
        """From ``FROM:TO``, ``FROM:TO:STEP`` (each may be left out), or a single number; empty: all.

        Raises:
            LCTfoundError: it is none of these.
        """
        parts = text.split(":") if text else ["", ""]
        try:
            numbers = [int(part) if part.strip() else None for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) == 1 and numbers[0] is not None:
            return cls(numbers[0], numbers[0])
        if not 2 <= len(numbers) <= 3:
            raise LCTfoundError(f"'{text}' names no slices; give FROM:TO or FROM:TO:STEP, for example 40:60 or ::10.")
        first, last, step = [*numbers, None][:3]
        return cls(1 if first is None else first, last, 1 if step is None else step)

    @classmethod
    def around(cls, ct: Volume, place: Sequence[float], count: int, group: int = 1) -> SliceChoice:
        """So many slices around a place, as far as there are; the place may lie outside.

        Args:
            ct: canonical.
            place: LPS mm.
            count: how many.
            group: the number becomes a multiple of this, the next larger one if there are that many.
        """
        total = len(ct.array) - len(ct.array) % group
        count = max(1, min(-(-count // group) * group, total))
        middle = round(float(ct.index_from_world(np.asarray(place))[0]))
        first = min(max(middle - count // 2, 0), len(ct.array) - count)
        return cls(first + 1, first + count)

    def of(self, count: int) -> range:
        """Indices from 0 of so many slices.

        Raises:
            LCTfoundError: there are not that many.
        """
        if self.first > count:
            raise LCTfoundError(f"There are {count} slices; choose of these with --slices, counted from 1.")
        return range(self.first - 1, count if self.last is None else min(self.last, count), self.step)


@dataclass(frozen=True)
class MiddleSlices:
    """So many slices around the middle one, as far as there are."""

    count: int

    @property
    def step(self) -> int:
        return 1

    def of(self, count: int) -> range:
        """Indices from 0 of so many slices."""
        chosen = min(self.count, count)
        first = (count - chosen) // 2
        return range(first, first + chosen)


def run_reconstruction(
    source: Path,
    target: Path,
    make: Callable[[Path, Progress], Reconstruction],
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Reconstruct one case and write its result folder.

    Args:
        source: file or folder of the input.
        target: result folder; must not exist, or be empty, or with ``overwrite`` hold an earlier reconstruction.
        make: input -> what to write.
        progress: told about stages; raises ``Cancelled`` when the user stopped.
        overwrite: replace an earlier result.

    Returns:
        The manifest.

    Raises:
        LCTfoundError: with ``target`` as it was before.
    """
    if not source.exists():
        raise UnsuitableImage(f"There is no file or folder {source}; check the path of the input.")
    _check_target(source, target, overwrite)
    making, writing = Progress.of(progress).split({"Reconstructing": 92, "Writing": 8})
    content = make(source, making)
    return write_reconstruction(content, target, writing)


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse before the long work what would fail after it, or lose the input."""
    check_output_folder(target, overwrite)
    if source.resolve().is_relative_to(target.resolve()):
        raise OutputError(f"The input lies in {target}; name another folder for the result.")
    if (target / MANIFEST).is_file() and _kind(target / MANIFEST) != KIND:
        raise OutputError(f"{target} holds a result of another kind; name another folder for the reconstruction.")


def _kind(manifest: Path) -> str:
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@dataclass(frozen=True, eq=False)
class CtSlices:
    """What a reconstruction begins with.

    Attributes:
        ct: HU, checked, canonical, cut to the chosen slices.
        chosen: their indices in the whole CT, from 0 at the feet.
        case: name of the CT.
        source: what it was read from, for the provenance.
        identity: DICOM files that it was read from.
    """

    ct: Volume
    chosen: range
    case: str
    source: str
    identity: DicomSource = field(default_factory=DicomSource)

    @classmethod
    def of(
        cls, ct: Volume, slices: SliceChoice | MiddleSlices, case: str, source: str, identity: DicomSource
    ) -> CtSlices:
        """Some slices of a canonical CT.

        Raises:
            LCTfoundError: there are no such slices.
        """
        chosen = slices.of(len(ct.array))
        x, y, z = ct.world_from_index(np.array([chosen.start, 0, 0]))
        i, j, k = ct.spacing
        array = ct.array[chosen.start : chosen.stop : chosen.step]
        part = Volume(array, (i, j, k * chosen.step), (x, y, z), ct.direction, dict(ct.metadata))
        return cls(part, chosen, case, source, identity)

    @classmethod
    def read(cls, source: Path, slices: SliceChoice | MiddleSlices, progress: Progress) -> CtSlices:
        """Of a file or folder.

        Raises:
            UnsuitableImage, LCTfoundError, Cancelled: it cannot be read or has no such slices.
        """
        ct = read_ct(source, progress).to_canonical()
        return cls.of(ct, slices, case_name(source), str(source), dicom_source(source))

    @property
    def numbers(self) -> list[int]:
        """Of the slices in the whole CT, from 1 at the feet."""
        return [index + 1 for index in self.chosen]


def dicom_source(source: Path) -> DicomSource:
    """Patient and study of a CT that was read from DICOM; nobody's for other formats."""
    return DicomSource.of_ct(source) if source.is_dir() or is_dicom_file(source) else DicomSource()


def compared(
    reference: np.ndarray, images: Mapping[str, tuple[np.ndarray, np.ndarray | None]], pixel_mm: float
) -> dict[str, Agreement]:
    """How near images are to what they should be.

    Args:
        reference: HU, (N, H, W).
        images: by name, HU and half of the width of their interval, if they have one.
        pixel_mm: side of a pixel.

    Returns:
        By name; empty where no slice shows a body.
    """
    masks = bodies(reference, pixel_mm)
    found = {name: agreement_of(reference, hu, masks, interval) for name, (hu, interval) in images.items()}
    return {name: agreement for name, agreement in found.items() if agreement is not None}


def errors_of_slices(content: Reconstruction) -> dict[str, list[float | None]]:
    """Root of the mean squared difference to the reference inside the body, HU, by image and slice.

    Empty without a reference; None for a slice without a body.
    """
    if content.reference is None:
        return {}
    reference, pixel_mm = content.reference.array, content.image.spacing[0]
    masks = bodies(reference, pixel_mm)
    images = {content.before_name: content.before.array, "Reconstruction": content.image.array}
    return {
        name: [rmse_of(reference[k], hu[k], mask) if mask.any() else None for k, mask in enumerate(masks)]
        for name, hu in images.items()
    }


def told_agreement(manifest: Mapping[str, Any]) -> list[str]:
    """A line for each image that was compared with a reference."""
    lines = []
    for name, found in manifest["agreement"].items():
        psnr = "the same" if found["psnr"] is None else f"PSNR {found['psnr']:.1f} dB"
        ssim = "" if found["ssim"] is None else f", SSIM {found['ssim']:.3f}"
        covered = "" if found["covered"] is None else f", {100 * found['covered']:.0f} % within the 90 % interval"
        lines.append(f"{name}: {psnr}{ssim}, RMSE {found['rmse_hu']:.0f} HU inside the body{covered}")
    return lines


# -- sparse view -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseViewOptions:
    """What the user chose.

    Attributes:
        request: how to reconstruct.
        views: of the scan; None takes 16 of a CT and all of measured projections.
        dose: of a simulated scan, as a share of 100,000 photons a ray; None: without noise.
        size: pixels of a side; None chooses.
        pixel_mm, field_mm: of the images of measured projections, one of them; None takes what the detector covers.
        slices: which to reconstruct.

    Raises:
        LCTfoundError: a number is out of its range.
    """

    request: SparseViewRequest = SparseViewRequest()
    views: int | None = None
    dose: float | None = None
    size: int | None = None
    pixel_mm: float | None = None
    field_mm: float | None = None
    slices: SliceChoice | MiddleSlices = SliceChoice()

    def __post_init__(self) -> None:
        if self.views is not None and self.views < 1:
            raise LCTfoundError(f"{self.views} views are no scan; give --views 1 or more, for example 16.")
        if self.dose is not None and not 0 < self.dose <= 100:
            raise LCTfoundError(
                f"A dose of {self.dose:g} cannot be simulated; give --dose as a share of 100,000 photons a ray, for "
                "example 0.05."
            )
        if self.size is not None and not 16 <= self.size <= 2048:
            raise LCTfoundError(f"Images of {self.size} pixels are not made; give --size between 16 and 2048.")
        for name, value in (("--pixel-mm", self.pixel_mm), ("--field-mm", self.field_mm)):
            if value is not None and not 0 < value < math.inf:
                raise LCTfoundError(f"{name} {value:g} is no length; give it in mm, above 0.")
        if self.pixel_mm is not None and self.field_mm is not None:
            raise LCTfoundError("--pixel-mm and --field-mm say the same thing; give one of them.")


def sparse_view_case(options: SparseViewOptions) -> Callable[[Path, Progress], Reconstruction]:
    """The ``make`` of :func:`run_reconstruction`: from projections, or from a CT that is scanned with few views."""

    def make(source: Path, progress: Progress) -> Reconstruction:
        if holds_projections(source):
            return sparse_view_of_projections(source, options, progress)
        return _of_ct(source, options, progress)

    return make


def _of_ct(source: Path, options: SparseViewOptions, progress: Progress) -> Reconstruction:
    if options.pixel_mm is not None or options.field_mm is not None:
        raise LCTfoundError("--pixel-mm and --field-mm are for projections; a CT keeps its field of view (see --size).")
    reading, working = progress.split({"Reading the CT": 4, "Reconstructing": 96})
    try:
        part = CtSlices.read(source, options.slices, reading)
    except UnsuitableImage as error:
        raise UnsuitableImage(f"{error}{hint_of_geometry(source)}") from error
    return sparse_view_of(part, options, working)


def sparse_view_of(part: CtSlices, options: SparseViewOptions, progress: Progress) -> Reconstruction:
    """Scan a CT with few views, reconstruct, and compare with it.

    Raises:
        LCTfoundError, Cancelled: as ``reconstruct_sparse_view``.
    """
    scanning, working = progress.split({"Simulating the scan": 4, "Reconstructing": 96})
    scanning.update(0.0)
    ct = part.ct
    dose = None if options.dose is None else Dose(fraction=options.dose)
    views = options.views or _VIEWS
    scan, grid, slices = scan_of_volume(ct, views, dose, options.size, options.request.seed)
    result = reconstruct_sparse_view(scan, grid, options.request, working)
    where = _scanned_grid(ct, grid)
    before = _filtered(scan, Projector(grid, scan.beam))
    images = {_FBP: (before, None), "Reconstruction": (result.hu, result.interval_hu)}
    notes = [_SIMULATED, *warnings_of(ct), *_apart(options, part.chosen.step)]
    noise = "no noise" if dose is None else f"{100 * dose.fraction:g} % of {dose.photons:,.0f} photons"
    content = _content(part.case, part.source, options, scan, grid, result, where, before, part.numbers)
    return replace(
        content,
        nature=Nature.SIMULATED if options.request.tier is Tier.PREVIEW else Nature.SYNTHETIC_DETAIL,
        reference=where.with_array(slices),
        agreement=compared(slices, images, grid.pixel_mm),
        notes=notes,
        facts={**content.facts, "simulated noise": noise},
        provenance={**content.provenance, "simulated": {"views": views, "dose": options.dose, "noise": noise}},
        source=part.identity,
    )


def sparse_view_of_projections(source: Path, options: SparseViewOptions, progress: Progress) -> Reconstruction:
    """Reconstruct what was measured.

    Raises:
        LCTfoundError, Cancelled: as ``read_projections`` and ``reconstruct_sparse_view``.
    """
    if options.dose is not None:
        raise LCTfoundError("--dose is for scans simulated from a CT; these projections were measured.")
    # A folder of views may have to be rebinned.
    share = 40 if source.is_dir() else 8
    reading, working = progress.split({"Reading the projections": share, "Reconstructing": 100 - share})
    reading.update(0.0)
    scan = with_views(read_projections(source, reading.update, options.slices.of), options.views)
    grid = grid_of_scan(scan, options.size, options.pixel_mm, options.field_mm)
    where, notes = volume_of_scan(scan, grid)
    result = reconstruct_sparse_view(scan, grid, options.request, working)
    before = _filtered(scan, Projector(grid, scan.beam, truncated=options.request.truncated))
    numbers = [index + 1 for index in scan.chosen]
    content = _content(case_name(source), str(source), options, scan, grid, result, where, before, numbers)
    return replace(
        content,
        nature=Nature.DERIVED if options.request.tier is Tier.PREVIEW else Nature.SYNTHETIC_DETAIL,
        notes=[*notes, *_apart(options, options.slices.step)],
        source=DicomSource.of_files(dicom_files(source)[:1]),
    )


def _content(
    case: str,
    source: str,
    options: SparseViewOptions,
    scan: Projections,
    grid: ImageGrid,
    result: SparseViewResult,
    where: Volume,
    before: np.ndarray,
    numbers: Sequence[int],
) -> Reconstruction:
    tier, interval = options.request.tier, result.interval_hu
    return Reconstruction(
        case=case,
        task="sparse-view reconstruction",
        how=f"{tier.value}, {scan.beam.views} views",
        image=where.with_array(result.hu),
        before=where.with_array(before),
        before_name=_FBP,
        nature=Nature.SYNTHETIC_DETAIL,
        interval=None if interval is None else where.with_array(interval),
        residual=result.residual,
        numbers=numbers,
        warnings=result.warnings,
        facts={
            "views": str(scan.beam.views),
            "tier": tier.value,
            "grid": f"{grid.columns} x {grid.rows} x {len(result.hu)}, {grid.pixel_mm:.3g} mm",
            "network evaluations a slice": str(result.evaluations),
            "time": f"{result.provenance['seconds']:.0f} s",
        },
        provenance=result.provenance | {"source": source, "slices": [numbers[0], numbers[-1], len(numbers)]},
    )


def _filtered(scan: Projections, projector: Projector) -> np.ndarray:
    """What a scanner would make of the views, HU, float32 (N, H, W)."""
    with torch.inference_mode():
        parts = [filtered_back_projection(projector, rays / scan.water_per_mm) for rays in scan.sinogram.split(_SLICES)]
    return ((torch.cat(parts) - 1.0) * 1000.0).numpy()


def _apart(options: SparseViewOptions, step: int) -> list[str]:
    if step == 1 or options.request.tier is not Tier.BEST:
        return []
    return [f"Every {step}th slice alone: the best tier takes the slices for neighbors, which they are not."]


def _scanned_grid(ct: Volume, grid: ImageGrid) -> Volume:
    """Where the padded, averaged slices of ``scan_of_volume`` lie."""
    rows, columns = ct.shape[1:]
    side, step = max(rows, columns), max(rows, columns) // grid.rows
    corner = [(step - 1) / 2 - (side - n) // 2 for n in (rows, columns)]
    x, y, z = ct.world_from_index(np.array([0, *corner]))
    array = np.broadcast_to(np.float32(0), (len(ct.array), grid.rows, grid.columns))
    return Volume(array, (grid.pixel_mm, grid.pixel_mm, ct.spacing[2]), (x, y, z), ct.direction, dict(ct.metadata))


# -- low dose --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowDoseOptions:
    """What the user chose.

    Attributes:
        request: how to reduce the noise.
        simulate: add noise to the CT first, as of this share of the full dose, and compare with the CT as it was.
        seed: of that noise.
        slices: which to restore.

    Raises:
        LCTfoundError: a number is out of its range.
    """

    request: LowDoseRequest = LowDoseRequest()
    simulate: float | None = None
    seed: int = 0
    slices: SliceChoice = SliceChoice()

    def __post_init__(self) -> None:
        if self.simulate is not None and not 0 < self.simulate <= 1:
            raise LCTfoundError(
                f"A dose of {self.simulate:g} cannot be simulated; give --simulate above 0 and at most 1."
            )


def low_dose_case(options: LowDoseOptions) -> Callable[[Path, Progress], Reconstruction]:
    """The ``make`` of :func:`run_reconstruction`: a noisy CT, or one that is made noisy, without its noise."""

    def make(source: Path, progress: Progress) -> Reconstruction:
        reading, working = progress.split({"Reading the CT": 6, "Reducing the noise": 94})
        return low_dose_of(CtSlices.read(source, options.slices, reading), options, working)

    return make


def low_dose_of(part: CtSlices, options: LowDoseOptions, progress: Progress) -> Reconstruction:
    """Take the noise out of a CT, or out of what is made of it with ``simulate``.

    Raises:
        LCTfoundError, Cancelled: as ``reduce_noise``.
    """
    ct = part.ct
    noisy = ct if options.simulate is None else _made_noisy(ct, options.simulate, options.seed)
    result = reduce_noise(noisy, options.request, progress)
    content = Reconstruction(
        case=part.case,
        task="noise reduction of low-dose CT",
        how=f"{options.request.tier.value}, strength {options.request.strength:g}",
        image=result.ct,
        before=noisy,
        before_name="CT as it was measured" if options.simulate is None else "CT with simulated noise",
        nature=Nature.SYNTHETIC_DETAIL,
        interval=None if result.interval_hu is None else ct.with_array(result.interval_hu),
        numbers=part.numbers,
        warnings=result.warnings,
        notes=warnings_of(ct),
        curves=_noise_spectra(result),
        facts=_noise_facts(result, options),
        provenance=result.provenance | {"source": part.source, "simulated": {"dose": options.simulate}},
        source=part.identity,
    )
    return content if options.simulate is None else _with_reference(content, ct, _NOISE_ADDED)


def _made_noisy(ct: Volume, dose: float, seed: int) -> Volume:
    pixel_mm = ct.spacing[0]
    sigma = standard_curve(pixel_mm).sigma_hu(dose)
    generator = torch.Generator().manual_seed(seed)
    planes = [
        add_image_noise(torch.from_numpy(plane.astype(np.float32)), sigma, pixel_mm, SOFT, generator, pixel_mm)
        for plane in ct.array
    ]
    return ct.with_array(torch.stack(planes).round().clamp(-32768, 32767).to(torch.int16).numpy())


def _with_reference(content: Reconstruction, reference: Volume, note: str) -> Reconstruction:
    """The same, compared with what the simulation began with."""
    images = {
        content.before_name: (content.before.array, None),
        "Reconstruction": (content.image.array, None if content.interval is None else content.interval.array),
    }
    return replace(
        content,
        reference=reference,
        reference_name="CT as it was",
        agreement=compared(reference.array, images, reference.spacing[0]),
        notes=[note, *content.notes],
    )


def _noise_spectra(result: LowDoseResult) -> list[Curves]:
    """Noise-power spectra: a smooth image has lost what its noise has lost."""
    noise = result.noise
    if noise is None:
        return []
    spectra = {"before": noise.before, "after": noise.after, "removed": noise.removed}
    caption = f"Noise power by frequency, HU^2 mm^2, in {noise.regions} flat regions of {noise.tissue.value}"
    return [Curves("noise spectrum", caption, noise.frequency, spectra, "1/mm")]


def _noise_facts(result: LowDoseResult, options: LowDoseOptions) -> dict[str, str]:
    facts = {"tier": options.request.tier.value, "strength": f"{options.request.strength:g}"}
    facts["left as it was"] = f"what is coarser than {options.request.kept_mm:g} mm" if options.request.kept_mm else "-"
    facts["noise told to the net"] = f"{result.sigma_hu:.0f} HU"
    if result.noise is not None:
        facts["noise before, after"] = f"{result.noise.sigma_before_hu:.0f}, {result.noise.sigma_after_hu:.0f} HU"
        facts["its mean frequency"] = f"{result.noise.mean_before:.2f}, {result.noise.mean_after:.2f} per mm"
    if result.dose is not None:
        facts["looks like a dose of"] = f"{100 * result.dose.fraction:.2g} %"
    return facts | {"time": f"{result.provenance['seconds']:.0f} s"}


# -- super-resolution ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuperResolutionOptions:
    """What the user chose.

    Attributes:
        request: how to make the CT finer.
        simulate: make it coarse first, and compare with the CT as it was.
        slices: which to make finer.
    """

    request: SuperResolutionRequest = SuperResolutionRequest()
    simulate: bool = False
    slices: SliceChoice = SliceChoice()


def super_resolution_case(options: SuperResolutionOptions) -> Callable[[Path, Progress], Reconstruction]:
    """The ``make`` of :func:`run_reconstruction`: a CT, or one that is made coarse, with finer voxels."""

    def make(source: Path, progress: Progress) -> Reconstruction:
        _check_neighbors(options)
        reading, working = progress.split({"Reading the CT": 6, "Making it finer": 94})
        return super_resolution_of(CtSlices.read(source, options.slices, reading), options, working)

    return make


def super_resolution_of(part: CtSlices, options: SuperResolutionOptions, progress: Progress) -> Reconstruction:
    """Make a CT finer, or with ``simulate`` a coarse one made of it.

    Raises:
        LCTfoundError, Cancelled: as ``super_resolve``, or slices are left out that would have to be neighbors.
    """
    _check_neighbors(options)
    request, ct = options.request, part.ct
    factor, direction = request.factor, request.direction
    coarse = coarse_volume(ct, direction, factor, request.thickness_mm) if options.simulate else ct
    result = super_resolve(coarse, request, progress)
    content = Reconstruction(
        case=part.case,
        task="super-resolution",
        how=f"{request.method.value}, {factor} times finer {_ALONG[direction]}",
        image=result.ct,
        before=result.ct.with_array(_repeated(coarse.array, direction, factor)),
        before_name="Coarse CT" if options.simulate else "CT as it was measured",
        nature=_nature(options),
        interval=result.interval_hu,
        numbers=part.numbers if direction is Direction.IN_PLANE else (),
        warnings=result.warnings,
        notes=warnings_of(ct),
        facts=_finer_facts(coarse, result, options),
        provenance=result.provenance | {"source": part.source, "simulated": options.simulate},
        source=part.identity,
    )
    return _with_reference(content, ct, _MADE_COARSE) if options.simulate else content


def _check_neighbors(options: SuperResolutionOptions) -> None:
    if options.request.direction is Direction.SLICES and options.slices.step != 1:
        raise LCTfoundError("Slices that are left out cannot be made up; give --slices FROM:TO without a step.")


def _nature(options: SuperResolutionOptions) -> Nature:
    if options.request.method is Method.NULL_SPACE:
        return Nature.SYNTHETIC_DETAIL
    return Nature.SIMULATED if options.simulate else Nature.DERIVED


def _repeated(array: np.ndarray, direction: Direction, factor: int) -> np.ndarray:
    """Each coarse voxel as it was measured, all over its finer ones."""
    if direction is Direction.SLICES:
        return np.repeat(array, factor, axis=0)
    return np.repeat(np.repeat(array, factor, axis=1), factor, axis=2)


def _finer_facts(coarse: Volume, result: SuperResolutionResult, options: SuperResolutionOptions) -> dict[str, str]:
    voxels = [" x ".join(f"{step:.3g}" for step in volume.spacing) for volume in (coarse, result.ct)]
    return {
        "method": options.request.method.value,
        "voxels": f"{voxels[0]} to {voxels[1]} mm",
        "largest difference to what was measured": f"{result.residual_hu:.2g} HU",
        "network evaluations a slice": str(result.evaluations),
        "time": f"{result.provenance['seconds']:.0f} s",
    }
