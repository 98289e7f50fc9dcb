"""A one-dimensional convolutional network for time series."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

__all__ = ["convolutions_1d"]


def convolutions_1d(channels: int, outputs: int, widths: Sequence[int] = (64, 128, 64)) -> nn.Sequential:
    """Return (convolution → batch normalization → ReLU) for each width, the mean over time, and a linear classifier.

    The first kernel is 9 wide, the second 5, the others 3.

    Args:
        channels: channels of the series.
        outputs: number of classes.
        widths: channels of the convolutions; (128, 256, 128) in the paper, with kernels 8, 5 and 3.

    References:
        Wang, Yan, Oates, *Time series classification from scratch with deep neural networks*, arXiv:1611.06455.

    Example:
        >>> import torch
        >>> convolutions_1d(12, 9, [8, 8])(torch.zeros(2, 12, 29)).shape
        torch.Size([2, 9])
    """
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        kernel = {0: 9, 1: 5}.get(index, 3)
        layers += [
            nn.Conv1d(channels, width, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, outputs))
