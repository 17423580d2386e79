"""The interface of latent projectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lmd_bench.projector.load import load_model


def _own_precision(device_type: str) -> AbstractContextManager[object]:
    """Outside the loop's autocast; the meta device, on which FLOPs are counted, knows none."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class LatentProjector(nn.Module, ABC):
    """A frozen pair of maps: images (B, 3, H, W) in [0, 1] <-> latents (B, latent_channels, H/factor, W/factor).

    Weights never ask for gradients and the module stays in evaluation mode, whatever its parent is set to. Kinds
    implement `_encode` and `_decode` and call `freeze` at the end of their constructor.

    name: as it stands in records and tables.
    factor: pixels to a latent position, along each axis.
    latent_channels: channels of the latents.
    """

    def __init__(self, *, name: str, factor: int, latent_channels: int) -> None:
        super().__init__()
        self.name = name
        self.factor = factor
        self.latent_channels = latent_channels

    def freeze(self) -> None:
        """Takes all weights out of training."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Leaves the module in evaluation mode: a projector is never trained as part of a method."""
        return super().train(False)

    @property
    def codebook(self) -> Tensor | None:
        """Codebook vectors (K, latent_channels) in the units of the latents; None for kinds without one."""
        return None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float32 (B, 3, H, W) in [0, 1] -> latents float32 (B, latent_channels, H/factor, W/factor).

        Never part of a graph. (Not inference mode: its tensors could not enter a graph later.)
        """
        with _own_precision(images.device.type):
            return self._encode(images.float()).float().contiguous()

    def forward(self, images: Tensor) -> Tensor:
        """`encode`, so that a projector can be a part of a larger module."""
        return self.encode(images)

    def decode(self, latents: Tensor, *, quantize: bool = False) -> Tensor:
        """Latents (B, latent_channels, h, w) -> images float32 (B, 3, h * factor, w * factor), clamped to [0, 1].

        Gradients flow to the latents, not to the weights. quantize: replace latents by their nearest codebook vectors
        first; kinds without a codebook have nothing to replace.
        """
        with _own_precision(latents.device.type):
            return self._decode(latents.float(), quantize=quantize).float().clamp(0.0, 1.0).contiguous()

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """`encode` without its frame."""

    @abstractmethod
    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        """`decode` without its frame, not clamped."""


class NetworkProjector(LatentProjector):
    """A projector around one network that takes and gives images in [-1, 1]; latents are the network's times `scale`.

    The network runs in the number format its weights have; latents and images are float32 outside. Kinds implement
    `_to_latents` and `_to_pixels`, which see tensors in that format, and name their network's class.
    """

    model_class: ClassVar[Any]

    @classmethod
    def load(cls, folder: Path, *, name: str, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Self:
        """From the network's diffusers folder, run in `dtype`. Raises WeightsError as `load_model` does."""
        make: Any = cls  # kinds take the network, a name and a scale
        projector: Self = make(load_model(cls.model_class, folder, dtype), name=name, scale=scale)
        return projector

    def __init__(self, model: Any, *, name: str, factor: int, latent_channels: int, scale: float) -> None:
        super().__init__(name=name, factor=factor, latent_channels=latent_channels)
        # Channels last: convolutions of few channels run up to twice as fast on CPUs, and in bf16 on GPUs.
        self.model = model.to(memory_format=torch.channels_last)
        self.scale = scale
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        pixels = (images * 2.0 - 1.0).to(self.model.dtype, memory_format=torch.channels_last)
        return self._to_latents(pixels).float() * self.scale

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        scaled = (latents / self.scale).to(self.model.dtype, memory_format=torch.channels_last)
        return self._to_pixels(scaled).float() * 0.5 + 0.5

    @abstractmethod
    def _to_latents(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> the network's latents (B, latent_channels, H/factor, W/factor)."""

    @abstractmethod
    def _to_pixels(self, latents: Tensor) -> Tensor:
        """The network's latents -> images (B, 3, H, W) in [-1, 1], not clamped."""
