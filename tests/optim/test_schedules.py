"""The bold driver, and torch's schedulers on our optimizers."""

import copy
import itertools
import math
import pickle

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler, swa_utils

import manifold_nets as mn
from manifold_nets.optim import BoldDriver, RiemannianAdam, RiemannianSGD


def optimizer_with(lr=1.0, kind=RiemannianSGD, **options):
    sphere = mn.SphereProduct((3, 4))
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    plain = torch.nn.Parameter(torch.ones(2))
    return kind([{"params": [weight]}, {"params": [plain], "lr": lr / 2}], lr=lr, **options)


def rates_after(costs, **options):
    schedule = BoldDriver(optimizer_with(), **options)
    rates = []
    for cost in costs:
        schedule.step(cost)
        rates.append(schedule.get_last_lr()[0])
    return rates


NAN, INF = math.nan, math.inf
TABLE = [
    ([3.0], [1.0]),
    ([3.0, 2.0, 2.0, 2.5, 2.4], [1.0, 1.1, 1.21, 0.605, 0.6655]),  # equal cost did not rise
    ([3.0, NAN, 2.9, 3.1], [1.0, 0.5, 0.55, 0.275]),  # 2.9 is compared with 3
    ([3.0, NAN, 3.1], [1.0, 0.5, 0.25]),
    ([3.0, INF, INF], [1.0, 0.5, 0.25]),
    ([NAN, 2.0, 1.0], [1.0, 1.0, 1.1]),  # the first epoch only records, and NaN is not compared with
    ([NAN, NAN, 1.0], [1.0, 0.5, 0.5]),
]


def check_table(make):
    for costs, rates in TABLE:
        assert make(costs) == pytest.approx(rates, rel=1e-12)


def test_bold_driver_follows_the_table():
    check_table(rates_after)


@pytest.mark.parametrize("options", [{"increase": 1.0}, {"decrease": 0.9}])
def test_other_factors_fail_the_table(options):
    with pytest.raises(AssertionError):
        check_table(lambda costs: rates_after(costs, **options))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_bold_driver_counts_rises_and_falls(costs):
    rises = sum(b > a for a, b in itertools.pairwise(costs))
    expected = 1.1 ** (len(costs) - 1 - rises) * 0.5**rises
    assert rates_after(costs)[-1] == pytest.approx(expected, rel=1e-12)


def test_bold_driver_moves_all_groups_and_tensor_rates_in_place():
    rate = torch.tensor(0.5)
    optimizer = optimizer_with()
    optimizer.param_groups[1]["lr"] = rate
    schedule = BoldDriver(optimizer)
    schedule.step(torch.tensor(2.0))
    first = schedule.get_last_lr()
    schedule.step(torch.tensor([3.0]))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[1]["lr"] is rate
    assert float(rate) == 0.25
    assert [float(lr) for lr in first] == [1.0, 0.5]


def test_bold_driver_goes_on_from_its_state():
    costs = [3.0, 2.0, NAN, 2.5, 2.4, 2.4]
    optimizer, fresh = optimizer_with(), optimizer_with()
    schedule, resumed = BoldDriver(optimizer, increase=1.2), BoldDriver(fresh)
    for cost in costs[:3]:
        schedule.step(cost)
    fresh.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(pickle.loads(pickle.dumps(schedule.state_dict())))
    for cost in costs[3:]:
        schedule.step(cost)
        resumed.step(cost)
    assert resumed.get_last_lr() == schedule.get_last_lr()
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert "optimizer" not in schedule.state_dict()


@pytest.mark.parametrize(
    "options", [{"increase": 0.9}, {"increase": NAN}, {"increase": INF}, {"decrease": 0.0}, {"decrease": 1.0}]
)
def test_bold_driver_refuses_factors_out_of_range(options):
    with pytest.raises(ValueError, match=r"found .*; expected"):
        BoldDriver(optimizer_with(), **options)


def test_bold_driver_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match="found list"):
        BoldDriver([1.0])


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.95),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9**epoch),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),  # moves the momentum, or beta 1, too
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: epoch / 4),  # warms up from 0
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.02, anneal_epochs=4),
}


def test_no_scheduler_of_torch_is_missing():
    present = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert len(present) > 12
    assert present - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


def scheduled_path(name, kind, torchs, options, fault=None):
    """Compare a scheduled run with a plain one that is told the settings of torch's optimizer before every step."""
    torch.manual_seed(0)
    optimizer = optimizer_with(kind=kind, **options)
    told = copy.deepcopy(optimizer)
    twin = torchs([{"params": [torch.ones(2)]}, {"params": [torch.ones(2)], "lr": 0.5}], lr=1.0, **options)
    weight, other = (o.param_groups[0]["params"][0] for o in (optimizer, told))
    schedules = [SCHEDULERS[name](o) for o in (optimizer, twin)]
    before, rates = weight.detach().clone(), set()
    for _ in range(6):
        rates.add(float(twin.param_groups[0]["lr"]))
        for group, settings in zip(told.param_groups, twin.param_groups, strict=True):
            group |= {key: settings[key] for key in ("lr", "momentum", "betas") if key in settings}
            if fault is not None:
                group |= fault
        weight.grad = torch.randn_like(weight)
        other.grad = weight.grad.clone()
        told.step()
        for o, schedule in zip((optimizer, twin), schedules, strict=True):
            o.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in twin.param_groups]
        assert torch.equal(weight, other), "the paths differ"
        assert weight.manifold.check_point_on_manifold(weight)
    assert len(rates) > 1
    assert not torch.equal(weight, before)


PAIRS = pytest.mark.parametrize(
    ("kind", "torchs", "options"),
    [
        (RiemannianSGD, torch.optim.SGD, {"momentum": 0.9}),
        (RiemannianAdam, torch.optim.Adam, {}),
    ],
)


@PAIRS
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers_set_what_they_set_in_torch_and_the_steps_follow(name, kind, torchs, options):
    scheduled_path(name, kind, torchs, options)


@PAIRS
def test_sabotage_a_setting_that_does_not_follow_is_noticed(kind, torchs, options):
    stuck = {"momentum": 0.9} if kind is RiemannianSGD else {"betas": (0.9, 0.999)}
    for fault in ({"lr": 0.5}, stuck):
        with pytest.raises(AssertionError, match="the paths differ"):
            scheduled_path("OneCycleLR", kind, torchs, options, fault)
