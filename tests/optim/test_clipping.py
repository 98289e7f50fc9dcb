"""Clipping of gradients: sphere by sphere against formulas in float64, and torch's own over all parameters."""

import numpy as np
import pytest
import torch
from helpers.optim_cases import LAYOUTS, Problem, radii_for
from torch import nn
from torch.nn.utils import clip_grad_norm_

import manifold_nets as mn
from manifold_nets.constraints import attach
from manifold_nets.errors import OptionError
from manifold_nets.optim import clip_plain_grad_norm_, clip_sphere_grad_norm_

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
RADII = ["unit", "uniform", "per group"]


def reference(problem, gradient, bound):
    """Lengths of the Riemannian gradient in radians, and the clipped gradient, in float64 from the formula."""
    r, w, g = problem.radii, problem.start, gradient
    xi = problem.spread(r**2) * (g - problem.spread(problem.dot(w, g) / r**2) * w)
    lengths = np.sqrt(problem.dot(xi, xi)) / r
    return lengths, g * problem.spread(np.minimum(1, bound / lengths))


def check_clipping(clip, problem, dtype):
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.tensor(problem.start, dtype=dtype))
    attach(holder, "weight", problem.manifold())
    gradient = np.random.default_rng(5).standard_normal(problem.start.shape)
    lengths, _ = reference(problem, gradient, 1.0)
    bound = float(np.median(lengths))
    expected = reference(problem, gradient, bound)[1]
    holder.weight.grad = torch.tensor(gradient, dtype=dtype)
    largest = clip(holder, bound)
    eps, scale = torch.finfo(dtype).eps, np.abs(gradient).max()
    assert float(largest) == pytest.approx(lengths.max(), rel=32 * eps)
    assert np.abs(holder.weight.grad.double().numpy() - expected).max() <= 32 * eps * scale


@layouts
@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_sphere_is_clipped_by_itself(layout, radius, dtype):
    check_clipping(clip_sphere_grad_norm_, Problem(layout, radii_for(layout, radius)), dtype)


def euclidean(model, bound):
    """Sabotage: the norm of the Euclidean gradient, with its radial part and without the radius."""
    weight = model.weight
    norms = weight.manifold.partition.norms(weight.grad)
    weight.grad.copy_(weight.manifold.partition.multiply(weight.grad, (bound / norms).clamp(max=1)))
    return norms.max()


def together(model, bound):
    """Sabotage: one factor for all spheres."""
    weight = model.weight
    point = weight.detach()
    length = weight.manifold.norm(point, weight.manifold.egrad2rgrad(point, weight.grad))
    weight.grad.mul_(min(1.0, bound / float(length)))
    return length


@pytest.mark.parametrize("fault", [euclidean, together])
def test_sabotage_other_clippings_fail_the_comparison(fault):
    with pytest.raises(AssertionError):
        check_clipping(fault, Problem(LAYOUTS[0], radii_for(LAYOUTS[0], "per group")), torch.float64)


@layouts
def test_a_clipped_step_is_of_at_most_so_many_radians(layout):
    problem = Problem(layout, radii_for(layout, "per group"))
    holder = nn.Module()
    holder.weight = problem.parameter()
    manifold = holder.weight.manifold
    optimizer = mn.optim.RiemannianSGD([holder.weight], lr=0.5)
    angles = []
    for bound in (0.01, 0.1):
        before = holder.weight.detach().clone()
        holder.weight.grad = 100 * torch.randn(layout.partition.shape, dtype=torch.float64)
        clip_sphere_grad_norm_(holder, bound)
        optimizer.step()
        angles.append(manifold.component_dist(before, holder.weight.detach()))
        # The retraction moves by the arc tangent of the step's length.
        limit = torch.tensor(0.5 * bound, dtype=torch.float64).atan()
        assert torch.allclose(angles[-1], limit.expand_as(angles[-1]), rtol=1024 * torch.finfo(torch.float64).eps)


def test_the_bound_means_the_same_at_every_radius():
    found = []
    for radius in (1.0, 2.0**10, 2.0**-60):
        problem = Problem(LAYOUTS[1], np.full(LAYOUTS[1].partition.n_groups, radius), seed=3)
        holder = nn.Module()
        holder.weight = problem.parameter()
        problem.backward(holder.weight, 0)
        largest = clip_sphere_grad_norm_(holder, 0.5)
        found.append((float(largest), holder.weight.grad * radius))
    for largest, scaled in found[1:]:
        assert largest == pytest.approx(found[0][0], rel=1e-13)
        assert torch.allclose(scaled, found[0][1], rtol=1e-12)


def test_small_and_plain_gradients_are_left_bit_for_bit():
    net = nn.Sequential(mn.layers.UnitNormLinear(4, 3), nn.Linear(3, 2))
    net(torch.randn(5, 4)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in net.parameters()]
    clip_sphere_grad_norm_(net, 1e6)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))
    clip_sphere_grad_norm_(net, 1e-6)
    changed = [not torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True)]
    assert changed == [True, False, False, False]


def test_what_is_not_finite_stays_in_its_group_and_is_told():
    layer = mn.layers.UnitNormLinear(4, 3)
    layer.weight.grad = torch.ones(3, 4)
    layer.weight.grad[1, 2] = torch.inf
    assert not clip_sphere_grad_norm_(layer, 0.1).isfinite()
    assert layer.weight.grad.isfinite().all(1).tolist() == [True, False, True]


def test_without_gradients_nothing_is_clipped_and_bounds_must_be_positive():
    layer = mn.layers.UnitNormLinear(4, 3)
    assert float(clip_sphere_grad_norm_(layer, 0.1)) == 0.0
    assert float(clip_sphere_grad_norm_(nn.Linear(2, 2), 0.1)) == 0.0
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="max_norm"):
            clip_sphere_grad_norm_(layer, bound)


def test_torchs_clipping_scales_all_gradients_by_the_same_number():
    net = nn.Sequential(mn.layers.UnitNormLinear(4, 3), nn.Linear(3, 2))
    net(torch.randn(5, 4)).square().sum().mul(100).backward()
    before = [p.grad.double() for p in net.parameters()]
    total = torch.stack([g.square().sum() for g in before]).sum().sqrt()
    found = clip_grad_norm_(net.parameters(), 1.0)
    eps = torch.finfo(torch.float32).eps
    assert float(found) == pytest.approx(float(total), rel=32 * eps)
    for parameter, gradient in zip(net.parameters(), before, strict=True):
        assert torch.allclose(parameter.grad.double(), gradient / (total + 1e-6), rtol=32 * eps, atol=eps)


RUNS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def distance_of_clipped_runs(name, clip, radius):
    """Largest difference between the plain run, which torch clips, and the converted one."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8, eps=1e-30), nn.Tanh()),
        *(nn.Linear(8, 6), nn.LayerNorm(6, eps=1e-30), nn.Tanh(), nn.Linear(6, 3)),
    ).double()
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randint(3, (32,))
    plain = RUNS[name](net.parameters())

    def step(model, optimizer, clip):
        optimizer.zero_grad()
        out = model(x)
        nn.functional.cross_entropy(out, y).backward()
        total = clip(0.1)
        optimizer.step()
        return out.detach(), total

    def clip_plain(bound):
        return clip_grad_norm_(net.parameters(), bound)

    for _ in range(5):
        step(net, plain, clip_plain)
    converted = mn.convert(net, x, radius=radius)
    optimizer = mn.optim.from_torch(plain, net, converted)
    found = []
    for _ in range(15):
        (a, total), (b, other) = step(net, plain, clip_plain), step(converted, optimizer, lambda v: clip(optimizer, v))
        assert float(total) > 0.1
        found += [float((a - b).abs().max()), float((total - other).abs())]
    return max(found)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("radius", ["unit", "keep"])
def test_plain_clipping_is_that_of_the_plain_run(name, radius):
    assert distance_of_clipped_runs(name, clip_plain_grad_norm_, radius) <= 1e4 * torch.finfo(torch.float64).eps


def test_sabotage_torchs_clipping_is_not():
    def euclidean(optimizer, bound):
        return clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], bound)

    assert distance_of_clipped_runs("sgd", euclidean, "unit") > 1e-3


def test_plain_clipping_leaves_what_it_should():
    layer = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    converted = mn.convert(layer, torch.randn(5, 4))
    optimizer = mn.optim.from_torch(torch.optim.SGD(layer.parameters()), layer, converted)
    assert float(clip_plain_grad_norm_(optimizer, 0.1)) == 0.0
    converted(torch.randn(5, 4)).square().sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in converted.parameters()]
    assert float(clip_plain_grad_norm_(optimizer, 1e6)) > 0
    for p, (value, gradient) in zip(converted.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)
    with pytest.raises(OptionError, match="max_norm"):
        clip_plain_grad_norm_(optimizer, 0.0)
    for other in (torch.optim.SGD(layer.parameters()), mn.optim.RiemannianSGD(converted.parameters(), lr=0.1)):
        with pytest.raises(OptionError, match="clip_grad_norm_"):
            clip_plain_grad_norm_(other, 0.1)
