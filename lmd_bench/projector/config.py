"""Which projector, and whether it can serve: values and checks. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmd_bench.errors import WeightsError

SHIPPED_PREFIX = "shipped:"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_SHARDED_INDEX = WEIGHTS_FILE + ".index.json"

ProjectorKind = Literal["pixels", "kl", "vq", "tiny", "light"]
CLASS_OF_KIND: Final[dict[str, str]] = {
    "kl": "AutoencoderKL",
    "vq": "VQModel",
    "tiny": "AutoencoderTiny",
    "light": "LightAutoencoder",
}
"""Kinds that load weights, and the class that stands in their folder's config.json."""


class ProjectorConfig(BaseModel):
    """A latent projector and how it is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ProjectorKind
    """`pixels`: no projection, latents are the pixels. `kl`: a diffusers AutoencoderKL. `vq`: a diffusers VQModel
    (VQGAN), latents before its codebook. `tiny`: a diffusers AutoencoderTiny. `light`: our own cheap encoder with a
    heavy decoder."""
    path: str | None = None
    """A local diffusers folder, or `shipped:NAME` for weights that come with the package. None for `pixels`."""
    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Latents are multiplied by it after the encoder and divided by it before the decoder. The authors of LMD use 1;
    latent diffusion with Stable Diffusion's autoencoder uses 0.18215."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format the projector's own network runs in, whatever the precision of training and of the file."""
    cache: str | None = None
    """Take latents from a cache instead of encoding in every step: the folder of one made by `lmd-bench lsp encode`,
    or `auto`, which has the run make its own, off the clock. None encodes in every step, as published."""
    cache_views: int = Field(default=4, ge=1)
    """Augmented views of every image in a cache that `auto` makes; epoch e reads view e modulo this number."""

    @model_validator(mode="after")
    def _path_belongs_to_kind(self) -> ProjectorConfig:
        if self.kind == "pixels":
            for name in ("path", "cache"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"projector kind 'pixels' loads nothing and has nothing to keep; leave out {name}"
                        f" {getattr(self, name)!r}"
                    )
        elif not self.path:
            raise ValueError(
                f"projector kind {self.kind!r} needs a path: a folder of a {CLASS_OF_KIND[self.kind]}, or shipped:NAME"
            )
        if self.cache == "":
            raise ValueError("projector cache is empty; give a folder, auto, or leave it out")
        return self


@dataclass(frozen=True)
class ProjectorInfo:
    """What can be known of a projector without loading it."""

    name: str
    factor: int  # image pixels to one latent position, along each axis
    latent_channels: int


def shipped_names() -> list[str]:
    """Names of the projectors that come with the package."""
    return sorted(folder.parent.name for folder in _shipped_root().glob("*/config.json"))


def _shipped_root() -> Path:
    return Path(__file__).parent / "weights"


def projector_folder(config: ProjectorConfig) -> Path:
    """The folder `config.path` means. Raises WeightsError where there is none."""
    return folder_of(config.path or "", CLASS_OF_KIND.get(config.kind, "autoencoder"))


def folder_of(path: str, wanted: str) -> Path:
    """The folder that a path or `shipped:NAME` means. `wanted`: the model class to name in the error.

    Raises WeightsError where there is none.
    """
    if path.startswith(SHIPPED_PREFIX):
        name = path.removeprefix(SHIPPED_PREFIX)
        if name not in shipped_names():
            raise WeightsError(f"projector {path}: no such weights; shipped are {', '.join(shipped_names())}")
        return _shipped_root() / name
    folder = Path(path).expanduser()
    if not folder.is_dir():
        state = "a file, not a folder" if folder.exists() else "no such folder"
        raise WeightsError(
            f"projector {path}: {state}; give a diffusers {wanted} folder, holding config.json and {WEIGHTS_FILE},"
            " or shipped:NAME"
        )
    return folder


def config_of_path(path: str, precision: str = "fp32") -> ProjectorConfig:
    """The configuration of a folder or `shipped:NAME` whose kind stands in its config.json.

    Raises WeightsError for a missing folder or a model of none of the kinds.
    """
    folder = folder_of(path, "autoencoder")
    found = _read_model_config(folder, "autoencoder").get("_class_name")
    for kind, class_name in CLASS_OF_KIND.items():
        if found == class_name:
            return ProjectorConfig.model_validate({"kind": kind, "path": path, "precision": precision})
    known = ", ".join(CLASS_OF_KIND.values())
    named = "has no _class_name" if found is None else f"is of the class {found}"
    raise WeightsError(f"projector {folder}: config.json {named}; known classes are {known}")


def check_projector(config: ProjectorConfig, image_size: int) -> ProjectorInfo:
    """Checks a projector's folder and that it takes square images of `image_size` pixels; loads no weights.

    Raises WeightsError for a missing folder, another model class, weights that are missing or not safetensors, sizes
    that config.json lacks or that contradict each other, or an image size that the factor does not divide.
    """
    info = _info(config)
    if image_size % info.factor:
        below = image_size - image_size % info.factor
        raise WeightsError(
            f"projector {info.name}: image_size {image_size} is not divisible by its factor {info.factor};"
            f" use {max(below, info.factor)} or {below + info.factor}"
        )
    return info


def weights_digest(config: ProjectorConfig) -> str:
    """What latents depend on, as 16 hex digits of a SHA-256: kind, scale, precision, config.json and weights.

    Reads all bytes of the weights. Raises WeightsError where `check_projector` does.
    """
    digest = hashlib.sha256(f"{config.kind} {config.scale!r} {config.precision}".encode())
    if config.kind != "pixels":
        _info(config)
        folder = projector_folder(config)
        for file in (folder / "config.json", *_weight_files(folder)):
            digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]


def weights_bytes(config: ProjectorConfig) -> int:
    """Bytes of the weights on disk; 0 for pixels."""
    return 0 if config.kind == "pixels" else sum(f.stat().st_size for f in _weight_files(projector_folder(config)))


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors file, or the index of several and these.

    Raises WeightsError where one is missing, and where both are there: diffusers would read the one, people mean
    the other.
    """
    index = folder / _SHARDED_INDEX
    if (folder / WEIGHTS_FILE).is_file():
        if index.is_file():
            raise WeightsError(
                f"projector {folder}: holds both {WEIGHTS_FILE} and {index.name}; remove the one that is not meant"
            )
        return [folder / WEIGHTS_FILE]
    if not index.is_file():
        raise WeightsError(
            f"projector {folder}: {WEIGHTS_FILE} is missing; only safetensors are loaded, so save the model again"
            " with safe_serialization=True"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"projector {index}: no index of weight files ({error}); save the model again") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightsError(f"projector {folder}: {missing[0]}, which {index.name} names, is missing; copy it there too")
    return [index, *(folder / name for name in names)]


# -- what config.json says --------------------------------------------------------------------------------------------


def _info(config: ProjectorConfig) -> ProjectorInfo:
    if config.kind == "pixels":
        return ProjectorInfo(name="pixels", factor=1, latent_channels=3)
    wanted, folder = CLASS_OF_KIND[config.kind], projector_folder(config)
    values = _read_model_config(folder, wanted)
    _require_class(folder, config.kind, values.get("_class_name"))
    _weight_files(folder)
    channels = (values.get("in_channels", 3), values.get("out_channels", 3))
    if channels != (3, 3):
        raise WeightsError(
            f"projector {folder}: not an autoencoder of RGB images; in_channels, out_channels must be 3, not"
            f" {channels[0]}, {channels[1]}"
        )
    try:
        factor, latent_channels = _SIZES[config.kind](values)
    except _UnusableError as problem:
        raise WeightsError(f"projector {folder}: config.json {problem}") from None
    return ProjectorInfo(_name(config, folder), factor, latent_channels)


def _name(config: ProjectorConfig, folder: Path) -> str:
    name = folder.name or str(folder)
    return name if config.scale == 1.0 else f"{name} x {config.scale:g}"


def _require_class(folder: Path, kind: str, found: object) -> None:
    if found == CLASS_OF_KIND[kind]:
        return
    fitting = [other for other, class_name in CLASS_OF_KIND.items() if class_name == found]
    remedy = f"; use kind '{fitting[0]}'" if fitting else ""
    holds = "config.json has no _class_name" if found is None else f"the model's class is {found}"
    raise WeightsError(f"projector {folder}: {holds}, kind '{kind}' needs {CLASS_OF_KIND[kind]}{remedy}")


def _read_model_config(folder: Path, wanted: str) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"projector {folder}: config.json is missing; give a diffusers {wanted} folder") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"projector {file}: cannot be read as JSON ({error}); save the model again") from None
    if not isinstance(values, dict):
        raise WeightsError(f"projector {file}: not a model configuration; give a diffusers {wanted} folder")
    return values


class _UnusableError(Exception):
    """What is wrong with values of config.json, in words that follow the file's name."""


def _count(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _UnusableError(f"has {key} {value!r}; a whole number of 1 or more is needed")
    return value


def _length(values: Mapping[str, Any], key: str, default: int) -> int:
    value = values.get(key, [0] * default)
    if not isinstance(value, list) or not value:
        raise _UnusableError(f"has {key} {value!r}; a list with one number per resolution is needed")
    return len(value)


def _kl_sizes(values: Mapping[str, Any]) -> tuple[int, int]:
    return 2 ** (_length(values, "block_out_channels", 1) - 1), _count(values, "latent_channels", 4)


def _vq_sizes(values: Mapping[str, Any]) -> tuple[int, int]:
    """Latents lie behind quant_conv, which goes from latent_channels to the codebook's width."""
    channels = _count(values, "latent_channels", 3)
    if values.get("vq_embed_dim") is not None:
        channels = _count(values, "vq_embed_dim", channels)
    return 2 ** (_length(values, "block_out_channels", 1) - 1), channels


def _tiny_sizes(values: Mapping[str, Any]) -> tuple[int, int]:
    """Every block of convolutions after the first halves; every one before the decoder's last enlarges."""
    factor = 2 ** (_length(values, "num_encoder_blocks", 4) - 1)
    enlarges = _count(values, "upsampling_scaling_factor", 2) ** (_length(values, "num_decoder_blocks", 4) - 1)
    if factor != enlarges:
        raise _UnusableError(
            f"shrinks images by {factor} (num_encoder_blocks) and enlarges latents by {enlarges} (num_decoder_blocks,"
            " upsampling_scaling_factor); both must be equal"
        )
    return factor, _count(values, "latent_channels", 4)


def _light_sizes(values: Mapping[str, Any]) -> tuple[int, int]:
    factor = _count(values, "factor", 8)
    if factor < 2 or factor & (factor - 1):
        raise _UnusableError(f"has factor {factor}; a power of two from 2 on is needed")
    return factor, _count(values, "latent_channels", 4)


_SIZES: Final[dict[str, Callable[[Mapping[str, Any]], tuple[int, int]]]] = {
    "kl": _kl_sizes,
    "vq": _vq_sizes,
    "tiny": _tiny_sizes,
    "light": _light_sizes,
}
