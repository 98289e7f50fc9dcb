"""Models to save and load, and comparisons of them, for the tests of checkpoints."""

import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.constraints import attach, constrained_weights

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def put(model, name, manifold):
    """Project a weight on a manifold and attach it."""
    prefix, _, leaf = name.rpartition(".")
    module = model.get_submodule(prefix)
    attach(module, leaf, manifold, manifold.projx(module.get_parameter(leaf).detach()))
    return model


def architecture(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )
    net[1].running_var.uniform_(0.1, 2.0)
    return net.to(dtype)


def constrained(dtype=torch.float32, seed=1):
    """Per-group radii, a transposed grouped convolution, and a whole tensor."""
    net = architecture(dtype, seed)
    put(net, "0.weight", mn.SphereProduct((6, 2, 3, 3), radius=[0.1, 1.0, 3.0, 1 / 3, 7.7, 2.0]))
    put(net, "2.weight", mn.SphereProduct(mn.Partition.transposed_filters((6, 2, 3, 3), groups=2)))
    put(net, "5.weight", mn.SphereProduct(mn.Partition.whole((5, 144)), radius=12.5))
    return net


def tied(seed=0):
    torch.manual_seed(seed)
    net = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    net["c"].weight = net["a"].weight = net["b"].weight
    return net


def snapshot(model):
    """Everything about a model that loading might change."""
    manifolds = {w.name: w.manifold.to_dict() for w in constrained_weights(model)}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return manifolds, values, {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def check_same(model, other):
    """The same keys, bits, parameter types and manifolds."""
    (manifolds, values, _), (others, other_values, _) = snapshot(model), snapshot(other)
    assert values.keys() == other_values.keys()
    for name, value in values.items():
        assert value.dtype == other_values[name].dtype
        assert torch.equal(value, other_values[name]), name
    assert manifolds == others
    kinds = {name: type(p) for name, p in model.named_parameters()}
    assert kinds == {name: type(p) for name, p in other.named_parameters()}


def check_untouched(model, before):
    manifolds, values, ids = snapshot(model)
    assert manifolds == before[0]
    assert ids == before[2]
    assert all(torch.equal(value, before[1][name]) for name, value in values.items())


def with_buffer(tensor):
    net = nn.Linear(2, 2)
    net.register_buffer("extra", tensor)
    return net
