"""Define a network whose filters live on unit spheres from the start, and train it.

The layers are torch's, with the same arguments and the same `state_dict`; only the weights are constrained.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import manifold_nets as mn
from manifold_nets.layers import UnitNormConv2d


def build() -> nn.Module:
    """Two unit-norm convolutions, each followed by batch normalization, and a classifier that stays Euclidean."""
    return nn.Sequential(
        UnitNormConv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        UnitNormConv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def striped_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes in one of four directions, and which one it is."""
    labels = torch.randint(4, (count,))
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    phases = torch.stack([row, column, row + column, row - column])
    offset = 6.3 * torch.rand(count, 1, 1)
    return (torch.sin(1.5 * phases[labels] + offset) + torch.randn(count, 12, 12)).unsqueeze(1), labels


def main() -> None:
    """Train for 60 steps and show that every filter is where it should be."""
    torch.manual_seed(0)
    model = build()
    # Three groups: filters on their spheres, decayed weights, and biases and normalizations without decay.
    groups = mn.param_groups(model, weight_decay=5e-4)
    optimizer = mn.optim.RiemannianSGD(groups, lr=0.1, momentum=0.9)
    for group in groups:
        print(f"weight decay {group['weight_decay']:g}: {', '.join(group['param_names'])}")

    for step in range(60):
        x, labels = striped_images(64)
        loss = cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:2}: loss {float(loss.detach()):.3f}")

    x, labels = striped_images(1000)
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(1) == labels).double().mean()
    print(f"accuracy on new images: {float(accuracy):.1%}")
    for weight in mn.constraints.constrained_weights(model):
        deviation = float(weight.manifold.deviations(weight.parameter).max())
        print(f"{weight.name}: {weight.manifold}, norms off by at most {deviation:.1e}")


if __name__ == "__main__":
    main()
