"""scikit-learn's handwritten digits, bundled with it: 1,797 images of 8 × 8 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from manifold_nets.comparison.protocols import Data, TensorSplit
from manifold_nets.comparison.records import Settings
from manifold_nets.errors import MissingExtraError

__all__ = ["Digits"]


@dataclass(frozen=True)
class Digits:
    """The task ``digits``: 1,297 images to train and validate on, the other 500 to test on."""

    name: str = "digits"
    description: str = "scikit-learn's handwritten digits, 8 × 8 pixels; the error is the share of wrong answers"

    def load(self, settings: Settings) -> Data:
        """The first 1,297 of a fixed order, the last ``settings.validation`` of them for validation."""
        x, y = self._images()
        train = len(y) - 500 - round(settings.validation * (len(y) - 500))
        mean, spread = x[:train].mean(), x[:train].std()
        x = (x[: len(y) - 500] - mean) / spread
        parts = [TensorSplit(x[rows], y[: len(x)][rows]) for rows in (slice(train), slice(train, None))]
        return Data(parts[0], parts[1], x[:8], 10)

    def load_test(self, settings: Settings) -> TensorSplit:
        """The last 500 of the order, with mean and deviation of the training images."""
        x, y = self._images()
        train = len(y) - 500 - round(settings.validation * (len(y) - 500))
        mean, spread = x[:train].mean(), x[:train].std()
        return TensorSplit((x[-500:] - mean) / spread, y[-500:])

    def _images(self) -> tuple[Tensor, Tensor]:
        try:
            from sklearn import datasets
        except ModuleNotFoundError as error:
            raise MissingExtraError("scikit-learn", "the digits", "compare") from error
        digits = datasets.load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
        return x[order], torch.tensor(digits.target)[order]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return cross_entropy(outputs, targets)

    def count(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Wrong answers, and all."""
        wrong = (outputs.argmax(1) != targets).sum()
        return torch.stack([wrong, torch.full_like(wrong, len(targets))])

    def error(self, counts: Tensor) -> float:
        """The share of wrong answers."""
        return float(counts[0] / counts[1])
