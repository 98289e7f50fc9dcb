"""CamVid in the layout of the SegNet tutorial, and SegNet-Basic, as a task and a model of a comparison.

    manifold-nets compare --task examples/paper/camvid.py:camvid_120x90 --model examples/paper/camvid.py:segnet_basic …

``camvid`` has the images as they are, ``camvid_WIDTHxHEIGHT`` reduced ones; ``segnet_basic`` is the paper's network,
``segnet_basic_FILTERSxBLOCKS`` another size. The folder of the data (``--data``) holds
``train.txt``, ``val.txt`` and ``test.txt``; each line names an image and a label image. Paths are those below the
folder; a leading path of another machine (``/SegNet/CamVid/train/…``) is taken off.

References:
    Brostow, Fauqueur, Cipolla, *Semantic object classes in video*, Pattern Recognition Letters 30(2), 2009;
    Badrinarayanan, Kendall, Cipolla, *SegNet*, IEEE TPAMI 39(12), 2017, arXiv:1511.00561, for the eleven classes and
    the median-frequency weights, after Eigen and Fergus, ICCV 2015, arXiv:1411.4734.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, max_unpool2d

from manifold_nets.comparison.errors import DataFileError, DataFolderError
from manifold_nets.comparison.tasks import Task, TensorPart, data_folder
from manifold_nets.comparison.tasks.images import Standardize
from manifold_nets.errors import MissingExtraError

__all__ = ["CLASSES", "VOID", "SegNetBasic", "camvid", "median_frequency_weights", "read_camvid", "read_pairs"]

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


def camvid(data: str | Path | None = None, *, size: tuple[int, int] | None = None) -> Task:
    """Return CamVid in the layout of the SegNet tutorial: eleven classes, void left out of loss and scores.

    The parts are those of its lists. Images are standardized by one mean and one spread per channel, of the training
    part. The loss is cross-entropy with median-frequency class weights of the training part; the error is
    1 − mean intersection over union.

    Args:
        data: the folder with ``train.txt``, ``val.txt`` and ``test.txt``, or one that holds such a ``camvid…`` folder;
            that of the environment variable ``MANIFOLD_NETS_DATA`` when left out.
        size: width and height to reduce to; the files' own when left out.

    Raises:
        DataFolderError: the folder or a list does not exist.
        DataFileError: a list or an image does not fit.
        MissingExtraError: Pillow is not installed.
    """
    parts = read_camvid(data_folder("camvid", data), size=size)
    images, labels = parts["train"]
    standardize = Standardize.of(images)
    weights = median_frequency_weights(labels, len(CLASSES), VOID)
    return Task(
        name="camvid",
        parts={name: TensorPart(x, y, standardize) for name, (x, y) in parts.items()},
        input_shape=tuple(images.shape[1:]),
        outputs=len(CLASSES),
        loss=partial(_weighted_loss, weights=weights),
        measure=partial(confusion, classes=len(CLASSES), void=VOID),
        summarize=segmentation_scores,
        batch_size=12,
        description={
            "source": "CamVid, SegNet tutorial",
            "split": "the lists of the folder",
            "preprocessing": "channels minus {} over {}".format(
                *([round(number, 3) for number in numbers] for numbers in (standardize.mean, standardize.spread))
            ),
            "class_weights": dict(zip(CLASSES, (round(weight, 4) for weight in weights.tolist()), strict=True)),
        },
    )


def _weighted_loss(scores: Tensor, labels: Tensor, *, weights: Tensor) -> Tensor:
    return cross_entropy(scores, labels, weights.to(scores.device, scores.dtype), ignore_index=VOID)


def confusion(outputs: Tensor, targets: Tensor, *, classes: int, void: int | None = None) -> Tensor:
    """Return how often each true class was predicted as each class.

    Args:
        outputs: scores, of shape (n, classes, …); the class of the largest is predicted, none where it is NaN.
        targets: true classes, of shape (n, …).
        classes: number of classes.
        void: label of what is not to be counted.

    Returns:
        int64, of shape (classes, classes + 1): rows are true classes, columns predicted ones; the last column counts
        scores that are not numbers.

    Example:
        >>> confusion(torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), torch.tensor([0, 1, 1]), classes=2)
        tensor([[1, 0, 0],
                [1, 1, 0]])
    """
    largest, predicted = outputs.max(1)  # which is NaN where any output is
    predicted = torch.where(largest.isnan(), classes, predicted).flatten()
    true = targets.flatten()
    if void is not None:
        predicted, true = predicted[true != void], true[true != void]
    return torch.bincount(true * (classes + 1) + predicted, minlength=classes * (classes + 1)).view(classes, -1)


def segmentation_scores(counts: Tensor) -> dict[str, float]:
    """Return the scores of the literature on segmentation, as errors, from counts of `confusion`.

    ``"error"`` is 1 − mean intersection over union, ``"class_error"`` 1 − mean accuracy of the classes, both means
    over the classes that occur, and ``"pixel_error"`` 1 − global accuracy.

    Example:
        >>> {name: round(value, 4) for name, value in segmentation_scores(torch.tensor([[1, 1, 0], [0, 2, 0]])).items()}
        {'error': 0.4167, 'class_error': 0.25, 'pixel_error': 0.25}
    """
    counts = counts.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)[: len(counts)]
    occurs = true > 0
    union = (right / (true + predicted - right))[occurs].mean()
    accuracy = (right / true)[occurs].mean()
    values = {"error": union, "class_error": accuracy, "pixel_error": right.sum() / counts.sum()}
    return {name: 1 - float(value) for name, value in values.items()}


# ---- network --------------------------------------------------------------------------------------------------


class SegNetBasic(nn.Module):
    """SegNet-Basic for images of any size from 2^blocks pixels on.

    Encoder blocks: convolution → batch normalization → ReLU → 2×2 max-pooling. Decoder blocks: max-unpooling with the
    indices of the encoder's block → convolution → batch normalization. At the end a 1×1 classifier. Convolutions in
    front of a normalization have no bias, which it would remove.

    Args:
        channels: channels of the images.
        outputs: number of classes.
        filters: filters of each convolution; 64 in the paper.
        blocks: encoder blocks, and as many decoder blocks; 4 in the paper.
        kernel: size of the convolutions; 7 in the paper.

    References:
        Badrinarayanan, Kendall, Cipolla, *SegNet*, IEEE TPAMI 39(12), 2017, arXiv:1511.00561, section 3.1.

    Example:
        >>> SegNetBasic(3, 11, filters=4)(torch.zeros(2, 3, 45, 60)).shape
        torch.Size([2, 11, 45, 60])
    """

    def __init__(self, channels: int, outputs: int, *, filters: int = 64, blocks: int = 4, kernel: int = 7) -> None:
        super().__init__()
        inputs = [channels] + [filters] * (blocks - 1)
        self.encoders = nn.ModuleList(_convolution(features, filters, kernel) for features in inputs)
        self.decoders = nn.ModuleList(_convolution(filters, filters, kernel) for _ in range(blocks))
        self.classifier = nn.Conv2d(filters, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to scores (n, outputs, h, w)."""
        pooled: list[tuple[Tensor, torch.Size]] = []
        for encoder in self.encoders:
            features = torch.relu(encoder(x))
            x, indices = max_pool2d(features, 2, return_indices=True)
            pooled.append((indices, features.shape))
        for decoder, (indices, shape) in zip(self.decoders, reversed(pooled), strict=True):
            x = decoder(max_unpool2d(x, indices, [2, 2], output_size=shape[2:]))
        return cast(Tensor, self.classifier(x))


def _convolution(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))


def segnet_basic(input_shape: Sequence[int], outputs: int, *, filters: int = 64, blocks: int = 4) -> SegNetBasic:
    """Return SegNet-Basic for a task."""
    return SegNetBasic(input_shape[0], outputs, filters=filters, blocks=blocks)


def __getattr__(name: str) -> Callable[..., Any]:
    """``camvid_120x90``: images reduced to 120×90 pixels; ``segnet_basic_16x4``: 16 filters and 4 blocks."""
    kind, _, sizes = name.rpartition("_")
    if kind not in ("camvid", "segnet_basic") or not re.fullmatch(r"[1-9]\d*x[1-9]\d*", sizes):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    first, second = map(int, sizes.split("x"))
    if kind == "camvid":
        return partial(camvid, size=(first, second))
    return partial(segnet_basic, filters=first, blocks=second)
