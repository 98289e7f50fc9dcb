"""Weights of a model from a file: safetensors, a torch file read without running code, or a converted model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from manifold_nets.conversion.checkpoint import load_contents, unchanged_on_failure
from manifold_nets.conversion.storage import contents_of, is_checkpoint, read_tensors
from manifold_nets.errors import StateDictMismatchError, WeightsFileError
from manifold_nets.files import is_link_loop

__all__ = ["load_weights", "read_state_dict"]

# Names under which training scripts put the weights into a larger dictionary.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load the weights of a file into a model.

    Args:
        model: freshly made; its parameters and buffers are overwritten.
        path: a safetensors file, a torch file (read with ``weights_only=True``), or a file written by `save`, which
            puts the model's weights back on their spheres.

    Returns:
        The model.

    Raises:
        WeightsFileError: the file does not exist, cannot be read, or holds no weights.
        StateDictMismatchError: its names or shapes are not the model's.
        CheckpointError: the file of a converted model is damaged, newer, or does not fit; see `load`.
        In every case the model is left as it was.

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
    """Read the tensors of a safetensors file or of a torch file, told apart by their first bytes.

    Raises:
        WeightsFileError: the file does not exist, cannot be read, or holds no weights.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, which is opened once: one that takes its place meanwhile is not mixed in."""
    if not path.is_file():
        found = "symbolic links that lead back to themselves" if is_link_loop(path) else "no such file"
        raise WeightsFileError(path, found, "Check the path.")
    with path.open("rb") as file:
        # A safetensors file starts with eight bytes of length, then a JSON object.
        start = file.read(9)
        file.seek(0)
        if path.suffix != ".safetensors" and start[8:] != b"{":
            return _from_torch_file(path, file), {}
        try:
            return read_tensors(file)
        except Exception as error:
            raise WeightsFileError(path, f"a damaged safetensors file ({_said(error)})", "Write it again.") from error


def _from_torch_file(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsFileError(
            path,
            "objects other than tensors, or no torch file",
            "Only files that load with weights_only=True are read: save model.state_dict(), not the model.",
        ) from error
    except Exception as error:
        # The reader goes by what the file says of itself; in a damaged one that may be anything, and so may the error.
        raise WeightsFileError(path, f"a damaged torch file ({_said(error)})", "Write it again.") from error
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not (isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values())):
        raise WeightsFileError(
            path, f"a {type(content).__name__} that is no dictionary of tensors", "Save model.state_dict()."
        )
    for name, value in content.items():
        if not isinstance(name, str):
            raise WeightsFileError(path, f"{name!r} as the name of a tensor", "Save model.state_dict().")
        if value.is_meta or value.layout != torch.strided:
            what = "no values (it is on the meta device)" if value.is_meta else f"the layout {value.layout}"
            raise WeightsFileError(path, f"{name} with {what}", "Save dense tensors that have values.")
    return dict(content)


def _said(error: Exception) -> str:
    """The kind of an error and the first line of its text: torch appends advice about reading with other settings."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _check(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    present = {id(own[name]) for name in state if name in own}
    # A tied weight may be stored under one of its names only, and old files lack the batch counters.
    missing = [
        name
        for name, value in own.items()
        if name not in state and id(value) not in present and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise StateDictMismatchError(str(path), type(model).__name__, missing, unexpected, shapes)
