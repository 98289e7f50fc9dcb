"""A network converted in mid-training goes on as it would have: `manifold_nets.optim.from_torch`, step by step.

A network is trained with torch's own optimizer. After a while it goes on in several ways, from the same point:

- as before, and with two other orders of the data: how far apart chance alone takes runs;
- converted, with `from_torch`, which follows the norms of the plain run, and sees the data in the order of before;
- the same with ``transfer="step"``: the rates that match the next step, kept;
- converted, with an optimizer on spheres that has the plain learning rate and an empty momentum.

The loss on held-out data is measured after 0, 1, 2, 4, … steps and at every epoch. Tasks: ``digits`` (scikit-learn's,
convolutions and SGD), ``mnist`` (the same on 2,000 images of MNIST; ``--data`` names the folder of its four files), and
``text`` (a small Qwen3, whose queries and keys are normalized head by head, and AdamW). Each without and with weight
decay, at a constant rate and with half a cosine.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits import load_digits, network
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import manifold_nets as mn

BEFORE, OTHERS = "plain, as before", ("plain, another order", "plain, a third order")
FOLLOW, STEP, UNMATCHED = "converted, from_torch", "converted, from_torch, step", "converted, plain rate"
WAYS = (BEFORE, *OTHERS, FOLLOW, STEP, UNMATCHED)
SETTINGS = {
    f"{'decay' if decay else 'no decay'}, {'cosine' if cosine else 'constant rate'}": (decay, cosine)
    for decay in (False, True)
    for cosine in (False, True)
}
# Colours of Okabe and Ito that stay apart for every kind of colour vision, and in print by their line styles.
STYLES: dict[str, dict[str, Any]] = {
    BEFORE: {"color": "#000000", "linestyle": "-", "linewidth": 3, "alpha": 0.5},
    OTHERS[0]: {"color": "#000000", "linestyle": ":"},
    OTHERS[1]: {"color": "#000000", "linestyle": "-.", "linewidth": 0.8},
    FOLLOW: {"color": "#0072B2", "linestyle": "--"},
    STEP: {"color": "#009E73", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
    UNMATCHED: {"color": "#D55E00", "linestyle": (0, (1, 1))},
}


@dataclass(frozen=True)
class Problem:
    """A task: its data as rows, a network for a seed, a loss of rows, and the optimizer of the plain run."""

    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]
    decay: float
    batch: int
    example_inputs: Any

    def steps(self, epochs: int) -> int:
        """How many steps so many epochs take."""
        return epochs * math.ceil(len(self.train[0]) / self.batch)

    def batches(self, seed: int) -> Iterator[list[Tensor]]:
        """Batches without end, in an order that the seed decides."""
        order = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(self.train[0]), generator=order).split(self.batch):
                yield [x[rows] for x in self.train]


def digits(_: Path) -> Problem:
    """Scikit-learn's digits."""
    images = load_digits()
    held = images["validation"]
    return _images((images["train"].x, images["train"].y), (held.x, held.y))


def mnist(data: Path) -> Problem:
    """2,000 images of MNIST to train on, and 500 held out."""
    from manifold_nets.comparison.tasks.images import find_idx_files, read_images_and_labels

    x, y = (torch.tensor(part[:2500]) for part in read_images_and_labels(*find_idx_files(data)["train"]))
    x = (x.float().reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return _images((x[:2000], y[:2000].long()), (x[2000:], y[2000:].long()))


def _images(train: tuple[Tensor, ...], held_out: tuple[Tensor, ...]) -> Problem:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    options = {"lr": 0.02, "momentum": 0.9}
    return Problem(train, held_out, network, loss, torch.optim.SGD, options, 5e-3, 50, train[0][:50])


def text(_: Path) -> Problem:
    """A small language model over the source of a module of Python's library."""
    from train_with_transformers import Source, language_model

    pieces = Source().pieces

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(input_ids=x, labels=x).loss
        return found

    def build() -> nn.Module:
        seed = int(torch.randint(2**31, ()))
        model = language_model()
        torch.manual_seed(seed)  # it takes a seed of its own
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        return model

    inputs = {"input_ids": pieces[:2]}
    return Problem((pieces[64:],), (pieces[:64],), build, loss, torch.optim.AdamW, {"lr": 5e-3}, 0.1, 16, inputs)


TASKS = {"digits": digits, "mnist": mnist, "text": text}


class Training:
    """A model in training, with optimizer, schedule and data."""

    def __init__(self, problem: Problem, seed: int, epochs: int, *, decay: bool, cosine: bool) -> None:
        torch.manual_seed(seed)
        self.problem, self.model = problem, problem.build()
        groups = mn.param_groups(self.model, weight_decay=problem.decay if decay else 0.0)
        self.optimizer = problem.optimizer(groups, **problem.options)
        total = problem.steps(epochs)
        rate = (lambda step: (1 + math.cos(math.pi * min(1, step / total))) / 2) if cosine else (lambda _: 1.0)
        self.schedule = LambdaLR(self.optimizer, rate)
        self.data = problem.batches(seed)

    def go_on(self, way: str, seed: int) -> Training:
        """Return a copy that goes on in some way; the data are those of a seed."""
        other = copy.copy(self)
        other.model, other.optimizer, other.schedule = copy.deepcopy((self.model, self.optimizer, self.schedule))
        other.data = self.problem.batches(seed)
        if way in (FOLLOW, STEP, UNMATCHED):
            plain, sgd = other.model, other.optimizer
            other.model = mn.convert(plain, self.problem.example_inputs)
            transfer = "step" if way == STEP else "follow"
            other.optimizer = mn.optim.from_torch(sgd, plain, other.model, transfer=transfer, scheduler=other.schedule)  # type: ignore[arg-type]
        if way == UNMATCHED:
            for group in other.optimizer.param_groups:
                del group["transfer"]
            other.optimizer.state.clear()
        return other

    def step(self) -> None:
        """One step of model and schedule."""
        self.model.train()
        self.optimizer.zero_grad()
        self.problem.loss(self.model, *next(self.data)).backward()
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def held_out(self) -> float:
        """The loss on held-out data, normalized with their own statistics, as in training; the model stays as it is.

        In evaluation mode a plain network is a little behind itself: its running statistics are of the norms that its
        filters had before.
        """
        return float(self.problem.loss(copy.deepcopy(self.model).train(), *self.problem.held_out))


def measured_at(problem: Problem, epochs: int) -> list[int]:
    """The steps after which losses are measured."""
    total = problem.steps(epochs)
    return sorted({0, *(2**k for k in range(12) if 2**k < total), *(problem.steps(k) for k in range(1, epochs + 1))})


def losses_of(
    problem: Problem, seed: int, first: int, epochs: int, *, decay: bool, cosine: bool
) -> dict[str, list[float]]:
    """Train up to the conversion, and go on in every way; return the held-out losses."""
    start = Training(problem, seed, first + epochs, decay=decay, cosine=cosine)
    for _ in range(problem.steps(first)):
        start.step()
    found: dict[str, list[float]] = {}
    places = measured_at(problem, epochs)
    for number, way in enumerate(WAYS):
        run = start.go_on(way, 1000 * (1 + (number if way in OTHERS else 0)) + seed)
        found[way] = []
        for step in range(places[-1] + 1):
            if step in places:
                found[way].append(run.held_out())
            run.step()
    return found


def log_ratios(after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logarithms of each way's losses over those of the plain run as before, shape (seeds, measurements)."""
    return {name: (losses / after[BEFORE]).log() for name, losses in after.items() if name != BEFORE}


def spread_of_chance(after: dict[str, Tensor]) -> Tensor:
    """Largest distance between two of the three plain runs at any time up to each measurement, for each seed."""
    plain = torch.stack([after[way].log() for way in (BEFORE, *OTHERS)])
    return (plain.amax(0) - plain.amin(0)).cummax(1).values


def summary(found: dict[str, dict[str, Tensor]], places: list[int]) -> Table:
    """Tabulate distances from the plain run as before in percent of the loss: root mean squares over seeds."""
    table = Table("setting", "goes on with", title="held-out loss against the plain run as before")
    shown = sorted({places.index(1), places.index(8), len(places) // 2 + 1, len(places) - 1})
    for heading in (*(f"step {places[k]}" for k in shown), "largest"):
        table.add_column(heading, no_wrap=True, justify="right")
    for setting, after in found.items():
        for way, ratios in log_ratios(after).items():
            sizes = 100 * ratios.square().mean(0).sqrt()
            cells = [f"{float(sizes[k]):.2g} %" for k in shown]
            table.add_row(setting if way == OTHERS[0] else "", way, *cells, f"{float(sizes.max()):.2g} %")
    return table


def verdict(found: dict[str, dict[str, Tensor]]) -> str:
    """Say how often each way stays within the spread of the plain runs, from the first step on."""
    lines = []
    for way in (FOLLOW, STEP, UNMATCHED):
        inside = [(log_ratios(after)[way].abs() <= spread_of_chance(after) + 1e-6)[:, 1:] for after in found.values()]
        share = torch.cat([x.flatten() for x in inside]).double().mean()
        lines.append(f"{way}: {100 * float(share):.1f} % of the measurements within the spread of the plain runs")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Tensor]], places: list[int], path: Path) -> None:
    """Draw the losses of the first seed in every setting."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(1, len(found), figsize=(4 * len(found), 4), layout="constrained", squeeze=False)
    for axes, (setting, after) in zip(rows[0], found.items(), strict=True):
        for way, style in STYLES.items():
            axes.plot(places, after[way][0], label=way, **style)
        axes.set(xlabel="steps after the conversion", yscale="log", title=setting)
        axes.set_xscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel("held-out loss, first seed")
    rows[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Read the options, train, and print what came out."""
    parser = argparse.ArgumentParser(description="Convert in mid-training, and go on as before.")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST's files")
    parser.add_argument("--plot", type=Path, default=Path("learning_rate_transfer.png"), help="where to draw")
    parser.add_argument("--seeds", type=int, choices=range(1, 1000), metavar="N", default=5, help="runs (default: 5)")
    parser.add_argument("--first", type=int, choices=range(1, 1000), metavar="N", default=2, help="epochs before")
    parser.add_argument("--epochs", type=int, choices=range(1, 1000), metavar="N", default=6, help="epochs after")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    began = time.perf_counter()
    # Tensors this small are quicker on one thread, and the numbers do not depend on how many there are.
    torch.set_num_threads(1)
    problem = TASKS[options.task](options.data)
    found: dict[str, dict[str, Tensor]] = {}
    for setting in options.settings:
        decay, cosine = SETTINGS[setting]
        runs = [
            losses_of(problem, seed, options.first, options.epochs, decay=decay, cosine=cosine)
            for seed in range(options.seeds)
        ]
        found[setting] = {way: torch.tensor([run[way] for run in runs], dtype=torch.float64) for way in WAYS}
    places = measured_at(problem, options.epochs)
    plot(found, places, options.plot)
    Console(width=120).print(summary(found, places))
    print(
        f"{options.task}, {options.seeds} seeds, {options.first} epochs before and {options.epochs} after conversion."
    )
    print(verdict(found))
    print(f"Plot: {options.plot}. Took {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
