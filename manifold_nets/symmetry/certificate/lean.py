"""The certificate in little memory: float64 for one weight at a time, nothing of the model's size but its gradients.

The copy that is analysed shares its weights with the model, in the model's precision. Each operation gets the weight
that it reads cast to float64, and so does its backward pass, which casts once more what autograd would have kept. The
gradient of each weight is rounded to float32 as soon as it is there: by the inequality of Cauchy and Schwarz that moves
a certificate by at most half a machine epsilon of float32, so that its tolerance must not be below `ROUNDING`. Beside
the model that takes as much memory as its gradients in float32, a few float64 copies of the largest weight, and the
activations of the example inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from manifold_nets.symmetry.certificate.euler import EulerField, move_vectors, random_projection, sharp_outputs
from manifold_nets.symmetry.network.graph import Inputs
from manifold_nets.symmetry.network.twin import analysis_copy, is_continuous

__all__ = ["ROUNDING", "lean_copy", "lean_field", "widen_vectors"]

# Gradients rounded to float32 leave values up to half of this where a group is invariant.
ROUNDING = torch.finfo(torch.float32).eps


class _Widened(Mapping[str, Tensor]):
    """Tensors by name, each in float64 for as long as it is in use."""

    def __init__(self, stored: dict[str, Tensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].to(torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def lean_copy(model: nn.Module) -> nn.Module:
    """Copy a model for analysis, in its own precision, with parameters of two and more axes shared, not copied.

    Raises:
        AnalysisError: the model cannot be copied.
        UnsupportedModelError: it is a script or quantized, or has parameters without a shape.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if p.ndim >= 2}
    return analysis_copy(model, shared)


def widen_vectors(twin: nn.Module) -> None:
    """Cast the buffers and the parameters that are not shared to float64."""
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(torch.float64)
    for parameter in twin.parameters():
        if parameter.ndim < 2 and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float64)


class _Passes:
    """The casts of one forward and backward pass, and the gradients that it leaves."""

    def __init__(self, twin: nn.Module) -> None:
        self.names = {id(p): name for name, p in twin.named_parameters() if p.is_floating_point()}
        self.gradients: dict[str, Tensor] = {}
        self.casts: dict[int, tuple[StorageWeakRef, Tensor]] = {}

    def widened(self, leaf: Any) -> Any:
        if not isinstance(leaf, nn.Parameter) or leaf.dtype == torch.float64 or id(leaf) not in self.names:
            return leaf
        wide: Tensor = _Cast.apply(leaf, self, self.names[id(leaf)])  # type: ignore[no-untyped-call]
        storage = wide.untyped_storage()
        reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.casts[storage.data_ptr()] = reference, leaf.detach()
        return wide

    def pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a tensor: of a weight in float64, where to cast it from."""
        reference, weight = self.casts.get(saved.untyped_storage().data_ptr(), (None, None))
        if reference is None or weight is None or saved.dtype != torch.float64:
            return saved
        if reference.expired():  # type: ignore[no-untyped-call]
            return saved  # another tensor where a cast has been
        return weight, tuple(saved.shape), saved.stride(), saved.storage_offset()

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        weight, shape, stride, offset = kept
        wide: Tensor = weight.to(torch.float64)
        return wide.as_strided(shape, stride, offset)


class _Cast(torch.autograd.Function):
    """Casts a weight to float64; the gradient is rounded, stored and not passed on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, passes: _Passes, name: str) -> Tensor:
        ctx.passes, ctx.name = passes, name
        return weight.detach().to(torch.float64)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        found, narrow = ctx.passes.gradients, gradient.to(torch.float32)
        found[ctx.name] = narrow if ctx.name not in found else found[ctx.name].add_(narrow)
        return None, None, None


class _Widening(TorchFunctionMode):
    """Lets every operation read float64 weights."""

    def __init__(self, passes: _Passes) -> None:
        super().__init__()
        self.passes = passes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(self.passes.widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def lean_field(twin: nn.Module, inputs: Inputs, seed: int, *, logits: bool = False) -> EulerField:
    """Run the forward and backward pass of the certificate on a lean copy; see `euler_field`.

    Raises:
        ExampleInputsError: the model refuses the inputs or returns no floating-point tensor.
    """
    device = next((parameter.device for parameter in twin.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    move_vectors([p for p in twin.parameters() if is_continuous(p)], generator)
    passes = _Passes(twin)
    with torch.random.fork_rng(), torch.enable_grad(), saved_tensors_hooks(passes.pack, passes.unpack):
        torch.manual_seed(seed)
        outputs = sharp_outputs(twin, inputs, _Widening(passes))
        random_projection(outputs, generator, logits=logits).backward()  # type: ignore[no-untyped-call]
    weights = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    gradients = dict(passes.gradients)
    for name, parameter in twin.named_parameters():
        if name not in gradients:
            none = torch.zeros((), device=parameter.device).expand(parameter.shape)
            gradients[name] = none if parameter.grad is None else parameter.grad
    return EulerField(_Widened(weights), _Widened(gradients), keeps=False)
