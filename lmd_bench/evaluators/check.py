"""How well the scenes evaluators know held-out scenes."""

from __future__ import annotations

import torch
from torch import Tensor

from lmd_bench.errors import DataError
from lmd_bench.evaluators.resnet import ScenesClassifier
from lmd_bench.evaluators.training_scenes import ScenesSet
from lmd_bench.metrics.clip_score import ClipModel
from lmd_bench.seeding import derive_seed

NUM_CANDIDATES = 10
_BATCH = 128


@torch.no_grad()
def classifier_accuracy(model: ScenesClassifier, scenes: ScenesSet) -> float:
    """Share of scenes whose class the model names, in [0, 1]. The model stands in evaluation mode."""
    found = torch.cat([model(images.float() / 255.0).argmax(dim=1) for images in scenes.images.split(_BATCH)])
    return float((found == scenes.facts["class"]).float().mean())


def ranked_first(clip: ClipModel, scenes: ScenesSet, seed: int = 0) -> float:
    """Share of scenes whose own caption is nearer than nine others', in [0, 1]; a tie is lost.

    The nine are drawn by `seed` among the set's wordings but the scene's own, none of them twice. Raises DataError for
    fewer than ten different captions.
    """
    candidates = candidate_captions(scenes.captions, seed).to(scenes.images.device)
    images = torch.cat([clip.encode_images(part) for part in scenes.images.split(_BATCH)])
    cosines = (images @ clip.encode_texts(scenes.captions).T).gather(1, candidates)
    return float((cosines[:, :1] > cosines[:, 1:]).all(dim=1).float().mean())


def candidate_captions(captions: list[str], seed: int) -> Tensor:
    """(N, 10) indices: each caption's own, then nine in random order; all ten read differently."""
    require_candidates(captions)
    first: dict[str, int] = {}  # a scene for each wording, so that no rival stands twice
    for index, caption in enumerate(captions):
        first.setdefault(caption, index)
    one_of_each = torch.tensor(list(first.values()))
    own = torch.tensor([first[caption] for caption in captions])
    generator = torch.Generator().manual_seed(derive_seed("caption candidates", seed))
    keys = torch.rand(len(captions), len(first), generator=generator)
    keys.masked_fill_(own[:, None] == one_of_each[None, :], 2.0)  # an equal caption is no wrong answer
    others = one_of_each[keys.argsort(dim=1)[:, : NUM_CANDIDATES - 1]]
    return torch.cat((torch.arange(len(captions))[:, None], others), dim=1)


def require_candidates(captions: list[str]) -> None:
    """Raise DataError where captions are too alike for nine different wrong ones."""
    if (different := len(set(captions))) < NUM_CANDIDATES:
        raise DataError(f"scenes: {different} different captions, ranking takes {NUM_CANDIDATES}; take more scenes")
