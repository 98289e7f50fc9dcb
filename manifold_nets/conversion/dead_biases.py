"""Dead biases: constants that a normalization or a softmax takes away again, and what has to follow their removal.

In training mode a batch normalization subtracts the mean of the batch, and with it any bias in front. In evaluation
mode it subtracts the running mean, which contains the bias: without the bias, ``running_mean − shift`` leaves the
output as it was. The shift is the bias itself where nothing but the layer stands in front of the normalization; in
general it is measured, as the difference of the normalization's input with and without the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manifold_nets.conversion.actions import Action
from manifold_nets.conversion.biases import remove_bias
from manifold_nets.errors import DoublePrecisionError, ExampleInputsError
from manifold_nets.float64 import in_float64
from manifold_nets.models import analysis_copy, random_numbers
from manifold_nets.running import run, split_inputs, to_float64
from manifold_nets.symmetry import SymmetryReport
from manifold_nets.symmetry.report import ShiftSymmetry

__all__ = ["dead_bias_actions"]

# Layers whose bias may be None.
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
# Relative to the largest shift: far above the rounding of a float64 forward pass, far below any real difference.
_CONSTANT = 1e-9


def dead_bias_actions(model: nn.Module, report: SymmetryReport) -> list[Action]:
    """Decide for every bias without effect whether it can be removed; the model is not changed."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dead = [shift for shift in report.shifts if shift.kind == "dead bias" and len(shift.parameters) == 1]
    possible: list[ShiftSymmetry] = []
    reasons: dict[int, str] = {}
    for shift in dead:
        why = _why_left(model, shift, dead, parameters)
        if why is None:
            possible.append(shift)
        else:
            reasons[id(shift)] = why
    shifts = _measured(model, possible, report.example_inputs)
    shifts |= _needed(model, [shift for shift in possible if isinstance(shifts[id(shift)], _Shifts)], report)
    actions = []
    for shift in dead:
        why = reasons.get(id(shift))
        found = shifts.get(id(shift), _Shifts()) if why is None else why
        if isinstance(found, str):
            actions.append(_action(shift, "leave", found, _Shifts()))
        else:
            means = ", ".join(found.of)
            follows = f"; {means} takes it up" if means else ""
            reason = f"it does nothing: its key leaves the state_dict{follows}"
            actions.append(_action(shift, "remove", reason, found))
    return actions


@dataclass(frozen=True)
class _Shifts:
    """What a bias adds to running means, and whether that is the bias itself, whatever its values are."""

    of: dict[str, tuple[float, ...]] = field(default_factory=dict)
    direct: bool = True


def _action(shift: ShiftSymmetry, what: Any, reason: str, found: _Shifts) -> Action:
    return Action(
        shift.parameters[0], what, reason, remedy="dead-biases", symmetry=shift, shifts=found.of, direct=found.direct
    )  # fmt: skip


def _why_left(
    model: nn.Module, shift: ShiftSymmetry, dead: Sequence[ShiftSymmetry], parameters: dict[str, nn.Parameter]
) -> str | None:
    """Why a bias is not removed, as far as its structure tells."""
    name = shift.parameters[0]
    if shift.certificate.verdict != "invariant":
        return f"certificate {shift.certificate}"
    if shift.condition is not None:
        return f"it does nothing only {shift.condition}"
    bias = parameters[name]
    total = sum(other.count for other in dead if other.parameters == shift.parameters)
    if total < bias.numel():
        return f"{total} of its {bias.numel()} entries do nothing, the others do"
    if sum(other.parameters == shift.parameters for other in dead) > 1:
        return "its entries are absorbed by different operations"
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is bias and not (leaf == "bias" and isinstance(module, _LAYERS)):
                return f"{type(module).__name__} {prefix} needs it"
    return None


def _needed(model: nn.Module, shifts: Sequence[ShiftSymmetry], report: SymmetryReport) -> dict[int, _Shifts | str]:
    """Why a bias stays without which the model's code fails, as where it joins the biases of several layers."""
    twin, inputs = analysis_copy(model), to_float64(split_inputs(report.example_inputs))

    def works(removed: Sequence[ShiftSymmetry]) -> bool:
        undo = []
        try:
            for shift in removed:
                prefix, _, leaf = shift.parameters[0].rpartition(".")
                undo.append(remove_bias(twin.get_submodule(prefix), leaf))
            with torch.no_grad(), random_numbers(0), in_float64():
                for training in (True, False):
                    run(twin.train(training), inputs)
        except (DoublePrecisionError, ExampleInputsError):
            return False
        finally:
            for put_back in undo:
                put_back()
        return True

    if not shifts or works(shifts) or not works([]):
        return {}
    return {id(shift): "the code of the model reads it outside of its layer" for shift in shifts if not works([shift])}


def _measured(model: nn.Module, shifts: Sequence[ShiftSymmetry], example_inputs: Any) -> dict[int, _Shifts | str]:
    """For each bias its shift of every running mean behind it, or why there is none."""
    found: dict[int, _Shifts | str] = {id(shift): _Shifts() for shift in shifts}
    waiting = [shift for shift in shifts if _means(shift)]
    if not waiting:
        return found
    twin, inputs = analysis_copy(model), to_float64(split_inputs(example_inputs))
    reference = _inputs_of(twin, {mean for shift in waiting for mean in _means(shift)}, inputs)
    biases = {shift.parameters[0]: twin.get_parameter(shift.parameters[0]).detach().clone() for shift in waiting}
    # A change that is like no other shows what arrives as it is, also where the bias itself is zero; what arrives as
    # something else is measured with the bias.
    for changes, probing in ((_probes(biases), True), ({name: -bias for name, bias in biases.items()}, False)):
        waiting, left = [], waiting
        while left:
            # Biases without a running mean in common are measured in one pass.
            together: list[ShiftSymmetry] = []
            for shift in left:
                if all(_means(shift).isdisjoint(_means(other)) for other in together):
                    together.append(shift)
            left = [shift for shift in left if not any(shift is other for other in together)]
            names = [shift.parameters[0] for shift in together]
            moved = _inputs_changed({name: changes[name] for name in names}, twin, together, inputs)
            for name, shift in zip(names, together, strict=True):
                measured = _shifts_of(twin, shift, reference, moved, changes[name])
                if isinstance(measured, str):
                    found[id(shift)] = measured
                elif not probing:
                    found[id(shift)] = _Shifts({m: tuple((-v).tolist()) for m, v in measured.items()}, direct=False)
                elif all(torch.equal(by_channel, changes[name]) for by_channel in measured.values()):
                    found[id(shift)] = _Shifts(dict.fromkeys(measured, tuple(biases[name].tolist())))
                else:
                    waiting.append(shift)
    return found


def _probes(biases: dict[str, Tensor]) -> dict[str, Tensor]:
    """A change of each bias with entries of its size, no two alike."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.5 + torch.rand(bias.shape, generator=generator, dtype=torch.float64)).to(bias.device)
        * max(float(bias.abs().max()), 1.0)
        for name, bias in biases.items()
    }


def _means(shift: ShiftSymmetry) -> set[str]:
    return {absorber.running_mean for absorber in shift.absorbers if absorber.running_mean is not None}


def _inputs_changed(
    changes: dict[str, Tensor], twin: nn.Module, shifts: Sequence[ShiftSymmetry], inputs: Any
) -> dict[str, list[Tensor]]:
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    saved = {name: parameters[name].detach().clone() for name in changes}
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].add_(change)
        try:
            return _inputs_of(twin, {mean for shift in shifts for mean in _means(shift)}, inputs)
        finally:
            for name, value in saved.items():
                parameters[name].copy_(value)


def _inputs_of(twin: nn.Module, means: set[str], inputs: Any) -> dict[str, list[Tensor]]:
    """Inputs of the modules that own some running means, one for each call, in training mode.

    The pass leaves the buffers as they were: another one, which is compared with it, has to begin where it did. A
    spectral norm computes its weight from vectors that it improves at every pass.
    """
    seen: dict[str, list[Tensor]] = {mean: [] for mean in means}
    handles = []
    for mean in means:
        module = twin.get_submodule(mean.rpartition(".")[0])

        def look(_: nn.Module, args: tuple[Any, ...], mean: str = mean) -> None:
            seen[mean].extend(x.detach().clone() for x in args[:1] if isinstance(x, Tensor))

        handles.append(module.register_forward_pre_hook(look))
    args, kwargs = inputs
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in twin.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.no_grad(), random_numbers(0), in_float64():
            twin(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer.copy_(value)
    return seen


def _shifts_of(
    twin: nn.Module,
    shift: ShiftSymmetry,
    reference: dict[str, list[Tensor]],
    moved: dict[str, list[Tensor]],
    change: Tensor,
) -> dict[str, Tensor] | str:
    """What a change of a bias adds to each running mean, or why there is no such constant."""
    found = {}
    for mean in sorted(_means(shift)):
        channels = twin.get_buffer(mean).numel()
        if len(reference[mean]) != 1 or len(moved[mean]) != 1 or reference[mean][0].shape[1] != channels:
            return f"{mean} is not the running mean of one normalization that is called once"
        difference = (moved[mean][0] - reference[mean][0]).transpose(0, 1).flatten(1)
        by_channel = difference.mean(1)
        limit = _CONSTANT * max(float(change.abs().max()), float(by_channel.abs().max()))
        if not float((difference - by_channel[:, None]).abs().max()) <= limit:
            return f"it is not a constant in front of {mean}"
        # Where the bias itself arrives, no rounding need come in between.
        same = by_channel.shape == change.shape and float((by_channel - change).abs().max()) <= limit
        found[mean] = change if same else by_channel
    return found
