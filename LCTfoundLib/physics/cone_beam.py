"""Cone beams on a flat panel, by the package diffct (Apache-2.0): an option, ``pip install lctfound[cone]``.

The rest of the engine works on slices; a cone's rays cross them, so that volumes are projected and reconstructed whole.
Conventions are those of :mod:`LCTfoundLib.physics.geometry`: at angle 0 the source is above the image, channels rise to
the right, rows of the panel rise with the slices. On NVIDIA GPUs diffct has kernels of its own; on a CPU it takes
minutes for what a GPU does in seconds (64^3 with 60 views: 2 s).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from LCTfoundLib.errors import LCTfoundError, UnsuitableProjections
from LCTfoundLib.physics.geometry import Detector, FanBeam, ImageGrid

__all__ = ["ConeBeam", "ConeProjector", "cone_least_squares", "feldkamp"]


@dataclass(frozen=True)
class ConeBeam:
    """A source on a circle around the isocenter and a flat panel opposite of it.

    Attributes:
        fan: of the panel's middle row: angles, channels, distances; its detector is flat.
        rows: of the panel.
        row_mm: from row to row, on the panel.

    Raises:
        UnsuitableProjections: no such beam.
    """

    fan: FanBeam
    rows: int
    row_mm: float

    def __post_init__(self) -> None:
        if self.fan.detector is not Detector.FLAT:
            raise UnsuitableProjections("A cone beam needs a flat panel; give the detector as flat.")
        if self.rows < 1 or not (math.isfinite(self.row_mm) and self.row_mm > 0):
            raise UnsuitableProjections(
                f"{self.rows} rows {self.row_mm} mm apart are no panel; give both above 0, in mm."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(views, rows, channels), of the projections."""
        return self.fan.views, self.rows, self.fan.detectors

    @property
    def height_mm(self) -> float:
        """Of what every view sees at the isocenter."""
        return self.rows * self.row_mm * self.fan.source_isocenter_mm / self.fan.source_detector_mm


class ConeProjector:
    """Projections of volumes under a cone beam, and back; the adjoint is exact and the gradient of the other.

    Args:
        grid: of the slices.
        slices: around the source's plane.
        slice_mm: from slice to slice.
        beam: of the projections.
        truncated: let a panel pass whose channels do not cover the slices' circle.

    Raises:
        LCTfoundError: diffct is not installed.
        UnsuitableProjections: the beam cannot scan the grid.
    """

    def __init__(self, grid: ImageGrid, slices: int, slice_mm: float, beam: ConeBeam, truncated: bool = False) -> None:
        if slices < 1 or not slice_mm > 0:
            raise UnsuitableProjections(f"{slices} slices {slice_mm} mm apart are no volume; give both above 0.")
        beam.fan.check(grid, truncated)
        self.grid, self.slices, self.slice_mm, self.beam = grid, slices, slice_mm, beam
        self._diffct = _diffct()

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        return self.slices, self.grid.rows, self.grid.columns

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Of slices, rows and columns."""
        return self.slice_mm, self.grid.pixel_mm, self.grid.pixel_mm

    @property
    def pitch_mm(self) -> tuple[float, float]:
        """Of channels and rows on the panel."""
        return self.beam.fan.pitch_mm, self.beam.row_mm

    def forward(self, volume: Tensor) -> Tensor:
        """Line integrals (..., views, rows, channels) of volumes (..., slices, rows, columns), per mm."""
        self._check(volume, self.volume_shape, "volume")
        return self.operator(volume.device).project(volume.float().flip(-2)).transpose(-1, -2)

    def adjoint(self, rays: Tensor) -> Tensor:
        """Volumes (..., slices, rows, columns) from rays (..., views, rows, channels)."""
        self._check(rays, self.beam.shape, "projections")
        return self.operator(rays.device).backproject(rays.float().transpose(-1, -2)).flip(-2)

    def operator(self, device: torch.device) -> Any:
        """diffct's own: y rises with the row's number, channels before rows."""
        panel = (self.beam.fan.detectors, self.beam.rows)
        return self._diffct.Projector(
            self.trajectory(device), self.volume_shape, panel, beam="cone", detector_spacing=self.pitch_mm,
            voxel_spacing=self.spacing_mm,
        )  # fmt: skip

    def trajectory(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Source, panel's middle and axes for each view, mm, float32 (views, 3); shifted panels off their middle."""
        fan = self.beam.fan
        angles = torch.tensor(fan.angles, dtype=torch.float32)
        source, center, across, up = self._diffct.circular_trajectory_3d(
            angles, fan.source_isocenter_mm, fan.source_detector_mm, device="cpu"
        )
        center = center - fan.offset * fan.pitch_mm * across
        return tuple(part.to(device) for part in (source, center, across, up))

    @staticmethod
    def _check(values: Tensor, shape: tuple[int, int, int], name: str) -> None:
        if tuple(values.shape[-3:]) != shape:
            raise UnsuitableProjections(
                f"The {name} measure {' x '.join(map(str, values.shape[-3:]))} and the geometry tells of "
                f"{' x '.join(map(str, shape))}; give them in that order."
            )
        if not bool(values.isfinite().all()):
            raise UnsuitableProjections(f"The {name} hold values that are no numbers; replace them.")


def feldkamp(projector: ConeProjector, rays: Tensor, window: str = "hann") -> Tensor:
    """Filtered back-projection of a full turn (Feldkamp, Davis and Kress, JOSA A 1 (1984) 612).

    Exact in the source's plane; the farther from it, the more is missing.

    Args:
        projector: of the geometry.
        rays: line integrals, (views, rows, channels).
        window: of the ramp filter: ``ram-lak``, ``hann``, ``hamming``, ``cosine`` or ``shepp-logan``.

    Returns:
        (slices, rows, columns), per mm.
    """
    projector._check(rays, projector.beam.shape, "projections")
    angles = torch.tensor(projector.beam.fan.angles, dtype=torch.float32, device=rays.device)
    found = projector._diffct.fdk(
        rays.float().transpose(-1, -2).contiguous(), projector.trajectory(rays.device), projector.volume_shape, angles,
        detector_spacing=projector.pitch_mm, voxel_spacing=projector.spacing_mm, window=window,
    )  # fmt: skip
    return found.flip(-2)


def cone_least_squares(
    projector: ConeProjector,
    rays: Tensor,
    start: Tensor | None = None,
    iterations: int = 20,
    progress: Callable[[float], object] | None = None,
) -> Tensor:
    """Conjugate gradients for the least squares ``||Ax - y||^2``; stopping early regularizes.

    Args:
        projector: of the geometry.
        rays: y, (views, rows, channels).
        start: where to begin; default: zeros.
        iterations: at most.
        progress: told the share done after each; what it raises stops the run.

    Returns:
        (slices, rows, columns), per mm.
    """
    projector._check(rays, projector.beam.shape, "projections")
    stopped: list[BaseException] = []

    def tell(done: int, *_: object) -> bool:
        """False stops the run; what progress raises is raised again outside, as it is."""
        try:
            if progress is not None:
                progress(done / iterations)
        except BaseException as error:
            stopped.append(error)
        return not stopped

    found = projector._diffct.cgls(
        projector.operator(rays.device), rays.float().transpose(-1, -2).contiguous(), iterations,
        x0=None if start is None else start.flip(-2).contiguous(), rtol=0.0, callback=tell,
    )  # fmt: skip
    if stopped:
        raise stopped[0]
    return found.volume.flip(-2)


def _diffct() -> ModuleType:
    try:
        import diffct
    except ImportError:
        raise LCTfoundError(
            "Cone beams need the package diffct; install it (pip install diffct), or rebin the scan to fan beams."
        ) from None
    return diffct
