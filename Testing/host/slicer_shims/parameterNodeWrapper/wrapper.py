"""`@parameterNodeWrapper`: the members of a class become typed parameters of a vtkMRMLScriptedModuleNode."""

from __future__ import annotations

import typing
import weakref
from collections.abc import Callable
from typing import Any

import slicer
import vtk

from .packs import dataTypeOf, declaredDefault
from .storage import Storage, storageFor

SlicerParameterNamePropertyName = "SlicerParameterName"
#: Values are read again before anybody else hears of a change.
_FIRST = 1000.0


def isParameterNodeWrapper(classOrObj: Any) -> bool:
    return bool(getattr(classOrObj, "_is_parameter_node_wrapper", False))


def findChildWidgetForParameter(widget: Any, parameter: str) -> Any:
    """The child that is bound to `parameter`, or None."""
    import qt

    children = widget.findChildren(qt.QWidget)
    return next((w for w in children if w.property(SlicerParameterNamePropertyName) == parameter), None)


def parameterNodeWrapper(classtype: type | None = None) -> Any:
    """Class decorator, with or without parentheses."""
    return _wrap if classtype is None else _wrap(classtype)


def _wrap(kind: type) -> type:
    hints = typing.get_type_hints(kind, include_extras=True)
    kind._hints, kind.allParameters, kind._defaults = hints, {}, {}
    for name, hint in hints.items():
        try:
            storage = storageFor(hint)
        except TypeError as problem:
            raise TypeError(f"{kind.__name__}.{name}: {problem}") from problem
        kind.allParameters[name], kind._defaults[name] = storage, declaredDefault(kind, name, storage)
        setattr(kind, name, _property(name))
    for name, member in _WrapperMethods.__dict__.items():
        if not name.startswith("__") or name in ("__init__", "__setattr__"):
            if name in hints:
                raise ValueError(f"Cannot use reserved name '{name}' in a parameterNodeWrapper")
            setattr(kind, name, member)
    return kind


def _property(name: str) -> property:
    return property(lambda self: self._read(name), lambda self, value: self._write(name, value))


class _WrapperMethods:
    """Methods that every wrapper class gets."""

    _is_parameter_node_wrapper = True

    def __init__(self, parameterNode: Any, prefix: str | None = None) -> None:
        self.parameterNode = parameterNode
        self._prefix = prefix or ""
        self._cache: dict[str, Any] = {}
        self._bindings: dict[int, _Binding] = {}
        self._nextTag = 0
        self._writeMissingDefaults()
        me = weakref.ref(self)
        tag = parameterNode.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: _readAgain(me), _FIRST)
        weakref.finalize(self, parameterNode.RemoveObserver, tag)
        self._readAll()

    def _writeMissingDefaults(self) -> None:
        with slicer.util.NodeModify(self.parameterNode):
            for name, storage in self.allParameters.items():
                if not storage.isIn(self.parameterNode, self._prefix + name):
                    storage.write(self.parameterNode, self._prefix + name, self._defaults[name].value)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name != "parameterNode" and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no parameter {name!r}")
        object.__setattr__(self, name, value)

    def _readAll(self) -> None:
        self._cache.clear()
        for name in self.allParameters:
            self._read(name)

    def _read(self, name: str) -> Any:
        """From the cache: what the parameter was when the node last told of a change."""
        if name not in self._cache:
            value = self._fresh(name)
            if not self.allParameters[name].isCached:
                return value
            self._cache[name] = value
        return self._cache[name]

    def _fresh(self, name: str) -> Any:
        storage: Storage = self.allParameters[name]
        if storage.isIn(self.parameterNode, self._prefix + name):
            return storage.read(self.parameterNode, self._prefix + name)
        return self._defaults[name].value

    def _write(self, name: str, value: Any) -> None:
        with slicer.util.NodeModify(self.parameterNode):
            self.allParameters[name].write(self.parameterNode, self._prefix + name, value)
            self._cache.pop(name, None)
            self._read(name)

    def default(self, name: str) -> Any:
        dataTypeOf(type(self), name)
        return self._defaults[name]

    def isCached(self, name: str) -> bool:
        dataTypeOf(type(self), name)
        return self.allParameters[name].isCached

    dataType = classmethod(dataTypeOf)

    def getValue(self, name: str) -> Any:
        dataTypeOf(type(self), name)
        head, _, rest = name.partition(".")
        return self._read(head).getValue(rest) if rest else self._read(head)

    def setValue(self, name: str, value: Any) -> None:
        dataTypeOf(type(self), name)
        head, _, rest = name.partition(".")
        if rest:
            self._read(head).setValue(rest, value)
        else:
            self._write(head, value)

    def connectGui(self, gui: Any) -> int:
        """Bind the widgets that have the property SlicerParameterName; returns the tag for disconnectGui.

        Args:
            gui: a widget, whose children are searched, or what `slicer.util.childWidgetVariables` returned.
        """
        return self.connectParametersToGui(_boundWidgets(gui))

    def connectParametersToGui(self, mapping: dict[str, Any]) -> int:
        """Bind widgets by hand. `mapping`: parameter name (`pack.member` too) -> widget or GuiConnector."""
        self._nextTag += 1
        self._bindings[self._nextTag] = _Binding(self, mapping)
        return self._nextTag

    def disconnectGui(self, guiTag: int | None) -> None:
        binding = self._bindings.pop(guiTag, None)
        if binding is not None:
            binding.release()

    def AddObserver(self, event: Any, callback: Callable[..., Any], priority: float = 0.0) -> int:
        return self.parameterNode.AddObserver(event, callback, priority)

    def RemoveObserver(self, tag: int) -> None:
        self.parameterNode.RemoveObserver(tag)

    def StartModify(self) -> int:
        return self.parameterNode.StartModify()

    def EndModify(self, wasModified: int) -> int:
        return self.parameterNode.EndModify(wasModified)

    def Modified(self) -> None:
        self.parameterNode.Modified()


def _readAgain(reference: weakref.ref[Any]) -> None:
    """At once, as Slicer does: a node that comes into the scene later is not seen until the next change."""
    wrapper = reference()
    if wrapper is not None:
        wrapper._readAll()


def _boundWidgets(gui: Any) -> dict[str, Any]:
    import qt

    widgets = gui.findChildren(qt.QWidget) if isinstance(gui, qt.QWidget) else list(vars(gui).values())
    named = ((str(widget.property(SlicerParameterNamePropertyName) or ""), widget) for widget in widgets)
    return {name: widget for name, widget in named if name}


class _Binding:
    """Widgets and parameters that follow each other until released."""

    def __init__(self, wrapper: Any, mapping: dict[str, Any]) -> None:
        from .connectors import GuiConnector, createGuiConnector

        self._wrapper, self._isShowing = wrapper, False
        kinds = {name: wrapper.dataType(name) for name in mapping}
        self._connectors = {
            name: widget if isinstance(widget, GuiConnector) else createGuiConnector(widget, kinds[name])
            for name, widget in mapping.items()
        }
        self._show()
        for name, connector in self._connectors.items():
            connector.onChanged(lambda name=name, connector=connector: self._keep(name, connector))
            connector.widget.connect("destroyed()", lambda name=name: self._connectors.pop(name, None))
        self._tag = wrapper.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._show())

    def _show(self) -> None:
        """Parameters -> widgets."""
        if self._isShowing:
            return
        self._isShowing = True
        try:
            for name, connector in self._connectors.items():
                connector.write(self._wrapper.getValue(name))
        finally:
            self._isShowing = False

    def _keep(self, name: str, connector: Any) -> None:
        """Widget -> parameter."""
        if not self._isShowing:
            self._wrapper.setValue(name, connector.read())

    def release(self) -> None:
        for connector in self._connectors.values():
            connector.onChanged(None)
        self._wrapper.RemoveObserver(self._tag)
