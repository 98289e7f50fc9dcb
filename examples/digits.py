"""A small batch-normalized convolutional network, scikit-learn's handwritten digits, and one training loop.

`network` is also the MODEL of the demonstration's command lines: ``examples/digits.py:network``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def network() -> nn.Module:
    """Three 3x3 convolutions with batch normalization and ReLU, average pooling, and a linear classifier."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    features = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@dataclass(frozen=True)
class Images:
    """Images of shape (n, 1, 8, 8), about zero and of unit spread, with their labels."""

    x: Tensor
    y: Tensor


def load_digits() -> dict[str, Images]:
    """Return 1,000 images to train on, 297 to choose learning rates by, and 500 to test on: always the same ones."""
    from sklearn import datasets

    digits = datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = {"train": order[:1000], "validation": order[1000:1297], "test": order[1297:]}
    mean, spread = x[parts["train"]].mean(), x[parts["train"]].std()
    return {name: Images((x[rows] - mean) / spread, y[rows]) for name, rows in parts.items()}


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Return the mean cross-entropy and the error rate in evaluation mode."""
    model.eval()
    scores = model(images.x)
    return float(cross_entropy(scores, images.y)), float((scores.argmax(1) != images.y).double().mean())


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, order: torch.Generator, batch: int = 50
) -> float:
    """Train for one epoch in the order that the generator draws; return the mean loss."""
    model.train()
    total = 0.0
    for rows in torch.randperm(len(images.y), generator=order).split(batch):
        optimizer.zero_grad()
        loss = cross_entropy(model(images.x[rows]), images.y[rows])
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(rows)
    return total / len(images.y)
