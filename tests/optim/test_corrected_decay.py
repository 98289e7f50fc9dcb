"""Groups of scale-invariant weights for any optimizer, and weight decay on them that follows the schedule."""

import copy
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

import manifold_nets as mn
from manifold_nets.errors import ArgumentTypeError, OptimizerStateError, OptionError, ReportMismatchError
from manifold_nets.optim import CorrectedDecay

STEPS, DECAY, RATE = 12, 0.3, 0.05
KINDS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=RATE, betas=(0.8, 0.9)),
    "fused adamw": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(RATE), betas=(0.8, 0.9), fused=True),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3)).double()


@functools.cache
def report():
    return mn.diagnose(network(), torch.randn(16, 4, dtype=torch.float64))


NAMES = [["0.weight"], ["3.weight", "4.weight"], ["0.bias", "1.weight", "1.bias", "3.bias", "4.bias"]]


def names(optimizer):
    return [group["param_names"] for group in optimizer.param_groups]


def gradients(net, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def made(kind="adamw", **options):
    net = network()
    optimizer = KINDS[kind](mn.param_groups(net, report=report(), weight_decay=DECAY))
    schedule = CosineAnnealingLR(optimizer, STEPS)
    return net, optimizer, schedule, CorrectedDecay(optimizer, **options)


def train(net, optimizer, schedule, steps):
    for step in steps:
        gradients(net, step)
        optimizer.step()
        schedule.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_a_report_sets_invariant_weights_apart():
    net = network()
    groups = mn.param_groups(net, report=report(), weight_decay=DECAY)
    assert [group["param_names"] for group in groups] == NAMES
    assert [group["weight_decay"] for group in groups] == [DECAY, DECAY, 0.0]
    assert [group.get("scale_invariant") for group in groups] == [True, None, None]
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in net.parameters())
    # One decay for both kinds: what the plain groups do.
    assert {n for g in mn.param_groups(net, weight_decay=DECAY)[:1] for n in g["param_names"]} == {*NAMES[0], *NAMES[1]}


def test_frozen_constrained_and_wrapped_weights():
    net = network()
    assert (
        names(torch.optim.SGD(mn.param_groups(torch.compile(net, backend="eager"), report=report()), lr=0.1)) == NAMES
    )
    assert names(torch.optim.SGD(mn.param_groups(nn.DataParallel(net), report=report()), lr=0.1)) == NAMES
    converted = mn.convert(copy.deepcopy(net), report())
    groups = mn.param_groups(converted, report=report())
    assert "manifolds" in groups[0]
    assert not any(group.get("scale_invariant") for group in groups)
    net[0].weight.requires_grad_(False)
    assert [group["param_names"] for group in mn.param_groups(net, report=report())] == NAMES[1:]


def test_a_report_of_another_model_is_refused():
    net = network()
    with pytest.raises(ReportMismatchError, match=r"0\.weight"):
        mn.param_groups(nn.Sequential(nn.Linear(5, 6)), report=report())
    with pytest.raises(ArgumentTypeError, match="diagnose"):
        mn.param_groups(net, report=torch.ones(2))


@EVERY
def test_torchs_optimizers_keep_the_groups(kind):
    net, optimizer, schedule, _ = made(kind)
    train(net, optimizer, schedule, range(3))
    other_net, other, *_ = made(kind)
    other.load_state_dict(optimizer.state_dict())
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    copies = [other, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for kept in copies:
        assert names(kept) == NAMES
        assert [group.get("scale_invariant") for group in kept.param_groups] == [True, None, None]
        assert kept.param_groups[0]["initial_weight_decay"] == DECAY
        kept.add_param_group({"params": [("extra", extra)], "scale_invariant": True, "weight_decay": 0.5})
        CorrectedDecay(kept)
        ratio = float(kept.param_groups[0]["lr"]) / RATE
        assert kept.param_groups[0]["weight_decay"] == pytest.approx(DECAY * ratio, rel=1e-6)
        assert kept.param_groups[1]["weight_decay"] == DECAY
        assert kept.param_groups[3]["initial_weight_decay"] == 0.5
    assert other_net is not net


def test_distributed_checkpoints_keep_the_groups():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net, optimizer, schedule, _ = made()
    train(net, optimizer, schedule, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    expected = train(net, optimizer, schedule, range(3, STEPS))
    other, resumed, late, decay = made()
    other.load_state_dict({k: v.clone() for k, v in network().state_dict().items()})
    train(other, resumed, late, range(3))
    resumed.param_groups[0]["initial_weight_decay"] = 99.0
    set_optimizer_state_dict(other, resumed, saved)
    assert resumed.param_groups[0]["initial_weight_decay"] == DECAY
    assert decay.optimizer is resumed
    for value, wanted in zip(train(other, resumed, late, range(3, STEPS)), expected, strict=True):
        assert torch.equal(value, wanted)


class Flattened:
    """As DeepSpeed's ZeRO: one flat tensor for each group takes the place of its parameters."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.parts = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self):
        for group, parts in zip(self.param_groups, self.parts, strict=True):
            group["params"][0].grad = torch.cat([p.grad.flatten() for p in parts])
        self.optimizer.step()
        for group, parts in zip(self.param_groups, self.parts, strict=True):
            flat = group["params"][0].detach()
            for part, values in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
                part.data.copy_(values.view_as(part))


@pytest.mark.parametrize("late", [False, True])
def test_flattened_groups_are_corrected_alike(late):
    expected = train(*made()[:3], range(STEPS))
    net = network()
    optimizer = KINDS["adamw"](mn.param_groups(net, report=report(), weight_decay=DECAY))
    if late:
        flattened = Flattened(optimizer)
        schedule = CosineAnnealingLR(optimizer, STEPS)
        CorrectedDecay(flattened)
    else:
        schedule = CosineAnnealingLR(optimizer, STEPS)
        CorrectedDecay(optimizer)
        flattened = Flattened(optimizer)
    for value, wanted in zip(train(net, flattened, schedule, range(STEPS)), expected, strict=True):
        assert torch.allclose(value, wanted, rtol=64 * torch.finfo(torch.float64).eps, atol=0)


# ---- the correction --------------------------------------------------------------------------------------------------


def oracle(kind, start, steps, *, corrected):
    """The published update, in numpy: AdamC and SGDC with the rates of a cosine."""
    x, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, gradient in enumerate(steps, start=1):
        rate = RATE * (1 + math.cos(math.pi * (t - 1) / STEPS)) / 2
        decay = DECAY * (rate / RATE if corrected else 1)
        if kind == "sgd":
            m = gradient + decay * x if t == 1 else 0.9 * m + gradient + decay * x
            x = x - rate * m
        else:
            m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
            x = x - rate * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8) - rate * decay * x
    return x


def check_paths(kind):
    net, optimizer, schedule, _ = made(kind)
    start = [p.detach().numpy().copy() for p in net.parameters()]
    taken = []
    for step in range(STEPS):
        gradients(net, step)
        taken.append([p.grad.numpy().copy() for p in net.parameters()])
        optimizer.step()
        schedule.step()
    tolerance = 1e-6 if "fused" in kind else 1e3 * torch.finfo(torch.float64).eps  # there the rate is a float32
    for number, (name, parameter) in enumerate(net.named_parameters()):
        if name.endswith("bias") or parameter.ndim < 2:
            continue
        grads = [gradient[number] for gradient in taken]
        wanted = oracle(kind.split()[-1], start[number], grads, corrected=name in NAMES[0])
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=tolerance, atol=tolerance)


@EVERY
def test_steps_are_the_published_ones_on_exactly_the_invariant_weights(kind):
    check_paths(kind)


@pytest.mark.parametrize("fault", ["no correction", "all groups"])
@EVERY
def test_sabotage_another_decay_is_noticed(kind, fault, monkeypatch):
    if fault == "no correction":
        monkeypatch.setattr(CorrectedDecay, "_before_step", lambda self, *_: None)
    else:
        monkeypatch.setattr(CorrectedDecay, "_groups", lambda self: iter(self.optimizer.param_groups))
    with pytest.raises(AssertionError):
        check_paths(kind)


def drift(corrected):
    """How much ‖g‖/‖w‖ rises along a cosine to a hundredth of the rate: noise that is tangent to one filter."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, generator=generator, dtype=torch.float64))
    steps, rate, decay = 4000, 0.1, 0.1
    group = {"params": [weight], "scale_invariant": True}
    optimizer = torch.optim.SGD([group], lr=rate, weight_decay=decay)
    schedule = CosineAnnealingLR(optimizer, steps, eta_min=rate / 100)
    if corrected:
        CorrectedDecay(optimizer)
    ratios = []
    for _ in range(steps):
        with torch.no_grad():
            noise = torch.randn(64, generator=generator, dtype=torch.float64)
            norm = weight.norm()
            tangent = noise - weight * (weight @ noise) / norm**2
            weight.grad = tangent / tangent.norm() / norm  # of a function that does not see the scale
        ratios.append(float(weight.grad.norm() / norm))
        optimizer.step()
        schedule.step()
    assert ratios[steps // 4] == pytest.approx(math.sqrt(2 * decay / rate), rel=0.15)
    return ratios[-1] / ratios[steps // 4]


def test_the_ratio_of_gradient_and_weight_stays_along_the_schedule():
    assert drift(corrected=True) == pytest.approx(1, abs=0.02)
    assert drift(corrected=False) > 2


# ---- schedules and states --------------------------------------------------------------------------------------------


def decays_along(schedule_of, steps=10, **options):
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(2))], "scale_invariant": True}], lr=RATE, weight_decay=DECAY
    )
    schedule = schedule_of(optimizer)
    CorrectedDecay(optimizer, **options)
    shares = []
    for _ in range(steps):
        optimizer.step()
        group = optimizer.param_groups[0]
        shares.append((group["lr"], group["weight_decay"] / DECAY))
        schedule.step()
    return shares


def test_the_largest_rate_is_found_behind_warm_ups():
    def warm_up(optimizer):
        parts = [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, 6)]
        return SequentialLR(optimizer, parts, milestones=[4])

    for schedule, largest, options in (
        (warm_up, RATE, {}),
        (lambda optimizer: OneCycleLR(optimizer, max_lr=3 * RATE, total_steps=11), 3 * RATE, {}),
        (warm_up, 2 * RATE, {"max_lr": 2 * RATE}),
    ):
        for rate, share in decays_along(schedule, **options):
            assert share == pytest.approx(rate / largest, rel=1e-12)


def test_a_rate_above_the_largest_becomes_the_largest():
    shares = decays_along(lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 + step), max_lr=RATE)
    assert [share for _, share in shares] == pytest.approx([1.0] * 10)


def test_cyclic_rates_need_the_largest_one():
    def cyclic(optimizer):
        return CyclicLR(optimizer, base_lr=RATE / 10, max_lr=RATE, step_size_up=4, cycle_momentum=False)

    for rate, share in decays_along(cyclic, max_lr=RATE):
        assert share == pytest.approx(rate / RATE, rel=1e-12)
    # Without it each rate of the first rise is the largest so far, as the documentation says.
    assert [share for _, share in decays_along(cyclic)[:5]] == [1.0] * 5


def test_interrupted_and_resumed_follows_the_same_path():
    expected = train(*made()[:3], range(STEPS))
    net, optimizer, schedule, decay = made(max_lr=RATE)
    train(net, optimizer, schedule, range(5))
    saved = pickle.loads(pickle.dumps([part.state_dict() for part in (net, optimizer, schedule, decay)]))
    other = made()
    other[3].optimizer.param_groups[0]["initial_weight_decay"] = 7.0
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    found = train(*other[:3], range(5, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(OptimizerStateError, match="2 groups"):
        decay.load_state_dict({"groups": saved[3]["groups"] * 2})


def test_it_can_be_removed():
    net, optimizer, schedule, decay = made()
    train(net, optimizer, schedule, range(5))
    assert optimizer.param_groups[0]["weight_decay"] < DECAY
    decay.remove()
    train(net, optimizer, schedule, range(5, 8))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, DECAY, 0.0]
    assert "peak_lr" not in optimizer.param_groups[0]
    state = decay.state_dict()
    decay.remove()
    assert decay.state_dict() == state == {"groups": [{"initial_weight_decay": DECAY, "peak_lr": RATE}]}
    with pytest.raises(OptimizerStateError, match=r"an object after remove\(\)"):
        decay.load_state_dict(state)


def test_what_cannot_be_corrected_is_refused():
    net = network()
    with pytest.raises(ArgumentTypeError, match=r"param_groups\(model, report="):
        CorrectedDecay(torch.optim.SGD(net.parameters(), lr=0.1))
    groups = mn.param_groups(net, report=report(), weight_decay=0.1)
    with pytest.raises(OptionError, match="decoupled_weight_decay"):
        CorrectedDecay(torch.optim.Adam(groups))
    for kind in (torch.optim.RMSprop, torch.optim.NAdam):  # their decay is in the gradient
        with pytest.raises(OptionError, match="decoupled_weight_decay"):
            CorrectedDecay(kind(groups))
    for largest in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(OptionError, match="max_lr"):
            CorrectedDecay(torch.optim.AdamW(groups), max_lr=largest)


def test_a_model_without_a_weight_of_its_own_scale_is_named_as_the_cause():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    groups = mn.param_groups(net, report=mn.diagnose(net, torch.randn(16, 4, dtype=torch.float64)), weight_decay=0.1)
    with pytest.raises(ArgumentTypeError, match="the report has no weight that is scale-invariant by itself"):
        CorrectedDecay(torch.optim.AdamW(groups))
