"""param_groups, and what the optimizers accept as parameters."""

import math

import geoopt
import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.constraints import attach
from manifold_nets.errors import (
    DegenerateGroupError,
    EuclideanStepError,
    ManifoldNetsError,
    OffManifoldError,
    OptionError,
    ParameterGroupError,
    StepInputError,
)
from manifold_nets.optim import RiemannianAdam, RiemannianSGD

BOTH = pytest.mark.parametrize("kind", [RiemannianSGD, RiemannianAdam])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.planes = nn.LayerNorm((2, 2))
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2, bias=False)
        self.tied.weight = self.head.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.table_bias = nn.Parameter(torch.zeros(2, 2))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def constrained_network():
    torch.manual_seed(0)
    net = Network()
    sphere = mn.SphereProduct((4, 3, 3, 3), radius=2.0)
    attach(net.conv, "weight", sphere, sphere.projx(net.conv.weight.detach()))
    return net


def names(groups):
    return [group["param_names"] for group in groups]


def test_groups_are_constrained_decayed_undecayed():
    net = constrained_network()
    groups = mn.param_groups(net, weight_decay=0.01, sphere_lr=0.3)
    assert names(groups) == [
        ["conv.weight"],
        ["embedding.weight", "head.weight"],
        ["scale", "table_bias", "conv.bias", "norm.weight", "norm.bias", "planes.weight", "planes.bias", "head.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.01, 0.0]
    assert groups[0]["manifolds"] == [net.conv.weight.manifold]
    optimizer = RiemannianSGD(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.1]
    listed = {id(p) for group in groups for p in group["params"]}
    assert listed == {id(p) for p in net.parameters() if p.requires_grad}


def test_a_model_without_constraints_gives_groups_for_any_optimizer():
    net = Network()
    groups = mn.param_groups(net, weight_decay=0.01)
    assert names(groups)[0] == ["conv.weight", "embedding.weight", "head.weight"]
    assert all("manifolds" not in group for group in groups)
    state = torch.optim.AdamW(mn.param_groups(net)).state_dict()
    assert "manifolds" not in state["param_groups"][0]
    assert RiemannianAdam(groups).param_groups[0]["manifolds"] == [None] * 3
    assert mn.param_groups(nn.ReLU()) == []


def test_frozen_and_shared_constrained_weights():
    net = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(3)])
    sphere = mn.SphereProduct((3, 3))
    attach(net[1], "weight", sphere, sphere.projx(net[1].weight.detach()))
    net[0].weight = net[1].weight  # recorded on the second module, first met on the other
    attach(net[2], "weight", sphere, sphere.projx(net[2].weight.detach()))
    net[2].weight.requires_grad_(False)
    groups = mn.param_groups(net)
    assert names(groups) == [["0.weight"]]
    assert groups[0]["manifolds"] == [sphere]


def replace_by_assignment(net):
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)


def replace_by_meta(net):
    values = {key: value.clone() for key, value in net.state_dict().items()}
    net.to("meta").to_empty(device="cpu")
    net.load_state_dict(values)


@BOTH
@pytest.mark.parametrize("replace", [replace_by_assignment, replace_by_meta])
def test_replaced_parameters_stay_constrained(kind, replace):
    net = constrained_network()
    sphere = net.conv.weight.manifold
    replace(net)
    assert type(net.conv.weight) is nn.Parameter
    with pytest.raises(EuclideanStepError, match=r"Conv2d\.weight.*param_groups\(model\)"):
        kind(net.parameters(), lr=0.1)
    optimizer = kind(mn.param_groups(net), lr=0.1)
    before = net.conv.weight.detach().clone()
    for _ in range(3):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert sphere.check_point_on_manifold(net.conv.weight.detach())
    assert not torch.equal(net.conv.weight, before)


def on_sphere(sphere=None, **options):
    sphere = sphere or mn.SphereProduct((3, 4))
    return geoopt.ManifoldParameter(sphere.random(**options), manifold=sphere)


@BOTH
def test_named_parameters_single_tensors_and_generators(kind):
    weight, bias = on_sphere(), nn.Parameter(torch.zeros(3))
    for params in (
        [("w", weight), ("b", bias)],
        iter([weight, bias]),
        [{"params": (p for p in (weight, bias))}],
    ):
        optimizer = kind(params, lr=0.1)
        assert optimizer.param_groups[0]["manifolds"] == [weight.manifold, None]
    assert kind([{"params": weight}], lr=0.1).param_groups[0]["manifolds"] == [weight.manifold]
    optimizer = kind([("b", bias)], lr=0.1)
    optimizer.add_param_group({"params": [("w", weight)], "lr": 0.5})
    assert optimizer.param_groups[1]["manifolds"] == [weight.manifold]
    assert optimizer.param_groups[1]["param_names"] == ["w"]


@BOTH
def test_euclidean_manifolds_count_as_plain(kind):
    weight = geoopt.ManifoldParameter(torch.ones(3), manifold=geoopt.Euclidean())
    optimizer = kind([weight], lr=0.1)
    assert optimizer.param_groups[0]["manifolds"] == [None]


def off_its_spheres():
    weight = on_sphere()
    weight.data[1] *= 1.25
    return weight


def with_values(value):
    weight = on_sphere()
    weight.data[2] = value
    return weight


REFUSED = [
    ([geoopt.ManifoldParameter(torch.ones(3) / 3**0.5, manifold=geoopt.Sphere())], ParameterGroupError, "Sphere"),
    ([off_its_spheres()], OffManifoldError, r"parameter 0 of group 0 \(\(3, 4\)\): group 1 has norm 1\.2(5|4999)"),
    ([("layer.w", off_its_spheres())], OffManifoldError, r"layer.w: group 1 has norm 1\.2(5|4999)"),
    ([with_values(0.0)], DegenerateGroupError, "group 2 with norm 0"),
    ([with_values(math.nan)], DegenerateGroupError, "group 2 with norm nan"),
    ([with_values(math.inf)], DegenerateGroupError, "group 2 with norm inf"),
    ([{"params": [torch.zeros(2, requires_grad=True)], "manifolds": [None, None]}], ParameterGroupError, "2 manifolds"),
    (
        [{"params": [nn.Parameter(torch.ones(2, 4))], "manifolds": [mn.SphereProduct((3, 4))]}],
        ParameterGroupError,
        r"shape \(2, 4\); expected the manifold's, \(3, 4\)",
    ),
    (
        [{"params": [on_sphere()], "manifolds": [mn.SphereProduct((3, 4), radius=2.0)]}],
        ParameterGroupError,
        "radius 2.*parameter's own.*radius 1",
    ),
    (
        [{"params": [torch.ones(3, 4, dtype=torch.complex64)], "manifolds": [mn.SphereProduct((3, 4))]}],
        ParameterGroupError,
        "complex64",
    ),
]


@BOTH
@pytest.mark.parametrize(("params", "error", "message"), REFUSED)
def test_what_cannot_be_trained_on_spheres_is_refused_by_name(kind, params, error, message):
    with pytest.raises(error, match=message):
        kind(params, lr=0.1)


@BOTH
def test_a_refused_group_is_not_added(kind):
    optimizer = kind([on_sphere()], lr=0.1)
    with pytest.raises(ManifoldNetsError):
        optimizer.add_param_group({"params": [off_its_spheres()]})
    assert len(optimizer.param_groups) == 1


def test_differentiable_and_capturable_are_refused_on_spheres_alone():
    plain = nn.Parameter(torch.ones(2))
    for kind, option in (
        (RiemannianSGD, "differentiable"),
        (RiemannianAdam, "differentiable"),
        (RiemannianAdam, "capturable"),
    ):
        with pytest.raises(ParameterGroupError, match=f"{option}=True; expected {option}=False"):
            kind([on_sphere(), plain], lr=0.1, **{option: True})
        assert kind([plain], lr=0.1, **{option: True}).param_groups[0][option]


@BOTH
def test_sparse_gradients_on_spheres_are_refused_before_anything_moves(kind):
    weight, plain = on_sphere(), nn.Parameter(torch.ones(2))
    optimizer = kind([("plain", plain), ("table", weight)], lr=0.1)
    plain.grad, weight.grad = torch.ones(2), torch.ones(3, 4).to_sparse()
    before = weight.detach().clone()
    with pytest.raises(StepInputError, match=r"table: found a gradient of layout torch\.sparse_coo"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(plain, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_went_through_half_precision_are_accepted(dtype):
    sphere = mn.SphereProduct((3, 4))
    weight = geoopt.ManifoldParameter(on_sphere(sphere).detach().to(dtype).float(), manifold=sphere)
    optimizer = RiemannianSGD([weight], lr=0.1)
    weight.grad = torch.zeros(3, 4)
    optimizer.step()
    assert float(sphere.deviations(weight).max()) <= 4 * torch.finfo(torch.float32).eps


@BOTH
def test_meta_weights_are_accepted_unseen(kind):
    weight = nn.Parameter(torch.empty(3, 4, device="meta"))
    optimizer = kind([{"params": [weight], "manifolds": [mn.SphereProduct((3, 4))]}], lr=0.1)
    assert len(optimizer.param_groups[0]["manifolds"]) == 1


def test_only_optimizers_without_constraints_leave_unscaling_to_torchs_fused_step():
    plain = nn.Parameter(torch.ones(2))
    optimizer = RiemannianSGD([plain], lr=0.1, fused=True)
    assert optimizer._step_supports_amp_scaling
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "fused": False})
    assert not optimizer._step_supports_amp_scaling
    optimizer.param_groups.pop()
    assert optimizer._step_supports_amp_scaling
    optimizer.add_param_group({"params": [on_sphere()]})
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "fast"])
def test_rates_without_meaning_are_refused_by_name(rate):
    layer = mn.layers.UnitNormLinear(4, 3)
    for option in ("weight_decay", "sphere_lr"):
        with pytest.raises(OptionError, match=rf"^{option}: found .*; expected a finite number"):
            mn.param_groups(layer, **{option: rate})
    with pytest.raises(OptionError, match=r"^sphere_lr\['weight'\]: found"):
        mn.param_groups(layer, sphere_lr={"weight": rate})
    assert mn.param_groups(layer, sphere_lr=torch.tensor(0.1))[0]["lr"] == torch.tensor(0.1)
