"""A conversion as data: the names of the remedies, an action, and a plan of actions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from manifold_nets.conversion.moves import RemovedBias, ScaledWeight
from manifold_nets.conversion.remedies.balance import Rescaling
from manifold_nets.errors import OptionError, ParameterNameError, near_matches
from manifold_nets.groups import Partition
from manifold_nets.symmetry import SymmetryFamily

__all__ = ["ACTION_OF", "REMEDIES", "Action", "ConversionPlan", "Remedy", "chosen_remedies"]

Remedy = Literal["dead-biases", "balance", "spheres", "joint-spheres"]
# In the order in which they are carried out, with the word for doing it.
ACTION_OF: dict[Remedy, str] = {
    "dead-biases": "remove",
    "balance": "balance",
    "spheres": "sphere",
    "joint-spheres": "joint sphere",
}
REMEDIES: tuple[Remedy, ...] = tuple(ACTION_OF)


@dataclass(frozen=True)
class Action:
    """One action of a plan: what to do about one symmetry.

    Args:
        name: the parameter; for an action on several parameters, the remedy and a number.
        action: ``"sphere"`` (put the weight on a product of spheres), ``"already"`` (it is on one), ``"remove"``
            (remove a bias without effect), ``"balance"`` (rescale to the smallest norm), ``"joint sphere"`` (put
            several weights together on one sphere per group) or ``"leave"``.
        reason: why, in words.
        partition: the groups, if there are any.
        radius: ``"unit"``: each group gets norm √k, where k is its number of filters; ``"keep"``: groups keep their
            norms.
        train_deviation: relative change that unit radius causes in the training-mode output of the layer's
            normalization on the example inputs; None if not computed, 0 if nothing changes.
        remedy: the remedy in `REMEDIES` that the action belongs to.
        members: the parts of parameters that the action changes, if there are several.
        move: how values change when the action is applied; not part of the JSON form.
    """

    name: str
    action: Literal["sphere", "already", "leave", "remove", "balance", "joint sphere"]
    reason: str
    partition: Partition | None = None
    radius: Literal["unit", "keep"] | None = None
    train_deviation: float | None = None
    remedy: Remedy = "spheres"
    members: tuple[str, ...] = ()
    move: ScaledWeight | RemovedBias | SymmetryFamily | None = field(default=None, repr=False, compare=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the action changes."""
        return self.move.parameters if isinstance(self.move, SymmetryFamily) else (self.name,)

    def left(self, reason: str) -> Action:
        """The same action turned into "leave"."""
        return self if self.action == "leave" else replace(self, action="leave", reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "remedy": self.remedy,
            "action": self.action,
            "reason": self.reason,
            "partition": None if self.partition is None else self.partition.to_dict(),
            "radius": self.radius,
            "train_deviation": self.train_deviation,
            "members": list(self.members),
        }

    def __str__(self) -> str:
        what = f"{self.partition}, {self.radius} radius: " if self.action == "sphere" else ""
        members = f"{', '.join(self.members[:4])}{' …' if self.members[4:] else ''}: " if self.members else ""
        return f"{self.action:<7}  {what}{members}{self.reason}"


@dataclass(frozen=True)
class ConversionPlan:
    """One action for every weight of the report, in the order of the model, then the actions of the other remedies.

    They are applied in the order of `REMEDIES`: dead biases are removed, rescalings are balanced, and then weights are
    put on spheres.

    Args:
        model: name of the network.
        actions: the actions.
        example_inputs: inputs on which the result is compared.
        rescaling: the factors of the planned `balance` actions. If the weights have changed by the time the plan is
            applied, the search for the smallest norm starts from these.
    """

    model: str
    actions: tuple[Action, ...]
    example_inputs: Any = field(default=None, repr=False, compare=False)
    rescaling: Rescaling | None = field(default=None, repr=False, compare=False)

    def of(self, action: str) -> tuple[Action, ...]:
        """Return the actions of one kind, such as ``"remove"``."""
        return tuple(found for found in self.actions if found.action == action)

    @property
    def spheres(self) -> tuple[Action, ...]:
        """The actions that put a weight on spheres."""
        return self.of("sphere")

    def without_data(self) -> ConversionPlan:
        """Drop what copies and pickles of a model should not contain: inputs, and per-channel numbers."""
        actions = tuple(replace(action, move=None) for action in self.actions)
        return replace(self, actions=actions, example_inputs=None, rescaling=None)

    @property
    def effective(self) -> tuple[Action, ...]:
        """The actions that change something, or whose change was already made."""
        return tuple(action for action in self.actions if action.action != "leave")

    def __getitem__(self, name: str) -> Action:
        for action in self.actions:
            if action.name == name:
                return action
        raise ParameterNameError("plan", name, [action.name for action in self.actions])

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"model": self.model, "actions": [action.to_dict() for action in self.actions]}

    def __str__(self) -> str:
        width = max((len(a.name) for a in self.actions), default=0)
        weights = [a for a in self.actions if a.remedy == "spheres"]
        lines = [f"{self.model}: {len(self.spheres)} of {len(weights)} weights will be put on spheres"]
        lines += [f"  {a.name:<{width}}  {a}" for a in self.actions]
        return "\n".join(lines)


def chosen_remedies(remedies: str | Iterable[str]) -> tuple[Remedy, ...]:
    """Return the named remedies in the order in which they are applied.

    Args:
        remedies: one name, several separated by commas, a collection of names, or ``"all"``.

    Raises:
        OptionError: a name is unknown, or there is none.

    Example:
        >>> chosen_remedies("spheres,balance")
        ('balance', 'spheres')
    """
    names = [name.strip() for name in remedies.split(",")] if isinstance(remedies, str) else list(remedies)
    if names == ["all"]:
        return REMEDIES
    unknown = [name for name in names if name not in REMEDIES]
    if not names or unknown:
        near = near_matches(str(unknown[0]), REMEDIES) if unknown else ""
        raise OptionError("remedies", remedies, f"'all', or some of {', '.join(map(repr, REMEDIES))}", near)
    return tuple(remedy for remedy in REMEDIES if remedy in names)
