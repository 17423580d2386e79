"""The small CLIP before it is trained: its config for open_clip, a fresh model of it, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmd_bench.evaluators.files import CLIP_CONFIG

IMAGE_SIZE = 64
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        # open_clip's ModifiedResNet: the stem thins 64 px out to 16 x 16, the attention pool reads 2 x 2
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 12, "patch_size": None},
        # nearly all weights are the table of open_clip's own vocabulary, hence the narrow text tower
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}
"""What open_clip reads from `open_clip_config.json`; preprocessing is open_clip's default."""

Tokenizer = Callable[[list[str]], Tensor]


def write_config(folder: Path) -> None:
    """Puts the config where open_clip looks for it in `folder`/clip."""
    path = folder / CLIP_CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def fresh_clip(device: torch.device) -> nn.Module:
    """An untrained model of the config; its weights come from torch's global generator."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    values = CONFIG["model_cfg"]
    model = CLIP(values["embed_dim"], CLIPVisionCfg(**values["vision_cfg"]), CLIPTextCfg(**values["text_cfg"]))
    return cast(nn.Module, model.to(device))


def caption_tokenizer() -> Tokenizer:
    """Captions to tokens (B, 32) int64 by open_clip's bundled byte-pair encoding, zeros behind the last."""
    import open_clip

    return cast(Tokenizer, open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"]))


def normalised(images: Tensor) -> Tensor:
    """uint8 (B, 3, 64, 64) as the image tower reads them: open_clip's default mean and deviation taken out."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean = images.new_tensor(OPENAI_DATASET_MEAN, dtype=torch.float32).view(1, 3, 1, 1)
    deviation = images.new_tensor(OPENAI_DATASET_STD, dtype=torch.float32).view(1, 3, 1, 1)
    return ((images.float() / 255.0 - mean) / deviation).contiguous(memory_format=torch.channels_last)
