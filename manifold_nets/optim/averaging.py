"""Weight averages over training that stay on spheres: stochastic weight averaging and moving averages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import swa_utils

from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import ConstraintError
from manifold_nets.gathered import whole, write_whole_
from manifold_nets.groups import wide
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.manifold import SphereProduct, on_first_instance

__all__ = ["AveragedModel"]


class _Averaged(NamedTuple):
    """A constrained weight of the averaged model: its name, place among the parameters, value, manifold, lengths."""

    name: str
    place: int
    value: Tensor
    manifold: SphereProduct
    lengths: Tensor


class _Lengths(nn.Module):
    """The resultant lengths, as buffers; 1 where a state has none, as the state of a plain average."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name, buffer in self.named_buffers():
            state_dict.setdefault(prefix + name, torch.ones_like(buffer))
        super()._load_from_state_dict(state_dict, prefix, *others)


class AveragedModel(swa_utils.AveragedModel):
    r"""`torch.optim.swa_utils.AveragedModel` whose constrained weights stay on their spheres.

    Plain parameters and buffers are averaged as torch does, bit for bit. A constrained weight is the *chordal mean*:
    with the coefficients :math:`a_t` that ``avg_fn`` or ``multi_avg_fn`` gives the models ``w_t`` (equal ones by
    default, :math:`(1-d)\,d^{T-t}` for `torch.optim.swa_utils.get_ema_multi_avg_fn` with decay d),

    .. math:: \bar m = \sum_t a_t w_t, \quad \bar w = r \bar m/‖\bar m‖
              = \arg\min_{‖w‖ = r} \sum_t a_t ‖w - w_t‖^2, \quad ρ = ‖\bar m‖/r

    in each group. The mean :math:`\bar m` is kept as well, as the point and one *resultant length* ρ per sphere, so
    that the recursion continues from the mean and not from its projection: after any number of updates the result is
    the plain average, projected once. ρ is at most 1, and 1 if all averaged directions agree.

    The chordal mean equals the Riemannian (Karcher) mean, which minimizes squared angles, for two models of equal
    coefficients and for directions that are symmetric about it. Otherwise the two differ by a term of third order in
    the angles between the models. A group whose mean is zero has no direction and takes the newest model's; the next
    average is right again. In half precision the mean is rounded to the dtype of the weight at every update, as in
    torch. NaN and infinity persist.

    The state of a plain average, of torch's class, can be loaded into that of a converted model: it is converted as the
    model's own state would be, and its resultant lengths count as 1.

    Args:
        model: the model whose weights are averaged; it is copied.
        device: device of the average (default: the model's).
        avg_fn: as in torch, for one tensor: takes average, new value and count, and returns the average.
        multi_avg_fn: as in torch, for lists of tensors, in place.
        use_buffers: whether buffers are averaged instead of copied.

    References:
        Izmailov et al., *Averaging weights leads to wider optima and better generalization*, UAI 2018,
        arXiv:1803.05407; Mardia, Jupp, *Directional Statistics* (2000), sections 9.2 and 10.3, for the mean direction,
        the resultant length, and their being the maximum-likelihood estimate for von Mises-Fisher directions.

    Example:
        >>> import manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(2, 1, bias=False)
        >>> averaged = AveragedModel(layer)
        >>> for point in ([1.0, 0.0], [0.0, 1.0]):
        ...     _ = layer.load_state_dict({"weight": torch.tensor([point])})
        ...     averaged.update_parameters(layer)
        >>> averaged.module.weight.detach(), averaged.resultant_lengths()
        (tensor([[0.7071, 0.7071]]), {'weight': tensor([0.7071])})
    """

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Any = None,
        multi_avg_fn: Any = None,
        use_buffers: bool = False,
    ) -> None:
        for manifold in (weight.manifold for weight in constrained_weights(model)):
            if isinstance(manifold, JointSphereMember):
                found = "manifold_nets.optim.AveragedModel; use torch's, then manifold_nets.project on the average"
                raise ConstraintError.joint(manifold.member, manifold.others, found)
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        self.lengths = _Lengths()
        for weight in constrained_weights(self.module):
            norms = weight.manifold.partition.norms(whole(weight.parameter))
            self.lengths.register_buffer(_key(weight.name), torch.ones_like(norms))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average with the present weights of a model."""
        averaged = list(self._averaged())
        for weight in averaged:
            mean = weight.manifold.partition.multiply(wide(whole(weight.value)), weight.lengths)
            write_whole_(weight.value, mean)
        super().update_parameters(model)
        newest = list(model.parameters())
        for weight in averaged:
            weight.lengths.copy_(_project(weight.value, newest[weight.place], weight.manifold))

    def resultant_lengths(self) -> dict[str, Tensor]:
        """Return ρ of the groups of each constrained weight, by name: shape ``(n_groups,)``, float32 or better."""
        return {weight.name: weight.lengths.flatten().clone() for weight in self._averaged()}

    def _averaged(self) -> Iterator[_Averaged]:
        places = {id(parameter): index for index, parameter in enumerate(self.module.parameters())}
        for weight in constrained_weights(self.module):
            value = weight.parameter
            lengths = self.lengths.get_buffer(_key(weight.name))
            yield _Averaged(weight.name, places[id(value)], value, weight.manifold, lengths)


def _key(name: str) -> str:
    # Names of buffers have no dots.
    return name.replace(".", "/")


def _project(mean: Tensor, newest: Tensor, manifold: SphereProduct) -> Tensor:
    """Put a mean on its spheres, in place; return the resultant lengths in ``spread_shape``."""
    partition, working = manifold.partition, wide(whole(mean))
    radius = manifold.radius_for(working)
    norms = partition.norms(working)
    empty = norms == 0
    unit = partition.divide(working, torch.where(empty, 1.0, norms))
    point = partition.multiply(unit, radius)
    write_whole_(mean, partition.where(empty, wide(whole(newest)).to(working.device), point))
    return norms / radius


# Where timm's moving averages are.
_TIMM = "timm.utils.model_ema"


def _warn_of_plain_averages(module: nn.Module, _: str, submodule: nn.Module | None) -> None:
    """Warn if another averaged model takes constrained weights, because their averages are not on the spheres.

    Averages that are not modules, such as Lightning's `StochasticWeightAveraging`, are not noticed here. But `save`
    raises an error on them, an optimizer warns if they replace its weights, and loading them into a converted model
    converts them.
    """
    kind = type(module)
    others = isinstance(module, swa_utils.AveragedModel) or kind.__module__ == _TIMM
    if not others or isinstance(module, AveragedModel) or submodule is None:
        return
    name = next((weight.name for weight in constrained_weights(submodule)), None)
    if name is not None:
        warnings.warn(
            f"{name}: constrained to a product of spheres, but averages by {kind.__module__}.{kind.__name__} are not "
            "on them. Use manifold_nets.optim.AveragedModel, or put the final average back with "
            "manifold_nets.project(model).",
            UserWarning,
            stacklevel=5,  # the caller of AveragedModel
        )


def _install() -> None:
    register_module_module_registration_hook(_warn_of_plain_averages)


# Importing this package without constraining anything does not change torch.
on_first_instance(_install)
