"""One exception class per thing the user can mend; every message names the remedy."""

from __future__ import annotations

__all__ = [
    "Cancelled",
    "LCTfoundError",
    "OutOfMemory",
    "OutputError",
    "UnsuitableImage",
    "UnsuitableProjections",
    "WeightError",
]


class LCTfoundError(Exception):
    """Base of all errors whose message is meant for the user: one sentence with the remedy."""


class UnsuitableImage(LCTfoundError):
    """The input cannot be used: not a CT, not in HU, slices missing, no lungs in view, ..."""


class UnsuitableProjections(LCTfoundError):
    """Sinogram or scan geometry cannot be used: angles missing, detector too short, shapes that do not match, ..."""


class WeightError(LCTfoundError):
    """A weight file or its card is missing, damaged or not to be trusted."""


class OutputError(LCTfoundError):
    """The output place cannot be written: read-only, full, or holds another run's result."""


class OutOfMemory(LCTfoundError):
    """The work does not fit the memory even with the smallest tiles on the CPU."""


class Cancelled(LCTfoundError):
    """The user stopped the run."""
