"""The networks that a comparison can name, plain torch modules all of them."""

from __future__ import annotations

from manifold_nets.comparison.models.forms import converted_form
from manifold_nets.comparison.models.loading import MODEL_NAMES, build_model
from manifold_nets.comparison.models.mlp import multilayer_perceptron
from manifold_nets.comparison.models.resnet import SmallResNet
from manifold_nets.comparison.models.segnet import SegNetBasic
from manifold_nets.comparison.models.series import convolutions_1d
from manifold_nets.comparison.models.towers import TwoTowers
from manifold_nets.comparison.models.transformer import CharacterTransformer

__all__ = [
    "MODEL_NAMES",
    "CharacterTransformer",
    "SegNetBasic",
    "SmallResNet",
    "TwoTowers",
    "build_model",
    "converted_form",
    "convolutions_1d",
    "multilayer_perceptron",
]
