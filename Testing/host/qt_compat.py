"""PySide6 with the manners of PythonQt, the Qt binding of Slicer.

The differences a module file sees, made good here for every Qt class that exists, so that widgets made by C++ obey too:

- Q_PROPERTYs are attributes: `label.text`, `button.enabled = True`. `label.text()` raises TypeError, as in Slicer.
- Signals are connected by signature: `button.connect("clicked(bool)", f)`; f gets as many arguments as it takes.
- `name`, `className()`, `delete()`, dynamic properties and named children are attributes.
- Enum values are ints; lists in properties and signals are tuples.
- The static dialogs return the bare value.

Stricter than Slicer where Slicer only prints: an unknown signal raises UnknownSignal. As strict as Slicer where PySide6
is lax: an attribute that a Qt class does not have cannot be set.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

# Enums as ints; PySide6 reads this once, when it is first imported.
if "shiboken6" in sys.modules and getattr(sys, "pyside6_option_python_enum", 0) != 0x03:
    raise ImportError("PySide6 was imported before the host could set its options: import qt, or the host, first")
sys.pyside6_option_python_enum = 0x03  # type: ignore[attr-defined]

import shiboken6  # noqa: E402
from PySide6 import QtCore, QtGui, QtSvg, QtWidgets  # noqa: E402

__all__ = ["QtCore", "QtGui", "QtSvg", "QtWidgets", "UnknownSignal", "flat_names", "patch", "properties", "signals"]

_QT_MODULES = (QtCore, QtGui, QtWidgets, QtSvg)
#: What PySide6 adds to Qt and PythonQt does not have.
_NOT_IN_PYTHONQT = {"ClassInfo", "MetaFunction", "MetaSignal", "PyClassProperty", "QEnum", "QFlag", "SIGNAL", "SLOT"}
_NOT_IN_PYTHONQT |= {"SignalInstance"}
#: Signals that panels may be tempted to use although Slicer's Qt 5.15 does not have them.
_ONLY_IN_QT6 = {("QCheckBox", "checkStateChanged")}
_ONLY_IN_QT6 |= {("QAction", name) for name in ("checkableChanged", "enabledChanged", "visibleChanged")}

_inherited_set = shiboken6.Shiboken.Object.__setattr__
_inherited_get = QtCore.QObject.__getattribute__
_static_connect, _static_disconnect = QtCore.QObject.connect, QtCore.QObject.disconnect
_read_property, _write_property = QtCore.QObject.property, QtCore.QObject.setProperty


class UnknownSignal(AttributeError):
    """A signal that the object does not have was to be connected. Slicer prints a warning and does nothing."""


# -- what a class offers ----------------------------------------------------------------------------------------------


@cache
def properties(cls: type) -> dict[str, bool]:
    """The Q_PROPERTYs of a class: name -> can be set."""
    meta = cls.staticMetaObject  # type: ignore[attr-defined]
    found = (meta.property(n) for n in range(meta.propertyCount()))
    return {prop.name(): prop.isWritable() for prop in found}


@cache
def signals(cls: type) -> dict[str, str]:
    """The signals of a class: signature in Slicer -> signature in PySide6.

    They differ for stand-ins that send VTK objects, which Qt knows here as Python objects only. Signals that Qt 5 does
    not have are left out.
    """
    meta = cls.staticMetaObject  # type: ignore[attr-defined]
    methods = [meta.method(n) for n in range(meta.methodCount())]
    kind = QtCore.QMetaMethod.MethodType.Signal
    native = [_signature(method) for method in methods if method.methodType() == kind and not _only_in_qt6(method)]
    renamed: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        renamed |= vars(base).get("signal_signatures", {})
    hidden = set(renamed.values())
    return {signature: signature for signature in native if signature not in hidden} | renamed


def _signature(method: QtCore.QMetaMethod) -> str:
    return bytes(method.methodSignature().data()).decode()


def _only_in_qt6(method: QtCore.QMetaMethod) -> bool:
    return (method.enclosingMetaObject().className(), bytes(method.name().data()).decode()) in _ONLY_IN_QT6


def normalized(signature: str) -> str:
    """`valueChanged( const QString & )` -> `valueChanged(QString)`; as Qt compares them."""
    return bytes(QtCore.QMetaObject.normalizedSignature(signature).data()).decode()


# -- signals ----------------------------------------------------------------------------------------------------------

#: (address of the sender, signature in PySide6) -> [(callable, connection)]
_connections: dict[tuple[int, str], list[tuple[Callable, Any]]] = {}


def _native_signal(sender: Any, signature: str) -> str:
    known = signals(type(sender))
    found = known.get(normalized(signature))
    if found is None:
        name = signature.split("(")[0]
        similar = sorted(s for s in known if s.split("(")[0] == name) or sorted(known)
        raise UnknownSignal(f"{type(sender).__name__} has no signal {signature}; it has {', '.join(similar)}")
    return found


def _accepted_arguments(callback: Callable) -> int | None:
    """How many arguments PythonQt would pass; None: all. Arguments with defaults count."""
    function = callback.__func__ if isinstance(callback, MethodType) else callback
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    if code.co_flags & inspect.CO_VARARGS:
        return None
    return code.co_argcount - isinstance(callback, MethodType)


def _trimmed(callback: Callable) -> Callable:
    count = _accepted_arguments(callback)
    return lambda *arguments: callback(*map(_as_tuple, arguments[:count]))


def _as_tuple(value: Any) -> Any:
    """PythonQt gives a QStringList as a tuple."""
    return tuple(value) if type(value) is list else value


def _connect(self: Any, signature: str, receiver: Any, slot: str | None = None) -> bool:
    """`connect("clicked()", callable)` or `connect("clicked()", object, "slot()")`."""
    native = _native_signal(self, signature)
    callback = receiver if slot is None else getattr(receiver, slot.split("(")[0])
    if not callable(callback):
        raise TypeError(f"{signature} of {type(self).__name__} cannot be connected to {callback!r}")
    trimmed = _trimmed(callback)
    connection = _static_connect(self, QtCore.SIGNAL(native), trimmed)
    address = shiboken6.Shiboken.getCppPointer(self)[0]
    if not any(key[0] == address for key in _connections):
        _static_connect(self, QtCore.SIGNAL("destroyed()"), lambda: _forget(address))
    _connections.setdefault((address, native), []).append((callback, connection))
    return bool(connection)


def _disconnect(self: Any, signature: str, receiver: Any = None, slot: str | None = None) -> bool:
    """The opposite of connect; without a receiver, of all that was connected to the signal."""
    key = (shiboken6.Shiboken.getCppPointer(self)[0], _native_signal(self, signature))
    callback = receiver if slot is None else getattr(receiver, slot.split("(")[0])
    kept, found = [], False
    for known, connection in _connections.get(key, []):
        if callback is None or known == callback:
            _static_disconnect(connection)
            found = True
        else:
            kept.append((known, connection))
    _connections[key] = kept
    return found


def _forget(address: int) -> None:
    for key in [key for key in _connections if key[0] == address]:
        del _connections[key]


# -- attributes -------------------------------------------------------------------------------------------------------


def _class_name(self: Any) -> str:
    """Not from metaObject(): PySide6 would take the class's meta object down with this instance."""
    return type(self).__name__


def _delete(self: Any) -> None:
    shiboken6.delete(self)


def _exec(self: Any, *arguments: Any) -> Any:
    """Slicer's modules say exec_; PySide6 warns of it."""
    return self.exec(*arguments)


_METHODS = {"connect": _connect, "disconnect": _disconnect, "className": _class_name, "delete": _delete}


def _get(self: Any, name: str) -> Any:
    """Attributes in PythonQt's order: what the class has, then dynamic properties, then named children."""
    if name in _METHODS:
        return MethodType(_METHODS[name], self)
    if name == "name":
        return _read_property(self, "objectName")
    if name in _static_getters(type(self)):
        return _read_property(self, name)
    try:
        value = _inherited_get(self, name)
        return _as_tuple(value) if name in properties(type(self)) else value
    except AttributeError:
        if name.startswith("__"):
            raise
    if QtCore.QByteArray(name.encode()) in QtCore.QObject.dynamicPropertyNames(self):
        return _read_property(self, name)
    for child in QtCore.QObject.children(self):
        if _read_property(child, "objectName") == name:
            return child
    raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


def _set(self: Any, name: str, value: Any) -> None:
    """Sets properties and dynamic properties; a class written in Python may have attributes of its own besides."""
    if name.startswith("__") or isinstance(value, QtCore.SignalInstance):  # PySide6's own, when signals are first used
        _inherited_set(self, name, value)
    elif name == "name":
        _write_property(self, "objectName", value)
    elif name in properties(type(self)):
        _set_property(self, name, value)
    elif QtCore.QByteArray(name.encode()) in QtCore.QObject.dynamicPropertyNames(self):
        _write_property(self, name, value)
    elif _may_have_own_attributes(type(self), name):
        _inherited_set(self, name, value)
    elif hasattr(type(self), name):
        raise AttributeError(f"'{name}' of {type(self).__name__} is a method or a signal and cannot be replaced")
    elif not _is_from_loader(value):
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}' to set")


def _is_from_loader(value: Any) -> bool:
    """PySide6's loader makes every part of a window an attribute of the window, PythonQt only the direct children."""
    return isinstance(value, QtCore.QObject) and sys._getframe(2).f_globals.get("__name__") == "host.ui_loader"


def _set_property(self: Any, name: str, value: Any) -> None:
    if not properties(type(self))[name]:
        raise AttributeError(f"the property '{name}' of {type(self).__name__} is read-only")
    value = list(value) if isinstance(value, tuple) else value  # a tuple is as good for a QStringList in PythonQt
    own = inspect.getattr_static(type(self), name, None)
    if own is not None and hasattr(own, "__set__"):
        _inherited_set(self, name, value)
    elif not _write_property(self, name, value):
        raise TypeError(f"the property '{name}' of {type(self).__name__} does not accept {value!r}")


def _may_have_own_attributes(cls: type, name: str) -> bool:
    module = cls.__module__
    if module.startswith("PySide6"):
        return False
    if module.startswith("host."):  # a stand-in for a C++ class: only the host itself keeps something in it
        return name.startswith("_") and sys._getframe(2).f_globals.get("__name__", "").startswith("host.")
    return True


@cache
def _static_getters(cls: type) -> frozenset[str]:
    """Properties whose name is also a static method (QTimer.singleShot): the class keeps the method."""
    found = {name: inspect.getattr_static(cls, name, None) for name in properties(cls)}
    return frozenset(name for name, item in found.items() if isinstance(item, staticmethod))


# -- making Qt's classes so -------------------------------------------------------------------------------------------


class _QtProperty:
    """One Q_PROPERTY as an attribute; the typed getter and setter of PySide6 where there are some."""

    def __init__(self, cls: type, name: str) -> None:
        self.name = name
        self.getter = _first_method(cls, name, f"is{name[0].upper()}{name[1:]}")
        self.setter = f"set{name[0].upper()}{name[1:]}"
        self.__doc__ = f"Q_PROPERTY {name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        return self.getter(instance) if self.getter else _read_property(instance, self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        try:
            if hasattr(type(instance), self.setter):  # by name: a class in Python may have overridden it
                getattr(instance, self.setter)(value)
                return
        except TypeError:  # PythonQt takes an int for an enum, and so does setProperty
            if isinstance(value, str) or not _write_property(instance, self.name, value):
                raise
            return
        if not _write_property(instance, self.name, value):
            raise TypeError(f"the property '{self.name}' of {type(instance).__name__} does not accept {value!r}")


def _first_method(cls: type, *names: str) -> Callable | None:
    for name in names:
        for base in cls.__mro__:
            found = vars(base).get(name)
            if isinstance(found, _QtProperty):
                return found.getter
            if found is not None and not isinstance(found, staticmethod) and callable(found):
                return found
    return None


def patch(cls: type) -> None:
    """Give one class of Qt the manners of PythonQt; its bases must have got them before."""
    for name in properties(cls):
        inherited = inspect.getattr_static(cls, name, None)
        if isinstance(inherited, staticmethod) or (isinstance(inherited, _QtProperty) and name not in vars(cls)):
            continue
        setattr(cls, name, _QtProperty(cls, name))
    if "exec_" in vars(cls):
        cls.exec_ = _exec  # type: ignore[attr-defined]
    cls.__getattribute__ = _get  # type: ignore[method-assign,assignment]
    cls.__setattr__ = _set  # type: ignore[method-assign,assignment]


def _qt_classes() -> list[type]:
    """Every class below QObject, bases first."""
    found = {
        item
        for module in _QT_MODULES
        for item in _contents(module).values()
        if isinstance(item, type) and issubclass(item, QtCore.QObject)
    }
    return sorted(found, key=lambda cls: len(cls.__mro__))


def _return_bare_values() -> None:
    """The dialogs of PySide6 answer (value, filter) or (value, ok); those of PythonQt the value alone."""
    for cls, names in (
        (QtWidgets.QFileDialog, ("getOpenFileName", "getOpenFileNames", "getSaveFileName")),
        (QtWidgets.QInputDialog, ("getText", "getMultiLineText", "getInt", "getDouble", "getItem")),
    ):
        for name in names:
            setattr(cls, name, staticmethod(_first_of(getattr(cls, name))))


def _first_of(dialog: Callable) -> Callable:
    def ask(*arguments: Any, **keywords: Any) -> Any:
        return _as_tuple(dialog(*arguments, **keywords)[0])

    ask.__name__, ask.__doc__ = dialog.__name__, dialog.__doc__
    return ask


def flat_names() -> dict[str, Any]:
    """Everything of QtCore, QtGui, QtWidgets and QtSvg by its name, as in Slicer's `qt`."""
    names: dict[str, Any] = {}
    for module in _QT_MODULES:
        names |= {n: item for n, item in _contents(module).items() if n not in _NOT_IN_PYTHONQT}
    return names


def _contents(module: Any) -> dict[str, Any]:
    """All public names; PySide6 makes classes when they are first asked for, so its dictionary does not have them."""
    return {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}


for _cls in _qt_classes():
    patch(_cls)
_return_bare_values()
