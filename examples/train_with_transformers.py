"""Train a small language model with transformers' Trainer, unmodified, its query and key heads on spheres.

Qwen3 normalizes queries and keys head by head, so that the scale of a head's projection means nothing.
"""

import inspect
import logging
import tempfile
import textwrap
import warnings
from typing import Any

import any_torchvision  # noqa: F401
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

import manifold_nets as mn

BATCH, LENGTH, STEPS = 8, 32, 40


def language_model() -> nn.Module:
    """Two layers of four heads over characters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=128, **sizes, **heads, use_cache=False))


class Source(Dataset[dict[str, Tensor]]):
    """Pieces of a module of Python's library, as codes of characters."""

    def __init__(self) -> None:
        codes = torch.tensor([min(code, 127) for code in inspect.getsource(textwrap).encode()])
        self.pieces = codes[: len(codes) // LENGTH * LENGTH].reshape(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def convert(model: nn.Module) -> nn.Module:
    """Put on spheres what has a scale of no meaning."""
    return mn.convert(model.eval(), {"input_ids": Source().pieces[:2]})


def make(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over `param_groups`, which keeps weight decay off the spheres."""
    # Steps on spheres are angles, and have a learning rate of their own.
    groups = mn.param_groups(model, weight_decay=0.01, sphere_lr=5e-3)
    return mn.optim.RiemannianAdam(groups, lr=5e-3, decoupled_weight_decay=True)


def train_with_the_trainer(model: nn.Module, folder: str, **how: Any) -> float:
    """Let the Trainer train; return the mean loss."""
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=5e-3, weight_decay=0.01,
        lr_scheduler_type="linear", train_sampling_strategy="sequential", max_grad_norm=1.0,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Source(), **how)
    return float(trainer.train().training_loss)


def train_in_a_plain_loop(model: nn.Module) -> None:
    """What the Trainer does, written out."""
    optimizer, pieces = make(model), Source().pieces
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))
    model.train()
    for x in pieces.split(BATCH)[:STEPS]:
        model(input_ids=x, labels=x).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether all weights agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def main() -> None:
    """Train from the same start in three ways, and once with an optimizer that knows nothing of spheres."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    start = language_model()
    converted, plain, by_class = convert(start), convert(start), convert(start)
    with tempfile.TemporaryDirectory() as folder:
        # The shortest way to an optimizer of one's own; the Trainer adds its scheduler.
        loss = train_with_the_trainer(converted, folder, optimizers=(make(converted), None))
        train_in_a_plain_loop(plain)
        print(f"mean loss {loss:.3f}")
        print(
            f"transformers' Trainer and the plain loop, the weights are the same bit for bit: {same(converted, plain)}"
        )
        off = max(mn.project(converted).values())
        print(f"norms off by at most {off:.1e}")

        # Or the class: the Trainer then makes its own groups, and the weights still know their spheres. It has one
        # learning rate for all of them, and a warning says which one on spheres would match it.
        options = {"lr": 5e-3, "decoupled_weight_decay": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mn.errors.LearningRateWarning)
            train_with_the_trainer(by_class, folder, optimizer_cls_and_kwargs=(mn.optim.RiemannianAdam, options))
        off = max(mn.project(by_class).values())
        print(f"made by the Trainer: norms off by at most {off:.1e}")

        try:
            train_with_the_trainer(convert(start), folder)
        except mn.errors.EuclideanStepError as error:
            print(f"the Trainer's AdamW is stopped before its first step: {error}")


if __name__ == "__main__":
    main()
