"""Multilayer perceptrons of any widths: linear layer, batch normalization, ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

__all__ = ["multilayer_perceptron"]


def multilayer_perceptron(
    input_shape: Sequence[int], outputs: int, widths: Sequence[int], *, normalize: bool = True
) -> nn.Sequential:
    """Return a perceptron: (linear → batch normalization → ReLU) for each width, then a linear classifier.

    Linear layers in front of a normalization have no bias, which it would remove.

    Args:
        input_shape: shape of one example; it is flattened.
        outputs: number of outputs.
        widths: widths of the hidden layers.
        normalize: whether to normalize; without, the hidden layers have biases.

    Example:
        >>> multilayer_perceptron((1, 8, 8), 10, [100])
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=64, out_features=100, bias=False)
          (2): BatchNorm1d(100, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
          (3): ReLU()
          (4): Linear(in_features=100, out_features=10, bias=True)
        )
    """
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(input_shape)
    for width in widths:
        layers.append(nn.Linear(features, width, bias=not normalize))
        if normalize:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        features = width
    return nn.Sequential(*layers, nn.Linear(features, outputs))
