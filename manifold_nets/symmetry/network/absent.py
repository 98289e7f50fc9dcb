"""Tensors of zeros that take neither memory nor time, in place of the values that a model on the meta device lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["absent"]

_READ: dict[Any, Any] = {
    Tensor.tolist: lambda x: np.zeros(tuple(x.shape)).tolist(),
    Tensor.numpy: lambda x: np.zeros(tuple(x.shape)),
    Tensor.item: lambda x: 0.0,
    Tensor.__float__: lambda x: 0.0,
    Tensor.__int__: lambda x: 0,
    Tensor.__bool__: lambda x: False,
    Tensor.cpu: lambda x: x,
}


class _Absent(Tensor):
    """A meta tensor: operations work out shapes only, and what is read from their results is zero."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _READ.get(func)
        if read is not None:
            return read(args[0])
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def absent(shape: Sequence[int]) -> Tensor:
    """Return zeros of a shape, float64, that stay zeros whatever is done to them.

    Example:
        >>> field = absent((100_000, 100_000))
        >>> (field * field).sum(1)[:2].tolist()
        [0.0, 0.0]
    """
    return torch.empty(tuple(shape), dtype=torch.float64, device="meta").as_subclass(_Absent)
