"""The theorem on a real run: invariant optimizers train a rescaled twin along the same path of functions."""

import pytest
import torch
from helpers.example_modules import example

LIMIT = 1e-8  # of the relative difference of outputs after 200 steps in float64 with a negligible eps


def largest_difference(invariance, method):
    images = example("digits", "sklearn").load_digits()["train"]
    return max(invariance.differences(method, "float64, eps 1e-30", 0, images))


def check_invariant(invariance, method):
    assert largest_difference(invariance, method) < LIMIT


@pytest.fixture(scope="module")
def invariance():
    return example("invariance", "sklearn")


@pytest.mark.slow
def test_what_claims_to_be_invariant_is(invariance):
    invariant = [method for method in invariance.METHODS.values() if method.invariant]
    assert len(invariant) >= 2
    for method in invariant:
        check_invariant(invariance, method)


@pytest.mark.slow
def test_sabotage_what_is_not_invariant_is_noticed(invariance):
    for name in ("SGD", "Adam", "weight_norm, SGD"):
        with pytest.raises(AssertionError):
            check_invariant(invariance, invariance.METHODS[name])


def test_the_twin_is_the_same_function(invariance):
    model = invariance.start(0, "float64, eps 1e-30")
    twin = invariance.rescaled(model, 0)
    probe = torch.randn(20, 1, 8, 8, dtype=torch.float64)
    assert not torch.allclose(model[0].weight, twin[0].weight)
    ours, theirs = invariance.outputs(model, probe), invariance.outputs(twin, probe)
    assert float((ours - theirs).norm() / ours.norm()) < 1000 * torch.finfo(torch.float64).eps
    for net in (model, twin):
        net.eval()
    torch.testing.assert_close(model(probe), twin(probe))


def test_stored_results_round_trip(invariance, tmp_path):
    results = {("SGD", precision, 0): [0.5] * len(invariance.RECORDED) for precision in invariance.PRECISIONS}
    (tmp_path / "x.csv").write_text(invariance.as_csv(results))
    assert invariance.read_csv(tmp_path / "x.csv") == results
