"""The loss of a network as a function of a point: its value, its gradient and its Hessian along a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from manifold_nets.errors import CostError
from manifold_nets.pymanopt_bridge.parameters import Point, trained_parameters

__all__ = ["Evaluations", "NetworkCost", "Objective", "OnCost"]

Objective = Callable[[nn.Module], Tensor]
OnCost = Callable[[Point, float], None]


@dataclass
class Evaluations:
    """How often the network was run: values, gradients, and Hessians along a vector.

    A value or gradient that is asked for twice in a row at the same point is computed, and counted, once.

    Args:
        cost: forward passes for a value.
        gradient: forward and backward passes.
        hessian: backward passes through the backward pass.
    """

    cost: int = 0
    gradient: int = 0
    hessian: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return plain data for JSON."""
        return dict(vars(self))


class _Whole(nn.Module):
    """A module that runs the objective, so that `torch.func.functional_call` can put other parameters into it."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self) -> Tensor:
        return self.objective(self.model)


class NetworkCost:
    """The loss of a network as a function of a point, by torch's automatic differentiation.

    The model is never changed: every evaluation runs it with other parameters in place of its own and with copies of
    its buffers. The last point is remembered with its value, gradient and graph, since optimizers ask for them one
    after the other.

    Args:
        model: the network.
        objective: function of the model whose result is the loss.
        on_cost: called with point and value whenever a value was computed on its own.
    """

    def __init__(self, model: nn.Module, objective: Objective, on_cost: OnCost | None = None) -> None:
        self.model = model
        self.on_cost = on_cost
        self.evaluations = Evaluations()
        self._whole = _Whole(model, objective)
        self._point: Point | None = None
        self._value: float | None = None
        self._gradient: Point | None = None
        self._graph: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    def value(self, *point: NDArray[Any]) -> float:
        """Loss at a point; infinite where it is not a number, so that line searches step back."""
        self._go_to(point)
        if self._value is None:
            self.evaluations.cost += 1
            with torch.no_grad():
                self._value = _number(self._loss(self._tensors(point)))
            if self.on_cost is not None:
                self.on_cost([array.copy() for array in point], self._value)
        return self._value

    def gradient(self, *point: NDArray[Any]) -> Point:
        """Euclidean gradient at a point."""
        self._go_to(point)
        if self._gradient is None:
            self.evaluations.gradient += 1
            tensors = self._tensors(point, differentiable=True)
            loss = self._loss(tensors)
            gradients = _gradients(loss, tensors)
            self._value, self._gradient = _number(loss), _arrays(gradients, point)
        return [array.copy() for array in self._gradient]

    def hessian(self, *point_and_vector: NDArray[Any]) -> Point:
        """Euclidean Hessian at a point along a vector: the gradient of ``⟨gradient, vector⟩``."""
        half = len(point_and_vector) // 2
        point, vector = point_and_vector[:half], point_and_vector[half:]
        self._go_to(point)
        if self._graph is None:
            self.evaluations.gradient += 1
            tensors = self._tensors(point, differentiable=True)
            # The fused kernels of attention have no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                loss = self._loss(tensors)
                gradients = _gradients(loss, tensors, create_graph=True)
            self._value, self._gradient = _number(loss), _arrays(gradients, point)
            self._graph = tensors, gradients
        tensors, gradients = self._graph
        self.evaluations.hessian += 1
        # A parameter in which the loss is linear has a constant gradient.
        rows = [(g, v) for g, v in zip(gradients, self._tensors(vector), strict=True) if g.requires_grad]
        if not rows:
            return [np.zeros_like(array) for array in point]
        along = torch.autograd.grad(
            [g for g, _ in rows],
            tensors,
            [v.to(g.dtype) for g, v in rows],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return _arrays([product.to_dense() for product in along], point)

    def require_function(self, point: Point) -> None:
        """Raise `CostError` unless the loss is one finite number, the same at every evaluation."""
        first, second = (self._fresh_value(point) for _ in range(2))
        if not math.isfinite(first):
            raise CostError(f"{first} at the model's parameters", "a finite number", "Start from other weights.")
        if first != second:
            raise CostError(
                f"{first!r} and {second!r} for the same parameters",
                "the same value at every evaluation",
                "Take out what is random (dropout: set p to 0, or model.eval(); shuffled data; kernels that add in a "
                "random order: torch.use_deterministic_algorithms).",
            )

    def _fresh_value(self, point: Point) -> float:
        with torch.no_grad():
            return float(self._loss(self._tensors(point)))

    def _go_to(self, point: Sequence[NDArray[Any]]) -> None:
        if self._point is None or any(not np.array_equal(a, b) for a, b in zip(self._point, point, strict=True)):
            self._point = [array.copy() for array in point]
            self._value = self._gradient = self._graph = None

    def _tensors(self, arrays: Sequence[NDArray[Any]], *, differentiable: bool = False) -> list[Tensor]:
        return [
            torch.from_numpy(array.copy())
            .reshape(parameter.shape)
            .to(parameter.device, parameter.dtype)
            .requires_grad_(differentiable)
            for parameter, array in zip(trained_parameters(self.model).values(), arrays, strict=True)
        ]

    def _loss(self, tensors: Sequence[Tensor]) -> Tensor:
        values = dict(zip(trained_parameters(self.model), tensors, strict=True))
        values |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        loss = torch.func.functional_call(self._whole, {f"model.{name}": value for name, value in values.items()}, ())
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise CostError(found, "a tensor with one real number", "Reduce it, for instance by loss.mean().")
        return loss.reshape(())


def _gradients(loss: Tensor, tensors: list[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    if not loss.requires_grad:
        remedy = "Compute it from the outputs of the model that is handed over, with gradients enabled."
        raise CostError("a number that does not depend on the parameters", "a differentiable function of them", remedy)
    found = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return tuple(gradient.to_dense() for gradient in found)  # those of embeddings may be sparse


def _number(loss: Tensor) -> float:
    value = float(loss.detach())
    return value if math.isfinite(value) else math.inf


def _arrays(tensors: Sequence[Tensor], point: Sequence[NDArray[Any]]) -> Point:
    return [
        tensor.detach().cpu().to(torch.float64, copy=True).numpy().reshape(array.shape)
        for tensor, array in zip(tensors, point, strict=True)
    ]
