"""Errors about the conversion of a model and its way back."""

from __future__ import annotations

from collections.abc import Sequence

from manifold_nets.errors.base import ManifoldNetsError, listed, near_matches

__all__ = [
    "ExportError",
    "FunctionChangedError",
    "NothingToConvertError",
    "PlanError",
    "ReportMismatchError",
    "SelectionError",
]


class SelectionError(ManifoldNetsError, ValueError):
    """A selection of weights matched nothing."""

    def __init__(self, option: str, pattern: str, names: Sequence[str]) -> None:
        near = near_matches(pattern, names)
        super().__init__(
            f"{option}={pattern!r} matches no weight; expected a pattern or predicate on these names: "
            f"{listed(names, 40)}. {near}{' ' if near else ''}Patterns are those of a shell: 'layer1.*', "
            "'*.conv?.weight'."
        )


class NothingToConvertError(ManifoldNetsError, ValueError):
    """No weight of a model has a scale symmetry that conversion could remove."""

    def __init__(self, model: str, reasons: Sequence[tuple[str, str]], remedies: Sequence[str] = ()) -> None:
        also = ""
        if remedies:
            names = ",".join(remedies)
            also = f"pass remedies={names!r} (--remedies on the command line) for its other symmetries, or "
        told = listed((f"{name} ({why})" for name, why in reasons), 12)
        super().__init__(
            f"{model}: nothing to convert: no selected weight is scale-invariant. Left: {told or 'no weights'}. "
            f"Scale-invariant weights stand in front of a normalization; {also}train this model as it is."
        )


class ReportMismatchError(ManifoldNetsError, ValueError):
    """A report or plan belongs to another model."""

    def __init__(self, model: str, reported: str, names: Sequence[str]) -> None:
        super().__init__(
            f"report: it was made for {reported}, but {model} differs from it in {listed(names)}. "
            "Run diagnose on this model."
        )


class PlanError(ManifoldNetsError, ValueError):
    """An edited plan cannot be read or carried out."""

    def __init__(self, source: str, found: str, expected: str) -> None:
        super().__init__(
            f"{source}: found {found}; expected {expected}. Write a fresh plan and edit that one; nothing was changed."
        )


class FunctionChangedError(ManifoldNetsError, RuntimeError):
    """A rewritten model does not compute what it computed before."""

    def __init__(self, model: str, mode: str, difference: float, limit: float, why_no_rounding: str = "") -> None:
        told = f" That is no rounding: {why_no_rounding}." if why_no_rounding else ""
        super().__init__(
            f"{model}: its output in {mode} mode would change by {difference:.3g}, relative, on the example inputs; at "
            f"most {limit:.3g} is expected.{told} Nothing was changed. Use radius='keep', or exclude the layers in "
            "question."
        )


class ExportError(ManifoldNetsError, RuntimeError):
    """A model cannot be written in a format; no file was written."""

    def __init__(self, path: object, tool: str, cause: BaseException) -> None:
        lines = str(cause).strip().splitlines()
        super().__init__(
            f"{path}: {tool} refused the model ({type(cause).__name__}: {lines[0] if lines else ''}); expected "
            "a network in evaluation mode, made of operations that it knows. Cast half precision to float32, or write "
            "the weights alone with the format safetensors."
        )
