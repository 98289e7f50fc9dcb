"""Rounding does not add up: norms after many steps, for every optimizer, every execution and every dtype."""

from pathlib import Path

import geoopt
import pytest
import torch

import manifold_nets as mn
from manifold_nets.optim import OPTIMIZERS
from manifold_nets.optim.backends import batched, build, native, rule

pytestmark = pytest.mark.slow
DTYPES = [(torch.float32, 10_000), (torch.bfloat16, 2_000), (torch.float16, 2_000)]
# The default of these two takes ten times as many steps in test_optim_executions.
CASES = [
    (name, how) for name in ("rsgd", "radam") for how in ({"foreach": True}, {"foreach": False}, {"compile": True})
]
CASES += [(name, {}) for name, row in OPTIMIZERS.items() if row.weights == "spheres"]


def worst_error(name, how, dtype, steps):
    """The largest relative error of a norm after the first half of the steps, in machine epsilons."""
    row = OPTIMIZERS[name]
    sphere = mn.SphereProduct((4, 50), radius=torch.linspace(0.5, 2, 4))
    torch.manual_seed(0)
    weight = geoopt.ManifoldParameter(sphere.random().to(dtype), manifold=sphere)
    gradients = torch.randn(128, 4, 50).to(dtype)
    more = {} if row.adaptive else {"momentum": 0.9}
    optimizer, worst = row.kind([weight], lr=1e-2, **more, **row.options, **how), 0.0
    for step in range(steps):
        weight.grad = gradients[step % 128]
        optimizer.step()
        if step >= steps // 2 and step % 50 == 0:
            worst = max(worst, float(sphere.deviations(weight).max()))
    return worst / torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
@pytest.mark.parametrize(("dtype", "steps"), DTYPES)
@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_constraint_error_is_a_few_roundings(name, how, dtype, steps):
    assert 0 < worst_error(name, how, dtype, steps) <= 4


def test_sabotage_norms_that_are_not_measured_drift(monkeypatch):
    found = rule.normalized_step

    def trusting(products, update, lr):
        return found(products._replace(ww=torch.ones_like(products.ww)), update, lr)

    monkeypatch.setitem(rule._STEPS, "sgd", trusting)
    assert worst_error("rsgd", {"foreach": False}, torch.float32, 10_000) > 4


def worst_of_equal_entries(name, how, size):
    """The largest relative error of a norm, in machine epsilons, where all entries have one magnitude."""
    row, radius = OPTIMIZERS[name], torch.linspace(1, 2, 16, dtype=torch.float64)
    sphere = mn.SphereProduct((16, size), radius=radius)
    torch.manual_seed(0)
    worst, more = 0.0, {} if row.adaptive else {"momentum": 0.9}
    for lr in (1e-6, 0.5, 30.0):
        start = sphere.projx(torch.randn(16, size, dtype=torch.float64).sign())
        weight = geoopt.ManifoldParameter(start.float(), manifold=sphere)
        optimizer = row.kind([weight], lr=lr, **more, **row.options, **how)
        for gradient in (torch.randn(16, size), torch.randn(16, size).sign()):
            weight.grad = gradient
            optimizer.step()
            worst = max(worst, float(sphere.deviations(weight).max()))
    return worst / torch.finfo(torch.float32).eps


EQUAL = [(name, how) for name, row in OPTIMIZERS.items() if row.weights == "spheres" for how in ({}, {"foreach": True})]


@pytest.mark.parametrize("size", [100, 500, 2048, 4608, 8192, 10_000])
@pytest.mark.parametrize(("name", "how"), EQUAL)
def test_equal_entries_whose_squares_are_rounded_alike_are_added_exactly(name, how, size):
    assert worst_of_equal_entries(name, how, size) <= 4


def test_sabotage_long_chains_of_additions_are_off(monkeypatch, tmp_path):
    monkeypatch.setattr(batched, "_IN_SEQUENCE", 2**13)
    assert worst_of_equal_entries("rsgd", {"foreach": True}, 8192) > 4
    if native.available() is not None:
        pytest.skip(native.available())
    for name in build._SOURCES:
        text = (Path(build.__file__).parent / name).read_text()
        (tmp_path / name).write_text(text.replace("PIECE = 256", "PIECE = 16384"))
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = native._load()
    monkeypatch.setattr(native, "_library", lambda: library)
    assert worst_of_equal_entries("rsgd", {}, 8192) > 4
