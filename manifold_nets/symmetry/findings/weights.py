"""What is known of one weight: frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from manifold_nets.groups import Partition

__all__ = ["Absorber", "Certificate", "ScaledAlong", "WeightFinding"]

_NO_INFLUENCE = "the network's output does not depend on this weight"


@dataclass(frozen=True)
class Certificate:
    """What the Euler certificate says of one weight.

    Args:
        value: largest |Σ_G w ⊙ ∂L/∂w| / (‖w_G‖ ‖∂L/∂w_G‖) over the groups with evidence; None where none has any.
        verdict: ``"invariant"``, ``"not invariant"`` or ``"no evidence"``.
        groups_certified: groups whose value is below the tolerance.
        groups_refuted: groups whose value is above it.
        groups_without_evidence: groups whose weight or gradient is (nearly) zero.
        taken_at: the normalization at whose output it was taken, as the network's output provably does not depend on
            the weight; empty where it was taken at the network's output.
        because: why groups are without evidence, where it is not only that their gradient vanishes; else empty.
        moved: the largest relative change of an output, in training mode, when all that is claimed of the network is
            moved by finite amounts at once; of what that refutes, when it is moved. None where nothing was moved.
        silent: the numbers of the groups without evidence; not part of the JSON form.
    """

    value: float | None
    verdict: str
    groups_certified: int
    groups_refuted: int
    groups_without_evidence: int
    taken_at: str = ""
    because: str = ""
    moved: float | None = None
    silent: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        moved = self.moved if self.moved is None or math.isfinite(self.moved) else None
        return {**{name: value for name, value in vars(self).items() if name != "silent"}, "moved": moved}

    def __str__(self) -> str:
        value = "" if self.value is None else f" ({self.value:.1e})"
        return f"{self.verdict}{value}{self.contradiction}{self.place}{self.reason}"

    @property
    def contradiction(self) -> str:
        """By how much the outputs change when it is moved, where that refutes it; else empty."""
        if self.verdict != "not invariant" or self.moved is None:
            return ""
        return f", moving it by finite amounts changes the outputs by {self.moved:.2g}"

    @property
    def place(self) -> str:
        """Where it was taken and why, where that is not the network's output; else empty."""
        return f", taken at {self.taken_at}: {_NO_INFLUENCE}" if self.taken_at else ""

    @property
    def reason(self) -> str:
        """How many groups are without evidence and why, where that is known; else empty."""
        count = f", {self.groups_without_evidence} without evidence" if self.verdict != "no evidence" else ""
        return f"{count}: {self.because}" if self.because else ""


@dataclass(frozen=True)
class ScaledAlong:
    """A bias that must be multiplied by the scale of the groups that its entries belong to.

    Args:
        name: the parameter.
        groups: for each entry the number of its group, or −1.
    """

    name: str
    groups: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Absorber:
    """A normalization that removes the scale of a weight's groups.

    Args:
        op: the aten operation.
        module: qualified name of the module that runs it.
        kind: ``"batch"``, ``"instance"``, ``"group"``, ``"layer"``, ``"rms"``, ``"weight"``, ``"quotient"``, or
            ``"buffer"``: statistics kept by hand for evaluation, which follow the scale only as training goes on.
        eps: the eps of the operation, None where it has none of its own.
        weight: the parameter that holds its affine scale, if any.
        bias: the parameter that holds its affine shift, if any.
        running_mean: the buffer with the running mean, which is scaled along.
        running_var: the buffer with the running variance, which is scaled along quadratically.
        calls: how many operations of the network use these running statistics.
        groups: for each channel the number of the weight's group that scales it, −1 for none, −2 for a product of
            several (batch and instance only).
        variances: batch variance of each channel on the example inputs, float64 (batch only).
    """

    op: str
    module: str
    kind: str
    eps: float | None = None
    weight: str | None = None
    bias: str | None = None
    running_mean: str | None = None
    running_var: str | None = None
    calls: int = 1
    groups: tuple[int, ...] = field(default=(), repr=False)
    variances: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without the values channel by channel."""
        return {name: value for name, value in vars(self).items() if name not in ("groups", "variances")}

    def __str__(self) -> str:
        return f"{self.module or 'model'} ({self.op})"


@dataclass(frozen=True)
class WeightFinding:
    """What is known of one weight.

    Args:
        name: the parameter; tied ones go by their first name.
        shape: its shape.
        layer: class of the module that owns it.
        status: ``"invariant"`` (structure found and certified), ``"not invariant"``, ``"unknown"`` (an operation has
            no rule, or one that covers sufficient conditions only), ``"no evidence"`` (the gradient vanishes),
            ``"disagreement"`` (structure and certificate contradict each other, or moving it contradicts both) or
            ``"constrained"`` (invariant and already on spheres).
        partition: the finest partition into invariant groups; None where there is none.
        filters_per_group: how many filters one group joins.
        absorbers: the normalizations that remove the scale.
        scaled_along: the biases that must be scaled with the weight.
        certificate: what the numbers say.
        broken_by: why a weight has no such groups: operation, module, reason.
        remedy: what to do about it.
        free_filters: how many filters are free by themselves in a weight of which others are not.
        free_groups: how many groups of filters these are, each explained and certified by a family of the report.
        finer_groups: how many invariant groups the weight has where no view of its shape expresses them, so that
            ``partition`` joins some; 0 where ``partition`` is the finest one.
    """

    name: str
    shape: tuple[int, ...]
    layer: str
    status: str
    partition: Partition | None
    filters_per_group: int
    absorbers: tuple[Absorber, ...]
    scaled_along: tuple[ScaledAlong, ...]
    certificate: Certificate
    broken_by: str | None
    remedy: str
    free_filters: int = 0
    finer_groups: int = 0
    free_groups: int = 0

    @property
    def groups_in_words(self) -> str:
        """The partition, and how many groups it has in truth where no view expresses them; empty where none."""
        if self.partition is None:
            return ""
        finer = f", which joins {self.finer_groups} finer groups that no view expresses" if self.finer_groups else ""
        return f"{self.partition}{finer}"

    @property
    def moves_along(self) -> tuple[str, ...]:
        """Names of the biases and running statistics that change when the weight is rescaled."""
        buffers = [n for a in self.absorbers for n in (a.running_mean, a.running_var) if n is not None]
        return tuple(dict.fromkeys([*(bias.name for bias in self.scaled_along), *buffers]))

    @property
    def convert_remedy(self) -> str | None:
        """Name under which `convert` may do something about it; the plan says whether it does."""
        return "spheres" if self.status == "invariant" else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "layer": self.layer,
            "status": self.status,
            "partition": None if self.partition is None else self.partition.to_dict(),
            "groups": None if self.partition is None else self.partition.n_groups,
            "filters_per_group": self.filters_per_group,
            "finer_groups": self.finer_groups,
            "free_groups": self.free_groups,
            "free_filters": self.free_filters,
            "absorbers": [absorber.to_dict() for absorber in self.absorbers],
            "moves_along": list(self.moves_along),
            "certificate": self.certificate.to_dict(),
            "broken_by": self.broken_by,
            "remedy": self.remedy,
            "convert_remedy": self.convert_remedy,
        }
