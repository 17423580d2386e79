"""The encoders of UM-MAE's pyramids on whole images, for fine-tuning."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from baselines._um_mae_grid import constant, quadtree_order
from baselines._um_mae_pyramid import PooledMaps, PyramidAutoencoder, WindowedMaps, token_patches
from baselines._um_mae_shape import PATCHES_PER_TOKEN_SIDE
from lmd_bench.nn.classifier import ImageClassifier, fresh_norm, trained_positions
from lmd_bench.nn.drop_path import drop_paths

_DENSE_REDUCTIONS = (8, 4, 2, 1)
"""Patches per side of what PVT's attention pools on the whole map, twice as many as on the compact one but in the last
stage."""


class PyramidClassifier(ImageClassifier):
    """The encoder of a `PyramidAutoencoder` on whole images.

    As in the authors' fine-tuning, PVT pools 8, 4, 2, 1 patches a side and Swin's windows are of 16 patches: with maps
    twice as wide as in pre-training, attention sees as much of the image. Swin's biases come from the same MLPs. The
    last stage's patches are averaged, then normed anew. A merging is part of the block behind it, and of its layer.
    """

    token_order: Tensor
    """(L,) int64, raster index of every token in quadtree order."""
    patch_order: Tensor
    """The same of every patch."""

    def __init__(self, model: PyramidAutoencoder, to_map: nn.Module, num_classes: int, drop_path: float = 0.0) -> None:
        """`to_map` normalises images in [0, 1] as the model was trained on them."""
        shape, device = model.shape, model.mask_token.device
        width = shape.stage_widths[-1]
        super().__init__(fresh_norm(width, device), width, num_classes, device)
        self.drop_paths = drop_paths(drop_path, len(model.blocks))
        self.num_layers = len(model.blocks) + 1
        self.shape, self.to_map = shape, to_map
        self.patch_embed, self.blocks = model.patch_embed, model.blocks
        if shape.backbone == "pvt":
            self.pos_embed = trained_positions(model.pos_embed)
        with device:  # where `constant` puts tables
            order = quadtree_order(shape.grid_size * PATCHES_PER_TOKEN_SIDE)
            self.register_buffer("patch_order", constant(order), persistent=False)
            self.register_buffer("token_order", constant(quadtree_order(shape.grid_size)), persistent=False)
            is_swin = shape.backbone == "swin"
            self.route = WindowedMaps(shape, dense=True) if is_swin else PooledMaps(shape, _DENSE_REDUCTIONS)

    def features(self, images: Tensor) -> Tensor:
        """(B, N, D), the last stage's patches in quadtree order."""
        grid = self.shape.grid_size
        rows, columns = (self.token_order // grid).unsqueeze(0), (self.token_order % grid).unsqueeze(0)
        pixels = self.to_map(images)
        here = torch.zeros(len(pixels), 1, dtype=torch.int64, device=pixels.device)
        patches = token_patches(pixels, rows + here, columns + here, self.shape.token_px)
        x = self.patch_embed.norm(self.patch_embed(patches)).flatten(1, 2)
        if self.shape.backbone == "pvt":
            x = x + self.pos_embed[:, self.patch_order]
        side = grid * PATCHES_PER_TOKEN_SIDE
        rows, columns = (self.patch_order // side).unsqueeze(0), (self.patch_order % side).unsqueeze(0)
        paths = zip(self.blocks, self.drop_paths, strict=True)
        blocks = [partial(block, drop_path=drop_path) for block, drop_path in paths]
        out: Tensor = self.route(blocks, x, rows, columns)
        return out
