"""The trained method: from a finished cell, or with the weights of its authors' checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lmd_bench.config import RunConfig
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.harness.weights import load_method_weights, weights_path
from lmd_bench.method import Method
from lmd_bench.nn.config import AutoencoderConfig
from lmd_bench.projector.config import config_of_path
from lmd_bench.registry import load_method


@dataclass(frozen=True)
class Checkpoint:
    """A method ready to reconstruct, on its device."""

    method: Method
    path: Path
    """The file the weights came from."""
    config: RunConfig | None
    """Of the cell that trained it; None for an authors' checkpoint."""

    @property
    def image_size(self) -> int:
        """Side of the images the method takes, px."""
        return self.method.data.image_size

    @property
    def token_px(self) -> int | None:
        """Side of the area a token stands for, px; None for methods without tokens."""
        return type(self.method).token_px(getattr(self.method, "config", None), self.method.data)

    @property
    def keep(self) -> float:
        """The share that the run's yardstick leaves visible; 0.25 for an authors' checkpoint."""
        return 0.25 if self.config is None else self.config.evaluation.keep

    @property
    def shape_text(self) -> str:
        """The network's sizes in words, among them the heads, on which an authors' checkpoint is silent."""
        config = getattr(self.method, "config", None)
        if not isinstance(config, AutoencoderConfig):
            return type(self.method).__name__
        parts = (
            f"{part} of width {getattr(config, f'{part}_width')}, {getattr(config, f'{part}_depth')} blocks and "
            f"{getattr(config, f'{part}_heads')} heads"
            for part in ("encoder", "decoder")
        )
        return ", ".join(parts)

    @property
    def unit_px(self) -> int:
        """Side of a unit of random masks: the run's yardstick's, else a token, else an eighth of the image."""
        if self.config is not None:
            return self.config.evaluation.unit_px
        return self.token_px or self.image_size // 8


def open_run(path: Path, device: torch.device, added: Mapping[str, str] | None = None) -> Checkpoint:
    """The method of a finished cell, from its folder or weights file. Raises BenchError where it cannot reconstruct."""
    checkpoint = open_cell(path, device, added)
    if checkpoint.method.mask_pattern is not None:
        raise ConfigError(f"{path}: this method takes no masks but its own: {checkpoint.method.mask_pattern}")
    return checkpoint


def open_cell(path: Path, device: torch.device, added: Mapping[str, str] | None = None) -> Checkpoint:
    """The same for any use. Raises BenchError for a method whose predictions cannot be turned into pixels."""
    method, config = load_method_weights(path, added)
    obstacle = type(method).yardstick_obstacle(getattr(method, "config", None))
    if obstacle is not None:
        raise ConfigError(f"{path}: this method cannot reconstruct pixels: {obstacle}")
    return Checkpoint(method.to(device), weights_path(path), config)


def open_official(
    path: Path,
    method_name: str,
    device: torch.device,
    *,
    projector: str | None = None,
    normalized_targets: bool | None = None,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
) -> Checkpoint:
    """A method with the weights of its authors' checkpoint (.pth, or .safetensors in the same layout).

    `projector` is a folder or `shipped:NAME`; heads left out are those of the published model of that width. Whether
    targets were normalised leaves no trace in weights: it is read off the arguments that MAE's script stores beside
    them, else `normalized_targets` must say it. Raises ConfigError where they were, since what such a model predicts
    cannot be turned back into pixels, and for options that the method does not have; WeightsError for a file that is
    missing, damaged, unsafe to load or of another layout.
    """
    method_class = load_method(method_name, {})
    options = _official_options(method_class, projector, encoder_heads, decoder_heads)
    state, normalized = _read_official(path)
    if normalized is None:
        normalized = normalized_targets
    if normalized is None:
        raise ConfigError(
            f"{path}: the checkpoint does not say whether its targets were normalised (the authors' scripts do so by "
            "default): say --plain-targets or --normalized-targets"
        )
    if normalized:
        raise ConfigError(
            f"{path}: trained on normalised targets: the mean and deviation of a hidden patch are not predicted, so "
            "its pixels cannot be reconstructed; use weights trained on plain targets"
        )
    try:
        method = method_class.from_official(state, **options)
    except ValidationError as error:
        raise ConfigError(f"--checkpoint {path} --method {method_name}: {error.errors()[0]['msg']}") from error
    except TypeError as error:
        raise ConfigError(f"--method {method_name}: {error}") from error
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    if method.projector_name == "none":
        raise ConfigError(f"--method {method_name}: its weights hold no projector: name one with --projector")
    return Checkpoint(method.to(device).eval(), path, None)


def _official_options(
    method_class: type[Method], projector: str | None, encoder_heads: int | None, decoder_heads: int | None
) -> dict[str, Any]:
    """What was given of the method's options. Raises ConfigError for one that the method does not have."""
    given = {"projector": projector, "encoder_heads": encoder_heads, "decoder_heads": decoder_heads}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if name not in method_class.Config.model_fields:
            what = "works on pixels, without a projector" if name == "projector" else "has no such heads"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {method_class.__name__} {what}; leave it out")
    if projector is not None:
        options["projector"] = config_of_path(projector)
    return {**options, "normalize_targets": False}


def _read_official(path: Path) -> tuple[dict[str, Tensor], bool | None]:
    """The mapping of tensors, and whether targets were normalised where the file says so."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give the authors' .pth file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), None
        except SafetensorError as error:
            raise WeightsError(f"{path}: cannot be read as safetensors ({error})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values; MAE's script stores its options so
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    # junk makes the unpickler raise almost anything, and torch's own words advise to run what the file holds
    except Exception as error:
        raise WeightsError(
            f"{path}: not a PyTorch checkpoint of plain tensors; give the authors' .pth file as they published it"
        ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"{path}: holds no mapping of tensors, neither by itself nor under 'model'")
    stored = getattr(loaded.get("args"), "norm_pix_loss", None)
    return state, stored if isinstance(stored, bool) else None
