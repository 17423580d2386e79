"""The rules by which the reference runs made weights, inputs and mask noise, and the statistics they left.

The rules stand in each reference file (`fill_rule`, `input_rule`, `mask_rule`); the weight of `weighted_sum` does
not: cos(0.001 i) over the flattened tensor was found by matching the reference's position tables to 1e-12.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmd_bench.nn.pos_embed import sincos_pos_embed

REFERENCE = Path(__file__).parent / "reference"


def load_reference(name: str) -> Any:
    """A reference file by its name without `.json`."""
    return json.loads((REFERENCE / f"{name}.json").read_text())


_CHUNK = 1 << 14  # numbers of a tensor made at a time: they stay in the processor's cache


def uniform(start: int, stop: int, key_index: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """v(i, k) in [-1, 1): the top 24 bits of splitmix64's finaliser over elements start <= i < stop of key k."""
    mask = (1 << 64) - 1
    offset = np.uint64(0x9E3779B97F4A7C15 * (key_index + 1) & mask)
    z = np.arange(start, stop, dtype=np.uint64) + offset
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return 2.0 * ((z >> np.uint64(40)).astype(np.float64) / 2.0**24) - 1.0


def filled_tensor(entry: dict[str, Any]) -> Tensor:
    """The reference weight of one manifest entry (not for entries whose fill is "fixed")."""
    shape = entry["shape"]
    numel = math.prod(shape)
    centre, scale = _centre_and_scale(entry, numel)
    values = np.empty(numel, dtype=np.float32)
    for start in range(0, numel, _CHUNK):
        stop = min(start + _CHUNK, numel)
        values[start:stop] = centre + scale * uniform(start, stop, entry["index"])
    return torch.from_numpy(values.reshape(shape))


def _centre_and_scale(entry: dict[str, Any], numel: int) -> tuple[float, float]:
    if entry["fill"] == "matrix":
        return 0.0, math.sqrt(3.0 / (numel // entry["shape"][0]))
    if entry["fill"] == "norm_weight":
        return 1.0, 0.2
    if entry["fill"] == "vector":
        return 0.0, 0.1
    raise ValueError(f"no rule for fill {entry['fill']!r} of {entry['key']}")


def filled_state_dict(manifest: dict[str, Any]) -> dict[str, Tensor]:
    """A whole checkpoint in the authors' layout; its fixed entries are position tables as the code makes them."""
    return {
        entry["key"]: _position_table(entry["shape"]) if entry["fill"] == "fixed" else filled_tensor(entry)
        for entry in manifest["keys"]
    }


def _position_table(shape: list[int]) -> Tensor:
    """A square grid's, with or without a class row in front."""
    grid_size = math.isqrt(shape[1])
    return sincos_pos_embed(shape[2], grid_size)[:, grid_size**2 + 1 - shape[1] :]


def reference_input(*shape: int) -> Tensor:
    """sin(0.013 i) + 0.5 cos(0.0071 i) in C order, float32."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    values = np.sin(0.013 * i) + 0.5 * np.cos(0.0071 * i)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def reference_draw(*shape: int) -> Tensor:
    """sqrt(2) cos(0.017 i + 0.3), float32: what stands for every draw of normal noise in the diffusion references."""
    values = math.sqrt(2) * np.cos(0.017 * np.arange(math.prod(shape), dtype=np.float64) + 0.3)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def reference_noise(batch_size: int, num_tokens: int) -> Tensor:
    """The mask noise frac(sin(12.9898 (j + 1) + 78.233 (b + 1)) * 43758.5453), float64."""
    b, j = np.mgrid[1 : batch_size + 1, 1 : num_tokens + 1].astype(np.float64)
    values = np.sin(12.9898 * j + 78.233 * b) * 43758.5453
    return torch.from_numpy(values - np.floor(values))


def assert_matches(actual: Tensor, expected: dict[str, Any]) -> None:
    """Compare a tensor with the statistics of the reference's tensor."""
    assert list(actual.shape) == expected["shape"]
    values = actual.detach().double().flatten()
    largest = max(1.0, abs(expected["min"]), abs(expected["max"]))
    for name, tensor in {"first8": values[:8], "last4": values[-4:]}.items():
        wanted = torch.tensor(expected[name], dtype=torch.float64)
        assert (tensor - wanted).abs().max().item() <= 2e-5 * largest, name
    for name, value in {"min": values.min(), "max": values.max()}.items():
        assert abs(value.item() - expected[name]) <= 2e-5 * largest, name
    moments = {"mean": values.mean(), "std_unbiased": values.std(), "abs_mean": values.abs().mean()}
    for name, value in moments.items():
        assert abs(value.item() - expected[name]) <= 2e-5, name
    weights = torch.cos(0.001 * torch.arange(values.numel(), dtype=torch.float64))
    norm = values.norm().item()
    assert abs(norm - expected["l2"]) <= 1e-4 * expected["l2"], "l2"
    wanted_sum = expected["weighted_sum"]
    assert abs((weights @ values).item() - wanted_sum) <= 1e-4 * abs(wanted_sum), "weighted_sum"
