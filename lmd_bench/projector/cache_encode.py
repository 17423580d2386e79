"""Encoding training images once, ahead of training: K augmented views of each into a memory-mapped array."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmd_bench.data.augment import epoch_order
from lmd_bench.data.source import BatchSource
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.method import Batch
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.cache import (
    FORMAT,
    LABELS_FILE,
    LATENTS_FILE,
    META_FILE,
    CacheContents,
    CacheMeta,
    DType,
    require_disk,
)

if TYPE_CHECKING:
    from lmd_bench.harness.timer import Clock

OnProgress = Callable[[int, int, float], None]
"""Takes images done, images in all (views counted), and images per second."""
BATCH_SIZE = 64
_REPORTS = 20


def make_cache(
    folder: Path,
    contents: CacheContents,
    projector: LatentProjector,
    source: BatchSource,
    *,
    views: int,
    view_seed: int = 0,
    dtype: DType = "float32",
    batch_size: int = BATCH_SIZE,
    device: torch.device,
    clock: Clock,
    command: str,
    on_progress: OnProgress | None = None,
) -> CacheMeta:
    """Encode `views` views of every training image of `source` into a new `folder`, which appears complete or not.

    View v of an image is what a run with seed `view_seed` sees of it in epoch v. `projector` is on `device`;
    `contents` describes both it and the source. Raises ConfigError for views below 1, a folder that is taken or too
    little disk, all before anything is encoded; DataError for latents that are not finite as `dtype`.
    """
    if views < 1:
        raise ConfigError(f"--views {views}: at least one view of every image is needed")
    require_free_name(folder)
    size = contents.image_size // projector.factor
    shape = (views, source.num_train, projector.latent_channels, size, size)
    num_bytes = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
    require_disk(folder, num_bytes)
    clock.drain()
    begin = clock.host_s()
    with _partial(folder) as partial:
        latents = _reserve(partial / LATENTS_FILE, shape, dtype)
        labels: NDArray[np.int64] | None = None
        done, total, reported = 0, views * source.num_train, 0
        for view, rows, batch in _views(source, min(batch_size, source.num_train), views, view_seed):
            _store(latents, view, rows, projector.encode(batch.images), folder)
            if batch.labels is not None:
                labels = np.full(source.num_train, -1, dtype=np.int64) if labels is None else labels
                labels[rows] = batch.labels.cpu().numpy()
            done += len(rows)
            if on_progress is not None and done * _REPORTS // total > reported:
                reported = done * _REPORTS // total
                on_progress(done, total, done / max(1e-9, clock.host_s() - begin))
        latents.flush()
        if labels is not None:
            np.save(partial / LABELS_FILE, labels)
        meta = CacheMeta(
            format=FORMAT,
            contents=contents,
            views=views,
            view_seed=view_seed,
            dtype=dtype,
            shape=shape,
            has_labels=labels is not None,
            seconds=clock.host_s() - begin,
            num_bytes=num_bytes,
            device=str(device),
            command=command,
            source=source.describe(),
        )
        (partial / META_FILE).write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return meta


def require_free_name(folder: Path) -> None:
    """Raise ConfigError where something lies at `folder` already, but for an empty folder, or it is no name."""
    if folder.name in ("", ".."):
        raise ConfigError(
            f"latent cache {folder}: a folder is made and takes this name; give one that is not there yet"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"latent cache {folder}: there is something already; choose another folder or delete it")


def _views(
    source: BatchSource, batch_size: int, views: int, seed: int
) -> Iterator[tuple[int, NDArray[np.int64], Batch]]:
    """(view, positions of its images, batch) until every view of every image has been given.

    The source's own epochs are the views: epoch v gives each image once, in the order of `epoch_order`, but for the
    last incomplete batch, whose images are asked for one by one.
    """
    number = source.num_train
    whole = number // batch_size
    with closing(source.batches(batch_size, seed)) as batches:
        for view in range(views):
            order = epoch_order(seed, view, number).numpy()
            for count in range(whole):
                yield view, order[count * batch_size : (count + 1) * batch_size], next(batches)
    if number % batch_size:
        for view in range(views):
            order = epoch_order(seed, view, number).numpy()
            with closing(source.batches(1, seed, view * number + whole * batch_size + 1)) as singles:
                yield view, order[whole * batch_size :], _joined([next(singles) for _ in range(number % batch_size)])


def _joined(batches: list[Batch]) -> Batch:
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Batch(torch.cat([batch.images for batch in batches]), torch.cat(labels) if labels else None)


def _store(latents: NDArray[Any], view: int, rows: NDArray[np.int64], encoded: Tensor, folder: Path) -> None:
    stored = encoded.cpu().to(torch.float16 if latents.dtype == np.float16 else torch.float32)
    if not bool(torch.isfinite(stored).all()):
        raise DataError(f"latent cache {folder}: a latent is not finite as {latents.dtype}; use float32 and fp32")
    latents[view, rows] = stored.numpy()


def _reserve(path: Path, shape: tuple[int, ...], dtype: str) -> np.memmap[Any, Any]:
    """A new .npy file mapped for writing, its place on the disk taken: a full disk would kill a process that maps."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends well, and goes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
