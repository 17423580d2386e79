"""Inputs without data: noise already in memory, for speed runs, estimates and counting operations."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from lmd_bench.method import Batch, Method

NUM_CLASSES = 1000


def noise_batch(
    method: Method, batch_size: int, device: torch.device, seed: int = 0, *, always_images: bool = False
) -> Batch:
    """One batch of noise with labels, and with what the method's own `collate` makes of it.

    Images uniform in [0, 1], or latents of unit variance for a row that reads a cache, but for `always_images`.
    """
    size = method.data.image_size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(batch_size) % (method.data.num_classes or NUM_CLASSES)
    samples = list(zip(images, labels.tolist(), strict=True))
    extra = {name: tensor.to(device) for name, tensor in method.collate(samples, generator).items()}
    if method.cached_shape is not None and not always_images:
        latents = torch.randn((batch_size, *method.cached_shape), generator=generator).to(device)
        return Batch(torch.empty(0, device=device), labels.to(device), extra, prepared=latents)
    return Batch(images.to(device).float() / 255, labels.to(device), extra)


@dataclass(frozen=True)
class NoiseSource:
    """Endless batches of the same noise, gathered anew for every step."""

    method: Method
    device: torch.device

    def batches(self, batch_size: int, seed: int, start_step: int = 1) -> Generator[Batch, None, None]:
        batch = noise_batch(self.method, batch_size, self.device, seed)
        order = torch.arange(batch_size, device=self.device)
        while True:
            if batch.prepared is not None:
                yield Batch(batch.images, batch.labels, batch.extra, batch.prepared[order])
            else:
                yield Batch(batch.images[order], batch.labels, batch.extra)
