"""What differs between the releases of torch that the package runs with; all other modules need not ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["check_graph_capture", "nothing_left_behind"]


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that a CUDA graph records without ``capturable``, as the optimizers of torch do."""
    # Newer releases keep the older name too, but warn about it.
    newer, older = "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"
    getattr(optimizer, newer if hasattr(optimizer, newer) else older)()


@contextmanager
def nothing_left_behind(model: nn.Module) -> Iterator[None]:
    """Undo what a call of `torch.export` that fails leaves behind.

    What forward had assigned by then are tensors without values. Up to torch 2.8 a hook stays as well, by which no
    module of the process can assign a buffer any more.
    """
    modules = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    except Exception:
        for module, attributes, buffers in modules:
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
        for left in hooks.keys() - before:
            del hooks[left]
        raise
