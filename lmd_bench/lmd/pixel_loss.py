"""Fine-tuning on pixels through the frozen projector, for data that it was not made for (paper sec. 4.4).

A projector that reconstructs unseen data badly makes latents that are poor targets. The paper then adds the error of
the decoded image, ||x - x_hat||^2 with x_hat = G(LSMD(E(x))), and trains the ViT's blocks alone: gradients pass
through G and change nothing in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from lmd_bench.projector.base import LatentProjector


def pixel_loss(projector: LatentProjector, latents: Tensor, images: Tensor) -> Tensor:
    """() mean squared error of decoded `latents` (B, C, h, w) to `images` (B, 3, H, W), both in [0, 1].

    The error is that of the image as it is shown, so a pixel decoded beyond [0, 1] is clamped and pulls at nothing.
    """
    return F.mse_loss(projector.decode(latents), images)


def parameters_outside_blocks(network: MaskedAutoencoder) -> list[nn.Parameter]:
    """What fine-tuning "the ViT blocks only" leaves alone: embeddings, norms between the parts, and the head."""
    inside = {id(parameter) for part in (network.blocks, network.decoder_blocks) for parameter in part.parameters()}
    return [p for p in network.parameters() if p.requires_grad and id(p) not in inside]


@contextmanager
def left_out_of_the_graph(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What is computed in the block sends no gradients to `parameters`, so that an optimizer passes them by.

    Unlike freezing them this leaves their membership in optimizers and averages as it is, so that it can begin in
    the middle of a run, and warm-up steps taken from all over a run leave nothing behind.
    """
    changed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
