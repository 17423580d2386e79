"""Encoded images by name, wherever they lie: files below a folder here, records of an LMDB in `lsun`. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from PIL import Image

from lmd_bench.data.captions import folder_captions
from lmd_bench.data.decode import ImageFileError, decode, load_rgb

NO_CLASS_FOLDERS = "the images do not lie in class folders"
"""Why images have no labels, where these would be class folders."""
_PIECE = 4096
_WHOLE_UP_TO = 3 * _PIECE


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files below `root`; names are paths relative to it, with forward slashes."""

    root: Path
    storage: ClassVar[str] = "files"
    """How records call this kind."""
    caption_members: ClassVar[tuple[str, ...]] = ()
    """What captions that lie among the images end in, where such are read."""

    def open(self, name: str) -> BinaryIO:
        """The encoded image. Raises OSError where there is none, or it cannot be read."""
        return (self.root / name).open("rb")

    def excerpt(self, name: str) -> tuple[int, bytes]:
        """Size of the encoded image in bytes, and its `pieces`. Raises OSError as `open` does."""
        with self.open(name) as file:
            size = file.seek(0, os.SEEK_END)
            found = []
            for start, stop in pieces(size):
                file.seek(start)
                found.append(file.read(stop - start))
        return size, b"".join(found)

    def load(self, name: str) -> Image.Image:
        """The image as `decode.load_rgb` gives it. Raises ImageFileError."""
        return load_rgb(self.root / name, lambda: self.open(name))

    def class_of(self, name: str, prefix: str) -> str | None:
        """The class of an image: the folder that it lies in below `prefix`; None where it lies in none."""
        inside = name.removeprefix(prefix)
        return inside.partition("/")[0] if "/" in inside else None

    def why_no_classes(self) -> str:
        """Why images have no classes, where they have none."""
        return NO_CLASS_FOLDERS

    def class_order(self, label: str) -> tuple[int, str]:
        """What classes are sorted by: their names, as torchvision's ImageFolder does."""
        return (0, label)

    def captions(self, names: Sequence[str], given: str | None) -> list[str] | None:
        """The captions of images, in order; None where there are none at all.

        given: a file of captions (`data.captions`); None looks for the usual ones. Raises DataError for captions that
        cannot be used, and names images that have none.
        """
        return folder_captions(self.root, given, names)

    def fault(self, name: str) -> str | None:
        """Why an image cannot be used, None where it can. For threads: the caller silences Pillow's warnings."""
        try:
            decode(self.root / name, lambda: self.open(name))
        except ImageFileError as fault:
            return fault.reason
        return None


def pieces(size: int) -> list[tuple[int, int]]:
    """(start, stop) of the bytes that stand for an encoded image of this size: all up to 12 KiB, of more the first, the
    middle and the last 4 KiB."""
    if size <= _WHOLE_UP_TO:
        return [(0, size)]
    return [(start, start + _PIECE) for start in (0, size // 2, size - _PIECE)]


class ImageSet(NamedTuple):
    """Images that were found below a folder, not looked at yet."""

    files: ImageFiles
    train: list[str]
    """Sorted names."""
    val: list[str] | None
    """Names of images that are kept for validation; None where they are not told apart."""
    prefix: str
    """What every name in `train` begins with before its class folder, if it has one."""
    passed_over: tuple[str, ...] = ()
    """Shards that are there and not used."""
