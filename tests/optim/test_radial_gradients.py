"""Mostly radial gradients: what is below the rounding of its own projection moves nothing, the rest is exact."""

import itertools
import math

import geoopt
import numpy as np
import pytest
import torch
from helpers.optim_cases import LAYOUTS, Problem, radii_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import manifold_nets as mn
from manifold_nets.optim import OPTIMIZERS, RiemannianAdam, RiemannianSGD
from manifold_nets.optim.backends import batched, compiled, native, products, views

SPHERES = {name: row for name, row in OPTIMIZERS.items() if row.weights == "spheres"}
# Those of which the length of the gradient decides nothing, or little.
NORMALIZED = ("radam", "adam-g", "angular", "angular-adam")
BACKENDS = {"single": {"foreach": False}, "batched": {"foreach": True}, "kernel": {"fused": True}}
backend = pytest.mark.parametrize("how", BACKENDS.values(), ids=BACKENDS)
EPS = torch.finfo(torch.float32).eps


def optimizer_for(name, params, lr, **options):
    row = SPHERES[name]
    more = {} if row.adaptive else {"momentum": 0.9}
    return row.kind(params, lr=lr, **{**more, **row.options, **options})


def turns(before, after, sphere):
    """By how many radians each group has turned, in float64: exact for small angles too."""
    first, second = (sphere.projx(x.detach().double()) for x in (before, after))
    chord = sphere.partition.norms(first - second).flatten() / sphere.radii
    return 2 * torch.asin((chord / 2).clamp(max=1.0))


def radial_weight(layout, dtype):
    problem = Problem(layout, radii_for(layout, "per group"))
    return problem.parameter(dtype)


def turned_by_radial_gradients(name, how, layout, dtype=torch.float32, **options):
    """The farthest that a group has turned from its start, under gradients along the radius in six sizes."""
    worst = 0.0
    for size in (1e-3, 0.1, 0.7, 3.0, 100.0, 1e4):
        weight = radial_weight(layout, dtype)
        start, sphere = weight.detach().clone(), weight.manifold
        optimizer = optimizer_for(name, [weight], lr=0.01, **how, **options)
        for sign in (1.0, -1.0, 1.0, 1.0):
            # Such as that of an L2 penalty in the loss.
            weight.grad = size * sign * weight.detach()
            optimizer.step()
            worst = max(worst, float(turns(start, weight, sphere).max()))
    return worst


@backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", NORMALIZED)
def test_a_gradient_along_the_radius_turns_nothing(name, layout, how):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # All that moves is the last digit of a weight that is put back on its sphere.
        allowed = 4 * torch.finfo(dtype).eps
        assert turned_by_radial_gradients(name, how, layout, dtype) <= allowed


@pytest.mark.parametrize("how", [BACKENDS["single"], BACKENDS["batched"], BACKENDS["kernel"]], ids=BACKENDS)
@pytest.mark.parametrize("name", NORMALIZED)
def test_sabotage_where_no_rounding_counts_as_zero_weights_turn(name, how, monkeypatch):
    for module in (products, native):
        monkeypatch.setattr(module, "rounding_of", lambda dtype: 0.0)
    assert turned_by_radial_gradients(name, how, LAYOUTS[1]) > 1e-3


@backend
def test_master_weights_turn_no_more_than_the_rounding_of_their_gradients(how):
    # The gradient is along the rounded weight, whose direction is not that of the master.
    worst = turned_by_radial_gradients("radam", how, LAYOUTS[1], torch.bfloat16, master_weights=True)
    assert worst <= 4 * torch.finfo(torch.bfloat16).eps


@backend
def test_joint_spheres_do_not_turn_either(how):
    joint = mn.JointSphere({name: mn.Partition.filters((4, size)) for name, size in (("first", 5), ("second", 3))})
    torch.manual_seed(0)
    points = [nn.Parameter(point) for point in joint.projx([torch.randn(4, 5), torch.randn(4, 3)])]
    start = [point.detach().clone() for point in points]
    group = {"params": points, "manifolds": list(joint.manifolds)}
    optimizer = RiemannianAdam([group], lr=0.01, **how)
    for size in (0.1, 3.0, 100.0):
        for point in points:
            point.grad = size * point.detach()
        optimizer.step()
    for a, b in zip(start, points, strict=True):
        assert float((a - b.detach()).abs().max()) <= 4 * EPS


def longest(step, beta1, beta2):
    """Of an Adam step with the second moments of norms, in units of the learning rate, by Cauchy's inequality."""
    geometric = sum((beta1**2 / beta2) ** past for past in range(step))
    return (1 - beta1) / (1 - beta1**step) * math.sqrt((1 - beta2**step) / (1 - beta2) * geometric)


def gradients_of(point, sizes, shares, generator):
    """Gradients along the radius but for a share, group by group."""
    noise = torch.randn(point.shape, generator=generator, dtype=torch.float64)
    return sizes * (point.detach().double() + shares * noise)


def check_turns(name, how, dtype, betas, exponents, seed, lr=0.02):
    generator = torch.Generator().manual_seed(seed)
    sphere = mn.SphereProduct((6, 11), radius=1.5)
    start = sphere.projx(torch.randn(6, 11, generator=generator, dtype=torch.float64)).to(dtype)
    weight = geoopt.ManifoldParameter(start, manifold=sphere)
    adam = name == "radam"
    optimizer = optimizer_for(name, [weight], lr, **({"betas": betas} if adam else {}), **how)
    eps = torch.finfo(dtype).eps
    for step, (size, share) in enumerate(exponents, start=1):
        sizes, shares = (
            10.0 ** (exponent + torch.rand(6, 1, generator=generator, dtype=torch.float64))
            for exponent in (size, share)
        )
        before = weight.detach().clone()
        weight.grad = gradients_of(weight, sizes, shares, generator).to(dtype)
        optimizer.step()
        bound = math.atan(lr * longest(step, *betas)) if adam else lr
        # A rounding of each entry at both ends, and of a sum of squares on the way; where momentum and gradient cancel,
        # AngularSGD knows the length of their sum to a sixteenth of its products' rounding only.
        allowed = bound * (1 + 32 * eps) + 2 * eps if adam else bound * (1 + 1 / 8) + 2 * eps
        assert float(turns(before, weight, sphere).max()) <= allowed, f"step {step}"
        assert float(sphere.deviations(weight.detach()).max()) <= 4 * eps


decades = st.tuples(st.floats(-3, 4), st.floats(-17, 1))


@backend
@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32]),
    betas=st.tuples(st.floats(0, 0.95), st.floats(0.1, 0.9999)),
    exponents=st.lists(decades, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_no_step_of_adam_is_longer_than_its_formula_allows(how, dtype, betas, exponents, seed):
    check_turns("radam", how, dtype, betas, exponents, seed)


@backend
@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["angular", "angular-adam"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    exponents=st.lists(decades, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_no_step_of_an_angle_is_longer_than_the_angle(how, name, dtype, exponents, seed):
    check_turns(name, how, dtype, (0.9, 0.999), exponents, seed)


@pytest.mark.parametrize("how", [BACKENDS["single"], BACKENDS["batched"]], ids=["single", "batched"])
def test_sabotage_lengths_from_products_let_adam_step_too_far(how, monkeypatch):
    for module in (products, views):
        monkeypatch.setattr(module, "radial_share", lambda dots: torch.zeros_like(dots[0]))
    with pytest.raises(AssertionError):
        # By how much the difference of squares is off is a matter of luck.
        [check_turns("radam", how, torch.float32, (0.9, 0.999), [(2.0, -7.0)] * 4, seed) for seed in range(4)]


def reference_step(name, w, g, m, v, lr):
    """The second step of Adam on one unit sphere, or one of an angle, in float64 from the formulas.

    Returns the point, the moment there, and how long it was before it was carried there.
    """
    w = w / np.linalg.norm(w)
    xi = g - (w @ g) * w
    if name == "angular":
        m = 0.9 * (m - (w @ m) * w) + xi
        e = m / np.linalg.norm(m)
        length = np.linalg.norm(m)
        return np.cos(lr) * w - np.sin(lr) * e, length * (np.cos(lr) * e + np.sin(lr) * w), length
    m = 0.9 * (m - (w @ m) * w) + 0.1 * xi
    v = 0.5 * v + 0.5 * (xi @ xi)
    new = w - lr * m / (1 - 0.9**2) / (np.sqrt(v / (1 - 0.5**2)) + 1e-8)
    new = new / np.linalg.norm(new)
    return new, m - (new @ m) * new, np.linalg.norm(m)


def check_small_share(name, how, share, momentum, lr=0.1):
    """One step after a state was given, against float64 on the very numbers that the step has read."""
    generator = torch.Generator().manual_seed(0)
    shape, sphere = (5, 40), mn.SphereProduct((5, 40))
    draw = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = geoopt.ManifoldParameter(sphere.projx(draw()).float(), manifold=sphere)
    point = weight.detach().double()
    weight.grad = (3.0 * (point + share * draw() / 40**0.5)).float()
    moment = (momentum * sphere.proju(point, draw()) / 40**0.5).float()
    optimizer = optimizer_for(name, [weight], lr, **({} if name == "angular" else {"betas": (0.9, 0.5)}), **how)
    state, v = optimizer.state[weight], float((3.0 * share) ** 2)
    if name == "angular":
        state["momentum_buffer"] = moment.clone()
    else:
        second = torch.full((5, 1), v)
        state.update(step=torch.tensor(1.0), exp_avg=moment.clone(), exp_avg_sq=second)
    optimizer.step()
    found = state["momentum_buffer" if name == "angular" else "exp_avg"].double()
    for row in range(5):
        given = (x[row].double().numpy() for x in (point, weight.grad, moment))
        new, expected, size = reference_step(name, *given, np.float32(v), lr)
        # Entries of the radial part are rounded at their own size as they are subtracted, and nothing is lost after.
        lost = EPS / min(share, 1.0)
        assert np.linalg.norm(weight[row].detach().double().numpy() - new) <= lr * 4 * lost + 8 * EPS
        assert np.linalg.norm(found[row].numpy() - expected) <= (4 * lost + 16 * EPS) * size
        assert abs(float(found[row] @ weight[row].detach().double())) <= 8 * EPS * size


SHARES = [1.0, 0.1, 1e-3, 1e-5]


@backend
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["radam", "angular"])
def test_small_tangential_parts_are_exact(name, share, how):
    for momentum in (0.0, share, 1.0):
        check_small_share(name, how, share, momentum)


@pytest.mark.parametrize("how", [BACKENDS["single"], BACKENDS["batched"]], ids=["single", "batched"])
def test_sabotage_a_gradient_that_keeps_its_radial_part_is_not_exact(how, monkeypatch):
    for module in (products, views):
        monkeypatch.setattr(module, "radial_share", lambda dots: torch.zeros_like(dots[0]))
    with pytest.raises(AssertionError):
        check_small_share("radam", how, 1e-5, 1e-5)


def worst_deviation(name, how, dtype, shape):
    """The largest relative error of a radius, in machine epsilons, under gradients with ever less of a tangent."""
    worst = 0.0
    for lr, size, share in itertools.product((0.01, 0.1, 3.0), (1.0, 1e4), (1e-1, 1e-3, 1e-5, 1e-7, 0.0)):
        generator = torch.Generator().manual_seed(0)
        sphere = mn.SphereProduct(shape, radius=1.5)
        start = sphere.projx(torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        weight = geoopt.ManifoldParameter(start, manifold=sphere)
        optimizer = optimizer_for(name, [weight], lr, **how)
        for _ in range(3):
            weight.grad = -gradients_of(weight, size, share, generator).to(dtype)
            optimizer.step()
            worst = max(worst, float(sphere.deviations(weight.detach()).max()) / torch.finfo(dtype).eps)
    return worst


@backend
@pytest.mark.parametrize("name", SPHERES)
def test_mostly_radial_gradients_leave_weights_on_their_spheres(name, how):
    for dtype in (torch.float32, torch.bfloat16):
        assert worst_deviation(name, how, dtype, (40, 9)) <= 4


@pytest.mark.slow
@backend
@pytest.mark.parametrize("name", SPHERES)
def test_mostly_radial_gradients_leave_long_rows_on_their_spheres(name, how):
    assert worst_deviation(name, how, torch.float32, (2, 70_001)) <= 4


def test_sabotage_a_norm_that_forgets_what_was_taken_off_leaves_the_spheres(monkeypatch):
    for module in (products, batched):
        monkeypatch.setattr(module, "some", lambda condition: False)
    assert worst_deviation("radam", {"foreach": True}, torch.float32, (40, 9)) > 100


@backend
def test_a_plain_step_that_cancels_the_weight_leaves_it_where_it_is(how):
    weight = radial_weight(LAYOUTS[1], torch.float32)
    start, sphere = weight.detach().clone(), weight.manifold
    optimizer = mn.optim.ProjectedSGD([weight], lr=0.3, **how)
    # r² g = w/η, so that w − η r² g is nothing but rounding.
    weight.grad = sphere.partition.divide(weight.detach(), sphere.radius_for(weight).square()) / 0.3
    optimizer.step()
    assert float(turns(start, weight, sphere).max()) <= 4 * EPS


@backend
def test_sgd_moves_by_its_rate_times_rounding_at_most(how):
    # Nothing magnifies the rounding of its gradient, so that it needs no rule.
    weight = radial_weight(LAYOUTS[1], torch.float32)
    start, sphere = weight.detach().clone(), weight.manifold
    optimizer = RiemannianSGD([weight], lr=0.1, momentum=0.9, **how)
    weight.grad = sphere.partition.divide(3.3 * weight.detach(), sphere.radius_for(weight).square())
    optimizer.step()
    assert float(turns(start, weight, sphere).max()) <= 0.1 * 3.3 * 4 * EPS + 4 * EPS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
@pytest.mark.parametrize("complete", [False, True], ids=["processor", "accelerator"])
def test_compiled_steps_follow_the_same_rule(complete, monkeypatch):
    compiled._kernel.cache_clear()
    monkeypatch.setattr(compiled, "_completes", lambda device: complete)
    try:
        assert turned_by_radial_gradients("radam", {"compile": True}, LAYOUTS[1]) <= 4 * EPS
        assert worst_deviation("radam", {"compile": True}, torch.float32, (40, 9)) <= 4
        for share in SHARES:
            check_small_share("radam", {"compile": True}, share, share)
    finally:
        compiled._kernel.cache_clear()


@backend
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", SPHERES)
def test_a_radial_gradient_beside_others_changes_no_other_step(name, momentum, how):
    row = SPHERES[name]
    options = {**({} if row.adaptive else {"momentum": momentum}), **row.options}
    generator = torch.Generator().manual_seed(4)
    spheres = [mn.SphereProduct(shape) for shape in ((4, 5), (3, 7), (2, 6))]
    starts, gradients = [], []
    for share, sphere in zip((1.0, 0.01, 1.0), spheres, strict=True):
        noise = torch.randn(2, *sphere.partition.shape, generator=generator, dtype=torch.float64)
        starts.append(sphere.projx(noise[0]))
        gradients.append((1 - share) * 3 * starts[-1] + share * noise[1])

    def stepped(places, **execution):
        weights = [geoopt.ManifoldParameter(starts[place].clone(), manifold=spheres[place]) for place in places]
        optimizer = row.kind(weights, lr=0.1, **options, **execution)
        for _ in range(2):
            for weight, place in zip(weights, places, strict=True):
                weight.grad = gradients[place].clone()
            optimizer.step()
        return weights

    alone = [stepped([place], foreach=False)[0] for place in range(3)]
    for found, expected in zip(stepped(range(3), **how), alone, strict=True):
        # The tangential part is a hundredth of the gradient that is rounded.
        assert torch.allclose(found, expected, rtol=0, atol=1e4 * torch.finfo(torch.float64).eps)
