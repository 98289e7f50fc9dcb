"""From a trained network to spheres and back: `make demo`, or `python examples/demo.py`.

A small batch-normalized network is trained on scikit-learn's digits with `torch.optim.SGD`. From that checkpoint it is
diagnosed and converted on the command line, goes on training on the product of spheres beside plain SGD, and is given
back as an ordinary network. Both optimizers see the same images in the same order, and each gets its own learning rate:
the one of five with the lowest validation loss on seeds that are not reported.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from digits import Images, evaluate, load_digits, network, train_epoch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import manifold_nets as mn
from manifold_nets.cli import main as manifold_nets_command

RATES = (1.0, 0.3, 0.1, 0.03, 0.01)
FIRST_EPOCHS = 4
SGD, SPHERES = "torch.optim.SGD", "RiemannianSGD"
OPTIMIZERS = {SGD: torch.optim.SGD, SPHERES: mn.optim.RiemannianSGD}
# Two colours of Okabe and Ito that stay apart for every kind of colour vision, and in print by their line styles.
STYLES = {SGD: {"color": "#0072B2", "linestyle": "--"}, SPHERES: {"color": "#D55E00", "linestyle": "-"}}


@dataclass(frozen=True)
class Run:
    """One run after the checkpoint: errors on the test images and filter norms, before and after every epoch."""

    model: nn.Module
    validation_loss: float
    test_errors: tuple[float, ...]
    norms: Tensor


def train_first(data: dict[str, Images], seed: int) -> nn.Module:
    """Train a new network with SGD, the checkpoint from which both optimizers go on."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(mn.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    for _ in range(FIRST_EPOCHS):
        train_epoch(model, optimizer, data["train"], order)
    return model


def go_on(start: nn.Module, optimizer_name: str, rate: float, data: dict[str, Images], seed: int, epochs: int) -> Run:
    """Go on from a copy of a checkpoint; the order of the images depends on the seed alone."""
    model = copy.deepcopy(start)
    # Each optimizer's rate is chosen for it: on spheres it is not the one of SGD.
    groups = mn.param_groups(model, weight_decay=5e-4, sphere_lr=rate)
    optimizer = OPTIMIZERS[optimizer_name](groups, lr=rate, momentum=0.9)
    schedule = CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(1000 + seed)
    errors, norms = [evaluate(model, data["test"])[1]], [filter_norms(model)]
    for _ in range(epochs):
        train_epoch(model, optimizer, data["train"], order)
        schedule.step()
        errors.append(evaluate(model, data["test"])[1])
        norms.append(filter_norms(model))
    return Run(model, evaluate(model, data["validation"])[0], tuple(errors), torch.stack(norms))


def filter_norms(model: nn.Module) -> Tensor:
    """Norms of the filters of all convolutions, float64."""
    weights = [module.weight.detach().double() for module in model.modules() if isinstance(module, nn.Conv2d)]
    return torch.cat([weight.flatten(1).norm(dim=1) for weight in weights])


def largest_deviation(model: nn.Module) -> float:
    """Largest relative distance of a filter from its sphere."""
    constrained = mn.constraints.constrained_weights(model)
    return max(float(weight.manifold.deviations(weight.parameter).max()) for weight in constrained)


def starts_of(model: nn.Module, data: dict[str, Images]) -> dict[str, nn.Module]:
    """Return the checkpoint that each optimizer goes on from: the same function, plain and on spheres."""
    return {SGD: model, SPHERES: mn.convert(model, data["train"].x[:50])}


def choose_rates(data: dict[str, Images], seeds: Sequence[int], epochs: int) -> dict[str, float]:
    """Return for each optimizer the learning rate with the lowest mean validation loss on these seeds."""
    starts = {seed: starts_of(train_first(data, seed), data) for seed in seeds}
    chosen = {}
    for name in OPTIMIZERS:
        losses = {}
        for rate in RATES:
            runs = [go_on(starts[seed][name], name, rate, data, seed, epochs) for seed in seeds]
            losses[rate] = statistics.fmean(run.validation_loss for run in runs)
        chosen[name] = min(losses, key=losses.__getitem__)
        print(f"{name}: validation loss " + ", ".join(f"{loss:.4f} at {rate:g}" for rate, loss in losses.items()))
    return chosen


def command(*arguments: str) -> None:
    """Run `manifold-nets` with these arguments, showing them."""
    print(f"\n$ manifold-nets {shlex.join(arguments)}", flush=True)
    if manifold_nets_command(list(arguments), standalone_mode=False):
        raise SystemExit(f"manifold-nets {arguments[0]} failed")


def summary(runs: dict[str, list[Run]], exported: nn.Module, difference: float, data: dict[str, Images]) -> Table:
    """Build the closing table: test error, largest deviation of a norm, largest difference after export."""
    table = Table("network")
    for heading in ("test error (%)", "largest norm\ndeviation", "largest difference\nafter export"):
        table.add_column(heading, no_wrap=True)
    table.add_row("checkpoint", spread([run.test_errors[0] for run in runs[SGD]]), "", "")
    drift = max(float((run.norms[-1] / run.norms[0] - 1).abs().max()) for run in runs[SGD])
    table.add_row(SGD, spread([run.test_errors[-1] for run in runs[SGD]]), f"{drift:.1e}", "")
    deviation = max(largest_deviation(run.model) for run in runs[SPHERES])
    table.add_row(SPHERES, spread([run.test_errors[-1] for run in runs[SPHERES]]), f"{deviation:.1e}", "")
    table.add_row("exported, seed 0", f"{100 * evaluate(exported, data['test'])[1]:.2f}", "", f"{difference:.1e}")
    return table


LEGEND = f"""Test error: mean and standard deviation over the seeds.
Norm deviation, relative: with {SPHERES} from the radius of the sphere; with {SGD}, where
  norms are free, from the norm at the checkpoint.
Difference after export: largest difference of an output on the test images."""


def spread(errors: Sequence[float]) -> str:
    """Format mean and standard deviation over seeds, in percent."""
    deviation = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return f"{statistics.fmean(errors) * 100:.2f} ± {deviation * 100:.2f}"


def verdict(runs: dict[str, list[Run]]) -> str:
    """Say what the runs show about the two optimizers, and what they do not."""
    pairs = [b.test_errors[-1] - a.test_errors[-1] for a, b in zip(runs[SGD], runs[SPHERES], strict=True)]
    mean = statistics.fmean(pairs) * 100
    if len(pairs) < 2:
        return "One seed says nothing about which optimizer is better."
    half = 2 * statistics.stdev(pairs) * 100 / len(pairs) ** 0.5
    text = (
        f"{SPHERES} minus {SGD}, seed by seed: {mean:+.2f} ± {half:.2f} points of test error (twice the standard error)"
    )
    if abs(mean) <= half:
        return f"{text}.\nOn this small task the two cannot be told apart."
    better = SPHERES if mean < 0 else SGD
    return f"{text}.\nOn this small task {better} did better; that says little about others."


def plot(runs: dict[str, list[Run]], rates: dict[str, float], path: Path) -> None:
    """Draw the test errors of all seeds and the filter norms of the first, epoch by epoch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (errors, norms) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, style in STYLES.items():
        # Half of one image of 500: what stands for no error on a logarithmic axis.
        values = 100 * torch.tensor([run.test_errors for run in runs[name]]).clamp(min=0.001)
        epochs = range(values.shape[1])
        errors.fill_between(epochs, values.amin(0), values.amax(0), color=style["color"], alpha=0.15, linewidth=0)
        errors.plot(epochs, values.mean(0), label=f"{name}, learning rate {rates[name]:g}", linewidth=2, **style)
        lines = norms.plot(epochs, runs[name][0].norms, linewidth=0.8, alpha=0.6, **style)
        lines[0].set_label(name)
    errors.set(xlabel="epochs after the checkpoint", ylabel="test error, %", yscale="log", ylim=(0.05, 100))
    errors.yaxis.set_major_formatter("{x:g}")
    errors.set_title(f"Mean and range of {len(runs[SGD])} seed{'s' * (len(runs[SGD]) > 1)}", fontsize=11)
    norms.set(xlabel="epochs after the checkpoint", ylabel="Euclidean norm", ylim=(0, None))
    norms.set_title("Every convolution filter, seed 0", fontsize=11)
    for axes in (errors, norms):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    errors.legend(frameon=False, loc="lower left")
    legend = norms.legend(frameon=False)
    for line in legend.get_lines():
        line.set(linewidth=2, alpha=1)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def give_back(model: nn.Module, spec: str, folder: Path, data: dict[str, Images]) -> tuple[nn.Module, float]:
    """Export a model on the command line, and load the file with torch alone; return that and how far it is off."""
    on_spheres, exported = str(folder / "trained-on-spheres.safetensors"), str(folder / "exported.safetensors")
    mn.save(model, on_spheres)
    command("export", spec, "--weights", on_spheres, "--input-shape", "1,8,8", "--output", exported)
    plain = network()
    plain.load_state_dict(safetensors.torch.load_file(exported))
    with torch.no_grad():
        difference = (model.eval()(data["test"].x) - plain.eval()(data["test"].x)).abs().max()
    return plain, float(difference)


def demonstrate(folder: Path, n_seeds: int, epochs: int) -> None:
    """Run every step of the demonstration and print what came out."""
    data, spec = load_digits(), f"{os.path.relpath(Path(__file__).with_name('digits.py'))}:network"
    print(f"Training {n_seeds} networks for {FIRST_EPOCHS} epochs with {SGD} …", flush=True)
    checkpoints = [train_first(data, seed) for seed in range(n_seeds)]
    trained, converted = str(folder / "trained.safetensors"), str(folder / "converted.safetensors")
    safetensors.torch.save_file(checkpoints[0].state_dict(), trained)
    command("diagnose", spec, "--weights", trained, "--input-shape", "1,8,8")
    command("convert", spec, "--weights", trained, "--input-shape", "1,8,8", "--output", converted)

    others = [10_000 + n for n in range(min(3, n_seeds))]
    print(f"\nChoosing learning rates, {epochs} epochs each, on {len(others)} other seeds …", flush=True)
    rates = choose_rates(data, others, epochs)
    print(f"\nGoing on for {epochs} epochs from the same checkpoints with both optimizers …", flush=True)
    runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
    for seed, checkpoint in enumerate(checkpoints):
        starts = starts_of(checkpoint, data)
        if seed == 0:
            starts[SPHERES] = mn.load(network(), converted)
        for name in OPTIMIZERS:
            runs[name].append(go_on(starts[name], name, rates[name], data, seed, epochs))

    exported, difference = give_back(runs[SPHERES][0].model, spec, folder, data)
    plot(runs, rates, folder / "demo.png")
    print()
    Console().print(summary(runs, exported, difference, data))
    print(LEGEND)
    print(verdict(runs))
    print(f"Files: {', '.join(sorted(str(file) for file in folder.glob('*.safetensors')))}")
    print(f"Plot:  {folder / 'demo.png'}")


def positive(text: str) -> int:
    """Read a positive integer."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> None:
    """Read the options and run the demonstration."""
    parser = argparse.ArgumentParser(description="Train, diagnose, convert, train on spheres, give back.")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where to write (default: demo)")
    parser.add_argument("--seeds", type=positive, default=10, help="runs to report (default: 10)")
    parser.add_argument("--epochs", type=positive, default=12, help="epochs after the checkpoint (default: 12)")
    options = parser.parse_args()
    began = time.perf_counter()
    options.folder.mkdir(parents=True, exist_ok=True)
    # Tensors this small are quicker on one thread, and the numbers do not depend on how many there are.
    torch.set_num_threads(1)
    demonstrate(options.folder, options.seeds, options.epochs)
    print(f"Took {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
