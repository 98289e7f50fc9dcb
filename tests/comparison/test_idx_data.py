"""Reading idx files: against an independent parser, hand-made files, and files that are wrong."""

import gzip
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.comparison_cases import CODES, data_folder, idx_bytes, write_mnist_like
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from manifold_nets.comparison.errors import DataFileError, DataFolderError
from manifold_nets.comparison.tasks.images import find_idx_files, read_idx, read_images_and_labels

# ---- idx -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    array=st.sampled_from(list(CODES)).flatmap(
        lambda kind: arrays.arrays(np.dtype(kind), arrays.array_shapes(max_dims=4, max_side=5))
    ),
    compress=st.booleans(),
)
def test_any_array_is_read_back(array, compress, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    found = read_idx(path)
    assert found.dtype == array.dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, array)


def check_real_files(read) -> None:
    """Compare with a parse by fixed offsets, and with what is known of MNIST."""
    folder = data_folder("mnist")
    files = find_idx_files(folder)
    images, labels = (read(path) for path in files["test"])
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    expected = np.frombuffer(raw, np.uint8, offset=16).reshape(10000, 28, 28)
    assert np.array_equal(images, expected)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert [Counter(labels.tolist())[digit] for digit in (0, 1, 9)] == [980, 1135, 1009]


def test_mnist_is_read_as_by_fixed_offsets() -> None:
    check_real_files(read_idx)


def test_sabotage_a_header_one_byte_too_long_is_noticed() -> None:
    data_folder("mnist")
    with pytest.raises(AssertionError):
        check_real_files(lambda path: np.roll(read_idx(path), 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first bytes nothing"),
        (b"\x89PNG\r\n", "first bytes 89 50 4e 47"),
        (bytes([0, 0, 7, 1, 0, 0, 0, 0]), "first bytes 00 00 07 01"),
        (bytes([0, 0, 8, 2, 0, 0]), "6 bytes; expected a header of 12 bytes for 2 axes"),
        (idx_bytes(np.zeros((4, 3), "u1"))[:-1], r"23 bytes \(truncated\); expected 24 bytes for shape \(4, 3\)"),
        (idx_bytes(np.zeros(2, "i4")) + b"\0", r"17 bytes \(longer than its header states\)"),
        (gzip.compress(idx_bytes(np.zeros(9, "u1")), mtime=0)[:-6], "damaged or truncated gzip data"),
        (b"\x1f\x8bnothing", "damaged or truncated gzip data"),
    ],
)
def test_wrong_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataFileError, match=message) as refused:
        read_idx(tmp_path / "file")
    assert str(tmp_path / "file") in str(refused.value)


def peak_of_reading(path: Path) -> int:
    """Bytes that are allocated at once while a file is read that is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(DataFileError, match=r"longer than its header states|at most 100 times"):
            read_idx(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("declared", [9, 2**31])
def test_a_small_file_does_not_fill_the_memory(declared: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    header = bytes([0, 0, 8, 1]) + struct.pack(">I", declared)
    path.write_bytes(gzip.compress(header + bytes(2**25)))
    assert path.stat().st_size < 2**16
    assert peak_of_reading(path) < 2**23
    # Sabotage: the whole is unpacked first.
    tracemalloc.start()
    assert len(gzip.decompress(path.read_bytes())) > 2**25
    assert tracemalloc.get_traced_memory()[1] > 2**23
    tracemalloc.stop()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dots", [False, True])
def test_a_folder_in_the_layout_of_mnist_is_found(compress: bool, dots: bool, tmp_path: Path) -> None:
    held = write_mnist_like(tmp_path, compress=compress, dots=dots)
    files = find_idx_files(tmp_path)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = read_images_and_labels(*files[part])
        np.testing.assert_array_equal(images, held[f"{prefix}-images-idx3-ubyte"])
        np.testing.assert_array_equal(labels, held[f"{prefix}-labels-idx1-ubyte"])


def test_folders_that_lack_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFolderError, match="no such folder"):
        find_idx_files(tmp_path / "absent")
    write_mnist_like(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataFolderError, match="found no t10k-labels-idx1-ubyte; expected train-images"):
        find_idx_files(tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_mnist_like(tmp_path)
    train, test = find_idx_files(tmp_path).values()
    with pytest.raises(DataFileError, match="12 labels; expected one for each of the 30 images"):
        read_images_and_labels(train[0], test[1])
    with pytest.raises(DataFileError, match="unsigned bytes with 3 axes"):
        read_images_and_labels(train[1], train[0])
