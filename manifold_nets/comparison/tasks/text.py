"""Text to predict character by character: the reference manual of Python, which every Python brings along."""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from manifold_nets.comparison.tasks.scores import classification_scores, hits
from manifold_nets.comparison.tasks.task import Task, TensorPart

__all__ = ["python_manual"]


def python_manual(length: int = 64) -> Task:
    """Return the language reference that Python's ``help()`` shows, as sequences of characters to continue.

    The text is cut into pieces that do not overlap; of eight runs of eight pieces six train, one validates and one
    tests, so that every chapter is in all three. What the manual says twice is taken once, so that no test is on what
    was trained on.

    Args:
        length: characters a sequence.

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
    return Task(
        name="python-manual",
        parts={part: TensorPart(x[chosen], y[chosen]) for part, chosen in rows.items()},
        input_shape=(length,),
        outputs=len(alphabet),
        loss=cross_entropy,
        measure=hits,
        summarize=classification_scores,
        batch_size=32,
        description={
            "source": f"pydoc_data.topics of Python {platform.python_version()}, {len(text)} characters",
            "split": f"pieces of {length} characters; of eight runs of eight, six train, one validates, one tests",
            "preprocessing": f"one number for each of the {len(alphabet)} characters that occur",
        },
    )


def _manual() -> str:
    """Return all topics, in order of their names; lines of some length only where they occur first."""
    from pydoc_data.topics import topics

    said: set[str] = set()
    lines = []
    for name in sorted(topics):
        for line in topics[name].splitlines():
            # Short lines, such as the empty one, recur in every text.
            if len(line) <= 20 or line not in said:
                lines.append(line)
                said.add(line)
    return "\n".join(lines)
