"""Images that a trained method makes from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.harness.seeding import reseed
from lmd_bench.lmd.method import LMD
from lmd_bench.method import Method
from lmd_bench.reconstruct.checkpoint import Checkpoint
from lmd_bench.reconstruct.output import all_or_nothing, save_png, side_by_side, stacked

SAMPLES = "samples"
GRID_FILE = "samples.png"
_MOST_COLUMNS = 8


@dataclass(frozen=True)
class SampleRequest:
    """What is asked for."""

    num_images: int = 16
    levels: int | None = None
    """Predictions on the way; 0 stands for every level of the method's schedule, None for the method's own default."""
    seed: int = 0


def sample_images(checkpoint: Checkpoint, request: SampleRequest, out: Path) -> list[Path]:
    """Write `sample-<i>.png` for each image, and all of them in one grid; the files' paths, the grid last.

    Image i depends on (seed, i) alone: each is made by itself, after torch's generators were seeded for it. Files
    appear in `out` all together at the end. Raises ConfigError, before anything is made, for a method that does not
    generate images or levels that it does not have.
    """
    _require_generation(checkpoint.method, request)
    names = [f"sample-{number}.png" for number in range(request.num_images)]
    with all_or_nothing(out) as folder, _levels_set(checkpoint.method, request.levels):
        images = [_one(checkpoint, request.seed, number) for number in range(request.num_images)]
        for name, image in zip(names, images, strict=True):
            save_png(image[0], folder / name)
        save_png(_grid(images), folder / GRID_FILE)
    return [out / name for name in (*names, GRID_FILE)]


def note_on_samples(method: Method) -> str | None:
    """What one should know before looking at a method's samples, in a sentence; None where there is nothing to say."""
    if isinstance(method, LMD):
        return (
            "note: LMD predicts the mean of what could stand in a place, so samples are smooth and differ by the order "
            "of unveiling alone"
        )
    return None


def _require_generation(method: Method, request: SampleRequest) -> None:
    name = type(method).__name__
    if type(method).sample is Method.sample:
        raise ConfigError(f"--checkpoint: {name} does not generate images; give a cell of a method that does")
    if request.num_images < 1:
        raise ConfigError(f"--images {request.num_images}: 1 or more")
    if request.levels is not None and request.levels < 0:
        raise ConfigError(f"--levels {request.levels}: levels are 1 or more, or all")
    if request.levels is not None and not _has_levels(method):
        raise ConfigError(f"--levels: {name} samples in one way only; leave it out")


def _has_levels(method: Method) -> bool:
    return "sample_levels" in type(method).Config.model_fields


@contextmanager
def _levels_set(method: Method, levels: int | None) -> Iterator[None]:
    """The method's `sample_levels` inside the block, the run's own again afterwards."""
    own: Any = method.config
    if levels is not None:
        setattr(method, "config", own.model_copy(update={"sample_levels": levels or None}))  # noqa: B010
    try:
        yield
    finally:
        setattr(method, "config", own)  # noqa: B010


@torch.no_grad()
def _one(checkpoint: Checkpoint, seed: int, number: int) -> Tensor:
    """(1, 3, S, S) on the CPU."""
    method, size = checkpoint.method, checkpoint.image_size
    reseed(next(method.parameters()).device, seed, "sample", number)
    image = method.sample(1)
    if image.shape != (1, 3, size, size) or not bool(torch.isfinite(image).all()):
        raise TrainingError(f"sample {number} is misshapen or not finite")
    return image.float().clamp(0.0, 1.0).cpu()


def _grid(images: list[Tensor]) -> Tensor:
    """(3, H, W): rows of at most eight, white where the last one ends early."""
    columns = min(_MOST_COLUMNS, len(images))
    blank = torch.ones_like(images[0])
    padded = [*images, *[blank] * (-len(images) % columns)]
    return stacked([side_by_side(padded[start : start + columns]) for start in range(0, len(padded), columns)])
