"""A task: data in three parts, a loss for training, and scores for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, default_collate

from manifold_nets.comparison.errors import TaskSourceError

PART_NAMES = ("train", "validation", "test")
_EXAMPLE_NUMBERS = 50_000


class Part(Protocol):
    """One part of the data of a task: examples by index."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def batch(self, rows: Tensor) -> tuple[Any, Tensor]:
        """Return inputs and targets of some examples.

        Args:
            rows: numbers of the examples, int64, of shape (n,).
        """

    def to(self, device: torch.device | str) -> Part:
        """Return the part with its tensors on a device, where it holds any."""


@dataclass(frozen=True)
class TensorPart:
    """Examples held as tensors.

    Args:
        inputs: of shape (n, …).
        targets: of shape (n, …).
        prepare: applied to the inputs of each batch (default: nothing).

    Example:
        >>> part = TensorPart(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1]))
        >>> len(part), part.batch(torch.tensor([2, 0]))
        (3, (tensor([[4., 5.], [0., 1.]]), tensor([1, 0])))
    """

    inputs: Tensor
    targets: Tensor
    prepare: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs, prepared, and targets of some examples."""
        rows = rows.to(self.targets.device)
        # A third of the time of indexing by brackets.
        inputs, targets = self.inputs.index_select(0, rows), self.targets.index_select(0, rows)
        return (inputs if self.prepare is None else self.prepare(inputs)), targets

    def to(self, device: torch.device | str) -> TensorPart:
        """Return the part with its tensors on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


@dataclass(frozen=True)
class DatasetPart:
    """Examples of a `torch.utils.data.Dataset`, read on demand.

    Random augmentation should use torch's global generator, which a comparison seeds equally for every optimizer.

    Args:
        dataset: a map-style dataset of inputs and targets.
        collate: makes a batch of a list of examples.
        device: the device of batches.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> part = DatasetPart(TensorDataset(torch.arange(3.0), torch.tensor([0, 1, 1])))
        >>> part.batch(torch.tensor([2, 0]))
        (tensor([2., 0.]), tensor([1, 0]))
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any] = default_collate
    device: torch.device | str | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batch(self, rows: Tensor) -> tuple[Any, Tensor]:
        """Return inputs and targets of some examples, collated."""
        inputs, targets = self.collate([self.dataset[row] for row in rows.tolist()])
        if self.device is not None:
            inputs, targets = inputs.to(self.device), targets.to(self.device)
        return inputs, targets

    def to(self, device: torch.device | str) -> DatasetPart:
        """Return the part with batches on a device."""
        return replace(self, device=device)


@dataclass(frozen=True)
class Subset:
    """Some examples of a part.

    Args:
        part: the part.
        rows: indices of the examples, int64, of shape (n,).

    Example:
        >>> part = TensorPart(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 1]))
        >>> Subset(part, torch.tensor([2])).batch(torch.tensor([0]))
        (tensor([[4., 5.]]), tensor([1]))
    """

    part: Part
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor) -> tuple[Any, Tensor]:
        """Return inputs and targets of some of the examples, which are numbered from 0."""
        return self.part.batch(self.rows[rows])

    def to(self, device: torch.device | str) -> Subset:
        """Return the same examples with their tensors on a device."""
        return replace(self, part=self.part.to(device))


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the number of correctly predicted classes and the number of all.

    Args:
        outputs: scores, of shape (n, classes, …); the class with the largest score is predicted, none if one is NaN.
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


@dataclass(frozen=True)
class Task:
    """A task to compare optimizers on.

    Args:
        name: name in tables and files.
        parts: ``"train"``, ``"validation"`` and ``"test"``: examples for training, for choosing learning rates, and for
            the test error.
        input_shape: shape of one example, without the batch axis.
        outputs: number of outputs of a network: the classes.
        loss: mean training loss of outputs and targets.
        measure: counts that one batch contributes to the scores, one tensor from outputs and targets (default, for
            classes: the number of correct ones and of all).
        summarize: scores from the sum of the counts; must include ``"error"``, which is minimized.
        batch_size: default number of examples per training step.
        description: source, split and preprocessing of the data.

    Example:
        >>> import torch
        >>> from manifold_nets.comparison import task_from_data
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> task = task_from_data(data, data, data, name="pairs")
        >>> task.name, task.input_shape, task.outputs
        ('pairs', (4,), 2)
    """

    name: str
    parts: Mapping[str, Part]
    input_shape: tuple[int, ...]
    outputs: int
    loss: Callable[[Any, Tensor], Tensor] = cross_entropy
    measure: Callable[[Any, Tensor], Tensor] = hits
    summarize: Callable[[Tensor], dict[str, float]] = classification_scores
    batch_size: int = 100
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in PART_NAMES if name not in self.parts or len(self.parts[name]) == 0]
        if missing:
            raise TaskSourceError(f"task {self.name}", f"no examples in: {', '.join(missing)}", "three filled parts")

    def sizes(self) -> dict[str, int]:
        """Return the number of examples in each part."""
        return {name: len(self.parts[name]) for name in PART_NAMES}

    def example_inputs(self, count: int | None = None) -> Any:
        """Return the first training inputs, for `manifold_nets.diagnose` and `manifold_nets.convert`.

        Args:
            count: number of examples (default: 16, fewer for large inputs, whose analysis would take memory and time).
        """
        part = self.parts["train"]
        if count is None:
            count = max(2, min(16, _EXAMPLE_NUMBERS // max(1, math.prod(self.input_shape))))
        return part.batch(torch.arange(min(count, len(part))))[0]

    def to(self, device: torch.device | str) -> Task:
        """Return the task with its data on a device."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the description of a task as plain data for JSON."""
        return {
            "name": self.name,
            "sizes": self.sizes(),
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "batch_size": self.batch_size,
            **self.description,
        }


def evaluate(
    model: nn.Module, task: Task, part: str, *, batch_size: int = 1000, rows: Sequence[int] | None = None
) -> dict[str, float]:
    """Return mean loss and scores of a model on one part of the data, in evaluation mode; its modes are restored.

    Args:
        model: the network.
        task: the task.
        part: ``"train"``, ``"validation"`` or ``"test"``.
        batch_size: examples per forward pass.
        rows: examples to use (default: all).

    Returns:
        ``"loss"``, the mean over the examples, and the scores of `Task.summarize`.
    """
    numbers = torch.arange(len(task.parts[part])) if rows is None else torch.as_tensor(rows)
    with evaluation_mode(model):
        return scores_of(model, task, part, torch.split(numbers, batch_size))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module into evaluation mode, and restore its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def scores_of(model: nn.Module, task: Task, part: str, batches: Sequence[Tensor]) -> dict[str, float]:
    """Return what `evaluate` does, for a model in its present mode.

    Args:
        model: the network.
        task: the task.
        part: ``"train"``, ``"validation"`` or ``"test"``.
        batches: indices of the examples of each forward pass.
    """
    total, counts = 0.0, []
    for rows in batches:
        inputs, targets = task.parts[part].batch(rows)
        outputs = model(inputs)
        total += float(task.loss(outputs, targets)) * len(rows)
        counts.append(task.measure(outputs, targets).cpu())
    return {"loss": total / sum(map(len, batches)), **task.summarize(reduce(torch.add, counts))}


def classification(
    name: str, parts: Mapping[str, tuple[Tensor, Tensor]], *, outputs: int, batch_size: int, **description: Any
) -> Task:
    """Return a task of classification by cross-entropy.

    Args:
        name: name of the task.
        parts: inputs and classes of ``"train"``, ``"validation"`` and ``"test"``.
        outputs: number of classes.
        batch_size: examples per training step.
        description: source, split and preprocessing of the data.
    """
    return Task(
        name=name,
        parts={part: TensorPart(x, y) for part, (x, y) in parts.items()},
        input_shape=tuple(parts["train"][0].shape[1:]),
        outputs=outputs,
        batch_size=batch_size,
        description=description,
    )
