"""How a value of each type is kept in a vtkMRMLScriptedModuleNode: as texts, or as references to nodes."""

from __future__ import annotations

import pathlib
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from typing import Any

from .annotations import Annotations, split

PATH_TYPES = (
    pathlib.Path,
    pathlib.PosixPath,
    pathlib.WindowsPath,
    pathlib.PurePath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
)


class Storage(ABC):
    """Keeps one value in a node under a name; `node` is always a vtkMRMLScriptedModuleNode."""

    annotations: Annotations = Annotations()
    #: False: the value is read from the node at every access.
    isCached = True

    @abstractmethod
    def default(self) -> Any: ...

    @abstractmethod
    def isIn(self, node: Any, name: str) -> bool: ...

    @abstractmethod
    def read(self, node: Any, name: str) -> Any: ...

    @abstractmethod
    def _write(self, node: Any, name: str, value: Any) -> None: ...

    @abstractmethod
    def remove(self, node: Any, name: str) -> None: ...

    def check(self, value: Any) -> None:
        """Raise ValueError or TypeError for a value that cannot be kept."""
        self.annotations.validate(value)

    def detached(self, value: Any) -> Any:
        """The value apart from its place in a node, which may be about to be overwritten."""
        return value

    def write(self, node: Any, name: str, value: Any) -> None:
        self.check(value)
        value = self.detached(value)
        wasModifying = node.StartModify()
        try:
            self._write(node, name, value)
        finally:
            node.EndModify(wasModifying)


class TextStorage(Storage):
    def __init__(
        self, accepted: tuple[type, ...], toText: Callable[[Any], str], fromText: Callable[[str], Any], default: Any
    ) -> None:
        self._accepted, self._toText, self._fromText, self._default = accepted, toText, fromText, default

    def default(self) -> Any:
        return self._default

    def check(self, value: Any) -> None:
        if value is None:
            raise ValueError("Value must not be None")
        if not isinstance(value, self._accepted):
            names = " or ".join(kind.__name__ for kind in self._accepted)
            raise TypeError(f"Value must be of type {names}, is {value!r}")
        super().check(value)

    def isIn(self, node: Any, name: str) -> bool:
        return bool(node.HasParameter(name))

    def read(self, node: Any, name: str) -> Any:
        return self._fromText(node.GetParameter(name))

    def _write(self, node: Any, name: str, value: Any) -> None:
        node.SetParameter(name, self._toText(value))

    def remove(self, node: Any, name: str) -> None:
        node.UnsetParameter(name)


class NodeStorage(Storage):
    def __init__(self, classes: tuple[type, ...]) -> None:
        self._classes = classes

    def default(self) -> None:
        return None

    def check(self, value: Any) -> None:
        if value is not None and not isinstance(value, self._classes):
            names = " or ".join(kind.__name__ for kind in self._classes)
            raise TypeError(f"Value must be a {names}, is {value!r}")
        if value is not None and value.GetScene() is None:
            raise ValueError(f"The node {value.GetName()!r} is not in a scene; only such nodes can be referred to")
        super().check(value)

    def isIn(self, node: Any, name: str) -> bool:
        return node.GetNodeReferenceID(name) is not None

    def read(self, node: Any, name: str) -> Any:
        return node.GetNodeReference(name)

    def _write(self, node: Any, name: str, value: Any) -> None:
        node.SetNodeReferenceID(name, None if value is None else value.GetID())

    def remove(self, node: Any, name: str) -> None:
        node.SetNodeReferenceID(name, None)


class UnionStorage(Storage):
    """One of several types, None among them; which one it is, is kept beside the value."""

    def __init__(self, options: list[Storage], takesNone: bool) -> None:
        self._options, self._takesNone = options, takesNone
        self.isCached = all(option.isCached for option in options)

    def default(self) -> Any:
        return None if self._takesNone and len(self._options) == 1 else self._options[0].default()

    def _optionFor(self, value: Any) -> int | None:
        """Which of the types takes the value. A bool is no int here, other than for a plain int."""
        if value is None and self._takesNone:
            return None
        refusals: list[Exception] = []
        for index, option in enumerate(self._options):
            try:
                option.check(value)
            except (TypeError, ValueError) as refusal:
                refusals.append(refusal)
                continue
            if not isinstance(value, bool) or isinstance(option.default(), bool):
                return index
        invalid = [refusal for refusal in refusals if isinstance(refusal, ValueError)]
        raise invalid[0] if invalid else TypeError(f"No type of the union takes the value {value!r}")

    def check(self, value: Any) -> None:
        self._optionFor(value)
        super().check(value)

    def detached(self, value: Any) -> Any:
        option = self._optionFor(value)
        return None if option is None else self._options[option].detached(value)

    def isIn(self, node: Any, name: str) -> bool:
        return bool(node.HasParameter(f"{name}.option"))

    def read(self, node: Any, name: str) -> Any:
        option = node.GetParameter(f"{name}.option")
        return None if option == "None" else self._options[int(option)].read(node, name)

    def _write(self, node: Any, name: str, value: Any) -> None:
        self.remove(node, name)
        option = self._optionFor(value)
        node.SetParameter(f"{name}.option", str(option))
        if option is not None:
            self._options[option].write(node, name, value)

    def remove(self, node: Any, name: str) -> None:
        for option in self._options:
            if option.isIn(node, name):
                option.remove(node, name)
        node.UnsetParameter(f"{name}.option")


class SequenceStorage(Storage):
    """Several values under `name.0`, `name.1` ...; their number is `name.count`."""

    def _elements(self, count: int) -> list[Storage]:
        raise NotImplementedError

    def isIn(self, node: Any, name: str) -> bool:
        return bool(node.HasParameter(f"{name}.count"))

    def _write(self, node: Any, name: str, value: Any) -> None:
        values = list(value)
        self.remove(node, name)
        node.SetParameter(f"{name}.count", str(len(values)))
        for index, (element, item) in enumerate(zip(self._elements(len(values)), values, strict=True)):
            element.write(node, f"{name}.{index}", item)

    def detached(self, value: Any) -> list[Any]:
        values = list(value)
        return [element.detached(item) for element, item in zip(self._elements(len(values)), values, strict=True)]

    def readAll(self, node: Any, name: str) -> list[Any]:
        elements = self._elements(int(node.GetParameter(f"{name}.count")))
        return [element.read(node, f"{name}.{index}") for index, element in enumerate(elements)]

    def remove(self, node: Any, name: str) -> None:
        if not self.isIn(node, name):
            return
        for index, element in enumerate(self._elements(int(node.GetParameter(f"{name}.count")))):
            element.remove(node, f"{name}.{index}")
        node.UnsetParameter(f"{name}.count")


class ListStorage(SequenceStorage):
    def __init__(self, element: Storage) -> None:
        self._element = element
        self.isCached = element.isCached

    def default(self) -> list[Any]:
        return []

    def _elements(self, count: int) -> list[Storage]:
        return [self._element] * count

    def check(self, value: Any) -> None:
        if not isinstance(value, list | tuple):
            raise TypeError(f"Value must be a list, is {value!r}")
        for item in value:
            self._element.check(item)
        super().check(value)

    def read(self, node: Any, name: str) -> ObservedList:
        return ObservedList(self, node, name)


class TupleStorage(SequenceStorage):
    def __init__(self, elements: list[Storage]) -> None:
        self._fixed = elements
        self.isCached = all(element.isCached for element in elements)

    def default(self) -> tuple[Any, ...]:
        return tuple(element.default() for element in self._fixed)

    def _elements(self, count: int) -> list[Storage]:
        return self._fixed

    def check(self, value: Any) -> None:
        if not isinstance(value, tuple | list) or len(value) != len(self._fixed):
            raise TypeError(f"Value must be a tuple of {len(self._fixed)} items, is {value!r}")
        for element, item in zip(self._fixed, value, strict=True):
            element.check(item)
        super().check(value)

    def read(self, node: Any, name: str) -> tuple[Any, ...]:
        return tuple(self.readAll(node, name))


class DictStorage(Storage):
    """Keys in one list, values in another."""

    def __init__(self, key: Storage, value: Storage) -> None:
        self._keys, self._values = ListStorage(key), ListStorage(value)
        self.isCached = self._keys.isCached and self._values.isCached

    def default(self) -> dict[Any, Any]:
        return {}

    def check(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise TypeError(f"Value must be a dict, is {value!r}")
        self._keys.check(list(value))
        self._values.check(list(value.values()))
        super().check(value)

    def isIn(self, node: Any, name: str) -> bool:
        return self._keys.isIn(node, f"{name}.keys")

    def readAll(self, node: Any, name: str) -> dict[Any, Any]:
        keys, values = self._keys.readAll(node, f"{name}.keys"), self._values.readAll(node, f"{name}.values")
        return dict(zip(keys, values, strict=True))

    def read(self, node: Any, name: str) -> ObservedDict:
        return ObservedDict(self, node, name)

    def detached(self, value: dict[Any, Any]) -> dict[Any, Any]:
        keys, values = self._keys.detached(list(value)), self._values.detached(list(value.values()))
        return dict(zip(keys, values, strict=True))

    def _write(self, node: Any, name: str, value: dict[Any, Any]) -> None:
        self._keys.write(node, f"{name}.keys", list(value))
        self._values.write(node, f"{name}.values", list(value.values()))

    def remove(self, node: Any, name: str) -> None:
        self._keys.remove(node, f"{name}.keys")
        self._values.remove(node, f"{name}.values")


def _writesThrough(base: type, method: str) -> Callable[..., Any]:
    """The method of `base`, done on a copy, checked and stored before the container itself changes."""
    original = getattr(base, method)

    def changed(self: Any, *arguments: Any, **options: Any) -> Any:
        trial = base(self)
        result = original(trial, *arguments, **options)
        self._store(trial)
        return self if result is trial else result

    changed.__name__ = method
    return changed


class _Observed:
    def __init__(self, storage: Any, node: Any, name: str) -> None:
        self._storage, self._node, self._name = storage, node, name
        self._reload()

    def _store(self, values: Any) -> None:
        self._storage.write(self._node, self._name, values)
        self._reload()

    def __deepcopy__(self, memo: Any) -> Any:
        return self._plain()


class ObservedList(_Observed, list):
    """A list whose changes go to the parameter node at once."""

    def _reload(self) -> None:
        list.__setitem__(self, slice(None), self._storage.readAll(self._node, self._name))

    def _plain(self) -> list[Any]:
        return list(self)


class ObservedDict(_Observed, dict):
    """A dict whose changes go to the parameter node at once."""

    def _reload(self) -> None:
        dict.clear(self)
        dict.update(self, self._storage.readAll(self._node, self._name))

    def _plain(self) -> dict[Any, Any]:
        return dict(self)


def _refused(self: Any, other: Any) -> Any:
    raise NotImplementedError("A list of a parameter node makes no new list: change it in place, or copy it first")


_LIST_CHANGES = "append extend insert remove pop clear sort reverse __setitem__ __delitem__ __iadd__ __imul__"
for _method in _LIST_CHANGES.split():
    setattr(ObservedList, _method, _writesThrough(list, _method))
for _method in ("__add__", "__radd__", "__mul__", "__rmul__"):
    setattr(ObservedList, _method, _refused)
for _method in "__setitem__ __delitem__ __ior__ pop popitem clear update setdefault".split():
    setattr(ObservedDict, _method, _writesThrough(dict, _method))


def storageFor(annotated: Any) -> Storage:
    """The storage of a (possibly annotated) type.

    Raises:
        TypeError: values of this type cannot be kept.
    """
    bare, annotations = split(annotated)
    storage = _storageForBare(bare)
    storage.annotations = annotations
    return storage


def _storageForBare(kind: Any) -> Storage:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _storageForUnion(typing.get_args(kind))
    if origin is list:
        return ListStorage(storageFor(*typing.get_args(kind)))
    if origin is tuple:
        return TupleStorage([storageFor(item) for item in typing.get_args(kind)])
    if origin is dict:
        return DictStorage(*(storageFor(item) for item in typing.get_args(kind)))
    if not isinstance(kind, type):
        raise TypeError(f"A parameter cannot be of type {kind}")
    return _storageForClass(kind)


def _storageForUnion(options: tuple[Any, ...]) -> Storage:
    given = [option for option in options if option is not type(None)]
    if all(isinstance(option, type) and _isNodeClass(option) for option in given):
        return NodeStorage(tuple(given))
    return UnionStorage([storageFor(option) for option in given], takesNone=len(given) < len(options))


def _storageForClass(kind: type) -> Storage:
    from .packs import PackStorage, isParameterPack

    if kind is bool:
        return TextStorage((bool,), str, lambda text: text == "True", False)
    if kind is int:
        return TextStorage((int,), str, int, 0)
    if kind is float:
        return TextStorage((float, int), lambda value: str(float(value)), float, 0.0)
    if kind is str:
        return TextStorage((str,), str, str, "")
    if kind in PATH_TYPES:
        return TextStorage((kind,), str, kind, kind() if kind is not pathlib.WindowsPath else None)
    if issubclass(kind, Enum):
        return TextStorage((kind,), lambda value: value.name, lambda text: kind[text], next(iter(kind)))
    if isParameterPack(kind):
        return PackStorage(kind)
    if _isNodeClass(kind):
        return NodeStorage((kind,))
    raise TypeError(f"A parameter cannot be of type {kind}")


def _isNodeClass(kind: type) -> bool:
    import slicer

    return issubclass(kind, slicer.vtkMRMLNode)
