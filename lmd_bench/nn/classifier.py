"""Trained encoders as classifiers, for fine-tuning (MAT): every token seen, mean pooling, a norm, a linear head."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from lmd_bench.nn.patches import patchify
from lmd_bench.nn.vit import NORM_EPS


class ImageClassifier(nn.Module, ABC):
    """Images (B, 3, S, S) in [0, 1] to logits (B, num_classes).

    A subclass holds the parts of the trained encoder (shared with the method, not copied) and gives its features.
    The head starts near zero (normal, deviation 2e-5 cut at 2 deviations), as in MAE's fine-tuning.
    """

    def __init__(self, width: int, num_classes: int, device: torch.device) -> None:
        """`device` is that of the encoder's weights."""
        super().__init__()
        self.fc_norm = nn.LayerNorm(width, eps=NORM_EPS, device=device)
        self.head = nn.Linear(width, num_classes, device=device)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, a=-4e-5, b=4e-5)
        nn.init.zeros_(self.head.bias)

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, N, D): the last block's tokens, without a class token and before the encoder's own last norm."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        logits: Tensor = self.head(self.fc_norm(self.features(images).mean(dim=1)))
        return logits


class MaskedAutoencoderClassifier(ImageClassifier):
    """The encoder of a `MaskedAutoencoder`; its class token goes along and is left out of the mean."""

    def __init__(self, model: MaskedAutoencoder, to_map: nn.Module, num_classes: int) -> None:
        """`to_map` turns images in [0, 1] into what the model was trained on (normalised pixels, latents)."""
        super().__init__(model.shape.encoder_width, num_classes, model.cls_token.device)
        self.patch_size = model.shape.patch_size
        self.to_map = to_map
        self.cls_token, self.pos_embed = model.cls_token, model.pos_embed
        self.patch_embed, self.blocks = model.patch_embed, model.blocks

    def features(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(patchify(self.to_map(images), self.patch_size))
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]
