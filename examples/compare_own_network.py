"""Compare optimizers on one's own network and data loaders."""

import torch
from torch import nn
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


def main() -> None:
    """Compare, and print the table of test errors at the learning rates that validation chose."""
    task = task_from_data(*loaders(), name="surfaces", outputs=3)
    rates = [0.01, 0.1, 1.0]
    print(mn.compare(network, task=task, optimizers=["sgd", "rsgd", "pbwn"], learning_rates=rates, seeds=2, epochs=6))


if __name__ == "__main__":
    main()
