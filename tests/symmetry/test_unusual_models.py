"""Models that are not plain: untraceable, parametrized, frozen, lazy, on meta, wrapped; each handled or refused."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.toy_networks import Lambda
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import manifold_nets as mn
from manifold_nets.errors import (
    AnalysisError,
    DoublePrecisionError,
    ExampleInputsError,
    NothingToConvertError,
    UnsupportedModelError,
)
from manifold_nets.models import analysis_copy, random_numbers
from manifold_nets.symmetry.rules import RULES, guarded, movement
from manifold_nets.symmetry.weight_findings import natural_partitions

ROWS, IMAGES = (6, 5), (4, 3, 8, 8)
EVAL_LIMIT = 1e-5  # float32, as in manifold_nets.conversion.verify


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def statuses(model: nn.Module, inputs: Any) -> dict[str, tuple[str, int | None]]:
    return {
        w.name: (w.status, None if w.partition is None else w.partition.n_groups)
        for w in mn.diagnose(model, inputs).weights
    }


class Branching(nn.Module):
    """Control flow that depends on the data, around any network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


# ---- no graph -------------------------------------------------------------------------------------------------------


def test_an_untraceable_model_is_reported_as_unknown_with_its_certificate(capfd: pytest.CaptureFixture[str]) -> None:
    report = mn.diagnose(Branching(mlp()), torch.randn(ROWS))
    first, last = report.weights
    assert (first.status, last.status) == ("unknown", "unknown")
    assert first.certificate.verdict == "invariant"
    assert first.certificate.groups_certified == 4
    assert last.certificate.verdict == "not invariant"
    assert first.broken_by is not None
    assert "structure is unknown" in first.broken_by
    assert "data-dependent" in first.broken_by
    assert "4 filters of 5" in first.broken_by
    assert "4 filters" not in str(last.broken_by)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_an_untraceable_model_is_not_converted_and_the_reason_is_named() -> None:
    with pytest.raises(NothingToConvertError, match="structure is unknown: GuardOnDataDependentSymNode"):
        mn.convert(Branching(mlp()), torch.randn(ROWS))


UNTRACED = {
    "group norm": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6)), IMAGES, 3),
    "layer norm": (nn.Sequential(nn.Linear(5, 6, bias=False), nn.LayerNorm(6)), ROWS, 1),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6)), IMAGES, 6),
    "heads": (
        Lambda(
            lambda m, x: F.normalize(m.q(x).unflatten(-1, (4, 2)), dim=-1).flatten(1), q=nn.Linear(5, 8, bias=False)
        ),
        ROWS,
        4,
    ),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_the_certificate_alone_finds_the_groups_that_structure_finds(name: str) -> None:
    inner, shape, groups = UNTRACED[name]
    for module in inner.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.bias = None
    x = torch.randn(shape)
    (traced,) = mn.diagnose(inner, x).weights
    (untraced,) = mn.diagnose(Branching(inner), x).weights
    assert traced.partition is not None
    assert traced.partition.n_groups == groups
    assert untraced.certificate.verdict == "invariant"
    assert untraced.certificate.groups_certified == groups


def test_the_certificate_alone_claims_nothing_where_the_normalization_is_missing() -> None:
    """The sabotage twin of the test above."""
    (finding,) = mn.diagnose(Branching(nn.Sequential(nn.Linear(5, 6), nn.Tanh())), torch.randn(ROWS)).weights
    with pytest.raises(AssertionError):
        assert finding.certificate.verdict == "invariant"


def test_natural_partitions_go_from_filters_to_the_whole_tensor() -> None:
    assert [p.n_groups for p in natural_partitions(nn.Linear(3, 12), (12, 3))] == [12, 6, 4, 3, 2, 3, 1]
    transposed = nn.ConvTranspose2d(4, 6, 3, groups=2)
    assert [p.n_groups for p in natural_partitions(transposed, transposed.weight.shape)] == [6, 1]
    assert [p.n_groups for p in natural_partitions(nn.Linear(3, 1), (1, 3))] == [1]


# ---- parametrized weights -------------------------------------------------------------------------------------------


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 2))


def old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(5, 6)), nn.Linear(6, 2))


PARAMETRIZED: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Linear(6, 2)),
        "0.parametrizations.weight.original1",
        6,
    ),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Linear(6, 2)),
        "0.parametrizations.weight.original",
        1,
    ),
    "old weight_norm": (old_weight_norm, "0.weight_v", 6),
    "old spectral_norm": (old_spectral_norm, "0.weight_orig", 1),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a forward pass"])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_weights_are_found_converted_and_reverted(name: str, used: bool) -> None:
    build, weight, groups = PARAMETRIZED[name]
    model, x = build(), torch.randn(ROWS)
    if used:
        model(x)
    assert statuses(model, x)[weight] == ("invariant", groups)
    converted = mn.convert(model, x)
    assert converted.get_parameter(weight).manifold.partition.n_groups == groups
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT
    assert mn.verify(model, mn.revert(converted), x).eval_difference <= EVAL_LIMIT


@pytest.mark.parametrize("map_name", ["householder", "cayley", "matrix_exp"])
def test_orthogonal_weights_are_left_with_the_operation_named(map_name: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(5, 6), orthogonal_map=map_name)
    report = mn.diagnose(nn.Sequential(layer, nn.Linear(6, 2)), torch.randn(ROWS))
    finding = report["0.parametrizations.weight.original"]
    assert finding.status in ("unknown", "not invariant")
    assert "parametrizations.weight.0" in str(finding.broken_by)


# ---- frozen normalizations ------------------------------------------------------------------------------------------


def test_a_normalization_in_evaluation_mode_inside_a_training_model_is_frozen() -> None:
    model = mlp()
    model[1].eval()
    report = mn.diagnose(model, torch.randn(ROWS))
    assert report["0.weight"].status == "not invariant"
    assert "frozen" in str(report["0.weight"].broken_by)
    assert report["0.weight"].certificate.verdict == "not invariant"


@pytest.mark.parametrize("training", [True, False])
def test_a_model_in_one_mode_has_nothing_frozen(training: bool) -> None:
    assert statuses(mlp().train(training), torch.randn(ROWS))["0.weight"] == ("invariant", 4)


def test_the_analysis_copy_keeps_the_flags_of_a_training_model_only() -> None:
    model = mlp()
    model[1].eval()
    assert [m.training for m in analysis_copy(model).modules()] == [True, True, False, True, True]
    assert all(m.training for m in analysis_copy(model.eval()).modules())


# ---- wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_wrappers_are_looked_through_and_names_stay() -> None:
    x = torch.randn(ROWS)
    assert statuses(nn.DataParallel(mlp()), x)["module.0.weight"] == ("invariant", 4)
    assert statuses(torch.compile(mlp()), x)["_orig_mod.0.weight"] == ("invariant", 4)
    inside = nn.Sequential(torch.compile(mlp()), nn.Linear(2, 2))
    assert statuses(inside, x)["0._orig_mod.0.weight"] == ("invariant", 4)


def test_a_parallel_model_is_converted() -> None:
    model, x = nn.DataParallel(mlp()), torch.randn(ROWS)
    converted = mn.convert(model, x)
    assert isinstance(converted, nn.DataParallel)
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT
    assert not torch.equal(converted.module[0].weight, model.module[0].weight)


# ---- parameters without values, or of other kinds -------------------------------------------------------------------


def test_a_model_on_the_meta_device_has_its_structure_and_says_why_there_is_no_evidence() -> None:
    with torch.device("meta"):
        model = mlp()
    report = mn.diagnose(model, torch.randn(ROWS))
    first, last = report.weights
    assert first.partition == mn.Partition.filters((4, 5))
    assert first.status == last.status == "no evidence"
    assert first.certificate.verdict == "no evidence"
    assert first.certificate.groups_without_evidence == 4
    assert "meta device" in str(first.broken_by)
    assert "output" in str(last.broken_by)
    assert [f.certificate.verdict for f in report.families] == ["no evidence"] * len(report.families)
    with pytest.raises(NothingToConvertError, match="meta device"):
        mn.convert(model, torch.randn(ROWS))


def test_an_untraceable_model_on_the_meta_device_is_unknown() -> None:
    with torch.device("meta"):
        model = Branching(mlp())
    report = mn.diagnose(model, torch.randn(ROWS))
    assert {w.status for w in report.weights} == {"unknown"}
    assert {w.certificate.verdict for w in report.weights} == {"no evidence"}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
        self.norm, self.head = nn.LayerNorm(4), mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm((x.to(self.mix.dtype) @ self.mix).abs()), self.head(x)


def test_a_complex_parameter_is_explained_certified_and_left() -> None:
    model, x = Complex(), torch.randn(ROWS)
    finding = mn.diagnose(model, x)["mix"]
    assert finding.status == "unknown"
    assert finding.partition == mn.Partition.whole((5, 4))
    assert finding.certificate.verdict == "invariant"
    assert "complex" in str(finding.broken_by)
    converted = mn.convert(model, x)
    assert converted.mix.is_complex()
    assert [a.name for a in mn.conversion_record(converted).plan.spheres] == ["head.0.weight"]


def test_a_complex_parameter_whose_scale_matters_is_refuted() -> None:
    model = Complex()
    model.norm = nn.Identity()
    assert mn.diagnose(model, torch.randn(ROWS))["mix"].certificate.verdict == "not invariant"


def test_an_integer_parameter_has_no_scale() -> None:
    model = Lambda(lambda m, x: m.inner(x * m.inner.codes.to(x.dtype).sum()), inner=mlp())
    model.inner.codes = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    report = mn.diagnose(model, torch.randn(ROWS))
    assert report["inner.codes"].status == "unknown"
    assert "int8" in str(report["inner.codes"].broken_by)
    assert report["inner.0.weight"].status == "invariant"
    assert isinstance(mn.convert(model, report), nn.Module)


def test_a_model_without_parameters_has_an_empty_report() -> None:
    report = mn.diagnose(nn.ReLU(), torch.randn(ROWS))
    assert report.weights == ()
    with pytest.raises(NothingToConvertError, match="no weights"):
        mn.convert(nn.ReLU(), torch.randn(ROWS))


# ---- sparse gradients -----------------------------------------------------------------------------------------------


def looked_up(kind: str, *, sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gather":
        return Lambda(
            lambda m, ids: m.inner(torch.gather(m.table.weight, 0, ids[:, :1].expand(-1, 5), sparse_grad=sparse)),
            table=nn.Embedding(9, 5),
            inner=mlp(),
        )
    table = (nn.EmbeddingBag if kind == "bag" else nn.Embedding)(9, 5, sparse=sparse)
    functions: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "embedding": lambda m, ids: m.inner(m.table(ids).mean(1)),
        "bag": lambda m, ids: m.inner(m.table(ids)),
        "tied": lambda m, ids: m.inner(m.table(ids).mean(1)) @ torch.ones(2, 5) @ m.table.weight.T,
    }
    return Lambda(functions[kind], table=table, inner=mlp())


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("kind", ["embedding", "bag", "gather", "tied"])
def test_sparse_gradients_say_what_dense_ones_do(kind: str, memory: Any) -> None:
    ids = torch.randint(9, (12, 3), generator=torch.Generator().manual_seed(1))
    sparse, dense = (looked_up(kind, sparse=value) for value in (True, False))
    sparse(ids).sum().backward()
    assert sparse.table.weight.grad.is_sparse == (kind != "tied")
    found, expected = (mn.diagnose(model, ids, memory=memory) for model in (sparse, dense))
    limit = torch.finfo(torch.float64).eps * 1e4
    for one, other in zip(found.weights, expected.weights, strict=True):
        assert (one.name, one.status, one.partition) == (other.name, other.status, other.partition)
        assert one.certificate.value == pytest.approx(other.certificate.value, rel=limit, abs=limit)
    assert [str(u.parameters) for u in found.unexplained] == [str(u.parameters) for u in expected.unexplained]
    assert mn.verify(sparse, mn.convert(sparse, found), ids).eval_difference <= EVAL_LIMIT


def test_sparse_gradients_are_read_as_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin."""
    monkeypatch.setattr(Tensor, "to_dense", lambda self: self)
    with pytest.raises((NotImplementedError, RuntimeError)):
        mn.diagnose(looked_up("embedding", sparse=True), torch.randint(9, (12, 3)))


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_model_that_returns_integers_only_is_refused() -> None:
    with pytest.raises(ExampleInputsError, match="inputs for which no output of Lambda depends on a weight"):
        mn.diagnose(Lambda(lambda m, x: m.inner(x).argmax(1), inner=mlp()), torch.randn(ROWS))


def check_it_is_told_that_float64_fails(model: nn.Module, words: str) -> None:
    """The error blames float64, names the line, and does not blame the inputs, which the model accepts."""
    model(torch.randn(ROWS))
    with pytest.raises(DoublePrecisionError, match=words) as caught:
        mn.diagnose(model, torch.randn(ROWS))
    assert "example_inputs" not in str(caught.value)
    assert re.search(r"at line \d+ of .*test_unusual_models\.py, in", str(caught.value))


def test_a_model_that_cannot_compute_in_float64_is_refused_as_such() -> None:
    def single(m: Lambda, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("\"cumprod\" not implemented for 'Double'")
        return m.inner(x)

    check_it_is_told_that_float64_fails(Lambda(single, inner=mlp()), r"float64 fails at line .*Double.*submodules")
    # Sabotage: a constant in the default dtype follows the inputs, and computes in float64.
    kept = Lambda(lambda m, x: m.inner(x) @ torch.ones(m.inner(x).shape[-1], 3), inner=mlp())
    with pytest.raises(pytest.fail.Exception):
        check_it_is_told_that_float64_fails(kept, "float64 fails")


def test_a_lazy_model_is_refused_by_the_name_of_its_parameter() -> None:
    with pytest.raises(UnsupportedModelError, match=r"parameter 0\.weight of a lazy module.*Run the model once"):
        mn.diagnose(nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4)), torch.randn(ROWS))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_script_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="ScriptModule, compiled to TorchScript"):
        mn.diagnose(torch.jit.script(mlp()), torch.randn(ROWS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_is_refused_by_the_name_of_its_layer() -> None:
    if not torch.backends.quantized.supported_engines[-1:] or torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no engine for quantized layers")
    quantized = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})
    with pytest.raises(UnsupportedModelError, match=r"0 is a quantized Linear.*before it is quantized"):
        mn.diagnose(quantized, torch.randn(ROWS))


def test_cumulative_running_statistics_are_followed() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(16, 5), mlp()
    model[1].momentum = None
    for _ in range(3):
        model(torch.randn(16, 5))
    assert [weight.status for weight in mn.diagnose(model, x).weights] == ["invariant", "not invariant"]
    converted = mn.convert(model, x)
    assert model[1].momentum is None
    assert converted[1].momentum is None
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT


def without_derivative(detached: bool) -> nn.Module:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        h = m.first(x)
        mean = h.mean().detach() if detached else h.mean()
        return m.last(m.norm(h)) * torch.heaviside(mean, mean.new_tensor(0.5))

    return Lambda(forward, first=nn.Linear(5, 4), norm=nn.BatchNorm1d(4), last=nn.Linear(4, 2))


def overwritten(copied: bool) -> nn.Module:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        h = m.first(x).sigmoid()
        h = h.clone() if copied else h
        h += 1
        return m.last(m.norm(h))

    return Lambda(forward, first=nn.Linear(5, 4), norm=nn.BatchNorm1d(4), last=nn.Linear(4, 2))


# In the other mode the backward pass reads copies, which no later write reaches.
@pytest.mark.parametrize(
    ("build", "why", "memory"),
    [
        (without_derivative, "derivative for", "full"),
        (without_derivative, "derivative for", "small"),
        (overwritten, "modified by an in", "full"),
    ],
)
def test_a_model_without_gradients_is_refused(build: Any, why: str, memory: Any) -> None:
    with pytest.raises(AnalysisError, match=rf"^Lambda: backward\(\) failed .*{why}.*Detach the inputs"):
        mn.diagnose(build(False), torch.randn(ROWS), memory=memory)
    # The remedies of the message.
    assert mn.diagnose(build(True), torch.randn(ROWS), memory=memory).weights


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = mlp()
    model.generator = (n for n in range(3))
    with pytest.raises(AnalysisError, match=r"copy\.deepcopy could not copy it"):
        mn.diagnose(model, torch.randn(ROWS))


# ---- rules that meet the unforeseen, and random numbers -------------------------------------------------------------


def test_a_rule_that_fails_leaves_one_weight_unknown_and_names_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(use: Any) -> Any:
        return use.args["an argument that tanh does not have"]

    monkeypatch.setitem(RULES, "tanh", guarded(careless))
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    report = mn.diagnose(model, torch.randn(ROWS))
    assert report["0.weight"].status == "unknown"
    assert "tanh in 1: its rule does not cover these arguments (KeyError" in str(report["0.weight"].broken_by)
    assert report["2.weight"].status == "invariant"


class Noisy(nn.Module):
    """Draws from three sources of random numbers, as networks that mask their inputs do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (np.random.rand() + 1) * (random.random() + 1) * (torch.rand(()) + 1)  # noqa: NPY002


def test_random_numbers_of_every_source_are_repeated_and_given_back() -> None:
    model, x = Noisy(), torch.randn(ROWS)
    np_state, py_state, torch_state = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    assert mn.verify(model, model, x).train_difference == 0.0
    mn.diagnose(model, x)
    assert (np.random.get_state()[1] == np_state).all()  # noqa: NPY002
    assert random.getstate() == py_state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_random_numbers_differ_between_seeds() -> None:
    """The sabotage twin of the test above."""
    drawn = []
    for seed in (0, 1):
        with random_numbers(seed):
            drawn.append((np.random.rand(), random.random(), float(torch.rand(()))))  # noqa: NPY002
    with pytest.raises(AssertionError):
        assert drawn[0] == drawn[1]


class InARegion(nn.Module):
    """Layers that run under autocast, or while gradients are switched on again."""

    def __init__(self, region: Callable[[], Any]) -> None:
        super().__init__()
        self.fc, self.norm, self.out, self.region = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), region

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            h = torch.relu(self.norm(self.fc(x)))
        return self.out(h.to(x.dtype))


REGIONS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "gradients": lambda: torch.set_grad_enabled(True),
}


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("region", REGIONS)
def test_parameters_and_statistics_are_known_inside_of_regions(region: str, memory: Any) -> None:
    model, x = InARegion(REGIONS[region]), torch.randn(ROWS)
    finding = mn.diagnose(model, x, memory=memory)["fc.weight"]
    assert (finding.status, finding.moves_along) == ("invariant", ("fc.bias", "norm.running_mean", "norm.running_var"))


class Shuffled(nn.Module):
    """Channels in the order of a buffer, in front of a normalization and between two layers around a ReLU."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.norm, self.hidden, self.out = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("channels", torch.tensor([3, 1, 0, 7, 6, 2, 5, 4]))
        self.register_buffer("units", torch.tensor([4, 0, 5, 1, 3, 2]))
        self.how = how

    def taken(self, h: Tensor, index: Tensor) -> Tensor:
        return h.index_select(1, index) if self.how == "index_select" else h[:, index]

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "drawn":
            self.channels.copy_(self.channels.roll(1))
        h = torch.relu(self.norm(self.taken(self.fc(x), self.channels)))
        return self.out(self.taken(torch.relu(self.hidden(h)), self.units))


def rescalings(report: mn.SymmetryReport) -> list[tuple[str, int]]:
    found = [f.certificate for f in report.families if f.parameters[:2] == ("hidden.weight", "hidden.bias")]
    return [(certificate.verdict, certificate.groups_certified) for certificate in found]


@pytest.mark.parametrize("how", ["index_select", "index"])
def test_channels_keep_their_scales_in_the_order_of_a_buffer(how: str) -> None:
    report = mn.diagnose(Shuffled(how), torch.randn(ROWS))
    finding = report["fc.weight"]
    assert (finding.status, finding.partition.n_groups) == ("invariant", 8)
    assert rescalings(report) == [("invariant", 6)]
    assert not report.unexplained


def test_an_order_that_forward_changes_is_not_known() -> None:
    finding = mn.diagnose(Shuffled("drawn"), torch.randn(ROWS))["fc.weight"]
    assert finding.partition is None or finding.partition.n_groups == 1


def test_sabotage_another_order_of_the_channels_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "_taken", lambda ids, index, axis: ids)
    assert [verdict for verdict, _ in rescalings(mn.diagnose(Shuffled("index"), torch.randn(ROWS)))] == [
        "not invariant"
    ]
