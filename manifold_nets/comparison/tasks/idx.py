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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifold_nets.comparison.tasks.errors import DataFileError, DataFolderError

__all__ = ["find_idx_files", "read_idx", "read_images_and_labels"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
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
    content = _unpacked(path, path.read_bytes())
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES or content[3] == 0:
        start = content[:4].hex(" ") or "nothing"
        expected = "an idx file, which starts with 00 00, a type (08, 09, 0b … 0e) and a number of axes"
        raise DataFileError(path, f"first bytes {start}", expected, "Name an idx file, plain or compressed with gzip.")
    kind, axes = np.dtype(_TYPES[content[2]]), content[3]
    header = 4 + 4 * axes
    if len(content) < header:
        raise DataFileError(path, f"{len(content)} bytes", f"a header of {header} bytes for {axes} axes")
    shape = struct.unpack(f">{axes}I", content[4:header])
    expected_size = header + math.prod(shape) * kind.itemsize
    if len(content) != expected_size:
        how = "truncated" if len(content) < expected_size else "more than its header says"
        raise DataFileError(path, f"{len(content)} bytes ({how})", f"{expected_size} bytes for shape {shape}")
    return np.frombuffer(content, kind, offset=header).reshape(shape).astype(kind.newbyteorder("="))


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


def _unpacked(path: Path, content: bytes) -> bytes:
    if content[:2] != _GZIP:
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFileError(path, f"damaged or truncated gzip data ({error})", "a whole gzip file") from error
