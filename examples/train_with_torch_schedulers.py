"""Train with torch's schedulers, interrupt, and go on from files bit for bit; then the bold-driver schedule."""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim import lr_scheduler

import manifold_nets as mn
from manifold_nets.layers import UnitNormLinear


def build() -> nn.Module:
    """A batch-normalized regression network on spheres."""
    return nn.Sequential(UnitNormLinear(8, 32, bias=False), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 1))


def make(model: nn.Module) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
    """Any scheduler of torch will do; this one warms up for 10 steps and then follows a cosine.

    The constrained filters, whose steps are angles, get a learning rate of their own.
    """
    groups = mn.param_groups(model, weight_decay=1e-4, sphere_lr=0.05)
    optimizer = mn.optim.RiemannianSGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    return optimizer, lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[10])


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch that depends on the number of the step alone, so that runs can be compared."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Iterator[float]:
    """Take some steps; give the loss of each."""
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def train_with(
    schedule: lr_scheduler.LRScheduler, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> float:
    """Take some steps and step the scheduler after each; return the mean loss."""
    losses = []
    for loss in train(model, optimizer, steps):
        schedule.step()
        losses.append(loss)
    return statistics.fmean(losses)


def main() -> None:
    """Train in one go and with an interruption, and compare; then let the bold driver choose the rates."""
    torch.manual_seed(0)
    model = build()
    optimizer, schedule = make(model)
    print(f"steps  0 to 49: mean loss {train_with(schedule, model, optimizer, range(50)):.4f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mn.save(model, folder / "net.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / "training.pt")
        resumed = mn.load(build(), folder / "net.safetensors")
        states = torch.load(folder / "training.pt", weights_only=True)
    other_optimizer, other_schedule = make(resumed)
    other_optimizer.load_state_dict(states["optimizer"])
    other_schedule.load_state_dict(states["schedule"])

    print(f"steps 50 to 99: mean loss {train_with(schedule, model, optimizer, range(50, 100)):.4f}")
    train_with(other_schedule, resumed, other_optimizer, range(50, 100))
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    print(f"resumed from files, the weights are the same bit for bit: {same}")

    for group in optimizer.param_groups:
        group["lr"] = 0.02
    bold = mn.optim.BoldDriver(optimizer)
    for epoch in range(5):
        # This schedule is stepped once an epoch, with the mean cost.
        cost = statistics.fmean(train(model, optimizer, range(100, 120)))
        bold.step(cost)
        print(f"bold driver, epoch {epoch}: cost {cost:.4f}, next learning rate {bold.get_last_lr()[0]:.4f}")


if __name__ == "__main__":
    main()
