"""Other published methods on spheres: angles, scales, states and options. Their formulas: optim/test_oracle.py."""

import copy

import geoopt
import numpy as np
import pymanopt
import pytest
import torch
from helpers.optim_cases import LAYOUTS, Problem, radii_for
from torch import nn

import manifold_nets as mn
from manifold_nets.errors import (
    DegenerateGroupError,
    OptionError,
    ParameterGroupError,
)
from manifold_nets.optim.backends import dispatch, native

LR, MOMENTUM, CLIP, BETAS, EPS = 0.3, 0.8, 0.4, (0.8, 0.95), 1e-6
# Of AngularAdam, whose direction shows the correction of its second moments only beside an eps that counts.
LARGE_EPS = 0.1


def optimizer_for(method, parameter, **how):
    if method == "sgd-g":
        return mn.optim.SGDG([parameter], lr=LR, momentum=MOMENTUM, clip=CLIP, **how)
    if method == "adam-g":
        return mn.optim.AdamG([parameter], lr=LR, betas=BETAS, eps=EPS, clip=CLIP, **how)
    if method == "angular-adam":
        return mn.optim.AngularAdam([parameter], lr=LR, betas=BETAS, eps=LARGE_EPS, **how)
    if method == "adam-entries":
        return mn.optim.RiemannianAdam([parameter], lr=LR, betas=BETAS, eps=LARGE_EPS, per="entry", **how)
    kind = {"angular": mn.optim.AngularSGD, "projected": mn.optim.ProjectedSGD}[method]
    return kind([parameter], lr=LR, momentum=MOMENTUM, **how)


BY_ENTRIES = ("angular-adam", "adam-entries")
METHODS = ["sgd-g", "adam-g", "angular", *BY_ENTRIES, "projected"]
EXECUTIONS = {"default": {}, "passes": {"fused": True}, "batched": {"foreach": True}, "single": {"foreach": False}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", [EXECUTIONS["passes"], EXECUTIONS["batched"]], ids=["passes", "batched"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_stepped_together_take_their_own_steps(method, how, dtype):
    """Small ones are joined, large ones are cut, and coefficients are computed for all at once."""
    paths = []
    for options in (how, EXECUTIONS["single"]):
        generator = torch.Generator().manual_seed(0)
        weights = []
        for shape in ((5, 7), (3, 7), (4, 2, 3, 3), (300, 1024), (2, 7), (2, 70_001)):
            sphere = mn.SphereProduct(shape, radius=1.5)
            start = sphere.projx(torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            weights.append(geoopt.ManifoldParameter(start, manifold=sphere))
        optimizer = optimizer_for(method, weights[0], **options)
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": weights})
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype)
            optimizer.step()
        paths.append([weight.detach().double() for weight in weights])
        for weight in weights:
            assert float(weight.manifold.deviations(weight.detach()).max()) <= 4 * torch.finfo(dtype).eps
    for batched, single in zip(*paths, strict=True):
        # In half precision an entry may be rounded to the neighbour, in each of the three steps. AngularAdam divides
        # each entry by its own size, which magnifies the rounding of small ones.
        roundings = 256 if method in BY_ENTRIES else 64
        allowed = roundings * torch.finfo(torch.float32).eps if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
        assert float((batched - single).abs().max()) <= allowed * float(single.abs().max())


@pytest.mark.parametrize("how", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_long_steps_and_gradients_along_the_radius_end_on_the_spheres(method, how):
    for shape in ((130, 9), (2, 70_001)):
        sphere = mn.SphereProduct(shape, radius=1.5)
        weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
        optimizer = optimizer_for(method, weight, **how)
        optimizer.param_groups[0].update(lr=20.0, clip=float("inf"))
        for step in range(3):
            if step == 2 and method in BY_ENTRIES:  # so that the direction, entry by entry, is nearly the radius
                with torch.no_grad():
                    optimizer.state[weight]["exp_avg"].add_(weight, alpha=1e3)
                    optimizer.state[weight]["entry_sq"].fill_(1.0)
            weight.grad = 1e3 * weight.detach() + torch.randn(shape)
            optimizer.step()
            assert float(sphere.deviations(weight.detach()).max()) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", METHODS)
def test_the_default_is_the_kernel(method, monkeypatch):
    if native.available() is not None:
        pytest.skip(native.available())
    called = []
    monkeypatch.setattr(dispatch, "run_in_passes", lambda rule, members: called.append(len(members)))
    monkeypatch.setattr(dispatch, "run_native", lambda rule, members: called.append(len(members)))
    for options in ({}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}):
        weight = Problem(LAYOUTS[0], radii_for(LAYOUTS[0], "unit")).parameter()
        moved_by(optimizer_for(method, weight, **options), weight, torch.ones(weight.shape, dtype=weight.dtype))
    assert called == [1, 1]


def moved_by(optimizer, parameter, gradient):
    before = parameter.detach().clone()
    parameter.grad = gradient
    optimizer.step()
    return before


@pytest.mark.parametrize("per", ["sphere", "weight"])
def test_an_angular_step_is_the_angle_that_was_asked_for(per):
    problem = Problem(LAYOUTS[1], radii_for(LAYOUTS[1], "per group"))
    parameter = problem.parameter()
    optimizer = mn.optim.AngularSGD([parameter], lr=0.25, per=per)
    before = moved_by(optimizer, parameter, torch.tensor(problem.gradient(problem.start, 0)))
    # pymanopt's Oblique manifold holds unit columns; its distance is measured by arcs.
    sphere = pymanopt.manifolds.Sphere(before[0].numel())
    angles = [
        sphere.dist((x / x.norm()).flatten().numpy(), (y / y.norm()).flatten().numpy())
        for x, y in zip(before, parameter.detach(), strict=True)
    ]
    measured = np.array(angles) if per == "sphere" else np.sqrt(np.mean(np.square(angles)))
    np.testing.assert_allclose(measured, 0.25, rtol=1e-7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(measured, 0.2501, rtol=1e-7)


def test_squares_of_entries_stay_in_float32_beside_half_precision_weights():
    sphere = mn.SphereProduct((3, 8))
    start = sphere.random().bfloat16().as_subclass(torch.Tensor)
    first, second = (geoopt.ManifoldParameter(start.clone(), manifold=sphere) for _ in range(2))
    ours, theirs = mn.optim.AngularAdam([first], lr=0.1), mn.optim.AngularAdam([second], lr=0.1)
    for _ in range(3):
        moved_by(ours, first, torch.randn(3, 8).bfloat16())
    with torch.no_grad():
        second.copy_(first)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    squares = ours.state[first]["entry_sq"]
    assert squares.dtype == torch.float32
    assert not torch.equal(squares, squares.bfloat16().float())
    assert torch.equal(theirs.state[second]["entry_sq"], squares)


def test_a_sphere_that_several_weights_share_is_refused_by_name():
    joint = mn.JointSphere({name: mn.Partition.whole((3, 4)) for name in ("first", "second")})
    points = joint.projx([torch.randn(3, 4) for _ in range(2)])
    group = {"params": [nn.Parameter(point) for point in points], "manifolds": list(joint.manifolds)}
    assert mn.optim.AngularSGD([dict(group)], lr=0.1).param_groups[0]["manifolds"] == list(joint.manifolds)
    with pytest.raises(ParameterGroupError, match=r"joint sphere.*AngularSGD"):
        mn.optim.AngularAdam([dict(group)], lr=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_no_motion(method):
    problem = Problem(LAYOUTS[0], radii_for(LAYOUTS[0], "unit"))
    parameter = problem.parameter()
    optimizer = optimizer_for(method, parameter)
    before = moved_by(optimizer, parameter, torch.zeros(parameter.shape, dtype=torch.float64))
    assert bool(parameter.isfinite().all())
    assert float((parameter.detach() - before).abs().max()) < 4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("method", METHODS)
def test_a_state_continues_bit_for_bit(method):
    problem = Problem(LAYOUTS[1], radii_for(LAYOUTS[1], "uniform"))
    ours, theirs = problem.parameter(), problem.parameter()
    first, second = optimizer_for(method, ours), optimizer_for(method, theirs)
    for step in range(3):
        moved_by(first, ours, torch.tensor(problem.gradient(ours.detach().numpy(), step)))
    with torch.no_grad():
        theirs.copy_(ours)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        gradient = torch.tensor(problem.gradient(ours.detach().numpy(), step))
        moved_by(first, ours, gradient)
        moved_by(second, theirs, gradient)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda p: mn.optim.SGDG(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (lambda p: mn.optim.AngularSGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (lambda p: mn.optim.ProjectedSGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (lambda p: mn.optim.ScaledMetricSGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (lambda p: mn.optim.AdamG(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
        (lambda p: mn.optim.AngularAdam(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_plain_parameters_take_the_steps_of_torch(ours, torchs):
    start = torch.randn(3, 4)
    first, second = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = ours([first]), torchs([second])
    for _ in range(3):
        gradient = torch.randn(3, 4)
        for optimizer, parameter in zip(optimizers, (first, second), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(first, second)


def scaled_metric_path(scales, momentum):
    """Outputs of a batch-normalized network in float64 with a negligible eps, filters in these scales."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, eps=1e-30), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(20, 5).double(), torch.randn(20, 2).double()
    with torch.no_grad():
        net[0].weight.mul_(scales[:, None])
    groups = mn.optim.scaled_metric_groups(net, {"0.weight": mn.Partition.filters((6, 5))})
    optimizer = mn.optim.ScaledMetricSGD(groups, lr=0.1, momentum=momentum)
    outputs = []
    for _ in range(20):
        optimizer.zero_grad()
        found = net(x)
        (found - y).square().mean().backward()
        optimizer.step()
        outputs.append(found.detach())
    return torch.stack(outputs), net[0].weight.detach().norm(dim=1) / scales


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_scaled_metric_takes_one_path_of_functions_in_every_scale(momentum):
    scales = 10 ** (4 * torch.rand(6).double() - 2)
    plain, norms = scaled_metric_path(torch.ones(6).double(), momentum)
    scaled, scaled_norms = scaled_metric_path(scales, momentum)
    assert float((plain - scaled).norm() / plain.norm()) < 1e4 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(norms, scaled_norms)
    assert not torch.allclose(plain[0], plain[-1])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain, scaled_metric_path(scales, momentum * 1.01 + 0.01)[0])


def test_without_momentum_the_scaled_metric_is_the_formula_of_the_paper():
    weight, gradient = nn.Parameter(torch.randn(4, 3).double()), torch.randn(4, 3).double()
    expected = weight.detach() - 0.1 * torch.diag(torch.diag(weight.detach() @ weight.detach().T)) @ gradient
    group = {"params": [weight], "partitions": [mn.Partition.filters((4, 3)).to_dict()]}
    optimizer = mn.optim.ScaledMetricSGD([group], lr=0.1)
    weight.grad = gradient
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def scaled_metric_steps(start, gradients, partition, dtype, **how):
    """Weights and momentum after these gradients, in float64."""
    weight = nn.Parameter(start.to(dtype))
    group = {"params": [weight], "partitions": [partition.to_dict()]}
    optimizer = mn.optim.ScaledMetricSGD([group], lr=0.1, momentum=0.9, **how)
    for gradient in gradients:
        weight.grad = gradient.to(dtype)
        optimizer.step()
    return weight.detach().double(), optimizer.state[weight]["momentum_buffer"].double()


SCALED = [mn.Partition.filters((40, 9)), mn.Partition((4, 6), (4, 2, 3), (0, 1)), mn.Partition.whole((2, 70_001))]


def check_scaled_metric(partition, dtype, nesterov, norms_power=1, **how):
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(partition.shape, generator=generator).double() for _ in range(5))
    start, *gradients = (x * 1.5 * partition.group_size**-0.5 for x in (start, *gradients))
    w, b = start.to(dtype).double(), torch.zeros(partition.shape).double()
    for step, gradient in enumerate(gradients):
        viewed = w.reshape(partition.view)
        norm = viewed.square().sum(partition.reduced, keepdim=True).sqrt() ** norms_power
        norm = norm.expand(partition.view).reshape(partition.shape)
        b = (0.9 if step else 0.0) * b + (1.0 if step == 0 or nesterov else 0.75) * norm * gradient.to(dtype).double()
        w = w - 0.1 * norm * (norm * gradient.to(dtype).double() + 0.9 * b if nesterov else b)
    how = {"nesterov": True} | how if nesterov else {"dampening": 0.25} | how
    found = scaled_metric_steps(start, gradients, partition, dtype, **how)
    for x, y in zip(found, (w, b), strict=True):
        assert float((x - y).norm()) <= 32 * torch.finfo(dtype).eps * float(y.norm())


@pytest.mark.parametrize("how", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("partition", SCALED, ids=["filters", "blocks", "whole"])
def test_every_execution_of_the_scaled_metric_takes_the_steps_of_the_formula(partition, dtype, how):
    for nesterov in (False, True):
        check_scaled_metric(partition, dtype, nesterov=nesterov, **how)
    with pytest.raises(AssertionError):
        check_scaled_metric(partition, dtype, nesterov=False, norms_power=0, **how)


def test_partitions_that_do_not_fit_are_refused_by_name():
    weight, partition = nn.Parameter(torch.randn(3, 4)), mn.Partition.filters((4, 3)).to_dict()
    group = {"params": [("first", weight), ("second", nn.Parameter(torch.randn(4, 3)))]}
    optimizer = mn.optim.ScaledMetricSGD([("other", nn.Parameter(torch.ones(1)))], lr=0.1)
    with pytest.raises(ParameterGroupError, match=r"group 1: found 1 partitions for 2 parameters"):
        optimizer.add_param_group({**group, "partitions": [partition]})
    with pytest.raises(ParameterGroupError, match=r"first: found shape \(3, 4\).*\(4, 3\)"):
        optimizer.add_param_group({**group, "partitions": [partition, None]})
    with pytest.raises(OptionError, match=r"differentiable: found True.*second is scaled"):
        optimizer.add_param_group({**group, "partitions": [None, partition], "differentiable": True})
    sphere = mn.SphereProduct((4, 3))
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    for more in ({}, {"partitions": [partition]}):
        with pytest.raises(ParameterGroupError, match="third lies on a product of spheres: found ScaledMetricSGD"):
            optimizer.add_param_group({"params": [("third", weight)], **more})
    assert len(optimizer.param_groups) == 1


def test_the_scaled_metric_refuses_weights_on_spheres_and_both_ways_out_work():
    net = nn.Sequential(mn.layers.UnitNormLinear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with pytest.raises(ParameterGroupError, match=r"^0\.weight lies .* such as manifold_nets\.optim\.RiemannianSGD"):
        mn.optim.ScaledMetricSGD(mn.param_groups(net), lr=0.1)

    def trained(optimizer, model):
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(32, 4)).square().mean().backward()
            optimizer.step()

    trained(mn.optim.RiemannianSGD(mn.param_groups(net), lr=0.1), net)
    weight = net[0].weight
    assert float(weight.manifold.deviations(weight.detach()).max()) <= 4 * torch.finfo(torch.float32).eps
    plain = mn.revert(net)
    groups = mn.optim.scaled_metric_groups(plain, {"0.weight": mn.Partition.filters((8, 4))})
    before = plain[0].weight.detach().clone()
    trained(mn.optim.ScaledMetricSGD(groups, lr=0.1), plain)
    assert not torch.equal(plain[0].weight, before)


def test_master_weights_keep_what_half_precision_would_lose():
    generator = torch.Generator().manual_seed(0)
    start, ones = torch.randn(6, 5, generator=generator).bfloat16(), torch.ones(6, 5)
    exact = nn.Parameter(start.double())
    rounded, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = []
    for weight, options in ((exact, {}), (rounded, {"master_weights": True}), (plain, {})):
        group = {"params": [weight], "partitions": [mn.Partition.filters((6, 5)).to_dict()]}
        optimizers.append(mn.optim.ScaledMetricSGD([group], lr=1e-3, **options))
        for _ in range(50):
            weight.grad = (0.01 * ones).to(weight.dtype)
            optimizers[-1].step()
    gradient_error = abs(float(torch.tensor(0.01).bfloat16()) / 0.01 - 1)
    moved = float((exact.detach() - start).norm())
    master = optimizers[1].state[rounded]["master_weight"]
    assert master.dtype == torch.float32
    assert float((master - exact.detach()).norm()) <= 2 * gradient_error * moved
    assert torch.equal(rounded, master.bfloat16())
    assert float((plain - exact).detach().norm()) > 0.5 * moved


def test_bad_options_are_refused_by_name():
    weight = Problem(LAYOUTS[0], radii_for(LAYOUTS[0], "unit")).parameter()
    for build in (lambda: mn.optim.SGDG([weight], clip=0.0), lambda: mn.optim.AdamG([weight], clip=float("nan"))):
        with pytest.raises(OptionError, match="clip"):
            build()
    with pytest.raises(OptionError, match="per"):
        mn.optim.AngularSGD([weight], per="layer")
    for kind in (mn.optim.AdamG, mn.optim.AngularAdam):
        with pytest.raises(OptionError, match="amsgrad"):
            kind([weight], amsgrad=True)
    net = nn.Linear(3, 2)
    with pytest.raises(OptionError, match="wait"):
        mn.optim.scaled_metric_groups(net, {"wait": mn.Partition.filters((2, 3))})
    with torch.no_grad():
        net.weight[1] = 0
    groups = mn.optim.scaled_metric_groups(net, {"weight": mn.Partition.filters((2, 3))})
    with pytest.raises(DegenerateGroupError, match="group 1"):
        mn.optim.ScaledMetricSGD(groups, lr=0.1)


# ---- Adam with a second moment of each entry -------------------------------------------------------------------------


def adam_by_entries(start, gradients, radius, fault=1.0):
    """Rows of a weight after steps by the published formulas of Adam on unit vectors, in numpy."""
    u = start / radius
    m, v = np.zeros_like(u), np.zeros_like(u)
    for t, g in enumerate(gradients, 1):
        xi = radius * g
        xi = xi - (xi * u).sum(1, keepdims=True) * u
        m, v = BETAS[0] * m + (1 - BETAS[0]) * xi, BETAS[1] * v + (1 - BETAS[1]) * xi**2
        d = fault * m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        u = u - LR * (d - (d * u).sum(1, keepdims=True) * u)
        u = u / np.linalg.norm(u, axis=1, keepdims=True)
        m = m - (m * u).sum(1, keepdims=True) * u
    return radius * u


def check_by_entries(how, fault=1.0):
    rng = np.random.default_rng(0)
    radius = np.array([[0.5], [1.0], [3.0]])
    start = rng.standard_normal((3, 40))
    start *= radius / np.linalg.norm(start, axis=1, keepdims=True)
    gradients = [rng.standard_normal((3, 40)) for _ in range(6)]
    weight = geoopt.ManifoldParameter(
        torch.from_numpy(start.copy()), manifold=mn.SphereProduct((3, 40), radius=radius.ravel().tolist())
    )
    optimizer = mn.optim.RiemannianAdam([weight], lr=LR, betas=BETAS, eps=EPS, per="entry", **how)
    for number, gradient in enumerate(gradients):
        if number == 3:  # a copy and a state go on as they were
            state = optimizer.state_dict()
            optimizer = mn.optim.RiemannianAdam([weight], lr=0.7, betas=BETAS, eps=EPS, per="entry", **how)
            optimizer.load_state_dict(state)
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    expected = adam_by_entries(start, gradients, radius, fault)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=0, atol=256 * np.finfo(float).eps)
    again = copy.deepcopy(optimizer)
    assert again._kind == "adam-entries"
    assert again._moments == ("step", "exp_avg", "entry_sq")


@pytest.mark.parametrize("how", EXECUTIONS.values(), ids=EXECUTIONS)
def test_adam_by_entries_is_the_published_formula(how):
    check_by_entries(how)


def test_sabotage_another_length_of_the_step_is_noticed():
    with pytest.raises(AssertionError):
        check_by_entries({}, 1.0 + 1e-6)


def test_what_adam_by_entries_does_not_know_is_refused():
    sphere = mn.SphereProduct((2, 3))
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    for options in ({"per": "entries"}, {"per": "entry", "amsgrad": True}, {"per": "entry", "compile": True}):
        with pytest.raises(OptionError, match="per: found"):
            mn.optim.RiemannianAdam([weight], **options)
    for kind in (mn.optim.AdamG, mn.optim.AngularAdam):
        with pytest.raises(OptionError, match="per: found 'entry'"):
            kind([weight], per="entry")
