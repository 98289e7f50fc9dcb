"""The errors of the package. Every message states what was found and where, what was expected, and what to do."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Join items with commas, cutting a long list and saying how many were left out."""
    texts = [str(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the known names closest to an unknown one; an empty string where none is close.

    Example:
        >>> near_matches("rsdg", ["adam", "radam", "rsgd"])
        'Near matches: rsgd.'
    """
    near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
    return f"Near matches: {', '.join(near)}." if near else ""


def described(error: BaseException) -> str:
    """Return an error's type and the first line of its message: what torch appends is advice for other situations.

    Example:
        >>> described(ValueError("the file is empty")), described(KeyError())
        ('ValueError: the file is empty', 'KeyError')
    """
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ManifoldNetsError(Exception):
    """Base of every error that this package raises on purpose."""


class FoundError(ManifoldNetsError):
    """Base of the errors of the form "NAME: found X; expected Y. What to do.".

    Args:
        name: the argument, parameter or file that is wrong.
        found: its value.
        expected: which values are valid.
        remedy: what to do; by default the class attribute ``remedy``.
    """

    remedy = ""

    def __init__(self, name: object, found: object, expected: str, remedy: str = "") -> None:
        super().__init__(f"{name}: found {found}; expected {expected}. {remedy or self.remedy}".strip())
        self.name = str(name)


# ---- arguments -------------------------------------------------------------------------------------------------------


class ArgumentTypeError(FoundError, TypeError):
    """An argument has the wrong type."""

    def __init__(self, name: str, found: object, expected: str, remedy: str) -> None:
        what = f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"
        what = reprlib.repr(found) if isinstance(found, (str, int, float, list, tuple)) else what
        super().__init__(name, what, expected, remedy)


class OptionError(FoundError, ValueError):
    """An option has an invalid value, or selects nothing."""

    remedy = "Pass a valid value, or leave the option out."

    def __init__(self, name: str, found: object, expected: str, near: str = "") -> None:
        super().__init__(name, repr(found), expected, f"{near} {self.remedy}".strip())


class ParameterNameError(FoundError, KeyError):
    """A report or a plan has no entry of this name."""

    def __init__(self, source: str, name: object, names: Sequence[str]) -> None:
        expected = f"one of {listed(names, 40)}" if names else "nothing, because there are no entries"
        remedy = f"{near_matches(str(name), names)} Use one of these names.".strip() if names else ""
        super().__init__(f"{source}[{name!r}]", "no such name", expected, remedy)

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows its argument in quotes


class MissingExtraError(ManifoldNetsError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, feature: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed, and {feature} need it. Run pip install 'manifold_nets[{extra}]'."
        )


# ---- files and models by name ----------------------------------------------------------------------------------------


class OutputFileError(ManifoldNetsError, OSError):
    """A file cannot be written; an existing file at that path is unchanged."""


class CheckpointError(ManifoldNetsError, ValueError, TypeError):
    """A weights file cannot be read or written, or does not fit the model.

    Args:
        path: the file.
        message: what is wrong with it, and what to do.
        differences: the differences between file and model, one string each.
    """

    def __init__(self, path: str | os.PathLike[str], message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(f"{os.fspath(path)}: {message}")
        self.path, self.differences = os.fspath(path), tuple(differences)


class CheckpointFormatError(CheckpointError):
    """A weights file cannot be read by this release: it is damaged, of another kind, or newer."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        found: str,
        remedy: str,
        expected: str = "a checkpoint written by manifold_nets.save",
    ) -> None:
        super().__init__(path, f"found {found}; expected {expected}. {remedy}")


class CheckpointMismatchError(CheckpointError):
    """The names, shapes, dtypes or tied weights in a file differ from those of the model, which is unchanged."""


class ModelSpecError(FoundError, ValueError):
    """A string is not the name of a model."""

    _FORMS = "package.module:callable, file.py:callable, file.py, torchvision:NAME, timm:NAME, hf:FOLDER or hf:NAME"

    def __init__(self, text: str, expected: str = _FORMS, remedy: str = "") -> None:
        remedy = remedy or "Write the callable that builds the model after the last colon."
        super().__init__("MODEL", repr(text), expected, remedy)


class ModelNotFoundError(ManifoldNetsError, LookupError):
    """The module, file, attribute or architecture in the name of a model does not exist."""

    def __init__(self, spec: object, found: str, remedy: str) -> None:
        super().__init__(f"{spec}: {found}. {remedy}")


class ModelBuildError(ManifoldNetsError, RuntimeError):
    """The code that builds a model raised an error or `SystemExit`, or did not return a model."""

    def __init__(self, spec: object, found: str, remedy: str = "") -> None:
        remedy = remedy or (
            "Check that this call works in Python, and pass all arguments by keyword (--kwargs on the command line)."
        )
        super().__init__(f"{spec}: {found}; expected a callable that returns a torch.nn.Module. {remedy}")


# ---- analysis --------------------------------------------------------------------------------------------------------


class ExampleInputsError(ManifoldNetsError, ValueError):
    """Example inputs have an unsupported form, or the model raised an error on them."""

    def __init__(self, found: str, cause: BaseException | None = None) -> None:
        why = f" The model raised {type(cause).__name__}: {cause}." if cause is not None else ""
        super().__init__(
            f"example_inputs: found {found}; expected a tensor, a tuple of positional inputs, a dict of keyword "
            f"inputs, or ((positional, …), {{keyword: …}}), that the model accepts in training mode.{why} Pass the "
            "arguments of its forward (--inputs FILE on the command line), with a batch of at least two examples that "
            "are not constant."
        )


class AnalysisError(ManifoldNetsError, RuntimeError):
    """A model could not be copied for the analysis, traced, or differentiated."""

    def __init__(
        self, model: str, cause: BaseException, *, copying: bool = False, differentiating: bool = False
    ) -> None:
        self.why = described(cause)
        if copying:
            message = (
                f"copy.deepcopy could not copy it ({self.why}). Remove the attributes that cannot be copied (locks, "
                "open files, generators), or analyse a submodule."
            )
        elif differentiating:
            message = (
                f"backward() failed in training mode ({self.why}). Detach the inputs of operations without a "
                "derivative, and clone tensors before changing them in place; "
                "torch.autograd.set_detect_anomaly(True) shows where."
            )
        else:
            message = (
                f"torch.export could not trace it ({self.why}). Move data-dependent control flow out of forward, or "
                "analyse a submodule without it."
            )
        super().__init__(f"{model}: {message}")


class DoublePrecisionError(ManifoldNetsError, TypeError):
    """A model does not run in float64, which the analysis needs."""

    def __init__(self, model: str, cause: BaseException, place: str) -> None:
        super().__init__(
            f"{model}: the analysis needs float64, but running it in float64 fails {place} ({described(cause)}). "
            "Replace the operator there with one that accepts float64 tensors, or analyse the submodules around it."
        )


class UnsupportedModelError(FoundError, TypeError):
    """A model cannot be analysed or converted: scripted, quantized, lazy, or made in inference mode."""

    def __init__(self, model: str, found: str, remedy: str) -> None:
        super().__init__(model, found, "a Python module with floating-point weights that have values", remedy)


class ReportMismatchError(ManifoldNetsError, ValueError):
    """A report or plan belongs to another model."""

    def __init__(self, model: str, reported: str, names: Sequence[str]) -> None:
        super().__init__(
            f"report: it was made for {reported}, but {model} differs from it in {listed(names)}. "
            "Run diagnose on this model."
        )


# ---- weights on spheres ----------------------------------------------------------------------------------------------


class PartitionError(FoundError, ValueError):
    """A partition does not fit its tensor."""

    def __init__(self, found: object, expected: str, remedy: str) -> None:
        super().__init__("partition of a weight", found, expected, remedy)


class DegenerateGroupError(ManifoldNetsError, ValueError):
    """A group of weights is zero or not finite, so it has no direction on a sphere."""

    def __init__(self, name: str, groups: Sequence[int], norms: Sequence[float]) -> None:
        found = listed(f"group {g} with norm {n:.6g}" for g, n in zip(groups, norms, strict=True))
        super().__init__(
            f"{name}: {found}; every group needs a finite, non-zero norm to have a direction on "
            "its sphere. Re-initialize or prune these groups, or exclude this weight."
        )
        self.name, self.groups, self.norms = name, tuple(groups), tuple(norms)


class OffManifoldError(ManifoldNetsError, ValueError):
    """A constrained weight is off its spheres."""

    def __init__(self, name: str, group: int, norm: float, radius: float, remedy: str | Callable[[], str]) -> None:
        deviation = abs(norm / radius - 1) if radius else math.inf  # the padding row of an embedding is zero
        some = math.isfinite(deviation) and deviation > 0
        # Two digits of the difference, and no fewer than eight in all; seventeen tell any two numbers apart.
        digits = min(max(8, 2 - math.floor(math.log10(deviation))), 17) if some else 8
        off = f", off by {deviation:.2g} of the radius" if some else ""
        super().__init__(
            f"{name}: group {group} has norm {norm:.{digits}g}{off}, but its sphere has radius {radius:.{digits}g}. "
            f"{remedy if isinstance(remedy, str) else remedy()}"
        )


class ConstraintError(FoundError, ValueError, TypeError):
    """A weight cannot be put on its manifold, or shares a sphere with weights that are missing."""

    remedy = "Choose a weight that fits."

    @classmethod
    def joint(cls, name: str, others: Sequence[str], found: str = "this weight alone") -> ConstraintError:
        """Return the error for one weight of a joint sphere where all of its weights are needed."""
        return cls(
            name,
            f"{found}, but its groups share one norm with those of {listed(others)}",
            "all of them together",
            "Use manifold_nets.joint_spheres(model), manifold_nets.project(model), and one parameter group of "
            "manifold_nets.optim for all of them; or remove the constraint with manifold_nets.revert(model).",
        )


# ---- conversion ------------------------------------------------------------------------------------------------------


class NothingToConvertError(ManifoldNetsError, ValueError):
    """None of the selected weights has a scale symmetry that conversion could remove."""


class PlanError(FoundError, ValueError):
    """An edited plan cannot be read or applied."""

    remedy = "Nothing was changed; write a new plan and edit that."


class FunctionChangedError(ManifoldNetsError, RuntimeError):
    """A conversion or export would change the output of a model."""

    def __init__(self, model: str, mode: str, difference: float, limit: float, remedy: str) -> None:
        super().__init__(
            f"{model}: its output in {mode} mode would change by a relative {difference:.3g} on the example inputs; "
            f"at most {limit:.3g} is allowed. {remedy}"
        )


class ExportError(ManifoldNetsError, RuntimeError):
    """A model cannot be exported to a format; no file was written."""

    def __init__(self, path: object, tool: str, cause: BaseException) -> None:
        super().__init__(
            f"{path}: {tool} failed on the model ({described(cause)}); expected a network in evaluation mode with "
            "operations that this tool supports. Cast half precision to float32, or export only the weights, in the "
            "safetensors format."
        )


class ProjectionError(ManifoldNetsError, ValueError):
    """Values cannot be put on the spheres of a weight without changing the output of its model."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


# ---- optimizers ------------------------------------------------------------------------------------------------------


class EuclideanStepError(ManifoldNetsError, RuntimeError):
    """A weight on spheres would be trained as a Euclidean one.

    Args:
        names: the weights.
        optimizer: the Euclidean optimizer; None if the parameter objects are plain ones.
    """

    def __init__(self, names: Sequence[str], optimizer: str | None = None) -> None:
        found = f"{listed(dict.fromkeys(names))}: constrained to a product of spheres, but "
        if optimizer is None:
            found += (
                "its parameter was replaced by a plain one (by load_state_dict(assign=True), to_empty or sharding), "
                "is that from before the constraint, or is part of another parameter, so it would be trained as a "
                "Euclidean weight. Build the optimizer from manifold_nets.param_groups(model), which finds the "
                "manifold through the model. With FullyShardedDataParallel pass use_orig_params=True. Remove "
                "weight_norm and other parametrizations first, or the constraint (manifold_nets.revert)."
            )
        else:
            found += (
                f"{optimizer} is about to step it as a Euclidean weight; nothing was changed. Use "
                "manifold_nets.optim.RiemannianSGD or RiemannianAdam with manifold_nets.param_groups(model); make this "
                "optimizer's steps tangent with manifold_nets.optim.on_spheres(optimizer, model); or, if your code "
                "puts the weight back on its spheres itself, call manifold_nets.optim.allow_euclidean(optimizer)."
            )
        super().__init__(found)
        self.names = tuple(names)


class ParameterGroupError(FoundError, ValueError, TypeError):
    """A parameter group combines weights, manifolds or options that do not fit each other."""

    remedy = (
        "Build the groups with manifold_nets.param_groups(model), or "
        'give "manifolds" one SphereProduct or None for each of "params".'
    )

    @classmethod
    def on_spheres(cls, name: str, found: str, expected: str) -> ParameterGroupError:
        """Return the error for a weight on spheres that no step supports, as it is or with this option."""
        remedy = "Change that, or train this weight without the constraint (manifold_nets.revert)."
        return cls(f"{name} lies on a product of spheres", found, expected, remedy)


class StepInputError(FoundError, RuntimeError, TypeError):
    """An optimizer step cannot use a weight, its gradient or its state; nothing was changed."""

    def __init__(self, name: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(name, found, f"{expected}; nothing was changed", remedy)


class OptimizerStateError(FoundError, ValueError):
    """A saved optimizer state does not fit the optimizer that loads it, or the spheres of its weights."""

    remedy = "Load the state of the same optimizer class for a model converted in the same way, or start without it."

    def __init__(self, name: str, found: str, expected: str, remedy: str = "") -> None:
        super().__init__(f"state of {name}", found, f"{expected}; nothing was loaded", remedy)


class NativeKernelError(FoundError, RuntimeError):
    """``fused=True`` was requested, but the compiled kernel for weights on spheres is not available."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(
            "fused=True",
            reason,
            "the compiled kernel for weights on spheres; nothing was changed",
            f"{remedy}, or leave fused out: steps then use torch's operations.",
        )


class LearningRateWarning(UserWarning):
    """Converted weights would be trained at the plain network's learning rate, which has another meaning on spheres.

    Args:
        names: the weights.
        rate: their learning rate.
        matched: the matching rate on spheres, the median over the weights.
        formula: how the matching rate is computed.
    """

    def __init__(self, names: Sequence[str], rate: float, matched: float, formula: str) -> None:
        super().__init__(
            f"{listed(names, 3)}: these converted weights have the plain parameters' learning rate {rate:g}, but on "
            f"spheres a learning rate is an angle. The rate that matches the plain network's next step is "
            f"{matched:.3g} in the median ({formula}). Pass manifold_nets.param_groups(model, "
            f"sphere_lr={matched:.3g}), or one rate per weight from "
            f"manifold_nets.matched_learning_rates(…).by_weight(); sphere_lr={rate:g} keeps the rate."
        )
        self.names, self.rate, self.matched = tuple(names), rate, matched


# ---- pymanopt --------------------------------------------------------------------------------------------------------


class PointError(FoundError, ValueError):
    """A model's parameters cannot be turned into a point, or a point does not fit the model.

    Example:
        >>> import torch
        >>> from manifold_nets import pymanopt_bridge as bridge
        >>> net = torch.nn.Linear(2, 2).requires_grad_(False)
        >>> bridge.problem(net, torch.nn.functional.mse_loss, torch.ones(8, 2), torch.ones(8, 2))
        Traceback (most recent call last):
        manifold_nets.errors.PointError: Linear: found no parameter that requires a gradient; expected at least one...
    """


class CostError(FoundError, ValueError):
    """A loss is not a deterministic, differentiable number.

    Example:
        >>> import torch
        >>> from manifold_nets import pymanopt_bridge as bridge
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        >>> bridge.problem(net, torch.nn.functional.mse_loss, torch.ones(8, 2), torch.ones(8, 2))
        Traceback (most recent call last):
        manifold_nets.errors.CostError: loss: found ... for the same parameters; expected ...
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__("loss", found, expected, remedy)


# ---- deprecated names, removed in the next release -------------------------------------------------------------------

_FORMER: dict[str, type[Exception]] = {
    "CheckpointTensorError": CheckpointError,
    "ConstraintLostError": EuclideanStepError,
    "DiskFullError": OutputFileError,
    "JointSphereError": ConstraintError,
    "LossError": OptionError,
    "ModelExitError": ModelBuildError,
    "PlainStateError": ProjectionError,
    "SelectionError": OptionError,
    "SparseGradientError": StepInputError,
    "SphereOptionError": ParameterGroupError,
    "StateDictMismatchError": CheckpointMismatchError,
    "UnsupportedManifoldError": ParameterGroupError,
    "WeightsFileError": CheckpointFormatError,
}
__all__ = [name for name, value in list(globals().items()) if isinstance(value, type) and value.__module__ == __name__]
for _module in ("analysis", "base", "checkpoints", "constraints", "conversion", "files", "models", "optimizers"):
    sys.modules[f"{__name__}.{_module}"] = sys.modules[__name__]


def __getattr__(name: str) -> object:
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now called {_FORMER[name].__name__}", DeprecationWarning, stacklevel=2)
    return _FORMER[name]
