"""Tiny text-to-image pipelines with random weights, saved to folders as the published ones lie in theirs."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AmusedScheduler, AutoencoderKL, PNDMScheduler, UNet2DConditionModel, UVit2DModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging

TEXT_LENGTH = 12
"""Tokens of a caption."""
_TEXT_WIDTH = 16
_FACTOR = 4
"""Pixels to a latent position."""
_CODES = 24
MASK_TOKEN = 30


def save_stable_diffusion(folder: Path, seed: int = 0, scheduler: Any = None, **unet: Any) -> Path:
    """A latent U-Net that paints 32 px; `unet` overrides its values, `scheduler` is PNDM, v1.4's, by default."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": _TEXT_WIDTH,
    }  # fmt: skip
    UNet2DConditionModel(**{**sizes, **unet}).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(folder / "vae")  # fmt: skip
    chosen = scheduler or PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    chosen.save_pretrained(folder / "scheduler")
    _save_text(folder, CLIPTextModel)
    _save_index(folder, "StableDiffusionPipeline", type(chosen).__name__, ("unet", "vae"))
    return folder


def save_amused(folder: Path, seed: int = 0) -> Path:
    """A masked transformer over VQ tokens that paints 32 px."""
    torch.manual_seed(seed)
    transformer = UVit2DModel(
        hidden_size=16, cond_embed_dim=_TEXT_WIDTH, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
        encoder_hidden_size=_TEXT_WIDTH, vocab_size=32, codebook_size=_CODES, in_channels=16, block_out_channels=16,
        num_res_blocks=1, block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        sample_size=8,
    )  # fmt: skip
    with torch.no_grad():  # random logits of a published network's spread: else every token is as likely as any
        transformer.mlm_layer.conv2.weight.mul_(10)
    transformer.save_pretrained(folder / "transformer")
    VQModel(
        block_out_channels=(8, 8, 8), latent_channels=4, norm_num_groups=4, num_vq_embeddings=_CODES, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        lookup_from_codebook=True, mid_block_add_attention=False,
    ).save_pretrained(folder / "vqvae")  # fmt: skip
    AmusedScheduler(mask_token_id=MASK_TOKEN).save_pretrained(folder / "scheduler")
    _save_text(folder, CLIPTextModelWithProjection)
    _save_index(folder, "AmusedPipeline", "AmusedScheduler", ("transformer", "vqvae"))
    return folder


def _save_text(folder: Path, model_class: Any) -> None:
    tokens = _save_tokenizer(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=_TEXT_WIDTH, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, projection_dim=_TEXT_WIDTH,
        bos_token_id=tokens["<|startoftext|>"], eos_token_id=tokens["<|endoftext|>"],
        pad_token_id=tokens["<|endoftext|>"],
    )  # fmt: skip
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model_class(config).save_pretrained(folder / "text_encoder")
    finally:
        if bars:
            logging.enable_progress_bar()


def _save_tokenizer(folder: Path) -> dict[str, int]:
    """CLIP's two files for single letters and three merges. Returns the vocabulary."""
    folder.mkdir(parents=True)
    letters = string.ascii_lowercase
    merges = ["r e", "re d</w>", "b l"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary


def _save_index(folder: Path, class_name: str, scheduler: str, models: tuple[str, ...]) -> None:
    classes = {name: json.loads((folder / name / "config.json").read_text())["_class_name"] for name in models}
    text_encoder = json.loads((folder / "text_encoder" / "config.json").read_text())["architectures"][0]
    index: dict[str, Any] = {name: ["diffusers", found] for name, found in {**classes, "scheduler": scheduler}.items()}
    index |= {"text_encoder": ["transformers", text_encoder], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(index))
