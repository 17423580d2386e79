"""Words that `list`, `show` and `doctor` print. No torch."""

from __future__ import annotations

import re
import types
import typing
from importlib import resources
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lmd_bench.option_tree import models_within

DATASETS = {
    "scenes": "generated images with labels and captions, any size, nothing to download",
    "folder": "your own images: --data DIR (class folders, train/ and val/, flat, or LSUN's LMDB folders)",
}
METRICS = {
    "MIT": "mean iteration time, ms: whole run, and the window up to t90",
    "MLT": "mean loss-decrease time, s per valid decrease = MIT x MLI",
    "MLI": "mean loss-decrease iterations per valid decrease (relative, fraction, grid, slope)",
    "TTQ": "training time until the common yardstick reaches a target and holds it",
    "PSNR": "dB over hidden pixels of held-out images",
    "SSIM": "of the composite image",
    "step cost": "phases, projector share, FLOPs, memory, ratio to the calibrator (lmd-bench profile)",
    "MAT": "mean accuracy-increase time: not built yet",
    "FID, KID": "not built yet",
    "CLIP-score": "not built yet",
    "LPIPS": "not built yet",
}


def describe_options(model: type[BaseModel]) -> list[str]:
    """`name: type = default` for every option of a method, nested ones with dotted names.

    Of an option that may be of several kinds, each kind's own options follow, marked with it.
    """
    return _described(model, "", "")


def _described(model: type[BaseModel], prefix: str, mark: str) -> list[str]:
    lines = []
    for name, info in model.model_fields.items():
        inner = models_within(info.annotation)
        if info.annotation not in inner:  # of one model alone, its options say all
            lines.append(f"{prefix}{name}{mark}: {_type_text(info)} {_default_text(info)}")
        for one in inner:
            kind = f" ({_kind(one, info)})" if len(inner) > 1 else ""
            lines += _described(one, f"{prefix}{name}.", kind or mark)
    return lines


def _type_text(info: FieldInfo) -> str:
    inner = models_within(info.annotation)
    if len(inner) > 1:
        return " or ".join(_kind(one, info) for one in inner)
    annotation = _without_bounds(info.annotation)
    if isinstance(annotation, type):
        return annotation.__name__
    return re.sub(r"(?<!['\w.-])(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", str(annotation))  # names without their modules


def _without_bounds(annotation: Any) -> Any:
    """A type without what `Annotated` adds to it or to its parts, such as bounds of the entries of a tuple."""
    return typing.get_type_hints(types.SimpleNamespace(__annotations__={"option": annotation}))["option"]


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    return f"= {_kind(type(default), info) if isinstance(default, BaseModel) else repr(default)}"


def _kind(model: type[BaseModel], info: FieldInfo) -> str:
    """What tells a model from the others that an option may be: `kind swin`, where a field says so; else its name."""
    key = info.discriminator
    if isinstance(key, str) and key in model.model_fields:
        return f"{key} {model.model_fields[key].default}"
    return model.__name__


def shipped_weights() -> dict[str, str]:
    """Weights inside the package -> their size, or that they are missing."""
    folder = resources.files("lmd_bench") / "projector" / "weights"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name) if folder.is_dir() else []:
        file = entry / "diffusion_pytorch_model.safetensors"
        if entry.is_dir():
            there = file.is_file()
            state = f"found, {len(file.read_bytes()) / 2**20:.1f} MiB" if there else "missing: reinstall lmd-bench"
            found[f"shipped:{entry.name}"] = state
    return found
