"""What may become of the tensors of a step; optim/test_kernel_memory.py runs it in a process of its own.

Each case does something to a weight, its gradient or its optimizer state, and steps. It must end in an error of the
package, or in the step that float64 tensors in good order take.
"""

import json
import sys

import geoopt
import torch

import manifold_nets as mn
from manifold_nets.errors import ManifoldNetsError
from manifold_nets.optim import OPTIMIZERS

SHAPE = (64, 27)


def entries(state, shape):
    return [key for key, value in state.items() if torch.is_tensor(value) and tuple(value.shape) == shape]


def each(change, *shapes):
    """Replace tensors of the state that have one of the shapes."""

    def apply(w, state, g):
        for shape in shapes:
            for key in entries(state, shape):
                state[key] = change(state[key])
        return g

    return apply


def weight(change):
    def apply(w, state, g):
        w.grad = None
        w.data = change(w.data)
        return g.to(w.dtype) if w.shape == g.shape else torch.ones_like(w)

    return apply


def gradient(change):
    return lambda w, state, g: change(g)


def shrunk(tensor, size):
    tensor.untyped_storage().resize_(size)
    return tensor


def shared(w, state, g):
    """The gradient lies in the memory of the moment."""
    for key in entries(state, SHAPE)[:1]:
        state[key] = g
    return g


def negated(w, state, g):
    """The moment is the negative of what lies in its memory."""
    for key in entries(state, SHAPE)[:1]:
        state[key] = torch._neg_view(state[key])
    return g


def shifted(w, state, g):
    """The gradient begins one number after the weight."""
    memory = torch.cat([w.data.flatten(), g.flatten()[-1:]])
    w.grad, w.data = None, memory[:-1].view(SHAPE)
    return memory[1:].view(SHAPE)


def fake(g):
    with torch._subclasses.FakeTensorMode():
        return torch.empty(SHAPE)


def on_device(device):
    def apply(w, state, g):
        torch.set_default_device(device)
        return g

    return apply


MOMENTS, SPHERES = SHAPE, (SHAPE[0], 1)
#: Name, what is done, and whether a step has to follow ("step") or an error ("error"); None where either is right.
CASES = {
    "weight smaller": (weight(lambda x: x[:2].clone()), "error"),
    "weight a view of less": (weight(lambda x: x[:2]), "error"),
    "weight larger": (weight(lambda x: x.repeat(3, 1)), "error"),
    "weight of other axes": (weight(lambda x: x.reshape(27, 64)), "error"),
    "weight expanded": (weight(lambda x: x[:1].expand(SHAPE)), "error"),
    "weight without memory": (lambda w, s, g: (shrunk(w, 0), g)[1], "error"),
    "weight with little memory": (lambda w, s, g: (shrunk(w, 8), g)[1], "error"),
    "weight transposed": (weight(lambda x: x.t().contiguous().t()), "step"),
    "weight with gaps": (weight(lambda x: x.repeat(1, 2)[:, ::2].repeat_interleave(2, 1)[:, ::2]), "step"),
    "weight negated lazily": (weight(lambda x: torch._neg_view(-x)), "step"),
    "weight negated in its place": (weight(torch._neg_view), "step"),
    "weight in float64": (weight(torch.Tensor.double), "step"),
    "gradient zero without memory": (gradient(lambda g: torch._efficientzerotensor(SHAPE)), "step"),
    "gradient negated lazily": (gradient(lambda g: torch._neg_view(-g)), "step"),
    "gradient conjugated lazily": (gradient(lambda g: torch.complex(g, -g).conj().imag), "step"),
    "gradient expanded": (gradient(lambda g: g[:, :1].expand(SHAPE)), "step"),
    "gradient one number": (gradient(lambda g: g[0, 0].expand(SHAPE)), "step"),
    "gradient transposed": (gradient(lambda g: g.t().contiguous().t()), "step"),
    "gradient in float64": (gradient(torch.Tensor.double), "step"),
    "gradient of integers": (gradient(lambda g: (3 * g).int()), "step"),
    "gradient complex": (gradient(torch.Tensor.cfloat), "error"),
    "gradient sparse": (gradient(torch.Tensor.to_sparse), "error"),
    "gradient fake": (gradient(fake), "error"),
    "gradient without memory": (gradient(lambda g: shrunk(g.clone(), 0)), "error"),
    "gradient with little memory": (gradient(lambda g: shrunk(g.clone(), 8)), "error"),
    "gradient of a subclass": (gradient(lambda g: g.as_subclass(type("Other", (torch.Tensor,), {}))), "step"),
    "gradient is the weight": (lambda w, s, g: w.data, "step"),
    "gradient in the moment": (shared, None),
    "gradient beside the weight": (shifted, "step"),
    "moment smaller": (each(lambda x: x[:2].clone(), MOMENTS), None),
    "second moment smaller": (each(lambda x: x[:2].clone(), SPHERES), None),
    "state flat": (each(torch.flatten, MOMENTS, SPHERES), None),
    "state in bfloat16": (each(torch.Tensor.bfloat16, MOMENTS, SPHERES, ()), "step"),
    "state in float64": (each(torch.Tensor.double, MOMENTS, SPHERES), "step"),
    "state with gaps": (each(lambda x: x.repeat(1, 2)[:, : x.shape[1]], MOMENTS, SPHERES), "step"),
    "state expanded": (each(lambda x: x[:1].clone().expand(x.shape), MOMENTS, SPHERES), "step"),
    "state negated lazily": (each(lambda x: torch._neg_view(-x), MOMENTS, SPHERES), "step"),
    "moment negated in its place": (negated, "step"),
    "state on meta": (each(lambda x: x.to("meta"), MOMENTS, SPHERES, ()), None),
    "state with little memory": (each(lambda x: shrunk(x.clone(), 8), MOMENTS, SPHERES), None),
    "default device meta": (on_device("meta"), "step"),
    "default device cuda": (on_device("cuda"), "step"),
}


def made(kind, options, dtype, **how):
    generator = torch.Generator().manual_seed(0)
    sphere = mn.SphereProduct(SHAPE)
    start = sphere.projx(torch.randn(SHAPE, generator=generator, dtype=torch.float64)).float()
    w = geoopt.ManifoldParameter(start.to(dtype), manifold=sphere)
    w.grad = torch.randn(SHAPE, generator=generator, dtype=torch.float64).float().to(dtype)
    stepper = kind([w], lr=0.1, **options, **how)
    stepper.step()
    w.grad_dtype = None
    return sphere, w, stepper, torch.randn(SHAPE, generator=generator, dtype=torch.float64).float()


def outcome(name, kind, options):
    """What becomes of a case: "step", or an error of the package in words; anything else is wrong."""
    change, _ = CASES[name]
    _, w, stepper, g = made(kind, options, torch.float32)
    try:
        g = change(w, stepper.state[w], g)
        before = w.detach().double() if w.untyped_storage().nbytes() >= 4 * w.numel() else None
        held = g.to_dense() if g.layout != torch.strided else g
        values = None if before is None or name in _VALUELESS else held.detach().to("cpu", torch.float64, copy=True)
        state = {k: v.clone() for k, v in stepper.state[w].items() if name not in _VALUELESS}
        w.grad = g
        stepper.step()
    except ManifoldNetsError as error:
        return f"error: {error}"
    finally:
        torch.set_default_device(None)
    _, exact, reference, _ = made(kind, options, torch.float64, foreach=False)
    exact.data, exact.grad = before, values
    for key, value in state.items():
        reference.state[exact][key] = value if key == "step" else value.double()
    reference.step()
    off = float((w.detach().double() - exact.detach()).abs().max())
    eps = torch.finfo(torch.float32).eps
    return "step" if off <= 64 * eps else f"off by {off}"


_VALUELESS = {
    *("gradient fake", "gradient without memory", "gradient with little memory", "gradient complex"),
    *("state on meta", "state with little memory"),
}

if __name__ == "__main__":
    torch.set_num_threads(2)
    for optimizer, row in OPTIMIZERS.items():
        if row.weights != "spheres":
            continue
        options = {**row.options, **({} if row.adaptive else {"momentum": 0.9})}
        for case in CASES:
            try:
                found = outcome(case, row.kind, options)
            except Exception as error:  # noqa: BLE001 - it is reported
                found = f"foreign {type(error).__name__}: {error}"
            sys.stdout.write(json.dumps([case, optimizer, found[:200]]) + "\n")
            sys.stdout.flush()
