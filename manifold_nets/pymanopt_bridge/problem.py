"""A network and its loss as a problem for pymanopt's optimizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pymanopt
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manifold_nets.pymanopt_bridge.cost import Evaluations, NetworkCost, Objective, OnCost
from manifold_nets.pymanopt_bridge.parameters import Point, parameter_names, point_of, product_manifold, write_back
from manifold_nets.running import split_inputs

__all__ = ["NetworkProblem", "problem"]


class NetworkProblem(pymanopt.Problem):  # type: ignore[misc]
    """The full-batch loss of a network on the manifold of its parameters, for the optimizers of pymanopt.

    Steepest descent, conjugate gradient, trust regions and particle swarms run; ``NelderMead`` of pymanopt 2.2 runs on
    no product of manifolds.

    Made by `problem`. The model itself is untouched until `write_back`. Structure, mode (training or evaluation),
    buffers and frozen parameters are those that the model has when the cost is evaluated.

    Args:
        model: the network.
        objective: function of a model whose result is the loss.
        on_cost: called with point and cost after every forward pass for a cost, to record them; what it raises ends
            the optimizer and reaches the caller.

    Raises:
        PointError: no parameter requires a gradient, or one is neither float32 nor float64.
        UnsupportedManifoldError: a parameter lies on a manifold that is no `manifold_nets.SphereProduct`.
        OffManifoldError: a weight is not on its spheres.
        CostError: the loss is not one finite number, or differs from one evaluation to the next.
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
        """Return the parameters that the model has now, as a point to start from."""
        return point_of(self.model)

    def write_back(self, point: Sequence[NDArray[Any]], *, refresh_statistics: bool = True) -> None:
        """Write a point into the model, and take the running statistics of its batch normalizations at that point.

        The cost never touches buffers, so that running statistics would still be those of the start: each batch
        normalization that is in training mode gets the statistics of the data that the loss runs through it. What
        else the loss may write is left as it was only in its own evaluations; here the model runs once as it is.

        Args:
            point: one array a parameter.
            refresh_statistics: whether to run the loss once to renew the running statistics.

        Raises:
            PointError: the point does not fit; the model is left as it was.
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

    Training data are handed over as tensors, ``f(w) = loss(model(inputs), targets)``, or, without ``inputs``, the loss
    is a function of the model, ``f(w) = loss(model)``, that runs it as it likes.

    Args:
        model: the network, in the mode in which it is to be run; float64 (``model.double()``) for second-order
            methods that are to converge to more than a few digits.
        loss: function of outputs and targets, or of the model; one number.
        inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs, or both in a tuple; on the device
            of the model.
        targets: what the loss compares the outputs with.
        on_cost: called with point and cost after every forward pass for a cost, to record them; what it raises ends
            the optimizer and reaches the caller.

    Returns:
        A `NetworkProblem`, with ``initial_point()`` and ``write_back(point)``.

    Raises:
        PointError: no parameter requires a gradient, or one is neither float32 nor float64.
        UnsupportedManifoldError: a parameter lies on a manifold that is no `manifold_nets.SphereProduct`.
        OffManifoldError: a weight is not on its spheres.
        ExampleInputsError: the inputs are none of the above.
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
