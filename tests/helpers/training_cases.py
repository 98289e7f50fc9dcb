"""A small network on spheres and plain training loops, with which the places where people train are compared."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import manifold_nets as mn
from manifold_nets.constraints import attach, constrained_weights
from manifold_nets.optim import RiemannianAdam, RiemannianSGD

STEPS = 8
KINDS = {
    "sgd": (RiemannianSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (RiemannianAdam, {"lr": 0.02, "amsgrad": True}),
}


def network(norm="batch", dtype=torch.float64, dropout=0.0, radius=(0.5, 1.2, 1.8, 2.5)):
    """Two convolutions on spheres of several radii, each before a normalization, and a plain classifier."""
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(2, channels)}[norm]
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, bias=False), norms(4), nn.ReLU()),
        *(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), norms(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(6, 3)),
    ).to(dtype)
    spheres = {
        0: mn.SphereProduct((4, 2, 3, 3), radius=radius),
        3: mn.SphereProduct(mn.Partition.transposed_filters((4, 3, 3, 3), groups=2)),
    }
    for place, sphere in spheres.items():
        attach(net[place], "weight", sphere, sphere.projx(net[place].weight.detach()))
    return net


def optimizer_of(net, kind, **changes):
    """An optimizer over the groups of a model, with decay on plain weights."""
    make, options = KINDS[kind]
    return make(mn.param_groups(net, weight_decay=0.01), **{**options, **changes})


def batches(steps=STEPS, size=8, dtype=torch.float64):
    """The same images and labels at every call."""
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def values(net):
    """The parameters by name, without the prefixes of wrappers."""
    return {
        name.replace("_orig_mod.", "").replace("module.", ""): parameter.detach().clone()
        for name, parameter in net.named_parameters()
    }


def train(net, optimizer, data, between=lambda: None, forward=None):
    """Take a step for each batch as a plain loop does; return the parameters after each.

    ``between`` runs after the backward pass, before the step; ``forward`` stands in for the call of the network.
    """
    path = []
    for x, y in data:
        optimizer.zero_grad()
        cross_entropy((forward or net)(x), y).backward()
        between()
        optimizer.step()
        path.append(values(net))
    return path


def plain_path(kind, norm="batch", dtype=torch.float64, **options):
    """The path of the plain loop in one process."""
    net = network(norm, dtype)
    return train(net, optimizer_of(net, kind), batches(dtype=dtype), **options)


def check_same_path(found, expected, eps=0.0):
    """The same parameters after every step; with an ``eps``, to 256 roundings of each tensor's scale for each step."""
    assert len(found) == len(expected) > 0
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=1):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            off = float((value.double() - theirs[name].double()).abs().max())
            allowed = 256 * step * eps * max(1.0, float(theirs[name].abs().max()))
            assert off <= allowed, f"step {step}, {name}: off by {off:.2g}, allowed {allowed:.2g}"


def check_on_spheres(net):
    """Every constrained weight keeps its norms to 4 roundings."""
    weights = list(constrained_weights(net))
    assert len(weights) == 2
    for weight in weights:
        eps = torch.finfo(weight.parameter.dtype).eps
        assert float(weight.manifold.deviations(weight.parameter).max()) <= 4 * eps, weight.name
