"""Dead biases: constants that a normalization or a softmax removes, and what must change when they are deleted.

In training mode a batch normalization subtracts the batch mean, and with it any bias in front. In evaluation mode it
subtracts the running mean, which contains the bias: without the bias, ``running_mean − shift`` gives the same output.
The shift is the bias itself if the layer is directly in front of the normalization. Otherwise it is measured, as the
difference of the normalization's input with and without the bias.

A removed bias is recorded on its layer, so that it can be put back as zeros. The layer has ``bias = None``, as if built
with ``bias=False``, and the key is removed from the `state_dict`. The record survives deep copies and pickling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.conversion.actions import Action
from manifold_nets.conversion.moves import RemovedBias
from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.float64 import in_float64
from manifold_nets.models import analysis_copy, random_numbers
from manifold_nets.running import Inputs, run, split_inputs, to_float64
from manifold_nets.symmetry import SymmetryReport
from manifold_nets.symmetry.report import ShiftSymmetry

__all__ = ["absent_bias", "dead_bias_actions", "put_back_bias", "remove_bias", "removed_biases"]

_RECORD = "_manifold_nets_removed_biases"
# Layers whose bias may be None.
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
# Relative to the largest shift: far above the rounding of a float64 forward pass, far below any real difference.
_CONSTANT = 1e-9


# ---- removing a bias -------------------------------------------------------------------------------------------------


def remove_bias(module: nn.Module, leaf: str) -> None:
    """Replace a bias by None, and keep what is needed to make it again: shape, dtype and ``requires_grad``.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> remove_bias(layer, "bias")
        >>> list(layer.state_dict()), list(removed_biases(layer))
        (['weight'], ['bias'])
    """
    bias = module.get_parameter(leaf)
    module.register_parameter(leaf, None)
    module.__dict__.setdefault(_RECORD, {})[leaf] = bias.detach().to("meta").requires_grad_(bias.requires_grad)


def put_back_bias(module: nn.Module, leaf: str) -> None:
    """Make a removed bias again, as zeros with the device and dtype of the layer's weight.

    An existing bias is not changed, as when a module with two names is visited twice.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> remove_bias(layer, "bias")
        >>> put_back_bias(layer, "bias")
        >>> layer.bias.tolist(), list(removed_biases(layer))
        ([0.0, 0.0], [])
    """
    record = module.__dict__.get(_RECORD, {})
    if leaf in record:
        setattr(module, leaf, absent_bias(module, leaf))
        del record[leaf]
        if not record:
            del module.__dict__[_RECORD]


def absent_bias(module: nn.Module, leaf: str) -> nn.Parameter:
    """Return the tensor that `put_back_bias` would set; the module is not changed."""
    removed: Tensor = module.__dict__[_RECORD][leaf]
    weight = module._parameters.get("weight")
    device, dtype = (None, removed.dtype) if weight is None else (weight.device, weight.dtype)
    return nn.Parameter(torch.zeros(removed.shape, dtype=dtype, device=device), removed.requires_grad)


def removed_biases(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules and attributes of all removed biases, by their former names.

    A module with several names had its bias under as many keys, all of which are missing from the `state_dict`.
    """
    return {
        f"{prefix}.{leaf}" if prefix else leaf: (module, leaf)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for leaf in module.__dict__.get(_RECORD, {})
        if module._parameters.get(leaf) is None
    }


# ---- which ones can be removed ---------------------------------------------------------------------------------------


def dead_bias_actions(model: nn.Module, report: SymmetryReport) -> list[Action]:
    """Decide for every bias without effect whether it can be removed; the model is not changed."""
    dead = [shift for shift in report.shifts if shift.kind == "dead bias" and len(shift.parameters) == 1]
    reasons = [_why_left(model, shift, dead) for shift in dead]
    possible = [shift for shift, why in zip(dead, reasons, strict=True) if why is None]
    measured = _Measurement(model, report.example_inputs).moves(possible) if possible else {}
    actions = []
    for shift, why in zip(dead, reasons, strict=True):
        name = shift.parameters[0]
        found = measured[name] if why is None else why
        move = found if isinstance(found, RemovedBias) else RemovedBias(name)
        follows = f"; {', '.join(move.means)} is adjusted for it" if move.means else ""
        reason = f"it has no effect: its key is removed from the state_dict{follows}"
        action = Action(name, "remove", reason, remedy="dead-biases", move=move)
        actions.append(action.left(found) if isinstance(found, str) else action)
    return actions


def _why_left(model: nn.Module, shift: ShiftSymmetry, dead: Sequence[ShiftSymmetry]) -> str | None:
    """Return why a bias is not removed, as far as the structure shows."""
    if shift.certificate.verdict != "invariant":
        return f"certificate {shift.certificate}"
    if shift.condition is not None:
        return f"it has no effect only {shift.condition}"
    bias = dict(model.named_parameters(remove_duplicate=False))[shift.parameters[0]]
    counts = [other.count for other in dead if other.parameters == shift.parameters]
    if sum(counts) < bias.numel():
        return f"only {sum(counts)} of its {bias.numel()} entries have no effect"
    if len(counts) > 1:
        return "its entries are absorbed by different operations"
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is bias and not (leaf == "bias" and isinstance(module, _LAYERS)):
                return f"{type(module).__name__} {prefix} needs it"
    return None


def _means(shift: ShiftSymmetry) -> set[str]:
    return {absorber.running_mean for absorber in shift.absorbers if absorber.running_mean is not None}


class _Measurement:
    """Forward passes of a float64 copy with and without biases."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = analysis_copy(model)
        self.inputs: Inputs = to_float64(split_inputs(example_inputs))
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))

    def moves(self, shifts: Sequence[ShiftSymmetry]) -> dict[str, RemovedBias | str]:
        """For each bias what it adds to every running mean behind it, or why it cannot be removed."""
        found: dict[str, RemovedBias | str] = {s.parameters[0]: RemovedBias(s.parameters[0]) for s in shifts}
        means = {shift.parameters[0]: _means(shift) for shift in shifts if _means(shift)}
        reference = self._inputs_of(set().union(*means.values())) if means else {}
        # A distinctive change shows what arrives unchanged, even if the bias itself is zero.
        generator = torch.Generator().manual_seed(0)
        probes = {name: self._probe(self.parameters[name].detach(), generator) for name in means}
        for name, measured in self._measured(means, reference, probes).items():
            if isinstance(measured, str):
                found[name] = measured
            elif all(torch.equal(by_channel, probes[name]) for by_channel in measured.values()):
                found[name] = RemovedBias(name, dict.fromkeys(measured, tuple(self.parameters[name].tolist())))
            else:
                continue
            del means[name]
        # Changes that arrive modified are measured with the bias.
        changes = {name: -self.parameters[name].detach() for name in means}
        for name, measured in self._measured(means, reference, changes).items():
            if isinstance(measured, str):
                found[name] = measured
                continue
            found[name] = RemovedBias(name, {mean: tuple((-v).tolist()) for mean, v in measured.items()}, direct=False)
        return found | self._needed([name for name, move in found.items() if isinstance(move, RemovedBias)])

    @staticmethod
    def _probe(bias: Tensor, generator: torch.Generator) -> Tensor:
        probe = 0.5 + torch.rand(bias.shape, generator=generator, dtype=torch.float64)
        return probe.to(bias.device) * max(float(bias.abs().max()), 1.0)

    def _measured(
        self, means: Mapping[str, set[str]], reference: Mapping[str, list[Tensor]], changes: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor] | str]:
        """What a change of each bias adds to the running means behind it, or why there is no such constant."""
        found: dict[str, dict[str, Tensor] | str] = {}
        left = dict(means)
        while left:
            # Biases without a running mean in common are measured in one pass.
            together: dict[str, set[str]] = {}
            for name, behind in left.items():
                if behind.isdisjoint(set().union(*together.values())):
                    together[name] = behind
            moved = self._inputs_of(set().union(*together.values()), {name: changes[name] for name in together})
            for name in together:
                channels = {mean: self.model.get_buffer(mean).numel() for mean in sorted(left.pop(name))}
                found[name] = _shifts_of(channels, reference, moved, changes[name])
        return found

    def _inputs_of(self, means: Iterable[str], changes: Mapping[str, Tensor] | None = None) -> dict[str, list[Tensor]]:
        """Inputs of the modules that own some running means, one for each call, in training mode.

        Each pass begins with the same buffers: a spectral norm computes its weight from vectors that it improves.
        """
        seen: dict[str, list[Tensor]] = {mean: [] for mean in means}
        new = {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        for name, change in (changes or {}).items():
            new[id(self.parameters[name])] = self.parameters[name].detach() + change
        # Each place once: torch would not restore a module that has two names.
        tensors = {
            f"{prefix}.{leaf}".lstrip("."): new[id(tensor)]
            for prefix, module in self.model.named_modules()
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
            if id(tensor) in new
        }
        with ExitStack() as stack:
            for mean in seen:

                def look(_: nn.Module, args: tuple[Any, ...], mean: str = mean) -> None:
                    seen[mean].extend(x.detach().clone() for x in args[:1] if isinstance(x, Tensor))

                module = self.model.get_submodule(mean.rpartition(".")[0])
                stack.callback(module.register_forward_pre_hook(look).remove)
            for context in (torch.no_grad(), random_numbers(0), in_float64()):
                stack.enter_context(context)
            torch.func.functional_call(self.model, tensors, *self.inputs, tie_weights=False)
        return seen

    def _needed(self, names: Sequence[str]) -> dict[str, str]:
        """Why biases stay without which the model's code fails, as where it joins the biases of several layers."""
        if not names or self._runs_without(names) or not self._runs_without([]):
            return {}
        return {name: "the model reads it outside of its layer" for name in names if not self._runs_without([name])}

    def _runs_without(self, names: Sequence[str]) -> bool:
        places = [(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        try:
            for place in places:
                remove_bias(*place)
            with torch.no_grad(), random_numbers(0), in_float64():
                for training in (True, False):
                    run(self.model.train(training), self.inputs)
        except (DoublePrecisionError, ExampleInputsError):
            return False
        finally:
            for place in places:
                put_back_bias(*place)
        return True


def _shifts_of(
    channels: Mapping[str, int],
    reference: Mapping[str, list[Tensor]],
    moved: Mapping[str, list[Tensor]],
    change: Tensor,
) -> dict[str, Tensor] | str:
    """Return how a change of a bias shifts each running mean, or why there is no such constant.

    Args:
        channels: number of channels of each running mean.
        reference: inputs of its normalization without the change.
        moved: the same with it.
        change: the change.
    """
    found = {}
    for mean, count in channels.items():
        if len(reference[mean]) != 1 or len(moved[mean]) != 1 or reference[mean][0].shape[1] != count:
            return f"{mean} is not the running mean of one normalization that is called once"
        difference = (moved[mean][0] - reference[mean][0]).transpose(0, 1).flatten(1)
        by_channel = difference.mean(1)
        limit = _CONSTANT * max(float(change.abs().max()), float(by_channel.abs().max()))
        if not float((difference - by_channel[:, None]).abs().max()) <= limit:
            return f"it is not a constant in front of {mean}"
        # If the bias itself arrives, it is used without rounding.
        same = by_channel.shape == change.shape and float((by_channel - change).abs().max()) <= limit
        found[mean] = change if same else by_channel
    return found
