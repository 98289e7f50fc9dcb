"""Sparse autoencoders with unit-norm dictionaries: the usual recipe beside `mn.constrain` and optimizers on spheres.

    python examples/sparse_autoencoder.py                          # scikit-learn's digits, in a minute
    python examples/sparse_autoencoder.py --data FOLDER_OF_MNIST --steps 2000 --seeds 5

The recipe (Bricken et al., *Towards monosemanticity*, 2023): Adam, and for the rows of the dictionary the gradient
without its radial part before each step and a division by the norms after it. Here `mn.constrain` says once that the
rows have norm 1, and the optimizer keeps them there. All get the same steps on the same data, and each is tuned on the
same grid of learning rates by the loss on validation data. Rates are Adam's: that of a sphere of d entries is Adam's
times √d for one second moment per sphere, and Adam's own for one of each entry (`mn.matched_learning_rates`).

*Loss* is the squared error plus the penalty on new data, mean ± standard deviation over seeds. *Dead* features are zero
on all of it. *Off* is the largest deviation of a norm from 1. *Step* is one training step and *optimizer* what of it is
no gradient: the fastest of steps that all methods take in turn, which other work on the machine disturbs least, and
*to recipe* is its ratio to the recipe's. These are taken for the data at hand and for larger models on random rows, as
what a step costs beside its arithmetic weighs less there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import machine
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison.tasks.images import find_idx_files, read_idx

PENALTY, BATCH = 1.0, 256
# Sizes of rows and dictionaries of the larger models that are timed.
LARGER = ((256, 2048), (512, 4096))


class SparseAutoencoder(nn.Module):
    """Features ``relu(E (x − c) + b)`` and their sum of dictionary rows, of norm 1 at the start."""

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(size, features)
        rows = torch.randn(features, size)
        self.dictionary = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.center = nn.Parameter(torch.zeros(size))
        with torch.no_grad():  # the usual start: the encoder is the transpose
            self.encoder.weight.copy_(self.dictionary)
            self.encoder.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and reconstruction."""
        found = self.encoder(x - self.center).relu()
        return found, found @ self.dictionary + self.center

    def loss(self, x: Tensor) -> Tensor:
        """Squared error of a row plus the penalty on its features."""
        found, again = self(x)
        return (again - x).square().sum(1).mean() + PENALTY * found.sum(1).mean()


# ---- methods ---------------------------------------------------------------------------------------------------------

Step = Callable[[], None]


def recipe(model: SparseAutoencoder, rate: float, *, fused: bool = False) -> Step:
    """Adam, the projected gradient, and the division by the norms."""
    optimizer, rows = torch.optim.Adam(model.parameters(), lr=rate, fused=fused), model.dictionary

    def step() -> None:
        with torch.no_grad():
            rows.grad.sub_((rows.grad * rows).sum(1, keepdim=True) * rows)
            optimizer.step()
            rows.div_(rows.norm(dim=1, keepdim=True))

    return step


def on_spheres(model: SparseAutoencoder, rate: float, *, per: str, fused: bool = False) -> Step:
    """RiemannianAdam at the matched rate."""
    mn.constrain(model, "dictionary", per="row")
    rates = mn.matched_learning_rates(model, optimizer="adam", lr=rate, per=per).by_weight()
    groups = mn.param_groups(model, sphere_lr=rates)
    return mn.optim.RiemannianAdam(groups, lr=rate, per=per, fused=fused or None).step


def wrapped(model: SparseAutoencoder, rate: float, *, fused: bool = False) -> Step:
    """Adam of torch, whose steps are made tangent."""
    mn.constrain(model, "dictionary", per="row")
    return mn.optim.on_spheres(torch.optim.Adam(model.parameters(), lr=rate, fused=fused), model).step


METHODS: dict[str, Callable[[SparseAutoencoder, float], Step]] = {
    "recipe: Adam, project, divide": recipe,
    "RiemannianAdam": lambda model, rate: on_spheres(model, rate, per="sphere"),
    'RiemannianAdam, per="entry"': lambda model, rate: on_spheres(model, rate, per="entry"),
    "on_spheres(Adam)": wrapped,
}
# The same steps by fused kernels of torch for the plain parameters: timed only.
FUSED: dict[str, Callable[[SparseAutoencoder, float], Step]] = {
    "recipe, fused": lambda model, rate: recipe(model, rate, fused=True),
    "RiemannianAdam, fused": lambda model, rate: on_spheres(model, rate, per="sphere", fused=True),
    'RiemannianAdam, per="entry", fused': lambda model, rate: on_spheres(model, rate, per="entry", fused=True),
    "on_spheres(Adam, fused)": lambda model, rate: wrapped(model, rate, fused=True),
}


# ---- data ------------------------------------------------------------------------------------------------------------


def digits() -> dict[str, Tensor]:
    """scikit-learn's 8×8 digits: 1,300 to train on, 247 to choose rates by, 250 to test on."""
    from sklearn import datasets

    x = torch.tensor(datasets.load_digits().data, dtype=torch.float32) / 16
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return _parts(x, 1300, 247)


def patches(folder: Path) -> dict[str, Tensor]:
    """8×8 patches of MNIST's training images that are not empty: 50,000 and twice 5,000."""
    images = torch.from_numpy(read_idx(find_idx_files(folder)["train"][0])).float() / 255
    draw = torch.Generator().manual_seed(0)
    pieces = []
    for image in images[torch.randperm(len(images), generator=draw)[:20_000]]:
        for row, column in torch.randint(21, (4, 2), generator=draw).tolist():
            pieces.append(image[row : row + 8, column : column + 8].reshape(-1))
    x = torch.stack(pieces)
    return _parts(x[x.square().sum(1) > 1][:60_000], 50_000, 5_000)


def _parts(x: Tensor, train: int, validation: int) -> dict[str, Tensor]:
    x = (x - x[:train].mean(0)) / x[:train].std()
    x = x * (x.shape[1] ** 0.5 / x[:train].norm(dim=1).mean())
    return {"train": x[:train], "validation": x[train : train + validation], "test": x[train + validation :]}


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    loss: float
    dead: int
    off: float


def train(
    method: str, rate: float, seed: int, data: dict[str, Tensor], options: argparse.Namespace
) -> SparseAutoencoder:
    """One run."""
    torch.manual_seed(seed)
    model = SparseAutoencoder(data["train"].shape[1], options.features)
    step = METHODS[method](model, rate)
    for _ in range(options.steps):
        model.zero_grad()
        model.loss(data["train"][torch.randint(len(data["train"]), (BATCH,))]).backward()
        step()
    return model


@torch.no_grad()
def outcome(model: SparseAutoencoder, x: Tensor) -> Outcome:
    """Loss, dead features and deviation of the norms."""
    off = float((model.dictionary.detach().double().norm(dim=1) - 1).abs().max())
    return Outcome(float(model.loss(x)), int((model(x)[0] == 0).all(0).sum()), off)


def timed(size: int, features: int, turns: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of the fastest training step, and of what of one is no gradient, of all methods in turn."""
    models, steps = {}, {}
    for name, make in {**METHODS, **FUSED}.items():
        torch.manual_seed(0)
        models[name] = SparseAutoencoder(size, features)
        steps[name] = make(models[name], 1e-3)
    whole: dict[str, list[float]] = {name: [] for name in models}
    own: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns):
        x = torch.randn(BATCH, size)
        for name, model in models.items():
            first = time.perf_counter()
            model.zero_grad()
            model.loss(x).backward()
            second = time.perf_counter()
            steps[name]()
            third = time.perf_counter()
            whole[name].append(1e3 * (third - first))
            own[name].append(1e3 * (third - second))
    return {name: (min(whole[name]), min(own[name])) for name in models}


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    """Tune, run, time, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST's files; scikit-learn's digits when left out")
    parser.add_argument("--features", type=int, default=512, help="rows of the dictionary")
    parser.add_argument("--steps", type=int, default=600, help="steps of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best rate")
    parser.add_argument("--turns", type=int, default=20, help="timed steps of each method")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2, 3e-2], help="grid of Adam's rates")
    options = parser.parse_args()
    data = digits() if options.data is None else patches(options.data)
    sizes = f"{len(data['train'])} rows of {data['train'].shape[1]}, {options.features} features"
    print(f"{'digits' if options.data is None else 'patches of MNIST'}: {sizes}, {options.steps} steps, batch {BATCH}")
    print(mn.constrain(SparseAutoencoder(data["train"].shape[1], options.features), "dictionary", per="row"))
    print(f"{'':34}{'rate':>7}{'loss':>18}{'dead':>14}{'off':>9}")
    # The last seed tunes, the others are run.
    for method in METHODS:
        tuned = {
            rate: outcome(train(method, rate, options.seeds, data, options), data["validation"]).loss
            for rate in options.rates
        }
        best = min(tuned, key=lambda rate, tuned=tuned: tuned[rate] if math.isfinite(tuned[rate]) else math.inf)
        runs = [outcome(train(method, best, seed, data, options), data["test"]) for seed in range(options.seeds)]
        loss, dead = spread([run.loss for run in runs], 3), spread([run.dead for run in runs], 1)
        print(f"{method:34}{best:7g}{loss:>18}{dead:>14}{max(run.off for run in runs):9.1e}")
    for size, features in ((data["train"].shape[1], options.features), *LARGER):
        print(f"\n{f'rows of {size}, {features} features':34}{'step, ms':>9}{'optimizer, ms':>15}{'to recipe':>11}")
        times = timed(size, features, options.turns)
        for name, (whole, own) in times.items():
            print(f"{name:34}{whole:9.2f}{own:15.3f}{own / times[next(iter(times))][1]:11.2f}")
    print(machine())


if __name__ == "__main__":
    main()
