"""Measure how scale-invariant weights turn while any optimizer trains them: norms, angles, effective learning rates."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import ArgumentTypeError, OptionError, listed
from manifold_nets.gathered import is_sharded, local_part, whole
from manifold_nets.groups import Partition, wide
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.models import inner_model
from manifold_nets.monitor_records import CSVWriter, Finding, History, MonitorWarning, Row, as_writers
from manifold_nets.optim.backends.inputs import NORM
from manifold_nets.optim.param_groups import invariant_weights
from manifold_nets.optim.schedules import inner_optimizer
from manifold_nets.symmetry.diagnose import diagnose
from manifold_nets.symmetry.optimizer_settings import OptimizerSettings
from manifold_nets.symmetry.report import SymmetryReport

__all__ = [
    "Finding",
    "History",
    "Monitor",
    "MonitorWarning",
    "Outlook",
    "lightning_callback",
    "outlook",
    "transformers_callback",
]

# The rotation counts as that of the equilibrium within a tenth; it goes with the root of what relaxes.
_NEAR = 0.2
_MEMORY = 0.9  # of the mean square of the rotation, from one sample to the next
_DOUBLE: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
_CAPTURED = 32  # examples of the first batch that are diagnosed


@dataclass(frozen=True)
class Outlook:
    """The long-run effect of learning rate, momentum and decay on a scale-invariant weight of norm n.

    Args:
        power: the effective learning rate is η/n to this power; 0 on a sphere.
        rotation: radians per step in equilibrium; NaN if it is unknown or there is none.
        relaxation: n^(2·power) approaches its equilibrium as exp(−relaxation · steps); NaN in the same cases.
    """

    power: int
    rotation: float = math.nan
    relaxation: float = math.nan


def outlook(group: Mapping[str, Any], *, on_sphere: bool = False) -> Outlook:
    r"""Derive the equilibrium of the scale-invariant weights of a parameter group.

    A gradient g of such a weight w is orthogonal to it and goes with 1/n, n = ‖w‖: ‖g‖ = G/n. Write g for gradients
    that are mostly noise. In SGD with momentum μ and dampening τ a gradient moves w by η(1−τ)g/(1−μ) in the end, so

    .. math:: n² ← n² − 2\bar η λ n² + \bar η² G²/n², \qquad \bar η = η(1−τ)/(1−μ).

    So n⁴ goes exponentially to its equilibrium, where ‖g‖² = 2λn²/η̄, with the rate 4η̄λ. Steps of momentum have
    the mean square η²(1−τ)²‖g‖²/(1−μ²), and turn w by **√(2η(1−τ)λ/(1+μ))** radians; with Nesterov's momentum the
    mean square is 1+2μ−2μ³ times as large. In AdamW a gradient moves w by a vector of some length η√C whatever n is:
    n² ← n² − 2ηλn² + η²C goes to equilibrium with the rate 2ηλ, and moments of β1 turn w by
    **√(2ηλ(1−β1)/(1+β1))**. Adam with an L2 penalty and other optimizers have none that is known here.

    Args:
        group: a parameter group of an optimizer of torch, or of this package.
        on_sphere: the norm is held, so that decay does nothing; except in a group of `manifold_nets.optim.from_torch`,
            whose steps are those of the plain run.

    References:
        Wan et al., arXiv:2006.08419; Kosson et al., arXiv:2305.17212.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> found = outlook(optimizer.param_groups[0])
        >>> found.power, round(found.rotation, 4), round(found.relaxation, 6)
        (2, 0.0073, 0.002)
    """
    if on_sphere and not group.get("transfer"):
        return Outlook(0)
    rate, decay = float(group["lr"]), float(group.get("weight_decay") or 0.0)
    # The norm of a plain run that is held, as by "step" and "equilibrium", goes nowhere.
    moves = 0 < rate * decay < 1 and not (on_sphere and group["transfer"] != "follow")
    if "dampening" in group:
        momentum, rate = float(group["momentum"]), rate * (1 - float(group["dampening"]))
        if not moves or not 0 <= momentum < 1:
            return Outlook(2)
        rotation = OptimizerSettings("sgd", rate, momentum, weight_decay=decay).equilibrium_rotation or math.nan
        longer = 1 + 2 * momentum - 2 * momentum**3 if group.get("nesterov") else 1.0
        return Outlook(2, rotation * math.sqrt(longer), 4 * rate * decay / (1 - momentum))
    if moves and "betas" in group and group.get("decoupled_weight_decay"):
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        rotation = OptimizerSettings("adamw", rate, betas=betas, weight_decay=decay).equilibrium_rotation or math.nan
        return Outlook(1, rotation, 2 * rate * decay)
    return Outlook(1)


class _Weight:
    """A watched weight: which of its entries are read, and to which group they belong.

    Read are rows: slices along the axes that tell groups apart, of this process's part of the weight. At most so many
    groups as asked for are measured, at equal distances.
    """

    exchange: tuple[Any, tuple[int, ...]] | None = None

    def __init__(self, name: str, parameter: Tensor, partition: Partition, most: int | None, *, on_sphere: bool):
        self.name, self.parameter, self.on_sphere = name, parameter, on_sphere
        self.groups = partition.n_groups
        every = 1 if most is None else -(-self.groups // most)
        self.every, self.count = every, -(-self.groups // every)
        if partition.view == partition.shape and not is_sharded(parameter):
            axes, ids = partition.kept, torch.arange(self.groups, device="cpu")
        else:
            axes, ids = self._numbers(partition)
        self.order = (*axes, *(axis for axis in range(len(partition.shape)) if axis not in axes))
        self.axes = len(axes)
        places = (ids % every == 0).nonzero().flatten()
        numbers = ids[places] // every
        device = local_part(parameter).device
        self.chosen: slice | Tensor = places.to(device)
        if torch.equal(places, torch.arange(0, len(ids), every, device="cpu")):
            self.chosen = slice(None, None, every)
        alone = self.exchange is None and torch.equal(numbers, torch.arange(self.count, device="cpu"))
        self.numbers = None if alone else numbers.to(device)
        self._memory: Tensor | None = None

    def _numbers(self, partition: Partition) -> tuple[tuple[int, ...], Tensor]:
        """The axes along which the group changes, and the groups along them in this process's part."""
        ids = partition.group_ids()
        axes = tuple(a for a in range(ids.ndim) if ids.shape[a] > 1 and bool((ids.narrow(a, 0, 1) != ids).any()))
        if is_sharded(self.parameter):
            from torch.distributed.tensor import Replicate, distribute_tensor

            mesh, placements = self.parameter.device_mesh, self.parameter.placements  # type: ignore[attr-defined]
            cuts = tuple(k for k, placement in enumerate(placements) if not isinstance(placement, Replicate))
            self.exchange = (mesh, cuts)
            on_mesh = distribute_tensor(ids.to(mesh.device_type), mesh, placements, src_data_rank=None)
            ids = on_mesh.to_local().cpu()
        if not ids.numel():
            return axes, ids.new_zeros(0)
        rest = (axis for axis in range(ids.ndim) if axis not in axes)
        along = math.prod(ids.shape[axis] for axis in axes)
        return axes, ids.permute(*axes, *rest).reshape(along, -1)[:, 0]

    def rows(self, tensor: Tensor) -> Tensor:
        """The chosen entries of a tensor like the weight, in float32 or better; may share its memory."""
        local = local_part(tensor.detach())
        local = local.to_dense() if local.layout != torch.strided else local
        if not local.numel():
            return wide(local.new_zeros(0, 1))
        local = local.permute(self.order)
        local = local.flatten(0, self.axes - 1) if self.axes else local.unsqueeze(0)
        chosen = local[self.chosen]
        return wide(chosen.reshape(chosen.shape[0], -1))

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products of rows, added up by group."""
        products = (x * y).sum(1)
        if self.numbers is None:
            return products
        return products.new_zeros(self.count).index_add_(0, self.numbers, products)

    def keep(self) -> Tensor:
        """Copy the rows of the weight as it is, into memory that stays where making it anew would cost time."""
        rows = self.rows(self.parameter)
        if self._memory is None or self._memory.shape != rows.shape or self._memory.dtype != rows.dtype:
            kept = rows.clone()
            self._memory = kept if kept.device.type == "cpu" else None
            return kept
        return self._memory.copy_(rows)

    def gradient(self, before: Tensor) -> list[Tensor]:
        """⟨w, g⟩ and ⟨g, g⟩ for the gradient at the weight as it was; NaN without a gradient."""
        if self.parameter.grad is None:
            return [before.new_full((self.count,), math.nan)] * 2
        rows = self.rows(self.parameter.grad).to(before.dtype)
        return [self.inner(before, rows), self.inner(rows, rows)]

    def step(self, before: Tensor) -> list[Tensor]:
        """⟨w, w⟩, ⟨w, Δ⟩ and ⟨Δ, Δ⟩ for the step Δ from the weight as it was."""
        moved = self.rows(self.parameter) - before
        return [self.inner(before, before), self.inner(before, moved), self.inner(moved, moved)]


def _as_in_plain_run(sums: Tensor, norms: Tensor) -> Tensor:
    """Sums of a step on spheres, as they are for the plain weight whose norms before and after it are known.

    With radius r the plain weight is n u/r and goes to n' u'/r. Its step is n'/r times that of u, and (n' − n)/r of u.
    """
    ww, wd, dd, wg, gg = sums.to(norms.dtype)
    before, after = norms / ww.sqrt()
    grown = after - before
    moved = before * (after * wd + grown * ww)
    length = after.square() * dd + 2 * after * grown * wd + grown.square() * ww
    plain = torch.stack([norms[0].square(), moved, length, before * wg, gg])
    return torch.where(norms[0].isnan(), sums.to(norms.dtype), plain)


@dataclass(frozen=True)
class _Sample:
    """The measurements at a step: sums on the device, and the optimizer's settings at that time."""

    step: int
    sums: Tensor
    norms: Tensor | None
    rates: list[float]
    decays: list[float]
    outlooks: list[Outlook]


def _require_counts(every: Any, **optional: Any) -> None:
    given = {name: number for name, number in optional.items() if number is not None}
    for name, number in {"every": every, **given}.items():
        if not isinstance(number, int) or number < 1:
            raise OptionError(name, number, "a whole number ≥ 1")


class Monitor:
    r"""Measure the scale-invariant weights of a model while any optimizer trains it; training itself is not changed.

    Of a scale-invariant group of entries w (a filter in front of batch normalization, a head in front of QK-norm) only
    the direction matters. The effect of a step is the angle by which it turns w; the norm n only determines how large
    this angle is. Hooks of the optimizer measure at every tenth step, for each such weight, over its groups:

    ============================  ====================================================================================
    ``norm``, ``_min``, ``_max``  Euclidean norm before the step: median, smallest and largest
    ``rotation``, ``_max``        angle of the step in radians: median and largest
    ``effective_lr``              η/n² for SGD, η/n for optimizers whose steps do not grow with the gradient, η on a
                                  sphere: learning rate of the direction, at the median norm
    ``radial_gradient``           \|⟨w, g⟩\|/(‖w‖‖g‖), median: 0 up to rounding if the scale has no effect
    ``radial_step``               the same for the step: the share that changes the norm, by decay and momentum
    ``equilibrium_rotation``      radians per step that rate, momentum and decay lead to: see `outlook`
    ``steps_to_equilibrium``      steps until the rotation is within a tenth of that, at the present rate, if gradients
                                  are mostly noise: \|θ*²/θ² − 1\| e^{−kt} = 0.2, θ² smoothed over samples
    ``lr``, ``weight_decay``      of the parameter group
    ============================  ====================================================================================

    For an even number of groups, the median is the lower of the middle two.

    Problems are reported once as `MonitorWarning`, and again when they get four times worse: a norm that has grown
    until steps turn the weight ten times less, an equilibrium that the run will not reach, half a radian per step,
    gradients along a weight that should have none, values that are not finite.

    Constrained weights are measured too: their norm is fixed, and the learning rate determines the rotation. With an
    optimizer of `manifold_nets.optim.from_torch` their values are those of the plain run, whose norms it keeps. Weights
    of joint spheres are left out, as the norm of one of them alone has no meaning.

    Args:
        model: the network in training, also inside DistributedDataParallel or ``torch.compile``, sharded by
            ``fully_shard``, or with tensor-parallel weights.
        optimizer: its optimizer, of any kind that has torch's step hooks, also as Accelerate wraps it.
        report: the report of `diagnose` for the model, made before it was sharded or converted. Without it, constrained
            weights are measured by their spheres, and others are diagnosed: on `inputs`, or without them, before the
            first step, on the first batch that the model gets (at most 32 examples of it).
        inputs: example inputs to diagnose the model with.
        every: number of steps between measurements, starting at step 0.
        writer: destination of the rows: the name of a CSV file, a SummaryWriter of TensorBoard, a run of Weights &
            Biases, a logger of Lightning, an Accelerator, a function of a step and its rows, or a list of these. With
            several processes the first one writes.
        total_steps: length of the run, for the warning about the equilibrium.
        max_groups: largest number of groups of each weight to measure, at equal distances; None for all.

    Attributes:
        history: the measured steps; see `History`.
        findings: the warnings so far, with their values.

    Raises:
        ArgumentTypeError: an argument has the wrong type, or the optimizer holds none of the scale-invariant weights.
        ReportMismatchError: the report belongs to another model.
        OptionError: ``every`` or another number is not positive, or the model has no scale-invariant weight.

    References:
        van Laarhoven, arXiv:1706.05350, for the effective learning rate; Wan et al., arXiv:2006.08419, and Kosson et
        al., arXiv:2305.17212, for the equilibrium.

    Example:
        >>> import manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with mn.Monitor(net, optimizer, inputs=torch.randn(16, 4), every=1) as monitor:
        ...     net(torch.randn(16, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> [(row["weight"], row["groups"], row["rotation"] > 0) for row in monitor.history.rows()]
        [('0.weight', 8, True)]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        report: SymmetryReport | None = None,
        *,
        inputs: Any = None,
        every: int = 10,
        writer: Any = None,
        total_steps: int | None = None,
        max_groups: int | None = 32,
    ) -> None:
        _require_counts(every, total_steps=total_steps, max_groups=max_groups)
        self.model, self.optimizer = inner_model(model), inner_optimizer(optimizer)
        if not hasattr(self.optimizer, "register_step_post_hook"):
            remedy = "Wrap the optimizer in a subclass of torch.optim.Optimizer."
            raise ArgumentTypeError("optimizer", optimizer, "a torch.optim.Optimizer, which has step hooks", remedy)
        self.every, self.total_steps, self._most = every, total_steps, max_groups
        writers = as_writers(writer)
        self._writers = writers if _is_first_process() else []
        self.step, self._resumed = 0, 0
        self._replaced: set[str] = set()
        self.findings: list[Finding] = []
        self._captured: Any = None
        self._capture: torch.utils.hooks.RemovableHandle | None = None
        self._squares, self._samples = torch.zeros(0, **_DOUBLE), 0
        self._watched: list[_Weight] = []
        self._kept: list[Tensor] = []
        self._gradients: list[list[Tensor]] = []
        self._norms: list[Tensor | None] = []
        self._pending: _Sample | None = None
        self._loaded: dict[str, Any] | None = None
        self.history = History([], [])
        self._begin(report, inputs)
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    # ---- what is watched ---------------------------------------------------------------------------------------------

    def _begin(self, report: SymmetryReport | None, inputs: Any) -> None:
        if report is not None:
            self._watch(report)
        elif inputs is not None:
            self._watch(diagnose(self.model, inputs))
        elif any(True for _ in constrained_weights(self.model)):
            self._watch(None)
        else:
            self._capture = self.model.register_forward_pre_hook(self._capture_batch, with_kwargs=True)

    def _capture_batch(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the first examples of a batch, to diagnose the model with before its first step."""
        if not self.model.training or self._capture is None:
            return
        self._capture.remove()
        sizes = {leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim}

        def first(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return (leaf[:_CAPTURED] if leaf.ndim and len(sizes) == 1 else leaf).detach().clone()

        self._captured = tree_map(first, (args, kwargs))

    def _watch(self, report: SymmetryReport | None) -> None:
        """Set up the weights to watch: those of a report, and those on spheres."""
        on_spheres = {weight.name: weight for weight in constrained_weights(self.model)}
        partitions: dict[str, tuple[Tensor, Partition]] = {}
        if report is not None:
            for finding, parameter in invariant_weights(self.model, report):
                if finding.partition is not None:
                    partitions[finding.name] = parameter, finding.partition
        partitions.update({name: (w.parameter, w.manifold.partition) for name, w in on_spheres.items()})
        joint = {name for name, weight in on_spheres.items() if isinstance(weight.manifold, JointSphereMember)}
        names = [name for name, _ in self.model.named_parameters() if name in partitions and name not in joint]
        if not names:
            expected = (
                "one in front of a normalization, scale-invariant by itself; weights that share one norm are left out"
            )
            raise OptionError("model", "no scale-invariant weight", expected)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self._watched = [
            _Weight(name, *partitions[name], self._most, on_sphere=name in on_spheres)
            for name in names
            if id(partitions[name][0]) in held
        ]
        if not self._watched:
            remedy = (
                "Build the optimizer from the parameters of this model, and the monitor after sharding and wrapping."
            )
            raise ArgumentTypeError("optimizer", self.optimizer, f"an optimizer of {listed(names, 3)}", remedy)
        counts = torch.tensor([weight.count for weight in self._watched], device="cpu")
        self._of_weight = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
        first = counts.cumsum(0) - counts
        columns = torch.arange(int(counts.max()), device="cpu")
        inside = columns < counts[:, None]
        # For each weight the places of its groups; short rows are filled up with a NaN, or with the first group.
        self._padded = torch.where(inside, first[:, None] + columns, int(counts.sum()))
        self._repeated = torch.where(inside, first[:, None] + columns, first[:, None])
        self._squares = torch.zeros(int(counts.sum()), **_DOUBLE)
        self._samples = 0
        self.history = History([w.name for w in self._watched], [w.groups for w in self._watched])
        if self._loaded is not None:
            self._take_over(self._loaded)

    # ---- steps -------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._captured is not None:
            inputs, self._captured = self._captured, None
            with torch.enable_grad():
                self._watch(diagnose(self.model, inputs))
        if not self._watched or self.step % self.every:
            return
        self._kept = [weight.keep() for weight in self._watched]
        self._norms = self._read_norms()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A closure computes the gradients in the step; without one they are read before the step may change them.
        self._gradients = [] if closure is not None else self._read_gradients()

    def _read_gradients(self) -> list[list[Tensor]]:
        return [weight.gradient(kept) for weight, kept in zip(self._watched, self._kept, strict=True)]

    def _read_norms(self) -> list[Tensor | None]:
        """The norms of the plain run that an optimizer of `from_torch` keeps beside weights on spheres."""
        states = [self.optimizer.state.get(weight.parameter, {}) for weight in self._watched]
        return [
            whole(state[NORM]).flatten()[:: weight.every].clone() if weight.on_sphere and NORM in state else None
            for weight, state in zip(self._watched, states, strict=True)
        ]

    def _plain_norms(self, device: torch.device) -> Tensor | None:
        """The norms of the plain run before and after the step, NaN where there is none; None where there are none."""
        before, self._norms = self._norms, []
        if all(norms is None for norms in before):
            return None
        pairs = [
            torch.full((2, weight.count), math.nan, dtype=torch.float64, device=device)
            if old is None or new is None
            else torch.stack([old, new]).to(device)
            for weight, old, new in zip(self._watched, before, self._read_norms(), strict=True)
        ]
        return torch.cat(pairs, dim=1)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        # A fused optimizer leaves a step out by itself, where a GradScaler tells it that gradients are not finite.
        overflow = getattr(self.optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            self._kept, self._gradients, self._norms = [], [], []
            return
        step, self.step = self.step, self.step + 1
        if not self._kept:
            return
        self._warn_of_replaced()
        gradients = self._gradients or self._read_gradients()
        moved = [weight.step(kept) for weight, kept in zip(self._watched, self._kept, strict=True)]
        self._kept, self._gradients = [], []
        sums = [torch.stack([*a, *b]) for a, b in zip(moved, gradients, strict=True)]
        self._exchange(sums)
        device = sums[0].device
        total = torch.cat([part.to(device) for part in sums], dim=1)
        self.flush()
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        own = [(groups[id(weight.parameter)], weight.on_sphere) for weight in self._watched]
        self._pending = _Sample(
            step,
            total,
            self._plain_norms(device),
            [float(group["lr"]) for group, _ in own],
            [
                0.0 if on_sphere and not group.get("transfer") else float(group.get("weight_decay") or 0.0)
                for group, on_sphere in own
            ],
            [outlook(group, on_sphere=on_sphere) for group, on_sphere in own],
        )
        if device.type == "cpu":
            self.flush()  # elsewhere this would wait for the device; the next sample does not

    def _warn_of_replaced(self) -> None:
        """Warn once of each weight whose parameter is no longer that of the model."""
        for weight in self._watched:
            if weight.name in self._replaced or is_sharded(weight.parameter):  # shards change places with whole weights
                continue
            path, _, leaf = weight.name.rpartition(".")
            try:
                held = getattr(self.model.get_submodule(path), leaf, None)
            except AttributeError:
                held = None
            if held is not weight.parameter:
                self._replaced.add(weight.name)
                if _is_first_process():
                    text = (
                        f"{weight.name}: the parameter was replaced in the model, but the optimizer and this monitor "
                        "still use the old one. Build the optimizer and a new Monitor from the present model."
                    )
                    warnings.warn(text, MonitorWarning, stacklevel=6)

    def _exchange(self, sums: list[Tensor]) -> None:
        """Add up what the processes hold of sharded weights: one all-reduce for each way of sharding."""
        together: dict[Any, list[int]] = {}
        for place, weight in enumerate(self._watched):
            if weight.exchange is not None and weight.exchange[1]:
                together.setdefault(weight.exchange, []).append(place)
        for (mesh, cuts), places in together.items():
            joined = torch.cat([sums[place] for place in places], dim=1)
            for cut in cuts:
                torch.distributed.all_reduce(joined, group=mesh.get_group(cut))
            for place, part in zip(places, joined.split_with_sizes([sums[p].shape[1] for p in places], 1), strict=True):
                sums[place] = part

    def flush(self) -> None:
        """Work out the last sample, which on a GPU waits for the next one so that the device need not be waited for."""
        sample, self._pending = self._pending, None
        if sample is None:
            return
        self.history.append(sample.step, self._values(sample))
        if self._writers:
            rows = self.history.rows()
            for writer in self._writers:
                if isinstance(writer, CSVWriter):
                    writer(sample.step, rows, resumed=self._resumed)
                else:
                    writer(sample.step, rows)
        self._warn()

    def _values(self, sample: _Sample) -> Tensor:
        """One row of `QUANTITIES` for each weight."""
        sums = sample.sums.cpu().double()
        ww, wd, dd, wg, gg = sums if sample.norms is None else _as_in_plain_run(sums, sample.norms.cpu())
        norms = ww.sqrt()
        rotations = torch.atan2((ww * dd - wd * wd).clamp(min=0).sqrt(), ww + wd)
        radial_gradients, radial_steps = wg.abs() / (ww * gg).sqrt(), wd.abs() / (ww * dd).sqrt()
        self._samples += 1
        fresh = torch.where(rotations.isfinite(), rotations, 0.0).square()
        self._squares = _MEMORY * self._squares + (1 - _MEMORY) * fresh
        squares = self._squares / (1 - _MEMORY**self._samples)
        power, target, relaxation = (
            torch.tensor([getattr(found, name) for found in sample.outlooks], **_DOUBLE)
            for name in ("power", "rotation", "relaxation")
        )
        off = (target.square()[self._of_weight] / squares - 1).abs()
        steps = ((off / _NEAR).log() / relaxation[self._of_weight]).clamp(min=0)
        by_group = torch.stack([norms, rotations, radial_gradients, radial_steps, steps])
        by_group = torch.cat([by_group, by_group.new_full((5, 1), math.nan)], dim=1)
        norm, rotation, radial_gradient, radial_step, to_go = by_group[:, self._padded].nanmedian(dim=-1).values
        spread = norms[self._repeated]
        rate, decay = torch.tensor(sample.rates, **_DOUBLE), torch.tensor(sample.decays, **_DOUBLE)
        columns = [
            norm, spread.amin(1), spread.amax(1), rotation, rotations[self._repeated].amax(1), rate / norm**power,
            radial_gradient, radial_step, target, to_go, rate, decay,
        ]  # fmt: skip
        return torch.stack(columns, dim=1)

    def _warn(self) -> None:
        said = {finding.kind: finding.number for finding in self.findings}
        for finding in self.history.findings(self.total_steps):
            if finding.kind not in said or finding.number >= 4 * said[finding.kind]:
                self.findings.append(finding)
                if _is_first_process():
                    warnings.warn(finding.text, MonitorWarning, stacklevel=7)  # the line that steps

    # ---- results and states ------------------------------------------------------------------------------------------

    def summary(self, depth: int | None = None) -> list[Row]:
        """The last sample, one row for each weight or layer; see `History.summary`."""
        self.flush()
        return self.history.summary(depth)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML page with plots of all samples so far.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from manifold_nets.monitor_page import write_page

        self.flush()
        write_page(self.history, path, title=type(self.model).__name__, total_steps=self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for resuming: the step count, smoothed rotations, and the warnings already given."""
        self.flush()
        return {
            "step": self.step,
            "weights": list(self.history.weights),
            "squares": self._squares.tolist(),
            "samples": self._samples,
            "fastest": self.history.fastest.tolist(),
            "arrival": self.history.arrival.tolist(),
            "findings": [dict(vars(finding)) for finding in self.findings],
        }

    def skip_to(self, step: int) -> None:
        """Count steps from this number, in a run that was resumed without a state of its monitor."""
        self.step, self._resumed = step, step

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state: steps are counted on, and a CSV file is continued."""
        self.skip_to(int(state_dict["step"]))
        self.findings = [Finding(**finding) for finding in state_dict["findings"]]
        self._loaded = dict(state_dict)
        if self._watched:
            self._take_over(self._loaded)

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Take over smoothed numbers, where the same weights are watched in the same way."""
        self._loaded = None
        if state["weights"] == self.history.weights and len(state["squares"]) == len(self._squares):
            self._squares = torch.tensor(state["squares"], **_DOUBLE)
            self._samples = int(state["samples"])
            self.history.go_on_from(state["fastest"], state["arrival"])

    def close(self) -> None:
        """Remove the hooks; the measurements are kept."""
        self.flush()
        for hook in (*self._hooks, self._capture):
            if hook is not None:
                hook.remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


# ---- trainers of other libraries -------------------------------------------------------------------------------------


def lightning_callback(report: SymmetryReport | None = None, *, model: nn.Module | None = None, **options: Any) -> Any:
    """Make a callback for Lightning's Trainer that monitors a run, and resumes with it.

    The run's length is the Trainer's, rows go to its loggers unless another ``writer`` is given, and its checkpoints
    contain the state of the monitor. From the start of training, the monitor is the callback's attribute ``monitor``.

    Args:
        report: the report of `diagnose` for `model`.
        model: the network inside the LightningModule that the report belongs to, or that is diagnosed on its first
            batch (default: the LightningModule itself).
        options: options of `Monitor`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> callback = lightning_callback(model=net, writer="run.csv")  # doctest: +SKIP
        >>> lightning.Trainer(callbacks=[callback]).fit(...)  # doctest: +SKIP
    """
    from lightning.pytorch import Callback

    class MonitorCallback(Callback):
        monitor: Monitor | None = None
        _state: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            steps = trainer.estimated_stepping_batches
            own = {"writer": list(trainer.loggers), "total_steps": int(steps) if 0 < steps < math.inf else None}
            self.monitor = Monitor(model or pl_module, trainer.optimizers[0], report, **{**own, **options})
            if self._state is not None:
                self.monitor.load_state_dict(self._state)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.monitor is None else self.monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._state = state_dict or None

    return MonitorCallback()


def transformers_callback(report: SymmetryReport | None = None, **options: Any) -> Any:
    """Make a callback for transformers' Trainer that monitors a run.

    The run's length is the Trainer's. A resumed run continues to count steps. From the start of training, the monitor
    is the callback's attribute ``monitor``.

    Args:
        report: the report of `diagnose` for the model; without it, the model is diagnosed on its first batch.
        options: options of `Monitor`.

    Example:
        >>> callback = transformers_callback(writer="run.csv")  # doctest: +SKIP
        >>> transformers.Trainer(model, arguments, callbacks=[callback]).train()  # doctest: +SKIP
    """
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):
        monitor: Monitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            own = {"total_steps": state.max_steps if state.max_steps > 0 else None}
            self.monitor = Monitor(given["model"], given["optimizer"], report, **{**own, **options})
            self.monitor.skip_to(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return MonitorCallback()
