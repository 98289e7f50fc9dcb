"""The checkpoint file: tensors in safetensors, with one JSON document about them in its metadata.

The document, under the key ``manifold_nets``, holds the format's name and version, the manifold of each constrained
weight, the names under which a tied tensor is known besides the one it is stored under, the biases that were removed,
and a checksum of all that
and of the tensors' bytes. The tensors themselves can be read by any safetensors reader. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from manifold_nets.errors import CheckpointFormatError
from manifold_nets.files import atomic_file
from manifold_nets.joint_sphere import manifolds_from_dicts
from manifold_nets.manifold import SphereProduct

__all__ = ["FORMAT", "VERSION", "Contents", "is_checkpoint", "read", "write"]

FORMAT = "manifold_nets checkpoint"
VERSION = 1
# One metadata key only: safetensors writes several in random order, and the same model should give the same bytes.
_KEY = "manifold_nets"


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Args:
        tensors: tensors by name, stored once each.
        manifolds: the manifold of each constrained weight.
        aliases: other names of stored tensors.
        removed: names of biases that conversion has removed.
    """

    tensors: Mapping[str, Tensor]
    manifolds: Mapping[str, SphereProduct]
    aliases: Mapping[str, str]
    removed: tuple[str, ...] = ()

    def expanded(self) -> dict[str, Tensor]:
        """Return the tensors under all their names."""
        return {**self.tensors, **{alias: self.tensors[name] for alias, name in self.aliases.items()}}


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a checkpoint file atomically. The tensors are dense, contiguous and in the main memory."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "manifolds": {name: manifold.to_dict() for name, manifold in contents.manifolds.items()},
        "aliases": dict(contents.aliases),
    }
    if contents.removed:
        document["removed_biases"] = list(contents.removed)
    document["checksum"] = _checksum(contents.tensors, document)
    metadata = {_KEY: json.dumps(document, sort_keys=True, allow_nan=False)}
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(dict(contents.tensors), temporary, metadata=metadata)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is a safetensors file with the metadata of a checkpoint, of whatever version."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            return _KEY in (file.metadata() or {})
    except OSError:
        raise
    except Exception:  # noqa: BLE001 (what is no safetensors file is no checkpoint, whatever the reader says of it)
        return False


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a checkpoint file.

    Raises:
        CheckpointFormatError: the file is truncated, damaged, of another kind, or of a newer format version.
        OSError: the file does not exist or cannot be read.
    """
    if Path(path).is_dir():
        raise CheckpointFormatError(path, "a folder", "Pass the file that manifold_nets.save wrote.")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (the reader goes by what the file says of itself, and may raise anything)
        found = f"no readable safetensors file ({error})"
        raise CheckpointFormatError(
            path, found, "It is of another kind, truncated or damaged: save it again."
        ) from None
    document = _document(path, metadata)
    if document.get("checksum") != _checksum(tensors, document):
        raise CheckpointFormatError(
            path, "contents that do not match their checksum", "It is damaged, or was edited: save it again."
        )
    return _contents(path, document, tensors)


def _document(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parse the JSON document, and refuse files of another kind and of newer versions."""
    if _KEY not in metadata:
        raise CheckpointFormatError(
            path,
            f"a safetensors file without the metadata {_KEY!r}",
            "Read a plain one with safetensors.torch.load_file and model.load_state_dict, then call "
            "manifold_nets.convert.",
        )
    try:
        document = json.loads(metadata[_KEY])
        kind, version = document["format"], document["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        kind = version = document = None
    if kind != FORMAT or not isinstance(version, int) or version < 1:
        raise CheckpointFormatError(path, f"unreadable metadata {_KEY!r}", "It is damaged: save it again.")
    if version > VERSION:
        raise CheckpointFormatError(
            path, f"format version {version}", f"This release reads versions up to {VERSION}: upgrade manifold_nets."
        )
    return dict(document)


def _contents(path: str | os.PathLike[str], document: dict[str, Any], tensors: dict[str, Tensor]) -> Contents:
    try:
        manifolds = manifolds_from_dicts({str(name): data for name, data in document["manifolds"].items()})
        aliases = {str(alias): str(name) for alias, name in document["aliases"].items()}
        removed = tuple(str(name) for name in document.get("removed_biases", ()))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        found = f"manifolds or aliases that cannot be read ({type(error).__name__}: {error})"
        raise CheckpointFormatError(path, found, "It is damaged: save it again.") from None
    fits = all(name in tensors and tensors[name].shape == m.partition.shape for name, m in manifolds.items())
    if not fits or any(alias in tensors or name not in tensors for alias, name in aliases.items()):
        raise CheckpointFormatError(path, "manifolds or aliases of other tensors", "It is damaged: save it again.")
    return Contents(tensors, manifolds, aliases, removed)


def _checksum(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    """CRC-32 over the document (without its checksum) and over name, type, shape and bytes of every tensor."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    crc = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"crc32:{crc:08x}"
