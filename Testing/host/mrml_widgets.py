"""Stand-ins for Slicer's MRML widgets: real MRML nodes, watched by VTK observers, in plain Qt widgets.

Only what PythonQt shows of the real classes is public: properties, signals, slots and invokable methods. A method that
is missing here raises AttributeError when called.
"""

from __future__ import annotations

from host import mrml_base, mrml_markups_widgets, mrml_node_widgets, mrml_segment_widgets

#: Name of the class in Slicer -> its stand-in.
CLASSES: dict[str, type] = {
    name: item
    for module in (mrml_base, mrml_node_widgets, mrml_segment_widgets, mrml_markups_widgets)
    for name, item in vars(module).items()
    if isinstance(item, type) and name.startswith(("qMRML", "qSlicer"))
}
globals().update(CLASSES)
__all__ = list(CLASSES)  # noqa: PLE0605
