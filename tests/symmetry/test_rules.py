"""Every rule against numbers: multiply the filters as the rule allows, run the operation, compare with its label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers import one_needs_newer_torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.symmetry.equations import Break, Label, Scales
from manifold_nets.symmetry.graph import overload_key
from manifold_nets.symmetry.rules import RULES, SHIFT_RULES, arithmetic, elementwise, movement
from manifold_nets.symmetry.rules.movement import reshape_ids
from manifold_nets.symmetry.trace import trace
from manifold_nets.symmetry.weight_structure import follow_weight

FILTERS = 6
FIXED = torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


class AfterConvolution(nn.Module):
    """An operation on the output (4, 6, 5, 5) of a convolution, then a marker at which the label is read."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, FILTERS, 3, bias=False, dtype=torch.float64)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return torch.sinh(self.operation(self.conv(x)))


def _w(*shape: int) -> Tensor:
    # torch 2.8 cannot trace a generator.
    return torch.from_numpy(np.random.default_rng(len(shape)).standard_normal(shape))


def _with_ones(values: Tensor) -> Tensor:
    return F.pad(values, (0, 1), value=1.0)


def _over_last(sums: Tensor) -> Tensor:
    return sums[..., :-1] / sums[..., -1:]


def _set(y: Tensor, where: Callable[[Tensor], Any], value: Any) -> Tensor:
    y = y.clone()
    y[where(y)] = value
    return y


def _in_place(y: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(y)
    return y


# What passes a scale, however it moves it.
PASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "prelu": lambda y: F.prelu(y, _w(6).abs()),
    "abs": torch.abs,
    "neg": torch.neg,
    "relu in place": lambda y: F.relu(y, inplace=True),
    "in place, result not used": lambda y: (F.relu_(y), y)[1],
    "view": lambda y: y.view(4, 6, 25),
    "flatten": lambda y: y.flatten(1),
    "reshape that cuts channels": lambda y: y.reshape(4, 2, 3, 25),
    "unflatten": lambda y: y.unflatten(1, (3, 2)),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "transpose": lambda y: y.transpose(1, 3),
    "movedim": lambda y: y.movedim(1, -1),
    "squeeze": lambda y: y.unsqueeze(0).squeeze(0),
    "squeeze all": lambda y: y[:1].squeeze(),
    "expand": lambda y: y.unsqueeze(0).expand(3, -1, -1, -1, -1),
    "repeat": lambda y: y.repeat(1, 2, 1, 1),
    "repeat in front": lambda y: y.repeat(2, 1, 1, 1, 1),
    "repeat_interleave": lambda y: y.repeat_interleave(3, 1),
    "repeat_interleave along another axis": lambda y: y.repeat_interleave(2, dim=-1),
    "repeat_interleave of all": lambda y: y.repeat_interleave(2),
    "select": lambda y: y[:, 4],
    "slice": lambda y: y[:, 1:5:2],
    "slice rows": lambda y: y[:, :, 1:],
    "narrow": lambda y: y.narrow(1, 2, 3),
    "crop channels": lambda y: F.pad(y.transpose(1, 3), (-1, -1)),
    "flip": lambda y: y.flip(1),
    "roll": lambda y: y.roll(2, 1),
    "chunk": lambda y: y.chunk(2, 1)[1],
    "split": lambda y: y.split(4, 1)[1],
    "split with sizes": lambda y: y.split([1, 5], 1)[1],
    "unbind": lambda y: y.unbind(1)[3],
    "cat with a constant": lambda y: torch.cat([FIXED, y], 1),
    "cat along another axis": lambda y: torch.cat([y, y], 2),
    "stack": lambda y: torch.stack([y, -y], 2),
    "pad with zeros": lambda y: F.pad(y, (1, 2)),
    "pad channels": lambda y: F.pad(y, (0, 0, 0, 0, 1, 1))[:, 1:-1],
    "reflect": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda y: F.pad(y, (1, 1, 1, 1), mode="replicate"),
    "reflect channels": lambda y: F.pad(y.transpose(1, 3), (2, 3, 1, 0), mode="reflect"),
    "replicate channels": lambda y: F.pad(y.transpose(1, 3), (2, 3, 1, 0), mode="replicate"),
    "wrap channels around": lambda y: F.pad(y.transpose(1, 3), (2, 3, 1, 0), mode="circular"),
    "pad with a constant": lambda y: F.pad(y, (1, 0, 0, 2), value=2.0),
    "pad channels with a constant": lambda y: F.pad(y.transpose(1, 3), (1, 2), value=-1.0),
    "linear attention, values": lambda y: _over_last(_w(4, 7, 25) @ _with_ones(y.flatten(2).transpose(1, 2))),
    "linear attention, keys": lambda y: _over_last(y.flatten(2) @ _with_ones(_w(4, 25, 3))),
    "advanced index": lambda y: y[:, :, torch.tensor([0, 2])],
    "pixel shuffle": lambda y: F.pixel_shuffle(y[:, :4], 2),
    "channel shuffle": lambda y: F.channel_shuffle(y, 2),
    "max pool": lambda y: F.max_pool2d(y, 2),
    "max pool and unpool": lambda y: F.max_unpool2d(*F.max_pool2d(y[..., :4, :4], 2, return_indices=True), 2),
    "average pool": lambda y: F.avg_pool2d(y, 3, padding=1),
    "adaptive": lambda y: F.adaptive_avg_pool2d(y, 2),
    "adaptive max": lambda y: F.adaptive_max_pool2d(y, 2),
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "times a constant": lambda y: y * FIXED,
    "times two": lambda y: 2 * y,
    "constant over": lambda y: FIXED / y,
    "over a constant": lambda y: y / FIXED,
    "product with itself": lambda y: y * F.relu(y),
    "pow": lambda y: y.pow(3),
    "square and root": lambda y: (y.square() + 0).sqrt(),
    "variance": lambda y: y.var((2, 3)),
    "standard deviation": lambda y: y.std((2, 3)),
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "max": lambda y: y.flatten(2).max(2)[0],
    "amax": lambda y: y.amax((2, 3)),
    "sum with itself": lambda y: y + F.relu(y),
    "difference": lambda y: y - y.mean((2, 3), keepdim=True),
    "mask": lambda y: y.masked_fill(FIXED > 0, 0.0),
    "detach": lambda y: y.detach(),
    "contiguous": lambda y: y.permute(0, 2, 3, 1).contiguous(),
    "clamp at zero": lambda y: y.clamp(min=0) + y.clip(max=0),
    "clamp at an eps": lambda y: y / y.norm(dim=(2, 3), keepdim=True).clamp(min=1e-300),
    "threshold at zero": lambda y: F.threshold(y, 0.0, 0.0),
    "where": lambda y: torch.where(y > 0, y, 0.1 * y),
    "where, a number": lambda y: torch.where(y > 0, y, 0.0),
    "larger of two": lambda y: torch.maximum(y, -0.5 * y) + torch.max(y, torch.zeros_like(y)),
    "smaller than the mean": lambda y: torch.min(y, y.mean((2, 3), keepdim=True)),
    "compared with the mean": lambda y: y * (y > y.mean((2, 3), keepdim=True)),
    "compared with zero": lambda y: y * (y.lt(0) | y.ge(0)) * y.bool(),
    "entries below zero are set": lambda y: _set(y, lambda z: z < 0, 0.0),
    "a slice is set": lambda y: _set(y, lambda z: (slice(None), slice(None), 1), 0.0),
    "slices of zeros are set": lambda y: _set(torch.zeros_like(y), lambda z: (slice(None), slice(3)), y[:, :3]),
    "a slice in place": lambda y: _in_place(y.clone(), lambda z: z[:, 2:4].relu_()),
    "a slice of a view in place": lambda y: _in_place(y.clone(), lambda z: z.flatten(2)[:, 1].mul_(3)),
    "transposed in place": lambda y: _in_place(y.clone(), lambda z: z.transpose_(1, 2)),
    "another axis in place": lambda y: _in_place(y.clone(), lambda z: z.unsqueeze_(0)),
    "detached in place": lambda y: _in_place(y.clone(), lambda z: z.detach_()),
    "written to an output": lambda y: torch.mul(y.detach(), FIXED, out=torch.empty_like(FIXED)),
    "sorted": lambda y: y.flatten(2).sort(2)[0],
    "largest": lambda y: y.flatten(2).topk(3, 2)[0],
    "median": lambda y: y.flatten(2).median(2)[0],
    "order": lambda y: y.flatten(2).gather(2, y.flatten(2).argsort(2)),
    "variance and mean": lambda y: torch.cat(torch.var_mean(y, (2, 3)), 1),
    "deviation and mean": lambda y: torch.stack(torch.std_mean(y, (2, 3)), 1),
    "linalg.norm": lambda y: torch.linalg.norm(y, dim=(2, 3)),
    "norm of order 0": lambda y: torch.linalg.vector_norm(y, 0, dim=(2, 3)) * y.mean((2, 3)),
    "cosine similarity": lambda y: torch.cosine_similarity(y.flatten(2), FIXED.flatten(2), 2) * y.mean((2, 3)),
    "lerp": lambda y: torch.lerp(y, F.relu(y), 0.3),
    "index_select": lambda y: y.index_select(2, torch.tensor([3, 0, 0])),
    "scatter_add": lambda y: torch.zeros_like(y).scatter_add(2, torch.zeros_like(y, dtype=torch.long), y),
    "index_add": lambda y: torch.zeros_like(y[:, :, :2]).index_add(2, torch.tensor([0, 1, 1, 0, 1]), y),
    "index_add in place": lambda y: torch.zeros_like(y[:, :, :2]).index_add_(2, torch.tensor([0, 1, 1, 0, 1]), y),
    "einsum of two": lambda y: torch.einsum("nchw,nchw->nc", y, F.relu(y)),
    "einsum with an ellipsis": lambda y: torch.einsum("...hw,wk->...hk", y, _w(5, 2)),
    "einsum without a result": lambda y: torch.einsum("cbij,ik", y, _w(5, 2)),
    "vector product": lambda y: y[0, 1].flatten() @ y[0, 2].flatten() * y,
    "roll all": lambda y: y.roll(3),
    "product over space": lambda y: y.flatten(2)[:, :, :3].prod(2),
    "product over channels": lambda y: y[:, :3].prod(1),
    "grid sampler": lambda y: F.grid_sample(y, _w(4, 3, 3, 2), align_corners=False),
    "grid sampler in space and time": lambda y: F.grid_sample(
        y[:, :, None], _w(4, 1, 3, 3, 3), mode="nearest", padding_mode="border", align_corners=True
    ),
    "numbers for what is not finite": lambda y: y.nan_to_num(),
    "outer product": lambda y: torch.outer(y[0, :, 0, 0], y[1, :, 1, 1]),
    "broadcast tensors": lambda y: torch.broadcast_tensors(y, FIXED[0], y[:, :, :1])[2] * FIXED,
    "complex numbers and back": lambda y: torch.view_as_real(torch.view_as_complex(y[..., :2].contiguous()) * 2j),
    "sorted in their own": lambda y: y * torch.searchsorted(y.flatten(2).sort(2)[0], y.flatten(2)).view_as(y),
    "bins of zero": lambda y: y * torch.bucketize(y, torch.zeros(1, dtype=y.dtype)),
    "lists of products": lambda y: torch._foreach_mul([y, FIXED], 2.0)[0],
    "lists of products in place": lambda y: _in_place(
        y.clone(), lambda z: torch._foreach_mul_([z, FIXED.clone()], 3.0)
    ),
    "vmap": lambda y: torch.vmap(lambda z: F.relu(z) * z.mean((1, 2), keepdim=True))(y),
}
# What demands the same scale of several filters, then passes it.
JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda y: F.conv2d(y, _w(5, 6, 3, 3)),
    "grouped convolution": lambda y: F.conv2d(y, _w(8, 3, 3, 3), groups=2),
    "depthwise convolution": lambda y: F.conv2d(y, _w(12, 1, 3, 3), groups=6),
    "transposed": lambda y: F.conv_transpose2d(y, _w(6, 2, 3, 3), groups=3),
    "linear": lambda y: F.linear(y.permute(0, 2, 3, 1), _w(5, 6)),
    "linear along space": lambda y: F.linear(y, _w(3, 5)),
    "matmul": lambda y: y.flatten(2).transpose(1, 2) @ _w(6, 4),
    "matmul from the left": lambda y: _w(4, 6) @ y.flatten(2),
    "attention values": lambda y: F.scaled_dot_product_attention(
        _w(4, 7, 8), _w(4, 25, 8), y.flatten(2).transpose(1, 2)
    ),
    "mean over channels": lambda y: y.mean(1),
    "sum of two channels": lambda y: y[:, :3] + y[:, 3:],
    "product of two channels": lambda y: y[:, :2] * y[:, 2:4],
    "norm": lambda y: y.norm(dim=1),
    "average pool over channels": lambda y: F.avg_pool2d(y.transpose(1, 3), 2),
    "index over channels": lambda y: y[:, torch.tensor([0, 2])],
    "index_select over channels": lambda y: y.index_select(1, torch.tensor([0, 2])),
    "channels below the largest": lambda y: y * (y < y.amax(1, keepdim=True)),
    "argmax over channels": lambda y: y * F.one_hot(y.argmax(1), 6).movedim(-1, 1),
    "sorted channels": lambda y: y.sort(1)[0],
    "einsum": lambda y: torch.einsum("nchw,ck->nkhw", y, _w(6, 3)),
    "einsum of two, channels": lambda y: torch.einsum("nchw,ndhw->ncd", y, y).sum(2),
    "baddbmm": lambda y: torch.baddbmm(torch.zeros(4, 25, 1, dtype=y.dtype), y.flatten(2).mT, _w(4, 6, 3), alpha=2.0),
    "addbmm": lambda y: torch.addbmm(torch.zeros(25, 3, dtype=y.dtype), y.flatten(2).mT, _w(4, 6, 3)),
    "addmm": lambda y: torch.addmm(torch.zeros(3, dtype=y.dtype), y.flatten(2)[0].T, _w(6, 3)),
    "entries below zero are set to others": lambda y: _set(y, lambda z: z < 0, y.mean()),
    "distances": lambda y: torch.cdist(y[:, :3].flatten(2), y[:, 3:].flatten(2)),
    "distances along channels": lambda y: torch.cdist(y[0], y[1], p=1.0),
    "sorted in another": lambda y: y[0] * torch.searchsorted(y[1].sort(-1)[0], y[0].flip(0)),
    "complex numbers of channels": lambda y: torch.view_as_real(
        torch.view_as_complex(y[:, :2].movedim(1, -1).contiguous()) * 2j
    ),
    "embedding bag": lambda y: F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), y[0].flatten(1), mode="max"),
}
# What refuses scales.
REFUSES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "softmax": lambda y: y.softmax(1),
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "clamp": lambda y: y.clamp(-1, 1),
    "plus a constant": lambda y: y + 1,
    "plus a tensor": lambda y: y + FIXED,
    "pad with a constant, then sum": lambda y: F.pad(y, (1, 1), value=2.0).sum(3),
    "cat then sum": lambda y: torch.cat([y, FIXED], 1).sum(1),
    "attention queries": lambda y: F.scaled_dot_product_attention(y, FIXED, FIXED),
    "where": lambda y: torch.where(FIXED > 0, y, FIXED),
    "compared with a constant": lambda y: y * (y.abs() < 0.5),
    "grid": lambda y: F.grid_sample(FIXED, y[:, :2].movedim(1, -1), align_corners=False),
    "distances to a tensor": lambda y: torch.cdist(y, FIXED),
    "bins": lambda y: y * torch.bucketize(y, torch.tensor([-0.3, 0.2], dtype=y.dtype)),
    "sorted in a tensor": lambda y: y * torch.searchsorted(FIXED.sort(-1)[0], y),
    "another number for what is not finite": lambda y: y.sqrt().nan_to_num(nan=2.0),
    "lists of products with each other": lambda y: torch._foreach_mul([y], [y])[0],
    "rows of a norm that is at most one": lambda y: F.embedding(torch.tensor([0, 1]), y[0, 0] + 0, max_norm=1.0),
    "compared with a tensor": lambda y: y * (y < FIXED),
    "smaller of two": lambda y: torch.min(y, torch.tensor(0.3, dtype=y.dtype)),
    "larger of two": lambda y: torch.maximum(FIXED, y),
    "clamp at a tensor": lambda y: y.clamp(max=FIXED.abs()),
    "integers": lambda y: y * y.long(),
    "rounded": lambda y: y * y.round(),
    "floor division": lambda y: torch.div(y, 0.1, rounding_mode="floor"),
    "sign of a difference": lambda y: y * torch.sign(y - 0.3),
    "threshold": lambda y: F.threshold(y, 0.2, 0.0),
    "renorm": lambda y: y.renorm(2, 0, 1.0),
    "a power of a number": lambda y: torch.pow(2.0, y),
    "entries below zero are set to one": lambda y: _set(y, lambda z: z < 0, 1.0),
    "sum written to an output": lambda y: torch.add(y.detach(), FIXED, out=torch.empty_like(FIXED)),
    "added into a view": lambda y: _in_place(y.clone(), lambda z: z[:, :2].add_(1)),
    "added through a view": lambda y: _in_place(y.clone(), lambda z: z.view(4, -1).add_(1)),
}


def label_error(operation: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[float, int]:
    """Largest relative error of the predicted scaling, and how many scales are free."""
    torch.manual_seed(3)
    model = AfterConvolution(operation)
    x = torch.randn(4, 3, 7, 7, dtype=torch.float64)
    seen: list[Any] = []

    def read(use: Any) -> Any:
        seen.append((use.label("self"), use.shape("self")))
        return None

    monkeypatch.setitem(RULES, "sinh", read)
    structure = follow_weight(trace(model, ((x,), {})), "conv.weight")
    scales = structure.scales
    logarithms = np.zeros(scales.count)  # zeros on the way have scales of their own
    for scale in scales.free:
        logarithms[scale] = 0.4 + 0.3 * scale
    for scale in range(scales.count):
        logarithms[scale] = sum(c * logarithms[k] for k, c in scales.form(scale + 1).items())
    alpha = np.exp(logarithms[:FILTERS])
    free = sum(scale < FILTERS for scale in scales.free)
    with torch.no_grad():
        before = operation(model.conv(x)).clone()
        model.conv.weight *= torch.from_numpy(alpha).reshape(-1, 1, 1, 1)
        after = operation(model.conv(x))
    predicted = before
    if seen and seen[-1][0] is not None:
        label = seen[-1][0]
        assert len(label.ids.shape) == len(before.shape)
        numbers, inverse = np.unique(label.ids, return_inverse=True)
        exponents = [sum(c * logarithms[k] for k, c in scales.form(n).items()) for n in numbers.tolist()]
        factors = np.exp(exponents)[inverse.reshape(label.ids.shape)]
        predicted = before * torch.from_numpy(np.broadcast_to(factors, before.shape).copy())
    return float((after - predicted).abs().max() / before.abs().max()), free


TOLERANCE = 1e4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("name", one_needs_newer_torch(PASSES, "vmap", "2.10", "torch.export refuses torch.vmap"))
def test_a_rule_that_passes_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, free = label_error(PASSES[name], monkeypatch)
    assert error <= TOLERANCE
    assert free == FILTERS


@pytest.mark.parametrize("name", JOINS)
def test_a_rule_that_joins_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, free = label_error(JOINS[name], monkeypatch)
    assert error <= TOLERANCE
    assert 0 < free <= FILTERS


@pytest.mark.parametrize("name", REFUSES)
def test_a_rule_that_refuses_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, free = label_error(REFUSES[name], monkeypatch)
    assert error <= TOLERANCE
    assert free < FILTERS


def pads_with_zeros(use: Any) -> Any:
    """The rule of a padding, taken for one with zeros."""
    use.args["value"] = 0.0
    return movement.pad(use)


@pytest.mark.parametrize(
    ("name", "op", "wrong"),
    [
        ("sigmoid", "sigmoid", elementwise.passes),
        ("transpose", "transpose.int", elementwise.passes),
        ("roll", "roll", elementwise.passes),
        ("sum of two channels", "add.Tensor", lambda use: use.label("self")),
        ("pow", "pow.Tensor_Scalar", elementwise.passes),
        ("channel shuffle", "channel_shuffle", elementwise.passes),
        ("reflect channels", "pad", elementwise.passes),
        ("pad with a constant", "pad", elementwise.passes),
        ("linear attention, values", "pad", pads_with_zeros),
        ("compared with a constant", "lt.Scalar", elementwise.sign),
        ("smaller of two", "min.other", elementwise.passes),
        ("integers", "to.dtype", lambda use: None),
        ("entries below zero are set to one", "index_put masked_fill.Scalar", lambda use: use.label("self")),
        ("added through a view", "add.Tensor", elementwise.passes),
        ("product over channels", "prod.dim_int", elementwise.passes),
        ("grid", "grid_sampler", elementwise.shape_only),
        ("outer product", "outer", lambda use: None),
        ("distances to a tensor", "cdist", lambda use: Label(use.label("x1").ids[..., :1])),
        ("bins", "bucketize.Tensor", elementwise.sign),
        ("sorted in another", "searchsorted.Tensor", elementwise.sign),
        ("another number for what is not finite", "nan_to_num", elementwise.passes),
        ("broadcast tensors", "broadcast_tensors", lambda use: [None] * 3),
        ("complex numbers of channels", "view_as_complex", lambda use: Label(use.label("self").ids[..., 0])),
        ("lists of products", "_foreach_mul.Scalar", lambda use: [None] * 2),
        (
            "lists of products with each other",
            "_foreach_mul.List",
            lambda use: [use.label_of(use.args["self"][0])],
        ),
        ("rows of a norm that is at most one", "embedding_renorm", elementwise.passes),
        ("sorted channels", "sort", lambda use: [use.label("self"), None]),
        ("einsum of two", "einsum", lambda use: use.label_of(use.args["tensors"][0])),
        ("variance and mean", "var_mean.dim", lambda use: [use.label("self")] * 2),
    ],
)
def test_a_wrong_rule_is_noticed(name: str, op: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: the same check with a planted rule."""
    for form in op.split():  # of which a release of torch takes one
        monkeypatch.setitem(RULES, form, wrong)
    operation = {**PASSES, **JOINS, **REFUSES}[name]
    with pytest.raises((AssertionError, ValueError)):
        assert label_error(operation, monkeypatch)[0] <= TOLERANCE


class TermBeforeNormalization(nn.Module):
    """Something is added to the result of a convolution: a number, or a term for each sample and channel."""

    def __init__(self, normalization: nn.Module, number: float | None = None) -> None:
        super().__init__()
        self.conv, self.term, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.Linear(4, 6), nn.Conv2d(6, 2, 1)
        self.normalization, self.number = normalization, number

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        term: Any = self.term(t)[:, :, None, None] if self.number is None else self.number
        return self.head(self.normalization((self.conv(x) + term).contiguous()).relu())


TERMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "one channel a group": (lambda: TermBeforeNormalization(nn.GroupNorm(6, 6)), 6),
    "two channels a group": (lambda: TermBeforeNormalization(nn.GroupNorm(3, 6)), 0),
    "a number, three channels a group": (lambda: TermBeforeNormalization(nn.GroupNorm(2, 6), 0.5), 2),
    "a number, instance normalization": (lambda: TermBeforeNormalization(nn.InstanceNorm2d(6), 0.5), 6),
    "a number, its mean is stored": (lambda: TermBeforeNormalization(nn.BatchNorm2d(6), 0.5), 0),
}


def groups_of(model: nn.Module) -> tuple[int, str]:
    found = mn.diagnose(model, (torch.randn(4, 3, 8, 8), torch.randn(4, 4)))["conv.weight"]
    return 0 if found.partition is None else found.partition.n_groups, found.status


@pytest.mark.parametrize("name", TERMS)
def test_what_a_normalization_subtracts_does_not_hinder_a_scale(name: str) -> None:
    build, groups = TERMS[name]
    torch.manual_seed(0)
    assert groups_of(build())[0] == groups


def test_a_term_that_is_wrongly_taken_for_subtracted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: the channels of a group are forgotten."""
    monkeypatch.setattr(arithmetic, "_subtracts", lambda user, source, shape: all(n == 1 for n in shape[2:]))
    torch.manual_seed(0)
    assert groups_of(TERMS["two channels a group"][0]()) == (3, "disagreement")


# Overloads of operations with a rule that are left unknown on purpose, each for a reason of its own.
LEFT_UNKNOWN = {
    "addmm.dtype addbmm.dtype baddbmm.dtype bmm.dtype mm.dtype": "products of GPUs in two precisions",
    "view.dtype": "reads the bits of numbers as other numbers",
    "where": "returns indices, as many as the data say",
    "copy.Dict_Tensor copy.Tensor copy.int copy.float sort.Tensor index.list_Tensor eq.Tensor_list ne.Tensor_list": (
        "of scripts"
    ),
    "einsum.sublist index.Tensor_hacked_twin index_put.hacked_twin mH.a mT.a matrix_H.a numpy_T.a": "of scripts",
    "narrow.Tensor repeat_interleave.Tensor tensor_split.tensor_indices_or_sections": "cuts by computed numbers",
    "_sparse_mm.reduce": "maxima and means over what is not zero",
    "scatter.reduce scatter.value_reduce": "adds to, or multiplies, entries; deprecated",
}

# What older releases of torch do not have.
NEWER = {"rand_like.generator", "randn_like.generator"}


def overloads(name: str) -> list[torch._ops.OpOverload]:
    """The overloads of an operation, in place or not, that take a tensor and return a new one or write into it."""
    packets = [getattr(torch.ops.aten, form, None) for form in (name, f"{name}_")]
    found = [getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()]
    return [
        overload
        for overload in found
        if any("Tensor" in str(argument.type) for argument in overload._schema.arguments)
        and not any(argument.is_out for argument in overload._schema.arguments)
        and "name" not in overload._schema.overload_name  # named tensors, which torch gave up
    ]


def undecided(table: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The overloads of a table's operations that are neither in it nor left out on purpose, and what torch lacks."""
    keys = {key for key in table if not key.startswith(("operator.", "torch."))}
    left = {key for keys in LEFT_UNKNOWN for key in keys.split()}
    known = {overload_key(o) for name in {key.partition(".")[0] for key in keys} for o in overloads(name)}
    return known - keys - left, keys - known - NEWER


def test_every_overload_of_an_operation_with_a_rule_is_decided() -> None:
    assert undecided(RULES) == (set(), set())
    # A shift is refused by what only a scale passes, so every overload in either table is decided for shifts as well.
    assert undecided({**RULES, **SHIFT_RULES}) == (set(), set())
    assert not RULES.keys() & {key for keys in LEFT_UNKNOWN for key in keys.split()}
    # Sabotage: an overload without a decision, and a name that torch does not have, are seen.
    assert undecided({"max": None, "softsign": None}) == ({"max.dim", "max.other"}, {"softsign"})


def test_in_place_forms_share_the_rule_of_the_form_with_the_same_arguments() -> None:
    for key in RULES:
        forms = [o for o in overloads(key.partition(".")[0]) if overload_key(o) == key]
        signatures = {tuple(argument.name for argument in form._schema.arguments[1:]) for form in forms}
        assert len(signatures) <= 1, (key, signatures)


def test_an_operation_of_another_library_is_not_taken_for_one_of_torch() -> None:
    with torch.library._scoped_library("manifold_nets_test", "DEF") as library:
        library.define("relu(Tensor x) -> Tensor")
        library.impl("relu", lambda x: torch.tanh(x), "CompositeExplicitAutograd")
        torch.library.register_fake("manifold_nets_test::relu", torch.empty_like, lib=library)
        model = AfterConvolution(lambda y: torch.ops.manifold_nets_test.relu(y))
        structure = follow_weight(trace(model, ((torch.zeros(4, 3, 7, 7, dtype=torch.float64),), {})), "conv.weight")
    assert structure.partition is None
    assert "manifold_nets_test::relu: has no rule" in str(structure.breaks[0])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 6, 5), (4, 2, 3, 5)),
        ((4, 6, 5), (24, 5)),
        ((4, 6, 1, 5), (4, 30)),
        ((1, 6), (6, 1, 1)),
        ((2, 3, 4), (6, 2, 2)),
    ],
)
def test_reshaping_compressed_ids_equals_reshaping_full_ones(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    for varying in range(len(before)):
        compressed = np.arange(before[varying]).reshape([n if a == varying else 1 for a, n in enumerate(before)])
        expected = np.broadcast_to(compressed, before).reshape(after)
        assert np.array_equal(np.broadcast_to(reshape_ids(compressed, before, after), after), expected)


def test_scales_join_pin_and_report() -> None:
    scales, because, other = Scales(5), Break("op", "module", "why"), Break("op", "", "else")
    scales.join(np.array([1, 2]), np.array([2, 3]), because)
    scales.pin(np.array([4]), because)
    assert scales.classes() == {1: [0, 1, 2], 0: [3], 5: [4]}
    assert scales.break_of(3) == because
    assert scales.break_of(1) is None
    assert scales.free == [0, 4]
    scales.pin(np.array([3]), other)
    scales.pin(np.array([1]), because)
    assert scales.break_of(0) == other
    assert scales.break_of(2) == other
    assert not scales.all_pinned
    scales.join(np.array([5]), np.array([4]), other)
    assert scales.all_pinned
    assert scales.break_of(4) == other
    assert str(because) == "op in module: why"
    assert str(other) == "op: else"


def test_scales_of_products_and_powers() -> None:
    scales, because = Scales(3), Break("op", "", "why")
    a, b, c = (np.array([k]) for k in (1, 2, 3))
    product = scales.sum(a, b)
    assert scales.form(int(product[0])) == {0: 1.0, 1: 1.0}
    assert int(scales.sum(product, b, -1.0)[0]) == 1
    assert int(scales.times(scales.times(a, 2.0), 0.5)[0]) == 1
    scales.join(product, c, because)
    assert scales.allows(np.array([1.0, 2.0, 3.0]))
    assert not scales.allows(np.ones(3))
    scales.pin(product, because)
    assert scales.form(3) == {}
    assert scales.form(2) == {0: -1.0}
    assert scales.free == [0]


def random_equations(seed: int) -> tuple[Scales, list[tuple[int, np.ndarray]], np.ndarray]:
    """Random forms of seven scales, some of which have to be equal, beside their exponents and those equations."""
    rng = np.random.default_rng(seed)
    scales, known = Scales(7), [(k + 1, np.eye(7)[k]) for k in range(7)]
    equations = [np.zeros(7)]
    for _ in range(12):
        (a, x), (b, y) = (known[k] for k in rng.integers(len(known), size=2))
        sign, power = rng.choice([-1.0, 1.0]), rng.choice([0.5, 1.0, 2.0])
        known.append(
            (int(scales.sum(scales.times(np.array([a]), power), np.array([b]), sign)[0]), power * x + sign * y)
        )
        if rng.random() < 0.5:
            (a, x), (b, y) = (known[k] for k in rng.integers(len(known), size=2))
            scales.join(np.array([a, a]), np.array([b, b]), Break("op", "", "why"))
            equations.append(x - y)
    return scales, known, np.array(equations)


def disagreements(seed: int) -> list[str]:
    """What the solved equations say otherwise than dense linear algebra."""
    scales, known, equations = random_equations(seed)
    _, sizes, rows = np.linalg.svd(equations)
    rank = int((sizes > 1e-9).sum())
    found = [] if len(scales.free) == 7 - rank else ["the number of free scales"]
    allowed = np.random.default_rng(seed).standard_normal(7 - rank) @ rows[rank:]
    values = [float(x @ allowed) for _, x in known]
    roots = scales.roots(np.array([number for number, _ in known])).tolist()
    for (number, _), value in zip(known, values, strict=True):
        if abs(sum(c * allowed[k] for k, c in scales.form(number).items()) - value) > 1e-9:
            found.append(f"form {number}")
    same = {(m, n) for m, a in enumerate(values) for n, b in enumerate(values) if abs(a - b) <= 1e-9}
    if same != {(m, n) for m, a in enumerate(roots) for n, b in enumerate(roots) if a == b}:
        found.append("which forms are equal")
    return found


@pytest.mark.parametrize("seed", range(40))
def test_solved_equations_agree_with_dense_linear_algebra(seed: int) -> None:
    assert disagreements(seed) == []


def test_an_equation_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: equations between products are dropped, or those between single scales."""
    for name in ("_solve", "_unite"):
        with monkeypatch.context() as patch:
            patch.setattr(Scales, name, lambda *_: None)
            assert any(disagreements(seed) for seed in range(40))
