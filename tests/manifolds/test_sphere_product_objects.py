"""SphereProduct as an object: what it refuses and how it says so, sampling, copies, devices and memory formats."""

import copy
import math
import pickle
import re

import geoopt
import pytest
import torch
from helpers.sphere_cases import PARTITIONS, RADII, eps, every_sphere, noise, point, radius_of, spheres, tangent
from torch import Tensor
from torch._subclasses import FakeTensorMode

from manifold_nets import Partition, SphereProduct, errors, layers

# ---- refusals and reasons ------------------------------------------------------------------------------------------


def test_checks_name_the_group_and_the_norm() -> None:
    sphere = SphereProduct(Partition.transposed_filters((2, 3, 2)), radius=[1.0, 2.0, 3.0])
    x = point(sphere)
    off = torch.where(sphere.partition.group_ids() == 1, 1.5 * x, x)
    ok, reason = sphere.check_point_on_manifold(off, explain=True)
    assert not ok
    assert "group 1 of `x` has norm 3 instead of 2 (1 of 3 groups are off)" in reason
    ok, reason = sphere.check_vector_on_tangent(x, torch.where(sphere.partition.group_ids() == 2, x, 0.0), explain=True)
    assert not ok
    assert "group 2 of `u` has a radial part of 1 radians" in reason
    off[0, 0, 0] = math.nan
    assert not sphere.check_point_on_manifold(off)
    assert not sphere.check_vector_on_tangent(x, off * math.nan, ok_point=True)
    ok, reason = sphere.check_point(torch.ones(2, 3), explain=True)
    assert not ok
    assert "(2, 3)" in reason
    assert "(2, 3, 2)" in reason
    with pytest.raises(ValueError, match="shape"):
        sphere.random(3, 2, 2)


@pytest.mark.parametrize("radius", [1.0, 1 / 3, 7.7, 1e-30, 1e30])
@pytest.mark.parametrize("deviation", [0.5, 1e-3, 6e-8, 2e-12, 4e-15])
def test_the_numbers_of_a_point_that_has_left_tell_norm_and_radius_apart(radius: float, deviation: float) -> None:
    said = str(errors.OffManifoldError("weight", 1, radius * (1 + deviation), radius, "Project it."))
    number = r"([0-9.e+-]+?)"
    found = re.fullmatch(
        rf"weight: group 1 has norm {number}, off by {number} of the radius, but its sphere has radius {number}\. "
        "Project it.", said
    )  # fmt: skip
    assert found is not None, said
    norm, off, expected = map(float, found.groups())
    assert norm != expected
    assert norm / expected - 1 == pytest.approx(deviation, rel=0.1, abs=4e-16)
    assert off == pytest.approx(deviation, rel=0.1)
    # Sabotage: the eight digits that are enough for float32.
    if deviation < 1e-9:
        assert f"{radius * (1 + deviation):.8g}" == f"{radius:.8g}"


CALLS = {
    "projx": lambda s, x, u: s.projx(u),
    "proju": lambda s, x, u: s.proju(x, u),
    "egrad2rgrad": lambda s, x, u: s.egrad2rgrad(x, u),
    "group_inner": lambda s, x, u: s.group_inner(x, u),
    "component_inner": lambda s, x, u: s.component_inner(x, u),
    "inner": lambda s, x, u: s.inner(x, x, u),
    "norm": lambda s, x, u: s.norm(x, u),
    "retr": lambda s, x, u: s.retr(x, u),
    "expmap": lambda s, x, u: s.expmap(x, u),
    "logmap": lambda s, x, u: s.logmap(x, u),
    "dist": lambda s, x, u: s.dist(x, u),
    "dist2": lambda s, x, u: s.dist2(u, x),
    "component_dist": lambda s, x, u: s.component_dist(x, u),
    "transp": lambda s, x, u: s.transp(x, x, u),
    "deviations": lambda s, x, u: s.deviations(u),
    "refuse_degenerate": lambda s, x, u: s.refuse_degenerate(u, "weight"),
    "require_point": lambda s, x, u: s.require_point(u, "weight", rtol=1.0, remedy=""),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_shape_of_as_many_entries_is_refused(name: str) -> None:
    sphere = SphereProduct((3, 4))
    x = point(sphere)
    CALLS[name](sphere, x, x)
    for shape in ((4, 3), (2, 6), (12,), (1, 3, 4), (5, 3, 4)):
        found = rf"found a tensor of shape {re.escape(str(shape))} for 3 filters of 4; expected .* shape \(3, 4\)"
        with pytest.raises(errors.PartitionError, match=found):
            CALLS[name](sphere, x, torch.ones(shape, dtype=x.dtype))


def test_without_the_check_a_transposed_point_is_cut_into_other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: shapes go unseen, and the filters of the result have norms of their own."""
    monkeypatch.setattr(SphereProduct, "require_shape", lambda self, *tensors: None)
    found = SphereProduct((3, 4)).projx(noise((4, 3)))
    assert found.shape == (4, 3)
    assert not torch.allclose(found.norm(dim=1), torch.ones(4, dtype=found.dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_what_is_no_real_number_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(errors.PartitionError, match=rf"found a tensor of {re.escape(str(dtype))}; expected a real"):
        SphereProduct((3, 4)).projx(torch.ones(3, 4, dtype=dtype))
    with pytest.raises(errors.PartitionError, match=r"found a tensor of torch\.complex64; expected a real"):
        layers.UnitNormLinear(3, 4, dtype=torch.complex64)


def test_a_point_that_has_left_is_refused_by_name() -> None:
    sphere = SphereProduct((3, 4), radius=2.0)
    x = point(sphere)
    sphere.require_point(x, "conv.weight", rtol=4 * eps(torch.float64), remedy="")
    x[1] *= 1.25
    with pytest.raises(errors.OffManifoldError, match=r"conv\.weight: group 1 has norm 2\.5, .* radius 2\. Project it"):
        sphere.require_point(x, "conv.weight", rtol=0.2, remedy="Project it.")
    x[2, 0] = math.nan
    with pytest.raises(errors.OffManifoldError, match="group 2 has norm nan"):
        sphere.require_point(x, "conv.weight", rtol=1.0, remedy="")
    with pytest.raises(errors.DegenerateGroupError, match=r"conv\.weight: group 2 with norm nan"):
        sphere.refuse_degenerate(x, "conv.weight")


@pytest.mark.parametrize(
    ("radius", "words"),
    [
        ([1.0, 2.0], "found 2 radii; expected one radius, or one for each of 3 groups"),
        (0.0, "radius 0.0 for group 0"),
        ([1.0, -1.0, 1.0], "radius -1.0 for group 1"),
        ([1.0, 1.0, math.nan], "radius nan for group 2"),
        (math.inf, "radius inf"),
    ],
)
def test_radii_that_are_none_are_refused(radius: float | list[float], words: str) -> None:
    with pytest.raises(errors.PartitionError) as caught:
        SphereProduct((3, 4), radius=radius)
    assert words in str(caught.value)


def test_a_partition_says_all_about_the_view() -> None:
    with pytest.raises(errors.PartitionError, match="expected only one of them"):
        SphereProduct(Partition.filters((3, 4)), view=(4, 3))
    assert SphereProduct((4, 6), view=(2, 2, 6), kept=(0,)).partition == Partition.blocks((4, 6), 2)


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_random_points_are_uniform() -> None:
    torch.manual_seed(0)
    n = 4000
    sphere = SphereProduct((n, 3), radius=2.0)
    unit = sphere.random_uniform(dtype=torch.float64).as_subclass(Tensor) / 2
    deviation = 6 / math.sqrt(n)  # six standard deviations: those of u, u uᵀ and |u| are all below 1
    assert float(unit.mean(0).abs().max()) < deviation
    assert float((unit.T @ unit / n - torch.eye(3) / 3).abs().max()) < deviation
    # Archimedes: each coordinate of a uniform point of the sphere is uniform on [−1, 1], so E|u| = 1/2, E u⁴ = 1/5.
    assert float((unit.abs().mean(0) - 1 / 2).abs().max()) < deviation
    assert float((unit.pow(4).mean(0) - 1 / 5).abs().max()) < deviation
    cube = torch.rand(n, 3, dtype=torch.float64) * 2 - 1
    assert float(((cube / cube.norm(dim=1, keepdim=True)).pow(4).mean(0) - 1 / 5).abs().max()) > deviation / 6


def test_sampling_follows_the_generator_and_origin_does_not() -> None:
    sphere = spheres("blocks", "one a group")
    torch.manual_seed(3)
    first = sphere.random()
    assert isinstance(first, geoopt.ManifoldTensor)
    assert first.manifold is sphere
    torch.manual_seed(3)
    assert torch.equal(sphere.random_uniform(), first)
    state = torch.get_rng_state()
    assert torch.equal(sphere.origin(seed=1), sphere.origin(seed=2))
    assert torch.equal(state, torch.get_rng_state())


# ---- life as an object ---------------------------------------------------------------------------------------------


@every_sphere
def test_copies_pickles_and_json_are_the_same_manifold(partition: str, radius: str) -> None:
    sphere = spheres(partition, radius)
    x, u = point(sphere), noise(sphere.partition.shape)
    expected = sphere.egrad2rgrad(x, u)
    for other in (
        copy.deepcopy(sphere),
        pickle.loads(pickle.dumps(sphere)),
        SphereProduct.from_dict(sphere.to_dict()),
        SphereProduct(sphere.partition, radius=sphere.radii),
        copy.deepcopy(sphere).half(),
    ):
        assert other.to_dict() == sphere.to_dict()
        assert repr(other) == repr(sphere)
        assert torch.equal(other.egrad2rgrad(x, u), expected)
    several = radius == "one a group" and sphere.partition.n_groups > 1
    assert sphere.uniform_radius == (None if several else float(sphere.radii[0]))


@pytest.mark.parametrize("radius", RADII)
def test_meta_and_fake_tensors_and_inference_leave_nothing_behind(radius: str) -> None:
    partition = PARTITIONS["grouped transposed filters"]
    with torch.device("meta"):
        sphere = SphereProduct(partition, radius=radius_of(radius, partition))
        x = sphere.random()
        assert x.is_meta
        assert sphere.logmap(x, sphere.retr(x, sphere.egrad2rgrad(x, x))).is_meta
    with FakeTensorMode():
        fake = torch.ones(partition.shape)
        sphere.logmap(sphere.projx(fake), sphere.retr(fake, sphere.egrad2rgrad(fake, fake)))
    with torch.inference_mode():
        sphere.egrad2rgrad(point(sphere, torch.float32), torch.ones(partition.shape))
    x = point(sphere, torch.float32).requires_grad_()
    sphere.retr(x, sphere.egrad2rgrad(x, torch.ones(partition.shape))).sum().backward()
    assert x.grad is not None


def test_memory_format_is_kept_by_what_an_optimizer_calls() -> None:
    for partition in (Partition.filters((6, 4, 3, 3)), Partition.transposed_filters((6, 4, 3, 3), 2)):
        sphere = SphereProduct(partition, radius=0.5)
        x = point(sphere)
        u = tangent(sphere, x)
        strided = [t.to(memory_format=torch.channels_last) for t in (x, u)]
        for method in (sphere.retr, sphere.expmap, sphere.proju, sphere.egrad2rgrad, sphere.logmap):
            torch.testing.assert_close(method(*strided), method(x, u))
        for method in (sphere.retr, sphere.proju, sphere.egrad2rgrad):
            assert method(*strided).stride() == strided[0].stride()
