"""Statistics of many images' features: streamed, saved and used again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmd_bench.errors import DataError, RecordError

_FORMAT = "lmd-bench feature statistics 1"
_BLOCK_ROWS = 512
"""Rows folded into the statistics at a time: enough for a matrix product to pay, few enough to wait on a GPU."""


class FeatureStatistics:
    """Mean and covariance of features, in float64, and the features themselves, in float32.

    Blocks are merged by the update of Chan, Golub and LeVeque (1979), which keeps its digits where a sum of squares
    less a square of sums would lose them. The features are kept because KID, precision and recall need them.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._pending: list[Tensor] = []
        self._blocks: list[Tensor] = []
        self._folded = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add features (B, D), on any device. Raises DataError for another width than before."""
        if features.ndim != 2 or not features.is_floating_point():
            raise DataError(f"features: need floats (B, D), got {features.dtype} {list(features.shape)}")
        kept = self._pending or self._blocks
        if kept and features.shape[1] != kept[0].shape[1]:
            raise DataError(f"features: {features.shape[1]} numbers for each image, {kept[0].shape[1]} before")
        self._pending.append(features.detach())
        self.num_images += len(features)
        if sum(len(rows) for rows in self._pending) >= _BLOCK_ROWS:
            self._fold()

    @property
    def features(self) -> Tensor:
        """(N, D) float32 on the CPU, in the order in which they came."""
        self._fold()
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks)]
        if not self._blocks:
            raise DataError("features: statistics of no images")
        return self._blocks[0]

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._fold()
        if self._mean is None:
            raise DataError("features: statistics of no images")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by N - 1. Raises DataError for fewer than 2 images."""
        self._fold()
        if self._scatter is None or self.num_images < 2:
            raise DataError(f"covariance of features: needs at least 2 images, got {self.num_images}")
        return self._scatter / (self.num_images - 1)

    def save(self, path: Path, identity: Mapping[str, str]) -> None:
        """Write everything to one safetensors file, complete or not at all.

        `identity` says what the statistics are of: extractor, hash of its weights, images' digest, their number, how
        they were resized.
        """
        tensors = {"features": self.features, "mean": self.mean, "scatter": self.covariance * (self.num_images - 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        metadata = {"format": _FORMAT, "identity": json.dumps(dict(identity), sort_keys=True)}
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            temporary.chmod(mode)  # the library makes files that their owner alone may read
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, str]) -> Self | None:
        """Statistics that `save` wrote; None where there is no file, or where it is of something else.

        Raises RecordError for a file that is damaged, or no such file at all.
        """
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise RecordError(f"{path}: not a file of feature statistics; delete it or name another")
                if metadata.get("identity") != json.dumps(dict(identity), sort_keys=True):
                    return None
                features, mean, scatter = (opened.get_tensor(name) for name in ("features", "mean", "scatter"))
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise RecordError(f"{path}: cannot be read ({reason}); delete it to compute it again") from None
        return cls._restored(path, features, mean, scatter)

    @classmethod
    def _restored(cls, path: Path, features: Tensor, mean: Tensor, scatter: Tensor) -> Self:
        width = features.shape[-1]
        if features.ndim != 2 or mean.shape != (width,) or scatter.shape != (width, width):
            raise RecordError(f"{path}: its tensors do not fit each other; delete it to compute it again")
        found = cls()
        found.num_images = found._folded = len(features)
        found._blocks, found._mean, found._scatter = [features], mean, scatter
        return found

    def _fold(self) -> None:
        """Merge what has come since the last time."""
        if not self._pending:
            return
        block = torch.cat(self._pending).to(device="cpu", dtype=torch.float32)
        self._pending = []
        if not bool(torch.isfinite(block).all()):
            raise DataError("features: not finite; the extractor's weights are damaged")
        self._blocks.append(block)
        rows = block.double()
        mean = rows.mean(dim=0)
        rows -= mean
        scatter = rows.T @ rows
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter = mean, scatter
        else:
            gap, total = mean - self._mean, self._folded + len(block)
            self._mean = self._mean + gap * (len(block) / total)
            # not in place: tensors of torch's inference mode may not be written to outside of it
            self._scatter = self._scatter + scatter + torch.outer(gap, gap) * (self._folded * len(block) / total)
        self._folded += len(block)
