"""Matched learning rates: steps of torch's optimizers on plain weights against ours on spheres, in float64."""

import copy
import math
import pickle
import warnings
from dataclasses import dataclass

import geoopt
import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.comparison.optimizers.builtin import from_table
from manifold_nets.comparison.settings import Settings
from manifold_nets.errors import LearningRateWarning

EPS = torch.finfo(torch.float64).eps
TINY = 1e-30  # an eps that does nothing in float64


@dataclass
class Case:
    """A network in front of a normalization with five invariant groups, and its groups as rows, written by hand."""

    net: nn.Module
    inputs: torch.Tensor
    rows: object
    filters_per_group: int = 1

    @property
    def weight(self):
        return self.net[0].weight


def case(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "filters":
        layers, shape, rows, k = [nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, eps=TINY)], (6,), lambda w: w, 1
    elif kind == "blocks":
        layers = [nn.Conv2d(3, 10, 3, bias=False), nn.GroupNorm(5, 10, eps=TINY)]
        shape, rows, k = (3, 5, 5), lambda w: w.reshape(5, -1), 2
    elif kind == "transposed":
        layers = [nn.ConvTranspose2d(4, 5, 3, bias=False), nn.BatchNorm2d(5, eps=TINY)]
        shape, rows, k = (4, 4, 4), lambda w: w.transpose(0, 1).reshape(5, -1), 1
    net = nn.Sequential(*layers, nn.Tanh(), nn.Flatten()).double()
    x = torch.randn(8, *shape, dtype=torch.float64)
    found = Case(net, x, rows, k)
    with torch.no_grad():
        # Rows view the weight: every group gets another norm, in no order.
        for row, factor in zip(_leading(found), (0.7, 3.0, 0.2, 1.1, 5.0), strict=True):
            row.mul_(factor / row.norm())
    return found


def _leading(found):
    weight = found.weight.detach()
    return weight.transpose(0, 1) if isinstance(found.net[0], nn.ConvTranspose2d) else weight.view(5, -1)


KINDS = ("filters", "blocks", "transposed")


def by_norm(rates, norms):
    """One rate a group: of five values the spread holds every one, and large norms have small rates."""
    spread = (rates.largest, rates.upper_quartile, rates.median, rates.lower_quartile, rates.smallest)
    return torch.tensor(spread, dtype=torch.float64)[norms.argsort().argsort()]


def loss(net, x):
    out = net(x)
    return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def stepped(net, x, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net, x).backward()
        optimizer.step()
    return net[0].weight.detach()


def on_spheres(found, finding, radius):
    """A copy of the network with its weight on spheres: of one radius, or ``"keep"``."""
    twin = copy.deepcopy(found.net)
    norms = found.rows(found.weight.detach()).norm(dim=1)
    sphere = mn.SphereProduct(finding.partition, radius=norms if radius == "keep" else radius)
    mn.constraints.attach(twin[0], "weight", sphere, sphere.projx(twin[0].weight.detach()))
    return twin


def angles(a, b):
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def check_same_direction(kind, radius, weight_decay, fault=lambda rate, norms, radius: rate):
    """A step of torch's SGD and one of RiemannianSGD turn every group to the same direction."""
    found = case(kind)
    report = mn.diagnose(found.net, found.inputs)
    finding = report["0.weight"]
    assert finding.partition.n_groups == 5
    assert finding.filters_per_group == found.filters_per_group
    radius = math.sqrt(found.filters_per_group) if radius == "unit" else radius
    rates = mn.matched_learning_rates(found.net, report, lr=0.05, weight_decay=weight_decay)["0.weight"].next_step
    norms = found.rows(found.weight.detach()).norm(dim=1)
    per_group = by_norm(rates, norms)
    plain = copy.deepcopy(found.net)
    expected = found.rows(
        stepped(plain, found.inputs, torch.optim.SGD(plain.parameters(), lr=0.05, weight_decay=weight_decay))
    )
    size = expected.shape[1] + found.inputs.numel()
    for group in range(5):
        twin = on_spheres(found, finding, radius)
        lr = fault(float(per_group[group]), float(norms[group]), 1.0 if radius == "keep" else radius)
        after = found.rows(stepped(twin, found.inputs, mn.optim.RiemannianSGD(mn.param_groups(twin), lr=lr)))
        turned = angles(found.rows(found.weight.detach()), expected)[group]
        assert turned > 1e-4
        off = angles(after, expected)[group]
        # Gradients at norm 0.2 are 5 times larger than at 1, and rounded so; the angles are sums over all entries.
        assert off <= 8 * size * EPS * max(1.0, float(per_group[group])), (group, float(off), float(turned))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("radius", ["unit", "keep", 3.7])
@pytest.mark.parametrize("kind", KINDS)
def test_sgd_steps_to_the_same_direction_at_every_radius(kind, radius, weight_decay):
    check_same_direction(kind, radius, weight_decay)


@pytest.mark.parametrize(
    ("kind", "radius", "fault"),
    [
        ("filters", "unit", lambda rate, n, r: rate * n),  # η/n, Adam's
        ("filters", "keep", lambda rate, n, r: rate * n * n),  # the Euclidean rate
        ("blocks", "unit", lambda rate, n, r: rate * r * r),  # the Euclidean metric
        ("transposed", 3.7, lambda rate, n, r: rate / (r * r)),
        ("filters", "unit", lambda rate, n, r: rate * (1 - 0.05 * 0.1)),  # weight decay forgotten
    ],
)
def test_sabotage_a_wrong_rate_of_sgd_is_noticed(kind, radius, fault):
    with pytest.raises(AssertionError):
        check_same_direction(kind, radius, 0.1, fault)


def test_momentum_follows_the_same_path_while_the_norm_is_constant():
    # Plain weights put back to their norm after every step, with their momentum kept tangent, follow the sphere's path.
    torch.manual_seed(1)
    found = case("filters")
    norms = found.rows(found.weight.detach()).norm(dim=1, keepdim=True)
    with torch.no_grad():
        found.weight.mul_(2 / norms)
    report = mn.diagnose(found.net, found.inputs)
    lr = mn.matched_learning_rates(found.net, report, lr=0.02, momentum=0.9)["0.weight"].next_step.median
    twin = on_spheres(found, report["0.weight"], 1.0)
    ours = mn.optim.RiemannianSGD(mn.param_groups(twin), lr=lr, momentum=0.9)
    plain = torch.optim.SGD(found.net[:1].parameters(), lr=0.02, momentum=0.9)
    plain_norms = torch.optim.SGD(found.net[1:].parameters(), lr=lr, momentum=0.9)
    ours.param_groups[-1]["lr"] = lr
    for _ in range(10):
        plain_norms.zero_grad()
        stepped(found.net, found.inputs, plain)
        plain_norms.step()
        with torch.no_grad():
            w, b = found.weight, plain.state[found.weight]["momentum_buffer"]
            w.mul_(2 / w.norm(dim=1, keepdim=True))
            b.sub_(w * (w * b).sum(1, keepdim=True) / 4)
    after = stepped(twin, found.inputs, ours, 10)
    assert angles(after, found.weight.detach()).max() <= 10 * 8 * 54 * EPS * 10
    assert angles(after, on_spheres(case("filters"), report["0.weight"], 1.0)[0].weight.detach()).min() > 1e-3


def adam_angles(kind, name, weight_decay, fault=1.0):
    """Tangents of the angles of one step of torch's optimizer and of RiemannianAdam, group by group; ⟨u, sign g⟩."""
    found = case(kind)
    report = mn.diagnose(found.net, found.inputs)
    rates = mn.matched_learning_rates(found.net, report, optimizer=name, lr=1e-3, weight_decay=weight_decay)
    before = found.rows(found.weight.detach())
    norms = before.norm(dim=1)
    per_group = by_norm(rates["0.weight"].next_step, norms) * fault
    plain = copy.deepcopy(found.net)
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    after = found.rows(
        stepped(plain, found.inputs, make(plain.parameters(), lr=1e-3, eps=TINY, weight_decay=weight_decay))
    )
    signs = found.rows(plain[0].weight.grad.sign())
    ours = []
    for group in range(5):
        twin = on_spheres(found, report["0.weight"], 1.0)
        optimizer = mn.optim.RiemannianAdam(mn.param_groups(twin), lr=float(per_group[group]), eps=TINY)
        ours.append(angles(found.rows(stepped(twin, found.inputs, optimizer)), before)[group].tan())
    radial = (before / norms[:, None] * signs).sum(1)
    return angles(after, before).tan(), torch.stack(ours), radial, norms, before.shape[1]


def check_adam(kind, name, weight_decay, fault=1.0):
    theirs, ours, radial, norms, size = adam_angles(kind, name, weight_decay, fault)
    # The step −η s has a radial part: the tangent is η‖s − ⟨u,s⟩u‖ / (n(1 − ηλ) − η⟨u,s⟩), and ours is η√d/(n(1 − ηλ)).
    shrunk = norms * (1 - 1e-3 * weight_decay)
    expected = (1 - radial.square() / size).sqrt() / (1 - 1e-3 * radial / shrunk)
    rounding = 64 * EPS / theirs  # an angle is a difference of unit vectors
    assert ((theirs / ours / expected - 1).abs() <= rounding).all(), theirs / ours / expected - 1
    # And what the documentation says of it: of the order of 1/d + η/n.
    assert ((theirs / ours - 1).abs() <= (radial.square() + radial.abs()) * (1 / size + 1e-3 / norms)).all()


@pytest.mark.parametrize(("name", "weight_decay"), [("adam", 0.0), ("adamw", 0.0), ("adamw", 50.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_adam_steps_turn_by_the_same_angle(kind, name, weight_decay):
    check_adam(kind, name, weight_decay)


@pytest.mark.parametrize("fault", [1 / math.sqrt(6), 1.001, 0.95])
def test_sabotage_a_wrong_rate_of_adam_is_noticed(fault):
    with pytest.raises(AssertionError):
        check_adam("filters", "adamw", 50.0, fault)


# ---- the long run ----------------------------------------------------------------------------------------------------

GROUPS, SIZE, BURN_IN, STEPS = 32, 128, 500, 500


def rotation(make, weight, manifold=None, strength=0.3):
    """Root mean square angle a step under gradients that are noise, of norm strength/‖w‖ as scale invariance has it."""
    generator = torch.Generator().manual_seed(3)
    parameter = nn.Parameter(weight) if manifold is None else geoopt.ManifoldParameter(weight, manifold=manifold)
    optimizer = make([parameter])
    squares = []
    for step in range(BURN_IN + STEPS):
        w = parameter.detach().clone()
        noise = torch.randn(w.shape, generator=generator, dtype=torch.float64) * strength / math.sqrt(SIZE - 1)
        norms = w.norm(dim=1, keepdim=True)
        parameter.grad = (noise - w * (w * noise).sum(1, keepdim=True) / norms**2) / norms
        optimizer.step()
        if step >= BURN_IN:
            squares.append(angles(w, parameter.detach()).square())
    return float(torch.stack(squares).mean().sqrt())


def net_of(weight):
    net = nn.Sequential(nn.Linear(SIZE, GROUPS, bias=False), nn.BatchNorm1d(GROUPS)).double()
    net[0].weight.data.copy_(weight)
    return net


LONG_RUNS = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.004},
    "adamw": {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.04},
}


def check_long_run(name, fault=1.0):
    options = LONG_RUNS[name]
    torch.manual_seed(2)
    unit = nn.functional.normalize(torch.randn(GROUPS, SIZE, dtype=torch.float64), dim=1)
    product = options["lr"] * options["weight_decay"]
    slowness = 1 - options.get("momentum", options.get("betas", (0,))[0])
    # Start at the equilibrium norm, by its own formula; from elsewhere it would take thousands of steps.
    if name == "sgd":
        norm = (options["lr"] * 0.3**2 / (2 * options["weight_decay"] * slowness)) ** 0.25
    else:
        norm = math.sqrt(options["lr"] * SIZE / (2 * options["weight_decay"]))
    net = net_of(norm * unit)
    report = mn.diagnose(net, torch.randn(4, SIZE, dtype=torch.float64))
    gradient = nn.functional.normalize(torch.randn(GROUPS, SIZE, dtype=torch.float64), dim=1) * 0.3 / norm
    rates = mn.matched_learning_rates(net, report, optimizer=name, gradients=[{"0.weight": gradient}], **options)
    expected, lr = rates.settings.equilibrium_rotation, rates.equilibrium.median * fault
    # At the equilibrium norm both kinds of rates are one.
    assert rates.next_step.median == pytest.approx(rates.equilibrium.median, rel=2 * product)
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    plain = rotation(lambda p: make(p, **options), norm * unit)
    kind = {"sgd": mn.optim.RiemannianSGD, "adamw": mn.optim.RiemannianAdam}[name]
    own = {key: value for key, value in options.items() if key in ("momentum", "betas")}
    ours = rotation(lambda p: kind(p, lr=lr, **own), unit.clone(), mn.SphereProduct((GROUPS, SIZE)))
    # The formulas hold to first order in ηλ/(1−μ), 1/d, and the second moment's window; the rest is chance: four
    # standard deviations of a mean of squared lengths in d dimensions, of which momentum makes 1/(1−μ) steps one.
    window = 0.0 if name == "sgd" else 1 - options["betas"][1]
    tolerance = 2 * product / slowness + 2 / SIZE + window + 2 * math.sqrt(2 / SIZE / (GROUPS * STEPS * slowness))
    assert plain == pytest.approx(expected, rel=tolerance)
    assert ours == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", LONG_RUNS)
def test_rotation_of_the_long_run_is_matched(name):
    check_long_run(name)


@pytest.mark.parametrize("name", LONG_RUNS)
def test_sabotage_a_wrong_rate_of_the_long_run_is_noticed(name):
    with pytest.raises(AssertionError):
        check_long_run(name, 1.1)


# ---- the plain network's rate on spheres ---------------------------------------------------------------------------


def with_norms(norm):
    """Filters of 4 entries with one norm in front of a normalization, and an example."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight.mul_(norm / net[0].weight.norm(dim=1, keepdim=True))
    return net, torch.randn(16, 4)


def warned(make):
    """Return the warnings about learning rates of a function."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert all(w.category is LearningRateWarning and w.filename == __file__ for w in caught)
    return [w.message for w in caught]


@pytest.mark.parametrize("radius", ["unit", "keep"])
@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [(mn.optim.RiemannianSGD, "sgd", 0.1 / 0.2**2), (mn.optim.RiemannianAdam, "adam", 0.1 * 2 / 0.2)],
)
def test_the_plain_rate_for_both_warns_once_and_names_the_matched_one(kind, name, expected, radius):
    net, x = with_norms(0.2)
    model = mn.convert(net, x, radius=radius)
    rates = mn.matched_learning_rates(net, mn.diagnose(net, x), optimizer=name, lr=0.1)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for params in (mn.param_groups(each), each.parameters(), each.named_parameters()):
            (message,) = warned(lambda params=params: kind(params, lr=0.1))
            assert message.matched == pytest.approx(expected, rel=1e-5)
            assert message.matched == pytest.approx(rates["0.weight"].next_step.median, rel=1e-5)
            assert f"sphere_lr={expected:.3g}" in str(message)
    # Every remedy of the message.
    for own in (message.matched, rates.by_weight(), 0.1):
        assert warned(lambda own=own: kind(mn.param_groups(model, sphere_lr=own), lr=0.1)) == []


def test_other_optimizers_and_models_do_not_warn():
    net, x = with_norms(0.2)
    model = mn.convert(net, x)
    sgd, adam = mn.optim.RiemannianSGD, mn.optim.RiemannianAdam
    defined = nn.Sequential(mn.layers.UnitNormLinear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    near, _ = with_norms(0.9)
    spheres = [group for group in mn.param_groups(model) if "manifolds" in group]
    apart = mn.param_groups(model)
    for group in apart[1:]:
        group["lr"] = 0.01
    for make in (
        lambda: sgd(mn.param_groups(defined), lr=0.1),
        lambda: adam(mn.param_groups(defined), lr=0.1),
        lambda: sgd(mn.param_groups(mn.convert(near, x)), lr=0.1),
        lambda: sgd(spheres, lr=0.1),
        lambda: sgd(apart, lr=0.1),
        lambda: mn.optim.AngularAdam(mn.param_groups(model), lr=0.1),
        lambda: sgd(mn.param_groups(mn.revert(model)), lr=0.1),
    ):
        assert warned(make) == []
    settings = Settings(("rsgd",), (0.1,), (0,), 1)
    for name in mn.optim.OPTIMIZERS:
        if mn.optim.OPTIMIZERS[name].weights == "spheres":
            assert warned(lambda name=name: from_table(name)(copy.deepcopy(model), 0.1, settings)) == []
