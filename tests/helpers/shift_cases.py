"""Networks with the shifts that they have, and how to carry a shift out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from helpers.diagnosis_cases import sharp
from helpers.toy_networks import TOYS, Lambda
from manifold_nets.symmetry.report import ShiftSymmetry


class Stream(nn.Module):
    """A residual stream with normalizations in front of its branches, one of them attention."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.n1, self.n2, self.n3 = nn.Linear(5, 8), nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.n1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.n2(x))))
        return self.head(self.n3(x))


def in_view(m: Any, x: Tensor, *, add: bool) -> Tensor:
    """Attention whose logits get something added, or written over, between all tokens but the first."""
    logits = m.q(x) @ m.k(x).transpose(1, 2)
    more = x[:, 1:] @ x[:, 1:].transpose(1, 2)
    if add:
        logits[:, 1:, 1:] += more
    else:
        logits[:, 1:, 1:] = more
    return logits.softmax(-1) @ x


def hidden(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Build a layer, an operation on its result and the input, and a batch normalization."""
    return lambda: Lambda(lambda m, x: m.n(operation(m.a(x), x)), a=nn.Linear(5, 6), n=nn.BatchNorm1d(6))


def sampled(beyond: str) -> Callable[[], nn.Module]:
    """Build a convolution, of which a grid samples entries, and a batch normalization."""
    grid = 3.0 * torch.rand(4, 5, 5, 2, generator=torch.Generator().manual_seed(2)) - 1.5
    sample = lambda y: F.grid_sample(y, grid.to(y.dtype), padding_mode=beyond, align_corners=False)  # noqa: E731
    return lambda: Lambda(lambda m, x: m.n(sample(m.c(x))), c=nn.Conv2d(3, 6, 3), n=nn.BatchNorm2d(6))


C = nn.Conv2d


IMAGE, LARGE_IMAGE, ROWS, SEQUENCE = (4, 3, 9, 9), (2, 3, 40, 40), (6, 5), (4, 7, 5)


Expected = dict[tuple[str, str], int]


Case = tuple[Callable[[], nn.Module], tuple[int, ...], Expected]


CASES: dict[str, Case] = {
    "conv-bn": (lambda: nn.Sequential(C(3, 6, 3), nn.BatchNorm2d(6)), IMAGE, {("dead bias", "0.bias"): 6}),
    "conv-relu-bn": (lambda: nn.Sequential(C(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), IMAGE, {}),
    "conv-in": (lambda: nn.Sequential(C(3, 6, 3), nn.InstanceNorm2d(6)), IMAGE, {("dead bias", "0.bias"): 6}),
    "conv-gn": (lambda: nn.Sequential(C(3, 6, 3), nn.GroupNorm(3, 6)), IMAGE, {("bias shift", "0.bias"): 3}),
    "conv-max-bn": (
        lambda: nn.Sequential(C(3, 6, 3), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(6)), IMAGE,
        {("dead bias", "0.bias"): 6},
    ),
    "conv-padded mean-bn": (
        lambda: nn.Sequential(C(3, 6, 3), nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(6)), IMAGE, {},
    ),
    "bn-1x1-bn": (
        lambda: nn.Sequential(C(3, 6, 3, bias=False), nn.BatchNorm2d(6), C(6, 4, 1, bias=False), nn.BatchNorm2d(4)),
        IMAGE, {("dead bias", "1.bias"): 6},
    ),
    "bn-3x3-bn": (
        lambda: nn.Sequential(
            C(3, 6, 3, bias=False), nn.BatchNorm2d(6), C(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        ),
        IMAGE, {},
    ),
    "linear-ln": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), ROWS,
        {("bias shift", "0.bias"): 1, ("row shift", "0.weight"): 5},
    ),
    "linear-gn": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6)), ROWS,
        {("bias shift", "0.bias"): 2, ("row shift", "0.weight"): 10},
    ),
    "linear-rms": (lambda: nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6)), ROWS, {}),
    "linear-softmax": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Softmax(-1)), ROWS,
        {("logit shift", "0.bias"): 1, ("row shift", "0.weight"): 5},
    ),
    "logits without a loss": (lambda: nn.Sequential(nn.Linear(5, 6)), ROWS, {}),
    "redundant": (
        lambda: Lambda(lambda m, x: F.relu(m.a(x) + m.b(x.flip(0))), a=nn.Linear(5, 6), b=nn.Linear(5, 6)), ROWS,
        {("redundant biases", "a.bias"): 6},
    ),
    "stream": (
        Stream, SEQUENCE,
        {
            ("bias shift", "enter.bias"): 1, ("row shift", "enter.weight"): 5,
            ("dead bias", "attention.in_proj_bias"): 8, ("bias shift", "attention.out_proj.bias"): 1,
            ("row shift", "attention.out_proj.weight"): 8,
            ("bias shift", "down.bias"): 1, ("row shift", "down.weight"): 12,
        },
    ),
    # More positions than get unknowns of their own.
    "many positions": (
        lambda: Lambda(lambda m, x: m.n(m.c(x).permute(0, 2, 3, 1)), c=C(3, 6, 3), n=nn.LayerNorm(6)), LARGE_IMAGE,
        {("bias shift", "c.bias"): 1, ("row shift", "c.weight"): 27},
    ),
    "many positions, mixed": (
        lambda: Lambda(
            lambda m, x: m.n(m.d(m.c(x)).permute(0, 2, 3, 1)), c=C(3, 6, 3), d=C(6, 6, 3, groups=6), n=nn.LayerNorm(6)
        ),
        LARGE_IMAGE, {("bias shift", "d.bias"): 1},
    ),
    "many positions, two of them compared": (
        lambda: Lambda(
            lambda m, x: m.n((m.c(x) * (m.c(x)[:, :, :1, :1] > m.c(x)[:, :, -1:, -1:])).permute(0, 2, 3, 1)),
            c=C(3, 6, 3), n=nn.LayerNorm(6),
        ),
        LARGE_IMAGE, {},
    ),
    "a sum is written into a view": (
        lambda: Lambda(lambda m, x: in_view(m, x, add=True), q=nn.Linear(5, 6), k=nn.Linear(5, 6)), SEQUENCE,
        {("dead bias", "k.bias"): 6},
    ),
    "a view is written over": (
        lambda: Lambda(lambda m, x: in_view(m, x, add=False), q=nn.Linear(5, 6), k=nn.Linear(5, 6)), SEQUENCE, {},
    ),
    "grid sampler": (sampled("border"), IMAGE, {("dead bias", "c.bias"): 6}),
    "grid sampler, zeros beyond the border": (sampled("zeros"), IMAGE, {}),
    "distances": (
        lambda: Lambda(lambda m, x: torch.cdist(m.a(x), m.a(x.flip(0)) + m.a(x)[:1]), a=nn.Linear(5, 6)), ROWS, {},
    ),
    "distances of rows": (
        lambda: Lambda(lambda m, x: torch.cdist(m.a(x), m.a(x.square())), a=nn.Linear(5, 6)), ROWS,
        {("dead bias", "a.bias"): 6},
    ),
    "larger of two": (hidden(lambda h, x: torch.max(h, h.flip(0))), ROWS, {("dead bias", "a.bias"): 6}),
    "larger of two, one fixed": (hidden(lambda h, x: torch.max(h, x[:, :1])), ROWS, {}),
    "where a comparison holds": (hidden(lambda h, x: torch.where(h > 0.1, h, h.mean(0))), ROWS, {}),
    "where a mask holds": (
        hidden(lambda h, x: torch.where(x[:, :1] > 0.1, h, h.mean(0))), ROWS, {("dead bias", "a.bias"): 6}
    ),
    "integers": (hidden(lambda h, x: h + h.long()), ROWS, {}),
    "variance and mean": (
        hidden(lambda h, x: (h - torch.var_mean(h, 0)[1]) / torch.var_mean(h, 0)[0]), ROWS,
        {("dead bias", "a.bias"): 6},
    ),
    "rows in another order": (
        hidden(lambda h, x: h.index_select(0, torch.tensor([3, 1, 0, 5]))), ROWS, {("dead bias", "a.bias"): 6}
    ),
    "dense": (TOYS["dense"].build, IMAGE, {("dead bias", "a.bias"): 4, ("dead bias", "b.bias"): 5}),
    "weight standardization": (
        TOYS["weight standardization"].build, IMAGE, {("filter shift", "c.weight"): 6},
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    build_model, shape, _ = CASES[name]
    return build_model(), torch.randn(shape, generator=torch.Generator().manual_seed(11))


def found(shifts: tuple[ShiftSymmetry, ...]) -> Expected:
    return {(shift.kind, shift.parameters[0]): shift.count for shift in shifts}


def displaced(model: nn.Module, shift: ShiftSymmetry, index: int) -> nn.Module:
    """The model with 0.7 added along one direction of a shift."""
    moved = copy.deepcopy(model)
    parameters = dict(moved.named_parameters())
    with torch.no_grad():
        if shift.partition is not None:
            mask = shift.partition.group_ids() == shift.groups[index]
            parameters[shift.parameters[0]][mask] += 0.7
        else:
            for name, entries in shift.directions[index].items():
                for entry, coefficient in entries.items():
                    parameters[name].view(-1)[entry] += 0.7 * coefficient
    return moved


def change(model: nn.Module, x: Tensor, shift: ShiftSymmetry, index: int) -> float:
    """Relative change of the output when a shift is carried out, in float64 with negligible eps."""
    twin = sharp(model)
    x = x.double() if x.is_floating_point() else x
    moved = displaced(twin, shift, index)
    with torch.no_grad():
        before, after = twin(x), moved(x)
    return float((before - after).abs().max() / before.abs().max())
