"""The scenes that evaluators are trained on: unlike any suite's, and what a mirror does to their captions."""

from __future__ import annotations

from dataclasses import replace

import torch

from lmd_bench.data._scene_layout import scene_captions, scene_layout
from lmd_bench.data.scenes import Scenes
from lmd_bench.data.source import FIRST_HELD_OUT_SCENE
from lmd_bench.evaluators.training_scenes import (
    FACTS,
    FIRST_SCENE,
    held_out_scenes,
    mirrored_caption,
    training_scenes,
)

CPU = torch.device("cpu")


def test_training_scenes_lie_beyond_every_range_of_a_suite() -> None:
    assert FIRST_SCENE >= FIRST_HELD_OUT_SCENE + 10**9
    train, held_out = training_scenes(8, 16, CPU), held_out_scenes(8, 16, CPU)
    assert not (train.images[:, None] == held_out.images[None]).all(dim=(2, 3, 4)).any()


def test_a_set_holds_images_facts_and_captions_of_the_same_scenes() -> None:
    scenes = held_out_scenes(5, 16, CPU, seed=3)
    indices = FIRST_HELD_OUT_SCENE + torch.arange(5)
    assert len(scenes) == 5
    assert torch.equal(scenes.images, Scenes(3, 16).render(indices))
    assert torch.equal(scenes.facts["class"], Scenes(3, 16).labels(indices))
    assert scenes.captions == Scenes(3, 16).captions(indices)
    assert all(0 <= int(value) < FACTS[name] for name, values in scenes.facts.items() for value in values)


def test_a_mirrored_caption_is_that_of_the_mirrored_scene() -> None:
    layout = scene_layout(0, torch.arange(300))
    mirrored = replace(layout, center_x=1.0 - layout.center_x)
    assert [mirrored_caption(text) for text in scene_captions(layout)] == scene_captions(mirrored)
    assert mirrored_caption("a ring on the left") == "a ring on the right"
