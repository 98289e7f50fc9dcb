"""The errors of the package, each building its own message from the facts it is given.

Every message names the parameter or file, the value found, the value expected, and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

__all__ = [
    "AnalysisError",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "CheckpointTensorError",
    "ConstraintError",
    "ConstraintLostError",
    "DegenerateGroupError",
    "EuclideanStepError",
    "ExampleInputsError",
    "ExportError",
    "FunctionChangedError",
    "LossError",
    "ManifoldNetsError",
    "MissingExtraError",
    "ModelBuildError",
    "ModelNotFoundError",
    "ModelSpecError",
    "NothingToConvertError",
    "OffManifoldError",
    "OptimizerStateError",
    "OptionError",
    "ParameterGroupError",
    "PartitionError",
    "PlanError",
    "ReportMismatchError",
    "SelectionError",
    "SphereOptionError",
    "StateDictMismatchError",
    "UnsupportedManifoldError",
    "UnsupportedModelError",
    "WeightsFileError",
]


class ManifoldNetsError(Exception):
    """Base of every error that this package raises on purpose."""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """Join items with commas, cutting a long list and saying how many were left out."""
    texts = [str(item) for item in items]
    if len(texts) <= limit:
        return ", ".join(texts)
    return f"{', '.join(texts[:limit])} and {len(texts) - limit} more"


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
        super().__init__(f"{name}: group {group} has norm {norm:.8g}, but its sphere has radius {radius:.8g}. {remedy}")


class UnsupportedManifoldError(ManifoldNetsError, TypeError):
    """A parameter lies on a manifold that an optimizer of this package cannot step on."""

    def __init__(self, name: str, manifold: object) -> None:
        super().__init__(
            f"{name} lies on {manifold}; the optimizers of manifold_nets step on SphereProduct and "
            "on plain parameters. Use geoopt.optim for other manifolds, in an optimizer of its own."
        )


class ConstraintError(ManifoldNetsError, ValueError):
    """A weight cannot be put on its manifold as asked."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(f"{name}: found {found}; expected {expected}. Name a weight of the module that fits.")


class ConstraintLostError(ManifoldNetsError, RuntimeError):
    """A constrained weight reached an optimizer as a plain parameter object."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"{listed(names)}: constrained to a product of spheres, but the parameter object was "
            "replaced by a plain one (load_state_dict(assign=True), to_empty and sharding do "
            "that), and it would be trained as a Euclidean one. Build the optimizer from "
            "manifold_nets.param_groups(model), which finds the manifold through the model."
        )
        self.names = tuple(names)


class EuclideanStepError(ManifoldNetsError, RuntimeError):
    """An optimizer that knows nothing of spheres is about to step a constrained weight."""

    def __init__(self, optimizer: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{listed(names)}: constrained to a product of spheres, but {optimizer} is about to step it as a Euclidean "
            "weight; nothing was changed. Use manifold_nets.optim.RiemannianSGD or RiemannianAdam with "
            "manifold_nets.param_groups(model); or, if your code puts the weight back on its spheres itself, say so "
            "with manifold_nets.optim.allow_euclidean(optimizer)."
        )
        self.names = tuple(names)


class SphereOptionError(ManifoldNetsError, TypeError):
    """A weight on spheres has a property, or an option, that its optimizer cannot work with."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"{name} lies on a product of spheres: found {found}; expected {expected}. Change it, or train this weight "
            "without the constraint (manifold_nets.revert)."
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

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"state of {name}: found {found}; expected {expected}; nothing was loaded. Load the state of the same kind "
            "of optimizer for a model converted in the same way, or start without it."
        )


class ExampleInputsError(ManifoldNetsError, ValueError):
    """Example inputs have a form that cannot be given to a model, or the model refused them."""

    def __init__(self, found: str, cause: BaseException | None = None) -> None:
        why = f" The model said: {type(cause).__name__}: {cause}." if cause is not None else ""
        super().__init__(
            f"example_inputs: found {found}; expected a tensor, a tuple of positional inputs, a dict of keyword "
            f"inputs, or ((positional, …), {{keyword: …}}), that the model accepts in training mode.{why} Pass a "
            "batch of at least two examples that are not constant."
        )


class AnalysisError(ManifoldNetsError, RuntimeError):
    """A model could not be copied for analysis, or its structure could not be read."""

    def __init__(self, model: str, cause: BaseException, *, copying: bool = False) -> None:
        lines = str(cause).strip().splitlines()
        self.why = f"{type(cause).__name__}: {lines[0] if lines else ''}"
        if copying:
            told = (
                f"copy.deepcopy could not copy it ({self.why}); a model that can be copied is expected. Take what "
                "cannot be copied (locks, open files, generators) out of its attributes, or analyse a submodule."
            )
        else:
            told = (
                f"torch.export could not trace it ({self.why}); a model whose control flow does not depend on the data "
                "is expected. Move such control flow out of forward, or analyse the submodule that it surrounds."
            )
        super().__init__(f"{model}: {told}")


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


class ModelSpecError(ManifoldNetsError, ValueError):
    """A text does not name a model."""

    def __init__(self, text: str) -> None:
        super().__init__(
            f"MODEL: found {text!r}; expected package.module:callable, file.py:callable, torchvision:NAME or "
            "timm:NAME. Write the callable that builds the model after the last colon."
        )


class ModelNotFoundError(ManifoldNetsError, LookupError):
    """A module, a file, an attribute or an architecture that a specification names does not exist."""

    def __init__(self, spec: str, found: str, remedy: str) -> None:
        super().__init__(f"{spec}: {found}. {remedy}")


class ModelBuildError(ManifoldNetsError, RuntimeError):
    """A callable that a specification names built no model."""

    def __init__(self, spec: str, found: str) -> None:
        super().__init__(
            f"{spec}: {found}; expected a callable that returns a torch.nn.Module. Check that it runs in Python as "
            "written, and pass its arguments as keyword arguments (--kwargs on the command line)."
        )


class WeightsFileError(ManifoldNetsError, ValueError):
    """A file of weights cannot be read."""

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


class CheckpointError(ManifoldNetsError):
    """Base of the errors about checkpoint files; ``path`` is the file."""

    def __init__(self, path: str | os.PathLike[str], message: str) -> None:
        super().__init__(f"{os.fspath(path)}: {message}")
        self.path = os.fspath(path)


class CheckpointFormatError(CheckpointError, ValueError):
    """A file is not a checkpoint that this release can read."""

    def __init__(self, path: str | os.PathLike[str], found: str, remedy: str) -> None:
        super().__init__(path, f"found {found}; expected a checkpoint written by manifold_nets.save. {remedy}")


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint does not fit the model it was to be loaded into; the model was not touched."""

    def __init__(self, path: str | os.PathLike[str], model: str, differences: Sequence[str]) -> None:
        super().__init__(
            path,
            f"does not fit this {model}, which was left as it was: {'; '.join(differences)}. Make the model with the "
            "arguments it was saved with, in the same dtype, and save and load the bare module rather than one "
            "wrapped by torch.compile or a parallel trainer.",
        )
        self.differences = tuple(differences)


class CheckpointTensorError(CheckpointError, TypeError):
    """A model holds something that a checkpoint cannot store; no file was written."""

    def __init__(self, path: str | os.PathLike[str], name: str, found: str, remedy: str) -> None:
        super().__init__(path, f"{name} is {found}; expected a dense tensor with values. {remedy}")


class OptionError(ManifoldNetsError, ValueError):
    """An option has a value that has no meaning."""

    def __init__(self, option: str, found: object, expected: str) -> None:
        super().__init__(f"{option}: found {found!r}; expected {expected}. Pass such a value or leave the option out.")


class SelectionError(ManifoldNetsError, ValueError):
    """A selection of weights matched nothing."""

    def __init__(self, option: str, pattern: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{option}={pattern!r} matches no weight; expected a pattern or predicate on these names: "
            f"{listed(names, 40)}. Patterns are those of a shell: 'layer1.*', '*.conv?.weight'."
        )


class NothingToConvertError(ManifoldNetsError, ValueError):
    """No weight of a model has a scale symmetry that conversion could remove."""

    def __init__(self, model: str, reasons: Sequence[tuple[str, str]]) -> None:
        told = listed((f"{name} ({why})" for name, why in reasons), 12)
        super().__init__(
            f"{model}: nothing to convert: no selected weight is scale-invariant. Left: {told or 'no weights'}. "
            "Scale-invariant weights stand in front of a normalization; train this model as it is."
        )


class ReportMismatchError(ManifoldNetsError, ValueError):
    """A report or plan belongs to another model."""

    def __init__(self, model: str, reported: str, names: Sequence[str]) -> None:
        super().__init__(
            f"report: it was made for {reported}, but {model} differs from it in {listed(names)}. "
            "Run diagnose on this model."
        )


class FunctionChangedError(ManifoldNetsError, RuntimeError):
    """A rewritten model does not compute what it computed before."""

    def __init__(self, model: str, mode: str, difference: float, limit: float) -> None:
        super().__init__(
            f"{model}: its output in {mode} mode would change by {difference:.3g}, relative, on the example inputs; at "
            f"most {limit:.3g} is expected. Nothing was changed. Use radius='keep', or exclude the layers in question."
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


class MissingExtraError(ManifoldNetsError, ImportError):
    """A package that an optional feature needs is not installed."""

    def __init__(self, package: str, feature: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; {feature} need it. Install the extra: pip install 'manifold_nets[{extra}]'."
        )


class PlanError(ManifoldNetsError, ValueError):
    """An edited plan cannot be read or carried out."""

    def __init__(self, source: str, found: str, expected: str) -> None:
        super().__init__(
            f"{source}: found {found}; expected {expected}. Write a fresh plan and edit that one; nothing was changed."
        )
