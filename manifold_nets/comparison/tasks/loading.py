"""Tasks by name, and tasks of one's own from a Python file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from manifold_nets.comparison.tasks.errors import DataFolderError, TaskNameError, TaskSourceError
from manifold_nets.comparison.tasks.images import digits, idx_images
from manifold_nets.comparison.tasks.ratings import movielens
from manifold_nets.comparison.tasks.series import SERIES, time_series
from manifold_nets.comparison.tasks.streets import camvid
from manifold_nets.comparison.tasks.task import Task
from manifold_nets.comparison.tasks.text import python_manual
from manifold_nets.errors import ModelSpecError, near_matches
from manifold_nets.sources import ModelSpec, load_object

__all__ = ["DATA_VARIABLE", "TASK_NAMES", "load_task"]

DATA_VARIABLE = "MANIFOLD_NETS_DATA"
TASK_NAMES = ("digits", "mnist", "fashion-mnist", "idx", "camvid", *SERIES, "python-manual", "movielens")
_KNOWN = f"{', '.join(TASK_NAMES)}, file.py:callable or package.module:callable"

# What to call, with the folder of data if one is given.
_WITHOUT_SETTINGS: dict[str, Callable[[str | Path | None], Task]] = {
    "digits": lambda _: digits(),
    "python-manual": lambda _: python_manual(),
    "movielens": movielens,
    **{name: (lambda _, name=name: time_series(name)) for name in SERIES},  # type: ignore[misc]
}


def load_task(spec: str, *, data: str | Path | None = None) -> Task:
    """Return the task of a name, or the one that a callable returns.

    ======================  ==========================================================================================
    ``digits``              scikit-learn's bundled 8×8 digits
    ``mnist``               MNIST; ``mnist:1000,500`` for 1,000 training and 500 validation images
    ``fashion-mnist``       Fashion-MNIST, likewise
    ``idx``                 any data set in the layout of MNIST, likewise
    ``camvid``              CamVid; ``camvid:120x90`` reduced to 120×90 pixels
    ``japanese-vowels``     spoken vowels, bundled with sktime; also ``osuleaf``, ``acsf1``, ``basic-motions``
    ``python-manual``       the next character of Python's language reference, bundled with Python
    ``movielens``           who likes which film, bundled with recbole
    ``file.py:callable``    what a callable without arguments returns; also ``package.module:callable``
    ======================  ==========================================================================================

    Args:
        spec: one of these.
        data: the folder with the files, or a folder in which one of that name is; that of the environment variable
            ``MANIFOLD_NETS_DATA`` when left out.

    Raises:
        TaskNameError: the text names no task, or its settings have no meaning.
        DataFolderError: the data are not there.
        DataFileError: a file is damaged or does not fit.
        ModelNotFoundError: the file, the module or the callable does not exist.
        TaskSourceError: the callable raised, or returned something else than a `Task`.
        MissingExtraError: a package that the task needs is not installed.

    Example:
        >>> load_task("digits").input_shape
        (1, 8, 8)
    """
    name, _, settings = spec.partition(":")
    if name not in TASK_NAMES:
        return _from_python(spec)
    if name in _WITHOUT_SETTINGS:
        if ":" in spec:
            raise TaskNameError("task", spec, f"{name} without settings", "Leave the settings out.")
        return _WITHOUT_SETTINGS[name](data)
    if name == "camvid":
        size = _numbers(spec, settings, "x", "camvid:WIDTHxHEIGHT", (2,))
        return camvid(_folder(name, data), size=(size[0], size[1]) if size else None)
    sizes = _numbers(spec, settings, ",", f"{name}:TRAIN or {name}:TRAIN,VALIDATION", (1, 2))
    return idx_images(_folder(name, data), name=name, sizes=sizes)


def _numbers(spec: str, settings: str, separator: str, form: str, counts: tuple[int, ...]) -> tuple[int, ...]:
    if not settings and ":" not in spec:
        return ()
    words = settings.split(separator)
    if len(words) not in counts or not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise TaskNameError("task", spec, f"{form} with positive whole numbers", "Write the numbers like this.")
    return tuple(int(word) for word in words)


def _folder(name: str, data: str | Path | None) -> Path:
    root = data if data is not None else os.environ.get(DATA_VARIABLE)
    if not root:
        remedy = f"Pass data=… (--data on the command line), or set the variable {DATA_VARIABLE}."
        raise DataFolderError(f"task {name}", "no folder of data", ["a folder with its files"], remedy)
    root = Path(root)
    # Either the folder of the data set itself or one that holds it, also under a longer name (camvid-240x180).
    below = sorted(path for path in root.glob(f"{name}*") if path.is_dir()) if root.is_dir() else []
    return below[0] if below else root


def _from_python(spec: str) -> Task:
    near = near_matches(spec.partition(":")[0], TASK_NAMES)
    try:
        task = load_object(ModelSpec.parse(spec))
    except ModelSpecError as error:
        raise TaskNameError("task", spec, _KNOWN, f"{near} Choose one of these.".strip()) from error
    if not isinstance(task, Task):
        raise TaskSourceError(spec, f"an object of type {type(task).__name__}", "a manifold_nets.comparison Task")
    return task
