"""The health of a codebook: how much of it is used, and two ways to keep it in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_KMEANS_ROUNDS = 10
_VECTORS_AT_ONCE = 4096


@dataclass(frozen=True)
class CodebookUse:
    """What a count of chosen codes says."""

    usage: float  # share of the codes that were chosen at all, 0 to 1
    perplexity: float  # exp of the entropy in nats: as many codes, chosen equally often, would be as uncertain; 1 to K
    dead: int  # codes never chosen


def codebook_use(counts: Tensor) -> CodebookUse:
    """From how often each code was chosen, (K,), any number type; all zeros give a usage and a perplexity of 0."""
    total = counts.sum()
    dead = int((counts == 0).sum())
    if total == 0:
        return CodebookUse(0.0, 0.0, dead)
    shares = counts.double() / total
    entropy = -torch.xlogy(shares, shares).sum()
    return CodebookUse(1.0 - dead / len(counts), float(entropy.exp()), dead)


def count_codes(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code stands in `indices` (any shape, int64): int64 (num_codes,)."""
    return torch.bincount(indices.flatten(), minlength=num_codes)


def positions(latents: Tensor) -> Tensor:
    """Latents (B, d, h, w) as one vector per position: (B h w, d)."""
    return latents.movedim(1, -1).flatten(0, -2)


def kmeans(vectors: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Centres (num_codes, d) of `vectors` (N, d), by ten of Lloyd's rounds from randomly chosen vectors.

    A centre that no vector is nearest to goes onto a randomly chosen vector. Fewer vectors than codes are taken more
    than once, each time a little displaced (by 1 % of their standard deviation), so that no two codes are equal.
    `generator` is one of the CPU.
    """
    spread = vectors.std(0, correction=0)

    def drawn(number: int) -> Tensor:
        order = torch.randperm(len(vectors), generator=generator)
        chosen = vectors[order.repeat(-(-number // len(order)))[:number].to(vectors.device)]
        noise = torch.randn(chosen.shape, generator=generator).to(vectors.device)
        return chosen + 0.01 * spread * noise

    centres = drawn(num_codes)
    for _ in range(_KMEANS_ROUNDS):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors.split(_VECTORS_AT_ONCE)])
        counts = count_codes(nearest, num_codes)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where((counts == 0)[:, None], drawn(num_codes), sums / counts.clamp(min=1)[:, None])
    return centres


@torch.no_grad()
def revive_dead_codes(
    codebook: Tensor, counts: Tensor, latents: Tensor, moments: list[Tensor], generator: torch.Generator
) -> int:
    """Puts codes with a count of 0 onto randomly chosen positions of `latents`; how many there were.

    codebook (K, d) and the optimizer's `moments` of the same shape are changed in place: a code in a new place starts
    with none. No more codes are moved at once than there are positions, each position takes one code. `generator` is
    one of the CPU. Our own addition; LMD and VQGAN leave dead codes dead.
    """
    dead = (counts == 0).nonzero().flatten()
    vectors = positions(latents)
    dead = dead[torch.randperm(len(dead), generator=generator)[: len(vectors)].to(dead.device)]
    chosen = torch.randperm(len(vectors), generator=generator)[: len(dead)].to(vectors.device)
    codebook[dead] = vectors[chosen].to(codebook.dtype)
    for moment in moments:
        moment[dead] = 0.0
    return len(dead)
