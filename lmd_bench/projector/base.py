"""The interface of latent projectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn


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

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images float32 (B, 3, H, W) in [0, 1] -> latents float32 (B, latent_channels, H/factor, W/factor).

        Never part of a graph. (Not inference mode: its tensors could not enter a graph later.)
        """
        with _own_precision(images.device.type):
            return self._encode(images.float()).float().contiguous()

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
