"""Removed biases of modules that stand in several places of a network: every name of theirs goes, and comes back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.conversion.remedies import dead_biases as biases
from manifold_nets.conversion.remedies.dead_biases import removed_biases


def twice() -> nn.Module:
    """One layer, called twice under two names, each time in front of a batch normalization."""
    torch.manual_seed(1)
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.BatchNorm1d(6), nn.ReLU(), layer, nn.BatchNorm1d(6), nn.Linear(6, 2))


class Listed(nn.Module):
    """A layer that stands in a list as well, and is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.all = nn.ModuleList([self.layer, nn.BatchNorm1d(6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.all[1](self.layer(x)))


NAMES = {twice: ["0.bias", "3.bias"], Listed: ["layer.bias", "all.0.bias"]}


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(8, 6)


@pytest.mark.parametrize("remedies", ["dead-biases", "all"])
@pytest.mark.parametrize("make", [twice, Listed])
def test_a_module_of_two_names_is_saved_and_loaded(
    make: type[nn.Module], remedies: str, inputs: Tensor, tmp_path: Path
) -> None:
    converted = mn.convert(make(), inputs, remedies=remedies)
    assert sorted(removed_biases(converted)) == sorted(NAMES[make])
    mn.save(converted, tmp_path / "net.safetensors")
    for fresh in (make(), copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        loaded = mn.load(fresh, tmp_path / "net.safetensors")
        assert loaded.state_dict().keys() == converted.state_dict().keys()
        assert mn.verify(converted, loaded, inputs) == mn.conversion.Verification(0.0, 0.0)


@pytest.mark.parametrize("make", [twice, Listed])
def test_both_names_come_back(make: type[nn.Module], inputs: Tensor, tmp_path: Path) -> None:
    model = make()
    converted = mn.convert(model, inputs, remedies="dead-biases")
    reverted = mn.revert(converted)
    assert list(reverted.state_dict()) == list(model.state_dict())
    first, second = (reverted.get_parameter(name) for name in NAMES[make])
    assert first is second
    assert mn.verify(converted, reverted, inputs) == mn.conversion.Verification(0.0, 0.0)
    mn.save(model, tmp_path / "plain.safetensors")
    back = mn.load(converted, tmp_path / "plain.safetensors")
    assert mn.verify(model, back, inputs) == mn.conversion.Verification(0.0, 0.0)
    assert not removed_biases(back)


def test_a_record_of_one_name_would_not_load(inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: only the first name of each module is found."""
    monkeypatch.setattr(
        "manifold_nets.conversion.checkpoint.removed_biases",
        lambda model: dict(list(biases.removed_biases(model).items())[:1]),
    )
    with pytest.raises(mn.errors.CheckpointMismatchError, match=r"the file lacks 3\.bias"):
        test_a_module_of_two_names_is_saved_and_loaded(twice, "dead-biases", inputs, tmp_path)


class JoinsBiases(nn.Module):
    """Attention whose own code joins the biases of its layers, as some do to call torch's function for it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        return nn.functional.scaled_dot_product_attention(*nn.functional.linear(x, weight, bias).chunk(3, -1))


def test_a_bias_that_the_code_of_the_model_reads_stays() -> None:
    model, x = JoinsBiases(), torch.randn(4, 5, 8)
    report = mn.diagnose(model, x)
    assert any(shift.kind == "dead bias" and shift.parameters == ("k.bias",) for shift in report.shifts)
    planned = {action.name: action for action in mn.plan(model, report, remedies="dead-biases").actions}
    assert planned["k.bias"].action == "leave"
    assert "the model reads it outside of its layer" in planned["k.bias"].reason
