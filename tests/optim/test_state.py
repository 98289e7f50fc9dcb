"""States of the optimizers: saved, loaded, copied, pickled; training goes on bit for bit."""

import copy
import io
import json
import pickle

import geoopt
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import manifold_nets as mn
from manifold_nets.constraints import attach
from manifold_nets.errors import OptimizerStateError
from manifold_nets.optim import AngularAdam, RiemannianAdam, RiemannianSGD
from manifold_nets.optim.backends import native

KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RiemannianSGD, {"lr": 0.05, "momentum": 0.9}),
        (RiemannianAdam, {"lr": 0.05}),
        (RiemannianAdam, {"lr": 0.05, "amsgrad": True, "fused": True}),
    ],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def two_spheres(dtype=torch.float32, radius=2.5, seed=0):
    """A convolution on spheres of one radius each, a transposed one on unit spheres, and plain parameters."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)).to(dtype)
    radii = torch.linspace(0.5, radius, 4)
    for layer, manifold in (
        (net[0], mn.SphereProduct((4, 2, 3, 3), radius=radii)),
        (net[1], mn.SphereProduct(mn.Partition.transposed_filters((4, 3, 3, 3), groups=2))),
    ):
        attach(layer, "weight", manifold, manifold.projx(layer.weight.detach()))
    return net


def train(net, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_same_bits(net, other):
    for (name, value), expected in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), f"{name} differs"


def check_resumed(net, optimizer, kind, options):
    """Train, and go on from a saved state as without a break; return the network and optimizer that were loaded."""
    train(net, optimizer, 5, seed=1)
    resumed = copy.deepcopy(net)
    loaded = kind(mn.param_groups(resumed), **options)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for a, b in ((net, optimizer), (resumed, loaded)):
        train(a, b, 5, seed=2)
    check_same_bits(net, resumed)
    return resumed, loaded


@KINDS
@DTYPES
def test_training_goes_on_bit_for_bit_after_a_round_trip(kind, options, dtype):
    net = two_spheres(dtype)
    optimizer = kind(mn.param_groups(net, weight_decay=0.01), **options)
    resumed, loaded = check_resumed(net, optimizer, kind, options)
    assert [g["manifolds"] for g in loaded.param_groups] == [
        [w.manifold for w in mn.constraints.constrained_weights(resumed)],
        [None] * 4,
    ]


def test_a_state_cast_by_torch_would_not_go_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr(mn.optim.base, "keep_precision", lambda *_: None)
    with pytest.raises((AssertionError, RuntimeError), match=r"weight differs|dtype"):
        test_training_goes_on_bit_for_bit_after_a_round_trip(RiemannianAdam, {"lr": 0.05}, torch.bfloat16)


@KINDS
def test_a_state_dict_is_plain_data_and_keeps_the_live_manifolds(kind, options):
    net = two_spheres()
    optimizer = kind(mn.param_groups(net), **options)
    train(net, optimizer, 1, seed=1)
    groups = optimizer.state_dict()["param_groups"]
    assert json.loads(json.dumps(groups)) == json.loads(json.dumps(groups, default=str))
    assert mn.SphereProduct.from_dict(groups[0]["manifolds"][0]).to_dict() == net[0].weight.manifold.to_dict()
    assert groups[0]["param_names"] == ["0.weight", "1.weight"]
    assert optimizer.param_groups[0]["manifolds"] == [net[0].weight.manifold, net[1].weight.manifold]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_are_one_value_a_sphere_in_float32(dtype):
    net = two_spheres(dtype)
    optimizer = RiemannianAdam(mn.param_groups(net), lr=0.1, amsgrad=True)
    train(net, optimizer, 1, seed=1)
    state = optimizer.state[net[1].weight]
    assert {key: (tuple(v.shape), v.dtype) for key, v in state.items()} == {
        "step": ((), torch.float32),
        "exp_avg": ((4, 3, 3, 3), dtype),
        "exp_avg_sq": ((2, 1, 3, 1, 1), torch.float32),
        "max_exp_avg_sq": ((2, 1, 3, 1, 1), torch.float32),
    }
    assert optimizer.state[net[0].weight]["exp_avg_sq"].shape == (4, 1, 1, 1)


@KINDS
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_bit_for_bit(kind, options, how):
    net = two_spheres()
    optimizer = kind(mn.param_groups(net), **options)
    train(net, optimizer, 3, seed=1)
    other, copied = how((net, optimizer))
    for a, b in ((net, optimizer), (other, copied)):
        train(a, b, 3, seed=2)
    check_same_bits(net, other)
    assert copied.param_groups[0]["manifolds"][0] is other[0].weight.manifold
    assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_loaded_states_share_no_memory_with_their_source():
    net = two_spheres()
    optimizer = RiemannianAdam(mn.param_groups(net), lr=0.1)
    train(net, optimizer, 2, seed=1)
    other = two_spheres()
    loaded = RiemannianAdam(mn.param_groups(other), lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())
    before = {key: value.clone() for key, value in optimizer.state[net[0].weight].items()}
    train(other, loaded, 2, seed=2)
    assert all(torch.equal(optimizer.state[net[0].weight][key], value) for key, value in before.items())


def snapshot(optimizer):
    return copy.deepcopy((optimizer.state_dict(), [id(m) for g in optimizer.param_groups for m in g["manifolds"]]))


def check_refused(optimizer, state, message):
    before, manifolds = snapshot(optimizer)
    with pytest.raises(OptimizerStateError, match=message):
        optimizer.load_state_dict(state)
    after, same = snapshot(optimizer)
    assert same == manifolds
    assert str(after) == str(before)


def stepped(kind, **options):
    net = two_spheres()
    optimizer = kind(mn.param_groups(net), lr=0.1, **options)
    train(net, optimizer, 1, seed=1)
    return optimizer


@pytest.mark.parametrize(
    ("live", "saved", "message"),
    [
        ((RiemannianSGD, {"momentum": 0.9}), (RiemannianAdam, {}), "group 0: found no option momentum"),
        ((RiemannianAdam, {}), (RiemannianSGD, {"momentum": 0.9}), "group 0: found no option betas"),
        ((AngularAdam, {}), (RiemannianAdam, {}), "found only .*exp_avg_sq; expected the state of AngularAdam"),
        ((RiemannianAdam, {}), (AngularAdam, {}), "found only .*entry_sq; expected the state of RiemannianAdam"),
    ],
)
def test_states_of_other_kinds_are_refused_and_nothing_changes(live, saved, message):
    optimizer = stepped(live[0], **live[1])
    check_refused(optimizer, stepped(saved[0], **saved[1]).state_dict(), message)


@KINDS
def test_a_state_for_other_spheres_is_refused_and_nothing_changes(kind, options):
    net, other = two_spheres(), two_spheres(radius=7.0)
    optimizer, source = (kind(mn.param_groups(n), **options) for n in (net, other))
    train(net, optimizer, 1, seed=1)
    train(other, source, 1, seed=1)
    check_refused(optimizer, source.state_dict(), r"state of 0.weight: found .*radii 0.5…7.*expected .*radii 0.5…2.5")
    plain = kind([{"params": [nn.Parameter(torch.ones(4, 2, 3, 3)), nn.Parameter(torch.ones(4, 3, 3, 3))]}], **options)
    unnamed = kind([net[0].weight, net[1].weight], **options)
    check_refused(unnamed, plain.state_dict(), r"parameter 0 of group 0 \(\(4, 2, 3, 3\)\): found no manifold")
    check_refused(plain, unnamed.state_dict(), "expected no manifold")


def test_a_euclidean_second_moment_is_refused():
    net = two_spheres()
    optimizer = RiemannianAdam([net[0].weight], lr=0.1)
    source = torch.optim.Adam([nn.Parameter(torch.ones(4, 2, 3, 3))], lr=0.1)
    source.param_groups[0]["params"][0].grad = torch.ones(4, 2, 3, 3)
    source.step()
    check_refused(optimizer, source.state_dict(), r"exp_avg_sq of shape \(4, 2, 3, 3\); expected shape \(4, 1, 1, 1\)")


def test_momentum_of_torch_can_be_taken_over():
    net = two_spheres()
    optimizer = RiemannianSGD([net[0].weight], lr=0.1, momentum=0.9)
    source = torch.optim.SGD([nn.Parameter(torch.ones(4, 2, 3, 3))], lr=0.1, momentum=0.9)
    source.param_groups[0]["params"][0].grad = torch.ones(4, 2, 3, 3)
    source.step()
    optimizer.load_state_dict(source.state_dict())
    train(net, optimizer, 1, seed=1)
    assert net[0].weight.manifold.check_point_on_manifold(net[0].weight)
    assert optimizer.param_groups[0]["manifolds"] == [net[0].weight.manifold]


def test_another_number_of_parameters_is_refused():
    net = two_spheres()
    optimizer = RiemannianSGD(mn.param_groups(net), lr=0.1)
    message = r"parameter groups: found 1 group of 1 parameters; expected 2 groups of 2, 4 parameters"
    check_refused(optimizer, RiemannianSGD([net[0].weight], lr=0.1).state_dict(), message)


@KINDS
def test_the_state_of_a_plain_optimizer_is_refused_and_its_moments_can_be_carried_over(kind, options):
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    torchs = torch.optim.SGD if "momentum" in options else torch.optim.Adam
    own = torchs(plain.parameters(), **{key: value for key, value in options.items() if key in ("lr", "momentum")})
    plain(x).square().mean().backward()
    own.step()
    model = mn.convert(plain, x)
    optimizer = kind(mn.param_groups(model), **options)
    state = own.state_dict()
    check_refused(optimizer, state, r"found 1 group of 6 parameters; .*manifold_nets\.optim\.carry_momentum\(plain")
    # The remedy of the message.
    theirs = torchs(plain.parameters(), **{key: value for key, value in options.items() if key in ("lr", "momentum")})
    theirs.load_state_dict(state)
    mn.optim.carry_momentum(plain, theirs, model, optimizer)
    assert set(optimizer.state[model[0].weight]) >= set(optimizer._moments)


def in_another_order(groups):
    """The same groups, last one first, and their parameters likewise."""
    lists = ("params", "param_names", "manifolds")
    return [{key: value[::-1] if key in lists else value for key, value in g.items()} for g in groups[::-1]]


def check_matched_by_name(kind, options):
    net = two_spheres()
    optimizer = kind(mn.param_groups(net, weight_decay=0.01), **options)
    train(net, optimizer, 3, seed=1)
    resumed = copy.deepcopy(net)
    loaded = kind(in_another_order(mn.param_groups(resumed, weight_decay=0.01)), **options)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    names = dict(resumed.named_parameters())
    for group in loaded.param_groups:
        assert all(names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    for (name, p), old in zip(resumed.named_parameters(), net.parameters(), strict=True):
        for key, value in optimizer.state[old].items():
            assert torch.equal(torch.as_tensor(loaded.state[p][key]), torch.as_tensor(value)), f"{key} of {name}"
    for a, b in ((net, optimizer), (resumed, loaded)):
        train(a, b, 3, seed=2)
    check_same_bits(net, resumed)


@KINDS
def test_states_go_to_the_weights_of_the_same_name(kind, options):
    check_matched_by_name(kind, options)


@KINDS
def test_states_matched_by_order_would_go_to_other_weights(kind, options, monkeypatch):
    """Sabotage: as torch matches them."""
    monkeypatch.setattr(mn.optim.base, "ordered_by_name", lambda _, state: state)
    with pytest.raises((AssertionError, OptimizerStateError, ValueError)):
        check_matched_by_name(kind, options)


def test_wrappers_do_not_change_the_names():
    net = two_spheres()
    optimizer = RiemannianSGD(mn.param_groups(net), lr=0.1, momentum=0.9)
    train(net, optimizer, 1, seed=1)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["param_names"] = [f"module._orig_mod.{name}" for name in group["param_names"]]
    loaded = RiemannianSGD(in_another_order(mn.param_groups(net)), lr=0.1, momentum=0.9)
    loaded.load_state_dict(state)
    assert torch.equal(*(o.state[net[0].weight]["momentum_buffer"] for o in (optimizer, loaded)))


def test_other_names_and_other_groups_are_refused():
    net = two_spheres()
    optimizer = RiemannianSGD(mn.param_groups(net), lr=0.1, momentum=0.9)
    train(net, optimizer, 1, seed=1)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["param_names"][1] = "5.weight"
    check_refused(optimizer, state, r"state of 1\.weight: found 5\.weight, which this optimizer does not have")
    state = copy.deepcopy(optimizer.state_dict())
    first, second = (state["param_groups"][k] for k in (0, 1))
    for key in ("params", "param_names", "manifolds"):
        first[key][0], second[key][0] = second[key][0], first[key][0]
    check_refused(optimizer, state, r"state of group 0: found 0\.weight in a group of")


def test_the_users_own_hooks_see_plain_data_and_decide_what_is_loaded():
    net = two_spheres()
    optimizer = RiemannianSGD(mn.param_groups(net), lr=0.1, momentum=0.9)
    train(net, optimizer, 1, seed=1)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state["param_groups"][0]["manifolds"][1]))
    state = optimizer.state_dict()
    assert seen == [net[1].weight.manifold.to_dict()]
    foreign = copy.deepcopy(state)
    foreign["param_groups"][0]["manifolds"][1]["radius"] = [9.0]
    optimizer.register_load_state_dict_pre_hook(lambda *_: state)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["manifolds"][1]))
    optimizer.load_state_dict(foreign)
    assert seen[1] is net[1].weight.manifold


@KINDS
@pytest.mark.parametrize("flatten", [False, True])
def test_states_pass_through_torchs_distributed_checkpoints(kind, options, flatten):
    choice = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net = two_spheres()
    optimizer = kind(mn.param_groups(net), **options)
    train(net, optimizer, 3, seed=1)
    saved = through_a_file(copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=choice)))
    resumed = copy.deepcopy(net)
    for parameter in resumed.parameters():
        parameter.grad = None
    loaded = kind(mn.param_groups(resumed), **options)
    before = copy.deepcopy(resumed)
    set_optimizer_state_dict(resumed, loaded, saved, options=choice)
    check_same_bits(resumed, before)  # torch makes it take a step of learning rate 0 on the way
    for a, b in ((net, optimizer), (resumed, loaded)):
        train(a, b, 3, seed=2)
    check_same_bits(net, resumed)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled_on_spheres(fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sphere = mn.SphereProduct((3, 4))
    start, gradient = sphere.random().as_subclass(torch.Tensor), torch.randn(3, 4)
    weights = []
    for scale in (1.0, 2.0**10):
        weight = geoopt.ManifoldParameter(start.clone(), manifold=sphere)
        bias = nn.Parameter(torch.zeros(3))
        optimizer = RiemannianSGD([weight, bias], lr=0.1, fused=fused)
        weight.grad, bias.grad = gradient * scale, torch.ones(3) * scale
        if scale == 1.0:
            optimizer.step()
        else:
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
        weights.append((weight.detach(), bias.detach()))
    assert torch.equal(weights[0][0], weights[1][0])
    assert torch.equal(weights[0][1], weights[1][1])


def test_an_infinite_scaled_gradient_skips_the_step():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sphere = mn.SphereProduct((3, 4))
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    before = weight.detach().clone()
    optimizer = RiemannianAdam([weight], lr=0.1, fused=True)
    weight.grad = torch.full((3, 4), torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(weight, before)


def half_network(master_weights, kind=RiemannianSGD, dtype=torch.bfloat16, lr=1e-3):
    net = two_spheres(dtype)
    return net, kind(mn.param_groups(net), lr=lr, master_weights=master_weights)


@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_master_weights_gather_steps_that_half_precision_loses(dtype, lr):
    exact = two_spheres(dtype).float()
    reference = RiemannianSGD(mn.param_groups(exact), lr=lr)
    gaps = {}
    train(exact, reference, 200, seed=1)
    for master in (False, True):
        net, optimizer = half_network(master, dtype=dtype, lr=lr)
        train(net, optimizer, 200, seed=1)
        gap = net[0].weight.detach().float() - exact[0].weight.detach()
        gaps[master] = float(gap.norm() / exact[0].weight.detach().norm())
        assert ("master_weight" in optimizer.state[net[0].weight]) == master
    # The gradients are rounded to half precision as well, and so is the outcome.
    assert gaps[True] <= 4 * torch.finfo(dtype).eps
    assert gaps[True] < gaps[False] / 2


@pytest.mark.parametrize("kind", [RiemannianSGD, RiemannianAdam])
def test_master_weights_are_saved_and_go_on_bit_for_bit(kind):
    net, optimizer = half_network(True, kind)
    train(net, optimizer, 5, seed=1)
    resumed = copy.deepcopy(net)
    loaded = kind(mn.param_groups(resumed), lr=1e-3, master_weights=True)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert loaded.state[resumed[0].weight]["master_weight"].dtype == torch.float32
    for a, b in ((net, optimizer), (resumed, loaded)):
        train(a, b, 5, seed=2)
    check_same_bits(net, resumed)
    masters = [o.state[n[0].weight]["master_weight"] for n, o in ((net, optimizer), (resumed, loaded))]
    assert torch.equal(*masters)


@pytest.mark.parametrize("through", ["load_state_dict", "data"])
def test_a_weight_that_was_changed_by_hand_goes_before_its_master(through):
    net, optimizer = half_network(True)
    train(net, optimizer, 2, seed=1)
    other = two_spheres(torch.bfloat16, seed=5)
    if through == "data":  # which changes no version
        for old, new in zip(net.parameters(), other.parameters(), strict=True):
            old.data.copy_(new.data)
    else:
        net.load_state_dict(other.state_dict())
    train(net, optimizer, 1, seed=2)
    fresh = RiemannianSGD(mn.param_groups(other), lr=1e-3, master_weights=True)
    train(other, fresh, 1, seed=2)
    check_same_bits(net, other)


@pytest.mark.parametrize(
    "how",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, pytest.param({"compile": True}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [RiemannianSGD, RiemannianAdam])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
def test_every_execution_is_resumed_bit_for_bit(kind, dtype, how):
    if "fused" in how and native.available() is not None:
        pytest.skip(native.available())
    options = {"lr": 1e-2, **how, **({"momentum": 0.9} if kind is RiemannianSGD else {})}
    net = two_spheres(dtype)
    optimizer = kind(mn.param_groups(net), **options)
    check_resumed(net, optimizer, kind, options)
