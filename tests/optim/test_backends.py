"""All executions of a step take the same step: one after the other, in batches, by the kernel, compiled by torch."""

import geoopt
import numpy as np
import pytest
import torch
from helpers.optim_cases import LAYOUTS, Layout, Problem, check_path, radii_for, reference_adam, reference_sgd, run
from torch._inductor import metrics
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

import manifold_nets as mn
from manifold_nets.errors import NativeKernelError, OptionError
from manifold_nets.optim import RiemannianAdam, RiemannianSGD
from manifold_nets.optim.backends import build, compiled, dispatch, native, products, reference, views

EAGER = {"single": {"foreach": False}, "batched": {"foreach": True}, "kernel": {"fused": True}}
ALL = [*EAGER.items(), ("default", {})]
RULES = [
    (RiemannianSGD, reference_sgd, {"lr": 0.1, "maximize": True}),
    (RiemannianSGD, reference_sgd, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    (RiemannianSGD, reference_sgd, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (RiemannianAdam, reference_adam, {"lr": 0.05}),
    (RiemannianAdam, reference_adam, {"lr": 0.05, "betas": (0.5, 0.9), "amsgrad": True, "maximize": True}),
]
execution = pytest.mark.parametrize(("name", "how"), ALL)
eager = pytest.mark.parametrize("how", EAGER.values(), ids=EAGER)
rule = pytest.mark.parametrize(("optimizer", "reference", "options"), RULES)
EPS = torch.finfo(torch.float32).eps


def check_rule(layout, radius, dtype, optimizer, reference, options, fault=None):
    problem = Problem(layout, radii_for(layout, radius))
    weight = problem.parameter(dtype)
    expected = reference(problem, **{k: v for k, v in options.items() if k not in ("foreach", "fused", "compile")})
    if fault is not None:
        expected = reference(problem, fault=fault, lr=options["lr"])
    check_path(run(optimizer([weight], **options), problem, weight), expected, problem, dtype)


@execution
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@rule
def test_every_execution_takes_the_steps_of_the_reference(name, how, layout, optimizer, reference, options):
    for radius in ("uniform", "per group"):
        for dtype in (torch.float64, torch.float32):
            check_rule(layout, radius, dtype, optimizer, reference, {**options, **how})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
@pytest.mark.parametrize(("optimizer", "reference", "options"), [RULES[1], RULES[4]])
def test_the_compiled_execution_takes_the_steps_of_the_reference(optimizer, reference, options):
    # One after the other, as all layouts share the kernel of a rule.
    for layout in LAYOUTS:
        check_rule(layout, "per group", torch.float32, optimizer, reference, {**options, "compile": True})


@eager
@pytest.mark.parametrize("fault", ["no transport", "metric without radius"])
def test_a_planted_fault_fails_every_execution(how, fault):
    with pytest.raises(AssertionError, match="off by"):
        check_rule(
            LAYOUTS[1], "uniform", torch.float32, RiemannianAdam, reference_adam, {"lr": 0.05, "eps": 0.1, **how}, fault
        )


# Rows that the kernel takes in blocks, whole, and in pieces; and their numbers.
SIZES = [(130, 9), (3, 5000), (2, 20_000), (2, 70_001)]


def steps_of(how, optimizer, options, shape, dtype, scale=1.0, steps=3, radial=0.0):
    """Weights after a few steps, in float64, and their spheres."""
    generator = torch.Generator().manual_seed(0)
    sphere = mn.SphereProduct(shape, radius=1.5)
    start = sphere.projx(torch.randn(shape, generator=generator, dtype=torch.float64))
    weight = geoopt.ManifoldParameter(start.to(dtype), manifold=sphere)
    stepper = optimizer([weight], **options, **how)
    for _ in range(steps):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * scale / shape[1] ** 0.5
        weight.grad = (noise + radial * start).to(dtype)
        stepper.step()
    return weight.detach().double(), sphere


STEPPERS = [(RiemannianSGD, {"lr": 0.3, "momentum": 0.9}), (RiemannianSGD, {"lr": 0.3}), (RiemannianAdam, {"lr": 0.1})]


@eager
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("optimizer", "options"), STEPPERS)
def test_rows_of_every_size_agree_with_float64(how, shape, optimizer, options):
    check_against_float64(how, shape, optimizer, options)


def check_against_float64(how, shape, optimizer, options):
    exact, _ = steps_of({"foreach": False}, optimizer, options, shape, torch.float64)
    for dtype, allowed in ((torch.float64, 64 * torch.finfo(torch.float64).eps), (torch.float32, 64 * EPS)):
        found, sphere = steps_of(how, optimizer, options, shape, dtype)
        # In units of the radius, of the norm of a group.
        assert float(sphere.norm(exact, found - exact)) <= allowed * shape[0] ** 0.5
        assert float(sphere.deviations(found).max()) <= 4 * torch.finfo(dtype).eps


@eager
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SIZES[::3])
def test_half_precision_is_rounded_once_in_every_execution(how, dtype, shape):
    check_half_precision(how, dtype, shape)


def check_half_precision(how, dtype, shape):
    for optimizer, options in ((RiemannianSGD, {"lr": 0.3}), (RiemannianAdam, {"lr": 0.1})):
        single, sphere = steps_of({"foreach": False}, optimizer, options, shape, dtype, steps=1)
        found, _ = steps_of(how, optimizer, options, shape, dtype, steps=1)
        # Where float32 is in doubt near a tie, the rounding may fall to the neighbour.
        differs = found != single
        assert float(differs.double().mean()) <= 0.01
        gap = (found - single).abs() / single.abs().clamp_min(2.0**-14)
        assert float(gap.max()) <= torch.finfo(dtype).eps
        assert float(sphere.deviations(found).max()) <= torch.finfo(dtype).eps


LONG = [(1.0, 0.0), (1e3, 0.0), (1.0, 1e3), (10.0, 1e4)]


def check_long_steps(how, optimizer, options, scale, radial):
    """Steps of many radians, and gradients that are almost along the radius, still end on the spheres."""
    for shape in ((130, 9), (2, 70_001)):
        found, sphere = steps_of(how, optimizer, options, shape, torch.float32, scale=scale, radial=radial)
        worst = float(sphere.deviations(found).max())
        # A coefficient of the weight that is far above 1 is rounded as such, and cancels against the gradient's.
        assert worst <= 8 * EPS, f"constraint error of {worst / EPS:.1f} eps"


@eager
@pytest.mark.parametrize(("scale", "radial"), LONG)
@pytest.mark.parametrize(
    ("optimizer", "options"), [(RiemannianSGD, {"lr": 1.0, "momentum": 0.9}), (RiemannianAdam, {"lr": 10.0})]
)
def test_long_steps_end_on_the_spheres(how, optimizer, options, scale, radial):
    check_long_steps(how, optimizer, options, scale, radial)


def worst_of_many_circles(how):
    """The largest relative error of a radius, in machine epsilons, after steps of up to nine radians on circles."""
    torch.manual_seed(0)
    sphere = mn.SphereProduct((20_000, 2))
    weight = geoopt.ManifoldParameter(sphere.random(dtype=torch.float64), manifold=sphere)
    stepper = RiemannianAdam([weight], lr=9.0, **how)
    for _ in range(4):
        weight.grad = torch.randn_like(weight)
        stepper.step()
    return float(sphere.deviations(weight).max()) / torch.finfo(torch.float64).eps


@eager
def test_long_steps_on_many_circles_are_measured_as_they_come_out(how):
    assert worst_of_many_circles(how) <= 4


def test_a_norm_that_is_predicted_everywhere_fails_for_long_steps(monkeypatch):
    monkeypatch.setattr(reference, "some", lambda _: False)
    with pytest.raises(AssertionError, match="constraint error"):
        check_long_steps({"foreach": False}, RiemannianSGD, {"lr": 1.0, "momentum": 0.9}, 10.0, 1e4)


def check_short_gradients(how):
    """Adam's second moment of a gradient that is along the radius but for a thousandth."""
    sphere = mn.SphereProduct((3, 64), radius=2.0)
    torch.manual_seed(0)
    point = sphere.random(dtype=torch.float64)
    gradient = 100 * point + 0.1 * sphere.proju(point, torch.randn(3, 64, dtype=torch.float64))
    weight = geoopt.ManifoldParameter(point.float(), manifold=sphere)
    weight.grad = gradient.float()
    stepper = RiemannianAdam([weight], lr=0.1, betas=(0.9, 0.0), **how)
    stepper.step()
    start = sphere.projx(point.float().double())
    expected = sphere.group_inner(start, sphere.egrad2rgrad(start, weight.grad.double())).flatten()
    found = stepper.state[weight]["exp_avg_sq"].flatten().double()
    # The gradient's entries are rounded at their own size, a thousand times that of the tangential part.
    assert torch.allclose(found, expected, rtol=1e4 * EPS, atol=0), (found / expected - 1).tolist()


@eager
def test_a_gradient_near_the_radius_has_an_exact_second_moment(how):
    check_short_gradients(how)


compiler_warns = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
COMPILED = [(RiemannianSGD, {"lr": 1.0, "momentum": 0.9}), (RiemannianAdam, {"lr": 10.0})]


@pytest.mark.slow
@compiler_warns
@pytest.mark.parametrize(("optimizer", "options"), COMPILED)
def test_rows_that_the_compiled_kernel_leaves_are_stepped_as_exactly(optimizer, options):
    for scale, radial in LONG:
        check_long_steps({"compile": True}, optimizer, options, scale, radial)
    check_short_gradients({"compile": True})


@pytest.mark.slow
@compiler_warns
def test_sabotage_without_the_rows_left_long_compiled_steps_fail(monkeypatch):
    monkeypatch.setattr(compiled, "_step_left", lambda *_: None)
    with pytest.raises(AssertionError, match="off by"):
        check_rule(LAYOUTS[1], "uniform", torch.float32, RiemannianSGD, reference_sgd, {"lr": 50.0, "compile": True})


@pytest.mark.slow
@compiler_warns
@pytest.mark.parametrize(("optimizer", "options"), STEPPERS)
def test_compiled_rows_of_every_size_agree_with_float64(optimizer, options):
    for shape in [*SIZES, (1, 30), (1, 9000), (64, 64)]:
        check_against_float64({"compile": True}, shape, optimizer, options)


@pytest.mark.slow
@compiler_warns
def test_compiled_steps_of_half_precision_are_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        check_half_precision({"compile": True}, dtype, SIZES[0])


@pytest.fixture
def complete(monkeypatch):
    """The kernel that is for accelerators, on the CPU."""
    compiled._kernel.cache_clear()
    monkeypatch.setattr(compiled, "_completes", lambda device: True)
    yield
    compiled._kernel.cache_clear()


@pytest.mark.slow
@compiler_warns
@pytest.mark.parametrize(("optimizer", "options"), [*STEPPERS[::2], (RiemannianAdam, {"lr": 0.1, "amsgrad": True})])
def test_the_kernel_for_accelerators_steps_all_rows_by_itself(complete, optimizer, options, monkeypatch):
    monkeypatch.setattr(compiled, "_left", None)  # nothing is asked for
    for shape in [*SIZES, (1, 30), (64, 64)]:
        check_against_float64({"compile": True}, shape, optimizer, options)
    for scale, radial in LONG:
        check_long_steps({"compile": True}, optimizer, {**options, "lr": 10.0}, scale, radial)
    if optimizer is RiemannianAdam:
        check_short_gradients({"compile": True})
    for dtype in (torch.bfloat16, torch.float16):
        check_half_precision({"compile": True}, dtype, SIZES[0])


@pytest.mark.slow
@compiler_warns
def test_sabotage_without_measuring_the_kernel_for_accelerators_leaves_the_spheres(complete, monkeypatch):
    monkeypatch.setattr(reference, "some", lambda _: False)
    with pytest.raises(AssertionError, match="constraint error"):
        check_long_steps({"compile": True}, RiemannianSGD, {"lr": 1.0, "momentum": 0.9}, 10.0, 1e4)


def test_rows_that_the_compiled_kernel_leaves_are_looked_for_in_their_matrices_alone():
    torch.manual_seed(0)
    for share in (0.0, 0.01, 0.3, 1.0):
        sizes = torch.randint(1, 40, (30,)).tolist()
        matrices = [
            products.GroupView(torch.zeros(size, 2), torch.zeros(size, 2), None, None, None, 1.0) for size in sizes
        ]
        flags = [(torch.rand(size, 1) < share).to(torch.int16) for size in sizes]
        found = [(id(matrix), which.tolist()) for matrix, which in compiled._left(matrices, flags)]
        places = [flag.view(-1).nonzero().view(-1).tolist() for flag in flags]
        assert found == [(id(m), place) for m, place in zip(matrices, places, strict=True) if place]


def compiled_step(dtype=torch.float32, shape=(20, 30), momentum=0.9):
    sphere = mn.SphereProduct(shape, radius=2.0)
    weight = geoopt.ManifoldParameter(sphere.random().to(dtype), manifold=sphere)
    weight.grad = torch.randn_like(weight)
    stepper = RiemannianSGD([weight], lr=0.1, momentum=momentum, compile=True)
    stepper.step()
    return stepper


def kernels():
    return compiled._kernel.cache_info().currsize


@pytest.mark.slow
@compiler_warns
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.parametrize("ahead", [True, False])
def test_schedules_of_rate_and_momentum_and_other_sizes_compile_nothing_anew(ahead):
    compiled._kernel.cache_clear()  # whatever other tests have compiled
    # Without its caches torch compiles nothing ahead of time.
    with (
        torch.compiler.config.patch(force_disable_caches=not ahead),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        stepper = compiled_step()
        for number in range(20):
            stepper.param_groups[0] |= {"lr": 0.1 / (1 + number), "momentum": 0.9 - 0.01 * number}
            stepper.step()
        for shape in ((7, 11), (40, 40), (2, 3000)):
            compiled_step(shape=shape)
        assert kernels() == 1
        # Sabotage: what the kernel is compiled for does change, and that is noticed.
        compiled_step(torch.bfloat16)
        assert kernels() == 2


@pytest.mark.slow
@compiler_warns
def test_a_kernel_for_one_thread_is_not_taken_for_several():
    threads = torch.get_num_threads()
    compiled._kernel.cache_clear()
    try:
        for number, count in ((1, 1), (2, 2), (3, 2)):
            torch.set_num_threads(number)
            compiled_step()
            assert kernels() == count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@compiler_warns
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.parametrize("optimizer", [RiemannianSGD, RiemannianAdam])
def test_what_torch_does_not_compile_ahead_of_time_takes_the_same_steps(optimizer):
    compiled._kernel.cache_clear()
    with torch.compiler.config.patch(force_disable_caches=True):
        for shape in [(130, 9), (64, 64), (3, 5000), (1, 30)]:
            check_against_float64({"compile": True}, shape, optimizer, {"lr": 0.1})
    compiled._kernel.cache_clear()


def loops_that_are_one():
    """Of the kernels that were compiled: how many passes over a row share one loop over the rows."""
    compiled._kernel.cache_clear()
    metrics.reset()
    with fresh_cache():
        compiled_step()
    return [count.inner_kernel_number for count in metrics.cpp_outer_loop_fused_inner_counts]


@pytest.mark.slow
@compiler_warns
def test_a_compiled_kernel_passes_twice_over_a_row_and_once_over_the_rows(monkeypatch):
    # Its inner products, its coefficients, and writing it: before the next row.
    assert loops_that_are_one() == [3]
    # Sabotage: where the compiler may put coefficients of several rows into vectors, it needs loops of their own.
    monkeypatch.setattr(compiled, "_FLAG", torch.int32)
    assert loops_that_are_one() == ([] if pick_vec_isa() else [3])
    compiled._kernel.cache_clear()


def test_a_difference_of_squares_is_not_exact_near_the_radius(monkeypatch):
    monkeypatch.setattr(products, "_SHORT", 0.0)
    with pytest.raises(AssertionError):
        check_short_gradients({"foreach": False})


@eager
def test_many_small_weights_of_all_kinds_take_the_steps_that_each_takes_alone(how):
    def weights():
        torch.manual_seed(0)
        shapes = [(8, 3, 3, 3), (4, 27), (6, 27), (5, 2), (2, 40_000), (7, 27)]
        result = []
        for number, shape in enumerate(shapes):
            manifold = mn.SphereProduct(shape, radius=torch.linspace(1, 2, shape[0]) if number == 2 else 1.0)
            point = manifold.random(dtype=torch.bfloat16 if number == 3 else torch.float32)
            result.append(geoopt.ManifoldParameter(point, manifold=manifold))
        return result

    together, alone = weights(), weights()
    stepper, single = RiemannianAdam(together, lr=0.1, **how), RiemannianAdam(alone, lr=0.1, foreach=False)
    for step in range(3):
        for number, (a, b) in enumerate(zip(together, alone, strict=True)):
            # One weight joins later, so that the numbers of its steps differ.
            gradient = torch.randn(a.shape).to(a.dtype)
            a.grad, b.grad = (None, None) if number == 1 and step == 0 else (gradient, gradient.clone())
        stepper.step()
        single.step()
    for a, b in zip(together, alone, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert torch.allclose(a, b, rtol=0, atol=64 * eps)
        assert torch.allclose(
            stepper.state[a]["exp_avg_sq"], single.state[b]["exp_avg_sq"], rtol=1e-2 if eps > EPS else 64 * EPS
        )


@pytest.mark.skipif(not build.PLATFORM.choices, reason="the kernel has no build for this system")
def test_without_a_compiler_the_default_goes_on_and_fused_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler --with option")
    with pytest.raises(native.UnavailableError, match="CC=no-such-compiler --with option names no program"):
        native._load()
    missing = native.UnavailableError("no C compiler")
    monkeypatch.setattr(native, "_library", lambda: missing)
    monkeypatch.setattr(dispatch, "_has_warned", False)
    with pytest.warns(UserWarning, match="not available"):
        check_rule(LAYOUTS[1], "uniform", torch.float32, *RULES[1])
    with pytest.raises(NativeKernelError, match="fused=True: found no C compiler"):
        check_rule(LAYOUTS[1], "uniform", torch.float32, *RULES[1][:2], {"lr": 0.1, "fused": True})


@pytest.mark.skipif(not build.PLATFORM.choices, reason="the kernel has no build for this system")
def test_a_compiler_that_fails_is_reported_and_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(native.UnavailableError, match="false could not compile the kernel"):
        native._load()
    assert list((tmp_path / "manifold_nets").iterdir()) == []


def test_the_kernel_is_compiled_once_and_kept(monkeypatch, tmp_path):
    if native.available() is not None:
        pytest.skip(native.available())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "manifold_nets").iterdir()}
    assert {path.suffix for path in kept} == {".sha256", build.PLATFORM.suffix}
    native._load()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "manifold_nets").iterdir()} == kept


def test_compile_excludes_the_other_executions():
    weight = mn.layers.UnitNormLinear(4, 3).weight
    for other in ("fused", "foreach"):
        with pytest.raises(OptionError, match="compile: found 'True with fused or foreach'"):
            RiemannianSGD([weight], lr=0.1, compile=True, **{other: True})


def test_the_default_is_the_kernel_on_the_cpu(monkeypatch):
    if native.available() is not None:
        pytest.skip(native.available())
    calls = []
    monkeypatch.setattr(dispatch, "run_native", lambda rule, members: calls.append(len(members)))
    weight = mn.layers.UnitNormLinear(4, 3).weight
    weight.grad = torch.randn(3, 4)
    for options in ({}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}):
        RiemannianSGD([weight], lr=0.1, **options).step()
    assert calls == [1, 1]


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.nbytes)
        return result


@eager
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_larger_than_a_weight_in_float32(how, dtype):
    sphere = mn.SphereProduct((256, 4608))
    weight = geoopt.ManifoldParameter(sphere.random().to(dtype), manifold=sphere)
    for optimizer, state in ((RiemannianSGD([weight], 0.1, 0.9, **how), 1), (RiemannianAdam([weight], 0.1, **how), 1)):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        with Largest() as largest:
            optimizer.step()
        assert largest.bytes <= weight.numel() * 4
        kept = sum(x.nbytes for x in optimizer.state[weight].values())
        assert kept <= 1.02 * state * weight.nbytes


def test_batches_are_small_beside_a_large_weight():
    assert products.CHUNK <= 512 * 512 * 9 // 4  # a quarter of the largest weight of ResNet-50
    assert views._SMALL <= products.CHUNK


def check_constraint(optimizer, options, dtype, steps, allowed):
    layout = Layout("rows", mn.Partition.filters((4, 50)), lambda i, j: i)
    sphere = mn.SphereProduct(layout.partition, radius=np.linspace(0.5, 2, 4))
    torch.manual_seed(0)
    weight = geoopt.ManifoldParameter(sphere.random().to(dtype), manifold=sphere)
    gradients = torch.randn(128, 4, 50).to(dtype)
    stepper, worst = optimizer([weight], **options), 0.0
    for step in range(steps):
        weight.grad = gradients[step % 128]
        stepper.step()
        if step % 500 == 499:
            worst = max(worst, float(sphere.deviations(weight).max()))
    assert 0 < worst <= allowed * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "options"), [(RiemannianSGD, {"momentum": 0.9}), (RiemannianAdam, {})])
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 100_000), (torch.bfloat16, 10_000)])
def test_the_constraint_error_stays_bounded(optimizer, options, dtype, steps):
    # Rounding every entry once more is all that is added to a few roundings of the coefficients.
    check_constraint(optimizer, {**options, "lr": 1e-2}, dtype, steps, allowed=4)


@eager
def test_half_precision_weights_of_different_radii_keep_their_digits(how):
    """Rounded to bfloat16 a radius of 3.7 is off by 7e-4, and a second moment by twice that."""

    def second_moments(how):
        torch.manual_seed(0)
        spheres = [mn.SphereProduct((4, 18), radius=radius) for radius in (3.7, 1.0)]
        weights = [geoopt.ManifoldParameter(s.random().to(torch.bfloat16), manifold=s) for s in spheres]
        stepper = RiemannianAdam(weights, lr=0.1, **how)
        for weight in weights:
            weight.grad = torch.randn(4, 18).to(torch.bfloat16)
        stepper.step()
        return [stepper.state[weight]["exp_avg_sq"] for weight in weights]

    for found, expected in zip(second_moments(how), second_moments({"foreach": False}), strict=True):
        torch.testing.assert_close(found, expected, rtol=64 * EPS, atol=0)
