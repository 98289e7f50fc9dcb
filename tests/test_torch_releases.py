"""What older and newer releases of torch do otherwise, imitated on the one at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import manifold_nets as mn
from manifold_nets import _torch
from manifold_nets.symmetry import trace


class Capturing(torch.optim.SGD):
    def _cuda_graph_capture_health_check(self) -> None:
        raise RuntimeError("a CUDA graph records this")


def test_the_check_of_graph_capture_goes_by_its_older_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = "_accelerator_graph_capture_health_check"
    optimizer = Capturing([nn.Parameter(torch.ones(1))], lr=0.1)
    if hasattr(torch.optim.Optimizer, newer):
        _torch.check_graph_capture(optimizer)
        monkeypatch.delattr(torch.optim.Optimizer, newer)
    with pytest.raises(RuntimeError, match="a CUDA graph records this"):
        _torch.check_graph_capture(optimizer)


class Remembering(nn.Module):
    """A model that keeps its last mean, in an attribute, and counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.last = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), torch.zeros(())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.fc(x))
        self.last, self.count = y.detach().mean(), self.count + 1
        return y


def refuses(buffer: Any, *_: Any) -> None:
    raise AssertionError("a buffer was assigned")


@pytest.fixture
def _failing_export(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.export` fails as in torch 2.8: attributes and a hook of the whole process stay behind."""

    def export(model: nn.Module, *_: Any, **options: Any) -> None:
        model.last = model.count = torch.zeros((), device="meta")
        torch_module.register_module_buffer_registration_hook(refuses)
        raise ValueError("The tensor attribute self.last was assigned during export.")

    monkeypatch.setattr(torch.export, "export", export)
    before = set(torch_module._global_buffer_registration_hooks)
    yield
    for left in torch_module._global_buffer_registration_hooks.keys() - before:
        del torch_module._global_buffer_registration_hooks[left]


@pytest.mark.usefixtures("_failing_export")
def test_an_export_that_fails_leaves_nothing_behind_and_the_certificate_stands_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Remembering(), torch.randn(16, 5)
    report = mn.diagnose(model, x)
    assert report["fc.weight"].status == "unknown"
    assert report["fc.weight"].certificate.verdict == "invariant"
    assert "Left out: the model could not be traced" in str(report)
    # Sabotage: what it leaves behind stays.
    monkeypatch.setattr(trace, "nothing_left_behind", contextlib.nullcontext)
    with pytest.raises(mn.errors.ManifoldNetsError):
        mn.diagnose(model, x)
