"""Check the optimizers on a device: against float64, beside torch's fused ones, in whole training steps, in a graph.

    python examples/device_check.py --device cuda

Run by `examples/device_check.sh`, which also finds what the package needs. Each part is tried by itself, begins only
while there is time left, and says what went wrong in place of its figures. Times are medians, and ratios are to torch's
fused optimizer of the same kind, over the same tensors.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geoopt
import torch
from machine import machine
from optimizer_workloads import SHAPES, Shape, contestants, steps_over
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.optim import OPTIMIZERS
from manifold_nets.sources import import_torchvision

Row = dict[str, Any]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PARTITIONS = {
    "filters": mn.Partition.filters((96, 300)),
    "long rows": mn.Partition.filters((3, 40_000)),
    "columns": mn.Partition((64, 96), (64, 96), (1,)),
    "transposed": mn.Partition.transposed_filters((16, 12, 4, 4), groups=2),
}


def billion() -> Iterator[Shape]:
    """Yield the shapes of the matrices of a transformer of 19 layers of width 2048, a billion entries."""
    yield (32_768, 2048)
    for _ in range(19):
        yield from ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192))


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def median(steps: list[Callable[[], object]], device: str, repetitions: int) -> list[float]:
    """Return the milliseconds of each step; in each repetition all take one, in turn."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(repetitions + 3):
        for step, found in zip(steps, times, strict=True):
            wait(device)
            start = time.perf_counter()
            step()
            wait(device)
            if number >= 3:
                found.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(found) for found in times]


# ---- the parts -------------------------------------------------------------------------------------------------------


def path(name: str, layout: str, dtype: torch.dtype, device: str, steps: int, **how: Any) -> tuple[Tensor, str]:
    """Return a weight after some steps, in float64 on the CPU, and what took them."""
    row, partition = OPTIMIZERS[name], PARTITIONS[layout]
    sphere = mn.SphereProduct(partition, radius=1.5)
    generator = torch.Generator().manual_seed(0)
    start = sphere.projx(torch.randn(partition.shape, generator=generator, dtype=torch.float64)).to(torch.bfloat16)
    point = start.double().to(dtype).to(device)
    if row.weights == "plain":
        weight: Tensor = nn.Parameter(point)
        group: Row = {"params": [weight], "partitions": [partition.to_dict()]}
    else:
        weight = geoopt.ManifoldParameter(point, manifold=sphere)
        group = {"params": [weight]}
    more = {} if row.adaptive else {"momentum": 0.9}
    optimizer = row.kind([group], lr=0.1, **more, **row.options, **how)
    for _ in range(steps):
        gradient = torch.randn(partition.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)
        weight.grad = gradient.double().to(dtype).to(device)
        optimizer.step()
    plans = [plan.batches for plan in optimizer._plans.values()]
    return weight.detach().double().cpu(), ", ".join(backend.__name__ for batches in plans for backend, _ in batches)


def correctness(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the errors of every optimizer, layout and dtype against float64, in units of the radius and in epsilons."""
    for name in OPTIMIZERS:
        for layout in PARTITIONS:
            # Each dtype on each layout is another kernel to compile, for which there is no time.
            for dtype in DTYPES if layout == "filters" else DTYPES[:1]:
                steps = 3 if dtype.itemsize > 2 else 1
                exact, _ = path(name, layout, torch.float64, "cpu", steps, foreach=False)
                found, backend = path(name, layout, dtype, options.device, steps)
                eps, error = torch.finfo(dtype).eps, found - exact
                norm = float(PARTITIONS[layout].norms(error).max() / PARTITIONS[layout].norms(exact).max()) / eps
                yield {
                    "case": f"{name}, {layout}, {str(dtype)[6:]}",
                    "by": backend,
                    "error in eps": round(norm, 2),
                    "holds": norm <= 64,
                }


def stepping(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the times of steps over the weights of networks, with the growth of memory at the peak of one."""
    workloads = {"smoke": lambda: iter([(16, 27), (32, 144)])} if options.smoke else {**SHAPES, "billion": billion}
    for workload, shapes in workloads.items():
        for method in ("sgd", "adam"):
            chosen = contestants(method)[:3]
            timed = steps_over(list(shapes()), chosen, options.device)
            found = median([each.step for each in timed], options.device, options.repetitions)
            for contestant, each, taken in zip(chosen, timed, found, strict=True):
                row = {"case": f"{workload}, {contestant.name}, {contestant.execution}", "ms": round(taken, 3)}
                if options.device == "cuda":
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    each.step()
                    row["peak over weights"] = round(
                        (torch.cuda.max_memory_allocated() - before) / each.weight_bytes, 3
                    )
                yield {**row, "to fused": round(taken / found[0], 3)}
            del timed


def training(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the times of diagnosis, conversion and whole training steps of a network under autocast."""
    device, batch = options.device, 2 if options.smoke else 64
    if options.smoke:
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(9)
        )
        x = torch.randn(batch, 3, 8, 8)
        model(x)
    else:
        model, x = import_torchvision().models.resnet50(), torch.randn(batch, 3, 224, 224)
    model, x = model.to(device), x.to(device)
    labels = torch.randint(9, (batch,), device=device)
    start = time.perf_counter()
    report = mn.diagnose(model, x[:4])
    wait(device)
    yield {"case": "diagnosis", "seconds": round(time.perf_counter() - start, 2), "holds": bool(report.weights)}
    start = time.perf_counter()
    converted = mn.convert(model, x[:4])
    wait(device)
    yield {"case": "conversion", "seconds": round(time.perf_counter() - start, 2)}
    plain = copy.deepcopy(model)
    optimizers = [
        (plain, torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9, fused=True)),
        (converted, mn.optim.RiemannianSGD(mn.param_groups(converted, sphere_lr=1e-3), lr=1e-3, momentum=0.9)),
    ]

    def step_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = nn.functional.cross_entropy(net(x), labels)
            loss.backward()
            optimizer.step()

        return step

    found = median([step_of(*pair) for pair in optimizers], device, options.repetitions)
    for name, taken in zip(("torch SGD, fused", "RiemannianSGD"), found, strict=True):
        yield {"case": f"training step, {name}", "ms": round(taken, 3), "to fused": round(taken / found[0], 3)}


def graph(options: argparse.Namespace) -> Iterator[Row]:
    """Yield how far the steps of a CUDA graph, under rates that change, are from those without one."""
    for kind, more in ((mn.optim.RiemannianSGD, {"momentum": 0.9}), (mn.optim.RiemannianAdam, {"capturable": True})):
        ends = []
        for recorded in (False, True):
            torch.manual_seed(0)
            sphere = mn.SphereProduct((64, 100))
            weight = geoopt.ManifoldParameter(sphere.random(device="cuda"), manifold=sphere)
            weight.grad = torch.randn(64, 100, device="cuda")
            rate = torch.tensor(0.1, device="cuda")
            optimizer = kind([weight], lr=rate, **more)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(side)
            step: Callable[[], object] = optimizer.step
            if recorded:
                held = torch.cuda.CUDAGraph()
                with torch.cuda.graph(held):
                    optimizer.step()
                step = held.replay
            for number in range(4):
                rate.fill_(0.1 / (1 + number))
                weight.grad.mul_(-0.5)
                step()
            ends.append(weight.detach().clone())
        error = float((ends[0] - ends[1]).abs().max()) / torch.finfo(torch.float32).eps
        yield {"case": f"CUDA graph, {kind.__name__}", "error in eps": round(error, 2), "holds": error <= 64}


# ---- the whole -------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "correctness": correctness,
    "graph": graph,
    "steps": stepping,
    "training": training,
}


def carry_out(options: argparse.Namespace) -> list[Row]:
    """Run all parts, as long as there is time."""
    rows: list[Row] = []
    begun = time.perf_counter()
    for part, run in PARTS.items():
        if part == "graph" and options.device != "cuda":
            continue
        try:
            for row in run(options):
                rows.append({"part": part, **row})
                if time.perf_counter() - begun > options.seconds:
                    rows.append({"part": part, "case": "stopped", "error": f"after {options.seconds} s"})
                    return rows
        except Exception as error:  # noqa: BLE001 - the other parts still say something
            traceback.print_exc()
            rows.append(
                {"part": part, "case": "failed", "error": f"{type(error).__name__}: {error}"[:500], "holds": False}
            )
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table; of correctness what does not hold, and the largest error of each dtype."""
    worst: dict[str, Row] = {}
    for row in rows:
        if row["part"] == "correctness" and row.get("holds"):
            dtype = row["case"].rpartition(", ")[2]
            if dtype not in worst or row["error in eps"] > worst[dtype]["error in eps"]:
                worst[dtype] = row
    shown = [*worst.values(), *(r for r in rows if r["part"] != "correctness" or not r.get("holds"))]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    lines = [" | ".join(str(row.get(key, "")) for key in columns) for row in shown]
    return "\n".join(f"| {line} |" for line in (" | ".join(columns), "|".join("---" for _ in columns), *lines))


def main() -> None:
    """Carry out the check, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--seconds", type=float, default=330, help="no case begins after this time")
    parser.add_argument("--repetitions", type=int, default=20, help="timed steps of each optimizer")
    parser.add_argument("--out", type=Path, default=Path("device_check.json"), help="where to write the JSON file")
    options = parser.parse_args()
    if options.smoke:
        options.repetitions = 2
    begun = time.perf_counter()
    rows = carry_out(options)
    result = {"machine": machine(), "seconds": round(time.perf_counter() - begun, 1), "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{machine()} {result['seconds']} s.\n\n{table(rows)}")
    raise SystemExit(any(row.get("holds") is False for row in rows))


if __name__ == "__main__":
    main()
