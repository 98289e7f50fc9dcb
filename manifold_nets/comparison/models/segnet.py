"""SegNet-Basic: an encoder, and a decoder that unpools with the encoder's indices."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, max_unpool2d

__all__ = ["SegNetBasic"]


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
