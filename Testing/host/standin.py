"""What stand-ins for C++ widgets are made of: real Q_PROPERTYs, so .ui files, setProperty and attributes agree."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from host.qt_compat import QtCore

__all__ = ["computed", "flags", "forwarded", "stored"]

#: How a value becomes one of the property's type; TypeError for what PythonQt would refuse.
_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    bool: lambda value: bool(operator.index(value)),
    int: operator.index,
    float: lambda value: operator.truediv(value, 1),
    "QStringList": lambda value: [_text(item) for item in _sequence(value)],
}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string is needed, not {value!r}")
    return value


def _sequence(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


_CONVERSIONS[str] = _text


def computed(kind: Any, getter: Callable[[Any], Any] | str, setter: Callable[[Any, Any], None] | str = "") -> Any:
    """A Q_PROPERTY that is worked out. A getter may be the path of an attribute, a setter the name of a method;
    without a setter it is read-only."""
    convert = _CONVERSIONS.get(kind, lambda value: value)
    get = operator.attrgetter(getter) if isinstance(getter, str) else getter

    def put(self: Any, value: Any) -> None:
        (getattr(type(self), setter) if isinstance(setter, str) else setter)(self, convert(value))

    return QtCore.Property(kind, lambda self: get(self), put if setter else None)


def forwarded(kind: Any, path: str) -> Any:
    """A Q_PROPERTY that is the one of a part: `_box.prefix`."""
    part, name = path.split(".")
    return computed(kind, path, lambda self, value: setattr(getattr(self, part), name, value))


def stored(kind: Any, name: str, default: Any, changed: str = "") -> Any:
    """A Q_PROPERTY that is remembered; `changed` names the method to call when it becomes another."""
    field = f"_property_{name}"

    def get(self: Any) -> Any:
        value = self.__dict__.get(field, default)
        return list(value) if isinstance(value, list) else value

    def put(self: Any, value: Any) -> None:
        if get(self) == value:
            return
        self.__dict__[field] = value
        if changed:
            getattr(self, changed)()

    return computed(kind, get, put)


def flags(**names: int) -> Callable[[type], type]:
    """Class decorator: enum values of the C++ class, flat, as PythonQt offers them."""

    def decorate(cls: type) -> type:
        for name, value in names.items():
            setattr(cls, name, value)
        return cls

    return decorate
