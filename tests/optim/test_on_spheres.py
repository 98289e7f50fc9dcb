"""mn.optim.on_spheres: any optimizer's own step, made tangent and put back; formulas in float64, states, trainers."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sphere_cases import eps
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison.errors import OptimizerNameError, SettingsError
from manifold_nets.comparison.optimizers import optimizer_spec
from manifold_nets.comparison.settings import Settings
from manifold_nets.errors import (
    ArgumentTypeError,
    EuclideanStepError,
    OptionError,
    ParameterGroupError,
)
from manifold_nets.optim import on_spheres
from manifold_nets.optim.backends import native


class Lion(torch.optim.Optimizer):
    """A user's optimizer: the published rule of Lion, arXiv:2302.06675, with a buffer of an own name."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    p.add_(torch.lerp(p.grad, velocity, first).sign(), alpha=-group["lr"])
                    velocity.lerp_(p.grad, 1 - second)
        return loss


MAKES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.2),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.05, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, weight_decay=0.5),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.02, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.05),
    "lion": lambda params: Lion(params, lr=0.05),
}
MAKES |= {"muon": lambda params: torch.optim.Muon(params, lr=0.1)} if hasattr(torch.optim, "Muon") else {}
BUFFER = {"nesterov": "momentum_buffer", "adam": "exp_avg", "adamw": "exp_avg", "rmsprop": "momentum_buffer",
          "nadam": "exp_avg", "lion": "velocity", "muon": "momentum_buffer"}  # fmt: skip
PER: dict[str, Any] = {
    "row": "row",
    "column": "column",
    "tensor": "tensor",
    "blocks": mn.Partition.blocks((6, 10), 3),
}


def groups_of(x: np.ndarray, per: str) -> np.ndarray:
    """The groups of a 6 × 10 matrix as rows."""
    return {"row": x, "column": x.T, "tensor": x.reshape(1, -1), "blocks": x.reshape(3, -1)}[per]


def from_groups(rows: np.ndarray, per: str) -> np.ndarray:
    return rows.T if per == "column" else rows.reshape(6, 10)


def put_back(old: np.ndarray, new: np.ndarray, buffer: np.ndarray | None, radius: float, radial: str, per: str) -> Any:
    """The formulas of the documentation, group by group, in numpy."""
    w, moved = groups_of(old, per), groups_of(new, per)
    delta = moved - w
    alpha = (w * delta).sum(1, keepdims=True) / radius**2
    z = w + delta - (np.maximum(alpha, 0) / 2 if radial == "brake" else alpha) * w
    after = radius * z / np.linalg.norm(z, axis=1, keepdims=True)
    if buffer is None:
        return from_groups(after, per), None
    b = groups_of(buffer, per)
    b = b - (after * b).sum(1, keepdims=True) * after / radius**2
    return from_groups(after, per), from_groups(b, per)


def check_formula(name: str, per: str, radius: float, radial: Any, dtype: torch.dtype = torch.float64) -> float:
    """Compare a wrapped optimizer with a plain one whose weight and buffer numpy puts back; return how far it moved."""
    torch.manual_seed(0)
    layer = nn.Linear(10, 6, bias=False, dtype=dtype)
    mn.constrain(layer, "weight", per=PER[per], radius=radius)
    twin, start = nn.Parameter(layer.weight.detach().clone()), layer.weight.detach().clone()
    plain = MAKES[name]([twin])
    wrapped = on_spheres(MAKES[name](layer.parameters()), layer, radial=radial, buffers=["velocity"])
    tolerance = 256 * eps(dtype)
    for _ in range(5):
        layer.weight.grad = torch.randn(6, 10, dtype=dtype)
        twin.grad = layer.weight.grad.clone()
        before = twin.detach().double().numpy().copy()
        plain.step()
        wrapped.step()
        key = BUFFER.get(name)
        buffer = None if key is None else plain.state[twin][key].double().numpy()
        after, kept = put_back(before, twin.detach().double().numpy(), buffer, radius, radial, per)
        with torch.no_grad():
            twin.copy_(torch.from_numpy(after))
            if key is not None:
                plain.state[twin][key].copy_(torch.from_numpy(kept))
        np.testing.assert_allclose(layer.weight.detach().double().numpy(), after, rtol=0, atol=tolerance * radius)
        if key is not None:
            found = wrapped.state[layer.weight][key].double().numpy()
            np.testing.assert_allclose(found, kept, rtol=0, atol=tolerance * (1 + np.abs(kept).max()))
        assert float(layer.weight.manifold.deviations(layer.weight).max()) <= 4 * eps(dtype)
    return float((layer.weight.detach() - start).norm())


@pytest.mark.parametrize("radial", ["project", "brake"])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", MAKES)
def test_steps_are_the_published_formulas(name: str, per: str, radial: str) -> None:
    assert check_formula(name, per, 1.5, radial) > 0.1


@pytest.mark.parametrize("radial", ["project", "brake"])
def test_without_a_kernel_the_steps_are_the_same(radial: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "no compiler")
    monkeypatch.setattr("manifold_nets.optim.backends.dispatch._has_warned", True)
    for name in ("nesterov", "adagrad"):
        check_formula(name, "row", 1.5, radial)


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_single_precision_is_put_back_to_rounding(name: str) -> None:
    check_formula(name, "row", 3.0, "project", torch.float32)


def test_sabotage_another_radial_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "no compiler")
    monkeypatch.setattr("manifold_nets.optim.backends.dispatch._has_warned", True)
    honest = mn.optim.on_spheres.__globals__["_PutBack"].coefficients

    def off(rule: Any, found: Any, second: Any, **options: Any) -> Any:
        return honest(rule, found._replace(g_slope=found.g_slope * (1 + 1e-6)), second, **options)

    monkeypatch.setattr(mn.optim.on_spheres.__globals__["_PutBack"], "coefficients", off)
    with pytest.raises(AssertionError):
        check_formula("nesterov", "row", 1.5, "project")


@pytest.mark.parametrize("kernel", [True, False])
def test_a_step_far_beyond_the_sphere_is_put_back_exactly(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the radial part is a million times the weight, what remains after it is measured, not predicted."""
    if not kernel:
        monkeypatch.setattr(native, "available", lambda: "no compiler")
        monkeypatch.setattr("manifold_nets.optim.backends.dispatch._has_warned", True)
    for radial in ("project", "brake"):
        torch.manual_seed(0)
        layer = nn.Linear(40, 3, bias=False)
        mn.constrain(layer, "weight")
        optimizer = on_spheres(torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9), layer, radial=radial)
        for _ in range(3):
            layer.weight.grad = -1e6 * layer.weight.detach() + torch.randn(3, 40)
            optimizer.step()
            assert float(layer.weight.manifold.deviations(layer.weight).max()) <= 4 * eps(torch.float32)


def test_a_step_that_cancels_the_weight_leaves_it_where_it_was() -> None:
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    mn.constrain(layer, "weight")
    before = layer.weight.detach().clone()
    optimizer = on_spheres(torch.optim.SGD(layer.parameters(), lr=1.0), layer, radial="brake")
    layer.weight.grad = before.clone()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=4 * eps(torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_on_its_spheres(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 8, bias=False).to(dtype)
    mn.constrain(layer, "weight")
    optimizer = on_spheres(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), layer)
    for _ in range(5):
        layer.weight.grad = torch.randn(8, 32).to(dtype)
        optimizer.step()
    assert float(layer.weight.manifold.deviations(layer.weight).max()) < eps(dtype)


# ---- networks --------------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights on spheres of several kinds beside plain ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 8, padding_idx=2), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)).to(dtype)
    mn.constrain(net, "0.weight")
    mn.constrain(net, "3.weight", per="column", radius=2.0)
    return net


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, seed: int = 1, closure: bool = False
) -> Any:
    torch.manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randint(9, (6,)), torch.randint(5, (6,))

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            found = nn.functional.cross_entropy(net(x), y)
            found.backward()
            return found

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def wrapped(net: nn.Module, name: str = "adam", **options: Any) -> torch.optim.Optimizer:
    return on_spheres(MAKES[name](mn.param_groups(net)), net, **options)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_plain_weights_take_the_optimizers_steps_bit_for_bit() -> None:
    net = network()
    optimizer = wrapped(net)
    twin = copy.deepcopy(net)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    plain = MAKES["adam"](twin.parameters())
    mn.optim.allow_euclidean(plain)
    plain.step()
    for name in ("1.weight", "1.bias", "3.bias"):
        assert torch.equal(net.get_parameter(name), twin.get_parameter(name))
    assert not torch.equal(net[3].weight, twin[3].weight)
    assert not net[0].weight[2].any()
    for weight in (net[0].weight, net[3].weight):
        assert weight.manifold.check_point_on_manifold(weight)


def test_weights_without_gradients_stay() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    optimizer = wrapped(net)
    net[1].weight.grad = torch.ones_like(net[1].weight)
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    optimizer.step()
    assert torch.equal(net[3].weight, before["3.weight"])
    torch.testing.assert_close(net[0].weight.detach(), before["0.weight"], rtol=4 * eps(torch.float64), atol=0)


def test_closures_take_the_same_steps() -> None:
    first, second = network(), network()
    assert_same(train(first, wrapped(first)), train(second, wrapped(second), closure=True))


@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_set_the_rates(when: str) -> None:
    paths = []
    for scheduled in (True, False):
        net = network()
        optimizer = MAKES["adam"](mn.param_groups(net))
        make = torch.optim.lr_scheduler.ExponentialLR
        scheduler = make(optimizer, 0.5) if scheduled and when == "before" else None
        optimizer = on_spheres(optimizer, net)
        scheduler = make(optimizer, 0.5) if scheduled and when == "after" else scheduler
        for step in range(3):
            path = train(net, optimizer, 1, step)
            if scheduler is not None:
                scheduler.step()
            else:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        paths.append(path)
    assert_same(*paths)


@pytest.mark.parametrize("name", ["nesterov", "adam", "lion"])
def test_an_interrupted_run_goes_on_bit_for_bit(name: str) -> None:
    net = network()
    optimizer = wrapped(net, name, buffers=["velocity"])
    train(net, optimizer)
    saved = pickle.loads(pickle.dumps((net.state_dict(), optimizer.state_dict())))
    assert "manifold" not in repr(saved[1])
    expected = train(net, optimizer, 3, 2)
    again = network()
    again.load_state_dict(saved[0])
    other = wrapped(again, name, buffers=["velocity"])
    other.load_state_dict(saved[1])
    assert_same(train(again, other, 3, 2), expected)


def test_a_copy_is_stopped_until_it_is_wrapped_again() -> None:
    net = network()
    optimizer = wrapped(net)
    train(net, optimizer)
    twin, other = copy.deepcopy((net, optimizer))
    with pytest.raises(EuclideanStepError, match="on_spheres"):
        train(twin, other)
    expected = train(net, optimizer, 2, 3)
    assert_same(train(twin, on_spheres(other, twin), 2, 3), expected)


def test_groups_that_are_added_later_are_put_back_too() -> None:
    net = network()
    optimizer = on_spheres(torch.optim.SGD(net[0].parameters(), lr=0.1), net)
    optimizer.add_param_group({"params": [p for layer in net[1:] for p in layer.parameters()]})
    train(net, optimizer)
    assert net[3].weight.manifold.check_point_on_manifold(net[3].weight)


def test_scaled_gradients_and_skipped_steps() -> None:
    first, second = network(torch.float32), network(torch.float32)
    plain, optimizer = wrapped(first), wrapped(second)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(1)
    for _ in range(3):
        x, y = torch.randint(9, (6,)), torch.randint(5, (6,))
        for net, stepper, scale in ((first, plain, None), (second, optimizer, scaler)):
            stepper.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            (loss if scale is None else scale.scale(loss)).backward()
            if scale is None:
                stepper.step()
            else:
                scale.step(stepper)
                scale.update()
    assert_same(dict(first.named_parameters()), dict(second.named_parameters()))
    before = copy.deepcopy(second.state_dict())
    second[1].weight.grad.fill_(torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert_same(second.state_dict(), before)


def test_one_sphere_for_each_matrix_is_that_of_its_norm() -> None:
    """A converted network with norms of whole matrices: what the step does to their directions is all that counts."""
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    norms = [layer.weight.detach().norm() for layer in (net[0], net[2])]
    mn.constrain(net, "*.weight", per="tensor", radius="keep")
    optimizer = on_spheres(MAKES["muon" if "muon" in MAKES else "sgd"]([net[0].weight, net[2].weight]), net)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    for layer, norm in zip((net[0], net[2]), norms, strict=True):
        torch.testing.assert_close(layer.weight.detach().norm(), norm, rtol=4 * eps(torch.float64), atol=0)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_called_twice_is_called_once(name: str) -> None:
    paths = []
    for times in (1, 2):
        net = network()
        optimizer = MAKES[name](net.parameters())
        for _ in range(times):
            assert on_spheres(optimizer, net) is optimizer
        hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        train(net, optimizer, 3)
        paths.append((net.state_dict(), *map(len, hooks)))
    assert_same(paths[0][0], paths[1][0])
    assert paths[0][1:] == paths[1][1:]


def test_what_cannot_be_wrapped_is_refused() -> None:
    net = network()
    with pytest.raises(ArgumentTypeError, match="without support for spheres"):
        on_spheres(mn.optim.RiemannianSGD(mn.param_groups(net), lr=0.1), net)
    with pytest.raises(ArgumentTypeError, match="optimizer: found"):
        on_spheres(net, net)  # type: ignore[type-var]
    with pytest.raises(OptionError, match="optimizer: found 'LBFGS'; expected an optimizer without line searches"):
        on_spheres(torch.optim.LBFGS(network().parameters()), network())
    with pytest.raises(OptionError, match="radial: found 'keep'"):
        on_spheres(torch.optim.SGD(net.parameters(), lr=0.1), net, radial="keep")  # type: ignore[arg-type]
    plain = nn.Linear(3, 2)
    with pytest.raises(OptionError, match="an optimizer with weights of the model on spheres"):
        on_spheres(torch.optim.SGD(plain.parameters(), lr=0.1), plain)
    with pytest.raises(EuclideanStepError):
        train(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_weight_that_was_constrained_after_the_optimizer_was_built_is_refused() -> None:
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    mn.constrain(net, "weight")
    with pytest.raises(EuclideanStepError, match="is that from before the constraint"):
        on_spheres(optimizer, net)


def test_joint_spheres_are_refused_by_name() -> None:
    joint = mn.JointSphere({name: mn.Partition.whole((3, 4)) for name in ("first", "second")})
    points = joint.projx([torch.randn(3, 4) for _ in range(2)])
    group = {"params": [nn.Parameter(point) for point in points], "manifolds": list(joint.manifolds)}
    with pytest.raises(ParameterGroupError, match="joint sphere"):
        on_spheres(torch.optim.SGD([group], lr=0.1), nn.Module())


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_comparisons_know_it_by_name() -> None:
    net = network()
    spec = optimizer_spec("on-spheres:adamw")
    assert (spec.name, spec.form) == ("on-spheres:adamw", "converted")
    stepper = spec.make(net, 0.05, Settings(("on-spheres:adamw",), (0.05,), (0,), 1, weight_decay=0.1))
    assert isinstance(stepper.optimizer, torch.optim.AdamW)
    train(net, stepper.optimizer)
    assert net[3].weight.manifold.check_point_on_manifold(net[3].weight)
    assert optimizer_spec("on-spheres:torch.optim:RAdam").form == "converted"
    for name in ("on-spheres:adma", "on-spheres:rsgd", "on-spheres:pymanopt-sd"):
        with pytest.raises((OptimizerNameError, SettingsError)):
            optimizer_spec(name)


# ---- the optimizers of timm ------------------------------------------------------------------------------------------

# Second derivatives, and what asks for CUDA, cannot be tried here.
_NOT_HERE = re.compile(r"CUDA required|does not have a grad_fn")


def radial_momenta(net: nn.Module, optimizer: Any) -> list[str]:
    found = []
    for p in net.parameters():
        manifold = getattr(p, "manifold", None)
        for name in ("exp_avg", "momentum_buffer") if isinstance(manifold, mn.SphereProduct) else ():
            held = optimizer.state[p].get(name)
            if isinstance(held, Tensor) and held.shape == p.shape and held.norm() > 0:
                radial = float(manifold.partition.inner(p.detach(), held.to(p.dtype)).abs().max() / held.norm())
                if radial > 16 * torch.finfo(held.dtype).eps:
                    found.append(f"{name} that is not tangent, by {radial:.1e}")
    return found


def faults_of(make: Callable[[list[Tensor]], Any], start: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """What an optimizer does otherwise than promised: direction, spheres, momenta, saved state."""
    eps = torch.finfo(torch.float64).eps

    def go(net: nn.Module, optimizer: Any, *numbers: int) -> list[Tensor]:
        for number in numbers:
            torch.manual_seed(number)  # some draw random numbers in their steps
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return [p.detach().clone() for p in net.parameters()]

    def made(net: nn.Module, *, wrap: bool) -> Any:
        torch.manual_seed(0)
        optimizer = make(list(net.parameters()))
        if wrap:
            return on_spheres(optimizer, net)
        mn.optim.allow_euclidean(optimizer)
        return optimizer

    net, twin, again = (copy.deepcopy(start) for _ in range(3))
    optimizer = made(net, wrap=True)
    steps = zip(go(net, optimizer, 1), go(twin, made(twin, wrap=False), 1), start.parameters(), strict=True)
    off = []
    for new, raw, old in steps:
        manifold = getattr(old, "manifold", None)
        if isinstance(manifold, mn.SphereProduct):
            raw = manifold.projx(old + manifold.proju(old, raw - old)).detach()
        off.append(float((new - raw).abs().max()))
    found = [f"another direction, by {max(off):.1e}"] if max(off) > 64 * eps else []
    go(net, optimizer, *range(2, 6))
    if max(mn.project(copy.deepcopy(net)).values()) > 4 * eps:
        found.append("off the spheres")
    found += radial_momenta(net, optimizer)
    again.load_state_dict(net.state_dict())
    resumed = made(again, wrap=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if not all(map(torch.equal, go(net, optimizer, 7, 8), go(again, resumed, 7, 8))):
        found.append("a state that does not go on")
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_optimizers_of_timm_step_on_spheres(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # NAdam of torch keeps a number in the default dtype, and loads it in that of the weights.
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    if importlib.util.find_spec("torchvision") is not None:
        mn.sources.import_torchvision()
    timm = pytest.importorskip("timm.optim")
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh()),
        *(nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    ).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,))
    start, found = mn.convert(net, x).train(), {}
    for name in timm.list_optimizers():
        try:
            found[name] = faults_of(lambda ps, name=name: timm.create_optimizer_v2(ps, opt=name, lr=1e-2), start, x, y)
        except (AssertionError, RuntimeError) as error:
            if not _NOT_HERE.search(str(error)):
                raise
    assert len(found) > 60
    assert {name: faults for name, faults in found.items() if faults} == {}
    # A step without its tangent part is noticed.
    monkeypatch.setattr(mn.optim.on_spheres.__globals__["_Hooks"], "after_step", lambda *_: None)
    assert faults_of(lambda ps: timm.create_optimizer_v2(ps, opt="lion", lr=1e-2), start, x, y)
