"""Encoded images by name, wherever they lie: files below a folder here, records of an LMDB in `lsun`. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from PIL import Image

from lmd_bench.data.decode import ImageFileError, decode, load_rgb

_PIECE = 4096
_WHOLE_UP_TO = 3 * _PIECE


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files below `root`; names are paths relative to it, with forward slashes."""

    root: Path
    storage: ClassVar[str] = "files"
    """How records call this kind."""

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
