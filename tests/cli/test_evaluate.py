"""`evaluate` on two folders and on runs: tables, files, and refusals in one line with exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.captioned import write_images
from helpers.commands import lmd_bench
from helpers.official import CASES, randomized
from PIL import Image

from lmd_bench.evaluation.runs import IMAGE_QUALITY_FILE
from lmd_bench.records import PICTURES, QUALITY_BOUNDS, ImageQuality, read_run
from tests.evaluation.fakes import CountingFeatures, use_counting_features

COUNT = 8


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of scenes under the same names, with captions beside them. Nothing may change them: copy them."""
    root = tmp_path_factory.mktemp("sides")
    captions = write_images(root / "real", COUNT)
    write_images(root / "fake", COUNT, seed=1)
    lines = ["file,caption", *(f'{name},"{caption}"' for name, caption in captions.items())]
    (root / "captions.csv").write_text("\n".join(lines))
    return root / "real", root / "fake"


@pytest.fixture(scope="module")
def features() -> Iterator[CountingFeatures]:
    with pytest.MonkeyPatch.context() as patched:
        yield use_counting_features(patched)


# -- two folders --------------------------------------------------------------------------------------------------


def test_two_folders_give_a_table_what_is_missing_and_a_file(
    sides: tuple[Path, Path], features: CountingFeatures, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    done = lmd_bench("evaluate", "--real", sides[0], "--fake", sides[1], "--device", "cpu", "--offline", "--out", out)
    assert done.code == 0, done.err
    assert "fake against real, 32 px" in done.out
    table = [line.split("│") for line in done.out.splitlines() if line.startswith("│")]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in table}
    quality = ImageQuality.model_validate(json.loads(out.read_text()))
    assert rows["FID"] == [f"{quality.values['fid']:.4f}", "tiny features", str(COUNT)]
    assert rows["SSIM"][1] == "-"
    assert "CLIP-score: not measured: no CLIP weights" in done.out
    assert "tiny features: none, SHA-256 0000000000000000; resized none" in done.out


def test_only_the_metrics_that_are_asked_for_are_measured(
    sides: tuple[Path, Path], features: CountingFeatures, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    words = ("--metrics", "fid,psnr", "--num-images", 6, "--image-size", 16, "--seed", 3, "--out", out)
    done = lmd_bench("evaluate", "--real", sides[0], "--fake", sides[1], "--device", "cpu", *words)
    assert done.code == 0, done.err
    quality = ImageQuality.model_validate(json.loads(out.read_text()))
    assert (quality.num_images, quality.image_size, quality.seed) == (6, 16, 3)
    assert quality.values.keys() == {"fid", "psnr_db"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fake", "REAL"), "give a run"),
        (("--real", "REAL"), "--real: name the other folder with --fake DIR"),
        (("RUN", "--real", "REAL", "--fake", "FAKE"), "--real: give either a run or two folders"),
        (("RUN", "--captions", "x.csv", "--seed", "1"), "--captions, --seed: for two folders only; leave it out"),
        (("--real", "REAL", "--fake", "FAKE", "--force"), "--force: for a run only; leave it out"),
        (("--real", "REAL", "--fake", "FAKE", "--metrics", "fid,lpip"), "no metric 'lpip'; did you mean 'lpips'?"),
        (("--real", "REAL", "--fake", "FAKE", "--metrics", ","), "--metrics names no metric"),
        (("--real", "REAL", "--fake", "FAKE", "--evaluators", "small"), "--evaluators: Input should be 'real' or"),
        (("--real", "REAL", "--fake", "FAKE", "--out", "figures.txt"), "give the file that ending"),
        (("--real", "REAL", "--fake", "FAKE", "--out", "nowhere/figures.json"), "no folder nowhere; name a file"),
        (("--real", "REAL", "--fake", "FAKE", "--captions", "none.csv"), "captions cannot be read"),
        (("--real", "REAL", "--fake", "FAKE", "--weights", "nowhere"), "--weights nowhere: no such folder"),
        (("--real", "REAL", "--fake", "nowhere"), "--fake nowhere: no such folder"),
        (("--real", "REAL", "--fake", "FAKE", "--statistics", "FAKE"), "a folder; name a file"),
        (("--real", "REAL", "--fake", "FAKE", "--statistics", "FILE/real.safetensors"), "is no folder; name a file"),
        (("--real", "REAL", "--fake", "FAKE", "--statistics", "x", "--metrics", "psnr"), "--statistics: none of fid"),
        (("--real", "REAL", "--fake", "FAKE", "--captions", "x", "--metrics", "fid"), "--captions: clip_score is not"),
        (
            ("--real", "REAL", "--fake", "FAKE", "--clip-model", "ViT-B-32", "--evaluators", "scenes"),
            "--clip-model: the scenes evaluators have a CLIP of their own; leave it out",
        ),
        (
            ("--real", "REAL", "--fake", "FAKE", "--clip-pretrained", "openai", "--metrics", "fid"),
            "--clip-pretrained: clip_score is not among the metrics; leave it out",
        ),
        (("RUN",), "no such folder; give a cell's folder, or OUT/<suite>"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    sides: tuple[Path, Path], words: tuple[str, ...], message: str
) -> None:
    file = sides[0].parent / "captions.csv"
    places = {"REAL": sides[0], "FAKE": sides[1], "RUN": "no-run", "FILE/real.safetensors": file / "real.safetensors"}
    done = lmd_bench("evaluate", *(places.get(word, word) for word in words))
    assert done.code == 2
    assert done.out == ""
    assert message in " ".join(done.err.split())
    assert done.err.count("error:") == 1


def test_every_fault_of_the_images_is_told_and_no_table_is_printed(sides: tuple[Path, Path], tmp_path: Path) -> None:
    fake = shutil.copytree(sides[1], tmp_path / "fake")
    (fake / "00001.png").write_text("no image")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(fake / "00002.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(fake / "00003.png")
    done = lmd_bench("evaluate", "--real", sides[0], "--fake", fake, "--device", "cpu")
    assert done.code == 2
    assert done.out == ""
    assert done.err.count("error:") == 3
    for name in ("00001.png", "00002.png", "00003.png"):
        assert name in done.err


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def some_cells(finished: Path, tmp_path: Path) -> Path:
    """Two rows of the finished run, whose suite says nothing of image quality."""
    folder = tmp_path / "small"
    for row in ("mae", "ddpm"):
        shutil.copytree(finished / "small" / row, folder / row)
    shutil.copy(finished / "small" / "suite.yaml", folder)
    return folder


def test_a_run_gets_its_figures_pictures_and_report(some_cells: Path, features: CountingFeatures) -> None:
    done = lmd_bench("evaluate", some_cells, "--num-images", 6, "--batch-size", 4, "--device", "cpu", "--offline")
    assert done.code == 0, done.err
    assert "mae seed 0: FID " in done.out
    assert "; N = 6" in done.out
    assert "LPIPS: not measured: no AlexNet weights" in done.out
    assert "report:" in done.out
    for row, names in (
        ("mae", {"original", "masked", "filled"}),
        ("ddpm", {"original", "masked", "filled", "samples"}),
    ):
        record = read_run(some_cells / row / "seed-0" / "record.json")
        assert record.image_quality is not None
        assert record.image_quality.num_images == 6
        assert {path.stem for path in (some_cells / row / "seed-0" / PICTURES).iterdir()} == names
    assert (some_cells / QUALITY_BOUNDS).is_file()
    cell = some_cells / "mae" / "seed-0"
    words = ("evaluate", cell, "--batch-size", 4, "--device", "cpu")
    before = (cell / "record.json").read_bytes()
    again = lmd_bench(*words, "--num-images", 6, "--metrics", "psnr")
    assert again.code == 0
    assert "mae seed 0: measured before; --force measures it again" in again.out
    fewer = lmd_bench(*words, "--num-images", 5)
    assert fewer.code == 1
    assert "mae seed 0: not measured: its figures are of other settings: 6 images, not 5; --force" in fewer.out
    assert (cell / "record.json").read_bytes() == before


def test_a_cell_that_cannot_be_measured_says_why_and_the_command_fails(
    some_cells: Path, features: CountingFeatures
) -> None:
    (some_cells / "mae" / "seed-0" / "weights.safetensors").unlink()
    done = lmd_bench("evaluate", some_cells, "--num-images", 6, "--batch-size", 4, "--device", "cpu")
    assert done.code == 1
    assert "mae seed 0: not measured:" in done.out
    assert "ddpm seed 0: FID " in done.out
    assert "1 cell could not be measured" in done.err


def test_an_imported_checkpoint_is_measured_on_a_folder_and_needs_one(
    sides: tuple[Path, Path], features: CountingFeatures, tmp_path: Path
) -> None:
    case = CASES["mae"]
    torch.save({"model": randomized(case.build().to_official())}, tmp_path / "mae.pth")
    settings = [word for setting in case.settings for word in ("--set", setting)]
    cell = tmp_path / "cell"
    assert lmd_bench("checkpoint", "import", "mae", tmp_path / "mae.pth", "--out", cell, *settings).code == 0
    bare = lmd_bench("evaluate", cell, "--device", "cpu")
    assert bare.code == 2
    assert "imported weights have no images of their own: name a folder with --data DIR" in bare.err
    images = tmp_path / "images"
    write_images(images, 20)
    words = ("evaluate", cell, "--data", images, "--num-images", 5, "--device", "cpu", "--offline")
    done = lmd_bench(*words)
    assert done.code == 0, done.err
    quality = ImageQuality.model_validate(json.loads((cell / IMAGE_QUALITY_FILE).read_text()))
    assert quality.num_images == 5
    assert {path.stem for path in (cell / PICTURES).iterdir()} == {"original", "masked", "filled"}
    again = lmd_bench(*words)
    assert again.code == 2
    assert "--force measures it again" in again.err
    for number, code in ((20, 0), (21, 2)):  # nothing was trained on them here, so all of them can be used
        more = lmd_bench("evaluate", cell, "--data", images, "--num-images", number, "--force", "--device", "cpu")
        assert more.code == code, more.err
    assert f"--num-images 21: {images} has 20 images for it; ask for fewer" in more.err
    quality = ImageQuality.model_validate(json.loads((cell / IMAGE_QUALITY_FILE).read_text()))
    assert quality.num_images == 20
