"""Where the runs of a comparison start: for each seed one function, in plain and in converted form."""

from __future__ import annotations

import copy
import hashlib
import importlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.comparison.contestants import CONTESTANTS, contestant
from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.initialization import balance_weights
from manifold_nets.comparison.models import build_model, converted_form
from manifold_nets.comparison.models.forms import Form, constrained_form
from manifold_nets.comparison.models.loading import ModelSource, is_built_in
from manifold_nets.comparison.protocols import Contestant
from manifold_nets.comparison.records import InitialScale, RunKey, Settings
from manifold_nets.comparison.tasks import TASK_NAMES, Selection, Task, load_task
from manifold_nets.conversion.moves import gather, rescaled_variance
from manifold_nets.errors import ManifoldNetsError, MissingExtraError
from manifold_nets.groups import Partition
from manifold_nets.models import named_tensors
from manifold_nets.symmetry import SymmetryReport, diagnose
from manifold_nets.symmetry.report import WeightFinding

__all__ = ["Starts", "Subjects", "derived_seed", "foreign_code", "packed", "rescaled_filters", "unpacked"]

KEPT_MODELS = 12


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose, in [0, 2⁶³), that tells nothing of those for others.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(0, "order", 2)
        True
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def foreign_code(settings: Settings) -> tuple[str, ...]:
    """What of the settings names code outside of this package: a task, a model or optimizers.

    Example:
        >>> foreign_code(Settings(("sgd", "mine.py:Lion"), (0.1,), (0,), 1, model="net.py:net"))
        ('net.py:net', 'mine.py:Lion')
    """
    task = () if settings.task.partition(":")[0] in TASK_NAMES else (settings.task,)
    model = () if is_built_in(settings.model) else (settings.model,)
    return (*task, *model, *(name for name in settings.optimizers if name not in CONTESTANTS))


@dataclass(frozen=True)
class Subjects:
    """What the names in `Settings` stand for.

    Args:
        task: the task, with its data on the processor.
        model: name of the model, or a callable that makes it.
        contestants: by name.
    """

    task: Task
    model: ModelSource
    contestants: Mapping[str, Contestant]

    @classmethod
    def named(cls, settings: Settings, own: Mapping[str, Any] | None = None) -> Subjects:
        """Look everything up by name.

        Args:
            settings: with the names.
            own: what has no name that can be looked up: ``"task"``, ``"model"``, and ``"optimizer NAME"``.

        Raises:
            ManifoldNetsError: a name is that of nothing, or the data are not there.
        """
        own = own or {}
        task = own["task"] if "task" in own else load_task(settings.task, data=settings.data)
        found = {name: own.get(f"optimizer {name}") or contestant(name) for name in settings.optimizers}
        return cls(task, own.get("model", settings.model), found)

    def reduced(self, subset: tuple[int, int] | None, *, setting: str = "subset") -> Subjects:
        """The same with fewer training and validation examples, drawn once and for all; of tests none is taken away.

        Args:
            subset: how many; all when None.
            setting: what an error names.

        Raises:
            SettingsError: there are not that many.
        """
        if subset is None:
            return self
        parts = dict(self.task.parts)
        for name, count in zip(("train", "validation"), subset, strict=True):
            if count > len(parts[name]):
                raise SettingsError(setting, subset, f"at most {len(parts[name])} {name} examples")
            order = torch.Generator().manual_seed(derived_seed(0, "subset", name))
            parts[name] = Selection(parts[name], torch.randperm(len(parts[name]), generator=order)[:count])
        return replace(self, task=replace(self.task, parts=parts))


def packed(workers: int, own: Mapping[str, Any]) -> dict[str, bytes]:
    """What other processes cannot look up, as bytes, each part by itself, so that the one that cannot be sent is named.

    Functions and classes of the script itself, which no other process can import, go as they are.

    Args:
        workers: how many there are.
        own: see `Subjects.named`.

    Raises:
        SettingsError: a part cannot be sent; it is named.
        MissingExtraError: cloudpickle is not installed.
    """
    try:
        cloudpickle = importlib.import_module("cloudpickle") if own else pickle
    except ModuleNotFoundError as error:
        raise MissingExtraError("cloudpickle", "several workers", "compare") from error
    parts = {}
    for what, part in own.items():
        try:
            parts[what] = cloudpickle.dumps(part)
        except Exception as error:
            raise SettingsError(
                "workers",
                f"{workers}, with {what}, which cannot be sent to another process ({type(error).__name__}: {error})",
                "1; or name it as file.py:NAME, which each worker imports for itself",
            ) from error
    return parts


def unpacked(own: Mapping[str, bytes]) -> dict[str, Any]:
    """The same again, in a worker.

    Raises:
        RuntimeError: a part cannot be made again here; it is named.
    """
    found = {}
    for what, part in own.items():
        try:
            found[what] = pickle.loads(part)
        except Exception as error:
            raise RuntimeError(
                f"{what} cannot be made again in a worker ({type(error).__name__}: {error}); use one worker, or name "
                "it as file.py:NAME"
            ) from error
    return found


class Starts:
    """Makes the initial models of runs, and remembers a few.

    The seed alone determines the plain weights; `RunKey.initial_scale` may rescale them; the converted form is
    converted from exactly these. So all contestants of a seed start from the same function.

    Args:
        subjects: model, task and contestants.
        settings: of the comparison.
    """

    def __init__(self, subjects: Subjects, settings: Settings) -> None:
        self.subjects, self.settings = subjects.reduced(settings.subset), settings
        self.inputs = self.subjects.task.example_inputs()
        self._kept: OrderedDict[tuple[int, InitialScale, str], nn.Module] = OrderedDict()
        # The analysis may only depend on the settings, never on the run that happens to come first.
        first = build_model(subjects.model, subjects.task, seed=derived_seed(settings.seeds[0], "weights"))
        self._analysis = _analysed(first, self.inputs)
        self.partitions = _partitions(first, self._analysis if isinstance(self._analysis, SymmetryReport) else None)

    def model(self, key: RunKey) -> nn.Module:
        """A fresh copy of the model that a run starts from, on the device.

        Raises:
            ManifoldNetsError: the model cannot be analysed or has nothing to convert, and the contestant or the
                initial scale needs that.
        """
        form = self.subjects.contestants[key.optimizer].form
        which = (key.seed, key.initial_scale, form)
        if which not in self._kept:
            self._kept[which] = self._made(key, form)
            if len(self._kept) > KEPT_MODELS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(which)
        model = copy.deepcopy(self._kept[which])
        # Where it is already, going through the whole model takes a while.
        return model if self.settings.device == "cpu" else model.to(self.settings.device)

    def _made(self, key: RunKey, form: Form) -> nn.Module:
        model = build_model(self.subjects.model, self.subjects.task, seed=derived_seed(key.seed, "weights"))
        if self.settings.initialization == "balanced":
            balance_weights(model, derived_seed(key.seed, "balanced"))
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(key.seed, "conversion"))
            if key.initial_scale == "rescaled":
                rescaled_filters(model, self._report(), derived_seed(key.seed, "scales"))
            if form == "converted":
                return converted_form(model, self._report(), inplace=True)
            return model if form == "plain" else constrained_form(model, classifier=form == "constrained-all")

    def _report(self) -> SymmetryReport:
        if isinstance(self._analysis, ManifoldNetsError):
            raise self._analysis
        return self._analysis


def _analysed(model: nn.Module, inputs: Any) -> SymmetryReport | ManifoldNetsError:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return diagnose(model, inputs)
        except ManifoldNetsError as error:
            return error


def _partitions(model: nn.Module, report: SymmetryReport | None) -> dict[str, Partition]:
    """The filters of every weight of at least two axes: as found, or along axis 0."""
    found = {} if report is None else {w.name: w.partition for w in report.weights if w.partition is not None}
    return {
        name: found.get(name, Partition.filters(weight.shape))
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and weight.numel() > 0
    }


@torch.no_grad()
def rescaled_filters(model: nn.Module, report: SymmetryReport, seed: int) -> None:
    """Multiply every filter whose scale means nothing by 10^u, u uniform on [-2, 2], in place.

    Biases and running statistics are scaled along: evaluation mode keeps its function up to rounding. In training mode
    the eps of the normalizations weighs more against small filters, and less against large ones.

    Args:
        model: a plain model.
        report: what `manifold_nets.diagnose` found for it.
        seed: of the factors.
    """
    draw = torch.Generator().manual_seed(seed)
    state = named_tensors(model)
    for weight in report.weights:
        if weight.status != "invariant" or weight.partition is None:
            continue
        exponents = torch.rand(weight.partition.n_groups, generator=draw, dtype=torch.float64) * 4 - 2
        factors = 10**exponents
        old = state[weight.name].double()
        spread = weight.partition.spread(factors)
        state[weight.name].copy_(weight.partition.multiply(old, spread))
        _scale_along(weight, factors, state)


def _scale_along(weight: WeightFinding, factors: Tensor, state: Mapping[str, Tensor]) -> None:
    for bias in weight.scaled_along:
        factor = gather(factors, bias.groups).reshape(state[bias.name].shape)
        state[bias.name].copy_(state[bias.name].double() * factor)
    seen: set[str] = set()
    for absorber in weight.absorbers:
        mean, variance = absorber.running_mean, absorber.running_var
        if mean is None or variance is None or variance in seen:
            continue
        seen.add(variance)
        factor = gather(factors, absorber.groups)
        reached = torch.tensor(absorber.groups) >= 0
        old = state[variance].double()
        state[mean].copy_(state[mean].double() * factor)
        state[variance].copy_(torch.where(reached, rescaled_variance(old, absorber.eps or 0.0, factor), old))
