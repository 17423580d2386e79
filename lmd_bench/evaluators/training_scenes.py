"""Scenes that the evaluators are trained on and tested on: their pixels, their named facts, their captions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmd_bench.data._scene_layout import CLASSES, COLOURS, GROUNDS, TONES, scene_layout
from lmd_bench.data.scenes import MIN_IMAGE_SIZE, Scenes
from lmd_bench.data.source import FIRST_HELD_OUT_SCENE

SCENES_SEED = 90_241
"""Of the training scenes alone: suites draw theirs from small seeds."""
FIRST_SCENE = 2**41
"""Training scenes lie from here on: no suite's training (0 on) or held-out range (2^40 on) comes near."""
FACTS = {"class": len(CLASSES), "colour": len(COLOURS), "ground": len(GROUNDS), "tone": len(TONES)}
"""Facts that the classifier is trained to tell, with their numbers of values; none changes in a mirror."""
_OTHER_SIDE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class ScenesSet:
    """N scenes of one size."""

    images: Tensor
    """(N, 3, S, S), uint8."""
    facts: dict[str, Tensor]
    """Each of FACTS: (N,) int64."""
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)


def training_scenes(num_scenes: int, image_size: int, device: torch.device) -> ScenesSet:
    """Scenes to train evaluators on."""
    return _draw(SCENES_SEED, FIRST_SCENE + torch.arange(num_scenes), image_size, device)


def held_out_scenes(num_scenes: int, image_size: int, device: torch.device, seed: int = 0) -> ScenesSet:
    """The scenes that a suite with `data.seed` = `seed` holds out; evaluators never saw them."""
    return _draw(seed, FIRST_HELD_OUT_SCENE + torch.arange(num_scenes), image_size, device)


def held_out_captions(num_scenes: int, seed: int = 0) -> list[str]:
    """Their captions alone; nothing is drawn."""
    return Scenes(seed, MIN_IMAGE_SIZE).captions(FIRST_HELD_OUT_SCENE + torch.arange(num_scenes))


def mirrored_caption(caption: str) -> str:
    """The caption of a scene in a mirror: left and right change places, everything else stays."""
    return " ".join(_OTHER_SIDE.get(word, word) for word in caption.split(" "))


def _draw(seed: int, indices: Tensor, image_size: int, device: torch.device) -> ScenesSet:
    scenes = Scenes(seed, image_size)
    layout = scene_layout(seed, indices)
    facts = {"class": layout.label, "colour": layout.colour, "ground": layout.ground, "tone": layout.tone}
    return ScenesSet(
        images=scenes.render(indices, device),
        facts={name: value.to(device) for name, value in facts.items()},
        captions=scenes.captions(indices),
    )
