"""Resolve and check the names in the settings before the first run, and make the initial models of the runs."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.comparison.errors import OptimizerBuildError, SettingsError
from manifold_nets.comparison.models import ModelSource, build_model, is_built_in
from manifold_nets.comparison.optimizers import OPTIMIZERS, Form, OptimizerSpec, optimizer_spec
from manifold_nets.comparison.settings import InitialScale, RunKey, Settings
from manifold_nets.comparison.tasks import TASK_NAMES, Subset, Task, load_task
from manifold_nets.conversion import convert
from manifold_nets.conversion.moves import gather, rescaled_variance
from manifold_nets.errors import FunctionChangedError, ManifoldNetsError
from manifold_nets.groups import Partition, filter_partition
from manifold_nets.models import named_tensors
from manifold_nets.symmetry import SymmetryReport, diagnose
from manifold_nets.symmetry.report import WeightFinding

KEPT_MODELS = 12
Layer = nn.Linear | nn.modules.conv._ConvNd


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose, in [0, 2⁶³), independent of those for other purposes.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(0, "order", 2)
        True
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def foreign_code(settings: Settings) -> tuple[str, ...]:
    """The task, model and optimizers of the settings that name code outside of this package.

    Example:
        >>> foreign_code(Settings(("sgd", "mine.py:Lion"), (0.1,), (0,), 1, model="net.py:net"))
        ('net.py:net', 'mine.py:Lion')
    """
    task = () if settings.task.partition(":")[0] in TASK_NAMES else (settings.task,)
    model = () if is_built_in(settings.model) else (settings.model,)
    return (*task, *model, *(name for name in settings.optimizers if name not in OPTIMIZERS))


@dataclass(frozen=True)
class Experiment:
    """The objects that `Settings` name.

    Args:
        task: the task, with its data on the CPU.
        model: name of the model, or a callable that builds it.
        optimizers: by name.
    """

    task: Task
    model: ModelSource
    optimizers: Mapping[str, OptimizerSpec]

    @classmethod
    def from_settings(cls, settings: Settings, own: Mapping[str, Any] | None = None) -> Experiment:
        """Look everything up by name.

        Args:
            settings: the settings with the names.
            own: objects that cannot be looked up by name: ``"task"``, ``"model"``, and ``"optimizer NAME"``.

        Raises:
            ManifoldNetsError: a name is unknown, or the data are missing.
        """
        own = own or {}
        task = own["task"] if "task" in own else load_task(settings.task, data=settings.data)
        found = {name: own.get(f"optimizer {name}") or optimizer_spec(name) for name in settings.optimizers}
        return cls(task, own.get("model", settings.model), found)

    def reduced(self, subset: tuple[int, int] | None, *, setting: str = "subset") -> Experiment:
        """The same with fewer training and validation examples, equal for every seed; all test examples are kept.

        Args:
            subset: numbers of examples; all if None.
            setting: the setting that an error names.

        Raises:
            SettingsError: there are fewer examples.
        """
        if subset is None:
            return self
        parts = dict(self.task.parts)
        for name, count in zip(("train", "validation"), subset, strict=True):
            if count > len(parts[name]):
                raise SettingsError(setting, subset, f"at most {len(parts[name])} {name} examples")
            order = torch.Generator().manual_seed(derived_seed(0, "subset", name))
            parts[name] = Subset(parts[name], torch.randperm(len(parts[name]), generator=order)[:count])
        return replace(self, task=replace(self.task, parts=parts))

    def check(self, settings: Settings) -> None:
        """Raise an error for settings that cannot work here, before anything is written.

        Raises:
            SettingsError: the device is missing, or ``subset`` or ``tune_on`` asks for more examples than there are.
            TaskSourceError: the model does not fit the task.
        """
        require_device(settings)
        self.reduced(settings.subset)
        if settings.tune_on is not None:
            self.reduced(settings.tune_on[:2], setting="tune_on")
        build_model(self.model, self.task, seed=0)


def require_device(settings: Settings) -> None:
    """Raise an error if torch does not know a device or this machine does not have it.

    This is not checked in `Settings`, which are also read on other machines.

    Raises:
        SettingsError: there is no such device.

    Example:
        >>> require_device(Settings(optimizers=("sgd",), learning_rates=(0.1,), seeds=(0,), epochs=1, device="cpu"))
    """
    name: object = settings.device
    if not isinstance(name, str) or not _is_available(name):
        found = ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
        raise SettingsError("device", name, f"a device that torch has on this machine, such as {', '.join(found)}")


def _is_available(name: str) -> bool:
    try:
        device = torch.device(name)
        if device.type == "cuda":
            # Only asked: an allocation would take memory of the device for as long as this process lives.
            return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
    return device.type != "meta"  # which holds no values


# ---- initial models --------------------------------------------------------------------------------------------------


class InitialModels:
    """Makes the initial models of runs, and caches a few.

    The seed alone determines the plain weights; `RunKey.initial_scale` may rescale them, and the converted model is
    converted from exactly these. So all optimizers of a seed start from the same function.

    Args:
        experiment: model, task and optimizers.
        settings: settings of the comparison.
    """

    def __init__(self, experiment: Experiment, settings: Settings) -> None:
        self.experiment, self.settings = experiment.reduced(settings.subset), settings
        self.inputs = self.experiment.task.example_inputs()
        self._kept: OrderedDict[tuple[int, InitialScale, str], nn.Module] = OrderedDict()
        # The analysis may only depend on the settings, never on the run that happens to come first.
        first = build_model(experiment.model, experiment.task, seed=derived_seed(settings.seeds[0], "weights"))
        self._analysis: SymmetryReport | ManifoldNetsError
        with torch.random.fork_rng():
            torch.manual_seed(0)
            try:
                self._analysis = diagnose(first, self.inputs)
            except ManifoldNetsError as error:
                self._analysis = error
        found = self._analysis.weights if isinstance(self._analysis, SymmetryReport) else ()
        self.partitions = _partitions(first, found)

    @classmethod
    def checked(cls, experiment: Experiment, settings: Settings) -> InitialModels:
        """Raise an error for optimizers that cannot be built on the CPU for the model at every initial scale.

        Raises:
            OptimizerBuildError: an optimizer cannot be built; the message has its name and the cause.
        """
        made = cls(experiment, replace(settings, device="cpu"))
        for name, scale in ((n, s) for n in settings.optimizers for s in settings.initial_scales):
            rate, decay = settings.trials(name, scale)[0]
            key = RunKey(name, rate, settings.seeds[0], scale, decay)
            try:
                with torch.random.fork_rng():
                    experiment.optimizers[name].make(made.model(key), rate, made.settings.of_run(key))
            except Exception as error:
                found = f"{type(error).__name__}: {error}".rstrip(".")
                remedy = f"Fix the cause, or leave {name} out of the optimizers."
                raise OptimizerBuildError(f"run {key}", found, remedy=remedy) from error
        return made

    def model(self, key: RunKey) -> nn.Module:
        """A fresh copy of the model that a run starts from, on the device.

        Raises:
            ManifoldNetsError: the model cannot be analysed or has nothing to convert, and the optimizer or the
                initial scale needs that.
        """
        form = self.experiment.optimizers[key.optimizer].form
        which = (key.seed, key.initial_scale, form)
        if which not in self._kept:
            self._kept[which] = self._build(key, form)
            if len(self._kept) > KEPT_MODELS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(which)
        model = copy.deepcopy(self._kept[which])
        # Walking through a model that is already there takes a while.
        return model if self.settings.device == "cpu" else model.to(self.settings.device)

    def _build(self, key: RunKey, form: Form) -> nn.Module:
        model = build_model(self.experiment.model, self.experiment.task, seed=derived_seed(key.seed, "weights"))
        if self.settings.initialization == "balanced":
            balance_weights(model, derived_seed(key.seed, "balanced"))
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(key.seed, "conversion"))
            if key.initial_scale == "rescaled":
                rescale_filters(model, self._report(), derived_seed(key.seed, "scales"))
            return converted_form(model, self._report(), inplace=True) if form == "converted" else model

    def _report(self) -> SymmetryReport:
        if isinstance(self._analysis, ManifoldNetsError):
            raise self._analysis
        return self._analysis


def _partitions(model: nn.Module, weights: Iterable[WeightFinding]) -> dict[str, Partition]:
    """The filters of every weight of at least two axes: as found, or along axis 0."""
    found = {weight.name: weight.partition for weight in weights if weight.partition is not None}
    return {
        name: found.get(name, Partition.filters(weight.shape))
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and weight.numel() > 0
    }


@torch.no_grad()
def rescale_filters(model: nn.Module, report: SymmetryReport, seed: int) -> None:
    """Multiply every scale-invariant filter by 10^u, u uniform on [-2, 2], in place.

    Biases and running statistics are rescaled too, so that the function in evaluation mode stays the same up to
    rounding. In training mode the eps of the normalizations has more effect on small filters, and less on large ones.

    Args:
        model: a plain model.
        report: the report of `manifold_nets.diagnose` for it.
        seed: seed of the factors.
    """
    draw = torch.Generator().manual_seed(seed)
    state = named_tensors(model)
    for weight in report.weights:
        if weight.status != "invariant" or weight.partition is None:
            continue
        factors = 10 ** (torch.rand(weight.partition.n_groups, generator=draw, dtype=torch.float64) * 4 - 2)
        old, spread = state[weight.name].double(), weight.partition.spread(factors)
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


@torch.no_grad()
def balance_weights(model: nn.Module, seed: int) -> None:
    """Draw the weights of every linear and convolution layer anew, in place: unit-norm filters, zero biases.

    Entries are drawn from a normal distribution of standard deviation 0.01, then every filter is divided by its norm.
    In the last layer, the classifier, the column of every input is normalized instead. Normalization layers do not
    change.

    Args:
        model: a plain model; the classifier is the last of its linear and convolution layers.
        seed: random seed.

    Raises:
        SettingsError: the model has no such layer.

    References:
        Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> balance_weights(net, seed=0)
        >>> bool((net[0].weight.norm(dim=1) - 1).abs().max() < 1e-6), net[0].bias.tolist()
        (True, [0.0, 0.0, 0.0])
    """
    layers = weight_layers(model)
    if not layers:
        raise SettingsError("initialization", "balanced for a model without linear or convolution layers", "default")
    draw = torch.Generator().manual_seed(seed)
    *_, last = layers.values()
    for module in layers.values():
        shape = tuple(module.weight.shape)
        columns = module is last and isinstance(module, nn.Linear)
        partition = Partition(shape, shape, (1,)) if columns else filter_partition(module)
        # In float64, so that norms are 1 as exactly as the weight's dtype allows.
        drawn = 0.01 * torch.randn(shape, generator=draw, dtype=torch.float64)
        module.weight.copy_(partition.divide(drawn, partition.norms(drawn)))
        if module.bias is not None:
            module.bias.zero_()


def weight_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the linear and convolution layers of a model by name, in the order in which it names them.

    Example:
        >>> list(weight_layers(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
        ['0', '2']
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def converted_form(model: nn.Module, report_or_example_inputs: Any, *, inplace: bool = False) -> nn.Module:
    """Put a plain network on spheres of radius 1, or of its filters' own norms if radius 1 would change the function.

    Dividing by a norm rounds, and rounding can decide which of two equal values a max-pooling picks. If its indices are
    used again (max-unpooling), the output then changes by more than rounding, and `manifold_nets.convert` raises an
    error if float64 copies differ as well. With ``radius="keep"`` no value changes, bit for bit. Optimizers on spheres
    follow the same path of functions at every radius, except for the eps of the normalizations.

    Args:
        model: the network.
        report_or_example_inputs: the report of `manifold_nets.diagnose` for it, or example inputs.
        inplace: convert the model itself.

    Raises:
        NothingToConvertError: no weight is scale-invariant.
        ManifoldNetsError: as `manifold_nets.convert`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> converted_form(net, torch.randn(8, 4))[0].weight.manifold.uniform_radius
        1.0
    """
    try:
        return convert(model, report_or_example_inputs, inplace=inplace)
    except FunctionChangedError:
        return convert(model, report_or_example_inputs, radius="keep", inplace=inplace)
