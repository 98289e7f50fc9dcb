"""Load a model's weights from a file: safetensors, a torch file read without running code, or a converted model."""

from __future__ import annotations

import argparse
import functools
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from manifold_nets.conversion.checkpoint import load_contents, unchanged_on_failure, unusual
from manifold_nets.conversion.storage import contents_of, is_checkpoint, read_tensors
from manifold_nets.errors import CheckpointFormatError, CheckpointMismatchError, described, listed
from manifold_nets.files import is_link_loop

__all__ = ["load_weights", "read_state_dict"]

# Plain data in which training scripts note their settings; rebuilding them runs no code.
_PLAIN_CLASSES: list[Any] = [argparse.Namespace, PosixPath, WindowsPath, PurePosixPath, PureWindowsPath]
_ONLY_TENSORS = "Only files that load with weights_only=True are read. "
_unreadable = functools.partial(CheckpointFormatError, expected="a safetensors file or a torch file of weights")


def load_weights(
    model: nn.Module, path: str | Path, *, key: str | None = None, prefix: str = "", allow_pickle: bool = False
) -> nn.Module:
    """Load the weights of a file into a model.

    Args:
        model: a newly built model; its parameters and buffers are overwritten.
        path: a safetensors file, a torch file (read with ``weights_only=True``), or a file written by `save`, which
            puts the model's weights back on their spheres.
        key: where in a torch file the weights are, such as ``"state_dict_ema"`` or ``"ema.shadow"``; needed only where
            several entries of the file hold weights.
        prefix: take the weights whose names begin with this, under the rest of their names: ``"module."`` of parallel
            wrappers and averages, ``"_orig_mod."`` of ``torch.compile``, ``"model."`` of Lightning.
        allow_pickle: also read a torch file that holds other objects than tensors and plain data. This runs the code
            that the file names: only for files that you trust.

    Returns:
        The model.

    Raises:
        CheckpointFormatError: the file does not exist, is damaged, holds no weights or several sets of them, or those
            of a newer release.
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
    state, metadata = _read(path, key, allow_pickle=allow_pickle)
    if is_checkpoint(metadata):
        return load_contents(model, path, contents_of(path, state, metadata))
    if prefix:
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not state:
            raise _unreadable(path, f"no weights whose names begin with {prefix!r}", "Leave out the prefix.")
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


def _read(
    path: Path, key: str | None = None, *, allow_pickle: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, which is opened once: one that takes its place meanwhile is not mixed in."""
    if not path.is_file():
        found = "a loop of symbolic links" if is_link_loop(path) else "no such file"
        raise _unreadable(path, found, "Check the path.")
    with path.open("rb") as file:
        # A safetensors file starts with eight bytes of length, then a JSON object.
        start = file.read(9)
        file.seek(0)
        is_torch = path.suffix != ".safetensors" and start[8:] != b"{"
        try:
            with torch.serialization.safe_globals(_PLAIN_CLASSES):
                content, metadata = (_torch_content(file, allow_pickle), {}) if is_torch else read_tensors(file)
        except pickle.UnpicklingError as error:
            remedy = "Save model.state_dict(), not the model; or, if you trust the file, pass --allow-pickle "
            remedy += "(allow_pickle=True in Python), which runs the code that it names."
            raise _unreadable(path, "objects other than tensors, or no torch file", _ONLY_TENSORS + remedy) from error
        except Exception as error:
            # The readers trust a file's header, which in a damaged file may contain anything.
            kind = "torch" if is_torch else "safetensors"
            raise _unreadable(path, f"a damaged {kind} file ({described(error)})", "Write it again.") from error
    if is_torch or key is not None:
        content = _chosen(path, content, key)
    for name, value in content.items():
        if not isinstance(name, str):
            raise _unreadable(path, f"{name!r} as the name of a tensor", "Save model.state_dict().")
        if fault := unusual(value):
            raise _unreadable(path, f"{name}, {fault}", "Save dense tensors that have values.")
    return dict(content), metadata


def _torch_content(file: BinaryIO, allow_pickle: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of sparse tensors, which are refused below
        content: Any = torch.load(file, map_location="cpu", weights_only=not allow_pickle)
    return content.state_dict() if isinstance(content, nn.Module) else content


def _chosen(path: Path, content: Any, key: str | None) -> Mapping[Any, Tensor]:
    """The dictionary of tensors under a key, or the only one in a file."""
    sets = dict(_weight_sets(content))
    if key is None and len(sets) == 1:
        return next(iter(sets.values()))
    known = listed(name for name in sets if name)
    if key is not None:
        if key in sets:
            return sets[key]
        has = f"It has weights under {known}." if known else "Its weights are under no key: leave it out."
        raise _unreadable(path, f"no weights under the key {key!r}", has if sets else "It has no weights at all.")
    if sets:
        remedy = "Choose one with --key on the command line, or with load_weights(…, key=…)."
        raise _unreadable(path, f"weights under several keys, {known}", remedy)
    found = f"a {type(content).__name__} that is no dictionary of tensors"
    if isinstance(content, Mapping) and content:
        found += f", with the keys {listed(content)}"
    raise _unreadable(path, found, "Save model.state_dict().")


def _weight_sets(content: Any, name: str = "") -> Iterator[tuple[str, Mapping[Any, Tensor]]]:
    """The dictionaries of tensors in a file, by where they are."""
    content = content.state_dict() if isinstance(content, nn.Module) else content
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        # Numbers alone are scores and counters.
        if not name or any(value.ndim for value in content.values()):
            yield name, content
        return
    for key, value in content.items():
        if isinstance(key, str) and "optim" not in key.lower():
            yield from _weight_sets(value, f"{name}.{key}" if name else key)


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
        if prefixes := _common_prefixes(missing, unexpected):
            prefix, names = prefixes[0], " or ".join(repr(prefix[:-1]) for prefix in prefixes)
            several = "several models; choose one" if len(prefixes) > 1 else "a wrapped model"
            remedy = f"The file's names begin with {names} ({several}): pass --prefix {prefix} on the command line, "
            remedy += f"or load_weights(…, prefix={prefix!r})."
        found = f"weights do not fit {type(model).__name__}: {'; '.join(differences)}. {remedy}"
        raise CheckpointMismatchError(path, found, differences)


def _common_prefixes(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """What the names of a file have in front of those of the model; nothing where they differ in more than that."""
    if not missing:
        return []
    # In the order of the file, and each once.
    prefixes = dict.fromkeys(name.removesuffix(missing[0]) for name in unexpected if name.endswith(f".{missing[0]}"))
    return [prefix for prefix in prefixes if {prefix + name for name in missing} <= set(unexpected)]
