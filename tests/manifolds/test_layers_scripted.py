"""Layers with unit-norm filters compiled by `torch.jit.script`: the same outputs, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.layers import UNIT_NORM_LAYERS


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        # The category has changed from one release of torch to another.
        warnings.filterwarnings("ignore", ".*torch.jit")
        yield


def layer_and_input(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    if kind is mn.layers.UnitNormLinear:
        return kind(4, 6), torch.randn(2, 4)
    if kind in (mn.layers.UnitNormEmbedding, mn.layers.UnitNormEmbeddingBag):
        return kind(4, 6, padding_idx=1), torch.randint(4, (2, 3))
    return kind(4, 6, 3, groups=2, padding=1), torch.randn(2, 4, *(7,) * int(kind.__name__[-2]))


def check_scripted(layer: nn.Module, x: Tensor) -> None:
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(x), layer(x))
    assert list(scripted.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize("kind", UNIT_NORM_LAYERS.values(), ids=lambda kind: kind.__name__)
def test_a_scripted_layer_computes_what_the_layer_does(kind: type[nn.Module]) -> None:
    layer, x = layer_and_input(kind)
    check_scripted(layer, x)
    check_scripted(nn.Sequential(layer, nn.ReLU()), x)


def test_an_annotation_as_text_could_not_be_scripted() -> None:
    """The sabotage twin: what an annotated attribute in a module of texts for annotations leads to."""

    class Annotated(nn.Linear):
        __annotations__ = {"weight": "Tensor"}

    with pytest.raises(ValueError, match="Unknown type annotation"):
        check_scripted(Annotated(4, 6), torch.randn(2, 4))
