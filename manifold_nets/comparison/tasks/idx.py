"""Files in the idx format of MNIST and its successors, plain or compressed with gzip.

A file is a magic number (two zero bytes, a code for the type, the number of axes), the sizes of the axes as
big-endian 32-bit integers, and the entries, big-endian, row-major.

References:
    Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, section "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from manifold_nets.comparison.errors import DataFileError, DataFolderError

__all__ = ["find_idx_files", "read_idx", "read_images_and_labels"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_PIECE = 2**20
# Images take up to some ten times less room when they are compressed; a file made to fill the memory, a thousand times.
_UNSUSPICIOUS, _LARGEST_RATIO = 2**26, 100
_PARTS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(path: str | Path) -> NDArray[Any]:
    """Read an idx file, compressed with gzip or not (told by its first bytes), as an array of native byte order.

    Args:
        path: the file.

    Returns:
        An array of the file's shape and type.

    Raises:
        DataFileError: the file is compressed badly, has another magic number, or is shorter or longer than its
            header says.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "labels"
        ...     _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(file)
        array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        try:
            return _read(path, gzip.GzipFile(fileobj=file) if packed else file, packed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataFileError(path, f"damaged or truncated gzip data ({error})", "a whole gzip file") from error


def _read(path: Path, stream: BinaryIO | gzip.GzipFile, packed: bool) -> NDArray[Any]:
    """Read an array from a stream, of which no more is unpacked than its header declares."""
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _TYPES or start[3] == 0:
        found = f"first bytes {start.hex(' ') or 'nothing'}"
        expected = "an idx file, which starts with 00 00, a type (08, 09, 0b … 0e) and a number of axes"
        raise DataFileError(path, found, expected, "Name an idx file, plain or compressed with gzip.")
    kind, axes = np.dtype(_TYPES[start[2]]), start[3]
    sizes, header = stream.read(4 * axes), 4 + 4 * axes
    if len(sizes) < 4 * axes:
        raise DataFileError(path, f"{4 + len(sizes)} bytes", f"a header of {header} bytes for {axes} axes")
    shape = struct.unpack(f">{axes}I", sizes)
    size, present = math.prod(shape) * kind.itemsize, path.stat().st_size
    if packed and size > max(_UNSUSPICIOUS, _LARGEST_RATIO * present):
        expected = f"at most {_LARGEST_RATIO} times the {present} bytes of the file"
        raise DataFileError(path, f"a header for {size} bytes of shape {shape}", expected)
    content = bytearray()
    while len(content) <= size and (piece := stream.read(min(_PIECE, size + 1 - len(content)))):
        content += piece
    if len(content) != size:
        few = len(content) < size
        found = f"{'' if few else 'at least '}{header + len(content)} bytes"
        how = "truncated" if few else "more than its header says"
        raise DataFileError(path, f"{found} ({how})", f"{header + size} bytes for shape {shape}")
    return np.frombuffer(content, kind).reshape(shape).astype(kind.newbyteorder("="), copy=False)


def find_idx_files(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """Find the four files of a data set in the layout of MNIST: images and labels for training and for testing.

    Names are those of MNIST, ``train-images-idx3-ubyte`` and so on, also with a dot before ``idx``, each with or
    without ``.gz``.

    Args:
        folder: where they are.

    Returns:
        ``{"train": (images, labels), "test": (images, labels)}``.

    Raises:
        DataFolderError: the folder does not exist or lacks one of the files.
    """
    folder = Path(folder)
    wanted = [name for pair in _PARTS.values() for name in pair]
    remedy = "Name the folder that holds the four idx files of MNIST or of a data set in its layout (--data)."
    if not folder.is_dir():
        raise DataFolderError(folder, "no such folder", wanted, remedy)
    found: dict[str, Path] = {}
    for name in wanted:
        spellings = (name, name.replace("-idx", ".idx"))
        paths = [folder / f"{spelling}{suffix}" for spelling in spellings for suffix in ("", ".gz")]
        present = [path for path in paths if path.is_file()]
        if present:
            found[name] = present[0]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataFolderError(folder, f"no {', '.join(missing)}", wanted, remedy)
    return {part: (found[images], found[labels]) for part, (images, labels) in _PARTS.items()}


def read_images_and_labels(images: Path, labels: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read images ``(n, height, width)`` and their labels ``(n,)``, both unsigned bytes.

    Raises:
        DataFileError: a file is damaged, of another shape or type, or they do not fit together.
    """
    x, y = read_idx(images), read_idx(labels)
    for path, array, ndim in ((images, x, 3), (labels, y, 1)):
        if array.ndim != ndim or array.dtype != np.uint8:
            found = f"{array.dtype} of shape {array.shape}"
            raise DataFileError(path, found, f"unsigned bytes with {ndim} axes", "Check which file is which.")
    if len(x) != len(y) or len(x) == 0:
        raise DataFileError(labels, f"{len(y)} labels", f"one for each of the {len(x)} images, at least one")
    return x, y
