"""`lmd-bench reconstruct`: what it writes, what a method gets to see, and what it refuses."""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.official import CASES
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lmd_bench.checkpoints.official import OfficialRequest, open_official_method
from lmd_bench.cli import main
from lmd_bench.config import DataConfig, RunConfig
from lmd_bench.data.decode import center_square
from lmd_bench.data.folders import scan_folder
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.harness.evaluate import YardstickRunner
from lmd_bench.harness.inference import counted_evaluations, most_common
from lmd_bench.harness.weights import WEIGHTS_FILE, file_sha256, save_weights
from lmd_bench.method import DataSpec
from lmd_bench.nn.masking import pixel_mask
from lmd_bench.reconstruct.checkpoint import Checkpoint, open_cell, open_official, open_run
from lmd_bench.reconstruct.figure6 import draw_figure6
from lmd_bench.reconstruct.fill import TABLE_FILE, Request, reconstruct
from lmd_bench.reconstruct.masks import mask_from_image, random_mask
from lmd_bench.reconstruct.pictures import Picture, held_out_pictures, read_pictures
from lmd_bench.reconstruct.sample import SampleRequest, sample_images
from lmd_bench.records import RunRecord, read_run, write_json
from lmd_bench.registry import load_method

CPU = torch.device("cpu")
SIZES = {
    "encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 32, "decoder_depth": 1,
    "decoder_heads": 2,
}  # fmt: skip
OPTIONS = {
    "lmd": {"projector": {"kind": "kl", "path": "shipped:scenes-kl-f8"}, "patch_size": 1, **SIZES},
    "mae": {"patch_size": 8, **SIZES},
    "ddpm": {
        "block_out_channels": [8, 8], "attention_levels": [1], "num_train_timesteps": 40, "norm_num_groups": 4,
        "layers_per_block": 1, "num_inference_steps": 2,
    },
}  # fmt: skip


def make_cell(folder: Path, name: str, **changes: object) -> Path:
    """A finished cell's folder with untrained weights, images of 32 px, units of 8 px."""
    options = {**OPTIONS[name], **changes}
    config = RunConfig.model_validate(
        {
            "suite": "small", "row": name, "label": name, "method": name, "options": options, "image_size": 32,
            "data": {"name": "scenes", "image_size": 32, "num_train": 64, "num_held_out": 6},
            "recipe": {"batch_size": 4, "lr": {"base": 1e-3}}, "steps": 60, "lr_warmup_steps": 0, "untimed_steps": 0,
            "precision": "fp32", "compile": False, "seed": 0, "device": "cpu", "log_every_steps": 2,
            "evaluation": {"num_images": 6, "unit_px": 8}, "estimator": {},
        }
    )  # fmt: skip
    method_class = load_method(name, {})
    torch.manual_seed(0)
    method = method_class(method_class.Config.model_validate(options), DataSpec(32, 8))
    save_weights(method, folder / WEIGHTS_FILE, config)
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_cell(tmp_path_factory.mktemp(name), name) for name in OPTIONS}


@pytest.fixture(scope="module")
def opened(cells: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: open_run(folder, CPU) for name, folder in cells.items()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures of different shapes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (32, 32)), ("b.jpg", (80, 48)), ("c.webp", (40, 64))):
        noise = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def table(out: Path) -> list[dict[str, str]]:
    with (out / TABLE_FILE).open() as file:
        return list(csv.DictReader(file))


def _pixels(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return np.array(image)


def panels(file: Path) -> list[Tensor]:
    """The three pictures of a PNG, (32, 32, 3) each."""
    whole = torch.from_numpy(_pixels(file))
    assert whole.shape == (32, 3 * 32 + 2 * 4, 3)
    return [whole[:, start : start + 32] for start in (0, 36, 72)]


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_method_fills_pictures_and_writes_them_beside_each_other(
    opened: dict[str, Checkpoint], photos: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    rows = reconstruct(opened[name], read_pictures([photos], 32), Request(), out)
    assert sorted(path.name for path in out.iterdir()) == [*(f"{stem}-reconstructed.png" for stem in "abc"), TABLE_FILE]
    assert [row["image"] for row in table(out)] == ["a.png", "b.jpg", "c.webp"] == [row.image for row in rows]
    for row in table(out):
        assert int(row["hidden_px"]) == 12 * 64
        assert row["tokens"] == {"lmd": "16", "mae": "16", "ddpm": ""}[name]
        assert int(row["function_evaluations"]) == {"lmd": 1, "mae": 1, "ddpm": 2}[name]
        assert 0 < float(row["psnr_hidden_db"]) < 100
        assert -1 <= float(row["ssim"]) <= 1
    original, masked, filled = panels(out / "a-reconstructed.png")
    assert torch.equal(original, torch.from_numpy(_pixels(photos / "a.png")))
    hidden = (masked == 128).all(dim=2)
    assert hidden.sum() >= 12 * 64
    assert torch.equal(filled[~hidden], original[~hidden]), "visible pixels are pasted back"


def test_hidden_pixels_never_reach_the_method(opened: dict[str, Checkpoint], photos: Path, tmp_path: Path) -> None:
    picture = read_pictures([photos / "a.png"], 32)[0]
    reconstruct(opened["lmd"], [picture], Request(), tmp_path / "one")
    _, masked, filled = panels(tmp_path / "one" / "a-reconstructed.png")
    hidden = (masked == 128).all(dim=2)
    spoilt = torch.where(hidden, 255 - picture.pixels, picture.pixels)
    reconstruct(opened["lmd"], [Picture("a.png", spoilt, (32, 32))], Request(), tmp_path / "two")
    assert torch.equal(panels(tmp_path / "two" / "a-reconstructed.png")[2], filled)


@pytest.mark.parametrize("name", ["lmd", "ddpm"])
def test_a_picture_alone_comes_out_as_among_others(
    opened: dict[str, Checkpoint], photos: Path, tmp_path: Path, name: str
) -> None:
    request = Request(levels=4, order="confidence") if name == "lmd" else Request()
    reconstruct(opened[name], read_pictures([photos], 32), request, tmp_path / "all")
    reconstruct(opened[name], read_pictures([photos / "c.webp"], 32), request, tmp_path / "one")
    reconstruct(opened[name], read_pictures([photos / "c.webp"], 32), Request(seed=1), tmp_path / "other")
    among, alone, other = ((tmp_path / out / "c-reconstructed.png").read_bytes() for out in ("all", "one", "other"))
    assert among == alone
    assert alone != other


def test_levels_are_taken_and_counted(opened: dict[str, Checkpoint], photos: Path, tmp_path: Path) -> None:
    pictures = read_pictures([photos / "a.png"], 32)
    for levels, order, passes in ((1, None, 1), (3, "random", 3), (3, "confidence", 4), (0, "random", 9)):
        (row,) = reconstruct(opened["lmd"], pictures, Request(levels=levels, order=order), tmp_path)
        assert row.function_evaluations == passes
        assert row.levels == str(levels or "all")


def test_pictures_of_the_same_name_get_files_of_their_own(
    opened: dict[str, Checkpoint], photos: Path, tmp_path: Path
) -> None:
    (photos / "deeper").mkdir()
    Image.fromarray(_pixels(photos / "b.jpg")).save(photos / "deeper" / "a.png")
    rows = reconstruct(opened["mae"], read_pictures([photos], 32), Request(), tmp_path)
    assert [row.picture for row in rows] == [
        *(f"{stem}-reconstructed.png" for stem in "abc"),
        "a-reconstructed-2.png",
    ]


def test_without_pictures_those_that_the_run_held_out_are_taken(opened: dict[str, Checkpoint]) -> None:
    pictures = held_out_pictures(opened["mae"], 5)
    assert [picture.name for picture in pictures] == [f"held-out-{number}.png" for number in range(5)]
    assert pictures[0].pixels.shape == (3, 32, 32)
    assert pictures[0].pixels.dtype == torch.uint8


def make_folder_cell(cell: Path, images: Path) -> Checkpoint:
    """As a run on a folder of images leaves it, with its record."""
    data = DataConfig.model_validate({"name": "folder", "path": str(images), "image_size": 32, "num_held_out": 3})
    checkpoint = open_run(make_cell(cell, "mae"), CPU)
    assert checkpoint.config is not None
    index = scan_folder(images, data)
    record = RunRecord(
        suite="small", row="mae", label="mae", method="mae", seed=0, status="finished", config={}, config_hash="",
        command="", started_at="", environment={}, num_steps=1, data={"name": "folder", "digest": index.digest},
    )  # fmt: skip
    write_json(cell / "record.json", record)
    return replace(checkpoint, config=checkpoint.config.model_copy(update={"data": data}))


def test_held_out_images_of_a_folder_are_shown_only_while_they_are_those_of_the_run(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
    checkpoint = make_folder_cell(tmp_path / "cell", images)
    assert len(held_out_pictures(checkpoint, 3)) == 3
    (images / "00.png").rename(images / "zz.png")
    with pytest.raises(DataError, match=r"holds other images \(digest \w{16}\) than when the run was trained \(digest"):
        held_out_pictures(checkpoint, 3)
    (tmp_path / "cell" / "record.json").unlink()
    with pytest.raises(ConfigError, match=r"no record\.json beside it says which images .* the run held out"):
        held_out_pictures(checkpoint, 3)


def test_figure_6_walks_the_schedule_with_nested_masks(opened: dict[str, Checkpoint], tmp_path: Path) -> None:
    png, numbers = draw_figure6(opened["lmd"], held_out_pictures(opened["lmd"], 5), 0, tmp_path)
    with Image.open(png) as picture:
        assert picture.width > 1000
    with numbers.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 25
    assert [int(row["visible_tokens"]) for row in rows[:5]] == [13, 10, 5, 4, 4]
    assert len({row["weights_sha256"] for row in rows}) == 1
    with pytest.raises(ConfigError, match="DDPM has no tokens that a schedule masks"):
        draw_figure6(opened["ddpm"], held_out_pictures(opened["ddpm"], 1), 0, tmp_path)


# -- masks ------------------------------------------------------------------------------------------------------------


def save_mask(file: Path, size: tuple[int, int], box: tuple[int, int, int, int] | None) -> Path:
    mask = Image.new("L", size, 0)
    if box is not None:
        mask.paste(255, box)
    mask.save(file)
    return file


def test_a_painted_mask_hides_white_pixels_and_every_token_that_touches_them(
    opened: dict[str, Checkpoint], photos: Path, tmp_path: Path
) -> None:
    mask = save_mask(tmp_path / "mask.png", (32, 32), (6, 6, 12, 10))
    (row,) = reconstruct(opened["lmd"], read_pictures([photos / "a.png"], 32), Request(mask_image=mask), tmp_path)
    assert (row.hidden_px, row.hidden_tokens, row.tokens) == (24, 4, 16)
    assert "24 of 1024 px hidden, 4 of 16 tokens touch them and are predicted" in row.text
    original, masked, filled = panels(tmp_path / "a-reconstructed.png")
    assert (masked[6:10, 6:12] == 128).all()
    assert torch.equal(masked[20:, 20:], original[20:, 20:])
    faded = (original[0:6, 0:6].float() / 255 + 0.5) / 2 * 255
    assert (masked[0:6, 0:6].float() - faded).abs().max() <= 1, "not shown to the network, but not hidden either"
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[6:10, 6:12] = False
    assert torch.equal(filled[outside], original[outside])


@pytest.mark.parametrize("size", [(80, 48), (40, 64), (200, 200), (20, 17)])
def test_a_mask_of_a_pictures_own_size_lets_no_hidden_pixel_through_the_resizing(
    size: tuple[int, int], tmp_path: Path
) -> None:
    box = (size[0] // 3, size[1] // 3, size[0] // 2, size[1] // 2)
    file = save_mask(tmp_path / "mask.png", size, box)
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    changed = pixels.copy()
    changed[box[1] : box[3], box[0] : box[2]] = generator.integers(0, 256, 3)
    one, two = (
        np.array(center_square(Image.fromarray(values), 32, Image.Resampling.BICUBIC)) for values in (pixels, changed)
    )
    hidden = mask_from_image(file, Picture("x", torch.zeros(3, 32, 32), size), 32)[0].numpy()
    assert (one[~hidden] == two[~hidden]).all()
    assert (one != two).any()
    assert hidden.mean() < 0.5


def test_random_masks_hide_the_share_that_is_asked_for(opened: dict[str, Checkpoint]) -> None:
    for ratio, hidden in ((0.75, 12), (0.5, 8), (0.9, 15)):
        mask = random_mask(opened["mae"], ratio, 3)
        assert int(mask.sum()) == hidden
        assert torch.equal(mask, random_mask(opened["mae"], ratio, 3))
    assert not torch.equal(random_mask(opened["mae"], 0.5, 3), random_mask(opened["mae"], 0.5, 4))
    assert pixel_mask(mask, 32).shape == (1, 1, 32, 32)


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 0.95, 1.0, 1.5])
def test_ratios_that_hide_everything_or_nothing_are_refused(opened: dict[str, Checkpoint], ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"one must be visible and one hidden: use more than 0 and at most 0\.9375"):
        random_mask(opened["mae"], ratio, 0)


@pytest.mark.parametrize("side", [2, 3, 5, 7, 14, 25, 28, 56])
def test_the_largest_ratio_that_a_refusal_names_is_taken(opened: dict[str, Checkpoint], side: int) -> None:
    checkpoint = _with_units(opened["mae"], side, keep=0.5)
    with pytest.raises(ConfigError, match="at most") as caught:
        random_mask(checkpoint, 1.0, 0)
    largest = float(str(caught.value).rpartition(" ")[2])
    visible = int((~random_mask(checkpoint, largest, 0)).sum())
    assert visible == 1 or (visible < 5 and side > 28), "four decimals"
    assert int(random_mask(checkpoint, 1e-3, 0).sum()) >= 1


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.29, 0.3, 0.57, 0.7])
def test_as_in_the_run_hides_as_many_units_as_the_yardstick(opened: dict[str, Checkpoint], keep: float) -> None:
    checkpoint = _with_units(opened["mae"], 10, keep)
    assert random_mask(checkpoint, None, 0).sum() == yardstick_masks(1, 10, 1, keep).sum()
    assert int(random_mask(checkpoint, 0.9, 0).sum()) == 90


def _with_units(checkpoint: Checkpoint, side: int, keep: float) -> Checkpoint:
    """The checkpoint as of a run whose images have `side` x `side` units of a pixel each."""
    assert checkpoint.config is not None
    evaluation = checkpoint.config.evaluation.model_copy(update={"unit_px": 1, "keep": keep})
    method_class = load_method("mae", {})
    options = method_class.Config.model_validate({**OPTIONS["mae"], "patch_size": 1})
    config = checkpoint.config.model_copy(update={"evaluation": evaluation})
    return Checkpoint(method_class(options, DataSpec(side)), checkpoint.path, config)


@pytest.mark.parametrize(
    ("size", "box", "message"),
    [
        ((31, 32), (0, 0, 8, 8), "a mask of 31 x 32 px does not fit a.png of 32 x 32 px"),
        ((32, 32), None, "hides nothing of a.png"),
        ((32, 32), (0, 0, 32, 32), "hides everything of a.png"),
        ((32, 32), (1, 1, 31, 31), "touches every token of 8 px"),
    ],
)
def test_masks_that_cannot_be_used_are_refused_and_nothing_is_written(
    opened: dict[str, Checkpoint],
    photos: Path,
    tmp_path: Path,
    size: tuple[int, int],
    box: tuple[int, int, int, int] | None,
    message: str,
) -> None:
    mask = save_mask(tmp_path / "mask.png", size, box)
    with pytest.raises(DataError, match=message):
        reconstruct(opened["lmd"], read_pictures([photos / "a.png"], 32), Request(mask_image=mask), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.png", "photos"]


def test_a_mask_with_all_its_white_cropped_away_is_told_where_it_lies(photos: Path, tmp_path: Path) -> None:
    (picture,) = read_pictures([photos / "b.jpg"], 32)
    left = save_mask(tmp_path / "left.png", (80, 48), (2, 5, 9, 20))
    with pytest.raises(DataError) as caught:
        mask_from_image(left, picture, 32)
    assert str(caught.value).endswith(
        "hides nothing of b.jpg; white pixels are hidden, black ones visible. Pictures are cropped to their central "
        "square, here x 16 to 63 and y 0 to 47 px of 80 x 48; white lies at x 2 to 8 and y 5 to 19"
    )
    middle = save_mask(tmp_path / "middle.png", (80, 48), (10, 0, 70, 48))
    with pytest.raises(DataError, match=r"hides everything of b\.jpg.*white lies at x 10 to 69 and y 0 to 47"):
        mask_from_image(middle, picture, 32)


def test_a_mask_with_its_shape_in_transparency_is_refused_and_an_opaque_one_taken(photos: Path, tmp_path: Path) -> None:
    (picture,) = read_pictures([photos / "a.png"], 32)
    shape = Image.open(save_mask(tmp_path / "grey.png", (32, 32), (6, 6, 12, 10)))
    layer = Image.new("RGBA", (32, 32), "white")
    layer.putalpha(shape)
    layer.save(tmp_path / "alpha.png")
    with pytest.raises(DataError, match=r"alpha\.png: has transparent pixels"):
        mask_from_image(tmp_path / "alpha.png", picture, 32)
    shape.convert("RGBA").save(tmp_path / "opaque.png")
    assert int(mask_from_image(tmp_path / "opaque.png", picture, 32).sum()) == 24


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_pictures_of_one_channel_missing_or_unreadable_ones_are_refused(photos: Path, tmp_path: Path) -> None:
    for mode in ("L", "1", "I;16", "LA"):
        Image.new(mode, (32, 32)).save(tmp_path / "grey.png")
        with pytest.raises(DataError, match=r"has one channel \(mode .*save it as an RGB image"):
            read_pictures([photos, tmp_path / "grey.png"], 32)
    (tmp_path / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"broken\.png: "):
        read_pictures([tmp_path / "broken.png"], 32)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match="not a readable image"):
        read_pictures([tmp_path / "text.jpg"], 32)
    with pytest.raises(DataError, match="no such image file or folder"):
        read_pictures([tmp_path / "absent.png"], 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image files in this folder"):
        read_pictures([tmp_path / "empty"], 32)


@pytest.mark.parametrize("name", ["mae", "ddpm"])
def test_levels_exist_only_where_a_method_has_them(
    opened: dict[str, Checkpoint], photos: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"--levels: {name.upper()} reconstructs in one way only"):
        reconstruct(opened[name], read_pictures([photos], 32), Request(levels=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("figure6", [False, True])
def test_files_that_are_read_are_never_written_over(
    opened: dict[str, Checkpoint], photos: Path, tmp_path: Path, figure6: bool
) -> None:
    before = {file: file.read_bytes() for file in photos.iterdir()}
    reconstruct(opened["lmd"], read_pictures([photos], 32), Request(), photos)
    assert {file: file.read_bytes() for file in before} == before
    after = {file: file.read_bytes() for file in photos.iterdir()}
    with pytest.raises(ConfigError, match=r"a-reconstructed\.png would overwrite a file that is read"):
        reconstruct(opened["lmd"], read_pictures([photos], 32), Request(seed=1), tmp_path / "photos" / ".." / "photos")
    mask = save_mask(photos / "figure6.png", (32, 32), (6, 6, 12, 10))
    after[mask] = mask.read_bytes()
    request = Request(mask_image=mask, figure6=figure6)
    pictures = read_pictures([photos / "a.png"], 32)
    if figure6:
        with pytest.raises(ConfigError, match=r"figure6\.png would overwrite a file that is read"):
            reconstruct(opened["lmd"], pictures, request, photos)
        assert {file: file.read_bytes() for file in photos.iterdir()} == after
    else:
        reconstruct(opened["lmd"], pictures, request, photos)
        assert mask.read_bytes() == after[mask]


def test_an_order_is_no_option_of_a_method_without_levels(
    opened: dict[str, Checkpoint], photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--order: MAE reconstructs in one way only"):
        reconstruct(opened["mae"], read_pictures([photos], 32), Request(order="random"), tmp_path / "out")


def test_levels_without_an_order_take_the_order_of_the_run(tmp_path: Path, photos: Path) -> None:
    checkpoint = open_run(make_cell(tmp_path / "cell", "lmd", unveil_order="confidence"), CPU)
    (row,) = reconstruct(checkpoint, read_pictures([photos / "a.png"], 32), Request(levels=3), tmp_path / "out")
    assert row.function_evaluations == 4, "confidence takes one more"


@pytest.mark.parametrize(("box", "passes"), [((0, 0, 8, 8), 1), ((0, 0, 16, 32), 5), ((0, 0, 31, 23), 9)])
def test_evaluations_are_those_of_the_mask_that_was_given(
    tmp_path: Path, photos: Path, box: tuple[int, int, int, int], passes: int
) -> None:
    checkpoint = open_run(make_cell(tmp_path / "cell", "lmd", reconstruct_levels=None), CPU)
    assert checkpoint.method.num_function_evaluations == 9
    mask = save_mask(tmp_path / "mask.png", (32, 32), box)
    pictures = read_pictures([photos / "a.png"], 32)
    (row,) = reconstruct(checkpoint, pictures, Request(mask_image=mask), tmp_path / "out")
    (same,) = reconstruct(checkpoint, pictures, Request(mask_image=mask, levels=0), tmp_path / "out")
    assert row.function_evaluations == passes == same.function_evaluations


def test_a_failure_halfway_leaves_nothing_behind(
    cells: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_run(cells["mae"], CPU)
    count = 0

    def fails(images: Tensor, mask: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("out of memory")
        return images

    monkeypatch.setattr(checkpoint.method, "reconstruct", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        reconstruct(checkpoint, read_pictures([photos], 32), Request(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_method_of_normalised_targets_is_refused_with_the_reason(tmp_path: Path) -> None:
    cell = make_cell(tmp_path, "mae", normalize_targets=True)
    with pytest.raises(ConfigError, match="cannot reconstruct pixels: normalised targets"):
        open_run(cell, CPU)


# -- the authors' checkpoints -----------------------------------------------------------------------------------------

HEADS = ("encoder_heads=2", "decoder_heads=4")
"""They leave no trace in weights, and these are of no published model."""


def save_official(file: Path, *, norm_pix_loss: bool) -> Path:
    method_class = load_method("lmd", {})
    heads = {"encoder_heads": 2, "decoder_heads": 4}
    options = {**OPTIONS["lmd"], **heads, "encoder_width": 48, "decoder_width": 64}
    method = method_class(method_class.Config.model_validate(options), DataSpec(32))
    arguments = argparse.Namespace(norm_pix_loss=norm_pix_loss, lr=1e-3)
    torch.save({"model": method.to_official(), "epoch": 3, "args": arguments}, file)
    return file


def opened_official(file: Path) -> Checkpoint:
    request = OfficialRequest(file, "lmd", HEADS, projector="shipped:scenes-kl-f8")
    return open_official(open_official_method(request), CPU)


def test_random_masks_for_an_authors_checkpoint_are_of_the_methods_own_units() -> None:
    case = CASES["simmim"]
    checkpoint = Checkpoint(case.build(), Path("x.pth"), None)
    assert (checkpoint.token_px, checkpoint.unit_px) == (2, 8)
    assert Checkpoint(CASES["ddim"].build(), Path("x.pth"), None).unit_px == 16 // 8


def test_an_authors_checkpoint_of_plain_targets_reconstructs(tmp_path: Path, photos: Path) -> None:
    checkpoint = opened_official(save_official(tmp_path / "x.pth", norm_pix_loss=False))
    assert (checkpoint.image_size, checkpoint.token_px, checkpoint.unit_px) == (32, 8, 8)
    (row,) = reconstruct(checkpoint, read_pictures([photos / "b.jpg"], 32), Request(levels=2), tmp_path / "out")
    assert row.tokens == 16
    with pytest.raises(ConfigError, match="give at least one image or folder"):
        held_out_pictures(checkpoint, 5)


def test_an_authors_checkpoint_of_normalised_targets_is_refused(tmp_path: Path) -> None:
    file = save_official(tmp_path / "x.pth", norm_pix_loss=True)
    with pytest.raises(ConfigError, match=r"x\.pth: this method cannot reconstruct pixels: normalised targets"):
        opened_official(file)


# -- the command ------------------------------------------------------------------------------------------------------


def save_vit_ti(file: Path) -> Path:
    """MAE of a width whose published model has 3 heads."""
    method_class = load_method("mae", {})
    widths = {"encoder_width": 192, "decoder_width": 512, "encoder_heads": 3, "decoder_heads": 16}
    options = method_class.Config.model_validate({**OPTIONS["mae"], **widths})
    torch.save({"model": method_class(options, DataSpec(32)).to_official()}, file)
    return file


@dataclass
class Outcome:
    code: int
    out: str
    err: str


def lmd_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    monkeypatch.setattr(sys, "argv", ["lmd-bench", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def test_the_command_fills_held_out_images_and_draws_figure_6_beside_the_weights(
    cells: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("reconstruct", "--checkpoint", cells["lmd"], "--levels", "all", "--figure6", "--device", "cpu")
    done = lmd_bench(monkeypatch, capsys, *words)
    assert done.code == 0, done.err
    assert (
        "held-out-0-reconstructed.png: 768 of 1024 px hidden, 12 of 16 tokens touch them and are predicted; 9 eval"
        in done.out
    )
    names = {path.name for path in (cells["lmd"] / "reconstructions").iterdir()}
    assert names == {
        "figure6.png",
        "figure6.csv",
        TABLE_FILE,
        *(f"held-out-{number}-reconstructed.png" for number in range(5)),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mask-ratio", "0.5", "--mask-image", "m.png"), "give one of them"),
        (("--levels", "none"), "--levels none: a whole number from 1 on, or all"),
        (("--levels", "0"), "--levels 0: a whole number from 1 on, or all"),
        (("--levels", "2", "--order", "raster"), "--order raster: orders are random, confidence"),
        (("--order", "raster"), "--order raster: orders are random, confidence"),
        (("--order", "confidence"), "--order confidence: an order is for several predictions; give --levels"),
        (("--levels", "1", "--order", "random"), "--order random: an order is for several predictions"),
        (("--set", "encoder_heads=2"), "belong to --method"),
        (("--projector", "x"), "belong to --method"),
        (("--ema",), "belong to --method"),
        (("absent.png",), "absent.png: no such image file or folder"),
        (("--mask-image", "absent.png"), "absent.png: no such mask image"),
        (("--figure6", "--mask-image", "absent.png"), "absent.png: no such mask image"),
        (("--figure6", "--mask-ratio", "1"), "at least one must be visible and one hidden"),
    ],
)
def test_the_command_refuses_in_one_line_with_code_2(
    cells: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    out = tmp_path / "out"
    done = lmd_bench(monkeypatch, capsys, "reconstruct", *words, "--checkpoint", cells["lmd"], "--out", out)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not out.exists()


def test_the_command_says_which_heads_an_authors_checkpoint_was_loaded_with(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_vit_ti(tmp_path / "x.pth")
    words = ("reconstruct", photos / "a.png", "--checkpoint", file, "--method", "mae", "--set", "encoder_heads=6")
    words = (*words, "--set", "normalize_targets=false", "--device", "cpu", "--out", tmp_path / "out")
    done = lmd_bench(monkeypatch, capsys, *words)
    assert done.code == 0, done.err
    assert (
        "x.pth: encoder of width 192, 1 blocks and 6 heads, decoder of width 512, 1 blocks and 16 heads, for"
        in done.out
    )


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lmd", "ddpm"])
def test_a_sample_depends_on_the_seed_and_its_own_number_alone(
    cells: dict[str, Path], tmp_path: Path, name: str
) -> None:
    def samples(folder: str, count: int, seed: int) -> list[NDArray[np.uint8]]:
        files = sample_images(open_cell(cells[name], CPU), SampleRequest(count, seed=seed), tmp_path / folder)
        assert [file.name for file in files] == [*(f"sample-{number}.png" for number in range(count)), "samples.png"]
        return [_pixels(file) for file in files]

    *three, grid = samples("three", 3, 0)
    assert grid.shape == (32, 3 * 32 + 2 * 4, 3)
    assert (grid[:, 36:68] == three[1]).all()
    *two, _ = samples("two", 2, 0)
    assert all((one == other).all() for one, other in zip(two, three, strict=False))
    *others, _ = samples("others", 2, 1)
    images = [*three, *others]
    assert all((one != other).any() for number, one in enumerate(images) for other in images[:number])


def test_grids_of_many_samples_have_rows_of_eight(cells: dict[str, Path], tmp_path: Path) -> None:
    files = sample_images(open_cell(cells["lmd"], CPU), SampleRequest(9, levels=2), tmp_path / "out")
    grid = _pixels(files[-1])
    assert grid.shape == (2 * 32 + 4, 8 * 32 + 7 * 4, 3)
    assert (grid[36:, :32] == _pixels(files[8])).all()
    assert (grid[36:, 36:] == 255).all()


def test_samples_take_the_levels_that_are_asked_for(cells: dict[str, Path], tmp_path: Path) -> None:
    pictures = {}
    for levels, passes in ((None, 10), (0, 10), (1, 1), (3, 3)):
        checkpoint = open_cell(cells["lmd"], CPU)
        with counted_evaluations(checkpoint.method) as counts:
            files = sample_images(checkpoint, SampleRequest(1, levels), tmp_path / str(levels))
        assert most_common(counts) == passes
        pictures[levels] = files[0].read_bytes()
    assert pictures[None] == pictures[0]
    assert len(set(pictures.values())) == 3


def test_samples_are_refused_where_a_method_makes_none_or_has_no_levels(cells: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MAE does not generate images"):
        sample_images(open_cell(cells["mae"], CPU), SampleRequest(), tmp_path / "out")
    with pytest.raises(ConfigError, match="--levels: DDPM samples in one way only"):
        sample_images(open_cell(cells["ddpm"], CPU), SampleRequest(levels=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_sampling_command_writes_beside_the_weights_and_says_what_to_expect_of_means(
    cells: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--images", 2, "--levels", "all", "--device", "cpu")
    done = lmd_bench(monkeypatch, capsys, "sample", "--checkpoint", cells["lmd"], *words)
    assert done.code == 0, done.err
    assert "LMD predicts the mean of what could stand in a place, so samples are smooth" in done.out
    names = {path.name for path in (cells["lmd"] / "samples").iterdir()}
    assert names == {"sample-0.png", "sample-1.png", "samples.png"}
    done = lmd_bench(monkeypatch, capsys, "sample", "--checkpoint", cells["ddpm"], "--images", 1, "--device", "cpu")
    assert done.code == 0, done.err
    assert "smooth" not in done.out
    done = lmd_bench(monkeypatch, capsys, "sample", "--checkpoint", cells["mae"], "--device", "cpu")
    assert done.code == 2
    assert "MAE does not generate images" in done.err


RUN = """
extends: demo
name: small
data: {image_size: 32, num_train: 16, num_held_out: 4}
steps: 4
untimed_steps: 0
recipes: {equal: {batch_size: 4, lr_warmup_steps: 0, ema_decay: 0.9}}
evaluation: {num_checks: 1, num_images: 4, unit_px: 8}
finetune: null
image_quality: null
estimator: {half_life_steps: 2, num_resamples: 100}
"""


def test_a_run_keeps_the_weights_that_its_yardstick_was_read_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "small.yaml"
    suite.write_text(RUN)
    words = ("run", "--suite", suite, "--methods", "mae", "--device", "cpu", "--out")
    sizes = [word for name, value in SIZES.items() for word in ("--set", f"methods.mae.options.{name}={value}")]
    done = lmd_bench(monkeypatch, capsys, *words, tmp_path / "out", *sizes)
    assert done.code == 0, done.err
    cell = tmp_path / "out" / "small" / "mae" / "seed-0"
    record = read_run(cell / "record.json")
    assert record.weights is not None
    assert record.yardstick is not None
    assert file_sha256(cell / record.weights.file) == record.weights.sha256
    checkpoint = open_run(cell, CPU)
    assert checkpoint.config is not None
    images = torch.stack([picture.pixels for picture in held_out_pictures(checkpoint, 4)])
    runner = YardstickRunner(images, checkpoint.config.evaluation, 0, CPU)
    again = runner.check(checkpoint.method, 4, 0.0)
    assert again.psnr_db == pytest.approx(record.yardstick.checks[-1].psnr_db, abs=1e-4), "the averaged weights"
    done = lmd_bench(monkeypatch, capsys, *words, tmp_path / "none", *sizes, "--no-save-weights")
    assert done.code == 0, done.err
    assert not list((tmp_path / "none").rglob("*.safetensors"))
