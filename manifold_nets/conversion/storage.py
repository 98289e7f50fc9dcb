"""The checkpoint file: tensors in safetensors, with one JSON document about them in the metadata.

The document, under the key ``manifold_nets``, holds the format's name and version, the manifold of each constrained
weight, the further names of tied tensors, the removed biases, the record of conversions, and a checksum of all that and
of the tensors' bytes. Any safetensors reader can read the tensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from manifold_nets.conversion.moves import Moves
from manifold_nets.documents import Schema, crc32, parse_json, printable
from manifold_nets.errors import CheckpointFormatError, PartitionError, described
from manifold_nets.files import atomic_file, path_of_open
from manifold_nets.joint_sphere import manifolds_from_dicts
from manifold_nets.manifold import SphereProduct

FORMAT = "manifold_nets checkpoint"
# Version 2 added the conversions, weights constrained by name and padding rows; a file without any of these is still
# written as version 1, for older releases.
VERSION = 2
# One metadata key only: safetensors writes several in random order, and the same model should give the same bytes.
_KEY = "manifold_nets"
# A text in every document that hardly occurs in the metadata of other files.
_MARKS = (FORMAT, '"aliases"', '"checksum"', '"manifolds"')
_SCHEMA = Schema.packaged("manifold_nets.conversion", "checkpoint.schema.json")


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint.

    Args:
        tensors: tensors by name, each stored once.
        manifolds: the manifold of each constrained weight.
        aliases: other names of stored tensors.
        removed: names of biases that conversion removed.
        conversions: the moves of conversions, by the name prefix of the converted module, such as ``"net."``.
        defined: names of weights that were constrained by name, without a conversion.
    """

    tensors: Mapping[str, Tensor]
    manifolds: Mapping[str, SphereProduct]
    aliases: Mapping[str, str]
    removed: tuple[str, ...] = ()
    conversions: Mapping[str, Moves] = field(default_factory=dict)
    defined: tuple[str, ...] = ()

    def expanded(self) -> dict[str, Tensor]:
        """Return the tensors under all their names."""
        return {**self.tensors, **{alias: self.tensors[name] for alias, name in self.aliases.items()}}


def write(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write a checkpoint file atomically. The tensors must be dense, contiguous and in main memory."""
    metadata = {_KEY: _document(contents)}
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(dict(contents.tensors), temporary, metadata=metadata)


def write_document(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write what a checkpoint file says of its tensors by itself, beside a file of another program that holds them."""
    with atomic_file(path) as temporary:
        temporary.write_text(_document(contents) + "\n", encoding="utf-8")


def read_document(path: Path, state: Mapping[str, Tensor]) -> Contents:
    """Read what `write_document` wrote.

    Args:
        path: the file.
        state: the tensors that it is about, under all their names.

    Raises:
        CheckpointFormatError: it is damaged, of a newer format version, or about other tensors.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = parse_json(text)
        others = {*document["aliases"], *document.get("removed_biases", ())}
        kept = {name: value.detach().cpu().contiguous() for name, value in state.items() if name not in others}
        changed = document["checksum"] != tensors_checksum(kept, document)
    except (ValueError, KeyError, TypeError, OSError) as error:
        found = f"an unreadable document ({printable(described(error))})"
        raise CheckpointFormatError(path, found, "Convert the model again.") from None
    if changed:
        remedy = "They were changed after the conversion: delete this file to load them as a plain model."
        raise CheckpointFormatError(path, "a conversion of other weights than those beside it", remedy)
    return contents_of(path, kept, {_KEY: text})


def _document(contents: Contents) -> str:
    """The JSON document about the tensors of a checkpoint."""
    manifolds = {name: manifold.to_dict() for name, manifold in contents.manifolds.items()}
    is_new = contents.conversions or contents.defined or any("padding" in data for data in manifolds.values())
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION if is_new else 1,
        "manifolds": manifolds,
        "aliases": dict(contents.aliases),
    }
    if contents.removed:
        document["removed_biases"] = list(contents.removed)
    if contents.conversions:
        document["conversions"] = {prefix: moves.to_dict() for prefix, moves in contents.conversions.items()}
    if contents.defined:
        document["defined"] = list(contents.defined)
    document["checksum"] = tensors_checksum(contents.tensors, document)
    return json.dumps(document, sort_keys=True, allow_nan=False)


def is_checkpoint(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata shows that `write` wrote it, in any version.

    A file with a damaged key must not pass for a plain one, so a value that looks like the document counts too.
    """
    return _KEY in metadata or any(sum(mark in text for mark in _MARKS) >= 2 for text in metadata.values())


def read_tensors(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of an open safetensors file, even if its path was replaced meanwhile.

    Raises:
        OSError: the file cannot be read.
        Exception: of any kind, if the file is damaged, because the reader trusts its header.
    """
    with safetensors.safe_open(str(path_of_open(file)), framework="pt", device="cpu") as opened:
        names = opened.keys()
        return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})


def read(path: str | os.PathLike[str]) -> Contents:
    """Read a checkpoint file.

    Raises:
        CheckpointFormatError: the file is truncated, damaged, of another format, or of a newer format version.
        OSError: the file does not exist or cannot be read.
    """
    if Path(path).is_dir():
        raise CheckpointFormatError(path, "a folder", "Pass the file that manifold_nets.save wrote.")
    try:
        with Path(path).open("rb") as file:
            tensors, metadata = read_tensors(file)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (see read_tensors)
        remedy = "It has another format, or is truncated or damaged: save the model again."
        raise CheckpointFormatError(path, f"an unreadable safetensors file ({error})", remedy) from None
    return contents_of(path, tensors, metadata)


def contents_of(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Contents:
    """Check and return the contents of a checkpoint file that is in memory.

    Raises:
        CheckpointFormatError: as for `read`.
    """
    if not is_checkpoint(metadata):
        remedy = "Load a plain one with safetensors.torch.load_file and model.load_state_dict, then call "
        remedy += "manifold_nets.convert."
        raise CheckpointFormatError(path, f"a safetensors file without the metadata {_KEY!r}", remedy)
    try:
        document = parse_json(metadata.get(_KEY, ""))
        newer = document["format"] == FORMAT and document["version"] > VERSION
        fault = None if newer else _SCHEMA.fault(document)
    except (ValueError, KeyError, TypeError) as error:
        newer, fault = False, described(error)
    if newer:
        remedy = f"This release reads versions up to {VERSION}; upgrade manifold_nets."
        raise CheckpointFormatError(path, f"format version {document['version']}", remedy)
    if fault is None and document["checksum"] != tensors_checksum(tensors, document):
        remedy = "It is damaged or was edited: save the model again."
        raise CheckpointFormatError(path, "contents that do not match their checksum", remedy)
    fault = fault or _inconsistency(tensors, document)
    if fault is None:
        removed = tuple(document.get("removed_biases", ()))
        conversions = {prefix: Moves.from_dict(data) for prefix, data in document.get("conversions", {}).items()}
        try:
            manifolds = manifolds_from_dicts(document["manifolds"])
            defined = tuple(document.get("defined", ()))
            return Contents(tensors, manifolds, document["aliases"], removed, conversions, defined)
        except PartitionError as error:
            fault = str(error)
    found = f"unreadable metadata {_KEY!r} ({printable(fault)})"
    raise CheckpointFormatError(path, found, "It is damaged: save the model again.")


def _inconsistency(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str | None:
    """Return which entries of a document contradict each other or the tensors."""
    manifolds, aliases, removed = document["manifolds"], document["aliases"], document.get("removed_biases", ())
    for name, data in manifolds.items():
        if name not in tensors or not tensors[name].is_floating_point() or list(tensors[name].shape) != data["shape"]:
            return f"manifolds/{name!r} fits no tensor of the file"
    for alias, name in aliases.items():
        if alias in tensors or name not in tensors:
            return f"aliases/{alias!r} is not another name of a tensor of the file"
    for name in removed:
        if name in tensors or name in aliases:
            return f"removed_biases: the file holds {name!r}"
    return next(_unfit_moves(tensors, document), None)


def _unfit_moves(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the moves of a conversion whose group numbers or entry counts do not fit the tensors."""
    aliases, manifolds = document["aliases"], document["manifolds"]
    for prefix, data in document.get("conversions", {}).items():
        for name, entry in data["weights"].items():
            where = f"conversions/{prefix!r}/weights/{name!r}"
            manifold = manifolds.get(aliases.get(prefix + name, prefix + name))
            if manifold is None:
                continue  # the constraint was taken off
            count = math.prod(manifold["view"][axis] for axis in manifold["kept"] if axis < len(manifold["view"]))
            along = list(entry["biases"].items())
            for absorber in entry["absorbers"]:
                buffers = (absorber["running_mean"], absorber["running_var"])
                along += [(buffer, absorber["groups"]) for buffer in buffers if buffer is not None]
            for tensor, groups in along:
                present = tensors.get(aliases.get(prefix + tensor, prefix + tensor))
                if max(groups, default=-1) >= count or (present is not None and present.numel() != len(groups)):
                    yield f"{where} does not fit {tensor!r}"


def tensors_checksum(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    """CRC-32 over a document (without its checksum) and over name, type, shape and bytes of every dense tensor."""
    crc = crc32({key: value for key, value in document.items() if key != "checksum"})
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"crc32:{crc:08x}"


_checksum = tensors_checksum  # its former name
