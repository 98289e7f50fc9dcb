"""MNIST by the protocol of the paper, and a contest with what is used today.

The networks are the paper's: layers, ReLU and a softmax, without normalization (*Arch1*) or with batch normalization
(*Arch2*), of depth 2 and 4, counted in layers of weights before the softmax. Widths are not known; here every layer has
100 filters. All methods start from the same balanced weights, take no momentum and no weight decay, batches of 100, and
learning rates 10^0 … 10^-5 in half decades, chosen on 1,000 training and 500 validation images by 50 epochs. Learning
rates follow the bold driver, under which runs may end from epoch 25 on, or fall by 5 % an epoch. The methods:

- *B-SGD*: plain SGD;
- *UN*: every filter of the layers before the softmax on the unit sphere, the softmax Euclidean;
- *SM*: the scaled metric, only on Arch2: without normalization it is not known for layers between others.

The arms *today* have momentum, half a cosine as schedule, usual initial weights, and weight decay tuned along with the
learning rate, for each optimizer with as many trials.

``python examples/mnist_paper.py --data FOLDER --write examples/results`` writes ``mnist_paper_runs.csv``, and from it
``mnist_paper.md`` and ``mnist_paper.png``. FOLDER holds the four files of MNIST. ``--seeds 10 --epochs 60`` is the
whole protocol.

References:
    Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029.
"""

from __future__ import annotations

import argparse
from typing import Any

from evidence import Arm, collect, options_for, show
from mnist_report import NAME, as_markdown, draw, paper_arm, today_arm
from paper.protocol import sm_columns, un
from sphere_recipes import EUCLIDEAN, SPHERES, entrants

HALF_DECADES = tuple(10 ** (-half / 2) for half in range(11))
TODAY_RATES = tuple(10 ** (-half / 2) for half in range(7))
DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
WIDTH = 100


def paper_arms(options: argparse.Namespace) -> list[Arm]:
    """Both architectures and depths under both schedules."""
    found = []
    for architecture, kind, methods in (("Arch1", "mlp-plain", ("sgd", un)), ("Arch2", "mlp", ("sgd", un, sm_columns))):
        for depth in (2, 4):
            for schedule in ("bold-driver", "exponential"):
                protocol = {
                    "optimizers": list(methods),
                    "learning_rates": HALF_DECADES,
                    "momentum": 0.0,
                    "initialization": "balanced",
                    "schedule": schedule,
                    "early_stop": schedule == "bold-driver",
                    "tune_on": (1000, 500, 50),
                }
                found.append(
                    Arm(paper_arm(architecture, depth, schedule), {**_common(options, kind, depth), **protocol})
                )
    return found


def today_arms(options: argparse.Namespace) -> list[Arm]:
    """Tuned SGD and AdamW against the recipes on spheres, on Arch2."""
    protocol = {
        "optimizers": entrants((*EUCLIDEAN, *SPHERES)),
        "learning_rates": TODAY_RATES,
        "weight_decays": DECAYS,
        "schedule": "cosine",
        "tune_on": (20000, 5000, 5),
        "tune_seeds": 1,
    }
    return [Arm(today_arm(depth), {**_common(options, "mlp", depth), **protocol}) for depth in (2, 4)]


def _common(options: argparse.Namespace, kind: str, depth: int) -> dict[str, Any]:
    return {
        "task": "mnist",
        "data": options.data,
        "model": f"{kind}:{','.join([str(WIDTH)] * depth)}",
        "batch_size": 100,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "tune_seeds": min(2, options.seeds),
    }


def main() -> None:
    """Train, or read what was stored, and write tables and figure."""
    parser = options_for(NAME, "MNIST by the paper's protocol, and against tuned SGD and AdamW.")
    parser.add_argument("--data", help="folder with the four files of MNIST")
    parser.add_argument("--seeds", type=int, default=5, help="splits, initial weights and orders of the images")
    parser.add_argument("--epochs", type=int, default=30, help="the most that a run has")
    options = parser.parse_args()
    runs = collect(NAME, [*paper_arms(options), *today_arms(options)], options)
    show(NAME, as_markdown(runs), lambda path: draw(runs, path), options)


if __name__ == "__main__":
    main()
