"""The worker's reconstructions: sparse view, low dose and super-resolution of a panel's CT, and their DICOM series.

Each takes ``input`` (array, spacing, origin, direction, metadata), ``options``, ``slices`` (``center``, LPS mm, and
``count``; all where it is missing), ``source_dicom`` (files that the CT was read from) and ``output``. A sparse view
may have ``projections``, a file or folder of what a scanner measured, in the place of the input, and then of ``slices``
the ``count`` around the middle. The output has

=================== ===================================================================================================
``image.npy``          HU, int16 [k, j, i], as are the others
``before.npy``         what there was without the method
``reference.npy``      what it should be, where the input was simulated from it
``interval.npy``       half of the width of the 90 % interval, where the method tells one
``result.json``        what it is, warnings, numbers, provenance, and the grid of all of these
=================== ===================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.export.derived_series import DicomSource, Marks, write_derived_series
from LCTfoundLib.export.manifest import jsonable
from LCTfoundLib.export.marking import PRODUCT, USE, Nature
from LCTfoundLib.export.output_folder import MANIFEST, file_entries, output_folder
from LCTfoundLib.export.reconstruction import Reconstruction
from LCTfoundLib.reconstruction_case import (
    CtSlices,
    LowDoseOptions,
    MiddleSlices,
    SliceChoice,
    SparseViewOptions,
    SuperResolutionOptions,
    errors_of_slices,
    low_dose_of,
    sparse_view_of,
    sparse_view_of_projections,
    super_resolution_of,
)
from LCTfoundLib.runtime.files import atomic_folder
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.scan_input import dicom_files
from LCTfoundLib.tasks.low_dose import KEPT_MM, LowDoseRequest, LowDoseTier
from LCTfoundLib.tasks.sparse_view import SparseViewRequest, Tier
from LCTfoundLib.tasks.super_resolution import FACTORS, Direction, Method, SuperResolutionRequest
from LCTfoundLib.volume import Volume
from LCTfoundLib.worker_requests import BadRequest, Fields, array_of, ct_of, volume_of

__all__ = ["RECONSTRUCTIONS"]

#: What the manifest of an exported series says the folder is.
_SERIES = "derived series"
_Choice = TypeVar("_Choice", bound=StrEnum)


# -- the tasks -------------------------------------------------------------------------------------------------------


def _sparse_view(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``options``: views, tier, samples, dose (share of 100,000 photons a ray), seed, device, weights_folder.

    ``views`` are 16 of a CT, and all of projections, unless they are given.
    """
    asked = fields.group("options")
    options = SparseViewOptions(
        SparseViewRequest(
            _choice(asked, "tier", Tier, Tier.FAST),
            asked.number("samples", SparseViewRequest.samples),
            seed=asked.number("seed", 0),
            device=asked.text("device", "auto"),
            weights_folder=_weights(asked),
        ),
        asked.number("views") if asked.has("views") else None,
        asked.decimal("dose"),
    )
    if not fields.has("projections"):
        return _reconstruct(fields, progress, lambda ct: 1, lambda part, told: sparse_view_of(part, options, told))
    source, output = fields.path("projections"), fields.output()
    if fields.has("slices"):
        options = replace(options, slices=MiddleSlices(_count(fields.group("slices"))))
    working, writing = progress.split({"Reconstructing": 97, "Writing the result": 3})
    content = sparse_view_of_projections(source, options, working)
    return _finished(content, output, writing, {"source_files": [str(file) for file in dicom_files(source)[:1]]})


def _low_dose(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``options``: strength (0-1), kept_mm, tier, simulate (share of the full dose), seed, device, weights_folder."""
    asked = fields.group("options")
    strength, kept = asked.decimal("strength"), asked.decimal("kept_mm")
    options = LowDoseOptions(
        LowDoseRequest(
            _choice(asked, "tier", LowDoseTier, LowDoseTier.FAST),
            1.0 if strength is None else strength,
            KEPT_MM if kept is None else kept,
            device=asked.text("device", "auto"),
            weights_folder=_weights(asked),
        ),
        asked.decimal("simulate"),
        asked.number("seed", 0),
    )
    return _reconstruct(fields, progress, lambda ct: 1, lambda part, told: low_dose_of(part, options, told))


def _super_resolution(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``options``: direction, factor or ``slice_mm``, method, simulate, samples, seed, device, weights_folder.

    ``slice_mm`` in the place of a factor is the thickness of the slices that are wanted, or, with ``simulate``, of the
    thick ones that are made of the CT's first.
    """
    asked = fields.group("options")
    request = SuperResolutionRequest(
        _choice(asked, "direction", Direction, Direction.IN_PLANE),
        asked.number("factor", SuperResolutionRequest.factor),
        _choice(asked, "method", Method, Method.NULL_SPACE),
        samples=asked.number("samples", SuperResolutionRequest.samples),
        seed=asked.number("seed", 0),
        device=asked.text("device", "auto"),
        weights_folder=_weights(asked),
    )
    simulate, slice_mm = asked.flag("simulate"), asked.decimal("slice_mm")

    def options(step_mm: float) -> SuperResolutionOptions:
        if slice_mm is None or request.direction is not Direction.SLICES:
            return SuperResolutionOptions(request, simulate)
        return SuperResolutionOptions(replace(request, factor=_factor(step_mm, slice_mm, simulate)), simulate)

    def group(ct: Volume) -> int:
        thick = request.direction is Direction.SLICES and simulate
        return options(ct.spacing[2]).request.factor if thick else 1

    def make(part: CtSlices, told: Progress) -> Reconstruction:
        return super_resolution_of(part, options(part.ct.spacing[2]), told)

    return _reconstruct(fields, progress, group, make)


def _factor(step_mm: float, slice_mm: float, simulate: bool) -> int:
    """How many thin slices a thick one becomes."""
    factor = round(slice_mm / step_mm if simulate else step_mm / slice_mm) if slice_mm > 0 else 0
    if factor not in FACTORS:
        bounds = [step_mm * n if simulate else step_mm / n for n in (FACTORS[0], FACTORS[-1])]
        what = "thick slices to begin with" if simulate else "thin slices"
        raise UnsuitableImage(
            f"The slices of this CT are {step_mm:.3g} mm apart; choose {what} of {min(bounds):.2g} to "
            f"{max(bounds):.2g} mm."
        )
    return factor


def _choice(fields: Fields, name: str, kind: type[_Choice], default: _Choice) -> _Choice:
    value = fields.text(name, default.value)
    if value not in set(kind):
        raise BadRequest(f"There is no {name} '{value}'; choose from {', '.join(kind)}.")
    return kind(value)


def _weights(options: Fields) -> Path | None:
    folder = options.text("weights_folder", "")
    return Path(folder) if folder else None


# -- from the request to the folder ----------------------------------------------------------------------------------


def _reconstruct(
    fields: Fields,
    progress: Progress,
    group: Callable[[Volume], int],
    make: Callable[[CtSlices, Progress], Reconstruction],
) -> dict[str, Any]:
    """Check the CT, make the image of the chosen slices, write it.

    Args:
        fields: see the head of this file.
        progress: of the job.
        group: the number of slices must be a multiple of this.
        make: the task.
    """
    checking, working, writing = progress.split({"Checking the CT": 4, "Reconstructing": 92, "Writing the result": 4})
    checking.update(0.0)
    output, source = fields.output(), fields.group("input")
    identity = DicomSource.of_files([Path(name) for name in fields.texts("source_dicom")])
    ct = ct_of(source, checking).to_canonical()
    name = source.group("metadata").text("name", "CT")
    part = CtSlices.of(ct, _slices(fields, ct, group(ct)), name, name, identity)
    return _finished(make(part, working), output, writing)


def _finished(
    content: Reconstruction, output: Path, writing: Progress, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the output folder, and answer with it."""
    writing.update(0.0)
    with atomic_folder(output) as folder:
        _write(content, folder, more or {})
        writing.check()
    writing.done()
    return {"folder": str(output)}


def _slices(fields: Fields, ct: Volume, group: int) -> SliceChoice:
    """All, or those around a place; whole groups of them, and not fewer than two groups."""
    if not fields.has("slices"):
        center, count = list(ct.world_from_index(np.array(ct.shape) / 2)), len(ct.array)
    else:
        asked = fields.group("slices")
        center, count = asked.numbers("center", 3), _count(asked)
    if group > 1 and len(ct.array) < 2 * group:
        raise UnsuitableImage(
            f"{len(ct.array)} slices are less than two thick ones; choose thinner ones to begin with."
        )
    return SliceChoice.around(ct, center, max(count, 2 * group) if group > 1 else count, group)


def _count(slices: Fields) -> int:
    count = slices.number("count")
    if count < 1:
        raise BadRequest("'count' of 'slices' must be 1 or more.")
    return count


def _write(content: Reconstruction, folder: Path, more: Mapping[str, Any]) -> None:
    volumes = {
        "image": content.image,
        "before": content.before,
        "reference": content.reference,
        "interval": content.interval,
    }
    kept = {name: volume for name, volume in volumes.items() if volume is not None}
    for name, volume in kept.items():
        np.save(folder / f"{name}.npy", np.clip(np.rint(volume.array), -32768, 32767).astype(np.int16))
    image = content.image
    told = content.told() | {
        "nature": content.nature.value,
        "before_name": content.before_name,
        "reference_name": content.reference_name if content.reference is not None else None,
        "facts": dict(content.facts),
        "errors": errors_of_slices(content),
        "curves": [curves.told() for curves in content.curves],
        "marks": {"title": content.marks.title, "derivation": content.marks.derivation},
        "files": sorted(kept),
        "grid": {
            "spacing": list(image.spacing),
            "origin": list(image.origin),
            "direction": image.direction.ravel().tolist(),
        },
    }
    text = json.dumps(jsonable(told | dict(more)), indent=1, allow_nan=False)
    (folder / "result.json").write_text(text, encoding="utf-8")


# -- DICOM -----------------------------------------------------------------------------------------------------------


def _export_series(fields: Fields, progress: Progress) -> dict[str, Any]:
    """``input``; ``marks`` (title, derivation, nature); ``source_dicom``; ``told`` (for the manifest); ``folder``."""
    reading, writing = progress.split({"Reading the image": 5, "Writing the DICOM series": 95})
    reading.update(0.0)
    target, asked, source = fields.path("folder"), fields.group("marks"), fields.group("input")
    marks = Marks(asked.text("title"), asked.text("derivation"), _choice(asked, "nature", Nature, Nature.SIMULATED))
    image = volume_of(source, array_of(source.file("array")))
    if not image.array.size:
        raise UnsuitableImage("The image has no voxels; reconstruct again.")
    identity = DicomSource.of_files([Path(name) for name in fields.texts("source_dicom")])
    with output_folder(target) as stage:
        (stage / "dicom").mkdir()
        write_derived_series(image, stage / "dicom", marks, identity, writing)
        manifest = {
            "product": PRODUCT,
            "kind": _SERIES,
            "notice": f"{marks.nature.upper()} - {marks.title}",
            "synthetic": marks.nature.synthetic,
            "intended_use": USE,
            "provenance": jsonable(dict(fields.group("told").values)),
            "complete": True,
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "files": file_entries(stage),
        }
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        writing.check()
    writing.done()
    return {"folder": str(target)}


RECONSTRUCTIONS: dict[str, Callable[[Fields, Progress], dict[str, Any]]] = {
    "sparse_view": _sparse_view,
    "low_dose": _low_dose,
    "super_resolution": _super_resolution,
    "export_series": _export_series,
}
