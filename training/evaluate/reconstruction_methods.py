"""The methods that reconstruct a slice from its projections, behind one interface.

A method is made once for a setting (there it loads its weights) and then called with sinograms:

    @register("mine", "My method", weight=(0.1, 0.3, 1.0))
    def _mine(setting: Setting) -> Reconstructor:
        network = load(...)
        def reconstruct(sinogram, projector, context):
            ...
            return Reconstructed(hu, evaluations=8)
        return reconstruct

What it may know of a slice is the sinogram, the geometry and the :class:`Context`; never the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.physics.noise import Dose
from LCTfoundLib.physics.projector import Projector

__all__ = [
    "METHODS",
    "Context",
    "Method",
    "Reconstructed",
    "Reconstructor",
    "Setting",
    "methods_named",
    "register",
]


@dataclass(frozen=True)
class Setting:
    """What is the same for all slices of a table.

    Attributes:
        size: pixels of a side.
        views: projections over a half turn.
        dose: photons of the measurement and its electronics' noise; None for line integrals as they are, as the paper
            simulates.
        device: of the tensors.
        seed: of the noise, and of methods that draw.
        weights: folder of the networks' weights, looked into before the usual places.
        paper_steps: network evaluations of the published recipe.
    """

    size: int
    views: int
    dose: Dose | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    weights: Path | None = None
    paper_steps: int = 2000

    @property
    def noise(self) -> str:
        """For tables and keys."""
        if self.dose is None:
            return "none"
        return f"quantum {self.dose.photons * self.dose.fraction:g} photons, electronic {self.dose.electronic_noise:g}"


@dataclass(frozen=True)
class Context:
    """What a method is told beside sinogram and projector.

    Attributes:
        setting: of the table.
        parameters: of the method, chosen on training slices.
        seed: for what it draws, another one for each slice.
    """

    setting: Setting
    parameters: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Reconstructed:
    """What a method answers.

    Attributes:
        hu: float32 (N, S, S).
        evaluations: of a network, for a slice; 0 for classical methods.
        interval_hu: half of the width of the interval that should hold a pixel's true value in 9 of 10 cases, (N, S,
            S); None for methods that do not tell.
    """

    hu: Tensor
    evaluations: int = 0
    interval_hu: Tensor | None = None


class Reconstructor(Protocol):
    """A method, ready to run."""

    def __call__(self, sinogram: Tensor, projector: Projector, context: Context) -> Reconstructed:
        """Reconstruct line integrals (N, views, detectors)."""
        ...


@dataclass(frozen=True)
class Method:
    """A method by its name.

    Attributes:
        name: to call it by.
        title: for tables and pictures.
        make: a reconstructor for a setting.
        grid: values of each parameter to choose among on training slices; empty if it has none.
    """

    name: str
    title: str
    make: Callable[[Setting], Reconstructor]
    grid: Mapping[str, Sequence[Any]]


METHODS: dict[str, Method] = {}


def register(
    name: str, title: str, **grid: Sequence[Any]
) -> Callable[[Callable[[Setting], Reconstructor]], Callable[[Setting], Reconstructor]]:
    """Make a function that makes a reconstructor known by a name; ``grid`` are the values to choose among."""

    def known(make: Callable[[Setting], Reconstructor]) -> Callable[[Setting], Reconstructor]:
        if name in METHODS:
            raise ValueError(f"there is a method {name} already")
        METHODS[name] = Method(name, title, make, grid)
        return make

    return known


def methods_named(names: Sequence[str]) -> list[Method]:
    """Methods by their names.

    Raises:
        LCTfoundError: one is not known.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise LCTfoundError(f"There is no method {', '.join(unknown)}; choose among {', '.join(METHODS)}.")
    return [METHODS[name] for name in dict.fromkeys(names)]
