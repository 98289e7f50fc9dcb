"""Running the copy of a model that is analysed, and saying why it does not run."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import manifold_nets
from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.symmetry.network.graph import Inputs, output_tensors
from manifold_nets.symmetry.network.precision import copied, map_tensors

__all__ = ["called", "run"]

# What errors speak of where an operator lacks a kernel for float64, or where it meets another dtype.
_DTYPES = ("double", "float", "dtype")
_NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}
_TORCH, _OURS = Path(torch.__file__).parent, Path(manifold_nets.__file__).parent


def called(model: nn.Module, inputs: Inputs) -> Any:
    """What a model returns.

    Raises:
        ExampleInputsError: the model refuses the inputs.
        DoublePrecisionError: it refuses them for being in float64.
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
        raise ExampleInputsError(_told(inputs, refused), refused) from refused


def _in_single_precision(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What a model says of the same inputs in float32; None where it takes them, and float64 is what it refuses."""

    def narrow(tensor: Tensor) -> Tensor:
        # The casts are meant, also where the conditions of the certificate take them out.
        with torch._C.DisableTorchFunction():
            return tensor.detach().to(_NARROW.get(tensor.dtype, tensor.dtype))

    try:
        args, kwargs = map_tensors(narrow, inputs)
        copy_of_model: nn.Module = copied(model, narrow)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            copy_of_model._apply(narrow)(*args, **kwargs)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 (it is the answer)
        return error
    return None


def _told(inputs: Inputs, error: Exception) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    shapes = f"tensors of shapes {[tuple(tensor.shape) for tensor in tensors]}"
    if "dtype" not in str(error):
        return shapes
    return f"{shapes} and dtypes {[str(tensor.dtype).removeprefix('torch.') for tensor in tensors]}"


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Floating-point outputs of a model; it raises what `called` does."""
    result = called(model, inputs)
    tensors = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in output_tensors(result)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _place(error: BaseException) -> str:
    """The innermost line of the model's own code that an error passed through, or of torch's where there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(_OURS)]
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(_TORCH)]
    last = (own or frames)[-1]
    return f"at line {last.lineno} of {last.filename if own else Path(last.filename).name}, in {last.name}"
