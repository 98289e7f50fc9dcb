"""Between a parameter and an update rule: views, working precision, and where the results belong.

An update rule works in place on a weight in the view of its partition, in float32 or better. Where the weight's own
memory can serve as that, it does, and nothing is copied. Otherwise (half precision, memory formats that have no such
view, radii whose squares leave the range of float32) the rule gets a copy, and each result is rounded once when it is
written back.
"""

from __future__ import annotations

from torch import Tensor

from manifold_nets.gathered import is_sharded, local_part
from manifold_nets.groups import accumulation_dtype
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim.executions.layouts import layout_of
from manifold_nets.optim.executions.sharding import part_of
from manifold_nets.optim.rules.products import Spheres

__all__ = ["Workspace"]


class Workspace:
    """The working tensors of one step of one weight.

    Open the weight and the moments that are tangent vectors, read the gradient, run the rule, and `close`.

    Args:
        manifold: the product of spheres of the weight.
        weight: the parameter, or any tensor of its shape, dtype and device.

    Example:
        >>> import torch
        >>> w = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
        >>> space = Workspace(SphereProduct((1, 2), radius=5.0), w)
        >>> space.open(w).mul_(0.5).dtype
        torch.float32
        >>> space.close()
        >>> w
        tensor([[1.5000, 2.0000]], dtype=torch.bfloat16)
    """

    def __init__(self, manifold: SphereProduct, weight: Tensor) -> None:
        self._part = part_of(manifold, weight) if is_sharded(weight) else None
        if self._part is not None:
            manifold, weight = self._part.manifold, local_part(weight.detach())
        layout = layout_of(manifold)
        self.partition = layout.partition
        self.dtype = accumulation_dtype(weight.dtype)
        self._natural_dtype = weight.dtype
        radius = manifold.radius_for(weight)
        self._unit = radius if layout.to_unit else None
        self.spheres = Spheres(self.partition.reduced, 1.0 if layout.to_unit else radius)
        if self._part is not None:
            self.spheres = self.spheres._replace(combine=self._part.combine, elsewhere=self._part.elsewhere)
        self._read: list[tuple[Tensor, Tensor]] = []
        self._opened: list[tuple[Tensor, Tensor]] = []

    def open(self, tensor: Tensor) -> Tensor:
        """Return the working form of the weight or of a tangent vector, which the rule may change in place."""
        # An alias of the base class shares memory and version counter: autograd notices what is changed through it.
        original = tensor.detach()
        if self._part is not None:
            original = self._part.read(tensor)
            self._read.append((tensor, original))
        viewed, copied = original, original.dtype != self.dtype or self._unit is not None
        if self.partition.view != self.partition.shape:
            # In another memory format there is no such view, and `reshape` makes a contiguous copy.
            viewed, copied = original.reshape(self.partition.view), copied or not original.is_contiguous()
        working = viewed.to(self.dtype)
        if self._unit is not None:
            working = working / self._unit
        if copied:
            self._opened.append((original, working))
        return working

    def read(self, gradient: Tensor) -> Tensor:
        """Return the working form of the Euclidean gradient, which the rule only reads."""
        local = gradient.detach() if self._part is None else self._part.read(gradient)
        working = local.reshape(self.partition.view).to(self.dtype)
        return working if self._unit is None else working * self._unit

    def settle(self, tangent: Tensor) -> Tensor:
        """Return a tangent vector that a rule has made in the shape and dtype of the weight."""
        natural = tangent if self._unit is None else tangent * self._unit
        return natural.reshape(self.partition.shape).to(self._natural_dtype)

    def close(self) -> None:
        """Write back what was opened as a copy."""
        for original, working in self._opened:
            original.copy_(self.settle(working))
        if self._part is not None:
            for tensor, original in self._read:
                self._part.write(tensor, original)
