"""Arguments of another kind than a function takes, names that a report does not have, inputs that a model refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets import errors
from manifold_nets.errors import ArgumentTypeError, ExampleInputsError, ParameterNameError, near_matches


@pytest.mark.parametrize(("model", "found"), [("resnet18", "'resnet18'"), (nn.Linear, "the class Linear"), (3, "3")])
def test_what_is_no_model_is_refused_by_what_it_is(model: Any, found: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^model: found {found}; expected a torch\.nn\.Module object"):
        mn.diagnose(model, torch.randn(4, 3))


def test_long_arguments_are_cut() -> None:
    error = ArgumentTypeError("model", ["layer"] * 1000, "a network", "Make one.")
    assert len(str(error)) < 200


def test_a_name_that_a_report_does_not_have_is_answered_with_near_ones() -> None:
    report = mn.diagnose(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(8, 4))
    told = r"^report\['0\.wieght'\]: found no such name; expected one of 0\.weight, 2\.weight\. Near matches: 0\.weight"
    with pytest.raises(ParameterNameError, match=told):
        report["0.wieght"]
    with pytest.raises(KeyError, match="Use one of these names"):
        report["nothing"]


def test_nothing_is_said_to_be_near_where_nothing_is() -> None:
    assert near_matches("rsdg", ["adam", "rsgd", "sgd"]) == "Near matches: rsgd, sgd."
    assert near_matches("zzz", ["adam", "rsgd", "sgd"]) == near_matches("adam", []) == ""


class Refusing(nn.Module):
    """Raises an error of its own where it runs on real inputs; `torch.export` does not meet it."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.inner, self.error = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8)), error

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            raise self.error
        return self.inner(x)


ERRORS = [IndexError("i"), ValueError("v"), TypeError("t"), KeyError("k"), AssertionError("a"), ZeroDivisionError("z")]


@pytest.mark.parametrize("memory", ["full", "small"])
@pytest.mark.parametrize("loss", [None, lambda outputs: outputs.mean()], ids=["no loss", "loss"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_the_model_raises_is_said_of_the_inputs_with_its_cause(error: Exception, loss: Any, memory: Any) -> None:
    with pytest.raises(ExampleInputsError, match=f"The model raised {type(error).__name__}") as caught:
        mn.diagnose(Refusing(error), torch.randn(8, 10), loss=loss, memory=memory)
    assert type(caught.value.__cause__) is type(error)


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_out_of_range_is_said_of_the_inputs(token: int) -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(ExampleInputsError, match="The model raised IndexError: index out of range") as caught:
        mn.diagnose(model, torch.full((4, 7), token))
    assert isinstance(caught.value.__cause__, IndexError)
    assert mn.diagnose(model, torch.full((4, 7), 9)).weights


@pytest.mark.parametrize("memory", ["full", "small"])
def test_integers_for_a_model_of_real_numbers_are_said_of_the_inputs(memory: Any) -> None:
    """The model refuses them in float32 as well: nothing is said of float64."""
    with pytest.raises(
        ExampleInputsError, match=r"shapes \[\(8, 10\)\] and dtypes \['int64'\].*The model raised RuntimeError"
    ):
        mn.diagnose(nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8)), torch.randint(0, 3, (8, 10)), memory=memory)


def test_empty_batches_are_refused() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8))
    with pytest.raises(ExampleInputsError, match=r"only empty tensors, of shapes \[\(0, 10\)\]"):
        mn.diagnose(model, torch.randn(0, 10))


@pytest.mark.parametrize(("former", "present"), errors._FORMER.items())
def test_former_names_of_errors_go_on_with_a_warning(former: str, present: type[Exception]) -> None:
    with pytest.warns(DeprecationWarning, match=f"{former} is now called {present.__name__}"):
        assert getattr(errors, former) is present
    assert issubclass(present, errors.ManifoldNetsError)
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchError'"):
        _ = errors.NoSuchError
