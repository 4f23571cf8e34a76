"""The test sets: phantoms never trained on, phantoms of another generator, real lobe shapes, real scans.

Which seeds, lobe maps and scans are tests is frozen in ``split_manifest.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from LCTfoundLib.anatomy.structures import Lobe
from LCTfoundLib.volume import Volume
from training.evaluate import vessel_points
from training.evaluate.scoring import Case, Truth

if TYPE_CHECKING:
    from training.phantom.acquisition import Scan

__all__ = [
    "DEFAULT_DATA",
    "MANIFEST",
    "CaseSource",
    "TestSet",
    "load_lobe_map",
    "manifest",
    "phantom_case",
    "phantom_territories",
    "sources",
]

MANIFEST = Path(__file__).parent / "split_manifest.json"
#: Real data beside the clone; ``--data`` names another place.
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

#: Values of the real lobe maps -> ``Lobe`` codes; 512 more marks a border voxel of the same lobe.
LOBE_MAP_BORDER = 512
LOBE_MAP_CODES = {
    4: Lobe.RIGHT_UPPER,
    5: Lobe.RIGHT_MIDDLE,
    6: Lobe.RIGHT_LOWER,
    7: Lobe.LEFT_UPPER,
    8: Lobe.LEFT_LOWER,
}


class TestSet(Enum):
    """The sets of the evaluation."""

    __test__ = False  # not a test class, whatever its name looks like

    SYNTHETIC = "synthetic"
    SHIFTED = "shifted"
    SHAPES = "shapes"
    REAL = "real"


@dataclass(frozen=True)
class CaseSource:
    """A case that is made or read when it is needed; whole-chest volumes are too large to hold many.

    Attributes:
        missing: why the case cannot be had here, else empty.
    """

    name: str
    load: Callable[[], Case]
    missing: str = ""


def manifest() -> dict[str, Any]:
    """The frozen split."""
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def sources(test_set: TestSet, data: Path = DEFAULT_DATA) -> Iterator[CaseSource]:
    """The cases of a set, in the manifest's order."""
    if test_set is TestSet.SYNTHETIC:
        yield from _phantom_sources("synthetic_test", shifted=False)
    elif test_set is TestSet.SHIFTED:
        yield from _phantom_sources("shifted_test", shifted=True)
    elif test_set is TestSet.SHAPES:
        yield from _shape_sources(data)
    else:
        yield from _real_sources(data)


def seeds(key: str) -> range:
    """The seeds of a phantom split."""
    entry = manifest()["phantom_seeds"][key]
    return range(entry["first"], entry["first"] + entry["count"])


# -- phantoms --------------------------------------------------------------------------------------------------------


def phantom_case(seed: int, shifted: bool = False, lobe_map: Volume | None = None) -> Case:
    """A patient of a seed in a clinical scan drawn with the same seed.

    Args:
        shifted: the other generator (growth rule, segments cut along vein planes) and kernels softer or sharper than
            any in training.
        lobe_map: real lungs to grow the trees in.
    """
    from training.phantom.render import make_patient, render

    patient = make_patient(seed, shifted=shifted, lobe_map=lobe_map)
    rendered = render(patient, held_out_scan(seed, shifted), seed)
    truth = Truth(
        segments=rendered.segments.array,
        lobes=rendered.lobes.array,
        trees=rendered.trees.array,
        visible=rendered.visible.array > 0,
        graphs=rendered.graphs,
    )
    return Case(str(seed), rendered.ct, truth)


def held_out_scan(seed: int, shifted: bool) -> Scan:
    """How a test phantom is scanned: a whole chest with realistic intensities, at no less than 0.8 x 0.8 x 1 mm.

    Finer voxels would multiply the time of the evaluation and not what can be seen.
    """
    from training.phantom.acquisition import Regime, Scan

    rng = np.random.default_rng([seed, 40])
    scan = Scan.sample(rng, Regime.PHYSICS)
    plane, gap = max(scan.spacing[0], 0.8), max(scan.spacing[2], 1.0)
    scan = replace(
        scan,
        spacing=(plane, plane, gap),
        interval=gap,
        thickness=max(scan.thickness, gap),
        coverage=(0.0, 1.0),
        field_margin=float("inf"),
    )
    if not shifted:
        return scan
    if rng.random() < 0.5:
        return replace(scan, blur=float(rng.uniform(1.0, 1.2)), edge=0.0, nps_peak=float(rng.uniform(0.12, 0.2)))
    return replace(
        scan,
        blur=float(rng.uniform(0.3, 0.38)),
        edge=float(rng.uniform(0.9, 1.2)),
        nps_peak=float(rng.uniform(0.6, 0.7)),
    )


def phantom_territories(seed: int) -> np.ndarray:
    """The territory layer of a training phantom at 3 mm, for the baseline's atlas."""
    from training.phantom.render import make_patient

    return make_patient(seed, spacing=3.0).trees.segments


def _phantom_sources(key: str, shifted: bool) -> Iterator[CaseSource]:
    for seed in seeds(key):
        yield CaseSource(str(seed), lambda seed=seed: phantom_case(seed, shifted=shifted))


def _shape_sources(data: Path) -> Iterator[CaseSource]:
    for name, seed in zip(manifest()["lobe_maps"]["test"], seeds("shapes_test"), strict=True):
        path = data / "shapes" / "lobes" / name
        yield CaseSource(
            path.stem,
            lambda path=path, seed=seed: replace(phantom_case(seed, lobe_map=load_lobe_map(path)), name=path.stem),
            "" if path.is_file() else "the lobe map is not in the data folder",
        )


def load_lobe_map(path: Path) -> Volume:
    """A real lobe map with ``Lobe`` codes on a canonical grid; other structures of the file become 0."""
    raw = read_canonical(path)
    values = raw.array.astype(np.int32)
    values = np.where(values >= LOBE_MAP_BORDER, values - LOBE_MAP_BORDER, values)
    lobes = np.zeros(values.shape, dtype=np.uint8)
    for value, lobe in LOBE_MAP_CODES.items():
        lobes[values == value] = lobe
    return raw.with_array(lobes)


# -- real scans ------------------------------------------------------------------------------------------------------


def read_canonical(path: Path) -> Volume:
    """An image file on a canonical grid. The files of the test sets are axis-aligned, so no voxel is resampled."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    return Volume(sitk.GetArrayFromImage(image), image.GetSpacing(), image.GetOrigin())


def _real_sources(data: Path) -> Iterator[CaseSource]:
    yield CaseSource("LIDC-IDRI-0001", lidc_0001)
    ct = data / "ct"
    yield CaseSource(
        "LUNG1-001", lambda: lung1_001(ct), "" if (ct / "LUNG1-001_ct.nii.gz").is_file() else "not in the data folder"
    )
    for name in manifest()["real"]["vessel_points"]:
        path, points = ct / f"{name}_ct.nii.gz", vessel_points.FOLDER / f"{name}.json"
        yield CaseSource(
            name,
            lambda path=path, points=points, name=name: Case(
                name, read_canonical(path), Truth(points=vessel_points.read_points(points))
            ),
            "" if path.is_file() else "not in the data folder",
        )


def lidc_0001() -> Case:
    """The public case with its machine labels (not made by a human): lobes and trachea."""
    from LCTfoundLib.demo import cache_folder, fetch_case

    files = fetch_case(cache_folder())
    ids = files.label_ids()
    labels = read_canonical(files.labels)
    names = {
        Lobe.RIGHT_UPPER: "lung_upper_lobe_right",
        Lobe.RIGHT_MIDDLE: "lung_middle_lobe_right",
        Lobe.RIGHT_LOWER: "lung_lower_lobe_right",
        Lobe.LEFT_UPPER: "lung_upper_lobe_left",
        Lobe.LEFT_LOWER: "lung_lower_lobe_left",
    }
    lobes = np.zeros(labels.shape, dtype=np.uint8)
    for lobe, name in names.items():
        lobes[labels.array == ids[name]] = lobe
    return Case("LIDC-IDRI-0001", read_canonical(files.ct), Truth(lobes=lobes, trachea=labels.array == ids["trachea"]))


def lung1_001(folder: Path) -> Case:
    """Human lung contours; the tumor is left out, because contours may or may not take it in. Evaluation only."""
    masks = {
        part: read_canonical(folder / f"LUNG1-001_{part}.nii.gz").array > 0 for part in ("Lung_R", "Lung_L", "GTV-1")
    }
    sides = np.where(masks["Lung_R"], 1, np.where(masks["Lung_L"], 2, 0)).astype(np.uint8)
    return Case(
        "LUNG1-001",
        read_canonical(folder / "LUNG1-001_ct.nii.gz"),
        Truth(sides=sides, ignore=masks["GTV-1"]),
    )
