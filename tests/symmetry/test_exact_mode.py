"""The conditions of the certificate hold wherever the network runs: forward, and once more in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import manifold_nets as mn
from manifold_nets.symmetry import gradients

Memory = Literal["full", "small"]
# Rounding of one pass: in float64, and with gradients in float32.
LIMITS: dict[Memory, float] = {"full": 64 * torch.finfo(torch.float64).eps, "small": torch.finfo(torch.float32).eps}


class Checkpointed(nn.Module):
    """A normalized layer whose activations are computed anew in the backward pass."""

    def __init__(self, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(lambda x: torch.relu(self.normalize(self.a(x))), x, use_reentrant=False)
        return self.head(y)


# The eps is an attribute of a module, an argument of a function, and a number that is added.
NORMALIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.BatchNorm1d(8, eps=1e-3),
    "function": lambda y: F.layer_norm(y, (8,), eps=1e-3),
    "by hand": lambda y: y / torch.sqrt(y.square().mean(1, keepdim=True) + 1e-3),
}


def largest_value(name: str, memory: Memory) -> float:
    torch.manual_seed(1)
    report = mn.diagnose(Checkpointed(NORMALIZED[name]), torch.randn(8, 6), memory=memory)
    assert report["a.weight"].partition is not None
    assert report["head.weight"].certificate.verdict == "not invariant"
    scales = [family.certificate for family in report.families if family.kind == "scale"]
    values = [certificate.value for certificate in (report["a.weight"].certificate, *scales)]
    return max(1.0 if value is None else value for value in values)


@pytest.mark.parametrize("memory", LIMITS)
@pytest.mark.parametrize("name", NORMALIZED)
def test_activations_that_are_computed_anew_are_those_of_the_forward_pass(name: str, memory: Memory) -> None:
    assert largest_value(name, memory) <= LIMITS[memory]


@pytest.mark.parametrize("name", ["function", "by hand"])
def test_with_the_eps_of_the_model_in_the_backward_pass_they_are_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sabotage twin of the test above: tensors in place of edges take the function mode off."""
    monkeypatch.setattr(gradients, "get_gradient_edge", lambda tensor: tensor)
    with pytest.raises(AssertionError):
        assert largest_value(name, "full") <= LIMITS["full"]
