"""Captions of a folder's images: CSV or JSONL files, and what to say where captions are missing. No torch.

A CSV file has a header with `file` (or `image`, `filename`, `file_name`, `path`) and `caption` (or `text`); a JSONL
file has one object with the same keys in each line, as in the `metadata.jsonl` of Hugging Face's imagefolder. File
names are relative to the folder of images. Shards carry their own (`webdataset`), scenes make theirs (`scenes`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lmd_bench.config import DataConfig
from lmd_bench.errors import DataError

if TYPE_CHECKING:
    from lmd_bench.data.folders import FolderIndex

DEFAULT_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
"""Looked for in the folder of images, and in its train/ and val/, whose names are relative to them."""
FILE_KEYS = ("file", "image", "filename", "file_name", "path")
CAPTION_KEYS = ("caption", "text")
_SPLITS = ("", "train", "val")
_NAMED = 5


def read_captions(path: Path, only: Collection[str] | None = None) -> dict[str, str]:
    """Image name -> caption of a CSV file, or of a JSONL file by its ending .jsonl or .ndjson. Opens no image.

    only: names that are kept, None for all; every line is checked all the same. Captions lose blanks at their ends.
    Raises DataError, with file and line, for a file that cannot be read or is not UTF-8, for missing columns, a line
    that is no JSON object, an empty name or caption, and an image with two different captions.
    """
    read = _read_jsonl if path.suffix.lower() in (".jsonl", ".ndjson") else _read_csv
    captions: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for line, name, caption in read(path, file):
                _add(captions, f"{path} line {line}", name, caption, only)
    except OSError as error:
        raise DataError(f"{path}: captions cannot be read: {(error.strerror or str(error)).lower()}") from None
    return captions


def captions_for(names: Sequence[str], captions: Mapping[str, str], place: str) -> list[str]:
    """The caption of each image, in order. Raises DataError, which `place` begins, that names images without one."""
    missing = [name for name in names if name not in captions]
    if missing:
        raise DataError(f"{place}: {without_caption(missing, len(names))}")
    return [captions[name] for name in names]


def without_caption(missing: Sequence[str], num_images: int) -> str:
    """Which images have no caption: their number and the first five."""
    named = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else "")
    return f"{len(missing)} of {num_images} images have no caption: {named}; caption them, or leave them out"


def caption_files(root: Path, given: str | None) -> list[tuple[Path, str]]:
    """(file, what its names lack at their beginning) of the captions of a folder of images; none where there are none.

    given: `data.captions`, a path, relative ones from where the program runs, or else from `root`. Raises DataError
    for a given file that is not there, and for two files of captions in one folder.
    """
    if given is not None:
        found = next((path for path in (Path(given), root / given) if path.is_file()), None)
        if found is None:
            raise DataError(f"data.captions: no such file: {given}; give a CSV or JSONL file of captions")
        return [(found, "")]
    files: list[tuple[Path, str]] = []
    for split in _SPLITS:
        there = [root / split / name for name in DEFAULT_FILES if (root / split / name).is_file()]
        if len(there) > 1:
            raise DataError(
                f"{root / split}: {len(there)} files of captions, {there[0].name} and {there[1].name}; "
                "name one with --set data.captions=FILE"
            )
        files += [(path, f"{split}/" if split else "") for path in there]
    return files


def folder_captions(root: Path, given: str | None, names: Sequence[str]) -> list[str] | None:
    """The captions of images of a folder, or None where it has no file of captions. Raises DataError."""
    files = caption_files(root, given)
    if not files:
        return None
    captions: dict[str, str] = {}
    read: list[Path] = []
    for path, prefix in files:
        wanted = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        found = {prefix + name: caption for name, caption in read_captions(path, wanted).items()}
        for name, caption in found.items():
            if captions.get(name, caption) != caption:
                others = " or ".join(str(other) for other in read)
                raise DataError(f"{path}: {name} has another caption in {others}; keep one of them")
        captions |= found
        read.append(path)
    return captions_for(names, captions, " and ".join(str(path) for path in read))


def check_captions(index: FolderIndex | None, data: DataConfig) -> str | None:
    """None where every held-out image has a caption, otherwise why there are none, for a cell or an error.

    Reads the captions of the held-out images once; a source opened with the same index reads them no second time.
    Raises DataError for captions that are there and cannot be used: a damaged file, images that were forgotten.
    """
    if data.name == "scenes":
        return None
    if index is None:
        return "no folder of images is named; give --data DIR"
    return None if index.held_out_captions is not None else no_captions(index.root, index.files.caption_members)


def captions_digest(captions: Sequence[str]) -> str:
    """SHA-256 over captions in order, 16 hex digits."""
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()[:16]


def no_captions(root: str | os.PathLike[str], members: Sequence[str] = ()) -> str:
    """What to say of a folder without captions. members: what captions inside its shards would end in."""
    files = f"{', '.join(DEFAULT_FILES[:-1])} or {DEFAULT_FILES[-1]}"
    if not members:
        return f"no captions: {os.fspath(root)} has no {files}; add one, or name it with --set data.captions=FILE"
    endings = [f".{ending}" for ending in members]
    return (
        f"no captions: the shards of {os.fspath(root)} have no {', '.join(endings[:-1])} or {endings[-1]} members; "
        f"pack them, put {files} beside the shards, or name a file with --set data.captions=FILE"
    )


def _add(captions: dict[str, str], place: str, name: str, caption: str, only: Collection[str] | None) -> None:
    name, caption = _plain_name(name), caption.strip()
    if not name or not caption:
        raise DataError(f"{place}: an empty {'file name' if not name else f'caption of {name}'}; fill or remove it")
    if only is not None and name not in only:
        return
    if captions.setdefault(name, caption) != caption:
        raise DataError(f"{place}: {name} has another caption in an earlier line; keep one of them")


def _plain_name(name: str) -> str:
    """A relative path with forward slashes and without ./ at its beginning."""
    name = name.strip()
    return PurePosixPath(name.replace("\\", "/")).as_posix() if name else ""


def _lines(path: Path, file: Iterable[bytes]) -> Iterator[str]:
    """Lines as text, each checked to be UTF-8; a byte order mark is passed over."""
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} line {number}: not UTF-8; save the captions as UTF-8") from None


def _read_csv(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, str, str]]:
    """(line, name, caption) of every row."""
    rows = csv.reader(_lines(path, file), strict=True)
    try:
        header = next(rows, [])
        at = [_column(path, header, keys) for keys in (FILE_KEYS, CAPTION_KEYS)]
        for row in rows:
            if not row:
                continue
            if len(row) <= max(at):
                raise DataError(f"{path} line {rows.line_num}: {len(row)} columns, the header has {len(header)}")
            yield rows.line_num, row[at[0]], row[at[1]]
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num}: no CSV ({error})") from None


def _column(path: Path, header: Sequence[str], keys: Sequence[str]) -> int:
    names = [name.strip().lower() for name in header]
    for key in keys:
        if key in names:
            return names.index(key)
    found = ", ".join(header) if any(names) else "nothing"
    raise DataError(f"{path} line 1: the header has no column {' or '.join(keys)}; it has {found}")


def _read_jsonl(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, str, str]]:
    """(line, name, caption) of every line that is not blank."""
    for number, line in enumerate(_lines(path, file), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: no JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f'{place}: no JSON object; write {{"file_name": ..., "caption": ...}}')
        yield number, text_of(values, FILE_KEYS, place), text_of(values, CAPTION_KEYS, place)


def text_of(values: Mapping[str, Any], keys: Sequence[str], place: str) -> str:
    """The text under the first of `keys` that is there. Raises DataError, which `place` begins."""
    for key in keys:
        if key in values:
            if not isinstance(values[key], str):
                raise DataError(f"{place}: {key} is no text: {json.dumps(values[key])[:40]}")
            return str(values[key])
    raise DataError(f"{place}: no key {' or '.join(keys)}")
