"""Ask which weights of a network have a scale that its output does not depend on.

Without arguments a small network with three kinds of normalization is diagnosed. Any other can be named, with the
shape of one input: python examples/diagnose_network.py torchvision:resnet18 3,224,224
"""

import sys

import torch
from torch import nn

import manifold_nets as mn


def build() -> nn.Module:
    """Weights in front of batch, group and layer normalization, in front of a sigmoid, and of nothing."""
    net = nn.Sequential()
    net.add_module("before_batch_norm", nn.Conv2d(3, 8, 3))
    net.add_module("batch_norm", nn.BatchNorm2d(8))
    net.add_module("relu", nn.ReLU())
    net.add_module("before_group_norm", nn.Conv2d(8, 8, 3))
    net.add_module("group_norm", nn.GroupNorm(2, 8))
    net.add_module("sigmoid", nn.Sigmoid())
    net.add_module("before_sigmoid", nn.Conv2d(8, 8, 3))
    net.add_module("sigmoid_again", nn.Sigmoid())
    net.add_module("flatten", nn.Flatten())
    net.add_module("before_layer_norm", nn.Linear(8 * 4 * 4, 16))
    net.add_module("layer_norm", nn.LayerNorm(16))
    net.add_module("classifier", nn.Linear(16, 10))
    return net


def main() -> None:
    """Print what was found, weight by weight."""
    torch.manual_seed(0)
    if len(sys.argv) == 3:
        model = mn.sources.load_model(sys.argv[1])
        shape = [int(size) for size in sys.argv[2].split(",")]
    else:
        model, shape = build(), [3, 10, 10]
    report = mn.diagnose(model, torch.randn(4, *shape))

    print(report)
    for weight in report.weights:
        print(f"\n{weight.name}: {weight.status}")
        if weight.partition is not None:
            print(f"  share one scale:   {weight.partition}")
            print(f"  absorbed by:       {', '.join(map(str, weight.absorbers))}")
            print(f"  must change along: {', '.join(weight.moves_along) or 'nothing'}")
        else:
            print(f"  chain broken by:   {weight.broken_by}")
        print(f"  certificate:       {weight.certificate}")
        print(f"  remedy:            {weight.remedy}")
    if report.disagreements:
        raise SystemExit("structure and certificate disagree: please report this network")


if __name__ == "__main__":
    main()
