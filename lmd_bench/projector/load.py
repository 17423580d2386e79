"""Models of diffusers, and our own in its folder layout, from safetensors in a local folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmd_bench.errors import ConfigError, WeightsError

Model = TypeVar("Model")


def load_model(
    model_class: type[Model], folder: Path, dtype: torch.dtype = torch.float32, *, what: str = "projector"
) -> Model:
    """Loads a `ModelMixin` as `dtype`, whatever format the file holds; nothing is fetched from anywhere.

    `what` names the model in errors.

    Raises WeightsError for files that are missing, damaged, or of another model than config.json describes.
    """
    loader: Any = model_class
    try:
        with _quiet():
            model, info = loader.from_pretrained(
                folder,
                local_files_only=True,
                low_cpu_mem_usage=False,
                use_safetensors=True,
                torch_dtype=dtype,
                output_loading_info=True,
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ConfigError) as error:
        # OSError and RuntimeError cover what diffusers and torch raise for files that are damaged or of other shapes.
        raise WeightsError(f"{what} {folder}: cannot be loaded ({_reason(error)}); save the model again") from error
    # diffusers only warns where weights are missing, and goes on with random ones.
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise WeightsError(
            f"{what} {folder}: weights and config.json are of different models ({len(wrong)} keys differ, first"
            f" {wrong[0]}); save the model again"
        )
    loaded: Model = model
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps diffusers' remarks inside: what they say of keys is raised here, the rest is about its own defaults."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\(\[([\d, ]*)\]\).*?torch\.Size\(\[([\d, ]*)\]\)")
"""torch's words for a tensor of another shape: its name, the file's shape, the model's."""
_NAMED = 3


def _reason(error: Exception) -> str:
    """The first tensors that do not fit, with both shapes, or else the first line of what was raised."""
    found = _MISMATCH.findall(str(error))
    if not found:
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    named = ", ".join(f"{name} is ({has}), by config.json ({wanted})" for name, has, wanted in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"weights and config.json are of different sizes: {named}{more}"
