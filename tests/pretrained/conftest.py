"""A manifest of tiny files, and stores that see nothing of this machine's caches and networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lmd_bench.pretrained import Manifest, WeightsStore

SINGLE = b"weights of a single file"
UNET = b"weights in a folder"
REVISION = "0123456789abcdef0123456789abcdef01234567"
"""Commit of the entry "hubbed"."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry(**values: Any) -> dict[str, Any]:
    return {"what": "a test", "used_for": "tests", "licence": "none", **values}


MANIFEST = Manifest.model_validate(
    {
        "weights": {
            "single": entry(
                title="Single",
                url="https://weights.example/single.pth",
                files=[{"name": "single.pth", "size": len(SINGLE), "sha256": sha256(SINGLE)}],
            ),
            "prefix": entry(
                title="Prefix",
                url="https://weights.example/prefix.pth",
                files=[{"name": "prefix.pth", "sha256_prefix": sha256(SINGLE)[:8]}],
            ),
            "unknown": entry(title="Unknown", url="https://weights.example/u.pth", files=[{"name": "u.pth"}]),
            "hubbed": entry(
                title="Hubbed",
                hub="someone/hubbed",
                revision=REVISION,
                hub_file="model.safetensors",
                files=[{"name": "hubbed.safetensors", "sha256": sha256(SINGLE)}],
            ),
            "folder": entry(
                title="Folder",
                hub="someone/folder",
                is_folder=True,
                files=[
                    {"name": "model_index.json"},
                    {"name": "unet/diffusion_pytorch_model.safetensors", "sha256": sha256(UNET)},
                    {"name": "text_encoder/model.safetensors"},
                ],
            ),
        }
    }
)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders `torch` and `hub` where the libraries would keep downloads; the environment names no weights."""
    for name in ("LMD_BENCH_WEIGHTS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    (tmp_path / "torch" / "checkpoints").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def asked() -> list[str]:
    """URLs whose host was tried."""
    return []


@pytest.fixture
def store_of(tmp_path: Path, asked: list[str]) -> Callable[..., WeightsStore]:
    """Makes a store over MANIFEST whose hosts do not answer unless told."""

    def make(folder: Path | None = None, *, answers: bool = False, **values: Any) -> WeightsStore:
        def can_reach(url: str) -> bool:
            asked.append(url)
            return answers

        defaults = {"manifest": MANIFEST, "hash_cache": tmp_path / "hashes.json", "can_reach": can_reach}
        return WeightsStore(folder, **{**defaults, **values})

    return make


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """An empty folder of the user's."""
    folder = tmp_path / "given"
    folder.mkdir()
    return folder


def fill_folder(place: Path) -> Path:
    """All that the entry "folder" must have."""
    for name, content in (
        ("model_index.json", b"{}"),
        ("unet/diffusion_pytorch_model.safetensors", UNET),
        ("text_encoder/model.safetensors", b"any"),
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def hub_snapshot(caches: Path, repository: str) -> Path:
    """An empty snapshot as the Hugging Face cache keeps it."""
    place = caches / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc123")
    snapshot = place / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    return snapshot
