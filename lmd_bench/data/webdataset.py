"""WebDataset shards: tar files whose members of one key are one sample (an image, a caption, a class). No torch.

`00012.jpg`, `00012.txt` and `00012.cls` in a shard are the image, caption and class of sample `00012`
(github.com/webdataset/webdataset). Shards are read where they lie: one pass over their headers notes where each image
and caption begins, and from then on these are read by their offsets, in any order and from any process.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmd_bench.data.captions import CAPTION_KEYS, folder_captions, text_of, without_caption
from lmd_bench.data.decode import EXTENSIONS
from lmd_bench.data.image_files import ImageFiles, ImageSet, pieces
from lmd_bench.errors import DataError

CAPTION_EXTENSIONS = ("txt", "caption", "json")
"""What captions end in; of a sample with several the first counts. JSON has a key `caption` or `text`."""
_CLASS_EXTENSION = "cls"
_BLOCK = tarfile.BLOCKSIZE
_SPLIT = re.compile(r"(?<![a-z])(train|val|validation|valid|test)(?![a-z])")
_VAL = frozenset(("val", "validation", "valid"))
_SHARD_ENDING = re.compile(r"\.tar/", re.IGNORECASE)


class _Piece(NamedTuple):
    """Where something lies in a shard."""

    offset: int
    size: int


_NOTHING = _Piece(0, -1)


@dataclass(frozen=True, eq=False)
class ImageShards(ImageFiles):
    """Images in tar files below `root`; names are "shard.tar/key.jpg". Use `find_shards`.

    Its lists are arrays, not Python objects, which forked workers would copy by counting references to them.
    """

    names: NDArray[np.bytes_]
    """Names of all images, sorted."""
    images: NDArray[np.int64]
    """(N, 2): offset and size of each image in its shard."""
    texts: NDArray[np.int64]
    """(N, 2): those of its caption; a size of -1 where there is none."""
    text_kinds: NDArray[np.int8]
    """Its ending, an index into CAPTION_EXTENSIONS."""
    labels: NDArray[np.str_] | None
    """What .cls members say; None unless every image has one."""
    no_label: str = ""
    """Why `labels` is None."""
    storage: ClassVar[str] = "webdataset"
    caption_members: ClassVar[tuple[str, ...]] = CAPTION_EXTENSIONS

    def open(self, name: str) -> BinaryIO:
        """The encoded image. Raises OSError where there is none, or it cannot be read."""
        return io.BytesIO(self._read(name, _Piece(*self.images[self._position(name)].tolist())))

    def excerpt(self, name: str) -> tuple[int, bytes]:
        """As for files: the rest of a large image is not read."""
        offset, size = self.images[self._position(name)].tolist()
        parts = [self._read(name, _Piece(offset + start, stop - start)) for start, stop in pieces(size)]
        return size, b"".join(parts)

    def class_of(self, name: str, prefix: str) -> str | None:
        """What the image's .cls member says; None where images have none."""
        return None if self.labels is None else str(self.labels[self._position(name)])

    def why_no_classes(self) -> str:
        """Which samples have no .cls member."""
        return self.no_label

    def class_order(self, label: str) -> tuple[int, str]:
        """Numbers by their value, before words."""
        return (int(label), "") if label.isdecimal() else (2**62, label)

    def captions(self, names: Sequence[str], given: str | None) -> list[str] | None:
        """The captions of images: of the file `given`, or else the shards' own, or else those of a file beside them.

        None where there is none of these.
        """
        if given is not None:
            return folder_captions(self.root, given, names)
        positions = [self._position(name) for name in names]
        missing = [name for name, at in zip(names, positions, strict=True) if self.texts[at, 1] < 0]
        if len(missing) == len(names):
            return folder_captions(self.root, None, names)
        if missing:
            raise DataError(f"--data {self.root}: {without_caption(missing, len(names))}")
        return [self._caption(name, at) for name, at in zip(names, positions, strict=True)]

    def _caption(self, name: str, position: int) -> str:
        kind = CAPTION_EXTENSIONS[int(self.text_kinds[position])]
        place = f"--data {self.root}: {name.rpartition('.')[0]}.{kind}"
        try:
            text = self._read(name, _Piece(*self.texts[position].tolist())).decode("utf-8-sig")
            values = json.loads(text) if kind == "json" else {"text": text}
        except OSError as error:
            raise DataError(f"{place} cannot be read: {error.strerror}; look at the disk") from None
        except UnicodeDecodeError:
            raise DataError(f"{place}: not UTF-8; write captions as UTF-8") from None
        except ValueError as error:
            raise DataError(f"{place}: no JSON ({error})") from None
        caption = text_of(values if isinstance(values, dict) else {}, CAPTION_KEYS, place).strip()
        if not caption:
            raise DataError(f"{place}: an empty caption; fill it, or leave the image out")
        return caption

    def _position(self, name: str) -> int:
        encoded = os.fsencode(name)
        position = int(np.searchsorted(self.names, np.bytes_(encoded)))
        if position == len(self.names) or self.names[position] != encoded:
            raise FileNotFoundError(2, "no such image in its shard", name)
        return position

    def _read(self, name: str, piece: _Piece) -> bytes:
        ending = _SHARD_ENDING.search(name)
        assert ending is not None  # of every name in an index
        shard = name[: ending.end() - 1]
        with (self.root / shard).open("rb") as file:
            file.seek(piece.offset)
            found = file.read(piece.size)
        if len(found) < piece.size:
            raise OSError(5, "the shard is shorter than it was", shard)
        return found


def find_shards(path: Path, place: str) -> ImageSet | None:
    """The images of the *.tar files in a folder, or in its train/ and val/; None where there are none.

    A single tar file will do too. Beside images or other folders tar files are archives somebody left there, and
    passed over. Without train/ and val/, shards whose names hold the word val or validation are held out of those with
    the word train; those with the word test are passed over, and named in `passed_over`, unless they are all there is.
    Raises DataError for a shard that is damaged or compressed, holds no image, or one key twice.
    """
    val: list[str] = []
    passed_over: list[str] = []
    if path.is_file() and path.suffix.lower() == ".tar":
        root, train = path.parent, [path.name]
    else:
        root = path
        train, val, passed_over = _split(_shards_in(root))
        if not train:
            train, val = ([f"{split}/{name}" for name in _shards_in(root / split)] for split in ("train", "val"))
    if not train:
        return None
    samples = {shard: sorted(_samples(root, shard, place), key=lambda sample: sample.name) for shard in train + val}
    return ImageSet(
        _shards(root, [sample for found in samples.values() for sample in found]),
        sorted(sample.name for shard in train for sample in samples[shard]),
        sorted(sample.name for shard in val for sample in samples[shard]) if val else None,
        "",
        tuple(passed_over),
    )


def _shards_in(folder: Path) -> list[str]:
    """Names of a folder's tar files, sorted; none where images or folders of other names lie beside them."""
    tars: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith("."):
                    continue
                if name.rpartition(".")[2] in EXTENSIONS or entry.is_dir():
                    return []
                if name.endswith(".tar"):
                    tars.append(entry.name)
    except OSError:  # whoever looks for image files there says what is wrong with the folder
        return []
    return sorted(tars)


def _split(shards: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(shards to train on, shards to hold images out of, shards that are passed over)."""
    words = {shard: _SPLIT.findall(shard.lower()) for shard in shards}
    val = [shard for shard in shards if any(word in _VAL for word in words[shard])]
    test = [shard for shard in shards if "test" in words[shard]]
    train = [shard for shard in shards if shard not in val and shard not in test]
    if train:
        return train, val, test
    return (val, [], test) if val else (test, [], [])


# -- indexing ---------------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """What one key of a shard holds."""

    name: str = ""
    image: _Piece = _NOTHING
    texts: dict[str, _Piece] = field(default_factory=dict)
    label: str | None = None


def _shards(root: Path, samples: list[_Sample]) -> ImageShards:
    """The index as arrays, in the order of encoded names."""
    encoded = np.array([os.fsencode(sample.name) for sample in samples])
    order = np.argsort(encoded, kind="stable")
    kinds = [next((k for k, kind in enumerate(CAPTION_EXTENSIONS) if kind in s.texts), 0) for s in samples]
    texts = [s.texts.get(CAPTION_EXTENSIONS[kind], _NOTHING) for s, kind in zip(samples, kinds, strict=True)]
    unlabelled = [sample.name for sample in samples if sample.label is None]
    return ImageShards(
        root,
        names=encoded[order],
        images=np.array([sample.image for sample in samples], dtype=np.int64)[order],
        texts=np.array(texts, dtype=np.int64)[order],
        text_kinds=np.array(kinds, dtype=np.int8)[order],
        labels=np.array([sample.label for sample in samples], dtype=np.str_)[order] if not unlabelled else None,
        no_label=_no_label(unlabelled, len(samples)),
    )


def _no_label(unlabelled: Sequence[str], num_samples: int) -> str:
    """Why shards have no classes; empty where they have."""
    if not unlabelled:
        return ""
    if len(unlabelled) == num_samples:
        return "the shards have no .cls members"
    return f"{len(unlabelled)} of {num_samples} samples have no .cls member, {min(unlabelled)} first"


def _samples(root: Path, shard: str, place: str) -> list[_Sample]:
    """Samples of a shard that have an image. Raises DataError."""
    where = f"{place}: {shard}"
    samples: dict[str, _Sample] = {}
    try:
        with (root / shard).open("rb") as file:
            for member in _members(file, where):
                _note(samples, member, file, shard, where)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {(error.strerror or str(error)).lower()}") from None
    with_image = [sample for sample in samples.values() if sample.name]
    if not with_image:
        raise DataError(f"{where}: no images among its {len(samples)} keys; remove it, or pack images ({_KINDS})")
    return with_image


_KINDS = ", ".join(sorted(EXTENSIONS))


def _note(samples: dict[str, _Sample], member: tarfile.TarInfo, file: BinaryIO, shard: str, where: str) -> None:
    """Adds what a member is to the sample of its key: the name up to the first dot of its last part."""
    folder, _, last = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or last.startswith("."):
        return
    key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
    sample = samples.setdefault(key, _Sample())
    piece = _Piece(member.offset_data, member.size)
    if extension in EXTENSIONS:
        if sample.name:
            raise DataError(f"{where}: key {key} has two images; give every image a key of its own")
        sample.name, sample.image = f"{shard}/{key}.{extension}", piece
    elif extension in CAPTION_EXTENSIONS:
        if extension in sample.texts:
            raise DataError(f"{where}: {key}.{extension} is there twice; give every image a key of its own")
        sample.texts[extension] = piece
    elif extension == _CLASS_EXTENSION:
        file.seek(piece.offset)
        sample.label = file.read(piece.size).decode("utf-8", "replace").strip()


def _members(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """Files of an uncompressed tar. tarfile itself takes a broken header for the end, and a missing end for one."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                if member.isreg():
                    yield member
                tar.members = []  # type: ignore[attr-defined]  # a list of all, which nobody reads, would fill memory
    except tarfile.TarError as error:
        raise DataError(f"{where}: no uncompressed tar that can be read ({error}); download or pack it again") from None
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(f"{where}: damaged or cut off after {end} bytes; download or pack it again")
