"""Encoded images by name, wherever they lie: files below a folder here, records of an LMDB in `lsun`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from PIL import Image

from lmd_bench.data.decode import ImageFileError, decode, load_rgb


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files below `root`; names are paths relative to it, with forward slashes."""

    root: Path
    storage: ClassVar[str] = "files"
    """How records call this kind."""

    def open(self, name: str) -> BinaryIO:
        """The encoded image. Raises OSError where there is none, or it cannot be read."""
        return (self.root / name).open("rb")

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


class ImageSet(NamedTuple):
    """Images that were found below a folder, not looked at yet."""

    files: ImageFiles
    train: list[str]
    """Sorted names."""
    val: list[str] | None
    """Names of images that are kept for validation; None where they are not told apart."""
    prefix: str
    """What every name in `train` begins with before its class folder, if it has one."""
