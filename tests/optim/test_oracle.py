"""Every optimizer with every option, in every backend, against its formulas in float64 numpy; and all defaults."""

import inspect

import geoopt
import numpy as np
import pytest
import torch
from helpers.optim_cases import LAYOUTS, radii_for
from torch import nn

import manifold_nets as mn
from manifold_nets.optim import OPTIMIZERS
from manifold_nets.optim.backends import rule

BACKENDS = {"kernel": {"fused": True}, "batched": {"foreach": True}, "single": {"foreach": False}}
# Sizes of the gradients: they rise and fall, so that the largest second moment is not the last one.
SIZES = [0.3, 2.0, 1.0, 0.1, 0.05, 0.4]
MOMENTUM = [
    {},
    {"momentum": 0.8},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.8, "nesterov": True},
    {"momentum": 0.8, "nesterov": True, "maximize": True},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True, "weight_decay": 7.0},
]
ADAPTIVE = [
    {},
    {"betas": (0.6, 0.9), "eps": 0.05},
    {"betas": (0.0, 0.9), "maximize": True},
    {"betas": (0.7, 0.8), "eps": 0.01, "weight_decay": 7.0, "decoupled_weight_decay": True},
]
OPTIONS = {
    "rsgd": MOMENTUM,
    "radam": [*ADAPTIVE, *({**options, "amsgrad": True} for options in ADAPTIVE[1:3])],
    "sgd-g": [*MOMENTUM, *({**options, "clip": 0.5} for options in MOMENTUM)],
    "adam-g": [*ADAPTIVE, *({**options, "clip": 0.5} for options in ADAPTIVE)],
    "angular": [*MOMENTUM, *({**options, "per": "weight"} for options in MOMENTUM[1:4])],
    "angular-adam": ADAPTIVE,
    "pbwn": MOMENTUM,
    "sm": MOMENTUM,
    # Steps of a plain optimizer, from weights of other norms: see manifold_nets.optim.from_torch.
    **{
        f"rsgd {run}": [{}, *MOMENTUM[1:5], {**MOMENTUM[5], "weight_decay": 0.7}, {"weight_decay": 0.7}]
        for run in ("follow", "step")
    },
    **{
        f"radam {run}": [*ADAPTIVE[:3], {**ADAPTIVE[3], "weight_decay": 0.7}]
        + [{**options, "weight_decay": 0.7, "amsgrad": True} for options in ADAPTIVE[1:3]]
        for run in ("follow", "step")
    },
}
CASES = [(name, options) for name, each in OPTIONS.items() for options in each]
case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
LR = 0.2


def normalized(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def dot(x, y):
    return (x * y).sum(1, keepdims=True)


class Oracle:
    """One weight whose groups are the rows of a matrix, on unit spheres; plain rows for the scaled metric."""

    def __init__(self, name, start, *, momentum=0.0, dampening=0.0, nesterov=False, maximize=False, betas=(0.9, 0.999),
                 eps=1e-8, amsgrad=False, clip=0.1, per="sphere", weight_decay=0.0, decoupled_weight_decay=False,
                 norms=None):  # fmt: skip
        self.name, self.u, self.t, self.sign = name, start.copy(), 0, -1.0 if maximize else 1.0
        self.b, self.v, self.largest = np.zeros_like(start), 0.0, 0.0
        self.mu, self.tau, self.nesterov, self.amsgrad = momentum, dampening, nesterov, amsgrad
        self.betas, self.eps, self.clip, self.per = betas, eps, clip, per
        self.n, self.decay, self.decoupled = norms, weight_decay, decoupled_weight_decay

    def step(self, g):
        self.t += 1
        g = self.sign * g
        if self.name == "sm":
            norm = np.linalg.norm(self.u, axis=1, keepdims=True)
            self.u = self.u - LR * norm * self.heavy_ball(norm * g)
        elif self.n is not None:
            self.plain(g)
        elif self.name == "pbwn":
            self.u = normalized(self.u - LR * self.heavy_ball(g))
        else:
            getattr(self, self.name.replace("-", "_"))(g - dot(self.u, g) * self.u)
        return self.u

    def plain(self, g):
        """The step of the optimizer without spheres, from the weight n u, of which the direction is kept."""
        w = self.n * self.u
        g = g / self.n + (0 if self.decoupled else self.decay) * w
        if self.name.startswith("radam"):
            m, v = self.adam(g, g**2)
            d = m / (np.sqrt(v) + self.eps)
        else:
            d = self.heavy_ball(g)
        w = w * (1 - LR * self.decay * self.decoupled) - LR * d
        norms = np.linalg.norm(w, axis=1, keepdims=True)
        self.u = w / norms
        if self.name.endswith("follow"):
            self.n = norms

    def heavy_ball(self, g):
        if self.mu == 0:
            return g
        self.b = g if self.t == 1 else self.mu * self.b + (1 - self.tau) * g
        return g + self.mu * self.b if self.nesterov else self.b

    def adam(self, xi, square):
        """The first moment and the second, without the bias of their start at zero."""
        beta1, beta2 = self.betas
        self.b = beta1 * self.b + (1 - beta1) * xi
        self.v = beta2 * self.v + (1 - beta2) * square
        self.largest = np.maximum(self.largest, self.v)
        second = self.largest if self.amsgrad else self.v
        return self.b / (1 - beta1**self.t), second / (1 - beta2**self.t)

    def rsgd(self, xi):
        self.to(normalized(self.u - LR * self.heavy_ball(xi)))

    def radam(self, xi):
        m, v = self.adam(xi, dot(xi, xi))
        self.to(normalized(self.u - LR * m / (np.sqrt(v) + self.eps)))

    def angular_adam(self, xi):
        m, v = self.adam(xi, xi**2)
        d = m / (np.sqrt(v) + self.eps)
        self.to(np.cos(LR) * self.u - np.sin(LR) * normalized(d - dot(self.u, d) * self.u))

    def sgd_g(self, xi):
        self.along_geodesic(-LR * self.heavy_ball(self.clipped(xi)))

    def adam_g(self, xi):
        xi = self.clipped(xi)
        m, v = self.adam(xi, dot(xi, xi))
        self.along_geodesic(-LR * m / np.sqrt(v + self.eps))

    def angular(self, xi):
        d = self.heavy_ball(xi)
        lengths = np.linalg.norm(d, axis=1, keepdims=True)
        self.along_geodesic(-LR * d / (lengths if self.per == "sphere" else np.sqrt(np.mean(lengths**2))))

    def clipped(self, xi):
        return xi * np.minimum(1.0, self.clip / np.linalg.norm(xi, axis=1, keepdims=True))

    def to(self, new):
        self.u, self.b = new, self.b - dot(new, self.b) * new

    def along_geodesic(self, d):
        angle = np.linalg.norm(d, axis=1, keepdims=True)
        e, u = d / angle, self.u
        self.u = np.cos(angle) * u + np.sin(angle) * e
        self.b = self.b + dot(e, self.b) * ((np.cos(angle) - 1) * e - np.sin(angle) * u)


def check(name, options, layout, dtype, wrong=None, radius="per group", **how):
    row, generator = OPTIMIZERS[name.partition(" ")[0]], np.random.default_rng(0)
    transfer = name.partition(" ")[2]
    partition, ids = layout.partition, layout.ids().ravel()
    rows = [np.flatnonzero(ids == group) for group in range(partition.n_groups)]
    radii = radii_for(layout, radius)
    start = normalized(generator.standard_normal((partition.n_groups, partition.group_size))) * radii[:, None]

    def of_weight(matrix):
        flat = np.empty(ids.size)
        for entries, values in zip(rows, matrix, strict=True):
            flat[entries] = values
        return torch.tensor(flat.reshape(partition.shape), dtype=dtype)

    sphere = mn.SphereProduct(partition, radius=radii)
    on_spheres = row.weights == "spheres"
    weight = (
        geoopt.ManifoldParameter(of_weight(start), manifold=sphere) if on_spheres else nn.Parameter(of_weight(start))
    )
    group = {"params": [weight]} if on_spheres else {"params": [weight], "partitions": [partition.to_dict()]}
    optimizer = row.kind([group], lr=LR, **options, **how)
    norms = np.linspace(0.6, 2.0, partition.n_groups)[:, None] if transfer else None
    if transfer:
        optimizer.param_groups[0]["transfer"] = transfer
        optimizer.state[weight]["norm"] = torch.tensor(norms).reshape(partition.spread_shape)
    optimizer.param_groups[0].update(wrong or {})
    unit = radii[:, None] if on_spheres else 1.0
    held = weight.detach().double().numpy().ravel()
    oracle = Oracle(name, np.stack([held[entries] for entries in rows]) / unit, **options, norms=norms)
    for step, size in enumerate(SIZES, start=1):
        gradient = size * generator.standard_normal(start.shape)
        # Gradients of plain weights fall with their norms, as behind a normalization.
        weight.grad = of_weight(gradient / (unit if on_spheres else 3 * radii[:, None] ** 2))
        found = weight.grad.double().numpy().ravel()
        expected = oracle.step(np.stack([found[entries] for entries in rows]) * unit)
        optimizer.step()
        flat = weight.detach().double().numpy().ravel()
        off = np.abs(np.stack([flat[entries] for entries in rows]) / unit - expected).max() / np.abs(expected).max()
        # Each step adds a few roundings.
        assert off <= 64 * step * torch.finfo(dtype).eps, f"step {step} is off by {off:.1e}"
        if transfer:
            found = optimizer.state[weight]["norm"].reshape(-1, 1).numpy()
            off = np.abs(found / oracle.n - 1).max()
            assert off <= 64 * step * torch.finfo(dtype).eps, f"norms of step {step} is off by {off:.1e}"


@case
def test_every_option_is_that_of_the_formula_in_every_backend(name, options):
    for how in (*BACKENDS.values(), {}):
        check(name, options, LAYOUTS[1], torch.float64, **how)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_view_of_groups_is_stepped_by_the_formula_in_every_backend(name, layout):
    for how in BACKENDS.values():
        for dtype, radius in ((torch.float64, "unit"), (torch.float32, "per group")):
            check(name, OPTIONS[name][-1], layout, dtype, radius=radius, **how)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] in ("rsgd", "radam")], ids=str)
def test_every_option_is_that_of_the_formula_where_torch_compiles(name, options):
    check(name, options, LAYOUTS[1], torch.float32, compile=True)


WRONG = {
    "lr": lambda options: {"lr": 1.001 * LR},
    "nesterov": lambda options: {"nesterov": False},
    "dampening": lambda options: {"dampening": 0.0},
    "maximize": lambda options: {"maximize": False},
    "amsgrad": lambda options: {"amsgrad": False},
    "clip": lambda options: {"clip": 0.51},
    "per": lambda options: {"per": "sphere"},
    "momentum": lambda options: {"momentum": 0.801},
    "betas": lambda options: {"betas": tuple(beta + 1e-3 for beta in options["betas"])},
    "eps": lambda options: {"eps": options["eps"] + 1e-4},
    "weight_decay": lambda options: {"weight_decay": options["weight_decay"] + 1e-3},
    "decoupled_weight_decay": lambda options: {"decoupled_weight_decay": False},
}


@pytest.mark.parametrize("how", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_sabotage_each_option_makes_a_difference_that_is_noticed(name, how):
    """The optimizer has one option otherwise than the oracle."""
    for key, wrong in WRONG.items():
        options = next((options for options in OPTIONS[name] if key in {"lr", *options}), None)
        # Decay does nothing on spheres where no plain run is followed.
        if options is not None and ("decay" not in key or " " in name):
            with pytest.raises(AssertionError, match="is off by"):
                check(name, options, LAYOUTS[1], torch.float64, wrong(options), **how)


@pytest.mark.parametrize("name", ["rsgd", "sgd-g", "angular", "pbwn", "sm", "rsgd follow"])
def test_sabotage_a_wrong_nesterov_coefficient_is_noticed(name, monkeypatch):
    right = rule.sgd_update
    planted = lambda *given, **more: (u := right(*given, **more))._replace(follow=1 / u.follow if u.ahead else 1.0)  # noqa: E731
    monkeypatch.setattr(rule, "sgd_update", planted)
    with pytest.raises(AssertionError, match="is off by"):
        check(name, MOMENTUM[3], LAYOUTS[1], torch.float64, foreach=False)


DEFAULTS = {
    "rsgd": {"lr": 1e-3},
    "radam": {"lr": 1e-3},
    "sgd-g": {"lr": 0.2, "clip": 0.1},
    "adam-g": {"lr": 0.05, "clip": 0.1},
    "angular": {"lr": 1e-2, "per": "sphere"},
    "angular-adam": {"lr": 1e-2},
    "pbwn": {"lr": 1e-3},
    "sm": {"lr": 1e-3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_defaults_but_the_rate_are_those_of_torch(name):
    row = OPTIMIZERS[name]
    torchs = torch.optim.Adam if row.adaptive else torch.optim.SGD
    expected = {n: p.default for n, p in inspect.signature(torchs).parameters.items() if n != "params"}
    expected |= {"compile": None, "master_weights": False, **DEFAULTS[name]}
    (group,) = row.kind([nn.Parameter(torch.ones(2))]).param_groups
    assert {key: value for key, value in group.items() if key not in ("params", "manifolds")} == expected


@pytest.mark.parametrize("how", BACKENDS.values(), ids=BACKENDS)
def test_amsgrad_may_begin_in_the_middle_of_a_run(how):
    """Its maximum is that of the second moments from there on, on spheres and elsewhere."""
    sphere = mn.SphereProduct(LAYOUTS[0].partition)
    torch.manual_seed(0)
    weights = [
        geoopt.ManifoldParameter(sphere.random(dtype=torch.float64), manifold=sphere),
        nn.Parameter(torch.ones(3)),
    ]
    optimizer = OPTIMIZERS["radam"].kind(weights, lr=0.1, **how)
    seen = []
    for step, size in enumerate([5.0, 5.0, 1.0, 1.0, 0.1, 0.1]):
        optimizer.param_groups[0]["amsgrad"] = step >= 2
        for weight in weights:
            weight.grad = size * torch.randn_like(weight)
        optimizer.step()
        seen.append([optimizer.state[weight]["exp_avg_sq"].clone() for weight in weights])
    for number, weight in enumerate(weights):
        largest = torch.stack([moments[number] for moments in seen[2:]]).amax(0)
        torch.testing.assert_close(optimizer.state[weight]["max_exp_avg_sq"], largest, rtol=1e-6, atol=0)
        assert float((largest / seen[-1][number]).max()) > 1
