"""The manifest that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.without_torch import run_without_torch

from lmd_bench.errors import WeightsError
from lmd_bench.nn.perceptual import _TRUNKS
from lmd_bench.pretrained import read_manifest
from lmd_bench.pretrained.store import _WEIGHTS_SUFFIXES

NAMES = {
    "inception",
    "alexnet",
    "vgg16",
    "clip-vit-l-14",
    "clip-vit-b-32",
    "clip-vit-b-32-laion2b",
    "stable-diffusion-v1-4",
    "amused-256",
    "amused-512",
}


def test_it_names_all_that_the_project_asks_for() -> None:
    assert set(read_manifest().weights) == NAMES


def test_every_hash_has_a_source_and_agrees_with_the_files_own_name() -> None:
    for name, entry in read_manifest().weights.items():
        for file in entry.files:
            assert bool(file.known_hash) == bool(file.hash_source), name
            stem = file.name.rpartition(".")[0].rpartition("-")[2]
            if entry.url is not None:
                assert file.known_hash.startswith(stem), f"{file.name} carries the first digits"
                assert entry.url.endswith(f"/{file.name}")
        assert entry.licence
        assert entry.about_mib > 50


def test_single_files_have_names_that_do_not_clash_in_one_folder() -> None:
    names = [entry.files[0].name for entry in read_manifest().weights.values() if not entry.is_folder]
    assert len(set(names)) == len(names)
    assert all(name.endswith(_WEIGHTS_SUFFIXES) for name in names)


def test_folders_are_read_from_safetensors_and_complete_for_diffusers() -> None:
    for entry in read_manifest().weights.values():
        if not entry.is_folder:
            continue
        names = {file.name for file in entry.files}
        assert {"model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"} <= names
        assert not any(name.endswith(".bin") for name in names)
        parts = {name.partition("/")[0] for name in names if name.endswith(".safetensors")}
        assert all(f"{part}/config.json" in names for part in parts)


def test_the_libraries_look_for_the_same_files() -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as inception
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = read_manifest().weights
    assert weights["inception"].url == inception.URL_INCEPTION_V3
    assert weights["alexnet"].url == AlexNet_Weights.IMAGENET1K_V1.url
    assert weights["vgg16"].url == VGG16_Weights.IMAGENET1K_V1.url
    assert weights["alexnet"].files[0].name == _TRUNKS["alex"].file
    assert weights["vgg16"].files[0].name == _TRUNKS["vgg"].file


def test_open_clip_takes_the_same_repositories() -> None:
    from open_clip import get_pretrained_cfg

    weights = read_manifest().weights
    for name, model, tag in (
        ("clip-vit-l-14", "ViT-L-14", "openai"),
        ("clip-vit-b-32", "ViT-B-32", "openai"),
        ("clip-vit-b-32-laion2b", "ViT-B-32", "laion2b_s34b_b79k"),
    ):
        assert get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/") == weights[name].hub


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "not a readable manifest"),
        ("a: {title: A}", "weights.a.what: Field required"),
        ("a: {title: A, what: w, used_for: u, licence: l, files: [{name: f}]}", "give either url or hub"),
        (
            f"a: {{title: A, what: w, used_for: u, licence: l, url: x, revision: {'a' * 40}, files: [{{name: f}}]}}",
            "a revision is of a hub repository",
        ),
        (
            "a: {title: A, what: w, used_for: u, licence: l, hub: x/y, revision: a6f597a3, files: [{name: f}]}",
            "weights.a.revision",
        ),
        (
            "a: {title: A, what: w, used_for: u, licence: l, url: x, files: [{name: f, sha256: '12'}]}",
            "weights.a.files.0.sha256",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_says_where(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "manifest.yaml"
    file.write_text(text)
    with pytest.raises(WeightsError) as raised:
        read_manifest(file)
    assert said in str(raised.value)


def test_reading_it_needs_no_torch() -> None:
    done = run_without_torch("import lmd_bench.pretrained as p; p.read_manifest()")
    assert done.returncode == 0, done.stderr
