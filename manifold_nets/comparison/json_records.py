"""Frozen data classes to JSON and back, each with a schema."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from manifold_nets.comparison.errors import RecordError
from manifold_nets.documents import Schema, is_intact, parse_json, with_checksum

if TYPE_CHECKING:
    from typing_extensions import Self

# JSON has no such numbers; records write and read them as strings.
_NOT_FINITE = ("nan", "inf", "-inf")


class JsonRecord:
    """Base of frozen data classes whose fields are numbers, strings, tuples, records, or None."""

    def to_dict(self) -> dict[str, Any]:
        """Return data for JSON: tuples become lists, records objects, and non-finite floats strings."""
        return {field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_json(self, **options: Any) -> str:
        """Return the record as JSON, with a checksum beside its fields; ``options`` are those of `json.dumps`."""
        return json.dumps(with_checksum(self.to_dict()), allow_nan=False, **options)

    def contradiction(self) -> str | None:
        """Return how fields contradict each other in ways that a schema cannot check; None if they do not."""
        return None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: object = None) -> Self:
        """Rebuild a record from `to_dict`; errors name ``where`` the data come from.

        Raises:
            RecordError: the data do not follow the schema of the record, or contradict each other.
        """
        fault = _schema(cls).fault(data)  # type: ignore[arg-type]
        if fault is not None:
            raise RecordError(str(where or cls.__name__), fault, f"the fields of {cls.__name__}")
        try:
            record: Self = _read(cls, data)
        except ValueError as error:  # a contradiction, or invalid settings
            raise RecordError(str(where or cls.__name__), str(error), f"a valid {cls.__name__}") from error
        return record

    @classmethod
    def from_json(cls, text: str | bytes, where: object = None) -> Self:
        """Rebuild a record from `to_json`, or from the JSON of `to_dict`, which has no checksum.

        Args:
            text: the JSON.
            where: the file or place that errors name.

        Raises:
            RecordError: the text is damaged or is not such a record.
        """
        where = str(where or cls.__name__)
        try:
            data = parse_json(text)
        except ValueError as error:
            raise RecordError(where, f"invalid JSON ({error})", f"a {cls.__name__} in JSON") from error
        fields = {name: data[name] for name in data if name != "checksum"} if isinstance(data, dict) else data
        record = cls.from_dict(fields, where)
        if not is_intact(data):
            raise RecordError(where, "contents that do not match their checksum", "the contents as written")
        return record


def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of a field type or a record.

    Example:
        >>> schema_of(tuple[int, ...])
        {'type': 'array', 'items': {'type': 'integer'}}
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [schema_of(argument) for argument in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is tuple:
        count = {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "prefixItems": [schema_of(argument) for argument in arguments], **count}
    if kind is float:
        return {"anyOf": [{"type": "number"}, {"enum": list(_NOT_FINITE)}]}
    if issubclass(kind, JsonRecord):
        fields: Any = dataclasses.fields(kind)
        return {
            "type": "object",
            "properties": {name: schema_of(hint) for name, hint in _field_types(kind).items()},
            "required": [field.name for field in fields if field.default is dataclasses.MISSING],
            "additionalProperties": False,
        }
    return {"type": _NAMES[kind]}


_NAMES = {int: "integer", bool: "boolean", str: "string", types.NoneType: "null"}


@functools.cache
def _schema(kind: Any) -> Schema:
    return Schema(lambda: schema_of(kind))


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _to_json(value: Any) -> Any:
    if isinstance(value, JsonRecord):
        return value.to_dict()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _read(kind: Any, value: Any) -> Any:
    """Convert a JSON value, which follows the schema of a type, to that type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(arguments[0], value)
    if origin is tuple:
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(inner, item) for inner, item in zip(kinds, value, strict=True))
    if isinstance(kind, type) and issubclass(kind, JsonRecord):
        hints = _field_types(kind)  # type: ignore[arg-type]
        record = kind(**{name: _read(hints[name], item) for name, item in value.items()})
        contradiction = record.contradiction()
        if contradiction is not None:
            raise ValueError(contradiction)
        return record
    return float(value) if kind is float else value
