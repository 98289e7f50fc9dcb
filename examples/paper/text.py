"""The reference manual of Python and a character-level transformer, as a task and a model of a comparison.

manifold-nets compare --task examples/paper/text.py:python_manual --model examples/paper/text.py:transformer …
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from manifold_nets.comparison.tasks import Task, classification

__all__ = ["CharacterTransformer", "python_manual", "transformer"]


def python_manual(length: int = 64) -> Task:
    """Return the language reference that Python's ``help()`` shows, as sequences of characters to continue.

    The text is cut into pieces that do not overlap; of eight runs of eight pieces six train, one validates and one
    tests, so that every chapter is in all three. Lines that the manual repeats are taken once, so that no test is on
    training data.

    Args:
        length: characters per sequence.

    Example:
        >>> task = python_manual()
        >>> task.input_shape, task.sizes()["train"] > 2000
        ((64,), True)
    """
    text = _manual()
    alphabet = sorted(set(text))
    numbers = {character: number for number, character in enumerate(alphabet)}
    codes = torch.tensor([numbers[character] for character in text])
    pieces = (len(codes) - 1) // length
    x, y = (codes[shift : shift + pieces * length].view(pieces, length) for shift in (0, 1))
    block = torch.arange(pieces) // 8 % 8
    rows: dict[str, Tensor] = {"train": block < 6, "validation": block == 6, "test": block == 7}
    return classification(
        "python-manual",
        {part: (x[chosen], y[chosen]) for part, chosen in rows.items()},
        outputs=len(alphabet),
        batch_size=32,
        source=f"pydoc_data.topics of Python {platform.python_version()}, {len(text)} characters",
        split=f"pieces of {length} characters; of eight runs of eight, six train, one validates, one tests",
        preprocessing=f"one number for each of the {len(alphabet)} characters that occur",
    )


def _manual() -> str:
    """Return all topics, in order of their names; lines of some length only where they occur first."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    lines = []
    for name in sorted(topics):
        for line in topics[name].splitlines():
            # Short lines, such as the empty one, recur in every text.
            if len(line) <= 20 or line not in seen:
                lines.append(line)
                seen.add(line)
    return "\n".join(lines)


class _Attention(nn.Module):
    """Causal attention with normalized queries and keys, and a normalized output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads) for _ in range(2))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape

        def split(projection: nn.Linear) -> Tensor:
            return cast(Tensor, projection(x)).view(n, length, self.heads, -1)

        query, key = self.query_norm(split(self.query)), self.key_norm(split(self.key))
        mixed = scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), split(self.value).transpose(1, 2), is_causal=True
        )
        return cast(Tensor, self.norm(self.out(mixed.transpose(1, 2).reshape(n, length, width))))


class _Perceptron(nn.Module):
    """A gated perceptron with a normalized output."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.down(silu(self.gate(x)) * self.up(x))))


class CharacterTransformer(nn.Module):
    """A causal transformer with normalized queries and keys and normalized outputs of its blocks.

    Scale-invariant are the projections to queries and keys, head by head, and, each as a whole, the projections to
    values, to the outputs of the blocks, and up.

    Args:
        characters: size of the alphabet.
        length: longest sequence.
        width: of the residual stream.
        blocks: how many.
        heads: of the attention; a divisor of the width.

    References:
        Henry et al., *Query-key normalization for transformers*, arXiv:2010.04245; the order of normalizations of
        *2 OLMo 2 Furious*, arXiv:2501.00656.

    Example:
        >>> CharacterTransformer(103, 64, width=16, blocks=1, heads=2)(torch.zeros(3, 64, dtype=torch.long)).shape
        torch.Size([3, 103, 64])
    """

    def __init__(self, characters: int, length: int, *, width: int = 64, blocks: int = 2, heads: int = 4) -> None:
        if width % heads:
            raise ValueError(f"heads: found {heads}; expected a divisor of the width, {width}. Choose such a number.")
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([_Attention(width, heads), _Perceptron(width, 2 * width)]) for _ in range(blocks)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters (n, length) to scores of the next ones (n, characters, length)."""
        hidden = self.characters(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            for part in cast(nn.ModuleList, block):
                hidden = hidden + part(hidden)
        return cast(Tensor, self.head(self.norm(hidden))).transpose(1, 2)


def transformer(
    input_shape: Sequence[int], outputs: int, *, width: int = 64, blocks: int = 2, heads: int = 4
) -> CharacterTransformer:
    """Return the network for a task of sequences.

    Raises:
        ValueError: the examples are not sequences, or the number of heads does not divide the width.
    """
    if len(input_shape) != 1:
        raise ValueError(f"input_shape: found {tuple(input_shape)}; expected 1 axis, (length,).")
    return CharacterTransformer(outputs, input_shape[0], width=width, blocks=blocks, heads=heads)


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """``transformer_32x1x2``: the network of width 32 with one block and two heads."""
    kind, _, sizes = name.rpartition("_")
    if kind != "transformer" or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(transformer, **dict(zip(("width", "blocks", "heads"), map(int, sizes.split("x")), strict=False)))
