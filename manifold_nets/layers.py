"""Linear and convolution layers whose filters lie on unit spheres, and embeddings whose rows do.

Each layer is the torch layer of the same name, with its arguments, its forward pass and its `state_dict`; only the
weight is a `geoopt.ManifoldParameter` on the `SphereProduct` of its filters, drawn uniformly. Train it with an
optimizer of `manifold_nets.optim` or of `geoopt.optim`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from manifold_nets._geoopt import geoopt
from manifold_nets.constraints import NEAR, attach, constrained_weights
from manifold_nets.errors import OptionError
from manifold_nets.gathered import is_sharded, write_whole_
from manifold_nets.groups import filter_partition
from manifold_nets.manifold import SphereProduct
from manifold_nets.padded import rows_of_embedding

__all__ = [
    "UNIT_NORM_LAYERS",
    "UnitNormConv1d",
    "UnitNormConv2d",
    "UnitNormConv3d",
    "UnitNormConvTranspose1d",
    "UnitNormConvTranspose2d",
    "UnitNormConvTranspose3d",
    "UnitNormEmbedding",
    "UnitNormEmbeddingBag",
    "UnitNormLinear",
]


class _UnitNormFilters(nn.Module):
    """Puts the weight of the torch layer that follows in the class's bases on the unit spheres of its filters."""

    if TYPE_CHECKING:
        # torch.jit.script reads the annotations of a class, and cannot resolve one that is a text as in this file.
        weight: Tensor

    def reset_parameters(self) -> None:
        """Draw every filter uniformly from its unit sphere, and the bias as torch draws it.

        Where the parameter object was replaced by a plain one (``to("meta")`` with ``to_empty``), it is renewed.
        Where it is sharded, all processes have to call this, and the values of the first one count.
        """
        super().reset_parameters()  # type: ignore[misc]
        known = next((weight.manifold for weight in constrained_weights(self) if weight.leaf == "weight"), None)
        sphere = self._spheres() if known is None else known
        point = sphere.random_uniform(dtype=self.weight.dtype, device=self.weight.device)
        if is_sharded(self.weight):
            # Those of one process for all: a sphere may lie in several.
            write_whole_(self.weight, point, from_first=True)
        elif isinstance(self.weight, geoopt.ManifoldParameter):
            write_whole_(self.weight, point)
        else:
            attach(self, "weight", sphere, point)

    def _spheres(self) -> SphereProduct:
        return SphereProduct(filter_partition(self))


class _UnitNormRows(_UnitNormFilters):
    """Puts the rows of the torch embedding that follows in the class's bases on unit spheres, but for a padding row."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        max_norm = getattr(self, "max_norm", None)
        if max_norm is not None:
            raise OptionError("max_norm", max_norm, "None, as every row already has norm 1")
        if next(constrained_weights(self), None) is None:  # rows were given, as by `from_pretrained`
            sphere, remedy = self._spheres(), "Divide every row by its norm first."
            sphere.require_point(self.weight.detach(), f"{type(self).__name__}.weight", rtol=NEAR, remedy=remedy)
            attach(self, "weight", sphere)

    def _spheres(self) -> SphereProduct:
        return rows_of_embedding(self)  # type: ignore[arg-type]


class UnitNormEmbedding(_UnitNormRows, nn.Embedding):
    """`torch.nn.Embedding` with unit-norm rows; the row of ``padding_idx`` is zero and stays zero.

    With ``sparse=True`` the optimizers of `manifold_nets.optim` step only the rows that a batch has looked up:
    `RiemannianSGD` without momentum takes the same steps as with dense gradients, and `RiemannianAdam` does not update
    the moments of the other rows, like `torch.optim.SparseAdam`. ``max_norm`` must be None. ``from_pretrained`` needs
    unit-norm rows.

    Example:
        >>> import torch
        >>> layer = UnitNormEmbedding(5, 3, padding_idx=0)
        >>> layer(torch.tensor([0, 2])).norm(dim=1).round(decimals=4)
        tensor([0., 1.], grad_fn=<RoundBackward1>)
    """


class UnitNormEmbeddingBag(_UnitNormRows, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag` with unit-norm rows; the row of ``padding_idx`` is zero and stays zero.

    Its outputs, sums, means or maxima of rows, do not have unit norm. See `UnitNormEmbedding` for the rest.

    Example:
        >>> UnitNormEmbeddingBag(5, 3, mode="sum").weight.manifold
        SphereProduct(5 filters of 3, radius 1) manifold
    """


class UnitNormLinear(_UnitNormFilters, nn.Linear):
    """`torch.nn.Linear` with unit-norm rows, the weights of one output each.

    Example:
        >>> import torch
        >>> layer = UnitNormLinear(4, 3, bias=False)
        >>> torch.allclose(layer.weight.norm(dim=1), torch.ones(3))
        True
    """


class UnitNormConv1d(_UnitNormFilters, nn.Conv1d):
    """`torch.nn.Conv1d` whose filters ``weight[c]`` have unit norm.

    Example:
        >>> UnitNormConv1d(4, 6, 3, groups=2).weight.manifold
        SphereProduct(6 filters of 6, radius 1) manifold
    """


class UnitNormConv2d(_UnitNormFilters, nn.Conv2d):
    """`torch.nn.Conv2d` whose filters ``weight[c]`` have unit norm.

    Example:
        >>> UnitNormConv2d(3, 8, 3, padding=1, padding_mode="reflect").weight.manifold
        SphereProduct(8 filters of 27, radius 1) manifold
    """


class UnitNormConv3d(_UnitNormFilters, nn.Conv3d):
    """`torch.nn.Conv3d` whose filters ``weight[c]`` have unit norm.

    Example:
        >>> UnitNormConv3d(2, 4, 3).weight.manifold
        SphereProduct(4 filters of 54, radius 1) manifold
    """


class UnitNormConvTranspose1d(_UnitNormFilters, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` whose filters, the weights that reach one output channel, have unit norm.

    Example:
        >>> UnitNormConvTranspose1d(4, 6, 3).weight.manifold.partition.n_groups
        6
    """


class UnitNormConvTranspose2d(_UnitNormFilters, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` whose filters, the weights that reach one output channel, have unit norm.

    With ``groups``, the filter of output channel ``c`` is the block of its group's input channels at index
    ``c mod (out_channels/groups)``; see `Partition.transposed_filters`.

    Example:
        >>> layer = UnitNormConvTranspose2d(4, 6, 3, groups=2)
        >>> layer.weight.shape, layer.weight.manifold.partition.n_groups
        (torch.Size([4, 3, 3, 3]), 6)
    """


class UnitNormConvTranspose3d(_UnitNormFilters, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` whose filters, the weights that reach one output channel, have unit norm.

    Example:
        >>> UnitNormConvTranspose3d(4, 6, 3).weight.manifold.partition.n_groups
        6
    """


UNIT_NORM_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: UnitNormLinear,
    nn.Embedding: UnitNormEmbedding,
    nn.EmbeddingBag: UnitNormEmbeddingBag,
    nn.Conv1d: UnitNormConv1d,
    nn.Conv2d: UnitNormConv2d,
    nn.Conv3d: UnitNormConv3d,
    nn.ConvTranspose1d: UnitNormConvTranspose1d,
    nn.ConvTranspose2d: UnitNormConvTranspose2d,
    nn.ConvTranspose3d: UnitNormConvTranspose3d,
}
"""The layer with unit-norm filters, or rows, of each torch layer."""
