"""`import ctk` as in Slicer: stand-ins for the widgets that panels use. On the path on the host only."""

from host.ctk_widgets import CLASSES

globals().update(CLASSES)
__all__ = list(CLASSES)  # noqa: PLE0605
del CLASSES
