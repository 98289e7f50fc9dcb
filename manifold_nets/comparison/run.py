"""One run: an optimizer trains one model with one learning rate."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manifold_nets.comparison.errors import RunFailedError
from manifold_nets.comparison.experiment import InitialModels, derived_seed
from manifold_nets.comparison.observation import FilterWatch, peak_memory, sampled_steps
from manifold_nets.comparison.optimizers import OPTIMIZERS, Stepper
from manifold_nets.comparison.results import EpochRecord, RunResult, machine_in_words
from manifold_nets.comparison.selection import keep_weights, kept_weights
from manifold_nets.comparison.settings import RunKey, Schedule, Settings
from manifold_nets.comparison.tasks import evaluate
from manifold_nets.comparison.tasks.task import scores_of
from manifold_nets.optim import BoldDriver

# The order of the data is kept for the next optimizer of the same seed, up to this many example numbers.
KEPT_NUMBERS = 10_000_000
_DECAY = 0.95
_STOP_FROM, _STOP_EVERY, _STOP_BACK, _STOP_BELOW = 25, 5, 4, 1e-5


class BatchObjective:
    """The loss of a model on one batch; see `optimizers.Objective`.

    Args:
        model: the model.
        loss: mean loss of outputs and targets.
        inputs: of the batch.
        targets: of the batch.
        modules: the modules of the model that have parameters; looked up each time when left out.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Tensor], Tensor],
        inputs: Any,
        targets: Tensor,
        modules: Sequence[nn.Module] | None = None,
    ) -> None:
        self._model, self._loss, self._inputs, self._targets = model, loss, inputs, targets
        self._modules = modules
        self.evaluations = 0

    def loss(self) -> Tensor:
        """Evaluate the loss at the current weights, with its graph."""
        self.evaluations += 1
        return self._loss(self._model(self._inputs), self._targets)

    def __call__(self) -> Tensor:
        """Clear the gradients, evaluate and differentiate."""
        # A tenth of the time of `zero_grad`, which walks through the model; parameters may be replaced at any time.
        for module in self._model.modules() if self._modules is None else self._modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.grad = None
        with contextlib.nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
            loss = self.loss()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class _DivergedError(Exception):
    """A loss or a weight is no longer finite."""


@dataclass
class _Training:
    """A run in progress: the model, its optimizer, and the records so far."""

    key: RunKey
    model: nn.Module
    stepper: Stepper
    watch: FilterWatch
    modules: tuple[nn.Module, ...]
    steps: int = 0
    examples: int = 0
    status: Literal["finished", "diverged"] = "finished"
    seconds: float = 0.0
    validation_seconds: float = 0.0
    step_times: list[float] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Training loss of each epoch."""
        return [record.train_loss for record in self.epochs]


class Runner:
    """Carries out runs one after the other, in any process, and keeps their final weights.

    Args:
        initial_models: makes the initial models of the runs.
        settings: settings of the comparison.
        folder: where final weights are written; None to keep none.
    """

    def __init__(self, initial_models: InitialModels, settings: Settings, folder: Path | None = None) -> None:
        # Models are made and analysed on the processor and trained on the device.
        self._initial, self._settings, self._folder = initial_models, settings, folder
        self._optimizers = initial_models.experiment.optimizers
        self._task = initial_models.experiment.task.to(settings.device)
        self._train = self._task.parts["train"]
        self._memory: dict[str, int | None] = {}
        kept = settings.epochs if len(self._train) * settings.epochs <= KEPT_NUMBERS else 0
        self._shuffled = lru_cache(kept)(self._shuffle)  # the runs of a seed come one after the other
        self._validation = torch.split(torch.arange(len(self._task.parts["validation"])), 4 * settings.batch_size)
        self._machine = machine_in_words()
        # Every built-in optimizer is made once, so that no run pays for the import of its library.
        with torch.random.fork_rng():
            for name in (name for name, spec in self._optimizers.items() if OPTIMIZERS.get(name) is spec):
                key = RunKey(name, settings.learning_rates[0], settings.seeds[0])
                with contextlib.suppress(Exception):  # the runs report what cannot be made
                    self._stepper(key, initial_models.model(key))

    def run(self, key: RunKey) -> RunResult:
        """Carry out one run and keep its final weights.

        The result, except times and memory, depends only on the key and the settings.

        Raises:
            Exception: an error of the model or the optimizer, unless the run has diverged.
        """
        start = time.perf_counter()
        with self._threads(), torch.random.fork_rng():
            memory = self._peak_memory(key)
            model, stepper = self._start(key)
            modules = tuple(module for module in model.modules() if module._parameters)
            run = _Training(key, model, stepper, FilterWatch(model, self._initial.partitions), modules)
            try:
                self._train_model(run)
            except _DivergedError:
                run.status = "diverged"
        result = RunResult(
            key=key,
            status=run.status,
            layers=run.watch.names,
            epochs=tuple(run.epochs),
            steps=run.steps,
            seconds_per_step=median(run.step_times) if run.step_times else None,
            peak_memory_bytes=memory,
            harness_seconds=time.perf_counter() - start - run.seconds - run.validation_seconds,
            machine=self._machine,
            validation_seconds=run.validation_seconds,
        )
        if self._folder is not None and not result.diverged:
            # A safetensors file holds plain contiguous tensors that share no memory.
            state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
            keep_weights(self._folder, key, state)
        return result

    def test(self, key: RunKey) -> tuple[float, float]:
        """The error and the loss of a run's final weights on the test data.

        If the weights were deleted, the run is carried out again.

        Raises:
            RunFailedError: its weights cannot be read back.
        """
        folder = self._folder or Path()
        weights = kept_weights(folder, key)
        if weights is None:
            self.run(key)
            weights = kept_weights(folder, key)
        if weights is None:
            raise RunFailedError(f"run {key}", "weights that cannot be read back")
        with self._threads(), torch.random.fork_rng():
            model, _ = self._start(key)
            model.load_state_dict(weights)
            scores = evaluate(model, self._task, "test")
        return scores["error"], scores["loss"]

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._settings.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _start(self, key: RunKey) -> tuple[nn.Module, Stepper]:
        """The initial model of a run, in the form that its optimizer needs, and the optimizer."""
        model = self._initial.model(key)
        self._seed(derived_seed(key.seed, "contestant"))
        return model, self._stepper(key, model)

    def _train_model(self, run: _Training) -> None:
        """Train until the last epoch or an early stop."""
        for epoch in range(1, self._settings.epochs + 1):
            self._epoch(run, epoch)
            errors = [record.validation_error for record in run.epochs]
            if self._settings.early_stop and should_stop(run.losses, errors):
                break

    def _epoch(self, run: _Training, epoch: int) -> None:
        """Train for one epoch and validate."""
        batches = self._order(run.key, epoch)
        total = 0.0
        norms: list[float] = []
        sampled = sampled_steps(len(batches)) if self._is_watched(run.key, epoch, len(batches)) else frozenset()
        self._seed(derived_seed(run.key.seed, "training", epoch))
        run.model.train()
        for number, rows in enumerate(batches):
            if number in sampled:
                run.watch.before_step()
            loss = self._step(run, epoch, number / len(batches), rows)
            if number in sampled:
                norms = run.watch.after_step()
            total += loss * len(rows)
        if not all(map(math.isfinite, norms)):
            raise _DivergedError
        start = time.perf_counter()
        run.model.eval()
        scores = scores_of(run.model, self._task, "validation", self._validation)
        run.validation_seconds += time.perf_counter() - start
        if not (math.isfinite(scores["loss"]) and math.isfinite(scores["error"])):
            raise _DivergedError
        run.epochs.append(
            EpochRecord(
                epoch=epoch,
                steps=run.steps,
                evaluations=run.examples / len(self._train),
                train_loss=total / sum(map(len, batches)),
                validation_loss=scores["loss"],
                validation_error=scores["error"],
                seconds=run.seconds,
                layers=run.watch.finish_epoch(norms) if sampled else run.epochs[-1].layers,
            )
        )

    def _step(self, run: _Training, epoch: int, share: float, rows: Tensor) -> float:
        """Take one step on some examples; return the loss before it, which is finite."""
        begun = time.perf_counter()
        schedule, epochs = self._settings.schedule, self._settings.epochs
        if schedule == "cosine" or (schedule != "constant" and share == 0):
            factor = learning_rate_factor(schedule, epoch=epoch, share=share, epochs=epochs, losses=run.losses)
            run.stepper.set_learning_rate(factor)
        objective = BatchObjective(run.model, self._task.loss, *self._train.batch(rows), modules=run.modules)
        fetched = time.perf_counter()
        try:
            loss = float(run.stepper.step(objective))
        except Exception as error:
            # An optimizer that fails on non-finite numbers has diverged; this is not a bug.
            if _all_finite(run.model):
                raise
            raise _DivergedError from error
        ended = time.perf_counter()
        run.seconds += ended - begun
        run.step_times.append(ended - fetched)
        run.steps += 1
        run.examples += objective.evaluations * len(rows)
        if not math.isfinite(loss):
            raise _DivergedError
        return loss

    def _is_watched(self, key: RunKey, epoch: int, steps: int) -> bool:
        """Whether filters are measured in an epoch: always, unless short epochs would become slower."""
        full_batch = self._optimizers[key.optimizer].full_batch
        every = math.ceil(self._settings.epochs / 10) if full_batch else math.ceil(32 / steps)
        return (epoch - 1) % every == 0

    def _seed(self, seed: int) -> None:
        # torch.manual_seed asks for every kind of device, which takes as long as a step of a small network.
        if self._settings.device == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _order(self, key: RunKey, epoch: int) -> list[Tensor]:
        """The examples of each step of an epoch: all at once, or batches in an order that seed and epoch determine."""
        if self._optimizers[key.optimizer].full_batch:
            return [torch.arange(len(self._train))]
        return self._shuffled(key.seed, epoch)

    def _shuffle(self, seed: int, epoch: int) -> list[Tensor]:
        order = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
        batches = list(torch.split(torch.randperm(len(self._train), generator=order), self._settings.batch_size))
        # Batch normalization cannot be trained on one example.
        return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches

    def _stepper(self, key: RunKey, model: nn.Module) -> Stepper:
        return self._optimizers[key.optimizer].make(model, key.learning_rate, self._settings.of_run(key))

    def _peak_memory(self, key: RunKey) -> int | None:
        """Bytes of weights, gradients, optimizer and two steps, measured once per optimizer on a model of its own."""
        if key.optimizer not in self._memory:
            model, batches = self._initial.model(key).train(), self._order(key, 1)[:2]
            weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())

            def steps() -> None:
                stepper = self._stepper(key, model)
                for rows in batches:
                    stepper.step(BatchObjective(model, self._task.loss, *self._train.batch(rows)))

            try:
                found = peak_memory(steps, self._settings.device)
            except Exception:  # noqa: BLE001
                # The run itself will raise the error, with its name.
                return None
            self._memory[key.optimizer] = None if found is None else found + weights
        return self._memory[key.optimizer]


def _all_finite(model: nn.Module) -> bool:
    tensors = [tensor for p in model.parameters() for tensor in (p.detach(), p.grad) if tensor is not None]
    return all(bool(torch.isfinite(tensor.to_dense()).all()) for tensor in tensors)


def learning_rate_factor(
    schedule: Schedule, *, epoch: int, share: float, epochs: int, losses: Sequence[float]
) -> float:
    """Return the ratio of the learning rate to the initial one.

    ===============  =================================================================================================
    ``constant``     1
    ``cosine``       (1 + cos(π t)) / 2, t the share of all steps that are done
    ``exponential``  0.95 to the number of epochs done
    ``bold-driver``  `manifold_nets.optim.BoldDriver`: a factor for every epoch done from the second on: 1.1 if the mean
                     loss of its steps was at most that of the epoch before, 0.5 if it was larger or NaN
    ===============  =================================================================================================

    Args:
        schedule: one of these.
        epoch: the current epoch, counted from 1.
        share: share of its steps that are done, in [0, 1).
        epochs: number of epochs of the whole run.
        losses: mean training loss of each epoch before this one.

    References:
        Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029, for the last
        two.

    Example:
        >>> learning_rate_factor("bold-driver", epoch=4, share=0.0, epochs=9, losses=[2.0, 1.0, 1.5])
        0.55
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (epoch - 1 + share) / epochs)) / 2
    if schedule == "exponential":
        return _DECAY ** (epoch - 1)
    if schedule == "bold-driver":
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        driver = BoldDriver(optimizer)
        for loss in losses:
            driver.step(loss)
        return float(optimizer.param_groups[0]["lr"])
    return 1.0


def should_stop(losses: Sequence[float], errors: Sequence[float]) -> bool:
    """Whether a run ends early after its latest epoch.

    From epoch 25 on, it ends if the mean training loss of the epoch is below 1e-5 or within 1e-5 of the previous
    epoch's; in every fifth epoch also if the validation error is above that of four epochs before.

    Args:
        losses: mean training loss of each epoch.
        errors: validation error after each epoch.

    References:
        Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029.

    Example:
        >>> falling = [1 / n for n in range(1, 31)]
        >>> should_stop(falling, falling), should_stop(falling, [0.1] * 29 + [0.2])
        (False, True)
    """
    epoch = len(losses)
    if epoch < _STOP_FROM:
        return False
    if losses[-1] < _STOP_BELOW or abs(losses[-1] - losses[-2]) < _STOP_BELOW:
        return True
    return epoch % _STOP_EVERY == 0 and errors[-1] > errors[-1 - _STOP_BACK]
