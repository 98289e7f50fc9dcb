"""Learning rates on spheres that match those of a torch optimizer, for the next step and for the long run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.constraints import ConstrainedWeight, constrained_weights
from manifold_nets.documents import JsonForm
from manifold_nets.errors import ArgumentTypeError, OptionError, ParameterNameError, ReportMismatchError
from manifold_nets.groups import Partition, refuse_degenerate
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.symmetry.optimizer_settings import DEFAULT_BETAS, OptimizerSettings
from manifold_nets.symmetry.report import SymmetryReport, WeightFinding

__all__ = ["LearningRates", "Spread", "WeightRates", "matched_learning_rates"]


@dataclass(frozen=True)
class Spread(JsonForm):
    """Median, quartiles and extremes of a quantity over groups."""

    median: float
    lower_quartile: float
    upper_quartile: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Tensor) -> Spread:
        """Summarize values; quartiles interpolate linearly between neighbouring values.

        Example:
            >>> Spread.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
            Spread(median=3.0, lower_quartile=2.0, upper_quartile=4.0, smallest=1.0, largest=5.0)
        """
        ordered = values.detach().double().flatten().cpu().sort().values
        # torch.quantile refuses more than 16 million values.
        at = [(len(ordered) - 1) * share for share in (0.5, 0.25, 0.75)]
        low, high = (torch.tensor([edge(x) for x in at]) for edge in (math.floor, math.ceil))
        weight = torch.tensor(at, dtype=torch.float64) - low
        median, lower, upper = torch.lerp(ordered[low], ordered[high], weight).tolist()
        return cls(median, lower, upper, float(ordered[0]), float(ordered[-1]))

    def __str__(self) -> str:
        quartiles = f"{self.lower_quartile:.3g} … {self.upper_quartile:.3g}"
        return f"{self.median:.3g} (quartiles {quartiles}; all {self.smallest:.3g} … {self.largest:.3g})"


@dataclass(frozen=True)
class WeightRates(JsonForm):
    """The matched learning rates of the groups of one weight.

    Args:
        name: the parameter.
        groups: the number of its invariant groups.
        norms: Euclidean norms ‖w_G‖.
        next_step: sphere learning rates that match the next step.
        equilibrium: sphere learning rates that match the equilibrium rotation of a long run; None if unknown.
        gradients: root mean squares of ‖w_G‖·‖∂L/∂w_G‖, which do not depend on the scale; None without gradients.
    """

    name: str
    groups: int
    norms: Spread
    next_step: Spread
    equilibrium: Spread | None
    gradients: Spread | None


@dataclass(frozen=True)
class LearningRates(JsonForm):
    """The sphere learning rates that match an optimizer on a model's scale-invariant weights.

    Args:
        model: class of the model.
        settings: the optimizer of the plain network.
        weights: one entry for each scale-invariant weight.
        next_step: spread over all groups of all weights; None without weights.
        equilibrium: the same for the long run; None unless known for all weights.
        held: whether the weights are already on spheres, so that norms are fixed and there is no long run to match.

    Example:
        >>> import torch, manifold_nets as mn
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> rates = mn.matched_learning_rates(net, mn.diagnose(net, torch.randn(16, 4)), lr=0.1)
        >>> rates["0.weight"].groups, list(rates.by_weight())
        (8, ['0.weight'])
    """

    model: str
    settings: OptimizerSettings
    weights: tuple[WeightRates, ...]
    next_step: Spread | None
    equilibrium: Spread | None
    held: bool = False
    json_without = ("model", "settings", "held")

    def __getitem__(self, name: str) -> WeightRates:
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise ParameterNameError("learning_rates", name, [weight.name for weight in self.weights])

    def by_weight(self, *, long_run: bool = False) -> dict[str, float]:
        """The median rate of each weight by name, for ``param_groups(model, sphere_lr=…)``.

        Args:
            long_run: return the rates of the long run, where known, instead of those of the next step.
        """
        rates = ((weight.name, weight.equilibrium if long_run else weight.next_step) for weight in self.weights)
        return {name: rate.median for name, rate in rates if rate is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            **self.settings.to_dict(),
            "equilibrium_rotation": self.settings.equilibrium_rotation,
            "equilibrium_factor": self.settings.equilibrium_factor,
            **super().to_dict(),
        }

    @property
    def long_run(self) -> str:
        """A sentence about the long run."""
        rotation, factor = self.settings.equilibrium_rotation, self.settings.equilibrium_factor
        if rotation is None or factor is None:
            return "without weight decay there is no equilibrium rotation"
        if self.held:
            return "weight decay has no effect on weights whose norms are held fixed"
        if self.settings.optimizer != "sgd":
            rate = f"{factor if self.equilibrium is None else self.equilibrium.median:.3g}"
        elif self.equilibrium is None:
            rate = f"{factor:.3g}/G, where G is the root mean square of ‖w‖·‖∂L/∂w‖"
        else:
            rate = str(self.equilibrium)
        text = f"weight decay leads to {rotation:.3g} radians per step in the long run"
        return f"{text}, on spheres with learning rate {rate}"

    def __str__(self) -> str:
        if not self.weights:
            return f"{self.model}: no learning rates to match, as no weight is scale-invariant or on spheres"
        width = max(len(weight.name) for weight in self.weights)
        lines = [f"{self.model}: learning rates on spheres that match the next step of {self.settings}"]
        lines += [f"  {weight.name:<{width}}  {weight.next_step}" for weight in self.weights]
        return "\n".join([*lines, f"  {'all':<{width}}  {self.next_step}", f"  {self.long_run}"])


def matched_learning_rates(
    model: nn.Module,
    report: SymmetryReport | None = None,
    *,
    optimizer: str = "sgd",
    lr: float,
    momentum: float = 0.0,
    betas: tuple[float, float] = DEFAULT_BETAS,
    weight_decay: float = 0.0,
    gradients: Iterable[Mapping[str, Tensor]] = (),
    per: str = "sphere",
) -> LearningRates:
    r"""Find the learning rates of `RiemannianSGD` or `RiemannianAdam` that match an optimizer of the plain network.

    For a scale-invariant group w of d entries and norm n = ‖w‖, write u = w/n; then ∂L/∂w = ∂L/∂u / n, tangent to the
    sphere. The radius r of its sphere (1, √k for k filters, or n) does not matter: with the metric ⟨ξ, η⟩/r², w/r takes
    the steps of the unit sphere.

    **Next step.** With the learning rate η_s and empty moments a step turns u by arctan(η_s ‖∂L/∂u‖) with
    `RiemannianSGD` and by arctan(η_s) with `RiemannianAdam`, which has one second moment per sphere.

    - ``"sgd"`` moves w to n((1−ηλ)u − (η/n²) ∂L/∂u). This is exactly the direction of a sphere step with
      **η_s = η/(n²(1−ηλ))**. The same holds with momentum: while n is nearly constant, the momentum buffer is that of
      the sphere divided by n.
    - ``"adam"`` and ``"adamw"`` add a vector s of d entries ±η, of length η√d. The angle is that of a sphere step with
      **η_s = η√d/(n(1−ηλ))**. It is exact if s is orthogonal to w, and otherwise has a relative error of the order of
      1/d + η/n; the directions differ, as s is the sign of the gradient. Entries without a gradient (dead inputs) do
      not move in Adam; they are counted in d although they should not be. In the long run both m/√v shrink by the same
      √((1−β1)/(1+β1)) if gradients are noise.

    **Long run.** If gradients are mostly noise and the rates constant, weight decay λ and the growth of n reach a
    balance at √(2ηλ/(1+μ)) radians per step for SGD and √(2ηλ(1−β1)/(1+β1)) for AdamW. On the sphere a step is
    η_s G/√(1−μ²) or η_s √((1−β1)/(1+β1)) radians, with G² the mean of ‖∂L/∂u‖² = (‖w‖·‖∂L/∂w‖)², so

    - ``"sgd"``: **η_s = √(2ηλ(1−μ))/G**, the rate η/n² at the equilibrium norm n⁴ = ηG²/(2λ(1−μ)). This needs the
      gradients of some mini-batches, which a report does not contain.
    - ``"adamw"``: **η_s = √(2ηλ)**, the rate η√d/n at the equilibrium norm n² = ηd/(2λ); the same for all groups.

    **One second moment per entry.** ``RiemannianAdam(per="entry")`` moves u by a vector of entries ±η_s, as Adam moves
    w by one of entries ±η: its rate is **η/n**, without the √d, and √(2ηλ/d) in the long run.

    **Weights on spheres**, without a report: the optimizer to match is the usual recipe, which updates w as a plain
    weight and then projects it to its sphere of radius r. If the gradient is tangent, or the recipe projects it, the
    steps turn u by the angles above with n = r, whether or not the scale matters to the function. There is no long run
    to match, as the norm is fixed. Use this for weights constrained by `manifold_nets.constrain` or defined on spheres,
    and to match a plain optimizer on converted weights in their present state.

    Biases that are scaled with a group of unit radius (`WeightFinding.moves_along`) need other rates too: times 1/n²
    for SGD, 1/n for Adam.

    Args:
        model: the network as trained by the plain optimizer; not changed.
        report: the report of `manifold_nets.diagnose` for this model; without one, the rates are for the weights that
            are already on spheres.
        optimizer: the torch optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: its learning rate η.
        momentum: μ, without dampening, also Nesterov's (``"sgd"``).
        betas: β1 and β2 (``"adam"``, ``"adamw"``).
        weight_decay: λ (``"sgd"``, ``"adamw"``).
        gradients: for each mini-batch the gradients ∂L/∂w by weight name, at the current weights; for the long run of
            SGD.
        per: ``"sphere"``, or ``"entry"`` for a `RiemannianAdam` with this option.

    Returns:
        Rates in radians per unit gradient (SGD) or radians (Adam), with their spread over the groups of each weight.

    Raises:
        OptionError: an option is out of range or belongs to another optimizer; gradients do not fit the weights; or a
            weight has no values.
        ArgumentTypeError: ``report`` is not a `SymmetryReport`.
        ReportMismatchError: the report belongs to another model.
        DegenerateGroupError: a group is zero or not finite.

    References:
        Hoffer et al., arXiv:1803.01814, for η/n²; Wan et al., arXiv:2006.08419, and Kosson et al., arXiv:2305.17212,
        for the rotation of the long run.

    Example:
        >>> import manifold_nets as mn
        >>> net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = nn.init.constant_(net[0].weight, 0.25)
        >>> rates = mn.matched_learning_rates(net, mn.diagnose(net, torch.randn(16, 4)), lr=0.1)
        >>> round(rates["0.weight"].next_step.median, 6)
        0.4
    """
    if not isinstance(report, SymmetryReport | None):
        raise ArgumentTypeError(
            "report", report, "the report of manifold_nets.diagnose for this model", "Pass diagnose(model, inputs)."
        )
    if per not in ("sphere", "entry") or (per == "entry" and optimizer == "sgd"):
        raise OptionError("per", per, "'sphere', or with optimizers 'adam' and 'adamw' 'entry'")
    settings = OptimizerSettings(optimizer, lr, momentum, betas, weight_decay)
    if report is None:
        rows = [_constrained_row(settings, weight, per) for weight in constrained_weights(model)]
    else:
        rows = _diagnosed_rows(settings, model, report, list(gradients), per)
    weights = tuple(
        WeightRates(name, len(norms), Spread.of(norms), Spread.of(now), _spread([late]), _spread([gradient]))
        for name, norms, now, late, gradient in rows
    )
    now, late = _spread([row[2] for row in rows]), _spread([row[3] for row in rows])
    return LearningRates(type(model).__name__, settings, weights, now, late, held=report is None)


_Row = tuple[str, Tensor, Tensor, Tensor | None, Tensor | None]


def _diagnosed_rows(
    settings: OptimizerSettings,
    model: nn.Module,
    report: SymmetryReport,
    batches: list[Mapping[str, Tensor]],
    per: str,
) -> list[_Row]:
    """Name, norms, both rates and gradients of each weight that a report calls invariant."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    differing = [w.name for w in report.weights if w.name not in parameters or parameters[w.name].shape != w.shape]
    if differing:
        raise ReportMismatchError(type(model).__name__, report.model, differing)
    rows = []
    for finding in report.invariant:
        weight, partition = parameters[finding.name], finding.partition
        if partition is None:
            continue
        if weight.is_meta:
            raise OptionError("model", f"{finding.name} on the meta device", "weights with values")
        norms = partition.norms(weight.detach().double()).flatten()
        refuse_degenerate(norms, finding.name)
        gradient = _gradient_sizes(batches, finding, partition, norms)
        now = _next_step(settings, norms, partition.group_size, per)
        rows.append(
            (finding.name, norms, now, _long_run(settings, norms, partition.group_size, gradient, per), gradient)
        )
    return rows


def _constrained_row(settings: OptimizerSettings, weight: ConstrainedWeight, per: str) -> _Row:
    """The same of a weight on spheres: its radii are its norms, and there is no long run."""
    manifold = weight.manifold
    partition = manifold.joint.sphere.partition if isinstance(manifold, JointSphereMember) else manifold.partition
    return weight.name, manifold.radii, _next_step(settings, manifold.radii, partition.group_size, per), None, None


def _next_step(settings: OptimizerSettings, norms: Tensor, size: int, per: str) -> Tensor:
    """Rates of the groups of a weight that match the next step."""
    shrunk = 1 - settings.lr * settings.weight_decay
    if settings.optimizer == "sgd":
        return settings.lr / (norms.square() * shrunk)
    return settings.lr * math.sqrt(size if per == "sphere" else 1) / (norms * shrunk)


def _long_run(
    settings: OptimizerSettings, norms: Tensor, size: int, gradient: Tensor | None, per: str
) -> Tensor | None:
    """Rates of the groups of a weight that match the rotation in the long run; None where it is not known."""
    factor = settings.equilibrium_factor
    if factor is None:
        return None
    if settings.optimizer != "sgd":
        return torch.full_like(norms, factor / math.sqrt(1 if per == "sphere" else size))
    return None if gradient is None else factor / gradient


def _gradient_sizes(
    batches: list[Mapping[str, Tensor]], finding: WeightFinding, partition: Partition, norms: Tensor
) -> Tensor | None:
    """Root mean square over mini-batches of ‖w_G‖·‖∂L/∂w_G‖; None without gradients of this weight."""
    given = [batch[finding.name] for batch in batches if finding.name in batch]
    if not given:
        return None
    for gradient in given:
        if tuple(gradient.shape) != finding.shape:
            raise OptionError(f"gradients[{finding.name!r}]", tuple(gradient.shape), f"the shape {finding.shape}")
    squares = [partition.norms(gradient.detach().double()).flatten().square() for gradient in given]
    sizes = norms * torch.stack(squares).mean(0).sqrt()
    if not bool((sizes.isfinite() & (sizes > 0)).all()):
        smallest = float(sizes.nan_to_num(nan=0.0, posinf=0.0).min())
        raise OptionError(f"gradients[{finding.name!r}]", smallest, "a finite, non-zero norm of every group")
    return sizes


def _spread(values: list[Tensor | None]) -> Spread | None:
    """Spread of all values together; None where one of them is missing."""
    known = [value for value in values if value is not None]
    return Spread.of(torch.cat(known)) if known and len(known) == len(values) else None
