"""Initial weights that are not the model's own."""

from __future__ import annotations

import torch
from torch import nn

from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.models.forms import weight_layers
from manifold_nets.groups import Partition, filter_partition

__all__ = ["balance_weights"]


@torch.no_grad()
def balance_weights(model: nn.Module, seed: int) -> None:
    """Draw the weights of every linear and convolution layer anew, in place: filters of norm 1, biases 0.

    Entries are drawn from a normal distribution of standard deviation 0.01, then every filter is divided by its norm;
    in the last layer, the classifier, it is the column of every input. Normalizations stay as they are.

    Args:
        model: a plain model; the classifier is the last of its linear and convolution layers.
        seed: of the draw.

    Raises:
        SettingsError: the model has no such layer.

    References:
        Badrinarayanan, Mishra, Cipolla, *Understanding symmetries in deep networks*, arXiv:1511.01029.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> balance_weights(net, seed=0)
        >>> bool((net[0].weight.norm(dim=1) - 1).abs().max() < 1e-6), net[0].bias.tolist()
        (True, [0.0, 0.0, 0.0])
    """
    layers = weight_layers(model)
    if not layers:
        raise SettingsError("initialization", "balanced, for a model without linear or convolution layers", "default")
    draw = torch.Generator().manual_seed(seed)
    for module in layers.values():
        shape = tuple(module.weight.shape)
        columns = module is list(layers.values())[-1] and isinstance(module, nn.Linear)
        partition = Partition(shape, shape, (1,)) if columns else filter_partition(module)
        # In float64, so that norms are 1 as exactly as the weight's dtype allows.
        drawn = 0.01 * torch.randn(shape, generator=draw, dtype=torch.float64)
        module.weight.copy_(partition.divide(drawn, partition.norms(drawn)))
        if module.bias is not None:
            module.bias.zero_()
