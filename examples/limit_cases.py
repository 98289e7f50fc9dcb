"""The cases of `where_it_does_not_help`: conditions, what to compare with, spheres, and remedies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from manifold_nets.comparison.tasks import Task, TensorPart, load_task

__all__ = ["CASES", "COMMON", "Case", "Entry"]

RATES = (3.16e-3, 1e-2, 3.16e-2, 1e-1, 3.16e-1)
SEEDS = 5
COMMON: Mapping[str, Any] = {
    "task": "digits",
    "model": "mlp:100,100",
    "learning_rates": RATES,
    "seeds": SEEDS,
    "epochs": 6,
    "schedule": "cosine",
}


def perceptron(widths: tuple[int, ...], *, eps: float = 1e-5, gain: float = 1.0, normalize: bool = True) -> nn.Module:
    """A perceptron as ``mlp`` of the comparison, with another eps, or larger weights, or without normalizations."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = 64
    for width in widths:
        layer = nn.Linear(features, width, bias=not normalize)
        with torch.no_grad():
            layer.weight.mul_(gain)
        layers += [layer, *([nn.BatchNorm1d(width, eps=eps)] if normalize else []), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, 10))


def large_eps() -> nn.Module:
    """Two layers whose eps of 100 is far above the variance of what it is added to."""
    return perceptron((100, 100), eps=100.0)


def large_eps_and_weights() -> nn.Module:
    """The same with weights, and so radii, a hundred times larger."""
    return perceptron((100, 100), eps=100.0, gain=100.0)


def eight_layers() -> nn.Module:
    """Eight layers without normalizations."""
    return perceptron((50,) * 8, normalize=False)


def eight_normalized_layers() -> nn.Module:
    """Eight layers with batch normalization."""
    return perceptron((50,) * 8)


def few_wrong_labels() -> Task:
    """Digits with 300 images to train on, of which 30 % have a label drawn at random."""
    task = load_task("digits")
    train = task.parts["train"]
    inputs, labels = train.batch(torch.arange(300))
    draw = torch.Generator().manual_seed(0)
    wrong = torch.rand(300, generator=draw) < 0.3
    drawn = torch.randint(0, task.outputs, (300,), generator=draw)
    part = TensorPart(inputs, torch.where(wrong, drawn, labels))
    return replace(task, name="digits, 300 images, 30 % of labels drawn", parts={**task.parts, "train": part})


@dataclass(frozen=True)
class Entry:
    """One optimizer of a case.

    Args:
        role: ``"reference"``, ``"spheres"`` or ``"remedy"``.
        optimizer: its name.
        told: what is other than in the rest of the case, for tables; and for a remedy what it is.
        options: of the comparison, where they differ from those of the case.
    """

    role: str
    optimizer: str
    told: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def arm(self, case: Case) -> str:
        """Name of the comparison that it is run in."""
        return f"{case.name}: {self.told}" if self.options else case.name


@dataclass(frozen=True)
class Case:
    """Conditions under which spheres might not help.

    Args:
        name: in a few words.
        why: what to expect.
        entries: the reference first.
        options: of the comparison, where they differ from `COMMON`.
    """

    name: str
    why: str
    entries: tuple[Entry, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = (
    Case(
        "small learning rate, SGD",
        "On the unit sphere a filter of norm n < 1 turns by n² times the angle of SGD's step.",
        (
            Entry("reference", "sgd"),
            Entry("spheres", "rsgd"),
            Entry("remedy", "rsgd, matched", "rates of matched_learning_rates"),
        ),
        {"learning_rates": (1e-3,)},
    ),
    Case(
        "small learning rate, Adam",
        "A sphere turns by the rate η, where Adam moves each of d entries by η and turns the filter by about η√d.",
        (
            Entry("reference", "adamw"),
            Entry("spheres", "radam"),
            Entry("remedy", "radamw, matched", "spheres at η√d"),
            Entry("remedy", "radamw, exactly matched", "rates of matched_learning_rates"),
        ),
        {"learning_rates": (1e-3,)},
    ),
    Case(
        "one epoch of twenty steps",
        "Few steps have to be large ones, and the filters have not yet grown.",
        (
            Entry("reference", "sgd"),
            Entry("spheres", "rsgd"),
            Entry("remedy", "rsgd, matched", "rates of matched_learning_rates"),
        ),
        {"epochs": 1, "learning_rates": (*RATES, 1.0)},
    ),
    Case(
        "constant rate, not reduced at the end",
        "Plain filters grow, which slows them down; spheres turn on at the same pace.",
        (
            Entry("reference", "adamw"),
            Entry("spheres", "radamw, matched"),
            Entry("remedy", "radamw, matched", "half a cosine instead", {"schedule": "cosine"}),
        ),
        {"schedule": "constant", "learning_rates": (3.16e-2,), "epochs": 12},
    ),
    Case(
        "eps far above the variance",
        "With eps = 100 the scale means something again: plain weights grow until eps does not matter.",
        (
            Entry("reference", "adamw"),
            Entry("spheres", "radamw, matched"),
            Entry("remedy", "radamw, matched", "radii a hundred times larger", {"model": large_eps_and_weights}),
            Entry("remedy", "radamw, matched", "eps of 1e-5", {"model": "mlp:100,100"}),
        ),
        {"model": large_eps},
    ),
    Case(
        "last layer on spheres",
        "Nothing normalizes behind a classifier: its norms say how sure it is.",
        (
            Entry("reference", "sgd"),
            Entry("spheres", "rsgd, last layer too"),
            Entry("remedy", "rsgd", "the last layer left Euclidean, as convert does"),
            Entry("remedy", "rsgd, last layer at radius 10", "a larger radius"),
        ),
        {"model": "mlp:100,5"},
    ),
    Case(
        "eight layers without normalizations",
        "No scale is free: on spheres of their initial norms the signal shrinks from layer to layer.",
        (
            Entry("reference", "adamw"),
            Entry("spheres", "radamw, forced"),
            Entry("remedy", "radamw, forced at radius √2", "radii that keep the signal"),
            Entry("remedy", "radamw, matched", "batch normalization", {"model": eight_normalized_layers}),
        ),
        {"model": eight_layers},
    ),
    Case(
        "wrong labels, weight decay 0.05",
        "Weight decay does nothing on spheres, and what it kept from being learned by heart is missed.",
        (
            Entry("reference", "sgd"),
            Entry("spheres", "rsgd"),
            Entry("remedy", "rsgd, gains decayed", "decay on gains too"),
            Entry("remedy", "radamw, matched", "AdamW with decay 5 on the rest", {"weight_decay": 5.0}),
        ),
        {"task": few_wrong_labels, "epochs": 25, "weight_decay": 0.05, "learning_rates": (1e-3, *RATES[:4])},
    ),
    Case(
        "three filters a layer",
        "In so few dimensions a norm is a large share of what there is to learn.",
        (
            Entry("reference", "sgd"),
            Entry("spheres", "rsgd"),
            Entry("remedy", "radamw, matched", "Adam's rates"),
            Entry("remedy", "angular and adamw", "angular steps"),
        ),
        {"model": "mlp:3,3", "epochs": 10},
    ),
    Case(
        "batches of four",
        "Statistics of four examples are noise, and spheres do not grow to calm it.",
        (
            Entry("reference", "adamw"),
            Entry("spheres", "radamw, matched"),
            Entry("remedy", "rsgd", "Riemannian SGD"),
            Entry("remedy", "angular and adamw", "angular steps"),
        ),
        {"batch_size": 4, "epochs": 1, "learning_rates": RATES[:4]},
    ),
)
