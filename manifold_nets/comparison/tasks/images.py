"""Images to classify: scikit-learn's digits, and data sets in the idx format of MNIST and its successors.

An idx file, plain or compressed with gzip, is a magic number (two zero bytes, a code for the type, the number of axes),
the sizes of the axes as big-endian 32-bit integers, and the entries, big-endian, row-major.

References:
    Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, section "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_nets.comparison.errors import DataFileError, DataFolderError, TaskNameError
from manifold_nets.comparison.tasks.task import Task, classification
from manifold_nets.errors import MissingExtraError

_SPLIT_SEED = 0
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
    """Read an idx file, compressed with gzip or not (detected by its first bytes), as an array in native byte order.

    Args:
        path: the file.

    Returns:
        An array of the file's shape and type.

    Raises:
        DataFileError: the compression is damaged, the magic number is wrong, or the file is shorter or longer than its
            header states.

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
    """Read an array from a stream; no more is decompressed than the header declares."""
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _TYPES or start[3] == 0:
        found = f"first bytes {start.hex(' ') or 'nothing'}"
        expected = "an idx file, which starts with 00 00, a type (08, 09, 0b … 0e) and a number of axes"
        raise DataFileError(path, found, expected, "Pass an idx file, plain or compressed with gzip.")
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
        how = "truncated" if few else "longer than its header states"
        raise DataFileError(path, f"{found} ({how})", f"{header + size} bytes for shape {shape}")
    return np.frombuffer(content, kind).reshape(shape).astype(kind.newbyteorder("="), copy=False)


def find_idx_files(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """Find the four files of a data set in the layout of MNIST: images and labels for training and for testing.

    Names are those of MNIST, such as ``train-images-idx3-ubyte``, also with a dot before ``idx``, each with or without
    ``.gz``.

    Args:
        folder: the folder of the files.

    Returns:
        ``{"train": (images, labels), "test": (images, labels)}``.

    Raises:
        DataFolderError: the folder does not exist or lacks one of the files.
    """
    folder = Path(folder)
    wanted = [name for pair in _PARTS.values() for name in pair]
    remedy = "Pass the folder with the four idx files of MNIST, or of a data set in the same layout (--data)."
    if not folder.is_dir():
        raise DataFolderError(folder, "no such folder", wanted, remedy)
    spellings = {name: (name, f"{name}.gz", dotted := name.replace("-idx", ".idx"), f"{dotted}.gz") for name in wanted}
    present = {
        name: [folder / file for file in files if (folder / file).is_file()] for name, files in spellings.items()
    }
    missing = [name for name in wanted if not present[name]]
    if missing:
        raise DataFolderError(folder, f"no {', '.join(missing)}", wanted, remedy)
    return {part: (present[images][0], present[labels][0]) for part, (images, labels) in _PARTS.items()}


def read_images_and_labels(images: Path, labels: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read images ``(n, height, width)`` and their labels ``(n,)``, both unsigned bytes.

    Raises:
        DataFileError: a file is damaged, of another shape or type, or images and labels do not match.
    """
    x, y = read_idx(images), read_idx(labels)
    for path, array, ndim in ((images, x, 3), (labels, y, 1)):
        if array.ndim != ndim or array.dtype != np.uint8:
            found = f"{array.dtype} of shape {array.shape}"
            raise DataFileError(path, found, f"unsigned bytes with {ndim} axes", "Check that no files are swapped.")
    if len(x) != len(y) or len(x) == 0:
        raise DataFileError(labels, f"{len(y)} labels", f"one for each of the {len(x)} images, at least one")
    return x, y


@dataclass(frozen=True)
class Standardize:
    """Subtract a mean and divide by a spread, channel by channel; unsigned bytes become float32.

    Args:
        mean: one number per channel.
        spread: one number per channel.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Standardize:
        """Take mean and standard deviation of each channel of images (n, channels, height, width), in float64."""
        # By channels, so that no float64 copy of all images is made at once.
        moments = [torch.var_mean(images[:, channel].double(), correction=0) for channel in range(images.shape[1])]
        spreads, means = zip(*moments, strict=True)
        return cls(tuple(float(mean) for mean in means), tuple(max(float(v.sqrt()), 1e-12) for v in spreads))

    def __call__(self, images: Tensor) -> Tensor:
        """Return standardized float32 images."""
        mean, spread = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.spread))
        return (images.float() - mean) / spread


def digits() -> Task:
    """Return scikit-learn's bundled digits, 8×8 pixels in 10 classes: 1,000 / 297 / 500 images.

    The split is a fixed permutation; pixels are standardized by the mean and standard deviation of the training part.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> digits().sizes()
        {'train': 1000, 'validation': 297, 'test': 500}
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "comparisons on the digits", "compare") from error
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None], torch.tensor(data.target)
    order = torch.split(_permutation(len(y)), [1000, 297, 500])
    parts = {name: (x[rows], y[rows]) for name, rows in zip(("train", "validation", "test"), order, strict=True)}
    return _classification("digits", parts, "scikit-learn's bundled digits", batch_size=50)


def idx_images(folder: str | Path, *, name: str = "idx", sizes: tuple[int, ...] = ()) -> Task:
    """Return a data set in the layout of MNIST, with a sixth of its training files for validation.

    The split of the training files is a fixed permutation; pixels are standardized by the mean and standard deviation
    of the training part. The test files are used for testing.

    Args:
        folder: the folder of its four files.
        name: name of the task.
        sizes: numbers of training and validation images (default: all).

    Raises:
        DataFolderError: the folder does not exist or lacks a file.
        DataFileError: a file is damaged or does not fit.
        TaskNameError: there are not that many images.
    """
    files = find_idx_files(folder)
    x, y = (torch.from_numpy(array) for array in read_images_and_labels(*files["train"]))
    x_test, y_test = (torch.from_numpy(array) for array in read_images_and_labels(*files["test"]))
    validation = len(y) // 6
    parts = {"test": (x_test[:, None], y_test.long())}
    rows = torch.split(_permutation(len(y)), [len(y) - validation, validation])
    for part, order, size in zip_longest(("train", "validation"), rows, sizes):
        if size is not None and not 0 < size <= len(order):
            remedy = "Ask for fewer, or leave the sizes out."
            raise TaskNameError(f"task {name}", repr(f"{size} images"), f"1 … {len(order)}", remedy)
        parts[part] = x[order[:size], None], y[order[:size]].long()
    return _classification(name, parts, "four idx files", batch_size=100)


def _permutation(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT_SEED))


def _classification(name: str, parts: dict[str, tuple[Tensor, Tensor]], source: str, *, batch_size: int) -> Task:
    x, _ = parts["train"]
    standardize = Standardize.of(x)
    classes = int(max(y.max() for _, y in parts.values())) + 1
    return classification(
        name,
        {part: (standardize(images), y) for part, (images, y) in parts.items()},
        outputs=classes,
        batch_size=batch_size,
        source=source,
        split=f"a permutation with seed {_SPLIT_SEED}",
        preprocessing=f"pixels minus {standardize.mean[0]:.6g}, over {standardize.spread[0]:.6g}",
    )
