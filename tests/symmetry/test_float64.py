"""Models that make, cast and keep tensors in dtypes of their own are analysed in float64 all the same."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers import one_needs_newer_torch
from helpers.toy_networks import Lambda
from torch import Tensor, nn

import manifold_nets as mn
import manifold_nets.symmetry.trace as graph
from manifold_nets import float64 as precision
from manifold_nets import running
from manifold_nets.errors import DoublePrecisionError
from manifold_nets.float64 import in_float64, map_tensors, tensors_in
from manifold_nets.symmetry import exact_mode

N, D = 8, 6
MIX = torch.eye(D) + 0.1  # a constant of the module of Python, in float32


def inner(**more: nn.Module) -> dict[str, nn.Module]:
    return {"fc": nn.Linear(D, D), "norm": nn.BatchNorm1d(D), "head": nn.Linear(D, 2), **more}


def hidden(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.norm(m.fc(x)))


def attributes(**values: Any) -> Callable[[nn.Module], nn.Module]:
    def add(model: nn.Module) -> nn.Module:
        for name, value in values.items():
            setattr(model, name, value)
        return model

    return add


def grid(m: Any, x: Tensor) -> Tensor:
    """Coordinates of pixels, as optical flow adds them to what it estimates."""
    flow = m.conv(x)
    rows, columns = flow.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(rows).float(), torch.linspace(-1, 1, columns), indexing="ij")
    return F.grid_sample(
        m.norm(flow), torch.stack([xs, 2 * ys / rows - 1], -1).expand(len(x), -1, -1, -1), align_corners=True
    )


def one_hot(m: Any, x: Tensor) -> Tensor:
    """A vector quantizer."""
    h = hidden(m, x)
    codes = torch.zeros(len(h), 5)
    codes.scatter_(1, (h @ m.book.weight.T).argmax(1, keepdim=True), 1)
    soft = F.one_hot(codes.argmax(1), 5).float()
    return h + (codes + soft) @ m.book.weight


def recurrent(m: Any, x: Tensor) -> Tensor:
    states = torch.zeros(1, len(x), D), torch.Tensor(1, len(x), D).fill_(0)
    return m.lstm(hidden(m, x)[:, None], states)[0][:, 0]


def timesteps(m: Any, x: Tensor) -> Tensor:
    """The embedding of the step of a diffusion."""
    frequencies = torch.exp(-torch.arange(D // 2, dtype=torch.float32) / D)
    angles = torch.arange(len(x))[:, None].float() * frequencies[None]
    return hidden(m, x + torch.cat([angles.sin(), angles.cos()], -1).to(torch.float32))


def neighbours(m: Any, x: Tensor) -> Tensor:
    """Messages along the edges of a graph."""
    h = hidden(m, x)
    source, target = torch.arange(N), (torch.arange(N) * 3 + 1) % N
    degree = torch.zeros(N).index_add_(0, target, torch.ones(N))
    return torch.zeros(N, D).index_add(0, target, h[source]) / degree.clamp(min=1)[:, None]


def farthest_points(m: Any, x: Tensor) -> Tensor:
    distance, index = torch.ones(len(x)) * 1e10, torch.zeros(3, dtype=torch.long)
    for k in range(3):
        index[k] = 2 * k
        distance = torch.min(distance, ((x - x[index[k]]) ** 2).sum(-1))
    return hidden(m, x) * distance[:, None].sign()


def softmax_in_float32(m: Any, x: Tensor) -> Tensor:
    h = hidden(m, x)
    weights = F.softmax(h @ h.T, dim=-1, dtype=torch.float32).to(h.dtype)
    return weights @ h.type(torch.FloatTensor).type_as(h)


def filled(m: Any, x: Tensor) -> Tensor:
    """A buffer made by the constructor of tensors, and written into."""
    result = torch.Tensor(len(x), D)
    result[:, :] = hidden(m, x)
    view = torch.from_numpy(np.ones((2, D), dtype=np.float32))
    view[0] *= 2  # a view of a tensor in float32, written into
    return result * view.sum(0) + torch.full((D,), 0.5) + torch.tensor([1.0]) + torch.empty(D).normal_()


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = hidden(m, x)
    return h.float()


plain = attributes()
torch.manual_seed(0)  # the layers below are drawn here, whatever was imported before
KINDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[nn.Module], nn.Module], dict[str, nn.Module]]] = {
    "vector quantization": (one_hot, plain, {"book": nn.Embedding(5, D)}),
    "recurrent": (recurrent, plain, {"lstm": nn.LSTM(D, D, batch_first=True)}),
    "diffusion": (timesteps, plain, {}),
    "graph": (neighbours, plain, {}),
    "point cloud": (farthest_points, plain, {}),
    "softmax in float32": (softmax_in_float32, plain, {}),
    "tensors that are written into": (filled, plain, {}),
    "constructor": (lambda m, x: hidden(m, x) @ torch.FloatTensor(D, D).fill_(0.5), plain, {}),
    "autocast": (autocast, plain, {"fc": nn.Linear(D, D, bias=False)}),
    "attribute": (lambda m, x: hidden(m, x) @ m.mix, attributes(mix=MIX.clone()), {}),
    "attributes in containers": (
        lambda m, x: hidden(m, x) @ m.kept["a"][0] @ m.settings.mix,
        attributes(kept={"a": [MIX.clone()]}, settings=SimpleNamespace(mix=(MIX.clone()))),
        {},
    ),
    "constant of the file": (lambda m, x: hidden(m, x) @ MIX, plain, {}),
    "complex attribute": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(hidden(m, x).view(N, -1, 2)) * m.turn).flatten(1),
        attributes(turn=torch.polar(torch.ones(D // 2), torch.arange(D // 2).float())),
        {},
    ),
}


def network_of_kind(name: str) -> nn.Module:
    torch.manual_seed(0)
    function, add, more = KINDS[name]
    return add(Lambda(lambda m, x: m.head(function(m, x)), **(inner() | copy.deepcopy(more))))


def check_it_is_analysed(
    model: nn.Module, inputs: Any, memory: Any, invariant: str = "fc.weight", limit: float = 1e-5
) -> None:
    report = mn.diagnose(model, inputs, memory=memory)
    finding = report[invariant]
    assert finding.status == "invariant", str(report)
    assert finding.partition is not None
    assert finding.partition.n_groups == finding.shape[0]
    assert not report.disagreements
    if memory == "full":
        # Far below what float32 on the way would leave.
        assert finding.certificate.value is not None
        assert finding.certificate.value < 1e-12
    converted = mn.convert(model, report, remedies="all")
    assert mn.verify(model, converted, inputs).eval_difference <= limit


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize(
    "name", one_needs_newer_torch(KINDS, "point cloud", "2.13", "torch.export cannot index by what the data say")
)
def test_what_forward_makes_casts_and_keeps_follows_the_analysis(name: str, memory: Any) -> None:
    model, x = network_of_kind(name), torch.randn(N, D)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # What runs in bfloat16 differs by its rounding.
    limit = torch.finfo(torch.bfloat16).eps if name == "autocast" else 1e-5
    check_it_is_analysed(model, x, memory, limit=limit)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert MIX.dtype == torch.get_default_dtype() == torch.float32
    if name == "attribute":
        assert model.mix.dtype == torch.float32


@pytest.mark.parametrize("memory", ["full", "small"])
def test_grids_of_pixels_follow_the_analysis(memory: Any) -> None:
    torch.manual_seed(0)
    check_it_is_analysed(
        Lambda(grid, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)), torch.randn(4, 3, 8, 8), memory, "conv.weight"
    )


@pytest.mark.parametrize("name", ["vector quantization", "attribute", "graph"])
def test_without_the_mode_float64_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin."""
    monkeypatch.setattr(precision._Float64, "__torch_function__", lambda s, f, t, a=(), k=None: f(*a, **(k or {})))
    monkeypatch.setattr("manifold_nets.models.widened", lambda tensor: tensor)
    model = network_of_kind(name).double()
    with pytest.raises(DoublePrecisionError, match=r"at line \d+ of .*test_float64\.py, in"):
        mn.diagnose(model, torch.randn(N, D))


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_follow_the_analysis(dtype: torch.dtype, memory: Any) -> None:
    model = Lambda(lambda m, x: hidden(m, x) + torch.ones(D, dtype=dtype), **inner()).to(dtype)
    assert mn.diagnose(model, torch.randn(N, D, dtype=dtype), memory=memory)["fc.weight"].status == "invariant"


# ---- inputs inside objects ------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What a loader returns."""

    features: Tensor
    more: SimpleNamespace
    name: str = "train"


class Reads(nn.Module):
    """A network of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, batch: Batch, scale: Tensor) -> Tensor:
        assert batch.name == "train"
        return torch.relu(self.norm(self.fc(batch.features))) @ batch.more.mix * scale


@pytest.mark.parametrize("memory", ["full", "small"])
def test_tensors_inside_objects_are_inputs(memory: Any) -> None:
    batch = Batch(torch.randn(N, D), SimpleNamespace(mix=torch.eye(D)))
    check_it_is_analysed(Reads(), (batch, torch.ones(D)), memory)
    assert batch.features.dtype == batch.more.mix.dtype == torch.float32
    assert [tuple(tensor.shape) for tensor in tensors_in((batch, torch.ones(D)))] == [(N, D), (D, D), (D,)]


def test_objects_that_are_not_looked_into_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin."""
    only_tensors = lambda change, tree: torch.utils._pytree.tree_map_only(Tensor, change, tree)  # noqa: E731
    for module in (graph, running):
        monkeypatch.setattr(module, "map_tensors", only_tensors)
    monkeypatch.setattr(graph, "holds_objects", lambda tree: False)
    report = mn.diagnose(Reads(), (Batch(torch.randn(N, D), SimpleNamespace(mix=torch.eye(D))), torch.ones(D)))
    assert report["fc.weight"].status == "unknown"


def test_what_cannot_be_copied_is_passed_on() -> None:
    lock = threading.Lock()
    assert map_tensors(lambda x: x + 1, {"lock": lock, "n": 3}) == {"lock": lock, "n": 3}


# ---- where it cannot be ---------------------------------------------------------------------------------------------


class Single(torch.autograd.Function):
    """An operator with a kernel for float32 alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float but found Double")
        return x.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


@pytest.mark.parametrize("memory", ["full", "small"])
def test_an_operator_without_float64_is_named_by_the_line_of_the_model(memory: Any) -> None:
    model, x = Lambda(lambda m, x: Single.apply(hidden(m, x)), **inner()), torch.randn(N, D)
    with pytest.raises(DoublePrecisionError, match=r"line \d+ of .*test_float64\.py, in forward.*submodules") as caught:
        mn.diagnose(model, x, memory=memory)
    assert "exact_mode.py" not in str(caught.value)
    # The ways out that it names.
    assert mn.diagnose(nn.Sequential(model.fc, model.norm), x, memory=memory)["0.weight"].status == "invariant"
    model.function = lambda m, x: hidden(m, x).exp()
    assert mn.diagnose(model, x, memory=memory)["fc.weight"].status == "invariant"


# ---- the mode itself ------------------------------------------------------------------------------------------------


def test_factories_casts_and_constants_are_in_float64() -> None:
    wide, kept = torch.randn(3, dtype=torch.float64), torch.ones(3)
    with in_float64():
        made = [torch.zeros(2), torch.full((2,), 0.5), torch.tensor([0.5]), torch.arange(0.0, 2.0), torch.rand(2)]
        made += [wide.float(), wide.to(torch.bfloat16), wide.to(kept), torch.ones(2, dtype=torch.float16)]
        made += [torch.dot(wide, kept), torch.arange(3) / 2, torch.stack([wide, kept]), wide.type(torch.FloatTensor)]
        assert {tensor.dtype for tensor in made} == {torch.float64}
        assert torch.tensor([1]).dtype == torch.int64
        assert torch.zeros(2, dtype=torch.complex64).dtype == torch.complex128
        view = kept[0:2]
        view += 1
        assert wide.view(torch.int64).shape == (3,)
    assert kept.tolist() == [2.0, 2.0, 1.0]
    assert kept.dtype == torch.float32
    assert torch.zeros(1).dtype == torch.float32


def test_other_threads_keep_their_dtype() -> None:
    seen: list[torch.dtype] = []
    with in_float64():
        thread = threading.Thread(target=lambda: seen.append(torch.zeros(1).dtype))
        thread.start()
        thread.join()
    assert seen == [torch.float32]


def test_casts_are_what_the_certificate_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin: with casts to float32 left in place the certificate sees rounding."""
    monkeypatch.setattr(exact_mode, "in_float64", contextlib.nullcontext)
    monkeypatch.setattr(graph, "following", lambda model: contextlib.nullcontext())
    model = Lambda(lambda m, x: m.norm(m.fc(x).to(torch.float32).to(x.dtype)), **inner())
    assert mn.diagnose(model, torch.randn(N, D))["fc.weight"].status == "disagreement"


class KeepsStatisticsAsParameters(nn.Module):
    """Running statistics as frozen parameters, and `parameters` with another meaning, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.vars = nn.ParameterList([nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(3, 8))])
        self.seen = nn.ParameterList([nn.Parameter(x, requires_grad=False) for x in (torch.zeros(8), torch.ones(8))])

    def parameters(self, recurse: bool = True) -> Any:
        return self.vars

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.batch_norm(x @ self.vars[0].T, self.seen[0], self.seen[1], training=True)
        return torch.relu(h) @ self.vars[1].T


class Propagation(nn.Module):
    """One layer of a graph network, whose adjacency matrix is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(torch.sparse.mm(adjacency, self.fc(x)))))


def test_statistics_that_are_frozen_parameters() -> None:
    assert mn.diagnose(KeepsStatisticsAsParameters(), torch.randn(16, 6))["vars.0"].status == "invariant"


@pytest.mark.parametrize("memory", ["full", "small"])
def test_sparse_inputs(memory: Any) -> None:
    adjacency = (torch.rand(12, 12) > 0.7).float() + torch.eye(12)
    dense = mn.diagnose(Propagation(), (torch.randn(12, 6), adjacency), memory=memory)
    sparse = mn.diagnose(Propagation(), (torch.randn(12, 6), adjacency.to_sparse()), memory=memory)
    assert sparse.counts() == dense.counts() == {"invariant": 1, "not invariant": 1}
