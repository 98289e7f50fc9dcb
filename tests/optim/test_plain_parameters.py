"""On plain parameters the optimizers are torch's, bit for bit: values, states, losses, and errors."""

import itertools

import geoopt
import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.optim import RiemannianAdam, RiemannianSGD

STEPS = 20


def grid(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


IMPLEMENTATIONS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]
SGD = [
    {**options, **implementation}
    for options in grid(momentum=[0.0, 0.9], dampening=[0.0, 0.3], weight_decay=[0.0, 0.1], maximize=[False, True])
    for implementation in IMPLEMENTATIONS
]
SGD += [
    {"momentum": 0.9, "nesterov": True, **options, **implementation}
    for options in grid(weight_decay=[0.0, 0.1], maximize=[False, True])
    for implementation in IMPLEMENTATIONS
]
ADAM = [
    {**options, **implementation}
    for options in grid(
        amsgrad=[False, True], weight_decay=[0.0, 0.1], decoupled_weight_decay=[False, True], maximize=[False, True]
    )
    for implementation in IMPLEMENTATIONS
]
ADAM += [{"betas": (0.5, 0.9), "eps": 1e-3}]
PAIRS = [(RiemannianSGD, torch.optim.SGD, {"lr": 0.05, **options}) for options in SGD]
PAIRS += [(RiemannianAdam, torch.optim.Adam, {"lr": 0.05, **options}) for options in ADAM]
SHORT = [PAIRS[0], PAIRS[20], PAIRS[-1]]
pairs = pytest.mark.parametrize(("ours", "torchs", "options"), PAIRS)
short = pytest.mark.parametrize(("ours", "torchs", "options"), SHORT)


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (3,), (), (2, 3, 3, 3), (1, 70_000)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, step):
    """Fresh gradients; the second parameter has none at every third step, but at first, as torch's fused SGD needs."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, parameter in enumerate(params):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if index == 1 and step % 3 == 2 else gradient


def check_equal(optimizer, other, params, others):
    """The same bits in every parameter and every state."""
    for parameter, reference in zip(params, others, strict=True):
        assert torch.equal(parameter, reference), "values differ"
        state, expected = optimizer.state[parameter], other.state[reference]
        assert state.keys() == expected.keys()
        for key in expected:
            assert state[key].dtype == expected[key].dtype
            assert torch.equal(state[key], expected[key]), f"{key} differs"


def check_twenty_steps(ours, torchs, options, dtype):
    params, others = parameters(dtype), parameters(dtype)
    optimizer, other = ours(params, **options), torchs(others, **options)
    for step in range(STEPS):
        set_gradients(params, step)
        set_gradients(others, step)
        optimizer.step()
        other.step()
    check_equal(optimizer, other, params, others)
    return params


@pairs
def test_twenty_steps_equal_torch_bit_for_bit(ours, torchs, options):
    params = check_twenty_steps(ours, torchs, options, torch.float32)
    assert not torch.equal(params[0], parameters(torch.float32)[0])


@short
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_equal_torch_bit_for_bit(ours, torchs, options, dtype):
    params = check_twenty_steps(ours, torchs, options, dtype)
    assert not torch.equal(params[0], parameters(dtype)[0])


@short
def test_a_difference_of_one_rounding_fails_the_comparison(ours, torchs, options):
    class Planted(ours):
        def _step_plain(self, group):
            super()._step_plain({**group, "lr": group["lr"] * (1 + 2**-22)})

    with pytest.raises(AssertionError, match="differ"):
        check_twenty_steps(Planted, torchs, options, torch.float32)


@pairs
def test_a_mix_with_constrained_weights_leaves_the_plain_ones_equal(ours, torchs, options):
    params, others = parameters(torch.float32), parameters(torch.float32)
    sphere = mn.SphereProduct((4, 6))
    weights = [geoopt.ManifoldParameter(sphere.random(), manifold=sphere) for _ in range(2)]
    # In the midst of the plain ones, in two groups with different options.
    groups = [
        {"params": [params[0], weights[0], params[1]]},
        {"params": [weights[1], *params[2:]], "weight_decay": 0.01},
    ]
    optimizer = ours(groups, **options)
    other = torchs([{"params": others[:2]}, {"params": others[2:], "weight_decay": 0.01}], **options)
    for step in range(STEPS):
        set_gradients(params, step)
        set_gradients(others, step)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        other.step()
    check_equal(optimizer, other, params, others)
    assert all(sphere.check_point_on_manifold(weight) for weight in weights)


@short
def test_tensor_learning_rates_and_complex_parameters_equal_torch(ours, torchs, options):
    options = {key: value for key, value in options.items() if key not in ("foreach", "fused")}
    found = []
    for kind in (ours, torchs):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3, dtype=torch.complex64)), nn.Parameter(torch.randn(5))]
        optimizer = kind(params, **{**options, "lr": torch.tensor(0.05)})
        for _ in range(5):
            for parameter in params:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        found.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][1], torch.zeros(5))


@short
def test_closures_equal_torch(ours, torchs, options):
    losses = []
    for kind in (ours, torchs):
        weight = nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = kind([weight], **options)

        def closure(optimizer=optimizer, weight=weight):
            optimizer.zero_grad()
            loss = (weight**4).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([float(optimizer.step(closure)) for _ in range(5)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5


@pytest.mark.parametrize("options", [*IMPLEMENTATIONS[:3], {"momentum": 0.9}, {"maximize": True}])
def test_sparse_gradients_equal_torch(options):
    tables = []
    for kind in (RiemannianSGD, torch.optim.SGD):
        table = nn.Embedding.from_pretrained(torch.ones(4, 3), freeze=False, sparse=True)
        optimizer = kind(table.parameters(), lr=0.1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 2, 2])).sum().backward()
            optimizer.step()
        tables.append(table.weight)
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], torch.ones(4, 3))


def test_differentiable_steps_equal_torch():
    gradients = []
    for kind in (RiemannianAdam, torch.optim.Adam):
        start = torch.linspace(0.1, 1.0, 4, requires_grad=True)
        weight = start.clone()
        weight.retain_grad()
        optimizer = kind([weight], lr=0.1, differentiable=True)
        weight.grad = (weight * 2).detach().requires_grad_()
        factor = weight.grad
        optimizer.step()
        (weight**2).sum().backward()
        gradients.append((start.grad, factor.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_plain_parameters_are_not_written_to(implementation):
    # With Nesterov's momentum, torch's own multi-tensor SGD adds the momentum to the gradients in place.
    weight = nn.Parameter(torch.ones(5))
    optimizer = RiemannianSGD([weight], lr=0.1, momentum=0.9, nesterov=True, **implementation)
    for _ in range(3):
        weight.grad = torch.arange(5.0)
        optimizer.step()
        assert torch.equal(weight.grad, torch.arange(5.0))


@pytest.mark.parametrize(
    ("ours", "torchs", "arguments"),
    [
        (RiemannianSGD, torch.optim.SGD, {"lr": -1.0}),
        (RiemannianSGD, torch.optim.SGD, {"lr": 0.1, "nesterov": True}),
        (RiemannianAdam, torch.optim.Adam, {"betas": (1.0, 0.9)}),
        (RiemannianAdam, torch.optim.Adam, {"fused": True, "foreach": True}),
    ],
)
def test_wrong_options_are_refused_in_torchs_words(ours, torchs, arguments):
    messages = []
    for kind in (ours, torchs):
        with pytest.raises((ValueError, RuntimeError)) as error:
            kind([nn.Parameter(torch.ones(2))], **arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("params", [[], set(), [torch.ones(2).requires_grad_() * 2], ["weight"], torch.ones(2)])
def test_wrong_parameters_are_refused_in_torchs_words(params):
    messages = []
    for kind in (RiemannianSGD, torch.optim.SGD):
        with pytest.raises((ValueError, TypeError)) as error:
            kind(params)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_positional_arguments_are_torchs():
    for ours, torchs, arguments in (
        (RiemannianSGD, torch.optim.SGD, (0.1, 0.9, 0.0, 0.01, True)),
        (RiemannianAdam, torch.optim.Adam, (0.1, (0.8, 0.9), 1e-6, 0.01, True)),
    ):
        group = ours([nn.Parameter(torch.ones(2))], *arguments).param_groups[0]
        expected = torchs([nn.Parameter(torch.ones(2))], *arguments).param_groups[0]
        assert {key: group[key] for key in expected if key != "params"} == {
            key: value for key, value in expected.items() if key != "params"
        }


def test_step_hooks_run_once():
    calls = []
    weight = nn.Parameter(torch.ones(2))
    optimizer = RiemannianSGD([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    weight.grad = torch.ones(2)
    optimizer.step()
    assert calls == ["before", "after"]
    assert torch.allclose(weight, torch.full((2,), 0.9))
