"""The errors of the package. Every message says what was found and where, what was expected, and what to do."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
import sys
from collections.abc import Iterable, Sequence

__all__ = [
    "AnalysisError",
    "ArgumentTypeError",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "CheckpointTensorError",
    "ConstraintError",
    "ConstraintLostError",
    "CostError",
    "DegenerateGroupError",
    "DiskFullError",
    "DoublePrecisionError",
    "EuclideanStepError",
    "ExampleInputsError",
    "ExportError",
    "FunctionChangedError",
    "JointSphereError",
    "LearningRateWarning",
    "LossError",
    "ManifoldNetsError",
    "MissingExtraError",
    "ModelBuildError",
    "ModelExitError",
    "ModelNotFoundError",
    "ModelSpecError",
    "NativeKernelError",
    "NothingToConvertError",
    "OffManifoldError",
    "OptimizerStateError",
    "OptionError",
    "OutputFileError",
    "ParameterGroupError",
    "ParameterNameError",
    "PartitionError",
    "PlainStateError",
    "PlanError",
    "PointError",
    "ProjectionError",
    "ReportMismatchError",
    "SelectionError",
    "SparseGradientError",
    "SphereOptionError",
    "StateDictMismatchError",
    "StepInputError",
    "UnsupportedManifoldError",
    "UnsupportedModelError",
    "WeightsFileError",
]


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Join items with commas, cutting a long list and saying how many were left out."""
    texts = [str(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"


def near_matches(name: str, known: Iterable[str]) -> str:
    """Say in a sentence which known names look like one that is not known; nothing where none does.

    Example:
        >>> near_matches("rsdg", ["adam", "radam", "rsgd"])
        'Near matches: rsgd.'
    """
    near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
    return f"Near matches: {', '.join(near)}." if near else ""


def _cause(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class ManifoldNetsError(Exception):
    """Base of every error that this package raises on purpose."""


# ---- arguments -------------------------------------------------------------------------------------------------------


class ArgumentTypeError(ManifoldNetsError, TypeError):
    """An argument is of another kind than the function takes."""

    def __init__(self, argument: str, found: object, expected: str, remedy: str) -> None:
        what = f"the class {found.__name__}" if isinstance(found, type) else f"an object of type {type(found).__name__}"
        what = reprlib.repr(found) if isinstance(found, (str, int, float, list, tuple)) else what
        super().__init__(f"{argument}: found {what}; expected {expected}. {remedy}")


class OptionError(ManifoldNetsError, ValueError):
    """An option has a value that has no meaning."""

    def __init__(self, option: str, found: object, expected: str, near: str = "") -> None:
        remedy = f"{near} Pass such a value or leave the option out.".strip()
        super().__init__(f"{option}: found {found!r}; expected {expected}. {remedy}")


class SelectionError(ManifoldNetsError, ValueError):
    """A selection of weights matched nothing."""

    def __init__(self, option: str, pattern: str, names: Sequence[str]) -> None:
        near = near_matches(pattern, names)
        super().__init__(
            f"{option}={pattern!r} matches no weight; expected a pattern or predicate on these names: "
            f"{listed(names, 40)}. {near}{' ' if near else ''}Patterns are those of a shell: 'layer1.*', "
            "'*.conv?.weight'."
        )


class ParameterNameError(ManifoldNetsError, KeyError):
    """A report or a plan was asked for a name that it does not have."""

    def __init__(self, source: str, name: object, names: Sequence[str]) -> None:
        remedy = f"{near_matches(str(name), names)} Name one of these.".strip()
        expected = f"one of {listed(names, 40)}. {remedy}" if names else "no name, as there is none."
        super().__init__(f"{source}[{name!r}]: found no such name; expected {expected}")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError shows its argument in quotes


class MissingExtraError(ManifoldNetsError, ImportError):
    """A package that an optional feature needs is not installed."""

    def __init__(self, package: str, feature: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; {feature} need it. Install the extra: pip install 'manifold_nets[{extra}]'."
        )


# ---- files -----------------------------------------------------------------------------------------------------------


class OutputFileError(ManifoldNetsError, OSError):
    """A file cannot be written; one that it would have replaced is unchanged."""


DiskFullError = OutputFileError


class CheckpointError(ManifoldNetsError, ValueError, TypeError):
    """A file cannot be read as a checkpoint, or a model does not fit it or cannot be stored in one.

    Args:
        path: the file.
        message: what is wrong with it, and what to do.
        differences: in what file and model differ, one text each.
    """

    def __init__(self, path: str | os.PathLike[str], message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(f"{os.fspath(path)}: {message}")
        self.path, self.differences = os.fspath(path), tuple(differences)


class CheckpointFormatError(CheckpointError):
    """A file is not a checkpoint that this release can read."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint does not fit the model it was to be loaded into; the model was not touched."""


class CheckpointTensorError(CheckpointError):
    """A model holds something that a checkpoint cannot store; no file was written."""


class WeightsFileError(ManifoldNetsError, ValueError):
    """A file of weights cannot be read, or does not fit the model."""

    def __init__(self, path: object, found: str, remedy: str) -> None:
        super().__init__(f"{path}: found {found}; expected a safetensors file or a torch file of weights. {remedy}")


class StateDictMismatchError(ManifoldNetsError, ValueError):
    """The names or shapes of a file of weights are not those of the model."""

    def __init__(
        self, path: str, model: str, missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]
    ) -> None:
        parts = {"missing from the file": missing, "unknown to the model": unexpected, "of another shape": shapes}
        found = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in parts.items() if names)
        remedy = "Build the model with the arguments that it was trained with (--kwargs on the command line)."
        if missing and {name.partition(".")[2] for name in unexpected} >= set(missing):
            prefix = unexpected[0].partition(".")[0]
            remedy = f"The file's names begin with {prefix!r} (a wrapped model): save the weights of model.{prefix}."
        super().__init__(f"{path}: weights do not fit {model}: {found}. {remedy}")
        self.missing, self.unexpected, self.shapes = tuple(missing), tuple(unexpected), tuple(shapes)


# ---- models by name --------------------------------------------------------------------------------------------------


class ModelSpecError(ManifoldNetsError, ValueError):
    """A text does not name a model."""

    def __init__(self, text: str) -> None:
        super().__init__(
            f"MODEL: found {text!r}; expected package.module:callable, file.py:callable, torchvision:NAME or "
            "timm:NAME. Write the callable that builds the model after the last colon."
        )


class ModelNotFoundError(ManifoldNetsError, LookupError):
    """A module, a file, an attribute or an architecture that a specification names does not exist."""

    def __init__(self, spec: object, found: str, remedy: str) -> None:
        super().__init__(f"{spec}: {found}. {remedy}")


class ModelBuildError(ManifoldNetsError, RuntimeError):
    """A callable that a specification names built no model."""

    def __init__(self, spec: object, found: str) -> None:
        super().__init__(
            f"{spec}: {found}; expected a callable that returns a torch.nn.Module. Check that it runs in Python as "
            "written, and pass its arguments as keyword arguments (--kwargs on the command line)."
        )


class ModelExitError(ManifoldNetsError, RuntimeError):
    """The code of a model, or of what it is trained on, called `sys.exit` while it ran."""

    def __init__(self, spec: str, cause: SystemExit) -> None:
        said = f": {cause}" if str(cause) else ""
        super().__init__(
            f"{spec}: its code raised SystemExit{said} while it ran; expected code that returns or raises an error. "
            "Take the call of sys.exit, exit or quit out of it."
        )


# ---- analysis --------------------------------------------------------------------------------------------------------


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
        self.why = _cause(cause)
        if copying:
            message = (
                f"copy.deepcopy could not copy it ({self.why}); a model that can be copied is expected. Take what "
                "cannot be copied (locks, open files, generators) out of its attributes, or analyse a submodule."
            )
        elif differentiating:
            message = (
                f"backward() through it failed in training mode ({self.why}); a model that can be trained is expected. "
                "Detach the input of an operation that has no derivative, and copy a tensor before it is changed in "
                "place; torch.autograd.set_detect_anomaly(True) shows where."
            )
        else:
            message = (
                f"torch.export could not trace it ({self.why}); a model whose control flow does not depend on the data "
                "is expected. Move such control flow out of forward, or analyse the submodule that it surrounds."
            )
        super().__init__(f"{model}: {message}")


class DoublePrecisionError(ManifoldNetsError, TypeError):
    """A model cannot compute in float64, which the analysis needs."""

    def __init__(self, model: str, cause: BaseException, place: str) -> None:
        super().__init__(
            f"{model}: its copy in float64 fails {place} ({_cause(cause)}); expected a model that computes in float64 "
            "as well. Replace the operator there by one that accepts float64 tensors, or analyse the submodules around "
            "it."
        )


class UnsupportedModelError(ManifoldNetsError, TypeError):
    """A model is of a kind whose weights or operations are out of reach."""

    def __init__(self, model: str, found: str, remedy: str) -> None:
        super().__init__(
            f"{model}: {found}; expected a Python module with floating-point weights that have values. {remedy}"
        )


class LossError(ManifoldNetsError, ValueError):
    """A loss is neither a function of the outputs nor the name of one."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"loss: found {found}; expected 'cross_entropy', 'softmax', or a function of what the model returns whose "
            "result is one number. Leave it out to analyse the outputs themselves."
        )


class ReportMismatchError(ManifoldNetsError, ValueError):
    """A report or plan belongs to another model."""

    def __init__(self, model: str, reported: str, names: Sequence[str]) -> None:
        super().__init__(
            f"report: it was made for {reported}, but {model} differs from it in {listed(names)}. "
            "Run diagnose on this model."
        )


# ---- weights on spheres ----------------------------------------------------------------------------------------------


class PartitionError(ManifoldNetsError, ValueError):
    """A partition does not fit the tensor that it is meant for."""

    def __init__(self, found: object, expected: str, remedy: str) -> None:
        super().__init__(f"partition of a weight: found {found}; expected {expected}. {remedy}")


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
    """A weight that belongs on a product of spheres has left it."""

    def __init__(self, name: str, group: int, norm: float, radius: float, remedy: str) -> None:
        deviation = abs(norm / radius - 1) if radius else math.inf  # the padding row of an embedding is zero
        some = math.isfinite(deviation) and deviation > 0
        # Two digits of the difference, and no fewer than eight in all; seventeen tell any two numbers apart.
        digits = min(max(8, 2 - math.floor(math.log10(deviation))), 17) if some else 8
        off = f", off by {deviation:.2g} of the radius" if some else ""
        super().__init__(
            f"{name}: group {group} has norm {norm:.{digits}g}{off}, but its sphere has radius {radius:.{digits}g}. "
            f"{remedy}"
        )


class JointSphereError(ManifoldNetsError, TypeError):
    """Something was asked of one weight that all weights of its joint sphere have to answer together."""

    def __init__(self, name: str, others: Sequence[str], found: str = "one of them alone") -> None:
        super().__init__(
            f"{name}: its groups share one norm with those of {listed(others)}: found {found}; expected all of them "
            "together. Use manifold_nets.joint_spheres(model), manifold_nets.project(model), and one parameter group "
            "of manifold_nets.optim for all of them; or take the constraint away with manifold_nets.revert(model)."
        )
        self.name, self.others = name, tuple(others)


class ConstraintError(ManifoldNetsError, ValueError):
    """A weight cannot be put on its manifold as asked."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(f"{name}: found {found}; expected {expected}. Name a weight of the module that fits.")


# ---- conversion ------------------------------------------------------------------------------------------------------


class NothingToConvertError(ManifoldNetsError, ValueError):
    """No selected weight of a model has a scale symmetry that conversion could remove."""


class PlanError(ManifoldNetsError, ValueError):
    """An edited plan cannot be read or carried out."""

    def __init__(self, source: str, found: str, expected: str) -> None:
        super().__init__(
            f"{source}: found {found}; expected {expected}. Write a fresh plan and edit that one; nothing was changed."
        )


class FunctionChangedError(ManifoldNetsError, RuntimeError):
    """A rewritten model does not compute what it computed before."""

    def __init__(self, model: str, mode: str, difference: float, limit: float, why_no_rounding: str = "") -> None:
        why = f" Rounding does not explain it: {why_no_rounding}." if why_no_rounding else ""
        super().__init__(
            f"{model}: its output in {mode} mode would change by {difference:.3g}, relative, on the example inputs; at "
            f"most {limit:.3g} is expected.{why} Nothing was changed. Use radius='keep', or exclude the layers in "
            "question."
        )


class ExportError(ManifoldNetsError, RuntimeError):
    """A model cannot be written in a format; no file was written."""

    def __init__(self, path: object, tool: str, cause: BaseException) -> None:
        super().__init__(
            f"{path}: {tool} refused the model ({_cause(cause)}); expected a network in evaluation mode, made of "
            "operations that it knows. Cast half precision to float32, or write the weights alone with the format "
            "safetensors."
        )


class ProjectionError(ManifoldNetsError, ValueError):
    """Putting a weight on its spheres would change what its model computes."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class PlainStateError(ProjectionError):
    """A state of a plain network cannot be converted while it is loaded into a converted model."""


# ---- optimizers ------------------------------------------------------------------------------------------------------


class UnsupportedManifoldError(ManifoldNetsError, TypeError):
    """A parameter lies on a manifold that an optimizer of this package cannot step on."""

    def __init__(self, name: str, manifold: object) -> None:
        super().__init__(
            f"{name} lies on {manifold}; the optimizers of manifold_nets step on SphereProduct and "
            "on plain parameters. Use geoopt.optim for other manifolds, in an optimizer of its own."
        )


class ConstraintLostError(ManifoldNetsError, RuntimeError):
    """A constrained weight reached an optimizer as a plain parameter object."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"{listed(dict.fromkeys(names))}: constrained to a product of spheres, but the parameter object was "
            "replaced by a plain one (load_state_dict(assign=True), to_empty and sharding do "
            "that), or is held in others, and it would be trained as a Euclidean one. Build the optimizer from "
            "manifold_nets.param_groups(model), which finds the manifold through the model; with "
            "FullyShardedDataParallel pass use_orig_params=True, and take off weight_norm and the like first, or "
            "the constraint (manifold_nets.revert)."
        )
        self.names = tuple(names)


class EuclideanStepError(ManifoldNetsError, RuntimeError):
    """An optimizer that knows nothing of spheres is about to step a constrained weight."""

    def __init__(self, optimizer: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{listed(names)}: constrained to a product of spheres, but {optimizer} is about to step it as a Euclidean "
            "weight; nothing was changed. Use manifold_nets.optim.RiemannianSGD or RiemannianAdam with "
            "manifold_nets.param_groups(model); make this optimizer's steps tangent with "
            "manifold_nets.optim.on_spheres(optimizer, model); or, if your code puts the weight back on its spheres "
            "itself, say so with manifold_nets.optim.allow_euclidean(optimizer)."
        )
        self.names = tuple(names)


class SphereOptionError(ManifoldNetsError, TypeError):
    """A weight on spheres has a property, or an option, that its optimizer cannot work with."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"{name} lies on a product of spheres: found {found}; expected {expected}. Change it, or train this weight "
            "without the constraint (manifold_nets.revert)."
        )


class StepInputError(ManifoldNetsError, RuntimeError):
    """A weight, its gradient or its optimizer state cannot be read or written by a step."""

    def __init__(self, name: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{name}: found {found}; expected {expected}; nothing was changed. {remedy}")


class SparseGradientError(SphereOptionError):
    """A weight has a sparse gradient where only dense ones can be stepped."""

    def __init__(self, name: str, layout: object) -> None:
        super(SphereOptionError, self).__init__(
            f"{name}: found a gradient of layout {layout}; this weight is stepped with dense gradients only; "
            "nothing was changed. Build its layer with sparse=False, or make the gradient dense before the step "
            "(weight.grad = weight.grad.to_dense())."
        )


class ParameterGroupError(ManifoldNetsError, ValueError):
    """The manifolds of a parameter group do not fit its parameters."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"{name}: found {found}; expected {expected}. Let manifold_nets.param_groups(model) make the groups, or "
            'give "manifolds" one SphereProduct, or None, for each of "params".'
        )


class OptimizerStateError(ManifoldNetsError, ValueError):
    """The saved state of an optimizer does not fit the spheres of a live weight."""

    def __init__(self, name: str, found: str, expected: str, remedy: str = "") -> None:
        remedy = remedy or (
            "Load the state of the same kind of optimizer for a model converted in the same way, or start without it."
        )
        super().__init__(f"state of {name}: found {found}; expected {expected}; nothing was loaded. {remedy}")


class NativeKernelError(ManifoldNetsError, RuntimeError):
    """An optimizer was asked for ``fused=True``, and the kernel for weights on spheres cannot be had."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"fused=True: found {reason}; expected the compiled kernel for weights on spheres; nothing was changed. "
            "Install a C compiler, or leave fused out: without the kernel, steps are taken by torch's operations."
        )


class LearningRateWarning(UserWarning):
    """Converted weights would be trained at the learning rate of the plain network, which means something else there.

    Args:
        names: the weights.
        rate: their rate.
        matched: the rate on spheres that matches it, the median over the weights.
        formula: where that comes from.
    """

    def __init__(self, names: Sequence[str], rate: float, matched: float, formula: str) -> None:
        super().__init__(
            f"{listed(names, 3)}: converted weights get the learning rate {rate:g} of the plain parameters, but a rate "
            f"on spheres means something else. In the median {matched:.3g} matches the plain network's next step "
            f"({formula}). Pass manifold_nets.param_groups(model, sphere_lr={matched:.3g}), or the rates of all "
            "weights, from manifold_nets.matched_learning_rates(…).by_weight(); "
            f"sphere_lr={rate:g} keeps the rate as it is."
        )
        self.names, self.rate, self.matched = tuple(names), rate, matched


# ---- pymanopt --------------------------------------------------------------------------------------------------------


class PointError(ManifoldNetsError, ValueError):
    """The parameters of a model cannot be made a point, or a point does not fit the model.

    Example:
        >>> import torch
        >>> from manifold_nets import pymanopt_bridge as bridge
        >>> net = torch.nn.Linear(2, 2).requires_grad_(False)
        >>> bridge.problem(net, torch.nn.functional.mse_loss, torch.ones(8, 2), torch.ones(8, 2))
        Traceback (most recent call last):
        manifold_nets.errors.PointError: Linear: found no parameter that requires a gradient; expected at least one...
    """

    def __init__(self, name: str, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"{name}: found {found}; expected {expected}. {remedy}")


class CostError(ManifoldNetsError, ValueError):
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
        super().__init__(f"loss: found {found}; expected {expected}. {remedy}")


# The modules that these classes stood in before; to be removed with the next release.
for _former in ("analysis", "base", "checkpoints", "constraints", "conversion", "files", "models", "optimizers"):
    sys.modules[f"{__name__}.{_former}"] = sys.modules[__name__]
