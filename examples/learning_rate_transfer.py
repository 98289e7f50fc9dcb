"""A network converted in mid-training goes on as before when its learning rates are the matched ones.

A batch-normalized network is trained on scikit-learn's digits with `torch.optim.SGD`, momentum and weight decay, at a
constant learning rate. After a few epochs it goes on in five ways:

- with SGD as before;
- converted, with the rates of `manifold_nets.matched_learning_rates` and SGD's momentum carried over;
- the same, with empty momentum;
- converted, with SGD's learning rate as it is and the momentum carried over;
- with SGD, but another order of the images: how far apart chance alone takes two runs.

The others see the same images in the same order. Losses are compared epoch by epoch and seed by seed. The matched rates
fit the norms at the conversion: where those of plain SGD go on growing, its rate η/n² goes on falling, and a distance
remains that only a schedule could remove.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from digits import Images, load_digits, network, train_epoch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import manifold_nets as mn

LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 5e-4
FIRST_EPOCHS = 2
BEFORE, CHANCE = "SGD, as before", "SGD, other order"
MATCHED, EMPTY, UNMATCHED = "spheres, matched", "spheres, matched, empty momentum", "spheres, SGD's rate"
# Colours of Okabe and Ito that stay apart for every kind of colour vision, and in print by their line styles.
STYLES: dict[str, dict[str, Any]] = {
    BEFORE: {"color": "#000000", "linestyle": "-", "linewidth": 3, "alpha": 0.5},
    CHANCE: {"color": "#000000", "linestyle": ":"},
    MATCHED: {"color": "#0072B2", "linestyle": "--"},
    EMPTY: {"color": "#009E73", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
    UNMATCHED: {"color": "#D55E00", "linestyle": "-."},
}


def runs_from(
    plain: nn.Module, sgd: torch.optim.SGD, images: Images
) -> Iterator[tuple[str, nn.Module, torch.optim.SGD]]:
    """Give every way to go on from a checkpoint: its name, model and optimizer."""
    report = mn.diagnose(plain, images.x[:50])
    rates = mn.matched_learning_rates(plain, report, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    for name in STYLES:
        if name in (BEFORE, CHANCE):
            model = copy.deepcopy(plain)
            optimizer = torch.optim.SGD(mn.param_groups(model, weight_decay=WEIGHT_DECAY), lr=LR, momentum=MOMENTUM)
            # The states share their tensors otherwise.
            optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))
        else:
            model = mn.convert(plain, report)
            unmatched = name == UNMATCHED
            own = LR if unmatched else rates.by_weight()
            groups = mn.param_groups(model, weight_decay=WEIGHT_DECAY, sphere_lr=own)
            optimizer = mn.optim.RiemannianSGD(groups, lr=LR, momentum=MOMENTUM)
            if name != EMPTY:
                mn.optim.carry_momentum(plain, sgd, model, optimizer)
        yield name, model, optimizer


def losses_of(seed: int, images: Images, epochs: int) -> tuple[list[float], dict[str, list[float]]]:
    """Train up to the checkpoint, and go on in every way; return the mean training loss of every epoch."""
    torch.manual_seed(seed)
    plain = network()
    sgd = torch.optim.SGD(mn.param_groups(plain, weight_decay=WEIGHT_DECAY), lr=LR, momentum=MOMENTUM)
    order = torch.Generator().manual_seed(seed)
    first = [train_epoch(plain, sgd, images, order) for _ in range(FIRST_EPOCHS)]
    after = {}
    for name, model, optimizer in runs_from(plain, sgd, images):
        order = torch.Generator().manual_seed(1000 + seed + 1000 * (name == CHANCE))
        after[name] = [train_epoch(model, optimizer, images, order) for _ in range(epochs)]
    return first, after


def log_ratios(after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logarithms of each way's losses over those of SGD as before, shape (seeds, epochs)."""
    return {name: (losses / after[BEFORE]).log() for name, losses in after.items() if name != BEFORE}


def summary(after: dict[str, Tensor]) -> Table:
    """Tabulate how far each way is from the loss curve of SGD: mean and standard deviation over seeds, in percent."""
    table = Table("goes on with", title="training loss against SGD as before")
    epochs = after[BEFORE].shape[1]
    shown = sorted({0, (epochs - 1) // 2, epochs - 1})
    for heading in (*(f"epoch {epoch + 1}" for epoch in shown), "largest distance"):
        table.add_column(heading, no_wrap=True)
    for name, ratios in log_ratios(after).items():
        percent = 100 * ratios.expm1()
        cells = [_mean_and_deviation(percent[:, epoch], "+") for epoch in shown]
        table.add_row(name, *cells, _mean_and_deviation(percent.abs().amax(1), ""))
    return table


def _mean_and_deviation(values: Tensor, sign: str) -> str:
    deviation = float(values.std()) if len(values) > 1 else 0.0
    return f"{float(values.mean()):{sign}.1f} ± {deviation:.1f} %"


def verdict(after: dict[str, Tensor]) -> str:
    """Say whether the matched rates continue the loss curve, and whether SGD's rate does."""
    distances = {name: ratios.abs().amax(1).expm1() for name, ratios in log_ratios(after).items()}
    closer = int((distances[MATCHED] < distances[UNMATCHED]).sum())
    factor = float(distances[UNMATCHED].mean() / distances[MATCHED].mean())
    to_chance = float(distances[MATCHED].mean() / distances[CHANCE].mean())
    return (
        f"In {closer} of {len(distances[MATCHED])} seeds the matched rates stay closer to SGD's loss curve than "
        f"SGD's rate does, {factor:.1f} times closer on average.\nTheir distance is {to_chance:.1f} times that of two "
        "runs of SGD with different orders of the images."
    )


def plot(first: Tensor, after: dict[str, Tensor], path: Path) -> None:
    """Draw the loss curves, and their ratios to SGD as before: means and ranges over the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (curves, ratios) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    start = first.shape[1]
    for name, style in STYLES.items():
        losses = torch.cat([first[:, -1:], after[name]], 1)
        epochs = range(start, start + losses.shape[1])
        curves.plot(epochs, losses.mean(0), label=name, **style)
        if name != BEFORE:
            values = losses / torch.cat([first[:, -1:], after[BEFORE]], 1)
            ratios.fill_between(epochs, values.amin(0), values.amax(0), color=style["color"], alpha=0.15, linewidth=0)
            ratios.plot(epochs, values.mean(0), **style)
    curves.plot(range(1, start + 1), first.mean(0), **STYLES[BEFORE])
    curves.set(xlabel="epoch", ylabel="training loss", yscale="log")
    curves.set_title(f"Mean of {len(first)} seed{'s' * (len(first) > 1)}", fontsize=11)
    ratios.axhline(1, color="#000000", linewidth=0.8)
    ratios.set(xlabel="epoch", ylabel="training loss / that of SGD as before")
    ratios.set_title("Mean and range, seed by seed", fontsize=11)
    for axes in (curves, ratios):
        axes.axvline(start, color="#777777", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Read the options, train, and print what came out."""
    parser = argparse.ArgumentParser(description="Convert in mid-training, with matched learning rates and without.")
    parser.add_argument("--plot", type=Path, default=Path("learning_rate_transfer.png"), help="where to draw")
    parser.add_argument("--seeds", type=int, choices=range(1, 1000), metavar="N", default=10, help="runs (default: 10)")
    parser.add_argument("--epochs", type=int, choices=range(1, 1000), metavar="N", default=6, help="after conversion")
    options = parser.parse_args()
    began = time.perf_counter()
    # Tensors this small are quicker on one thread, and the numbers do not depend on how many there are.
    torch.set_num_threads(1)
    images = load_digits()["train"]
    results = [losses_of(seed, images, options.epochs) for seed in range(options.seeds)]
    first = torch.tensor([before for before, _ in results], dtype=torch.float64)
    after = {name: torch.tensor([losses[name] for _, losses in results], dtype=torch.float64) for name in STYLES}
    plot(first, after, options.plot)
    Console().print(summary(after))
    print(
        f"Mean and standard deviation over {options.seeds} seeds; SGD with lr {LR}, momentum {MOMENTUM}, weight decay"
    )
    print(f"{WEIGHT_DECAY}, {FIRST_EPOCHS} epochs before the conversion. Largest distance: over the epochs.")
    print(verdict(after))
    print(f"Plot: {options.plot}. Took {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
