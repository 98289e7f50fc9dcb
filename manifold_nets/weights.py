"""Load a model's weights from a file: safetensors, a torch file read without running code, or a converted model."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from manifold_nets.conversion.checkpoint import load_contents, unchanged_on_failure, unusual
from manifold_nets.conversion.storage import contents_of, is_checkpoint, read_tensors
from manifold_nets.errors import CheckpointFormatError, CheckpointMismatchError, described, listed
from manifold_nets.files import is_link_loop

__all__ = ["load_weights", "read_state_dict"]

# Names under which training scripts put the weights into a larger dictionary.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_unreadable = functools.partial(CheckpointFormatError, expected="a safetensors file or a torch file of weights")


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load the weights of a file into a model.

    Args:
        model: a newly built model; its parameters and buffers are overwritten.
        path: a safetensors file, a torch file (read with ``weights_only=True``), or a file written by `save`, which
            also puts the model's weights back on their spheres.

    Returns:
        The model.

    Raises:
        CheckpointFormatError: the file does not exist, is damaged, holds no weights, or is from a newer release.
        CheckpointMismatchError: its names or shapes are not the model's.
        In every case the model is unchanged.

    Example:
        >>> import tempfile
        >>> net, trained = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(trained.state_dict(), Path(folder) / "net.pt")
        ...     _ = load_weights(net, Path(folder) / "net.pt")
        >>> bool((net.weight == trained.weight).all())
        True
    """
    path = Path(path)
    state, metadata = _read(path)
    if is_checkpoint(metadata):
        return load_contents(model, path, contents_of(path, state, metadata))
    _check(model, path, state)
    with unchanged_on_failure(model):
        model.load_state_dict(state, strict=False)
    return model


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or a torch file, recognized by the first bytes.

    Raises:
        CheckpointFormatError: the file does not exist, cannot be read, or holds no weights.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, which is opened only once, in case it is replaced meanwhile."""
    if not path.is_file():
        found = "a loop of symbolic links" if is_link_loop(path) else "no such file"
        raise _unreadable(path, found, "Check the path.")
    with path.open("rb") as file:
        # A safetensors file starts with eight bytes of length, then a JSON object.
        start = file.read(9)
        file.seek(0)
        is_torch = path.suffix != ".safetensors" and start[8:] != b"{"
        try:
            content, metadata = _torch_content(file) if is_torch else read_tensors(file)
        except pickle.UnpicklingError as error:
            remedy = "Only files that load with weights_only=True are read: save model.state_dict(), not the model."
            raise _unreadable(path, "objects other than tensors, or not a torch file", remedy) from error
        except Exception as error:
            # The readers go by what a file says of itself; in a damaged one that may be anything.
            kind = "torch" if is_torch else "safetensors"
            raise _unreadable(path, f"a damaged {kind} file ({described(error)})", "Write it again.") from error
    is_state = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if is_torch and not (is_state and content):
        found = f"a {type(content).__name__} that is not a dictionary of tensors"
        raise _unreadable(path, found, "Save model.state_dict().")
    for name, value in content.items():
        if not isinstance(name, str):
            raise _unreadable(path, f"{name!r} as the name of a tensor", "Save model.state_dict().")
        if fault := unusual(value):
            raise _unreadable(path, f"{name}, {fault}", "Save dense tensors that have values.")
    return dict(content), metadata


def _torch_content(file: BinaryIO) -> tuple[Any, dict[str, str]]:
    content: Any = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), content)
    return content, {}


def _check(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    present = {id(own[name]) for name in state if name in own}
    differing = {
        # A tied weight may be stored under one of its names only, and old files lack the batch counters.
        "missing from the file": [
            name
            for name, value in own.items()
            if name not in state and id(value) not in present and not name.endswith("num_batches_tracked")
        ],
        "unknown to the model": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ],
    }
    differences = [f"{len(names)} {what}: {listed(names)}" for what, names in differing.items() if names]
    if differences:
        missing, unexpected, _ = differing.values()
        remedy = "Build the model with the arguments that it was trained with (--kwargs on the command line)."
        if missing and {name.partition(".")[2] for name in unexpected} >= set(missing):
            prefix = unexpected[0].partition(".")[0]
            remedy = f"The file's names begin with {prefix!r} (a wrapped model): save the weights of model.{prefix}."
        found = f"weights do not fit {type(model).__name__}: {'; '.join(differences)}. {remedy}"
        raise CheckpointMismatchError(path, found, differences)
