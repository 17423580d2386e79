"""The masked autoencoder that MAE runs on pixels and LMD on latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lmd_bench.nn.masking import groups_of_equal_count, ids_from_mask, take_tokens
from lmd_bench.nn.patches import normalised, patchify, unpatchify
from lmd_bench.nn.pos_embed import frozen_pos_embed
from lmd_bench.nn.vit import NORM_EPS, Block


@dataclass(frozen=True)
class MaskedAutoencoderShape:
    """Sizes of a masked autoencoder; the defaults are ViT-B with MAE's decoder."""

    input_size: int
    """Side of the square input map: pixels for MAE, latent positions for LMD."""
    patch_size: int
    """Side of a token on that map."""
    in_channels: int
    """Of that map: 3 for pixels."""
    encoder_width: int = 768
    encoder_depth: int = 12
    """Blocks."""
    encoder_heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    """Blocks."""
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs as a multiple of the width."""

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole map, the class token not counted."""
        return self.grid_size**2

    @property
    def patch_dim(self) -> int:
        """Values that a token stands for."""
        return self.patch_size**2 * self.in_channels


class PatchEmbed(nn.Module):
    """Linear embedding of patches, stored as the convolution it equals (MAE's key `patch_embed.proj`)."""

    def __init__(self, in_channels: int, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, n, p * p * C) as `patchify` cuts them to (B, n, D): only those that are wanted are embedded."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class MaskedAutoencoder(nn.Module):
    """ViT encoder on the visible patches, ViT decoder that predicts the hidden ones (He et al. 2021).

    Tokens stay in the order visible, hidden all the way through: attention does not mind, positions are looked up in
    that order, and nothing has to be shuffled back. The last decoder block, the norm and the prediction run on the
    hidden tokens alone. All of it gives the numbers of the published forward pass (tests/parity).

    `decoder_pos_sign` +1 adds the decoder's position table (MAE), -1 subtracts it (LMD's "negative SPE").
    `normalize_targets` predicts patches normalised by their own mean and unbiased variance.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(
        self, shape: MaskedAutoencoderShape, *, decoder_pos_sign: int = 1, normalize_targets: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.decoder_pos_sign = decoder_pos_sign
        self.normalize_targets = normalize_targets
        width, decoder_width = shape.encoder_width, shape.decoder_width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = frozen_pos_embed(width, shape.grid_size, class_row=True)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_pos_embed = frozen_pos_embed(decoder_width, shape.grid_size, class_row=True)
        self.patch_embed = PatchEmbed(shape.in_channels, shape.patch_size, width)
        self.blocks = nn.ModuleList(
            Block(width, shape.encoder_heads, shape.mlp_ratio) for _ in range(shape.encoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, shape.decoder_heads, shape.mlp_ratio) for _ in range(shape.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(decoder_width, shape.patch_dim)
        self.apply(_initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, inputs: Tensor, ids: Tensor, num_kept: int, *, completed: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """() mean squared error on the hidden patches of `inputs` (B, C, H, W).

        `ids` (B, L) is a permutation of the tokens whose first `num_kept` are visible (see `masking`). All samples
        hide the same number, so the plain mean is the published sum(loss * mask) / sum(mask). With `completed` also
        `inputs` with its hidden tokens replaced by their prediction, (B, C, H, W), in the graph.
        """
        patches = patchify(inputs, self.shape.patch_size)
        predicted = self.decode(self.encode(patches, ids[:, :num_kept]), ids)
        loss = F.mse_loss(predicted, self.targets(take_tokens(patches, ids[:, num_kept:])))
        if not completed:
            return loss
        filled = _put_tokens(patches, ids[:, num_kept:], predicted)
        return loss, unpatchify(filled, self.shape.patch_size, self.shape.in_channels)

    def encode(self, patches: Tensor, ids_keep: Tensor) -> Tensor:
        """Features (B, 1 + n, D), class token first, of the tokens `ids_keep` (B, n) of `patches` (B, L, P)."""
        table = self.pos_embed[0]
        tokens = self.patch_embed(take_tokens(patches, ids_keep)) + table[ids_keep + 1]
        cls = (self.cls_token + table[:1]).expand(len(tokens), -1, -1)
        x = torch.cat([cls, tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def decode(self, features: Tensor, ids: Tensor, *, all_tokens: bool = False) -> Tensor:
        """Predicted patches (B, L - n, P) of the hidden tokens, in the order of `ids`, from features (B, 1 + n, D).

        With `all_tokens` the visible ones are predicted too: (B, L, P).
        """
        embedded = self.decoder_embed(features)
        num_hidden = ids.shape[1] + 1 - embedded.shape[1]
        hidden = self.mask_token.expand(len(embedded), num_hidden, -1)
        x = torch.cat([embedded, hidden], dim=1)
        x = torch.add(x, self._decoder_positions(ids), alpha=self.decoder_pos_sign)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, ids.shape[1] if all_tokens else num_hidden)
        out: Tensor = self.decoder_pred(self.decoder_norm(x))
        return out

    def _decoder_positions(self, ids: Tensor) -> Tensor:
        """(B, 1 + L, D): the class row, then the positions in the order of `ids`."""
        return self.decoder_pos_embed[0][F.pad(ids + 1, (1, 0))]

    def targets(self, patches: Tensor) -> Tensor:
        """What is predicted for `patches` (B, n, P): themselves, or normalised with eps 1e-6."""
        return normalised(patches) if self.normalize_targets else patches

    def complete(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """`inputs` (B, C, H, W) with the tokens where `hidden` (B, L) bool is True replaced by their prediction.

        Samples may hide different numbers of tokens. Values under hidden tokens are not looked at.
        """
        patches = patchify(inputs, self.shape.patch_size).clone()
        for rows in groups_of_equal_count(hidden):
            ids, num_kept = ids_from_mask(hidden[rows])
            if num_kept == ids.shape[1]:
                continue
            visible = patches[rows]
            predicted = self.decode(self.encode(visible, ids[:, :num_kept]), ids)
            patches[rows] = _put_tokens(visible, ids[:, num_kept:], predicted)
        return unpatchify(patches, self.shape.patch_size, self.shape.in_channels)


def _put_tokens(patches: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """`patches` (B, L, P) with `values` (B, n, P) at the tokens `ids` (B, n)."""
    return patches.scatter(1, ids.unsqueeze(-1).expand_as(values), values.to(patches.dtype))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
