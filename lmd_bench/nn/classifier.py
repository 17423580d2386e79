"""Trained encoders as classifiers, for fine-tuning (MAT) and probes: every token seen, one vector, a linear head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from lmd_bench.errors import ConfigError
from lmd_bench.nn.drop_path import drop_paths
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from lmd_bench.nn.patches import patchify
from lmd_bench.nn.vit import NORM_EPS

Pool = Literal["mean", "cls"]
"""What a head reads: the mean of the tokens, or the class token."""
_NOT_DECAYED = (".bias", "cls_token", "pos_embed", "relative_position_bias_table")


def class_token_obstacle(pool: Pool) -> str | None:
    """Why an encoder without a class token cannot be pooled so, None where it can."""
    return None if pool == "mean" else "its encoder has no class token: use pool mean"


def require(obstacle: str | None) -> None:
    """Raise ConfigError where there is an obstacle (`Method.classifier_obstacle`)."""
    if obstacle is not None:
        raise ConfigError(f"classifier: {obstacle}")


def fresh_norm(width: int, device: torch.device, eps: float = NORM_EPS) -> nn.LayerNorm:
    """A norm between pooling and head that has seen no training, MAE's `fc_norm`."""
    return nn.LayerNorm(width, eps=eps, device=device)


def trained_positions(table: Tensor) -> nn.Parameter:
    """A copy of an encoder's fixed table of positions that is trained, as in MAE's and UM-MAE's fine-tuning."""
    return nn.Parameter(table.detach().clone())


class ImageClassifier(nn.Module, ABC):
    """Images (B, 3, S, S) in [0, 1] to logits (B, num_classes).

    A subclass holds the parts of the trained encoder that it needs and no others, shared with the method and not
    copied, in modules named as in the authors' fine-tuning; a fixed table of positions alone is copied, since it is
    trained here (`trained_positions`). What turns images into the encoder's input is `to_map`.
    The head starts near zero (normal, deviation 2e-5 cut at 2 deviations), as in MAE's fine-tuning.
    """

    num_layers: int
    """The last layer's number, the head's: with `layer_of`, what a learning rate that falls with depth needs."""

    def __init__(self, norm: nn.Module, num_features: int, num_classes: int, device: torch.device) -> None:
        """`norm` stands before the head; `num_features` is D of `pooled`; `device` is that of the encoder's weights."""
        super().__init__()
        self.num_features = num_features
        self.fc_norm = norm
        self.head = nn.Linear(num_features, num_classes, device=device)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, a=-4e-5, b=4e-5)
        nn.init.zeros_(self.head.bias)

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, N, D): the last block's tokens, without a class token and before the encoder's own last norm."""

    def pooled(self, images: Tensor) -> Tensor:
        """(B, D), one vector an image: what head and probes read. Default: the mean of the features."""
        return self.features(images).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        logits: Tensor = self.head(self.fc_norm(self.pooled(images)))
        return logits

    def layer_of(self, name: str) -> int:
        """The layer of a trained parameter, from 0, the embedding, to `num_layers`, the head.

        Default is the rule of MAE's fine-tuning (util/lr_decay.py, after BEiT): block i is layer i + 1, and what is
        neither embedding nor block belongs to the head. Raises ValueError for a parameter of `to_map`, which is frozen.
        """
        part, _, rest = name.partition(".")
        if part == "to_map":
            raise ValueError(f"{name} is frozen and of no layer")
        if part in ("cls_token", "pos_embed", "patch_embed"):
            return 0
        return int(rest.partition(".")[0]) + 1 if part == "blocks" else self.num_layers

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay acts on a parameter: not on 1-D tensors, biases, the class token, positions or tables of
        biases for relative ones (MAE, BEiT, Swin)."""
        return parameter.ndim > 1 and not name.endswith(_NOT_DECAYED)


class ClassTokenClassifier(ImageClassifier):
    """A ViT with a class token in front, pooled as MAE's fine-tuning does.

    "mean" averages the other tokens and norms the mean anew; "cls" reads the class token through the encoder's own last
    norm, `norm`.
    """

    def __init__(self, norm: nn.LayerNorm, blocks: nn.ModuleList, num_classes: int, pool: Pool, drop_path: float):
        """`blocks` and `norm` are the encoder's; the last block drops its branches at the rate `drop_path`."""
        width, device = norm.normalized_shape[0], norm.weight.device
        super().__init__(norm if pool == "cls" else fresh_norm(width, device), width, num_classes, device)
        self.pool = pool
        self.blocks = blocks
        self.drop_paths = drop_paths(drop_path, len(blocks))
        self.num_layers = len(blocks) + 1

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """(B, 1 + N, D): the last block's tokens, the class token first."""

    def features(self, images: Tensor) -> Tensor:
        return self.tokens(images)[:, 1:]

    def pooled(self, images: Tensor) -> Tensor:
        return self.tokens(images)[:, 0] if self.pool == "cls" else super().pooled(images)


class MaskedAutoencoderClassifier(ClassTokenClassifier):
    """The encoder of a `MaskedAutoencoder`."""

    def __init__(
        self, model: MaskedAutoencoder, to_map: nn.Module, num_classes: int, pool: Pool, drop_path: float
    ) -> None:
        """`to_map` turns images in [0, 1] into what the model was trained on (normalised pixels, latents)."""
        super().__init__(model.norm, model.blocks, num_classes, pool, drop_path)
        self.patch_size = model.shape.patch_size
        self.to_map = to_map
        self.cls_token, self.patch_embed = model.cls_token, model.patch_embed
        self.pos_embed = trained_positions(model.pos_embed)

    def tokens(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(patchify(self.to_map(images), self.patch_size))
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block, drop_path in zip(self.blocks, self.drop_paths, strict=True):
            x = block(x, drop_path=drop_path)
        return x
