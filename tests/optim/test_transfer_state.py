"""The moments of a running optimizer on spheres: the next step turns every filter as the plain step does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import OptionError

# Steps of this size: first order is 1e-6 relative to the second.
LR = 1e-6


def conv_net() -> nn.Sequential:
    torch.manual_seed(4)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
    return layers.double().train()


def trained(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Sequential, Any, Tensor]:
    net, x = conv_net(), torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for parameters in net.parameters():
        parameters.data += 0.1 * torch.randn(parameters.shape, dtype=torch.float64)
    optimizer = kind(net.parameters(), lr=LR, **options)
    for count in range(4):
        step(net, optimizer, x.roll(count, 2) * (1 + x.roll(count, 0)))
    return net, optimizer, x


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    net(x).sin().sum().backward()
    optimizer.step()


def turned(before: Tensor, after: Tensor) -> Tensor:
    """The tangential part of the change of each filter, over its norm."""
    w, d = before.flatten(1), (after - before).flatten(1)
    norms = w.norm(dim=1, keepdim=True)
    return (d - (d * w).sum(1, keepdim=True) * w / norms**2) / norms


def turns(kind: str, radius: str, *, carried: bool = True) -> tuple[Tensor, Tensor]:
    """What the next step does to the filters of the plain network and of the converted one with matched rates."""
    if kind == "sgd":
        net, old, x = trained(torch.optim.SGD, momentum=0.9)
    else:
        net, old, x = trained(torch.optim.Adam, eps=1e-30)
        for weight in (net[0].weight,):
            # One second moment a filter, as on spheres; otherwise the directions differ.
            second = old.state[weight]["exp_avg_sq"]
            second.copy_(second.mean((1, 2, 3), keepdim=True).expand_as(second))
    converted = mn.convert(net, x, radius=radius)
    rates = mn.matched_learning_rates(net, mn.diagnose(net, x), lr=LR)
    groups = mn.param_groups(converted, sphere_lr=rates.by_weight())
    optimizer: Any = mn.optim.RiemannianSGD(groups, lr=LR, momentum=0.9)
    if kind == "adam":
        optimizer = mn.optim.RiemannianAdam(groups, lr=LR, eps=1e-30)
    if carried:
        mn.optim.carry_momentum(net, old, converted, optimizer)
    plain_before, before = net[0].weight.detach().clone(), converted[0].weight.detach().clone()
    if kind == "adam":
        # Only what is carried counts: gradients of zero leave the moments their directions.
        for model, chosen in ((net, old), (converted, optimizer)):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            chosen.step()
    else:
        step(net, old, x)
        step(converted, optimizer, x)
    return turned(plain_before, net[0].weight.detach()), turned(before, converted[0].weight.detach())


@pytest.mark.parametrize("radius", ["unit", "keep"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_next_step_has_the_direction_of_the_plain_one(kind: str, radius: str) -> None:
    plain, sphere = turns(kind, radius)
    cosines = torch.cosine_similarity(plain, sphere, dim=1)
    assert float((1 - cosines).abs().max()) <= 1e-6


def test_the_next_step_of_sgd_has_the_length_of_the_plain_one() -> None:
    """At a rate of its own for every filter; the median over the filters stands in for them."""
    plain, sphere = turns("sgd", "unit")
    net = trained(torch.optim.SGD, momentum=0.9)[0]
    squares = net[0].weight.detach().flatten(1).square().sum(1)
    # The rate of the weight is η/n² at the median of its filters.
    expected = plain.norm(dim=1) * squares * (1 / squares).quantile(0.5)
    assert torch.allclose(sphere.norm(dim=1), expected, rtol=1e-4, atol=0)


def test_without_the_momentum_the_direction_is_another() -> None:
    """Sabotage twin."""
    plain, sphere = turns("sgd", "unit", carried=False)
    with pytest.raises(AssertionError):
        assert float((1 - torch.cosine_similarity(plain, sphere, dim=1)).abs().max()) <= 1e-6


def test_moments_are_tangent_and_plain_ones_are_copied() -> None:
    net, old, x = trained(torch.optim.SGD, momentum=0.9, weight_decay=0.1)
    converted = mn.convert(net, x)
    target = mn.optim.RiemannianSGD(mn.param_groups(converted), lr=LR, momentum=0.9)
    mn.optim.carry_momentum(net, old, converted, target)
    moment = target.state[converted[0].weight]["momentum_buffer"]
    inner = (moment * converted[0].weight.detach()).flatten(1).sum(1)
    assert float(inner.abs().max()) <= 64 * torch.finfo(torch.float64).eps * float(moment.norm())
    copied = target.state[converted[4].weight]["momentum_buffer"]
    assert torch.equal(copied, old.state[net[4].weight]["momentum_buffer"])
    assert copied is not old.state[net[4].weight]["momentum_buffer"]


def test_other_optimizers_and_models_are_refused() -> None:
    net, old, x = trained(torch.optim.SGD, momentum=0.9)
    converted = mn.convert(net, x)
    adam = mn.optim.RiemannianAdam(mn.param_groups(converted), lr=LR)
    with pytest.raises(OptionError, match="target: found 'RiemannianAdam'"):
        mn.optim.carry_momentum(net, old, converted, adam)
    with pytest.raises(OptionError, match=r"converted: found '0\.weight'"):
        mn.optim.carry_momentum(nn.Linear(3, 3), old, converted, adam)


def test_groups_with_a_rate_for_each_weight() -> None:
    net, _, x = trained(torch.optim.SGD, momentum=0.9)
    converted = mn.convert(net, x)
    groups = mn.param_groups(converted, weight_decay=0.1, sphere_lr={"0.weight": 0.25, "4.weight": 7.0})
    assert (groups[0]["param_names"], groups[0]["lr"]) == (["0.weight"], 0.25)
    assert [g["param_names"] for g in groups if "lr" in g] == [["0.weight"]]
    assert sum(len(g["params"]) for g in groups) == len(list(converted.parameters()))
    assert [g.get("lr") for g in mn.param_groups(converted, sphere_lr={}) if "manifolds" in g] == [None]
    with pytest.raises(OptionError, match="sphere_lr: found 'nothing'"):
        mn.param_groups(converted, sphere_lr={"nothing": 0.1})
