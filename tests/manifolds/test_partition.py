"""Partitions against loops over output channels, against the convolutions themselves, and at the ends of the range."""

import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers.sphere_cases import DTYPES, PARTITIONS, eps, noise, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manifold_nets import Partition, groups
from manifold_nets.errors import DegenerateGroupError, PartitionError
from manifold_nets.groups import filter_partition, refuse_degenerate, root_sum_squares

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, dilation=2), (4, 8, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 5)),
    "transposed 1d grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2), (4, 5, 5)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(6, 9, 2, groups=3, dilation=2), (6, 5, 5)),
    "transposed 2d depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (4, 5, 5)),
    "transposed 3d grouped": (lambda: nn.ConvTranspose3d(4, 4, 2, groups=2), (4, 3, 3, 3)),
}


# ---- which entries belong together ---------------------------------------------------------------------------------


def check_scaling_a_group_scales_its_channel(module: nn.Module, inputs: Tensor, partition: Partition) -> None:
    """Scale one group after the other and compare every output channel with what it has to be."""
    module = module.double()
    module.bias = None
    weight, channels = module.weight.detach().clone(), 1
    before = module(inputs).detach()
    assert partition.n_groups == before.shape[channels]
    for group in range(partition.n_groups):
        factors = torch.ones(partition.n_groups, dtype=torch.float64)
        factors[group] = 3.0
        module.weight.data = partition.multiply(weight, partition.spread(factors))
        expected = before * factors.reshape(-1, *[1] * (before.dim() - 2))
        torch.testing.assert_close(module(inputs), expected, rtol=0, atol=64 * eps(torch.float64))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_filter_is_what_one_output_channel_depends_on(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    module = make()
    check_scaling_a_group_scales_its_channel(module, noise((2, *shape)), filter_partition(module))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind.startswith("transposed") and "depthwise" not in kind])
def test_the_stored_rows_of_a_transposed_convolution_are_not_its_filters(kind: str) -> None:
    make, shape = LAYERS[kind]
    module = make()
    with pytest.raises(AssertionError):
        check_scaling_a_group_scales_its_channel(module, noise((2, *shape)), Partition.filters(module.weight.shape))


def group_of_entry(kind: str, index: tuple[int, ...]) -> int:
    """Return the group of one weight entry, written out from the definition of each case in `PARTITIONS`."""
    if kind == "grouped transposed filters":  # (4, 3, 3, 2) with 2 groups: channel c reads inputs of group c // 3
        return (index[0] // 2) * 3 + index[1]
    if kind == "blocks":  # 6 filters in 3 blocks
        return index[0] // 2
    return {"whole": 0, "columns": index[-1]}.get(kind, index[0])


@pytest.mark.parametrize("kind", PARTITIONS)
def test_group_ids_number_the_groups_as_defined(kind: str) -> None:
    partition = PARTITIONS[kind]
    ids = partition.group_ids()
    assert ids.shape == partition.shape
    for index in itertools.product(*(range(size) for size in partition.shape)):
        assert int(ids[index]) == group_of_entry(kind, index)


def check_reductions_against_loops(partition: Partition, dtype: torch.dtype, ids: Tensor) -> None:
    """Compare sums, inner products and norms with loops over the groups that ``ids`` names, in float64."""
    x, y = noise(partition.shape, dtype), noise(partition.shape, dtype, seed=1)
    wide_x, wide_y = x.double(), y.double()
    members = [ids == group for group in range(partition.n_groups)]
    accuracy = 16 * eps(groups.accumulation_dtype(dtype))
    expected = {
        "sum": torch.stack([wide_x[m].sum() for m in members]),
        "inner": torch.stack([(wide_x[m] * wide_y[m]).sum() for m in members]),
        "norms": torch.stack([wide_x[m].square().sum().sqrt() for m in members]),
    }
    found = {"sum": partition.sum(x), "inner": partition.inner(x, y), "norms": partition.norms(x)}
    for name, values in found.items():
        assert values.shape == partition.spread_shape
        assert values.dtype == groups.accumulation_dtype(dtype)
        assert relative_error(values.flatten(), expected[name]) <= accuracy, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PARTITIONS)
def test_reductions_equal_loops_over_the_groups(kind: str, dtype: torch.dtype) -> None:
    partition = PARTITIONS[kind]
    check_reductions_against_loops(partition, dtype, partition.group_ids())


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if kind not in ("whole", "one entry")])
def test_reductions_differ_from_loops_over_other_groups(kind: str) -> None:
    partition = PARTITIONS[kind]
    with pytest.raises(AssertionError):
        check_reductions_against_loops(
            partition, torch.float64, partition.group_ids().flatten().roll(1).view(partition.shape)
        )


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    """Draw any partition of a small tensor: a view and kept axes."""
    view = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    kept = tuple(axis for axis in range(len(view)) if draw(st.booleans()))
    split = draw(st.integers(0, len(view)))
    return Partition((math.prod(view[:split]), math.prod(view[split:])), view, kept)


@settings(deadline=None, derandomize=True)
@given(partitions())
def test_every_partition_divides_the_entries_evenly(partition: Partition) -> None:
    x = torch.arange(math.prod(partition.shape)).reshape(partition.shape)
    rows = partition.rows(x)
    assert rows.shape == (partition.n_groups, partition.group_size)
    assert torch.equal(partition.from_rows(rows), x)
    ids = partition.group_ids()
    assert torch.equal(partition.rows(ids), torch.arange(partition.n_groups)[:, None].expand_as(rows))
    assert torch.equal(partition.sum(x.double()).flatten(), rows.sum(1).double())
    values = torch.arange(1.0, partition.n_groups + 1)
    assert torch.equal(partition.multiply(torch.ones(partition.shape), partition.spread(values)), values[ids])
    assert Partition.from_dict(partition.to_dict()) == partition
    assert hash(pickle.loads(pickle.dumps(partition))) == hash(partition)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_group_arithmetic_equals_the_same_on_rows(kind: str) -> None:
    partition = PARTITIONS[kind]
    x, u, values = noise(partition.shape), noise(partition.shape, seed=1), noise((partition.n_groups,), seed=2)
    rows = partition.rows
    spread, column = partition.spread(values), values[:, None]
    assert torch.equal(rows(partition.multiply(x, spread)), rows(x) * column)
    assert torch.equal(rows(partition.divide(x, spread)), rows(x) / column)
    torch.testing.assert_close(rows(partition.subtract(u, spread, x)), rows(u) - column * rows(x), rtol=0, atol=1e-15)
    assert torch.equal(rows(partition.where(spread > 0, x, u)), torch.where(column > 0, rows(x), rows(u)))


def test_memory_format_changes_nothing_and_is_kept() -> None:
    for partition in (Partition.filters((6, 4, 3, 3)), Partition.transposed_filters((6, 4, 3, 3), 2)):
        x = noise(partition.shape)
        strided = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(partition.norms(strided), partition.norms(x))
        factors = partition.norms(x)
        assert torch.equal(partition.multiply(strided, factors), partition.multiply(x, factors))
        assert partition.multiply(strided, factors).stride() == strided.stride()


# ---- norms at full accuracy ----------------------------------------------------------------------------------------


def check_norm_accuracy(norms_of_rows: Callable[[Tensor], Tensor], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Require norms of the rows of a matrix within 2 machine epsilons of float64, or of mpmath's for float64."""
    x = (1 + torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    if dtype == torch.float64:
        expected = torch.tensor([math.sqrt(math.fsum(v * v for v in row)) for row in x.tolist()], dtype=torch.float64)
    else:
        expected = x.double().square().sum(1).sqrt()
    found = norms_of_rows(x).flatten().double()
    assert float((found / expected - 1).abs().max()) <= 2 * eps(groups.accumulation_dtype(dtype))


@pytest.mark.parametrize("shape", [(2, 100), (2, 4608), (1, 1_000_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_accurate_at_every_size(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_norm_accuracy(lambda x: Partition.filters(x.shape).norms(x), shape, dtype)


def test_vector_norm_would_not_be_accurate() -> None:
    with pytest.raises(AssertionError):
        check_norm_accuracy(lambda x: torch.linalg.vector_norm(x, dim=1), (1, 1_000_000), torch.float32)


def check_transposed_norm_accuracy(norms: Callable[..., Tensor]) -> None:
    partition = Partition.transposed_filters((1024, 8, 4, 4))
    x = 1 + noise(partition.shape, torch.float32).abs()
    expected = partition.rows(x).double().square().sum(1).sqrt()
    found = norms(partition, x).flatten().double()
    assert float((found / expected - 1).abs().max()) <= 2 * eps(torch.float32)


def test_norms_are_accurate_for_filters_that_are_not_contiguous() -> None:
    check_transposed_norm_accuracy(Partition.norms)


def test_one_sum_over_separated_axes_would_not_be_accurate() -> None:
    with pytest.raises(AssertionError):
        check_transposed_norm_accuracy(lambda p, x: x.reshape(p.view).square().sum(p.reduced).sqrt())


EXTREMES = {
    torch.float64: (1e300, 1e-300, 1.0, 5e-324),
    torch.float32: (1e25, 1e-30, 1.0, 1e-45),
    torch.bfloat16: (1e25, 1e-30, 1.0, 1e-40),
    torch.float16: (6e4, 6e-5, 1.0, 6e-8),
}


def check_extremes(norms: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Require the norm of ``(3 s, 4 s)`` to be ``5 s`` for each extreme ``s``, in one tensor and alone."""
    scales = torch.tensor(EXTREMES[dtype], dtype=dtype).clamp(max=torch.finfo(dtype).max / 8)
    together = scales[:, None] * torch.tensor([3, 4], dtype=dtype)
    for x in (together, *together.split(1)):
        largest = x.double().abs().amax(1, keepdim=True)
        expected = largest.flatten() * (x.double() / largest).square().sum(1).sqrt()
        found = norms(x).flatten().double()
        # Norms below the normal range are multiples of the smallest number that there is.
        smallest = torch.finfo(groups.accumulation_dtype(dtype)).smallest_normal * eps(groups.accumulation_dtype(dtype))
        error = (found - expected).abs()
        assert bool((error <= 4 * eps(groups.accumulation_dtype(dtype)) * expected + smallest).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_neither_overflow_nor_underflow(dtype: torch.dtype) -> None:
    check_extremes(lambda x: Partition.filters(x.shape).norms(x), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_plain_squares_would_overflow(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        check_extremes(lambda x: (x * x).sum(1).sqrt(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_agree_where_nothing_may_branch_on_values(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = PARTITIONS["grouped transposed filters"]
    x = noise(partition.shape, dtype)
    branching = partition.norms(x)
    monkeypatch.setattr(groups, "has_values", lambda _: False)
    torch.testing.assert_close(partition.norms(x), branching, rtol=4 * eps(branching.dtype), atol=0)
    check_extremes(lambda x: Partition.filters(x.shape).norms(x), dtype)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norms_of_groups_that_are_not_finite_are_not_finite(bad: float) -> None:
    x = torch.ones(4, 3)
    x[2, 1] = bad
    assert Partition.filters(x.shape).norms(x).isfinite().flatten().tolist() == [True, True, False, True]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_norms_have_the_gradient_of_the_norm(scale: float) -> None:
    x = (noise((5, 7)) * scale).float().requires_grad_()
    norms = root_sum_squares(x, ((1,),))
    (gradient,) = torch.autograd.grad(norms.sum(), x)
    expected = x.detach().double() / x.detach().double().square().sum(1, keepdim=True).sqrt()
    assert relative_error(gradient, expected) <= 8 * eps(torch.float32)


def test_norms_of_zero_have_gradient_zero() -> None:
    x = torch.zeros(2, 3)
    x[1] = 2.0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(Partition.filters(x.shape).norms(x).sum(), x)
    torch.testing.assert_close(gradient, torch.stack([torch.zeros(3), torch.full((3,), 3**-0.5)]))


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Partition((2, 3), (3, 3), (0,)), ["(3, 3)", "(2, 3)", "as many entries"]),
        (lambda: Partition((0, 3), (0, 3), (0,)), ["(0, 3)", "positive sizes"]),
        (lambda: Partition((-2, -3), (6,), (0,)), ["(-2, -3)"]),
        (lambda: Partition((2, 3), (2, 3), (2,)), ["kept axes (2,)", "0 … 1"]),
        (lambda: Partition((2, 3), (2, 3), (1, 0)), ["kept axes (1, 0)", "increasing"]),
        (lambda: Partition((2, 3), (2, 3), (0, 0)), ["kept axes (0, 0)"]),
        (lambda: Partition.blocks((6, 2), 4), ["4 blocks of the 6 filters", "divisor of 6"]),
        (lambda: Partition.blocks((6, 2), 0), ["0 blocks"]),
        (lambda: Partition.transposed_filters((4, 2, 3), 3), ["groups=3", "divisor of the 4 input channels"]),
        (lambda: filter_partition(nn.ReLU()), ["ReLU", "weight"]),
    ],
)
def test_a_partition_that_does_not_fit_is_refused_with_the_facts(
    make: Callable[[], Partition], words: list[str]
) -> None:
    with pytest.raises(PartitionError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_degenerate_groups_are_refused_by_number() -> None:
    x = torch.ones(5, 3)
    x[1], x[3, 0], x[4, 2] = 0.0, math.nan, math.inf
    with pytest.raises(
        DegenerateGroupError, match=r"features\.0\.weight: group 1 with norm 0, group 3 with norm nan"
    ) as e:
        refuse_degenerate(Partition.filters(x.shape).norms(x), "features.0.weight")
    assert e.value.groups == (1, 3, 4)
    refuse_degenerate(torch.ones(3, device="meta"), "on the meta device there is nothing to see")


def test_partitions_say_what_they_are() -> None:
    assert [str(PARTITIONS[kind]) for kind in ("filters", "whole", "blocks")] == [
        "6 filters of 12",
        "whole tensor (4, 5)",
        "3 groups of 12 (view (3, 2, 2, 3), kept (0,))",
    ]
