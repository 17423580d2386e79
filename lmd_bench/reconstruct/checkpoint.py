"""The trained method: from a finished cell, or with the weights of its authors' checkpoint."""

from __future__ import annotations

import argparse
import pickle
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
    def mask_ratio(self) -> float:
        """The share that the run's yardstick hides; 0.75 for an authors' checkpoint."""
        return 0.75 if self.config is None else 1 - self.config.evaluation.keep

    @property
    def unit_px(self) -> int:
        """Side of a unit of random masks: the run's yardstick's, else a token, else an eighth of the image."""
        if self.config is not None:
            return self.config.evaluation.unit_px
        return self.token_px or self.image_size // 8


def open_run(path: Path, device: torch.device, added: Mapping[str, str] | None = None) -> Checkpoint:
    """The method of a finished cell, from its folder or weights file. Raises BenchError where it cannot reconstruct."""
    method, config = load_method_weights(path, added)
    _require_reconstruction(method, path)
    return Checkpoint(method.to(device), weights_path(path), config)


def open_official(
    path: Path,
    method_name: str,
    device: torch.device,
    *,
    projector: str | None = None,
    normalized_targets: bool | None = None,
) -> Checkpoint:
    """A method with the weights of its authors' checkpoint (.pth, or .safetensors in the same layout).

    `projector` is a folder or `shipped:NAME`. Whether targets were normalised leaves no trace in weights: it is read
    off the arguments that MAE's script stores beside them, else `normalized_targets` must say it. Raises ConfigError
    where they were, since what such a model predicts cannot be turned back into pixels; WeightsError for a file that
    is missing, damaged, unsafe to load or of another layout.
    """
    method_class = load_method(method_name, {})
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
    options: dict[str, Any] = {"normalize_targets": False}
    if projector is not None:
        options["projector"] = config_of_path(projector)
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
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: cannot be loaded as plain tensors ({reason})") from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no mapping of tensors, neither by itself nor under 'model'")
    stored = getattr(loaded.get("args"), "norm_pix_loss", None)
    return state, stored if isinstance(stored, bool) else None


def _require_reconstruction(method: Method, path: Path) -> None:
    obstacle = type(method).yardstick_obstacle(getattr(method, "config", None))
    if obstacle is not None:
        raise ConfigError(f"{path}: this method cannot reconstruct pixels: {obstacle}")
    if method.mask_pattern is not None:
        raise ConfigError(f"{path}: this method takes no masks but its own: {method.mask_pattern}")
