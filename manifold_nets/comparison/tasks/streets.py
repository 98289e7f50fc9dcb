"""CamVid as a task: street scenes to segment."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cross_entropy

from manifold_nets.comparison.tasks.camvid import CLASSES, VOID, median_frequency_weights, read_camvid
from manifold_nets.comparison.tasks.images import Standardize
from manifold_nets.comparison.tasks.scores import confusion_of, segmentation_scores
from manifold_nets.comparison.tasks.task import Task, TensorPart

__all__ = ["camvid"]


def camvid(folder: str | Path, *, size: tuple[int, int] | None = None) -> Task:
    """Return CamVid in the layout of the SegNet tutorial: eleven classes, void left out of loss and scores.

    The parts are those of its lists. Images are standardized by one mean and one spread a channel, of the training
    part. The loss is cross-entropy with median-frequency class weights of the training part; the error is
    1 − mean intersection over union.

    Args:
        folder: the folder with ``train.txt``, ``val.txt`` and ``test.txt``.
        size: width and height to reduce to; the files' own when left out.

    Raises:
        DataFolderError: the folder or a list does not exist.
        DataFileError: a list or an image does not fit.
        MissingExtraError: Pillow is not installed.
    """
    parts = read_camvid(folder, size=size)
    images, labels = parts["train"]
    standardize = Standardize.of(images)
    weights = median_frequency_weights(labels, len(CLASSES), VOID)
    return Task(
        name="camvid",
        parts={name: TensorPart(x, y, standardize) for name, (x, y) in parts.items()},
        input_shape=tuple(images.shape[1:]),
        outputs=len(CLASSES),
        loss=partial(_weighted_loss, weights=weights),
        measure=confusion_of(len(CLASSES), VOID),
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
