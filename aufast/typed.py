"""Dataclasses from JSON: every key is a field, every value of the kind that the field says."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

Data = TypeVar("Data")


def from_json(cls: type[Data], values: Any) -> Data:
    """Make a dataclass from what `json` reads, where lists stand for tuples and objects for dataclasses.

    Args:
        cls: the dataclass.
        values: its fields; those that have a default may be missing.

    Raises:
        TypeError: a field that does not exist, or a value of another kind.
        ValueError: a value that the class does not take.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{values!r} is no object of a {cls.__name__}")
    kinds = typing.get_type_hints(cls)
    if unknown := values.keys() - kinds.keys():
        raise TypeError(f"{cls.__name__} has no {sorted(unknown)[0]!r}")
    return cls(**{name: _convert(name, kinds[name], value) for name, value in values.items()})


def _convert(name: str, kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value)
    if isinstance(value, list) and typing.get_origin(kind) is tuple:
        value = tuple(value)
    if not _fits(kind, value):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    return value


def _fits(kind: Any, value: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in parts
    if origin in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(wanted) and all(map(_fits, wanted, value))
    if origin is list and isinstance(value, list):
        return all(_fits(parts[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return all(map(_fits, parts * len(value), (cell for item in value.items() for cell in item)))
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, origin or kind)
