"""Weights of evaluators on disk: written in half precision, checked against their manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lmd_bench.errors import WeightsError
from lmd_bench.evaluators.classifier import open_classifier
from lmd_bench.evaluators.clip import open_scenes_clip
from lmd_bench.evaluators.files import (
    CLASSIFIER_FILE,
    CLIP_CONFIG,
    CLIP_FILE,
    MANIFEST,
    SHIPPED,
    checked_file,
    note_files,
    prepare_folder,
    read_metadata,
    save_half,
)

CPU = torch.device("cpu")


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "weights"))


def test_a_model_is_written_in_half_precision_with_its_metadata_and_hash(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    save_half(model, tmp_path, "sub/a.safetensors", {"command": "none"})
    file = checked_file(tmp_path, "sub/a.safetensors")
    assert read_metadata(file.path) == {"command": "none"}
    found = load_file(file.path)
    assert found["0.weight"].dtype == torch.float16
    assert found["1.num_batches_tracked"].dtype == torch.int64
    torch.testing.assert_close(found["0.weight"].float(), model[0].weight, rtol=1e-3, atol=1e-4)


def test_the_manifest_keeps_what_it_says_of_other_files(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "new")
    for name in ("a", "b"):
        (tmp_path / "new" / name).write_text(name)
        note_files(tmp_path / "new", [name])
    assert sorted(json.loads((tmp_path / "new" / MANIFEST).read_text())) == ["a", "b"]


@pytest.mark.parametrize("name", [CLASSIFIER_FILE, CLIP_FILE, CLIP_CONFIG])
def test_a_changed_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = copied(tmp_path)
    path = folder / name
    body = path.read_bytes()
    path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    use = open_classifier if name == CLASSIFIER_FILE else open_scenes_clip
    with pytest.raises(
        WeightsError, match=r"SHA-256 \w{16}\.\.\. is not \w{16}\.\.\. of its manifest; reinstall lmd-b"
    ):
        use(CPU, folder)
    path.unlink()
    with pytest.raises(WeightsError, match=r"cannot be read \(No such file or directory\); reinstall"):
        use(CPU, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "not a manifest"), ("[]", "not a manifest of file"), ("{}", "says nothing about")],
)
def test_a_manifest_that_does_not_vouch_for_a_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    folder = copied(tmp_path)
    (folder / MANIFEST).unlink()
    if text is not None:
        (folder / MANIFEST).write_text(text)
    with pytest.raises(WeightsError, match=message):
        open_classifier(CPU, folder)


@pytest.mark.parametrize("kind", ["classifier", "clip"])
def test_the_weights_of_another_network_are_refused(tmp_path: Path, kind: str) -> None:
    folder = copied(tmp_path)
    name = CLASSIFIER_FILE if kind == "classifier" else CLIP_FILE
    save_half(nn.Linear(3, 2), folder, name, {})
    with pytest.raises(
        WeightsError, match="not the scenes classifier" if kind == "classifier" else "not the weights of"
    ):
        (open_classifier if kind == "classifier" else open_scenes_clip)(CPU, folder)
