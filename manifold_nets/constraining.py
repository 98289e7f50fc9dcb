"""Put weights of a model on spheres by name, without a diagnosis, and take them off again."""

from __future__ import annotations

import fnmatch
import functools
import math
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from manifold_nets.constraints import (
    NEAR,
    attach,
    constrained_weights,
    detach,
    everywhere,
    is_converted,
    note_defined,
    note_released,
)
from manifold_nets.errors import ArgumentTypeError, ConstraintError, OptionError, listed, near_matches
from manifold_nets.gathered import is_sharded
from manifold_nets.groups import Partition, filter_partition
from manifold_nets.joint_sphere import by_joint_sphere
from manifold_nets.layers import UNIT_NORM_LAYERS
from manifold_nets.manifold import SphereProduct
from manifold_nets.models import holders, inner_model
from manifold_nets.padded import PaddedSphereProduct, padding_of

__all__ = ["Constrained", "ConstrainedNorms", "constrain", "unconstrain"]

Names = str | Iterable[str] | Callable[[str], bool]
Per = Literal["filter", "row", "column", "tensor", "head"] | Partition

_PER = ("filter", "row", "column", "tensor", "head")
# What modules of attention call the number of features of a head.
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_PLAIN_LAYERS = {unit_norm: plain for plain, unit_norm in UNIT_NORM_LAYERS.items()}


@dataclass(frozen=True)
class ConstrainedNorms:
    """A weight that `constrain` put on spheres, and how its norms changed.

    Args:
        name: the parameter.
        manifold: its spheres.
        smallest: smallest norm of its groups before; the padding row of an embedding does not count.
        median: the median; for an even number of groups, the lower of the middle two.
        largest: the largest norm.
        change: relative change of the weight, ‖w_after − w_before‖/‖w_before‖.
    """

    name: str
    manifold: SphereProduct
    smallest: float
    median: float
    largest: float
    change: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "manifold": self.manifold.to_dict()}

    def __str__(self) -> str:
        norms = f"{self.smallest:.3g} … {self.largest:.3g} (median {self.median:.3g})"
        if self.change == 0:
            return f"{self.manifold.partition}; norms {norms} kept"
        radius = self.manifold.uniform_radius
        return f"{self.manifold.partition}; norms {norms} set to {radius:g}; the weight changed by {self.change:.2%}"


@dataclass(frozen=True)
class Constrained:
    """The record of `constrain`; print it for a description.

    Args:
        model: class of the model.
        weights: one entry for each weight that was put on spheres.

    Example:
        >>> import manifold_nets as mn
        >>> record = mn.constrain(nn.Linear(4, 3), "weight", radius="keep")
        >>> [weight.name for weight in record.weights], record.function_kept
        (['weight'], True)
    """

    model: str
    weights: tuple[ConstrainedNorms, ...]

    @property
    def function_kept(self) -> bool:
        """Whether no value changed, so that the function is the same, bit for bit."""
        return all(weight.change == 0 for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"model": self.model, "weights": [weight.to_dict() for weight in self.weights]}

    def __str__(self) -> str:
        width = max(len(weight.name) for weight in self.weights)
        lines = [f"{self.model}: {len(self.weights)} weight{'s'[: len(self.weights) - 1]} put on spheres"]
        lines += [f"  {weight.name:<{width}}  {weight}" for weight in self.weights]
        return "\n".join([*lines, f"  {_SAME if self.function_kept else _CHANGED}"])


_SAME = (
    "The function is the same. From now on the norms are fixed: training turns the groups but cannot scale them. This "
    "restricts the functions that the model can reach, unless a later layer can compensate for the scale."
)
_CHANGED = (
    "The function changed: rescaling a weight is not a symmetry in general. The output stays the same only if a "
    "normalization or another weight compensates for the scale; manifold_nets.convert finds such weights and keeps the "
    "function."
)


@torch.no_grad()
def constrain(model: nn.Module, names: Names, *, per: Per = "filter", radius: float | str = 1.0) -> Constrained:
    r"""Put weights on products of spheres by name: from then on ‖w_G‖ = r for each of their groups G.

    Use this for models that need fixed norms, such as dictionaries of sparse autoencoders, class weights of cosine
    classifiers, and embeddings. It is **not a symmetry** in general: setting the norms, ``w_G ← r w_G/‖w_G‖``, changes
    the function, and keeping them fixed restricts what training can reach. For weights whose scale does not matter,
    `manifold_nets.convert` keeps the function. The returned record shows what changed and by how much.

    The parameters become `geoopt.ManifoldParameter` objects with the same names, shapes and dtypes. Build optimizers
    afterwards, from `manifold_nets.param_groups`; an optimizer without support for spheres raises an error before its
    first step. `manifold_nets.save` and ``load`` and `state_dict` keep the constraint. The padding row of a
    `torch.nn.Embedding` stays zero.

    Args:
        model: any module, changed in place; on an error it is unchanged. Inside DistributedDataParallel or
            ``torch.compile`` names are those of the inner model.
        names: names of parameters (any name of a shared one), shell patterns (``"layer1.*"``), names of modules for
            their weights of at least two dimensions, or a predicate on the names of such weights.
        per: which entries share a norm. ``"filter"``: those of one output channel, also in transposed convolutions;
            ``"row"`` and ``"column"``: those with one index along axis 0 or 1; ``"tensor"``: all; ``"head"``: the rows
            of one attention head (blocks of the module's ``head_dim`` rows); or a `Partition` of the weight's shape.
        radius: r, positive and finite; or ``"keep"``: every group keeps its own norm, and no value changes.

    Returns:
        The weights in the order of the model, with their norms before and the effect on the function.

    Raises:
        OptionError: a name or a pattern matches no weight.
        OptionError: ``per`` or ``radius`` has another value.
        ArgumentTypeError: the model is not a module, or ``names`` has another type.
        ConstraintError: a weight is on spheres already, has no values, cannot be divided as requested, or would have
            spheres of one entry; or the radius is too large or too small for its dtype.
        DegenerateGroupError: a group is zero or not finite, so it has no direction.

    References:
        Unit-norm dictionaries: Bricken et al., *Towards monosemanticity* (2023); class weights on spheres: Deng et al.,
        ArcFace, arXiv:1801.07698; one sphere for each matrix: arXiv:2606.16899.

    Example:
        >>> import manifold_nets as mn
        >>> autoencoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> record = mn.constrain(autoencoder, "2.weight", per="column")
        >>> autoencoder[2].weight.norm(dim=0).allclose(torch.ones(16)), record.function_kept
        (True, False)
    """
    if radius != "keep" and not (isinstance(radius, int | float) and 0 < radius < math.inf):
        raise OptionError("radius", radius, "a positive finite number, or 'keep'")
    if not (isinstance(per, Partition) or per in _PER):
        raise OptionError("per", per, f"{', '.join(map(repr, _PER))}, or a manifold_nets.Partition")
    wrapped, model = model, _inner(model)
    # All that may be refused is found out before anything changes.
    chosen = _selected(wrapped, model, dict(model.named_parameters()), names)
    planned = [_planned(model, name, per, radius) for name in chosen]
    _warn_of_averages(wrapped)
    held = holders(model)
    for _, (module, leaf), manifold, point in planned:
        everywhere(held[id(module.get_parameter(leaf))], functools.partial(_put, manifold=manifold, point=point))
    return Constrained(type(model).__name__, tuple(row for row, *_ in planned))


def unconstrain(model: nn.Module, names: Names | None = None) -> list[str]:
    """Turn weights on spheres into plain parameters again; no value changes.

    Args:
        model: the model, changed in place.
        names: as for `constrain`, among the weights on spheres (default: all except those that `manifold_nets.convert`
            put there; use `manifold_nets.revert` for these).

    Returns:
        The names of the weights that are now plain. Build optimizers afterwards.

    Raises:
        OptionError: a name or a pattern matches no weight on spheres.
        ArgumentTypeError: the model is not a module, or ``names`` has another type.
        ConstraintError: a weight was put on its spheres by a conversion.
        ConstraintError: a weight shares its sphere with weights that were not named.

    Example:
        >>> import manifold_nets as mn
        >>> layer = nn.Linear(4, 3)
        >>> _ = mn.constrain(layer, "weight")
        >>> mn.unconstrain(layer), type(layer.weight).__name__
        (['weight'], 'Parameter')
    """
    wrapped, model = model, _inner(model)
    present = {weight.name: weight for weight in constrained_weights(model)}
    if names is None:
        chosen = [weight for weight in present.values() if not is_converted(weight)]
    elif not present:
        raise OptionError("names", names, "None, as no weight of the model is on spheres")
    else:
        on_spheres = {name: weight.parameter for name, weight in present.items()}
        chosen = [present[name] for name in _selected(wrapped, model, on_spheres, names)]
    for weight in chosen:
        if is_converted(weight):
            found = "a weight on spheres by conversion"
            expected = "one from manifold_nets.constrain; manifold_nets.revert takes converted ones off"
            raise ConstraintError(weight.name, found, expected)
    for joint, members in by_joint_sphere((weight.manifold, weight) for weight in chosen).items():
        if len(members) < len(joint.names):
            raise ConstraintError.joint(next(iter(members.values())).name, joint.missing(members))
    if chosen:
        _warn_of_averages(wrapped)
    held = holders(model)
    for weight in chosen:
        old = weight.parameter
        everywhere(held[id(old)], detach)
        note_released(old, f"{type(weight.module).__name__}.{weight.leaf}")
        for module, _ in held[id(old)]:
            # A unit-norm layer would put the weight on spheres again when it is reset.
            module.__class__ = _PLAIN_LAYERS.get(type(module), type(module))
    return [weight.name for weight in chosen]


def _put(module: nn.Module, leaf: str, manifold: SphereProduct, point: Tensor | None) -> None:
    attach(module, leaf, manifold, point)
    note_defined(module, leaf)


def _inner(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, whose names are those that count."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", model, "a torch.nn.Module", "Pass the model that holds the weights.")
    return inner_model(model)


def _warn_of_averages(model: nn.Module) -> None:
    """Warn where the wrapper of a model goes on with the former parameters."""
    if model is not inner_model(model) and any(type(m).__name__ == "DistributedDataParallel" for m in model.modules()):
        warnings.warn(
            "The parameters of the model were replaced, but DistributedDataParallel still averages the gradients of "
            "the old ones. Wrap the model again, or change constraints before wrapping it.",
            stacklevel=4,
        )


def _selected(wrapped: nn.Module, model: nn.Module, candidates: Mapping[str, Tensor], names: Names) -> list[str]:
    """The names that were asked for, in the order of the model.

    A name stands for its parameter, whatever it is; patterns, modules and predicates pick among matrices and the like.
    A shared parameter answers to all its names, and one in a wrapper also to that with the wrapper's in front.
    """
    remedy = "Pass a name, a shell pattern such as 'layer1.*', a list of these, or a predicate on names."
    if isinstance(names, nn.Module):
        raise OptionError("names", f"the module {type(names).__name__} itself", "its name in the model")
    if not (callable(names) or isinstance(names, Iterable)):
        raise ArgumentTypeError("names", names, "names of weights", remedy)
    first = {id(parameter): name for name, parameter in candidates.items()}
    known = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in first}
    wide = [n for n, own in known.items() if is_lazy(candidates[own]) or candidates[own].ndim >= 2]
    offered = f"of {listed(wide, 40)}" if wide else "of a weight; none here has two dimensions or more"
    found: set[str] = set()
    patterns = [names] if isinstance(names, str) else [] if callable(names) else list(names)
    if callable(names):
        found = {name for name in wide if names(name)}
        if not found:
            raise OptionError("names", names, f"a predicate that holds for the name {offered}")
    prefix = next((f"{path}." for path, module in wrapped.named_modules() if path and module is model), "")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentTypeError("names", pattern, "names of weights", remedy)
        own = _matching(pattern, known, wide) or _matching(pattern.removeprefix(prefix), known, wide)
        if not own:
            expected = f"a name or a pattern such as 'layer1.*' {offered}"
            raise OptionError("names", pattern, expected, near_matches(pattern, wide))
        found |= own
    if not found:
        raise OptionError("names", [], "the name of at least one weight")
    chosen = {known[name] for name in found}
    return [name for name in candidates if name in chosen]


def _matching(pattern: str, known: Container[str], wide: Iterable[str]) -> set[str]:
    """The names that a name, a pattern or the name of a module stands for."""
    if pattern in known:
        return {pattern}
    return {name for name in wide if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")}


Planned = tuple[ConstrainedNorms, tuple[nn.Module, str], SphereProduct, Tensor | None]


def _planned(model: nn.Module, name: str, per: Per, radius: float | str) -> Planned:
    """What is to be said of a weight, where it is, its spheres, and its point on them; None where no value changes."""
    prefix, _, leaf = name.rpartition(".")
    module, weight = model.get_submodule(prefix), model.get_parameter(name)
    _require_free(name, module, weight)
    partition, padding = _partition(model, name, per), padding_of(module, leaf)
    if partition.group_size == 1:
        found = "spheres of one entry each, which could never move"
        raise ConstraintError(name, found, "groups of two entries or more, as with per='tensor'")
    norms = partition.norms(weight.detach().double()).flatten()
    manifold: SphereProduct
    radii: Any = norms if radius == "keep" else radius
    if padding is not None and partition == Partition.filters(weight.shape):
        counted = torch.cat([norms[:padding], norms[padding + 1 :]])
        if radius == "keep":
            radii = norms.index_fill(0, torch.tensor(padding, device=norms.device), 1.0)
        PaddedSphereProduct(partition, padding).refuse_degenerate(weight.detach(), name)
        manifold = PaddedSphereProduct(partition, padding, radius=radii)
    else:
        SphereProduct(partition).refuse_degenerate(weight.detach(), name)
        counted, manifold = norms, SphereProduct(partition, radius=radii)
    # Norms that are right to rounding are left as they are.
    is_there = float(manifold.deviations(weight.detach()).max()) <= 4 * torch.finfo(weight.dtype).eps
    point = None if is_there else manifold.projx(weight.detach())
    tiny = torch.finfo(weight.dtype).tiny
    if point is not None and not (
        float(manifold.deviations(point).max()) <= NEAR and float(manifold.radii.min()) >= tiny
    ):
        raise ConstraintError(name, f"radius {radius}", f"one that {weight.dtype} can hold")
    change = 0.0 if point is None else float((point - weight).double().norm() / weight.detach().double().norm())
    low, middle, high = (float(value) for value in (counted.min(), counted.median(), counted.max()))
    return ConstrainedNorms(name, manifold, low, middle, high, change), (module, leaf), manifold, point


def _require_free(name: str, module: nn.Module, weight: Tensor) -> None:
    manifold = next((w.manifold for w in constrained_weights(module) if w.parameter is weight), None)
    expected = "a plain parameter with values; manifold_nets.unconstrain takes weights off their spheres"
    if manifold is not None:
        raise ConstraintError(name, f"a weight on {manifold} already", expected)
    if getattr(weight, "manifold", None) is not None:
        raise ConstraintError(name, f"a weight on {weight.manifold}", expected)  # type: ignore[attr-defined]
    if is_lazy(weight) or weight.is_meta or not weight.is_floating_point():
        found = "no values yet" if is_lazy(weight) or weight.is_meta else f"dtype {weight.dtype}"
        raise ConstraintError(name, found, "real numbers; run or fill the model first")
    if is_sharded(weight):
        raise ConstraintError(name, "a sharded weight", "a whole one: constrain before fully_shard")
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        raise ConstraintError(name, "a parameter under a parametrization", "the weight without parametrization")
    if getattr(module, "max_norm", None) is not None:
        raise ConstraintError(name, f"max_norm={module.max_norm}, which rescales rows", "max_norm=None")


def _partition(model: nn.Module, name: str, per: Per) -> Partition:
    """The groups of a weight."""
    weight, (prefix, _, leaf) = model.get_parameter(name), name.rpartition(".")
    shape = tuple(weight.shape)
    if isinstance(per, Partition):
        if per.shape != shape:
            raise ConstraintError(name, f"shape {shape}", f"the shape of the partition, {per.shape}")
        return per
    if per == "tensor":
        return Partition.whole(shape)
    if len(shape) < (2 if per == "column" else 1):
        raise ConstraintError(name, f"shape {shape}", f"a shape with the axis that per={per!r} needs")
    if per == "column":
        return Partition(shape, shape, (1,))
    if per == "head":
        size = _head_size(model, prefix)
        if size is None or shape[0] % size:
            found = "no head_dim in its modules" if size is None else f"{shape[0]} rows for heads of {size}"
            raise ConstraintError(name, found, "whole heads, or per=Partition.blocks(shape, number_of_heads)")
        return Partition.blocks(shape, shape[0] // size)
    if per == "filter" and leaf == "weight":
        return filter_partition(model.get_submodule(prefix))
    return Partition.filters(shape)


def _head_size(model: nn.Module, path: str) -> int | None:
    """The number of rows of a head: what the module, or the next one around it that knows, says."""
    parts = path.split(".") if path else []
    for length in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:length]))
        for name in _HEAD_SIZES:
            size = getattr(module, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return None
