"""`list`, `show`, `doctor` and `--help`."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import lmd_bench
from helpers.without_torch import run_without_torch


def test_list_names_suites_methods_datasets_and_metrics() -> None:
    done = lmd_bench("list")
    assert done.code == 0
    for word in ("demo", "in1k", "ablation", "lmd", "mae", "ddpm", "scenes", "MIT", "TTQ", "simmim", "not built yet"):
        assert word in done.out


def test_list_has_one_column_as_wide_as_the_longest_name_and_knows_lsun() -> None:
    lines = lmd_bench("list").out.splitlines()
    texts = {"lsun-bedrooms": "LSUN", "demo": "Demo: ", "mae": "baselines.mae", "folder": "your own", "MIT": "mean"}
    starts = set()
    for name, text in texts.items():
        starts.add(next(line for line in lines if line.startswith(f"  {name} ")).index(text))
    assert starts == {len("  lsun-bedrooms ")}
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
