"""One study from its file to a finished result folder: what the shell, the batch and the demo share.

The result folder appears only when it is whole; ``run.json`` is written last and tells how the result came about. Its
fingerprint (input, options, engine, weights) is what a later run is compared with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from LCTfoundLib import __version__
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.export.options import TRIANGLES, ExportOptions, Format
from LCTfoundLib.export.output_folder import check_output_folder
from LCTfoundLib.runtime.files import atomic_path
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume_checks import warnings_of

if TYPE_CHECKING:
    from LCTfoundLib.tasks.lung_segmentation import LungResult
    from LCTfoundLib.volume import Volume

__all__ = [
    "RECORD",
    "CaseOptions",
    "CaseRecord",
    "Engine",
    "case_name",
    "fingerprint",
    "peak_memory_mb",
    "read_record",
    "real_engine",
    "run_case",
]

#: The file that marks a folder as a finished result of ours.
RECORD = "run.json"
#: Shares of the run time, for the progress.
_SHARES = {"Reading the CT": 2, "Segmentation": 66, "Export": 32}

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseOptions:
    """What the user chose for a run.

    Attributes:
        device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
        quality: ``fast``, ``standard`` or ``full``.
        formats: export formats; empty = all.
        weights_folder: other place of the weights.
        structures: keys of the structures, lobes or lungs to export; empty = the 21 structures.
        triangles: of all models together.
        frame: of the models, ``LPS`` or ``RAS``.
        single_file: one model file with all structures instead of one for each.

    Raises:
        LCTfoundError: there is no such format, structure or frame, or there are too few triangles.
    """

    device: str = "auto"
    quality: str = "standard"
    formats: tuple[str, ...] = ()
    weights_folder: Path | None = None
    structures: tuple[str, ...] = ()
    triangles: int = TRIANGLES
    frame: str = "LPS"
    single_file: bool = False

    def __post_init__(self) -> None:
        self.export_options()

    def export_options(self, source: Path | None = None) -> ExportOptions:
        """What to export of the study at ``source``."""
        return ExportOptions.parse(
            {
                "formats": self.formats,
                "structures": self.structures or None,
                "triangles": self.triangles,
                "frame": self.frame,
                "single_file": self.single_file,
                "source_dicom": [source] if source and _is_dicom(source) else [],
            }
        )


@dataclass(frozen=True)
class Engine:
    """The steps of a case, injected so that the doors are tested without networks.

    Attributes:
        read: file or folder -> checked CT.
        segment: CT -> result on the CT's own grid.
        export: (ct, result, case name, folder, options, progress) writes the files, all or nothing, and returns the
            path of the manifest.
        identity: what else decides the result: engine version and checksums of the weights.
    """

    read: Callable[[Path, Progress], Volume]
    segment: Callable[[Volume, CaseOptions, Progress], LungResult]
    export: Callable[[Volume, LungResult, str, Path, ExportOptions, Progress], Path]
    identity: Callable[[CaseOptions], Mapping[str, str]]


@dataclass
class CaseRecord:
    """Content of ``run.json``: how a result came about, and its short summary.

    ``findings`` also holds what had to be mended when reading. ``volumes_ml`` has the keys of the volumes table
    (``lungs``, ``right_upper_lobe``, ``right_s01``, ``airway``, ...).
    """

    case: str
    source: str
    fingerprint: str
    options: dict[str, Any]
    engine: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    volumes_ml: dict[str, float] = field(default_factory=dict)
    confidence: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    finished: str = ""


def run_case(
    source: Path,
    target: Path,
    options: CaseOptions,
    engine: Engine,
    progress: Progress | None = None,
    overwrite: bool = False,
    name: str | None = None,
) -> tuple[CaseRecord, LungResult]:
    """Segment one study and write its result folder.

    Args:
        source: CT file or DICOM folder.
        target: result folder; must not exist, or be empty, or with ``overwrite`` hold an earlier result.
        options: what to make and where to compute.
        engine: the steps.
        progress: told about stages; raises ``Cancelled`` when the user stopped.
        overwrite: replace an earlier result.
        name: case name in reports; default: the source's name.

    Raises:
        UnsuitableImage, WeightError, OutOfMemory, OutputError, Cancelled: with ``target`` as it was before.
    """
    if not source.exists():
        raise UnsuitableImage(f"There is no file or folder {source}; check the path of the CT.")
    check_output_folder(target, overwrite)
    case, clock, to_export = name or case_name(source), _Clock(), options.export_options(source)
    reading, segmenting, exporting = Progress.of(progress).split(_SHARES)
    reading.update(0.0)
    ct = clock.time("read", lambda: engine.read(source, reading))
    _check_export(ct, to_export)
    result = clock.time("segment", lambda: engine.segment(ct, options, segmenting))
    manifest = clock.time("export", lambda: engine.export(ct, result, case, target, to_export, exporting))
    record = _record(case, source, options, engine, result, manifest, clock, warnings_of(ct))
    with atomic_path(target / RECORD) as staging:
        staging.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    exporting.done()
    _log.info("%s: finished in %.1f s, peak memory %.0f MB", case, clock.total(), record.peak_memory_mb)
    return record, result


def case_name(source: Path) -> str:
    """Readable name of a study from its path, without image suffixes."""
    name = source.resolve().name
    for suffix in (".gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".npy", ".npz"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def fingerprint(source: Path, options: CaseOptions, engine: Engine) -> str:
    """Digest of everything that decides the result of a study (the device does not).

    Files count by relative name, size and time of change: reading gigabytes over a network only to find that nothing
    changed would make resuming slow.
    """
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    stats = [(os.path.relpath(path, source), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([stats, _plain(replace(options, device="")), dict(engine.identity(options))], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_record(folder: Path) -> CaseRecord | None:
    """The record of a finished result folder; None when there is none."""
    try:
        return CaseRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", 0) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class _Clock:
    """Wall time per step, in seconds."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.seconds: dict[str, float] = {}

    def time(self, step: str, function: Callable[[], _T]) -> _T:
        start = time.monotonic()
        value = function()
        self.seconds[step] = round(time.monotonic() - start, 2)
        return value

    def total(self) -> float:
        return round(time.monotonic() - self.start, 2)


def _check_export(ct: Volume, options: ExportOptions) -> None:
    """Refuse before the long work a DICOM SEG that could not be written after it."""
    if options.requires(Format.DICOM_SEG):
        from LCTfoundLib.export.dicom_seg import check_source

        check_source(ct, options.source_dicom)


def _is_dicom(source: Path) -> bool:
    from LCTfoundLib.volume_dicom import is_dicom_file

    return source.is_dir() or source.suffix.lower() == ".dcm" or is_dicom_file(source)


def _plain(options: CaseOptions) -> dict[str, Any]:
    lists = {"formats": list(options.formats), "structures": list(options.structures)}
    return asdict(options) | lists | {"weights_folder": str(options.weights_folder or "")}


def _record(
    case: str,
    source: Path,
    options: CaseOptions,
    engine: Engine,
    result: LungResult,
    manifest: Path,
    clock: _Clock,
    warnings: list[str],
) -> CaseRecord:
    findings = [finding.sentence for finding in result.findings]
    return CaseRecord(
        case=case,
        source=str(source),
        fingerprint=fingerprint(source, options, engine),
        options=_plain(options),
        engine=dict(engine.identity(options)),
        seconds=clock.seconds | {"total": clock.total()},
        peak_memory_mb=round(peak_memory_mb(), 1),
        volumes_ml=json.loads(manifest.read_text(encoding="utf-8"))["volumes_ml"],
        confidence={key: round(float(value), 3) for key, value in result.confidence.items()},
        findings=list(dict.fromkeys([*warnings, *findings])),
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def real_engine() -> Engine:
    """The engine itself; imported here, so that help and argument errors need not wait for torch and VTK."""
    from LCTfoundLib.export.bundle import LungExport, export_all
    from LCTfoundLib.tasks.lung_segmentation import LungRequest, Quality, segment_lungs
    from LCTfoundLib.volume_io import read_ct

    def segment(ct: Volume, options: CaseOptions, progress: Progress) -> LungResult:
        return segment_lungs(
            ct, LungRequest(Quality(options.quality), options.device, options.weights_folder), progress
        )

    def export(
        ct: Volume, result: LungResult, case: str, folder: Path, options: ExportOptions, progress: Progress
    ) -> Path:
        content = LungExport(
            case, result.segments, result.trees, ct, result.confidence, result.findings, result.provenance
        )
        return export_all(content, folder, options, progress)

    return Engine(read_ct, segment, export, _identity)


def _identity(options: CaseOptions) -> dict[str, str]:
    """Version of the engine and checksums of the networks' weights."""
    from LCTfoundLib.networks.lung import COARSE, FINE
    from LCTfoundLib.weights.registry import list_weights, search_folders

    checksums = {
        entry.name: entry.card.sha256 for entry in list_weights(search_folders(options.weights_folder)) if entry.card
    }
    return {"version": __version__} | {name: checksums.get(name, "missing") for name in (COARSE, FINE)}
