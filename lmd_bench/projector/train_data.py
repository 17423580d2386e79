"""What a projector is trained and measured on: crops of generated scenes or of a folder's images."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.folders import FolderIndex, require_batch, scan_folder
from lmd_bench.data.source import BatchSource, open_source, scenes_digest
from lmd_bench.errors import DataError
from lmd_bench.projector.train_config import PLACE, LSPTrainOptions
from lmd_bench.projector.training_split import TrainingSplit, split_of_folder
from lmd_bench.seeding import derive_seed

HELD_OUT_START = 2**40
_SAMPLE_BATCH = 64
_SAMPLE_BYTES = 256 * 2**20
"""Of a sample's images, which are held at once: 5,461 of 64 px, 445 of 224 px."""
_OWN_WORDS = {
    "the recipe's batch_size": "--batch-size",
    "data.num_train": "--num-images",
    "data.num_held_out": "--num-held-out",
}
"""What the harness calls values that are options here."""


class TrainData:
    """Training crops in [-1, 1], a sample of whole training images, and held-out images that training never sees."""

    def __init__(self, options: LSPTrainOptions, device: torch.device) -> None:
        """Draws scenes, or looks through the folder. Raises DataError."""
        self._options = options
        with _own_words():
            self._open(device)

    def _open(self, device: torch.device) -> None:
        options = self._options
        index: FolderIndex | None = None
        if options.data is None:
            config = DataConfig(
                image_size=options.image_size,
                num_train=options.num_images,
                num_held_out=options.num_held_out,
                seed=options.data_seed,
            )
        else:
            config = DataConfig(
                name="folder",
                path=options.data,
                image_size=options.image_size,
                num_held_out=options.num_held_out,
                seed=options.data_seed,
            )
            index = scan_folder(options.data, config)
            require_batch(f"--data {options.data}", index.num_train, options.batch_size)
        self._source: BatchSource = open_source(config, options.image_size, AugmentationConfig(), device, index=index)
        num_held_out = options.num_held_out if index is None else min(options.num_held_out, len(index.held_out))
        self.held_out: Tensor = self._source.held_out(num_held_out)
        """uint8 (num_held_out, 3, image_size, image_size) on the device."""
        self.warning = None if index is None else index.warning()
        """One line about a folder's unusable files."""
        self.split: TrainingSplit = self._scenes_split() if index is None else split_of_folder(index, options.data_seed)
        """What is trained on and what is held out."""

    def _scenes_split(self) -> TrainingSplit:
        options = self._options
        return TrainingSplit(
            data="scenes",
            digest=scenes_digest(options.data_seed, options.image_size),
            data_seed=options.data_seed,
            num_train=options.num_images,
            num_held_out=options.num_held_out,
        )

    @property
    def described(self) -> str:
        """What the images are, in a few words."""
        size = self._options.image_size
        if self._options.data is None:
            return f"{self._source.num_train} scenes of {size} px (indices from 0, seed {self._options.data_seed})"
        return f"{self._source.num_train} images of {self._options.data} at {size} px"

    @property
    def described_held_out(self) -> str:
        """What is measured on, in a few words."""
        number, size = len(self.held_out), self._options.image_size
        if self._options.data is None:
            return f"{number} held-out scenes of {size} px (indices from 2^40, seed {self._options.data_seed})"
        return f"{number} held-out images of {self._options.data}, their central squares at {size} px"

    def batches(self, start_step: int) -> Generator[Tensor, None, None]:
        """Batches (B, 3, crop_size, crop_size) in [-1, 1] for steps `start_step` (from 0), ... without end.

        Every image once before any twice; each batch is cropped at one random place. What a step gets depends on the
        seed and the step alone, which is what lets a training go on where it stopped.
        """
        options = self._options
        batches = self._source.batches(options.batch_size, options.seed, start_step + 1)
        for step, batch in enumerate(batches, start_step):
            yield _augmented(batch.images * 2.0 - 1.0, options, step)

    def sample(self, num_images: int) -> Tensor:
        """Training images as they come, augmented but whole: float32 (num_images, 3, image_size, image_size), [0, 1].

        Fewer where there are fewer, or where so many would take more than 256 MiB.
        """
        most = max(1, _SAMPLE_BYTES // (12 * self._options.image_size**2))
        number = min(num_images, self._source.num_train, most)
        size = min(_SAMPLE_BATCH, number)
        batches = self._source.batches(size, derive_seed("projector-sample", self._options.seed))
        parts = [next(batches).images for _ in range(-(-number // size))]
        batches.close()
        return torch.cat(parts)[:number]

    def close(self) -> None:
        """Stops workers that decode images."""
        self._source.close()


@contextmanager
def _own_words() -> Iterator[None]:
    """Errors of the data, told in the names of this command's options."""
    try:
        yield
    except DataError as error:
        text = str(error)
        for theirs, ours in _OWN_WORDS.items():
            text = text.replace(theirs, ours)
        raise DataError(f"{PLACE}: {text}") from None


def _augmented(images: Tensor, options: LSPTrainOptions, step: int) -> Tensor:
    """One random crop, and one random turn, of a whole batch."""
    generator = torch.Generator().manual_seed(derive_seed("projector-crop", options.seed, step))
    side = options.crop_size
    top, left = torch.randint(options.image_size - side + 1, (2,), generator=generator).tolist()
    turns = int(torch.randint(4, (1,), generator=generator)) if options.turn else 0
    crops = images[:, :, top : top + side, left : left + side]
    return torch.rot90(crops, turns, (2, 3)).contiguous(memory_format=torch.channels_last)


def patch_pca_psnr(train: Tensor, held_out: Tensor, *, patch_size: int, num_components: int) -> float:
    """PSNR in dB of images (N, 3, H, W) after a PCA of their patches that is fitted on other images.

    uint8, or float in [0, 1]. Patches are `patch_size` square, RGB, not overlapping; the mean patch is kept aside and
    costs no component.
    """

    def patches(images: Tensor) -> Tensor:
        values = images if images.is_floating_point() else images.float() / 255.0
        return functional.unfold(values, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)

    fitted, wanted = patches(train), patches(held_out)
    mean = fitted.mean(0)
    basis = torch.linalg.eigh(torch.cov(fitted.t())).eigenvectors[:, -num_components:]
    residual = wanted - mean
    residual = residual - residual @ basis @ basis.t()
    return -10.0 * math.log10(float(residual.square().mean()))
