"""LMD's masked model: a masked autoencoder on latents whose decoder subtracts its position table."""

from __future__ import annotations

from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderShape

SUBTRACTED = -1
"""Sign of LMD's decoder positions, the "negative SPE" of paper sec. 3.2.2 and of its code."""


def lmd_vit_base_patch4(*, normalize_targets: bool = True) -> MaskedAutoencoder:
    """The authors' model: ViT-B on 28 x 28 x 4 latents, patch 4, 49 tokens, decoder 512 x 8; 110,817,856 parameters."""
    shape = MaskedAutoencoderShape(input_size=28, patch_size=4, in_channels=4)
    return MaskedAutoencoder(shape, decoder_pos_sign=SUBTRACTED, normalize_targets=normalize_targets)
