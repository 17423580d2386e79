"""Training batches from a latent cache, in the order in which the images themselves would come."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmd_bench.data.augment import epoch_order
from lmd_bench.data.source import BatchSource, Collate
from lmd_bench.errors import ConfigError
from lmd_bench.method import Batch
from lmd_bench.projector.cache import open_cache

_BATCHES_AHEAD = 2


class _Request(NamedTuple):
    view: int
    rows: NDArray[np.int64]


class CachedSource(BatchSource):
    """Batches of latents as `Batch.prepared`, their `images` empty; held-out images come from the images' own source.

    Images follow each other as in any source: epoch e is the permutation drawn from (seed, e). Epoch e reads view
    e mod K, so every view is seen equally often, and the first K epochs of a run whose seed is the cache's view seed
    see just what they would see without a cache. On a GPU a thread reads ahead into pinned memory.
    """

    def __init__(self, folder: Path, images: BatchSource, device: torch.device) -> None:
        """`images` is the source of the held-out images. Raises DataError for a damaged cache."""
        self.meta, latents, labels = open_cache(folder)
        self.num_train = self.meta.shape[1]
        self.num_classes = images.num_classes
        self.place = f"latent cache {folder}"
        self.folder = folder
        self._latents = latents
        self._labels = None if labels is None else torch.from_numpy(labels)
        self._images = images
        self._device = device

    def with_collate(self, collate: Collate) -> CachedSource:
        """Itself: there are no images to collate. Raises ConfigError for a method that would want them."""
        if super().with_collate(collate)._collate is not None:
            raise ConfigError(f"{self.place}: this method makes tensors of its own from every image; leave out cache")
        return self

    def held_out(self, num_images: int) -> Tensor:
        return self._images.held_out(num_images)

    def held_out_captions(self, num_images: int) -> list[str] | None:
        return self._images.held_out_captions(num_images)

    def describe(self) -> dict[str, Any]:
        own = {"num_train": self.num_train, "digest": self.meta.source.get("digest")}
        return {**self._images.describe(), **own, "latent_cache": {"folder": str(self.folder), **self.meta.facts()}}

    def close(self) -> None:
        self._images.close()

    def _batches(self, batch_size: int, seed: int, step: int) -> Generator[Batch, None, None]:
        requests = self._requests(batch_size, seed, step)
        if self._device.type != "cuda":
            for request in requests:
                yield self._on_device(*self._read(request))
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead: deque[Future[tuple[Tensor, Tensor | None]]] = deque()
            while True:
                while len(ahead) < _BATCHES_AHEAD:
                    ahead.append(pool.submit(self._read, next(requests)))
                yield self._on_device(*ahead.popleft().result())

    def _requests(self, batch_size: int, seed: int, step: int) -> Iterator[_Request]:
        per_epoch = self.num_train // batch_size
        known_epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            epoch, number = divmod(step - 1, per_epoch)
            if epoch != known_epoch:
                known_epoch, order = epoch, epoch_order(seed, epoch, self.num_train).numpy()
            yield _Request(epoch % self.meta.views, order[number * batch_size : (number + 1) * batch_size])
            step += 1

    def _read(self, request: _Request) -> tuple[Tensor, Tensor | None]:
        """Latents and labels of a request in host memory, pinned for a GPU."""
        pinned = self._device.type == "cuda"
        dtype = torch.float16 if self.meta.dtype == "float16" else torch.float32
        latents = torch.empty((len(request.rows), *self.meta.shape[2:]), dtype=dtype, pin_memory=pinned)
        np.take(self._latents[request.view], request.rows, axis=0, out=latents.numpy(), mode="clip")
        if self._labels is None:
            return latents, None
        labels = self._labels[torch.from_numpy(request.rows)]
        return latents, labels.pin_memory() if pinned else labels

    def _on_device(self, latents: Tensor, labels: Tensor | None) -> Batch:
        # torch keeps a pinned block that is being copied from being used again, so none has to be waited for
        prepared = latents.to(self._device, non_blocking=True).float()
        moved = None if labels is None else labels.to(self._device, non_blocking=True)
        return Batch(torch.empty(0, device=self._device), moved, prepared=prepared)
