"""Runs the unmodified Slicer modules of this repository without Slicer: real MRML from slicer-core, Qt from PySide6.

For tests and `./run panel` only. What is shown is this host, not 3D Slicer.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["SHIMS", "install_shims"]

#: Holds `qt` and `ctk`, which only the host may see: in Slicer the native ones are used.
SHIMS = Path(__file__).resolve().parent / "shims"


def install_shims() -> None:
    """Make `import qt` and `import ctk` work. Call it before any module file is imported."""
    if str(SHIMS) not in sys.path:
        sys.path.insert(0, str(SHIMS))
