"""Train a converted network with Lightning's Trainer, unmodified, and compare with a plain loop."""

import logging
import tempfile
import warnings

import any_torchvision  # noqa: F401
import lightning
import torch
from digits import load_digits, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import manifold_nets as mn

EPOCHS = 3


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Batches in one order, which is random already: the Trainer starts iterators that it does not use up."""
    images = load_digits()["train"]
    return DataLoader(TensorDataset(images.x, images.y), batch_size=50)


def make(model: nn.Module, converted: nn.Module) -> tuple[torch.optim.Optimizer, CosineAnnealingLR]:
    """The plain model's optimizer and scheduler, with which the converted model goes on."""
    plain = torch.optim.SGD(mn.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
    schedule = CosineAnnealingLR(plain, T_max=EPOCHS)
    return mn.optim.from_torch(plain, model, converted, scheduler=schedule), schedule


class Digits(lightning.LightningModule):
    """A network with its loss, its optimizer and its scheduler; Lightning does the rest."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: CosineAnnealingLR) -> None:
        super().__init__()
        self.model, self.optimizer, self.schedule = model, optimizer, schedule

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[CosineAnnealingLR]]:
        """Optimizer and scheduler, which Lightning steps after each batch and each epoch."""
        return [self.optimizer], [self.schedule]


def train_in_a_plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: CosineAnnealingLR) -> None:
    """What the Trainer does, written out."""
    batches = loader()
    for _ in range(EPOCHS):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    """Train twice from the same start, and once with an optimizer that knows nothing of spheres."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for of_its_own in (".*does not have many workers.*", ".*treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", of_its_own)
    options = {"max_epochs": EPOCHS, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "log_every_n_steps": 1}
    torch.manual_seed(0)
    start = network()
    # Lightning leaves every module in the mode that it is in.
    converted, plain = (mn.convert(start, load_digits()["train"].x[:50]).train() for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        lightning.Trainer(default_root_dir=folder, **options).fit(Digits(converted, *make(start, converted)), loader())
        train_in_a_plain_loop(plain, *make(start, plain))
        same = all(torch.equal(a, b) for a, b in zip(converted.parameters(), plain.parameters(), strict=True))
        print(f"Lightning's Trainer and the plain loop, the weights are the same bit for bit: {same}")
        off = max(mn.project(converted).values())
        print(f"norms off by at most {off:.1e}")

        class Forgetful(Digits):
            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=1e-3)

        try:
            lightning.Trainer(default_root_dir=folder, **options).fit(
                Forgetful(converted, *make(start, converted)), loader()
            )
        except mn.errors.EuclideanStepError as error:
            print(f"torch's AdamW is stopped before its first step: {error}")


if __name__ == "__main__":
    main()
