"""A CLIP of open_clip small enough for tests: its configuration and random weights on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_tiny_clip(folder: Path) -> tuple[Path, Path]:
    """`tiny.json` and its `tiny.safetensors` in `folder`."""
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.CLIP(**CONFIG)
    config, weights = folder / "tiny.json", folder / "tiny.safetensors"
    config.write_text(json.dumps(CONFIG))
    save_file(network.state_dict(), weights)
    return config, weights
