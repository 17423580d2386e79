"""Captions of a folder's images: files read, files refused, and the captions of held-out images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.captioned import csv_folder, jsonl_folder, scene_samples, write_images

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.captions import captions_for, check_captions, read_captions
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.data.scenes import Scenes
from lmd_bench.data.source import FIRST_HELD_OUT_SCENE, BatchSource, open_source
from lmd_bench.errors import DataError

CPU = torch.device("cpu")


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def config(path: Path, **values: object) -> DataConfig:
    given = {"name": "folder", "path": str(path), "num_held_out": 6, "num_workers": 0, **values}
    return DataConfig.model_validate(given)


def scan(path: Path, **values: object) -> FolderIndex:
    return scan_folder(path, config(path, **values))


def source_of(data: DataConfig) -> BatchSource:
    return open_source(data, 32, AugmentationConfig(), CPU)


@pytest.mark.parametrize("key", ["file", "image", "filename", "file_name", "path", "File"])
@pytest.mark.parametrize("caption", ["caption", "text"])
def test_a_csv_file_is_read_by_its_header_wherever_the_columns_stand(tmp_path: Path, key: str, caption: str) -> None:
    path = written(tmp_path / "c.csv", f'id,{caption},{key}\n1,"a dog, running",a.png\n\n2,a cat ,sub/b.png\n')
    assert read_captions(path) == {"a.png": "a dog, running", "sub/b.png": "a cat"}


def test_a_jsonl_file_is_read_line_by_line(tmp_path: Path) -> None:
    lines = [{"file_name": "./a.png", "text": "a dog"}, {"image": "sub\\b.png", "caption": "ein Hund läuft", "n": 1}]
    path = written(tmp_path / "c.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_captions(path) == {"a.png": "a dog", "sub/b.png": "ein Hund läuft"}


def test_a_byte_order_mark_and_line_breaks_within_quotes_are_understood(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(b'\xef\xbb\xbffile,caption\r\na.png,"two\nlines"\r\n')
    assert read_captions(tmp_path / "c.csv") == {"a.png": "two\nlines"}


def test_only_the_names_asked_for_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "c.csv", "file,caption\na.png,one\nb.png,two\n")
    assert read_captions(path, only={"b.png", "c.png"}) == {"b.png": "two"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "", r"c\.csv line 1: the header has no column file or image .*; it has nothing"),
        (
            "c.csv",
            "file,title\na.png,x\n",
            r"c\.csv line 1: the header has no column caption or text; it has file, tit",
        ),
        ("c.csv", "file,caption\na.png\n", r"c\.csv line 2: 1 columns, the header has 2"),
        ("c.csv", 'file,caption\na.png,"x" y\n', r"c\.csv line 2: no CSV"),
        ("c.csv", "file,caption\na.png, \n", r"c\.csv line 2: an empty caption of a\.png; fill or remove it"),
        ("c.csv", "file,caption\n,dog\n", r"c\.csv line 2: an empty file name"),
        ("c.csv", "file,caption\na.png,x\nb.png,z\n./a.png,y\n", r"c\.csv line 4: a\.png has another caption in an ea"),
        ("c.jsonl", '{"file": "a.png", "text": "x"}\n{oops}\n', r"c\.jsonl line 2: no JSON \("),
        ("c.jsonl", '["a.png", "x"]\n', r"c\.jsonl line 1: no JSON object"),
        ("c.jsonl", '{"file": "a.png"}\n', r"c\.jsonl line 1: no key caption or text"),
        ("c.jsonl", '{"file": "a.png", "text": 3}\n', r"c\.jsonl line 1: text is no text: 3"),
        ("c.jsonl", '{"file": "a.png", "text": ""}\n', r"c\.jsonl line 1: an empty caption of a\.png"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_captions(written(tmp_path / name, text))


@pytest.mark.parametrize("name", ["c.csv", "c.jsonl"])
def test_a_file_that_is_not_utf8_is_refused_by_its_line(tmp_path: Path, name: str) -> None:
    head = b"file,caption\n" if name == "c.csv" else b'{"file": "a.png", "text": "x"}\n'
    (tmp_path / name).write_bytes(head + "b.png,Möwe\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 2: not UTF-8; save the captions as UTF-8"):
        read_captions(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: captions cannot be read: no such file"):
        read_captions(tmp_path / "nowhere.csv")


def test_the_same_caption_twice_is_no_contradiction(tmp_path: Path) -> None:
    assert read_captions(written(tmp_path / "c.csv", "file,caption\na.png,x\na.png,x\n")) == {"a.png": "x"}


def test_images_without_a_caption_are_counted_and_the_first_five_named() -> None:
    names = [f"{number}.png" for number in range(8)]
    with pytest.raises(
        DataError, match=r"c\.csv: 7 of 8 images have no caption: 0\.png, .*, 4\.png and 2 more; caption"
    ):
        captions_for(names, {"6.png": "x"}, "c.csv")
    assert captions_for(["b", "a"], {"a": "1", "b": "2"}, "c.csv") == ["2", "1"]


@pytest.mark.parametrize("make", [csv_folder, jsonl_folder])
def test_held_out_images_of_a_folder_come_with_their_captions(tmp_path: Path, make: object) -> None:
    assert callable(make)
    data = config(make(tmp_path / "images"))
    expected = {f"{number:05d}.png": text for number, (_, text, _) in enumerate(scene_samples(24))}
    index = scan_folder(str(data.path), data)
    source = source_of(data)
    assert source.held_out_captions(6) == [expected[name] for name in index.held_out]
    assert source.held_out_captions(2) == [expected[name] for name in index.held_out[:2]]
    assert check_captions(index, data) is None
    with pytest.raises(DataError, match="7 held-out images are asked for, 6 are held out"):
        source.held_out_captions(7)


def test_captions_beside_the_images_of_train_and_val_are_named_from_there(tmp_path: Path) -> None:
    jsonl_folder(tmp_path / "train", 8)
    jsonl_folder(tmp_path / "val", 8, seed=1)
    index = scan(tmp_path)
    expected = {f"val/{number:05d}.png": text for number, (_, text, _) in enumerate(scene_samples(8, seed=1))}
    assert index.held_out_captions == tuple(expected[name] for name in index.held_out)


def test_two_files_that_caption_an_image_differently_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 8)
    root_file = written(tmp_path / "captions.csv", "file,caption\nval/00000.png,a dog\n")
    jsonl_folder(tmp_path / "val", 4, seed=1)
    words = r"val/metadata\.jsonl: val/00000\.png has another caption in .*/captions\.csv; keep one of them"
    with pytest.raises(DataError, match=words):
        _ = scan(tmp_path).held_out_captions
    own = scene_samples(1, seed=1)[0][1]
    root_file.write_text(f'file,caption\nval/00000.png,"{own}"\n', encoding="utf-8")
    captions = scan(tmp_path).held_out_captions
    assert captions is not None
    assert own in captions


@pytest.mark.parametrize("relative", [False, True])
def test_a_file_named_by_the_data_wins_over_the_usual_ones(tmp_path: Path, relative: bool) -> None:
    root = csv_folder(tmp_path / "images", 8)
    lines = "".join(f"{number:05d}.png,scene {number}\n" for number in range(8))
    own = written((root if relative else tmp_path) / "own.csv", "file,caption\n" + lines)
    index = scan(root, num_held_out=2, captions="own.csv" if relative else str(own))
    assert index.held_out_captions == tuple(f"scene {int(name[:5])}" for name in index.held_out)


def test_a_folder_without_captions_says_how_to_add_them(tmp_path: Path) -> None:
    write_images(tmp_path, 8)
    data = config(tmp_path, num_held_out=2)
    index = scan_folder(tmp_path, data)
    assert source_of(data).held_out_captions(2) is None
    reason = check_captions(index, data)
    assert reason is not None
    files = "captions.csv, captions.jsonl, metadata.csv or metadata.jsonl"
    assert reason.startswith(f"no captions: {tmp_path} has no {files}; add one, or name it")


def test_captions_of_a_folder_that_cannot_be_used_are_an_error(tmp_path: Path) -> None:
    root = csv_folder(tmp_path / "images", 8)
    written(root / "captions.csv", "file,caption\nother.png,x\n")
    with pytest.raises(DataError, match=r"captions\.csv: 2 of 2 images have no caption: 0000\d\.png, 0000\d\.png; cap"):
        check_captions(scan(root, num_held_out=2), config(root))
    written(root / "metadata.jsonl", "")
    with pytest.raises(
        DataError, match=r"2 files of captions, captions\.csv and metadata\.jsonl; name one with --set da"
    ):
        check_captions(scan(root, num_held_out=2), config(root))
    with pytest.raises(DataError, match=r"data\.captions: no such file: gone\.csv"):
        check_captions(scan(root, num_held_out=2, captions="gone.csv"), config(root))


def test_scenes_caption_themselves() -> None:
    data = DataConfig(num_train=4, num_held_out=5, image_size=16, seed=3)
    found = open_source(data, 16, AugmentationConfig(), CPU).held_out_captions(4)
    assert found == Scenes(3, 16).captions(range(FIRST_HELD_OUT_SCENE, FIRST_HELD_OUT_SCENE + 4))
    assert check_captions(None, data) is None


def test_without_a_folder_there_is_nothing_to_caption() -> None:
    assert check_captions(None, DataConfig(name="folder")) == "no folder of images is named; give --data DIR"
