"""What a latent space projector is trained on: quantisation, adversarial and perceptual terms (LMD, eq. 2-6).

LMD takes them from VQGAN (Esser et al. 2021, arXiv 2012.09841); where its released code (taming-transformers) departs
from the equations, both forms are here and named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lmd_bench.nn.perceptual import PerceptualDistance, perceptual_obstacle

__all__ = [
    "AdversarialKind",
    "PerceptualDistance",
    "Quantised",
    "adaptive_weight",
    "discriminator_loss",
    "generator_loss",
    "perceptual_obstacle",
    "quantise",
]

AdversarialKind = Literal["hinge", "logistic"]

_DISTANCES_AT_ONCE = 2**24  # 64 MiB of float32: positions x codebook vectors compared in one piece

# -- quantisation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantised:
    """Latents after the codebook."""

    latents: Tensor  # (B, d, h, w): nearest codebook vectors; gradients pass straight through to the latents before
    indices: Tensor  # (B, h, w) int64: which vectors
    loss: Tensor  # (): codebook and commitment terms


def quantise(latents: Tensor, codebook: Tensor, *, beta: float = 0.25, legacy: bool = False) -> Quantised:
    """Replaces latents (B, d, h, w) by their nearest vectors of a codebook (K, d), per position (LMD eq. 2 and 4).

    loss: mean (sg[z] - z_q)^2 + beta * mean (sg[z_q] - z)^2; the first term moves the codebook, the second the
    encoder. legacy: beta on the first term instead, as taming-transformers does by default.
    Raises ValueError where the widths of latents and codebook differ.
    """
    if latents.ndim != 4 or codebook.ndim != 2 or latents.shape[1] != codebook.shape[1]:
        shapes = f"latents {tuple(latents.shape)}, codebook {tuple(codebook.shape)}"
        raise ValueError(f"{shapes}: expected (B, d, h, w) and (K, d)")
    # In float32 even under autocast: half the digits would pick wrong neighbours in a dense codebook.
    with torch.autocast(latents.device.type, enabled=False):
        before, vectors = latents.float(), codebook.float()
        indices = _nearest(before.detach(), vectors.detach())
        after: Tensor = functional.embedding(indices, vectors).permute(0, 3, 1, 2)
        codebook_term = functional.mse_loss(after, before.detach())
        commitment_term = functional.mse_loss(before, after.detach())
        loss = beta * codebook_term + commitment_term if legacy else codebook_term + beta * commitment_term
        through = before + (after - before).detach()
    return Quantised(latents=through.to(latents.dtype), indices=indices, loss=loss)


def _nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices (B, h, w) of the nearest rows. ||z||^2 is left out of the distances: it is the same for all rows.

    Both are moved so that the codebook's mean is 0: far from there, products of large numbers would cancel to few
    digits and neighbours be mistaken.
    """
    centre = codebook.mean(dim=0)
    positions, vectors = latents.permute(0, 2, 3, 1) - centre, codebook - centre
    half_norms = vectors.square().sum(dim=1) / 2
    chunks = positions.flatten(0, 2).split(max(1, _DISTANCES_AT_ONCE // len(vectors)))
    found = [torch.addmm(half_norms, chunk, vectors.t(), alpha=-1.0).argmin(dim=1) for chunk in chunks]
    return torch.cat(found).view(positions.shape[:3])


# -- adversarial terms ------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: AdversarialKind) -> Tensor:
    """What the discriminator lowers, (), from logits of any shapes.

    hinge: VQGAN's, half of mean relu(1 - real) + mean relu(1 + fake). logistic: LMD's eq. 5, log D(x) +
    log(1 - D(x')) raised, with D = sigmoid of the logits; halved as the hinge is, so that the two read alike in a log
    (Adam's step does not depend on a constant factor).
    Raises ValueError for another kind.
    """
    if kind == "hinge":
        return (functional.relu(1.0 - real_logits).mean() + functional.relu(1.0 + fake_logits).mean()) / 2
    if kind == "logistic":
        return (functional.softplus(-real_logits).mean() + functional.softplus(fake_logits).mean()) / 2
    raise ValueError(f"adversarial kind {kind!r}: 'hinge' or 'logistic'")


def generator_loss(fake_logits: Tensor, kind: AdversarialKind) -> Tensor:
    """What the autoencoder lowers to pass for real, (), from the discriminator's logits of reconstructions.

    hinge: -mean of the logits. logistic: -mean log D(x') (Goodfellow et al. 2014, sec. 3), not the log(1 - D(x')) that
    stands in LMD's eq. 5: both have the same fixed point, but the latter's gradient vanishes just when every
    reconstruction is told apart, and the adaptive weight divides by that gradient's norm.
    Raises ValueError for another kind.
    """
    if kind == "hinge":
        return -fake_logits.mean()
    if kind == "logistic":
        return functional.softplus(-fake_logits).mean()
    raise ValueError(f"adversarial kind {kind!r}: 'hinge' or 'logistic'")


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, *, weight: float
) -> Tensor:
    """The weight (), detached, of the adversarial loss beside the reconstruction loss (LMD eq. 6).

    ||grad of reconstruction|| / (||grad of adversarial|| + 1e-4), both at `last_layer` (the weight of the decoder's
    last convolution), clamped to [0, 1e4], times `weight`. Costs two backward passes down to that layer; both losses
    keep their graphs.
    """
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    ratio: Tensor = wanted.float().norm() / (adversarial.float().norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach() * weight
