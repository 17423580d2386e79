"""WebDataset shards: found, split, indexed and read as folders of image files are."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers.captioned import csv_folder, scene_samples, shard_folder, write_tar

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.captions import check_captions
from lmd_bench.data.folders import FolderIndex, scan_folder
from lmd_bench.data.image_files import ImageFiles
from lmd_bench.data.scenes import Scenes
from lmd_bench.data.source import open_source
from lmd_bench.data.webdataset import ImageShards, find_shards
from lmd_bench.errors import DataError
from lmd_bench.harness.finetune import label_obstacle

CPU = torch.device("cpu")
PICTURES = [file for file, _, _ in scene_samples(3)]


def config(path: Path, **values: object) -> DataConfig:
    given = {"name": "folder", "path": str(path), "num_held_out": 6, "num_workers": 0, **values}
    return DataConfig.model_validate(given)


def scan(path: Path, **values: object) -> FolderIndex:
    return scan_folder(path, config(path, **values))


def shards_of(index: FolderIndex) -> ImageShards:
    assert isinstance(index.files, ImageShards)
    return index.files


def test_shards_hold_the_images_and_captions_that_were_packed(tmp_path: Path) -> None:
    index = scan(shard_folder(tmp_path))
    assert (index.layout, index.classes, index.files.storage) == ("shards", None, "webdataset")
    assert (index.num_train, len(index.held_out), index.num_checked) == (18, 6, 24)
    names = sorted(index.train + index.held_out)
    assert names[0] == "00000.tar/00000.png"
    assert len(names) == 24
    for number, (file, _, _) in enumerate(scene_samples(24)):
        name = f"{number % 2:05d}.tar/{number:05d}.png"
        assert index.files.open(name).read() == file
        assert index.files.excerpt(name) == ImageFiles(tmp_path).excerpt(_loose(tmp_path, file))


def _loose(folder: Path, file: bytes) -> str:
    (folder / "loose").write_bytes(file)
    return "loose"


@pytest.mark.parametrize("caption", ["txt", "caption", "json"])
def test_held_out_images_come_with_the_captions_of_their_keys(tmp_path: Path, caption: str) -> None:
    data = config(shard_folder(tmp_path, caption=caption))
    index = scan_folder(tmp_path, data)
    expected = [text for _, text, _ in scene_samples(24)]
    source = open_source(data, 32, AugmentationConfig(), CPU, index=index)
    assert check_captions(index, data) is None
    assert source.held_out_captions(6) == [expected[int(name[-9:-4])] for name in index.held_out]


def test_held_out_images_are_those_of_the_pixels_packed(tmp_path: Path) -> None:
    data = config(shard_folder(tmp_path))
    index = scan_folder(tmp_path, data)
    numbers = [int(name[-9:-4]) for name in index.held_out]
    source = open_source(data, 32, AugmentationConfig(), CPU, index=index)
    assert torch.equal(source.held_out(6), Scenes(0, 32).render(numbers))
    assert source.describe()["storage"] == "webdataset"


def test_classes_come_from_cls_members_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    root = shard_folder(tmp_path, 30, with_class=True)
    index = scan(root)
    assert index.layout == "shards"
    assert index.classes == tuple(str(number) for number in range(10))
    labels = Scenes(0, 32).labels(range(30)).tolist()
    assert index.train_labels == tuple(labels[int(name[-9:-4])] for name in index.train)
    names, found = index.labelled_validation(None, 0)
    assert found == [labels[int(name[-9:-4])] for name in names]


def test_samples_without_a_class_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    samples = scene_samples(8)
    members = [(f"{number}.png", file) for number, (file, _, _) in enumerate(samples)]
    classes = [(f"{number}.cls", b"1") for number in range(8) if number not in (3, 6)]
    for packed, reason in (
        ([*members, *classes], r"2 of 8 samples have no \.cls member, 0\.tar/3\.png first"),
        (members, r"the shards have no \.cls members"),
    ):
        write_tar(tmp_path / "0.tar", packed)
        data = config(tmp_path, num_held_out=2)
        index = scan_folder(tmp_path, data)
        source = open_source(data, 32, AugmentationConfig(), CPU, index=index)
        with pytest.raises(DataError, match=f"no labels: {reason}$"):
            index.labelled_validation(None, 0)
        with pytest.raises(DataError, match=f"no labels: {reason}$"):
            source.labelled(AugmentationConfig(), None)
        assert label_obstacle(source.num_classes, source.why_no_classes) == (f"no labels: {reason}".replace("\\", ""))


def test_workers_read_batches_from_shards(tmp_path: Path) -> None:
    data = config(shard_folder(tmp_path, 16), num_held_out=4, num_workers=1)
    source = open_source(data, 32, AugmentationConfig(crop="none", flip=False), CPU)
    batch = next(batches := source.batches(12, seed=0))
    batches.close()
    scenes = Scenes(0, 32).render(range(16)).float() / 255
    distances = (batch.images[:, None] - scenes[None]).abs().amax(dim=(2, 3, 4))
    assert distances.amin(dim=1).max() == 0
    assert len(distances.argmin(dim=1).unique()) == 12


def test_an_index_can_be_sent_to_another_process(tmp_path: Path) -> None:
    files = shards_of(scan(shard_folder(tmp_path)))
    other = pickle.loads(pickle.dumps(files))
    assert other.open("00001.tar/00001.png").read() == files.open("00001.tar/00001.png").read()


@pytest.mark.parametrize(
    ("train", "val"),
    [("cc3m-train-0000.tar", "cc3m-validation-0000.tar"), ("train/0000.tar", "val/0000.tar")],
)
def test_shards_of_the_validation_split_are_held_out(tmp_path: Path, train: str, val: str) -> None:
    for name, seed in ((train, 0), (val, 1), ("cc3m-test-0000.tar", 2)):
        if "/" not in train or "/" in name:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            files = [(f"{number}.png", file) for number, (file, _, _) in enumerate(scene_samples(6, seed=seed))]
            write_tar(tmp_path / name, files)
    index = scan(tmp_path)
    assert index.layout == "train and val"
    assert {name.rpartition("/")[0] for name in index.train} == {train}
    assert {name.rpartition("/")[0] for name in index.held_out} == {val}
    assert len(index.held_out) == 6
    dropped = () if "/" in train else ("cc3m-test-0000.tar",)
    assert index.passed_over == dropped
    note = f"--data {tmp_path}: 1 shard of a test split passed over: cc3m-test-0000.tar"
    assert index.passed_over_note() == (note if dropped else None)
    source = open_source(config(tmp_path), 32, AugmentationConfig(), CPU, index=index)
    assert source.describe()["num_shards_passed_over"] == len(dropped)


@pytest.mark.parametrize("ending", ["tar", "TAR"])
def test_a_single_shard_will_do(tmp_path: Path, ending: str) -> None:
    shard_folder(tmp_path, 16)
    shard = (tmp_path / "00001.tar").rename(tmp_path / f"00001.{ending}")
    index = scan(shard, num_held_out=2)
    assert {name.partition("/")[0] for name in index.train + index.held_out} == {shard.name}
    assert index.num_train == 6


def test_archives_beside_image_files_are_passed_over(tmp_path: Path) -> None:
    csv_folder(tmp_path, 8)
    write_tar(tmp_path / "backup.tar", [("a.png", PICTURES[0])])
    assert find_shards(tmp_path, "here") is None
    assert scan(tmp_path, num_held_out=2).files.storage == "files"
    assert find_shards(tmp_path / "nowhere", "here") is None


def test_keys_in_folders_and_endings_of_several_parts_follow_webdataset(tmp_path: Path) -> None:
    members = [
        ("./a/0.jpg", PICTURES[0]),
        ("./a/0.seg.png", PICTURES[1]),
        ("./a/0.TXT", b"one"),
        ("b/0.PNG", PICTURES[2]),
        ("b/0.json", json.dumps({"text": " two "}).encode()),
        ("b/.hidden", b""),
    ]
    write_tar(tmp_path / "0.tar", members)
    found = find_shards(tmp_path, "here")
    assert found is not None
    assert found.train == ["0.tar/a/0.jpg", "0.tar/b/0.png"]
    assert found.files.captions(found.train, None) == ["one", "two"]
    assert found.files.open("0.tar/b/0.png").read() == PICTURES[2]


def test_an_image_without_a_caption_is_named_once_captions_are_wanted(tmp_path: Path) -> None:
    members = [(f"{number}.png", file) for number, file in enumerate(PICTURES)]
    write_tar(tmp_path / "0.tar", [*members, ("1.txt", b"one")])
    write_tar(tmp_path / "1.tar", members)
    index = scan(tmp_path, num_held_out=1)
    shards = shards_of(index)
    with pytest.raises(DataError, match=r"1 of 2 images have no caption: 0\.tar/0\.png; caption them"):
        shards.captions(["0.tar/0.png", "0.tar/1.png"], None)
    assert shards.captions(["1.tar/0.png"], None) is None
    given = tmp_path / "own.csv"
    given.write_text("file,caption\n1.tar/0.png,given\n")
    assert shards.captions(["1.tar/0.png"], str(given)) == ["given"]


def test_shards_without_captions_take_those_of_a_file_beside_them(tmp_path: Path) -> None:
    members = [(f"{number}.png", file) for number, (file, _, _) in enumerate(scene_samples(4))]
    write_tar(tmp_path / "A.TAR", members)
    data = config(tmp_path, num_held_out=1)
    reason = check_captions(scan_folder(tmp_path, data), data)
    assert reason == (
        f"no captions: the shards of {tmp_path} have no .txt, .caption or .json members; pack them, put captions.csv, "
        "captions.jsonl, metadata.csv or metadata.jsonl beside the shards, or name a file with --set data.captions=FILE"
    )
    lines = [f"A.TAR/{number}.png,caption {number}" for number in range(4)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *lines]) + "\n")
    index = scan_folder(tmp_path, data)
    assert check_captions(index, data) is None
    assert index.held_out_captions == (f"caption {index.held_out[0][6]}",)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("0.txt", b" \n", r"0\.tar/0\.txt: an empty caption"),
        ("0.txt", "Möwe".encode("latin-1"), r"0\.tar/0\.txt: not UTF-8"),
        ("0.json", b"{", r"0\.tar/0\.json: no JSON"),
        ("0.json", b'{"title": "x"}', r"0\.tar/0\.json: no key caption or text"),
    ],
)
def test_a_caption_that_cannot_be_used_is_named(tmp_path: Path, name: str, body: bytes, message: str) -> None:
    write_tar(tmp_path / "0.tar", [("0.png", PICTURES[0]), (name, body)])
    found = find_shards(tmp_path, "here")
    assert found is not None
    with pytest.raises(DataError, match=message):
        found.files.captions(found.train, None)


def test_a_key_with_two_images_or_one_member_twice_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    write_tar(shard, [("0.png", PICTURES[0]), ("0.jpg", PICTURES[1])])
    with pytest.raises(
        DataError, match=r"--data here: 0\.tar: key 0 has two images; give every image a key of its own"
    ):
        find_shards(tmp_path, "--data here")
    write_tar(shard, [("0.png", PICTURES[0]), ("0.txt", b"a"), ("0.txt", b"b")])
    with pytest.raises(DataError, match=r"0\.tar: 0\.txt is there twice"):
        find_shards(tmp_path, "here")


def test_a_shard_without_images_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0.txt", b"a"), ("1.txt", b"b")])
    with pytest.raises(DataError, match=r"0\.tar: no images among its 2 keys; remove it, or pack images"):
        find_shards(tmp_path, "here")


@pytest.mark.parametrize("damage", ["cut in data", "cut at a member", "header", "no tar", "gzip", "empty"])
def test_a_damaged_shard_is_refused_not_read_as_a_short_one(tmp_path: Path, damage: str) -> None:
    shard = write_tar(tmp_path / "0.tar", [(f"{number}.png", file) for number, file in enumerate(PICTURES)])
    whole = shard.read_bytes()
    second = 512 + -(-len(PICTURES[0]) // 512) * 512
    changed = {
        "cut in data": whole[: second + 700],
        "cut at a member": whole[:second],
        "header": whole[:second] + b"\x07" * 512 + whole[second + 512 :],
        "no tar": PICTURES[0],
        "gzip": gzip.compress(whole),
        "empty": b"",
    }
    shard.write_bytes(changed[damage])
    with pytest.raises(DataError, match=r"here: 0\.tar: .*download or pack it again"):
        find_shards(tmp_path, "here")


def test_a_shard_that_shrinks_afterwards_makes_its_images_unusable(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [(f"{number}.png", file) for number, file in enumerate(PICTURES)])
    found = find_shards(tmp_path, "here")
    assert found is not None
    shard.write_bytes(shard.read_bytes()[:600])
    assert found.files.fault("0.tar/2.png") == "the shard is shorter than it was"
    with pytest.raises(FileNotFoundError):
        found.files.open("0.tar/9.png")
