"""`list`, `show`, `doctor` and `--help`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.commands import lmd_bench
from helpers.without_torch import run_without_torch


def test_list_names_suites_methods_datasets_and_metrics() -> None:
    done = lmd_bench("list")
    assert done.code == 0
    for word in ("demo", "in1k", "ablation", "lmd", "mae", "ddpm", "scenes", "MIT", "TTQ", "simmim", "LPIPS", "FID"):
        assert word in done.out


def test_list_has_one_column_as_wide_as_the_longest_name_and_knows_lsun() -> None:
    lines = lmd_bench("list").out.splitlines()
    texts = {"lsun-bedrooms": "LSUN", "demo": "Demo: ", "mae": "baselines.mae", "folder": "your own", "MIT": "mean"}
    starts = set()
    for name, text in texts.items():
        starts.add(next(line for line in lines if line.startswith(f"  {name} ")).index(text))
    assert len(starts) == 1
    assert "LSUN's LMDB folders" in next(line for line in lines if line.startswith("  folder "))


@pytest.mark.parametrize("words", [["--help"], ["list"]])
def test_help_and_list_never_import_torch(words: list[str]) -> None:
    done = run_without_torch(f"sys.argv = ['lmd-bench', *{words!r}]; from lmd_bench.cli import main; main()")
    assert done.returncode == 0, done.stderr


def test_show_resolves_a_suite_and_a_method() -> None:
    suite = lmd_bench("show", "ablation")
    assert suite.code == 0
    assert "wo-mds" in suite.out
    assert "SD-v1.4" in suite.out
    method = lmd_bench("show", "lmd")
    assert "mask_schedule" in method.out
    assert "projector.path" in method.out
    nested = lmd_bench("show", "simmim").out
    assert "backbone: kind swin or kind vit = kind swin" in nested
    assert "backbone.window_size (kind swin): int = 6" in nested
    assert "backbone.layer_scale (kind vit): float = 0.1" in nested
    unknown = lmd_bench("show", "lmdd")
    assert unknown.code == 2
    assert "did you mean 'lmd'" in unknown.err


def test_doctor_shows_machine_versions_and_weights() -> None:
    done = lmd_bench("doctor")
    assert done.code == 0
    assert torch.__version__ in done.out
    assert "shipped:scenes-kl-f8: found" in done.out


def test_doctor_lists_published_weights_found_missing_and_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"not those")
    done = lmd_bench("doctor", "--weights", tmp_path, "--offline")
    assert done.code == 0
    assert "alexnet: missing" in done.out
    assert "put alexnet-owt-7be5be79.pth into --weights DIR" in done.out
    assert "from https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in done.out
    assert "vgg16: wrong" in done.out
    assert "wrong hash: expected 397923af" in done.out
    assert "offline: nothing is downloaded" in done.out


@pytest.mark.parametrize("command", ["doctor", "run"])
def test_a_weights_folder_that_is_not_there_is_refused(tmp_path: Path, command: str) -> None:
    done = lmd_bench(command, "--weights", tmp_path / "nowhere")
    assert done.code == 2
    assert done.err.strip().endswith(f"--weights {tmp_path / 'nowhere'}: no such folder")
    assert done.out == ""
