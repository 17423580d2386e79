"""Reading files of tensors that others made, without running what they hold."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmd_bench.errors import WeightsError

_WRAPPERS = ("model", "state_dict")
"""Where training scripts keep the weights beside an optimizer's state and counters: MAE, SimMIM, GreenMIM and UM-MAE
under the first, Lightning (latent-diffusion, taming-transformers) under the second."""
_PARALLEL = "module."
"""What torch's DataParallel puts before every name."""
_EMA_PLACE = 4
"""In the DDIM repository's list: model, optimizer, epoch, step and, where it was kept, the moving average."""
_FOREIGN_STARTS = {
    b"<": "is a web page or XML, not weights: the download went wrong; fetch the file again",
    b"version https://git-lfs": "is a pointer of git-lfs, not the weights themselves: run git lfs pull",
}
_OWN_FORMAT = "lmd-bench"
_LONGEST_REASON = 200


@dataclass(frozen=True)
class CheckpointFile:
    """What lay in a file of weights."""

    path: Path
    tensors: dict[str, Tensor]
    """By the authors' names, on the CPU; never empty."""
    place: str
    """Where in the file they lay, in words."""
    arguments: Mapping[str, Any]
    """Options of the authors' script where it stores them beside the weights, as MAE's does; else empty."""
    beside: str | None = None
    """Other weights that the file holds and that were not taken, in words; None where there are none."""


def read_checkpoint(path: Path, *, ema: bool = False) -> CheckpointFile:
    """The tensors of a checkpoint: .safetensors, or what `torch.save` writes (.pth, .pt, .ckpt).

    They may lie bare, under `model` or `state_dict`, or as the first entry of a list, of which `ema` takes the moving
    average instead. Nothing that the file holds is run. Raises WeightsError for a file that is missing, empty, cut
    off, no checkpoint, holds pickled objects or no mapping of names to tensors, and for `ema` where there is none.
    """
    _require_file(path)
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    place, tensors = _moving_average(path, loaded) if ema else _tensors(path, loaded)
    if all(name.startswith(_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    arguments = loaded.get("args") if isinstance(loaded, Mapping) else None
    stored = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    return CheckpointFile(path, tensors, place, stored, None if ema else _beside(loaded))


def one_line(error: Exception) -> str:
    """An exception's text, fit for the end of a user's error."""
    return " ".join(str(error).split())[:_LONGEST_REASON]


# -- bytes ------------------------------------------------------------------------------------------------------------


def _require_file(path: Path) -> None:
    """Raise WeightsError for what a look at the first bytes shows to be no weights."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise WeightsError(f"{path}: {what}; give a file of weights (.safetensors, .pth, .pt or .ckpt)")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not start:
        raise WeightsError(f"{path}: is empty; fetch or save it again")
    for mark, reason in _FOREIGN_STARTS.items():
        if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(mark):
            raise WeightsError(f"{path}: {reason}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or struct.unpack("<Q", head)[0] > size - 8:
        raise WeightsError(f"{path}: cannot be read as safetensors (shorter than its header); fetch or save it again")
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            if (opened.metadata() or {}).get("format", "").startswith(_OWN_FORMAT):
                raise WeightsError(
                    f"{path}: weights of a finished cell, not an authors' checkpoint: reconstruct and sample take them "
                    "as they are, `lmd-bench checkpoint export` gives the authors' layout"
                )
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: cannot be read as safetensors ({one_line(error)}); fetch or save it again"
        ) from None


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive and not zipfile.is_zipfile(path):
        raise WeightsError(f"{path}: is cut off or damaged (a zip archive without its end); fetch or save it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values; MAE's script stores its options so
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise WeightsError(f"{path}: is no checkpoint of torch.save, or damaged; fetch or save it again") from None
        raise WeightsError(
            f"{path}: holds pickled objects ({refused[1]}) besides tensors. Loading such runs code, so it is refused; "
            'where you trust the file, save its tensors alone, as the README shows under "Authors\' checkpoints" '
            "(safetensors.torch.save_file(tensors, 'x.safetensors'))"
        ) from None
    # a damaged file ends in nearly any error of torch, zipfile or pickle, and torch's own words advise to run it
    except Exception as error:
        raise WeightsError(
            f"{path}: is no checkpoint of torch.save, or damaged ({type(error).__name__}); fetch or save it again"
        ) from None


# -- what was in it ---------------------------------------------------------------------------------------------------


def _tensors(path: Path, loaded: Any) -> tuple[str, dict[str, Tensor]]:
    if _maps_to_tensors(loaded):
        return "the whole file", dict(loaded)
    if isinstance(loaded, Mapping):
        for key in _WRAPPERS:
            if _maps_to_tensors(loaded.get(key)):
                return f"entry {key!r}", dict(loaded[key])
    if isinstance(loaded, list | tuple) and loaded and _maps_to_tensors(loaded[0]):
        return "first entry of the list", dict(loaded[0])
    wrappers = " or ".join(f"{key!r}" for key in _WRAPPERS)
    raise WeightsError(
        f"{path}: holds no mapping of names to tensors, neither by itself nor under {wrappers} nor as the first entry "
        f"of a list{_found(loaded)}"
    )


def _moving_average(path: Path, loaded: Any) -> tuple[str, dict[str, Tensor]]:
    if _has_moving_average(loaded):
        return "moving average, fifth entry of the list", dict(loaded[_EMA_PLACE])
    raise WeightsError(
        f"{path}: no moving average (--ema): it would be the fifth entry of a list, as the DDIM repository writes it; "
        "leave --ema out where the file's weights are the average already"
    )


def _has_moving_average(loaded: Any) -> bool:
    return isinstance(loaded, list | tuple) and len(loaded) > _EMA_PLACE and _maps_to_tensors(loaded[_EMA_PLACE])


def _beside(loaded: Any) -> str | None:
    return "moving average, fifth entry of the list (--ema takes it)" if _has_moving_average(loaded) else None


def _maps_to_tensors(values: Any) -> bool:
    return (
        isinstance(values, Mapping)
        and bool(values)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items())
    )


def _found(loaded: Any) -> str:
    if isinstance(loaded, Mapping):
        return f"; its entries are {', '.join(sorted(map(str, loaded))[:6])}" if loaded else "; it is empty"
    return f"; it holds a {type(loaded).__name__}"
