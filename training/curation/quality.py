"""Are a study's images whole, and clean? Completeness and corruption, and the paper's gate on Canny edges."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from skimage.feature import canny

from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_checks import check_ct
from LCTfoundLib.volume_dicom import read_dicom

__all__ = ["EdgeGate", "edge_ratio", "load_study"]


def load_study(archive: Path, files: Sequence[str], unreadable: int = 0) -> Volume:
    """The chest CT among a study's files, as int16 HU with slices from the feet up, checked as the engine checks it.

    Raises:
        UnsuitableImage: files that cannot be read, slices missing, damaged pixels, no CT of the chest.
        OSError: a file is gone or the archive does not answer; worth another try.
    """
    paths = [archive / name for name in files]
    for path in paths:
        with path.open("rb"):  # the reader takes what it cannot open for no DICOM file, and would not miss it
            pass
    if unreadable:
        raise UnsuitableImage(
            f"{unreadable} of {len(files)} DICOM files have no readable header; copy the study again."
        )
    with _gathered(paths) as folder:
        return check_ct(read_dicom(folder)).to_canonical()


@contextmanager
def _gathered(paths: Sequence[Path]) -> Iterator[Path]:
    """A folder of links to the files, wherever they lie."""
    with tempfile.TemporaryDirectory(prefix="curation-") as folder:
        for number, path in enumerate(paths):
            (Path(folder) / f"{number:06d}{path.suffix}").symlink_to(path.resolve())
        yield Path(folder)


def edge_ratio(hu: np.ndarray, width: float = 1500.0, level: float = -500.0, sigma: float = 1.0) -> float:
    """Share of a slice's pixels that Canny's detector calls edges.

    Args:
        hu: (rows, columns).
        width, level: of the window that is mapped to 0..1 first; the paper's lung window.
        sigma: of the Gaussian before the gradient, in pixels.
    """
    gray = np.clip((hu.astype(np.float32) - np.float32(level - width / 2)) / np.float32(width), 0, 1)
    return float(canny(gray, sigma=sigma).mean())


@dataclass(frozen=True)
class EdgeGate:
    """Noisy studies go to a person: those with more than ``max_noisy`` of their slices above ``threshold``.

    Attributes:
        threshold: the paper's edges / pixels.
        slices: that many are looked at, evenly spread; noise is a property of the scan, and Canny is slow. 0: all.
        max_noisy: share of the slices; a few with metal or shoulders make no noisy scan.
    """

    threshold: float = 0.2
    slices: int = 32
    max_noisy: float = 0.1
    width: float = 1500.0
    level: float = -500.0

    def measure(self, ct: Volume) -> dict[str, float]:
        """``edge_ratio`` (median over slices) and ``noisy`` (share of slices above the threshold)."""
        count = ct.shape[0] if self.slices == 0 else min(self.slices, ct.shape[0])
        chosen = np.linspace(0, ct.shape[0] - 1, count).round().astype(int)
        ratios = np.array([edge_ratio(ct.array[k], self.width, self.level) for k in chosen])
        return {"edge_ratio": float(np.median(ratios)), "noisy": float((ratios > self.threshold).mean())}

    def is_clean(self, measures: dict[str, float]) -> bool:
        return measures["noisy"] <= self.max_noisy
