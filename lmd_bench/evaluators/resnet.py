"""The network of the scenes classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmd_bench.data.scenes import CLASSES

IMAGE_SIZE = 64
WIDTHS = (16, 32, 64, 96)
BLOCKS = (1, 1, 2, 1)
NUM_FEATURES = WIDTHS[-1]
_MEAN, _DEVIATION = 0.45, 0.25  # of scenes' pixels, to one digit and a half; the same for all channels


class ScenesClassifier(nn.Module):
    """A residual network of basic blocks (He et al. 2016) at the size of scenes, 64 px.

    A convolution of stride 2 leads to 32 x 32; every further stage halves the sides. About 0.27 million weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_norm(3, WIDTHS[0], 3, stride=2)
        blocks: list[nn.Module] = []
        width = WIDTHS[0]
        for stage, (out_width, count) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
            for number in range(count):
                blocks.append(_BasicBlock(width, out_width, stride=2 if stage > 0 and number == 0 else 1))
                width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, len(CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] to the last block's mean activations (B, 96), none below zero."""
        x = ((images - _MEAN) / _DEVIATION).contiguous(memory_format=torch.channels_last)
        pooled: Tensor = self.blocks(functional.relu(self.stem(x))).mean(dim=(2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] to logits (B, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions; the short cut averages before it thins out, as in ResNet-D (He et al. 2019)."""

    def __init__(self, width: int, out_width: int, *, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(width, out_width, 3, stride=stride)
        self.second = _conv_norm(out_width, out_width, 3)
        changes = stride > 1 or width != out_width
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Sequential(pool, _conv_norm(width, out_width, 1)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(y + self.shortcut(x))


def _conv_norm(width: int, out_width: int, kernel: int, *, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width, out_width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_width))
