"""torchvision's networks for classification, segmentation and video, with small inputs; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import manifold_nets as mn

CLASSIFICATION = (
    "alexnet convnext_tiny convnext_small convnext_base convnext_large densenet121 densenet161 densenet169 densenet201 "
    "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 "
    "efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf "
    "regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf regnet_y_400mf "
    "regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf resnet18 "
    "resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d shufflenet_v2_x0_5 "
    "shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_t swin_s swin_b "
    "swin_v2_t swin_v2_s swin_v2_b vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 "
    "vit_l_16 vit_l_32 vit_h_14 wide_resnet50_2 wide_resnet101_2"
).split()
SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 deeplabv3_resnet101 fcn_resnet50 fcn_resnet101 "
    "lraspp_mobilenet_v3_large"
).split()
VIDEO = "mc3_18 r3d_18 r2plus1d_18 s3d mvit_v1_b mvit_v2_s swin3d_t swin3d_s swin3d_b".split()
TORCHVISION = [*CLASSIFICATION, *SEGMENTATION, *VIDEO]

_SMALL_IMAGE = {"image_size": 64}
_KWARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_16": _SMALL_IMAGE,
    "vit_b_32": _SMALL_IMAGE,
    "vit_l_16": _SMALL_IMAGE,
    "vit_l_32": _SMALL_IMAGE,
    "vit_h_14": {"image_size": 56},
}
_SHAPES = {
    "inception_v3": (4, 3, 299, 299),
    "maxvit_t": (2, 3, 224, 224),
    "vit_h_14": (4, 3, 56, 56),
    "s3d": (2, 3, 16, 224, 224),
    **dict.fromkeys(("mvit_v1_b", "mvit_v2_s"), (1, 3, 16, 224, 224)),
    **dict.fromkeys("mc3_18 r3d_18 r2plus1d_18 swin3d_t swin3d_s swin3d_b".split(), (2, 3, 8, 64, 64)),
}


def torchvision_network(name: str) -> tuple[nn.Module, Any]:
    """A network of torchvision, and images (or clips) of the size that it is tried with."""
    model = mn.sources.load_model(f"torchvision:{name}", kwargs=_KWARGS.get(name, {}))
    return model, torch.randn(_SHAPES.get(name, (4, 3, 64, 64)))
