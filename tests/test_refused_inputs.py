"""Inputs that a model refuses: what its own code raised is said of them, and chained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_unusual_models import ROWS, mlp
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import ExampleInputsError


class Refusing(nn.Module):
    """Raises an error of its own where it runs on real inputs; `torch.export` does not meet it."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.inner, self.error = mlp(), error

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            raise self.error
        return self.inner(x)


ERRORS = [IndexError("i"), ValueError("v"), TypeError("t"), KeyError("k"), AssertionError("a"), ZeroDivisionError("z")]


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("loss", [None, lambda outputs: outputs.mean()], ids=["no loss", "loss"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_the_model_raises_is_said_of_the_inputs_with_its_cause(error: Exception, loss: Any, memory: Any) -> None:
    with pytest.raises(ExampleInputsError, match=f"The model said: {type(error).__name__}") as caught:
        mn.diagnose(Refusing(error), torch.randn(ROWS), loss=loss, memory=memory)
    assert type(caught.value.__cause__) is type(error)


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_out_of_range_is_said_of_the_inputs(token: int) -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(ExampleInputsError, match="The model said: IndexError: index out of range") as caught:
        mn.diagnose(model, torch.full((4, 7), token))
    assert isinstance(caught.value.__cause__, IndexError)
    assert mn.diagnose(model, torch.full((4, 7), 9)).weights


@pytest.mark.parametrize("memory", ["full", "small"])
def test_integers_for_a_model_of_real_numbers_are_said_of_the_inputs(memory: Any) -> None:
    """The model refuses them in float32 as well: nothing is said of float64."""
    with pytest.raises(
        ExampleInputsError, match=r"shapes \[\(8, 10\)\] and dtypes \['int64'\].*The model said: RuntimeError"
    ):
        mn.diagnose(nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8)), torch.randint(0, 3, (8, 10)), memory=memory)


def test_empty_batches_are_refused() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8))
    with pytest.raises(ExampleInputsError, match=r"nothing but empty tensors, of shapes \[\(0, 10\)\]"):
        mn.diagnose(model, torch.randn(0, 10))
