"""Ratings of films by people: MovieLens 100K, where the package that ships it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from manifold_nets.comparison.tasks.errors import DataFileError, DataFolderError
from manifold_nets.comparison.tasks.scores import classification_scores, hits
from manifold_nets.comparison.tasks.task import Task, TensorPart
from manifold_nets.errors import listed

__all__ = ["movielens"]

_LIKED = 4  # of 5 stars
_NAME = "ml-100k.inter"


def movielens(folder: str | Path | None = None) -> Task:
    """Return MovieLens 100K: does a person give a film four stars or more?

    Of each 100,000 ratings by 943 people of 1,682 films, in order of time, the first 80 % train, the next 10 %
    validate, the last 10 % test: the past predicts the future.

    Args:
        folder: where ``ml-100k.inter`` is, tab-separated with one line of names; in the package recbole, which ships
            it, when left out.

    Raises:
        DataFolderError: the file is not there.
        DataFileError: it is of another format.

    References:
        Harper, Konstan, *The MovieLens datasets: history and context*, ACM TiiS 5(4), 2015.
    """
    path = _file(folder)
    try:
        table = np.loadtxt(path, delimiter="\t", skiprows=1, dtype=np.int64, converters=lambda word: int(float(word)))
    except ValueError as error:
        raise DataFileError(path, str(error), "four numbers a line: person, film, rating, time") from error
    if table.ndim != 2 or table.shape[1] != 4:
        raise DataFileError(path, f"{table.shape[-1]} columns", "four numbers a line: person, film, rating, time")
    # By time, and what happened in the same second by person and film.
    table = table[np.lexsort((table[:, 1], table[:, 0], table[:, 3]))]
    x = torch.tensor(table[:, :2])
    y = torch.tensor((table[:, 2] >= _LIKED).astype(np.int64))
    ends = [0, len(y) * 8 // 10, len(y) * 9 // 10, len(y)]
    rows = dict(zip(("train", "validation", "test"), map(torch.arange, ends[:3], ends[1:]), strict=True))
    # In order of time one person follows another: the first examples would all be of one.
    rows["train"] = rows["train"][torch.randperm(ends[1], generator=torch.Generator().manual_seed(0))]
    parts = {name: TensorPart(x[chosen], y[chosen]) for name, chosen in rows.items()}
    return Task(
        name="movielens",
        parts=parts,
        input_shape=(2,),
        outputs=2,
        loss=cross_entropy,
        measure=hits,
        summarize=classification_scores,
        batch_size=500,
        description={
            "source": f"MovieLens 100K, {len(y)} ratings",
            "split": "in order of time: 80 % to train, 10 % to validate, 10 % to test",
            "preprocessing": f"liked: {_LIKED} stars or more",
        },
    )


def _file(folder: str | Path | None) -> Path:
    places = [Path(folder)] if folder is not None else []
    package = importlib.util.find_spec("recbole")
    if package is not None and package.submodule_search_locations:
        places.append(Path(package.submodule_search_locations[0]) / "dataset_example" / "ml-100k")
    for place in places:
        if (place / _NAME).is_file():
            return place / _NAME
    remedy = "Install the package that ships it (pip install --no-deps recbole), or name the folder of the file."
    raise DataFolderError("task movielens", f"no {_NAME} in {listed(places) or 'any folder'}", [_NAME], remedy)
