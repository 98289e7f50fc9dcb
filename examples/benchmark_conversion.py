"""What diagnosing and converting ResNet-50 costs, and what the converted model costs: seconds, memory, ratios.

    python examples/benchmark_conversion.py

Memory is the growth of the peak resident set over the imported libraries and the model, each stage in a process of its
own, beside the growth that one training pass of the float64 model takes on the same inputs. Forward and backward of the
plain and the converted model take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

import manifold_nets as mn

STAGES = ("training", "diagnose", "convert")


def network() -> nn.Module:
    """ResNet-50 with random weights."""
    torch.manual_seed(0)
    return mn.sources.load_model("torchvision:resnet50")


def peak_mebibytes() -> float:
    """Peak resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stage(name: str, inputs: Tensor) -> None:
    """Run one stage and print how far the peak grew, in MiB, and the seconds."""
    model = network()
    model(inputs[:1].repeat(2, 1, 1, 1))  # libraries allocate on first use
    before, start = peak_mebibytes(), time.perf_counter()
    if name == "training":
        double = copy.deepcopy(model).double().train()
        double(inputs.double()).sum().backward()
    elif name == "diagnose":
        mn.diagnose(model, inputs)
    else:
        mn.convert(model, inputs)
    print(peak_mebibytes() - before, time.perf_counter() - start)


def forward_backward(model: nn.Module, inputs: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    model(inputs).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Run all stages, or the one that is named."""
    parser = argparse.ArgumentParser(description="Cost of diagnosing and converting ResNet-50.")
    parser.add_argument("--size", type=int, default=160, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs = torch.randn(options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    if options.stage:
        stage(options.stage, inputs)
        return
    grown = {}
    for name in STAGES:
        command = [sys.executable, __file__, "--stage", name, *sys.argv[1:]]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        grown[name], seconds = map(float, printed.split())
        ratio = grown[name] / grown["training"]
        print(
            f"{name:<9} {seconds:6.2f} s   peak grows by {grown[name]:7.0f} MiB, {ratio:.2f} × a float64 training pass"
        )
    plain = network().train()
    converted = mn.convert(plain, inputs).train()
    forward_backward(plain, inputs), forward_backward(converted, inputs)
    ratios = []
    for repetition in range(options.repetitions):
        pair = (plain, converted) if repetition % 2 else (converted, plain)
        seconds = {id(model): forward_backward(model, inputs) for model in pair}
        ratios.append(seconds[id(converted)] / seconds[id(plain)])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"forward and backward, converted over plain: median {middle:.3f}, quartiles {low:.3f} … {high:.3f}")


if __name__ == "__main__":
    main()
