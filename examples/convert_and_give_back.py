"""Convert a network in mid-training without changing what it computes, go on on spheres, store it, and give it back."""

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
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, sgd, steps=30)
    x = torch.randn(8, 3, 8, 8)

    converted = mn.convert(model, x)
    print(mn.conversion_record(converted))

    # The run goes on: the same steps, momentum and rates, on spheres.
    optimizer = mn.optim.from_torch(sgd, model, converted)
    loss = train(converted, optimizer, steps=30)
    print(f"\nloss after 30 steps on spheres: {loss:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        mn.save(converted, path)
        loaded = mn.load(build(), path)
    print("loaded from its file:", loaded.stem[0].weight.manifold)

    plain = mn.revert(loaded)
    print("given back:", type(plain.stem[0].weight))
    print("the same function:", mn.verify(converted, plain, x))

    # Or with the norms that the plain run would have by now, so that it can go on as if it had never been converted.
    plain = mn.revert(converted, norms=mn.optim.plain_norms(optimizer, converted))
    loss = train(plain, mn.optim.to_torch(optimizer, converted, plain), steps=30)
    print(f"loss after 30 more steps, plain again: {loss:.3f}")


if __name__ == "__main__":
    main()
