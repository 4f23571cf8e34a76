"""`@parameterPack`: parameters that belong together. A pack read from a node is a view: setting a member writes it."""

from __future__ import annotations

import copy
import typing
from typing import Any

from .annotations import Default, split
from .storage import NodeStorage, Storage, storageFor


def isParameterPack(classOrObj: Any) -> bool:
    return bool(getattr(classOrObj, "_is_parameterPack", False))


class PackStorage(Storage):
    """Each member under `name.member`."""

    def __init__(self, packClass: type) -> None:
        self._pack = packClass
        self.isCached = all(member.isCached for member in packClass._members.values())

    def default(self) -> Any:
        return self._pack()

    def check(self, value: Any) -> None:
        if not isinstance(value, self._pack):
            raise TypeError(f"Value must be a {self._pack.__name__}, is {value!r}")
        super().check(value)

    def isIn(self, node: Any, name: str) -> bool:
        return all(
            member.isIn(node, f"{name}.{key}") for key, member in self._pack._members.items() if _isAlwaysKept(member)
        )

    def read(self, node: Any, name: str) -> Any:
        pack = self._pack.__new__(self._pack)
        object.__setattr__(pack, "_place", (node, name))
        return pack

    def detached(self, value: Any) -> Any:
        return copy.deepcopy(value)

    def _write(self, node: Any, name: str, value: Any) -> None:
        for key, member in self._pack._members.items():
            member.write(node, f"{name}.{key}", getattr(value, key))

    def remove(self, node: Any, name: str) -> None:
        for key, member in self._pack._members.items():
            member.remove(node, f"{name}.{key}")


def _isAlwaysKept(member: Storage) -> bool:
    """A reference to no node leaves no trace in the parameter node."""
    return not isinstance(member, NodeStorage)


class _Member:
    """Descriptor of one member: in the pack itself, or in the node that the pack was read from."""

    def __init__(self, name: str, storage: Storage) -> None:
        self._name, self._storage = name, storage

    def __get__(self, pack: Any, owner: type | None = None) -> Any:
        if pack is None:
            return self
        place = pack.__dict__.get("_place")
        if place is None:
            return _values(pack)[self._name]
        return self._storage.read(place[0], f"{place[1]}.{self._name}")

    def __set__(self, pack: Any, value: Any) -> None:
        place = pack.__dict__.get("_place")
        if place is None:
            self._storage.check(value)
            _values(pack)[self._name] = value
        else:
            self._storage.write(place[0], f"{place[1]}.{self._name}", value)


def _values(pack: Any) -> dict[str, Any]:
    """The members of a pack of its own; they begin with their defaults."""
    if "_own" not in pack.__dict__:
        object.__setattr__(pack, "_own", {name: default.value for name, default in type(pack)._defaults.items()})
    return pack.__dict__["_own"]


def parameterPack(classtype: type | None = None) -> Any:
    """Class decorator, with or without parentheses."""
    return _pack if classtype is None else _pack(classtype)


def _pack(kind: type) -> type:
    hints = typing.get_type_hints(kind, include_extras=True)
    if reserved := hints.keys() & {*_PACK_METHODS, "_hints", "_members", "_defaults", "_is_parameterPack"}:
        raise ValueError(f"Cannot use reserved name '{reserved.pop()}' in a parameterPack")
    kind._hints, kind._members, kind._defaults = hints, {}, {}
    for name, hint in hints.items():
        storage = storageFor(hint)
        kind._members[name], kind._defaults[name] = storage, declaredDefault(kind, name, storage)
        setattr(kind, name, _Member(name, storage))
    kind._is_parameterPack = True
    for name, method in _PACK_METHODS.items():
        if name not in kind.__dict__:
            setattr(kind, name, method)
    return kind


def declaredDefault(kind: type, name: str, storage: Storage) -> Default:
    """`= value` in the class comes before `Default(...)` in the annotation, and that before the type's own."""
    if name in kind.__dict__:
        default = Default(kind.__dict__[name])
    else:
        default = storage.annotations.default or Default(generator=storage.default)
    return default


def _init(self: Any, *values: Any, **named: Any) -> None:
    names = list(self._members)
    if len(values) > len(names):
        raise ValueError(f"{type(self).__name__} takes at most {len(names)} values")
    given = dict(zip(names, values, strict=False))
    if doubled := given.keys() & named.keys():
        raise ValueError(f"Given twice: {', '.join(sorted(doubled))}")
    if unknown := named.keys() - set(names):
        raise ValueError(f"{type(self).__name__} has no member {', '.join(sorted(unknown))}")
    for name, value in {**given, **named}.items():
        setattr(self, name, value)


def _equal(self: Any, other: Any) -> bool:
    return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in self._members)


def _text(self: Any) -> str:
    return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._members)})"


def _setattr(self: Any, name: str, value: Any) -> None:
    if not hasattr(type(self), name):
        raise AttributeError(f"{type(self).__name__} has no member {name}")
    object.__setattr__(self, name, value)


def _getValue(self: Any, name: str) -> Any:
    _checkMember(self, name)
    head, _, rest = name.partition(".")
    return getattr(self, head).getValue(rest) if rest else getattr(self, head)


def _setValue(self: Any, name: str, value: Any) -> None:
    _checkMember(self, name)
    head, _, rest = name.partition(".")
    if rest:
        getattr(self, head).setValue(rest, value)
    else:
        setattr(self, head, value)


def _checkMember(pack: Any, name: str) -> None:
    """A member, or a property that a pack with invariants has besides."""
    if not isinstance(getattr(type(pack), name, None), property):
        dataTypeOf(type(pack), name)


def dataTypeOf(kind: Any, name: str) -> Any:
    """The (annotated) type of the member `a.b.c` of a pack class or wrapper class."""
    head, _, rest = name.partition(".")
    hints = getattr(kind, "_hints", {})
    if head not in hints:
        raise ValueError(f"{kind.__name__} has no parameter {head!r}; it has {', '.join(hints) or 'none'}")
    return dataTypeOf(split(kind._hints[head])[0], rest) if rest else kind._hints[head]


def _deepcopy(self: Any, memo: Any) -> Any:
    copied = type(self).__new__(type(self))
    for name in self._members:
        setattr(copied, name, self._members[name].detached(getattr(self, name)))
    return copied


_PACK_METHODS = {
    "__init__": _init,
    "__eq__": _equal,
    "__hash__": None,
    "__str__": _text,
    "__repr__": _text,
    "__setattr__": _setattr,
    "__deepcopy__": _deepcopy,
    "getValue": _getValue,
    "setValue": _setValue,
    "dataType": classmethod(dataTypeOf),
}


@parameterPack
class FloatRange:
    minimum: float
    maximum: float

    def __init__(self, minimum: float = 0.0, maximum: float = 0.0) -> None:
        if minimum > maximum:
            raise ValueError(f"The range's minimum {minimum} lies above its maximum {maximum}")
        self.minimum, self.maximum = minimum, maximum
