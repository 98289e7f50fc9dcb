"""Made-up comparisons: what a run would record, from formulas and a seed, with every trouble that a run can be in."""

from __future__ import annotations

import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_nets.comparison.results import (
    Choice,
    Comparison,
    Environment,
    EpochRecord,
    InitialScale,
    LayerRecord,
    RunKey,
    RunResult,
    Settings,
)
from manifold_nets.comparison.tasks import Task

ELEVEN = ("sgd", "adam", "rsgd", "radam", "geoopt-rsgd", "geoopt-radam", "sgdp", "adamp", "pbwn", "sm", "pymanopt-cg")
RATES = (0.001, 0.01, 0.1, 1.0)


def comparison(
    optimizers: tuple[str, ...] = ("sgd", "adam", "rsgd"),
    *,
    rates: tuple[float, ...] = RATES,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 6,
    scales: tuple[InitialScale, ...] = ("plain", "rescaled"),
    diverged: frozenset[tuple[str, float, int]] = frozenset(),
    level: float | None = None,
    nan_losses: bool = False,
) -> Comparison:
    """A comparison whose errors are a parabola over the logarithm of the learning rate, and fall over the epochs.

    Args:
        optimizers: names of the optimizers.
        rates: learning rates.
        seeds: of the runs.
        epochs: of each run.
        scales: initial scales.
        diverged: optimizer, learning rate and seed of the runs that diverge, after half of their epochs.
        level: one error for all, if any.
        nan_losses: whether every loss is NaN although no run counts as diverged.
    """
    settings = Settings(optimizers, rates, seeds, epochs, initial_scales=scales, target_error=0.1)
    results = {key: _run(key, settings, diverged, level, nan_losses) for key in settings.run_keys()}
    choices = tuple(_choose(settings, results, name, scale) for scale in scales for name in optimizers)
    tested = {(c.optimizer, c.learning_rate, c.initial_scale) for c in choices}
    for key, run in results.items():
        if (key.optimizer, key.learning_rate, key.initial_scale) in tested and not run.diverged:
            results[key] = run.with_test(round(run.epochs[-1].validation_error * 360) / 360, 0.1)
    environment = Environment((("torch", "2.13.0"),), "two cores of a made-up machine")
    return Comparison(settings, tuple(results.values()), choices, environment)


def _run(
    key: RunKey, settings: Settings, diverged: frozenset[tuple[str, float, int]], level: float | None, nan: bool
) -> RunResult:
    place = settings.optimizers.index(key.optimizer)
    rng = np.random.default_rng([place, key.seed, int(1e6 * key.learning_rate), len(key.initial_scale)])
    best = -1.5 + 0.3 * (place % 4)
    floor = 0.03 + 0.01 * (place % 3) + 0.04 * (math.log10(key.learning_rate) - best) ** 2
    floor *= 1.5 if key.initial_scale == "rescaled" else 1.0
    lost = (key.optimizer, key.learning_rate, key.seed) in diverged
    passes = 3.0 if key.optimizer.startswith("pymanopt") else 1.0
    records = []
    for epoch in range(1, (settings.epochs // 2 if lost else settings.epochs) + 1):
        error = min(1.0, floor + 0.8 * math.exp(-epoch) + 0.004 * rng.random()) if level is None else level
        loss = math.nan if nan else 10 * error
        on_sphere = "r" in key.optimizer
        layers = tuple(
            LayerRecord(1.0 if on_sphere else 1 + 0.1 * epoch, 0.1 * math.exp(-epoch / 4) / (1 + i)) for i in range(5)
        )
        records.append(
            EpochRecord(epoch, 22 * epoch, passes * epoch, loss, loss, error, epoch * (0.1 + 0.02 * place), layers)
        )
    return RunResult(
        key=key,
        status="diverged" if lost else "finished",
        layers=tuple(f"blocks.{i}.conv.weight" for i in range(5)),
        epochs=tuple(records),
        steps=22 * len(records),
        seconds_per_step=0.001 * (1 + place / 5 + 0.05 * rng.random()) if records else None,
        peak_memory_bytes=None if place == 1 else 1_000_000 + 1000 * place,
        harness_seconds=0.01,
        machine="a made-up machine",
    )


def _choose(settings: Settings, results: dict[RunKey, RunResult], name: str, scale: InitialScale) -> Choice:
    means, lost = [], []
    for rate in settings.learning_rates:
        runs = [results[RunKey(name, rate, seed, scale)] for seed in settings.seeds]
        means.append(float(np.mean([1.0 if r.validation_error is None else r.validation_error for r in runs])))
        lost.append(sum(run.diverged for run in runs))
    hopeless = all(count == len(settings.seeds) for count in lost)
    rate = None if hopeless else settings.learning_rates[int(np.argmin(means))]
    return Choice(name, scale, rate, tuple(means), tuple(lost), "smallest mean validation error")


def all_lost(name: str, rates: tuple[float, ...] = RATES, seeds: tuple[int, ...] = (0, 1, 2)) -> frozenset:
    return frozenset((name, rate, seed) for rate in rates for seed in seeds)


TROUBLES = {
    "three": comparison(),
    "eleven": comparison(ELEVEN, diverged=frozenset({("rsgd", 0.1, 1), ("sm", 1.0, 0)})),
    "one seed": comparison(seeds=(7,)),
    "one learning rate": comparison(rates=(0.1,)),
    "one optimizer": comparison(("sgd",)),
    "one run": comparison(("sgd",), rates=(0.1,), seeds=(0,), epochs=1, scales=("plain",)),
    "no errors": comparison(level=0.0),
    "nothing but errors": comparison(level=1.0),
    "NaN losses": comparison(nan_losses=True),
    "one lost altogether": comparison(diverged=all_lost("adam")),
    "the reference lost": comparison(diverged=all_lost("sgd")),
    "all lost": comparison(diverged=all_lost("sgd") | all_lost("adam") | all_lost("rsgd")),
    "lost in the first epoch": comparison(epochs=1, diverged=all_lost("rsgd")),
    "half of the chosen lost": comparison(
        rates=(0.1,), diverged=frozenset({("sgd", 0.1, 0), ("adam", 0.1, 0), ("adam", 0.1, 1)})
    ),
    "rescaled only": comparison(scales=("rescaled",)),
    "two seeds of two": comparison(("sgd", "rsgd"), seeds=(0, 1), scales=("plain",)),
}


CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


NAMES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def data_folder(name: str) -> Path:
    """Return a folder of real data, or skip where there is none."""
    root = os.environ.get("MANIFOLD_NETS_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"no data: MANIFOLD_NETS_DATA names no folder with {name}")
    return Path(root) / name


def idx_bytes(array: np.ndarray) -> bytes:
    """Encode an array by the description of the format."""
    kind = array.dtype.str[1:]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[kind], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist_like(folder: Path, *, compress: bool = False, dots: bool = False) -> dict[str, np.ndarray]:
    """Write four small files in the layout of MNIST; return what they hold."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for name in NAMES:
        count = 30 if name.startswith("train") else 12
        shape = (count, 5, 4) if "images" in name else (count,)
        array = generator.integers(0, 256 if "images" in name else 3, shape).astype(np.uint8)
        spelled = name.replace("-idx", ".idx") if dots else name
        content = idx_bytes(array)
        (folder / (spelled + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
        held[name] = array
    return held


def examples(task: Task, part: str) -> tuple[Tensor, Tensor]:
    return task.parts[part].batch(torch.arange(len(task.parts[part])))
