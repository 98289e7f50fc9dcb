"""Frozen data classes as plain data for JSON, and back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

from manifold_nets.comparison.errors import RecordError

__all__ = ["PlainRecord"]

# JSON has no numbers for these; records write and read them as texts.
_NOT_FINITE = ("nan", "inf", "-inf")


class PlainRecord:
    """Base of frozen data classes whose fields are numbers, texts, tuples, records, or None."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: tuples become lists, records objects, and floats that are not finite texts."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a record from `to_dict`.

        Raises:
            RecordError: a field is missing or unknown, or a value has another type.
        """
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if not isinstance(data, Mapping):
            raise RecordError(cls.__name__, f"a {type(data).__name__}", "an object with the fields of the record")
        unknown = sorted(set(data) - set(fields))
        missing = sorted(
            name for name, field in fields.items() if name not in data and field.default is dataclasses.MISSING
        )
        if unknown or missing:
            raise RecordError(cls.__name__, f"unknown fields {unknown}, missing fields {missing}", "exactly its fields")
        return cls(**{name: _read(hints[name], value, f"{cls.__name__}.{name}") for name, value in data.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, PlainRecord):
        return value.to_dict()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read(hint: Any, value: Any, where: str) -> Any:
    """Check a value of JSON against a type and give it that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _read(next(argument for argument in arguments if argument is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise RecordError(where, repr(value), f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecordError(where, repr(value), "a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise RecordError(where, f"{len(value)} entries", f"{len(kinds)} entries")
        return tuple(_read(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if isinstance(hint, type) and issubclass(hint, PlainRecord):
        return hint.from_dict(value)
    if hint is float and (value in _NOT_FINITE or (isinstance(value, int) and not isinstance(value, bool))):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecordError(where, repr(value), f"a {hint.__name__}")
    return value
