"""Which projector, and whether it can serve: values and checks. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmd_bench.errors import WeightsError

SHIPPED_PREFIX = "shipped:"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_SHARDED_INDEX = WEIGHTS_FILE + ".index.json"


class ProjectorConfig(BaseModel):
    """A latent projector and how it is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["pixels", "kl"]
    """`pixels`: no projection, latents are the pixels. `kl`: a diffusers AutoencoderKL."""
    path: str | None = None
    """Of `kl`: a local diffusers folder, or `shipped:NAME` for weights that come with the package. Else None."""
    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    """Latents are multiplied by it after the encoder and divided by it before the decoder. The authors of LMD use 1;
    latent diffusion with Stable Diffusion's autoencoder uses 0.18215."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format the projector's own network runs in, whatever the precision of training."""

    @model_validator(mode="after")
    def _path_belongs_to_kind(self) -> ProjectorConfig:
        if self.kind == "kl" and not self.path:
            raise ValueError(
                "projector kind 'kl' needs a path: a diffusers AutoencoderKL folder, or shipped:scenes-kl-f8"
            )
        if self.kind == "pixels" and self.path is not None:
            raise ValueError(f"projector kind 'pixels' loads nothing; leave out path {self.path!r}")
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
    path = config.path or ""
    if path.startswith(SHIPPED_PREFIX):
        name = path.removeprefix(SHIPPED_PREFIX)
        if name not in shipped_names():
            raise WeightsError(f"projector {path}: no such weights; shipped are {', '.join(shipped_names())}")
        return _shipped_root() / name
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise WeightsError(
            f"projector {path}: no such folder; give a diffusers AutoencoderKL folder, holding config.json and"
            f" {WEIGHTS_FILE}, or shipped:NAME"
        )
    return folder


def check_projector(config: ProjectorConfig, image_size: int) -> ProjectorInfo:
    """Checks a projector's folder and that it takes square images of `image_size` pixels; loads no weights.

    Raises WeightsError for a missing folder, another model class, weights that are missing or not safetensors, or an
    image size that the factor does not divide.
    """
    info = _pixels_info() if config.kind == "pixels" else _kl_info(config)
    if image_size % info.factor:
        below = image_size - image_size % info.factor
        raise WeightsError(
            f"projector {info.name}: image_size {image_size} is not divisible by its factor {info.factor};"
            f" use {max(below, info.factor)} or {below + info.factor}"
        )
    return info


def _pixels_info() -> ProjectorInfo:
    return ProjectorInfo(name="pixels", factor=1, latent_channels=3)


def _kl_info(config: ProjectorConfig) -> ProjectorInfo:
    folder = projector_folder(config)
    values = _read_model_config(folder)
    if values.get("_class_name") != "AutoencoderKL":
        raise WeightsError(f"projector {folder}: holds a {values.get('_class_name')}; kind 'kl' needs an AutoencoderKL")
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, _SHARDED_INDEX)):
        raise WeightsError(
            f"projector {folder}: {WEIGHTS_FILE} is missing; only safetensors are loaded, so save the model again"
            " with safe_serialization=True"
        )
    channels, latent_channels = values.get("block_out_channels", [64]), values.get("latent_channels", 4)
    if not isinstance(channels, list) or not channels or not isinstance(latent_channels, int):
        raise WeightsError(f"projector {folder}: config.json lacks usable block_out_channels and latent_channels")
    if (values.get("in_channels", 3), values.get("out_channels", 3)) != (3, 3):
        raise WeightsError(f"projector {folder}: not an autoencoder of RGB images; in_channels, out_channels must be 3")
    return ProjectorInfo(_kl_name(config, folder), factor=2 ** (len(channels) - 1), latent_channels=latent_channels)


def _kl_name(config: ProjectorConfig, folder: Path) -> str:
    name = folder.name or str(folder)
    return name if config.scale == 1.0 else f"{name} x {config.scale:g}"


def _read_model_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"projector {folder}: config.json is missing; give a diffusers AutoencoderKL folder"
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"projector {file}: cannot be read as JSON ({error}); save the model again") from None
    if not isinstance(values, dict):
        raise WeightsError(f"projector {file}: not a model configuration; give a diffusers AutoencoderKL folder")
    return values
