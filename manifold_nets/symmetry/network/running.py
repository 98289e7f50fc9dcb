"""Running the copy of a model that is analysed, and saying why it does not run."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.symmetry.network.graph import Inputs, output_tensors

__all__ = ["called", "run"]

# How torch names float64 where an operator lacks a kernel for it, or where it meets another dtype.
_DOUBLE = ("Double", "double", "float64")


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
        if any(word in str(error) for word in _DOUBLE):
            raise DoublePrecisionError(type(model).__name__, error, _place(error)) from error
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        raise ExampleInputsError(f"tensors of shapes {shapes}", error) from error


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Floating-point outputs of a model; it raises what `called` does."""
    result = called(model, inputs)
    tensors = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in output_tensors(result)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _place(error: BaseException) -> str:
    """The innermost line of code outside of torch that an error passed through."""
    inside = Path(torch.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(inside)]
    return f"at line {frames[-1].lineno} of {Path(frames[-1].filename).name}, in {frames[-1].name}"
