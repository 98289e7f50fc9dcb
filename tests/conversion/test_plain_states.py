"""States of the plain network, loaded into a converted model: they become what `convert` makes of that network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.conversion_cases import EVAL_LIMIT, conv_net, gated, images, other_net, randomized, residual
from helpers.toy_networks import Lambda
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel

import manifold_nets as mn
from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion import moves as moves_module
from manifold_nets.conversion import projection as loading
from manifold_nets.conversion.remedies.dead_biases import removed_biases
from manifold_nets.errors import DegenerateGroupError, OffManifoldError, ProjectionError
from manifold_nets.manifold import SphereProduct

LIMIT = EVAL_LIMIT[torch.float64]


def perturbed(net: nn.Module) -> nn.Module:
    torch.manual_seed(17)
    with torch.no_grad():
        for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
            tensor.mul_(0.5 + torch.rand_like(tensor))
    return net


def step_that_moves_nothing(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """A step of learning rate 1e-30 from a loss of the outputs in evaluation mode, which leave the buffers alone."""
    model.eval()
    model(x).square().mean().backward()
    optimizer.step()


def check_loaded(plain: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """The model computes what the plain one does, on its spheres, and does so after a step that moves nothing."""
    assert mn.verify(plain, model, x).eval_difference <= LIMIT
    for weight in constrained_weights(model):
        if type(weight.manifold) is SphereProduct:
            assert float(weight.manifold.deviations(weight.parameter).max()) <= 4 * torch.finfo(torch.float64).eps
    for joint, members in mn.joint_spheres(model):
        assert float(joint.deviations([m.parameter for m in members]).max()) <= 4 * torch.finfo(torch.float64).eps
    step_that_moves_nothing(model, optimizer, x)
    assert mn.verify(plain, model, x).eval_difference <= LIMIT


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return mn.optim.RiemannianSGD(mn.param_groups(model), lr=1e-30)


@pytest.mark.parametrize("remedies", ["spheres", "spheres,dead-biases"])
@pytest.mark.parametrize("radius", ["unit", "keep"])
def test_a_plain_state_gives_the_converted_form_of_its_network(radius: Any, remedies: str) -> None:
    x, plain = images(), other_net()
    options: dict[str, Any] = {"radius": radius, "remedies": remedies, "train_tolerance": 1.0}
    model = mn.convert(conv_net(), x, **options)
    optimizer = optimizer_of(model)
    assert model.load_state_dict(plain.state_dict()) == nn.Module.load_state_dict(plain, plain.state_dict())
    expected = mn.convert(plain, x, **options)
    assert list(model.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), value.double(), rtol=1e-13, atol=1e-15), name
    manifolds = {w.name: w.manifold for w in constrained_weights(expected)}
    for weight in constrained_weights(model):
        assert torch.allclose(weight.manifold.radii, manifolds[weight.name].radii, rtol=1e-13, atol=0)
    check_loaded(plain, model, optimizer, x)


@pytest.mark.parametrize("kind", [mn.optim.RiemannianSGD, mn.optim.RiemannianAdam])
def test_the_optimizer_that_was_there_takes_the_new_radii(kind: Any) -> None:
    x = images()
    model = mn.convert(gated(), x)
    optimizer = kind(mn.param_groups(model), lr=1e-30)
    old = list(optimizer.param_groups[0]["manifolds"])
    plain = perturbed(gated())
    model.load_state_dict(plain.state_dict())
    found = optimizer.param_groups[0]["manifolds"]
    assert found == [w.manifold for w in constrained_weights(model)]
    assert [m.uniform_radius == 1 for m in found] == [m.uniform_radius == 1 for m in old]
    assert found[0] is not old[0]
    check_loaded(plain, model, optimizer, x)


@pytest.mark.parametrize(
    ("kind", "moment"), [(mn.optim.RiemannianSGD, "momentum_buffer"), (mn.optim.RiemannianAdam, "exp_avg")]
)
def test_moments_keep_their_angles_where_the_radii_change(kind: Any, moment: str) -> None:
    x = images()
    model = mn.convert(conv_net(), x, radius="keep")
    options = {"momentum": 0.9} if kind is mn.optim.RiemannianSGD else {}
    optimizer = kind(mn.param_groups(model), lr=0.1, **options)
    model(x).square().mean().backward()
    optimizer.step()
    before = {w.name: optimizer.state[w.parameter][moment].clone() for w in constrained_weights(model)}
    state = model.state_dict()
    model.load_state_dict({name: 3 * value if name in before else value for name, value in state.items()})
    for weight in constrained_weights(model):
        found = optimizer.state[weight.parameter][moment]
        assert torch.allclose(found, 3 * before[weight.name], rtol=1e-14, atol=0)


def test_joint_spheres_take_the_norms_of_the_state() -> None:
    x = images()
    model = mn.convert(residual(), x, remedies="joint-spheres,spheres")
    assert mn.joint_spheres(model)
    plain = perturbed(residual())
    optimizer = optimizer_of(model)
    model.load_state_dict(plain.state_dict())
    check_loaded(plain, model, optimizer, x)
    assert type(model.stem.weight).__name__ == "ManifoldParameter"


def wrapped(model: nn.Module) -> tuple[nn.Module, nn.Module, str]:
    return nn.ModuleDict({"net": model}), model, "net."


def averaged(model: nn.Module) -> tuple[nn.Module, nn.Module, str]:
    average = mn.optim.AveragedModel(model)
    return average.module, average.module, ""


@pytest.mark.filterwarnings("ignore:0.weight. constrained")
def torchs_average(model: nn.Module) -> tuple[nn.Module, nn.Module, str]:
    average = TorchAveragedModel(model)
    return average, average.module, "module."


WAYS: dict[str, Callable[[nn.Module], tuple[nn.Module, nn.Module, str]]] = {
    "deep copy": lambda model: (copied := copy.deepcopy(model), copied, ""),
    "pickle": lambda model: (loaded := pickle.loads(pickle.dumps(model)), loaded, ""),
    "wrapped": wrapped,
    "copy of a wrapped one": lambda model: (outer := copy.deepcopy(wrapped(model)[0]), outer["net"], "net."),
    "average": averaged,
    "torch's average": torchs_average,
}


@pytest.mark.filterwarnings("ignore:0.weight. constrained")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_copies_wrappers_and_averages_convert_too(way: str, assign: bool) -> None:
    x, plain = images(), other_net()
    outer, model, prefix = WAYS[way](mn.convert(conv_net(), x))
    state = {prefix + name: value for name, value in copy.deepcopy(plain.state_dict()).items()}
    # The counter of torch's average.
    state |= {name: value for name, value in outer.state_dict().items() if not name.startswith(prefix)}
    outer.load_state_dict(state, assign=assign)
    assert mn.verify(plain, model, x).eval_difference <= LIMIT
    if assign:
        assert mn.restore(model)
    check_loaded(plain, model, optimizer_of(model), x)


def test_states_on_their_spheres_are_loaded_bit_for_bit() -> None:
    x = images()
    for build in (conv_net, gated):
        model = mn.convert(build(), x)
        other = copy.deepcopy(model)
        optimizer = mn.optim.RiemannianSGD(mn.param_groups(other), lr=0.1)
        for _ in range(3):
            other(x).square().mean().backward()
            optimizer.step()
        manifolds = [w.manifold for w in constrained_weights(model)]
        model.load_state_dict(other.state_dict())
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
        assert all(a is w.manifold for a, w in zip(manifolds, constrained_weights(model), strict=True))


def loaded_from_a_file(model: nn.Module, build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    mn.save(model, folder / "net.safetensors")
    return mn.load(build(), folder / "net.safetensors")


@pytest.mark.parametrize("remedies", ["all", "spheres,dead-biases"])
@pytest.mark.parametrize("radius", ["unit", "keep"])
@pytest.mark.parametrize("build", [conv_net, gated, residual])
def test_a_model_from_a_file_converts_plain_states_too(
    build: Callable[[], nn.Module], radius: Any, remedies: str, tmp_path: Path
) -> None:
    x, plain = images(), perturbed(build())
    model = mn.convert(build(), x, radius=radius, remedies=remedies)
    inside = loaded_from_a_file(nn.Sequential(model), lambda: nn.Sequential(build()), tmp_path)[0]
    for loaded in (loaded_from_a_file(model, build, tmp_path), inside):
        assert moves_module.moves_of(loaded) == moves_module.moves_of(model)
        optimizer = optimizer_of(loaded)
        loaded.load_state_dict(plain.state_dict())
        check_loaded(plain, loaded, optimizer, x)


def test_without_the_record_in_the_file_a_plain_state_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sabotage, and what files of older releases do."""
    monkeypatch.setattr("manifold_nets.conversion.checkpoint.moves_within", lambda _: ())
    model = loaded_from_a_file(mn.convert(conv_net(), images()), conv_net, tmp_path)
    with pytest.raises(OffManifoldError, match=r"load it into the plain network"):
        model.load_state_dict(other_net().state_dict())


def test_the_state_that_is_loaded_is_not_written_to() -> None:
    model, plain = mn.convert(conv_net(), images()), other_net()
    state = plain.state_dict()
    before = copy.deepcopy(state)
    model.load_state_dict(state)
    assert list(state) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_tied_weights_stay_tied() -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = Lambda(
            lambda m, x: m.head(m.n2(m.b(torch.relu(m.n1(m.a(x)))))),
            a=nn.Linear(4, 4, bias=False), n1=nn.BatchNorm1d(4), b=nn.Linear(4, 4, bias=False), n2=nn.BatchNorm1d(4),
            head=nn.Linear(4, 2),
        )  # fmt: skip
        net.b.weight = net.a.weight
        return randomized(net).double()

    x = torch.randn(8, 4, dtype=torch.float64)
    model, plain = mn.convert(build(0), x), build(1)
    optimizer = optimizer_of(model)
    model.load_state_dict(plain.state_dict())
    assert model.a.weight is model.b.weight
    check_loaded(plain, model, optimizer, x)


def test_a_state_that_is_not_whole_names_what_is_missing() -> None:
    x = images()
    model = mn.convert(conv_net(), x)
    before = copy.deepcopy(model.state_dict())
    state = {"0.weight": other_net()[0].weight.detach()}
    message = r"0\.weight: .*lacks 0\.bias, 1\.running_mean, 1\.running_var"
    with pytest.raises(ProjectionError, match=message):
        model.load_state_dict(state, strict=False)
    with pytest.raises(OffManifoldError, match=r"Load the whole of it into the model that manifold_nets\.convert"):
        model[0].load_state_dict(other_net()[0].state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Norms need nothing else.
    kept = mn.convert(conv_net(), x, radius="keep")
    kept.load_state_dict(state, strict=False)
    assert torch.equal(kept[0].weight.detach(), state["0.weight"])
    with pytest.raises(DegenerateGroupError, match=r"0\.weight"):
        model.load_state_dict({**other_net().state_dict(), "0.weight": torch.zeros_like(state["0.weight"])})


def test_a_removed_bias_that_something_stands_behind_has_to_be_measured() -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = Lambda(
            lambda m, x: m.head(torch.relu(m.n(m.second(m.first(x))))),
            first=nn.Linear(4, 4), second=nn.Linear(4, 4, bias=False), n=nn.BatchNorm1d(4), head=nn.Linear(4, 2),
        )  # fmt: skip
        nn.init.zeros_(net.first.bias)
        return randomized(net).double()

    x = torch.randn(8, 4, dtype=torch.float64)
    # A bias of zeros adds zeros to every running mean: that does not make it the mean's own bias.
    model = mn.convert(build(0), x, remedies="dead-biases,spheres")
    assert "first.bias" in removed_biases(model)
    plain = build(1)
    model.load_state_dict(plain.state_dict())
    assert mn.verify(plain, model, x).eval_difference <= LIMIT
    nn.init.ones_(plain.first.bias)
    with pytest.raises(ProjectionError, match=r"first\.bias: .*measured"):
        model.load_state_dict(plain.state_dict())


def test_unit_radius_is_left_where_it_would_not_be_exact() -> None:
    x, plain = images(), conv_net()
    model = mn.convert(conv_net(), x)
    assert model[0].weight.manifold.uniform_radius == 1
    plain[1].running_var.fill_(1e-9)
    optimizer = optimizer_of(model)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model[0].weight.detach(), plain[0].weight.detach())
    check_loaded(plain, model, optimizer, x)
    # And comes back with a state for which it is.
    model.load_state_dict(other_net().state_dict())
    assert model[0].weight.manifold.uniform_radius == 1
    check_loaded(other_net(), model, optimizer, x)


def test_a_layer_defined_on_spheres_refuses_a_plain_state() -> None:
    def build(linear: Any) -> nn.Module:
        torch.manual_seed(0)
        return randomized(nn.Sequential(linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))).double()

    model, state = build(mn.layers.UnitNormLinear), build(nn.Linear).state_dict()
    x = torch.randn(8, 4, dtype=torch.float64)
    for assign in (False, True):
        with pytest.raises(OffManifoldError, match=r"^0\.weight: group \d has norm .*manifold_nets\.revert\(model\)"):
            model.load_state_dict(state, assign=assign)
    # The first remedy of the message.
    plain = mn.revert(model)
    plain.load_state_dict(state)
    assert mn.verify(plain, mn.convert(plain, x), x).eval_difference <= LIMIT
    # The second one.
    state["0.weight"] = model[0].weight.manifold.projx(state["0.weight"])
    model.load_state_dict(state)


def functional() -> nn.Module:
    """A network that owns its weight itself."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.norm(nn.functional.conv2d(x, m.filters, m.shift))).mean((2, 3)))

    torch.manual_seed(7)
    net = Lambda(forward, norm=nn.BatchNorm2d(5), head=nn.Linear(5, 2))
    net.filters, net.shift = nn.Parameter(torch.randn(5, 3, 3, 3)), nn.Parameter(torch.randn(5))
    return randomized(net).double()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("radius", ["unit", "keep"])
def test_weights_of_the_model_itself_are_converted_before_they_are_checked(radius: Any, copied: bool) -> None:
    x, plain = images(), perturbed(functional())
    model = mn.convert(functional(), x, radius=radius, train_tolerance=1.0)
    model = copy.deepcopy(model) if copied else model
    optimizer = optimizer_of(model)
    model.load_state_dict(plain.state_dict())
    check_loaded(plain, model, optimizer, x)


def test_a_check_that_precedes_the_conversion_refuses_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage of the order of hooks."""
    monkeypatch.setattr(mn.constraints, "check_values_last", lambda _: None)
    model = mn.convert(functional(), images(), train_tolerance=1.0)
    with pytest.raises(OffManifoldError):
        model.load_state_dict(perturbed(functional()).state_dict())


def with_layer_on_spheres(linear: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return randomized(net).double()


def refused_state_leaves_all(x: Tensor) -> bool:
    """Whether a state that one layer refuses leaves values and radii of a model with kept radii as they were."""
    model = mn.convert(with_layer_on_spheres(mn.layers.UnitNormLinear), x, radius="keep")
    before = copy.deepcopy(model.state_dict())
    radii = [w.manifold.radii for w in constrained_weights(model)]
    with pytest.raises(OffManifoldError, match=r"^2\.weight: "):
        model.load_state_dict(perturbed(with_layer_on_spheres(nn.Linear)).state_dict())
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return same and all(map(torch.equal, radii, (w.manifold.radii for w in constrained_weights(model))))


def test_a_state_that_one_layer_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    assert refused_state_leaves_all(x)
    # Sabotage: each layer is asked when its turn has come.
    monkeypatch.setattr(loading, "require_loadable", lambda *_: None)
    assert not refused_state_leaves_all(x)


def at_once(_: Any, module: nn.Module, __: str, old: SphereProduct, new: SphereProduct) -> None:
    mn.constraints.change_manifolds(module, {id(old): new})


def after_a_failing_hook(kind: Any) -> tuple[nn.Module, bool]:
    """A model that a hook of a layer left half loaded, and whether each weight is on the spheres of its values."""
    model = mn.convert(conv_net(), images(), radius="keep")
    handle = model[3].register_load_state_dict_pre_hook(lambda *_: 1 / 0)
    optimizer = kind(mn.param_groups(model), lr=1e-30)
    with pytest.raises(ZeroDivisionError):
        model.load_state_dict(other_net().state_dict())
    handle.remove()
    assert torch.equal(model[3].weight.detach(), conv_net()[3].weight)
    assert torch.equal(model[0].weight.detach(), other_net()[0].weight)
    eps = torch.finfo(torch.float64).eps
    same = all(float(w.manifold.deviations(w.parameter).max()) <= 4 * eps for w in constrained_weights(model))
    return model, same and optimizer.param_groups[0]["manifolds"] == [w.manifold for w in constrained_weights(model)]


@pytest.mark.parametrize("kind", [mn.optim.RiemannianSGD, mn.optim.RiemannianAdam])
def test_a_hook_that_raises_leaves_the_radii_of_the_values(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, consistent = after_a_failing_hook(kind)
    assert consistent
    manifold = model[3].weight.manifold
    model[3].load_state_dict(copy.deepcopy(model[3].state_dict()))  # its own values: the new radii are not for them
    assert model[3].weight.manifold is manifold
    # Sabotage: all weights change their spheres at once.
    monkeypatch.setattr(loading._TakesRadii, "__init__", at_once)
    assert not after_a_failing_hook(kind)[1]


def test_reverted_models_load_as_torch_does() -> None:
    plain = mn.revert(mn.convert(conv_net(), images(), remedies="all"))
    state = other_net().state_dict()
    plain.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert not any(module._load_state_dict_pre_hooks for module in plain.modules())


def test_without_the_hook_the_first_step_would_change_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the state is loaded as it is."""
    monkeypatch.setattr(loading, "_convert_state", lambda *_: None)
    monkeypatch.setattr(mn.constraints._Constraints, "__call__", lambda *_: None)
    x, plain = images(), other_net()
    model = mn.convert(conv_net(), x)
    optimizer = optimizer_of(model)
    model.load_state_dict(plain.state_dict())
    assert mn.verify(plain, model, x).eval_difference <= LIMIT
    with pytest.warns(UserWarning, match="other code, such as weight averaging, moved it off its spheres"):
        step_that_moves_nothing(model, optimizer, x)
    assert mn.verify(plain, model, x).eval_difference > 0.01


@pytest.mark.parametrize("forgotten", ["running_mean", "bias"])
def test_forgetting_what_moves_along_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    model = mn.convert(conv_net(), x)
    original = moves_module.rescaled_along
    monkeypatch.setattr(
        moves_module, "rescaled_along",
        lambda *args: {k: v for k, v in original(*args).items() if not k.endswith(forgotten)},
    )  # fmt: skip
    model.load_state_dict(other_net().state_dict())
    with pytest.raises(AssertionError):
        check_loaded(other_net(), model, optimizer_of(model), x)
