"""The built-in optimizers by name: which library, which parameter groups, which options.

Every optimizer gets the parameter groups of `manifold_nets.param_groups`: weight decay acts on weights of two or more
dimensions that are not on spheres, never on biases and normalizations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manifold_nets._geoopt import geoopt
from manifold_nets.comparison.optimizers.spec import Form, Make, Objective, OptimizerSpec, Stepper, TorchStepper
from manifold_nets.comparison.settings import Settings
from manifold_nets.errors import MissingExtraError
from manifold_nets.groups import filter_partition
from manifold_nets.optim import OPTIMIZERS as OWN
from manifold_nets.optim import param_groups, scaled_metric_groups
from manifold_nets.sources import import_torchvision

if TYPE_CHECKING:
    from manifold_nets.pymanopt_bridge import Iteration, NetworkProblem

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def from_torch(kind: Callable[..., torch.optim.Optimizer], *, momentum: bool = False, **options: Any) -> Make:
    """Make an optimizer with the interface of `torch.optim`.

    Args:
        kind: its class, or a function that returns one.
        momentum: whether to pass the momentum of the settings.
        options: further options.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        groups = param_groups(model, weight_decay=settings.weight_decay)
        # Only the options that every optimizer has.
        known = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        extra = {"momentum": settings.momentum} if momentum else {}
        return TorchStepper(kind(known, lr=rate, **extra, **options))

    return make


def with_weight_norm(make: Make) -> Make:
    """Apply `torch.nn.utils.parametrizations.weight_norm` to every linear and convolution layer first.

    Each output channel has a direction and a length, also in transposed convolutions; the lengths are trained too.
    """

    def parametrized(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        for module in list(model.modules()):
            if isinstance(module, _LAYERS):
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                nn.utils.parametrizations.weight_norm(module, dim=1 if transposed else 0)
        return make(model, rate, settings)

    return parametrized


def from_table(name: str) -> Make:
    """Make an optimizer of `manifold_nets.optim.OPTIMIZERS`.

    The scaled metric is that of the paper: the filters of every linear and convolution weight, including the
    classifier's.
    """
    row = OWN[name]

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        if row.weights == "spheres":
            # The tuned learning rate is used for spheres and all other parameters.
            groups = param_groups(model, weight_decay=settings.weight_decay, sphere_lr=rate)
        else:
            layers = {f"{n}.weight" if n else "weight": m for n, m in model.named_modules() if isinstance(m, _LAYERS)}
            filters = {name: filter_partition(layer) for name, layer in layers.items()}
            groups = scaled_metric_groups(model, filters, weight_decay=settings.weight_decay)
        options = dict(row.options) if row.adaptive else {"momentum": settings.momentum, **row.options}
        kind: Callable[..., torch.optim.Optimizer] = row.kind
        return TorchStepper(kind(groups, lr=rate, **options))

    return make


def _timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(*args: Any, **options: Any) -> torch.optim.Optimizer:
        try:
            import_torchvision()  # timm imports it, and it may need help
            from timm import optim
        except ModuleNotFoundError as error:
            raise MissingExtraError("timm", f"{name} and other optimizers", "compare") from error
        made: torch.optim.Optimizer = getattr(optim, name)(*args, **options)
        return made

    return make


_sgd, _adam = from_torch(torch.optim.SGD, momentum=True), from_torch(torch.optim.Adam)
_nesterov = from_torch(torch.optim.SGD, momentum=True, nesterov=True)
_rmsprop = from_torch(torch.optim.RMSprop, momentum=True)
_geoopt_rsgd = from_torch(geoopt.optim.RiemannianSGD, momentum=True, stabilize=10)
_geoopt_radam = from_torch(geoopt.optim.RiemannianAdam, stabilize=10)
_sgdp, _adamp = from_torch(_timm("SGDP"), momentum=True), from_torch(_timm("AdamP"))

_ROWS: tuple[tuple[str, Form, str, str, Make, str], ...] = (
    ("sgd", "plain", "sgd", "torch", _sgd, "SGD with momentum"),
    ("sgd-nesterov", "plain", "sgd", "torch", _nesterov, "SGD with Nesterov's momentum; needs a momentum"),
    ("sgd-wn", "plain", "sgd", "torch", with_weight_norm(_sgd), "SGD on torch's weight normalization"),
    ("adam", "plain", "adam", "torch", _adam, "Adam; weight decay by an L2 penalty"),
    ("adam-wn", "plain", "adam", "torch", with_weight_norm(_adam), "Adam on torch's weight normalization"),
    ("adamw", "plain", "adam", "torch", from_torch(torch.optim.AdamW), "Adam with decoupled weight decay"),
    ("nadam", "plain", "adam", "torch", from_torch(torch.optim.NAdam), "Adam with Nesterov's momentum"),
    ("rmsprop", "plain", "adam", "torch", _rmsprop, "RMSprop with momentum"),
    ("adagrad", "plain", "adam", "torch", from_torch(torch.optim.Adagrad), "AdaGrad"),
    ("geoopt-rsgd", "converted", "sgd", "geoopt", _geoopt_rsgd, "geoopt's Riemannian SGD on the same manifold"),
    ("geoopt-radam", "converted", "adam", "geoopt", _geoopt_radam, "geoopt's Riemannian Adam on the same manifold"),
    ("sgdp", "plain", "sgd", "timm", _sgdp, "SGD without the radial part of its steps"),
    ("adamp", "plain", "adam", "timm", _adamp, "Adam without the radial part of its steps"),
)


def _own(name: str) -> OptimizerSpec:
    row = OWN[name]
    form: Form = "converted" if row.weights == "spheres" else "plain"
    family, description = "adam" if row.adaptive else "sgd", f"{row.kind.__name__}, {row.source}"
    return OptimizerSpec(name, form, family, "manifold_nets", from_table(name), description=description)


# ---- pymanopt: one iteration per epoch on the full batch -------------------------------------------------------------


class PymanoptStepper:
    """A `Stepper` around an optimizer of pymanopt: one iteration per step, on the full batch.

    The optimizer keeps its state between steps. After a step the model holds the point with the lowest loss so far, and
    its batch normalizations the statistics at that point. Once the optimizer has stopped by its own criteria, further
    steps change nothing.

    Args:
        model: the network.
        optimizer: any optimizer of pymanopt that works on products of manifolds.
        weight_decay: λ; λ/2 times the squared norm of the decayed weights is added to the loss.
        options: further arguments of the optimizer's ``run``.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, *, weight_decay: float = 0.0, options: dict[str, Any] | None = None
    ) -> None:
        self._model, self._optimizer, self._options = model, optimizer, options or {}
        self._penalized = _PenalizedLoss(model, weight_decay)
        self._problem: NetworkProblem | None = None
        self._running: Iterator[Iteration] = iter(())
        self._loss = 0.0

    def step(self, objective: Objective) -> float:
        """One iteration; return the loss before it, without the penalty of weight decay.

        Args:
            objective: the loss on all training examples.
        """
        from manifold_nets import pymanopt_bridge

        self._penalized.objective = objective
        if self._problem is None:
            self._problem = pymanopt_bridge.problem(self._model, self._penalized)
            self._loss = self._problem.cost(self._problem.initial_point()) - self._penalized.penalty()
            self._running = pymanopt_bridge.iterations(self._optimizer, self._problem, **self._options)
        before = self._loss
        reached = next(self._running, None)
        if reached is not None:
            self._problem.write_back(reached.point)
            self._loss = reached.cost - self._penalized.penalty()
        self._penalized.objective = None
        return before

    def set_learning_rate(self, factor: float) -> None:
        """Do nothing: after the first iteration these optimizers choose their own step lengths."""


class _PenalizedLoss:
    """The loss of the present objective plus the penalty of weight decay.

    It is a separate object because the thread of an optimizer holds it and must not hold the stepper, which ends the
    thread when it is deleted.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.objective: Objective | None = None
        self._model, self._weight_decay = model, weight_decay
        groups = param_groups(model, weight_decay=weight_decay)
        self._decayed = [name for group in groups if group["weight_decay"] > 0 for name in group["param_names"]]

    def __call__(self, model: nn.Module) -> Tensor:
        if self.objective is None:
            raise RuntimeError("the loss was evaluated between two steps, when there is no objective")
        loss = self.objective.loss()
        for name in self._decayed:
            loss = loss + 0.5 * self._weight_decay * _tensor(model, name).square().sum()
        return loss

    def penalty(self) -> float:
        squares = (float(_tensor(self._model, name).detach().double().square().sum()) for name in self._decayed)
        return 0.5 * self._weight_decay * sum(squares)


def _tensor(model: nn.Module, name: str) -> Tensor:
    # Not `get_parameter`: during an evaluation a plain tensor stands in the place of a parameter.
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _from_pymanopt(name: str) -> Make:
    """Make an optimizer of `pymanopt.optimizers` for the full batch.

    The learning rate is the length of the first step that a line search tries, or the first radius of a trust region;
    later ones are chosen by the optimizer.

    Raises:
        MissingExtraError: when the optimizer is made, if pymanopt is not installed.
    """

    def make(model: nn.Module, rate: float, settings: Settings) -> Stepper:
        from manifold_nets import pymanopt_bridge  # noqa: F401, I001  says what to install where pymanopt is absent
        from pymanopt import optimizers
        from pymanopt.optimizers import line_search

        limits = {"max_iterations": 10**9, "max_cost_evaluations": 10**9, "max_time": float("inf")}
        options: dict[str, Any] = {"Delta0": rate} if name == "TrustRegions" else {}
        searchers = {"ConjugateGradient": "AdaptiveLineSearcher", "SteepestDescent": "BackTrackingLineSearcher"}
        if name in searchers:
            limits["line_searcher"] = getattr(line_search, searchers[name])(initial_step_size=rate)
        optimizer = getattr(optimizers, name)(verbosity=0, **limits)
        return PymanoptStepper(model, optimizer, weight_decay=settings.weight_decay, options=options)

    return make


_EXACT = "trust regions with exact Hessians, which are not counted as evaluations; the full batch"
_PYMANOPT = (
    ("pymanopt-sd", "SteepestDescent", "steepest descent with line search; the full batch"),
    ("pymanopt-cg", "ConjugateGradient", "nonlinear conjugate gradients with line search; the full batch"),
    ("pymanopt-tr", "TrustRegions", _EXACT),
)

#: The built-in optimizers, by the names that the command line gives them.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    found.name: found
    for found in (
        *(OptimizerSpec(*row[:5], description=row[5]) for row in _ROWS),
        *map(_own, OWN),
        *(
            OptimizerSpec(name, "converted", "full batch", "pymanopt", _from_pymanopt(kind), True, text)
            for name, kind, text in _PYMANOPT
        ),
    )
}
