"""`import qt` as in Slicer: all of Qt flat, with PythonQt's manners. On the path on the host only."""

from host.qt_compat import flat_names

globals().update(flat_names())
__all__ = [name for name in globals() if not name.startswith("_") and name != "flat_names"]  # noqa: PLE0605
del flat_names
