"""The evaluators that ship: what they know of held-out scenes, what they look like on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmd_bench.data.source import scenes_digest
from lmd_bench.evaluators.check import classifier_accuracy, ranked_first
from lmd_bench.evaluators.classifier import open_classifier
from lmd_bench.evaluators.clip import open_scenes_clip
from lmd_bench.evaluators.files import CLASSIFIER_FILE, CLIP_CONFIG, CLIP_FILE, SHIPPED, checked_file, read_metadata
from lmd_bench.evaluators.training_scenes import SCENES_SEED, ScenesSet, held_out_scenes

CPU = torch.device("cpu")
FILES = (CLASSIFIER_FILE, CLIP_FILE)


@pytest.fixture(scope="module")
def scenes() -> ScenesSet:
    return held_out_scenes(500, 64, CPU)


def test_the_classifier_names_nine_in_ten_held_out_scenes(scenes: ScenesSet) -> None:
    assert classifier_accuracy(open_classifier(CPU)[0], scenes) >= 0.9


def test_clip_ranks_the_true_caption_first_among_ten_for_four_in_five_scenes(scenes: ScenesSet) -> None:
    assert ranked_first(open_scenes_clip(CPU), scenes) >= 0.8


def test_clip_tells_scenes_from_grey_and_true_captions_from_others(scenes: ScenesSet) -> None:
    clip = open_scenes_clip(CPU)
    images, captions = scenes.images[:64], scenes.captions[:64]
    own = clip.similarity(images, captions).mean()
    assert own > clip.similarity(images, captions[1:] + captions[:1]).mean() + 0.5
    assert own > clip.similarity(torch.full_like(images, 128), captions).mean() + 0.5


def test_clip_hears_every_word_of_a_caption(scenes: ScenesSet) -> None:
    """Above chance by far for each kind of word, though not equally well."""
    clip = open_scenes_clip(CPU)
    images, captions = scenes.images[:200], scenes.captions[:200]
    own = clip.similarity(images, captions)
    words = [("red", "blue"), ("left", "right"), ("bright", "dark"), ("small", "large"), ("disc", "star")]
    for pair in words:
        swap = dict(zip(pair, pair[::-1], strict=True))
        changed = [" ".join(swap.get(word, word) for word in caption.split()) for caption in captions]
        differs = torch.tensor([text != caption for text, caption in zip(changed, captions, strict=True)])
        assert differs.sum() >= 20
        assert (own > clip.similarity(images, changed))[differs].float().mean() > 0.85, pair


def test_open_clip_loads_the_folder_by_itself_and_computes_the_same(scenes: ScenesSet) -> None:
    import open_clip

    folder = f"local-dir:{SHIPPED / 'clip'}"
    network, _, preprocess = open_clip.create_model_and_transforms(folder)
    network.eval()
    images, captions = scenes.images[:8], scenes.captions[:8]
    from PIL import Image

    pictures = [preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    with torch.no_grad():
        found = network.encode_image(torch.stack(pictures), normalize=True)
        texts = network.encode_text(open_clip.get_tokenizer(folder)(captions), normalize=True)
    expected = open_scenes_clip(CPU).similarity(images, captions)
    torch.testing.assert_close((found * texts).sum(1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_file_is_small_half_precision_and_says_how_it_was_made(name: str) -> None:
    path = checked_file(SHIPPED, name).path
    assert path.stat().st_size < 4 * 2**20
    assert {value.dtype for value in load_file(path).values()} <= {torch.float16, torch.int64}
    metadata = read_metadata(path)
    assert (
        metadata["command"] == f"lmd-bench evaluators train {'clip' if name == CLIP_FILE else 'classifier'} --out DIR"
    )
    assert metadata["scenes_digest"] == scenes_digest(SCENES_SEED, 64)
    assert metadata.keys() >= {"steps", "batch_size", "lr", "num_scenes", "seed", "precision", "torch"}


def test_nothing_else_ships() -> None:
    shipped = {path.relative_to(SHIPPED).as_posix() for path in Path(SHIPPED).rglob("*") if path.is_file()}
    assert shipped == {*FILES, CLIP_CONFIG, "manifest.json"}
