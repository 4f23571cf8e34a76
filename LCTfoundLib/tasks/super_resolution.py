"""Super-resolution: a CT of finer pixels, or of thinner slices, that agrees exactly with the coarse one.

Two methods. *Cubic*: interpolation made consistent, no network, nothing made up. *Null space*: draws of what the
backbone finds likely, zero-shot (DDNM); their mean, and what they disagree about. The means of either over the coarse
pixels are the input's values, whatever these are; what lies within a coarse pixel is a guess.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import LCTfoundLib
from LCTfoundLib.errors import LCTfoundError, OutOfMemory, UnsuitableImage
from LCTfoundLib.networks.conditions import WIDE
from LCTfoundLib.networks.foundation import FoundationModel, Slices, load_foundation
from LCTfoundLib.networks.null_space import NullSpaceSettings, sample_null_space
from LCTfoundLib.physics.downsampling import AreaMeans, Downsampling, ThickSlices
from LCTfoundLib.runtime.device import choose_device, free_memory
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.tasks.slice_predictor import SlicePredictor
from LCTfoundLib.volume import Volume
from LCTfoundLib.volume_checks import add_warning, warnings_of

__all__ = [
    "FACTORS",
    "Direction",
    "Method",
    "SuperResolutionRequest",
    "SuperResolutionResult",
    "coarse_volume",
    "interpolated",
    "super_resolve",
]

#: How many times finer a result may be.
FACTORS = range(2, 9)
#: Of the interval in which the true value would lie in 9 of 10 cases if the draws were right: normal distribution.
_NORMAL = 1.6449
#: Images of the result's size that are held at a time.
_ARRAYS = 8
#: Where a CT's metadata keeps the thickness of a slice, mm.
_THICKNESS = "SliceThickness"
#: Gray values of the backbone's window.
_LEVEL, _HALF = WIDE.level, WIDE.width / 2

_MADE_UP = (
    "The detail finer than the original's is synthetic: made up by a network so that it fits the measured values. "
    "Small structures may be missing or false. Research use only, not for diagnosis."
)


class Direction(StrEnum):
    """What becomes finer."""

    #: Rows and columns of the axial slices.
    IN_PLANE = "in-plane"
    #: Thick slices become thin ones.
    SLICES = "slices"


class Method(StrEnum):
    """How."""

    CUBIC = "cubic"
    NULL_SPACE = "null-space"


#: The backbone's draws agree where they are wrong together. How much wider than theirs the interval has to be to hold
#: 90 % of the bodies' pixels, by the factor: in plane 2.31 for 4 and 4.07 for 8 on three tuning slices of 256 pixels;
#: between slices 2.37 for 2 (2.28 to 2.43 at three places of two patients) and 3.26 for 4 (one place).
_WIDER, _WIDER_BY_FACTOR = {Direction.IN_PLANE: 0.55, Direction.SLICES: 1.48}, 0.44


@dataclass(frozen=True)
class SuperResolutionRequest:
    """What is asked for.

    Attributes:
        direction: see ``Direction``.
        factor: how many times finer, 2 to 8.
        method: see ``Method``.
        thickness_mm: of a slice, for ``SLICES``; None takes what the CT's header says, else slices that touch.
        samples: draws, for ``NULL_SPACE``.
        sampling: how each is drawn.
        seed: of the draws.
        device: ``auto``, ``cuda``, ``mps`` or ``cpu``.
        precision: of the network; None takes the fastest that is safe.
        weights_folder: other place of the weights.

    Raises:
        LCTfoundError: a number is out of its range.
    """

    direction: Direction = Direction.IN_PLANE
    factor: int = 4
    method: Method = Method.NULL_SPACE
    thickness_mm: float | None = None
    samples: int = 4
    sampling: NullSpaceSettings = field(default_factory=NullSpaceSettings)
    seed: int = 0
    device: str = "auto"
    precision: str | None = None
    weights_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.factor not in FACTORS:
            raise LCTfoundError(
                f"A factor of {self.factor} is not possible; take a whole number from {FACTORS[0]} to {FACTORS[-1]}."
            )
        if self.samples < 1:
            raise LCTfoundError(f"{self.samples} samples are no image; take 1 at least, 4 to see what differs.")
        if self.thickness_mm is not None and not 0 < self.thickness_mm < float("inf"):
            raise LCTfoundError(f"Slices cannot be {self.thickness_mm} mm thick; give a thickness above 0 mm.")


@dataclass
class SuperResolutionResult:
    """A finer CT.

    Attributes:
        ct: HU, float32, canonical; its voxels fill the same space as the input's.
        interval_hu: on the same grid, half of the width of the interval that should hold 9 of 10 pixels, from
            what the draws disagree about, widened as real slices asked for in the plane; None for fewer than two draws.
        residual_hu: largest difference between the input and what a coarse scan of the result would show.
        evaluations: of the network, for a slice.
        warnings: sentences for the user; the CT's metadata has them too.
        provenance: weights, settings, versions, seconds.
    """

    ct: Volume
    interval_hu: Volume | None
    residual_hu: float
    evaluations: int
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def coarse_volume(ct: Volume, direction: Direction, factor: int, thickness_mm: float | None = None) -> Volume:
    """What a coarser scan would have shown, to see how much of it comes back.

    Args:
        ct: HU, canonical.
        direction: what becomes coarser.
        factor: how many times.
        thickness_mm: of the thick slices; None lets them touch.

    Returns:
        HU, float32; each voxel at the middle of those whose mean it is.

    Raises:
        UnsuitableImage: rows, columns or slices are no multiple of the factor, or thick slices overlap too much.
    """
    if direction is Direction.SLICES and len(ct.array) % factor:
        kept = len(ct.array) - len(ct.array) % factor
        raise UnsuitableImage(
            f"{len(ct.array)} slices are no whole number of groups of {factor}; crop the CT to {kept}."
        )
    count, step = len(ct.array) // factor, ct.spacing[2]
    thickness = None if thickness_mm is None else thickness_mm / step
    operator = AreaMeans(factor) if direction is Direction.IN_PLANE else ThickSlices(count, factor, thickness)
    return _on_grid(ct, operator.forward(_tensor(ct)).numpy(), direction, float(factor), thickness_mm)


def super_resolve(
    ct: Volume,
    request: SuperResolutionRequest | None = None,
    progress: Progress | None = None,
    load: Callable[[Path | None], FoundationModel] = lambda folder: load_foundation(folder=folder),
) -> SuperResolutionResult:
    """Make a CT finer.

    Args:
        ct: HU; values beyond the backbone's window (metal, dense bone, padding) are kept, blurred as they are.
        request: how.
        progress: told after some slices; stops the run when cancelled.
        load: gives the backbone, from a weights folder.

    Raises:
        UnsuitableImage: values are no numbers, slices are too few or overlap too much.
        WeightError: the weight is missing or damaged.
        OutOfMemory: the result does not fit into memory.
        Cancelled: the user stopped.
    """
    request, begun = request or SuperResolutionRequest(), time.monotonic()
    progress = Progress.of(progress)
    header, ct = _thickness_in_header(ct), ct.to_canonical()
    measured = _checked(ct, request)
    thickness = request.thickness_mm or header or ct.spacing[2]
    run = _Run(ct, request, _operator(ct, request, thickness), progress, load)
    fine, interval = run(measured)
    residual = float((run.operator.forward(fine) - measured).abs().max())
    grid = _on_grid(ct, fine.numpy(), request.direction, 1.0 / request.factor)
    for text in run.warnings:
        if text not in warnings_of(grid):
            add_warning(grid, text)
    progress.done()
    return SuperResolutionResult(
        grid,
        None if interval is None else grid.with_array(interval.numpy()),
        residual,
        run.evaluations,
        run.warnings,
        _provenance(ct, request, run, thickness)
        | {"largest residual HU": residual, "seconds": round(time.monotonic() - begun, 1)},
    )


class _Run:
    """One image made finer; HU outside, the backbone's gray values within."""

    def __init__(
        self,
        ct: Volume,
        request: SuperResolutionRequest,
        operator: Downsampling,
        progress: Progress,
        load: Callable[[Path | None], FoundationModel],
    ) -> None:
        self.ct, self.request, self.operator, self.progress, self._load = ct, request, operator, progress, load
        self.choice = choose_device(request.device, request.precision)
        self.evaluations = 0
        self.model: FoundationModel | None = None
        self.warnings: list[str] = []

    @torch.inference_mode()
    def __call__(self, measured: Tensor) -> tuple[Tensor, Tensor | None]:
        """Finer slices and the interval, HU, float32 on the CPU."""
        self.progress.update(0.0, "Interpolating")
        interval = None
        if self.request.method is Method.CUBIC:
            fine = interpolated(measured, self.request.direction, self.request.factor)
        else:
            fine, interval = self._drawn(measured)
        # Once more in HU: what was rounded on the way does not add up.
        return self.operator.consistent(fine, measured), interval

    def _drawn(self, measured: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean of the draws, and their interval.

        The backbone knows nothing beyond its window's ends. It is shown the coarse image cut there; what was cut off is
        added afterwards, evenly over the fine pixels of a coarse one, so that the means come out whole.
        """
        self.model = self._load(self.request.weights_folder)
        for text in _warnings(self.ct, self.request, self.model):
            self._warn(text)
        gray = (measured - _LEVEL) / _HALF
        within = gray.clamp(-1.0, 1.0)
        beyond = self.operator.inverse(gray - within)
        mean, deviation = self._statistics(within)
        if not torch.isfinite(mean).all():
            raise LCTfoundError(
                f"The backbone's numbers ran out of the range of {self.choice.precision.value}; choose precision fp32, "
                "and if it happens there too, get the weight again."
            )
        wider = _WIDER[self.request.direction] + _WIDER_BY_FACTOR * self.request.factor
        interval = None if deviation is None else wider * _NORMAL * _HALF * deviation
        return (mean + beyond) * _HALF + _LEVEL, interval

    def _statistics(self, within: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the draws, on the CPU, summed up as they come (Welford, 1962)."""
        mean = squares = torch.zeros(())
        for number in range(self.request.samples):
            drawn = self._draw(within, number).cpu()
            before = drawn - mean
            mean = mean + before / (number + 1)
            squares = squares + before * (drawn - mean)
        self.evaluations = self.request.sampling.steps * self.request.samples
        count = self.request.samples
        return mean, (squares / (count - 1)).sqrt() if count > 1 else None

    def _draw(self, within: Tensor, number: int) -> Tensor:
        assert self.model is not None
        sampling, samples = self.request.sampling, self.request.samples
        finished = 0

        def show(share: float) -> None:
            done = (number + (finished + share) / sampling.steps) / samples
            self.progress.update(done, f"Drawing sample {number + 1} of {samples}")

        def told(done: int) -> None:
            nonlocal finished
            finished = done

        predict = SlicePredictor(self.model, self.choice, show, self._warn)
        within = within.to(self._place(within))
        start = interpolated(within, self.request.direction, self.request.factor).clamp(-1.0, 1.0)
        start = self.operator.consistent(start, within)
        drawn = sample_null_space(
            predict, lambda fine: self.operator.consistent(fine, within), start, sampling, self.request.seed, number,
            told,
        )  # fmt: skip
        self.choice = predict.choice
        return drawn

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.progress.warn(text)

    def _place(self, coarse: Tensor) -> torch.device:
        """The device for the whole stack where it takes little of its memory."""
        need = _bytes(coarse.shape, self.request)
        device = self.choice.device
        return device if need < free_memory(device) // 2 else torch.device("cpu")


def interpolated(coarse: Tensor, direction: Direction, factor: int) -> Tensor:
    """Cubic interpolation to the centers of finer voxels.

    Args:
        coarse: (N, H, W).
        direction: of the interpolation.
        factor: how many times finer.

    Returns:
        (N, H * factor, W * factor), or (N * factor, H, W).
    """
    if direction is Direction.IN_PLANE:
        return _cubic(coarse[:, None], factor, factor)[:, 0]
    return _cubic(coarse.transpose(0, 1)[:, None], factor, 1)[:, 0].transpose(0, 1)


def _cubic(images: Tensor, down: int, across: int) -> Tensor:
    size = (images.shape[-2] * down, images.shape[-1] * across)
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False)


# -- what goes in ----------------------------------------------------------------------------------------------------


def _checked(ct: Volume, request: SuperResolutionRequest) -> Tensor:
    """The values, float32 (N, H, W).

    Raises:
        UnsuitableImage, OutOfMemory: see :func:`super_resolve`.
    """
    if not ct.array.size:
        raise UnsuitableImage("The CT has no voxels; give one with slices.")
    if request.direction is Direction.SLICES and len(ct.array) < 2:
        raise UnsuitableImage(
            "Thin slices cannot be told from a single slice; give a CT of 2 slices at least, or make its pixels finer."
        )
    need, free = _bytes(ct.shape, request), free_memory()
    if need > free:
        raise OutOfMemory(
            f"The finer CT takes {need / 2**30:.1f} GB of memory and {free / 2**30:.1f} GB are free; crop the CT to "
            "the part in question or choose a smaller factor."
        )
    measured = _tensor(ct)
    if not torch.isfinite(measured).all():
        raise UnsuitableImage("Some values of the CT are no numbers; export the CT again from its source.")
    return measured


def _tensor(ct: Volume) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ct.array, dtype=np.float32))


def _bytes(shape: tuple[int, ...], request: SuperResolutionRequest) -> int:
    """That the work holds at a time, beside the network."""
    finer = request.factor ** (2 if request.direction is Direction.IN_PLANE else 1)
    return 4 * _ARRAYS * finer * int(np.prod(shape))


def _operator(ct: Volume, request: SuperResolutionRequest, thickness_mm: float) -> Downsampling:
    if request.direction is Direction.IN_PLANE:
        return AreaMeans(request.factor)
    return ThickSlices(len(ct.array), request.factor, thickness_mm * request.factor / ct.spacing[2])


def _thickness_in_header(ct: Volume) -> float | None:
    """Of a slice, mm, where the CT was scanned in axial slices and says so."""
    axial = int(np.abs(ct.direction[:, 2]).argmax()) == 2
    try:
        told = float(ct.metadata.get(_THICKNESS, ""))
    except ValueError:
        return None
    return told if axial and 0 < told < float("inf") else None


# -- what comes out --------------------------------------------------------------------------------------------------


def _on_grid(
    ct: Volume, array: np.ndarray, direction: Direction, size: float, thickness_mm: float | None = None
) -> Volume:
    """An array whose voxels are ``size`` times the CT's in one direction, and fill the same space."""
    sizes = np.array([1.0, size, size] if direction is Direction.IN_PLANE else [size, 1.0, 1.0])
    x, y, z = ct.world_from_index((sizes - 1.0) / 2)
    a, b, c = (float(step) for step in np.array(ct.spacing) * sizes[::-1])
    metadata = dict(ct.metadata)
    if direction is Direction.SLICES:
        metadata[_THICKNESS] = f"{c:g}" if thickness_mm is None else f"{thickness_mm:g}"
    return Volume(array, (a, b, c), (x, y, z), ct.direction, metadata)


def _warnings(ct: Volume, request: SuperResolutionRequest, model: FoundationModel) -> list[str]:
    found = [_MADE_UP]
    axis, what = (0, "pixels") if request.direction is Direction.IN_PLANE else (2, "slices")
    reached = ct.spacing[axis] / request.factor
    if model.card is not None and reached < model.card.spacing[axis] / 2:
        found.append(
            f"The backbone learned from {what} of {model.card.spacing[axis]:g} mm and has hardly seen detail of "
            f"{reached:.2g} mm; a smaller factor is safer."
        )
    if request.direction is Direction.SLICES and model.recipe.slices is not Slices.NEIGHBORS:
        found.append("This backbone sees one slice at a time: the thin slices it made may not fit each other.")
    return found


def _provenance(ct: Volume, request: SuperResolutionRequest, run: _Run, thickness_mm: float) -> dict[str, Any]:
    drawn = request.method is Method.NULL_SPACE
    card = None if run.model is None else run.model.card
    weights = {} if card is None else {
        card.name: {"version": card.version, "sha256": card.sha256, "license": card.license}
    }  # fmt: skip
    return {
        "product": f"LCTfound {LCTfoundLib.__version__}",
        "task": "super-resolution",
        "synthetic detail": drawn,
        "direction": request.direction.value,
        "factor": request.factor,
        "method": request.method.value,
        "slice thickness mm": thickness_mm if request.direction is Direction.SLICES else None,
        "input": {"shape": list(ct.shape), "spacing": list(ct.spacing)},
        "samples": request.samples if drawn else None,
        "sampling": {**vars(request.sampling)} if drawn else None,
        "seed": request.seed if drawn else None,
        "network evaluations a slice": run.evaluations,
        "weights": weights,
        "device": f"{run.choice.device} ({run.choice.name}), {run.choice.precision.value}",
        "versions": {name: version(name) for name in ("numpy", "torch")},
    }
