"""CamVid with SegNet-Basic: plain SGD and Adam with batch normalization against spheres.

All optimizers of a seed start from the same function and see the images in the same order, without augmentation.
Learning rates are chosen by the mean intersection over union on the validation images at the end of training; then the
test images are read, once for each chosen run. The arms:

- *SGD*, *Adam* and *Riemannian Adam*: plain and on spheres, over grids of learning rates;
- *SGD, rescaled*: every filter multiplied by 10^U(−2, 2) at the start, the same function;
- *SGD, weight decay …*: what weight decay on the Euclidean side is worth;
- *SGD, constant rate*, *recipes*: other ways to train on spheres, beside SGD trained likewise;
- *larger images*: SGD and Riemannian SGD at twice the resolution, with the learning rates chosen before.

``python examples/camvid_segnet.py --data FOLDER --write examples/results`` takes about an hour on one core. It writes
``camvid_runs.csv``, ``camvid_epochs.csv``, ``camvid_scores.csv``, ``camvid_about.json`` and ``camvid_pictures.npz``,
and from these ``camvid.md`` and two figures, which ``--report-only`` makes again. ``--full`` is the network of the
paper, 64 filters on images of 480×360, for a GPU (``--device cuda``).
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camvid_report import findings, write_report
from camvid_scores import NAME, PAPER, read_stored, store
from evidence import Arm, Runs, collect, options_for, read_runs
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison import OptimizerSpec, Settings, TorchStepper
from manifold_nets.comparison.tasks import load_task

SGD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Adam moves every entry by about its rate; on spheres a whole filter turns by about the rate, in radians.
ADAM_RATES, RADAM_RATES = (0.001, 0.003, 0.01, 0.03), (0.01, 0.03, 0.1, 0.3)
NEAR = (0.1, 0.3)  # around what SGD chooses, with spheres and without
DECAYS = (1e-2, 1e-3)
PLAIN_RATE = 0.1  # of classifier and normalizations, where the spheres have a rate of their own


@dataclass(frozen=True)
class Protocol:
    """Size of images and network, and what all arms share."""

    size: tuple[int, int]
    filters: int
    blocks: int
    epochs: int
    seeds: int
    data: str | None
    device: str
    threads: int

    def options(self, *, scale: int = 1) -> dict[str, Any]:
        """Keyword arguments of `manifold_nets.compare`."""
        width, height = (scale * side for side in self.size)
        return {
            "model": f"{PAPER}:segnet_basic_{self.filters}x{self.blocks}",
            "task": f"{PAPER}:camvid_{width}x{height}",
            "schedule": "cosine",
            **{name: getattr(self, name) for name in ("epochs", "seeds", "data", "device", "threads")},
        }

    def folder(self) -> str:
        """A name that tells comparisons of other sizes apart."""
        width, height = self.size
        return f"{width}x{height}-{self.filters}x{self.blocks}"


# ---- recipes ---------------------------------------------------------------------------------------------------------


def own_rate_for_spheres(model: nn.Module, rate: float, settings: Settings) -> TorchStepper:
    """Riemannian SGD in which the learning rate is that of the spheres; all else has a fixed one."""
    groups = mn.param_groups(model, weight_decay=settings.weight_decay, sphere_lr=rate)
    return TorchStepper(mn.optim.RiemannianSGD(groups, lr=PLAIN_RATE, momentum=settings.momentum))


@dataclass(frozen=True)
class MatchedRates:
    """Riemannian SGD at the rates that match the first steps of plain SGD: η/n² for filters of norm n.

    Args:
        inputs: examples to analyse the plain network with.
    """

    inputs: Tensor

    def __call__(self, model: nn.Module, rate: float, settings: Settings) -> TorchStepper:
        """Convert the plain network, and make the optimizer."""
        report = mn.diagnose(model, self.inputs)
        rates = mn.matched_learning_rates(model, report, lr=rate, momentum=settings.momentum)
        # Pooling indices are used again: every weight stays what it is, bit for bit.
        mn.convert(model, report, radius="keep", inplace=True)
        groups = mn.param_groups(model, weight_decay=settings.weight_decay, sphere_lr=rates.by_weight())
        return TorchStepper(mn.optim.RiemannianSGD(groups, lr=rate, momentum=settings.momentum))


def recipes(protocol: Protocol) -> list[OptimizerSpec]:
    """Other ways to set the learning rates of spheres."""
    task = load_task(protocol.options()["task"], data=protocol.data)
    matched = MatchedRates(task.example_inputs().to(protocol.device))
    return [
        OptimizerSpec("rsgd-matched", "plain", "sgd", "manifold_nets", matched),
        OptimizerSpec("rsgd-own-rate", "converted", "sgd", "manifold_nets", own_rate_for_spheres),
    ]


# ---- arms ------------------------------------------------------------------------------------------------------------


def first_arms(protocol: Protocol) -> list[Arm]:
    """The comparison itself."""
    common = protocol.options()
    return [
        Arm("SGD", {**common, "optimizers": ["sgd", "rsgd"], "learning_rates": SGD_RATES}),
        Arm("Adam", {**common, "optimizers": ["adam"], "learning_rates": ADAM_RATES}),
        Arm("Riemannian Adam", {**common, "optimizers": ["radam"], "learning_rates": RADAM_RATES}),
    ]


def larger_arms(protocol: Protocol, runs: Runs) -> list[Arm]:
    """SGD with and without spheres at twice the resolution, each at the learning rate that it chose before."""
    found = []
    for optimizer in ("sgd", "rsgd"):
        rates = {run.learning_rate for run in runs.chosen("SGD", optimizer)}
        if rates:
            options = {**protocol.options(scale=2), "optimizers": [optimizer], "learning_rates": sorted(rates)}
            found.append(Arm(f"larger images, {optimizer}", options))
    return found


def other_arms(protocol: Protocol) -> list[Arm]:
    """Robustness and recipes."""
    near = {**protocol.options(), "optimizers": ["sgd", "rsgd"], "learning_rates": NEAR}
    plain = {**near, "optimizers": ["sgd"]}
    return [
        Arm("SGD, rescaled", {**near, "initial_scales": ("rescaled",)}),
        *(Arm(f"SGD, weight decay {decay:g}", {**plain, "weight_decay": decay}) for decay in DECAYS),
        Arm("SGD, constant rate", {**near, "schedule": "constant"}),
        Arm("recipes", {**near, "optimizers": recipes(protocol)}),
    ]


def planned(protocol: Protocol, chosen: argparse.Namespace, file: Path) -> Iterator[Arm]:
    """The arms that are asked for; those on larger images follow from the runs stored before."""

    def asked(name: str) -> bool:
        return not chosen.only or any(text in name for text in chosen.only)

    yield from (arm for arm in (*first_arms(protocol), *other_arms(protocol)) if asked(arm.name))
    if asked("larger images") and not chosen.full and file.is_file():
        yield from larger_arms(protocol, read_runs(file))


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    options = options_for(NAME, "SegNet-Basic on CamVid: SGD and Adam against spheres.")
    options.add_argument("--data", help="the folder of CamVid in the layout of the SegNet tutorial")
    options.add_argument("--full", action="store_true", help="64 filters, 4 blocks, 480x360; writes camvid_full….")
    options.add_argument("--size", default="60x45", metavar="WIDTHxHEIGHT", help="of the images")
    options.add_argument("--filters", type=int, default=16, help="filters of each convolution")
    options.add_argument("--blocks", type=int, default=4, help="of the encoder, and of the decoder")
    options.add_argument("--epochs", type=int, default=12, help="passes over the training images")
    options.add_argument("--seeds", type=int, default=3, help="initial functions and orders of the images")
    options.add_argument("--device", default="cpu", help="torch device")
    options.add_argument("--threads", type=int, default=1, help="torch threads of a run")
    return options


def protocol_of(chosen: argparse.Namespace) -> Protocol:
    """What the options say of images, network and training."""
    words = ("480x360" if chosen.full else chosen.size).split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        raise SystemExit(f"--size {chosen.size}: expected WIDTHxHEIGHT, such as 60x45")
    filters, blocks = (64, 4) if chosen.full else (chosen.filters, chosen.blocks)
    shared = {name: getattr(chosen, name) for name in ("epochs", "seeds", "data", "device", "threads")}
    return Protocol((int(words[0]), int(words[1])), filters, blocks, **shared)


def command_of(chosen: argparse.Namespace) -> str:
    """The command that leads to the stored files, without the folders of a machine."""
    usual = vars(parser().parse_args([]))
    words = ["--full"] if chosen.full else []
    for name in ("size", "filters", "blocks", "epochs", "seeds", "device"):
        if getattr(chosen, name) != usual[name]:
            words += [f"--{name}", str(getattr(chosen, name))]
    if chosen.arms:
        words.append(shlex.join(["--arms", *chosen.arms]))
    return " ".join(["python examples/camvid_segnet.py --data FOLDER --write examples/results", *words])


def carry_out(chosen: argparse.Namespace, name: str) -> None:
    """Run the arms one after the other, and store after each what the report is made of."""
    protocol, command = protocol_of(chosen), command_of(chosen)
    chosen.output, chosen.only, chosen.arms = chosen.output / protocol.folder(), chosen.arms, None
    carried_out = 0
    for arm in planned(protocol, chosen, chosen.write / f"{name}_runs.csv"):
        collect(name, [arm], chosen)
        store(arm, chosen.output / arm.folder(), chosen.write, command, name)
        carried_out += 1
    if not carried_out:
        known = [arm.name for arm in (*first_arms(protocol), *other_arms(protocol))]
        raise SystemExit(f"--arms {' '.join(chosen.only)}: no such arm; there are: {', '.join(known)}, larger images")


def main() -> None:
    """Carry out what is not yet carried out, store it, and write the report."""
    began, options = time.perf_counter(), parser()
    chosen = options.parse_args()
    name = f"{NAME}_full" if chosen.full else NAME
    if chosen.write is None:
        options.error("--write FOLDER is needed: the folder for stored runs, tables and figures")
    if chosen.report_only:
        collect(name, [], chosen)  # says what is missing
    else:
        carry_out(chosen, name)
    stored = read_stored(chosen.write, name)
    if "SGD" in stored.about:
        write_report(stored, chosen.write, name)
        print("\n".join(findings(stored)))
    else:
        print("No report: it needs the arm SGD.")
    print(f"Took {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
