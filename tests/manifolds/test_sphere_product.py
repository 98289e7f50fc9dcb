"""Every operation of SphereProduct by geoopt's own assertions, over all partitions, radii and dtypes."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers.sphere_cases import (
    DTYPES,
    PARTITIONS,
    RADII,
    eps,
    every_sphere,
    noise,
    point,
    relative_error,
    spheres,
    tangent,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manifold_nets import SphereProduct, errors

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# ---- results are points and tangent vectors ------------------------------------------------------------------------

Results = tuple[list[Tensor], list[tuple[Tensor, Tensor]]]


def results(sphere: SphereProduct, dtype: torch.dtype) -> Results:
    """Return every point, and every tangent vector with its point, that the operations give."""
    x, y = point(sphere, dtype), point(sphere, dtype, seed=5)
    u, v = tangent(sphere, x, 0.7), tangent(sphere, x, 2.0, seed=2)
    moved, carried = sphere.retr_transp(x, u, v)
    far, far_carried = sphere.expmap_transp(x, v, u)
    points = [
        sphere.projx(noise(x.shape, dtype)),
        sphere.random(dtype=dtype),
        sphere.random_uniform(*x.shape, dtype=dtype),
        sphere.origin(*x.shape, dtype=dtype),
        sphere.retr(x, u),
        sphere.expmap(x, u),
        sphere.expmap(x, sphere.logmap(x, y)),
        moved,
        far,
    ]
    tangents = [
        (x, sphere.proju(x, noise(x.shape, dtype, seed=3))),
        (x, sphere.egrad2rgrad(x, noise(x.shape, dtype, seed=3))),
        (x, sphere.logmap(x, y)),
        (x, sphere.logmap(x, -x)),
        (y, sphere.transp(x, y, u)),
        (sphere.retr(x, u), sphere.transp_follow_retr(x, u, v)),
        (sphere.expmap(x, u), sphere.transp_follow_expmap(x, u, v)),
        (moved, carried),
        (far, far_carried),
    ]
    return points, tangents


def check_results(sphere: SphereProduct, dtype: torch.dtype, found: Results) -> None:
    """Apply geoopt's assertions at the accuracy of the dtype."""
    tight = 4 * eps(torch.float32 if dtype.itemsize < 4 else dtype)  # the rounding of half precision comes on top
    for x in found[0]:
        assert x.dtype == dtype
        sphere.assert_check_point_on_manifold(x, atol=0.0, rtol=tight)
    for x, u in found[1]:
        assert u.dtype == dtype
        sphere.assert_check_vector_on_tangent(x, u, atol=tight, rtol=4 * eps(dtype))


@every_dtype
@every_sphere
def test_operations_give_points_and_tangent_vectors(partition: str, radius: str, dtype: torch.dtype) -> None:
    sphere = spheres(partition, radius)
    check_results(sphere, dtype, results(sphere, dtype))


@every_dtype
def test_points_and_vectors_that_are_slightly_off_are_noticed(dtype: torch.dtype) -> None:
    sphere = spheres("grouped transposed filters", "one a group")
    points, tangents = results(sphere, dtype)
    away = 1 + 8 * eps(dtype)
    with pytest.raises(ValueError, match="not lying on SphereProduct"):
        check_results(sphere, dtype, ([points[0] * away], []))
    x, u = tangents[0]
    with pytest.raises(ValueError, match="not lying on tangent space"):
        check_results(sphere, dtype, ([], [(x, u + 16 * eps(dtype) * sphere.norm(x, u) * x)]))


@every_dtype
@every_sphere
def test_inherited_methods_are_what_they_are_made_of(partition: str, radius: str, dtype: torch.dtype) -> None:
    sphere = spheres(partition, radius)
    x = point(sphere, dtype)
    u, v = tangent(sphere, x), tangent(sphere, x, seed=2)
    for move, both, follow in (
        (sphere.retr, sphere.retr_transp, sphere.transp_follow_retr),
        (sphere.expmap, sphere.expmap_transp, sphere.transp_follow_expmap),
    ):
        moved, carried = both(x, u, v)
        assert torch.equal(moved, move(x, u))
        assert torch.equal(carried, sphere.transp(x, moved, v))
        assert torch.equal(carried, follow(x, u, v))


@every_sphere
def test_half_precision_is_float32_rounded_once(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)
    for dtype in (torch.float16, torch.bfloat16):
        x, u = point(sphere, dtype), noise(sphere.partition.shape, dtype)
        y = point(sphere, dtype, seed=3)
        for name, arguments in {"proju": (x, u), "egrad2rgrad": (x, u), "retr": (x, u), "logmap": (x, y)}.items():
            method = getattr(sphere, name)
            wide = method(*(argument.float() for argument in arguments))
            assert torch.equal(method(*arguments), wide.to(dtype)), name


def test_arguments_of_different_dtypes_meet_in_the_wider_one() -> None:
    sphere = spheres("filters", "one a group")
    x, u = point(sphere, torch.bfloat16), noise(sphere.partition.shape, torch.float32)
    assert torch.equal(sphere.proju(x, u), sphere.proju(x.float(), u))
    assert sphere.retr(x, u).dtype == torch.bfloat16


@every_sphere
def test_lengths_of_the_whole_product_are_those_of_its_groups(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)
    x, y, groups = point(sphere), point(sphere, seed=4), sphere.partition
    u, v = tangent(sphere, x), tangent(sphere, x, seed=2)
    rows_u, rows_v, radii = groups.rows(u), groups.rows(v), sphere.radii
    per_group = (rows_u * rows_v).sum(1) / radii.square()
    close = {"rtol": 16 * eps(torch.float64), "atol": 16 * eps(torch.float64)}
    torch.testing.assert_close(sphere.group_inner(x, u, v).flatten(), per_group, **close)
    torch.testing.assert_close(sphere.component_inner(x, u, v).expand(x.shape), per_group[groups.group_ids()], **close)
    torch.testing.assert_close(sphere.inner(x, u, v), per_group.sum(), **close)
    torch.testing.assert_close(sphere.norm(x, u) ** 2, sphere.inner(x, u), **close)
    angles = sphere.component_dist(x, y)
    assert angles.shape == (groups.n_groups,)
    torch.testing.assert_close(sphere.dist(x, y) ** 2, angles.square().sum(), **close)
    torch.testing.assert_close(sphere.dist2(x, y), angles.square().sum(), **close)
    for scalar in (sphere.inner(x, u, keepdim=True), sphere.norm(x, u, keepdim=True), sphere.dist(x, y, keepdim=True)):
        assert scalar.shape == (1,) * x.dim()


# ---- properties ----------------------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, width=32)
cases = st.tuples(st.sampled_from(sorted(PARTITIONS)), st.sampled_from(RADII), st.integers(0, 10**6))


@settings(deadline=None, derandomize=True)
@given(cases, st.sampled_from(DTYPES))
def test_distance_is_a_distance(case: tuple[str, str, int], dtype: torch.dtype) -> None:
    partition, radius, seed = case
    sphere = spheres(partition, radius)
    x, y, z = (point(sphere, dtype, seed=seed + i) for i in range(3))
    assert float(sphere.dist(x, x)) == 0.0
    rounding = 8 * eps(dtype)
    xy, yx = float(sphere.dist(x, y)), float(sphere.dist(y, x))
    assert xy == pytest.approx(yx, rel=rounding)
    assert xy <= (float(sphere.dist(x, z)) + float(sphere.dist(z, y))) * (1 + rounding)
    assert float(sphere.component_dist(x, y).max()) <= math.pi * (1 + eps(torch.float32))


@settings(deadline=None, derandomize=True)
@given(cases, st.floats(1e-6, 3.1))
def test_logarithm_and_exponential_undo_each_other(case: tuple[str, str, int], length: float) -> None:
    partition, radius, seed = case
    sphere = spheres(partition, radius)
    x = point(sphere, seed=seed)
    u = tangent(sphere, x, length, seed=seed + 1)
    y = sphere.expmap(x, u)
    # Near the antipode, where the exponential map is a contraction, its rounding is magnified by length/sin(length).
    accuracy = 64 * eps(torch.float64) * length / math.sin(length)
    torch.testing.assert_close(sphere.logmap(x, y), u, rtol=0, atol=accuracy)
    assert float(sphere.component_dist(sphere.expmap(x, sphere.logmap(x, y)), y).max()) <= 16 * eps(torch.float64)
    assert float(sphere.norm(x, sphere.logmap(x, y))) == pytest.approx(float(sphere.dist(x, y)), rel=1e-14)


@settings(deadline=None, derandomize=True)
@given(cases, st.floats(-30, 25), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_projections_project(case: tuple[str, str, int], exponent: float, dtype: torch.dtype) -> None:
    partition, radius, seed = case
    sphere = spheres(partition, radius)
    w = (noise(sphere.partition.shape, seed=seed) * 10**exponent).to(dtype)
    x, u = sphere.projx(w), noise(sphere.partition.shape, dtype, seed=seed + 1)
    assert relative_error(sphere.projx(x), x) <= 4 * eps(dtype)
    assert relative_error(sphere.projx(w.double()), x) <= 4 * eps(dtype)
    v = sphere.proju(x, u)
    assert float((sphere.proju(x, v).double() - v.double()).abs().max()) <= 4 * eps(dtype) * float(u.double().norm())
    other = noise(sphere.partition.shape, dtype, seed=seed + 2)
    one, two = (v.double() * other.double()).sum(), (u.double() * sphere.proju(x, other).double()).sum()
    assert float((one - two).abs()) <= 4 * eps(dtype) * float(u.double().norm() * other.double().norm())


@settings(deadline=None, derandomize=True)
@given(st.lists(finite, min_size=6, max_size=6), st.sampled_from(DTYPES))
def test_whatever_is_given_is_projected_or_refused(entries: list[float], dtype: torch.dtype) -> None:
    sphere = SphereProduct((2, 3))
    w = torch.tensor(entries, dtype=torch.float64).to(dtype).reshape(2, 3)
    usable = w.isfinite().all(1) & (w != 0).any(1)
    if bool(usable.all()):
        sphere.assert_check_point_on_manifold(sphere.projx(w), atol=0.0, rtol=4 * eps(torch.float32))
    else:
        with pytest.raises(errors.DegenerateGroupError) as caught:
            sphere.projx(w)
        assert list(caught.value.groups) == (~usable).nonzero().flatten().tolist()


# ---- the ends of the range -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e25, 1e-30, 1e-40])
def test_huge_and_tiny_entries_are_projected_in_float32(scale: float) -> None:
    sphere = SphereProduct((6, 3, 2, 2), radius=[0.1 * g + 1 for g in range(6)])
    w = (noise(sphere.partition.shape) * scale).float()
    assert relative_error(sphere.projx(w), sphere.projx(w.double())) <= 2 * eps(torch.float32)


def test_a_huge_step_still_ends_on_the_spheres() -> None:
    sphere = spheres("filters", "small")
    x = point(sphere, torch.float32)
    u = tangent(sphere, x, 1e25)
    y = sphere.retr(x, u)
    sphere.assert_check_point_on_manifold(y, atol=0.0, rtol=4 * eps(torch.float32))
    assert float(sphere.component_dist(x, y).sub(math.pi / 2).abs().max()) <= 4 * eps(torch.float32)


def check_radius_scales_out(radius: float, gradient: Callable[[SphereProduct, Tensor, Tensor], Tensor]) -> None:
    """Compare operations at a radius, in float32, with those of the unit spheres in float64."""
    unit, sphere = SphereProduct((5, 7)), SphereProduct((5, 7), radius=radius)
    x, g = point(unit, torch.float32), noise((5, 7), torch.float32, seed=1)
    u, y = tangent(unit, x), point(unit, torch.float32, seed=2)
    exact = {name: value.double() for name, value in {"x": x, "g": g, "u": u, "y": y}.items()}
    scaled = {name: (value * radius).float() for name, value in exact.items()}
    pairs = {
        "proju": (sphere.proju(scaled["x"], g) * radius, unit.proju(exact["x"], exact["g"]) * radius),
        # A scale-invariant loss has a gradient of order 1/r; r² times that is of order r.
        "egrad2rgrad": (
            gradient(sphere, scaled["x"], (exact["g"] / radius).float()),
            unit.egrad2rgrad(exact["x"], exact["g"]) * radius,
        ),
        "retr": (sphere.retr(scaled["x"], scaled["u"]), unit.retr(exact["x"], exact["u"]) * radius),
        "expmap": (sphere.expmap(scaled["x"], scaled["u"]), unit.expmap(exact["x"], exact["u"]) * radius),
        "logmap": (sphere.logmap(scaled["x"], scaled["y"]), unit.logmap(exact["x"], exact["y"]) * radius),
        "dist": (sphere.component_dist(scaled["x"], scaled["y"]), unit.component_dist(exact["x"], exact["y"])),
        "inner": (sphere.group_inner(x, scaled["u"], scaled["u"]), unit.group_inner(exact["x"], exact["u"])),
        "norm": (sphere.norm(x, scaled["u"]), unit.norm(exact["x"], exact["u"])),
    }
    for name, (found, expected) in pairs.items():
        assert relative_error(found, expected) <= 16 * eps(torch.float32), name


@pytest.mark.parametrize("radius", [1e-20, 1e-3, 0.37, 30.0, 1e15])
def test_radii_far_from_one_lose_no_digits(radius: float) -> None:
    check_radius_scales_out(radius, SphereProduct.egrad2rgrad)


def test_the_gradient_without_the_square_of_the_radius_is_noticed() -> None:
    with pytest.raises(AssertionError, match="egrad2rgrad"):
        check_radius_scales_out(0.37, SphereProduct.proju)


@every_dtype
@pytest.mark.parametrize("radius", RADII)
def test_groups_of_one_entry_stay_where_they_are(radius: str, dtype: torch.dtype) -> None:
    sphere = spheres("one entry", radius)
    x = point(sphere, dtype)
    steps = noise(x.shape, dtype) * (100 if dtype == torch.float16 else 1e25)
    for u in (sphere.proju(x, steps), sphere.egrad2rgrad(x, steps), sphere.logmap(x, -x), sphere.logmap(x, x)):
        assert not u.any()
    assert torch.equal(sphere.retr(x, sphere.egrad2rgrad(x, steps)), x)
    assert sphere.component_dist(x, -x).tolist() == pytest.approx([math.pi] * 5, rel=eps(torch.float32))
    assert "nothing to optimize" in repr(sphere)
