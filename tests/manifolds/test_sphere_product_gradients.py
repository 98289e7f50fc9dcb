"""SphereProduct under autograd, torch.compile and geoopt's optimizers."""

from collections.abc import Callable

import geoopt
import pytest
import torch
from helpers.sphere_cases import PARTITIONS, RADII, eps, every_sphere, noise, point, radius_of, spheres, tangent
from torch import Tensor

from manifold_nets import Partition, SphereProduct

METHODS: dict[str, Callable[[SphereProduct, Tensor, Tensor, Tensor], Tensor]] = {
    "projx": lambda sphere, x, y, u: sphere.projx(x),
    "proju": lambda sphere, x, y, u: sphere.proju(x, u),
    "egrad2rgrad": lambda sphere, x, y, u: sphere.egrad2rgrad(x, u),
    "retr": lambda sphere, x, y, u: sphere.retr(x, u),
    "expmap": lambda sphere, x, y, u: sphere.expmap(x, u),
    "logmap": lambda sphere, x, y, u: sphere.logmap(x, y),
    "dist": lambda sphere, x, y, u: sphere.dist(x, y),
    "dist2": lambda sphere, x, y, u: sphere.dist2(x, y),
    "component_dist": lambda sphere, x, y, u: sphere.component_dist(x, y),
    "inner": lambda sphere, x, y, u: sphere.inner(x, u),
    "component_inner": lambda sphere, x, y, u: sphere.component_inner(x, u, u),
    "norm": lambda sphere, x, y, u: sphere.norm(x, u),
    "transp": lambda sphere, x, y, u: sphere.transp(x, y, u),
    "retr_transp": lambda sphere, x, y, u: sphere.retr_transp(x, u, u)[1],
}


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_finite_differences(method: str, radius: str) -> None:
    sphere = SphereProduct(
        Partition.transposed_filters((4, 2, 2), 2), radius=radius_of(radius, Partition.filters((4,)))
    )
    x, y = point(sphere), point(sphere, seed=4)
    arguments = [t.requires_grad_() for t in (x, y, tangent(sphere, x))]
    assert torch.autograd.gradcheck(lambda *a: METHODS[method](sphere, *a), arguments)


@every_sphere
def test_gradients_are_finite_where_points_coincide_and_vectors_vanish(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)
    for other in (1.0, -1.0):
        for name, method in METHODS.items():
            x = point(sphere, torch.float32)
            arguments = [t.requires_grad_() for t in (x.clone(), other * x, torch.zeros_like(x))]
            gradients = torch.autograd.grad(method(sphere, *arguments).sum(), arguments, allow_unused=True)
            assert any(gradient is not None for gradient in gradients)
            assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None), name


@every_sphere
def test_logarithm_at_the_point_itself_has_the_projection_as_derivative(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)
    x, v = point(sphere), noise(sphere.partition.shape, seed=3)
    _, derivative = torch.autograd.functional.jvp(lambda y: sphere.logmap(x, y), x, v)
    torch.testing.assert_close(derivative, sphere.proju(x, v), rtol=0, atol=16 * eps(torch.float64))


def check_gradient_of_squared_distance(sphere: SphereProduct, gradient: Callable[..., Tensor]) -> None:
    x, y = point(sphere), point(sphere, seed=4).requires_grad_()
    (euclidean,) = torch.autograd.grad(sphere.dist2(x, y) / 2, y)
    torch.testing.assert_close(
        gradient(sphere, y, euclidean), -sphere.logmap(y, x), rtol=0, atol=1e3 * eps(torch.float64)
    )


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("partition", [kind for kind in PARTITIONS if kind != "one entry"])
def test_gradient_of_half_the_squared_distance_is_minus_the_logarithm(partition: str, radius: str) -> None:
    check_gradient_of_squared_distance(spheres(partition, radius), SphereProduct.egrad2rgrad)


def test_gradient_in_another_metric_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_gradient_of_squared_distance(spheres("filters", "small"), SphereProduct.proju)


@pytest.mark.parametrize("radius", ["unit", "one a group"])
@pytest.mark.parametrize("method", ["retr", "proju", "egrad2rgrad", "retr_transp"])
def test_compiles_without_a_graph_break(method: str, radius: str) -> None:
    sphere = spheres("grouped transposed filters", radius)
    x = point(sphere)
    u = tangent(sphere, x)
    arguments = (x, u, u) if method == "retr_transp" else (x, u)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(sphere, method), backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, getattr(sphere, method)(*arguments), rtol=0, atol=8 * eps(torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_points_can_be_batched_by_vmap(method: str) -> None:
    sphere = spheres("grouped transposed filters", "one a group")
    batch = [torch.stack([point(sphere, seed=seed + i) for i in range(3)]) for seed in (0, 10, 20)]
    found = torch.func.vmap(lambda *a: METHODS[method](sphere, *a))(*batch)
    expected = torch.stack([METHODS[method](sphere, *one) for one in zip(*batch, strict=True)])
    torch.testing.assert_close(found, expected, rtol=16 * eps(torch.float64), atol=16 * eps(torch.float64))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_optimizers_of_geoopt_run_and_stay_on_the_spheres(partition: str, optimizer: str) -> None:
    sphere = spheres(partition, "one a group")
    weight = geoopt.ManifoldParameter(point(sphere, torch.float32), manifold=sphere)
    target = point(sphere, torch.float32, seed=7)
    make = {
        "sgd": lambda: geoopt.optim.RiemannianSGD([weight], lr=0.1, momentum=0.5, stabilize=7),
        "adam": lambda: geoopt.optim.RiemannianAdam([weight], lr=0.05, amsgrad=True, stabilize=7),
    }[optimizer]()
    before = float(sphere.dist(weight.detach(), target))
    for _ in range(60):
        make.zero_grad()
        (sphere.dist2(weight, target) / 2).backward()
        make.step()
        sphere.assert_check_point_on_manifold(weight, atol=0.0, rtol=4 * eps(torch.float32))
    after = float(sphere.dist(weight.detach(), target))
    assert after == before if partition == "one entry" else after < 0.2 * before
