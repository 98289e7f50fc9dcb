"""Tasks from the user's own tensors, data sets or data loaders, and the scores of classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from manifold_nets.comparison.errors import TaskSourceError
from manifold_nets.comparison.tasks.task import PART_NAMES, DatasetPart, Part, Task, TensorPart

__all__ = ["classification", "classification_scores", "hits", "task_from_data"]

Data = TensorPart | DatasetPart | Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor]


def task_from_data(
    train: Data,
    validation: Data,
    test: Data,
    *,
    name: str = "own",
    loss: Callable[[Any, Tensor], Tensor] = cross_entropy,
    error: Callable[[Any, Tensor], Tensor] | None = None,
    outputs: int | None = None,
    batch_size: int | None = None,
) -> Task:
    """Return a task from the user's own data.

    Args:
        train: examples to train on: a tuple of inputs and targets, a map-style data set, or a data loader of one. Of a
            data loader the data set, the collation and the batch size are taken; the order is the comparison's.
        validation: examples to choose learning rates by.
        test: examples to judge by.
        name: name of the task.
        loss: mean loss of outputs and targets.
        error: error of each example of a batch, of shape (n,), to judge by; the share of wrong classes when left out.
        outputs: number of outputs of a network; of classes, the largest one that occurs in tensors of targets plus 1.
        batch_size: examples per training step; 100 unless a data loader says otherwise.

    Raises:
        TaskSourceError: the data have another form, or the number of classes is not given and cannot be inferred.

    Example:
        >>> x, y = torch.randn(60, 3), torch.arange(60) % 2
        >>> task = task_from_data((x[:40], y[:40]), (x[40:50], y[40:50]), (x[50:], y[50:]))
        >>> task.sizes(), task.outputs
        ({'train': 40, 'validation': 10, 'test': 10}, 2)
        >>> regression = task_from_data(
        ...     *3 * [(x, x.sum(1, keepdim=True))],
        ...     loss=torch.nn.functional.mse_loss,
        ...     error=lambda outputs, targets: (outputs - targets).square().mean(1),
        ...     outputs=1,
        ... )
        >>> regression.summarize(regression.measure(torch.zeros(2, 1), torch.ones(2, 1)))
        {'error': 1.0}
    """
    given = {"train": train, "validation": validation, "test": test}
    parts = {part: _part(data, f"task {name}, {part}") for part, data in given.items()}
    inputs, targets = parts["train"].batch(torch.arange(1))
    if outputs is None:
        held = [part.targets for part in parts.values() if isinstance(part, TensorPart)]
        if len(held) < len(parts) or targets.is_floating_point():
            raise TaskSourceError(f"task {name}", "no number of outputs", "outputs=…, for data that are not classes")
        outputs = int(max(target.max() for target in held)) + 1
    if batch_size is None:
        batch_size = (train.batch_size or 100) if isinstance(train, DataLoader) else 100
    return Task(
        name=name,
        parts=parts,
        input_shape=tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else (),
        outputs=outputs,
        loss=loss,
        measure=hits if error is None else partial(_summed, error=error),
        summarize=classification_scores if error is None else _mean,
        batch_size=batch_size,
        description={"source": "the caller's data"},
    )


def _summed(outputs: Any, targets: Tensor, *, error: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """The sum of the errors of a batch, and their number."""
    errors = error(outputs, targets).double()
    return torch.stack([errors.sum(), errors.new_tensor(errors.numel())])


def _mean(sums: Tensor) -> dict[str, float]:
    return {"error": float(sums[0] / sums[1])}


def _part(data: Any, where: str) -> Part:
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(tensor, Tensor) for tensor in data):
        if len(data[0]) != len(data[1]):
            found = f"{len(data[0])} inputs and {len(data[1])} targets"
            raise TaskSourceError(where, found, "as many targets as inputs")
        data = TensorPart(*data)
    elif isinstance(data, DataLoader):
        data = DatasetPart(data.dataset, data.collate_fn)
    elif not isinstance(data, (TensorPart, DatasetPart)):
        if isinstance(data, (tuple, list)) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            expected = "a tuple of two tensors, a map-style data set or a data loader"
            raise TaskSourceError(where, f"an object of type {type(data).__name__}", expected)
        data = DatasetPart(data)
    if len(data) == 0:
        raise TaskSourceError(where, "no examples", "at least one")
    part: Part = data
    return part


def classification(
    name: str, parts: Mapping[str, tuple[Tensor, Tensor]], *, outputs: int, batch_size: int, **description: Any
) -> Task:
    """Return a task of classification by cross-entropy.

    Args:
        name: name of the task.
        parts: inputs and classes of ``"train"``, ``"validation"`` and ``"test"``.
        outputs: number of classes.
        batch_size: examples per training step.
        description: where the data come from, how they were split and prepared.
    """
    data = (parts[part] for part in PART_NAMES)
    return replace(task_from_data(*data, name=name, outputs=outputs, batch_size=batch_size), description=description)


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


def classification_scores(counts: Tensor) -> dict[str, float]:
    """Return ``"error"``, the share of wrong predictions, from counts of `hits`.

    Example:
        >>> classification_scores(torch.tensor([7, 8]))
        {'error': 0.125}
    """
    right, all_of_them = counts.tolist()
    return {"error": 1 - right / all_of_them}
