"""Small captioned data sets for tests: generated scenes as PNG files with captions, as a folder or as shards."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lmd_bench.data.scenes import CLASSES, Scenes


def scene_samples(count: int, image_size: int = 32, seed: int = 0, first: int = 0) -> list[tuple[bytes, str, str]]:
    """`count` scenes from index `first` on as (PNG file, caption, class)."""
    scenes, indices = Scenes(seed, image_size), range(first, first + count)
    images = scenes.render(indices).permute(0, 2, 3, 1).numpy()
    classes = [CLASSES[label] for label in scenes.labels(indices).tolist()]
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    return list(zip(files, scenes.captions(indices), classes, strict=True))


def write_images(root: Path, count: int, image_size: int = 32, seed: int = 0) -> dict[str, str]:
    """Writes scenes as 00000.png, 00001.png, ... into `root`; returns file name -> caption."""
    root.mkdir(parents=True, exist_ok=True)
    captions = {}
    for number, (file, caption, _) in enumerate(scene_samples(count, image_size, seed)):
        name = f"{number:05d}.png"
        (root / name).write_bytes(file)
        captions[name] = caption
    return captions


def csv_folder(root: Path, count: int = 24, image_size: int = 32, seed: int = 0) -> Path:
    """A flat folder of scenes with captions.csv (file, caption)."""
    captions = write_images(root, count, image_size, seed)
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "caption"), *captions.items()])
    return root


def jsonl_folder(root: Path, count: int = 24, image_size: int = 32, seed: int = 0) -> Path:
    """The same with metadata.jsonl (file_name, text), as Hugging Face's imagefolder has it."""
    captions = write_images(root, count, image_size, seed)
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def shard_folder(
    root: Path,
    count: int = 24,
    image_size: int = 32,
    seed: int = 0,
    *,
    num_shards: int = 2,
    caption: str = "txt",
    with_class: bool = False,
) -> Path:
    """The same as WebDataset shards 00000.tar, 00001.tar, ...

    caption: the extension that captions have: txt, caption, or json ({"caption": ...}). with_class: .cls files too.
    """
    root.mkdir(parents=True, exist_ok=True)
    samples = scene_samples(count, image_size, seed)
    for shard in range(num_shards):
        members: list[tuple[str, bytes]] = []
        for number in range(shard, count, num_shards):
            file, text, label = samples[number]
            body = json.dumps({"caption": text}) if caption == "json" else text
            members += [(f"{number:05d}.png", file), (f"{number:05d}.{caption}", body.encode())]
            if with_class:
                members.append((f"{number:05d}.cls", str(CLASSES.index(label)).encode()))
        write_tar(root / f"{shard:05d}.tar", members)
    return root


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """An uncompressed tar of (name, contents)."""
    with tarfile.open(path, "w") as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path
