"""Monitor: what it measures, what it predicts, what it says, and that training stays as it is."""

import copy
import csv
import functools
import json
import math
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.browser import measure, photograph
from helpers.example_modules import example
from helpers.page_cases import Page, check_accessible, check_contrast, check_picture, check_self_contained
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

import manifold_nets as mn
from manifold_nets import monitor as module
from manifold_nets import monitor_page
from manifold_nets.cli import main
from manifold_nets.errors import ArgumentTypeError, OptionError, ReportMismatchError
from manifold_nets.monitor import Finding, History, MonitorWarning, outlook
from manifold_nets.monitor_page import page_html
from manifold_nets.monitor_records import COLUMNS, QUANTITIES, as_writers

EPS = torch.finfo(torch.float64).eps


class Network(nn.Module):
    """Groups of every kind: filters, transposed filters, blocks of filters and a whole matrix."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False)
        self.up_norm = nn.InstanceNorm2d(4)
        self.blocks = nn.Conv2d(4, 6, 3, bias=False)
        self.group_norm = nn.GroupNorm(3, 6)
        self.mix = nn.Linear(54, 7, bias=False)
        self.layer_norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.up_norm(self.up(self.norm(self.conv(x)).relu()))
        x = self.group_norm(self.blocks(x.relu())).relu().flatten(1)
        return self.head(self.layer_norm(self.mix(x)))


WATCHED = {"conv.weight": 6, "up.weight": 4, "blocks.weight": 3, "mix.weight": 1}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype)


def batch(number=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(12, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(3, (12,), generator=generator)


@pytest.fixture(scope="module")
def report():
    return mn.diagnose(network(), batch()[0])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


BOTH = pytest.mark.parametrize("make", [sgd, adamw])


def train(model, optimizer, steps, each=lambda: None):
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(step, next(model.parameters()).dtype)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        each()


# ---- what it measures ------------------------------------------------------------------------------------------------


def groups_of(name, weight):
    """The groups of a weight as vectors, written out by hand."""
    w = weight.detach().numpy()
    if name == "conv.weight":
        return [w[i].ravel() for i in range(6)]
    if name == "up.weight":  # channels 0, 1 of the output come from inputs 0 … 2, channels 2, 3 from 3 … 5
        return [w[3 * g : 3 * g + 3, c].ravel() for g in range(2) for c in range(2)]
    if name == "blocks.weight":
        return [w[2 * i : 2 * i + 2].ravel() for i in range(3)]
    return [w.ravel()]


def middle(values):
    return sorted(values)[(len(values) - 1) // 2]


def oracle(name, before, after, gradient):
    """Norms, angles and radial shares of a step from its weights and gradient, in long double."""
    triples = zip(*(groups_of(name, tensor) for tensor in (before, after, gradient)), strict=True)
    norms, angles, gradients, steps = [], [], [], []
    for u, v, g in ((np.longdouble(a) for a in triple) for triple in triples):
        n = np.sqrt(u @ u)
        across = v - u * (u @ v) / n**2
        norms.append(n)
        angles.append(np.arctan2(np.sqrt(across @ across), u @ v / n))
        gradients.append(abs(u @ g) / n / np.sqrt(g @ g))
        steps.append(abs(u @ (v - u)) / n / np.sqrt((v - u) @ (v - u)))
    return {
        "norm": middle(norms), "norm_min": min(norms), "norm_max": max(norms), "rotation": middle(angles),
        "rotation_max": max(angles), "radial_gradient": middle(gradients), "radial_step": middle(steps),
    }  # fmt: skip


def check_measured(report, make, steps=4):
    """Each sample agrees with the oracle."""
    model = network()
    optimizer = make(model)
    monitor = mn.Monitor(model, optimizer, report, every=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def compare():
        rows = {row["weight"]: row for row in monitor.history.rows()}
        assert {name: row["groups"] for name, row in rows.items()} == WATCHED
        for name, row in rows.items():
            weight = model.get_parameter(name)
            expected = oracle(name, before[name], weight, weight.grad)
            for quantity, value in expected.items():
                # A share is off by roundings of inner products; an angle by theirs over its own size.
                off = 64 * EPS if "radial" in quantity else 1e4 * EPS * float(value)
                assert row[quantity] == pytest.approx(float(value), abs=off), (name, quantity)
            power = 2 if make is sgd else 1
            assert row["effective_lr"] == pytest.approx(row["lr"] / row["norm"] ** power, rel=8 * EPS)
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    train(model, optimizer, range(steps), compare)


@BOTH
def test_norms_angles_and_shares_are_those_of_the_groups(report, make):
    check_measured(report, make)


@pytest.mark.parametrize("fault", ["groups", "snapshot", "gradient"])
def test_sabotage_wrong_sums_are_noticed(report, fault, monkeypatch):
    watched = module._Weight
    if fault == "groups":
        honest = watched.__init__

        def by_rows(self, name, parameter, partition, *args, **options):
            if name == "up.weight":
                partition = mn.Partition(partition.shape, partition.view, (0, 1))
            honest(self, name, parameter, partition, *args, **options)

        monkeypatch.setattr(watched, "__init__", by_rows)
    elif fault == "snapshot":
        monkeypatch.setattr(watched, "keep", lambda self: self.rows(self.parameter))
    else:
        monkeypatch.setattr(watched, "gradient", lambda self, before: self.step(before)[:2])
    with pytest.raises((AssertionError, MonitorWarning)):
        check_measured(report, sgd)


def test_a_part_of_the_groups_is_measured_where_asked(report):
    model = network()
    optimizer = sgd(model)
    part, whole = (mn.Monitor(model, optimizer, report, every=1, max_groups=most) for most in (2, None))
    before = {name: model.get_parameter(name).detach().clone() for name in WATCHED}
    train(model, optimizer, range(1))
    for few, row in zip(part.history.rows(), whole.history.rows(), strict=True):
        every = math.ceil(WATCHED[row["weight"]] / 2)
        norms = [float(np.linalg.norm(g)) for g in groups_of(row["weight"], before[row["weight"]])]
        assert few["norm_max"] == pytest.approx(max(norms[::every]), rel=8 * EPS)
        assert row["norm_max"] == pytest.approx(max(norms), rel=8 * EPS)
        assert few["groups"] == row["groups"]


def test_every_tenth_step_is_measured_and_steps_are_counted_from_zero(report):
    model = network()
    optimizer = sgd(model)
    monitor = mn.Monitor(model, optimizer, report)
    train(model, optimizer, range(25))
    assert monitor.history.steps == [0, 10, 20]
    assert monitor.step == 25
    monitor.close()
    train(model, optimizer, range(10))
    assert monitor.history.steps == [0, 10, 20]


def test_layers_are_summed_up():
    history = History(["a.x.weight", "a.y.weight", "b.z.weight"], [2, 3, 4])
    assert history.rows() == history.summary(depth=1) == []
    for step in (0, 10):
        history.append(step, [[value + step] * len(QUANTITIES) for value in (1.0, 3.0, 7.0)])
    first, second = history.summary(depth=1)
    assert (first["layer"], first["groups"], first["norm"]) == ("a", 5, 12.0)
    assert (first["norm_min"], first["norm_max"]) == (11.0, 13.0)
    assert (second["layer"], second["groups"], second["rotation"]) == ("b", 4, 17.0)
    assert history.layers(depth=2) == {"a.x": [0], "a.y": [1], "b.z": [2]}
    assert [row["weight"] for row in history.summary()] == history.weights


# ---- nothing changes -------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(72, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x.flatten(1))


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": adamw,
    "foreach": lambda model: torch.optim.Adam(model.parameters(), foreach=True),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters()),
    "riemannian": lambda model: mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("monitored", ["report", "inputs", "first batch"])
def test_a_run_with_a_monitor_is_the_same_bit_for_bit(kind, monitored):
    paths = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Noisy()
        optimizer = OPTIMIZERS[kind](model)
        x = batch(0, torch.float32)[0]
        if watched:
            given = {"report": mn.diagnose(model, x)} if monitored == "report" else {}
            given |= {"inputs": x} if monitored == "inputs" else {}
            monitor = mn.Monitor(model, optimizer, **given, every=2)
        train(model, optimizer, range(6))
        paths.append([*(value.clone() for value in model.state_dict().values()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))
    assert monitor.history.steps == [0, 2, 4]
    assert monitor.history.weights == ["net.0.weight"]
    assert all(row["rotation"] > 0 for row in monitor.history.rows())


@pytest.mark.filterwarnings("ignore::manifold_nets.monitor.MonitorWarning")
def test_closures(report):
    for make in (lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3), sgd):
        paths = []
        for watched in (False, True):
            model = network()
            optimizer = make(model)
            monitor = mn.Monitor(model, optimizer, report, every=1) if watched else None

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = cross_entropy(model(batch()[0]), batch()[1])
                loss.backward()
                return loss

            for _ in range(2):
                optimizer.step(closure)
            paths.append([value.clone() for value in model.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))
        assert all(row["radial_gradient"] < 0.2 for row in monitor.history.rows())


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_leaves_out_are_not_counted(report, fused):
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monitor = mn.Monitor(model, optimizer, report, every=1)
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(step, torch.float32)
        scaler.scale(cross_entropy(model(x), y)).backward()
        if step == 1:
            model.head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert monitor.history.steps == [0, 1, 2]
    assert all(row["rotation"] > 0 for place in range(3) for row in monitor.history.rows(place))


def test_a_parameter_that_was_replaced_is_named_once(report):
    model = network()
    optimizer = sgd(model)
    monitor = mn.Monitor(model, optimizer, report, every=1)
    train(model, optimizer, range(1))
    model.conv.weight = nn.Parameter(model.conv.weight.detach().clone())
    with pytest.warns(MonitorWarning, match=r"^conv\.weight: the parameter was replaced in the model"):
        train(model, optimizer, range(1))
    train(model, optimizer, range(1))
    assert monitor.step == 3


# ---- the equilibrium -------------------------------------------------------------------------------------------------


def noise_on(weights, generator):
    """The gradient of a function that sees directions alone, and of which nothing but noise is known."""
    with torch.no_grad():
        noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
        norms = weights.norm(dim=1, keepdim=True)
        noise -= weights * (weights * noise).sum(1, keepdim=True) / norms**2
        weights.grad = noise / noise.norm(dim=1, keepdim=True) / norms


def simulated(make, norm, steps, entries=120):
    """Rotation and fourth or second power of the norm along a run, means over 16 groups."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(16, entries, generator=generator, dtype=torch.float64)
    weights = nn.Parameter(norm * weights / weights.norm(dim=1, keepdim=True))
    optimizer = make([weights])
    found = outlook(optimizer.param_groups[0])
    angles, powers = [], []
    for _ in range(steps):
        noise_on(weights, generator)
        before = weights.detach().clone()
        optimizer.step()
        chords = (weights / weights.norm(dim=1, keepdim=True) - before / before.norm(dim=1, keepdim=True)).detach()
        angles.append(float((2 * (chords.norm(dim=1) / 2).asin()).square().mean().sqrt()))
        powers.append(float(before.norm(dim=1).pow(2 * found.power).mean()))
    return found, np.array(angles), np.array(powers)


DECAYING = {
    "sgd": (lambda w: torch.optim.SGD(w, lr=0.1, weight_decay=0.02), 1.5),
    "momentum": (lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, weight_decay=2e-3), 4.0),
    "nesterov": (lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.8, nesterov=True, weight_decay=4e-3), 3.4),
    "dampening": (lambda w: torch.optim.SGD(w, lr=0.1, momentum=0.9, dampening=0.9, weight_decay=0.02), 1.5),
    "adamw": (lambda w: torch.optim.AdamW(w, lr=1e-3, weight_decay=2.0), 0.17),
    "adamw, other betas": (lambda w: torch.optim.AdamW(w, lr=1e-3, betas=(0.6, 0.99), weight_decay=2.0), 0.17),
    "ours": (lambda w: mn.optim.RiemannianSGD(w, lr=0.1, momentum=0.9, weight_decay=2e-3), 4.0),
}


@functools.cache
def long_run(kind):
    return simulated(*DECAYING[kind], 2000)


def check_equilibrium(kind):
    _, angles, _ = long_run(kind)
    found = outlook(DECAYING[kind][0]([nn.Parameter(torch.ones(2))]).param_groups[0])
    mean = np.sqrt(np.square(angles[1000:]).mean())
    # Statistics of 16,000 angles, and terms of the order of rate times decay; AdamW's second moments are no constants.
    assert mean == pytest.approx(found.rotation, rel=0.03 if "adamw" in kind else 0.01)


@pytest.mark.parametrize("kind", DECAYING)
def test_the_rotation_of_the_long_run_is_the_predicted_one(kind):
    check_equilibrium(kind)


@pytest.mark.parametrize(("kind", "option"), [("nesterov", "nesterov"), ("dampening", "dampening"), ("adamw", "betas")])
def test_sabotage_another_prediction_is_noticed(kind, option, monkeypatch):
    others = {"nesterov": False, "dampening": 0, "betas": (0.8, 0.999)}
    monkeypatch.setitem(globals(), "outlook", lambda group: module.outlook({**group, option: others[option]}))
    with pytest.raises(AssertionError):
        check_equilibrium(kind)


# AdamW's second moments are of the past, when a norm that grows from below was smaller: it takes longer.
@pytest.mark.parametrize(
    ("kind", "start"),
    [
        *((kind, start) for kind in ("sgd", "momentum", "dampening") for start in (0.6, 1.6)),
        ("adamw, other betas", 1.6),
    ],
)
def test_equilibrium_is_approached_at_the_predicted_rate(kind, start):
    make, norm = DECAYING[kind]
    _, _, rest = long_run(kind)
    found, _, powers = simulated(make, start * norm, 1000)
    limit, first = rest[1000:].mean(), 100
    last = first + int(0.7 / found.relaxation)
    # Momentum and AdamW's second moments lag behind, by ten and by a hundred steps.
    rate = math.log((powers[first] - limit) / (powers[last] - limit)) / (last - first)
    assert rate == pytest.approx(found.relaxation, rel=0.25)


def test_predictions_agree_with_those_for_matched_rates_and_are_missing_where_nothing_is_known():
    from manifold_nets.symmetry.optimizer_settings import OptimizerSettings

    weight = [nn.Parameter(torch.ones(2, 2))]
    momentum = torch.optim.SGD(weight, lr=0.1, momentum=0.9, weight_decay=5e-4).param_groups[0]
    assert outlook(momentum).rotation == OptimizerSettings("sgd", 0.1, 0.9, weight_decay=5e-4).equilibrium_rotation
    for optimizer, power in (
        (torch.optim.SGD(weight, lr=0.1), 2),
        (torch.optim.SGD(weight, lr=0.0, weight_decay=0.1), 2),
        (torch.optim.Adam(weight, lr=0.1, weight_decay=0.1), 1),
        (torch.optim.RMSprop(weight, lr=0.1, weight_decay=0.1), 1),
    ):
        found = outlook(optimizer.param_groups[0])
        assert found.power == power
        assert math.isnan(found.rotation)
        assert math.isnan(found.relaxation)
    assert outlook(momentum, on_sphere=True).power == 0


def first_within_a_tenth(make, norm, steps):
    found, angles, _ = simulated(make, norm, steps)
    smooth = np.sqrt(np.convolve(np.square(angles), np.full(50, 1 / 50), "valid"))
    return 25 + int(np.argmax(np.abs(smooth / found.rotation - 1) < 0.1))


class Directions(nn.Module):
    """Weights of which only the direction has an effect."""

    def __init__(self, norm):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(16, 120, generator=generator, dtype=torch.float64)
        self.linear = nn.Linear(120, 16, bias=False)
        self.linear.weight = nn.Parameter(norm * weights / weights.norm(dim=1, keepdim=True))
        self.norm = nn.BatchNorm1d(16, affine=False, dtype=torch.float64)

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "start"), [("momentum", 2.0), ("momentum", 0.5), ("adamw, other betas", 3.0)])
def test_steps_to_equilibrium_are_those_that_it_takes(kind, start):
    make, norm = DECAYING[kind]
    model = Directions(start * norm)
    optimizer = make(model.parameters())
    monitor = mn.Monitor(model, optimizer, inputs=torch.randn(40, 120, dtype=torch.float64), every=1)
    generator = torch.Generator().manual_seed(1)
    predicted = []
    for _ in range(100):
        noise_on(model.linear.weight, generator)
        optimizer.step()
        predicted.append(monitor.history.rows()[0]["steps_to_equilibrium"])
    taken = first_within_a_tenth(make, start * norm, 3000)
    # Momentum and smoothing have settled by step 60.
    assert predicted[60] + 60 == pytest.approx(taken, rel=0.15), (predicted[::20], taken)


def test_the_first_examples_of_a_batch_are_diagnosed(monkeypatch):
    """Forty images are more than the diagnosis needs; arguments of different lengths belong together as they are."""
    seen = []
    monkeypatch.setattr(module, "diagnose", lambda model, inputs: seen.append(inputs) or mn.diagnose(model, inputs))

    class Scaled(Network):
        def forward(self, x, scale=1.0):
            return super().forward(x if isinstance(scale, float) else x * scale)

    for scale, sizes in ((), [32]), ((torch.ones((), dtype=torch.float64),), [32]), ((torch.ones(2, 1, 1),), [40, 2]):
        model = Scaled().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        mn.Monitor(model, optimizer)
        model(torch.randn(40, 2, 6, 6, dtype=torch.float64), *scale).sum().backward()
        optimizer.step()
        assert [len(leaf) for leaf in tree_leaves(seen[-1]) if leaf.ndim] == sizes


def test_sparse_gradients_are_measured_as_dense_ones():
    rows = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(5, 4, sparse=sparse)
        model = nn.Sequential(table, nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = mn.Monitor(model, optimizer, inputs=torch.arange(5), every=1)
        model(torch.tensor([0, 2, 2])).square().sum().backward()
        optimizer.step()
        rows.append(monitor.history.rows()[0])
    assert rows[0]["weight"] == "0.weight"
    for key in QUANTITIES:
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-6, nan_ok=True)


# ---- other models and optimizers -------------------------------------------------------------------------------------


def test_weights_on_spheres_are_watched_without_a_report(report):
    model = mn.convert(network(), report)
    optimizer = mn.optim.RiemannianSGD(mn.param_groups(model, sphere_lr=0.02), lr=0.1, weight_decay=0.1)
    monitor = mn.Monitor(model, optimizer, every=1)
    train(model, optimizer, range(3))
    assert {row["weight"]: row["groups"] for row in monitor.history.rows()} == WATCHED
    for row in monitor.history.rows():
        assert row["effective_lr"] == row["lr"] == 0.02
        assert row["weight_decay"] == 0.0
        assert math.isnan(row["equilibrium_rotation"])
        assert math.isnan(row["steps_to_equilibrium"])
        assert row["norm"] == pytest.approx(monitor.history.of("norm")[0, monitor.history.weights.index(row["weight"])])


@BOTH
@pytest.mark.parametrize("max_groups", [32, 2])
def test_a_run_that_goes_on_on_spheres_is_measured_as_the_plain_one(report, make, max_groups):
    plain = network()
    optimizer = make(plain)
    train(plain, optimizer, range(2))
    converted = mn.convert(plain, report)
    follow, step = (mn.optim.from_torch(optimizer, plain, converted, transfer=how) for how in ("follow", "step"))
    held = mn.Monitor(converted, step, every=1, max_groups=max_groups)
    monitors = [
        mn.Monitor(plain, optimizer, report, every=1, max_groups=max_groups),
        mn.Monitor(converted, follow, every=1, max_groups=max_groups),
    ]
    for normalization in [m for model in (plain, converted) for m in model.modules() if hasattr(m, "eps")]:
        normalization.eps = 1e-30  # the scale has no effect at all
    train(plain, optimizer, range(3))
    train(converted, follow, range(3))
    for quantity in QUANTITIES:
        expected, found = (monitor.history.of(quantity) for monitor in monitors)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=quantity)
    assert np.isfinite(monitors[1].history.of("steps_to_equilibrium")).all()
    train(converted, step, range(2))
    norms, power = held.history.of("norm"), 2 if make is sgd else 1
    np.testing.assert_allclose(norms[0], monitors[0].history.of("norm")[0], rtol=1e-12)
    np.testing.assert_array_equal(norms[0], norms[1])
    np.testing.assert_allclose(held.history.of("effective_lr"), held.history.of("lr") / norms**power, rtol=1e-12)
    assert np.isnan(held.history.of("equilibrium_rotation")).all()


def test_weights_of_both_kinds_are_measured_together(report):
    """One that is on spheres has the norm of the plain run, beside one that stayed in it."""
    plain = network()
    optimizer = sgd(plain)
    train(plain, optimizer, range(1))
    converted = mn.convert(plain, report, include="conv.weight")
    follow = mn.optim.from_torch(optimizer, plain, converted)
    monitors = [mn.Monitor(net, o, report, every=1) for net, o in ((plain, optimizer), (converted, follow))]
    train(plain, optimizer, range(1))
    train(converted, follow, range(1))
    before, after = (monitor.history.of("norm") for monitor in monitors)
    np.testing.assert_allclose(after, before, rtol=1e-4)
    assert float(converted.conv.weight.manifold.radii.max()) == 1.0


def test_wrapped_models_and_optimizers(report):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        model = network()
        optimizer = sgd(model)
        monitor = mn.Monitor(wrap(model), Wrapper(optimizer), report, every=1)
        train(model, optimizer, range(1))
        assert monitor.history.weights == list(WATCHED)


def test_weights_that_another_optimizer_trains_are_left_out(report):
    model = network()
    optimizer = sgd(model.conv)
    monitor = mn.Monitor(model, optimizer, report, every=1)
    train(model, optimizer, range(1))
    assert monitor.history.weights == ["conv.weight"]
    model.mix.weight.requires_grad_(False)
    optimizer = sgd(model)
    monitor = mn.Monitor(model, optimizer, report, every=1)
    train(model, optimizer, range(1))
    (frozen,) = [row for row in monitor.history.rows() if row["weight"] == "mix.weight"]
    assert frozen["rotation"] == 0
    assert math.isnan(frozen["radial_gradient"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(report, dtype):
    model = network(dtype)
    optimizer = sgd(model)
    monitor = mn.Monitor(model, optimizer, report, every=1)
    before = model.conv.weight.detach().clone()
    train(model, optimizer, range(1))
    after, row = model.conv.weight.detach(), monitor.history.rows()[0]
    expected = oracle("conv.weight", before.double(), after.double(), model.conv.weight.grad.double())
    # Sums are in float32, whatever the weights are in.
    assert row["rotation"] == pytest.approx(float(expected["rotation"]), rel=1e3 * torch.finfo(torch.float32).eps)


def test_another_default_device_does_not_matter(report):
    rows = []
    for device in ("cpu", "meta"):
        model = network()
        optimizer = sgd(model)
        model.zero_grad()
        cross_entropy(model(batch()[0]), batch()[1]).backward()
        with torch.device(device):
            monitor = mn.Monitor(model, optimizer, report, every=1)
            optimizer.step()
        rows.append(monitor.history.rows())
    assert rows[0] == rows[1]


def test_what_cannot_be_watched_is_refused(report):
    model = network()
    optimizer = sgd(model)
    with pytest.raises(ReportMismatchError):
        mn.Monitor(Noisy(), optimizer, report)
    with pytest.raises(ArgumentTypeError, match=r"conv\.weight, up\.weight.*Build the optimizer from"):
        mn.Monitor(model, sgd(network()), report)
    with pytest.raises(ArgumentTypeError, match="hooks"):
        mn.Monitor(model, object(), report)
    for options in ({"every": 0}, {"every": None}, {"every": 1.5}, {"max_groups": 0}, {"total_steps": -1}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}: found"):
            mn.Monitor(model, optimizer, report, **options)
    with pytest.raises(ArgumentTypeError, match="writer"):
        mn.Monitor(model, optimizer, report, writer=3)
    plain = nn.Linear(3, 2)
    with pytest.raises(OptionError, match="no scale-invariant weight"):
        mn.Monitor(plain, sgd(plain), inputs=torch.randn(4, 3))
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    stream = nn.Sequential(nn.Linear(4, 8), layer, nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(OptionError, match="weights that share one norm are left out"):
        mn.Monitor(stream, sgd(stream), inputs=torch.randn(4, 5, 4))


# ---- writers and states ----------------------------------------------------------------------------------------------


def test_csv_files_hold_what_was_measured(report, tmp_path):
    model = network()
    optimizer = sgd(model)
    path = tmp_path / "run.csv"
    path.write_text("what an earlier run wrote is replaced")
    with mn.Monitor(model, optimizer, report, every=2, writer=path) as monitor:
        train(model, optimizer, range(6))
    with path.open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(COLUMNS)
    assert len(rows) == 1 + 3 * len(WATCHED)
    read = History.from_csv(path)
    assert (read.weights, read.groups, read.steps) == (list(WATCHED), list(WATCHED.values()), [0, 2, 4])
    for quantity in QUANTITIES:
        np.testing.assert_allclose(read.of(quantity), monitor.history.of(quantity), rtol=1e-5)
    np.testing.assert_allclose(read.fastest, monitor.history.fastest, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "found"),
        ("a,b\n1,2\n", "columns step"),
        (",".join(COLUMNS) + "\n0,w,x\n", "line 2"),
        (",".join(COLUMNS) + "\n0,w,1" + ",1" * (len(QUANTITIES) + 1), "line 2"),
        (",".join(COLUMNS), "at least one"),
    ],
)
def test_other_files_are_refused(text, match, tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(ArgumentTypeError, match=match):
        History.from_csv(path)


class Board:
    def __init__(self):
        self.seen = []

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))


class Run:
    def __init__(self):
        self.seen = []

    def log(self, data, step=None, commit=None):
        self.seen += [(name, value, data["monitor/step"]) for name, value in data.items() if "/conv" in name]
        assert commit is False


class Logger:
    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step):
        self.seen += [(name, value, step) for name, value in metrics.items()]


def test_loggers_get_scalars(report):
    model = network()
    optimizer = sgd(model)
    writers, rows = [Board(), Run(), Logger()], []
    monitor = mn.Monitor(model, optimizer, report, every=2, writer=[*writers, lambda step, given: rows.append(given)])
    train(model, optimizer, range(4))
    for writer in writers:
        found = {(name, step): value for name, value, step in writer.seen}
        for step, given in zip((0, 2), rows, strict=True):
            assert found["rotation/conv", step] == given[0]["rotation"]
            assert found["norm/conv", step] == given[0]["norm"]
    assert rows[-1] == monitor.history.rows()
    assert as_writers(None) == []


@pytest.mark.parametrize(("lost", "torn"), [(0, False), (0, True), (3, False)])
def test_an_interrupted_run_is_measured_as_a_whole_one(report, lost, torn, tmp_path):
    def start(path):
        model = network()
        optimizer = sgd(model)
        return model, optimizer, mn.Monitor(model, optimizer, report, every=2, writer=path)

    whole, parts = tmp_path / "whole.csv", tmp_path / "parts.csv"
    model, optimizer, monitor = start(whole)
    train(model, optimizer, range(9))
    model, optimizer, monitor = start(parts)
    train(model, optimizer, range(5))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), monitor.state_dict()])
    train(model, optimizer, range(5, 5 + lost))  # after the last checkpoint
    monitor.close()
    if torn:
        with parts.open("a") as file:
            file.write("8,conv.we")
    resumed = start(parts)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], range(5, 9))
    assert resumed[2].step == 9
    assert parts.read_bytes() == whole.read_bytes()


def test_long_histories_are_thinned_out():
    history = History(["w"], [1])
    for step in range(5000):
        history.append(step, [[float(step)] * len(QUANTITIES)])
    assert len(history.steps) <= 512
    assert history.steps[-1] == 4999
    assert len(set(np.diff(history.steps[:-1]))) == 1
    assert history.of("norm")[:, 0].tolist() == history.steps


# ---- what it says ----------------------------------------------------------------------------------------------------


def row_of(**values):
    healthy = {
        "norm": 1.0, "norm_min": 0.9, "norm_max": 1.1, "rotation": 0.01, "rotation_max": 0.02, "effective_lr": 0.1,
        "radial_gradient": 1e-7, "radial_step": 0.1, "equilibrium_rotation": 0.01, "steps_to_equilibrium": 50.0,
        "lr": 0.1, "weight_decay": 5e-4,
    }  # fmt: skip
    return [{**healthy, **values}[quantity] for quantity in QUANTITIES]


def said(*samples, total_steps=None):
    history = History(["layer3.0.conv1.weight", "head.weight"][: len(samples[0])], [4, 4][: len(samples[0])])
    for number, rows in enumerate(samples):
        history.append(100 * (number + 1), rows)
    return [finding.text for finding in history.findings(total_steps)]


def test_a_weight_that_turns_slowly_as_it_has_grown_is_named_with_its_numbers():
    grown = row_of(norm=3.8, effective_lr=0.1 / 3.8**2, rotation=2.5e-4)
    start = row_of(norm=0.6, effective_lr=0.1 / 0.6**2)
    assert said([start], [grown]) == [
        "layer3.0.conv1 turns 40 times slower than at step 100, all else equal: its norm grew from 0.6 to 3.8."
    ]
    (both,) = said([start, start], [grown, grown])
    assert both.endswith("grew from 0.6 to 3.8. The same holds of 1 other weight.")
    free = row_of(norm=3.8, effective_lr=0.1 / 3.8**2, rotation=2.5e-4, weight_decay=0.0)
    assert said([start], [free])[0].endswith("Without weight decay it only grows.")
    # Of a tenth of the rate and a tenth of the gradient the norm is innocent.
    cooled = row_of(norm=3.8, effective_lr=0.01 / 3.8**2, rotation=2.5e-6, lr=0.01)
    assert "turns 40 times slower than at step 100" in said([start], [cooled])[0]
    assert said([start], [row_of(norm=0.6, effective_lr=0.001 / 0.6**2, rotation=1e-5, lr=0.001)]) == []


def test_an_equilibrium_that_the_run_does_not_reach_is_named_with_its_numbers():
    late = row_of(steps_to_equilibrium=213_000.0)
    assert said(*[[late]] * 3, total_steps=9000) == [
        "layer3.0.conv1: with this decay equilibrium takes 210,000 steps, the run has 9,000."
    ]
    assert said(*[[late]] * 3) == said(*[[late]] * 2, total_steps=9000) == []
    assert said(*[[row_of()]] * 3, total_steps=9000) == []


def test_other_findings():
    assert said([row_of(rotation=1.2, norm=0.01)]) == [
        "layer3.0.conv1 turns 1.2 radians per step: the learning rate 0.1 is large for its norm 0.01."
    ]
    assert said([row_of(radial_gradient=0.3)])[0].startswith(
        "30% of the gradient of layer3.0.conv1 is along the weight"
    )
    assert said([row_of(norm_max=math.nan)]) == ["layer3.0.conv1 has NaN or infinity in it at step 100."]
    assert said([row_of()], [row_of()]) == []


def test_a_monitor_warns_once_and_again_when_it_gets_worse(report):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    monitor = mn.Monitor(model, optimizer, report, every=1)
    for step, factor in enumerate((1, 1, 1, 3, 8)):
        gradients = {name: model.get_parameter(name) for name in WATCHED}
        for weight in gradients.values():
            noise = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(step))
            weight.grad = factor * noise * weight.detach().norm() / noise.norm()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        kinds = [
            str(w.message) for w in caught if issubclass(w.category, MonitorWarning) and "radians" in str(w.message)
        ]
        assert len(kinds) == (step == 0), step
    assert {type(finding) for finding in monitor.findings} == {Finding}


# ---- the page and the command ----------------------------------------------------------------------------------------


@functools.cache
def run_file(folder):
    """A run of which everything there is to say is said, as a file."""
    history = History(["layer1.0.conv1.weight", "layer1.0.conv2.weight", "<head>.weight"], [4, 8, 2])
    rows = []
    for step in range(0, 100, 10):
        grown = 1 + step / 20
        rows.append([
            row_of(norm=0.6 * grown, effective_lr=0.1 / (0.6 * grown) ** 2, rotation=0.02 / grown**2,
                   steps_to_equilibrium=213_000.0 - step),
            row_of(equilibrium_rotation=math.nan, steps_to_equilibrium=math.nan),
            row_of(radial_gradient=0.3, steps_to_equilibrium=0.0),
        ])  # fmt: skip
        history.append(step, rows[-1])
        as_writers(folder / "run.csv")[0](step, history.rows(), resumed=step > 0)
    return folder / "run.csv", history


SAYS = (
    "layer1.0.conv1 turns 30 times slower than at step 0, all else equal: its norm grew from 0.6 to 3.3.",
    "layer1.0.conv1: with this decay equilibrium takes 210,000 steps, the run has 91.",
    "30% of the gradient of <head> is along the weight",
)


def command(*arguments):
    return CliRunner().invoke(main, ["monitor", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return run_file(tmp_path_factory.mktemp("run"))


def test_the_command_shows_what_was_measured_and_says_what_stands_out(written, tmp_path):
    path, history = written
    shown = command(path)
    assert shown.exit_code == 0, shown.stderr
    for sentence in SAYS:
        assert sentence in shown.stdout
    assert re.search(r"layer1\.0\.conv1\.weight +4 +3\.3 .* 212,910 ", shown.stdout)
    assert re.search(r"layer1\.0\.conv2\.weight +8 +1 +0\.01 +– +– ", shown.stdout)
    joined = command(path, "--depth", 1, "--total-steps", 10**6, "--json")
    document = json.loads(joined.stdout)
    assert document["ok"]
    assert [row["layer"] for row in document["summary"]] == ["layer1", "<head>"]
    assert [finding["kind"] for finding in document["findings"]] == ["slow", "radial"]
    assert document["steps"] == history.steps
    assert document["summary"][0]["groups"] == 12


def test_the_command_refuses_other_files(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n")
    for arguments, status in (((tmp_path / "other.csv",), 1), ((tmp_path / "none.csv",), 2), ((), 2)):
        refused = command(*arguments)
        assert refused.exit_code == status
        assert refused.stdout == ""
        assert refused.stderr
    document = json.loads(command(tmp_path / "other.csv", "--json").stdout)
    assert not document["ok"]
    assert document["error"] == "ArgumentTypeError"


def test_the_command_needs_no_torch(written):
    code = "import sys; sys.modules['torch'] = None; from manifold_nets.cli import main; main(['monitor', sys.argv[1]])"
    arguments = [sys.executable, "-c", code, str(written[0])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert SAYS[0] in done.stdout


@pytest.fixture(scope="module")
def page(written):
    pytest.importorskip("matplotlib")
    path = written[0].with_suffix(".html")
    done = command(written[0], "--html", path)
    assert done.exit_code == 0, done.stderr
    return path


def check_page(text):
    check_self_contained(text)
    check_accessible(text)
    check_contrast(text)
    parsed = Page(text)
    for sentence in SAYS:
        assert sentence in parsed.text
    for name in ("layer1.0.conv1.weight", "<head>.weight", "0.6 → 3.3", "210,000", "there"):
        assert name in parsed.text.replace("\u200b", "")
    # Wide and narrow drawings of each quantity.
    assert len(parsed.having("svg", **{"class": "figure-svg"})) == 12


def test_the_page_is_self_contained_accessible_and_true(page):
    check_page(page.read_text())


@pytest.mark.parametrize(
    ("old", "new"),
    [("</h1>", '</h1><img src="a.png">'), ("210,000", "120,000"), ('role="img"', ""), ("&lt;head", "<head")],
)
def test_sabotage_a_wrong_page_is_noticed(page, old, new):
    text = page.read_text()
    assert old in text
    with pytest.raises(AssertionError):
        check_page(text.replace(old, new))


@pytest.mark.slow
def test_the_page_fits_every_screen(page, tmp_path):
    for width, (window, whole) in measure(page.read_text(), tmp_path, [320, 390, 768, 1280], opened=True).items():
        assert window == whole == width
    for scheme in ("light", "dark"):
        check_picture(photograph(page, tmp_path / "a.png", 1000, 1200, scheme), (1000, 1200), scheme)


def test_a_page_after_a_schedule_tells_the_expected_step_from_the_steps_that_remain(monkeypatch):
    monkeypatch.setattr(monitor_page, "_PLOTS", ())
    history = History(["w", "unknown"], [2, 2])
    for step, remaining, rate in ((0, 900.0, 0.1), (10, 860.0, 0.1), (20, 830.0, 0.1), (1000, 73_000.0, 1e-4)):
        history.append(step, [row_of(steps_to_equilibrium=left, lr=rate) for left in (remaining, math.nan)])
    (finding,) = history.findings(total_steps=800)
    assert "equilibrium takes 850 steps" in finding.text
    text = "|".join(word for word in Page(page_html(history, total_steps=800)).words if word.strip())
    assert "|Expected at step|Steps until then at the last rate|" in text
    assert "|0.01|850|73,000|" in text
    assert "|0.01|–|–|" in text


def test_a_page_of_one_sample_and_one_of_none(tmp_path, report):
    pytest.importorskip("matplotlib")
    model = network()
    optimizer = sgd(model)
    monitor = mn.Monitor(model, optimizer, report)
    monitor.to_html(tmp_path / "none.html")
    assert "Nothing was measured" in (tmp_path / "none.html").read_text()
    train(model, optimizer, range(1))
    monitor.to_html(tmp_path / "one.html")
    check_self_contained((tmp_path / "one.html").read_text())


def test_many_layers_are_drawn_as_a_few(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(monitor_page, "_PLOTS", monitor_page._PLOTS[:1])  # each drawing shows the same layers
    deep = [f"model.layers.{layer}.{part}.weight" for layer in range(30) for part in ("q", "k")]
    flat = [f"layer{n}.{m}.weight" for n in range(4) for m in range(9)]
    for names, shown, note in ((deep, "model.layers.29", "7 of 30 layers"), (flat, "layer3", ""), (["w"], "w", "")):
        history = History(names, [4] * len(names))
        for step in range(3):
            history.append(step, [row_of()] * len(names))
        text = page_html(history)
        check_self_contained(text)
        assert f">{shown}<" in text
        assert note in text
        assert ("Drawn are" in text) == bool(note)


# ---- trainers of other libraries -------------------------------------------------------------------------------------

of_libraries = pytest.mark.filterwarnings("ignore")  # they warn about each other


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.slow
@of_libraries
def test_lightning_trains_alike_with_the_callback_logs_and_resumes(tmp_path):
    run = example("train_with_lightning", "lightning", "sklearn")
    from lightning.pytorch.loggers import CSVLogger

    class Plain(run.Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def fit(epochs, callbacks, resume=None, save=None, **options):
        torch.manual_seed(0)
        net = run.network()
        callback = module.lightning_callback(model=net, every=5) if callbacks else None
        options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, **options}
        trainer = run.lightning.Trainer(
            max_epochs=epochs, callbacks=[callback] if callbacks else [], enable_checkpointing=False, **options
        )
        trainer.fit(Plain(net, None, None), run.loader(), ckpt_path=resume, weights_only=resume and True)
        if save is not None:
            trainer.save_checkpoint(save)
        return net, callback

    plain, _ = fit(2, callbacks=False, logger=False)
    watched, callback = fit(
        2, callbacks=True, logger=CSVLogger(tmp_path, name="", version="a", flush_logs_every_n_steps=1)
    )
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(watched), strict=True))
    history = callback.monitor.history
    assert history.steps == [5, 10, 15, 20, 25, 30, 35]  # the first step's batch is what was diagnosed
    assert history.weights == ["0.weight", "3.weight", "7.weight"]
    assert callback.monitor.total_steps == 40
    assert "rotation/0" in (tmp_path / "a" / "metrics.csv").read_text()
    fit(1, callbacks=True, logger=False, save=tmp_path / "one.ckpt")
    resumed, callback = fit(2, callbacks=True, logger=False, resume=tmp_path / "one.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain), parameters(resumed), strict=True))
    assert callback.monitor.history.steps == [25, 30, 35]
    np.testing.assert_array_equal(callback.monitor.history.of("rotation"), history.of("rotation")[-3:])


@pytest.mark.slow
@of_libraries
def test_a_run_of_lightning_without_an_end_has_no_number_of_steps():
    example("train_with_lightning", "lightning", "sklearn")
    model = network()
    for steps, known in ((40, 40), (math.inf, None), (-1, None)):
        callback = module.lightning_callback(inputs=batch()[0])
        trainer = SimpleNamespace(estimated_stepping_batches=steps, loggers=[], optimizers=[sgd(model)])
        callback.on_train_start(trainer, model)
        assert callback.monitor.total_steps == known
        callback.on_train_end(trainer, model)


@pytest.mark.slow
@of_libraries
def test_transformers_trains_alike_with_the_callback(tmp_path):
    run = example("train_with_transformers", "transformers")
    found = []
    for callback in (None, module.transformers_callback(every=5, writer=tmp_path / "run.csv")):
        model = run.language_model()
        arguments = run.TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=run.BATCH, learning_rate=5e-3,
            train_sampling_strategy="sequential", use_cpu=True, report_to=[], logging_strategy="no",
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        callbacks = [] if callback is None else [callback]
        run.Trainer(model=model, args=arguments, train_dataset=run.Source(), callbacks=callbacks).train()
        found.append(parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    read = History.from_csv(tmp_path / "run.csv")
    assert read.steps == [0, 5, 10]
    assert read.weights == [
        f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(2) for part in ("q", "k")
    ]  # fmt: skip
    assert read.groups == [4, 2, 4, 2]


@pytest.mark.slow
@of_libraries
def test_accelerate_logs_what_is_measured_of_a_prepared_optimizer(report):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self):
            super().__init__()
            self.seen = {}

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **_):
            self.seen[step] = values

    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("test")
    model = network()
    model, optimizer = accelerator.prepare(model, sgd(model))
    monitor = mn.Monitor(model, optimizer, report, every=2, writer=accelerator)
    train(model, optimizer, range(4))
    assert list(tracker.seen) == monitor.history.steps == [0, 2]
    assert tracker.seen[2]["norm/conv"] == monitor.history.rows()[0]["norm"]
