"""balance: the function stays, the norm is the smallest on the orbit, and what cannot be balanced is left."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.conversion_cases import conv_net, images, randomized
from helpers.diagnosis_cases import assert_same, snapshot
from scipy.optimize import minimize
from torch import nn

import manifold_nets as mn
from manifold_nets.conversion.remedies import balance as balance_module
from manifold_nets.errors import FunctionChangedError, ReportMismatchError


def mlp(*widths: int) -> nn.Module:
    torch.manual_seed(4)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for k, layer in enumerate(model):
            if isinstance(layer, nn.Linear):
                layer.weight *= 10.0 ** (k - 2)
    return model


def x(features: int) -> torch.Tensor:
    return torch.randn(16, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_two_layers_reach_the_closed_form() -> None:
    """With exponents ±1 each hidden unit has ``‖row‖² + b² = ‖column‖²`` at the minimum."""
    model = mlp(5, 7, 3)
    balanced, record = mn.balance(model, x(5))
    inner = balanced[0].weight.square().sum(1) + balanced[0].bias.square()
    outer = balanced[2].weight.square().sum(0)
    assert torch.allclose(inner, outer, rtol=1e-10)
    assert mn.verify(model, balanced, x(5)).eval_difference <= 1e-12
    assert record.norm_after < record.norm_before
    before = model[0].weight.square().sum(1) + model[0].bias.square()
    assert not torch.allclose(before, model[2].weight.square().sum(0), rtol=1e-2)


def test_deep_network_reaches_the_minimum_of_a_general_optimizer() -> None:
    model = mlp(4, 5, 6, 3)
    balanced, record = mn.balance(model, x(4))
    weights = [model[k].weight.detach() for k in (0, 2, 4)]
    biases = [model[k].bias.detach() for k in (0, 2)]

    def norm(logarithms: list[float]) -> float:
        a, b = (
            torch.tensor(logarithms[:5], dtype=torch.float64).exp(),
            torch.tensor(logarithms[5:], dtype=torch.float64).exp(),
        )
        terms = [weights[0] * a[:, None], biases[0] * a, weights[1] * b[:, None] / a, biases[1] * b, weights[2] / b]
        return float(sum(t.square().sum() for t in terms))

    reference = minimize(norm, [0.0] * 11, method="BFGS", options={"gtol": 1e-9})
    moved = sum(float(p.detach().square().sum()) for name, p in balanced.named_parameters() if name != "4.bias")
    assert moved == pytest.approx(reference.fun, rel=1e-7)
    assert moved < 0.99 * norm([0.0] * 11)
    assert record.converged


def test_again_changes_nothing() -> None:
    once, _ = mn.balance(mlp(4, 5, 3), x(4))
    twice, record = mn.balance(once, x(4))
    assert record.norm_after == pytest.approx(record.norm_before, rel=1e-12)
    assert (record.sweeps, record.converged) == (0, True)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_normalized_network_keeps_its_function_in_both_modes() -> None:
    model = conv_net()
    balanced, record = mn.balance(model, images())
    verification = mn.verify(model, balanced, images())
    assert verification.eval_difference <= 1e-12
    assert verification.train_difference <= 1e-12
    assert len(record.balanced) >= 2


def test_sphere_weights_are_left_and_said_so() -> None:
    converted = mn.convert(conv_net(), images())
    _, record = mn.balance(converted, images())
    assert any("is on spheres" in line for line in record.left)


def test_families_that_a_normalization_absorbs_are_left() -> None:
    from helpers.diagnosis_cases import build
    from helpers.toy_networks import TOYS

    toy = TOYS["squeeze-excite"]
    _, record = mn.balance(randomized(build(toy)), toy.inputs())
    assert any("statistics" in line for line in record.left)
    assert len(record.balanced) == 1


def test_a_wrong_symmetry_is_refused_and_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: descend along a direction that is no symmetry."""
    original = balance_module.Rescaling.values

    def wrong(self: Any, state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in original(self, state):
            yield name, value * (1.01 if name == "0.weight" else 1)

    monkeypatch.setattr(balance_module.Rescaling, "values", wrong)
    model = mlp(5, 7, 3)
    before = snapshot(model)
    with pytest.raises(FunctionChangedError):
        mn.balance(model, x(5), inplace=True)
    assert_same(before, snapshot(model))


def test_in_place_copy_and_mismatch() -> None:
    model = mlp(5, 7, 3)
    before = copy.deepcopy(model.state_dict())
    report = mn.diagnose(model, x(5))
    balanced, _ = mn.balance(model, report)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert mn.balance(model, report, inplace=True)[0] is model
    assert all(
        torch.equal(a, b) for a, b in zip(balanced.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(ReportMismatchError):
        mn.balance(nn.Linear(2, 2), report)
