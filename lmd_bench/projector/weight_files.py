"""Reading files of tensors that others made, without running what they hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmd_bench.errors import WeightsError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A mapping of names to tensors, on CPU: .safetensors, or anything `torch.save` writes.

    A mapping under `state_dict` is taken out of what Lightning wraps around it (epoch, optimizer states, ...).
    Raises WeightsError for a file that is missing or damaged, holds pickled objects, or no such mapping.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a file of weights (.ckpt, .pt, .pth or .safetensors)")
    values = _read(path)
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    if not isinstance(values, Mapping) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise WeightsError(f"{path}: no mapping of names to tensors, nor one under 'state_dict'")
    return dict(values)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: holds pickled objects besides tensors, or is no file of weights. Loading such objects runs code,"
            " so it is refused; where you trust the file, save its 'state_dict' alone as .safetensors and give that"
        ) from None
    except Exception as error:  # a damaged file can end in nearly any error of torch, zipfile, pickle or safetensors
        raise WeightsError(f"{path}: cannot be read ({one_line(error)}); fetch or save it again") from None


def one_line(error: Exception) -> str:
    """An exception's text, fit for the end of a user's error."""
    return " ".join(str(error).split())[:200]
