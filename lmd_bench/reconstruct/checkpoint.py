"""The trained method: from a finished cell, or with the weights of its authors' checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lmd_bench.checkpoints.official import OfficialMethod
from lmd_bench.config import RunConfig
from lmd_bench.errors import ConfigError
from lmd_bench.harness.weights import load_method_weights, weights_path
from lmd_bench.method import Method


@dataclass(frozen=True)
class Checkpoint:
    """A method ready to reconstruct, on its device."""

    method: Method
    path: Path
    """The file the weights came from."""
    config: RunConfig | None
    """Of the cell that trained it; None for an authors' checkpoint, imported or not."""

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
    def unit_px(self) -> int:
        """Side of a unit of random masks: the run's yardstick's, else that of the method's own, else an eighth of the
        image."""
        if self.config is not None:
            return self.config.evaluation.unit_px
        own = type(self.method).mask_unit_px(getattr(self.method, "config", None), self.method.data)
        return own or self.image_size // 8


def open_run(path: Path, device: torch.device, added: Mapping[str, str] | None = None) -> Checkpoint:
    """The method of a finished cell, from its folder or weights file. Raises BenchError where it cannot reconstruct."""
    checkpoint = open_cell(path, device, added)
    _require_any_mask(checkpoint.method, path)
    return checkpoint


def open_cell(path: Path, device: torch.device, added: Mapping[str, str] | None = None) -> Checkpoint:
    """The same for any use. Raises BenchError for a method whose predictions cannot be turned into pixels."""
    method, config = load_method_weights(path, added)
    _require_pixels(method, path)
    return Checkpoint(method.to(device), weights_path(path), config if isinstance(config, RunConfig) else None)


def open_official(opened: OfficialMethod, device: torch.device) -> Checkpoint:
    """A method with the weights of its authors' checkpoint. Raises ConfigError where it cannot reconstruct."""
    _require_pixels(opened.method, opened.file.path)
    _require_any_mask(opened.method, opened.file.path)
    return Checkpoint(opened.method.to(device), opened.file.path, None)


def _require_any_mask(method: Method, path: Path) -> None:
    if method.mask_pattern is not None:
        raise ConfigError(f"{path}: this method takes no masks but its own: {method.mask_pattern}")


def _require_pixels(method: Method, path: Path) -> None:
    obstacle = type(method).yardstick_obstacle(getattr(method, "config", None))
    if obstacle is not None:
        raise ConfigError(f"{path}: this method cannot reconstruct pixels: {obstacle}")
