"""Time series that sktime bundles, and a one-dimensional convolutional network, as tasks and a model of a comparison.

manifold-nets compare --task examples/paper/series.py:japanese_vowels --model examples/paper/series.py:conv1d …
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.comparison.tasks import Task, classification
from manifold_nets.errors import MissingExtraError

__all__ = ["SERIES", "acsf1", "basic_motions", "conv1d", "convolutions_1d", "japanese_vowels", "osuleaf", "time_series"]

#: Names of the tasks, and of sktime's loaders, with what the series are.
SERIES = {
    "japanese-vowels": ("load_japanese_vowels", "nine speakers saying a vowel pair, 12 cepstral coefficients"),
    "osuleaf": ("load_osuleaf", "outlines of leaves of six species"),
    "acsf1": ("load_acsf1", "power consumption of ten kinds of home appliances"),
    "basic-motions": ("load_basic_motions", "accelerometer and gyroscope of a watch in four activities"),
}


def time_series(name: str) -> Task:
    """Return one of the data sets that sktime bundles, in its own split; a quarter of the training part validates.

    Series of unequal length are continued with zeros after standardization. Each channel is standardized by its mean
    and spread over the training part.

    Args:
        name: a key of `SERIES`.

    Raises:
        MissingExtraError: sktime is not installed.

    Example:
        >>> time_series("japanese-vowels").sizes()  # doctest: +SKIP
        {'train': 203, 'validation': 67, 'test': 370}
    """
    loader, description = SERIES[name]
    try:
        from sktime import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError("sktime", "the bundled time series", "series") from error
    load: Any = getattr(datasets, loader)
    (train_x, train_labels), (test_x, test_labels) = (load(split, return_X_y=True) for split in ("train", "test"))
    classes = sorted({str(label) for label in train_labels})
    x, lengths = _padded(train_x, test_x)
    y = torch.tensor([classes.index(str(label)) for label in (*train_labels, *test_labels)])
    known, count = len(train_labels), len(train_labels) - len(train_labels) // 4
    order = torch.randperm(known, generator=torch.Generator().manual_seed(0))
    rows = {"train": order[:count], "validation": order[count:], "test": torch.arange(known, len(y))}
    x = _standardized(x, lengths, rows["train"])
    return classification(
        name,
        {part: (x[chosen], y[chosen]) for part, chosen in rows.items()},
        outputs=len(classes),
        batch_size=16,
        source=f"bundled with sktime: {description}",
        split="the set's own test part; a permutation with seed 0 of the rest, a quarter for validation",
        preprocessing="each channel minus its mean over its spread in the training part; zeros after the end",
    )


def _padded(*parts: Any) -> tuple[Tensor, Tensor]:
    """Stack nested tables of series, with zeros after their ends; also their lengths."""
    series = [
        torch.stack([torch.tensor(channel.to_numpy(), dtype=torch.float32) for channel in row])
        for part in parts
        for row in part.itertuples(index=False)
    ]
    lengths = torch.tensor([one.shape[1] for one in series])
    padded = torch.zeros(len(series), series[0].shape[0], int(lengths.max()))
    for into, one in zip(padded, series, strict=True):
        into[:, : one.shape[1]] = one
    return padded, lengths


def _standardized(x: Tensor, lengths: Tensor, train: Tensor) -> Tensor:
    """Standardize each channel by the training series before their ends."""
    known = (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
    values, counts = x[train].double(), known[train].sum()
    mean = (values * known[train]).sum((0, 2), keepdim=True) / counts
    spread = (((values - mean) * known[train]).square().sum((0, 2), keepdim=True) / counts).sqrt().clamp_min(1e-12)
    return ((x - mean) / spread * known).float()


japanese_vowels, osuleaf, acsf1, basic_motions = (partial(time_series, name) for name in SERIES)


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


def conv1d(input_shape: Sequence[int], outputs: int, widths: Sequence[int] = (64, 128, 64)) -> nn.Sequential:
    """Return the network for a task of series.

    Raises:
        ValueError: the examples are not series (channels, length).
    """
    if len(input_shape) != 2:
        raise ValueError(f"input_shape: found {tuple(input_shape)}; expected 2 axes, (channels, length).")
    return convolutions_1d(input_shape[0], outputs, widths)


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """``conv1d_16x32x16``: the network with these widths."""
    kind, _, sizes = name.rpartition("_")
    if kind != "conv1d" or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(conv1d, widths=[int(size) for size in sizes.split("x")])
