"""save and load: what is in the file, what comes back, and what save refuses."""

import copy
import re

import geoopt
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from helpers.checkpoint_cases import (
    DTYPES,
    architecture,
    check_same,
    check_untouched,
    constrained,
    put,
    snapshot,
    tied,
    with_buffer,
)
from hypothesis import HealthCheck, given, settings
from torch import nn

import manifold_nets as mn
from manifold_nets.constraints import attach
from manifold_nets.conversion.checkpoint import load, save
from manifold_nets.errors import CheckpointError, CheckpointMismatchError, OffManifoldError


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("converted_first", [False, True])
def test_round_trip_gives_back_values_and_manifolds(tmp_path, dtype, converted_first):
    net = constrained(dtype)
    fresh = constrained(dtype, seed=5) if converted_first else architecture(dtype, seed=5)
    save(net, tmp_path / "net.safetensors")
    assert load(fresh, str(tmp_path / "net.safetensors")) is fresh
    check_same(net, fresh)
    x = torch.randn(3, 2, 6, 6).to(dtype)
    assert torch.equal(net.eval()(x), fresh.eval()(x))


def test_sabotage_a_changed_radius_bit_or_type_is_noticed():
    net = constrained()
    radius = net[0].weight.manifold.radii
    radius[3] = torch.nextafter(radius[3], torch.tensor(1.0, dtype=torch.float64))
    for spoil in (
        lambda m: attach(m[0], "weight", mn.SphereProduct((6, 2, 3, 3), radius=radius)),
        lambda m: m[1].running_var.copy_(torch.nextafter(m[1].running_var, torch.tensor(9.0))),
        lambda m: setattr(m[3], "weight", geoopt.ManifoldParameter(m[3].weight.detach())),
    ):
        spoiled = copy.deepcopy(net)
        check_same(net, spoiled)
        spoil(spoiled)
        with pytest.raises(AssertionError):
            check_same(net, spoiled)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(radii=st.lists(st.floats(1e-30, 1e30), min_size=4, max_size=4), dtype=st.sampled_from(DTYPES[:2]))
def test_radii_are_exact(tmp_path, radii, dtype):
    sphere = mn.SphereProduct((4, 3), radius=radii)
    layer = put(nn.Linear(3, 4).to(dtype), "weight", sphere)
    save(layer, tmp_path / "layer.safetensors")
    loaded = load(nn.Linear(3, 4).to(dtype), tmp_path / "layer.safetensors")
    assert loaded.weight.manifold.radii.tolist() == radii


def test_file_is_plain_safetensors_in_equal_bytes(tmp_path):
    net = constrained()
    save(net, tmp_path / "a.safetensors")
    save(copy.deepcopy(net), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    plain = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert plain.keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in plain.items())


def test_loading_keeps_parameter_objects_on_the_same_manifold(tmp_path):
    net, fresh = constrained(), constrained(seed=4)
    save(net, tmp_path / "net.safetensors")
    before = [id(p) for p in fresh.parameters()]
    load(fresh, tmp_path / "net.safetensors")
    assert [id(p) for p in fresh.parameters()] == before


def test_manifolds_of_the_file_replace_those_of_the_model(tmp_path):
    net = put(architecture(), "0.weight", mn.SphereProduct((6, 2, 3, 3)))
    fresh = put(architecture(seed=2), "0.weight", mn.SphereProduct((6, 2, 3, 3), radius=2.0))
    put(fresh, "5.weight", mn.SphereProduct((5, 144)))
    save(net, tmp_path / "net.safetensors")
    load(fresh, tmp_path / "net.safetensors")
    check_same(net, fresh)
    assert type(fresh[5].weight) is nn.Parameter


def test_a_constraint_whose_parameter_was_replaced_is_saved_and_restored(tmp_path):
    net = constrained()
    net.load_state_dict(net.state_dict(), assign=True)
    assert type(net[0].weight) is nn.Parameter
    save(net, tmp_path / "net.safetensors")
    fresh = load(constrained(seed=3), tmp_path / "net.safetensors")
    check_same(constrained(), fresh)
    load(net, tmp_path / "net.safetensors")
    check_same(fresh, net)


# ---- tied tensors and memory formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("converted_first", [False, True])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path, converted_first):
    net = put(tied(), "b.weight", mn.SphereProduct((4, 4)))
    net["a"].weight = net["c"].weight = net["b"].weight
    save(net, tmp_path / "net.safetensors")
    assert sorted(safetensors.torch.load_file(tmp_path / "net.safetensors")) == [
        "a.bias",
        "b.bias",
        "b.weight",
        "c.bias",
    ]
    fresh = tied(seed=1)
    if converted_first:
        put(fresh, "a.weight", mn.SphereProduct((4, 4), radius=5.0))
        fresh["b"].weight = fresh["c"].weight = fresh["a"].weight
    load(fresh, tmp_path / "net.safetensors")
    check_same(net, fresh)
    assert fresh["a"].weight is fresh["b"].weight is fresh["c"].weight


def test_ties_do_not_depend_on_the_order_of_the_modules(tmp_path):
    net = tied()
    save(net, tmp_path / "net.safetensors")
    other = tied(seed=1)
    reordered = nn.ModuleDict({name: other[name] for name in ("c", "a", "b")})
    load(reordered, tmp_path / "net.safetensors")
    assert torch.equal(reordered["a"].weight, net["b"].weight)


def test_ties_in_one_of_file_and_model_are_refused(tmp_path):
    untied = nn.ModuleDict({name: nn.Linear(4, 4) for name in "bac"})
    for net, fresh, where in ((tied(), untied, "in the file, but not"), (untied, tied(), "in the model, but not")):
        save(net, tmp_path / "net.safetensors")
        before = snapshot(fresh)
        with pytest.raises(CheckpointMismatchError, match=rf"a\.weight, b\.weight, c\.weight are one tensor {where}"):
            load(fresh, tmp_path / "net.safetensors")
        check_untouched(fresh, before)


def test_memory_formats_and_overlapping_tensors(tmp_path):
    net = constrained().to(memory_format=torch.channels_last)
    whole = torch.arange(12.0).reshape(3, 4)
    for name, view in {"whole": whole, "transposed": whole.T, "slice": whole[1:], "empty": torch.zeros(0, 3)}.items():
        net.register_buffer(name, view)
    save(net, tmp_path / "net.safetensors")
    fresh = architecture(seed=9).to(memory_format=torch.channels_last)
    for name, shape in {"whole": (3, 4), "transposed": (4, 3), "slice": (2, 4), "empty": (0, 3)}.items():
        fresh.register_buffer(name, torch.zeros(shape))
    load(fresh, tmp_path / "net.safetensors")
    check_same(net, fresh)
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)


# ---- what save refuses ----------------------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"note": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (nn.LazyLinear(2), "weight is a lazy parameter"),
        (WithExtraState(2, 2), "_extra_state is a dict"),
        (with_buffer(torch.zeros(2, dtype=torch.complex128)), "extra is of torch.complex128"),
        (with_buffer(torch.eye(2).to_sparse()), "extra is a torch.sparse_coo tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_save_refuses_by_name_and_writes_nothing(tmp_path, net, name):
    with pytest.raises(CheckpointError, match=name):
        save(net, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_refuses_a_weight_off_its_sphere_and_accepts_rounding(tmp_path, dtype):
    net = constrained(dtype)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        net[0].weight[3] *= 1 + 2 * eps
    save(net, tmp_path / "net.safetensors")
    good = (tmp_path / "net.safetensors").read_bytes()
    with torch.no_grad():
        net[0].weight[3] *= 1 + 30 * eps
    message = r"0\.weight: group 3 has norm .* radius 0\.3333.*manifold_nets\.project\(model\)"
    with pytest.raises(OffManifoldError, match=message):
        save(net, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    # The remedy that the message names.
    mn.project(net)
    save(net, tmp_path / "net.safetensors")


def test_a_wider_dtype_shows_by_how_much_a_weight_is_off(tmp_path):
    net = constrained().double()
    with pytest.raises(OffManifoldError) as caught:
        save(net, tmp_path / "net.safetensors")
    numbers = r"has norm (\S+), off by (\S+) of the radius, but its sphere has radius (\S+)\. "
    norm, off, radius = map(float, re.search(numbers, str(caught.value)).groups())
    assert 0 < abs(norm / radius - 1) == pytest.approx(off, rel=0.1)
    assert off < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_save_refuses_a_group_without_a_direction(tmp_path, value):
    net = constrained()
    with torch.no_grad():
        net[0].weight[2] = value
    with pytest.raises(OffManifoldError, match=r"0\.weight: group 2"):
        save(net, tmp_path / "net.safetensors")


def test_half_precision_casts_of_small_radii_are_within_rounding(tmp_path):
    for radius in (1.0, 1e-3, 1e-5):
        layer = put(nn.Conv2d(64, 8, 3), "weight", mn.SphereProduct((8, 64, 3, 3), radius=radius)).half()
        save(layer, tmp_path / "layer.safetensors")
        loaded = load(nn.Conv2d(64, 8, 3).half(), tmp_path / "layer.safetensors")
        assert torch.equal(layer.weight, loaded.weight)


def test_save_into_a_missing_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        save(constrained(), tmp_path / "none" / "net.safetensors")


# ---- going on with training -----------------------------------------------------------------------------------------


def trainer(net):
    return mn.optim.RiemannianSGD(mn.param_groups(net, weight_decay=1e-2), lr=1e-3, momentum=0.9, nesterov=True)


def steps(net, optimizer, seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(4, 2, 6, 6, generator=generator).to(next(net.parameters()).dtype)
        net(x).float().square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load_first", [False, True])
def test_training_goes_on_bit_for_bit(tmp_path, dtype, load_first):
    net = constrained(dtype)
    optimizer = trainer(net)
    steps(net, optimizer, seed=1)
    save(net, tmp_path / "net.safetensors")
    # Into a plain architecture before the optimizer is made, or into a converted one under an optimizer.
    fresh = architecture(dtype, seed=3) if load_first else constrained(dtype, seed=3)
    if load_first:
        load(fresh, tmp_path / "net.safetensors")
    other = trainer(fresh)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    load(fresh, tmp_path / "net.safetensors")
    steps(net, optimizer, seed=2)
    steps(fresh, other, seed=2)
    check_same(net, fresh)
    save(fresh, tmp_path / "net.safetensors")


def test_sabotage_training_that_goes_on_without_its_momentum_is_noticed(tmp_path):
    net = constrained()
    optimizer = trainer(net)
    steps(net, optimizer, seed=1)
    save(net, tmp_path / "net.safetensors")
    fresh = load(architecture(), tmp_path / "net.safetensors")
    steps(net, optimizer, seed=2)
    steps(fresh, trainer(fresh), seed=2)
    with pytest.raises(AssertionError):
        check_same(net, fresh)


def test_a_layer_with_unit_norm_loads_into_its_plain_torch_layer(tmp_path):
    layer = mn.layers.UnitNormConvTranspose2d(4, 6, 3, groups=2)
    save(layer, tmp_path / "layer.safetensors")
    loaded = load(nn.ConvTranspose2d(4, 6, 3, groups=2), tmp_path / "layer.safetensors")
    assert torch.equal(loaded.weight, layer.weight)
    assert loaded.weight.manifold.to_dict() == layer.weight.manifold.to_dict()


def test_a_converted_model_comes_back_with_its_manifolds(tmp_path):
    net = mn.convert(architecture(), torch.randn(4, 2, 6, 6))
    save(net, tmp_path / "net.safetensors")
    check_same(net, load(architecture(seed=8), tmp_path / "net.safetensors"))
