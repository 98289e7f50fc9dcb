"""RiemannianSGD and RiemannianAdam on spheres: against formulas in float64, and what they must not do."""

from dataclasses import replace

import geoopt
import numpy as np
import pytest
import torch
from helpers.optim_cases import LAYOUTS, STEPS, Problem, check_path, radii_for, reference_adam, reference_sgd, run

import manifold_nets as mn
from manifold_nets.optim import RiemannianAdam, RiemannianSGD
from manifold_nets.optim.backends import reference
from manifold_nets.optim.backends.products import GroupView
from manifold_nets.optim.backends.rule import Rule

RADII = ["unit", "uniform", "per group"]
SGD_OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "maximize": True},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.5},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True},
]
ADAM_OPTIONS = [
    {"lr": 0.05},
    {"lr": 0.05, "maximize": True},
    {"lr": 0.05, "betas": (0.5, 0.9), "amsgrad": True},
    {"lr": 0.05, "betas": (0.0, 0.99), "eps": 0.1},
]
CASES = [(RiemannianSGD, reference_sgd, options) for options in SGD_OPTIONS]
CASES += [(RiemannianAdam, reference_adam, options) for options in ADAM_OPTIONS]
case = pytest.mark.parametrize(("optimizer", "reference", "options"), CASES)
both = pytest.mark.parametrize(
    ("optimizer", "options"),
    [(RiemannianSGD, {"lr": 0.05, "momentum": 0.9}), (RiemannianAdam, {"lr": 0.05, "amsgrad": True})],
)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@layouts
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@case
def test_steps_equal_the_reference(layout, radius, dtype, optimizer, reference, options):
    problem = Problem(layout, radii_for(layout, radius))
    weight = problem.parameter(dtype)
    check_path(run(optimizer([weight], **options), problem, weight), reference(problem, **options), problem, dtype)


FAULTS = [
    (RiemannianSGD, reference_sgd, {"lr": 0.05, "momentum": 0.9}, "no transport"),
    (RiemannianSGD, reference_sgd, {"lr": 0.05, "momentum": 0.9}, "longer first step"),
    (RiemannianSGD, reference_sgd, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}, "dampened first step"),
    (RiemannianSGD, reference_sgd, {"lr": 0.05}, "unprojected gradient"),
    (RiemannianSGD, reference_sgd, {"lr": 0.05}, "metric without radius"),
    (RiemannianSGD, reference_sgd, {"lr": 0.05, "maximize": True}, "minimize"),
    (RiemannianAdam, reference_adam, {"lr": 0.05}, "no transport"),
    (RiemannianAdam, reference_adam, {"lr": 0.05}, "no root of the bias correction"),
    (RiemannianAdam, reference_adam, {"lr": 0.05}, "Euclidean second moment"),
    (RiemannianAdam, reference_adam, {"lr": 0.05, "eps": 0.1}, "metric without radius"),
    (RiemannianAdam, reference_adam, {"lr": 0.05, "maximize": True}, "minimize"),
]


@pytest.mark.parametrize(("optimizer", "reference", "options", "fault"), FAULTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_planted_fault_fails_the_comparison(optimizer, reference, options, fault, dtype):
    problem = Problem(LAYOUTS[1], radii_for(LAYOUTS[1], "uniform"))
    weight = problem.parameter(dtype)
    path = run(optimizer([weight], **options), problem, weight)
    check_path(path, reference(problem, **options), problem, dtype)
    with pytest.raises(AssertionError, match="off by"):
        check_path(path, reference(problem, **options, fault=fault), problem, dtype)


@both
@layouts
def test_the_path_of_directions_does_not_depend_on_the_radius(layout, optimizer, options):
    paths = {}
    for radius in RADII:
        problem = Problem(layout, radii_for(layout, radius))
        weight = problem.parameter()
        path = run(optimizer([weight], **options), problem, weight)
        paths[radius] = [w / problem.spread(problem.radii) for w in path]
    unit = Problem(layout, radii_for(layout, "unit"))
    for radius in RADII[1:]:
        check_path(paths[radius], paths["unit"], unit, torch.float64)


@both
@pytest.mark.parametrize("radius", [2.0**-100, 2.0**-60, 2.0**60])
def test_extreme_radii_follow_the_unit_sphere(optimizer, options, radius):
    # Powers of two scale exactly, so that float32 paths are those of radius 1 to rounding.
    problem, unit = (Problem(LAYOUTS[2], np.full(10, r)) for r in (radius, 1.0))
    weight, other = problem.parameter(torch.float32), unit.parameter(torch.float32)
    path = run(optimizer([weight], **options), problem, weight)
    expected = run(optimizer([other], **options), unit, other)
    check_path([w / radius for w in path], expected, unit, torch.float32)


@both
def test_memory_formats_and_views_are_stepped_in_place(optimizer, options):
    for layout, kind in ((LAYOUTS[1], torch.channels_last), (LAYOUTS[2], torch.channels_last)):
        problem = Problem(layout, radii_for(layout, "per group"))
        weight, plain = problem.parameter(memory_format=kind), problem.parameter()
        address, stride = weight.data_ptr(), weight.stride()
        path = run(optimizer([weight], **options), problem, weight)
        check_path(path, run(optimizer([plain], **options), problem, plain), problem, torch.float64)
        assert (weight.data_ptr(), weight.stride()) == (address, stride)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@case
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, optimizer, reference, options):
    problem = Problem(LAYOUTS[2], np.ones(10), steps=1)
    # The reference starts at the point of the spheres that is nearest to the rounded weight.
    weight = problem.parameter(dtype)
    problem.start = problem.manifold().projx(weight.detach().double()).numpy()
    problem.linear = torch.from_numpy(problem.linear).to(dtype).double().numpy()
    problem.curvature = np.zeros_like(problem.curvature)
    found = run(optimizer([weight], **options), problem, weight, steps=1)[0]
    expected = reference(problem, **options, steps=1)[0]
    # Half a unit in the last place, and what float32 leaves of doubt where that is a tie.
    ulp = np.spacing(np.abs(expected).astype(np.float32)) * 2.0**16 if dtype == torch.bfloat16 else None
    ulp = np.spacing(np.abs(expected).astype(np.float16)).astype(float) if ulp is None else ulp
    assert np.all(np.abs(found - expected) <= ulp / 2 + 32 * torch.finfo(torch.float32).eps)
    assert np.any(np.abs(found - problem.start) > ulp)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moments_are_tangent_at_the_present_point(optimizer, options, dtype):
    problem = Problem(LAYOUTS[2], radii_for(LAYOUTS[2], "per group"))
    weight = problem.parameter(dtype)
    stepper = optimizer([weight], **options)
    run(stepper, problem, weight)
    moment = stepper.state[weight]["momentum_buffer" if optimizer is RiemannianSGD else "exp_avg"]
    w, b = weight.detach().double().numpy(), moment.double().numpy()
    length = np.sqrt(problem.dot(b, b)) * problem.radii
    assert np.all(np.abs(problem.dot(w, b)) <= 8 * torch.finfo(dtype).eps * length)
    assert np.all(length > 0)


def test_plain_riemannian_sgd_equals_geoopt():
    problem = Problem(LAYOUTS[1], radii_for(LAYOUTS[1], "per group"))
    ours, other = problem.parameter(), problem.parameter()
    expected = run(geoopt.optim.RiemannianSGD([other], lr=0.1), problem, other)
    check_path(run(RiemannianSGD([ours], lr=0.1), problem, ours), expected, problem, torch.float64)


def test_plain_riemannian_sgd_equals_pymanopt():
    pymanopt = pytest.importorskip("pymanopt")
    problem = Problem(LAYOUTS[0], np.ones(5))
    oblique = pymanopt.manifolds.Oblique(7, 5)  # unit columns
    weight, path, w = problem.parameter(), [], problem.start
    for step in range(STEPS):
        rgrad = oblique.euclidean_to_riemannian_gradient(w.T, problem.gradient(w, step).T)
        w = oblique.retraction(w.T, -0.1 * rgrad).T
        path.append(w)
    check_path(run(RiemannianSGD([weight], lr=0.1), problem, weight), path, problem, torch.float64)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_not_written_to(optimizer, options, dtype):
    problem = Problem(LAYOUTS[2], radii_for(LAYOUTS[2], "per group"))
    weight = problem.parameter(dtype)
    problem.backward(weight, 0)
    gradient, before, version = weight.grad, weight.grad.clone(), weight.grad._version
    optimizer([weight], **options, weight_decay=0.1, maximize=True).step()
    assert weight.grad is gradient
    assert gradient._version == version
    assert torch.equal(gradient, before)


@both
def test_weight_decay_has_no_effect_on_spheres(optimizer, options):
    problem = Problem(LAYOUTS[1], radii_for(LAYOUTS[1], "uniform"))
    decays = [{"weight_decay": 0.0}, {"weight_decay": 10.0}]
    if optimizer is RiemannianAdam:
        decays.append({"weight_decay": 10.0, "decoupled_weight_decay": True})
    weights = [problem.parameter(torch.float32) for _ in decays]
    paths = [run(optimizer([w], **options, **decay), problem, w) for w, decay in zip(weights, decays, strict=True)]
    for path in paths[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(path, paths[0], strict=True))


@both
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_learning_rate_of_zero_leaves_the_weight_bit_for_bit(optimizer, options, as_tensor):
    problem = Problem(LAYOUTS[2], radii_for(LAYOUTS[2], "per group"))
    weight = problem.parameter(torch.float32)
    before = weight.detach().clone()
    lr = torch.tensor(0.0) if as_tensor else 0.0
    stepper = optimizer([weight], **{**options, "lr": lr})
    run(stepper, problem, weight, steps=3)
    assert torch.equal(weight, before)
    assert stepper.state[weight]


@both
def test_a_learning_rate_may_be_a_tensor(optimizer, options):
    problem = Problem(LAYOUTS[1], np.ones(4))
    a, b = problem.parameter(), problem.parameter()
    path = run(optimizer([a], **{**options, "lr": torch.tensor(options["lr"], dtype=torch.float64)}), problem, a)
    check_path(path, run(optimizer([b], **options), problem, b), problem, torch.float64)


@both
def test_weights_without_a_gradient_stay_and_single_entries_do_not_jump(optimizer, options):
    sphere = mn.SphereProduct((3, 2))
    idle = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    points = geoopt.ManifoldParameter(torch.tensor([[1.0], [-1.0]]), manifold=mn.SphereProduct((2, 1)))
    before = idle.detach().clone()
    stepper = optimizer([idle, points], **options)
    for _ in range(3):
        points.grad = torch.full_like(points, 1e30)
        stepper.step()
    assert torch.equal(idle, before)
    assert points.flatten().tolist() == [1.0, -1.0]


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_gradient_out_of_range_makes_its_own_group_nan_never_zero(optimizer, options, bad):
    sphere = mn.SphereProduct((3, 4))
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    weight.grad = torch.randn(3, 4)
    weight.grad[1] = bad * torch.tensor([1.0, -1.0, 1.0, 1.0])
    stepper = optimizer([weight], **options)
    stepper.step()
    norms = weight.detach().norm(dim=1)
    assert norms[[0, 2]].tolist() == pytest.approx([1.0, 1.0])
    assert norms[1].isnan() or float(norms[1]) == pytest.approx(1.0)


@both
def test_a_step_is_seen_by_autograd(optimizer, options):
    sphere = mn.SphereProduct((3, 4))
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    weight.grad = torch.randn(3, 4)
    saved = (weight * weight).sum()
    optimizer([weight], **options).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_adam_turns_by_about_the_learning_rate_at_every_radius():
    for radius in RADII:
        problem = Problem(LAYOUTS[1], radii_for(LAYOUTS[1], radius))
        weight = problem.parameter()
        before = weight.detach().clone()
        run(RiemannianAdam([weight], lr=1e-3), problem, weight, steps=1)
        angles = problem.manifold().component_dist(before, weight.detach())
        # The first step has length η/(1 + eps/‖ξ‖) along the tangent: its angle is that length's arc tangent.
        assert angles.tolist() == pytest.approx([np.arctan(1e-3)] * 4, rel=1e-7)


def check_drift(optimizer, options, steps, allowed):
    sphere = mn.SphereProduct((8, 3, 3, 3))
    torch.manual_seed(0)
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    target, gradients = torch.randn(8, 3, 3, 3), torch.randn(64, 8, 3, 3, 3)
    stepper = optimizer([weight], **options)
    for step in range(steps):
        weight.grad = gradients[step % 64] + target * weight.detach()
        stepper.step()
    worst = float(sphere.deviations(weight).max())
    assert worst <= allowed * torch.finfo(torch.float32).eps, f"constraint error of {worst}"


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1.0, 1e-3])
@pytest.mark.parametrize(("optimizer", "options"), [(RiemannianSGD, {"momentum": 0.9}), (RiemannianAdam, {})])
def test_norms_do_not_drift_in_20000_steps(optimizer, options, lr):
    check_drift(optimizer, {**options, "lr": lr}, steps=20_000, allowed=4)


@pytest.mark.slow
def test_a_norm_that_is_taken_for_granted_drifts(monkeypatch):
    measured = reference.tangential

    def granted(*arguments, **options):
        found, gradient = measured(*arguments, **options)
        return found._replace(ww=torch.ones_like(found.ww)), gradient

    monkeypatch.setattr(reference, "tangential", granted)
    with pytest.raises(AssertionError, match="constraint error"):
        check_drift(RiemannianSGD, {"lr": 1e-3, "momentum": 0.9, "foreach": False}, steps=20_000, allowed=4)


def check_norm_of_many(optimizer, options, shape):
    sphere = mn.SphereProduct(mn.Partition.whole(shape))
    torch.manual_seed(0)
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    stepper = optimizer([weight], **options)
    for _ in range(3):
        weight.grad = torch.randn(shape)
        stepper.step()
    worst = float(sphere.deviations(weight).max())
    assert worst <= 4 * torch.finfo(torch.float32).eps, f"constraint error of {worst}"


@both
@pytest.mark.parametrize("shape", [(1, 2**20), (2**20,)])
def test_norms_of_a_million_entries_are_exact(optimizer, options, shape):
    check_norm_of_many(optimizer, options, shape)


def test_a_norm_added_in_sequence_is_not_exact(monkeypatch):
    def sequential(view, *pairs):
        return tuple(
            torch.linalg.vector_norm(x, dim=view.axes, keepdim=True).square()
            if x is y
            else (x * y).sum(view.axes, keepdim=True)
            for x, y in pairs
        )

    monkeypatch.setattr(GroupView, "dots", sequential)
    with pytest.raises(AssertionError, match="constraint error"):
        check_norm_of_many(RiemannianSGD, {"lr": 0.05, "momentum": 0.9, "foreach": False}, (1, 2**20))


def test_rules_by_themselves_take_an_undampened_first_step_by_default():
    def after(rule, second, **options):
        torch.manual_seed(0)
        weight, gradient = torch.eye(3)[:2].double(), torch.randn(2, 3).double()
        moment = torch.full((2, 3), 0.1).double()
        view = GroupView(weight, gradient, moment, second and second(), None, 1.0)
        reference.step_(rule, view, **options)
        return weight

    cases = [
        (Rule("sgd", 0.1, 0.9), None, {"dampening": 0.0}, {"dampening": 0.5}),
        (
            Rule("adam", 0.1, 0.9, beta2=0.999),
            lambda: torch.full((2, 1), 0.1).double(),
            {"step": 1},
            {"step": 2},
        ),
    ]
    for rule, second, default, other in cases:
        assert torch.equal(after(rule, second), after(rule, second, **default))
        assert not torch.equal(after(rule, second), after(rule, second, **other))
        assert not torch.equal(after(rule, second), after(replace(rule, maximize=True), second))
