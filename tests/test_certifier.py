"""What the sums of one float64 pass prove, and what is only their rounding."""

from __future__ import annotations

import pytest
import torch

from manifold_nets.symmetry.certificate.certifier import ROUNDED, Certifier
from manifold_nets.symmetry.certificate.euler import EVIDENCE_FLOOR, EulerField

TOLERANCE = 1e-8
EPS = torch.finfo(torch.float64).eps


def verdict_of_second_row(product: float, size: float) -> str:
    """Verdict on a row with this Euler sum and this ‖w‖‖g‖, beside a row whose ‖w‖‖g‖ is 1."""
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    gradient = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    certifier = Certifier(EulerField({"w": weight}, {"w": gradient}), TOLERANCE)
    found = certifier.verdict(*(torch.tensor([x], dtype=torch.float64) for x in (product, size, 1.0)))
    return found.verdict


@pytest.mark.parametrize(
    ("product", "size", "verdict"),
    [
        (0.0, 1e-3, "invariant"),
        (1e-12, 1e-3, "invariant"),
        (1e-4, 1e-3, "not invariant"),
        (1e-10, 1e-3, "not invariant"),
        (8 * EPS, 1e-9, "no evidence"),  # a value of 2e-6, and nothing but rounding
        (1e-10, 1e-10, "not invariant"),
        (1e-13, 1e-13, "no evidence"),
        (float("nan"), 1e-3, "not invariant"),
    ],
)
def test_verdicts(product: float, size: float, verdict: str) -> None:
    assert verdict_of_second_row(product, size) == verdict


def test_the_smallest_scale_that_matters_above_the_floor_is_still_refuted() -> None:
    """What counts as rounding lies so far below the floor that no group of evidence hides behind it."""
    assert ROUNDED * EVIDENCE_FLOOR >= 32 * EPS
    size = 2 * EVIDENCE_FLOOR
    assert verdict_of_second_row(size, size) == "not invariant"
    assert verdict_of_second_row(2 * ROUNDED * size, size) == "not invariant"


def test_without_the_allowance_rounding_would_refute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the first test."""
    monkeypatch.setattr("manifold_nets.symmetry.certificate.certifier.ROUNDED", 0.0)
    with pytest.raises(AssertionError):
        assert verdict_of_second_row(8 * EPS, 1e-9) == "no evidence"
