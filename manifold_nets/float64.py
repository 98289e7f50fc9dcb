"""Run models in float64, whatever dtypes their forward pass asks for.

The copy under analysis has float64 weights and inputs. Forward passes also create tensors in torch's default dtype,
hold constants that are not buffers, and cast to float32. Under `in_float64` all of these become float64. This affects
only the current thread: torch's default dtype, which all threads share, does not change.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Reading", "copied", "following", "holds_objects", "in_float64", "map_tensors", "tensors_in", "widened"]

_WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_CASTS = {
    Tensor.float: torch.float64,
    Tensor.half: torch.float64,
    Tensor.bfloat16: torch.float64,
    Tensor.cfloat: torch.complex128,  # type: ignore[attr-defined]
    Tensor.chalf: torch.complex128,
}
# Their result has torch's default dtype where none is given. That of others follows from what they are given.
_FACTORIES = [getattr(torch, name) for name in "empty eye linspace logspace ones rand randn zeros".split()]
_DEEPCOPY: Any = Tensor.__deepcopy__
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
# Types without tensors inside.
_ATOMS = (type(None), str, bytes, bool, int, float, complex, torch.dtype, torch.device)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float64, or complex128, where it has real or complex numbers."""
    return tensor.to(_WIDE.get(tensor.dtype, tensor.dtype))


class _Float64(TorchFunctionMode):
    """Gives tensors that forward creates, casts or holds the precision of the weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        if func in _CASTS:
            return args[0].to(_CASTS[func], **kwargs)
        if func in _FACTORIES and kwargs.get("dtype") is None and "out" not in kwargs:
            kwargs = {**kwargs, "dtype": torch.float64}
        leaves = list(_leaves((args, kwargs)))
        # Tensor.view reads the bits as they are.
        if func is not Tensor.view and any(isinstance(leaf, (torch.dtype, type)) for leaf in leaves):
            args, kwargs = _map(_wide_dtype, args), _map(_wide_dtype, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        narrow = [tensor for tensor in tensors if tensor.dtype in _WIDE]
        if narrow and len(narrow) < sum(map(_has_numbers, tensors)):
            args, kwargs = _mixed(name, args, kwargs)
        if func is nn.functional.batch_norm:
            # Running statistics may be kept as frozen parameters: of the copy all parameters ask for gradients.
            args = (*args[:1], *_map(_detached, args[1:3]), *args[3:])
            kwargs |= {name: _detached(kwargs[name]) for name in ("running_mean", "running_var") if name in kwargs}
        result = func(*args, **kwargs)
        return result if narrow or func is Tensor.view else _map(_wide_tensor, result)


def _mixed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cast arguments to one precision; the target of an in-place write is not replaced by a copy.

    Constants that have not met another tensor keep their own precision, so that views of them stay views.
    """
    written = [kwargs["out"]] if isinstance(kwargs.get("out"), Tensor) else []
    if args and ((name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name[:3] == "__i"):
        written.append(args[0])
    for target in written:
        # A buffer that forward creates for itself.
        if type(target) is Tensor and target.dtype in _WIDE and target.is_leaf and target._base is None:
            target.data = widened(target.data)

    def wide(value: Any) -> Any:
        return value if any(value is target for target in written) else _wide_tensor(value)

    return _map(wide, args), _map(wide, kwargs)


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Change the leaves of nested arguments; containers other than lists, tuples and dictionaries count as leaves."""
    if type(value) is tuple or type(value) is list:
        return type(value)([_map(change, part) for part in value])
    if type(value) is dict:
        return {key: _map(change, part) for key, part in value.items()}
    return change(value)


def _leaves(value: Any) -> Iterator[Any]:
    """The leaves of nested arguments."""
    for part in value.values() if type(value) is dict else value:
        if type(part) in (tuple, list, dict):
            yield from _leaves(part)
        else:
            yield part


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide_dtype(value: Any) -> Any:
    if isinstance(value, type) and value.__module__ == "torch":  # torch.FloatTensor
        value = getattr(value, "dtype", value)
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _wide_tensor(value: Any) -> Any:
    return widened(value) if isinstance(value, Tensor) and value.dtype in _WIDE else value


def in_float64() -> contextlib.AbstractContextManager[Any]:
    """Give every tensor that a forward pass creates, casts or holds the float64 precision of its weights and inputs.

    Example:
        >>> with in_float64():
        ...     print(torch.zeros(1).dtype, torch.ones(1, dtype=torch.int64).float().dtype)
        torch.float64 torch.float64
    """
    return _Float64()


def following(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The same if a model is in float64; otherwise run it unchanged."""
    narrow = any(parameter.dtype in _WIDE for parameter in nn.Module.parameters(model))
    return contextlib.nullcontext() if narrow else _Float64()


class Reading(TorchFunctionMode):
    """Lets every operation read other values in place of some parameters.

    Args:
        parameters: names and parameters, by `id`.
        read: returns the float64 values to read, given the name and the parameter.
    """

    def __init__(self, parameters: Mapping[int, tuple[str, Tensor]], read: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.parameters, self.read = parameters, read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            if func == _DTYPE and id(args[0]) in self.parameters:
                return torch.float64  # as those see it that read the parameter
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(self._read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _read(self, leaf: Any) -> Any:
        known = self.parameters.get(id(leaf))
        return leaf if known is None else self.read(*known)


# ---- copies ----------------------------------------------------------------------------------------------------------


class _Copying(TorchFunctionMode):
    """Changes tensors while an object that holds them is copied."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.changed = change, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _DEEPCOPY or id(args[0]) in args[1]:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        changed = self.change(tensor)
        if changed is tensor:
            return func(*args, **(kwargs or {}))
        self.changed += 1
        memo[id(tensor)] = changed
        return changed


def copied(value: Any, change: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> Any:
    """Deep copy with tensors changed wherever they are: in attributes, containers and nested objects.

    Parameters are copied without change.
    """
    with _Copying(change):
        return copy.deepcopy(value, memo)


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Change the tensors in a tree of inputs, also inside objects, which are copied for this.

    Example:
        >>> from types import SimpleNamespace
        >>> map_tensors(lambda x: x + 1, [torch.zeros(1), SimpleNamespace(x=torch.ones(1), n=3)])
        [tensor([1.]), namespace(x=tensor([2.]), n=3)]
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, _ATOMS):
            return value
        try:
            with _Copying(change) as copying:
                changed = copy.deepcopy(value)
        except Exception:  # noqa: BLE001  what cannot be copied is passed on as it is
            return value
        return changed if copying.changed else value

    return pytree.tree_map(leaf, tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in a tree of inputs, also inside objects."""
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor.new_empty(0)  # so that it is not copied

    map_tensors(look, tree)
    return found


def holds_objects(tree: Any) -> bool:
    """Whether inputs hold tensors inside objects of classes that torch does not know."""
    return len(tensors_in(tree)) > sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))
