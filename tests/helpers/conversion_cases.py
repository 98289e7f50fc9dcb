"""Networks to convert, and their images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import manifold_nets as mn
from helpers.toy_networks import Lambda

EVAL_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}


def randomized(model: nn.Module) -> nn.Module:
    """Random running statistics and affine parameters, as a trained network has them."""
    generator = torch.Generator().manual_seed(7)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.copy_(uniform(module.running_mean, -1, 1))
                module.running_var.copy_(uniform(module.running_var, 0.2, 3))
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(uniform(module.bias, -1, 1))
    return model


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, groups=2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return randomized(net).to(dtype)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def actions(model: nn.Module) -> dict[str, Any]:
    record = mn.conversion_record(model)
    assert record is not None
    return {a.name: a for a in record.plan.actions}


def other_net() -> nn.Module:
    """The same architecture with other values, and filters of norms between 0.1 and 10."""
    net = conv_net()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for tensor in [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]:
            factor = 10 ** (2 * torch.rand(1, generator=generator, dtype=torch.float64) - 1)
            tensor.mul_(1 + 0.3 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
            if tensor.ndim > 1:
                tensor.mul_(factor)
    return net


def gated() -> nn.Module:
    """A group normalization, so that norms are kept, beside a batch normalization."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 3),
    )  # fmt: skip
    return randomized(net).double()


def residual() -> nn.Module:
    """Weights that add to one stream, whose scale they share."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.second(torch.relu(m.n1(m.first(m.norm(x)))))
        return m.head(torch.relu(m.out(x)).mean((2, 3)))

    torch.manual_seed(5)
    net = Lambda(
        forward, stem=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), first=nn.Conv2d(4, 5, 1),
        n1=nn.BatchNorm2d(5), second=nn.Conv2d(5, 4, 1), out=nn.BatchNorm2d(4), head=nn.Linear(4, 2),
    )  # fmt: skip
    return randomized(net).double()
