"""CamVid in the layout of the SegNet tutorial: lists of image and label files, a void label, class weights.

The folder holds ``train.txt``, ``val.txt`` and ``test.txt``; each line names an image and a label image. Paths are
those below the folder; a leading path of another machine (``/SegNet/CamVid/train/…``) is taken off.

References:
    Brostow, Fauqueur, Cipolla, *Semantic object classes in video*, Pattern Recognition Letters 30(2), 2009;
    Badrinarayanan, Kendall, Cipolla, *SegNet*, IEEE TPAMI 39(12), 2017, arXiv:1511.00561, for the eleven classes and
    the median-frequency weights, after Eigen and Fergus, ICCV 2015, arXiv:1411.4734.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_nets.comparison.tasks.errors import DataFileError, DataFolderError
from manifold_nets.errors import MissingExtraError

__all__ = ["CLASSES", "VOID", "median_frequency_weights", "read_camvid", "read_pairs"]

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
VOID = 11
_LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}


def read_pairs(folder: str | Path) -> dict[str, list[tuple[Path, Path]]]:
    """Read the three lists of a folder: pairs of an image and its label image, for each part of the data.

    Args:
        folder: the folder with the lists.

    Returns:
        ``{"train": [(image, labels), …], "validation": …, "test": …}``, in the order of the lists.

    Raises:
        DataFolderError: the folder or a list does not exist.
        DataFileError: a line does not name two files that exist, or an image stands in two lists.
    """
    folder = Path(folder)
    remedy = "Name the folder of CamVid in the layout of the SegNet tutorial (--data)."
    if not folder.is_dir():
        raise DataFolderError(folder, "no such folder", _LISTS.values(), remedy)
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    owner: dict[Path, str] = {}
    for part, name in _LISTS.items():
        path = folder / name
        if not path.is_file():
            raise DataFolderError(folder, f"no {name}", _LISTS.values(), remedy)
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs[part] = [_pair(folder, path, number, line) for number, line in enumerate(lines, 1)]
        if not lines:
            raise DataFileError(path, "no lines", "an image and its label image in each line")
        for image, _ in pairs[part]:
            if owner.setdefault(image, part) != part:
                raise DataFileError(path, f"{image.name}, which the {owner[image]} list names too", "each image once")
    return pairs


def read_camvid(folder: str | Path, *, size: tuple[int, int] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the images and labels of all three parts.

    Args:
        folder: the folder with the lists.
        size: width and height to reduce to: images by box averaging, labels by nearest neighbour; the files' own when
            left out.

    Returns:
        For ``train``, ``validation`` and ``test`` the images, unsigned bytes of shape (n, 3, height, width), and the
        labels, int64 of shape (n, height, width): classes 0 … 10 in the order of `CLASSES`, and 11 for void.

    Raises:
        DataFolderError: the folder or a list does not exist.
        DataFileError: a list or an image does not fit.
        MissingExtraError: Pillow is not installed.
    """
    parts = {}
    for part, pairs in read_pairs(folder).items():
        images = [_read_image(image, "RGB", size) for image, _ in pairs]
        labels = [_read_image(label, "L", size) for _, label in pairs]
        _require_fit(pairs, images, labels)
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        parts[part] = x, torch.from_numpy(np.stack(labels)).long()
    return parts


def median_frequency_weights(labels: Tensor, classes: int, void: int | None = None) -> Tensor:
    r"""Return the weight of each class in a cross-entropy: median frequency over its own.

    With pixels ``n_c`` of class c and pixels ``N_c`` of all images in which c occurs, void left out of both,

    .. math:: f_c = n_c / N_c, \quad w_c = \operatorname{median}(f) / f_c ,

    the median over the classes that occur. A class that never occurs has weight 0.

    Args:
        labels: classes of the training pixels, of shape (n, …).
        classes: number of classes.
        void: label of pixels without a class.

    Returns:
        float32, shape (classes,).

    References:
        Eigen, Fergus, ICCV 2015, arXiv:1411.4734, section 6.3.2.

    Example:
        >>> median_frequency_weights(torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]), 2)
        tensor([0.6429, 2.2500])
    """
    counts = torch.stack([torch.bincount(image.flatten(), minlength=256)[:256] for image in labels]).double()
    if void is not None:
        counts[:, void] = 0
    own, around = counts[:, :classes].sum(0), ((counts[:, :classes] > 0) * counts.sum(1, keepdim=True)).sum(0)
    occurs = own > 0
    frequency = own[occurs] / around[occurs]
    weights = torch.zeros(classes, dtype=torch.float64)
    weights[occurs] = frequency.quantile(0.5) / frequency
    return weights.float()


def _pair(folder: Path, path: Path, number: int, words: list[str]) -> tuple[Path, Path]:
    if len(words) != 2:
        raise DataFileError(f"{path}, line {number}", f"{len(words)} words", "an image and its label image")
    files = []
    for word in words:
        # Lists made for another machine name <somewhere>/<part>/<file>.
        below = folder / Path(*Path(word).parts[-2:])
        if not below.is_file():
            raise DataFileError(f"{path}, line {number}", f"no file {below}", "files that exist")
        files.append(below)
    return files[0], files[1]


def _read_image(path: Path, mode: str, size: tuple[int, int] | None) -> NDArray[Any]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingExtraError("Pillow", "images of CamVid", "compare") from error
    try:
        with Image.open(path) as file:
            # Label images with a palette hold the classes as indices into it.
            image = file if mode == "L" and file.mode in ("P", "L") else file.convert(mode)
            if size is not None:
                _require_larger(path, image.size, size)
                image = image.resize(size, Image.Resampling.BOX if mode == "RGB" else Image.Resampling.NEAREST)
            return np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataFileError(path, f"no readable image ({error})", "an image file") from error


def _require_larger(path: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    if found[0] < size[0] or found[1] < size[1]:
        asked = "{}×{}".format(*size)
        raise DataFileError(path, "{}×{} pixels".format(*found), f"at least the {asked} that images are reduced to")


def _require_fit(pairs: list[tuple[Path, Path]], images: list[NDArray[Any]], labels: list[NDArray[Any]]) -> None:
    for (image, label), x, y in zip(pairs, images, labels, strict=True):
        if x.shape != images[0].shape:
            raise DataFileError(
                image, f"{x.shape[1]}×{x.shape[0]} pixels", f"{images[0].shape[1]}×{images[0].shape[0]}"
            )
        if y.shape != x.shape[:2]:
            raise DataFileError(label, f"{y.shape[1]}×{y.shape[0]} pixels", f"the image's {x.shape[1]}×{x.shape[0]}")
        if y.max() > VOID:
            raise DataFileError(label, f"label {y.max()}", f"0 … {len(CLASSES) - 1}, or {VOID} for void")
