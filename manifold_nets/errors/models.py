"""Errors about models named on the command line, and about files of weights."""

from __future__ import annotations

from collections.abc import Sequence

from manifold_nets.errors.base import ManifoldNetsError, listed

__all__ = [
    "ModelBuildError",
    "ModelExitError",
    "ModelNotFoundError",
    "ModelSpecError",
    "StateDictMismatchError",
    "WeightsFileError",
]


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


class ModelExitError(ManifoldNetsError, RuntimeError):
    """The code of a model, or of what it is trained on, asked for the end of the program while it ran."""

    def __init__(self, spec: str, cause: SystemExit) -> None:
        said = f": {cause}" if str(cause) else ""
        super().__init__(
            f"{spec}: its code raised SystemExit{said} while it ran; expected code that returns or raises an error. "
            "Take the call of sys.exit, exit or quit out of it."
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
