"""The U-Net of the ablation "w/o MAE" as a classifier: its way down and its middle are the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lmd_bench.lmd.unet import MaskedUNet
from lmd_bench.nn.classifier import ImageClassifier, fresh_norm
from lmd_bench.nn.drop_path import DropPath, drop_paths


class MaskedUNetClassifier(ImageClassifier):
    """A `MaskedUNet` down to its middle on whole maps, whose mask channel says that nothing is hidden.

    The paper fine-tunes no U-Net: this is as close as it gets to the ViT's classifier. Positions of the smallest map
    are the tokens. Every residual part, convolutions or attention, counts as a block for stochastic depth; for a
    learning rate that falls with depth each resolution is a layer and the middle one more.
    """

    def __init__(self, model: MaskedUNet, to_map: nn.Module, num_classes: int, drop_path: float) -> None:
        """`to_map` turns images in [0, 1] into the maps that the model was trained on."""
        unet = model.unet
        width, device = unet.config["block_out_channels"][-1], model.mask_token.device
        super().__init__(fresh_norm(width, device), width, num_classes, device)
        self.to_map = to_map
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.conv_in, self.down_blocks, self.mid_block = unet.conv_in, unet.down_blocks, unet.mid_block
        self.drop_paths = drop_paths(drop_path, sum(1 for _ in self._residual_parts()))
        self.num_layers = len(self.down_blocks) + 2

    def features(self, images: Tensor) -> Tensor:
        """(B, N, D), N positions of the middle's map."""
        maps = self.to_map(images)
        x = self.conv_in(F.pad(maps, (0, 0, 0, 0, 0, 1)))
        moment = torch.zeros(len(maps), dtype=torch.int64, device=maps.device)  # constant, as in training
        embedding = self.time_embedding(self.time_proj(moment).to(self.conv_in.weight.dtype))
        paths = iter(cast(Iterable[DropPath], self.drop_paths))
        for block in self.down_blocks:
            for part in _parts(block):
                x = _run(part, x, embedding, next(paths))
            for downsampler in cast(Any, block).downsamplers or ():
                x = downsampler(x)
        for part in _middle_parts(self.mid_block):
            x = _run(part, x, embedding, next(paths))
        tokens: Tensor = x.flatten(2).transpose(1, 2)
        return tokens

    def _residual_parts(self) -> Iterator[nn.Module]:
        for block in self.down_blocks:
            yield from _parts(block)
        yield from _middle_parts(self.mid_block)

    def layer_of(self, name: str) -> int:
        part, _, rest = name.partition(".")
        if part in ("conv_in", "time_embedding"):
            return 0
        if part == "down_blocks":
            return int(rest.partition(".")[0]) + 1
        return self.num_layers - 1 if part == "mid_block" else super().layer_of(name)


def _parts(block: Any) -> Iterator[nn.Module]:
    """The residual parts of one resolution of diffusers' UNet2DModel in order."""
    attentions = getattr(block, "attentions", None)
    for number, resnet in enumerate(block.resnets):
        yield resnet
        if attentions is not None:
            yield attentions[number]


def _middle_parts(block: Any) -> Iterator[nn.Module]:
    """The same of the middle, where attention stands between the convolutions."""
    first, *others = block.resnets
    yield first
    for attention, resnet in zip(block.attentions, others, strict=True):
        yield attention
        yield resnet


def _run(part: Any, x: Tensor, embedding: Tensor, drop_path: DropPath) -> Tensor:
    """A residual part on maps (B, C, H, W), its branch dropped for some samples where `drop_path` drops."""
    is_resnet = hasattr(part, "conv_shortcut")
    out: Tensor = part(x, embedding) if is_resnet else part(x)
    if not drop_path.drops:
        return out
    shortcut: Tensor = x if not is_resnet or part.conv_shortcut is None else part.conv_shortcut(x)
    dropped: Tensor = drop_path(shortcut, out - shortcut)
    return dropped
