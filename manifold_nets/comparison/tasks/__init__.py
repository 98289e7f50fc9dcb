"""What optimizers are compared on: data in three parts, a loss and an error. Built-in tasks, and those of a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from manifold_nets.comparison.errors import DataFolderError, TaskNameError, TaskSourceError, what_to_write
from manifold_nets.comparison.tasks.from_data import classification, task_from_data
from manifold_nets.comparison.tasks.images import digits, idx_images
from manifold_nets.comparison.tasks.task import DatasetPart, Part, Subset, Task, TensorPart, evaluate
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
    """Return the built-in task of a name, or the task that a callable returns.

    ======================  ==========================================================================================
    ``digits``              scikit-learn's bundled 8×8 digits
    ``mnist``               MNIST; ``mnist:1000,500`` for 1,000 training and 500 validation images
    ``fashion-mnist``       Fashion-MNIST, likewise
    ``idx``                 any data set in the layout of MNIST, likewise
    ``file.py:callable``    what a callable returns, which may take ``data``; also ``package.module:callable``
    ======================  ==========================================================================================

    Args:
        spec: one of these.
        data: the folder with the files, or a folder in which one of that name is; that of the environment variable
            ``MANIFOLD_NETS_DATA`` when left out.

    Raises:
        TaskNameError: the text names no task, or its settings are invalid.
        DataFolderError: the data are not there.
        DataFileError: a file is damaged or does not fit.
        ModelNotFoundError: the file, the module or the callable does not exist.
        TaskSourceError: the callable raised, or returned something else than a `Task`.
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
        raise TaskNameError("task", repr(spec), expected, "Write the numbers like this.")
    return idx_images(data_folder(name, data), name=name, sizes=tuple(int(word) for word in words))


def data_folder(name: str, data: str | Path | None) -> Path:
    """The folder of a data set: the given one or the one of the environment, or one of that name in it.

    Args:
        name: of the data set; its folder may have a longer name, such as camvid-240x180.
        data: a folder; that of the environment variable ``MANIFOLD_NETS_DATA`` when left out.

    Raises:
        DataFolderError: neither is given.
    """
    root = data if data is not None else os.environ.get(DATA_VARIABLE)
    if not root:
        remedy = f"Pass data=… (--data on the command line), or set the variable {DATA_VARIABLE}."
        raise DataFolderError(f"task {name}", "no folder of data", ["a folder with its files"], remedy)
    root = Path(root)
    below = sorted(path for path in root.glob(f"{name}*") if path.is_dir()) if root.is_dir() else []
    return below[0] if below else root


def _from_python(spec: str, data: str | Path | None) -> Task:
    try:
        task = load_object(ModelSpec.parse(spec), kwargs={} if data is None else {"data": data})
    except ModelSpecError as error:
        raise TaskNameError("task", repr(spec), _KNOWN, what_to_write("--task", spec, TASK_NAMES)) from error
    except ModelBuildError as error:
        # Errors about data say themselves what to do.
        if isinstance(error.__cause__, ManifoldNetsError):
            raise error.__cause__ from None
        raise
    if not isinstance(task, Task):
        raise TaskSourceError(spec, f"an object of type {type(task).__name__}", "a manifold_nets.comparison Task")
    return task
