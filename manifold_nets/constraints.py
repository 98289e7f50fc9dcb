"""Record which weights of a model lie on which manifold, on the modules that own them.

`geoopt.ManifoldParameter` carries its manifold, but ``load_state_dict(assign=True)``, ``to("meta")`` with ``to_empty``,
and sharding replace the parameter object, and the manifold is lost with it. So each module also records the manifolds
of its own weights. The record is not a parameter or buffer: it changes neither `state_dict` nor the forward pass, and
it survives deep copies and pickling of the module. A hook of `load_state_dict` raises an error on values that are off
their spheres: the next optimizer step would project them without rescaling biases and statistics.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.weak import WeakIdKeyDictionary

from manifold_nets._geoopt import geoopt
from manifold_nets.errors import ConstraintError, listed
from manifold_nets.gathered import whole
from manifold_nets.joint_sphere import JointSphere, JointSphereMember, by_joint_sphere
from manifold_nets.manifold import SphereProduct
from manifold_nets.models import holders

__all__ = ["ConstrainedWeight", "attach", "constrained_weights", "detach", "joint_spheres", "restore"]

# A weight that has been through half precision counts as on its spheres: the first step puts it back exactly. One
# that was made for other spheres, or for none, is farther off than this.
NEAR = torch.finfo(torch.bfloat16).eps

_RECORD = "_manifold_nets_constraints"
_live_records: weakref.WeakSet[_Constraints] = weakref.WeakSet()
# Optimizers, whose parameter groups list manifolds too.
_holders: weakref.WeakSet[Any] = weakref.WeakSet()
# Parameters that a constrained one has replaced but that something, such as an optimizer, still holds.
_replaced: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Constrained parameters that a plain one has replaced.
_released: WeakIdKeyDictionary = WeakIdKeyDictionary()
_last_change = 0


class LoadHook:
    """A hook that runs before a module is loaded; it knows its module, also after a deep copy or a pickle."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Callable[[], nn.Module | None] = weakref.ref(module)
        module._register_load_state_dict_pre_hook(self)  # type: ignore[no-untyped-call]
        check_values_last(module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "module": self.module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["module"]
        vars(self).update(state, module=(lambda: None) if module is None else weakref.ref(module))


class _Constraints(LoadHook):
    """The manifolds of one module's own weights."""

    def __init__(self, module: nn.Module) -> None:
        # A shallow copy shares this record and the parameters, and may outlive the module.
        self.parameters, self.kind = module._parameters, type(module).__name__
        self.manifolds: dict[str, SphereProduct] = {}
        # Weights that a conversion put on their spheres, and the median norm of their groups before, where known.
        self.converted: dict[str, float | None] = {}
        # Weights that `manifold_nets.constrain` put there.
        self.defined: set[str] = set()
        _live_records.add(self)
        super().__init__(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _live_records.add(self)

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each recorded weight, with the parameter in its place or those that it is now made of."""
        module = self.module()
        parameters = self.parameters if module is None else module._parameters
        for leaf in self.manifolds:
            present = parameters.get(leaf)
            if present is not None:
                found = [present]
            else:
                # So torch's weight_norm, spectral_norm and pruning name what they make a weight of.
                found = [p for name, p in parameters.items() if p is not None and name.startswith(f"{leaf}_")]
                if module is not None and is_parametrized(module, leaf):
                    found += module.parametrizations[leaf].parameters()  # type: ignore[union-attr,index]
            yield from ((f"{self.kind}.{leaf}", parameter) for parameter in found)

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before `load_state_dict`: raise where the values for a constrained weight are off its spheres.

        A joint sphere is seen from the model only.
        """
        if not TRUSTED.get():
            self.require_points(state_dict, prefix)

    def require_points(self, state_dict: Mapping[str, Any], prefix: str, changing: Container[int] = ()) -> None:
        """Raise where a value is off its spheres, but for those of manifolds about to change, given by their `id`."""
        for leaf, manifold in self.manifolds.items():
            value = state_dict.get(prefix + leaf)
            if id(manifold) in changing or isinstance(manifold, JointSphereMember):
                continue
            if has_norms(value, manifold):
                remedy = _remedy(prefix + leaf, converted=leaf in self.converted, defined=leaf in self.defined)
                manifold.require_point(whole(value), prefix + leaf, rtol=NEAR, remedy=remedy)


TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)
"""Whether `load_state_dict` takes values as they are; see `trusted_values`."""


@contextmanager
def trusted_values() -> Iterator[None]:
    """Let `load_state_dict` accept values without checking, when they are known to lie on other spheres."""
    token = TRUSTED.set(True)
    try:
        yield
    finally:
        TRUSTED.reset(token)


def _record_of(module: nn.Module) -> _Constraints | None:
    record: _Constraints | None = module.__dict__.get(_RECORD)
    return record


@dataclass(frozen=True)
class ConstrainedWeight:
    """A weight of a model that lies on a product of spheres: its module, its name, and the manifold."""

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

    Attributes and hooks of the parameter are moved to the new object.

    Args:
        module: owner of the weight.
        leaf: name of the weight in the module, for instance ``"weight"``.
        manifold: the product of spheres.
        point: the new value (default: the present one). It is used without projection.

    Raises:
        ConstraintError: the module has no such weight, or its shape is not the manifold's.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> sphere = SphereProduct((3, 4))
        >>> attach(layer, "weight", sphere, sphere.projx(layer.weight))
        >>> [(weight.name, weight.manifold) for weight in constrained_weights(layer)]
        [('weight', SphereProduct(3 filters of 4, radius 1) manifold)]
    """
    old = _weight_of(module, leaf)
    data = (old if point is None else point).detach()
    _require_shape(f"{type(module).__name__}.{leaf}", data, manifold)
    new = geoopt.ManifoldParameter(data, manifold=manifold, requires_grad=old.requires_grad)
    if point is None:
        new.grad = old.grad
    copy_attributes(old, new)
    setattr(module, leaf, new)
    global _last_change
    _replaced[old] = f"{type(module).__name__}.{leaf}"
    _last_change += 1
    record = _record_of(module)
    if record is None or record.module() is not module:
        # A shallow copy shares the hooks of its original.
        module._load_state_dict_pre_hooks = OrderedDict(module._load_state_dict_pre_hooks)
        remove_load_hook(module, _Constraints)
        fresh = _Constraints(module)
        if record is not None:
            fresh.manifolds.update(record.manifolds)
            fresh.converted.update(record.converted)
            fresh.defined.update(record.defined)
        module.__dict__[_RECORD] = record = fresh
    record.manifolds[leaf] = manifold


def detach(module: nn.Module, leaf: str) -> None:
    """Turn the weight ``module.<leaf>`` into a plain parameter with the same values, and delete its record.

    Raises:
        ConstraintError: the module has no such weight.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> detach(layer, "weight")
        >>> type(layer.weight).__name__
        'Parameter'
    """
    old = _weight_of(module, leaf)
    new = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
    new.grad = old.grad
    copy_attributes(old, new)
    setattr(module, leaf, new)
    record = _record_of(module)
    if record is not None:
        record.manifolds.pop(leaf, None)
        record.converted.pop(leaf, None)
        record.defined.discard(leaf)
        if not record.manifolds:
            del module.__dict__[_RECORD]
            remove_load_hook(module, _Constraints)


def everywhere(places: Iterable[tuple[nn.Module, str]], change: Callable[[nn.Module, str], object]) -> None:
    """Change a parameter in every module that holds it; all get the result for the first one.

    Args:
        places: the modules and their names for it, as found by `manifold_nets.models.holders`.
        change: the change, such as `detach`.

    Example:
        >>> first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        >>> second.weight = first.weight
        >>> everywhere([(first, "weight"), (second, "weight")], detach)
        >>> second.weight is first.weight
        True
    """
    held: nn.Parameter | None = None
    for module, leaf in places:
        change(module, leaf)
        held = module.get_parameter(leaf) if held is None else held
        setattr(module, leaf, held)


def copy_attributes(old: Tensor, new: Tensor, *, share: bool = True) -> None:
    """Copy the attributes and hooks of a parameter to its replacement.

    Args:
        old: the old parameter.
        new: the new one.
        share: whether removing a hook by its handle removes it from both; False for copies.

    Example:
        >>> old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        >>> old._no_weight_decay = True
        >>> handle = old.register_hook(lambda gradient: 2 * gradient)
        >>> copy_attributes(old, new)
        >>> new.sum().backward()
        >>> new.grad, new._no_weight_decay
        (tensor([2., 2.]), True)
    """
    new.__dict__.update({name: value for name, value in old.__dict__.items() if name != "manifold"})
    for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(old, kind, None)
        if hooks:
            setattr(new, kind, hooks if share else OrderedDict(hooks))


def remove_load_hook(module: nn.Module, kind: type) -> list[Any]:
    """Remove a module's pre-load hooks of one kind; handles do not survive pickling."""
    hooks = module._load_state_dict_pre_hooks
    # torch wraps a hook.
    return [hooks.pop(n) for n, held in list(hooks.items()) if isinstance(getattr(held, "hook", held), kind)]


def check_values_last(module: nn.Module) -> None:
    """Run the check of loaded values after the hooks of a module that change them."""
    for held in remove_load_hook(module, _Constraints):
        module._register_load_state_dict_pre_hook(getattr(held, "hook", held))  # type: ignore[no-untyped-call]


def require_loadable(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, changing: Container[int]) -> None:
    """Check all values for constrained weights before `load_state_dict` copies the first of them.

    Args:
        model: the model.
        state_dict: the values.
        prefix: prefix of the model's names.
        changing: the `id` of each manifold that is about to be replaced.

    Raises:
        OffManifoldError: values are off the spheres of their weight.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        record = _record_of(module)
        if record is not None:
            record.require_points(state_dict, f"{prefix}{path}." if path else prefix, changing)


def has_norms(value: Any, manifold: SphereProduct) -> TypeGuard[Tensor]:
    """Whether an object is a tensor with values in a manifold's shape; torch raises its own errors on the rest."""
    return (
        isinstance(value, Tensor)
        and not value.is_meta
        and not is_lazy(value)
        and value.is_floating_point()
        and tuple(value.shape) == manifold.partition.shape
    )


def _remedy(name: str, *, converted: bool, defined: bool) -> str:
    if converted:
        return (
            "The state is that of a plain network. Load the whole of it into the model that manifold_nets.convert "
            "returned, which scales biases and running statistics along; or load it into the plain network, and "
            "convert that."
        )
    plain = (
        "Load it into the plain network, which manifold_nets.unconstrain(model) makes of it, and constrain that again. "
        if defined
        else "Load it into the plain network, which manifold_nets.revert(model) gives, and convert that with "
        "manifold_nets.convert(plain, example_inputs), which keeps the function. "
    )
    return (
        f"{plain}If only its directions are wanted, put the value on its spheres first: "
        f"state[{name!r}] = manifold.projx(value)."
    )


def note_converted(module: nn.Module, leaf: str, norm: float | None) -> None:
    """Record that conversion put a weight on its spheres, and the median norm of its groups before."""
    module.__dict__[_RECORD].converted[leaf] = norm


def is_converted(weight: ConstrainedWeight) -> bool:
    """Whether a conversion put a weight on its spheres, and rescaled biases and statistics with it."""
    record = _record_of(weight.module)
    return record is not None and weight.leaf in record.converted


def note_defined(module: nn.Module, leaf: str) -> None:
    """Record that a weight was put on spheres by name, without a conversion."""
    module.__dict__[_RECORD].defined.add(leaf)


def is_defined(weight: ConstrainedWeight) -> bool:
    """Whether a weight was put on its spheres by name, without a conversion."""
    record = weight.module.__dict__.get(_RECORD)
    return record is not None and weight.leaf in record.defined


def converted_norms(parameters: Iterable[Tensor]) -> dict[int, float]:
    """Return the median group norms that converted weights had before, by the `id` of the parameter."""
    places = {
        id(record.parameters.get(leaf)): norm
        for record in list(_live_records)
        for leaf, norm in record.converted.items()
        if norm is not None
    }
    return {id(p): places[id(p)] for p in parameters if id(p) in places}


def holds_manifolds(optimizer: Any) -> None:
    """Register an optimizer whose parameter groups list manifolds, so that `change_manifolds` updates it."""
    _holders.add(optimizer)


def change_manifolds(model: nn.Module, new: Mapping[int, SphereProduct]) -> None:
    """Replace manifolds by others with the same groups, in a model and in its optimizers.

    Args:
        model: the model.
        new: the new manifolds by the `id` of the present ones.
    """
    for module in model.modules():
        record = _record_of(module)
        if record is not None:
            record.manifolds.update({leaf: new.get(id(m), m) for leaf, m in record.manifolds.items()})
        for parameter in module._parameters.values():
            if isinstance(parameter, geoopt.ManifoldParameter):
                parameter.manifold = new.get(id(parameter.manifold), parameter.manifold)
    for optimizer in list(_holders):
        optimizer._change_manifolds(new)


def last_change() -> int:
    """Return a counter that grows whenever a weight is constrained or taken off its spheres."""
    return _last_change


def was_replaced(parameter: Tensor) -> bool:
    """Whether a constrained weight has replaced this parameter, which no longer belongs to a model.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> old, sphere = layer.weight, SphereProduct((3, 4))
        >>> attach(layer, "weight", sphere, sphere.projx(layer.weight))
        >>> was_replaced(old), was_replaced(layer.weight)
        (True, False)
    """
    return parameter in _replaced


def note_released(parameter: Tensor, name: str) -> None:
    """Record that a plain parameter has replaced a constrained one, which no longer belongs to a model."""
    global _last_change
    _released[parameter] = name
    _last_change += 1


def released_names(parameters: Iterable[Tensor]) -> list[str]:
    """Return the names of those parameters that `manifold_nets.unconstrain` replaced by plain ones."""
    return [_released[parameter] for parameter in parameters if parameter in _released]


def _weight_of(module: nn.Module, leaf: str) -> nn.Parameter:
    weight = module._parameters.get(leaf)
    if weight is None:
        present = listed(name for name, value in module._parameters.items() if value is not None) or "none"
        raise ConstraintError(f"{type(module).__name__}.{leaf}", "no parameter of this name", f"one of: {present}")
    return weight


def _require_shape(name: str, data: Tensor, manifold: SphereProduct) -> None:
    if tuple(data.shape) != manifold.partition.shape:
        raise ConstraintError(name, f"shape {tuple(data.shape)}", f"the manifold's shape {manifold.partition.shape}")


def constrained_weights(model: nn.Module) -> Iterator[ConstrainedWeight]:
    """Yield every weight of a model that lies on a product of spheres, in the order of ``named_parameters``.

    A weight shared by several modules is yielded once, under its first name. A `geoopt.ManifoldParameter` that was put
    on a `SphereProduct` by hand counts too; the manifold of a parameter takes precedence over the record.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        record = _record_of(module)
        recorded = {} if record is None else record.manifolds
        for leaf, parameter in module._parameters.items():
            manifold = getattr(parameter, "manifold", None) or recorded.get(leaf)
            if parameter is not None and id(parameter) not in seen and isinstance(manifold, SphereProduct):
                seen.add(id(parameter))
                yield ConstrainedWeight(f"{prefix}.{leaf}" if prefix else leaf, module, leaf, manifold)


def restore(model: nn.Module) -> list[str]:
    """Make every recorded weight a `geoopt.ManifoldParameter` again if its parameter object was replaced.

    No value changes. Tied weights stay tied.

    Returns:
        Names of the weights that got a new parameter object.

    Raises:
        ConstraintError: a replaced weight has another shape than its manifold; the model is unchanged.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> _ = layer.load_state_dict(mn.layers.UnitNormLinear(4, 3).state_dict(), assign=True)
        >>> mn.restore(layer)
        ['weight']
    """
    lost = [w for w in constrained_weights(model) if not isinstance(w.parameter, geoopt.ManifoldParameter)]
    for weight in lost:
        _require_shape(weight.name, weight.parameter, weight.manifold)
    places = holders(model)
    # All places are looked up first: a freed object would lend its identity to a new one.
    for weight, held in [(weight, places[id(weight.parameter)]) for weight in lost]:
        everywhere(held, functools.partial(attach, manifold=weight.manifold))
    return [weight.name for weight in lost]


def joint_spheres(model: nn.Module) -> list[tuple[JointSphere, tuple[ConstrainedWeight, ...]]]:
    """Return every joint sphere of a model, with its weights in order.

    Raises:
        ConstraintError: the model has only some of the weights of a joint sphere.

    Example:
        >>> from manifold_nets.groups import Partition
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 2))
        >>> joint = JointSphere({"0.weight": Partition.filters((2, 3)), "1.weight": Partition.filters((2, 5))})
        >>> for layer, manifold, point in zip(net, joint.manifolds, joint.projx([net[0].weight, net[1].weight])):
        ...     attach(layer, "weight", manifold, point)
        >>> ((sphere, weights),) = joint_spheres(net)
        >>> [weight.name for weight in weights], float(sphere.deviations([w.parameter for w in weights]).max()) < 1e-6
        (['0.weight', '1.weight'], True)
    """
    found = by_joint_sphere((weight.manifold, weight) for weight in constrained_weights(model))
    for joint, members in found.items():
        missing = joint.missing(members)
        if missing:
            present = next(iter(members.values())).name
            raise ConstraintError.joint(present, missing, f"a model without {', '.join(missing)}")
    return [(joint, tuple(members.values())) for joint, members in found.items()]


def lost_constraints(parameters: Iterable[Tensor]) -> list[str]:
    """Return the constrained weights behind some plain parameters, by the records of living modules, in order.

    This includes parameters from which a constrained weight is computed (`torch.nn.utils.weight_norm`), flat parameters
    that contain it, and parameters that it has replaced.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> _ = layer.load_state_dict(mn.layers.UnitNormLinear(4, 3).state_dict(), assign=True)
        >>> lost_constraints(layer.parameters())
        ['UnitNormLinear.weight']
    """
    names = {id(p): name for record in list(_live_records) for name, p in record.places()}
    found = []
    for parameter in parameters:
        # torch raises its own error on anything that is not a tensor.
        if isinstance(parameter, geoopt.ManifoldParameter) or not isinstance(parameter, Tensor):
            continue
        former: str | None = _replaced.get(parameter)  # type: ignore[no-untyped-call]
        name = names.get(id(parameter)) or former or _name_in_flat(parameter)
        if name is not None:
            found.append(name)
    return found


def recorded_name(parameter: Tensor) -> str | None:
    """Return the name of a constrained weight in its module; None if no living module records it.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> recorded_name(layer.weight)
        'UnitNormLinear.weight'
    """
    places = (place for record in list(_live_records) for place in record.places())
    return next((name for name, held in places if held is parameter), None)


def _name_in_flat(parameter: Tensor) -> str | None:
    """Return the first constrained weight in a flat parameter of `FullyShardedDataParallel`, if there is one."""
    for info in getattr(parameter, "_param_infos", ()):
        record = _record_of(info.module)
        if record is not None and info.param_name in record.manifolds:
            return f"{record.kind}.{info.param_name}"
    return None
