"""Keeps `None` alive under PySide6 6.12.0 on Python 3.11.

That release is built as if None were immortal, which it is from Python 3.12 on: each call without a result gives a
reference to None away that it never took. After some ten thousand calls Python ends with "deallocating None".
PySide6 6.11.3 counts right.
"""

from __future__ import annotations

import ctypes
import sys

#: More references than a session can lose.
_MANY = 1 << 40


def holdNone() -> None:
    """Give None more references than a session can lose; at once and once per process."""
    if sys.version_info < (3, 12) and sys.getrefcount(None) < _MANY // 2:
        ctypes.c_ssize_t.from_address(id(None)).value += _MANY
