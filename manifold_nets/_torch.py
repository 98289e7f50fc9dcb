"""What differs between the releases of torch that the package runs with; all other modules need not ask."""

from __future__ import annotations

import torch

__all__ = ["check_graph_capture"]


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that a CUDA graph records without ``capturable``, as the optimizers of torch do."""
    # Newer releases keep the older name too, but warn about it.
    newer, older = "_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"
    getattr(optimizer, newer if hasattr(optimizer, newer) else older)()
