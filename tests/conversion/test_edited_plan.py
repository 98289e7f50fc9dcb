"""A plan written as JSON, edited, and carried out: what it asks for, or a clear refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.conversion_cases import EVAL_LIMIT, actions, conv_net, images
from helpers.diagnosis_cases import assert_same, snapshot
from torch import nn

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.conversion import edited_plan, write_plan
from manifold_nets.errors import OptionError, PlanError


def test_round_trip_is_the_same_conversion(tmp_path: Path) -> None:
    model, file = conv_net(), tmp_path / "plan.json"
    plan = mn.plan(model, images())
    write_plan(plan, file)
    expected = mn.convert(model, images()).state_dict()
    for given in (file, str(file), plan, plan.to_dict(), json.loads(file.read_text())):
        converted = mn.convert(model, images(), plan=given).state_dict()
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_edits_are_carried_out() -> None:
    data = mn.plan(conv_net(), images()).to_dict()
    data["actions"][0]["radius"] = "keep"
    data["actions"][1]["action"] = "leave"
    del data["actions"][3]
    model = conv_net()
    converted = mn.convert(model, images(), plan=data)
    done = actions(converted)
    assert (done["0.weight"].radius, done["3.weight"].action, done["6.weight"].radius) == ("keep", "leave", "unit")
    assert torch.equal(converted[0].weight, model[0].weight)
    assert mn.verify(model, converted, images()).eval_difference <= EVAL_LIMIT[torch.float64]


def test_unit_radius_by_name_is_taken_whatever_it_changes_in_training() -> None:
    model = conv_net()
    model[1].eps = 0.5
    data = mn.plan(model, images()).to_dict()
    assert data["actions"][0]["radius"] == "keep"
    data["actions"][0]["radius"] = "unit"
    action = actions(mn.convert(model, images(), plan=data))["0.weight"]
    assert action.radius == "unit"
    assert action.train_deviation > 1e-4


REFUSED: list[tuple[Any, str]] = [
    ([{"name": "9.weight", "action": "leave"}], "9.weight"),
    ([{"name": "11.weight", "action": "sphere", "radius": "unit"}], "'sphere' for 11.weight.*'leave'.*output"),
    ([{"name": "0.weight", "action": "sphere", "radius": "half"}], "actions/0/radius: 'half' is not one of"),
    ([{"name": "0.weight", "action": "balance"}], "action 'balance'"),
    ([{"name": "0.weight", "action": "already"}], "action 'already'"),
    (
        [{"name": "0.weight", "action": "sphere", "radus": "keep"}],
        "actions/0: .*'radus' was unexpected.*matches: radius",
    ),
    (
        [{"name": "0.weight", "action": "leave"}, {"name": "0.weight", "action": "sphere", "radius": "keep"}],
        "two actions of spheres for '0.weight'; expected one",
    ),
    ([{"name": "0.bias", "remedy": "dead-biases"}], "actions/0: 'action' is a required property"),
    ([{"name": ["0.weight"], "action": "leave"}], r"actions/0/name: \['0.weight'\] is not of type 'string'"),
    ([{"name": "0.weight", "action": "leave", "remedy": {}}], "actions/0/remedy: {} is not one of"),
    ([{"name": "0.weight\ud800", "action": "leave"}], "ud800"),
    ("no list", "actions: 'no list' is not of type 'array'"),
    ([3], "actions/0: 3 is not of type 'object'"),
]


@pytest.mark.parametrize(("listed", "message"), REFUSED)
def test_refusals_leave_the_model_alone(listed: Any, message: str) -> None:
    model = conv_net()
    before = snapshot(model)
    with pytest.raises(PlanError, match=message):
        mn.convert(model, images(), plan={"actions": listed}, inplace=True)
    assert_same(before, snapshot(model))


def test_impossible_unit_radius_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    x = torch.randn(5, 4)
    data = mn.plan(model, x).to_dict()
    data["actions"][0]["radius"] = "unit"
    with pytest.raises(PlanError, match="no running statistics"):
        edited_plan(model, x, data)


def test_files_and_options(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json"):
        mn.convert(conv_net(), images(), plan=tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(PlanError, match=r"broken\.json"):
        mn.convert(conv_net(), images(), plan=broken)
    with pytest.raises(OptionError, match="train_tolerance"):
        mn.convert(conv_net(), images(), plan={"actions": []}, train_tolerance=math.inf)


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)\n"
        "    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4))\n"
    )
    spec = [f"{tmp_path / 'net.py'}:build", "--input-shape", "3,9,9"]
    file = tmp_path / "plan.json"
    assert CliRunner().invoke(main, ["convert", *spec, "--write-plan", str(file)]).exit_code == 0
    data = json.loads(file.read_text())
    data["actions"][1]["action"] = "leave"
    file.write_text(json.dumps(data))
    result = CliRunner().invoke(main, ["convert", *spec, "--plan", str(file), "--json"])
    assert result.exit_code == 0
    assert [a["action"] for a in json.loads(result.stdout)["plan"]["actions"]] == ["sphere", "leave"]
    assert CliRunner().invoke(main, ["convert", *spec, "--plan", str(file), "--radius", "keep"]).exit_code == 2
    file.write_text("[]")
    assert CliRunner().invoke(main, ["convert", *spec, "--plan", str(file)]).exit_code == 1
