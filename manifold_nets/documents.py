"""JSON documents that are read back from files: parsed strictly, checked whole against a schema, with a checksum."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, ClassVar, NoReturn

from manifold_nets.errors import near_matches

__all__ = ["JsonForm", "Schema", "crc32", "is_intact", "parse_json", "printable", "with_checksum", "without_infinities"]

_TOO_DEEP = "it is nested too deeply"


def parse_json(text: str | bytes) -> Any:
    """Parse standard JSON, without NaN and Infinity.

    Raises:
        ValueError: the text is not valid JSON, or is nested too deeply.

    Example:
        >>> parse_json('{"radius": NaN}')
        Traceback (most recent call last):
            ...
        ValueError: NaN is not a JSON number
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class JsonForm:
    """Base of frozen data classes with a JSON form: their fields, without those that are not compared.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Square(JsonForm):
        ...     side: float
        ...     area = property(lambda self: self.side**2)
        ...     json_also = ("area",)
        >>> Square(3.0).to_dict()
        {'side': 3.0, 'area': 9.0}
    """

    # Properties that are part of the form, and fields that are not.
    json_also: ClassVar[tuple[str, ...]] = ()
    json_without: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        names = [field.name for field in dataclasses.fields(self) if field.compare]  # type: ignore[arg-type]
        kept = [name for name in (*names, *self.json_also) if name not in self.json_without]
        form: dict[str, Any] = without_infinities({name: getattr(self, name) for name in kept})
        return form


class Schema:
    """A JSON schema (draft 2020-12), checked by the package jsonschema.

    Numbers are checked more strictly than in the standard, so that valid ones can be computed with: an ``integer`` has
    at most 63 bits and no decimal point, and a ``number`` is in the range of a float.

    Args:
        source: returns the schema; called when the first document is checked.

    Example:
        >>> schema = Schema(lambda: {"properties": {"epochs": {"type": "integer", "minimum": 1}}})
        >>> print(schema.fault({"epochs": 2}), schema.fault({"epochs": 2.0}), sep="; ")
        None; epochs: 2.0 is not of type 'integer'
    """

    def __init__(self, source: Callable[[], Mapping[str, Any]]) -> None:
        self._source = source

    @classmethod
    def packaged(cls, package: str, name: str) -> Schema:
        """The schema in a file that is shipped with a package."""
        return cls(lambda: json.loads(resources.files(package).joinpath(name).read_text(encoding="utf-8")))

    @functools.cached_property
    def _validator(self) -> Any:
        import jsonschema  # not needed before a document is read

        standard = jsonschema.Draft202012Validator
        types = standard.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_number})
        return jsonschema.validators.extend(standard, type_checker=types)(self._source())

    def fault(self, document: Any) -> str | None:
        """Return where and how a document violates the schema; None if it is valid."""
        from jsonschema.exceptions import best_match

        try:
            error = best_match(self._validator.iter_errors(document))
        except RecursionError:
            return _TOO_DEEP
        if error is None:
            return None
        where = _cut(printable("/".join(map(str, error.absolute_path))))
        what = _cut(printable(error.message))
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            what = " ".join(
                [what, *filter(None, (near_matches(key, known) for key in set(error.instance) - set(known)))]
            )
        return f"{where}: {what}" if where else what


def printable(text: str) -> str:
    r"""Return a text that quotes a document, with unprintable characters escaped.

    Example:
        >>> printable("weight \ud800")
        'weight \\ud800'
    """
    return text if text.isprintable() else text.encode("ascii", "backslashreplace").decode()


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:120]} … {text[-60:]}"


def _is_integer(_: object, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(_: object, value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with a checksum of its contents, for `is_intact`.

    Example:
        >>> stored = with_checksum({"seeds": [0, 1]})
        >>> is_intact(stored), is_intact({**stored, "seeds": [0, 3]})
        (True, False)
    """
    return {**document, "checksum": f"crc32:{crc32(document):08x}"}


def is_intact(document: Mapping[str, Any]) -> bool:
    """Whether the contents of a document match its checksum, or it has none."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return "checksum" not in document or document == with_checksum(rest)


def crc32(document: Mapping[str, Any]) -> int:
    """CRC-32 of a JSON document, independent of key order and whitespace."""
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def without_infinities(value: Any) -> Any:
    """Return data for JSON: null for numbers that JSON lacks, lists for tuples, and the JSON forms of objects."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.to_dict() if hasattr(value, "to_dict") else value
