"""The source of a row that reads cached latents; the cache is made first where the row asks for one of its own."""

from __future__ import annotations

import torch

from lmd_bench.config import DataConfig, RunConfig
from lmd_bench.data.folders import FolderIndex
from lmd_bench.data.source import BatchSource, open_source
from lmd_bench.harness.timer import clock_for
from lmd_bench.projector.cache import CacheNeed
from lmd_bench.projector.cache_encode import OnProgress, make_cache
from lmd_bench.projector.cache_source import CachedSource
from lmd_bench.projector.open import open_projector


def open_cached(
    need: CacheNeed,
    config: RunConfig,
    index: FolderIndex | None,
    images: BatchSource | None,
    *,
    command: str,
    on_progress: OnProgress,
) -> CachedSource:
    """The cached latents of a cell, made here if they are not there. Slow then: never within timed steps.

    `images` is the source of a row without a cache under the same settings, if there is one already; otherwise only
    the held-out images are made and kept.
    """
    if not need.folder.exists():
        _encode(need, config, index, images, command, on_progress)
    held_out = images if images is not None else _open_images(without_training(config.data), config, index)
    return CachedSource(need.folder, held_out, torch.device(config.device))


def _encode(
    need: CacheNeed,
    config: RunConfig,
    index: FolderIndex | None,
    images: BatchSource | None,
    command: str,
    on_progress: OnProgress,
) -> None:
    device = torch.device(config.device)
    source = images if images is not None else _open_images(config.data, config, index)
    try:
        make_cache(
            need.folder,
            need.contents,
            open_projector(need.projector).to(device),
            source,
            views=need.views,
            device=device,
            clock=clock_for(device),
            command=command,
            on_progress=on_progress,
        )
    finally:
        source.close()


def _open_images(data: DataConfig, config: RunConfig, index: FolderIndex | None) -> BatchSource:
    return open_source(data, config.image_size, config.recipe.augmentation, torch.device(config.device), index=index)


def without_training(data: DataConfig) -> DataConfig:
    """The same held-out images without those of training: scenes are drawn when their source is opened."""
    return data.model_copy(update={"num_train": 1}) if data.name == "scenes" else data
