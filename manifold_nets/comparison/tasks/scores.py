"""Scores of classifiers and of segmentations, from counts of predictions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

__all__ = ["classification_scores", "confusion", "confusion_of", "hits", "segmentation_scores"]


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return how many classes were predicted rightly, and how many there were.

    Args:
        outputs: scores, of shape (n, classes, …); the class of the largest is predicted, none where one is NaN.
        targets: true classes, of shape (n, …).

    Returns:
        int64, of shape (2,).

    Example:
        >>> hits(torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), torch.tensor([0, 1, 1]))
        tensor([2, 3])
    """
    largest, predicted = outputs.max(1)  # which is NaN where any output is
    right = (predicted == targets) & (largest == largest)
    return torch.tensor([int(right.sum()), right.numel()])


def confusion(outputs: Tensor, targets: Tensor, *, classes: int, void: int | None = None) -> Tensor:
    """Return how often each true class was predicted as each class.

    Args:
        outputs: scores, of shape (n, classes, …); the class of the largest is predicted, none where it is NaN.
        targets: true classes, of shape (n, …).
        classes: number of classes.
        void: label of what is not to be counted.

    Returns:
        int64, of shape (classes, classes + 1): rows are true classes, columns predicted ones; the last column counts
        scores that are not numbers.

    Example:
        >>> confusion(torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), torch.tensor([0, 1, 1]), classes=2)
        tensor([[1, 0, 0],
                [1, 1, 0]])
    """
    largest, predicted = outputs.max(1)  # which is NaN where any output is
    predicted = torch.where(largest.isnan(), classes, predicted).flatten()
    true = targets.flatten()
    if void is not None:
        predicted, true = predicted[true != void], true[true != void]
    return torch.bincount(true * (classes + 1) + predicted, minlength=classes * (classes + 1)).view(classes, -1)


def classification_scores(counts: Tensor) -> dict[str, float]:
    """Return ``"error"``, the share of wrong predictions, from counts of `hits`.

    Example:
        >>> classification_scores(torch.tensor([7, 8]))
        {'error': 0.125}
    """
    right, all_of_them = counts.tolist()
    return {"error": 1 - right / all_of_them}


def segmentation_scores(counts: Tensor) -> dict[str, float]:
    """Return the scores of the literature on segmentation, as errors, from counts of `confusion`.

    ``"error"`` is 1 − mean intersection over union, ``"class_error"`` 1 − mean accuracy of the classes, both means
    over the classes that occur, and ``"pixel_error"`` 1 − global accuracy.

    Example:
        >>> {name: round(value, 4) for name, value in segmentation_scores(torch.tensor([[1, 1, 0], [0, 2, 0]])).items()}
        {'error': 0.4167, 'class_error': 0.25, 'pixel_error': 0.25}
    """
    counts = counts.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)[: len(counts)]
    occurs = true > 0
    union = (right / (true + predicted - right))[occurs].mean()
    accuracy = (right / true)[occurs].mean()
    values = {"error": union, "class_error": accuracy, "pixel_error": right.sum() / counts.sum()}
    return {name: 1 - float(value) for name, value in values.items()}


def confusion_of(classes: int, void: int | None = None) -> partial[Tensor]:
    """Return `confusion` for a number of classes and a void label, as a function of outputs and targets."""
    return partial(confusion, classes=classes, void=void)
