"""What the training loop reads: endless shuffled batches on the training device, and the held-out images."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Self

import psutil
import torch
from torch import Tensor

from lmd_bench.config import AugmentationConfig, DataConfig, resolve_crop
from lmd_bench.data.augment import (
    augmentation_keys,
    epoch_order,
    flip_where,
    random_crop_boxes,
    random_flips,
    resized_crops,
)
from lmd_bench.data.class_sample import with_every_class
from lmd_bench.data.folders import FolderIndex, no_labels, require_batch, scan_folder
from lmd_bench.data.image_files import NO_CLASS_FOLDERS
from lmd_bench.data.labelled import LabelledImages, LabelledTensors
from lmd_bench.data.rand_augment import RandAugment
from lmd_bench.data.scenes import CLASSES, Scenes, num_scene_classes
from lmd_bench.errors import DataError
from lmd_bench.method import Batch, Method
from lmd_bench.seeding import derive_seed

Collate = Callable[[list[tuple[Tensor, int | None]], torch.Generator], Mapping[str, Tensor]]
"""`Method.collate`, bound."""
DrawLabelled = Callable[[int], tuple[Tensor, Tensor]]
"""Makes n labelled images: uint8 (n, 3, S, S) and int64 (n,) on the training device."""
FIRST_HELD_OUT_SCENE = 2**40
FIRST_VALIDATION_SCENE = FIRST_HELD_OUT_SCENE + -FIRST_HELD_OUT_SCENE % len(CLASSES)
"""Where ten scenes begin that hold each class once."""
_DIGESTED_SCENES = 64
_MEMORY_SHARE = 0.8


class BatchItem(NamedTuple):
    """A batch before it is on the training device."""

    images: Tensor
    """(B, 3, S, S), uint8, or float32 in [0, 1]."""
    labels: Tensor | None
    """(B,) int64."""
    extra: Mapping[str, Tensor]


def to_batch(item: BatchItem, device: torch.device) -> Batch:
    """The item on `device`, images as float32 in [0, 1]. Pinned memory is copied without waiting."""
    images = item.images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = images.float().div_(255.0)
    labels = None if item.labels is None else item.labels.to(device, non_blocking=True)
    extra = {name: tensor.to(device, non_blocking=True) for name, tensor in item.extra.items()}
    return Batch(images, labels, extra)


def collate_generator(seed: int, step: int) -> torch.Generator:
    """The generator that `Method.collate` gets for one step: a function of (seed, step)."""
    return torch.Generator().manual_seed(derive_seed("collate", seed, step))


class BatchSource(ABC):
    """Training and held-out images of one size under one augmentation."""

    num_train: int
    num_classes: int | None
    place: str
    """How errors name this source."""
    why_no_classes: str = NO_CLASS_FOLDERS
    """Why images have no labels, where they have none."""
    _collate: Collate | None = None

    def with_collate(self, collate: Collate) -> Self:
        """The same images with a method's bound `collate`; the base class's, which makes nothing, is not called."""
        other = copy.copy(self)
        other._collate = own_collate(collate)
        return other

    def batches(self, batch_size: int, seed: int, start_step: int = 1) -> Generator[Batch, None, None]:
        """Endless batches for steps `start_step`, `start_step` + 1, ..., on the training device.

        Every epoch is a permutation drawn from (seed, epoch); its last incomplete batch is dropped. What a step gets
        depends on (seed, step) alone, and torch's global generators are not touched. Closing the generator stops its
        workers. Raises DataError at once where the training images do not fill one batch.
        """
        require_batch(self.place, self.num_train, batch_size)
        return self._batches(batch_size, seed, start_step)

    @abstractmethod
    def _batches(self, batch_size: int, seed: int, step: int) -> Generator[Batch, None, None]:
        """As `batches`, for a batch size that fits."""

    @abstractmethod
    def held_out(self, num_images: int) -> Tensor:
        """The first `num_images` held-out images, (n, 3, S, S) uint8 on the training device; always the same ones."""

    def held_out_captions(self, num_images: int) -> list[str] | None:
        """The captions of the first `num_images` held-out images, in order; None where images have none.

        Raises DataError where fewer are held out, and for captions that are there and cannot be used.
        """
        return None

    def labelled(self, augmentation: AugmentationConfig, num_train: int | None) -> BatchSource:
        """The same training images with their labels under another augmentation.

        num_train: the first so many of a fixed order; None takes all. Raises DataError where images have no labels.
        """
        raise DataError(no_labels(self.place, self.why_no_classes))

    def labelled_sample(self, num_images: int) -> LabelledImages:
        """At most `num_images` training images, always the same, as they are held out: no crop, no flip.

        The first of a fixed order, as far as that shows every class (`with_every_class`).
        """
        raise DataError(no_labels(self.place, self.why_no_classes))

    def validation(self, num_images: int | None, crop: float = 1.0) -> LabelledImages:
        """Labelled images that are not trained on, the first `num_images` of a fixed order; None takes all there are.

        crop: side of the central part that is looked at, as a share of the central square (MAE: 224 of 256). Raises
        DataError where images have no labels, or there are fewer.
        """
        raise DataError(no_labels(self.place, self.why_no_classes))

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was trained on, for the record: plain JSON values."""

    def close(self) -> None:
        """Stop workers that still run. The source may be used again."""
        return


class InMemorySource(BatchSource):
    """Images held as one uint8 tensor, gathered, flipped and converted where they lie."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        held_out: Tensor,
        augmentation: AugmentationConfig,
        *,
        num_classes: int | None = None,
        collate: Collate | None = None,
        place: str = "data",
        facts: Mapping[str, Any] | None = None,
        draw_validation: DrawLabelled | None = None,
        caption: Callable[[int], list[str]] | None = None,
    ) -> None:
        """`images` (N, 3, S, S) and `held_out` (M, 3, S, S) uint8 on the training device; `labels` (N,) int64.

        `facts` are added to `describe()`. `draw_validation` makes as many labelled images as it is asked for, unlike
        those trained on; None where there are none. `caption` gives the captions of the first so many held-out images.
        """
        self.num_train = len(images)
        self.num_classes = num_classes
        self.place = place
        self._images = images
        self._held_out = held_out
        self._augmentation = augmentation
        self._collate = collate
        self._facts = dict(facts or {})
        self._host_labels = None if labels is None else labels.cpu()
        self._labels = None if labels is None else labels.to(images.device)
        self._draw_validation = draw_validation
        self._caption = caption
        self._validation: LabelledTensors | None = None

    def held_out(self, num_images: int) -> Tensor:
        if num_images > len(self._held_out):
            raise DataError(too_few_held_out(self.place, num_images, len(self._held_out)))
        return self._held_out[:num_images]

    def held_out_captions(self, num_images: int) -> list[str] | None:
        if num_images > len(self._held_out):
            raise DataError(too_few_held_out(self.place, num_images, len(self._held_out)))
        return None if self._caption is None else self._caption(num_images)

    def labelled(self, augmentation: AugmentationConfig, num_train: int | None) -> InMemorySource:
        if self._labels is None or self._host_labels is None:
            raise DataError(no_labels(self.place, self.why_no_classes))
        other = copy.copy(self)
        other._augmentation, other._collate = augmentation, None
        if num_train is not None:
            other.num_train = min(num_train, self.num_train)
            other._images, other._labels = self._images[:num_train], self._labels[:num_train]
            other._host_labels = self._host_labels[:num_train]
        return other

    def labelled_sample(self, num_images: int) -> LabelledTensors:
        if self._labels is None or self._host_labels is None:
            raise DataError(no_labels(self.place, self.why_no_classes))
        chosen = torch.tensor(with_every_class(self._host_labels.numpy(), num_images), device=self._images.device)
        return LabelledTensors(self._images[chosen], self._labels[chosen])

    def validation(self, num_images: int | None, crop: float = 1.0) -> LabelledTensors:
        if self._draw_validation is None:
            raise DataError(no_labels(self.place, self.why_no_classes))
        count = len(self._held_out) if num_images is None else num_images
        if self._validation is None or self._validation.num_images != count:
            self._validation = LabelledTensors(*self._draw_validation(count))
        return self._validation

    def describe(self) -> dict[str, Any]:
        return {
            "num_train": self.num_train,
            "num_held_out": len(self._held_out),
            "num_classes": self.num_classes,
            **self._facts,
        }

    def _batches(self, batch_size: int, seed: int, step: int) -> Generator[Batch, None, None]:
        per_epoch = self.num_train // batch_size
        on_host = None if self._augmentation.rand_augment is None else _OnHost.of(self._images, self._augmentation)
        device = self._images.device if on_host is None else on_host.images.device
        plan: _EpochPlan | None = None
        while True:
            epoch, number = divmod(step - 1, per_epoch)
            if plan is None or number == 0:
                plan = self._plan(seed, epoch, device)
            chosen = slice(number * batch_size, (number + 1) * batch_size)
            if on_host is None:
                yield self._batch(plan, chosen, seed, step)
            else:
                yield self._augmented_batch(on_host, plan, chosen, seed, step)
            step += 1

    def _plan(self, seed: int, epoch: int, device: torch.device) -> _EpochPlan:
        """All random choices of an epoch at once: one large call instead of many small ones in every step."""
        order = epoch_order(seed, epoch, self.num_train)
        keys = augmentation_keys(seed, epoch, order)
        flips = boxes = None
        if self._augmentation.flip:
            flips = random_flips(keys)
        if self._augmentation.crop == "random_resized":
            height, width = self._images.shape[-2:]
            boxes = random_crop_boxes(keys, height, width, self._augmentation.scale, self._augmentation.ratio)
        return _EpochPlan.on_device(device, order, keys, flips, boxes)

    def _batch(self, plan: _EpochPlan, chosen: slice, seed: int, step: int) -> Batch:
        order = plan.order[chosen]
        images = self._images.index_select(0, order)
        if plan.flips is not None:
            images = flip_where(images, plan.flips[chosen])
        labels = None if self._labels is None else self._labels.index_select(0, order)
        extra: Mapping[str, Tensor] = {}
        if self._collate is not None:
            extra = self._collate(self._samples(images, plan.host_order[chosen]), collate_generator(seed, step))
        batch = to_batch(BatchItem(images, labels, extra), images.device)
        if plan.boxes is None:
            return batch
        crops = resized_crops(batch.images, plan.boxes[chosen], self._augmentation.interpolation)
        return Batch(crops, batch.labels, batch.extra)

    def _augmented_batch(self, on_host: _OnHost, plan: _EpochPlan, chosen: slice, seed: int, step: int) -> Batch:
        """As `_batch`, cropped and flipped on the host too, where RandAugment changes what is left."""
        order = plan.host_order[chosen]
        images = on_host.changed(plan, chosen, self._augmentation.interpolation)
        labels = None if self._host_labels is None else self._host_labels[order]
        extra: Mapping[str, Tensor] = {}
        if self._collate is not None:
            extra = self._collate(self._samples(images, order), collate_generator(seed, step))
        if self._images.is_cuda:  # only pinned memory is copied without waiting
            images, labels = images.pin_memory(), None if labels is None else labels.pin_memory()
        return to_batch(BatchItem(images, labels, extra), self._images.device)

    def _samples(self, images: Tensor, order: Tensor) -> list[tuple[Tensor, int | None]]:
        """(image, label) pairs; labels come from the host's copy, so that nothing waits for the device."""
        if self._host_labels is None:
            return [(image, None) for image in images]
        return list(zip(images, self._host_labels[order].tolist(), strict=True))


class _EpochPlan(NamedTuple):
    """The random choices of one epoch in the order of its images; on the device but for what is named host."""

    host_order: Tensor
    host_keys: Tensor
    order: Tensor
    flips: Tensor | None
    boxes: Tensor | None

    @classmethod
    def on_device(
        cls, device: torch.device, order: Tensor, keys: Tensor, flips: Tensor | None, boxes: Tensor | None
    ) -> _EpochPlan:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return cls(order, keys, order.to(device, non_blocking=True), moved(flips), moved(boxes))


class _OnHost(NamedTuple):
    """Training images where Pillow can change them, so that no step waits for a device to hand them over."""

    images: Tensor
    rand_augment: RandAugment

    @classmethod
    def of(cls, images: Tensor, augmentation: AugmentationConfig) -> _OnHost:
        assert augmentation.rand_augment is not None  # nobody else comes here
        change = RandAugment(augmentation.rand_augment, images.shape[-1], augmentation.interpolation)
        return cls(images.cpu(), change)

    def changed(self, plan: _EpochPlan, chosen: slice, interpolation: str) -> Tensor:
        """The chosen images flipped, cropped and augmented, uint8."""
        images = self.images.index_select(0, plan.order[chosen])
        if plan.flips is not None:
            images = flip_where(images, plan.flips[chosen])
        if plan.boxes is not None:
            crops = resized_crops(images.float().div_(255.0), plan.boxes[chosen], interpolation)
            images = crops.mul_(255.0).round_().to(torch.uint8)
        return self.rand_augment(images, plan.host_keys[chosen])


def own_collate(collate: Collate | None) -> Collate | None:
    """A method's `collate`, None where it is the base class's, which makes nothing."""
    return None if getattr(collate, "__func__", None) is Method.collate else collate


def open_source(
    data: DataConfig,
    image_size: int,
    augmentation: AugmentationConfig,
    device: torch.device,
    collate: Collate | None = None,
    index: FolderIndex | None = None,
) -> BatchSource:
    """The source that `data` describes, its images at `image_size` px.

    Scenes are made here, once, on `device`. A folder is scanned unless its `index` is given. `collate` is the method's
    own, bound; that of the base class, which makes nothing, is not called. Raises DataError.
    """
    collate = own_collate(collate)
    augmentation = resolve_crop(augmentation, data)
    if data.name == "scenes":
        return _open_scenes(data, image_size, augmentation, device, collate)
    if data.path is None:
        raise DataError("data.path: no folder of images is named; give --data DIR")
    from lmd_bench.data.folder_source import FolderSource

    index = index if index is not None else scan_folder(data.path, data)
    return FolderSource(index, data, image_size, augmentation, device, collate)


def _open_scenes(
    data: DataConfig,
    image_size: int,
    augmentation: AugmentationConfig,
    device: torch.device,
    collate: Collate | None,
) -> InMemorySource:
    assert data.num_train is not None  # DataConfig asks for it
    _require_memory(data.num_train + data.num_held_out, image_size, device)
    scenes = Scenes(data.seed, image_size)
    labels_of = scenes.labels if data.labels == "object" else scenes.colours
    indices = torch.arange(data.num_train)
    images = scenes.render(indices, device)
    held_out = scenes.render(FIRST_HELD_OUT_SCENE + torch.arange(data.num_held_out), device)

    def draw_validation(count: int) -> tuple[Tensor, Tensor]:
        wanted = FIRST_VALIDATION_SCENE + torch.arange(count)
        return scenes.render(wanted, device), labels_of(wanted).to(device)

    sample = torch.cat((images[:_DIGESTED_SCENES], held_out[:_DIGESTED_SCENES])).cpu()
    return InMemorySource(
        images,
        labels_of(indices),
        held_out,
        augmentation,
        num_classes=num_scene_classes(data.labels),
        collate=collate,
        place="data.num_train",
        facts={
            "name": "scenes",
            "seed": data.seed,
            "image_size": image_size,
            "digest": hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16],
        },
        draw_validation=draw_validation,
        caption=lambda count: scenes.captions(FIRST_HELD_OUT_SCENE + torch.arange(count)),
    )


def scenes_digest(seed: int, image_size: int) -> str:
    """SHA-256 of the first four scenes as this version draws them on a CPU, 16 hex digits.

    Another version of the generator that moves a pixel of theirs gives another digest.
    """
    images = Scenes(seed, image_size).render(range(4))
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]


def _require_memory(num_images: int, image_size: int, device: torch.device) -> None:
    """Raise DataError where scenes would fill more than 80 % of the memory that is free where they are to lie."""
    needed = num_images * 3 * image_size**2
    on_gpu = device.type == "cuda"
    free = int(torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available)
    if needed > _MEMORY_SHARE * free:
        raise DataError(
            f"data.num_train: {num_images} scenes of {image_size} px take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free on {device.type}; lower it, or train on a folder with --data DIR"
        )


def too_few_held_out(place: str, asked: int, there: int) -> str:
    return f"{place}: {asked} held-out images are asked for, {there} are held out; raise data.num_held_out"
