"""No input to a step makes the kernel in C touch memory that is not its own, or read what is not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import geoopt
import pytest
import torch
from helpers.kernel_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import manifold_nets as mn
from manifold_nets.errors import EuclideanStepError, StepInputError
from manifold_nets.optim import OPTIMIZERS, RiemannianAdam, RiemannianSGD, ScaledMetricSGD
from manifold_nets.optim.backends import native

HERE = Path(__file__).parents[1] / "helpers"
SPHERES = [name for name, row in OPTIMIZERS.items() if row.weights == "spheres"]


@pytest.fixture(scope="module")
def outcomes():
    """Outcome of each case for each optimizer; where the process ends early, those before."""
    environment = {**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    done = subprocess.run(
        [sys.executable, HERE / "kernel_cases.py"], capture_output=True, text=True, env=environment, timeout=600
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert done.returncode == 0, f"the process ended after {lines[-1:]}: {done.stderr[-500:]}"
    return {(case, name): found for case, name, found in lines}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_right_or_an_error_of_the_package(outcomes, case):
    expected = CASES[case][1]
    for name in SPHERES:
        found = outcomes[case, name]
        kind = found.partition(":")[0]
        assert kind in ("step", "error"), (name, found)
        assert expected in (kind, None), (name, found)


def small(shape=(6, 5), **options):
    layer = mn.layers.UnitNormLinear(shape[1], shape[0])
    optimizer = RiemannianAdam(mn.param_groups(layer), lr=0.1, **options)
    layer.weight.grad, layer.bias.grad = torch.randn(shape), torch.randn(shape[0])
    optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_errors_name_the_parameter_and_nothing_was_changed(how):
    layer, optimizer = small(**how)
    weight = layer.weight
    optimizer.state[weight]["exp_avg_sq"] = torch.zeros(2, 1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(StepInputError, match=r"^weight: found exp_avg_sq of shape \(2, 1\); expected \(6, 1\)"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert optimizer.state[weight]["step"] == optimizer.state[layer.bias]["step"] == 1
    # The remedy of the message.
    parameter = weight
    optimizer.state.pop(parameter)
    optimizer.step()
    assert float(weight.manifold.deviations(weight).max()) <= 4 * torch.finfo(torch.float32).eps


def test_the_remedies_of_weights_and_gradients_hold():
    layer, optimizer = small()
    parameter = layer.weight
    values = parameter.detach().clone()
    parameter.untyped_storage().resize_(0)
    with pytest.raises(StepInputError, match=r"^weight: found memory of 0 bytes instead of 120; .*values\.clone"):
        optimizer.step()
    parameter.data = values.clone()
    optimizer.step()
    parameter.grad.untyped_storage().resize_(8)
    with pytest.raises(StepInputError, match=r"a gradient with memory of 8 bytes.*or set it to None"):
        optimizer.step()
    parameter.grad = None
    optimizer.step()
    parameter.data = parameter.data[:2].clone()
    parameter.grad = torch.ones(2, 5)
    with pytest.raises(StepInputError, match=r"found shape \(2, 5\); expected the shape of its spheres, \(6, 5\)"):
        optimizer.step()
    sphere = mn.SphereProduct(tuple(parameter.shape))
    renewed = geoopt.ManifoldParameter(parameter.detach(), manifold=sphere)
    renewed.grad = torch.ones(2, 5)
    RiemannianAdam([renewed], lr=0.1).step()


@pytest.mark.parametrize("named", [True, False])
def test_a_parameter_is_named_where_its_module_is_known(named):
    layer = mn.layers.UnitNormLinear(5, 6)
    params = layer.named_parameters() if named else layer.parameters()
    layer.weight.grad = torch.ones(6, 5).to_sparse()
    name = "weight" if named else r"UnitNormLinear\.weight, parameter 0 of group 0 \(\(6, 5\)\)"
    with pytest.raises(StepInputError, match=rf"^{name}: found a gradient of layout"):
        RiemannianSGD(params, lr=0.1).step()
    layer.weight.grad = torch.ones(6, 5)
    params = layer.named_parameters() if named else layer.parameters()
    with pytest.raises(EuclideanStepError, match=rf"^{name}: constrained"):
        torch.optim.SGD(params, lr=0.1).step()


def test_the_scaled_metric_is_checked_as_well():
    net = torch.nn.Linear(4, 8, bias=False)
    groups = mn.optim.scaled_metric_groups(net, {"weight": mn.Partition.filters((8, 4))})
    optimizer = ScaledMetricSGD(groups, lr=0.1, momentum=0.9)
    net.weight.grad = torch.ones(8, 4)
    optimizer.step()
    optimizer.state[net.weight]["momentum_buffer"] = torch.zeros(2, 4)
    with pytest.raises(StepInputError, match=r"^weight: found momentum_buffer of shape"):
        optimizer.step()


def test_sabotage_without_the_check_a_small_state_reaches_the_kernel(monkeypatch):
    reached = []
    monkeypatch.setattr(mn.optim.base, "check", lambda *_: None)
    monkeypatch.setattr(native, "step", lambda rule, jobs, threads: reached.append(int(jobs["rows"].sum())))
    monkeypatch.setattr(native, "know", lambda dtype: True)
    monkeypatch.setattr(native, "available", lambda: None)
    layer, optimizer = small()
    optimizer.state[layer.weight]["exp_avg_sq"] = torch.zeros(2, 1)
    optimizer.step()
    assert reached == [6, 6]


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_checked_is_checked_again_only_where_something_has_moved(name, how, monkeypatch):
    checked = []
    check = mn.optim.base.check
    monkeypatch.setattr(mn.optim.base, "check", lambda *given: (checked.append(given), check(*given)))
    sphere, row = mn.SphereProduct((6, 5)), OPTIMIZERS[name]
    weight = geoopt.ManifoldParameter(sphere.random(), manifold=sphere)
    group = {"params": [weight]}
    if row.weights == "plain":
        weight = torch.nn.Parameter(weight.detach().as_subclass(torch.Tensor))
        group = {"params": [weight], "partitions": [sphere.partition.to_dict()]}
    optimizer = row.kind([group], lr=0.1, **({} if row.adaptive else {"momentum": 0.9}), **row.options, **how)
    kept = []  # so that each gradient has memory of its own
    for step in range(6):
        weight.grad = torch.randn(6, 5)
        kept.append(weight.grad)
        optimizer.step()
        assert len(checked) == (1 if step < 4 else step - 2)
        if step == 3:
            weight.data = weight.data.clone()
        if step == 4:
            moment = next(key for key, value in optimizer.state[weight].items() if value.shape == (6, 5))
            optimizer.state[weight][moment] = optimizer.state[weight][moment].clone()


def together(apart):
    """Two weights in one piece of memory, or each in its own; and what single steps make of them."""
    if native.available() is not None:
        pytest.skip(native.available())
    sphere, memory = mn.SphereProduct((4, 8)), torch.randn(2, 4, 8)
    points = [sphere.projx(memory[0]), sphere.projx(memory[1])]
    weights = [geoopt.ManifoldParameter(point.clone(), manifold=sphere) for point in points]
    if not apart:
        weights[1].data = weights[0].data
    gradients = [torch.randn(4, 8), torch.randn(4, 8)]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    stepper = RiemannianSGD(weights, lr=0.1)
    stepper.step()
    exact = [point.double() for point in points]
    for number, gradient in enumerate(gradients):
        place = number if apart else 0
        single = geoopt.ManifoldParameter(exact[place], manifold=sphere)
        single.grad = gradient.double()
        RiemannianSGD([single], lr=0.1, foreach=False).step()
        exact[place] = single.detach()
    for number, weight in enumerate(weights):
        found = (weight.detach().double() - exact[number if apart else 0]).abs().max()
        assert float(found) <= 32 * torch.finfo(torch.float32).eps, f"off by {found}"


@pytest.mark.parametrize("apart", [True, False])
def test_weights_that_share_memory_are_stepped_one_after_the_other(apart):
    together(apart)


def test_sabotage_sharing_that_is_not_seen_goes_to_the_kernel(monkeypatch):
    seen = []
    step = native.step
    monkeypatch.setattr(native, "step", lambda rule, jobs, threads: (seen.append(len(jobs)), step(rule, jobs, 1))[1])
    together(apart=False)
    assert seen == []
    monkeypatch.setattr(native, "apart", lambda jobs, members: jobs["rows"] > 0)
    together(apart=False)  # one thread, one job after the other: by luck
    assert seen == [2]


@st.composite
def laid_out(draw):
    """A gradient of some dtype, in some order in memory, lazily negated or not; and its values."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(1, 3)) for _ in shape]
    memory = torch.randn([shape[axis] * gaps[axis] for axis in order], generator=torch.Generator().manual_seed(0))
    found = memory.to(dtype).permute([order.index(axis) for axis in range(len(shape))])
    found = found[tuple(slice(None, None, gap) for gap in gaps)]
    if draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 1))
        found = found.narrow(axis, 0, 1).expand(shape)
    if draw(st.booleans()):
        found = torch._neg_view(found)
    return found, draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))


@given(laid_out(), st.sampled_from(SPHERES))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_how_a_gradient_lies_in_memory_makes_no_difference(case, name):
    if native.available() is not None:
        pytest.skip(native.available())
    gradient, dtype = case
    shape, row = tuple(gradient.shape), OPTIMIZERS[name]
    sphere = mn.SphereProduct(shape)
    start = sphere.random(dtype=torch.float64).to(dtype)
    ends = []
    for g in (gradient, gradient.clone(memory_format=torch.contiguous_format).to(dtype)):
        weight = geoopt.ManifoldParameter(start.clone(), manifold=sphere)
        weight.grad_dtype = None
        weight.grad = g
        row.kind([weight], lr=0.1, **row.options).step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def harness(folder, *options):
    """The output and the errors of the harness, built with sanitizers."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-g", "-O1", "-std=gnu11", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = Path(native.__file__).parent
    built = folder / "harness"
    command = [compiler, *flags, *options, f"-I{sources}", str(HERE / "kernel_harness.c"), "-o", str(built), "-lm"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the compiler has no sanitizers or no OpenMP: {made.stderr[-200:]}")
    # A sanitizer may not look for leaks where the process is traced.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "3"}
    return subprocess.run([built, "300"], capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_the_kernel_stays_in_its_buffers_under_sanitizers(tmp_path):
    done = harness(tmp_path)
    assert (done.returncode, done.stdout) == (0, "300 rounds\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_sabotage_a_buffer_that_is_one_entry_short_is_noticed(tmp_path):
    done = harness(tmp_path, "-DSHORT=1")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
