"""Train a converted network with Accelerate: accumulated and clipped gradients, compared with a plain loop."""

import torch
from accelerate import Accelerator
from digits import load_digits, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import manifold_nets as mn

EPOCHS, PARTS = 3, 2


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Batches in an order of its own, the same for every loader that this makes."""
    images = load_digits()["train"]
    order = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(images.x, images.y), batch_size=25, shuffle=True, generator=order)


def make(model: nn.Module, converted: nn.Module) -> tuple[torch.optim.Optimizer, CosineAnnealingLR]:
    """The plain model's optimizer and scheduler, with which the converted model goes on."""
    plain = torch.optim.AdamW(mn.param_groups(model, weight_decay=5e-4), lr=0.01)
    schedule = CosineAnnealingLR(plain, T_max=EPOCHS * 1000 // 50)
    return mn.optim.from_torch(plain, model, converted, scheduler=schedule), schedule


def train_with_accelerate(start: nn.Module, model: nn.Module) -> None:
    """The loop of Accelerate's documentation: everything goes through `prepare`; gradients are clipped by ours."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    optimizer, schedule = make(start, model)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, loader(), schedule)
    model.train()
    for _ in range(EPOCHS):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    mn.optim.clip_plain_grad_norm_(optimizer, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def train_in_a_plain_loop(start: nn.Module, model: nn.Module) -> None:
    """What Accelerate does, written out."""
    optimizer, schedule = make(start, model)
    model.train()
    batches = loader()
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(batches, start=1):
            (cross_entropy(model(x), y) / PARTS).backward()
            if number % PARTS == 0:
                mn.optim.clip_plain_grad_norm_(optimizer, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def main() -> None:
    """Train twice from the same start."""
    torch.manual_seed(0)
    start = network()
    converted, plain = (mn.convert(start, load_digits()["train"].x[:50]) for _ in range(2))
    train_with_accelerate(start, converted)
    train_in_a_plain_loop(start, plain)
    same = all(torch.equal(a, b) for a, b in zip(converted.parameters(), plain.parameters(), strict=True))
    print(f"Accelerate and the plain loop, the weights are the same bit for bit: {same}")
    off = max(mn.project(converted).values())
    print(f"norms off by at most {off:.1e}")


if __name__ == "__main__":
    main()
