"""What a comparison costs beyond the training that it compares: the same runs by a bare loop and by the comparison.

    python examples/benchmark_comparison.py
    python examples/benchmark_comparison.py --repetitions 10 --write examples/results

Every run is trained twice in one process, first by a loop as one writes it by hand (the same weights, batches, steps
and validation passes, nothing recorded but the losses), then by the comparison, from the claim of the run to its stored
result and final weights; both must end with the same losses, to the last bit. A ratio is taken run by run, so that a
busy machine slows both. What is done once a comparison is given in seconds. `--write DIR` stores the table.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import machine
from torch import nn

from manifold_nets.comparison import Comparison, Progress, RunKey, RunResult, Settings, Stepper, Task, TorchStepper
from manifold_nets.comparison.experiment import Experiment, InitialModels, derived_seed
from manifold_nets.comparison.pool import InProcessExecutor
from manifold_nets.comparison.report import write_report
from manifold_nets.comparison.results import environment
from manifold_nets.comparison.run import BatchObjective, Runner
from manifold_nets.comparison.scheduler import Scheduler, conclude
from manifold_nets.comparison.store import RunStore

EXAMPLE = "sgd,adam,rsgd,radam,geoopt-rsgd,geoopt-radam,sgdp,adamp,pbwn,sm,pymanopt-cg"
Times = tuple[float, float]
"""Seconds on the wall and of the processor."""


def clock() -> Times:
    """Return the present time of both clocks."""
    return time.perf_counter(), time.process_time()


def since(start: Times) -> Times:
    """Return the seconds since then."""
    now = clock()
    return now[0] - start[0], now[1] - start[1]


class BareLoop:
    """Trains as one does by hand, and remembers the losses of every epoch.

    Args:
        task: data and loss.
        settings: of the comparison.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.settings = task, settings
        self.everything = {name: torch.arange(len(task.parts[name])) for name in ("train", "validation")}

    def train(self, model: nn.Module, stepper: Stepper, key: RunKey) -> list[tuple[float, float]]:
        """Return mean loss of training and validation of every epoch, up to the first that is not finite."""
        losses = []
        for epoch in range(1, self.settings.epochs + 1):
            model.train()
            if isinstance(stepper, TorchStepper):
                mean = self.epoch(model, stepper.optimizer, derived_seed(key.seed, "order", epoch))
            else:
                batch = self.task.parts["train"].batch(self.everything["train"])
                mean = float(stepper.step(BatchObjective(model, self.task.loss, *batch)))
            losses.append((mean, self.validate(model)))
            if not all(torch.isfinite(torch.tensor(losses[-1]))):
                break
        return losses

    def epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
        """Take the steps of an epoch."""
        order = torch.randperm(len(self.everything["train"]), generator=torch.Generator().manual_seed(seed))
        total = 0.0
        for rows in order.split(self.settings.batch_size):
            inputs, targets = self.task.parts["train"].batch(rows)
            optimizer.zero_grad()
            loss = self.task.loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        return total / len(order)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """Return the mean loss on the validation data; the error is computed too, as everyone wants to know it."""
        model.eval()
        total = wrong = 0.0
        for rows in self.everything["validation"].split(4 * self.settings.batch_size):
            inputs, targets = self.task.parts["validation"].batch(rows)
            outputs = model(inputs)
            total += self.task.loss(outputs, targets).item() * len(rows)
            wrong += (outputs.argmax(1) != targets).sum().item()
        return total / len(self.everything["validation"])


class Alternating(InProcessExecutor):
    """An executor that trains every run by the bare loop first.

    Args:
        runner: carries out the runs of the comparison.
        bare: the bare loop.
    """

    def __init__(self, runner: Runner, bare: BareLoop) -> None:
        super().__init__(runner)
        self.bare = bare
        self.order: list[RunKey] = []
        self.by_hand: list[Times] = []
        self.by_us: list[Times] = []
        self.losses: dict[RunKey, list[tuple[float, float]]] = {}
        self.mark = clock()

    def start(self, run_id: int, key: RunKey) -> None:
        """Train by hand. What the comparison did since the last such training belongs to the run before."""
        self.lap()
        initial, settings = self._runner._initial, self.bare.settings
        model = initial.model(key)
        start = clock()
        stepper = initial.experiment.optimizers[key.optimizer].make(model, key.learning_rate, settings)
        with contextlib.suppress(ValueError, RuntimeError, ArithmeticError):  # of numbers that are not finite
            self.losses[key] = self.bare.train(model, stepper, key)
        self.by_hand.append(since(start))
        self.order.append(key)
        self.mark = clock()
        super().start(run_id, key)

    def lap(self) -> None:
        """The comparison's part of a run ends."""
        if self.order:
            self.by_us.append(since(self.mark))

    def check(self, results: dict[RunKey, RunResult]) -> None:
        """Make sure that both did the same.

        Raises:
            SystemExit: a run came to other losses.
        """
        for key, result in results.items():
            found = [(record.train_loss, record.validation_loss) for record in result.epochs]
            if not result.diverged and found != self.losses[key]:
                sys.exit(f"{key}: the bare loop and the comparison did not do the same: {self.losses[key]}, {found}")


def repetition(settings: Settings, folder: Path, once: dict[str, float]) -> Iterator[tuple[RunKey, Times, Times]]:
    """Carry out the comparison in an empty folder; yield each run with its times by hand and by the comparison."""

    def timed(name: str, action: Callable[[], object]) -> None:
        start = clock()
        action()
        once[name] = since(start)[1]

    store = RunStore(f"sqlite:///{folder / 'study.db'}", "comparison")
    runners: list[Runner] = []

    def made() -> Runner:
        return Runner(InitialModels(Experiment.from_settings(settings), settings), settings, folder / "weights")

    timed("the study", lambda: (store.create(settings, environment()), store.add_missing(settings.run_keys())))
    timed("data, network, analysis", lambda: runners.append(made()))
    executor = Alternating(runners[0], BareLoop(runners[0]._task, settings))
    scheduler = Scheduler(store, settings, executor, False, folder / "weights", show)
    torch.set_num_threads(1)
    scheduler.run()
    executor.lap()
    executor.check(scheduler.results)
    ended: list[Comparison] = []
    timed("choices, tests", lambda: ended.append(conclude(store, settings, lambda: runners[0])))
    timed("files and report", lambda: (ended[0].write(folder), write_report(ended[0], folder)))
    store.close()
    yield from zip(executor.order, executor.by_hand, executor.by_us, strict=True)


def show(progress: Progress) -> None:
    """Show how far it is."""
    if sys.stderr.isatty():
        print(f"\r{progress.done} of {progress.total} runs", end="", file=sys.stderr)


def table(found: list[list[tuple[RunKey, Times, Times]]], optimizers: tuple[str, ...]) -> str:
    """Return the table: for each optimizer and for all, seconds by hand and what the comparison adds."""
    lines = [
        "| optimizer | s a run, by hand | the comparison adds, % | quartiles | % of processor time | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    runs = [run for repeated in found for run in repeated]
    for name in optimizers:
        own = [run for run in runs if run[0].optimizer == name]
        seconds = statistics.median(hand[0] for _, hand, _ in own)
        lines.append(f"| {name} | {seconds:.3f} | {shares([(hand, us) for _, hand, us in own])} |")
    sums = [[tuple(map(sum, zip(*column, strict=True))) for column in list(zip(*r, strict=True))[1:]] for r in found]
    seconds = statistics.median(hand[0] for hand, _ in sums) / len(found[0])
    lines.append(f"| all together | {seconds:.3f} | {shares([(hand, us) for hand, us in sums])} |")
    return "\n".join(lines)


def shares(pairs: list[tuple[Times, Times]]) -> str:
    """Return what is added, in percent of what is done by hand: median and quartiles, by both clocks."""
    cells = []
    for which in (0, 1):
        added = [100 * (us[which] / hand[which] - 1) for hand, us in pairs]
        low, median, high = statistics.quantiles(added, n=4) if len(added) > 1 else added * 3
        cells.append(f"{median:.1f} | {low:.1f} … {high:.1f}".replace("-", "−"))
    return " | ".join(cells)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optimizers", default=EXAMPLE, help="names, separated by commas")
    parser.add_argument("--lr", default="0.001,0.00562341,0.0316228,0.177828,1", help="separated by commas")
    parser.add_argument("--model", default="mlp:100,100")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5, help="of the whole comparison")
    parser.add_argument("--write", type=Path, metavar="DIR", help="store the table there")
    arguments = parser.parse_args()
    settings = Settings(
        tuple(arguments.optimizers.split(",")),
        tuple(map(float, arguments.lr.split(","))),
        tuple(range(arguments.seeds)),
        arguments.epochs,
        model=arguments.model,
        batch_size=50,
    )
    found, once = [], dict[str, float]()
    for _ in range(arguments.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            found.append(list(repetition(settings, Path(folder), once)))
    text = table(found, settings.optimizers)
    text += f"\n\nOnce, in seconds of the processor: {', '.join(f'{name} {s:.1f}' for name, s in once.items())}."
    print(text)
    if arguments.write is not None:
        command = f"python examples/benchmark_comparison.py {shlex.join(sys.argv[1:])}"
        title = f"# What a comparison adds to training\n\n`{command}`"
        about = f"{len(found)} repetitions of {len(found[0])} runs. {machine()}"
        (arguments.write / "benchmark_comparison.md").write_text(f"{title}: {about}\n\n{text}\n")


if __name__ == "__main__":
    main()
