"""Folders: layouts, splits, checks, and files of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.photos import PHOTOS, make_photo_folder
from PIL import Image

from lmd_bench.config import DataConfig
from lmd_bench.data import folders
from lmd_bench.data.decode import ImageFileError, center_square, load_rgb
from lmd_bench.data.folders import scan_folder
from lmd_bench.errors import DataError


def config(**values: object) -> DataConfig:
    return DataConfig.model_validate({"name": "folder", "num_held_out": 4, **values})


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def fill(folder: Path, count: int, pattern: str = "image-{:03d}.png") -> Path:
    for number in range(count):
        write_image(folder / pattern.format(number), number)
    return folder


# -- layouts and splits ---------------------------------------------------------------------------------------------


def test_class_folders_give_sorted_classes_and_matching_labels(tmp_path: Path) -> None:
    make_photo_folder(tmp_path, size=16, crops=8)
    index = scan_folder(tmp_path, config())
    assert index.layout == "class folders"
    assert index.classes == tuple(sorted(PHOTOS))
    assert index.num_classes == 5
    assert index.num_train == 36
    assert len(index.held_out) == 4
    assert index.train == tuple(sorted(index.train))
    assert index.train_labels is not None
    for path, label in zip(index.train, index.train_labels, strict=True):
        assert path.startswith(index.classes[label] + "/")
    assert index.skipped == ()
    assert index.warning() is None


def test_a_flat_folder_has_no_labels_and_takes_every_extension_in_any_case(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    for number, name in enumerate(("a.JPG", "b.Jpeg", "c.webp", "d.bmp", "e.TIF", "f.tiff", "g.ppm", "h.gif")):
        write_image(tmp_path / name, number)
    write_image(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("not an image")
    index = scan_folder(tmp_path, config())
    assert index.layout == "flat"
    assert index.classes is None
    assert index.train_labels is None
    assert index.num_train + len(index.held_out) == 18


def test_images_beside_class_folders_make_the_folder_flat(tmp_path: Path) -> None:
    fill(tmp_path / "cats", 10)
    fill(tmp_path, 10)
    index = scan_folder(tmp_path, config())
    assert index.classes is None
    assert index.num_train == 16


def test_held_out_images_come_from_val_where_there_is_one(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "n01", 6)
    fill(tmp_path / "train" / "n02", 6)
    fill(tmp_path / "val" / "n01", 5)
    fill(tmp_path / "test", 3)
    index = scan_folder(tmp_path, config())
    assert index.layout == "train and val"
    assert index.num_train == 12
    assert index.classes == ("n01", "n02")
    assert all(path.startswith("val/") for path in index.held_out)
    assert len(scan_folder(tmp_path, config(num_held_out=6)).held_out) == 5, "all that val/ has"


def test_a_lone_train_folder_is_not_a_class(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "dogs", 10)
    fill(tmp_path / "train" / "cats", 10)
    assert scan_folder(tmp_path, config()).classes == ("cats", "dogs")


def test_the_split_depends_on_seed_and_names_alone(tmp_path: Path) -> None:
    fill(tmp_path / "one", 40)
    fill(tmp_path / "two", 40)
    four, eight = scan_folder(tmp_path / "one", config()), scan_folder(tmp_path / "one", config(num_held_out=8))
    assert four.held_out == eight.held_out[:4]
    assert not set(eight.held_out) & set(eight.train)
    again = scan_folder(tmp_path / "two", config())
    assert (again.held_out, again.train, again.digest) == (four.held_out, four.train, four.digest)
    assert scan_folder(tmp_path / "one", config(seed=1)).held_out != four.held_out


def test_num_train_takes_a_fixed_subset(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    index = scan_folder(tmp_path, config(num_train=10))
    assert index.num_train == 10
    assert set(index.train) < set(scan_folder(tmp_path, config(num_train=20)).train)
    with pytest.raises(DataError, match="asks for 37 images, 36 can be trained on"):
        scan_folder(tmp_path, config(num_train=37))


def test_a_link_to_a_parent_is_followed_once(tmp_path: Path) -> None:
    fill(tmp_path / "a", 20)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert scan_folder(tmp_path, config()).num_train == 16


# -- folders that cannot be used ------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        scan_folder(tmp_path / "nowhere", config())


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a file, not a folder"):
        scan_folder(write_image(tmp_path / "a.png"), config())


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder is empty; put images"):
        scan_folder(tmp_path, config())


def test_a_folder_of_text_files_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "table.csv", "README"):
        (tmp_path / name).write_text("words")
    with pytest.raises(DataError, match=r"no images among its 4 files: \.txt \(2\)"):
        scan_folder(tmp_path, config())


def test_never_more_than_a_quarter_is_held_out(tmp_path: Path) -> None:
    fill(tmp_path, 15)
    index = scan_folder(tmp_path, config())
    assert (len(index.held_out), index.num_train) == (3, 12)


def test_a_folder_too_small_to_hold_anything_out_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with pytest.raises(DataError, match=r"no image can be held out of 3 usable ones \(a quarter"):
        scan_folder(tmp_path, config())


# -- unusable files ---------------------------------------------------------------------------------------------------


def truncated_jpeg(path: Path) -> Path:
    write_image(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-600])
    return path


def test_one_corrupt_file_among_good_ones_is_left_out_and_named(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    truncated_jpeg(tmp_path / "broken.jpg")
    index = scan_folder(tmp_path, config())
    assert index.num_train == 36
    assert index.num_checked == 41
    assert [path for path, _ in index.skipped] == ["broken.jpg"]
    assert "truncated" in index.skipped[0][1]
    warning = index.warning()
    assert warning is not None
    assert "left out 1 of 41 images looked at: broken.jpg" in warning


def test_more_than_one_file_and_one_percent_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    truncated_jpeg(tmp_path / "broken.jpg")
    write_image(tmp_path / "dot.png", size=(1, 1))
    with pytest.raises(DataError, match=r"2 of 42 images .*broken\.jpg \(.*\), dot\.png \(1 x 1 px"):
        scan_folder(tmp_path, config())


def test_two_corrupt_files_among_two_hundred_are_tolerated(tmp_path: Path) -> None:
    fill(tmp_path, 200)
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert [path for path, _ in scan_folder(tmp_path, config()).skipped] == ["a.jpg", "b.png"]


def test_text_under_an_image_extension_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("words")
    with pytest.raises(ImageFileError, match="not a readable image"):
        load_rgb(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="usable"):
        scan_folder(tmp_path, config())


def test_of_a_large_folder_a_sample_and_the_held_out_images_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "CHECK_ALL_UP_TO", 50)
    monkeypatch.setattr(folders, "CHECK_SAMPLE", 30)
    fill(tmp_path, 100)
    healthy = scan_folder(tmp_path, config(num_held_out=10))
    assert 30 <= healthy.num_checked <= 40
    (tmp_path / healthy.held_out[0]).write_bytes(b"broken")
    damaged = scan_folder(tmp_path, config(num_held_out=10))
    assert damaged.skipped[0][0] == healthy.held_out[0]
    assert damaged.held_out[:9] == healthy.held_out[1:]
    assert healthy.held_out[0] not in damaged.train


def test_scanning_and_decoding_need_no_torch() -> None:
    code = "import sys, lmd_bench.data.folders, lmd_bench.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- decoding ---------------------------------------------------------------------------------------------------------


def gradient(size: int = 16) -> np.ndarray:
    return np.tile(np.linspace(0.0, 1.0, size), (size, 1))


def test_cmyk_becomes_the_colours_it_stands_for(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    assert load_rgb(tmp_path / "red.tif").getpixel((5, 5)) == (255, 0, 0)
    Image.new("CMYK", (16, 16), (255, 0, 255, 0)).save(tmp_path / "green.jpg", quality=95)
    red, green, blue = load_rgb(tmp_path / "green.jpg").getpixel((5, 5))
    assert green > 245
    assert max(red, blue) < 10


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path, name: str) -> None:
    Image.fromarray((gradient() * 65535).round().astype(np.uint16)).save(tmp_path / name)
    grey = np.asarray(load_rgb(tmp_path / name))[0, :, 0]
    np.testing.assert_allclose(grey, gradient()[0] * 255, atol=0.51)


@pytest.mark.parametrize("full_scale", [1.0, 255.0, 65535.0])
def test_float_grey_is_scaled_by_the_range_it_uses(tmp_path: Path, full_scale: float) -> None:
    Image.fromarray((gradient() * full_scale).astype(np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_allclose(np.asarray(load_rgb(tmp_path / "a.tif"))[0, :, 0], gradient()[0] * 255, atol=0.51)


def test_integer_grey_beyond_sixteen_bits_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray((gradient() * (2**31 - 1)).astype(np.int32)).save(tmp_path / "a.tif")
    np.testing.assert_allclose(np.asarray(load_rgb(tmp_path / "a.tif"))[0, :, 0], gradient()[0] * 255, atol=0.51)


def test_undefined_values_make_a_file_unusable(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), np.nan, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageFileError, match="undefined"):
        load_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    black = (0,) * (len(mode) - 1)
    image = Image.new(mode, (16, 16), (*black, 0))
    image.paste((*black, 255), (0, 0, 8, 16))
    image.paste((*black, 128), (8, 0, 12, 16))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(load_rgb(tmp_path / "a.png"))[0, :, 0]
    assert pixels[0] == 0
    assert abs(int(pixels[9]) - 127) <= 1
    assert pixels[15] == 255


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([200, 10, 20, 0, 0, 255])
    image.paste(1, (0, 0, 8, 16))
    image.save(tmp_path / "opaque.gif")
    assert load_rgb(tmp_path / "opaque.gif").getpixel((12, 0)) == (200, 10, 20)
    image.save(tmp_path / "index.png", transparency=0)
    image.save(tmp_path / "bytes.png", transparency=bytes([0, 255]))
    for name in ("index.png", "bytes.png"):
        assert load_rgb(tmp_path / name).getpixel((12, 0)) == (255, 255, 255)
        assert load_rgb(tmp_path / name).getpixel((2, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_bilevel_and_grey_become_three_equal_channels(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (16, 16), 255).save(tmp_path / "a.png")
    assert load_rgb(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 8, 16))  # the left edge is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left edge comes to lie on top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = load_rgb(tmp_path / "a.jpg")
    assert upright.size == (16, 32)
    assert min(upright.getpixel((8, 2))) > 240
    assert max(upright.getpixel((8, 28))) < 15


def test_a_truncated_jpeg_is_unusable(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match=r"a\.jpg: .*truncated.*; replace or remove this file"):
        load_rgb(truncated_jpeg(tmp_path / "a.jpg"))


def test_sides_below_eight_pixels_are_unusable(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match="40 x 7 px"):
        load_rgb(write_image(tmp_path / "a.png", size=(40, 7)))
    assert load_rgb(write_image(tmp_path / "b.png", size=(40, 8))).size == (40, 8)


def test_a_decompression_bomb_is_unusable_and_its_warning_stays_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(tmp_path / "a.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_rgb(path).size == (40, 40)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
        with pytest.raises(ImageFileError, match="decompression-bomb"):
            load_rgb(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_unusable(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    path.chmod(0)
    with pytest.raises(ImageFileError, match="permission denied"):
        load_rgb(path)


@pytest.mark.parametrize("size", [(90, 60), (61, 90), (48, 48), (20, 33)])
def test_the_central_square_is_torchvisions_resize_and_crop(size: tuple[int, int]) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 6, size[1]))
    smooth = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1) * 100 + 128
    image = Image.fromarray(smooth.astype(np.uint8))
    theirs = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])(image)
    ours = center_square(image, 32, Image.Resampling.BICUBIC)
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    assert np.abs(difference).mean() < 6.0  # half a pixel of this pattern's slope at most
    if size[0] == size[1]:
        assert np.abs(difference).max() <= 1
