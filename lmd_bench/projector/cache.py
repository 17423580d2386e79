"""Cached latents on disk: what a cache holds, and whether that is what a row needs. Imports no torch.

A cache is a folder: `latents.npy` (K, N, C, h, w), K augmented views of N training images, memory-mapped when read;
`labels.npy` (N,) int64 where the images have labels; `meta.json`, a `CacheMeta`. A folder under this name is complete:
it is written beside, as `NAME.partial-PID`, and renamed at the end. What a killed process leaves may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from lmd_bench.config import AugmentationConfig, DataConfig, resolve_crop
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.projector.config import ProjectorConfig, check_projector, weights_digest

if TYPE_CHECKING:
    from lmd_bench.data.folders import FolderIndex

LATENTS_FILE = "latents.npy"
LABELS_FILE = "labels.npy"
META_FILE = "meta.json"
FORMAT = 2
AUTO = "auto"
"""Value of `projector.cache` that asks for a cache of the harness's own making."""
AUTO_FOLDER = "latents"
"""Where, in a suite's folder, those caches lie."""
DType = Literal["float32", "float16"]


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CacheContents(_Values):
    """What decides the latents of a cache, but for the number of views, their seed and their number format."""

    projector: str
    """Its name, for people."""
    projector_digest: str
    """Of its weights and architecture (`weights_digest`)."""
    scale: float
    precision: str
    """Number format the encoder ran in."""
    data: str
    """`scenes`, or the folder's path, for people."""
    data_digest: str
    """Of a folder's training images (`FolderIndex.content_digest`: names, sizes and contents, read in pieces), or of
    what scenes are drawn from and the first few as they are drawn."""
    num_images: int
    image_size: int
    augmentation: dict[str, Any]
    """Only the values that have an effect."""

    @property
    def is_random(self) -> bool:
        """Whether two views of an image differ."""
        return bool(self.augmentation["flip"]) or self.augmentation["crop"] != "none"


class CacheMeta(_Values):
    """`meta.json`."""

    format: int
    contents: CacheContents
    views: int
    view_seed: int
    """View v is drawn as the augmentation of epoch v of a run with this seed."""
    dtype: DType
    shape: tuple[int, int, int, int, int]
    """(K, N, C, h, w)."""
    has_labels: bool
    seconds: float
    """Wall time of encoding: images read and augmented, encoded and written. Scenes were drawn before."""
    num_bytes: int
    """Of the latents."""
    device: str
    command: str
    source: dict[str, Any]
    """What the images' source said of itself when all was encoded."""

    def facts(self) -> dict[str, Any]:
        """What a run's record says of its cache."""
        named = ("views", "view_seed", "dtype", "shape", "seconds", "num_bytes", "device", "command")
        return {"projector": self.contents.projector, "projector_digest": self.contents.projector_digest} | {
            name: value for name, value in self.model_dump(mode="json").items() if name in named
        }


@dataclass(frozen=True)
class CacheNeed:
    """A row's cache, checked or still to be made."""

    projector: ProjectorConfig
    contents: CacheContents
    folder: Path
    views: int
    num_bytes: int
    """What is still to be written; 0 for a cache that is there."""


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def cache_contents(
    projector: ProjectorConfig,
    data: DataConfig,
    augmentation: AugmentationConfig,
    image_size: int,
    index: FolderIndex | None,
) -> CacheContents:
    """What a cache must hold for these settings. Hashes the projector's files and images; `index` is a folder's scan.

    Raises ConfigError where there is nothing to cache, WeightsError as `check_projector` does.
    """
    if projector.kind == "pixels":
        raise ConfigError("projector.cache: pixels are not projected, so there are no latents to cache; leave it out")
    info = check_projector(projector, image_size)
    if index is None:
        assert data.num_train is not None  # held by DataConfig
        from lmd_bench.data.source import scenes_digest  # brings torch, which this module does without

        drawn = scenes_digest(data.seed, image_size)
        named, number = "scenes", data.num_train
        digest = _digest(["scenes", data.seed, data.num_train, image_size, drawn])
    else:
        named, number, digest = str(index.root), index.num_train, index.content_digest
    return CacheContents(
        projector=info.name,
        projector_digest=weights_digest(projector),
        scale=projector.scale,
        precision=projector.precision,
        data=named,
        data_digest=digest,
        num_images=number,
        image_size=image_size,
        augmentation=_effective(resolve_crop(augmentation, data), data),
    )


def _effective(augmentation: AugmentationConfig, data: DataConfig) -> dict[str, Any]:
    """The values that change pixels: without crops no scale or ratio, and scenes are drawn at their size."""
    values = augmentation.model_dump(mode="json")
    if augmentation.crop == "none":
        unused = ("scale", "ratio", "interpolation") if data.name == "scenes" else ("scale", "ratio")
        return {name: value for name, value in values.items() if name not in unused}
    return values


def cache_bytes(projector: ProjectorConfig, contents: CacheContents, views: int, dtype: DType = "float32") -> int:
    """What the latents of a cache take on disk."""
    info = check_projector(projector, contents.image_size)
    positions = (contents.image_size // info.factor) ** 2
    return views * contents.num_images * info.latent_channels * positions * np.dtype(dtype).itemsize


def require_disk(folder: Path, num_bytes: int) -> None:
    """Raise ConfigError where `num_bytes` do not fit on the disk that `folder` is to lie on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ConfigError(
            f"latent cache {folder}: {free / 2**20:.0f} MiB free, {num_bytes / 2**20:.0f} MiB needed: "
            "free some space, use fewer views or float16, or choose another folder"
        )


# -- what a row needs -------------------------------------------------------------------------------------------------


def plan_cache(
    projector: ProjectorConfig,
    data: DataConfig,
    augmentation: AugmentationConfig,
    image_size: int,
    index: FolderIndex | None,
    suite_folder: Path,
) -> CacheNeed:
    """Where the cache of a row lies (`projector.cache` is set) and whether it is the right one.

    `auto` takes or plans one under `suite_folder`, named by all that decides what is in it, with `cache_views` views,
    or one where views do not differ. Raises DataError for a cache that is missing, damaged or of something else.
    """
    assert projector.cache is not None
    contents = cache_contents(projector, data, augmentation, image_size, index)
    if projector.cache != AUTO:
        folder = Path(projector.cache).expanduser()
        return CacheNeed(projector, contents, folder, check_cache(folder, contents).views, 0)
    views = projector.cache_views if contents.is_random else 1
    named = contents.model_dump(mode="json", exclude={"projector", "data"})
    folder = suite_folder / AUTO_FOLDER / _digest([FORMAT, named, views])
    if folder.exists():
        check_cache(folder, contents)
        return CacheNeed(projector, contents, folder, views, 0)
    return CacheNeed(projector, contents, folder, views, cache_bytes(projector, contents, views))


def check_cache(folder: Path, wanted: CacheContents) -> CacheMeta:
    """A cache's meta data. Raises DataError where it is missing, damaged, or holds something else than `wanted`."""
    meta = read_meta(folder)
    has, wants = _identity(meta.contents), _identity(wanted)
    wrong = [
        f"{name} {_shown(*has[name])}, wanted {_shown(*wants[name])}" for name in has if has[name][0] != wants[name][0]
    ]
    if wrong:
        raise DataError(
            f"latent cache {folder}: made with {'; '.join(wrong)}: "
            "make another with lmd-bench lsp encode, or set projector.cache to auto"
        )
    _open_arrays(folder, meta)
    return meta


def _identity(contents: CacheContents) -> dict[str, tuple[Any, str | None]]:
    """What must be equal, by name: the value, and for a digest what people call the thing."""
    words = " ".join(f"{name}={value}" for name, value in contents.augmentation.items())
    return {
        "projector": (contents.projector_digest, contents.projector),
        "projector.scale": (contents.scale, None),
        "projector.precision": (contents.precision, None),
        "data": (contents.data_digest, contents.data),
        "image_size": (contents.image_size, None),
        "augmentation": (_digest(contents.augmentation), words),
    }


def _shown(value: Any, name: str | None) -> str:
    return str(value) if name is None else f"{name} ({value})"


# -- files ------------------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> CacheMeta:
    """`meta.json` of a cache. Raises DataError where there is none, or it is not one."""
    if not folder.is_dir():
        raise DataError(f"latent cache {folder}: no such folder; make it with lmd-bench lsp encode, or use auto")
    path = folder / META_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("format") != FORMAT:
            raise DataError(
                f"latent cache {folder}: of format {values.get('format')}, this version reads {FORMAT}: encode again"
            )
        return CacheMeta.model_validate(values)
    except FileNotFoundError:
        raise DataError(f"latent cache {folder}: {META_FILE} is missing, so this is no complete cache") from None
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise DataError(f"latent cache {path}: damaged ({why}); delete the cache and encode again") from error


def open_cache(folder: Path) -> tuple[CacheMeta, NDArray[Any], NDArray[np.int64] | None]:
    """Meta data, latents (K, N, C, h, w) as a read-only memory map, and labels (N,). Raises DataError if damaged."""
    meta = read_meta(folder)
    return meta, *_open_arrays(folder, meta)


def _open_arrays(folder: Path, meta: CacheMeta) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    latents = _open_array(folder / LATENTS_FILE, meta.shape, meta.dtype, "r")
    labels = _open_array(folder / LABELS_FILE, meta.shape[1:2], "int64", None) if meta.has_labels else None
    return latents, labels


def _open_array(path: Path, shape: tuple[int, ...], dtype: str, mmap_mode: Literal["r"] | None) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # what numpy raises for files that are missing or cut short
        raise DataError(f"latent cache {path}: cannot be read ({error}); delete the cache and encode again") from error
    if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
        raise DataError(
            f"latent cache {path}: holds {array.dtype} {list(array.shape)}, {META_FILE} says {dtype} {list(shape)}: "
            "delete the cache and encode again"
        )
    return array
