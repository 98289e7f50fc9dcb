"""Images to classify: scikit-learn's digits, MNIST and whatever comes in its layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manifold_nets.comparison.errors import TaskNameError
from manifold_nets.comparison.tasks.from_data import classification
from manifold_nets.comparison.tasks.idx import find_idx_files, read_images_and_labels
from manifold_nets.comparison.tasks.task import Task
from manifold_nets.errors import MissingExtraError

__all__ = ["Standardize", "digits", "idx_images"]

_SPLIT_SEED = 0


@dataclass(frozen=True)
class Standardize:
    """Subtract a mean and divide by a spread, channel by channel; unsigned bytes become float32.

    Args:
        mean: one number per channel.
        spread: one number per channel.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Standardize:
        """Take mean and standard deviation of each channel of images (n, channels, height, width), in float64."""
        # By channels, so that no float64 copy of all images is made at once.
        moments = [torch.var_mean(images[:, channel].double(), correction=0) for channel in range(images.shape[1])]
        spreads, means = zip(*moments, strict=True)
        return cls(tuple(float(mean) for mean in means), tuple(max(float(v.sqrt()), 1e-12) for v in spreads))

    def __call__(self, images: Tensor) -> Tensor:
        """Return standardized float32 images."""
        mean, spread = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.spread))
        return (images.float() - mean) / spread


def digits() -> Task:
    """Return scikit-learn's bundled digits, 8×8 pixels in 10 classes: 1,000 / 297 / 500 images.

    The split is a fixed permutation; pixels are standardized by one mean and one spread of the training part.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> digits().sizes()
        {'train': 1000, 'validation': 297, 'test': 500}
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "the digits to compare on", "compare") from error
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None], torch.tensor(data.target)
    order = torch.split(_permutation(len(y)), [1000, 297, 500])
    parts = {name: (x[rows], y[rows]) for name, rows in zip(("train", "validation", "test"), order, strict=True)}
    return _classification("digits", parts, "scikit-learn's bundled digits", batch_size=50)


def idx_images(folder: str | Path, *, name: str = "idx", sizes: tuple[int, ...] = ()) -> Task:
    """Return a data set in the layout of MNIST: a sixth of its training files for validation, its test files for tests.

    The split of the training files is a fixed permutation; pixels are standardized by one mean and one spread of the
    training part.

    Args:
        folder: where its four files are.
        name: name of the task.
        sizes: number of training images, and of validation images, where fewer are wanted.

    Raises:
        DataFolderError: the folder does not exist or lacks a file.
        DataFileError: a file is damaged or does not fit.
        TaskNameError: there are not that many images.
    """
    files = find_idx_files(folder)
    x, y = (torch.from_numpy(array) for array in read_images_and_labels(*files["train"]))
    x_test, y_test = (torch.from_numpy(array) for array in read_images_and_labels(*files["test"]))
    order = _permutation(len(y))
    validation = len(y) // 6
    train_rows, validation_rows = order[: len(y) - validation], order[len(y) - validation :]
    for rows, size in zip((train_rows, validation_rows), sizes, strict=False):
        if not 0 < size <= len(rows):
            remedy = "Ask for fewer, or leave the sizes out."
            raise TaskNameError(f"task {name}", f"{size} images", f"1 … {len(rows)}", remedy)
    train_rows = train_rows[: sizes[0]] if sizes else train_rows
    validation_rows = validation_rows[: sizes[1]] if len(sizes) > 1 else validation_rows
    parts = {
        "train": (x[train_rows, None], y[train_rows].long()),
        "validation": (x[validation_rows, None], y[validation_rows].long()),
        "test": (x_test[:, None], y_test.long()),
    }
    return _classification(name, parts, "four idx files", batch_size=100)


def _permutation(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT_SEED))


def _classification(name: str, parts: dict[str, tuple[Tensor, Tensor]], source: str, *, batch_size: int) -> Task:
    x, _ = parts["train"]
    standardize = Standardize.of(x)
    classes = int(max(y.max() for _, y in parts.values())) + 1
    return classification(
        name,
        {part: (standardize(images), y) for part, (images, y) in parts.items()},
        outputs=classes,
        batch_size=batch_size,
        source=source,
        split=f"a permutation with seed {_SPLIT_SEED}",
        preprocessing=f"pixels minus {standardize.mean[0]:.6g}, over {standardize.spread[0]:.6g}",
    )
