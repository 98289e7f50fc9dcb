"""Which weights of a model lie on which manifold, recorded on the modules that own them.

`geoopt.ManifoldParameter` carries its manifold, but the parameter object itself is replaced by
``load_state_dict(assign=True)``, ``to("meta")`` with ``to_empty``, and sharding, and the manifold is lost with it. So
each module also records the manifolds of its own weights. The record is no parameter, buffer or hook: it changes
neither `state_dict` nor the forward pass, and it follows deep copies and pickles of the module.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import geoopt
from torch import Tensor, nn

from manifold_nets.manifold import SphereProduct

__all__ = ["ConstrainedWeight", "attach", "constrained_weights", "detach", "lost_constraints", "restore"]

_RECORD = "_manifold_nets_constraints"
_live_records: weakref.WeakSet[_Constraints] = weakref.WeakSet()


class _Constraints:
    """The manifolds of one module's own weights; knows its module, also after a deep copy or a pickle."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = weakref.ref(owner)
        self.manifolds: dict[str, SphereProduct] = {}
        _live_records.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner(), "manifolds": self.manifolds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owner = state["owner"]
        self.owner = weakref.ref(owner) if owner is not None else lambda: None  # type: ignore[assignment]
        self.manifolds = state["manifolds"]
        _live_records.add(self)


@dataclass(frozen=True)
class ConstrainedWeight:
    """A weight of a model that lies on a product of spheres: where it is, and on which."""

    name: str
    module: nn.Module
    leaf: str
    manifold: SphereProduct

    @property
    def parameter(self) -> Tensor:
        """The tensor that is now in the weight's place, whatever its type."""
        return self.module.get_parameter(self.leaf)


def attach(module: nn.Module, leaf: str, manifold: SphereProduct, point: Tensor | None = None) -> None:
    """Put the weight ``module.<leaf>`` on a manifold: a `geoopt.ManifoldParameter` plus a record on the module.

    Args:
        module: owner of the weight.
        leaf: name of the weight in the module, for instance ``"weight"``.
        manifold: the product of spheres.
        point: the new value; the present one when left out. It is used as it is, without projection.
    """
    old = module._parameters[leaf]
    data = (old if point is None else point).detach()  # type: ignore[union-attr]
    requires_grad = old is None or old.requires_grad
    setattr(module, leaf, geoopt.ManifoldParameter(data, manifold=manifold, requires_grad=requires_grad))
    record = module.__dict__.get(_RECORD)
    if record is None or record.owner() is not module:
        fresh = _Constraints(module)
        fresh.manifolds.update(record.manifolds if record is not None else {})
        module.__dict__[_RECORD] = record = fresh
    record.manifolds[leaf] = manifold


def detach(module: nn.Module, leaf: str) -> None:
    """Turn the weight ``module.<leaf>`` into a plain parameter with the same values and forget its manifold."""
    old = module._parameters[leaf]
    setattr(module, leaf, nn.Parameter(old.detach().as_subclass(Tensor), requires_grad=old.requires_grad))  # type: ignore[union-attr]
    record = module.__dict__.get(_RECORD)
    if record is not None:
        record.manifolds.pop(leaf, None)
        if not record.manifolds:
            del module.__dict__[_RECORD]


def constrained_weights(model: nn.Module) -> Iterator[ConstrainedWeight]:
    """Yield every weight of a model that lies on a product of spheres, in the order of ``named_parameters``.

    A weight shared by several modules is yielded once, under its first name. A `geoopt.ManifoldParameter` that was
    put on a `SphereProduct` by hand counts as well.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        record = module.__dict__.get(_RECORD)
        for leaf, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            manifold = record.manifolds.get(leaf) if record is not None else None
            if manifold is None:
                manifold = getattr(parameter, "manifold", None)
            if isinstance(manifold, SphereProduct):
                seen.add(id(parameter))
                yield ConstrainedWeight(f"{prefix}.{leaf}" if prefix else leaf, module, leaf, manifold)


def restore(model: nn.Module) -> list[str]:
    """Make every recorded weight a `geoopt.ManifoldParameter` again where its object was replaced.

    The values are left as they are. Tied weights stay tied.

    Returns:
        Names of the weights whose parameter object was renewed.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> _ = layer.load_state_dict(torch.nn.Linear(4, 3).state_dict(), assign=True)
        >>> mn.restore(layer)
        ['weight']
    """
    renewed: dict[int, nn.Parameter] = {}
    names = []
    for weight in list(constrained_weights(model)):
        parameter = weight.parameter
        if isinstance(parameter, geoopt.ManifoldParameter):
            continue
        attach(weight.module, weight.leaf, weight.manifold)
        renewed[id(parameter)] = weight.parameter  # type: ignore[assignment]
        names.append(weight.name)
    for module in model.modules():
        for leaf, tied in module._parameters.items():
            if id(tied) in renewed:
                setattr(module, leaf, renewed[id(tied)])
    return names


def lost_constraints(parameters: Iterable[Tensor]) -> list[str]:
    """Return the weights among plain parameters that some living module records as constrained."""
    wanted = {id(p) for p in parameters if not isinstance(p, geoopt.ManifoldParameter)}
    lost = []
    for record in list(_live_records):
        owner = record.owner()
        if owner is None:
            continue
        for leaf in record.manifolds:
            if id(owner._parameters.get(leaf)) in wanted:
                lost.append(f"{type(owner).__name__}.{leaf}")
    return lost
