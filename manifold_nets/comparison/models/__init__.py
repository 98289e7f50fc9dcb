"""The networks that a comparison can name, plain torch modules all of them."""

from __future__ import annotations

from manifold_nets.comparison.models.loading import MODEL_NAMES, build_model
from manifold_nets.comparison.models.mlp import multilayer_perceptron
from manifold_nets.comparison.models.resnet import SmallResNet
from manifold_nets.comparison.models.segnet import SegNetBasic

__all__ = ["MODEL_NAMES", "SegNetBasic", "SmallResNet", "build_model", "multilayer_perceptron"]
