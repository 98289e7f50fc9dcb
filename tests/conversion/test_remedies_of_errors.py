"""What errors advise is carried out here: it works, and it keeps the function where it says so."""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import pytest
import safetensors.torch
import torch
from helpers.conversion_cases import EVAL_LIMIT, conv_net, gated, images, other_net, residual
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import manifold_nets as mn
from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion import moves as moves_module
from manifold_nets.errors import (
    ArgumentTypeError,
    CheckpointError,
    CheckpointFormatError,
    ConstraintError,
    EuclideanStepError,
    FunctionChangedError,
    LearningRateWarning,
    NothingToConvertError,
    OffManifoldError,
    OptimizerStateError,
    OptionError,
    ParameterGroupError,
    ProjectionError,
)
from manifold_nets.monitor_records import History

LIMIT = EVAL_LIMIT[torch.float64]
Case = Callable[..., None]
CASES: dict[str, tuple[tuple[str, ...], Case]] = {}
SAID: list[str] = []


def advises(*calls: str) -> Callable[[Case], Case]:
    """A case in which messages name some calls."""

    def register(run: Case) -> Case:
        CASES[run.__name__] = calls, run
        return run

    return register


def error_of(kind: type[BaseException], trigger: Callable[[], Any]) -> str:
    """Return the message of the error that something raises."""
    with pytest.raises(kind) as caught:
        trigger()
    SAID.append(str(caught.value))
    return SAID[-1]


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every constrained weight off its spheres, group by group."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in constrained_weights(model):
            partition = weight.manifold.partition
            factors = 0.5 + torch.rand(partition.n_groups, generator=generator, dtype=torch.float64)
            weight.parameter.copy_(partition.multiply(weight.parameter.detach(), partition.spread(factors)))
    return model


def same(model: nn.Module, other: nn.Module, x: Tensor) -> bool:
    return mn.verify(model, other, x).eval_difference <= LIMIT


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    model(images()).square().mean().backward()
    return torch.optim.SGD(model.parameters(), lr=0.1)


def check_projects(model: nn.Module, tmp_path: Path, *given: Any, message: str = "output stays") -> None:
    """A model off its spheres is refused by `save`; `project` puts it back, and the output stays."""
    before, file = copy.deepcopy(moved(model)), tmp_path / "net.safetensors"
    assert message in error_of(OffManifoldError, lambda: mn.save(model, file))
    off = mn.project(model, *given)
    assert min(off.values()) > 0.01
    assert same(before, model, images())
    mn.save(model, file)
    assert max(mn.project(model, *given).values()) <= 8 * torch.finfo(torch.float64).eps
    assert mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)


@advises("manifold_nets.project(model)")
def converted_weights_off_their_spheres(tmp_path: Path) -> None:
    for build, options in (
        (conv_net, {}),
        (conv_net, {"radius": "keep"}),
        (conv_net, {"remedies": "all"}),
        (gated, {}),
        (residual, {"remedies": "joint-spheres,spheres"}),
    ):
        check_projects(mn.convert(build(), images(), **options), tmp_path)
    inner = mn.convert(conv_net(), images())
    check_projects(nn.Sequential(inner), tmp_path)
    check_projects(copy.deepcopy(nn.Sequential(inner)), tmp_path)


@advises("manifold_nets.project(model, example_inputs)", "manifold_nets.revert(model)")
def weights_of_a_file_off_their_spheres(tmp_path: Path) -> None:
    # As an older release wrote it, without what the conversion moved.
    converted = mn.convert(conv_net(), images())
    del converted.__dict__[moves_module.MOVES]
    mn.save(converted, tmp_path / "first.safetensors")
    model = moved(mn.load(conv_net(), tmp_path / "first.safetensors"))
    before = copy.deepcopy(model.state_dict())
    error_of(ProjectionError, lambda: mn.project(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert mn.verify(model, mn.revert(model), images()).eval_difference == 0
    model = mn.load(conv_net(), tmp_path / "first.safetensors")
    check_projects(model, tmp_path, images(), message="manifold_nets.project(model, example_inputs)")


@advises("manifold_nets.revert(model)")
def fused_layers(tmp_path: Path) -> None:
    x, file = images(), tmp_path / "net.safetensors"
    model = mn.convert(conv_net(), x).eval()
    fused = nn.Sequential(fuse_conv_bn_eval(model[0], model[1]), *model[2:]).eval()
    error_of(OffManifoldError, lambda: mn.save(fused, file))
    for given in ((), (x,)):
        error_of(ProjectionError, lambda given=given: mn.project(fused, *given))  # type: ignore[misc]
    plain = mn.revert(fused)
    assert mn.verify(fused, plain, x).eval_difference == 0
    mn.save(plain, file)
    # Fused in place, the record says what is gone.
    model[0], model[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    assert "1.running_mean" in error_of(ProjectionError, lambda: mn.project(model))
    error_of(OffManifoldError, lambda: mn.save(model, file))
    assert mn.verify(model, mn.revert(model), x).eval_difference == 0


@advises("manifold_nets.project(model)", "manifold_nets.revert(model)")
def defined_layers_off_their_spheres(tmp_path: Path) -> None:
    model = moved(nn.Sequential(mn.layers.UnitNormLinear(4, 3), nn.Linear(3, 2)).double())
    message = error_of(OffManifoldError, lambda: mn.save(model, tmp_path / "net.safetensors"))
    assert "this changes the output unless a normalization absorbs its scale" in message
    x = torch.randn(8, 4, dtype=torch.float64)
    assert mn.verify(model, mn.revert(model), x).eval_difference == 0
    mn.project(model)
    mn.save(model, tmp_path / "net.safetensors")


@advises("manifold_nets.project(model)", "weight.copy_(manifold.projx(weight))")
def optimizer_of_weights_off_their_spheres(tmp_path: Path) -> None:
    model = moved(mn.convert(conv_net(), images()))
    before = copy.deepcopy(model)
    make = lambda: mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)  # noqa: E731
    error_of(OffManifoldError, make)
    mn.project(model)
    make()
    assert same(before, model, images())
    layer = moved(mn.layers.UnitNormLinear(4, 3))
    with torch.no_grad():
        layer.weight.copy_(layer.weight.manifold.projx(layer.weight))
    mn.optim.RiemannianSGD(mn.param_groups(layer), lr=0.1)


@advises("manifold_nets.param_groups(model)", "manifold_nets.revert")
def lost_constraints(tmp_path: Path) -> None:
    model = mn.convert(conv_net(), images())
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    error_of(EuclideanStepError, lambda: mn.optim.RiemannianSGD(model.parameters(), lr=0.1))
    mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)
    torch.optim.SGD(mn.revert(model).parameters(), lr=0.1)


@advises(
    "manifold_nets.optim.RiemannianSGD", "manifold_nets.param_groups(model)", "manifold_nets.optim.allow_euclidean"
)
def euclidean_steps(tmp_path: Path) -> None:
    model = mn.convert(conv_net(), images())
    optimizer = plain_sgd(model)
    error_of(EuclideanStepError, optimizer.step)
    mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1).step()
    mn.optim.allow_euclidean(optimizer)
    optimizer.step()


@advises("manifold_nets.param_groups(model)")
def optimizers_from_before_a_conversion(tmp_path: Path) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mn.convert(model, images(), inplace=True)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="after SGD was built") as caught:
        optimizer.step()
    SAID.extend(str(w.message) for w in caught)
    mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)


@advises("manifold_nets.revert")
def options_that_spheres_do_not_have(tmp_path: Path) -> None:
    model = mn.convert(conv_net(), images())
    error_of(ParameterGroupError, lambda: mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1, differentiable=True))
    mn.optim.RiemannianSGD(mn.param_groups(mn.revert(model)), lr=0.1, differentiable=True)


@advises(
    "manifold_nets.joint_spheres(model)", "manifold_nets.project(model)", "manifold_nets.project",
    "manifold_nets.revert(model)", "manifold_nets.optim",
)  # fmt: skip
def weights_of_joint_spheres(tmp_path: Path) -> None:
    model = mn.convert(residual(), images(), remedies="joint-spheres")
    error_of(ConstraintError, lambda: mn.optim.RiemannianSGD([model.stem.weight], lr=0.1))
    assert mn.joint_spheres(model)
    mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)
    mn.project(model)
    mn.revert(model)
    error_of(ConstraintError, lambda: mn.optim.AveragedModel(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        averaged = torch.optim.swa_utils.AveragedModel(model)
    for seed in (1, 2):
        averaged.update_parameters(moved(copy.deepcopy(model), seed))
    before = copy.deepcopy(averaged.module)
    mn.project(averaged.module)
    assert same(before, averaged.module, images())
    error_of(OffManifoldError, lambda: mn.optim.RiemannianSGD(mn.param_groups(moved(model)), lr=0.1))
    mn.project(model)
    mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)


@advises(
    "manifold_nets.unconstrain(model)", "manifold_nets.unconstrain", "manifold_nets.constrain", "manifold_nets.revert",
    "manifold_nets.Partition",
)  # fmt: skip
def weights_constrained_by_name(tmp_path: Path) -> None:
    model, state = conv_net(), other_net().state_dict()
    mn.constrain(model, "0.weight")
    error_of(OffManifoldError, lambda: model.load_state_dict(state))
    error_of(ConstraintError, lambda: mn.constrain(model, "0.weight"))
    mn.unconstrain(model)
    model.load_state_dict(state)
    mn.constrain(model, "0.weight")
    converted = mn.convert(conv_net(), images())
    error_of(ConstraintError, lambda: mn.unconstrain(converted, "0.weight"))
    assert same(converted, mn.revert(converted), images())
    error_of(OptionError, lambda: mn.constrain(conv_net(), "0.weight", per="rows"))  # type: ignore[arg-type]
    mn.constrain(conv_net(), "0.weight", per=mn.Partition.filters(conv_net()[0].weight.shape))


@advises("manifold_nets.revert(converted, norms=manifold_nets.optim.plain_norms(optimizer, converted))")
def a_plain_network_of_other_norms(tmp_path: Path) -> None:
    converted = mn.convert(conv_net(), images())
    optimizer = mn.optim.RiemannianSGD(mn.param_groups(converted, sphere_lr=0.1), lr=0.1)
    plain = mn.revert(converted, norms=mn.optim.plain_norms(optimizer, converted))
    assert same(converted, plain, images())
    mn.optim.to_torch(optimizer, converted, plain)
    with torch.no_grad():
        plain[0].weight.mul_(3)
    error_of(OptionError, lambda: mn.optim.to_torch(optimizer, converted, plain))


@advises("manifold_nets.Monitor(…, writer='run.csv')")
def files_that_no_monitor_wrote(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("step,loss\n")
    error_of(ArgumentTypeError, lambda: History.from_csv(tmp_path / "other.csv"))
    model = conv_net()
    optimizer = plain_sgd(model)
    with mn.Monitor(model, optimizer, mn.diagnose(model, images()), every=1, writer=tmp_path / "run.csv"):
        optimizer.step()
    assert History.from_csv(tmp_path / "run.csv").rows()


@advises("manifold_nets.param_groups(model)")
def groups_that_do_not_fit(tmp_path: Path) -> None:
    model = mn.convert(conv_net(), images())
    groups = mn.param_groups(model)
    groups[0]["manifolds"] = groups[0]["manifolds"][:1]
    error_of(ParameterGroupError, lambda: mn.optim.RiemannianSGD(groups, lr=0.1))
    mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)


@advises("manifold_nets.optim.carry_momentum(plain, its_optimizer, model, optimizer)")
def states_of_plain_optimizers(tmp_path: Path) -> None:
    plain = conv_net()
    own = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    plain(images()).square().mean().backward()
    own.step()
    model = mn.convert(plain, images())
    optimizer = mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1, momentum=0.9)
    error_of(OptimizerStateError, lambda: optimizer.load_state_dict(own.state_dict()))
    mn.optim.carry_momentum(plain, own, model, optimizer)


@advises("manifold_nets.optim.AveragedModel", "manifold_nets.project(model)")
def averages_of_torch(tmp_path: Path) -> None:
    model = mn.convert(conv_net(), images())
    with pytest.warns(UserWarning, match="are not on them") as caught:
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    SAID.extend(str(w.message) for w in caught)
    for seed in (1, 2):
        averaged.update_parameters(moved(copy.deepcopy(model), seed))
    before = copy.deepcopy(averaged.module)
    mn.project(averaged.module)
    assert same(before, averaged.module, images())
    mn.optim.AveragedModel(model)


@advises("safetensors.torch.load_file", "manifold_nets.convert")
def plain_files(tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(other_net().state_dict(), file)
    error_of(CheckpointFormatError, lambda: mn.load(conv_net(), file))
    model = conv_net()
    model.load_state_dict(safetensors.torch.load_file(file))
    assert same(other_net(), mn.convert(model, images()), images())


@advises("radius='keep'")
def functions_that_would_change(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves_module, "rescaled_variance", lambda variance, eps, factor: 2 * variance)
        error_of(FunctionChangedError, lambda: mn.convert(conv_net(), images()))
        assert same(conv_net(), mn.convert(conv_net(), images(), radius="keep"), images())


@advises("remedies=")
def nothing_to_convert(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double(), torch.randn(8, 4).double()
    message = error_of(NothingToConvertError, lambda: mn.convert(net, x))
    (remedies,) = re.findall(r"remedies='([\w,-]+)'", message)
    assert same(net, mn.convert(net, x, remedies=remedies), x)


@advises("manifold_nets.diagnose", "diagnose(model, inputs)")
def learning_rates_without_a_report(tmp_path: Path) -> None:
    model: Any = conv_net()
    error_of(ArgumentTypeError, lambda: mn.matched_learning_rates(model, images(), lr=0.1))  # type: ignore[arg-type]
    mn.matched_learning_rates(model, mn.diagnose(model, images()), lr=0.1)


@advises("manifold_nets.convert")
def parts_of_plain_states(tmp_path: Path) -> None:
    model, plain = mn.convert(conv_net(), images()), conv_net()
    part = {"0.weight": other_net()[0].weight.detach()}
    error_of(ProjectionError, lambda: model.load_state_dict(part, strict=False))
    error_of(OffManifoldError, lambda: model[0].load_state_dict(other_net()[0].state_dict()))
    plain.load_state_dict(part, strict=False)
    converted = mn.convert(plain, images())
    assert same(plain, converted, images())
    # All of them together.
    model.load_state_dict({**other_net().state_dict(), **part})


@advises("manifold_nets.revert(model)", "manifold_nets.convert(plain, example_inputs)", "manifold.projx(value)")
def plain_states_of_defined_layers(tmp_path: Path) -> None:
    model = nn.Sequential(mn.layers.UnitNormLinear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    state = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double().state_dict()
    x = torch.randn(8, 4, dtype=torch.float64)
    error_of(OffManifoldError, lambda: model.load_state_dict(state))
    plain = mn.revert(model)
    plain.load_state_dict(state)
    assert same(plain, mn.convert(plain, x), x)
    state["0.weight"] = model[0].weight.manifold.projx(state["0.weight"])
    model.load_state_dict(state)


@advises("manifold_nets.param_groups(model, sphere_lr=", "manifold_nets.matched_learning_rates(…).by_weight()")
def rates_of_the_plain_network(tmp_path: Path) -> None:
    net = conv_net()
    with torch.no_grad():
        net[0].weight.mul_(0.1)
    report = mn.diagnose(net, images())
    model, kind = mn.convert(net, report), mn.optim.RiemannianSGD
    with pytest.warns(LearningRateWarning) as caught:
        kind(mn.param_groups(model), lr=0.1)
    SAID.append(str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = mn.matched_learning_rates(net, report, lr=0.1).by_weight()
        for own in (caught[0].message.matched, rates, 0.1):  # type: ignore[union-attr]
            kind(mn.param_groups(model, sphere_lr=own), lr=0.1)


@advises("to_dense()", "to_empty")
def tensors_that_files_do_not_hold(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("sparse", torch.eye(2).to_sparse())
    error_of(CheckpointError, lambda: mn.save(net, tmp_path / "net.safetensors"))
    net.sparse = net.sparse.to_dense()
    mn.save(net, tmp_path / "net.safetensors")
    error_of(CheckpointError, lambda: mn.save(net.to("meta"), tmp_path / "net.safetensors"))
    net.to_empty(device="cpu")
    mn.save(mn.load(net, tmp_path / "net.safetensors"), tmp_path / "net.safetensors")


@advises("geoopt.optim")
def other_manifolds(tmp_path: Path) -> None:
    weight = geoopt.ManifoldParameter(torch.eye(3)[:, :2].clone(), manifold=geoopt.Stiefel())
    error_of(ParameterGroupError, lambda: mn.optim.RiemannianSGD([weight], lr=0.1))
    weight.sum().backward()
    geoopt.optim.RiemannianSGD([weight], lr=0.1).step()


@pytest.mark.parametrize("name", CASES)
def test_what_an_error_advises_works_and_keeps_the_function(name: str, tmp_path: Path) -> None:
    calls, run = CASES[name]
    SAID.clear()
    run(tmp_path)
    said = " ".join(SAID)
    assert [call for call in calls if call not in said] == []


def test_advice_that_scales_the_weight_alone_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sabotage: `project` as it would be without biases and running statistics."""
    model = mn.convert(conv_net(), images())
    monkeypatch.setattr(moves_module, "rescaled_along", lambda *_: {})
    with pytest.raises(AssertionError):
        check_projects(model, tmp_path)


def advised_in_the_source() -> set[str]:
    """Every function and class of the package that a text other than a docstring names."""
    root = Path(mn.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                found |= set(re.findall(r"\bmanifold_nets\.\w[\w.]*\w", node.value))
    calls = {name for name in found if not name.endswith(".json")}
    return {name for name in calls if importlib.util.find_spec(name.rpartition(".")[0]) and not is_module(name)}


def is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_every_call_that_a_text_names_has_a_case() -> None:
    named = {
        name for calls, _ in CASES.values() for call in calls for name in re.findall(r"manifold_nets[\w.]*\w", call)
    }
    # Where a checkpoint comes from, which `test_checkpoint_files` shows.
    assert advised_in_the_source() - named == {"manifold_nets.save"}
