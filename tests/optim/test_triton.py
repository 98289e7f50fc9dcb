"""Steps by the kernels for GPUs, in Triton's interpreter on the CPU: the cases of the other backends, and their own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import geoopt
import numpy as np
import pytest
import torch
from helpers.optim_cases import LAYOUTS
from test_backends import (
    EPS,
    LONG,
    RULES,
    STEPPERS,
    check_against_float64,
    check_half_precision,
    check_long_steps,
    check_rule,
    check_short_gradients,
)

import manifold_nets as mn
from manifold_nets.errors import NativeKernelError, ParameterGroupError
from manifold_nets.optim import OPTIMIZERS, AngularAdam, RiemannianAdam, RiemannianSGD
from manifold_nets.optim.backends import dispatch


@pytest.fixture
def kernel(monkeypatch):
    """The kernels, for weights on the CPU; what they leave to others fails."""
    triton_kernel = pytest.importorskip("manifold_nets.optim.backends.triton_kernel", reason="needs Triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    cut = interpreter._convert_float

    def rounded(data, old, new, mode):
        # The interpreter cuts digits off where devices round to the nearest.
        if (old.name, new.name) == ("fp32", "bf16"):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return cut(data, old, new, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(dispatch, "_TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "_wants_native", lambda *_, **__: False)
    return triton_kernel


FUSED = {"fused": True}


def by_triton(optimizer):
    return [backend.__name__ for plan in optimizer._plans.values() for backend, _ in plan.batches]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("optimizer", "reference", "options"), RULES)
def test_it_takes_the_steps_of_the_reference(kernel, layout, optimizer, reference, options):
    for radius, dtype in (("uniform", torch.float64), ("per group", torch.float32)):
        check_rule(layout, radius, dtype, optimizer, reference, {**options, **FUSED})


@pytest.mark.parametrize("fault", ["no transport", "metric without radius"])
def test_a_planted_fault_fails(kernel, fault):
    options = {"lr": 0.05, "eps": 0.1, **FUSED}
    with pytest.raises(AssertionError, match="off by"):
        check_rule(LAYOUTS[1], "uniform", torch.float32, RiemannianAdam, RULES[3][1], options, fault)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(130, 9), (3, 5000), (2, 20_000)])
@pytest.mark.parametrize(("optimizer", "options"), STEPPERS)
def test_rows_of_every_size_agree_with_float64(kernel, shape, optimizer, options):
    check_against_float64(FUSED, shape, optimizer, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(130, 9), (2, 20_000)])
def test_half_precision_is_rounded_once(kernel, dtype, shape):
    check_half_precision(FUSED, dtype, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "radial"), LONG)
@pytest.mark.parametrize(
    ("optimizer", "options"), [(RiemannianSGD, {"lr": 1.0, "momentum": 0.9}), (RiemannianAdam, {"lr": 10.0})]
)
def test_long_steps_end_on_the_spheres(kernel, optimizer, options, scale, radial):
    check_long_steps(FUSED, optimizer, options, scale, radial)


def test_a_gradient_near_the_radius_has_an_exact_second_moment(kernel):
    check_short_gradients(FUSED)


def weight_on(sphere, dtype=torch.float32):
    torch.manual_seed(1)
    return geoopt.ManifoldParameter(sphere.random(dtype=torch.float64).to(dtype), manifold=sphere)


def path_of(optimizer, weight, steps=3, scale=1.0):
    torch.manual_seed(0)
    for _ in range(steps):
        weight.grad = scale * torch.randn(weight.shape, dtype=torch.float64).to(weight.dtype)
        optimizer.step()
    return weight.detach().double()


# Side by side in memory, in two runs, and in pieces of both.
PARTITIONS = {
    "filters": mn.Partition.filters((6, 40)),
    "long filters": mn.Partition.filters((2, 9000)),
    "columns": mn.Partition((40, 6), (40, 6), (1,)),
    "long columns": mn.Partition((1030, 2), (1030, 2), (1,)),
    "transposed": mn.Partition.transposed_filters((6, 5, 2, 2), groups=2),
    "heads": mn.Partition((8, 6), (4, 2, 6), (0, 2)),
}


def check_layout(name, partition):
    kind, sphere = OPTIMIZERS[name].kind, mn.SphereProduct(partition, radius=1.5)
    options = {"lr": 0.1} | ({} if OPTIMIZERS[name].adaptive else {"momentum": 0.9})
    exact = path_of(kind([weight := weight_on(sphere, torch.float64)], foreach=False, **options), weight)
    for dtype in (torch.float64, torch.float32):
        optimizer = kind([weight := weight_on(sphere, dtype)], **options)
        found = path_of(optimizer, weight)
        assert by_triton(optimizer) == ["run_triton"]
        error = float(sphere.norm(exact, found - exact)) / torch.finfo(dtype).eps
        assert error <= 64 * partition.n_groups**0.5, f"off by {error:.1f} eps"


@pytest.mark.parametrize(
    "partition",
    [pytest.param(p, id=name, marks=[pytest.mark.slow] * ("long" in name)) for name, p in PARTITIONS.items()],
)
@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.weights == "spheres"])
def test_every_rule_on_every_layout_agrees_with_float64(kernel, name, partition):
    if partition.group_size > 1000 and name == "angular-adam":
        pytest.skip("left to torch's operations")
    check_layout(name, partition)


@pytest.mark.parametrize("name", ["rsgd", "angular", "angular-adam"])
def test_sabotage_without_their_strides_filters_of_transposed_convolutions_are_others(kernel, monkeypatch, name):
    shape_of = kernel._shape_of
    monkeypatch.setattr(kernel, "_shape_of", lambda *given: (*shape_of(*given)[:4], False, False))
    with pytest.raises(AssertionError, match="off by"):
        check_layout(name, PARTITIONS["transposed"])


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.weights == "spheres"])
def test_a_gradient_along_the_radius_moves_no_more_than_in_the_reference(kernel, name):
    sphere = mn.SphereProduct((6, 40), radius=1.5)
    found = []
    for how in ({}, {"foreach": False}):
        weight = weight_on(sphere)
        optimizer = OPTIMIZERS[name].kind([weight], lr=0.1, **how)
        for number in range(3):
            weight.grad = 100 * weight.detach() if number else torch.ones(6, 40)
            optimizer.step()
        found.append(weight.detach())
    # What is left of such a gradient is its rounding, which SGD and its relatives take as it is.
    torch.testing.assert_close(*found, rtol=0, atol=1000 * EPS)


@pytest.mark.parametrize("more", [{}, {"amsgrad": True, "maximize": True}, {"decoupled_weight_decay": True}])
def test_runs_of_plain_adam_go_on_as_in_the_reference(kernel, more):
    for partition in (PARTITIONS["filters"], PARTITIONS["transposed"]):
        sphere, found = mn.SphereProduct(partition, radius=1.5), []
        for how, dtype in (({}, torch.float64), ({}, torch.float32), ({"foreach": False}, torch.float64)):
            weight = weight_on(sphere, dtype)
            group = {"params": [weight], "transfer": "follow"}
            optimizer = RiemannianAdam([group], lr=0.1, weight_decay=0.1, **more, **how)
            found.append((path_of(optimizer, weight), optimizer.state[weight]["norm"].double(), by_triton(optimizer)))
        assert [ran for *_, ran in found] == [["run_triton"], ["run_triton"], ["run_single"]]
        for mine, eps in zip(found[:2], (torch.finfo(torch.float64).eps, EPS), strict=True):
            for ours, exact in zip(mine[:2], found[2][:2], strict=True):
                torch.testing.assert_close(ours, exact, rtol=64 * eps, atol=64 * eps)


def test_sabotage_without_bias_corrections_runs_of_plain_adam_are_others(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "bias_corrections", lambda *_: (1.0, 1.0))
    with pytest.raises(AssertionError, match="not close"):
        test_runs_of_plain_adam_go_on_as_in_the_reference(kernel, {})


@pytest.mark.parametrize("partition", [PARTITIONS["filters"], PARTITIONS["transposed"]], ids=["filters", "transposed"])
def test_runs_of_plain_sgd_and_steps_of_other_optimizers_are_taken_in_passes(kernel, partition):
    sphere, found = mn.SphereProduct(partition, radius=1.5), []
    for how in ({}, {"foreach": False}):
        weight = weight_on(sphere)
        group = {"params": [weight], "transfer": "follow"}
        optimizer = RiemannianSGD([group], lr=0.1, momentum=0.9, weight_decay=0.1, **how)
        found.append((path_of(optimizer, weight), optimizer.state[weight]["norm"].clone(), by_triton(optimizer)))
    assert [ran for *_, ran in found] == [["run_triton"], ["run_single"]]
    for mine, other in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=32 * EPS, atol=32 * EPS)
    ends = []
    for devices in (("cpu",), ()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "_TRITON_DEVICES", devices)
            weight = weight_on(sphere)
            plain = mn.optim.on_spheres(torch.optim.SGD([weight], lr=0.1, momentum=0.9), torch.nn.Module())
            ends.append(path_of(plain, weight))
    torch.testing.assert_close(*ends, rtol=0, atol=32 * EPS)


# ---- plans, memory, rates in tensors ---------------------------------------------------------------------------------


def both(kind, count=3, **options):
    """The same weights under two optimizers, of which the second takes one after the other by torch's operations."""
    spheres = [mn.SphereProduct((4, 5), radius=radius) for radius in (1.0, 2.0, np.linspace(1, 2, 4))[:count]]
    found = []
    for how in ({}, {"foreach": False}):
        weights = [weight_on(sphere, torch.float64) for sphere in spheres]
        found.append((kind(weights, **options, **how), weights))
    return found


def check_agrees(kind, change, steps=4, **options):
    """Let something happen before each step, to both optimizers."""
    pairs = both(kind, **options)
    for number in range(steps):
        for optimizer, weights in pairs:
            torch.manual_seed(number)
            for weight in weights:
                weight.grad = torch.randn(4, 5, dtype=torch.float64)
            change(optimizer, weights, number)
            optimizer.step()
    for mine, other in zip(pairs[0][1], pairs[1][1], strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=0, atol=64 * torch.finfo(torch.float64).eps)
    return pairs[0][0]


def other_gradients(optimizer, weights, number):
    kept.extend(weight.grad for weight in weights)  # so that the next ones lie elsewhere


def strided_gradients(optimizer, weights, number):
    for weight in weights[1:]:
        weight.grad = weight.grad.T.contiguous().T


def one_joins_later(optimizer, weights, number):
    if number < 2:
        weights[1].grad = None


def other_states(optimizer, weights, number):
    if number == 2:
        optimizer.load_state_dict(optimizer.state_dict())


def shared_memory(optimizer, weights, number):
    weights[1].grad = weights[0].grad


kept = []


@pytest.mark.parametrize(
    "change",
    [other_gradients, strided_gradients, one_joins_later, other_states, shared_memory],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    ("kind", "options"), [(RiemannianSGD, {"momentum": 0.9}), (RiemannianAdam, {}), (AngularAdam, {})]
)
def test_what_changes_between_steps_is_followed(kernel, kind, options, change):
    kept.clear()
    check_agrees(kind, change, lr=0.1, **options)


def test_the_table_is_made_once_and_gradients_that_moved_are_the_only_upload(kernel, monkeypatch):
    uploads = []
    upload = kernel._Table.upload
    monkeypatch.setattr(kernel._Table, "upload", lambda self, x: (uploads.append(len(x)), upload(self, x))[1])
    optimizer, weights = both(RiemannianSGD, lr=0.1)[0]
    for weight in weights:
        weight.grad = torch.zeros(4, 5, dtype=torch.float64)
    optimizer.step()
    made = len(uploads)
    for _ in range(3):
        optimizer.step()
    assert len(uploads) == made
    for weight in weights:
        weight.grad = torch.zeros(4, 5, dtype=torch.float64)
    optimizer.step()
    assert uploads[made:] == [3]


def test_sabotage_a_table_that_keeps_old_gradients_steps_by_them(kernel, monkeypatch):
    take_up = kernel._Table.take_up
    first = {}

    def stale(self, gradients):
        return take_up(self, first.setdefault(id(self), gradients))

    monkeypatch.setattr(kernel._Table, "take_up", stale)
    kept.clear()
    with pytest.raises(AssertionError):
        check_agrees(RiemannianSGD, other_gradients, lr=0.1)


def of_capturable(optimizer, weights, number):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1 / (number + 1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "kind"), [("radam", RiemannianAdam), ("angular-adam", AngularAdam), ("adam-g", mn.optim.AdamG)]
)
def test_capturable_steps_read_rates_and_counts_of_tensors(kernel, monkeypatch, name, kind):
    seen = []
    bias_corrections = kernel.bias_corrections
    monkeypatch.setattr(kernel, "bias_corrections", lambda *given: (seen.append(given), bias_corrections(*given))[1])
    optimizer = check_agrees(kind, of_capturable, lr=torch.tensor(0.1), capturable=True)
    assert by_triton(optimizer) == ["run_triton"]
    assert not seen
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_capturable_is_refused_where_triton_does_not_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "_triton_kernel", lambda: "No module named 'triton'")
    with pytest.raises(ParameterGroupError, match="capturable=True; expected capturable=False"):
        RiemannianAdam([weight_on(mn.SphereProduct((2, 3)))], capturable=True)


def test_without_triton_the_default_goes_on_and_fused_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(dispatch, "_triton_kernel", lambda: "No module named 'triton'")
    weight = weight_on(mn.SphereProduct((2, 3)))
    path_of(RiemannianSGD([weight], lr=0.1), weight)
    with pytest.raises(NativeKernelError, match=r"without Triton \(No module named 'triton'\).*pip install triton"):
        path_of(RiemannianSGD([weight], lr=0.1, fused=True), weight)


def test_master_weights_take_the_steps(kernel):
    sphere = mn.SphereProduct((4, 32))
    found = []
    for how in ({}, {"foreach": False}):
        weight = weight_on(sphere, torch.bfloat16)
        optimizer = RiemannianAdam([weight], lr=1e-4, master_weights=True, **how)
        path_of(optimizer, weight, steps=4)
        found.append(optimizer.state[weight]["master_weight"])
    torch.testing.assert_close(*found, rtol=0, atol=16 * EPS)


def test_on_the_cpu_nothing_of_it_is_imported():
    code = (
        "import sys, torch, manifold_nets as mn\n"
        "weight = mn.layers.UnitNormLinear(4, 3).weight\n"
        "weight.grad = torch.ones(3, 4)\n"
        "mn.optim.RiemannianSGD([weight], lr=0.1).step()\n"
        "assert not [name for name in sys.modules if name.endswith('triton_kernel')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=Path(__file__).parent)


# ---- as devices get it -----------------------------------------------------------------------------------------------

COMPILING = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from manifold_nets.optim.backends import triton_kernel as t

POINTERS = {"rate": "*fp32"} | dict.fromkeys(("jobs", "gradients", "blocks"), "*i64")
POINTERS |= dict.fromkeys(("taken", "products", "numbers", "outcome"), "*fp64")
STEP = {"ADAM": True, "MOMENT": True, "MOST": True, "NESTEROV": False, "LR": True, "STEP": tl.float32}
KERNELS = {
    "_step": STEP,
    "_follow": {"MOST": True, "FOLLOWS": True, "STEP": None},
    "_turn": {"BY_ANGLE": True, "LR": False, "STEP": None},
    "_measure": {"PIECES": 2, "REST": True, "MOMENT": True},
    "_write": {"PIECES": 2, "OUTCOME": True, "MOMENT": True},
}
target = GPUTarget("cuda", 80, 32) if sys.argv[1] == "cuda" else GPUTarget("hip", "gfx942", 64)
types = {"TYPE": tl.bfloat16, "G": tl.float32, "WIDE": tl.float32}
rows = {"ROWS": 4, "COLS": 512, "AXIS": 1, "STRIDED": False, "ALIGNED": True}
columns = {"ROWS": 32, "COLS": 64, "AXIS": 0, "STRIDED": True, "ALIGNED": False}
for name, options in KERNELS.items():
    kernel = getattr(t, name)
    for tiles in (rows, columns):
        constants = {**options, **types, **tiles}
        signature = {x: "constexpr" if x in constants else POINTERS.get(x, "fp64") for x in kernel.arg_names}
        built = triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": 4})
        assert built.asm["cubin" if sys.argv[1] == "cuda" else "hsaco"]
        if name == "_step" and sys.argv[1] == "cuda":
            # Rounded to the nearest; and from memory in runs of 16 bytes, where that may be.
            assert "cvt.rn.bf16" in built.asm["ptx"]
            assert ("ld.global.v4" in built.asm["ptx"]) == tiles["ALIGNED"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "hip"])
def test_every_kernel_compiles_for_devices_that_are_not_here(device, tmp_path):
    pytest.importorskip("triton", reason="needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILING, device], check=True, env=environment, timeout=900)


@pytest.mark.parametrize(("size", "offset", "aligned"), [(8, 0, True), (8, 1, False), (9, 0, False)])
def test_many_entries_are_read_at_once_only_where_all_rows_begin_at_such_an_address(kernel, size, offset, aligned):
    """On a device a load of 16 bytes from any other address is a fault, which the interpreter does not show."""
    weight = weight_on(mn.SphereProduct((4, size)))
    weight.grad = torch.randn(4 * size + offset)[offset:].view(4, size)
    optimizer = RiemannianSGD([weight], lr=0.1, momentum=0.9)
    optimizer.step()
    (tiles,) = optimizer._plans[0].batches[0][1].jobs[0].tiles
    assert tiles.options["ALIGNED"] == aligned
    # Gradients that come to lie elsewhere are looked at again.
    weight.grad = torch.randn(4 * size + 1)[1:].view(4, size)
    optimizer.step()
    assert not tiles.options["ALIGNED"]
