"""`checkpoint import` and `checkpoint export`, and `reconstruct` of an authors' file, as one types them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.commands import lmd_bench
from helpers.official import CASES, randomized
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

MAE = CASES["mae"]
SETTINGS = [word for setting in MAE.settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A file of MAE's authors, and the tensors in it."""
    path = tmp_path_factory.mktemp("official") / "mae.pth"
    tensors = randomized(MAE.build().to_official())
    torch.save({"model": tensors, "optimizer": {}, "epoch": 3}, path)
    return path, tensors


def test_import_says_what_was_used_and_export_gives_it_back(
    official: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, tensors = official
    cell, back = tmp_path / "cell", tmp_path / "back.safetensors"
    done = lmd_bench("checkpoint", "import", "mae", path, "--out", cell, *SETTINGS)
    assert done.code == 0, done.err
    assert "encoder of width 32, 1 blocks and 2 heads, decoder of width 48, 1 blocks and 3 heads, for" in done.out
    assert "for images of 32 px, 59,744 parameters" in done.out
    assert f"{len(tensors)} of {len(tensors)} keys used, from the entry 'model'" in done.out
    assert "left out" not in done.out
    assert f"use it as --checkpoint {cell}" in done.out
    done = lmd_bench("checkpoint", "export", cell, "--out", back)
    assert done.code == 0, done.err
    assert f"mae, {len(tensors)} tensors, 59,744 parameters" in done.out
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(back).items())


def test_an_authors_file_and_its_imported_cell_reconstruct_alike(
    official: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    Image.effect_noise((32, 32), 60).convert("RGB").save(picture)
    assert lmd_bench("checkpoint", "import", "mae", official[0], "--out", tmp_path / "cell", *SETTINGS).code == 0
    words = ("reconstruct", picture, "--device", "cpu", "--checkpoint")
    done = lmd_bench(*words, official[0], "--method", "mae", *SETTINGS, "--out", tmp_path / "one")
    assert done.code == 0, done.err
    done = lmd_bench(*words, tmp_path / "cell", "--out", tmp_path / "two")
    assert done.code == 0, done.err
    one, two = (tmp_path / folder / "a-reconstructed.png" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_an_imported_generator_samples_and_what_was_left_out_is_named(tmp_path: Path) -> None:
    case, path = CASES["ddim"], tmp_path / "ddim.pth"
    weights = case.build().to_official()
    torch.save([weights, {}, 1, 2, randomized(weights)], path)
    words = [word for setting in (*case.settings, "num_inference_steps=2") for word in ("--set", setting)]
    done = lmd_bench("checkpoint", "import", "ddim", path, "--out", tmp_path / "plain", *words)
    assert "from the first entry of the list" in done.out
    assert "left out beside them: moving average, fifth entry of the list (--ema takes it)" in done.out
    done = lmd_bench("checkpoint", "import", "ddim", path, "--out", tmp_path / "cell", "--ema", *words)
    assert done.code == 0, done.err
    assert "from the moving average, fifth entry of the list" in done.out
    assert "left out" not in done.out
    done = lmd_bench("sample", "--checkpoint", tmp_path / "cell", "--images", 1, "--device", "cpu")
    assert done.code == 0, done.err
    assert (tmp_path / "cell" / "samples" / "sample-0.png").is_file()


def test_an_import_that_cannot_reconstruct_says_so(official: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    heads = [word for word in SETTINGS if "normalize" not in word][:4]
    words = ("checkpoint", "import", "mae", official[0], "--out", tmp_path / "cell", *heads)
    done = lmd_bench(*words, "--set", "normalize_targets=true")
    assert done.code == 0, done.err
    assert "note: it cannot reconstruct pixels: normalised targets" in done.out
    done = lmd_bench("reconstruct", "--checkpoint", tmp_path / "cell", "--device", "cpu")
    assert done.code == 2
    assert "this method cannot reconstruct pixels: normalised targets" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("import", "mea", "x.pth", "--out", "cell"), "no method 'mea' is installed; did you mean 'mae'?"),
        (("import", "mae", "absent.pth", "--out", "cell"), "absent.pth: no such file"),
        (("import", "mae", "page.pth", "--out", "cell"), "page.pth: is a web page or XML, not weights"),
        (("import", "mae", "page.pth", "--out", "cell", "--set", "heads=2"), "MAE has no option 'heads'"),
        (
            ("import", "simmim", "page.pth", "--out", "c", "--set", "backbone.depth=2", "--set", "backbone={}"),
            "--set backbone and --set backbone.depth: give the whole or its parts, not both",
        ),
        (("import", "ddim", "page.pth", "--out", "c", "--set", "image_size=0"), "image_size: Input should be greater"),
        (("import", "mae", "page.pth", "--out", "page.pth"), "--out page.pth: is a file; name a folder"),
        (("export", "cell", "--out", "x.safetensors"), "cell: no such file"),
        (("export", "page.pth", "--out", "x.safetensors"), "page.pth: cannot be read as safetensors"),
        (("export", "page.pth", "--out", "x.pth"), "--out x.pth: the file is written as .safetensors"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_with_code_2(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.pth").write_text("<!doctype html>")
    done = lmd_bench("checkpoint", *words)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.pth"]
