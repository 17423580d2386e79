"""Words that `list`, `show` and `doctor` print. No torch."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lmd_bench.errors import WeightsError
from lmd_bench.evaluators.files import CLASSIFIER_FILE, CLIP_FILE, SHIPPED, checked_file
from lmd_bench.option_tree import models_within

if TYPE_CHECKING:
    from lmd_bench.pretrained import WeightsStatus

DATASETS = {
    "scenes": "generated images with labels and captions, any size, nothing to download",
    "folder": "your own images: --data DIR (class folders, train/ and val/, flat, LSUN's LMDB folders, "
    "or WebDataset shards)",
}
METRICS = {
    "MIT": "mean iteration time, ms: whole run, and the window up to t90",
    "MLT": "mean loss-decrease time, s per valid decrease = MIT x MLI",
    "MLI": "mean loss-decrease iterations per valid decrease (relative, fraction, grid, slope)",
    "TTQ": "training time until the common yardstick reaches a target and holds it",
    "PSNR": "dB over hidden pixels of held-out images",
    "SSIM": "of the composite image",
    "step cost": "phases, projector share, FLOPs, memory, ratio to the calibrator (lmd-bench profile)",
    "MAT": "mean accuracy-increase time of fine-tuning, s per percentage point of top-1 or top-5 accuracy",
    "probes": "top-1 and top-5 accuracy of a linear classifier and of k-NN on the frozen encoder's features",
    "FID, KID": "distances between the features of real and filled images: less is better (lmd-bench evaluate)",
    "precision, recall": "share of filled images among the real ones' features, and the other way round",
    "CLIP-score": "cosine between a filled image and its caption: more is better",
    "LPIPS": "how unlike the composite and the true image look to AlexNet: less is better; needs its weights",
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


def weights_lines(statuses: Iterable[WeightsStatus]) -> list[str]:
    """What `doctor` says of published weights: state, use, size, licence, and of missing ones where to put them."""
    lines = []
    for status in statuses:
        entry = status.entry
        lines.append(f"{status.name}: {status.state}" + (f": {status.path}" if status.path else ""))
        lines.append(f"    {entry.what}; for {entry.used_for}; about {entry.about_mib} MiB; licence {entry.licence}")
        lines.append(f"    {status.detail}")
        if status.state != "found":
            file = "" if entry.is_folder or entry.hub_file is None else f", its file {entry.hub_file}"
            lines.append(f"    from {entry.origin}{file}")
    return lines


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
    return found | {f"evaluators {name}": _evaluator_state(name) for name in (CLASSIFIER_FILE, CLIP_FILE)}


def _evaluator_state(name: str) -> str:
    try:
        file = checked_file(SHIPPED, name)
    except WeightsError as error:
        return f"missing or wrong: {error}"
    return f"found, {file.path.stat().st_size / 2**20:.1f} MiB"
