"""The theorem itself: which optimizers train a network and its rescaled twin along the same path of functions.

Every filter in front of a batch normalization is multiplied by a factor of its own, 10^U(-2, 2): another point in
weight space, the same function. Both networks are trained on scikit-learn's digits with the same batches. After each
of some steps the outputs of the two on a fixed batch, with batch statistics, are compared: ‖f' − f‖/‖f‖.

In float64 with a negligible eps an optimizer that is invariant keeps them together to rounding. In float32 with the
eps of 1e-5 that users have, plain weights are not quite the same function from the start, since eps weighs more
against a small filter, and a rounding may send a ReLU, or a maximum, to the other side: from then on the two see other
gradients. The third panel has GELU and average pooling instead, which have no other side.

``python examples/invariance.py --write examples/results`` writes ``invariance.csv``, ``invariance.md`` and the figure.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits import Images, load_digits, network
from machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

import manifold_nets as mn
from manifold_nets.files import atomic_file

STEPS, BATCH = 200, 50
RECORDED = (0, 1, 2, 3, 5, 7, *range(10, STEPS + 1, 10))
# Precision, eps of the normalizations, and whether the network has kinks.
PRECISIONS = {
    "float64, eps 1e-30": (torch.float64, 1e-30, True),
    "float32, eps 1e-5": (torch.float32, 1e-5, True),
    "float32, no kinks": (torch.float32, 1e-5, False),
}


@dataclass(frozen=True)
class Method:
    """How a method prepares a plain network, which optimizer it steps, and how it is drawn."""

    prepare: Callable[[nn.Module, Tensor], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    invariant: bool
    style: dict[str, Any]


def plain(model: nn.Module, example: Tensor) -> nn.Module:
    """Leave the network as it is."""
    return model


def on_spheres(model: nn.Module, example: Tensor) -> nn.Module:
    """Put every scale-invariant filter on a sphere of radius 1."""
    return mn.convert(model, example, train_tolerance=float("inf"))


def weight_normalized(model: nn.Module, example: Tensor) -> nn.Module:
    """Give every convolution torch's weight normalization, w = g v/‖v‖, with v = w and g = ‖w‖ at the start."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight_norm(module)
    return model


def _torch_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _torch_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def _riemannian_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return mn.optim.RiemannianSGD(mn.param_groups(model, sphere_lr=0.05), lr=0.05, momentum=0.9)


def _riemannian_adam(model: nn.Module) -> torch.optim.Optimizer:
    # Adam moves every entry by about its rate; Riemannian Adam turns a whole filter by about its rate, in radians.
    return mn.optim.RiemannianAdam(mn.param_groups(model, sphere_lr=1e-2), lr=1e-3)


def _sgd_g(model: nn.Module) -> torch.optim.Optimizer:
    return mn.optim.SGDG(mn.param_groups(model), lr=0.05, momentum=0.9)


def _projected(model: nn.Module) -> torch.optim.Optimizer:
    return mn.optim.ProjectedSGD(mn.param_groups(model), lr=0.05, momentum=0.9)


def _scaled_metric(model: nn.Module) -> torch.optim.Optimizer:
    convolutions = {n: mn.Partition.filters(tuple(p.shape)) for n, p in model.named_parameters() if p.ndim == 4}
    groups = mn.optim.scaled_metric_groups(model, convolutions)
    return mn.optim.ScaledMetricSGD(groups, lr=0.05, momentum=0.9)


# Colours of Okabe and Ito; solid lines for what claims to be invariant, broken ones for what does not.
METHODS = {
    "RiemannianSGD": Method(on_spheres, _riemannian_sgd, True, {"color": "#0072B2", "marker": "o"}),
    "RiemannianAdam": Method(on_spheres, _riemannian_adam, True, {"color": "#009E73", "marker": "s"}),
    "scaled metric": Method(plain, _scaled_metric, True, {"color": "#000000", "marker": "d"}),
    "SGD-G": Method(on_spheres, _sgd_g, True, {"color": "#0072B2", "marker": "x", "alpha": 0.6}),
    "projection (PBWN)": Method(on_spheres, _projected, True, {"color": "#009E73", "marker": "+", "alpha": 0.6}),
    "SGD": Method(plain, _torch_sgd, False, {"color": "#D55E00", "marker": "o"}),
    "Adam": Method(plain, _torch_adam, False, {"color": "#E69F00", "marker": "s"}),
    "weight_norm, SGD": Method(weight_normalized, _torch_sgd, False, {"color": "#CC79A7", "marker": "v"}),
    "weight_norm, Adam": Method(weight_normalized, _torch_adam, False, {"color": "#56B4E9", "marker": "^"}),
}


def rescaled(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with every filter of the convolutions, and its running statistics, in another scale."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    layers = list(twin.children())
    with torch.no_grad():
        for convolution, normalization in itertools.pairwise(layers):
            if isinstance(convolution, nn.Conv2d) and isinstance(normalization, nn.BatchNorm2d):
                exponents = torch.rand(convolution.out_channels, generator=generator, dtype=torch.float64) * 4 - 2
                factors = (10**exponents).to(convolution.weight.dtype)
                convolution.weight.mul_(factors.view(-1, 1, 1, 1))
                normalization.running_mean.mul_(factors)
                normalization.running_var.mul_(factors**2)
    return twin


def start(seed: int, precision: str) -> nn.Module:
    """Return a freshly initialized network in the precision and with the eps of a panel."""
    dtype, eps, kinks = PRECISIONS[precision]
    torch.manual_seed(seed)
    model = network().to(dtype)
    if not kinks:
        smooth = {nn.ReLU: nn.GELU(), nn.MaxPool2d: nn.AvgPool2d(2)}
        model = nn.Sequential(*(smooth.get(type(layer), layer) for layer in model.children()))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return model


@torch.no_grad()
def outputs(model: nn.Module, probe: Tensor) -> Tensor:
    """Outputs with batch statistics, in float64; the running statistics are not touched."""
    twin = copy.deepcopy(model).train()
    return twin(probe).double()


def path_of(model: nn.Module, method: Method, images: Images, seed: int) -> Iterator[Tensor]:
    """Train, and yield the outputs on the first hundred images before the recorded steps and after the last."""
    model = method.prepare(model, images.x[:BATCH])
    optimizer = method.optimizer(model)
    order = torch.Generator().manual_seed(seed)
    rows = [rows for _ in range(1 + STEPS * BATCH // len(images.y)) for rows in _batches(images, order)]
    for step in range(STEPS + 1):
        if step in RECORDED:
            yield outputs(model, images.x[:100])
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(images.x[rows[step]]), images.y[rows[step]]).backward()
        optimizer.step()


def _batches(images: Images, order: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randperm(len(images.y), generator=order).split(BATCH)


def differences(method: Method, precision: str, seed: int, images: Images) -> list[float]:
    """Relative distance of the outputs of a network and of its rescaled twin at every recorded step."""
    images = Images(images.x.to(PRECISIONS[precision][0]), images.y)
    model = start(seed, precision)
    paths = [path_of(net, method, images, seed) for net in (model, rescaled(model, seed))]
    return [float((theirs - ours).norm() / ours.norm()) for ours, theirs in zip(*paths, strict=True)]


Results = dict[tuple[str, str, int], list[float]]


def measure(seeds: int, file: Path | None) -> Results:
    """Run every method in every precision and over the seeds; pairs that the file has already are not run again."""
    images = load_digits()["train"]
    results = read_csv(file) if file is not None and file.exists() else {}
    runs = [(name, precision, seed) for precision in PRECISIONS for name in METHODS for seed in range(seeds)]
    for run in track(runs, description="pairs of runs", console=Console(stderr=True)):
        if run not in results:
            results[run] = differences(METHODS[run[0]], run[1], run[2], images)
            if file is not None:
                with atomic_file(file) as temporary:
                    temporary.write_text(as_csv(results))
    return results


def as_csv(results: Results) -> str:
    """One row a method, precision, seed and step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "precision", "seed", "step", "difference"])
    for (name, precision, seed), values in results.items():
        for step, value in zip(RECORDED, values, strict=True):
            writer.writerow((name, precision, seed, step, f"{value:.3e}"))
    return text.getvalue()


def read_csv(path: Path) -> Results:
    """Read what `as_csv` wrote."""
    results: Results = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = (row["method"], row["precision"], int(row["seed"]))
            results.setdefault(key, []).append(float(row["difference"]))
    return results


def largest(results: Results, name: str, precision: str) -> list[float]:
    """Largest difference over the steps, for every seed."""
    return [max(values) for (method, kind, _), values in results.items() if (method, kind) == (name, precision)]


def rows_of(results: Results) -> list[list[str]]:
    """The table: largest difference over the steps, smallest and largest over the seeds, in each precision."""
    rows = []
    for name, method in METHODS.items():
        cells = []
        for precision in PRECISIONS:
            values = largest(results, name, precision)
            cells.append(f"{min(values):.0e} … {max(values):.0e}")
        rows.append([name, "yes" if method.invariant else "no", *cells])
    return rows


HEADINGS = ["optimizer", "invariant in theory", *PRECISIONS]


def as_markdown(results: Results, told: str) -> str:
    """The table in Markdown, with what it shows."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows_of(results))]
    seeds = 1 + max(seed for _, _, seed in results)
    return (
        f"Largest relative difference of the outputs of a network and of its rescaled twin in {STEPS} steps, smallest\n"
        f"and largest over {seeds} seeds. {told}\n\n" + "\n".join(lines) + "\n"
    )


def draw(results: Results, path: Path) -> None:
    """One panel a precision: median over the seeds, and the range."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PRECISIONS), figsize=(13, 4.4), layout="constrained", sharey=True)
    for axes, precision in zip(panels, PRECISIONS, strict=True):
        for name, method in METHODS.items():
            values = [v for (other, kind, _), v in results.items() if (other, kind) == (name, precision)]
            curves = torch.tensor(values, dtype=torch.float64).clamp_min(1e-17)
            style = {"linestyle": "-" if method.invariant else "--", "markersize": 3.5, **method.style}
            axes.fill_between(RECORDED, curves.amin(0), curves.amax(0), color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(RECORDED, curves.median(0).values, label=name, **style)
        axes.set(xlabel="step", yscale="log", ylim=(1e-17, 10))
        axes.set_title(precision, fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("‖f' − f‖/‖f‖ of the rescaled twin")
    panels[0].legend(frameon=False, loc="center right", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Read the options, train, and print what came out."""
    parser = argparse.ArgumentParser(description="Train a network and its rescaled twin with each optimizer.")
    parser.add_argument("--seeds", type=int, choices=range(1, 100), metavar="N", default=5, help="pairs (default: 5)")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write CSV, table and figure into this folder")
    parser.add_argument("--report-only", action="store_true", help="rebuild table and figure from the stored CSV")
    options = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)  # tensors this small are quicker on one, and the numbers do not depend on how many
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
    file = None if options.write is None else options.write / "invariance.csv"
    if options.report_only and (file is None or not file.exists()):
        parser.error("--report-only needs --write FOLDER, a folder with invariance.csv")
    results = read_csv(file) if options.report_only and file is not None else measure(options.seeds, file)
    table = Table(*HEADINGS, title=f"largest difference in {STEPS} steps, range over the seeds")
    for row in rows_of(results):
        table.add_row(*row)
    Console().print(table)
    if options.write is not None:
        if not options.report_only:
            with atomic_file(options.write / "invariance.md") as temporary:
                temporary.write_text(as_markdown(results, machine()))
        draw(results, options.write / "invariance.png")
    print(f"Took {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
