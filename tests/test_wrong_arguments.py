"""Arguments of another kind than a function takes, and names that a report does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.errors import ArgumentTypeError, ParameterNameError, near_matches


@pytest.mark.parametrize(("model", "found"), [("resnet18", "'resnet18'"), (nn.Linear, "the class Linear"), (3, "3")])
def test_what_is_no_model_is_refused_by_what_it_is(model: Any, found: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^model: found {found}; expected a torch\.nn\.Module object"):
        mn.diagnose(model, torch.randn(4, 3))


def test_long_arguments_are_cut() -> None:
    error = ArgumentTypeError("model", ["layer"] * 1000, "a network", "Make one.")
    assert len(str(error)) < 200


def test_a_name_that_a_report_does_not_have_is_answered_with_near_ones() -> None:
    report = mn.diagnose(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(8, 4))
    told = r"^report\['0\.wieght'\]: found no such name; expected one of 0\.weight, 2\.weight\. Near matches: 0\.weight"
    with pytest.raises(ParameterNameError, match=told):
        report["0.wieght"]
    with pytest.raises(KeyError, match="Name one of these"):
        report["nothing"]


def test_nothing_is_said_to_be_near_where_nothing_is() -> None:
    assert near_matches("rsdg", ["adam", "rsgd", "sgd"]) == "Near matches: rsgd, sgd."
    assert near_matches("zzz", ["adam", "rsgd", "sgd"]) == near_matches("adam", []) == ""
