"""Errors about the analysis of a model."""

from __future__ import annotations

from collections.abc import Sequence

from manifold_nets.errors.base import ManifoldNetsError, listed, near_matches

__all__ = ["AnalysisError", "ExampleInputsError", "LossError", "ParameterNameError", "UnsupportedModelError"]


class ExampleInputsError(ManifoldNetsError, ValueError):
    """Example inputs have a form that cannot be given to a model, or the model refused them."""

    def __init__(self, found: str, cause: BaseException | None = None) -> None:
        why = f" The model said: {type(cause).__name__}: {cause}." if cause is not None else ""
        super().__init__(
            f"example_inputs: found {found}; expected a tensor, a tuple of positional inputs, a dict of keyword "
            f"inputs, or ((positional, …), {{keyword: …}}), that the model accepts in training mode.{why} Pass what "
            "its forward takes, as a batch of at least two examples that are not constant."
        )


class AnalysisError(ManifoldNetsError, RuntimeError):
    """A model could not be copied for analysis, its structure could not be read, or it has no gradients."""

    def __init__(
        self, model: str, cause: BaseException, *, copying: bool = False, differentiating: bool = False
    ) -> None:
        lines = str(cause).strip().splitlines()
        self.why = f"{type(cause).__name__}: {lines[0] if lines else ''}"
        if copying:
            told = (
                f"copy.deepcopy could not copy it ({self.why}); a model that can be copied is expected. Take what "
                "cannot be copied (locks, open files, generators) out of its attributes, or analyse a submodule."
            )
        elif differentiating:
            told = (
                f"backward() through it failed in training mode ({self.why}); a model that can be trained is expected. "
                "Detach the input of an operation that has no derivative, and copy a tensor before it is changed in "
                "place; torch.autograd.set_detect_anomaly(True) shows where."
            )
        else:
            told = (
                f"torch.export could not trace it ({self.why}); a model whose control flow does not depend on the data "
                "is expected. Move such control flow out of forward, or analyse the submodule that it surrounds."
            )
        super().__init__(f"{model}: {told}")


class DoublePrecisionError(ManifoldNetsError, TypeError):
    """A model cannot compute in float64, in which the certificate is taken."""

    def __init__(self, model: str, cause: BaseException, place: str) -> None:
        why = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        super().__init__(
            f"{model}: its copy in float64 fails {place} ({why}); expected a model that computes in float64 as well. "
            "Replace the operator there by one that accepts float64 tensors, or analyse the submodules around it."
        )


class UnsupportedModelError(ManifoldNetsError, TypeError):
    """A model is of a kind whose weights or operations are out of reach."""

    def __init__(self, model: str, found: str, remedy: str) -> None:
        super().__init__(
            f"{model}: {found}; expected a Python module with floating-point weights that have values. {remedy}"
        )


class LossError(ManifoldNetsError, ValueError):
    """A loss is no function of the outputs and no name of one."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"loss: found {found}; expected 'cross_entropy', 'softmax', or a function of what the model returns whose "
            "result is one number. Leave it out to analyse the outputs themselves."
        )


class ParameterNameError(ManifoldNetsError, KeyError):
    """A report or a plan was asked for a name that it does not have."""

    def __init__(self, source: str, name: object, names: Sequence[str]) -> None:
        remedy = f"{near_matches(str(name), names)} Name one of these.".strip()
        expected = f"one of {listed(names, 40)}. {remedy}" if names else "no name, as there is none."
        super().__init__(f"{source}[{name!r}]: found no such name; expected {expected}")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows its argument in quotes
