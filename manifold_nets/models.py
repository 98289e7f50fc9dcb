"""Copies of a user's model, above all for analysis: in float64 and training mode, without dropout.

A copy includes what `copy.deepcopy` alone cannot copy (weights computed by old-style hooks), and leaves out compilers
and parallel wrappers. If a model cannot be analysed, the error names the module that prevents it. The model itself is
never changed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from manifold_nets.errors import AnalysisError, UnsupportedModelError
from manifold_nets.float64 import copied, widened
from manifold_nets.gathered import is_sharded
from manifold_nets.groups import Partition

__all__ = [
    "analysis_copy",
    "disable_cache",
    "draw_not_finite",
    "dtype_of",
    "duplicate",
    "groups_not_finite",
    "holders",
    "is_continuous",
    "is_meta",
    "named_tensors",
    "one_module_per_name",
    "other_values",
    "random_numbers",
    "state_kept",
]

_DROPOUT_ATTRIBUTES = (
    "p drop_prob drop_rate dropout dropout_p dropout_rate layerdrop encoder_layerdrop decoder_layerdrop "
    "activation_dropout attention_dropout hidden_dropout"
).split()
# Wrappers that run another module, by class name and the name of its child: their machinery cannot be traced.
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_SCRIPTS: tuple[type, ...] = (torch.jit.ScriptModule,)
# How a model gets from its shards to whatever needs a whole one, and back.
_WHOLE = (
    "Load its full state (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
    "StateDictOptions(full_state_dict=True)) into a whole model, and shard what comes out."
)
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def is_continuous(tensor: Tensor) -> bool:
    """Whether the entries are real or complex numbers, which can be differentiated.

    Example:
        >>> is_continuous(torch.zeros(2)), is_continuous(torch.zeros(2, dtype=torch.int8))
        (True, False)
    """
    return tensor.is_floating_point() or tensor.is_complex()


def is_meta(model: nn.Module) -> bool:
    """Whether some parameter has a shape but no values."""
    # Not `model.parameters()`, here and elsewhere, because some networks override it.
    return any(parameter.is_meta for parameter in nn.Module.parameters(model))


@contextlib.contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """Seed torch, numpy and Python, and restore their random states afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002  models draw from this one
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restore a model's state at the end: buffers, and attributes that forward assigns.

    A backward pass must be inside, as it may need the changed state.
    """
    modules = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    values = [(b, b.detach().clone()) for _, _, buffers in modules for b in buffers.values() if b is not None]
    try:
        yield
    finally:
        for module, attributes, buffers in modules:
            module.__dict__.update(attributes)
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, before in values:
                buffer.copy_(before)


@contextlib.contextmanager
def other_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Temporarily give some parameters of a model other values."""
    saved = [(parameter, parameter.data, name) for name, parameter in model.named_parameters() if name in values]
    try:
        for parameter, _, name in saved:
            parameter.data = values[name]
        yield
    finally:
        for parameter, before, _ in saved:
            parameter.data = before


def duplicate(
    model: nn.Module,
    shared: dict[int, nn.Parameter] | None = None,
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> nn.Module:
    """Deep copy of a model; tensors that hooks computed from parameters are copied as values.

    ``torch.nn.utils.weight_norm`` and ``spectral_norm`` leave such tensors as attributes, and `copy.deepcopy` raises an
    error on them; the hooks compute them anew before the next forward pass.

    Args:
        model: the model.
        shared: replacements of some parameters, by their `id`.
        change: applied to tensors that are not parameters.

    Raises:
        AnalysisError: the model cannot be copied.

    Example:
        >>> type(duplicate(nn.Linear(2, 2))).__name__
        'Linear'
    """
    memo: dict[int, Any] = {
        id(value): change(value.detach().clone())
        for module in model.modules()
        for value in module.__dict__.values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        model_copy: nn.Module = copied(model, change, {**memo, **(shared or {})})
    except Exception as error:
        if any(map(is_sharded, model.parameters())):
            raise UnsupportedModelError(type(model).__name__, "a sharded model, which has no copy", _WHOLE) from error
        raise AnalysisError(type(model).__name__, error, copying=True) from error
    return model_copy


def analysis_copy(model: nn.Module, shared: dict[int, nn.Parameter] | None = None) -> nn.Module:
    """Deep copy of a model for analysis: float64, training mode, no gradients, no dropout; the model is not changed.

    If parameters to share with the model are given, the copy keeps the model's precision. Modules in evaluation mode
    inside a model in training mode stay in evaluation mode, because that is how normalizations are frozen. In a model
    that is in evaluation mode as a whole, nothing counts as frozen.

    Raises:
        AnalysisError: the model cannot be copied.
        UnsupportedModelError: the model is scripted or quantized, or has parameters without a shape.
    """
    _refuse_unsupported(model)
    model_copy = _unwrapped(duplicate(model, shared) if shared is not None else duplicate(model, change=widened))
    frozen = [module for module in model_copy.modules() if not module.training] if model.training else []
    if shared is None:
        model_copy._apply(widened)  # type: ignore[no-untyped-call]
    model_copy.train()
    disable_cache(model_copy)
    for module in frozen:
        module.training = False
    for module in model_copy.modules():
        _disable_dropout(module)
        if getattr(module, "momentum", 0.0) is None and isinstance(module, _BatchNorm):
            # A cumulative average counts batches, which torch.export cannot follow; the outputs are the same.
            module.momentum = 0.1
        config = module.__dict__.get("config")
        if config is not None:
            _configure(config)
    for parameter in nn.Module.parameters(model_copy):
        parameter.grad = None
        parameter.requires_grad_(is_continuous(parameter))
    return model_copy


def disable_cache(model: nn.Module) -> None:
    """Turn off the key-value cache of a language model, which is no output of the network."""
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and getattr(config, "use_cache", None) is True:
            config.use_cache = False


def _configure(config: Any) -> None:
    """Apply to a copied transformers model what its configuration decides."""
    _disable_dropout(config)
    if getattr(config, "_experts_implementation", None) == "grouped_mm":
        # torch has no grouped product of float64 matrices; the batched one computes the same function.
        config._experts_implementation = "batched_mm"


def _refuse_unsupported(model: nn.Module) -> None:
    """Raise an error if the model has scripted, quantized or lazy modules."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if isinstance(module, _SCRIPTS):
            found = f"{path or 'the model'} is a {type(module).__name__}, compiled to TorchScript"
            raise UnsupportedModelError(name, found, "Pass the original Python module.")
        if type(module).__module__.startswith(_QUANTIZED):
            found = f"{path or 'the model'} is a quantized {type(module).__name__}, whose weights are packed integers"
            raise UnsupportedModelError(name, found, "Analyse and convert the model before it is quantized.")
    for path, parameter in model.named_parameters():
        lazy: bool = is_lazy(parameter)  # named, as a guard of types would narrow the parameter
        if lazy:
            found = f"the parameter {path} of a lazy module, which has no shape yet"
            raise UnsupportedModelError(name, found, "Run the model once on example inputs first.")
        if is_sharded(parameter):
            raise UnsupportedModelError(name, f"the parameter {path}, which is sharded", _WHOLE)


def inner_model(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and ``torch.compile``, or the model itself.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> inner_model(nn.DataParallel(inner)) is inner
        True
    """
    while (child := _WRAPPERS.get(type(model).__name__)) is not None and child in model._modules:
        model = model.get_submodule(child)
    return model


def _unwrapped(module: nn.Module) -> nn.Module:
    """Replace compilers and parallel wrappers inside a copy by the module they hold; names stay the same."""
    child = _WRAPPERS.get(type(module).__name__)
    if child is not None and child in module._modules:
        module = _Bare(child, module.get_submodule(child), training=module.training)
    for name, inner in list(module.named_children()):
        replaced = _unwrapped(inner)
        if replaced is not inner:
            module._modules[name] = replaced
    return module


class _Bare(nn.Module):
    """Runs its only child under the name that a wrapper gave it."""

    def __init__(self, name: str, inner: nn.Module, *, training: bool) -> None:
        super().__init__()
        self.add_module(name, inner)
        self._inner, self.training = name, training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self._inner](*args, **kwargs)  # type: ignore[misc]


def _disable_dropout(holder: Any) -> None:
    """Set the dropout probabilities among the attributes of a module, or of its configuration, to zero."""
    attributes = vars(holder) if hasattr(holder, "__dict__") else {}
    for attribute in _DROPOUT_ATTRIBUTES:
        if isinstance(attributes.get(attribute), float):
            setattr(holder, attribute, 0.0)


@contextlib.contextmanager
def one_module_per_name(model: nn.Module) -> Iterator[None]:
    """Temporarily give each name of a shared module an object of its own.

    `torch.export` names an operation after the module that runs it. If that module has several names, it records how
    the forward pass reached it instead, such as ``blocks.slice(1, None, None).0``, which is not a name in the model.
    """
    replaced: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
    seen = {id(model)}

    def visit(parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            if id(child) in seen:
                replaced.append((parent._modules, name, child))
                parent._modules[name] = child = _alias(child)
            seen.add(id(child))
            visit(child)

    visit(model)
    try:
        yield
    finally:
        for modules, name, child in replaced:
            modules[name] = child


def _alias(module: nn.Module) -> nn.Module:
    """Another object with the attributes of a module, and with children that can be replaced by themselves."""
    alias: nn.Module = object.__new__(type(module))
    # Without children the very dictionary is shared: what forward assigns to one is seen by the other.
    alias.__dict__ = {**module.__dict__, "_modules": {**module._modules}} if module._modules else module.__dict__
    return alias


def draw_not_finite(model_copy: nn.Module) -> dict[str, Tensor]:
    """Replace the non-finite entries of a copy's parameters by random numbers, and return where they are.

    The gradient test of the other groups stays valid, as their symmetries do not depend on these values. The tensors
    are not overwritten, as they may be shared with the model.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.constant_(layer.weight[1], float("nan"))
        >>> draw_not_finite(layer)
        {'weight': tensor([[False, False],
            [ True,  True]])}
        >>> bool(layer.weight.isfinite().all())
        True
    """
    found = {}
    for name, parameter in model_copy.named_parameters():
        if parameter.is_meta or not is_continuous(parameter) or not parameter.numel() or _is_finite(parameter.detach()):
            continue
        found[name] = ~parameter.detach().isfinite()
        drawn = torch.randn(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        parameter.data = torch.where(found[name], drawn, parameter.detach())
    return found


def groups_not_finite(entries: Tensor, partition: Partition) -> list[int]:
    """The numbers of the groups with such entries."""
    counts = partition.sum(entries.to(torch.float64)).flatten()
    return [int(number) for number in counts.nonzero().flatten().tolist()]


def _is_finite(values: Tensor) -> bool:
    """Whether all entries are finite, without a temporary tensor of their size."""
    low, high = (torch.view_as_real(values) if values.is_complex() else values).aminmax()
    return bool(low.isfinite() & high.isfinite())


# ---- looking up tensors ----------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter; float32 if there is none."""
    return next((p.dtype for p in nn.Module.parameters(model) if p.is_floating_point()), torch.float32)


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter, with their attributes, by the `id` of the parameter."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, leaf))
    return found
