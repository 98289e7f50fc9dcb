"""Entries of parameters that are not finite: one of them makes all gradients of a network NaN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manifold_nets.groups import Partition
from manifold_nets.symmetry.network.twin import is_continuous

__all__ = ["draw_not_finite", "groups_not_finite"]


def draw_not_finite(twin: nn.Module) -> dict[str, Tensor]:
    """Draw the entries of a copy's parameters anew that are not finite, and return where they are.

    What the certificate says of the other groups then holds, as their symmetries do not depend on these values; the
    tensors themselves are not written to, as they may be shared with the model.

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
    for name, parameter in twin.named_parameters():
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
