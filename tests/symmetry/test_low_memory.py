"""The analysis in little memory: the same answers, the model untouched, and a peak within three times the model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.diagnosis_cases import build
from helpers.toy_networks import TOYS
from torch import nn

import manifold_nets as mn
from manifold_nets.errors import OptionError
from manifold_nets.models import analysis_copy
from manifold_nets.symmetry.gradients import gradient_pass
from manifold_nets.symmetry.low_memory import ROUNDING, low_memory_copy, low_memory_pass, widen_vectors

# Largest peak of the process during the analysis, the model included, over the bytes of the model.
LARGEST_SHARE = 3.0
SCRIPT = """
import resource, sys
import torch
from torch import nn
import manifold_nets as mn

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
memory, kind, depth = sys.argv[1], sys.argv[2], int(sys.argv[3])

def network(depth, width):
    def layers():
        if kind == "convolutions":
            return nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        return nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()
    return nn.Sequential(*(part for _ in range(depth) for part in layers()))

def example(width):
    return torch.randn(4, width, 3, 3) if kind == "convolutions" else torch.randn(4, width)

mn.diagnose(network(2, 8), example(8), memory=memory)
before = peak()
# A convolution's weight of 38 MB, above what the allocator keeps for itself when it is freed; a matrix of 9 MB.
width = 1024 if kind == "convolutions" else 1536
model = network(depth, width)
report = mn.diagnose(model, example(width), memory=memory)
assert len(report.invariant) == depth, str(report)
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def answers(report: mn.SymmetryReport) -> list[object]:
    return [
        [(w.name, w.status, w.partition, w.finer_groups, w.moves_along) for w in report.weights],
        [(f.kind, f.members, f.count, f.certificate.verdict) for f in report.families],
        [(s.kind, s.parameters, s.count, s.certificate.verdict) for s in report.shifts],
    ]


@pytest.mark.parametrize("name", sorted(TOYS)[::3])
def test_the_same_answers(name: str) -> None:
    model, x = build(TOYS[name]), TOYS[name].inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = mn.diagnose(model, x, memory="small")
    assert answers(report) == answers(mn.diagnose(model, x))
    assert report.tolerance == ROUNDING
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_those_of_the_full_pass_rounded() -> None:
    """Also where a weight is used twice and transposed."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.a(x) + self.b(self.a(x))).tanh() @ self.a.weight

    torch.manual_seed(2)
    model, x = Tied(), torch.randn(7, 5)
    inputs = ((x.double(),), {})
    full = gradient_pass(analysis_copy(model), inputs, 3)
    twin = low_memory_copy(model)
    widen_vectors(twin)
    lean = low_memory_pass(twin, inputs, 3)
    assert set(lean.gradients) == set(full.gradients)
    for name, gradient in full.gradients.items():
        assert torch.equal(full.weights[name], lean.weights[name])
        assert float((lean.gradients[name] - gradient).norm()) <= ROUNDING * float(gradient.norm())


def test_weights_that_are_zero_stay_so_in_the_model() -> None:
    """The analysis draws them anew, on its own copy."""
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    nn.init.zeros_(model[0].weight)
    assert mn.diagnose(model, torch.randn(7, 5), memory="small")["0.weight"].partition is not None
    assert not bool(model[0].weight.any())


def test_another_word_for_memory_is_refused() -> None:
    with pytest.raises(OptionError, match="memory: found 'tiny'"):
        mn.diagnose(nn.Linear(2, 2), torch.randn(3, 2), memory="tiny")  # type: ignore[arg-type]


def share(memory: str, kind: str, depth: int) -> float:
    words = [sys.executable, "-c", SCRIPT, memory, kind, str(depth)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize(("kind", "depth"), [("convolutions", 12), ("matrices", 24)])
def test_the_peak_stays_within_three_times_the_model(kind: str, depth: int) -> None:
    assert share("small", kind, depth) <= LARGEST_SHARE


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of its memory from /proc")
def test_the_full_analysis_takes_more() -> None:
    """Sabotage twin: the measurement sees what the small one saves."""
    with pytest.raises(AssertionError):
        assert share("full", "convolutions", 4) <= LARGEST_SHARE
