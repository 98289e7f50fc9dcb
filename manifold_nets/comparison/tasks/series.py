"""Time series to classify: sets that sktime bundles, spoken vowels among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from manifold_nets.comparison.tasks.scores import classification_scores, hits
from manifold_nets.comparison.tasks.task import Task, TensorPart
from manifold_nets.errors import MissingExtraError

__all__ = ["SERIES", "time_series"]

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
    loader, told = SERIES[name]
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
    return Task(
        name=name,
        parts={part: TensorPart(x[chosen], y[chosen]) for part, chosen in rows.items()},
        input_shape=tuple(x.shape[1:]),
        outputs=len(classes),
        loss=cross_entropy,
        measure=hits,
        summarize=classification_scores,
        batch_size=16,
        description={
            "source": f"bundled with sktime: {told}",
            "split": "the set's own test part; a permutation with seed 0 of the rest, a quarter for validation",
            "preprocessing": "each channel minus its mean over its spread in the training part; zeros after the end",
        },
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
    """Standardize each channel by what the training series say before their ends."""
    said = (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
    values, counts = x[train].double(), said[train].sum()
    mean = (values * said[train]).sum((0, 2), keepdim=True) / counts
    spread = (((values - mean) * said[train]).square().sum((0, 2), keepdim=True) / counts).sqrt().clamp_min(1e-12)
    return ((x - mean) / spread * said).float()
