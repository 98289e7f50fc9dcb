"""Small networks to diagnose, and how to look at a network before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helpers.toy_networks import TOYS, Lambda, Toy
from manifold_nets.symmetry.rules import elementwise, normalization

NEGLIGIBLE = 1e-30


# Float64 rounding through a handful of layers, relative to outputs of order one.
BRUTE_FORCE_TOLERANCE = 1e4 * torch.finfo(torch.float64).eps


def build(toy: Toy) -> nn.Module:
    torch.manual_seed(5)
    return toy.build()


def sharp(model: nn.Module) -> nn.Module:
    """A float64 twin in training mode with negligible eps, no dropout, and one-dimensional parameters off 0 and 1."""
    twin = copy.deepcopy(model).double().train()
    for module in twin.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = NEGLIGIBLE
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return twin


HAND_WRITTEN_EPS = {"hand-written rms", "weight standardization", "weight standardization by batch_norm"}


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [m.training for m in model.modules()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "ids": [id(p) for p in model.parameters()],
        "attributes": [(m.eps, getattr(m, "p", None)) for m in model.modules() if hasattr(m, "eps")],
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("training", "ids", "attributes"):
        assert before[key] == after[key], key
    for a, b in zip(before["state"].values(), after["state"].values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before["grads"], after["grads"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(before["rng"], after["rng"])


LAYERS = {
    "relu": lambda c: [nn.ReLU()],
    "leaky": lambda c: [nn.LeakyReLU(0.2)],
    "tanh": lambda c: [nn.Tanh()],
    "bn": lambda c: [nn.BatchNorm2d(c)],
    "gn": lambda c: [nn.GroupNorm(2, c)],
    "in": lambda c: [nn.InstanceNorm2d(c)],
    "pool": lambda c: [nn.AvgPool2d(2, 1)],
    "conv": lambda c: [nn.Conv2d(c, c, 3, padding=1)],
    "depthwise": lambda c: [nn.Conv2d(c, c, 3, padding=1, groups=c)],
    "transposed": lambda c: [nn.ConvTranspose2d(c, c, 2, groups=2)],
    "shuffle": lambda c: [nn.ChannelShuffle(2)],
}


# The number promised: forward-and-backward passes in float64.
MOST_PASSES = 4


def hidden(x: Tensor) -> Tensor:
    """The same by operations that have no rule."""
    return x * torch.exp(-0.5 * torch.logsumexp(2 * x.abs().log(), -1, keepdim=True))


class PreNorm(nn.Module):
    """A residual stream that only root-mean-square normalizations read, as in Llama, with an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.n1, self.n2 = nn.RMSNorm(6), nn.RMSNorm(6)
        self.gate, self.up = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.down, self.head = nn.Linear(8, 6, bias=False), nn.Linear(6, 7, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = self.n1(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return self.head(self.n2(x))


Rule = Callable[[Any], Any]


def always_passes(use: Any) -> Any:
    return elementwise.passes(use)


def always_absorbs(use: Any) -> Any:
    use.args["training"] = True
    return normalization.per_channel(use)


def absorbs_in_a_quotient(use: Any) -> Any:
    """Take any division for one by a statistic of what is divided."""
    label = use.label("self")
    if label is not None:
        use.absorb("quotient", label.ids)


class RunningScale(nn.Module):
    """A normalization by a scale that is stored or learned: it does not follow the weights."""

    def __init__(self, width: int, *, learned: bool) -> None:
        super().__init__()
        scale = 1 + torch.rand(width)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def gated(m: Lambda, x: Tensor) -> Tensor:
    """A sum of a normalized path and of one that leaks the scale through a gate."""
    y = m.c(x)
    return m.n(y) * torch.sigmoid(y.mean((2, 3), keepdim=True))


MADE = {
    "leaking gate": Toy(lambda: Lambda(gated, c=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6)), (4, 3, 9, 9), {}),
    "leaking tanh": Toy(
        lambda: Lambda(lambda m, x: m.n(m.c(x)) + torch.tanh(m.c(x)), c=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6)),
        (4, 3, 9, 9),
        {},
    ),
    "learned scale": Toy(lambda: nn.Sequential(nn.Linear(5, 6), RunningScale(6, learned=True)), (8, 5), {}),
    "running scale": Toy(lambda: nn.Sequential(nn.Linear(5, 6), RunningScale(6, learned=False)), (8, 5), {}),
    "bypass": Toy(
        lambda: Lambda(lambda m, x: (m.n(m.c(x)), m.c(x)), c=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6)), (4, 3, 9, 9), {}
    ),
    "used twice": Toy(
        lambda: Lambda(lambda m, x: m.n(m.a(x)) @ m.a.weight, a=nn.Linear(5, 6, bias=False), n=nn.BatchNorm1d(6)),
        (8, 5),
        {},
    ),
}


def toy(name: str) -> Toy:
    return MADE[name] if name in MADE else TOYS[name]


PLANTED: dict[str, tuple[str, str, Rule]] = {
    "a wrong rule for tanh": ("tanh", "tanh", always_passes),
    "a scale leaking through a tanh beside the normalization": ("leaking tanh", "tanh", lambda use: None),
    "a scale leaking through a sigmoid gate": ("squeeze-excite", "sigmoid", lambda use: None),
    "a scale leaking through a gate behind the normalization": ("leaking gate", "sigmoid", lambda use: None),
    "a frozen normalization taken for a live one": ("frozen bn", "batch_norm", always_absorbs),
    "a running scale taken for a statistic": ("running scale", "div.Tensor", absorbs_in_a_quotient),
    "a learned scale taken for a statistic": ("learned scale", "div.Tensor", absorbs_in_a_quotient),
    "an output that bypasses the normalization": ("dense with a bypass", "cat", lambda use: None),
    "a residual sum whose other branch is forgotten": (
        "pre-activation residual",
        "add.Tensor",
        lambda use: use.label("other"),
    ),
    "a normalization taken for one that does not exist": ("conv2d-bn", "batch_norm", lambda use: use.label("input")),
    "a second use of the weight that is overlooked": ("used twice", "matmul", lambda use: None),
}
