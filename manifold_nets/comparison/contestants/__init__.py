"""The optimizers that take part in a comparison, in one table: how each is made for a model, and how it steps."""

from __future__ import annotations

from manifold_nets.comparison.contestants.loading import AnyOptimizer, contestant, own_contestant
from manifold_nets.comparison.contestants.steppers import TorchStepper
from manifold_nets.comparison.contestants.table import CONTESTANTS

__all__ = ["CONTESTANTS", "AnyOptimizer", "TorchStepper", "contestant", "own_contestant"]
