"""A tiny model of every installed method that has an official layout, and what its checkpoint cannot say itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmd_bench.method import DataSpec, Method
from lmd_bench.registry import load_method

PROJECTOR = "shipped:scenes-vq-f8"
_ON_LATENTS = {"projector": {"kind": "vq", "path": PROJECTOR}}
_VIT = {
    "encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 48, "decoder_depth": 1,
    "decoder_heads": 3,
}  # fmt: skip
_VIT_HEADS = ("encoder_heads=2", "decoder_heads=3")
_PYRAMID = {
    "patch_size": 8, "stage_widths": [16, 24, 32, 48], "stage_depths": [1, 1, 2, 1], "stage_heads": [1, 2, 2, 3],
    "stage_mlp_ratios": [2.0, 2.0, 2.0, 2.0], "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
_PYRAMID_HEADS = ("stage_heads=[1, 2, 2, 3]", "decoder_heads=2")
_UNET = {
    "block_out_channels": [16, 32], "attention_levels": [1], "layers_per_block": 1, "norm_num_groups": 8,
    "num_inference_steps": 2,
}  # fmt: skip
_GROUPS = "norm_num_groups=8"
_PLAIN = "normalize_targets=false"


@dataclass(frozen=True)
class Case:
    """One tiny model."""

    method: str
    options: dict[str, Any]
    image_size: int
    settings: tuple[str, ...] = ()
    """What `--set` has to say of its checkpoint."""
    projector: str | None = None

    def build(self) -> Method:
        """The model with random weights."""
        method_class = load_method(self.method, {})
        torch.manual_seed(0)
        return method_class(method_class.Config.model_validate(self.options), DataSpec(self.image_size)).eval()


CASES = {
    "lmd": Case("lmd", {**_ON_LATENTS, "patch_size": 2, **_VIT}, 32, (*_VIT_HEADS, _PLAIN), PROJECTOR),
    "mae": Case("mae", {"patch_size": 8, **_VIT}, 32, (*_VIT_HEADS, _PLAIN)),
    "simmim": Case(
        "simmim",
        {"backbone": {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 1, 1], "num_heads": [1, 2, 4]}
         | {"kind": "swin"}, "mask_unit_px": 8},
        64,
        ("mask_unit_px=8",),
    ),
    "simmim-vit": Case(
        "simmim",
        {"backbone": {"kind": "vit", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, "mask_unit_px": 8},
        32,
        ("mask_unit_px=8",),
    ),
    "greenmim": Case(
        "greenmim",
        {"patch_size": 2, "embed_dim": 16, "depths": [2, 1, 1], "num_heads": [1, 2, 4], "window_size": 4,
         "decoder_width": 32, "decoder_heads": 2},
        64,
        ("decoder_heads=2", _PLAIN),
    ),
    "um-mae": Case("um-mae", {"patch_size": 8, **_VIT}, 64, (*_VIT_HEADS, _PLAIN)),
    "um-mae-swin": Case("um-mae", {"backbone": "swin", **_PYRAMID}, 64, (*_PYRAMID_HEADS, _PLAIN)),
    "um-mae-pvt": Case("um-mae", {"backbone": "pvt", **_PYRAMID}, 64, (*_PYRAMID_HEADS, _PLAIN)),
    "ddpm": Case("ddpm", _UNET, 16, (_GROUPS, "image_size=16")),
    "ddim": Case("ddim", _UNET, 16, (_GROUPS, "image_size=16")),
    "iddpm": Case("iddpm", {**_UNET, "num_heads": 4}, 16, (_GROUPS, "image_size=16", "num_heads=4")),
    "ldm": Case(
        "ldm",
        {**_ON_LATENTS, **_UNET, "attention_head_dim": 8},
        64,
        (_GROUPS, "image_size=64", "attention_head_dim=8"),
        PROJECTOR,
    ),
}  # fmt: skip


def randomized(tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """The same names and shapes with values that are nowhere twice; constants stay: whole numbers, and Swin's masks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        if value.is_floating_point() and not name.endswith("attn_mask")
        else value
        for name, value in tensors.items()
    }
