"""Small residual networks for small images."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["BasicBlock", "SmallResNet"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalization around a shortcut, which is projected where shapes differ.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: stride of the first convolution and of the projection.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels_in, h, w) to (n, channels_out, h/stride, w/stride)."""
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return cast(Tensor, self.relu(residual + self.shortcut(x)))


class SmallResNet(nn.Module):
    """A residual network of depth 6n + 2 for small images: three stages of n basic blocks, widths w, 2w and 4w.

    Args:
        channels: channels of the images.
        outputs: number of classes.
        depth: 8, 14, 20, …
        width: channels of the first stage.

    Raises:
        ValueError: the depth is not 6n + 2.

    References:
        He, Zhang, Ren, Sun, *Deep residual learning for image recognition*, arXiv:1512.03385, section 4.2; with
        projections in place of padded shortcuts.

    Example:
        >>> import torch
        >>> SmallResNet(1, 10, depth=8, width=4)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, outputs: int, *, depth: int = 8, width: int = 16) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: found {depth}; expected 6n + 2: 8, 14, 20, … . Choose such a depth.")
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        features = width
        for stage in range(3):
            for index in range((depth - 2) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(features, width * 2**stage, stride))
                features = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to scores (n, outputs)."""
        return cast(Tensor, self.head(self.blocks(self.stem(x))))
