"""Watch an unconverted ResNet while torch's SGD trains it on scikit-learn's digits, and see what its norms do to it.

Twice: with the weight decay that recipes copy from one another, too small for so short a run, and without any.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from digits import evaluate, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import manifold_nets as mn

BATCH, LEARNING_RATE = 50, 0.3


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalization, and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        same = channels_in == channels and stride == 1
        around = [nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)]
        self.around = nn.Identity() if same else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways."""
        inside = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (inside + self.around(x)).relu()


class ResNet(nn.Module):
    """A small ResNet for images of 8 times 8 points."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16))
        self.layer3 = nn.Sequential(Block(16, 32, 2), Block(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the digits."""
        return self.head(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))


def train(weight_decay: float, epochs: int, folder: Path) -> None:
    """Train once, and print what the monitor found."""
    torch.manual_seed(0)
    images, model = load_digits(), ResNet()
    total = epochs * (len(images["train"].y) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    name = folder / f"decay-{weight_decay:g}"
    # Without a report it diagnoses the network on its first batch.
    monitor = mn.Monitor(model, optimizer, writer=f"{name}.csv", total_steps=total)
    begin = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(images["train"].y)).split(BATCH)[: total // epochs]:
            optimizer.zero_grad()
            cross_entropy(model(images["train"].x[rows]), images["train"].y[rows]).backward()
            optimizer.step()
            schedule.step()
    seconds, (_, error) = time.perf_counter() - begin, evaluate(model, images["test"])
    monitor.close()
    print(f"weight decay {weight_decay:g}: {total} steps in {seconds:.0f} s, test error {100 * error:.1f}%")
    for row in monitor.summary(depth=1):
        first = monitor.history.by_layer("norm", 1)[row["layer"]][0]
        print(f"  {row['layer']:<8} norm {first:.2f} → {row['norm']:.2f}   {row['rotation']:.5f} radians per step")
    for finding in monitor.findings:
        print(f"  {finding}")
    monitor.to_html(f"{name}.html")


def show_cost(steps: int = 40, every: int = 10) -> None:
    """Print the processor time that the hooks take of a step of a ResNet-18, 32x32 images, batches of 32."""
    import any_torchvision  # noqa: F401
    import torchvision

    torch.set_num_threads(1)
    model = torchvision.models.resnet18(num_classes=10)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    report = mn.diagnose(model, torch.randn(4, 3, 64, 64))
    with tempfile.TemporaryDirectory() as folder:
        monitor = mn.Monitor(model, optimizer, report, every=every, writer=Path(folder) / "run.csv")
        taken = {"hooks": 0.0}

        def timed(hook: Callable[..., None]) -> Callable[..., None]:
            def run(*arguments: Any) -> None:
                begin = time.process_time()
                hook(*arguments)
                taken["hooks"] += time.process_time() - begin

            return run

        for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
            hooks.update({number: timed(hook) for number, hook in hooks.items()})
        shares = []
        for _ in range(steps // every):
            begin, taken["hooks"] = time.process_time(), 0.0
            for _ in range(every):
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()
            shares.append(taken["hooks"] / (time.process_time() - begin - taken["hooks"]))
        print(f"ResNet-18, {len(monitor.history.weights)} weights, every {every}th step: the monitor takes")
        print(f"  {100 * statistics.median(shares):.2f}% of the time of the steps, {100 * max(shares):.2f}% at most")


def main() -> None:
    """Train with a little decay and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, help="folder for the CSV files and pages; thrown away when left out")
    parser.add_argument("--cost", action="store_true", help="measure what the monitor costs instead")
    arguments = parser.parse_args()
    if arguments.cost:
        show_cost()
        return
    # What is warned of is printed at the end of each run.
    warnings.simplefilter("ignore", mn.monitor.MonitorWarning)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(exist_ok=True)
        for decay in (5e-4, 0.0):
            train(decay, arguments.epochs, folder)
        print(f"pages: {', '.join(sorted(path.name for path in folder.glob('*.html')))}")


if __name__ == "__main__":
    main()
