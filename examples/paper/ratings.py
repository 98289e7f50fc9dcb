"""Ratings of films by people, MovieLens 100K, and a recommender of two towers, as a task and a model of a comparison.

manifold-nets compare --task examples/paper/ratings.py:movielens --model examples/paper/ratings.py:towers …
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from manifold_nets.comparison.errors import DataFileError, DataFolderError
from manifold_nets.comparison.tasks import Task, classification
from manifold_nets.errors import listed

__all__ = ["TwoTowers", "movielens", "towers"]

_LIKED = 4  # of 5 stars
_NAME = "ml-100k.inter"


def movielens(data: str | Path | None = None) -> Task:
    """Return MovieLens 100K: does a person give a film four stars or more?

    Of 100,000 ratings by 943 people of 1,682 films, in order of time, the first 80 % train, the next 10 %
    validate, the last 10 % test: the past predicts the future.

    Args:
        data: the folder of ``ml-100k.inter``, tab-separated with one line of names; in the package recbole, which ships
            it, when left out.

    Raises:
        DataFolderError: the file is not there.
        DataFileError: it is of another format.

    References:
        Harper, Konstan, *The MovieLens datasets: history and context*, ACM TiiS 5(4), 2015.
    """
    path = _file(data)
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
    return classification(
        "movielens",
        {name: (x[chosen], y[chosen]) for name, chosen in rows.items()},
        outputs=2,
        batch_size=500,
        source=f"MovieLens 100K, {len(y)} ratings",
        split="in order of time: 80 % to train, 10 % to validate, 10 % to test",
        preprocessing=f"liked: {_LIKED} stars or more",
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


class TwoTowers(nn.Module):
    """Two towers of (linear → batch normalization → ReLU) on embeddings; the score is their inner product.

    Args:
        people: largest number of a person.
        things: largest number of a thing.
        widths: of the embedding, and of each layer of a tower.

    References:
        Covington, Adams, Sargin, *Deep neural networks for YouTube recommendations*, RecSys 2016.

    Example:
        >>> TwoTowers(10, 20, [8, 8])(torch.tensor([[1, 2], [3, 4]])).shape
        torch.Size([2, 2])
    """

    def __init__(self, people: int = 943, things: int = 1682, widths: Sequence[int] = (32, 32, 32)) -> None:
        super().__init__()
        self.person, self.thing = (self._tower(count, widths) for count in (people, things))
        self.bias = nn.Parameter(torch.zeros(()))

    @staticmethod
    def _tower(count: int, widths: Sequence[int]) -> nn.Sequential:
        layers: list[nn.Module] = [nn.Embedding(count + 1, widths[0])]
        for features, width in itertools.pairwise(widths):
            layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map pairs (n, 2) of numbers to scores (n, 2) of not liking and liking."""
        score = cast(Tensor, (self.person(x[:, 0]) * self.thing(x[:, 1])).sum(1)) + self.bias
        return torch.stack([torch.zeros_like(score), score], 1)


def towers(widths: Sequence[int] = (32, 32, 32)) -> TwoTowers:
    """Return the recommender for `movielens`."""
    return TwoTowers(widths=widths)


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """``towers_16x16x16``: the recommender with these widths."""
    kind, _, sizes = name.rpartition("_")
    if kind != "towers" or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(towers, widths=[int(size) for size in sizes.split("x")])
