"""CLIP-score against open_clip used by hand, with a small random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_clip import CONFIG, write_tiny_clip
from PIL import Image
from torch import Tensor, nn

from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.metrics.clip_score import ClipModel, pretrained_hub

CAPTIONS = ["a red ball at the top left", "a green tree", "a red ball at the top left"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(files: tuple[Path, Path]) -> ClipModel:
    return ClipModel.open(*files)


def pictures(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, 3, H, W) uint8, smooth and noisy parts."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.rand(3, 3, height, width, generator=generator)
    return (255 * (0.7 * smooth + 0.3 * noise)).to(torch.uint8)


def by_hand(files: tuple[Path, Path], images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor, Any]:
    """open_clip as its own page shows it: (preprocessed images, cosines, the network)."""
    import open_clip

    config, weights = files
    folder = weights.parent / "as-a-folder"
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": json.loads(config.read_text())}))
    (folder / "open_clip_model.safetensors").write_bytes(weights.read_bytes())
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    pil = [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]
    inputs = torch.stack([preprocess(image) for image in pil])
    with torch.no_grad():
        seen = network.encode_image(inputs, normalize=True)
        read = network.encode_text(tokens, normalize=True)
    return inputs, (seen * read).sum(dim=1), network


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (12, 12), (48, 65), (50, 33)])
def test_preprocessing_and_score_are_open_clips(
    files: tuple[Path, Path], clip: ClipModel, size: tuple[int, int]
) -> None:
    images = pictures(*size)
    inputs, cosines, network = by_hand(files, images, CAPTIONS)
    torch.testing.assert_close(clip.preprocess(images), inputs, rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.similarity(images, CAPTIONS), cosines, rtol=0, atol=1e-5)
    assert network.logit_scale.exp() > 10  # and is not in the score
    assert clip.similarity(images, CAPTIONS).abs().max() <= 1


def test_negative_cosines_are_kept(clip: ClipModel) -> None:
    embedding = clip.encode_images(pictures(16, 16))
    clip.encode_texts(CAPTIONS)
    opposite = {caption: -embedding[number] for number, caption in enumerate(("x", "y", "z"))}
    clip._texts |= opposite
    torch.testing.assert_close(clip.similarity(pictures(16, 16), ["x", "y", "z"]), torch.full((3,), -1.0))
    for caption in opposite:
        del clip._texts[caption]


def test_a_caption_is_encoded_once(clip: ClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = clip.network.encode_text

    def counted(tokens: Tensor, **options: Any) -> Tensor:
        seen.append(len(tokens))
        found: Tensor = encode(tokens, **options)
        return found

    monkeypatch.setattr(clip.network, "encode_text", counted)
    clip._texts.clear()
    first = clip.encode_texts(CAPTIONS)
    assert torch.equal(clip.encode_texts(CAPTIONS), first)
    assert torch.equal(first[0], first[2])
    assert seen == [2]


def test_facts_say_what_was_measured_with(files: tuple[Path, Path]) -> None:
    clip = ClipModel.open(*files, name="scenes CLIP", suffix="_scenes", sha256="ab" * 32)
    assert clip.facts.model_dump() == {
        "name": "scenes CLIP",
        "weights": "tiny.safetensors",
        "sha256": "ab" * 32,
        "resize": "short side to 16 px, antialiased bicubic, centre crop",
        "num_features": 8,
    }
    assert clip.suffix == "_scenes"
    assert not clip.training
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def test_a_configuration_may_bring_its_own_mean_and_deviation(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    own = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    path.write_text(json.dumps(own))
    clip = ClipModel.open(path, files[1])
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    torch.testing.assert_close(clip.preprocess(white), torch.full((1, 3, 16, 16), 2.0))


def test_weights_may_lie_in_a_pt_file_of_half_precision(
    files: tuple[Path, Path], clip: ClipModel, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    halves = {name: value.half() if value.is_floating_point() else value for name, value in load_file(files[1]).items()}
    torch.save(halves, tmp_path / "half.pt")
    found = ClipModel.open(files[0], tmp_path / "half.pt").similarity(pictures(16, 16), CAPTIONS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, clip.similarity(pictures(16, 16), CAPTIONS), rtol=0, atol=5e-3)


def test_openais_weights_get_their_quick_gelu_and_laions_do_not() -> None:
    """A model of the same shape without it takes the weights and gives wrong figures."""
    from lmd_bench.metrics.clip_score import _known

    assert _known("ViT-L-14", "openai")[0]["quick_gelu"] is True
    assert _known("ViT-B-32", "laion2b_s34b_b79k")[0]["quick_gelu"] is False
    assert _known("ViT-L-14", "laion2b_s32b_b82k")[1]["mean"] == (0.5, 0.5, 0.5)
    assert pretrained_hub("ViT-L-14", "openai") == "timm/vit_large_patch14_clip_224.openai"


def test_unknown_models_and_tags_are_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clip_model: open_clip has no model 'ViT-L-15'; did you mean"):
        pretrained_hub("ViT-L-15", "openai")
    with pytest.raises(ConfigError, match=r"clip_pretrained: ViT-L-14 has no weights 'opena'; did you mean 'openai'"):
        ClipModel.open("ViT-L-14", tmp_path / "x.safetensors", tag="opena")


def test_a_torchscript_archive_is_refused_without_opening_it(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "ViT-L-14.pt"
    write_torchscript(path)
    with pytest.raises(WeightsError, match="is a TorchScript archive, a program, so it is not opened"):
        ClipModel.open(files[0], path)


def write_torchscript(path: Path) -> None:
    """An archive with what torch.jit.save leaves in one; torch itself warns that making them is deprecated."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT-L-14/constants.pkl", b"")
        archive.writestr("ViT-L-14/code/__torch__.py", b"raise SystemExit")


def test_weights_that_do_not_fit_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing\.safetensors: no such file"):
        ClipModel.open(files[0], tmp_path / "missing.safetensors")
    other = tmp_path / "other.pt"
    torch.save({"visual.proj": torch.zeros(2)}, other)
    with pytest.raises(WeightsError, match="not the weights of"):
        ClipModel.open(files[0], other)
    other.write_bytes(b"not a file of weights")
    with pytest.raises(WeightsError, match="not the weights of"):
        ClipModel.open(files[0], other)


def test_configurations_that_cannot_be_measured_with_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(WeightsError, match="needs embed_dim, vision_cfg and text_cfg"):
        ClipModel.open(path, files[1])
    path.write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "squash"}}))
    with pytest.raises(ConfigError, match="resize mode squash; square input by the short side"):
        ClipModel.open(path, files[1])
    path.write_text(json.dumps({**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_model_name": "roberta-base"}}))  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="is not a plain CLIP"):
        ClipModel.open(path, files[1])
