"""Small networks that carry the expected answer: for each weight the number of invariant groups, or None."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass
class Toy:
    """A network, its inputs, and for each weight how many invariant groups it has (None: it has none)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, int | None]
    moves_along: dict[str, set[str]] = field(default_factory=dict)
    integer: bool = False

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(11)
        if self.integer:
            return torch.randint(0, 7, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


class Lambda(nn.Module):
    """A function of some layers."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _seq(*layers: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = copy.deepcopy(nn.Sequential(*layers))
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # drawn anew, so that the values follow the seed of the test
        return model

    return build


def _standardized(m: Lambda, x: Tensor) -> Tensor:
    w = m.c.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / torch.sqrt(w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5)
    return F.conv2d(x, w, m.c.bias)


def _standardized_by_batch_norm(m: Lambda, x: Tensor) -> Tensor:
    w = m.c.weight
    return F.conv2d(x, F.batch_norm(w.reshape(1, 6, -1), None, None, training=True).reshape_as(w))


def _shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def _squeeze_excite(m: Lambda, x: Tensor) -> Tensor:
    x = m.c(x)
    return m.n(x * torch.sigmoid(m.down(F.relu(m.up(x.mean((2, 3), keepdim=True))))))


def _dense(m: Lambda, x: Tensor) -> Tensor:
    a = m.a(x)
    b = m.b(F.relu(m.n1(a)))
    return m.n2(torch.cat([a, b], 1))


def _qk_norm(m: Lambda, x: Tensor) -> Tensor:
    q, k = (F.rms_norm(p(x).unflatten(-1, (2, 4)).transpose(1, 2), (4,)) for p in (m.q, m.k))
    v = m.v(x).unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Biased(nn.Module):
    """A linear map whose bias is a separate addition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.shift


class FromTheRight(nn.Module):
    """A linear map whose weight has one column an output channel, as GPT-2 has them."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    """One matrix an expert, multiplied with all of them at once; each output normalized over the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.bmm(x.expand(3, *x.shape), self.weight)
        return y / y.std(1, keepdim=True)


class Frozen(nn.Module):
    """A batch normalization that always uses its stored statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, training=False)


def C(i: int, o: int, k: int = 3, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **kwargs)  # type: ignore[arg-type]


IMAGE, ROWS, SEQUENCE = (4, 3, 9, 9), (6, 5), (4, 7, 5)
BN, BN1 = nn.BatchNorm2d, nn.BatchNorm1d

TOYS: dict[str, Toy] = {
    "conv1d-bn": Toy(_seq(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (4, 3, 9), {"0.weight": 6}),
    "conv2d-bn": Toy(
        _seq(C(3, 6), BN(6), nn.ReLU(), C(6, 2)),
        IMAGE,
        {"0.weight": 6, "3.weight": None},
        {"0.weight": {"0.bias", "1.running_mean", "1.running_var"}},
    ),
    "conv3d-bn": Toy(_seq(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (3, 2, 4, 4, 4), {"0.weight": 4}),
    "linear-bn": Toy(_seq(nn.Linear(5, 6), nn.BatchNorm1d(6)), ROWS, {"0.weight": 6}),
    "sync-bn": Toy(_seq(C(3, 6), nn.SyncBatchNorm(6)), IMAGE, {"0.weight": 6}),
    "grouped-bn": Toy(_seq(C(4, 6, groups=2), BN(6)), (4, 4, 6, 6), {"0.weight": 6}),
    "depthwise-bn": Toy(_seq(C(4, 4, groups=4), BN(4)), (4, 4, 6, 6), {"0.weight": 4}),
    "transposed-bn": Toy(_seq(nn.ConvTranspose2d(4, 6, 3), BN(6)), (4, 4, 5, 5), {"0.weight": 6}),
    "transposed-grouped-bn": Toy(_seq(nn.ConvTranspose2d(4, 6, 3, groups=2), BN(6)), (4, 4, 5, 5), {"0.weight": 6}),
    "transposed1d-gn": Toy(_seq(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.GroupNorm(2, 6)), (4, 4, 5), {"0.weight": 2}),
    "transposed3d-bn": Toy(_seq(nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4)), (3, 2, 3, 3, 3), {"0.weight": 4}),
    "conv-in": Toy(_seq(C(3, 6), nn.InstanceNorm2d(6, affine=True)), IMAGE, {"0.weight": 6}),
    "conv-gn": Toy(_seq(C(3, 6), nn.GroupNorm(3, 6)), IMAGE, {"0.weight": 3}, {"0.weight": {"0.bias"}}),
    "linear-ln": Toy(_seq(nn.Linear(5, 6), nn.LayerNorm(6)), ROWS, {"0.weight": 1}, {"0.weight": {"0.bias"}}),
    "linear-rms": Toy(_seq(nn.Linear(5, 6, bias=False), nn.RMSNorm(6)), ROWS, {"0.weight": 1}),
    "hand-written rms": Toy(lambda: Lambda(lambda m, x: _rms(m.a(x)), a=nn.Linear(5, 6)), ROWS, {"a.weight": 1}),
    "f-normalize": Toy(
        lambda: Lambda(lambda m, x: F.normalize(m.a(x), dim=1), a=nn.Linear(5, 6)),
        ROWS,
        {"a.weight": 1},
    ),
    "mlp-relu-bn": Toy(
        _seq(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6), nn.BatchNorm1d(6)),
        ROWS,
        {"0.weight": 1, "2.weight": 6},
        {"0.weight": {"0.bias", "2.bias", "3.running_mean", "3.running_var"}},
    ),
    "mlp-relu-bn without a middle bias": Toy(
        _seq(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)),
        ROWS,
        {"0.weight": 1, "2.weight": 6},
    ),
    "conv-relu-bn": Toy(
        _seq(C(3, 6), nn.ReLU(), BN(6)),
        IMAGE,
        {"0.weight": 6},
        {"0.weight": {"0.bias", "2.running_mean", "2.running_var"}},
    ),
    "homogeneous path": Toy(
        _seq(
            C(3, 6),
            nn.LeakyReLU(0.1, inplace=True),
            nn.MaxPool2d(2),
            nn.ZeroPad2d(1),
            nn.Dropout(0.3),
            nn.Upsample(scale_factor=2),
            nn.AvgPool2d(2),
            nn.PReLU(6),
            BN(6),
        ),
        IMAGE,
        {"0.weight": 6},
    ),
    "tanh": Toy(_seq(C(3, 6), nn.Tanh(), BN(6)), IMAGE, {"0.weight": None}),
    "squeeze-excite": Toy(
        lambda: Lambda(_squeeze_excite, c=C(3, 6), up=C(6, 8, 1), down=C(8, 6, 1), n=BN(6)),
        IMAGE,
        {"c.weight": None, "up.weight": None, "down.weight": None},
    ),
    "post-activation residual": Toy(
        lambda: Lambda(lambda m, x: F.relu(m.n(m.c(x)) + x), c=C(3, 3, padding=1), n=BN(3)), IMAGE, {"c.weight": 3}
    ),
    "pre-activation residual": Toy(
        lambda: Lambda(lambda m, x: m.n2(x + m.c(F.relu(m.n(x)))), c=C(3, 3, padding=1), n=BN(3), n2=BN(3)),
        IMAGE,
        {"c.weight": None},
    ),
    "sum of one weight with itself": Toy(
        lambda: Lambda(lambda m, x: m.n(m.c(x) + m.c(x.flip(3))), c=C(3, 6, bias=False), n=BN(6)),
        IMAGE,
        {"c.weight": 6},
    ),
    "dense": Toy(
        lambda: Lambda(_dense, a=C(3, 4, padding=1), b=C(4, 5, padding=1), n1=BN(4), n2=BN(9)),
        IMAGE,
        {"a.weight": 4, "b.weight": 5},
        {"a.weight": {"a.bias", "n1.running_mean", "n1.running_var", "n2.running_mean", "n2.running_var"}},
    ),
    "dense with a bypass": Toy(
        lambda: Lambda(lambda m, x: torch.cat([m.n(m.c(x)), m.c(x)], 1), c=C(3, 4), n=BN(4)), IMAGE, {"c.weight": None}
    ),
    "half of the channels bypass": Toy(
        lambda: Lambda(lambda m, x: (lambda a, b: torch.cat([m.n(a), b], 1))(*m.c(x).chunk(2, 1)), c=C(3, 4), n=BN(2)),
        IMAGE,
        {"c.weight": None},
    ),
    "groups without a view": Toy(
        lambda: Lambda(lambda m, x: m.n(_shuffle(m.c(x), 2)), c=C(3, 6), n=nn.GroupNorm(2, 6)), IMAGE, {"c.weight": 1}
    ),
    "strided groups": Toy(
        lambda: Lambda(lambda m, x: m.n(_shuffle(m.c(x), 2)), c=C(3, 6, bias=False), n=nn.GroupNorm(3, 6)),
        IMAGE,
        {"c.weight": 3},
    ),
    "chunk and cat": Toy(
        lambda: Lambda(lambda m, x: m.n(torch.cat(m.c(x).chunk(2, 1)[::-1], 1)), c=C(3, 6), n=BN(6)),
        IMAGE,
        {"c.weight": 6},
    ),
    "flatten-linear-bn": Toy(
        _seq(C(3, 4), nn.Flatten(), nn.Linear(196, 5, bias=False), nn.BatchNorm1d(5)),
        IMAGE,
        {"0.weight": 1, "2.weight": 5},
    ),
    "flatten-bn": Toy(_seq(C(3, 4), nn.Flatten(), nn.BatchNorm1d(196)), IMAGE, {"0.weight": 4}),
    "shared weight": Toy(
        lambda: Lambda(lambda m, x: m.n2(m.c(F.relu(m.n1(m.c(x))))), c=C(3, 3, padding=1), n1=BN(3), n2=BN(3)),
        IMAGE,
        {"c.weight": 3},
    ),
    "shared weight with a bypass": Toy(
        lambda: Lambda(lambda m, x: m.c(F.relu(m.n1(m.c(x)))), c=C(3, 3, padding=1), n1=BN(3)),
        IMAGE,
        {"c.weight": None},
    ),
    "weight standardization": Toy(lambda: Lambda(_standardized, c=C(3, 6)), IMAGE, {"c.weight": 6}),
    "weight standardization by batch_norm": Toy(
        lambda: Lambda(_standardized_by_batch_norm, c=C(3, 6, bias=False)), IMAGE, {"c.weight": 6}
    ),
    "weight_norm": Toy(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)),
        ROWS,
        {"parametrizations.weight.original0": None, "parametrizations.weight.original1": 6},
    ),
    "separate bias": Toy(
        lambda: nn.Sequential(Biased(), nn.LayerNorm(6)),
        ROWS,
        {"0.weight": 1},
        {"0.weight": {"0.shift"}},
    ),
    "frozen bn": Toy(lambda: nn.Sequential(C(3, 6), Frozen()), IMAGE, {"0.weight": None}),
    "qk-norm": Toy(
        lambda: Lambda(_qk_norm, q=nn.Linear(5, 8, bias=False), k=nn.Linear(5, 8, bias=False), v=nn.Linear(5, 8)),
        SEQUENCE,
        {"q.weight": 2, "k.weight": 2, "v.weight": None},
    ),
    "embedding-ln": Toy(_seq(nn.Embedding(7, 6), nn.LayerNorm(6)), (4, 5), {"0.weight": 7}, integer=True),
    "embedding with a zero row": Toy(
        _seq(nn.Embedding(7, 6, padding_idx=3), nn.LayerNorm(6)), (4, 5), {"0.weight": 1}, integer=True
    ),
    "embedding-bn": Toy(
        lambda: Lambda(lambda m, x: m.n(m.e(x).mT), e=nn.Embedding(7, 6), n=BN1(6)),
        (4, 5),
        {"e.weight": 6},
        integer=True,
    ),
    "embedding of a mean": Toy(
        lambda: Lambda(lambda m, x: m.n(m.e(x).mean(1)), e=nn.Embedding(7, 6), n=nn.LayerNorm(6)),
        (4, 5),
        {"e.weight": 1},
        integer=True,
    ),
    "embedding with a linear map": Toy(
        _seq(nn.Embedding(7, 6), nn.Linear(6, 4, bias=False), nn.RMSNorm(4)),
        (4, 5),
        {"0.weight": 7, "1.weight": 1},
        integer=True,
    ),
    "interleaved heads": Toy(
        lambda: Lambda(
            lambda m, x: F.rms_norm(m.a(x).unflatten(-1, (4, 2)).mT, (4,)).flatten(1),
            a=nn.Linear(5, 8, bias=False),
        ),
        ROWS,
        {"a.weight": 2},
    ),
    "interleaved heads of heads": Toy(
        lambda: Lambda(
            lambda m, x: F.rms_norm(m.a(x).unflatten(-1, (2, 3, 2)).mT, (3,)).flatten(1),
            a=nn.Linear(5, 12, bias=False),
        ),
        ROWS,
        {"a.weight": 4},
    ),
    "unequal groups": Toy(
        lambda: Lambda(
            lambda m, x: torch.cat([F.rms_norm(part, part.shape[1:]) for part in m.a(x).split([2, 4], 1)], 1),
            a=nn.Linear(5, 6, bias=False),
        ),
        ROWS,
        {"a.weight": 1},
    ),
    "weight from the right": Toy(
        lambda: nn.Sequential(FromTheRight(5, 6), BN1(6)),
        ROWS,
        {"0.weight": 6},
        {"0.weight": {"0.bias", "1.running_mean", "1.running_var"}},
    ),
    "experts": Toy(lambda: Experts(), (6, 5), {"weight": 12}),
    "unused": Toy(
        lambda: Lambda(lambda m, x: m.a(x), a=C(3, 6), b=C(3, 6)),
        IMAGE,
        {"a.weight": None, "b.weight": None},
    ),
}
