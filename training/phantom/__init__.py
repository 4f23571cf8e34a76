"""The synthetic thorax: anatomy, trees, diseases, and any scan of them with exact labels.

from training.phantom import phantom, Phase
scan = phantom(seed=7, contrast=Phase.MIXED)
scan.ct, scan.segments, scan.trees, scan.visible, scan.organs, scan.lobes, scan.graphs, scan.masks
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["Contrast", "Patient", "Phase", "Regime", "Rendered", "Scan", "make_patient", "phantom"]


def __getattr__(name: str) -> Any:
    # Deferred, so that one part (say, the anatomy alone) does not import all others.
    if name in __all__:
        return getattr(import_module("training.phantom.render"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
