"""Batches from a folder of images, decoded and augmented by worker processes ahead of the step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.augment import (
    augmentation_keys,
    epoch_order,
    flip_where,
    random_crop_boxes,
    random_flips,
)
from lmd_bench.data.decode import ImageFileError, center_square
from lmd_bench.data.folders import FolderIndex, describe_faults, too_many_faults
from lmd_bench.data.source import (
    BatchItem,
    BatchSource,
    Collate,
    collate_generator,
    to_batch,
    too_few_held_out,
)
from lmd_bench.errors import DataError
from lmd_bench.method import Batch

_MAX_WORKERS = 16
_PREFETCH_PER_WORKER = 4
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class FolderSource(BatchSource):
    """Images of a scanned folder.

    A file that was not looked at during the scan and cannot be used gives way to the next one in the index; such files
    are counted, and more than 1 % of the training images (and more than one) raise DataError.
    """

    def __init__(
        self,
        index: FolderIndex,
        data: DataConfig,
        image_size: int,
        augmentation: AugmentationConfig,
        device: torch.device,
        collate: Collate | None = None,
    ) -> None:
        self.num_train = index.num_train
        self.num_classes = index.num_classes
        self.place = f"--data {index.root}"
        self.num_workers = default_num_workers() if data.num_workers is None else data.num_workers
        self.unreadable: dict[str, str] = {}
        """Files that could not be used during training, with the reason; grows while batches are read."""
        self._index = index
        self._image_size = image_size
        self._augmentation = augmentation
        self._device = device
        self._collate = collate
        self._open: list[Generator[Batch, None, None]] = []
        self._held_out: Tensor | None = None

    def held_out(self, num_images: int) -> Tensor:
        paths = self._index.held_out
        if num_images > len(paths):
            raise DataError(too_few_held_out(self.place, num_images, len(paths)))
        if self._held_out is None or len(self._held_out) < num_images:
            resample = Image.Resampling.BICUBIC  # the yardstick is one, whatever a row's recipe says
            squares = [
                center_square(self._index.files.load(path), self._image_size, resample) for path in paths[:num_images]
            ]
            self._held_out = _stack(squares).to(self._device)
        return self._held_out[:num_images]

    def describe(self) -> dict[str, Any]:
        index = self._index
        return {
            "name": "folder",
            "layout": index.layout,
            "storage": index.files.storage,
            "num_train": index.num_train,
            "num_held_out": len(index.held_out),
            "num_classes": index.num_classes,
            "image_size": self._image_size,
            "digest": index.digest,
            "num_checked": index.num_checked,
            "num_skipped": len(index.skipped),
            "skipped": [f"{path}: {reason}" for path, reason in index.skipped[:20]],
            "num_unreadable_in_training": len(self.unreadable),
            "unreadable_in_training": [f"{path}: {reason}" for path, reason in sorted(self.unreadable.items())][:20],
            "num_workers": self.num_workers,
        }

    def close(self) -> None:
        for batches in self._open:
            batches.close()
        self._open.clear()

    def _batches(self, batch_size: int, seed: int, step: int) -> Generator[Batch, None, None]:
        batches = self._read(batch_size, seed, step)
        self._open.append(batches)
        return batches

    def _read(self, batch_size: int, seed: int, step: int) -> Generator[Batch, None, None]:
        with warnings.catch_warnings():
            # torch advises against more workers than cores; data.num_workers is the user's own decision
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            iterator: Iterator[_Loaded] | None = iter(self._loader(batch_size, seed, step))
        try:
            while True:
                assert iterator is not None
                loaded = next(iterator)
                self._count(dict(loaded.faults))
                yield to_batch(loaded.item, self._device)
        finally:
            iterator = None  # the loader's iterator stops its workers when it goes

    def _loader(self, batch_size: int, seed: int, step: int) -> DataLoader[Any]:
        """Each request is a whole batch, so that a worker's items need no further collation."""
        workers = self.num_workers
        return DataLoader(
            _FolderBatches(self._index, self._image_size, self._augmentation, seed, self._collate),  # type: ignore[arg-type]
            sampler=_requests(self.num_train, batch_size, seed, step),
            batch_size=None,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=_PREFETCH_PER_WORKER if workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_parent,
            multiprocessing_context=_start_method() if workers else None,
            generator=torch.Generator(),  # the loader would draw its workers' seeds from the global one
        )

    def _count(self, faults: dict[str, str]) -> None:
        self.unreadable.update(faults)
        if faults and too_many_faults(len(self.unreadable), self.num_train):
            raise DataError(
                f"{self.place}: {len(self.unreadable)} of {self.num_train} training images cannot be used "
                f"(more than 1 %): {describe_faults(self.unreadable)}; repair or remove them"
            )


def default_num_workers() -> int:
    """One per available core but one, at least one and at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_WORKERS, cores - 1))


def _start_method() -> str | None:
    """fork where it is safe: workers start at once and need not receive the method; None is Python's default."""
    return "fork" if sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods() else None


def _leave_interrupts_to_parent(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent ends its workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(loaded: _Loaded) -> _Loaded:
    return loaded


class _Request(NamedTuple):
    """One batch to be made."""

    step: int
    epoch: int
    positions: tuple[int, ...]


class _Loaded(NamedTuple):
    """One batch made, and the files that failed on the way."""

    item: BatchItem
    faults: tuple[tuple[str, str], ...]


def _requests(num_images: int, batch_size: int, seed: int, step: int) -> Iterator[_Request]:
    """Requests for steps `step`, `step` + 1, ... without end."""
    per_epoch = num_images // batch_size
    known_epoch, order = -1, torch.empty(0)
    while True:
        epoch, number = divmod(step - 1, per_epoch)
        if epoch != known_epoch:
            known_epoch, order = epoch, epoch_order(seed, epoch, num_images)
        positions = order[number * batch_size : (number + 1) * batch_size].tolist()
        yield _Request(step, epoch, tuple(positions))
        step += 1


class _FolderBatches:
    """Worker side: makes the batch that a request asks for."""

    def __init__(
        self,
        index: FolderIndex,
        image_size: int,
        augmentation: AugmentationConfig,
        seed: int,
        collate: Collate | None,
    ) -> None:
        self._files = index.files
        # Arrays, since reading Python objects writes their reference counts and so copies forked memory page by page.
        self._paths = np.array([os.fsencode(path) for path in index.train])
        self._labels = None if index.train_labels is None else np.array(index.train_labels, dtype=np.int64)
        self._size = image_size
        self._augmentation = augmentation
        self._seed = seed
        self._collate = collate
        # One more failure in a row than a run may have.
        self._tries = int(max(1.0, 0.01 * index.num_train)) + 1

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, request: _Request) -> _Loaded:
        faults: dict[str, str] = {}
        keys = augmentation_keys(self._seed, request.epoch, torch.tensor(request.positions))
        squares, used = [], []
        for position, key in zip(request.positions, keys.unbind(), strict=True):
            found = self._load(position, faults)
            if found is None:  # the parent raises on the faults; an exception here would reach it as a traceback
                return _Loaded(BatchItem(torch.empty(0), None, {}), tuple(faults.items()))
            image, substitute = found
            squares.append(self._square(image, key[None]))
            used.append(substitute)
        images = _stack(squares)
        if self._augmentation.flip:
            images = flip_where(images, random_flips(keys))
        labels = None if self._labels is None else torch.from_numpy(self._labels[used])
        extra = {}
        if self._collate is not None:
            numbers = [None] * len(used) if labels is None else labels.tolist()
            samples = list(zip(images, numbers, strict=True))
            extra = dict(self._collate(samples, collate_generator(self._seed, request.step)))
        return _Loaded(BatchItem(images, labels, extra), tuple(faults.items()))

    def _load(self, position: int, faults: dict[str, str]) -> tuple[Image.Image, int] | None:
        """The image at a position, or the next usable one, with its position; None after too many failures."""
        for candidate in range(position, position + min(self._tries, len(self))):
            substitute = candidate % len(self)
            name = os.fsdecode(bytes(self._paths[substitute]))
            try:
                return self._files.load(name), substitute
            except ImageFileError as fault:
                faults[name] = fault.reason
        return None

    def _square(self, image: Image.Image, key: Tensor) -> Image.Image:
        """One image cropped and resized; not yet flipped."""
        rules = self._augmentation
        resample = _RESAMPLING[rules.interpolation]
        if rules.crop != "random_resized":
            return center_square(image, self._size, resample)
        boxes = random_crop_boxes(key, image.height, image.width, rules.scale, rules.ratio)
        top, left, height, width = boxes[0].tolist()
        # Cut out first, as torchvision does: Pillow's own `box` would let pixels outside the box in at its edges.
        return image.crop((left, top, left + width, top + height)).resize((self._size, self._size), resample)


def _stack(images: list[Image.Image]) -> Tensor:
    """RGB images of one size as uint8 (B, 3, S, S)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
