"""Constraint records: what they find, what they survive, and what they refuse."""

import copy
import gc
import io
import pickle
from collections.abc import Callable

import geoopt
import pytest
import torch
from helpers.sphere_cases import eps
from torch import nn

from manifold_nets import SphereProduct, constraints, errors, layers, optim, restore
from manifold_nets.constraints import attach, constrained_weights, detach, lost_constraints
from manifold_nets.groups import filter_partition


def constrained() -> nn.Sequential:
    """Return a small network with two constrained weights, one of them with radii of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3), nn.Flatten())
    for index, radius in ((0, 1.0), (3, [0.5, 1.0, 1.5])):
        sphere = SphereProduct(filter_partition(model[index]), radius=radius)
        attach(model[index], "weight", sphere, sphere.projx(model[index].weight))
    return model


def found(model: nn.Module) -> dict[str, SphereProduct]:
    """Return what `constrained_weights` yields as a dictionary."""
    return {weight.name: weight.manifold for weight in constrained_weights(model)}


# ---- attach and detach ---------------------------------------------------------------------------------------------


def test_a_record_changes_neither_state_nor_forward_pass() -> None:
    model = constrained()
    plain = copy.deepcopy(model)
    for index in (0, 3):
        detach(plain[index], "weight")
    assert not found(plain)
    assert not any(isinstance(parameter, geoopt.ManifoldParameter) for parameter in plain.parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    inputs = torch.randn(2, 2, 6, 6)
    assert torch.equal(model(inputs), plain(inputs))
    assert [type(module) for module in model] == [type(module) for module in plain]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert vars(plain[0]).keys() == vars(nn.Conv2d(2, 4, 3)).keys()


def test_attach_takes_the_values_as_they_are() -> None:
    layer, sphere = nn.Linear(4, 3), SphereProduct((3, 4))
    layer.weight.requires_grad_(requires_grad=False)
    values = layer.weight.detach().clone()
    attach(layer, "weight", sphere)
    assert torch.equal(layer.weight, values)
    assert not layer.weight.requires_grad
    point = sphere.random_uniform()
    attach(layer, "weight", sphere, point)
    assert torch.equal(layer.weight, point)
    assert isinstance(layer.weight, geoopt.ManifoldParameter)
    assert layer.weight.manifold is sphere


def test_gradients_follow_a_weight_whose_values_stay() -> None:
    layer, sphere = nn.Linear(4, 3), SphereProduct((3, 4))
    layer(torch.ones(1, 4)).sum().backward()
    gradient = layer.weight.grad
    attach(layer, "weight", sphere)
    assert layer.weight.grad is gradient
    detach(layer, "weight")
    assert layer.weight.grad is gradient
    attach(layer, "weight", sphere, sphere.random())
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda layer: attach(layer, "weights", SphereProduct((3, 4))), ["Linear.weights", "weight, bias"]),
        (lambda layer: attach(layer, "weight", SphereProduct((4, 3))), ["Linear.weight", "(3, 4)", "(4, 3)"]),
        (lambda layer: attach(layer, "weight", SphereProduct((3, 4)), torch.ones(2, 4)), ["(2, 4)", "(3, 4)"]),
        (lambda layer: detach(layer, "kernel"), ["Linear.kernel", "weight, bias"]),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(act: Callable[[nn.Module], None], words: list[str]) -> None:
    layer = nn.Linear(4, 3)
    before = dict(vars(layer)), dict(layer._parameters)
    with pytest.raises(errors.ConstraintError) as caught:
        act(layer)
    assert all(word in str(caught.value) for word in words)
    assert (vars(layer), layer._parameters) == before


# ---- finding through the model -------------------------------------------------------------------------------------


def test_weights_are_found_once_in_the_order_of_the_parameters() -> None:
    model = nn.ModuleDict({"body": constrained(), "twin": constrained()})
    model["twin"][0].weight = model["body"][0].weight
    assert list(found(model)) == ["body.0.weight", "body.3.weight", "twin.3.weight"]
    assert found(model)["body.3.weight"].radii.tolist() == [0.5, 1.0, 1.5]
    weight = next(constrained_weights(model))
    assert weight.parameter is model["body"][0].weight
    assert (weight.module, weight.leaf) == (model["body"][0], "weight")


def test_parameters_put_on_spheres_by_hand_are_found() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = geoopt.ManifoldParameter(SphereProduct((3, 4), radius=2.0).random())
    assert found(layer)["weight"].uniform_radius == 2.0
    layer.bias = geoopt.ManifoldParameter(torch.ones(3), manifold=geoopt.Euclidean())
    assert list(found(layer)) == ["weight"]


def test_what_a_parameter_says_of_itself_goes_before_the_record() -> None:
    layer = layers.UnitNormLinear(4, 3)
    layer.weight = geoopt.ManifoldParameter(SphereProduct((3, 4), radius=2.0).random())
    assert found(layer)["weight"] is layer.weight.manifold
    layer.weight = geoopt.ManifoldParameter(layer.weight.detach(), manifold=geoopt.Sphere())
    assert not found(layer)


# ---- what happens to parameter objects -----------------------------------------------------------------------------


def assign(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def through_meta(model: nn.Module) -> nn.Module:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model = model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LOSING: dict[str, Callable[[nn.Module], nn.Module]] = {"assign": assign, "meta": through_meta}
KEEPING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "cast": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "averaged": lambda model: optim.AveragedModel(model).module,
    "compiled": lambda model: torch.compile(model, backend="eager")._orig_mod,
}


@pytest.mark.parametrize("way", KEEPING)
def test_copies_and_casts_keep_parameters_and_records(way: str) -> None:
    before = {name: manifold.to_dict() for name, manifold in found(constrained()).items()}
    model = KEEPING[way](constrained())
    assert {name: manifold.to_dict() for name, manifold in found(model).items()} == before
    for weight in constrained_weights(model):
        record = vars(weight.module)[constraints._RECORD]
        assert isinstance(weight.parameter, geoopt.ManifoldParameter)
        assert weight.parameter.manifold is record.manifolds["weight"]
        assert record.module() is weight.module
        weight.manifold.assert_check_point_on_manifold(weight.parameter, atol=0.0, rtol=4 * eps(torch.float32))
    assert restore(model) == []


@pytest.mark.parametrize("first", [None, *KEEPING])
@pytest.mark.parametrize("way", LOSING)
def test_lost_parameters_are_found_and_restored(way: str, first: str | None) -> None:
    model = constrained()
    if first is not None:
        model = KEEPING[first](model)
    names, values = list(found(model)), {name: value.clone() for name, value in model.state_dict().items()}
    assert lost_constraints(model.parameters()) == []
    model = LOSING[way](model)
    assert not any(isinstance(parameter, geoopt.ManifoldParameter) for parameter in model.parameters())
    assert list(found(model)) == names
    assert lost_constraints(model.parameters()) == ["Conv2d.weight", "ConvTranspose2d.weight"]
    assert restore(model) == names
    assert lost_constraints(model.parameters()) == []
    for weight in constrained_weights(model):
        assert weight.parameter.manifold is weight.manifold
        assert torch.equal(weight.parameter, values[weight.name])
    assert restore(model) == []


@pytest.mark.parametrize("way", LOSING)
def test_without_records_the_constraints_would_be_gone(way: str) -> None:
    model = constrained()
    for module in model.modules():
        vars(module).pop(constraints._RECORD, None)
    model = LOSING[way](model)
    assert not found(model)
    assert restore(model) == []


def test_restored_weights_stay_tied_and_keep_gradient_and_flag() -> None:
    first, second = layers.UnitNormLinear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    first.weight = second.weight = nn.Parameter(first.weight.detach(), requires_grad=True)
    model = nn.Sequential(first, second)
    model(torch.ones(1, 3)).sum().backward()
    gradient = first.weight.grad
    assert restore(model) == ["0.weight"]
    assert second.weight is first.weight
    assert isinstance(first.weight, geoopt.ManifoldParameter)
    assert first.weight.grad is gradient
    first.weight = nn.Parameter(first.weight.detach(), requires_grad=False)
    restore(model)
    assert not first.weight.requires_grad


def test_restore_refuses_another_shape_and_touches_nothing() -> None:
    model = nn.Sequential(layers.UnitNormLinear(4, 3), layers.UnitNormLinear(3, 2))
    for layer, shape in zip(model, ((3, 4), (5, 3)), strict=True):
        layer.weight = nn.Parameter(torch.ones(shape))
    before = list(model.parameters())
    with pytest.raises(errors.ConstraintError, match=r"1\.weight: found shape \(5, 3\); expected .* \(2, 3\)"):
        restore(model)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_plain_parameters_and_vanished_modules_are_not_lost() -> None:
    plain = nn.Linear(4, 3)
    model = assign(constrained())
    survivors = list(model.parameters())
    assert lost_constraints(plain.parameters()) == []
    assert lost_constraints(survivors)
    del model
    gc.collect()
    assert lost_constraints(survivors) == []


def test_restored_weights_keep_their_places_in_a_deep_model() -> None:
    """Objects that are freed on the way lend their identity to new ones, which must not be taken for them."""
    model = assign(nn.Sequential(*(layers.UnitNormLinear(3, 3, bias=False) for _ in range(40))))
    values = [layer.weight.detach().clone() for layer in model]
    assert len(restore(model)) == 40
    assert all(torch.equal(layer.weight, value) for layer, value in zip(model, values, strict=True))
    assert len({id(layer.weight) for layer in model}) == 40
