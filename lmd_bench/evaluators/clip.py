"""The small CLIP of scenes, as CLIP-score opens it."""

from __future__ import annotations

from pathlib import Path

import torch

from lmd_bench.evaluators.files import CLIP_CONFIG, CLIP_FILE, SHIPPED, checked_file
from lmd_bench.metrics.clip_score import ClipModel


def open_scenes_clip(device: torch.device | str, folder: Path = SHIPPED) -> ClipModel:
    """The shipped model on `device`, or that of an own training in `folder`; its figures end in "_scenes".

    open_clip can open the folder `clip` in it too: `open_clip.create_model("local-dir:...")`. Raises WeightsError for
    files that are missing, damaged or of another model.
    """
    config, weights = checked_file(folder, CLIP_CONFIG), checked_file(folder, CLIP_FILE)
    return ClipModel.open(
        config.path, weights.path, device, name="CLIP (scenes)", suffix="_scenes", sha256=weights.sha256
    )
