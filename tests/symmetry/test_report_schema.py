"""The JSON form of a report against its schema, which is shipped with the package."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from helpers.toy_networks import TOYS
from torch import nn

import manifold_nets as mn
from manifold_nets.comparison import Comparison
from manifold_nets.comparison.json_records import schema_of

SCHEMA = json.loads(
    resources.files("manifold_nets.symmetry").joinpath("report.schema.json").read_text(encoding="utf-8")
)


def check(document: Any) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def document_of(name: str) -> dict[str, Any]:
    report = mn.diagnose(TOYS[name].build(), TOYS[name].inputs())
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded == report.to_dict()
    return dict(loaded)


@pytest.mark.parametrize("path", sorted(Path(mn.__file__).parent.rglob("*.schema.json")), ids=lambda path: path.name)
def test_every_schema_is_one(path: Path) -> None:
    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert {"title", "description"} <= schema.keys()


def test_the_records_of_comparisons_make_a_schema() -> None:
    schema = schema_of(Comparison)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["settings"]["properties"]["subset"]["anyOf"][1] == {"type": "null"}
    assert "epochs" in schema["properties"]["results"]["items"]["required"]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"]["const"] == 1


@pytest.mark.parametrize("name", sorted(TOYS)[::4])
def test_reports_follow_the_schema(name: str) -> None:
    check(document_of(name))


def test_reports_of_converted_and_empty_models_follow_the_schema() -> None:
    x = torch.randn(4, 5)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    converted = json.loads(json.dumps(mn.diagnose(mn.convert(net, x), x).to_dict()))
    assert converted["summary"] == {"constrained": 1}
    check(converted)
    check(mn.diagnose(nn.BatchNorm1d(5), x).to_dict())


def parts(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all keys of a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if isinstance(node, dict):
            yield (*path, key)
        yield from parts(value, (*path, key))


# Keys that were added to the form after it was published.
OPTIONAL = {"moved"}


def test_no_required_key_may_be_missing() -> None:
    document = document_of("dense")
    checked: set[tuple[str, ...]] = set()
    for *path, key in parts(document):
        # One of several weights, nodes and so on stands for all.
        kind = (*(step for step in path if isinstance(step, str)), key)
        if path[:1] == ["summary"] or kind in checked:
            continue
        broken = copy.deepcopy(document)
        place = broken
        for step in path:
            place = place[step]
        del place[key]
        checked.add(kind)
        if key in OPTIONAL:
            check(broken)
            continue
        with pytest.raises(jsonschema.ValidationError, match=f"'{key}' is a required property"):
            check(broken)
    assert {"format", "certificate", "value", "partition", "kept", "inputs", "running_mean", "exponent"} <= {
        kind[-1] for kind in checked
    }


def change(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    def changed(document: dict[str, Any], value: Any) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("tolerance",), "small"),
        (("summary", "wonderful"), 1),
        (("weights", 0, "status"), "wonderful"),
        (("weights", 0, "shape"), []),
        (("weights", 0, "groups"), None),
        (("weights", 0, "partition"), None),
        (("weights", 0, "partition", "kept"), [0.5]),
        (("weights", 0, "certificate", "value"), -1.0),
        (("weights", 0, "certificate", "verdict"), "maybe"),
        (("weights", 0, "absorbers", 0, "kind"), "magic"),
        (("weights", 0, "moves_along"), ["a.bias", "a.bias"]),
        (("graph", 0, "kind"), "magic"),
        (("graph", 1, "inputs"), "x"),
        (("families", 0, "kind"), "magic"),
        (("families", 0, "count"), 0),
        (("shifts", 0, "kind"), "magic"),
    ],
)
def test_what_does_not_follow_the_schema_is_found(path: tuple[Any, ...], value: Any) -> None:
    document = document_of("dense")
    check(document)
    change(*path)(document, value)
    with pytest.raises(jsonschema.ValidationError):
        check(document)
