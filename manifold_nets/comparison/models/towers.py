"""A recommender of two batch-normalized towers, one for people and one for things."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["TwoTowers"]


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
