"""SphereProduct against pymanopt's oblique manifold, against mpmath, and by the slopes of its approximations."""

import math
from collections.abc import Callable, Sequence

import mpmath
import numpy as np
import pytest
import torch
from helpers.sphere_cases import PARTITIONS, RADII, eps, noise, point, relative_error, spheres, tangent
from torch import Tensor

from manifold_nets import Partition, SphereProduct

pymanopt_manifolds = pytest.importorskip("pymanopt.manifolds")

curved = pytest.mark.parametrize(
    ("partition", "radius"),
    [(partition, radius) for partition in PARTITIONS for radius in RADII if partition != "one entry"],
)


# ---- pymanopt: unit-norm columns, float64 --------------------------------------------------------------------------


def check_against_oblique(sphere: SphereProduct) -> None:
    """Compare every operation with pymanopt's on the matrix whose columns are the groups over their radii."""
    partition, radii = sphere.partition, sphere.radii
    oblique = pymanopt_manifolds.Oblique(partition.group_size, partition.n_groups)

    def columns(w: Tensor) -> np.ndarray:
        return (partition.rows(w) / radii[:, None]).T.numpy()

    x, y = point(sphere), point(sphere, seed=4)
    u, v, g = tangent(sphere, x, 0.8), tangent(sphere, x, 2.5, seed=2), noise(partition.shape, seed=3)
    x_, y_, u_, v_ = (columns(w) for w in (x, y, u, v))
    gradient = (partition.rows(g) * radii[:, None]).T.numpy()  # of the loss as a function of w/r
    pairs = {
        "inner": (float(sphere.inner(x, u, v)), oblique.inner_product(x_, u_, v_)),
        "norm": (float(sphere.norm(x, v)), oblique.norm(x_, v_)),
        "dist": (float(sphere.dist(x, y)), oblique.dist(x_, y_)),
        "proju": (columns(sphere.proju(x, g)), oblique.projection(x_, columns(g))),
        "egrad2rgrad": (
            columns(sphere.egrad2rgrad(x, g)),
            oblique.euclidean_to_riemannian_gradient(x_, gradient),
        ),
        "retr": (columns(sphere.retr(x, u)), oblique.retraction(x_, u_)),
        "expmap": (columns(sphere.expmap(x, v)), oblique.exp(x_, v_)),
        "logmap": (columns(sphere.logmap(x, y)), oblique.log(x_, y_)),
        "transp": (columns(sphere.transp(x, y, u)), oblique.transport(x_, y_, u_)),
    }
    for name, (found, expected) in pairs.items():
        np.testing.assert_allclose(found, expected, rtol=0, atol=64 * eps(torch.float64), err_msg=name)


@curved
def test_operations_are_those_of_pymanopt(partition: str, radius: str) -> None:
    check_against_oblique(spheres(partition, radius))


FAULTS: dict[str, Callable[[SphereProduct], None]] = {
    "inner": lambda s: setattr(s, "group_inner", lambda x, u, v=None: s.partition.inner(u, u if v is None else v)),
    "dist": lambda s: setattr(s, "component_dist", lambda x, y: 1.0001 * SphereProduct.component_dist(s, x, y)),
    "egrad2rgrad": lambda s: setattr(s, "egrad2rgrad", s.proju),
    "retr": lambda s: setattr(s, "retr", s.expmap),
    "expmap": lambda s: setattr(s, "expmap", s.retr),
    "transp": lambda s: setattr(s, "transp", lambda x, y, v: v),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_operation_in_the_place_of_another_is_noticed(name: str) -> None:
    sphere = spheres("grouped transposed filters", "one a group")
    FAULTS[name](sphere)
    with pytest.raises(AssertionError, match=name):
        check_against_oblique(sphere)


# ---- slopes --------------------------------------------------------------------------------------------------------


def slope(error: Callable[[float], float], steps: Sequence[float]) -> float:
    """Return the slope of log error against log step by least squares: the order of an approximation."""
    logs = np.log10(steps), np.log10([error(step) for step in steps])
    return float(np.polyfit(*logs, 1)[0])


STEPS = tuple(10 ** (-1 - exponent / 4) for exponent in range(9))
SMALL_STEPS = tuple(step / 100 for step in STEPS)


def retraction_slope(sphere: SphereProduct, retraction: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the order in t at which ``retraction(x, t u)`` leaves the geodesic; 3 for one of second order."""
    x = point(sphere)
    u = tangent(sphere, x)
    return slope(lambda t: float((retraction(x, t * u) - sphere.expmap(x, t * u)).norm()), STEPS)


@curved
def test_the_retraction_is_of_second_order(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)
    assert retraction_slope(sphere, sphere.retr) >= 2.9


@curved
def test_retractions_of_first_order_and_none_have_smaller_slopes(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)

    def drifting(x: Tensor, u: Tensor) -> Tensor:
        sideways = sphere.proju(x, noise(x.shape, seed=9))
        return sphere.retr(x, u + sphere.norm(x, u) ** 2 * sideways)

    assert 1.9 <= retraction_slope(sphere, drifting) <= 2.1
    assert 1.9 <= retraction_slope(sphere, torch.add) <= 2.1
    assert 0.9 <= retraction_slope(sphere, lambda x, u: sphere.retr(x, 1.01 * u)) <= 1.1


def gradient_slope(sphere: SphereProduct, gradient: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the order in t of ``f(Exp(t u)) − f(x) − t ⟨gradient, u⟩``; 2 for the gradient in the metric."""
    x, weights = point(sphere), noise(sphere.partition.shape, seed=6)
    u = tangent(sphere, x)

    def loss(w: Tensor) -> Tensor:
        return (weights * w).sum() + (weights * w).square().sum()

    euclidean = torch.autograd.functional.jacobian(loss, x)
    along = sphere.inner(x, gradient(x, euclidean), u)
    return slope(lambda t: abs(float(loss(sphere.expmap(x, t * u)) - loss(x) - t * along)), SMALL_STEPS)


@curved
def test_the_gradient_is_that_of_the_metric(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)
    assert gradient_slope(sphere, sphere.egrad2rgrad) >= 1.9


@pytest.mark.parametrize("partition", [kind for kind in PARTITIONS if kind != "one entry"])
def test_the_gradient_of_another_metric_has_a_smaller_slope(partition: str) -> None:
    sphere = spheres(partition, "small")
    assert gradient_slope(sphere, sphere.proju) <= 1.1


# ---- full relative accuracy ----------------------------------------------------------------------------------------


def exact_angle(x: Sequence[float], y: Sequence[float]) -> mpmath.mpf:
    """Return the angle between two vectors of floating-point numbers, to 50 digits."""
    with mpmath.workdps(50):
        x, y = mpmath.matrix(x), mpmath.matrix(y)
        x, y = x / mpmath.norm(x), y / mpmath.norm(y)
        return 2 * mpmath.atan2(mpmath.norm(x - y), mpmath.norm(x + y))


def check_angles(angles: Callable[[SphereProduct, Tensor, Tensor], Tensor], dtype: torch.dtype, radius: float) -> None:
    """Require each angle within 4 machine epsilons of itself, from 1e-6 to π − 1e-6."""
    wanted = [1e-6, 1e-4, 1e-2, 1.0, math.pi / 2, 3.0, math.pi - 1e-2, math.pi - 1e-4, math.pi - 1e-6]
    sphere = SphereProduct((len(wanted), 27), radius=radius)
    x = point(sphere, torch.float64)
    u = tangent(sphere, x) * torch.tensor(wanted, dtype=torch.float64)[:, None]
    x, y = x.to(dtype), sphere.expmap(x, u).to(dtype)
    found = angles(sphere, x, y).double()
    exact = [exact_angle(*rows) for rows in zip(x.tolist(), y.tolist(), strict=True)]
    for angle, value in zip(found.tolist(), exact, strict=True):
        assert abs(angle - value) <= 4 * eps(torch.promote_types(dtype, torch.float32)) * value, (angle, value)


@pytest.mark.parametrize("radius", [1.0, 0.37, 1e-3, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_angles_keep_all_digits_between_near_and_nearly_antipodal_points(dtype: torch.dtype, radius: float) -> None:
    check_angles(SphereProduct.component_dist, dtype, radius)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_arc_cosine_does_not_keep_them(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        check_angles(lambda s, x, y: (s.partition.inner(x, y).clamp(-1, 1)).acos().flatten(), dtype, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chords_between_normalized_points_do_not_keep_them(dtype: torch.dtype) -> None:
    def chords(sphere: SphereProduct, x: Tensor, y: Tensor) -> Tensor:
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
        return 2 * torch.atan2((x - y).norm(dim=1), (x + y).norm(dim=1))

    with pytest.raises(AssertionError):
        check_angles(chords, dtype, 0.37)


def check_logarithms(logmap: Callable[[SphereProduct, Tensor, Tensor], Tensor], angle: float, radius: float) -> None:
    """Compare a float32 logarithm with that of the same points in float64: every group to 8 machine epsilons."""
    sphere = SphereProduct(Partition.transposed_filters((9, 4, 3)), radius=radius)
    exact = SphereProduct(sphere.partition)
    x = point(sphere, torch.float64)
    x, y = x.float(), sphere.expmap(x, tangent(sphere, x, angle)).float()
    expected = exact.logmap(exact.projx(x.double()), exact.projx(y.double()))
    difference = exact.partition.norms(logmap(sphere, x, y).double() / radius - expected).flatten()
    assert bool((difference <= 8 * eps(torch.float32) * exact.partition.norms(expected).flatten()).all())


@pytest.mark.parametrize("radius", [1.0, 0.37])
@pytest.mark.parametrize("angle", [1e-6, 1e-4, 1e-2, 1.0, math.pi / 2, 3.0, math.pi - 1e-4, math.pi - 1e-6])
def test_logarithms_keep_all_digits(angle: float, radius: float) -> None:
    check_logarithms(SphereProduct.logmap, angle, radius)


@pytest.mark.parametrize("angle", [1e-4, math.pi - 1e-4])
def test_a_logarithm_from_projected_differences_does_not_keep_them(angle: float) -> None:
    def projected(sphere: SphereProduct, x: Tensor, y: Tensor) -> Tensor:
        direction = sphere.proju(x, y)
        length = sphere.partition.norms(direction)
        return sphere.partition.multiply(direction, sphere.component_dist(x, y).view_as(length) / length)

    with pytest.raises(AssertionError):
        check_logarithms(projected, angle, 1.0)


# ---- the same path at every radius ---------------------------------------------------------------------------------


def path(
    partition: Partition, radius: float | list[float], gradient: Callable[[SphereProduct, Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Descend a scale-invariant loss from one point of the unit spheres, scaled; return the unit points passed."""
    sphere, unit = SphereProduct(partition, radius=radius), SphereProduct(partition)
    target, w = point(unit, seed=8), sphere.projx(noise(partition.shape))
    passed = []
    for _ in range(20):
        w.requires_grad_()
        direction = partition.divide(w, partition.norms(w))
        (g,) = torch.autograd.grad((direction - target).square().sum() + (direction * target).pow(4).sum(), w)
        w = sphere.retr(w.detach(), -0.1 * gradient(sphere, w.detach(), g))
        passed.append(partition.divide(w, partition.norms(w)))
    return passed


@pytest.mark.parametrize("partition", PARTITIONS)
def test_one_learning_rate_follows_one_path_at_every_radius(partition: str) -> None:
    groups = PARTITIONS[partition]
    expected = path(groups, 1.0, SphereProduct.egrad2rgrad)
    for radius in (0.05, 30.0, [0.1 * 2**group for group in range(groups.n_groups)]):
        for found, wanted in zip(path(groups, radius, SphereProduct.egrad2rgrad), expected, strict=True):
            assert relative_error(found, wanted) <= 64 * eps(torch.float64)


def test_the_projected_gradient_alone_follows_another_path() -> None:
    groups = PARTITIONS["filters"]
    last = {radius: path(groups, radius, SphereProduct.proju)[-1] for radius in (1.0, 30.0)}
    assert relative_error(last[30.0], last[1.0]) > 1e-3
