"""What every optimizer of the table has to do, whatever its formula."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

import manifold_nets as mn
from manifold_nets.errors import StepInputError
from manifold_nets.optim import OPTIMIZERS
from manifold_nets.optim.base import SphereOptimizer

EPS = torch.finfo(torch.float32).eps


def problem():
    torch.manual_seed(1)
    x = torch.randn(60, 6)
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    return net, x, (x[:, :3] + 0.3 * x[:, 3:]).argmax(1)


def setup(name, **options):
    """The network as an optimizer wants it, and the optimizer."""
    entry = OPTIMIZERS[name]
    net, x, y = problem()
    if entry.weights == "spheres":
        net = mn.convert(net, x, train_tolerance=1.0)
        groups = mn.param_groups(net, weight_decay=1e-3)
    else:
        groups = mn.optim.scaled_metric_groups(net, {"0.weight": mn.Partition.filters((12, 6))}, weight_decay=1e-3)
    more = {} if entry.adaptive else {"momentum": 0.9}
    return net, entry.kind(groups, lr=0.02, **entry.options, **more, **options), x, y


def train(net, optimizer, x, y, steps=40, schedule=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def check_it_learns(name, sign=1.0):
    net, optimizer, x, y = setup(name, maximize=sign < 0)
    losses = train(net, optimizer, x, y)
    assert float(losses[-1]) < 0.6 * float(losses[0])
    for weight in mn.constraints.constrained_weights(net):
        # A rounding or two of the norm in every step, and they do not add up.
        assert float(weight.manifold.deviations(weight.parameter).max()) < 16 * EPS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_stays_on_the_spheres(name):
    check_it_learns(name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sabotage_ascent_is_noticed(name):
    with pytest.raises(AssertionError):
        check_it_learns(name, sign=-1.0)


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_bit_for_bit(name, copied):
    net, optimizer, x, y = setup(name)
    train(net, optimizer, x, y, 5)
    if copied == "state_dict":
        other, resumed, _, _ = setup(name)
        other.load_state_dict(net.state_dict())
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    elif copied == "deepcopy":
        other, resumed = copy.deepcopy((net, optimizer))
    else:
        other, resumed = pickle.loads(pickle.dumps((net, optimizer)))
    ours, theirs = train(net, optimizer, x, y, 5), train(other, resumed, x, y, 5)
    assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_of_zero_leaves_every_weight_bit_for_bit(name):
    """Torch takes such a step where it loads a distributed checkpoint."""
    net, optimizer, x, y = setup(name)
    train(net, optimizer, x, y, 5)
    rates = [group["lr"] for group in optimizer.param_groups]
    for how in ({"foreach": None}, {"foreach": True}, {"foreach": False}):
        for group in optimizer.param_groups:
            group.update(how, lr=0.0)
        before = copy.deepcopy(list(net.parameters()))
        train(net, optimizer, x, y, 1)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    train(net, optimizer, x, y, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_takes_further_groups_with_the_options_of_the_first(name, how):
    options = {"sgd-g": {"clip": 0.25}, "adam-g": {"clip": 0.25}, "angular": {"per": "weight"}}.get(name, {})
    optimizer = OPTIMIZERS[name].kind([nn.Parameter(torch.ones(2))], lr=0.1, **options)
    optimizer = how(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    first, second = optimizer.state_dict()["param_groups"]
    assert {k: v for k, v in first.items() if k not in ("params", "manifolds")} == {
        k: v for k, v in second.items() if k not in ("params", "manifolds")
    }
    assert options.items() <= second.items()


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.weights == "spheres"])
def test_weights_that_cannot_move_have_a_state_for_distributed_checkpoints(name):
    """Filters of one entry are two points each; torch asks for a state of every parameter with a gradient."""
    saved = []
    for _ in range(2):
        net = mn.layers.UnitNormLinear(1, 4)
        optimizer = OPTIMIZERS[name].kind(mn.param_groups(net), lr=0.1)
        net.weight.grad, net.bias.grad = torch.ones(4, 1), torch.ones(4)
        before = net.weight.detach().clone()
        optimizer.step()
        assert torch.equal(net.weight, before)
        if saved:
            set_optimizer_state_dict(net, optimizer, saved[0])
        saved.append(get_optimizer_state_dict(net, optimizer))
    assert saved[0]["state"].keys() == {"weight", "bias"} or not OPTIMIZERS[name].adaptive


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_reaches_every_group(name):
    net, optimizer, x, y = setup(name)
    train(net, optimizer, x, y, 4, CosineAnnealingLR(optimizer, 4))
    before = copy.deepcopy(net.state_dict())
    assert max(group["lr"] for group in optimizer.param_groups) < 1e-12
    train(net, optimizer, x, y, 1)
    for key, value in net.state_dict().items():
        if key.rpartition(".")[2] in ("weight", "bias"):
            torch.testing.assert_close(value, before[key], rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_function_does_not_depend_on_the_radius(name):
    if OPTIMIZERS[name].weights == "plain":
        pytest.skip("plain weights have no radius")
    paths = []
    for radius in (1.0, 5.0):
        torch.manual_seed(0)
        net, x, y = problem()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eps = 1e-30
        net = net.double()
        with torch.no_grad():
            net[0].weight.mul_(radius / net[0].weight.norm(dim=1, keepdim=True))
            net[0].bias.zero_()
        net = mn.convert(net, x.double(), radius="keep")
        groups = mn.param_groups(net)
        more = {} if OPTIMIZERS[name].adaptive else {"momentum": 0.9}
        optimizer = OPTIMIZERS[name].kind(groups, lr=0.02, **more)
        paths.append(train(net, optimizer, x.double(), y, 20))
    eps = torch.finfo(torch.float64).eps
    torch.testing.assert_close(*paths, rtol=2**20 * eps, atol=0)


def scaled_step(name, how, scale, infinite):
    """What one step makes of the network's parameters, by a scaler of gradients where there is a scale."""
    net, optimizer, x, y = setup(name, **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(net(x), y)).backward()
        if infinite:
            next(p for p in net.parameters() if p.grad is not None).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_gradients_are_unscaled_and_infinite_ones_skip_the_step(name, how):
    expected = scaled_step(name, how, None, infinite=False)
    found = scaled_step(name, how, 2.0**12, infinite=False)  # a power of 2, which rounds nothing
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    start = [p.detach() for p in setup(name, **how)[0].parameters()]
    skipped = scaled_step(name, how, 2.0**12, infinite=True)
    assert all(torch.equal(a, b) for a, b in zip(skipped, start, strict=True))


@pytest.mark.parametrize("name", ["radam", "sm"])
def test_sabotage_a_step_that_says_that_it_unscales_is_noticed(name, monkeypatch):
    monkeypatch.setattr(SphereOptimizer, "_step_supports_amp_scaling", True)
    with pytest.raises(AssertionError):
        test_scaled_gradients_are_unscaled_and_infinite_ones_skip_the_step(name, {"fused": True})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients_are_refused_before_anything_moves(name):
    _, optimizer, _, _ = setup(name)
    (number, index, weight, _), *_ = [
        (number, *found)
        for number, group in enumerate(optimizer.param_groups)
        for found in optimizer._spheres_of(group)
    ]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(params)
    weight.grad = weight.grad.to_sparse()
    where = optimizer.param_groups[number]["param_names"][index]
    with pytest.raises(StepInputError, match=rf"^{where}: found a gradient of layout torch.sparse_coo") as caught:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert "weight.grad = weight.grad.to_dense()" in str(caught.value)
    weight.grad = weight.grad.to_dense()
    optimizer.step()
    assert not torch.equal(weight, next(b for a, b in zip(params, before, strict=True) if a is weight))


def test_every_optimizer_of_the_package_is_in_the_table():
    kinds = {value for value in vars(mn.optim).values() if isinstance(value, type)}
    steppers = {kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)}
    assert steppers == {entry.kind for entry in OPTIMIZERS.values()}
