"""UM-MAE's ViT form: MAE's autoencoder, some of whose visible tokens are replaced by a learned one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines._uniform_sampling import num_unreplaced, visible_first
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderShape
from lmd_bench.nn.masking import take_tokens
from lmd_bench.nn.patches import patchify


class UMViT(MaskedAutoencoder):
    """ViT encoder on the visible tokens, `secondary_ratio` of them replaced; ViT decoder for the hidden ones.

    A replaced token keeps its place in the encoder and its position, its patch is not even embedded. Attention does
    not mind the order of tokens, so inside the replaced ones stand behind the other visible ones.
    """

    def __init__(self, shape: MaskedAutoencoderShape, *, secondary_ratio: float) -> None:
        super().__init__(shape)
        self.secondary_ratio = secondary_ratio
        self.vis_mask_token = nn.Parameter(torch.empty(1, 1, shape.encoder_width))
        nn.init.normal_(self.vis_mask_token, std=0.02)

    def forward(  # type: ignore[override]  # a mask and noise, as UM-MAE's other backbones take them
        self, images: Tensor, visible: Tensor, secondary_noise: Tensor, *, all_tokens: bool = False
    ) -> Tensor:
        """Predicted patches (B, L - n, P) of the hidden tokens, in raster order.

        `images` (B, 3, S, S) are normalised, `visible` (B, L) bool leaves n tokens visible in every sample, and
        `secondary_noise` (B, n), uniform in [0, 1), says which of them are replaced (`secondary_order`). With
        `all_tokens` the predictions of the visible ones stand in front, in raster order too: (B, L, P).
        """
        num_visible = secondary_noise.shape[1]
        order = secondary_order(secondary_noise)
        ids_keep, ids_hidden = visible_first(visible).split([num_visible, visible.shape[1] - num_visible], dim=1)
        ids_keep = ids_keep.gather(1, order)
        num_replaced = num_visible - num_unreplaced(num_visible, self.secondary_ratio)
        features = self.encode(patchify(images, self.shape.patch_size), ids_keep, num_replaced)
        predicted = self.decode(features, torch.cat([ids_keep, ids_hidden], dim=1), all_tokens=all_tokens)
        if not all_tokens:
            return predicted
        in_raster_order = take_tokens(predicted, order.argsort(dim=1))
        return torch.cat([in_raster_order, predicted[:, num_visible:]], dim=1)

    def encode(self, patches: Tensor, ids_keep: Tensor, num_replaced: int = 0) -> Tensor:
        """Features (B, 1 + n, D), class token first, of the tokens `ids_keep` (B, n) of `patches` (B, L, P).

        The last `num_replaced` of them are replaced by the learned token; in the yardstick none is.
        """
        num_seen = ids_keep.shape[1] - num_replaced
        cls = self.cls_token.expand(len(patches), -1, -1)
        seen = self.patch_embed(take_tokens(patches, ids_keep[:, :num_seen]))
        replaced = self.vis_mask_token.expand(len(patches), num_replaced, -1)
        x = torch.cat([cls, seen, replaced], dim=1) + self._positions(ids_keep)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def _positions(self, ids_keep: Tensor) -> Tensor:
        """(B, 1 + n, D): the class row, then the positions of the visible tokens."""
        return self.pos_embed[0][nn.functional.pad(ids_keep + 1, (1, 0))]


def secondary_order(noise: Tensor) -> Tensor:
    """Visible tokens in the order of secondary masking, (B, n): those left alone first, then the replaced ones.

    `noise` (B, n) has a value for each visible token in raster order. The authors' ViT sorts it once: with
    p = argsort(noise), token j is replaced where p[j] is at least the number left alone (their pyramids use the rank
    of noise[j] instead). The order that sorts p is a uniformly random permutation either way.
    """
    return noise.argsort(dim=1).argsort(dim=1)
