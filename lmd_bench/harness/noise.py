"""Inputs without data: noise already in memory, for speed runs, estimates and counting operations."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmd_bench.data.source import collate_generator, own_collate
from lmd_bench.method import Batch, Method

NUM_CLASSES = 1000


def noise_batch(
    method: Method, batch_size: int, device: torch.device, seed: int = 0, *, always_images: bool = False
) -> Batch:
    """One batch of noise with labels, and with what the method's own `collate` makes of it.

    Images uniform in [0, 1], or latents of unit variance for a row that reads a cache, but for `always_images`.
    """
    samples = _samples(method, batch_size, seed)
    labels = torch.tensor([label for _, label in samples])
    generator = torch.Generator().manual_seed(seed)
    extra = {name: tensor.to(device) for name, tensor in method.collate(samples, generator).items()}
    if method.cached_shape is not None and not always_images:
        latents = torch.randn((batch_size, *method.cached_shape), generator=generator).to(device)
        return Batch(torch.empty(0, device=device), labels.to(device), extra, prepared=latents)
    images = torch.stack([image for image, _ in samples])
    return Batch(images.to(device).float() / 255, labels.to(device), extra)


def _samples(method: Method, batch_size: int, seed: int) -> list[tuple[Tensor, int | None]]:
    size, num_classes = method.data.image_size, method.data.num_classes or NUM_CLASSES
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
    return [(image, number % num_classes) for number, image in enumerate(images)]


@dataclass(frozen=True)
class NoiseSource:
    """Endless batches of the same noise, gathered anew for every step.

    What the method's own `collate` makes, such as GreenMIM's groups, is made anew too, as each step of a run has its
    own: within the step, where a run may have data workers for it.
    """

    method: Method
    device: torch.device

    def batches(self, batch_size: int, seed: int, start_step: int = 1) -> Generator[Batch, None, None]:
        """Batches for steps `start_step`, `start_step` + 1, ..., on the device."""
        batch = noise_batch(self.method, batch_size, self.device, seed)
        order = torch.arange(batch_size, device=self.device)
        samples, collate = _samples(self.method, batch_size, seed), own_collate(self.method.collate)
        for step in itertools.count(start_step):
            extra = batch.extra
            if collate is not None:
                made = collate(samples, collate_generator(seed, step))
                extra = {name: tensor.to(self.device, non_blocking=True) for name, tensor in made.items()}
            if batch.prepared is not None:
                yield Batch(batch.images, batch.labels, extra, batch.prepared[order])
            else:
                yield Batch(batch.images[order], batch.labels, extra)
