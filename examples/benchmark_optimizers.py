"""Time the optimizers beside torch's own, geoopt's and timm's: steps, whole training steps, state, first step.

    python examples/benchmark_optimizers.py
    python examples/benchmark_optimizers.py --workloads mobilenet training --repetitions 50
    python examples/benchmark_optimizers.py --device cuda --write examples/results

In each repetition every optimizer takes one step, in turn, so that a busy machine slows all of them; a ratio is taken
within a repetition, to torch's fused optimizer. The last column compares the fastest step of each, which other work on
the machine disturbs least. What is not installed is left out. `--write DIR` stores the tables as CSV and Markdown.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.sources import import_torchvision

Step = Callable[[], object]
Shape = tuple[int, ...]
WORKLOADS = ("resnet50", "mobilenet", "transformer", "training")


@dataclass(frozen=True)
class Row:
    """One line of the table; times of a step in milliseconds, ratios to torch's fused optimizer."""

    workload: str
    optimizer: str
    milliseconds: float
    ratio: float
    lower_quartile: float
    upper_quartile: float
    ratio_of_fastest: float
    first_step_seconds: float
    state_over_weights: float


def resnet50() -> Iterator[Shape]:
    """Yield the shapes of the 53 convolution weights of ResNet-50, 23.5 million entries."""
    yield (64, 3, 7, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            if block == 0:
                yield (4 * width, channels, 1, 1)
            channels = 4 * width


def mobilenet() -> Iterator[Shape]:
    """Yield the shapes of the 52 convolution weights of MobileNetV3-small, 0.9 million entries."""
    yield (16, 3, 3, 3)
    widths = (16, 16, 24, 24, 40, 40, 40, 48, 48, 96, 96, 96)
    inner = ((16, 3, 8), (72, 3, 0), (88, 3, 0), (96, 5, 24), (240, 5, 64), (240, 5, 64), (120, 5, 32), (144, 5, 40))
    for before, after, (width, kernel, squeeze) in zip(
        widths, widths[1:], (*inner, (288, 5, 72), (576, 5, 144), (576, 5, 144)), strict=False
    ):
        if width != before:
            yield (width, before, 1, 1)
        yield (width, 1, kernel, kernel)
        if squeeze:
            yield from ((squeeze, width, 1, 1), (width, squeeze, 1, 1))
        yield (after, width, 1, 1)
    yield (576, 96, 1, 1)


def transformer() -> Iterator[Shape]:
    """Yield the shapes of the matrices of a transformer of 12 layers of width 768, 100 million entries."""
    yield (20_480, 768)
    for _ in range(12):
        yield from ((2304, 768), (768, 768), (3072, 768), (768, 3072))


def contestants(method: str, device: str) -> dict[str, tuple[str, type, dict[str, Any]]]:
    """Return name → (kind of weights, optimizer, options); torch's fused optimizer first."""
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9} if method == "sgd" else {"lr": 1e-3}
    ours = mn.optim.RiemannianSGD if method == "sgd" else mn.optim.RiemannianAdam
    plain = torch.optim.SGD if method == "sgd" else torch.optim.Adam
    other = geoopt.optim.RiemannianSGD if method == "sgd" else geoopt.optim.RiemannianAdam
    name = plain.__name__
    found: dict[str, tuple[str, type, dict[str, Any]]] = {
        f"torch {name}, fused": ("plain", plain, {**options, "fused": True}),
        f"torch {name}, foreach": ("plain", plain, {**options, "foreach": True}),
        f"Riemannian{name}": ("spheres", ours, options),
        f"Riemannian{name}, foreach": ("spheres", ours, {**options, "foreach": True}),
        f"Riemannian{name}, compile": ("spheres", ours, {**options, "compile": True}),
        f"geoopt Riemannian{name}": ("rows", other, options),
    }
    try:
        import_torchvision()
        from timm.optim import SGDP, AdamP

        found[f"timm {name}P"] = ("plain", SGDP if method == "sgd" else AdamP, options)
    except ModuleNotFoundError:
        pass
    return found


def wanted(name: str, chosen: list[str]) -> bool:
    """Whether to time an optimizer; torch's fused one always, as the ratios are to it."""
    return not chosen or name in chosen or (name.startswith("torch") and name.endswith("fused"))


def steps_over(shapes: list[Shape], method: str, chosen: list[str], device: str) -> dict[str, tuple[Step, Any, int]]:
    """Return a step of each optimizer; all share the memory of weights and gradients, which they change very little."""
    points = [mn.SphereProduct(s).random_uniform(device=device).as_subclass(torch.Tensor) for s in shapes]
    gradients = [0.1 * torch.randn(s, device=device) for s in shapes]
    size = sum(point.nbytes for point in points)
    steps: dict[str, tuple[Step, Any, int]] = {}
    for name, (kind, make, options) in contestants(method, device).items():
        if not wanted(name, chosen):
            continue
        weights = []
        for point, gradient in zip(points, gradients, strict=True):
            if kind == "plain":
                weight: torch.Tensor = nn.Parameter(point)
            elif kind == "spheres":
                weight = geoopt.ManifoldParameter(point, manifold=mn.SphereProduct(point.shape))
            else:
                weight = geoopt.ManifoldParameter(point.flatten(1), manifold=geoopt.Sphere())
            weight.grad = gradient.view(weight.shape)
            weights.append(weight)
        optimizer = make(weights, **options)
        steps[name] = (optimizer.step, optimizer, size)
    return steps


def training_steps(method: str, chosen: list[str], device: str) -> dict[str, tuple[Step, Any, int]]:
    """Return whole training steps of ResNet-18 on 32 images of 32×32: the plain network, and ours on spheres."""
    images, labels = torch.randn(32, 3, 32, 32, device=device), torch.randint(10, (32,), device=device)
    steps: dict[str, tuple[Step, Any, int]] = {}
    for name, (kind, make, options) in contestants(method, device).items():
        if kind == "rows" or "foreach" in name or not wanted(name, chosen):
            continue
        model = import_torchvision().models.resnet18(num_classes=10).to(device)
        if kind == "spheres":
            model = mn.convert(model, images)
        size = sum(p.nbytes for p in model.parameters())
        optimizer = make(mn.param_groups(model) if kind == "spheres" else model.parameters(), **options)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        steps[name] = (step, optimizer, size)
    return steps


def measure(workload: str, steps: dict[str, tuple[Step, Any, int]], repetitions: int, device: str) -> list[Row]:
    """Time every step, in turn."""

    def seconds(step: Step) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = {name: seconds(step) for name, (step, _, _) in steps.items()}
    for step, _, _ in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, (step, _, _) in steps.items():
            times[name].append(seconds(step))
    base = next(iter(times.values()))
    rows = []
    for name, (_, optimizer, size) in steps.items():
        low, median, high = statistics.quantiles([a / b for a, b in zip(times[name], base, strict=True)], n=4)
        state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
        numbers = (1e3 * statistics.median(times[name]), median, low, high, min(times[name]) / min(base))
        rows.append(Row(workload, name, *(round(x, 3) for x in (*numbers, first[name], state / size))))
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| workload | optimizer | ms a step | to torch, fused | quartiles | fastest ones | first step, s | state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        quartiles = f"{r.lower_quartile:.2f} … {r.upper_quartile:.2f}"
        lines.append(
            f"| {r.workload} | {r.optimizer} | {r.milliseconds:.2f} | {r.ratio:.2f} | {quartiles} "
            f"| {r.ratio_of_fastest:.2f} | {r.first_step_seconds:.2f} | {r.state_over_weights:.3f} |"
        )
    return "\n".join(lines)


def write(rows: list[Row], folder: Path, device: str, repetitions: int) -> None:
    """Store the rows as CSV and Markdown, with versions and machine."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    name = "benchmark_optimizers" if device == "cpu" else f"benchmark_optimizers_{device}"
    (folder / f"{name}.csv").write_text(text.getvalue())
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    load = f"; other work kept {os.getloadavg()[0]:.0f} processes busy at the end" if hasattr(os, "getloadavg") else ""
    about = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine}, {repetitions} repetitions{load}."
    title = f"# Steps of the optimizers\n\n`python examples/benchmark_optimizers.py {shlex.join(sys.argv[1:])}`"
    (folder / f"{name}.md").write_text(f"{title}: {about}\n\n{table(rows)}\n")


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--methods", nargs="+", choices=("sgd", "adam"), default=("sgd", "adam"))
    parser.add_argument("--only", nargs="+", default=[], help="only the optimizers of these names")
    parser.add_argument("--repetitions", type=int, default=30, help="steps timed of each optimizer (at least 20)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--write", type=Path, metavar="DIR", help="store the table there")
    arguments = parser.parse_args()
    if arguments.repetitions < 20:
        parser.error("--repetitions must be at least 20")
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    for workload in arguments.workloads:
        for method in arguments.methods:
            torch.manual_seed(0)
            if workload == "training":
                steps = training_steps(method, arguments.only, arguments.device)
            else:
                steps = steps_over(list(globals()[workload]()), method, arguments.only, arguments.device)
            rows += measure(workload, steps, arguments.repetitions, arguments.device)
            if arguments.write is not None:
                write(rows, arguments.write, arguments.device, arguments.repetitions)
    print(table(rows))


if __name__ == "__main__":
    main()
