"""Convert an ordinary network without changing what it computes, train it on spheres, store it, and give it back."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import manifold_nets as mn


def build() -> nn.Module:
    """A network with a residual sum; nothing about it knows of this package."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
            self.head = nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head(torch.relu(x + self.body(x)).mean((2, 3)))

    return Residual()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Fit random labels, to have something to optimize; return the last loss."""
    x, labels = torch.randn(32, 3, 8, 8), torch.randint(5, (32,))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main() -> None:
    """Walk through the life of a converted model."""
    torch.manual_seed(0)
    model = build()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), steps=30)
    x = torch.randn(8, 3, 8, 8)

    report = mn.diagnose(model, x)
    converted = mn.convert(model, report)
    print(mn.conversion_record(converted))

    # A learning rate means something else on spheres: these rates match the next step of SGD.
    rates = mn.matched_learning_rates(model, report, lr=0.05, momentum=0.9).by_weight()
    groups = mn.param_groups(converted, sphere_lr=rates)
    loss = train(converted, mn.optim.RiemannianSGD(groups, lr=0.05, momentum=0.9), steps=30)
    print(f"\nloss after 30 steps on spheres: {loss:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        mn.save(converted, path)
        loaded = mn.load(build(), path)
    print("loaded from its file:", loaded.stem[0].weight.manifold)

    plain = mn.revert(loaded)
    print("given back:", type(plain.stem[0].weight))
    print("the same function:", mn.verify(converted, plain, x))


if __name__ == "__main__":
    main()
