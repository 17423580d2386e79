"""One image file as 8-bit RGB, whatever it holds. Needs Pillow and numpy, no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lmd_bench.errors import DataError

EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "gif"))
MIN_SIDE_PX = 8
"""Images with a shorter side below this are unusable: thumbnails of failed downloads, tracking pixels."""


class ImageFileError(DataError):
    """An image file that cannot be used; `reason` says why in a few words."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        super().__init__(f"{path}: {reason}; replace or remove this file")
        self.reason = reason


OpenFile = Callable[[], BinaryIO]
"""Opens an encoded image that is no file of its own."""


def load_rgb(path: str | PathLike[str], open_file: OpenFile | None = None) -> Image.Image:
    """The first frame of an image file as PIL RGB, upright, its shorter side at least 8 px.

    With `open_file`, `path` is only how errors name the image.

    EXIF orientation is applied, transparency is laid over white, grey of more than 8 bits is scaled by its full
    range (see `to_rgb`), colour profiles are ignored. Raises ImageFileError for a file that is damaged, truncated, too
    small, or larger than Pillow's decompression-bomb limit. Pillow's warnings stay inside.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode(path, open_file)


def decode(path: str | PathLike[str], open_file: OpenFile | None = None) -> Image.Image:
    """`load_rgb` for threads: the caller silences warnings, since Python's filters are shared by all threads."""
    try:
        with nullcontext(path) if open_file is None else open_file() as source, Image.open(source) as image:
            image.load()
            rgb = to_rgb(ImageOps.exif_transpose(image))
    # Pillow's readers let almost anything out on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ImageFileError(path, _reason(error)) from error
    if min(rgb.size) < MIN_SIDE_PX:
        raise ImageFileError(path, f"{rgb.width} x {rgb.height} px, a side below {MIN_SIDE_PX} px")
    return rgb


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image of any known format"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow's decompression-bomb limit"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB.

    `I;16` is scaled from 0..65535; `I` likewise, unless a value is larger (then from 0..2^31-1); `F` from the
    smallest of 0..1, 0..255, 0..65535, 0..maximum that holds its values. Negative values become black.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_deep_grey_to_8bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_8bit(values: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("holds infinite or undefined values")
    top = float(grey.max())
    full_scales = {"I": (65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0, top)}.get(mode, (65535.0,))
    full_scale = next(scale for scale in full_scales if top <= scale)
    return np.rint(np.clip(grey / full_scale, 0.0, 1.0) * 255.0).astype(np.uint8)


def center_square(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """The largest central square of an image at size x size px.

    The same picture as "resize the short side, crop the centre" up to half a pixel of rounding, antialiased, without
    the intermediate image that grows without bound for very long pictures.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), resample, box=(left, top, left + side, top + side))
