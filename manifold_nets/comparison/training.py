"""One run: a contestant trains one model with one learning rate."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.comparison.contestants import CONTESTANTS
from manifold_nets.comparison.environment import machine_in_words
from manifold_nets.comparison.observation import FilterWatch, peak_memory, sampled_steps
from manifold_nets.comparison.protocols import Stepper
from manifold_nets.comparison.records import EpochRecord, RunKey, RunResult, Settings
from manifold_nets.comparison.schedules import is_time_to_stop, learning_rate_factor
from manifold_nets.comparison.starts import Starts, derived_seed
from manifold_nets.comparison.tasks import Part, evaluate
from manifold_nets.comparison.tasks.task import scores_of

__all__ = ["BatchObjective", "Runner"]

Weights = dict[str, Tensor]

# Orders of the data are remembered up to so many numbers of examples, for the next contestant of the same seed.
KEPT_NUMBERS = 10_000_000


class BatchObjective:
    """The loss of a model on one batch; see `protocols.Objective`.

    Args:
        model: the model.
        loss: mean loss of outputs and targets.
        inputs: of the batch.
        targets: of the batch.
        modules: those of the model with parameters, for a loop that has them at hand; looked up when left out.
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
        if torch.is_grad_enabled():
            return self._differentiated()
        with torch.enable_grad():
            return self._differentiated()

    def _differentiated(self) -> Tensor:
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class _DivergedError(Exception):
    """A loss or a weight is no longer finite."""


@dataclass
class _Progress:
    """What a run has come to, and the modules whose parameters it trains."""

    modules: tuple[nn.Module, ...]
    steps: int = 0
    seen: int = 0
    seconds: float = 0.0
    validating: float = 0.0
    step_times: list[float] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)

    def curves(self) -> tuple[list[float], list[float]]:
        """Training loss and validation error of each epoch."""
        return [record.train_loss for record in self.epochs], [record.validation_error for record in self.epochs]


class Runner:
    """Carries out runs in this process, one after the other.

    Args:
        starts: makes the initial models.
        settings: of the comparison.
    """

    def __init__(self, starts: Starts, settings: Settings) -> None:
        # Models are made and analysed on the processor and trained on the device.
        self._starts, self._settings, self._task = starts, settings, starts.subjects.task.to(settings.device)
        self._memory: dict[str, int | None] = {}
        self._orders: dict[tuple[int, int], list[Tensor]] = {}
        self._validation = torch.split(torch.arange(len(self._task.parts["validation"])), 4 * settings.batch_size)
        self._machine = machine_in_words()

    def prepare(self) -> None:
        """Make every built-in contestant once, so that no run pays for the import of the library that it comes from."""
        with torch.random.fork_rng():
            for name, contestant in self._starts.subjects.contestants.items():
                if CONTESTANTS.get(name) is contestant:
                    key = RunKey(name, self._settings.learning_rates[0], self._settings.seeds[0])
                    # What cannot be made is told by its runs.
                    with contextlib.suppress(Exception):
                        self._stepper(key, self._starts.model(key))

    def run(self, key: RunKey) -> tuple[RunResult, Weights]:
        """Carry out one run; everything but times and memory follows from the key and the settings.

        Returns:
            The result, and the final weights by their names, empty where the run diverged.

        Raises:
            Exception: what the model or the contestant raised, unless the run has diverged.
        """
        start = time.perf_counter()
        with self._threads(), torch.random.fork_rng():
            return self._run(key, start)

    def scores(self, key: RunKey, weights: Weights) -> dict[str, float]:
        """What `evaluate` finds on the test data for a run with its final weights."""
        with self._threads(), torch.random.fork_rng():
            model = self._starts.model(key)
            self._seed(derived_seed(key.seed, "contestant"))
            self._stepper(key, model)  # it may have given the model another form
            model.load_state_dict(weights)
            return evaluate(model, self._task, "test")

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._settings.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _run(self, key: RunKey, start: float) -> tuple[RunResult, Weights]:
        model = self._starts.model(key)
        memory = self._peak_memory(key, model)
        self._seed(derived_seed(key.seed, "contestant"))
        stepper = self._stepper(key, model)
        watch = FilterWatch(model, self._starts.partitions)
        progress, status = _Progress(tuple(module for module in model.modules() if module._parameters)), "finished"
        try:
            for epoch in range(1, self._settings.epochs + 1):
                self._epoch(key, epoch, model, stepper, watch, progress)
                if self._settings.early_stop and is_time_to_stop(*progress.curves()):
                    break
        except _DivergedError:
            status = "diverged"
        result = RunResult(
            key=key,
            status="finished" if status == "finished" else "diverged",
            layers=watch.names,
            epochs=tuple(progress.epochs),
            steps=progress.steps,
            seconds_per_step=median(progress.step_times) if progress.step_times else None,
            peak_memory_bytes=memory,
            harness_seconds=time.perf_counter() - start - progress.seconds - progress.validating,
            machine=self._machine,
            validation_seconds=progress.validating,
        )
        return result, _final_weights(model) if status == "finished" else {}

    def _epoch(
        self, key: RunKey, epoch: int, model: nn.Module, stepper: Stepper, watch: FilterWatch, progress: _Progress
    ) -> None:
        """Train for one epoch and validate."""
        batches = self._order(key, epoch)
        total = loss = 0.0
        norms: list[float] = []
        sampled = sampled_steps(len(batches)) if self._is_watched(key, epoch, len(batches)) else frozenset()
        self._seed(derived_seed(key.seed, "training", epoch))
        model.train()
        for number, rows in enumerate(batches):
            if number in sampled:
                watch.before_step()
            loss = self._step(epoch, number / len(batches), model, stepper, rows, progress)
            if number in sampled:
                norms = watch.after_step()
            total += loss * len(rows)
        if not all(map(math.isfinite, norms)):
            raise _DivergedError
        start = time.perf_counter()
        model.eval()
        scores = scores_of(model, self._task, "validation", self._validation)
        progress.validating += time.perf_counter() - start
        if not (math.isfinite(scores["loss"]) and math.isfinite(scores["error"])):
            raise _DivergedError
        progress.epochs.append(
            EpochRecord(
                epoch=epoch,
                steps=progress.steps,
                evaluations=progress.seen / len(self._train),
                train_loss=total / sum(map(len, batches)),
                validation_loss=scores["loss"],
                validation_error=scores["error"],
                seconds=progress.seconds,
                layers=watch.finish_epoch(norms) if sampled else progress.epochs[-1].layers,
            )
        )

    def _step(
        self, epoch: int, share: float, model: nn.Module, stepper: Stepper, rows: Tensor, progress: _Progress
    ) -> float:
        """Take one step on some examples; return the loss before it, which is finite."""
        begun = time.perf_counter()
        schedule, epochs = self._settings.schedule, self._settings.epochs
        if schedule == "cosine" or (schedule != "constant" and share == 0):
            costs, _ = progress.curves()
            factor = learning_rate_factor(schedule, epoch=epoch, share=share, epochs=epochs, costs=costs)
            stepper.set_learning_rate(factor)
        objective = BatchObjective(model, self._task.loss, *self._train.batch(rows), modules=progress.modules)
        fetched = time.perf_counter()
        try:
            loss = float(stepper.step(objective))
        except Exception as error:
            # What an optimizer makes of numbers that are not finite is divergence, not a fault of the program.
            if _all_finite(model):
                raise
            raise _DivergedError from error
        ended = time.perf_counter()
        progress.seconds += ended - begun
        progress.step_times.append(ended - fetched)
        progress.steps += 1
        progress.seen += objective.evaluations * len(rows)
        if not math.isfinite(loss):
            raise _DivergedError
        return loss

    def _is_watched(self, key: RunKey, epoch: int, steps: int) -> bool:
        """Whether filters are measured in an epoch: in all, unless steps are so few that it would take a while."""
        full_batch = self._starts.subjects.contestants[key.optimizer].full_batch
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
        if self._starts.subjects.contestants[key.optimizer].full_batch:
            return [torch.arange(len(self._train))]
        if (key.seed, epoch) in self._orders:
            return self._orders[key.seed, epoch]
        order = torch.Generator().manual_seed(derived_seed(key.seed, "order", epoch))
        batches = list(torch.split(torch.randperm(len(self._train), generator=order), self._settings.batch_size))
        # Batch normalization cannot be trained on one example.
        batches = batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches
        if len(self._train) * self._settings.epochs <= KEPT_NUMBERS:
            if any(seed != key.seed for seed, _ in self._orders):
                self._orders.clear()  # the runs of a seed come one after the other
            self._orders[key.seed, epoch] = batches
        return batches

    def _stepper(self, key: RunKey, model: nn.Module) -> Stepper:
        # A contestant finds the weight decay of its run where it always is.
        settings = replace(self._settings, weight_decay=self._settings.decay_of(key), weight_decays=())
        return self._starts.subjects.contestants[key.optimizer].make(model, key.learning_rate, settings)

    def _peak_memory(self, key: RunKey, model: nn.Module) -> int | None:
        """Bytes of weights, gradients, optimizer and two steps, measured once a contestant on a copy of the model."""
        if key.optimizer not in self._memory:
            twin, batches = copy.deepcopy(model).train(), self._order(key, 1)[:2]
            weights = sum(t.numel() * t.element_size() for t in twin.state_dict().values())

            def steps() -> None:
                stepper = self._stepper(key, twin)
                for rows in batches:
                    stepper.step(BatchObjective(twin, self._task.loss, *self._train.batch(rows)))

            try:
                found = peak_memory(steps, self._settings.device)
            except Exception:  # noqa: BLE001
                # The run itself will show what is wrong, with its name.
                return None
            self._memory[key.optimizer] = None if found is None else found + weights
        return self._memory[key.optimizer]

    @property
    def _train(self) -> Part:
        return self._task.parts["train"]


def _all_finite(model: nn.Module) -> bool:
    tensors = [tensor for p in model.parameters() for tensor in (p.detach(), p.grad) if tensor is not None]
    return all(bool(torch.isfinite(tensor.to_dense()).all()) for tensor in tensors)


def _final_weights(model: nn.Module) -> Weights:
    # A safetensors file holds plain contiguous tensors that share no memory.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
