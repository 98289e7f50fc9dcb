"""The pymanopt twin of SphereProduct against pymanopt's oblique manifold, geoopt-style originals and slopes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.sphere_cases import PARTITIONS, RADII, eps, noise, point, relative_error, spheres, tangent

from manifold_nets import SphereProduct

pymanopt = pytest.importorskip("pymanopt")

from manifold_nets import pymanopt_bridge as bridge  # noqa: E402
from manifold_nets.pymanopt_bridge import SphereProductManifold  # noqa: E402

curved = pytest.mark.parametrize(
    ("partition", "radius"),
    [(partition, radius) for partition in PARTITIONS for radius in RADII if partition != "one entry"],
)


def check_against_oblique(manifold: SphereProductManifold) -> None:
    """Compare every method with pymanopt's on the matrix whose columns are the groups over their radii."""
    sphere, partition = manifold.sphere, manifold.sphere.partition
    oblique = pymanopt.manifolds.Oblique(partition.group_size, partition.n_groups)

    def columns(array: np.ndarray, power: int = -1) -> np.ndarray:
        return (partition.rows(torch.from_numpy(array)) * sphere.radii[:, None] ** power).T.numpy()

    x, y = point(sphere).numpy(), point(sphere, seed=4).numpy()
    vectors = tangent(sphere, point(sphere), 0.8), tangent(sphere, point(sphere), 2.5, seed=2)
    u, v = (vector.numpy() for vector in vectors)
    g, h = noise(x.shape, seed=3).numpy(), noise(x.shape, seed=7).numpy()
    x_, y_, u_, v_ = (columns(array) for array in (x, y, u, v))
    # As functions of w/r the gradient is r g, and its derivative along u/r is r H u.
    g_, h_ = columns(g, 1), columns(h, 1)
    pairs = {
        "dim": (manifold.dim, oblique.dim),
        "typical_dist": (manifold.typical_dist, oblique.typical_dist),
        "inner_product": (manifold.inner_product(x, u, v), oblique.inner_product(x_, u_, v_)),
        "norm": (manifold.norm(x, v), oblique.norm(x_, v_)),
        "dist": (manifold.dist(x, y), oblique.dist(x_, y_)),
        "projection": (columns(manifold.projection(x, g)), oblique.projection(x_, columns(g))),
        "to_tangent_space": (columns(manifold.to_tangent_space(x, g)), oblique.to_tangent_space(x_, columns(g))),
        "gradient": (
            columns(manifold.euclidean_to_riemannian_gradient(x, g)),
            oblique.euclidean_to_riemannian_gradient(x_, g_),
        ),
        "hessian": (
            columns(manifold.euclidean_to_riemannian_hessian(x, g, h, u)),
            oblique.euclidean_to_riemannian_hessian(x_, g_, h_, u_),
        ),
        "retraction": (columns(manifold.retraction(x, u)), oblique.retraction(x_, u_)),
        "exp": (columns(manifold.exp(x, v)), oblique.exp(x_, v_)),
        "log": (columns(manifold.log(x, y)), oblique.log(x_, y_)),
        "transport": (columns(manifold.transport(x, y, u)), oblique.transport(x_, y_, u_)),
        "pair_mean": (columns(manifold.pair_mean(x, y)), oblique.pair_mean(x_, y_)),
        "zero_vector": (manifold.zero_vector(x), np.zeros(x.shape)),
    }
    for name, (found, expected) in pairs.items():
        np.testing.assert_allclose(found, expected, rtol=0, atol=64 * eps(torch.float64), err_msg=name)


@curved
def test_methods_are_those_of_the_oblique_manifold(partition: str, radius: str) -> None:
    check_against_oblique(SphereProductManifold(spheres(partition, radius)))


def without_curvature(m: SphereProductManifold) -> Callable[..., np.ndarray]:
    return lambda x, g, h, u: m.euclidean_to_riemannian_gradient(x, h)


def of_the_embedding(m: SphereProductManifold) -> Callable[..., float]:
    return lambda x, u, v: float((u * v).sum())


FAULTS: dict[str, tuple[str, Callable[[SphereProductManifold], Callable[..., object]]]] = {
    "inner_product": ("inner_product", of_the_embedding),
    "gradient": ("euclidean_to_riemannian_gradient", lambda m: m.projection),
    "hessian": ("euclidean_to_riemannian_hessian", without_curvature),
    "retraction": ("retraction", lambda m: m.exp),
    "log": ("log", lambda m: lambda x, y: m.projection(x, y - x)),
    "transport": ("transport", lambda m: lambda x, y, u: u),
    "pair_mean": ("pair_mean", lambda m: lambda x, y: x),
}


@pytest.mark.parametrize("name", FAULTS)
def test_sabotage_one_method_in_the_place_of_another_is_noticed(name: str) -> None:
    manifold = SphereProductManifold(spheres("grouped transposed filters", "one a group"))
    method, fault = FAULTS[name]
    setattr(manifold, method, fault(manifold))
    with pytest.raises(AssertionError, match=name):
        check_against_oblique(manifold)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_methods_are_those_of_the_sphere_product_in_the_dtype_of_the_point(dtype: type) -> None:
    sphere = spheres("blocks", "one a group")
    manifold = SphereProductManifold(sphere)
    x = point(sphere, torch.from_numpy(np.zeros(1, dtype)).dtype)
    u, g = tangent(sphere, x), noise(x.shape, x.dtype)
    for found, expected in (
        (manifold.exp(x.numpy(), u.numpy()), sphere.expmap(x, u)),
        (manifold.retraction(x.numpy(), u.numpy()), sphere.retr(x, u)),
        (manifold.euclidean_to_riemannian_gradient(x.numpy(), g.numpy()), sphere.egrad2rgrad(x, g)),
        (manifold.zero_vector(x.numpy()), torch.zeros_like(x)),
    ):
        assert found.dtype == dtype
        assert torch.equal(torch.from_numpy(found), expected)


@curved
def test_random_points_and_unit_tangent_vectors(partition: str, radius: str) -> None:
    manifold = SphereProductManifold(spheres(partition, radius))
    np.random.seed(3)  # noqa: NPY002  pymanopt draws from this one
    x = manifold.random_point()
    u = manifold.random_tangent_vector(x)
    assert manifold.sphere.check_point_on_manifold(torch.from_numpy(x), atol=1e-12)
    assert manifold.sphere.check_vector_on_tangent(torch.from_numpy(x), torch.from_numpy(u), atol=1e-12)
    assert abs(manifold.norm(x, u) - 1) <= 8 * eps(torch.float64)
    np.random.seed(3)  # noqa: NPY002  pymanopt draws from this one
    assert np.array_equal(x, manifold.random_point())


def test_groups_of_one_entry_have_nowhere_to_go() -> None:
    manifold = SphereProductManifold(spheres("one entry", "unit"))
    x = manifold.random_point()
    assert manifold.dim == 0
    assert not manifold.random_tangent_vector(x).any()


def test_arrays_of_any_strides_are_taken() -> None:
    manifold = SphereProductManifold(SphereProduct((4, 3)))
    x = np.asfortranarray(manifold.random_point())
    assert not x.flags.c_contiguous
    assert manifold.dist(x, np.ascontiguousarray(x)) == 0
    flipped = x[::-1]
    assert relative_error(torch.from_numpy(manifold.projection(flipped, flipped) + 1), torch.ones(4, 3)) < 1e-15


@curved
def test_the_retraction_is_of_second_order(partition: str, radius: str) -> None:
    manifold = SphereProductManifold(spheres(partition, radius))
    assert abs(bridge.retraction_slope(manifold) - 3) <= 0.1


def test_sabotage_a_retraction_of_first_order_has_a_smaller_slope() -> None:
    manifold = SphereProductManifold(spheres("filters", "unit"))
    drift = noise(manifold.sphere.partition.shape, seed=9).numpy()

    class Drifting(SphereProductManifold):
        def retraction(self, point, tangent_vector):
            sideways = self.norm(point, tangent_vector) ** 2 * self.projection(point, drift)
            return super().retraction(point, tangent_vector + sideways)

    assert abs(bridge.retraction_slope(Drifting(manifold.sphere)) - 2) <= 0.1
