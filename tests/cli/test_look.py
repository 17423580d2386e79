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
    unknown = lmd_bench("show", "lmdd")
    assert unknown.code == 2
    assert "did you mean 'lmd'" in unknown.err


def test_doctor_shows_machine_versions_and_weights() -> None:
    done = lmd_bench("doctor")
    assert done.code == 0
    assert torch.__version__ in done.out
    assert "shipped:scenes-kl-f8: found" in done.out
