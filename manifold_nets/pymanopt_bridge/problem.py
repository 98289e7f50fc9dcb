"""A network and its loss as a problem for pymanopt's optimizers: cost, gradient and Hessian by torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pymanopt
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from manifold_nets.errors import CostError
from manifold_nets.pymanopt_bridge.manifold import (
    Point,
    parameter_names,
    point_of,
    product_manifold,
    trained_parameters,
    write_back,
)
from manifold_nets.running import split_inputs

__all__ = ["Evaluations", "NetworkCost", "NetworkProblem", "Objective", "OnCost", "problem"]

Objective = Callable[[nn.Module], Tensor]
OnCost = Callable[[Point, float], None]


@dataclass
class Evaluations:
    """How often the network was run: values, gradients, and Hessians along a vector.

    A value or gradient that is requested twice in a row at the same point is computed, and counted, once.

    Args:
        cost: forward passes for a value.
        gradient: forward and backward passes.
        hessian: backward passes through the backward pass.

    Example:
        >>> import torch
        >>> from manifold_nets import pymanopt_bridge as bridge
        >>> inputs, targets = torch.randn(8, 2).double(), torch.randn(8, 1).double()
        >>> problem = bridge.problem(torch.nn.Linear(2, 1).double(), torch.nn.functional.mse_loss, inputs, targets)
        >>> before = problem.evaluations.cost
        >>> _ = problem.cost(problem.manifold.random_point())
        >>> problem.evaluations.cost - before
        1
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
    its buffers. The last point is cached with its value, gradient and graph, because optimizers request them in turn.

    Args:
        model: the network.
        objective: function of the model that returns the loss.
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
        """Loss at a point; infinite instead of NaN, so that line searches step back."""
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
        return [array.copy() for array in self._gradient or self._differentiate(point)[0]]

    def hessian(self, *point_and_vector: NDArray[Any]) -> Point:
        """Euclidean Hessian at a point along a vector: the gradient of ``⟨gradient, vector⟩``."""
        half = len(point_and_vector) // 2
        point, vector = point_and_vector[:half], point_and_vector[half:]
        self._go_to(point)
        if self._graph is None:
            # The fused kernels of attention have no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                self._graph = self._differentiate(point, create_graph=True)[1:]
        tensors, gradients = self._graph
        self.evaluations.hessian += 1
        # A parameter in which the loss is linear has a constant gradient.
        rows = [(g, v.to(g.dtype)) for g, v in zip(gradients, self._tensors(vector), strict=True) if g.requires_grad]
        if not rows:
            return [np.zeros_like(array) for array in point]
        outputs, along = zip(*rows, strict=True)
        products = torch.autograd.grad(
            outputs, tensors, along, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return _arrays(products, point)

    def _differentiate(
        self, point: Sequence[NDArray[Any]], *, create_graph: bool = False
    ) -> tuple[Point, list[Tensor], tuple[Tensor, ...]]:
        """The gradient at a point, and the parameters and gradients in torch, between which is a graph if asked for."""
        self.evaluations.gradient += 1
        tensors = self._tensors(point, differentiable=True)
        loss = self._loss(tensors)
        if not loss.requires_grad:
            remedy = "Compute it from the outputs of the model that was passed, with gradients enabled."
            found = "a number that does not depend on the parameters"
            raise CostError(found, "a differentiable function of the parameters", remedy)
        each = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        gradients = tuple(gradient.to_dense() for gradient in each)  # those of embeddings may be sparse
        self._value, self._gradient = _number(loss), _arrays(gradients, point)
        return self._gradient, tensors, gradients

    def require_function(self, point: Point) -> None:
        """Raise `CostError` unless the loss is one finite number, the same at every evaluation."""
        first, second = (self._fresh_value(point) for _ in range(2))
        if not math.isfinite(first):
            raise CostError(f"{first} at the model's parameters", "a finite number", "Start from other weights.")
        if first != second:
            raise CostError(
                f"{first!r} and {second!r} for the same parameters",
                "the same value at every evaluation",
                "Remove randomness: set the p of dropout to 0 or call model.eval(), do not shuffle the data, and call "
                "torch.use_deterministic_algorithms if kernels add in random order.",
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
            raise CostError(found, "a tensor with one real number", "Reduce it, for instance with loss.mean().")
        return loss.reshape(())


def _number(loss: Tensor) -> float:
    value = float(loss.detach())
    return value if math.isfinite(value) else math.inf


def _arrays(tensors: Sequence[Tensor], point: Sequence[NDArray[Any]]) -> Point:
    return [
        tensor.detach().to_dense().cpu().to(torch.float64, copy=True).numpy().reshape(array.shape)
        for tensor, array in zip(tensors, point, strict=True)
    ]


class NetworkProblem(pymanopt.Problem):  # type: ignore[misc]
    """The full-batch loss of a network on the manifold of its parameters, for the optimizers of pymanopt.

    Steepest descent, conjugate gradient, trust regions and particle swarms work; ``NelderMead`` of pymanopt 2.2 does
    not support products of manifolds.

    Made by `problem`. The model is not changed until `write_back`. Structure, mode (training or evaluation), buffers
    and frozen parameters are those of the model when the cost is evaluated.

    Args:
        model: the network.
        objective: function of a model that returns the loss.
        on_cost: called with point and cost after every forward pass for a cost, to record them; an error that it raises
            ends the optimizer and reaches the caller.

    Raises:
        PointError: no parameter requires a gradient, or one is neither float32 nor float64.
        ParameterGroupError: a parameter lies on a manifold other than a `manifold_nets.SphereProduct`.
        OffManifoldError: a weight is not on its spheres.
        CostError: the loss is not one finite number, or differs from one evaluation to the next.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1).double()
        >>> found = NetworkProblem(net, lambda model: model(torch.ones(4, 2).double()).square().mean())
        >>> [values.shape for values in found.initial_point()]
        [(1, 2), (1,)]
    """

    def __init__(self, model: nn.Module, objective: Objective, *, on_cost: OnCost | None = None) -> None:
        cost = NetworkCost(model, objective, on_cost)
        cost.require_function(point_of(model))
        manifold = product_manifold(model)
        numpy_function = pymanopt.function.numpy(manifold)
        super().__init__(
            manifold,
            numpy_function(lambda *arrays: cost.value(*arrays)),
            euclidean_gradient=numpy_function(lambda *arrays: cost.gradient(*arrays)),
            euclidean_hessian=numpy_function(lambda *arrays: cost.hessian(*arrays)),
        )
        self.model = model
        self._objective = objective
        self._network_cost = cost

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the arrays of a point."""
        return parameter_names(self.model)

    @property
    def evaluations(self) -> Evaluations:
        """How often the network was run so far."""
        return self._network_cost.evaluations

    def initial_point(self) -> Point:
        """Return the present parameters of the model as a starting point."""
        return point_of(self.model)

    def write_back(self, point: Sequence[NDArray[Any]], *, refresh_statistics: bool = True) -> None:
        """Write a point into the model, and update the running statistics of its batch normalizations for that point.

        The cost never changes buffers, so running statistics would otherwise be those of the start. Each batch
        normalization in training mode gets the statistics of the data that the loss runs through it. The model itself
        is run once for this, so other side effects of the loss happen here, unlike in evaluations of the cost.

        Args:
            point: one array per parameter.
            refresh_statistics: whether to run the loss once to update the running statistics.

        Raises:
            PointError: the point does not fit; the model is unchanged.
        """
        write_back(self.model, point)
        if refresh_statistics:
            with _cumulative_statistics(self.model) as normalizations, torch.no_grad():
                if normalizations:
                    self._objective(self.model)


def problem(
    model: nn.Module,
    loss: Callable[..., Tensor],
    inputs: Any = None,
    targets: Any = None,
    *,
    on_cost: OnCost | None = None,
) -> NetworkProblem:
    """Return the training of a network as a `pymanopt.Problem`: cost, gradient and Hessian by torch.

    Training data are passed as tensors, ``f(w) = loss(model(inputs), targets)``. Without ``inputs``, the loss is a
    function of the model, ``f(w) = loss(model)``, which runs it in any way.

    Args:
        model: the network, in the mode in which it should run; use float64 (``model.double()``) for second-order
            methods that must converge to more than a few digits.
        loss: function of outputs and targets, or of the model, that returns one number.
        inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or both in a tuple; on the device
            of the model.
        targets: second argument of the loss.
        on_cost: called with point and cost after every forward pass for a cost, to record them; an error that it raises
            ends the optimizer and reaches the caller.

    Returns:
        A `NetworkProblem`, with ``initial_point()`` and ``write_back(point)``.

    Raises:
        PointError: no parameter requires a gradient, or one is neither float32 nor float64.
        ParameterGroupError: a parameter lies on a manifold other than a `manifold_nets.SphereProduct`.
        OffManifoldError: a weight is not on its spheres.
        ExampleInputsError: the inputs have another form.
        CostError: the loss is not one finite number, or differs from one evaluation to the next.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(3, 1).double(), torch.randn(20, 3, dtype=torch.float64)
        >>> regression = problem(model, nn.functional.mse_loss, x, x.sum(1, keepdim=True))
        >>> cg = pymanopt.optimizers.ConjugateGradient(verbosity=0)
        >>> result = cg.run(regression, initial_point=regression.initial_point())
        >>> regression.write_back(result.point)
        >>> model.weight.detach().round(decimals=4)
        tensor([[1., 1., 1.]], dtype=torch.float64)
    """
    if inputs is None:
        return NetworkProblem(model, loss, on_cost=on_cost)
    args, kwargs = split_inputs(inputs)
    return NetworkProblem(model, lambda network: loss(network(*args, **kwargs), targets), on_cost=on_cost)


@contextlib.contextmanager
def _cumulative_statistics(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Reset the running statistics of the batch normalizations in training mode, and let them average all batches."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.running_mean is not None
    ]
    momenta = [module.momentum for module in found]
    for module in found:
        module.reset_running_stats()
        module.momentum = None
    try:
        yield list(found)
    finally:
        for module, momentum in zip(found, momenta, strict=True):
            module.momentum = momentum
