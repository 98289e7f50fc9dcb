"""Time the optimizers beside torch's own, geoopt's, timm's and NVIDIA's: steps, training steps, state, first step.

    python examples/benchmark_optimizers.py
    python examples/benchmark_optimizers.py --workloads mobilenet training --repetitions 50
    python examples/benchmark_optimizers.py --device cuda --write examples/results

In each repetition every optimizer takes one step, in an order drawn anew, so that a busy machine slows all of them; a
ratio is taken within a repetition. *Fastest ones* compares the fastest step of each, which other work on the machine
disturbs least. *First step* is with empty caches of compiled code, in a process of its own for every workload.
*State* is what the optimizer keeps, relative to the weights. What is not installed is left out; NVIDIA's
`emerging_optimizers`, for ObliqueSGD and ObliqueAdam, needs Python 3.12. `--write DIR` stores the table as CSV and
Markdown, after every workload; `--missing` goes on where such a run was stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import torch
from machine import machine
from optimizer_workloads import SHAPES, TRAINING, Contestant, Step, Timed, contestants, steps_over, training_steps

from manifold_nets.optim.backends import native
from manifold_nets.optim.backends.dispatch import has_triton

AT_LEAST = 20


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds or seconds, ratios within a repetition."""

    workload: str
    optimizer: str
    execution: str
    milliseconds: float
    to_fused: float
    to_fused_lower_quartile: float
    to_fused_upper_quartile: float
    to_foreach: float
    to_foreach_lower_quartile: float
    to_foreach_upper_quartile: float
    fastest_to_fastest_fused: float
    first_step_seconds: float
    state_over_weights: float


def of_workload(workload: str, method: str, options: argparse.Namespace) -> list[Contestant]:
    """Return the optimizers to time; torch's two always, as the ratios are to them."""
    found = contestants(method, relatives=options.relatives)
    if workload in TRAINING:
        found = [c for c in found if not c.matrices_only]
    else:
        found = [c for c in found if c.weights in ("plain", "spheres", "rows")]
    return [*found[:2], *(c for c in found[2:] if not options.only or c.name in options.only)]


def run_workload(workload: str, method: str, options: argparse.Namespace, folder: str) -> list[Row]:
    """Time all optimizers of one kind on one workload, in this process; the folder is for compiled code."""
    os.environ |= {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    chosen = of_workload(workload, method, options)
    if workload in TRAINING:
        timed = training_steps(workload, chosen, options.device)
    else:
        timed = steps_over(list(SHAPES[workload]()), chosen, options.device)
    return measure(workload, chosen, timed, options.repetitions, options.device)


def measure(workload: str, chosen: list[Contestant], timed: list[Timed], repetitions: int, device: str) -> list[Row]:
    """Time every step, in turn; the first of them is torch's fused one, and the second torch's foreach."""

    def seconds(step: Step) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = []
    for contestant, each in zip(chosen, timed, strict=True):
        first.append(seconds(each.step))
        tell(f"{contestant.name}, {contestant.execution}: first step {first[-1]:.2f} s")
    for each in timed:
        each.step()
    times: list[list[float]] = [[] for _ in timed]
    order = list(range(len(timed)))
    for number in range(repetitions):
        random.Random(number).shuffle(order)
        for index in order:
            times[index].append(seconds(timed[index].step))
    rows = []
    for contestant, each, taken, begun in zip(chosen, timed, times, first, strict=True):
        state = sum(x.nbytes for s in each.optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
        numbers = (
            1e3 * statistics.median(taken), *ratio(taken, times[0]), *ratio(taken, times[1]),
            min(taken) / min(times[0]), begun, state / each.weight_bytes,
        )  # fmt: skip
        rows.append(Row(workload, contestant.name, named(contestant, device), *(round(x, 3) for x in numbers)))
    return rows


def named(contestant: Contestant, device: str) -> str:
    """Say how an optimizer took its steps; asked when they are taken, as the answer may compile the kernel."""
    if contestant.execution != "default":
        return contestant.execution
    if device == "cuda" and has_triton(torch.empty(0, device=device)):
        return "default: kernels in Triton"
    if device != "cpu" or native.available() is not None:
        return "default: batches of torch's operations"
    # The kernel knows these rules; it lends its passes to the others.
    whole = contestant.name.startswith(("RiemannianSGD", "RiemannianAdam")) or contestant.name == "angular-adam"
    return f"default: {'' if whole else 'passes of the '}native kernel"


def ratio(times: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios within a repetition, and their quartiles."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
    return median, low, high


def tell(message: str) -> None:
    """Report progress."""
    print(message, file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| workload | optimizer | execution | ms a step | to torch, fused (quartiles) | to torch, foreach (quartiles)",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines[0] += " | fastest ones | first step, s | state |"
    for r in rows:
        fused = f"{r.to_fused:.2f} ({r.to_fused_lower_quartile:.2f} … {r.to_fused_upper_quartile:.2f})"
        foreach = f"{r.to_foreach:.2f} ({r.to_foreach_lower_quartile:.2f} … {r.to_foreach_upper_quartile:.2f})"
        lines.append(
            f"| {r.workload} | {r.optimizer} | {r.execution} | {r.milliseconds:.2f} | {fused} | {foreach} "
            f"| {r.fastest_to_fastest_fused:.2f} | {r.first_step_seconds:.2f} | {r.state_over_weights:.3f} |"
        )
    return "\n".join(lines)


def place(folder: Path, device: str) -> Path:
    """Return the file of the rows."""
    return folder / ("benchmark_optimizers.csv" if device == "cpu" else f"benchmark_optimizers_{device}.csv")


def write(rows: list[Row], folder: Path, options: argparse.Namespace) -> None:
    """Store the rows as CSV and Markdown, with versions and machine."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = place(folder, options.device)
    path.write_text(text.getvalue())
    load = f"; other work kept {os.getloadavg()[0] - 1:.1f} processes busy" if hasattr(os, "getloadavg") else ""
    about = f"{machine()} {options.threads} threads, {options.repetitions} repetitions{load}."
    title = f"# Steps of the optimizers\n\n`python examples/benchmark_optimizers.py {shlex.join(sys.argv[1:])}`"
    path.with_suffix(".md").write_text(f"{title}\n\n{about}\n\n{table(rows)}\n")


def stored(folder: Path, device: str) -> list[Row]:
    """Return the rows of an earlier run."""
    path = place(folder, device)
    if not path.exists():
        return []
    with path.open() as lines:
        read = [list(row.values()) for row in csv.DictReader(lines)]
    return [Row(*row[:3], *map(float, row[3:])) for row in read]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=(*SHAPES, *TRAINING), help="training-resnet50 is for GPUs")
    parser.add_argument("--methods", nargs="+", choices=("sgd", "adam"), default=("sgd", "adam"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only the optimizers of these names")
    parser.add_argument("--relatives", action="store_true", help="also the other optimizers of optim.OPTIMIZERS")
    parser.add_argument("--repetitions", type=int, default=25, help=f"timed steps (to store: at least {AT_LEAST})")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--write", type=Path, metavar="DIR", help="store the table there")
    parser.add_argument("--missing", action="store_true", help="with --write: go on where a run was stopped")
    options = parser.parse_args()
    if options.repetitions < (2 if options.write is None else AT_LEAST):
        parser.error(f"--repetitions must be at least 2, and at least {AT_LEAST} with --write")
    if options.workloads is None:
        options.workloads = [*SHAPES, "training", *(["training-resnet50"] if options.device == "cuda" else [])]
    return options


def main() -> None:
    """Run every workload in a process of its own, and print the table."""
    options = arguments()
    rows = stored(options.write, options.device) if options.missing and options.write is not None else []
    done = {(row.workload, "sgd" if "SGD" in row.optimizer else "adam") for row in rows if row.to_fused == 1.0}
    for workload in options.workloads:
        for method in options.methods:
            if (workload, method) in done:
                continue
            tell(f"--- {workload}, {method}")
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as process:
                rows += process.submit(run_workload, workload, method, options, folder).result()
            tell(f"--- {workload}, {method}: {time.perf_counter() - start:.0f} s")
            if options.write is not None:
                write(rows, options.write, options)
    print(table(rows))


if __name__ == "__main__":
    main()
