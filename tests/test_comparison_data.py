"""Reading idx files and CamVid: against independent parsers, hand-made files, and files that are wrong."""

import gzip
import os
import struct
import tracemalloc
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from manifold_nets.comparison.tasks.camvid import CLASSES, VOID, median_frequency_weights, read_camvid, read_pairs
from manifold_nets.comparison.tasks.errors import DataFileError, DataFolderError
from manifold_nets.comparison.tasks.idx import find_idx_files, read_idx, read_images_and_labels

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
NAMES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def data_folder(name: str) -> Path:
    """Return a folder of real data, or skip where there is none."""
    root = os.environ.get("MANIFOLD_NETS_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"no data: MANIFOLD_NETS_DATA names no folder with {name}")
    return Path(root) / name


def idx_bytes(array: np.ndarray) -> bytes:
    """Encode an array by the description of the format."""
    kind = array.dtype.str[1:]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[kind], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist_like(folder: Path, *, compress: bool = False, dots: bool = False) -> dict[str, np.ndarray]:
    """Write four small files in the layout of MNIST; return what they hold."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for name in NAMES:
        count = 30 if name.startswith("train") else 12
        shape = (count, 5, 4) if "images" in name else (count,)
        array = generator.integers(0, 256 if "images" in name else 3, shape).astype(np.uint8)
        spelled = name.replace("-idx", ".idx") if dots else name
        content = idx_bytes(array)
        (folder / (spelled + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
        held[name] = array
    return held


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
        (idx_bytes(np.zeros(2, "i4")) + b"\0", r"17 bytes \(more than its header says\)"),
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
        with pytest.raises(DataFileError, match=r"more than its header says|at most 100 times"):
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


# ---- CamVid ----------------------------------------------------------------------------------------------------------


def write_camvid_like(folder: Path, *, prefix: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write a data set of a few small images in the layout of the tutorial; return what it holds."""
    image_module = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(1)
    held = {}
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in (part, f"{part}annot"):
            (folder / name).mkdir(parents=True)
        x = generator.integers(0, 256, (count, 6, 8, 3)).astype(np.uint8)
        y = generator.integers(0, VOID + 1, (count, 6, 8)).astype(np.uint8)
        lines = []
        for index in range(count):
            files = f"{part}/{index}.png", f"{part}annot/{index}.png"
            for file, array in zip(files, (x[index], y[index]), strict=True):
                image_module.fromarray(array).save(folder / file)
            lines.append(" ".join(prefix + file for file in files))
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
        held[{"val": "validation"}.get(part, part)] = x, y
    return held


@pytest.mark.parametrize("prefix", ["", "/SegNet/CamVid/"])
def test_camvid_is_read_as_it_was_written(prefix: str, tmp_path: Path) -> None:
    held = write_camvid_like(tmp_path, prefix=prefix)
    for part, (images, labels) in read_camvid(tmp_path).items():
        x, y = held[part]
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), x)
        np.testing.assert_array_equal(labels.numpy(), y)


def test_reduced_images_are_box_averages_and_labels_are_taken_from_the_middle(tmp_path: Path) -> None:
    held = write_camvid_like(tmp_path)
    images, labels = read_camvid(tmp_path, size=(4, 3))["train"]
    x, y = held["train"]
    means = x.reshape(4, 3, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), means, rtol=0, atol=1)  # rounded twice
    np.testing.assert_array_equal(labels.numpy(), y[:, 1::2, 1::2])


@pytest.mark.parametrize("size", [(9, 6), (8, 7)])
def test_images_are_not_enlarged(size: tuple[int, int], tmp_path: Path) -> None:
    write_camvid_like(tmp_path)
    expected = rf"0\.png: found 8×6 pixels; expected at least the {size[0]}×{size[1]} that images are reduced to"
    with pytest.raises(DataFileError, match=expected):
        read_camvid(tmp_path, size=size)


def by_hand(labels: np.ndarray, classes: int, void: int | None) -> list[float]:
    """Median-frequency weights by counting, in exact fractions."""
    own, around = Counter(), Counter()
    for image in labels:
        counts = Counter(value for value in image.ravel().tolist() if value != void)
        for value, count in counts.items():
            own[value] += count
            around[value] += sum(counts.values())
    frequency = {value: Fraction(own[value], around[value]) for value in own}
    ranked = sorted(frequency.values())
    median = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    return [float(median / frequency[value]) if value in frequency else 0.0 for value in range(classes)]


def check_weights(weights) -> None:
    generator = np.random.default_rng(2)
    labels = generator.choice([0, 1, 2, 3, 4, 6, 11], (7, 6, 5), p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02])
    labels[3:][labels[3:] == 1] = 0  # a class that some images lack
    found = weights(torch.from_numpy(labels), 8, VOID)
    np.testing.assert_allclose(found.numpy(), by_hand(labels, 8, VOID), rtol=4e-7)


def test_class_weights_are_those_counted_by_hand() -> None:
    check_weights(median_frequency_weights)


def test_sabotage_frequencies_over_all_images_are_noticed() -> None:
    def over_all(labels: torch.Tensor, classes: int, void: int) -> torch.Tensor:
        counts = torch.bincount(labels[labels != void], minlength=classes)[:classes].double()
        return torch.where(counts > 0, counts[counts > 0].quantile(0.5) / counts, 0).float()

    with pytest.raises(AssertionError):
        check_weights(over_all)


def test_sabotage_void_counted_as_a_class_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_weights(lambda labels, classes, void: median_frequency_weights(labels, classes))


@pytest.mark.slow
def test_the_weights_of_camvid_are_near_the_published_ones() -> None:
    """Those of the tutorial count void as a twelfth class; its weight of signs is known to be off."""
    parts = read_camvid(data_folder("camvid-240x180"))
    assert {part: len(images) for part, (images, _) in parts.items()} == {"train": 367, "validation": 101, "test": 233}
    published = [0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, None, 1.8418, 0.6823, 6.2478, 7.3614, 1.0974]
    found = median_frequency_weights(parts["train"][1], len(CLASSES) + 1)
    for weight, expected in zip(found.tolist(), published, strict=True):
        assert expected is None or abs(weight / expected - 1) < 0.12


def test_folders_and_lists_that_are_wrong_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFolderError, match="no such folder"):
        read_pairs(tmp_path / "absent")
    write_camvid_like(tmp_path)
    lists = {name: (tmp_path / name).read_text() for name in ("train.txt", "val.txt", "test.txt")}
    flawed = {
        r"val\.txt, line 1: found 1 words": ("val.txt", "val/0.png\n"),
        r"val\.txt, line 2: found no file .*9\.png": (
            "val.txt",
            lists["val.txt"].splitlines()[0] + "\nval/9.png a/b\n",
        ),
        r"test\.txt: found no lines": ("test.txt", "\n"),
        r"test\.txt: found 0\.png, which the train list names too": ("test.txt", lists["train.txt"]),
    }
    for message, (name, text) in flawed.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataFileError, match=message):
            read_pairs(tmp_path)
        (tmp_path / name).write_text(lists[name])
    (tmp_path / "val.txt").unlink()
    with pytest.raises(DataFolderError, match=r"no val\.txt"):
        read_pairs(tmp_path)


def test_images_that_are_wrong_are_refused(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    write_camvid_like(tmp_path)
    good = (tmp_path / "trainannot/1.png").read_bytes()
    (tmp_path / "trainannot/1.png").write_bytes(good[:40])
    with pytest.raises(DataFileError, match=r"1\.png: found no readable image"):
        read_camvid(tmp_path)
    for array, message in (
        (np.full((6, 8), 30, np.uint8), "label 30; expected 0 … 10, or 11 for void"),
        (np.zeros((5, 8), np.uint8), "8×5 pixels; expected the image's 8×6"),
    ):
        image_module.fromarray(array).save(tmp_path / "trainannot/1.png")
        with pytest.raises(DataFileError, match=message):
            read_camvid(tmp_path)
