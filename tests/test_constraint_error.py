"""Rounding does not add up: norms after many steps, for every optimizer, every execution and every dtype."""

import geoopt
import pytest
import torch

import manifold_nets as mn
from manifold_nets.optim import OPTIMIZERS
from manifold_nets.optim.rules import coefficients

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
    found = coefficients.coefficients

    def trusting(products, moments, lr):
        return found(products._replace(ww=torch.ones_like(products.ww)), moments, lr)

    monkeypatch.setattr(coefficients, "coefficients", trusting)
    assert worst_error("rsgd", {"foreach": False}, torch.float32, 10_000) > 4
