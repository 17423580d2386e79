"""Batches from a folder of images, decoded and augmented by worker processes ahead of the step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
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
from lmd_bench.data.folders import FolderIndex, describe_faults, no_labels, too_many_faults
from lmd_bench.data.image_files import ImageFiles
from lmd_bench.data.labelled import LabelledImages
from lmd_bench.data.rand_augment import RandAugment
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
        self.why_no_classes = index.files.why_no_classes()
        self.num_workers = default_num_workers() if data.num_workers is None else data.num_workers
        self.unreadable: dict[str, str] = {}
        """Files that could not be used during training, with the reason; grows while batches are read."""
        self._index = index
        self._image_size = image_size
        self._augmentation = augmentation
        self._device = device
        self._collate = collate
        self._data = data
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

    def held_out_captions(self, num_images: int) -> list[str] | None:
        if num_images > len(self._index.held_out):
            raise DataError(too_few_held_out(self.place, num_images, len(self._index.held_out)))
        captions = self._index.held_out_captions
        return None if captions is None else list(captions[:num_images])

    def labelled(self, augmentation: AugmentationConfig, num_train: int | None) -> FolderSource:
        if self._index.train_labels is None:
            raise DataError(no_labels(self.place, self.why_no_classes))
        index = self._index if num_train is None else self._index.with_train(num_train, self._data.seed)
        return FolderSource(index, self._data, self._image_size, augmentation, self._device)

    def labelled_sample(self, num_images: int) -> LabelledFiles:
        return self._labelled_files(*self._index.labelled_sample(num_images, self._data.seed), 1.0)

    def validation(self, num_images: int | None, crop: float = 1.0) -> LabelledFiles:
        return self._labelled_files(*self._index.labelled_validation(num_images, self._data.seed), crop)

    def _labelled_files(self, names: Sequence[str], labels: Sequence[int], crop: float) -> LabelledFiles:
        return LabelledFiles(
            self._index.files, names, labels, self._image_size, crop, self._device, self.num_workers, self.place
        )

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
            "num_shards_passed_over": len(index.passed_over),
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


_KEPT_BYTES = 256 * 2**20
"""Labelled images of at most so many bytes are decoded once and kept."""


class LabelledFiles(LabelledImages):
    """Labelled images of a folder, decoded by workers, batch by batch, at every pass; few of them stay in memory.

    Files that cannot be used are left out, at every pass alike; more than 1 % of them (and more than one) raise
    DataError.
    """

    def __init__(
        self,
        files: ImageFiles,
        names: Sequence[str],
        labels: Sequence[int],
        image_size: int,
        crop: float,
        device: torch.device,
        num_workers: int,
        place: str,
    ) -> None:
        """crop: side of the central part that is seen, as a share of the central square."""
        self.num_images = len(names)
        self._squares = _LabelledSquares(files, names, labels, image_size, crop)
        self._device = device
        self._num_workers = num_workers
        self._place = place
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._fits = len(names) * 3 * image_size**2 <= _KEPT_BYTES

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        if batch_size in self._kept:
            yield from self._kept[batch_size]
            return
        faults: dict[str, str] = {}
        kept: list[tuple[Tensor, Tensor]] = []
        for loaded in self._loader(batch_size):
            faults.update(loaded.faults)
            if too_many_faults(len(faults), self.num_images):
                raise DataError(
                    f"{self._place}: {len(faults)} of {self.num_images} labelled images cannot be used "
                    f"(more than 1 %): {describe_faults(faults)}; repair or remove them"
                )
            if len(loaded.item.images):
                assert loaded.item.labels is not None  # held by _LabelledSquares
                images = loaded.item.images.to(self._device, non_blocking=True)
                batch = images, loaded.item.labels.to(self._device, non_blocking=True)
                if self._fits:
                    kept.append(batch)
                yield batch
        if self._fits:
            self._kept = {batch_size: kept}

    def _loader(self, batch_size: int) -> DataLoader[Any]:
        workers = self._num_workers
        starts = range(0, self.num_images, batch_size)
        return DataLoader(
            self._squares,  # type: ignore[arg-type]
            sampler=[slice(start, start + batch_size) for start in starts],
            batch_size=None,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=min(workers, len(starts)),
            prefetch_factor=_PREFETCH_PER_WORKER if workers else None,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_parent,
            multiprocessing_context=_start_method() if workers else None,
            generator=torch.Generator(),  # the loader would draw its workers' seeds from the global one
        )


class _LabelledSquares:
    """Worker side of `LabelledFiles`: the batch at a slice, without files that cannot be used."""

    def __init__(
        self, files: ImageFiles, names: Sequence[str], labels: Sequence[int], image_size: int, crop: float
    ) -> None:
        self._files = files
        self._names = np.array([os.fsencode(name) for name in names])
        self._labels = np.array(labels, dtype=np.int64)
        self._size = image_size
        self._crop = crop

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, wanted: slice) -> _Loaded:
        squares, labels, faults = [], [], []
        for encoded, label in zip(self._names[wanted], self._labels[wanted], strict=True):
            name = os.fsdecode(bytes(encoded))
            try:
                squares.append(self._square(self._files.load(name)))
                labels.append(label)
            except ImageFileError as fault:
                faults.append((name, fault.reason))
        images = _stack(squares) if squares else torch.empty(0, 3, self._size, self._size, dtype=torch.uint8)
        return _Loaded(BatchItem(images, torch.from_numpy(np.array(labels, dtype=np.int64)), {}), tuple(faults))

    def _square(self, image: Image.Image) -> Image.Image:
        """The central part at the images' size, by the resampling of held-out images, whatever the recipe's."""
        if self._crop < 1:
            width, height = image.size
            side = self._crop * min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            return image.resize((self._size, self._size), Image.Resampling.BICUBIC, box=box)
        return center_square(image, self._size, Image.Resampling.BICUBIC)


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
        rules = augmentation
        self._rand_augment = (
            None if rules.rand_augment is None else RandAugment(rules.rand_augment, image_size, rules.interpolation)
        )
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
        if self._rand_augment is not None:
            images = self._rand_augment(images, keys)
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
