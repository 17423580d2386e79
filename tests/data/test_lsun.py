"""LSUN's LMDB folders: found, split, checked and read as folders of image files are."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.data.image_files import ImageFiles
from lmd_bench.data.lsun import ImageRecords, find_records
from lmd_bench.data.source import open_source
from lmd_bench.errors import DataError

lmdb = pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")


def encoded(number: int, kind: str = "WEBP") -> bytes:
    """A picture whose colour tells its number."""
    picture, file = Image.new("RGB", (20, 16), (10 * number, 100, 200)), io.BytesIO()
    picture.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def write(folder: Path, values: list[bytes], first: int = 0) -> Path:
    folder.mkdir(parents=True)
    database = lmdb.open(str(folder), map_size=2**22)
    with database.begin(write=True) as transaction:
        for number, value in enumerate(values, first):
            transaction.put(f"{number:040x}".encode(), value)
    database.close()
    return folder


def bedrooms(root: Path, count: int = 12) -> Path:
    write(root / "bedroom_train_lmdb", [encoded(number) for number in range(count)])
    write(root / "bedroom_val_lmdb", [encoded(number, "JPEG") for number in range(6)], first=100)
    return root


def config(path: Path, **values: object) -> DataConfig:
    given = {"name": "folder", "path": str(path), "num_held_out": 4, "num_workers": 0, **values}
    return DataConfig.model_validate(given)


def scan(path: Path, **values: object) -> FolderIndex:
    return scan_folder(path, config(path, **values))


def test_the_parent_holds_out_of_the_validation_records_and_trains_on_the_others(tmp_path: Path) -> None:
    index = scan(bedrooms(tmp_path))
    assert index.train == tuple(f"bedroom_train_lmdb/{number:040x}" for number in range(12))
    assert len(index.held_out) == 4
    assert all(name.startswith("bedroom_val_lmdb/") for name in index.held_out)
    assert (index.layout, index.classes, index.train_labels) == ("train and val", None, None)
    assert index.num_checked == 18
    assert index.skipped == ()


def test_the_training_folder_itself_stands_for_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = scan(bedrooms(tmp_path))
    own = scan(tmp_path / "bedroom_train_lmdb")
    assert (own.digest, own.root) == (parent.digest, parent.root)
    monkeypatch.chdir(tmp_path / "bedroom_train_lmdb")
    assert scan(Path()).digest == parent.digest


def test_without_validation_records_a_quarter_at_most_is_held_out(tmp_path: Path) -> None:
    index = scan(bedrooms(tmp_path) / "bedroom_val_lmdb")
    assert (index.layout, index.num_train, len(index.held_out)) == ("flat", 5, 1)
    shutil.rmtree(tmp_path / "bedroom_val_lmdb")
    index = scan(tmp_path)
    assert (index.layout, index.num_train, len(index.held_out)) == ("flat", 9, 3)


def test_several_categories_are_classes_and_test_records_are_passed_over(tmp_path: Path) -> None:
    write(bedrooms(tmp_path) / "church_outdoor_train_lmdb", [encoded(number) for number in range(8)])
    write(tmp_path / "tower_val_lmdb", [encoded(1)])
    write(tmp_path / "test_lmdb", [encoded(1)])
    index = scan(tmp_path)
    assert index.classes == ("bedroom_train_lmdb", "church_outdoor_train_lmdb")
    assert index.train_labels == (0,) * 12 + (1,) * 8
    assert all(name.startswith("bedroom_val_lmdb/") for name in index.held_out)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_and_held_out_images_are_the_decoded_records(tmp_path: Path, num_workers: int) -> None:
    data = config(bedrooms(tmp_path), num_workers=num_workers, image_size=16)
    source = open_source(data, 16, AugmentationConfig(crop="none", flip=False), torch.device("cpu"))
    batches = source.batches(6, seed=0)
    images = torch.cat([next(batches).images for _ in range(2)])
    batches.close()
    assert images.shape == (12, 3, 16, 16)
    assert sorted((images[:, 0, 8, 8] * 255).round().int().tolist()) == [10 * number for number in range(12)]
    assert source.held_out(4).shape == (4, 3, 16, 16)
    assert source.held_out(4)[:, 2].float().mean() == pytest.approx(200, abs=3)
    described = source.describe()
    assert (described["name"], described["storage"]) == ("folder", "lmdb")


def test_the_content_digest_sees_what_records_hold(tmp_path: Path) -> None:
    before = scan(bedrooms(tmp_path))
    assert before.content_digest == scan(tmp_path).content_digest
    database = lmdb.open(str(tmp_path / "bedroom_train_lmdb"), map_size=2**22)
    with database.begin(write=True) as transaction:
        transaction.put(f"{3:040x}".encode(), encoded(20))
    database.close()
    after = scan(tmp_path)
    assert before.digest == after.digest
    assert before.content_digest != after.content_digest


def test_a_large_record_is_digested_by_pieces_as_a_file_of_the_same_bytes(tmp_path: Path) -> None:
    value = np.random.default_rng(0).bytes(40_000)
    write(tmp_path / "bedroom_train_lmdb", [value])
    (tmp_path / "a.jpg").write_bytes(value)
    size, found = ImageRecords(tmp_path).excerpt(f"bedroom_train_lmdb/{0:040x}")
    assert (size, found) == (40_000, value[:4096] + value[20_000:24_096] + value[-4096:])
    assert (size, found) == ImageFiles(tmp_path).excerpt("a.jpg")


def test_no_whole_record_is_read_for_the_content_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = scan(bedrooms(tmp_path))
    monkeypatch.delattr(ImageRecords, "open")
    monkeypatch.delattr(ImageFiles, "open")
    assert len(index.content_digest) == 16


def test_files_beside_one_another_are_not_looked_into_for_databases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").touch()
    (tmp_path / "cats").mkdir()
    asked: list[Path] = []
    monkeypatch.setattr("lmd_bench.data.lsun.os.path.isfile", lambda path: bool(asked.append(Path(path))))
    assert find_records(tmp_path, "here") is None
    assert asked == [tmp_path / "data.mdb", tmp_path / "cats" / "data.mdb"]


def test_records_can_be_sent_to_workers_that_are_started_anew(tmp_path: Path) -> None:
    index = scan(bedrooms(tmp_path))
    sent = pickle.loads(pickle.dumps(index))
    assert sent == index
    assert np.array_equal(np.asarray(sent.files.load(index.train[2])), np.asarray(index.files.load(index.train[2])))


def test_a_damaged_record_is_left_out_and_many_are_refused(tmp_path: Path) -> None:
    values = [encoded(number) for number in range(12)]
    index = scan(write(tmp_path / "one" / "bedroom_train_lmdb", [*values, b"no image"]))
    assert index.skipped == ((f"bedroom_train_lmdb/{12:040x}", "not a readable image of any known format"),)
    with pytest.raises(DataError, match=r"2 of 14 images looked at cannot be used"):
        scan(write(tmp_path / "two" / "bedroom_train_lmdb", [*values, b"no image", b""]))


def test_a_record_that_went_away_is_named(tmp_path: Path) -> None:
    index = scan(bedrooms(tmp_path))
    with pytest.raises(DataError, match=r"bedroom_train_lmdb/gone: no such record"):
        index.files.load("bedroom_train_lmdb/gone")
    shutil.rmtree(tmp_path / "bedroom_train_lmdb")
    with pytest.raises(DataError, match="bedroom_train_lmdb"):
        index.files.load(index.train[0])
    with pytest.raises(DataError, match="cannot be read"):
        _ = index.content_digest


def test_a_database_that_is_none_and_one_without_records_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "a" / "bedroom_train_lmdb"
    broken.mkdir(parents=True)
    (broken / "data.mdb").write_bytes(b"zip" * 5000)
    with pytest.raises(DataError, match="bedroom_train_lmdb is no LMDB that can be read"):
        scan(broken.parent)
    with pytest.raises(DataError, match="is an LMDB without records"):
        scan(write(tmp_path / "b", []))


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bedrooms(tmp_path)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match=r"--data .*: an LMDB folder needs the package lmdb: pip install lmdb"):
        scan(tmp_path)
