"""Time one optimizer step over the convolution weights of ResNet-50: ours, torch's fused one, and geoopt's.

    python examples/benchmark_optimizer_step.py
    python examples/benchmark_optimizer_step.py --repetitions 50 --threads 4 --json

All step on the same values with the same gradients. In each repetition every optimizer takes one step, in turn, so
that a busy machine slows all of them; a ratio is taken within a repetition. geoopt steps on the same `SphereProduct`
and, as it is most at home, on its own `Sphere` with the filters as the rows of a matrix.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import geoopt
import torch

import manifold_nets as mn

Optimizers = dict[str, torch.optim.Optimizer]


def resnet50_convolutions() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the 53 convolution weights of ResNet-50, 23.5 million entries."""
    yield (64, 3, 7, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield (width, channels, 1, 1)
            yield (width, width, 3, 3)
            yield (4 * width, width, 1, 1)
            if block == 0:
                yield (4 * width, channels, 1, 1)
            channels = 4 * width


def weights(kind: str, points: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return fresh copies of the points as plain weights, on our spheres or on geoopt's, with their gradients."""
    result = []
    for point, gradient in zip(points, gradients, strict=True):
        rows = point.clone().flatten(1)
        if kind == "plain":
            weight: torch.Tensor = torch.nn.Parameter(point.clone())
        elif kind == "SphereProduct":
            weight = geoopt.ManifoldParameter(point.clone(), manifold=mn.SphereProduct(point.shape))
        else:
            weight = geoopt.ManifoldParameter(rows, manifold=geoopt.Sphere())
        weight.grad = gradient.clone().reshape(weight.shape)
        result.append(weight)
    return result


def contestants(method: str, make: Callable[[str], list[torch.Tensor]]) -> Optimizers:
    """Return the optimizers to compare; ours comes first."""
    if method == "sgd":
        options = {"lr": 1e-3, "momentum": 0.9}
        ours, fused, other = mn.optim.RiemannianSGD, torch.optim.SGD, geoopt.optim.RiemannianSGD
    else:
        options = {"lr": 1e-3}
        ours, fused, other = mn.optim.RiemannianAdam, torch.optim.Adam, geoopt.optim.RiemannianAdam
    return {
        f"manifold_nets {ours.__name__}": ours(make("SphereProduct"), **options),
        f"torch {fused.__name__}(fused=True)": fused(make("plain"), fused=True, **options),
        f"geoopt {other.__name__} on SphereProduct": other(make("SphereProduct"), **options),
        f"geoopt {other.__name__} on Sphere rows": other(make("Sphere"), **options),
    }


def time_steps(optimizers: Optimizers, repetitions: int, warmup: int) -> dict[str, list[float]]:
    """Return the seconds of each step of each optimizer, all optimizers in turn in every repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for repetition in range(warmup + repetitions):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if repetition >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    """Return median milliseconds, and the ratio of our step to each step: median, quartiles, least and largest."""
    ours = next(iter(seconds.values()))
    rows = []
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(ours, values, strict=True))
        low, median, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "optimizer": name,
                "milliseconds": round(1e3 * statistics.median(values), 2),
                "ratio": round(median, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "range": [round(ratios[0], 3), round(ratios[-1], 3)],
            }
        )
    return rows


def main() -> None:
    """Run the benchmark and print one table, or one JSON document, a method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=30, help="steps timed of each optimizer (at least 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock runs")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.repetitions < 20:
        parser.error("--repetitions must be at least 20")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shapes = list(resnet50_convolutions())
    points = [mn.SphereProduct(shape).random_uniform().as_subclass(torch.Tensor) for shape in shapes]
    gradients = [0.1 * torch.randn(shape) for shape in shapes]
    for method in ("sgd", "adam"):
        optimizers = contestants(method, lambda kind: weights(kind, points, gradients))
        rows = summarize(time_steps(optimizers, arguments.repetitions, arguments.warmup))
        if arguments.json:
            print(json.dumps({"method": method, "threads": arguments.threads, "rows": rows}))
            continue
        print(f"{method}: {len(shapes)} weights, {arguments.repetitions} repetitions, {arguments.threads} threads")
        print(f"  {'optimizer':42} {'ms/step':>8} {'ours/this':>10}   quartiles        range")
        for row in rows:
            quartiles, extent = ("{:.2f} … {:.2f}".format(*row[key]) for key in ("quartiles", "range"))
            print(f"  {row['optimizer']:42} {row['milliseconds']:8.1f} {row['ratio']:10.2f}   {quartiles}   {extent}")


if __name__ == "__main__":
    main()
