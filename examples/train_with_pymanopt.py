"""Train a batch-normalized network on 500 digits with pymanopt: cost, gradient and Hessian of the full batch by torch.

Compares what steepest descent, conjugate gradients and trust regions reach from the same start within the same number
of cost evaluations, after checking gradient and Hessian by the slopes of their errors.
"""

import contextlib

import numpy as np
import pymanopt
import torch
from sklearn.datasets import load_digits
from torch import nn

import manifold_nets as mn
from manifold_nets import pymanopt_bridge as bridge

EVALUATIONS = 25


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The first 500 digits of scikit-learn, pixels in [0, 1], and their classes."""
    data = load_digits()
    return torch.tensor(data.data[:500] / 16, dtype=torch.float64), torch.tensor(data.target[:500])


def build(inputs: torch.Tensor) -> nn.Module:
    """A network with two hidden layers, converted: the filters of both lie on unit spheres."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Linear(64, 30), nn.BatchNorm1d(30), nn.GELU()),
        *(nn.Linear(30, 30), nn.BatchNorm1d(30), nn.GELU()),
        nn.Linear(30, 10),
    )
    return mn.convert(plain.double(), inputs)


class BudgetSpentError(Exception):
    """The budget is spent."""


def best_within(budget: int, name: str, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Run an optimizer until it has computed that many costs; print the lowest of them."""
    costs: list[float] = []

    def record(_: list[np.ndarray], cost: float) -> None:
        costs.append(cost)
        if len(costs) == budget:
            raise BudgetSpentError

    problem = bridge.problem(model, nn.functional.cross_entropy, inputs, targets, on_cost=record)
    optimizer = getattr(pymanopt.optimizers, name)(verbosity=0)
    with contextlib.suppress(BudgetSpentError):
        optimizer.run(problem, initial_point=problem.initial_point())
    spent = problem.evaluations
    print(f"{name:18s}", end="")
    print(f"loss {min(costs):.2e} after {spent.cost} costs, {spent.gradient} gradients, {spent.hessian} Hessians")


def main() -> None:
    """Check the derivatives, compare three optimizers, and write the best point into the network."""
    inputs, targets = digits()
    model = build(inputs)
    problem = bridge.problem(model, nn.functional.cross_entropy, inputs, targets)
    start = problem.initial_point()
    print(f"{problem.manifold.dim} dimensions; loss at the start {problem.cost(start):.4f}")
    print(f"slope of the gradient's error {bridge.gradient_slope(problem, start):.2f} (2 is exact)")
    print(f"slope of the Hessian's error  {bridge.hessian_slope(problem, start):.2f} (3 is exact)")

    for name in ("SteepestDescent", "ConjugateGradient", "TrustRegions"):
        best_within(EVALUATIONS, name, model, inputs, targets)

    result = pymanopt.optimizers.ConjugateGradient(verbosity=0, max_iterations=40).run(problem, initial_point=start)
    problem.write_back(result.point)
    error = (model.eval()(inputs).argmax(1) != targets).double().mean()
    print(f"conjugate gradients, 40 iterations: loss {result.cost:.2e}, training error {100 * float(error):.1f} %")


if __name__ == "__main__":
    main()
