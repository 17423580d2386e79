"""The ViT of SimMIM (Xie et al. 2021, arXiv 2111.09886), which is BEiT's: no absolute positions, one table of biases
for relative positions that all blocks share, learned gains on the branches; with the names of its checkpoints."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from baselines._relative_position import bias_of, biased_attention, relative_position_index_with_class_token
from lmd_bench.errors import ConfigError
from lmd_bench.method import MethodConfig
from lmd_bench.nn.classifier import ClassTokenClassifier, ImageClassifier, Pool
from lmd_bench.nn.drop_path import DropPath, rising_rates
from lmd_bench.nn.masked_autoencoder import PatchEmbed
from lmd_bench.nn.masking import take_tokens
from lmd_bench.nn.patches import patchify
from lmd_bench.nn.vit import NORM_EPS, Mlp


class ViTOptions(MethodConfig):
    """Sizes of the ViT encoder; the defaults are SimMIM's ViT-B/16."""

    kind: Literal["vit"] = "vit"
    """A ViT, which these options are of."""
    patch_size: int = Field(default=16, ge=1)
    """Side of a patch, px."""
    embed_dim: int = Field(default=768, ge=1)
    """Width of the tokens."""
    depth: int = Field(default=12, ge=1)
    """Blocks."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads; they divide `embed_dim`."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLPs as a multiple of the width."""
    layer_scale: float = 0.1
    """Where the learned gains on the branches start."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Rate at which the last block's branches are dropped for a sample; it rises linearly from 0 at the first."""

    @model_validator(mode="after")
    def _divisible(self) -> ViTOptions:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, got {self.embed_dim}, {self.num_heads}")
        return self

    def sizes_text(self) -> str:
        """The network's sizes in words."""
        return f"vit of width {self.embed_dim}, {self.depth} blocks and {self.num_heads} heads"

    @property
    def width(self) -> int:
        """Width of the tokens that leave the encoder."""
        return self.embed_dim

    @property
    def stride(self) -> int:
        """Side in px of the area that a token stands for."""
        return self.patch_size

    def check(self, image_size: int) -> None:
        """Raise ConfigError unless patches cut images of this side."""
        if image_size % self.patch_size:
            possible = [size for size in range(1, image_size + 1) if image_size % size == 0]
            raise ConfigError(
                f"backbone.patch_size: {self.patch_size} does not cut images of {image_size} x {image_size}; "
                f"possible: {', '.join(map(str, possible))}"
            )

    def build(self, image_size: int) -> ViTEncoder:
        """The encoder for images of this side."""
        return ViTEncoder(self, image_size)


class RelativePositionBias(nn.Module):
    """The shared table, zero at the start; a class token has three entries of its own."""

    relative_position_index: Tensor

    def __init__(self, grid: int, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, num_heads))
        self.register_buffer("relative_position_index", relative_position_index_with_class_token(grid))

    def forward(self) -> Tensor:
        """(heads, 1 + L, 1 + L)."""
        # every block reads it: laid out once
        return bias_of(self.relative_position_bias_table, self.relative_position_index).contiguous()


class Attention(nn.Module):
    """Multi-head self-attention with biases on queries and values; one on keys would cancel in the softmax."""

    zero_bias: Tensor

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("zero_bias", torch.zeros(dim), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D); `bias` (heads, N, N) is added to the scaled products."""
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.zero_bias, self.v_bias]))
        attended = biased_attention(qkv.unsqueeze(1), bias.unsqueeze(0), self.num_heads)
        merged: Tensor = self.proj(attended.squeeze(1))
        return merged


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm, times a learned gain, added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, bias: Tensor, wanted: Tensor | None = None, drop_path: DropPath | None = None
    ) -> Tensor:
        """(B, N, D) to (B, N, D); with `wanted` (B, n) the MLP runs on these tokens alone: (B, n, D).

        `drop_path` adds the branches in place of the block's own.
        """
        add = self.drop_path if drop_path is None else drop_path
        x = add(x, self.attn(self.norm1(x), bias), self.gamma_1)
        if wanted is not None:
            x = take_tokens(x, wanted)
        out: Tensor = add(x, self.mlp(self.norm2(x)), self.gamma_2)
        return out


class ViTEncoder(nn.Module):
    """SimMIM's ViT with a mask token in the place of hidden patches; every token is processed.

    Weights of linear layers, patch embedding, class and mask token start from a normal distribution of deviation 0.02
    cut at one deviation; what ends a branch of block l is divided by sqrt(2 l).
    """

    def __init__(self, options: ViTOptions, image_size: int) -> None:
        super().__init__()
        grid, dim = image_size // options.patch_size, options.embed_dim
        self.num_tokens = grid**2
        self.patch_size = options.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(3, options.patch_size, dim)
        self.rel_pos_bias = RelativePositionBias(grid, options.num_heads)
        self.blocks = nn.ModuleList(
            Block(dim, options.num_heads, options.mlp_ratio, options.layer_scale, rate)
            for rate in rising_rates(options.drop_path, options.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self._initialise()

    def _initialise(self) -> None:
        draw = partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02)
        for token in (self.cls_token, self.mask_token):
            draw(token)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                for end in ("attn.proj.weight", "mlp.fc2.weight"):
                    block.get_parameter(end).div_(math.sqrt(2 * number))

    def forward(self, images: Tensor, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Features of normalised images (B, 3, S, S) of which the patches `hidden` (B, L) bool are not seen.

        (B, L, D) in raster order, without the class token; with `wanted` (B, n), ids of patches, (B, n, D).
        """
        patches = self.patch_embed(patchify(images, self.patch_size))
        patches = torch.where(hidden.unsqueeze(-1), self.mask_token, patches)
        # the class token stands first
        x = run_blocks(self, patches, None if wanted is None else wanted + 1)
        features: Tensor = self.norm(x if wanted is not None else x[:, 1:])
        return features

    def classifier(self, to_map: nn.Module, num_classes: int, pool: Pool, drop_path: float) -> ImageClassifier:
        """The encoder, which it shares, as a classifier; `to_map` normalises images."""
        return ViTClassifier(self, to_map, num_classes, pool, drop_path)

    @staticmethod
    def is_decayed(name: str) -> bool:
        """Whether the authors decay a parameter of this name, if it is neither a bias nor has one dimension."""
        return not name.endswith("cls_token")


class ViTClassifier(ClassTokenClassifier):
    """The authors' form for fine-tuning, but that the blocks go on sharing one table of biases, which is the head's
    layer as in their optimizer.py; there each block starts from a copy of it."""

    def __init__(self, encoder: ViTEncoder, to_map: nn.Module, num_classes: int, pool: Pool, drop_path: float) -> None:
        super().__init__(encoder.norm, encoder.blocks, num_classes, pool, drop_path)
        self.patch_size, self.to_map = encoder.patch_size, to_map
        self.cls_token, self.patch_embed = encoder.cls_token, encoder.patch_embed
        self.rel_pos_bias = encoder.rel_pos_bias

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(patchify(self.to_map(images), self.patch_size))
        return run_blocks(self, patches, drop_paths=self.drop_paths)


def run_blocks(
    trunk: ViTEncoder | ViTClassifier,
    patches: Tensor,
    wanted: Tensor | None = None,
    drop_paths: nn.ModuleList | None = None,
) -> Tensor:
    """Tokens (B, L, D) with the class token in front through all blocks: (B, 1 + L, D), or those `wanted` (B, n).

    `drop_paths` has a `DropPath` for each block, in place of the blocks' own.
    """
    x = torch.cat([trunk.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    bias = trunk.rel_pos_bias()
    paths = [block.drop_path for block in trunk.blocks] if drop_paths is None else drop_paths
    *steps, (last, last_path) = zip(trunk.blocks, paths, strict=True)
    for block, path in steps:
        x = block(x, bias, drop_path=path)
    out: Tensor = last(x, bias, wanted, last_path)
    return out
