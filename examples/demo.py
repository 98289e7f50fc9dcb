"""From a training run to spheres and back: `make demo`, or `python examples/demo.py`.

A small batch-normalized network is trained on scikit-learn's digits with `torch.optim.SGD`, momentum, weight decay and
half a cosine. In the middle of the run it is diagnosed and converted on the command line, goes on where it was on the
product of spheres (`manifold_nets.optim.from_torch`), and is given back as an ordinary network. Beside it the plain run
goes on, with the same images in the same order and with another order of them: how far apart chance takes two runs.
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

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
FIRST_EPOCHS = 4
SGD, CHANCE, SPHERES = "torch.optim.SGD", "SGD, another order", "RiemannianSGD"
# Colours of Okabe and Ito that stay apart for every kind of colour vision, and in print by their line styles.
STYLES = {
    SGD: {"color": "#0072B2", "linestyle": "--"},
    CHANCE: {"color": "#777777", "linestyle": ":"},
    SPHERES: {"color": "#D55E00", "linestyle": "-"},
}


@dataclass
class Checkpoint:
    """A training run: its model, optimizer and schedule."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: CosineAnnealingLR


@dataclass(frozen=True)
class Run:
    """One run after the checkpoint: errors on the test images and filter norms, before and after every epoch."""

    model: nn.Module
    test_errors: tuple[float, ...]
    norms: Tensor


def train_first(data: dict[str, Images], seed: int, epochs: int) -> Checkpoint:
    """Train a new network with SGD up to the checkpoint, from which there are some epochs to go."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(mn.param_groups(model, weight_decay=WEIGHT_DECAY), lr=LR, momentum=MOMENTUM)
    run = Checkpoint(model, optimizer, CosineAnnealingLR(optimizer, FIRST_EPOCHS + epochs))
    order = torch.Generator().manual_seed(seed)
    for _ in range(FIRST_EPOCHS):
        train_epoch(model, optimizer, data["train"], order)
        run.schedule.step()
    return run


def converted(run: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return the run as it goes on with a converted model."""
    optimizer = mn.optim.from_torch(run.optimizer, run.model, model, scheduler=run.schedule)
    return Checkpoint(model, optimizer, run.schedule)


def go_on(run: Checkpoint, data: dict[str, Images], order: torch.Generator, epochs: int) -> Run:
    """Go on from a checkpoint."""
    errors, norms = [evaluate(run.model, data["test"])[1]], [filter_norms(run.model)]
    for _ in range(epochs):
        train_epoch(run.model, run.optimizer, data["train"], order)
        run.schedule.step()
        errors.append(evaluate(run.model, data["test"])[1])
        norms.append(filter_norms(run.model))
    return Run(run.model, tuple(errors), torch.stack(norms))


def filter_norms(model: nn.Module) -> Tensor:
    """Norms of the filters of all convolutions, float64."""
    weights = [module.weight.detach().double() for module in model.modules() if isinstance(module, nn.Conv2d)]
    return torch.cat([weight.flatten(1).norm(dim=1) for weight in weights])


def largest_deviation(model: nn.Module) -> float:
    """Largest relative distance of a filter from its sphere."""
    constrained = mn.constraints.constrained_weights(model)
    return max(float(weight.manifold.deviations(weight.parameter).max()) for weight in constrained)


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
    table.add_row(CHANCE, spread([run.test_errors[-1] for run in runs[CHANCE]]), "", "")
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
    """Say how far the converted runs are from the plain ones, beside what chance does."""

    def distance(name: str) -> tuple[float, float]:
        pairs = [
            [abs(b - a) for a, b in zip(one.test_errors, other.test_errors, strict=True)]
            for one, other in zip(runs[SGD], runs[name], strict=True)
        ]
        return 100 * statistics.fmean(pair[1] for pair in pairs), 100 * statistics.fmean(max(pair) for pair in pairs)

    texts = []
    for name in (SPHERES, CHANCE):
        first, largest = distance(name)
        texts.append(f"{name}: {first:.2f} points after the first epoch, at most {largest:.2f}")
    return "\n".join(
        [
            f"Distance of the test error from {SGD}'s, mean over seeds:",
            *texts,
        ]
    )


def plot(runs: dict[str, list[Run]], path: Path) -> None:
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
        errors.plot(epochs, values.mean(0), label=name, linewidth=2, **style)
        if name == CHANCE:
            continue
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
    checkpoints = [train_first(data, seed, epochs) for seed in range(n_seeds)]
    trained, on_spheres = str(folder / "trained.safetensors"), str(folder / "converted.safetensors")
    safetensors.torch.save_file(checkpoints[0].model.state_dict(), trained)
    command("diagnose", spec, "--weights", trained, "--input-shape", "1,8,8")
    command("convert", spec, "--weights", trained, "--input-shape", "1,8,8", "--output", on_spheres)

    print(f"\nGoing on for {epochs} epochs, on spheres and as before …", flush=True)
    runs: dict[str, list[Run]] = {name: [] for name in STYLES}
    for seed, checkpoint in enumerate(checkpoints):
        for name in STYLES:
            run = copy.deepcopy(checkpoint)
            if name == SPHERES:
                model = mn.load(network(), on_spheres) if seed == 0 else mn.convert(run.model, data["train"].x[:50])
                run = converted(run, model)
            order = torch.Generator().manual_seed(1000 + seed + 1000 * (name == CHANCE))
            runs[name].append(go_on(run, data, order, epochs))

    exported, difference = give_back(runs[SPHERES][0].model, spec, folder, data)
    plot(runs, folder / "demo.png")
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
