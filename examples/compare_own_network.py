"""Compare optimizers, one's own among them, on one's own network and data loaders."""

import torch
from torch import nn
from torch.optim.optimizer import ParamsT
from torch.utils.data import DataLoader, TensorDataset

import manifold_nets as mn
from manifold_nets.comparison.tasks import task_from_data


def network() -> nn.Module:
    """Two batch-normalized layers; every run starts from fresh weights of its seed."""
    hidden = [nn.Linear(12, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(40, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3))


def loaders() -> list[DataLoader]:
    """Training, validation and test data: which of three curved surfaces a point lies nearest to."""
    x = torch.randn(1500, 12, generator=torch.Generator().manual_seed(0))
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].square() - 1, x[:, 3] + x[:, 4]]).argmax(0)
    return [DataLoader(TensorDataset(x[rows], y[rows]), batch_size=50) for rows in torch.arange(1500).split(500)]


class Lion(torch.optim.Optimizer):
    """Steps of one length: the sign of a mixture of momentum and gradient (Chen et al. 2023, arXiv:2302.06675)."""

    def __init__(self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(momentum.lerp(p.grad, 1 - fast).sign(), alpha=group["lr"])
                    momentum.lerp_(p.grad, 1 - slow)


def main() -> None:
    """Compare, and print the table of test errors at the learning rates that validation chose."""
    task = task_from_data(*loaders(), name="surfaces", outputs=3)
    rates = [0.001, 0.01, 0.1, 1.0]
    print(mn.compare(network, task=task, optimizers=["sgd", "rsgd", Lion], learning_rates=rates, seeds=2, epochs=6))


if __name__ == "__main__":
    main()
