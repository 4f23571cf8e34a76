"""A small real engine for tests of the shell: reads with SimpleITK, segments by threshold, exports the label map."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from LCTfoundLib.case import CaseOptions, Engine
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.export.output_folder import MANIFEST
from LCTfoundLib.export.tables import volume_rows
from LCTfoundLib.runtime.files import atomic_folder
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume import Volume


def lungs_by_threshold(ct: Volume) -> SimpleNamespace:
    """A real, if simple, segmenter: enclosed air, right and left; the darkest of it is airway."""
    air, count = ndimage.label(ct.array < -500)
    outside = set(np.unique(np.concatenate([air[:, 0].ravel(), air[:, -1].ravel()])))
    inside = np.isin(air, [n for n in range(1, count + 1) if n not in outside])
    x = ct.origin[0] + ct.spacing[0] * np.arange(ct.shape[2])
    segments = np.where(inside, np.where(x < 0, 1, 11), 0).astype(np.uint8)
    trees = (inside & (ct.array < -950)).astype(np.uint8)
    return SimpleNamespace(
        segments=ct.with_array(segments),
        trees=ct.with_array(trees),
        confidence={"right_s01": 0.9},
        findings=[SimpleNamespace(sentence="thick slices")],
    )


@dataclass
class ToyEngine:
    """Counts its calls; reads with SimpleITK, segments by threshold, exports the label map."""

    weights: str = "a"
    segmented: list[str] = field(default_factory=list)

    def engine(self) -> Engine:
        return Engine(self.read, self.segment, self.export, lambda options: {"weights": self.weights})

    def read(self, path: Path, progress: Progress) -> Volume:
        try:
            image = sitk.ReadImage(str(path))
        except RuntimeError as error:
            raise UnsuitableImage(f"{path} cannot be read.") from error
        return Volume(
            sitk.GetArrayFromImage(image), image.GetSpacing(), image.GetOrigin(), metadata={"path": path.name}
        )

    def segment(self, ct: Volume, options: CaseOptions, progress: Progress) -> SimpleNamespace:
        for step in range(5):
            progress.update(step / 5)
        self.segmented.append(ct.metadata["path"])
        return lungs_by_threshold(ct)

    def export(self, ct, result, name, folder, formats, progress) -> Path:
        volumes = {row.key: row.volume for row in volume_rows(result.segments, result.trees, ct)}
        with atomic_folder(folder, overwrite=True) as staging:
            np.save(staging / "segments.npy", result.segments.array)
            (staging / MANIFEST).write_text(json.dumps({"volumes_ml": volumes}))
        return folder / MANIFEST


def write_ct(volume: Volume, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing)
    image.SetOrigin(volume.origin)
    sitk.WriteImage(image, str(path))
    return path
