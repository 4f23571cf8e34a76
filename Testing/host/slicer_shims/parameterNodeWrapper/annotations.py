"""What stands beside a type in `Annotated[...]`: validators, the default, and hints for widgets."""

from __future__ import annotations

import copy
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

_UNSET = object()


class Validator(ABC):
    @abstractmethod
    def validate(self, value: Any) -> None:
        """Raise an exception, best a ValueError, for a value that the parameter must not have."""


class NotNone(Validator):
    def validate(self, value: Any) -> None:
        if value is None:
            raise ValueError("Value must not be None")


@dataclass(frozen=True)
class IsInstance(Validator):
    classtype: type | tuple[type, ...]

    def validate(self, value: Any) -> None:
        if value is not None and not isinstance(value, self.classtype):
            raise TypeError(f"Value must be of type {self.classtype}, is {type(value)}")


@dataclass(frozen=True)
class Minimum(Validator):
    minimum: float

    def validate(self, value: Any) -> None:
        if value < self.minimum:
            raise ValueError(f"Value must be at least {self.minimum}, is {value}")


@dataclass(frozen=True)
class Maximum(Validator):
    maximum: float

    def validate(self, value: Any) -> None:
        if value > self.maximum:
            raise ValueError(f"Value must be at most {self.maximum}, is {value}")


@dataclass(frozen=True)
class WithinRange(Validator):
    minimum: float
    maximum: float

    def validate(self, value: Any) -> None:
        values = (value.minimum, value.maximum) if hasattr(value, "minimum") else (value,)
        for number in values:
            if not self.minimum <= number <= self.maximum:
                raise ValueError(f"Value must be within range [{self.minimum}, {self.maximum}], is {value}")


class RangeBounds(WithinRange):
    """Limits of a FloatRange."""


class Choice(Validator):
    def __init__(self, choices: Iterable[Any]) -> None:
        self.choices = tuple(choices)

    def validate(self, value: Any) -> None:
        if value not in self.choices:
            raise ValueError(f"Value must be one of {self.choices}, is {value!r}")


class Exclude(Validator):
    def __init__(self, excludedValues: Iterable[Any]) -> None:
        self.excludedValues = tuple(excludedValues)

    def validate(self, value: Any) -> None:
        if value in self.excludedValues:
            raise ValueError(f"Value must not be one of {self.excludedValues}, is {value!r}")


class Default:
    """A fixed default, or a function that makes it when a parameter node is wrapped."""

    def __init__(self, value: Any = _UNSET, *, generator: Callable[[], Any] | None = None) -> None:
        if (value is _UNSET) == (generator is None):
            raise ValueError("Default takes either a value or a generator")
        self._value, self._generator = value, generator

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Default) and (self._value, self._generator) == (other._value, other._generator)

    __hash__ = None  # type: ignore[assignment]

    @property
    def value(self) -> Any:
        return self._generator() if self._generator is not None else copy.deepcopy(self._value)


@dataclass(frozen=True)
class Decimals:
    value: int


@dataclass(frozen=True)
class SingleStep:
    value: float


@dataclass(frozen=True)
class Annotations:
    """What `Annotated` said of one parameter."""

    validators: list[Validator] = field(default_factory=list)
    default: Default | None = None
    choice: Choice | None = None
    minimum: float | None = None
    maximum: float | None = None
    decimals: int | None = None
    singleStep: float | None = None

    def validate(self, value: Any) -> None:
        for validator in self.validators:
            validator.validate(value)


def split(annotated: Any) -> tuple[Any, Annotations]:
    """The bare type, and what was said of it."""
    if typing.get_origin(annotated) is not Annotated:
        return annotated, Annotations()
    bare, *given = typing.get_args(annotated)
    extras = [extra() if isinstance(extra, type) and issubclass(extra, Validator) else extra for extra in given]

    def first(kind: type) -> Any:
        return next((extra for extra in extras if isinstance(extra, kind)), None)

    def bound(kind: type, name: str) -> float | None:
        found = first(kind) or first(WithinRange)
        return None if found is None else getattr(found, name)

    decimals, step = first(Decimals), first(SingleStep)
    return bare, Annotations(
        validators=[extra for extra in extras if isinstance(extra, Validator)],
        default=first(Default),
        choice=first(Choice),
        minimum=bound(Minimum, "minimum"),
        maximum=bound(Maximum, "maximum"),
        decimals=None if decimals is None else decimals.value,
        singleStep=None if step is None else step.value,
    )
