"""The tasks of a comparison: data in three parts, a loss and an error; built in or from a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from manifold_nets.comparison.errors import DataFolderError, TaskNameError, TaskSourceError, what_to_write
from manifold_nets.comparison.tasks.images import digits, idx_images
from manifold_nets.comparison.tasks.task import DatasetPart, Part, Subset, Task, TensorPart, classification, evaluate
from manifold_nets.errors import ManifoldNetsError, ModelBuildError, ModelSpecError
from manifold_nets.sources import ModelSpec, load_object

__all__ = [
    "DATA_VARIABLE",
    "TASK_NAMES",
    "DatasetPart",
    "Part",
    "Subset",
    "Task",
    "TensorPart",
    "classification",
    "data_folder",
    "evaluate",
    "load_task",
    "task_from_data",
]

DATA_VARIABLE = "MANIFOLD_NETS_DATA"
TASK_NAMES = ("digits", "mnist", "fashion-mnist", "idx")
_KNOWN = f"{', '.join(TASK_NAMES)}, file.py:callable or package.module:callable"


def load_task(spec: str, *, data: str | Path | None = None) -> Task:
    """Return the built-in task with a name, or the task that a callable returns.

    ======================  ==========================================================================================
    ``digits``              scikit-learn's bundled 8×8 digits
    ``mnist``               MNIST; ``mnist:1000,500`` for 1,000 training and 500 validation images
    ``fashion-mnist``       Fashion-MNIST, with the same options
    ``idx``                 any data set in the layout of MNIST, with the same options
    ``file.py:callable``    the task that a callable returns; it may take ``data``; also ``package.module:callable``
    ======================  ==========================================================================================

    Args:
        spec: one of these.
        data: the folder with the files, or a folder that contains one of that name (default: the environment variable
            ``MANIFOLD_NETS_DATA``).

    Raises:
        TaskNameError: the name is unknown, or its settings are invalid.
        DataFolderError: the data are missing.
        DataFileError: a file is damaged or does not fit.
        ModelNotFoundError: the file, the module or the callable does not exist.
        TaskSourceError: the callable raised an error, or did not return a `Task`.
        MissingExtraError: a package that the task needs is not installed.

    Example:
        >>> load_task("digits").input_shape
        (1, 8, 8)
    """
    name, colon, numbers = spec.partition(":")
    if name not in TASK_NAMES:
        return _from_python(spec, data)
    if name == "digits":
        if colon:
            raise TaskNameError("task", repr(spec), "digits without settings", "Leave the settings out.")
        return digits()
    words = numbers.split(",") if colon else []
    if len(words) > 2 or not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        expected = f"{name}:TRAIN or {name}:TRAIN,VALIDATION with positive whole numbers"
        raise TaskNameError("task", repr(spec), expected, "Write the numbers in this form.")
    return idx_images(data_folder(name, data), name=name, sizes=tuple(int(word) for word in words))


def data_folder(name: str, data: str | Path | None) -> Path:
    """The folder of a data set: the given one or that of the environment variable, or one of that name inside.

    Args:
        name: name of the data set; its folder may have a longer name, such as camvid-240x180.
        data: a folder (default: the environment variable ``MANIFOLD_NETS_DATA``).

    Raises:
        DataFolderError: neither is given.
    """
    root = data if data is not None else os.environ.get(DATA_VARIABLE)
    if not root:
        remedy = f"Pass data=… (--data on the command line), or set the variable {DATA_VARIABLE}."
        raise DataFolderError(f"task {name}", "no data folder", ["a folder with its files"], remedy)
    root = Path(root)
    below = sorted(path for path in root.glob(f"{name}*") if path.is_dir()) if root.is_dir() else []
    return below[0] if below else root


def _from_python(spec: str, data: str | Path | None) -> Task:
    try:
        task = load_object(ModelSpec.parse(spec), kwargs={} if data is None else {"data": data})
    except ModelSpecError as error:
        raise TaskNameError("task", repr(spec), _KNOWN, what_to_write("--task", spec, TASK_NAMES)) from error
    except ModelBuildError as error:
        # Errors about data already state what to do.
        if isinstance(error.__cause__, ManifoldNetsError):
            raise error.__cause__ from None
        raise
    if not isinstance(task, Task):
        raise TaskSourceError(spec, f"an object of type {type(task).__name__}", "a manifold_nets.comparison Task")
    return task


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
        train: training examples: a tuple of inputs and targets, a map-style data set, or a data loader of one. Data
            set, collation and batch size of a data loader are used; the comparison determines the order.
        validation: examples for choosing learning rates.
        test: examples for the test error.
        name: name of the task.
        loss: mean loss of outputs and targets.
        error: error of each example of a batch, of shape (n,) (default: whether the class is wrong).
        outputs: number of outputs of a network (default for classes: the largest one in tensors of targets plus 1).
        batch_size: examples per training step (default: the data loader's, or 100).

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
            raise TaskSourceError(f"task {name}", "no number of outputs", "outputs=… for targets that are not classes")
        outputs = int(max(target.max() for target in held)) + 1
    if batch_size is None:
        batch_size = (train.batch_size or 100) if isinstance(train, DataLoader) else 100
    shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()
    source = {"source": "the caller's data"}
    task = Task(name, parts, shape, outputs, loss, batch_size=batch_size, description=source)
    return task if error is None else replace(task, measure=partial(_summed, error=error), summarize=_mean)


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
