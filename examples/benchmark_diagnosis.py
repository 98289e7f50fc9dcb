"""What `diagnose` costs, by phase, in processor seconds of one thread.

    python examples/benchmark_diagnosis.py
    python examples/benchmark_diagnosis.py resnet18 bert_12

The last column compares with what no analysis of this kind can do without: `torch.export`, and four passes forward and
backward in float64, in the same process. Before both the model is exported once, as torch keeps what it works out of
operations and shapes for the next export. Then the growth with the depth: from densenet121 to densenet201, and from 4
to 32 transformer layers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.symmetry import diagnose as diagnose_function

NETWORKS = ("resnet18", "resnet50", "densenet121", "mobilenet_v3_large", "vgg13_bn", "vit_b_16", "bert_12")
GROWTH = (("densenet121", "densenet201"), ("bert_4", "bert_32"))
PASSES = 4
# The functions that `diagnose` calls, by phase; what they call in turn counts for the inner one.
PHASES = {
    "trace": ("_trace",),
    "walk": ("solve_jointly", "required_partitions", "follow_weight", "shift_symmetries", "recheck_shifts"),
    "passes": ("_gradients", "_second", "_batch_variances"),
    "test": ("_tested_weights", "certified_families"),
    "search": ("NumericalSearch.unexplained", "NumericalSearch.shown_shifts"),
    "finite move": ("moved_claims", "moved_numbers"),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights and a batch of four: images, or 32 tokens of width 256 for ``bert_LAYERS``."""
    torch.manual_seed(0)
    if name.startswith("bert_"):
        layer = nn.TransformerEncoderLayer(256, 4, 1024, activation="gelu", batch_first=True)
        return nn.TransformerEncoder(layer, int(name.removeprefix("bert_"))), torch.randn(4, 32, 256)
    size = 224 if name.startswith("vit") else 64
    return mn.sources.load_model(f"torchvision:{name}"), torch.randn(4, 3, size, size)


class Stopwatch:
    """Processor seconds by phase; of nested phases only the innermost one runs."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running = ["report"]
        self._since = time.process_time()

    def switch(self) -> None:
        """Book the time since the last switch on the running phase."""
        now = time.process_time()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time booked on a phase."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._running.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        return wrapper


def diagnose(model: nn.Module, inputs: Tensor) -> Counter[str]:
    """Processor seconds of each phase of an analysis."""
    module = sys.modules[diagnose_function.__module__]
    watch = Stopwatch()
    with contextlib.ExitStack() as patches:
        for phase, names in PHASES.items():
            for name in names:
                *owner, last = name.split(".")
                place = getattr(module, owner[0]) if owner else module
                patches.enter_context(mock.patch.object(place, last, watch.timed(phase, getattr(place, last))))
        mn.diagnose(model, inputs)
        watch.switch()
    return watch.seconds


def baseline(model: nn.Module, inputs: Tensor) -> float:
    """Processor seconds of `torch.export` and of the passes in float64."""
    model, inputs = model.double().train(), inputs.double()
    start = time.process_time()
    torch.export.export(model, (inputs,), strict=False)
    for _ in range(PASSES):
        outputs = model(inputs)
        torch.autograd.grad(outputs.sum(), list(model.parameters()), allow_unused=True)
    return time.process_time() - start


def measure(name: str) -> float:
    """Print one line of the table and return the seconds of the analysis."""
    model, inputs = network(name)
    torch.export.export(copy.deepcopy(model).double().train(), (inputs.double(),), strict=False)
    seconds = diagnose(model, inputs)
    total, base = sum(seconds.values()), baseline(model, inputs)
    phases = "".join(f"{seconds[phase]:12.2f}" for phase in (*PHASES, "report"))
    print(f"{name:20}{phases}{total:9.2f}{base:9.2f}{total / base:8.2f}", flush=True)
    return total


def main() -> None:
    """Measure the networks that are named, or all of them and the growth."""
    parser = argparse.ArgumentParser(description="Processor seconds of diagnose by phase.")
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"names of torchvision, or bert_LAYERS: {NETWORKS}"
    )
    names = list(parser.parse_args().networks)
    torch.set_num_threads(1)
    mn.diagnose(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(4, 4))  # libraries load on first use
    print(
        f"{'network':20}{''.join(f'{phase:>12}' for phase in (*PHASES, 'report'))}{'total':>9}{'base':>9}{'ratio':>8}"
    )
    known = {name: measure(name) for name in names or dict.fromkeys((*NETWORKS, *sum(GROWTH, ())))}
    for small, large in GROWTH:
        if small in known and large in known:
            print(f"{small} → {large}: {known[large] / known[small]:.1f} times as long")


if __name__ == "__main__":
    main()
