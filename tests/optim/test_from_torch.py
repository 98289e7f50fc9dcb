"""A run that goes on: the converted model takes the path of the plain run itself, and its schedule, and goes back."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diagnosis_cases import PreNorm
from torch import Tensor, nn
from torch.optim import lr_scheduler

import manifold_nets as mn
from manifold_nets.errors import ArgumentTypeError, OptimizerStateError, OptionError

BEFORE = 10
EPS = torch.finfo(torch.float64).eps
RUNS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "sgd, momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd, decay": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}),
    "sgd, dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "sgd, Nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 3e-3}),
    "adam, decay, amsgrad": (torch.optim.Adam, {"lr": 3e-3, "weight_decay": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}),
}
AMSGRAD = {**RUNS, "adamw, amsgrad": (torch.optim.AdamW, RUNS["adamw"][1] | {"amsgrad": True})}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A network whose normalizations have no eps to speak of, so that it is scale-invariant to rounding."""
    torch.manual_seed(4)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-30), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-30), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
    ).to(dtype)


def batch(number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 3, 6, 6, dtype=torch.float64, generator=generator)
    return x.to(dtype), (x[:, :2].mean((2, 3)) > 0).sum(1)


def step(net: nn.Module, optimizer: Any, number: int) -> Tensor:
    """Take one step; return the logits before it."""
    x, y = batch(number, next(net.parameters()).dtype)
    optimizer.zero_grad()
    logits = net(x)
    nn.functional.cross_entropy(logits, y).backward()
    optimizer.step()
    return logits.detach()


def trained(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Any]:
    kind, options = AMSGRAD[name]
    net = network(dtype)
    optimizer = kind([{"params": net[:3].parameters()}, {"params": net[3:].parameters(), "lr": 0.03}], **options)
    for number in range(BEFORE):
        step(net, optimizer, number)
    return net, optimizer


def distances(
    name: str,
    steps: int,
    change: Callable[[Any, Any], None] = lambda optimizer, weight: None,
    *,
    radius: str = "unit",
    **options: Any,
) -> list[float]:
    """Largest difference of the logits of the plain run and the converted one, step by step, on equal data."""
    net, plain = trained(name)
    converted = mn.convert(net, batch(0)[0], radius=radius)
    assert (converted[0].weight.manifold.uniform_radius == 1) == (radius == "unit")
    optimizer = mn.optim.from_torch(plain, net, converted, **options)
    change(optimizer, converted[3].weight)
    pairs = range(BEFORE, BEFORE + steps)
    return [float((step(net, plain, n) - step(converted, optimizer, n)).abs().max()) for n in pairs]


@pytest.mark.parametrize("name", RUNS)
def test_the_path_of_functions_is_that_of_the_plain_run(name: str) -> None:
    """Rounding grows as paths diverge, by less than a tenth each step here."""
    for number, distance in enumerate(distances(name, 100, radius="keep" if "decay" in name else "unit")):
        assert distance <= 256 * EPS * 1.1**number


@pytest.mark.parametrize("name", RUNS)
def test_the_next_step_is_the_plain_one_in_every_transfer(name: str) -> None:
    for transfer, radius in (("step", "unit"), ("follow", "unit"), ("step", "keep")):
        # The logits of the second step are those after the first.
        assert max(distances(name, 2, transfer=transfer, radius=radius)) <= 256 * EPS


SABOTAGE: dict[str, Callable[[Any, Any], None]] = {
    "norms": lambda optimizer, weight: optimizer.state[weight]["norm"].mul_(1.001),
    "momentum": lambda optimizer, weight: optimizer.state[weight]["momentum_buffer"].zero_(),
    "rate": lambda optimizer, weight: optimizer.param_groups[1].update(lr=0.0301),
}


@pytest.mark.parametrize("fault", SABOTAGE)
def test_sabotage_what_is_carried_makes_a_difference(fault: str) -> None:
    assert max(distances("sgd, decay", 2, SABOTAGE[fault])) > 1e6 * EPS


def test_sabotage_decay_and_norms_are_followed() -> None:
    def without_decay(optimizer: Any, _: Any) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0

    assert distances("sgd, decay", 20, without_decay)[-1] > 1e-3
    assert distances("sgd, decay", 20, transfer="step")[-1] > 1e-3


def grouped() -> nn.Sequential:
    """A network whose biases have a scale with their weights: group normalization does not take a shift away."""
    torch.manual_seed(5)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6, eps=1e-30), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(96, 5), nn.LayerNorm(5, eps=1e-30), nn.Tanh(), nn.Linear(5, 3)),
    ).double()


@pytest.mark.parametrize("name", RUNS)
def test_biases_that_are_scaled_with_a_weight_go_along(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest() -> float:
        net = grouped()
        plain: Any = RUNS[name][0](net.parameters(), **RUNS[name][1])
        for number in range(BEFORE):
            step(net, plain, number)
        converted = mn.convert(net, batch(0)[0])
        optimizer = mn.optim.from_torch(plain, net, converted)
        found = [
            float((step(net, plain, n) - step(converted, optimizer, n)).abs().max()) for n in range(BEFORE, BEFORE + 30)
        ]
        given_back = mn.revert(converted, norms=mn.optim.plain_norms(optimizer, converted))
        for a, b in zip(net.parameters(), given_back.parameters(), strict=True):
            found.append(float((a - b).detach().abs().max()))
        return max(found)

    assert largest() <= 1e5 * EPS
    # Sabotage.
    module = importlib.import_module("manifold_nets.optim.from_torch")
    monkeypatch.setattr(module, "_scale_biases_along", lambda groups, converted: None)
    assert largest() > 1e8 * EPS


@pytest.mark.parametrize("name", RUNS)
def test_joint_spheres_go_along(name: str) -> None:
    """A residual stream in front of normalizations: its weights share one norm."""
    torch.manual_seed(0)
    net = PreNorm().double()
    net.n1.eps = net.n2.eps = 1e-30
    tokens = [torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(k)) for k in range(30)]

    def one(model: nn.Module, optimizer: Any, number: int) -> Tensor:
        optimizer.zero_grad()
        out = model(tokens[number])
        nn.functional.cross_entropy(out.flatten(0, 1), tokens[number].roll(1).flatten()).backward()
        optimizer.step()
        return out.detach()

    plain: Any = RUNS[name][0](net.parameters(), **RUNS[name][1])
    for number in range(5):
        one(net, plain, number)
    converted = mn.convert(net, tokens[0], remedies="joint-spheres")
    assert len(mn.joint_spheres(converted)) == 1
    optimizer = mn.optim.from_torch(plain, net, converted)
    for number in range(5, 30):
        torch.testing.assert_close(one(converted, optimizer, number), one(net, plain, number), rtol=0, atol=1e6 * EPS)
    given_back = mn.revert(converted, norms=mn.optim.plain_norms(optimizer, converted))
    for a, b in zip(net.parameters(), given_back.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e6 * EPS)


class Residual(nn.Module):
    """A residual stream with biases, which grow with the weights of the stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.n1, self.n2 = nn.LayerNorm(8, eps=1e-30), nn.LayerNorm(8, eps=1e-30)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x[:, 0, 0])
        return self.head(self.n2(h + self.down(nn.functional.silu(self.up(self.n1(h))))))


@pytest.mark.parametrize("name", ["sgd, decay", "adamw"])
def test_joint_spheres_carry_the_biases_of_their_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest() -> float:
        net = Residual()
        plain: Any = RUNS[name][0](net.parameters(), **RUNS[name][1])
        for number in range(BEFORE):
            step(net, plain, number)
        converted = mn.convert(net, batch(0)[0], remedies="joint-spheres")
        assert len(mn.joint_spheres(converted)) == 1
        optimizer = mn.optim.from_torch(plain, net, converted)
        pairs = range(BEFORE, BEFORE + 20)
        found = [float((step(net, plain, n) - step(converted, optimizer, n)).abs().max()) for n in pairs]
        given_back = mn.revert(converted, norms=mn.optim.plain_norms(optimizer, converted))
        found.append(float((given_back(batch(0)[0]) - converted(batch(0)[0])).detach().abs().max()))
        found += [
            float((a - b).detach().abs().max()) for a, b in zip(net.parameters(), given_back.parameters(), strict=True)
        ]
        return max(found)

    assert largest() <= 1e5 * EPS
    # Sabotage.
    monkeypatch.setattr("manifold_nets.conversion.apply.joint_biases", lambda family, first: ())
    assert largest() > 1e8 * EPS


class Sum(nn.Module):
    """A batch normalization of a sum: its statistics follow the norms that the weights have together."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.Linear(5, 3)
        self.norm, self.calls = nn.BatchNorm1d(5, eps=1e-30), calls
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0, 0]
        for _ in range(self.calls):
            h = self.norm(self.a(x) + self.b(x.square()))
        return self.head(h.tanh())


def test_statistics_behind_joint_spheres_are_scaled_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def given_back(calls: int = 1) -> tuple[nn.Module, nn.Module, nn.Module]:
        net = Sum(calls)
        plain = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        step(net, plain, 0)
        converted = mn.convert(net, batch(0)[0], remedies="joint-spheres")
        assert len(mn.joint_spheres(converted)) == 1
        optimizer = mn.optim.from_torch(plain, net, converted)
        for number in range(1, 20):
            step(net, plain, number)
            step(converted, optimizer, number)
        mn.save(converted, tmp_path / "net.safetensors")
        loaded = mn.load(Sum(), tmp_path / "net.safetensors")
        return net, converted, mn.revert(loaded, norms=mn.optim.plain_norms(optimizer, converted))

    def distance(one: nn.Module, other: nn.Module) -> float:
        return float((one(batch(0)[0]) - other(batch(0)[0])).detach().abs().max())

    net, converted, back = given_back()
    assert distance(back.eval(), converted.eval()) <= 1e4 * EPS
    assert distance(back.train(), net.train()) <= 1e5 * EPS
    with pytest.raises(OptionError, match=r"norms: found 'a\.weight, whose scale norm absorbs"):
        given_back(calls=2)
    monkeypatch.setattr("manifold_nets.conversion.apply.statistics_behind", lambda *_: ())
    _, converted, back = given_back()
    assert distance(back.eval(), converted.eval()) > 1e-2


def test_a_bias_in_front_of_a_layer_norm_takes_the_plain_step_where_norms_are_held() -> None:
    net = grouped()
    plain = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.05)
    step(net, plain, 0)
    optimizer = mn.optim.from_torch(plain, net, converted := mn.convert(net, batch(0)[0]), transfer="step")
    held = mn.optim.plain_norms(optimizer, converted)
    for _ in range(2):
        torch.testing.assert_close(step(converted, optimizer, 1), step(net, plain, 1), rtol=0, atol=256 * EPS)
    for name, norms in mn.optim.plain_norms(optimizer, converted).items():
        assert torch.equal(norms, held[name])


@pytest.mark.parametrize("remedy", ["spheres", "joint-spheres"])
def test_a_bias_that_is_scaled_with_a_weight_must_be_in_a_group(remedy: str) -> None:
    net, bias = (grouped(), "4.bias") if remedy == "spheres" else (Residual(), "stem.bias")
    plain = torch.optim.SGD([p for name, p in net.named_parameters() if name != bias], lr=0.1)
    converted = mn.convert(net, batch(0)[0], remedies=remedy)
    with pytest.raises(OptionError, match=rf"{bias} in a group too"):
        mn.optim.from_torch(plain, net, converted)


def test_compiled_models_are_the_same_models() -> None:
    net, plain = trained("sgd, decay")
    converted = mn.convert(net, batch(0)[0])
    expected = mn.optim.from_torch(plain, net, converted)
    for wrap in ((True, False), (False, True), (True, True)):
        models: Any = [
            torch.compile(m, backend="eager") if w else m for m, w in zip((net, converted), wrap, strict=True)
        ]
        optimizer = mn.optim.from_torch(plain, *models)
        assert [g["param_names"] for g in optimizer.param_groups] == [g["param_names"] for g in expected.param_groups]
        torch.testing.assert_close(optimizer.state_dict()["state"], expected.state_dict()["state"])


def test_in_float32_the_norms_are_those_of_the_plain_run() -> None:
    net, plain = trained("sgd, decay", torch.float32)
    converted = mn.convert(net, batch(0, torch.float32)[0])
    optimizer = mn.optim.from_torch(plain, net, converted)
    for number in range(BEFORE, BEFORE + 20):
        step(net, plain, number)
        step(converted, optimizer, number)
    for place in (0, 3):
        norms = mn.optim.plain_norms(optimizer, converted)[f"{place}.weight"]
        expected = net[place].weight.detach().double().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, expected, rtol=1e-3, atol=0)
        assert float(converted[place].weight.manifold.deviations(converted[place].weight.detach()).max()) < 1e-6


def test_steps_far_below_the_last_digit_of_float32_add_up_in_the_norms() -> None:
    """A plain step of 1e-4 of a norm makes it longer by 5e-9 of itself."""
    sphere = mn.SphereProduct((1, 2))
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, 0.0]]))
    plain = torch.optim.SGD(layer.parameters(), lr=1e-4)
    other = copy.deepcopy(layer)
    mn.constraints.attach(other, "weight", sphere)
    mn.constraints.note_converted(other, "weight", None)
    optimizer = mn.optim.from_torch(plain, layer, other)
    for _ in range(1000):
        weight = other.weight.detach()
        other.weight.grad = (
            torch.stack([-weight[:, 1], weight[:, 0]], 1) / optimizer.state[other.weight]["norm"].float()
        )
        optimizer.step()
    assert float(optimizer.state[other.weight]["norm"]) ** 2 - 1 == pytest.approx(1000 * 1e-8, rel=0.01)


# ---- the rates of the long run ---------------------------------------------------------------------------------------


def test_equilibrium_norms_are_those_of_the_formulas() -> None:
    net, plain = trained("sgd, decay")
    converted = mn.convert(net, batch(0)[0])
    lr, mu, decay = 0.03, 0.9, 0.05
    weight, buffer = net[3].weight.detach().flatten(1), plain.state[net[3].weight]["momentum_buffer"].flatten(1)
    unit = weight / weight.norm(dim=1, keepdim=True)
    tangent = buffer - (unit * buffer).sum(1, keepdim=True) * unit
    gradient = (weight.norm(dim=1) * tangent.norm(dim=1)).square().mean() * (1 - mu**2)
    optimizer = mn.optim.from_torch(plain, net, converted, transfer="equilibrium")
    norms = mn.optim.plain_norms(optimizer, converted)["3.weight"]
    torch.testing.assert_close(norms.pow(4), (lr * gradient / (2 * decay * (1 - mu))).expand(8))
    state = optimizer.state[converted[3].weight]["momentum_buffer"].flatten(1)
    torch.testing.assert_close(state * norms[:, None], buffer * weight.norm(dim=1, keepdim=True))
    before = norms.clone()
    step(converted, optimizer, BEFORE)
    assert torch.equal(mn.optim.plain_norms(optimizer, converted)["3.weight"], before)

    net, plain = trained("adamw, amsgrad")
    converted = mn.convert(net, batch(0)[0])
    held, optimizer = (mn.optim.from_torch(plain, net, converted, transfer=how) for how in ("step", "equilibrium"))
    old, new = (mn.optim.plain_norms(each, converted)["3.weight"][:, None] for each in (held, optimizer))
    torch.testing.assert_close(new.square(), torch.full((8, 1), 0.03 * 54 / 0.2, dtype=torch.float64))
    for key, power in (("exp_avg", 1), ("entry_sq", 2), ("max_entry_sq", 2)):
        before, after = (each.state[converted[3].weight][key].flatten(1) for each in (held, optimizer))
        torch.testing.assert_close(after * new**power, before * old**power)


def test_sgd_at_equilibrium_turns_as_the_theory_says() -> None:
    """On gradients that are noise the mean turn of a step is √(2ηλ/(1+μ)), at once."""
    torch.manual_seed(0)
    lr, mu, decay, size = 0.1, 0.9, 0.01, 2000
    layer = nn.Linear(size, 4, bias=False).double()
    layer.weight.data.mul_(50)  # not far from the equilibrium, lest the momentum remembers other norms
    plain = torch.optim.SGD(layer.parameters(), lr=lr, momentum=mu, weight_decay=decay)

    def noise(weight: Tensor, norms: Tensor) -> Tensor:
        g = torch.randn_like(weight)
        u = weight / weight.norm(dim=1, keepdim=True)
        return (g - (u * g).sum(1, keepdim=True) * u) / norms

    for _ in range(100):
        layer.weight.grad = noise(layer.weight.detach(), layer.weight.detach().norm(dim=1, keepdim=True))
        plain.step()
    other = copy.deepcopy(layer)
    mn.constraints.attach(other, "weight", sphere := mn.SphereProduct((4, size)), sphere.projx(layer.weight.detach()))
    mn.constraints.note_converted(other, "weight", None)
    optimizer = mn.optim.from_torch(plain, layer, other, transfer="equilibrium")
    turns = []
    for _ in range(60):
        before = other.weight.detach().clone()
        other.weight.grad = noise(before, torch.ones(4, 1, dtype=torch.float64))  # at the point of the sphere
        optimizer.step()
        turns.append(sphere.component_dist(before, other.weight.detach()))
    assert float(torch.stack(turns).mean()) == pytest.approx((2 * lr * decay / (1 + mu)) ** 0.5, rel=0.05)


# ---- groups, schedules, states ---------------------------------------------------------------------------------------


def schedulers(optimizer: Any) -> list[Any]:
    cosine, warm = lr_scheduler.CosineAnnealingLR(optimizer, 40), lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return [lr_scheduler.SequentialLR(optimizer, [warm, cosine], [5]), lr_scheduler.ReduceLROnPlateau(optimizer)]


def test_attached_schedulers_go_on_with_the_new_optimizer() -> None:
    rates: list[list[list[float]]] = []
    for convert in (True, False):
        net, optimizer = trained("sgd, momentum")
        both = schedulers(optimizer)
        seen = []
        for number in range(60):
            if convert and number in (0, 20):
                converted = mn.convert(net, batch(0)[0])
                optimizer = mn.optim.from_torch(optimizer, net, converted, scheduler=both)
                net, convert = converted, False
            step(net, optimizer, number)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                both[0].step()
            both[1].step(1.0)
            seen.append([group["lr"] for group in optimizer.param_groups])
        rates.append(seen)
    assert rates[0] == rates[1]


def test_groups_and_options_stay() -> None:
    net, plain = trained("sgd, Nesterov")
    converted = mn.convert(net, batch(0)[0], remedies=["dead-biases", "spheres"])
    optimizer = mn.optim.from_torch(plain, net, converted)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.03]
    assert all(group["nesterov"] and group["weight_decay"] == 0.05 for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight", "1.bias"]  # without the dead bias
    buffer = optimizer.state[converted[7].weight]["momentum_buffer"]
    assert torch.equal(buffer, plain.state[net[7].weight]["momentum_buffer"])
    assert buffer is not plain.state[net[7].weight]["momentum_buffer"]


def same_path(one: tuple[Any, Any], other: tuple[Any, Any], steps: int = 5) -> bool:
    for number in range(50, 50 + steps):
        for net, optimizer in (one, other):
            step(net, optimizer, number)
    return all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))


@pytest.mark.parametrize("name", ["sgd, decay", "adamw", "adam, decay, amsgrad"])
def test_a_state_is_saved_and_loaded(name: str, tmp_path: Any) -> None:
    net, plain = trained(name)
    converted = mn.convert(net, batch(0)[0])
    optimizer = mn.optim.from_torch(plain, net, converted)
    step(converted, optimizer, 20)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    mn.save(converted, tmp_path / "net.safetensors")
    loaded = mn.load(network(), tmp_path / "net.safetensors")
    kind = mn.optim.RiemannianSGD if "sgd" in name else mn.optim.RiemannianAdam
    parts = [[p for n, p in loaded.named_parameters() if (int(n[0]) < 3) == first] for first in (True, False)]
    resumed = (
        kind([{"params": params} for params in parts], lr=0.1, momentum=0.9)
        if "sgd" in name
        else kind([{"params": params} for params in parts], lr=0.1)
    )
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert resumed.state[loaded[0].weight]["norm"].dtype == torch.float64
    assert same_path((converted, optimizer), (loaded, resumed))
    copied = copy.deepcopy((converted, optimizer))
    assert same_path((converted, optimizer), copied)
    broken = optimizer.state_dict()
    broken["state"][0]["norm"] = torch.ones(2)
    with pytest.raises(OptimizerStateError, match="norm of shape"):
        resumed.load_state_dict(broken)


@pytest.mark.parametrize("name", RUNS)
def test_the_way_back_meets_the_plain_run(name: str) -> None:
    net, plain = trained(name)
    converted = mn.convert(net, batch(0)[0], radius="keep" if "decay" in name else "unit")
    optimizer = mn.optim.from_torch(plain, net, converted)
    for number in range(20, 30):
        step(net, plain, number)
        step(converted, optimizer, number)
    given_back = mn.revert(converted, norms=mn.optim.plain_norms(optimizer, converted))
    again: Any = mn.optim.to_torch(optimizer, converted, given_back)
    assert type(again) is type(plain)
    x = batch(0)[0]
    torch.testing.assert_close(given_back.eval()(x), converted.eval()(x), rtol=0, atol=256 * EPS)
    given_back.train()
    for number in range(30, 40):
        step(net, plain, number)
        step(given_back, again, number)
    for (key, a), b in zip(net.named_parameters(), given_back.parameters(), strict=True):
        if key != "0.bias":  # dead: it is divided by the norm, and nothing depends on it
            torch.testing.assert_close(a, b, rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize("name", ["rsgd", "radam"])
def test_an_optimizer_from_nowhere_goes_back_too(name: str) -> None:
    """At the norms that are named, the next plain step turns every filter as the next step on spheres."""
    net, _ = trained("sgd")
    converted = mn.convert(net, batch(0)[0])
    rate = 1e-6  # first order
    optimizer: Any = mn.optim.OPTIMIZERS[name].kind(mn.param_groups(converted), lr=rate)
    if name == "rsgd":
        optimizer.param_groups[0]["momentum"] = 0.9
    for number in range(5):
        step(converted, optimizer, number)
    given_back = mn.revert(converted, norms=mn.optim.plain_norms(optimizer, converted))
    back = mn.optim.to_torch(optimizer, converted, given_back)
    sphere, before = converted[3].weight.manifold, converted[3].weight.detach().clone()
    step(given_back, back, 7)
    step(converted, optimizer, 7)
    new = sphere.projx(given_back[3].weight.detach())
    turned, expected = sphere.component_dist(before, new), sphere.component_dist(before, converted[3].weight.detach())
    # Adam's directions differ, as one second moment a filter tells its entries apart from then on.
    torch.testing.assert_close(turned, expected, rtol=1e-3 if name == "rsgd" else 0.1, atol=0)


def test_a_plain_average_is_loaded_into_that_of_the_converted_model() -> None:
    net, plain = trained("sgd, decay")
    ema = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    for number in range(20, 24):
        step(net, plain, number)
        ema.update_parameters(net)
    average = mn.optim.AveragedModel(mn.convert(net, batch(0)[0]), use_buffers=True)
    average.load_state_dict(ema.state_dict())
    x = batch(3)[0]
    torch.testing.assert_close(average.eval()(x), ema.eval()(x), rtol=0, atol=1e4 * EPS)
    assert int(average.n_averaged) == 4
    assert float(average.resultant_lengths()["3.weight"].min()) == 1


@pytest.mark.parametrize("name", ["sgd, momentum", "adamw"])
def test_a_run_may_begin_on_spheres(name: str) -> None:
    """The plain optimizer has not taken a step yet; its state on spheres can be copied and loaded all the same."""
    runs = []
    for convert in (False, True):
        net = network()
        optimizer: Any = RUNS[name][0](net.parameters(), **RUNS[name][1])
        if convert:
            converted = mn.convert(net, batch(0)[0])
            optimizer = mn.optim.from_torch(optimizer, net, converted)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            net = converted
        runs.append([step(net, optimizer, number) for number in range(5)])
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=256 * EPS)


def test_a_rate_in_a_tensor_is_not_shared() -> None:
    net = network()
    plain = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1))
    optimizer = mn.optim.from_torch(plain, net, mn.convert(net, batch(0)[0]))
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert float(plain.param_groups[0]["lr"]) == float(optimizer.defaults["lr"]) == pytest.approx(0.1)


def test_a_group_can_be_added_later() -> None:
    net, plain = trained("sgd")
    optimizer = mn.optim.from_torch(plain, net, mn.convert(net, batch(0)[0]))
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    extra.grad = torch.ones(2)
    optimizer.step()
    assert extra.tolist() == [0.5, 0.5]
    assert optimizer.param_groups[2]["transfer"] == "follow"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    net, plain = trained("sgd")
    converted = mn.convert(net, batch(0)[0])
    optimizer = mn.optim.from_torch(plain, net, converted)
    with pytest.raises(OptionError, match="transfer: found 'sudden'"):
        mn.optim.from_torch(plain, net, converted, transfer="sudden")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="load_state_dict"):
        mn.optim.from_torch(optimizer, net, converted)
    with pytest.raises(OptionError, match=r"a torch\.optim\.SGD"):
        mn.optim.from_torch(torch.optim.RMSprop(net.parameters()), net, converted)
    with pytest.raises(OptionError, match="before the conversion"):
        mn.optim.from_torch(plain, converted, converted)
    with pytest.raises(OptionError, match="converted: found"):
        mn.optim.from_torch(plain, net, nn.Linear(2, 2))
    with pytest.raises(OptionError, match="weight_decay=0"):
        mn.optim.from_torch(plain, net, converted, transfer="equilibrium")
    with pytest.raises(OptionError, match="scheduler"):
        mn.optim.from_torch(plain, net, converted, scheduler=lr_scheduler.ConstantLR(optimizer))
    with pytest.raises(OptionError, match="norms that are off"):
        mn.optim.to_torch(optimizer, converted, mn.revert(converted))
    with pytest.raises(OptionError, match="optimizer: found 'SGDG'"):
        mn.optim.to_torch(mn.optim.SGDG(converted.parameters()), converted, net)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="norms: found"):
        mn.revert(converted, norms={"7.weight": torch.ones(3)})
    with pytest.raises(OptionError, match="norms: found '2 for 3"):
        mn.revert(converted, norms={"3.weight": torch.ones(2)})
    with pytest.raises(ArgumentTypeError, match="model: found"):
        mn.optim.from_torch(plain, None, converted)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="without weights on spheres"):
        mn.optim.from_torch(plain, net, net)
    with pytest.raises(OptimizerStateError, match="before from_torch"):
        optimizer.load_state_dict(plain.state_dict())


class OwnStep(torch.optim.SGD):
    """Somebody's optimizer, whose step is not that of its base."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_an_own_step_is_refused_and_other_subclasses_are_not() -> None:
    net = network()
    converted = mn.convert(net, batch(0)[0])
    with pytest.raises(OptionError, match="on_spheres"):
        mn.optim.from_torch(OwnStep(net.parameters()), net, converted)
    named = type("Named", (torch.optim.AdamW,), {})
    assert type(mn.optim.from_torch(named(net.parameters()), net, converted)) is mn.optim.RiemannianAdam


def test_plain_values_that_were_moved_are_refused() -> None:
    net, plain = trained("sgd, momentum")
    balanced, _ = mn.balance(net, batch(0)[0])
    for other in (mn.convert(net, batch(0)[0], remedies="all"), mn.convert(balanced, batch(0)[0])):
        with pytest.raises(OptionError, match=r"other values of 1\.weight.*use 'balance' only before training"):
            mn.optim.from_torch(plain, net, other)
        # Without a state too: a step at other values is another step.
        with pytest.raises(OptionError, match=r"other values of [13]\.weight"):
            mn.optim.from_torch(torch.optim.SGD(net.parameters()), net, other)
    fresh = torch.optim.SGD(balanced.parameters(), lr=0.1)
    mn.optim.from_torch(fresh, balanced, mn.convert(balanced, batch(0)[0]))
    converted = mn.convert(net, batch(0)[0])
    step(net, plain, 40)
    with pytest.raises(OptionError, match=r"other values of 1\.weight"):
        mn.optim.from_torch(plain, net, converted)
    with pytest.raises(OptionError, match=r"other values of 0\.weight"):
        mn.optim.from_torch(torch.optim.SGD(net.parameters()), net, converted)
    # A conversion into which the values of a checkpoint were loaded.
    converted.load_state_dict(net.state_dict())
    mn.optim.from_torch(torch.optim.SGD(net.parameters()), net, converted)
    mn.optim.from_torch(plain, net, converted)


def test_weights_that_were_constrained_by_name_are_refused_with_a_remedy_that_works() -> None:
    for optimizer_of in (lambda net: trained("sgd, momentum")[1], lambda net: torch.optim.SGD(net.parameters(), 0.1)):
        net = trained("sgd, momentum")[0]
        constrained = copy.deepcopy(net)
        mn.constrain(constrained, "3.weight", radius="keep")
        with pytest.raises(OptionError, match=r"3\.weight on spheres without.*optim\.on_spheres; or"):
            mn.optim.from_torch(optimizer_of(net), net, constrained)
        plain = torch.optim.SGD(constrained.parameters(), lr=0.1, momentum=0.9)
        for optimizer in (
            mn.optim.on_spheres(plain, constrained),
            mn.optim.RiemannianSGD(mn.param_groups(constrained), lr=0.1),
        ):
            step(constrained, optimizer, 0)
            assert float(mn.project(constrained)["3.weight"]) < 4 * torch.finfo(torch.float64).eps
        both = mn.convert(net, batch(0)[0])
        mn.constrain(both, "7.weight")
        with pytest.raises(OptionError, match=r"7\.weight on spheres without"):
            mn.optim.from_torch(optimizer_of(net), net, both)


@pytest.mark.parametrize(("name", "radius"), [("sgd, decay", "keep"), ("adam, decay, amsgrad", "unit")])
def test_a_checkpoint_of_the_converted_run_may_be_loaded_into_plain_objects(name: str, radius: str) -> None:
    net, plain = trained(name)
    converted = mn.convert(net, batch(0)[0], radius=radius)
    optimizer = mn.optim.from_torch(plain, net, converted)
    for number in range(20, 25):
        step(converted, optimizer, number)
    fresh = network()
    again = RUNS[name][0]([{"params": part.parameters()} for part in (fresh[:3], fresh[3:])], **RUNS[name][1])
    fresh.load_state_dict(converted.state_dict())
    again.load_state_dict(optimizer.state_dict())
    both = mn.convert(fresh, batch(0)[0], radius=radius)
    states = [copy.deepcopy(again.state_dict()) for _ in range(2)]
    states[1]["state"][0]["norm"] *= 1.001  # the sabotage
    runs = [(converted, optimizer)]
    for state in states:
        again.load_state_dict(state)
        runs.append(copy.deepcopy((both, mn.optim.from_torch(again, fresh, both))))
    logits = [torch.stack([step(*run, number) for number in range(30, 40)]) for run in runs]
    assert float((logits[1] - logits[0]).abs().max()) < 1e-11
    assert float((logits[2] - logits[0]).abs().max()) > 1e-6


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_frozen_weight_that_the_optimizer_does_not_hold_comes_back_as_it_is(
    kind: type[torch.optim.Optimizer],
) -> None:
    net = network()
    net[3].weight.requires_grad_(False)
    plain = kind([p for p in net.parameters() if p.requires_grad], lr=0.01)  # type: ignore[call-arg]
    step(net, plain, 0)
    converted = mn.convert(net, batch(0)[0])
    optimizer = mn.optim.from_torch(plain, net, converted)
    frozen = converted[3].weight.detach().clone()
    step(net, plain, 1)
    step(converted, optimizer, 1)
    norms = mn.optim.plain_norms(optimizer, converted)
    given_back = mn.revert(converted, norms=norms)
    mn.optim.to_torch(optimizer, converted, given_back)
    torch.testing.assert_close(norms["3.weight"], frozen.flatten(1).norm(dim=1), rtol=8 * EPS, atol=0)
    torch.testing.assert_close(given_back[3].weight.detach(), frozen, rtol=8 * EPS, atol=0)
    torch.testing.assert_close(given_back[0].weight, net[0].weight, rtol=1e-9, atol=1e-12)
