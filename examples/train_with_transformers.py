"""Train a `save_pretrained` folder's language model with transformers' Trainer, its query and key heads on spheres.

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
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments
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


def make(model: nn.Module, converted: nn.Module) -> torch.optim.Optimizer:
    """The plain model's AdamW, with which the converted model goes on."""
    plain = torch.optim.AdamW(mn.param_groups(model, weight_decay=0.01), lr=5e-3)
    return mn.optim.from_torch(plain, model, converted)


class Clip(TrainerCallback):
    """Clips as in the plain run; the Trainer's own ``max_grad_norm`` takes the norms on the spheres."""

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Clip the gradients of a step."""
        mn.optim.clip_plain_grad_norm_(getattr(optimizer, "optimizer", optimizer), 1.0)


def train_with_the_trainer(model: nn.Module, folder: str, **how: Any) -> float:
    """Let the Trainer train; return the mean loss."""
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=5e-3, weight_decay=0.01,
        lr_scheduler_type="linear", train_sampling_strategy="sequential", max_grad_norm=0.0,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Source(), **how)
    return float(trainer.train().training_loss)


def train_in_a_plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What the Trainer does, written out."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))
    model.train()
    for x in Source().pieces.split(BATCH)[:STEPS]:
        model(input_ids=x, labels=x).loss.backward()
        mn.optim.clip_plain_grad_norm_(optimizer, 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether all weights agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def train_from_a_folder(folder: str) -> tuple[nn.Module, nn.Module]:
    """A folder of `save_pretrained` diagnosed, converted, trained, saved, reloaded; return its model and the result."""
    start = Qwen3ForCausalLM.from_pretrained(folder)
    report = mn.diagnose(start.eval(), {"input_ids": Source().pieces[:2]})
    print(f"{len(report.invariant)} weights are scale-invariant")
    converted = mn.convert(start, report)
    # The shortest way to an optimizer of one's own; the Trainer adds its scheduler.
    pair = make(start, converted), None
    print(f"mean loss {train_with_the_trainer(converted, folder, optimizers=pair, callbacks=[Clip()]):.3f}")
    off = max(mn.project(converted).values())
    print(f"norms off by at most {off:.1e}")
    # In the folder is a model as others have it; the file beside it knows the spheres.
    converted.save_pretrained(folder)
    mn.save(converted, f"{folder}/on_spheres.safetensors")
    reloaded = Qwen3ForCausalLM.from_pretrained(folder)
    loaded = mn.load(Qwen3ForCausalLM.from_pretrained(folder), f"{folder}/on_spheres.safetensors")
    print(f"reloaded, plain and on spheres, bit for bit: {same(reloaded, converted) and same(loaded, converted)}")
    print(f"of the reloaded weights {len(mn.project(loaded))} are on spheres")
    return start, converted


def main() -> None:
    """Train a folder's model in the Trainer and in a plain loop, and once by an optimizer that knows no spheres."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        language_model().save_pretrained(folder)
        start, converted = train_from_a_folder(folder)
        plain, by_class = convert(start), convert(start)
        train_in_a_plain_loop(plain, make(start, plain))
        print(
            f"transformers' Trainer and the plain loop, the weights are the same bit for bit: {same(converted, plain)}"
        )

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
