"""Run a user's model: its inputs, its output tensors, and the errors it raises."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import manifold_nets
from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.float64 import copied, map_tensors, widened

__all__ = ["Inputs", "called", "output_tensors", "run", "split_inputs", "to_float64"]

# Words in the errors of operators without a float64 kernel, or with inputs of different dtypes.
_DTYPES = ("double", "float", "dtype")
_NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}
_TORCH, _OURS = Path(torch.__file__).parent, Path(manifold_nets.__file__).parent

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def split_inputs(example_inputs: Any) -> Inputs:
    """Turn example inputs into positional and keyword inputs.

    A tensor is one positional input; a tuple holds positional inputs; a dict holds keyword inputs; a pair of a tuple
    and a dict holds both.

    Raises:
        ExampleInputsError: the inputs have another form.

    Example:
        >>> split_inputs((torch.zeros(1),))
        ((tensor([0.]),), {})
    """
    example_inputs = map_tensors(_outside_inference_mode, example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], Mapping):
            return example_inputs[0], dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise ExampleInputsError(f"{type(example_inputs).__name__}")


def _outside_inference_mode(leaf: Tensor) -> Tensor:
    """The tensor, or a copy if it was made in inference mode, where gradients cannot depend on it."""
    return leaf.clone() if leaf.is_inference() else leaf


def to_float64(tree: Any, device: torch.device | None = None) -> Any:
    """Cast every floating-point tensor in a tree of inputs to float64 and copy the others, to a device if given."""
    return map_tensors(lambda tensor: widened(tensor.detach()).to(device, copy=True), tree)


def output_tensors(result: Any) -> list[Tensor]:
    """All tensors in a model's output: nested tuples, dictionaries and dataclasses.

    Objects of other classes are searched one level deep. Deeper tensors, such as those in key-value caches of language
    models, count as memory and not as output.

    Example:
        >>> len(output_tensors({"logits": torch.zeros(2), "more": (torch.zeros(1), None)}))
        2
    """
    leaves: list[Tensor] = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
        elif isinstance(leaf, Mapping):
            leaves.extend(tensor for value in leaf.values() for tensor in output_tensors(value))
        elif hasattr(leaf, "__dict__"):
            leaves.extend(value for value in vars(leaf).values() if isinstance(value, Tensor))
    return leaves


def called(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model and return its output.

    Raises:
        ExampleInputsError: the model does not accept the inputs.
        DoublePrecisionError: it accepts them only in lower precision than float64.
    """
    args, kwargs = inputs
    try:
        return model(*args, **kwargs)
    except Exception as error:
        refused: Exception | None = error
        if isinstance(error, AssertionError) or any(word in str(error).lower() for word in _DTYPES):
            refused = _in_single_precision(model, inputs)
        if refused is None:
            raise DoublePrecisionError(type(model).__name__, error, _place(error)) from error
        raise ExampleInputsError(_described(inputs, refused), refused) from refused


def _in_single_precision(model: nn.Module, inputs: Inputs) -> Exception | None:
    """Return the error that a model raises on the same inputs in float32; None if only float64 fails."""

    def narrow(tensor: Tensor) -> Tensor:
        # The casts are meant, also where the conditions of the certificate take them out.
        with torch._C.DisableTorchFunction():
            return tensor.detach().to(_NARROW.get(tensor.dtype, tensor.dtype))

    try:
        args, kwargs = map_tensors(narrow, inputs)
        model_copy: nn.Module = copied(model, narrow)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            model_copy._apply(narrow)(*args, **kwargs)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 (it is the answer)
        return error
    return None


def _described(inputs: Inputs, error: Exception) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    shapes = f"tensors of shapes {[tuple(tensor.shape) for tensor in tensors]}"
    if "dtype" not in str(error):
        return shapes
    return f"{shapes} and dtypes {[str(tensor.dtype).removeprefix('torch.') for tensor in tensors]}"


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the floating-point outputs of a model; raises the errors of `called`."""
    result = called(model, inputs)
    tensors = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in output_tensors(result)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _place(error: BaseException) -> str:
    """The innermost line of the model's own code that an error passed through, or of torch's where there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(_OURS)]
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(_TORCH)]
    last = (own or frames)[-1]
    return f"at line {last.lineno} of {last.filename if own else Path(last.filename).name}, in {last.name}"
